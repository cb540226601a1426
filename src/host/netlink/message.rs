//! What the kernel's messages about links, addresses and routes mean to us.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteNextHop, RouteNextHopFlags,
    RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::NetlinkPayload;

use crate::addr::{Ipv4Prefix, Ipv6Prefix, Prefix};

/// Marks our routes: `proto 75` in `ip route`. 75 is `K`, and free in iproute2's `rt_protos`.
pub const KERSEY_PROTOCOL: u8 = b'K';

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// MTU in bytes; loopback's 65,536 is why this is no [`crate::addr::Mtu`].
    pub mtu_bytes: u32,
    /// `IFF_*` flags.
    pub flags: LinkFlags,
    /// Transmit queue length in packets.
    pub tx_queue_len: u32,
    /// Ethernet address, on links that have one.
    pub mac: Option<[u8; 6]>,
}

impl Link {
    /// Whether the link is set up.
    pub fn is_up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }

    /// Whether it is up and its carrier is there.
    pub fn is_running(&self) -> bool {
        self.flags.contains(LinkFlags::Up | LinkFlags::LowerUp)
    }

    /// Whether it is a loopback.
    pub fn is_loopback(&self) -> bool {
        self.flags.contains(LinkFlags::Loopback)
    }
}

/// A VXLAN device as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    /// The device itself.
    pub link: Link,
    /// Network identifier, 24 bits.
    pub vni: u32,
    /// UDP destination port, which is also the one it receives on.
    pub port: u16,
    /// Number of the underlay link, if it is bound to one.
    pub underlay_index: Option<u32>,
    /// Underlay source address, if it has one.
    pub local: Option<IpAddr>,
}

impl VxlanDevice {
    /// Whether the device's socket keeps others from binding its port on `addr`: while it is up, all IPv4 addresses or all IPv6
    /// addresses are the device's.
    pub fn holds(&self, addr: SocketAddr) -> bool {
        let family_is_its = self.local.is_none_or(|local| local.is_ipv4() == addr.is_ipv4());
        self.link.is_up() && self.port == addr.port() && family_is_its
    }

    /// Whether it is called as flannel calls its devices: `flannel.VNI`, or `flannel-v6.VNI`.
    pub fn has_flannels_name(&self) -> bool {
        let named = |prefix: &str| {
            let vni = self.link.name.strip_prefix(prefix);
            vni == Some(self.vni.to_string().as_str())
        };
        named("flannel.") || named("flannel-v6.")
    }
}

/// An address on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddr {
    /// The link's number.
    pub index: u32,
    /// The address.
    pub addr: IpAddr,
    /// Prefix length.
    pub prefix_len: u8,
    /// `IFA_F_*` flags.
    pub flags: AddressFlags,
}

/// Where a route leads on its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gateway {
    /// The destinations are on the link.
    Direct,
    /// Through a neighbour that another route reaches.
    Via(IpAddr),
    /// Through a neighbour that is on this link, whatever its address.
    OnLink(IpAddr),
}

/// A route in the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to.
    pub destination: Prefix,
    /// Number of the link it leaves by.
    pub index: u32,
    /// How it gets there.
    pub gateway: Gateway,
    /// MTU metric in bytes, if it differs from the link's.
    pub mtu_bytes: Option<u32>,
    /// Source address for sockets that have not chosen one.
    pub source: Option<IpAddr>,
}

impl Route {
    /// A route to destinations on the link.
    pub fn direct(destination: Prefix, index: u32) -> Self {
        Self {
            destination,
            index,
            gateway: Gateway::Direct,
            mtu_bytes: None,
            source: None,
        }
    }

    pub(super) fn message(&self) -> RouteMessage {
        let mut message = match self.destination {
            Prefix::V4(prefix) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(prefix.addr(), prefix.len())
                .build(),
            Prefix::V6(prefix) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(prefix.addr(), prefix.len())
                .build(),
        };
        message.header.protocol = RouteProtocol::Other(KERSEY_PROTOCOL);
        message.attributes.push(RouteAttribute::Oif(self.index));
        match self.gateway {
            Gateway::Direct => {
                // fib_check_nh wants an IPv4 route without a gateway to have link scope; IPv6 ignores the field.
                if matches!(self.destination, Prefix::V4(_)) {
                    message.header.scope = RouteScope::Link;
                }
            }
            Gateway::Via(addr) => message.attributes.push(RouteAttribute::Gateway(addr.into())),
            Gateway::OnLink(addr) => {
                message.header.flags.insert(RouteFlags::Onlink);
                message.attributes.push(RouteAttribute::Gateway(addr.into()));
            }
        }
        if let Some(mtu) = self.mtu_bytes {
            message
                .attributes
                .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
        }
        if let Some(source) = self.source {
            message.attributes.push(RouteAttribute::PrefSource(source.into()));
        }
        message
    }
}

/// `RT_TABLE_LOCAL` of linux/rtnetlink.h.
const TABLE_LOCAL: u8 = 255;

/// A route that makes all addresses of a prefix this host's own.
pub(super) fn local_prefix(prefix: Ipv6Prefix) -> RouteMessage {
    /// Number of `lo` in every namespace: LOOPBACK_IFINDEX of include/net/flow.h.
    const LOOPBACK: u32 = 1;
    let mut message = RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(prefix.addr(), prefix.len())
        .output_interface(LOOPBACK)
        .build();
    message.header.protocol = RouteProtocol::Other(KERSEY_PROTOCOL);
    message.header.kind = RouteType::Local;
    message.header.table = TABLE_LOCAL;
    message
}

/// Behind every route anybody else would make.
const BACKSTOP_METRIC: u32 = u32::MAX - 1;

/// A route that drops packets to a prefix for want of a better one.
pub(super) fn backstop(prefix: Ipv6Prefix) -> RouteMessage {
    let mut message = RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(prefix.addr(), prefix.len())
        .priority(BACKSTOP_METRIC)
        .build();
    message.header.protocol = RouteProtocol::Other(KERSEY_PROTOCOL);
    message.header.kind = RouteType::BlackHole;
    message
}

/// Behind a pod bridge's own route, and not to be taken for a backstop.
const BLACKHOLE_METRIC: u32 = u32::MAX - 2;

/// A route that drops packets to addresses of our subnet that nobody has.
///
/// It has the worst of metrics: the route to a bridge that gets an address of the subnet later must win.
pub(super) fn blackhole(prefix: Prefix) -> RouteMessage {
    let mut message = match prefix {
        Prefix::V4(prefix) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(prefix.addr(), prefix.len())
            .priority(BLACKHOLE_METRIC)
            .build(),
        Prefix::V6(prefix) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(prefix.addr(), prefix.len())
            .priority(BLACKHOLE_METRIC)
            .build(),
    };
    message.header.protocol = RouteProtocol::Other(KERSEY_PROTOCOL);
    message.header.kind = RouteType::BlackHole;
    message
}

/// The prefix of a route that [`blackhole`] has made.
pub(super) fn held_blackhole(message: &RouteMessage) -> Option<Prefix> {
    let header = &message.header;
    let ours = header.protocol == RouteProtocol::Other(KERSEY_PROTOCOL)
        && header.kind == RouteType::BlackHole
        && message
            .attributes
            .contains(&RouteAttribute::Priority(BLACKHOLE_METRIC));
    ours.then(|| route(message))
        .flatten()
        .map(|route| route.destination)
}

/// The prefix of a route that [`backstop`] has made.
pub(super) fn held_backstop(message: &RouteMessage) -> Option<Ipv6Prefix> {
    let header = &message.header;
    let ours = header.protocol == RouteProtocol::Other(KERSEY_PROTOCOL)
        && header.kind == RouteType::BlackHole
        && message
            .attributes
            .contains(&RouteAttribute::Priority(BACKSTOP_METRIC));
    ours.then(|| v6_destination(message)).flatten()
}

/// The prefix of a route that [`local_prefix`] has made.
pub(super) fn held_local_prefix(message: &RouteMessage) -> Option<Ipv6Prefix> {
    let header = &message.header;
    let ours = header.protocol == RouteProtocol::Other(KERSEY_PROTOCOL)
        && header.kind == RouteType::Local
        && header.table == TABLE_LOCAL;
    ours.then(|| v6_destination(message)).flatten()
}

fn v6_destination(message: &RouteMessage) -> Option<Ipv6Prefix> {
    message.attributes.iter().find_map(|attribute| {
        let RouteAttribute::Destination(RouteAddress::Inet6(addr)) = attribute else {
            return None;
        };
        Ipv6Prefix::new(*addr, message.header.destination_prefix_length).ok()
    })
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on interface {}", self.destination, self.index)?;
        match self.gateway {
            Gateway::Direct => Ok(()),
            Gateway::Via(addr) => write!(f, " via {addr}"),
            Gateway::OnLink(addr) => write!(f, " via {addr} onlink"),
        }
    }
}

/// Who made a route, by its protocol number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteOwner {
    /// Kersey: [`KERSEY_PROTOCOL`].
    Kersey,
    /// The kernel, for an address of a link.
    Kernel,
    /// Anybody else.
    Other,
}

/// A route as it stands in the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldRoute {
    /// Who made it.
    pub owner: RouteOwner,
    /// The route.
    pub route: Route,
}

/// How the kernel would send to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteLookup {
    /// Number of the link.
    pub index: u32,
    /// The next router, if any.
    pub gateway: Option<IpAddr>,
    /// The source address it would pick.
    pub source: Option<IpAddr>,
}

/// Something about links or addresses changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkChange {
    /// A link appeared or changed; this is how it is now.
    Link(Link),
    /// A link is gone.
    LinkGone(Link),
    /// An address appeared or changed.
    Address(LinkAddr),
    /// An address is gone.
    AddressGone(LinkAddr),
    /// A route through a link is gone.
    RouteGone(Route),
    /// There is a new default route, or another instead of one.
    DefaultRoute(Route),
    /// A rule of policy routing came or went: other routes may count now.
    Rule,
    /// The kernel had to throw changes away: look at everything again.
    Overrun,
}

pub(super) fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mtu_bytes: 0,
        flags: message.header.flags,
        tx_queue_len: 0,
        mac: None,
    };
    for attribute in message.attributes {
        if let LinkAttribute::IfName(name) = attribute {
            link.name = name;
        } else if let LinkAttribute::Mtu(mtu) = attribute {
            link.mtu_bytes = mtu;
        } else if let LinkAttribute::TxQueueLen(packets) = attribute {
            link.tx_queue_len = packets;
        } else if let LinkAttribute::Address(mac) = attribute {
            link.mac = mac.try_into().ok();
        }
    }
    link
}

/// The VXLAN device `message` is about, if it is about one.
/// The name of a link that has the kernel look at next headers 4 and 41 of IPv6 packets to this host.
pub(super) fn v6_tunnel(message: LinkMessage) -> Option<String> {
    let is_tunnel = message.attributes.iter().any(|attribute| {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            return false;
        };
        let kinds = [InfoKind::Ip6Tnl, InfoKind::Vti6].map(LinkInfo::Kind);
        infos.iter().any(|info| kinds.contains(info))
    });
    is_tunnel.then(|| link(message).name)
}

pub(super) fn vxlan_device(message: LinkMessage) -> Option<VxlanDevice> {
    let mut device = VxlanDevice {
        link: Link::default(),
        vni: 0,
        port: 0,
        underlay_index: None,
        local: None,
    };
    let mut is_vxlan = false;
    for attribute in &message.attributes {
        let LinkAttribute::LinkInfo(infos) = attribute else {
            continue;
        };
        for info in infos {
            if let LinkInfo::Kind(kind) = info {
                is_vxlan = *kind == InfoKind::Vxlan;
            } else if let LinkInfo::Data(InfoData::Vxlan(settings)) = info {
                for setting in settings {
                    device.set(setting);
                }
            }
        }
    }
    device.link = link(message);
    is_vxlan.then_some(device)
}

impl VxlanDevice {
    fn set(&mut self, setting: &InfoVxlan) {
        if let InfoVxlan::Id(vni) = setting {
            self.vni = *vni;
        } else if let InfoVxlan::Port(port) = setting {
            self.port = *port;
        } else if let InfoVxlan::Link(index) = setting {
            self.underlay_index = (*index != 0).then_some(*index);
        } else if let InfoVxlan::Local(addr) = setting {
            self.local = Some((*addr).into());
        } else if let InfoVxlan::Local6(addr) = setting {
            self.local = Some((*addr).into());
        }
    }
}

pub(super) fn held_route(message: &RouteMessage) -> Option<HeldRoute> {
    let owner = if message.header.protocol == RouteProtocol::Other(KERSEY_PROTOCOL) {
        RouteOwner::Kersey
    } else if message.header.protocol == RouteProtocol::Kernel {
        RouteOwner::Kernel
    } else {
        RouteOwner::Other
    };
    route(message).map(|route| HeldRoute { owner, route })
}

pub(super) fn link_addr(message: &AddressMessage) -> Option<LinkAddr> {
    let mut address = None;
    let mut local = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        if let AddressAttribute::Address(addr) = attribute {
            address = Some(*addr);
        } else if let AddressAttribute::Local(addr) = attribute {
            local = Some(*addr);
        } else if let AddressAttribute::Flags(all) = attribute {
            flags = *all;
        }
    }
    // On a point-to-point link IFA_ADDRESS is the far end, and only IFA_LOCAL is ours.
    Some(LinkAddr {
        index: message.header.index,
        addr: local.or(address)?,
        prefix_len: message.header.prefix_len,
        flags,
    })
}

/// A default route that leads somewhere, and how little it is wanted: its metric.
pub(super) fn default_route(message: &RouteMessage) -> Option<(u32, Route)> {
    let leads_somewhere =
        message.header.kind == RouteType::Unicast && message.header.destination_prefix_length == 0;
    let mut metric = 0;
    let mut route = route(message).filter(|_| leads_somewhere)?;
    let mut is_dead = message
        .header
        .flags
        .intersects(RouteFlags::Dead | RouteFlags::Linkdown);
    for attribute in &message.attributes {
        if let RouteAttribute::Priority(priority) = attribute {
            metric = *priority;
        } else if let RouteAttribute::MultiPath(hops) = attribute {
            // One of several ways: the first whose link is up.
            let usable = |hop: &&RouteNextHop| {
                !hop.flags
                    .intersects(RouteNextHopFlags::Dead | RouteNextHopFlags::Linkdown)
            };
            is_dead = !hops.iter().any(|hop| usable(&hop));
            route.index = hops.iter().find(usable).or(hops.first())?.interface_index;
        }
    }
    (!is_dead && route.index != 0).then_some((metric, route))
}

pub(super) fn route(message: &RouteMessage) -> Option<Route> {
    let len = message.header.destination_prefix_length;
    let mut destination = None;
    let mut via = None;
    let mut route = Route::direct(unspecified(message)?, 0);
    for attribute in &message.attributes {
        if let RouteAttribute::Destination(addr) = attribute {
            destination = ip(addr);
        } else if let RouteAttribute::Oif(index) = attribute {
            route.index = *index;
        } else if let RouteAttribute::Gateway(addr) = attribute {
            via = ip(addr);
        } else if let RouteAttribute::PrefSource(addr) = attribute {
            route.source = ip(addr);
        } else if let RouteAttribute::Metrics(metrics) = attribute {
            route.mtu_bytes = metrics.iter().find_map(|metric| {
                if let RouteMetric::Mtu(mtu) = metric {
                    Some(*mtu)
                } else {
                    None
                }
            });
        }
    }
    if let Some(addr) = destination {
        route.destination = match addr {
            IpAddr::V4(addr) => Prefix::V4(Ipv4Prefix::new(addr, len).ok()?),
            IpAddr::V6(addr) => Prefix::V6(Ipv6Prefix::new(addr, len).ok()?),
        };
    }
    route.gateway = match via {
        None => Gateway::Direct,
        Some(addr) if message.header.flags.contains(RouteFlags::Onlink) => Gateway::OnLink(addr),
        Some(addr) => Gateway::Via(addr),
    };
    Some(route)
}

/// A default route carries no destination attribute; this is what it means.
fn unspecified(message: &RouteMessage) -> Option<Prefix> {
    if message.header.address_family == netlink_packet_route::AddressFamily::Inet {
        Ipv4Prefix::new(Ipv4Addr::UNSPECIFIED, 0).ok().map(Prefix::V4)
    } else {
        Ipv6Prefix::new(Ipv6Addr::UNSPECIFIED, 0).ok().map(Prefix::V6)
    }
}

pub(super) fn ip(addr: &RouteAddress) -> Option<IpAddr> {
    if let RouteAddress::Inet(addr) = addr {
        Some((*addr).into())
    } else if let RouteAddress::Inet6(addr) = addr {
        Some((*addr).into())
    } else {
        None
    }
}

pub(super) fn change(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<LinkChange> {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(LinkChange::Overrun),
        NetlinkPayload::Done(_) | NetlinkPayload::Error(_) | NetlinkPayload::Noop | _ => return None,
    };
    if let RouteNetlinkMessage::NewLink(message) = message {
        Some(LinkChange::Link(link(message)))
    } else if let RouteNetlinkMessage::DelLink(message) = message {
        Some(LinkChange::LinkGone(link(message)))
    } else if let RouteNetlinkMessage::NewAddress(message) = message {
        link_addr(&message).map(LinkChange::Address)
    } else if let RouteNetlinkMessage::DelAddress(message) = message {
        link_addr(&message).map(LinkChange::AddressGone)
    } else if let RouteNetlinkMessage::DelRoute(message) = message {
        route(&message).map(LinkChange::RouteGone)
    } else if let RouteNetlinkMessage::NewRoute(message) = message {
        route(&message)
            .filter(|route| route.destination.len() == 0)
            .map(LinkChange::DefaultRoute)
    } else if let RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) = message {
        Some(LinkChange::Rule)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tunnels_over_ipv6_are_told_from_others() {
        for (kind, is_tunnel) in [
            (InfoKind::Ip6Tnl, true),
            (InfoKind::Vti6, true),
            // Of IPv4 packets, and none.
            (InfoKind::SitTun, false),
            (InfoKind::Vxlan, false),
        ] {
            let mut message = LinkMessage::default();
            message.attributes = vec![
                LinkAttribute::IfName("tnl0".to_owned()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind.clone())]),
            ];
            let found = is_tunnel.then(|| "tnl0".to_owned());
            assert_eq!(v6_tunnel(message), found, "{kind:?}");
        }
    }

    #[test]
    fn a_backstop_is_known_by_its_metric() {
        let prefix: Ipv6Prefix = "fd12:3456:789a:c000:201::/80".parse().unwrap();
        let message = backstop(prefix);
        assert_eq!(held_backstop(&message), Some(prefix));
        assert_eq!(held_local_prefix(&message), None);
        let mut by_somebody = message.clone();
        by_somebody.header.protocol = RouteProtocol::Static;
        let mut other_metric = message;
        other_metric
            .attributes
            .retain(|attribute| !matches!(attribute, RouteAttribute::Priority(_)));
        assert_eq!(
            [by_somebody, other_metric].map(|message| held_backstop(&message)),
            [None, None]
        );
    }
}
