//! The flags of `kersey server`.

use super::logging::LogArgs;
use super::store::{EtcdArgs, OwnStoreArgs, Serving, store_options};
use super::{UsageError, address};
use crate::options::{ListenAddress, ServerOptions};

/// Serve config and leases to other nodes over HTTP, without joining the overlay
///
/// The store is a database of this process (give --network-config the first time), or etcd if --etcd-endpoints is
/// given. Nodes join with `kersey run --remote HOST:PORT`; flannel 0.5 to 0.7 clients are served too. There is no
/// authentication: listen on an address only your nodes can reach.
#[derive(Debug, clap::Args)]
pub(super) struct ServerArgs {
    /// Where to listen; port 0 lets the kernel choose
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8888", value_parser = address::<ListenAddress>)]
    listen: ListenAddress,
    #[command(flatten)]
    own: OwnStoreArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    log: LogArgs,
}

impl ServerArgs {
    pub(super) fn into_options(self) -> Result<ServerOptions, UsageError> {
        Ok(ServerOptions {
            store: store_options(self.etcd, &self.own, None, Serving::Yes)?,
            listen: self.listen,
            lease_ttl: self.own.lease_ttl,
            log: self.log.options(),
        })
    }
}
