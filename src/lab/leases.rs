//! A kernel node's dealings with the network's store: it has no daemon to do that for it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt;

use crate::control::store::{self, Expirations, LEASE_TTL, Store};
use crate::host::netlink::Netlink;
use crate::lab::interrupt;
use crate::lab::netns::Namespace;
use crate::lease::{Lease, LeaseUpdate};
use crate::options::StoreKind;

/// How long a store may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A backend's data and settings are a few dozen bytes.
pub(super) const LARGEST_JSON: usize = 64 * 1024;

/// Runs `work` in the namespace, with its netlink and the store as it is seen from there.
pub(super) fn inside<T: Send>(
    namespace: &Namespace,
    kind: &StoreKind,
    work: impl AsyncFnOnce(&Netlink, &dyn Store) -> Result<T> + Send,
) -> Result<T> {
    namespace.netlink(async |netlink| {
        let store = store::open(kind, LEASE_TTL, Expirations::Assume).await?;
        tokio::time::timeout(PATIENCE, work(&netlink, &*store))
            .await
            .with_context(|| format!("{} took more than {} s", store.place(), PATIENCE.as_secs()))?
    })
}

/// All leases there are.
pub(super) async fn snapshot(store: &dyn Store) -> Result<Vec<Lease>> {
    match store.watch(None).next().await.transpose()? {
        Some(item) => match item.update {
            LeaseUpdate::Snapshot(leases) => Ok(leases),
            LeaseUpdate::Events(_) => bail!("a watch began with changes"),
        },
        None => bail!("the store told nothing"),
    }
}

/// Updates until the peers are as wanted: `update` says whether they are, and how many there are.
pub(super) fn follow(limit: Duration, mut update: impl FnMut() -> Result<(bool, usize)>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let (done, peers) = update()?;
        if done {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "the kernel node knows {peers} peers, not those it should, after {} s",
            limit.as_secs_f32()
        );
        interrupt::sleep(Duration::from_millis(20))?;
    }
}
