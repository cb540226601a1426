//! Two nodes, their hosts and the wire between them, moved along by a clock that only this file turns.

use std::time::Duration;

use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::stats::Count;
use kersey::wire::virtio::GsoKind;

use crate::host::{Host, Sends};
use crate::node::{Kind, Node, start, v4, v6};
use crate::wire::{Impairment, Random, Wire};

/// The family inside the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

/// What a transfer is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
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
    /// Both nodes, to ask for their counters.
    pub(crate) nodes: [Node; 2],
    /// The wire, to ask for its counters.
    pub(crate) wire: Wire,
    /// Simulated time it took.
    pub(crate) took: Duration,
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
        let kind = Kind {
            merge: self.merge,
            inner_mtu: self.inner_mtu,
            ..Kind::default()
        };
        let mut nodes = [Node::new(1, kind, &[2]), Node::new(2, kind, &[1])];
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
            let moved = step(now, &mut nodes, &mut hosts, &mut wire);
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
            step(now, &mut nodes, &mut hosts, &mut wire);
        }
        assert!(hosts[1].received == forth, "bytes forth differ: {self:?}");
        assert!(hosts[0].received == back, "bytes back differ: {self:?}");
        Outcome {
            nodes,
            wire,
            took: now,
        }
    }
}

/// Lets everything due at `now` happen once; whether anything did.
fn step(now: Duration, nodes: &mut [Node; 2], hosts: &mut [Host; 2], wire: &mut Wire) -> bool {
    let mut moved = false;
    for (node, host) in nodes.iter_mut().zip(hosts.iter_mut()) {
        let messages = wire.arrivals(now, node.underlay());
        moved |= !messages.is_empty();
        for (_, packet) in node.receive(messages, start() + now) {
            host.receive(packet);
        }
        let packets = host.poll(now);
        moved |= !packets.is_empty();
        for message in node.send(packets, start() + now) {
            wire.carry(now, node.underlay(), &message);
        }
        assert!(
            node.outbound.device().answers.is_empty() && node.inbound.device().answers.is_empty(),
            "an ICMP error"
        );
    }
    moved
}
