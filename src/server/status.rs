//! The unix socket that hands out the daemon's status document.
//!
//! Whoever connects gets the document as one line of JSON, then the connection is closed. Nothing is read. The socket
//! is for root and its group (0660), because the document names peers and counts their traffic.
//!
//! If something answers on the socket at start, another daemon lives and this one must not start; `socket_file` has the rest.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;

pub use super::socket_file::{Locked, SocketLock};
use super::socket_file::{SocketFile, SocketFileError};
use crate::status::Status;

/// Readers at a time; a document may be some hundred kilobytes.
const MAX_READERS: usize = 16;
/// How long a reader may take.
const READER_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the status socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum StatusSocketError {
    /// Another daemon serves it.
    #[error("another daemon is running: it has {}", .0.display())]
    AlreadyServed(PathBuf),
    /// Something that is no socket stands there.
    #[error("{} is in the way: it is not a socket", .0.display())]
    InTheWay(PathBuf),
    /// The system refused.
    #[error("cannot create the status socket {}: {cause}", .path.display())]
    Create {
        /// Its path.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
}

/// Serves `status` at `path`; returns only if it cannot start.
///
/// # Errors
/// Another daemon serves it, something is in the way, or the system refuses.
pub async fn serve_status(path: &Path, status: impl Fn() -> Status) -> Result<Infallible, StatusSocketError> {
    let socket = StatusSocket::bind(path)?;
    Ok(socket.serve(status).await)
}

/// A bound status socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct StatusSocket {
    file: SocketFile,
}

impl StatusSocket {
    /// Binds the socket, replacing one that nobody answers on. Call it before anything else is touched: it is how a
    /// second daemon on the same machine finds out.
    ///
    /// # Errors
    /// See [`StatusSocketError`].
    pub fn bind(path: &Path) -> Result<Self, StatusSocketError> {
        match SocketFile::bind(path) {
            Ok(file) => Ok(Self { file }),
            Err(SocketFileError::AlreadyServed) => Err(StatusSocketError::AlreadyServed(path.to_owned())),
            Err(SocketFileError::InTheWay) => Err(StatusSocketError::InTheWay(path.to_owned())),
            Err(SocketFileError::Create(cause)) => Err(StatusSocketError::Create {
                path: path.to_owned(),
                cause,
            }),
        }
    }

    /// Hands `status` to everyone who connects, for ever.
    pub async fn serve(self, status: impl Fn() -> Status) -> Infallible {
        let slots = Arc::new(Semaphore::new(MAX_READERS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                // The semaphore is never closed.
                std::future::pending().await
            };
            let mut stream = match self.file.listener().accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection on the status socket");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let mut document = match serde_json::to_vec(&status()) {
                Ok(document) => document,
                Err(error) => {
                    tracing::warn!(%error, "cannot write the status document");
                    continue;
                }
            };
            document.push(b'\n');
            tokio::spawn(async move {
                // A reader who goes away, or takes too long, gets no more.
                let _ = tokio::time::timeout(READER_TIMEOUT, stream.write_all(&document)).await;
                drop(slot);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn whoever_connects_gets_the_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/kersey/status.sock");
        let socket = StatusSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let serving = tokio::spawn(socket.serve(|| Status {
            version: "x".into(),
            ..Status::default()
        }));
        let text = tokio::task::spawn_blocking({
            let path = path.clone();
            move || {
                let mut text = String::new();
                UnixStream::connect(path)
                    .unwrap()
                    .read_to_string(&mut text)
                    .unwrap();
                text
            }
        })
        .await
        .unwrap();
        assert_eq!(serde_json::from_str::<Status>(&text).unwrap().version, "x");
        serving.abort();
        let _ = serving.await;
        assert!(!path.exists(), "the file goes with the socket");
    }

    #[tokio::test]
    async fn a_second_daemon_is_refused_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.sock");
        let first = StatusSocket::bind(&path).unwrap();
        assert!(matches!(
            StatusSocket::bind(&path),
            Err(StatusSocketError::AlreadyServed(_))
        ));
        drop(first);
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a std listener leaves its file behind");
        StatusSocket::bind(&path).unwrap();
    }

    /// A daemon that has locked its place and not made its socket yet is seen, too: by another one, and by who removes what is left.
    #[tokio::test]
    async fn of_two_that_start_at_once_one_is_refused_before_it_touches_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.sock");
        assert!(SocketLock::take_left(&path).is_ok(), "nobody has been there");
        let first = StatusSocket::bind(&path).unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&path);
        // As good as one that has not got so far: nobody answers.
        fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        assert!(matches!(
            StatusSocket::bind(&path),
            Err(StatusSocketError::AlreadyServed(_))
        ));
        assert_eq!(SocketLock::take_left(&path).unwrap_err(), Locked);
        fs::rename(dir.path().join("elsewhere"), &path).unwrap();
        assert_eq!(inode(&path), before);
        drop(first);
        assert!(!path.exists());
        let removing = SocketLock::take_left(&path).unwrap();
        assert!(matches!(
            StatusSocket::bind(&path),
            Err(StatusSocketError::AlreadyServed(_))
        ));
        drop(removing);
        StatusSocket::bind(&path).unwrap();
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            StatusSocket::bind(&path),
            Err(StatusSocketError::InTheWay(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
