//! The time a question and its answer take.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::lab::interrupt;
use crate::lab::traffic::tally;
use crate::lab::traffic::{End, timed_out};

/// UDP payload of question and answer, bytes: a small request, as RPCs are.
const PAYLOAD: usize = 64;

/// Times of questions and answers.
#[derive(Clone, Debug, Serialize)]
pub struct LatencyReport {
    /// Questions answered.
    pub answered: u64,
    /// Questions not answered in time.
    pub lost: u64,
    /// Shortest time, microseconds.
    pub min_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Longest time.
    pub max_us: f64,
}

/// Asks over UDP, one question at a time, for `duration`.
///
/// # Errors
/// The sockets fail, nothing was answered at all, or a signal came.
pub fn measure(from: End<'_>, to: End<'_>, duration: Duration) -> Result<LatencyReport> {
    let (asker, _) = from.udp()?;
    let (answerer, place) = to.udp()?;
    asker
        .connect(place)
        .with_context(|| format!("cannot reach {place}"))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let answering = scope.spawn(|| -> Result<()> {
            let mut buffer = [0; PAYLOAD];
            while !stop.load(Ordering::Relaxed) {
                match answerer.recv_from(&mut buffer) {
                    Ok((len, asker)) => _ = answerer.send_to(&buffer[..len], asker),
                    Err(error) if timed_out(&error) => {}
                    Err(error) => return Err(error).context("cannot receive questions"),
                }
            }
            Ok(())
        });
        let result = ask(&asker, duration);
        stop.store(true, Ordering::Relaxed);
        answering
            .join()
            .map_err(|_| anyhow!("a traffic thread panicked"))??;
        result
    })
}

fn ask(socket: &std::net::UdpSocket, duration: Duration) -> Result<LatencyReport> {
    // 1 ns to 10 s, to three digits.
    let mut times = Histogram::<u64>::new_with_bounds(1, 10_000_000_000, 3)?;
    let (mut question, mut answer) = ([0; PAYLOAD], [0; PAYLOAD]);
    let (start, mut sequence, mut lost) = (Instant::now(), 0, 0);
    while start.elapsed() < duration {
        interrupt::check()?;
        tally::fill(&mut question, sequence);
        let asked = Instant::now();
        socket
            .send(&question)
            .or_else(|error| super::udp::is_loss(&error).then_some(0).ok_or(error))?;
        loop {
            match socket.recv(&mut answer) {
                // An answer to an earlier question, given up on.
                Ok(len) if tally::read(&answer[..len]) != Some(sequence) => {}
                Ok(_) => {
                    times.saturating_record(u64::try_from(asked.elapsed().as_nanos()).unwrap_or(u64::MAX));
                    break;
                }
                Err(error) if timed_out(&error) || super::udp::is_loss(&error) => {
                    lost += 1;
                    break;
                }
                Err(error) => return Err(error).context("cannot receive answers"),
            }
        }
        sequence += 1;
    }
    anyhow::ensure!(!times.is_empty(), "none of {lost} questions was answered");
    let us = |ns: u64| ns as f64 / 1e3;
    Ok(LatencyReport {
        answered: times.len(),
        lost,
        min_us: us(times.min()),
        p50_us: us(times.value_at_quantile(0.5)),
        p99_us: us(times.value_at_quantile(0.99)),
        p999_us: us(times.value_at_quantile(0.999)),
        max_us: us(times.max()),
    })
}
