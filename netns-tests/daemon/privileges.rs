//! What a running daemon may still do: S7, S8 and S14, read from outside.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::firewall::run;
use crate::overlay::{Blueprint, Daemon, Overlay, READY, wait_for};
use crate::support::nobody::{NOBODY, by_nobody, give, with_open_tun};
use crate::support::{require_etcd, require_firewall, require_root};

/// CAP_NET_ADMIN, and CAP_NET_RAW for ICMP errors and SRv6.
const NET: u64 = 1 << 12 | 1 << 13;
const NET_ADMIN: u64 = 1 << 12;
const NET_BIND_SERVICE: u64 = 1 << 10;

/// What the kernel says of each thread of a node's daemon: its name, and its fields.
fn threads(overlay: &mut Overlay, nth: usize) -> Vec<(String, BTreeMap<String, String>)> {
    let pid = overlay.daemon(nth).pid();
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut threads = Vec::new();
    for task in tasks {
        let Ok(text) = fs::read_to_string(task.unwrap().path().join("status")) else {
            continue;
        };
        let fields: BTreeMap<_, _> = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        threads.push((fields["Name"].clone(), fields));
    }
    assert!(threads.len() >= 2, "{threads:?}");
    threads
}

fn mask(fields: &BTreeMap<String, String>, set: &str) -> u64 {
    u64::from_str_radix(&fields[set], 16).unwrap()
}

/// Checks every thread: the mask the process keeps, nothing at all for those that move packets.
fn assert_confined(overlay: &mut Overlay, nth: usize, kept: u64, uid: u32) {
    let mut workers = 0;
    for (name, fields) in threads(overlay, nth) {
        let moves_packets = ["queue-", "outbound-", "inbound-", "endpoint"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        workers += usize::from(moves_packets);
        let expected = if moves_packets { 0 } else { kept };
        for set in ["CapEff", "CapPrm"] {
            assert_eq!(mask(&fields, set), expected, "{name}: {set}");
        }
        assert_eq!(mask(&fields, "CapBnd"), kept, "{name}: {}", fields["CapBnd"]);
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(mask(&fields, set), 0, "{name}: {set}");
        }
        assert_eq!(fields["NoNewPrivs"], "1", "{name}");
        assert_eq!(fields["Seccomp"], "2", "{name}");
        let uids: Vec<u32> = fields["Uid"]
            .split_whitespace()
            .map(|uid| uid.parse().unwrap())
            .collect();
        assert_eq!(uids, [uid; 4], "{name}");
    }
    assert!(workers >= 1, "no thread that moves packets was seen");
    let status = overlay.status(nth);
    for part in ["capabilities", "landlock", "seccomp"] {
        assert!(!status.sandbox[part].starts_with("off"), "{:?}", status.sandbox);
    }
    // Not dumpable: /proc/PID belongs to root whoever the process is.
    let pid = overlay.daemon(nth).pid();
    assert_eq!(fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid(), 0);
}

/// S7, S8: exact masks, for every thread, of all backends' threads.
#[test]
fn every_thread_keeps_what_it_needs_and_no_more() {
    if !require_root("every_thread_keeps_what_it_needs_and_no_more") {
        return;
    }
    for (kind, flags) in [("vxlan", "--threads=split"), ("srv6", "--threads=joined")] {
        let mut blueprint = Blueprint::embedded("confined", 2);
        blueprint.network = kersey::lab::cluster::ClusterPlan::network(kind, false);
        blueprint.flags = vec![flags.to_owned()];
        let mut overlay = blueprint.start();
        overlay.ping_all();
        for nth in 1..=2 {
            assert_confined(&mut overlay, nth, NET, 0);
        }
        assert_files(&overlay, 1, 0);
    }
}

/// What a flag names keeps its capability, for whoever has the port now may give it back; a low port in the network config is told of.
#[test]
fn ports_below_1024_are_listened_on_where_flags_name_them() {
    if !require_root("ports_below_1024_are_listened_on_where_flags_name_them") {
        return;
    }
    let mut blueprint = Blueprint::embedded("lowports", 2);
    blueprint.daemons = 1;
    blueprint.flags = [
        "--healthz-ip=127.0.0.1",
        "--healthz-port=101",
        "--listen=192.0.2.1:80",
    ]
    .map(str::to_owned)
    .to_vec();
    let mut overlay = blueprint.start();
    for addr in ["127.0.0.1:101", "192.0.2.1:80"] {
        wait_for("somebody listens", READY, || {
            let connected = overlay
                .namespace(1)
                .run(|| Ok(std::net::TcpStream::connect(addr).is_ok()));
            connected.unwrap()
        });
    }
    assert_confined(&mut overlay, 1, NET | NET_BIND_SERVICE, 0);

    let mut blueprint = Blueprint::embedded("lowport", 1);
    blueprint.network = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":500}}"#.to_owned();
    let mut overlay = blueprint.build();
    let command = overlay.command(1);
    overlay.adopt(1, command);
    wait_for("the remedy is told", READY, || {
        overlay
            .log(1)
            .contains("ports below 1024 take CAP_NET_BIND_SERVICE")
    });
    assert!(overlay.daemon(1).is_running());
}

/// S14: who may read and write what the daemon makes.
fn assert_files(overlay: &Overlay, nth: usize, uid: u32) {
    for (name, mode) in [
        (format!("{nth}.data"), 0o700),
        (format!("{nth}.data/lock"), 0o600),
        (format!("{nth}.env"), 0o644),
        (format!("{nth}.sock"), 0o660),
        (format!("{nth}.sock.takeover"), 0o600),
        (format!("{nth}.sock.lock"), 0o600),
    ] {
        let meta = fs::symlink_metadata(overlay.file(&name)).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, mode, "{name}");
        assert_eq!(meta.uid(), uid, "{name}");
    }
}

#[test]
fn another_user_runs_it_as_well() {
    if !require_root("another_user_runs_it_as_well") {
        return;
    }
    let mut blueprint = Blueprint::embedded("nobody", 2);
    blueprint.flags = vec!["--user=65534".to_owned()];
    let mut overlay = blueprint.build();
    // The folder of subnet file and socket, which an administrator would chown.
    give(&overlay.file("."));
    for nth in 1..=2 {
        let command = with_open_tun(&overlay.command(nth));
        let child = overlay.run(&format!("node {nth}"), nth, command);
        overlay.nodes.push(Daemon {
            child,
            pods: Vec::new(),
        });
    }
    overlay.wait_all();
    overlay.ping_all();
    assert_confined(&mut overlay, 2, NET, NOBODY);
    assert_files(&overlay, 2, NOBODY);
    // The device is made anew by the same user.
    overlay
        .namespace(2)
        .netlink(async |netlink| {
            let link = netlink.link(crate::overlay::DEVICE).await?;
            Ok(netlink.delete_link(link.index).await?)
        })
        .unwrap();
    wait_for("the device is back", READY, || overlay.device(2).is_some());
    overlay.wait_all();
    overlay.ping_all();
}

/// The daemon is nobody, the process that runs the tools stays who it was.
#[test]
fn another_users_firewall_rules_are_made_and_looked_after() {
    if !require_firewall("another_users_firewall_rules_are_made_and_looked_after") {
        return;
    }
    for tool in ["nft", "iptables"] {
        let mut blueprint = Blueprint::embedded("nobodyfw", 1);
        blueprint.flags = rules_by(tool);
        blueprint.flags.push("--user=65534".to_owned());
        let mut overlay = blueprint.build();
        give(&overlay.file("."));
        let command = with_open_tun(&overlay.command(1));
        overlay.adopt(1, command);
        assert_rules(&mut overlay, tool, tool);
        assert_confined(&mut overlay, 1, NET, NOBODY);
    }
}

/// As under the unit: nobody from the start, two capabilities, a read-only system, and the lock of iptables as `configs/tmpfiles.d` has it.
#[test]
fn the_units_user_has_firewall_rules_with_every_tool() {
    if !require_firewall("the_units_user_has_firewall_rules_with_every_tool") {
        return;
    }
    for (tool, list) in [
        ("nft", "nft"),
        ("iptables", "iptables"),
        ("iptables", "iptables-legacy"),
    ] {
        let mut overlay = unit(list, tool, "660");
        assert_rules(&mut overlay, tool, list);
    }
    // Without the lock the old iptables cannot be used: that is told, and the node is not ready.
    let mut overlay = unit("iptables-legacy", "iptables", "600");
    let status = overlay.wait(1, READY, |status| status.problem.is_some());
    assert!(!status.ready && status.firewall.contains("lock"), "{status:?}");
}

fn rules_by(tool: &str) -> Vec<String> {
    ["--ip-masq", "--iptables-resync=1", "--firewall", tool]
        .map(str::to_owned)
        .to_vec()
}

/// Starts a node with the restrictions of `configs/systemd/kersey.service` that a test can have.
fn unit(program: &str, tool: &str, lock_mode: &str) -> Overlay {
    let mut blueprint = Blueprint::embedded("unitfw", 1);
    blueprint.flags = rules_by(tool);
    let mut overlay = blueprint.build();
    give(&overlay.file("."));
    let kersey = overlay.command(1);
    let folder = overlay.file("");
    let alternatives = if program == "iptables-legacy" {
        "mount -t tmpfs none /etc/alternatives; for v in '' 6; do \
         ln -s /usr/sbin/ip${v}tables-legacy /etc/alternatives/ip${v}tables; \
         ln -s /usr/sbin/ip${v}tables-legacy-restore /etc/alternatives/ip${v}tables-restore; done;"
    } else {
        ""
    };
    let prepare = format!(
        "mount -t tmpfs none /dev/net; mknod -m 666 /dev/net/tun c 10 200; {alternatives} \
         mount --bind {folder} {folder}; \
         mount -t tmpfs none /run; touch /run/xtables.lock; chmod {lock_mode} /run/xtables.lock; \
         chgrp 65534 /run/xtables.lock; mount --bind /run/xtables.lock /run/xtables.lock; \
         mount -o remount,bind,ro /run; mount -o remount,bind,ro /; exec \"$@\"",
        folder = folder.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &prepare, "sh"]);
    command.args([
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--no-new-privs",
    ]);
    command.args([
        "--inh-caps=-all,+net_admin,+net_raw",
        "--ambient-caps=-all,+net_admin,+net_raw",
        "--bounding-set=-all,+net_admin,+net_raw",
    ]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    overlay.adopt(1, command);
    overlay
}

/// Rules are there, listed by `list`, and come back when they are flushed: by the process that the daemon started before it was confined.
fn assert_rules(overlay: &mut Overlay, tool: &str, list: &str) {
    let status = overlay.wait(1, READY, |status| status.ready || status.problem.is_some());
    assert_eq!(
        (status.ready, status.firewall.as_str()),
        (true, tool),
        "{list}: {status:?}"
    );
    let (show, flush) = match tool {
        "nft" => ("list ruleset", "flush ruleset"),
        _ => ("-t nat -S", "-t nat -F"),
    };
    let is_there = |overlay: &Overlay| run(overlay, 1, list, show).to_lowercase().contains("masquerade");
    assert!(is_there(overlay), "{list}");
    run(overlay, 1, list, flush);
    assert!(overlay.status(1).ready);
    wait_for("the rules are back", READY, || is_there(overlay));
}

#[test]
fn a_user_who_may_not_write_is_told_where() {
    if !require_root("a_user_who_may_not_write_is_told_where") {
        return;
    }
    for (user, said) in [
        ("65534", "may not write to"),
        ("no-such-user", "there is no user"),
    ] {
        let mut overlay = Blueprint::embedded("nowrite", 1).build();
        let mut command = overlay.command(1);
        command.arg("--user").arg(user);
        let mut child = overlay.run("node 1", 1, command);
        let ended = child.wait_end(READY).unwrap();
        assert_eq!(ended.code(), Some(3), "{}", child.log_end());
        assert!(child.log_end().contains(said), "{}", child.log_end());
    }
}

/// Whoever just types it as a user is told what it takes, with the status that says that trying again is of no use.
#[test]
fn a_user_without_any_rights_is_told_what_it_takes() {
    if !require_root("a_user_without_any_rights_is_told_what_it_takes") {
        return;
    }
    let mut overlay = Blueprint::embedded("norights", 1).build();
    let command = by_nobody(&overlay.command(1), "-all");
    let mut child = overlay.run("node 1", 1, command);
    let ended = child.wait_end(READY).unwrap();
    let log = child.log_end();
    assert_eq!(ended.code(), Some(3), "{log}");
    assert!(
        log.contains("CAP_NET_ADMIN and directories it may write to"),
        "{log}"
    );
}

/// S7: started without root, with nothing but CAP_NET_ADMIN.
#[test]
fn cap_net_admin_alone_is_enough() {
    if !require_etcd("cap_net_admin_alone_is_enough") {
        return;
    }
    let mut overlay = Blueprint::new("adminonly", 2).start();
    overlay.terminate(2);
    give(&overlay.file("."));
    let files = fs::read_dir(overlay.file("2.data")).unwrap();
    let files = files.map(|entry| entry.unwrap().path());
    for path in files.chain(["2.env", "2.data"].map(|name| overlay.file(name))) {
        give(&path);
    }
    let command = by_nobody(&overlay.command(2), "+net_admin");
    overlay.nodes[1].child = overlay.run("net_admin alone", 2, command);
    overlay.wait_all();
    overlay.ping_all();
    assert_confined(&mut overlay, 2, NET_ADMIN, NOBODY);
}

#[test]
fn each_part_can_be_switched_off() {
    if !require_root("each_part_can_be_switched_off") {
        return;
    }
    for (choice, off) in [
        ("off", vec!["capabilities", "landlock", "seccomp"]),
        ("seccomp", vec!["capabilities", "landlock"]),
        ("landlock", vec!["capabilities", "seccomp"]),
        ("capabilities", vec!["landlock", "seccomp"]),
    ] {
        let mut blueprint = Blueprint::embedded("parts", 1);
        blueprint.flags = vec![format!("--sandbox={choice}")];
        let mut overlay = blueprint.start();
        let status = overlay.status(1);
        for part in ["capabilities", "landlock", "seccomp"] {
            let forced = status.sandbox[part] == "off (forced)";
            assert_eq!(forced, off.contains(&part), "{choice}: {:?}", status.sandbox);
        }
        for (name, fields) in threads(&mut overlay, 1) {
            let filtered = fields["Seccomp"] == "2";
            assert_eq!(filtered, !off.contains(&"seccomp"), "{choice}: {name}");
            let all = mask(&fields, "CapBnd") & !NET != 0;
            assert_eq!(all, off.contains(&"capabilities"), "{choice}: {name}");
        }
    }
}

/// S14: a second daemon with a socket of its own, on the same state.
#[test]
fn a_second_daemon_on_the_same_data_directory_is_refused() {
    if !require_root("a_second_daemon_on_the_same_data_directory_is_refused") {
        return;
    }
    let mut overlay = Blueprint::embedded("samedata", 2).start();
    let mut command = overlay.command(2);
    command.arg("--status-socket").arg(overlay.file("other.sock"));
    let mut second = overlay.run("same data", 2, command);
    let ended = second.wait_end(READY).unwrap();
    assert_eq!(ended.code(), Some(7), "{}", second.log_end());
    assert!(
        second.log_end().contains("another daemon is running"),
        "{}",
        second.log_end()
    );
    overlay.ping_all();
    overlay.daemon(2).signal(Signal::SIGTERM).unwrap();
}
