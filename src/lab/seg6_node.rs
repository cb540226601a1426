//! A node whose tunnel is the kernel's own SRv6.
//!
//! It is what Kersey's `srv6` backend has to get on with: it takes a lease in the network's store, publishes its
//! locator and segments there, and installs what the leases of other nodes ask for.
//!
//! ```text
//!   the namespace of node 192.0.2.2, 2001:db8:1::2
//!     lo    pod addresses, the third of the lease
//!     SIDs  fd12:3456:789a:c000:202::4   End.DX4 nh4 0.0.0.0        IPv4 inside
//!           fd12:3456:789a:c000:202::6   End.DT6 table main         IPv6 inside
//!           fd12:3456:789a:c000:202::e   End                        on to the next segment
//!           fd12:3456:789a:c000:202::1   End.DX4, and tunnel source, where a proof of concept looks for it
//!     rest  fd12:3456:789a:c000:202::/80 blackhole                  else it would travel to and fro on the link
//!
//!   for a peer 10.244.1.0/24 at 2001:db8:1::1 with locator fd12:3456:789a:c000:201::/80
//!     route fd12:3456:789a:c000:201::/80 via 2001:db8:1::1
//!     route 10.244.1.0/24 encap seg6 mode encap.red segs [ waypoints …, the peer's segment for IPv4 ]
//! ```
//!
//! [`Form::ProofOfConcept`] is the other thing to get on with: flannel-srv6 of 2020, IPv4 inside only, one link
//! without routers or neighbour discovery, always with a routing header, and no MTU of its own.
//!
//! [`Form::CrossConnect`] looks nothing up: all that leaves the tunnel goes to a router behind the node, which has the
//! node's subnets, by `End.DX4 nh4 …` and `…::d6 End.DX6 nh6 …` in place of End.DT6.
//!
//! Nothing runs meanwhile: [`Seg6Node::update`] reads the leases once and makes the kernel agree with them.
//!
//! Limits: the lease is not renewed (labs live for minutes, leases for a day); one underlay link. The node's own sockets
//! are told the inner MTU, but not containers behind it, whose links must have it
//! ([`inner_mtu_bytes`](crate::host::netlink::Seg6Route::inner_mtu_bytes)); and what is larger all the same, as a long UDP datagram, is not
//! fragmented but lost: the kernel encapsulates first.

mod item;
mod rules;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result};

use self::item::{Item, Switches, install};
use self::rules::{END, Rules, SOURCE};
pub use self::rules::{default_end_sid, locator};
use crate::control::config::NetworkConfig;
use crate::host::netlink::{self, Seg6Mode};
use crate::lab::cluster::give_pod_addresses;
use crate::lab::leases::{self, inside, snapshot};
use crate::lab::netns::Namespace;
use crate::lease::{Lease, Subnet};
use crate::options::StoreKind;

/// What a kernel node is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A node by the rules of Kersey's `srv6` backend: both families inside, any underlay.
    Seg6,
    /// The same with a router behind it, at these addresses, that all inner packets are handed to.
    CrossConnect {
        /// For IPv4 inside.
        v4: Ipv4Addr,
        /// For IPv6 inside.
        v6: Ipv6Addr,
    },
    /// A node of flannel-srv6.
    ProofOfConcept,
}

/// How a node is to take part.
#[derive(Clone, Debug)]
pub struct Seg6Plan {
    /// Where config and leases are, as seen from the node's namespace.
    pub store: StoreKind,
    /// The link that holds the underlay addresses.
    pub interface: String,
    /// Underlay IPv4 address, of which the locator is made.
    pub v4: Ipv4Addr,
    /// Underlay IPv6 address.
    pub v6: Ipv6Addr,
    /// What it is like.
    pub form: Form,
    /// The form of its packets, if not what the network's config says. A proof of concept always has routing headers.
    pub mode: Option<Seg6Mode>,
    /// The subnet to ask for, if it is to be a certain one.
    pub subnet: Option<Subnet>,
}

/// A node in place. Dropping it takes back what it set and leaves the lease, as a node that dies does;
/// [`Seg6Node::leave`] gives the lease back too.
#[derive(Debug)]
pub struct Seg6Node {
    namespace: Namespace,
    plan: Seg6Plan,
    rules: Rules,
    lease: Lease,
    pods: Vec<IpAddr>,
    peers: BTreeSet<Subnet>,
    /// What this node needs of itself.
    own: Vec<Item>,
    /// What its peers need.
    installed: Vec<Item>,
    switches: Switches,
    owned: bool,
}

impl Seg6Node {
    /// Takes a lease, gives the node its pod addresses and makes its segments. It knows no peers before
    /// [`Seg6Node::update`].
    ///
    /// # Errors
    /// The store does not answer, the network is no SRv6 network, or this kernel has no seg6.
    pub fn join(namespace: &Namespace, plan: Seg6Plan) -> Result<Self> {
        let (rules, lease) = inside(namespace, &plan.store, async |netlink, store| {
            let config = NetworkConfig::parse(&store.config().await?)?;
            let link = netlink.link(&plan.interface).await?;
            let loopback = netlink.link("lo").await?.index;
            let mac = link.mac.context("the underlay link has an Ethernet address")?;
            let rules = Rules::new(&plan, &config, link.index, loopback, link.mtu_bytes, mac.into())?;
            let lease = store.acquire(&rules.attrs(&plan, &config), plan.subnet).await?;
            Ok((rules, lease))
        })
        .context("cannot set up a node with the kernel's SRv6")?;
        // From here on the guard takes back what was set.
        let mut node = Self {
            namespace: Namespace::existing(namespace.name())?,
            plan,
            rules,
            lease,
            pods: Vec::new(),
            peers: BTreeSet::new(),
            own: Vec::new(),
            installed: Vec::new(),
            switches: Switches::default(),
            owned: true,
        };
        node.pods = give_pod_addresses(&node.namespace, &node.subnets())?;
        node.set_up()
            .context("cannot set up a node with the kernel's SRv6")?;
        Ok(node)
    }

    fn set_up(&mut self) -> Result<()> {
        let (interface, switches) = (&self.plan.interface, &mut self.switches);
        self.namespace.run(|| switches.turn_on(interface))?;
        let source = self.rules.sid(SOURCE);
        self.namespace.run(|| Ok(netlink::set_tunnel_source(source)?))?;
        let wanted = self.rules.own(&self.pods);
        let own = &mut self.own;
        self.namespace.netlink(async |netlink| {
            // A Kersey that was here before has left its locator, which comes before what the kernel's SIDs are.
            for prefix in netlink.own_local_prefixes().await? {
                netlink.delete_local_prefix(prefix).await?;
            }
            install(&netlink, own, &wanted).await
        })
    }

    /// Reads all leases and makes routes and neighbours agree with them.
    ///
    /// # Errors
    /// The store does not answer, or the kernel refuses.
    pub fn update(&mut self) -> Result<()> {
        let (rules, own, installed) = (&self.rules, self.lease.subnet, &mut self.installed);
        self.peers = inside(&self.namespace, &self.plan.store, async |netlink, store| {
            let mut leases = snapshot(store).await?;
            leases.retain(|lease| lease.subnet != own);
            let mut wanted = Vec::new();
            let mut reached = BTreeSet::new();
            for lease in &leases {
                let items = rules.towards(lease);
                if !items.is_empty() {
                    reached.insert(lease.subnet);
                }
                wanted.extend(items);
            }
            install(netlink, installed, &wanted).await?;
            Ok(reached)
        })?;
        Ok(())
    }

    /// Updates until the peers are as wanted.
    ///
    /// # Errors
    /// They are not within `limit`, an update fails, or a signal came.
    pub fn follow(
        &mut self,
        limit: Duration,
        mut wanted: impl FnMut(&BTreeSet<Subnet>) -> bool,
    ) -> Result<()> {
        leases::follow(limit, || {
            self.update()?;
            Ok((wanted(&self.peers), self.peers.len()))
        })
    }

    /// Gives the lease back and takes back what was set.
    ///
    /// # Errors
    /// The store does not answer, or the kernel refuses.
    pub fn leave(mut self) -> Result<()> {
        let subnet = self.lease.subnet;
        inside(&self.namespace, &self.plan.store, async |_, store| {
            Ok(store.revoke(subnet).await?)
        })?;
        self.remove()
    }

    /// Leaves everything in place when this value goes.
    pub fn keep(&mut self) {
        self.owned = false;
    }

    /// Its lease, as it was last published.
    pub fn lease(&self) -> &Lease {
        &self.lease
    }

    /// Its subnets, one a family, in CIDR notation.
    pub fn subnets(&self) -> Vec<String> {
        let prefixes = self.lease.subnet.prefixes();
        prefixes.map(|prefix| prefix.to_string()).collect()
    }

    /// Its pod addresses, one a family.
    pub fn pods(&self) -> &[IpAddr] {
        &self.pods
    }

    /// The peers that the last update installed.
    pub fn peers(&self) -> &BTreeSet<Subnet> {
        &self.peers
    }

    /// Its segment for packets on their way to other nodes.
    pub fn end_sid(&self) -> Ipv6Addr {
        self.rules.sid(END)
    }

    fn remove(&mut self) -> Result<()> {
        self.owned = false;
        let items: Vec<_> = self.installed.drain(..).chain(self.own.drain(..)).collect();
        self.namespace.netlink(async |netlink| {
            for item in items.iter().rev() {
                item.delete(&netlink).await?;
            }
            netlink::set_tunnel_source(Ipv6Addr::UNSPECIFIED)?;
            Ok(())
        })?;
        let switches = std::mem::take(&mut self.switches);
        self.namespace.run(|| switches.turn_back())?;
        give_pod_addresses(&self.namespace, &[]).map(drop)
    }
}

impl Drop for Seg6Node {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Err(error) = self.remove() {
            tracing::warn!(error = %format!("{error:#}"), "the segments of a kernel node stay behind");
        }
    }
}

/// How many peers the kernel knows, by the routes under segment lists.
///
/// # Errors
/// The kernel refuses to say.
pub fn peers_installed(namespace: &Namespace) -> Result<usize> {
    let routes = namespace.netlink(async |netlink| Ok(netlink.seg6_routes().await?))?;
    let v4 = routes
        .iter()
        .filter(|route| route.destination.addr().is_ipv4())
        .count();
    Ok(v4.max(routes.len() - v4))
}
