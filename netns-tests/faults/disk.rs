//! F17: the disk is full, or turns read-only. Packets flow, what was written stays, and all is well again once it can be written.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
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
    /// Starts node `nth` again with files of its on a disk of `size` in memory.
    fn under(overlay: &mut Overlay, nth: usize, files: Files, size: &str) -> Self {
        Self::mounted(overlay, nth, files, &format!("-t tmpfs -o size={size} none"))
    }

    /// The same with `mount` saying what is mounted.
    fn mounted(overlay: &mut Overlay, nth: usize, files: Files, mount: &str) -> Self {
        let folder = overlay.file(&format!("disk-{nth}"));
        fs::create_dir_all(&folder).unwrap();
        if overlay.daemon(nth).is_running() {
            overlay.terminate(nth);
        }
        let plain = overlay.command(nth);
        let mut command = Command::new("unshare");
        // Whoever the daemon is, it may write there.
        let script = format!(
            "mount {mount} {folder}; chmod 1777 {folder} || true; exec \"$@\"",
            folder = folder.display()
        );
        command.args(["--mount", "sh", "-ec", &script, "sh"]);
        command.arg(plain.get_program()).args(plain.get_args());
        if files == Files::All {
            command.arg("--subnet-file").arg(folder.join("subnet.env"));
        }
        command.arg("--data-dir").arg(folder.join("data"));
        overlay.nodes[nth - 1].child = overlay.run(&format!("node {nth}, on {mount}"), nth, command);
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

    /// Has the kernel find an error in the file system.
    fn damage(&self, overlay: &mut Overlay, nth: usize) {
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", overlay.daemon(nth).pid())).unwrap();
        let device = mounts
            .lines()
            .find(|line| line.contains("disk-1 "))
            .and_then(|line| line.split(' ').next()?.strip_prefix("/dev/"))
            .unwrap();
        fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "a test").unwrap();
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
    if require_root("f17_a_store_on_a_full_disk_goes_on_with_what_it_has") {
        full_store("fullstore", |_| "-t tmpfs -o size=8m none".to_owned());
    }
}

/// The same on a file system that has a journal, and blocks kept back for root.
#[test]
fn f17_a_store_on_a_full_ext4_goes_on_with_what_it_has() {
    if require_loop("f17_a_store_on_a_full_ext4_goes_on_with_what_it_has") {
        full_store("fullext4", |overlay| {
            format!("-o loop {}", image(overlay).display())
        });
    }
}

/// Fills the disk that node 1's store is on; `mount` says which.
fn full_store(tag: &str, mount: impl FnOnce(&Overlay) -> String) {
    let mut overlay = Blueprint::embedded(tag, 2).start();
    let mount = mount(&overlay);
    let disk = Disk::mounted(&mut overlay, 1, Files::Data, &mount);
    overlay.wait(1, READY, |status| status.ready);
    // A store that begins anew knows nobody: node 2 comes to it by itself.
    overlay.wait_all();
    let subnet = overlay.subnet(2);
    wait_until_cached(&overlay);
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

/// A file system that finds itself damaged turns read-only under whoever has files open. It is checked and mounted again, as one does then.
#[test]
fn f17_a_disk_that_turns_read_only_costs_nothing_but_the_writes() {
    if !require_loop("f17_a_disk_that_turns_read_only_costs_nothing_but_the_writes") {
        return;
    }
    let mut overlay = Blueprint::embedded("readonly", 2).start();
    let image = image(&overlay);
    let loud = format!("-o loop,errors=remount-ro {}", image.display());
    let disk = Disk::mounted(&mut overlay, 1, Files::Data, &loud);
    overlay.wait(1, READY, |status| status.ready);
    overlay.wait_all();
    let (subnet, own) = (overlay.subnet(2), overlay.subnet(1));
    wait_until_cached(&overlay);
    warm(&overlay, 1, 2);
    let untouched = probe(&overlay, 1, 2);
    disk.damage(&mut overlay, 1);
    let refused = fs::write(disk.root.join("ballast"), "x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(nix::libc::EROFS), "{refused}");
    std::thread::sleep(Duration::from_secs(1));
    assert_untouched(&untouched.stop().unwrap());
    // Who comes back goes on with what it had; the store can tell it, and cannot write.
    overlay.kill(2);
    overlay.restart(2);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    assert_eq!(overlay.subnet(2), subnet);
    figure(
        "with a read-only disk node 2 hears",
        overlay.status(2).store.error,
    );
    assert!(overlay.daemon(1).is_running() && overlay.status(1).ready);
    overlay.ping_all();

    // What was there can still be read.
    let leases = overlay.hub().run(|| {
        let mut stream = TcpStream::connect("192.0.2.1:8888")?;
        stream.write_all(b"GET /v1/_/leases HTTP/1.1\r\nHost: 192.0.2.1\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    let leases = leases.unwrap();
    assert!(leases.starts_with("HTTP/1.1 200"), "{leases}");
    for subnet in [own, subnet] {
        assert!(leases.contains(&subnet.addr().to_string()), "{leases}");
    }

    // Mended, and mounted by somebody who does not trust it yet: no store can be opened there. It ends with the status for which a
    // supervisor tries again.
    overlay.terminate(1);
    let checked = Command::new("e2fsck").args(["-fy"]).arg(&image).output().unwrap();
    assert!(checked.status.code().is_some_and(|code| code <= 1), "{checked:?}");
    let timid = format!("-o loop,ro {}", image.display());
    Disk::mounted(&mut overlay, 1, Files::Data, &timid);
    let ended = overlay.daemon(1).wait_end(READY).unwrap();
    assert_eq!(ended.code(), Some(1), "{}", overlay.log(1));
    assert!(
        overlay.log(1).contains("leases.redb: Read-only file system"),
        "{}",
        overlay.log(1)
    );
    // Nothing that was acknowledged is lost.
    Disk::mounted(&mut overlay, 1, Files::Data, &loud);
    overlay.wait(1, READY, |status| status.ready && status.peers.len() == 1);
    overlay.wait(2, READY, |status| {
        status.store.connected && status.peers.len() == 1
    });
    assert_eq!((overlay.subnet(1), overlay.subnet(2)), (own, subnet));
    overlay.wait_all();
    overlay.ping_all();
}

/// Waits until node 2 has written down that it knows node 1.
fn wait_until_cached(overlay: &Overlay) {
    let cache = overlay.file("2.data").join("control.json");
    wait_for("node 2 has written what it knows", READY, || {
        fs::read_to_string(&cache).is_ok_and(|text| text.contains("192.0.2.1"))
    });
}

/// A file with an ext4 of eight MiB in it.
fn image(overlay: &Overlay) -> PathBuf {
    let image = overlay.file("disk.img");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&image)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    image
}

/// As [`require_root`], for a machine that can mount files.
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
fn require_loop(test: &str) -> bool {
    if !require_root(test) {
        return false;
    }
    let is_there = |mut command: Command| command.output().is_ok_and(|done| done.status.success());
    let mut free = Command::new("losetup");
    free.arg("--find");
    let mut make = Command::new("mkfs.ext4");
    make.arg("-V");
    if is_there(free) && is_there(make) {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs loop devices and mkfs.ext4, and CI must run it"
    );
    eprintln!("skipped: {test} needs loop devices and mkfs.ext4");
    false
}
