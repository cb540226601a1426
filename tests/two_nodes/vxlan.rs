//! What a VXLAN node makes of every kind of frame: delivered as it came, or in its own counter.
//!
//! The node under test is number 2; it knows 1 and 3. What inner addresses may be is the same for every encapsulation and
//! tried in `inbound.rs`; here are a few rows of it.

use kersey::backend::vxlan::Vxlan;
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::memory::Message;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Ecn, IpHeader, protocol, set_ecn};
use kersey::wire::transport::{tcp, udp};
use kersey::wire::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};
use kersey::wire::vxlan::{HEADERS_LEN, VxlanHeader, ethertype};

use crate::decisions::{Blamed, refused};
use crate::node::{Kind, NodeOf, Tunnel, mac, start, v4, v6};
use crate::packets::{Packet, checksums_hold, from_peer, refresh_v4};

type Node = NodeOf<Vxlan>;

const DST: usize = 8;
const SRC: usize = 14;
const TYPE: usize = 20;
const MTU: u16 = 1450;

#[test]
fn frames_of_other_networks_stations_and_kinds_are_refused_by_what_they_are() {
    use DropReason::{
        BadEncapsulation, EthertypeMismatch, NotIp, OtherStation, OtherVni, OwnStation, Truncated,
    };
    let four = frame(&Packet::new(v4(1, 2), v4(2, 2)).udp());
    let six = frame(&Packet::new(v6(1, 2), v6(2, 2)).udp());
    let mut headers_only = four.clone();
    headers_only.truncate(HEADERS_LEN);
    let with = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    for (what, frame, reason) in [
        ("no I flag", with(&four, 0, &[0]), BadEncapsulation),
        ("every flag but I", with(&four, 0, &[0xf7]), BadEncapsulation),
        ("VNI 0", with(&four, 4, &[0, 0, 0]), OtherVni),
        ("VNI 2", with(&four, 4, &[0, 0, 2]), OtherVni),
        ("VNI 0x010001", with(&four, 4, &[1, 0, 1]), OtherVni),
        ("VNI 0xffffff", with(&four, 4, &[0xff; 3]), OtherVni),
        (
            "for the peer itself",
            with(&four, DST, &mac(1).octets()),
            OtherStation,
        ),
        (
            "for a third node",
            with(&four, DST, &mac(3).octets()),
            OtherStation,
        ),
        ("for station 0", with(&four, DST, &[0; 6]), OtherStation),
        ("for everybody", with(&four, DST, &[0xff; 6]), OtherStation),
        (
            "for an IPv4 group",
            with(&four, DST, &[1, 0, 0x5e, 0, 0, 1]),
            OtherStation,
        ),
        (
            "for an IPv6 group",
            with(&six, DST, &[0x33, 0x33, 0, 0, 0, 1]),
            OtherStation,
        ),
        ("from ourselves", with(&four, SRC, &mac(2).octets()), OwnStation),
        ("ARP", with(&four, TYPE, &[0x08, 0x06]), NotIp),
        ("a VLAN tag", with(&four, TYPE, &[0x81, 0x00]), NotIp),
        ("an outer VLAN tag", with(&four, TYPE, &[0x88, 0xa8]), NotIp),
        ("MPLS", with(&four, TYPE, &[0x88, 0x47]), NotIp),
        ("an 802.3 length", with(&four, TYPE, &[0x00, 0x40]), NotIp),
        ("EtherType 0", with(&four, TYPE, &[0, 0]), NotIp),
        (
            "IPv4 said to be IPv6",
            with(&four, TYPE, &[0x86, 0xdd]),
            EthertypeMismatch,
        ),
        (
            "IPv6 said to be IPv4",
            with(&six, TYPE, &[0x08, 0x00]),
            EthertypeMismatch,
        ),
        ("version 5", with(&four, HEADERS_LEN, &[0x55]), EthertypeMismatch),
        ("nothing inside", headers_only, Truncated),
    ] {
        let message = from_peer(1, &frame);
        refused(&mut node(MERGE), what, message, reason, Blamed::Peer1);
    }
}

#[test]
fn inner_addresses_are_checked_as_in_every_encapsulation() {
    use DropReason::{ForeignSource, MartianSource, NotForUs, NotUnicast, SpoofedSource, UnknownPeer};
    let ip = |text: &str| text.parse().unwrap();
    for (what, from, src, dst, reason) in [
        ("a stranger", 9, v4(1, 2), v4(2, 2), UnknownPeer),
        ("another peer's pod", 1, v4(3, 2), v4(2, 2), SpoofedSource),
        ("IPv6: another peer's pod", 1, v6(3, 2), v6(2, 2), SpoofedSource),
        ("the internet", 1, ip("8.8.8.8"), v4(2, 2), ForeignSource),
        ("our own pod", 1, v4(2, 9), v4(2, 2), MartianSource),
        ("to a third node", 1, v4(1, 2), v4(3, 2), NotForUs),
        ("to a group", 1, v4(1, 2), ip("239.1.2.3"), NotUnicast),
        (
            "IPv6: router solicitation",
            1,
            ip("fe80::1"),
            ip("ff02::2"),
            MartianSource,
        ),
    ] {
        let message = from_peer(from, &frame(&Packet::new(src, dst).udp()));
        let blamed = if from == 1 { Blamed::Peer1 } else { Blamed::Nobody };
        refused(&mut node(MERGE), what, message, reason, blamed);
    }
}

#[test]
fn what_may_vary_does_not_matter() {
    let inner = Packet::new(v4(1, 2), v4(2, 2)).udp();
    for (what, at, bytes) in [
        ("all reserved flags", 0, &[0xff][..]),
        ("reserved bytes", 1, &[0xff; 3]),
        ("the last reserved byte", 7, &[0xff]),
        ("group policy", 0, &[0x88, 0x48, 0x12, 0x34]),
        ("a source of zeros", SRC, &[0; 6]),
        ("a group as source", SRC, &[0x01, 0, 0x5e, 0, 0, 1]),
        ("everybody as source", SRC, &[0xff; 6]),
        ("an unknown source", SRC, &[2, 0, 0, 0, 0, 9]),
    ] {
        let mut frame = frame(&inner);
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        assert_eq!(
            deliver(&mut node(MERGE), what, from_peer(1, &frame)),
            plain(&inner),
            "{what}"
        );
    }
    let mut padded = frame(&inner);
    padded.extend([0xee; 18]);
    assert_eq!(
        deliver(&mut node(MERGE), "padding", from_peer(1, &padded)),
        plain(&inner)
    );
}

#[test]
fn a_frame_cut_at_any_byte_is_refused() {
    for (inner, header) in [
        (Packet::new(v4(1, 2), v4(2, 2)).udp(), 20),
        (Packet::new(v6(1, 2), v6(2, 2)).udp(), 40),
    ] {
        let whole = frame(&inner);
        for len in 0..whole.len() {
            let reason = if len < HEADERS_LEN + header {
                DropReason::Truncated
            } else {
                DropReason::BadLength
            };
            let what = format!("{len} of {} bytes", whole.len());
            let mut node = node(MERGE);
            assert_eq!(node.receive([from_peer(1, &whole[..len])], start()), [], "{what}");
            assert_eq!(node.drops(), [(reason, 1)], "{what}");
        }
    }
}

#[test]
fn a_bad_frame_in_a_run_does_not_harm_its_neighbours() {
    let good = frame(&Packet::new(v4(1, 2), v4(2, 2)).udp());
    let mut arp = good.clone();
    arp[TYPE + 1] = 6;
    let mut other = good.clone();
    other[6] = 2;
    let mut node = node(Merge::NONE);
    let bytes = [&good[..], &arp, &good, &other, &good].concat();
    let run = Message {
        segment_size: good.len(),
        ..from_peer(1, &bytes)
    };
    assert_eq!(node.receive([run], start()).len(), 3);
    assert_eq!(node.drops(), [(DropReason::OtherVni, 1), (DropReason::NotIp, 1)]);
}

/// RFC 6040 §4.2, figure 4.
#[test]
fn congestion_marks_are_combined_on_arrival() {
    use Ecn::{Ce, Ect0, Ect1, NotEct};
    for (outer, results) in [
        (NotEct, [Some(NotEct), Some(Ect0), Some(Ect1), Some(Ce)]),
        (Ect0, [Some(NotEct), Some(Ect0), Some(Ect1), Some(Ce)]),
        (Ect1, [Some(NotEct), Some(Ect1), Some(Ect1), Some(Ce)]),
        (Ce, [None, Some(Ce), Some(Ce), Some(Ce)]),
    ] {
        for (ecn, result) in [NotEct, Ect0, Ect1, Ce].into_iter().zip(results) {
            for packet in [
                Packet::new(v4(1, 2), v4(2, 2)).udp(),
                Packet::new(v6(1, 2), v6(2, 2)).udp(),
            ] {
                let inner = marked(packet, ecn);
                let what = format!("{ecn:?} inside {outer:?}");
                let message = Message {
                    ecn: outer,
                    ..from_peer(1, &frame(&inner))
                };
                match result {
                    Some(result) => {
                        let delivered = deliver(&mut node(MERGE), &what, message);
                        assert_eq!(delivered, plain(&marked(inner, result)), "{what}");
                        assert!(checksums_hold(&delivered.1), "{what}");
                    }
                    None => {
                        let reason = DropReason::CongestionMark;
                        refused(&mut node(MERGE), &what, message, reason, Blamed::Peer1);
                    }
                }
            }
        }
    }
}

#[test]
fn congestion_marks_are_copied_outwards_and_nothing_else_of_the_class() {
    for packet in [
        Packet::new(v4(2, 2), v4(1, 2)).udp(),
        Packet::new(v6(2, 2), v6(1, 2)).udp(),
    ] {
        for ecn in [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce] {
            let inner = marked(packet.clone(), ecn);
            let sent = node(MERGE).send(vec![(VirtioHeader::default(), inner.clone())], start());
            assert_eq!(sent.len(), 1);
            assert_eq!((sent[0].ecn, &sent[0].bytes[HEADERS_LEN..]), (ecn, &inner[..]));
        }
    }
}

#[test]
fn the_ttl_is_the_hosts_business() {
    for ttl in [0, 1, 2, 64, 255] {
        for (there, back) in [
            ((v4(1, 2), v4(2, 2)), (v4(2, 2), v4(1, 2))),
            ((v6(1, 2), v6(2, 2)), (v6(2, 2), v6(1, 2))),
        ] {
            let packet = |(src, dst)| {
                Packet {
                    ttl,
                    ..Packet::new(src, dst)
                }
                .udp()
            };
            let mut node = node(MERGE);
            let inner = packet(there);
            let what = format!("TTL {ttl}");
            assert_eq!(
                deliver(&mut node, &what, from_peer(1, &frame(&inner))),
                plain(&inner)
            );
            let inner = packet(back);
            let sent = node.send(vec![(VirtioHeader::default(), inner.clone())], start());
            assert_eq!(sent[0].bytes[HEADERS_LEN..], inner, "{what}");
            assert!(node.inbound.device().answers.is_empty() && node.outbound.device().answers.is_empty());
        }
    }
}

#[test]
fn a_checksum_half_done_is_left_to_the_device_or_finished_for_it() {
    for (what, packet) in kinds(33) {
        let (start, offset) = place(&packet);
        let half = half_done(&packet);
        assert!(!checksums_hold(&half), "{what}");
        let (header, finished) = deliver(&mut node(MERGE), what, from_peer(1, &frame(&half)));
        // The device in memory finishes what the header says, and the packet is right then.
        let checksum = Some(PartialChecksum {
            start: start as u16,
            offset: offset as u16,
        });
        assert_eq!((header.checksum, header.gso), (checksum, None), "{what}");
        assert_eq!(finished, packet, "{what}");
        let done = deliver(&mut node(Merge::NONE), what, from_peer(1, &frame(&half)));
        assert_eq!(done, plain(&packet), "{what}");
    }
}

#[test]
fn a_checksum_that_looks_half_done_by_chance_stays_as_it_is() {
    for (what, packet) in kinds(34) {
        let packet = by_chance(packet);
        assert_eq!(half_done(&packet), packet, "{what}");
        assert!(checksums_hold(&packet), "{what}");
        for merge in [MERGE, Merge::NONE] {
            let (_, delivered) = deliver(&mut node(merge), what, from_peer(1, &frame(&packet)));
            assert_eq!(delivered, packet, "{what}");
        }
    }
}

#[test]
fn udp_that_is_shorter_than_its_packet_is_never_finished() {
    // What is behind the datagram is in the sum of a half-done checksum, and in no checksum of a datagram.
    for (src, dst) in [(v4(1, 2), v4(2, 2)), (v6(1, 2), v6(2, 2))] {
        let mut packet = Packet::new(src, dst).udp();
        let l4 = IpHeader::parse(&packet).unwrap().l4;
        packet[l4 + udp::LENGTH.start + 1] -= 4;
        let packet = half_done(&packet);
        for merge in [MERGE, Merge::NONE] {
            let delivered = deliver(&mut node(merge), "short", from_peer(1, &frame(&packet)));
            assert_eq!(delivered, plain(&packet), "{dst}");
        }
    }
}

#[test]
fn udp_without_a_checksum_gets_none() {
    let mut packet = Packet::new(v4(1, 2), v4(2, 2)).udp();
    packet[20..][udp::CHECKSUM].fill(0);
    for merge in [MERGE, Merge::NONE] {
        let delivered = deliver(&mut node(merge), "none", from_peer(1, &frame(&packet)));
        assert_eq!(delivered, plain(&packet));
    }
}

#[test]
fn oversize_tcp_is_a_super_packet_whatever_its_checksum_if_that_is_right() {
    for (src, dst, kind) in [
        (v4(1, 2), v4(2, 2), GsoKind::TcpV4),
        (v6(1, 2), v6(2, 2), GsoKind::TcpV6),
    ] {
        let packet = Packet {
            payload: 10_001,
            ..Packet::new(src, dst)
        }
        .tcp();
        let (start, offset) = place(&packet);
        let header_len = start + tcp::MIN_LEN;
        let expected = VirtioHeader {
            checksum: Some(PartialChecksum {
                start: start as u16,
                offset: offset as u16,
            }),
            gso: Some(Gso {
                kind,
                size: MTU - header_len as u16,
                header_len: header_len as u16,
            }),
        };
        for came in [packet.clone(), half_done(&packet)] {
            let mut whole = node(MERGE);
            let delivered = deliver(&mut whole, "whole", from_peer(1, &frame(&came)));
            assert_eq!(delivered, (expected, packet.clone()), "{dst}");
            let mut cut = node(Merge::NONE);
            let segments = cut.receive([from_peer(1, &frame(&came))], self::start());
            assert!(
                segments
                    .iter()
                    .all(|(header, segment)| *header == VirtioHeader::default()
                        && segment.len() <= usize::from(MTU)
                        && checksums_hold(segment)),
                "{dst}"
            );
            let payload = segments.iter().flat_map(|(_, segment)| &segment[header_len..]);
            assert!(payload.eq(&packet[header_len..]), "{dst}");
            for node in [&whole, &cut] {
                assert_eq!(node.counted(Count::InboundPackets), segments.len() as u64);
                assert_eq!(node.drops(), []);
            }
        }
    }
}

#[test]
fn a_wrong_checksum_is_not_made_right() {
    for payload in [100, 10_001] {
        for (src, dst) in [(v4(1, 2), v4(2, 2)), (v6(1, 2), v6(2, 2))] {
            let mut packet = Packet {
                payload,
                ..Packet::new(src, dst)
            }
            .tcp();
            let last = packet.len() - 1;
            packet[last] ^= 1;
            for merge in [MERGE, Merge::NONE] {
                let delivered = deliver(&mut node(merge), "wrong", from_peer(1, &frame(&packet)));
                assert_eq!(delivered, plain(&packet), "{dst}, {payload} bytes");
            }
        }
    }
}

#[test]
fn fragments_are_carried_as_they_are() {
    for (what, packet) in [
        (
            "first of TCP",
            fragment(Packet::new(v4(1, 2), v4(2, 2)).tcp(), 0x2000),
        ),
        (
            "first of UDP",
            fragment(Packet::new(v4(1, 2), v4(2, 2)).udp(), 0x2000),
        ),
        (
            "a later one",
            fragment(Packet::new(v4(1, 2), v4(2, 2)).tcp(), 0x2010),
        ),
        (
            "the last",
            fragment(Packet::new(v4(1, 2), v4(2, 2)).udp(), 0x0010),
        ),
        (
            "longer than the MTU",
            fragment(
                Packet {
                    payload: 4000,
                    ..Packet::new(v4(1, 2), v4(2, 2))
                }
                .tcp(),
                0x2000,
            ),
        ),
        (
            "IPv6, first",
            fragment_v6(Packet::new(v6(1, 2), v6(2, 2)).udp(), 1),
        ),
        (
            "IPv6, the last",
            fragment_v6(Packet::new(v6(1, 2), v6(2, 2)).tcp(), 0x40),
        ),
    ] {
        for merge in [MERGE, Merge::NONE] {
            let delivered = deliver(&mut node(merge), what, from_peer(1, &frame(&packet)));
            assert_eq!(delivered, plain(&packet), "{what}");
        }
    }
}

const MERGE: Merge = Merge { tcp: true, udp: true };

/// The node under test.
fn node(merge: Merge) -> Node {
    let kind = Kind {
        merge,
        inner_mtu: MTU,
        ..Kind::default()
    };
    Node::new(2, kind, &[1, 3])
}

/// A packet as node 1 sends it to node 2.
fn frame(inner: &[u8]) -> Vec<u8> {
    let header = VxlanHeader {
        vni: Some(Vxlan::of(1).vni),
        dst: mac(2),
        src: mac(1),
        ethertype: if inner[0] >> 4 == 4 {
            ethertype::IPV4
        } else {
            ethertype::IPV6
        },
    };
    [&header.emit()[..], inner].concat()
}

/// Receives a message of one packet and gives what the host gets, which is one frame, and nothing is counted against it.
fn deliver(node: &mut Node, what: &str, message: Message) -> (VirtioHeader, Vec<u8>) {
    let mut delivered = node.receive([message], start());
    assert_eq!(node.drops(), [], "{what}");
    assert_eq!(delivered.len(), 1, "{what}");
    delivered.remove(0)
}

/// A packet with nothing left to do.
fn plain(packet: &[u8]) -> (VirtioHeader, Vec<u8>) {
    (VirtioHeader::default(), packet.to_vec())
}

/// TCP and UDP in both families.
fn kinds(payload: usize) -> [(&'static str, Vec<u8>); 4] {
    let of = |src, dst| Packet {
        payload,
        ..Packet::new(src, dst)
    };
    let (four, six) = (of(v4(1, 2), v4(2, 2)), of(v6(1, 2), v6(2, 2)));
    [
        ("TCP over IPv4", four.tcp()),
        ("UDP over IPv4", four.udp()),
        ("TCP over IPv6", six.tcp()),
        ("UDP over IPv6", six.udp()),
    ]
}

/// Where a packet's L4 header starts, and where in it the checksum is.
fn place(packet: &[u8]) -> (usize, usize) {
    let ip = IpHeader::parse(packet).unwrap();
    let offset = match ip.protocol {
        protocol::TCP => tcp::CHECKSUM.start,
        _ => udp::CHECKSUM.start,
    };
    (ip.l4, offset)
}

/// The packet with only the pseudo-header sum in its checksum field.
fn half_done(packet: &[u8]) -> Vec<u8> {
    let ip = IpHeader::parse(packet).unwrap();
    let (start, offset) = place(packet);
    let mut half = packet.to_vec();
    let pseudo = ip.pseudo(ip.l4_len()).fold();
    half[start + offset..][..2].copy_from_slice(&pseudo.to_be_bytes());
    half
}

/// The packet with its last two bytes such that its right checksum is the pseudo-header sum.
fn by_chance(packet: Vec<u8>) -> Vec<u8> {
    let mut packet = half_done(&packet);
    let ip = IpHeader::parse(&packet).unwrap();
    let last = packet.len() - 2;
    assert_eq!((last - ip.l4) % 2, 0);
    packet[last..].fill(0);
    let rest = (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..])).finish();
    packet[last..].copy_from_slice(&rest.to_be_bytes());
    packet
}

/// The packet with its congestion codepoint and a class beside it.
fn marked(mut packet: Vec<u8>, ecn: Ecn) -> Vec<u8> {
    if packet[0] >> 4 == 4 {
        packet[1] = 0xb8;
        refresh_v4(&mut packet);
    } else {
        packet[..2].copy_from_slice(&[0x6b, 0x80]);
    }
    set_ecn(&mut packet, ecn);
    packet
}

/// A packet that says it is a fragment, its checksum looking half done.
fn fragment(packet: Vec<u8>, flags_and_offset: u16) -> Vec<u8> {
    let mut packet = half_done(&packet);
    packet[6..8].copy_from_slice(&flags_and_offset.to_be_bytes());
    refresh_v4(&mut packet);
    packet
}

/// The same for IPv6.
fn fragment_v6(packet: Vec<u8>, offset_and_more: u16) -> Vec<u8> {
    let packet = half_done(&packet);
    let [more, offset] = [offset_and_more as u8, (offset_and_more >> 8) as u8];
    let header = [packet[6], 0, offset, more, 0, 0, 0, 9];
    let mut out = [&packet[..40], &header, &packet[40..]].concat();
    let len = (out.len() - 40) as u16;
    out[4..6].copy_from_slice(&len.to_be_bytes());
    out[6] = 44;
    out
}
