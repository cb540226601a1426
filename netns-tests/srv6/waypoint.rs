//! Paths through the End segment of a third node, be it the kernel's or Kersey's, for packets of either; and through the
//! kernel's End.X. Kersey's own is in [`behaviors`](crate::behaviors).
//!
//! ```text
//!   node A --- waypoint --- node B        A and B are on one link and could do without
//! ```

use std::net::Ipv4Addr;
use std::time::Duration;

use kersey::host::netlink::{Behavior, Sid};
use kersey::lab::seg6_node::default_end_sid;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::wire::ip::V6_LEN;
use kersey::wire::srv6::next_header;
use serde_json::json;

use crate::hostile::packets::sid;
use crate::mixed::{Kernels, Mixed, bulk, datagrams, network, reach};
use crate::overlay::{Blueprint, figure};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

/// Bytes of a transfer.
const TRANSFER: u64 = 4 << 20;

#[test]
fn between_kerseys_through_a_kernel() {
    if require_etcd("between_kerseys_through_a_kernel") {
        steer("s-wk", 1, [1, 2], 3);
    }
}

#[test]
fn between_kerseys_through_a_kersey() {
    if require_etcd("between_kerseys_through_a_kersey") {
        steer("s-ww", 0, [1, 2], 3);
    }
}

#[test]
fn between_kernels_through_a_kersey() {
    if require_etcd("between_kernels_through_a_kersey") {
        steer("s-kw", 2, [2, 3], 1);
    }
}

#[test]
fn between_a_kersey_and_a_kernel_through_a_kersey() {
    if require_etcd("between_a_kersey_and_a_kernel_through_a_kersey") {
        steer("s-wm", 1, [1, 3], 2);
    }
}

#[test]
fn between_a_kersey_and_a_kernel_through_a_kernel() {
    if require_etcd("between_a_kersey_and_a_kernel_through_a_kernel") {
        steer("s-km", 2, [1, 2], 3);
    }
}

#[test]
fn a_path_for_a_subnet_steers_that_family_alone() {
    if !require_etcd("a_path_for_a_subnet_steers_that_family_alone") {
        return;
    }
    let mut blueprint = Blueprint::new("s-sub", 3);
    let via = default_end_sid(underlay(3)).unwrap();
    let paths = json!([{ "To": "fd00:10:244::/56", "Via": [via] }]);
    blueprint.network = network(json!({ "Paths": paths }), true);
    let mixed = Mixed::start(blueprint, Kernels::ONE);
    let ends = [mixed.pods(1), mixed.pods(2)];
    for (family, steered) in [(0, false), (1, true)] {
        let before = mixed.overlay.lab.nodes[2].received_bytes().unwrap();
        bulk(ends[0][family], ends[1][family], TRANSFER);
        let passed = mixed.overlay.lab.nodes[2].received_bytes().unwrap() - before;
        assert_eq!(passed > TRANSFER, steered, "family {family}: {passed} bytes");
    }
    mixed.assert_sound();
}

/// The kernel's End.X at node 3, one for each direction. Node 3 has only its default route to either locator meanwhile, so
/// packets pass by the neighbour the segment names or not at all: with End in its place, none do.
#[test]
fn between_kerseys_through_a_kernels_end_x() {
    if !require_etcd("between_kerseys_through_a_kernels_end_x") {
        return;
    }
    for (mode, mtu) in [("reduced", 1436), ("full", 1420)] {
        let mut blueprint = Blueprint::new(&format!("s-kx{}", &mode[..1]), 3);
        let adjacent = |nth| sid(3, &format!("a{nth}"));
        let paths = [1, 2].map(|nth| json!({ "To": underlay(nth), "Via": [adjacent(nth)] }));
        blueprint.network = network(json!({ "Mode": mode, "Paths": paths }), true);
        let mixed = Mixed::start(blueprint, Kernels::ONE);
        let nodes = &mixed.overlay.lab.nodes;
        let waypoint = &nodes[2];
        let place = |nth: usize, behavior| {
            let set = waypoint.namespace.netlink(async |netlink| {
                let index = netlink.link(INTERFACE).await?.index;
                let sid = Sid::new(adjacent(nth), index, behavior);
                Ok(netlink.replace_sid(&sid).await?)
            });
            set.unwrap();
        };
        for nth in [1, 2] {
            place(nth, Behavior::EndX(nodes[nth - 1].v6));
        }
        mixed.reach_all(2, mtu);

        forget_locators(&mixed, 3, &[1, 2]);
        let ends = [mixed.pods(1), mixed.pods(2)];
        for family in [0, 1] {
            for (from, to) in [(1, 2), (2, 1)] {
                let [near, far] = [from, to].map(|nth| ends[usize::from(nth) - 1][family]);
                reach(near, far, &[84, mtu - 1, mtu]);
                told_or_through(near, far, mtu);
                let sniffer = Sniffer::start(&waypoint.namespace, INTERFACE);
                let before = waypoint.received_bytes().unwrap();
                bulk(near, far, TRANSFER);
                let passed = waypoint.received_bytes().unwrap() - before;
                assert!(passed > TRANSFER, "{mode}, family {family}: {passed} bytes");
                // Each packet that comes leaves for the next segment. Where it came for is no longer to be seen: the kernel
                // writes the next segment into the packet that the sniffer has been given, too.
                let path = [sid(from, "1"), sid(to, "1")].map(|addr| addr.octets()).concat();
                let packets = sniffer.packets();
                let [came, left] = [(Way::In, 64), (Way::Out, 63)].map(|(way, hop_limit)| {
                    let ours = packets.iter().filter(|(seen, packet)| {
                        *seen == way
                            && packet[6..8] == [next_header::ROUTING, hop_limit]
                            && packet[8..V6_LEN] == path
                    });
                    ours.count()
                });
                let what = format!("{mode}, family {family}, to node {to}");
                figure(&format!("{what}: by End.X"), left);
                // The last ones may still be under way.
                assert!(came.abs_diff(left) <= 2, "{what}: {came} came, {left} left");
                assert!(left * mtu > 4 << 20, "{what}: {left} packets");
                for payload_bytes in [32, mtu - 48] {
                    datagrams(near, far, payload_bytes);
                }
            }
        }
        mixed.assert_sound();

        place(2, Behavior::End);
        for (near, far) in ends[0].iter().zip(&ends[1]) {
            let ping = Ping {
                count: 3,
                interval: Duration::from_millis(1),
                timeout: Duration::from_millis(100),
                ..Ping::default()
            };
            let report = ping.run(*near, far.addr).unwrap();
            assert_eq!(report.received, 0, "End has nowhere to send to: {report:?}");
        }
    }
}

/// Takes away a kernel node's routes to the locators of others.
fn forget_locators(mixed: &Mixed, nth: usize, others: &[u8]) {
    let gone = others.iter().map(|&other| {
        let prefix = format!("{}/80", sid(other, "0"));
        mixed
            .overlay
            .namespace(nth)
            .netlink(async |netlink| {
                let mut routes = netlink.own_routes().await?;
                routes.retain(|route| route.destination.to_string() == prefix);
                for route in &routes {
                    netlink.delete_route(route).await?;
                }
                Ok(routes.len())
            })
            .unwrap()
    });
    assert_eq!(gone.collect::<Vec<_>>(), vec![1; others.len()]);
}

/// Traffic between two of three nodes, the last `kernels` of which are the kernel's, through the other one.
fn steer(tag: &str, kernels: usize, pair: [usize; 2], waypoint: usize) {
    // Two segments take 64 and 80 bytes.
    for (mode, mtu) in [("reduced", 1436), ("full", 1420)] {
        let mut blueprint = Blueprint::new(&format!("{tag}{}", &mode[..1]), 3);
        let via = default_end_sid(underlay(waypoint)).unwrap();
        let path = |nth| json!({ "To": underlay(nth), "Via": [via] });
        let paths = pair.map(path);
        blueprint.network = network(json!({ "Mode": mode, "Paths": paths }), true);
        let mixed = Mixed::start(
            blueprint,
            Kernels {
                nodes: kernels,
                ..Kernels::ONE
            },
        );
        let ends = pair.map(|nth| mixed.pods(nth));
        for family in [0, 1] {
            for (from, to) in [(0, 1), (1, 0)] {
                let (near, far) = (ends[from][family], ends[to][family]);
                reach(near, far, &[84, mtu - 1, mtu]);
                if mixed.is_kersey(pair[from]) && mixed.is_kersey(pair[to]) {
                    told_or_through(near, far, mtu);
                }
                let before = mixed.overlay.lab.nodes[waypoint - 1].received_bytes().unwrap();
                bulk(near, far, TRANSFER);
                let passed = mixed.overlay.lab.nodes[waypoint - 1].received_bytes().unwrap() - before;
                assert!(passed > TRANSFER, "{mode}, family {family}: {passed} bytes");
                for payload_bytes in [32, mtu - 48] {
                    datagrams(near, far, payload_bytes);
                }
            }
        }
        // To and from the waypoint there is no way round.
        mixed.reach_all(2, mtu);
        mixed.assert_sound();
    }
}

/// Echo requests larger than the path between two of Kersey's: each arrives, or its sender is told and the next one does.
fn told_or_through(from: End<'_>, to: End<'_>, mtu: usize) {
    let headers = if to.addr.is_ipv4() { 28 } else { 48 };
    for total in mtu + 1..=mtu + 3 {
        let ping = Ping {
            count: 3,
            data_bytes: total - headers,
            interval: Duration::from_millis(1),
            timeout: Duration::from_millis(250),
        };
        let report = ping.run(from, to.addr).unwrap();
        // One request may teach its sender, and one answer the far end.
        assert!(
            report.sent - report.received <= 2,
            "{} to {}, {total} bytes: {report:?}",
            from.addr,
            to.addr
        );
    }
}

/// The underlay address a node will have.
fn underlay(nth: usize) -> Ipv4Addr {
    [192, 0, 2, u8::try_from(nth).unwrap()].into()
}
