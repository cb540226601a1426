//! Reading bodies, so that all together take little.
//!
//! A body has at most [`MAX_BODY_BYTES`] and [`BODY_TIMEOUT`]. Ordinary ones are shorter than [`SMALL_BODY_BYTES`]; longer ones
//! are read [`BIG_BODIES`] at a time, so that all together stay within two megabytes; where [`WAITING_BODIES`] wait for that,
//! the next is an error.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use http_body_util::BodyExt;
use tokio::sync::Semaphore;

use super::answer::ApiError;

/// The largest request body: twice the attributes of a lease, which flannel's clients send once.
pub(super) const MAX_BODY_BYTES: usize = 128 * 1024;
/// What a body may have without waiting for its turn.
const SMALL_BODY_BYTES: usize = 4 * 1024;
/// How many bodies may be longer than that at a time.
const BIG_BODIES: usize = 16;
/// How many more may wait for it; each has a buffer of some kilobytes.
const WAITING_BODIES: usize = 48;
/// How long a request body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(5);

/// Turns at reading bodies.
pub(super) struct Bodies {
    big: Semaphore,
    waiting: Semaphore,
}

impl Default for Bodies {
    fn default() -> Self {
        Self {
            big: Semaphore::new(BIG_BODIES),
            waiting: Semaphore::new(BIG_BODIES + WAITING_BODIES),
        }
    }
}

impl Bodies {
    /// Reads the body of a request.
    pub(super) async fn read(&self, request: Request) -> Result<Bytes, ApiError> {
        let read = self.collect(request.into_body());
        match tokio::time::timeout(BODY_TIMEOUT, read).await {
            Ok(body) => body,
            Err(_) => Err(ApiError::Malformed("the body did not arrive in time".to_owned())),
        }
    }

    async fn collect(&self, mut body: Body) -> Result<Bytes, ApiError> {
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
                let Ok(place) = self.waiting.try_acquire() else {
                    return Err(ApiError::Busy);
                };
                // The semaphore is never closed.
                turn = self.big.acquire().await.ok().map(|turn| (place, turn));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(bytes.into())
    }
}

pub(super) fn text(body: &Bytes) -> String {
    String::from_utf8_lossy(body).into_owned()
}
