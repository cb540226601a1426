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
//! 401 or 403 (`access`), a web page 403 (`front`). Headers say more between Kersey and its own nodes
//! ([`remote`](crate::control::store::remote)): the kind of an error, the subnet a node held before, who the node is. One that says so,
//! and whose public address another live host has, gets 409 (`presence`).
//!
//! The Kubernetes proposal writes the same paths without `/v1`, and `network` for the network without a name;
//! [`from_kubernetes_form`] makes flannel's of them.

mod answer;
mod body;
mod lease;
mod question;
mod reservation;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{delete, get, put};

pub(super) use self::answer::turn_away;
use self::answer::{ApiError, not_found, plain};
use self::body::Bodies;
use self::lease::{acquire, renew, revoke};
use self::question::{config, networks, watch_all, watch_one};
use self::reservation::{reservations, reserve, unreserve};
use super::access::{Access, Denial, Grants, Peer, Right, UNNAMED};
use super::crowd::Introduction;
use super::directory::{Directory, Missing, Network};
use super::feed::Feed;
use crate::control::store::remote::node::NodeHeaderError;
use crate::control::store::remote::{NODE_HEADER, NodeHeader};
use crate::lease::{Lease, Subnet};

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
    bodies: Bodies,
}

impl Api {
    pub(super) fn new(directory: Directory, access: Access) -> Self {
        Self {
            shared: Arc::new(Shared {
                directory,
                access,
                bodies: Bodies::default(),
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

/// Flannel's routes know GET and not HEAD.
async fn refuse_head(request: Request, next: Next) -> Response {
    if request.method() == Method::HEAD {
        return not_found().await;
    }
    next.run(request).await
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
