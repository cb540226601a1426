//! What a node is known by for as long as it lives: its Ethernet address inside the overlay.
//!
//! Peers send to the address in our lease. Were it new at each start, frames on their way would be lost until every peer has
//! seen the new lease; so it is made once, at random, and kept in the data directory.

use std::path::Path;

use crate::addr::MacAddr;
use crate::control::state_file;

/// The file in the data directory.
const FILE: &str = "vtep-mac";
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
