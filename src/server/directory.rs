//! The networks a server has, and which there are.
//!
//! The network without a name is there from the start. Those with a name are followed in the store as they come and go
//! ([`Networks::watch`]); of each, config and leases are looked at once somebody asks for it. When a network's config is removed,
//! the network is gone: polls that wait for its leases end with an error, as every other question about it does.
//!
//! A network that nobody has asked for in [`IDLE`] is no longer looked at, and where [`MAX_NETWORKS`] are, the one that nobody has
//! asked for longest makes room. One that somebody polls stays. Who comes back to it gets a snapshot.
//!
//! Clients follow the names as they follow leases, with a cursor `EPOCH.NUMBER` of the same kind (`feed`). Each is told of the
//! networks it may read, and of no other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::access::{Grants, Right, UNNAMED};
use super::feed::Feed;
use super::presence::Presence;
use super::quota::Quota;
use crate::addr::NetworkName;
use crate::control::store::remote::networks::{network_events_json, networks_json};
use crate::control::store::{NetworkEvent, NetworkUpdate, Networks, Store, StoreError};
use crate::control::{Backoff, RateLimit};

/// Changes kept: more than anybody makes between two polls.
const MAX_EVENTS_KEPT: usize = 1024;
/// Networks with a name that are looked at; each has a watch of its own in the store.
const MAX_NETWORKS: usize = 1024;
/// How long one is looked at after the last question: longer than a poll of one that is in use takes to come again.
const IDLE: Duration = Duration::from_secs(600);
/// Longest pause before a lost store is watched again.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// One network: its store, and what is known of its leases.
pub(super) struct Network {
    pub(super) store: Arc<dyn Store>,
    pub(super) feed: Arc<Feed>,
    pub(super) presence: Arc<Presence>,
    pub(super) quota: Arc<Quota>,
    /// Becomes true when the network is removed.
    gone: watch::Sender<bool>,
    following: Option<AbortHandle>,
}

impl Network {
    /// A network whose leases somebody else follows.
    fn new(store: Arc<dyn Store>) -> Self {
        Self {
            presence: Presence::new(Arc::clone(&store)),
            quota: Arc::default(),
            store,
            feed: Feed::new(),
            gone: watch::Sender::new(false),
            following: None,
        }
    }

    /// The same, which follows them itself as long as it is there.
    fn followed(store: Arc<dyn Store>) -> Self {
        let mut network = Self::new(Arc::clone(&store));
        let feed = Arc::clone(&network.feed);
        let task = tokio::spawn(async move { feed.follow(&*store).await });
        network.following = Some(task.abort_handle());
        network
    }

    /// Completes when the network is removed.
    pub(super) async fn gone(&self) {
        // The sender lives as long as self: this cannot fail.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(task) = &self.following {
            task.abort();
        }
    }
}

/// Why there is no network to be had.
pub(super) enum Missing {
    /// There is none of that name.
    NoSuchNetwork,
    /// Which there are is not known yet.
    NotReady,
    /// It cannot be looked at beside so many others.
    TooMany,
    /// It cannot be opened.
    Store(StoreError),
}

/// A network that is looked at.
struct Open {
    network: Arc<Network>,
    /// When somebody last asked for it.
    asked: Instant,
}

impl Open {
    /// Whether a request is being answered from it.
    fn is_in_use(&self) -> bool {
        Arc::strong_count(&self.network) > 1
    }
}

/// All networks.
pub(super) struct Directory {
    unnamed: Arc<Network>,
    /// Those with a name, if the store can have any.
    networks: Option<Arc<dyn Networks>>,
    names: Mutex<Names>,
    complaints: RateLimit,
    changed: watch::Sender<()>,
}

/// The names there are, and how they came to be.
struct Names {
    epoch: String,
    /// Whether the store was heard.
    known: bool,
    names: BTreeSet<NetworkName>,
    /// The last changes; the newest has the number `last`.
    events: VecDeque<NetworkEvent>,
    last: u64,
    /// Those somebody asked for.
    open: BTreeMap<NetworkName, Open>,
}

impl Directory {
    /// The network without a name, and those of `networks`.
    pub(super) fn new(unnamed: Arc<dyn Store>, networks: Option<Arc<dyn Networks>>) -> Self {
        Self {
            unnamed: Arc::new(Network::new(unnamed)),
            names: Mutex::new(Names {
                epoch: format!("{:08x}", rand::random::<u32>()),
                known: networks.is_none(),
                names: BTreeSet::new(),
                events: VecDeque::new(),
                last: 0,
                open: BTreeMap::new(),
            }),
            networks,
            complaints: RateLimit::default(),
            changed: watch::Sender::new(()),
        }
    }

    /// Follows the store for ever: the leases of the network without a name, and the names of the others.
    pub(super) async fn follow(&self) {
        let Network { store, feed, .. } = &*self.unnamed;
        tokio::join!(feed.follow(&**store), self.follow_names(), self.close_idle());
    }

    /// Ends looking at networks that nobody asks for.
    async fn close_idle(&self) {
        loop {
            tokio::time::sleep(IDLE / 10).await;
            let now = Instant::now();
            self.names()
                .open
                .retain(|_, open| open.is_in_use() || now - open.asked < IDLE);
        }
    }

    /// The network of that name.
    pub(super) fn network(&self, name: &str) -> Result<Arc<Network>, Missing> {
        if name == UNNAMED {
            return Ok(Arc::clone(&self.unnamed));
        }
        let (Some(networks), Ok(name)) = (&self.networks, name.parse::<NetworkName>()) else {
            return Err(Missing::NoSuchNetwork);
        };
        let mut state = self.names();
        if !state.known {
            return Err(Missing::NotReady);
        }
        if !state.names.contains(&name) {
            return Err(Missing::NoSuchNetwork);
        }
        let asked = Instant::now();
        if let Some(open) = state.open.get_mut(&name) {
            open.asked = asked;
            return Ok(Arc::clone(&open.network));
        }
        if state.open.len() >= MAX_NETWORKS && !state.close_eldest() {
            if self.complaints.allows() {
                tracing::warn!(network = %name, max = MAX_NETWORKS, "too many networks are in use at a time");
            }
            return Err(Missing::TooMany);
        }
        let store = networks.open(Some(&name)).map_err(Missing::Store)?;
        let network = Arc::new(Network::followed(store));
        let open = Open {
            network: Arc::clone(&network),
            asked,
        };
        state.open.insert(name, open);
        Ok(network)
    }

    /// Answers a poll for names by somebody who has seen everything up to `next` and may read what `grants` says at the time.
    pub(super) async fn answer(&self, next: Option<&str>, grants: impl Fn() -> Grants) -> String {
        let mut changed = self.changed.subscribe();
        loop {
            let grants = grants();
            let readable = |name: &NetworkName| grants.check(name.as_str(), Right::Read).is_ok();
            if let Some(answer) = self.names().answer(next, &readable) {
                return answer;
            }
            // The sender lives as long as self: this cannot fail.
            let _ = changed.changed().await;
        }
    }

    async fn follow_names(&self) {
        let Some(networks) = &self.networks else {
            return std::future::pending().await;
        };
        let mut backoff = Backoff::new(LONGEST_PAUSE);
        let complaints = RateLimit::default();
        loop {
            let mut updates = networks.watch(None);
            while let Some(item) = updates.next().await {
                match item {
                    Ok(item) => {
                        backoff.reset();
                        self.names().apply(item.update);
                        self.changed.send_replace(());
                    }
                    Err(error) => {
                        if complaints.allows() {
                            tracing::warn!(%error, "cannot follow which networks there are; those known stay");
                        }
                        break;
                    }
                }
            }
            tokio::time::sleep(backoff.next_pause()).await;
        }
    }

    /// The names; the lock is never held across an await.
    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Names {
    /// Takes in what the store told. Of a snapshot, what differs.
    fn apply(&mut self, update: NetworkUpdate) {
        self.known = true;
        let mut now = self.names.clone();
        update.apply(&mut now);
        let gone = self.names.difference(&now).cloned().map(NetworkEvent::Removed);
        let new = now.difference(&self.names).cloned().map(NetworkEvent::Added);
        let events: Vec<NetworkEvent> = gone.chain(new).collect();
        for event in events {
            if let NetworkEvent::Removed(name) = &event
                && let Some(open) = self.open.remove(name)
            {
                open.network.gone.send_replace(true);
            }
            self.events.push_back(event);
            self.last += 1;
        }
        let surplus = self.events.len().saturating_sub(MAX_EVENTS_KEPT);
        self.events.drain(..surplus);
        self.names = now;
    }

    /// Closes the network that nobody has asked for longest, unless all are in use.
    fn close_eldest(&mut self) -> bool {
        let idle = self.open.iter().filter(|(_, open)| !open.is_in_use());
        let eldest = idle
            .min_by_key(|(_, open)| open.asked)
            .map(|(name, _)| name.clone());
        eldest.is_some_and(|name| self.open.remove(&name).is_some())
    }

    fn answer(&self, next: Option<&str>, readable: &impl Fn(&NetworkName) -> bool) -> Option<String> {
        if !self.known {
            return None;
        }
        let cursor = format!("{}.{}", self.epoch, self.last);
        let Some(unseen) = next.and_then(|next| self.unseen(next)) else {
            return Some(networks_json(
                self.names.iter().filter(|name| readable(name)),
                &cursor,
            ));
        };
        let news: Vec<&NetworkEvent> = self
            .events
            .range(self.events.len() - unseen..)
            .filter(|event| match event {
                NetworkEvent::Added(name) | NetworkEvent::Removed(name) => readable(name),
            })
            .collect();
        (!news.is_empty()).then(|| network_events_json(news.into_iter(), &cursor))
    }

    /// How many of the kept changes came after `cursor`; `None` if that cannot be told.
    fn unseen(&self, cursor: &str) -> Option<usize> {
        let number: u64 = cursor
            .strip_prefix(&self.epoch)?
            .strip_prefix('.')?
            .parse()
            .ok()?;
        let unseen = usize::try_from(self.last.checked_sub(number)?).ok()?;
        (unseen <= self.events.len()).then_some(unseen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::store::{EmbeddedNetworks, LEASE_TTL};

    #[test]
    fn names_are_told_by_cursor_and_only_to_whom_they_concern() {
        let mut names = Names {
            epoch: "e".to_owned(),
            known: false,
            names: BTreeSet::new(),
            events: VecDeque::new(),
            last: 0,
            open: BTreeMap::new(),
        };
        let all = |_: &NetworkName| true;
        let only_blue = |name: &NetworkName| name.as_str() == "blue";
        assert_eq!(
            names.answer(None, &all),
            None,
            "nothing is said before the store is heard"
        );
        names.apply(NetworkUpdate::Snapshot([name("blue")].into()));
        let snapshot = "{\"events\":null,\"snapshot\":[\"blue\"],\"cursor\":\"e.1\"}\n";
        assert_eq!(names.answer(None, &all).as_deref(), Some(snapshot));
        assert_eq!(names.answer(Some("other.7"), &all).as_deref(), Some(snapshot));
        assert_eq!(names.answer(Some("e.1"), &all), None);
        // Told again as its config changed: no news.
        names.apply(NetworkUpdate::Events(vec![NetworkEvent::Added(name("blue"))]));
        assert_eq!(names.answer(Some("e.1"), &all), None);
        names.apply(NetworkUpdate::Events(vec![NetworkEvent::Added(name("green"))]));
        assert!(
            names
                .answer(Some("e.1"), &all)
                .unwrap()
                .contains("\"network\":\"green\"")
        );
        assert_eq!(names.answer(Some("e.1"), &only_blue), None);
        names.apply(NetworkUpdate::Snapshot([name("green")].into()));
        let told = names.answer(Some("e.1"), &only_blue).unwrap();
        assert!(told.contains("removed") && !told.contains("green"), "{told}");
        assert_eq!(
            names.answer(None, &only_blue).as_deref(),
            Some("{\"events\":null,\"snapshot\":[],\"cursor\":\"e.3\"}\n")
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_too_many_is_not_taken_for_one_that_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let networks = EmbeddedNetworks::open(&dir.path().join("leases.redb"), LEASE_TTL).unwrap();
        let unnamed = Arc::new(networks.store(None));
        let directory = Directory::new(unnamed, Some(Arc::new(networks)));
        let all: Vec<String> = (0..=MAX_NETWORKS).map(|number| format!("n{number}")).collect();
        let known = all.iter().map(|text| name(text)).collect();
        directory.names().apply(NetworkUpdate::Snapshot(known));
        let mut used = Vec::new();
        for name in &all[..MAX_NETWORKS] {
            used.push(directory.network(name).ok().unwrap());
        }
        let one_more = &all[MAX_NETWORKS];
        assert!(matches!(directory.network(one_more), Err(Missing::TooMany)));
        assert!(matches!(directory.network("other"), Err(Missing::NoSuchNetwork)));
        // The one that nobody uses makes room.
        used.remove(7);
        assert!(directory.network(one_more).is_ok());
        assert!(!directory.names().open.contains_key(&name("n7")));
        // In time all go that are not in use.
        used.truncate(3);
        let _ = tokio::time::timeout(IDLE * 2, directory.close_idle()).await;
        assert_eq!(directory.names().open.len(), 3);
    }

    fn name(text: &str) -> NetworkName {
        text.parse().unwrap()
    }
}
