//! Device and sockets go from one process to the next while packets flow (F11).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kersey::lab::traffic::probe::{Probe, ProbeReport};
use nix::sys::signal::Signal;

use crate::overlay::{Blueprint, Conversation, Daemon, Overlay, READY, figure, wait_for, within};
use crate::routed::{SOON, routes, routes_to_others};
use crate::support::{require_etcd, require_root};

/// Starts a daemon in the place of node `nth`'s, and waits until the old one has gone and the new one is up.
pub(crate) fn take_over(overlay: &mut Overlay, nth: usize, flags: &[&str]) {
    let mut command = overlay.command(nth);
    command.arg("--takeover").args(flags);
    let successor = overlay.run("successor", nth, command);
    let mut old = std::mem::replace(&mut overlay.nodes[nth - 1].child, successor);
    let ended = old.wait_end(READY).unwrap();
    assert_eq!(ended.code(), Some(0), "{}", old.log_end());
    let said = fs::read_to_string(old.log()).unwrap();
    assert!(said.contains("a successor is ready and has taken over"), "{said}");
    let peers = overlay.nodes.len() - 1;
    overlay.wait(nth, READY, |status| {
        status.ready && status.store.connected && status.peers.len() == peers
    });
}

/// Runs the probe beside `change`, and for half a second after it.
pub(crate) fn under_probe(overlay: &mut Overlay, change: impl FnOnce(&mut Overlay)) -> ProbeReport {
    let (one, two) = (overlay.pod(1).addr, overlay.pod(2).addr);
    let ends = [(1, one), (2, two)].map(|(nth, addr)| (overlay.namespace(nth).name().to_owned(), addr));
    let spaces = ends
        .each_ref()
        .map(|(name, _)| kersey::lab::netns::Namespace::existing(name).unwrap());
    let end = |at: usize| kersey::lab::traffic::End::new(&spaces[at], ends[at].1);
    let probe = Probe::start(end(0), end(1)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    change(overlay);
    let before = probe.received();
    wait_for("traffic flows on", READY, || {
        let (there, back) = probe.received();
        there > before.0 + 500 && back > before.1 + 500
    });
    let report = probe.stop().unwrap();
    assert_eq!(report.corrupted(), 0, "{report:?}");
    report
}

#[test]
fn a_successor_takes_over_and_no_packet_is_lost() {
    if !require_etcd("a_successor_takes_over_and_no_packet_is_lost") {
        return;
    }
    for kind in ["udp", "vxlan", "srv6"] {
        let mut blueprint = Blueprint::new("takeover", 2);
        blueprint.network = kersey::lab::cluster::ClusterPlan::network(kind, false);
        let mut overlay = blueprint.start();
        let (subnet, device) = (overlay.subnet(2), overlay.device(2).unwrap().0.index);
        let mac = fs::read_to_string(overlay.file("2.data").join("vtep-mac")).unwrap();
        let mut conversation = Conversation::start(overlay.pod(1), overlay.pod(2));
        conversation.exchange();
        let report = under_probe(&mut overlay, |overlay| {
            for _ in 0..3 {
                take_over(overlay, 2, &[]);
                conversation.exchange();
            }
        });
        let drops = overlay.status(2).drops;
        figure(
            &format!("{kind}, three takeovers: lost, longest gap"),
            (report.lost(), report.longest_gap()),
        );
        assert!(report.lost() <= 3, "{report:?} {drops:?}");
        assert_eq!(report.duplicates(), 0, "{kind}: {report:?}");
        assert!(
            report.longest_gap() <= within(Duration::from_millis(200)),
            "{report:?}"
        );
        assert_eq!(overlay.subnet(2), subnet);
        assert_eq!(
            overlay.device(2).unwrap().0.index,
            device,
            "the device is the same"
        );
        assert_eq!(
            fs::read_to_string(overlay.file("2.data").join("vtep-mac")).unwrap(),
            mac
        );
        assert_eq!(overlay.device(2).unwrap().2.len(), 1);
        overlay.ping_all();
        overlay.transfer(1, 2, 1 << 20);
        overlay.terminate(2);
        assert!(overlay.device(2).is_none(), "the device stayed");
    }
}

#[test]
fn the_node_with_the_embedded_store_hands_that_over_too() {
    if !require_root("the_node_with_the_embedded_store_hands_that_over_too") {
        return;
    }
    let mut overlay = Blueprint::embedded("storeover", 2).start();
    let report = under_probe(&mut overlay, |overlay| take_over(overlay, 1, &[]));
    figure(
        "takeover of the store's node: lost, longest gap",
        (report.lost(), report.longest_gap()),
    );
    assert!(report.lost() <= 3, "{report:?}");
    overlay.wait(2, READY, |status| status.store.connected);
    overlay.ping_all();
}

#[test]
fn a_successor_that_wants_something_else_starts_cold() {
    if !require_root("a_successor_that_wants_something_else_starts_cold") {
        return;
    }
    let mut overlay = Blueprint::embedded("coldover", 2).start();
    let old = overlay.device(2).unwrap().0.index;
    take_over(&mut overlay, 2, &["--queues", "2"]);
    assert_ne!(overlay.device(2).unwrap().0.index, old);
    assert!(
        overlay.log(2).contains("another number of queues"),
        "{}",
        overlay.log(2)
    );
    overlay.ping_all();

    // Another device: the old one would keep the port.
    take_over(&mut overlay, 2, &["--device", "tun9"]);
    assert!(overlay.device(2).is_none(), "the former device stayed");
    overlay.ping_all();

    // Without anybody to take over from, it is a start like any other.
    overlay.terminate(2);
    let mut command = overlay.command(2);
    command.arg("--takeover");
    overlay.nodes[1].child = overlay.run("alone", 2, command);
    overlay.wait_all();
    overlay.ping_all();
}

#[test]
fn a_successor_of_another_version_or_that_goes_away_does_no_harm() {
    if !require_root("a_successor_of_another_version_or_that_goes_away_does_no_harm") {
        return;
    }
    let mut overlay = Blueprint::embedded("badover", 2).start();
    let pid = overlay.daemon(2).pid();
    let device = overlay.device(2).unwrap().0.index;
    let bell = overlay.file("2.sock.takeover");
    let report = under_probe(&mut overlay, |overlay| {
        // The next version but one.
        let mut stranger = UnixStream::connect(&bell).unwrap();
        stranger
            .write_all(b"{\"take\":[3],\"colour\":\"blue\"}\n")
            .unwrap();
        let mut answer = [0; 64];
        let len = stranger.read(&mut answer).unwrap();
        assert_eq!(&answer[..len], b"{\"refuse\":[1]}\n");
        drop(stranger);
        overlay.wait(2, READY, |status| status.ready);

        // One that takes everything and dies.
        let mut dying = UnixStream::connect(&bell).unwrap();
        dying.write_all(b"{\"take\":[1]}\n").unwrap();
        let len = dying.read(&mut answer).unwrap();
        assert!(answer[..len].starts_with(b"{\"give\":1,"), "{answer:?}");
        drop(dying);
        let socket = overlay.socket(2);
        overlay
            .daemon(2)
            .wait(READY, || {
                let status = kersey::lab::daemon::status(&socket).ok().flatten()?;
                (status.ready && status.peers.len() == 1).then_some(())
            })
            .unwrap();
    });
    figure(
        "a successor that dies: lost, longest gap",
        (report.lost(), report.longest_gap()),
    );
    assert!(report.lost() <= 3, "{report:?}");
    assert_eq!(overlay.daemon(2).pid(), pid);
    assert_eq!(overlay.device(2).unwrap().0.index, device);
    assert!(
        overlay.log(2).contains("the successor went away"),
        "{}",
        overlay.log(2)
    );
    overlay.ping_all();
}

#[test]
fn handing_over_can_be_switched_off() {
    if !require_root("handing_over_can_be_switched_off") {
        return;
    }
    let mut blueprint = Blueprint::embedded("noover", 1);
    blueprint.flags = vec!["--handover=off".to_owned()];
    let mut overlay = blueprint.start();
    assert!(!overlay.file("1.sock.takeover").exists());
    let mut command = overlay.command(1);
    command.arg("--takeover");
    let mut second = overlay.run("second", 1, command);
    let ended = second.wait_end(READY).unwrap();
    assert_eq!(ended.code(), Some(7), "{}", second.log_end());
    overlay.wait(1, READY, |status| status.ready);
}

/// SIGHUP: another config in the store is taken without a restart, and a wrong one is not.
#[test]
fn a_reload_takes_another_config_and_refuses_a_wrong_one() {
    if !require_etcd("a_reload_takes_another_config_and_refuses_a_wrong_one") {
        return;
    }
    let mut overlay = Blueprint::new("reload", 2).start();
    let pids = [overlay.daemon(1).pid(), overlay.daemon(2).pid()];
    let subnet = overlay.subnet(2);
    let reload = |overlay: &mut Overlay, nth: usize| {
        let done =
            |log: &str| log.matches(" reloaded").count() + log.matches("the reload was refused").count();
        let before = done(&overlay.log(nth));
        overlay.daemon(nth).signal(Signal::SIGHUP).unwrap();
        wait_for("the reload is done", READY, || done(&overlay.log(nth)) > before);
    };
    // The same config: nothing happens, not even to a packet.
    let report = under_probe(&mut overlay, |overlay| reload(overlay, 2));
    assert_eq!(report.lost(), 0, "{report:?}");

    for wrong in [
        r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#,
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}"#,
        "junk",
        // It reads well, but too little is left inside for IPv6.
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{"Type":"vxlan","MTU":1300}}"#,
    ] {
        overlay.put("config", wrong);
        let report = under_probe(&mut overlay, |overlay| reload(overlay, 2));
        figure("a wrong config: lost", report.lost());
        overlay.wait(2, READY, |status| status.ready && status.backend.name == "udp");
        assert!(
            report.longest_gap() <= within(Duration::from_secs(1)),
            "{report:?}"
        );
    }

    // To a backend without a tunnel and back, too: of the one before nothing is told any more.
    for kind in ["vxlan", "host-gw", "udp"] {
        let config = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        overlay.put("config", config);
        for nth in 1..=2 {
            reload(&mut overlay, nth);
        }
        for nth in 1..=2 {
            overlay.wait(nth, READY, |status| {
                status.ready && status.backend.name == kind && status.peers.len() == 1
            });
            // Who the peers are a node knows some milliseconds before its kernel does.
            let bare = routes_to_others(&overlay, nth);
            let is_bare = || routes(&overlay, nth).iter().any(|route| bare.contains(route));
            wait_for("the kernel routes are the backend's", within(SOON), || {
                is_bare() == (kind == "host-gw")
            });
        }
        overlay.ping_all();
    }
    assert_eq!(overlay.subnet(2), subnet);
    assert_eq!([overlay.daemon(1).pid(), overlay.daemon(2).pid()], pids);
}

/// SIGHUP inside the sandbox: the config file is read again, and what cannot be read changes nothing.
#[test]
fn a_reload_reads_the_config_file_again() {
    if !require_root("a_reload_reads_the_config_file_again") {
        return;
    }
    let mut overlay = Blueprint::embedded("conffile", 1).build();
    let file = overlay.file("kersey.toml");
    let write = |text: &str| {
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    };
    write("log-level = \"warn\"\n");
    let mut command = overlay.command(1);
    command.arg("--config").arg(&file);
    let child = overlay.run("node 1", 1, command);
    overlay.nodes.push(Daemon {
        child,
        pods: Vec::new(),
    });
    overlay.wait(1, READY, |status| status.ready);
    assert!(!overlay.log(1).contains("INFO"), "{}", overlay.log(1));
    let hangup = |overlay: &mut Overlay, text: &str| {
        overlay.daemon(1).signal(Signal::SIGHUP).unwrap();
        wait_for(text, READY, || overlay.log(1).contains(text));
    };
    write("log-level = \"info\"\n");
    hangup(&mut overlay, " reloaded");
    write("log-level = \"loud\"\n");
    hangup(&mut overlay, "the reload was refused");
    overlay.wait(1, READY, |status| status.ready);
}
