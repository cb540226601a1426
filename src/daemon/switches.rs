//! What srv6 switched on or off for the whole host, remembered so that `kersey cleanup` can put it back.
//!
//! [`host::sysctl`](crate::host::sysctl) says what it is about to set, and it is in the file before it is set: a daemon that is killed in
//! between has remembered one change too many, and undoing that changes nothing. Switches live as long as the kernel and the network
//! namespace do, so the file says which those were: after a reboot what it has is nobody's, whatever the switches are then.
//!
//! ```text
//!   --data-dir/switches.json
//!   {"boot":"1e6c…","namespace":4026531840,"switches":[{"key":"ipv6/conf/all/forwarding","before":"0","set":"1"}]}
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::control::{identity, state_file};
use crate::host::sysctl::Change;
use crate::options::NetworkChoice;

const FILE: &str = "switches.json";
/// A host with a thousand interfaces has a thousand switches of a hundred bytes.
const MAX_BYTES: u64 = 1024 * 1024;

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    boot: String,
    namespace: u64,
    switches: Vec<Change>,
}

impl Remembered {
    /// Of this boot and namespace, with nothing in it.
    fn here() -> Self {
        let boot = fs::read_to_string(identity::BOOT_ID).unwrap_or_default();
        Self {
            boot: boot.trim().to_owned(),
            namespace: fs::metadata("/proc/self/ns/net").map_or(0, |meta| meta.ino()),
            switches: Vec::new(),
        }
    }

    /// What the file has of this boot and namespace.
    fn read(file: &Path) -> io::Result<Self> {
        let here = Self::here();
        let text = match state_file::read(file, MAX_BYTES) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(here),
            Err(error) => return Err(error),
        };
        let held: Self = serde_json::from_str(&text)?;
        let is_ours = held.boot == here.boot && held.namespace == here.namespace;
        Ok(if is_ours { held } else { here })
    }

    /// Adds changes. What a switch was before the first of them counts, unless somebody set it in between.
    fn add(&mut self, changes: &[Change]) {
        for change in changes {
            self.switches.retain(|held| held.key != change.key);
            self.switches.push(change.clone());
        }
    }
}

/// Remembers changes that are about to be made.
pub(super) fn remember(data_dir: &Path, changes: &[Change]) {
    let file = data_dir.join(FILE);
    let written = Remembered::read(&file).and_then(|mut held| {
        held.add(changes);
        let text = serde_json::to_string(&held)?;
        state_file::replace(&file, &text, 0o600, 0o700)
    });
    if let Err(error) = written {
        let keys: Vec<_> = changes.iter().map(|change| change.key.as_str()).collect();
        tracing::warn!(
            %error,
            file = %file.display(),
            switches = keys.join(" "),
            "cannot remember what the host's switches were; `kersey cleanup` will not put them back"
        );
    }
}

/// A file and what it remembers.
#[derive(Debug)]
pub(crate) struct Remembrance {
    /// The file.
    pub(crate) file: PathBuf,
    /// Changes that still stand, in the order in which to undo them: the last made first.
    pub(crate) changes: Vec<Change>,
}

/// What daemons with this data directory have changed, of one network or of several.
///
/// # Errors
/// A file cannot be read, or has no sense.
pub(crate) fn remembered(data_dir: &Path) -> io::Result<Vec<Remembrance>> {
    let mut folders = vec![data_dir.to_owned()];
    if let Ok(networks) = fs::read_dir(data_dir.join(NetworkChoice::STATE)) {
        folders.extend(networks.flatten().map(|network| network.path()));
    }
    let mut found = Vec::new();
    for file in folders.into_iter().map(|folder| folder.join(FILE)) {
        if !file.exists() {
            continue;
        }
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
        let held = Remembered::read(&file).map_err(named)?;
        let changes = held.switches.into_iter().rev().filter(Change::stands).collect();
        found.push(Remembrance { file, changes });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(key: &str, before: &str, set: &str) -> Change {
        Change {
            key: key.to_owned(),
            before: before.to_owned(),
            set: set.to_owned(),
            others: Vec::new(),
        }
    }

    #[test]
    fn changes_are_remembered_by_switch_and_the_latest_first() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        remember(dir.path(), &[change("a", "1", "2"), change("b", "0", "1")]);
        remember(dir.path(), &[change("a", "3", "2")]);
        let held = Remembered::read(&file).unwrap();
        assert_eq!(held.switches, [change("b", "0", "1"), change("a", "3", "2")]);
        // None of these is a switch of the kernel's.
        let found = remembered(dir.path()).unwrap();
        assert_eq!((found.len(), found[0].changes.len()), (1, 0));
    }

    #[test]
    fn what_is_of_another_boot_or_namespace_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        remember(dir.path(), &[change("a", "1", "2")]);
        let text = fs::read_to_string(&file).unwrap();
        let boot = Remembered::here().boot;
        for old in [
            text.replace(&boot, "another"),
            text.replace("\"namespace\":", "\"namespace\":1"),
        ] {
            assert_ne!(old, text);
            fs::write(&file, &old).unwrap();
            assert_eq!(Remembered::read(&file).unwrap().switches, []);
        }
        fs::write(&file, "junk").unwrap();
        assert!(remembered(dir.path()).unwrap_err().to_string().contains(FILE));
        remember(dir.path(), &[change("a", "1", "2")]);
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            "junk",
            "it is told, and left to be looked at"
        );
    }
}
