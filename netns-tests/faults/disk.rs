//! F17: the disk is full. Packets flow, what was written stays, and all is well again once there is room.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, DEVICE, Overlay, READY, figure, wait_for, within};
use crate::{assert_gap, assert_untouched, flows, probe, require_root, warm};

/// What is on the disk.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Files {
    /// The data directory.
    Data,
    /// The subnet file as well.
    All,
}

/// A disk of a daemon's own, which nobody else sees but through the daemon.
struct Disk {
    /// As seen from outside.
    root: PathBuf,
}

impl Disk {
    /// Starts node `nth` again with files of its on a disk of `size`.
    fn under(overlay: &mut Overlay, nth: usize, files: Files, size: &str) -> Self {
        let folder = overlay.file(&format!("disk-{nth}"));
        fs::create_dir(&folder).unwrap();
        if overlay.daemon(nth).is_running() {
            overlay.terminate(nth);
        }
        let plain = overlay.command(nth);
        let mut command = Command::new("unshare");
        let mount = format!(
            "mount -t tmpfs -o size={size} none {}; exec \"$@\"",
            folder.display()
        );
        command.args(["--mount", "sh", "-ec", &mount, "sh"]);
        command.arg(plain.get_program()).args(plain.get_args());
        if files == Files::All {
            command.arg("--subnet-file").arg(folder.join("subnet.env"));
        }
        command.arg("--data-dir").arg(folder.join("data"));
        overlay.nodes[nth - 1].child = overlay.run(&format!("node {nth}, on a disk of {size}"), nth, command);
        let pid = overlay.daemon(nth).pid();
        let inside = folder.strip_prefix("/").unwrap().to_owned();
        Self {
            root: PathBuf::from(format!("/proc/{pid}/root")).join(inside),
        }
    }

    fn fill(&self) {
        let full = fs::write(self.root.join("ballast"), vec![0; 64 << 20]).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(nix::libc::ENOSPC), "{full}");
    }

    fn empty(&self) {
        fs::remove_file(self.root.join("ballast")).unwrap();
    }

    fn subnet_env(&self) -> String {
        fs::read_to_string(self.root.join("subnet.env")).unwrap()
    }
}

#[test]
fn f17_a_full_disk_leaves_subnet_env_as_it_was_and_heals() {
    if !require_root("f17_a_full_disk_leaves_subnet_env_as_it_was_and_heals") {
        return;
    }
    let mut overlay = Blueprint::embedded("full", 2).start();
    let disk = Disk::under(&mut overlay, 2, Files::All, "1m");
    overlay.wait_all();
    let before = disk.subnet_env();
    disk.fill();
    let probe = probe(&overlay, 1, 2);
    // The device is made anew, and then the file is written.
    overlay
        .namespace(2)
        .netlink(async |netlink| Ok(netlink.delete_link(netlink.link(DEVICE).await?.index).await?))
        .unwrap();
    wait_for("it is told", READY, || {
        overlay.log(2).contains("cannot write the subnet file")
    });
    flows(&probe);
    assert_gap(&probe.stop().unwrap(), within(Duration::from_secs(1)));
    assert_eq!(disk.subnet_env(), before);
    let names = fs::read_dir(&disk.root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(names.count(), 3, "something half written lies about");
    assert!(overlay.daemon(2).is_running() && !overlay.status(2).ready);
    disk.empty();
    let healed = wait_for("it is ready again", within(Duration::from_secs(3)), || {
        overlay.status(2).ready
    });
    figure("ready after there is room", healed);
    assert_eq!(disk.subnet_env(), before);
    assert_eq!(
        overlay.log(2).matches("cannot write the subnet file").count(),
        1,
        "{}",
        overlay.log(2)
    );
    overlay.ping_all();
}

#[test]
fn f17_a_store_on_a_full_disk_goes_on_with_what_it_has() {
    if !require_root("f17_a_store_on_a_full_disk_goes_on_with_what_it_has") {
        return;
    }
    let mut overlay = Blueprint::embedded("fullstore", 2).start();
    let disk = Disk::under(&mut overlay, 1, Files::Data, "8m");
    overlay.wait(1, READY, |status| status.ready);
    // A store that begins anew knows nobody: node 2 comes to it by itself.
    overlay.wait_all();
    let subnet = overlay.subnet(2);
    let cache = overlay.file("2.data").join("control.json");
    wait_for("node 2 has written what it knows", READY, || {
        fs::read_to_string(&cache).is_ok_and(|text| text.contains("192.0.2.1"))
    });
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let untouched = probe(&overlay, 1, 2);
    disk.fill();
    // Somebody who comes back asks for a lease: whatever the store says to that, it stays the same.
    overlay.kill(2);
    overlay.restart(2);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    flows(&untouched);
    assert_gap(&untouched.stop().unwrap(), within(Duration::from_secs(4)));
    let quiet = probe(&overlay, 1, 2);
    assert_eq!(overlay.subnet(2), subnet);
    assert!(overlay.daemon(1).is_running() && overlay.status(1).ready);
    figure("on a full disk node 2 hears", overlay.status(2).store.error);
    disk.empty();
    overlay.wait(2, within(Duration::from_secs(5)), |status| status.store.connected);
    assert_eq!(overlay.subnet(2), subnet);
    flows(&quiet);
    assert_untouched(&quiet.stop().unwrap());
    oracle.check(&mut overlay, 2);
}
