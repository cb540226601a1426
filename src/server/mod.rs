//! A store served to other nodes, and what a daemon tells of itself.
//!
//! [`serve`] speaks flannel's client/server HTTP API (`api`) over any [`Store`], from one shared watch of it (`feed`).
//! [`status`] hands the daemon's status document to `kersey status` over a unix socket, [`monitor`] answers health probes and Prometheus.
//!
//! ```text
//! listener ─ crowd: is there room? ─ TLS: a certificate, if one is wanted ─ front: no web page, a host that is ours
//!    └▶ api: which network, may they? (access) ─ store, or feed
//! ```
//!
//! # Limits
//!
//! The server faces every node and whoever else reaches its port, so each resource has a bound:
//!
//! - connections, in all, from one address, and without a request so far: `crowd`;
//! - a TLS handshake and the head of a request must be there within [`HEAD_TIMEOUT`] each, and a connection that sends
//!   nothing is closed after it;
//! - a head is at most [`MAX_HEAD_BYTES`] long; bodies have bounds of their own, one by one and together (`api`);
//! - a peer that vanished is noticed by TCP keep-alive, one that stops reading by `TCP_USER_TIMEOUT`.
//!
//! Only HTTP/1.1 is spoken: that is all flannel's clients know, and HTTP/2's own floods are left out with it.

mod access;
mod api;
mod crowd;
mod directory;
mod feed;
mod front;
mod listen;
pub mod monitor;
mod presence;
mod quota;
mod socket_file;
pub mod status;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower_service::Service;

use self::access::{Access, Peer};
use self::api::Api;
use self::crowd::{Crowd, Crowded, Guest};
pub use self::crowd::{MAX_CONNECTIONS, MAX_FROM_ONE, MAX_STRANGERS};
use self::directory::Directory;
use self::front::Front;
use self::listen::Accepted;
pub use self::listen::{Inherit, ListenError, Listener, listen};
use crate::control::RateLimit;
use crate::control::store::{Networks, Store};
use crate::options::{ApiForm, ServeOptions};
use crate::trust::names::names;
use crate::trust::{ServerTls, TrustError};

/// How long the head of a request may take, and how long a connection may idle.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest head of a request.
pub const MAX_HEAD_BYTES: usize = 8 * 1024;
/// How long requests in progress may take to finish once the server stops; polls are cut off after it.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// How long sent data may go unacknowledged: longer than a retransmission or two, shorter than memory lasts.
const USER_TIMEOUT: Duration = Duration::from_secs(20);
/// How often certificate files are looked at for the sake of connections that are there already.
const LOOK_AT_FILES: Duration = Duration::from_secs(5);
/// Over how long such connections are closed after a change, so that not all clients come back at once.
const REPLACE_WITHIN: Duration = Duration::from_secs(10);
/// The first byte of a TLS connection: a record of kind "handshake" (RFC 8446 §5.1).
const TLS_HANDSHAKE: u8 = 22;
/// What a client is told who speaks HTTP where TLS is spoken.
const SPEAK_TLS: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n\
    this port speaks TLS, and this was plain HTTP; use https://, or give the client --remote-cafile\n";

/// A store, and how it is served.
pub struct Served {
    store: Arc<dyn Store>,
    networks: Option<Arc<dyn Networks>>,
    tls: Option<ServerTls>,
    access: Access,
    front: Front,
    form: ApiForm,
}

impl Served {
    /// Reads the files `options` names: certificates, the access file.
    ///
    /// # Errors
    /// One of them is no good.
    pub fn open(store: Arc<dyn Store>, options: &ServeOptions) -> Result<Self, TrustError> {
        let tls = match &options.tls {
            Some((pair, ca)) => Some(ServerTls::open(pair, ca.as_deref())?),
            None => None,
        };
        Ok(Self {
            store,
            networks: None,
            tls,
            access: Access::open(options.access_file.as_deref())?,
            front: Front::new(&options.listen, &options.names),
            form: options.form,
        })
    }

    /// Serves the networks with a name as well.
    pub fn with_networks(mut self, networks: Arc<dyn Networks>) -> Self {
        self.networks = Some(networks);
        self
    }

    /// What an operator should know about who can do what, one sentence each.
    pub fn warnings(&self, listeners: &[Listener]) -> Vec<&'static str> {
        let mut warnings = Vec::new();
        let tcp = |listener: &Listener| matches!(listener, Listener::Tcp(_));
        if matches!(self.access, Access::ByPlace) && listeners.iter().any(tcp) {
            warnings.push(
                "whoever connects from this machine's own addresses 127.0.0.1 and ::1, be it a pod in the host's network or a proxy \
                 that passes on what others send, may end leases and make reservations; give --access-file, or have a \
                 proxy and administrators use --listen=unix:///PATH alone",
            );
        }
        if !listeners.iter().any(Listener::is_remote) {
            return warnings;
        }
        let asks_clients = self.tls.as_ref().is_some_and(ServerTls::asks_clients);
        if matches!(self.access, Access::ByPlace) && !asks_clients {
            warnings.push(
                "whoever reaches this server can read its config and take leases; have only nodes reach it, or give \
                 --remote-cafile or --access-file",
            );
        }
        if self.tls.is_none() && self.access.knows_tokens() {
            warnings.push(
                "tokens would come over the network in the clear; give --remote-certfile and --remote-keyfile",
            );
        }
        warnings
    }
}

/// Serves `store` on `listener`, plain and open, until `stop` completes, then lets requests in progress finish for a moment.
pub async fn serve(listener: TcpListener, store: Arc<dyn Store>, stop: impl Future<Output = ()>) {
    let served = Served {
        store,
        networks: None,
        tls: None,
        access: Access::ByPlace,
        front: Front::new(&[], &[]),
        form: ApiForm::Flannel,
    };
    serve_all(vec![listener.into()], served, stop).await;
}

/// Serves on all `listeners` until `stop` completes, then lets requests in progress finish for a moment.
pub async fn serve_all(listeners: Vec<Listener>, served: Served, stop: impl Future<Output = ()>) {
    let (stopping, stopped) = watch::channel(());
    let (replace, replaced) = watch::channel(());
    let api = Api::new(Directory::new(served.store, served.networks), served.access);
    let door = Arc::new(Door {
        router: api::router(&api),
        crowd: Arc::default(),
        tls: served.tls,
        front: served.front,
        form: served.form,
        complaints: RateLimit::default(),
        crowded: RateLimit::default(),
        stopped,
        replaced,
    });
    let mut accepting = JoinSet::new();
    for listener in listeners {
        accepting.spawn(accept(listener, Arc::clone(&door)));
    }
    tokio::select! {
        () = api.follow() => {}
        () = watch_files(&door, &replace) => {}
        () = stop => {}
    }
    accepting.shutdown().await;
    drop(door);
    // Each connection holds a receiver; when all are gone, all are done.
    stopping.send_replace(());
    let _ = timeout(STOP_GRACE * 2, stopping.closed()).await;
}

/// What every connection needs.
struct Door {
    router: Router,
    crowd: Arc<Crowd>,
    tls: Option<ServerTls>,
    front: Front,
    form: ApiForm,
    complaints: RateLimit,
    crowded: RateLimit,
    stopped: watch::Receiver<()>,
    /// Changes when connections made with older certificate files are to be replaced.
    replaced: watch::Receiver<()>,
}

/// A byte stream of any kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn accept(listener: Listener, door: Arc<Door>) {
    loop {
        let accepted = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the peer was faster: a pause keeps this from spinning.
                tracing::debug!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let from = match &accepted {
            Accepted::Tcp(_, from) => Some(*from),
            Accepted::Unix(_) => None,
        };
        let guest = match door.crowd.enter(from) {
            Ok(guest) => guest,
            Err(crowded) => {
                if door.crowded.allows() {
                    complain(crowded, from);
                }
                continue;
            }
        };
        let door = Arc::clone(&door);
        tokio::spawn(async move {
            let leave = Arc::clone(&guest.leave);
            tokio::select! {
                () = converse(accepted, guest, door) => {}
                () = leave.notified() => {}
            }
        });
    }
}

fn complain(crowded: Crowded, from: Option<IpAddr>) {
    let from = from.map(|from| from.to_string());
    match crowded {
        Crowded::Place => tracing::warn!(
            from,
            limit = MAX_FROM_ONE,
            "too many connections from one address; further ones are closed"
        ),
        Crowded::Everywhere => tracing::warn!(
            from,
            limit = MAX_CONNECTIONS,
            "too many connections; those from addresses that have most are closed"
        ),
    }
}

/// One connection, from the handshake on.
async fn converse(accepted: Accepted, guest: Guest, door: Arc<Door>) {
    match (accepted, &door.tls) {
        (Accepted::Unix(stream), _) => {
            let peer = Peer {
                address: None,
                certificate: None,
                is_private: true,
            };
            exchange(Box::new(stream), peer, guest, &door).await;
        }
        (Accepted::Tcp(stream, from), None) => {
            let peer = Peer {
                address: Some(from),
                certificate: None,
                is_private: false,
            };
            exchange(Box::new(stream), peer, guest, &door).await;
        }
        (Accepted::Tcp(stream, from), Some(tls)) => {
            match timeout(HEAD_TIMEOUT, shake_hands(stream, from, tls)).await {
                Ok(Ok((stream, peer))) => exchange(stream, peer, guest, &door).await,
                Ok(Err(error)) => {
                    if error.kind() != io::ErrorKind::UnexpectedEof && door.complaints.allows() {
                        tracing::info!(%from, "a client was refused at the TLS handshake: {error}");
                    }
                    tracing::debug!(%from, %error, "TLS handshake failed");
                }
                Err(_) => tracing::debug!(%from, "TLS handshake took too long"),
            }
        }
    }
}

/// Agrees on TLS, and finds out who it is.
async fn shake_hands(
    mut stream: TcpStream,
    from: IpAddr,
    tls: &ServerTls,
) -> io::Result<(Box<dyn Stream>, Peer)> {
    let mut first = [0];
    if stream.peek(&mut first).await? == 1 && first != [TLS_HANDSHAKE] {
        stream.write_all(SPEAK_TLS).await?;
        stream.shutdown().await?;
        return Err(io::Error::other("it spoke plain HTTP, or something else"));
    }
    let stream = TlsAcceptor::from(tls.current()).accept(stream).await?;
    let certificate = stream.get_ref().1.peer_certificates();
    let peer = Peer {
        address: Some(from),
        certificate: certificate.and_then(|chain| chain.first()).map(names),
        is_private: true,
    };
    Ok((Box::new(stream), peer))
}

/// Answers requests until the connection ends.
async fn exchange(stream: Box<dyn Stream>, peer: Peer, guest: Guest, door: &Door) {
    let over_tls = peer.is_private && peer.address.is_some();
    let peer = Arc::new(peer);
    let introduction = guest.introduction();
    let service = service_fn(|mut request: Request<Incoming>| {
        let turned = door.front.admit(request.headers(), &peer).err();
        request.extensions_mut().insert(Arc::clone(&peer));
        request.extensions_mut().insert(introduction.clone());
        if door.form == ApiForm::Kubernetes {
            api::from_kubernetes_form(&mut request);
        }
        let mut router = door.router.clone();
        async move {
            match turned {
                Some(turned) => Ok(api::turn_away(&turned)),
                None => router.call(request).await,
            }
            .map_err(|never: Infallible| never)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let (mut stopped, mut replaced) = (door.stopped.clone(), door.replaced.clone());
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            timeout(STOP_GRACE, connection).await.unwrap_or(Ok(()))
        }
        _ = replaced.changed(), if over_tls => {
            // Its answer may come yet; a poll is asked again over a new connection, with a certificate that is good today.
            connection.as_mut().graceful_shutdown();
            let patience = REPLACE_WITHIN.mul_f64(rand::random_range(0.1..1.0));
            timeout(patience, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended");
    }
}

/// Has connections replaced that were made with certificate files of the past.
async fn watch_files(door: &Door, replace: &watch::Sender<()>) {
    let Some(tls) = &door.tls else {
        return std::future::pending().await;
    };
    let mut used = tls.current();
    loop {
        sleep(LOOK_AT_FILES).await;
        let current = tls.current();
        if !Arc::ptr_eq(&used, &current) {
            used = current;
            replace.send_replace(());
        }
    }
}

/// Logs where a store is served, and what its operator should know.
pub fn announce(listeners: &[Listener], served: &Served) {
    let addresses: Vec<String> = listeners.iter().map(Listener::address).collect();
    tracing::info!(
        address = addresses.join(" "),
        store = served.store.place(),
        tls = served.tls.is_some(),
        client_certificates = served.tls.as_ref().is_some_and(ServerTls::asks_clients),
        access_file = matches!(served.access, Access::ByFile(_)),
        "serving leases"
    );
    for warning in served.warnings(listeners) {
        tracing::warn!("{warning}");
    }
}
