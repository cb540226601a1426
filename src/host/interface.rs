//! Which interface carries the underlay, and with which addresses.
//!
//! The order is flannel's. Options that name an interface are tried first to last, and the first that leads to a
//! usable interface wins; without any, the interface holding the public address is taken, or else the one of the
//! default route with the best metric, or where the main table has none, the one the kernel would send to the Internet by.
//! Usable means: it has an address of every family wanted, and an MTU.
//!
//! A public address that no interface holds is that of a NAT before this host: the interface is the default route's, and the address is
//! published as it is.
//!
//! [`InterfaceRequest::choose`] reads the links, addresses and routes once and decides on that picture.
//! [`InterfaceRequest::choose_again`] does so later, and holds on to what was chosen as long as that is still there: an address that is
//! added beside it, or a link that would have come first, moves nobody. Only the default route is followed wherever it goes.

mod host;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::AddressFlags;

use self::host::{Host, Match, as_v4, as_v6};
use crate::addr::{AddrError, Ipv4Prefix, Ipv6Prefix, Mtu, Prefix};
use crate::host::netlink::{Netlink, NetlinkError, Route};

/// The address families the underlay has to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both, on one interface.
    Dual,
}

impl Families {
    /// Whether IPv4 is wanted.
    pub fn v4(self) -> bool {
        matches!(self, Self::V4 | Self::Dual)
    }

    /// Whether IPv6 is wanted.
    pub fn v6(self) -> bool {
        matches!(self, Self::V6 | Self::Dual)
    }
}

/// What the operator asked for.
#[derive(Clone, Debug)]
pub struct InterfaceRequest {
    /// `--iface`: names or addresses, in order of preference.
    pub ifaces: Vec<String>,
    /// `--iface-regex`: patterns over addresses and names, tried after `ifaces`.
    pub iface_regexes: Vec<String>,
    /// `--iface-can-reach`: tried last.
    pub can_reach: Option<IpAddr>,
    /// `--public-ip`: what peers send to, if it is not the interface's own address.
    pub public_ip: Option<Ipv4Addr>,
    /// `--public-ipv6`.
    pub public_ipv6: Option<Ipv6Addr>,
    /// The families the network needs.
    pub families: Families,
}

/// The interface chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnderlayInterface {
    /// Its name.
    pub name: String,
    /// Its number.
    pub index: u32,
    /// Its MTU.
    pub mtu: Mtu,
    /// Its IPv4 address, if IPv4 is wanted.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address, if IPv6 is wanted.
    pub v6: Option<Ipv6Addr>,
    /// The IPv4 address peers send to.
    pub public_v4: Option<Ipv4Addr>,
    /// The IPv6 address peers send to.
    pub public_v6: Option<Ipv6Addr>,
}

/// No interface could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// The kernel would not tell.
    #[error("cannot read this host's interfaces")]
    Netlink(#[from] NetlinkError),
    /// Every option given was tried.
    #[error("no usable network interface: {}; this host has {present}", list(.tried))]
    NoneUsable {
        /// What was tried, and why it did not do.
        tried: Vec<Attempt>,
        /// The interfaces there are.
        present: String,
    },
}

/// One way of finding an interface that led nowhere.
#[derive(Debug)]
pub struct Attempt {
    /// The option, as the operator wrote it.
    pub what: String,
    /// Why it did not do.
    pub miss: Miss,
}

/// Why an interface was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Miss {
    /// No interface has the name.
    #[error("no interface has that name")]
    NoSuchName,
    /// No interface has the address.
    #[error("no interface has that address")]
    NoSuchAddress,
    /// The pattern fits neither an address nor a name.
    #[error("it matches no address and no name")]
    NoMatch,
    /// The pattern is no pattern.
    #[error("{0}")]
    Pattern(Box<regex::Error>),
    /// The kernel has no route there.
    #[error("{}: {}", .0, cause(.0))]
    NoRoute(NetlinkError),
    /// No interface has the public address, and there is no default route either.
    #[error("no interface has that address, and for one behind NAT {0}")]
    NotHeld(Box<Miss>),
    /// There is no default route of a family wanted.
    #[error("there is no {0} default route; name an interface with --iface")]
    NoDefaultRoute(&'static str),
    /// The two default routes leave by different interfaces.
    #[error("the IPv4 and IPv6 default routes leave by different interfaces, {v4} and {v6}; use --iface")]
    DefaultRoutesDiffer {
        /// Where IPv4 goes.
        v4: String,
        /// Where IPv6 goes.
        v6: String,
    },
    /// The interface lacks an address.
    #[error("{link} has no {family} address")]
    NoAddress {
        /// The interface.
        link: String,
        /// The family.
        family: &'static str,
    },
    /// The interface cannot carry packets.
    #[error("{link} has no usable MTU: {source}")]
    NoMtu {
        /// The interface.
        link: String,
        /// What is wrong with it.
        source: AddrError,
    },
}

/// Addresses for documentation (RFC 5737, RFC 3849): whatever leads there leads to everywhere. Nothing is sent.
const AFAR_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
const AFAR_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));

fn everywhere(like: IpAddr) -> Prefix {
    match like {
        IpAddr::V4(_) => Prefix::V4(Ipv4Prefix::ALL),
        IpAddr::V6(_) => Prefix::V6(Ipv6Prefix::ALL),
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map(ToString::to_string).unwrap_or_default()
}

fn list(tried: &[Attempt]) -> String {
    let tried: Vec<_> = tried
        .iter()
        .map(|attempt| format!("{} ({})", attempt.what, attempt.miss))
        .collect();
    tried.join(", ")
}

impl InterfaceRequest {
    /// Chooses.
    ///
    /// # Errors
    /// No interface is usable; the error says for each option why.
    pub async fn choose(&self, netlink: &Netlink) -> Result<UnderlayInterface, InterfaceError> {
        self.choose_on(self.host(netlink).await?)
    }

    /// Chooses once more; `current` is what was chosen before, and stays as long as it can.
    ///
    /// # Errors
    /// What was chosen is not there any more, and nothing else is usable.
    pub async fn choose_again(
        &self,
        netlink: &Netlink,
        current: &UnderlayInterface,
    ) -> Result<UnderlayInterface, InterfaceError> {
        self.choose_again_on(self.host(netlink).await?, current)
    }

    async fn host(&self, netlink: &Netlink) -> Result<Host, InterfaceError> {
        let mut host = Host {
            links: netlink.links().await?,
            addresses: netlink.addresses().await?,
            defaults: netlink.default_routes().await?,
            reach: None,
        };
        if let Some(addr) = self.can_reach {
            host.reach = Some((addr, netlink.route_to(addr).await));
        }
        for (afar, wanted) in [(AFAR_V4, self.families.v4()), (AFAR_V6, self.families.v6())] {
            let same_family = |route: &Route| route.destination.addr().is_ipv4() == afar.is_ipv4();
            if wanted && !host.defaults.iter().any(same_family) {
                // Policy routing keeps default routes in tables of its own.
                let found = netlink.route_to(afar).await.ok();
                let index = found.map(|found| found.index).filter(|&index| index != 0);
                let everywhere = everywhere(afar);
                host.defaults
                    .extend(index.map(|index| Route::direct(everywhere, index)));
            }
        }
        Ok(host)
    }

    fn choose_again_on(
        &self,
        host: Host,
        current: &UnderlayInterface,
    ) -> Result<UnderlayInterface, InterfaceError> {
        let kept = self.kept(&host, current);
        let is_named = !self.ifaces.is_empty() || !self.iface_regexes.is_empty();
        match (kept, self.choose_on(host)) {
            (Some(kept), _) if is_named => Ok(kept),
            (Some(kept), Ok(chosen)) if chosen.name == kept.name => Ok(kept),
            // Its route is away for the moment, as when its cable is.
            (Some(kept), Err(_)) => Ok(kept),
            (_, chosen) => chosen,
        }
    }

    /// What was chosen, as it is now, if it still has its addresses.
    fn kept(&self, host: &Host, current: &UnderlayInterface) -> Option<UnderlayInterface> {
        let link = host.links.iter().find(|link| link.name == current.name)?;
        let holds = |addr: IpAddr| {
            host.addresses.iter().any(|held| {
                held.index == link.index
                    && held.addr == addr
                    && !held.flags.contains(AddressFlags::Deprecated)
            })
        };
        let has_both = current.v4.is_none_or(|addr| holds(addr.into()))
            && current.v6.is_none_or(|addr| holds(addr.into()));
        let found = Match {
            index: link.index,
            v4: current.v4,
            v6: current.v6,
        };
        self.complete(host, found).ok().filter(|_| has_both)
    }

    fn choose_on(&self, mut host: Host) -> Result<UnderlayInterface, InterfaceError> {
        let mut tried = Vec::new();
        let mut usable = |what: String, found: Result<Match, Miss>, host: &Host| match found
            .and_then(|found| self.complete(host, found))
        {
            Ok(interface) => Some(interface),
            Err(miss) => {
                tracing::debug!(option = %what, reason = %miss, "interface not usable");
                tried.push(Attempt { what, miss });
                None
            }
        };

        for iface in &self.ifaces {
            if let Some(done) = usable(format!("--iface {iface}"), host.named(iface), &host) {
                return Ok(done);
            }
        }
        for pattern in &self.iface_regexes {
            let found = host.matching(pattern, self.families);
            if let Some(done) = usable(format!("--iface-regex {pattern}"), found, &host) {
                return Ok(done);
            }
        }
        if let Some((addr, reach)) = host.reach.take() {
            let found = host.reaching(reach);
            if let Some(done) = usable(format!("--iface-can-reach {addr}"), found, &host) {
                return Ok(done);
            }
        } else if self.ifaces.is_empty() && self.iface_regexes.is_empty() {
            let (what, found) = if let Some(addr) = self.public_ip.filter(|_| self.families.v4()) {
                (format!("--public-ip {addr}"), self.behind(addr.into(), &host))
            } else if let Some(addr) = self.public_ipv6.filter(|_| self.families.v6()) {
                (format!("--public-ipv6 {addr}"), self.behind(addr.into(), &host))
            } else {
                (
                    "the default route".to_owned(),
                    host.by_default_route(self.families),
                )
            };
            if let Some(done) = usable(what, found, &host) {
                return Ok(done);
            }
        }
        Err(InterfaceError::NoneUsable {
            tried,
            present: host.to_string(),
        })
    }

    /// The interface with a public address, or that of the default route if the address is a NAT's.
    fn behind(&self, addr: IpAddr, host: &Host) -> Result<Match, Miss> {
        host.holding(addr).or_else(|_| {
            host.by_default_route(self.families)
                .map_err(|miss| Miss::NotHeld(Box::new(miss)))
        })
    }

    /// Fills in the addresses a match did not settle.
    fn complete(&self, host: &Host, found: Match) -> Result<UnderlayInterface, Miss> {
        let link = host.link(found.index).ok_or(Miss::NoSuchName)?;
        let missing = |family| Miss::NoAddress {
            link: link.name.clone(),
            family,
        };
        let candidates = host.candidates(link.index);
        let (mut v4, mut v6) = (None, None);
        if self.families.v4() {
            let first = candidates.iter().find_map(|&addr| as_v4(addr));
            v4 = Some(found.v4.or(first).ok_or_else(|| missing("IPv4"))?);
        }
        if self.families.v6() {
            let first = candidates.iter().find_map(|&addr| as_v6(addr));
            v6 = Some(found.v6.or(first).ok_or_else(|| missing("IPv6"))?);
        }
        // Loopback's 65,536 is one more than an IP packet can have.
        let mtu = Mtu::new(link.mtu_bytes.min(u32::from(u16::MAX))).map_err(|source| Miss::NoMtu {
            link: link.name.clone(),
            source,
        })?;
        Ok(UnderlayInterface {
            name: link.name.clone(),
            index: link.index,
            mtu,
            v4,
            v6,
            public_v4: v4.map(|own| self.public_ip.unwrap_or(own)),
            public_v6: v6.map(|own| self.public_ipv6.unwrap_or(own)),
        })
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkFlags;

    use super::*;
    use crate::host::netlink::{Link, LinkAddr, RouteLookup};

    #[test]
    fn without_options_the_default_route_decides() {
        let chosen = request().choose_on(host()).unwrap();
        assert_eq!((chosen.name.as_str(), chosen.mtu.bytes()), ("eth0", 1500));
        assert_eq!((chosen.v4, chosen.v6), (Some(v4("192.0.2.1")), None));
        assert_eq!(chosen.public_v4, chosen.v4);
    }

    #[test]
    fn the_first_name_that_works_wins_and_an_address_names_its_holder() {
        let mut request = request();
        request.ifaces = vec!["eth9".into(), "198.51.100.2".into(), "eth0".into()];
        let chosen = request.choose_on(host()).unwrap();
        assert_eq!(
            (chosen.name.as_str(), chosen.v4),
            ("eth1", Some(v4("198.51.100.2")))
        );
    }

    #[test]
    fn a_pattern_tries_addresses_before_names() {
        let mut request = request();
        request.iface_regexes = vec!["1.*51".into()];
        assert_eq!(request.choose_on(host()).unwrap().name, "eth1");
        request.iface_regexes = vec!["h0$".into()];
        assert_eq!(request.choose_on(host()).unwrap().name, "eth0");
    }

    #[test]
    fn a_public_address_nobody_holds_is_a_nats() {
        // B21 of the list of upstream bugs.
        let mut request = request();
        request.public_ip = Some(v4("203.0.113.9"));
        for ifaces in [&[][..], &["eth0".to_owned()]] {
            request.ifaces = ifaces.to_vec();
            let chosen = request.choose_on(host()).unwrap();
            assert_eq!(chosen.name, "eth0");
            assert_eq!(
                (chosen.v4, chosen.public_v4),
                (Some(v4("192.0.2.1")), Some(v4("203.0.113.9")))
            );
        }
        request.ifaces.clear();
        let mut without_route = host();
        without_route.defaults.clear();
        let error = request.choose_on(without_route).unwrap_err().to_string();
        assert!(
            error.contains("--public-ip 203.0.113.9 (no interface has that address, and for one behind NAT"),
            "{error}"
        );
    }

    #[test]
    fn a_public_address_names_the_interface_that_holds_it() {
        let mut request = request();
        request.public_ip = Some(v4("198.51.100.2"));
        let chosen = request.choose_on(host()).unwrap();
        assert_eq!(
            (chosen.name.as_str(), chosen.v4, chosen.public_v4),
            ("eth1", Some(v4("198.51.100.2")), Some(v4("198.51.100.2")))
        );
    }

    #[test]
    fn in_both_families_an_ipv6_address_names_the_interface_and_the_other_family_follows() {
        // B22 of the list of upstream bugs: flannel panics.
        let mut request = request();
        request.families = Families::Dual;
        request.ifaces = vec!["2001:db8:1::1".into()];
        let chosen = request.choose_on(host()).unwrap();
        assert_eq!(
            (chosen.v4, chosen.v6),
            (Some(v4("192.0.2.1")), Some("2001:db8:1::1".parse().unwrap()))
        );
        assert_eq!(chosen.public_v6, chosen.v6);
    }

    #[test]
    fn in_both_families_a_pattern_has_to_fit_an_address_of_each() {
        let mut request = request();
        request.families = Families::Dual;
        request.iface_regexes = vec!["^192\\.0|^2001".into()];
        assert_eq!(request.choose_on(host()).unwrap().name, "eth0");
        request.iface_regexes = vec!["^192\\.0".into()];
        assert!(request.choose_on(host()).is_err());
    }

    #[test]
    fn a_route_to_an_address_of_our_own_names_the_interface_that_has_it() {
        let mut request = request();
        let own: IpAddr = v4("198.51.100.2").into();
        request.can_reach = Some(own);
        let mut host = host();
        let reach = RouteLookup {
            index: 1,
            gateway: None,
            source: Some(own),
        };
        host.links[0].flags = LinkFlags::Up | LinkFlags::Loopback;
        host.reach = Some((own, Ok(reach)));
        assert_eq!(request.choose_on(host).unwrap().name, "eth1");
    }

    #[test]
    fn what_was_chosen_stays_while_it_is_there() {
        let mut request = request();
        let chosen = request.choose_on(host()).unwrap();
        let again = |request: &InterfaceRequest, host: Host| request.choose_again_on(host, &chosen);
        // An address that would come first: a permanent one before it.
        let mut more = host();
        more.addresses
            .insert(0, addr(2, "192.0.2.250", AddressFlags::Permanent));
        assert_eq!(again(&request, more).unwrap(), chosen);
        // The default route is away for the moment.
        let mut unplugged = host();
        unplugged.defaults.clear();
        assert_eq!(again(&request, unplugged).unwrap(), chosen);
        // An interface named earlier has come.
        request.ifaces = vec!["eth1".into(), "eth0".into()];
        assert_eq!(again(&request, host()).unwrap(), chosen);
    }

    #[test]
    fn what_was_chosen_goes_with_its_address_its_interface_or_its_default_route() {
        let request = request();
        let chosen = request.choose_on(host()).unwrap();
        let again = |host: Host| request.choose_again_on(host, &chosen);
        let mut other = host();
        other.addresses[2] = addr(2, "192.0.2.9", AddressFlags::Permanent);
        assert_eq!(again(other).unwrap().v4, Some(v4("192.0.2.9")));
        let mut moved = host();
        moved.defaults[0].index = 3;
        assert_eq!(again(moved).unwrap().name, "eth1");
        let mut gone = host();
        gone.addresses.retain(|held| held.index != 2);
        assert!(again(gone).is_err(), "there is nothing to go to; wait");
        let mut smaller = host();
        smaller.links[1].mtu_bytes = 1400;
        let again = again(smaller).unwrap();
        assert_eq!((again.v4, again.mtu.bytes()), (chosen.v4, 1400));
    }

    #[test]
    fn every_miss_is_named() {
        let mut request = request();
        request.ifaces = vec!["eth9".into(), "lo".into()];
        request.iface_regexes = vec!["(".into(), "wlan".into()];
        let error = request.choose_on(host()).unwrap_err().to_string();
        for part in [
            "--iface eth9 (no interface has that name)",
            "lo has no IPv4",
            "--iface-regex wlan (",
            "eth1 (",
        ] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
    }

    #[test]
    fn dual_stack_wants_both_default_routes_on_one_interface() {
        let mut request = request();
        request.families = Families::Dual;
        let chosen = request.choose_on(host()).unwrap();
        assert_eq!(chosen.v6, Some("2001:db8:1::1".parse().unwrap()));
        let mut split = host();
        split.defaults[1].index = 3;
        let error = request.choose_on(split).unwrap_err().to_string();
        assert!(error.contains("eth0 and eth1"), "{error}");
    }

    #[test]
    fn an_explicit_loopback_address_is_taken() {
        let mut request = request();
        request.ifaces = vec!["127.0.0.1".into()];
        let chosen = request.choose_on(host()).unwrap();
        assert_eq!((chosen.name.as_str(), chosen.mtu.bytes()), ("lo", 65_535));
    }

    fn request() -> InterfaceRequest {
        InterfaceRequest {
            ifaces: Vec::new(),
            iface_regexes: Vec::new(),
            can_reach: None,
            public_ip: None,
            public_ipv6: None,
            families: Families::V4,
        }
    }

    #[test]
    fn a_link_local_ipv6_address_is_none() {
        let mut host = host();
        host.addresses
            .retain(|held| held.addr != IpAddr::V6("2001:db8:1::1".parse().unwrap()));
        assert_eq!(host.candidates(2), [IpAddr::V4(v4("192.0.2.1"))]);
    }

    /// lo; eth0 with the default routes, a deprecated address first and a link-local one before the global one;
    /// eth1 with IPv4 alone.
    fn host() -> Host {
        let permanent = AddressFlags::Permanent;
        Host {
            links: vec![
                link(1, "lo", 65_536),
                link(2, "eth0", 1500),
                link(3, "eth1", 9000),
            ],
            addresses: vec![
                addr(1, "127.0.0.1", permanent),
                addr(2, "192.0.2.77", AddressFlags::Deprecated | permanent),
                addr(2, "192.0.2.1", permanent),
                addr(2, "fe80::1", permanent),
                addr(2, "2001:db8:1::1", permanent),
                addr(3, "198.51.100.2", permanent),
            ],
            defaults: vec![
                Route::direct("0.0.0.0/0".parse().map(crate::addr::Prefix::V4).unwrap(), 2),
                Route::direct("::/0".parse().map(crate::addr::Prefix::V6).unwrap(), 2),
            ],
            reach: None,
        }
    }

    fn link(index: u32, name: &str, mtu_bytes: u32) -> Link {
        Link {
            index,
            name: name.to_owned(),
            mtu_bytes,
            flags: LinkFlags::Up,
            tx_queue_len: 1000,
            mac: None,
        }
    }

    fn addr(index: u32, text: &str, flags: AddressFlags) -> LinkAddr {
        LinkAddr {
            index,
            addr: text.parse().unwrap(),
            prefix_len: 24,
            flags,
        }
    }

    fn v4(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }
}
