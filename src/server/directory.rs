//! The networks a server has, and which there are.
//!
//! The network without a name is there from the start. Those with a name are followed in the store as they come and go
//! ([`Networks::watch`], a list every five minutes); of each, config and leases are looked at once somebody asks for it. When a network's config is removed,
//! the network is gone: polls that wait for its leases end with an error, as every other question about it does.
//!
//! Clients follow the names as they follow leases, with a cursor `EPOCH.NUMBER` of the same kind (`feed`). Each is told of the
//! networks it may read, and of no other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::access::UNNAMED;
use super::feed::{Feed, PACE};
use super::presence::Presence;
use crate::addr::NetworkName;
use crate::control::store::remote::networks::{network_events_json, networks_json};
use crate::control::store::{NetworkEvent, NetworkUpdate, Networks, Store, StoreError};
use crate::control::{RateLimit, follow};

/// Changes kept: more than anybody makes between two polls.
const MAX_EVENTS_KEPT: usize = 1024;
/// Networks with a name that are looked at; each has a watch of its own in the store.
const MAX_NETWORKS: usize = 1024;

/// One network: its store, and what is known of its leases.
pub(super) struct Network {
    pub(super) store: Arc<dyn Store>,
    pub(super) feed: Arc<Feed>,
    pub(super) presence: Arc<Presence>,
    /// Becomes true when the network is removed.
    gone: watch::Sender<bool>,
    following: Option<AbortHandle>,
}

impl Network {
    /// A network whose leases somebody else follows.
    fn new(store: Arc<dyn Store>) -> Self {
        Self {
            presence: Presence::new(Arc::clone(&store)),
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
    /// It cannot be opened.
    Store(StoreError),
}

/// All networks.
pub(super) struct Directory {
    unnamed: Arc<Network>,
    /// Those with a name, if the store can have any.
    networks: Option<Arc<dyn Networks>>,
    names: Mutex<Names>,
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
    open: BTreeMap<NetworkName, Arc<Network>>,
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
            changed: watch::Sender::new(()),
        }
    }

    /// Follows the store for ever: the leases of the network without a name, and the names of the others.
    pub(super) async fn follow(&self) {
        let Network { store, feed, .. } = &*self.unnamed;
        tokio::join!(feed.follow(&**store), self.follow_names());
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
        if !state.names.contains(&name)
            || (state.open.len() >= MAX_NETWORKS && !state.open.contains_key(&name))
        {
            return Err(Missing::NoSuchNetwork);
        }
        if let Some(network) = state.open.get(&name) {
            return Ok(Arc::clone(network));
        }
        let store = networks.open(Some(&name)).map_err(Missing::Store)?;
        let network = Arc::new(Network::followed(store));
        state.open.insert(name, Arc::clone(&network));
        Ok(network)
    }

    /// Answers a poll for names by somebody who has seen everything up to `next` and may read what `readable` says.
    pub(super) async fn answer(&self, next: Option<&str>, readable: impl Fn(&NetworkName) -> bool) -> String {
        let mut changed = self.changed.subscribe();
        loop {
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
        let complaints = RateLimit::default();
        let mut updates = follow::networks(&**networks, BTreeSet::new(), PACE);
        while let Some(told) = updates.next().await {
            match told {
                Ok(update) => {
                    self.names().apply(update);
                    self.changed.send_replace(());
                }
                Err(error) => {
                    if complaints.allows() {
                        tracing::warn!(%error, "cannot follow which networks there are; those known stay");
                    }
                }
            }
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
                && let Some(network) = self.open.remove(name)
            {
                network.gone.send_replace(true);
            }
            self.events.push_back(event);
            self.last += 1;
        }
        let surplus = self.events.len().saturating_sub(MAX_EVENTS_KEPT);
        self.events.drain(..surplus);
        self.names = now;
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

    fn name(text: &str) -> NetworkName {
        text.parse().unwrap()
    }
}
