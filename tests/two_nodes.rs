//! Two nodes over a wire in memory, with the clock turned by hand: whole TCP connections through both data planes, and every reason to
//! drop a packet.
//!
//! ```text
//! smoltcp ── MemoryDevice ── Outbound ── MemoryUnderlay ══ Wire ══ MemoryUnderlay ── Inbound ── MemoryDevice ── smoltcp
//! ```

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "two_nodes/decisions.rs"]
mod decisions;
#[path = "two_nodes/edges.rs"]
mod edges;
#[path = "two_nodes/host.rs"]
mod host;
#[path = "two_nodes/inbound.rs"]
mod inbound;
#[path = "two_nodes/node.rs"]
mod node;
#[path = "two_nodes/outbound.rs"]
mod outbound;
#[path = "two_nodes/packets.rs"]
mod packets;
#[path = "two_nodes/pair.rs"]
mod pair;
#[path = "two_nodes/vxlan.rs"]
mod vxlan;
#[path = "two_nodes/wire.rs"]
mod wire;

use std::time::Duration;

use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::wire::virtio::GsoKind;

use crate::host::Sends;
use crate::pair::{Family, Over, Sender, Transfer};
use crate::wire::{Impairment, Receives, TooLong};

/// Every encapsulation with every family inside.
const WAYS: [(Over, Family); 4] = [
    (Over::Udp, Family::V4),
    (Over::Udp, Family::V6),
    (Over::Vxlan, Family::V4),
    (Over::Vxlan, Family::V6),
];

#[test]
fn a_clean_wire_carries_every_byte_whatever_is_merged_and_split() {
    for (over, family) in WAYS {
        for merge in [Merge { tcp: true, udp: true }, Merge::NONE] {
            for sends in [Sends::Segments, Sends::SuperPackets] {
                for receives in [Receives::Datagrams, Receives::Runs] {
                    let wire = Impairment {
                        receives,
                        ..Impairment::CLEAN
                    };
                    let outcome = Transfer {
                        over,
                        family,
                        merge,
                        sends,
                        wire,
                        ..Transfer::default()
                    }
                    .run();
                    let case = format!("{over:?} {family:?} {merge:?} {sends:?} {receives:?}");
                    let merged = outcome.counted(Count::InboundSuperPackets);
                    assert_eq!(merged > 0, merge.tcp, "{case}: {merged} merged");
                    let split = outcome.counted(Count::OutboundSuperPackets);
                    assert_eq!(split > 0, sends == Sends::SuperPackets, "{case}: {split} split");
                    let sent = outcome.counted(Count::OutboundPackets);
                    assert_eq!(
                        sent,
                        outcome.counted(Count::InboundPackets),
                        "{case}: all that left arrived"
                    );
                    assert!(
                        outcome.nodes.iter().all(|node| node.drops().is_empty()),
                        "{case}: drops"
                    );
                }
            }
        }
    }
}

#[test]
fn super_packets_leave_in_long_runs() {
    for (over, family) in WAYS {
        let outcome = Transfer {
            over,
            family,
            ..Transfer::default()
        }
        .run();
        let (packets, runs) = (
            outcome.nodes[0].counted(Count::OutboundPackets),
            outcome.nodes[0].counted(Count::OutboundRuns),
        );
        assert!(
            packets / runs >= 10,
            "{over:?} {family:?}: {packets} packets in {runs} runs"
        );
        let frames = outcome.nodes[1].counted(Count::InboundFrames);
        assert!(
            packets / frames >= 10,
            "{over:?} {family:?}: {packets} packets in {frames} frames"
        );
    }
}

#[test]
fn a_kernel_on_the_same_machine_leaves_its_work_to_us_and_every_byte_arrives() {
    for family in [Family::V4, Family::V6] {
        for merge in [Merge { tcp: true, udp: true }, Merge::NONE] {
            for refuses in [&[][..], &[GsoKind::TcpV4, GsoKind::TcpV6]] {
                for lost_per_mille in [0, 50] {
                    let outcome = Transfer {
                        over: Over::Vxlan,
                        sender: Sender::Kernel,
                        family,
                        merge,
                        refuses,
                        wire: Impairment {
                            lost_per_mille,
                            ..Impairment::CLEAN
                        },
                        ..Transfer::default()
                    }
                    .run();
                    let case = format!("{family:?} {merge:?} refuses {refuses:?}, {lost_per_mille} lost");
                    let receiver = &outcome.nodes[1];
                    let whole = receiver.counted(Count::InboundSuperPackets);
                    assert_eq!(
                        whole > 0,
                        merge.tcp && refuses.is_empty(),
                        "{case}: {whole} whole"
                    );
                    let fallbacks = receiver.counted(Count::DeviceFallbacks);
                    assert_eq!(
                        fallbacks > 0,
                        merge.tcp && !refuses.is_empty(),
                        "{case}: {fallbacks} refused"
                    );
                    assert_eq!(receiver.drops(), [], "{case}");
                }
            }
        }
    }
}

#[test]
fn loss_costs_time_but_no_byte() {
    for lost_per_mille in [10, 50, 200] {
        for (over, family) in WAYS {
            for sends in [Sends::Segments, Sends::SuperPackets] {
                let wire = Impairment {
                    lost_per_mille,
                    ..Impairment::CLEAN
                };
                let clean = Transfer {
                    over,
                    family,
                    sends,
                    ..Transfer::default()
                }
                .run();
                let lossy = Transfer {
                    over,
                    family,
                    sends,
                    wire,
                    seed: lost_per_mille,
                    ..Transfer::default()
                }
                .run();
                assert!(lossy.took > clean.took, "{lost_per_mille} of a thousand lost");
            }
        }
    }
}

#[test]
fn reordering_and_duplicates_cost_no_byte() {
    let reordered = Impairment {
        jitter: Duration::from_micros(300),
        ..Impairment::CLEAN
    };
    let doubled = Impairment {
        doubled_per_mille: 100,
        ..Impairment::CLEAN
    };
    let both = Impairment {
        doubled_per_mille: 100,
        ..reordered
    };
    for wire in [reordered, doubled, both] {
        for receives in [Receives::Datagrams, Receives::Runs] {
            for (over, family) in WAYS {
                Transfer {
                    over,
                    family,
                    wire: Impairment { receives, ..wire },
                    ..Transfer::default()
                }
                .run();
            }
        }
    }
}

#[test]
fn a_bad_network_costs_no_byte_in_either_direction() {
    let wire = Impairment {
        lost_per_mille: 50,
        doubled_per_mille: 10,
        delay: Duration::from_millis(100),
        jitter: Duration::from_millis(50),
        ..Impairment::CLEAN
    };
    for (seed, merge) in [
        (1, Merge { tcp: true, udp: true }),
        (2, Merge::NONE),
        (
            3,
            Merge {
                tcp: true,
                udp: false,
            },
        ),
    ] {
        for (over, family) in WAYS {
            Transfer {
                over,
                family,
                merge,
                wire,
                seed,
                forth: 300_000,
                back: 200_000,
                ..Transfer::default()
            }
            .run();
        }
    }
}

#[test]
fn every_inner_mtu_fits_the_wire_it_is_made_for() {
    let sizes = |family| match family {
        Family::V4 => &[576, 1280, 1472, 8900][..],
        Family::V6 => &[1280, 1472, 8900],
    };
    let all = WAYS
        .into_iter()
        .flat_map(|(over, family)| sizes(family).iter().map(move |&size| (over, family, size)));
    for (over, family, inner_mtu) in all {
        for sends in [Sends::Segments, Sends::SuperPackets] {
            // The wire takes not a byte more than the tunnel says it needs.
            let wire = Impairment {
                longest: over.header_len() + usize::from(inner_mtu),
                ..Impairment::CLEAN
            };
            let outcome = Transfer {
                over,
                family,
                inner_mtu,
                sends,
                wire,
                ..Transfer::default()
            }
            .run();
            assert_eq!(outcome.wire.too_long, 0, "{over:?} {family:?} {inner_mtu}");
        }
    }
}

#[test]
fn datagrams_cut_on_the_way_are_counted_and_never_delivered() {
    // Segments of 1472 bytes never pass; smaller ones (handshake, the last of the transfer) do.
    let wire = Impairment {
        longest: 1400,
        too_long: TooLong::Cut,
        ..Impairment::CLEAN
    };
    let outcome = Transfer {
        forth: 1200,
        wire,
        ..Transfer::default()
    }
    .run();
    assert_eq!(outcome.wire.too_long, 0);

    let mut nodes = [
        node::Node::new(1, node::Kind::default(), &[2]),
        node::Node::new(2, node::Kind::default(), &[1]),
    ];
    let mut wire = wire::Wire::new(wire, 1);
    let packet = packets::Packet {
        payload: 1444,
        ..packets::Packet::new(node::v4(1, 2), node::v4(2, 2))
    }
    .udp();
    for message in nodes[0].send(vec![(Default::default(), packet)], node::start()) {
        wire.carry(Duration::ZERO, nodes[0].underlay(), &message);
    }
    let arrived = wire.arrivals(Duration::from_secs(1), nodes[1].underlay());
    assert_eq!(arrived.len(), 1);
    assert!(nodes[1].receive(arrived, node::start()).is_empty());
    assert_eq!(nodes[1].drops(), [(DropReason::BadLength, 1)]);
}

#[test]
fn a_device_that_refuses_super_packets_gets_every_segment_in_order() {
    for (over, family) in WAYS {
        let refuses: &'static [GsoKind] = match family {
            Family::V4 => &[GsoKind::TcpV4],
            Family::V6 => &[GsoKind::TcpV6],
        };
        let outcome = Transfer {
            over,
            family,
            refuses,
            ..Transfer::default()
        }
        .run();
        let node = &outcome.nodes[1];
        assert!(node.counted(Count::DeviceFallbacks) > 0, "{family:?}");
        assert_eq!(node.counted(Count::InboundSuperPackets), 0, "{family:?}");
        assert_eq!(
            node.counted(Count::InboundFrames),
            node.counted(Count::InboundPackets),
            "{family:?}: one by one"
        );
        assert!(node.drops().is_empty(), "{family:?}");
        // On a clean wire nothing was sent twice: no byte was missed and none came out of order.
        let sent = outcome.nodes[0].counted(Count::OutboundPackets);
        let least = Transfer {
            over,
            family,
            ..Transfer::default()
        }
        .run()
        .nodes[0]
            .counted(Count::OutboundPackets);
        assert_eq!(sent, least, "{family:?}: retransmissions");
    }
}
