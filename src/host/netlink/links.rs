//! Links and their addresses.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{InfoData, InfoVeth, LinkMessage};
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use super::message::{link, link_addr, v6_tunnel, vxlan_device};
use super::{Link, LinkAddr, Netlink, NetlinkError, OrRefused, VxlanDevice, errno, gone};

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

impl Netlink {
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
}
