//! F16: the wall clock jumps, or a machine has a young or a very old monotonic clock. Timers do not care, and a certificate that is not
//! valid yet is waited for.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kersey::lab::interrupt;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::pki::Authority;
use crate::support::nobody::{give, unprivileged};
use crate::{assert_gap, assert_untouched, flows, probe, require_etcd, require_root, warm};

/// Below `/usr/lib/` and the machine's name, where Debian has it.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";
/// How long a lease lives, and how long before its end it is renewed: every two seconds.
const TTL_S: u64 = 6;
const MARGIN_S: u64 = 4;
/// Where the clock is put, for how long each.
const JUMPS: [&str; 5] = ["+2h", "-3d", "@1970-01-02 00:00:00", "@2040-01-01 00:00:00", "+0"];
const STAY: Duration = Duration::from_secs(3);

#[test]
fn f16_a_jumping_clock_moves_no_timer() {
    if !require_etcd("f16_a_jumping_clock_moves_no_timer") {
        return;
    }
    let Some(library) = require_library() else { return };
    let mut blueprint = Blueprint::new("clock", 2);
    blueprint.own_flags.insert(2, short_lived());
    let mut overlay = blueprint.start();
    // Node 2 again, with a clock that we hold.
    overlay.terminate(2);
    let clock = overlay.file("clock");
    set(&clock, "+0");
    let command = hold(&overlay.command(2), &library, &clock);
    overlay.nodes[1].child = overlay.run("node 2, under a clock of ours", 2, command);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    for jump in JUMPS {
        set(&clock, jump);
        renews_in_time(&overlay, jump);
    }
    // The clock did jump: the log says so.
    let log = overlay.log(2);
    for year in ["1970-", "2040-"] {
        assert!(
            log.lines().any(|line| line.starts_with(year)),
            "no line of {year}"
        );
    }
    overlay.wait(2, within(Duration::from_secs(2)), |status| status.store.connected);
    oracle.check(&mut overlay, JUMPS.len());
    assert_untouched(&probe.stop().unwrap());
}

/// A machine that was started just now, and one that has run for three years: what a life wrote down means nothing to the next.
#[test]
fn f16_a_restart_on_a_young_or_an_old_machine_moves_no_timer() {
    if !require_etcd("f16_a_restart_on_a_young_or_an_old_machine_moves_no_timer") {
        return;
    }
    let mut blueprint = Blueprint::new("boot", 2);
    blueprint.own_flags.insert(2, short_lived());
    let mut overlay = blueprint.start();
    let subnet = overlay.subnet(2);
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let uptime = fs::read_to_string("/proc/uptime").unwrap();
    let uptime: f64 = uptime.split_whitespace().next().unwrap().parse().unwrap();
    for (machine, offset) in [
        ("young", -(uptime as i64 - 5)),
        ("old", 100_000_000),
        ("usual", 0),
    ] {
        let probe = probe(&overlay, 1, 2);
        overlay.kill(2);
        let plain = overlay.command(2);
        let mut command = Command::new("unshare");
        command.arg("--time");
        command.args([
            "--monotonic",
            &offset.to_string(),
            "--boottime",
            &offset.to_string(),
        ]);
        command.arg(plain.get_program()).args(plain.get_args());
        overlay.nodes[1].child = overlay.run(&format!("node 2, on a {machine} machine"), 2, command);
        flows(&probe);
        assert_gap(&probe.stop().unwrap(), within(Duration::from_secs(1)));
        overlay.wait(2, READY, |status| status.ready && status.store.connected);
        // It is what we meant it to be.
        let pid = overlay.daemon(2).pid();
        let offsets = fs::read_to_string(format!("/proc/{pid}/timens_offsets")).unwrap();
        let held = |line: &str| line.split_whitespace().nth(1).map(str::parse) == Some(Ok(offset));
        assert!(offsets.lines().all(held), "{offsets}");
        let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/time")).unwrap();
        assert_ne!(space(&pid.to_string()), space("self"));
        let untouched = crate::probe(&overlay, 1, 2);
        renews_in_time(&overlay, machine);
        assert_untouched(&untouched.stop().unwrap());
        assert_eq!(overlay.subnet(2), subnet, "{machine}");
        oracle.check(&mut overlay, 1);
    }
}

/// Certificates of 1975 are not valid yet in 1970. A node whose clock says that waits, and is well once its clock is.
#[test]
fn f16_a_certificate_that_a_wild_clock_refuses_is_tried_again() {
    if !require_root("f16_a_certificate_that_a_wild_clock_refuses_is_tried_again") {
        return;
    }
    let Some(library) = require_library() else { return };
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let server = authority.server(folder.path(), "server", &["192.0.2.1"]);
    if unprivileged() {
        give(folder.path());
        give(&server.key);
    }
    let file = |path: &Path| path.display().to_string();
    let mut blueprint = Blueprint::embedded("tlsclock", 2);
    blueprint.own_flags.insert(
        1,
        vec![
            format!("--remote-certfile={}", file(&server.certificate)),
            format!("--remote-keyfile={}", file(&server.key)),
        ],
    );
    blueprint
        .own_flags
        .insert(2, vec![format!("--remote-cafile={}", file(&authority.file))]);
    let mut overlay = blueprint.build();
    let one = overlay.command(1);
    overlay.adopt(1, one);
    overlay.wait(1, READY, |status| status.ready);
    let clock = overlay.file("clock");
    set(&clock, "@1970-01-02 00:00:00");
    let plain = overlay.command(2);
    let mut two = Command::new(plain.get_program());
    two.args(plain.get_args().map(|word| match word.to_str() {
        Some("http://192.0.2.1:8888") => OsString::from("https://192.0.2.1:8888"),
        _ => word.to_owned(),
    }));
    overlay.adopt(2, hold(&two, &library, &clock));
    wait_for("it is told", READY, || overlay.log(2).contains("not valid yet"));
    interrupt::sleep(Duration::from_secs(4)).unwrap();
    assert!(overlay.daemon(2).is_running(), "{}", overlay.log(2));
    let log = overlay.log(2);
    let told = log.lines().filter(|line| line.contains("not valid yet")).count();
    assert_eq!(told, 1, "{log}");
    set(&clock, "+0");
    overlay.wait_all();
    warm(&overlay, 1, 2);
    let probe = probe(&overlay, 1, 2);

    // The same while it runs, at its next connection.
    set(&clock, "@1970-01-02 00:00:00");
    overlay.terminate(1);
    overlay.restart(1);
    overlay.wait(1, READY, |status| status.ready);
    wait_for("it cannot connect", READY, || {
        let store = overlay.status(2).store;
        !store.connected && store.error.is_some_and(|error| error.contains("not valid yet"))
    });
    interrupt::sleep(Duration::from_secs(2)).unwrap();
    let status = overlay.status(2);
    assert!(
        overlay.daemon(2).is_running() && status.ready && status.peers.len() == 1,
        "{status:#?}"
    );
    set(&clock, "+0");
    let took = overlay.wait(2, within(Duration::from_secs(5)), |status| status.store.connected);
    figure(
        "connected once the clock is right; errors until then",
        took.store.error,
    );
    overlay.ping_all();
    // But for the moment in which node 1's daemon was started again.
    assert_gap(&probe.stop().unwrap(), within(Duration::from_secs(1)));
}

/// Flags for a lease that is renewed every two seconds.
fn short_lived() -> Vec<String> {
    let (ttl, margin) = (TTL_S.to_string(), MARGIN_S.to_string());
    ["--lease-ttl", &ttl, "--lease-renew-margin", &margin]
        .map(str::to_owned)
        .to_vec()
}

/// Looks on for [`STAY`]: node 2's lease is renewed as often as is due, and does not run out.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn renews_in_time(overlay: &Overlay, when: &str) {
    let renewals = || overlay.log(2).matches("lease renewed").count();
    let (start, before) = (Instant::now(), renewals());
    interrupt::sleep(STAY).unwrap();
    let now = renewals() - before;
    let due = start.elapsed().as_secs_f64() / (TTL_S - MARGIN_S) as f64;
    figure(&format!("{when}: renewals, due"), (now, due));
    assert!(
        (now as f64 - due).abs() <= 1.5,
        "{when}: {now} renewals, {due:.1} were due"
    );
    assert_eq!(overlay.status(1).peers.len(), 1, "{when}: the lease ran out");
}

/// Has a command live by the clock in a file.
fn hold(plain: &Command, library: &Path, clock: &Path) -> Command {
    let words: Vec<_> = std::iter::once(plain.get_program())
        .chain(plain.get_args())
        .collect();
    // For the daemon alone: what the first program makes that loads the library, programs of other users cannot open.
    let is_daemon = |word: &&OsStr| *word == env!("CARGO_BIN_EXE_kersey");
    let (before, daemon) = words.split_at(words.iter().position(is_daemon).unwrap());
    let mut env = Command::new("env");
    env.arg(format!("LD_PRELOAD={}", library.display()));
    env.arg(format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()));
    env.args(["FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"]);
    env.args(daemon);
    let Some((program, args)) = before.split_first() else {
        return env;
    };
    let mut command = Command::new(program);
    command.args(args).arg("env").args(env.get_args());
    command
}

fn set(clock: &Path, to: &str) {
    let new = clock.with_extension("new");
    fs::write(&new, format!("{to}\n")).unwrap();
    fs::rename(new, clock).unwrap();
}

/// The library that fakes the time; as [`require_etcd`].
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
fn require_library() -> Option<PathBuf> {
    let folders = fs::read_dir("/usr/lib").unwrap().flatten();
    let found = folders
        .map(|folder| folder.path().join(LIBRARY))
        .find(|path| path.exists());
    if found.is_none() {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "F16 needs libfaketime, and CI must run it"
        );
        eprintln!("skipped: F16 needs libfaketime (apt-get install faketime)");
    }
    found
}
