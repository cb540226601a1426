//! A node whose tunnel is the kernel's own VXLAN, set up as flannel sets it up.
//!
//! It is what Kersey's `vxlan` backend has to get on with: it takes a lease in the network's store, publishes the
//! Ethernet addresses of its devices there, and installs what flannel installs for each lease of another node.
//!
//! ```text
//!   the node's namespace
//!     lo            pod address, the third of the lease
//!     flannel.1     10.244.2.0/32       local 192.0.2.2       MTU link - 50
//!     flannel-v6.1  fd00:10:244:2::/128 local 2001:db8:1::2   MTU link - 70
//!
//!   for a peer 10.244.1.0/24 at 192.0.2.1 with VtepMAC aa:…
//!     neighbour  10.244.1.0 → aa:…                                    permanent
//!     FDB        aa:… → 192.0.2.1                                     permanent, self
//!     route      10.244.1.0/24 via 10.244.1.0 dev flannel.1 onlink
//! ```
//!
//! Which device carries what follows from the addresses the node is given ([`Underlay`]): inner packets take the
//! device of their own family where both nodes have one, else the other. So one underlay address alone makes IPv6
//! travel over IPv4, or IPv4 over IPv6, which flannel does not do but the kernel and Kersey can.
//!
//! Nothing runs meanwhile: [`KernelNode::update`] reads the leases once and makes the kernel agree with them.
//!
//! Limits: the lease is not renewed (labs live for minutes, leases for a day); `DirectRouting`, `GBP`, `Learning` and
//! `MTU` of the network config are not looked at.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::addr::{MacAddr, Prefix, Vni};
use crate::control::config::NetworkConfig;
use crate::host::netlink::{Gateway, Link, Netlink, Route, Vxlan};
use crate::host::sysctl;
use crate::lab::cluster::{VXLAN_PORT, give_pod_addresses};
use crate::lab::leases::{self, LARGEST_JSON, inside, snapshot};
use crate::lab::netns::Namespace;
use crate::lease::json::Object;
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::options::StoreKind;

/// The backend's name in configs and leases.
const KIND: &str = "vxlan";
/// flannel's VNI where the config names none.
const DEFAULT_VNI: u32 = 1;
/// What flannel subtracts: outer IPv4, UDP and VXLAN headers, and the inner Ethernet header.
const OVERHEAD_V4: u32 = 20 + 8 + 8 + 14;
/// The same over IPv6. flannel asks for 20 bytes more and the kernel does not give them.
const OVERHEAD_V6: u32 = 40 + 8 + 8 + 14;

/// Where other nodes reach a node: one address a family, at least one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// IPv4 address, if it is to have a device over IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address, if it is to have a device over IPv6.
    pub v6: Option<Ipv6Addr>,
}

/// How a node is to take part.
#[derive(Clone, Debug)]
pub struct KernelPlan {
    /// Where config and leases are, as seen from the node's namespace.
    pub store: StoreKind,
    /// The link that holds the underlay addresses.
    pub interface: String,
    /// Those addresses.
    pub underlay: Underlay,
    /// The subnet to ask for, if it is to be a certain one.
    pub subnet: Option<Subnet>,
}

/// Which of a node's devices, by the family of the underlay it uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// The one over IPv4, `flannel.<VNI>`.
    V4,
    /// The one over IPv6, `flannel-v6.<VNI>`.
    V6,
}

impl Carrier {
    /// The device for packets to an underlay address.
    pub fn to(underlay: IpAddr) -> Self {
        match underlay {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// A node in place. Dropping it removes the devices and leaves the lease, as a node that dies does;
/// [`KernelNode::leave`] gives the lease back too.
#[derive(Debug)]
pub struct KernelNode {
    namespace: Namespace,
    plan: KernelPlan,
    vni: Vni,
    devices: Devices,
    lease: Lease,
    pods: Vec<IpAddr>,
    peers: BTreeSet<Subnet>,
    installed: BTreeSet<Path>,
    owned: bool,
}

impl KernelNode {
    /// Makes the devices, takes a lease and gives the node its pod addresses. It knows no peers before
    /// [`KernelNode::update`].
    ///
    /// # Errors
    /// The store does not answer, the network is no VXLAN network, or this kernel has no VXLAN.
    pub fn join(namespace: &Namespace, plan: KernelPlan) -> Result<Self> {
        let (vni, devices, lease) = inside(namespace, &plan.store, async |netlink, store| {
            let config = NetworkConfig::parse(&store.config().await?)?;
            let (vni, port) = settings(&config)?;
            let devices = Devices::make(netlink, &plan, vni, port).await?;
            let lease = async {
                let attrs = devices.attrs(&config, plan.underlay)?;
                let lease = store.acquire(&attrs, plan.subnet).await?;
                devices.configure(netlink, lease.subnet).await?;
                Ok(lease)
            };
            match lease.await {
                Ok(lease) => Ok((vni, devices, lease)),
                Err(error) => {
                    devices.remove(netlink).await?;
                    Err(error)
                }
            }
        })
        .context("cannot set up a node with the kernel's VXLAN")?;
        // From here on the guard removes what was made.
        let mut node = Self {
            namespace: Namespace::existing(namespace.name())?,
            plan,
            vni,
            devices,
            lease,
            pods: Vec::new(),
            peers: BTreeSet::new(),
            installed: BTreeSet::new(),
            owned: true,
        };
        node.pods = give_pod_addresses(&node.namespace, &node.subnets())?;
        Ok(node)
    }

    /// Reads all leases and makes neighbours, forwarding entries and routes agree with them.
    ///
    /// # Errors
    /// The store does not answer, or the kernel refuses.
    pub fn update(&mut self) -> Result<()> {
        let (devices, own, underlay) = (&self.devices, self.lease.subnet, self.plan.underlay);
        let installed = &mut self.installed;
        self.peers = inside(&self.namespace, &self.plan.store, async |netlink, store| {
            let mut leases = snapshot(store).await?;
            leases.retain(|lease| lease.subnet != own);
            let paths = |lease: &Lease| Path::all(lease, underlay);
            let wanted: BTreeSet<_> = leases.iter().flat_map(paths).collect();
            devices.install(netlink, installed, &wanted).await?;
            let reached = leases.iter().filter(|lease| !paths(lease).is_empty());
            Ok(reached.map(|lease| lease.subnet).collect())
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

    /// Gives a device another Ethernet address and publishes it. The kernel forgets the device's neighbours over it, so
    /// the node is deaf and dumb until the next [`KernelNode::update`].
    ///
    /// # Errors
    /// There is no such device, the kernel refuses, or the store does.
    pub fn set_mac(&mut self, carrier: Carrier, mac: MacAddr) -> Result<()> {
        let device = self.devices.get_mut(carrier)?;
        inside(&self.namespace, &self.plan.store, async |netlink, _| {
            Ok(netlink.set_mac(device.index, mac.octets()).await?)
        })?;
        device.mac = mac;
        self.installed.clear();
        let (devices, lease, underlay) = (&self.devices, &self.lease, self.plan.underlay);
        self.lease = inside(&self.namespace, &self.plan.store, async |_, store| {
            let config = NetworkConfig::parse(&store.config().await?)?;
            let lease = Lease {
                attrs: devices.attrs(&config, underlay)?,
                ..lease.clone()
            };
            Ok(store.renew(&lease).await?)
        })?;
        Ok(())
    }

    /// Moves the node to another underlay address, in place of the one of that family, and publishes it.
    ///
    /// To flannel a node is its public address, so another one cannot renew its lease: the lease is given back and
    /// the same subnet taken again.
    ///
    /// # Errors
    /// The node has no device over that family, the kernel refuses, or the store does.
    pub fn move_to(&mut self, addr: IpAddr) -> Result<()> {
        let device = self.devices.get_mut(Carrier::to(addr))?;
        let (old, vni, interface) = (device.local, self.vni, &self.plan.interface);
        // Else the second address would go with the first.
        self.namespace
            .sysctl(&format!("ipv4/conf/{interface}/promote_secondaries"), "1")?;
        self.namespace.netlink(async |netlink| {
            let link = netlink.link(interface).await?.index;
            let held = netlink.addresses().await?;
            let len = held
                .iter()
                .find(|held| held.index == link && held.addr == old)
                .map(|held| held.prefix_len)
                .with_context(|| format!("{interface} does not have {old}"))?;
            netlink.add_address(link, addr, len).await?;
            netlink.set_vxlan_local(&device.name, vni.get(), addr).await?;
            Ok(netlink.delete_address(link, old, len).await?)
        })?;
        device.local = addr;
        match addr {
            IpAddr::V4(addr) => self.plan.underlay.v4 = Some(addr),
            IpAddr::V6(addr) => self.plan.underlay.v6 = Some(addr),
        }
        let (devices, subnet, underlay) = (&self.devices, self.lease.subnet, self.plan.underlay);
        self.lease = inside(&self.namespace, &self.plan.store, async |_, store| {
            let config = NetworkConfig::parse(&store.config().await?)?;
            store.revoke(subnet).await?;
            let attrs = devices.attrs(&config, underlay)?;
            Ok(store.acquire(&attrs, Some(subnet)).await?)
        })?;
        ensure!(
            self.lease.subnet == subnet,
            "{subnet} went to another node meanwhile"
        );
        Ok(())
    }

    /// Gives the lease back and removes the devices.
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

    /// Name and Ethernet address of a device, if the node has it.
    pub fn device(&self, carrier: Carrier) -> Option<(&str, MacAddr)> {
        let device = self.devices.get(carrier)?;
        Some((&device.name, device.mac))
    }

    /// The names of its devices.
    pub fn device_names(&self) -> Vec<String> {
        self.devices.iter().map(|device| device.name.clone()).collect()
    }

    fn remove(&mut self) -> Result<()> {
        self.owned = false;
        let devices = &self.devices;
        self.namespace
            .netlink(async |netlink| devices.remove(&netlink).await)?;
        give_pod_addresses(&self.namespace, &[]).map(drop)
    }
}

impl Drop for KernelNode {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Err(error) = self.remove() {
            tracing::warn!(error = %format!("{error:#}"), "the devices of a kernel node stay behind");
        }
    }
}

/// How many peers the kernel knows over such devices, by what is installed there.
///
/// # Errors
/// A device is gone.
pub fn peers_installed(namespace: &Namespace, devices: &[String]) -> Result<usize> {
    namespace.netlink(async |netlink| {
        let mut most = 0;
        for name in devices {
            let index = netlink.link(name).await?.index;
            let routes = netlink.own_routes().await?;
            let over = |route: &&Route| route.index == index && matches!(route.gateway, Gateway::OnLink(_));
            let (v4, v6): (Vec<_>, Vec<_>) = routes
                .iter()
                .filter(over)
                .partition(|route| route.destination.addr().is_ipv4());
            most = most.max(v4.len()).max(v6.len());
        }
        Ok(most)
    })
}

/// One VXLAN device.
#[derive(Clone, Debug)]
struct Device {
    name: String,
    index: u32,
    mac: MacAddr,
    local: IpAddr,
}

impl Device {
    async fn make(netlink: &Netlink, link: &Link, vni: Vni, port: u16, local: IpAddr) -> Result<Self> {
        let (name, overhead) = match local {
            IpAddr::V4(_) => (format!("flannel.{vni}"), OVERHEAD_V4),
            IpAddr::V6(_) => (format!("flannel-v6.{vni}"), OVERHEAD_V6),
        };
        let vxlan = Vxlan {
            name: &name,
            vni: vni.get(),
            underlay_index: link.index,
            local,
            port,
            mtu_bytes: link.mtu_bytes.saturating_sub(overhead),
        };
        netlink.add_vxlan(&vxlan).await?;
        sysctl::no_link_local_address(&name)?;
        // As flannel does; a kernel without IPv6 has no such switch.
        let _ = sysctl::set(&format!("ipv6/conf/{name}/accept_ra"), "0");
        let made = netlink.link(&name).await?;
        Ok(Self {
            index: made.index,
            mac: made.mac.context("a VXLAN device has an Ethernet address")?.into(),
            name,
            local,
        })
    }
}

/// A node's devices; there is at least one.
#[derive(Clone, Debug)]
struct Devices {
    v4: Option<Device>,
    v6: Option<Device>,
}

impl Devices {
    async fn make(netlink: &Netlink, plan: &KernelPlan, vni: Vni, port: u16) -> Result<Self> {
        let link = netlink.link(&plan.interface).await?;
        let mut devices = Self { v4: None, v6: None };
        let mut made = Ok(());
        if let Some(local) = plan.underlay.v4 {
            match Device::make(netlink, &link, vni, port, local.into()).await {
                Ok(device) => devices.v4 = Some(device),
                Err(error) => made = Err(error),
            }
        }
        if let (Some(local), Ok(())) = (plan.underlay.v6, &made) {
            match Device::make(netlink, &link, vni, port, local.into()).await {
                Ok(device) => devices.v6 = Some(device),
                Err(error) => made = Err(error),
            }
        }
        if devices.iter().next().is_none() && made.is_ok() {
            bail!("a kernel node needs an underlay address");
        }
        if let Err(error) = made {
            devices.remove(netlink).await?;
            return Err(error);
        }
        Ok(devices)
    }

    fn iter(&self) -> impl Iterator<Item = &Device> {
        self.v4.iter().chain(&self.v6)
    }

    fn get(&self, carrier: Carrier) -> Option<&Device> {
        match carrier {
            Carrier::V4 => self.v4.as_ref(),
            Carrier::V6 => self.v6.as_ref(),
        }
    }

    fn get_mut(&mut self, carrier: Carrier) -> Result<&mut Device> {
        let device = match carrier {
            Carrier::V4 => self.v4.as_mut(),
            Carrier::V6 => self.v6.as_mut(),
        };
        device.context("the kernel node has no device over that family")
    }

    /// The device that belongs to an inner family: its own, else the only one there is.
    fn of(&self, inner: Prefix) -> Result<&Device> {
        let device = match inner {
            Prefix::V4(_) => self.v4.as_ref().or(self.v6.as_ref()),
            Prefix::V6(_) => self.v6.as_ref().or(self.v4.as_ref()),
        };
        device.context("a kernel node has a device")
    }

    /// What the lease says: addresses, and for each family of the network the Ethernet address of its device.
    fn attrs(&self, config: &NetworkConfig, underlay: Underlay) -> Result<LeaseAttrs> {
        let data = |inner: Prefix| -> Result<String> {
            let vni = settings(config)?.0;
            let mac = self.of(inner)?.mac;
            Ok(format!(r#"{{"VNI":{vni},"VtepMAC":"{mac}"}}"#))
        };
        Ok(LeaseAttrs {
            public_ip: underlay.v4.unwrap_or(Ipv4Addr::UNSPECIFIED),
            public_ipv6: underlay.v6,
            backend_type: KIND.to_owned(),
            backend_data: config.v4.map(|range| data(range.network.into())).transpose()?,
            backend_v6_data: config.v6.map(|range| data(range.network.into())).transpose()?,
        })
    }

    /// Puts each half of the subnet on its device, and brings the devices up.
    async fn configure(&self, netlink: &Netlink, subnet: Subnet) -> Result<()> {
        for prefix in subnet.prefixes() {
            let device = self.of(prefix)?;
            let len = if prefix.addr().is_ipv4() { 32 } else { 128 };
            netlink.add_address(device.index, prefix.addr(), len).await?;
        }
        for device in self.iter() {
            netlink.set_up(device.index).await?;
        }
        Ok(())
    }

    /// Makes the kernel have `wanted`; `installed` is what it has, and stays true if this fails half-way.
    async fn install(
        &self,
        netlink: &Netlink,
        installed: &mut BTreeSet<Path>,
        wanted: &BTreeSet<Path>,
    ) -> Result<()> {
        let (gone, new) = changes(installed, wanted);
        for path in gone {
            let device = self.at(path)?;
            netlink.delete_neighbour(device.index, path.prefix.addr()).await?;
            if !wanted.iter().any(|other| other.shares_entry(path)) {
                netlink.delete_fdb(device.index, path.mac.octets()).await?;
            }
            netlink.delete_route(&path.route(device.index)).await?;
            installed.remove(&path);
        }
        for path in new {
            let device = self.at(path)?;
            let mac = path.mac.octets();
            netlink
                .set_neighbour(device.index, path.prefix.addr(), mac)
                .await?;
            netlink.set_fdb(device.index, mac, path.underlay).await?;
            netlink.replace_route(&path.route(device.index)).await?;
            installed.insert(path);
        }
        Ok(())
    }

    fn at(&self, path: Path) -> Result<&Device> {
        self.get(Carrier::to(path.underlay))
            .context("a path leads over a device there is")
    }

    async fn remove(&self, netlink: &Netlink) -> Result<()> {
        for device in self.iter() {
            netlink.delete_link(device.index).await?;
        }
        Ok(())
    }
}

/// The way to one subnet of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Path {
    prefix: Prefix,
    mac: MacAddr,
    underlay: IpAddr,
}

impl Path {
    /// The ways to a peer: one a family, if it speaks VXLAN and can be reached.
    fn all(lease: &Lease, ours: Underlay) -> Vec<Self> {
        if lease.attrs.backend_type != KIND {
            return Vec::new();
        }
        let path = |prefix| {
            let underlay = underlay_of(prefix, &lease.attrs, ours)?;
            let mac = vtep_mac(&lease.attrs, underlay)?;
            Some(Self {
                prefix,
                mac,
                underlay,
            })
        };
        lease.subnet.prefixes().filter_map(path).collect()
    }

    /// Whether both need the same forwarding entry: a device has one for each Ethernet address.
    fn shares_entry(self, other: Self) -> bool {
        self.mac == other.mac && self.underlay.is_ipv4() == other.underlay.is_ipv4()
    }

    fn route(self, index: u32) -> Route {
        let mut route = Route::direct(self.prefix, index);
        route.gateway = Gateway::OnLink(self.prefix.addr());
        route
    }
}

/// What has to go and what has to come for `wanted` to be in place of `installed`.
fn changes(installed: &BTreeSet<Path>, wanted: &BTreeSet<Path>) -> (Vec<Path>, Vec<Path>) {
    let gone = installed.difference(wanted).copied().collect();
    let new = wanted.difference(installed).copied().collect();
    (gone, new)
}

/// Where a peer is reached for `prefix`: over the prefix's own family if both sides have it, else over the other.
fn underlay_of(prefix: Prefix, attrs: &LeaseAttrs, ours: Underlay) -> Option<IpAddr> {
    let v4 = (!attrs.public_ip.is_unspecified() && ours.v4.is_some()).then_some(attrs.public_ip.into());
    let v6 = attrs.public_ipv6.filter(|_| ours.v6.is_some()).map(IpAddr::from);
    match prefix {
        Prefix::V4(_) => v4.or(v6),
        Prefix::V6(_) => v6.or(v4),
    }
}

/// The Ethernet address of a peer's device over the family of `underlay`; a peer with one device may name it under the
/// other family only.
fn vtep_mac(attrs: &LeaseAttrs, underlay: IpAddr) -> Option<MacAddr> {
    let (own, other) = match underlay {
        IpAddr::V4(_) => (&attrs.backend_data, &attrs.backend_v6_data),
        IpAddr::V6(_) => (&attrs.backend_v6_data, &attrs.backend_data),
    };
    let read = |data: &String| {
        let object = Object::parse(data, LARGEST_JSON).ok()?;
        object.parsed("VtepMAC", "must be an Ethernet address").ok()?
    };
    own.as_ref()
        .and_then(read)
        .or_else(|| other.as_ref().and_then(read))
}

/// VNI and port of a network.
fn settings(config: &NetworkConfig) -> Result<(Vni, u16)> {
    ensure!(
        config.backend.kind.as_deref() == Some(KIND),
        "the network's backend is {}, and the kernel's VXLAN has to do with {KIND} only",
        config.backend.kind.as_deref().unwrap_or("not named")
    );
    let object = Object::parse(&config.backend.json, LARGEST_JSON)?;
    let vni = Vni::new(object.uint("VNI")?.unwrap_or(DEFAULT_VNI))?;
    let port = match object.uint("Port")? {
        None | Some(0) => VXLAN_PORT,
        Some(port) => u16::try_from(port).context("the network's port is no UDP port")?,
    };
    Ok((vni, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::Expiration;

    const DUAL: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan",
        "BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:04"},
        "BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:06"}}"#;
    const ONLY_V4: &str = r#"{"PublicIP":"192.0.2.1","BackendType":"vxlan",
        "BackendData":{"VtepMAC":"02:00:00:00:00:04"}}"#;
    const ONLY_V6: &str = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::1","BackendType":"vxlan",
        "BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:06"}}"#;

    #[test]
    fn a_path_takes_the_device_of_its_family_and_else_the_other() {
        let (four, six) = ("192.0.2.1 …:04", "2001:db8::1 …:06");
        let both = (true, true);
        for (what, peer, ours, expected) in [
            ("both have both", DUAL, both, vec![four, six]),
            ("the peer has IPv4 only", ONLY_V4, both, vec![four, four]),
            ("the peer has IPv6 only", ONLY_V6, both, vec![six, six]),
            ("we have IPv4 only", DUAL, (true, false), vec![four, four]),
            ("we have IPv6 only", DUAL, (false, true), vec![six, six]),
            ("nothing in common", ONLY_V4, (false, true), vec![]),
        ] {
            let paths: Vec<_> = Path::all(&lease(peer), underlay(ours))
                .iter()
                .map(|path| format!("{} …:{:02x}", path.underlay, path.mac.octets()[5]))
                .collect();
            assert_eq!(paths, expected, "{what}");
        }
    }

    #[test]
    fn a_peer_without_vxlan_has_no_path() {
        for text in [
            r#"{"PublicIP":"192.0.2.1"}"#,
            r#"{"PublicIP":"192.0.2.1","BackendType":"host-gw"}"#,
            r#"{"PublicIP":"192.0.2.1","BackendType":"vxlan"}"#,
            r#"{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{"VtepMAC":"nonsense"}}"#,
        ] {
            assert_eq!(Path::all(&lease(text), underlay((true, true))), [], "{text}");
        }
    }

    #[test]
    fn a_new_ethernet_address_replaces_the_path_and_nothing_else() {
        let ours = underlay((true, true));
        let installed: BTreeSet<_> = Path::all(&lease(DUAL), ours).into_iter().collect();
        assert_eq!(changes(&installed, &installed), (vec![], vec![]));

        let changed = DUAL.replace("00:04", "00:14");
        let wanted: BTreeSet<_> = Path::all(&lease(&changed), ours).into_iter().collect();
        let (gone, new) = changes(&installed, &wanted);

        assert_eq!((gone.len(), new.len()), (1, 1));
        assert_eq!(gone[0].prefix, new[0].prefix);
        assert_eq!(new[0].mac.to_string(), "02:00:00:00:00:14");
        assert!(!wanted.iter().any(|other| other.shares_entry(gone[0])));
    }

    #[test]
    fn both_families_over_one_device_share_their_forwarding_entry() {
        let paths = Path::all(&lease(DUAL), underlay((true, false)));
        assert_eq!(paths.len(), 2);
        assert!(paths[0].shares_entry(paths[1]));
        let apart = Path::all(&lease(DUAL), underlay((true, true)));
        assert!(!apart[0].shares_entry(apart[1]));
    }

    #[test]
    fn what_the_config_leaves_out_is_as_in_flannel() {
        let read = |backend: &str| {
            let text = format!(r#"{{"Network":"10.244.0.0/16","Backend":{backend}}}"#);
            settings(&NetworkConfig::parse(&text).unwrap()).map(|(vni, port)| (vni.get(), port))
        };
        assert_eq!(read(r#"{"Type":"vxlan"}"#).unwrap(), (1, 8472));
        assert_eq!(
            read(r#"{"Type":"vxlan","VNI":7,"Port":4789}"#).unwrap(),
            (7, 4789)
        );
        assert_eq!(read(r#"{"Type":"vxlan","Port":0}"#).unwrap(), (1, 8472));
        for bad in [
            r#"{"Type":"udp"}"#,
            r#"{"Type":"vxlan","VNI":16777216}"#,
            r#"{"Type":"vxlan","Port":70000}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
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

    fn underlay((v4, v6): (bool, bool)) -> Underlay {
        Underlay {
            v4: v4.then_some([192, 0, 2, 9].into()),
            v6: v6.then_some([0x2001, 0xdb8, 0, 0, 0, 0, 0, 9].into()),
        }
    }
}
