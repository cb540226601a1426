//! F1: the store goes away, in three manners; F7: it comes back empty, or as it was before. Packets do not notice.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use kersey::addr::Ipv4Prefix;
use kersey::lab::interrupt;
use kersey::lab::traffic::cpu;
use nix::sys::signal::Signal;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, figure, wait_for, within};
use crate::{assert_untouched, in_ci, probe, require_etcd, warm};

/// How etcd is made to fail, and to come back.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Connections are refused.
    Killed,
    /// Connections are accepted and nothing is answered.
    Stopped,
    /// Nothing comes back at all.
    BlackHole,
}

#[test]
fn f1_an_outage_of_the_store_costs_no_packet() {
    if require_etcd("f1_an_outage_of_the_store_costs_no_packet") {
        outages("outage", Duration::from_secs(in_ci(60, 10)));
    }
}

/// F7: etcd comes back with the config and nothing else.
#[test]
fn f7_a_store_that_comes_back_empty_is_filled_again_and_costs_no_packet() {
    if !require_etcd("f7_a_store_that_comes_back_empty_is_filled_again_and_costs_no_packet") {
        return;
    }
    let mut overlay = Blueprint::new("wiped", 3).start();
    let subnets = [1, 2, 3].map(|nth| overlay.subnet(nth));
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    cause(&mut overlay, Fault::Killed);
    std::fs::remove_dir_all(overlay.file("etcd")).unwrap();
    mend(&mut overlay, Fault::Killed);
    overlay.put("config", overlay.network());
    let took = wait_for(
        "all are registered again",
        within(Duration::from_secs(10)),
        || subnets.iter().all(|subnet| overlay.get(&key(subnet)).is_some()),
    );
    figure("F7: all registered again after", took);
    assert_told_once(&mut overlay, &mut oracle, &subnets);
    assert_untouched(&probe.stop().unwrap());
}

/// F7: etcd is what it was when one node of three was there.
#[test]
fn f7_a_store_restored_from_a_backup_is_filled_again_and_costs_no_packet() {
    if !require_etcd("f7_a_store_restored_from_a_backup_is_filled_again_and_costs_no_packet") {
        return;
    }
    let mut overlay = Blueprint::new("backup", 3).build();
    let command = overlay.command(1);
    overlay.adopt(1, command);
    overlay.wait_all();
    overlay.etcd_process().signal(Signal::SIGTERM).unwrap();
    overlay.etcd_process().wait_end(Duration::from_secs(10)).unwrap();
    copy(&overlay, "etcd", "backup");
    overlay.start_etcd();
    for nth in 2..=3 {
        let command = overlay.command(nth);
        overlay.adopt(nth, command);
    }
    overlay.wait_all();
    let subnets = [1, 2, 3].map(|nth| overlay.subnet(nth));
    // That the backup is the older one has to be seen from its revision.
    for nth in 0..50 {
        overlay.put("unrelated", nth.to_string());
    }
    warm(&overlay, 2, 3);
    let mut oracle = Oracle::start(&mut overlay);
    // Between two that the backup has never heard of.
    let probe = probe(&overlay, 2, 3);
    cause(&mut overlay, Fault::Killed);
    std::fs::remove_dir_all(overlay.file("etcd")).unwrap();
    copy(&overlay, "backup", "etcd");
    mend(&mut overlay, Fault::Killed);
    let took = wait_for(
        "all are registered again",
        within(Duration::from_secs(10)),
        || subnets.iter().all(|subnet| overlay.get(&key(subnet)).is_some()),
    );
    figure("F7: all registered again over a backup after", took);
    assert_eq!(overlay.get("unrelated"), None, "that is no backup");
    assert_told_once(&mut overlay, &mut oracle, &subnets);
    assert_untouched(&probe.stop().unwrap());
}

/// Copies a folder among the test's own.
fn copy(overlay: &Overlay, from: &str, to: &str) {
    let mut command = std::process::Command::new("cp");
    command.arg("-a").arg(overlay.file(from)).arg(overlay.file(to));
    assert!(command.status().unwrap().success());
}

fn key(subnet: &Ipv4Prefix) -> String {
    format!("subnets/{}", subnet.to_string().replace('/', "-"))
}

/// All is well, each node has the subnet it had, and has told once, as an error, that etcd is another.
fn assert_told_once(overlay: &mut Overlay, oracle: &mut Oracle, subnets: &[Ipv4Prefix; 3]) {
    const TOLD: &str = "etcd is not the one it was";
    oracle.check_but(overlay, 1, &[TOLD]);
    assert_eq!(
        [1, 2, 3].map(|nth| overlay.log(nth).matches(TOLD).count()),
        [1; 3]
    );
    assert_eq!([1, 2, 3].map(|nth| overlay.subnet(nth)), *subnets);
}

/// One outage of each kind, on one network.
pub(crate) fn outages(tag: &str, duration: Duration) {
    // Node 3 has no traffic: what it uses, it uses for nothing.
    let mut overlay = Blueprint::new(tag, 3).start();
    let pids: Vec<_> = (1..=3).map(|nth| overlay.daemon(nth).pid()).collect();
    // What a connection takes is allocated once.
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    for (faults, fault) in (1..).zip([Fault::Killed, Fault::Stopped, Fault::BlackHole]) {
        outage(&mut overlay, fault, duration);
        oracle.check(&mut overlay, faults);
    }
    let still: Vec<_> = (1..=3).map(|nth| overlay.daemon(nth).pid()).collect();
    assert_eq!(pids, still);
}

#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn outage(overlay: &mut Overlay, fault: Fault, duration: Duration) {
    let idle_pid = overlay.daemon(3).pid();
    let lines_before = overlay.log(3).lines().count();
    let probe = probe(overlay, 1, 2);

    cause(overlay, fault);
    let (start, idle) = (Instant::now(), cpu::process(idle_pid).unwrap());
    interrupt::sleep(duration).unwrap();
    let idle = cpu::process(idle_pid).unwrap() - idle;
    let percent = idle.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    let status = overlay.status(3);
    // A dead connection is found by two pings in ten seconds; that it is dead is known at once where it is refused.
    if duration > Duration::from_secs(12) || matches!(fault, Fault::Killed) {
        assert!(!status.store.connected, "{fault:?}");
    }
    assert!(status.ready && status.peers.len() == 2, "{fault:?}: {status:?}");
    let lines = overlay.log(3).lines().count() - lines_before;
    mend(overlay, fault);

    let back = Instant::now();
    overlay.put(
        "subnets/10.244.250.0-24",
        r#"{"PublicIP":"192.0.2.250","PublicIPv6":null}"#,
    );
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(5)), |status| {
            status.store.connected && status.peers.len() == 3
        });
    }
    let seen = back.elapsed();
    // Converged: from now on news are fast.
    let news = Instant::now();
    overlay.delete("subnets/10.244.250.0-24");
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(2)), |status| {
            status.peers.len() == 2
        });
    }
    let news = news.elapsed();
    let report = probe.stop().unwrap();
    figure(&format!("{fault:?}: idle CPU %"), percent);
    figure(&format!("{fault:?}: log lines"), lines);
    figure(
        &format!("{fault:?}: converged after return, then news"),
        (seen, news),
    );
    figure(
        &format!("{fault:?}: probe sent, lost, longest gap"),
        (
            report.there.sent + report.back.sent,
            report.lost(),
            report.longest_gap(),
        ),
    );
    assert_untouched(&report);
    assert!(percent <= 2.0, "an idle node used {percent:.1} % of a core");
    let minutes = duration.as_secs().div_ceil(60);
    assert!(lines as u64 <= 6 * minutes, "{}", overlay.log(3));
    assert!(seen <= within(Duration::from_secs(5)), "{seen:?}");
}

pub(crate) fn cause(overlay: &mut Overlay, fault: Fault) {
    match fault {
        Fault::Killed => {
            overlay.etcd_process().signal(Signal::SIGKILL).unwrap();
            overlay.etcd_process().wait_end(Duration::from_secs(5)).unwrap();
        }
        Fault::Stopped => overlay.etcd_process().signal(Signal::SIGSTOP).unwrap(),
        Fault::BlackHole => black_hole(overlay, "add"),
    }
}

pub(crate) fn mend(overlay: &mut Overlay, fault: Fault) {
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
