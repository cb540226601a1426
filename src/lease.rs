//! Leases: a node's claim on a subnet, with flannel's key and JSON forms.
//!
//! Two text forms matter to the rest of the world and are byte-exact here:
//!
//! - the key, `10.1.3.0-24` or `10.1.3.0-24&fd00:10:244::-64` ([`Subnet`]),
//! - the value, `{"PublicIP":"…","PublicIPv6":null,…}` ([`LeaseAttrs`]).
//!
//! Limits: there is no IPv6-only key form; the IPv4 half is mandatory, as in flannel. A key is taken only in the one
//! spelling flannel writes: host bits, leading zeros and uncompressed IPv6 are refused, because such a key could be
//! neither renewed nor deleted under the name it is read as.

mod by_subnet;
pub mod json;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::SystemTime;

use crate::addr::{Ipv4Prefix, Ipv6Prefix, Prefix};
pub use crate::lease::by_subnet::BySubnet;
use crate::lease::json::{JsonError, Object};

/// Why a text is not the key of a lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key:?} is no lease key: {why}")]
pub struct KeyError {
    key: String,
    why: &'static str,
}

/// The subnet of a lease; its `Display` form is flannel's etcd key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    /// The IPv4 half; every lease has one.
    pub v4: Ipv4Prefix,
    /// The IPv6 half of a dual-stack lease.
    pub v6: Option<Ipv6Prefix>,
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.v4.addr(), self.v4.len())?;
        if let Some(v6) = self.v6 {
            write!(f, "&{}-{}", v6.addr(), v6.len())?;
        }
        Ok(())
    }
}

impl Subnet {
    /// The longest IPv4 prefix a key can name: flannel reads the length as 5 bits.
    pub const MAX_V4_LEN: u8 = 31;
    /// The longest IPv6 prefix a key can name: flannel reads the length as 7 bits.
    pub const MAX_V6_LEN: u8 = 127;

    /// What stands in the place of the mandatory IPv4 half where a network has none.
    pub const NO_V4: Ipv4Prefix = Ipv4Prefix::ALL;

    /// The IPv4 half, unless it only fills the place in the key of an IPv6-only lease.
    pub fn ipv4(self) -> Option<Ipv4Prefix> {
        (self.v6.is_none() || self.v4 != Self::NO_V4).then_some(self.v4)
    }

    /// Its prefixes, one a family.
    pub fn prefixes(self) -> impl Iterator<Item = Prefix> + Clone {
        let v4 = self.ipv4().map(Prefix::V4);
        v4.into_iter().chain(self.v6.map(Prefix::V6))
    }

    /// Whether the two share an address, of either family.
    pub fn overlaps(self, other: Self) -> bool {
        matches!((self.ipv4(), other.ipv4()), (Some(a), Some(b)) if a.overlaps(b))
            || matches!((self.v6, other.v6), (Some(a), Some(b)) if a.overlaps(b))
    }
}

impl FromStr for Subnet {
    type Err = KeyError;

    fn from_str(key: &str) -> Result<Self, KeyError> {
        let refuse = |why| KeyError {
            key: key.chars().take(80).collect(),
            why,
        };
        let (v4, v6) = match key.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (key, None),
        };
        let (addr, len) = v4
            .split_once('-')
            .ok_or(refuse("no \"-LENGTH\" after an IPv4 address"))?;
        let addr: Ipv4Addr = addr
            .parse()
            .map_err(|_| refuse("the IPv4 address is malformed"))?;
        let len = prefix_len(len, Self::MAX_V4_LEN).ok_or(refuse("the IPv4 length is not 0 to 31"))?;
        let v4 = Ipv4Prefix::new(addr, len).map_err(|_| refuse("the IPv4 length is not 0 to 31"))?;
        let v6 = match v6 {
            None => None,
            Some(v6) => {
                let (addr, len) = v6
                    .rsplit_once('-')
                    .ok_or(refuse("no \"-LENGTH\" after an IPv6 address"))?;
                let addr: Ipv6Addr = addr
                    .parse()
                    .map_err(|_| refuse("the IPv6 address is malformed"))?;
                let len =
                    prefix_len(len, Self::MAX_V6_LEN).ok_or(refuse("the IPv6 length is not 0 to 127"))?;
                Some(Ipv6Prefix::new(addr, len).map_err(|_| refuse("the IPv6 length is not 0 to 127"))?)
            }
        };
        let subnet = Self { v4, v6 };
        if subnet.to_string() != key {
            return Err(refuse(
                "host bits are set, or a number or address is not in its shortest form",
            ));
        }
        Ok(subnet)
    }
}

fn prefix_len(text: &str, max: u8) -> Option<u8> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|&len| digits && len <= max)
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a node says of itself in its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseAttrs {
    /// Underlay IPv4 address; `0.0.0.0` if the node has none.
    pub public_ip: Ipv4Addr,
    /// Underlay IPv6 address.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Backend name; empty for `udp` and `alloc`.
    pub backend_type: String,
    /// Backend data for IPv4, compact JSON text as it stands in the store.
    pub backend_data: Option<String>,
    /// Backend data for IPv6, compact JSON text as it stands in the store.
    pub backend_v6_data: Option<String>,
}

impl LeaseAttrs {
    /// The largest value read: flannel's are a few hundred bytes; extension data may be some kilobytes.
    pub const MAX_BYTES: usize = 64 * 1024;

    /// Reads a lease value as flannel does; invalid UTF-8 becomes U+FFFD. Backend data that is `null` counts as
    /// absent.
    ///
    /// # Errors
    /// The value is too large, no JSON object, or a field is malformed.
    pub fn from_json(value: &[u8]) -> Result<Self, JsonError> {
        const IPV4: &str = "must be an IPv4 address in quotes";
        const IPV6: &str = "must be an IPv6 address in quotes, or null";
        let text = String::from_utf8_lossy(value);
        let object = Object::parse(&text, Self::MAX_BYTES)?;
        let data = |name| object.raw(name).filter(|raw| *raw != "null").map(json::compact);
        Ok(Self {
            public_ip: object.parsed("PublicIP", IPV4)?.unwrap_or(Ipv4Addr::UNSPECIFIED),
            public_ipv6: object.parsed_or_null("PublicIPv6", IPV6)?,
            backend_type: object.string("BackendType")?.unwrap_or_default(),
            backend_data: data("BackendData"),
            backend_v6_data: data("BackendV6Data"),
        })
    }

    /// Writes the value byte for byte as flannel v0.28 does.
    pub fn to_json(&self) -> String {
        let mut out = format!("{{\"PublicIP\":\"{}\",\"PublicIPv6\":", self.public_ip);
        match self.public_ipv6 {
            Some(addr) => out.push_str(&format!("\"{addr}\"")),
            None => out.push_str("null"),
        }
        if !self.backend_type.is_empty() {
            let quoted = serde_json::Value::from(self.backend_type.as_str()).to_string();
            out.push_str(",\"BackendType\":");
            out.push_str(&json::escape_html(&quoted));
        }
        for (name, data) in [
            ("BackendData", &self.backend_data),
            ("BackendV6Data", &self.backend_v6_data),
        ] {
            if let Some(data) = data {
                out.push_str(&format!(
                    ",\"{name}\":{}",
                    json::escape_html(&json::compact(data))
                ));
            }
        }
        out.push('}');
        out
    }

    /// What stands for attributes that cannot be read: no node's.
    pub fn of_nobody() -> Self {
        Self {
            public_ip: Ipv4Addr::UNSPECIFIED,
            public_ipv6: None,
            backend_type: String::new(),
            backend_data: None,
            backend_v6_data: None,
        }
    }

    /// How long the texts in it are together; the rest has a size of its own.
    pub fn data_bytes(&self) -> usize {
        let data = |data: &Option<String>| data.as_deref().map_or(0, str::len);
        self.backend_type.len() + data(&self.backend_data) + data(&self.backend_v6_data)
    }

    /// The address flannel tells nodes apart by.
    pub fn address(&self) -> Option<IpAddr> {
        if self.public_ip.is_unspecified() {
            return self.public_ipv6.map(IpAddr::V6);
        }
        Some(IpAddr::V4(self.public_ip))
    }

    /// Whether both describe the same node, by the address flannel tells nodes apart by: the public IPv4 address, or
    /// where a node has none the public IPv6 address.
    pub fn same_node(&self, other: &Self) -> bool {
        if self.public_ip.is_unspecified() && other.public_ip.is_unspecified() {
            return self.public_ipv6.is_some() && self.public_ipv6 == other.public_ipv6;
        }
        self.public_ip == other.public_ip
    }
}

/// When a lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiration {
    /// Never: a reservation.
    Never,
    /// At this wall-clock time, for show; timers run on the monotonic clock.
    At(SystemTime),
}

/// A node's claim on a subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The subnet claimed.
    pub subnet: Subnet,
    /// Who claims it, and how it is reached.
    pub attrs: LeaseAttrs,
    /// When the claim ends.
    pub expiration: Expiration,
    /// The store's revision at which the claim was first made, if the store tells: of two claims on one address the
    /// older one holds.
    pub created: Option<u64>,
}

/// One change among the leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseEvent {
    /// A lease came or changed.
    Added(Lease),
    /// A lease went.
    Removed(Subnet),
}

/// What a watch tells: the whole truth, or changes to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseUpdate {
    /// All leases at one revision; what is not in it is gone.
    Snapshot(Vec<Lease>),
    /// Changes since the last update.
    Events(Vec<LeaseEvent>),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_read_back_as_they_were_written() {
        for key in [
            "10.1.3.0-24",
            "10.244.61.0-24&fd00:10:244:44::-64",
            "0.0.0.0-0",
            "10.0.0.2-31&::-0",
        ] {
            assert_eq!(key.parse::<Subnet>().unwrap().to_string(), key);
        }
    }

    #[test]
    fn what_flannel_would_not_write_is_no_key() {
        for key in [
            "",
            "10.1.3.0",
            "10.1.3.0/24",
            "10.1.3.0-32",
            "10.1.3.0-33",
            "10.1.3.0-",
            "10.1.3.0-+4",
            "10.1.3.0-024",
            "10.1.3.7-24",
            "010.1.3.0-24",
            "10.1.3-24",
            "x10.1.3.0-24",
            "10.1.3.0-24x",
            "10.1.3.0-24\n",
            " 10.1.3.0-24",
            "10.1.3.0-24&",
            "10.1.3.0-24&fd00::",
            "10.1.3.0-24&fd00::-128",
            "10.1.3.0-24&FD00::-64",
            "10.1.3.0-24&fd00:0:0::-64",
            "10.1.3.0-24&fd00::1-64",
            "fd00::-64",
            "&fd00::-64",
            "../10.1.3.0-24",
            "10.1.3.0-24/x",
            "10.1.3.0-24\0",
            "256.1.3.0-24",
        ] {
            let error = key.parse::<Subnet>().expect_err(key);
            assert!(error.to_string().contains("no lease key"), "{error}");
        }
    }

    /// Values captured from flannel v0.28.9 daemons.
    #[test]
    fn values_are_flannels_to_the_byte() {
        for value in [
            r#"{"PublicIP":"10.50.0.1","PublicIPv6":null}"#,
            r#"{"PublicIP":"10.50.0.1","PublicIPv6":null,"BackendType":"host-gw"}"#,
            r#"{"PublicIP":"10.50.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":100,"VtepMAC":"4a:5b:ac:d9:d3:c7"}}"#,
            r#"{"PublicIP":"10.50.0.1","PublicIPv6":"fd50::1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"82:f5:14:90:a6:0d"},"BackendV6Data":{"VNI":1,"VtepMAC":"de:05:79:b9:c9:72"}}"#,
        ] {
            assert_eq!(LeaseAttrs::from_json(value.as_bytes()).unwrap().to_json(), value);
        }
    }

    #[test]
    fn a_value_of_old_flannel_is_understood() {
        let old =
            r#"{"PublicIP":"10.50.0.1","BackendType":"vxlan","BackendData":{"VtepMAC":"36:69:12:f1:b7:41"}}"#;
        let attrs = LeaseAttrs::from_json(old.as_bytes()).unwrap();
        assert_eq!(attrs.public_ip, Ipv4Addr::new(10, 50, 0, 1));
        assert_eq!(attrs.public_ipv6, None);
        assert_eq!(
            attrs.backend_data.as_deref(),
            Some(r#"{"VtepMAC":"36:69:12:f1:b7:41"}"#)
        );
    }

    #[test]
    fn values_are_read_by_gos_rules() {
        let attrs = LeaseAttrs::from_json(
            br#" {"publicip":"10.0.0.1", "PUBLICIP":"10.0.0.2", "extra":[{}], "backendtype":null,
                "BackendData" : { "VNI" : 1 } } "#,
        )
        .unwrap();
        assert_eq!(attrs.public_ip, Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(attrs.backend_data.as_deref(), Some(r#"{"VNI":1}"#));
        for value in [
            "",
            "null",
            "[]",
            "{",
            r#"{"PublicIP":null}"#,
            r#"{"PublicIP":""}"#,
            r#"{"PublicIP":1}"#,
            r#"{"PublicIP":"fd00::1"}"#,
            r#"{"PublicIP":"10.0.0.1"} x"#,
            r#"{"PublicIP":"10.0.0.1","PublicIPv6":""}"#,
            r#"{"PublicIP":"10.0.0.1","BackendType":7}"#,
        ] {
            assert!(LeaseAttrs::from_json(value.as_bytes()).is_err(), "{value}");
        }
        assert!(LeaseAttrs::from_json(b"{\"PublicIP\":\"\xff\"}").is_err());
        assert!(LeaseAttrs::from_json(&vec![b' '; LeaseAttrs::MAX_BYTES + 1]).is_err());
    }

    #[test]
    fn a_node_without_ipv4_is_known_by_its_ipv6_address() {
        let six = |addr: &str| LeaseAttrs {
            public_ip: Ipv4Addr::UNSPECIFIED,
            public_ipv6: Some(addr.parse().unwrap()),
            backend_type: String::new(),
            backend_data: None,
            backend_v6_data: None,
        };
        assert!(six("fd00::1").same_node(&six("fd00::1")));
        assert!(!six("fd00::1").same_node(&six("fd00::2")));
    }

    proptest! {
        #[test]
        fn nothing_makes_the_decoders_panic(key in ".*", value in any::<Vec<u8>>()) {
            let _ = key.parse::<Subnet>();
            let _ = LeaseAttrs::from_json(&value);
        }

        #[test]
        fn values_round_trip(ip in any::<u32>(), v6 in any::<Option<u128>>(), kind in ".{0,20}", text in ".{0,20}") {
            let attrs = LeaseAttrs {
                public_ip: ip.into(),
                public_ipv6: v6.map(Ipv6Addr::from),
                backend_type: kind,
                backend_data: Some(json::escape_html(&serde_json::Value::from(text).to_string())),
                backend_v6_data: None,
            };
            prop_assert_eq!(LeaseAttrs::from_json(attrs.to_json().as_bytes()).unwrap(), attrs);
        }
    }
}
