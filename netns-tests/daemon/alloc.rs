//! alloc: a lease and nothing else.

use std::fs;
use std::net::Ipv4Addr;

use kersey::lab::cluster::ClusterPlan;

use crate::overlay::{Blueprint, DEVICE};
use crate::routed::{routes, show};
use crate::support::require_etcd;

#[test]
fn alloc_is_a_lease_and_a_file() {
    if !require_etcd("alloc_is_a_lease_and_a_file") {
        return;
    }
    let mut blueprint = Blueprint::new("alloc", 2);
    blueprint.network = ClusterPlan::network("ALLOC", false);
    let mut overlay = blueprint.start();
    for nth in [1, 2] {
        let subnet = overlay.subnet(nth);
        let first = Ipv4Addr::from_bits(subnet.addr().to_bits() + 1);
        let file = fs::read_to_string(overlay.file(&format!("{nth}.env"))).unwrap();
        assert_eq!(
            file,
            format!(
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={first}/24\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n"
            )
        );
        let key = format!("subnets/{}", subnet.to_string().replace('/', "-"));
        let (value, lease) = overlay.get(&key).expect("the lease");
        assert_eq!(
            value,
            format!(r#"{{"PublicIP":"192.0.2.{nth}","PublicIPv6":null}}"#)
        );
        assert_ne!(lease, 0);
        assert!(overlay.device(nth).is_none(), "node {nth} has a device");
        assert_eq!(routes(&overlay, nth), []);
        let status = overlay.status(nth);
        assert!(status.device.is_absent(), "{status:#?}");
        assert_eq!(status.peers[0].kernel_route, None);
    }
    let table = show(&overlay, 1);
    for odd in [DEVICE, "device", "none", "MTU 0", "route"] {
        assert!(!table.contains(odd), "{odd:?} is in {table}");
    }
    overlay.terminate(1);
    assert!(overlay.file("1.env").exists());
}
