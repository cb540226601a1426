//! A chain of long polls: how a watch of anything goes over HTTP.
//!
//! The first question has no cursor and is answered with a snapshot, by whichever server answers. From then on the server that
//! answered is asked what came after its cursor, which takes as long as nothing comes. A cursor of ours is `N-CURSOR`: the
//! number of the server, and its own words. When another server is current, or a poll fails, the next question is the first one
//! again.

use std::time::Duration;

use hyper::StatusCode;
use tokio::time::{Instant, sleep};

use super::NodeHeader;
use super::servers::{Ask, Failure, Servers};
use crate::control::store::{Cursor, StoreError};

/// How long a poll waits before it is asked anew.
const POLL_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after a poll that failed at once or brought nothing: flannel's own.
const POLL_PAUSE: Duration = Duration::from_secs(1);

/// Reads an answer: what it says, if anything, and the server's cursor.
type Reader<T> = fn(&str) -> Result<(Option<T>, Cursor), StoreError>;

/// What is watched.
pub(super) struct Watched<'a, T> {
    /// For errors.
    pub(super) doing: &'static str,
    /// The path, without `?next=`.
    pub(super) path: &'a str,
    /// A path with an answer at once, to see whether a silent server lives.
    pub(super) sign_of_life: &'a str,
    /// Reads an answer.
    pub(super) read: Reader<T>,
    /// What a first answer that says nothing means: old servers write `null` for an empty list.
    pub(super) nothing: fn() -> T,
    /// Who asks.
    pub(super) node: Option<NodeHeader>,
}

/// One step of a watch: polls until there is something to tell.
pub(super) async fn poll<T>(
    servers: &Servers,
    watched: &Watched<'_, T>,
    mut since: Option<Cursor>,
) -> Result<(T, Cursor), StoreError> {
    let Watched { doing, path, .. } = *watched;
    loop {
        servers.look_at_better_ones().await;
        let current = servers.current();
        let Some(cursor) = since.as_ref().and_then(|cursor| of_server(current, cursor)) else {
            let mut ask = Ask::get(doing, path.to_owned());
            ask.node.clone_from(&watched.node);
            let answer = servers.ask(&ask).await?;
            let (update, cursor) = (watched.read)(&answer.body)?;
            let update = update.unwrap_or_else(watched.nothing);
            return Ok((update, numbered(answer.server, &cursor)));
        };
        let mut ask = Ask::get(doing, format!("{path}?next={cursor}"));
        ask.timeout = POLL_TIMEOUT;
        ask.node.clone_from(&watched.node);
        if current > 0 {
            // Long enough to save requests, short enough to go home in time.
            ask.timeout = ask.timeout.min(servers.return_after());
        }
        let asked = Instant::now();
        let why = match servers.ask_only(current, &ask).await {
            Ok(answer) if answer.status == StatusCode::OK => {
                let (update, next) = (watched.read)(&answer.body)?;
                let next = numbered(current, &next);
                if let Some(update) = update {
                    return Ok((update, next));
                }
                // No sound server answers a poll with nothing; this one is not asked without a pause.
                sleep(POLL_PAUSE).await;
                since = Some(next);
                continue;
            }
            Ok(answer) => format!("{}: {}", answer.status, answer.body.trim()),
            // Quiet is the rule. Whether the server lives, a question with an answer tells.
            Err(Failure::Silent(_)) => {
                let question = Ask::get(doing, watched.sign_of_life.to_owned());
                match servers.ask_only(current, &question).await {
                    Ok(_) => continue,
                    Err(failure) => failure.to_string(),
                }
            }
            Err(failure) => failure.to_string(),
        };
        tracing::debug!(server = %servers.name(current), why, "a poll failed; asking for a snapshot");
        // All nodes lose a server at once; and one that fails every poll must not be asked in a loop.
        let pause = if asked.elapsed() < POLL_PAUSE {
            POLL_PAUSE
        } else {
            POLL_PAUSE.mul_f64(rand::random_range(0.1..0.5))
        };
        sleep(pause).await;
        since = None;
    }
}

/// A cursor of ours: a server's, and which server's it is.
fn numbered(server: usize, cursor: &Cursor) -> Cursor {
    Cursor(format!("{server}-{}", cursor.0))
}

/// The server's part of a cursor of ours, if it is of that server.
fn of_server(server: usize, cursor: &Cursor) -> Option<&str> {
    let (number, text) = cursor.0.split_once('-')?;
    (number.parse() == Ok(server)).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_for_the_server_that_gave_it() {
        let cursor = numbered(1, &Cursor("a1b2-c.7".to_owned()));
        assert_eq!(of_server(1, &cursor), Some("a1b2-c.7"));
        assert_eq!(of_server(0, &cursor), None);
        assert_eq!(of_server(0, &Cursor("7".to_owned())), None);
    }
}
