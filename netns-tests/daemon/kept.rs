//! A service manager that keeps device and sockets for the next daemon, as systemd does: what it has, and what becomes of it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use kersey::host::sys;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon::Child;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use sd_notify::NotifyState;

use crate::handover::under_probe;
use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Conversation, DEVICE, Daemon, Overlay, READY, figure, wait_for, within};
use crate::routed::ip;
use crate::watch::{require_etcd, require_root, warm};

/// A service manager as far as a daemon can tell: what it is told, and the descriptors it keeps. It listens all the time.
struct Manager {
    heard: Arc<Mutex<Heard>>,
}

#[derive(Default)]
struct Heard {
    /// Newest first. Several may have one name, but no open file is there twice (systemd, `service_add_fd_store`).
    kept: Vec<(String, OwnedFd)>,
    told: Vec<String>,
    /// As they came: what belongs together comes together.
    messages: Vec<String>,
}

impl Manager {
    fn listen(overlay: &Overlay) -> Self {
        let socket = UnixDatagram::bind(overlay.file("notify.sock")).unwrap();
        let heard = Arc::<Mutex<Heard>>::default();
        let listening = Arc::clone(&heard);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // It ends with the test's process.
            while let Ok((len, descriptors)) = sys::receive_descriptors(socket.as_fd(), &mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
                listening.lock().unwrap().note(&text, descriptors);
            }
        });
        Self { heard }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }

    /// The names of what is kept, in their order.
    fn kept(&self) -> Vec<String> {
        let mut names: Vec<String> = self.heard().kept.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    fn count(&self, line: &str) -> usize {
        let heard = self.heard();
        heard.told.iter().filter(|have| have.starts_with(line)).count()
    }

    fn wait_for(&self, line: &str) {
        wait_for(line, READY, || self.count(line) > 0);
    }

    /// Starts a node's daemon with what is kept, as systemd would.
    fn start(&self, overlay: &mut Overlay, nth: usize, flags: &[&str]) -> Child {
        let heard = self.heard();
        let kersey = overlay.command(nth);
        let mut script = String::new();
        let mut names = Vec::new();
        let mut passed = Vec::new();
        for (at, (name, fd)) in heard.kept.iter().enumerate() {
            // Out of the way of those passed, and not closed on exec.
            let high = fcntl(fd, FcntlArg::F_DUPFD(100)).unwrap();
            passed.push(sys::adopt(high).unwrap());
            fcntl(passed.last().unwrap(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
            // Moved, not copied: the daemon has no other.
            script += &format!("exec {}<&{high}-; ", at + 3);
            names.push(name.clone());
        }
        if !names.is_empty() {
            script += &format!(
                "export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}; ",
                names.len(),
                names.join(":")
            );
        }
        script += "exec \"$@\"";
        let mut command = Command::new("bash");
        command.args(["-c", &script, "bash"]);
        command
            .arg(kersey.get_program())
            .args(kersey.get_args())
            .args(flags);
        command.env("NOTIFY_SOCKET", overlay.file("notify.sock"));
        command.env("WATCHDOG_USEC", "600000");
        let child = overlay.run("under a manager", nth, command);
        assert!(passed.iter().all(|fd| fd.as_raw_fd() >= 100));
        child
    }

    /// Ends node 2's daemon, does `meanwhile`, and starts it again; it must come up, and reach node 1.
    fn restart(&self, overlay: &mut Overlay, flags: &[&str], meanwhile: impl FnOnce(&Overlay)) {
        overlay.terminate(2);
        meanwhile(overlay);
        overlay.nodes[1].child = self.start(overlay, 2, flags);
        overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
        overlay.wait(1, READY, |status| status.peers.len() == 1);
        overlay.ping_all();
    }
}

impl Heard {
    fn note(&mut self, text: &str, descriptors: Vec<OwnedFd>) {
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        if let (Some(name), true) = (name, text.contains("FDSTOREREMOVE=1")) {
            self.kept.retain(|(kept, _)| kept != name);
        }
        if let (Some(name), true) = (name, text.contains("FDSTORE=1")) {
            assert!(text.contains("FDPOLL=0"), "{text}");
            for fd in descriptors {
                if !self
                    .kept
                    .iter()
                    .any(|(_, kept)| sys::is_same_open_file(kept, &fd))
                {
                    self.kept.insert(0, (name.to_owned(), fd));
                }
            }
        }
        self.told.extend(text.lines().map(str::to_owned));
        self.messages.push(text.to_owned());
    }
}

fn del_device(overlay: &Overlay) {
    ip(overlay, 2, &format!("link del {DEVICE}"));
}

#[test]
fn a_service_manager_keeps_device_and_sockets_through_stop_and_crash() {
    if require_etcd("a_service_manager_keeps_device_and_sockets_through_stop_and_crash") {
        through_stop_and_crash("fdstore", "udp", &["tun", "udp4"]);
    }
}

/// Its sockets have no port: those of the SIDs that end in the device, and those of all others.
#[test]
fn a_service_manager_keeps_the_raw_sockets_of_srv6_through_stop_and_crash() {
    if require_etcd("a_service_manager_keeps_the_raw_sockets_of_srv6_through_stop_and_crash") {
        let sockets = ["raw4", "raw41", "raw43", "sid4", "sid41", "sid43", "tun"];
        through_stop_and_crash("fdsrv6", "srv6", &sockets);
    }
}

/// `kinds` are the descriptors kept, by name.
fn through_stop_and_crash(tag: &str, backend: &str, kinds: &[&str]) {
    let mut blueprint = Blueprint::new(tag, 2);
    blueprint.network = ClusterPlan::network(backend, false);
    let mut overlay = blueprint.start();
    overlay.terminate(2);
    let manager = Manager::listen(&overlay);
    overlay.nodes[1].child = manager.start(&mut overlay, 2, &[]);
    manager.wait_for("READY=1");
    overlay.wait_all();
    // The subnet file is there before READY is said, and the line for `systemctl status` tells of the node.
    assert!(overlay.file("2.env").exists());
    manager.wait_for("WATCHDOG=1");
    manager.wait_for("STATUS=10.244.");
    let (subnet, device) = (overlay.subnet(2), overlay.device(2).unwrap().0.index);
    let names: Vec<String> = kinds
        .iter()
        .map(|kind| format!("kersey-{kind}.{DEVICE}.0"))
        .collect();
    let mut conversation = Conversation::start(overlay.pod(1), overlay.pod(2));
    conversation.exchange();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        assert_eq!(manager.kept(), names);
        let report = under_probe(&mut overlay, |overlay| {
            overlay.daemon(2).signal(signal).unwrap();
            overlay
                .daemon(2)
                .wait_end(within(Duration::from_secs(2)))
                .unwrap();
            assert_eq!(overlay.device(2).unwrap().0.index, device, "the manager keeps it");
            overlay.nodes[1].child = manager.start(overlay, 2, &[]);
            overlay.wait(2, READY, |status| {
                status.ready && status.store.connected && status.peers.len() == 1
            });
        });
        figure(
            &format!("{backend}, {signal} under a manager that keeps descriptors: lost, longest gap"),
            (report.lost(), report.longest_gap()),
        );
        // What comes in the meantime waits in the kernel: 500 packets in the device, 16 MiB in the socket.
        assert!(report.lost() <= 3, "{report:?}");
        assert!(
            report.longest_gap() <= within(Duration::from_secs(1)),
            "{report:?}"
        );
        assert_eq!(overlay.device(2).unwrap().0.index, device);
        assert_eq!(overlay.subnet(2), subnet);
        let log = overlay.log(2);
        assert!(log.contains("kept device and sockets"), "{log}");
        assert!(!log.contains("of no use"), "{log}");
        conversation.exchange();
        overlay.ping_all();
    }
}

/// What `systemctl status` shows is never older than a few seconds, and what comes and goes in between is not told one by one.
#[test]
fn the_line_for_systemctl_status_follows_the_node() {
    if !require_etcd("the_line_for_systemctl_status_follows_the_node") {
        return;
    }
    const SOON: Duration = Duration::from_secs(4);
    let mut overlay = Blueprint::new("statusline", 1).build();
    let manager = Manager::listen(&overlay);
    let mut command = overlay.command(1);
    // Without a watchdog, which would have it looked at more often.
    command.env("NOTIFY_SOCKET", overlay.file("notify.sock"));
    overlay.adopt(1, command);
    manager.wait_for("READY=1");
    let subnet = overlay.subnet(1);
    let last = || {
        let heard = manager.heard();
        let mut lines = heard.told.iter().rev();
        lines.find_map(|line| line.strip_prefix("STATUS=").map(str::to_owned))
    };
    let wait = |what: &str, limit: Duration| {
        let line = format!("{subnet} by udp, {what}");
        let took = wait_for(&line, within(limit), || last().as_ref() == Some(&line));
        figure(&format!("{what:?} told after"), took);
    };
    // What was told before it was ready is not left standing.
    wait("0 peers", Duration::from_millis(500));
    let before = manager.count("STATUS=");
    let key = |nth: u8| format!("subnets/10.244.{nth}.0-24");
    let own: u8 = subnet.addr().octets()[2];
    let peers: Vec<u8> = (1..=41).filter(|nth| *nth != own).take(40).collect();
    for nth in &peers {
        overlay.put(&key(*nth), format!(r#"{{"PublicIP":"192.0.2.{}"}}"#, 100 + nth));
        thread::sleep(Duration::from_millis(50));
    }
    wait("40 peers", SOON);
    // It took two seconds at least to make forty, and a line is told each other second at most.
    let told = manager.count("STATUS=") - before;
    assert!((1..=8).contains(&told), "{:?}", manager.heard().told);
    overlay.delete(&key(peers[0]));
    wait("39 peers", SOON);
    overlay.etcd_process().signal(Signal::SIGKILL).unwrap();
    overlay.wait(1, READY, |status| !status.store.connected);
    wait("39 peers, store away", SOON);
    overlay.start_etcd();
    overlay.wait(1, READY, |status| status.store.connected);
    wait_for("the log tells that the store is back", READY, || {
        overlay.log(1).contains("the leases are in sight again")
    });
    let log = overlay.log(1);
    assert_eq!(log.matches("lost sight of the leases").count(), 1, "{log}");
    assert_eq!(log.matches("in sight again seconds=").count(), 1, "{log}");
}

/// What a service manager keeps is let go of as soon as it is of no use: else device and port stay busy, by the node's own former self.
#[test]
fn what_is_kept_and_does_not_fit_holds_up_no_restart() {
    if !require_root("what_is_kept_and_does_not_fit_holds_up_no_restart") {
        return;
    }
    let names = |device: &str, queues: usize| {
        let of =
            |kind: &str| Vec::from_iter((0..queues).map(|queue| format!("kersey-{kind}.{device}.{queue}")));
        [of("tun"), of("udp4")].concat()
    };
    let mut overlay = Blueprint::embedded("kept", 2).start();
    overlay.terminate(2);
    let manager = Manager::listen(&overlay);
    overlay.nodes[1].child = manager.start(&mut overlay, 2, &["--queues=1"]);
    overlay.wait_all();
    assert_eq!(manager.kept(), names(DEVICE, 1));
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);

    manager.restart(&mut overlay, &["--queues=2"], |_| {});
    assert_eq!(manager.kept(), names(DEVICE, 2));
    manager.restart(&mut overlay, &["--queues=1"], |_| {});
    assert_eq!(manager.kept(), names(DEVICE, 1));

    manager.restart(&mut overlay, &["--device", "tun9"], |_| {});
    assert_eq!(manager.kept(), names("tun9", 1));
    assert!(overlay.device(2).is_none(), "the former device stayed");

    manager.restart(&mut overlay, &["--device", "tun9", "--handover=off"], |_| {});
    assert_eq!(manager.kept(), [""; 0]);

    manager.restart(&mut overlay, &[], |_| {});
    manager.restart(&mut overlay, &[], del_device);
    assert_eq!(manager.kept(), names(DEVICE, 1));
    // The same while it runs, and then a restart.
    let before = overlay.device(2).unwrap().0.index;
    del_device(&overlay);
    wait_for("the device is made anew", READY, || {
        overlay.device(2).is_some_and(|device| device.0.index != before)
    });
    overlay.wait(2, READY, |status| status.ready);
    manager.restart(&mut overlay, &[], |_| {});
    assert_eq!(manager.kept(), names(DEVICE, 1));
    // Asked last, for in between the device has another name or two queues: that is more descriptors. Eight restarts, one fault.
    oracle.check(&mut overlay, 9);
}

/// A start that fails when it has the device already is tried again with the same device, which somebody else still holds.
#[test]
fn a_start_that_fails_half_way_does_not_lose_the_device() {
    if !require_etcd("a_start_that_fails_half_way_does_not_lose_the_device") {
        return;
    }
    let mut overlay = Blueprint::new("kepthalf", 1).start();
    overlay.terminate(1);
    let manager = Manager::listen(&overlay);
    overlay.nodes[0].child = manager.start(&mut overlay, 1, &[]);
    manager.wait_for("READY=1");
    overlay.wait(1, READY, |status| status.ready);
    let mut oracle = Oracle::start(&mut overlay);
    let before = overlay.device(1).unwrap().0.index;
    overlay.terminate(1);
    // Another port, which is in use.
    overlay.put(
        "config",
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":8999}}"#,
    );
    let bound = overlay
        .namespace(1)
        .run(|| Ok(std::net::UdpSocket::bind("192.0.2.1:8999")?))
        .unwrap();
    overlay.nodes[0].child = manager.start(&mut overlay, 1, &[]);
    wait_for("it is tried again", READY, || {
        overlay
            .log(1)
            .contains("cannot bring the data plane up; trying again")
    });
    // Several times, be it busy with what it holds itself.
    thread::sleep(Duration::from_secs(2));
    assert!(
        !overlay.log(1).contains("in use by another process"),
        "{}",
        overlay.log(1)
    );
    drop(bound);
    overlay.wait(1, READY, |status| status.ready);
    assert_eq!(
        overlay.device(1).unwrap().0.index,
        before,
        "the device is the same"
    );
    oracle.check(&mut overlay, 1);
}

/// F13, and then a restart: the socket of the former address is not there any more, and the new one is the one that is used.
#[test]
fn a_socket_of_a_former_address_does_not_come_back() {
    if !require_root("a_socket_of_a_former_address_does_not_come_back") {
        return;
    }
    let mut overlay = Blueprint::embedded("keptaddr", 2).start();
    overlay.terminate(2);
    let manager = Manager::listen(&overlay);
    overlay.nodes[1].child = manager.start(&mut overlay, 2, &[]);
    overlay.wait_all();
    let kept = manager.kept();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    ip(&overlay, 2, "address del 192.0.2.2/24 dev eth0");
    ip(&overlay, 2, "address add 192.0.2.77/24 dev eth0");
    oracle.rewired(&overlay, 2);
    overlay.wait(2, READY, |status| {
        status.ready && status.node.public_ips == ["192.0.2.77"]
    });
    overlay.wait(1, READY, |status| {
        status
            .peers
            .iter()
            .any(|peer| peer.endpoints == ["192.0.2.77:8285"])
    });
    wait_for("one of each is kept", READY, || manager.kept() == kept);
    let report = under_probe(&mut overlay, |overlay| {
        manager.restart(overlay, &[], |_| {});
    });
    figure("restart after a new address: lost", report.lost());
    assert!(!overlay.log(2).contains("of no use"), "{}", overlay.log(2));
    assert_eq!(manager.kept(), kept);
    oracle.check(&mut overlay, 2);
}

/// Two networks under a service manager, on one node; the files of their subnets in `subnet_dir`.
fn two_networks(tag: &str) -> (Overlay, Manager, [String; 3]) {
    let mut overlay = Blueprint::new(tag, 1).build();
    overlay.delete("config");
    overlay.put(
        "blue/config",
        r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#,
    );
    overlay.put(
        "green/config",
        r#"{"Network":"10.245.0.0/16","Backend":{"Type":"udp","Port":8286}}"#,
    );
    let manager = Manager::listen(&overlay);
    let subnet_dir = overlay.file("1.nets").display().to_string();
    let flags = [
        "--watch-networks".to_owned(),
        "--subnet-dir".to_owned(),
        subnet_dir,
    ];
    let child = manager.start(&mut overlay, 1, &flags.each_ref().map(String::as_str));
    overlay.nodes.push(Daemon {
        child,
        pods: Vec::new(),
    });
    manager.wait_for("READY=1");
    (overlay, manager, flags)
}

/// Whether these networks are up, and no other is there.
fn wait_networks(overlay: &mut Overlay, names: &[&str]) {
    overlay.wait(1, READY, |status| {
        let networks = status.networks.as_ref();
        networks.is_some_and(|networks| {
            networks.keys().eq(names) && networks.values().all(|network| network.ready)
        })
    });
}

#[test]
fn a_network_removed_while_nothing_ran_leaves_no_device() {
    if !require_etcd("a_network_removed_while_nothing_ran_leaves_no_device") {
        return;
    }
    let (mut overlay, manager, flags) = two_networks("keptnets");
    wait_networks(&mut overlay, &["blue", "green"]);
    assert_eq!(manager.kept().len(), 4, "{:?}", manager.kept());
    overlay.terminate(1);
    // Which of the two has flannel0 is chance.
    let text = fs::read_to_string(overlay.file("1.data").join("networks.json")).unwrap();
    let claims: serde_json::Value = serde_json::from_str(&text).unwrap();
    let device = |network: &str| claims[network]["device"].as_str().unwrap().to_owned();
    overlay.delete("green/config");
    overlay.nodes[0].child = manager.start(&mut overlay, 1, &flags.each_ref().map(String::as_str));
    wait_networks(&mut overlay, &["blue"]);
    let links = || {
        overlay
            .namespace(1)
            .netlink(async |netlink| Ok(netlink.links().await?))
            .unwrap()
    };
    wait_for("its device is gone", READY, || {
        let links = links();
        let has = |name: &str| links.iter().any(|link| link.name == name);
        has(&device("blue")) && !has(&device("green"))
    });
    let blue = device("blue");
    assert_eq!(
        manager.kept(),
        [format!("kersey-tun.{blue}.0"), format!("kersey-udp4.{blue}.0")]
    );
}

/// What a unit of `Type=notify-reload` waits for (sd_notify(3)): RELOADING=1 and the time by the monotonic clock in one message, after the
/// signal; then READY=1. A reload that is refused ends like any other, or the unit would hang in "reloading".
#[test]
fn a_manager_is_told_when_a_reload_begins_and_when_it_has_ended() {
    if !require_etcd("a_manager_is_told_when_a_reload_begins_and_when_it_has_ended") {
        return;
    }
    let mut overlay = Blueprint::new("notifyreload", 2).start();
    overlay.terminate(2);
    let manager = Manager::listen(&overlay);
    overlay.nodes[1].child = manager.start(&mut overlay, 2, &[]);
    manager.wait_for("READY=1");
    for (config, outcome) in [
        (ClusterPlan::network("udp", false), " reloaded"),
        ("junk".to_owned(), "the reload was refused"),
    ] {
        overlay.put("config", config);
        manager.heard().messages.clear();
        let before = monotonic_usec();
        overlay.daemon(2).signal(Signal::SIGHUP).unwrap();
        wait_for("the reload has ended", READY, || {
            let heard = manager.heard();
            let told = heard.messages.iter().flat_map(|message| message.lines());
            told.skip_while(|line| *line != "RELOADING=1")
                .any(|line| line == "READY=1")
        });
        let after = monotonic_usec();
        let heard = manager.heard();
        let mut of_reload = heard.messages.iter().filter(|message| {
            let mut lines = message.lines();
            lines
                .any(|line| ["RELOADING=1", "READY=1"].contains(&line) || line.starts_with("MONOTONIC_USEC="))
        });
        let began: Vec<_> = of_reload.next().unwrap().lines().collect();
        assert!(began.contains(&"RELOADING=1"), "{began:?}");
        let at = began.iter().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
        let at: u64 = at
            .unwrap_or_else(|| panic!("no time: {began:?}"))
            .parse()
            .unwrap();
        assert!((before..=after).contains(&at), "{before} {at} {after}");
        // With it, how the node is: the line from before the reload may be another.
        let ended: Vec<_> = of_reload.map(|message| message.lines().collect()).collect();
        let [ended]: &[Vec<&str>] = &ended[..] else {
            panic!("{outcome}: {ended:?}")
        };
        assert_eq!(ended[0], "READY=1", "{outcome}");
        assert!(
            ended[1].starts_with("STATUS=10.") && ended.len() == 2,
            "{outcome}: {ended:?}"
        );
        drop(heard);
        wait_for("the log says how it ended", READY, || {
            overlay.log(2).contains(outcome)
        });
    }
    overlay.wait_all();
    overlay.ping_all();
}

/// The clock that systemd compares with, microseconds.
fn monotonic_usec() -> u64 {
    match NotifyState::monotonic_usec_now() {
        Ok(NotifyState::MonotonicUsec(now)) => now.try_into().unwrap(),
        other => panic!("{other:?}"),
    }
}

/// `systemctl reload` waits for READY=1: it comes though one network cannot be up, and that one answers as well.
#[test]
fn a_reload_ends_though_a_network_is_not_up() {
    if !require_etcd("a_reload_ends_though_a_network_is_not_up") {
        return;
    }
    let (mut overlay, manager, _) = two_networks("reloadnets");
    wait_networks(&mut overlay, &["blue", "green"]);
    let reload = |overlay: &mut Overlay| {
        let before = (manager.count("RELOADING=1"), manager.count("READY=1"));
        overlay.daemon(1).signal(Signal::SIGHUP).unwrap();
        let took = wait_for("the reload ends", within(Duration::from_secs(4)), || {
            (manager.count("RELOADING=1"), manager.count("READY=1")) == (before.0 + 1, before.1 + 1)
        });
        figure("READY after SIGHUP after", took);
    };
    reload(&mut overlay);
    // One that wants blue's port: it is tried again and again.
    overlay.put(
        "red/config",
        r#"{"Network":"10.246.0.0/16","Backend":{"Type":"udp","Port":8285}}"#,
    );
    wait_for("it is refused", READY, || {
        overlay.log(1).contains("both use UDP port 8285")
    });
    reload(&mut overlay);
    assert!(
        !overlay.log(1).contains("the reload was refused"),
        "{}",
        overlay.log(1)
    );
    assert_eq!(overlay.log(1).matches(" reloaded").count(), 2);
}

/// A successor may wait for its store for as long as it likes; the daemon that waits for it is alive meanwhile, and hears SIGTERM.
#[test]
fn a_daemon_that_waits_for_its_successor_feeds_the_watchdog() {
    if !require_root("a_daemon_that_waits_for_its_successor_feeds_the_watchdog") {
        return;
    }
    let mut overlay = Blueprint::embedded("keptdog", 1).start();
    overlay.terminate(1);
    let manager = Manager::listen(&overlay);
    overlay.nodes[0].child = manager.start(&mut overlay, 1, &[]);
    manager.wait_for("READY=1");
    let mut successor = UnixStream::connect(overlay.file("1.sock.takeover")).unwrap();
    successor.write_all(b"{\"take\":[1]}\n").unwrap();
    let mut answer = [0; 64];
    let len = successor.read(&mut answer).unwrap();
    assert!(answer[..len].starts_with(b"{\"give\":1,"), "{answer:?}");
    let before = manager.count("WATCHDOG=1");
    // Thrice in 0.6 s.
    wait_for("it is fed", within(Duration::from_secs(5)), || {
        manager.count("WATCHDOG=1") >= before + 6
    });
    assert!(overlay.daemon(1).is_running());
    overlay.terminate(1);
}
