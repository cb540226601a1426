//! What a node is known by for as long as it lives: its Ethernet address inside the overlay, and a number of its own.
//!
//! Peers send to the address in our lease. Were it new at each start, frames on their way would be lost until every peer has
//! seen the new lease; so it is made once, at random, and kept in the data directory.
//!
//! The number, kept beside it, is what tells two hosts apart that have one public address by mistake ([`Holder`]).

use std::path::Path;

use crate::addr::MacAddr;
use crate::control::state_file;

/// The file in the data directory.
const FILE: &str = "vtep-mac";
/// Where the kernel tells the number of this boot.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The file with the number.
const ID_FILE: &str = "node-id";
/// An address in text takes 17 bytes; a line end may follow.
const MAX_BYTES: u64 = 64;

/// This node's Ethernet address: the one kept in `data_dir`, or a new one that is kept from now on.
pub fn mac(data_dir: &Path) -> MacAddr {
    let path = data_dir.join(FILE);
    match state_file::read(&path, MAX_BYTES) {
        Ok(text) => match text.trim().parse::<MacAddr>() {
            Ok(mac) if mac.is_unicast() => return mac,
            Ok(_) | Err(_) => {
                let text = text.trim();
                tracing::warn!(file = %path.display(), text, "no Ethernet address of one station; making a new one");
            }
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(%error, file = %path.display(), "cannot read the node's Ethernet address; making a new one");
        }
    }
    let mac = MacAddr::local(rand::random());
    if let Err(error) = state_file::replace(&path, &format!("{mac}\n"), 0o600, 0o700) {
        tracing::warn!(%error, file = %path.display(), "cannot keep the node's Ethernet address: the next start has a new one");
    }
    mac
}

/// Who holds an address: what tells two hosts apart that say they have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// A random number, made once a data directory.
    pub id: String,
    /// The host's name, for people.
    pub host: String,
    /// The kernel's number of this boot, empty if it cannot be read; with the name it shows a copy of a data directory.
    pub boot: String,
}

impl Holder {
    /// Whether `other` is another host. What is not known of either tells nothing.
    pub fn differs_from(&self, other: &Self) -> bool {
        let known = |one: &str, two: &str| !one.is_empty() && !two.is_empty();
        let same = |one: &str, two: &str| known(one, two) && one == two;
        let differ = |one: &str, two: &str| known(one, two) && one != two;
        if self.id == other.id {
            // A copy of a data directory on another machine.
            differ(&self.boot, &other.boot) && differ(&self.host, &other.host)
        } else {
            // Else a data directory that was lost, or a container made anew on this machine.
            !(same(&self.boot, &other.boot) && same(&self.host, &other.host))
        }
    }
}

/// This host, by the number kept in `data_dir`, or a new one that is kept from now on.
pub fn holder(data_dir: &Path) -> Holder {
    let path = data_dir.join(ID_FILE);
    let kept = state_file::read(&path, MAX_BYTES).ok();
    let kept = kept.map(|text| text.trim().to_owned());
    let id = match kept.filter(|id| id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())) {
        Some(id) => id,
        None => {
            let id = format!("{:032x}", rand::random::<u128>());
            if let Err(error) = state_file::replace(&path, &format!("{id}\n"), 0o600, 0o700) {
                tracing::warn!(%error, file = %path.display(), "cannot keep the node's number: the next start has a new one");
            }
            id
        }
    };
    let host = nix::sys::utsname::uname().map(|name| name.nodename().to_string_lossy().into_owned());
    let boot = std::fs::read_to_string(BOOT_ID);
    Holder {
        id,
        host: host.unwrap_or_default(),
        boot: boot.map(|text| text.trim().to_owned()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = mac(dir.path());
        assert!(first.is_unicast());
        assert_eq!(first.octets()[0] & 2, 2, "locally administered");
        assert_eq!(mac(dir.path()), first);
    }

    #[test]
    fn a_number_is_made_once_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let first = holder(dir.path());
        assert_eq!(
            (first.id.len(), first.host.is_empty(), first.boot.is_empty()),
            (32, false, false)
        );
        assert_eq!(holder(dir.path()), first);
        assert_ne!(holder(tempfile::tempdir().unwrap().path()).id, first.id);
        std::fs::write(dir.path().join(ID_FILE), "short").unwrap();
        let mended = holder(dir.path());
        assert_ne!(mended.id, first.id);
        assert_eq!(holder(dir.path()), mended);
    }

    #[test]
    fn a_host_is_known_by_its_id_and_a_clone_by_its_name_and_boot() {
        let holder = |id: &str, host: &str, boot: &str| Holder {
            id: id.to_owned(),
            host: host.to_owned(),
            boot: boot.to_owned(),
        };
        let found = holder("1", "a", "x");
        for (case, who, other) in [
            ("itself", holder("1", "a", "x"), false),
            ("itself, after a reboot", holder("1", "a", "y"), false),
            ("itself, renamed", holder("1", "b", "x"), false),
            ("a clone", holder("1", "b", "y"), true),
            ("another", holder("2", "b", "y"), true),
            ("another of the same name", holder("2", "a", "y"), true),
            (
                "a container made anew on the same host",
                holder("2", "a", "x"),
                false,
            ),
            ("another container on the same host", holder("2", "b", "x"), true),
            (
                "itself, unable to read what boot it is",
                holder("1", "b", ""),
                false,
            ),
            (
                "another, unable to read what boot it is",
                holder("2", "a", ""),
                true,
            ),
        ] {
            assert_eq!(found.differs_from(&who), other, "{case}");
            assert_eq!(who.differs_from(&found), other, "{case}, the other way round");
        }
    }

    #[test]
    fn what_is_no_address_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        for rotten in [
            "",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
            "hello",
            &"a".repeat(1000),
        ] {
            std::fs::write(dir.path().join(FILE), rotten).unwrap();
            let made = mac(dir.path());
            assert!(made.is_unicast(), "{rotten}");
            assert_eq!(mac(dir.path()), made, "{rotten}");
        }
    }

    #[test]
    fn a_place_that_keeps_nothing_still_gives_an_address() {
        assert!(mac(Path::new("/proc/no-such-place")).is_unicast());
    }
}
