//! Landlock: which files can be reached.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};

use super::{REFUSED, SandboxError};
use crate::host::probe::Probed;

/// The newest set of rules known here; an older kernel enforces what it knows of them.
const NEWEST: ABI = ABI::V6;

/// Restricts this thread, and those it spawns, to the given paths; gives how much of that the kernel enforces. A path that is not there is
/// left out.
pub(super) fn restrict(
    reads: &BTreeSet<PathBuf>,
    writes: &BTreeSet<PathBuf>,
    devices: &BTreeSet<PathBuf>,
) -> Result<String, SandboxError> {
    let failed = |error: landlock::RulesetError| SandboxError::new("use Landlock", io::Error::other(error));
    let made = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.scope(scopes(std::env::var_os("NOTIFY_SOCKET").as_deref())))
        .and_then(Ruleset::create);
    let mut rules = match made {
        Ok(rules) => rules,
        // A filter of system calls around us, as old service managers and container runtimes have, knows nothing of Landlock.
        Err(error) => {
            tracing::debug!(%error, "Landlock is refused");
            return Ok(REFUSED.to_owned());
        }
    };
    let own = AccessFs::from_all(NEWEST)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let granted = reads
        .iter()
        .map(|path| (path, reading))
        .chain(writes.iter().map(|path| (path, own)))
        .chain(devices.iter().map(|path| (path, device)));
    for (path, access) in granted {
        let Some(rule) = rule(path, access) else { continue };
        rules = rules.add_rule(rule).map_err(failed)?;
    }
    let status = rules.restrict_self().map_err(failed)?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Probed::On.describe(),
        RulesetStatus::PartiallyEnforced => "on (in part: an older kernel)",
        RulesetStatus::NotEnforced => Probed::Missing.describe(),
    }
    .to_owned())
}

/// Restricts this thread, and those and programs it starts, to running what lies below `programs`, reading that and `reads`, and
/// writing the files `writes`.
pub(super) fn restrict_to_programs(
    programs: &[&str],
    reads: &[&str],
    writes: &[&str],
) -> Result<(), SandboxError> {
    let failed = |error: landlock::RulesetError| SandboxError::new("use Landlock", io::Error::other(error));
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|rules| rules.scope(scopes(None)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let writing = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let granted = programs
        .iter()
        .map(|path| (path, reading | AccessFs::Execute))
        .chain(reads.iter().map(|path| (path, reading)))
        .chain(writes.iter().map(|path| (path, writing)));
    for (path, access) in granted {
        let Some(rule) = rule(Path::new(path), access) else {
            continue;
        };
        rules = rules.add_rule(rule).map_err(failed)?;
    }
    rules.restrict_self().map(drop).map_err(failed)
}

/// What ends at the sandbox: signals to processes outside, and sockets of theirs that have a name without a file. A service manager that is
/// spoken to by such a name has to be reached, and with it all others.
fn scopes(notify_socket: Option<&OsStr>) -> BitFlags<Scope> {
    let is_abstract = notify_socket.is_some_and(|name| name.as_bytes().starts_with(b"@"));
    if is_abstract {
        Scope::Signal.into()
    } else {
        Scope::Signal | Scope::AbstractUnixSocket
    }
}

/// Access below a path; a file has no access of folders.
fn rule(path: &Path, access: BitFlags<AccessFs>) -> Option<PathBeneath<PathFd>> {
    let access = if path.is_dir() {
        access
    } else {
        access & AccessFs::from_file(NEWEST)
    };
    let opened = PathFd::new(path).ok()?;
    Some(PathBeneath::new(opened, access))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_files_end_at_the_sandbox_unless_the_service_manager_has_one() {
        for (notify_socket, closed) in [
            (None, true),
            (Some("/run/systemd/notify"), true),
            (Some("@/org/freedesktop/systemd1/notify"), false),
        ] {
            let scopes = scopes(notify_socket.map(OsStr::new));
            assert!(scopes.contains(Scope::Signal));
            assert_eq!(
                scopes.contains(Scope::AbstractUnixSocket),
                closed,
                "{notify_socket:?}"
            );
        }
    }
}
