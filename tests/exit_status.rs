//! The exit statuses that supervisors rely on: each as it comes about, and the page and the help that list them.
//!
//! Status 3, a machine that lacks something, and 7, another daemon, take namespaces to bring about:
//! `without_the_tun_device_it_ends_with_a_hint`, `without_the_capability_it_ends_with_a_hint` and
//! `a_second_daemon_refuses_and_leaves_the_first_alone`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Command, Stdio};

use kersey::cli::exit;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NETWORK: &str = r#"--network-config={"Network":"10.1.0.0/16"}"#;

#[test]
fn stopped_on_request_is_0() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = kersey()
            .args(["server", "--listen=127.0.0.1:0", NETWORK])
            .arg(format!("--data-dir={}", dir.path().display()))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("serving leases")));
        kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(exit::OK.into()), "{signal}");
    }
}

#[test]
fn a_failure_at_run_time_is_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let done = kersey()
        .args(["server", NETWORK])
        .arg(format!("--listen={}", taken.local_addr().unwrap()))
        .arg(format!("--data-dir={}", dir.path().display()))
        .output()
        .unwrap();
    assert_eq!(done.status.code(), Some(exit::FAILED.into()), "{done:?}");
    let done = kersey()
        .args(["status", "--status-socket=/nowhere"])
        .output()
        .unwrap();
    assert_eq!(done.status.code(), Some(exit::FAILED.into()), "{done:?}");
}

#[test]
fn a_mistake_in_flag_variable_or_file_is_2() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kersey.toml");
    fs::write(&file, "queues = 0\n").unwrap();
    for (args, variables) in [
        (vec!["run".to_owned(), "--queues=0".to_owned()], vec![]),
        (vec!["run".to_owned()], vec![("KERSEY_QUEUES", "0")]),
        (
            vec!["run".to_owned(), format!("--config={}", file.display())],
            vec![],
        ),
        (
            vec!["run".to_owned()],
            vec![("KERSEY_CONFIG", file.to_str().unwrap())],
        ),
        (vec!["lab".to_owned(), "--nodes=x".to_owned()], vec![]),
        (vec!["lab".to_owned(), "--mtu=575".to_owned()], vec![]),
        (vec!["man".to_owned(), "bogus".to_owned()], vec![]),
        (
            vec!["reserve".to_owned(), "add".to_owned(), "x".to_owned()],
            vec![],
        ),
    ] {
        let done = kersey().args(&args).envs(variables.clone()).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(
            done.status.code(),
            Some(exit::USAGE.into()),
            "{args:?} {variables:?}: {said}"
        );
        assert!(said.starts_with("error: "), "{said}");
        if args[0] == "run" {
            assert_eq!(
                said.lines().count(),
                1,
                "one line has field, value and rule: {said}"
            );
            assert!(said.contains("\"0\"") && said.contains("from 1 to 256"), "{said}");
        }
    }
}

#[test]
fn a_network_config_that_cannot_be_run_is_4() {
    let dir = tempfile::tempdir().unwrap();
    let done = kersey()
        .args(["server", "--listen=127.0.0.1:0", "--network-config={}"])
        .arg(format!("--data-dir={}", dir.path().display()))
        .output()
        .unwrap();
    assert_eq!(done.status.code(), Some(exit::CONFIG.into()), "{done:?}");
}

#[test]
fn page_help_and_units_list_the_same_statuses() {
    let known = [
        exit::OK,
        exit::FAILED,
        exit::USAGE,
        exit::ENVIRONMENT,
        exit::CONFIG,
        exit::INSTANCE,
    ];
    let page = fs::read_to_string("docs/operations.md").unwrap();
    let (_, section) = page.split_once("\n## Exit status\n").unwrap();
    let listed: Vec<u8> = section
        .lines()
        .take_while(|line| !line.starts_with("## "))
        .filter_map(|line| line.strip_prefix("| ")?.split(' ').next()?.parse().ok())
        .collect();
    assert_eq!(listed, known);
    for args in [&["--help"] as &[&str], &["run", "--help"]] {
        let help = kersey().args(args).output().unwrap();
        let text = String::from_utf8_lossy(&help.stdout).replace('\n', " ");
        let (_, statuses) = text
            .split_once("Exit status: ")
            .unwrap_or_else(|| panic!("{args:?}: {text}"));
        for status in known {
            assert!(
                statuses.contains(&format!("{status} ")),
                "{args:?}: {status}: {statuses}"
            );
        }
    }
    // A restart mends neither flags nor machine nor config.
    for unit in ["kersey.service", "kersey-server.service"] {
        let text = fs::read_to_string(format!("configs/systemd/{unit}")).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("RestartPreventExitStatus="));
        assert_eq!(line, Some("2 3 4"), "{unit}");
    }
}

fn kersey() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command.env_clear();
    command
}
