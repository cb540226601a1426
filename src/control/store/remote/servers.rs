//! The servers a node asks: which one, and when another.
//!
//! Servers are named in order of preference. One of them is *current*: it answered last. A request goes to it; if it cannot
//! be reached, does not answer in time, or answers that its own store is away, to the next in the list, until each was tried
//! once. The one that answers is current from then on. While that is not the first, the ones before it are asked for the
//! config about every half minute ([`RETURN_AFTER`]), and the first that answers is current again: nodes spread over servers
//! on purpose go back to where they belong.
//!
//! What a server hands out for later (a watch's cursor) goes back to that server alone: [`Servers::ask_only`].

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Method, Request, StatusCode, header};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use tokio::time::Instant;

use super::connect::{Connector, explain};
use super::{ERROR_HEADER, ErrorKind, FORMERLY_HEADER, NODE_HEADER, NodeHeader, PREVIOUS_HEADER};
use crate::control::peers::MAX_LEASES;
use crate::control::store::StoreError;
use crate::lease::Subnet;
use crate::options::{RemoteOptions, Scheme, ServerAddress, TlsFiles};
use crate::trust::{ClientTls, Secret, TrustError};

/// How long a server has to answer anything but a poll.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a server has to show that it is back.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long after a better server failed it is looked at again; half as much more by chance, so that not all nodes come at
/// once.
const RETURN_AFTER: Duration = Duration::from_secs(20);
/// The largest answer read: a snapshot of as many leases as a node knows ([`MAX_LEASES`]), of 640 bytes each; ordinary ones have 200
/// to 400.
const MAX_ANSWER_BYTES: usize = 64_000_000;
const _: () = assert!(MAX_ANSWER_BYTES >= MAX_LEASES * 640);

/// Servers, and the connections to them.
#[derive(Debug)]
pub(super) struct Servers {
    servers: Vec<Server>,
    /// Index of the one that answered last.
    current: AtomicUsize,
    /// See [`RETURN_AFTER`].
    return_after: Duration,
    /// When the servers before the current one may be looked at again.
    look_due: Mutex<Instant>,
    client: Client<Connector, Full<Bytes>>,
    token: Option<Secret>,
}

#[derive(Debug)]
struct Server {
    address: ServerAddress,
    /// What URLs begin with: scheme and authority.
    root: String,
    /// The Host header; the URL's authority if absent.
    host: Option<&'static str>,
}

/// A server's answer.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: String,
    /// Which server gave it.
    pub(super) server: usize,
}

/// Why a server gave none.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// Nothing came.
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// The connection failed.
    #[error("{0}")]
    Broken(String),
}

/// One request.
pub(super) struct Ask<'a> {
    pub(super) doing: &'static str,
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) body: String,
    pub(super) previous: Option<Subnet>,
    /// The public address of this node's that the lease is still known by, if that is another by now.
    pub(super) formerly: Option<IpAddr>,
    /// Who asks.
    pub(super) node: Option<NodeHeader>,
    /// The lease that an error would be about.
    pub(super) about: Option<&'a Subnet>,
    pub(super) timeout: Duration,
}

impl Ask<'_> {
    /// A question.
    pub(super) fn get(doing: &'static str, path: String) -> Self {
        Self {
            doing,
            method: Method::GET,
            path,
            body: String::new(),
            previous: None,
            formerly: None,
            node: None,
            about: None,
            timeout: REQUEST_TIMEOUT,
        }
    }
}

impl Servers {
    /// Plain HTTP to `servers`. Nothing is sent yet.
    pub(super) fn plain(servers: &[ServerAddress]) -> Self {
        Self::new(servers, None, false, None)
    }

    /// As the options say. Nothing is sent yet.
    ///
    /// # Errors
    /// Certificate or token files are no good.
    pub(super) fn open(options: &RemoteOptions) -> Result<Self, TrustError> {
        let https = |server: &ServerAddress| match server {
            ServerAddress::Tcp { scheme, .. } => *scheme == Scheme::Https,
            ServerAddress::Unix(_) => false,
        };
        let tls = match &options.tls {
            Some(files) => Some(ClientTls::open(files)?),
            None if options.servers.iter().any(https) => Some(ClientTls::open(&TlsFiles::default())?),
            None => None,
        };
        let token = options.token_file.as_deref().map(Secret::open).transpose()?;
        Ok(Self::new(
            &options.servers,
            tls.map(Arc::new),
            options.tls.is_some(),
            token,
        ))
    }

    fn new(
        addresses: &[ServerAddress],
        tls: Option<Arc<ClientTls>>,
        tls_by_files: bool,
        token: Option<Secret>,
    ) -> Self {
        assert!(!addresses.is_empty(), "a remote store needs a server");
        let mut sockets = Vec::new();
        let servers = addresses
            .iter()
            .map(|address| {
                let (root, host) = match address {
                    ServerAddress::Unix(path) => {
                        sockets.push(path.clone());
                        (format!("unix://{}", sockets.len() - 1), Some("localhost"))
                    }
                    ServerAddress::Tcp { scheme, host, port } => {
                        let tls = match scheme {
                            Scheme::ByFiles => tls_by_files,
                            Scheme::Http => false,
                            Scheme::Https => true,
                        };
                        let scheme = if tls { "https" } else { "http" };
                        let root = if host.contains(':') {
                            format!("{scheme}://[{host}]:{port}")
                        } else {
                            format!("{scheme}://{host}:{port}")
                        };
                        (root, None)
                    }
                };
                Server {
                    address: address.clone(),
                    root,
                    host,
                }
            })
            .collect();
        // Kersey's server closes a connection that idles for 5 s; ours are dropped before that.
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(3))
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(2)
            .build(Connector::new(tls, sockets));
        Self {
            servers,
            current: AtomicUsize::new(0),
            return_after: RETURN_AFTER,
            look_due: Mutex::new(Instant::now()),
            client,
            token,
        }
    }

    /// Sets how long after a better server failed it is looked at again.
    pub(super) fn set_return_after(&mut self, pause: Duration) {
        self.return_after = pause;
    }

    /// How long a poll may wait at a server that is not the first.
    pub(super) fn return_after(&self) -> Duration {
        self.return_after
    }

    /// The servers, for logs.
    pub(super) fn place(&self) -> String {
        let servers: Vec<String> = self
            .servers
            .iter()
            .map(|server| server.address.to_string())
            .collect();
        format!("server {}", servers.join(","))
    }

    /// The server that answered last.
    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// A server's address, for logs.
    pub(super) fn name(&self, server: usize) -> &ServerAddress {
        &self.servers[server].address
    }

    /// Sends `ask` to one server after the other until one answers.
    pub(super) async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, StoreError> {
        self.look_at_better_ones().await;
        let first = self.current();
        let mut failures = Vec::new();
        for turn in 0..self.servers.len() {
            let server = (first + turn) % self.servers.len();
            match self.ask_only(server, ask).await {
                Ok(answer) => match check(ask, self.name(server), answer) {
                    // This one is up, and what is behind it is not.
                    Err(StoreError::Unavailable { cause, .. }) => failures.push(cause),
                    answered => {
                        self.answered(server);
                        return answered;
                    }
                },
                Err(cause) => failures.push(format!("{}: {cause}", self.name(server))),
            }
        }
        Err(StoreError::Unavailable {
            doing: ask.doing,
            place: self.place(),
            cause: failures.join("; "),
        })
    }

    /// Sends `ask` to one server and no other.
    pub(super) async fn ask_only(&self, server: usize, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let Server { root, host, .. } = &self.servers[server];
        let mut request = Request::builder()
            .method(ask.method.clone())
            .uri(format!("{root}{}", ask.path))
            .header(header::USER_AGENT, concat!("kersey/", env!("CARGO_PKG_VERSION")));
        if let Some(host) = host {
            request = request.header(header::HOST, *host);
        }
        if !ask.body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(previous) = ask.previous {
            request = request.header(PREVIOUS_HEADER, previous.to_string());
        }
        if let Some(formerly) = ask.formerly {
            request = request.header(FORMERLY_HEADER, formerly.to_string());
        }
        if let Some(node) = &ask.node {
            request = request.header(NODE_HEADER, node.to_string());
        }
        if let Some(token) = &self.token {
            let mut value = header::HeaderValue::try_from(format!("Bearer {}", token.current()))
                .map_err(|error| Failure::Broken(error.to_string()))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request
            .body(Full::from(ask.body.clone()))
            .map_err(|error| Failure::Broken(error.to_string()))?;
        let exchange = async {
            let response = self
                .client
                .request(request)
                .await
                .map_err(|error| Failure::Broken(explain(&error)))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(|error| Failure::Broken(explain(&*error)))?;
            Ok(Answer {
                status: head.status,
                headers: head.headers,
                body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
                server,
            })
        };
        tokio::time::timeout(ask.timeout, exchange)
            .await
            .unwrap_or(Err(Failure::Silent(ask.timeout)))
    }

    /// Makes `server` the current one.
    fn answered(&self, server: usize) {
        let before = self.current.swap(server, Ordering::Relaxed);
        if before != server {
            tracing::info!(server = %self.name(server), before = %self.name(before), "another server answers");
            self.look_later();
        }
    }

    /// Looks whether a server before the current one is back, if it is time to, and makes it current.
    pub(super) async fn look_at_better_ones(&self) {
        let current = self.current();
        if current == 0 || *self.look_due.lock().unwrap_or_else(PoisonError::into_inner) > Instant::now() {
            return;
        }
        self.look_later();
        let question = Ask {
            timeout: LOOK_TIMEOUT,
            ..Ask::get("look at a server", "/v1/_/config".to_owned())
        };
        for server in 0..current {
            if let Ok(answer) = self.ask_only(server, &question).await
                && !matches!(
                    check(&question, self.name(server), answer),
                    Err(StoreError::Unavailable { .. })
                )
            {
                self.answered(server);
                return;
            }
        }
    }

    fn look_later(&self) {
        let pause = self.return_after.mul_f64(rand::random_range(1.0..1.5));
        *self.look_due.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now() + pause;
    }
}

/// Turns an answer that is not 200 into the error it stands for.
fn check(ask: &Ask<'_>, server: &ServerAddress, answer: Answer) -> Result<Answer, StoreError> {
    if answer.status == StatusCode::OK {
        return Ok(answer);
    }
    let text = answer.body.trim();
    let cause = format!(
        "{server} says {}: {}",
        answer.status,
        text.chars().take(300).collect::<String>()
    );
    let named = answer
        .headers
        .get(ERROR_HEADER)
        .and_then(|value| value.to_str().ok());
    let kind = match (named, ask.about) {
        (Some("lease-lost"), Some(_)) => ErrorKind::LeaseLost,
        (Some("address-taken"), _) => ErrorKind::AddressTaken,
        (Some("refused" | "lease-lost"), _) => ErrorKind::Refused,
        (Some(_), _) => ErrorKind::Unavailable,
        // Flannel's server hands on etcd's words: error 100 is a missing key.
        (None, Some(_)) if text.starts_with("100:") => ErrorKind::LeaseLost,
        (None, _) if text.starts_with("100:") || answer.status.is_client_error() => ErrorKind::Refused,
        (None, _) => ErrorKind::Unavailable,
    };
    let doing = ask.doing;
    Err(match (kind, ask.about) {
        (ErrorKind::LeaseLost, Some(&subnet)) => StoreError::LeaseLost { subnet, cause },
        (ErrorKind::AddressTaken, _) => StoreError::AddressTaken { doing, cause },
        (ErrorKind::Refused | ErrorKind::LeaseLost, _) => StoreError::Refused { doing, cause },
        (ErrorKind::Unavailable, _) => StoreError::Unavailable {
            doing,
            place: format!("server {server}"),
            cause,
        },
    })
}
