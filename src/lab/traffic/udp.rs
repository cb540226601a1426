//! UDP datagrams at a steady rate or as fast as they go.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;

use crate::lab::interrupt;
use crate::lab::traffic::cpu::MachineCpu;
use crate::lab::traffic::tally::{self, Counts, Tally};
use crate::lab::traffic::{End, gbit_per_s, timed_out};

/// How long the last datagrams may be under way.
const DRAIN: Duration = Duration::from_millis(200);
/// Largest datagram a socket takes, bytes.
const LARGEST: usize = 65_507;

/// One flow of numbered datagrams.
#[derive(Clone, Debug)]
pub struct Flood {
    /// UDP payload of each, bytes.
    pub payload_bytes: usize,
    /// Datagrams a second; as many as possible if not given.
    pub rate: Option<u32>,
    /// How long.
    pub duration: Duration,
}

/// What became of the flow.
#[derive(Clone, Debug, Serialize)]
pub struct FloodReport {
    /// The account.
    #[serde(flatten)]
    pub counts: Counts,
    /// Datagrams received a second.
    pub received_per_s: f64,
    /// Rate of payload received.
    pub gbit_per_s: f64,
    /// Share lost, in percent.
    pub lost_percent: f64,
    /// Processor time of the machine meanwhile.
    pub cpu: MachineCpu,
    /// Seconds of processor time for 10⁹ bytes of payload received.
    pub cpu_s_per_gb: Option<f64>,
    /// Microseconds of processor time for one datagram received.
    pub cpu_us_per_packet: Option<f64>,
}

impl Flood {
    /// Runs the flow.
    ///
    /// # Errors
    /// Sockets fail in other ways than by losing datagrams, or a signal came.
    pub fn run(&self, from: End<'_>, to: End<'_>) -> Result<FloodReport> {
        ensure!(
            (tally::HEADER..=LARGEST).contains(&self.payload_bytes),
            "a datagram has {} to {LARGEST} bytes",
            tally::HEADER
        );
        let (sender, _) = from.udp()?;
        let (receiver, place) = to.udp()?;
        let stop = AtomicBool::new(false);
        let cpu = MachineCpu::now()?;
        let start = Instant::now();
        thread::scope(|scope| {
            let receiving = scope.spawn(|| receive(&receiver, &stop, start));
            let sent = self.send(&sender, place, start);
            let elapsed = start.elapsed();
            let cpu = MachineCpu::now().map(|now| now - cpu);
            thread::sleep(DRAIN);
            stop.store(true, Ordering::Relaxed);
            let tally = receiving
                .join()
                .map_err(|_| anyhow!("a traffic thread panicked"))??;
            let (sent, cpu) = (sent?, cpu?);
            interrupt::check()?;

            let counts = tally.close(sent, start + elapsed);
            let bytes = counts.received * self.payload_bytes as u64;
            Ok(FloodReport {
                received_per_s: counts.received as f64 / elapsed.as_secs_f64(),
                gbit_per_s: gbit_per_s(bytes, elapsed),
                lost_percent: counts.lost as f64 / sent.max(1) as f64 * 100.0,
                cpu_s_per_gb: cpu.per_gb(bytes),
                cpu_us_per_packet: (counts.received > 0).then(|| cpu.busy_s * 1e6 / counts.received as f64),
                cpu,
                counts,
            })
        })
    }

    fn send(&self, socket: &UdpSocket, place: SocketAddr, start: Instant) -> Result<u64> {
        /// Datagrams between two looks at the clock when going flat out.
        const BURST: u64 = 16;
        let mut datagram = vec![0; self.payload_bytes];
        tally::fill(&mut datagram, 0);
        let mut sent = 0;
        loop {
            let elapsed = start.elapsed();
            if elapsed >= self.duration || interrupt::raised() {
                return Ok(sent);
            }
            let due = match self.rate {
                Some(rate) => (elapsed.as_secs_f64() * f64::from(rate)) as u64 + 1,
                None => sent + BURST,
            };
            if due <= sent {
                thread::sleep(Duration::from_micros(200));
            }
            while sent < due {
                tally::stamp(&mut datagram, sent);
                match socket.send_to(&datagram, place) {
                    Ok(_) => {}
                    Err(error) if is_loss(&error) => {}
                    Err(error) => return Err(error).with_context(|| format!("cannot send to {place}")),
                }
                // What the own kernel would not take is as lost as anything.
                sent += 1;
            }
        }
    }
}

fn receive(socket: &UdpSocket, stop: &AtomicBool, start: Instant) -> Result<Tally> {
    let mut tally = Tally::default();
    tally.open(start);
    let mut buffer = vec![0; LARGEST + 1];
    while !stop.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(len) => tally.note(&buffer[..len], Instant::now()),
            Err(error) if timed_out(&error) => {}
            Err(error) => return Err(error).context("cannot receive datagrams"),
        }
    }
    Ok(tally)
}

/// Whether a datagram that could not be sent is simply lost: no room, no route for now, or an ICMP message about an
/// earlier one.
pub(super) fn is_loss(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock
            | ErrorKind::ConnectionRefused
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
    ) || error.raw_os_error() == Some(libc::ENOBUFS)
}
