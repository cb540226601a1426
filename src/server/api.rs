//! Flannel's client/server HTTP API, version 1, over a store.
//!
//! | method and path | answer |
//! | --- | --- |
//! | GET `/v1/` | names of networks: none, for the one served has no name |
//! | GET `/v1/_/config` | the network config, effective values filled in |
//! | POST `/v1/_/leases` | acquire: attributes in, lease out |
//! | GET `/v1/_/leases[?next=C]` | watch all leases |
//! | PUT `/v1/_/leases/{subnet}` | renew: lease in (the body decides), lease with its new end out |
//! | GET `/v1/_/leases/{subnet}[?next=C]` | watch one lease |
//! | DELETE `/v1/_/leases/{subnet}` | revoke |
//! | GET, POST `/v1/_/reservations`, DELETE `/v1/_/reservations/{subnet}` | reservations |
//!
//! Answers are JSON and a newline; errors are plain text with status 400 (the request cannot be understood) or 500
//! (everything else, as flannel has it); a path or method not in the table is 404. Two headers say more to Kersey's own
//! nodes: [`ERROR_HEADER`] names the kind of an error, [`PREVIOUS_HEADER`] the subnet a node held before.
//!
//! A request from a web page is refused: there is no authentication, so a browser on the management network must not
//! become a way in.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, put};
use serde::Deserialize;

use super::feed::{Answer, Feed, History};
use crate::addr::Ipv4Prefix;
use crate::control::config::NetworkConfig;
use crate::control::store::remote::objects::{lease_json, parse_lease, repair_backend_data};
use crate::control::store::remote::{ERROR_HEADER, ErrorKind, FORMERLY_HEADER, PREVIOUS_HEADER};
use crate::control::store::{Store, StoreError};
use crate::lease::json::{Object, compact};
use crate::lease::{Expiration, Lease, LeaseAttrs, Subnet};

/// The largest request body; a lease is a few hundred bytes.
const MAX_BODY_BYTES: usize = 1024 * 1024;
/// How long a request body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a question waits for a store that was never heard, before it is an error.
const FIRST_WORD_TIMEOUT: Duration = Duration::from_secs(5);
/// The name of the network without a name.
const UNNAMED: &str = "_";

/// What every handler needs.
#[derive(Clone)]
struct Api {
    store: Arc<dyn Store>,
    feed: Arc<Feed>,
}

/// The routes.
pub(super) fn router(store: Arc<dyn Store>, feed: Arc<Feed>) -> Router {
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
        .layer(from_fn(refuse_web_pages))
        .with_state(Api { store, feed })
}

/// Why a request is not answered as asked.
enum ApiError {
    /// It cannot be understood.
    Malformed(String),
    /// There is no network of that name.
    NoSuchNetwork(String),
    /// There is no lease of that subnet.
    NoSuchLease(Ipv4Prefix),
    /// The store said so.
    Store(StoreError),
    /// The network config is there and not usable.
    Config(String),
    /// The store was never heard.
    NotReady,
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
            Self::NoSuchNetwork(name) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::Refused,
                format!("100: Key not found (/{name}/config) [0]"),
            ),
            Self::NoSuchLease(subnet) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::LeaseLost,
                format!(
                    "100: Key not found (/subnets/{}-{}) [0]",
                    subnet.addr(),
                    subnet.len()
                ),
            ),
            Self::Store(error) => {
                let kind = match error {
                    StoreError::Unavailable { .. } => ErrorKind::Unavailable,
                    StoreError::Refused { .. } => ErrorKind::Refused,
                    StoreError::LeaseLost { .. } => ErrorKind::LeaseLost,
                };
                (StatusCode::INTERNAL_SERVER_ERROR, kind, error.to_string())
            }
            Self::Config(why) => (StatusCode::INTERNAL_SERVER_ERROR, ErrorKind::Refused, why),
            Self::NotReady => (
                StatusCode::INTERNAL_SERVER_ERROR,
                ErrorKind::Unavailable,
                "the server has not reached its store yet".to_owned(),
            ),
        };
        let mut response = plain(status, text);
        response
            .headers_mut()
            .insert(ERROR_HEADER, header::HeaderValue::from_static(kind.as_str()));
        response
    }
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

async fn networks(State(api): State<Api>, Query(cursor): Query<Cursor>) -> Response {
    if cursor.next().is_some() {
        // A network without a name is all this server will ever have: there is nothing to tell, ever.
        std::future::pending::<()>().await;
    }
    let cursor = api.feed.history().newest_cursor();
    json(format!(
        "{{\"events\":null,\"snapshot\":[],\"cursor\":\"{cursor}\"}}\n"
    ))
}

async fn config(State(api): State<Api>, Path(network): Path<String>) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let text = api.store.config().await?;
    effective_config(&text).map(json).map_err(ApiError::Config)
}

async fn watch_all(
    State(api): State<Api>,
    Path(network): Path<String>,
    Query(cursor): Query<Cursor>,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    match watch(&api, &cursor, |history, next| history.answer(next)).await? {
        Answer::Body(body) => Ok(json(body)),
        Answer::NoSuchLease => Err(ApiError::NotReady),
    }
}

async fn watch_one(
    State(api): State<Api>,
    Path((network, subnet)): Path<(String, String)>,
    Query(cursor): Query<Cursor>,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let subnet = parse_key(&subnet)?.v4;
    match watch(&api, &cursor, |history, next| history.answer_one(subnet, next)).await? {
        Answer::Body(body) => Ok(json(body)),
        Answer::NoSuchLease => Err(ApiError::NoSuchLease(subnet)),
    }
}

/// Asks the history. Only a poll with a cursor may wait for ever.
async fn watch(
    api: &Api,
    cursor: &Cursor,
    question: impl Fn(&mut History, Option<&str>) -> Option<Answer>,
) -> Result<Answer, ApiError> {
    let next = cursor.next();
    let asked = api.feed.ask(|history| question(history, next));
    match next {
        Some(_) => Ok(asked.await),
        None => tokio::time::timeout(FIRST_WORD_TIMEOUT, asked)
            .await
            .map_err(|_| ApiError::NotReady),
    }
}

async fn acquire(
    State(api): State<Api>,
    Path(network): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let previous = previous_subnet(request.headers())?;
    let body = read_body(request).await?;
    let attrs = LeaseAttrs::from_json(&body).map_err(|error| ApiError::Malformed(error.to_string()))?;
    let lease = api.store.acquire(&attrs, previous).await?;
    tracing::info!(subnet = %lease.subnet, public_ip = %attrs.public_ip, "lease acquired");
    wait_until_shown(&api, &lease).await;
    Ok(json(lease_json(&lease) + "\n"))
}

async fn renew(
    State(api): State<Api>,
    Path((network, _subnet)): Path<(String, String)>,
    request: Request,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let formerly = former_address(request.headers())?;
    let text = text(&read_body(request).await?);
    let read = parse_lease(&text).map_err(|error| ApiError::Malformed(error.to_string()))?;
    let Some(mut lease) = read.into_lease() else {
        return Err(ApiError::Malformed("Attrs is missing".to_owned()));
    };
    repair_backend_data(&mut lease.attrs);
    let lease = match formerly {
        Some(formerly) => api.store.readdress(None, &lease, &formerly).await?,
        None => api.store.renew(&lease).await?,
    };
    wait_until_shown(&api, &lease).await;
    Ok(json(lease_json(&lease) + "\n"))
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
    Path((network, key)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let subnet = known_subnet(&api, parse_key(&key)?);
    api.store.revoke(subnet).await?;
    tracing::info!(%subnet, "lease revoked");
    api.feed
        .wait_for(|history| history.lease(subnet.v4).is_none())
        .await;
    Ok(empty())
}

async fn reservations(State(api): State<Api>, Path(network): Path<String>) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let history = api.feed.history();
    let reserved: Vec<String> = history
        .leases()
        .filter(|lease| lease.expiration == Expiration::Never)
        .map(|lease| {
            format!(
                "{{\"Subnet\":\"{}\",\"PublicIP\":\"{}\"}}",
                lease.subnet.v4, lease.attrs.public_ip
            )
        })
        .collect();
    Ok(json(format!("[{}]\n", reserved.join(","))))
}

async fn reserve(
    State(api): State<Api>,
    Path(network): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let body = text(&read_body(request).await?);
    let malformed = |error: crate::lease::json::JsonError| ApiError::Malformed(error.to_string());
    let object = Object::parse(&body, MAX_BODY_BYTES).map_err(malformed)?;
    let subnet: Option<Ipv4Prefix> = object
        .parsed("Subnet", "must be an IPv4 network in quotes")
        .map_err(malformed)?;
    let v4 = subnet.ok_or_else(|| ApiError::Malformed("Subnet is missing".to_owned()))?;
    let attrs = LeaseAttrs::from_json(body.as_bytes()).map_err(malformed)?;
    api.store.reserve(Subnet { v4, v6: None }, &attrs).await?;
    tracing::info!(subnet = %v4, public_ip = %attrs.public_ip, "subnet reserved");
    api.feed
        .wait_for(|history| {
            history
                .lease(v4)
                .is_some_and(|lease| lease.expiration == Expiration::Never)
        })
        .await;
    Ok(empty())
}

async fn unreserve(
    State(api): State<Api>,
    Path((network, key)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    only_unnamed(&network)?;
    let subnet = known_subnet(&api, parse_key(&key)?);
    api.store.unreserve(subnet).await?;
    tracing::info!(%subnet, "reservation ended");
    api.feed
        .wait_for(|history| {
            history
                .lease(subnet.v4)
                .is_none_or(|lease| lease.expiration != Expiration::Never)
        })
        .await;
    Ok(empty())
}

/// A node asks for its lease as soon as it has it: let it find what it was just given.
async fn wait_until_shown(api: &Api, lease: &Lease) {
    let shown = |history: &History| {
        let seen = history.lease(lease.subnet.v4);
        seen.is_some_and(|seen| seen.attrs == lease.attrs)
    };
    api.feed.wait_for(shown).await;
}

async fn not_found() -> Response {
    plain(StatusCode::NOT_FOUND, "404 page not found".to_owned())
}

/// Browsers say where a request comes from; nodes and command-line tools do not.
async fn refuse_web_pages(request: Request, next: Next) -> Response {
    let headers = request.headers();
    if headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site") {
        return plain(
            StatusCode::FORBIDDEN,
            "requests from web pages are refused".to_owned(),
        );
    }
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

fn only_unnamed(network: &str) -> Result<(), ApiError> {
    if network == UNNAMED {
        Ok(())
    } else {
        Err(ApiError::NoSuchNetwork(network.chars().take(80).collect()))
    }
}

fn parse_key(key: &str) -> Result<Subnet, ApiError> {
    key.parse::<Subnet>()
        .map_err(|error| ApiError::Malformed(error.to_string()))
}

/// The whole key of a lease of which old clients name the IPv4 half only.
fn known_subnet(api: &Api, subnet: Subnet) -> Subnet {
    api.feed
        .history()
        .lease(subnet.v4)
        .map_or(subnet, |lease: &Lease| lease.subnet)
}

fn previous_subnet(headers: &HeaderMap) -> Result<Option<Subnet>, ApiError> {
    let Some(value) = headers.get(PREVIOUS_HEADER) else {
        return Ok(None);
    };
    let text = value
        .to_str()
        .map_err(|error| ApiError::Malformed(error.to_string()))?;
    parse_key(text).map(Some)
}

async fn read_body(request: Request) -> Result<Bytes, ApiError> {
    let read = to_bytes(request.into_body(), MAX_BODY_BYTES);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(error)) => Err(ApiError::Malformed(error.to_string())),
        Err(_) => Err(ApiError::Malformed("the body did not arrive in time".to_owned())),
    }
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
    (
        status,
        [(header::CONTENT_TYPE, "text/plain; charset=utf-8")],
        text + "\n",
    )
        .into_response()
}

fn empty() -> Response {
    StatusCode::OK.into_response()
}
