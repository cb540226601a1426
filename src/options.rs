//! What the user asked for, as plain data: the command line and the environment, parsed and checked.
//!
//! `cli` makes these values; the daemon and the server read them. Nothing here can be half right: a flag that was
//! refused never gets this far.

mod firewall;
mod process;

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU16, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::addr::{Ipv6Prefix, NetworkName};
pub use crate::dataplane::endpoint::NodeSid;
use crate::lease::Subnet;
pub use firewall::{Enabled, FirewallOptions, FirewallTool, Masquerade};
pub use process::{
    Handover, MonitorOptions, Predecessor, ProcessOptions, SandboxChoice, SandboxPart, UnknownPart,
    metrics_address,
};

mod address;
mod http;
mod nearest;

pub use address::{AddressError, ListenAddress, Scheme, ServerAddress};
pub use http::{ApiForm, KeyPairFiles, RemoteOptions, ServeOptions, TlsFiles};
pub use nearest::nearest;

/// `kersey run`: the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// Where config and leases live.
    pub store: StoreOptions,
    /// Serve that store to other nodes, while this node uses it too.
    pub serve: Option<ServeOptions>,
    /// Which underlay interface and addresses to use.
    pub interface: InterfaceOptions,
    /// Directory for state: the embedded store, and the cache of the last known leases.
    pub data_dir: PathBuf,
    /// Where `subnet.env` is written.
    pub subnet_file: PathBuf,
    /// Which of the store's networks to join; without it, the one without a name.
    pub networks: Option<NetworkChoice>,
    /// The network these options are for, if it has a name: see [`RunOptions::of_network`].
    pub network: Option<NetworkName>,
    /// Lease times.
    pub lease: LeaseOptions,
    /// The TUN device and the packet path.
    pub packet_path: PacketPathOptions,
    /// This node's part in segment routing.
    pub srv6: Srv6Options,
    /// Firewall rules.
    pub firewall: FirewallOptions,
    /// The unix socket `kersey status` asks.
    pub status_socket: PathBuf,
    /// The process around the node.
    pub process: ProcessOptions,
    /// Logging.
    pub log: LogOptions,
}

impl RunOptions {
    /// The same for one of several networks: it has files of its own, and a device.
    pub fn of_network(&self, name: &NetworkName, choice: &NetworkChoice, device: String) -> Self {
        Self {
            data_dir: NetworkChoice::data_dir(&self.data_dir, name),
            subnet_file: choice.subnet_file(name),
            networks: None,
            network: Some(name.clone()),
            serve: None,
            packet_path: PacketPathOptions {
                device,
                ..self.packet_path.clone()
            },
            ..self.clone()
        }
    }
}

/// Which of the store's networks to join.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkChoice {
    /// These, as far as they exist; all if absent.
    pub allowed: Option<BTreeSet<NetworkName>>,
    /// Directory of their subnet files.
    pub subnet_dir: PathBuf,
}

impl NetworkChoice {
    /// The directory of the networks' own directories, in that for state.
    pub const STATE: &str = "networks";

    /// Whether a network is to be joined.
    pub fn allows(&self, name: &NetworkName) -> bool {
        self.allowed.as_ref().is_none_or(|allowed| allowed.contains(name))
    }

    /// The subnet file of a network.
    pub fn subnet_file(&self, name: &NetworkName) -> PathBuf {
        self.subnet_dir.join(format!("{name}.env"))
    }

    /// The directory for the state of a network, in that of all.
    pub fn data_dir(all: &Path, name: &NetworkName) -> PathBuf {
        all.join(Self::STATE).join(name.as_str())
    }
}

/// What this node has of its own with backend `srv6`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Srv6Options {
    /// Its locator; if absent, the one that follows from its public address or its subnet.
    pub locator: Option<Ipv6Prefix>,
    /// Further SIDs and what they do.
    pub sids: Vec<NodeSid>,
    /// File with keys for HMAC TLVs.
    pub hmac_keys: Option<PathBuf>,
}

/// `kersey server`: a store served over HTTP, no overlay on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// The store served.
    pub store: StoreOptions,
    /// Where and how.
    pub serve: ServeOptions,
    /// How long a lease handed out lives without renewal.
    pub lease_ttl: Duration,
    /// What the process gives up.
    pub sandbox: SandboxChoice,
    /// Logging.
    pub log: LogOptions,
}

/// `kersey reserve`: subnets bound to nodes for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReserveOptions {
    /// The store they are in.
    pub store: StoreOptions,
    /// How long the lease lives that a removed reservation becomes.
    pub lease_ttl: Duration,
    /// The network meant; that without a name if absent.
    pub network: Option<NetworkName>,
    /// What to do.
    pub action: ReserveAction,
    /// How to print.
    pub form: StatusForm,
}

/// What `kersey reserve` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveAction {
    /// Lists reservations.
    List,
    /// Binds a subnet to the node with this public address.
    Add {
        /// The subnet.
        subnet: Subnet,
        /// The node's public address.
        public_ip: IpAddr,
    },
    /// Makes a reservation a lease that ends.
    Remove {
        /// The subnet.
        subnet: Subnet,
    },
}

/// `kersey status`: ask a running daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusOptions {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// How to print the answer.
    pub form: StatusForm,
}

/// `kersey cleanup`: remove what a dead daemon left on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CleanupOptions {
    /// The daemon's socket; nothing is removed while one answers.
    pub socket: PathBuf,
    /// The daemon's data directory.
    pub data_dir: PathBuf,
    /// Whether to remove or only to tell.
    pub mode: CleanupMode,
}

/// What `kersey cleanup` does with what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CleanupMode {
    /// Lists it.
    DryRun,
    /// Removes it.
    Remove,
}

/// How `kersey status` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusForm {
    /// A table for people.
    Table,
    /// The document as it came.
    Json,
}

/// A store, and how patient to be with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreOptions {
    /// Which store.
    pub kind: StoreKind,
    /// The longest pause between two attempts to reach it.
    pub backoff_cap: Duration,
}

/// Which store holds config and leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// An etcd cluster, with flannel's keys.
    Etcd(EtcdOptions),
    /// A database file of this process.
    Embedded(EmbeddedOptions),
    /// Kersey (or old flannel) servers over HTTP.
    Remote(RemoteOptions),
}

impl StoreKind {
    /// The files that this and the options of a server name.
    pub fn files(&self, serve: Option<&ServeOptions>) -> Vec<PathBuf> {
        let mut files = Vec::new();
        match self {
            Self::Etcd(etcd) => {
                files.extend(etcd.ca_file.clone());
                if let Some(cert) = &etcd.client_cert {
                    files.extend([cert.cert_file.clone(), cert.key_file.clone()]);
                }
            }
            Self::Embedded(embedded) => {
                for source in embedded.network_configs.iter().map(|(_, source)| source) {
                    if let NetworkConfigSource::File(file) = source {
                        files.push(file.clone());
                    }
                }
            }
            Self::Remote(remote) => {
                let tls = remote.tls.iter();
                files.extend(tls.clone().filter_map(|tls| tls.ca.clone()));
                files.extend(
                    tls.flat_map(|tls| &tls.pair)
                        .flat_map(|pair| [pair.cert.clone(), pair.key.clone()]),
                );
                files.extend(remote.token_file.clone());
            }
        }
        if let Some(serve) = serve {
            if let Some((pair, ca)) = &serve.tls {
                files.extend([pair.cert.clone(), pair.key.clone()]);
                files.extend(ca.clone());
            }
            files.extend(serve.access_file.clone());
        }
        files
    }
}

/// Access to etcd.
#[derive(Clone, PartialEq, Eq)]
pub struct EtcdOptions {
    /// Endpoint URLs.
    pub endpoints: Vec<String>,
    /// Key prefix, as given.
    pub prefix: String,
    /// Root certificates; the system's if absent.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and its key; one without the other is refused.
    pub client_cert: Option<ClientCert>,
    /// User and password; one without the other is refused.
    pub login: Option<Login>,
}

/// A client certificate on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCert {
    /// PEM certificate.
    pub cert_file: PathBuf,
    /// PEM private key.
    pub key_file: PathBuf,
}

/// A user and a password. `Debug` hides the password, so that no log line can show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// User name.
    pub user: String,
    /// Password.
    pub password: String,
}

/// The store inside this process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedOptions {
    /// Directory of the database.
    pub data_dir: PathBuf,
    /// Configs put into a database that has none of the network; the network without a name is `None`.
    pub network_configs: Vec<(Option<NetworkName>, NetworkConfigSource)>,
}

/// Where an initial network config comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkConfigSource {
    /// JSON text from the command line.
    Inline(String),
    /// A file, flannel's `net-conf.json`.
    File(PathBuf),
}

/// Which underlay interface and addresses to use; flannel's rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceOptions {
    /// Names or addresses, tried in order.
    pub iface: Vec<String>,
    /// Patterns on address, then name, after all of `iface`.
    pub iface_regex: Vec<String>,
    /// Choose by the route to this address, after the two above.
    pub can_reach: Option<IpAddr>,
    /// Address told to peers.
    pub public_ip: Option<Ipv4Addr>,
    /// IPv6 address told to peers.
    pub public_ipv6: Option<Ipv6Addr>,
}

/// Lease times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseOptions {
    /// How long a lease lives without renewal.
    pub ttl: Duration,
    /// How long before its end it is renewed; shorter than `ttl`.
    pub renew_margin: Duration,
}

/// The TUN device and the packet path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketPathOptions {
    /// Name of the TUN device.
    pub device: String,
    /// How inbound packets are checked.
    pub ingress_check: IngressCheck,
    /// TCP segmentation offload on the TUN device.
    pub tun_tso: Offload,
    /// UDP segmentation offload on the TUN device.
    pub tun_uso: Offload,
    /// Segmentation offload on the UDP socket.
    pub udp_gso: Offload,
    /// Receive coalescing on the UDP socket.
    pub udp_gro: Offload,
    /// What to do about checksums of inner packets.
    pub inner_checksums: InnerChecksums,
    /// Queues, each with its own worker; chosen by core count if absent.
    pub queues: Option<NonZeroUsize>,
    /// How workers are laid out on threads.
    pub threads: ThreadLayout,
    /// How long a worker looks for more after a request or response before it sleeps; zero is not at all.
    pub busy_poll: Duration,
    /// What becomes of outer datagrams larger than their path.
    pub outer_df: OuterDf,
    /// Whether TCP connections are made to announce segments that fit the overlay.
    pub clamp_mss: bool,
    /// UDP source ports outbound flows are spread over; the backend's choice if absent.
    pub source_ports: Option<NonZeroU16>,
    /// How SRv6 packets come and go.
    pub srv6_io: Srv6Io,
    /// How they leave, where they come by raw sockets.
    pub srv6_send: Srv6Send,
}

/// How SRv6 packets come and go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Srv6Io {
    /// By raw sockets, or where they are refused by a TUN device.
    #[default]
    Auto,
    /// By raw sockets.
    Raw,
    /// By a TUN device the locators are routed to; the kernel forwards.
    Tun,
}

/// How SRv6 packets leave, where they come by raw sockets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Srv6Send {
    /// As is best for most: by raw sockets.
    #[default]
    Auto,
    /// By raw sockets.
    Raw,
    /// By a packet socket where link and neighbour are known, past the kernel's routing and its OUTPUT rules.
    Packet,
}

/// How inbound packets are checked against the leases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum IngressCheck {
    /// The outer source must be the peer whose subnet the inner source lies in.
    #[default]
    Strict,
    /// The inner source must lie in some peer's subnet, wherever the packet comes from.
    Loose,
    /// No check, as flannel.
    Off,
}

/// Whether an offload may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Offload {
    /// Use it where the kernel has it.
    #[default]
    Auto,
    /// Do without.
    Off,
}

/// "Don't fragment" of the outer IPv4 header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OuterDf {
    /// As the backend's other implementations do: udp sets it while the datagram fits, vxlan leaves it clear.
    #[default]
    Auto,
    /// Set: nothing is fragmented, and what does not fit is refused and its sender told.
    Set,
    /// Clear: any router may fragment.
    Clear,
}

/// What to do about checksums of inner packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InnerChecksums {
    /// Merge packets whose outer checksum the kernel has verified without summing them again.
    #[default]
    Trust,
    /// Sum every packet before it is merged; one with a wrong checksum goes on alone, and the receiving stack drops it.
    Verify,
}

/// How the two directions of a queue are laid out on threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ThreadLayout {
    /// By core count.
    #[default]
    Auto,
    /// One thread serves both directions.
    Joined,
    /// A thread each.
    Split,
}

/// Logging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// Line format.
    pub format: LogFormat,
    /// The most detailed level shown.
    pub level: LogLevel,
}

/// Log line format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Log level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum LogLevel {
    /// We stop.
    Error,
    /// Someone should look.
    Warn,
    /// What an operator would notice.
    #[default]
    Info,
    /// How decisions came about.
    Debug,
    /// Single packets.
    Trace,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("ca_file", &self.ca_file)
            .field("client_cert", &self.client_cert)
            .field("login", &self.login)
            .finish()
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_never_reaches_a_log_line() {
        let login = Login {
            user: "root".into(),
            password: "hunter2".into(),
        };
        assert!(!format!("{login:?}").contains("hunter2"));
    }
}
