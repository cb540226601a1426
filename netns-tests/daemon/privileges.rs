//! What a running daemon may still do: S7, S8 and S14, read from outside.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use nix::sys::signal::Signal;

use crate::overlay::{Blueprint, Daemon, Overlay, READY, wait_for};
use crate::support::{require_etcd, require_root};

/// CAP_NET_ADMIN, and CAP_NET_RAW for ICMP errors and SRv6.
const NET: u64 = 1 << 12 | 1 << 13;
const NET_ADMIN: u64 = 1 << 12;

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
        assert_eq!(mask(&fields, "CapBnd") & !NET, 0, "{name}: {}", fields["CapBnd"]);
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

/// The command where everybody may use `/dev/net/tun`, as udev has it on most machines.
pub(crate) fn with_open_tun(inner: &Command) -> Command {
    let prepare = "mount -t tmpfs none /dev/net; mknod -m 666 /dev/net/tun c 10 200";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{prepare}; exec \"$@\""), "sh"]);
    command.arg(inner.get_program()).args(inner.get_args());
    command
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
    nix::unistd::chown(&overlay.file("."), Some(65534.into()), Some(65534.into())).unwrap();
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
    assert_confined(&mut overlay, 2, NET, 65534);
    assert_files(&overlay, 2, 65534);
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

/// S7: started without root, with nothing but CAP_NET_ADMIN.
#[test]
fn cap_net_admin_alone_is_enough() {
    if !require_etcd("cap_net_admin_alone_is_enough") {
        return;
    }
    let mut overlay = Blueprint::new("adminonly", 2).start();
    overlay.terminate(2);
    nix::unistd::chown(&overlay.file("."), Some(65534.into()), Some(65534.into())).unwrap();
    let files = fs::read_dir(overlay.file("2.data")).unwrap();
    let files = files.map(|entry| entry.unwrap().path());
    for path in files.chain(["2.env", "2.data"].map(|name| overlay.file(name))) {
        nix::unistd::chown(&path, Some(65534.into()), Some(65534.into())).unwrap();
    }
    let kersey = overlay.command(2);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args([
        "--inh-caps=-all,+net_admin",
        "--ambient-caps=-all,+net_admin",
        "--bounding-set=-all,+net_admin",
    ]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let command = with_open_tun(&command);
    overlay.nodes[1].child = overlay.run("net_admin alone", 2, command);
    overlay.wait_all();
    overlay.ping_all();
    assert_confined(&mut overlay, 2, NET_ADMIN, 65534);
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
