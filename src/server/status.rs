//! The unix socket that hands out the daemon's status document.
//!
//! Whoever connects gets the document as one line of JSON, then the connection is closed. Nothing is read. It is written
//! piece by piece, on a thread of its own, as fast as it is read: with a hundred thousand peers it has twenty megabytes. The socket
//! is for root and its group (0660), because the document names peers and counts their traffic.
//!
//! If something answers on the socket at start, another daemon lives and this one must not start; `socket_file` has the rest.

use std::convert::Infallible;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};

pub use super::socket_file::{Locked, SocketLock};
use super::socket_file::{SocketFile, SocketFileError};

/// Readers at a time.
const MAX_READERS: usize = 16;
/// Bytes of a document that are written at once.
const PIECE: usize = 64 * 1024;
/// Pieces that wait for their reader; whoever makes more waits.
const PIECES: usize = 2;
/// How long a document may wait for its reader in all; making it takes time of its own.
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
pub async fn serve_status<S: Serialize + Send + 'static>(
    path: &Path,
    status: impl Fn() -> S,
) -> Result<Infallible, StatusSocketError> {
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
    pub async fn serve<S: Serialize + Send + 'static>(self, status: impl Fn() -> S) -> Infallible {
        let slots = Arc::new(Semaphore::new(MAX_READERS));
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                // The semaphore is never closed.
                std::future::pending().await
            };
            let stream = match self.file.listener().accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "cannot accept a connection on the status socket");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let document = status();
            tokio::spawn(async move {
                // A reader who goes away, or takes too long, gets no more.
                let _ = hand_out(document, stream).await;
                drop(slot);
            });
        }
    }
}

/// Writes a document to its reader.
async fn hand_out(document: impl Serialize + Send + 'static, mut stream: UnixStream) -> io::Result<()> {
    let (pieces, mut made) = mpsc::channel(PIECES);
    // Not one of the runtime's: it would wait for a thread that waits for its reader when it ends, and panics if there can be none.
    let thread = std::thread::Builder::new().name("status".to_owned());
    let begun = thread.spawn(move || {
        let mut out = Pieces {
            made: Vec::with_capacity(PIECE),
            pieces,
        };
        let written = serde_json::to_writer(&mut out, &document);
        match written.map_err(io::Error::from).and_then(|()| out.end()) {
            // The reader is gone.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => tracing::warn!(%error, "cannot write the status document"),
            Ok(()) => {}
        }
    });
    if let Err(error) = begun {
        tracing::warn!(%error, "there can be no thread that writes the status document");
        return Err(error);
    }
    let mut patience = READER_TIMEOUT;
    while let Some(piece) = made.recv().await {
        let begun = Instant::now();
        timeout(patience, stream.write_all(&piece)).await??;
        patience = patience.saturating_sub(begun.elapsed());
    }
    Ok(())
}

/// Hands on what is written to it, piece by piece.
struct Pieces {
    made: Vec<u8>,
    pieces: mpsc::Sender<Vec<u8>>,
}

impl Pieces {
    fn end(mut self) -> io::Result<()> {
        self.write_all(b"\n")?;
        self.flush()
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.made.extend_from_slice(bytes);
        if self.made.len() >= PIECE {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.made, Vec::with_capacity(PIECE));
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        self.pieces.blocking_send(piece).map_err(gone)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::status::{Peer, Status};

    #[tokio::test]
    async fn whoever_connects_gets_the_document() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/kersey/status.sock");
        let socket = StatusSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let many = || Status {
            version: "x".into(),
            // Several pieces.
            peers: vec![Peer::default(); 2_000],
            ..Status::default()
        };
        let serving = tokio::spawn(socket.serve(many));
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
        assert!(text.len() > 3 * PIECE && text.ends_with("}\n"));
        assert_eq!(text, format!("{}\n", serde_json::to_string(&many()).unwrap()));
        serving.abort();
        let _ = serving.await;
        assert!(!path.exists(), "the file goes with the socket");
    }

    #[test]
    fn a_reader_who_does_not_read_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.sock");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let reader = runtime.block_on(async {
            let many = || Status {
                peers: vec![Peer::default(); 50_000],
                ..Status::default()
            };
            tokio::spawn(StatusSocket::bind(&path).unwrap().serve(many));
            let mut reader = tokio::net::UnixStream::connect(&path).await.unwrap();
            // So the document is on its way.
            tokio::io::AsyncReadExt::read_u8(&mut reader).await.unwrap();
            reader
        });
        let patience = Duration::from_secs(60);
        let begun = Instant::now();
        runtime.shutdown_timeout(patience);
        assert!(begun.elapsed() < patience, "it waited for the reader");
        drop(reader);
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
