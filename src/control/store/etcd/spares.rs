//! Etcd leases whose keys may not have been written.
//!
//! A lease is granted first and its key put after. While grants go and puts do not, every attempt would leave an etcd lease of a day
//! behind. So the one of the last attempt is kept for the same node's next, and no longer than a lease is still long after that.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::lease::LeaseAttrs;

/// An etcd lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) id: i64,
    pub(super) ttl: Duration,
    /// When it was asked for: it ends no earlier than `ttl` after.
    pub(super) at: Instant,
}

impl Grant {
    /// Whether most of it is left.
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < self.ttl / 4
    }
}

/// One for each node that could not write.
#[derive(Debug, Default)]
pub(super) struct Spares(Mutex<BTreeMap<IpAddr, Grant>>);

impl Spares {
    /// The one of the node's last attempt.
    pub(super) fn take(&self, attrs: &LeaseAttrs) -> Option<Grant> {
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spares.remove(&attrs.address()?).filter(Grant::is_fresh)
    }

    pub(super) fn keep(&self, attrs: &LeaseAttrs, grant: Grant) {
        let Some(address) = attrs.address() else { return };
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Nodes that never come back must not fill the memory.
        spares.retain(|_, spare| spare.is_fresh());
        spares.insert(address, grant);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_attempt_goes_on_with_the_etcd_lease_of_the_last_one_while_that_is_fresh() {
        let node =
            |i: u8| LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap();
        let spares = Spares::default();
        let grant = Grant {
            id: 7,
            ttl: Duration::from_secs(3600),
            at: Instant::now(),
        };
        spares.keep(&node(1), grant);
        assert_eq!(spares.take(&node(2)), None, "another node's");
        assert_eq!(spares.take(&node(1)), Some(grant));
        assert_eq!(spares.take(&node(1)), None, "it is in use");
        spares.keep(&node(1), grant);
        tokio::time::advance(Duration::from_secs(1000)).await;
        assert_eq!(spares.take(&node(1)), None, "it would end early");
        spares.keep(&node(1), grant);
        spares.keep(
            &node(2),
            Grant {
                id: 8,
                at: Instant::now(),
                ..grant
            },
        );
        assert_eq!(spares.0.lock().unwrap().len(), 1, "an old one is kept for ever");
    }
}
