//! Links, addresses, routes and neighbours, over rtnetlink.
//!
//! A [`Netlink`] is a connection to one network namespace: that of the thread which opened it, for as long as the
//! connection lives. Requests are idempotent where the kernel lets them be: setting what is set already succeeds, and
//! deleting what is not there succeeds. Routes made here carry [`KERSEY_PROTOCOL`], by which they are found again
//! after a crash and told from everyone else's.

mod message;
mod seg6;
mod ways;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{Stream, StreamExt, TryStreamExt};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoVeth, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan, MulticastGroup,
    RouteMessageBuilder,
};

pub use self::message::{
    Gateway, HeldRoute, KERSEY_PROTOCOL, Link, LinkAddr, LinkChange, Route, RouteLookup, RouteOwner,
    VxlanDevice,
};
use self::message::{
    backstop, blackhole, change, default_route, held_backstop, held_blackhole, held_local_prefix, held_route,
    ip, link, link_addr, local_prefix, v6_tunnel, vxlan_device,
};
pub use self::seg6::{Behavior, Seg6Mode, Seg6Route, Sid, set_tunnel_source};
pub use self::ways::{Neighbour, NextHop, WayChange};
use crate::addr::{Ipv6Prefix, Prefix};

/// A request to the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// There is no netlink socket to be had.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {operation} {object}")]
    Request {
        /// What we were doing.
        operation: &'static str,
        /// To what.
        object: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No link has the name.
    #[error("there is no network interface {0:?}")]
    NoLink(String),
}

impl NetlinkError {
    /// The kernel's error number, where it gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Open(source) | Self::Request { source, .. } => source.raw_os_error(),
            Self::NoLink(_) => Some(libc::ENODEV),
        }
    }
}

/// A VXLAN device of the kernel's.
#[derive(Clone, Debug)]
pub struct Vxlan<'a> {
    /// Device name.
    pub name: &'a str,
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// Number of the underlay link.
    pub underlay_index: u32,
    /// Underlay source address.
    pub local: IpAddr,
    /// UDP destination port.
    pub port: u16,
    /// MTU in bytes.
    pub mtu_bytes: u32,
}

/// A connection to the kernel's network configuration. Clones share it; it closes with the last one.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a connection to the calling thread's namespace; the current tokio runtime serves it.
    ///
    /// # Errors
    /// No socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Reports changes of links and addresses from here on, until dropped.
    ///
    /// What is not consumed waits in memory without limit, so keep reading.
    ///
    /// # Errors
    /// No socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch() -> Result<impl Stream<Item = LinkChange> + Send + Unpin + 'static, NetlinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        Self::watch_groups(&groups, change)
    }

    /// Reports what `change` makes of the messages of these groups; see [`watch`](Self::watch).
    fn watch_groups<T: Send + 'static>(
        groups: &[MulticastGroup],
        change: fn(NetlinkPayload<RouteNetlinkMessage>) -> Option<T>,
    ) -> Result<impl Stream<Item = T> + Send + Unpin + 'static + use<T>, NetlinkError> {
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(groups).map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        // The connection ends when nobody holds its handle, so the stream does.
        Ok(messages.filter_map(move |(message, _)| {
            let _keep = &handle;
            std::future::ready(change(message.payload))
        }))
    }

    /// All links, by number.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn links(&self) -> Result<Vec<Link>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        Ok(links
            .or_refused("list", "network interfaces")?
            .into_iter()
            .map(link)
            .collect())
    }

    /// The VXLAN devices of the kernel's, by number.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn vxlan_devices(&self) -> Result<Vec<VxlanDevice>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        Ok(links
            .or_refused("list", "network interfaces")?
            .into_iter()
            .filter_map(vxlan_device)
            .collect())
    }

    /// The names of the kernel's own tunnels that take IPv4 or IPv6 out of IPv6 packets to this host.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn v6_tunnels(&self) -> Result<Vec<String>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        Ok(links
            .or_refused("list", "network interfaces")?
            .into_iter()
            .filter_map(v6_tunnel)
            .collect())
    }

    /// The link called `name`.
    ///
    /// # Errors
    /// [`NetlinkError::NoLink`] if there is none.
    pub async fn link(&self, name: &str) -> Result<Link, NetlinkError> {
        let mut answer = Box::pin(self.handle.link().get().match_name(name.to_owned()).execute());
        match answer.try_next().await {
            Ok(Some(message)) => Ok(link(message)),
            Ok(None) => Err(NetlinkError::NoLink(name.to_owned())),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Err(NetlinkError::NoLink(name.to_owned())),
            Err(error) => Err(error).or_refused("look up network interface", name),
        }
    }

    /// All addresses of all links, in the kernel's order.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn addresses(&self) -> Result<Vec<LinkAddr>, NetlinkError> {
        let addresses = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect::<Vec<_>>()
            .await;
        Ok(addresses
            .or_refused("list", "addresses")?
            .iter()
            .filter_map(link_addr)
            .collect())
    }

    /// Sets the MTU.
    ///
    /// # Errors
    /// The link cannot have it.
    pub async fn set_mtu(&self, index: u32, mtu_bytes: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu_bytes).build();
        self.set_link("set the MTU of interface", index, message).await
    }

    /// Sets the transmit queue length, in packets.
    ///
    /// # Errors
    /// The link cannot have it.
    pub async fn set_tx_queue_len(&self, index: u32, packets: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).txqueuelen(packets).build();
        self.set_link("set the queue length of interface", index, message)
            .await
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set_up(&self, index: u32) -> Result<(), NetlinkError> {
        self.set_link(
            "bring up interface",
            index,
            LinkUnspec::new_with_index(index).up().build(),
        )
        .await
    }

    /// Takes a link down.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set_down(&self, index: u32) -> Result<(), NetlinkError> {
        self.set_link(
            "take down interface",
            index,
            LinkUnspec::new_with_index(index).down().build(),
        )
        .await
    }

    /// Sets the Ethernet address.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set_mac(&self, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).address(mac.to_vec()).build();
        self.set_link("set the address of interface", index, message)
            .await
    }

    /// Makes a link a port of a bridge.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn enslave(&self, index: u32, bridge_index: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).controller(bridge_index).build();
        self.set_link("put into a bridge interface", index, message).await
    }

    /// Moves a link into another namespace, where it arrives down and without addresses.
    ///
    /// # Errors
    /// The kernel refuses; a link of that name may be there.
    pub async fn move_to_namespace(&self, index: u32, netns: BorrowedFd<'_>) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index)
            .setns_by_fd(netns.as_raw_fd())
            .build();
        self.set_link("move to another namespace interface", index, message)
            .await
    }

    async fn set_link(
        &self,
        operation: &'static str,
        index: u32,
        message: LinkMessage,
    ) -> Result<(), NetlinkError> {
        self.handle
            .link()
            .set(message)
            .execute()
            .await
            .or_refused(operation, index)
    }

    /// Deletes a link; one that is gone already is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_link(&self, index: u32) -> Result<(), NetlinkError> {
        let result = self.handle.link().del(index).execute().await;
        gone(result, &[libc::ENODEV]).or_refused("delete interface", index)
    }

    /// Adds an address, or refreshes it if it is there. IPv6 addresses are usable at once, without duplicate
    /// address detection.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn add_address(&self, index: u32, addr: IpAddr, prefix_len: u8) -> Result<(), NetlinkError> {
        let mut request = self.handle.address().add(index, addr, prefix_len).replace();
        if addr.is_ipv6() {
            request
                .message_mut()
                .header
                .flags
                .insert(AddressHeaderFlags::Nodad);
        }
        request
            .execute()
            .await
            .or_refused("add address", format!("{addr}/{prefix_len}"))
    }

    /// Deletes an address; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_address(&self, index: u32, addr: IpAddr, prefix_len: u8) -> Result<(), NetlinkError> {
        let mut message = AddressMessage::default();
        message.header.family = match addr {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.header.index = index;
        message.header.prefix_len = prefix_len;
        message.attributes.push(AddressAttribute::Local(addr));
        message.attributes.push(AddressAttribute::Address(addr));
        let result = self.handle.address().del(message).execute().await;
        gone(result, &[libc::EADDRNOTAVAIL, libc::ENODEV])
            .or_refused("delete address", format!("{addr}/{prefix_len}"))
    }

    /// Adds a route under [`KERSEY_PROTOCOL`], in place of one to the same destination with the same metric.
    ///
    /// # Errors
    /// The kernel refuses: the link is down or the gateway cannot be reached.
    pub async fn replace_route(&self, route: &Route) -> Result<(), NetlinkError> {
        self.handle
            .route()
            .add(route.message())
            .replace()
            .execute()
            .await
            .or_refused("set route", route)
    }

    /// Adds a route under [`KERSEY_PROTOCOL`] where none is.
    ///
    /// # Errors
    /// There is a route to the destination already (`EEXIST`), or the kernel refuses.
    pub async fn add_route(&self, route: &Route) -> Result<(), NetlinkError> {
        self.handle
            .route()
            .add(route.message())
            .execute()
            .await
            .or_refused("add route", route)
    }

    /// Deletes a route of ours; one that is not there is no error, and others' are not touched.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_route(&self, route: &Route) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(route.message()).execute().await;
        gone(result, &[libc::ESRCH, libc::ENODEV]).or_refused("delete route", route)
    }

    /// The routes of the main table that carry [`KERSEY_PROTOCOL`].
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn own_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = self.routes().await?;
        routes.retain(|held| held.owner == RouteOwner::Kersey);
        Ok(routes.into_iter().map(|held| held.route).collect())
    }

    /// Makes every address of `prefix` one of this host's own (AnyIP: `ip -6 route add local PREFIX dev lo`), under [`KERSEY_PROTOCOL`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn add_local_prefix(&self, prefix: Ipv6Prefix) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(local_prefix(prefix)).replace();
        request.execute().await.or_refused("make local", prefix)
    }

    /// Undoes [`add_local_prefix`](Self::add_local_prefix); one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_local_prefix(&self, prefix: Ipv6Prefix) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(local_prefix(prefix)).execute().await;
        gone(result, &[libc::ESRCH, libc::ENODEV]).or_refused("make foreign", prefix)
    }

    /// What [`add_local_prefix`](Self::add_local_prefix) has made.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn own_local_prefixes(&self) -> Result<Vec<Ipv6Prefix>, NetlinkError> {
        self.v6_prefixes(held_local_prefix).await
    }

    /// Has packets to `prefix` dropped without a word while no other route leads there, under [`KERSEY_PROTOCOL`].
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn add_backstop(&self, prefix: Ipv6Prefix) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(backstop(prefix)).replace();
        request.execute().await.or_refused("set blackhole", prefix)
    }

    /// Undoes [`add_backstop`](Self::add_backstop); one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_backstop(&self, prefix: Ipv6Prefix) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(backstop(prefix)).execute().await;
        gone(result, &[libc::ESRCH, libc::ENODEV]).or_refused("delete blackhole", prefix)
    }

    /// What [`add_backstop`](Self::add_backstop) has made.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn own_backstops(&self) -> Result<Vec<Ipv6Prefix>, NetlinkError> {
        self.v6_prefixes(held_backstop).await
    }

    /// Has packets to `prefix` dropped while no other route leads there, under [`KERSEY_PROTOCOL`]; for our own subnet.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn add_own_blackhole(&self, prefix: Prefix) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(blackhole(prefix)).replace();
        request.execute().await.or_refused("set blackhole", prefix)
    }

    /// Undoes [`add_own_blackhole`](Self::add_own_blackhole); one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_own_blackhole(&self, prefix: Prefix) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(blackhole(prefix)).execute().await;
        gone(result, &[libc::ESRCH, libc::ENODEV]).or_refused("delete blackhole", prefix)
    }

    /// What [`add_own_blackhole`](Self::add_own_blackhole) has made.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn own_blackholes(&self) -> Result<Vec<Prefix>, NetlinkError> {
        let messages = self.route_messages().await?;
        Ok(messages.iter().filter_map(held_blackhole).collect())
    }

    /// What `read` makes of the IPv6 routes of all tables.
    async fn v6_prefixes(
        &self,
        read: impl FnMut(&RouteMessage) -> Option<Ipv6Prefix>,
    ) -> Result<Vec<Ipv6Prefix>, NetlinkError> {
        let dump = RouteMessageBuilder::<Ipv6Addr>::new().build();
        let request = self.handle.route().get(dump);
        let messages = request.execute().try_collect::<Vec<_>>().await;
        Ok(messages
            .or_refused("list", "routes")?
            .iter()
            .filter_map(read)
            .collect())
    }

    /// The default routes of both families that lead somewhere, the one the kernel prefers first: by metric, and its own order where that
    /// is the same. Of a route with several ways this is the first whose link is up.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn default_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let messages = self.route_messages().await?;
        let mut routes: Vec<(u32, Route)> = messages.iter().filter_map(default_route).collect();
        routes.sort_by_key(|(metric, _)| *metric);
        Ok(routes.into_iter().map(|(_, route)| route).collect())
    }

    /// All routes of the main table but our blackholes, whoever made them, in the kernel's order.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn routes(&self) -> Result<Vec<HeldRoute>, NetlinkError> {
        let messages = self.route_messages().await?;
        Ok(messages
            .iter()
            .filter(|message| held_blackhole(message).is_none())
            .filter_map(held_route)
            .collect())
    }

    /// The routes of the main table, IPv4's first.
    async fn route_messages(&self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut found = Vec::new();
        let dumps = [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ];
        for dump in dumps {
            let messages = self
                .handle
                .route()
                .get(dump)
                .execute()
                .try_collect::<Vec<_>>()
                .await;
            let messages = messages.or_refused("list", "routes")?;
            let in_main = |message: &RouteMessage| message.header.table == RouteHeader::RT_TABLE_MAIN;
            found.extend(messages.into_iter().filter(in_main));
        }
        Ok(found)
    }

    /// Asks the kernel how it would reach `addr`.
    ///
    /// # Errors
    /// There is no route.
    pub async fn route_to(&self, addr: IpAddr) -> Result<RouteLookup, NetlinkError> {
        let message = match addr {
            IpAddr::V4(addr) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(addr, 32)
                .build(),
            IpAddr::V6(addr) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(addr, 128)
                .build(),
        };
        let mut answer = Box::pin(self.handle.route().get(message).execute());
        let message = answer.try_next().await.or_refused("find a route to", addr)?;
        let mut lookup = RouteLookup {
            index: 0,
            gateway: None,
            source: None,
        };
        for attribute in message.map(|message| message.attributes).unwrap_or_default() {
            if let RouteAttribute::Oif(index) = attribute {
                lookup.index = index;
            } else if let RouteAttribute::Gateway(addr) = &attribute {
                lookup.gateway = ip(addr);
            } else if let RouteAttribute::PrefSource(addr) = &attribute {
                lookup.source = ip(addr);
            }
        }
        Ok(lookup)
    }

    /// Makes a veth pair; the far end may be born in another namespace.
    ///
    /// # Errors
    /// A link of that name exists, or the kernel refuses.
    pub async fn add_veth(
        &self,
        name: &str,
        peer: &str,
        peer_netns: Option<BorrowedFd<'_>>,
    ) -> Result<(), NetlinkError> {
        let mut far = LinkMessageBuilder::<LinkUnspec>::new().name(peer.to_owned());
        if let Some(netns) = peer_netns {
            far = far.setns_by_fd(netns.as_raw_fd());
        }
        let message = LinkVeth::new(name, peer)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far.build())))
            .build();
        self.add_link(name, message).await
    }

    /// Makes a bridge, up.
    ///
    /// # Errors
    /// A link of that name exists, or the kernel refuses.
    pub async fn add_bridge(&self, name: &str) -> Result<(), NetlinkError> {
        self.add_link(name, LinkBridge::new(name).build()).await
    }

    /// Makes a VXLAN device that does not learn addresses, down.
    ///
    /// # Errors
    /// A link of that name exists, or the kernel refuses.
    pub async fn add_vxlan(&self, vxlan: &Vxlan<'_>) -> Result<(), NetlinkError> {
        let mut message = LinkVxlan::new(vxlan.name, vxlan.vni)
            .dev(vxlan.underlay_index)
            .port(vxlan.port)
            .learning(false)
            .mtu(vxlan.mtu_bytes);
        message = match vxlan.local {
            IpAddr::V4(addr) => message.local(addr),
            IpAddr::V6(addr) => message.local6(addr),
        };
        self.add_link(vxlan.name, message.build()).await
    }

    /// Gives a VXLAN device another underlay source address of the same family.
    ///
    /// # Errors
    /// There is no such device, or the kernel refuses.
    pub async fn set_vxlan_local(&self, name: &str, vni: u32, local: IpAddr) -> Result<(), NetlinkError> {
        // The identifier has to be there, and to be the one the device has.
        let mut message = LinkVxlan::new(name, vni);
        message = match local {
            IpAddr::V4(addr) => message.local(addr),
            IpAddr::V6(addr) => message.local6(addr),
        };
        self.handle
            .link()
            .change(message.build())
            .execute()
            .await
            .or_refused("set the underlay address of interface", name)
    }

    async fn add_link(&self, name: &str, message: LinkMessage) -> Result<(), NetlinkError> {
        self.handle
            .link()
            .add(message)
            .execute()
            .await
            .or_refused("create network interface", name)
    }

    /// Tells a VXLAN device behind which underlay address an Ethernet address lives.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set_fdb(&self, index: u32, mac: [u8; 6], underlay: IpAddr) -> Result<(), NetlinkError> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(index, &mac)
            .destination(underlay);
        let result = request.flags(NeighbourFlags::Own).replace().execute().await;
        result.or_refused("add a forwarding entry for", underlay)
    }

    /// Forgets behind which underlay address an Ethernet address lives; one that is not known is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_fdb(&self, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Own;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        let result = self.handle.neighbours().del(message).execute().await;
        gone(result, &[libc::ENOENT, libc::ENODEV])
            .or_refused("delete a forwarding entry of interface", index)
    }

    /// Pins a neighbour's Ethernet address, under [`KERSEY_PROTOCOL`]; before Linux 4.20 neighbours have no protocol.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn set_neighbour(&self, index: u32, addr: IpAddr, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let mut request = self.handle.neighbours().add(index, addr).link_layer_address(&mac);
        let protocol = NeighbourAttribute::Protocol(RouteProtocol::Other(KERSEY_PROTOCOL));
        request.message_mut().attributes.push(protocol);
        request
            .replace()
            .execute()
            .await
            .or_refused("add neighbour", addr)
    }

    /// The neighbours that carry [`KERSEY_PROTOCOL`]: number of the link, and address.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn own_neighbours(&self) -> Result<Vec<(u32, IpAddr)>, NetlinkError> {
        let held = self.handle.neighbours().get().execute();
        let held: Vec<NeighbourMessage> = held.try_collect().await.or_refused("list", "neighbours")?;
        Ok(held.iter().filter_map(own_neighbour).collect())
    }

    /// Forgets a neighbour; one that is not known is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_neighbour(&self, index: u32, addr: IpAddr) -> Result<(), NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = index;
        let destination = match addr {
            IpAddr::V4(addr) => {
                message.header.family = AddressFamily::Inet;
                NeighbourAddress::Inet(addr)
            }
            IpAddr::V6(addr) => {
                message.header.family = AddressFamily::Inet6;
                NeighbourAddress::Inet6(addr)
            }
        };
        message
            .attributes
            .push(NeighbourAttribute::Destination(destination));
        let result = self.handle.neighbours().del(message).execute().await;
        gone(result, &[libc::ENOENT, libc::ENODEV]).or_refused("delete neighbour", addr)
    }
}

/// Link and address of a neighbour that is ours.
fn own_neighbour(message: &NeighbourMessage) -> Option<(u32, IpAddr)> {
    let protocol = NeighbourAttribute::Protocol(RouteProtocol::Other(KERSEY_PROTOCOL));
    if !message.attributes.contains(&protocol) {
        return None;
    }
    let addr = message.attributes.iter().find_map(|attribute| {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)) = attribute {
            Some(IpAddr::V4(*addr))
        } else if let NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) = attribute {
            Some(IpAddr::V6(*addr))
        } else {
            None
        }
    })?;
    Some((message.header.ifindex, addr))
}

trait OrRefused<T> {
    fn or_refused(self, operation: &'static str, object: impl fmt::Display) -> Result<T, NetlinkError>;
}

impl<T> OrRefused<T> for Result<T, rtnetlink::Error> {
    fn or_refused(self, operation: &'static str, object: impl fmt::Display) -> Result<T, NetlinkError> {
        self.map_err(|error| NetlinkError::Request {
            operation,
            object: object.to_string(),
            source: match errno(&error) {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::other(error),
            },
        })
    }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    if let rtnetlink::Error::NetlinkError(message) = error {
        message.to_io().raw_os_error()
    } else {
        None
    }
}

/// Counts the answers that mean "there is no such thing" as a deletion done.
fn gone(result: Result<(), rtnetlink::Error>, absent: &[i32]) -> Result<(), rtnetlink::Error> {
    result.or_else(|error| match errno(&error) {
        Some(code) if absent.contains(&code) => Ok(()),
        Some(_) | None => Err(error),
    })
}
