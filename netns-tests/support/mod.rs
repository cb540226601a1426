//! What every test in real namespaces needs.

#[allow(dead_code, reason = "not every test binary has etcd")]
#[path = "../../tests/etcd_server/login.rs"]
pub(crate) mod login;
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not every test binary has daemons; a test says what went wrong by panicking"
)]
pub(crate) mod nobody;
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not every test binary has containers; a test says what went wrong by panicking"
)]
pub(crate) mod pod;
#[allow(
    dead_code,
    clippy::unwrap_used,
    reason = "not every test binary listens in; a test says what went wrong by panicking"
)]
pub(crate) mod sniffer;

use nix::unistd::Uid;

/// Whether this process may make namespaces.
///
/// Says so in one line if not, for the test to return; under `CI=true` that is a failure, as nobody reads skips there.
///
/// # Panics
/// Under `CI=true`, if we are not root.
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
pub(crate) fn require_root(test: &str) -> bool {
    if Uid::effective().is_root() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs root, and CI must run it"
    );
    eprintln!("skipped: {test} needs root to make network namespaces");
    false
}

/// Whether this process may make namespaces and has nft and iptables for them; as [`require_root`].
#[allow(dead_code, reason = "not every test binary has to do with firewalls")]
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
pub(crate) fn require_firewall(test: &str) -> bool {
    if !require_root(test) {
        return false;
    }
    let tools = ["nft", "iptables-nft", "iptables-legacy"];
    let missing = tools.iter().find(|tool| {
        let found = std::process::Command::new(tool).arg("--version").output();
        found.is_err()
    });
    let Some(missing) = missing else {
        return true;
    };
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs {missing}, and CI must run it"
    );
    eprintln!("skipped: {test} needs {missing} (apt-get install nftables iptables)");
    false
}

/// Whether this process may make namespaces and has an etcd to run in them; as [`require_root`].
///
/// # Panics
/// Under `CI=true`, if it is not so.
#[allow(dead_code, reason = "not every test binary needs etcd")]
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
pub(crate) fn require_etcd(test: &str) -> bool {
    if !require_root(test) {
        return false;
    }
    let found = std::process::Command::new("etcd").arg("--version").output();
    if found.is_ok() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs etcd, and CI must run it"
    );
    eprintln!("skipped: {test} needs etcd (apt-get install etcd-server)");
    false
}

/// Whether strace is there; as [`require_root`].
///
/// # Panics
/// Under `CI=true`, if it is not.
#[allow(dead_code, reason = "not every test binary traces")]
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
pub(crate) fn require_strace(test: &str) -> bool {
    let found = std::process::Command::new("strace").arg("--version").output();
    if found.is_ok() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "{test} needs strace, and CI must run it"
    );
    eprintln!("skipped: {test} needs strace (apt-get install strace)");
    false
}
