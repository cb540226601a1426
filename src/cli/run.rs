//! The flags of `kersey run`: flannel's, under flannel's names, and Kersey's own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::{NonZeroU16, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use super::UsageError;
use super::firewall::FirewallArgs;
use super::go_flags::parse_bool;
use super::http::{AskingArgs, CertificateArgs, Listen, ServingArgs, listen_list};
use super::logging::LogArgs;
use super::process::ProcessArgs;
use super::store::{EtcdArgs, OWN_STORE, OwnStoreArgs, Serving, int_within, seconds, servers, store_options};
use crate::addr::{Ipv6Prefix, NetworkName, NetworkNameError};
use crate::control::peers::is_unicast;
use crate::options::{
    IngressCheck, InnerChecksums, InterfaceOptions, LeaseOptions, NetworkChoice, NodeSid, Offload, OuterDf,
    PacketPathOptions, RemoteOptions, RunOptions, ServeOptions, ServerAddress, ServerOptions, Srv6Io,
    Srv6Options, Srv6Send, StoreKind, ThreadLayout,
};

/// Run the daemon: hold a lease, carry the overlay's packets (flanneld's job)
///
/// Flags are flannel's where flannel has one, in Go's syntax: one dash or two, `-x=v` or `-x v`, booleans as
/// `-x=false`. Each can be set by a variable as well: KERSEY_X or FLANNELD_X, upper case, `-` as `_`. The command line
/// wins over KERSEY_X, that over FLANNELD_X, and that over the file of --config, which has flags' names as keys.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct RunArgs {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
    #[command(flatten)]
    own: OwnStoreArgs,
    #[command(flatten)]
    share: ShareArgs,
    #[command(flatten)]
    networks: NetworksArgs,
    #[command(flatten)]
    packet_path: PacketPathArgs,
    #[command(flatten)]
    srv6: Srv6Args,
    #[command(flatten)]
    firewall: FirewallArgs,
    #[command(flatten)]
    process: ProcessArgs,
    #[command(flatten)]
    log: LogArgs,
    #[command(flatten)]
    other: OtherArgs,
    #[command(flatten)]
    unserved: UnservedArgs,
}

const AFTER_HELP: &str = "\
Flannel's remaining flags, of all versions, are known by name. Those that ask for something Kersey does not do \
(--kube-subnet-mgr and more) are refused with a sentence that says what to do \
instead; those that do not matter here (--logtostderr, --kube-api-url and more) are accepted.

Exit status: 0 stopped on request; 1 failed; 2 the command line, a variable or the config file is wrong; 3 this machine \
lacks something; 4 the network config cannot be run; 7 another daemon runs.";

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Node (flannel's flags)")]
struct NodeArgs {
    /// Underlay interface, by name or address; repeat to give several to try in order
    #[arg(long, value_name = "NAME|IP")]
    iface: Vec<String>,
    /// Underlay interface whose address or name matches; tried after all --iface
    #[arg(long, value_name = "REGEX", value_parser = pattern)]
    iface_regex: Vec<String>,
    /// Underlay interface that leads to this address; tried last
    #[arg(long, value_name = "IP", value_parser = any_ip)]
    iface_can_reach: Option<IpAddr>,
    /// Address told to other nodes [default: the interface's]
    #[arg(long, value_name = "IPV4", value_parser = ipv4)]
    public_ip: Option<Ipv4Addr>,
    /// IPv6 address told to other nodes [default: the interface's]
    #[arg(long, value_name = "IPV6", value_parser = ipv6)]
    public_ipv6: Option<Ipv6Addr>,
    /// File that tells Docker and CNI of the subnet
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    subnet_file: PathBuf,
    /// Renew the lease this long before its end
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = margin_minutes)]
    subnet_lease_renew_margin: Duration,
    /// Like --subnet-lease-renew-margin, in seconds, for tests; it wins
    #[arg(long, value_name = "SECONDS", value_parser = margin_seconds, help_heading = OWN_STORE)]
    lease_renew_margin: Option<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = OWN_STORE)]
struct ShareArgs {
    /// Get config and leases from these servers, comma-separated, the first that answers: HOST:PORT, https://HOST:PORT,
    /// unix:///PATH
    #[arg(long, value_name = "HOST:PORT,...", value_parser = servers_list)]
    remote: Option<Servers>,
    /// Serve this node's store to others, as `kersey server` does; an embedded store unless --etcd-endpoints is given.
    /// HOST:PORT, unix:///PATH or fd://, comma-separated
    #[arg(long, value_name = "HOST:PORT,...", value_parser = listen_list)]
    listen: Option<Listen>,
    #[command(flatten)]
    certificates: CertificateArgs,
    #[command(flatten)]
    asking: AskingArgs,
    #[command(flatten)]
    serving: ServingArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Other")]
struct OtherArgs {
    /// Unix socket that `kersey status` asks
    #[arg(long, value_name = "PATH", default_value = super::status::DEFAULT_SOCKET)]
    status_socket: PathBuf,
    /// Print the version and exit
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = parse_bool, hide_possible_values = true)]
    version: Option<bool>,
}

/// Several networks, as flannel 0.5 to 0.7 had them.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Several networks (flannel's flags)")]
struct NetworksArgs {
    /// Join these networks under the prefix, comma-separated, as they come and go; not the one without a name
    #[arg(long, value_name = "NAME,...", value_parser = network_names)]
    networks: Option<NetworkNames>,
    /// Join all networks under the prefix that have a name, present and future; with --networks, of those only
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    watch_networks: bool,
    /// Directory for the subnet files of several networks, NAME.env each
    #[arg(long, value_name = "DIR", default_value = "/run/flannel/networks")]
    subnet_dir: PathBuf,
}

/// A list that is one flag's one value.
#[derive(Clone, Debug)]
struct NetworkNames(BTreeSet<NetworkName>);

impl NetworksArgs {
    fn choice(self) -> Option<NetworkChoice> {
        let allowed = self
            .networks
            .map(|names| names.0)
            .filter(|names| !names.is_empty());
        (allowed.is_some() || self.watch_networks).then_some(NetworkChoice {
            allowed,
            subnet_dir: self.subnet_dir,
        })
    }
}

/// A list that is one flag's one value.
#[derive(Clone, Debug)]
struct Servers(Vec<ServerAddress>);

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Packet path")]
struct PacketPathArgs {
    /// Name of the TUN device
    #[arg(long, value_name = "NAME", default_value = "flannel0", value_parser = device_name)]
    device: String,
    /// Which inbound packets to take: from the peer that owns the inner source, from any peer, or all
    #[arg(long, value_name = "CHECK", value_enum, default_value = "strict")]
    ingress_check: IngressCheck,
    /// TCP segmentation offload on the TUN device
    #[arg(
        long,
        value_name = "AUTO|OFF",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    tun_tso: Offload,
    /// UDP segmentation offload on the TUN device
    #[arg(
        long,
        value_name = "AUTO|OFF",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    tun_uso: Offload,
    /// Segmentation offload on the UDP socket
    #[arg(
        long,
        value_name = "AUTO|OFF",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    udp_gso: Offload,
    /// Receive coalescing on the UDP socket
    #[arg(
        long,
        value_name = "AUTO|OFF",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    udp_gro: Offload,
    /// Verify checksums of inbound inner packets
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    verify_inner: bool,
    /// Queues, each with its own worker [default: by core count]
    #[arg(long, value_name = "N", value_parser = queues)]
    queues: Option<NonZeroUsize>,
    /// One thread for both directions of a queue, or one for each
    #[arg(long, value_name = "LAYOUT", value_enum, default_value = "auto")]
    threads: ThreadLayout,
    /// How long a worker looks for more after a request or response before it sleeps; 0 is not at all
    #[arg(long, value_name = "MICROSECONDS", default_value = "50", value_parser = clap::value_parser!(u16).range(..=1000))]
    busy_poll: u16,
    /// "Don't fragment" of the outer IPv4 header [default: as flannel's backend of that name]
    #[arg(
        long,
        value_name = "AUTO|SET|CLEAR",
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        hide_default_value = true
    )]
    outer_df: OuterDf,
    /// Make TCP connections announce segments that fit the overlay
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    clamp_mss: bool,
    /// UDP source ports to spread outbound flows over [default: the backend's choice]
    #[arg(long, value_name = "N", value_parser = source_ports)]
    source_ports: Option<NonZeroU16>,
}

/// What a node has of its own with backend `srv6`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Segment routing (backend srv6)")]
struct Srv6Args {
    /// This node's locator [default: by its public IPv4 address or its subnet]
    #[arg(long, value_name = "PREFIX")]
    srv6_locator: Option<Ipv6Prefix>,
    /// A further SID of this node, and what it does: `SID[/LEN]=BEHAVIOR[,NEXT-HOP]`; may be repeated
    #[arg(long, value_name = "SID=BEHAVIOR")]
    srv6_sid: Vec<NodeSid>,
    /// File with keys for HMAC TLVs, a line each: `NUMBER sha256|sha1 SECRET`
    #[arg(long, value_name = "FILE")]
    srv6_hmac_keys: Option<PathBuf>,
    /// How packets come and go: by raw sockets, or by a TUN device and the kernel's forwarding where those are refused
    #[arg(
        long,
        value_name = "AUTO|RAW|TUN",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    srv6_io: Srv6Io,
    /// How packets leave: by raw sockets, or past the kernel's routing and OUTPUT rules by a packet socket, which costs less
    #[arg(
        long,
        value_name = "AUTO|RAW|PACKET",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    srv6_send: Srv6Send,
}

/// Defines flags as hidden optional texts, and lists those that were given.
macro_rules! hidden_flags {
    ($(#[$doc:meta])* $name:ident {
        booleans: $($boolean:ident)*; values: $($value:ident)*; underscored: $($underscored:ident)*
    }) => {
        $(#[$doc])*
        #[derive(Debug, clap::Args)]
        struct $name {
            $(#[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true",
                    value_parser = parse_bool)]
            $boolean: Option<bool>,)*
            $(#[arg(long, hide = true)]
            $value: Option<String>,)*
            $(#[arg(long = stringify!($underscored), hide = true)]
            $underscored: Option<String>,)*
        }

        impl $name {
            /// The flags given, with their values as text.
            fn given(&self) -> Vec<(String, String)> {
                let mut given = Vec::new();
                $(if let Some(value) = self.$boolean {
                    given.push((stringify!($boolean).replace('_', "-"), value.to_string()));
                })*
                $(if let Some(value) = &self.$value {
                    given.push((stringify!($value).replace('_', "-"), value.clone()));
                })*
                $(if let Some(value) = &self.$underscored {
                    given.push((stringify!($underscored).to_owned(), value.clone()));
                })*
                given
            }
        }
    };
}

hidden_flags! {
    /// Flannel's flags, of all versions, that Kersey does not act on.
    UnservedArgs {
        booleans: kube_subnet_mgr
            set_node_network_unavailable use_multi_cluster_cidr logtostderr alsologtostderr;
        values: kube_api_url kubeconfig_file kube_annotation_prefix net_config_path
            stderrthreshold vmodule;
        underscored: log_dir log_backtrace_at
    }
}

/// What to do about a flag that Kersey does not act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It changes nothing here.
    Accept,
    /// It changes nothing here, and the user should know why.
    Note(&'static str),
    /// It asks for something that is not done; the text says what to do.
    Refuse(&'static str),
}

const NO_KUBE: &str = "it matters only with --kube-subnet-mgr";

/// Judges a flag by its name and value. Values that ask for nothing (`false`, 0, empty) pass.
fn judge(flag: &str, value: &str) -> Verdict {
    let asks = !value.is_empty() && value != "false";
    match flag {
        "kube-subnet-mgr" if asks => Verdict::Refuse(
            "Kersey does not read Kubernetes nodes yet; use etcd, or --remote with a Kersey server",
        ),
        "use-multi-cluster-cidr" if asks => {
            Verdict::Refuse("this was an experiment that flannel dropped; drop the flag")
        }
        "kube-api-url"
        | "kubeconfig-file"
        | "kube-annotation-prefix"
        | "net-config-path"
        | "set-node-network-unavailable" => Verdict::Note(NO_KUBE),
        "log_dir" => Verdict::Note("log lines go to standard error only"),
        "vmodule" | "log_backtrace_at" => Verdict::Note("use --log-level"),
        _ => Verdict::Accept,
    }
}

/// Variables flannel reads that are no flags.
pub(super) const OTHER_VARIABLES: [&str; 2] = ["EVENT_QUEUE_DEPTH", "CONT_WHEN_CACHE_NOT_READY"];

impl RunArgs {
    /// Whether `--version` was given.
    pub(super) fn wants_version(&self) -> bool {
        self.other.version == Some(true)
    }

    /// Whether flannel 0.5 to 0.7 would have been a server, not a node.
    pub(super) fn wants_server(&self) -> bool {
        self.share.listen.is_some()
    }

    /// Refuses what Kersey does not do and notes what has no effect. `variables` names the variable that set a flag.
    pub(super) fn review(&self, variables: &BTreeMap<String, String>) -> Result<Vec<String>, UsageError> {
        let mut notes = Vec::new();
        let share = &self.share;
        if share.remote.is_none()
            && share.listen.is_none()
            && (share.certificates.are_given() || share.asking.are_given())
        {
            notes.push(
                "--remote-keyfile, --remote-certfile, --remote-cafile and --remote-token-file have no effect without \
                 --remote or --listen; files for etcd are --etcd-keyfile, --etcd-certfile and --etcd-cafile"
                    .to_owned(),
            );
        }
        for (flag, value) in self.unserved.given() {
            let shown = match variables.get(&flag) {
                Some(variable) => format!("{variable}={value}"),
                None => format!("--{flag}={value}"),
            };
            match judge(&flag, &value) {
                Verdict::Accept => {}
                Verdict::Note(why) => notes.push(format!("{shown} has no effect: {why}")),
                Verdict::Refuse(what_to_do) => {
                    return Err(UsageError::new(format!("{shown} is not supported"), what_to_do));
                }
            }
        }
        Ok(notes)
    }

    pub(super) fn into_options(self) -> Result<RunOptions, UsageError> {
        let (remote, serve) = self.share.into_options()?;
        let serving = if serve.is_some() {
            Serving::Yes
        } else {
            Serving::No
        };
        let lease = LeaseOptions {
            ttl: self.own.lease_ttl,
            renew_margin: self
                .node
                .lease_renew_margin
                .unwrap_or(self.node.subnet_lease_renew_margin),
        };
        if lease.renew_margin >= lease.ttl {
            return Err(UsageError::new(
                format!(
                    "a renewal {} s before the end of a lease of {} s is never due",
                    lease.renew_margin.as_secs(),
                    lease.ttl.as_secs()
                ),
                "set --lease-renew-margin below --lease-ttl",
            ));
        }
        let public = [
            ("--public-ip", self.node.public_ip.map(IpAddr::V4)),
            ("--public-ipv6", self.node.public_ipv6.map(IpAddr::V6)),
        ];
        for (flag, addr) in public {
            if let Some(addr) = addr.filter(|&addr| !is_unicast(addr)) {
                return Err(UsageError::new(
                    format!("{flag}={addr}: no other node can send to that address"),
                    "give the address at which other nodes reach this one",
                ));
            }
        }
        if self.srv6.srv6_send == Srv6Send::Packet && self.srv6.srv6_io == Srv6Io::Tun {
            return Err(UsageError::new(
                "--srv6-send=packet sends for raw sockets, and --srv6-io=tun does without them",
                "leave one of the two out",
            ));
        }
        let path = self.packet_path;
        Ok(RunOptions {
            data_dir: self.own.data_dir.clone(),
            store: store_options(self.etcd, &self.own, remote, serving)?,
            serve,
            interface: InterfaceOptions {
                iface: self
                    .node
                    .iface
                    .into_iter()
                    .filter(|name| !name.is_empty())
                    .collect(),
                iface_regex: self
                    .node
                    .iface_regex
                    .into_iter()
                    .filter(|regex| !regex.is_empty())
                    .collect(),
                can_reach: self.node.iface_can_reach,
                public_ip: self.node.public_ip,
                public_ipv6: self.node.public_ipv6,
            },
            subnet_file: self.node.subnet_file,
            networks: self.networks.choice(),
            network: None,
            lease,
            packet_path: PacketPathOptions {
                device: path.device,
                ingress_check: path.ingress_check,
                tun_tso: path.tun_tso,
                tun_uso: path.tun_uso,
                udp_gso: path.udp_gso,
                udp_gro: path.udp_gro,
                inner_checksums: if path.verify_inner {
                    InnerChecksums::Verify
                } else {
                    InnerChecksums::Trust
                },
                queues: path.queues,
                threads: path.threads,
                busy_poll: Duration::from_micros(path.busy_poll.into()),
                outer_df: path.outer_df,
                clamp_mss: path.clamp_mss,
                source_ports: path.source_ports,
                srv6_io: self.srv6.srv6_io,
                srv6_send: self.srv6.srv6_send,
            },
            srv6: Srv6Options {
                locator: self.srv6.srv6_locator,
                sids: self.srv6.srv6_sid,
                hmac_keys: self.srv6.srv6_hmac_keys,
            },
            firewall: self.firewall.options(),
            status_socket: self.other.status_socket,
            process: self.process.into_options(),
            log: self.log.options(),
        })
    }

    /// The server that flannel 0.5 to 0.7 is when given `-listen`: etcd's leases, no node.
    pub(super) fn into_flannel_server(mut self) -> Result<ServerOptions, UsageError> {
        self.etcd = self.etcd.with_default_endpoints();
        let options = self.into_options()?;
        let StoreKind::Etcd(_) = options.store.kind else {
            return Err(UsageError::new("a server needs etcd", "give --etcd-endpoints"));
        };
        let Some(serve) = options.serve else {
            return Err(UsageError::new(
                "a server needs an address",
                "give --listen HOST:PORT",
            ));
        };
        Ok(ServerOptions {
            store: options.store,
            serve,
            lease_ttl: options.lease.ttl,
            sandbox: options.process.sandbox,
            log: options.log,
        })
    }
}

impl ShareArgs {
    /// Which servers to ask, or how to serve.
    fn into_options(self) -> Result<(Option<RemoteOptions>, Option<ServeOptions>), UsageError> {
        let servers = self.remote.map(|servers| servers.0);
        match (servers, self.listen) {
            (Some(_), Some(_)) => Err(UsageError::new(
                "--listen and --remote exclude each other",
                "a server opens a store of its own; give --remote to the other nodes",
            )),
            (Some(servers), None) => {
                let remote = self.asking.into_options(servers, self.certificates)?;
                Ok((Some(remote), None))
            }
            (None, Some(listen)) => {
                let serve = self.serving.into_options(listen, self.certificates)?;
                Ok((None, Some(serve)))
            }
            (None, None) => Ok((None, None)),
        }
    }
}

fn servers_list(text: &str) -> Result<Servers, String> {
    servers(text).map(Servers)
}

fn network_names(text: &str) -> Result<NetworkNames, String> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    let names = names.map(|name| name.parse().map_err(|error: NetworkNameError| error.to_string()));
    names.collect::<Result<_, _>>().map(NetworkNames)
}

fn any_ip(text: &str) -> Result<IpAddr, String> {
    text.parse().map_err(|_| "expected an IP address".to_owned())
}

fn ipv4(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| "expected an IPv4 address".to_owned())
}

fn ipv6(text: &str) -> Result<Ipv6Addr, String> {
    text.parse().map_err(|_| "expected an IPv6 address".to_owned())
}

fn pattern(text: &str) -> Result<String, String> {
    regex::Regex::new(text)
        .map(|_| text.to_owned())
        .map_err(|error| format!("not a regular expression: {error}"))
}

fn margin_minutes(text: &str) -> Result<Duration, String> {
    // Flannel's own limits: at least a minute, less than the day a lease lives.
    seconds(text, 1..=1439).map(|minutes| minutes * 60)
}

fn margin_seconds(text: &str) -> Result<Duration, String> {
    seconds(text, 1..=365 * 86_400)
}

fn queues(text: &str) -> Result<NonZeroUsize, String> {
    // 256 is MAX_TAP_QUEUES, the most a TUN device can have.
    let value = int_within(text, 1..=256)?;
    usize::try_from(value)
        .ok()
        .and_then(NonZeroUsize::new)
        .ok_or_else(|| "expected at least 1".to_owned())
}

fn source_ports(text: &str) -> Result<NonZeroU16, String> {
    let value = int_within(text, 1..=1024)?;
    u16::try_from(value)
        .ok()
        .and_then(NonZeroU16::new)
        .ok_or_else(|| "expected at least 1".to_owned())
}

fn device_name(text: &str) -> Result<String, String> {
    // Linux: IFNAMSIZ is 16 with the final NUL; no slash, no white space, no colon, not "." or "..".
    let fits = (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text.contains(|c: char| c == '/' || c == ':' || c == '%' || c.is_whitespace() || c.is_control());
    if fits {
        Ok(text.to_owned())
    } else {
        Err(
            "expected an interface name: 1 to 15 characters, without space, slash, colon or percent sign"
                .to_owned(),
        )
    }
}
