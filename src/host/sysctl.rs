//! Kernel switches under `/proc/sys/net`.
//!
//! The kernel resolves that folder to the namespace of the thread that opens it, so these act on the caller's.
//!
//! Switches of a device of ours go with it. Those of the host are told to a [`Ledger`] before they are set, so that they can be
//! put back ([`Change::undo`]).

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

/// A switch could not be set.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {value:?} to {}", path.display())]
pub struct SysctlError {
    path: PathBuf,
    value: String,
    #[source]
    source: io::Error,
}

/// A switch of the host that was set, and what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Its path under `/proc/sys/net`.
    pub key: String,
    /// What it was.
    pub before: String,
    /// What it was set to.
    pub set: String,
    /// Switches that had the new value already: the kernel takes them along when this one is put back.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

/// Who remembers changes, told before they are made.
pub type Ledger<'a> = &'a mut dyn FnMut(&[Change]);

impl Change {
    fn of(key: &str, set: &str) -> Option<Self> {
        let before = get(key)?;
        (before != set).then(|| Self {
            key: key.to_owned(),
            before,
            set: set.to_owned(),
            others: Vec::new(),
        })
    }

    /// Whether the switch still is as it was set: else it is somebody else's by now, or its interface is gone.
    pub fn stands(&self) -> bool {
        is_plain(&self.key) && is(&self.key, &self.set)
    }

    /// Puts the switch back, if it still is as it was set.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn undo(&self) -> Result<(), SysctlError> {
        if !self.stands() {
            return Ok(());
        }
        let others = self
            .others
            .iter()
            .filter(|key| is_plain(key) && is(key, &self.set));
        let others: Vec<_> = others.collect();
        set(&self.key, &self.before)?;
        others
            .into_iter()
            .try_for_each(|key| present(set(key, &self.set)))
    }
}

/// Whether a key, which may come from a file, leads nowhere else.
fn is_plain(key: &str) -> bool {
    !key.starts_with('/') && key.split('/').all(|part| !part.is_empty() && part != "..")
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
pub fn forward_ipv6(links: [&str; 2], ledger: Ledger<'_>) -> Result<Forwarding, SysctlError> {
    if is(ROUTER, "1") {
        return Ok(Forwarding::Global);
    }
    let keys = links.map(|link| format!("ipv6/conf/{link}/force_forwarding"));
    if keys.iter().all(|key| Path::new(ROOT).join(key).exists()) {
        make(
            keys.iter().filter_map(|key| Change::of(key, "1")).collect(),
            ledger,
        )?;
        return Ok(Forwarding::PerLink);
    }
    make_router(ledger)?;
    Ok(Forwarding::MadeGlobal)
}

/// Turns forwarding between all links on, and keeps what router advertisements say.
///
/// # Errors
/// A switch cannot be written.
pub fn make_router(ledger: Ledger<'_>) -> Result<(), SysctlError> {
    let links = fs::read_dir(Path::new(ROOT).join("ipv6/conf"));
    let links = links.into_iter().flatten().flatten();
    // `default` is among them: links to come.
    let links: Vec<String> = links
        .map(|link| format!("ipv6/conf/{}", link.file_name().to_string_lossy()))
        .collect();
    let listening = links.iter().map(|link| format!("{link}/accept_ra"));
    let mut changes: Vec<Change> = listening
        .filter(|key| is(key, "1"))
        .filter_map(|key| Change::of(&key, "2"))
        .collect();
    // The kernel sets all links with this one, and sets all back with it.
    let forwarding = links.iter().map(|link| format!("{link}/forwarding"));
    let others = forwarding.filter(|key| is(key, "1")).collect();
    changes.extend(Change::of(ROUTER, "1").map(|change| Change { others, ..change }));
    make(changes, ledger)
}

/// Whether this host passes IPv6 packets on.
const ROUTER: &str = "ipv6/conf/all/forwarding";

/// Tells of changes, and makes them.
fn make(changes: Vec<Change>, ledger: Ledger<'_>) -> Result<(), SysctlError> {
    if !changes.is_empty() {
        ledger(&changes);
    }
    changes
        .iter()
        .try_for_each(|change| set(&change.key, &change.set))
}

/// As [`set`], where writing what is there already may be refused: in containers these switches are often read-only.
fn ensure(key: &str, value: &str) -> Result<(), SysctlError> {
    if is(key, value) { Ok(()) } else { set(key, value) }
}

/// Whether a switch has that value.
fn is(key: &str, value: &str) -> bool {
    get(key).is_some_and(|held| held == value)
}

/// A switch's value; `None` if there is no such switch.
fn get(key: &str) -> Option<String> {
    let held = fs::read_to_string(Path::new(ROOT).join(key)).ok()?;
    Some(held.trim().to_owned())
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
pub fn disable_seg6(link: &str, ledger: Ledger<'_>) -> Result<bool, SysctlError> {
    let is_on = |conf: &str| is(&format!("ipv6/conf/{conf}/seg6_enabled"), "1");
    // Both must be on for the kernel to look at one (net/ipv6/exthdrs.c).
    if !(is_on("all") && is_on(link)) {
        return Ok(false);
    }
    let change = Change::of(&format!("ipv6/conf/{link}/seg6_enabled"), "0");
    make(change.into_iter().collect(), ledger).map(|()| true)
}

fn present(result: Result<(), SysctlError>) -> Result<(), SysctlError> {
    match result {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_from_a_file_leads_nowhere_else() {
        let change = |key: &str| Change {
            key: key.to_owned(),
            before: "x".to_owned(),
            set: get("ipv4/ip_forward").unwrap_or_default(),
            others: Vec::new(),
        };
        assert!(change("ipv4/ip_forward").stands());
        for key in [
            "ipv4/../ipv4/ip_forward",
            "/proc/sys/net/ipv4/ip_forward",
            "ipv4//ip_forward",
            "",
        ] {
            assert!(!change(key).stands(), "{key}");
            assert!(change(key).undo().is_ok(), "nothing is done");
        }
    }
}
