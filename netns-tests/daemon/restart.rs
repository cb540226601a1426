//! A daemon is killed and comes back.

use std::time::Duration;

use kersey::lab::traffic::probe::Probe;
use nix::sys::signal::Signal;

use crate::overlay::{Blueprint, Conversation, READY, figure, wait_for, within};
use crate::support::require_etcd;

#[test]
fn a_killed_daemon_is_back_within_a_second() {
    if !require_etcd("a_killed_daemon_is_back_within_a_second") {
        return;
    }
    let mut overlay = Blueprint::new("kill", 2).start();
    let (one, subnet) = (overlay.daemon(1).pid(), overlay.subnet(2));
    let mut conversation = Conversation::start(overlay.pod(1), overlay.pod(2));
    conversation.exchange();
    let untouched = overlay.log(1).lines().count();
    let mut gaps = Vec::new();
    for _ in 0..5 {
        let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
        wait_for("the probe runs", READY, || probe.received().0 > 100);
        overlay.kill(2);
        overlay.restart(2);
        let before = probe.received();
        wait_for("traffic flows again", READY, || {
            let (there, back) = probe.received();
            there > before.0 + 100 && back > before.1 + 100
        });
        let report = probe.stop().unwrap();
        assert_eq!(report.corrupted(), 0, "{report:?}");
        gaps.push(report.longest_gap());
        if report.longest_gap() > Duration::from_millis(300) {
            figure("a long gap; the log", overlay.log(2).lines().collect::<Vec<_>>());
        }
        conversation.exchange();
        overlay.wait(2, READY, |status| status.ready && status.store.connected);
        assert_eq!(overlay.subnet(2), subnet);
    }
    figure("kill -9: gaps", &gaps);
    assert!(
        gaps.iter().all(|&gap| gap <= within(Duration::from_secs(1))),
        "{gaps:?}"
    );
    assert_eq!(overlay.daemon(1).pid(), one);
    assert_eq!(overlay.log(1).lines().count(), untouched, "{}", overlay.log(1));
    assert_eq!(overlay.device(2).unwrap().2.len(), 1);
}

#[test]
fn a_daemon_starts_without_its_store() {
    if !require_etcd("a_daemon_starts_without_its_store") {
        return;
    }
    let mut overlay = Blueprint::new("cached", 2).start();
    let subnet = overlay.subnet(2);
    let mut conversation = Conversation::start(overlay.pod(1), overlay.pod(2));
    conversation.exchange();
    let cache = overlay.file("2.data").join("control.json");
    wait_for("the cache has the peer", READY, || {
        std::fs::read_to_string(&cache).is_ok_and(|text| text.contains(r#""192.0.2.1""#))
    });
    overlay.etcd_process().signal(Signal::SIGKILL).unwrap();
    overlay.etcd_process().wait_end(Duration::from_secs(5)).unwrap();
    overlay.kill(2);
    overlay.restart(2);
    let status = overlay.wait(2, within(Duration::from_secs(8)), |status| {
        status.ready && status.peers.len() == 1
    });
    figure("start without the store, s", status.uptime_s);
    assert_eq!(overlay.subnet(2), subnet);
    assert!(!overlay.status(2).store.connected);
    overlay.ping_all();
    conversation.exchange();

    overlay.start_etcd();
    overlay.wait(2, within(Duration::from_secs(5)), |status| status.store.connected);
    overlay.ping_all();
    assert_eq!(overlay.subnet(2), subnet);
}
