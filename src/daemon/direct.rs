//! Direct routing: past the tunnel to peers on our own link.
//!
//! A peer whose public address the kernel reaches on the underlay interface without a gateway gets a kernel route through that address,
//! which is more specific than the network's route to the device. All others, and this one as soon as the kernel will not have its
//! route, go through the tunnel; so nothing here is ever a failure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::addr::Prefix;
use crate::backend::Backend;
use crate::control::peers::PeerTable;
use crate::daemon::kernel_routes::{KernelRoutes, Leftovers, Upkeep, Wanted};
use crate::daemon::network::{Setup, networks, prefixes};
use crate::host::netlink::{Gateway, Route};
use crate::lease::{LeaseAttrs, Subnet};

/// The kernel routes beside a tunnel.
///
/// A backend that does not route directly has one as well: it removes what an earlier life with another backend left behind, which would
/// lead packets past the tunnel.
pub(super) struct DirectRoutes {
    /// The routes; their due time is when to call [`follow`](Self::follow) again.
    pub(super) kernel: KernelRoutes,
}

impl DirectRoutes {
    pub(super) fn new<B: Backend>(setup: &Setup<'_, B>) -> Self {
        let upkeep = if setup.backend.direct_routing() {
            Upkeep::Always
        } else {
            Upkeep::UntilClean
        };
        Self {
            kernel: KernelRoutes::new(setup.netlink.clone(), networks(setup.config), upkeep),
        }
    }

    /// Makes the routes those of the peers in `table`; `own` is our own subnet. Gives the peers that are routed directly.
    pub(super) async fn follow<B: Backend>(
        &mut self,
        setup: &Setup<'_, B>,
        own: Subnet,
        table: &PeerTable,
    ) -> BTreeMap<Subnet, String> {
        let index = match setup.netlink.link(&setup.interface.name).await {
            Ok(link) => link.index,
            // Its routes went with it; the next look finds it again.
            Err(_) => setup.interface.index,
        };
        let mut wanted = Wanted::default();
        if setup.backend.direct_routing() {
            for (subnet, attrs) in table.iter() {
                for prefix in prefixes(subnet) {
                    if let Some(gateway) = on_link(setup, prefix, attrs, index).await {
                        wanted.route(Route {
                            gateway: Gateway::Via(gateway),
                            ..Route::direct(prefix, index)
                        });
                    }
                }
            }
        }
        let leftovers = Leftovers::of(table);
        let own: Vec<Prefix> = prefixes(own).collect();
        // Without the privilege there would be no device, and this would not have been reached.
        let _ = self.kernel.sync(wanted, &own, index, leftovers).await;
        let direct = table.iter().filter_map(|(subnet, _)| {
            let shown = self.kernel.describe(prefixes(subnet))?;
            Some((subnet, shown))
        });
        direct.collect()
    }
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
