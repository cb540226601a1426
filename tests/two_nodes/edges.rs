//! What a device, an underlay or a change of routes refuses, and what becomes of the packets around it.

use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::Message;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::dataplane::{DeviceError, SendError};
use kersey::wire::virtio::{Gso, GsoKind, VirtioHeader};

use crate::decisions::{Blamed, node, refused};
use crate::node::{Kind, Node, start, underlay, v4};
use crate::packets::{Packet, checksums_hold, from_peer};

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
