//! Leases in etcd v3, in flannel's key space.
//!
//! `PREFIX/config` holds the config, `PREFIX/subnets/A.B.C.D-LEN` one lease each, bound to an etcd lease of its own
//! that makes it end. Keys and values there are flannel's to the byte, because flanneld reads them; nothing else is ever
//! written under `PREFIX/subnets`. Claims are transactions: create if the key has version 0, update and delete if it
//! still has the mod revision read. The etcd lease that a renewal leaves behind without a key is revoked.
//!
//! `following` is the watch, `connection` the way to etcd and what its refusals mean, `tls` the certificates, and
//! `presence` how two hosts with one public address find out, with keys under `PREFIX/kersey`.
//!
//! A key or value that cannot be read is counted and told once a minute. It stands for nothing, not for a removal; but a lease's
//! key with a value that cannot be read is there, and so its subnet is taken.
//!
//! Limits: how much time other nodes' leases have left is asked for only with [`Expirations::Ask`], one round trip per
//! lease; otherwise `expiration` of a listed lease is an upper bound.

mod connection;
mod following;
mod networks;
mod presence;
mod spares;
mod tls;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, GetOptions, KeyValue, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp,
    TxnOpResponse,
};
use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::Instant;

pub use self::connection::check_endpoints;
use self::connection::{Connection, Right, refused};
use self::following::Progress;
pub use self::networks::EtcdNetworks;
use self::presence::Presence;
use self::spares::{Grant, Spares};
use crate::control::RateLimit;
use crate::control::identity::Holder;
use crate::control::store::{
    Cursor, Entry, Expected, LEASE_TTL, Life, Lifetime, LocalStore, Registry, Rival, StoreError, WatchItem,
    expires_in,
};
use crate::lease::{Expiration, Lease, LeaseAttrs, Subnet};

/// Flannel's default for `--etcd-prefix`.
pub const DEFAULT_PREFIX: &str = "/coreos.com/network";

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
    connection: Arc<Connection>,
    /// Clean: no trailing or double slash.
    prefix: String,
    ttl: Duration,
    expirations: Expirations,
    skipped: AtomicU64,
    complaints: RateLimit,
    presence: Presence,
    spares: Spares,
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
        let place = format!("etcd {} {prefix}", options.endpoints.join(","));
        let connection = Arc::new(Connection::new(&options, place, format!("{prefix}/config"))?);
        Ok(Self {
            presence: Presence::new(Arc::clone(&connection), format!("{prefix}/kersey/nodes/")),
            connection,
            prefix,
            ttl: options.ttl,
            expirations: options.expirations,
            skipped: AtomicU64::new(0),
            complaints: RateLimit::default(),
            spares: Spares::default(),
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
        let right = Right::ReadAll(prefix.clone());
        let floor = self.connection.floor();
        let (mut from, mut revision, mut entries) = (prefix.into_bytes(), 0, Vec::new());
        loop {
            let page = GetOptions::new()
                .with_range(end.clone())
                .with_limit(PAGE)
                .with_revision(revision);
            let mut answer = self
                .connection
                .ask(DOING, &right, kv.get(from, Some(page)))
                .await?;
            if revision == 0 {
                self.connection.check_history(answer.header(), floor);
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

    /// The entry of a subnet, with the id of its etcd lease.
    async fn found(&self, subnet: Subnet) -> Result<Option<(Entry, i64)>, StoreError> {
        const DOING: &str = "look at a lease";
        let key = self.key(subnet);
        let right = Right::Read(key.clone());
        let mut client = self.connection.client(DOING).await?;
        let answer = self
            .connection
            .ask(DOING, &right, client.get(key.as_str(), None))
            .await?;
        Ok(answer.kvs().first().and_then(|kv| self.entry(kv)))
    }

    /// The entry a key and its value are, with the id of its etcd lease.
    fn entry(&self, kv: &KeyValue) -> Option<(Entry, i64)> {
        let subnet = self.subnet(kv)?;
        let (attrs, readable) = match LeaseAttrs::from_json(kv.value()) {
            Ok(attrs) => (attrs, true),
            Err(error) => {
                self.skip(kv, &error.to_string());
                (LeaseAttrs::of_nobody(), false)
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
            created: Some(kv.create_revision().unsigned_abs()),
        };
        let revision = kv.mod_revision().unsigned_abs();
        let entry = Entry {
            lease,
            revision,
            readable,
        };
        Some((entry, kv.lease()))
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
                    .ask(DOING, &Right::None, client.lease_time_to_live(id, None))
                    .await
            };
            let left = left.await.map_or(0, |answer| answer.ttl().max(0));
            entry.lease.expiration = expires_in(Duration::from_secs(left.unsigned_abs()));
        }
        (entry, id)
    }

    /// Writes if there is what is `expected`, bound to a fresh etcd lease unless it is to live for ever.
    async fn put_if(
        &self,
        expected: Expected,
        subnet: Subnet,
        attrs: &LeaseAttrs,
        lifetime: Lifetime,
    ) -> Result<Option<Entry>, StoreError> {
        let (doing, key) = (expected.doing(), self.key(subnet));
        let condition = match expected {
            Expected::Nothing => Compare::version(key.as_str(), CompareOp::Equal, 0),
            Expected::Revision(revision) => unchanged(key.clone(), revision),
        };
        let right = Right::Write(key.clone());
        let mut client = self.connection.client(doing).await?;
        let spare = match lifetime {
            Lifetime::Forever => None,
            Lifetime::Ttl => self.spares.take(attrs),
        };
        let grant = match (lifetime, spare) {
            (Lifetime::Forever, _) => None,
            (Lifetime::Ttl, Some(spare)) => Some(spare),
            (Lifetime::Ttl, None) => {
                let seconds = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX);
                let at = Instant::now();
                let granted = client.lease_grant(seconds, None);
                let granted = self.connection.ask(doing, &Right::None, granted).await?;
                Some(Grant {
                    id: granted.id(),
                    ttl: Duration::from_secs(granted.ttl().unsigned_abs()),
                    at,
                })
            }
        };
        let id = grant.map_or(0, |grant| grant.id);
        // Before the put: its event may be here before its answer.
        self.presence.wrote(subnet, attrs, id);
        let options = PutOptions::new().with_lease(id).with_prev_key();
        let put = TxnOp::put(key, attrs.to_json(), Some(options));
        let txn = Txn::new().when([condition]).and_then([put]);
        let answer = match self.connection.ask(doing, &right, client.txn(txn)).await {
            Ok(answer) => answer,
            Err(error) => {
                match grant {
                    // The write may have been made. The next one, likely the same, goes with the same etcd lease: one that fails
                    // again and again leaves one behind, not one each time.
                    Some(grant) if error.is_unavailable() => self.spares.keep(attrs, grant),
                    Some(_) | None => self.abandon(&mut client, id).await,
                }
                return Err(error);
            }
        };
        if !answer.succeeded() {
            self.abandon(&mut client, id).await;
            return Ok(None);
        }
        let revision = answer.header().map_or(0, |header| header.revision());
        self.connection.saw(revision);
        let before = answer
            .op_responses()
            .into_iter()
            .find_map(|response| match response {
                TxnOpResponse::Put(put) => put.prev_key().cloned(),
                TxnOpResponse::Get(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
            });
        if let Some(before) = &before
            && before.lease() != id
        {
            self.abandon(&mut client, before.lease()).await;
        }
        let expiration = match grant {
            None => Expiration::Never,
            Some(grant) => expires_in(grant.ttl.saturating_sub(grant.at.elapsed())),
        };
        let created = before.map_or(revision, |before| before.create_revision());
        Ok(Some(Entry {
            lease: Lease {
                subnet,
                attrs: attrs.clone(),
                expiration,
                created: Some(created.unsigned_abs()),
            },
            revision: revision.unsigned_abs(),
            readable: true,
        }))
    }

    /// Revokes an etcd lease on which nothing hangs any more; if this fails, it runs out by itself.
    async fn abandon(&self, client: &mut Client, id: i64) {
        const DOING: &str = "revoke an etcd lease without keys";
        if id == 0 {
            return;
        }
        let with_keys = Some(LeaseTimeToLiveOptions::new().with_keys());
        let asked = self
            .connection
            .ask(DOING, &Right::None, client.lease_time_to_live(id, with_keys))
            .await;
        // Whoever wrote it may have hung more on it than we know.
        if asked.is_ok_and(|answer| answer.keys().is_empty()) {
            let _ = self
                .connection
                .ask(DOING, &Right::None, client.lease_revoke(id))
                .await;
        }
    }
}

impl Registry for EtcdRegistry {
    fn place(&self) -> String {
        self.connection.place().to_owned()
    }

    fn distrust(&self) {
        self.connection.distrust();
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        const DOING: &str = "read the network config";
        Box::pin(async move {
            let mut client = self.connection.client(DOING).await?;
            let key = format!("{}/config", self.prefix);
            let right = Right::Read(key.clone());
            let answer = self
                .connection
                .ask(DOING, &right, client.get(key.as_str(), None))
                .await?;
            match answer.kvs().first() {
                Some(kv) => Ok(String::from_utf8_lossy(kv.value()).into_owned()),
                None => Err(refused(DOING, &format!("the key {key} does not exist"))),
            }
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move { Ok(self.list_at_revision().await?.0) })
    }

    fn get(&self, subnet: Subnet) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        Box::pin(async move { Ok(self.found(subnet).await?.map(|(entry, _)| entry)) })
    }

    fn look(&self, subnet: Subnet) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            match self.found(subnet).await? {
                Some(found) => Ok(Some(self.with_expiration(found).await.0)),
                None => Ok(None),
            }
        })
    }

    fn put<'a>(
        &'a self,
        expected: Expected,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(self.put_if(expected, subnet, attrs, lifetime))
    }

    fn delete(&self, subnet: Subnet, revision: u64) -> BoxFuture<'_, Result<bool, StoreError>> {
        const DOING: &str = "delete a lease";
        Box::pin(async move {
            let key = self.key(subnet);
            let right = Right::Write(key.clone());
            let delete = TxnOp::delete(key.as_str(), None);
            let txn = Txn::new().when([unchanged(key, revision)]).and_then([delete]);
            let mut client = self.connection.client(DOING).await?;
            let answer = self.connection.ask(DOING, &right, client.txn(txn)).await?;
            Ok(answer.succeeded())
        })
    }

    fn claim<'a>(
        &'a self,
        holder: &'a Holder,
        address: IpAddr,
        life: Life,
    ) -> BoxFuture<'a, Result<Option<Rival>, StoreError>> {
        Box::pin(self.presence.claim(holder, address, life))
    }

    fn is_at<'a>(&'a self, holder: &'a Holder, address: IpAddr) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(self.presence.is_at(holder, address))
    }

    fn who_has(&self, address: IpAddr) -> BoxFuture<'_, Result<Option<Rival>, StoreError>> {
        Box::pin(self.presence.who_has(address))
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

    fn resets(&self) -> u64 {
        self.connection.resets()
    }
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
