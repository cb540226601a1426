//! One watch of the store, shared by all who poll.
//!
//! A thousand nodes each hold a long poll. The store is watched once; what it tells goes into a [`History`]: the
//! leases as they are, and the last few thousand changes, numbered. A poll names the number it has seen and gets what
//! came after, or waits. If the number is too old, or from another life of the server, the answer is a snapshot.
//!
//! A cursor is `EPOCH.NUMBER`. The epoch is drawn when the server starts, so that a cursor of a server that has since
//! been replaced, perhaps by one with an older database, never passes for one of ours.
//!
//! Memory: changes are kept as the text they are told in, [`MAX_BYTES_KEPT`] at most. The snapshot's text is made once for each change at
//! most and shared by all answers that carry it; an answer carries at most [`MAX_EVENTS_PER_ANSWER`] events in
//! [`MAX_BYTES_PER_ANSWER`], or one, and the rest is fetched with the next poll.
//!
//! A lease is known by its whole key. Old clients name its IPv4 half; the key of a lease without one is never shortened, as all of
//! those would be the same.
//!
//! While the store is away, polls wait and snapshots show the last known leases: stale routes carry packets, none do
//! not.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use futures_util::StreamExt;
use tokio::sync::watch;

use crate::control::store::Store;
use crate::control::store::remote::objects::{event_json, join_events, snapshot_json};
use crate::control::{Backoff, RateLimit};
use crate::lease::{Expiration, Lease, LeaseEvent, LeaseUpdate, Subnet};

/// Changes kept: a whole cluster of a thousand nodes renewing four times.
const MAX_EVENTS_KEPT: usize = 4096;
/// What they may take: twice as many ordinary ones. With longer lease data there are fewer, and who is further behind gets a snapshot.
const MAX_BYTES_KEPT: usize = 4 << 20;
/// Changes in one answer: some tens of kilobytes.
const MAX_EVENTS_PER_ANSWER: usize = 256;
/// The longest answer of several changes: each poller has one of its own in memory.
const MAX_BYTES_PER_ANSWER: usize = 128 << 10;
/// Snapshots compute an expiration from a remaining time in whole seconds; less than this apart is the same moment.
const SAME_MOMENT: Duration = Duration::from_secs(5);
/// Longest pause before a lost store is watched again: flannel's.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The leases as they are, and how they came to be so.
#[derive(Debug)]
pub(super) struct History {
    epoch: String,
    leases: BTreeMap<Subnet, Lease>,
    /// The last changes; the newest has the number `last`.
    events: VecDeque<Told>,
    /// How long their texts are together.
    events_bytes: usize,
    last: u64,
    /// The text of the snapshot at `last`, once somebody asked for it.
    snapshot: Option<Bytes>,
    known: Knowledge,
}

/// A change, as it is told.
#[derive(Debug)]
struct Told {
    subnet: Subnet,
    text: Box<str>,
}

/// Whether the store has been heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Knowledge {
    /// Not yet: there is nothing to answer with.
    Nothing,
    /// A snapshot was seen.
    Leases,
}

/// The answer to a poll.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Send this.
    Body(Bytes),
    /// The lease asked about does not exist.
    NoSuchLease,
}

impl History {
    pub(super) fn new(epoch: String) -> Self {
        Self {
            epoch,
            leases: BTreeMap::new(),
            events: VecDeque::new(),
            events_bytes: 0,
            last: 0,
            snapshot: None,
            known: Knowledge::Nothing,
        }
    }

    /// Takes in what the store told. Snapshots are turned into the changes they amount to.
    pub(super) fn apply(&mut self, update: LeaseUpdate) {
        let events = match update {
            LeaseUpdate::Events(events) => events,
            LeaseUpdate::Snapshot(leases) => {
                self.known = Knowledge::Leases;
                let new: BTreeMap<Subnet, Lease> =
                    leases.into_iter().map(|lease| (lease.subnet, lease)).collect();
                let gone = self.leases.keys().filter(|subnet| !new.contains_key(subnet));
                let mut events: Vec<LeaseEvent> = gone.map(|&subnet| LeaseEvent::Removed(subnet)).collect();
                events.extend(
                    new.into_values()
                        .filter(|lease| self.leases.get(&lease.subnet).is_none_or(|old| !same(old, lease)))
                        .map(LeaseEvent::Added),
                );
                events
            }
        };
        for event in events {
            let text = event_json(&event).into_boxed_str();
            let subnet = match event {
                LeaseEvent::Added(lease) => {
                    let subnet = lease.subnet;
                    self.leases.insert(subnet, lease);
                    subnet
                }
                LeaseEvent::Removed(subnet) => {
                    if self.leases.remove(&subnet).is_none() {
                        continue;
                    }
                    subnet
                }
            };
            self.last += 1;
            self.events_bytes += text.len();
            self.events.push_back(Told { subnet, text });
            self.snapshot = None;
            while self.events.len() > MAX_EVENTS_KEPT || self.events_bytes > MAX_BYTES_KEPT {
                let Some(oldest) = self.events.pop_front() else {
                    break;
                };
                self.events_bytes -= oldest.text.len();
            }
        }
    }

    /// Answers a poll for all leases by somebody who has seen everything up to `next`; `None` if there is nothing to
    /// say until the next change.
    pub(super) fn answer(&mut self, next: Option<&str>) -> Option<Answer> {
        if self.known == Knowledge::Nothing {
            return None;
        }
        match next.and_then(|cursor| self.unseen(cursor)) {
            None => Some(Answer::Body(self.snapshot_body())),
            Some(0) => None,
            Some(unseen) => {
                let first = self.events.len() - unseen;
                let mut room = MAX_BYTES_PER_ANSWER;
                let fits = |told: &&Told| {
                    let fits = told.text.len() <= room;
                    room = room.saturating_sub(told.text.len());
                    fits
                };
                let texts = self.events.range(first..).take(MAX_EVENTS_PER_ANSWER);
                // One is told however long it is.
                let count = texts.take_while(fits).count().max(1);
                let cursor = self.cursor(self.last - count_u64(unseen - count));
                let texts = self.events.range(first..first + count).map(|told| &*told.text);
                Some(Answer::Body(join_events(texts, &cursor).into()))
            }
        }
    }

    /// Answers a poll for the lease that `key` names: its next change, and only that, because flannel's clients look at the first entry
    /// of this answer only.
    pub(super) fn answer_one(&self, key: Subnet, next: Option<&str>) -> Option<Answer> {
        if self.known == Knowledge::Nothing {
            return None;
        }
        let cursor = self.cursor(self.last);
        if let Some(unseen) = next.and_then(|cursor| self.unseen(cursor)) {
            let first = self.events.len() - unseen;
            // The newest change is what counts: a lease that went and came back is there.
            let told = self
                .events
                .range(first..)
                .rev()
                .find(|told| names(key, told.subnet))?;
            return Some(Answer::Body(
                join_events([&*told.text].into_iter(), &cursor).into(),
            ));
        }
        Some(match (self.lease(key), next) {
            (Some(lease), _) => Answer::Body(snapshot_json([lease].into_iter(), &cursor).into()),
            (None, None) => Answer::NoSuchLease,
            // Its holder knew it once: tell that it went, so that a new one is acquired.
            (None, Some(_)) => {
                let gone = event_json(&LeaseEvent::Removed(key));
                Answer::Body(join_events([&*gone].into_iter(), &cursor).into())
            }
        })
    }

    /// Whether the store was heard.
    pub(super) fn is_known(&self) -> bool {
        self.known == Knowledge::Leases
    }

    /// The lease that `key` names.
    pub(super) fn lease(&self, key: Subnet) -> Option<&Lease> {
        // Keys are ordered by their IPv4 half, and that alone comes first.
        let (_, lease) = self.leases.range(key..).next()?;
        Some(lease).filter(|lease| names(key, lease.subnet))
    }

    /// All leases.
    pub(super) fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.leases.values()
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

    fn snapshot_body(&mut self) -> Bytes {
        let cursor = self.cursor(self.last);
        let leases = &self.leases;
        self.snapshot
            .get_or_insert_with(|| snapshot_json(leases.values(), &cursor).into())
            .clone()
    }

    fn cursor(&self, number: u64) -> String {
        format!("{}.{number}", self.epoch)
    }
}

/// The shared history and the bell that rings when it grows.
#[derive(Debug)]
pub(super) struct Feed {
    history: Mutex<History>,
    changed: watch::Sender<()>,
}

impl Feed {
    pub(super) fn new() -> Arc<Self> {
        let epoch = format!("{:08x}", rand::random::<u32>());
        Arc::new(Self {
            history: Mutex::new(History::new(epoch)),
            changed: watch::Sender::new(()),
        })
    }

    /// Follows the store for ever.
    pub(super) async fn follow(&self, store: &dyn Store) {
        let mut backoff = Backoff::new(LONGEST_PAUSE);
        let complaints = RateLimit::default();
        loop {
            let mut updates = store.watch(None);
            while let Some(item) = updates.next().await {
                match item {
                    Ok(item) => {
                        backoff.reset();
                        self.history().apply(item.update);
                        self.changed.send_replace(());
                    }
                    Err(error) => {
                        if complaints.allows() {
                            tracing::warn!(%error, "the store does not answer; polls get what was last known");
                        }
                        break;
                    }
                }
            }
            tokio::time::sleep(backoff.next_pause()).await;
        }
    }

    /// Asks `question` of the history now and after each change, until there is an answer.
    pub(super) async fn ask<T>(&self, mut question: impl FnMut(&mut History) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(answer) = question(&mut self.history()) {
                return answer;
            }
            // The sender lives as long as self: this cannot fail.
            let _ = changed.changed().await;
        }
    }

    /// Waits a little while until the history shows what a write did, so that its author reads its own write.
    pub(super) async fn wait_for(&self, mut shows: impl FnMut(&History) -> bool) {
        /// Longer than a store's watch takes; shorter than a client's patience.
        const PATIENCE: Duration = Duration::from_secs(2);
        let seen = self.ask(|history| shows(history).then_some(()));
        // If it takes longer, the author asks again.
        let _ = tokio::time::timeout(PATIENCE, seen).await;
    }

    /// The history; it is never held across an await, and no code that holds it panics half way.
    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `key` means the lease of `subnet`: it is its key, or the IPv4 half of it.
fn names(key: Subnet, subnet: Subnet) -> bool {
    key == subnet || key.v6.is_none() && subnet.ipv4() == Some(key.v4)
}

/// Whether two leases say the same, apart from rounding of their end.
fn same(old: &Lease, new: &Lease) -> bool {
    let same_end = match (old.expiration, new.expiration) {
        (Expiration::Never, Expiration::Never) => true,
        (Expiration::At(a), Expiration::At(b)) => {
            let apart = a.duration_since(b).unwrap_or_else(|error| error.duration());
            apart < SAME_MOMENT
        }
        (Expiration::Never, Expiration::At(_)) | (Expiration::At(_), Expiration::Never) => false,
    };
    same_end && old.attrs == new.attrs
}

fn count_u64(count: usize) -> u64 {
    // usize is at most 64 bits wide on every platform there is.
    count as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeaseAttrs;

    #[test]
    fn nothing_is_answered_before_the_store_is_heard() {
        let mut history = History::new("e".into());
        assert_eq!(history.answer(None), None);
        assert_eq!(history.answer_one(key("10.1.0.0-24"), None), None);
        history.apply(LeaseUpdate::Snapshot(vec![]));
        assert!(body(history.answer(None)).contains("\"snapshot\":[]"));
    }

    #[test]
    fn a_poll_gets_what_it_has_not_seen() {
        let mut history = heard(&[1]);
        let seen = newest(&history);
        assert_eq!(history.answer(Some(&seen)), None);
        history.apply(LeaseUpdate::Events(vec![
            LeaseEvent::Added(lease(2)),
            LeaseEvent::Removed(lease(1).subnet),
        ]));
        let text = body(history.answer(Some(&seen)));
        assert_eq!(text.matches("\"type\"").count(), 2, "{text}");
        assert!(
            text.contains(&format!("\"cursor\":\"{}\"", newest(&history))),
            "{text}"
        );
    }

    #[test]
    fn a_cursor_of_another_life_or_too_old_gets_a_snapshot() {
        let mut history = heard(&[1]);
        let old = newest(&history);
        for cursor in ["", "6", "other.1", "e.99", "e.x", "e.-1"] {
            assert!(
                body(history.answer(Some(cursor))).contains("\"events\":null"),
                "{cursor}"
            );
        }
        for _ in 0..=MAX_EVENTS_KEPT / 2 {
            history.apply(LeaseUpdate::Events(vec![
                LeaseEvent::Added(lease(2)),
                LeaseEvent::Removed(lease(2).subnet),
            ]));
        }
        assert!(body(history.answer(Some(&old))).contains("\"events\":null"));
    }

    #[test]
    fn long_news_comes_in_parts() {
        let mut history = heard(&[]);
        let mut cursor = newest(&history);
        history.apply(LeaseUpdate::Events(
            (1..=200)
                .chain(1..=200)
                .map(|n| LeaseEvent::Added(lease(n)))
                .collect(),
        ));
        let mut events = 0;
        while let Some(answer) = history.answer(Some(&cursor)) {
            let text = body(Some(answer));
            events += text.matches("\"type\"").count();
            cursor = text.rsplit('"').nth(1).unwrap().to_owned();
        }
        assert_eq!(events, 400);
    }

    #[test]
    fn a_second_snapshot_becomes_the_changes_it_means() {
        let mut history = heard(&[1, 2]);
        let seen = newest(&history);
        let mut moved = lease(2);
        moved.attrs.public_ip = "10.9.9.9".parse().unwrap();
        history.apply(LeaseUpdate::Snapshot(vec![moved, lease(3)]));
        let text = body(history.answer(Some(&seen)));
        assert_eq!(text.matches("added").count(), 2, "{text}");
        assert_eq!(text.matches("removed").count(), 1, "{text}");
        let seen = newest(&history);
        let mut again = lease(3);
        again.expiration = Expiration::Never;
        history.apply(LeaseUpdate::Snapshot(vec![
            history.lease(key("10.2.0.0-24")).unwrap().clone(),
            again,
        ]));
        assert_eq!(history.answer(Some(&seen)), None);
    }

    #[test]
    fn one_lease_is_watched_by_itself() {
        let mut history = heard(&[1]);
        let mine = key("10.1.0.0-24");
        assert!(body(history.answer_one(mine, None)).contains("\"snapshot\":[{\"Subnet\":\"10.1.0.0/24\""));
        assert_eq!(
            history.answer_one(key("10.7.0.0-24"), None),
            Some(Answer::NoSuchLease)
        );
        let seen = newest(&history);
        history.apply(LeaseUpdate::Events(vec![LeaseEvent::Added(lease(2))]));
        assert_eq!(history.answer_one(mine, Some(&seen)), None);
        history.apply(LeaseUpdate::Events(vec![LeaseEvent::Removed(lease(1).subnet)]));
        assert!(body(history.answer_one(mine, Some(&seen))).contains("removed"));
        // After a restart of the server the holder learns the same.
        assert!(body(history.answer_one(mine, Some("other.3"))).contains("removed"));
    }

    #[test]
    fn leases_without_ipv4_are_told_apart() {
        let (one, two) = ("0.0.0.0-0&fd00:1:0:9::-64", "0.0.0.0-0&fd00:1:0:43::-64");
        let six = |text: &str| Lease {
            subnet: key(text),
            ..lease(1)
        };
        let mut history = History::new("e".into());
        history.apply(LeaseUpdate::Snapshot(vec![six(one), six(two)]));
        for text in [one, two] {
            assert_eq!(
                history.lease(key(text)).map(|lease| lease.subnet),
                Some(key(text))
            );
        }
        assert_eq!(history.lease(key("0.0.0.0-0&fd00:1:0:7::-64")), None);
        assert_eq!(history.lease(key("0.0.0.0-0")), None, "that is nobody's");
        let seen = newest(&history);
        history.apply(LeaseUpdate::Events(vec![LeaseEvent::Removed(key(one))]));
        assert_eq!(history.answer_one(key(two), Some(&seen)), None);
        let gone = body(history.answer_one(key(one), Some(&seen)));
        assert!(
            gone.contains("removed") && gone.contains("fd00:1:0:9::/64"),
            "{gone}"
        );
        assert_eq!(history.answer_one(key(one), None), Some(Answer::NoSuchLease));
        // One with both is found by either name.
        let dual = "10.5.0.0-24&fd00:1:0:5::-64";
        history.apply(LeaseUpdate::Events(vec![LeaseEvent::Added(six(dual))]));
        for text in [dual, "10.5.0.0-24"] {
            assert_eq!(
                history.lease(key(text)).map(|lease| lease.subnet),
                Some(key(dual))
            );
        }
        assert_eq!(history.lease(key("10.5.0.0-24&fd00:1:0:6::-64")), None);
    }

    #[test]
    fn long_lease_data_fills_neither_the_history_nor_an_answer() {
        let mut history = heard(&[]);
        let mut cursor = newest(&history);
        let mut long = lease(1);
        long.attrs.backend_data = Some(format!("\"{}\"", "x".repeat(50_000)));
        let renewals = |count| LeaseUpdate::Events(vec![LeaseEvent::Added(long.clone()); count]);
        history.apply(renewals(50));
        let mut events = 0;
        while let Some(answer) = history.answer(Some(&cursor)) {
            let text = body(Some(answer));
            assert!(text.len() <= MAX_BYTES_PER_ANSWER + 200, "{}", text.len());
            events += text.matches("\"type\"").count();
            cursor = text.rsplit('"').nth(1).unwrap().to_owned();
        }
        assert_eq!(events, 50);
        history.apply(renewals(2_000));
        let held: usize = history.events.iter().map(|told| told.text.len()).sum();
        assert!(held <= MAX_BYTES_KEPT && held == history.events_bytes, "{held}");
        assert!(body(history.answer(Some(&cursor))).contains("\"events\":null"));
        // One change may be longer than an answer of several.
        let mut cursor = newest(&history);
        long.attrs.backend_data = Some(format!("\"{}\"", "x".repeat(2 * MAX_BYTES_PER_ANSWER)));
        history.apply(LeaseUpdate::Events(vec![LeaseEvent::Added(long.clone()); 2]));
        for _ in 0..2 {
            let text = body(history.answer(Some(&cursor)));
            assert_eq!(text.matches("\"type\"").count(), 1);
            cursor = text.rsplit('"').nth(1).unwrap().to_owned();
        }
        assert_eq!(history.answer(Some(&cursor)), None);
    }

    #[test]
    fn snapshots_share_their_text() {
        let mut history = heard(&[1]);
        let (Some(Answer::Body(a)), Some(Answer::Body(b))) = (history.answer(None), history.answer(None))
        else {
            panic!("two bodies expected");
        };
        assert_eq!(a.as_ptr(), b.as_ptr());
    }

    fn heard(numbers: &[u8]) -> History {
        let mut history = History::new("e".into());
        history.apply(LeaseUpdate::Snapshot(numbers.iter().map(|&n| lease(n)).collect()));
        history
    }

    fn lease(n: u8) -> Lease {
        Lease {
            subnet: format!("10.{n}.0.0-24").parse().unwrap(),
            attrs: LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{n}\"}}").as_bytes()).unwrap(),
            expiration: Expiration::Never,
            created: None,
        }
    }

    /// The cursor of somebody who has seen everything.
    fn newest(history: &History) -> String {
        history.cursor(history.last)
    }

    fn key(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    fn body(answer: Option<Answer>) -> String {
        match answer {
            Some(Answer::Body(body)) => String::from_utf8(body.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        }
    }
}
