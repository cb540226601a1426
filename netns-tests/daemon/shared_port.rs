//! Several vxlan networks of one daemon on one UDP port, told apart by VNI.
//!
//! ```text
//!   node 1                                                          node 2: Kersey as well, or the kernel
//!     +- green  VNI 7  flannel0 ──┐                          ┌── green  VNI 7  flannel0 or flannel.7
//!                                 ├─ UDP port 8472 ─────────┤
//!     +- lilac  VNI 8  flannel1 ──┘                          └── lilac  VNI 8  flannel1 or flannel.8
//! ```

use std::time::Duration;

use kersey::lab::kernel_node::{self, KernelNode, KernelPlan};
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::lab::traffic::probe::{Probe, ProbeReport};
use kersey::lab::traffic::tcp::Verified;
use kersey::options::{EtcdOptions, StoreKind};

use crate::networks::Several;
use crate::overlay::{PREFIX, READY, figure, wait_for};
use crate::support::require_etcd;

const GREEN: &str = r#"{"Network":"10.245.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#;
const LILAC: &str = r#"{"Network":"10.248.0.0/16","Backend":{"Type":"vxlan","VNI":8}}"#;
const TWIN: &str = r#"{"Network":"10.249.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#;
const PLAIN: &str = r#"{"Network":"10.250.0.0/16","Backend":{"Type":"udp","Port":8472}}"#;
const BOTH: [&str; 2] = ["green", "lilac"];

#[test]
fn vxlan_networks_share_a_port_and_are_told_apart_by_vni() {
    if !require_etcd("vxlan_networks_share_a_port_and_are_told_apart_by_vni") {
        return;
    }
    for flags in [
        &["--watch-networks"] as &[&str],
        // The port itself sends, two sockets share it, and the kernel merges nothing.
        &[
            "--watch-networks",
            "--source-ports=1",
            "--queues=2",
            "--udp-gro=off",
        ],
    ] {
        let mut several = Several::build("vnis", 2, flags);
        several.overlay.put("green/config", GREEN);
        several.start(1);
        several.start(2);
        several.wait_up(&["green"]);
        let (sent, report) = beside(&mut several, "green", |several| {
            // The other comes, carries traffic, and goes, and comes again.
            for _ in 0..2 {
                several.overlay.put("lilac/config", LILAC);
                several.wait_up(&BOTH);
                carry(several);
                several.overlay.delete("lilac/config");
                for nth in 1..=2 {
                    several.wait(nth, |networks| networks.keys().eq(["green"]));
                }
            }
        });
        figure(
            "another network on the port came and went: probe sent, lost",
            (sent, report.lost()),
        );
        assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");

        several.overlay.put("lilac/config", LILAC);
        several.wait_up(&BOTH);
        several.wait(1, |networks| {
            let numbers = |name: &str| (networks[name].backend.vni, networks[name].backend.port);
            numbers("green") == (Some(7), Some(8472)) && numbers("lilac") == (Some(8), Some(8472))
        });
        carry(&several);
        // The first that had the port goes, and the other carries on.
        let (sent, report) = beside(&mut several, "lilac", |several| {
            several.overlay.delete("green/config");
            for nth in 1..=2 {
                several.wait(nth, |networks| networks.keys().eq(["lilac"]));
            }
            several.overlay.put("green/config", GREEN);
            several.wait_up(&BOTH);
        });
        figure(
            "the first network on the port went and came: probe sent, lost",
            (sent, report.lost()),
        );
        assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
        carry(&several);

        // Nothing was taken for what it is not.
        for name in BOTH {
            let drops = several.network(2, name).drops;
            assert_eq!(
                drops.get("other_vni").copied().unwrap_or_default(),
                0,
                "{drops:?}"
            );
        }
        several.overlay.kill(2);
        several.restart(2);
        several.wait_up(&BOTH);
        carry(&several);
    }
}

#[test]
fn of_networks_on_one_port_a_second_with_the_vni_or_without_any_is_refused() {
    if !require_etcd("of_networks_on_one_port_a_second_with_the_vni_or_without_any_is_refused") {
        return;
    }
    let mut several = Several::build("twins", 1, &["--watch-networks"]);
    several.overlay.put("green/config", GREEN);
    several.start(1);
    several.wait_ready(1, &["green"]);
    several.overlay.put("twin/config", TWIN);
    several.overlay.put("plain/config", PLAIN);
    let networks = several.wait(1, |networks| {
        ["twin", "plain"].iter().all(|&name| {
            networks
                .get(name)
                .is_some_and(|network| network.problem.is_some())
        })
    });
    for (name, words) in [
        ("twin", ["\"twin\"", "\"green\"", "VNI 7", "UDP port 8472"]),
        ("plain", ["\"plain\"", "\"green\"", "only vxlan", "UDP port 8472"]),
    ] {
        let problem = networks[name].problem.as_deref().unwrap();
        assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
    }
    assert!(networks["green"].ready);
}

#[test]
fn networks_that_share_a_port_are_handed_to_a_successor() {
    if !require_etcd("networks_that_share_a_port_are_handed_to_a_successor") {
        return;
    }
    let mut several = Several::build("vnihand", 2, &["--watch-networks"]);
    several.overlay.put("green/config", GREEN);
    several.overlay.put("lilac/config", LILAC);
    several.start(1);
    several.start(2);
    several.wait_up(&BOTH);
    carry(&several);
    let (sent, report) = beside(&mut several, "green", |several| {
        several.flags.push("--takeover".to_owned());
        let successor = several.spawn(2);
        let mut old = std::mem::replace(&mut several.overlay.nodes[1].child, successor);
        let ended = old.wait_end(READY).unwrap();
        assert_eq!(ended.code(), Some(0), "{}", old.log_end());
        several.wait_up(&BOTH);
    });
    figure(
        "takeover of two networks on one port: probe sent, lost",
        (sent, report.lost()),
    );
    assert!(report.lost() <= 3, "{report:?}");
    assert_eq!(report.corrupted(), 0, "{report:?}");
    carry(&several);
}

#[test]
fn kernel_vxlan_devices_on_one_port_reach_the_networks_of_one_daemon() {
    if !require_etcd("kernel_vxlan_devices_on_one_port_reach_the_networks_of_one_daemon") {
        return;
    }
    let mut several = Several::build("vnikern", 2, &["--watch-networks"]);
    several.overlay.put("green/config", GREEN);
    several.overlay.put("lilac/config", LILAC);
    several.start(1);
    several.wait_ready(1, &BOTH);
    let kernels = BOTH.map(|name| {
        let node = &several.overlay.lab.nodes[1];
        let plan = KernelPlan {
            store: StoreKind::Etcd(EtcdOptions {
                endpoints: vec![several.overlay.etcd_place()],
                prefix: format!("{PREFIX}/{name}"),
                ca_file: None,
                client_cert: None,
                login: None,
            }),
            interface: INTERFACE.to_owned(),
            underlay: kernel_node::Underlay {
                v4: Some(node.v4),
                v6: None,
            },
            subnet: None,
        };
        let mut kernel = KernelNode::join(&node.namespace, plan).unwrap();
        kernel.follow(READY, |known| known.len() == 1).unwrap();
        kernel
    });
    // Each node of a lab takes the loopback device for its own.
    several
        .overlay
        .namespace(2)
        .netlink(async |netlink| {
            let loopback = netlink.link("lo").await?.index;
            for pod in kernels.iter().flat_map(KernelNode::pods) {
                netlink.add_address(loopback, *pod, 32).await?;
            }
            Ok(())
        })
        .unwrap();
    several.wait(1, |networks| {
        BOTH.iter()
            .all(|&name| networks.get(name).is_some_and(|network| network.peers.len() == 1))
    });
    for _ in 0..3 {
        for (name, kernel) in BOTH.iter().zip(&kernels) {
            several.ping(1, several.pod(1, name), kernel.pods()[0]);
            several.ping(2, kernel.pods()[0], several.pod(1, name));
        }
    }
    // Both at once, so that one thread finds the other's packets.
    let probes = [0, 1].map(|at| {
        Probe::start(
            End::new(several.overlay.namespace(1), several.pod(1, BOTH[at])),
            End::new(several.overlay.namespace(2), kernels[at].pods()[0]),
        )
        .unwrap()
    });
    for probe in &probes {
        wait_for("the probes run", READY, || probe.received().0 > 500);
    }
    for probe in probes {
        let report = probe.stop().unwrap();
        assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    }
}

/// Both networks carry packets, large transfers at the same time included.
fn carry(several: &Several) {
    let pods = BOTH.map(|name| [several.pod(1, name), several.pod(2, name)]);
    for [one, two] in pods {
        several.ping(1, one, two);
        several.ping(2, two, one);
    }
    let transfer = Verified {
        bytes: 4 << 20,
        seed: 7,
        patience: Duration::from_secs(10),
    };
    std::thread::scope(|scope| {
        for [one, two] in pods {
            let (from, to) = (
                End::new(several.overlay.namespace(1), one),
                End::new(several.overlay.namespace(2), two),
            );
            let transfer = &transfer;
            scope.spawn(move || {
                for (from, to) in [(from, to), (to, from)] {
                    let report = transfer.run(from, to).unwrap();
                    assert!(report.intact, "{report:?}");
                }
            });
        }
    });
}

/// Runs a probe between the nodes' pods of a network beside `change`; what was sent, and what became of it.
fn beside(several: &mut Several, name: &str, change: impl FnOnce(&mut Several)) -> (u64, ProbeReport) {
    let ends = [several.pod(1, name), several.pod(2, name)];
    let spaces = [1, 2].map(|nth| {
        let name = several.overlay.namespace(nth).name();
        kersey::lab::netns::Namespace::existing(name).unwrap()
    });
    let probe = Probe::start(End::new(&spaces[0], ends[0]), End::new(&spaces[1], ends[1])).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    change(several);
    std::thread::sleep(Duration::from_millis(300));
    let report = probe.stop().unwrap();
    (report.there.sent + report.back.sent, report)
}
