//! What a store says is only data: nothing of it is executed (S9), no line of the log is forged by it (S15), and a bad config
//! takes no running node down (B1).

use std::fs;
use std::process::Command;
use std::time::Duration;

use crate::overlay::{Blueprint, READY, figure, wait_for};
use crate::support::{require_etcd, require_strace};

/// Texts that mean something to a shell, a terminal, a path or a log.
const NASTY: [&str; 12] = [
    "$(touch /tmp/kersey-owned)",
    "`touch /tmp/kersey-owned`",
    "; touch /tmp/kersey-owned #",
    "| sh",
    "&& reboot",
    "../../../../etc/passwd",
    "%s%s%n",
    "x\\n2026-01-01T00:00:00Z ERROR forged: all is lost",
    "x\\r\\u001b[2J\\u001b]0;owned\\u0007",
    "\\u202etxt.exe\\u0000",
    "'\\\" OR 1=1 --",
    "\\ud83d\\ude00",
];

/// The only programs a daemon may start: they set firewall rules, with arguments of its own.
const FIREWALL: [&str; 8] = [
    "nft",
    "iptables",
    "ip6tables",
    "iptables-restore",
    "ip6tables-restore",
    "iptables-save",
    "ip6tables-save",
    "iptables-nft-restore",
];

#[test]
fn nothing_the_store_says_is_executed_or_forges_a_log_line() {
    let test = "nothing_the_store_says_is_executed_or_forges_a_log_line";
    if !require_etcd(test) || !require_strace(test) {
        return;
    }
    let mut blueprint = Blueprint::new("hostile", 2);
    // What is written below stays clear of what the nodes lease.
    blueprint.network =
        r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.50.0","Backend":{"Type":"udp"}}"#.into();
    blueprint
        .own_flags
        .insert(2, vec!["--log-format=json".into(), "--log-level=debug".into()]);
    let mut overlay = blueprint.build();
    let calls = overlay.file("execve");
    let traced = overlay.command(1);
    let mut command = Command::new("strace");
    // The tracer stands beside, so that the process we start and end is the daemon.
    command.args([
        "-D",
        "-f",
        "-qq",
        "-s",
        "4096",
        "-e",
        "trace=execve,execveat",
        "-o",
    ]);
    command
        .arg(&calls)
        .arg(traced.get_program())
        .args(traced.get_args());
    overlay.adopt(1, command);
    let plain = overlay.command(2);
    overlay.adopt(2, plain);
    overlay.wait_all();

    let mut puts = 0;
    for (nth, nasty) in NASTY.iter().enumerate() {
        let third = 101 + nth;
        for value in [
            format!(r#"{{"PublicIP":"{nasty}"}}"#),
            format!(r#"{{"PublicIP":"192.0.2.{third}","BackendType":"{nasty}"}}"#),
            format!(r#"{{"PublicIP":"192.0.2.{third}","BackendType":"{nasty}","BackendData":"{nasty}"}}"#),
            format!(
                r#"{{"PublicIP":"192.0.2.{third}","BackendType":"extension","BackendData":{{"PreStartupCommand":"{nasty}"}}}}"#
            ),
            (*nasty).to_owned(),
        ] {
            overlay.put(&format!("subnets/10.244.{third}.0-24"), value);
            puts += 1;
        }
        let raw: String = serde_json::from_str(&format!("\"{nasty}\"")).unwrap();
        overlay.put(&format!("subnets/{raw}"), r#"{"PublicIP":"192.0.2.9"}"#);
        overlay.put(&format!("subnets/10.244.{third}.0-24{raw}"), *nasty);
        puts += 2;
    }
    // Rotten a hundred times over, one cause.
    for nth in 0..100 {
        overlay.put(&format!("subnets/rotten-{nth}"), "\u{1b}[31m");
        puts += 1;
    }
    // A last good one shows that all before it was read.
    overlay.put("subnets/10.244.199.0-24", r#"{"PublicIP":"192.0.2.99"}"#);
    for nth in [1, 2] {
        overlay.wait(nth, READY, |status| {
            status
                .peers
                .iter()
                .any(|peer| peer.subnets == ["10.244.199.0/24"])
        });
    }
    overlay.ping_all();

    for nth in [1, 2] {
        overlay.terminate(nth);
        let log = overlay.log(nth);
        let lines: Vec<&str> = log.lines().collect();
        // At debug a change of the peers is a line; what is wrong with an entry is not, at any level.
        let plain = lines.iter().filter(|line| !line.contains("DEBUG")).count();
        figure("log lines after hostile puts", (puts, plain));
        assert!(plain < 60, "{plain} lines for {puts} puts:\n{log}");
        for line in &lines {
            assert!(line.len() <= 2048, "{} bytes: {line:.300}", line.len());
            assert!(!line.chars().any(|c| c.is_control()), "{line:?}");
            assert!(!line.starts_with("2026-01-01T00:00:00Z ERROR forged"), "{line}");
            if nth == 2 {
                let parsed: serde_json::Value =
                    serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
                assert!(parsed.get("level").is_some(), "{line}");
            }
        }
        let alarms = lines.iter().filter(|line| line.contains("ERROR")).count();
        assert!(nth == 2 || alarms == 0, "{log}");
    }
    assert!(!std::path::Path::new("/tmp/kersey-owned").exists());
    let trace = fs::read_to_string(&calls).unwrap();
    let started: Vec<&str> = trace.lines().filter(|line| line.contains("execve")).collect();
    let foreign: Vec<&&str> = started
        .iter()
        .filter(|line| {
            let program = line.split('"').nth(1).unwrap_or_default();
            let name = program.rsplit('/').next().unwrap_or_default();
            // The daemon itself, and its helper for the firewall: both are this very program.
            let is_own = program == env!("CARGO_BIN_EXE_kersey") || program == "/proc/self/exe";
            let is_known = is_own || FIREWALL.contains(&name);
            !is_known || NASTY.iter().any(|nasty| line.contains(nasty))
        })
        .collect();
    assert!(!started.is_empty(), "strace saw nothing");
    figure("programs started", started.len());
    assert_eq!(foreign, [] as [&&str; 0]);
}

#[test]
fn a_bad_config_in_the_store_takes_no_running_node_down() {
    if !require_etcd("a_bad_config_in_the_store_takes_no_running_node_down") {
        return;
    }
    let mut overlay = Blueprint::new("badconf", 2).start();
    let good = overlay.get("config").unwrap().0;
    for bad in [
        "",
        "null",
        "{",
        "{}",
        r#"{"Network":"10.244.0.0/31"}"#,
        r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#,
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#,
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
        "\u{1b}[2J\nERROR forged",
    ] {
        overlay.put("config", bad);
    }
    overlay.put("config", "x".repeat(1 << 20));
    std::thread::sleep(Duration::from_secs(1));
    for nth in [1, 2] {
        assert!(overlay.daemon(nth).is_running());
        assert!(overlay.status(nth).ready, "node {nth}");
    }
    overlay.ping_all();

    // One that starts waits for a better one, and says in one line why. A life with a cache would start from that.
    overlay.put("config", r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#);
    overlay.terminate(2);
    let _ = fs::remove_file(overlay.file("2.data/control.json"));
    overlay.restart(2);
    let log = overlay.nodes[1].child.log().to_owned();
    let told = || fs::read_to_string(&log).unwrap();
    wait_for("a line about the config", READY, || {
        told().contains("SubnetLen is 31: must be 30 at most")
    });
    std::thread::sleep(Duration::from_secs(2));
    assert!(overlay.daemon(2).is_running(), "{}", told());
    assert_eq!(told().matches("SubnetLen is 31").count(), 1, "{}", told());
    overlay.put("config", good);
    overlay.wait_all();
    overlay.ping_all();
}
