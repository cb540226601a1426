//! A store in memory that several nodes share, and the ways to it, each of which can be broken by itself.
//!
//! The store is a plain key space with revisions, a log that can be compacted, leases that run out, and a backup. It is
//! also the judge of what nodes do to it: a claim on a subnet somebody else holds, or a change of somebody else's
//! entry, is noted as a fault.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use kersey::control::store::{Cursor, Entry, Expected, Lifetime, Registry, StoreError, WatchItem};
use kersey::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

#[derive(Clone, Debug)]
struct Record {
    attrs: LeaseAttrs,
    created: u64,
    modified: u64,
    ends: Option<Instant>,
}

#[derive(Clone, Debug, Default)]
struct Disk {
    revision: u64,
    entries: BTreeMap<Subnet, Record>,
    log: Vec<(u64, LeaseEvent)>,
    compacted: u64,
}

struct State {
    disk: Disk,
    backup: Disk,
    up: bool,
    faults: Vec<String>,
}

pub(crate) struct World {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    config: &'static str,
    ttl: Duration,
}

/// How a way to the store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// Every request fails at once, and a watch breaks.
    Refusing,
    /// Nothing is ever answered; what waits fails when the way is another again.
    Silent,
}

impl World {
    pub(crate) fn new(config: &'static str, ttl: Duration) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                disk: Disk::default(),
                backup: Disk::default(),
                up: true,
                faults: Vec::new(),
            }),
            changed: watch::channel(0).0,
            config,
            ttl,
        })
    }

    /// Takes out what has run out, for ever.
    pub(crate) async fn keep_time(self: Arc<Self>) {
        let mut changed = self.changed.subscribe();
        loop {
            let next = self
                .state()
                .disk
                .entries
                .values()
                .filter_map(|record| record.ends)
                .min();
            tokio::select! {
                _ = changed.changed() => {}
                () = async { match next { Some(next) => sleep_until(next).await, None => std::future::pending().await } } => {}
            }
            let now = Instant::now();
            let ended: Vec<Subnet> = {
                let state = self.state();
                let ended = state.disk.entries.iter();
                ended
                    .filter(|(_, record)| record.ends.is_some_and(|end| end <= now))
                    .map(|(subnet, _)| *subnet)
                    .collect()
            };
            for subnet in ended {
                self.delete(subnet);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn wake(&self) {
        self.changed.send_modify(|number| *number += 1);
    }

    /// What was done that must not be.
    pub(crate) fn faults(&self) -> Vec<String> {
        self.state().faults.clone()
    }

    pub(crate) fn entries(&self) -> BTreeMap<Subnet, LeaseAttrs> {
        let state = self.state();
        let entries = state.disk.entries.iter();
        entries
            .map(|(subnet, record)| (*subnet, record.attrs.clone()))
            .collect()
    }

    pub(crate) fn set_up(&self, up: bool) {
        self.state().up = up;
        self.wake();
    }

    pub(crate) fn wipe(&self) {
        self.state().disk = Disk::default();
        self.wake();
    }

    pub(crate) fn back_up(&self) {
        let mut state = self.state();
        state.backup = state.disk.clone();
    }

    /// Puts the backup back; as in etcd, every lease gets its full time again.
    pub(crate) fn restore(&self) {
        {
            let mut state = self.state();
            state.disk = state.backup.clone();
            let end = Instant::now() + self.ttl;
            for record in state.disk.entries.values_mut() {
                record.ends = record.ends.map(|_| end);
            }
        }
        self.wake();
    }

    pub(crate) fn compact(&self) {
        let mut state = self.state();
        state.disk.compacted = state.disk.revision;
        state.disk.log.clear();
    }

    /// Deletes whatever `attrs` holds, as an operator may.
    pub(crate) fn delete_of(&self, attrs: &LeaseAttrs) {
        let held: Vec<Subnet> = {
            let state = self.state();
            let held = state.disk.entries.iter();
            held.filter(|(_, record)| record.attrs.same_node(attrs))
                .map(|(subnet, _)| *subnet)
                .collect()
        };
        for subnet in held {
            self.delete(subnet);
        }
    }

    /// A stranger overwrites an entry, as a flanneld may.
    pub(crate) fn overwrite(&self, subnet: Subnet, attrs: &LeaseAttrs) {
        let end = Some(Instant::now() + self.ttl);
        self.state().disk.put(subnet, attrs, end);
        self.wake();
    }

    fn delete(&self, subnet: Subnet) {
        self.state().disk.delete(subnet);
        self.wake();
    }
}

impl Disk {
    fn put(&mut self, subnet: Subnet, attrs: &LeaseAttrs, ends: Option<Instant>) -> Entry {
        self.revision += 1;
        let created = self
            .entries
            .get(&subnet)
            .map_or(self.revision, |record| record.created);
        let record = Record {
            attrs: attrs.clone(),
            created,
            modified: self.revision,
            ends,
        };
        let entry = record.entry(subnet);
        self.log
            .push((self.revision, LeaseEvent::Added(entry.lease.clone())));
        self.entries.insert(subnet, record);
        entry
    }

    fn delete(&mut self, subnet: Subnet) {
        if self.entries.remove(&subnet).is_some() {
            self.revision += 1;
            self.log.push((self.revision, LeaseEvent::Removed(subnet)));
        }
    }
}

impl Record {
    #[expect(
        clippy::disallowed_methods,
        reason = "a store says in wall-clock time when a lease ends"
    )]
    fn entry(&self, subnet: Subnet) -> Entry {
        Entry {
            lease: Lease {
                subnet,
                attrs: self.attrs.clone(),
                expiration: match self.ends {
                    None => Expiration::Never,
                    Some(end) => {
                        Expiration::At(SystemTime::now() + end.saturating_duration_since(Instant::now()))
                    }
                },
                created: Some(self.created),
            },
            revision: self.modified,
            readable: true,
        }
    }
}

/// One node's way to the store.
#[derive(Clone)]
pub(crate) struct Link(Arc<Inner>);

struct Inner {
    world: Arc<World>,
    way: watch::Sender<Way>,
    /// So many requests fail, carried out or not.
    failing: Mutex<Vec<Failure>>,
    /// Peers the node was told are gone, and not told of since.
    gone: Mutex<BTreeSet<Subnet>>,
}

/// How a single request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It never gets there.
    Question,
    /// It is carried out, and the answer is lost.
    Answer,
}

impl Link {
    pub(crate) fn new(world: &Arc<World>) -> Self {
        Self(Arc::new(Inner {
            world: Arc::clone(world),
            way: watch::channel(Way::Open).0,
            failing: Mutex::default(),
            gone: Mutex::default(),
        }))
    }

    pub(crate) fn set_way(&self, way: Way) {
        self.0.way.send_replace(way);
    }

    pub(crate) fn fail_next(&self, failure: Failure) {
        self.0.failing.lock().unwrap().push(failure);
    }

    /// The peers that may have gone from the node's table.
    pub(crate) fn may_be_gone(&self) -> BTreeSet<Subnet> {
        self.0.gone.lock().unwrap().clone()
    }

    pub(crate) fn forget_failures(&self) {
        self.0.failing.lock().unwrap().clear();
    }

    fn unavailable(&self) -> StoreError {
        StoreError::Unavailable {
            doing: "test",
            place: "world".to_owned(),
            cause: "away".to_owned(),
        }
    }

    async fn passable(&self) -> Result<(), StoreError> {
        let way = *self.0.way.borrow();
        match way {
            Way::Open if self.0.world.state().up => Ok(()),
            Way::Open | Way::Refusing => Err(self.unavailable()),
            Way::Silent => {
                let mut way = self.0.way.subscribe();
                let _ = way.wait_for(|way| *way != Way::Silent).await;
                Err(self.unavailable())
            }
        }
    }

    async fn ask<T>(&self, act: impl FnOnce(&mut State) -> T) -> Result<T, StoreError> {
        // A request takes time; others come between.
        tokio::task::yield_now().await;
        self.passable().await?;
        let failure = self.0.failing.lock().unwrap().pop();
        if failure == Some(Failure::Question) {
            return Err(self.unavailable());
        }
        let (done, is_news) = {
            let mut state = self.0.world.state();
            let before = state.disk.revision;
            (act(&mut state), state.disk.revision != before)
        };
        if is_news {
            self.0.world.wake();
        }
        if failure == Some(Failure::Answer) {
            return Err(self.unavailable());
        }
        tokio::task::yield_now().await;
        Ok(done)
    }

    fn note(&self, update: &LeaseUpdate, before: &BTreeSet<Subnet>) {
        let mut gone = self.0.gone.lock().unwrap();
        match update {
            LeaseUpdate::Snapshot(leases) => {
                gone.extend(before);
                for lease in leases {
                    gone.remove(&lease.subnet);
                }
            }
            LeaseUpdate::Events(events) => {
                for event in events {
                    match event {
                        LeaseEvent::Added(lease) => gone.remove(&lease.subnet),
                        LeaseEvent::Removed(subnet) => gone.insert(*subnet),
                    };
                }
            }
        }
    }

    async fn next(&self, mut position: Position) -> Result<(WatchItem, Position), StoreError> {
        let mut changed = self.0.world.changed.subscribe();
        let mut way = self.0.way.subscribe();
        loop {
            self.passable().await?;
            let update = {
                let state = self.0.world.state();
                let disk = &state.disk;
                match position.revision {
                    Some(revision) if revision >= disk.compacted && revision <= disk.revision => {
                        let start = disk.log.partition_point(|(at, _)| *at <= revision);
                        let events: Vec<_> =
                            disk.log[start..].iter().map(|(_, event)| event.clone()).collect();
                        (!events.is_empty()).then_some((LeaseUpdate::Events(events), disk.revision))
                    }
                    Some(_) | None => {
                        let entries = disk.entries.iter();
                        let leases = entries
                            .map(|(subnet, record)| record.entry(*subnet).lease)
                            .collect();
                        Some((LeaseUpdate::Snapshot(leases), disk.revision))
                    }
                }
            };
            if let Some((update, revision)) = update {
                self.note(&update, &position.told);
                match &update {
                    LeaseUpdate::Snapshot(leases) => {
                        position.told.extend(leases.iter().map(|lease| lease.subnet));
                    }
                    LeaseUpdate::Events(events) => {
                        position
                            .told
                            .extend(events.iter().filter_map(|event| match event {
                                LeaseEvent::Added(lease) => Some(lease.subnet),
                                LeaseEvent::Removed(_) => None,
                            }));
                    }
                }
                position.revision = Some(revision);
                let cursor = Cursor(revision.to_string());
                let item = WatchItem {
                    update,
                    unreadable: Vec::new(),
                    cursor,
                };
                return Ok((item, position));
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = way.changed() => {}
            }
        }
    }
}

/// How far a watch is.
struct Position {
    revision: Option<u64>,
    /// All it ever told of.
    told: BTreeSet<Subnet>,
}

impl Registry for Link {
    fn place(&self) -> String {
        "world".to_owned()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(self.ask(|_| self.0.world.config.to_owned()))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>> {
        Box::pin(self.ask(|state| {
            let entries = state.disk.entries.iter();
            entries.map(|(subnet, record)| record.entry(*subnet)).collect()
        }))
    }

    fn put<'a>(
        &'a self,
        expected: Expected,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        let ends = self.ends(lifetime);
        Box::pin(self.ask(move |state| {
            let found = state.disk.entries.get(&subnet);
            if !expected.is(found.map(|record| record.modified)) {
                return None;
            }
            match found {
                Some(found) => {
                    if !found.attrs.same_node(attrs) {
                        state.faults.push(format!("{subnet} was taken from its owner"));
                    }
                }
                None => {
                    for (other, record) in &state.disk.entries {
                        if other.overlaps(subnet) && !record.attrs.same_node(attrs) {
                            state.faults.push(format!("{subnet} was claimed over {other}"));
                        }
                    }
                }
            }
            Some(state.disk.put(subnet, attrs, ends))
        }))
    }

    fn delete(&self, subnet: Subnet, revision: u64) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(self.ask(move |state| {
            let found = state.disk.entries.get(&subnet);
            let ours = found.is_some_and(|record| record.modified == revision);
            if ours {
                state.disk.delete(subnet);
            }
            ours
        }))
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        assert!(since.is_none(), "nodes watch from a list");
        let start = Position {
            revision: None,
            // A snapshot lacks whatever this node was ever told of by another watch.
            told: self.0.world.every_subnet(),
        };
        stream::try_unfold(start, move |position| async move {
            self.next(position).await.map(Some)
        })
        .boxed()
    }
}

impl Link {
    fn ends(&self, lifetime: Lifetime) -> Option<Instant> {
        match lifetime {
            Lifetime::Ttl => Some(Instant::now() + self.0.world.ttl),
            Lifetime::Forever => None,
        }
    }
}

impl World {
    /// Every subnet there can be: `10.0.0.0/24` cut into /28s.
    fn every_subnet(&self) -> BTreeSet<Subnet> {
        static EVERY: LazyLock<BTreeSet<Subnet>> = LazyLock::new(|| {
            (0..16)
                .map(|i| format!("10.0.0.{}-28", i * 16).parse().unwrap())
                .collect()
        });
        EVERY.clone()
    }
}
