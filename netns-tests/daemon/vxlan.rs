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
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Ecn, IpHeader, V4_LEN, V6_LEN, set_ecn};
use kersey::wire::vxlan::{HEADERS_LEN, LEN as VXLAN_LEN};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::overlay::{Blueprint, DEVICE, Overlay, READY, figure, wait_for, within};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

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
                ip.addrs.dst() == IpAddr::from(stranger)
                    || spoofed.map(IpAddr::from).contains(&ip.addrs.dst())
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

/// Datagrams that must all be refused for one reason.
struct Lie {
    name: &'static str,
    reason: &'static str,
    /// Type of service outside.
    tos: u32,
    datagrams: Vec<Vec<u8>>,
}

/// A datagram that must be let in, and the packet that must come of it.
struct Legal {
    name: &'static str,
    datagram: Vec<u8>,
    arrives: Vec<u8>,
}

/// VXLAN and Ethernet headers with all their fields, and what follows them.
#[derive(Clone)]
struct Frame {
    flags: u8,
    reserved: [u8; 3],
    vni: u32,
    last: u8,
    dst: [u8; 6],
    src: [u8; 6],
    ethertype: u16,
    inner: Vec<u8>,
}

impl Frame {
    fn emit(&self) -> Vec<u8> {
        let mut bytes = vec![self.flags];
        bytes.extend(self.reserved);
        bytes.extend(&self.vni.to_be_bytes()[1..]);
        bytes.push(self.last);
        bytes.extend(self.dst);
        bytes.extend(self.src);
        bytes.extend(self.ethertype.to_be_bytes());
        bytes.extend(&self.inner);
        bytes
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut frame = self.clone();
        change(&mut frame);
        frame.emit()
    }

    /// Overwrites bytes of the inner packet; the header checksum of IPv4 is made right again.
    fn patched(&self, at: usize, bytes: &[u8]) -> Self {
        let mut frame = self.clone();
        frame.inner[at..at + bytes.len()].copy_from_slice(bytes);
        sum_v4(&mut frame.inner);
        frame
    }

    fn carrying(&self, inner: Vec<u8>) -> Self {
        Self {
            inner,
            ..self.clone()
        }
    }
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

    /// An honest frame from node 1 to node 2 around `inner`.
    fn around(&self, inner: Vec<u8>) -> Frame {
        let v4 = inner[0] >> 4 == 4;
        Frame {
            flags: 0x08,
            reserved: [0; 3],
            vni: 1,
            last: 0,
            dst: self.macs[1],
            src: self.macs[0],
            ethertype: if v4 { 0x0800 } else { 0x86dd },
            inner,
        }
    }

    fn v4(&self) -> Frame {
        self.v4_between(self.overlay.pod_v4(1), self.overlay.pod_v4(2))
    }

    fn v4_between(&self, src: Ipv4Addr, dst: Ipv4Addr) -> Frame {
        self.around(udp_v4(src, dst, &[0x5a; 64]))
    }

    fn v6(&self) -> Frame {
        self.v6_between(self.v6[0], self.v6[1])
    }

    fn v6_between(&self, src: Ipv6Addr, dst: Ipv6Addr) -> Frame {
        self.around(udp_v6(src, dst, &[0x5a; 64]))
    }

    /// A packet with these bytes between the IPv6 header and its UDP.
    fn v6_extended(&self, next: u8, extensions: &[u8]) -> Frame {
        let mut inner = self.v6().inner;
        let payload = (inner.len() - V6_LEN + extensions.len()) as u16;
        inner[4..6].copy_from_slice(&payload.to_be_bytes());
        inner[6] = next;
        inner.splice(V6_LEN..V6_LEN, extensions.iter().copied());
        self.around(inner)
    }

    /// All that node 1 may try and must not get through.
    fn lies(&self) -> Vec<Lie> {
        let mut lies = self.framing_lies();
        lies.extend(self.header_lies());
        lies.extend(self.address_lies());
        lies
    }

    fn framing_lies(&self) -> Vec<Lie> {
        let (v4, v6) = (self.v4(), self.v6());
        let cut = |frame: &Frame, lens: std::ops::Range<usize>| {
            let bytes = frame.emit();
            lens.map(|len| bytes[..HEADERS_LEN + len].to_vec())
                .collect::<Vec<_>>()
        };
        let own = self.macs[1];
        let [peer, ours] = self.macs.map(MacAddr::from);
        let near = own.map(|byte| byte ^ 1);
        let arp = |operation: u8| {
            let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, operation];
            bytes.extend(peer.octets());
            bytes.extend(self.overlay.pod_v4(1).octets());
            bytes.extend(ours.octets());
            bytes.extend(self.overlay.pod_v4(2).octets());
            bytes
        };
        let tagged = |id: u16, inner: &Frame| {
            let mut bytes = id.to_be_bytes().to_vec();
            bytes.extend(inner.ethertype.to_be_bytes());
            bytes.extend(&inner.inner);
            bytes
        };
        let tunnel = v4.emit();
        vec![
            lie(
                "cut within VXLAN and Ethernet headers",
                "truncated",
                (0..=HEADERS_LEN)
                    .map(|len| tunnel[..len].to_vec())
                    .collect::<Vec<_>>(),
            ),
            lie("cut within the IPv4 header", "truncated", cut(&v4, 1..V4_LEN)),
            lie("cut within the IPv6 header", "truncated", cut(&v6, 1..V6_LEN)),
            lie(
                "cut within UDP and payload, IPv4",
                "bad_length",
                cut(&v4, V4_LEN..V4_LEN + 12),
            ),
            lie(
                "cut within UDP and payload, IPv6",
                "bad_length",
                cut(&v6, V6_LEN..V6_LEN + 12),
            ),
            lie(
                "flags without the VNI's",
                "bad_encapsulation",
                [0x00, 0xf7, 0x80, 0x04].map(|flags| v4.with(|frame| frame.flags = flags)),
            ),
            lie(
                "other networks",
                "other_vni",
                [0, 2, 0x0100, 0x01_0000, 0xff_ffff].map(|vni| v4.with(|frame| frame.vni = vni)),
            ),
            lie(
                "other stations",
                "other_station",
                [
                    [0xff; 6],
                    [0; 6],
                    [0x01, 0, 0x5e, 0, 0, 1],
                    [0x33, 0x33, 0, 0, 0, 1],
                    self.macs[0],
                    near,
                ]
                .into_iter()
                .flat_map(|dst| [&v4, &v6].map(|frame| frame.with(|frame| frame.dst = dst)))
                .collect::<Vec<_>>(),
            ),
            lie(
                "reflected",
                "own_station",
                [&v4, &v6].map(|frame| frame.with(|frame| frame.src = own)),
            ),
            lie(
                "not IP",
                "not_ip",
                [
                    v4.carrying(arp(1)).with(|frame| frame.ethertype = 0x0806),
                    v4.carrying(arp(2)).with(|frame| frame.ethertype = 0x0806),
                    v4.carrying(tagged(5, &v4)).with(|frame| frame.ethertype = 0x8100),
                    v6.carrying(tagged(5, &v6)).with(|frame| frame.ethertype = 0x8100),
                    v4.carrying(tagged(0, &v4)).with(|frame| frame.ethertype = 0x8100),
                    v4.carrying(tagged(5, &v4)).with(|frame| frame.ethertype = 0x88a8),
                ]
                .into_iter()
                // A length as IEEE 802.3 has it, MPLS, PPPoE, LLDP, bridged Ethernet, IPv4 the other way round.
                .chain(
                    [0, 0x5c, 0x8847, 0x8864, 0x88cc, 0x6558, 0x0008, 0xffff]
                        .map(|ethertype| v4.with(|frame| frame.ethertype = ethertype)),
                )
                .collect::<Vec<_>>(),
            ),
            lie(
                "EtherType and version disagree",
                "ethertype_mismatch",
                [
                    v4.with(|frame| frame.ethertype = 0x86dd),
                    v6.with(|frame| frame.ethertype = 0x0800),
                    v4.patched(0, &[0x05]).emit(),
                    v4.patched(0, &[0x55]).emit(),
                    v4.patched(0, &[0xf5]).emit(),
                    v6.patched(0, &[0x00]).emit(),
                    v6.patched(0, &[0x70]).emit(),
                    v4.carrying(vec![0; 64]).emit(),
                    // A tunnel in the tunnel, without an Ethernet header to itself.
                    v4.carrying(tunnel).emit(),
                ],
            ),
            Lie {
                tos: 3,
                ..lie(
                    "congestion marked to those who would not know",
                    "congestion_mark",
                    [v4.emit(), v6.emit()],
                )
            },
        ]
    }

    fn header_lies(&self) -> Vec<Lie> {
        let (v4, v6) = (self.v4(), self.v6());
        let (len_v4, len_v6) = (v4.inner.len() as u16, (v6.inner.len() - V6_LEN) as u16);
        let unsummed = |at: usize, value: u8| v4.with(|frame| frame.inner[at] ^= value);
        // Destination options of 8 bytes, padding only, 9 in a row.
        let chain: Vec<u8> = (0..9)
            .flat_map(|nth| [if nth == 8 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0])
            .collect();
        let mut jumbogram = self
            .v6_extended(0, &[17, 0, 0xc2, 4, 0, 1, 0, 0])
            .patched(4, &[0, 0]);
        let mut short_jumbogram = jumbogram.clone();
        short_jumbogram.inner.truncate(V6_LEN + 8);
        jumbogram.inner.resize(V6_LEN + 8 + 2000, 0);
        vec![
            lie(
                "header lengths below 20",
                "bad_header_length",
                (0x40..0x45).map(|first| v4.patched(0, &[first]).emit()),
            ),
            lie(
                "lengths that lie, IPv4",
                "bad_length",
                [0, 1, 19, len_v4 + 1, len_v4 + 1000, 0xffff]
                    .map(|len| v4.patched(2, &len.to_be_bytes()).emit())
                    .into_iter()
                    // A header of 60 bytes in a packet of 28.
                    .chain([v4.patched(0, &[0x4f, 0, 0, 28]).emit()]),
            ),
            lie(
                "lengths that lie, IPv6",
                "bad_length",
                [len_v6 + 1, len_v6 + 1000, 0xffff].map(|len| v6.patched(4, &len.to_be_bytes()).emit()),
            ),
            lie(
                "header checksums",
                "bad_header_checksum",
                [(10, 0xff), (11, 0x01), (1, 0x04), (8, 0x80), (9, 0x01), (4, 0xff)]
                    .map(|(at, value)| unsummed(at, value))
                    .into_iter()
                    .chain([v4.with(|frame| frame.inner[10..12].fill(0))]),
            ),
            lie(
                "extension headers without end",
                "bad_extension_headers",
                [self.v6_extended(60, &chain).emit()],
            ),
            lie(
                "extension headers beyond the end",
                "truncated",
                [0, 43, 60]
                    .map(|next| self.v6_extended(next, &[17, 0xff, 1, 4, 0, 0, 0, 0]).emit())
                    .into_iter()
                    // The fragment header is cut.
                    .chain([v6.patched(4, &[0, 4]).patched(6, &[44]).emit()]),
            ),
            lie(
                "jumbograms",
                "truncated",
                [jumbogram.emit(), short_jumbogram.emit()],
            ),
        ]
    }

    fn address_lies(&self) -> Vec<Lie> {
        let [one, two, three] = [1, 2, 3].map(|nth| self.overlay.pod_v4(nth));
        let [one_v6, two_v6, three_v6] = self.v6;
        let low = |addr: Ipv4Addr, low: u32| Ipv4Addr::from_bits(addr.to_bits() & !0xff | low);
        let from_v4 = |addrs: &[Ipv4Addr]| {
            let frames = addrs.iter().map(|&src| self.v4_between(src, two).emit());
            frames.collect::<Vec<_>>()
        };
        let to_v4 = |addrs: &[Ipv4Addr]| {
            let frames = addrs.iter().map(|&dst| self.v4_between(one, dst).emit());
            frames.collect::<Vec<_>>()
        };
        let from_v6 = |addrs: &[&str]| {
            let frames = addrs
                .iter()
                .map(|src| self.v6_between(src.parse().unwrap(), two_v6).emit());
            frames.collect::<Vec<_>>()
        };
        let to_v6 = |addrs: &[&str]| {
            let frames = addrs
                .iter()
                .map(|dst| self.v6_between(one_v6, dst.parse().unwrap()).emit());
            frames.collect::<Vec<_>>()
        };
        let parse = |addrs: &[&str]| addrs.iter().map(|addr| addr.parse().unwrap()).collect::<Vec<_>>();
        let nobody = "10.244.254.9".parse().unwrap();
        let [wire_one, wire_two, wire_three] = [1, 2, 3].map(|nth| self.overlay.lab.nodes[nth - 1].v4);
        let nested = self.v4().emit();
        vec![
            lie(
                "our own as sources",
                "martian_source",
                from_v4(&[two, low(two, 0), low(two, 1), low(two, 9), low(two, 255)]),
            ),
            lie(
                "places no packet comes from",
                "martian_source",
                from_v4(&parse(&[
                    "127.0.0.1",
                    "127.255.255.254",
                    "0.0.0.0",
                    "0.1.2.3",
                    "224.0.0.1",
                    "239.255.255.255",
                    "240.0.0.1",
                    "255.255.255.255",
                    "169.254.1.1",
                ])),
            ),
            lie(
                "places no packet comes from, IPv6",
                "martian_source",
                from_v6(&[
                    "::",
                    "::1",
                    "ff02::1",
                    "fe80::1",
                    "::ffff:10.244.1.2",
                    &two_v6.to_string(),
                ]),
            ),
            lie(
                "other peers' pods",
                "spoofed_source",
                from_v4(&[three, low(three, 0), nobody, [10, 244, 255, 255].into()]),
            ),
            lie(
                "other peers' pods, IPv6",
                "spoofed_source",
                from_v6(&[&three_v6.to_string(), "fd00:10:244:fe::9"]),
            ),
            lie(
                "the internet, the underlay, ourselves",
                "foreign_source",
                from_v4(&[
                    [8, 8, 8, 8].into(),
                    wire_two,
                    wire_three,
                    [192, 0, 2, 254].into(),
                    [10, 0, 0, 1].into(),
                ]),
            ),
            lie(
                "the internet, the underlay, ourselves, IPv6",
                "foreign_source",
                from_v6(&[
                    "2001:4860:4860::8888",
                    "2001:db8:1::2",
                    "2001:db8:1::3",
                    "2001:db8:1::fe",
                ]),
            ),
            lie(
                "for others",
                "not_for_us",
                to_v4(&[
                    [8, 8, 8, 8].into(),
                    wire_one,
                    wire_two,
                    wire_three,
                    one,
                    three,
                    nobody,
                ]),
            ),
            lie(
                "for others, IPv6",
                "not_for_us",
                to_v6(&[
                    "2001:4860:4860::8888",
                    "2001:db8:1::1",
                    "2001:db8:1::2",
                    &one_v6.to_string(),
                    &three_v6.to_string(),
                ]),
            ),
            lie(
                "for many, or for the host itself",
                "not_unicast",
                to_v4(&parse(&[
                    "224.0.0.1",
                    "239.255.255.255",
                    "255.255.255.255",
                    "240.0.0.1",
                    "127.0.0.1",
                    "0.0.0.0",
                    "169.254.1.1",
                ])),
            ),
            lie(
                "for many, or for the host itself, IPv6",
                "not_unicast",
                to_v6(&["ff02::1", "ff0e::1", "fe80::1", "::1", "::", "::ffff:10.244.1.2"]),
            ),
            lie(
                "a tunnel in the tunnel",
                "not_for_us",
                [
                    // Back into our own port, from the peer and from its pod.
                    self.around(tunnelled(wire_one, wire_two, &nested)).emit(),
                    self.around(tunnelled(one, wire_two, &nested)).emit(),
                    // On to another peer's.
                    self.around(tunnelled(wire_one, wire_three, &nested)).emit(),
                ],
            ),
        ]
    }

    /// What a kernel's device, or the RFC, lets in.
    fn legal(&self) -> Vec<Legal> {
        let (v4, v6) = (self.v4(), self.v6());
        let [one, two] = [1, 2].map(|nth| self.overlay.pod_v4(nth));
        let plain = |name, frame: Frame| Legal {
            name,
            datagram: frame.emit(),
            arrives: frame.inner,
        };
        let headers = |name, change: &dyn Fn(&mut Frame)| Legal {
            name,
            datagram: v4.with(change),
            arrives: v4.inner.clone(),
        };
        let padded = |name, frame: &Frame, bytes: usize| {
            let mut datagram = frame.emit();
            datagram.extend(vec![0xa5; bytes]);
            Legal {
                name,
                datagram,
                arrives: frame.inner.clone(),
            }
        };
        let protocol = |number: u8| v4.patched(9, &[number]);
        let mut long_tcp = v4.carrying(udp_v4(one, two, &[0x5a; 4000])).patched(9, &[6]);
        long_tcp.inner[V4_LEN + 12] = 0x50;
        let mut headless_tcp = long_tcp.clone();
        headless_tcp.inner[V4_LEN + 12] = 0;
        vec![
            plain("IPv4", v4.clone()),
            plain("IPv6", v6.clone()),
            headers("every reserved bit, RFC 7348 §5", &|frame| {
                frame.flags = 0xff;
                frame.reserved = [0xff; 3];
                frame.last = 0xff;
            }),
            headers("a group policy", &|frame| {
                frame.flags = 0x88;
                frame.reserved = [0x48, 0x12, 0x34];
            }),
            headers("a source station of zeros", &|frame| frame.src = [0; 6]),
            headers("a group as source station", &|frame| {
                frame.src = [0x01, 0, 0x5e, 0, 0, 1];
            }),
            padded("padding", &v4, 18),
            padded("padding, IPv6", &v6, 18),
            padded("more padding than packet", &v4, 60_000),
            plain("options that do nothing", with_options(&v4, &[1, 1, 1, 0])),
            plain("record route", with_options(&v4, &[7, 7, 4, 0, 0, 0, 0, 0])),
            plain("40 bytes of options", with_options(&v4, &[1; 40])),
            plain("router alert", with_options(&v4, &[148, 4, 0, 0])),
            plain("a first fragment", v4.patched(6, &[0x20, 0])),
            plain("a middle fragment", v4.patched(6, &[0x20, 9])),
            plain("a last fragment", v4.patched(6, &[0, 18])),
            plain("a fragment beyond 64 KB", v4.patched(6, &[0x1f, 0xff])),
            plain("the reserved fragment flag", v4.patched(6, &[0x80, 0])),
            plain(
                "a first fragment, IPv6",
                self.v6_extended(44, &[17, 0, 0, 1, 0, 0, 0, 7]),
            ),
            plain(
                "a last fragment, IPv6",
                self.v6_extended(44, &[17, 0, 0x05, 0xa8, 0, 0, 0, 7]),
            ),
            plain(
                "an atomic fragment, RFC 6946",
                self.v6_extended(44, &[17, 0, 0, 0, 0, 0, 0, 7]),
            ),
            plain(
                "hop-by-hop and destination options",
                self.v6_extended(0, &[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0]),
            ),
            plain("TTL 0", v4.patched(8, &[0])),
            plain("TTL 1", v4.patched(8, &[1])),
            plain("hop limit 0", v6.patched(7, &[0])),
            plain("a DSCP", v4.patched(1, &[0xb8])),
            plain("IP in IP", protocol(4)),
            plain("GRE", protocol(47)),
            plain("SCTP", protocol(132)),
            plain("an unassigned protocol", protocol(253)),
            plain("UDP whose length lies", v4.patched(V4_LEN + 4, &[0xff, 0xff])),
            plain(
                "UDP without a header",
                v4.carrying(v4.inner[..V4_LEN].to_vec()).patched(2, &[0, 20]),
            ),
            plain(
                "from the peer itself",
                self.v4_between(self.overlay.lab.nodes[0].v4, two),
            ),
            plain(
                "from the peer itself, IPv6",
                self.v6_between(self.overlay.lab.nodes[0].v6, self.v6[1]),
            ),
            plain(
                "to our device's own address",
                self.v4_between(one, Ipv4Addr::from_bits(two.to_bits() & !0xff)),
            ),
            plain(
                "a tunnel for a pod of ours",
                self.around(tunnelled(one, two, &v4.emit())),
            ),
            plain("TCP longer than the overlay, checksum wrong", long_tcp),
            plain("TCP longer than the overlay, no header length", headless_tcp),
            plain(
                "longer than the underlay carries",
                v4.carrying(udp_v4(one, two, &[0x5a; 8000])),
            ),
        ]
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

fn udp_v4(src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(src.octets(), dst.octets(), 64).udp(BY_HAND, 9);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).unwrap();
    packet
}

fn udp_v6(src: Ipv6Addr, dst: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv6(src.octets(), dst.octets(), 64).udp(BY_HAND, 9);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// A datagram of the tunnel as an inner packet.
fn tunnelled(src: Ipv4Addr, dst: Ipv4Addr, datagram: &[u8]) -> Vec<u8> {
    let mut packet = udp_v4(src, dst, datagram);
    packet[V4_LEN + 2..V4_LEN + 4].copy_from_slice(&PORT.to_be_bytes());
    packet[V4_LEN + 6..V4_LEN + 8].fill(0);
    packet
}

/// An IPv4 packet with options, a multiple of 4 bytes.
fn with_options(frame: &Frame, options: &[u8]) -> Frame {
    let mut inner = frame.inner.clone();
    inner.splice(V4_LEN..V4_LEN, options.iter().copied());
    inner[0] = 0x45 + (options.len() / 4) as u8;
    let len = inner.len() as u16;
    inner[2..4].copy_from_slice(&len.to_be_bytes());
    sum_v4(&mut inner);
    frame.carrying(inner)
}

/// Makes an IPv4 header checksum right, over as much of the header as is there.
fn sum_v4(packet: &mut [u8]) {
    if packet[0] >> 4 != 4 {
        return;
    }
    let header_len = (usize::from(packet[0] & 0xf) * 4).max(V4_LEN).min(packet.len());
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..header_len]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn lie(name: &'static str, reason: &'static str, datagrams: impl IntoIterator<Item = Vec<u8>>) -> Lie {
    Lie {
        name,
        reason,
        tos: 0,
        datagrams: datagrams.into_iter().collect(),
    }
}
