//! S8: what a process in the sandbox tries in vain, and what it still can.
//!
//! The test starts itself anew for each role: the sandbox is entered for good.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and its child tells it what came of each attempt"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kersey::host::sandbox::{self, Escape, Part, Plan, Role};
use socket2::{Domain, Protocol, Socket, Type};

/// Set to the role in the process that tries; `FOLDER` to where it may write.
const ROLE: &str = "KERSEY_TEST_SANDBOX_ROLE";
const FOLDER: &str = "KERSEY_TEST_SANDBOX_FOLDER";

#[test]
fn nothing_breaks_out_of_the_sandbox() {
    if let (Ok(role), Ok(folder)) = (std::env::var(ROLE), std::env::var(FOLDER)) {
        try_everything(&role, Path::new(&folder));
        return;
    }
    for role in ["process", "server", "sender", "queue", "sids"] {
        let dir = tempfile::tempdir().unwrap();
        let tried = tried(role, dir.path());
        for escape in [
            "execve",
            "fork",
            "ptrace",
            "bpf",
            "mount",
            "module",
            "unshare",
            "packet socket",
            "packet socket that hears",
            "kill",
            "io_uring",
            "code in memory",
        ] {
            // A node that sends by packet sockets opens such as do nothing else; who is not root has none in any case.
            let is_open = (role, escape) == ("sender", "packet socket") && nix::unistd::geteuid().is_root();
            let expected = if is_open { 0 } else { libc::EPERM };
            assert_eq!(tried[escape], expected, "{role}: {escape}");
        }
        for file in ["read shadow", "write outside", "list home"] {
            let refused = tried[file];
            assert!(
                [libc::EPERM, libc::EACCES].contains(&refused),
                "{role}: {file}: {refused}"
            );
        }
        // The same in a thread that moves packets is refused for good.
        let inside = match role {
            "process" | "server" | "sender" => 0,
            _ => libc::EPERM,
        };
        for file in ["write inside", "thread", "udp socket"] {
            let expected = if role == "sids" && file == "udp socket" {
                0
            } else {
                inside
            };
            assert_eq!(tried[file], expected, "{role}: {file}");
        }
        assert!(!dir.path().with_extension("outside").exists());
    }
}

/// Starts this test anew in a role; gives what came of each attempt: 0, or the error's number.
fn tried(role: &str, folder: &Path) -> BTreeMap<String, i32> {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "nothing_breaks_out_of_the_sandbox", "--nocapture"])
        .args(["--test-threads", "1"])
        .env(ROLE, role)
        .env(FOLDER, folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{role}: {text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let tried = text.lines().filter_map(|line| {
        let (what, number) = line.strip_prefix("tried ")?.split_once('=')?;
        Some((what.to_owned(), number.parse().ok()?))
    });
    tried.collect()
}

fn try_everything(role: &str, folder: &Path) {
    let outside: PathBuf = folder.with_extension("outside");
    let mut plan = Plan::new(Part::ALL.into(), None);
    if role == "server" {
        plan = plan.without_capabilities();
    }
    if role == "sender" {
        plan.packet_sockets();
    }
    plan.write(folder);
    sandbox::enter(&plan).unwrap();
    match role {
        "queue" => sandbox::enter_thread(Role::Queue).unwrap(),
        "sids" => sandbox::enter_thread(Role::Sids).unwrap(),
        _ => {}
    }
    let io = |result: std::io::Result<()>| result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1));
    let attempt = |escape| io(sandbox::attempt(escape));
    let errno = |result: nix::Result<()>| result.err().map_or(0, |error| error as i32);
    // ETH_P_ALL, as the network has it.
    let everything = Protocol::from(i32::from(3_u16.to_be()));
    let attempts = [
        ("execve", io(Err(Command::new("/bin/true").exec()))),
        ("fork", io(Command::new("/bin/true").spawn().map(drop))),
        ("ptrace", attempt(Escape::Ptrace)),
        ("bpf", attempt(Escape::Bpf)),
        (
            "mount",
            errno(nix::mount::mount(
                Some("none"),
                folder,
                Some("tmpfs"),
                nix::mount::MsFlags::empty(),
                None::<&str>,
            )),
        ),
        ("module", attempt(Escape::Module)),
        (
            "unshare",
            errno(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)),
        ),
        (
            "packet socket",
            io(Socket::new(Domain::PACKET, Type::DGRAM, None).map(drop)),
        ),
        (
            "packet socket that hears",
            io(Socket::new(Domain::PACKET, Type::DGRAM, Some(everything)).map(drop)),
        ),
        (
            "kill",
            errno(nix::sys::signal::kill(nix::unistd::Pid::from_raw(1), None)),
        ),
        ("io_uring", attempt(Escape::IoUring)),
        ("code in memory", attempt(Escape::ExecutableMemory)),
        ("read shadow", io(fs::read("/etc/shadow").map(drop))),
        ("write outside", io(fs::write(&outside, "x"))),
        ("list home", io(fs::read_dir("/root").map(drop))),
        ("write inside", io(fs::write(folder.join("file"), "x"))),
        (
            "thread",
            io(std::thread::Builder::new()
                .spawn(|| ())
                .and_then(|thread| thread.join().map_err(|_| std::io::Error::other("panic")))),
        ),
        (
            "udp socket",
            io(Socket::new(Domain::IPV4, Type::DGRAM, None).map(drop)),
        ),
    ];
    // The harness has begun a line.
    println!();
    for (what, number) in attempts {
        println!("tried {what}={number}");
    }
}
