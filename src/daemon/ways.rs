//! Keeps true where SRv6 packets leave that are sent past the kernel's routing ([`host::packet`](crate::host::packet)).
//!
//! # Theory of operation
//!
//! ```text
//!   destinations of peers, ──▶ look: route, then neighbour and link of each ──▶ ways published
//!   with what their paths carry        ▲                                           │
//!   kernel: route, rule, link changed ─┴─ at once no ways at all, a look soon ─────┤
//!   kernel: neighbour changed ─────────── at once its new address, or no way ──────┘
//! ```
//!
//! Who has no way is sent to by the raw socket, so not to know costs time and never a packet. A look asks the kernel twice for each destination;
//! it comes [`GATHER`] after a change and every [`PERIOD`], for what makes no event (redirects), and takes no more than a twentieth of the time.
//!
//! A new snapshot is also how the kernel gets to see a packet to each destination at once, so all that is heard of a neighbour in use makes one:
//! a stale one is asked after as soon as it would be if all packets were the kernel's.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::Ipv6Addr;
use std::time::Duration;

use futures_util::{FutureExt, Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::Instrument;

use crate::addr::{Mtu, Prefix};
use crate::daemon::supervisor::Task;
use crate::host::netlink::{Neighbour, Netlink, NetlinkError, NextHop, WayChange};
use crate::host::packet::{SharedWays, Way, Ways};

/// How long changes gather before a look.
const GATHER: Duration = Duration::from_millis(50);
/// How often to look anyway.
const PERIOD: Duration = Duration::from_secs(5);
/// A look that took so long is followed by none for so many times that.
const REST: u32 = 20;
/// How long to wait where the kernel does not answer.
const RETRY: Duration = Duration::from_secs(1);

/// Destinations, and what their paths carry.
pub(super) type Destinations = BTreeMap<Ipv6Addr, Mtu>;

/// The running task; dropping it leaves no ways.
pub(super) struct Keeper {
    wanted: watch::Sender<Destinations>,
    ways: SharedWays,
    _task: Task<()>,
}

impl Keeper {
    /// Starts it for packets from `source`; ways are put into `ways`.
    pub(super) fn start(netlink: Netlink, source: Ipv6Addr, ways: SharedWays) -> Self {
        let (wanted, receiver) = watch::channel(Destinations::new());
        let task = keep(netlink, source, ways.clone(), receiver);
        Self {
            wanted,
            ways,
            _task: Task(tokio::spawn(task.in_current_span())),
        }
    }

    /// Has ways kept to these destinations, and no others.
    pub(super) fn want(&self, destinations: Destinations) {
        self.wanted.send_if_modified(|known| {
            let is_new = *known != destinations;
            *known = destinations;
            is_new
        });
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Threads may live on for another process, and nobody would tell them what changed.
        self.ways.publish(Ways::default());
    }
}

async fn keep(
    netlink: Netlink,
    source: Ipv6Addr,
    ways: SharedWays,
    mut wanted: watch::Receiver<Destinations>,
) {
    let mut told = false;
    loop {
        let result = match Netlink::watch_ways() {
            Ok(changes) => follow(&netlink, source, &ways, &mut wanted, changes).await,
            Err(error) => Err(error),
        };
        ways.publish(Ways::default());
        match result {
            Ok(()) if wanted.has_changed().is_err() => return,
            // The kernel's end of the conversation is gone; there is another.
            Ok(()) => {}
            Err(error) if !told => {
                tracing::warn!(%error, "cannot find out how packets leave; SRv6 packets go by raw sockets until then");
                told = true;
            }
            Err(_) => {}
        }
        sleep(RETRY).await;
    }
}

/// Follows what changes, until nobody wants it any more or there is no more to hear.
async fn follow(
    netlink: &Netlink,
    source: Ipv6Addr,
    ways: &SharedWays,
    wanted: &mut watch::Receiver<Destinations>,
    mut changes: impl Stream<Item = WayChange> + Unpin,
) -> Result<(), NetlinkError> {
    let mut book = Book::default();
    book.want(wanted.borrow_and_update().clone());
    let mut not_before = Instant::now();
    let mut due = not_before;
    loop {
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                if book.want(wanted.borrow_and_update().clone()) {
                    due = due.min(Instant::now() + GATHER).max(not_before);
                }
                ways.publish(book.ways());
            }
            change = changes.next() => {
                let Some(change) = change else { return Ok(()) };
                let mut effect = book.note(change);
                // One snapshot for all that is there already.
                while let Some(Some(change)) = changes.next().now_or_never() {
                    effect = effect.max(book.note(change));
                }
                match effect {
                    Effect::None => {}
                    Effect::Known => ways.publish(book.ways()),
                    Effect::Unknown => {
                        ways.publish(Ways::default());
                        due = due.min(Instant::now() + GATHER).max(not_before);
                    }
                }
            }
            () = sleep_until(due) => {
                let before = Instant::now();
                book.look(netlink, source).await?;
                let found = book.ways();
                if *ways.current() != found {
                    tracing::debug!(ways = found.len(), "ways of SRv6 packets");
                    ways.publish(found);
                }
                let now = Instant::now();
                not_before = now + (now - before) * REST;
                due = (now + PERIOD).max(not_before);
            }
        }
    }
}

/// What a change means for the ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Effect {
    /// Nothing.
    None,
    /// They are others now, and known.
    Known,
    /// They are not known until the next look.
    Unknown,
}

/// What is known.
#[derive(Debug, Default)]
struct Book {
    wanted: Destinations,
    /// Links of Ethernet that are up, and their MTU in bytes.
    links: HashMap<u32, u32>,
    /// Neighbours by link and address.
    neighbours: HashMap<(u32, Ipv6Addr), [u8; 6]>,
    hops: BTreeMap<Ipv6Addr, NextHop>,
    /// The neighbours in `hops`.
    used: HashSet<(u32, Ipv6Addr)>,
}

impl Book {
    /// Takes in what is wanted; whether that takes a look.
    fn want(&mut self, wanted: Destinations) -> bool {
        self.wanted = wanted;
        self.wanted.keys().any(|to| !self.hops.contains_key(to))
    }

    fn note(&mut self, change: WayChange) -> Effect {
        match change {
            WayChange::Neighbour(Neighbour { index, addr, mac }) => {
                match mac {
                    Some(mac) => self.neighbours.insert((index, addr), mac),
                    None => self.neighbours.remove(&(index, addr)),
                };
                if self.used.contains(&(index, addr)) {
                    return Effect::Known;
                }
                return Effect::None;
            }
            WayChange::Route(prefix) if !self.leads_to_any(prefix) => return Effect::None,
            WayChange::Link(index) if !self.used.iter().any(|(used, _)| *used == index) => {
                return Effect::None;
            }
            WayChange::Route(_) | WayChange::Link(_) | WayChange::Rule | WayChange::Overrun => {}
        }
        self.hops.clear();
        self.used.clear();
        Effect::Unknown
    }

    fn leads_to_any(&self, prefix: Prefix) -> bool {
        let Prefix::V6(prefix) = prefix else { return false };
        let mut after = self.wanted.range(prefix.addr()..);
        after.next().is_some_and(|(to, _)| prefix.contains(*to))
    }

    async fn look(&mut self, netlink: &Netlink, source: Ipv6Addr) -> Result<(), NetlinkError> {
        if self.wanted.is_empty() {
            return Ok(());
        }
        self.links = netlink.ethernet_links().await?.into_iter().collect();
        let neighbours = netlink.neighbours().await?.into_iter();
        self.neighbours = neighbours
            .filter_map(|known| Some(((known.index, known.addr), known.mac?)))
            .collect();
        self.hops.clear();
        for &to in self.wanted.keys() {
            if let Some(hop) = netlink.next_hop(source, to).await? {
                self.hops.insert(to, hop);
            }
        }
        self.used = self.hops.values().map(|hop| (hop.index, hop.neighbour)).collect();
        Ok(())
    }

    /// The ways, as far as all of it is known.
    fn ways(&self) -> Ways {
        let ways = self.wanted.iter().filter_map(|(&to, &path)| {
            let hop = self.hops.get(&to)?;
            let link = *self.links.get(&hop.index)?;
            let mac = *self.neighbours.get(&(hop.index, hop.neighbour))?;
            let mtu_bytes = u32::from(path.bytes())
                .min(link)
                .min(hop.mtu_bytes.unwrap_or(u32::MAX));
            let way = Way {
                index: hop.index,
                mac,
                mtu_bytes,
            };
            Some((to, way))
        });
        ways.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn addr(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    fn prefix(text: &str) -> Prefix {
        Prefix::V6(text.parse().unwrap())
    }

    fn neighbour(index: u32, text: &str, mac: Option<[u8; 6]>) -> WayChange {
        WayChange::Neighbour(Neighbour {
            index,
            addr: addr(text),
            mac,
        })
    }

    /// Two peers: one behind router fe80::1 on link 3, one on link 4 itself.
    fn book() -> Book {
        let mut book = Book::default();
        let mtu = |bytes| Mtu::new(bytes).unwrap();
        let wanted = [(addr("fd00:1::1"), mtu(1400)), (addr("fd00:2::1"), mtu(9000))];
        assert!(book.want(wanted.into()));
        book.links = [(3, 1500), (4, 1500)].into();
        let hop = |index, text| NextHop {
            index,
            neighbour: addr(text),
            mtu_bytes: None,
        };
        book.hops = [
            (addr("fd00:1::1"), hop(3, "fe80::1")),
            (addr("fd00:2::1"), hop(4, "fd00:2::1")),
        ]
        .into();
        book.used = book.hops.values().map(|hop| (hop.index, hop.neighbour)).collect();
        book
    }

    /// The neighbour packets to each of the two go to.
    fn macs(book: &Book) -> [Option<[u8; 6]>; 2] {
        ["fd00:1::1", "fd00:2::1"].map(|to| book.ways().to(addr(to)).map(|way| way.mac))
    }

    #[test]
    fn a_way_takes_route_link_and_neighbour() {
        let mut book = book();
        assert_eq!(macs(&book), [None, None]);
        assert_eq!(book.note(neighbour(3, "fe80::1", Some(ONE))), Effect::Known);
        assert_eq!(macs(&book), [Some(ONE), None]);
        // The same address on another link is somebody else.
        assert_eq!(book.note(neighbour(4, "fe80::1", Some(OTHER))), Effect::None);
        assert_eq!(book.note(neighbour(4, "fd00:2::1", Some(OTHER))), Effect::Known);
        assert_eq!(macs(&book), [Some(ONE), Some(OTHER)]);
        // It is no link of Ethernet, or down.
        book.links.remove(&3);
        assert_eq!(macs(&book), [None, Some(OTHER)]);
    }

    #[test]
    fn a_neighbour_is_followed_and_lost_at_once() {
        let mut book = book();
        book.note(neighbour(3, "fe80::1", Some(ONE)));
        assert_eq!(book.note(neighbour(3, "fe80::1", Some(OTHER))), Effect::Known);
        assert_eq!(macs(&book)[0], Some(OTHER));
        assert_eq!(book.note(neighbour(3, "fe80::1", None)), Effect::Known);
        assert_eq!(macs(&book)[0], None);
    }

    #[test]
    fn a_way_carries_what_path_link_and_route_do() {
        let mut book = book();
        book.note(neighbour(3, "fe80::1", Some(ONE)));
        book.note(neighbour(4, "fd00:2::1", Some(ONE)));
        let carries =
            |book: &Book| ["fd00:1::1", "fd00:2::1"].map(|to| book.ways().to(addr(to)).unwrap().mtu_bytes);
        assert_eq!(carries(&book), [1400, 1500]);
        book.hops.get_mut(&addr("fd00:1::1")).unwrap().mtu_bytes = Some(1300);
        assert_eq!(carries(&book), [1300, 1500]);
    }

    #[test]
    fn what_may_lead_elsewhere_now_is_unknown() {
        for change in [
            WayChange::Route(prefix("::/0")),
            WayChange::Route(prefix("fd00:2::/32")),
            WayChange::Route(prefix("fd00:1::1/128")),
            WayChange::Link(4),
            WayChange::Rule,
            WayChange::Overrun,
        ] {
            let mut book = book();
            book.note(neighbour(3, "fe80::1", Some(ONE)));
            assert_eq!(book.note(change), Effect::Unknown, "{change:?}");
            assert_eq!(macs(&book), [None, None], "{change:?}");
        }
    }

    #[test]
    fn what_concerns_others_changes_nothing() {
        for change in [
            WayChange::Route(prefix("fd00:3::/32")),
            WayChange::Route(prefix("fd00::/32")),
            WayChange::Route(Prefix::V4("0.0.0.0/0".parse().unwrap())),
            WayChange::Link(5),
            neighbour(3, "fe80::2", Some(OTHER)),
        ] {
            let mut book = book();
            book.note(neighbour(3, "fe80::1", Some(ONE)));
            assert_eq!(book.note(change), Effect::None, "{change:?}");
            assert_eq!(macs(&book), [Some(ONE), None], "{change:?}");
        }
    }

    #[test]
    fn a_new_destination_takes_a_look_and_a_new_mtu_none() {
        let mut book = book();
        book.note(neighbour(3, "fe80::1", Some(ONE)));
        let mtu = |bytes| Mtu::new(bytes).unwrap();
        assert!(!book.want([(addr("fd00:1::1"), mtu(1280))].into()));
        assert_eq!(book.ways().to(addr("fd00:1::1")).unwrap().mtu_bytes, 1280);
        assert_eq!(book.ways().len(), 1);
        let both = [(addr("fd00:1::1"), mtu(1280)), (addr("fd00:9::1"), mtu(1280))];
        assert!(book.want(both.into()));
    }
}
