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

use kersey::host::sandbox::{self, Part, Plan, Role};

/// Set to the role in the process that tries; `FOLDER` to where it may write.
const ROLE: &str = "KERSEY_TEST_SANDBOX_ROLE";
const FOLDER: &str = "KERSEY_TEST_SANDBOX_FOLDER";

#[test]
fn nothing_breaks_out_of_the_sandbox() {
    if let (Ok(role), Ok(folder)) = (std::env::var(ROLE), std::env::var(FOLDER)) {
        try_everything(&role, Path::new(&folder));
        return;
    }
    for role in ["process", "queue", "sids"] {
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
            "kill",
            "io_uring",
            "code in memory",
        ] {
            assert_eq!(tried[escape], libc::EPERM, "{role}: {escape}");
        }
        for file in ["read shadow", "write outside", "list home"] {
            let refused = tried[file];
            assert!(
                [libc::EPERM, libc::EACCES].contains(&refused),
                "{role}: {file}: {refused}"
            );
        }
        // The same in a thread that moves packets is refused for good.
        let inside = if role == "process" { 0 } else { libc::EPERM };
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
    plan.write(folder);
    sandbox::enter(&plan).unwrap();
    match role {
        "queue" => sandbox::enter_thread(Role::Queue).unwrap(),
        "sids" => sandbox::enter_thread(Role::Sids).unwrap(),
        _ => {}
    }
    let io = |result: std::io::Result<()>| result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1));
    let errno = |result: nix::Result<()>| result.err().map_or(0, |error| error as i32);
    let attempts = [
        ("execve", io(Err(Command::new("/bin/true").exec()))),
        ("fork", io(Command::new("/bin/true").spawn().map(drop))),
        ("ptrace", raw(libc::SYS_ptrace, [0, 0, 0])),
        ("bpf", raw(libc::SYS_bpf, [0, 0, 0])),
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
        ("module", raw(libc::SYS_finit_module, [-1, 0, 0])),
        (
            "unshare",
            errno(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)),
        ),
        (
            "packet socket",
            raw(
                libc::SYS_socket,
                [libc::AF_PACKET.into(), libc::SOCK_DGRAM.into(), 0],
            ),
        ),
        ("kill", raw(libc::SYS_kill, [1, 0, 0])),
        ("io_uring", raw(libc::SYS_io_uring_setup, [1, 0, 0])),
        ("code in memory", executable_memory()),
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
            raw(
                libc::SYS_socket,
                [libc::AF_INET.into(), libc::SOCK_DGRAM.into(), 0],
            ),
        ),
    ];
    // The harness has begun a line.
    println!();
    for (what, number) in attempts {
        println!("tried {what}={number}");
    }
}

/// Makes a system call by number; gives 0 or the error's number.
#[expect(
    unsafe_code,
    reason = "what a safe wrapper would not let through is what is tried"
)]
fn raw(number: libc::c_long, args: [i64; 3]) -> i32 {
    // SAFETY: none of the calls tried reads or writes memory by these arguments, which are numbers or null.
    let result = unsafe { libc::syscall(number, args[0], args[1], args[2], 0, 0, 0) };
    if result < 0 {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(-1)
    } else {
        0
    }
}

/// Maps memory that can be written and executed.
#[expect(unsafe_code, reason = "as above")]
fn executable_memory() -> i32 {
    // SAFETY: a new anonymous mapping touches no memory of ours.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        std::io::Error::last_os_error().raw_os_error().unwrap_or(-1)
    } else {
        0
    }
}
