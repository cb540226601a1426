//! Sending SRv6 packets past the kernel's routing: a packet socket that is told link and neighbour of each.
//!
//! # Theory of operation
//!
//! A raw socket has the kernel look up route and neighbour for every packet and pass it through OUTPUT rules; a packet socket hands it to the
//! link's queue at once. What was looked up is in [`Ways`], an immutable snapshot that somebody else keeps true. It is never the only way:
//!
//! ```text
//!   run ──▶ way to its destination? ── no: unknown, larger than the path, its turn to be seen ──▶ raw socket
//!                └─ yes ──▶ packet socket ── refused (link gone or down, queue full) ──────────────┘
//! ```
//!
//! *Its turn to be seen*: the first run to a destination in each second, and the first after each new snapshot, goes by the raw socket. The
//! kernel looks after a neighbour only while it sends to it itself; left alone, it would believe a stale one for ever.
//!
//! One run is one decision, so a run's packets stay in order. The socket is for no protocol: it sends, and nothing is ever put into it.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use socket2::{Domain, Socket, Type};

use crate::dataplane::packet::{PacketBatch, Run, SendPlan};
use crate::dataplane::stats::{Call, Count, WorkerStats};
use crate::host::socket::{Place, SEND_BUFFER, WAIT_MS, WAIT_TRIES};
use crate::host::sys::{self, LinkTo, SendScratch};

/// How often the kernel sees a packet to each destination that packets go to.
const SEEN: Duration = Duration::from_secs(1);

/// How packets get to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// Number of the link they leave by.
    pub index: u32,
    /// The neighbour's Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet that gets there, bytes.
    pub mtu_bytes: u32,
}

/// The ways there are, by destination.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ways(Box<[(Ipv6Addr, Way)]>);

impl FromIterator<(Ipv6Addr, Way)> for Ways {
    fn from_iter<T: IntoIterator<Item = (Ipv6Addr, Way)>>(ways: T) -> Self {
        let mut ways: Vec<_> = ways.into_iter().collect();
        ways.sort_unstable_by_key(|(to, _)| *to);
        ways.dedup_by_key(|(to, _)| *to);
        Self(ways.into())
    }
}

impl Ways {
    /// The way to a destination.
    pub fn to(&self, to: Ipv6Addr) -> Option<Way> {
        self.find(to).map(|(_, way)| way)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[inline]
    fn find(&self, to: Ipv6Addr) -> Option<(usize, Way)> {
        let at = self.0.binary_search_by_key(&to, |(known, _)| *known).ok()?;
        self.0.get(at).map(|(_, way)| (at, *way))
    }
}

/// The ways as all queues see them.
#[derive(Clone, Debug, Default)]
pub struct SharedWays(Arc<ArcSwap<Ways>>);

impl SharedWays {
    /// Puts a new snapshot in place; senders see it at their next batch.
    pub fn publish(&self, ways: Ways) {
        self.0.store(Arc::new(ways));
    }

    /// The current snapshot.
    pub fn current(&self) -> Arc<Ways> {
        self.0.load_full()
    }
}

/// One queue's socket.
pub struct PacketSender {
    socket: Socket,
    choices: Choices,
    scratch: SendScratch,
}

impl PacketSender {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel's; without CAP_NET_RAW it is EPERM, without packet sockets EAFNOSUPPORT.
    pub fn open(ways: &SharedWays) -> io::Result<Self> {
        let socket = Socket::new(
            Domain::PACKET,
            // The kernel makes the Ethernet header.
            Type::DGRAM.nonblocking().cloexec(),
            None,
        )?;
        let fd = socket.as_fd();
        if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER).is_err() {
            sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, SEND_BUFFER)?;
        }
        Ok(Self::of(socket, ways.clone()))
    }

    fn of(socket: Socket, ways: SharedWays) -> Self {
        Self {
            socket,
            choices: Choices::new(ways),
            scratch: SendScratch::default(),
        }
    }

    /// The same socket for another thread.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::of(self.socket.try_clone()?, self.choices.ways.clone()))
    }

    /// Begins with a new plan.
    pub(super) fn begin(&mut self, now: Instant) {
        self.choices.begin(now);
    }

    /// Whether run number `index` goes this way; to be asked of one after the other.
    #[inline]
    pub(super) fn takes(&mut self, index: usize, run: &Run) -> bool {
        self.choices.way(index, run.to, run.segment_size).is_some()
    }

    /// Sends from `at` on, up to a run that does not go this way, or no longer does; gives that place.
    ///
    /// # Errors
    /// The socket is beyond use.
    pub(super) fn send(
        &mut self,
        plan: &SendPlan,
        batch: &PacketBatch,
        mut at: Place,
        stats: &WorkerStats,
    ) -> io::Result<Place> {
        let Self {
            socket,
            choices,
            scratch,
        } = self;
        let mut waits = 0;
        while let Some(run) = plan.runs().get(at.run) {
            if choices.way(at.run, run.to, run.segment_size).is_none() {
                break;
            }
            let mut next = at;
            let messages = std::iter::from_fn(|| {
                let run = plan.runs().get(next.run)?;
                let way = choices.way(next.run, run.to, run.segment_size)?;
                let segment = next.segment;
                next = next.after(run, 1);
                let to = LinkTo {
                    index: way.index,
                    mac: way.mac,
                };
                Some((to, plan.slices(run, batch, segment, 1)))
            });
            stats.called(Call::Sendmmsg);
            let error = match sys::send_messages(socket.as_fd(), messages, scratch) {
                Ok(sent) => {
                    stats.count(Count::PacketSends, sent as u64);
                    for _ in 0..sent.max(1) {
                        let Some(run) = plan.runs().get(at.run) else { break };
                        at = at.after(run, 1);
                    }
                    continue;
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EBADF) => return Err(error),
                Some(libc::EAGAIN) if waits < WAIT_TRIES => {
                    waits += 1;
                    stats.count(Count::SendWaits, 1);
                    stats.called(Call::Poll);
                    sys::wait_writable(socket.as_fd(), WAIT_MS)?;
                }
                // The link is gone or down, its queue is full, the packet too large for it: whatever it is, the kernel knows better.
                _ => {
                    stats.count(Count::PacketFallbacks, 1);
                    choices.refuse(at.run);
                    break;
                }
            }
        }
        Ok(at)
    }
}

/// Which runs of a plan go which way.
#[derive(Debug)]
struct Choices {
    ways: SharedWays,
    current: Arc<Ways>,
    /// When the kernel is to see a packet to each destination, in the order of `current`.
    due: Vec<Instant>,
    now: Instant,
    /// The run looked at last, and its way.
    last: Option<(usize, Option<Way>)>,
}

impl Choices {
    fn new(ways: SharedWays) -> Self {
        Self {
            current: Arc::default(),
            due: Vec::new(),
            now: now(),
            last: None,
            ways,
        }
    }

    /// Begins with a new plan, by the ways there are now.
    fn begin(&mut self, now: Instant) {
        self.now = now;
        self.last = None;
        let ways = self.ways.0.load();
        if !Arc::ptr_eq(&ways, &self.current) {
            self.current = Arc::clone(&ways);
            self.due.clear();
            self.due.resize(self.current.len(), now);
        }
    }

    /// The way of run number `index`: the same when asked again, as long as no other was asked about.
    #[inline]
    fn way(&mut self, index: usize, to: SocketAddr, packet_bytes: usize) -> Option<Way> {
        if let Some((known, way)) = self.last
            && known == index
        {
            return way;
        }
        let way = self.choose(to, packet_bytes);
        self.last = Some((index, way));
        way
    }

    #[inline]
    fn choose(&mut self, to: SocketAddr, packet_bytes: usize) -> Option<Way> {
        let SocketAddr::V6(to) = to else { return None };
        let (at, way) = self.current.find(*to.ip())?;
        let due = self.due.get_mut(at)?;
        if *due <= self.now {
            *due = self.now + SEEN;
            return None;
        }
        (packet_bytes <= way.mtu_bytes as usize).then_some(way)
    }

    /// Has the rest of a run go the other way.
    fn refuse(&mut self, index: usize) {
        self.last = Some((index, None));
    }
}

#[expect(clippy::disallowed_methods, reason = "a shell: who sends has no other clock")]
pub(super) fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEAR: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const FAR: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

    fn way(index: u32) -> Way {
        Way {
            index,
            mac: [2, 0, 0, 0, 0, 1],
            mtu_bytes: 1500,
        }
    }

    fn choices(ways: impl IntoIterator<Item = (Ipv6Addr, Way)>) -> Choices {
        let shared = SharedWays::default();
        shared.publish(ways.into_iter().collect());
        Choices::new(shared)
    }

    /// The link each of the runs goes by, in a plan of its own or in one.
    fn links(choices: &mut Choices, now: Instant, runs: &[(Ipv6Addr, usize)]) -> Vec<Option<u32>> {
        choices.begin(now);
        let runs = runs.iter().enumerate();
        runs.map(|(index, &(to, bytes))| {
            let way = choices.way(index, (to, 0).into(), bytes);
            assert_eq!(
                choices.way(index, (to, 0).into(), bytes),
                way,
                "asked again, it is the same"
            );
            way.map(|way| way.index)
        })
        .collect()
    }

    #[test]
    fn the_kernel_sees_the_first_run_to_each_destination_and_one_a_second() {
        let start = now();
        let mut choices = choices([(NEAR, way(1)), (FAR, way(2))]);
        let both = [(NEAR, 100), (NEAR, 100), (FAR, 100), (FAR, 100)];
        assert_eq!(links(&mut choices, start, &both), [None, Some(1), None, Some(2)]);
        let soon = start + SEEN / 2;
        assert_eq!(links(&mut choices, soon, &both[1..3]), [Some(1), Some(2)]);
        let later = start + SEEN;
        assert_eq!(links(&mut choices, later, &both), [None, Some(1), None, Some(2)]);
    }

    #[test]
    fn what_no_way_is_known_for_or_is_too_large_goes_by_the_raw_socket() {
        let start = now();
        let mut choices = choices([(NEAR, way(1))]);
        links(&mut choices, start, &[(NEAR, 1)]);
        let runs = [(NEAR, 1500), (NEAR, 1501), (FAR, 100), (NEAR, 100)];
        assert_eq!(links(&mut choices, start, &runs), [Some(1), None, None, Some(1)]);
        choices.begin(start);
        let v4 = "192.0.2.1:0".parse().unwrap();
        assert_eq!(choices.way(0, v4, 100), None);
    }

    #[test]
    fn a_new_snapshot_is_seen_by_the_kernel_first() {
        let start = now();
        let mut choices = choices([(NEAR, way(1))]);
        let twice = [(NEAR, 100), (NEAR, 100)];
        links(&mut choices, start, &twice);
        assert_eq!(links(&mut choices, start, &twice), [Some(1), Some(1)]);
        choices.ways.publish([(NEAR, way(7))].into_iter().collect());
        assert_eq!(links(&mut choices, start, &twice), [None, Some(7)]);
        choices.ways.publish(Ways::default());
        assert_eq!(links(&mut choices, start, &twice), [None, None]);
    }

    #[test]
    fn the_rest_of_a_refused_run_goes_by_the_raw_socket() {
        let start = now();
        let mut choices = choices([(NEAR, way(1))]);
        links(&mut choices, start, &[(NEAR, 100)]);
        choices.begin(start);
        let to = (NEAR, 0).into();
        assert_eq!(choices.way(0, to, 100), Some(way(1)));
        choices.refuse(0);
        assert_eq!(choices.way(0, to, 100), None);
        assert_eq!(choices.way(1, to, 100), Some(way(1)));
    }

    #[test]
    fn the_last_of_two_ways_to_one_destination_is_left_out() {
        let ways: Ways = [(FAR, way(2)), (NEAR, way(1)), (NEAR, way(3))]
            .into_iter()
            .collect();
        assert_eq!((ways.len(), ways.to(FAR)), (2, Some(way(2))));
        assert!(ways.to(NEAR).is_some() && ways.to(Ipv6Addr::LOCALHOST).is_none());
    }
}
