//! Kernel switches under `/proc/sys/net`.
//!
//! The kernel resolves that folder to the namespace of the thread that opens it, so these act on the caller's.

use std::path::PathBuf;
use std::{fs, io};

/// A switch could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {value:?} to {}", path.display())]
pub struct SysctlError {
    path: PathBuf,
    value: String,
    #[source]
    source: io::Error,
}

/// Writes `value` to `/proc/sys/net/<key>`; `key` is a path, as interface names may hold dots.
///
/// # Errors
/// The switch does not exist in this kernel, or we may not write it.
pub fn set(key: &str, value: &str) -> Result<(), SysctlError> {
    let path = PathBuf::from("/proc/sys/net").join(key);
    fs::write(&path, value).map_err(|source| SysctlError {
        path,
        value: value.to_owned(),
        source,
    })
}

/// Keeps the kernel from giving `link` a link-local IPv6 address of its own when it comes up.
///
/// A kernel without IPv6 has no such switch and needs none, which counts as success.
///
/// # Errors
/// The switch exists but cannot be written.
pub fn no_link_local_address(link: &str) -> Result<(), SysctlError> {
    // IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
    present(set(&format!("ipv6/conf/{link}/addr_gen_mode"), "1"))
}

/// Turns IPv6 off on `link`. A kernel without IPv6 counts as success.
///
/// # Errors
/// The switch exists but cannot be written.
pub fn disable_ipv6(link: &str) -> Result<(), SysctlError> {
    present(set(&format!("ipv6/conf/{link}/disable_ipv6"), "1"))
}

/// Turns the kernel's own processing of segment routing headers off on `link`; whether it was on. A kernel without it counts as off.
///
/// # Errors
/// The switch exists but cannot be written.
pub fn disable_seg6(link: &str) -> Result<bool, SysctlError> {
    let is_on = |conf: &str| {
        fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{conf}/seg6_enabled"))
            .is_ok_and(|value| value.trim() == "1")
    };
    // Both must be on for the kernel to look at one (net/ipv6/exthdrs.c).
    if !(is_on("all") && is_on(link)) {
        return Ok(false);
    }
    set(&format!("ipv6/conf/{link}/seg6_enabled"), "0").map(|()| true)
}

fn present(result: Result<(), SysctlError>) -> Result<(), SysctlError> {
    match result {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
