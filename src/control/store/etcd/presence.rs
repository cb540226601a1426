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
//! A server does the same for each of its clients that says who it is, for as long as that client counts as alive
//! ([`Life::For`]). Two servers may have looked after one client, one after the other: so such a keeper also looks whether the key is
//! still there, under whichever server's etcd lease.
//!
//! A flanneld has no such key, and overwrites what it takes for its own lease. A put of our lease key that is not ours
//! shows in the watch by its etcd lease, and is told ([`Presence::look_at`]).
//!
//! The key is a help, not a condition: where etcd does not let us write it, this is said once, and all goes on without.
//!
//! Limits: a host that runs no Kersey is seen only when it writes. A reservation has no etcd lease, so who put it cannot
//! be told. Hosts cloned with the data directory count as one while they also have one name; what runs under one name on
//! one kernel counts as one host whatever its data directory, so that a container made anew need not wait for itself.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Compare, CompareOp, Error, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::connection::{Connection, Right, refused};
use crate::control::identity::Holder;
use crate::control::store::{Life, Rival, StoreError};
use crate::control::{Backoff, RateLimit};
use crate::lease::{Lease, LeaseAttrs, Subnet};

/// How many addresses are kept alive at most: as many as a node knows leases.
const MAX_KEPT: usize = 100_000;

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
    kept: Mutex<BTreeMap<IpAddr, Kept>>,
    written: Mutex<Written>,
    notes: RateLimit,
    complaints: RateLimit,
}

/// A key that is kept alive.
struct Kept {
    holder: Holder,
    ends: Ends,
    task: JoinHandle<()>,
}

/// When a key's host counts as gone; `None` if it is the host of this process. Shared with the keeper.
type Ends = Arc<Mutex<Option<Instant>>>;

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
    /// The lease written for it.
    own: Option<(Subnet, LeaseAttrs)>,
    /// The etcd leases of the latest puts of it.
    leases: VecDeque<i64>,
    /// Whether it was a reservation when it was last put.
    is_reserved: bool,
}

/// What a put of a lease key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Put {
    /// One of ours, one that makes a reservation of our lease, or none of our lease.
    Known,
    /// Our lease is no reservation any more.
    Unreserved,
    /// Somebody else has written our lease.
    Strange,
}

impl Written {
    /// Notes that our lease is about to be put under an etcd lease; 0 is none.
    fn wrote(&mut self, subnet: Subnet, attrs: &LeaseAttrs, id: i64) {
        self.own = Some((subnet, attrs.clone()));
        self.is_reserved = id == 0;
        self.know(id);
    }

    fn know(&mut self, id: i64) {
        self.leases.push_back(id);
        if self.leases.len() > LATEST {
            self.leases.pop_front();
        }
    }

    /// Judges a put.
    fn judge(&mut self, lease: &Lease, id: i64) -> Put {
        let Some((_, attrs)) = self.own.as_ref().filter(|(subnet, _)| *subnet == lease.subnet) else {
            return Put::Known;
        };
        // Whoever ends a reservation leaves the value as it was.
        let is_same = *attrs == lease.attrs;
        let was_reserved = std::mem::replace(&mut self.is_reserved, id == 0);
        if id == 0 || self.leases.contains(&id) {
            return Put::Known;
        }
        if was_reserved && is_same {
            self.know(id);
            return Put::Unreserved;
        }
        Put::Strange
    }
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
            kept: Mutex::default(),
            written: Mutex::default(),
            notes: RateLimit::default(),
            complaints: RateLimit::default(),
        }
    }

    /// Claims a public address for `holder`, and keeps it from then on.
    pub(super) async fn claim(
        &self,
        holder: &Holder,
        address: IpAddr,
        life: Life,
    ) -> Result<Option<Rival>, StoreError> {
        let ends = match life {
            Life::Ours => {
                self.written().address = Some(address);
                None
            }
            Life::For(life) => {
                let ends = Instant::now() + life;
                if self.extend(holder, address, ends) {
                    return Ok(None);
                }
                Some(ends)
            }
        };
        if ends.is_some() && self.is_full(address) {
            if self.notes.allows() {
                tracing::warn!(%address, max = MAX_KEPT, "too many nodes to tell whether two have one address");
            }
            return Ok(None);
        }
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
                let keeper = Keeper {
                    connection: Arc::clone(&self.connection),
                    key,
                    holder: holder.clone(),
                    address,
                    lease,
                    ends: Arc::new(Mutex::new(ends)),
                };
                let mut kept = self.kept();
                // This process has one host: if it has another address by now, the old one is free.
                kept.retain(|_, other| {
                    !other.task.is_finished() && (ends.is_some() || ended_at(&other.ends).is_some())
                });
                let new = Kept {
                    holder: holder.clone(),
                    ends: Arc::clone(&keeper.ends),
                    task: tokio::spawn(keeper.run()),
                };
                kept.insert(address, new);
                Ok(None)
            }
            Claimed::Theirs(record) => {
                let mut kept = self.kept();
                if kept.get(&address).is_some_and(|kept| kept.holder == *holder) {
                    kept.remove(&address);
                }
                Ok(Some(Rival { host: record.host }))
            }
        }
    }

    /// Whether `holder` is known as the host with a public address, and will be for [`ALIVE`] from now on: the sign of life that sees to
    /// it goes to etcd's leader and is not written down.
    pub(super) async fn is_at(&self, holder: &Holder, address: IpAddr) -> Result<bool, StoreError> {
        const DOING: &str = "look whether a node's address is its own";
        let key = format!("{}{address}", self.prefix);
        let right = Right::Read(key.clone());
        let mut client = self.connection.client(DOING).await?;
        let found = match self
            .connection
            .ask(DOING, &right, client.get(key.as_str(), None))
            .await
        {
            Ok(mut found) => found.take_kvs().into_iter().next(),
            Err(error) if error.is_unavailable() => return Err(error),
            // Without the right to look.
            Err(_) => None,
        };
        let Some(found) = found else {
            return Ok(false);
        };
        let ours = read(found.value()).is_some_and(|record| record.id == holder.id);
        if !ours || theirs(found.value(), holder).is_some() || found.lease() == 0 {
            return Ok(false);
        }
        sign(&self.connection, found.lease()).await
    }

    /// Which live host has a public address.
    pub(super) async fn who_has(&self, address: IpAddr) -> Result<Option<Rival>, StoreError> {
        const DOING: &str = "look who has an address";
        let key = format!("{}{address}", self.prefix);
        let right = Right::Read(key.clone());
        let mut client = self.connection.client(DOING).await?;
        match self
            .connection
            .ask(DOING, &right, client.get(key.as_str(), None))
            .await
        {
            Ok(answer) => Ok(answer
                .kvs()
                .first()
                .and_then(|found| read(found.value()))
                .map(|record| Rival { host: record.host })),
            Err(error) if error.is_unavailable() => Err(error),
            // Without the right to look: a claim would have said so.
            Err(_) => Ok(None),
        }
    }

    /// Lets the host that is kept alive anyway count as alive until `until`; tells whether there is that one.
    fn extend(&self, holder: &Holder, address: IpAddr, until: Instant) -> bool {
        let kept = self.kept();
        let Some(kept) = kept.get(&address).filter(|kept| !kept.task.is_finished()) else {
            return false;
        };
        let mut ends = kept.ends.lock().unwrap_or_else(PoisonError::into_inner);
        // What this process says of its own host is not for clients to change.
        let same = match *ends {
            None => !kept.holder.differs_from(holder),
            Some(_) => kept.holder == *holder,
        };
        if !same {
            return false;
        }
        *ends = ends.map(|_| until);
        true
    }

    fn is_full(&self, address: IpAddr) -> bool {
        let mut kept = self.kept();
        if kept.len() >= MAX_KEPT {
            kept.retain(|_, kept| !kept.task.is_finished());
        }
        kept.len() >= MAX_KEPT && !kept.contains_key(&address)
    }

    /// Notes that a lease key is about to be written under an etcd lease.
    pub(super) fn wrote(&self, subnet: Subnet, attrs: &LeaseAttrs, lease: i64) {
        let mut written = self.written();
        if written.address.is_none() || attrs.address() != written.address {
            // A server writes the leases of others, too.
            return;
        }
        written.wrote(subnet, attrs, lease);
    }

    /// Looks whether a lease of ours was put by somebody else.
    pub(super) fn look_at(&self, lease: &Lease, id: i64) {
        let put = self.written().judge(lease, id);
        match put {
            Put::Known => {}
            Put::Unreserved => tracing::info!(subnet = %lease.subnet, "our subnet is not reserved any more"),
            Put::Strange if self.complaints.allows() => tracing::warn!(
                subnet = %lease.subnet,
                public_ip = lease.attrs.address().map(|address| address.to_string()),
                "somebody else wrote our lease: another host with the same public address, perhaps a flanneld; \
                 give each host its own with --iface or --public-ip"
            ),
            Put::Strange => {}
        }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<IpAddr, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ended_at(ends: &Ends) -> Option<Instant> {
    *ends.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a key alive.
struct Keeper {
    connection: Arc<Connection>,
    key: String,
    holder: Holder,
    address: IpAddr,
    lease: i64,
    ends: Ends,
}

impl Keeper {
    /// For ever, or until the host counts as gone or another has its address.
    async fn run(mut self) {
        let complaints = RateLimit::default();
        let mut backoff = Backoff::new(SIGN);
        loop {
            sleep(SIGN).await;
            loop {
                if ended_at(&self.ends).is_some_and(|end| end <= Instant::now()) {
                    return self.let_go().await;
                }
                match self.sign().await {
                    Ok(true) => break,
                    Ok(false) => match claim(&self.connection, &self.key, &self.holder).await {
                        Ok(Claimed::Ours(new)) => {
                            self.lease = new;
                            break;
                        }
                        Ok(Claimed::Theirs(record)) => {
                            let (address, host, other) = (self.address, &self.holder.host, record.host);
                            if ended_at(&self.ends).is_some() {
                                tracing::warn!(%address, host, other, "another host took the public address of one of our clients");
                                return;
                            }
                            if complaints.allows() {
                                tracing::error!(
                                    %address,
                                    host,
                                    other,
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

    /// Gives one sign of life; `false` if the key is gone.
    async fn sign(&self) -> Result<bool, StoreError> {
        const DOING: &str = "look after a node's address";
        if !sign(&self.connection, self.lease).await? {
            return Ok(false);
        }
        if ended_at(&self.ends).is_none() {
            return Ok(true);
        }
        let mut client = self.connection.client(DOING).await?;
        let right = Right::Read(self.key.clone());
        let here = GetOptions::new().with_serializable();
        let answer = self
            .connection
            .ask(DOING, &right, client.get(self.key.as_str(), Some(here)))
            .await?;
        Ok(answer
            .kvs()
            .first()
            .is_some_and(|found| theirs(found.value(), &self.holder).is_none()))
    }

    /// Frees the address; if this fails, that happens by itself in [`ALIVE`].
    async fn let_go(&self) {
        const DOING: &str = "free a node's address";
        if let Ok(mut client) = self.connection.client(DOING).await {
            let _ = self
                .connection
                .ask(DOING, &Right::None, client.lease_revoke(self.lease))
                .await;
        }
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

fn read(value: &[u8]) -> Option<Record> {
    if value.len() > MAX_BYTES {
        return None;
    }
    serde_json::from_slice(value).ok()
}

/// The record in `value` if it is another host's. What cannot be read is nobody's.
fn theirs(value: &[u8], holder: &Holder) -> Option<Record> {
    let record = read(value)?;
    let found = Holder {
        id: record.id.clone(),
        host: record.host.clone(),
        boot: record.boot.clone(),
    };
    found.differs_from(holder).then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Expiration;

    #[test]
    fn a_put_of_our_lease_is_ours_or_an_operators_or_a_strangers() {
        let lease = |key: &str, mac: &str| {
            let value = format!(
                r#"{{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
            );
            Lease {
                subnet: key.parse().unwrap(),
                attrs: LeaseAttrs::from_json(value.as_bytes()).unwrap(),
                expiration: Expiration::Never,
                created: None,
            }
        };
        let (ours, other) = (
            lease("10.0.1.0-24", "4a:5b:ac:d9:d3:01"),
            lease("10.0.2.0-24", "4a:5b:ac:d9:d3:01"),
        );
        let strange = lease("10.0.1.0-24", "4a:5b:ac:d9:d3:02");
        let mut written = Written::default();
        assert_eq!(written.judge(&ours, 9), Put::Known);
        written.wrote(ours.subnet, &ours.attrs, 5);
        assert_eq!(written.judge(&ours, 5), Put::Known);
        assert_eq!(written.judge(&other, 6), Put::Known);
        assert_eq!(written.judge(&ours, 6), Put::Strange);
        // It is reserved, and no more.
        assert_eq!(written.judge(&ours, 0), Put::Known);
        assert_eq!(written.judge(&ours, 7), Put::Unreserved);
        assert_eq!(written.judge(&ours, 7), Put::Known);
        assert_eq!(written.judge(&ours, 8), Put::Strange);
        // A reservation that we took ourselves, without having seen how it came.
        written.wrote(ours.subnet, &ours.attrs, 0);
        assert_eq!(written.judge(&ours, 10), Put::Unreserved);
        // Another host starts on what is reserved for us, as a flanneld makes a lease of it.
        written.wrote(ours.subnet, &ours.attrs, 0);
        assert_eq!(written.judge(&strange, 11), Put::Strange);
        // A reservation lost, and an ordinary lease in its place.
        written.wrote(ours.subnet, &ours.attrs, 0);
        written.wrote(other.subnet, &other.attrs, 12);
        assert_eq!(written.judge(&other, 12), Put::Known);
        assert_eq!(written.judge(&other, 13), Put::Strange);
    }

    #[test]
    fn what_cannot_be_read_is_nobodys() {
        let holder = |id: &str| Holder {
            id: id.to_owned(),
            host: "a".to_owned(),
            boot: "x".to_owned(),
        };
        let found = br#"{"id":"1","host":"b","boot":"y"}"#;
        assert!(theirs(found, &holder("1")).is_some());
        assert!(theirs(found, &holder("2")).is_some());
        assert!(theirs(br#"{"id":"1","host":"a","boot":"y"}"#, &holder("1")).is_none());
        for rotten in [&b""[..], b"null", b"[]", b"{\"id\":7}", b"\xff"] {
            assert!(theirs(rotten, &holder("1")).is_none());
        }
    }
}
