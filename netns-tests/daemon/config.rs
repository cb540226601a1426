//! The network config of a node that runs: which one it goes by after a reload, another address, an outage.

use std::net::IpAddr;
use std::time::Duration;

use kersey::addr::Prefix;
use kersey::lab::interrupt;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::ping::Ping;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::firewall::run;
use crate::handover::take_over;
use crate::overlay::{Blueprint, DEVICE, Overlay, READY, wait_for, within};
use crate::routed::{ip, prefix, routes};
use crate::support::require_etcd;

const UDP: &str = r#"{"Network":"10.244.0.0/16"}"#;
const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

#[test]
fn a_reloaded_config_outlives_another_address() {
    if !require_etcd("a_reloaded_config_outlives_another_address") {
        return;
    }
    let mut overlay = Blueprint::new("confmove", 2).start();
    let subnet = overlay.subnet(2);
    overlay.put("config", VXLAN);
    for nth in 1..=2 {
        overlay.daemon(nth).signal(Signal::SIGHUP).unwrap();
        runs(&mut overlay, nth, "vxlan");
    }
    // Whatever the store says by now, nobody has asked for another reload.
    overlay.put("config", UDP);
    for change in ["del 192.0.2.2", "add 192.0.2.77"] {
        let (verb, address) = change.split_once(' ').unwrap();
        ip(
            &overlay,
            2,
            &format!("address {verb} {address}/24 dev {INTERFACE}"),
        );
    }
    wait_for(
        "node 1 sends to the new address by the new backend",
        READY,
        || {
            let peers = overlay.status(1).peers;
            peers.len() == 1 && peers[0].endpoints == ["192.0.2.77:8472"]
        },
    );
    runs(&mut overlay, 2, "vxlan");
    assert_eq!(overlay.subnet(2), subnet);
    overlay.ping_all();
}

#[test]
fn a_config_changed_while_a_node_was_down_and_its_store_away_is_taken_when_it_returns() {
    if !require_etcd("a_config_changed_while_a_node_was_down_and_its_store_away_is_taken_when_it_returns") {
        return;
    }
    let mut overlay = Blueprint::new("confaway", 2).start();
    let subnet = overlay.subnet(2);
    cached(&overlay);
    overlay.terminate(2);
    overlay.put("config", VXLAN);
    overlay.etcd_process().signal(Signal::SIGSTOP).unwrap();
    overlay.restart(2);
    runs(&mut overlay, 2, "udp");
    let pid = overlay.daemon(2).pid();
    overlay.etcd_process().signal(Signal::SIGCONT).unwrap();
    runs(&mut overlay, 2, "vxlan");
    overlay.daemon(1).signal(Signal::SIGHUP).unwrap();
    runs(&mut overlay, 1, "vxlan");
    for nth in 1..=2 {
        overlay.wait(nth, READY, |status| status.ready && status.peers.len() == 1);
    }
    assert_eq!((overlay.subnet(2), overlay.daemon(2).pid()), (subnet, pid));
}

/// What reads well and cannot be run here is tried once: the node has traffic to carry.
#[test]
fn a_config_from_after_an_outage_that_cannot_be_run_is_given_up_for_good() {
    if !require_etcd("a_config_from_after_an_outage_that_cannot_be_run_is_given_up_for_good") {
        return;
    }
    let mut blueprint = Blueprint::new("confbad", 2);
    let nat = ["--public-ip=192.0.2.77", "--firewall=off"].map(str::to_owned);
    blueprint.own_flags.insert(2, nat.to_vec());
    let mut overlay = blueprint.start();
    cached(&overlay);
    overlay.terminate(2);
    // Peers would reach a gateway at an address that nobody has.
    overlay.put(
        "config",
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#,
    );
    overlay.etcd_process().signal(Signal::SIGSTOP).unwrap();
    overlay.restart(2);
    runs(&mut overlay, 2, "udp");
    overlay.etcd_process().signal(Signal::SIGCONT).unwrap();
    let tried = |overlay: &Overlay| overlay.log(2).matches("cannot be run here").count();
    wait_for("it is tried", READY, || tried(&overlay) > 0);
    runs(&mut overlay, 2, "udp");
    std::thread::sleep(Duration::from_secs(3));
    let status = overlay.status(2);
    assert!(status.ready && status.backend.name == "udp", "{status:#?}");
    assert_eq!(tried(&overlay), 1, "{}", overlay.log(2));
}

/// One wrong digit in the store must not cut every node off its own link.
#[test]
fn a_network_that_this_host_has_a_route_to_is_refused_and_the_route_stays() {
    if !require_etcd("a_network_that_this_host_has_a_route_to_is_refused_and_the_route_stays") {
        return;
    }
    let mut overlay = Blueprint::new("conflan", 2).start();
    let routes = |overlay: &Overlay| {
        let held = overlay
            .namespace(2)
            .netlink(async |netlink| Ok(netlink.routes().await?));
        let mut held: Vec<String> = held.unwrap().iter().map(|held| format!("{held:?}")).collect();
        held.sort();
        held
    };
    overlay.terminate(2);
    let before = routes(&overlay);
    let has = |what: &str| before.iter().any(|route| route.contains(what));
    assert!(has("192.0.2.0/24") && has("0.0.0.0/0"), "{before:#?}");
    // The link's own network, and everything there is.
    for network in ["192.0.2.0/24", "0.0.0.0/0"] {
        overlay.put("config", format!(r#"{{"Network":"{network}"}}"#));
        let told = format!("Network {network}: this host has a route to it already");
        // A node that has never run here before.
        std::fs::remove_dir_all(overlay.file("2.data")).unwrap();
        overlay.restart(2);
        let heard = interrupt::wait_until(READY, || overlay.log(2).contains(&told));
        assert!(heard, "{told:?} is not in {}", overlay.log(2));
        std::thread::sleep(Duration::from_secs(2));
        assert!(!overlay.status(2).ready);
        assert_eq!(routes(&overlay), before, "{network}");
        overlay.terminate(2);
        assert_eq!(routes(&overlay), before, "{network}");
    }
    overlay.put("config", UDP);
    overlay.restart(2);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    overlay.ping_all();
}

/// As where all of a site is 10.0.0.0/8: what pods have of it goes through the device, and the rest as before.
#[test]
fn a_network_that_holds_the_underlay_leaves_the_rest_of_it_alone() {
    if !require_etcd("a_network_that_holds_the_underlay_leaves_the_rest_of_it_alone") {
        return;
    }
    for backend in ["udp", "vxlan", "host-gw"] {
        shared(
            backend,
            json!({ "Network": "192.0.0.0/16", "SubnetMin": "192.0.16.0", "Backend": { "Type": backend } }),
            "192.0.200.1",
        );
    }
}

/// The same of IPv6, beside an IPv4 network that is the overlay's alone.
#[test]
fn an_ipv6_network_that_holds_the_underlay_leaves_the_rest_of_it_alone() {
    if !require_etcd("an_ipv6_network_that_holds_the_underlay_leaves_the_rest_of_it_alone") {
        return;
    }
    for backend in ["udp", "vxlan", "srv6", "host-gw"] {
        let network = json!({
            "Network": "10.244.0.0/16",
            "EnableIPv6": true,
            "IPv6Network": "2001:db8::/40",
            "IPv6SubnetMin": "2001:db8:80::",
            "Backend": { "Type": backend },
        });
        shared(backend, network, "2001:db8:c0::1");
    }
}

/// Two nodes whose own addresses lie in the overlay's network, as `stranger` does, which nobody has leased.
fn shared(backend: &str, network: Value, stranger: &str) {
    let mut blueprint = Blueprint::new("holds", 2);
    blueprint.network = network.to_string();
    let mut overlay = blueprint.start();
    let is_v6 = stranger.contains(':');
    let status = overlay.status(2);
    let subnets = status.node.subnets.iter().map(|subnet| prefix(subnet));
    let subnet = subnets.filter(|subnet| matches!(subnet, Prefix::V6(_)) == is_v6);
    // A peer's subnet, and not the network; with srv6 there is a route to the locator beside it.
    let wanted: Vec<Prefix> = subnet.collect();
    assert_eq!(wanted.len(), 1);
    let network = network[if is_v6 { "IPv6Network" } else { "Network" }].as_str();
    let network = prefix(network.unwrap());
    let routed = |overlay: &Overlay| {
        let routes = routes(overlay, 1).into_iter().map(|route| route.destination);
        routes.filter(|to| network.covers(*to)).collect::<Vec<_>>()
    };
    let is_routed = |overlay: &Overlay| routed(overlay) == wanted;
    wait_for("the peer's route is there", READY, || is_routed(&overlay));
    overlay.ping_all();
    // A node answers a pod from its own address.
    let node = &overlay.lab.nodes[0];
    let (pod, node): (_, IpAddr) = if is_v6 {
        (overlay.pods(2)[1], node.v6.into())
    } else {
        (overlay.pod(2), node.v4.into())
    };
    let report = Ping::default().run(pod, node).unwrap();
    assert!(report.all(), "{backend}: {report:?}");
    // What nobody has leased is no business of the device's.
    let way = |overlay: &Overlay, to: &str| run(overlay, 1, "ip", &format!("route get {to}"));
    let strangers = way(&overlay, stranger);
    assert!(strangers.contains(&format!("dev {INTERFACE}")), "{strangers}");
    let shown = overlay.status(1).peers[0].kernel_route.clone();
    assert_eq!(shown.as_deref(), (backend == "host-gw").then_some("installed"));
    if backend == "host-gw" {
        return;
    }
    let pods = way(&overlay, &pod.addr.to_string());
    assert!(pods.contains(&format!("dev {DEVICE}")), "{pods}");
    // The kernel takes the routes of a device that is set down.
    for change in ["down", "up", "down"] {
        ip(&overlay, 1, &format!("link set {DEVICE} {change}"));
    }
    wait_for("the route is back", within(Duration::from_secs(2)), || {
        is_routed(&overlay)
    });
    ip(&overlay, 1, &format!("link set {DEVICE} down"));
    ip(&overlay, 1, &format!("link set {DEVICE} up"));
    wait_for("the route is back", within(Duration::from_secs(2)), || {
        is_routed(&overlay)
    });
    overlay.ping_all();
    // A successor finds it, and a peer that leaves takes it along.
    take_over(&mut overlay, 1, &[]);
    assert!(is_routed(&overlay));
    overlay.ping_all();
    let key = format!("subnets/{}", status.node.subnets.join("&").replace('/', "-"));
    overlay.terminate(2);
    overlay.delete(&key);
    wait_for("the route is gone", READY, || routed(&overlay).is_empty());
}

/// Waits until node 2 has its peer in its cache.
fn cached(overlay: &Overlay) {
    wait_for("the cache is written", READY, || {
        std::fs::read_to_string(overlay.file("2.data/control.json"))
            .is_ok_and(|text| text.contains("192.0.2.1"))
    });
}

fn runs(overlay: &mut Overlay, nth: usize, backend: &str) {
    overlay.wait(nth, READY, |status| {
        status.ready && status.backend.name == backend
    });
}
