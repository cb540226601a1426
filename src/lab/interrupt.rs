//! Ending early on Ctrl-C or SIGTERM, with every guard dropped on the way out.
//!
//! The signals only raise a flag; everything in the lab that waits does so in short steps and fails with
//! [`Interrupted`] once it is up. The flag is process-wide because signals are.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// How late an interruption may be noticed.
pub const STEP: Duration = Duration::from_millis(50);

static RAISED: AtomicBool = AtomicBool::new(false);

/// The user wants out.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Starts catching SIGINT, SIGTERM and SIGHUP.
///
/// # Errors
/// The handlers cannot be installed.
pub fn catch() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut int, mut term, mut hup) = {
        let _inside = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        )
    };
    let wait = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
                _ = hup.recv() => {}
            }
        });
        RAISED.store(true, Ordering::Relaxed);
        // The runtime stays, so that a second Ctrl-C does not kill us in the middle of cleaning up.
        runtime.block_on(std::future::pending::<()>());
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(wait)
        .context("start a thread for signals")?;
    Ok(())
}

/// Whether a signal came.
pub fn raised() -> bool {
    RAISED.load(Ordering::Relaxed)
}

/// Fails if a signal came.
///
/// # Errors
/// [`Interrupted`]
pub fn check() -> Result<(), Interrupted> {
    if raised() { Err(Interrupted) } else { Ok(()) }
}

/// Sleeps.
///
/// # Errors
/// [`Interrupted`], soon after a signal.
pub fn sleep(duration: Duration) -> Result<(), Interrupted> {
    let end = Instant::now() + duration;
    loop {
        check()?;
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(STEP));
    }
}

/// Waits until `condition` holds, asking every 10 ms; `false` if it does not within `limit`, or after a signal.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= end || raised() {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    true
}
