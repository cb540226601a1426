//! Ends of leases across restarts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// The least time a lease has after a restart: enough for its node to come back and renew.
pub(super) const GRACE: Duration = Duration::from_secs(60 * 60);

/// Relates the monotonic clock to the wall clock as it was when the store was opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock {
    wall: SystemTime,
    pub(super) monotonic: Instant,
}

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "ends of leases are kept in wall-clock time across restarts; it is read once"
    )]
    pub(super) fn start() -> Self {
        Self {
            wall: SystemTime::now(),
            monotonic: Instant::now(),
        }
    }

    pub(super) fn wall(self, at: Instant) -> SystemTime {
        self.wall + at.saturating_duration_since(self.monotonic)
    }

    pub(super) fn millis(self, at: Instant) -> u64 {
        let since_1970 = self.wall(at).duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// When a lease ends that was to end at `millis`, if the file is read at `now`.
    pub(super) fn revive(self, millis: u64, now: Instant, ttl: Duration) -> Instant {
        let left = millis.saturating_sub(self.millis(now));
        now + Duration::from_millis(left).max(GRACE).min(ttl)
    }
}
