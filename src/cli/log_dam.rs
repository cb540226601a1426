//! Not the same line for ever: a flood of one cause becomes a line in ten seconds (S15).
//!
//! Of lines of one kind, [`BURST`] go in a row and then the first in each [`PAUSE`]; what is held back is counted and told with the next one
//! that is not. A kind is a place in the code. Lines below `info` are for someone who looks for something, and are not held back.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Lines of one kind in a row: as many bad keys as an operator would want to see by name.
const BURST: u32 = 50;
/// How long until there is another one.
const PAUSE: Duration = Duration::from_secs(10);

/// Holds back lines that come again and again.
#[derive(Debug, Default)]
pub(super) struct Dam(Mutex<HashMap<Identifier, Kind>>);

/// Lines of one kind.
#[derive(Debug)]
struct Kind {
    left: u32,
    since: Instant,
    held_back: u64,
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes; so many before it did not.
    Goes(u64),
    HeldBack,
}

impl Kind {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
            held_back: 0,
        }
    }

    fn next(&mut self, now: Instant) -> Fate {
        let pauses = now.saturating_duration_since(self.since).as_secs() / PAUSE.as_secs();
        if pauses > 0 {
            let earned = u32::try_from(pauses).unwrap_or(BURST);
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = now;
        }
        if self.left == 0 {
            self.held_back += 1;
            return Fate::HeldBack;
        }
        self.left -= 1;
        Fate::Goes(std::mem::take(&mut self.held_back))
    }
}

impl<S: Subscriber> Layer<S> for Dam {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO {
            return true;
        }
        let now = now();
        let fate = {
            let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let kind = kinds.entry(metadata.callsite()).or_insert_with(|| Kind::new(now));
            kind.next(now)
        };
        match fate {
            Fate::Goes(0) => true,
            Fate::Goes(held_back) => {
                tracing::warn!(
                    held_back,
                    of = metadata.target(),
                    "lines like the next one came too often"
                );
                true
            }
            Fate::HeldBack => false,
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a shell: lines come by the clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_one_kind_becomes_a_line_in_ten_seconds_and_says_how_many() {
        let start = now();
        let mut kind = Kind::new(start);
        let mut gone = 0;
        for n in 0..1_000_000u32 {
            // A million lines in a hundred seconds.
            let at = start + Duration::from_micros(u64::from(n) * 100);
            gone += u32::from(matches!(kind.next(at), Fate::Goes(_)));
        }
        assert!((BURST + 8..=BURST + 10).contains(&gone), "{gone}");
        let Fate::Goes(held_back) = kind.next(start + Duration::from_secs(200)) else {
            panic!("it goes after a pause");
        };
        assert!(held_back > 90_000, "{held_back}");
    }

    #[test]
    fn the_dam_is_in_the_way_of_info_and_not_of_debug() {
        use tracing_subscriber::layer::SubscriberExt;
        #[derive(Clone, Default)]
        struct Count(std::sync::Arc<Mutex<(u32, u32)>>);
        impl<S: Subscriber> Layer<S> for Count {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                let mut count = self.0.lock().unwrap();
                if *event.metadata().level() == Level::DEBUG {
                    count.1 += 1;
                } else {
                    count.0 += 1;
                }
            }
        }
        let count = Count::default();
        let subscriber = tracing_subscriber::registry()
            .with(Dam::default())
            .with(count.clone());
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                tracing::info!("again");
                tracing::debug!("again");
            }
        });
        assert_eq!(*count.0.lock().unwrap(), (BURST, 1000));
    }
}
