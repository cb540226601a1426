//! A store behind Kersey or old flannel servers: flannel's HTTP API from the client's side.
//!
//! Any number of servers, in order of preference. A request goes to the one that answered last; if that one cannot be
//! reached or does not answer in time, to the next, until each was tried once. An answer that says no counts as an
//! answer. Acquiring twice does no harm, as a server finds a node's lease by its public address.
//!
//! A watch is a chain of long polls. A poll that brings nothing for a minute is given up; if the server still
//! answers a question it is asked again, else it hangs and is left behind. A machine that vanished is noticed sooner, by TCP keep-alive. When a server
//! is lost in the middle of a watch, the next one is asked for a snapshot, because a cursor means nothing to it.
//!
//! Old servers: v0.5 to v0.7 fill in fewer fields and word errors differently; of a renewal only the new end is taken,
//! because v0.5.6 to v0.7.1 spoil the attributes they send back.
//!
//! Limits: no TLS. Reservations and revocations go through where the server knows them (v0.5.6 and later).

pub mod networks;
pub mod objects;

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{HeaderMap, Method, Request, StatusCode, header};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::time::{Instant, sleep};

pub use self::networks::RemoteNetworks;
use self::objects::{attrs_json, lease_json, parse_lease, parse_watch};
use super::{Cursor, Store, StoreError, WatchItem};
use crate::addr::NetworkName;
use crate::control::identity::Holder;
use crate::lease::{Lease, LeaseAttrs, LeaseUpdate, Subnet};
use crate::options::ServerAddress;

/// Response header that tells Kersey's nodes what kind of error a status 500 is.
pub const ERROR_HEADER: &str = "x-kersey-error";
/// Request header that carries the subnet a node held before, a lease key.
pub const PREVIOUS_HEADER: &str = "x-kersey-previous";
/// Request header of a renewal that carries the public address a node had before; an old server takes any renewal.
pub const FORMERLY_HEADER: &str = "x-kersey-formerly";

/// How long a server has to take a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server has to answer anything but a poll.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a poll waits before it is asked anew.
const POLL_TIMEOUT: Duration = Duration::from_secs(60);
/// The largest answer read: a snapshot of some ten thousand ordinary leases.
const MAX_ANSWER_BYTES: usize = 16 * 1024 * 1024;
/// Pause after a poll that failed at once or brought nothing: flannel's own.
const POLL_PAUSE: Duration = Duration::from_secs(1);

/// The kind of an error, as [`ERROR_HEADER`] names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A retry can mend it.
    Unavailable,
    /// The answer is no.
    Refused,
    /// The lease is gone or somebody else's.
    LeaseLost,
}

impl ErrorKind {
    /// The header's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::LeaseLost => "lease-lost",
        }
    }
}

/// A store behind servers.
#[derive(Debug)]
pub struct RemoteStore {
    servers: Vec<ServerAddress>,
    /// Index of the server that answered last.
    preferred: AtomicUsize,
    client: Client<HttpConnector, Full<Bytes>>,
    /// What every path begins with: `/v1/NAME`, or `/v1/_` for the network without a name.
    base: String,
}

/// A server's answer.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

/// Why a server gave none.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("no answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("{0}")]
    Broken(String),
}

/// One request, to be sent to whichever server answers.
struct Ask<'a> {
    doing: &'static str,
    method: Method,
    path: String,
    body: String,
    previous: Option<Subnet>,
    /// The public address of this node's that the lease is still known by.
    formerly: Option<IpAddr>,
    /// The lease that an error would be about.
    about: Option<&'a Subnet>,
    timeout: Duration,
}

impl RemoteStore {
    /// Makes a store behind `servers`, in order of preference. Nothing is sent yet.
    ///
    /// # Panics
    /// There is no server; the command line has seen to it.
    pub fn new(servers: Vec<ServerAddress>) -> Self {
        assert!(!servers.is_empty(), "a remote store needs a server");
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_nodelay(true);
        // A machine that vanished is noticed after 5 + 3 × 3 s, with data in flight after 10 s.
        connector.set_keepalive(Some(Duration::from_secs(5)));
        connector.set_keepalive_interval(Some(Duration::from_secs(3)));
        connector.set_keepalive_retries(Some(3));
        connector.set_tcp_user_timeout(Some(Duration::from_secs(10)));
        // Kersey's server closes a connection that idles for 5 s; ours are dropped before that.
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(Duration::from_secs(3))
            .pool_timer(hyper_util::rt::TokioTimer::new())
            .pool_max_idle_per_host(2)
            .build(connector);
        Self {
            servers,
            preferred: AtomicUsize::new(0),
            client,
            base: base(None),
        }
    }

    /// The same servers' store of another network; connections are shared.
    pub fn of_network(&self, name: Option<&NetworkName>) -> Self {
        Self {
            servers: self.servers.clone(),
            preferred: AtomicUsize::new(self.preferred.load(Ordering::Relaxed)),
            client: self.client.clone(),
            base: base(name),
        }
    }

    /// Sends `ask` to one server after the other until one answers.
    async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, StoreError> {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for turn in 0..self.servers.len() {
            let index = (first + turn) % self.servers.len();
            match self.ask_one(&self.servers[index], ask).await {
                Ok(answer) => {
                    if turn > 0 {
                        tracing::info!(server = %self.servers[index], "another server answers");
                    }
                    self.preferred.store(index, Ordering::Relaxed);
                    return check(ask, &self.servers[index], answer);
                }
                Err(cause) => failures.push(format!("{}: {cause}", self.servers[index])),
            }
        }
        Err(StoreError::Unavailable {
            doing: ask.doing,
            place: self.place(),
            cause: failures.join("; "),
        })
    }

    async fn ask_one(&self, server: &ServerAddress, ask: &Ask<'_>) -> Result<Answer, Failure> {
        let mut request = Request::builder()
            .method(ask.method.clone())
            .uri(format!("http://{server}{}", ask.path))
            .header(header::USER_AGENT, concat!("kersey/", env!("CARGO_PKG_VERSION")));
        if !ask.body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        if let Some(previous) = ask.previous {
            request = request.header(PREVIOUS_HEADER, previous.to_string());
        }
        if let Some(formerly) = ask.formerly {
            request = request.header(FORMERLY_HEADER, formerly.to_string());
        }
        let request = request
            .body(Full::from(ask.body.clone()))
            .map_err(|error| Failure::Broken(error.to_string()))?;
        let exchange = async {
            let response = self
                .client
                .request(request)
                .await
                .map_err(|error| Failure::Broken(root_cause(&error)))?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES)
                .collect()
                .await
                .map_err(|error| Failure::Broken(root_cause(&*error)))?;
            Ok(Answer {
                status: head.status,
                headers: head.headers,
                body: String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            })
        };
        tokio::time::timeout(ask.timeout, exchange)
            .await
            .unwrap_or(Err(Failure::Silent(ask.timeout)))
    }

    /// One step of a watch: polls until there is something to tell.
    async fn poll(&self, mut since: Option<Cursor>) -> Result<WatchItem, StoreError> {
        loop {
            let Some(cursor) = since else {
                let answer = self.ask(&self.leases_ask(None)).await?;
                let (update, cursor) = read_watch(&answer.body)?;
                return Ok(WatchItem {
                    // Old servers say `null` where there are none.
                    update: update.unwrap_or_else(|| LeaseUpdate::Snapshot(Vec::new())),
                    cursor,
                });
            };
            // Only the server that gave the cursor can read it, so a poll does not go round.
            let server = &self.servers[self.preferred.load(Ordering::Relaxed) % self.servers.len()];
            let asked = Instant::now();
            let why = match self.ask_one(server, &self.leases_ask(Some(&cursor))).await {
                Ok(answer) if answer.status == StatusCode::OK => {
                    let (update, next) = read_watch(&answer.body)?;
                    if let Some(update) = update {
                        return Ok(WatchItem { update, cursor: next });
                    }
                    // No sound server answers a poll with nothing; this one is not asked without a pause.
                    sleep(POLL_PAUSE).await;
                    since = Some(cursor);
                    continue;
                }
                Ok(answer) => format!("{}: {}", answer.status, answer.body.trim()),
                // Quiet networks are the rule. Whether the server lives, a question with an answer tells.
                Err(Failure::Silent(_)) if self.ask_one(server, &self.config_ask()).await.is_ok() => {
                    since = Some(cursor);
                    continue;
                }
                Err(failure) => failure.to_string(),
            };
            tracing::debug!(%server, why, "a poll failed; asking for a snapshot");
            // All nodes lose a server at once; and one that fails every poll must not be asked in a loop.
            let pause = if asked.elapsed() < POLL_PAUSE {
                POLL_PAUSE
            } else {
                POLL_PAUSE.mul_f64(rand::random_range(0.1..0.5))
            };
            sleep(pause).await;
            since = None;
        }
    }

    async fn renew_as(&self, lease: &Lease, formerly: Option<IpAddr>) -> Result<Lease, StoreError> {
        let ask = Ask {
            doing: "renew the lease",
            method: Method::PUT,
            path: format!("{}/leases/{}", self.base, old_key(lease.subnet)),
            body: lease_json(lease),
            previous: None,
            formerly,
            about: Some(&lease.subnet),
            timeout: REQUEST_TIMEOUT,
        };
        let answer = self.ask(&ask).await?;
        let read = parse_lease_end(&answer.body).map_err(|error| garbled(ask.doing, error))?;
        Ok(Lease {
            expiration: read,
            ..lease.clone()
        })
    }

    fn config_ask(&self) -> Ask<'static> {
        Ask {
            doing: "read the network config",
            method: Method::GET,
            path: format!("{}/config", self.base),
            body: String::new(),
            previous: None,
            formerly: None,
            about: None,
            timeout: REQUEST_TIMEOUT,
        }
    }

    fn leases_ask(&self, cursor: Option<&Cursor>) -> Ask<'static> {
        let (path, timeout) = match cursor {
            Some(cursor) => (format!("{}/leases?next={}", self.base, cursor.0), POLL_TIMEOUT),
            None => (format!("{}/leases", self.base), REQUEST_TIMEOUT),
        };
        Ask {
            doing: "watch the leases",
            method: Method::GET,
            path,
            body: String::new(),
            previous: None,
            formerly: None,
            about: None,
            timeout,
        }
    }

    async fn act(
        &self,
        doing: &'static str,
        method: Method,
        path: String,
        subnet: &Subnet,
    ) -> Result<(), StoreError> {
        let ask = Ask {
            doing,
            method,
            path,
            body: String::new(),
            previous: None,
            formerly: None,
            about: Some(subnet),
            timeout: REQUEST_TIMEOUT,
        };
        self.ask(&ask).await.map(drop)
    }
}

impl Store for RemoteStore {
    fn place(&self) -> String {
        let servers: Vec<String> = self.servers.iter().map(ToString::to_string).collect();
        format!("server {}", servers.join(","))
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async move { Ok(self.ask(&self.config_ask()).await?.body.trim().to_owned()) })
    }

    fn acquire<'a>(
        &'a self,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(async move {
            let ask = Ask {
                doing: "acquire a lease",
                method: Method::POST,
                path: format!("{}/leases", self.base),
                body: attrs_json(attrs),
                previous,
                formerly: None,
                about: None,
                timeout: REQUEST_TIMEOUT,
            };
            let answer = self.ask(&ask).await?;
            let read = parse_lease(&answer.body).map_err(|error| garbled(ask.doing, error.to_string()))?;
            Ok(Lease {
                subnet: read.subnet,
                attrs: attrs.clone(),
                expiration: read.expiration,
                created: None,
            })
        })
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.renew_as(lease, None))
    }

    fn readdress<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        lease: &'a Lease,
        formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        let v4 = Some(formerly.public_ip).filter(|addr| !addr.is_unspecified());
        let formerly = v4.map(IpAddr::V4).or(formerly.public_ipv6.map(IpAddr::V6));
        Box::pin(self.renew_as(lease, formerly))
    }

    fn revoke(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let path = format!("{}/leases/{}", self.base, old_key(subnet));
            self.act("revoke the lease", Method::DELETE, path, &subnet).await
        })
    }

    fn reserve<'a>(&'a self, subnet: Subnet, attrs: &'a LeaseAttrs) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let ask = Ask {
                doing: "reserve the subnet",
                method: Method::POST,
                path: format!("{}/reservations", self.base),
                body: format!(
                    "{{\"Subnet\":\"{}\",\"PublicIP\":\"{}\"}}",
                    subnet.v4, attrs.public_ip
                ),
                previous: None,
                formerly: None,
                about: None,
                timeout: REQUEST_TIMEOUT,
            };
            self.ask(&ask).await.map(drop)
        })
    }

    fn unreserve(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let path = format!("{}/reservations/{}", self.base, old_key(subnet));
            self.act("end the reservation", Method::DELETE, path, &subnet)
                .await
        })
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        enum Step {
            Poll(Option<Cursor>),
            End,
        }
        stream::unfold(Step::Poll(since), move |step| async move {
            let Step::Poll(since) = step else {
                return None;
            };
            Some(match self.poll(since).await {
                Ok(item) => {
                    let next = Step::Poll(Some(item.cursor.clone()));
                    (Ok(item), next)
                }
                Err(error) => (Err(error), Step::End),
            })
        })
        .boxed()
    }
}

/// Whether a cursor survives being put into a URL as it is.
fn is_plain_cursor(cursor: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=200).contains(&cursor.len()) && cursor.bytes().all(plain)
}

/// Reads the answer to a watch. A cursor goes into a URL as it is, so one that would not survive that is refused.
fn read_watch(body: &str) -> Result<(Option<LeaseUpdate>, Cursor), StoreError> {
    const DOING: &str = "watch the leases";
    let answer = parse_watch(body).map_err(|error| garbled(DOING, error))?;
    if answer.skipped > 0 {
        tracing::debug!(count = answer.skipped, "skipped leases that cannot be read");
    }
    if !is_plain_cursor(&answer.cursor) {
        return Err(garbled(
            DOING,
            format!("the cursor {:?} is malformed", answer.cursor),
        ));
    }
    Ok((answer.update, Cursor(answer.cursor)))
}

/// What the paths of a network begin with. A name needs no escaping.
fn base(name: Option<&NetworkName>) -> String {
    format!("/v1/{}", name.map_or("_", NetworkName::as_str))
}

/// The end of a renewed lease, whatever became of its attributes on the way.
fn parse_lease_end(body: &str) -> Result<crate::lease::Expiration, String> {
    let object = crate::lease::json::Object::parse(body, objects::MAX_LEASE_BYTES * 2)
        .map_err(|error| error.to_string())?;
    let text = object.string("Expiration").map_err(|error| error.to_string())?;
    let text = text.ok_or_else(|| "Expiration is missing".to_owned())?;
    objects::parse_time(&text).ok_or_else(|| format!("Expiration is {text:?}: must be an RFC 3339 time"))
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
        (ErrorKind::Refused | ErrorKind::LeaseLost, _) => StoreError::Refused { doing, cause },
        (ErrorKind::Unavailable, _) => StoreError::Unavailable {
            doing,
            place: format!("server {server}"),
            cause,
        },
    })
}

/// An answer that makes no sense: the server, or something in between, may come to its senses.
fn garbled(doing: &'static str, why: String) -> StoreError {
    StoreError::Unavailable {
        doing,
        place: "server".to_owned(),
        cause: format!("the answer makes no sense: {why}"),
    }
}

/// The key under which every server knows a lease: its IPv4 half.
fn old_key(subnet: Subnet) -> Subnet {
    Subnet { v6: None, ..subnet }
}

/// The innermost cause, which says what happened; hyper's outer words say only that something did.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
