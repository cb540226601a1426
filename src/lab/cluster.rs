//! Kersey on every node of a topology, with a store.
//!
//! ```text
//!   embedded:  node 1 keeps the leases and serves them on 192.0.2.1:8888; the others ask it
//!   etcd:      etcd runs in the hub on 192.0.2.254:2379; every node asks it
//! ```
//!
//! The last node may do without Kersey, with the kernel's VXLAN ([`Peer::KernelVxlan`]) or SRv6 ([`Peer::KernelSeg6`]).
//!
//! Each node then gets a *pod address*, the third of its subnet, on its loopback: traffic between pod addresses takes
//! the overlay as a container's would, whatever address the daemon gave its device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::control::config::NetworkConfig;
use crate::control::store::etcd::DEFAULT_PREFIX;
use crate::lab::daemon::{self, Child};
use crate::lab::interrupt;
use crate::lab::kernel_node::{KernelNode, KernelPlan, Underlay};
use crate::lab::netns::Namespace;
use crate::lab::seg6_node::{Form, Seg6Node, Seg6Plan};
use crate::lab::topology::{HUB_V4, INTERFACE, Node, Topology};
use crate::lab::traffic::End;
use crate::lease::Lease;
use crate::options::{self, EtcdOptions, RemoteOptions, Scheme, ServerAddress};
use crate::status::Status;

/// How long daemons have to know one another. A lease takes milliseconds; a retry after a refused connection a second.
const READY: Duration = Duration::from_secs(15);
/// Where the embedded store is served, on node 1.
const SERVER_PORT: u16 = 8888;
/// etcd's own default.
const ETCD_PORT: u16 = 2379;
/// Linux's VXLAN port, which flannel keeps.
pub const VXLAN_PORT: u16 = 8472;

/// Which store the leases are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreKind {
    /// Node 1 keeps them and serves the others.
    Embedded,
    /// An etcd of the lab's own.
    Etcd,
}

impl StoreKind {
    /// What it is called in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Etcd => "etcd",
        }
    }
}

/// What the last node of a cluster is; the others are always Kersey's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// A Kersey daemon like the others.
    #[default]
    Kersey,
    /// The kernel's VXLAN as flannel sets it up, without Kersey
    KernelVxlan,
    /// The kernel's SRv6, without Kersey
    KernelSeg6,
}

impl Peer {
    /// What it is called in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kersey => "kersey",
            Self::KernelVxlan => "kernel vxlan",
            Self::KernelSeg6 => "kernel seg6",
        }
    }

    /// The backend of networks such a node can be in, if not any.
    pub fn backend(self) -> Option<&'static str> {
        match self {
            Self::Kersey => None,
            Self::KernelVxlan => Some("vxlan"),
            Self::KernelSeg6 => Some("srv6"),
        }
    }
}

/// A node without Kersey, in place.
#[derive(Debug)]
pub enum Kernel {
    /// With the kernel's VXLAN.
    Vxlan(KernelNode),
    /// With the kernel's SRv6.
    Seg6(Seg6Node),
}

impl Kernel {
    /// What it is.
    pub fn peer(&self) -> Peer {
        match self {
            Self::Vxlan(_) => Peer::KernelVxlan,
            Self::Seg6(_) => Peer::KernelSeg6,
        }
    }

    /// Its lease, as it was last published.
    pub fn lease(&self) -> &Lease {
        match self {
            Self::Vxlan(node) => node.lease(),
            Self::Seg6(node) => node.lease(),
        }
    }

    /// Its subnets, one a family, in CIDR notation.
    pub fn subnets(&self) -> Vec<String> {
        match self {
            Self::Vxlan(node) => node.subnets(),
            Self::Seg6(node) => node.subnets(),
        }
    }

    /// Its pod addresses, one a family.
    pub fn pods(&self) -> &[IpAddr] {
        match self {
            Self::Vxlan(node) => node.pods(),
            Self::Seg6(node) => node.pods(),
        }
    }

    fn follow(&mut self, limit: Duration, peers: usize) -> Result<()> {
        match self {
            Self::Vxlan(node) => node.follow(limit, |known| known.len() >= peers),
            Self::Seg6(node) => node.follow(limit, |known| known.len() >= peers),
        }
    }

    fn keep(&mut self) {
        match self {
            Self::Vxlan(node) => node.keep(),
            Self::Seg6(node) => node.keep(),
        }
    }

    fn leave(self) -> Result<()> {
        match self {
            Self::Vxlan(node) => node.leave(),
            Self::Seg6(node) => node.leave(),
        }
    }
}

/// What to run on the nodes.
#[derive(Clone, Debug)]
pub struct ClusterPlan {
    /// The kersey binary.
    pub program: PathBuf,
    /// Where files of the daemons go; it must exist.
    pub folder: PathBuf,
    /// Where leases are kept.
    pub store: StoreKind,
    /// The network configuration, as flannel's JSON.
    pub network: String,
    /// What the last node is.
    pub peer: Peer,
    /// Further arguments for every daemon.
    pub arguments: Vec<String>,
}

/// A daemon and its node.
#[derive(Debug)]
pub struct Daemon {
    /// The process.
    pub child: Child,
    /// Its status socket.
    pub socket: PathBuf,
    /// Its status when it became ready.
    pub status: Status,
    /// The node's pod addresses, one a family.
    pub pods: Vec<IpAddr>,
}

/// Daemons that run, ended on drop: node 1 after the others, so that they can give back their leases.
#[derive(Debug)]
pub struct Cluster {
    /// One a node, in the order of the topology; the last node may have none.
    pub daemons: Vec<Daemon>,
    /// The last node, if it is the kernel's.
    pub kernel: Option<Kernel>,
    /// The store, if it is a process of its own.
    pub store: Option<Child>,
}

impl ClusterPlan {
    /// The JSON of a network with one /24 a node, or that and one /64 a node.
    pub fn network(backend: &str, dual_stack: bool) -> String {
        match backend {
            "vxlan" => Self::vxlan_network(1, VXLAN_PORT, dual_stack),
            other => network(serde_json::json!({ "Type": other }), dual_stack),
        }
    }

    /// The same with backend `srv6`, where packets to each of `nodes` go through a segment of another first.
    pub fn steered_network(nodes: &[Ipv4Addr], waypoint: Ipv6Addr, dual_stack: bool) -> String {
        let path = |node: &Ipv4Addr| serde_json::json!({ "To": node, "Via": [waypoint] });
        let paths: Vec<_> = nodes.iter().map(path).collect();
        network(serde_json::json!({ "Type": "srv6", "Paths": paths }), dual_stack)
    }

    /// The same with backend `vxlan`, under a VNI and a port of its own.
    pub fn vxlan_network(vni: u32, port: u16, dual_stack: bool) -> String {
        network(
            serde_json::json!({ "Type": "vxlan", "VNI": vni, "Port": port }),
            dual_stack,
        )
    }

    /// Starts store and daemons, and waits until every node knows every other.
    ///
    /// # Errors
    /// Something does not start or does not get ready in time; the error shows the end of its log.
    pub fn start(&self, topology: &Topology) -> Result<Cluster> {
        let mut cluster = Cluster {
            daemons: Vec::new(),
            kernel: None,
            store: None,
        };
        let (kersey, kernel) = match self.peer {
            Peer::Kersey => (topology.nodes.as_slice(), None),
            Peer::KernelVxlan | Peer::KernelSeg6 => match topology.nodes.split_last() {
                Some((last, others)) => (others, Some(last)),
                None => bail!("a cluster has nodes"),
            },
        };
        if self.store == StoreKind::Etcd {
            let hub = topology.hub.as_ref().context("etcd needs a hub to run in")?;
            cluster.store = Some(self.etcd(hub)?);
        }
        for (nth, node) in (1..).zip(kersey) {
            let socket = self.folder.join(format!("node-{nth}.sock"));
            let child = Child::start(
                &format!("node {nth}"),
                &node.namespace,
                self.command(nth, &socket),
                &self.folder.join(format!("node-{nth}.log")),
            )?;
            cluster.daemons.push(Daemon {
                child,
                socket,
                status: Status::default(),
                pods: Vec::new(),
            });
        }
        let deadline = Instant::now() + READY;
        if let Some(node) = kernel {
            // Node 1 may have to serve the store first.
            if let Some(first) = cluster.daemons.first_mut() {
                first.wait(deadline, 0)?;
            }
            cluster.kernel = Some(self.kernel(node)?);
        }
        let peers = topology.nodes.len() - 1;
        for (daemon, node) in cluster.daemons.iter_mut().zip(kersey) {
            daemon.wait(deadline, peers)?;
            daemon.pods = give_pod_addresses(&node.namespace, &daemon.status.node.subnets)?;
        }
        if let Some(kernel) = &mut cluster.kernel {
            let left = deadline.saturating_duration_since(Instant::now());
            kernel.follow(left, peers)?;
        }
        Ok(cluster)
    }

    /// The node without Kersey: with the families of the network, and from its own namespace's point of view.
    fn kernel(&self, node: &Node) -> Result<Kernel> {
        let network = NetworkConfig::parse(&self.network)?;
        let first = |port| ServerAddress::Tcp {
            scheme: Scheme::Http,
            host: first_node().to_string(),
            port,
        };
        let store = match self.store {
            StoreKind::Embedded => options::StoreKind::Remote(RemoteOptions::plain(vec![first(SERVER_PORT)])),
            StoreKind::Etcd => options::StoreKind::Etcd(EtcdOptions {
                endpoints: vec![etcd_place()],
                prefix: DEFAULT_PREFIX.to_owned(),
                ca_file: None,
                client_cert: None,
                login: None,
            }),
        };
        let interface = INTERFACE.to_owned();
        if self.peer == Peer::KernelSeg6 {
            let plan = Seg6Plan {
                store,
                interface,
                v4: node.v4,
                v6: node.v6,
                form: Form::Seg6,
                mode: None,
                subnet: None,
            };
            return Ok(Kernel::Seg6(Seg6Node::join(&node.namespace, plan)?));
        }
        let plan = KernelPlan {
            store,
            interface,
            underlay: Underlay {
                v4: network.v4.map(|_| node.v4),
                v6: network.v6.map(|_| node.v6),
            },
            subnet: None,
        };
        Ok(Kernel::Vxlan(KernelNode::join(&node.namespace, plan)?))
    }

    fn command(&self, nth: usize, socket: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("run").args(["--iface", INTERFACE]);
        command
            .arg("--subnet-file")
            .arg(self.folder.join(format!("node-{nth}.env")));
        command
            .arg("--data-dir")
            .arg(self.folder.join(format!("node-{nth}")));
        command.arg("--status-socket").arg(socket);
        match (self.store, nth) {
            (StoreKind::Embedded, 1) => {
                command
                    .arg("--listen")
                    .arg(format!("{}:{SERVER_PORT}", first_node()));
                command.arg("--network-config").arg(&self.network);
            }
            (StoreKind::Embedded, _) => {
                command
                    .arg("--remote")
                    .arg(format!("http://{}:{SERVER_PORT}", first_node()));
            }
            (StoreKind::Etcd, _) => {
                command.arg("--etcd-endpoints").arg(etcd_place());
            }
        }
        command.args(&self.arguments);
        command
    }

    fn etcd(&self, hub: &Namespace) -> Result<Child> {
        let place = etcd_place();
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(self.folder.join("etcd"));
        command.args(["--listen-client-urls", &place, "--advertise-client-urls", &place]);
        // Alone it talks to no peers, but insists on a place to listen for them.
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        let mut child = Child::start("etcd", hub, command, &self.folder.join("etcd.log"))
            .map_err(|error| anyhow::anyhow!("{error:#}\n  hint: apt-get install etcd-server"))?;
        child.wait(READY, || put_config(hub, &place, &self.network).ok())?;
        Ok(child)
    }
}

impl Daemon {
    /// Waits until the daemon is ready and knows so many peers.
    fn wait(&mut self, deadline: Instant, peers: usize) -> Result<()> {
        let socket = &self.socket;
        let left = deadline.saturating_duration_since(Instant::now());
        self.status = self.child.wait(left, || {
            let status = daemon::status(socket).ok().flatten();
            status.filter(|status| status.ready && status.peers.len() >= peers)
        })?;
        Ok(())
    }
}

impl Cluster {
    /// A node's first pod address as an end of traffic over the overlay.
    ///
    /// # Errors
    /// There is no such node, or it has no address.
    pub fn pod<'a>(&self, topology: &'a Topology, nth: usize) -> Result<End<'a>> {
        let ends = self.pods(topology, nth)?;
        ends.into_iter()
            .next()
            .with_context(|| format!("node {nth} has no subnet"))
    }

    /// A node's pod addresses, one a family.
    ///
    /// # Errors
    /// There is no such node.
    pub fn pods<'a>(&self, topology: &'a Topology, nth: usize) -> Result<Vec<End<'a>>> {
        let place = nth.checked_sub(1).context("nodes count from 1")?;
        let node = topology.nodes.get(place);
        let pods = match (self.daemons.get(place), &self.kernel) {
            (Some(daemon), _) => Some(daemon.pods.as_slice()),
            (None, Some(kernel)) if place == self.daemons.len() => Some(kernel.pods()),
            (None, _) => None,
        };
        let (Some(pods), Some(node)) = (pods, node) else {
            bail!("there is no node {nth}");
        };
        Ok(pods.iter().map(|&addr| End::new(&node.namespace, addr)).collect())
    }

    /// The nodes' subnets, in the order of the topology; those of one node in one text.
    pub fn subnets(&self) -> Vec<String> {
        let kersey = self
            .daemons
            .iter()
            .map(|daemon| daemon.status.node.subnets.join(" "));
        let kernel = self.kernel.iter().map(|kernel| kernel.subnets().join(" "));
        kersey.chain(kernel).collect()
    }

    /// What a node is, by its number.
    pub fn peer(&self, nth: usize) -> Peer {
        match &self.kernel {
            Some(kernel) if nth > self.daemons.len() => kernel.peer(),
            Some(_) | None => Peer::Kersey,
        }
    }

    /// Lets everything run on when this value goes.
    pub fn keep(&mut self) {
        if let Some(kernel) = &mut self.kernel {
            kernel.keep();
        }
        for child in self
            .daemons
            .iter_mut()
            .map(|daemon| &mut daemon.child)
            .chain(&mut self.store)
        {
            child.keep();
        }
    }

    /// Ends everything.
    ///
    /// # Errors
    /// Something had to be killed.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        // While node 1 still serves the store.
        let mut first = self.kernel.take().and_then(|kernel| kernel.leave().err());
        let mut daemons: Vec<_> = self.daemons.drain(..).collect();
        for daemon in daemons.iter().skip(1) {
            let _ = daemon.child.signal(Signal::SIGTERM);
        }
        daemons.reverse();
        for child in daemons
            .iter_mut()
            .map(|daemon| &mut daemon.child)
            .chain(&mut self.store)
        {
            if let Err(error) = child.stop() {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.daemons.iter().any(|daemon| !daemon.child.is_owned()) {
            return;
        }
        if let Err(error) = self.end() {
            tracing::warn!(error = %format!("{error:#}"), "a lab process did not end cleanly");
        }
    }
}

/// Gives a node the third address of each subnet, on its loopback, in place of those of an earlier daemon: its subnet
/// may be another node's by now.
///
/// # Errors
/// A subnet is none, or the kernel refuses.
pub fn give_pod_addresses(namespace: &Namespace, subnets: &[String]) -> Result<Vec<IpAddr>> {
    let pods: Vec<IpAddr> = subnets
        .iter()
        .map(|subnet| pod_address(subnet))
        .collect::<Result<_>>()?;
    namespace.netlink(async |netlink| {
        let loopback = netlink.link("lo").await?.index;
        for held in netlink.addresses().await? {
            if held.index == loopback && !held.addr.is_loopback() {
                netlink
                    .delete_address(loopback, held.addr, held.prefix_len)
                    .await?;
            }
        }
        for &addr in &pods {
            netlink
                .add_address(loopback, addr, if addr.is_ipv4() { 32 } else { 128 })
                .await?;
        }
        Ok(())
    })?;
    Ok(pods)
}

fn pod_address(subnet: &str) -> Result<IpAddr> {
    if let Ok(prefix) = subnet.parse::<Ipv4Prefix>() {
        return Ok(Ipv4Addr::from_bits(prefix.addr().to_bits() + 2).into());
    }
    let prefix: Ipv6Prefix = subnet.parse()?;
    Ok(Ipv6Addr::from_bits(prefix.addr().to_bits() + 2).into())
}

fn network(backend: serde_json::Value, dual_stack: bool) -> String {
    let mut network = serde_json::json!({ "Network": "10.244.0.0/16", "Backend": backend });
    if dual_stack {
        network["EnableIPv6"] = true.into();
        network["IPv6Network"] = "fd00:10:244::/56".into();
    }
    network.to_string()
}

fn etcd_place() -> String {
    format!("http://{HUB_V4}:{ETCD_PORT}")
}

fn first_node() -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, 1)
}

fn put_config(hub: &Namespace, place: &str, network: &str) -> Result<()> {
    hub.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let put = async {
                let mut client = etcd_client::Client::connect([place], None).await?;
                client.put("/coreos.com/network/config", network, None).await
            };
            tokio::time::timeout(Duration::from_secs(1), put).await??;
            Ok(())
        })
    })
}

/// What the name of a lab's folder begins with, given its process; the command lines of its daemons hold it.
pub fn folder_prefix(lab: u32) -> String {
    format!("kersey-lab-{lab}-")
}

/// Ends processes of an earlier lab by number, but only those whose command line holds `mark`: numbers are used again.
///
/// # Errors
/// One cannot be signalled, or stays.
pub fn end_processes(pids: &[u32], mark: &str) -> Result<usize> {
    let is_ours = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(mark)
    };
    let ours: Vec<_> = pids.iter().copied().filter(is_ours).collect();
    let signal = |pid: u32, signal| {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid)?);
        match nix::sys::signal::kill(pid, signal) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot end process {pid}")),
        }
    };
    for &pid in &ours {
        signal(pid, Signal::SIGTERM)?;
    }
    for (limit, last) in [
        (Duration::from_secs(3), Some(Signal::SIGKILL)),
        (Duration::from_secs(1), None),
    ] {
        let deadline = Instant::now() + limit;
        while ours.iter().any(is_ours) && Instant::now() < deadline {
            interrupt::check()?;
            thread::sleep(Duration::from_millis(10));
        }
        for &pid in ours.iter().filter(|pid| is_ours(pid)) {
            if let Some(last) = last {
                signal(pid, last)?;
            }
        }
    }
    ensure!(!ours.iter().any(is_ours), "a process of the lab does not end");
    Ok(ours.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_network_is_one_a_node_takes() {
        for (text, kind, settings, dual) in [
            (
                ClusterPlan::network("udp", false),
                "udp",
                r#"{"Type":"udp"}"#,
                false,
            ),
            (
                ClusterPlan::network("vxlan", true),
                "vxlan",
                r#"{"Port":8472,"Type":"vxlan","VNI":1}"#,
                true,
            ),
            (
                ClusterPlan::vxlan_network(7, 4789, false),
                "vxlan",
                r#"{"Port":4789,"Type":"vxlan","VNI":7}"#,
                false,
            ),
            (
                ClusterPlan::steered_network(&[first_node()], Ipv6Addr::LOCALHOST, true),
                "srv6",
                r#"{"Paths":[{"To":"192.0.2.1","Via":["::1"]}],"Type":"srv6"}"#,
                true,
            ),
        ] {
            let network = NetworkConfig::parse(&text).expect(&text);
            assert_eq!(
                (network.v4.is_some(), network.v6.is_some()),
                (true, dual),
                "{text}"
            );
            assert_eq!(network.backend.kind.as_deref(), Some(kind));
            assert_eq!(network.backend.json, settings);
        }
    }

    #[test]
    fn pods_have_the_third_address() {
        let pod = |subnet| pod_address(subnet).unwrap().to_string();
        assert_eq!(pod("10.244.7.0/24"), "10.244.7.2");
        assert_eq!(pod("fd00:10:244:7::/64"), "fd00:10:244:7::2");
        assert!(pod_address("10.244.7.0").is_err());
    }
}
