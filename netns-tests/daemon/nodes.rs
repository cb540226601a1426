//! Nodes that come, talk, and go.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use kersey::addr::{Ipv4Prefix, Ipv6Prefix};
use kersey::host::netlink::Route;
use kersey::lab::cluster::{ClusterPlan, StoreKind};
use kersey::lab::traffic::udp::Flood;

use crate::overlay::{Blueprint, DEVICE, Overlay, Underlay};
use crate::support::{require_etcd, require_root};

#[test]
fn two_nodes_with_an_embedded_store() {
    if require_root("two_nodes_with_an_embedded_store") {
        live_a_life(Blueprint::embedded("nodes", 2), 1472);
    }
}

#[test]
fn three_nodes_in_both_families_with_an_embedded_store() {
    if require_root("three_nodes_in_both_families_with_an_embedded_store") {
        let mut blueprint = Blueprint::embedded("nodes", 3);
        blueprint.network = ClusterPlan::network("udp", true);
        live_a_life(blueprint, 1452);
    }
}

#[test]
fn two_nodes_with_etcd() {
    if require_etcd("two_nodes_with_etcd") {
        live_a_life(Blueprint::new("nodes", 2), 1472);
    }
}

#[test]
fn three_nodes_in_both_families_with_etcd() {
    if require_etcd("three_nodes_in_both_families_with_etcd") {
        let mut blueprint = Blueprint::new("nodes", 3);
        blueprint.network = ClusterPlan::network("udp", true);
        live_a_life(blueprint, 1452);
    }
}

#[test]
fn an_underlay_without_ipv4_carries_ipv4() {
    if require_etcd("an_underlay_without_ipv4_carries_ipv4") {
        let mut blueprint = Blueprint::new("nodes", 2);
        blueprint.underlay = Underlay::V6Only;
        live_a_life(blueprint, 1452);
    }
}

/// Start, files and device as flannel's users know them, traffic, and an end that leaves nothing but the leases.
fn live_a_life(blueprint: Blueprint, mtu: u16) {
    let (store, dual) = (blueprint.store, blueprint.network.contains("IPv6Network"));
    let mut overlay = blueprint.start();
    for nth in 1..=overlay.nodes.len() {
        assert_files_and_device(&overlay, nth, mtu, dual);
    }
    overlay.ping_all();
    overlay.transfer(1, 2, (4 << 20) + 3);
    // Fewer than the device's queue of 500 holds: whatever else the machine does, none is lost.
    let flood = Flood {
        payload_bytes: 900,
        rate: Some(1000),
        duration: Duration::from_millis(300),
    };
    for (one, two) in overlay.pods(1).into_iter().zip(overlay.pods(2)) {
        for (from, to) in [(one, two), (two, one)] {
            let report = flood.run(from, to).unwrap();
            assert_eq!(
                (report.counts.corrupted, report.counts.lost),
                (0, 0),
                "{report:?}"
            );
        }
    }
    for nth in 1..=overlay.nodes.len() {
        overlay.assert_no_drops(nth);
    }

    let subnets: Vec<_> = (1..=overlay.nodes.len())
        .map(|nth| overlay.status(nth).node.subnets)
        .collect();
    for nth in (1..=overlay.nodes.len()).rev() {
        let routes = overlay.device(nth).unwrap().2.len();
        assert_eq!(routes, if dual { 2 } else { 1 });
        overlay.terminate(nth);
        assert!(overlay.device(nth).is_none(), "the device of node {nth} stayed");
        // The lab's own default routes stay.
        let left = overlay
            .namespace(nth)
            .netlink(async |netlink| Ok(netlink.own_routes().await?));
        assert!(left.unwrap().iter().all(|route| route.destination.len() == 0));
        assert!(
            !overlay.socket(nth).exists(),
            "the status socket of node {nth} stayed"
        );
        assert!(overlay.file(&format!("{nth}.env")).exists());
        if store == StoreKind::Etcd {
            let key = format!("subnets/{}", subnets[nth - 1].join("&").replace('/', "-"));
            let (value, etcd_lease) = overlay.get(&key).expect("the lease stays");
            assert!(
                value.starts_with(r#"{"PublicIP":""#) && etcd_lease != 0,
                "{value} {etcd_lease}"
            );
        }
    }
    // Only the store can know the subnets again.
    for nth in 1..=overlay.nodes.len() {
        fs::remove_file(overlay.file(&format!("{nth}.env"))).unwrap();
        if store == StoreKind::Etcd {
            // Written only after some seconds of life.
            let _ = fs::remove_dir_all(overlay.file(&format!("{nth}.data")));
        }
        overlay.restart(nth);
    }
    overlay.wait_all();
    for (nth, subnets) in (1..).zip(subnets) {
        assert_eq!(overlay.status(nth).node.subnets, subnets, "node {nth}");
    }
}

fn assert_files_and_device(overlay: &Overlay, nth: usize, mtu: u16, dual: bool) {
    let status = overlay.status(nth);
    let v4: Ipv4Prefix = status.node.subnets[0].parse().unwrap();
    let v6: Option<Ipv6Prefix> = status.node.subnets.get(1).map(|text| text.parse().unwrap());
    assert_eq!(v6.is_some(), dual);
    let first = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => IpAddr::from(std::net::Ipv4Addr::from_bits(addr.to_bits() + 1)),
        IpAddr::V6(addr) => IpAddr::from(std::net::Ipv6Addr::from_bits(addr.to_bits() + 1)),
    };
    let mut text = format!(
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={}/24\n",
        first(v4.addr().into())
    );
    if let Some(v6) = v6 {
        text += &format!(
            "FLANNEL_IPV6_NETWORK=fd00:10:244::/56\nFLANNEL_IPV6_SUBNET={}/64\n",
            first(v6.addr().into())
        );
    }
    text += &format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n");
    let file = overlay.file(&format!("{nth}.env"));
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o644);

    let (link, addresses, mut routes) = overlay.device(nth).unwrap();
    assert_eq!((link.name.as_str(), link.mtu_bytes), (DEVICE, u32::from(mtu)));
    let mut held: Vec<_> = addresses
        .iter()
        .map(|held| (held.addr, held.prefix_len))
        .collect();
    held.sort();
    let mut wanted = vec![(IpAddr::from(v4.addr()), 32)];
    wanted.extend(v6.map(|v6| (IpAddr::from(v6.addr()), 128)));
    assert_eq!(held, wanted);
    routes.sort_by_key(|route| route.destination);
    let v4: Ipv4Prefix = "10.244.0.0/16".parse().unwrap();
    let mut wanted = vec![Route::direct(v4.into(), link.index)];
    if dual {
        let v6: Ipv6Prefix = "fd00:10:244::/56".parse().unwrap();
        wanted.push(Route::direct(v6.into(), link.index));
    }
    assert_eq!(routes, wanted);
}
