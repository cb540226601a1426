//! Wiring: the order in which a node starts, stays up and stops.
//!
//! ```text
//! status socket ─ store ─ (server) ─ network config ─ backend ─ interface ─ lease
//!       └▶ device, sockets, threads ─ address, MTU, routes ─ subnet.env ─ READY
//!             └▶ for ever: peers → routes · a new own subnet → device anew · a dead device → device anew
//!             └▶ a device changed by hand → put right · signals
//! ```
//!
//! A backend without a tunnel goes the same way as far as the lease; `plain` is the rest.
//!
//! The status socket comes first: it is how a second daemon finds out. `subnet.env` comes last: to a CNI plugin it means
//! "ready". What may come right by itself is retried for ever (store, config, interface, a device or port in use); only what this machine lacks
//! (`/dev/net/tun`, a capability) or a config we cannot run ends the process.
//!
//! One thread runs all of this; packets move on threads of their own ([`host::queues`](crate::host::queues)) and never wait for it.

mod claims;
pub(crate) mod confine;
mod direct;
mod firewall;
mod gateways;
mod health;
mod instance;
mod judge;
mod kernel_routes;
mod metrics;
mod network;
mod node;
mod paths;
mod plain;
mod ports;
mod reload;
mod report;
mod startup;
mod succession;
mod supervisor;
pub(crate) mod switches;
mod underlay_watch;
mod watchdog;
mod ways;
mod withdraw;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::control::store::etcd::Expirations;
use crate::control::store::{self, OpenError};
use crate::daemon::health::Health;
use crate::daemon::instance::{Held, Instance};
pub use crate::daemon::judge::{unread, unusable};
use crate::daemon::kernel_routes::Denied;
use crate::daemon::node::{UnusableKeys, UnusableMtu};
use crate::daemon::reload::Reread;
use crate::daemon::report::{Report, Reports};
use crate::daemon::succession::{Doorbell, Handed, Ring};
use crate::host::firewall::helper;
use crate::host::sandbox;
use crate::host::tun::TunError;
use crate::host::{inherited, limits};
use crate::options::RunOptions;
use crate::server::status::{StatusSocket, StatusSocketError};
use crate::server::{self, Served};

/// Exit statuses: `cli::exit` documents them.
const OK: u8 = 0;
const FAILED: u8 = 1;
const ENVIRONMENT: u8 = 3;
const CONFIG: u8 = 4;
const INSTANCE: u8 = 7;
/// How long work on other threads may take to end: writing a file does not take longer.
const GRACE: Duration = Duration::from_millis(500);

/// Runs a node until it is asked to stop; `reread` gives the options anew when it is asked to reload.
pub fn run(options: RunOptions, reread: impl Fn() -> Result<RunOptions, String>) -> ExitCode {
    limits::raise_open_files();
    crate::host::sys::map_large_blocks();
    if let Err(error) = succession::arrive(&options) {
        tracing::error!(%error, "cannot take the place of the daemon that runs");
        return ExitCode::from(INSTANCE);
    }
    if let Err(error) = confine::confine(&options) {
        tracing::error!("{:#}", anyhow::Error::from(error));
        return ExitCode::from(ENVIRONMENT);
    }
    let ended = live(&options, &reread);
    succession::held().unpark();
    helper::end();
    match ended {
        Ok(()) => ExitCode::from(OK),
        Err(error) => {
            let status = exit_status(&error);
            tracing::error!("{error:#}");
            if status == ENVIRONMENT {
                let needs = if error.downcast_ref::<Denied>().is_some() {
                    "CAP_NET_ADMIN"
                } else if error.downcast_ref::<StatusSocketError>().is_some() {
                    "root, or CAP_NET_ADMIN and directories it may write to"
                } else {
                    "/dev/net/tun and CAP_NET_ADMIN"
                };
                tracing::error!("kersey needs {needs}; see docs/operations.md#privileges");
            }
            ExitCode::from(status)
        }
    }
}

/// Runs nodes until there is nothing left to do; one after the other, if a successor asks for everything and then goes away.
fn live(options: &RunOptions, reread: Reread<'_>) -> Result<()> {
    // One for all: a signal that comes between two runtimes is not to be missed.
    let mut signals = None;
    loop {
        let rung = on_runtime(async {
            let stop = StopSignals::of(&mut signals)?;
            tokio::select! {
                ended = start(options, reread) => ended,
                name = stop.wait() => {
                    tracing::info!(signal = name, "stopping");
                    // Without systemd there is nobody to notify.
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                    Ok(Ring::End)
                }
            }
        })?;
        let (successor, version) = match rung {
            Ring::Take(successor, version) => (successor, version),
            Ring::End => return Ok(()),
        };
        // Nothing talks to a store or listens any more; the threads are parked.
        let handed = on_runtime(async {
            let stop = StopSignals::of(&mut signals)?;
            tokio::select! {
                handed = succession::hand_over(successor, version, stop) => Ok(handed),
                never = watchdog::tend_parked() => match never {},
            }
        })?;
        if handed == Handed::Over {
            return Ok(());
        }
    }
}

/// Runs `work`, and ends all it has started.
fn on_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let done = runtime.block_on(work);
    // A name server that does not answer must not hold up the end.
    runtime.shutdown_timeout(GRACE);
    done
}

fn exit_status(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<crate::backend::BackendError>().is_some()
        || error.downcast_ref::<UnusableMtu>().is_some()
        || error.downcast_ref::<UnusableKeys>().is_some()
    {
        return CONFIG;
    }
    if let Some(OpenError::Config(_)) = error.downcast_ref::<OpenError>() {
        return CONFIG;
    }
    if error.downcast_ref::<Denied>().is_some() {
        return ENVIRONMENT;
    }
    // With CAP_NET_ADMIN only the folder is wrong, which may be mended meanwhile; without, this user can never run it.
    if let Some(StatusSocketError::Create { cause, .. }) = error.downcast_ref()
        && cause.kind() == std::io::ErrorKind::PermissionDenied
        && !sandbox::may_change_network()
    {
        return ENVIRONMENT;
    }
    if error.downcast_ref::<Held>().is_some()
        || matches!(
            error.downcast_ref::<StatusSocketError>(),
            Some(StatusSocketError::AlreadyServed(_))
        )
    {
        return INSTANCE;
    }
    match error.downcast_ref::<TunError>() {
        Some(TunError::Missing { .. } | TunError::Denied { .. }) => ENVIRONMENT,
        Some(TunError::Busy { .. } | TunError::Other { .. }) | None => FAILED,
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Those there are, or new ones; to be called within a runtime.
    fn of(signals: &mut Option<Self>) -> Result<&mut Self> {
        if signals.is_none() {
            *signals = Some(Self::new().context("cannot listen for signals")?);
        }
        signals.as_mut().context("cannot listen for signals")
    }

    async fn wait(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Starts a node and keeps it up, until somebody rings; or there is an error nothing can mend.
async fn start(options: &RunOptions, reread: Reread<'_>) -> Result<Ring> {
    let hangup = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    let health = Arc::new(Health::new(kernel_release()));
    let report = Arc::new(Report::new(options));
    let reports = Arc::new(Reports::new(Arc::clone(&health)));
    let socket = StatusSocket::bind(&options.status_socket)?;
    if options.networks.is_some() {
        let shown = Arc::clone(&reports);
        tokio::spawn(async move { socket.serve(move || shown.status()).await });
    } else {
        health.add("_", Arc::clone(&report));
        tokio::spawn(tell_when_ready(Arc::clone(&report), Arc::clone(&health)));
        let shown = Arc::clone(&report);
        tokio::spawn(async move { socket.serve(move || shown.status()).await });
    }
    let _instance = Instance::lock(&options.data_dir)?;
    let doorbell = Doorbell::new(options);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        kernel = kernel_release(),
        sandbox = sandbox_line(),
        "kersey starts"
    );
    health::serve(&options.process.monitor, &health);
    tokio::spawn(watchdog::tend(Arc::clone(&health)));
    tokio::spawn(succession::relieve_predecessor(Arc::clone(&health)));

    let expirations = if options.serve.is_some() {
        Expirations::Ask
    } else {
        Expirations::Assume
    };
    let networks = store::open_networks(&options.store.kind, options.lease.ttl, expirations).await?;
    let store = networks.open(None)?;
    report.set_store(store.place());
    reports.set_place(networks.place());
    if let Some(serve) = &options.serve {
        let served = Served::open(Arc::clone(&store), serve)?.with_networks(Arc::clone(&networks));
        let listeners = server::listen(&serve.listen, inherited::descriptor).await?;
        server::announce(&listeners, &served);
        tokio::spawn(server::serve_all(listeners, served, std::future::pending()));
    }
    tracing::info!(store = store.place(), "store opened");
    let nodes = async {
        match &options.networks {
            None => node::run(options.clone(), store, report, None).await,
            Some(choice) => {
                supervisor::run(options, choice, networks, reports).await;
                Ok(())
            }
        }
    };
    tokio::select! {
        ended = nodes => ended.map(|()| Ring::End),
        never = reload::serve(hangup, options, reread, &health) => match never {},
        ring = rung(doorbell.as_ref()) => Ok(ring),
    }
}

/// Tells systemd whenever the node becomes ready; of several networks, the supervisor does.
async fn tell_when_ready(report: Arc<Report>, health: Arc<Health>) {
    loop {
        report.until(true).await;
        watchdog::tell_ready(&health);
        report.until(false).await;
    }
}

/// Waits for a successor; for ever, if none can ask. If it wants everything, threads are parked from then on: the nodes end as soon as
/// this does.
async fn rung(doorbell: Option<&Doorbell>) -> Ring {
    let Some(doorbell) = doorbell else {
        return std::future::pending().await;
    };
    let ring = doorbell.rung().await;
    if let Ring::Take(..) = ring {
        succession::held().park();
    }
    ring
}

fn kernel_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// What was given up, in one line.
fn sandbox_line() -> String {
    let parts: Vec<_> = sandbox::report()
        .into_iter()
        .map(|(part, state)| format!("{part} {state}"))
        .collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use nix::sys::signal::{Signal, raise};
    use tokio::time::timeout;

    use super::*;

    /// Between the life of a daemon and its wait for a successor, one runtime ends, which may take [`GRACE`], and another begins.
    #[test]
    fn a_signal_between_two_runtimes_is_heard() {
        let mut signals = None;
        on_runtime(async {
            StopSignals::of(&mut signals)?;
            // Work that keeps the runtime from ending at once.
            tokio::task::spawn_blocking(|| {
                sleep(GRACE / 4);
                raise(Signal::SIGTERM)
            });
            Ok(())
        })
        .unwrap();
        let heard = on_runtime(async {
            let stop = StopSignals::of(&mut signals)?;
            Ok(timeout(Duration::from_secs(5), stop.wait()).await)
        });
        assert_eq!(heard.unwrap(), Ok("SIGTERM"));
    }
}
