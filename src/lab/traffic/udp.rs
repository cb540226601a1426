//! UDP datagrams at a steady rate or as fast as they go.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;

use crate::lab::interrupt;
use crate::lab::traffic::cpu::MachineCpu;
use crate::lab::traffic::pace::{Pacer, Turn};
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
    /// Of those lost, how many the sender's own kernel did not take.
    pub refused: u64,
    /// Of those lost, how many the kernel dropped because the receiving socket was full.
    pub overflowed: u64,
    /// Datagrams sent a second.
    pub sent_per_s: f64,
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
            let overflowed = to.namespace.run(|| overflowed(&receiver));
            stop.store(true, Ordering::Relaxed);
            let tally = receiving
                .join()
                .map_err(|_| anyhow!("a traffic thread panicked"))??;
            let (Sent { sent, refused }, cpu) = (sent?, cpu?);
            interrupt::check()?;

            let counts = tally.close(sent, start + elapsed);
            let bytes = counts.received * self.payload_bytes as u64;
            Ok(FloodReport {
                refused,
                overflowed: overflowed?,
                sent_per_s: sent as f64 / elapsed.as_secs_f64(),
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

    fn send(&self, socket: &UdpSocket, place: SocketAddr, start: Instant) -> Result<Sent> {
        /// Datagrams between two looks at the clock when going flat out.
        const BURST: u64 = 16;
        let mut datagram = vec![0; self.payload_bytes];
        tally::fill(&mut datagram, 0);
        let mut pacer = self.rate.map(Pacer::new);
        let _sharp = SharpTimer::new()?;
        let mut count = Sent::default();
        loop {
            let elapsed = start.elapsed();
            if elapsed >= self.duration || interrupt::raised() {
                return Ok(count);
            }
            let burst = match pacer.as_mut().map(|pacer| pacer.turn(elapsed)) {
                None => BURST,
                Some(Turn::Send(burst)) => burst,
                Some(Turn::Wait(pause)) => {
                    thread::sleep(pause.min(self.duration - elapsed));
                    continue;
                }
            };
            for _ in 0..burst {
                tally::stamp(&mut datagram, count.sent);
                // What the own kernel would not take is as lost as anything.
                count.sent += 1;
                match socket.send_to(&datagram, place) {
                    Ok(_) => {}
                    Err(error) if is_loss(&error) => count.refused += 1,
                    Err(error) => return Err(error).with_context(|| format!("cannot send to {place}")),
                }
            }
        }
    }
}

/// What a sender did.
#[derive(Clone, Copy, Debug, Default)]
struct Sent {
    /// Numbers used.
    sent: u64,
    /// Of those, how many the kernel did not take.
    refused: u64,
}

/// Lets this thread's pauses end when they should, not up to 50 µs later, while it lives.
struct SharpTimer {
    slack_ns: std::ffi::c_ulong,
}

impl SharpTimer {
    fn new() -> Result<Self> {
        let slack = nix::sys::prctl::get_timerslack()?;
        nix::sys::prctl::set_timerslack(1)?;
        Ok(Self {
            slack_ns: slack.try_into().unwrap_or(50_000),
        })
    }
}

impl Drop for SharpTimer {
    fn drop(&mut self) {
        // Coarse timers are a courtesy to the machine, no more.
        let _ = nix::sys::prctl::set_timerslack(self.slack_ns);
    }
}

/// How many datagrams the kernel dropped at a socket of the calling thread's namespace.
fn overflowed(socket: &UdpSocket) -> Result<u64> {
    let inode = nix::sys::stat::fstat(socket.as_fd())?.st_ino;
    for table in ["udp", "udp6"] {
        // Of the thread, not of the process: only the thread is inside.
        let Ok(text) = fs::read_to_string(format!("/proc/thread-self/net/{table}")) else {
            continue;
        };
        if let Some(drops) = drops_of(&text, inode) {
            return Ok(drops);
        }
    }
    anyhow::bail!("the kernel does not list a socket of ours")
}

/// The last column of the line of the socket with that inode, the tenth.
fn drops_of(table: &str, inode: impl ToString) -> Option<u64> {
    let inode = inode.to_string();
    let mut lines = table.lines().map(|line| line.split_whitespace());
    lines.find_map(|mut words| (words.nth(9)? == inode).then(|| words.last()?.parse().ok())?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_read_from_the_sockets_own_line() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            \x20 133: 020AF40A:8124 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 40100 2 0000000000000000 0\n\
            \x20 134: 020AF40A:8125 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 40101 2 0000000000000000 77\n";
        assert_eq!(drops_of(table, 40_101), Some(77));
        assert_eq!(drops_of(table, 40_100), Some(0));
        assert_eq!(drops_of(table, 4010), None);
    }

    #[test]
    fn a_live_socket_has_a_count() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert_eq!(overflowed(&socket).unwrap(), 0);
    }
}
