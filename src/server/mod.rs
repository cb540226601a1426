//! A store served to other nodes, and what a daemon tells of itself.
//!
//! [`serve`] speaks flannel's client/server HTTP API (`api`) over any [`Store`], from one shared watch of it (`feed`).
//! [`status`] hands the daemon's status document to `kersey status` over a unix socket, [`monitor`] answers health probes and Prometheus.
//!
//! # Limits
//!
//! The server faces every node and whoever else reaches its port, so each resource has a bound:
//!
//! - [`MAX_CONNECTIONS`] at a time; further ones wait in the kernel's queue;
//! - a request's head must be there within [`HEAD_TIMEOUT`], and a connection that sends none is closed after it;
//! - a head is at most [`MAX_HEAD_BYTES`] long, a body 1 MiB and 10 s;
//! - a peer that vanished is noticed by TCP keep-alive, one that stops reading by `TCP_USER_TIMEOUT`.
//!
//! Only HTTP/1.1 is spoken: that is all flannel's clients know, and HTTP/2's own floods are left out with it.

mod api;
mod feed;
pub mod monitor;
pub mod status;

use std::future::Future;
use std::io;
use std::net::Ipv6Addr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use self::feed::Feed;
use crate::control::store::Store;
use crate::options::ListenAddress;

/// Connections at a time: a long poll each for two thousand nodes, and as many again for requests.
pub const MAX_CONNECTIONS: usize = 4096;
/// How long the head of a request may take, and how long a connection may idle.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest head of a request.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// How long requests in progress may take to finish once the server stops; polls are cut off after it.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// How long sent data may go unacknowledged: longer than a retransmission or two, shorter than memory lasts.
const USER_TIMEOUT: Duration = Duration::from_secs(20);

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The name has no address.
    #[error("cannot listen on {address}: {source}")]
    Resolve {
        /// What was asked for.
        address: String,
        /// The cause.
        source: io::Error,
    },
    /// No address of it can be bound.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// What was asked for.
        address: String,
        /// The cause, for the last address tried.
        source: io::Error,
    },
}

/// Listens on `address`. An empty host is every address of this machine, of both families where there is IPv6.
///
/// # Errors
/// The name does not resolve, or no address of it can be bound.
pub async fn listen(address: &ListenAddress) -> Result<TcpListener, ListenError> {
    let bind_error = |source| ListenError::Bind {
        address: address.to_string(),
        source,
    };
    if address.host.is_empty() {
        return match TcpListener::bind((Ipv6Addr::UNSPECIFIED, address.port)).await {
            Ok(listener) => Ok(listener),
            // Without IPv6 there is IPv4.
            Err(_) => TcpListener::bind(("0.0.0.0", address.port))
                .await
                .map_err(bind_error),
        };
    }
    let addresses = tokio::net::lookup_host((address.host.as_str(), address.port))
        .await
        .map_err(|source| ListenError::Resolve {
            address: address.to_string(),
            source,
        })?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in addresses {
        match TcpListener::bind(candidate).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(bind_error(last))
}

/// Serves `store` on `listener` until `stop` completes, then lets requests in progress finish for a moment.
pub async fn serve(listener: TcpListener, store: Arc<dyn Store>, stop: impl Future<Output = ()>) {
    let feed = Feed::new();
    let (stopping, stopped) = watch::channel(());
    let accepting = accept(listener, store.clone(), feed.clone(), stopped);
    let following = feed.follow(&*store);
    tokio::select! {
        () = accepting => {}
        () = following => {}
        () = stop => {}
    }
    // Each connection holds a receiver; when all are gone, all are done.
    stopping.send_replace(());
    let _ = tokio::time::timeout(STOP_GRACE * 2, stopping.closed()).await;
}

async fn accept(listener: TcpListener, store: Arc<dyn Store>, feed: Arc<Feed>, stopped: watch::Receiver<()>) {
    let service = TowerToHyperService::new(api::router(store, feed));
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, or the peer was faster: a pause keeps this from spinning.
                tracing::debug!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if let Err(error) = bound(&stream) {
            tracing::debug!(%error, "cannot set limits on a connection");
            continue;
        }
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service.clone());
        let mut stopped = stopped.clone();
        tokio::spawn(async move {
            let mut connection = pin!(connection);
            let result = tokio::select! {
                result = connection.as_mut() => result,
                _ = stopped.changed() => {
                    connection.as_mut().graceful_shutdown();
                    match tokio::time::timeout(STOP_GRACE, connection).await {
                        Ok(result) => result,
                        Err(_) => Ok(()),
                    }
                }
            };
            if let Err(error) = result {
                tracing::debug!(%error, "connection ended");
            }
            drop(slot);
        });
    }
}

/// Lets the kernel notice peers that vanished or stopped reading.
fn bound(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_nodelay(true)
}
