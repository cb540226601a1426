//! Routes: those of pods and peers, locators of this host, blackholes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::route::{RouteAttribute, RouteHeader, RouteMessage};
use rtnetlink::RouteMessageBuilder;

use super::message::{
    backstop, blackhole, default_route, held_backstop, held_blackhole, held_local_prefix, held_route, ip,
    local_prefix,
};
use super::{HeldRoute, Netlink, NetlinkError, OrRefused, Route, RouteLookup, RouteOwner, gone};
use crate::addr::{Ipv6Prefix, Prefix};

impl Netlink {
    /// Adds a route under [`KERSEY_PROTOCOL`](super::KERSEY_PROTOCOL), in place of one to the same destination with the same metric.
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

    /// Adds a route under [`KERSEY_PROTOCOL`](super::KERSEY_PROTOCOL) where none is.
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

    /// The routes of the main table that carry [`KERSEY_PROTOCOL`](super::KERSEY_PROTOCOL).
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn own_routes(&self) -> Result<Vec<Route>, NetlinkError> {
        let mut routes = self.routes().await?;
        routes.retain(|held| held.owner == RouteOwner::Kersey);
        Ok(routes.into_iter().map(|held| held.route).collect())
    }

    /// Makes every address of `prefix` one of this host's own (AnyIP: `ip -6 route add local PREFIX dev lo`), under [`KERSEY_PROTOCOL`](super::KERSEY_PROTOCOL).
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

    /// Has packets to `prefix` dropped without a word while no other route leads there, under [`KERSEY_PROTOCOL`](super::KERSEY_PROTOCOL).
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

    /// Has packets to `prefix` dropped while no other route leads there, under [`KERSEY_PROTOCOL`](super::KERSEY_PROTOCOL); for our own subnet.
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
}
