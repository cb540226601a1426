//! A namespace behind a node, as a container has it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use kersey::addr::{Ipv4Prefix, Ipv6Prefix, Prefix};
use kersey::host::netlink::{Gateway, Route};
use kersey::lab::netns::Namespace;
use kersey::lab::traffic::End;

/// Where a pod's default gateway is in the subnet, and where the pod itself.
const GATEWAY: u32 = 1;
const POD: u32 = 9;

/// A namespace with an address of each of a node's subnets and a link to the node, whose MTU may be larger than the overlay's.
#[derive(Debug)]
pub(crate) struct Pod {
    namespace: Namespace,
    addrs: Vec<IpAddr>,
}

impl Pod {
    /// Puts a pod behind `node`; `tag` tells this process's pods apart.
    pub(crate) fn behind(node: &Namespace, subnets: &[String], tag: &str, mtu: u16) -> Self {
        let subnets: Vec<Prefix> = subnets.iter().map(|subnet| parse(subnet)).collect();
        let name = format!("kersey-{}-{tag}-pod", std::process::id());
        let namespace = Namespace::create(&name).unwrap();
        let far = namespace.open().unwrap();
        for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            node.sysctl(switch, "1").unwrap();
        }
        node.netlink(async |netlink| {
            netlink.add_veth("pod", "eth0", Some(far.as_fd())).await?;
            let index = netlink.link("pod").await?.index;
            netlink.set_mtu(index, mtu.into()).await?;
            netlink.set_up(index).await?;
            for &subnet in &subnets {
                netlink
                    .add_address(index, host(subnet, GATEWAY), subnet.len())
                    .await?;
            }
            Ok(())
        })
        .unwrap();
        namespace
            .netlink(async |netlink| {
                let index = netlink.link("eth0").await?.index;
                netlink.set_mtu(index, mtu.into()).await?;
                netlink.set_up(index).await?;
                for &subnet in &subnets {
                    netlink
                        .add_address(index, host(subnet, POD), subnet.len())
                        .await?;
                    let mut route = Route::direct(everywhere(subnet), index);
                    route.gateway = Gateway::Via(host(subnet, GATEWAY));
                    netlink.replace_route(&route).await?;
                }
                Ok(())
            })
            .unwrap();
        Self {
            namespace,
            addrs: subnets.iter().map(|&subnet| host(subnet, POD)).collect(),
        }
    }

    /// Its addresses as ends of traffic, one a family.
    pub(crate) fn ends(&self) -> Vec<End<'_>> {
        let ends = self.addrs.iter();
        ends.map(|&addr| End::new(&self.namespace, addr)).collect()
    }
}

fn parse(subnet: &str) -> Prefix {
    subnet
        .parse()
        .map(Prefix::V4)
        .or_else(|_| subnet.parse().map(Prefix::V6))
        .unwrap()
}

fn host(subnet: Prefix, low: u32) -> IpAddr {
    match subnet {
        Prefix::V4(subnet) => Ipv4Addr::from_bits(subnet.addr().to_bits() + low).into(),
        Prefix::V6(subnet) => Ipv6Addr::from_bits(subnet.addr().to_bits() + u128::from(low)).into(),
    }
}

/// The default route of a family.
fn everywhere(subnet: Prefix) -> Prefix {
    match subnet {
        Prefix::V4(_) => Prefix::V4(Ipv4Prefix::new(Ipv4Addr::UNSPECIFIED, 0).unwrap()),
        Prefix::V6(_) => Prefix::V6(Ipv6Prefix::new(Ipv6Addr::UNSPECIFIED, 0).unwrap()),
    }
}
