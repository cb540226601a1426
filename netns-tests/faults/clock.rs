//! F16: the wall clock jumps. Timers do not care.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kersey::lab::interrupt;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, READY, figure, within};
use crate::{assert_untouched, probe, require_etcd, warm};

/// Below `/usr/lib/` and the machine's name, where Debian has it.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";
/// How long a lease lives, and how long before its end it is renewed: every two seconds.
const TTL_S: u64 = 6;
const MARGIN_S: u64 = 4;
/// Where the clock is put, for how long each.
const JUMPS: [&str; 5] = ["+2h", "-3d", "@1970-01-02 00:00:00", "@2040-01-01 00:00:00", "+0"];
const STAY: Duration = Duration::from_secs(3);

#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn f16_a_jumping_clock_moves_no_timer() {
    if !require_etcd("f16_a_jumping_clock_moves_no_timer") {
        return;
    }
    let Some(library) = require_library() else { return };
    let mut blueprint = Blueprint::new("clock", 2);
    blueprint.own_flags.insert(
        2,
        [
            "--lease-ttl",
            &TTL_S.to_string(),
            "--lease-renew-margin",
            &MARGIN_S.to_string(),
        ]
        .map(str::to_owned)
        .to_vec(),
    );
    let mut overlay = blueprint.start();
    // Node 2 again, with a clock that we hold.
    overlay.terminate(2);
    let clock = overlay.file("clock");
    set(&clock, "+0");
    let plain = overlay.command(2);
    let mut command = Command::new(plain.get_program());
    command.args(plain.get_args());
    command.env("LD_PRELOAD", library);
    command.env("FAKETIME_TIMESTAMP_FILE", &clock);
    command.env("FAKETIME_NO_CACHE", "1");
    command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    overlay.nodes[1].child = overlay.run("node 2, under a clock of ours", 2, command);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    let renewals = |overlay: &crate::overlay::Overlay| overlay.log(2).matches("lease renewed").count();
    for jump in JUMPS {
        set(&clock, jump);
        let (start, before) = (Instant::now(), renewals(&overlay));
        interrupt::sleep(STAY).unwrap();
        let now = renewals(&overlay) - before;
        let due = start.elapsed().as_secs_f64() / (TTL_S - MARGIN_S) as f64;
        figure(&format!("clock at {jump}: renewals, due"), (now, due));
        assert!(
            (now as f64 - due).abs() <= 1.5,
            "{jump}: {now} renewals, {due:.1} were due"
        );
        assert_eq!(overlay.status(1).peers.len(), 1, "{jump}: the lease ran out");
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
