//! F7 with several networks: etcd loses them all and every lease. Networks that a list lacks stay for a while, and so does their traffic.

use std::net::IpAddr;
use std::time::Duration;

use kersey::lab::traffic::End;
use kersey::lab::traffic::probe::Probe;
use nix::sys::signal::Signal;

use crate::networks::Several;
use crate::oracle::Oracle;
use crate::overlay::{READY, figure, wait_for, within};
use crate::watch::{assert_untouched, require_etcd, warm};

/// Two ports, two devices, two keys each.
const NETWORKS: [(&str, &str); 2] = [
    ("blue", r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#),
    (
        "green",
        r#"{"Network":"10.245.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#,
    ),
];

#[test]
fn f7_a_store_of_two_networks_that_is_wiped_is_filled_again_and_costs_no_packet() {
    if !require_etcd("f7_a_store_of_two_networks_that_is_wiped_is_filled_again_and_costs_no_packet") {
        return;
    }
    let names = NETWORKS.map(|(name, _)| name);
    let mut several = Several::build("wipe-nets", 2, &["--watch-networks"]);
    put_configs(&several);
    several.start(1);
    several.start(2);
    several.wait_up(&names);
    let pods = [1, 2].map(|nth| names.map(|name| several.pod(nth, name)));
    for order in [[0, 1], [1, 0]] {
        for (node, pods) in several.overlay.nodes.iter_mut().zip(pods) {
            node.pods = order.map(|at| pods[at]).to_vec();
        }
        warm(&several.overlay, 1, 2);
    }
    let mut oracles = names.map(|name| Oracle::start_in(&mut several.overlay, name));
    let keys: Vec<String> = pods.as_flattened().iter().map(|&pod| key(pod)).collect();
    assert!(keys.iter().all(|key| several.overlay.get(key).is_some()));
    let probes = [0, 1].map(|at| {
        let [one, two] = [1, 2].map(|nth| End::new(several.overlay.namespace(nth), pods[nth - 1][at]));
        Probe::start(one, two).unwrap()
    });
    wait_for("the probes run", READY, || {
        probes.iter().all(|probe| probe.received().0 > 100)
    });

    several.overlay.etcd_process().signal(Signal::SIGKILL).unwrap();
    let killed = several.overlay.etcd_process().wait_end(Duration::from_secs(5));
    killed.unwrap();
    std::fs::remove_dir_all(several.overlay.file("etcd")).unwrap();
    several.overlay.start_etcd();
    // Now it is empty, and they know: of no network there is so much as a config.
    const TOLD: &str = "etcd is not the one it was";
    wait_for("they notice", within(Duration::from_secs(10)), || {
        [1, 2].iter().all(|&nth| several.overlay.log(nth).contains(TOLD))
    });
    std::thread::sleep(Duration::from_secs(2));
    for nth in 1..=2 {
        let networks = several.overlay.status(nth).networks.unwrap();
        assert!(networks.keys().eq(names.iter()), "{networks:?}");
        assert!(networks.values().all(|network| network.peers.len() == 1));
    }
    put_configs(&several);
    let took = wait_for(
        "all are registered again",
        within(Duration::from_secs(10)),
        || keys.iter().all(|key| several.overlay.get(key).is_some()),
    );
    figure("F7: two networks, all registered again after", took);
    for oracle in &mut oracles {
        oracle.check_but(&mut several.overlay, 1, &[TOLD]);
    }
    for probe in probes {
        assert_untouched(&probe.stop().unwrap());
    }
}

fn put_configs(several: &Several) {
    for (name, config) in NETWORKS {
        several.overlay.put(&format!("{name}/config"), config);
    }
}

/// The key of the lease that a pod's address is of.
fn key(pod: IpAddr) -> String {
    let text = pod.to_string();
    let (name, subnet) = match text.rsplit_once('.') {
        Some((subnet, _)) if subnet.starts_with("10.244.") => ("blue", subnet),
        Some((subnet, _)) => ("green", subnet),
        None => unreachable!("both networks are IPv4"),
    };
    format!("{name}/subnets/{subnet}.0-24")
}
