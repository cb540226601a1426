//! One packet from the device: sent, or refused, and perhaps answered.

use std::time::Duration;

use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::wire::ip::IpHeader;
use kersey::wire::virtio::{Gso, GsoKind, VirtioHeader};

use crate::decisions::{ip, is_error, node};
use crate::node::{Node, start, v4, v6};
use crate::packets::{Packet, dont_fragment, refresh_v4};

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
