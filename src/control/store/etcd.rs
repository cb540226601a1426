//! Leases in etcd v3, in flannel's key space.
//!
//! `PREFIX/config` holds the config, `PREFIX/subnets/A.B.C.D-LEN` one lease each, bound to an etcd lease of its own
//! that makes it end. Keys and values are flannel's to the byte, because flanneld reads them; nothing else is ever
//! written under `PREFIX`. Claims are transactions: create if the key has version 0, update and delete if it still has
//! the mod revision read.
//!
//! A watch lists first, page by page at one revision, then watches from the next revision on, so that nothing between
//! is missed. Four things end or restart it:
//!
//! - The stream breaks: the watch ends with an error, and the caller watches anew, from a list.
//! - The revision was compacted away, or etcd's history is shorter than the cursor (restored from a backup): it lists
//!   again by itself and goes on with a snapshot.
//! - Nothing comes. HTTP/2 pings find a dead connection; a server that answers pings but has lost its
//!   leader or hangs is found by asking for a progress notice and by `require-leader`.
//! - A key or value cannot be read: it is skipped, counted and told once a minute, and the watch goes on. It stands
//!   for nothing, not for a removal.
//!
//! Limits: how much time other nodes' leases have left is asked for only with [`Expirations::Ask`], one round trip per
//! lease; otherwise `expiration` of a listed lease is an upper bound.

mod connection;
mod networks;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, EventType, GetOptions, KeyValue, PutOptions, Txn, TxnOp, WatchOptions, WatchResponse,
    WatchStream,
};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::timeout;

use self::connection::{Connection, refused};
pub use self::networks::EtcdNetworks;
use crate::control::RateLimit;
use crate::control::store::{
    Cursor, Entry, LEASE_TTL, Lifetime, LocalStore, Registry, StoreError, WatchItem, expires_in,
};
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};

/// Flannel's default for `--etcd-prefix`.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

/// How long a watch may be quiet before it is asked for a progress notice; after as long again it is given up.
const QUIET: Duration = Duration::from_secs(15);

/// Keys per page of a list: about 200 kB of flannel's values.
const PAGE: i64 = 1000;

/// The largest answer taken: a page of hostile values, 1.5 MB each, must not stop the list.
const MAX_ANSWER: usize = 2 << 30;

/// How the expiration of a listed lease is found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expirations {
    /// It is not: a full lease time from now on is assumed. For nodes, which do not look at it.
    Assume,
    /// Etcd is asked, lease by lease. For servers, which tell clients when their lease ends.
    Ask,
}

/// How to reach etcd, and what in it is ours.
#[derive(Clone)]
pub struct EtcdOptions {
    /// URLs of the members.
    pub endpoints: Vec<String>,
    /// The key prefix of the network.
    pub prefix: String,
    /// User name; used with a password only.
    pub username: String,
    /// Password; used with a user name only.
    pub password: String,
    /// PEM file with root certificates.
    pub cafile: Option<PathBuf>,
    /// PEM file with the client certificate; used with a key only.
    pub certfile: Option<PathBuf>,
    /// PEM file with the client's key; used with a certificate only.
    pub keyfile: Option<PathBuf>,
    /// How long a lease lives without renewal.
    pub ttl: Duration,
    /// How the expiration of a listed lease is found out.
    pub expirations: Expirations,
}

impl std::fmt::Debug for EtcdOptions {
    /// Leaves the password out.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

impl Default for EtcdOptions {
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            prefix: DEFAULT_PREFIX.to_owned(),
            username: String::new(),
            password: String::new(),
            cafile: None,
            certfile: None,
            keyfile: None,
            ttl: LEASE_TTL,
            expirations: Expirations::Assume,
        }
    }
}

/// A store in etcd.
pub type EtcdStore = LocalStore<EtcdRegistry>;

impl EtcdStore {
    /// Opens the store; etcd itself is not asked yet.
    ///
    /// # Errors
    /// A certificate file cannot be read, or no endpoint is given.
    pub fn connect(options: EtcdOptions) -> Result<Self, StoreError> {
        EtcdRegistry::new(options).map(Self::new)
    }
}

/// One network's keys in etcd.
pub struct EtcdRegistry {
    connection: Connection,
    /// Clean: no trailing or double slash.
    prefix: String,
    ttl: Duration,
    expirations: Expirations,
    skipped: AtomicU64,
    complaints: RateLimit,
}

impl std::fmt::Debug for EtcdRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdRegistry")
            .field("place", &self.place())
            .finish_non_exhaustive()
    }
}

impl EtcdRegistry {
    fn new(options: EtcdOptions) -> Result<Self, StoreError> {
        let prefix = clean(&options.prefix);
        Ok(Self {
            connection: Connection::new(&options, format!("etcd {} {prefix}", options.endpoints.join(",")))?,
            prefix,
            ttl: options.ttl,
            expirations: options.expirations,
            skipped: AtomicU64::new(0),
            complaints: RateLimit::default(),
        })
    }

    /// The key of a lease.
    pub fn key(&self, subnet: Subnet) -> String {
        format!("{}{subnet}", self.subnets())
    }

    /// What every lease key begins with. The slash at the end keeps look-alikes such as `subnets-old/` out.
    fn subnets(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }

    async fn list_at_revision(&self) -> Result<(Vec<Entry>, u64), StoreError> {
        const DOING: &str = "list the leases";
        let mut kv = self
            .connection
            .client(DOING)
            .await?
            .kv_client()
            .max_decoding_message_size(MAX_ANSWER);
        let prefix = self.subnets();
        let end = prefix_end(&prefix);
        let (mut from, mut revision, mut entries) = (prefix.into_bytes(), 0, Vec::new());
        loop {
            let page = GetOptions::new()
                .with_range(end.clone())
                .with_limit(PAGE)
                .with_revision(revision);
            let mut answer = self.connection.ask(DOING, kv.get(from, Some(page))).await?;
            if revision == 0 {
                revision = answer.header().map_or(0, |header| header.revision());
            }
            let (more, kvs) = (answer.more(), answer.take_kvs());
            let last = kvs.last().map(|kv| kv.key().to_vec());
            entries.extend(kvs.iter().filter_map(|kv| self.entry(kv)));
            match last {
                Some(mut last) if more => {
                    last.push(0);
                    from = last;
                }
                Some(_) | None => break,
            }
        }
        if self.expirations == Expirations::Ask {
            entries = stream::iter(entries)
                .map(|entry| self.with_expiration(entry))
                .buffered(16)
                .collect()
                .await;
        }
        Ok((
            entries.into_iter().map(|(entry, _)| entry).collect(),
            revision.unsigned_abs(),
        ))
    }

    /// The entry a key and its value are, with the id of its etcd lease.
    fn entry(&self, kv: &KeyValue) -> Option<(Entry, i64)> {
        let subnet = self.subnet(kv)?;
        let attrs = match LeaseAttrs::from_json(kv.value()) {
            Ok(attrs) => attrs,
            Err(error) => {
                self.skip(kv, &error.to_string());
                return None;
            }
        };
        let expiration = match kv.lease() {
            0 => Expiration::Never,
            _ => expires_in(self.ttl),
        };
        let lease = Lease {
            subnet,
            attrs,
            expiration,
        };
        let revision = kv.mod_revision().unsigned_abs();
        Some((Entry { lease, revision }, kv.lease()))
    }

    fn subnet(&self, kv: &KeyValue) -> Option<Subnet> {
        let prefix = self.subnets();
        let name = kv.key().strip_prefix(prefix.as_bytes()).unwrap_or_default();
        let key = std::str::from_utf8(name).map_err(|error| error.to_string());
        match key.and_then(|key| {
            key.parse()
                .map_err(|error: crate::lease::KeyError| error.to_string())
        }) {
            Ok(subnet) => Some(subnet),
            Err(error) => {
                self.skip(kv, &error);
                None
            }
        }
    }

    fn skip(&self, kv: &KeyValue, error: &str) {
        let skipped = self.skipped.fetch_add(1, Ordering::Relaxed) + 1;
        if self.complaints.allows() {
            let key: String = String::from_utf8_lossy(kv.key()).chars().take(200).collect();
            tracing::warn!(?key, error, skipped, "skipping a key that is no lease");
        }
    }

    /// Asks how much time the lease has left. If etcd does not say, it counts as ending at once: whoever renews it too
    /// early does no harm.
    async fn with_expiration(&self, (mut entry, id): (Entry, i64)) -> (Entry, i64) {
        const DOING: &str = "ask when a lease ends";
        if id != 0 {
            let left = async {
                let mut client = self.connection.client(DOING).await?;
                self.connection
                    .ask(DOING, client.lease_time_to_live(id, None))
                    .await
            };
            let left = left.await.map_or(0, |answer| answer.ttl().max(0));
            entry.lease.expiration = expires_in(Duration::from_secs(left.unsigned_abs()));
        }
        (entry, id)
    }

    /// Carries out `put` if `condition` holds, bound to a fresh etcd lease unless it is to live for ever.
    async fn put_if(
        &self,
        doing: &'static str,
        condition: Compare,
        subnet: Subnet,
        attrs: &LeaseAttrs,
        lifetime: Lifetime,
    ) -> Result<Option<Entry>, StoreError> {
        let mut client = self.connection.client(doing).await?;
        let grant = match lifetime {
            Lifetime::Forever => None,
            Lifetime::Ttl => {
                let seconds = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX);
                Some(
                    self.connection
                        .ask(doing, client.lease_grant(seconds, None))
                        .await?,
                )
            }
        };
        let id = grant.as_ref().map_or(0, |grant| grant.id());
        let put = TxnOp::put(
            self.key(subnet),
            attrs.to_json(),
            Some(PutOptions::new().with_lease(id)),
        );
        let txn = Txn::new().when([condition]).and_then([put]);
        let answer = self.connection.ask(doing, client.txn(txn)).await?;
        if !answer.succeeded() {
            if id != 0 {
                // Nothing hangs on it; if this fails, it runs out by itself.
                let _ = self.connection.ask(doing, client.lease_revoke(id)).await;
            }
            return Ok(None);
        }
        let expiration = match grant {
            None => Expiration::Never,
            Some(grant) => expires_in(Duration::from_secs(grant.ttl().unsigned_abs())),
        };
        Ok(Some(Entry {
            lease: Lease {
                subnet,
                attrs: attrs.clone(),
                expiration,
            },
            revision: answer
                .header()
                .map_or(0, |header| header.revision())
                .unsigned_abs(),
        }))
    }

    async fn open_watch(&self, revision: u64) -> Result<Box<Following>, StoreError> {
        const DOING: &str = "watch the leases";
        let mut watch = self
            .connection
            .client(DOING)
            .await?
            .watch_client()
            .max_decoding_message_size(MAX_ANSWER);
        let from = i64::try_from(revision).unwrap_or(i64::MAX).saturating_add(1);
        let prefix = self.subnets();
        let options = WatchOptions::new()
            .with_range(prefix_end(&prefix))
            .with_start_revision(from)
            .with_progress_notify();
        let stream = self
            .connection
            .ask(DOING, watch.watch(prefix, Some(options)))
            .await?;
        Ok(Box::new(Following { stream, revision }))
    }

    /// The next state of a watch, and what it tells on the way there.
    async fn advance(&self, progress: Progress) -> Result<(WatchItem, Progress), StoreError> {
        let mut following = match progress {
            Progress::List => return self.snapshot().await,
            Progress::From(revision) => self.open_watch(revision).await?,
            Progress::Following(following) => following,
        };
        loop {
            let answer = self.next_answer(&mut following.stream).await?;
            let current = answer
                .header()
                .map_or(0, |header| header.revision())
                .unsigned_abs();
            if answer.compact_revision() != 0 || (answer.created() && current < following.revision) {
                return self.snapshot().await;
            }
            if answer.canceled() {
                let cause = format!("etcd ended the watch: {}", answer.cancel_reason());
                return Err(self.connection.unavailable("watch the leases", cause));
            }
            let events = self.events(&answer).await;
            match answer
                .events()
                .iter()
                .filter_map(|event| event.kv())
                .map(KeyValue::mod_revision)
                .max()
            {
                Some(revision) => following.revision = revision.unsigned_abs(),
                None if answer.created() => {}
                // A progress notice: everything up to its revision has been told.
                None => following.revision = following.revision.max(current),
            }
            if !events.is_empty() {
                let item = WatchItem {
                    update: LeaseUpdate::Events(events),
                    cursor: Cursor(following.revision.to_string()),
                };
                return Ok((item, Progress::Following(following)));
            }
        }
    }

    async fn snapshot(&self) -> Result<(WatchItem, Progress), StoreError> {
        let (entries, revision) = self.list_at_revision().await?;
        let item = WatchItem {
            update: LeaseUpdate::Snapshot(entries.into_iter().map(|entry| entry.lease).collect()),
            cursor: Cursor(revision.to_string()),
        };
        Ok((item, Progress::From(revision)))
    }

    async fn next_answer(&self, stream: &mut WatchStream) -> Result<WatchResponse, StoreError> {
        const DOING: &str = "watch the leases";
        for _ in 0..2 {
            match timeout(QUIET, stream.message()).await {
                Ok(Ok(Some(answer))) => return Ok(answer),
                Ok(Ok(None)) => {
                    return Err(self.connection.unavailable(DOING, "the stream ended".to_owned()));
                }
                Ok(Err(error)) => return Err(self.connection.error(DOING, &error)),
                Err(_) => self.connection.ask(DOING, stream.request_progress()).await?,
            }
        }
        Err(self
            .connection
            .unavailable(DOING, "the watch fell silent".to_owned()))
    }

    async fn events(&self, answer: &WatchResponse) -> Vec<LeaseEvent> {
        let mut events = Vec::with_capacity(answer.events().len());
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => {
                    let Some(mut entry) = self.entry(kv) else { continue };
                    if self.expirations == Expirations::Ask {
                        entry = self.with_expiration(entry).await;
                    }
                    events.push(LeaseEvent::Added(entry.0.lease));
                }
                EventType::Delete => events.extend(self.subnet(kv).map(LeaseEvent::Removed)),
            }
        }
        events
    }
}

impl Registry for EtcdRegistry {
    fn place(&self) -> String {
        self.connection.place().to_owned()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        const DOING: &str = "read the network config";
        Box::pin(async move {
            let mut client = self.connection.client(DOING).await?;
            let key = format!("{}/config", self.prefix);
            let answer = self.connection.ask(DOING, client.get(key.as_str(), None)).await?;
            match answer.kvs().first() {
                Some(kv) => Ok(String::from_utf8_lossy(kv.value()).into_owned()),
                None => Err(refused(DOING, &format!("the key {key} does not exist"))),
            }
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move { Ok(self.list_at_revision().await?.0) })
    }

    fn create<'a>(
        &'a self,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        let absent = Compare::version(self.key(subnet), CompareOp::Equal, 0);
        Box::pin(self.put_if("create a lease", absent, subnet, attrs, lifetime))
    }

    fn update<'a>(
        &'a self,
        subnet: Subnet,
        revision: u64,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        let unchanged = unchanged(self.key(subnet), revision);
        Box::pin(self.put_if("renew a lease", unchanged, subnet, attrs, lifetime))
    }

    fn delete(&self, subnet: Subnet, revision: u64) -> BoxFuture<'_, Result<bool, StoreError>> {
        const DOING: &str = "delete a lease";
        Box::pin(async move {
            let key = self.key(subnet);
            let delete = TxnOp::delete(key.as_str(), None);
            let txn = Txn::new().when([unchanged(key, revision)]).and_then([delete]);
            let mut client = self.connection.client(DOING).await?;
            Ok(self.connection.ask(DOING, client.txn(txn)).await?.succeeded())
        })
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        let start = match since.as_ref().map(|cursor| cursor.0.parse()) {
            None => Ok(Progress::List),
            Some(Ok(revision)) => Ok(Progress::From(revision)),
            Some(Err(_)) => Err(refused("watch the leases", "the cursor is no etcd revision")),
        };
        match start {
            Err(error) => Box::pin(stream::once(async { Err(error) })),
            Ok(start) => Box::pin(stream::try_unfold(start, move |progress| async move {
                self.advance(progress).await.map(Some)
            })),
        }
    }

    fn skipped(&self) -> u64 {
        self.skipped.load(Ordering::Relaxed)
    }
}

/// Where a watch stands.
enum Progress {
    /// It lists next.
    List,
    /// It follows the changes after this revision next.
    From(u64),
    /// It follows the changes.
    Following(Box<Following>),
}

struct Following {
    stream: WatchStream,
    /// Everything up to here has been told.
    revision: u64,
}

fn unchanged(key: String, revision: u64) -> Compare {
    Compare::mod_revision(key, CompareOp::Equal, i64::try_from(revision).unwrap_or(i64::MAX))
}

/// The first key behind all keys that begin with `prefix`, which ends in a slash.
fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Joins and cleans a path as Go's `path.Join` does.
fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if path.starts_with('/') || parts.last().is_some_and(|&last| last != "..") => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let root = if path.starts_with('/') { "/" } else { "" };
    format!("{root}{}", parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_cleaned_as_go_does() {
        for (path, cleaned) in [
            ("/coreos.com/network", "/coreos.com/network"),
            ("/coreos.com//network///", "/coreos.com/network"),
            ("lab/network/", "lab/network"),
            ("/a/./b/../c", "/a/c"),
            ("/../a", "/a"),
        ] {
            assert_eq!(clean(path), cleaned);
        }
    }

    #[test]
    fn look_alikes_are_outside_the_range() {
        let end = prefix_end("/n/subnets/");
        let inside =
            |key: &str| key.as_bytes() >= "/n/subnets/".as_bytes() && key.as_bytes() < end.as_slice();
        assert!(inside("/n/subnets/10.0.0.0-24"));
        assert!(!inside("/n/subnets-old/10.0.0.0-24") && !inside("/n/subnetsX") && !inside("/n/subnets"));
    }
}
