//! A wire that is not one: joins two links and lets frames be late, out of order, doubled, changed or lost.
//!
//! ```text
//!   link a ── packet socket ──> lost? changed? doubled? ──> queue by time due ──> packet socket ── link b, and back
//! ```
//!
//! For machines whose kernel has no netem. What becomes of a frame follows from the seed and the order of arrival ([`Fate`], pure); one thread
//! moves frames. Both links must be in one namespace, joined by nothing else, and without offloads: super-packets and checksums
//! half done cannot be handed on.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kersey::lab::netns::Namespace;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvfrom, send, setsockopt,
    socket, sockopt,
};

/// `PACKET_OUTGOING` of linux/if_packet.h.
const OUTGOING: u8 = 4;
/// Bytes of an Ethernet header, which stays as it is: no bridge delivers a frame with another address.
const ETHERNET: usize = 14;
/// Frames under way in all; what is more is lost, as in any queue.
const MOST: usize = 20_000;

/// How bad the wire is. Shares are of 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Manner {
    pub(crate) delay: Duration,
    /// A frame is late by up to this more or less.
    pub(crate) jitter: Duration,
    pub(crate) loss: f64,
    pub(crate) duplicate: f64,
    /// This share of frames does not wait, and so overtakes the others.
    pub(crate) reorder: f64,
    /// This share of frames has one bit flipped.
    pub(crate) flip: f64,
}

/// What has become of frames so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) frames: u64,
    pub(crate) lost: u64,
    pub(crate) doubled: u64,
    pub(crate) flipped: u64,
    pub(crate) overtaking: u64,
}

/// Decides what becomes of frames.
#[derive(Debug)]
pub(crate) struct Fate {
    state: u64,
    count: Count,
}

impl Fate {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            state: seed,
            count: Count::default(),
        }
    }

    /// The pauses after which the frame, perhaps changed, goes on: none, one or two.
    pub(crate) fn of(&mut self, frame: &mut [u8], manner: Manner) -> Vec<Duration> {
        self.count.frames += 1;
        if self.happens(manner.loss) {
            self.count.lost += 1;
            return Vec::new();
        }
        if self.happens(manner.flip) && frame.len() > ETHERNET {
            let bit = self.below((frame.len() - ETHERNET) as u64 * 8) as usize;
            frame[ETHERNET + bit / 8] ^= 1 << (bit % 8);
            self.count.flipped += 1;
        }
        let copies = if self.happens(manner.duplicate) {
            self.count.doubled += 1;
            2
        } else {
            1
        };
        (0..copies).map(|_| self.pause(manner)).collect()
    }

    fn pause(&mut self, manner: Manner) -> Duration {
        if self.happens(manner.reorder) {
            self.count.overtaking += 1;
            return Duration::ZERO;
        }
        let spread = manner.jitter.as_micros() as u64 * 2;
        let late = Duration::from_micros(self.below(spread + 1));
        (manner.delay + late).saturating_sub(manner.jitter)
    }

    fn happens(&mut self, share: f64) -> bool {
        (self.next() >> 11) as f64 / ((1_u64 << 53) as f64) < share
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

/// Two links joined; parted on drop.
#[derive(Debug)]
pub(crate) struct Impair {
    stop: Arc<AtomicBool>,
    manner: Arc<Mutex<Manner>>,
    thread: Option<JoinHandle<Count>>,
}

impl Impair {
    /// Joins two links of a namespace.
    pub(crate) fn between(namespace: &Namespace, links: [&str; 2], manner: Manner, seed: u64) -> Self {
        let sockets = links.map(|link| open(namespace, link));
        let (stop, manner) = (Arc::<AtomicBool>::default(), Arc::new(Mutex::new(manner)));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&manner));
        let thread = std::thread::spawn(move || carry(&sockets, &shared, &stopped, Fate::new(seed)));
        Self {
            stop,
            manner,
            thread: Some(thread),
        }
    }

    /// Makes the wire better or worse.
    pub(crate) fn set(&self, manner: Manner) {
        *self.manner.lock().unwrap() = manner;
    }

    /// Parts the links, and says what became of frames.
    pub(crate) fn end(mut self) -> Count {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("it runs").join().unwrap()
    }
}

impl Drop for Impair {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A packet socket that sees whole frames of one link.
fn open(namespace: &Namespace, link: &str) -> OwnedFd {
    namespace
        .run(|| {
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )?;
            setsockopt(&socket, sockopt::RcvBufForce, &(16 << 20))?;
            let place: LinkAddr = nix::ifaddrs::getifaddrs()?
                .filter(|entry| entry.interface_name == link)
                .find_map(|entry| Some(*entry.address?.as_link_addr()?))
                .expect("the link is there");
            bind(socket.as_raw_fd(), &place)?;
            Ok(socket)
        })
        .unwrap()
}

/// A frame that waits: when it is due, its number among all, and the socket it leaves by.
type Waiting = Reverse<(Instant, u64, usize, Vec<u8>)>;

#[expect(clippy::disallowed_methods, reason = "a wire takes real time")]
fn carry(sockets: &[OwnedFd; 2], manner: &Mutex<Manner>, stop: &AtomicBool, mut fate: Fate) -> Count {
    let mut queue: BinaryHeap<Waiting> = BinaryHeap::new();
    let (mut buffer, mut number) = (vec![0; 1 << 16], 0);
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        while queue.peek().is_some_and(|Reverse((due, ..))| *due <= now) {
            if let Some(Reverse((_, _, out, frame))) = queue.pop() {
                // What the link does not take is lost.
                let _ = send(sockets[out].as_raw_fd(), &frame, MsgFlags::empty());
            }
        }
        let next = queue
            .peek()
            .map(|Reverse((due, ..))| due.saturating_duration_since(now));
        let ms = next.map_or(20, |pause| u16::try_from(pause.as_millis()).unwrap_or(20).min(20));
        let mut waited = [0, 1].map(|side| PollFd::new(sockets[side].as_fd(), PollFlags::POLLIN));
        let _ = poll(&mut waited, PollTimeout::from(ms));
        for side in [0, 1] {
            for _ in 0..64 {
                let Ok((len, Some(from))) = recvfrom::<LinkAddr>(sockets[side].as_raw_fd(), &mut buffer)
                else {
                    break;
                };
                if from.pkttype() == OUTGOING {
                    continue;
                }
                let frame = &mut buffer[..len];
                let manner = *manner.lock().unwrap();
                for pause in fate.of(frame, manner) {
                    if queue.len() < MOST {
                        number += 1;
                        queue.push(Reverse((
                            Instant::now() + pause,
                            number,
                            1 - side,
                            frame.to_vec(),
                        )));
                    }
                }
            }
        }
    }
    fate.count
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAD: Manner = Manner {
        delay: Duration::from_millis(100),
        jitter: Duration::from_millis(50),
        loss: 0.2,
        duplicate: 0.01,
        reorder: 0.05,
        flip: 0.1,
    };

    #[test]
    fn what_becomes_of_frames_is_what_was_asked_for() {
        let mut fate = Fate::new(7);
        let (mut late, mut overtaking) = (0, 0);
        for _ in 0..100_000 {
            let mut frame = [0; 100];
            let pauses = fate.of(&mut frame, BAD);
            assert_eq!(frame[..ETHERNET], [0; ETHERNET]);
            assert!(frame.iter().map(|byte| byte.count_ones()).sum::<u32>() <= 1);
            for pause in pauses {
                if pause.is_zero() {
                    overtaking += 1;
                } else {
                    assert!((50..=150).contains(&pause.as_millis()), "{pause:?}");
                    late += 1;
                }
            }
        }
        let share = |n: u64| n as f64 / fate.count.frames as f64;
        assert!((0.19..0.21).contains(&share(fate.count.lost)), "{:?}", fate.count);
        assert!(
            (0.007..0.009).contains(&share(fate.count.doubled)),
            "{:?}",
            fate.count
        );
        assert!(
            (0.075..0.085).contains(&share(fate.count.flipped)),
            "{:?}",
            fate.count
        );
        assert_eq!(fate.count.overtaking, overtaking);
        let kept = fate.count.frames - fate.count.lost + fate.count.doubled;
        assert_eq!(late + overtaking, kept);
    }

    #[test]
    fn one_seed_is_one_fate_and_a_good_wire_leaves_frames_alone() {
        let run = |seed| {
            let mut fate = Fate::new(seed);
            (0..1000)
                .map(|n| fate.of(&mut [n as u8; 64], BAD))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
        let (mut fate, mut frame) = (Fate::new(3), *b"as it was sent, every byte of it");
        assert_eq!(fate.of(&mut frame, Manner::default()), [Duration::ZERO]);
        assert_eq!(frame, *b"as it was sent, every byte of it");
    }
}
