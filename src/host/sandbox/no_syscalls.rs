//! Where no filter of system calls can be made: seccompiler knows no 32-bit machines.

use super::{Role, SandboxError, Sockets};
use crate::host::probe::Probed;

/// Says that there is none.
pub(super) fn filter_process(_: Sockets) -> Result<Probed, SandboxError> {
    Ok(Probed::Missing)
}

/// Nothing: a process without a filter has threads without one.
pub(super) fn filter_thread(_: Role) -> Result<(), SandboxError> {
    Ok(())
}
