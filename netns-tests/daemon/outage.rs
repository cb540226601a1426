//! The store goes away, in three manners: packets do not notice.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use kersey::lab::interrupt;
use kersey::lab::traffic::cpu;
use kersey::lab::traffic::probe::Probe;
use nix::sys::signal::Signal;

use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::support::{require_etcd, require_root};

/// How etcd is made to fail, and to come back.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// Connections are refused.
    Killed,
    /// Connections are accepted and nothing is answered.
    Stopped,
    /// Nothing comes back at all.
    BlackHole,
}

#[test]
fn a_minute_without_etcd_costs_no_packet() {
    if require_etcd("a_minute_without_etcd_costs_no_packet") {
        outage("killed", Fault::Killed, Duration::from_secs(60));
    }
}

#[test]
fn an_etcd_that_never_answers_costs_no_packet() {
    if require_etcd("an_etcd_that_never_answers_costs_no_packet") {
        outage("stopped", Fault::Stopped, Duration::from_secs(10));
    }
}

#[test]
fn an_etcd_behind_a_black_hole_costs_no_packet() {
    if require_etcd("an_etcd_behind_a_black_hole_costs_no_packet") {
        outage("hole", Fault::BlackHole, Duration::from_secs(10));
    }
}

#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn outage(tag: &str, fault: Fault, duration: Duration) {
    // Node 3 has no traffic: what it uses, it uses for nothing.
    let mut overlay = Blueprint::new(tag, 3).start();
    let pids: Vec<_> = (1..=3).map(|nth| overlay.daemon(nth).pid()).collect();
    let lines_before = overlay.log(3).lines().count();
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);

    cause(&mut overlay, fault);
    let (start, idle) = (Instant::now(), cpu::process(pids[2]).unwrap());
    interrupt::sleep(duration).unwrap();
    let idle = cpu::process(pids[2]).unwrap() - idle;
    let percent = idle.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    assert!(!overlay.status(3).store.connected);
    assert!(overlay.status(3).ready && overlay.status(1).peers.len() == 2);
    let lines = overlay.log(3).lines().count() - lines_before;
    mend(&mut overlay, fault);

    overlay.put(
        "subnets/10.244.250.0-24",
        r#"{"PublicIP":"192.0.2.250","PublicIPv6":null}"#,
    );
    let back = Instant::now();
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(5)), |status| {
            status.store.connected && status.peers.len() == 3
        });
    }
    let seen = back.elapsed();
    let report = probe.stop().unwrap();
    figure(&format!("{fault:?}: idle CPU %"), percent);
    figure(&format!("{fault:?}: log lines"), lines);
    figure(&format!("{fault:?}: news after return"), seen);
    figure(
        &format!("{fault:?}: probe sent, lost, longest gap"),
        (
            report.there.sent + report.back.sent,
            report.lost(),
            report.longest_gap(),
        ),
    );
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    assert!(percent <= 2.0, "an idle node used {percent:.1} % of a core");
    assert!(lines <= 6, "{}", overlay.log(3));
    assert!(seen <= within(Duration::from_secs(5)), "{seen:?}");
    let still: Vec<_> = (1..=3).map(|nth| overlay.daemon(nth).pid()).collect();
    assert_eq!(pids, still);
}

fn cause(overlay: &mut Overlay, fault: Fault) {
    match fault {
        Fault::Killed => {
            overlay.etcd_process().signal(Signal::SIGKILL).unwrap();
            overlay.etcd_process().wait_end(Duration::from_secs(5)).unwrap();
        }
        Fault::Stopped => overlay.etcd_process().signal(Signal::SIGSTOP).unwrap(),
        Fault::BlackHole => black_hole(overlay, "add"),
    }
}

fn mend(overlay: &mut Overlay, fault: Fault) {
    match fault {
        Fault::Killed => overlay.start_etcd(),
        Fault::Stopped => overlay.etcd_process().signal(Signal::SIGCONT).unwrap(),
        Fault::BlackHole => black_hole(overlay, "del"),
    }
}

/// The hub sends nothing to the nodes; what goes between them crosses its bridge, where routes do not matter.
fn black_hole(overlay: &Overlay, verb: &str) {
    for low in 1..=3 {
        let node = Ipv4Addr::new(192, 0, 2, low).to_string();
        let mut command = std::process::Command::new("ip");
        command.args(["route", verb, "blackhole", &node]);
        let ended = overlay.hub().spawn(&mut command).unwrap().wait().unwrap();
        assert!(ended.success());
    }
}

/// F23: the server that nodes have their leases from is killed, started again, and replaced by one that knows nothing.
#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn a_dead_lease_server_costs_no_packet() {
    if !require_root("a_dead_lease_server_costs_no_packet") {
        return;
    }
    // Node 1 serves the others; packets go between 2 and 3.
    let mut overlay = Blueprint::embedded("server", 3).start();
    let probe = Probe::start(overlay.pod(2), overlay.pod(3)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    for case in ["started again", "replaced by one that knows nothing"] {
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
