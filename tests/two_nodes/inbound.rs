//! One packet from the underlay: taken, or refused for what is wrong with it.

use std::net::SocketAddr;

use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::Message;
use kersey::dataplane::stats::DropReason;
use kersey::wire::ip::{Ecn, IpHeader};

use crate::decisions::{Blamed, accepted, ip, is_error, node, refused};
use crate::node::{Kind, Node, start, underlay, v4, v6};
use crate::packets::{Packet, checksums_hold, from_peer, refresh_v4};

#[test]
fn inner_addresses_that_are_not_the_peers_or_not_ours_are_refused() {
    use DropReason::{ForeignSource, MartianSource, NotForUs, NotUnicast, SpoofedSource};
    for (what, src, dst, reason) in [
        ("another peer's subnet", v4(3, 2), v4(2, 2), SpoofedSource),
        ("a subnet nobody has", v4(77, 2), v4(2, 2), SpoofedSource),
        ("the internet", ip("8.8.8.8"), v4(2, 2), ForeignSource),
        ("another peer's node", ip("192.0.2.3"), v4(2, 2), ForeignSource),
        ("loopback", ip("127.0.0.1"), v4(2, 2), MartianSource),
        ("unspecified", ip("0.0.0.0"), v4(2, 2), MartianSource),
        ("broadcast", ip("255.255.255.255"), v4(2, 2), MartianSource),
        ("reserved", ip("240.0.0.1"), v4(2, 2), MartianSource),
        ("multicast", ip("224.0.0.1"), v4(2, 2), MartianSource),
        ("link-local", ip("169.254.1.1"), v4(2, 2), MartianSource),
        ("our own pod", v4(2, 9), v4(2, 2), MartianSource),
        ("to the peer itself", v4(1, 2), v4(1, 3), NotForUs),
        ("to another peer", v4(1, 2), v4(3, 2), NotForUs),
        ("to the internet", v4(1, 2), ip("8.8.8.8"), NotForUs),
        ("to our underlay address", v4(1, 2), ip("192.0.2.2"), NotForUs),
        ("to multicast", v4(1, 2), ip("239.1.2.3"), NotUnicast),
        ("to broadcast", v4(1, 2), ip("255.255.255.255"), NotUnicast),
        ("to loopback", v4(1, 2), ip("127.0.0.1"), NotUnicast),
        ("to link-local", v4(1, 2), ip("169.254.169.254"), NotUnicast),
        ("v6: another peer's subnet", v6(3, 2), v6(2, 2), SpoofedSource),
        ("v6: a subnet nobody has", v6(0x77, 2), v6(2, 2), SpoofedSource),
        ("v6: the internet", ip("2001:4860::8888"), v6(2, 2), ForeignSource),
        ("v6: loopback", ip("::1"), v6(2, 2), MartianSource),
        ("v6: unspecified", ip("::"), v6(2, 2), MartianSource),
        ("v6: mapped", ip("::ffff:10.244.1.2"), v6(2, 2), MartianSource),
        ("v6: multicast", ip("ff02::1"), v6(2, 2), MartianSource),
        ("v6: link-local", ip("fe80::1"), v6(2, 2), MartianSource),
        ("v6: our own pod", v6(2, 9), v6(2, 2), MartianSource),
        ("v6: to another peer", v6(1, 2), v6(3, 2), NotForUs),
        ("v6: to the internet", v6(1, 2), ip("2001:4860::8888"), NotForUs),
        ("v6: to multicast", v6(1, 2), ip("ff02::1"), NotUnicast),
        ("v6: to link-local", v6(1, 2), ip("fe80::1"), NotUnicast),
        ("v6: to loopback", v6(1, 2), ip("::1"), NotUnicast),
    ] {
        let mut node = node(IngressCheck::Strict);
        refused(
            &mut node,
            what,
            from_peer(1, &Packet::new(src, dst).udp()),
            reason,
            Blamed::Peer1,
        );
    }
}

#[test]
fn the_peers_own_node_may_speak_with_its_underlay_address() {
    let mut node = node(IngressCheck::Strict);
    accepted(
        &mut node,
        "host to pod",
        from_peer(1, &Packet::new(ip("192.0.2.1"), v4(2, 2)).udp()),
    );
}

#[test]
fn a_stranger_is_refused_whatever_it_carries() {
    let inner = Packet::new(v4(1, 2), v4(2, 2)).udp();
    let mut node = node(IngressCheck::Strict);
    let message = Message {
        addr: SocketAddr::from(([198, 51, 100, 9], 8285)),
        ..from_peer(1, &inner)
    };
    refused(
        &mut node,
        "a stranger",
        message,
        DropReason::UnknownPeer,
        Blamed::Nobody,
    );
    // A run counts as the packets it holds.
    let run = Message {
        addr: SocketAddr::from(([198, 51, 100, 9], 8285)),
        bytes: inner.repeat(5),
        segment_size: inner.len(),
        ecn: Ecn::NotEct,
    };
    assert!(node.receive([run], start()).is_empty());
    assert_eq!(node.drops(), [(DropReason::UnknownPeer, 6)]);
    // So does a datagram without any; from port 0 too, which is no sign of a datagram the kernel cut.
    for (port, count) in [(8285, 7), (0, 8)] {
        let empty = Message {
            addr: SocketAddr::from(([198, 51, 100, 9], port)),
            ..from_peer(1, &[])
        };
        assert!(node.receive([empty], start()).is_empty());
        assert_eq!(node.drops(), [(DropReason::UnknownPeer, count)]);
    }
    // A known address may use any port: peers spread their flows over several.
    let other_port = Message {
        addr: SocketAddr::new(underlay(1).ip(), 40_000),
        ..from_peer(1, &inner)
    };
    assert_eq!(node.receive([other_port], start()).len(), 1);
}

#[test]
fn loose_takes_known_sources_from_anywhere() {
    let stranger = |inner: &[u8]| Message {
        addr: ([198, 51, 100, 9], 1).into(),
        ..from_peer(1, inner)
    };
    let good = Packet::new(v4(1, 2), v4(2, 2)).udp();
    accepted(
        &mut node(IngressCheck::Loose),
        "leased source from a stranger",
        stranger(&good),
    );
    accepted(
        &mut node(IngressCheck::Loose),
        "another peer's source",
        from_peer(3, &good),
    );
    for (what, src, dst, reason) in [
        (
            "a subnet nobody has",
            v4(77, 2),
            v4(2, 2),
            DropReason::SpoofedSource,
        ),
        ("the internet", ip("8.8.8.8"), v4(2, 2), DropReason::ForeignSource),
        ("our own pod", v4(2, 9), v4(2, 2), DropReason::MartianSource),
        ("to another peer", v4(1, 2), v4(3, 2), DropReason::NotForUs),
        ("to multicast", v4(1, 2), ip("239.1.2.3"), DropReason::NotUnicast),
    ] {
        let message = stranger(&Packet::new(src, dst).udp());
        refused(
            &mut node(IngressCheck::Loose),
            what,
            message,
            reason,
            Blamed::Nobody,
        );
    }
}

#[test]
fn off_takes_what_the_format_allows() {
    let stranger = |inner: &[u8]| Message {
        addr: ([198, 51, 100, 9], 1).into(),
        ..from_peer(1, inner)
    };
    for (what, src, dst) in [
        ("the internet", ip("8.8.8.8"), v4(2, 2)),
        ("our own pod", v4(2, 9), v4(2, 2)),
        ("to another peer", v4(1, 2), v4(3, 2)),
        ("to multicast", v4(1, 2), ip("239.1.2.3")),
    ] {
        accepted(
            &mut node(IngressCheck::Off),
            what,
            stranger(&Packet::new(src, dst).udp()),
        );
    }
    let mut bad = Packet::new(v4(1, 2), v4(2, 2)).udp();
    bad[10] ^= 1;
    let reason = DropReason::BadHeaderChecksum;
    refused(
        &mut node(IngressCheck::Off),
        "bad checksum",
        stranger(&bad),
        reason,
        Blamed::Nobody,
    );
    let expired = Packet {
        ttl: 0,
        ..Packet::new(v4(1, 2), v4(2, 2))
    }
    .udp();
    let reason = DropReason::TtlExpired;
    refused(
        &mut node(IngressCheck::Off),
        "TTL 0",
        stranger(&expired),
        reason,
        Blamed::Nobody,
    );
}

#[test]
fn a_ttl_that_runs_out_is_refused_and_told() {
    for (src, dst, own, kind) in [
        (v4(1, 2), v4(2, 2), v4(2, 0), [11, 0]),
        (v6(1, 2), v6(2, 2), v6(2, 0), [3, 0]),
    ] {
        for (ttl, told) in [(0, 0), (1, 1)] {
            let mut node = node(IngressCheck::Strict);
            let packet = Packet {
                ttl,
                ..Packet::new(src, dst)
            }
            .udp();
            assert!(
                node.receive([from_peer(1, &packet)], start()).is_empty(),
                "{dst} TTL {ttl}"
            );
            assert_eq!(node.drops(), [(DropReason::TtlExpired, 1)], "{dst} TTL {ttl}");
            assert_eq!(
                node.drops_of_peer(1),
                [(DropReason::TtlExpired, 1)],
                "{dst} TTL {ttl}"
            );
            let answers = std::mem::take(&mut node.inbound.device().answers);
            assert_eq!(answers.len(), told, "{dst} TTL {ttl}");
            for answer in answers {
                is_error(&answer, own, src, kind, &packet);
            }
        }
        let mut node = node(IngressCheck::Strict);
        let packet = Packet {
            ttl: 2,
            ..Packet::new(src, dst)
        }
        .udp();
        let delivered = node.receive([from_peer(1, &packet)], start());
        let [(_, delivered)] = &delivered[..] else {
            panic!("{dst} TTL 2")
        };
        assert_eq!(IpHeader::parse(delivered).unwrap().ttl, 1);
        assert!(checksums_hold(delivered));
    }
}

#[test]
fn headers_that_are_wrong_are_refused_by_what_is_wrong() {
    let good = Packet::new(v4(1, 2), v4(2, 2)).udp();
    let good_v6 = Packet::new(v6(1, 2), v6(2, 2)).udp();
    let patched = |packet: &[u8], patches: &[(usize, u8)]| {
        let mut packet = packet.to_vec();
        for &(at, value) in patches {
            packet[at] = value;
        }
        packet
    };
    let fixed = |mut packet: Vec<u8>| {
        refresh_v4(&mut packet);
        packet
    };
    let mut chain = good_v6[..40].to_vec();
    chain[6] = 60;
    chain.extend([60, 0, 0, 0, 0, 0, 0, 0].repeat(9));
    chain[5] = 72;
    for (what, packet, reason) in [
        ("version 5", patched(&good, &[(0, 0x55)]), DropReason::BadVersion),
        ("version 0", patched(&good, &[(0, 0x05)]), DropReason::BadVersion),
        (
            "header of 16 bytes",
            fixed(patched(&good, &[(0, 0x44)])),
            DropReason::BadHeaderLength,
        ),
        (
            "length below the header",
            fixed(patched(&good, &[(2, 0), (3, 19)])),
            DropReason::BadLength,
        ),
        (
            "length beyond the datagram",
            fixed(patched(&good, &[(2, 1)])),
            DropReason::BadLength,
        ),
        (
            "one bit of the checksum",
            patched(&good, &[(11, good[11] ^ 1)]),
            DropReason::BadHeaderChecksum,
        ),
        (
            "one bit of the source",
            patched(&good, &[(15, good[15] ^ 1)]),
            DropReason::BadHeaderChecksum,
        ),
        (
            "checksum 0",
            patched(&good, &[(10, 0), (11, 0)]),
            DropReason::BadHeaderChecksum,
        ),
        (
            "v6: length beyond the datagram",
            patched(&good_v6, &[(4, 1)]),
            DropReason::BadLength,
        ),
        (
            "v6: nine extension headers",
            chain,
            DropReason::BadExtensionHeaders,
        ),
        (
            "v6: options beyond the packet",
            patched(&good_v6, &[(6, 0), (41, 200)]),
            DropReason::Truncated,
        ),
    ] {
        refused(
            &mut node(IngressCheck::Strict),
            what,
            from_peer(1, &packet),
            reason,
            Blamed::Peer1,
        );
    }
}

#[test]
fn a_packet_cut_at_any_byte_is_refused() {
    for (packet, header) in [
        (Packet::new(v4(1, 2), v4(2, 2)).udp(), 20),
        (Packet::new(v6(1, 2), v6(2, 2)).udp(), 40),
    ] {
        for len in 0..packet.len() {
            let reason = if len < header {
                DropReason::Truncated
            } else {
                DropReason::BadLength
            };
            let what = format!("{len} of {} bytes", packet.len());
            let cut = from_peer(1, &packet[..len]);
            refused(&mut node(IngressCheck::Strict), &what, cut, reason, Blamed::Peer1);
        }
    }
}

#[test]
fn trailing_bytes_are_not_delivered() {
    for packet in [
        Packet::new(v4(1, 2), v4(2, 2)).udp(),
        Packet::new(v6(1, 2), v6(2, 2)).udp(),
    ] {
        for trailing in [1, 7, 1000] {
            let mut long = packet.clone();
            long.resize(packet.len() + trailing, 0xee);
            let mut node = node(IngressCheck::Strict);
            let delivered = node.receive([from_peer(1, &long)], start());
            let [(_, delivered)] = &delivered[..] else {
                panic!("{trailing} trailing bytes")
            };
            assert_eq!(delivered.len(), packet.len());
            assert!(checksums_hold(delivered));
            assert!(node.drops().is_empty());
        }
    }
}

#[test]
fn one_bad_packet_in_a_run_does_not_harm_its_neighbours() {
    let good = Packet::new(v4(1, 2), v4(2, 2)).udp();
    let spoofed = Packet::new(v4(3, 2), v4(2, 2)).udp();
    let mut broken = good.clone();
    broken[10] ^= 0xff;
    let bytes = [&good[..], &spoofed, &good, &broken, &good].concat();
    let mut node = Node::new(
        2,
        Kind {
            merge: Merge::NONE,
            ..Kind::default()
        },
        &[1, 3],
    );
    let delivered = node.receive(
        [Message {
            addr: underlay(1),
            bytes,
            segment_size: good.len(),
            ecn: Ecn::NotEct,
        }],
        start(),
    );
    assert_eq!(delivered.len(), 3);
    assert_eq!(
        node.drops(),
        [(DropReason::BadHeaderChecksum, 1), (DropReason::SpoofedSource, 1)]
    );
}
