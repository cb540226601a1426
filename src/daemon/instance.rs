//! One daemon a data directory: a lock that ends with the process.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The file in the data directory.
const FILE: &str = "lock";

/// Another daemon has the data directory.
#[derive(Debug, thiserror::Error)]
#[error("another daemon is running: it holds {}", .0.display())]
pub(super) struct Held(PathBuf);

/// The lock, held until it is dropped.
#[derive(Debug)]
pub(super) struct Instance(
    #[expect(dead_code, reason = "the lock goes when the file is closed")] Option<File>,
);

impl Instance {
    /// Takes the lock. Where none can be had, as on a file system that is read-only, there is nothing to guard either.
    ///
    /// # Errors
    /// Another daemon holds it.
    pub(super) fn lock(data_dir: &Path) -> Result<Self, Held> {
        let path = data_dir.join(FILE);
        let made = std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(data_dir);
        let opened = made.and_then(|()| {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
                .open(&path)
        });
        let file = match opened {
            Ok(file) => file,
            Err(error) => {
                tracing::warn!(%error, file = %path.display(), "cannot lock the data directory");
                return Ok(Self(None));
            }
        };
        match file.try_lock() {
            Ok(()) => Ok(Self(Some(file))),
            Err(TryLockError::WouldBlock) => Err(Held(path)),
            Err(TryLockError::Error(error)) => {
                tracing::warn!(%error, file = %path.display(), "cannot lock the data directory");
                Ok(Self(None))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S14: a second daemon on the same state is refused.
    #[test]
    fn a_second_daemon_on_the_same_state_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let first = Instance::lock(&state).unwrap();
        let refused = Instance::lock(&state).unwrap_err().to_string();
        assert!(refused.contains("another daemon is running"), "{refused}");
        drop(first);
        Instance::lock(&state).unwrap();
    }

    #[test]
    fn a_link_in_place_of_the_lock_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join("victim");
        std::os::unix::fs::symlink(&victim, dir.path().join(FILE)).unwrap();
        Instance::lock(dir.path()).unwrap();
        assert!(!victim.exists());
    }
}
