//! How two hosts with one public address find out.
//!
//! Flannel knows a node by its public address alone, and the value of a lease has no room for more. Two hosts that say
//! the same - Vagrant's 10.0.2.15 is the classic - take one lease in turns, and neither works. So a node also writes
//! `PREFIX/kersey/nodes/ADDRESS`, outside of what flanneld reads: who it is ([`Holder`]), under an etcd lease of
//! [`ALIVE`] that is kept alive. Whoever finds the key of its address held by somebody else claims nothing; once the
//! other is gone for [`ALIVE`] the key is free.
//!
//! ```text
//!   acquire, renew ─▶ claim(): create the key if absent, replace it if it is ours
//!                       │            └─ somebody else's ──▶ a rival, named
//!                       └▶ keeper task: keep alive every 10 s; gone or lost: claim again
//! ```
//!
//! A flanneld has no such key, and overwrites what it takes for its own lease. A put of our lease key that is not ours
//! shows in the watch by its etcd lease, and is told ([`Presence::look_at`]).
//!
//! The key is a help, not a condition: where etcd does not let us write it, this is said once, and all goes on without.
//!
//! Limits: a host that runs no Kersey is seen only when it writes. A reservation has no etcd lease, so who put it cannot
//! be told. Hosts cloned with the data directory count as one while they also have one name; what runs under one name on
//! one kernel counts as one host whatever its data directory, so that a container made anew need not wait for itself.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Error, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::connection::{Connection, Right, refused};
use crate::control::identity::Holder;
use crate::control::store::{Rival, StoreError};
use crate::control::{Backoff, RateLimit};
use crate::lease::{Lease, LeaseAttrs, Subnet};

/// How long a host counts as alive without a sign of life.
const ALIVE: Duration = Duration::from_secs(30);

/// Pause between two signs of life.
const SIGN: Duration = Duration::from_secs(10);

/// How many of our own latest etcd leases are known: more than puts whose events can be under way.
const LATEST: usize = 16;

/// The largest value read; ours have some hundred bytes.
const MAX_BYTES: usize = 4096;

/// What this host says of itself in etcd.
pub(super) struct Presence {
    connection: Arc<Connection>,
    /// Ends in a slash.
    prefix: String,
    kept: Mutex<Option<Kept>>,
    written: Mutex<Written>,
    notes: RateLimit,
    complaints: RateLimit,
}

/// The key that is kept alive.
struct Kept {
    key: String,
    task: JoinHandle<()>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What this process wrote to the lease keys.
#[derive(Default)]
struct Written {
    /// The address claimed.
    address: Option<IpAddr>,
    /// The subnet of the lease written for it.
    own: Option<Subnet>,
    /// The etcd leases of the latest puts of it.
    leases: VecDeque<i64>,
}

/// The value of a key.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    id: String,
    host: String,
    boot: String,
}

/// What became of a claim.
enum Claimed {
    /// The key is ours, under this etcd lease.
    Ours(i64),
    /// It is another host's.
    Theirs(Record),
}

impl Presence {
    pub(super) fn new(connection: Arc<Connection>, prefix: String) -> Self {
        Self {
            connection,
            prefix,
            kept: Mutex::new(None),
            written: Mutex::default(),
            notes: RateLimit::default(),
            complaints: RateLimit::default(),
        }
    }

    /// Claims the public address in `attrs` for `holder`, and keeps it from then on.
    pub(super) async fn claim(
        &self,
        holder: &Holder,
        attrs: &LeaseAttrs,
    ) -> Result<Option<Rival>, StoreError> {
        let Some(address) = attrs.address() else {
            return Ok(None);
        };
        self.written().address = Some(address);
        let key = format!("{}{address}", self.prefix);
        let claimed = match claim(&self.connection, &key, holder).await {
            Ok(claimed) => claimed,
            Err(error) if error.is_unavailable() => return Err(error),
            Err(error) => {
                if self.notes.allows() {
                    tracing::warn!(
                        %error,
                        "cannot tell other hosts that this address is taken; two nodes with one address go unnoticed"
                    );
                }
                return Ok(None);
            }
        };
        match claimed {
            Claimed::Ours(lease) => {
                let keeper = keep(
                    Arc::clone(&self.connection),
                    key.clone(),
                    holder.clone(),
                    address,
                    lease,
                );
                *self.kept() = Some(Kept {
                    key,
                    task: tokio::spawn(keeper),
                });
                Ok(None)
            }
            Claimed::Theirs(record) => {
                let mut kept = self.kept();
                if kept.as_ref().is_some_and(|kept| kept.key == key) {
                    *kept = None;
                }
                Ok(Some(Rival { host: record.host }))
            }
        }
    }

    /// Notes that a lease key is about to be written under an etcd lease.
    pub(super) fn wrote(&self, subnet: Subnet, attrs: &LeaseAttrs, lease: i64) {
        let mut written = self.written();
        if written.address.is_none() || attrs.address() != written.address {
            // A server writes the leases of others, too.
            return;
        }
        written.own = Some(subnet);
        written.leases.push_back(lease);
        if written.leases.len() > LATEST {
            written.leases.pop_front();
        }
    }

    /// Looks whether a lease of ours was put by somebody else.
    pub(super) fn look_at(&self, lease: &Lease, id: i64) {
        let written = self.written();
        let ours = written.own == Some(lease.subnet);
        if ours && id != 0 && !written.leases.contains(&id) && self.complaints.allows() {
            tracing::warn!(
                subnet = %lease.subnet,
                public_ip = lease.attrs.address().map(|address| address.to_string()),
                "somebody else wrote our lease: another host with the same public address, perhaps a flanneld; \
                 give each host its own with --iface or --public-ip"
            );
        }
    }

    fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the key alive, for ever.
async fn keep(connection: Arc<Connection>, key: String, holder: Holder, address: IpAddr, mut lease: i64) {
    let complaints = RateLimit::default();
    let mut backoff = Backoff::new(SIGN);
    loop {
        sleep(SIGN).await;
        loop {
            match sign(&connection, lease).await {
                Ok(true) => break,
                Ok(false) => match claim(&connection, &key, &holder).await {
                    Ok(Claimed::Ours(new)) => {
                        lease = new;
                        break;
                    }
                    Ok(Claimed::Theirs(record)) => {
                        if complaints.allows() {
                            tracing::error!(
                                %address,
                                host = holder.host,
                                other = record.host,
                                "another host took this node's public address while etcd was out of reach; \
                                 give each host its own with --iface or --public-ip"
                            );
                        }
                        break;
                    }
                    Err(_) => {}
                },
                Err(_) => {}
            }
            sleep(backoff.next_pause()).await;
        }
        backoff.reset();
    }
}

/// Gives one sign of life; `false` if the etcd lease is gone.
async fn sign(connection: &Connection, lease: i64) -> Result<bool, StoreError> {
    const DOING: &str = "keep the node's address";
    let mut client = connection.client(DOING).await?;
    let exchange = async {
        match client.lease_keep_alive(lease).await {
            Ok(_) => Ok(true),
            // What etcd-client makes of an answer that has no time left in it.
            Err(Error::LeaseKeepAliveError(_)) => Ok(false),
            Err(error) => Err(error),
        }
    };
    connection.ask(DOING, &Right::None, exchange).await
}

/// Makes the key ours, unless another host has it.
async fn claim(connection: &Connection, key: &str, holder: &Holder) -> Result<Claimed, StoreError> {
    const DOING: &str = "claim the node's address";
    const ATTEMPTS: usize = 5;
    let right = Right::Write(key.to_owned());
    let mut client = connection.client(DOING).await?;
    let seconds = i64::try_from(ALIVE.as_secs()).unwrap_or(i64::MAX);
    let lease = connection
        .ask(DOING, &Right::None, client.lease_grant(seconds, None))
        .await?
        .id();
    let value = serde_json::to_string(&Record {
        id: holder.id.clone(),
        host: holder.host.clone(),
        boot: holder.boot.clone(),
    })
    .map_err(|error| refused(DOING, &error.to_string()))?;
    let mut condition = Compare::version(key, CompareOp::Equal, 0);
    let mut outcome = None;
    for _ in 0..ATTEMPTS {
        let put = TxnOp::put(key, value.as_str(), Some(PutOptions::new().with_lease(lease)));
        let look = TxnOp::get(key, Some(GetOptions::new()));
        let txn = Txn::new().when([condition]).and_then([put]).or_else([look]);
        let answer = match connection.ask(DOING, &right, client.txn(txn)).await {
            Ok(answer) => answer,
            Err(error) => {
                outcome = Some(Err(error));
                break;
            }
        };
        if answer.succeeded() {
            return Ok(Claimed::Ours(lease));
        }
        let found = answer
            .op_responses()
            .into_iter()
            .find_map(|response| match response {
                TxnOpResponse::Get(mut got) => got.take_kvs().into_iter().next(),
                TxnOpResponse::Put(_) | TxnOpResponse::Delete(_) | TxnOpResponse::Txn(_) => None,
            });
        condition = match found {
            None => Compare::version(key, CompareOp::Equal, 0),
            Some(found) => match theirs(found.value(), holder) {
                Some(record) => {
                    outcome = Some(Ok(Claimed::Theirs(record)));
                    break;
                }
                None => Compare::mod_revision(key, CompareOp::Equal, found.mod_revision()),
            },
        };
    }
    // Nothing hangs on it; if this fails, it runs out by itself.
    let _ = connection
        .ask(DOING, &Right::None, client.lease_revoke(lease))
        .await;
    outcome.unwrap_or_else(|| Err(refused(DOING, "others changed the key all the time")))
}

/// The record in `value` if it is another host's. What cannot be read is nobody's.
fn theirs(value: &[u8], holder: &Holder) -> Option<Record> {
    if value.len() > MAX_BYTES {
        return None;
    }
    let record: Record = serde_json::from_slice(value).ok()?;
    let known = |one: &str, two: &str| !one.is_empty() && !two.is_empty();
    let same = |one: &str, two: &str| known(one, two) && one == two;
    let differ = |one: &str, two: &str| known(one, two) && one != two;
    let other = if record.id == holder.id {
        // A copy of a data directory on another machine.
        differ(&record.boot, &holder.boot) && differ(&record.host, &holder.host)
    } else {
        // Else a data directory that was lost, or a container made anew on this machine.
        !(same(&record.boot, &holder.boot) && same(&record.host, &holder.host))
    };
    other.then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(id: &str, host: &str, boot: &str) -> Holder {
        Holder {
            id: id.to_owned(),
            host: host.to_owned(),
            boot: boot.to_owned(),
        }
    }

    #[test]
    fn a_host_is_known_by_its_id_and_a_clone_by_its_name_and_boot() {
        let found = br#"{"id":"1","host":"a","boot":"x"}"#;
        for (case, who, other) in [
            ("itself", holder("1", "a", "x"), false),
            ("itself, after a reboot", holder("1", "a", "y"), false),
            ("itself, renamed", holder("1", "b", "x"), false),
            ("a clone", holder("1", "b", "y"), true),
            ("another", holder("2", "b", "y"), true),
            ("another of the same name", holder("2", "a", "y"), true),
            (
                "a container made anew on the same host",
                holder("2", "a", "x"),
                false,
            ),
            ("another container on the same host", holder("2", "b", "x"), true),
            (
                "itself, unable to read what boot it is",
                holder("1", "b", ""),
                false,
            ),
            (
                "another, unable to read what boot it is",
                holder("2", "a", ""),
                true,
            ),
        ] {
            assert_eq!(theirs(found, &who).is_some(), other, "{case}");
        }
        let who = holder("1", "a", "x");
        for rotten in [&b""[..], b"null", b"[]", b"{\"id\":7}", b"\xff"] {
            assert!(theirs(rotten, &who).is_none());
        }
    }
}
