//! Which peer has an address: an immutable table, published whole.
//!
//! # Theory of operation
//!
//! Readers (the workers) load a snapshot once a batch ([`RouteReader::load`]: one atomic read while nothing changed) and
//! look up in it without locks. The one writer clones the table, changes the clone, publishes it ([`SharedRoutes::publish`]).
//! A clone is cheap because the table is a tree of chunks behind `Arc`s and only the chunks that a change touches are copied:
//!
//! ```text
//! address ─┬─ in the network, exactly the configured subnet length: direct index, (addr − base) >> shift
//!          └─ any other prefix: longest-prefix match in a trie, sharded by the bits behind the network's
//!               │
//!               ▼ u32
//!            peers: chunks of Arc<Peer>
//! ```
//!
//! Invariants: an index in either structure names a live peer; the longest prefix wins over both structures; every peer's
//! endpoint address is among the sources with all routes over it, so that one of two routes may go and the other still be found.
//!
//! Limits: the direct index is kept up to 2^22 subnets a family (16 MiB if all are used); larger networks use the trie. An idle
//! reader keeps an old snapshot alive until its next load, so idle workers load about once a second.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};
use ipnet::{Ipv4Net, Ipv6Net};
use prefix_trie::PrefixMap;

use crate::addr::{Ipv4Prefix, Ipv6Prefix, Mtu, Prefix};
use crate::dataplane::stats::PeerStats;

/// What the encapsulation needs to reach a peer.
pub trait Hop: Clone + Send + Sync + 'static {
    /// Where its datagrams go.
    fn endpoint(&self) -> SocketAddr;

    /// The address its own datagrams come from.
    #[inline]
    fn source(&self) -> IpAddr {
        self.endpoint().ip()
    }

    /// Whether `addr` is its node's own, outside the overlay, which may stand as the source of what the node itself sends.
    #[inline]
    fn is_node(&self, addr: IpAddr) -> bool {
        self.source() == addr
    }
}

/// A peer as one route sees it.
#[derive(Clone, Debug)]
pub struct Peer<H> {
    /// How to reach it.
    pub hop: H,
    /// The largest inner packet the path to it carries.
    pub inner_mtu: Mtu,
    /// Its counters, shared by all its routes and all snapshots.
    pub stats: PeerStats,
}

/// The overlay network of one family, and how it is cut into subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network<P> {
    /// The whole network.
    pub prefix: P,
    /// Length of a node's subnet, bits.
    pub subnet_len: u8,
    /// This node's own subnet.
    pub own: P,
}

/// What the table is made for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// IPv4, if the overlay has it.
    pub v4: Option<Network<Ipv4Prefix>>,
    /// IPv6, if the overlay has it.
    pub v6: Option<Network<Ipv6Prefix>>,
}

impl Overlay {
    /// Whether `addr` lies in the overlay.
    #[inline]
    pub fn contains(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => self.v4.is_some_and(|network| network.prefix.contains(addr)),
            IpAddr::V6(addr) => self.v6.is_some_and(|network| network.prefix.contains(addr)),
        }
    }

    /// Whether `addr` lies in this node's own subnet.
    #[inline]
    pub fn is_own(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => self.v4.is_some_and(|network| network.own.contains(addr)),
            IpAddr::V6(addr) => self.v6.is_some_and(|network| network.own.contains(addr)),
        }
    }

    /// This node's own address of the family of `addr`: the first of its subnet, as flannel puts it on the device.
    pub fn own_address(&self, addr: IpAddr) -> Option<IpAddr> {
        match addr {
            IpAddr::V4(_) => self.v4.map(|network| network.own.addr().into()),
            IpAddr::V6(_) => self.v6.map(|network| network.own.addr().into()),
        }
    }
}

/// Longest-prefix match from inner addresses to peers, and from outer source addresses to the fact that they are peers'.
#[derive(Clone, Debug)]
pub struct RouteTable<H> {
    overlay: Overlay,
    v4: Family<Ipv4Addr>,
    v6: Family<Ipv6Addr>,
    peers: CowVec<Option<Arc<Peer<H>>>>,
    free: Vec<u32>,
    sources: Sources,
    len: usize,
}

impl<H: Hop> RouteTable<H> {
    /// An empty table for an overlay.
    pub fn new(overlay: Overlay) -> Self {
        Self {
            overlay,
            v4: Family::new(
                overlay
                    .v4
                    .map(|network| (network.prefix.addr(), network.prefix.len(), network.subnet_len)),
            ),
            v6: Family::new(
                overlay
                    .v6
                    .map(|network| (network.prefix.addr(), network.prefix.len(), network.subnet_len)),
            ),
            peers: CowVec::default(),
            free: Vec::new(),
            sources: Sources::default(),
            len: 0,
        }
    }

    /// Puts a route in, or replaces the route of exactly this prefix.
    pub fn insert(&mut self, prefix: Prefix, peer: Peer<H>) {
        self.remove(prefix);
        let source = peer.hop.source();
        let index = self
            .free
            .pop()
            .unwrap_or(u32::try_from(self.peers.len()).unwrap_or(u32::MAX));
        self.peers.set(index as usize, Some(Arc::new(peer)));
        self.sources.insert(source, index);
        match prefix {
            Prefix::V4(prefix) => self.v4.insert(prefix.addr(), prefix.len(), index),
            Prefix::V6(prefix) => self.v6.insert(prefix.addr(), prefix.len(), index),
        }
        self.len += 1;
    }

    /// Takes the route of exactly this prefix out; whether there was one.
    pub fn remove(&mut self, prefix: Prefix) -> bool {
        let removed = match prefix {
            Prefix::V4(prefix) => self.v4.remove(prefix.addr(), prefix.len()),
            Prefix::V6(prefix) => self.v6.remove(prefix.addr(), prefix.len()),
        };
        let Some(index) = removed else { return false };
        if let Some(peer) = self.peer(index) {
            let source = peer.hop.source();
            self.sources.remove(source, index);
        }
        self.peers.set(index as usize, None);
        self.free.push(index);
        self.len -= 1;
        true
    }

    /// The peer that has `addr`, as an index for [`Self::peer`].
    #[inline]
    pub fn lookup(&self, addr: IpAddr) -> Option<u32> {
        match addr {
            IpAddr::V4(addr) => self.v4.lookup(addr),
            IpAddr::V6(addr) => self.v6.lookup(addr),
        }
    }

    /// The peer of an index that [`Self::lookup`] gave.
    #[inline]
    pub fn peer(&self, index: u32) -> Option<&Peer<H>> {
        self.peers.get(index as usize)?.as_deref()
    }

    /// A route over the peer whose datagrams come from `addr`; `None` for a stranger.
    #[inline]
    pub fn source(&self, addr: IpAddr) -> Option<u32> {
        self.sources.get(addr)
    }

    /// The overlay the table is made for.
    #[inline]
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Number of routes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no route.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The table all workers read: publish on one side, load on the other.
#[derive(Debug)]
pub struct SharedRoutes<H>(Arc<ArcSwap<RouteTable<H>>>);

impl<H: Hop> SharedRoutes<H> {
    /// Shares a first table.
    pub fn new(table: RouteTable<H>) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(table)))
    }

    /// Puts a new snapshot in place; readers see it at their next load and are never stalled.
    pub fn publish(&self, table: RouteTable<H>) {
        self.0.store(Arc::new(table));
    }

    /// The current snapshot.
    pub fn current(&self) -> Arc<RouteTable<H>> {
        self.0.load_full()
    }

    /// A reader for one worker.
    pub fn reader(&self) -> RouteReader<H> {
        RouteReader(Cache::new(Arc::clone(&self.0)))
    }
}

impl<H> Clone for SharedRoutes<H> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// One worker's view of the table.
pub struct RouteReader<H>(Cache<Arc<ArcSwap<RouteTable<H>>>, Arc<RouteTable<H>>>);

impl<H: Hop> RouteReader<H> {
    /// The current snapshot: one truth for the whole batch.
    #[inline]
    pub fn load(&mut self) -> &RouteTable<H> {
        self.0.load()
    }
}

/// Largest direct index, bits: 4 Mi subnets.
const DIRECT_BITS: u8 = 22;
/// Bits behind the network prefix that pick a shard of the trie: a change copies a thousandth of it.
const SHARD_BITS: u8 = 10;
/// No peer.
const NONE: u32 = u32::MAX;

/// What the routes of one address family need to know of its addresses.
trait FamilyAddr: Copy {
    type Net: prefix_trie::Prefix + Copy + std::fmt::Debug;
    const BITS: u8;
    fn bits(self) -> u128;
    fn net(self, len: u8) -> Self::Net;
}

impl FamilyAddr for Ipv4Addr {
    type Net = Ipv4Net;
    const BITS: u8 = 32;
    #[inline]
    fn bits(self) -> u128 {
        u128::from(self.to_bits())
    }
    #[inline]
    fn net(self, len: u8) -> Ipv4Net {
        Ipv4Net::new_assert(self, len)
    }
}

impl FamilyAddr for Ipv6Addr {
    type Net = Ipv6Net;
    const BITS: u8 = 128;
    #[inline]
    fn bits(self) -> u128 {
        self.to_bits()
    }
    #[inline]
    fn net(self, len: u8) -> Ipv6Net {
        Ipv6Net::new_assert(self, len)
    }
}

/// Routes of one family.
#[derive(Clone, Debug)]
struct Family<A: FamilyAddr> {
    base: u128,
    /// Number of addresses in the network; 0 without one.
    span: u128,
    network_len: u8,
    subnet_len: u8,
    /// By subnet number; empty if the network has too many.
    direct: CowVec<u32>,
    /// Prefixes longer than the network by at least the shard bits, by those bits; empty until used.
    shards: Vec<Arc<PrefixMap<A::Net, u32>>>,
    /// All other prefixes.
    wide: Arc<PrefixMap<A::Net, u32>>,
    /// How many prefixes are in shards and wide together.
    others: usize,
}

impl<A: FamilyAddr> Family<A> {
    fn new(network: Option<(A, u8, u8)>) -> Self {
        let (base, network_len, subnet_len) =
            network.map_or((0, 0, 0), |(addr, len, subnet)| (addr.bits(), len, subnet));
        let span = match network {
            // A network of length 0 over 128 bits has one address more than fits; the last one then goes without the index.
            Some(_) => 1u128
                .checked_shl(u32::from(A::BITS - network_len))
                .unwrap_or(u128::MAX),
            None => 0,
        };
        let direct = match network {
            Some(_) if subnet_len >= network_len && subnet_len - network_len <= DIRECT_BITS => {
                CowVec::filled(1 << (subnet_len - network_len), NONE)
            }
            _ => CowVec::default(),
        };
        Self {
            base,
            span,
            network_len,
            subnet_len,
            direct,
            shards: Vec::new(),
            wide: Arc::default(),
            others: 0,
        }
    }

    #[inline]
    fn lookup(&self, addr: A) -> Option<u32> {
        if self.others == 0 {
            return self.direct(addr);
        }
        match (self.longest(addr), self.direct(addr)) {
            (Some((len, index)), Some(direct)) => Some(if len > self.subnet_len { index } else { direct }),
            (Some((_, index)), None) => Some(index),
            (None, direct) => direct,
        }
    }

    #[inline]
    fn direct(&self, addr: A) -> Option<u32> {
        let offset = addr.bits().wrapping_sub(self.base);
        if offset >= self.span {
            return None;
        }
        let index = *self
            .direct
            .get((offset >> (A::BITS - self.subnet_len)) as usize)?;
        (index != NONE).then_some(index)
    }

    fn longest(&self, addr: A) -> Option<(u8, u32)> {
        let host = addr.net(A::BITS);
        let sharded = self
            .shard(addr)
            .and_then(|shard| self.shards.get(shard))
            .and_then(|map| map.get_lpm(&host));
        let found = sharded.or_else(|| self.wide.get_lpm(&host));
        found.map(|(net, index)| (prefix_trie::Prefix::prefix_len(&net), *index))
    }

    /// The shard an address belongs to, if it lies in the network.
    #[inline]
    fn shard(&self, addr: A) -> Option<usize> {
        let offset = addr.bits().wrapping_sub(self.base);
        let below = A::BITS - self.network_len;
        (offset < self.span && below >= SHARD_BITS).then(|| (offset >> (below - SHARD_BITS)) as usize)
    }

    fn is_direct(&self, addr: A, len: u8) -> bool {
        len == self.subnet_len && !self.direct.is_empty() && addr.bits().wrapping_sub(self.base) < self.span
    }

    /// The trie a prefix belongs to, ready to be changed.
    fn map(&mut self, addr: A, len: u8) -> &mut PrefixMap<A::Net, u32> {
        let shard = self.shard(addr).filter(|_| len >= self.network_len + SHARD_BITS);
        match shard {
            Some(shard) => {
                if self.shards.is_empty() {
                    self.shards = vec![Arc::default(); 1 << SHARD_BITS];
                }
                Arc::make_mut(&mut self.shards[shard])
            }
            None => Arc::make_mut(&mut self.wide),
        }
    }

    fn insert(&mut self, addr: A, len: u8, index: u32) {
        if self.is_direct(addr, len) {
            let slot = (addr.bits().wrapping_sub(self.base) >> (A::BITS - len)) as usize;
            self.direct.set(slot, index);
        } else {
            self.map(addr, len).insert(addr.net(len), index);
            self.others += 1;
        }
    }

    fn remove(&mut self, addr: A, len: u8) -> Option<u32> {
        if self.is_direct(addr, len) {
            let slot = (addr.bits().wrapping_sub(self.base) >> (A::BITS - len)) as usize;
            let index = self.direct.get(slot).copied().filter(|&index| index != NONE)?;
            self.direct.set(slot, NONE);
            return Some(index);
        }
        if self.others == 0 {
            return None;
        }
        let index = self.map(addr, len).remove(&addr.net(len))?;
        self.others -= 1;
        Some(index)
    }
}

/// Outer source addresses of peers, and the routes over each.
#[derive(Clone, Debug)]
struct Sources(Vec<Arc<HashMap<IpAddr, SourceRoutes>>>);

/// The routes over one endpoint address: mostly one a family.
#[derive(Clone, Debug)]
struct SourceRoutes {
    newest: u32,
    older: Vec<u32>,
}

/// Shards of [`Sources`]: a change copies one.
const SOURCE_SHARDS: usize = 256;

impl Default for Sources {
    fn default() -> Self {
        Self(vec![Arc::default(); SOURCE_SHARDS])
    }
}

impl Sources {
    /// The last byte of an address tells neighbours apart best.
    #[inline]
    fn shard(addr: IpAddr) -> usize {
        match addr {
            IpAddr::V4(addr) => usize::from(addr.octets()[3]),
            IpAddr::V6(addr) => usize::from(addr.octets()[15]),
        }
    }

    #[inline]
    fn get(&self, addr: IpAddr) -> Option<u32> {
        self.0[Self::shard(addr)].get(&addr).map(|routes| routes.newest)
    }

    fn insert(&mut self, addr: IpAddr, index: u32) {
        match Arc::make_mut(&mut self.0[Self::shard(addr)]).entry(addr) {
            Entry::Occupied(mut entry) => {
                let routes = entry.get_mut();
                routes.older.push(routes.newest);
                routes.newest = index;
            }
            Entry::Vacant(entry) => {
                entry.insert(SourceRoutes {
                    newest: index,
                    older: Vec::new(),
                });
            }
        }
    }

    fn remove(&mut self, addr: IpAddr, index: u32) {
        let map = Arc::make_mut(&mut self.0[Self::shard(addr)]);
        let Some(routes) = map.get_mut(&addr) else {
            return;
        };
        if routes.newest != index {
            routes.older.retain(|&older| older != index);
            return;
        }
        match routes.older.pop() {
            Some(older) => routes.newest = older,
            None => {
                map.remove(&addr);
            }
        }
    }
}

/// A vector in shared chunks: cloning copies pointers, setting copies one chunk.
#[derive(Clone, Debug)]
struct CowVec<T> {
    chunks: Vec<Arc<[T]>>,
    len: usize,
}

/// Elements of a chunk: with a million of them, as many chunks as a chunk has elements.
const CHUNK: usize = 1024;

impl<T> Default for CowVec<T> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            len: 0,
        }
    }
}

impl<T: Clone + Default> CowVec<T> {
    /// `len` elements of one value; all chunks are one until changed.
    fn filled(len: usize, value: T) -> Self {
        let chunk: Arc<[T]> = vec![value; CHUNK].into();
        Self {
            chunks: vec![chunk; len.div_ceil(CHUNK)],
            len,
        }
    }

    #[inline]
    fn get(&self, index: usize) -> Option<&T> {
        self.chunks.get(index / CHUNK)?.get(index % CHUNK)
    }

    /// Sets an element, growing the vector with defaults as needed.
    fn set(&mut self, index: usize, value: T) {
        while self.chunks.len() * CHUNK <= index {
            self.chunks.push(vec![T::default(); CHUNK].into());
        }
        self.len = self.len.max(index + 1);
        Arc::make_mut(&mut self.chunks[index / CHUNK])[index % CHUNK] = value;
    }

    fn len(&self) -> usize {
        self.len
    }

    fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct TestHop(SocketAddr);

    impl Hop for TestHop {
        fn endpoint(&self) -> SocketAddr {
            self.0
        }
    }

    fn overlay() -> Overlay {
        Overlay {
            v4: Some(Network {
                prefix: "10.244.0.0/16".parse().unwrap(),
                subnet_len: 24,
                own: "10.244.1.0/24".parse().unwrap(),
            }),
            v6: Some(Network {
                prefix: "fd00:244::/48".parse().unwrap(),
                subnet_len: 64,
                own: "fd00:244:0:1::/64".parse().unwrap(),
            }),
        }
    }

    fn peer(last: u8) -> Peer<TestHop> {
        Peer {
            hop: TestHop(SocketAddr::from(([192, 0, 2, last], 8285))),
            inner_mtu: Mtu::new(1472).unwrap(),
            stats: PeerStats::new(1),
        }
    }

    fn v4(text: &str) -> Prefix {
        Prefix::V4(text.parse().unwrap())
    }

    fn v6(text: &str) -> Prefix {
        Prefix::V6(text.parse().unwrap())
    }

    /// Last byte of the endpoint of the peer that has `addr`.
    fn found(table: &RouteTable<TestHop>, addr: &str) -> Option<u8> {
        let index = table.lookup(addr.parse().unwrap())?;
        match table.peer(index)?.hop.0.ip() {
            IpAddr::V4(addr) => Some(addr.octets()[3]),
            IpAddr::V6(_) => None,
        }
    }

    #[test]
    fn a_subnet_of_the_usual_length_is_found_directly() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("10.244.2.0/24"), peer(2));
        assert_eq!(found(&table, "10.244.2.77"), Some(2));
        assert_eq!(found(&table, "10.244.3.1"), None);
        assert_eq!(found(&table, "10.243.2.77"), None);
        assert_eq!(found(&table, "11.0.0.1"), None);
    }

    #[test]
    fn longer_prefix_wins_over_the_direct_index_and_back() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("10.244.2.0/24"), peer(2));
        table.insert(v4("10.244.2.64/26"), peer(3));
        table.insert(v4("10.244.0.0/20"), peer(4));
        assert_eq!(found(&table, "10.244.2.65"), Some(3));
        assert_eq!(
            found(&table, "10.244.2.1"),
            Some(2),
            "the direct index beats a shorter prefix"
        );
        assert_eq!(found(&table, "10.244.5.1"), Some(4));
        table.remove(v4("10.244.2.64/26"));
        assert_eq!(found(&table, "10.244.2.65"), Some(2));
    }

    #[test]
    fn a_route_outside_the_network_works_too() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("172.16.0.0/12"), peer(9));
        table.insert(v6("2001:db8::/32"), peer(8));
        assert_eq!(found(&table, "172.17.1.1"), Some(9));
        assert_eq!(found(&table, "2001:db8::1"), Some(8));
    }

    #[test]
    fn ipv6_subnets_are_found() {
        let mut table = RouteTable::new(overlay());
        table.insert(v6("fd00:244:0:2::/64"), peer(2));
        assert_eq!(found(&table, "fd00:244:0:2::5"), Some(2));
        assert_eq!(found(&table, "fd00:244:0:3::5"), None);
    }

    #[test]
    fn replacing_a_route_changes_its_source() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("10.244.2.0/24"), peer(2));
        table.insert(v4("10.244.2.0/24"), peer(3));
        assert_eq!(table.len(), 1);
        assert!(table.source("192.0.2.3".parse().unwrap()).is_some());
        assert!(table.source("192.0.2.2".parse().unwrap()).is_none());
    }

    #[test]
    fn a_source_with_two_routes_survives_the_loss_of_one() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("10.244.2.0/24"), peer(2));
        table.insert(v6("fd00:244:0:2::/64"), peer(2));
        table.remove(v4("10.244.2.0/24"));
        assert!(table.source("192.0.2.2".parse().unwrap()).is_some());
        table.remove(v6("fd00:244:0:2::/64"));
        assert!(table.source("192.0.2.2".parse().unwrap()).is_none());
    }

    #[test]
    fn a_source_leads_to_a_route_that_is_still_there() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("10.244.2.0/24"), peer(2));
        table.insert(v4("10.244.3.0/24"), peer(2));
        let source = peer(2).hop.endpoint().ip();
        table.remove(v4("10.244.3.0/24"));
        table.insert(v4("10.244.4.0/24"), peer(4));
        let found = table.source(source).and_then(|index| table.peer(index));
        assert_eq!(found.unwrap().hop.endpoint().ip(), source);
        table.remove(v4("10.244.2.0/24"));
        assert_eq!(table.source(source), None);
    }

    #[test]
    fn a_reader_sees_what_was_published() {
        let shared = SharedRoutes::new(RouteTable::new(overlay()));
        let mut reader = shared.reader();
        assert!(reader.load().is_empty());
        let mut table = (*shared.current()).clone();
        table.insert(v4("10.244.2.0/24"), peer(2));
        shared.publish(table);
        assert_eq!(found(reader.load(), "10.244.2.1"), Some(2));
    }

    #[test]
    fn a_clone_does_not_change_with_its_original() {
        let mut table = RouteTable::new(overlay());
        table.insert(v4("10.244.2.0/24"), peer(2));
        let old = table.clone();
        table.insert(v4("10.244.3.0/24"), peer(3));
        table.remove(v4("10.244.2.0/24"));
        assert_eq!(found(&old, "10.244.2.1"), Some(2));
        assert_eq!(found(&old, "10.244.3.1"), None);
    }

    /// The slow model: every prefix in a map, the longest that contains the address wins.
    fn model(routes: &BTreeMap<(u32, u8), u8>, addr: u32) -> Option<u8> {
        (0..=32u8).rev().find_map(|len| {
            let mask = u32::MAX.checked_shl(u32::from(32 - len)).unwrap_or(0);
            routes.get(&(addr & mask, len)).copied()
        })
    }

    proptest! {
        #[test]
        fn lookup_agrees_with_the_slow_model(
            steps in proptest::collection::vec((any::<bool>(), 0u32..0x3ff, 8u8..=32, 0u8..200), 1..80),
            asked in proptest::collection::vec(0u32..0x3ff, 1..40),
        ) {
            // Few bits are in play, so that prefixes nest and collide: 10.(240..).(x).(x) in steps.
            let place = |bits: u32| 0x0af0_0000u32 | ((bits & 0x3f0) << 12) | ((bits & 0xf) << 4);
            let mut table = RouteTable::new(overlay());
            let mut routes = BTreeMap::new();
            for (add, bits, len, id) in steps {
                let prefix = Ipv4Prefix::new(Ipv4Addr::from(place(bits)), len).unwrap();
                if add {
                    table.insert(prefix.into(), peer(id));
                    routes.insert((prefix.addr().to_bits(), len), id);
                } else {
                    let removed = table.remove(prefix.into());
                    prop_assert_eq!(removed, routes.remove(&(prefix.addr().to_bits(), len)).is_some());
                }
            }
            prop_assert_eq!(table.len(), routes.len());
            for bits in asked {
                let addr = Ipv4Addr::from(place(bits) | 5);
                prop_assert_eq!(found(&table, &addr.to_string()), model(&routes, addr.to_bits()), "{}", addr);
            }
        }
    }
}
