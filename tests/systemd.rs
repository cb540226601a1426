//! The shipped units, judged by systemd itself: `systemd-analyze`, where there is one.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

/// The most that a unit may be exposed.
const MOST: f64 = 2.0;
/// The units shipped.
const UNITS: [&str; 2] = ["kersey.service", "kersey-server.service"];

/// Whether systemd-analyze is there. Says so in one line if not; under `CI=true` that is a failure.
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
fn require_systemd_analyze(test: &str) -> bool {
    if Command::new("systemd-analyze").arg("--version").output().is_ok() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs systemd-analyze, and CI must run it"
    );
    eprintln!("skipped: {test} needs systemd-analyze (apt-get install systemd)");
    false
}

/// A root with the units, and everything they refer to.
fn root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("etc/systemd/system");
    fs::create_dir_all(&folder).unwrap();
    for unit in UNITS {
        fs::copy(Path::new("configs/systemd").join(unit), folder.join(unit)).unwrap();
    }
    for target in ["sysinit", "basic", "shutdown", "multi-user", "network-online"] {
        fs::write(
            folder.join(format!("{target}.target")),
            "[Unit]\nDescription=x\nDefaultDependencies=no\n",
        )
        .unwrap();
    }
    for program in ["usr/local/bin/kersey", "usr/bin/systemd-tmpfiles", "bin/kill"] {
        let path = root.path().join(program);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    root
}

fn analyze(root: &TempDir, args: &[&str], unit: &str) -> Output {
    let mut command = Command::new("systemd-analyze");
    command.args(args).arg("--root").arg(root.path()).arg(unit);
    command
        .env("LC_ALL", "C")
        .env("SYSTEMD_COLORS", "0")
        .output()
        .unwrap()
}

#[test]
fn the_units_expose_at_most_two_point_zero() {
    if !require_systemd_analyze("the_units_expose_at_most_two_point_zero") {
        return;
    }
    let root = root();
    for unit in UNITS {
        let output = analyze(&root, &["security", "--offline=true", "--no-pager"], unit);
        let text = String::from_utf8_lossy(&output.stdout);
        let level = text
            .lines()
            .find_map(|line| line.split_once("exposure level for ")?.1.split_once(": "))
            .and_then(|(_, rest)| rest.split_whitespace().next()?.parse::<f64>().ok());
        let level = level.unwrap_or_else(|| panic!("{unit}: no level in {text}"));
        println!("figure: exposure of {unit}: {level}");
        assert!(level <= MOST, "{unit}: {level}\n{text}");
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    if !require_systemd_analyze("systemd_finds_nothing_wrong_with_the_units") {
        return;
    }
    let root = root();
    for unit in UNITS {
        let output = analyze(&root, &["verify", "--man=no"], unit);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.trim().is_empty(),
            "{unit}: {said}"
        );
    }
}

#[test]
fn the_unit_starts_again_but_where_that_is_in_vain_and_comes_before_docker() {
    let unit = fs::read_to_string("configs/systemd/kersey.service").unwrap();
    for line in [
        "Type=notify",
        "Restart=always",
        "RestartPreventExitStatus=2 3 4",
        "Before=docker.service",
        "RuntimeDirectory=kersey flannel",
        "RuntimeDirectoryPreserve=yes",
        "StateDirectory=kersey",
        "DeviceAllow=/dev/net/tun rw",
    ] {
        assert!(unit.lines().any(|have| have == line), "{line}");
    }
    // Five restarts in ten seconds would otherwise be the last, and take device and sockets along.
    for unit in UNITS {
        let text = fs::read_to_string(Path::new("configs/systemd").join(unit)).unwrap();
        assert!(
            text.lines().any(|line| line == "StartLimitIntervalSec=0"),
            "{unit}"
        );
    }
    let value = |name: &str| {
        unit.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .unwrap_or_else(|| panic!("{name} is missing"))
            .parse::<u32>()
            .unwrap()
    };
    assert!(value("WatchdogSec") >= 15);
    assert!(value("FileDescriptorStoreMax") >= 3 * 8);
    assert!(
        fs::read_to_string("configs/sysusers.d/kersey.conf")
            .unwrap()
            .contains("\nu kersey -")
    );
}
