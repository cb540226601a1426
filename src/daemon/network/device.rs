//! What the devices of a data plane have in the kernel: addresses, MTU, routes and locators; set, and put right when somebody changes them.

use std::net::IpAddr;

use anyhow::{Context, Result};
use netlink_packet_route::link::LinkFlags;

use super::{Setup, networks};
use crate::addr::{Ipv6Prefix, Prefix};
use crate::backend::{Backend, Carrier};
use crate::daemon::switches;
use crate::host::netlink::{HeldRoute, NetlinkError, Route, RouteOwner};
use crate::host::outer_tun;
use crate::host::sysctl::{self, Forwarding, SysctlError};
use crate::lease::Subnet;

/// The prefixes of the underlay that are this node's own.
pub(in crate::daemon) fn own_locators(carrier: &Carrier) -> impl Iterator<Item = Ipv6Prefix> {
    let locators: &[Ipv6Prefix] = match carrier {
        Carrier::Udp { .. } => &[],
        Carrier::Raw { sids, .. } => sids.locators(),
    };
    locators.iter().copied()
}

/// Makes the node's locators its own, and gives back what an earlier life had. They stay when the daemon ends: without them the kernel
/// would pass peers' packets on, back to where they came from.
pub(super) async fn claim_locators<B: Backend>(setup: &Setup<'_, B>) -> Result<()> {
    let wanted: Vec<Ipv6Prefix> = own_locators(&setup.backend.carrier()).collect();
    let blocks = setup.backend.blocks();
    if blocks.is_empty() {
        return Ok(());
    }
    // Another Kersey on this host may have its own, in another block.
    let in_blocks = |held: Ipv6Prefix| blocks.iter().any(|block| block.covers(held));
    for held in setup.netlink.own_local_prefixes().await? {
        if in_blocks(held) && !wanted.contains(&held) {
            setup.netlink.delete_local_prefix(held).await?;
        }
    }
    for &locator in &wanted {
        setup.netlink.add_local_prefix(locator).await?;
    }
    for held in setup.netlink.own_backstops().await? {
        if in_blocks(held) {
            setup.netlink.delete_backstop(held).await?;
        }
    }
    if !wanted.is_empty()
        && let Ok(tunnels) = setup.netlink.v6_tunnels().await
        && !tunnels.is_empty()
    {
        tracing::warn!(
            devices = tunnels.join(" "),
            "the kernel has tunnels of its own that look at packets to our SIDs, and may answer peers that their port is unreachable; if it does, take them down or use --srv6-io tun"
        );
    }
    let mut ledger = |changes: &[sysctl::Change]| switches::remember(setup.data_dir, changes);
    if !wanted.is_empty() && sysctl::disable_seg6(&setup.interface.name, &mut ledger)? {
        tracing::warn!(
            interface = setup.interface.name,
            "the kernel's own segment routing was on here and would have taken packets to our SIDs; switched off (seg6_enabled=0)"
        );
    }
    Ok(())
}

/// Routes the node's locators to the outer device, whose number it gives, and has the kernel forward. When the daemon ends, a blackhole stays
/// in the place of those routes, for the same reason.
pub(super) async fn route_locators<B: Backend>(setup: &Setup<'_, B>) -> Result<u32> {
    let netlink = &setup.netlink;
    let wanted: Vec<Ipv6Prefix> = own_locators(&setup.backend.carrier()).collect();
    // As above: others' stay.
    let blocks = setup.backend.blocks();
    let in_blocks = |held: Ipv6Prefix| blocks.iter().any(|block| block.covers(held));
    for held in netlink.own_backstops().await? {
        if in_blocks(held) && !wanted.contains(&held) {
            netlink.delete_backstop(held).await?;
        }
    }
    for &locator in &wanted {
        netlink.add_backstop(locator).await?;
    }
    // Local routes come first, and the device would get nothing.
    for held in netlink.own_local_prefixes().await? {
        if in_blocks(held) {
            netlink.delete_local_prefix(held).await?;
        }
    }
    let index = configure_outer(setup).await?;
    let name = outer_tun::name(&setup.options.device);
    let underlay = setup.interface.name.as_str();
    let mut ledger = |changes: &[sysctl::Change]| switches::remember(setup.data_dir, changes);
    let forwarding = sysctl::forward_ipv6([underlay, &name], &mut ledger)
        .context("cannot have the kernel forward IPv6, which is needed without raw sockets; where /proc/sys is read-only, set net.ipv6.conf.all.forwarding=1 outside")?;
    match forwarding {
        Forwarding::Global => {}
        Forwarding::PerLink => tracing::info!(
            links = format!("{underlay} {name}"),
            "IPv6 packets that come in by these are forwarded (force_forwarding=1)"
        ),
        Forwarding::MadeGlobal => tracing::warn!(
            "this host now forwards IPv6 between all its interfaces (net.ipv6.conf.all.forwarding=1); those that took router advertisements still do (accept_ra=2)"
        ),
    }
    Ok(index)
}

/// Sets the outer device up, and the locators' routes to it.
pub(super) async fn configure_outer<B: Backend>(setup: &Setup<'_, B>) -> Result<u32> {
    let name = outer_tun::name(&setup.options.device);
    let netlink = &setup.netlink;
    let index = netlink.link(&name).await?.index;
    sysctl::enable_ipv6(&name)?;
    if let Err(error) = sysctl::no_link_local_address(&name) {
        tracing::warn!(%error, "the kernel may send link-local packets into the outer device; they are dropped and counted");
    }
    if let Err(error) = sysctl::believe_nobody(&name) {
        tracing::warn!(%error, "the kernel may believe router advertisements that come in by the outer device");
    }
    netlink.set_mtu(index, outer_tun::MTU_BYTES).await?;
    netlink.set_tx_queue_len(index, outer_tun::QUEUE_LEN).await?;
    netlink.set_up(index).await?;
    for locator in own_locators(&setup.backend.carrier()) {
        netlink
            .replace_route(&Route::direct(locator.into(), index))
            .await?;
    }
    Ok(index)
}

/// Turns IPv6 on on the device if the network has it, for a host may have it off by default; whether the device has it.
///
/// # Errors
/// The network has it, and the device cannot.
pub(super) fn device_v6<B: Backend>(setup: &Setup<'_, B>) -> Result<bool, SysctlError> {
    if setup.config.v6.is_none() {
        return Ok(false);
    }
    sysctl::enable_ipv6(&setup.options.device).map(|()| true)
}

/// Which of these the device can have, where not both families.
fn carried(prefixes: impl Iterator<Item = Prefix> + Clone, v6: bool) -> impl Iterator<Item = Prefix> + Clone {
    prefixes.filter(move |prefix| v6 || matches!(prefix, Prefix::V4(_)))
}

/// Gives the device its address, MTU and routes, as flannel does: the subnet's first address alone, and the whole network behind it, unless
/// the underlay is in that. Where it can have no IPv6, IPv4 must do.
pub(super) async fn configure_device<B: Backend>(setup: &Setup<'_, B>, own: Subnet) -> Result<u32> {
    let name = &setup.options.device;
    let netlink = &setup.netlink;
    // Packets of the kernel's own making (router solicitations, multicast reports) have no place in a tunnel.
    let quiet = if setup.config.v6.is_some() {
        sysctl::no_link_local_address(name)
    } else {
        sysctl::disable_ipv6(name)
    };
    if let Err(error) = quiet {
        tracing::warn!(%error, "the kernel may send link-local packets into the device; they are dropped and counted");
    }
    if let Err(error) = sysctl::believe_nobody(name) {
        tracing::warn!(%error, "the kernel may believe router advertisements that come in by the device; peers could send some");
    }
    let v6 = match device_v6(setup) {
        Ok(v6) => v6,
        Err(error) if own.ipv4().is_some() => {
            tracing::warn!(
                device = name,
                error = format!("{:#}", anyhow::Error::from(error)),
                "IPv6 is off on the device and cannot be turned on, so it carries IPv4 alone; where /proc/sys is read-only, set net.ipv6.conf.default.disable_ipv6=0 outside, before the start"
            );
            false
        }
        Err(error) => {
            return Err(anyhow::Error::from(error).context(
                "IPv6 is off on the device and the network has nothing else; where /proc/sys is read-only, set net.ipv6.conf.default.disable_ipv6=0 outside, before the start",
            ));
        }
    };
    let index = netlink.link(name).await?.index;
    netlink.set_mtu(index, u32::from(setup.inner_mtu.bytes())).await?;
    netlink.set_up(index).await?;
    for prefix in carried(own.prefixes(), v6) {
        let host_len = match prefix {
            Prefix::V4(_) => 32,
            Prefix::V6(_) => 128,
        };
        let addr: IpAddr = prefix.addr();
        netlink.add_address(index, addr, host_len).await?;
    }
    let held = netlink.routes().await?;
    for network in carried(networks(setup.config), v6) {
        let route = Route::direct(network, index);
        if let Some(others) = foreign(&held, &route) {
            return Err(RouteTaken {
                network,
                route: others.clone(),
            }
            .into());
        }
        if !setup.is_shared(network) {
            netlink.replace_route(&route).await?;
        }
    }
    Ok(index)
}

/// The network is one that this host has a route to already. Were it replaced, the host would lose its link, or all of its neighbours.
#[derive(Debug, thiserror::Error)]
#[error(
    "Network {network}: this host has a route to it already ({route}), which is not Kersey's to replace; choose another network, or take the route away"
)]
struct RouteTaken {
    network: Prefix,
    route: Route,
}

/// Somebody else's route to where `route` leads, whatever its metric. A default route is nobody's to replace.
fn foreign<'a>(held: &'a [HeldRoute], route: &Route) -> Option<&'a Route> {
    let default = route.destination.len() == 0;
    held.iter()
        .filter(|held| held.route.destination == route.destination && held.route.index != route.index)
        .find(|held| held.owner != RouteOwner::Kersey || default)
        .map(|held| &held.route)
}

/// Takes away what an earlier life of the device had and this one has not: its addresses and routes are those of another lease.
pub(super) async fn tidy_device<B: Backend>(setup: &Setup<'_, B>, index: u32, own: Subnet) -> Result<()> {
    let netlink = &setup.netlink;
    let addresses = netlink.addresses().await?;
    for held in addresses.iter().filter(|held| held.index == index) {
        let link_local = matches!(held.addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
        if !link_local && !own.prefixes().any(|prefix| prefix.addr() == held.addr) {
            netlink.delete_address(index, held.addr, held.prefix_len).await?;
        }
    }
    let routes = netlink.own_routes().await?;
    for route in routes.iter().filter(|route| route.index == index) {
        // Those to parts of a network are seen to with the routes to peers.
        let is_part = |network: Prefix| network.covers(route.destination) && network != route.destination;
        let is_whole = |network| Route::direct(network, index) == *route;
        if !setup.whole_networks().any(is_whole) && !setup.shared_networks().any(is_part) {
            netlink.delete_route(route).await?;
        }
    }
    Ok(())
}

/// What a look at the device came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::daemon) enum Repair {
    /// It was as it should be, or gone; that the threads notice.
    NotNeeded,
    /// It was not, and is now.
    Done,
}

/// Puts the device right again if somebody set it down, or changed its address or MTU; the kernel takes its routes away
/// when it goes down.
pub(in crate::daemon) async fn repair_device<B: Backend>(
    setup: &Setup<'_, B>,
    own: Subnet,
    outer_index: Option<u32>,
) -> Result<Repair> {
    let netlink = &setup.netlink;
    if let Some(index) = outer_index
        && repair_outer(setup, index).await? == Repair::Done
    {
        return Ok(Repair::Done);
    }
    let link = match netlink.link(&setup.options.device).await {
        Ok(link) => link,
        Err(NetlinkError::NoLink(_)) => return Ok(Repair::NotNeeded),
        Err(error) => return Err(error.into()),
    };
    let held = netlink.addresses().await?;
    let routes = netlink.own_routes().await?;
    // Without it on the device there is nothing to put right.
    let v6 = device_v6(setup).unwrap_or(false);
    let has_addresses = carried(own.prefixes(), v6).all(|prefix| {
        held.iter()
            .any(|held| held.index == link.index && held.addr == prefix.addr())
    });
    let has_routes = carried(setup.whole_networks(), v6)
        .all(|network| routes.contains(&Route::direct(network, link.index)));
    let as_it_should_be = link.flags.contains(LinkFlags::Up)
        && link.mtu_bytes == u32::from(setup.inner_mtu.bytes())
        && has_addresses
        && has_routes;
    if as_it_should_be {
        return Ok(Repair::NotNeeded);
    }
    configure_device(setup, own).await?;
    Ok(Repair::Done)
}

/// The same for the outer device.
pub(super) async fn repair_outer<B: Backend>(setup: &Setup<'_, B>, index: u32) -> Result<Repair> {
    let netlink = &setup.netlink;
    let link = match netlink.link(&outer_tun::name(&setup.options.device)).await {
        Ok(link) if link.index == index => link,
        // Gone; the thread that reads it notices.
        Ok(_) | Err(NetlinkError::NoLink(_)) => return Ok(Repair::NotNeeded),
        Err(error) => return Err(error.into()),
    };
    let routes = netlink.own_routes().await?;
    let has_routes = own_locators(&setup.backend.carrier())
        .all(|locator| routes.contains(&Route::direct(locator.into(), index)));
    let as_it_should_be =
        link.flags.contains(LinkFlags::Up) && link.mtu_bytes == outer_tun::MTU_BYTES && has_routes;
    if as_it_should_be {
        return Ok(Repair::NotNeeded);
    }
    configure_outer(setup).await?;
    Ok(Repair::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_others_routes_to_the_same_network_are_in_the_way() {
        let network: Prefix = Prefix::V4("192.168.7.0/24".parse().unwrap());
        let part: Prefix = Prefix::V4("192.168.7.0/25".parse().unwrap());
        let held = |owner, destination| HeldRoute {
            owner,
            route: Route::direct(destination, 2),
        };
        let wanted = Route::direct(network, 9);
        for owner in [RouteOwner::Kernel, RouteOwner::Other] {
            let all = [held(owner, part), held(RouteOwner::Kersey, network)];
            assert_eq!(foreign(&all, &wanted), None);
            let all = [held(RouteOwner::Kersey, network), held(owner, network)];
            assert_eq!(foreign(&all, &wanted), Some(&Route::direct(network, 2)));
        }
        let all: Prefix = Prefix::V4("0.0.0.0/0".parse().unwrap());
        let everywhere = [held(RouteOwner::Kersey, all)];
        assert!(foreign(&everywhere, &Route::direct(all, 9)).is_some());
        assert_eq!(foreign(&everywhere, &Route::direct(all, 2)), None);
    }
}
