//! The watch: a list, then every change after it.
//!
//! It lists page by page at one revision, then watches from the next revision on, so that nothing between is missed.
//! Four things end or restart it:
//!
//! - The stream breaks: the watch ends with an error, and the caller watches anew, from a list.
//! - The revision was compacted away, or etcd's history is shorter than the cursor (restored from a backup): it lists
//!   again by itself and goes on with a snapshot.
//! - A request had to look for a member that answers: it watches there, too, from where it was.
//! - Nothing comes. HTTP/2 pings find a dead connection; a server that answers pings but has lost its
//!   leader or hangs is found by asking for a progress notice and by `require-leader`. Either takes less than 15 s.

use std::time::Duration;

use etcd_client::{EventType, KeyValue, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::connection::Right;
use super::{EtcdRegistry, Expirations, MAX_ANSWER, prefix_end};
use crate::control::store::{Cursor, StoreError, WatchItem};
use crate::lease::{LeaseEvent, LeaseUpdate};

/// How long a watch may be quiet before it is asked for a progress notice; after as long again it is given up.
const QUIET: Duration = Duration::from_secs(7);

/// Where a watch stands.
pub(super) enum Progress {
    /// It lists next.
    List,
    /// It follows the changes after this revision next.
    From(u64),
    /// It follows the changes.
    Following(Box<Following>),
}

pub(super) struct Following {
    pub(super) stream: WatchStream,
    /// Everything up to here has been told.
    pub(super) revision: u64,
    /// Requests go by another connection than the stream from the moment this tells of.
    pub(super) moved: watch::Receiver<u64>,
}

const DOING: &str = "watch the leases";

impl EtcdRegistry {
    async fn open_watch(&self, revision: u64) -> Result<Box<Following>, StoreError> {
        let client = self.connection.client(DOING).await?;
        let moved = self.connection.moves();
        let mut watch = client.watch_client().max_decoding_message_size(MAX_ANSWER);
        let from = i64::try_from(revision).unwrap_or(i64::MAX).saturating_add(1);
        let prefix = self.subnets();
        let right = Right::ReadAll(prefix.clone());
        let options = WatchOptions::new()
            .with_range(prefix_end(&prefix))
            .with_start_revision(from)
            .with_progress_notify();
        let stream = self
            .connection
            .ask(DOING, &right, watch.watch(prefix, Some(options)))
            .await?;
        Ok(Box::new(Following {
            stream,
            revision,
            moved,
        }))
    }

    /// The next state of a watch, and what it tells on the way there.
    pub(super) async fn advance(&self, progress: Progress) -> Result<(WatchItem, Progress), StoreError> {
        let mut following = match progress {
            Progress::List => return self.snapshot().await,
            Progress::From(revision) => self.open_watch(revision).await?,
            Progress::Following(following) => following,
        };
        loop {
            let right = Right::ReadAll(self.subnets());
            let Some(answer) = self.next_answer(DOING, &right, &mut following).await? else {
                following = self.open_watch(following.revision).await?;
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
                return Err(self.ended(DOING, &right, answer.cancel_reason()));
            }
            self.connection.saw(i64::try_from(current).unwrap_or(i64::MAX));
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
                    unreadable: Vec::new(),
                    cursor: Cursor(following.revision.to_string()),
                };
                return Ok((item, Progress::Following(following)));
            }
        }
    }

    async fn snapshot(&self) -> Result<(WatchItem, Progress), StoreError> {
        let (entries, revision) = self.list_at_revision().await?;
        let unreadable = entries.iter().filter(|entry| !entry.readable);
        let unreadable = unreadable.map(|entry| entry.lease.subnet).collect();
        // In the memory they are in.
        let told = entries.into_iter().filter(|entry| entry.readable);
        let item = WatchItem {
            update: LeaseUpdate::Snapshot(told.map(|entry| entry.lease).collect()),
            unreadable,
            cursor: Cursor(revision.to_string()),
        };
        Ok((item, Progress::From(revision)))
    }

    /// The next word of a watch, which does not stay silent for long if all is well; none if it is to be opened anew, where requests go by
    /// now. Else a member that was slow for a moment would be held on to by the watch, beside the connection that took its place.
    pub(super) async fn next_answer(
        &self,
        doing: &'static str,
        right: &Right,
        Following { stream, moved, .. }: &mut Following,
    ) -> Result<Option<WatchResponse>, StoreError> {
        for _ in 0..2 {
            let heard = tokio::select! {
                biased;
                heard = timeout(QUIET, stream.message()) => heard,
                Ok(()) = moved.changed() => return Ok(None),
            };
            match heard {
                Ok(Ok(Some(answer))) => return Ok(Some(answer)),
                Ok(Ok(None)) => {
                    return Err(self.connection.unavailable(doing, "the stream ended".to_owned()));
                }
                Ok(Err(error)) => return Err(self.connection.error(doing, right, &error)),
                Err(_) => {
                    self.connection
                        .ask(doing, &Right::None, stream.request_progress())
                        .await?;
                }
            }
        }
        Err(self
            .connection
            .unavailable(doing, "the watch fell silent".to_owned()))
    }

    async fn events(&self, answer: &WatchResponse) -> Vec<LeaseEvent> {
        let mut events = Vec::with_capacity(answer.events().len());
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            match event.event_type() {
                EventType::Put => {
                    let Some(mut entry) = self.entry(kv).filter(|(entry, _)| entry.readable) else {
                        continue;
                    };
                    self.presence.look_at(&entry.0.lease, kv.lease());
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

    /// Why etcd ended a watch.
    pub(super) fn ended(&self, doing: &'static str, right: &Right, reason: &str) -> StoreError {
        if reason.contains("permission denied") {
            return self.connection.refusal(doing, right, reason);
        }
        self.connection
            .unavailable(doing, format!("etcd ended the watch: {reason}"))
    }
}
