//! F12: somebody takes the device away, or changes it by hand.

use std::time::{Duration, Instant};

use kersey::lab::traffic::cpu;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, DEVICE, Overlay, figure, wait_for, within};
use crate::{assert_gap, flows, in_ci, probe, require_root, warm};

/// What is done to the device.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hand {
    Deletes,
    SetsDown,
    SetsDownAndUp,
    TakesTheAddress,
    TakesTheRoute,
    ChangesTheMtu,
}

#[test]
fn f12_a_device_changed_by_hand_is_restored_within_a_second() {
    if require_root("f12_a_device_changed_by_hand_is_restored_within_a_second") {
        // Nine times six.
        hands("hands", in_ci(9, 3));
    }
}

/// So many rounds of everything that can be done to a device.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
pub(crate) fn hands(tag: &str, rounds: usize) {
    let mut overlay = Blueprint::embedded(tag, 2).start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let pid = overlay.daemon(2).pid();
    let (start, used) = (Instant::now(), cpu::process(pid).unwrap());
    let mut faults = 0;
    for hand in [
        Hand::Deletes,
        Hand::SetsDown,
        Hand::SetsDownAndUp,
        Hand::TakesTheAddress,
        Hand::TakesTheRoute,
        Hand::ChangesTheMtu,
    ] {
        let mut gaps = Vec::new();
        let mut restored = Vec::new();
        for _ in 0..rounds {
            let probe = probe(&overlay, 1, 2);
            lay_on(&overlay, 2, hand);
            restored.push(wait_restored(&overlay).as_millis());
            flows(&probe);
            let report = probe.stop().unwrap();
            gaps.push(report.longest_gap().as_millis());
            assert_gap(&report, within(Duration::from_secs(1)));
        }
        faults += rounds;
        figure(&format!("{hand:?}: gaps, ms"), &gaps);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        figure("memory", status.lines().find(|line| line.starts_with("RssAnon")));
        figure(&format!("{hand:?}: as it was after, ms"), &restored);
        oracle.check(&mut overlay, faults);
    }
    let percent = (cpu::process(pid).unwrap() - used).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    figure("CPU %, the probe's packets included", percent);
    figure("log lines", (faults, overlay.log(2).lines().count()));
    assert!(percent <= 20.0, "{percent:.1} % of a core");
    // What is done to it a hundred times is told a few times: a new device is a new data plane, and one line.
    assert!(
        overlay.log(2).lines().count() < 20 + 5 * rounds,
        "{}",
        overlay.log(2)
    );
    assert_eq!(overlay.daemon(2).pid(), pid);
    assert!(overlay.daemon(2).is_running());
}

/// Does it to the device of a node.
pub(crate) fn lay_on(overlay: &Overlay, nth: usize, hand: Hand) {
    overlay
        .namespace(nth)
        .netlink(async |netlink| {
            // Another fault may have taken it.
            let Ok(link) = netlink.link(DEVICE).await else {
                return Ok(());
            };
            let index = link.index;
            match hand {
                Hand::Deletes => netlink.delete_link(index).await?,
                Hand::SetsDown => netlink.set_down(index).await?,
                Hand::SetsDownAndUp => {
                    netlink.set_down(index).await?;
                    netlink.set_up(index).await?;
                }
                Hand::TakesTheAddress => {
                    let held = netlink.addresses().await?;
                    for held in held.iter().filter(|held| held.index == index) {
                        netlink.delete_address(index, held.addr, held.prefix_len).await?;
                    }
                }
                Hand::TakesTheRoute => {
                    for route in netlink.own_routes().await? {
                        if route.index == index {
                            netlink.delete_route(&route).await?;
                        }
                    }
                }
                Hand::ChangesTheMtu => netlink.set_mtu(index, 1300).await?,
            }
            Ok(())
        })
        .unwrap();
}

/// Waits until the device is up, with its address, MTU and route, and says how long that took.
fn wait_restored(overlay: &Overlay) -> Duration {
    let (subnet, mtu) = (overlay.subnet(2), overlay.status(2).node.inner_mtu);
    wait_for("the device is as it was", within(Duration::from_secs(1)), || {
        overlay.device(2).is_some_and(|(link, addresses, routes)| {
            let mut held = addresses.iter().map(|held| (held.addr, held.prefix_len));
            link.mtu_bytes == u32::from(mtu)
                && held.any(|held| held == (subnet.addr().into(), 32))
                && routes.iter().any(|route| route.index == link.index)
        })
    })
}
