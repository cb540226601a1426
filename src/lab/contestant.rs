//! Ways of carrying packets between the two nodes of a pair, set up side by side on one veth.
//!
//! ```text
//!   node 1                                   node 2
//!   lo        10.244.a.2   kersey pod        lo        10.244.b.2
//!   flannel0               kersey's TUN      flannel0  or, in a mixed pair, the kernel's flannel.3
//!   flannel.1 10.245.1.0   kernel VXLAN      flannel.1 10.245.2.0
//!   pods      10.245.1.0   or kernel SRv6    pods      10.245.2.0
//!   copies0   10.246.1.0   copies only       copies0   10.246.2.0
//!   eth0      192.0.2.1 ------ veth -------- eth0      192.0.2.2
//! ```
//!
//! The kernel's VXLAN pair stays for the life of the topology and owns port 8472 on both nodes, so whoever else speaks VXLAN
//! has a VNI and a port of its own: Kersey's pair 4789, a mixed pair 4790. The kernel's SRv6 pair has a block of
//! locators of its own, and does without `seg6_enabled`: that switch is for routing headers at a node's addresses, and
//! off on Kersey's nodes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::host::netlink::{self, Behavior, Gateway, Route, Seg6Mode, Seg6Route, Sid, Vxlan};
use crate::host::sysctl;
use crate::lab::cluster::{Cluster, ClusterPlan, Peer, StoreKind, VXLAN_PORT};
use crate::lab::copies::Copies;
use crate::lab::topology::{INTERFACE, Node, Topology};
use crate::lab::traffic::End;

/// What flannel subtracts: outer IPv4, UDP and VXLAN headers, and the inner Ethernet header.
const VXLAN_OVERHEAD: u32 = 20 + 8 + 8 + 14;
/// VNI and port of Kersey's pair, if its backend is vxlan. The port is IANA's.
const KERSEY_VXLAN: (u32, u16) = (2, 4789);
/// VNI and port of a mixed pair.
const MIXED_VXLAN: (u32, u16) = (3, 4790);

/// A way of carrying packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contestant {
    /// Two kersey daemons.
    Kersey,
    /// The kernel's VXLAN, as flannel sets it up.
    KernelVxlan,
    /// The kernel's SRv6, with as few headers as it can do with.
    KernelSeg6,
    /// Kersey on node 1, which sends, and the kernel's tunnel of the same kind on node 2.
    KerseyToKernel,
    /// The same pair with the kernel sending.
    KernelToKersey,
    /// No tunnel at all.
    Veth,
    /// Through userspace with nothing done there.
    Copies,
}

impl Contestant {
    /// What it is called in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kersey => "kersey",
            Self::KernelVxlan => "kernel vxlan",
            Self::KernelSeg6 => "kernel seg6",
            Self::KerseyToKernel => "kersey to kernel",
            Self::KernelToKersey => "kernel to kersey",
            Self::Veth => "plain veth",
            Self::Copies => "copies only",
        }
    }
}

/// A contestant in place; dropping it ends its processes.
#[derive(Debug)]
pub struct Running {
    addrs: [std::net::IpAddr; 2],
    sender: Sender,
    _cluster: Option<Cluster>,
    _copies: Vec<Copies>,
}

/// Which node traffic comes from.
#[derive(Clone, Copy, Debug)]
enum Sender {
    One,
    Two,
}

impl Running {
    /// The ends traffic goes between, the sending one first.
    pub fn ends<'a>(&self, topology: &'a Topology) -> Option<(End<'a>, End<'a>)> {
        let [one, two] = topology.nodes.as_slice() else {
            return None;
        };
        let one = End::new(&one.namespace, self.addrs[0]);
        let two = End::new(&two.namespace, self.addrs[1]);
        Some(match self.sender {
            Sender::One => (one, two),
            Sender::Two => (two, one),
        })
    }
}

/// Makes the kernel's tunnel on both nodes, once for the life of the topology; other contestants need nothing made.
///
/// # Errors
/// This kernel has no such tunnel, or the topology is no pair.
pub fn prepare(contestant: Contestant, topology: &Topology) -> Result<()> {
    match contestant {
        Contestant::KernelVxlan => add_kernel_vxlan(topology),
        Contestant::KernelSeg6 => add_kernel_seg6(topology),
        Contestant::Kersey
        | Contestant::KerseyToKernel
        | Contestant::KernelToKersey
        | Contestant::Veth
        | Contestant::Copies => Ok(()),
    }
}

/// Makes flannel's VXLAN device on both nodes, once for the life of the topology.
///
/// # Errors
/// This kernel has no VXLAN, or the topology is no pair.
pub fn add_kernel_vxlan(topology: &Topology) -> Result<()> {
    let [one, two] = topology.nodes.as_slice() else {
        anyhow::bail!("a comparison takes 2 nodes");
    };
    let macs = [vxlan_device(one, 1)?, vxlan_device(two, 2)?];
    join_vxlan(one, 2, macs[1], two.v4)?;
    join_vxlan(two, 1, macs[0], one.v4)
}

/// Makes a segment on both nodes and a route to the other's, once for the life of the topology.
///
/// # Errors
/// This kernel has no SRv6, or the topology is no pair.
pub fn add_kernel_seg6(topology: &Topology) -> Result<()> {
    let [one, two] = topology.nodes.as_slice() else {
        anyhow::bail!("a comparison takes 2 nodes");
    };
    for (node, nth, peer, peer_nth) in [(one, 1, two, 2), (two, 2, one, 1)] {
        join_seg6(node, nth, peer, peer_nth).context("cannot set up the kernel's SRv6")?;
    }
    Ok(())
}

/// The address is on a bridge without ports: those of the loopback belong to the pods of clusters.
fn join_seg6(node: &Node, nth: u8, peer: &Node, peer_nth: u8) -> Result<()> {
    node.namespace.netlink(async |netlink| {
        let link = netlink.link(INTERFACE).await?;
        netlink.add_bridge("pods").await?;
        let pods = netlink.link("pods").await?.index;
        netlink.set_up(pods).await?;
        netlink
            .add_address(pods, tunnel_subnet(nth)?.addr().into(), 32)
            .await?;
        let dx4 = Behavior::EndDx4(Ipv4Addr::UNSPECIFIED);
        netlink
            .replace_sid(&Sid::new(seg6_sid(nth)?, link.index, dx4))
            .await?;
        let mut locator = Route::direct(seg6_locator(peer_nth)?.into(), link.index);
        locator.gateway = Gateway::Via(peer.v6.into());
        netlink.replace_route(&locator).await?;
        let mode = Seg6Mode::EncapRed;
        let route = Seg6Route {
            destination: tunnel_subnet(peer_nth)?.into(),
            index: link.index,
            mode,
            segments: vec![seg6_sid(peer_nth)?],
            inner_mtu_bytes: Some(link.mtu_bytes - mode.overhead_bytes(1)),
        };
        Ok(netlink.replace_seg6_route(&route).await?)
    })
}

fn seg6_locator(nth: u8) -> Result<Ipv6Prefix> {
    let addr = Ipv6Addr::new(0xfd10, 0x245, nth.into(), 0, 0, 0, 0, 0);
    Ok(Ipv6Prefix::new(addr, 48)?)
}

fn seg6_sid(nth: u8) -> Result<Ipv6Addr> {
    Ok(Ipv6Addr::from_bits(seg6_locator(nth)?.addr().to_bits() + 4))
}

fn vxlan_device(node: &Node, nth: u8) -> Result<[u8; 6]> {
    node.namespace
        .netlink(async |netlink| {
            let underlay = netlink.link(INTERFACE).await?;
            let vxlan = Vxlan {
                name: "flannel.1",
                vni: 1,
                underlay_index: underlay.index,
                local: node.v4.into(),
                port: VXLAN_PORT,
                mtu_bytes: underlay.mtu_bytes - VXLAN_OVERHEAD,
            };
            netlink.add_vxlan(&vxlan).await?;
            sysctl::no_link_local_address(vxlan.name)?;
            let link = netlink.link(vxlan.name).await?;
            netlink
                .add_address(link.index, tunnel_subnet(nth)?.addr().into(), 32)
                .await?;
            netlink.set_up(link.index).await?;
            link.mac.context("a VXLAN device has an Ethernet address")
        })
        .context("cannot set up the kernel's VXLAN")
}

fn join_vxlan(node: &Node, peer: u8, mac: [u8; 6], underlay: Ipv4Addr) -> Result<()> {
    let subnet = tunnel_subnet(peer)?;
    node.namespace.netlink(async |netlink| {
        let index = netlink.link("flannel.1").await?.index;
        netlink.set_neighbour(index, subnet.addr().into(), mac).await?;
        netlink.set_fdb(index, mac, underlay.into()).await?;
        let mut route = Route::direct(subnet.into(), index);
        route.gateway = Gateway::OnLink(subnet.addr().into());
        Ok(netlink.replace_route(&route).await?)
    })
}

fn tunnel_subnet(nth: u8) -> Result<Ipv4Prefix> {
    Ok(Ipv4Prefix::new(Ipv4Addr::new(10, 245, nth, 0), 24)?)
}

fn copies(topology: &Topology) -> Result<Running> {
    let [one, two] = topology.nodes.as_slice() else {
        anyhow::bail!("a comparison takes 2 nodes");
    };
    let subnet = |nth| Ipv4Prefix::new(Ipv4Addr::new(10, 246, nth, 0), 24);
    let subnets = [subnet(1)?, subnet(2)?];
    let copies = vec![
        Copies::start(one, subnets[0].addr(), two, subnets[1])?,
        Copies::start(two, subnets[1].addr(), one, subnets[0])?,
    ];
    Ok(Running {
        addrs: subnets.map(|subnet| subnet.addr().into()),
        sender: Sender::One,
        _cluster: None,
        _copies: copies,
    })
}

/// How Kersey takes part in a comparison.
#[derive(Clone, Debug)]
pub struct Kersey {
    /// The backend of Kersey's pair.
    pub backend: String,
    /// Where files of the daemons go; it must exist.
    pub folder: PathBuf,
    /// Further arguments for the daemons.
    pub arguments: Vec<String>,
}

impl Kersey {
    /// Starts a pair, of which the last node may be the kernel's.
    fn start(&self, topology: &Topology, peer: Peer) -> Result<Cluster> {
        let vxlan = |(vni, port)| ClusterPlan::vxlan_network(vni, port, false);
        let plan = ClusterPlan {
            program: std::env::current_exe().context("cannot find our own program")?,
            folder: self.folder.clone(),
            store: StoreKind::Embedded,
            network: match (peer, self.backend.as_str()) {
                (Peer::KernelVxlan, _) => vxlan(MIXED_VXLAN),
                (Peer::KernelSeg6, other) => ClusterPlan::network(other, false),
                (Peer::Kersey, "vxlan") => vxlan(KERSEY_VXLAN),
                (Peer::Kersey, other) => ClusterPlan::network(other, false),
            },
            peer,
            arguments: self.arguments.clone(),
        };
        plan.start(topology)
    }
}

/// Puts a contestant in place. Kersey's daemons are started afresh each time: what they found out about the kernel
/// and gave up on holds until they end.
///
/// # Errors
/// The daemons do not get ready.
pub fn start(contestant: Contestant, topology: &Topology, kersey: &Kersey) -> Result<Running> {
    let underlay = |nth: usize| {
        topology
            .nodes
            .get(nth)
            .map(|node| node.v4)
            .context("a comparison takes 2 nodes")
    };
    let pair = |peer, sender| -> Result<Running> {
        let cluster = kersey.start(topology, peer)?;
        Ok(Running {
            addrs: [cluster.pod(topology, 1)?.addr, cluster.pod(topology, 2)?.addr],
            sender,
            _cluster: Some(cluster),
            _copies: Vec::new(),
        })
    };
    let standing = |addrs| Running {
        addrs,
        sender: Sender::One,
        _cluster: None,
        _copies: Vec::new(),
    };
    let kernels = [tunnel_subnet(1)?.addr().into(), tunnel_subnet(2)?.addr().into()];
    let kernel = if kersey.backend == "srv6" {
        Peer::KernelSeg6
    } else {
        Peer::KernelVxlan
    };
    match contestant {
        Contestant::Veth => Ok(standing([underlay(0)?.into(), underlay(1)?.into()])),
        Contestant::KernelVxlan => Ok(standing(kernels)),
        Contestant::KernelSeg6 => {
            // A mixed pair's kernel node had another.
            for (nth, node) in (1..).zip(&topology.nodes) {
                let source = seg6_sid(nth)?;
                node.namespace.run(|| Ok(netlink::set_tunnel_source(source)?))?;
            }
            Ok(standing(kernels))
        }
        Contestant::Kersey => pair(Peer::Kersey, Sender::One),
        Contestant::KerseyToKernel => pair(kernel, Sender::One),
        Contestant::KernelToKersey => pair(kernel, Sender::Two),
        Contestant::Copies => copies(topology),
    }
}
