//! F21: a wire that loses, delays, swaps, doubles and changes frames.

use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::traffic::tcp::Verified;

use crate::impair::{Impair, Manner};
use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, figure};
use crate::{flows, probe, require_root, warm};

#[test]
fn f21_no_wire_is_bad_enough_to_change_a_byte() {
    if !require_root("f21_no_wire_is_bad_enough_to_change_a_byte") {
        return;
    }
    for backend in ["udp", "vxlan"] {
        bad_wires(backend, 3, 1, 0);
    }
}

/// Wires, and how many MB come over each in the short form: TCP over the worst is slow by nature.
const WIRES: [(&str, u64, Manner); 5] = [
    (
        "1 % lost, 1 % doubled, 5 % overtaking",
        10_000_000,
        Manner {
            delay: Duration::from_millis(1),
            jitter: Duration::from_micros(500),
            loss: 0.01,
            duplicate: 0.01,
            reorder: 0.05,
            flip: 0.0,
        },
    ),
    (
        "a bit flipped in 2 % of frames",
        10_000_000,
        Manner {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            flip: 0.02,
        },
    ),
    (
        "5 % lost",
        3_000_000,
        Manner {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.05,
            duplicate: 0.0,
            reorder: 0.0,
            flip: 0.0,
        },
    ),
    (
        "20 % lost",
        100_000,
        Manner {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.2,
            duplicate: 0.0,
            reorder: 0.0,
            flip: 0.0,
        },
    ),
    (
        "100 ms more or less 50, 5 % overtaking, 1 % lost",
        100_000,
        Manner {
            delay: Duration::from_millis(100),
            jitter: Duration::from_millis(50),
            loss: 0.01,
            duplicate: 0.01,
            reorder: 0.05,
            flip: 0.0,
        },
    ),
];

/// One pair of nodes over each wire, so many times; at least `least` bytes each time.
pub(crate) fn bad_wires(backend: &str, seed: u64, times: u64, least: u64) {
    let mut blueprint = Blueprint::embedded(&format!("wire-{backend}"), 2);
    blueprint.network = ClusterPlan::network(backend, false);
    blueprint.lab.offloads = Switch::Off;
    let mut overlay = blueprint.start();
    let wire = part(&overlay, 2, seed);
    overlay.ping_all();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    for (name, bytes, manner) in WIRES {
        wire.set(manner);
        let probe = probe(&overlay, 1, 2);
        for time in 0..times {
            let transfer = Verified {
                bytes: bytes.max(least),
                seed: seed + time,
                patience: Duration::from_secs(60),
            };
            let report = transfer.run(overlay.pod(1), overlay.pod(2)).unwrap();
            assert!(report.intact, "{backend}, {name}: {report:?}");
            figure(&format!("{backend}, {name}: s"), report.seconds);
        }
        wire.set(Manner::default());
        flows(&probe);
        let report = probe.stop().unwrap();
        figure(
            &format!("{backend}, {name}: probe sent, lost, swapped, doubled"),
            (
                report.there.sent + report.back.sent,
                report.lost(),
                report.reordered(),
                report.duplicates(),
            ),
        );
        assert_eq!(report.corrupted(), 0, "{backend}, {name}: {report:?}");
        // The wire is good again: nothing is left of how it was.
        overlay.ping_all();
    }
    let after = crate::probe(&overlay, 1, 2);
    flows(&after);
    crate::assert_untouched(&after.stop().unwrap());
    oracle.check(&mut overlay, WIRES.len());
    figure(&format!("{backend}: node 2 refused"), overlay.status(2).drops);
    figure(&format!("{backend}: the wire"), wire.end());
}

/// Takes a node's link out of the bridge and leads it back in through a wire that can be made bad.
pub(crate) fn part(overlay: &Overlay, nth: usize, seed: u64) -> Impair {
    let (port, near, far) = (format!("p{nth}"), format!("y{nth}"), format!("x{nth}"));
    overlay
        .hub()
        .netlink(async |netlink| {
            netlink.add_veth(&near, &far, None).await?;
            let bridge = netlink.link("br0").await?.index;
            let port = netlink.link(&port).await?.index;
            netlink.enslave(port, 0).await?;
            netlink.enslave(netlink.link(&far).await?.index, bridge).await?;
            for link in [&near, &far] {
                for offload in [
                    kersey::host::ethtool::Offload::TcpSegmentation,
                    kersey::host::ethtool::Offload::GenericSegmentation,
                    kersey::host::ethtool::Offload::Checksum,
                ] {
                    kersey::host::ethtool::set(link, offload, Switch::Off)?;
                }
                netlink.set_up(netlink.link(link).await?.index).await?;
            }
            Ok(())
        })
        .unwrap();
    Impair::between(overlay.hub(), [&port, &near], Manner::default(), seed)
}
