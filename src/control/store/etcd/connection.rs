//! The connection to etcd: which member, how it is secured, how long it is waited for, and what its refusals mean.
//!
//! One member is spoken to at a time, the one that answers first when all are asked at once: an endpoint that is dead or
//! hangs costs nothing beside one that lives (flannel's default names two, of which one is always dead). What they are
//! asked takes a quorum to answer, so a member that is cut off from the others is not chosen. After a failure the next
//! request asks all again, and certificates are read again.
//!
//! *Login.* A token is got for each connection, over verified TLS if it is TLS, and a new one when etcd has forgotten
//! it. An etcd whose authentication is off is spoken to without, as flannel does.
//!
//! *History.* Etcd's revision only grows, and a cluster keeps its id. If either is not so, the store was wiped, restored
//! from a backup, or is another one: that is said loudly and counted ([`Connection::resets`]); whoever lists next sees
//! the rest.
//!
//! Limits: endpoints are all `https://` or all `http://`; one that is not would be the way around the others.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, GetOptions, ResponseHeader};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::watch;
use tokio::time::timeout;

use super::EtcdOptions;
use super::tls::TlsFiles;
use crate::control::RateLimit;
use crate::control::store::StoreError;

/// Ping interval of a connection in use. Etcd ends connections that are pinged more often than that.
const PING: Duration = Duration::from_secs(5);

/// How long a ping may go unanswered: a black hole is noticed in 9 s.
const PONG: Duration = Duration::from_secs(4);

/// One request; etcd answers in milliseconds, and in a second or two while it elects a leader.
const REQUEST: Duration = Duration::from_secs(5);

/// What a request needs etcd's permission for; named if etcd refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// Nothing that roles are about.
    None,
    /// To read one key.
    Read(String),
    /// To read all keys that begin so.
    ReadAll(String),
    /// To read and write one key.
    Write(String),
}

impl Right {
    /// What to do about its lack.
    fn lacking(&self) -> String {
        match self {
            Self::None => "the request".to_owned(),
            Self::Read(key) => format!("to read {key} (etcdctl role grant-permission ROLE read {key})"),
            Self::ReadAll(prefix) => format!(
                "to read what begins with {prefix} (etcdctl role grant-permission --prefix ROLE read {prefix})"
            ),
            Self::Write(key) => {
                format!("to read and write {key} (etcdctl role grant-permission ROLE readwrite {key})")
            }
        }
    }
}

/// A member's URL.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Endpoint {
    url: String,
    tls: bool,
}

/// What is known of etcd's history.
#[derive(Debug, Default)]
struct History {
    cluster: Option<u64>,
    revision: i64,
}

/// A way to etcd.
pub(super) struct Connection {
    /// Endpoints and prefix, for errors.
    place: String,
    endpoints: Vec<Endpoint>,
    options: ConnectOptions,
    login: Option<(String, String)>,
    tls: Option<TlsFiles>,
    /// The key that is asked for to see whether a member answers.
    probe: String,
    /// Speaks to one member; `None` before the first request and after a failure.
    client: Mutex<Option<Client>>,
    /// How many there have been.
    clients: watch::Sender<u64>,
    history: Mutex<History>,
    resets: AtomicU64,
    login_notes: RateLimit,
}

impl Connection {
    pub(super) fn new(options: &EtcdOptions, place: String, probe: String) -> Result<Self, StoreError> {
        let connect = ConnectOptions::new()
            .with_keep_alive(PING, PONG)
            // Without a request under way etcd takes a ping every two hours only; the next request will tell.
            .with_keep_alive_while_idle(false)
            .with_timeout(REQUEST)
            .with_connect_timeout(REQUEST)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        let endpoints = endpoints(options)?;
        let tls = match endpoints.iter().any(|endpoint| endpoint.tls) {
            true => Some(TlsFiles::open(options)?),
            false => None,
        };
        let login = (!options.username.is_empty() && !options.password.is_empty())
            .then(|| (options.username.clone(), options.password.clone()));
        if tls.is_none() {
            warn_of_plain_text(options, login.is_some(), &endpoints);
        }
        Ok(Self {
            place,
            endpoints,
            options: connect,
            login,
            tls,
            probe,
            client: Mutex::new(None),
            clients: watch::Sender::new(0),
            history: Mutex::default(),
            resets: AtomicU64::new(0),
            login_notes: RateLimit::default(),
        })
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Has the next request look for a member that answers, over a connection of its own.
    pub(super) fn distrust(&self) {
        *self.slot() = None;
    }

    /// Tells of every client that is there instead of the one there is now.
    pub(super) fn moves(&self) -> watch::Receiver<u64> {
        self.clients.subscribe()
    }

    /// How often etcd was found wiped, restored or exchanged.
    pub(super) fn resets(&self) -> u64 {
        self.resets.load(Ordering::Relaxed)
    }

    /// The client in use, or a new one for the member that answers first.
    pub(super) async fn client(&self, doing: &'static str) -> Result<Client, StoreError> {
        if let Some(client) = self.slot().clone() {
            return Ok(client);
        }
        let mut members: FuturesUnordered<_> = self
            .endpoints
            .iter()
            .map(|endpoint| async move { (endpoint, self.connect(doing, endpoint).await) })
            .collect();
        let (mut refusal, mut causes) = (None, Vec::new());
        while let Some((endpoint, connected)) = members.next().await {
            match connected {
                Ok(client) => {
                    *self.slot() = Some(client.clone());
                    self.clients.send_modify(|clients| *clients += 1);
                    return Ok(client);
                }
                Err(StoreError::Unavailable { cause, .. }) => {
                    causes.push(format!("{}: {cause}", endpoint.url))
                }
                // What a member that answers says is worth more than that another one does not.
                Err(error) => refusal = Some(error),
            }
        }
        Err(refusal.unwrap_or_else(|| self.unavailable(doing, causes.join("; "))))
    }

    async fn connect(&self, doing: &'static str, endpoint: &Endpoint) -> Result<Client, StoreError> {
        let mut options = self.options.clone();
        if let Some(tls) = self.tls.as_ref().filter(|_| endpoint.tls) {
            options = options.with_tls(tls.current());
        }
        let url = [endpoint.url.as_str()];
        let connected = match &self.login {
            None => timeout(REQUEST, Client::connect(url, Some(options))).await,
            Some((user, password)) => {
                let with_user = options.clone().with_user(user.as_str(), password.as_str());
                match timeout(REQUEST, Client::connect(url, Some(with_user))).await {
                    Ok(Err(Error::GRpcStatus(status)))
                        if status.message().contains("authentication is not enabled") =>
                    {
                        if self.login_notes.allows() {
                            tracing::warn!(
                                endpoint = endpoint.url,
                                user,
                                "etcd's authentication is off: user and password are not needed"
                            );
                        }
                        timeout(REQUEST, Client::connect(url, Some(options))).await
                    }
                    connected => connected,
                }
            }
        };
        let mut client = self.settle(doing, &Right::None, connected)?;
        let floor = self.history().revision;
        // Connecting proves nothing; an answer does, even a refusal. This one takes a quorum.
        let count = Some(GetOptions::new().with_count_only());
        match self
            .ask(doing, &Right::None, client.get(self.probe.as_str(), count))
            .await
        {
            Err(error) if error.is_unavailable() => return Err(error),
            Err(_) => {}
            Ok(answer) => self.check_history(answer.header(), floor),
        }
        Ok(client)
    }

    fn slot(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one request, never longer than [`REQUEST`].
    pub(super) async fn ask<T>(
        &self,
        doing: &'static str,
        right: &Right,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, StoreError> {
        self.settle(doing, right, timeout(REQUEST, request).await)
    }

    fn settle<T>(
        &self,
        doing: &'static str,
        right: &Right,
        answer: Result<Result<T, Error>, tokio::time::error::Elapsed>,
    ) -> Result<T, StoreError> {
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.error(doing, right, &error)),
            Err(_) => Err(self.unavailable(doing, format!("no answer within {} s", REQUEST.as_secs()))),
        }
    }

    /// Notes the revision that an answer was given at.
    pub(super) fn saw(&self, revision: i64) {
        let mut history = self.history();
        history.revision = history.revision.max(revision);
    }

    /// The highest revision seen: what is asked from here on, with a quorum, has this one at least.
    pub(super) fn floor(&self) -> i64 {
        self.history().revision
    }

    /// Looks whether the answer to a question asked after [`floor`](Self::floor) was `floor` goes on with the history known.
    pub(super) fn check_history(&self, header: Option<&ResponseHeader>, floor: i64) {
        let Some(header) = header else { return };
        let (cluster, revision) = (header.cluster_id(), header.revision());
        let mut history = self.history();
        let other = history.cluster.is_some_and(|known| known != cluster);
        if other || revision < floor {
            // Two requests may find out; one tells.
            if other || history.revision >= floor {
                self.resets.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    store = self.place,
                    cluster = format!("{cluster:x}"),
                    cluster_before = history.cluster.map(|id| format!("{id:x}")),
                    revision,
                    revision_before = history.revision,
                    "etcd is not the one it was: wiped, restored from a backup, or another cluster; \
                     peers stay for a while, and every node registers anew"
                );
            }
            history.revision = revision;
        }
        history.cluster = Some(cluster);
        history.revision = history.revision.max(revision);
    }

    pub(super) fn error(&self, doing: &'static str, right: &Right, error: &Error) -> StoreError {
        let Error::GRpcStatus(status) = error else {
            return self.unavailable(doing, words(error));
        };
        // The words of gRPC's code, since etcd-client does not show the type: an answer, and a no.
        let code = format!("{:?}", status.code());
        let answers = [
            "InvalidArgument",
            "Unauthenticated",
            "PermissionDenied",
            "FailedPrecondition",
        ];
        if answers.contains(&code.as_str()) {
            return self.refusal(doing, right, status.message());
        }
        self.unavailable(doing, format!("{code}: {}", words(error)))
    }

    /// Says in full what etcd's refusal `says` means.
    pub(super) fn refusal(&self, doing: &'static str, right: &Right, says: &str) -> StoreError {
        let who = match &self.login {
            Some((user, _)) => format!("the user {user:?}"),
            None if self.tls.is_some() => "the user of the client certificate".to_owned(),
            None => "nobody in particular".to_owned(),
        };
        let about_login = ["auth token", "auth store is old", "user name is empty"];
        if about_login.iter().any(|words| says.contains(words)) {
            // The next request logs in again.
            *self.slot() = None;
        }
        let cause = if says.contains("permission denied") {
            format!("etcd says: {says}; {who} lacks the right {}", right.lacking())
        } else if says.contains("authentication failed") {
            format!("etcd says: {says}; check {who} and the password")
        } else if says.contains("user name is empty") {
            format!(
                "etcd says: {says}; it wants a user: give --etcd-username and --etcd-password, or a client certificate \
                 whose common name is one"
            )
        } else {
            format!("etcd says: {says}")
        };
        refused(doing, &cause)
    }

    /// Reports a failure, and has the next request look for a member that answers.
    pub(super) fn unavailable(&self, doing: &'static str, cause: String) -> StoreError {
        *self.slot() = None;
        StoreError::Unavailable {
            doing,
            place: self.place.clone(),
            cause,
        }
    }
}

pub(super) fn refused(doing: &'static str, cause: &str) -> StoreError {
    StoreError::Refused {
        doing,
        cause: cause.to_owned(),
    }
}

/// Reads the endpoints; without a scheme they are as the certificates given suggest.
fn endpoints(options: &EtcdOptions) -> Result<Vec<Endpoint>, StoreError> {
    let files = options.cafile.is_some() || options.certfile.is_some();
    read_endpoints(&options.endpoints, files).map_err(|cause| refused("open the store", &cause))
}

/// Whether these are endpoints of etcd; what is wrong is said without what may be secret.
///
/// # Errors
/// None is given, one is no URL that leads to etcd, or some are encrypted and some not.
pub fn check_endpoints(endpoints: &[String], files: bool) -> Result<(), String> {
    read_endpoints(endpoints, files).map(drop)
}

/// Reads endpoints; without a scheme they are encrypted if `files` of certificates are given. Else it says what is wrong, without what may be
/// secret.
fn read_endpoints(texts: &[String], files: bool) -> Result<Vec<Endpoint>, String> {
    let mut endpoints = Vec::new();
    for text in texts {
        let (tls, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (true, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (false, rest),
            Some((scheme, _)) => {
                return Err(format!(
                    "the etcd endpoint is {scheme}://...: must be http:// or https://"
                ));
            }
            None => (files, text.as_str()),
        };
        if rest.contains('@') {
            let cause = "an etcd endpoint has a user in it; give --etcd-username and --etcd-password instead";
            return Err(cause.to_owned());
        }
        if matches!(rest.chars().next(), None | Some('/' | ':' | '?' | '#')) {
            return Err(format!("the etcd endpoint is {text}: must name a host"));
        }
        let scheme = if tls { "https" } else { "http" };
        let url = format!("{scheme}://{rest}");
        if let Err(error) = url.parse::<hyper::Uri>() {
            return Err(format!("the etcd endpoint is {text}: {error}"));
        }
        endpoints.push(Endpoint { url, tls });
    }
    let Some(first) = endpoints.first() else {
        return Err("no etcd endpoint is given".to_owned());
    };
    if let Some(other) = endpoints.iter().find(|other| other.tls != first.tls) {
        return Err(format!(
            "of the etcd endpoints {} and {} one is encrypted and one is not; make them all https://, or all http://",
            first.url, other.url
        ));
    }
    Ok(endpoints)
}

/// Of which endpoints it was told: a process opens more than one way to them.
static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn warn_of_plain_text(options: &EtcdOptions, login: bool, endpoints: &[Endpoint]) {
    let urls: Vec<_> = endpoints.iter().map(|endpoint| endpoint.url.as_str()).collect();
    let urls = urls.join(",");
    if !TOLD
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(urls.clone())
    {
        return;
    }
    if options.cafile.is_some() || options.certfile.is_some() {
        tracing::warn!(
            endpoints = urls,
            "certificates are given, but the endpoints are http://: nothing is encrypted or verified"
        );
    }
    let local = |url: &str| {
        ["http://127.", "http://localhost", "http://[::1]"]
            .iter()
            .any(|start| url.starts_with(start))
    };
    if login && !endpoints.iter().all(|endpoint| local(&endpoint.url)) {
        tracing::warn!(
            endpoints = urls,
            "the password for etcd crosses the network in plain text; use https://"
        );
    }
}

/// What an error says, and its causes, which say more.
fn words(error: &Error) -> String {
    let (mut text, mut source) = match error {
        Error::TransportError(inner) => (inner.to_string(), inner.source()),
        Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        Error::InvalidArgs(_)
        | Error::InvalidUri(_)
        | Error::IoError(_)
        | Error::WatchError(_)
        | Error::Utf8Error(_)
        | Error::LeaseKeepAliveError(_)
        | Error::ElectError(_)
        | Error::InvalidMetadataValue(_)
        | Error::EndpointError(_)
        | Error::EndpointsNotManaged
        | Error::Internal(_) => (error.to_string(), None),
    };
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) && more != "transport error" {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(endpoints: &[&str], cafile: Option<&str>) -> Result<Vec<String>, String> {
        let options = EtcdOptions {
            endpoints: endpoints.iter().map(|&url| url.to_owned()).collect(),
            cafile: cafile.map(Into::into),
            ..EtcdOptions::default()
        };
        match super::endpoints(&options) {
            Ok(endpoints) => Ok(endpoints.into_iter().map(|endpoint| endpoint.url).collect()),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn an_endpoint_without_a_scheme_is_encrypted_if_there_is_a_root_to_verify_by() {
        assert_eq!(urls(&["a:1"], None).unwrap(), ["http://a:1"]);
        assert_eq!(
            urls(&["a:1", "https://b:2"], Some("ca.pem")).unwrap(),
            ["https://a:1", "https://b:2"]
        );
        assert_eq!(urls(&["HTTPS://a:1"], None).unwrap(), ["https://a:1"]);
    }

    #[test]
    fn no_plain_way_around_an_encrypted_one() {
        for bad in [
            vec!["https://a:1", "http://b:1"],
            vec!["http://a:1", "https://b:1"],
            vec!["https://a:1", "b:1"],
        ] {
            let error = urls(&bad, None).unwrap_err();
            assert!(error.contains("all https://"), "{error}");
        }
    }

    #[test]
    fn strange_endpoints_are_refused_and_their_secrets_not_repeated() {
        assert!(urls(&[], None).unwrap_err().contains("no etcd endpoint"));
        assert!(urls(&["unix:///run/etcd"], None).unwrap_err().contains("unix://"));
        for nowhere in ["http://", "https://:2379", ":2379", "http:///path"] {
            let error = urls(&[nowhere], None).unwrap_err();
            assert!(error.contains("must name a host"), "{nowhere}: {error}");
        }
        let error = urls(&["https://root:hunter2@a:1"], None).unwrap_err();
        assert!(
            !error.contains("hunter2") && error.contains("--etcd-username"),
            "{error}"
        );
    }
}
