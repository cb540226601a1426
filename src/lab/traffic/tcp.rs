//! TCP: how much goes through, and whether it arrives unchanged.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use sha2::{Digest, Sha256};
use socket2::{Domain, Socket, Type};

use crate::lab::interrupt;
use crate::lab::pages::Pages;
use crate::lab::traffic::cpu::MachineCpu;
use crate::lab::traffic::tally::mix;
use crate::lab::traffic::{End, POLL, gbit_per_s, timed_out};

/// What one read or write moves at most, bytes: two full-size super-packets and more, and still in the L2 cache.
const CHUNK: usize = 256 << 10;
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// Streams of zeros, for as long as asked.
#[derive(Clone, Debug)]
pub struct Bulk {
    /// Connections at once.
    pub streams: usize,
    /// Time before the measurement begins.
    pub warmup: Duration,
    /// Time measured.
    pub duration: Duration,
    /// The sender's congestion control; the system's default if not given.
    pub congestion: Option<String>,
}

/// What the streams moved.
#[derive(Clone, Debug, Serialize)]
pub struct BulkReport {
    /// Bytes received, all streams together.
    pub bytes: u64,
    /// Seconds measured.
    pub seconds: f64,
    /// Rate.
    pub gbit_per_s: f64,
    /// Bytes received by each stream.
    pub stream_bytes: Vec<u64>,
    /// Segments the sender's namespace sent again.
    pub retransmits: u64,
    /// Processor time of the machine meanwhile.
    pub cpu: MachineCpu,
    /// Seconds of processor time for 10⁹ bytes.
    pub cpu_s_per_gb: Option<f64>,
}

impl Bulk {
    /// Runs the streams.
    ///
    /// # Errors
    /// They do not connect or break, or a signal came.
    pub fn run(&self, from: End<'_>, to: End<'_>) -> Result<BulkReport> {
        let (listener, place) = to.listen()?;
        let received: Vec<_> = (0..self.streams).map(|_| AtomicU64::new(0)).collect();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let _stop = StopOnDrop(&stop);
            let mut workers = Vec::new();
            for counter in &received {
                let (sender, receiver) = connect(from, &listener, place, self.congestion.as_deref())?;
                workers.push(scope.spawn(|| send_zeros(sender, &stop)));
                workers.push(scope.spawn(|| count(receiver, counter, &stop)));
            }
            interrupt::sleep(self.warmup)?;
            let read = || {
                received
                    .iter()
                    .map(|counter| counter.load(Ordering::Relaxed))
                    .collect::<Vec<_>>()
            };
            let (retransmits, cpu, start) = (retransmits(from)?, MachineCpu::now()?, Instant::now());
            let before = read();
            interrupt::sleep(self.duration)?;
            let (after, elapsed) = (read(), start.elapsed());
            let cpu = MachineCpu::now()? - cpu;
            let retransmits = self::retransmits(from)?.saturating_sub(retransmits);

            stop.store(true, Ordering::Relaxed);
            for worker in workers {
                worker
                    .join()
                    .map_err(|_| anyhow!("a traffic thread panicked"))??;
            }
            let stream_bytes: Vec<_> = after
                .iter()
                .zip(before)
                .map(|(after, before)| after - before)
                .collect();
            let bytes = stream_bytes.iter().sum();
            Ok(BulkReport {
                bytes,
                seconds: elapsed.as_secs_f64(),
                gbit_per_s: gbit_per_s(bytes, elapsed),
                stream_bytes,
                retransmits,
                cpu,
                cpu_s_per_gb: cpu.per_gb(bytes),
            })
        })
    }
}

/// A transfer whose every byte is checked.
#[derive(Clone, Debug)]
pub struct Verified {
    /// How much.
    pub bytes: u64,
    /// Where the pseudo-random contents begin.
    pub seed: u64,
    /// Longest time without progress.
    pub patience: Duration,
}

/// How the transfer went.
#[derive(Clone, Debug, Serialize)]
pub struct VerifiedReport {
    /// Bytes received.
    pub bytes: u64,
    /// Seconds it took, hashing included.
    pub seconds: f64,
    /// Rate, hashing included.
    pub gbit_per_s: f64,
    /// SHA-256 of what was received, in hexadecimal.
    pub sha256: String,
    /// Whether that is the SHA-256 of what was sent, and the length is right too.
    pub intact: bool,
}

impl Verified {
    /// Runs the transfer.
    ///
    /// # Errors
    /// The connection does not come about, breaks or stands still; or a signal came.
    pub fn run(&self, from: End<'_>, to: End<'_>) -> Result<VerifiedReport> {
        let (listener, place) = to.listen()?;
        let (mut sender, receiver) = connect(from, &listener, place, None)?;
        let start = Instant::now();
        thread::scope(|scope| {
            let sending = scope.spawn(move || -> Result<_> {
                let (mut hash, mut state, mut left) = (Sha256::new(), self.seed, self.bytes);
                let mut chunk = vec![0; CHUNK];
                while left > 0 {
                    let len = CHUNK.min(usize::try_from(left).unwrap_or(CHUNK));
                    state = noise(&mut chunk, state);
                    hash.update(&chunk[..len]);
                    send_all(&mut sender, &chunk[..len], self.patience)?;
                    left -= len as u64;
                }
                sender
                    .shutdown(std::net::Shutdown::Write)
                    .context("cannot end the stream")?;
                Ok(hash.finalize())
            });
            let received = hash_all(receiver, self.patience);
            let sent = sending
                .join()
                .map_err(|_| anyhow!("a traffic thread panicked"))??;
            let (bytes, hash) = received?;
            let elapsed = start.elapsed();
            Ok(VerifiedReport {
                bytes,
                seconds: elapsed.as_secs_f64(),
                gbit_per_s: gbit_per_s(bytes, elapsed),
                sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
                intact: bytes == self.bytes && hash == sent,
            })
        })
    }
}

/// Segments sent again by everyone in the namespace, since it exists.
///
/// # Errors
/// The counters cannot be read.
pub fn retransmits(end: End<'_>) -> Result<u64> {
    end.namespace.run(|| {
        // Of the thread, not of the process: only the thread is inside.
        let text = std::fs::read_to_string("/proc/thread-self/net/snmp").context("cannot read net/snmp")?;
        let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
        let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
            anyhow::bail!("net/snmp has no TCP counters");
        };
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let (_, value) = pairs
            .find(|(name, _)| *name == "RetransSegs")
            .context("no RetransSegs counter")?;
        Ok(value.parse()?)
    })
}

/// Asks the kernel for a congestion control, which may load it.
///
/// # Errors
/// It has none of that name.
pub fn has_congestion_control(name: &str) -> Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket
        .set_tcp_congestion(name.as_bytes())
        .with_context(|| format!("this kernel has no congestion control {name:?}"))
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn connect(
    from: End<'_>,
    listener: &TcpListener,
    place: SocketAddr,
    congestion: Option<&str>,
) -> Result<(TcpStream, TcpStream)> {
    let socket = from.tcp(congestion)?;
    socket
        .connect_timeout(&place.into(), CONNECT)
        .with_context(|| format!("cannot connect from {} to {place}", from.addr))?;
    let sender = TcpStream::from(socket);
    let (receiver, peer) = listener.accept().context("cannot accept a connection")?;
    ensure!(peer == sender.local_addr()?, "a stranger connected from {peer}");
    sender.set_write_timeout(Some(POLL))?;
    receiver.set_read_timeout(Some(POLL))?;
    Ok((sender, receiver))
}

fn send_zeros(mut stream: TcpStream, stop: &AtomicBool) -> Result<()> {
    let chunk = Pages::new(CHUNK);
    while !stop.load(Ordering::Relaxed) {
        match stream.write(&chunk) {
            Ok(_) => {}
            Err(error) if timed_out(&error) => {}
            // The receiving side may have closed first.
            Err(_) if stop.load(Ordering::Relaxed) => break,
            Err(error) => return Err(error).context("a TCP stream broke while sending"),
        }
    }
    Ok(())
}

fn count(mut stream: TcpStream, counter: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let mut chunk = Pages::new(CHUNK);
    while !stop.load(Ordering::Relaxed) {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => _ = counter.fetch_add(len as u64, Ordering::Relaxed),
            Err(error) if timed_out(&error) => {}
            Err(_) if stop.load(Ordering::Relaxed) => break,
            Err(error) => return Err(error).context("a TCP stream broke while receiving"),
        }
    }
    Ok(())
}

fn send_all(stream: &mut TcpStream, mut bytes: &[u8], patience: Duration) -> Result<()> {
    let mut progress = Instant::now();
    while !bytes.is_empty() {
        interrupt::check()?;
        match stream.write(bytes) {
            Ok(len) => {
                bytes = &bytes[len..];
                progress = Instant::now();
            }
            Err(error) if timed_out(&error) => {
                ensure!(progress.elapsed() < patience, "a TCP stream stands still");
            }
            Err(error) => return Err(error).context("a TCP stream broke while sending"),
        }
    }
    Ok(())
}

fn hash_all(mut stream: TcpStream, patience: Duration) -> Result<(u64, sha2::digest::Output<Sha256>)> {
    let (mut hash, mut bytes, mut chunk) = (Sha256::new(), 0, vec![0; CHUNK]);
    let mut progress = Instant::now();
    loop {
        interrupt::check()?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok((bytes, hash.finalize())),
            Ok(len) => {
                hash.update(&chunk[..len]);
                bytes += len as u64;
                progress = Instant::now();
            }
            Err(error) if timed_out(&error) => {
                ensure!(progress.elapsed() < patience, "a TCP stream stands still");
            }
            Err(error) => return Err(error).context("a TCP stream broke while receiving"),
        }
    }
}

/// Fills `chunk` with numbers that follow from `state`, and gives the state they lead to.
fn noise(chunk: &mut [u8], mut state: u64) -> u64 {
    for word in chunk.chunks_mut(8) {
        state = mix(state);
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    state
}
