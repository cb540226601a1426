//! Takes away what a network leaves in the kernel when its node stops.
//!
//! A node that is to come back leaves its kernel routes and locators where they are, so that packets flow meanwhile. One of a network that
//! was removed does not come back. Its device and the routes to it went with its threads; the rest goes here. What belongs to it is known by
//! Kersey's protocol number and by lying in the network's ranges, which no other network on this host has a part of.

use crate::addr::Prefix;
use crate::host::netlink::{Netlink, NetlinkError};

/// Removes the routes and locators in `ranges` that are Kersey's; all that can be.
///
/// # Errors
/// The first that could not be removed.
pub(super) async fn withdraw(ranges: &[Prefix]) -> Result<(), NetlinkError> {
    if ranges.is_empty() {
        return Ok(());
    }
    let within = |prefix: Prefix| ranges.iter().any(|range| range.covers(prefix));
    let netlink = Netlink::open()?;
    let mut failed = Ok(());
    for route in netlink.own_routes().await? {
        if within(route.destination) {
            failed = failed.and(netlink.delete_route(&route).await);
        }
    }
    for subnet in netlink.own_blackholes().await? {
        if within(subnet) {
            failed = failed.and(netlink.delete_own_blackhole(subnet).await);
        }
    }
    for locator in netlink.own_local_prefixes().await? {
        if within(locator.into()) {
            failed = failed.and(netlink.delete_local_prefix(locator).await);
        }
    }
    for locator in netlink.own_backstops().await? {
        if within(locator.into()) {
            failed = failed.and(netlink.delete_backstop(locator).await);
        }
    }
    failed
}
