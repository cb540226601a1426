//! Every combination of families, of offloads on the wire, and of Kersey's own: sizes around the MTU, bulk, datagrams, many streams.

use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;
use kersey::lab::traffic::udp::Flood;

use crate::mixed::Mixed;
use crate::overlay::{Blueprint, Underlay, figure};
use crate::support::pod::Pod;
use crate::support::require_etcd;

const LINK_MTU: u16 = 1500;

#[test]
fn over_ipv4_with_all_offloads() {
    if require_etcd("over_ipv4_with_all_offloads") {
        row("a4", Underlay::V4Only, Switch::On, Switch::On);
    }
}

#[test]
fn over_ipv4_with_none_of_kerseys() {
    if require_etcd("over_ipv4_with_none_of_kerseys") {
        row("k4", Underlay::V4Only, Switch::On, Switch::Off);
    }
}

#[test]
fn over_ipv4_with_none_on_the_wire() {
    if require_etcd("over_ipv4_with_none_on_the_wire") {
        row("w4", Underlay::V4Only, Switch::Off, Switch::On);
    }
}

#[test]
fn over_ipv4_with_none_at_all() {
    if require_etcd("over_ipv4_with_none_at_all") {
        row("n4", Underlay::V4Only, Switch::Off, Switch::Off);
    }
}

#[test]
fn over_ipv6_with_all_offloads() {
    if require_etcd("over_ipv6_with_all_offloads") {
        row("a6", Underlay::V6Only, Switch::On, Switch::On);
    }
}

#[test]
fn over_ipv6_with_none_of_kerseys() {
    if require_etcd("over_ipv6_with_none_of_kerseys") {
        row("k6", Underlay::V6Only, Switch::On, Switch::Off);
    }
}

#[test]
fn over_ipv6_with_none_on_the_wire() {
    if require_etcd("over_ipv6_with_none_on_the_wire") {
        row("w6", Underlay::V6Only, Switch::Off, Switch::On);
    }
}

#[test]
fn over_ipv6_with_none_at_all() {
    if require_etcd("over_ipv6_with_none_at_all") {
        row("n6", Underlay::V6Only, Switch::Off, Switch::Off);
    }
}

/// Both families inside, in both directions, over one family outside.
fn row(tag: &str, underlay: Underlay, wire: Switch, own: Switch) {
    let mut blueprint = Blueprint::new(tag, 2);
    blueprint.lab.offloads = wire;
    if own == Switch::Off {
        let flags = ["--tun-tso", "--tun-uso", "--udp-gso", "--udp-gro"];
        blueprint.flags = flags.map(|flag| format!("{flag}=off")).into();
    }
    let mixed = Mixed::start(blueprint, underlay);
    let overhead = if underlay == Underlay::V4Only { 50 } else { 70 };
    let mtu = usize::from(LINK_MTU) - overhead;
    assert_eq!(usize::from(mixed.overlay.status(1).node.inner_mtu), mtu);

    let containers = [1, 2].map(|nth| {
        let name = format!("{tag}-{nth}");
        Pod::behind(mixed.overlay.namespace(nth), &mixed.subnets(nth), &name, LINK_MTU)
    });
    let nodes = [mixed.pods(1), mixed.pods(2)];
    for (from, to) in [(0, 1), (1, 0)] {
        for family in [0, 1] {
            let far = nodes[to][family];
            try_sizes(Sender::Node, nodes[from][family], far, mtu);
            try_sizes(Sender::Container, containers[from].ends()[family], far, mtu);
        }
    }
    for (from, to) in [(0, 1), (1, 0)] {
        for family in [0, 1] {
            let ends = (nodes[from][family], nodes[to][family]);
            bulk(ends, 4 << 20);
            datagrams(ends, mtu);
        }
        let between = (containers[from].ends(), containers[to].ends());
        for (from, to) in between.0.into_iter().zip(between.1) {
            bulk((from, to), 2 << 20);
        }
        // One family a direction.
        streams(nodes[from][from], nodes[to][from]);
    }
    let status = mixed.overlay.status(1);
    let whole = status.counters["inbound_super_packets"];
    figure("super-packets let in", whole);
    assert_eq!(whole > 0, own == Switch::On);
    mixed.overlay.assert_no_drops(1);
}

/// Who sends a packet around the MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sender {
    /// The node itself, whose kernel knows the device's MTU.
    Node,
    /// A container with a larger MTU, which has to be told.
    Container,
}

/// Echo requests of every size around the MTU: each arrives, or its sender is told and the next one does.
fn try_sizes(sender: Sender, from: End<'_>, to: End<'_>, mtu: usize) {
    let (headers, kinds) = if to.addr.is_ipv4() {
        (28, &["0", "1"][..])
    } else {
        (48, &["0"][..])
    };
    for &no_pmtu_disc in kinds {
        // Off means DF clear.
        from.namespace
            .sysctl("ipv4/ip_no_pmtu_disc", no_pmtu_disc)
            .unwrap();
        let dont_fragment = no_pmtu_disc == "0";
        for total in mtu - 3..=mtu + 3 {
            let ping = Ping {
                count: 2,
                data_bytes: total - headers,
                interval: Duration::from_millis(1),
                timeout: Duration::from_millis(250),
            };
            let report = ping.run(from, to.addr).unwrap();
            let lost = report.sent - report.received;
            let may_learn = sender == Sender::Container && dont_fragment && total > mtu;
            assert!(
                lost <= u16::from(may_learn),
                "{sender:?} {} to {}, {total} bytes, DF {dont_fragment}: {report:?}",
                from.addr,
                to.addr
            );
        }
    }
    from.namespace.sysctl("ipv4/ip_no_pmtu_disc", "0").unwrap();
}

fn bulk((from, to): (End<'_>, End<'_>), bytes: u64) {
    let transfer = Verified {
        bytes: bytes + 3,
        seed: bytes,
        patience: Duration::from_secs(5),
    };
    let report = transfer.run(from, to).unwrap();
    assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
}

/// Small ones, the largest that fit, and some that go in fragments, fewer than the device's queue holds.
fn datagrams((from, to): (End<'_>, End<'_>), mtu: usize) {
    for payload_bytes in [32, mtu - 48, 4000] {
        let flood = Flood {
            payload_bytes,
            rate: Some(1000),
            duration: Duration::from_millis(100),
        };
        let report = flood.run(from, to).unwrap();
        let counts = &report.counts;
        assert_eq!(
            (counts.lost, counts.corrupted, counts.duplicates),
            (0, 0, 0),
            "{} to {}, {payload_bytes} bytes: {report:?}",
            from.addr,
            to.addr
        );
    }
}

/// Fifty transfers at once: all finish.
fn streams(from: End<'_>, to: End<'_>) {
    std::thread::scope(|scope| {
        for seed in 0..50 {
            let transfer = Verified {
                bytes: 100_000 + seed,
                seed,
                patience: Duration::from_secs(10),
            };
            scope.spawn(move || {
                let report = transfer.run(from, to).unwrap();
                assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
            });
        }
    });
}
