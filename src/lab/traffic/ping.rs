//! ICMP and ICMPv6 echo, from a raw socket.

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::interrupt;
use crate::lab::traffic::udp::is_loss;
use crate::lab::traffic::{End, POLL, timed_out};

/// Bytes of an echo message before its data, RFC 792 and RFC 4443 §4.1.
const HEADER: usize = 8;

/// Echo requests.
#[derive(Clone, Debug)]
pub struct Ping {
    /// How many.
    pub count: u16,
    /// Data bytes in each; 56 is what `ping` sends.
    pub data_bytes: usize,
    /// Pause between them.
    pub interval: Duration,
    /// How long each is waited for.
    pub timeout: Duration,
}

impl Default for Ping {
    fn default() -> Self {
        Self {
            count: 3,
            data_bytes: 56,
            interval: Duration::from_millis(10),
            timeout: Duration::from_millis(500),
        }
    }
}

/// What came back.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u16,
    /// Replies with the data unchanged.
    pub received: u16,
    /// Shortest round trip, milliseconds.
    pub min_ms: f64,
    /// Mean round trip.
    pub mean_ms: f64,
    /// Longest round trip.
    pub max_ms: f64,
}

impl PingReport {
    /// Whether every request was answered.
    pub fn all(&self) -> bool {
        self.received == self.sent
    }
}

impl Ping {
    /// Sends the requests one after the other.
    ///
    /// # Errors
    /// There is no raw socket to be had, or a signal came; that nobody answers is no error.
    pub fn run(&self, from: End<'_>, to: IpAddr) -> Result<PingReport> {
        let socket = from.namespace.run(|| {
            let (domain, protocol) = match to {
                IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4),
                IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6),
            };
            let socket =
                Socket::new(domain, Type::RAW, Some(protocol)).context("cannot open a raw socket")?;
            socket
                .bind(&SocketAddr::new(from.addr, 0).into())
                .with_context(|| format!("cannot use address {}", from.addr))?;
            socket.set_read_timeout(Some(POLL))?;
            Ok(socket)
        })?;
        let mut report = PingReport {
            min_ms: f64::INFINITY,
            ..PingReport::default()
        };
        let identifier = identifier();
        for sequence in 0..self.count {
            interrupt::check()?;
            report.sent += 1;
            if let Some(time) = self.once(&socket, to, identifier, sequence)? {
                let ms = time.as_secs_f64() * 1e3;
                report.received += 1;
                report.min_ms = report.min_ms.min(ms);
                report.max_ms = report.max_ms.max(ms);
                report.mean_ms += (ms - report.mean_ms) / f64::from(report.received);
            }
            if sequence + 1 < self.count {
                interrupt::sleep(self.interval)?;
            }
        }
        if report.received == 0 {
            report.min_ms = 0.0;
        }
        Ok(report)
    }

    fn once(&self, mut socket: &Socket, to: IpAddr, id: u16, sequence: u16) -> Result<Option<Duration>> {
        let (request_type, reply_type) = match to {
            IpAddr::V4(_) => (8, 0),
            IpAddr::V6(_) => (128, 129),
        };
        let mut message = vec![request_type, 0, 0, 0];
        message.extend(id.to_be_bytes());
        message.extend(sequence.to_be_bytes());
        message.extend((0..self.data_bytes).map(|nth| (nth % 251) as u8));
        if to.is_ipv4() {
            // The kernel fills in ICMPv6 checksums itself, RFC 3542 §3.1.
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
        }
        let start = Instant::now();
        match socket.send_to(&message, &SocketAddr::new(to, 0).into()) {
            Ok(_) => {}
            Err(error) if is_loss(&error) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot send an echo request to {to}")),
        }
        let mut buffer = vec![0; 65_536];
        while start.elapsed() < self.timeout {
            interrupt::check()?;
            let len = match socket.read(&mut buffer) {
                Ok(len) => len,
                Err(error) if timed_out(&error) || is_loss(&error) => continue,
                Err(error) => return Err(error).context("cannot receive echo replies"),
            };
            let reply = match to {
                // A raw IPv4 socket gives the IP header too; its length is in its first byte, in words.
                IpAddr::V4(_) => buffer[..len].get(usize::from(buffer[0] & 15) * 4..),
                IpAddr::V6(_) => buffer.get(..len),
            };
            let Some(reply) = reply.filter(|reply| reply.len() >= HEADER) else {
                continue;
            };
            if reply[0] == reply_type && reply[4..] == message[4..] {
                return Ok(Some(start.elapsed()));
            }
        }
        Ok(None)
    }
}

/// Tells our echo requests from those of other threads and processes.
fn identifier() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    (std::process::id() as u16).rotate_left(5) ^ NEXT.fetch_add(1, Ordering::Relaxed)
}

/// RFC 1071.
fn checksum(message: &[u8]) -> u16 {
    let words = message
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
