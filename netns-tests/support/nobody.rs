//! Daemons of another user, who has nothing but the capabilities he is given.

use std::path::Path;
use std::process::Command;

/// That user, and his group.
pub(crate) const NOBODY: u32 = 65534;

/// Whether all daemons are to run so: then `KERSEY_TEST_UNPRIVILEGED` is set.
pub(crate) fn unprivileged() -> bool {
    std::env::var_os("KERSEY_TEST_UNPRIVILEGED").is_some()
}

/// Gives a file or folder away, as an administrator would.
///
/// # Panics
/// If it is not there, or not ours to give.
pub(crate) fn give(path: &Path) {
    nix::unistd::chown(path, Some(NOBODY.into()), Some(NOBODY.into())).unwrap();
}

/// The command as that user, who has these capabilities (`+net_admin,+net_raw`) and can get no others.
pub(crate) fn by_nobody(inner: &Command, capabilities: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={NOBODY}"));
    command.arg(format!("--regid={NOBODY}"));
    command.arg("--clear-groups");
    for set in ["inh-caps", "ambient-caps", "bounding-set"] {
        command.arg(format!("--{set}=-all,{capabilities}"));
    }
    with_open_tun(&inside(command, inner))
}

/// Checks that a process is that user's, and has CAP_NET_ADMIN and nothing else.
///
/// # Panics
/// If it has another user, more, or less.
pub(crate) fn assert_net_admin_alone(pid: u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(field("Uid:"), NOBODY.to_string());
    for set in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(u64::from_str_radix(&field(set), 16), Ok(1 << 12), "{set}");
    }
}

/// The command where everybody may use `/dev/net/tun`, as udev has it on most machines.
pub(crate) fn with_open_tun(inner: &Command) -> Command {
    let prepare = "mount -t tmpfs none /dev/net; mknod -m 666 /dev/net/tun c 10 200";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{prepare}; exec \"$@\""), "sh"]);
    inside(command, inner)
}

/// `outer` with the words and the environment of `inner`.
fn inside(mut outer: Command, inner: &Command) -> Command {
    outer.arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}
