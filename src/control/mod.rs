//! The lease life cycle: acquire, renew, watch, publish.
//!
//! A node needs three things from its store: the network's config, a lease of its own, and everybody else's leases.
//! [`Control`] gets the first two once, in this order, and then keeps all of them true for as long as the daemon runs:
//!
//! ```text
//!   store ──config──▶ network_config() ──▶ acquire() ──▶ maintain(): two loops, for ever
//!     ▲                                                    │
//!     ├── renew, acquire ── keep: our lease ───────────────┼──▶ lease   ─┐
//!     │                       ▲ "it is gone"  │ "it moved" │             ├─ watch channels,
//!     └── watch ──────────── follow: the peers' leases ────┴──▶ peers   ─┤  last value only
//!                               │                              health ───┘
//!                               ▼
//!                             cache file
//! ```
//!
//! - *Acquire* takes a lease at the mere sight of it if the store shows it to be ours, word for word and for a while yet, and us to be the one
//!   host with our address: a restart then waits for no disk. *Keep* renews it at once.
//! - *Keep* renews at expiry less the margin, by the monotonic clock, and at once when *follow* sees our lease gone or
//!   in other hands. A lease that somebody else holds is given up, never overwritten; another is acquired and published.
//! - *Follow* applies each update to a [`PeerTable`] and publishes a new table if anything changed. Every watch begins
//!   with a snapshot; it is renewed when it breaks, and every five minutes in any case, since a watch may lose events
//!   without a sign.
//!
//! Invariants: the last good state stays published while the store is away; only what the store said in an answer that
//! was complete removes anything; a mass removal waits for the linger time (see [`peers`]). Nothing here gives up:
//! whatever fails is tried again with growing, jittered pauses, and told at most once a minute.
//!
//! Starting without the store: after [`PATIENCE`] without any answer the cached config and lease are used, if there are
//! any and they fit; *keep* then confirms the lease as soon as the store is back. An answer that is a refusal is an
//! answer, and no reason to use the cache.
//!
//! Limits: the config is read once; a change takes effect at the next start. Time the machine was suspended does not
//! count; a lease lost in sleep is noticed by *follow*.

pub mod allocate;
pub mod cache;
pub mod config;
pub(crate) mod follow;
pub mod identity;
mod maintain;
pub mod peers;
mod retry;
pub mod state_file;
pub mod store;
pub mod subnet_file;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::control::cache::Cache;
use crate::control::config::NetworkConfig;
use crate::control::identity::Holder;
use crate::control::peers::{PeerTable, Peers};
use crate::control::store::{Store, StoreError, expires_in};
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseUpdate, Subnet};

pub(crate) use retry::{Backoff, RateLimit};

/// How long the store may be silent at start before the cache is used. Etcd elects a leader in one to two seconds.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How long a node that has other addresses waits for the store to take note before it goes on without. Nothing reaches it until then.
const MOVE_PATIENCE: Duration = Duration::from_secs(1);
/// The longest pause after the store has said no: out of subnets, an address taken twice, a right that is missing. It
/// will say so again until somebody does something, and a hundred nodes too many must not list all leases all the time.
const REFUSED_CAP: Duration = Duration::from_secs(15);

/// How the life cycle is run.
#[derive(Clone, Debug)]
pub struct ControlOptions {
    /// How long before its end a lease is renewed; flannel's `--subnet-lease-renew-margin`.
    pub renew_margin: Duration,
    /// Where the cache is kept; without it there is none.
    pub state_dir: Option<PathBuf>,
    /// The subnet file of the last run, which names the subnet to ask for.
    pub subnet_file: PathBuf,
    /// The longest pause between two attempts, jitter included.
    pub backoff_cap: Duration,
    /// How long peers stay after more than half of them vanished at once.
    pub linger: Duration,
    /// How often all leases are listed anew, give or take a tenth.
    pub relist: Duration,
    /// Who this host is, to be told from another with the same public address; without it that is not looked at.
    pub holder: Option<Holder>,
}

impl Default for ControlOptions {
    fn default() -> Self {
        Self {
            renew_margin: Duration::from_secs(60 * 60),
            state_dir: None,
            subnet_file: PathBuf::from(subnet_file::DEFAULT_PATH),
            // A node converges within 5 s of its store's return: this pause, a connection, a list.
            backoff_cap: Duration::from_secs(2),
            // Nodes register anew within 10 s of a wiped store's return.
            linger: Duration::from_secs(60),
            relist: follow::RELIST,
            holder: None,
        }
    }
}

/// Whether the store answers.
#[derive(Clone, Debug)]
pub struct StoreHealth {
    /// Whether it answered last time.
    pub connected: bool,
    /// Since when.
    pub since: Instant,
    /// The last error, while it does not.
    pub last_error: Option<String>,
    /// Errors so far.
    pub errors: u64,
    /// How often somebody else had, took or changed our lease so far.
    pub conflicts: u64,
}

/// Where [`Control::maintain`] puts what it finds out.
#[derive(Debug)]
pub struct Publish {
    /// The peers.
    pub peers: watch::Sender<Peers>,
    /// Our own lease; its subnet changes if it had to be taken anew.
    pub lease: watch::Sender<Lease>,
    /// The store's health.
    pub health: watch::Sender<StoreHealth>,
    /// What the peers are worked out in.
    table: PeerTable,
}

/// The other ends of [`Publish`]'s channels.
#[derive(Clone, Debug)]
pub struct Published {
    /// The peers.
    pub peers: watch::Receiver<Peers>,
    /// Our own lease.
    pub lease: watch::Receiver<Lease>,
    /// The store's health.
    pub health: watch::Receiver<StoreHealth>,
}

/// Whether the store has confirmed what we go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// It has written it down.
    Store,
    /// It has been looked at, and is to be renewed.
    Look,
    Cache,
}

/// Something without which a node does not come up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// What is waited for.
    pub what: &'static str,
    /// Why it is not there, in a store's own words, which may have any characters.
    pub why: String,
}

/// What the life of a lease begins with.
#[derive(Debug)]
struct Start {
    source: Source,
    /// Who the store knows us as, if it has not heard of our present addresses.
    formerly: Option<LeaseAttrs>,
}

/// The lease life cycle of one node in one network.
pub struct Control {
    store: Arc<dyn Store>,
    options: ControlOptions,
    cache: Cache,
    source: Source,
    /// The lease of this process's life under other addresses, until the store knows it by those it has now.
    former: Option<Lease>,
    /// How often somebody else had our lease, as yet.
    conflicts: AtomicU64,
    config_is_cached: bool,
    waiting: watch::Sender<Option<Waiting>>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("store", &self.store.place())
            .finish_non_exhaustive()
    }
}

impl Control {
    /// Prepares the life cycle; reads the cache, asks the store nothing.
    pub fn new(store: Arc<dyn Store>, options: ControlOptions) -> Self {
        let cache = match &options.state_dir {
            Some(dir) => Cache::load(dir, &store.place()),
            None => Cache::default(),
        };
        Self {
            store,
            options,
            cache,
            source: Source::Store,
            former: None,
            conflicts: AtomicU64::new(0),
            config_is_cached: false,
            waiting: watch::Sender::new(None),
        }
    }

    /// What is waited for just now.
    pub fn waiting(&self) -> watch::Receiver<Option<Waiting>> {
        self.waiting.subscribe()
    }

    /// Logs why something is waited for, unless it has just been logged, and keeps it for [`waiting`](Self::waiting).
    fn wait_for(&self, complaints: &RateLimit, error: &dyn std::fmt::Display, what: &'static str) {
        complain(complaints, error, what);
        let why = error.to_string();
        self.waiting.send_replace(Some(Waiting { what, why }));
    }

    /// Takes over a lease that this process holds: [`acquire`](Self::acquire) keeps its subnet, whatever the addresses are by then.
    pub fn moving(mut self, lease: Option<Lease>) -> Self {
        self.former = lease;
        self
    }

    /// Lives by a config that was read elsewhere.
    pub fn live_by(&mut self, text: String) {
        self.cache.config = Some(text);
    }

    /// The config this life goes by, as the store had it, and whether the store did not say so itself this time.
    pub fn config_text(&self) -> (String, bool) {
        (
            self.cache.config.clone().unwrap_or_default(),
            self.config_is_cached,
        )
    }

    /// Gets the network config; waits until there is a usable one.
    pub async fn network_config(&mut self) -> NetworkConfig {
        let cached = self
            .cache
            .config
            .as_deref()
            .and_then(|text| NetworkConfig::parse(text).ok());
        if let (Some(_), Some(cached)) = (&self.former, &cached) {
            // The node has been running by it, and packets wait.
            return cached.clone();
        }
        let answered = AtomicBool::new(false);
        let fetch = async {
            let complaints = RateLimit::default();
            let mut backoff = Backoff::new(Duration::from_secs(1));
            loop {
                match self.store.config().await {
                    Ok(text) => match NetworkConfig::parse(&text) {
                        Ok(config) => return (config, text),
                        Err(error) => {
                            answered.store(true, Ordering::Relaxed);
                            self.wait_for(&complaints, &error, "waiting for a usable network config");
                        }
                    },
                    Err(error) => {
                        answered.fetch_or(!error.is_unavailable(), Ordering::Relaxed);
                        self.wait_for(&complaints, &error, "waiting for the network config");
                    }
                }
                sleep(backoff.next_pause()).await;
            }
        };
        let config = tokio::select! {
            (config, text) = fetch => {
                self.cache.config = Some(text);
                config
            }
            config = fallback(cached, &answered) => {
                tracing::warn!(store = self.store.place(), "the store is away: starting with the cached config");
                self.config_is_cached = true;
                config
            }
        };
        self.waiting.send_replace(None);
        config
    }

    /// Acquires a lease for the node `attrs` describes; waits until there is one.
    ///
    /// One that the store shows to be ours as it is, as after a restart, is taken at the sight of it; [`maintain`](Self::maintain) renews it at
    /// once.
    pub async fn acquire(&mut self, attrs: &LeaseAttrs, config: &NetworkConfig) -> Lease {
        if let Some(lease) = self.take_along(attrs).await {
            self.cache.own = Some((lease.subnet, lease.attrs.clone()));
            return lease;
        }
        let remembered = self.remembered(attrs, config);
        let cached = self.cached_subnet(attrs);
        let previous = subnet_file::previous(&self.options.subnet_file).or(cached);
        let answered = AtomicBool::new(false);
        let fetch = async {
            if let Some(subnet) = remembered {
                let looked = self
                    .store
                    .confirm(self.options.holder.as_ref(), subnet, attrs)
                    .await;
                // What a look does not tell, a request will, errors included.
                if let Ok(Some(lease)) = looked {
                    return (lease, Source::Look);
                }
            }
            let complaints = RateLimit::default();
            let mut backoff = Backoff::new(self.options.backoff_cap);
            let mut refused = Backoff::new(REFUSED_CAP.max(self.options.backoff_cap));
            loop {
                let pause = match acquire(&*self.store, &self.options, attrs, previous).await {
                    Ok(lease) => return (lease, Source::Store),
                    Err(error) => {
                        answered.fetch_or(!error.is_unavailable(), Ordering::Relaxed);
                        self.conflicts
                            .fetch_add(u64::from(error.is_conflict()), Ordering::Relaxed);
                        self.wait_for(&complaints, &error, "waiting for a lease");
                        if error.is_unavailable() {
                            backoff.next_pause()
                        } else {
                            refused.next_pause()
                        }
                    }
                };
                sleep(pause).await;
            }
        };
        let lease = tokio::select! {
            (lease, source) = fetch => {
                self.source = source;
                lease
            }
            subnet = fallback(cached, &answered) => {
                tracing::warn!(store = self.store.place(), %subnet, "the store is away: starting with the cached lease");
                self.source = Source::Cache;
                Lease { subnet, attrs: attrs.clone(), expiration: expires_in(Duration::ZERO), created: None }
            }
        };
        self.waiting.send_replace(None);
        self.cache.own = Some((lease.subnet, lease.attrs.clone()));
        lease
    }

    /// Gives the lease this process holds other addresses. While the store is away that waits, and the lease is as good as given.
    async fn take_along(&mut self, attrs: &LeaseAttrs) -> Option<Lease> {
        let former = self.former.clone()?;
        let lease = Lease {
            attrs: attrs.clone(),
            ..former.clone()
        };
        let complaints = RateLimit::default();
        let ask = async {
            let mut backoff = Backoff::new(MOVE_PATIENCE);
            loop {
                match readdress(&*self.store, &self.options, &lease, &former.attrs).await {
                    Ok(lease) => return Some(lease),
                    Err(error @ StoreError::LeaseLost { .. }) => {
                        self.conflicts.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(%error, "our lease is another node's by now; taking another subnet");
                        return None;
                    }
                    Err(error) => complain(
                        &complaints,
                        &error,
                        "cannot publish our new address yet; trying on",
                    ),
                }
                sleep(backoff.next_pause()).await;
            }
        };
        let answered = timeout(MOVE_PATIENCE, ask).await;
        match answered {
            Ok(answer) => {
                self.former = None;
                self.source = Source::Store;
                answer
            }
            Err(_) => {
                self.source = Source::Cache;
                Some(lease)
            }
        }
    }

    /// The subnet of an earlier life of the node that `attrs` describes, if the network would still hand it out.
    pub fn remembered(&self, attrs: &LeaseAttrs, config: &NetworkConfig) -> Option<Subnet> {
        let previous = subnet_file::previous(&self.options.subnet_file);
        previous
            .filter(|&subnet| config.fits(subnet))
            .or_else(|| self.cached_subnet(attrs))
    }

    fn cached_subnet(&self, attrs: &LeaseAttrs) -> Option<Subnet> {
        let config = NetworkConfig::parse(self.cache.config.as_deref()?).ok()?;
        let (subnet, theirs) = self.cache.own.as_ref()?;
        (theirs.same_node(attrs) && config.fits(*subnet)).then_some(*subnet)
    }

    /// Puts other attributes into a lease just acquired. While the store is away they wait: the next renewal carries them.
    pub async fn amend(&mut self, lease: Lease) -> Lease {
        let lease = match renew(&*self.store, &self.options, &lease).await {
            Ok(amended) => amended,
            Err(error) => {
                tracing::warn!(%error, "cannot complete our lease yet; trying on");
                // As one that the store knows nothing of yet: it is renewed as soon as that goes.
                self.source = Source::Cache;
                lease
            }
        };
        self.cache.own = Some((lease.subnet, lease.attrs.clone()));
        lease
    }

    /// Makes the channels for [`maintain`](Self::maintain); the peers are those of the cache at first.
    pub fn channels(&mut self, config: &NetworkConfig, lease: &Lease) -> (Publish, Published) {
        let mut table = PeerTable::new(Arc::new(config.clone()), lease);
        let cached = std::mem::take(&mut self.cache.peers);
        let cached = cached.iter().map(|(subnet, attrs)| Lease {
            subnet,
            attrs: LeaseAttrs::clone(attrs),
            expiration: Expiration::Never,
            created: None,
        });
        table.apply(LeaseUpdate::Snapshot(cached.collect()));
        let health = StoreHealth {
            connected: self.source != Source::Cache,
            since: Instant::now(),
            last_error: None,
            errors: 0,
            conflicts: self.conflicts.load(Ordering::Relaxed),
        };
        let (peers, peers_rx) = watch::channel(table.peers().clone());
        let (lease, lease_rx) = watch::channel(lease.clone());
        let (health, health_rx) = watch::channel(health);
        let publish = Publish {
            peers,
            lease,
            health,
            table,
        };
        let published = Published {
            peers: peers_rx,
            lease: lease_rx,
            health: health_rx,
        };
        (publish, published)
    }

    /// Keeps our lease and the peers true, for ever.
    pub async fn maintain(self, publish: Publish) {
        let start = Start {
            source: self.source,
            formerly: self.former.map(|lease| lease.attrs),
        };
        maintain::run(self.store, self.options, self.cache, start, publish).await;
    }

    /// The subnet this node would ask for first: that of the subnet file, else that of the cache.
    pub fn previous_subnet(&self) -> Option<Subnet> {
        subnet_file::previous(&self.options.subnet_file)
            .or_else(|| self.cache.own.as_ref().map(|(subnet, _)| *subnet))
    }
}

async fn acquire(
    store: &dyn Store,
    options: &ControlOptions,
    attrs: &LeaseAttrs,
    previous: Option<Subnet>,
) -> Result<Lease, StoreError> {
    match &options.holder {
        Some(holder) => store.acquire_as(holder, attrs, previous).await,
        None => store.acquire(attrs, previous).await,
    }
}

async fn renew(store: &dyn Store, options: &ControlOptions, lease: &Lease) -> Result<Lease, StoreError> {
    match &options.holder {
        Some(holder) => store.renew_as(holder, lease).await,
        None => store.renew(lease).await,
    }
}

async fn readdress(
    store: &dyn Store,
    options: &ControlOptions,
    lease: &Lease,
    formerly: &LeaseAttrs,
) -> Result<Lease, StoreError> {
    store.readdress(options.holder.as_ref(), lease, formerly).await
}

/// What the cache has, once the store has not answered for [`PATIENCE`]; never if it has answered or there is nothing.
async fn fallback<T>(cached: Option<T>, answered: &AtomicBool) -> T {
    sleep_until(Instant::now() + PATIENCE).await;
    match cached {
        Some(cached) if !answered.load(Ordering::Relaxed) => cached,
        Some(_) | None => std::future::pending().await,
    }
}

fn complain(limit: &RateLimit, error: &dyn std::fmt::Display, waiting: &'static str) {
    if limit.allows() {
        tracing::warn!(%error, "{waiting}");
    }
}

impl StoreHealth {
    fn note(sender: &watch::Sender<Self>, result: Result<(), &StoreError>) {
        sender.send_if_modified(|health| {
            // A refusal is an answer, too.
            let connected = result.err().is_none_or(|error| !error.is_unavailable());
            let last_error = result.err().map(ToString::to_string);
            health.errors += u64::from(result.is_err());
            health.conflicts += u64::from(result.is_err_and(StoreError::is_conflict));
            if health.connected != connected {
                health.since = Instant::now();
            } else if health.last_error == last_error {
                return false;
            }
            health.connected = connected;
            health.last_error = last_error;
            true
        });
    }

    /// Somebody else has, took or changed our lease. Nobody is woken for it: it is a number to be read.
    fn note_conflict(sender: &watch::Sender<Self>) {
        sender.send_if_modified(|health| {
            health.conflicts += 1;
            false
        });
    }
}
