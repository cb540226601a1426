//! Addresses and the sizes that go with them: prefixes without host bits, MAC addresses, MTUs; and names of networks.
//!
//! A value of one of these types has passed its check; nothing further inside validates again.

mod network_name;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use network_name::{NetworkName, NetworkNameError};

/// Why a text is not an address of the kind asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {expected}")]
pub struct AddrError {
    text: String,
    expected: &'static str,
}

impl AddrError {
    fn new(text: &str, expected: &'static str) -> Self {
        Self {
            text: text.chars().take(80).collect(),
            expected,
        }
    }
}

macro_rules! prefix {
    ($(#[$doc:meta])* $name:ident, $net:ty, $addr:ty, $bits:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name($net);

        impl $name {
            /// Address width in bits.
            pub const BITS: u8 = $bits;

            /// The prefix of all addresses, of length 0.
            pub const ALL: Self = Self(<$net>::new_assert(<$addr>::UNSPECIFIED, 0));

            /// Makes the prefix that holds `addr`; bits below `len` are cleared, as Go's
            /// `net.ParseCIDR` does.
            ///
            /// # Errors
            /// `len` is larger than the address is wide.
            pub fn new(addr: $addr, len: u8) -> Result<Self, AddrError> {
                <$net>::new(addr, len)
                    .map(|net| Self(net.trunc()))
                    .map_err(|_| AddrError::new(&format!("{addr}/{len}"), $expected))
            }

            /// The network address.
            pub fn addr(self) -> $addr {
                self.0.addr()
            }

            /// Prefix length in bits.
            #[expect(clippy::len_without_is_empty, reason = "a prefix length is not a count of elements")]
            pub fn len(self) -> u8 {
                self.0.prefix_len()
            }

            /// Whether `addr` lies in the prefix.
            pub fn contains(self, addr: $addr) -> bool {
                self.0.contains(&addr)
            }

            /// Whether `other` lies wholly in the prefix.
            pub fn covers(self, other: Self) -> bool {
                self.0.contains(&other.0)
            }

            /// Whether the two prefixes share an address.
            pub fn overlaps(self, other: Self) -> bool {
                self.covers(other) || other.covers(self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = AddrError;

            fn from_str(text: &str) -> Result<Self, AddrError> {
                // Not ipnet's parser, which takes leading zeros.
                let (addr, len) = text.split_once('/').ok_or_else(|| AddrError::new(text, $expected))?;
                let addr = addr.parse().map_err(|_| AddrError::new(text, $expected))?;
                let len = len.parse().ok().filter(|_| len.bytes().all(|byte| byte.is_ascii_digit()));
                Self::new(addr, len.unwrap_or(u8::MAX)).map_err(|_| AddrError::new(text, $expected))
            }
        }

        impl TryFrom<String> for $name {
            type Error = AddrError;

            fn try_from(text: String) -> Result<Self, AddrError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(prefix: $name) -> Self {
                prefix.to_string()
            }
        }
    };
}

prefix!(
    /// An IPv4 prefix with no host bits set.
    Ipv4Prefix,
    Ipv4Net,
    Ipv4Addr,
    32,
    "an IPv4 network like 10.244.0.0/16"
);
prefix!(
    /// An IPv6 prefix with no host bits set.
    Ipv6Prefix,
    Ipv6Net,
    Ipv6Addr,
    128,
    "an IPv6 network like fd00:10:244::/56"
);

/// A prefix of either family, with no host bits set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Prefix {
    /// IPv4
    V4(Ipv4Prefix),
    /// IPv6
    V6(Ipv6Prefix),
}

impl Prefix {
    /// The prefix of `addr` alone.
    pub fn host(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => Self::V4(Ipv4Prefix(Ipv4Net::from(addr))),
            IpAddr::V6(addr) => Self::V6(Ipv6Prefix(Ipv6Net::from(addr))),
        }
    }

    /// The network address.
    pub fn addr(self) -> IpAddr {
        match self {
            Self::V4(prefix) => prefix.addr().into(),
            Self::V6(prefix) => prefix.addr().into(),
        }
    }

    /// Prefix length in bits.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a prefix length is not a count of elements"
    )]
    pub fn len(self) -> u8 {
        match self {
            Self::V4(prefix) => prefix.len(),
            Self::V6(prefix) => prefix.len(),
        }
    }

    /// Whether `addr` is of the prefix's family and lies in it.
    pub fn contains(self, addr: IpAddr) -> bool {
        match (self, addr) {
            (Self::V4(prefix), IpAddr::V4(addr)) => prefix.contains(addr),
            (Self::V6(prefix), IpAddr::V6(addr)) => prefix.contains(addr),
            (Self::V4(_), IpAddr::V6(_)) | (Self::V6(_), IpAddr::V4(_)) => false,
        }
    }

    /// Whether `other` is of the same family and lies wholly in the prefix.
    pub fn covers(self, other: Self) -> bool {
        match (self, other) {
            (Self::V4(prefix), Self::V4(other)) => prefix.covers(other),
            (Self::V6(prefix), Self::V6(other)) => prefix.covers(other),
            (Self::V4(_), Self::V6(_)) | (Self::V6(_), Self::V4(_)) => false,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(prefix) => prefix.fmt(f),
            Self::V6(prefix) => prefix.fmt(f),
        }
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Ipv4Prefix> for Prefix {
    fn from(prefix: Ipv4Prefix) -> Self {
        Self::V4(prefix)
    }
}

impl From<Ipv6Prefix> for Prefix {
    fn from(prefix: Ipv6Prefix) -> Self {
        Self::V6(prefix)
    }
}

impl From<Prefix> for IpNet {
    fn from(prefix: Prefix) -> Self {
        match prefix {
            Prefix::V4(prefix) => Self::V4(prefix.0),
            Prefix::V6(prefix) => Self::V6(prefix.0),
        }
    }
}

/// A maximum transmission unit in bytes, IP header included: 68 (RFC 791) to 65,535.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Mtu(u16);

impl Mtu {
    /// The smallest MTU an IPv4 link may have, RFC 791.
    pub const MIN: u16 = 68;

    /// Checks the range.
    ///
    /// # Errors
    /// Fewer than 68 or more than 65,535 bytes.
    pub fn new(bytes: u32) -> Result<Self, AddrError> {
        u16::try_from(bytes)
            .ok()
            .filter(|&bytes| bytes >= Self::MIN)
            .map(Self)
            .ok_or_else(|| AddrError::new(&bytes.to_string(), "an MTU from 68 to 65535"))
    }

    /// The MTU left after `overhead` bytes of encapsulation.
    ///
    /// # Errors
    /// Fewer than 68 bytes are left.
    pub fn minus(self, overhead: u16) -> Result<Self, AddrError> {
        Self::new(u32::from(self.0).saturating_sub(u32::from(overhead)))
    }

    /// In bytes.
    pub fn bytes(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address of these six bytes, as they go over the wire.
    pub const fn from_octets(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// Its six bytes, as they go over the wire.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Whether it is the address of a group, or of all (IEEE 802: lowest bit of the first byte).
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether it can be the address of one station: no group, and not all zero.
    pub fn is_unicast(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }

    /// A locally administered unicast address made of random bits.
    pub fn local(random: [u8; 6]) -> Self {
        let [first, rest @ ..] = random;
        let [b, c, d, e, f] = rest;
        Self([first & !1 | 2, b, c, d, e, f])
    }
}

impl From<[u8; 6]> for MacAddr {
    fn from(octets: [u8; 6]) -> Self {
        Self(octets)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = AddrError;

    /// Reads the three spellings Go's `net.ParseMAC` knows: `aa:bb:cc:dd:ee:ff`, `aa-bb-cc-dd-ee-ff` and `aabb.ccdd.eeff`.
    fn from_str(text: &str) -> Result<Self, AddrError> {
        let refuse = || AddrError::new(text, "an Ethernet address like 02:42:0a:f4:01:00");
        let separator = ['-', '.'].into_iter().find(|&c| text.contains(c)).unwrap_or(':');
        let digits = if separator == '.' { 4 } else { 2 };
        let mut octets = [0; 6];
        let mut filled = 0;
        for group in text.split(separator) {
            if group.len() != digits || !group.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(refuse());
            }
            for pair in group.as_bytes().chunks(2) {
                let pair = std::str::from_utf8(pair).map_err(|_| refuse())?;
                *octets.get_mut(filled).ok_or_else(refuse)? =
                    u8::from_str_radix(pair, 16).map_err(|_| refuse())?;
                filled += 1;
            }
        }
        if filled == 6 {
            Ok(Self(octets))
        } else {
            Err(refuse())
        }
    }
}

/// A VXLAN network identifier: 24 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The largest there is.
    pub const MAX: u32 = 0xff_ffff;

    /// Checks the range.
    ///
    /// # Errors
    /// It takes more than 24 bits.
    pub fn new(vni: u32) -> Result<Self, AddrError> {
        if vni <= Self::MAX {
            Ok(Self(vni))
        } else {
            Err(AddrError::new(&vni.to_string(), "a VNI from 0 to 16777215"))
        }
    }

    /// As a number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_loses_its_host_bits() {
        let prefix: Ipv4Prefix = "10.5.1.7/16".parse().unwrap();
        assert_eq!(prefix.to_string(), "10.5.0.0/16");
        let prefix: Ipv6Prefix = "fd00::1/64".parse().unwrap();
        assert_eq!(prefix.to_string(), "fd00::/64");
    }

    #[test]
    fn nonsense_is_named_in_the_error() {
        let error = "10.5.0.0/33".parse::<Ipv4Prefix>().unwrap_err();
        assert!(error.to_string().contains("10.5.0.0/33"), "{error}");
        assert!("".parse::<Ipv6Prefix>().is_err());
    }

    #[test]
    fn overlap_is_symmetric() {
        let wide: Ipv4Prefix = "10.0.0.0/8".parse().unwrap();
        let narrow: Ipv4Prefix = "10.1.0.0/16".parse().unwrap();
        let other: Ipv4Prefix = "11.0.0.0/8".parse().unwrap();
        assert!(wide.overlaps(narrow) && narrow.overlaps(wide));
        assert!(!wide.overlaps(other) && !other.overlaps(narrow));
    }

    #[test]
    fn an_mtu_has_a_floor() {
        assert_eq!(Mtu::new(1500).unwrap().minus(28).unwrap().bytes(), 1472);
        assert!(Mtu::new(80).unwrap().minus(28).is_err());
        assert!(Mtu::new(65_536).is_err());
    }

    #[test]
    fn ethernet_addresses_are_read_in_gos_spellings() {
        let mac = MacAddr::from([0x4a, 0x5b, 0xac, 0xd9, 0xd3, 0xc7]);
        for text in ["4a:5b:ac:d9:d3:c7", "4A-5B-AC-D9-D3-C7", "4a5b.acd9.d3c7"] {
            assert_eq!(text.parse(), Ok(mac), "{text}");
        }
        assert_eq!(mac.to_string(), "4a:5b:ac:d9:d3:c7");
        for text in [
            "",
            "4a:5b:ac:d9:d3",
            "4a:5b:ac:d9:d3:c7:00",
            "4a:5b:ac:d9:d3:g7",
            "4a5bacd9d3c7",
            "4a:5b:ac:d9:d3:+7",
            "4a:5b-ac:d9:d3:c7",
            "04a:5b:ac:d9:d3:c7",
            "4a:5b:ac:d9:d3:\u{e9}",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_local_address_is_unicast_and_locally_administered() {
        for first in 0..=255 {
            let mac = MacAddr::local([first, 1, 2, 3, 4, 5]);
            assert!(mac.is_unicast() && mac.octets()[0] & 2 != 0, "{mac}");
        }
        assert!(!MacAddr::from([0; 6]).is_unicast());
        assert!(!MacAddr::from([0xff; 6]).is_unicast());
    }

    #[test]
    fn a_vni_has_24_bits() {
        assert_eq!(Vni::new(Vni::MAX).map(Vni::get), Ok(0xff_ffff));
        assert!(Vni::new(Vni::MAX + 1).is_err());
    }
}
