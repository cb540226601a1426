//! How often to try, and how often to speak of it.

use std::sync::Mutex;
use std::time::Duration;

use rand::RngExt;
use tokio::time::Instant;

/// Pauses between attempts: doubling up to a cap, each cut at random by up to a half, so that nodes that lost their
/// store together do not come back together.
#[derive(Debug)]
pub(crate) struct Backoff {
    cap: Duration,
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);

    pub(crate) fn new(cap: Duration) -> Self {
        Self {
            cap,
            next: Self::FIRST.min(cap),
        }
    }

    pub(crate) fn next_pause(&mut self) -> Duration {
        let pause = self.next.mul_f64(rand::rng().random_range(0.5..=1.0));
        self.next = (self.next * 2).min(self.cap);
        pause
    }

    pub(crate) fn reset(&mut self) {
        self.next = Self::FIRST.min(self.cap);
    }
}

/// Lets one log line through, then none for a minute.
#[derive(Debug, Default)]
pub(crate) struct RateLimit(Mutex<Option<Instant>>);

impl RateLimit {
    const INTERVAL: Duration = Duration::from_secs(60);

    /// Whether a line may be written.
    pub(crate) fn allows(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let due = last.is_none_or(|last| last.elapsed() >= Self::INTERVAL);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_and_no_further() {
        let mut backoff = Backoff::new(Duration::from_secs(2));
        let pauses: Vec<_> = (0..10).map(|_| backoff.next_pause()).collect();
        assert!(pauses[0] <= Duration::from_millis(100) && pauses[0] >= Duration::from_millis(50));
        assert!(pauses[9] <= Duration::from_secs(2) && pauses[9] >= Duration::from_secs(1));
        backoff.reset();
        assert!(backoff.next_pause() <= Duration::from_millis(100));
    }

    #[tokio::test(start_paused = true)]
    async fn one_line_a_minute() {
        let limit = RateLimit::default();
        assert!(limit.allows() && !limit.allows());
        tokio::time::advance(Duration::from_secs(61)).await;
        assert!(limit.allows());
    }
}
