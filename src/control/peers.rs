//! The other nodes, as their leases show them.
//!
//! [`PeerTable`] is the one place where what a store says becomes what this node believes. It is pure: updates go in,
//! a table and the difference to the table before come out.
//!
//! What is kept: every lease the store told of (*told*), and the part of them that passes the checks
//! ([`Peers`]), recomputed from *told* after each update. [`Peers`] is what others see: it shares the attributes with *told*, and
//! itself with whoever has it. So the table is a function of the leases alone, whatever the
//! order they came in, and a lease that stops being in the way lets the one it blocked back in.
//!
//! Invariants:
//!
//! - Only a [`LeaseUpdate::Snapshot`] that lacks a lease, or a [`LeaseEvent::Removed`], removes one.
//! - Our own subnet is never a peer, nor is anything that overlaps it.
//! - No two peers overlap. Of two leases that do, the one of the configured subnet length wins, then the one that was
//!   claimed first if the store tells ([`Lease::created`]), then the one with the longer IPv4 prefix, then IPv6 prefix,
//!   then the lower address; so neither a wide claim nor a late one can push a node aside, and all nodes agree.
//! - A refused lease touches no other lease, and is counted by reason ([`Peers::rejected`]).
//!
//! Mass removal: an update that takes away more than half of the peers (and more than one) may be a store wiped or
//! restored rather than nodes gone, and looks no different. Such peers are *held*: they stay until
//! [`PeerTable::release_held`], which the caller calls after a linger time, or until they come back. Of a store that has
//! lost our own lease any removal is held ([`PeerTable::apply_of_forgetful`]).
//!
//! Limits: at most [`MAX_LEASES`] leases; more are refused and counted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::control::config::{NetworkConfig, Prefixed};
use crate::lease::{BySubnet, Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};

/// How many leases are kept. A /8 cut into /24s has 65,536 subnets; more than this is no network but an attack.
pub const MAX_LEASES: usize = 100_000;

/// Why a lease is not a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reject {
    /// Its subnet does not lie in the network; or is none of those it hands out, where nodes have the rest.
    OutsideNetwork,
    /// Its subnet overlaps ours.
    OverlapsOwn,
    /// Its subnet overlaps a peer's that has the better claim.
    OverlapsPeer,
    /// Its public address is no unicast address: absent, loopback, multicast, broadcast, link-local IPv6.
    PublicIpInvalid,
    /// Its public address is ours.
    PublicIpOurs,
    /// Its public address lies in the overlay, and is not in a part that is nodes' to have.
    PublicIpInOverlay,
    /// There are too many leases.
    TableFull,
}

impl Reject {
    /// The reason as counters name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::OutsideNetwork => "outside_network",
            Self::OverlapsOwn => "overlaps_own",
            Self::OverlapsPeer => "overlaps_peer",
            Self::PublicIpInvalid => "public_ip_invalid",
            Self::PublicIpOurs => "public_ip_ours",
            Self::PublicIpInOverlay => "public_ip_in_overlay",
            Self::TableFull => "table_full",
        }
    }
}

/// The difference an update made; each list is in order of subnets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerChanges {
    /// Peers that came.
    pub added: Vec<Subnet>,
    /// Peers with the same subnet and other attributes.
    pub changed: Vec<Subnet>,
    /// Peers that went.
    pub removed: Vec<Subnet>,
}

impl PeerChanges {
    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

/// The peers as of one update; a clone shares them.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    list: BySubnet<Arc<LeaseAttrs>>,
    held: usize,
    rejected: BTreeMap<&'static str, u64>,
    confirmed: bool,
}

impl Peers {
    /// The peers in order of subnets.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Subnet, &Arc<LeaseAttrs>)> {
        self.list.iter()
    }

    /// One peer.
    pub fn get(&self, subnet: Subnet) -> Option<&LeaseAttrs> {
        self.list.get(subnet).map(|attrs| &**attrs)
    }

    /// The peers as a list.
    pub fn list(&self) -> &BySubnet<Arc<LeaseAttrs>> {
        &self.list
    }

    /// How many peers there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many peers are held back from a mass removal.
    pub fn held(&self) -> usize {
        self.held
    }

    /// How many leases stand refused, by reason. Those beyond [`MAX_LEASES`] are not kept, so they are counted each
    /// time they are told.
    pub fn rejected(&self) -> &BTreeMap<&'static str, u64> {
        &self.rejected
    }

    /// Whether the store has given a complete list since this process started; before that the peers are those of a cache.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed
    }
}

/// A lease as the store told of it.
#[derive(Debug)]
struct Told {
    attrs: Arc<LeaseAttrs>,
    created: Option<u64>,
    is_reserved: bool,
}

/// The leases of one network, and which of them are peers of one node.
#[derive(Debug)]
pub struct PeerTable {
    config: Arc<NetworkConfig>,
    own: Subnet,
    own_attrs: LeaseAttrs,
    told: BTreeMap<Subnet, Told>,
    held: BTreeMap<Subnet, Arc<LeaseAttrs>>,
    rejected: BTreeMap<Subnet, Reject>,
    over_cap: u64,
    peers: Peers,
}

impl PeerTable {
    /// The table of the node that holds `own`, empty.
    pub fn new(config: Arc<NetworkConfig>, own: &Lease) -> Self {
        Self {
            config,
            own: own.subnet,
            own_attrs: own.attrs.clone(),
            told: BTreeMap::new(),
            held: BTreeMap::new(),
            rejected: BTreeMap::new(),
            over_cap: 0,
            peers: Peers::default(),
        }
    }

    /// Notes that the store itself has given a complete list: who is not in the table from here on is no peer, rather than one not
    /// heard of yet. Gives whether that was news.
    pub fn confirm(&mut self) -> bool {
        !std::mem::replace(&mut self.peers.confirmed, true)
    }

    /// The peers.
    pub fn peers(&self) -> &Peers {
        &self.peers
    }

    /// Takes in what the store told, whole values compared.
    pub fn apply(&mut self, update: LeaseUpdate) -> PeerChanges {
        self.take(update);
        self.hold_removed(|gone, of| gone > 1 && gone * 2 > of);
        self.settle()
    }

    /// As [`apply`](Self::apply), told by a store that has lost our own lease: it may have lost others that are alive, so whoever is
    /// missing is held.
    pub fn apply_of_forgetful(&mut self, update: LeaseUpdate) -> PeerChanges {
        self.take(update);
        self.hold_removed(|gone, _| gone > 0);
        self.settle()
    }

    fn take(&mut self, update: LeaseUpdate) {
        match update {
            LeaseUpdate::Snapshot(mut leases) => {
                if leases.len() > MAX_LEASES {
                    self.over_cap += self.cut(&mut leases) as u64;
                }
                let kept = leases.into_iter().map(|lease| (lease.subnet, self.told(lease)));
                let kept: Vec<_> = kept.collect();
                // In this order, for the old tree makes room for the new one; and one made of a list has no gaps.
                self.told = BTreeMap::new();
                self.told = kept.into_iter().collect();
            }
            LeaseUpdate::Events(events) => {
                for event in events {
                    match event {
                        LeaseEvent::Added(lease) => self.insert(lease),
                        LeaseEvent::Removed(subnet) => {
                            self.told.remove(&subnet);
                        }
                    }
                }
            }
        }
    }

    /// Leaves as many leases as are kept, and gives how many more there were. Those known stay, whoever else has come since; after them the
    /// better claim.
    fn cut(&self, leases: &mut Vec<Lease>) -> usize {
        // Of several that say something of one subnet the last is meant, and only one counts.
        leases.sort_by_key(|lease| lease.subnet);
        leases.dedup_by(|later, earlier| {
            let same = later.subnet == earlier.subnet;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        leases.sort_by_cached_key(|lease| {
            let subnet = lease.subnet;
            let told = self.told.contains_key(&subnet);
            let known = told || self.held.contains_key(&subnet) || self.peers.list.get(subnet).is_some();
            (!told, !known, self.rank(subnet, lease.created))
        });
        let more = leases.len().saturating_sub(MAX_LEASES);
        leases.truncate(MAX_LEASES);
        more
    }

    fn insert(&mut self, lease: Lease) {
        let subnet = lease.subnet;
        if self.told.len() >= MAX_LEASES && !self.told.contains_key(&subnet) {
            self.over_cap += 1;
            return;
        }
        let told = self.told(lease);
        self.told.insert(subnet, told);
    }

    /// What a lease says; where that is what was known before, told, held or still a peer, it is shared with it.
    fn told(&self, lease: Lease) -> Told {
        let subnet = lease.subnet;
        let told = self.told.get(&subnet).map(|told| &told.attrs);
        let known = told
            .or_else(|| self.held.get(&subnet))
            .or_else(|| self.peers.list.get(subnet));
        let attrs = match known {
            Some(known) if **known == lease.attrs => Arc::clone(known),
            Some(_) | None => Arc::new(lease.attrs),
        };
        Told {
            attrs,
            created: lease.created,
            is_reserved: lease.expiration == Expiration::Never,
        }
    }

    /// Gives up the peers held back from a mass removal.
    pub fn release_held(&mut self) -> PeerChanges {
        self.held.clear();
        self.settle()
    }

    /// Changes our own lease; peers are checked against it anew.
    pub fn set_own(&mut self, own: &Lease) -> PeerChanges {
        self.own = own.subnet;
        self.own_attrs = own.attrs.clone();
        self.settle()
    }

    /// Changes the config; peers are checked against it anew.
    pub fn set_config(&mut self, config: Arc<NetworkConfig>) -> PeerChanges {
        self.config = config;
        self.settle()
    }

    /// What is known of a lease, refused or not: what the store told last, or what is held.
    pub fn known(&self, subnet: Subnet) -> Option<Lease> {
        let told = self.told.get(&subnet).map(|told| (&told.attrs, told.created));
        let held = || self.held.get(&subnet).map(|attrs| (attrs, None));
        told.or_else(held).map(|(attrs, created)| Lease {
            subnet,
            attrs: LeaseAttrs::clone(attrs),
            expiration: Expiration::Never,
            created,
        })
    }

    /// The leases that stand refused, and why.
    pub fn rejects(&self) -> impl ExactSizeIterator<Item = (Subnet, Reject)> {
        self.rejected.iter().map(|(subnet, reject)| (*subnet, *reject))
    }

    /// Holds the peers that are gone if `suspicious` says so of their number, and that of all peers.
    fn hold_removed(&mut self, suspicious: impl Fn(usize, usize) -> bool) {
        self.held.retain(|subnet, _| !self.told.contains_key(subnet));
        let known = |subnet: &Subnet| self.told.contains_key(subnet) || self.held.contains_key(subnet);
        let gone: Vec<_> = self.peers.iter().filter(|(subnet, _)| !known(subnet)).collect();
        if suspicious(gone.len(), self.peers.len()) {
            self.held.extend(
                gone.into_iter()
                    .map(|(subnet, attrs)| (subnet, Arc::clone(attrs))),
            );
        }
    }

    /// Recomputes peers and refusals, and tells the difference.
    fn settle(&mut self) -> PeerChanges {
        let mut peers = Vec::with_capacity(self.told.len() + self.held.len());
        let mut taken = Taken::default();
        self.rejected.clear();
        let told = self.told.iter();
        let mut claims: Vec<_> = told.filter(|(_, told)| !self.waits_for_us(told)).collect();
        claims.sort_by_cached_key(|(subnet, told)| self.rank(**subnet, told.created));
        let claims = claims.into_iter().map(|(subnet, told)| (subnet, &told.attrs));
        // What is held has the last word only: a live lease beats a remembered one.
        for (subnet, attrs) in claims.chain(&self.held) {
            // Whoever holds it by the store; if it is a stranger, we are about to move.
            if *subnet == self.own {
                continue;
            }
            let verdict = self.check(*subnet, attrs).and_then(|()| {
                if taken.overlaps(*subnet) {
                    return Err(Reject::OverlapsPeer);
                }
                Ok(())
            });
            match verdict {
                Ok(()) => {
                    taken.insert(*subnet);
                    peers.push((*subnet, Arc::clone(attrs)));
                }
                Err(reject) => {
                    self.rejected.insert(*subnet, reject);
                }
            }
        }
        let peers = BySubnet::new(peers);
        let changes = difference(&self.peers.list, &peers);
        self.peers.list = peers;
        self.peers.held = self.held.len();
        self.peers.rejected = self.refused();
        changes
    }

    fn refused(&self) -> BTreeMap<&'static str, u64> {
        let mut counts = BTreeMap::new();
        for reject in self.rejected.values() {
            *counts.entry(reject.name()).or_default() += 1;
        }
        if self.over_cap > 0 {
            counts.insert(Reject::TableFull.name(), self.over_cap);
        }
        counts
    }

    /// Sorts the better claim first.
    fn rank(&self, subnet: Subnet, created: Option<u64>) -> impl Ord + use<> {
        let v4_len = subnet.ipv4().map(Ipv4Prefix::len);
        let v6_len = subnet.v6.map(Ipv6Prefix::len);
        let v4_fits = self
            .config
            .v4
            .is_none_or(|range| v4_len == Some(range.subnet_len()));
        let v6_fits = v6_len.is_none_or(|len| self.config.v6.is_some_and(|range| len == range.subnet_len()));
        let usual = v4_fits && v6_fits;
        let age = created.unwrap_or(u64::MAX);
        (!usual, age, std::cmp::Reverse((v4_len, v6_len)), subnet)
    }

    fn check(&self, subnet: Subnet, attrs: &LeaseAttrs) -> Result<(), Reject> {
        if let Some(v4) = subnet.ipv4() {
            let range = self.config.v4.ok_or(Reject::OutsideNetwork)?;
            if !range.network.covers(v4) || (self.is_shared_v4() && !range.holds(v4)) {
                return Err(Reject::OutsideNetwork);
            }
        }
        if let Some(v6) = subnet.v6 {
            let range = self.config.v6.ok_or(Reject::OutsideNetwork)?;
            if !range.network.covers(v6) || (self.is_shared_v6() && !range.holds(v6)) {
                return Err(Reject::OutsideNetwork);
            }
        }
        if subnet.overlaps(self.own) {
            return Err(Reject::OverlapsOwn);
        }
        if attrs.public_ip.is_unspecified() {
            let addr = attrs.public_ipv6.ok_or(Reject::PublicIpInvalid)?;
            self.check_public(addr.into())?;
        } else {
            self.check_public(attrs.public_ip.into())?;
            if let Some(addr) = attrs.public_ipv6 {
                self.check_public(addr.into())?;
            }
        }
        Ok(())
    }

    /// Whether it is a reservation for this node, which has not taken it: it names an address and no backend.
    fn waits_for_us(&self, told: &Told) -> bool {
        told.is_reserved && told.attrs.backend_type.is_empty() && told.attrs.same_node(&self.own_attrs)
    }

    /// Whether nodes have their own addresses in the network, beside what is leased, as this one has.
    fn is_shared_v4(&self) -> bool {
        self.config
            .v4
            .is_some_and(|range| range.spares(self.own_attrs.public_ip))
    }

    /// The same for IPv6.
    fn is_shared_v6(&self) -> bool {
        let own = self.own_attrs.public_ipv6;
        self.config
            .v6
            .zip(own)
            .is_some_and(|(range, own)| range.spares(own))
    }

    fn check_public(&self, addr: IpAddr) -> Result<(), Reject> {
        let (unicast, ours, inside) = match addr {
            IpAddr::V4(addr) => {
                let range = self.config.v4.filter(|range| range.network.contains(addr));
                let inside = range.is_some_and(|range| !(self.is_shared_v4() && range.spares(addr)));
                (is_unicast_v4(addr), addr == self.own_attrs.public_ip, inside)
            }
            IpAddr::V6(addr) => {
                let range = self.config.v6.filter(|range| range.network.contains(addr));
                let inside = range.is_some_and(|range| !(self.is_shared_v6() && range.spares(addr)));
                let ours = Some(addr) == self.own_attrs.public_ipv6;
                (is_unicast_v6(addr), ours, inside)
            }
        };
        match (unicast, ours, inside) {
            (false, ..) => Err(Reject::PublicIpInvalid),
            (true, true, _) => Err(Reject::PublicIpOurs),
            (true, false, true) => Err(Reject::PublicIpInOverlay),
            (true, false, false) => Ok(()),
        }
    }
}

/// RFC 1122 §3.2.1.3: 0/8 and 127/8 never appear on a wire, nor can the limited broadcast or a group be a peer.
/// Whether a packet can be sent to that address from another machine.
pub fn is_unicast(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => is_unicast_v4(addr),
        IpAddr::V6(addr) => is_unicast_v6(addr),
    }
}

fn is_unicast_v4(addr: Ipv4Addr) -> bool {
    addr.octets()[0] != 0 && !addr.is_loopback() && !addr.is_multicast() && !addr.is_broadcast()
}

/// A link-local address means nothing without its interface; a mapped one would leave as IPv4.
fn is_unicast_v6(addr: Ipv6Addr) -> bool {
    !addr.is_unspecified()
        && !addr.is_loopback()
        && !addr.is_multicast()
        && !addr.is_unicast_link_local()
        && addr.to_ipv4_mapped().is_none()
}

fn difference(before: &BySubnet<Arc<LeaseAttrs>>, after: &BySubnet<Arc<LeaseAttrs>>) -> PeerChanges {
    let mut changes = PeerChanges::default();
    for (subnet, attrs) in after.iter() {
        match before.get(subnet) {
            None => changes.added.push(subnet),
            Some(old) if old != attrs => changes.changed.push(subnet),
            Some(_) => {}
        }
    }
    let gone = before.iter().filter(|(subnet, _)| after.get(*subnet).is_none());
    changes.removed.extend(gone.map(|(subnet, _)| subnet));
    changes
}

/// The address ranges taken, by first address; they never overlap.
#[derive(Default)]
struct Taken {
    v4: BTreeSet<(u32, u32)>,
    v6: BTreeSet<(u128, u128)>,
}

impl Taken {
    fn overlaps(&self, subnet: Subnet) -> bool {
        subnet
            .ipv4()
            .is_some_and(|prefix| touches(&self.v4, range_v4(prefix), u32::MAX))
            || subnet
                .v6
                .is_some_and(|prefix| touches(&self.v6, (prefix.first(), prefix.last()), u128::MAX))
    }

    fn insert(&mut self, subnet: Subnet) {
        if let Some(v4) = subnet.ipv4() {
            self.v4.insert(range_v4(v4));
        }
        if let Some(v6) = subnet.v6 {
            self.v6.insert((v6.first(), v6.last()));
        }
    }
}

fn range_v4(prefix: Ipv4Prefix) -> (u32, u32) {
    let first = prefix.addr().to_bits();
    (
        first,
        first | u32::MAX.checked_shr(prefix.len().into()).unwrap_or(0),
    )
}

/// Whether any of `ranges` has a number in common with that from `first` to `last`.
fn touches<N: Ord + Copy>(ranges: &BTreeSet<(N, N)>, (first, last): (N, N), most: N) -> bool {
    // The range that begins last before the other ends is the only one that can reach into it.
    let before_end = ranges.range(..=(last, most)).next_back();
    before_end.is_some_and(|&(_, end)| end >= first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONFIG: &str = r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;

    fn table() -> PeerTable {
        let config = Arc::new(NetworkConfig::parse(CONFIG).unwrap());
        PeerTable::new(config, &lease("10.0.1.0-24", "192.0.2.1"))
    }

    fn lease(key: &str, ip: &str) -> Lease {
        Lease {
            subnet: key.parse().unwrap(),
            attrs: LeaseAttrs::from_json(format!("{{\"PublicIP\":\"{ip}\"}}").as_bytes()).unwrap(),
            expiration: Expiration::Never,
            created: None,
        }
    }

    fn added(lease: Lease) -> LeaseUpdate {
        LeaseUpdate::Events(vec![LeaseEvent::Added(lease)])
    }

    fn names(table: &PeerTable) -> Vec<String> {
        table
            .peers()
            .iter()
            .map(|(subnet, _)| subnet.to_string())
            .collect()
    }

    #[test]
    fn a_snapshot_tells_additions_changes_and_removals() {
        let mut table = table();
        let three = [
            lease("10.0.2.0-24", "192.0.2.2"),
            lease("10.0.3.0-24", "192.0.2.3"),
            lease("10.0.4.0-24", "192.0.2.4"),
        ];
        assert_eq!(table.apply(LeaseUpdate::Snapshot(three.to_vec())).added.len(), 3);
        let changes = table.apply(LeaseUpdate::Snapshot(vec![
            three[0].clone(),
            lease("10.0.3.0-24", "192.0.2.33"),
            lease("10.0.5.0-24", "192.0.2.5"),
        ]));
        let subnet = |key: &str| vec![key.parse::<Subnet>().unwrap()];
        assert_eq!(changes.added, subnet("10.0.5.0-24"));
        assert_eq!(changes.changed, subnet("10.0.3.0-24"));
        assert_eq!(changes.removed, subnet("10.0.4.0-24"));
    }

    #[test]
    fn our_own_lease_is_never_a_peer_whoever_holds_it() {
        let mut table = table();
        assert!(table.apply(added(lease("10.0.1.0-24", "192.0.2.1"))).is_empty());
        assert!(table.apply(added(lease("10.0.1.0-24", "192.0.2.9"))).is_empty());
        assert!(table.peers().rejected().is_empty());
    }

    #[test]
    fn who_took_our_subnet_is_a_peer_once_we_have_moved() {
        let mut table = table();
        table.apply(added(lease("10.0.1.0-24", "192.0.2.9")));
        let changes = table.set_own(&lease("10.0.7.0-24", "192.0.2.1"));
        assert_eq!(changes.added, ["10.0.1.0-24".parse().unwrap()]);
    }

    #[test]
    fn hostile_leases_are_refused_by_reason_and_touch_nobody() {
        let mut table = table();
        table.apply(added(lease("10.0.2.0-24", "192.0.2.2")));
        for (key, ip, reason) in [
            ("0.0.0.0-0", "192.0.2.3", "outside_network"),
            ("0.0.0.0-1", "192.0.2.3", "outside_network"),
            ("10.0.0.0-8", "192.0.2.3", "outside_network"),
            ("192.0.2.0-24", "192.0.2.3", "outside_network"),
            ("10.0.3.0-24&fd01::-64", "192.0.2.3", "outside_network"),
            ("10.0.0.0-16", "192.0.2.3", "overlaps_own"),
            ("10.0.1.0-25", "192.0.2.3", "overlaps_own"),
            ("10.0.1.0-24&fd00::-64", "192.0.2.3", "overlaps_own"),
            ("10.0.2.0-23", "192.0.2.3", "overlaps_peer"),
            ("10.0.2.128-25", "192.0.2.3", "overlaps_peer"),
            ("10.0.3.0-24", "0.0.0.0", "public_ip_invalid"),
            ("10.0.3.0-24", "0.1.2.3", "public_ip_invalid"),
            ("10.0.3.0-24", "127.0.0.1", "public_ip_invalid"),
            ("10.0.3.0-24", "224.0.0.1", "public_ip_invalid"),
            ("10.0.3.0-24", "255.255.255.255", "public_ip_invalid"),
            ("10.0.3.0-24", "10.0.9.9", "public_ip_in_overlay"),
        ] {
            assert!(table.apply(added(lease(key, ip))).is_empty(), "{key} {ip}");
            assert_eq!(
                *table.peers().rejected(),
                BTreeMap::from([(reason, 1)]),
                "{key} {ip}"
            );
            let gone = LeaseUpdate::Events(vec![LeaseEvent::Removed(key.parse().unwrap())]);
            assert!(table.apply(gone).is_empty(), "{key} {ip}");
        }
        assert_eq!(names(&table), ["10.0.2.0-24"]);
    }

    #[test]
    fn what_has_our_address_is_refused_or_waits_for_us() {
        let mut table = table();
        let mut other = lease("10.0.3.0-24", "192.0.2.1");
        other.attrs.backend_type = "udp".to_owned();
        assert!(table.apply(added(other)).is_empty());
        // Another host's may have an end and no backend, as old programs write it.
        let mut old = lease("10.0.7.0-24", "192.0.2.1");
        old.expiration = Expiration::At(std::time::SystemTime::UNIX_EPOCH);
        assert!(table.apply(added(old)).is_empty());
        let refused = BTreeMap::from([("public_ip_ours", 2)]);
        assert_eq!(*table.peers().rejected(), refused);
        // As `kersey reserve` writes it.
        assert!(table.apply(added(lease("10.0.4.0-24", "192.0.2.1"))).is_empty());
        assert_eq!(*table.peers().rejected(), refused);
        assert!(names(&table).is_empty());
        // It is in nobody's way.
        assert_eq!(
            table.apply(added(lease("10.0.4.0-23", "192.0.2.2"))).added.len(),
            1
        );
    }

    #[test]
    fn nodes_may_have_their_own_addresses_in_a_part_that_is_not_leased() {
        let shared = r#"{"Network":"10.0.0.0/8","SubnetMin":"10.64.0.0","SubnetMax":"10.64.255.0"}"#;
        let whole = r#"{"Network":"10.0.0.0/8"}"#;
        for (config, own, key, ip, reason) in [
            (shared, "10.1.0.1", "10.64.2.0-24", "10.1.0.2", None),
            (shared, "10.1.0.1", "10.64.2.0-24", "10.200.0.2", None),
            (shared, "10.1.0.1", "10.64.2.0-24", "192.0.2.2", None),
            // Our own, another's, and one that nobody has yet.
            (
                shared,
                "10.1.0.1",
                "10.64.2.0-24",
                "10.64.1.7",
                Some("public_ip_in_overlay"),
            ),
            (
                shared,
                "10.1.0.1",
                "10.64.2.0-24",
                "10.64.2.7",
                Some("public_ip_in_overlay"),
            ),
            (
                shared,
                "10.1.0.1",
                "10.64.2.0-24",
                "10.64.255.255",
                Some("public_ip_in_overlay"),
            ),
            // Nobody leases what is nodes', or machines'.
            (
                shared,
                "10.1.0.1",
                "10.1.9.0-24",
                "192.0.2.2",
                Some("outside_network"),
            ),
            (
                shared,
                "10.1.0.1",
                "10.64.0.0-15",
                "192.0.2.2",
                Some("outside_network"),
            ),
            (
                shared,
                "10.1.0.1",
                "10.64.2.0-25",
                "192.0.2.2",
                Some("outside_network"),
            ),
            // Where our own address is elsewhere, or anything may be leased, no node's is in the network.
            (
                shared,
                "192.0.2.1",
                "10.64.2.0-24",
                "10.1.0.2",
                Some("public_ip_in_overlay"),
            ),
            (
                whole,
                "10.1.0.1",
                "10.64.2.0-24",
                "10.1.0.2",
                Some("public_ip_in_overlay"),
            ),
            (shared, "192.0.2.1", "10.1.9.0-24", "192.0.2.2", None),
        ] {
            let config = Arc::new(NetworkConfig::parse(config).unwrap());
            let mut table = PeerTable::new(config, &lease("10.64.1.0-24", own));
            table.apply(added(lease(key, ip)));
            let refused = table.peers().rejected().keys().next().copied();
            assert_eq!(refused, reason, "{own} {key} {ip}");
            assert_eq!(
                table.peers().len(),
                usize::from(reason.is_none()),
                "{own} {key} {ip}"
            );
        }
    }

    #[test]
    fn an_ipv6_only_peer_is_reached_by_its_ipv6_address() {
        let config = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
        let six = |key: &str, addr: &str| Lease {
            subnet: key.parse().unwrap(),
            attrs: LeaseAttrs::from_json(format!("{{\"PublicIPv6\":\"{addr}\"}}").as_bytes()).unwrap(),
            expiration: Expiration::Never,
            created: None,
        };
        let own = six("0.0.0.0-0&fd00:0:0:1::-64", "2001:db8::1");
        let mut table = PeerTable::new(Arc::new(NetworkConfig::parse(config).unwrap()), &own);
        table.apply(added(six("0.0.0.0-0&fd00:0:0:2::-64", "2001:db8::2")));
        table.apply(added(six("0.0.0.0-0&fd00:0:0:3::-64", "2001:db8::3")));
        assert_eq!(table.peers().len(), 2);
        for bad in [
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "::ffff:192.0.2.1",
            "fd00::9",
            "2001:db8::1",
        ] {
            assert!(
                table
                    .apply(added(six("0.0.0.0-0&fd00:0:0:4::-64", bad)))
                    .is_empty(),
                "{bad}"
            );
        }
    }

    /// F15: the first owner keeps its subnet, in whatever order the claims are told.
    #[test]
    fn of_two_claims_the_older_one_holds_whatever_the_order() {
        let at = |key: &str, ip: &str, created| Lease {
            created: Some(created),
            ..lease(key, ip)
        };
        let cases = [
            // The same IPv4 subnet under a second name, the same IPv6 subnet, a wider claim, narrower ones.
            ("10.0.2.0-24", "10.0.2.0-24&fd00:0:0:2::-64"),
            ("10.0.2.0-24&fd00:0:0:2::-64", "10.0.3.0-24&fd00:0:0:2::-64"),
            ("10.0.3.0-24&fd00:0:0:2::-64", "10.0.2.0-24&fd00:0:0:2::-64"),
            ("10.0.2.0-24", "10.0.2.0-23"),
            ("10.0.2.0-24", "10.0.2.0-25"),
            ("10.0.2.0-24", "10.0.2.128-25"),
            // Neither has the usual length.
            ("10.0.2.0-23", "10.0.2.0-25"),
            ("10.0.2.0-25", "10.0.2.0-23"),
        ];
        for (first, second) in cases {
            let (old, new) = (at(first, "192.0.2.2", 10), at(second, "192.0.2.3", 20));
            for told in [[old.clone(), new.clone()], [new, old]] {
                let mut table = table();
                for lease in told {
                    table.apply(added(lease));
                }
                assert_eq!(names(&table), [first], "{first} before {second}");
                assert_eq!(*table.peers().rejected(), BTreeMap::from([("overlaps_peer", 1)]));
            }
        }
        // A wide claim that came before the nodes does not keep them out.
        let mut table = table();
        table.apply(added(at("10.0.128.0-17", "192.0.2.9", 1)));
        table.apply(added(at("10.0.200.0-24", "192.0.2.2", 10)));
        assert_eq!(names(&table), ["10.0.200.0-24"]);
    }

    #[test]
    fn a_blocked_lease_comes_in_when_the_way_is_free() {
        let mut table = table();
        table.apply(added(lease("10.0.2.0-24", "192.0.2.2")));
        table.apply(added(lease("10.0.2.0-23", "192.0.2.3")));
        let gone = LeaseUpdate::Events(vec![LeaseEvent::Removed("10.0.2.0-24".parse().unwrap())]);
        let changes = table.apply(gone);
        assert_eq!((changes.added.len(), changes.removed.len()), (1, 1));
        assert_eq!(names(&table), ["10.0.2.0-23"]);
    }

    #[test]
    fn whoever_is_missing_from_a_list_that_lacks_us_as_well_is_held() {
        let mut table = table();
        let leases = [
            lease("10.0.2.0-24", "192.0.2.2"),
            lease("10.0.3.0-24", "192.0.2.3"),
        ];
        table.apply(LeaseUpdate::Snapshot(leases.to_vec()));
        let one_came_back = LeaseUpdate::Snapshot(vec![leases[0].clone()]);
        assert!(table.apply_of_forgetful(one_came_back.clone()).is_empty());
        assert_eq!((table.peers().len(), table.peers().held()), (2, 1));
        assert!(table.apply(added(leases[1].clone())).is_empty());
        assert_eq!((table.peers().len(), table.peers().held()), (2, 0));
        assert_eq!(table.apply(one_came_back).removed.len(), 1);
    }

    #[test]
    fn a_mass_removal_is_held_until_released() {
        let mut table = table();
        let leases: Vec<_> = (2..10)
            .map(|i| lease(&format!("10.0.{i}.0-24"), &format!("192.0.2.{i}")))
            .collect();
        table.apply(LeaseUpdate::Snapshot(leases.clone()));
        assert!(table.apply(LeaseUpdate::Snapshot(vec![])).is_empty());
        assert_eq!((table.peers().len(), table.peers().held()), (8, 8));
        let published = table.peers().clone();
        assert!(table.apply(added(leases[0].clone())).is_empty());
        assert_eq!(table.peers().held(), 7);
        let mut pairs = published.iter().zip(table.peers().iter());
        let shared = pairs.all(|(before, now)| Arc::ptr_eq(before.1, now.1));
        drop(pairs);
        assert!(shared, "attributes that came back are there twice");
        assert_eq!(table.release_held().removed.len(), 7);
        assert_eq!(names(&table), ["10.0.2.0-24"]);
    }

    #[test]
    fn a_hundred_thousand_leases_are_enough() {
        let config = Arc::new(NetworkConfig::parse(r#"{"Network":"10.0.0.0/8","SubnetLen":28}"#).unwrap());
        let own = lease("10.255.255.0-28", "192.0.2.1");
        let mut table = PeerTable::new(config, &own);
        let attrs = lease("10.0.0.0-28", "192.0.2.2").attrs;
        let mut leases: Vec<_> = (0..100_500_u32)
            .map(|i| Lease {
                subnet: Subnet {
                    v4: Ipv4Prefix::new((0x0a00_0000 + i * 16).into(), 28).unwrap(),
                    v6: None,
                },
                attrs: attrs.clone(),
                expiration: Expiration::Never,
                created: None,
            })
            .collect();
        let again = lease("10.0.0.0-28", "192.0.2.3");
        leases.push(again.clone());
        table.apply(LeaseUpdate::Snapshot(leases));
        assert_eq!(table.peers().len(), MAX_LEASES);
        assert_eq!(table.peers().get(again.subnet), Some(&again.attrs));
        assert_eq!(*table.peers().rejected(), BTreeMap::from([("table_full", 500)]));
    }

    #[test]
    fn of_too_many_leases_those_stay_that_were_known_and_then_the_older_ones() {
        let config = Arc::new(NetworkConfig::parse(r#"{"Network":"10.0.0.0/8","SubnetLen":28}"#).unwrap());
        let own = lease("10.255.255.0-28", "192.0.2.1");
        let at = |first: u32, nth: u32, created| Lease {
            subnet: Subnet {
                v4: Ipv4Prefix::new((first + nth * 16).into(), 28).unwrap(),
                v6: None,
            },
            created: Some(created),
            ..lease("10.0.0.0-28", "192.0.2.2")
        };
        let mut table = PeerTable::new(config, &own);
        let known: Vec<_> = (0..3).map(|nth| at(0x0afe_0000, nth, 9)).collect();
        assert_eq!(table.apply(LeaseUpdate::Snapshot(known.clone())).added.len(), 3);
        // All of them are lower than those that are known.
        let crowd = (0..100_500).map(|nth| at(0x0a00_0000, nth, 8));
        let older = at(0x0afd_0000, 0, 7);
        let all = crowd.chain([older.clone()]).chain(known.clone()).collect();
        let changes = table.apply(LeaseUpdate::Snapshot(all));
        assert_eq!((changes.removed.as_slice(), table.peers().held()), (&[][..], 0));
        assert_eq!(table.peers().len(), MAX_LEASES);
        assert_eq!(*table.peers().rejected(), BTreeMap::from([("table_full", 504)]));
        for kept in known.iter().chain([&older]) {
            assert!(table.peers().get(kept.subnet).is_some(), "{}", kept.subnet);
        }
    }

    fn any_lease() -> impl Strategy<Value = Lease> {
        let ip = prop_oneof![
            8 => (2_u8..20).prop_map(|i| Ipv4Addr::new(192, 0, 2, i)),
            1 => any::<u32>().prop_map(Ipv4Addr::from),
        ];
        (0_u8..12, 20_u8..=26, ip).prop_map(|(third, len, ip)| {
            let mut lease = lease("10.0.1.0-24", &ip.to_string());
            lease.subnet.v4 = Ipv4Prefix::new(Ipv4Addr::new(10, 0, third, 0), len).unwrap();
            lease
        })
    }

    fn any_update() -> impl Strategy<Value = LeaseUpdate> {
        let event = prop_oneof![
            3 => any_lease().prop_map(LeaseEvent::Added),
            1 => any_lease().prop_map(|lease| LeaseEvent::Removed(lease.subnet)),
        ];
        prop_oneof![
            1 => prop::collection::vec(any_lease(), 0..10).prop_map(LeaseUpdate::Snapshot),
            4 => prop::collection::vec(event, 0..5).prop_map(LeaseUpdate::Events),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_table_is_a_function_of_the_leases(updates in prop::collection::vec(any_update(), 0..20)) {
            let mut table = table();
            let mut model: BTreeMap<Subnet, Lease> = BTreeMap::new();
            for update in &updates {
                let before: BTreeMap<Subnet, Arc<LeaseAttrs>> =
                    table.peers().iter().map(|(subnet, attrs)| (subnet, attrs.clone())).collect();
                let changes = table.apply(update.clone());
                match update {
                    LeaseUpdate::Snapshot(leases) => {
                        model = leases.iter().map(|lease| (lease.subnet, lease.clone())).collect();
                    }
                    LeaseUpdate::Events(events) => {
                        for event in events {
                            match event {
                                LeaseEvent::Added(lease) => {
                                    model.insert(lease.subnet, lease.clone());
                                }
                                LeaseEvent::Removed(subnet) => {
                                    model.remove(subnet);
                                }
                            }
                        }
                    }
                }
                // The changes lead from the old table to the new one.
                let mut replayed = before.clone();
                for subnet in &changes.removed {
                    prop_assert!(replayed.remove(subnet).is_some());
                }
                for subnet in changes.added.iter().chain(&changes.changed) {
                    replayed.insert(*subnet, table.peers().list().get(*subnet).unwrap().clone());
                }
                let now: BTreeMap<_, _> = table.peers().iter().map(|(s, a)| (s, a.clone())).collect();
                prop_assert_eq!(&replayed, &now);
                // No two peers overlap, none overlaps us.
                let own: Subnet = "10.0.1.0-24".parse().unwrap();
                for (i, (a, _)) in table.peers().iter().enumerate() {
                    prop_assert!(!a.overlaps(own));
                    prop_assert!(table.peers().iter().skip(i + 1).all(|(b, _)| !a.overlaps(b)));
                }
            }
            // Whatever the way, the same leases make the same table.
            table.release_held();
            let mut fresh = self::table();
            fresh.apply(LeaseUpdate::Snapshot(model.into_values().rev().collect()));
            prop_assert!(table.peers().iter().eq(fresh.peers().iter()));
        }

        /// F6: what was not observed to go is not removed, unless a better claim overlaps it.
        #[test]
        fn only_an_observed_removal_removes(updates in prop::collection::vec(any_update(), 0..20)) {
            let mut table = table();
            for update in &updates {
                let before: Vec<_> = table.peers().iter().map(|(subnet, _)| subnet).collect();
                let changes = table.apply(update.clone());
                prop_assert!(changes.removed.iter().all(|subnet| before.contains(subnet)));
                for subnet in changes.removed {
                    let observed = match update {
                        LeaseUpdate::Snapshot(leases) => leases.iter().all(|lease| lease.subnet != subnet),
                        LeaseUpdate::Events(events) => events.iter().any(|event| match event {
                            LeaseEvent::Removed(gone) => *gone == subnet,
                            LeaseEvent::Added(_) => false,
                        }),
                    };
                    prop_assert!(observed || table.rejects().any(|(rejected, _)| rejected == subnet));
                }
            }
        }
    }
}
