//! Underlays and nodes that are not as the lab has them by itself: routers in between, a narrow link, locators and queues of one's own,
//! a kernel that had SRv6 on.
//!
//! ```text
//!   node 1 ─ 1500 ─ hub ─ 1400 ─ node 3 ─ 1500 ─ node 2
//! ```
//!
//! The hub and node 3 are routers of the underlay, with static routes to the locators; daemons run on 1 and 2.

use std::process::{Command, Stdio};
use std::time::Duration;

use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use serde_json::{Value, json};

use crate::behaviors::ip;
use crate::mixed::{bulk, datagrams, network, reach};
use crate::overlay::{Blueprint, Overlay, figure, wait_for, within};
use crate::support::pod::Pod;
use crate::support::require_etcd;

/// What the link in the middle carries.
pub(crate) const NARROW: u16 = 1400;
/// Bytes of a transfer.
const TRANSFER: u64 = 4 << 20;

#[test]
fn locators_are_routed_and_a_narrow_link_is_no_hole() {
    if !require_etcd("locators_are_routed_and_a_narrow_link_is_no_hole") {
        return;
    }
    for (mode, overhead) in [("reduced", 40), ("full", 64)] {
        let mut overlay = routed(mode);
        let inner = NARROW - overhead;
        assert_eq!(overlay.status(1).node.inner_mtu, 1500 - overhead);
        // Nobody knows yet; TCP finds out.
        for family in [0, 1] {
            let (one, two) = (overlay.pods(1)[family], overlay.pods(2)[family]);
            bulk(one, two, TRANSFER);
            bulk(two, one, TRANSFER);
        }
        for nth in [1, 2] {
            // The second to send over TCP was told by the first what fits; this is too large for sure.
            let ping = Ping {
                count: 1,
                data_bytes: usize::from(NARROW) - 28,
                timeout: Duration::from_millis(50),
                ..Ping::default()
            };
            ping.run(overlay.pod(nth), overlay.pod(3 - nth).addr).unwrap();
            overlay.wait(nth, within(Duration::from_secs(2)), |status| {
                status.peers[0].narrow_mtu == Some(inner)
            });
        }
        for family in [0, 1] {
            let (one, two) = (overlay.pods(1)[family], overlay.pods(2)[family]);
            for (from, to) in [(one, two), (two, one)] {
                reach(from, to, &[84, usize::from(inner) - 1, usize::from(inner)]);
                datagrams(from, to, usize::from(inner) - 48);
                bulk(from, to, TRANSFER);
            }
        }
    }
}

/// The narrow link is behind a waypoint, so routers name the second segment and not the one that packets are sent to.
#[test]
fn a_narrow_link_behind_a_waypoint_is_no_hole() {
    if !require_etcd("a_narrow_link_behind_a_waypoint_is_no_hole") {
        return;
    }
    let via = "fd00:5:0:e000::e";
    let paths = json!([{ "To": "2001:db8:2::2", "Via": [via] }]);
    let mut overlay = routed_with("reduced", 3, paths);
    for family in [0, 1] {
        let (one, two) = (overlay.pods(1)[family], overlay.pods(2)[family]);
        bulk(one, two, TRANSFER);
        bulk(two, one, TRANSFER);
    }
    overlay.wait(1, within(Duration::from_secs(2)), |status| {
        let mut peers = status.peers.iter();
        peers.any(|peer| peer.narrow_mtu == Some(NARROW - 64))
    });
    for family in [0, 1] {
        let (one, two) = (overlay.pods(1)[family], overlay.pods(2)[family]);
        reach(one, two, &[84, usize::from(NARROW) - 64]);
        datagrams(one, two, usize::from(NARROW) - 64 - 48);
    }
    assert!(overlay.status(3).counters["segments_forwarded"] > 1000);
}

#[test]
fn a_container_is_told_of_a_narrow_link_at_once() {
    if !require_etcd("a_container_is_told_of_a_narrow_link_at_once") {
        return;
    }
    let overlay = routed("reduced");
    let inner = NARROW - 40;
    let pods = [1, 2].map(|nth| {
        let subnets = overlay.status(nth).node.subnets;
        Pod::behind(overlay.namespace(nth), &subnets, &format!("s6narrow{nth}"), 1460)
    });
    for family in [0, 1] {
        let [one, two] = [0, 1].map(|nth| pods[nth].ends()[family]);
        let took = wait_for("the container knows", within(Duration::from_secs(2)), || {
            let headers = if family == 0 { 28 } else { 48 };
            let ping = Ping {
                count: 1,
                data_bytes: 1460 - headers,
                timeout: Duration::from_millis(50),
                ..Ping::default()
            };
            ping.run(one, two.addr).unwrap();
            path_of(one, two).contains(&format!("mtu {inner}"))
        });
        figure("a container knew after", took);
        reach(one, two, &[usize::from(inner)]);
        bulk(one, two, TRANSFER);
        bulk(two, one, TRANSFER);
    }
}

#[test]
fn a_node_has_the_locator_and_queues_it_is_given() {
    if !require_etcd("a_node_has_the_locator_and_queues_it_is_given") {
        return;
    }
    let mut blueprint = Blueprint::new("s6own", 2);
    blueprint.network = network(json!({}), true);
    blueprint.flags = vec!["--queues=2".to_owned()];
    let flag = "--srv6-locator=fd12:3456:789a:beef::/64".to_owned();
    blueprint.own_flags.insert(1, vec![flag]);
    let overlay = blueprint.start();
    assert_eq!(overlay.status(1).device.queues, 2);
    let data = lease(&overlay, 1);
    assert_eq!(data["Locator"], "fd12:3456:789a:beef::/64");
    assert_eq!(data["Source"], "fd12:3456:789a:beef::1");
    for family in [0, 1] {
        let (one, two) = (overlay.pods(1)[family], overlay.pods(2)[family]);
        for (from, to) in [(one, two), (two, one)] {
            reach(from, to, &[84, 1460]);
            bulk(from, to, TRANSFER);
            datagrams(from, to, 1000);
        }
    }
    overlay.assert_no_drops(1);
    overlay.assert_no_drops(2);
}

/// Two queues share the flows of many containers; none is lost between their filters.
#[test]
fn two_queues_share_the_flows() {
    if !require_etcd("two_queues_share_the_flows") {
        return;
    }
    for mode in ["reduced", "full"] {
        let mut blueprint = Blueprint::new(&format!("s6q{}", &mode[..1]), 2);
        blueprint.network = network(json!({ "Mode": mode }), true);
        blueprint.flags = vec!["--queues=2".to_owned()];
        let overlay = blueprint.start();
        let node = overlay.namespace(1);
        let subnet = overlay.subnet(1).addr().octets();
        for (one, two) in overlay.pods(1).into_iter().zip(overlay.pods(2)) {
            bulk(one, two, TRANSFER);
        }
        // A flow for each address; which queue has which is theirs to decide.
        let two = overlay.pod(2);
        for low in 100..116 {
            let addr = [subnet[0], subnet[1], subnet[2], low];
            ip(
                node,
                &format!("addr add {}/32 dev lo", std::net::Ipv4Addr::from(addr)),
            );
            let one = End::new(node, std::net::IpAddr::from(addr));
            datagrams(one, two, 16);
            bulk(one, two, 10_000);
        }
        overlay.assert_no_drops(1);
        overlay.assert_no_drops(2);
    }
}

#[test]
fn the_kernels_own_is_switched_off_and_said() {
    if !require_etcd("the_kernels_own_is_switched_off_and_said") {
        return;
    }
    let mut blueprint = Blueprint::new("s6seg6", 2);
    blueprint.network = network(json!({ "Mode": "full" }), true);
    let mut overlay = blueprint.build();
    let switch = format!("ipv6/conf/{INTERFACE}/seg6_enabled");
    for scope in ["ipv6/conf/all/seg6_enabled", &switch] {
        overlay.lab.nodes[0].namespace.sysctl(scope, "1").unwrap();
    }
    overlay.start_daemons();
    let path = format!("/proc/sys/net/{switch}");
    let value = overlay
        .namespace(1)
        .run(|| Ok(std::fs::read_to_string(path)?))
        .unwrap();
    assert_eq!(value.trim(), "0");
    let said = "the kernel's own segment routing was on here";
    assert_eq!(overlay.log(1).matches(said).count(), 1, "{}", overlay.log(1));
    assert_eq!(overlay.log(2).matches(said).count(), 0, "{}", overlay.log(2));
    for (one, two) in overlay.pods(1).into_iter().zip(overlay.pods(2)) {
        bulk(one, two, TRANSFER);
        bulk(two, one, TRANSFER);
    }
    overlay.assert_no_drops(1);
}

/// Nodes 1 and 2 far from one another. Their locators follow from the numbers of their subnets.
fn routed(mode: &str) -> Overlay {
    routed_with(mode, 2, json!([]))
}

/// The same with so many daemons, the others on the link of node 1, and with paths; node 3's locator is fd00:5:0:e000::/64.
fn routed_with(mode: &str, daemons: usize, paths: Value) -> Overlay {
    routed_by(mode, daemons, paths, &[])
}

/// The same with further flags of the daemons.
pub(crate) fn routed_by(mode: &str, daemons: usize, paths: Value, flags: &[&str]) -> Overlay {
    let last = daemons + 1;
    let tag = format!("s6rt{}{daemons}{}", &mode[..1], flags.len());
    let mut blueprint = Blueprint::new(&tag, last);
    blueprint.flags = flags.iter().map(|&flag| flag.to_owned()).collect();
    blueprint.daemons = daemons;
    let settings = json!({ "Mode": mode, "Block": "fd00:5::/48", "LocatorLen": 64, "Paths": paths });
    blueprint.network = network(settings, true);
    let flag = "--srv6-locator=fd00:5:0:e000::/64".to_owned();
    blueprint.own_flags.insert(3, vec![flag]);
    let mut overlay = blueprint.build();
    let (hub, router) = (overlay.hub(), overlay.namespace(last));
    let port = format!("p{last}");
    for namespace in [hub, router] {
        namespace.sysctl("ipv4/ip_forward", "1").unwrap();
        namespace.sysctl("ipv6/conf/all/forwarding", "1").unwrap();
    }
    let addresses = |namespace, link: &str, net: u8, low: u8| {
        ip(namespace, &format!("addr flush dev {link} scope global"));
        ip(
            namespace,
            &format!("addr add 198.51.100.{}/28 dev {link}", net * 16 + low),
        );
        ip(
            namespace,
            &format!("addr add 2001:db8:{net}::{low}/64 dev {link} nodad"),
        );
    };
    let default = |namespace, net: u8, low: u8| {
        ip(
            namespace,
            &format!("-4 route replace default via 198.51.100.{}", net * 16 + low),
        );
        ip(
            namespace,
            &format!("-6 route replace default via 2001:db8:{net}::{low}"),
        );
    };
    ip(hub, &format!("link set {port} nomaster"));
    ip(hub, &format!("link set {port} mtu {NARROW}"));
    ip(router, &format!("link set {INTERFACE} mtu {NARROW}"));
    addresses(hub, &port, 3, 1);
    addresses(router, INTERFACE, 3, 2);
    default(router, 3, 1);
    ip(hub, &format!("link set p2 netns {}", router.name()));
    ip(router, "link set p2 up");
    addresses(router, "p2", 2, 1);
    addresses(overlay.namespace(2), INTERFACE, 2, 2);
    default(overlay.namespace(2), 2, 1);
    ip(hub, "-4 route add 198.51.100.32/28 via 198.51.100.50");
    ip(hub, "-6 route add 2001:db8:2::/64 via 2001:db8:3::2");
    overlay.start_daemons();

    let [one, two] = [1, 2].map(|nth| {
        let status = overlay.status(nth);
        let locator = lease(&overlay, nth)["Locator"].as_str().unwrap().to_owned();
        let number: u32 = status.node.subnets[0].split('.').nth(2).unwrap().parse().unwrap();
        assert_eq!(locator, format!("fd00:5:0:{number:x}::/64"));
        locator
    });
    let (hub, router) = (overlay.hub(), overlay.namespace(last));
    if daemons > 2 {
        ip(hub, "-6 route add fd00:5:0:e000::/64 via 2001:db8:1::3");
    }
    ip(hub, &format!("-6 route add {one} via 2001:db8:1::1"));
    ip(hub, &format!("-6 route add {two} via 2001:db8:3::2"));
    ip(router, &format!("-6 route add {two} via 2001:db8:2::2"));
    for (one, two) in overlay.pods(1).into_iter().zip(overlay.pods(2)) {
        // Neighbours are looked for first.
        wait_for(
            "the routers know their neighbours",
            within(Duration::from_secs(5)),
            || {
                let ping = Ping {
                    count: 1,
                    timeout: Duration::from_millis(100),
                    ..Ping::default()
                };
                ping.run(one, two.addr).unwrap().all()
            },
        );
    }
    overlay
}

/// What a node's lease says of SRv6.
fn lease(overlay: &Overlay, nth: usize) -> Value {
    let subnets = overlay.status(nth).node.subnets.join("&").replace('/', "-");
    let (text, _) = overlay.get(&format!("subnets/{subnets}")).unwrap();
    let lease: Value = serde_json::from_str(&text).unwrap();
    lease["BackendData"].clone()
}

/// What the kernel at one end knows of the path to the other.
fn path_of(from: End<'_>, to: End<'_>) -> String {
    let mut command = Command::new("ip");
    command.args(["route", "get", &to.addr.to_string()]);
    let child = from.namespace.spawn(command.stdout(Stdio::piped())).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
}
