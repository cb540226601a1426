//! Two nodes, their hosts and the wire between them, moved along by a clock that only this file turns.

use std::time::Duration;

use kersey::backend::udp::Udp;
use kersey::backend::vxlan::Vxlan;
use kersey::dataplane::Inner;
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::memory::Message;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::wire::ip::{Ecn, IpHeader};
use kersey::wire::virtio::GsoKind;
use kersey::wire::vxlan::HEADERS_LEN;

use crate::host::{Host, Sends};
use crate::node::{Kind, NodeOf, Tunnel, prefixes, start, underlay, v4, v6};
use crate::wire::{Impairment, Random, Wire};

/// The family inside the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// The encapsulation between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    /// flannel's udp backend.
    Udp,
    /// flannel's vxlan backend.
    Vxlan,
}

impl Over {
    /// Bytes it puts before a packet.
    pub(crate) fn header_len(self) -> usize {
        match self {
            Self::Udp => 0,
            Self::Vxlan => HEADERS_LEN,
        }
    }
}

/// Who sends what the first host sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// A Kersey node.
    Kersey,
    /// A kernel with the same encapsulation on the same machine: super-packets and half-done checksums go on the wire as they are.
    Kernel,
}

/// What a transfer is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    /// What is between the nodes.
    pub(crate) over: Over,
    /// Who sends.
    pub(crate) sender: Sender,
    /// The family inside.
    pub(crate) family: Family,
    /// Bytes from the first host to the second.
    pub(crate) forth: usize,
    /// Bytes from the second host to the first, at the same time.
    pub(crate) back: usize,
    /// MTU of both hosts' links, bytes.
    pub(crate) inner_mtu: u16,
    /// What the devices take.
    pub(crate) merge: Merge,
    /// How the hosts hand over.
    pub(crate) sends: Sends,
    /// The wire.
    pub(crate) wire: Impairment,
    /// Kinds of super-packet the second node's device refuses.
    pub(crate) refuses: &'static [GsoKind],
    /// Seed of data and wire.
    pub(crate) seed: u64,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            over: Over::Udp,
            sender: Sender::Kersey,
            family: Family::V4,
            forth: 1_000_000,
            back: 0,
            inner_mtu: 1472,
            merge: Merge { tcp: true, udp: true },
            sends: Sends::SuperPackets,
            wire: Impairment::CLEAN,
            refuses: &[],
            seed: 1,
        }
    }
}

/// What became of a transfer whose bytes all arrived.
pub(crate) struct Outcome {
    /// What both nodes counted.
    pub(crate) nodes: [Counters; 2],
    /// The wire, to ask for its counters.
    pub(crate) wire: Wire,
    /// Simulated time it took.
    pub(crate) took: Duration,
}

/// What a node counted.
pub(crate) struct Counters {
    counts: Vec<u64>,
    drops: Vec<(DropReason, u64)>,
}

impl Counters {
    fn of<E: Tunnel>(node: &NodeOf<E>) -> Self {
        Self {
            counts: Count::ALL.iter().map(|&what| node.counted(what)).collect(),
            drops: node.drops(),
        }
    }

    /// A count over both directions.
    pub(crate) fn counted(&self, what: Count) -> u64 {
        self.counts[what as usize]
    }

    /// The reasons anything was dropped for, with how often.
    pub(crate) fn drops(&self) -> &[(DropReason, u64)] {
        &self.drops
    }
}

impl Outcome {
    /// A count over both nodes.
    pub(crate) fn counted(&self, what: Count) -> u64 {
        self.nodes.iter().map(|node| node.counted(what)).sum()
    }
}

/// Longest simulated time of a transfer: far beyond what 20 % loss costs; a stall is found, not waited for.
const DEADLINE: Duration = Duration::from_secs(4 * 3600);

impl Transfer {
    /// Carries the bytes, and panics if they do not all arrive as they were sent.
    pub(crate) fn run(self) -> Outcome {
        match self.over {
            Over::Udp => self.run_over::<Udp>(),
            Over::Vxlan => self.run_over::<Vxlan>(),
        }
    }

    fn run_over<E: Tunnel>(self) -> Outcome {
        let kind = Kind {
            merge: self.merge,
            inner_mtu: self.inner_mtu,
            ..Kind::default()
        };
        let mut nodes = [NodeOf::<E>::new(1, kind, &[2]), NodeOf::<E>::new(2, kind, &[1])];
        nodes[1].inbound.device().refuses = self.refuses.to_vec();
        let address = |number| match self.family {
            Family::V4 => v4(number, 2),
            Family::V6 => v6(number, 2),
        };
        let mut hosts: [Host; 2] =
            [1, 2].map(|number| Host::new(address(number), usize::from(self.inner_mtu), self.sends));
        let mut random = Random(self.seed);
        let mut data = |len| (0..len).map(|_| random.below(256) as u8).collect::<Vec<u8>>();
        let (forth, back) = (data(self.forth), data(self.back));
        hosts[0].send_to(address(2), &forth);
        if self.back > 0 {
            hosts[1].send_to(address(1), &back);
        }

        let mut wire = Wire::new(self.wire, self.seed);
        let mut now = Duration::ZERO;
        while !(hosts[1].has_all() && (self.back == 0 || hosts[0].has_all())) {
            let moved = self.step(now, &mut nodes, &mut hosts, &mut wire);
            if moved {
                continue;
            }
            let polls = hosts.iter_mut().filter_map(|host| host.next_poll(now)).min();
            let Some(next) = wire.next_arrival().into_iter().chain(polls).min() else {
                panic!("nothing will ever happen again: {self:?}");
            };
            // A stack that wants to run at once but sends nothing must not stop the clock.
            now = next.max(now + Duration::from_micros(100));
            assert!(now < DEADLINE, "stalled: {self:?}");
        }
        while let Some(next) = wire.next_arrival() {
            now = now.max(next);
            self.step(now, &mut nodes, &mut hosts, &mut wire);
        }
        assert!(hosts[1].received == forth, "bytes forth differ: {self:?}");
        assert!(hosts[0].received == back, "bytes back differ: {self:?}");
        Outcome {
            nodes: nodes.map(|node| Counters::of(&node)),
            wire,
            took: now,
        }
    }

    /// Lets everything due at `now` happen once; whether anything did.
    fn step<E: Tunnel>(
        self,
        now: Duration,
        nodes: &mut [NodeOf<E>; 2],
        hosts: &mut [Host; 2],
        wire: &mut Wire,
    ) -> bool {
        let mut moved = false;
        for (node, host) in nodes.iter_mut().zip(hosts.iter_mut()) {
            let messages = wire.arrivals(now, node.underlay());
            moved |= !messages.is_empty();
            for (_, packet) in node.receive(messages, start() + now) {
                host.receive(packet);
            }
            let packets = host.poll(now);
            moved |= !packets.is_empty();
            let messages = match (self.sender, node.number) {
                (Sender::Kernel, 1) => packets
                    .into_iter()
                    .map(|(_, packet)| sent_by_kernel::<E>(&packet))
                    .collect(),
                (Sender::Kernel | Sender::Kersey, _) => node.send(packets, start() + now),
            };
            for message in messages {
                wire.carry(now, node.underlay(), &message);
            }
            assert!(
                node.outbound.device().answers.is_empty() && node.inbound.device().answers.is_empty(),
                "an ICMP error"
            );
        }
        moved
    }
}

/// A packet of node 1 to node 2 as a kernel without a network card puts it on the wire.
fn sent_by_kernel<E: Tunnel>(packet: &[u8]) -> Message {
    let encap = E::of(1);
    let [v4, v6] = prefixes(2);
    let hop = encap.hop(if packet[0] >> 4 == 4 { v4 } else { v6 }, 2);
    let mut bytes = vec![0; encap.header_len(&hop)];
    let inner = Inner {
        len: packet.len(),
        flow: 1,
        ecn: Ecn::NotEct,
    };
    encap.push(&hop, inner, &mut bytes);
    bytes.extend_from_slice(packet);
    Message {
        addr: underlay(2),
        segment_size: bytes.len(),
        ecn: Ecn::of(IpHeader::parse(packet).unwrap().tos),
        bytes,
    }
}
