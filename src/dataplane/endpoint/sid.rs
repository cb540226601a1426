//! SIDs and what they do: names, variants, and finding the one a packet is for.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;

use crate::addr::Ipv6Prefix;
use crate::wire::srv6::{CsidFormat, next_header};

/// The name of an endpoint behaviour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Behavior {
    /// The path goes on.
    End,
    /// It goes on over a given adjacency.
    EndX,
    /// IPv4 inside, routed.
    EndDt4,
    /// IPv6 inside, routed.
    EndDt6,
    /// Either inside, routed.
    EndDt46,
    /// IPv4 inside, to a next hop.
    EndDx4,
    /// IPv6 inside, to a next hop.
    EndDx6,
    /// End with NEXT-CSID.
    Un,
    /// End.X with NEXT-CSID.
    Ua,
}

impl Behavior {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::End,
        Self::EndX,
        Self::EndDt4,
        Self::EndDt6,
        Self::EndDt46,
        Self::EndDx4,
        Self::EndDx6,
        Self::Un,
        Self::Ua,
    ];

    /// The name in RFC 8986; uN and uA in RFC 9800.
    pub fn name(self) -> &'static str {
        match self {
            Self::End => "End",
            Self::EndX => "End.X",
            Self::EndDt4 => "End.DT4",
            Self::EndDt6 => "End.DT6",
            Self::EndDt46 => "End.DT46",
            Self::EndDx4 => "End.DX4",
            Self::EndDx6 => "End.DX6",
            Self::Un => "uN",
            Self::Ua => "uA",
        }
    }
}

impl fmt::Display for Behavior {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Behavior {
    type Err = SidError;

    fn from_str(text: &str) -> Result<Self, SidError> {
        Self::ALL
            .into_iter()
            .find(|behavior| behavior.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| SidError::Behavior(text.to_owned()))
    }
}

/// Variants of End, End.X, uN and uA, RFC 8986 §4.16. Written as `psp,usp,usd`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flavors {
    /// The SRH is removed by the last but one segment.
    pub psp: bool,
    /// The SRH is removed by the last segment; as nobody looks at it after that, this changes nothing here.
    pub usp: bool,
    /// The last segment decapsulates. At End.X and uA only IPv6: a socket sends no IPv4 to a neighbour of which it has an IPv6 address.
    pub usd: bool,
}

impl fmt::Display for Flavors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [(self.psp, "psp"), (self.usp, "usp"), (self.usd, "usd")];
        let mut separator = "";
        for (_, name) in all.into_iter().filter(|(set, _)| *set) {
            write!(f, "{separator}{name}")?;
            separator = ",";
        }
        Ok(())
    }
}

impl FromStr for Flavors {
    type Err = SidError;

    fn from_str(text: &str) -> Result<Self, SidError> {
        let mut flavors = Self::default();
        for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
            let flavor = match name.to_ascii_lowercase().as_str() {
                "psp" => &mut flavors.psp,
                "usp" => &mut flavors.usp,
                "usd" => &mut flavors.usd,
                _ => return Err(SidError::Flavor(name.to_owned())),
            };
            *flavor = true;
        }
        Ok(flavors)
    }
}

/// Why a SID is none.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SidError {
    /// No behaviour has this name.
    #[error("{0:?} is no behaviour we know")]
    Behavior(String),
    /// No flavour has this name.
    #[error("{0:?} is no flavour; there are psp, usp and usd")]
    Flavor(String),
    /// Only End and its kin have flavours.
    #[error("{0} has no flavours")]
    NoFlavors(Behavior),
    /// A next hop of the other family, or where there can be none, or none where it is needed.
    #[error("{behavior} with next hop {}", .next_hop.map_or("none".to_owned(), |addr| addr.to_string()))]
    NextHop {
        /// The behaviour.
        behavior: Behavior,
        /// The next hop given.
        next_hop: Option<IpAddr>,
    },
    /// The prefix of a compressed SID ends where its argument begins.
    #[error("the prefix of a compressed SID has {expected} bits, not {0}", expected = .1.block_len() + .1.node_len())]
    CsidPrefix(Ipv6Prefix, CsidFormat),
    /// Packets to it would not reach us.
    #[error("SID {0} lies in none of our locators")]
    OutsideLocators(Ipv6Prefix),
    /// Two behaviours for one SID.
    #[error("SID {0} is there twice")]
    Twice(Ipv6Prefix),
}

/// What a SID does, with all it needs for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// See [`Behavior::End`].
    End,
    /// See [`Behavior::EndX`]; the address of the adjacent node.
    EndX(Ipv6Addr),
    /// See [`Behavior::EndDt4`]
    EndDt4,
    /// See [`Behavior::EndDt6`]
    EndDt6,
    /// See [`Behavior::EndDt46`]
    EndDt46,
    /// See [`Behavior::EndDx4`]; without a next hop it is routed.
    EndDx4(Option<Ipv4Addr>),
    /// See [`Behavior::EndDx6`]; without a next hop it is routed.
    EndDx6(Option<Ipv6Addr>),
    /// See [`Behavior::Un`]
    Un(CsidFormat),
    /// See [`Behavior::Ua`]; the address of the adjacent node.
    Ua(CsidFormat, Ipv6Addr),
}

/// A SID's behaviour and flavours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalSid {
    action: Action,
    flavors: Flavors,
}

impl LocalSid {
    /// A SID. `next_hop` is for End.X and uA, which need one, and for End.DX4 and End.DX6; 0.0.0.0 and :: stand for none, as for Linux.
    /// `format` is for uN and uA.
    ///
    /// # Errors
    /// Flavours or a next hop that the behaviour does not have.
    pub fn new(
        behavior: Behavior,
        flavors: Flavors,
        next_hop: Option<IpAddr>,
        format: CsidFormat,
    ) -> Result<Self, SidError> {
        let next_hop = next_hop.filter(|addr| !addr.is_unspecified());
        let action = match (behavior, next_hop) {
            (Behavior::End, None) => Action::End,
            (Behavior::EndX, Some(IpAddr::V6(next_hop))) => Action::EndX(next_hop),
            (Behavior::EndDt4, None) => Action::EndDt4,
            (Behavior::EndDt6, None) => Action::EndDt6,
            (Behavior::EndDt46, None) => Action::EndDt46,
            (Behavior::EndDx4, None) => Action::EndDx4(None),
            (Behavior::EndDx4, Some(IpAddr::V4(next_hop))) => Action::EndDx4(Some(next_hop)),
            (Behavior::EndDx6, None) => Action::EndDx6(None),
            (Behavior::EndDx6, Some(IpAddr::V6(next_hop))) => Action::EndDx6(Some(next_hop)),
            (Behavior::Un, None) => Action::Un(format),
            (Behavior::Ua, Some(IpAddr::V6(next_hop))) => Action::Ua(format, next_hop),
            _ => return Err(SidError::NextHop { behavior, next_hop }),
        };
        let sid = Self { action, flavors };
        if flavors != Flavors::default() && !sid.is_transit() {
            return Err(SidError::NoFlavors(behavior));
        }
        Ok(sid)
    }

    /// What it does.
    pub fn action(&self) -> Action {
        self.action
    }

    /// How.
    pub fn flavors(&self) -> Flavors {
        self.flavors
    }

    /// The name of what it does.
    pub fn behavior(&self) -> Behavior {
        match self.action {
            Action::End => Behavior::End,
            Action::EndX(_) => Behavior::EndX,
            Action::EndDt4 => Behavior::EndDt4,
            Action::EndDt6 => Behavior::EndDt6,
            Action::EndDt46 => Behavior::EndDt46,
            Action::EndDx4(_) => Behavior::EndDx4,
            Action::EndDx6(_) => Behavior::EndDx6,
            Action::Un(_) => Behavior::Un,
            Action::Ua(..) => Behavior::Ua,
        }
    }

    /// Whether paths can go on from it.
    pub fn is_transit(&self) -> bool {
        match self.action {
            Action::End | Action::EndX(_) | Action::Un(_) | Action::Ua(..) => true,
            Action::EndDt4 | Action::EndDt6 | Action::EndDt46 | Action::EndDx4(_) | Action::EndDx6(_) => {
                false
            }
        }
    }

    /// Whether what passes it goes to a next hop of its own, wherever it is destined to.
    pub fn has_next_hop(&self) -> bool {
        match self.action {
            Action::EndX(_) | Action::Ua(..) => true,
            Action::EndDx4(next_hop) => next_hop.is_some(),
            Action::EndDx6(next_hop) => next_hop.is_some(),
            Action::End | Action::EndDt4 | Action::EndDt6 | Action::EndDt46 | Action::Un(_) => false,
        }
    }

    pub(super) fn adjacency(&self) -> Option<Ipv6Addr> {
        match self.action {
            Action::EndX(adjacency) | Action::Ua(_, adjacency) => Some(adjacency),
            Action::End
            | Action::EndDt4
            | Action::EndDt6
            | Action::EndDt46
            | Action::EndDx4(_)
            | Action::EndDx6(_)
            | Action::Un(_) => None,
        }
    }

    pub(super) fn csid_format(&self) -> Option<CsidFormat> {
        match self.action {
            Action::Un(format) | Action::Ua(format, _) => Some(format),
            Action::End
            | Action::EndX(_)
            | Action::EndDt4
            | Action::EndDt6
            | Action::EndDt46
            | Action::EndDx4(_)
            | Action::EndDx6(_) => None,
        }
    }

    /// Where an inner packet of this kind goes from here; `None` if it is not taken.
    #[inline]
    pub(super) fn exit(&self, upper: u8) -> Option<Exit> {
        let v4 = match upper {
            next_header::IPV4 => true,
            next_header::IPV6 => false,
            _ => return None,
        };
        match self.action {
            Action::EndDt46 => Some(Exit::Device),
            Action::EndDt4 | Action::EndDx4(None) => v4.then_some(Exit::Device),
            Action::EndDt6 | Action::EndDx6(None) => (!v4).then_some(Exit::Device),
            Action::EndDx4(Some(next_hop)) => v4.then_some(Exit::NextHop(next_hop.into())),
            Action::EndDx6(Some(next_hop)) => (!v4).then_some(Exit::NextHop(next_hop.into())),
            Action::End | Action::Un(_) => self.flavors.usd.then_some(Exit::Device),
            Action::EndX(adjacency) | Action::Ua(_, adjacency) => {
                (self.flavors.usd && !v4).then_some(Exit::NextHop(adjacency.into()))
            }
        }
    }
}

/// Where an inner packet leaves.
#[derive(Clone, Copy)]
pub(super) enum Exit {
    Device,
    NextHop(IpAddr),
}

/// Our SIDs, and the prefixes that are routed to us because of them.
#[derive(Clone, Debug, Default)]
pub struct LocalSids {
    locators: Vec<Ipv6Prefix>,
    /// Whole addresses, in order.
    exact: Vec<(u128, LocalSid)>,
    /// Longer ones first.
    prefixes: Vec<(Ipv6Prefix, LocalSid)>,
}

impl LocalSids {
    /// The SIDs in our locators. A prefix shorter than an address is for compressed SIDs: what follows it is their argument.
    ///
    /// # Errors
    /// One lies outside the locators, is there twice, or does not end where its argument begins.
    pub fn new(
        locators: Vec<Ipv6Prefix>,
        sids: impl IntoIterator<Item = (Ipv6Prefix, LocalSid)>,
    ) -> Result<Self, SidError> {
        let mut all = BTreeMap::new();
        for (prefix, sid) in sids {
            if !locators.iter().any(|locator| locator.covers(prefix)) {
                return Err(SidError::OutsideLocators(prefix));
            }
            if let Some(format) = sid.csid_format()
                && prefix.len() != format.block_len() + format.node_len()
            {
                return Err(SidError::CsidPrefix(prefix, format));
            }
            if all.insert((prefix.len(), prefix.addr()), (prefix, sid)).is_some() {
                return Err(SidError::Twice(prefix));
            }
        }
        let whole = |prefix: &Ipv6Prefix| prefix.len() == Ipv6Prefix::BITS;
        Ok(Self {
            locators,
            exact: all
                .values()
                .filter(|(prefix, _)| whole(prefix))
                .map(|(prefix, sid)| (prefix.addr().to_bits(), *sid))
                .collect(),
            prefixes: all
                .into_values()
                .rev()
                .filter(|(prefix, _)| !whole(prefix))
                .collect(),
        })
    }

    /// The locators.
    pub fn locators(&self) -> &[Ipv6Prefix] {
        &self.locators
    }

    /// The locator an address lies in, SID or not.
    pub fn locator(&self, address: Ipv6Addr) -> Option<Ipv6Prefix> {
        let mut locators = self.locators.iter().copied();
        locators.find(|locator| locator.contains(address))
    }

    /// The SID an address is, or a compressed one it begins with; the longest if there are several.
    #[inline]
    pub fn lookup(&self, address: Ipv6Addr) -> Option<&LocalSid> {
        let bits = address.to_bits();
        if let Ok(found) = self.exact.binary_search_by_key(&bits, |(sid, _)| *sid) {
            return self.exact.get(found).map(|(_, sid)| sid);
        }
        let mut prefixes = self.prefixes.iter();
        prefixes
            .find(|(prefix, _)| prefix.contains(address))
            .map(|(_, sid)| sid)
    }

    /// All of them, whole addresses first.
    pub fn iter(&self) -> impl Iterator<Item = (Ipv6Prefix, &LocalSid)> {
        let exact = self.exact.iter().filter_map(|(bits, sid)| {
            let prefix = Ipv6Prefix::new(Ipv6Addr::from_bits(*bits), Ipv6Prefix::BITS);
            Some((prefix.ok()?, sid))
        });
        exact.chain(self.prefixes.iter().map(|(prefix, sid)| (*prefix, sid)))
    }

    /// The addresses where paths end in our device, those included where they may also go on.
    pub fn ends(&self) -> impl Iterator<Item = Ipv6Addr> {
        let to_device = |sid: &LocalSid| {
            [next_header::IPV4, next_header::IPV6]
                .into_iter()
                .any(|upper| matches!(sid.exit(upper), Some(Exit::Device)))
        };
        self.iter()
            .filter(move |(_, sid)| to_device(sid))
            .map(|(prefix, _)| prefix.addr())
    }

    /// Whether an address is a SID in all its bits, so that nothing of it has changed on its way.
    pub(super) fn is_whole(&self, address: Ipv6Addr) -> bool {
        let bits = address.to_bits();
        self.exact.binary_search_by_key(&bits, |(sid, _)| *sid).is_ok()
    }

    /// Whether any of them is one that paths go on from, so that [`advance`](super::advance) may have work.
    pub fn has_transit(&self) -> bool {
        let all = self.exact.iter().map(|(_, sid)| sid);
        all.chain(self.prefixes.iter().map(|(_, sid)| sid))
            .any(LocalSid::is_transit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_rfcs() {
        for behavior in Behavior::ALL {
            assert_eq!(behavior.to_string().parse(), Ok(behavior));
        }
        assert_eq!("end.dt46".parse(), Ok(Behavior::EndDt46));
        assert_eq!(Behavior::Un.to_string(), "uN");
        assert_eq!(
            "End.T".parse::<Behavior>(),
            Err(SidError::Behavior("End.T".to_owned()))
        );
        let flavors: Flavors = "PSP, usd".parse().unwrap();
        assert_eq!(flavors.to_string(), "psp,usd");
        assert_eq!("".parse(), Ok(Flavors::default()));
        assert_eq!("psp,x".parse::<Flavors>(), Err(SidError::Flavor("x".to_owned())));
    }

    #[test]
    fn a_sid_has_what_its_behaviour_needs_and_no_more() {
        let none = Flavors::default();
        let psp = Flavors { psp: true, ..none };
        let v4 = Some("192.0.2.1".parse().unwrap());
        let v6 = Some("fe80::1".parse().unwrap());
        let zero = Some("0.0.0.0".parse().unwrap());
        for (behavior, flavors, next_hop, sound) in [
            (Behavior::End, psp, None, true),
            (Behavior::End, none, v6, false),
            (Behavior::EndX, psp, v6, true),
            (Behavior::EndX, none, None, false),
            (Behavior::EndX, none, v4, false),
            (Behavior::EndDt4, none, None, true),
            (Behavior::EndDt6, psp, None, false),
            (Behavior::EndDt46, none, v4, false),
            (Behavior::EndDx4, none, zero, true),
            (Behavior::EndDx4, none, v4, true),
            (Behavior::EndDx4, none, v6, false),
            (Behavior::EndDx6, none, v6, true),
            (Behavior::EndDx6, none, v4, false),
            (Behavior::Un, psp, None, true),
            (Behavior::Ua, psp, v6, true),
            (Behavior::Ua, psp, None, false),
        ] {
            let sid = LocalSid::new(behavior, flavors, next_hop, CsidFormat::F3216);
            assert_eq!(
                sid.as_ref().is_ok_and(|sid| sid.behavior() == behavior),
                sound,
                "{behavior}, {flavors}, {next_hop:?}"
            );
        }
        let zero = LocalSid::new(Behavior::EndDx4, none, zero, CsidFormat::F3216).unwrap();
        assert_eq!(zero.action(), Action::EndDx4(None));
    }

    #[test]
    fn the_longest_match_wins() {
        let sids = local(&[
            ("fcbb:bb00:1::/48", Behavior::Un),
            ("fcbb:bb00:1:d4::/64", Behavior::EndDt4),
            ("fcbb:bb00:1:d4::1/128", Behavior::EndDt6),
        ])
        .unwrap();
        for (address, expected) in [
            ("fcbb:bb00:1::", Some(Behavior::Un)),
            ("fcbb:bb00:1:2::", Some(Behavior::Un)),
            ("fcbb:bb00:1:d4::", Some(Behavior::EndDt4)),
            ("fcbb:bb00:1:d4::1", Some(Behavior::EndDt6)),
            ("fcbb:bb00:2::", None),
        ] {
            let found = sids.lookup(address.parse().unwrap());
            assert_eq!(found.map(LocalSid::behavior), expected, "{address}");
        }
        assert_eq!(sids.iter().count(), 3);
        assert!(sids.has_transit());
        assert!(
            !local(&[("fcbb:bb00:1::1/128", Behavior::EndDt46)])
                .unwrap()
                .has_transit()
        );
        assert_eq!(sids.locator("fcbb:bb00:1:9::".parse().unwrap()), Some(locator()));
        assert_eq!(sids.locator("fcbb:bb00:2::".parse().unwrap()), None);
        assert_eq!(sids.locators(), [locator()]);
    }

    #[test]
    fn sids_that_cannot_be_are_refused() {
        let prefix = |text: &str| text.parse().unwrap();
        let outside = local(&[("fcbb:bb00:2::1/128", Behavior::EndDt4)]);
        assert_eq!(
            outside.err(),
            Some(SidError::OutsideLocators(prefix("fcbb:bb00:2::1/128")))
        );
        let twice = local(&[
            ("fcbb:bb00:1::1/128", Behavior::EndDt4),
            ("fcbb:bb00:1::1/128", Behavior::EndDt6),
        ]);
        assert_eq!(twice.err(), Some(SidError::Twice(prefix("fcbb:bb00:1::1/128"))));
        let long = local(&[("fcbb:bb00:1:2::/64", Behavior::Un)]);
        let error = long.err().unwrap();
        assert_eq!(
            error,
            SidError::CsidPrefix(prefix("fcbb:bb00:1:2::/64"), CsidFormat::F3216)
        );
        assert_eq!(
            error.to_string(),
            "the prefix of a compressed SID has 48 bits, not fcbb:bb00:1:2::/64"
        );
    }

    fn local(sids: &[(&str, Behavior)]) -> Result<LocalSids, SidError> {
        let sids = sids.iter().map(|&(prefix, behavior)| {
            let sid = LocalSid::new(behavior, Flavors::default(), None, CsidFormat::F3216);
            (prefix.parse().unwrap(), sid.unwrap())
        });
        LocalSids::new(vec![locator()], sids)
    }

    fn locator() -> Ipv6Prefix {
        "fcbb:bb00:1::/48".parse().unwrap()
    }
}
