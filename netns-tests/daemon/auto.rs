//! The backend that chooses: vxlan, udp while somebody else has vxlan's port, and vxlan again.

use std::time::Duration;

use kersey::host::netlink::Vxlan;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::topology::INTERFACE;

use crate::overlay::{Blueprint, within};
use crate::support::require_root;

#[test]
fn a_taken_port_means_udp_and_a_free_one_vxlan_again() {
    if !require_root("a_taken_port_means_udp_and_a_free_one_vxlan_again") {
        return;
    }
    let mut blueprint = Blueprint::embedded("auto", 2);
    blueprint.network = ClusterPlan::network("auto", false);
    let mut overlay = blueprint.build();
    let local = overlay.lab.nodes[1].v4;
    let holder = overlay
        .namespace(2)
        .netlink(async |netlink| {
            let underlay_index = netlink.link(INTERFACE).await?.index;
            let vxlan = Vxlan {
                name: "flannel.1",
                vni: 1,
                underlay_index,
                local: local.into(),
                port: 8472,
                mtu_bytes: 1450,
            };
            netlink.add_vxlan(&vxlan).await?;
            let index = netlink.link(vxlan.name).await?.index;
            // A device that is down has no socket.
            netlink.set_up(index).await?;
            Ok(index)
        })
        .unwrap();
    overlay.start_daemons();
    let chosen = [1, 2].map(|nth| overlay.status(nth).backend);
    assert_eq!([&*chosen[0].name, &*chosen[1].name], ["vxlan", "udp"]);
    assert!(chosen[1].reason.contains("8472"), "{}", chosen[1].reason);
    // Each is reached as its lease says, so the two need not agree.
    overlay.ping_all();
    overlay.transfer(1, 2, 1 << 20);

    overlay
        .namespace(2)
        .netlink(async |netlink| Ok(netlink.delete_link(holder).await?))
        .unwrap();
    overlay.wait(2, within(Duration::from_secs(12)), |status| {
        status.ready && status.backend.name == "vxlan" && !status.peers.is_empty()
    });
    overlay.wait(1, within(Duration::from_secs(5)), |status| {
        status.peers[0].endpoints == ["192.0.2.2:8472"]
    });
    overlay.ping_all();
    overlay.transfer(2, 1, 1 << 20);
}
