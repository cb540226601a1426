//! This host's links, addresses and default routes as they were when we looked, and which interface each option finds among them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::address::AddressFlags;
use regex::Regex;

use super::{Families, Miss};
use crate::host::netlink::{Link, LinkAddr, NetlinkError, Route, RouteLookup};

/// An interface found, with the addresses that the way of finding it settled.
pub(super) struct Match {
    pub(super) index: u32,
    pub(super) v4: Option<Ipv4Addr>,
    pub(super) v6: Option<Ipv6Addr>,
}

impl Match {
    fn link(index: u32) -> Self {
        Self {
            index,
            v4: None,
            v6: None,
        }
    }

    fn address(index: u32, addr: IpAddr) -> Self {
        Self {
            index,
            v4: as_v4(addr),
            v6: as_v6(addr),
        }
    }
}

/// This host, as it was when we looked.
pub(super) struct Host {
    pub(super) links: Vec<Link>,
    pub(super) addresses: Vec<LinkAddr>,
    pub(super) defaults: Vec<Route>,
    pub(super) reach: Option<(IpAddr, Result<RouteLookup, NetlinkError>)>,
}

impl Host {
    pub(super) fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    fn name(&self, index: u32) -> String {
        self.link(index)
            .map_or_else(|| format!("interface {index}"), |link| link.name.clone())
    }

    pub(super) fn named(&self, text: &str) -> Result<Match, Miss> {
        if let Ok(addr) = text.parse() {
            return self.holding(addr);
        }
        let link = self
            .links
            .iter()
            .find(|link| link.name == text)
            .ok_or(Miss::NoSuchName)?;
        Ok(Match::link(link.index))
    }

    pub(super) fn holding(&self, addr: IpAddr) -> Result<Match, Miss> {
        let holder = self
            .addresses
            .iter()
            .find(|held| held.addr == addr)
            .ok_or(Miss::NoSuchAddress)?;
        Ok(Match::address(holder.index, addr))
    }

    /// Addresses first, over all interfaces; then names.
    pub(super) fn matching(&self, pattern: &str, families: Families) -> Result<Match, Miss> {
        let pattern = Regex::new(pattern).map_err(|error| Miss::Pattern(Box::new(error)))?;
        for link in &self.links {
            let mut fitting = self.candidates(link.index);
            fitting.retain(|addr| pattern.is_match(&addr.to_string()));
            let found = Match {
                index: link.index,
                v4: fitting
                    .iter()
                    .find_map(|&addr| as_v4(addr))
                    .filter(|_| families.v4()),
                v6: fitting
                    .iter()
                    .find_map(|&addr| as_v6(addr))
                    .filter(|_| families.v6()),
            };
            if found.v4.is_some() == families.v4() && found.v6.is_some() == families.v6() {
                return Ok(found);
            }
        }
        let link = self
            .links
            .iter()
            .find(|link| pattern.is_match(&link.name))
            .ok_or(Miss::NoMatch)?;
        Ok(Match::link(link.index))
    }

    pub(super) fn reaching(&self, reach: Result<RouteLookup, NetlinkError>) -> Result<Match, Miss> {
        let reach = reach.map_err(Miss::NoRoute)?;
        // To an address of its own the kernel goes by loopback; what is meant is the interface that has it.
        let by_loopback = self.link(reach.index).is_some_and(Link::is_loopback);
        if let Some(found) = reach
            .source
            .filter(|_| by_loopback)
            .and_then(|own| self.holding(own).ok())
        {
            return Ok(found);
        }
        Ok(match reach.source {
            Some(source) => Match::address(reach.index, source),
            None => Match::link(reach.index),
        })
    }

    pub(super) fn by_default_route(&self, families: Families) -> Result<Match, Miss> {
        let leaves_by = |family, wanted: fn(IpAddr) -> bool| {
            let route = self
                .defaults
                .iter()
                .find(|route| wanted(route.destination.addr()));
            route.map(|route| route.index).ok_or(Miss::NoDefaultRoute(family))
        };
        let v4 = || leaves_by("IPv4", |addr| addr.is_ipv4());
        let v6 = || leaves_by("IPv6", |addr| addr.is_ipv6());
        match families {
            Families::V4 => v4().map(Match::link),
            Families::V6 => v6().map(Match::link),
            Families::Dual => {
                let (v4, v6) = (v4()?, v6()?);
                if v4 != v6 {
                    return Err(Miss::DefaultRoutesDiffer {
                        v4: self.name(v4),
                        v6: self.name(v6),
                    });
                }
                Ok(Match::link(v4))
            }
        }
    }

    /// A link's addresses that may carry the underlay, best first; equals stay in the kernel's order.
    pub(super) fn candidates(&self, index: u32) -> Vec<IpAddr> {
        let mut held: Vec<_> = self
            .addresses
            .iter()
            .filter(|held| held.index == index && !held.flags.contains(AddressFlags::Deprecated))
            .filter(|held| {
                !held.addr.is_loopback() && !held.addr.is_multicast() && !held.addr.is_unspecified()
            })
            // It means nothing without its interface: nobody could send to it.
            .filter(|held| as_v6(held.addr).is_none_or(|addr| !addr.is_unicast_link_local()))
            .collect();
        held.sort_by_key(|held| {
            // Linux gives IFA_F_SECONDARY and IFA_F_TEMPORARY one bit: v4 secondary, v6 privacy address.
            let temporary = held.flags.contains(AddressFlags::Secondary);
            (
                is_link_local(held.addr),
                !held.flags.contains(AddressFlags::Permanent),
                temporary,
            )
        });
        held.into_iter().map(|held| held.addr).collect()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, link) in self.links.iter().enumerate() {
            let separator = if nth == 0 { "" } else { ", " };
            let addresses: Vec<_> = self
                .candidates(link.index)
                .iter()
                .map(ToString::to_string)
                .collect();
            write!(f, "{separator}{}", link.name)?;
            if !addresses.is_empty() {
                write!(f, " ({})", addresses.join(" "))?;
            }
        }
        Ok(())
    }
}

pub(super) fn as_v4(addr: IpAddr) -> Option<Ipv4Addr> {
    match addr {
        IpAddr::V4(addr) => Some(addr),
        IpAddr::V6(_) => None,
    }
}

pub(super) fn as_v6(addr: IpAddr) -> Option<Ipv6Addr> {
    match addr {
        IpAddr::V4(_) => None,
        IpAddr::V6(addr) => Some(addr),
    }
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}
