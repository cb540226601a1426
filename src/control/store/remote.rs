//! A store behind Kersey or old flannel servers: flannel's HTTP API from the client's side.
//!
//! Any number of servers, in order of preference; `servers` says which one is asked. An answer that says no
//! counts as an answer. Acquiring twice does no harm, as a server finds a node's lease by its public address.
//!
//! A watch is a chain of long polls (`poll`). A poll that brings nothing for a minute is given up; if the server still
//! answers a question it is asked again, else it hangs and is left behind. A machine that vanished is noticed sooner, by TCP
//! keep-alive.
//!
//! Old servers: v0.5 to v0.7 fill in fewer fields and word errors differently; of a renewal only the new end is taken,
//! because v0.5.6 to v0.7.1 spoil the attributes they send back; where there is no body at all, as from the server of the
//! Kubernetes proposal, the lease lives on for flannel's day.
//!
//! Limits: reservations and revocations go through where the server knows them (v0.5.6 and later).

mod connect;
pub mod networks;
pub mod node;
pub mod objects;
mod poll;
mod servers;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{self, BoxStream, StreamExt};
use hyper::Method;

pub use self::networks::RemoteNetworks;
pub use self::node::NodeHeader;
use self::objects::{attrs_json, lease_json, parse_lease, parse_watch, reservation_json};
use self::poll::{Watched, poll};
use self::servers::{Ask, REQUEST_TIMEOUT, Servers};
use super::{Cursor, LEASE_TTL, Store, StoreError, WatchItem, expires_in};
use crate::addr::NetworkName;
use crate::control::identity::Holder;
use crate::lease::{Expiration, Lease, LeaseAttrs, LeaseUpdate, Subnet};
use crate::options::{RemoteOptions, ServerAddress};
use crate::trust::TrustError;

/// Response header that tells Kersey's nodes what kind of error a status 500 is.
pub const ERROR_HEADER: &str = "x-kersey-error";
/// Request header that carries the subnet a node held before, a lease key.
pub const PREVIOUS_HEADER: &str = "x-kersey-previous";

/// Request header of a renewal that carries the public address a node had before; an old server takes any renewal.
pub const FORMERLY_HEADER: &str = "x-kersey-formerly";

/// Request header that says who asks ([`NodeHeader`]): with what takes and renews a lease, and with polls, as a sign of life.
pub const NODE_HEADER: &str = "x-kersey-node";

/// The kind of an error, as [`ERROR_HEADER`] names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// A retry can mend it.
    Unavailable,
    /// The answer is no.
    Refused,
    /// Another live host has the public address.
    AddressTaken,
    /// The lease is gone or somebody else's.
    LeaseLost,
}

impl ErrorKind {
    /// The header's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::AddressTaken => "address-taken",
            Self::LeaseLost => "lease-lost",
        }
    }
}

/// A store behind servers.
#[derive(Debug)]
pub struct RemoteStore {
    servers: Arc<Servers>,
    /// What every path begins with: `/v1/NAME`, or `/v1/_` for the network without a name.
    base: String,
    /// Whose lease this store took or renewed last.
    node: Mutex<Option<NodeHeader>>,
}

impl RemoteStore {
    /// Makes a store behind `servers`, in order of preference, over plain HTTP. Nothing is sent yet.
    ///
    /// # Panics
    /// There is no server.
    pub fn new(servers: Vec<ServerAddress>) -> Self {
        Self {
            servers: Arc::new(Servers::plain(&servers)),
            base: base(None),
            node: Mutex::default(),
        }
    }

    /// Makes a store behind the servers of `options`. Nothing is sent yet.
    ///
    /// # Errors
    /// Certificate or token files are no good.
    ///
    /// # Panics
    /// There is no server; the command line has seen to it.
    pub fn open(options: &RemoteOptions) -> Result<Self, TrustError> {
        Ok(Self {
            servers: Arc::new(Servers::open(options)?),
            base: base(None),
            node: Mutex::default(),
        })
    }

    /// The same store, which looks sooner or later than after about half a minute whether a server it prefers is back.
    pub fn returning_after(mut self, pause: Duration) -> Self {
        // Nobody else has it yet: it was made a moment ago.
        if let Some(servers) = Arc::get_mut(&mut self.servers) {
            servers.set_return_after(pause);
        }
        self
    }

    /// The same servers' store of another network; connections, and which server is asked, are shared.
    pub fn of_network(&self, name: Option<&NetworkName>) -> Self {
        Self {
            servers: Arc::clone(&self.servers),
            base: base(name),
            node: Mutex::default(),
        }
    }

    /// One step of a watch: polls until there is something to tell.
    async fn poll(&self, since: Option<Cursor>) -> Result<WatchItem, StoreError> {
        let watched = Watched {
            doing: "watch the leases",
            path: &format!("{}/leases", self.base),
            sign_of_life: &format!("{}/config", self.base),
            read: read_watch,
            nothing: || LeaseUpdate::Snapshot(Vec::new()),
            node: self.node().clone(),
        };
        let (update, cursor) = poll(&self.servers, &watched, since).await?;
        Ok(WatchItem { update, cursor })
    }

    fn node(&self) -> MutexGuard<'_, Option<NodeHeader>> {
        self.node.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn acquire_for(
        &self,
        holder: Option<&Holder>,
        attrs: &LeaseAttrs,
        previous: Option<Subnet>,
    ) -> Result<Lease, StoreError> {
        let node = node_header(holder, attrs);
        let ask = Ask {
            doing: "acquire a lease",
            method: Method::POST,
            path: format!("{}/leases", self.base),
            body: attrs_json(attrs),
            previous,
            formerly: None,
            node: node.clone(),
            about: None,
            timeout: REQUEST_TIMEOUT,
        };
        let answer = self.servers.ask(&ask).await?;
        let read = parse_lease(&answer.body).map_err(|error| garbled(ask.doing, error.to_string()))?;
        *self.node() = node;
        Ok(Lease {
            subnet: read.subnet,
            attrs: attrs.clone(),
            expiration: read.expiration,
            created: None,
        })
    }

    /// Renews a lease; `formerly` is the public address it is still known by, if that is another by now.
    async fn renew_for(
        &self,
        holder: Option<&Holder>,
        lease: &Lease,
        formerly: Option<IpAddr>,
    ) -> Result<Lease, StoreError> {
        let node = node_header(holder, &lease.attrs);
        let ask = Ask {
            doing: "renew the lease",
            method: Method::PUT,
            path: format!("{}/leases/{}", self.base, old_key(lease.subnet)),
            body: lease_json(lease),
            previous: None,
            formerly,
            node: node.clone(),
            about: Some(&lease.subnet),
            timeout: REQUEST_TIMEOUT,
        };
        let answer = self.servers.ask(&ask).await?;
        let expiration = if answer.body.trim().is_empty() {
            expires_in(LEASE_TTL)
        } else {
            parse_lease_end(&answer.body).map_err(|error| garbled(ask.doing, error))?
        };
        *self.node() = node;
        Ok(Lease {
            expiration,
            ..lease.clone()
        })
    }

    async fn act(
        &self,
        doing: &'static str,
        method: Method,
        path: String,
        subnet: &Subnet,
    ) -> Result<(), StoreError> {
        let ask = Ask {
            doing,
            method,
            path,
            body: String::new(),
            previous: None,
            formerly: None,
            node: None,
            about: Some(subnet),
            timeout: REQUEST_TIMEOUT,
        };
        self.servers.ask(&ask).await.map(drop)
    }
}

impl Store for RemoteStore {
    fn place(&self) -> String {
        self.servers.place()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async move {
            let ask = Ask::get("read the network config", format!("{}/config", self.base));
            Ok(self.servers.ask(&ask).await?.body.trim().to_owned())
        })
    }

    fn acquire<'a>(
        &'a self,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.acquire_for(None, attrs, previous))
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.renew_for(None, lease, None))
    }

    fn acquire_as<'a>(
        &'a self,
        holder: &'a Holder,
        attrs: &'a LeaseAttrs,
        previous: Option<Subnet>,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.acquire_for(Some(holder), attrs, previous))
    }

    fn renew_as<'a>(
        &'a self,
        holder: &'a Holder,
        lease: &'a Lease,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.renew_for(Some(holder), lease, None))
    }

    fn readdress<'a>(
        &'a self,
        holder: Option<&'a Holder>,
        lease: &'a Lease,
        formerly: &'a LeaseAttrs,
    ) -> BoxFuture<'a, Result<Lease, StoreError>> {
        Box::pin(self.renew_for(holder, lease, formerly.address()))
    }

    fn revoke(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let path = format!("{}/leases/{}", self.base, old_key(subnet));
            self.act("revoke the lease", Method::DELETE, path, &subnet).await
        })
    }

    fn reserve<'a>(&'a self, subnet: Subnet, attrs: &'a LeaseAttrs) -> BoxFuture<'a, Result<(), StoreError>> {
        Box::pin(async move {
            let ask = Ask {
                doing: "reserve the subnet",
                method: Method::POST,
                path: format!("{}/reservations", self.base),
                body: reservation_json(subnet, attrs),
                previous: None,
                formerly: None,
                node: None,
                about: None,
                timeout: REQUEST_TIMEOUT,
            };
            self.servers.ask(&ask).await.map(drop)
        })
    }

    fn unreserve(&self, subnet: Subnet) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let path = format!("{}/reservations/{}", self.base, old_key(subnet));
            self.act("end the reservation", Method::DELETE, path, &subnet)
                .await
        })
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        enum Step {
            Poll(Option<Cursor>),
            End,
        }
        stream::unfold(Step::Poll(since), move |step| async move {
            let Step::Poll(since) = step else {
                return None;
            };
            Some(match self.poll(since).await {
                Ok(item) => {
                    let next = Step::Poll(Some(item.cursor.clone()));
                    (Ok(item), next)
                }
                Err(error) => (Err(error), Step::End),
            })
        })
        .boxed()
    }
}

/// What a node with a lease like this tells of itself.
fn node_header(holder: Option<&Holder>, attrs: &LeaseAttrs) -> Option<NodeHeader> {
    Some(NodeHeader {
        address: attrs.address()?,
        holder: holder?.clone(),
    })
}

/// What the paths of a network begin with. A name needs no escaping.
fn base(name: Option<&NetworkName>) -> String {
    format!("/v1/{}", name.map_or("_", NetworkName::as_str))
}

/// Whether a cursor survives being put into a URL as it is.
fn is_plain_cursor(cursor: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=200).contains(&cursor.len()) && cursor.bytes().all(plain)
}

/// Reads the answer to a watch. A cursor goes into a URL as it is, so one that would not survive that is refused.
fn read_watch(body: &str) -> Result<(Option<LeaseUpdate>, Cursor), StoreError> {
    const DOING: &str = "watch the leases";
    let answer = parse_watch(body).map_err(|error| garbled(DOING, error))?;
    if answer.skipped > 0 {
        tracing::debug!(count = answer.skipped, "skipped leases that cannot be read");
    }
    if !is_plain_cursor(&answer.cursor) {
        return Err(garbled(
            DOING,
            format!("the cursor {:?} is malformed", answer.cursor),
        ));
    }
    Ok((answer.update, Cursor(answer.cursor)))
}

/// The end of a renewed lease, whatever became of its attributes on the way.
fn parse_lease_end(body: &str) -> Result<Expiration, String> {
    let object = crate::lease::json::Object::parse(body, objects::MAX_LEASE_BYTES * 2)
        .map_err(|error| error.to_string())?;
    let text = object.string("Expiration").map_err(|error| error.to_string())?;
    let text = text.ok_or_else(|| "Expiration is missing".to_owned())?;
    objects::parse_time(&text).ok_or_else(|| format!("Expiration is {text:?}: must be an RFC 3339 time"))
}

/// An answer that makes no sense: the server, or something in between, may come to its senses.
fn garbled(doing: &'static str, why: String) -> StoreError {
    StoreError::Unavailable {
        doing,
        place: "server".to_owned(),
        cause: format!("the answer makes no sense: {why}"),
    }
}

/// The key under which every server knows a lease: its IPv4 half. Without one, which no old server knows of, the whole key.
fn old_key(subnet: Subnet) -> Subnet {
    match subnet.ipv4() {
        Some(v4) => Subnet { v4, v6: None },
        None => subnet,
    }
}
