//! VXLAN datagrams made by hand: by a stranger, and by a peer that lies.
//!
//! ```text
//!   node 1 ⋯ overlay ⋯ node 2, under attack        node 3, another peer        node 4 on the same wire, without a lease
//!      |  probe, all the while  |
//! ```
//!
//! A peer's own lies are sent from node 1's address, while its daemon goes on. Every single datagram is judged: which counter rises, and
//! by how much, and what reaches node 2's device.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use etherparse::PacketBuilder;
use kersey::addr::MacAddr;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::traffic::probe::Probe;
use kersey::status::Status;
use kersey::wire::ip::{Ecn, IpHeader, V4_LEN, protocol, set_ecn};
use kersey::wire::vxlan::{HEADERS_LEN, LEN as VXLAN_LEN};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::overlay::{Blueprint, DEVICE, Overlay, READY, figure, wait_for, within};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

mod cases;

const PORT: u16 = 8472;
/// Of each datagram that must be refused.
const COPIES: u64 = 3;
/// Source port of what is made by hand: the probe has others.
const BY_HAND: u16 = 4000;

#[test]
fn a_vxlan_peer_that_lies_gets_nothing_in_and_each_lie_is_counted() {
    if !require_etcd("a_vxlan_peer_that_lies_gets_nothing_in_and_each_lie_is_counted") {
        return;
    }
    let mut siege = Siege::start("vxlies");
    let lies = siege.lies();
    let datagrams: usize = lies.iter().map(|lie| lie.datagrams.len()).sum();
    figure("vxlan liar: different datagrams", datagrams);
    assert!(datagrams >= 80);
    for lie in &lies {
        for (nth, datagram) in lie.datagrams.iter().enumerate() {
            let what = format!("{}, {nth}", lie.name);
            siege.refused_from_peer(&what, lie.reason, lie.tos, datagram);
        }
    }
    siege.lift("vxlan liar", 0);
}

#[test]
fn a_vxlan_stranger_gets_nothing_in() {
    if !require_etcd("a_vxlan_stranger_gets_nothing_in") {
        return;
    }
    const FLOOD: usize = 20_000;
    let mut siege = Siege::start("vxstranger");
    let honest = siege.legal().into_iter().map(|legal| legal.datagram);
    let lies = siege.lies().into_iter().flat_map(|lie| lie.datagrams);
    let all: Vec<Vec<u8>> = honest.chain(lies).collect();
    let stranger = Sender::new(&siege.overlay, 4);
    for (nth, datagram) in all.iter().enumerate() {
        siege.refused_from_stranger(&format!("datagram {nth}"), &stranger, datagram);
    }

    // Addresses nobody has a lease for, the peer's own pod among them.
    let valid = &all[0];
    let spoofed: [Ipv4Addr; 4] = [
        [8, 8, 8, 8].into(),
        [192, 0, 2, 99].into(),
        [192, 0, 2, 254].into(),
        siege.overlay.pod_v4(1),
    ];
    let raw = raw_socket(&siege.overlay, 4);
    for src in spoofed {
        let outer = outer_v4(src, BY_HAND, valid);
        let before = siege.drops();
        siege.send_raw(&raw, &outer);
        siege.wait_drops(&format!("from {src}"), &before, &[("unknown_peer", 1)]);
    }

    let before = siege.drops();
    let to = siege.target(valid);
    for nth in 0..FLOOD {
        stranger.send(0, valid, to);
        if nth % 50 == 49 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    siege.wait_drops("a flood", &before, &[("unknown_peer", FLOOD as u64)]);
    // Nothing is sent back to a stranger.
    let answers = siege.wire.packets();
    let stranger = siege.overlay.lab.nodes[3].v4;
    let answered = answers.iter().filter(|(way, packet)| {
        *way == Way::Out
            && IpHeader::parse(packet).is_ok_and(|ip| {
                // One of the addresses is the hub's, where etcd is.
                ip.protocol != protocol::TCP
                    && (ip.addrs.dst() == IpAddr::from(stranger)
                        || spoofed.map(IpAddr::from).contains(&ip.addrs.dst()))
            })
    });
    assert_eq!(answered.count(), 0);
    siege.lift("vxlan stranger", 0);
}

#[test]
fn what_is_unusual_but_legal_arrives_as_it_was_sent() {
    if !require_etcd("what_is_unusual_but_legal_arrives_as_it_was_sent") {
        return;
    }
    let mut siege = Siege::start("vxlegal");
    let legal = siege.legal();
    figure("vxlan: legal datagrams", legal.len());
    for case in &legal {
        siege.accepted(case.name, 0, &case.datagram, &case.arrives);
    }

    // RFC 6040 §4.2, a row for each codepoint outside; the congestion mark nobody would understand is among the lies.
    use Ecn::{Ce, Ect0, Ect1, NotEct};
    let inside = [NotEct, Ect1, Ect0, Ce];
    for (outer, after) in [
        (NotEct, [Some(NotEct), Some(Ect1), Some(Ect0), Some(Ce)]),
        (Ect1, [Some(NotEct), Some(Ect1), Some(Ect1), Some(Ce)]),
        (Ect0, [Some(NotEct), Some(Ect1), Some(Ect0), Some(Ce)]),
        (Ce, [None, Some(Ce), Some(Ce), Some(Ce)]),
    ] {
        for (inner, after) in inside.into_iter().zip(after) {
            for honest in [siege.v4(), siege.v6()] {
                let mut sent = honest.clone();
                set_ecn(&mut sent.inner, inner);
                let name = format!("{inner:?} in {outer:?}");
                match after {
                    None => siege.refused_from_peer(&name, "congestion_mark", outer as u32, &sent.emit()),
                    Some(after) => {
                        let mut expected = sent.inner.clone();
                        set_ecn(&mut expected, after);
                        siege.accepted(&name, outer as u32, &sent.emit(), &expected);
                    }
                }
            }
        }
    }

    // Outer headers no socket writes.
    let honest = siege.v4();
    let from = siege.overlay.lab.nodes[0].v4;
    let raw = raw_socket(&siege.overlay, 1);
    for (name, port, checksum) in [
        ("source port 0", 0, None),
        ("no outer checksum", BY_HAND, Some([0, 0])),
    ] {
        let mut outer = outer_v4(from, port, &honest.emit());
        if let Some(checksum) = checksum {
            outer[V4_LEN + 6..V4_LEN + 8].copy_from_slice(&checksum);
        }
        siege.send_raw(&raw, &outer);
        siege.wait_arrival(name, &honest.inner);
    }
    // The kernel's own UDP refuses these before the daemon sees them; a wrong sum it counts with what the socket had no room for.
    let before = siege.drops();
    let valid = outer_v4(from, BY_HAND, &honest.emit());
    let mut wrong_sum = valid.clone();
    wrong_sum[V4_LEN + 6] ^= 0x5a;
    let mut too_long = valid.clone();
    too_long[V4_LEN + 4] += 1;
    let martian = outer_v4([127, 0, 0, 1].into(), BY_HAND, &honest.emit());
    let reflected = outer_v4(siege.overlay.lab.nodes[1].v4, BY_HAND, &honest.emit());
    for outer in [wrong_sum, too_long, martian, reflected] {
        siege.send_raw(&raw, &outer);
    }
    siege.accepted("after them", 0, &honest.emit(), &honest.inner);
    siege.wait_drops("refused by the kernel", &before, &[]);
    siege.lift("vxlan legal", 1);
}

/// A running network whose second node is watched.
struct Siege {
    /// Ends before the network does.
    probe: Probe,
    /// At node 2's device.
    device: Sniffer,
    /// At node 2's underlay.
    wire: Sniffer,
    peer: Sender,
    overlay: Overlay,
    macs: [[u8; 6]; 2],
    v6: [Ipv6Addr; 3],
}

impl Siege {
    fn start(tag: &str) -> Self {
        let mut blueprint = Blueprint::new(tag, 4);
        blueprint.daemons = 3;
        blueprint.network = ClusterPlan::network("vxlan", true);
        // The daemon is besieged, not the firewall: its guard would take what claims to come from a pod.
        blueprint.flags = vec!["--firewall=off".to_owned()];
        let overlay = blueprint.start();
        let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
        wait_for("the probe runs", READY, || probe.received().0 > 100);
        Self {
            probe,
            device: Sniffer::start(overlay.namespace(2), DEVICE),
            wire: Sniffer::start(overlay.namespace(2), "eth0"),
            peer: Sender::new(&overlay, 1),
            macs: [1, 2].map(|nth| mac(&overlay, nth)),
            v6: [1, 2, 3].map(|nth| match overlay.pods(nth)[1].addr {
                IpAddr::V6(addr) => addr,
                IpAddr::V4(_) => unreachable!("IPv6 comes second"),
            }),
            overlay,
        }
    }

    /// Sends a datagram from node 1's address; it must raise this one counter, of the peer and in all, and no other.
    fn refused_from_peer(&mut self, what: &str, reason: &'static str, tos: u32, datagram: &[u8]) {
        let before = (self.drops(), self.drops_of_peer());
        let to = self.target(datagram);
        for _ in 0..COPIES {
            self.peer.send(tos, datagram, to);
        }
        self.wait_drops(what, &before.0, &[(reason, COPIES)]);
        assert_eq!(
            risen(&before.1, &self.drops_of_peer()),
            BTreeMap::from([(reason.to_owned(), COPIES)]),
            "{what}: the peer's own"
        );
    }

    /// The same from node 4, which is nobody.
    fn refused_from_stranger(&mut self, what: &str, stranger: &Sender, datagram: &[u8]) {
        let before = (self.drops(), self.drops_of_peer());
        let to = self.target(datagram);
        for _ in 0..COPIES {
            stranger.send(0, datagram, to);
        }
        self.wait_drops(what, &before.0, &[("unknown_peer", COPIES)]);
        assert_eq!(self.drops_of_peer(), before.1, "{what}");
    }

    /// Sends a datagram from node 1's address; exactly this packet must come out of the device, and nothing may be refused.
    fn accepted(&mut self, what: &str, tos: u32, datagram: &[u8], arrives: &[u8]) {
        let before = self.drops();
        self.peer.send(tos, datagram, self.target(datagram));
        self.wait_arrival(what, arrives);
        self.wait_drops(what, &before, &[]);
    }

    fn wait_arrival(&mut self, what: &str, arrives: &[u8]) {
        let mut seen = Vec::new();
        wait_for(what, within(Duration::from_secs(5)), || {
            seen.extend(self.strays());
            !seen.is_empty()
        });
        assert_eq!(seen, [arrives], "{what}");
    }

    /// Waits until as much was refused as was sent; then everything must have been for these reasons.
    fn wait_drops(&mut self, what: &str, before: &Drops, expected: &[(&'static str, u64)]) {
        let count: u64 = expected.iter().map(|(_, count)| count).sum();
        wait_for(what, within(Duration::from_secs(10)), || {
            risen(before, &self.drops()).values().sum::<u64>() >= count
        });
        let expected: BTreeMap<_, _> = expected
            .iter()
            .map(|&(reason, count)| (reason.to_owned(), count))
            .collect();
        assert_eq!(risen(before, &self.drops()), expected, "{what}");
        if count > 0 {
            assert_eq!(self.strays(), Vec::<Vec<u8>>::new(), "{what} was let in");
        }
    }

    /// What came out of the device into node 2 and is not the probe's.
    fn strays(&self) -> Vec<Vec<u8>> {
        let probes = |packet: &[u8]| {
            let ends = (
                IpAddr::from(self.overlay.pod_v4(1)),
                IpAddr::from(self.overlay.pod_v4(2)),
            );
            IpHeader::parse(packet).is_ok_and(|ip| {
                (ip.addrs.src(), ip.addrs.dst()) == ends
                    && ip.protocol == 17
                    && ip.l4 == V4_LEN
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

    /// What node 2 refused in all. The outbound direction refuses what its kernel sends to groups on every device.
    fn drops(&self) -> Drops {
        let status = self.overlay.status(2);
        let mut drops = status.drops.clone();
        let inbound = |reason: &str| {
            let peers = status.peers.iter();
            peers.filter_map(|peer| peer.drops.get(reason)).sum::<u64>()
        };
        drops.insert("not_unicast".to_owned(), inbound("not_unicast"));
        drops
    }

    /// What it refused from node 1.
    fn drops_of_peer(&self) -> Drops {
        peer_status(&self.overlay.status(2), self.overlay.lab.nodes[0].v4)
    }

    /// Node 2's port, over the family of what is inside, as leases say.
    fn target(&self, datagram: &[u8]) -> SocketAddr {
        let node = &self.overlay.lab.nodes[1];
        match datagram.get(VXLAN_LEN + 12..HEADERS_LEN + 1) {
            Some([0x86, 0xdd, 0x60..0x70]) => (node.v6, PORT).into(),
            _ => (node.v4, PORT).into(),
        }
    }

    fn send_raw(&self, raw: &Socket, packet: &[u8]) {
        let to = SocketAddr::from((self.overlay.lab.nodes[1].v4, 0));
        assert_eq!(raw.send_to(packet, &to.into()).unwrap(), packet.len());
    }

    /// Ends it: whoever is honest has noticed nothing, and the kernel kept back no more than `lost` datagrams.
    fn lift(self, what: &str, lost: u64) {
        assert_eq!(self.strays(), Vec::<Vec<u8>>::new());
        assert_eq!(self.overlay.status(2).counters["receive_overflows"], lost);
        let report = self.probe.stop().unwrap();
        let sent = report.there.sent + report.back.sent;
        figure(&format!("{what}: probe sent, lost"), (sent, report.lost()));
        figure(&format!("{what}: refused"), self.overlay.status(2).drops);
        assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
        self.overlay.assert_no_drops(1);
        self.overlay.assert_no_drops(3);
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

fn peer_status(status: &Status, addr: Ipv4Addr) -> Drops {
    let endpoint = format!("{addr}:{PORT}");
    let mut peers = status.peers.iter();
    let peer = peers.find(|peer| peer.endpoints.contains(&endpoint)).unwrap();
    peer.drops.clone()
}

/// Sockets on a node's underlay addresses.
struct Sender {
    v4: UdpSocket,
    v6: UdpSocket,
}

impl Sender {
    fn new(overlay: &Overlay, nth: usize) -> Self {
        let node = &overlay.lab.nodes[nth - 1];
        let bind = |addr: IpAddr| {
            let bound = node.namespace.run(|| Ok(UdpSocket::bind((addr, 0))?));
            bound.unwrap()
        };
        Self {
            v4: bind(node.v4.into()),
            v6: bind(node.v6.into()),
        }
    }

    fn send(&self, tos: u32, datagram: &[u8], to: SocketAddr) {
        let socket = if to.is_ipv4() {
            SockRef::from(&self.v4).set_tos_v4(tos).unwrap();
            &self.v4
        } else {
            SockRef::from(&self.v6).set_tclass_v6(tos).unwrap();
            &self.v6
        };
        assert_eq!(socket.send_to(datagram, to).unwrap(), datagram.len());
    }
}

/// The Ethernet address a node's lease tells.
fn mac(overlay: &Overlay, nth: usize) -> [u8; 6] {
    let subnets = overlay.status(nth).node.subnets.join("&").replace('/', "-");
    let (lease, _) = overlay.get(&format!("subnets/{subnets}")).unwrap();
    let lease: serde_json::Value = serde_json::from_str(&lease).unwrap();
    let text = lease["BackendData"]["VtepMAC"].as_str().unwrap();
    text.parse::<MacAddr>().unwrap().octets()
}

fn raw_socket(overlay: &Overlay, nth: usize) -> Socket {
    const IPPROTO_RAW: i32 = 255;
    let open = || {
        Ok(Socket::new(
            Domain::IPV4,
            Type::RAW,
            Some(Protocol::from(IPPROTO_RAW)),
        )?)
    };
    overlay.namespace(nth).run(open).unwrap()
}

/// A datagram to node 2 with its outer headers.
fn outer_v4(src: Ipv4Addr, port: u16, datagram: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(src.octets(), [192, 0, 2, 2], 64).udp(port, PORT);
    let mut packet = Vec::with_capacity(builder.size(datagram.len()));
    builder.write(&mut packet, datagram).unwrap();
    packet
}
