//! The server that nodes have their leases from goes away: packets do not notice.

use std::time::{Duration, Instant};

use kersey::lab::interrupt;
use kersey::lab::traffic::probe::Probe;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, READY, figure, wait_for, within};
use crate::watch::{require_root, warm};

/// F23: the server that nodes have their leases from is killed, started again, and replaced by one that knows nothing.
#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn a_dead_lease_server_costs_no_packet() {
    if !require_root("a_dead_lease_server_costs_no_packet") {
        return;
    }
    // Node 1 serves the others; packets go between 2 and 3.
    let mut overlay = Blueprint::embedded("server", 3).start();
    warm(&overlay, 1, 2);
    warm(&overlay, 2, 3);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = Probe::start(overlay.pod(2), overlay.pod(3)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    for (faults, case) in (1..).zip(["started again", "replaced by one that knows nothing"]) {
        overlay.kill(1);
        interrupt::sleep(Duration::from_secs(4)).unwrap();
        for nth in 2..=3 {
            let status = overlay.status(nth);
            assert!(!status.store.connected, "{case}: node {nth}");
            assert!(status.ready && status.peers.len() == 2, "{case}: node {nth}");
        }
        if case != "started again" {
            std::fs::remove_file(overlay.file("1.data/leases.redb")).unwrap();
        }
        let back = Instant::now();
        overlay.restart(1);
        for nth in 2..=3 {
            overlay.wait(nth, READY, |status| {
                status.store.connected && status.peers.len() == 2
            });
        }
        let synced = back.elapsed();
        figure(&format!("server {case}: nodes know everybody after"), synced);
        assert!(synced <= within(Duration::from_secs(5)), "{case}: {synced:?}");
        // What was asked over a second connection leaves that open until it has idled for 3 s, or 5 by the server's clock.
        interrupt::sleep(Duration::from_secs(4)).unwrap();
        oracle.check(&mut overlay, faults);
    }
    let report = probe.stop().unwrap();
    figure(
        "server killed twice: probe sent, lost, longest gap",
        (
            report.there.sent + report.back.sent,
            report.lost(),
            report.longest_gap(),
        ),
    );
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
}
