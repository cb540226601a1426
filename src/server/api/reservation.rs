//! Reservations: leases that never end, which an operator makes.

use axum::extract::{Path, Request, State};
use axum::response::Response;

use super::answer::{ApiError, empty, json};
use super::body::{MAX_BODY_BYTES, text};
use super::lease::check_attrs;
use super::{Api, Caller, FIRST_WORD_TIMEOUT, known_subnet, parse_key};
use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::control::store::remote::objects::reservation_json;
use crate::lease::json::Object;
use crate::lease::{Expiration, LeaseAttrs, Subnet};
use crate::server::access::Right;
use crate::server::directory::Network;

pub(super) async fn reservations(
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

pub(super) async fn reserve(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let entered = api.enter(&caller, &network, Right::Admin)?;
    let Network { store, feed, .. } = &*entered;
    let body = text(&api.shared.bodies.read(request).await?);
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

pub(super) async fn unreserve(
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
