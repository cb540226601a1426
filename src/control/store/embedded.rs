//! Leases in a file of our own, for a server that needs no etcd beside it.
//!
//! All of it is kept in memory; the file (redb: transactions, checksums, a lock) is what survives. A change goes to
//! the file first, in one transaction that is synced before anyone hears of it, then to memory, then to the watchers.
//! So reads never wait for the disk and go on while it is full or gone; a failed write changes nothing and is an
//! error. After a failed write the file is opened anew at the next one, and memory follows it if the two disagree.
//!
//! Every change has a revision. The last 10,000 changes of each network, 8 MB at most, are kept in memory for watchers; one that is further behind,
//! or comes with a cursor from another file or from before a restart it missed changes in, gets a snapshot. A cursor
//! is `FILE.REVISION`, where `FILE` is a random number made with the file.
//!
//! Leases end by the monotonic clock while the server runs. The file keeps the wall-clock time of the end; after a
//! restart a lease has what is left of that, but at least an hour and at most a full lease time, so that neither a
//! clock that was set nor a server that was away for long makes all nodes vanish. Whoever looks first takes ended
//! leases out: every watcher wakes for the next one due, and every list begins with it.
//!
//! Which host has which public address is kept as well, so that a second host with one is refused after a restart, too; all count
//! as alive for `REVIVED` then, time enough to come back. How long each counts as alive is in memory only.
//!
//! One file holds any number of networks. They share the file and the numbering of changes, and nothing else.
//!
//! Limits: one process at a time. The file never shrinks.

mod clock;
mod file;
mod log;
mod networks;
mod state;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream};
use redb::Database;
use tokio::sync::watch;
use tokio::time::Instant;

use self::clock::Clock;
use self::file::{damaged, load, open_database, persist};
pub use self::networks::EmbeddedNetworks;
use self::state::{Change, Host, MAX_HOSTS, Network, Record, State};
use crate::addr::NetworkName;
use crate::control::RateLimit;
use crate::control::config::NetworkConfig;
use crate::control::identity::Holder;
use crate::control::store::{
    Cursor, Entry, Expected, Life, Lifetime, LocalStore, NetworkEvent, Registry, Rival, StoreError, WatchItem,
};
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};

/// A store in a file.
pub type EmbeddedStore = LocalStore<EmbeddedRegistry>;

impl EmbeddedStore {
    /// Opens the store at `path`, or makes it.
    ///
    /// # Errors
    /// The file is in use, damaged, no store, or cannot be written.
    pub fn open(path: &Path, ttl: Duration) -> Result<Self, StoreError> {
        EmbeddedRegistry::open(path, ttl).map(Self::new)
    }

    /// Sets the network config.
    ///
    /// # Errors
    /// The config is not usable, or the file cannot be written.
    pub async fn set_config(&self, text: &str) -> Result<(), StoreError> {
        self.registry().set_config(text).await
    }
}

/// One network's leases in a file.
#[derive(Debug, Clone)]
pub struct EmbeddedRegistry {
    inner: Arc<Inner>,
    network: Option<NetworkName>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    ttl: Duration,
    clock: Clock,
    /// Held throughout a write; `None` after one failed. Taken before `state`.
    writer: Mutex<Option<Database>>,
    /// Held for moments.
    state: Mutex<State>,
    /// The revision reached.
    reached: watch::Sender<u64>,
    complaints: RateLimit,
}

impl EmbeddedRegistry {
    fn open(path: &Path, ttl: Duration) -> Result<Self, StoreError> {
        let clock = Clock::start();
        let database = open_database(path)?;
        let state = load(&database, clock, clock.monotonic, ttl).map_err(|error| damaged(path, &error))?;
        let reached = watch::Sender::new(state.revision);
        let inner = Inner {
            path: path.to_owned(),
            ttl,
            clock,
            writer: Mutex::new(Some(database)),
            state: Mutex::new(state),
            reached,
            complaints: RateLimit::default(),
        };
        Ok(Self {
            inner: Arc::new(inner),
            network: None,
        })
    }

    async fn set_config(&self, text: &str) -> Result<(), StoreError> {
        const DOING: &str = "set the network config";
        NetworkConfig::parse(text).map_err(|error| refused(DOING, error.to_string()))?;
        let text = text.to_owned();
        self.write(DOING, move |_| vec![Change::Config(Some(text))])
            .await
            .map(|_| ())
    }

    /// Runs `decide` on the network and carries out the changes it asks for, all or none; tells the state's new revision
    /// if there were any.
    async fn write(
        &self,
        doing: &'static str,
        decide: impl FnOnce(&Network) -> Vec<Change> + Send + 'static,
    ) -> Result<Option<u64>, StoreError> {
        let (inner, network) = (self.inner.clone(), self.network.clone());
        // Should the caller give up meanwhile, the write is finished all the same.
        let written = tokio::task::spawn_blocking(move || inner.write(doing, network, decide)).await;
        written.unwrap_or_else(|error| Err(self.inner.unavailable(doing, error.to_string())))
    }

    /// Takes out the leases that have ended.
    async fn expire(&self) {
        let now = Instant::now();
        if self.next_end().is_none_or(|end| end > now) {
            return;
        }
        let ended = move |network: &Network| {
            let ended = network
                .leases
                .iter()
                .filter(|(_, record)| record.ends.is_some_and(|end| end <= now));
            ended.map(|(subnet, _)| Change::Delete(*subnet)).collect()
        };
        if let Err(error) = self.write("take out ended leases", ended).await
            && self.inner.complaints.allows()
        {
            tracing::warn!(%error, "ended leases stay for now");
        }
    }

    fn next_end(&self) -> Option<Instant> {
        self.inner.state().network(self.network.as_ref())?.next_end()
    }

    async fn put_if(
        &self,
        expected: Expected,
        subnet: Subnet,
        attrs: &LeaseAttrs,
        lifetime: Lifetime,
    ) -> Result<Option<Entry>, StoreError> {
        self.expire().await;
        let ends = match lifetime {
            Lifetime::Forever => None,
            Lifetime::Ttl => Some(Instant::now() + self.inner.ttl),
        };
        let record = Record {
            attrs: attrs.clone(),
            revision: 0,
            ends,
        };
        let change = Change::Put(subnet, record.clone());
        let written = self.write(expected.doing(), move |network| {
            if expected.is(network.leases.get(&subnet).map(|record| record.revision)) {
                vec![change]
            } else {
                vec![]
            }
        });
        Ok(written.await?.map(|revision| Entry {
            lease: self.inner.lease(subnet, &record),
            revision,
            readable: true,
        }))
    }

    /// Answers a claim for which nothing needs to be written: `host` has the address anyway, or another live one has.
    fn greet(&self, address: IpAddr, host: &Host, now: Instant) -> Option<Option<Rival>> {
        let mut state = self.inner.state();
        let there = state.network_mut(self.network.as_ref()).hosts.get_mut(&address)?;
        if there.lives(now) && there.holder.differs_from(&host.holder) {
            return Some(Some(there.as_rival()));
        }
        // What this process says of its own host is not for clients to change.
        let is_ours = there.ends.is_none() && !there.holder.differs_from(&host.holder);
        if is_ours && host.ends.is_some() {
            return Some(None);
        }
        // Another claim of our own may have to go.
        if there.holder != host.holder || host.ends.is_none() && there.ends.is_some() {
            return None;
        }
        there.ends = host.ends;
        Some(None)
    }

    /// What a watcher at `revision` has not heard yet, if anything.
    fn news(&self, file: u64, revision: u64) -> Option<WatchItem> {
        let state = self.inner.state();
        let Some(network) = state.network(self.network.as_ref()) else {
            // Nobody ever wrote to it.
            return (file != state.file || revision > state.revision).then(|| snapshot(&state, Vec::new()));
        };
        if file != state.file || revision < network.log.from || revision > state.revision {
            let leases = network
                .leases
                .iter()
                .map(|(subnet, record)| self.inner.lease(*subnet, record));
            return Some(snapshot(&state, leases.collect()));
        }
        let (events, last) = network.log.after(revision)?;
        Some(WatchItem {
            update: LeaseUpdate::Events(events),
            unreadable: Vec::new(),
            cursor: cursor(state.file, last),
        })
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // The state is changed by plain assignments that cannot panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(
        &self,
        doing: &'static str,
        network: Option<NetworkName>,
        decide: impl FnOnce(&Network) -> Vec<Change>,
    ) -> Result<Option<u64>, StoreError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match writer.take() {
            Some(database) => database,
            None => self.reopen(doing)?,
        };
        let (changes, revision) = {
            let mut state = self.state();
            (decide(state.network_mut(network.as_ref())), state.revision)
        };
        if changes.is_empty() {
            *writer = Some(database);
            return Ok(None);
        }
        persist(&database, self.clock, network.as_ref(), &changes, revision)
            .map_err(|error| self.unavailable(doing, error.to_string()))?;
        *writer = Some(database);
        let mut state = self.state();
        for change in changes {
            state.revision += 1;
            let revision = state.revision;
            if let (Change::Config(text), Some(name)) = (&change, &network) {
                let event = match text {
                    Some(_) => NetworkEvent::Added(name.clone()),
                    None => NetworkEvent::Removed(name.clone()),
                };
                state.names.note(revision, event);
            }
            let network = state.network_mut(network.as_ref());
            match change {
                Change::Config(text) => network.config = text,
                Change::Put(subnet, record) => {
                    let event = LeaseEvent::Added(self.lease(subnet, &record));
                    network.log.note(revision, event);
                    network.leases.insert(subnet, Record { revision, ..record });
                }
                Change::Delete(subnet) => {
                    network.log.note(revision, LeaseEvent::Removed(subnet));
                    network.leases.remove(&subnet);
                }
                Change::Claim(address, host) => {
                    network.hosts.insert(address, host);
                }
                Change::Unclaim(address) => {
                    network.hosts.remove(&address);
                }
            }
        }
        let revision = state.revision;
        drop(state);
        self.reached.send_replace(revision);
        Ok(Some(revision))
    }

    /// Opens the file again after a failed write. Whether that write made it is for the file to say.
    fn reopen(&self, doing: &'static str) -> Result<Database, StoreError> {
        let database =
            open_database(&self.path).map_err(|error| self.unavailable(doing, error.to_string()))?;
        let found = load(&database, self.clock, Instant::now(), self.ttl)
            .map_err(|error| damaged(&self.path, &error))?;
        let mut state = self.state();
        if found.file != state.file || found.revision != state.revision {
            tracing::warn!(
                memory = state.revision,
                file = found.revision,
                "the file and memory disagree; the file is right"
            );
            *state = found;
            self.reached.send_replace(state.revision);
        }
        Ok(database)
    }

    fn lease(&self, subnet: Subnet, record: &Record) -> Lease {
        Lease {
            subnet,
            attrs: record.attrs.clone(),
            expiration: match record.ends {
                None => Expiration::Never,
                Some(end) => Expiration::At(self.clock.wall(end)),
            },
            created: None,
        }
    }

    fn unavailable(&self, doing: &'static str, cause: String) -> StoreError {
        StoreError::Unavailable {
            doing,
            place: self.path.display().to_string(),
            cause,
        }
    }
}

impl Registry for EmbeddedRegistry {
    fn place(&self) -> String {
        let path = self.inner.path.display();
        match &self.network {
            None => format!("embedded {path}"),
            Some(name) => format!("embedded {path} {name}"),
        }
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async move {
            let state = self.inner.state();
            let config = state
                .network(self.network.as_ref())
                .and_then(|network| network.config.clone());
            drop(state);
            config.ok_or_else(|| refused("read the network config", "none has been set".to_owned()))
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>> {
        Box::pin(async move {
            self.expire().await;
            let state = self.inner.state();
            let leases = state
                .network(self.network.as_ref())
                .into_iter()
                .flat_map(|network| &network.leases);
            let entries = leases.map(|(subnet, record)| Entry {
                lease: self.inner.lease(*subnet, record),
                revision: record.revision,
                readable: true,
            });
            Ok(entries.collect())
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
        Box::pin(async move {
            let written = self.write("delete a lease", move |network| {
                let unchanged = network
                    .leases
                    .get(&subnet)
                    .is_some_and(|record| record.revision == revision);
                if unchanged {
                    vec![Change::Delete(subnet)]
                } else {
                    vec![]
                }
            });
            Ok(written.await?.is_some())
        })
    }

    fn claim<'a>(
        &'a self,
        holder: &'a Holder,
        address: IpAddr,
        life: Life,
    ) -> BoxFuture<'a, Result<Option<Rival>, StoreError>> {
        Box::pin(async move {
            let now = Instant::now();
            let ends = match life {
                Life::Ours => None,
                Life::For(life) => Some(now + life),
            };
            let host = Host {
                holder: holder.clone(),
                ends,
            };
            if let Some(answer) = self.greet(address, &host, now) {
                return Ok(answer);
            }
            let change = move |network: &Network| network.claim(address, host, now).unwrap_or_default();
            if self.write("note who has an address", change).await?.is_some() {
                return Ok(None);
            }
            // Somebody was faster, or there are too many.
            let state = self.inner.state();
            let there = state
                .network(self.network.as_ref())
                .and_then(|network| network.hosts.get(&address));
            if there.is_none() && self.inner.complaints.allows() {
                tracing::warn!(%address, max = MAX_HOSTS, "too many nodes to tell whether two have one address");
            }
            Ok(there.map(Host::as_rival))
        })
    }

    fn is_at<'a>(&'a self, holder: &'a Holder, address: IpAddr) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            // Nobody lets anybody else have it before this process has claimed it: it is the one that would be asked.
            let now = Instant::now();
            let state = self.inner.state();
            let there = state
                .network(self.network.as_ref())
                .and_then(|network| network.hosts.get(&address));
            Ok(there.is_some_and(|there| there.lives(now) && there.holder == *holder))
        })
    }

    fn who_has(&self, address: IpAddr) -> BoxFuture<'_, Result<Option<Rival>, StoreError>> {
        Box::pin(async move {
            let now = Instant::now();
            let state = self.inner.state();
            let there = state
                .network(self.network.as_ref())
                .and_then(|network| network.hosts.get(&address));
            Ok(there.filter(|there| there.lives(now)).map(Host::as_rival))
        })
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        // No file has the number 0, so whoever comes without a cursor is told everything.
        let start = match since.as_ref().map(parse_cursor) {
            None => (0, 0),
            Some(Some(start)) => start,
            Some(None) => {
                let error = refused(
                    "watch the leases",
                    "the cursor is none of this kind of store".to_owned(),
                );
                return Box::pin(stream::once(async { Err(error) }));
            }
        };
        let reached = self.inner.reached.subscribe();
        Box::pin(stream::unfold(
            (start, reached),
            move |((file, revision), mut reached)| async move {
                loop {
                    self.expire().await;
                    reached.mark_unchanged();
                    if let Some(item) = self.news(file, revision) {
                        let next = parse_cursor(&item.cursor)?;
                        return Some((Ok(item), (next, reached)));
                    }
                    // An end that could not be carried out is tried again in a second, not at once.
                    let next_end = self.next_end().map(|end| end.max(Instant::now() + RETRY));
                    let due = async {
                        match next_end {
                            Some(end) => tokio::time::sleep_until(end).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        changed = reached.changed() => changed.ok()?,
                        () = due => {}
                    }
                }
            },
        ))
    }
}

/// The least time between two attempts to take out ended leases.
const RETRY: Duration = Duration::from_millis(200);

fn snapshot(state: &State, leases: Vec<Lease>) -> WatchItem {
    WatchItem {
        update: LeaseUpdate::Snapshot(leases),
        unreadable: Vec::new(),
        cursor: cursor(state.file, state.revision),
    }
}

fn cursor(file: u64, revision: u64) -> Cursor {
    Cursor(format!("{file:x}.{revision}"))
}

fn parse_cursor(cursor: &Cursor) -> Option<(u64, u64)> {
    let (file, revision) = cursor.0.split_once('.')?;
    Some((u64::from_str_radix(file, 16).ok()?, revision.parse().ok()?))
}

fn refused(doing: &'static str, cause: String) -> StoreError {
    StoreError::Refused { doing, cause }
}

#[cfg(test)]
mod tests;
