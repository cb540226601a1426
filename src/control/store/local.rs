//! Flannel's allocation over a plain key space.
//!
//! Several nodes and servers run this at once over one registry and never talk to each other; the registry's
//! create-if-absent and compare-and-swap decide between them. A lost race means: list again, choose again.
//!
//! Whose a lease is, its value tells: the public address ([`LeaseAttrs::same_node`]). An update is always a
//! compare-and-swap against the entry that was read, so a lease that changed hands meanwhile is never overwritten.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;

use crate::control::allocate::{self, OwnLease};
use crate::control::config::NetworkConfig;
use crate::control::identity::Holder;
use crate::control::store::{Cursor, Entry, Life, Lifetime, Registry, Store, StoreError, WatchItem, lasts};
use crate::lease::{Expiration, Lease, LeaseAttrs, Subnet};

/// How often a lost race is run again, as flannel means to. With 32 nodes on the last 32 subnets about a third win
/// each time, so ten rounds are ample; what still loses is tried again by the caller.
const ATTEMPTS: usize = 10;

/// Who a node was when it took its lease.
#[derive(Clone, Copy)]
enum Formerly<'a> {
    /// The node of this process, or one that an administrator vouches for: what is reserved for it moves with it.
    Ours(&'a LeaseAttrs),
    /// What a client says it was.
    Client(&'a LeaseAttrs),
}

/// A lease that ends sooner is not relied on before it is renewed: that takes some writes, each with the patience of a request.
const RENEWAL: Duration = Duration::from_secs(30);

/// A [`Store`] over a [`Registry`].
#[derive(Debug)]
pub struct LocalStore<R> {
    registry: R,
}

impl<R: Registry> LocalStore<R> {
    /// Allocates over `registry`.
    pub fn new(registry: R) -> Self {
        Self { registry }
    }

    /// The registry below.
    pub fn registry(&self) -> &R {
        &self.registry
    }

    async fn network(&self, doing: &'static str) -> Result<NetworkConfig, StoreError> {
        let text = self.registry.config().await?;
        NetworkConfig::parse(&text).map_err(|error| StoreError::Refused {
            doing,
            cause: error.to_string(),
        })
    }

    async fn try_acquire(
        &self,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<Option<Lease>, StoreError> {
        const DOING: &str = "acquire a lease";
        let config = self.network(DOING).await?;
        let entries = self.registry.list().await?;
        let own = allocate::own_lease(&config, &entries, attrs, |entry| {
            let is_reserved = lifetime(&entry.lease) == Lifetime::Forever;
            (entry.lease.subnet, &entry.lease.attrs, is_reserved)
        });
        match own {
            OwnLease::Fits(entry) => {
                let subnet = entry.lease.subnet;
                let lifetime = lifetime(&entry.lease);
                let updated = self
                    .registry
                    .update(subnet, entry.revision, attrs, lifetime)
                    .await?;
                if updated.is_some() && lifetime == Lifetime::Forever {
                    self.leave_others(&entries, subnet, attrs).await;
                }
                return Ok(updated.map(|entry| entry.lease));
            }
            // A reservation is the operator's to remove.
            OwnLease::Misfit(entry) if lifetime(&entry.lease) == Lifetime::Ttl => {
                if !self.registry.delete(entry.lease.subnet, entry.revision).await? {
                    return Ok(None);
                }
            }
            OwnLease::Misfit(_) | OwnLease::None => {}
        }
        let taken: Vec<Subnet> = entries
            .iter()
            .filter(|entry| !attrs.same_node(&entry.lease.attrs))
            .map(|entry| entry.lease.subnet)
            .collect();
        let subnet = allocate::choose(&config, &taken, previous, &mut rand::rng()).map_err(|error| {
            StoreError::Refused {
                doing: DOING,
                cause: error.to_string(),
            }
        })?;
        self.create(subnet, attrs, Lifetime::Ttl).await
    }

    /// Ends the leases a node had before it took what is reserved for it. One that stays, as where its key is not ours to delete, runs out.
    async fn leave_others(&self, entries: &[Entry], taken: Subnet, attrs: &LeaseAttrs) {
        let left = entries.iter().filter(|entry| {
            let lease = &entry.lease;
            lease.subnet != taken && lease.attrs.same_node(attrs) && lifetime(lease) == Lifetime::Ttl
        });
        for entry in left {
            let subnet = entry.lease.subnet;
            match self.registry.delete(subnet, entry.revision).await {
                Ok(true) => {
                    tracing::info!(%subnet, %taken, "the lease from before the reservation is given up")
                }
                Ok(false) => {
                    tracing::info!(%subnet, "the lease from before the reservation was written meanwhile, and is left")
                }
                Err(error) => {
                    tracing::info!(%subnet, %error, "the lease from before the reservation runs out")
                }
            }
        }
    }

    /// Creates a lease or a reservation, unless somebody was faster.
    async fn create(
        &self,
        subnet: Subnet,
        attrs: &LeaseAttrs,
        lifetime: Lifetime,
    ) -> Result<Option<Lease>, StoreError> {
        let Some(ours) = self.registry.create(subnet, attrs, lifetime).await? else {
            return Ok(None);
        };
        if subnet.ipv4().is_none() || subnet.v6.is_none() {
            // The key is the subnet: nobody else can have it.
            return Ok(Some(ours.lease));
        }
        // The key is both subnets: somebody may have come by one of them under another key since the leases were listed.
        let entries = self.registry.list().await?;
        let is_before_us = |other: &&Entry| {
            other.lease.subnet != subnet
                && other.lease.subnet.overlaps(subnet)
                // The lease that a node took meanwhile is the one to be kept for it, and this here is another.
                && (lifetime == Lifetime::Forever || !other.lease.attrs.same_node(attrs))
                // Where it is not told who was first, both make way and choose again.
                && !matches!((other.lease.created, ours.lease.created), (Some(theirs), Some(ours)) if theirs > ours)
        };
        if entries.iter().any(|other| is_before_us(&other)) {
            self.registry.delete(subnet, ours.revision).await?;
            return Ok(None);
        }
        Ok(Some(ours.lease))
    }

    /// `formerly` is who else this node was when it took the lease, if it has other addresses by now.
    async fn try_renew(
        &self,
        lease: &Lease,
        formerly: Option<Formerly<'_>>,
    ) -> Result<Option<Lease>, StoreError> {
        let subnet = lease.subnet;
        let lost = |entry: &Entry| StoreError::LeaseLost {
            subnet,
            cause: in_the_way(entry),
        };
        // One key, not all: a thousand nodes renew at once when a store comes back.
        if let Some(entry) = self.registry.get(subnet).await? {
            if !entry.readable && entry.lease.created.is_some() && entry.lease.created == lease.created {
                // The key we made: nobody took it, somebody spoilt it.
                let updated = self
                    .registry
                    .update(subnet, entry.revision, &lease.attrs, lifetime(lease))
                    .await?;
                return Ok(updated.map(|entry| entry.lease));
            }
            let held_by = &entry.lease.attrs;
            let lifetime = lifetime(&entry.lease);
            let moves = |formerly: Formerly<'_>| match formerly {
                Formerly::Client(old) => held_by.same_node(old) && lifetime == Lifetime::Ttl,
                Formerly::Ours(old) => held_by.same_node(old),
            };
            if !held_by.same_node(&lease.attrs) && !formerly.is_some_and(moves) {
                return Err(lost(&entry));
            }
            let updated = self
                .registry
                .update(subnet, entry.revision, &lease.attrs, lifetime)
                .await?;
            return Ok(updated.map(|entry| entry.lease));
        }
        // It ran out while nobody renewed it. It is ours again unless someone moved in, or we did elsewhere.
        let entries = self.registry.list().await?;
        let in_the_way =
            |entry: &&Entry| entry.lease.subnet.overlaps(subnet) || entry.lease.attrs.same_node(&lease.attrs);
        if let Some(entry) = entries.iter().find(in_the_way) {
            return Err(lost(entry));
        }
        // Whether it ever was ours nobody knows: it must be one that could have been. A store that was wiped has no config to ask, and its
        // nodes are to register anew.
        match self.network("renew a lease").await {
            Ok(network) if !network.fits(subnet) => {
                let cause = "it is gone, and the network config would not hand it out".to_owned();
                return Err(StoreError::LeaseLost { subnet, cause });
            }
            Err(error) if error.is_unavailable() => return Err(error),
            Ok(_) | Err(_) => {}
        }
        // A reservation that was deleted is not brought back as one: that is the operator's to decide.
        self.create(subnet, &lease.attrs, Lifetime::Ttl).await
    }

    /// Fails if another live host has the public address of this process's node.
    async fn be_the_only(
        &self,
        doing: &'static str,
        holder: &Holder,
        attrs: &LeaseAttrs,
    ) -> Result<(), StoreError> {
        match attrs.address() {
            Some(address) => self.claim(doing, Some(holder), address, Life::Ours).await,
            None => Ok(()),
        }
    }

    async fn claim(
        &self,
        doing: &'static str,
        holder: Option<&Holder>,
        address: IpAddr,
        life: Life,
    ) -> Result<(), StoreError> {
        let (rival, this) = match holder {
            Some(holder) => (
                self.registry.claim(holder, address, life).await?,
                format!("{:?}", holder.host),
            ),
            None => (
                self.registry.who_has(address).await?,
                "one that does not say who it is".to_owned(),
            ),
        };
        let Some(rival) = rival else {
            return Ok(());
        };
        Err(StoreError::AddressTaken {
            doing,
            cause: format!(
                "two nodes have the public address {address}: {:?} has it and is alive, and this one is {this}; give each \
                 its own with --iface or --public-ip (if {:?} is gone for good, wait half a minute)",
                rival.host, rival.host
            ),
        })
    }

    /// `asked` is what is to be reserved, which may lack its IPv6 half.
    async fn try_reserve(&self, asked: Subnet, attrs: &LeaseAttrs) -> Result<Option<()>, StoreError> {
        const DOING: &str = "reserve a subnet";
        let refuse = |cause: String| StoreError::Refused { doing: DOING, cause };
        let config = self.network(DOING).await?;
        let entries = self.registry.list().await?;
        let taken: Vec<Subnet> = entries.iter().map(|entry| entry.lease.subnet).collect();
        let held = |found: &&Subnet| asked.v6.is_none() && found.ipv4().is_some() && found.v4 == asked.v4;
        let subnet = match taken.iter().find(held) {
            Some(&held) => held,
            None => allocate::complete(&config, &taken, asked, &mut rand::rng())
                .map_err(|error| refuse(error.to_string()))?,
        };
        let entry = entries.iter().find(|entry| entry.lease.subnet == subnet);
        // One's own lease may be kept for good though the config was changed since.
        if entry.is_none() && !config.fits(subnet) {
            return Err(refuse(format!("{subnet} is no subnet of the network")));
        }
        let in_the_way = |entry: &&Entry| {
            let lease = &entry.lease;
            lease.subnet.overlaps(subnet) && !(lease.subnet == subnet && lease.attrs.same_node(attrs))
        };
        if let Some(other) = entries.iter().find(in_the_way) {
            return Err(refuse(format!(
                "{asked}: lease already taken: {} is held by {}",
                other.lease.subnet, other.lease.attrs.public_ip
            )));
        }
        let Some(entry) = entry else {
            // Who was faster is on the list the next time, and is told there.
            let created = self.create(subnet, attrs, Lifetime::Forever).await?;
            return Ok(created.map(|_| ()));
        };
        let updated = self
            .registry
            .update(subnet, entry.revision, &entry.lease.attrs, Lifetime::Forever)
            .await?;
        Ok(updated.map(|_| ()))
    }

    async fn try_unreserve(&self, subnet: Subnet) -> Result<Option<()>, StoreError> {
        let Some(entry) = self.registry.get(subnet).await? else {
            return Err(StoreError::Refused {
                doing: "end a reservation",
                cause: format!("there is no lease of {subnet}"),
            });
        };
        if !entry.readable {
            return Err(StoreError::Refused {
                doing: "end a reservation",
                cause: in_the_way(&entry),
            });
        }
        let updated = self
            .registry
            .update(subnet, entry.revision, &entry.lease.attrs, Lifetime::Ttl)
            .await?;
        Ok(updated.map(|_| ()))
    }

    async fn try_revoke(&self, subnet: Subnet) -> Result<Option<()>, StoreError> {
        let Some(entry) = self.registry.get(subnet).await? else {
            return Err(StoreError::Refused {
                doing: "revoke a lease",
                cause: format!("there is no lease of {subnet}"),
            });
        };
        Ok(self.registry.delete(subnet, entry.revision).await?.then_some(()))
    }

    async fn try_revoke_if(
        &self,
        subnet: Subnet,
        may_go: &(dyn Fn(&Lease) -> bool + Sync),
    ) -> Result<Option<bool>, StoreError> {
        match self.registry.get(subnet).await? {
            Some(entry) if may_go(&entry.lease) => {
                let deleted = self.registry.delete(subnet, entry.revision).await?;
                Ok(deleted.then_some(true))
            }
            Some(_) | None => Ok(Some(false)),
        }
    }
}

impl<R: Registry> Store for LocalStore<R> {
    fn place(&self) -> String {
        self.registry.place()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        self.registry.config()
    }

    fn acquire<'a>(
        &'a self,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(async move {
            let mut previous = previous;
            for _ in 0..ATTEMPTS {
                if let Some(lease) = self.try_acquire(attrs, previous).await? {
                    return Ok(lease);
                }
                // It was not to be had, whatever the list says.
                previous = None;
            }
            Err(races_lost("acquire a lease"))
        })
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                if let Some(lease) = self.try_renew(lease, None).await? {
                    return Ok(lease);
                }
            }
            Err(races_lost("renew a lease"))
        })
    }

    fn readdress<'a>(
        &'a self,
        holder: Option<&'a Holder>,
        lease: &'a Lease,
        formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        const DOING: &str = "give our lease another address";
        Box::pin(async move {
            if let Some(holder) = holder {
                self.be_the_only(DOING, holder, &lease.attrs).await?;
            }
            for _ in 0..ATTEMPTS {
                if let Some(lease) = self.try_renew(lease, Some(Formerly::Ours(formerly))).await? {
                    return Ok(lease);
                }
            }
            Err(races_lost(DOING))
        })
    }

    fn readdress_client<'a>(
        &'a self,
        lease: &'a Lease,
        formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                if let Some(lease) = self.try_renew(lease, Some(Formerly::Client(formerly))).await? {
                    return Ok(lease);
                }
            }
            Err(races_lost("give a lease another address"))
        })
    }

    fn acquire_as<'a>(
        &'a self,
        holder: &'a Holder,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(async move {
            self.be_the_only("acquire a lease", holder, attrs).await?;
            self.acquire(attrs, previous).await
        })
    }

    fn renew_as<'a>(
        &'a self,
        holder: &'a Holder,
        lease: &'a Lease,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(async move {
            self.be_the_only("renew a lease", holder, &lease.attrs).await?;
            self.renew(lease).await
        })
    }

    fn confirm<'a>(
        &'a self,
        holder: Option<&'a Holder>,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Option<Lease>, StoreError>> {
        let alone = async move {
            match (holder, attrs.address()) {
                (Some(holder), Some(address)) => self.registry.is_at(holder, address).await,
                (None, _) | (_, None) => Ok(true),
            }
        };
        Box::pin(async move {
            let (found, alone) = tokio::try_join!(self.registry.look(subnet), alone)?;
            let lease = found.map(|entry| entry.lease);
            let good = |lease: &Lease| alone && lease.attrs == *attrs && lasts(lease.expiration, RENEWAL);
            let Some(lease) = lease.filter(good) else {
                return Ok(None);
            };
            if lease.expiration == Expiration::Never {
                return Ok(Some(lease));
            }
            // Another subnet may have been reserved for the node meanwhile.
            let entries = self.registry.list().await?;
            let is_elsewhere = |entry: &Entry| {
                entry.lease.expiration == Expiration::Never && entry.lease.attrs.same_node(attrs)
            };
            Ok((!entries.iter().any(is_elsewhere)).then_some(lease))
        })
    }

    fn vouch<'a>(
        &'a self,
        doing: &'static str,
        holder: Option<&'a Holder>,
        address: IpAddr,
        life: Duration,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(self.claim(doing, holder, address, Life::For(life)))
    }

    fn skipped(&self) -> u64 {
        self.registry.skipped()
    }

    fn distrust(&self) {
        self.registry.distrust();
    }

    fn resets(&self) -> u64 {
        self.registry.resets()
    }

    fn revoke(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                if let Some(()) = self.try_revoke(subnet).await? {
                    return Ok(());
                }
            }
            Err(races_lost("revoke a lease"))
        })
    }

    fn revoke_if<'a>(
        &'a self,
        subnet: Subnet,
        may_go: &'a (dyn Fn(&Lease) -> bool + Sync),
    ) -> BoxFuture<'a, Result<bool, StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                if let Some(went) = self.try_revoke_if(subnet, may_go).await? {
                    return Ok(went);
                }
            }
            Err(races_lost("revoke a lease"))
        })
    }

    fn reserve<'a>(&'a self, subnet: Subnet, attrs: &'a LeaseAttrs) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                if let Some(()) = self.try_reserve(subnet, attrs).await? {
                    return Ok(());
                }
            }
            Err(races_lost("reserve a subnet"))
        })
    }

    fn unreserve(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            for _ in 0..ATTEMPTS {
                if let Some(()) = self.try_unreserve(subnet).await? {
                    return Ok(());
                }
            }
            Err(races_lost("end a reservation"))
        })
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        self.registry.watch(since)
    }
}

/// What is where somebody else would be.
fn in_the_way(entry: &Entry) -> String {
    let subnet = entry.lease.subnet;
    match entry.readable {
        true => format!("{subnet} is held by {}", entry.lease.attrs.public_ip),
        false => {
            format!("the entry of {subnet} cannot be read: whoever wrote it may put it right, or revoke it")
        }
    }
}

/// A reservation stays one, whatever is done to it.
fn lifetime(lease: &Lease) -> Lifetime {
    match lease.expiration {
        Expiration::Never => Lifetime::Forever,
        Expiration::At(_) => Lifetime::Ttl,
    }
}

fn races_lost(doing: &'static str) -> StoreError {
    StoreError::Refused {
        doing,
        cause: format!("others were faster {ATTEMPTS} times in a row"),
    }
}

#[cfg(test)]
mod tests;
