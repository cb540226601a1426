//! How IPv6 packets to a destination leave: link and neighbour, for who does without the kernel's own look-up.

use std::net::Ipv6Addr;

use futures_util::{Stream, TryStreamExt};
use netlink_packet_route::link::{LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{MulticastGroup, RouteMessageBuilder};

use super::message::{link, route};
use super::{Netlink, NetlinkError, OrRefused, errno};
use crate::addr::Prefix;

/// What is next on the way to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Number of the link.
    pub index: u32,
    /// The router, or the destination itself.
    pub neighbour: Ipv6Addr,
    /// The route's MTU in bytes, if it has one.
    pub mtu_bytes: Option<u32>,
}

/// What is known of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Number of the link.
    pub index: u32,
    /// The neighbour.
    pub addr: Ipv6Addr,
    /// Its Ethernet address, while the kernel would send to it.
    pub mac: Option<[u8; 6]>,
}

/// Something changed that packets' ways depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayChange {
    /// A route to a prefix appeared, changed or is gone.
    Route(Prefix),
    /// So did a routing rule.
    Rule,
    /// So did the link of this number.
    Link(u32),
    /// This is what is known of a neighbour now.
    Neighbour(Neighbour),
    /// The kernel had to throw changes away: look at everything again.
    Overrun,
}

impl Netlink {
    /// Reports what packets' ways over IPv6 depend on from here on, until dropped.
    ///
    /// What is not consumed waits in memory without limit, so keep reading.
    ///
    /// # Errors
    /// No socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch_ways() -> Result<impl Stream<Item = WayChange> + Send + Unpin + 'static, NetlinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv6Rule,
        ];
        Self::watch_groups(&groups, change)
    }

    /// Number and MTU in bytes of the links of Ethernet that are up.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn ethernet_links(&self) -> Result<Vec<(u32, u32)>, NetlinkError> {
        let links = self.handle.link().get().execute().try_collect::<Vec<_>>().await;
        Ok(links
            .or_refused("list", "network interfaces")?
            .into_iter()
            .filter_map(ethernet)
            .collect())
    }

    /// The IPv6 neighbours of all links.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn neighbours(&self) -> Result<Vec<Neighbour>, NetlinkError> {
        let held = self.handle.neighbours().get().execute();
        let held: Vec<NeighbourMessage> = held.try_collect().await.or_refused("list", "neighbours")?;
        Ok(held.iter().filter_map(neighbour).collect())
    }

    /// What is next on the way from `source` to `to`, if that is one neighbour and packets go there as they are: not with a route of several
    /// ways or of next-hop objects, none that puts something around packets, and none that leads nowhere.
    ///
    /// # Errors
    /// The kernel refuses for another reason than that there is no route.
    pub async fn next_hop(&self, source: Ipv6Addr, to: Ipv6Addr) -> Result<Option<NextHop>, NetlinkError> {
        // The route itself first: what packets get out of it does not show how many ways it has.
        let Some(whole) = self.look_up(source, to, RouteFlags::FibMatch).await? else {
            return Ok(None);
        };
        if !is_plain(&whole) {
            return Ok(None);
        }
        let found = self.look_up(source, to, RouteFlags::empty()).await?;
        Ok(found.filter(is_plain).and_then(|message| next_hop(&message, to)))
    }

    async fn look_up(
        &self,
        source: Ipv6Addr,
        to: Ipv6Addr,
        flags: RouteFlags,
    ) -> Result<Option<RouteMessage>, NetlinkError> {
        let mut message = RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(to, 128)
            .source_prefix(source, 128)
            .build();
        message.header.flags = flags;
        let mut answer = Box::pin(self.handle.route().get(message).execute());
        match answer.try_next().await {
            Ok(found) => Ok(found),
            Err(error) if matches!(errno(&error), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => Ok(None),
            Err(error) => Err(error).or_refused("find a route to", to),
        }
    }
}

/// Whether packets leave by a route to one neighbour, and as they are.
fn is_plain(message: &RouteMessage) -> bool {
    let is_more = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::MultiPath(_)
                | RouteAttribute::NhId(_)
                | RouteAttribute::Encap(_)
                | RouteAttribute::EncapType(_)
                | RouteAttribute::Via(_)
        )
    };
    message.header.kind == RouteType::Unicast && !message.attributes.iter().any(is_more)
}

fn next_hop(message: &RouteMessage, to: Ipv6Addr) -> Option<NextHop> {
    let mut found = NextHop {
        index: 0,
        neighbour: to,
        mtu_bytes: None,
    };
    for attribute in &message.attributes {
        if let RouteAttribute::Oif(index) = attribute {
            found.index = *index;
        } else if let RouteAttribute::Gateway(gateway) = attribute {
            let RouteAddress::Inet6(gateway) = gateway else {
                return None;
            };
            found.neighbour = *gateway;
        } else if let RouteAttribute::Metrics(metrics) = attribute {
            found.mtu_bytes = metrics.iter().find_map(|metric| {
                if let RouteMetric::Mtu(mtu) = metric {
                    Some(*mtu)
                } else {
                    None
                }
            });
        }
    }
    (found.index != 0).then_some(found)
}

fn ethernet(message: LinkMessage) -> Option<(u32, u32)> {
    let is_ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let is_up = message.header.flags.contains(LinkFlags::Up);
    let link = link(message);
    (is_ethernet && is_up).then_some((link.index, link.mtu_bytes))
}

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let header = &message.header;
    if header.family != AddressFamily::Inet6 || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let mut found = Neighbour {
        index: header.ifindex,
        addr: Ipv6Addr::UNSPECIFIED,
        mac: None,
    };
    for attribute in &message.attributes {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) = attribute {
            found.addr = *addr;
        } else if let NeighbourAttribute::LinkLayerAddress(mac) = attribute {
            found.mac = mac.as_slice().try_into().ok();
        }
    }
    let is_usable = matches!(
        header.state,
        NeighbourState::Reachable
            | NeighbourState::Stale
            | NeighbourState::Delay
            | NeighbourState::Probe
            | NeighbourState::Noarp
            | NeighbourState::Permanent
    );
    found.mac = found.mac.filter(|_| is_usable);
    (!found.addr.is_unspecified()).then_some(found)
}

fn change(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<WayChange> {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(WayChange::Overrun),
        NetlinkPayload::Done(_) | NetlinkPayload::Error(_) | NetlinkPayload::Noop | _ => return None,
    };
    if let RouteNetlinkMessage::NewNeighbour(message) = message {
        neighbour(&message).map(WayChange::Neighbour)
    } else if let RouteNetlinkMessage::DelNeighbour(message) = message {
        neighbour(&message).map(|gone| WayChange::Neighbour(Neighbour { mac: None, ..gone }))
    } else if let RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message) = message {
        route(&message).map(|route| WayChange::Route(route.destination))
    } else if let RouteNetlinkMessage::NewLink(message) | RouteNetlinkMessage::DelLink(message) = message {
        Some(WayChange::Link(message.header.index))
    } else if let RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) = message {
        Some(WayChange::Rule)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::RouteNextHop;

    use super::*;

    const TO: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 9);

    fn found(attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = RouteType::Unicast;
        message.attributes = attributes;
        message
    }

    #[test]
    fn a_route_says_what_is_next() {
        let mut attributes = vec![RouteAttribute::Oif(3)];
        let direct = next_hop(&found(attributes.clone()), TO);
        let expected = NextHop {
            index: 3,
            neighbour: TO,
            mtu_bytes: None,
        };
        assert_eq!(direct, Some(expected));
        attributes.push(RouteAttribute::Gateway(ROUTER.into()));
        attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)]));
        let expected = NextHop {
            neighbour: ROUTER,
            mtu_bytes: Some(1300),
            ..expected
        };
        assert_eq!(next_hop(&found(attributes), TO), Some(expected));
        assert_eq!(next_hop(&found(Vec::new()), TO), None);
    }

    #[test]
    fn only_a_route_to_one_neighbour_is_plain() {
        assert!(is_plain(&found(vec![RouteAttribute::Oif(3)])));
        for more in [
            RouteAttribute::MultiPath(vec![RouteNextHop::default()]),
            RouteAttribute::NhId(1),
            RouteAttribute::Encap(Vec::new()),
        ] {
            assert!(!is_plain(&found(vec![more.clone()])), "{more:?}");
        }
        let mut blackhole = found(Vec::new());
        blackhole.header.kind = RouteType::BlackHole;
        assert!(!is_plain(&blackhole));
    }

    #[test]
    fn a_neighbour_is_used_while_the_kernel_would() {
        let mac = [2, 0, 0, 0, 0, 9];
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.ifindex = 3;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ROUTER)),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        for (state, is_used) in [
            (NeighbourState::Reachable, true),
            (NeighbourState::Stale, true),
            (NeighbourState::Probe, true),
            (NeighbourState::Permanent, true),
            (NeighbourState::Incomplete, false),
            (NeighbourState::Failed, false),
            (NeighbourState::None, false),
        ] {
            message.header.state = state;
            let known = neighbour(&message).unwrap();
            assert_eq!((known.index, known.addr), (3, ROUTER));
            assert_eq!(known.mac, is_used.then_some(mac), "{state:?}");
        }
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Proxy;
        assert_eq!(neighbour(&message), None);
        message.header.flags = NeighbourFlags::empty();
        message.header.family = AddressFamily::Bridge;
        assert_eq!(neighbour(&message), None);
    }

    #[test]
    fn an_address_that_is_not_ethernets_is_none() {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ROUTER)),
            NeighbourAttribute::LinkLayerAddress(vec![0; 20]),
        ];
        assert_eq!(neighbour(&message).unwrap().mac, None);
    }
}
