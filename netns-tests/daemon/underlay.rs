//! An underlay that changes under a running daemon (F13): the node follows, with its lease, and its peers follow it.
//!
//! ```text
//!   node 1 eth0 192.0.2.1 ─── br0 in the hub ─┬─ p2 ─ eth0 192.0.2.2, then .77      node 2
//!                                             └─ second uplink 198.51.100.254 ─ eth1 198.51.100.2
//! ```

use std::process::Command;
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon::Child;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::probe::Probe;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::routed::ip;
use crate::watch::{require_etcd, require_root, warm};

/// How soon the store has a node's new address.
const PUBLISHED: Duration = Duration::from_secs(2);
/// How soon its peers have it, and how long packets stay away.
const FOLLOWED: Duration = Duration::from_secs(3);

#[test]
fn a_new_address_is_published_under_the_old_subnet_in_etcd() {
    if !require_etcd("a_new_address_is_published_under_the_old_subnet_in_etcd") {
        return;
    }
    let mut overlay = Blueprint::new("newaddr", 2).start();
    let subnet = overlay.subnet(2);
    let key = format!("subnets/{}", subnet.to_string().replace('/', "-"));
    let mut oracle = oracle(&mut overlay);
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    readdress(&overlay, "192.0.2.2", "192.0.2.77");
    oracle.rewired(&overlay, 2);
    let took = wait_for("etcd has the address", within(PUBLISHED), || {
        let value = overlay.get(&key).map(|(value, _)| value);
        value.is_some_and(|value| value.contains("\"192.0.2.77\""))
    });
    figure("F13: new address in etcd after", took);
    followed(&mut overlay, "192.0.2.77:8285");
    let before = probe.received();
    wait_for("traffic flows", READY, || {
        let now = probe.received();
        now.0 > before.0 + 200 && now.1 > before.1 + 200
    });
    let report = probe.stop().unwrap();
    figure("F13: longest gap", report.longest_gap());
    assert!(report.longest_gap() <= within(FOLLOWED), "{report:?}");
    assert_eq!(report.corrupted(), 0);
    // One lease a node: none is left behind.
    let leases = overlay.etcd(async |mut client| {
        let below = etcd_client::GetOptions::new().with_prefix();
        client.get("/coreos.com/network/subnets/", Some(below)).await
    });
    assert_eq!(leases.kvs().len(), 2);
    assert_eq!(overlay.subnet(2), subnet);
    assert_eq!(overlay.status(2).node.public_ips, ["192.0.2.77"]);
    oracle.check(&mut overlay, 1);
}

#[test]
fn a_new_address_is_published_through_a_server() {
    if require_root("a_new_address_is_published_through_a_server") {
        moves(Blueprint::embedded("newsrv", 2), ":8285", &[]);
    }
}

#[test]
fn a_new_address_moves_vxlan() {
    if require_root("a_new_address_moves_vxlan") {
        let mut blueprint = Blueprint::embedded("newvx", 2);
        blueprint.network = ClusterPlan::network("vxlan", false);
        moves(blueprint, ":8472", &[]);
    }
}

#[test]
fn a_new_address_moves_gateways() {
    if require_root("a_new_address_moves_gateways") {
        let mut blueprint = Blueprint::embedded("newgw", 2);
        blueprint.network = ClusterPlan::network("host-gw", false);
        for nth in 1..=2 {
            blueprint.own_flags.insert(nth, vec!["--firewall=off".to_owned()]);
        }
        // There is no device that the network could be routed to.
        moves(blueprint, "", &["I2 node 1: no route", "I2 node 2: no route"]);
    }
}

/// Twice, so that the second time it is the lease of the first that moves; `but` is what the oracle is not asked.
fn moves(blueprint: Blueprint, port: &str, but: &[&str]) {
    let mut overlay = blueprint.start();
    let subnet = overlay.subnet(2);
    let mut oracle = oracle(&mut overlay);
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    for (old, new) in [("192.0.2.2", "192.0.2.77"), ("192.0.2.77", "192.0.2.78")] {
        readdress(&overlay, old, new);
        oracle.rewired(&overlay, 2);
        followed(&mut overlay, &format!("{new}{port}"));
        let before = probe.received();
        wait_for("traffic flows", READY, || {
            let now = probe.received();
            now.0 > before.0 + 1200 && now.1 > before.1 + 1200
        });
    }
    let report = probe.stop().unwrap();
    figure("F13: longest gap", report.longest_gap());
    assert!(report.longest_gap() <= within(FOLLOWED), "{report:?}");
    assert_eq!((overlay.subnet(2), overlay.status(1).peers.len()), (subnet, 1));
    overlay.ping_all();
    oracle.check_but(&mut overlay, 2, but);
}

#[test]
fn a_flapping_link_costs_nothing_but_the_flaps() {
    if !require_etcd("a_flapping_link_costs_nothing_but_the_flaps") {
        return;
    }
    let mut overlay = Blueprint::new("flap", 2).start();
    let (subnet, pid) = (overlay.subnet(2), overlay.daemon(2).pid());
    let mut oracle = oracle(&mut overlay);
    for _ in 0..20 {
        ip(&overlay, 2, &format!("link set {INTERFACE} down"));
        std::thread::sleep(Duration::from_millis(20));
        ip(&overlay, 2, &format!("link set {INTERFACE} up"));
        std::thread::sleep(Duration::from_millis(20));
    }
    // The kernel took the route with the link; who set the address up sets that, too.
    ip(&overlay, 2, "route replace default via 192.0.2.254");
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    let took = wait_for("traffic flows", within(FOLLOWED), || {
        let (there, back) = probe.received();
        there > 100 && back > 100
    });
    figure("F13: traffic after 20 flaps after", took);
    // Not sooner: a route says whether its link is down.
    oracle.rewired(&overlay, 2);
    oracle.check(&mut overlay, 1);
    probe.stop().unwrap();
    assert_eq!((overlay.subnet(2), overlay.daemon(2).pid()), (subnet, pid));
    let log = overlay.log(2);
    assert_eq!(log.matches("joining anew").count(), 0, "{log}");
}

#[test]
fn an_interface_made_anew_carries_the_overlay_again() {
    if !require_root("an_interface_made_anew_carries_the_overlay_again") {
        return;
    }
    let mut overlay = Blueprint::embedded("anewif", 2).start();
    let subnet = overlay.subnet(2);
    let mut oracle = oracle(&mut overlay);
    for (faults, (old, new)) in (1..).zip([("192.0.2.2", "192.0.2.2"), ("192.0.2.2", "192.0.2.79")]) {
        ip(&overlay, 2, &format!("link del {INTERFACE}"));
        wait_for("it is noticed", within(FOLLOWED), || {
            overlay.log(2).contains("the underlay is away")
        });
        let (namespace, hub) = (overlay.namespace(2).name(), overlay.hub().name());
        for words in [
            format!("-n {hub} link add q2 type veth peer name {INTERFACE} netns {namespace}"),
            format!("-n {hub} link set q2 master br0"),
            format!("-n {hub} link set q2 up"),
            format!("-n {namespace} address add {new}/24 dev {INTERFACE}"),
            format!("-n {namespace} link set {INTERFACE} up"),
        ] {
            let ended = Command::new("ip")
                .args(words.split_whitespace())
                .status()
                .unwrap();
            assert!(ended.success(), "ip {words}");
        }
        let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
        let took = wait_for("traffic flows", within(FOLLOWED), || {
            let (there, back) = probe.received();
            there > 100 && back > 100
        });
        figure(
            &format!("F13: traffic over a new interface, {old} to {new}, after"),
            took,
        );
        probe.stop().unwrap();
        followed(&mut overlay, &format!("{new}:8285"));
        oracle.rewired(&overlay, 2);
        oracle.check(&mut overlay, faults);
    }
    assert_eq!(overlay.subnet(2), subnet);
}

#[test]
fn a_default_route_that_moves_takes_the_node_along() {
    if !require_etcd("a_default_route_that_moves_takes_the_node_along") {
        return;
    }
    let mut overlay = Blueprint::new("defroute", 2).start();
    let subnet = overlay.subnet(2);
    second_uplink(&overlay, "198.51.100");
    without_iface(&mut overlay);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    assert_eq!(overlay.status(2).node.interface, INTERFACE);
    let mut oracle = oracle(&mut overlay);
    // B23: a route with a worse metric is no reason, wherever it stands in the list.
    ip(
        &overlay,
        2,
        "route add default via 198.51.100.254 dev eth1 metric 500",
    );
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(overlay.status(2).node.interface, INTERFACE);
    ip(&overlay, 2, "route replace default via 198.51.100.254 dev eth1");
    oracle.rewired(&overlay, 2);
    followed(&mut overlay, "198.51.100.2:8285");
    overlay.wait(2, READY, |status| status.ready && status.node.interface == "eth1");
    assert_eq!(overlay.subnet(2), subnet);
    wait_for("traffic flows", within(FOLLOWED), || {
        let ping = kersey::lab::traffic::ping::Ping::default();
        ping.run(overlay.pod(1), overlay.pod(2).addr)
            .is_ok_and(|report| report.all())
    });
    oracle.check(&mut overlay, 1);
}

/// B23: the only default route is one of policy routing, and a rule that comes and goes moves the node.
#[test]
fn policy_routing_chooses_the_underlay_and_is_followed() {
    if !require_root("policy_routing_chooses_the_underlay_and_is_followed") {
        return;
    }
    let mut overlay = Blueprint::embedded("policy", 2).start();
    let subnet = overlay.subnet(2);
    // Not of the network of the address by which a node asks where policy routing leads.
    second_uplink(&overlay, "203.0.113");
    without_iface(&mut overlay);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    let mut oracle = oracle(&mut overlay);
    // As long as the main table has a default route, that counts.
    ip(
        &overlay,
        2,
        "route add default via 203.0.113.254 dev eth1 table 100",
    );
    ip(&overlay, 2, "rule add table 100 priority 40000");
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(overlay.status(2).node.interface, INTERFACE);
    ip(&overlay, 2, "route del default");
    followed(&mut overlay, "203.0.113.2:8285");

    // Another rule comes first, and goes. That is the only event there is: no route changes.
    ip(
        &overlay,
        2,
        "route add default via 192.0.2.254 dev eth0 table 101",
    );
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(overlay.status(2).node.interface, "eth1");
    ip(&overlay, 2, "rule add table 101 priority 39000");
    followed(&mut overlay, "192.0.2.2:8285");
    ip(&overlay, 2, "rule del table 101 priority 39000");
    oracle.rewired(&overlay, 2);
    followed(&mut overlay, "203.0.113.2:8285");
    // Three moves.
    oracle.check(&mut overlay, 3);

    // And for who starts there.
    without_iface(&mut overlay);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    let node = overlay.status(2).node;
    assert_eq!(
        (node.interface.as_str(), node.public_ips),
        ("eth1", vec!["203.0.113.2".to_owned()])
    );
    assert_eq!(overlay.subnet(2), subnet);
    overlay.wait(1, READY, |status| status.peers.len() == 1);
    overlay.ping_all();
    oracle.check(&mut overlay, 4);
}

#[test]
fn an_address_behind_nat_is_published_without_naming_the_interface() {
    if !require_etcd("an_address_behind_nat_is_published_without_naming_the_interface") {
        return;
    }
    // B21. The hub stands for the NAT: it owns the address, and passes what comes for it on to the node.
    let mut overlay = Blueprint::new("nat", 2).start();
    let subnet = overlay.subnet(2);
    overlay.terminate(2);
    overlay.delete(&format!("subnets/{}", subnet.to_string().replace('/', "-")));
    let mut command = command_without_iface(&overlay);
    command.args(["--public-ip", "203.0.113.2"]);
    overlay.nodes[1].child = overlay.run("node 2", 2, command);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    let status = overlay.status(2);
    assert_eq!(
        (status.node.interface.as_str(), status.node.public_ips.as_slice()),
        (INTERFACE, &["203.0.113.2".to_owned()][..])
    );
    overlay.wait_all();
    let hub = overlay.hub();
    hub.sysctl("ipv4/ip_forward", "1").unwrap();
    let rules = "add table ip nat2\n\
        add chain ip nat2 pre { type nat hook prerouting priority -100 ; }\n\
        add chain ip nat2 post { type nat hook postrouting priority 100 ; }\n\
        add rule ip nat2 pre ip daddr 203.0.113.2 dnat to 192.0.2.2\n\
        add rule ip nat2 post ip saddr 192.0.2.2 ip daddr 192.0.2.1 snat to 203.0.113.2\n";
    std::fs::write(overlay.file("nat.nft"), rules).unwrap();
    let mut command = Command::new("nft");
    command.arg("-f").arg(overlay.file("nat.nft"));
    let mut child = Child::start("nft", hub, command, &overlay.file("nat.log")).unwrap();
    assert!(child.wait_end(READY).unwrap().success(), "{}", child.log_end());
    // Node 2 reaches node 1 through the NAT only.
    ip(&overlay, 2, "route add 192.0.2.1/32 via 192.0.2.254");
    overlay.ping_all();
    assert_eq!(overlay.status(1).peers[0].endpoints, ["203.0.113.2:8285"]);
}

#[test]
fn another_mtu_is_followed() {
    if !require_root("another_mtu_is_followed") {
        return;
    }
    // B23.
    let mut overlay = Blueprint::embedded("newmtu", 2).start();
    let subnet = overlay.subnet(2);
    for (mtu, inner) in [(1400, 1372), (1500, 1472)] {
        ip(&overlay, 2, &format!("link set {INTERFACE} mtu {mtu}"));
        overlay.wait(2, within(FOLLOWED), |status| {
            status.ready && status.node.inner_mtu == inner
        });
        let env = std::fs::read_to_string(overlay.file("2.env")).unwrap();
        assert!(env.contains(&format!("FLANNEL_MTU={inner}\n")), "{env}");
    }
    assert_eq!(overlay.subnet(2), subnet);
    overlay.wait(2, READY, |status| status.peers.len() == 1);
    overlay.ping_all();
}

#[test]
fn an_address_added_beside_it_moves_nobody() {
    if !require_root("an_address_added_beside_it_moves_nobody") {
        return;
    }
    let overlay = Blueprint::embedded("beside", 2).start();
    ip(
        &overlay,
        2,
        &format!("address add 192.0.2.200/32 dev {INTERFACE}"),
    );
    ip(&overlay, 2, "link add other type bridge");
    ip(&overlay, 2, "address add 198.51.100.7/24 dev other");
    std::thread::sleep(Duration::from_millis(1500));
    let log = overlay.log(2);
    assert_eq!(log.matches("joining anew").count(), 0, "{log}");
    assert_eq!(overlay.status(2).node.public_ips, ["192.0.2.2"]);
}

/// Has both nodes use what they allocate once, and remembers how they are.
fn oracle(overlay: &mut Overlay) -> Oracle {
    warm(overlay, 1, 2);
    Oracle::start(overlay)
}

/// Takes one address off node 2's interface, and puts another on.
fn readdress(overlay: &Overlay, old: &str, new: &str) {
    ip(overlay, 2, &format!("address del {old}/24 dev {INTERFACE}"));
    ip(overlay, 2, &format!("address add {new}/24 dev {INTERFACE}"));
}

/// Waits until node 1 sends to where node 2 is now, and nowhere else.
fn followed(overlay: &mut Overlay, endpoint: &str) {
    let mut seen = Vec::new();
    let took = wait_for(&format!("node 1 sends to {endpoint}"), within(FOLLOWED), || {
        seen = overlay.status(1).peers;
        seen.len() == 1 && seen[0].endpoints == [endpoint]
    });
    figure("F13: followed after", took);
}

/// Gives node 2 a second uplink through the hub, of a network of 256 addresses.
fn second_uplink(overlay: &Overlay, network: &str) {
    let (namespace, hub) = (overlay.namespace(2).name(), overlay.hub().name());
    for words in [
        format!("-n {hub} link add s2 type veth peer name eth1 netns {namespace}"),
        format!("-n {hub} address add {network}.254/24 dev s2"),
        format!("-n {hub} link set s2 up"),
        format!("-n {namespace} address add {network}.2/24 dev eth1"),
        format!("-n {namespace} link set eth1 up"),
    ] {
        let ended = Command::new("ip")
            .args(words.split_whitespace())
            .status()
            .unwrap();
        assert!(ended.success(), "ip {words}");
    }
    overlay.hub().sysctl("ipv4/ip_forward", "1").unwrap();
}

/// Starts node 2's daemon again with no interface named.
fn without_iface(overlay: &mut Overlay) {
    overlay.terminate(2);
    let command = command_without_iface(overlay);
    overlay.nodes[1].child = overlay.run("node 2", 2, command);
}

fn command_without_iface(overlay: &Overlay) -> Command {
    let with = overlay.command(2);
    let mut args: Vec<_> = with.get_args().map(std::borrow::ToOwned::to_owned).collect();
    let at = args.iter().position(|arg| arg == "--iface").unwrap();
    args.drain(at..at + 2);
    let mut command = Command::new(with.get_program());
    command.args(args);
    command
}
