//! Nodes on one Ethernet.
//!
//! ```text
//!   <prefix>-1             <prefix>-2                     <prefix>-hub
//!   eth0 192.0.2.1         eth0 192.0.2.2                 br0 192.0.2.254
//!        2001:db8:1::1          2001:db8:1::2                 2001:db8:1::fe
//!     |                      |                             | |
//!     +----------------------+-----------------------------+-+   veth to p1, p2, … of br0
//! ```
//!
//! [`Wiring::Pair`] leaves the hub out and joins two nodes by a single veth pair. The addresses are RFC 5737 and RFC
//! 3849 documentation space; nothing leaves the namespaces.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::addr::{Ipv4Prefix, Ipv6Prefix, Mtu};
use crate::host::ethtool::{self, Offload, Switch};
use crate::host::netlink::{Gateway, Netlink, Route};
use crate::lab::interrupt;
use crate::lab::netns::Namespace;
use crate::lab::traffic::End;

/// The hub's place on the wire, also the default gateway.
pub const HUB_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 254);
/// The hub's IPv6 address.
pub const HUB_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0xfe);
/// The nodes' underlay interface.
pub const INTERFACE: &str = "eth0";
/// As many as fit below the hub's address, with room to spare.
pub const MOST_NODES: usize = 200;
/// What joins the nodes, in the hub.
const BRIDGE: &str = "br0";
/// Its Ethernet address, locally administered.
const BRIDGE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
/// How long the kernel has to take down a namespace that nobody is in: it waits for its own readers, seconds on a busy machine.
const UNMADE: Duration = Duration::from_secs(20);

/// How nodes are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// Every node by a veth to a bridge in the hub.
    Hub,
    /// Two nodes by one veth.
    Pair,
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Begins every namespace's name.
    pub prefix: String,
    /// How many nodes.
    pub nodes: usize,
    /// How they are joined.
    pub wiring: Wiring,
    /// MTU of every underlay link.
    pub mtu: Mtu,
    /// Checksum and segmentation offloads of every underlay link. A veth with them on hands whole super-packets over
    /// without a checksum; off makes it behave like a wire.
    pub offloads: Switch,
    /// Generic receive offload of every underlay link: as most network cards have it, and as no veth has it by itself.
    pub gro: Switch,
    /// Whether nodes have default routes through the hub.
    pub default_route: Switch,
}

impl Plan {
    /// Nodes at a hub, 1500 bytes, offloads on as veths have them, default routes.
    pub fn new(prefix: impl Into<String>, nodes: usize) -> Self {
        Self {
            prefix: prefix.into(),
            nodes,
            wiring: Wiring::Hub,
            // Ethernet.
            mtu: Mtu::new(1500).unwrap_or_else(|_| unreachable!("1500 is above 68")),
            offloads: Switch::On,
            gro: Switch::Off,
            default_route: Switch::On,
        }
    }

    /// Like [`Plan::new`], under a prefix no other process uses; `tag` tells this process's labs apart.
    pub fn private(tag: &str, nodes: usize) -> Self {
        Self::new(format!("kersey-{}-{tag}", std::process::id()), nodes)
    }

    /// Builds it.
    ///
    /// # Errors
    /// We are not root, or namespaces of these names exist.
    pub fn build(&self) -> Result<Topology> {
        ensure!(
            self.nodes >= 1 && self.nodes <= MOST_NODES,
            "a lab has 1 to {MOST_NODES} nodes"
        );
        let nodes: Vec<_> = (1..=self.nodes)
            .map(|nth| self.node(nth, u8::try_from(nth)?))
            .collect::<Result<_>>()?;
        let hub = match self.wiring {
            Wiring::Hub => Some(self.hub(&nodes)?),
            Wiring::Pair => {
                let [one, two] = nodes.as_slice() else {
                    anyhow::bail!("a pair has 2 nodes");
                };
                let far = two.namespace.open()?;
                one.namespace.netlink(async |netlink| {
                    Ok(netlink.add_veth(INTERFACE, INTERFACE, Some(far.as_fd())).await?)
                })?;
                None
            }
        };
        for node in &nodes {
            self.set_up(node)
                .with_context(|| format!("cannot set up node {}", node.namespace.name()))?;
        }
        Ok(Topology { nodes, hub })
    }

    /// Takes a node away: its namespace, and with it its links at both ends. What still runs there keeps it.
    ///
    /// # Errors
    /// There is no such node or no hub, or something still lives in the namespace.
    pub fn take_away(&self, topology: &mut Topology, nth: usize) -> Result<()> {
        let (hub, node) = topology.at_hub(nth)?;
        // From now on the name is that of whoever comes in its place.
        Namespace::remove(node.namespace.name())?;
        node.namespace.keep();
        let port = port(nth);
        // The kernel takes a namespace down in its own time.
        let is_gone = || {
            let links = hub.netlink(async |netlink| Ok(netlink.links().await?));
            links.is_ok_and(|links| links.iter().all(|link| link.name != port))
        };
        ensure!(
            interrupt::wait_until(UNMADE, is_gone),
            "the links of node {nth} outlive its namespace"
        );
        Ok(())
    }

    /// Puts a new node where one was taken away, with addresses that end in `low`, 1 to 253: the hub has 254.
    ///
    /// # Errors
    /// There was no such node, or it is still there; `low` is another number.
    pub fn put_back(&self, topology: &mut Topology, nth: usize, low: u8) -> Result<()> {
        ensure!(
            (1..=253).contains(&low),
            "no node has addresses that end in {low}"
        );
        let (hub, place) = topology.at_hub(nth)?;
        *place = self.node(nth, low)?;
        hub.netlink(async |netlink| {
            let bridge = netlink.link(BRIDGE).await?.index;
            self.plug_in(&netlink, bridge, &port(nth), place).await
        })?;
        self.set_up(place)
            .with_context(|| format!("cannot set up node {}", place.namespace.name()))
    }

    fn node(&self, nth: usize, low: u8) -> Result<Node> {
        Ok(Node {
            namespace: Namespace::create(&format!("{}-{nth}", self.prefix))?,
            v4: Ipv4Addr::new(192, 0, 2, low),
            v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, u16::from(low)),
        })
    }

    fn hub(&self, nodes: &[Node]) -> Result<Namespace> {
        let hub = Namespace::create(&format!("{}-hub", self.prefix))?;
        hub.netlink(async |netlink| {
            netlink.add_bridge(BRIDGE).await?;
            let bridge = netlink.link(BRIDGE).await?.index;
            // Else it takes that of one of its ports, and another one when that port goes: the nodes would send to the old for seconds.
            netlink.set_mac(bridge, BRIDGE_MAC).await?;
            for (nth, node) in (1..).zip(nodes) {
                self.plug_in(&netlink, bridge, &port(nth), node).await?;
            }
            netlink.set_mtu(bridge, self.mtu.bytes().into()).await?;
            netlink.add_address(bridge, HUB_V4.into(), 24).await?;
            self.add_v6(&netlink, bridge, HUB_V6).await
        })?;
        Ok(hub)
    }

    /// Joins a node to the bridge, from within the hub.
    async fn plug_in(&self, netlink: &Netlink, bridge: u32, port: &str, node: &Node) -> Result<()> {
        netlink
            .add_veth(port, INTERFACE, Some(node.namespace.open()?.as_fd()))
            .await?;
        let index = netlink.link(port).await?.index;
        netlink.set_mtu(index, self.mtu.bytes().into()).await?;
        netlink.enslave(index, bridge).await?;
        self.set_offloads(port)?;
        Ok(netlink.set_up(index).await?)
    }

    fn set_up(&self, node: &Node) -> Result<()> {
        node.namespace.netlink(async |netlink| {
            let index = netlink.link(INTERFACE).await?.index;
            netlink.set_mtu(index, self.mtu.bytes().into()).await?;
            self.set_offloads(INTERFACE)?;
            netlink.set_up(index).await?;
            netlink.add_address(index, node.v4.into(), 24).await?;
            self.add_v6(&netlink, index, node.v6).await?;
            if self.default_route == Switch::On && self.wiring == Wiring::Hub {
                let mut v4 = Route::direct(Ipv4Prefix::new(Ipv4Addr::UNSPECIFIED, 0)?.into(), index);
                v4.gateway = Gateway::Via(HUB_V4.into());
                netlink.replace_route(&v4).await?;
                if self.has_v6() {
                    let mut v6 = Route::direct(Ipv6Prefix::new(Ipv6Addr::UNSPECIFIED, 0)?.into(), index);
                    v6.gateway = Gateway::Via(HUB_V6.into());
                    netlink.replace_route(&v6).await?;
                }
            }
            Ok(())
        })
    }

    /// RFC 8200 §5: a link below 1280 bytes carries no IPv6.
    fn has_v6(&self) -> bool {
        self.mtu.bytes() >= 1280
    }

    async fn add_v6(&self, netlink: &Netlink, index: u32, addr: Ipv6Addr) -> Result<()> {
        if self.has_v6() {
            netlink.add_address(index, addr.into(), 64).await?;
        }
        Ok(())
    }

    fn set_offloads(&self, link: &str) -> Result<()> {
        if self.offloads == Switch::Off {
            // Segmentation first: the kernel drops it anyway once there are no checksums.
            for offload in [
                Offload::TcpSegmentation,
                Offload::GenericSegmentation,
                Offload::Checksum,
            ] {
                ethtool::set(link, offload, Switch::Off)?;
            }
        }
        if self.gro == Switch::On {
            ethtool::set(link, Offload::GenericReceive, Switch::On)?;
        }
        Ok(())
    }
}

/// The end of a node's veth at the bridge.
fn port(nth: usize) -> String {
    format!("p{nth}")
}

/// One node of a topology.
#[derive(Debug)]
pub struct Node {
    /// Where it lives.
    pub namespace: Namespace,
    /// Its underlay address.
    pub v4: Ipv4Addr,
    /// Its IPv6 underlay address.
    pub v6: Ipv6Addr,
}

impl Node {
    /// The node as an end of traffic over the plain underlay.
    pub fn underlay(&self) -> End<'_> {
        End::new(&self.namespace, self.v4.into())
    }

    /// Bytes that came in over the underlay since the node was made.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn received_bytes(&self) -> Result<u64> {
        let table = self
            .namespace
            .run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let mut lines = table.lines().filter_map(|line| line.trim().split_once(':'));
        let counters = lines.find(|(name, _)| *name == INTERFACE);
        let bytes = counters.and_then(|(_, counters)| counters.split_whitespace().next());
        Ok(bytes.context("the underlay link has counters")?.parse()?)
    }
}

/// Nodes on a wire, unmade on drop.
#[derive(Debug)]
pub struct Topology {
    /// The nodes, the first being number 1.
    pub nodes: Vec<Node>,
    /// The bridge's namespace, if there is one.
    pub hub: Option<Namespace>,
}

impl Topology {
    /// Leaves everything in place when this value goes.
    pub fn keep(&mut self) {
        for node in &mut self.nodes {
            node.namespace.keep();
        }
        if let Some(hub) = &mut self.hub {
            hub.keep();
        }
    }

    fn at_hub(&mut self, nth: usize) -> Result<(&Namespace, &mut Node)> {
        let hub = self.hub.as_ref().context("the lab has no hub")?;
        let node = nth.checked_sub(1).and_then(|at| self.nodes.get_mut(at));
        Ok((hub, node.with_context(|| format!("there is no node {nth}"))?))
    }

    /// The names of all its namespaces.
    pub fn names(&self) -> Vec<String> {
        let namespaces = self.nodes.iter().map(|node| &node.namespace).chain(&self.hub);
        namespaces.map(|namespace| namespace.name().to_owned()).collect()
    }
}
