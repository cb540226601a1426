//! The two loops of [`Control::maintain`](super::Control::maintain); [`super`] tells what they are for.
//!
//! They run as one task. *Keep* tells *follow* of a new lease through the published one; *follow* wakes *keep* with a
//! `Notify`. Both tell the store's health.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::FutureExt;
use futures_util::stream::{Stream, StreamExt};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::control::cache::Cache;
use crate::control::follow::{self, Pace};
use crate::control::peers::{PeerChanges, PeerTable, Peers};
use crate::control::store::{LEASE_TTL, Store, StoreError, WatchItem};
use crate::control::{Backoff, ControlOptions, Publish, RateLimit, Source, Start, StoreHealth};
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate};

/// How long changes gather before the cache is written.
const CACHE_DELAY: Duration = Duration::from_secs(2);

/// How many updates are taken in at once at most.
const GATHER: usize = 256;

/// The least time between two renewals of a lease the store says is in order.
const MIN_RENEWAL: Duration = Duration::from_secs(1);

pub(super) async fn run(
    store: Arc<dyn Store>,
    options: ControlOptions,
    cache: Cache,
    start: Start,
    publish: Publish,
) {
    let disturbed = Notify::new();
    let keep = Keep {
        store: &*store,
        options: &options,
        lease: &publish.lease,
        health: &publish.health,
        disturbed: &disturbed,
        complaints: RateLimit::default(),
    };
    let follow = Follow {
        store: &*store,
        options: &options,
        own: publish.lease.subscribe(),
        table: publish.table,
        peers: &publish.peers,
        health: &publish.health,
        disturbed: &disturbed,
        cache,
        cache_due: Some(Instant::now() + CACHE_DELAY),
        saving: None,
        linger_due: None,
        mends: Mends::default(),
        quarrel_complaints: RateLimit::default(),
        complaints: RateLimit::default(),
        lost: None,
        refusal_complaints: RateLimit::default(),
        cache_complaints: RateLimit::default(),
        linger_complaints: RateLimit::default(),
    };
    tokio::join!(keep.run(start), follow.run());
}

/// Whether a lease was made anew in place of one that was gone, if the store tells.
fn is_another(before: &Lease, now: &Lease) -> bool {
    matches!((before.created, now.created), (Some(before), Some(now)) if before != now)
}

/// Keeps our own lease.
struct Keep<'a> {
    store: &'a dyn Store,
    options: &'a ControlOptions,
    lease: &'a watch::Sender<Lease>,
    health: &'a watch::Sender<StoreHealth>,
    disturbed: &'a Notify,
    complaints: RateLimit,
}

impl Keep<'_> {
    async fn run(self, start: Start) {
        let mut formerly = start.formerly;
        let mut backoff = Backoff::new(self.options.backoff_cap);
        let mut refused = Backoff::new(super::REFUSED_CAP.max(self.options.backoff_cap));
        let mut due = match start.source {
            Source::Store => self.renewal_due(&self.lease.borrow()),
            Source::Look | Source::Cache => Instant::now(),
        };
        loop {
            tokio::select! {
                () = sleep_until(due) => {}
                () = self.disturbed.notified() => {}
            }
            let lease = self.lease.borrow().clone();
            let renewed = match &formerly {
                Some(formerly) => super::readdress(self.store, self.options, &lease, formerly).await,
                None => super::renew(self.store, self.options, &lease).await,
            };
            let renewed = match renewed {
                Err(error @ StoreError::LeaseLost { .. }) => {
                    StoreHealth::note_conflict(self.health);
                    tracing::warn!(%error, "our lease cannot be renewed; acquiring anew");
                    super::acquire(self.store, self.options, &lease.attrs, None).await
                }
                renewed => renewed,
            };
            StoreHealth::note(self.health, renewed.as_ref().map(|_| ()));
            match renewed {
                Ok(renewed) => {
                    formerly = None;
                    backoff.reset();
                    refused.reset();
                    due = self.renewal_due(&renewed);
                    if renewed.subnet != lease.subnet {
                        tracing::warn!(old = %lease.subnet, new = %renewed.subnet, "our subnet changed");
                    } else if is_another(&lease, &renewed) {
                        tracing::warn!(subnet = %renewed.subnet, "our lease was gone from the store; it is claimed again");
                    } else {
                        tracing::info!(subnet = %renewed.subnet, "lease renewed");
                    }
                    self.lease.send_if_modified(|lease| {
                        let changed = *lease != renewed;
                        *lease = renewed;
                        changed
                    });
                }
                Err(error) => {
                    super::complain(&self.complaints, &error, "cannot renew our lease; trying on");
                    let pause = if error.is_unavailable() {
                        backoff.next_pause()
                    } else {
                        refused.next_pause()
                    };
                    due = Instant::now() + pause;
                }
            }
        }
    }

    fn renewal_due(&self, lease: &Lease) -> Instant {
        Instant::now() + renewal_pause(lease.expiration, self.options.renew_margin)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a store gives the end of a lease as wall-clock time; it becomes a pause at once"
)]
fn renewal_pause(expiration: Expiration, margin: Duration) -> Duration {
    let Expiration::At(end) = expiration else {
        // A reservation has no end. Renewing it once in a while mends a value that was changed by hand.
        return LEASE_TTL;
    };
    // Renewing a longer one every day does no harm; trusting a server whose clock is days ahead of ours would.
    let left = end.duration_since(SystemTime::now());
    match left.map(|left| left.min(LEASE_TTL)) {
        Ok(left) if left > margin => (left - margin).max(MIN_RENEWAL),
        Ok(left) => (left / 2).max(MIN_RENEWAL),
        // A lease just renewed that has ended already: the store's clock is not ours. Neither clock can be told
        // wrong from here; this often does no harm.
        Err(_) => Duration::from_secs(10 * 60),
    }
}

/// The leases are not in sight.
struct Lost {
    since: Instant,
    /// The log says so.
    told: bool,
}

/// Follows the peers' leases.
struct Follow<'a> {
    store: &'a dyn Store,
    options: &'a ControlOptions,
    own: watch::Receiver<Lease>,
    table: PeerTable,
    peers: &'a watch::Sender<Peers>,
    health: &'a watch::Sender<StoreHealth>,
    disturbed: &'a Notify,
    cache: Cache,
    cache_due: Option<Instant>,
    /// A write of the cache that has not ended. The disk may hang; nothing waits for it but the next write.
    saving: Option<JoinHandle<io::Result<()>>>,
    linger_due: Option<Instant>,
    mends: Mends,
    quarrel_complaints: RateLimit,
    complaints: RateLimit,
    lost: Option<Lost>,
    refusal_complaints: RateLimit,
    cache_complaints: RateLimit,
    linger_complaints: RateLimit,
}

impl Follow<'_> {
    async fn run(mut self) {
        let mut updates = Box::pin(updates(self.store, self.options));
        loop {
            tokio::select! {
                Some(update) = updates.next() => {
                    let mut update = update;
                    // What came meanwhile goes in with it: in a storm the table is worked out once, not once a change.
                    tokio::task::yield_now().await;
                    for _ in 0..GATHER {
                        let Some(Some(next)) = updates.next().now_or_never() else { break };
                        let (before, newest) = joined(update, next);
                        if let Some(before) = before {
                            self.take(before);
                        }
                        update = newest;
                    }
                    self.take(update);
                }
                Ok(()) = self.own.changed() => self.own_changed(),
                () = at(self.linger_due) => self.linger_over(),
                () = at(self.cache_due), if self.saving.is_none() => self.save_cache(),
                saved = ended(&mut self.saving) => {
                    if let Err(error) = saved {
                        super::complain(&self.cache_complaints, &error, "cannot write the cache");
                    }
                }
            }
        }
    }

    fn take(&mut self, update: Result<WatchItem, StoreError>) {
        StoreHealth::note(self.health, update.as_ref().map(|_| ()));
        let item = match update {
            Ok(item) => item,
            Err(error) => {
                let lost = self.lost.get_or_insert_with(|| Lost {
                    since: Instant::now(),
                    told: false,
                });
                if self.complaints.allows() {
                    lost.told = true;
                    tracing::warn!(%error, "lost sight of the leases; the peers stay as they are");
                }
                return;
            }
        };
        if let Some(Lost { since, told: true }) = self.lost.take() {
            tracing::info!(
                seconds = since.elapsed().as_secs(),
                "the leases are in sight again"
            );
        }
        let spoilt = item.unreadable.contains(&self.own.borrow().subnet);
        let update = item.completed(|subnet| self.table.known(subnet));
        let disturbance = match spoilt {
            true => Disturbance::Altered,
            false => disturbance(&self.own.borrow(), &update),
        };
        if disturbance == Disturbance::Altered {
            StoreHealth::note_conflict(self.health);
        }
        match disturbance {
            Disturbance::None => {}
            Disturbance::Gone => self.disturbed.notify_one(),
            // Its end may be near, and its next renewal is not.
            Disturbance::Unreserved if self.mends.allows() => self.disturbed.notify_one(),
            Disturbance::Unreserved => {}
            Disturbance::Altered if self.mends.allows() => self.disturbed.notify_one(),
            Disturbance::Altered => super::complain(
                &self.quarrel_complaints,
                &self.own.borrow().subnet,
                "somebody keeps changing what our lease says; leaving it until its next renewal",
            ),
        }
        let before = self.table.peers();
        let (rejected, held) = (before.rejected().clone(), before.held());
        let is_list = matches!(update, LeaseUpdate::Snapshot(_));
        // A list without our lease comes from a store that was wiped, restored, or cut off from us for long.
        let forgetful = disturbance == Disturbance::Gone && is_list;
        let changes = if forgetful {
            self.table.apply_of_forgetful(update)
        } else {
            self.table.apply(update)
        };
        let confirmed = is_list && self.table.confirm();
        let peers = self.table.peers();
        // Whoever is held last has the whole time to come back.
        if peers.held() > held {
            // Peers that vanish and come back again and again are told of once a minute.
            if self.linger_complaints.allows() {
                tracing::warn!(
                    peers = peers.held(),
                    forgetful,
                    "the store may have lost peers that are alive; keeping them for a while"
                );
            }
            self.linger_due = Some(Instant::now() + self.options.linger);
        } else if peers.held() == 0 {
            self.linger_due = None;
        }
        let refused = peers.rejected();
        if *refused != rejected && !refused.is_empty() && self.refusal_complaints.allows() {
            tracing::warn!(?refused, "some leases are refused");
        }
        let counters_changed = *refused != rejected || peers.held() != held;
        self.publish(&changes, counters_changed || confirmed);
    }

    fn own_changed(&mut self) {
        let own = self.own.borrow_and_update().clone();
        let changes = self.table.set_own(&own);
        self.cache.own = Some((own.subnet, own.attrs));
        self.cache_due.get_or_insert(Instant::now() + CACHE_DELAY);
        self.publish(&changes, true);
    }

    fn linger_over(&mut self) {
        self.linger_due = None;
        let changes = self.table.release_held();
        tracing::warn!(
            peers = changes.removed.len(),
            "peers that vanished did not come back"
        );
        self.publish(&changes, true);
    }

    fn publish(&mut self, changes: &PeerChanges, counters_changed: bool) {
        if !changes.is_empty() {
            tracing::debug!(
                added = changes.added.len(),
                changed = changes.changed.len(),
                removed = changes.removed.len(),
                peers = self.table.peers().len(),
                "peers changed"
            );
            self.cache_due.get_or_insert(Instant::now() + CACHE_DELAY);
        }
        if !changes.is_empty() || counters_changed {
            self.peers.send_replace(self.table.peers().clone());
        }
    }

    fn save_cache(&mut self) {
        self.cache_due = None;
        let Some(dir) = self.options.state_dir.clone() else {
            return;
        };
        // Those of the table; no list is kept for the next time.
        let cache = Cache {
            peers: self.table.peers().list().clone(),
            ..self.cache.clone()
        };
        let place = self.store.place();
        self.saving = Some(tokio::task::spawn_blocking(move || cache.save(&dir, &place)));
    }
}

/// How the task ended; never, if there is none.
async fn ended(task: &mut Option<JoinHandle<io::Result<()>>>) -> io::Result<()> {
    let Some(running) = task else {
        return std::future::pending().await;
    };
    let how = running.await;
    *task = None;
    how.unwrap_or_else(|error| Err(error.into()))
}

type Told = Result<WatchItem, StoreError>;

/// Two updates as one if they are changes both; else the first comes before the second.
fn joined(first: Told, second: Told) -> (Option<Told>, Told) {
    match (first, second) {
        (
            Ok(WatchItem {
                update: LeaseUpdate::Events(mut events),
                unreadable,
                ..
            }),
            Ok(WatchItem {
                update: LeaseUpdate::Events(more),
                cursor,
                ..
            }),
        ) => {
            events.extend(more);
            let update = LeaseUpdate::Events(events);
            let item = WatchItem {
                update,
                unreadable,
                cursor,
            };
            (None, Ok(item))
        }
        (first, second) => (Some(first), second),
    }
}

/// What an update says of our own lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disturbance {
    /// Nothing, or that it is as it should be.
    None,
    /// It is gone, or somebody else's.
    Gone,
    /// It was a reservation, and has an end now.
    Unreserved,
    /// It is ours and says something else: a store restored from a backup, an edit by hand, a second host with our
    /// public address.
    Altered,
}

fn disturbance(own: &Lease, update: &LeaseUpdate) -> Disturbance {
    let found = match update {
        LeaseUpdate::Snapshot(leases) => leases.iter().find(|lease| lease.subnet == own.subnet),
        LeaseUpdate::Events(events) => {
            let last = events.iter().rev().find(|event| match event {
                LeaseEvent::Added(lease) => lease.subnet == own.subnet,
                LeaseEvent::Removed(subnet) => *subnet == own.subnet,
            });
            match last {
                Some(LeaseEvent::Added(lease)) => Some(lease),
                Some(LeaseEvent::Removed(_)) => None,
                None => return Disturbance::None,
            }
        }
    };
    match found {
        Some(lease) if says_the_same(&lease.attrs, &own.attrs) => match (own.expiration, lease.expiration) {
            (Expiration::Never, Expiration::At(_)) => Disturbance::Unreserved,
            _ => Disturbance::None,
        },
        Some(lease) if lease.attrs.same_node(&own.attrs) => Disturbance::Altered,
        Some(_) | None => Disturbance::Gone,
    }
}

/// Whether what was told is what we said, as far as it was told: old servers leave out what they do not know, and may
/// word JSON differently.
fn says_the_same(told: &LeaseAttrs, said: &LeaseAttrs) -> bool {
    let value = |data: &Option<String>| data.as_deref().map(serde_json::from_str::<serde_json::Value>);
    let alike = |told: &Option<String>, said: &Option<String>| {
        told.is_none()
            || told == said
            || matches!((value(told), value(said)), (Some(Ok(told)), Some(Ok(said))) if told == said)
    };
    told.same_node(said)
        && (told.public_ipv6.is_none() || told.public_ipv6 == said.public_ipv6)
        && told.backend_type == said.backend_type
        && alike(&told.backend_data, &said.backend_data)
        && alike(&told.backend_v6_data, &said.backend_v6_data)
}

/// How often our lease is put right when somebody changed it: a few times, lest two hosts overwrite each other for ever.
#[derive(Debug, Default)]
struct Mends(VecDeque<Instant>);

impl Mends {
    const MOST: usize = 3;
    const WITHIN: Duration = Duration::from_secs(10 * 60);

    fn allows(&mut self) -> bool {
        self.0.retain(|at| at.elapsed() < Self::WITHIN);
        let allowed = self.0.len() < Self::MOST;
        if allowed {
            self.0.push_back(Instant::now());
        }
        allowed
    }
}

/// The updates of one watch after the other.
fn updates<'a>(store: &'a dyn Store, options: &ControlOptions) -> impl Stream<Item = Told> + use<'a> {
    let ended = move || StoreError::Unavailable {
        doing: "watch the leases",
        place: store.place(),
        cause: "the watch ended".to_owned(),
    };
    let pace = Pace {
        backoff_cap: options.backoff_cap,
        relist: options.relist,
    };
    follow::updates(move || store.watch(None), ended, pace)
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}
