//! `DirectRouting`: peers on the node's own link are gateways, all others are behind the tunnel.

use kersey::lab::traffic::probe::Probe;

use crate::overlay::{Blueprint, Daemon, READY, wait_for, within};
use crate::routed::{SOON, ip, prefix, routes, show, via};
use crate::support::require_etcd;

#[test]
fn vxlan_routes_directly_to_peers_on_the_link_and_tunnels_to_others() {
    if !require_etcd("vxlan_routes_directly_to_peers_on_the_link_and_tunnels_to_others") {
        return;
    }
    let mut blueprint = Blueprint::new("direct", 3);
    blueprint.network =
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#.to_owned();
    let mut overlay = blueprint.build();
    // Node 3 moves behind the hub, which forwards.
    for command in [
        "address flush dev eth0",
        "address add 198.51.100.3/24 dev eth0",
        "route add default via 198.51.100.254",
    ] {
        ip(&overlay, 3, command);
    }
    overlay
        .hub()
        .netlink(async |netlink| {
            let index = netlink.link("br0").await?.index;
            Ok(netlink.add_address(index, "198.51.100.254".parse()?, 24).await?)
        })
        .unwrap();
    overlay.hub().sysctl("ipv4/ip_forward", "1").unwrap();
    for nth in 1..=3 {
        let command = overlay.command(nth);
        let child = overlay.run(&format!("node {nth}"), nth, command);
        overlay.nodes.push(Daemon {
            child,
            pods: Vec::new(),
        });
    }
    overlay.wait_all();
    for (nth, near) in [(1, 2), (2, 1)] {
        let to = prefix(&overlay.subnet(near).to_string());
        let gateway = overlay.lab.nodes[near - 1].v4.into();
        let direct = via(&overlay, nth, to, gateway);
        wait_for("the near peer has its route", within(SOON), || {
            routes(&overlay, nth).contains(&direct)
        });
        assert_eq!(
            routes(&overlay, nth).len(),
            2,
            "the network's, and the near peer's"
        );
    }
    assert_eq!(routes(&overlay, 3).len(), 1, "nobody is near");
    overlay.ping_all();
    overlay.transfer(1, 2, 1 << 20);
    let near = overlay.subnet(2).to_string();
    let status = overlay.wait(1, within(SOON), |status| {
        status.peers.iter().all(|peer| {
            let is_near = peer.subnets[0] == near;
            (peer.kernel_route.as_deref() == Some("installed")) == is_near
        })
    });
    for peer in status.peers {
        let is_near = peer.subnets[0] == near;
        assert_eq!(peer.outbound_packets == 0, is_near, "{peer:?}");
    }
    assert!(
        show(&overlay, 1).contains(":8472, direct "),
        "{}",
        show(&overlay, 1)
    );

    // Without the route it is the tunnel's again, and taken at the other end.
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    ip(&overlay, 1, &format!("route del {near}"));
    wait_for("the route is back", within(SOON), || {
        routes(&overlay, 1).len() == 2
    });
    let report = probe.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    let peers = overlay.status(1).peers;
    let tunnelled = peers.iter().find(|peer| peer.subnets[0] == near).expect("node 2");
    assert!(tunnelled.outbound_packets > 0, "{tunnelled:?}");

    // A direct route goes with its peer.
    overlay.terminate(2);
    let key = format!("subnets/{}", near.replace('/', "-"));
    overlay.delete(&key);
    wait_for("the route goes with its peer", within(SOON), || {
        routes(&overlay, 1).len() == 1
    });
}
