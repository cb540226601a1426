//! An older release and this one: in one network, and one after the other on a node (F11).
//!
//! `KERSEY_TEST_OLDER` is the path of the older program. Without it there is nothing to compare, so the tests are ignored unless asked for.

use std::path::PathBuf;

use kersey::lab::cluster::ClusterPlan;

use crate::handover::{take_over, under_probe};
use crate::overlay::{Blueprint, Conversation, Overlay, READY, figure};
use crate::support::{require_etcd, require_root};

const BACKENDS: [&str; 3] = ["udp", "vxlan", "srv6"];

fn older() -> PathBuf {
    let path =
        std::env::var_os("KERSEY_TEST_OLDER").expect("KERSEY_TEST_OLDER is the path of an older kersey");
    PathBuf::from(path)
}

fn carries_everything(overlay: &mut Overlay) {
    overlay.ping_all();
    overlay.transfer(1, 2, 1 << 20);
    let report = under_probe(overlay, |overlay| overlay.transfer(2, 3, 1 << 20));
    assert_eq!((report.lost(), report.duplicates()), (0, 0), "{report:?}");
}

#[test]
#[ignore = "needs an older release: KERSEY_TEST_OLDER"]
fn f11_an_older_release_and_this_one_share_a_network() {
    if !require_etcd("f11_an_older_release_and_this_one_share_a_network") {
        return;
    }
    for kind in BACKENDS {
        for nodes in [vec![1], vec![2, 3]] {
            let mut blueprint = Blueprint::new("mixed", 3);
            blueprint.network = ClusterPlan::network(kind, true);
            blueprint.programs = nodes.iter().map(|&nth| (nth, older())).collect();
            let mut overlay = blueprint.start();
            carries_everything(&mut overlay);
            figure(
                "shared by two releases: backend, nodes of the older",
                (kind, &nodes),
            );
        }
    }
}

/// The HTTP API between server and client, and the store's file, are those of the other release.
#[test]
#[ignore = "needs an older release: KERSEY_TEST_OLDER"]
fn f11_an_older_server_and_a_newer_one_take_turns() {
    if !require_root("f11_an_older_server_and_a_newer_one_take_turns") {
        return;
    }
    for server_is_older in [true, false] {
        let mut blueprint = Blueprint::embedded("servers", 3);
        let nodes = if server_is_older { vec![1] } else { vec![2, 3] };
        blueprint.programs = nodes.iter().map(|&nth| (nth, older())).collect();
        let mut overlay = blueprint.start();
        carries_everything(&mut overlay);
        let subnets: Vec<_> = (1..=3).map(|nth| overlay.subnet(nth)).collect();
        overlay.terminate(1);
        overlay.set_program(1, (!server_is_older).then(older));
        overlay.restart(1);
        overlay.wait_all();
        for nth in 1..=3 {
            overlay.wait(nth, READY, |status| status.store.connected);
        }
        assert_eq!(
            (1..=3).map(|nth| overlay.subnet(nth)).collect::<Vec<_>>(),
            subnets
        );
        carries_everything(&mut overlay);
    }
}

#[test]
#[ignore = "needs an older release: KERSEY_TEST_OLDER"]
fn f11_a_node_is_upgraded_and_put_back_under_traffic() {
    if !require_etcd("f11_a_node_is_upgraded_and_put_back_under_traffic") {
        return;
    }
    for kind in BACKENDS {
        let mut blueprint = Blueprint::new("upgrade", 3);
        blueprint.network = ClusterPlan::network(kind, false);
        blueprint.programs = (1..=3).map(|nth| (nth, older())).collect();
        let mut overlay = blueprint.start();
        let (subnet, device) = (overlay.subnet(2), overlay.device(2).unwrap().0.index);
        let mut conversation = Conversation::start(overlay.pod(1), overlay.pod(2));
        conversation.exchange();
        let report = under_probe(&mut overlay, |overlay| {
            for program in [None, Some(older()), None] {
                overlay.set_program(2, program);
                take_over(overlay, 2, &[]);
                conversation.exchange();
            }
        });
        figure(
            "up, back and up again: backend, lost, longest gap",
            (kind, report.lost(), report.longest_gap()),
        );
        assert!(report.lost() <= 3, "{kind}: {report:?}");
        assert_eq!(report.duplicates(), 0, "{kind}: {report:?}");
        assert_eq!(overlay.subnet(2), subnet);
        assert_eq!(
            overlay.device(2).unwrap().0.index,
            device,
            "the device is the same"
        );
        carries_everything(&mut overlay);

        // The ordinary way, an end and a start.
        overlay.terminate(1);
        overlay.set_program(1, None);
        overlay.restart(1);
        overlay.wait_all();
        carries_everything(&mut overlay);
    }
}
