//! One packet, one decision: each lands in exactly its own counter, and nothing else happens.
//!
//! The node under test is number 2; it knows 1 and 3.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::Message;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::dataplane::{DeviceError, SendError};
use kersey::wire::ip::{Ecn, IpHeader};
use kersey::wire::virtio::{Gso, GsoKind, VirtioHeader};

use crate::node::{Kind, Node, NodeOf, Tunnel, start, underlay, v4, v6};
use crate::packets::{Packet, checksums_hold, dont_fragment, from_peer, refresh_v4};

/// The node under test.
fn node(check: IngressCheck) -> Node {
    Node::new(
        2,
        Kind {
            check,
            ..Kind::default()
        },
        &[1, 3],
    )
}

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

#[test]
fn no_route_is_answered_with_net_unreachable_at_a_limited_rate() {
    for (src, dst, own, kind) in [
        (v4(2, 7), v4(99, 1), v4(2, 0), [3, 0]),
        (v6(2, 7), v6(0x99, 1), v6(2, 0), [1, 0]),
    ] {
        let mut node = node(IngressCheck::Strict);
        let packet = Packet::new(src, dst).udp();
        let flood = |node: &mut Node, at| {
            node.send(vec![(VirtioHeader::default(), packet.clone()); 100], start() + at)
        };
        assert!(flood(&mut node, Duration::ZERO).is_empty());
        assert_eq!(node.drops(), [(DropReason::NoRoute, 100)], "{dst}");
        let answers = std::mem::take(&mut node.outbound.device().answers);
        // How many is a matter of chance, within bounds: each takes 200 to 300 ms to come back, and a second's worth may be owed.
        let sent = answers.len();
        assert!((4..=6).contains(&sent), "{dst}: {sent} at once");
        assert_eq!(node.counted(Count::IcmpSent), sent as u64);
        assert_eq!(node.counted(Count::IcmpLimited), 100 - sent as u64);
        for answer in &answers {
            is_error(answer, own, src, kind, &packet);
        }
        flood(&mut node, Duration::from_millis(500));
        let more = std::mem::take(&mut node.outbound.device().answers).len();
        assert!((1..=3).contains(&more), "{dst}: {more} half a second later");
        flood(&mut node, Duration::from_millis(999));
        let last = node.outbound.device().answers.len();
        assert!(
            last > 0 && sent + more + last <= 10,
            "{dst}: {sent}, {more} and {last} within a second"
        );
    }
}

#[test]
fn what_is_not_this_nodes_is_not_sent() {
    use DropReason::{ForeignSource, MartianSource, SpoofedSource};
    for (what, src, dst, strict, loose) in [
        ("our pod", v4(2, 9), v4(1, 2), None, None),
        ("our node", ip("192.0.2.2"), v4(1, 2), None, None),
        ("another's pod", v4(3, 2), v4(1, 2), Some(SpoofedSource), None),
        (
            "the receiver's own",
            v4(1, 9),
            v4(1, 2),
            Some(SpoofedSource),
            None,
        ),
        ("nobody's pod", v4(77, 2), v4(1, 2), Some(SpoofedSource), None),
        (
            "another node",
            ip("192.0.2.3"),
            v4(1, 2),
            Some(ForeignSource),
            Some(ForeignSource),
        ),
        (
            "the internet",
            ip("8.8.8.8"),
            v4(1, 2),
            Some(ForeignSource),
            Some(ForeignSource),
        ),
        ("v6: our pod", v6(2, 9), v6(1, 2), None, None),
        ("v6: another's pod", v6(3, 2), v6(1, 2), Some(SpoofedSource), None),
        (
            "v6: the internet",
            ip("2001:4860::8888"),
            v6(1, 2),
            Some(ForeignSource),
            Some(ForeignSource),
        ),
        (
            "loopback",
            ip("127.0.0.1"),
            v4(1, 2),
            Some(MartianSource),
            Some(MartianSource),
        ),
    ] {
        for (check, refused) in [(IngressCheck::Strict, strict), (IngressCheck::Loose, loose)] {
            let mut node = node(check);
            let sent = node.send(
                vec![(VirtioHeader::default(), Packet::new(src, dst).udp())],
                start(),
            );
            let expected: Vec<_> = refused.map(|reason| (reason, 1)).into_iter().collect();
            assert_eq!(node.drops(), expected, "{what}, {check:?}");
            assert_eq!(sent.len(), usize::from(refused.is_none()), "{what}, {check:?}");
            assert!(node.outbound.device().answers.is_empty(), "{what}, {check:?}");
        }
    }
    let mut node = node(IngressCheck::Off);
    let foreign = Packet::new(ip("8.8.8.8"), v4(1, 2)).udp();
    assert_eq!(
        node.send(vec![(VirtioHeader::default(), foreign)], start()).len(),
        1
    );
}

#[test]
fn what_would_come_back_is_a_loop() {
    for (what, src, dst, answers) in [
        ("for a pod of ours that is not there", v4(2, 9), v4(2, 77), 1),
        ("for a pod of ours, from a peer", ip("192.0.2.2"), v4(2, 77), 1),
        ("the tunnel's own packet", ip("192.0.2.2"), ip("192.0.2.1"), 0),
        ("v6: for a pod of ours", v6(2, 9), v6(2, 77), 1),
    ] {
        let mut node = node(IngressCheck::Strict);
        let sent = node.send(
            vec![(VirtioHeader::default(), Packet::new(src, dst).udp())],
            start(),
        );
        assert!(sent.is_empty(), "{what}");
        assert_eq!(node.drops(), [(DropReason::Loop, 1)], "{what}");
        assert_eq!(node.outbound.device().answers.len(), answers, "{what}");
    }
}

#[test]
fn what_waited_while_we_were_stopped_is_dropped_and_counted() {
    let mut node = node(IngressCheck::Strict);
    let waiting = Packet::new(v4(2, 9), v4(1, 2)).udp();
    node.outbound
        .device()
        .from_host
        .extend(vec![(VirtioHeader::default(), waiting.clone()); 150]);
    let arrived = from_peer(1, &Packet::new(v4(1, 2), v4(2, 9)).udp());
    node.inbound
        .underlay()
        .incoming
        .extend(vec![arrived.clone(); 300]);
    node.outbound.discard_waiting().unwrap();
    node.inbound.discard_waiting().unwrap();
    assert_eq!(node.drops(), [(DropReason::Stale, 450)]);
    // And then it goes on.
    assert_eq!(
        node.send(vec![(VirtioHeader::default(), waiting)], start()).len(),
        1
    );
    assert_eq!(node.receive([arrived], start()).len(), 1);
}

#[test]
fn what_may_not_be_answered_is_only_counted() {
    let mut node = node(IngressCheck::Strict);
    let mut fragment = Packet::new(v4(2, 7), v4(99, 1)).udp();
    fragment[7] = 9;
    refresh_v4(&mut fragment);
    node.send(vec![(VirtioHeader::default(), fragment)], start());
    let martian = Packet::new(ip("127.0.0.1"), v4(99, 1)).udp();
    let multicast = Packet::new(v4(2, 7), ip("239.1.1.1")).udp();
    node.send(
        vec![
            (VirtioHeader::default(), martian),
            (VirtioHeader::default(), multicast),
        ],
        start(),
    );
    assert_eq!(
        node.drops(),
        [
            (DropReason::NoRoute, 1),
            (DropReason::NotUnicast, 1),
            (DropReason::MartianSource, 1)
        ]
    );
    assert!(node.outbound.device().answers.is_empty());
}

#[test]
fn an_outbound_ttl_or_hop_limit_that_runs_out_is_answered() {
    for (src, dst, own, kind) in [
        (v4(2, 7), v4(1, 1), v4(2, 0), [11, 0]),
        (v6(2, 7), v6(1, 1), v6(2, 0), [3, 0]),
    ] {
        let mut node = node(IngressCheck::Strict);
        let packet = Packet {
            ttl: 1,
            ..Packet::new(src, dst)
        }
        .udp();
        assert!(
            node.send(vec![(VirtioHeader::default(), packet.clone())], start())
                .is_empty()
        );
        assert_eq!(node.drops(), [(DropReason::TtlExpired, 1)]);
        assert_eq!(node.peer_drops(dst), [(DropReason::TtlExpired, 1)]);
        is_error(&node.outbound.device().answers[0], own, src, kind, &packet);
    }
}

#[test]
fn a_packet_too_big_for_the_peer_is_answered_with_the_mtu() {
    let big = |src, dst| {
        Packet {
            payload: 1445,
            ..Packet::new(src, dst)
        }
        .udp()
    };
    let v6_packet = Packet {
        payload: 1425,
        ..Packet::new(v6(2, 7), v6(1, 1))
    }
    .udp();
    let mtu = 1472u16.to_be_bytes();
    for (packet, own, kind, mtu_at) in [
        (dont_fragment(big(v4(2, 7), v4(1, 1))), v4(2, 0), [3, 4], 26),
        (v6_packet, v6(2, 0), [2, 0], 46),
    ] {
        assert_eq!(packet.len(), 1473);
        let ip = IpHeader::parse(&packet).unwrap();
        let mut node = node(IngressCheck::Strict);
        assert!(
            node.send(vec![(VirtioHeader::default(), packet.clone())], start())
                .is_empty()
        );
        assert_eq!(node.drops(), [(DropReason::TooBig, 1)]);
        assert_eq!(node.peer_drops(ip.addrs.dst()), [(DropReason::TooBig, 1)]);
        let answer = &node.outbound.device().answers[0];
        is_error(answer, own, ip.addrs.src(), kind, &packet);
        assert_eq!(answer[mtu_at..mtu_at + 2], mtu, "the MTU it says");
    }
    // Without DF the underlay fragments the datagram.
    let mut node = node(IngressCheck::Strict);
    assert_eq!(
        node.send(vec![(VirtioHeader::default(), big(v4(2, 7), v4(1, 1)))], start())
            .len(),
        1
    );
    assert!(node.drops().is_empty());
}

#[test]
fn a_super_packet_is_too_big_only_if_its_segments_are() {
    let packet = Packet {
        payload: 20_000,
        ..Packet::new(v4(2, 7), v4(1, 1))
    }
    .udp();
    let described = |size| VirtioHeader {
        checksum: None,
        gso: Some(Gso {
            kind: GsoKind::Udp,
            size,
            header_len: 28,
        }),
    };
    let mut node = node(IngressCheck::Strict);
    let sent = node.send(vec![(described(1444), packet.clone())], start());
    assert_eq!(
        sent.iter().map(|message| message.bytes.len()).sum::<usize>(),
        20_000 + 14 * 28
    );
    assert!(node.send(vec![(described(1445), packet)], start()).is_empty());
    assert_eq!(node.drops(), [(DropReason::TooBig, 1)]);
    assert_eq!(node.outbound.device().answers.len(), 1);
}

#[test]
fn datagrams_of_a_udp_super_packet_arrive_in_order() {
    for refuses in [vec![], vec![GsoKind::Udp]] {
        for merge in [Merge { tcp: true, udp: true }, Merge::NONE] {
            let mut nodes = [
                Node::new(
                    1,
                    Kind {
                        merge,
                        ..Kind::default()
                    },
                    &[2],
                ),
                Node::new(
                    2,
                    Kind {
                        merge,
                        ..Kind::default()
                    },
                    &[1],
                ),
            ];
            nodes[1].inbound.device().refuses.clone_from(&refuses);
            let packet = Packet {
                payload: 30_500,
                ..Packet::new(v4(1, 2), v4(2, 2))
            }
            .udp();
            let gso = Gso {
                kind: GsoKind::Udp,
                size: 1000,
                header_len: 28,
            };
            let header = VirtioHeader {
                checksum: None,
                gso: Some(gso),
            };
            let messages = nodes[0].send(vec![(header, packet.clone())], start());
            let messages = messages.into_iter().map(|message| Message {
                addr: underlay(1),
                ..message
            });
            let delivered = nodes[1].receive(messages, start());
            let payload: Vec<u8> = delivered
                .iter()
                .flat_map(|(_, packet)| packet[28..].to_vec())
                .collect();
            assert_eq!(payload, packet[28..], "{merge:?} {refuses:?}");
            assert!(
                delivered.iter().all(|(_, packet)| checksums_hold(packet)),
                "{merge:?} {refuses:?}"
            );
            let frames = if merge.udp && refuses.is_empty() { 1 } else { 31 };
            assert_eq!(delivered.len(), frames, "{merge:?} {refuses:?}");
        }
    }
}

#[test]
fn merging_stays_off_after_the_device_refused_it() {
    let mut nodes = [
        Node::new(1, Kind::default(), &[2]),
        Node::new(2, Kind::default(), &[1]),
    ];
    nodes[1].inbound.device().refuses = vec![GsoKind::Udp];
    let packet = Packet {
        payload: 5_000,
        ..Packet::new(v4(1, 2), v4(2, 2))
    }
    .udp();
    let header = VirtioHeader {
        checksum: None,
        gso: Some(Gso {
            kind: GsoKind::Udp,
            size: 1000,
            header_len: 28,
        }),
    };
    for _ in 0..3 {
        let messages = nodes[0].send(vec![(header, packet.clone())], start());
        let messages = messages.into_iter().map(|message| Message {
            addr: underlay(1),
            ..message
        });
        assert_eq!(nodes[1].receive(messages, start()).len(), 5);
    }
    assert_eq!(
        nodes[1].counted(Count::DeviceFallbacks),
        1,
        "only the first was tried"
    );
    assert!(nodes[1].drops().is_empty());
}

#[test]
fn a_loop_between_two_nodes_ends() {
    // Each routes 10.244.9.0/24 to the other, and neither checks; the hosts send what they get straight back.
    let kind = Kind {
        check: IngressCheck::Off,
        ..Kind::default()
    };
    let mut nodes = [Node::new(1, kind, &[2]), Node::new(2, kind, &[1])];
    for (node, via) in [(0, 2), (1, 1)] {
        let routes = nodes[node].routes.clone();
        let mut table = (*routes.current()).clone();
        let index = table.lookup(v4(via, 2)).unwrap();
        let peer = table.peer(index).unwrap().clone();
        table.insert(kersey::addr::Prefix::V4("10.244.9.0/24".parse().unwrap()), peer);
        routes.publish(table);
    }
    let mut packets = vec![(
        VirtioHeader::default(),
        Packet {
            ttl: 255,
            ..Packet::new(v4(1, 2), v4(9, 2))
        }
        .udp(),
    )];
    let mut crossings = 0;
    for turn in 0.. {
        let (from, to) = (turn % 2, (turn + 1) % 2);
        let sent = nodes[from].send(std::mem::take(&mut packets), start());
        crossings += sent.len();
        let from = nodes[from].underlay();
        packets = nodes[to].receive(
            sent.into_iter().map(|message| Message {
                addr: from,
                ..message
            }),
            start(),
        );
        if packets.is_empty() {
            break;
        }
    }
    // Each crossing costs two: 255 is spent after 127 of them, the default of 64 after 32.
    assert_eq!(crossings, 127);
    let expired: u64 = nodes
        .iter()
        .map(|node| node.drops().iter().map(|&(_, n)| n).sum::<u64>())
        .sum();
    assert_eq!(expired, 1);

    // With checks on, the first crossing is the last.
    let mut strict = node(IngressCheck::Strict);
    refused(
        &mut strict,
        "a loop",
        from_peer(1, &Packet::new(v4(1, 2), v4(9, 2)).udp()),
        DropReason::NotForUs,
        Blamed::Peer1,
    );
}

#[test]
fn a_peer_that_cannot_be_sent_to_does_not_harm_the_others() {
    for (error, reason) in [
        (SendError::Busy, DropReason::UnderlayBusy),
        (SendError::Unreachable, DropReason::UnderlayUnreachable),
        (SendError::Denied, DropReason::UnderlayDenied),
        (SendError::TooBig, DropReason::TooBig),
        (SendError::Refused, DropReason::UnderlayRefused),
    ] {
        let mut node = node(IngressCheck::Strict);
        node.outbound.underlay().failing = vec![(underlay(1), error)];
        let packets: Vec<_> = [1, 3, 1, 3, 1]
            .map(|peer| (VirtioHeader::default(), Packet::new(v4(2, 7), v4(peer, 2)).udp()))
            .into();
        let sent = node.send(packets, start());
        assert!(
            sent.iter().all(|message| message.addr == underlay(3)),
            "{error:?}"
        );
        assert_eq!(
            sent.iter()
                .map(|message| message.bytes.len() / message.segment_size)
                .sum::<usize>(),
            2,
            "{error:?}"
        );
        assert_eq!(node.drops(), [(reason, 3)], "{error:?}");
        assert_eq!(node.drops_of_peer(1), [(reason, 3)], "{error:?}");
        assert!(node.drops_of_peer(3).is_empty(), "{error:?}");
        let told = usize::from(error == SendError::TooBig);
        assert_eq!(node.outbound.device().answers.len(), told, "{error:?}");
    }
}

#[test]
fn a_device_in_trouble_is_counted_and_one_that_is_gone_is_an_error() {
    let good = from_peer(1, &Packet::new(v4(1, 2), v4(2, 2)).udp());
    for (error, reason) in [
        (DeviceError::Refused, DropReason::DeviceRefused),
        (DeviceError::Busy, DropReason::DeviceBusy),
        (DeviceError::Down, DropReason::DeviceDown),
    ] {
        let mut node = node(IngressCheck::Strict);
        node.inbound.device().broken = Some(error);
        assert!(node.receive([good.clone(), good.clone()], start()).is_empty());
        assert_eq!(node.drops(), [(reason, 2)]);
        node.inbound.device().broken = None;
        assert_eq!(node.receive([good.clone()], start()).len(), 1, "{error:?} passes");
    }
    let mut node = node(IngressCheck::Strict);
    node.inbound.device().broken = Some(DeviceError::Gone);
    node.inbound.underlay().incoming.push_back(good);
    assert_eq!(
        node.inbound.turn(start()).unwrap_err().raw_os_error(),
        Some(libc::EBADFD)
    );
    node.outbound.device().broken = Some(DeviceError::Gone);
    assert_eq!(
        node.outbound.turn(start()).unwrap_err().raw_os_error(),
        Some(libc::EBADFD)
    );
}

#[test]
fn drops_are_counted_against_the_peer_that_sent_even_after_routes_changed() {
    let mut node = node(IngressCheck::Strict);
    let routes = node.routes.clone();
    let mut table = (*routes.current()).clone();
    // Node 1 loses its IPv6 half, and a new peer comes in its place.
    table.remove(kersey::addr::Prefix::V6("fd00:244:0:1::/64".parse().unwrap()));
    let peer = table.peer(table.lookup(v4(3, 2)).unwrap()).unwrap().clone();
    let stats = kersey::dataplane::stats::PeerStats::new(1);
    let hop = kersey::backend::udp::UdpHop(underlay(4));
    let fourth = kersey::dataplane::route::Peer { hop, stats, ..peer };
    table.insert(kersey::addr::Prefix::V4("10.244.4.0/24".parse().unwrap()), fourth);
    routes.publish(table);
    let spoofed = from_peer(1, &Packet::new(v4(3, 2), v4(2, 2)).udp());
    refused(
        &mut node,
        "spoofed",
        spoofed,
        DropReason::SpoofedSource,
        Blamed::Peer1,
    );
    assert!(node.drops_of_peer(4).is_empty());
}

/// Whose counter a refusal goes to, besides the worker's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blamed {
    Nobody,
    Peer1,
}

/// Receives a message of one packet and checks that it is counted under `reason` once, and that nothing else happens.
pub(crate) fn refused<E: Tunnel>(
    node: &mut NodeOf<E>,
    what: &str,
    message: Message,
    reason: DropReason,
    blamed: Blamed,
) {
    let delivered = node.receive([message], start());
    assert!(delivered.is_empty(), "{what}: delivered");
    assert_eq!(node.drops(), [(reason, 1)], "{what}");
    let by_peer = if blamed == Blamed::Peer1 {
        vec![(reason, 1)]
    } else {
        vec![]
    };
    assert_eq!(node.drops_of_peer(1), by_peer, "{what}: peer 1");
    assert!(node.drops_of_peer(3).is_empty(), "{what}: peer 3");
    assert_eq!(node.counted(Count::InboundPackets), 0, "{what}");
    assert!(node.inbound.device().answers.is_empty(), "{what}: answered");
}

/// Receives a message of one packet and checks that it is delivered, and that nothing is counted against it.
fn accepted(node: &mut Node, what: &str, message: Message) {
    let packet = message.bytes.clone();
    let delivered = node.receive([message], start());
    let [(_, delivered)] = &delivered[..] else {
        panic!("{what}: not delivered")
    };
    assert_eq!(delivered.len(), packet.len(), "{what}");
    assert!(checksums_hold(delivered), "{what}");
    assert!(node.drops().is_empty(), "{what}");
}

/// Checks an ICMP error: sender, receiver, type and code, checksum, and that it quotes `offender`.
fn is_error(error: &[u8], from: IpAddr, to: IpAddr, kind: [u8; 2], offender: &[u8]) {
    let ip = IpHeader::parse(error).unwrap();
    assert_eq!((ip.addrs.src(), ip.addrs.dst()), (from, to));
    assert_eq!(error[ip.l4..ip.l4 + 2], kind, "type and code");
    let most = if from.is_ipv4() { 576 } else { 1280 };
    assert!(error.len() <= most);
    let quoted = &error[ip.l4 + 8..];
    assert_eq!(quoted, &offender[..quoted.len()], "the quotation");
    match from {
        // ICMP sums itself alone, ICMPv6 with a pseudo header.
        IpAddr::V4(_) => assert_eq!(kersey::wire::checksum::Sum::of(&error[ip.l4..]).fold(), 0xffff),
        IpAddr::V6(_) => assert!(checksums_hold(error)),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
