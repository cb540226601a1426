//! What may be asked, once or as a long poll: networks, their config, their leases.

use axum::extract::{Path, Query, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;

use super::answer::{ApiError, json};
use super::body::MAX_BODY_BYTES;
use super::{Api, Caller, FIRST_WORD_TIMEOUT, node, parse_key};
use crate::control::config::NetworkConfig;
use crate::lease::json::{Object, compact};
use crate::server::access::Right;
use crate::server::directory::Network;
use crate::server::feed::{Answer, History};

/// `?next=C`
#[derive(Deserialize)]
pub(super) struct Cursor {
    #[serde(default)]
    next: String,
}

impl Cursor {
    fn next(&self) -> Option<&str> {
        Some(self.next.as_str()).filter(|next| !next.is_empty() && *next != "0")
    }
}

pub(super) async fn networks(
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

pub(super) async fn config(
    State(api): State<Api>,
    caller: Caller,
    Path(network): Path<String>,
) -> Result<Response, ApiError> {
    let network = api.enter(&caller, &network, Right::Read)?;
    let text = network.store.config().await?;
    effective_config(&text).map(json).map_err(ApiError::Config)
}

pub(super) async fn watch_all(
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

pub(super) async fn watch_one(
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
