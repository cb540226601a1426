//! The networks under one prefix in etcd.
//!
//! Which there are is read by leaps, from the first key of one network to the first key behind it, so that the leases of big
//! networks are not: two short requests a network, all at one revision. Then the whole prefix is watched, since etcd cannot
//! watch for an ending; the lease events that come along are let pass unread.
//!
//! Each network has a connection of its own: what befalls one does not touch another.

use std::collections::BTreeSet;
use std::sync::Arc;

use etcd_client::{EventType, GetOptions, KeyValue, WatchOptions, WatchResponse};
use futures_util::stream::{self, BoxStream};

use super::connection::{Right, refused};
use super::following::{Following, Progress};
use super::{EtcdOptions, EtcdRegistry, EtcdStore, MAX_ANSWER, clean, prefix_end};
use crate::addr::NetworkName;
use crate::control::store::{Cursor, NetworkEvent, NetworkItem, NetworkUpdate, Networks, Store, StoreError};

const DOING: &str = "watch the networks";

/// What the key that makes a network ends in.
const CONFIG: &str = "/config";

/// The networks under a prefix in etcd.
#[derive(Debug)]
pub struct EtcdNetworks {
    options: EtcdOptions,
    /// The network without a name; the watch of names uses its connection.
    unnamed: EtcdRegistry,
}

impl EtcdNetworks {
    /// Opens them; etcd itself is not asked yet.
    ///
    /// # Errors
    /// A certificate file cannot be read, or no endpoint is given.
    pub fn connect(options: EtcdOptions) -> Result<Self, StoreError> {
        let unnamed = EtcdRegistry::new(options.clone())?;
        Ok(Self { options, unnamed })
    }

    /// What every key of every network with a name begins with.
    fn root(&self) -> String {
        format!("{}/", self.unnamed.prefix)
    }

    /// The name in a key under the prefix, if it belongs to a network with a name.
    fn name<'k>(&self, key: &'k str) -> Option<(&'k str, &'k str)> {
        let rest = key.strip_prefix(&self.unnamed.prefix)?.strip_prefix('/')?;
        let end = rest.find('/')?;
        Some(rest.split_at(end))
    }

    /// The network whose config has this key.
    fn network(&self, kv: &KeyValue) -> Option<NetworkName> {
        let key = kv.key_str().ok()?;
        let (name, rest) = self.name(key)?;
        if rest != CONFIG {
            return None;
        }
        match name.parse() {
            Ok(name) => Some(name),
            Err(error) => {
                if self.unnamed.complaints.allows() {
                    tracing::warn!(?key, %error, "skipping a network");
                }
                None
            }
        }
    }

    async fn list(&self) -> Result<(BTreeSet<NetworkName>, u64), StoreError> {
        let connection = &self.unnamed.connection;
        let mut kv = connection.client(DOING).await?.kv_client();
        let root = self.root();
        let end = prefix_end(&root);
        let right = Right::ReadAll(root.clone());
        let floor = connection.floor();
        let (mut from, mut revision, mut names) = (root.into_bytes(), 0, BTreeSet::new());
        loop {
            let first = GetOptions::new()
                .with_range(end.clone())
                .with_limit(1)
                .with_keys_only()
                .with_revision(revision);
            let answer = connection.ask(DOING, &right, kv.get(from, Some(first))).await?;
            if revision == 0 {
                connection.check_history(answer.header(), floor);
                revision = answer.header().map_or(0, |header| header.revision());
            }
            let Some(found) = answer.kvs().first() else {
                return Ok((names, revision.unsigned_abs()));
            };
            let Some((name, _)) = found.key_str().ok().and_then(|key| self.name(key)) else {
                // No network's: on to the next key.
                from = [found.key(), &[0]].concat();
                continue;
            };
            let network = format!("{}{name}", self.root());
            from = prefix_end(&format!("{network}/"));
            let here = GetOptions::new().with_keys_only().with_revision(revision);
            let answer = connection
                .ask(DOING, &right, kv.get(format!("{network}{CONFIG}"), Some(here)))
                .await?;
            names.extend(answer.kvs().first().and_then(|kv| self.network(kv)));
        }
    }

    async fn follow(&self, revision: u64) -> Result<Box<Following>, StoreError> {
        let connection = &self.unnamed.connection;
        let client = connection.client(DOING).await?;
        let moved = connection.moves();
        let mut watch = client.watch_client().max_decoding_message_size(MAX_ANSWER);
        let root = self.root();
        let from = i64::try_from(revision).unwrap_or(i64::MAX).saturating_add(1);
        let options = WatchOptions::new()
            .with_range(prefix_end(&root))
            .with_start_revision(from)
            .with_progress_notify();
        let right = Right::ReadAll(root.clone());
        let stream = connection
            .ask(DOING, &right, watch.watch(root, Some(options)))
            .await?;
        Ok(Box::new(Following {
            stream,
            revision,
            moved,
        }))
    }

    /// The next state of a watch, and what it tells on the way there; as with leases.
    async fn advance(&self, progress: Progress) -> Result<(NetworkItem, Progress), StoreError> {
        let mut following = match progress {
            Progress::List => return self.snapshot().await,
            Progress::From(revision) => self.follow(revision).await?,
            Progress::Following(following) => following,
        };
        loop {
            let right = Right::ReadAll(self.root());
            let Some(answer) = self.unnamed.next_answer(DOING, &right, &mut following).await? else {
                following = self.follow(following.revision).await?;
                continue;
            };
            let current = answer
                .header()
                .map_or(0, |header| header.revision())
                .unsigned_abs();
            if answer.compact_revision() != 0 || (answer.created() && current < following.revision) {
                return self.snapshot().await;
            }
            if answer.canceled() {
                return Err(self.unnamed.ended(DOING, &right, answer.cancel_reason()));
            }
            let newest = answer
                .events()
                .iter()
                .filter_map(|event| event.kv())
                .map(KeyValue::mod_revision)
                .max();
            self.unnamed
                .connection
                .saw(i64::try_from(current).unwrap_or(i64::MAX));
            match newest {
                Some(revision) => following.revision = revision.unsigned_abs(),
                None if answer.created() => {}
                None => following.revision = following.revision.max(current),
            }
            let events = self.events(&answer);
            if !events.is_empty() {
                let item = NetworkItem {
                    update: NetworkUpdate::Events(events),
                    cursor: Cursor(following.revision.to_string()),
                };
                return Ok((item, Progress::Following(following)));
            }
        }
    }

    fn events(&self, answer: &WatchResponse) -> Vec<NetworkEvent> {
        let told = answer.events().iter().filter_map(|event| {
            let name = self.network(event.kv()?)?;
            Some(match event.event_type() {
                EventType::Put => NetworkEvent::Added(name),
                EventType::Delete => NetworkEvent::Removed(name),
            })
        });
        told.collect()
    }

    async fn snapshot(&self) -> Result<(NetworkItem, Progress), StoreError> {
        let (names, revision) = self.list().await?;
        let item = NetworkItem {
            update: NetworkUpdate::Snapshot(names),
            cursor: Cursor(revision.to_string()),
        };
        Ok((item, Progress::From(revision)))
    }
}

impl Networks for EtcdNetworks {
    fn place(&self) -> String {
        self.unnamed.connection.place().to_owned()
    }

    fn open(&self, name: Option<&NetworkName>) -> Result<Arc<dyn Store>, StoreError> {
        let prefix = match name {
            None => self.options.prefix.clone(),
            Some(name) => clean(&format!("{}/{name}", self.options.prefix)),
        };
        let store = EtcdStore::connect(EtcdOptions {
            prefix,
            ..self.options.clone()
        })?;
        Ok(Arc::new(store))
    }

    fn resets(&self) -> u64 {
        self.unnamed.connection.resets()
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<NetworkItem, StoreError>> {
        let start = match since.as_ref().map(|cursor| cursor.0.parse()) {
            None => Ok(Progress::List),
            Some(Ok(revision)) => Ok(Progress::From(revision)),
            Some(Err(_)) => Err(refused(DOING, "the cursor is no etcd revision")),
        };
        match start {
            Err(error) => Box::pin(stream::once(async { Err(error) })),
            Ok(start) => Box::pin(stream::try_unfold(start, move |progress| async move {
                self.advance(progress).await.map(Some)
            })),
        }
    }
}
