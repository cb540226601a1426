//! The wire between the nodes: it delays, loses, reorders, doubles and shortens datagrams, by a seed.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use kersey::dataplane::memory::Message;
use kersey::wire::ip::Ecn;

/// What the wire does to datagrams.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Impairment {
    /// Of a thousand datagrams, how many are lost.
    pub(crate) lost_per_mille: u64,
    /// Of a thousand datagrams, how many arrive twice.
    pub(crate) doubled_per_mille: u64,
    /// How long every datagram takes.
    pub(crate) delay: Duration,
    /// How much longer some take, at random: more than the gap between datagrams reorders them.
    pub(crate) jitter: Duration,
    /// Longest UDP payload that fits, bytes.
    pub(crate) longest: usize,
    /// What becomes of longer ones.
    pub(crate) too_long: TooLong,
    /// How the far end receives.
    pub(crate) receives: Receives,
}

/// What becomes of a datagram that is longer than the wire takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TooLong {
    /// It is lost, as on a path whose routers send no ICMP.
    Dropped,
    /// Its end is lost, as in a receive buffer that is too short.
    Cut,
}

/// How the far end receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Receives {
    /// One datagram at a time.
    Datagrams,
    /// Runs, as with `UDP_GRO`.
    Runs,
}

impl Impairment {
    /// A wire that loses nothing.
    pub(crate) const CLEAN: Self = Self {
        lost_per_mille: 0,
        doubled_per_mille: 0,
        delay: Duration::from_millis(1),
        jitter: Duration::ZERO,
        longest: 65_507,
        too_long: TooLong::Dropped,
        receives: Receives::Runs,
    };
}

/// Datagrams under way between any number of nodes.
pub(crate) struct Wire {
    impairment: Impairment,
    random: Random,
    flying: BTreeMap<(Duration, u64), Flying>,
    serial: u64,
    /// How many datagrams were longer than the wire takes.
    pub(crate) too_long: u64,
}

struct Flying {
    from: SocketAddr,
    to: SocketAddr,
    ecn: Ecn,
    bytes: Vec<u8>,
}

impl Wire {
    /// An empty wire; equal seeds give equal fates.
    pub(crate) fn new(impairment: Impairment, seed: u64) -> Self {
        Self {
            impairment,
            random: Random(seed),
            flying: BTreeMap::new(),
            serial: 0,
            too_long: 0,
        }
    }

    /// Takes a message on its way.
    pub(crate) fn carry(&mut self, now: Duration, from: SocketAddr, message: &Message) {
        for datagram in message.bytes.chunks(message.segment_size.max(1)) {
            let mut bytes = datagram.to_vec();
            if bytes.len() > self.impairment.longest {
                self.too_long += 1;
                match self.impairment.too_long {
                    TooLong::Dropped => continue,
                    TooLong::Cut => bytes.truncate(self.impairment.longest),
                }
            }
            if self.random.chance(self.impairment.lost_per_mille) {
                continue;
            }
            let copies = 1 + u64::from(self.random.chance(self.impairment.doubled_per_mille));
            for _ in 0..copies {
                let jitter_us = self.random.below(self.impairment.jitter.as_micros() as u64 + 1);
                let at = now + self.impairment.delay + Duration::from_micros(jitter_us);
                self.serial += 1;
                self.flying.insert(
                    (at, self.serial),
                    Flying {
                        from,
                        to: message.addr,
                        ecn: message.ecn,
                        bytes: bytes.clone(),
                    },
                );
            }
        }
    }

    /// Takes off what has arrived at `node` by `now`.
    pub(crate) fn arrivals(&mut self, now: Duration, node: SocketAddr) -> VecDeque<Message> {
        let due = self
            .flying
            .range(..=(now, u64::MAX))
            .filter(|(_, flying)| flying.to == node);
        let keys: Vec<_> = due.map(|(&key, _)| key).collect();
        let mut messages: VecDeque<Message> = VecDeque::new();
        for key in keys {
            let Some(Flying { from, bytes, ecn, .. }) = self.flying.remove(&key) else {
                continue;
            };
            if let Some(run) = messages.back_mut()
                && self.impairment.receives == Receives::Runs
                && joins(run, from, ecn, bytes.len())
            {
                run.bytes.extend_from_slice(&bytes);
                continue;
            }
            messages.push_back(Message {
                addr: from,
                segment_size: bytes.len(),
                ecn,
                bytes,
            });
        }
        messages
    }

    /// When the next datagram arrives somewhere.
    pub(crate) fn next_arrival(&self) -> Option<Duration> {
        self.flying.keys().next().map(|&(at, _)| at)
    }
}

/// Whether the kernel would coalesce a datagram of `len` bytes into `run`.
fn joins(run: &Message, from: SocketAddr, ecn: Ecn, len: usize) -> bool {
    let full = run.bytes.len().is_multiple_of(run.segment_size);
    (run.addr, run.ecn) == (from, ecn)
        && full
        && len <= run.segment_size
        && run.bytes.len() + len <= 65_507
        && run.bytes.len() / run.segment_size < 64
}

/// A small random number generator (SplitMix64), so that a seed means the same everywhere.
pub(crate) struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}
