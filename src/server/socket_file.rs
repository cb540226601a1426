//! A unix socket in the file system, made and removed with care.
//!
//! Start: whoever makes a socket, or removes what is left of one, first locks the file beside it (`PATH.lock`), which stays locked while the
//! socket is served: of two that start at once, one finds out before it has touched anything. The file stays. Then, if something answers on
//! the socket, its owner lives and the path is left to it; a socket that nobody answers on is left over from a process that was killed, and is
//! replaced. The new socket is made under a name of its own and renamed into place, so that the path is at no moment without its
//! permissions. Anything that is no socket is left alone.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

/// Who may connect: root and its group, or the user the process runs as and its group.
const MODE: u32 = 0o660;

/// Why a socket cannot be made.
#[derive(Debug)]
pub(super) enum SocketFileError {
    /// Another process serves it.
    AlreadyServed,
    /// Something that is no socket stands there.
    InTheWay,
    /// The system refused.
    Create(io::Error),
}

/// A listening socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of our file, so that a successor's is not removed.
    identity: (u64, u64),
    /// Given up after the file is removed.
    _lock: SocketLock,
}

/// Somebody else has the lock of a socket: it is served, or what is left of it is being removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locked;

/// The right to make or remove the socket at a path, until this is dropped.
#[derive(Debug)]
pub struct SocketLock(#[expect(dead_code, reason = "the lock goes when the file is closed")] Option<File>);

impl SocketLock {
    /// Takes the lock for one who serves. Where none can be had, as on a file system that is read-only, the socket itself must tell.
    fn take(socket: &Path) -> Result<Self, Locked> {
        Self::open(
            socket,
            OpenOptions::new().write(true).create(true).truncate(false),
        )
    }

    /// Takes the lock if anybody has ever served there.
    ///
    /// # Errors
    /// Somebody does.
    pub fn take_left(socket: &Path) -> Result<Self, Locked> {
        Self::open(socket, OpenOptions::new().write(true))
    }

    fn open(socket: &Path, how: &mut OpenOptions) -> Result<Self, Locked> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let opened = how
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(&path);
        let locked = match opened {
            Ok(file) => file.try_lock().map(|()| file),
            Err(error) => Err(TryLockError::Error(error)),
        };
        match locked {
            Ok(file) => Ok(Self(Some(file))),
            Err(TryLockError::WouldBlock) => Err(Locked),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::NotFound => Ok(Self(None)),
            Err(TryLockError::Error(error)) => {
                tracing::warn!(%error, file = %Path::new(&path).display(), "cannot lock the place of a socket");
                Ok(Self(None))
            }
        }
    }
}

impl SocketFile {
    /// Listens at `path`, replacing a socket that nobody answers on.
    pub(super) fn bind(path: &Path) -> Result<Self, SocketFileError> {
        use SocketFileError::Create;

        if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(Create)?;
        }
        let lock = SocketLock::take(path).map_err(|Locked| SocketFileError::AlreadyServed)?;
        match fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => return Err(SocketFileError::InTheWay),
            Ok(_) if UnixStream::connect(path).is_ok() => return Err(SocketFileError::AlreadyServed),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Create(error)),
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        // A name with our process id is ours, or left over from a process that had it before.
        let _ = fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary).map_err(Create)?;
        let placed = fs::set_permissions(&temporary, Permissions::from_mode(MODE))
            .and_then(|()| fs::rename(&temporary, path))
            .and_then(|()| fs::symlink_metadata(path));
        match placed {
            Ok(meta) => Ok(Self {
                listener,
                path: path.to_owned(),
                identity: (meta.dev(), meta.ino()),
                _lock: lock,
            }),
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(Create(error))
            }
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The socket.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |meta: fs::Metadata| (meta.dev(), meta.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
