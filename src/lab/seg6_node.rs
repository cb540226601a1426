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
//! Nothing runs meanwhile: [`Seg6Node::update`] reads the leases once and makes the kernel agree with them.
//!
//! Limits: the lease is not renewed (labs live for minutes, leases for a day); one underlay link. The node's own sockets
//! are told the inner MTU, but not containers behind it, whose links must have it ([`Seg6Route::inner_mtu_bytes`]); and
//! what is larger all the same, as a long UDP datagram, is not fragmented but lost: the kernel encapsulates first.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use crate::addr::{Ipv6Prefix, MacAddr, Prefix};
use crate::control::config::NetworkConfig;
use crate::host::netlink::{self, Behavior, Gateway, Netlink, Route, Seg6Mode, Seg6Route, Sid};
use crate::host::sysctl;
use crate::lab::cluster::give_pod_addresses;
use crate::lab::leases::{self, LARGEST_JSON, inside, prefixes, snapshot};
use crate::lab::netns::Namespace;
use crate::lease::json::Object;
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::options::StoreKind;

/// The backend's name in configs and leases.
const KIND: &str = "srv6";
/// Where locators are from if the config does not say: the proof of concept's, which knows no other.
const BLOCK: &str = "fd12:3456:789a::/48";
/// What is behind the locator in each segment of a node.
const SOURCE: u128 = 1;
const DX4: u128 = 4;
const DT6: u128 = 6;
const END: u128 = 0xe;

/// What a kernel node is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A node by the rules of Kersey's `srv6` backend: both families inside, any underlay.
    Seg6,
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
        let prefixes = prefixes(self.lease.subnet);
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

/// The locator of the node at an underlay address: the address behind the block.
///
/// # Errors
/// The block leaves no room for an IPv4 address and a segment's own part.
pub fn locator(block: Ipv6Prefix, node: Ipv4Addr) -> Result<Ipv6Prefix> {
    let len = block.len() + 32;
    ensure!(
        len <= 120,
        "{block} is no block for locators made of IPv4 addresses"
    );
    let node = u128::from(node.to_bits()) << (128 - len);
    Ok(Ipv6Prefix::new(
        Ipv6Addr::from_bits(block.addr().to_bits() | node),
        len,
    )?)
}

/// The segment of the node at an underlay address that sends packets on, in a network whose config names no block.
///
/// # Errors
/// None in practice: the block is a constant.
pub fn default_end_sid(node: Ipv4Addr) -> Result<Ipv6Addr> {
    Ok(within(locator(BLOCK.parse()?, node)?, END))
}

fn within(locator: Ipv6Prefix, function: u128) -> Ipv6Addr {
    Ipv6Addr::from_bits(locator.addr().to_bits() | function)
}

/// Everything that decides what the kernel is told.
#[derive(Clone, Debug)]
struct Rules {
    form: Form,
    block: Ipv6Prefix,
    locator: Ipv6Prefix,
    mode: Seg6Mode,
    steering: Vec<Steering>,
    index: u32,
    loopback: u32,
    link_mtu: u32,
    mac: MacAddr,
}

/// Segments that packets to some peers go through first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Steering {
    to: Target,
    via: Vec<Ipv6Addr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// The peer at this underlay address.
    Peer(IpAddr),
    /// Peers whose subnets lie here.
    Overlay(Prefix),
}

impl Rules {
    fn new(
        plan: &Seg6Plan,
        config: &NetworkConfig,
        index: u32,
        loopback: u32,
        link_mtu: u32,
        mac: MacAddr,
    ) -> Result<Self> {
        ensure!(
            config.backend.kind.as_deref() == Some(KIND),
            "the network's backend is {}, and the kernel's SRv6 has to do with {KIND} only",
            config.backend.kind.as_deref().unwrap_or("not named")
        );
        let object = Object::parse(&config.backend.json, LARGEST_JSON)?;
        let block = object
            .parsed("Block", "must be an IPv6 prefix in quotes")?
            .map_or_else(|| BLOCK.parse(), Ok)?;
        let locator = locator(block, plan.v4)?;
        if let Some(len) = object.uint("LocatorLen")? {
            ensure!(
                len == u32::from(locator.len()),
                "a kernel node's locator is {locator}, of its IPv4 address, and LocatorLen {len} another"
            );
        }
        let configured = match object.string("Mode")?.as_deref() {
            None | Some("reduced") => Seg6Mode::EncapRed,
            Some("full") => Seg6Mode::Encap,
            Some(other) => anyhow::bail!("Mode {other:?} is neither reduced nor full"),
        };
        let mode = match plan.form {
            Form::Seg6 => plan.mode.unwrap_or(configured),
            Form::ProofOfConcept => Seg6Mode::Encap,
        };
        let steering = object.raw("Paths").map(Steering::parse).transpose()?;
        let mut steering = steering.unwrap_or_default();
        // Who is the first waypoint does not send packets to itself.
        steering.retain(|steering| {
            steering
                .via
                .first()
                .is_some_and(|&first| !locator.contains(first))
        });
        Ok(Self {
            form: plan.form,
            block,
            locator,
            mode,
            steering,
            index,
            loopback,
            link_mtu: object.uint("MTU")?.filter(|&mtu| mtu > 0).unwrap_or(link_mtu),
            mac,
        })
    }

    fn sid(&self, function: u128) -> Ipv6Addr {
        within(self.locator, function)
    }

    /// What the lease says.
    fn attrs(&self, plan: &Seg6Plan, config: &NetworkConfig) -> LeaseAttrs {
        let mac = BASE64.encode(self.mac.octets());
        let (public_ipv6, data) = match self.form {
            Form::Seg6 => {
                let sid =
                    |function, behavior: &str| json!({ "SID": self.sid(function), "Behavior": behavior });
                let data = json!({
                    "Version": 1,
                    "Locator": self.locator.to_string(),
                    "Source": self.sid(SOURCE),
                    "SIDs": [sid(DX4, "End.DX4"), sid(DT6, "End.DT6"), sid(END, "End")],
                    "MACAddr": mac,
                });
                (Some(plan.v6), data.to_string())
            }
            Form::ProofOfConcept => (None, json!({ "MACAddr": mac }).to_string()),
        };
        let has_v6 = config.v6.is_some() && self.form == Form::Seg6;
        LeaseAttrs {
            public_ip: plan.v4,
            public_ipv6,
            backend_type: KIND.to_owned(),
            backend_v6_data: has_v6.then(|| data.clone()),
            backend_data: Some(data),
        }
    }

    /// What the node needs of itself.
    fn own(&self, pods: &[IpAddr]) -> Vec<Item> {
        let dx4 = Behavior::EndDx4(Ipv4Addr::UNSPECIFIED);
        let sid = |function, behavior| Item::Sid(Sid::new(self.sid(function), self.index, behavior));
        match self.form {
            Form::Seg6 => {
                let dt6 = Behavior::EndDt6 {
                    table: Behavior::MAIN,
                };
                let mut items = vec![
                    Item::Blackhole(self.locator),
                    sid(SOURCE, dx4),
                    sid(DX4, dx4),
                    sid(DT6, dt6),
                    sid(END, Behavior::End),
                ];
                for pod in pods {
                    if let &IpAddr::V6(pod) = pod {
                        items.push(Item::Local(self.loopback, pod));
                    }
                }
                items
            }
            Form::ProofOfConcept => vec![
                Item::Route(Route::direct(self.block.into(), self.index)),
                Item::Neighbour(self.index, self.sid(SOURCE), self.mac),
                sid(SOURCE, dx4),
            ],
        }
    }

    /// What a peer's lease asks for; nothing if it cannot be reached.
    fn towards(&self, lease: &Lease) -> Vec<Item> {
        let Some(peer) = Published::read(&lease.attrs) else {
            return Vec::new();
        };
        let attrs = &lease.attrs;
        // Where a proof of concept looks for a peer's segment, and has its own.
        let mapped = locator(self.block, attrs.public_ip).map(|locator| within(locator, SOURCE));
        let mut items = Vec::new();
        let mut reach = |prefix, last| {
            let via = self.waypoints(attrs, prefix);
            let segments: Vec<_> = via.iter().copied().chain([last]).collect();
            let overhead = self.mode.overhead_bytes(segments.len());
            let fits = self.link_mtu.saturating_sub(overhead);
            let inner_mtu_bytes = match self.form {
                Form::Seg6 => Some(fits),
                Form::ProofOfConcept => None,
            };
            items.push(Item::Encap(Seg6Route {
                destination: prefix,
                index: self.index,
                mode: self.mode,
                segments,
                inner_mtu_bytes,
            }));
        };
        match (self.form, peer, mapped, attrs.public_ipv6) {
            (Form::Seg6, Published::Segments { locator, sids, .. }, _, Some(via)) => {
                for prefix in prefixes(lease.subnet) {
                    if let Some(sid) = decapsulating(&sids, prefix) {
                        reach(prefix, sid);
                    }
                }
                let mut route = Route::direct(locator.into(), self.index);
                route.gateway = Gateway::Via(via.into());
                items.insert(0, Item::Route(route));
            }
            (Form::Seg6, Published::Neighbour(mac), Ok(sid), _) => {
                reach(lease.subnet.v4.into(), sid);
                let route = Route::direct(Prefix::host(sid.into()), self.index);
                items.insert(0, Item::Neighbour(self.index, sid, mac));
                items.insert(0, Item::Route(route));
            }
            (
                Form::ProofOfConcept,
                Published::Segments { mac: Some(mac), .. } | Published::Neighbour(mac),
                Ok(sid),
                _,
            ) => {
                reach(lease.subnet.v4.into(), sid);
                items.insert(0, Item::Neighbour(self.index, sid, mac));
            }
            (Form::Seg6 | Form::ProofOfConcept, _, _, _) => {}
        }
        items
    }

    fn waypoints(&self, attrs: &LeaseAttrs, prefix: Prefix) -> &[Ipv6Addr] {
        if self.form == Form::ProofOfConcept {
            return &[];
        }
        let leads = |steering: &&Steering| match steering.to {
            Target::Peer(IpAddr::V4(addr)) => attrs.public_ip == addr,
            Target::Peer(IpAddr::V6(addr)) => attrs.public_ipv6 == Some(addr),
            Target::Overlay(overlay) => overlay.covers(prefix),
        };
        self.steering
            .iter()
            .find(leads)
            .map_or(&[], |steering| steering.via.as_slice())
    }
}

impl Steering {
    /// Reads the config's `Paths`.
    fn parse(json: &str) -> Result<Vec<Self>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Entry {
            to: String,
            via: Vec<Ipv6Addr>,
        }
        let entries: Vec<Entry> = serde_json::from_str(json).context("Paths cannot be read")?;
        let read = |entry: Entry| {
            let to = entry
                .to
                .parse()
                .map(Target::Peer)
                .or_else(|_| entry.to.parse().map(|prefix| Target::Overlay(Prefix::V4(prefix))))
                .or_else(|_| entry.to.parse().map(|prefix| Target::Overlay(Prefix::V6(prefix))))
                .with_context(|| format!("Paths: {:?} is neither address nor prefix", entry.to))?;
            Ok(Self { to, via: entry.via })
        };
        entries.into_iter().map(read).collect()
    }
}

/// What a peer's lease says of how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Published {
    /// Its segments, and the prefix they are from.
    Segments {
        locator: Ipv6Prefix,
        sids: Vec<Segment>,
        mac: Option<MacAddr>,
    },
    /// Its Ethernet address alone, as a proof of concept publishes it.
    Neighbour(MacAddr),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Segment {
    #[serde(rename = "SID")]
    sid: Ipv6Addr,
    #[serde(rename = "Behavior")]
    behavior: String,
}

impl Published {
    /// `None` if the peer speaks no SRv6, or its data cannot be read.
    fn read(attrs: &LeaseAttrs) -> Option<Self> {
        if attrs.backend_type != KIND {
            return None;
        }
        let data = attrs.backend_data.as_ref().or(attrs.backend_v6_data.as_ref())?;
        let object = Object::parse(data, LARGEST_JSON).ok()?;
        let mac = object
            .string("MACAddr")
            .ok()?
            .and_then(|text| BASE64.decode(text).ok())
            .and_then(|bytes| <[u8; 6]>::try_from(bytes).ok())
            .map(MacAddr::from);
        let Some(sids) = object.raw("SIDs") else {
            return mac.map(Self::Neighbour);
        };
        Some(Self::Segments {
            locator: object.parsed("Locator", "must be an IPv6 prefix").ok()??,
            sids: serde_json::from_str(sids).ok()?,
            mac,
        })
    }
}

/// A peer's segment for packets to `prefix`.
fn decapsulating(sids: &[Segment], prefix: Prefix) -> Option<Ipv6Addr> {
    let behaviors = match prefix {
        Prefix::V4(_) => ["End.DT46", "End.DT4", "End.DX4"],
        Prefix::V6(_) => ["End.DT46", "End.DT6", "End.DX6"],
    };
    let find = |behavior| sids.iter().find(|segment| segment.behavior == behavior);
    behaviors.into_iter().find_map(find).map(|segment| segment.sid)
}

/// One thing the kernel is told.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Item {
    Route(Route),
    Neighbour(u32, Ipv6Addr, MacAddr),
    Encap(Seg6Route),
    Sid(Sid),
    Blackhole(Ipv6Prefix),
    Local(u32, Ipv6Addr),
}

impl Item {
    async fn set(&self, netlink: &Netlink) -> Result<()> {
        match self {
            Self::Route(route) => netlink.replace_route(route).await?,
            Self::Neighbour(index, addr, mac) => {
                netlink
                    .set_neighbour(*index, (*addr).into(), mac.octets())
                    .await?;
            }
            Self::Encap(route) => netlink.replace_seg6_route(route).await?,
            Self::Sid(sid) => netlink.replace_sid(sid).await?,
            Self::Blackhole(prefix) => netlink.replace_blackhole(*prefix).await?,
            Self::Local(index, addr) => netlink.replace_local_route(*index, *addr).await?,
        }
        Ok(())
    }

    async fn delete(&self, netlink: &Netlink) -> Result<()> {
        match self {
            Self::Route(route) => netlink.delete_route(route).await?,
            Self::Neighbour(index, addr, _) => netlink.delete_neighbour(*index, (*addr).into()).await?,
            Self::Encap(route) => netlink.delete_seg6_route(route).await?,
            Self::Sid(sid) => netlink.delete_sid(sid).await?,
            Self::Blackhole(prefix) => netlink.delete_blackhole(*prefix).await?,
            Self::Local(index, addr) => netlink.delete_local_route(*index, *addr).await?,
        }
        Ok(())
    }
}

/// Makes the kernel have `wanted`; `installed` is what it has, and stays true if this fails half-way.
async fn install(netlink: &Netlink, installed: &mut Vec<Item>, wanted: &[Item]) -> Result<()> {
    let (kept, gone): (Vec<_>, Vec<_>) = installed.drain(..).partition(|item| wanted.contains(item));
    *installed = kept;
    // What goes first may make way for what comes: two routes to one destination are one to the kernel.
    let mut gone = gone.into_iter().rev();
    while let Some(item) = gone.next() {
        if let Err(error) = item.delete(netlink).await {
            installed.push(item);
            installed.extend(gone);
            return Err(error);
        }
    }
    for item in wanted {
        if !installed.contains(item) {
            item.set(netlink).await?;
            installed.push(item.clone());
        }
    }
    Ok(())
}

/// Kernel switches as they were before this node's.
#[derive(Debug, Default)]
struct Switches(Vec<(String, String)>);

impl Switches {
    /// Turns on what SRv6 needs, in the caller's namespace: the underlay link takes routing headers, and the node
    /// forwards what comes out of them.
    fn turn_on(&mut self, interface: &str) -> Result<()> {
        self.set("ipv4/ip_forward".to_owned(), "1")?;
        self.set("ipv6/conf/all/forwarding".to_owned(), "1")?;
        for scope in ["all", interface] {
            self.set(format!("ipv6/conf/{scope}/seg6_enabled"), "1")?;
            self.set(format!("ipv6/conf/{scope}/seg6_require_hmac"), "0")?;
        }
        Ok(())
    }

    fn set(&mut self, key: String, value: &str) -> Result<()> {
        let old = fs::read_to_string(Path::new("/proc/sys/net").join(&key))
            .with_context(|| format!("this kernel has no switch {key}"))?;
        sysctl::set(&key, value)?;
        self.0.push((key, old.trim().to_owned()));
        Ok(())
    }

    fn turn_back(self) -> Result<()> {
        for (key, value) in self.0.iter().rev() {
            sysctl::set(key, value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Expiration;

    const KERSEY: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8:1::1","BackendType":"srv6","BackendData":
        {"Version":1,"Locator":"fd12:3456:789a:c000:201::/80","Source":"fd12:3456:789a:c000:201::1","SIDs":[
        {"SID":"fd12:3456:789a:c000:201::e","Behavior":"End"},
        {"SID":"fd12:3456:789a:c000:201::1","Behavior":"End.DT46"}],"ECN":true,"MACAddr":"AgAAAAoB"}}"#;
    const SEG6: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8:1::1","BackendType":"srv6","BackendData":
        {"Version":1,"Locator":"fd12:3456:789a:c000:201::/80","SIDs":[
        {"SID":"fd12:3456:789a:c000:201::4","Behavior":"End.DX4"},
        {"SID":"fd12:3456:789a:c000:201::6","Behavior":"End.DT6"}]}}"#;
    const OLD: &str = r#"{"PublicIP":"192.0.2.1","BackendType":"srv6","BackendData":{"MACAddr":"AgAAAAoB"}}"#;

    #[test]
    fn each_family_goes_to_a_segment_that_takes_it() {
        let rules = rules(Form::Seg6, r#"{"Type":"srv6"}"#);
        for (what, peer, expected) in [
            ("one for both", KERSEY, vec!["[201::1] 1460", "[201::1] 1460"]),
            ("one for each", SEG6, vec!["[201::4] 1460", "[201::6] 1460"]),
            ("an old one, IPv4 only", OLD, vec!["[201::1] 1460"]),
        ] {
            assert_eq!(encaps(&rules.towards(&lease(peer))), expected, "{what}");
        }
        for bad in [
            SEG6.replace("srv6", "vxlan"),
            SEG6.replace("/80", "/800"),
            SEG6.replace(r#""PublicIPv6":"2001:db8:1::1","#, ""),
            OLD.replace("AgAAAAoB", "02:00:00:00:0a:01"),
        ] {
            assert_eq!(rules.towards(&lease(&bad)), [], "{bad}");
        }
    }

    #[test]
    fn a_locator_is_reached_by_a_router_and_an_old_peer_by_its_ethernet_address() {
        let rules = rules(Form::Seg6, r#"{"Type":"srv6"}"#);
        let items = rules.towards(&lease(KERSEY));
        let Some(Item::Route(route)) = items.first() else {
            panic!("{items:?}");
        };
        assert_eq!(route.destination.to_string(), "fd12:3456:789a:c000:201::/80");
        assert_eq!(route.gateway, Gateway::Via("2001:db8:1::1".parse().unwrap()));

        let sid: Ipv6Addr = "fd12:3456:789a:c000:201::1".parse().unwrap();
        let mac = MacAddr::from([2, 0, 0, 0, 0x0a, 1]);
        let items = rules.towards(&lease(OLD));
        assert_eq!(items[1], Item::Neighbour(7, sid, mac));
    }

    #[test]
    fn a_proof_of_concept_looks_at_addresses_only() {
        let rules = rules(Form::ProofOfConcept, r#"{"Type":"srv6","Mode":"reduced"}"#);
        for peer in [KERSEY, OLD] {
            let items = rules.towards(&lease(peer));
            assert_eq!(encaps(&items), ["[201::1] -"], "{peer}");
            assert_eq!(items.len(), 2, "{peer}");
        }
        assert_eq!(rules.towards(&lease(SEG6)), [], "there is no Ethernet address");
        let attrs = rules.attrs(&plan(Form::ProofOfConcept), &config(r#"{"Type":"srv6"}"#));
        assert_eq!(attrs.backend_data.unwrap(), r#"{"MACAddr":"AgAAAAAJ"}"#);
        assert_eq!((attrs.public_ipv6, attrs.backend_v6_data), (None, None));
    }

    #[test]
    fn paths_lead_through_waypoints_except_from_there() {
        let paths = |to: &str, via: &str| {
            format!(
                r#"{{"Type":"srv6","Mode":"full","Paths":[{{"To":"{to}","Via":["fd12:3456:789a:c000:2{via}::e"]}}]}}"#
            )
        };
        let through = ["[203::e, 201::1] 1420", "[203::e, 201::1] 1420"];
        let straight = ["[201::1] 1436", "[201::1] 1436"];
        for (to, via, expected) in [
            ("192.0.2.1", "03", through),
            ("2001:db8:1::1", "03", through),
            ("10.244.0.0/16", "03", [through[0], straight[1]]),
            ("fd00:10:244:1::/64", "03", [straight[0], through[1]]),
            ("192.0.2.7", "03", straight),
            ("192.0.2.1", "09", straight),
        ] {
            let rules = rules(Form::Seg6, &paths(to, via));
            assert_eq!(encaps(&rules.towards(&lease(KERSEY))), expected, "{to} {via}");
        }
    }

    #[test]
    fn what_a_node_publishes_it_reads_as_a_peer() {
        let rules = rules(Form::Seg6, r#"{"Type":"srv6"}"#);
        let attrs = rules.attrs(&plan(Form::Seg6), &config(r#"{"Type":"srv6"}"#));
        assert_eq!(attrs.backend_data, attrs.backend_v6_data);
        let published = Published::read(&attrs).unwrap();
        let Published::Segments { locator, sids, mac } = published else {
            panic!("{published:?}");
        };
        assert_eq!((locator, mac), (rules.locator, Some(rules.mac)));
        let sids: Vec<_> = sids
            .iter()
            .map(|sid| format!("{} {}", sid.sid, sid.behavior))
            .collect();
        assert_eq!(
            sids,
            [
                "fd12:3456:789a:c000:209::4 End.DX4",
                "fd12:3456:789a:c000:209::6 End.DT6",
                "fd12:3456:789a:c000:209::e End",
            ]
        );
        assert_eq!(default_end_sid(plan(Form::Seg6).v4).unwrap(), rules.sid(END));
    }

    #[test]
    fn a_config_that_cannot_be_followed_is_refused() {
        for bad in [
            r#"{"Type":"vxlan"}"#,
            r#"{"Type":"srv6","Block":"fd00::/100"}"#,
            r#"{"Type":"srv6","LocatorLen":64}"#,
            r#"{"Type":"srv6","Mode":"inline"}"#,
            r#"{"Type":"srv6","Paths":[{"To":"node 1","Via":[]}]}"#,
        ] {
            assert!(read(Form::Seg6, bad).is_err(), "{bad}");
        }
        let other = r#"{"Type":"srv6","Block":"fd45::/32","LocatorLen":64,"MTU":1400}"#;
        let other = read(Form::Seg6, other).unwrap();
        assert_eq!(other.locator.to_string(), "fd45:0:c000:209::/64");
        assert_eq!(encaps(&other.towards(&lease(SEG6)))[0], "[201::4] 1360");
    }

    /// Segment lists, without what is alike in all of them, and inner MTUs.
    fn encaps(items: &[Item]) -> Vec<String> {
        let show = |item: &Item| {
            let Item::Encap(route) = item else {
                return None;
            };
            let segments: Vec<_> = route
                .segments
                .iter()
                .map(|segment| segment.to_string().replace("fd12:3456:789a:c000:", ""))
                .collect();
            let mtu = route.inner_mtu_bytes;
            let mtu = mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string());
            Some(format!("[{}] {mtu}", segments.join(", ")))
        };
        items.iter().filter_map(show).collect()
    }

    fn rules(form: Form, backend: &str) -> Rules {
        read(form, backend).unwrap()
    }

    fn read(form: Form, backend: &str) -> Result<Rules> {
        let mac = MacAddr::from([2, 0, 0, 0, 0, 9]);
        Rules::new(&plan(form), &config(backend), 7, 1, 1500, mac)
    }

    fn config(backend: &str) -> NetworkConfig {
        let text = format!(
            r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","Backend":{backend}}}"#
        );
        NetworkConfig::parse(&text).unwrap()
    }

    fn plan(form: Form) -> Seg6Plan {
        Seg6Plan {
            store: StoreKind::Remote(crate::options::RemoteOptions::plain(Vec::new())),
            interface: "eth0".to_owned(),
            v4: [192, 0, 2, 9].into(),
            v6: "2001:db8:1::9".parse().unwrap(),
            form,
            mode: None,
            subnet: None,
        }
    }

    fn lease(attrs: &str) -> Lease {
        Lease {
            subnet: "10.244.1.0-24&fd00:10:244:1::-64".parse().unwrap(),
            attrs: LeaseAttrs::from_json(attrs.as_bytes()).unwrap(),
            expiration: Expiration::Never,
            created: None,
        }
    }
}
