//! A unix socket in the file system, made and removed with care.
//!
//! Start: if something answers on the socket, its owner lives and the path is left to it; a socket that nobody answers on is
//! left over from a process that was killed, and is replaced. The new socket is made under a name of its own and renamed into
//! place, so that the path is at no moment without its permissions. Anything that is no socket is left alone.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream};
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

/// A file of ours; it is removed when this is dropped.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    /// Device and inode of our file, so that a successor's is not removed.
    identity: (u64, u64),
}

/// A listening socket that no runtime looks after yet; its file is removed when it is dropped.
#[derive(Debug)]
pub(super) struct PlacedSocket {
    listener: StdListener,
    place: Place,
}

/// A listening socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct SocketFile {
    listener: UnixListener,
    place: Place,
}

impl PlacedSocket {
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
        let listener = StdListener::bind(&temporary).map_err(Create)?;
        let placed = listener
            .set_nonblocking(true)
            .and_then(|()| fs::set_permissions(&temporary, Permissions::from_mode(MODE)))
            .and_then(|()| fs::rename(&temporary, path))
            .and_then(|()| fs::symlink_metadata(path));
        match placed {
            Ok(meta) => Ok(Self {
                listener,
                place: Place {
                    path: path.to_owned(),
                    identity: (meta.dev(), meta.ino()),
                },
            }),
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                Err(Create(error))
            }
        }
    }

    /// Has this thread's runtime look after it.
    pub(super) fn attend(self) -> io::Result<SocketFile> {
        Ok(SocketFile {
            listener: UnixListener::from_std(self.listener)?,
            place: self.place,
        })
    }
}

impl SocketFile {
    /// Listens at `path`, replacing a socket that nobody answers on.
    pub(super) fn bind(path: &Path) -> Result<Self, SocketFileError> {
        PlacedSocket::bind(path)?
            .attend()
            .map_err(SocketFileError::Create)
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.place.path
    }

    /// The socket.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ours = |meta: fs::Metadata| (meta.dev(), meta.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
