//! F10, F11: a daemon is killed or asked to end, and comes back.

use std::time::{Duration, Instant};

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Conversation, Overlay, READY, figure, wait_for, within};
use crate::support::require_strace;
use crate::{assert_gap, flows, probe, require_etcd, warm};
use nix::sys::signal::Signal;

#[test]
fn f10_f11_a_daemon_killed_or_ended_is_back_within_a_second_and_leaves_nothing() {
    if require_etcd("f10_f11_a_daemon_killed_or_ended_is_back_within_a_second_and_leaves_nothing") {
        lives("kill", 4);
    }
}

/// So many ends of node 2 by force, and a quarter as many in order, while it talks to node 1.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
pub(crate) fn lives(tag: &str, kills: u64) {
    let mut overlay = Blueprint::new(tag, 2).start();
    let (one, subnet) = (overlay.daemon(1).pid(), overlay.subnet(2));
    let mut conversation = Conversation::start(overlay.pod(1), overlay.pod(2));
    conversation.exchange();
    warm(&overlay, 1, 2);
    let untouched = overlay.log(1).lines().count();
    let mut oracle = Oracle::start(&mut overlay);
    let mac = mac(&overlay);
    let (mut killed, mut ended) = (Vec::new(), Vec::new());
    for round in 0..kills + kills.div_ceil(4) {
        let in_order = round % 5 == 4;
        let probe = probe(&overlay, 1, 2);
        // Anywhere in what the daemon does every second or so.
        std::thread::sleep(Duration::from_millis(round * 37 % 400));
        let start = Instant::now();
        if in_order {
            overlay.terminate(2);
            figure("SIGTERM to end", start.elapsed());
        } else {
            overlay.kill(2);
        }
        overlay.restart(2);
        flows(&probe);
        let report = probe.stop().unwrap();
        if report.longest_gap() > Duration::from_millis(500) {
            figure("a long gap; the log", overlay.log(2).lines().collect::<Vec<_>>());
        }
        assert_gap(&report, within(Duration::from_secs(1)));
        if in_order { &mut ended } else { &mut killed }.push(report.longest_gap().as_millis());
        conversation.exchange();
        overlay.wait(2, READY, |status| status.ready && status.store.connected);
        assert_eq!(overlay.subnet(2), subnet);
        assert_eq!(self::mac(&overlay), mac);
        assert_state_files(&overlay);
        oracle.check(&mut overlay, 1);
    }
    killed.sort_unstable();
    figure("kill -9: gaps, ms", &killed);
    figure("SIGTERM: gaps, ms", &ended);
    assert_eq!(overlay.daemon(1).pid(), one);
    assert_eq!(overlay.log(1).lines().count(), untouched, "{}", overlay.log(1));
}

/// Where a restart spends its time is the store's disk: every write to etcd waits for it. A node whose lease is there and says what it
/// would say has nothing to write before packets move.
#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn f10_a_restart_does_not_wait_for_the_disk_of_the_store() {
    const WRITE: Duration = Duration::from_millis(150);
    let test = "f10_a_restart_does_not_wait_for_the_disk_of_the_store";
    if !require_etcd(test) || !require_strace(test) {
        return;
    }
    let mut overlay = Blueprint::new("slowdisk", 2).start();
    warm(&overlay, 1, 2);
    overlay.slow_etcd_down(WRITE);
    overlay.wait(2, READY, |status| status.store.connected);
    let subnet = overlay.subnet(2);
    let write = Instant::now();
    overlay.put("no-lease", "x");
    figure("a write of the store, ms", write.elapsed().as_millis());
    assert!(
        write.elapsed() >= WRITE,
        "the disk is not slow: {:?}",
        write.elapsed()
    );
    let (mut gaps, mut stages) = (Vec::new(), Vec::new());
    for _ in 0..6 {
        let probe = probe(&overlay, 1, 2);
        overlay.kill(2);
        overlay.restart(2);
        flows(&probe);
        gaps.push(probe.stop().unwrap().longest_gap().as_millis());
        overlay.wait(2, READY, |status| status.ready && status.store.connected);
        assert_eq!(overlay.subnet(2), subnet);
        stages.push(stages_of(&overlay.log(2)));
        // Until the one before is written down: a node that starts while the last life's request is under way is another case.
        std::thread::sleep(WRITE * 8);
    }
    gaps.sort_unstable();
    figure("ms from the start to store, lease, device, routes", &stages);
    figure("kill -9 with a slow disk: gaps, ms", &gaps);
    let limit = within(Duration::from_secs(1)).as_millis();
    assert!(gaps.iter().all(|gap| *gap <= limit), "{gaps:?}");
}

/// Milliseconds from a daemon's first line to those that tell of a stage of its start.
fn stages_of(log: &str) -> Vec<u64> {
    let at = |line: &str| {
        // 2026-01-02T03:04:05.678901Z: within a minute is near enough.
        let seconds: f64 = line.get(17..26).unwrap_or_default().parse().unwrap();
        (seconds * 1000.0) as u64
    };
    let of = |stage: &str| {
        let line = log.lines().find(|line| line.contains(stage));
        at(line.unwrap_or_else(|| panic!("no {stage:?} in {log}")))
    };
    let first = of("kersey starts");
    let stages = [
        "store opened",
        "lease acquired",
        "data plane up",
        "routes published",
    ];
    stages.map(|stage| (of(stage) + 60_000 - first) % 60_000).to_vec()
}

/// The Ethernet address a node keeps for backends that have one.
fn mac(overlay: &Overlay) -> Vec<u8> {
    std::fs::read(overlay.file("2.data").join("vtep-mac")).unwrap_or_default()
}

/// Files of state can be read, and nothing half written lies about.
fn assert_state_files(overlay: &Overlay) {
    for entry in std::fs::read_dir(overlay.file("2.data")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        if path.extension().is_some_and(|kind| kind == "json") {
            serde_json::from_str::<serde_json::Value>(&text).unwrap();
        }
    }
    for folder in [overlay.file("2.data"), overlay.file(".")] {
        let names = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = names
            .filter(|name| name.to_string_lossy().starts_with("."))
            .collect();
        assert!(left.len() <= 1, "{left:?}");
    }
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
