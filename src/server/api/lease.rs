//! Leases taken, renewed and given up.
//!
//! A lease is named by its key; old clients name the IPv4 half of it, which is completed where there is one. Whoever may take leases is
//! not trusted with more than that: public addresses must be some that a packet can be sent to, lease data has at most
//! [`MAX_ATTRS_BYTES`], the leases taken from one address are counted (`quota`), a lease moves to another address only if whoever asks
//! has the old one or the new one ([`FORMERLY_HEADER`]), and what is reserved moves for an administrator alone.

use std::net::{IpAddr, Ipv4Addr};

use axum::extract::{Path, Request, State};
use axum::http::HeaderMap;
use axum::response::Response;

use super::answer::{ApiError, empty, json};
use super::body::text;
use super::{Api, Caller, known_subnet, node, parse_key};
use crate::control::peers::is_unicast;
use crate::control::store::remote::objects::{lease_json, parse_lease, repair_backend_data};
use crate::control::store::remote::{FORMERLY_HEADER, NODE_HEADER, NodeHeader, PREVIOUS_HEADER};
use crate::lease::{Expiration, Lease, LeaseAttrs, Subnet};
use crate::server::access::{Peer, Right};
use crate::server::directory::Network;
use crate::server::feed::{Feed, History};
use crate::server::presence::Presence;
use crate::server::quota::Pending;

/// How long lease data may be: an ordinary node has a few hundred bytes, and every node keeps everybody's.
const MAX_ATTRS_BYTES: usize = 8 * 1024;

pub(super) async fn acquire(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Lease)?;
    let Network {
        store,
        feed,
        presence,
        ..
    } = &*entered;
    let (previous, node) = (previous_subnet(request.headers())?, node(request.headers())?);
    let body = api.shared.bodies.read(request).await?;
    let attrs = LeaseAttrs::from_json(&body).map_err(ApiError::body)?;
    check_attrs(&attrs)?;
    admit(presence, "acquire a lease", node, &attrs).await?;
    let pending = api.room(&caller, &network, &entered, (None, &attrs))?;
    let lease = store.acquire(&attrs, previous).await?;
    tracing::info!(network, subnet = %lease.subnet, public_ip = %attrs.public_ip, "lease acquired");
    wait_until_shown(feed, &lease).await;
    if let Some(pending) = pending {
        pending.taken(lease.subnet);
    }
    Ok(json(lease_json(&lease) + "\n"))
}

pub(super) async fn renew(
    State(api): State<Api>,
    caller: Caller,
    Path((network, _subnet)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Lease)?;
    let Network {
        store,
        feed,
        presence,
        ..
    } = &*entered;
    let (formerly, node) = (former_address(request.headers())?, node(request.headers())?);
    let text = text(&api.shared.bodies.read(request).await?);
    let read = parse_lease(&text).map_err(ApiError::body)?;
    let Some(mut lease) = read.into_lease() else {
        return Err(ApiError::body("Attrs is missing"));
    };
    repair_backend_data(&mut lease.attrs);
    check_attrs(&lease.attrs)?;
    admit(presence, "renew a lease", node, &lease.attrs).await?;
    // One that ran out is taken anew.
    let pending = api.room(&caller, &network, &entered, (Some(lease.subnet), &lease.attrs))?;
    let lease = match formerly {
        Some(formerly) if api.check(&caller, &network, Right::Admin).is_ok() => {
            store.readdress(None, &lease, &formerly).await?
        }
        Some(formerly) if vouches(&caller.peer, &formerly, &lease.attrs) => {
            store.readdress_client(&lease, &formerly).await?
        }
        Some(_) | None => store.renew(&lease).await?,
    };
    wait_until_shown(feed, &lease).await;
    if let Some(pending) = pending {
        pending.taken(lease.subnet);
    }
    Ok(json(lease_json(&lease) + "\n"))
}

pub(super) async fn revoke(
    State(api): State<Api>,
    caller: Caller,
    Path((network, key)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Lease)?;
    let Network { store, feed, .. } = &*entered;
    let subnet = known_subnet(feed, parse_key(&key, "failed to parse subnet")?);
    match api.check(&caller, &network, Right::Admin) {
        Ok(()) => store.revoke(subnet).await?,
        // A node may always give up what is its own; a reservation is the operator's.
        Err(denial) => {
            let address = caller.peer.address;
            let is_own = |lease: &Lease| {
                lease.expiration != Expiration::Never
                    && address.is_some_and(|address| is_of(&lease.attrs, address))
            };
            if !store.revoke_if(subnet, &is_own).await? {
                return Err(ApiError::Denied(denial));
            }
        }
    }
    tracing::info!(network, %subnet, "lease revoked");
    feed.wait_for(|history| history.lease(subnet).is_none()).await;
    Ok(empty())
}

impl Api {
    /// Room for a lease more, if it is one: none of `subnet`, where that is known, and none of that node.
    fn room(
        &self,
        caller: &Caller,
        name: &str,
        network: &Network,
        lease: (Option<Subnet>, &LeaseAttrs),
    ) -> Result<Option<Pending>, ApiError> {
        let (subnet, attrs) = lease;
        let Some(source) = caller.peer.address else {
            return Ok(None);
        };
        if is_of(attrs, source) || self.check(caller, name, Right::Admin).is_ok() {
            return Ok(None);
        }
        let history = network.feed.history();
        let is_there = match subnet {
            Some(subnet) => history.lease(subnet).is_some(),
            None => history.leases().any(|lease| lease.attrs.same_node(attrs)),
        };
        if is_there {
            return Ok(None);
        }
        let most = self.shared.access.leases_per_address();
        let taken = |subnet| history.lease(subnet).is_some();
        match network.quota.claim(source, most, taken) {
            Some(pending) => Ok(Some(pending)),
            None => Err(ApiError::TooManyLeases(source, most)),
        }
    }
}

/// Refuses a client whose address another live host has, and one that says to have another than is in its lease.
async fn admit(
    presence: &Presence,
    doing: &'static str,
    node: Option<NodeHeader>,
    attrs: &LeaseAttrs,
) -> Result<(), ApiError> {
    let address = attrs.address();
    if let Some(node) = node.as_ref().filter(|node| Some(node.address) != address) {
        return Err(ApiError::Malformed(format!(
            "{NODE_HEADER} names {}, and the lease another public address",
            node.address
        )));
    }
    if let Some(address) = address {
        let holder = node.as_ref().map(|node| &node.holder);
        presence.admit(doing, holder, address).await?;
    }
    Ok(())
}

/// Whether a client can say that the node `formerly` is `now` another: it asks from the address of either, or comes by a unix socket,
/// which is for those who are let at it.
fn vouches(peer: &Peer, formerly: &LeaseAttrs, now: &LeaseAttrs) -> bool {
    peer.address
        .is_none_or(|address| is_of(formerly, address) || is_of(now, address))
}

/// Whether a node has that address.
fn is_of(attrs: &LeaseAttrs, address: IpAddr) -> bool {
    let address = address.to_canonical();
    address == attrs.public_ip || attrs.public_ipv6.is_some_and(|v6| address == v6)
}

/// Refuses what no node can use, and what is too long for all to keep.
pub(super) fn check_attrs(attrs: &LeaseAttrs) -> Result<(), ApiError> {
    let v4 = (!attrs.public_ip.is_unspecified()).then_some(IpAddr::V4(attrs.public_ip));
    let v6 = attrs.public_ipv6.map(IpAddr::V6);
    if v4.is_none() && v6.is_none() {
        return Err(ApiError::Malformed(
            "PublicIP is missing or 0.0.0.0: must be the address of the node".to_owned(),
        ));
    }
    for (field, address) in [("PublicIP", v4), ("PublicIPv6", v6)] {
        if let Some(address) = address.filter(|&address| !is_unicast(address)) {
            return Err(ApiError::Malformed(format!(
                "{field} is {address}: must be one at which others reach the node"
            )));
        }
    }
    if attrs.data_bytes() > MAX_ATTRS_BYTES {
        return Err(ApiError::Malformed(format!(
            "BackendType, BackendData and BackendV6Data have {} bytes together: must be at most {MAX_ATTRS_BYTES}",
            attrs.data_bytes()
        )));
    }
    Ok(())
}

/// The node that a lease is still known as, by its public address.
fn former_address(headers: &HeaderMap) -> Result<Option<LeaseAttrs>, ApiError> {
    let Some(value) = headers.get(FORMERLY_HEADER) else {
        return Ok(None);
    };
    let addr: IpAddr = value
        .to_str()
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| ApiError::Malformed(format!("{FORMERLY_HEADER} must be an IP address")))?;
    let (public_ip, public_ipv6) = match addr {
        IpAddr::V4(addr) => (addr, None),
        IpAddr::V6(addr) => (Ipv4Addr::UNSPECIFIED, Some(addr)),
    };
    Ok(Some(LeaseAttrs {
        public_ip,
        public_ipv6,
        backend_type: String::new(),
        backend_data: None,
        backend_v6_data: None,
    }))
}

fn previous_subnet(headers: &HeaderMap) -> Result<Option<Subnet>, ApiError> {
    let Some(value) = headers.get(PREVIOUS_HEADER) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .map_err(|error| ApiError::Malformed(error.to_string()))?;
    parse_key(text, "bad subnet").map(Some)
}

/// A node asks for its lease as soon as it has it: let it find what it was just given.
async fn wait_until_shown(feed: &Feed, lease: &Lease) {
    let shown = |history: &History| {
        let seen = history.lease(lease.subnet);
        seen.is_some_and(|seen| seen.attrs == lease.attrs)
    };
    feed.wait_for(shown).await;
}
