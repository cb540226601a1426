//! SRv6 packets made by hand: by a stranger, and by a peer that lies.
//!
//! ```text
//!   node 1 ⋯ overlay ⋯ node 2, under attack        node 3, another peer        node 4 on the same wire, without a lease
//!      |  probe, all the while  |
//! ```
//!
//! A peer's own lies are sent from node 1's source address, while its daemon goes on. Every single packet is judged: which counter rises
//! and by how much, what reaches node 2's device, and what leaves node 2 for elsewhere.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use kersey::lab::netns::Namespace;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::probe::Probe;
use kersey::wire::ip::{IpHeader, V4_LEN, V6_LEN, protocol};
use kersey::wire::srv6::{OuterHeader, next_header};
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::NamedTempFile;

use crate::mixed::network;
use crate::overlay::{Blueprint, DEVICE, Overlay, READY, figure, wait_for, within};
use crate::support::pod::Pod;
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

use self::cases::{Case, Taker};
use self::hmac::{SECRET, key};
use self::packets::{BY_HAND, outer, sid, srh, udp_v4};

mod cases;
mod hmac;
pub(crate) mod packets;

/// Of each packet that must be refused.
const COPIES: u64 = 3;

#[test]
fn a_peer_that_lies_gets_nothing_in_and_each_lie_is_counted() {
    if !require_etcd("a_peer_that_lies_gets_nothing_in_and_each_lie_is_counted") {
        return;
    }
    let mut siege = Siege::start("s6lies", &json!({}), 1);
    let lies = siege.lies();
    figure("srv6 liar: different packets", lies.len());
    assert!(lies.len() >= 60);
    let raw = siege.raw(1);
    for lie in &lies {
        siege.refused(&lie.name, &raw, lie.reason, &lie.packet);
    }
    siege.lift("srv6 liar");
}

/// The same where packets come by a TUN device. What has no hops left never gets there: the kernel answers it itself.
#[test]
fn without_raw_sockets_each_lie_is_counted_too() {
    if !require_etcd("without_raw_sockets_each_lie_is_counted_too") {
        return;
    }
    let mut siege = Siege::with("s6tunlies", &json!({}), 1, &["--srv6-io=tun"]);
    let mut lies = siege.lies();
    lies.retain(|lie| lie.packet[7] > 1);
    assert!(lies.len() >= 60);
    let raw = siege.raw(1);
    for lie in &lies {
        siege.refused(&lie.name, &raw, lie.reason, &lie.packet);
    }
    siege.lift("srv6 liar, TUN");
}

#[test]
fn a_stranger_gets_nothing_in() {
    if !require_etcd("a_stranger_gets_nothing_in") {
        return;
    }
    let mut siege = Siege::start("s6strange", &json!({}), 1);
    let raw = siege.raw(4);
    // Its own address, and one beside ours that nobody has a lease for.
    let stranger = siege.overlay.lab.nodes[3].v6;
    let honest = siege.legal().into_iter();
    let honest = honest.map(|(name, packet, _)| (name, Taker::Queue, "", packet));
    let lies = siege.lies().into_iter();
    let lies = lies.map(
        |Case {
             name,
             taker,
             reason,
             packet,
         }| (name, taker, reason, packet),
    );
    for (name, taker, reason, mut packet) in honest.chain(lies) {
        packet[8..24].copy_from_slice(&stranger.octets());
        let reason = match (taker, reason) {
            (Taker::Queue, _) => "unknown_peer",
            (Taker::Endpoint, "unknown_sid") => "unknown_sid",
            (Taker::Endpoint, _) => "outside_domain",
        };
        siege.refused(&format!("a stranger's {name}"), &raw, reason, &packet);
    }
    // In the block of locators, which is the domain, but nobody's.
    for nobody in [sid(9, "1"), sid(2, "1"), sid(2, "e")] {
        let inner = udp_v4(siege.overlay.pod_v4(1), siege.overlay.pod_v4(2));
        let packet = outer(nobody, sid(2, "1"), next_header::IPV4, &inner);
        siege.refused(&format!("from {nobody}"), &raw, "unknown_peer", &packet);
    }
    // The kernel itself says that it does not know a routing header; Kersey says nothing to strangers.
    let told = siege.wire_out.iter().filter(|packet| {
        let (header, message) = OuterHeader::parse(packet).unwrap();
        let pointer = message
            .get(4..8)
            .map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
        header.destination == stranger
            && !matches!((message.first(), pointer), (Some(4), Some(42)) | (Some(128..), _))
    });
    assert_eq!(told.count(), 0);
    siege.lift("srv6 stranger");
}

#[test]
fn what_is_unusual_but_legal_arrives_as_it_was_sent() {
    if !require_etcd("what_is_unusual_but_legal_arrives_as_it_was_sent") {
        return;
    }
    for queues in [1, 2] {
        let mut siege = Siege::start(&format!("s6legal{queues}"), &json!({}), queues);
        let raw = siege.raw(1);
        for (name, packet, arrives) in siege.legal() {
            siege.accepted(&name, &raw, &packet, &arrives);
        }
        siege.lift("srv6 legal");
    }
}

#[test]
fn with_two_queues_short_packets_are_counted_all_the_same() {
    if !require_etcd("with_two_queues_short_packets_are_counted_all_the_same") {
        return;
    }
    let mut siege = Siege::start("s6two", &json!({}), 2);
    let raw = siege.raw(1);
    for lie in siege.truncations() {
        siege.refused(&lie.name, &raw, lie.reason, &lie.packet);
    }
    siege.lift("srv6 with two queues");
}

#[test]
fn where_an_hmac_is_required_nothing_else_gets_in() {
    if !require_etcd("where_an_hmac_is_required_nothing_else_gets_in") {
        return;
    }
    let settings = json!({ "HMAC": "require", "HMACKeyID": key().id() });
    let mut siege = Siege::start("s6hmac", &settings, 1);
    let raw = siege.raw(1);
    let (right, arrives) = siege.signed();
    siege.accepted("signed as it should be", &raw, &right, &arrives);
    let lies = siege.hmac_lies();
    assert!(lies.len() >= 8);
    for lie in &lies {
        siege.refused(&lie.name, &raw, lie.reason, &lie.packet);
    }
    siege.lift("srv6 with HMAC");
}

/// What comes by another link than the underlay's is not from the domain, whatever its source says.
#[test]
fn nothing_comes_in_by_another_link() {
    if !require_etcd("nothing_comes_in_by_another_link") {
        return;
    }
    let mut siege = Siege::start("s6link", &json!({}), 1);
    let node = siege.overlay.namespace(2);
    let pod = Pod::behind(node, &siege.overlay.status(2).node.subnets, "s6link", 1500);
    let inside = pod.ends()[1];
    let mut gateway = v6(inside.addr).unwrap().octets();
    gateway[15] = 1;
    let gateway = Ipv6Addr::from(gateway);
    let raw = raw_socket(inside.namespace);
    let to = SocketAddr::from((gateway, 0));
    let (one, two) = (siege.overlay.pod_v4(1), siege.overlay.pod_v4(2));
    let inner = udp_v4(one, two);
    let ours = sid(2, "1");
    let listed = [&srh(next_header::IPV4, 0, &[ours], &[])[..], &inner].concat();
    let onward = [
        &srh(next_header::IPV4, 1, &[sid(3, "1"), sid(2, "e")], &[])[..],
        &inner,
    ]
    .concat();
    for (name, packet) in [
        ("plain", outer(sid(1, "1"), ours, next_header::IPV4, &inner)),
        ("listed", outer(sid(1, "1"), ours, next_header::ROUTING, &listed)),
        (
            "onward",
            outer(sid(1, "1"), sid(2, "e"), next_header::ROUTING, &onward),
        ),
    ] {
        let before = siege.drops();
        for _ in 0..COPIES {
            raw.send_to(&packet, &to.into()).unwrap();
        }
        siege.wait_drops(name, &before, &[("outside_domain", COPIES)]);
    }
    siege.lift("srv6 by another link");
}

/// A list that names two nodes again and again: every packet dies of its hop limit, and nothing multiplies.
#[test]
fn a_list_that_bounces_ends_with_its_hop_limit() {
    if !require_etcd("a_list_that_bounces_ends_with_its_hop_limit") {
        return;
    }
    let mut siege = Siege::start("s6bounce", &json!({}), 1);
    let raw = siege.raw(1);
    let inner = udp_v4(siege.overlay.pod_v4(1), siege.overlay.pod_v4(2));
    let other = Sniffer::start(siege.overlay.namespace(3), INTERFACE);
    for (hop_limit, entries) in [(1, 40), (2, 40), (7, 40), (30, 60)] {
        // Visited from the end of the list on: 3, 2, 3, 2, …
        let list: Vec<_> = (0..entries).map(|nth| sid(2 + nth % 2, "e")).collect();
        let payload = [&srh(next_header::IPV4, entries, &list, &[])[..], &inner].concat();
        let mut packet = outer(sid(1, "1"), sid(2, "e"), next_header::ROUTING, &payload);
        packet[7] = hop_limit;
        let before = [2, 3].map(|nth| siege.overlay.status(nth).counters["segments_forwarded"]);
        let drops = [2, 3].map(|nth| siege.drops_at(nth));
        let _ = (siege.bounced(), other.packets());
        raw.send_to(&packet, &siege.target().into()).unwrap();
        let died = || {
            let found = [2, 3].map(|nth| siege.drops_at(nth));
            [0, 1].map(|nth| risen(&drops[nth], &found[nth]))
        };
        let limit = within(Duration::from_secs(5));
        wait_for("it ends", limit, || died().iter().any(|risen| !risen.is_empty()));
        let last = usize::from(hop_limit % 2 == 0);
        let mut expected = [BTreeMap::new(), BTreeMap::new()];
        expected[last] = BTreeMap::from([("sid_hop_limit".to_owned(), 1)]);
        assert_eq!(died(), expected, "hop limit {hop_limit}");
        let after = [2, 3].map(|nth| siege.overlay.status(nth).counters["segments_forwarded"]);
        let forwarded: u64 = after.iter().sum::<u64>() - before.iter().sum::<u64>();
        assert_eq!(forwarded, u64::from(hop_limit) - 1);
        // On the wire: once from us, and once from each that sent it on.
        let routed = |packet: &[u8]| packet.get(6) == Some(&next_header::ROUTING);
        let at_three = other.packets().into_iter();
        let from_three = at_three
            .filter(|(way, packet)| *way == Way::Out && routed(packet))
            .count();
        let from_two = siege.bounced();
        assert_eq!(
            from_two + from_three,
            usize::from(hop_limit) - 1,
            "hop limit {hop_limit}"
        );
    }
    siege.wire_out.clear();
    siege.lift("srv6 bouncing");
}

/// A running network whose second node is watched.
pub(super) struct Siege {
    /// Ends before the network does.
    probe: Probe,
    /// At node 2's device.
    device: Sniffer,
    /// At node 2's underlay.
    wire: Sniffer,
    /// What has left node 2, but for the probe.
    wire_out: Vec<Vec<u8>>,
    /// What was not as it should be: all of it is told in the end.
    wrong: Vec<String>,
    pub(super) overlay: Overlay,
    /// Pods' IPv6 addresses.
    pub(super) v6: [Ipv6Addr; 3],
    _keys: NamedTempFile,
}

impl Siege {
    fn start(tag: &str, settings: &serde_json::Value, queues: usize) -> Self {
        Self::with(tag, settings, queues, &[])
    }

    /// With further flags for node 2.
    fn with(tag: &str, settings: &serde_json::Value, queues: usize, flags: &[&str]) -> Self {
        let further = flags.iter().map(|&flag| flag.to_owned());
        let mut keys = NamedTempFile::new().unwrap();
        writeln!(keys, "{} sha256 {}", key().id(), SECRET).unwrap();
        let mut blueprint = Blueprint::new(tag, 4);
        blueprint.daemons = 3;
        blueprint.network = network(settings.clone(), true);
        blueprint.flags = vec![
            format!("--srv6-hmac-keys={}", keys.path().display()),
            format!("--queues={queues}"),
        ];
        let sids = ["4=End.DX4", "d4=End.DT4", "6=End.DT6", "ea=End.X,2001:db8:1::3"];
        let flags = sids.map(|own| {
            let (function, behavior) = own.split_once('=').unwrap();
            format!("--srv6-sid={}={behavior}", sid(2, function))
        });
        let flags = flags.into_iter().chain(further).collect();
        blueprint.own_flags.insert(2, flags);
        let overlay = blueprint.start();
        let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
        wait_for("the probe runs", READY, || probe.received().0 > 100);
        Self {
            probe,
            device: Sniffer::start(overlay.namespace(2), DEVICE),
            wire: Sniffer::start(overlay.namespace(2), INTERFACE),
            wire_out: Vec::new(),
            wrong: Vec::new(),
            v6: [1, 2, 3].map(|nth| v6(overlay.pods(nth)[1].addr).unwrap()),
            overlay,
            _keys: keys,
        }
    }

    /// A socket on a node that sends whole packets.
    fn raw(&self, nth: usize) -> Socket {
        raw_socket(self.overlay.namespace(nth))
    }

    /// Node 2 on the link: whoever has no route to its locator reaches it there.
    fn target(&self) -> SocketAddr {
        (self.overlay.lab.nodes[1].v6, 0).into()
    }

    /// Sends a packet; it must raise this one counter and no other, and reach nobody.
    fn refused(&mut self, what: &str, raw: &Socket, reason: &'static str, packet: &[u8]) {
        let before = self.drops();
        for _ in 0..COPIES {
            assert_eq!(raw.send_to(packet, &self.target().into()).unwrap(), packet.len());
        }
        self.wait_drops(what, &before, &[(reason, COPIES)]);
    }

    /// Sends a packet; exactly this one must come out of the device, and nothing may be refused.
    fn accepted(&mut self, what: &str, raw: &Socket, packet: &[u8], arrives: &[u8]) {
        let before = self.drops();
        raw.send_to(packet, &self.target().into()).unwrap();
        let mut seen = Vec::new();
        wait_for(what, within(Duration::from_secs(5)), || {
            seen.extend(self.strays());
            !seen.is_empty()
        });
        assert_eq!(seen, [arrives], "{what}");
        self.wait_drops(what, &before, &[]);
    }

    /// Waits until as much was refused as was sent; then everything must have been for these reasons.
    fn wait_drops(&mut self, what: &str, before: &Drops, expected: &[(&'static str, u64)]) {
        let count: u64 = expected.iter().map(|(_, count)| count).sum();
        let limit = within(Duration::from_secs(3));
        let enough = || risen(before, &self.drops()).values().sum::<u64>() >= count;
        let counted = kersey::lab::interrupt::wait_until(limit, enough);
        let expected: BTreeMap<_, _> = expected
            .iter()
            .map(|&(reason, count)| (reason.to_owned(), count))
            .collect();
        let found = risen(before, &self.drops());
        let (let_in, went_on) = match count {
            0 => (0, 0),
            _ => (self.strays().len(), self.bounced()),
        };
        if (&found, let_in, went_on) != (&expected, 0, 0) {
            self.wrong.push(format!(
                "{what}: {found:?} and not {expected:?} (in time: {counted}), {let_in} let in, {went_on} went on"
            ));
        }
    }

    /// What came out of the device into node 2 and is not the probe's.
    fn strays(&self) -> Vec<Vec<u8>> {
        let ends = (
            IpAddr::from(self.overlay.pod_v4(1)),
            IpAddr::from(self.overlay.pod_v4(2)),
        );
        let probes = |packet: &[u8]| {
            IpHeader::parse(packet).is_ok_and(|ip| {
                (ip.addrs.src(), ip.addrs.dst()) == ends
                    && ip.protocol == protocol::UDP
                    && packet.len() > 28 + 64
                    && packet[V4_LEN..V4_LEN + 2] != BY_HAND.to_be_bytes()
            })
        };
        let packets = self.device.packets().into_iter();
        packets
            .filter(|(way, packet)| *way == Way::In && !probes(packet))
            .map(|(_, packet)| packet)
            .collect()
    }

    /// How many packets of tunnels have left node 2 that are not the probe's.
    fn bounced(&mut self) -> usize {
        let (ours, peer) = (sid(2, "1"), sid(1, "1"));
        let left = self.wire.packets().into_iter();
        let left = left.filter(|(way, packet)| *way == Way::Out && packet[0] >> 4 == 6);
        let mut tunnelled = 0;
        for (_, packet) in left {
            let (header, _) = OuterHeader::parse(&packet).unwrap();
            match header.next_header {
                next_header::IPV4 | next_header::IPV6 | next_header::ROUTING
                    if (header.source, header.destination) != (ours, peer) =>
                {
                    tunnelled += 1;
                }
                protocol::ICMPV6 if packet.len() > V6_LEN => self.wire_out.push(packet),
                _ => {}
            }
        }
        tunnelled
    }

    fn drops(&self) -> Drops {
        self.drops_at(2)
    }

    /// What a node refused in all. The outbound direction refuses what its kernel sends to groups on every device.
    fn drops_at(&self, nth: usize) -> Drops {
        let status = self.overlay.status(nth);
        let mut drops = status.drops.clone();
        let peers = status.peers.iter();
        let inbound = peers
            .filter_map(|peer| peer.drops.get("not_unicast"))
            .sum::<u64>();
        drops.insert("not_unicast".to_owned(), inbound);
        drops
    }

    /// Ends it: whoever is honest has noticed nothing.
    fn lift(mut self, what: &str) {
        assert!(self.wrong.is_empty(), "{:#?}", self.wrong);
        assert_eq!(self.strays(), Vec::<Vec<u8>>::new());
        assert_eq!(self.bounced(), 0);
        assert_eq!(self.overlay.status(2).counters["receive_overflows"], 0);
        let report = self.probe.stop().unwrap();
        let sent = report.there.sent + report.back.sent;
        figure(&format!("{what}: probe sent, lost"), (sent, report.lost()));
        figure(&format!("{what}: refused"), self.overlay.status(2).drops);
        assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
        self.overlay.assert_no_drops(1);
    }
}

/// Refused packets by reason.
type Drops = BTreeMap<String, u64>;

fn risen(before: &Drops, after: &Drops) -> Drops {
    let rise = |(reason, &count): (&String, &u64)| {
        let count = count - before.get(reason).copied().unwrap_or(0);
        (count > 0).then(|| (reason.clone(), count))
    };
    after.iter().filter_map(rise).collect()
}

fn v6(addr: IpAddr) -> Option<Ipv6Addr> {
    match addr {
        IpAddr::V6(addr) => Some(addr),
        IpAddr::V4(_) => None,
    }
}

/// A socket that sends whole IPv6 packets.
pub(crate) fn raw_socket(namespace: &Namespace) -> Socket {
    const IPPROTO_RAW: i32 = 255;
    let open = || {
        let protocol = Protocol::from(IPPROTO_RAW);
        Ok(Socket::new(Domain::IPV6, Type::RAW, Some(protocol))?)
    };
    namespace.run(open).unwrap()
}
