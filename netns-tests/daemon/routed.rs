//! Networks without a tunnel: host-gw, whose packets the kernel routes.
//!
//! ```text
//!   node 1 eth0 192.0.2.1 --- br0 in the hub, with etcd --- 192.0.2.2 eth0 node 2
//!     10.244.y.0/24 via 192.0.2.2                    10.244.x.0/24 via 192.0.2.1
//! ```
//!
//! A peer that is only a key in etcd is played by node 3, which has no daemon.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::time::Duration;

use kersey::addr::{Ipv4Prefix, Prefix};
use kersey::host::netlink::{Gateway, HeldRoute, Route, RouteOwner};
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon::Child;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::probe::Probe;

use crate::overlay::{Blueprint, DEVICE, Overlay, PREFIX, READY, figure, wait_for, within};
use crate::support::{require_etcd, require_root};

/// As flannel v0.28 writes it, with an address of ours.
const FLANNEL: &str = r#"{"PublicIP":"192.0.2.3","PublicIPv6":null,"BackendType":"host-gw"}"#;
/// How soon an event must have its effect.
pub(crate) const SOON: Duration = Duration::from_secs(2);
/// How soon what is no event must be noticed: the period is 10 s.
const NEXT_LOOK: Duration = Duration::from_secs(13);

#[test]
fn two_nodes_are_each_others_gateways() {
    if require_root("two_nodes_are_each_others_gateways") {
        live_a_life(host_gw(Blueprint::embedded("gateways", 2)), false);
    }
}

#[test]
fn three_nodes_are_gateways_in_both_families() {
    if require_etcd("three_nodes_are_gateways_in_both_families") {
        let mut blueprint = Blueprint::new("dualgw", 3);
        blueprint.network = ClusterPlan::network("host-gw", true);
        live_a_life(blueprint, true);
    }
}

/// Routes, files and traffic; and an end after which packets still flow.
fn live_a_life(blueprint: Blueprint, dual: bool) {
    let mut overlay = blueprint.start();
    let count = overlay.nodes.len();
    for nth in 1..=count {
        let wanted = routes_to_others(&overlay, nth);
        assert_eq!(wanted.len(), (count - 1) * if dual { 2 } else { 1 });
        wait_for("the routes are in", within(SOON), || {
            routes(&overlay, nth) == wanted
        });
        assert!(overlay.device(nth).is_none(), "node {nth} has a device");
        let file = fs::read_to_string(overlay.file(&format!("{nth}.env"))).unwrap();
        assert!(file.contains("FLANNEL_MTU=1500\n"), "{file}");
        overlay.wait(nth, within(SOON), |status| {
            let installed = |route: &Option<String>| route.as_deref() == Some("installed");
            status.peers.iter().all(|peer| installed(&peer.kernel_route))
        });
        let status = overlay.status(nth);
        assert!(
            status.device.is_absent() && status.counters.is_empty(),
            "{status:#?}"
        );
        assert_eq!((status.node.inner_mtu, status.node.link_mtu), (1500, 1500));
        assert_eq!(
            (status.backend.name.as_str(), status.backend.port),
            ("host-gw", None)
        );
    }
    let table = show(&overlay, 1);
    assert!(
        table.contains("kernel route") && table.contains("installed"),
        "{table}"
    );
    for odd in [DEVICE, "device", "none", "MTU 0", "ingress check", "packets"] {
        assert!(!table.contains(odd), "{odd:?} is in {table}");
    }
    overlay.ping_all();
    overlay.transfer(1, 2, (4 << 20) + 3);

    if dual {
        // What is read back is what was set: nothing is done at the next look.
        let changes = |overlay: &Overlay| overlay.log(1).matches("kernel routes changed").count();
        let before = changes(&overlay);
        kersey::lab::interrupt::sleep(Duration::from_secs(11)).unwrap();
        assert_eq!(changes(&overlay), before, "{}", overlay.log(1));
    }

    // As with flannel, packets go on while a daemon is away.
    let wanted = routes_to_others(&overlay, 2);
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    overlay.terminate(2);
    assert_eq!(routes(&overlay, 2), wanted);
    overlay.restart(2);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == count - 1);
    let before = probe.received();
    wait_for("traffic flows", READY, || {
        let now = probe.received();
        now.0 > before.0 + 200 && now.1 > before.1 + 200
    });
    let report = probe.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    assert_eq!(routes(&overlay, 2), wanted);
}

#[test]
fn the_lease_is_the_one_flannel_writes() {
    if !require_etcd("the_lease_is_the_one_flannel_writes") {
        return;
    }
    let overlay = host_gw(Blueprint::new("value", 1)).start();
    let key = format!("subnets/{}", overlay.subnet(1).to_string().replace('/', "-"));
    let (value, _) = overlay.get(&key).expect("the lease");
    assert_eq!(
        value,
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#
    );
}

#[test]
fn a_lost_route_comes_back_whoever_took_it() {
    if !require_root("a_lost_route_comes_back_whoever_took_it") {
        return;
    }
    let mut overlay = host_gw(Blueprint::embedded("lost", 2)).start();
    let wanted = routes_to_others(&overlay, 1);
    let to = wanted[0].destination;
    wait_for("the route is in", within(SOON), || routes(&overlay, 1) == wanted);

    ip(&overlay, 1, &format!("route del {to}"));
    let took = wait_for("a deleted route is back", within(SOON), || {
        routes(&overlay, 1) == wanted
    });
    figure("deleted route back after", took);

    // The kernel takes routes away with a link that goes down, and says nothing of it.
    ip(&overlay, 1, &format!("link set {INTERFACE} down"));
    wait_for("the kernel took it", within(SOON), || {
        routes(&overlay, 1).is_empty()
    });
    ip(&overlay, 1, &format!("link set {INTERFACE} up"));
    let took = wait_for("a route comes back with its link", within(SOON), || {
        routes(&overlay, 1) == wanted
    });
    figure("route back with its link after", took);

    // Nor of one that was replaced; this waits for the next look.
    ip(&overlay, 1, &format!("route replace {to} via 192.0.2.254"));
    let took = wait_for("a replaced route is back", within(NEXT_LOOK), || {
        routes(&overlay, 1) == wanted && held(&overlay, 1, to).len() == 1
    });
    figure("replaced route back after", took);
    overlay.ping_all();
    assert!(overlay.daemon(1).is_running());
}

#[test]
fn an_interface_made_anew_is_routed_through_again() {
    if !require_root("an_interface_made_anew_is_routed_through_again") {
        return;
    }
    let overlay = host_gw(Blueprint::embedded("anew", 2)).start();
    let before = routes_to_others(&overlay, 2);
    wait_for("the route is in", within(SOON), || routes(&overlay, 2) == before);
    // Renamed away, another under its name: another number.
    ip(&overlay, 2, &format!("link set {INTERFACE} down"));
    ip(&overlay, 2, &format!("link set {INTERFACE} name old"));
    let log = || overlay.log(2);
    wait_for("it is noticed", within(SOON), || {
        log().contains("the underlay interface is gone")
    });
    ip(&overlay, 2, &format!("link add {INTERFACE} type bridge"));
    ip(&overlay, 2, "address flush dev old");
    ip(&overlay, 2, &format!("address add 192.0.2.2/24 dev {INTERFACE}"));
    ip(&overlay, 2, &format!("link set {INTERFACE} up"));
    let after = routes_to_others(&overlay, 2);
    assert_ne!(before[0].index, after[0].index);
    wait_for("the route is on the new one", within(SOON), || {
        routes(&overlay, 2) == after
    });
    assert!(log().contains("the underlay interface is back"), "{}", log());
}

#[test]
fn a_peer_written_by_flannel_is_a_gateway_until_it_leaves() {
    if !require_etcd("a_peer_written_by_flannel_is_a_gateway_until_it_leaves") {
        return;
    }
    let mut overlay = two_and_a_spare("flannel");
    let pod: IpAddr = "10.244.199.2".parse().unwrap();
    for command in [
        "address add 10.244.199.2/32 dev lo".to_owned(),
        "address add 192.0.2.33/24 dev eth0".to_owned(),
        format!("route add {} via 192.0.2.1", overlay.subnet(1)),
    ] {
        ip(&overlay, 3, &command);
    }
    overlay.put("subnets/10.244.199.0-24", FLANNEL);
    let to = prefix("10.244.199.0/24");
    let through = |overlay: &Overlay, nth, gateway: &str| {
        held(overlay, nth, to)
            == [HeldRoute {
                owner: RouteOwner::Kersey,
                route: via(overlay, nth, to, gateway.parse().unwrap()),
            }]
    };
    for nth in [1, 2] {
        let took = wait_for("the lease is a route", within(SOON), || {
            through(&overlay, nth, "192.0.2.3")
        });
        figure("lease is a route after", took);
    }
    let report = Ping::default().run(overlay.pod(1), pod).unwrap();
    assert!(report.all(), "{report:?}");
    let intact = kersey::lab::traffic::tcp::Verified {
        bytes: 1 << 20,
        seed: 7,
        patience: Duration::from_secs(10),
    };
    let far = End::new(overlay.namespace(3), pod);
    let report = intact.run(overlay.pod(1), far).unwrap();
    assert!(report.intact, "{report:?}");

    // Another address, same subnet.
    overlay.put(
        "subnets/10.244.199.0-24",
        FLANNEL.replace("192.0.2.3\"", "192.0.2.33\""),
    );
    wait_for("the route follows", within(SOON), || {
        through(&overlay, 1, "192.0.2.33")
    });
    let report = Ping::default().run(overlay.pod(1), pod).unwrap();
    assert!(report.all(), "{report:?}");

    overlay.delete("subnets/10.244.199.0-24");
    for nth in [1, 2] {
        let took = wait_for("the route goes with its peer", within(SOON), || {
            held(&overlay, nth, to).is_empty()
        });
        figure("route gone with its peer after", took);
    }
    overlay.ping_all();
    assert!(overlay.daemon(1).is_running());
}

#[test]
fn a_peer_without_a_route_is_told_once_and_harms_nobody() {
    if !require_etcd("a_peer_without_a_route_is_told_once_and_harms_nobody") {
        return;
    }
    let mut overlay = two_and_a_spare("far");
    // Somebody's bridge has the network already.
    for command in [
        "link add pods type bridge",
        "address add 10.244.198.1/24 dev pods",
        "link set pods up",
    ] {
        ip(&overlay, 1, command);
    }
    let before = routes_to_others(&overlay, 1);
    overlay.put(
        "subnets/10.244.197.0-24",
        FLANNEL.replace("192.0.2.3", "198.51.100.7"),
    );
    overlay.put("subnets/10.244.198.0-24", FLANNEL);
    overlay.put(
        "subnets/10.244.196.0-24",
        r#"{"PublicIP":"192.0.2.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"4a:5b:ac:d9:d3:c7"}}"#,
    );
    let causes = [
        ("10.244.196.0/24", "backend \"vxlan\""),
        ("10.244.197.0/24", "not on the underlay's link"),
        ("10.244.198.0/24", "the kernel has that network"),
    ];
    overlay.wait(1, within(SOON), |status| {
        causes.iter().all(|(subnet, cause)| {
            status.peers.iter().any(|peer| {
                let why = peer.kernel_route.as_deref().unwrap_or_default();
                peer.subnets == [*subnet] && why.contains(cause)
            })
        })
    });
    // Looked at again, and again: by an event, and when it is due.
    ip(&overlay, 1, "address add 192.0.2.44/24 dev eth0");
    kersey::lab::interrupt::sleep(Duration::from_secs(11)).unwrap();
    assert_eq!(routes(&overlay, 1), before);
    let log = overlay.log(1);
    for (subnet, _) in causes {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(subnet)).collect();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("WARN"), "{lines:?}");
    }
    overlay.ping_all();

    // The far peer comes near.
    ip(&overlay, 1, "address add 198.51.100.1/24 dev eth0");
    let to = prefix("10.244.197.0/24");
    wait_for("the kernel takes the route", within(SOON), || {
        routes(&overlay, 1).contains(&via(&overlay, 1, to, "198.51.100.7".parse().unwrap()))
    });
    // And the network is given up.
    ip(&overlay, 1, "link del pods");
    wait_for("the network is a peer's", within(NEXT_LOOK), || {
        routes(&overlay, 1).len() == 3
    });
}

#[test]
fn hostile_leases_make_no_route() {
    if !require_etcd("hostile_leases_make_no_route") {
        return;
    }
    let mut overlay = two_and_a_spare("hostile");
    let all = |overlay: &Overlay| {
        overlay
            .namespace(1)
            .netlink(async |netlink| Ok(netlink.routes().await?))
            .unwrap()
    };
    let before = all(&overlay);
    let own = overlay.subnet(1).addr();
    let hostile = [
        ("0.0.0.0-0".to_owned(), "192.0.2.3"),
        ("0.0.0.0-1".to_owned(), "192.0.2.3"),
        ("10.0.0.0-8".to_owned(), "192.0.2.3"),
        ("10.244.0.0-16".to_owned(), "192.0.2.3"),
        // The underlay, and the default gateway.
        ("192.0.2.0-24".to_owned(), "192.0.2.3"),
        ("192.0.2.254-32".to_owned(), "192.0.2.3"),
        (format!("{own}-25"), "192.0.2.3"),
        ("10.244.190.0-24".to_owned(), "0.0.0.0"),
        ("10.244.191.0-24".to_owned(), "127.0.0.1"),
        ("10.244.192.0-24".to_owned(), "224.0.0.1"),
        ("10.244.193.0-24".to_owned(), "255.255.255.255"),
        ("10.244.194.0-24".to_owned(), "192.0.2.1"),
        ("10.244.195.0-24".to_owned(), "10.244.1.1"),
    ];
    for (subnet, public_ip) in &hostile {
        let value = FLANNEL.replace("192.0.2.3", public_ip);
        overlay.put(&format!("subnets/{subnet}"), value);
    }
    // The last one is good, and comes after the others.
    overlay.put("subnets/10.244.199.0-24", FLANNEL);
    let to = prefix("10.244.199.0/24");
    wait_for("the good one is a route", within(SOON), || {
        held(&overlay, 1, to).len() == 1
    });
    let mut after = all(&overlay);
    after.retain(|held| held.route.destination != to);
    assert_eq!(after, before);
    overlay.ping_all();
    assert!(overlay.daemon(1).is_running());
}

#[test]
fn a_thousand_peers_are_a_thousand_routes() {
    if !require_etcd("a_thousand_peers_are_a_thousand_routes") {
        return;
    }
    const PEERS: usize = 1000;
    let mut blueprint = host_gw(Blueprint::new("thousand", 1));
    blueprint.network = r#"{"Network":"10.0.0.0/8","Backend":{"Type":"host-gw"}}"#.to_owned();
    // The leases are there first: what is seen is how long routes take, not how long etcd does.
    let mut overlay = blueprint.build();
    overlay.etcd(async |mut client| {
        for nth in 0..PEERS {
            let key = format!("{PREFIX}/subnets/10.200.{}.{}-26", nth / 4, nth % 4 * 64);
            client.put(key, FLANNEL, None).await?;
        }
        Ok(())
    });
    overlay.start_daemons();
    let took = wait_for("all are routes", within(Duration::from_secs(5)), || {
        routes(&overlay, 1).len() == PEERS
    });
    figure("1000 routes after the daemon was ready", took);
    overlay.terminate(1);
    overlay.restart(1);
    overlay.wait(1, READY, |status| status.ready && status.peers.len() == PEERS);
    assert_eq!(routes(&overlay, 1).len(), PEERS);
    overlay.etcd(async |mut client| {
        let key = format!("{PREFIX}/subnets/10.200.");
        let options = etcd_client::DeleteOptions::new().with_prefix();
        client.delete(key, Some(options)).await.map(drop)
    });
    // So many at once may be an accident of the store's.
    kersey::lab::interrupt::sleep(Duration::from_secs(1)).unwrap();
    assert_eq!(routes(&overlay, 1).len(), PEERS);
}

#[test]
fn what_stood_there_before_is_taken_over_or_taken_away() {
    if !require_etcd("what_stood_there_before_is_taken_over_or_taken_away") {
        return;
    }
    let mut overlay = two_and_a_spare("before");
    overlay.put("subnets/10.244.199.0-24", FLANNEL);
    let to = prefix("10.244.199.0/24");
    wait_for("the lease is a route", within(SOON), || {
        held(&overlay, 1, to).len() == 1
    });
    overlay.terminate(1);
    for command in [
        // flannel's, to the same place.
        "route replace 10.244.199.0/24 via 192.0.2.254",
        // Ours, of a peer that left meanwhile; of another network; of a whole one.
        "route add 10.244.195.0/24 via 192.0.2.3 proto 75",
        "route add 10.245.0.0/24 via 192.0.2.3 proto 75",
        // Somebody else's, to no peer.
        "route add 10.244.194.0/24 via 192.0.2.3",
    ] {
        ip(&overlay, 1, command);
    }
    overlay.restart(1);
    overlay.wait(1, READY, |status| status.ready && status.peers.len() == 2);
    wait_for("the table is right", within(SOON), || {
        held(&overlay, 1, prefix("10.244.195.0/24")).is_empty()
            && held(&overlay, 1, to)
                == [HeldRoute {
                    owner: RouteOwner::Kersey,
                    route: via(&overlay, 1, to, "192.0.2.3".parse().unwrap()),
                }]
    });
    for kept in ["10.245.0.0/24", "10.244.194.0/24"] {
        assert_eq!(held(&overlay, 1, prefix(kept)).len(), 1, "{kept}");
    }
    overlay.ping_all();
}

#[test]
fn a_lease_that_went_to_another_node_is_another_subnet_everywhere() {
    if !require_etcd("a_lease_that_went_to_another_node_is_another_subnet_everywhere") {
        return;
    }
    let mut overlay = two_and_a_spare("moved");
    let old = overlay.subnet(1).to_string();
    overlay.put(&format!("subnets/{}", old.replace('/', "-")), FLANNEL);
    let status = overlay.wait(1, within(SOON), |status| {
        status.ready && status.node.subnets != [old.clone()]
    });
    let new: Ipv4Prefix = status.node.subnets[0].parse().unwrap();
    let line = format!(
        "FLANNEL_SUBNET={}/24",
        Ipv4Addr::from_bits(new.addr().to_bits() + 1)
    );
    wait_for("the file follows", within(SOON), || {
        fs::read_to_string(overlay.file("1.env")).unwrap().contains(&line)
    });
    let to_spare = |nth| via(&overlay, nth, prefix(&old), "192.0.2.3".parse().unwrap());
    wait_for("the old subnet is a peer's", within(SOON), || {
        routes(&overlay, 1).contains(&to_spare(1)) && routes(&overlay, 2).contains(&to_spare(2))
    });
    let to_one = via(&overlay, 2, new.into(), overlay.lab.nodes[0].v4.into());
    wait_for("the new one is routed to", within(SOON), || {
        routes(&overlay, 2).contains(&to_one)
    });
    assert!(overlay.daemon(1).is_running());
}

#[test]
fn routes_of_another_backend_do_not_lead_past_the_tunnel() {
    if !require_etcd("routes_of_another_backend_do_not_lead_past_the_tunnel") {
        return;
    }
    let mut overlay = host_gw(Blueprint::new("change", 2)).start();
    for nth in [1, 2] {
        wait_for("the route is in", within(SOON), || {
            routes(&overlay, nth).len() == 1
        });
        overlay.terminate(nth);
    }
    overlay.put("config", ClusterPlan::network("udp", false));
    for nth in [1, 2] {
        assert_eq!(routes(&overlay, nth).len(), 1, "it stays when the daemon ends");
        overlay.restart(nth);
    }
    overlay.wait_all();
    for nth in [1, 2] {
        wait_for("only the network's route is left", within(SOON), || {
            let (link, _, _) = overlay.device(nth).expect("the device");
            routes(&overlay, nth) == [Route::direct(prefix("10.244.0.0/16"), link.index)]
        });
    }
    overlay.ping_all();
    assert!(overlay.status(1).peers[0].outbound_packets > 0);
}

#[test]
fn a_translated_public_address_ends_the_daemon() {
    if !require_root("a_translated_public_address_ends_the_daemon") {
        return;
    }
    let mut overlay = host_gw(Blueprint::embedded("translated", 1)).build();
    let mut command = overlay.command(1);
    command.args(["--public-ip", "203.0.113.9"]);
    let mut child = overlay.run("node 1", 1, command);
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    assert_eq!(ended.code(), Some(4), "{}", child.log_end());
    for part in ["203.0.113.9", INTERFACE, "192.0.2.1", "--public-ip"] {
        assert!(
            child.log_end().contains(part),
            "{part:?} is not in {}",
            child.log_end()
        );
    }
}

#[test]
fn without_the_capability_no_route_is_made_and_the_daemon_ends() {
    if !require_root("without_the_capability_no_route_is_made_and_the_daemon_ends") {
        return;
    }
    let mut overlay = host_gw(Blueprint::embedded("denied", 2)).build();
    let first = overlay.command(1);
    let _first = overlay.run("node 1", 1, first);
    let kersey = overlay.command(2);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let mut child = overlay.run("node 2", 2, command);
    let ended = child.wait_end(READY).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", child.log_end());
    assert!(
        child.log_end().contains("kersey needs CAP_NET_ADMIN"),
        "{}",
        child.log_end()
    );
}

fn host_gw(mut blueprint: Blueprint) -> Blueprint {
    blueprint.network = ClusterPlan::network("host-gw", false);
    blueprint
}

fn two_and_a_spare(tag: &str) -> Overlay {
    let mut blueprint = host_gw(Blueprint::new(tag, 3));
    blueprint.daemons = 2;
    let overlay = blueprint.start();
    for nth in [1, 2] {
        wait_for("the route is in", within(SOON), || {
            routes(&overlay, nth) == routes_to_others(&overlay, nth)
        });
    }
    overlay
}

/// The routes Kersey has on a node, in order; the lab's default routes left out.
pub(crate) fn routes(overlay: &Overlay, nth: usize) -> Vec<Route> {
    let mut routes = overlay
        .namespace(nth)
        .netlink(async |netlink| Ok(netlink.own_routes().await?))
        .unwrap();
    routes.retain(|route| route.destination.len() > 0);
    routes.sort_by_key(|route| route.destination);
    routes
}

/// All routes of a node to a destination.
fn held(overlay: &Overlay, nth: usize, to: Prefix) -> Vec<HeldRoute> {
    let mut routes = overlay
        .namespace(nth)
        .netlink(async |netlink| Ok(netlink.routes().await?))
        .unwrap();
    routes.retain(|held| held.route.destination == to);
    routes
}

/// The routes a node should have, in order: to the subnets of all others through their addresses.
pub(crate) fn routes_to_others(overlay: &Overlay, nth: usize) -> Vec<Route> {
    let mut wanted = Vec::new();
    for other in (1..=overlay.nodes.len()).filter(|&other| other != nth) {
        let node = &overlay.lab.nodes[other - 1];
        for subnet in overlay.status(other).node.subnets {
            let to = prefix(&subnet);
            let gateway: IpAddr = match to {
                Prefix::V4(_) => node.v4.into(),
                Prefix::V6(_) => node.v6.into(),
            };
            wanted.push(via(overlay, nth, to, gateway));
        }
    }
    wanted.sort_by_key(|route| route.destination);
    wanted
}

pub(crate) fn via(overlay: &Overlay, nth: usize, to: Prefix, gateway: IpAddr) -> Route {
    let index = overlay
        .namespace(nth)
        .netlink(async |netlink| Ok(netlink.link(INTERFACE).await?.index))
        .unwrap();
    Route {
        gateway: Gateway::Via(gateway),
        ..Route::direct(to, index)
    }
}

pub(crate) fn prefix(text: &str) -> Prefix {
    let v4 = text.parse().map(Prefix::V4);
    v4.or_else(|_| text.parse().map(Prefix::V6)).unwrap()
}

/// What `kersey status` prints on a node.
pub(crate) fn show(overlay: &Overlay, nth: usize) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command
        .arg("status")
        .arg("--status-socket")
        .arg(overlay.socket(nth));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `ip` on a node, as an operator would.
pub(crate) fn ip(overlay: &Overlay, nth: usize, words: &str) {
    let mut command = Command::new("ip");
    command.args(words.split_whitespace());
    let log = overlay.file("ip.log");
    let mut child = Child::start("ip", overlay.namespace(nth), command, &log).unwrap();
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    assert!(ended.success(), "ip {words}: {}", child.log_end());
}
