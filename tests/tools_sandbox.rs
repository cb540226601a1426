//! What the process that runs firewall tools may still touch.
//!
//! The test starts itself anew: the sandbox is entered for good.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and its child tells it what came of each attempt"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::Command;

use kersey::host::sandbox::{self, Part};

/// Set in the process that tries, to the name of a socket outside.
const INSIDE: &str = "KERSEY_TEST_TOOLS_SANDBOX";
const NAME: &str = "firewall_tools_write_their_lock_and_read_what_they_need";

#[test]
fn firewall_tools_write_their_lock_and_read_what_they_need() {
    if let Ok(name) = std::env::var(INSIDE) {
        try_everything(&name);
        return;
    }
    let name = format!("kersey-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&address).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, &name)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let tried: BTreeMap<&str, i32> = text
        .lines()
        .filter_map(|line| line.strip_prefix("tried ")?.split_once('='))
        .map(|(what, number)| (what, number.parse().unwrap()))
        .collect();
    for refused in [
        "make a file in /run",
        "list /run",
        "read shadow",
        "read passwd",
        "list etc",
        "read status of process 1",
        "write a switch",
        "reach a name without a file",
    ] {
        // Scopes, as of Linux 6.12, say EPERM.
        let expected = if refused.starts_with("reach") {
            libc::EPERM
        } else {
            libc::EACCES
        };
        assert_eq!(tried[refused], expected, "{refused}: {tried:?}");
    }
    for allowed in ["read protocols", "run a program"] {
        assert_eq!(tried[allowed], 0, "{allowed}: {tried:?}");
    }
    // Root alone can make the lock, and read which tables there are where the kernel has such.
    if nix::unistd::geteuid().is_root() {
        assert_eq!(tried["write the lock"], 0, "{tried:?}");
        assert!([0, libc::ENOENT].contains(&tried["read the tables"]), "{tried:?}");
    }
    assert!(!fs::exists("/run/kersey-test").unwrap());
}

fn try_everything(name: &str) {
    let address = SocketAddr::from_abstract_name(name).unwrap();
    sandbox::enter_for_tools(&Part::ALL).unwrap();
    let number = |result: io::Result<()>| result.err().map_or(0, |error| error.raw_os_error().unwrap_or(-1));
    let write = |path: &str| fs::OpenOptions::new().write(true).open(path).map(drop);
    let ran = Command::new("/bin/true")
        .status()
        .map(|status| assert!(status.success()));
    let attempts = [
        ("make a file in /run", fs::write("/run/kersey-test", "x")),
        ("list /run", fs::read_dir("/run").map(drop)),
        ("read shadow", fs::read("/etc/shadow").map(drop)),
        ("read passwd", fs::read("/etc/passwd").map(drop)),
        ("list etc", fs::read_dir("/etc").map(drop)),
        ("read status of process 1", fs::read("/proc/1/status").map(drop)),
        ("write a switch", write("/proc/sys/net/ipv4/ip_forward")),
        (
            "reach a name without a file",
            UnixStream::connect_addr(&address).map(drop),
        ),
        ("read protocols", fs::read("/etc/protocols").map(drop)),
        ("run a program", ran),
        ("write the lock", write("/run/xtables.lock")),
        ("read the tables", fs::read("/proc/net/ip_tables_names").map(drop)),
    ];
    // The harness has begun a line.
    println!();
    for (what, result) in attempts {
        println!("tried {what}={}", number(result));
    }
}
