//! Flannel's client/server HTTP API, version 1, over a store.
//!
//! | method and path | answer |
//! | --- | --- |
//! | GET `/v1/[?next=C]` | watch which networks with a name there are |
//! | GET `/v1/_/config` | the network config, effective values filled in |
//! | POST `/v1/_/leases` | acquire: attributes in, lease out |
//! | GET `/v1/_/leases[?next=C]` | watch all leases |
//! | PUT `/v1/_/leases/{subnet}` | renew: lease in (the body decides), lease with its new end out |
//! | GET `/v1/_/leases/{subnet}[?next=C]` | watch one lease |
//! | DELETE `/v1/_/leases/{subnet}` | revoke |
//! | GET, POST `/v1/_/reservations`, DELETE `/v1/_/reservations/{subnet}` | reservations |
//!
//! Answers are JSON and a newline; errors are plain text, without one, with status 400 (the request cannot be understood) or
//! 500 (everything else, as flannel has it); a path or method not in the table is 404. Whoever may not do what they ask gets
//! 401 or 403 (`access`), a web page 403 (`front`). Headers say more between Kersey and its own nodes: [`ERROR_HEADER`] names the kind
//! of an error, [`PREVIOUS_HEADER`] the subnet a node held before, [`NODE_HEADER`] who the node is. One that says so, and whose public
//! address another live host has, gets 409 (`presence`).
//!
//! The Kubernetes proposal writes the same paths without `/v1`, and `network` for the network without a name;
//! [`from_kubernetes_form`] makes flannel's of them.
//!
//! # Leases
//!
//! A lease is named by its key; old clients name the IPv4 half of it, which is completed where there is one. Whoever may take leases is
//! not trusted with more than that: public addresses must be some that a packet can be sent to, lease data has at most
//! [`MAX_ATTRS_BYTES`], the leases taken from one address are counted (`quota`), a lease moves to another address only if whoever asks
//! has the old one or the new one ([`FORMERLY_HEADER`]), and what is reserved moves for an administrator alone.
//!
//! # Bodies
//!
//! A body has at most [`MAX_BODY_BYTES`] and [`BODY_TIMEOUT`]. Ordinary ones are shorter than [`SMALL_BODY_BYTES`]; longer ones
//! are read [`BIG_BODIES`] at a time, so that all together stay within two megabytes; where [`WAITING_BODIES`] wait for that,
//! the next is an error.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, put};
use http_body_util::BodyExt;
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::access::{Access, Denial, Grants, Peer, Right, UNNAMED};
use super::crowd::Introduction;
use super::directory::{Directory, Missing, Network};
use super::feed::{Answer, Feed, History};
use super::front::Turned;
use super::presence::Presence;
use super::quota::Pending;
use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::control::config::NetworkConfig;
use crate::control::peers::is_unicast;
use crate::control::store::StoreError;
use crate::control::store::remote::node::NodeHeaderError;
use crate::control::store::remote::objects::{
    lease_json, parse_lease, repair_backend_data, reservation_json,
};
use crate::control::store::remote::{
    ERROR_HEADER, ErrorKind, FORMERLY_HEADER, NODE_HEADER, NodeHeader, PREVIOUS_HEADER,
};
use crate::lease::json::{Object, compact};
use crate::lease::{Expiration, Lease, LeaseAttrs, Subnet};

/// The largest request body: twice the attributes of a lease, which flannel's clients send once.
const MAX_BODY_BYTES: usize = 128 * 1024;
/// What a body may have without waiting for its turn.
const SMALL_BODY_BYTES: usize = 4 * 1024;
/// How many bodies may be longer than that at a time.
const BIG_BODIES: usize = 16;
/// How many more may wait for it; each has a buffer of some kilobytes.
const WAITING_BODIES: usize = 48;
/// How long lease data may be: an ordinary node has a few hundred bytes, and every node keeps everybody's.
const MAX_ATTRS_BYTES: usize = 8 * 1024;
/// How long a request body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a question waits for a store that was never heard, before it is an error.
const FIRST_WORD_TIMEOUT: Duration = Duration::from_secs(5);

/// What every handler needs.
#[derive(Clone)]
pub(super) struct Api {
    shared: Arc<Shared>,
}

struct Shared {
    directory: Directory,
    access: Access,
    big_bodies: Semaphore,
    waiting_bodies: Semaphore,
}

impl Api {
    pub(super) fn new(directory: Directory, access: Access) -> Self {
        Self {
            shared: Arc::new(Shared {
                directory,
                access,
                big_bodies: Semaphore::new(BIG_BODIES),
                waiting_bodies: Semaphore::new(BIG_BODIES + WAITING_BODIES),
            }),
        }
    }

    /// Follows the stores for ever.
    pub(super) async fn follow(&self) {
        self.shared.directory.follow().await;
    }

    /// The network of that name, if the caller has `right` in it.
    fn enter(&self, caller: &Caller, name: &str, right: Right) -> Result<Arc<Network>, ApiError> {
        self.check(caller, name, right).map_err(ApiError::Denied)?;
        let named = || name.chars().take(80).collect();
        self.shared
            .directory
            .network(name)
            .map_err(|missing| match missing {
                Missing::NoSuchNetwork => ApiError::NoSuchNetwork(named()),
                Missing::NotReady => ApiError::NotReady,
                Missing::TooMany => ApiError::TooManyNetworks,
                Missing::Store(error) => ApiError::Store(error),
            })
    }

    fn check(&self, caller: &Caller, network: &str, right: Right) -> Result<(), Denial> {
        let grants = || self.shared.access.grants(&caller.peer, caller.token.as_deref());
        caller.grants.get_or_init(grants).check(network, right)?;
        caller.introduction.is_known();
        Ok(())
    }

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

/// The routes.
pub(super) fn router(api: &Api) -> Router {
    Router::new()
        .route("/v1/", get(networks))
        .route("/v1/{network}/config", get(config))
        .route("/v1/{network}/leases", get(watch_all).post(acquire))
        .route(
            "/v1/{network}/leases/{subnet}",
            put(renew).get(watch_one).delete(revoke),
        )
        .route("/v1/{network}/reservations", get(reservations).post(reserve))
        .route("/v1/{network}/reservations/{subnet}", delete(unreserve))
        .fallback(not_found)
        .method_not_allowed_fallback(not_found)
        .layer(from_fn(refuse_head))
        .with_state(api.clone())
}

/// Turns a path of the Kubernetes proposal into flannel's.
pub(super) fn from_kubernetes_form<B>(request: &mut Request<B>) {
    /// The proposal's name for the one network it knows.
    const ONLY: &str = "/network/";

    let uri = request.uri();
    let path = uri.path();
    if path.starts_with("/v1/") || path == "/v1" {
        return;
    }
    let path = match path.strip_prefix(ONLY) {
        Some(rest) => format!("/v1/{UNNAMED}/{rest}"),
        None => format!("/v1{path}"),
    };
    let whole = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path,
    };
    // It was a path before, and is one still.
    if let Ok(whole) = PathAndQuery::try_from(whole) {
        *request.uri_mut() = Uri::from(whole);
    }
}

/// What those get who are turned away at the front.
pub(super) fn turn_away(turned: &Turned) -> Response {
    let (status, text) = match turned {
        Turned::WebPage => (
            StatusCode::FORBIDDEN,
            "requests from web pages are refused".to_owned(),
        ),
        Turned::ForeignHost(host) => (
            StatusCode::FORBIDDEN,
            format!(
                "this server is not known as {host:?}; ask it by address, or start it with --server-name={host}"
            ),
        ),
        Turned::TwoHosts => (StatusCode::BAD_REQUEST, "the request names two hosts".to_owned()),
    };
    refusal(status, text)
}

/// Who sends a request.
struct Caller {
    peer: Arc<Peer>,
    token: Option<String>,
    introduction: Introduction,
    /// What it may do, once that was asked.
    grants: OnceLock<Grants>,
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Response> {
        let (Some(peer), Some(introduction)) = (
            parts.extensions.get::<Arc<Peer>>(),
            parts.extensions.get::<Introduction>(),
        ) else {
            return Err(plain(StatusCode::INTERNAL_SERVER_ERROR, "no peer".to_owned()));
        };
        let token = parts
            .headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim().to_owned());
        Ok(Self {
            peer: Arc::clone(peer),
            token,
            introduction: introduction.clone(),
            grants: OnceLock::new(),
        })
    }
}

/// Why a request is not answered as asked.
enum ApiError {
    /// It cannot be understood.
    Malformed(String),
    /// Who asks may not.
    Denied(Denial),
    /// There is no network of that name.
    NoSuchNetwork(String),
    /// There is no lease of that subnet.
    NoSuchLease(Subnet),
    /// The store said so.
    Store(StoreError),
    /// The network config is there and not usable.
    Config(String),
    /// The store was never heard.
    NotReady,
    /// Too many send large bodies.
    Busy,
    /// Too many networks are in use.
    TooManyNetworks,
    /// That address has taken as many leases as it may.
    TooManyLeases(IpAddr, usize),
}

impl ApiError {
    /// A body that is not what it should be, in flannel's words.
    fn body(why: impl std::fmt::Display) -> Self {
        Self::Malformed(format!("JSON decoding error: {why}"))
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        // Flannel's server hands on etcd's words; clients look for "Key not found" at most.
        let (status, kind, text) = match self {
            Self::Malformed(why) => (StatusCode::BAD_REQUEST, ErrorKind::Refused, why),
            Self::Denied(denial) => return denied(denial),
            Self::NoSuchNetwork(name) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::Refused,
                format!("100: Key not found (/{name}/config) [0]"),
            ),
            Self::NoSuchLease(subnet) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::LeaseLost,
                format!("100: Key not found (/subnets/{subnet}) [0]"),
            ),
            Self::Store(error) => {
                let (status, kind) = match error {
                    StoreError::Unavailable { .. } => {
                        (StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Unavailable)
                    }
                    StoreError::Refused { .. } => (StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Refused),
                    // To flannel's clients every status but 200 is the same.
                    StoreError::AddressTaken { .. } => (StatusCode::CONFLICT, ErrorKind::AddressTaken),
                    StoreError::LeaseLost { .. } => (StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::LeaseLost),
                };
                (status, kind, error.to_string())
            }
            Self::Config(why) => (StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Refused, why),
            Self::NotReady => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::Unavailable,
                "the server has not reached its store yet".to_owned(),
            ),
            Self::Busy => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::Unavailable,
                "too many large requests at a time".to_owned(),
            ),
            Self::TooManyNetworks => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::Unavailable,
                "too many networks are in use at a time".to_owned(),
            ),
            Self::TooManyLeases(from, most) => (
                StatusCode::FORBIDDEN,
                ErrorKind::Refused,
                format!(
                    "{from} has taken {most} leases for other public addresses, which is the most that one address may \
                     (leases-per-address in the server's access file)"
                ),
            ),
        };
        let mut response = plain(status, text);
        response
            .headers_mut()
            .insert(ERROR_HEADER, header::HeaderValue::from_static(kind.as_str()));
        response
    }
}

fn denied(denial: Denial) -> Response {
    let (status, text) = match denial {
        Denial::Unknown => (
            StatusCode::UNAUTHORIZED,
            "this server takes requests from clients it knows: by certificate (--remote-certfile, --remote-keyfile) or by \
             token (--remote-token-file)",
        ),
        Denial::NotAllowed => (
            StatusCode::FORBIDDEN,
            "the server's access file does not give this client the right to do that",
        ),
        Denial::NoFile => (
            StatusCode::FORBIDDEN,
            "leases and reservations are ended, and reservations made, from the server's own machine, with a client \
             certificate, or by whom the server's --access-file gives the right",
        ),
    };
    let mut response = refusal(status, text.to_owned());
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(
            header::WWW_AUTHENTICATE,
            header::HeaderValue::from_static("Bearer"),
        );
    }
    response
}

/// An error that a retry does not mend.
fn refusal(status: StatusCode, text: String) -> Response {
    let mut response = plain(status, text);
    response.headers_mut().insert(
        ERROR_HEADER,
        header::HeaderValue::from_static(ErrorKind::Refused.as_str()),
    );
    response
}

/// `?next=C`
#[derive(Deserialize)]
struct Cursor {
    #[serde(default)]
    next: String,
}

impl Cursor {
    fn next(&self) -> Option<&str> {
        Some(self.next.as_str()).filter(|next| !next.is_empty() && *next != "0")
    }
}

async fn networks(
    State(api): State<Api>,
    caller: Caller,
    Query(cursor): Query<Cursor>,
) -> Result<Response, ApiError> {
    let shared = &api.shared;
    let grants = || shared.access.grants(&caller.peer, caller.token.as_deref());
    grants().check_any().map_err(ApiError::Denied)?;
    caller.introduction.is_known();
    // A poll may be a long one, and rights may change while it waits.
    let answer = shared.directory.answer(cursor.next(), grants);
    let answer = match cursor.next() {
        Some(_) => answer.await,
        None => tokio::time::timeout(FIRST_WORD_TIMEOUT, answer)
            .await
            .map_err(|_| ApiError::NotReady)?,
    };
    Ok(json(answer))
}

async fn config(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
) -> Result<Response, ApiError> {
    let network = api.enter(&caller, &network, Right::Read)?;
    let text = network.store.config().await?;
    effective_config(&text).map(json).map_err(ApiError::Config)
}

async fn watch_all(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
    Query(cursor): Query<Cursor>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Read)?;
    // Who may not take a lease has no address to hold.
    let node = node(&headers)?.filter(|_| api.check(&caller, &network, Right::Lease).is_ok());
    let _alive = node.map(|node| entered.presence.poll(node));
    match watch(&entered, &network, &cursor, |history, next| history.answer(next)).await? {
        Answer::Body(body) => Ok(json(body)),
        Answer::NoSuchLease => Err(ApiError::NotReady),
    }
}

async fn watch_one(
    State(api): State<Api>,
    caller: Caller,
    Path((network, subnet)): Path<(String, String)>,
    Query(cursor): Query<Cursor>,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Read)?;
    let subnet = parse_key(&subnet, "bad subnet")?;
    match watch(&entered, &network, &cursor, |history, next| {
        history.answer_one(subnet, next)
    })
    .await?
    {
        Answer::Body(body) => Ok(json(body)),
        Answer::NoSuchLease => Err(ApiError::NoSuchLease(subnet)),
    }
}

/// Asks the history. Only a poll with a cursor may wait for ever.
async fn watch(
    network: &Network,
    name: &str,
    cursor: &Cursor,
    question: impl Fn(&mut History, Option<&str>) -> Option<Answer>,
) -> Result<Answer, ApiError> {
    let next = cursor.next();
    let asked = network.feed.ask(|history| question(history, next));
    match next {
        Some(_) => tokio::select! {
            answer = asked => Ok(answer),
            () = network.gone() => Err(ApiError::NoSuchNetwork(name.to_owned())),
        },
        None => tokio::time::timeout(FIRST_WORD_TIMEOUT, asked)
            .await
            .map_err(|_| ApiError::NotReady),
    }
}

async fn acquire(
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
    let body = read_body(&api, request).await?;
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

async fn renew(
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
    let text = text(&read_body(&api, request).await?);
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

/// Who asks, if they say so.
fn node(headers: &HeaderMap) -> Result<Option<NodeHeader>, ApiError> {
    let Some(value) = headers.get(NODE_HEADER) else {
        return Ok(None);
    };
    let text = String::from_utf8_lossy(value.as_bytes());
    text.parse()
        .map(Some)
        .map_err(|error: NodeHeaderError| ApiError::Malformed(error.to_string()))
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
fn check_attrs(attrs: &LeaseAttrs) -> Result<(), ApiError> {
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

async fn revoke(
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

async fn reservations(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Read)?;
    let Network { feed, .. } = &*entered;
    let known = feed.ask(|history| history.is_known().then_some(()));
    tokio::time::timeout(FIRST_WORD_TIMEOUT, known)
        .await
        .map_err(|_| ApiError::NotReady)?;
    let history = feed.history();
    let reserved: Vec<String> = history
        .leases()
        .filter(|lease| lease.expiration == Expiration::Never)
        .map(|lease| reservation_json(lease.subnet, &lease.attrs))
        .collect();
    Ok(json(format!("[{}]\n", reserved.join(","))))
}

async fn reserve(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Admin)?;
    let Network { store, feed, .. } = &*entered;
    let body = text(&read_body(&api, request).await?);
    let object = Object::parse(&body, MAX_BODY_BYTES).map_err(ApiError::body)?;
    let subnet: Option<Ipv4Prefix> = object
        .parsed("Subnet", "must be an IPv4 network in quotes")
        .map_err(ApiError::body)?;
    let v6: Option<Ipv6Prefix> = object
        .parsed_or_null("IPv6Subnet", "must be an IPv6 network in quotes")
        .map_err(ApiError::body)?;
    let v4 = match (subnet, v6) {
        (Some(v4), _) => v4,
        (None, Some(_)) => Subnet::NO_V4,
        (None, None) => return Err(ApiError::body("Subnet is missing")),
    };
    let subnet = Subnet { v4, v6 };
    let attrs = LeaseAttrs::from_json(body.as_bytes()).map_err(ApiError::body)?;
    check_attrs(&attrs)?;
    store.reserve(subnet, &attrs).await?;
    tracing::info!(network, %subnet, public_ip = %attrs.public_ip, "subnet reserved");
    feed.wait_for(|history| {
        history
            .lease(subnet)
            .is_some_and(|lease| lease.expiration == Expiration::Never)
    })
    .await;
    Ok(empty())
}

async fn unreserve(
    State(api): State<Api>,
    caller: Caller,
    Path((network, key)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Admin)?;
    let Network { store, feed, .. } = &*entered;
    let subnet = known_subnet(feed, parse_key(&key, "bad subnet")?);
    store.unreserve(subnet).await?;
    tracing::info!(network, %subnet, "reservation ended");
    feed.wait_for(|history| {
        history
            .lease(subnet)
            .is_none_or(|lease| lease.expiration != Expiration::Never)
    })
    .await;
    Ok(empty())
}

/// A node asks for its lease as soon as it has it: let it find what it was just given.
async fn wait_until_shown(feed: &Feed, lease: &Lease) {
    let shown = |history: &History| {
        let seen = history.lease(lease.subnet);
        seen.is_some_and(|seen| seen.attrs == lease.attrs)
    };
    feed.wait_for(shown).await;
}

async fn not_found() -> Response {
    plain(StatusCode::NOT_FOUND, "404 page not found\n".to_owned())
}

/// Flannel's routes know GET and not HEAD.
async fn refuse_head(request: Request, next: Next) -> Response {
    if request.method() == Method::HEAD {
        return not_found().await;
    }
    next.run(request).await
}

/// Writes the config as flannel's server does: what was left out of it is filled in.
fn effective_config(text: &str) -> Result<String, String> {
    let config = NetworkConfig::parse(text).map_err(|error| error.to_string())?;
    let mut fields = Vec::new();
    match config.v4 {
        Some(range) => {
            fields.push(format!("\"Network\":\"{}\"", range.network));
            fields.push(format!("\"SubnetMin\":\"{}\"", range.min.addr()));
            fields.push(format!("\"SubnetMax\":\"{}\"", range.max.addr()));
            fields.push(format!("\"SubnetLen\":{}", range.subnet_len()));
        }
        None => fields.push("\"EnableIPv4\":false".to_owned()),
    }
    if let Some(range) = config.v6 {
        fields.push("\"EnableIPv6\":true".to_owned());
        fields.push(format!("\"IPv6Network\":\"{}\"", range.network));
        fields.push(format!("\"IPv6SubnetMin\":\"{}\"", range.min.addr()));
        fields.push(format!("\"IPv6SubnetMax\":\"{}\"", range.max.addr()));
        fields.push(format!("\"IPv6SubnetLen\":{}", range.subnet_len()));
    }
    if config.enable_nftables {
        fields.push("\"EnableNFTables\":true".to_owned());
    }
    let object = Object::parse(text, MAX_BODY_BYTES).map_err(|error| error.to_string())?;
    if let Some(backend) = object.raw("Backend") {
        fields.push(format!("\"Backend\":{}", compact(backend)));
    }
    Ok(format!("{{{}}}\n", fields.join(",")))
}

fn parse_key(key: &str, flannels_words: &str) -> Result<Subnet, ApiError> {
    let subnet: Subnet = key
        .parse()
        .map_err(|error| ApiError::Malformed(format!("{flannels_words}: {error}")))?;
    if subnet.v4 == Subnet::NO_V4 && subnet.v6.is_none() {
        return Err(ApiError::Malformed(format!(
            "{flannels_words}: {key} stands for no IPv4, and the IPv6 subnet is missing"
        )));
    }
    Ok(subnet)
}

/// The whole key of a lease of which old clients name the IPv4 half only.
fn known_subnet(feed: &Feed, subnet: Subnet) -> Subnet {
    feed.history()
        .lease(subnet)
        .map_or(subnet, |lease: &Lease| lease.subnet)
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

async fn read_body(api: &Api, request: Request) -> Result<Bytes, ApiError> {
    let read = collect(api, request.into_body());
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(body) => body,
        Err(_) => Err(ApiError::Malformed("the body did not arrive in time".to_owned())),
    }
}

async fn collect(api: &Api, mut body: Body) -> Result<Bytes, ApiError> {
    let mut bytes = Vec::new();
    let mut turn = None;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::Malformed(error.to_string()))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > MAX_BODY_BYTES {
            return Err(ApiError::Malformed(format!(
                "a body may have {MAX_BODY_BYTES} bytes"
            )));
        }
        if bytes.len() + data.len() > SMALL_BODY_BYTES && turn.is_none() {
            let Ok(place) = api.shared.waiting_bodies.try_acquire() else {
                return Err(ApiError::Busy);
            };
            // The semaphore is never closed.
            turn = api
                .shared
                .big_bodies
                .acquire()
                .await
                .ok()
                .map(|turn| (place, turn));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.into())
}

fn text(body: &Bytes) -> String {
    String::from_utf8_lossy(body).into_owned()
}

fn json(body: impl Into<Body>) -> Response {
    (
        [(header::CONTENT_TYPE, "application/json; charset=utf-8")],
        body.into(),
    )
        .into_response()
}

fn plain(status: StatusCode, text: String) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (status, content_type, text).into_response()
}

fn empty() -> Response {
    StatusCode::OK.into_response()
}
