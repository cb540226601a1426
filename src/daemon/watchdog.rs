//! What the service manager is told: that we live, and in one line how we are.
//!
//! The watchdog is fed only while [`Health`] finds nothing wrong, so a stuck loop or a dead thread ends in a restart. This runs on the
//! control loop's own thread: if that hangs, nobody feeds. Without a service manager only the log tells.
//!
//! A daemon that has given everything to a successor waits for that one as long as it lives, and is fed meanwhile ([`tend_parked`]).

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::Notify;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::daemon::health::Health;
use crate::server::monitor::Monitored;

/// How often the line is looked at, and told if it is another; a shorter watchdog has it looked at more often.
const STATUS: Duration = Duration::from_secs(2);

static TOLD_READY: AtomicBool = AtomicBool::new(false);
/// Has the line looked at at once: what was last told beside it may be old by then.
static LINE_IS_OLD: Notify = Notify::const_new();

/// Tells that the daemon is up, or has done with a reload, and in the same message how it is, so that the line from before is never beside
/// it. Without a service manager there is nobody to tell.
pub(super) fn tell_ready(health: &Health) {
    TOLD_READY.store(true, Ordering::Relaxed);
    let line = one_line(&health.summary());
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&line)]);
    LINE_IS_OLD.notify_one();
}

/// The text without control characters: to a service manager what comes after the end of a line is another message, and there are words of
/// others in it.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Whether [`tell_ready`] was called.
pub(super) fn has_told_ready() -> bool {
    TOLD_READY.load(Ordering::Relaxed)
}

/// How often the watchdog must be fed, if there is one.
fn period() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|period| !period.is_zero())
}

/// Thrice in a period: one of them may be late.
fn ticks(watchdog: Option<Duration>) -> Interval {
    let every = watchdog.map_or(STATUS, |period| (period / 3).min(STATUS));
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Feeds the watchdog of a daemon that does nothing but wait for its successor.
pub(super) async fn tend_parked() -> Infallible {
    let watchdog = period();
    let mut ticks = ticks(watchdog);
    let _ = sd_notify::notify(&[NotifyState::Status("waiting for a successor to be ready")]);
    loop {
        ticks.tick().await;
        if watchdog.is_some() {
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Tells of the daemon for as long as it runs.
pub(super) async fn tend(health: Arc<Health>) -> Infallible {
    let watchdog = period();
    let mut ticks = ticks(watchdog);
    let mut told = String::new();
    let mut ill = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = LINE_IS_OLD.notified() => {}
        }
        match health.alive() {
            Ok(()) => {
                if watchdog.is_some() {
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                }
                ill = false;
            }
            Err(_) if ill => {}
            Err(why) => {
                if watchdog.is_some() {
                    tracing::error!(why, "the watchdog is not fed");
                } else {
                    tracing::error!(why, "something is wrong that only a restart mends");
                }
                ill = true;
            }
        }
        let line = one_line(&health.summary());
        if line != told {
            let _ = sd_notify::notify(&[NotifyState::Status(&line)]);
            told = line;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_others_are_no_messages_of_ours() {
        assert_eq!(
            one_line("not ready: 503 x\nWATCHDOG=trigger\r\u{1b}[2J"),
            "not ready: 503 x WATCHDOG=trigger  [2J"
        );
    }
}
