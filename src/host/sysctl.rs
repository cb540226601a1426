//! Kernel switches under `/proc/sys/net`.
//!
//! The kernel resolves that folder to the namespace of the thread that opens it, so these act on the caller's.

use std::path::{Path, PathBuf};
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

/// How the kernel was made to pass IPv6 packets on between two links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding {
    /// It did already: this host is a router.
    Global,
    /// On packets that come in by the two alone (`force_forwarding`, Linux 6.17).
    PerLink,
    /// Between all links: this host has become a router.
    MadeGlobal,
}

/// Has the kernel pass IPv6 packets on that come in by `links`, be it by making this host a router.
///
/// A router takes no router advertisements, and forgets the default routes it has from them. So links that take them now are told to go on
/// (`accept_ra` = 2) first.
///
/// # Errors
/// A switch cannot be written.
pub fn forward_ipv6(links: [&str; 2]) -> Result<Forwarding, SysctlError> {
    if is("ipv6/conf/all/forwarding", "1") {
        return Ok(Forwarding::Global);
    }
    let keys = links.map(|link| format!("ipv6/conf/{link}/force_forwarding"));
    if keys.iter().all(|key| Path::new(ROOT).join(key).exists()) {
        keys.iter().try_for_each(|key| ensure(key, "1"))?;
        return Ok(Forwarding::PerLink);
    }
    make_router()?;
    Ok(Forwarding::MadeGlobal)
}

/// Turns forwarding between all links on, and keeps what router advertisements say.
///
/// # Errors
/// A switch cannot be written.
pub fn make_router() -> Result<(), SysctlError> {
    let links = fs::read_dir(Path::new(ROOT).join("ipv6/conf"));
    for link in links.into_iter().flatten().flatten() {
        let key = format!("ipv6/conf/{}/accept_ra", link.file_name().to_string_lossy());
        // `default` too: links to come.
        if is(&key, "1") {
            set(&key, "2")?;
        }
    }
    set("ipv6/conf/all/forwarding", "1")
}

/// As [`set`], where writing what is there already may be refused: in containers these switches are often read-only.
fn ensure(key: &str, value: &str) -> Result<(), SysctlError> {
    if is(key, value) { Ok(()) } else { set(key, value) }
}

/// Whether a switch has that value.
fn is(key: &str, value: &str) -> bool {
    fs::read_to_string(Path::new(ROOT).join(key)).is_ok_and(|held| held.trim() == value)
}

/// Where the kernel shows its switches.
const ROOT: &str = "/proc/sys/net";

/// Writes `value` to `/proc/sys/net/<key>`; `key` is a path, as interface names may hold dots.
///
/// # Errors
/// The switch does not exist in this kernel, or we may not write it.
pub fn set(key: &str, value: &str) -> Result<(), SysctlError> {
    let path = Path::new(ROOT).join(key);
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

/// Keeps the kernel from believing routers and redirects that it hears of on `link`, a device of ours: behind it are other nodes and their
/// pods, and no router.
///
/// A kernel without IPv6 has no such switches and needs none, which counts as success.
///
/// # Errors
/// A switch exists but cannot be written.
pub fn believe_nobody(link: &str) -> Result<(), SysctlError> {
    ["accept_ra", "accept_redirects", "autoconf"]
        .iter()
        .try_for_each(|switch| present(set(&format!("ipv6/conf/{link}/{switch}"), "0")))
}

/// Turns IPv6 on on `link`, where the host has it off by default.
///
/// # Errors
/// The switch does not exist, for this kernel has no IPv6, or cannot be written.
pub fn enable_ipv6(link: &str) -> Result<(), SysctlError> {
    ensure(&format!("ipv6/conf/{link}/disable_ipv6"), "0")
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
    let is_on = |conf: &str| is(&format!("ipv6/conf/{conf}/seg6_enabled"), "1");
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
