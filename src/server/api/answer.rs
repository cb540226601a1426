//! What a request is answered with, errors above all.

use std::net::IpAddr;

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::control::store::StoreError;
use crate::control::store::remote::{ERROR_HEADER, ErrorKind};
use crate::lease::Subnet;
use crate::server::access::Denial;
use crate::server::front::Turned;

/// Why a request is not answered as asked.
pub(super) enum ApiError {
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
    pub(super) fn body(why: impl std::fmt::Display) -> Self {
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

/// What those get who are turned away at the front.
pub(in crate::server) fn turn_away(turned: &Turned) -> Response {
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
            "leases and reservations are ended, and reservations made, over 127.0.0.1, ::1 or a unix socket of the server's \
             machine, with a client certificate, or by whom the server's --access-file gives the right",
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

pub(super) async fn not_found() -> Response {
    plain(StatusCode::NOT_FOUND, "404 page not found\n".to_owned())
}

pub(super) fn json(body: impl Into<Body>) -> Response {
    (
        [(header::CONTENT_TYPE, "application/json; charset=utf-8")],
        body.into(),
    )
        .into_response()
}

pub(super) fn plain(status: StatusCode, text: String) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (status, content_type, text).into_response()
}

pub(super) fn empty() -> Response {
    StatusCode::OK.into_response()
}
