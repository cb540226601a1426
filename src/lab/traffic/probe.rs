//! A thin stream of numbered datagrams in both directions, running while something else happens.
//!
//! This is the judge of outages: start it, cause the fault, stop it, and read how long nothing arrived, and whether
//! anything was lost, doubled, swapped, changed, or kept back.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use crate::lab::traffic::tally::{self, Counts, Tally};
use crate::lab::traffic::udp::is_loss;
use crate::lab::traffic::{End, timed_out};

/// Datagrams a second each way: a gap is known to the millisecond.
pub const RATE: u32 = 1000;
/// UDP payload, bytes.
const PAYLOAD: usize = 128;
/// Where in it the time of sending is, microseconds since the probe began.
const TIME: std::ops::Range<usize> = tally::HEADER..tally::HEADER + 8;
/// How long the last datagrams may be under way.
const DRAIN: Duration = Duration::from_millis(300);

/// What arrived at one end, and the age of each datagram, milliseconds.
type Heard = (Tally, Vec<u32>);

/// A probe under way; dropping it ends it without a report.
#[derive(Debug)]
pub struct Probe {
    stop: Flags,
    senders: [JoinHandle<Result<(u64, Instant)>>; 2],
    receivers: [JoinHandle<Result<Heard>>; 2],
    received: [Arc<AtomicU64>; 2],
}

/// Tell the threads to end, at the latest when dropped.
#[derive(Debug, Default)]
struct Flags {
    sending: Arc<AtomicBool>,
    receiving: Arc<AtomicBool>,
}

impl Drop for Flags {
    fn drop(&mut self) {
        self.sending.store(true, Ordering::Relaxed);
        self.receiving.store(true, Ordering::Relaxed);
    }
}

/// The accounts of both directions.
#[derive(Clone, Debug, Serialize)]
pub struct ProbeReport {
    /// From the first end to the second.
    pub there: Counts,
    /// From the second end to the first.
    pub back: Counts,
    /// How long each datagram was under way, milliseconds, both ways together.
    #[serde(skip)]
    pub ages_ms: Vec<u32>,
}

impl ProbeReport {
    /// The longest time in which one direction was silent.
    pub fn longest_gap(&self) -> Duration {
        Duration::from_millis(self.there.longest_gap_ms.max(self.back.longest_gap_ms))
    }

    /// Datagrams lost, both ways together.
    pub fn lost(&self) -> u64 {
        self.there.lost + self.back.lost
    }

    /// Datagrams changed, both ways together.
    pub fn corrupted(&self) -> u64 {
        self.there.corrupted + self.back.corrupted
    }

    /// Datagrams that arrived twice, both ways together.
    pub fn duplicates(&self) -> u64 {
        self.there.duplicates + self.back.duplicates
    }

    /// Datagrams overtaken, both ways together.
    pub fn reordered(&self) -> u64 {
        self.there.reordered + self.back.reordered
    }

    /// Datagrams that were under way for `age` or longer.
    pub fn older_than(&self, age: Duration) -> usize {
        let ages = self.ages_ms.iter();
        ages.filter(|&&ms| u128::from(ms) >= age.as_millis()).count()
    }
}

impl Probe {
    /// Starts sending at [`RATE`] both ways.
    ///
    /// # Errors
    /// An address is not there.
    pub fn start(one: End<'_>, two: End<'_>) -> Result<Self> {
        let (socket_one, addr_one) = one.udp()?;
        let (socket_two, addr_two) = two.udp()?;
        let stop = Flags::default();
        let received = [Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0))];
        let start = Instant::now();
        let sender = |socket: &UdpSocket, to| -> Result<_> {
            let (socket, flag) = (socket.try_clone()?, Arc::clone(&stop.sending));
            Ok(thread::spawn(move || send(&socket, to, &flag, start)))
        };
        let receiver = |socket: &UdpSocket, counter: &Arc<AtomicU64>| -> Result<_> {
            let (socket, flag, counter) = (
                socket.try_clone()?,
                Arc::clone(&stop.receiving),
                Arc::clone(counter),
            );
            Ok(thread::spawn(move || receive(&socket, &flag, &counter, start)))
        };
        Ok(Self {
            receivers: [
                receiver(&socket_two, &received[0])?,
                receiver(&socket_one, &received[1])?,
            ],
            senders: [sender(&socket_one, addr_two)?, sender(&socket_two, addr_one)?],
            stop,
            received,
        })
    }

    /// How many arrived so far, there and back; a test waits on this for recovery.
    pub fn received(&self) -> (u64, u64) {
        (
            self.received[0].load(Ordering::Relaxed),
            self.received[1].load(Ordering::Relaxed),
        )
    }

    /// Ends the probe and closes the accounts.
    ///
    /// # Errors
    /// A socket failed in another way than by losing datagrams.
    pub fn stop(self) -> Result<ProbeReport> {
        self.stop.sending.store(true, Ordering::Relaxed);
        let [there, back] = self.senders.map(join);
        thread::sleep(DRAIN);
        self.stop.receiving.store(true, Ordering::Relaxed);
        let [tally_there, tally_back] = self.receivers.map(join);
        let ((sent_there, end_there), (sent_back, end_back)) = (there?, back?);
        let ((tally_there, mut ages_ms), (tally_back, ages_back)) = (tally_there?, tally_back?);
        ages_ms.extend(ages_back);
        Ok(ProbeReport {
            there: tally_there.close(sent_there, end_there),
            back: tally_back.close(sent_back, end_back),
            ages_ms,
        })
    }
}

fn join<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a probe thread panicked"))?
}

fn send(socket: &UdpSocket, to: SocketAddr, stop: &AtomicBool, start: Instant) -> Result<(u64, Instant)> {
    let mut datagram = [0; PAYLOAD];
    let mut sequence = 0;
    while !stop.load(Ordering::Relaxed) {
        tally::fill(&mut datagram, sequence);
        let now_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        datagram[TIME].copy_from_slice(&now_us.to_be_bytes());
        tally::stamp(&mut datagram, sequence);
        match socket.send_to(&datagram, to) {
            Ok(_) => {}
            Err(error) if is_loss(&error) || error.raw_os_error() == Some(libc::EPERM) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot probe {to}")),
        }
        sequence += 1;
        let due = start + Duration::from_secs(1) / RATE * u32::try_from(sequence).unwrap_or(u32::MAX);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok((sequence, Instant::now()))
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, counter: &AtomicU64, start: Instant) -> Result<Heard> {
    let mut tally = Tally::default();
    tally.open(start);
    let mut ages_ms = Vec::new();
    let mut buffer = [0; PAYLOAD + 1];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(len) => {
                let now = Instant::now();
                tally.note(&buffer[..len], now);
                ages_ms.extend(age_ms(&buffer[..len], now.duration_since(start)));
                counter.store(tally.received(), Ordering::Relaxed);
            }
            Err(error) if timed_out(&error) || is_loss(&error) => {}
            Err(error) => return Err(error).context("cannot receive probes"),
        }
    }
    Ok((tally, ages_ms))
}

/// How long a datagram that arrives `now` was under way, if it is one of ours.
fn age_ms(datagram: &[u8], now: Duration) -> Option<u32> {
    tally::read(datagram)?;
    let sent_us = u64::from_be_bytes(datagram.get(TIME)?.try_into().ok()?);
    let age = now.saturating_sub(Duration::from_micros(sent_us));
    Some(u32::try_from(age.as_millis()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_tells_its_age_unless_it_was_changed() {
        let mut datagram = [0; PAYLOAD];
        tally::fill(&mut datagram, 7);
        datagram[TIME].copy_from_slice(&2_000_000_u64.to_be_bytes());
        tally::stamp(&mut datagram, 7);
        assert_eq!(age_ms(&datagram, Duration::from_millis(2750)), Some(750));
        assert_eq!(age_ms(&datagram, Duration::from_millis(1)), Some(0));
        datagram[TIME.start] ^= 1;
        assert_eq!(age_ms(&datagram, Duration::from_millis(2750)), None);
    }
}
