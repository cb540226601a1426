//! The last changes of a kind, for watchers that come back.

use std::collections::VecDeque;

use crate::control::store::NetworkEvent;
use crate::lease::LeaseEvent;

/// How many changes of each network are kept for watchers: an hour of a 1,000-node network in which every node changes thrice.
const LOG: usize = 10_000;
/// What they may hold in memory, so that a few nodes with long lease data cannot fill it: 800 bytes each.
const LOG_BYTES: usize = 8 << 20;

/// The last changes of one kind, oldest first, each with its revision.
#[derive(Debug)]
pub(super) struct Log<E> {
    events: VecDeque<(u64, E)>,
    /// What they hold in memory, roughly.
    bytes: usize,
    /// All changes after this revision are there.
    pub(super) from: u64,
}

/// What can be told apart in a [`Log`] by how much memory it takes.
pub(super) trait Weighed {
    /// Bytes, roughly.
    fn bytes(&self) -> usize;
}

impl Weighed for LeaseEvent {
    fn bytes(&self) -> usize {
        let data = match self {
            Self::Added(lease) => lease.attrs.data_bytes(),
            Self::Removed(_) => 0,
        };
        size_of::<Self>() + data
    }
}

impl Weighed for NetworkEvent {
    fn bytes(&self) -> usize {
        match self {
            Self::Added(name) | Self::Removed(name) => size_of::<Self>() + name.as_str().len(),
        }
    }
}

impl<E: Clone + Weighed> Log<E> {
    pub(super) fn new(from: u64) -> Self {
        Self {
            events: VecDeque::new(),
            bytes: 0,
            from,
        }
    }

    pub(super) fn note(&mut self, revision: u64, event: E) {
        self.bytes += event.bytes();
        self.events.push_back((revision, event));
        while self.events.len() > LOG || self.bytes > LOG_BYTES {
            let Some((revision, event)) = self.events.pop_front() else {
                return;
            };
            self.bytes -= event.bytes();
            self.from = revision;
        }
    }

    /// The first changes after `revision`, and the revision of the last of them; `None` if there are none.
    pub(super) fn after(&self, revision: u64) -> Option<(Vec<E>, u64)> {
        /// How many at most, so that a watcher far behind does not hold up the state.
        const BATCH: usize = 1000;
        let start = self.events.partition_point(|(change, _)| *change <= revision);
        let batch = self.events.range(start..).take(BATCH);
        let last = batch.clone().last()?.0;
        Some((batch.map(|(_, event)| event.clone()).collect(), last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{Expiration, Lease, LeaseAttrs};

    #[test]
    fn long_lease_data_does_not_fill_the_memory_for_watchers() {
        let mut log = Log::new(0);
        let mut attrs = LeaseAttrs::from_json(br#"{"PublicIP":"192.0.2.1"}"#).unwrap();
        attrs.backend_data = Some(format!("\"{}\"", "x".repeat(60_000)));
        for revision in 1..=2_000 {
            let lease = Lease {
                subnet: "10.0.9.0-24".parse().unwrap(),
                attrs: attrs.clone(),
                expiration: Expiration::Never,
                created: None,
            };
            log.note(revision, LeaseEvent::Added(lease));
        }
        assert!(log.bytes <= LOG_BYTES && log.events.len() > 100, "{}", log.bytes);
        let held: usize = log.events.iter().map(|(_, event)| event.bytes()).sum();
        assert_eq!(log.bytes, held);
        // Who is further behind gets a snapshot.
        assert_eq!(log.from, log.events.front().unwrap().0 - 1);
    }
}
