//! Watches that go on for ever: begun anew when they break, and every now and then in any case.
//!
//! A watch may lose events without a sign, so all there is is listed anew every few minutes. One that breaks is begun anew after a
//! pause; the pauses grow until a watch has lived for a while, so that one that breaks at once does not make a loop of lists.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use rand::RngExt;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::addr::NetworkName;
use crate::control::Backoff;
use crate::control::store::{NetworkEvent, NetworkUpdate, Networks, StoreError};

/// How often all is listed anew, give or take a tenth.
pub(crate) const RELIST: Duration = Duration::from_secs(5 * 60);

/// How long a network stays that a list does not have any more, without its removal having been seen.
pub(crate) const LINGER: Duration = Duration::from_secs(60);

/// How to watch for ever.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// The longest pause before a watch that broke is begun anew.
    pub(crate) backoff_cap: Duration,
    /// How often all is listed anew, give or take a tenth.
    pub(crate) relist: Duration,
}

/// What one watch after the other tells, each from a snapshot; errors between them, with pauses after. `ended` is the error that a watch
/// that ends without a word is.
pub(crate) fn updates<'a, T: 'a>(
    watch: impl Fn() -> BoxStream<'a, Result<T, StoreError>> + 'a,
    ended: impl Fn() -> StoreError + 'a,
    pace: Pace,
) -> impl Stream<Item = Result<T, StoreError>> + 'a {
    struct Watching<'a, T> {
        stream: Option<BoxStream<'a, Result<T, StoreError>>>,
        opened: Instant,
        relist: Instant,
        resume: Instant,
        backoff: Backoff,
    }
    let start = Instant::now();
    let watching = Watching {
        stream: None,
        opened: start,
        relist: start,
        resume: start,
        backoff: Backoff::new(pace.backoff_cap),
    };
    stream::unfold(
        (watching, watch, ended),
        move |(mut watching, watch, ended)| async move {
            loop {
                let stream = match &mut watching.stream {
                    Some(stream) => stream,
                    none @ None => {
                        sleep_until(watching.resume).await;
                        watching.opened = Instant::now();
                        let relist = pace.relist.mul_f64(rand::rng().random_range(0.9..=1.1));
                        watching.relist = watching.opened + relist;
                        none.insert(watch())
                    }
                };
                match timeout_at(watching.relist, stream.next()).await {
                    Ok(Some(Ok(item))) => return Some((Ok(item), (watching, watch, ended))),
                    Err(_) => watching.stream = None,
                    Ok(none_or_error) => {
                        watching.stream = None;
                        // A watch that breaks as soon as it is made must not reset the pauses.
                        if watching.opened.elapsed() > pace.backoff_cap * 2 {
                            watching.backoff.reset();
                        }
                        watching.resume = Instant::now() + watching.backoff.next_pause();
                        let error = none_or_error.and_then(Result::err).unwrap_or_else(&ended);
                        return Some((Err(error), (watching, watch, ended)));
                    }
                }
            }
        },
    )
}

/// Which networks there are, for ever, by somebody who knows of `known`.
///
/// A network is gone at once if its removal is seen. One that a list does not have any more may be there all the same: the store was
/// wiped, or restored from a backup. It stays for [`LINGER`], and for good if it comes back by then.
pub(crate) fn networks<'a>(
    networks: &'a dyn Networks,
    known: BTreeSet<NetworkName>,
    pace: Pace,
) -> BoxStream<'a, Result<NetworkUpdate, StoreError>> {
    let ended = move || StoreError::Unavailable {
        doing: "watch the networks",
        place: networks.place(),
        cause: "the watch ended".to_owned(),
    };
    let updates = updates(move || networks.watch(None), ended, pace).boxed();
    let start = (updates, known, Missing::default());
    stream::unfold(start, |(mut updates, mut known, mut missing)| async move {
        let told = tokio::select! {
            told = updates.next() => told?.map(|item| missing.hold(item.update, &known)),
            gone = missing.given_up() => Ok(NetworkUpdate::Events(gone)),
        };
        if let Ok(update) = &told {
            update.clone().apply(&mut known);
        }
        Some((told, (updates, known, missing)))
    })
    .boxed()
}

/// Networks that a list did not have, and until when they stay.
#[derive(Debug, Default)]
struct Missing(BTreeMap<NetworkName, Instant>);

impl Missing {
    /// The update, with those that only seem to be gone.
    fn hold(&mut self, update: NetworkUpdate, known: &BTreeSet<NetworkName>) -> NetworkUpdate {
        match update {
            NetworkUpdate::Snapshot(mut all) => {
                let until = Instant::now() + LINGER;
                let missing: BTreeSet<NetworkName> = known.difference(&all).cloned().collect();
                self.0.retain(|name, _| missing.contains(name));
                for name in missing {
                    self.0.entry(name.clone()).or_insert_with(|| {
                        tracing::warn!(network = %name, "the store does not list a network any more; keeping it for a while");
                        until
                    });
                    all.insert(name);
                }
                NetworkUpdate::Snapshot(all)
            }
            NetworkUpdate::Events(events) => {
                for event in &events {
                    let (NetworkEvent::Added(name) | NetworkEvent::Removed(name)) = event;
                    self.0.remove(name);
                }
                NetworkUpdate::Events(events)
            }
        }
    }

    /// Waits until some have stayed away for too long.
    async fn given_up(&mut self) -> Vec<NetworkEvent> {
        let Some(&due) = self.0.values().min() else {
            return std::future::pending().await;
        };
        sleep_until(due).await;
        let gone = self.0.iter().filter(|(_, until)| **until <= due);
        let gone: Vec<NetworkEvent> = gone
            .map(|(name, _)| NetworkEvent::Removed(name.clone()))
            .collect();
        self.0.retain(|_, until| *until > due);
        gone
    }
}

#[cfg(test)]
mod tests;
