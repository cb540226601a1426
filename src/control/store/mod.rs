//! Where leases live.
//!
//! [`Store`] is what the daemon and the server talk to: one network's config and leases. A store that
//! is a plain key space (etcd, embedded) is a [`Registry`], and `LocalStore` in this module runs flannel's
//! allocation over it; a remote store sends the same requests to a Kersey (or old flannel) server, which allocates.
//! [`Networks`] opens one where a store has several networks.

pub mod embedded;
pub mod etcd;
mod local;
mod networks;
mod open;
pub mod remote;

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt};

use crate::control::identity::Holder;
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseUpdate, Subnet};

pub use embedded::{EmbeddedNetworks, EmbeddedStore};
pub use etcd::{EtcdNetworks, EtcdOptions, EtcdStore, Expirations};
pub use local::LocalStore;
pub use networks::{NetworkEvent, NetworkItem, NetworkUpdate, Networks};
pub use open::{OpenError, embedded_file, open, open_networks};
pub use remote::{RemoteNetworks, RemoteStore};

/// A place in a store's history; its text goes into the HTTP API as is (`[0-9A-Za-z._-]`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cursor(pub String);

/// An update and the place in history up to which it is the truth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchItem {
    /// What changed.
    pub update: LeaseUpdate,
    /// Beside a snapshot: leases that are there and cannot be read. They are not gone; see [`completed`](Self::completed).
    pub unreadable: Vec<Subnet>,
    /// Where to resume after it.
    pub cursor: Cursor,
}

impl WatchItem {
    /// The update, in which leases that cannot be read are as they were `known` before: a bad entry is no removal.
    pub fn completed(self, known: impl Fn(Subnet) -> Option<Lease>) -> LeaseUpdate {
        match self.update {
            LeaseUpdate::Snapshot(mut leases) => {
                leases.extend(self.unreadable.into_iter().filter_map(known));
                LeaseUpdate::Snapshot(leases)
            }
            LeaseUpdate::Events(events) => LeaseUpdate::Events(events),
        }
    }
}

/// Why a store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached or did not answer in time; a retry can mend it.
    #[error("cannot {doing}: the store {place} is unavailable: {cause}")]
    Unavailable {
        /// What we were doing.
        doing: &'static str,
        /// Endpoint or path.
        place: String,
        /// The cause in words.
        cause: String,
    },
    /// The store answered, and refused: bad credentials, no such network, out of subnets, malformed config.
    #[error("cannot {doing}: {cause}")]
    Refused {
        /// What we were doing.
        doing: &'static str,
        /// The cause in words; names field, value and rule.
        cause: String,
    },
    /// Another live host has the public address.
    #[error("cannot {doing}: {cause}")]
    AddressTaken {
        /// What we were doing.
        doing: &'static str,
        /// The cause in words; names the address and both hosts.
        cause: String,
    },
    /// The lease asked about belongs to somebody else, or is gone.
    #[error("the lease of {subnet} is lost: {cause}")]
    LeaseLost {
        /// The subnet of the lease.
        subnet: Subnet,
        /// What is there instead.
        cause: String,
    },
}

impl StoreError {
    /// Whether the store answered; if not, waiting may be all it takes.
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Unavailable { .. } => true,
            Self::Refused { .. } | Self::AddressTaken { .. } | Self::LeaseLost { .. } => false,
        }
    }

    /// Whether somebody else has what is ours.
    pub fn is_conflict(&self) -> bool {
        match self {
            Self::AddressTaken { .. } | Self::LeaseLost { .. } => true,
            Self::Unavailable { .. } | Self::Refused { .. } => false,
        }
    }
}

/// One network's config and leases, as a node sees them.
pub trait Store: Send + Sync {
    /// Where this store is, for logs: `etcd http://127.0.0.1:2379`, `embedded /var/lib/kersey/leases.redb`.
    fn place(&self) -> String;

    /// The network configuration, JSON text as it stands in the store.
    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>>;

    /// Acquires a lease for the node `attrs` describes: its old subnet if the store still knows it by public IP,
    /// else `previous` if free and fitting, else a random free one. Lost races are retried inside.
    fn acquire<'a>(
        &'a self,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>>;

    /// Renews a lease this node holds; compare-and-swap, never overwrites somebody else's.
    fn renew<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>>;

    /// [`acquire`](Self::acquire), refused if another live host has the same public address and the store can tell.
    fn acquire_as<'a>(
        &'a self,
        _holder: &'a Holder,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.acquire(attrs, previous)
    }

    /// [`renew`](Self::renew), refused if another live host has the same public address and the store can tell.
    fn renew_as<'a>(
        &'a self,
        _holder: &'a Holder,
        lease: &'a Lease,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.renew(lease)
    }

    /// Renews a lease that the store knows this node to hold under other public addresses, those of `formerly`: the node has moved. Refused
    /// if another live host has the new address and the store can tell.
    ///
    /// Where renewals are taken from anybody, it is one like any other.
    fn readdress<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        lease: &'a Lease,
        _formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.renew(lease)
    }

    /// Looks whether `subnet` is leased to the very node `attrs` describes, saying just that, for long enough yet, and `holder` is known
    /// as the one host with its public address. It writes nothing, so that it waits for no disk. `None` says that a look is not enough:
    /// [`acquire`](Self::acquire) finds out.
    fn confirm<'a>(
        &'a self,
        _holder: Option<&'a Holder>,
        _subnet: Subnet,
        _attrs: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    /// Notes for `life` that `holder`, the node of a server's client, is alive and has the public address `address`; refused
    /// while another live host has it and the store can tell. `doing` is what the node is doing. Of a client that does not say
    /// who it is, nothing is noted; it is refused while anybody known has the address.
    fn vouch<'a>(
        &'a self,
        _doing: &'static str,
        _holder: Option<&'a Holder>,
        _address: IpAddr,
        _life: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }

    /// [`readdress`](Self::readdress) for a client that is not trusted with reservations: those stay with the address that the operator
    /// gave.
    fn readdress_client<'a>(
        &'a self,
        lease: &'a Lease,
        _formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        self.renew(lease)
    }

    /// This host has other addresses: connections made before may lead nowhere, and are not to be waited for.
    fn distrust(&self) {}

    /// How many keys or values under this network were skipped so far because they could not be read.
    fn skipped(&self) -> u64 {
        0
    }

    /// How often the store was found wiped, restored from a backup or exchanged for another.
    fn resets(&self) -> u64 {
        0
    }

    /// Gives up a lease, reservation or not.
    fn revoke(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        unsupported("revoke a lease", subnet)
    }

    /// Gives up a lease if there is one and `may_go` says so of it as it is at that moment; tells whether it went.
    fn revoke_if<'a>(
        &'a self,
        subnet: Subnet,
        _may_go: &'a (dyn Fn(&Lease) -> bool + Sync),
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        let cause = format!("{subnet}: this kind of store cannot tell whose it is");
        Box::pin(async move {
            Err(StoreError::Refused {
                doing: "revoke a lease",
                cause,
            })
        })
    }

    /// Binds `subnet` for good to the node whose public address `attrs` carries: a free subnet is reserved, the
    /// node's own lease loses its end. Where the network has two families and `subnet` is IPv4 only, it is that of the lease with this
    /// IPv4 half, or else IPv6 is chosen.
    fn reserve<'a>(
        &'a self,
        subnet: Subnet,
        _attrs: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        unsupported("reserve a subnet", subnet)
    }

    /// Turns a reservation back into a lease that ends.
    fn unreserve(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        unsupported("end a reservation", subnet)
    }

    /// Watches all leases from `since`, or from a fresh snapshot. The first item of a watch without `since` is a
    /// snapshot. A stream that ends or fails is watched anew by the caller, without `since`.
    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>>;
}

/// A lease as a registry keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The lease.
    pub lease: Lease,
    /// The revision of its last change; compare-and-swap compares it.
    pub revision: u64,
    /// Whether its value could be read. If not, its attributes are [nobody's](LeaseAttrs::of_nobody), and yet its subnet is taken.
    pub readable: bool,
}

/// How long an entry lives without renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The registry's lease time.
    Ttl,
    /// For good: a reservation.
    Forever,
}

/// What must stand at a key for a write to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing: the write makes an entry.
    Nothing,
    /// The entry with this revision: the write replaces it.
    Revision(u64),
}

impl Expected {
    /// Whether an entry of this revision, if any, is what is expected.
    pub fn is(self, found: Option<u64>) -> bool {
        match self {
            Self::Nothing => found.is_none(),
            Self::Revision(revision) => found == Some(revision),
        }
    }

    /// What such a write does, for errors.
    fn doing(self) -> &'static str {
        match self {
            Self::Nothing => "create a lease",
            Self::Revision(_) => "renew a lease",
        }
    }
}

/// One network's key space: a config text and lease entries with revisions.
///
/// Every change has a revision of its own, higher than all before. Failing operations change nothing, except that
/// one that failed as [`StoreError::Unavailable`] may have been carried out all the same.
pub trait Registry: Send + Sync {
    /// Where it is, for logs.
    fn place(&self) -> String;

    /// The config text as it stands.
    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>>;

    /// All entries at one revision. It is complete or fails; keys that cannot be read are skipped, and values that cannot are counted.
    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>>;

    /// The entry of one subnet, if there is one.
    fn get(&self, subnet: Subnet) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            let entries = self.list().await?;
            Ok(entries.into_iter().find(|entry| entry.lease.subnet == subnet))
        })
    }

    /// As [`get`](Self::get), but how long a lease lasts yet is asked where it takes asking. It writes nothing.
    fn look(&self, subnet: Subnet) -> BoxFuture<'_, Result<Option<Entry>, StoreError>> {
        self.get(subnet)
    }

    /// Writes the entry of `subnet` if there is what is `expected`; `None` if there is not.
    fn put<'a>(
        &'a self,
        expected: Expected,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>>;

    /// Creates an entry unless there is one already; `None` if there is.
    fn create<'a>(
        &'a self,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        self.put(Expected::Nothing, subnet, attrs, lifetime)
    }

    /// Replaces the entry of `subnet` if it still has `revision`; `None` if it has not.
    fn update<'a>(
        &'a self,
        subnet: Subnet,
        revision: u64,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        self.put(Expected::Revision(revision), subnet, attrs, lifetime)
    }

    /// Deletes the entry of `subnet` if it still has `revision`; tells whether it had.
    fn delete(&self, subnet: Subnet, revision: u64) -> BoxFuture<'_, Result<bool, StoreError>>;

    /// See [`Store::distrust`].
    fn distrust(&self) {}

    /// See [`Store::watch`].
    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>>;

    /// See [`Store::skipped`].
    fn skipped(&self) -> u64 {
        0
    }

    /// See [`Store::resets`].
    fn resets(&self) -> u64 {
        0
    }

    /// Notes that `holder` is alive and has the public address `address`, for as long as `life` says; or tells which other
    /// host is and has. `None` as well where that cannot be told.
    fn claim<'a>(
        &'a self,
        _holder: &'a Holder,
        _address: IpAddr,
        _life: Life,
    ) -> BoxFuture<'a, Result<Option<Rival>, StoreError>> {
        Box::pin(async { Ok(None) })
    }

    /// Whether `holder` is known as the live host with the public address `address`, and will be for a while yet. It writes nothing; where it
    /// cannot be told, it is not so.
    fn is_at<'a>(&'a self, _holder: &'a Holder, _address: IpAddr) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async { Ok(false) })
    }

    /// Which live host has the public address `address`, where that can be told.
    fn who_has(&self, _address: IpAddr) -> BoxFuture<'_, Result<Option<Rival>, StoreError>> {
        Box::pin(async { Ok(None) })
    }
}

/// For how long whoever claims a public address counts as alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// While this process has the store open: the claim is its own, and its only one.
    Ours,
    /// From this moment on; the claim is that of a node that is elsewhere.
    For(Duration),
}

/// Another live host with our public address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rival {
    /// Its name.
    pub host: String,
}

/// All leases as they are.
///
/// # Errors
/// The store cannot be reached, or refuses.
pub async fn leases(store: &dyn Store) -> Result<Vec<Lease>, StoreError> {
    let unavailable = |cause: &str| StoreError::Unavailable {
        doing: "list the leases",
        place: store.place(),
        cause: cause.to_owned(),
    };
    match store.watch(None).next().await {
        Some(Ok(WatchItem {
            update: LeaseUpdate::Snapshot(leases),
            ..
        })) => Ok(leases),
        Some(Ok(_)) => Err(unavailable("a watch that does not begin with a list")),
        Some(Err(error)) => Err(error),
        None => Err(unavailable("the watch ended")),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an expiration is wall-clock time for show; no timer runs on it"
)]
pub(crate) fn expires_in(ttl: Duration) -> Expiration {
    Expiration::At(SystemTime::now() + ttl)
}

/// Whether a lease lasts so long from now.
#[expect(
    clippy::disallowed_methods,
    reason = "a store gives the end of a lease as wall-clock time"
)]
fn lasts(expiration: Expiration, time: Duration) -> bool {
    match expiration {
        Expiration::Never => true,
        Expiration::At(end) => end > SystemTime::now() + time,
    }
}

fn unsupported<'a>(doing: &'static str, subnet: Subnet) -> BoxFuture<'a, Result<(), StoreError>> {
    let cause = format!("{subnet}: this kind of store cannot");
    Box::pin(async move { Err(StoreError::Refused { doing, cause }) })
}

/// How long a lease lives without renewal: flannel's 24 hours.
pub const LEASE_TTL: Duration = Duration::from_secs(24 * 60 * 60);
