//! F20: too few descriptors, too little memory, too little processor, or none at all for a while.

use std::fs;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use kersey::lab::interrupt;
use kersey::lab::traffic::cpu;
use kersey::lab::traffic::udp::Flood;
use nix::sys::signal::Signal;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, READY, figure, wait_for, within};
use crate::{assert_untouched, flows, in_ci, probe, require_root, warm};

/// Older than this is stale. A thread that sleeps wakes every second.
const STALE: Duration = Duration::from_secs(2);
/// What the thread may have been about to take when it was stopped: a batch of 64 each way, and the kernel may have merged two into one.
const IN_HAND: usize = 2 * 2 * 64;

#[test]
fn f20_a_daemon_that_was_stopped_delivers_nothing_stale() {
    if require_root("f20_a_daemon_that_was_stopped_delivers_nothing_stale") {
        stopped("stopped", Duration::from_secs(in_ci(30, 5)));
    }
}

/// Stops node 2's daemon for a while.
pub(crate) fn stopped(tag: &str, pause: Duration) {
    let mut overlay = Blueprint::embedded(tag, 2).start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    overlay.daemon(2).signal(Signal::SIGSTOP).unwrap();
    interrupt::sleep(pause).unwrap();
    overlay.daemon(2).signal(Signal::SIGCONT).unwrap();
    let before = probe.received();
    let took = wait_for("traffic flows", within(Duration::from_secs(2)), || {
        let now = probe.received();
        now.0 > before.0 + 50 && now.1 > before.1 + 50
    });
    flows(&probe);
    let report = probe.stop().unwrap();
    figure("stopped: flows after, longest gap", (took, report.longest_gap()));
    figure(
        "stopped: lost, delivered after more than 1 s, after more than 2 s",
        (
            report.lost(),
            report.older_than(Duration::from_secs(1)),
            report.older_than(STALE),
        ),
    );
    figure("stopped: node 2 refused", overlay.status(2).drops);
    assert!(
        report.older_than(STALE) <= IN_HAND,
        "stale packets were delivered"
    );
    assert!(report.longest_gap() <= pause + within(Duration::from_secs(2)));
    assert_eq!((report.duplicates(), report.corrupted()), (0, 0));
    oracle.check(&mut overlay, 1);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn f20_without_descriptors_nothing_spins_and_packets_flow() {
    if !require_root("f20_without_descriptors_nothing_spins_and_packets_flow") {
        return;
    }
    let mut overlay = Blueprint::embedded("few", 2).start();
    // Node 1 serves leases to whoever connects. Again, with 64 descriptors in all.
    overlay.terminate(1);
    let plain = overlay.command(1);
    let mut command = Command::new("prlimit");
    command
        .arg("--nofile=64:64")
        .arg(plain.get_program())
        .args(plain.get_args());
    overlay.nodes[0].child = overlay.run("node 1, with 64 descriptors", 1, command);
    overlay.wait_all();
    overlay.wait(2, READY, |status| status.store.connected);
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let (pid, probe) = (overlay.daemon(1).pid(), probe(&overlay, 1, 2));
    let percent_of_a_core = || {
        let (start, used) = (Instant::now(), cpu::process(pid).unwrap());
        interrupt::sleep(Duration::from_secs(2)).unwrap();
        (cpu::process(pid).unwrap() - used).as_secs_f64() / start.elapsed().as_secs_f64() * 100.0
    };
    let usual = percent_of_a_core();
    let crowd: Vec<_> = (0..100)
        .filter_map(|_| {
            overlay
                .hub()
                .run(|| {
                    Ok(TcpStream::connect_timeout(
                        &"192.0.2.1:8888".parse()?,
                        Duration::from_millis(200),
                    )?)
                })
                .ok()
        })
        .collect();
    let more: Vec<_> = (0..100).map(|_| UnixStream::connect(overlay.socket(1))).collect();
    let percent = percent_of_a_core();
    figure(
        "no descriptors: connections, CPU % with the probe's packets, before",
        (crowd.len(), percent, usual),
    );
    assert!(crowd.len() > 64, "only {} connections were made", crowd.len());
    assert!(
        percent <= usual + 5.0,
        "{percent:.1} % of a core, {usual:.1} before"
    );
    drop((crowd, more));
    wait_for(
        "its status can be asked for",
        within(Duration::from_secs(2)),
        || kersey::lab::daemon::status(&overlay.socket(1)).is_ok_and(|status| status.is_some()),
    );
    // A lease can be had again.
    overlay.terminate(2);
    overlay.restart(2);
    overlay.wait(2, READY, |status| status.ready && status.store.connected);
    flows(&probe);
    let report = probe.stop().unwrap();
    assert_eq!((report.duplicates(), report.corrupted()), (0, 0));
    oracle.check(&mut overlay, 2);
}

#[test]
fn f20_in_64_mib_and_a_tenth_of_a_core_it_lives_through_a_flood() {
    if !require_root("f20_in_64_mib_and_a_tenth_of_a_core_it_lives_through_a_flood") {
        return;
    }
    let mut overlay = Blueprint::embedded("poor", 2).start();
    warm(&overlay, 1, 2);
    let make = || Groups::make(&format!("kersey-{}", std::process::id()));
    let Some(groups) = make() else {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "CI must have control groups"
        );
        return;
    };
    let flood = Flood {
        payload_bytes: 1000,
        rate: None,
        duration: Duration::from_secs(3),
    };
    // Buffers are address space until packets are in them; a daemon this poor fills all it has. What a second flood takes
    // would be lost.
    groups.take(overlay.daemon(2).pid());
    flood.run(overlay.pod(1), overlay.pod(2)).unwrap();
    assert_eq!(groups.kills(), 0, "the kernel killed for want of memory");
    drop(groups);
    let mut oracle = Oracle::start(&mut overlay);
    let groups = make().unwrap();
    groups.take(overlay.daemon(2).pid());
    let report = flood.run(overlay.pod(1), overlay.pod(2)).unwrap();
    figure(
        "poor: flood sent, received",
        (report.counts.sent, report.counts.received),
    );
    assert!(
        report.counts.received > 0 && report.counts.corrupted == 0,
        "{report:?}"
    );
    assert!(overlay.daemon(2).is_running());
    assert_eq!(groups.kills(), 0, "the kernel killed for want of memory");
    drop(groups);
    let probe = probe(&overlay, 1, 2);
    flows(&probe);
    assert_untouched(&probe.stop().unwrap());
    oracle.check(&mut overlay, 1);
}

/// Control groups of little memory and little processor, whichever version this machine has.
struct Groups {
    folders: Vec<PathBuf>,
}

impl Groups {
    /// `None` where groups cannot be made.
    fn make(name: &str) -> Option<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        let rules: &[(&str, &[(&str, &str)])] = if root.join("cgroup.controllers").exists() {
            &[("", &[("memory.max", "67108864"), ("cpu.max", "10000 100000")])]
        } else {
            &[
                ("memory", &[("memory.limit_in_bytes", "67108864")]),
                (
                    "cpu",
                    &[("cpu.cfs_period_us", "100000"), ("cpu.cfs_quota_us", "10000")],
                ),
            ]
        };
        let mut groups = Self { folders: Vec::new() };
        for (controller, values) in rules {
            let folder = root.join(controller).join(name);
            fs::create_dir(&folder).ok()?;
            groups.folders.push(folder.clone());
            for (file, value) in *values {
                fs::write(folder.join(file), value).ok()?;
            }
        }
        Some(groups)
    }

    fn take(&self, pid: u32) {
        for folder in &self.folders {
            fs::write(folder.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }

    /// How often the kernel has killed a process in it.
    fn kills(&self) -> u64 {
        let texts = self.folders.iter().flat_map(|folder| {
            ["memory.events", "memory.oom_control"].map(|file| fs::read_to_string(folder.join(file)))
        });
        let counts = texts.flatten().filter_map(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("oom_kill ")?.parse::<u64>().ok())
        });
        counts.sum()
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for folder in &self.folders {
            // A group goes when it is empty: its processes go back up.
            let up = folder.parent().map(|up| up.join("cgroup.procs"));
            let inside = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            for pid in inside.lines() {
                let _ = up.as_ref().map(|up| fs::write(up, pid));
            }
            let _ = fs::remove_dir(folder);
        }
    }
}
