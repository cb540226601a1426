//! `kersey lab`: a cluster in namespaces on this machine, tried out and taken down again.

mod standing;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::addr::Mtu;
use crate::cli::UsageError;
use crate::cli::progress::{Progress, grouped, table};
use crate::cli::tell::{say, say_aside};
use crate::lab::cluster::{Cluster, ClusterPlan, Peer, StoreKind, folder_prefix};
use crate::lab::interrupt;
use crate::lab::netns::Namespace;
use crate::lab::seg6_node;
use crate::lab::topology::{MOST_NODES, Node, Plan, Topology};
use crate::lab::traffic::latency::{self, LatencyReport};
use crate::lab::traffic::ping::Ping;
use crate::lab::traffic::tcp::{Bulk, BulkReport, Verified, VerifiedReport};
use crate::lab::traffic::udp::{Flood, FloodReport};
use crate::status::Status;

/// Try kersey out: nodes in network namespaces, a store, a daemon each, and traffic between them.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct LabOptions {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    shape: Shape,
    /// Seconds each measurement takes
    #[arg(long, default_value_t = 2.0, value_name = "S")]
    duration: f64,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
    /// Leave logs and files of the daemons in place, and say where
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start a lab that stays, for exploring
    Up(Shape),
    /// Run a command on a node of the lab that stays: 1, 2, …, or hub
    Exec {
        /// The node
        node: String,
        /// The command and its arguments
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Show the nodes of the lab that stays
    Status,
    /// Take down the lab that stays, and what killed labs left behind
    Down,
}

/// What a lab is made of.
#[derive(Clone, Debug, Args)]
pub(crate) struct Shape {
    /// How many nodes
    #[arg(long, default_value_t = 2, value_name = "N")]
    nodes: usize,
    /// Where leases are kept: by node 1 itself, or in an etcd of the lab's own
    #[arg(long, value_enum, default_value_t = StoreKind::Embedded)]
    store: StoreKind,
    /// How packets are carried, as in the network configuration's Backend.Type
    #[arg(long, default_value = "udp", value_name = "TYPE", value_parser = BACKENDS)]
    backend: String,
    /// What the last node is; the others are kersey's
    #[arg(long, value_enum, default_value_t = Peer::Kersey)]
    peer: Peer,
    /// Send packets between nodes 1 and 2 through a segment of the last node (with srv6)
    #[arg(long)]
    waypoint: bool,
    /// Give every node an IPv6 subnet too
    #[arg(long)]
    dual_stack: bool,
    /// MTU of the underlay, bytes
    #[arg(long, default_value_t = 1500, value_name = "M")]
    mtu: u16,
    /// A further argument for every daemon; may be repeated
    #[arg(long = "daemon-arg", value_name = "ARG", allow_hyphen_values = true)]
    daemon_args: Vec<String>,
    /// Another kersey to run on the nodes
    #[arg(long, value_name = "FILE", hide = true)]
    program: Option<PathBuf>,
}

/// The backends a lab can be made of.
const BACKENDS: [&str; 4] = ["udp", "vxlan", "host-gw", "srv6"];
/// A link that carries less carries no IPv6, RFC 8200 §5.
const LEAST_IPV6_MTU: u16 = 1280;
/// What the lab's own packets need, pings and datagrams of its measurements: RFC 791 has every host take as much.
const LEAST_MTU: u16 = 576;

impl LabOptions {
    /// Refuses what clap cannot tell to be wrong.
    pub(super) fn review(&self) -> Result<(), UsageError> {
        match &self.action {
            None => self.shape.review(),
            Some(Action::Up(shape)) => shape.review(),
            Some(Action::Exec { .. } | Action::Status | Action::Down) => Ok(()),
        }
    }
}

impl Shape {
    fn review(&self) -> Result<(), UsageError> {
        if !(2..=MOST_NODES).contains(&self.nodes) {
            return Err(UsageError::new(
                format!("--nodes {}: a lab has 2 to {MOST_NODES} nodes", self.nodes),
                "kersey lab --nodes 3",
            ));
        }
        if let Some(backend) = self.peer.backend()
            && self.backend != backend
        {
            let (flag, what) = match self.peer {
                Peer::Kersey => unreachable!("it is at home in every network"),
                Peer::KernelVxlan => ("kernel-vxlan", "VXLAN talks to nodes of a VXLAN"),
                Peer::KernelSeg6 => ("kernel-seg6", "SRv6 talks to nodes of an SRv6"),
            };
            return Err(UsageError::new(
                format!("--peer {flag} cannot be had with --backend {}", self.backend),
                format!("the kernel's {what} network: add --backend {backend}"),
            ));
        }
        if self.waypoint && (self.backend != "srv6" || self.nodes < 3) {
            return Err(UsageError::new(
                format!(
                    "--waypoint cannot be had with --backend {} and {} nodes",
                    self.backend, self.nodes
                ),
                "kersey lab --backend srv6 --nodes 3 --waypoint",
            ));
        }
        if self.mtu < LEAST_MTU {
            return Err(UsageError::new(
                format!("--mtu {}: the lab's own traffic needs larger packets", self.mtu),
                format!("expected {LEAST_MTU} bytes at least, what every IPv4 host takes"),
            ));
        }
        if self.backend == "srv6" && self.mtu < LEAST_IPV6_MTU {
            return Err(UsageError::new(
                format!("--mtu {}: srv6 needs IPv6 on the underlay", self.mtu),
                format!("IPv6 needs links of {LEAST_IPV6_MTU} bytes at least"),
            ));
        }
        Ok(())
    }

    /// The last node, if there is something special about it.
    fn special(&self) -> String {
        let is = match self.peer {
            Peer::Kersey => String::new(),
            kernel @ (Peer::KernelVxlan | Peer::KernelSeg6) => {
                format!(" · node {} is {}", self.nodes, kernel.name())
            }
        };
        let waypoint = if self.waypoint {
            format!(" · between nodes 1 and 2 through node {}", self.nodes)
        } else {
            String::new()
        };
        is + &waypoint
    }

    fn topology(&self, prefix: String) -> Result<Plan> {
        let mut plan = Plan::new(prefix, self.nodes);
        plan.mtu = Mtu::new(self.mtu.into())?;
        Ok(plan)
    }

    fn cluster(&self, folder: PathBuf, topology: &Topology) -> Result<ClusterPlan> {
        Ok(ClusterPlan {
            program: match &self.program {
                Some(program) => program.clone(),
                None => std::env::current_exe().context("cannot find our own program")?,
            },
            folder,
            store: self.store,
            network: self.network(topology)?,
            peer: self.peer,
            arguments: self.daemon_args.clone(),
        })
    }

    fn network(&self, topology: &Topology) -> Result<String> {
        let [one, two, .., last] = topology.nodes.as_slice() else {
            return Ok(ClusterPlan::network(&self.backend, self.dual_stack));
        };
        if !self.waypoint {
            return Ok(ClusterPlan::network(&self.backend, self.dual_stack));
        }
        let end = seg6_node::default_end_sid(last.v4)?;
        Ok(ClusterPlan::steered_network(
            &[one.v4, two.v4],
            end,
            self.dual_stack,
        ))
    }
}

/// Runs `kersey lab`.
///
/// # Errors
/// We are not root, or something did not start. Checks that fail are in the report and the exit code.
pub fn run(options: LabOptions) -> Result<ExitCode> {
    if let Some(Action::Exec { node, command }) = &options.action {
        return standing::exec(node, command);
    }
    ensure!(
        nix::unistd::Uid::effective().is_root(),
        "a lab needs root, to make network namespaces"
    );
    interrupt::catch()?;
    match &options.action {
        None => once(&options),
        Some(Action::Up(shape)) => standing::up(shape),
        Some(Action::Status) => standing::status(),
        Some(Action::Down) => standing::down(),
        Some(Action::Exec { .. }) => unreachable!("handled above"),
    }
}

/// What a lab found out.
#[derive(Debug, Serialize)]
struct Report {
    passed: bool,
    failures: Vec<String>,
    nodes: usize,
    store: StoreKind,
    backend: String,
    peer: Peer,
    /// Whether packets between nodes 1 and 2 go through the last one.
    waypoint: bool,
    /// The node traffic goes to, from node 1.
    far: usize,
    link_mtu: u16,
    inner_mtu: u16,
    pings: Vec<PairPing>,
    /// There and back.
    transfers: [VerifiedReport; 2],
    tcp: Vec<BulkReport>,
    /// One stream from the far node to node 1, if that is another kind of node.
    tcp_back: Option<BulkReport>,
    udp: Vec<(usize, FloodReport)>,
    latency: LatencyReport,
    status: Vec<Status>,
}

#[derive(Debug, Serialize)]
struct PairPing {
    from: String,
    to: String,
    sent: u16,
    received: u16,
    mean_ms: f64,
}

fn once(options: &LabOptions) -> Result<ExitCode> {
    let shape = &options.shape;
    say_aside!(
        "kersey lab · {} nodes · {} backend · {} store · underlay MTU {}{}\n",
        shape.nodes,
        shape.backend,
        shape.store.name(),
        shape.mtu,
        shape.special()
    );
    let kept = if options.keep { standing::KEPT } else { "" };
    let mut folder = tempfile::Builder::new()
        .prefix(&format!("{}{kept}", folder_prefix(std::process::id())))
        .tempdir()
        .context("cannot make a folder")?;
    folder.disable_cleanup(options.keep);
    let progress = Progress::new();
    let plan = shape.topology(format!("kersey-{}", std::process::id()))?;
    let topology = progress.step("namespaces and links", || {
        let topology = plan.build()?;
        let names = topology.names().join(" ");
        Ok((topology, names))
    })?;
    let cluster_plan = shape.cluster(folder.path().to_owned(), &topology)?;
    let cluster = progress.step("store, daemons, leases, routes", || {
        let cluster = cluster_plan.start(&topology)?;
        let subnets = cluster.subnets().join("  ");
        Ok((cluster, subnets))
    })?;
    let report =
        measure(options, &progress, &topology, &cluster).map_err(|error| with_logs(&error, &cluster))?;
    progress.step("everything taken down", || {
        cluster.stop()?;
        drop(topology);
        let left = Namespace::names(&format!("{}-", plan.prefix))?;
        ensure!(left.is_empty(), "left behind: {}", left.join(" "));
        Ok(((), "nothing left behind".to_owned()))
    })?;

    if options.json {
        say!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        say_aside!("");
        say!("{}", report.text().trim_end());
    }
    if options.keep {
        say_aside!("\nlogs and files of the daemons: {}", folder.path().display());
    }
    Ok(if report.passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What the daemons wrote last is the best hint there is; not so if the user ended it all.
fn with_logs(error: &anyhow::Error, cluster: &Cluster) -> anyhow::Error {
    if interrupt::raised() {
        return anyhow::anyhow!("interrupted");
    }
    let logs: Vec<_> = cluster
        .daemons
        .iter()
        .map(|daemon| daemon.child.log_end())
        .collect();
    anyhow::anyhow!("{error:#}\n{}", logs.join("\n"))
}

fn measure(
    options: &LabOptions,
    progress: &Progress,
    topology: &Topology,
    cluster: &Cluster,
) -> Result<Report> {
    /// Enough for every window and buffer on the way to fill many times.
    const TRANSFER: u64 = 64 << 20;
    let duration = Duration::try_from_secs_f64(options.duration).context("--duration")?;
    // A special node is what one wants to see; else all are alike. A waypoint is seen between the first two.
    let far = match options.shape.peer {
        Peer::Kersey => 2,
        Peer::KernelVxlan | Peer::KernelSeg6 if options.shape.waypoint => 2,
        Peer::KernelVxlan | Peer::KernelSeg6 => topology.nodes.len(),
    };
    let (one, two) = (cluster.pod(topology, 1)?, cluster.pod(topology, far)?);
    let mut failures = Vec::new();

    let pings = progress.check("ping, every pair", || {
        let pings = ping_all(topology, cluster)?;
        let silent: Vec<_> = pings
            .iter()
            .filter(|ping| ping.received < ping.sent)
            .map(|ping| format!("{} does not hear all from {}", ping.from, ping.to))
            .collect();
        failures.extend(silent.iter().cloned());
        let outcome = if silent.is_empty() {
            Ok(format!("{} of {} answered", pings.len(), pings.len()))
        } else {
            Err(silent.join("; "))
        };
        Ok((pings, outcome))
    })?;
    let waypoint = topology.nodes.last().filter(|_| options.shape.waypoint);
    let passed_before = waypoint.map(Node::received_bytes).transpose()?;
    let mut transfer = |name, from, to| {
        progress.check(name, || {
            let transfer = Verified {
                bytes: TRANSFER,
                seed: rand::random(),
                patience: Duration::from_secs(5),
            };
            let report = transfer.run(from, to)?;
            let outcome = if report.intact {
                Ok(format!("SHA-256 {}… at both ends", &report.sha256[..12]))
            } else {
                failures.push(format!("{name}: it did not arrive as it was sent"));
                Err(format!("SHA-256 differs after {} bytes", report.bytes))
            };
            Ok((report, outcome))
        })
    };
    let transfers = [
        transfer("64 MiB, every byte checked", one, two)?,
        transfer("64 MiB back", two, one)?,
    ];
    if let (Some(waypoint), Some(before)) = (waypoint, passed_before) {
        progress.check("both by way of the waypoint", || {
            let passed = waypoint.received_bytes()? - before;
            let outcome = format!("{} MiB passed it", passed >> 20);
            if passed >= 2 * TRANSFER {
                return Ok(((), Ok(outcome)));
            }
            failures.push(format!("waypoint: only {outcome}"));
            Ok(((), Err(outcome)))
        })?;
    }
    let mut tcp = Vec::new();
    for streams in [1, 4] {
        let name = tcp_name(streams);
        let report = progress.check(&name, || {
            let bulk = Bulk {
                streams,
                warmup: Duration::from_millis(300),
                duration,
                congestion: None,
            };
            let report = bulk.run(one, two)?;
            if report.stream_bytes.contains(&0) {
                let outcome = "a stream stood still".to_owned();
                failures.push(format!("{name}: {outcome}"));
                return Ok((report, Err(outcome)));
            }
            let outcome = format!("{:.2} Gbit/s", report.gbit_per_s);
            Ok((report, Ok(outcome)))
        })?;
        tcp.push(report);
    }
    let tcp_back = match cluster.peer(far) {
        Peer::Kersey => None,
        Peer::KernelVxlan | Peer::KernelSeg6 => Some(progress.step(TCP_BACK, || {
            let bulk = Bulk {
                streams: 1,
                warmup: Duration::from_millis(300),
                duration,
                congestion: None,
            };
            let report = bulk.run(two, one)?;
            let outcome = format!("{:.2} Gbit/s", report.gbit_per_s);
            Ok((report, outcome))
        })?),
    };
    let mut udp = Vec::new();
    for payload_bytes in [1400, 64] {
        let name = udp_name(payload_bytes);
        let report = progress.check(&name, || {
            let flood = Flood {
                payload_bytes,
                rate: None,
                duration,
            };
            let report = flood.run(one, two)?;
            let counts = &report.counts;
            if counts.received == 0 || counts.corrupted > 0 {
                let outcome = format!("{} received, {} corrupted", counts.received, counts.corrupted);
                failures.push(format!("{name}: {outcome}"));
                return Ok((report, Err(outcome)));
            }
            let outcome = format!("{} packets/s", grouped(report.received_per_s as u64));
            Ok((report, Ok(outcome)))
        })?;
        udp.push((payload_bytes, report));
    }
    let latency = progress.step("request and response, UDP 64 B", || {
        let report = latency::measure(one, two, duration.min(Duration::from_secs(2)))?;
        let outcome = format!("p50 {:.0} µs", report.p50_us);
        Ok((report, outcome))
    })?;
    let status = now(cluster);
    Ok(Report {
        passed: failures.is_empty(),
        failures,
        nodes: topology.nodes.len(),
        store: options.shape.store,
        backend: options.shape.backend.clone(),
        peer: options.shape.peer,
        waypoint: options.shape.waypoint,
        far,
        link_mtu: options.shape.mtu,
        inner_mtu: status.first().map_or(0, |status| status.node.inner_mtu),
        pings,
        transfers,
        tcp,
        tcp_back,
        udp,
        latency,
        status,
    })
}

fn ping_all(topology: &Topology, cluster: &Cluster) -> Result<Vec<PairPing>> {
    let mut pings = Vec::new();
    for from_nth in 1..=topology.nodes.len() {
        for to_nth in (1..=topology.nodes.len()).filter(|&nth| nth != from_nth) {
            for from in cluster.pods(topology, from_nth)? {
                for to in cluster.pods(topology, to_nth)? {
                    if from.addr.is_ipv4() == to.addr.is_ipv4() {
                        let report = Ping::default().run(from, to.addr)?;
                        pings.push(PairPing {
                            from: from.addr.to_string(),
                            to: to.addr.to_string(),
                            sent: report.sent,
                            received: report.received,
                            mean_ms: report.mean_ms,
                        });
                    }
                }
            }
        }
    }
    Ok(pings)
}

/// The daemons' status as it is, or as it last was where a daemon does not answer.
fn now(cluster: &Cluster) -> Vec<Status> {
    let daemons = cluster.daemons.iter();
    let ask = |socket: &PathBuf| crate::lab::daemon::status(socket).ok().flatten();
    daemons
        .map(|daemon| ask(&daemon.socket).unwrap_or_else(|| daemon.status.clone()))
        .collect()
}

const TCP_BACK: &str = "TCP, 1 stream back";

fn tcp_name(streams: usize) -> String {
    format!("TCP, {streams} stream{}", if streams == 1 { "" } else { "s" })
}

fn udp_name(payload_bytes: usize) -> String {
    format!("UDP flood, {payload_bytes} B")
}

impl Report {
    fn text(&self) -> String {
        let none = || "–".to_owned();
        let mut rows = Vec::new();
        let there = [1, 4].map(tcp_name).into_iter().zip(&self.tcp);
        let back = self.tcp_back.iter().map(|report| (TCP_BACK.to_owned(), report));
        for (name, report) in there.chain(back) {
            rows.push([
                name,
                format!("{:.2} Gbit/s", report.gbit_per_s),
                none(),
                format!("{} resent", report.retransmits),
                report
                    .cpu_s_per_gb
                    .map_or_else(none, |seconds| format!("{seconds:.2} s/GB")),
            ]);
        }
        for (payload_bytes, report) in &self.udp {
            rows.push([
                udp_name(*payload_bytes),
                format!("{:.2} Gbit/s", report.gbit_per_s),
                grouped(report.received_per_s as u64),
                format!("{:.1} % lost", report.lost_percent),
                report
                    .cpu_us_per_packet
                    .map_or_else(none, |us| format!("{us:.1} µs/packet")),
            ]);
        }
        let route = match self.peer {
            _ if self.waypoint => format!("node 1 → node {} → node {}", self.nodes, self.far),
            Peer::Kersey => format!("node 1 → node {}", self.far),
            kernel @ (Peer::KernelVxlan | Peer::KernelSeg6) => {
                format!("node 1, kersey → node {}, {}", self.far, kernel.name())
            }
        };
        let mut text = table([&route, "throughput", "packets/s", "loss", "CPU"], &rows);
        let rtt = &self.latency;
        text += &format!(
            "\n  round trip    p50 {:.0} µs · p99 {:.0} µs · p99.9 {:.0} µs · {} of {} lost\n",
            rtt.p50_us,
            rtt.p99_us,
            rtt.p999_us,
            rtt.lost,
            grouped(rtt.answered + rtt.lost)
        );
        text += &format!(
            "  integrity     64 MiB each way, SHA-256 {}\n",
            if self.transfers.iter().all(|transfer| transfer.intact) {
                "ok"
            } else {
                "WRONG"
            }
        );
        text += &format!(
            "  MTU           {} outside, {} inside\n",
            self.link_mtu, self.inner_mtu
        );
        text += &format!("  offloads      {}\n", self.offloads());
        text += &format!("  drops         {}\n", self.drops());
        text += &match self.failures.as_slice() {
            [] => "\n  All checks passed.\n".to_owned(),
            failures => format!("\n  FAILED: {}\n", failures.join("\n          ")),
        };
        text
    }

    fn offloads(&self) -> String {
        let first = self.status.first().map(|status| &status.device.offloads);
        let words: Vec<_> = first
            .into_iter()
            .flatten()
            .map(|(name, state)| format!("{} {state}", name.replace('_', "-")))
            .collect();
        if words.is_empty() {
            "none reported".to_owned()
        } else {
            words.join(" · ")
        }
    }

    fn drops(&self) -> String {
        let mut words = Vec::new();
        for (nth, status) in (1..).zip(&self.status) {
            for (reason, count) in status.drops.iter().filter(|(_, count)| **count > 0) {
                words.push(format!(
                    "node {nth}: {} {}",
                    grouped(*count),
                    reason.replace('_', " ")
                ));
            }
        }
        if words.is_empty() {
            "none by kersey; a flood overruns the kernel's queues".to_owned()
        } else {
            words.join(" · ")
        }
    }
}
