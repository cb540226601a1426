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

use anyhow::{Context, Result, ensure};

use crate::addr::{Ipv4Prefix, Ipv6Prefix, Mtu};
use crate::host::ethtool::{self, Offload, Switch};
use crate::host::netlink::{Gateway, Netlink, Route};
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
            .map(|nth| self.node(nth))
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

    fn node(&self, nth: usize) -> Result<Node> {
        let low = u8::try_from(nth)?;
        Ok(Node {
            namespace: Namespace::create(&format!("{}-{nth}", self.prefix))?,
            v4: Ipv4Addr::new(192, 0, 2, low),
            v6: Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, u16::from(low)),
        })
    }

    fn hub(&self, nodes: &[Node]) -> Result<Namespace> {
        let hub = Namespace::create(&format!("{}-hub", self.prefix))?;
        hub.netlink(async |netlink| {
            netlink.add_bridge("br0").await?;
            let bridge = netlink.link("br0").await?.index;
            for (nth, node) in (1..).zip(nodes) {
                let port = format!("p{nth}");
                netlink
                    .add_veth(&port, INTERFACE, Some(node.namespace.open()?.as_fd()))
                    .await?;
                let index = netlink.link(&port).await?.index;
                netlink.set_mtu(index, self.mtu.bytes().into()).await?;
                netlink.enslave(index, bridge).await?;
                self.set_offloads(&port)?;
                netlink.set_up(index).await?;
            }
            netlink.set_mtu(bridge, self.mtu.bytes().into()).await?;
            netlink.add_address(bridge, HUB_V4.into(), 24).await?;
            self.add_v6(&netlink, bridge, HUB_V6).await
        })?;
        Ok(hub)
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

    /// The names of all its namespaces.
    pub fn names(&self) -> Vec<String> {
        let namespaces = self.nodes.iter().map(|node| &node.namespace).chain(&self.hub);
        namespaces.map(|namespace| namespace.name().to_owned()).collect()
    }
}
