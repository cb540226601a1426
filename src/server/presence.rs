//! Which of the nodes that ask are alive, so that a second host with the public address of one is refused.
//!
//! A node that says who it is ([`NodeHeader`]) counts as alive while it has a poll open, and for [`GONE`] after. The store keeps the claim
//! ([`Store::vouch`]); here is only told when. A poll says so as it begins, for [`ASKING`], and the last one of a node as it ends. A client
//! whose machine vanished ends by TCP keep-alive.
//!
//! A poll is never refused: a node that shares its address by mistake goes on hearing of the others, and is told when it takes or renews a
//! lease. Only who may take leases is listened to.
//!
//! A client that does not say who it is, flannel's or an old Kersey's, claims nothing. It is served as ever, but for an address that a live
//! node has claimed.
//!
//! What this is not: a proof. The number in the header is a node's own secret only as far as the connection is, and who may take leases may
//! claim an address that nobody has. A claim ends no lease and lets nobody end one.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;

use crate::control::RateLimit;
use crate::control::identity::Holder;
use crate::control::store::remote::NodeHeader;
use crate::control::store::{Store, StoreError};

/// How long a node counts as alive that took a lease or began a poll: longer than its polls.
const ASKING: Duration = Duration::from_secs(90);
/// How long after its last poll, as in etcd: time enough to ask again.
const GONE: Duration = Duration::from_secs(30);

/// The nodes of one network.
pub(super) struct Presence {
    store: Arc<dyn Store>,
    /// How many polls each has open, by address and number.
    polls: Mutex<BTreeMap<(IpAddr, String), usize>>,
    complaints: RateLimit,
}

impl Presence {
    pub(super) fn new(store: Arc<dyn Store>) -> Arc<Self> {
        Arc::new(Self {
            store,
            polls: Mutex::default(),
            complaints: RateLimit::default(),
        })
    }

    /// Lets a client take or renew a lease of an address, unless that is another live host's.
    pub(super) async fn admit(
        &self,
        doing: &'static str,
        holder: Option<&Holder>,
        address: IpAddr,
    ) -> Result<(), StoreError> {
        self.store.vouch(doing, holder, address, ASKING).await
    }

    /// Counts a poll until what is returned is dropped.
    pub(super) fn poll(self: &Arc<Self>, node: NodeHeader) -> Poll {
        *self.polls().entry(key(&node)).or_default() += 1;
        self.tell(node.clone(), ASKING);
        Poll {
            presence: Arc::clone(self),
            node,
        }
    }

    /// Tells the store, without waiting for it: a sign of life that it does not hear is followed by others.
    fn tell(self: &Arc<Self>, node: NodeHeader, life: Duration) {
        // Outside of the runtime the server is at its end.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let presence = Arc::clone(self);
        runtime.spawn(async move {
            let told = presence
                .store
                .vouch("watch the leases", Some(&node.holder), node.address, life)
                .await;
            if let Err(error @ StoreError::AddressTaken { .. }) = told
                && presence.complaints.allows()
            {
                tracing::warn!(%error, "a client goes on with an address that is not its own");
            }
        });
    }

    fn polls(&self) -> MutexGuard<'_, BTreeMap<(IpAddr, String), usize>> {
        self.polls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A poll of a node.
pub(super) struct Poll {
    presence: Arc<Presence>,
    node: NodeHeader,
}

impl Drop for Poll {
    fn drop(&mut self) {
        let key = key(&self.node);
        let mut polls = self.presence.polls();
        if let Some(count) = polls.get_mut(&key).filter(|count| **count > 1) {
            *count -= 1;
            return;
        }
        polls.remove(&key);
        drop(polls);
        self.presence.tell(self.node.clone(), GONE);
    }
}

fn key(node: &NodeHeader) -> (IpAddr, String) {
    (node.address, node.holder.id.clone())
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;
    use futures_util::stream::BoxStream;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::control::store::{Cursor, WatchItem};
    use crate::lease::{Lease, LeaseAttrs, Subnet};

    #[tokio::test(start_paused = true)]
    async fn a_node_is_alive_until_its_last_poll_ends_and_a_while_after() {
        let store = Arc::new(Told::default());
        let presence = Presence::new(Arc::clone(&store) as Arc<dyn Store>);
        let start = Instant::now();
        let (one, two) = (presence.poll(node(1)), presence.poll(node(2)));
        // The connection of before a reboot is found dead while the next poll is open.
        let again = presence.poll(node(1));
        sleep(Duration::from_secs(10)).await;
        drop(one);
        sleep(Duration::from_secs(10)).await;
        assert_eq!(store.ends(1), start + ASKING);
        drop(again);
        sleep(Duration::from_secs(10)).await;
        assert_eq!(store.ends(1), start + Duration::from_secs(20) + GONE);
        assert_eq!(store.ends(2), start + ASKING);
        drop(two);
        assert!(presence.polls().is_empty());
    }

    /// A store that notes how long it is told each node lives.
    #[derive(Default)]
    struct Told(Mutex<BTreeMap<IpAddr, Instant>>);

    impl Told {
        fn ends(&self, i: u8) -> Instant {
            self.0.lock().unwrap()[&node(i).address]
        }
    }

    impl Store for Told {
        fn place(&self) -> String {
            String::new()
        }

        fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
            unreachable!("no poll asks for it")
        }

        fn acquire<'a>(
            &'a self,
            _: &'a LeaseAttrs,
            _: Option<Subnet>,
        ) -> BoxFuture<'a, Result<Lease, StoreError>> {
            unreachable!("no poll asks for it")
        }

        fn renew<'a>(&'a self, _: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>> {
            unreachable!("no poll asks for it")
        }

        fn vouch<'a>(
            &'a self,
            _: &'static str,
            _: Option<&'a Holder>,
            address: IpAddr,
            life: Duration,
        ) -> BoxFuture<'a, Result<(), StoreError>> {
            self.0.lock().unwrap().insert(address, Instant::now() + life);
            Box::pin(async { Ok(()) })
        }

        fn watch(&self, _: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
            unreachable!("no poll asks for it")
        }
    }

    fn node(i: u8) -> NodeHeader {
        format!("192.0.2.{i} {i:032x} boot host-{i}").parse().unwrap()
    }
}
