//! Neighbours, and the forwarding entries of VXLAN devices.

use std::net::{IpAddr, Ipv6Addr};

use futures_util::{Stream, StreamExt, TryStreamExt};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};

use super::{KERSEY_PROTOCOL, Netlink, NetlinkError, OrRefused, gone};

/// An IPv6 neighbour: number of the link, and address.
pub type NeighbourKey = (u32, Ipv6Addr);

/// What the kernel says of IPv6 neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NeighbourNews {
    /// It asked for this one and gave up.
    Failed(NeighbourKey),
    /// It had to throw news away: look at all neighbours.
    Overrun,
}

impl Netlink {
    /// Reports which IPv6 neighbours fail from here on, until dropped.
    ///
    /// What is not consumed waits in memory without limit, so keep reading.
    ///
    /// # Errors
    /// No socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch_neighbours()
    -> Result<impl Stream<Item = NeighbourNews> + Send + Unpin + 'static, NetlinkError> {
        Self::watch_groups(&[MulticastGroup::Neigh], news)
    }

    /// The IPv6 neighbours that the kernel asked for and gave up on.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn failed_neighbours(&self) -> Result<Vec<NeighbourKey>, NetlinkError> {
        let request = self.handle.neighbours().get();
        let held = request.set_address_family(AddressFamily::Inet6).execute();
        let held: Vec<NeighbourMessage> = held.try_collect().await.or_refused("list", "neighbours")?;
        Ok(held.iter().filter_map(failed).collect())
    }

    /// Has the kernel ask for a neighbour that failed, as if it had a packet for it (`NTF_USE`); one that is forgotten by now is left so.
    ///
    /// For those of [`failed_neighbours`](Self::failed_neighbours) alone: from Linux 5.16 on, one that is pinned would be so no more.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn solicit(&self, (index, addr): NeighbourKey) -> Result<(), NetlinkError> {
        let mut message = about(index, addr.into());
        message.header.flags = NeighbourFlags::Use;
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
        let result = self.acknowledged(request).await;
        gone(result, &[libc::ENOENT, libc::ENODEV]).or_refused("solicit neighbour", addr)
    }

    async fn acknowledged(
        &self,
        request: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<(), rtnetlink::Error> {
        let mut answers = self.handle.clone().request(request)?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(rtnetlink::Error::NetlinkError(error));
            }
        }
        Ok(())
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
        let message = about(index, addr);
        let result = self.handle.neighbours().del(message).execute().await;
        gone(result, &[libc::ENOENT, libc::ENODEV]).or_refused("delete neighbour", addr)
    }
}

/// A message about a neighbour.
fn about(index: u32, addr: IpAddr) -> NeighbourMessage {
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
    message
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

fn news(payload: NetlinkPayload<RouteNetlinkMessage>) -> Option<NeighbourNews> {
    let message = match payload {
        NetlinkPayload::InnerMessage(message) => message,
        NetlinkPayload::Overrun(_) => return Some(NeighbourNews::Overrun),
        NetlinkPayload::Done(_) | NetlinkPayload::Error(_) | NetlinkPayload::Noop | _ => return None,
    };
    if let RouteNetlinkMessage::NewNeighbour(message) = message {
        failed(&message).map(NeighbourNews::Failed)
    } else {
        None
    }
}

/// Link and address of an IPv6 neighbour that has failed, unless somebody else looks after it.
fn failed(message: &NeighbourMessage) -> Option<NeighbourKey> {
    let header = &message.header;
    let is_managed = |attribute: &NeighbourAttribute| matches!(attribute, NeighbourAttribute::ExtFlags(flags) if flags.contains(NeighbourExtFlags::Managed));
    let is_ours = header.family == AddressFamily::Inet6
        && header.state == NeighbourState::Failed
        && !header
            .flags
            .intersects(NeighbourFlags::Proxy | NeighbourFlags::ExtLearned)
        && !message.attributes.iter().any(is_managed);
    if !is_ours {
        return None;
    }
    message.attributes.iter().find_map(|attribute| {
        if let NeighbourAttribute::Destination(NeighbourAddress::Inet6(addr)) = attribute {
            Some((header.ifindex, *addr))
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_that_failed_is_told_unless_others_look_after_it() {
        let addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.ifindex = 3;
        message
            .attributes
            .push(NeighbourAttribute::Destination(addr.into()));
        let told = |message: &NeighbourMessage| {
            let message = RouteNetlinkMessage::NewNeighbour(message.clone());
            news(NetlinkPayload::InnerMessage(message))
        };
        for state in [
            NeighbourState::Incomplete,
            NeighbourState::Stale,
            NeighbourState::Reachable,
            NeighbourState::Permanent,
        ] {
            message.header.state = state;
            assert_eq!(told(&message), None, "{state:?}");
        }
        message.header.state = NeighbourState::Failed;
        assert_eq!(told(&message), Some(NeighbourNews::Failed((3, addr))));
        let gone = RouteNetlinkMessage::DelNeighbour(message.clone());
        assert_eq!(news(NetlinkPayload::InnerMessage(gone)), None);
        for flags in [NeighbourFlags::Proxy, NeighbourFlags::ExtLearned] {
            message.header.flags = flags;
            assert_eq!(told(&message), None, "{flags:?}");
        }
        message.header.flags = NeighbourFlags::empty();
        message.header.family = AddressFamily::Inet;
        assert_eq!(told(&message), None);
        message.header.family = AddressFamily::Inet6;
        message
            .attributes
            .push(NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed));
        assert_eq!(told(&message), None);
    }
}
