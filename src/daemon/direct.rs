//! Kernel routes beside the tunnel, to peers on our own link: past the tunnel (direct routing), and to where the tunnel's packets go (locators).
//!
//! Where the overlay's network holds the underlay's own address, peers' routes into the tunnel are kept here as well, for there is no route of
//! the whole network.
//!
//! A peer whose public address the kernel reaches on the underlay interface without a gateway gets a kernel route through that address,
//! which is more specific than the network's route to the device. All others, and this one as soon as the kernel will not have its
//! route, go through the tunnel; so nothing here is ever a failure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::addr::{Ipv6Prefix, MacAddr, Prefix};
use crate::backend::{Backend, Locator};
use crate::control::peers::Peers;
use crate::daemon::kernel_routes::{KernelRoutes, Leftovers, Upkeep, Wanted};
use crate::daemon::network::{Setup, networks, own_locators};
use crate::host::netlink::{Gateway, NetlinkError, Route};
use crate::lease::{LeaseAttrs, Subnet};

/// The kernel routes beside a tunnel.
///
/// A backend that does not route directly has one as well: it removes what an earlier life with another backend left behind, which would
/// lead packets past the tunnel.
pub(super) struct DirectRoutes {
    /// The routes; their due time is when to call [`follow`](Self::follow) again.
    pub(super) kernel: KernelRoutes,
    /// Peers whose locator is another peer's, or ours.
    pub(super) refused: BTreeSet<Subnet>,
    /// Neighbours pinned because their nodes do not answer for their addresses.
    pinned: BTreeMap<IpAddr, MacAddr>,
}

impl DirectRoutes {
    pub(super) fn new<B: Backend>(setup: &Setup<'_, B>) -> Self {
        let blocks = setup.backend.blocks();
        let is_shared = setup.shared_networks().next().is_some();
        let upkeep = if setup.backend.direct_routing() || is_shared || !blocks.is_empty() {
            Upkeep::Always
        } else {
            Upkeep::UntilClean
        };
        let networks = networks(setup.config).chain(blocks.into_iter().map(Prefix::V6));
        Self {
            kernel: KernelRoutes::new(setup.netlink.clone(), networks, upkeep)
                .leave(own_locators(&setup.backend.carrier()).map(Prefix::V6)),
            refused: BTreeSet::new(),
            pinned: BTreeMap::new(),
        }
    }

    /// Makes the routes those of the peers in `table`; `own` is our own subnet. Gives the peers that are routed directly.
    pub(super) async fn follow<B: Backend>(
        &mut self,
        setup: &Setup<'_, B>,
        own: Subnet,
        table: &Peers,
    ) -> BTreeMap<Subnet, String> {
        let index = match setup.netlink.link(&setup.interface.name).await {
            Ok(link) => link.index,
            // Its routes went with it; the next look finds it again.
            Err(_) => setup.interface.index,
        };
        let mut wanted = Wanted::default();
        // Whose route there is of the tunnel, not past it.
        let mut tunnelled = BTreeSet::new();
        if setup.backend.direct_routing() {
            for (subnet, attrs) in table.iter() {
                for prefix in subnet.prefixes() {
                    if let Some(gateway) = on_link(setup, prefix, attrs, index).await {
                        wanted.route(Route {
                            gateway: Gateway::Via(gateway),
                            ..Route::direct(prefix, index)
                        });
                    }
                }
            }
        }
        if setup.shared_networks().next().is_some() {
            match setup.netlink.link(&setup.options.device).await {
                Ok(device) => {
                    for prefix in table.iter().flat_map(|(subnet, _)| subnet.prefixes()) {
                        if setup.shared_networks().any(|network| network.covers(prefix))
                            && !wanted.has(prefix)
                        {
                            wanted.route(Route::direct(prefix, device.index));
                            tunnelled.insert(prefix);
                        }
                    }
                }
                // Its routes went with it, and its threads notice.
                Err(NetlinkError::NoLink(_)) => {}
                Err(error) => {
                    self.kernel.cannot_look(error);
                    return BTreeMap::new();
                }
            }
        }
        let located = self.located(setup, table);
        for &locator in located.values() {
            if let Some(route) = locator_route(setup, locator, index).await {
                wanted.route(route);
            }
        }
        self.pin(setup, &located, index).await;
        let leftovers = Leftovers::of(table);
        let own: Vec<Prefix> = own
            .prefixes()
            .chain(own_locators(&setup.backend.carrier()).map(Prefix::V6))
            .collect();
        // Without the privilege there would be no device, and this would not have been reached.
        let _ = self.kernel.sync(wanted, &own, index, leftovers).await;
        let direct = table.iter().filter_map(|(subnet, _)| {
            let past = subnet.prefixes().filter(|prefix| !tunnelled.contains(prefix));
            let shown = self.kernel.describe(past);
            let shown = shown.or_else(|| self.kernel.trouble(subnet.prefixes()))?;
            Some((subnet, shown))
        });
        direct.collect()
    }

    /// The locators of peers, each of which has its own: who claims one that is ours, or a part of an earlier peer's, is refused.
    fn located<B: Backend>(&mut self, setup: &Setup<'_, B>, table: &Peers) -> BTreeMap<Subnet, Locator> {
        let mut taken: Vec<Ipv6Prefix> = own_locators(&setup.backend.carrier()).collect();
        let mut located = BTreeMap::new();
        let mut refused = BTreeSet::new();
        for (subnet, attrs) in table.iter() {
            let Some(locator) = setup.backend.locator_of(attrs) else {
                continue;
            };
            if taken.iter().any(|taken| taken.overlaps(locator.prefix)) {
                if !self.refused.contains(&subnet) {
                    let (locator, public_ip) = (locator.prefix, attrs.public_ip);
                    tracing::warn!(%subnet, %public_ip, %locator, "the peer claims the locator of another node; it is not reached");
                }
                refused.insert(subnet);
            } else {
                taken.push(locator.prefix);
                located.insert(subnet, locator);
            }
        }
        self.refused = refused;
        located
    }

    /// Pins the Ethernet addresses of peers that are known by them only, and lets go of those that are gone.
    async fn pin<B: Backend>(
        &mut self,
        setup: &Setup<'_, B>,
        located: &BTreeMap<Subnet, Locator>,
        index: u32,
    ) {
        let stations = located
            .values()
            .filter_map(|locator| Some((IpAddr::V6(locator.prefix.addr()), locator.station?)));
        let wanted: BTreeMap<IpAddr, MacAddr> = stations.collect();
        for (&addr, &mac) in &wanted {
            // Somebody may have removed it meanwhile, so it is set each time.
            match setup.netlink.set_neighbour(index, addr, mac.octets()).await {
                Ok(()) => {}
                Err(error) if self.pinned.get(&addr) != Some(&mac) => {
                    tracing::warn!(%addr, %mac, %error, "cannot pin a peer's Ethernet address; trying on");
                }
                Err(_) => {}
            }
        }
        for addr in self.pinned.keys().filter(|addr| !wanted.contains_key(*addr)) {
            // It goes stale by itself if this fails.
            let _ = setup.netlink.delete_neighbour(index, *addr).await;
        }
        self.pinned = wanted;
    }
}

/// The route to a peer's locator, if the peer is on our link; elsewhere routers must know it.
async fn locator_route<B: Backend>(setup: &Setup<'_, B>, locator: Locator, index: u32) -> Option<Route> {
    let direct = Route::direct(Prefix::V6(locator.prefix), index);
    if locator.station.is_some() {
        return Some(direct);
    }
    let gateway = IpAddr::V6(locator.gateway?);
    let way = setup.netlink.route_to(gateway).await.ok()?;
    (way.gateway.is_none() && way.index == index).then_some(Route {
        gateway: Gateway::Via(gateway),
        ..direct
    })
}

/// The peer's address of the prefix's family, if the kernel reaches it on the interface itself.
async fn on_link<B: Backend>(
    setup: &Setup<'_, B>,
    prefix: Prefix,
    attrs: &LeaseAttrs,
    index: u32,
) -> Option<IpAddr> {
    // A peer of no use to the tunnel is none to this: its backend is another.
    setup.backend.hop(prefix, attrs, setup.underlay()).ok()?;
    let addr = match prefix {
        Prefix::V4(_) => (!attrs.public_ip.is_unspecified()).then_some(IpAddr::V4(attrs.public_ip)),
        Prefix::V6(_) => attrs.public_ipv6.map(IpAddr::V6),
    }?;
    let way = setup.netlink.route_to(addr).await.ok()?;
    (way.gateway.is_none() && way.index == index).then_some(addr)
}
