//! The process that runs firewall tools for a daemon in its sandbox: stopped, killed, and what it may touch.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::firewall::{PUT_RIGHT, flags, run};
use crate::overlay::{Blueprint, Overlay, READY, wait_for, within};
use crate::support::require_firewall;

/// The helper of a node's daemon.
fn helper(overlay: &mut Overlay, nth: usize) -> Pid {
    let daemon = overlay.daemon(nth).pid();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else {
            continue;
        };
        let Ok(status) = fs::read_to_string(entry.path().join("status")) else {
            continue;
        };
        if status.lines().any(|line| line == format!("PPid:\t{daemon}")) {
            found.push(Pid::from_raw(pid));
        }
    }
    assert_eq!(found.len(), 1, "children of the daemon: {found:?}");
    found[0]
}

/// After an answer that came too late, every call read the one before it, and a rule more was inserted each second.
#[test]
fn a_helper_that_was_stopped_gets_into_step_again() {
    if !require_firewall("a_helper_that_was_stopped_gets_into_step_again") {
        return;
    }
    let mut blueprint = Blueprint::embedded("stopped", 1);
    blueprint.flags = flags(&["--ip-masq", "--firewall=iptables", "--iptables-resync=1"]);
    let mut overlay = blueprint.start();
    let list = |overlay: &Overlay| {
        let nat = run(overlay, 1, "iptables", "-t nat -S");
        nat + &run(overlay, 1, "iptables", "-S")
    };
    let right = list(&overlay);
    assert_eq!(right.matches("-j FLANNEL-FWD").count(), 1, "{right}");
    let helper = helper(&mut overlay, 1);
    kill(helper, Signal::SIGSTOP).unwrap();
    // An answer may take 15 s, and more than one call has to be given up before a look is.
    wait_for("somebody gives up waiting", Duration::from_secs(90), || {
        overlay.log(1).contains("did not end within")
    });
    kill(helper, Signal::SIGCONT).unwrap();
    overlay.wait(1, READY, |status| status.firewall == "iptables");
    // Each of the looks of these seconds inserted a rule.
    sleep(Duration::from_secs(5));
    assert_eq!(list(&overlay), right);
    run(&overlay, 1, "iptables", "-F FLANNEL-FWD");
    wait_for("rules are put right", within(PUT_RIGHT), || {
        list(&overlay) == right
    });
    sleep(Duration::from_secs(3));
    assert_eq!(list(&overlay), right);
}

/// A terminal that is closed, a service manager and `pkill -HUP kersey` tell all processes of a daemon.
#[test]
fn a_helper_leaves_signals_to_its_daemon() {
    if !require_firewall("a_helper_leaves_signals_to_its_daemon") {
        return;
    }
    let mut blueprint = Blueprint::embedded("signals", 1);
    blueprint.flags = flags(&["--ip-masq", "--firewall=iptables", "--iptables-resync=1"]);
    let mut overlay = blueprint.start();
    let list = |overlay: &Overlay| run(overlay, 1, "iptables", "-S");
    let right = list(&overlay);
    let helper = helper(&mut overlay, 1);
    for signal in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        kill(helper, signal).unwrap();
    }
    run(&overlay, 1, "iptables", "-F FLANNEL-FWD");
    wait_for("rules are put right", within(PUT_RIGHT), || {
        list(&overlay) == right
    });
    // Those of the daemon's group get both: a reload, and then the end.
    overlay.daemon(1).signal(Signal::SIGHUP).unwrap();
    kill(helper, Signal::SIGTERM).unwrap();
    overlay.terminate(1);
    wait_for("the helper ends with its daemon", READY, || {
        kill(helper, None).is_err()
    });
    let log = overlay.log(1);
    assert!(!log.contains("helper is gone") && !log.contains("ERROR"), "{log}");
}

/// What an HTTP server on a node answers, head and body.
fn get(overlay: &Overlay, nth: usize, port: u16, path: &str) -> String {
    let mut answer = String::new();
    overlay
        .namespace(nth)
        .run(|| {
            let place = SocketAddr::from(([127, 0, 0, 1], port));
            let mut stream = TcpStream::connect(place)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(
                stream,
                "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            )?;
            stream.read_to_string(&mut answer)?;
            Ok(())
        })
        .unwrap();
    answer
}

/// Else the service manager kills it, and says so in the journal.
#[test]
fn the_helper_has_a_name_and_ends_before_the_daemon() {
    if !require_firewall("the_helper_has_a_name_and_ends_before_the_daemon") {
        return;
    }
    let mut blueprint = Blueprint::embedded("named", 1);
    blueprint.flags = flags(&["--ip-masq"]);
    let mut overlay = blueprint.start();
    let helper = helper(&mut overlay, 1);
    let name = fs::read_to_string(format!("/proc/{helper}/comm")).unwrap();
    assert_eq!(name, "kersey-firewall\n");
    overlay.terminate(1);
    // The daemon has waited for it: there is nobody left to be reaped, either.
    assert!(!fs::exists(format!("/proc/{helper}")).unwrap());
}

#[test]
fn a_helper_that_is_killed_makes_the_daemon_ill() {
    if !require_firewall("a_helper_that_is_killed_makes_the_daemon_ill") {
        return;
    }
    let mut blueprint = Blueprint::embedded("killed", 1);
    blueprint.flags = flags(&["--healthz-port=8081", "--iptables-resync=1"]);
    let mut overlay = blueprint.start();
    assert!(get(&overlay, 1, 8081, "/healthz").starts_with("HTTP/1.1 200"));
    assert!(get(&overlay, 1, 8081, "/metrics").contains("\nkersey_firewall_helper_up 1.0\n"));
    let helper = helper(&mut overlay, 1);
    kill(helper, Signal::SIGKILL).unwrap();
    wait_for(
        "the daemon says it is ill",
        within(Duration::from_secs(3)),
        || {
            let answer = get(&overlay, 1, 8081, "/healthz");
            answer.starts_with("HTTP/1.1 503") && answer.contains("firewall tools has ended")
        },
    );
    assert!(get(&overlay, 1, 8081, "/metrics").contains("\nkersey_firewall_helper_up 0.0\n"));
    wait_for("the log tells", READY, || {
        overlay.log(1).contains("firewall tools has ended")
    });
    assert!(!fs::exists(format!("/proc/{helper}")).unwrap(), "it is reaped");
    // Packets flow, and the rules are there.
    assert!(overlay.status(1).ready);
    assert!(run(&overlay, 1, "nft", "list tables").contains("flannel-ipv4"));
}
