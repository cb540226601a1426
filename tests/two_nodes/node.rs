//! A node without a kernel: both directions of one queue over in-memory edges.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use kersey::addr::{MacAddr, Mtu, Prefix, Vni};
use kersey::backend::udp::{Udp, UdpHop};
use kersey::backend::vxlan::{Vxlan, VxlanHop};
use kersey::dataplane::Encap;
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::{IngressCheck, Sources};
use kersey::dataplane::memory::{MemoryDevice, MemoryUnderlay, Message};
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::{Count, DropReason, PeerStats, WorkerStats};
use kersey::dataplane::worker::{Inbound, InboundOptions, Outbound, Turn};
use kersey::wire::virtio::VirtioHeader;

/// A node of the overlay 10.244.0.0/16, fd00:244::/48; node *n* has 10.244.n.0/24, fd00:244:0:n::/64 and 192.0.2.n.
pub(crate) struct NodeOf<E: Tunnel> {
    /// Its number, 1 to 254.
    pub(crate) number: u8,
    /// Device to underlay.
    pub(crate) outbound: Outbound<E, MemoryDevice, MemoryUnderlay>,
    /// Underlay to device.
    pub(crate) inbound: Inbound<E, MemoryDevice, MemoryUnderlay>,
    /// Its routes.
    pub(crate) routes: SharedRoutes<E::Hop>,
}

/// A node of flannel's udp backend, which most tests are about: what they find holds for every encapsulation.
pub(crate) type Node = NodeOf<Udp>;

/// An encapsulation nodes can speak.
pub(crate) trait Tunnel: Encap {
    /// That of node `number`.
    fn of(number: u8) -> Self;

    /// The way to `prefix` of node `peer`.
    fn hop(&self, prefix: Prefix, peer: u8) -> Self::Hop;
}

impl Tunnel for Udp {
    fn of(_number: u8) -> Self {
        Self
    }

    fn hop(&self, _prefix: Prefix, peer: u8) -> UdpHop {
        UdpHop(underlay(peer))
    }
}

impl Tunnel for Vxlan {
    fn of(number: u8) -> Self {
        Self {
            vni: Vni::new(1).unwrap(),
            mac: mac(number),
        }
    }

    fn hop(&self, prefix: Prefix, peer: u8) -> VxlanHop {
        VxlanHop::new(*self, prefix, mac(peer), underlay(peer))
    }
}

/// What a node is like, beyond its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    /// How strictly it checks.
    pub(crate) check: IngressCheck,
    /// What its device takes.
    pub(crate) merge: Merge,
    /// The largest inner packet to its peers, bytes.
    pub(crate) inner_mtu: u16,
}

impl Default for Kind {
    fn default() -> Self {
        Self {
            check: IngressCheck::Strict,
            merge: Merge { tcp: true, udp: true },
            inner_mtu: 1472,
        }
    }
}

impl<E: Tunnel> NodeOf<E> {
    /// A node that knows `peers` by number.
    pub(crate) fn new(number: u8, kind: Kind, peers: &[u8]) -> Self {
        let overlay = Overlay {
            v4: Some(Network {
                prefix: "10.244.0.0/16".parse().unwrap(),
                subnet_len: 24,
                own: format!("10.244.{number}.0/24").parse().unwrap(),
            }),
            v6: Some(Network {
                prefix: "fd00:244::/48".parse().unwrap(),
                subnet_len: 64,
                own: format!("fd00:244:0:{number:x}::/64").parse().unwrap(),
            }),
        };
        let mut table = RouteTable::new(overlay);
        let encap = E::of(number);
        for &peer in peers {
            for prefix in prefixes(peer) {
                let entry = Peer {
                    hop: encap.hop(prefix, peer),
                    inner_mtu: mtu(kind.inner_mtu),
                    stats: PeerStats::new(1),
                };
                table.insert(prefix, entry);
            }
        }
        let routes = SharedRoutes::new(table);
        let edges = || (MemoryDevice::new(kind.merge), MemoryUnderlay::new());
        let stats = || (0, Arc::new(WorkerStats::default()));
        let options = InboundOptions {
            check: kind.check,
            verify_inner: false,
            inner_mtu: mtu(kind.inner_mtu),
            clamp_mss: false,
        };
        let start = start();
        let mut outbound = Outbound::new(encap.clone(), edges(), routes.reader(), stats(), start);
        outbound.set_sources(Sources {
            check: kind.check,
            node: [Some(underlay(number).ip()), None, None, None],
        });
        Self {
            number,
            outbound,
            inbound: Inbound::new(encap, edges(), routes.reader(), stats(), options, start),
            routes,
        }
    }

    /// Its address on the underlay.
    pub(crate) fn underlay(&self) -> SocketAddr {
        underlay(self.number)
    }

    /// Sends packets of its host until nothing waits; gives what went on the wire.
    pub(crate) fn send(&mut self, packets: Vec<(VirtioHeader, Vec<u8>)>, now: Instant) -> Vec<Message> {
        self.outbound.device().from_host.extend(packets);
        while self.outbound.turn(now).unwrap() == Turn::Busy {}
        self.outbound.underlay().sent.drain(..).collect()
    }

    /// Receives messages until nothing waits; gives what its host gets.
    pub(crate) fn receive(
        &mut self,
        messages: impl IntoIterator<Item = Message>,
        now: Instant,
    ) -> Vec<(VirtioHeader, Vec<u8>)> {
        self.inbound.underlay().incoming.extend(messages);
        while self.inbound.turn(now).unwrap() == Turn::Busy {}
        self.inbound.device().to_host.drain(..).collect()
    }

    /// The reasons anything was dropped for, with how often, over both directions.
    pub(crate) fn drops(&self) -> Vec<(DropReason, u64)> {
        let dropped = |reason| self.outbound.stats().dropped(reason) + self.inbound.stats().dropped(reason);
        named(dropped)
    }

    /// The same, of the route over `peer` that has `inner`.
    pub(crate) fn peer_drops(&self, inner: IpAddr) -> Vec<(DropReason, u64)> {
        let routes = self.routes.current();
        let Some(peer) = routes.lookup(inner).and_then(|index| routes.peer(index)) else {
            return Vec::new();
        };
        named(|reason| peer.stats.dropped(reason))
    }

    /// The same, of all routes over the node of number `peer`.
    pub(crate) fn drops_of_peer(&self, peer: u8) -> Vec<(DropReason, u64)> {
        let (mut all, v6) = (self.peer_drops(v4(peer, 2)), self.peer_drops(v6(peer, 2)));
        all.extend(v6);
        all
    }

    /// A count over both directions.
    pub(crate) fn counted(&self, what: Count) -> u64 {
        self.outbound.stats().counted(what) + self.inbound.stats().counted(what)
    }
}

fn named(dropped: impl Fn(DropReason) -> u64) -> Vec<(DropReason, u64)> {
    DropReason::ALL
        .iter()
        .map(|&reason| (reason, dropped(reason)))
        .filter(|&(_, n)| n > 0)
        .collect()
}

/// The underlay address of node `number`.
pub(crate) fn underlay(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 8285))
}

/// An IPv4 address in the subnet of node `number`.
pub(crate) fn v4(number: u8, host: u8) -> IpAddr {
    IpAddr::from([10, 244, number, host])
}

/// An IPv6 address in the subnet of node `number`.
pub(crate) fn v6(number: u8, host: u8) -> IpAddr {
    IpAddr::from([0xfd00, 0x244, 0, u16::from(number), 0, 0, 0, u16::from(host)])
}

/// The subnets of node `number`.
pub(crate) fn prefixes(number: u8) -> [Prefix; 2] {
    [
        Prefix::V4(format!("10.244.{number}.0/24").parse().unwrap()),
        Prefix::V6(format!("fd00:244:0:{number:x}::/64").parse().unwrap()),
    ]
}

/// The Ethernet address of node `number`.
pub(crate) fn mac(number: u8) -> MacAddr {
    [0x02, 0x11, 0x22, 0x33, 0x44, number].into()
}

/// An MTU that is one.
pub(crate) fn mtu(bytes: u16) -> Mtu {
    Mtu::new(u32::from(bytes)).unwrap()
}

/// The moment simulated time counts from.
#[expect(
    clippy::disallowed_methods,
    reason = "an Instant cannot be made otherwise; only differences to it matter"
)]
pub(crate) fn start() -> Instant {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *START
}
