//! Users and capabilities.

use std::io;

use caps::securebits::set_keepcaps;
use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{setgroups, setresgid, setresuid};

use super::{Account, Kept, REFUSED, SandboxError};

/// What the daemon uses for as long as it lives. CAP_NET_RAW: ICMP errors to inner senders, and SRv6.
const NODE: [Capability; 2] = [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW];
/// What it uses that listens on a port below 1024, whenever that comes free.
const NODE_ON_LOW_PORTS: [Capability; 3] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_NET_BIND_SERVICE,
];

impl Kept {
    fn capabilities(self) -> &'static [Capability] {
        match self {
            Self::Node => &NODE,
            Self::NodeOnLowPorts => &NODE_ON_LOW_PORTS,
            Self::None => &[],
        }
    }
}

fn failed(doing: &'static str) -> impl Fn(caps::errors::CapsError) -> SandboxError {
    move |error| SandboxError::new(doing, io::Error::other(error))
}

/// Becomes another user, if one is given, and drops all capabilities but those that are kept; gives which it has after that, if it
/// was asked to drop any.
pub(super) fn reduce(
    account: Option<Account>,
    asked: bool,
    keep: Kept,
) -> Result<Option<String>, SandboxError> {
    let keep = keep.capabilities();
    let held = caps::read(None, CapSet::Permitted).map_err(failed("read the capabilities"))?;
    let kept: CapsHashSet = keep.iter().copied().filter(|cap| held.contains(cap)).collect();
    if asked && held.contains(&Capability::CAP_SETPCAP) {
        for cap in caps::all() {
            // One that the kernel does not know is not held either.
            if !keep.contains(&cap) && caps::has_cap(None, CapSet::Bounding, cap).unwrap_or(false) {
                caps::drop(None, CapSet::Bounding, cap).map_err(failed("reduce the bounding set"))?;
            }
        }
    }
    if let Some(Account { uid, gid }) = account {
        set_keepcaps(true).map_err(failed("keep capabilities across a change of user"))?;
        let refused =
            |error: nix::errno::Errno| SandboxError::new(format!("become user {uid}, group {gid}"), error);
        setgroups(&[gid]).map_err(refused)?;
        setresgid(gid, gid, gid).map_err(refused)?;
        setresuid(uid, uid, uid).map_err(refused)?;
        set_keepcaps(false).map_err(failed("end keeping capabilities"))?;
    }
    if !asked && account.is_none() {
        return Ok(None);
    }
    // Ambient capabilities are for programs to be executed, and there are none.
    let _ = caps::clear(None, CapSet::Ambient);
    let dropped = caps::clear(None, CapSet::Inheritable)
        // Effective first: it may hold no more than what is permitted.
        .and_then(|()| caps::set(None, CapSet::Effective, &kept))
        .and_then(|()| caps::set(None, CapSet::Permitted, &kept));
    match dropped {
        Ok(()) => {}
        // A filter of system calls around us may know no capset. A user who was asked for must not keep more than that, though.
        Err(error) if account.is_none() => {
            tracing::debug!(%error, "capabilities cannot be dropped");
            return Ok(asked.then(|| REFUSED.to_owned()));
        }
        Err(error) => return Err(failed("drop capabilities")(error)),
    }
    let mut names: Vec<_> = kept.iter().map(ToString::to_string).collect();
    names.sort();
    Ok(asked.then(|| {
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(" ")
        }
    }))
}

/// Whether this thread has CAP_NET_ADMIN.
pub fn may_change_network() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false)
}

/// Drops all capabilities but those the daemon uses, and hands these on to programs.
pub(super) fn hand_on() -> Result<(), SandboxError> {
    reduce(None, true, Kept::Node)?;
    let kept = caps::read(None, CapSet::Permitted).map_err(failed("read the capabilities"))?;
    caps::set(None, CapSet::Inheritable, &kept).map_err(failed("hand capabilities on"))?;
    // Root needs none, and an old kernel has none.
    let _ = caps::set(None, CapSet::Ambient, &kept);
    Ok(())
}

/// Drops all capabilities of this thread.
pub(super) fn give_up_all() -> Result<(), SandboxError> {
    for set in [CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(failed("drop a thread's capabilities"))?;
    }
    Ok(())
}
