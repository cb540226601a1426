//! `kersey server`: its flags, and the process around the server.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use super::UsageError;
use super::exit;
use super::http::{CertificateArgs, Listen, ServingArgs, listen_list};
use super::logging::LogArgs;
use super::process::SandboxArgs;
use super::store::{EtcdArgs, OwnStoreArgs, Serving, store_options};
use crate::control::store::etcd::Expirations;
use crate::control::store::{self, OpenError};
use crate::daemon::confine::{ConfineError, confine_server};
use crate::host::{inherited, limits, sandbox};
use crate::options::ServerOptions;
use crate::server::{self, Bound, ListenError, Served};
use crate::trust::TrustError;

/// Serve config and leases to other nodes over HTTP, without joining the overlay
///
/// The store is a database of this process (give --network-config the first time), or etcd if --etcd-endpoints is
/// given. Nodes join with `kersey run --remote HOST:PORT`; flannel 0.5 to 0.7 clients are served too. Without
/// --remote-cafile or --access-file whoever can connect can take leases: listen on an address only your nodes can reach.
#[derive(Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// Where to listen, comma-separated: HOST:PORT (port 0 lets the kernel choose), unix:///PATH, or fd:// for sockets
    /// passed by systemd, fd://N for one of them
    #[arg(long, value_name = "HOST:PORT,...", default_value = "127.0.0.1:8888", value_parser = listen_list)]
    listen: Listen,
    #[command(flatten)]
    certificates: CertificateArgs,
    #[command(flatten)]
    serving: ServingArgs,
    #[command(flatten)]
    own: OwnStoreArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten)]
    log: LogArgs,
}

impl ServerArgs {
    pub(super) fn into_options(self) -> Result<ServerOptions, UsageError> {
        Ok(ServerOptions {
            store: store_options(self.etcd, &self.own, None, Serving::Yes)?,
            serve: self.serving.into_options(self.listen, self.certificates)?,
            lease_ttl: self.own.lease_ttl,
            sandbox: self.sandbox.sandbox,
            log: self.log.options(),
        })
    }
}

/// Serves until SIGTERM or SIGINT.
pub fn run(options: &ServerOptions) -> ExitCode {
    limits::raise_open_files();
    match bind_and_serve(options) {
        Ok(()) => ExitCode::from(exit::OK),
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::from(match error {
                ServeError::Open(OpenError::Config(_)) => exit::CONFIG,
                ServeError::Open(_)
                | ServeError::Trust(_)
                | ServeError::Listen(_)
                | ServeError::Confine(_)
                | ServeError::Runtime(_) => exit::FAILED,
            })
        }
    }
}

/// Takes the ports, gives up what is needed for nothing else, and serves.
fn bind_and_serve(options: &ServerOptions) -> Result<(), ServeError> {
    let bound = server::bind(&options.serve.listen, inherited::descriptor)?;
    confine_server(options)?;
    let gave_up = sandbox::report();
    tracing::info!(
        sandbox = gave_up
            .iter()
            .map(|(part, state)| format!("{part} {state}"))
            .collect::<Vec<_>>()
            .join(", "),
        "the server starts"
    );
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)
        .and_then(|runtime| runtime.block_on(serve(options, bound)))
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Trust(#[from] TrustError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("{}", told(.0))]
    Confine(#[from] ConfineError),
    #[error("cannot start the runtime: {0}")]
    Runtime(std::io::Error),
}

/// An error with its causes.
fn told(error: &ConfineError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

async fn serve(options: &ServerOptions, bound: Vec<Bound>) -> Result<(), ServeError> {
    // Taken first, so that a signal that comes while the store opens is not lost.
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Runtime)?;
    let networks = store::open_networks(&options.store.kind, options.lease_ttl, Expirations::Ask).await?;
    let store = networks.open(None).map_err(OpenError::Store)?;
    let served = Served::open(store, &options.serve)?.with_networks(networks);
    let listeners = bound
        .into_iter()
        .map(Bound::listen)
        .collect::<Result<Vec<_>, _>>()?;
    server::announce(&listeners, &served);
    // Without systemd there is nobody to notify.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let stop = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        tracing::info!("stopping");
    };
    server::serve_all(listeners, served, stop).await;
    Ok(())
}
