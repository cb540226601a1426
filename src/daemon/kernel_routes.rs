//! Kernel routes to peers: made so that they are those wanted, and kept so.
//!
//! The problem: the kernel's table is not ours alone. A link that goes down takes routes along without a word, an operator deletes one,
//! flannel left some behind, and an earlier life of this daemon did, too. So there is no list of what we did; each time, the table is
//! read, compared with what is wanted, and the difference made:
//!
//! ```text
//!   peers ──▶ Wanted ─┐
//!                     ├─▶ plan (pure) ─▶ replace, delete ─▶ kernel
//!   kernel's table ───┘                     └▶ troubles, told once each
//! ```
//!
//! It is due when the peers change - once in 100 ms, however many do - and 100 ms after an event that may concern it; and every 10 s, since
//! not every loss is an event.
//!
//! Invariants:
//!
//! - Ours are the routes that carry our protocol number and lead to a part of the overlay, smaller than the whole. The route of the whole
//!   network to the device is [`network`](super::network)'s, and other overlays of this host have other networks.
//! - A route to the same destination by anybody else is replaced, as flannel does - but for one that the kernel made for an address of this
//!   host: a pod bridge left from an earlier lease would lose its pods.
//! - No route is made that would cover the underlay's own networks, addresses or gateways, or our own subnet.
//! - What was left behind by an earlier life is removed once the store has told who the peers are; until then it may still be wanted.
//!   What this life made goes at once.
//! - A gateway that did not answer is asked for again ([`gateways`](super::gateways)).
//! - When the daemon ends, routes stay, as flannel's do: packets flow while it restarts.
//!
//! Limits: the whole main table is read each time, which on a router with the Internet's routes takes a second of one core.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::addr::Prefix;
use crate::control::peers::Peers;
use crate::daemon::gateways::Inquiry;
use crate::host::netlink::{
    Gateway, HeldRoute, LinkAddr, LinkChange, NeighbourKey, Netlink, NetlinkError, Route, RouteOwner,
};

/// How long events gather before we look: a link that flaps makes many.
const GATHER: Duration = Duration::from_millis(100);
/// How often to look in any case; flannel's period.
const RESYNC: Duration = Duration::from_secs(10);
/// The pause before another attempt when the table could not even be read.
const RETRY: Duration = Duration::from_secs(1);
/// How many routes one log line names.
const NAMED: usize = 8;

/// Routes to have, and why others cannot be; by destination.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    routes: BTreeMap<Prefix, Route>,
    troubles: BTreeMap<Prefix, String>,
}

impl Wanted {
    /// Asks for a route.
    pub(super) fn route(&mut self, route: Route) {
        self.routes.insert(route.destination, route);
    }

    /// Whether a route is asked for.
    pub(super) fn has(&self, destination: Prefix) -> bool {
        self.routes.contains_key(&destination)
    }

    /// Says why a destination has none.
    pub(super) fn trouble(&mut self, destination: Prefix, why: impl ToString) {
        self.troubles.insert(destination, why.to_string());
    }
}

/// What becomes of routes from an earlier life that nobody wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leftovers {
    /// They stay: it is not known yet who the peers are.
    Keep,
    /// They go.
    Remove,
}

impl Leftovers {
    /// What may be done by what the store has said so far.
    pub(super) fn of(table: &Peers) -> Self {
        if table.is_confirmed() {
            Self::Remove
        } else {
            Self::Keep
        }
    }
}

/// The kernel lets this process change nothing.
#[derive(Debug, thiserror::Error)]
#[error("cannot set kernel routes")]
pub(super) struct Denied(#[source] NetlinkError);

/// How long routes are seen to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Upkeep {
    /// As long as the daemon runs.
    Always,
    /// None are ever wanted: until leftovers are gone.
    UntilClean,
}

/// The routes this daemon keeps in the kernel.
pub(super) struct KernelRoutes {
    netlink: Netlink,
    /// From the first IPv6 gateway on.
    inquiry: Option<Inquiry>,
    upkeep: Upkeep,
    /// The overlay's networks, one a family.
    networks: Vec<Prefix>,
    /// Our own prefixes in them, whose routes are others' to see to unless they lead to the underlay.
    left_alone: Vec<Prefix>,
    /// The number of the underlay interface when last looked.
    underlay: u32,
    /// What was wanted last time.
    wanted: BTreeMap<Prefix, Route>,
    /// What has been told of a destination, so that it is told once.
    troubles: BTreeMap<Prefix, String>,
    /// The last failure to read the table.
    told: String,
    /// When to look again; never once all is done that will ever be.
    due: Option<Instant>,
    /// When the last look for the sake of peers ended, or is due.
    for_peers: Option<Instant>,
    /// Whether peers have changed since we last looked.
    peers_are_new: bool,
}

impl KernelRoutes {
    /// Prepares to keep routes to parts of `networks`; touches nothing.
    pub(super) fn new(netlink: Netlink, networks: impl IntoIterator<Item = Prefix>, upkeep: Upkeep) -> Self {
        Self {
            netlink,
            inquiry: None,
            upkeep,
            networks: networks.into_iter().collect(),
            left_alone: Vec::new(),
            underlay: 0,
            wanted: BTreeMap::new(),
            troubles: BTreeMap::new(),
            told: String::new(),
            due: Some(Instant::now()),
            for_peers: None,
            peers_are_new: false,
        }
    }

    /// Leaves routes to `prefixes` alone that do not lead to the underlay.
    pub(super) fn leave(mut self, prefixes: impl IntoIterator<Item = Prefix>) -> Self {
        self.left_alone.extend(prefixes);
        self
    }

    /// When to look again, if ever.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Looks again at once, or if peers have only just changed a little later, when more may have come.
    pub(super) fn peers_changed(&mut self) {
        let time = next_look(Instant::now(), self.for_peers);
        self.for_peers = Some(time);
        self.peers_are_new = true;
        self.look_by(time);
    }

    fn look_by(&mut self, time: Instant) {
        self.due = self.due.map(|due| due.min(time));
    }

    /// Looks again soon if `change` may have cost a route through the interface called `underlay`.
    pub(super) fn note(&mut self, change: &LinkChange, underlay: &str) {
        let concerns = match change {
            LinkChange::Link(link) | LinkChange::LinkGone(link) => link.name == underlay,
            LinkChange::Address(held) | LinkChange::AddressGone(held) => held.index == self.underlay,
            LinkChange::RouteGone(route) => self.wanted.get(&route.destination) == Some(route),
            LinkChange::DefaultRoute(_) | LinkChange::Rule => false,
            LinkChange::Overrun => true,
        };
        if concerns {
            self.look_by(Instant::now() + GATHER);
        }
    }

    /// Says, once, that we could not even look, and looks again in a second.
    pub(super) fn cannot_look(&mut self, error: NetlinkError) {
        let text = format!("{:#}", anyhow::Error::from(error));
        if text != self.told {
            tracing::warn!(error = text, "cannot see to the kernel's routes; trying on");
            self.told = text;
        }
        self.due = Some(Instant::now() + RETRY);
    }

    /// How a peer's subnets fared when we last looked: `installed`, or what stands in the way. None if no route is wanted.
    pub(super) fn describe(&self, mut subnets: impl Iterator<Item = Prefix> + Clone) -> Option<String> {
        if let Some(trouble) = self.trouble(subnets.clone()) {
            return Some(trouble);
        }
        let wanted = subnets.any(|subnet| self.wanted.contains_key(&subnet));
        wanted.then(|| "installed".to_owned())
    }

    /// What stands in the way of a peer's routes, if anything does.
    pub(super) fn trouble(&self, mut subnets: impl Iterator<Item = Prefix>) -> Option<String> {
        subnets.find_map(|subnet| self.troubles.get(&subnet)).cloned()
    }

    /// Makes the kernel's routes those wanted; `own` is our own subnet, `underlay` the interface's number. What fails is told and tried
    /// again when due.
    ///
    /// # Errors
    /// We lack the privilege, and will for ever.
    pub(super) async fn sync(
        &mut self,
        wanted: Wanted,
        own: &[Prefix],
        underlay: u32,
        leftovers: Leftovers,
    ) -> Result<(), Denied> {
        self.underlay = underlay;
        self.due = Some(Instant::now() + RESYNC);
        let (mut held, addresses) = match self.read().await {
            Ok(read) => read,
            Err(error) => {
                self.cannot_look(error);
                return Ok(());
            }
        };
        self.told.clear();
        held.retain(|HeldRoute { route, .. }| {
            route.index == underlay || !self.left_alone.contains(&route.destination)
        });
        let Wanted {
            mut routes,
            mut troubles,
        } = wanted;
        let protected = protected(&held, &addresses, underlay);
        routes.retain(|destination, _| {
            let refused = refusal(*destination, &self.networks, own, &protected);
            if let Some(why) = refused {
                troubles.insert(*destination, why.to_owned());
            }
            refused.is_none()
        });
        let previous: BTreeSet<Prefix> = self.wanted.keys().copied().collect();
        let plan = plan(&routes, &held, &self.networks, &previous, leftovers);
        let (set, removed) = (plan.set.len(), plan.delete.len());
        if self.upkeep == Upkeep::UntilClean && leftovers == Leftovers::Remove && removed == 0 {
            self.due = None;
        }
        self.delete(&plan.delete).await;
        for destination in plan.blocked {
            let why = "the kernel has that network on an interface of this host";
            troubles.insert(destination, why.to_owned());
        }
        let mut refused = 0;
        for Change { route, instead_of } in plan.set {
            if let Err(error) = self.netlink.replace_route(&route).await {
                if error.raw_os_error() == Some(libc::EPERM) {
                    return Err(Denied(error));
                }
                refused += 1;
                troubles.insert(route.destination, cause(&error));
                // Whoever is there, it is not the peer any more.
                self.delete(&instead_of).await;
            }
        }
        self.tell(&troubles);
        if set > refused || removed > 0 {
            tracing::info!(
                wanted = routes.len(),
                set = set - refused,
                removed,
                "kernel routes changed"
            );
        }
        self.look_after(routes.values().filter_map(v6_gateway).collect());
        self.wanted = routes;
        self.troubles = troubles;
        if std::mem::take(&mut self.peers_are_new) {
            self.for_peers = Some(Instant::now());
        }
        Ok(())
    }

    fn look_after(&mut self, gateways: BTreeSet<NeighbourKey>) {
        if self.inquiry.is_none() && !gateways.is_empty() {
            self.inquiry = Some(Inquiry::start(self.netlink.clone()));
        }
        if let Some(inquiry) = &self.inquiry {
            inquiry.want(gateways);
        }
    }

    async fn read(&self) -> Result<(Vec<HeldRoute>, Vec<LinkAddr>), NetlinkError> {
        Ok((self.netlink.routes().await?, self.netlink.addresses().await?))
    }

    async fn delete(&self, routes: &[Route]) {
        for route in routes {
            if let Err(error) = self.netlink.delete_route(route).await {
                // Whatever it was, the next look sees whether the route is still there.
                tracing::debug!(%route, error = cause(&error), "cannot delete a route");
            }
        }
    }

    /// Logs what is new among `troubles`, one line a cause, and what is over.
    fn tell(&self, troubles: &BTreeMap<Prefix, String>) {
        let mut news: BTreeMap<&str, Vec<Prefix>> = BTreeMap::new();
        for (destination, why) in troubles {
            if self.troubles.get(destination) != Some(why) {
                news.entry(why).or_default().push(*destination);
            }
        }
        for (error, destinations) in news {
            let subnets = names(&destinations);
            tracing::warn!(error, subnets, "no kernel route to some peers; trying on");
        }
        let over: Vec<Prefix> = self
            .troubles
            .keys()
            .filter(|destination| !troubles.contains_key(destination))
            .copied()
            .collect();
        if !over.is_empty() {
            tracing::info!(
                subnets = names(&over),
                "what kept peers from a kernel route is over"
            );
        }
    }
}

/// When to look after a change of peers, given when the look for the one before ended or is due.
fn next_look(now: Instant, before: Option<Instant>) -> Instant {
    match before {
        Some(before) if now < before => before,
        Some(before) => now.max(before + GATHER),
        None => now,
    }
}

/// Link and address of the neighbour that an IPv6 route leads through.
fn v6_gateway(route: &Route) -> Option<NeighbourKey> {
    match route.gateway {
        Gateway::Via(IpAddr::V6(addr)) | Gateway::OnLink(IpAddr::V6(addr)) => Some((route.index, addr)),
        Gateway::Via(IpAddr::V4(_)) | Gateway::OnLink(IpAddr::V4(_)) | Gateway::Direct => None,
    }
}

/// The first few, and how many more.
fn names(prefixes: &[Prefix]) -> String {
    let shown: Vec<String> = prefixes.iter().take(NAMED).map(ToString::to_string).collect();
    let more = prefixes.len() - shown.len();
    let shown = shown.join(" ");
    if more == 0 {
        shown
    } else {
        format!("{shown} and {more} more")
    }
}

/// What the kernel said, in words that are the same for every route.
fn cause(error: &NetlinkError) -> String {
    match error.raw_os_error() {
        // fib_check_nh and ip6_route_check_nh say these three of a gateway that no route of the link leads to.
        Some(code @ (libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL)) => {
            let said = std::io::Error::from_raw_os_error(code);
            format!("the peer's address is not on the underlay's link ({said})")
        }
        Some(code) => std::io::Error::from_raw_os_error(code).to_string(),
        None => error.to_string(),
    }
}

/// What no route of ours may take away: the underlay's networks, its addresses, and the gateways behind it.
fn protected(held: &[HeldRoute], addresses: &[LinkAddr], underlay: u32) -> Vec<Prefix> {
    let on_link = |route: &Route| route.index == underlay;
    let networks = held
        .iter()
        .filter(|held| held.owner == RouteOwner::Kernel && on_link(&held.route))
        .map(|held| held.route.destination);
    let gateways = held
        .iter()
        .filter(|held| held.route.destination.len() == 0 && on_link(&held.route))
        .filter_map(|held| match held.route.gateway {
            Gateway::Via(addr) | Gateway::OnLink(addr) => Some(Prefix::host(addr)),
            Gateway::Direct => None,
        });
    let own = addresses
        .iter()
        .filter(|held| held.index == underlay)
        .map(|held| Prefix::host(held.addr));
    networks.chain(gateways).chain(own).collect()
}

/// Why there must be no route to `destination`, whoever asks for it.
fn refusal(
    destination: Prefix,
    networks: &[Prefix],
    own: &[Prefix],
    protected: &[Prefix],
) -> Option<&'static str> {
    if !is_part(destination, networks) {
        return Some("it is not a part of the overlay's network");
    }
    if own
        .iter()
        .any(|own| own.covers(destination) || destination.covers(*own))
    {
        return Some("it overlaps our own subnet");
    }
    if protected.iter().any(|part| destination.covers(*part)) {
        return Some("it covers a network, an address or a gateway of the underlay");
    }
    None
}

/// Whether `prefix` lies in one of the networks and is smaller.
fn is_part(prefix: Prefix, networks: &[Prefix]) -> bool {
    networks
        .iter()
        .any(|network| network.covers(prefix) && network.len() < prefix.len())
}

/// A route to set, and those of ours that it takes the place of.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    route: Route,
    instead_of: Vec<Route>,
}

/// The difference between what is wanted and what is.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    set: Vec<Change>,
    delete: Vec<Route>,
    /// Wanted, but the kernel has a route of its own there.
    blocked: Vec<Prefix>,
}

/// Compares. `previous` are the destinations this life wanted before.
fn plan(
    wanted: &BTreeMap<Prefix, Route>,
    held: &[HeldRoute],
    networks: &[Prefix],
    previous: &BTreeSet<Prefix>,
    leftovers: Leftovers,
) -> Plan {
    let mut ours: BTreeMap<Prefix, Vec<&Route>> = BTreeMap::new();
    let mut kernels = BTreeSet::new();
    for HeldRoute { owner, route } in held {
        match owner {
            RouteOwner::Kersey if is_part(route.destination, networks) => {
                ours.entry(route.destination).or_default().push(route);
            }
            RouteOwner::Kernel => {
                kernels.insert(route.destination);
            }
            RouteOwner::Kersey | RouteOwner::Other => {}
        }
    }
    let mut plan = Plan::default();
    for (destination, routes) in &ours {
        let in_place = wanted.get(destination);
        let unwanted = routes.iter().filter(|route| Some(**route) != in_place);
        let goes = match in_place {
            // The one wanted stands beside it, or is about to replace it.
            Some(route) => routes.contains(&route),
            None => previous.contains(destination) || leftovers == Leftovers::Remove,
        };
        if goes {
            plan.delete.extend(unwanted.map(|route| (*route).clone()));
        }
    }
    for (destination, route) in wanted {
        let ours = ours.get(destination).map(Vec::as_slice).unwrap_or_default();
        if ours.contains(&route) {
            continue;
        }
        if kernels.contains(destination) {
            plan.blocked.push(*destination);
            plan.delete.extend(ours.iter().map(|route| (*route).clone()));
            continue;
        }
        plan.set.push(Change {
            route: route.clone(),
            instead_of: ours.iter().map(|route| (*route).clone()).collect(),
        });
    }
    plan
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    const ETH0: u32 = 2;

    #[test]
    fn what_is_missing_is_set_and_what_is_there_left_alone() {
        let wanted = wanted(&[
            via("10.244.2.0/24", "192.0.2.2"),
            via("10.244.3.0/24", "192.0.2.3"),
        ]);
        let held = [ours(via("10.244.2.0/24", "192.0.2.2"))];
        let plan = plan_with(&wanted, &held, &[], Leftovers::Remove);
        assert_eq!(set(&plan), ["10.244.3.0/24 on interface 2 via 192.0.2.3"]);
        assert!(plan.delete.is_empty() && plan.blocked.is_empty(), "{plan:?}");
    }

    #[test]
    fn a_route_that_differs_is_replaced_whoever_made_it() {
        let wanted_route = via("10.244.2.0/24", "192.0.2.2");
        let wanted = wanted(std::slice::from_ref(&wanted_route));
        let mut narrow = wanted_route.clone();
        narrow.mtu_bytes = Some(1300);
        for (what, there, instead) in [
            (
                "our own, with another gateway",
                ours(via("10.244.2.0/24", "192.0.2.9")),
                1,
            ),
            ("our own, with an MTU", ours(narrow), 1),
            ("flannel's, even if it is alike", others(wanted_route), 0),
            (
                "flannel's vxlan",
                others(onlink("10.244.2.0/24", "10.244.2.0", 7)),
                0,
            ),
        ] {
            let plan = plan_with(&wanted, &[there], &[], Leftovers::Remove);
            assert_eq!(
                set(&plan),
                ["10.244.2.0/24 on interface 2 via 192.0.2.2"],
                "{what}"
            );
            assert_eq!(plan.set[0].instead_of.len(), instead, "{what}");
            assert!(plan.delete.is_empty(), "{what}: {plan:?}");
        }
    }

    #[test]
    fn a_second_route_of_ours_beside_the_right_one_goes() {
        let right = via("10.244.2.0/24", "192.0.2.2");
        let wrong = via("10.244.2.0/24", "192.0.2.9");
        let held = [ours(wrong.clone()), ours(right.clone())];
        let plan = plan_with(&wanted(&[right]), &held, &[], Leftovers::Keep);
        assert_eq!((plan.delete, plan.set.len()), (vec![wrong], 0));
    }

    #[test]
    fn a_network_the_kernel_has_is_not_taken_from_it() {
        let wanted = wanted(&[via("10.244.2.0/24", "192.0.2.2")]);
        let bridge = HeldRoute {
            owner: RouteOwner::Kernel,
            route: Route::direct(v4("10.244.2.0/24"), 5),
        };
        let plan = plan_with(&wanted, &[bridge], &[], Leftovers::Remove);
        assert_eq!(plan.blocked, [v4("10.244.2.0/24")]);
        assert!(plan.set.is_empty() && plan.delete.is_empty(), "{plan:?}");
    }

    #[test]
    fn leftovers_wait_for_the_store_and_a_peer_that_left_does_not() {
        let (left, leftover) = (
            via("10.244.2.0/24", "192.0.2.2"),
            via("10.244.3.0/24", "192.0.2.3"),
        );
        let held = [ours(left.clone()), ours(leftover.clone())];
        let previous = [left.destination];
        let before = plan_with(&BTreeMap::new(), &held, &previous, Leftovers::Keep);
        assert_eq!(before.delete, std::slice::from_ref(&left));
        let after = plan_with(&BTreeMap::new(), &held, &previous, Leftovers::Remove);
        assert_eq!(after.delete, [left, leftover]);
    }

    #[test]
    fn only_parts_of_the_network_are_ours() {
        let held = [
            ours(Route::direct(v4("10.244.0.0/16"), 9)),
            ours(via("0.0.0.0/0", "192.0.2.254")),
            ours(via("10.245.3.0/24", "192.0.2.3")),
            others(via("10.244.7.0/24", "192.0.2.7")),
        ];
        let plan = plan_with(&BTreeMap::new(), &held, &[], Leftovers::Remove);
        assert_eq!(plan, Plan::default());
    }

    #[test]
    fn no_route_takes_away_the_underlay_or_our_own_subnet() {
        let networks = [v4("0.0.0.0/0"), v4("10.0.0.0/8")];
        let own = [v4("10.244.1.0/24")];
        let underlay = [
            HeldRoute {
                owner: RouteOwner::Kernel,
                route: Route::direct(v4("10.1.0.0/16"), ETH0),
            },
            others(via("0.0.0.0/0", "10.9.0.1")),
        ];
        let address = LinkAddr {
            index: ETH0,
            addr: "10.8.0.1".parse().unwrap(),
            prefix_len: 32,
            flags: netlink_packet_route::address::AddressFlags::empty(),
        };
        let protected = protected(&underlay, &[address], ETH0);
        for (text, refused) in [
            ("0.0.0.0/0", true),
            ("0.0.0.0/1", true),
            ("10.0.0.0/9", true),
            ("10.1.0.0/16", true),
            ("10.9.0.0/24", true),
            ("10.8.0.0/24", true),
            ("10.244.0.0/16", true),
            ("10.244.1.0/24", true),
            ("10.244.1.128/25", true),
            ("10.244.2.0/24", false),
            // Smaller than the link's own network: flannel's users with one big network have these.
            ("10.1.7.0/24", false),
        ] {
            let refusal = refusal(v4(text), &networks, &own, &protected);
            assert_eq!(refusal.is_some(), refused, "{text}: {refusal:?}");
        }
        assert!(refusal(v4("172.16.0.0/24"), &networks[1..], &own, &protected).is_some());
    }

    #[test]
    fn the_first_change_is_looked_at_at_once_and_a_burst_every_hundred_milliseconds() {
        let start = Instant::now();
        let mut before = None;
        let mut looks = Vec::new();
        for ms in [0, 1, 30, 99, 101, 150, 199, 1000] {
            let look = next_look(start + Duration::from_millis(ms), before);
            before = Some(look);
            looks.push((look - start).as_millis());
        }
        assert_eq!(looks, [0, 100, 100, 100, 200, 200, 200, 1000]);
        // One that took long is followed by a pause, too.
        let ended = start + Duration::from_millis(1300);
        let next = next_look(ended + Duration::from_millis(1), Some(ended));
        assert_eq!(next - ended, GATHER);
    }

    #[test]
    fn a_long_list_is_cut() {
        let many: Vec<Prefix> = (0..10).map(|n| v4(&format!("10.244.{n}.0/24"))).collect();
        assert!(names(&many).ends_with("10.244.7.0/24 and 2 more"));
        assert_eq!(names(&many[..1]), "10.244.0.0/24");
    }

    fn plan_with(
        wanted: &BTreeMap<Prefix, Route>,
        held: &[HeldRoute],
        previous: &[Prefix],
        leftovers: Leftovers,
    ) -> Plan {
        let previous = previous.iter().copied().collect();
        plan(wanted, held, &[v4("10.244.0.0/16")], &previous, leftovers)
    }

    fn set(plan: &Plan) -> Vec<String> {
        plan.set.iter().map(|change| change.route.to_string()).collect()
    }

    fn wanted(routes: &[Route]) -> BTreeMap<Prefix, Route> {
        routes
            .iter()
            .map(|route| (route.destination, route.clone()))
            .collect()
    }

    fn via(destination: &str, gateway: &str) -> Route {
        Route {
            gateway: Gateway::Via(ip(gateway)),
            ..Route::direct(v4(destination), ETH0)
        }
    }

    fn onlink(destination: &str, gateway: &str, index: u32) -> Route {
        Route {
            gateway: Gateway::OnLink(ip(gateway)),
            ..Route::direct(v4(destination), index)
        }
    }

    fn ours(route: Route) -> HeldRoute {
        HeldRoute {
            owner: RouteOwner::Kersey,
            route,
        }
    }

    fn others(route: Route) -> HeldRoute {
        HeldRoute {
            owner: RouteOwner::Other,
            route,
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn v4(text: &str) -> Prefix {
        Prefix::V4(text.parse().unwrap())
    }
}
