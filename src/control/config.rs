//! The network configuration, `PREFIX/config` in a store: flannel's `net-conf.json`.
//!
//! Read as flannel reads it (see [`crate::lease::json`]) and checked as flannel checks it, with two rules more:
//! `SubnetMin` above `SubnetMax` and a backend without a type are refused here, where flannel fails later. What
//! passes is plain data: ranges whose ends are subnets of the right length, and the backend's own JSON object, which
//! only the backend understands.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::lease::Subnet;
use crate::lease::json::{self, JsonError, Object};

/// The largest config read. Etcd takes values up to 1.5 MB; a config is a few hundred bytes.
const MAX_BYTES: usize = 1024 * 1024;

/// Why a config is not usable; names field, value and rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be decoded.
    #[error("the network config is malformed: {0}")]
    Json(#[from] JsonError),
    /// A value breaks a rule.
    #[error("the network config is invalid: {field} is {value}: {rule}")]
    Rule {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// The rule.
        rule: String,
    },
}

impl ConfigError {
    fn rule(field: &'static str, value: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self::Rule {
            field,
            value: value.to_string(),
            rule: rule.into(),
        }
    }
}

/// One overlay network, as all its nodes see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// The IPv4 half, unless disabled.
    pub v4: Option<SubnetRange<Ipv4Prefix>>,
    /// The IPv6 half, if enabled.
    pub v6: Option<SubnetRange<Ipv6Prefix>>,
    /// Whether firewall rules go to nftables.
    pub enable_nftables: bool,
    /// Which backend, and its settings.
    pub backend: BackendConfig,
}

/// The backend's part of the config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendConfig {
    /// Its name in lower case, unless the config has no `Backend`; to flannel that means udp.
    pub kind: Option<String>,
    /// The whole `Backend` object, compact JSON text.
    pub json: String,
}

/// The subnets of one address family a network hands out: from `min` to `max`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubnetRange<P> {
    /// The whole network.
    pub network: P,
    /// The first subnet.
    pub min: P,
    /// The last subnet; as long as the first.
    pub max: P,
}

impl<P: Prefixed> SubnetRange<P> {
    /// The prefix length of every subnet.
    pub fn subnet_len(&self) -> u8 {
        self.min.prefix_len()
    }

    /// Whether `subnet` is one of the range.
    pub fn holds(&self, subnet: P) -> bool {
        subnet.prefix_len() == self.subnet_len()
            && (self.min.first()..=self.max.first()).contains(&subnet.first())
    }

    /// Whether the address lies in the network, but in none of the range, so that it may be a node's own.
    pub fn spares(&self, addr: P::Addr) -> bool {
        let addr = P::number(addr);
        let within = |first: P, last: P| (first.first()..=last.last()).contains(&addr);
        within(self.network, self.network) && !within(self.min, self.max)
    }
}

impl NetworkConfig {
    /// Which subnet of the network this is, counted from the first: IPv4's number if there is IPv4.
    pub fn number(&self, subnet: Subnet) -> u128 {
        fn number<P: Prefixed>(range: &SubnetRange<P>, subnet: P) -> u128 {
            (subnet.first() - range.network.first().min(subnet.first())) / size::<P>(range.subnet_len())
        }
        let v4 = self
            .v4
            .as_ref()
            .zip(subnet.ipv4())
            .map(|(range, own)| number(range, own));
        let v6 = self
            .v6
            .as_ref()
            .zip(subnet.v6)
            .map(|(range, own)| number(range, own));
        v4.or(v6).unwrap_or(0)
    }

    /// The keys that are read; their case does not matter.
    pub const KEYS: &[&str] = &[
        "Network",
        "SubnetLen",
        "SubnetMin",
        "SubnetMax",
        "IPv6Network",
        "IPv6SubnetLen",
        "IPv6SubnetMin",
        "IPv6SubnetMax",
        "EnableIPv4",
        "EnableIPv6",
        "EnableNFTables",
        "Backend",
    ];

    /// Reads and checks a config.
    ///
    /// # Errors
    /// Not JSON, a wrong type, or a rule broken.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let object = Object::parse(text, MAX_BYTES)?;
        let v4 = Family {
            network: object.parsed(
                "Network",
                "must be an IPv4 network in quotes, like \"10.244.0.0/16\"",
            )?,
            subnet_len: object.uint("SubnetLen")?,
            // To Go's zero value, 0.0.0.0 and absent are the same.
            min: object
                .parsed("SubnetMin", IPV4_RULE)?
                .filter(|addr: &Ipv4Addr| !addr.is_unspecified()),
            max: object
                .parsed("SubnetMax", IPV4_RULE)?
                .filter(|addr: &Ipv4Addr| !addr.is_unspecified()),
        };
        let v6 = Family {
            network: object.parsed(
                "IPv6Network",
                "must be an IPv6 network in quotes, like \"fd00:10:244::/56\"",
            )?,
            subnet_len: object.uint("IPv6SubnetLen")?,
            min: object.parsed_or_null::<Ipv6Addr>("IPv6SubnetMin", IPV6_RULE)?,
            max: object.parsed_or_null::<Ipv6Addr>("IPv6SubnetMax", IPV6_RULE)?,
        };
        let enable_v4 = object.bool("EnableIPv4")?.unwrap_or(true);
        let enable_v6 = object.bool("EnableIPv6")?.unwrap_or(false);
        if !enable_v4 && !enable_v6 {
            let rule = "at least one of EnableIPv4 and EnableIPv6 must be true";
            return Err(ConfigError::rule("EnableIPv4", false, rule));
        }
        Ok(Self {
            v4: enable_v4.then(|| v4.check(&V4_FIELDS)).transpose()?,
            v6: enable_v6.then(|| v6.check(&V6_FIELDS)).transpose()?,
            enable_nftables: object.bool("EnableNFTables")?.unwrap_or(false),
            backend: BackendConfig::read(object.raw("Backend"))?,
        })
    }

    /// Whether a lease of `subnet` is one this config would hand out.
    pub fn fits(&self, subnet: Subnet) -> bool {
        let v4 = match self.v4 {
            Some(range) => range.holds(subnet.v4),
            None => subnet.ipv4().is_none(),
        };
        let v6 = match (self.v6, subnet.v6) {
            (Some(range), Some(v6)) => range.holds(v6),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        v4 && v6
    }
}

impl BackendConfig {
    fn read(raw: Option<&str>) -> Result<Self, ConfigError> {
        let Some(raw) = raw else {
            return Ok(Self {
                kind: None,
                json: "{}".to_owned(),
            });
        };
        if !raw.starts_with('{') {
            return Err(JsonError::field("Backend", raw, "must be an object like {\"Type\":\"udp\"}").into());
        }
        let kind = Object::parse(raw, MAX_BYTES)?.string("Type")?.unwrap_or_default();
        if kind.is_empty() {
            let rule = "must name a backend when Backend is given";
            return Err(ConfigError::rule("Backend.Type", "missing", rule));
        }
        Ok(Self {
            kind: Some(kind.to_lowercase()),
            json: json::compact(raw),
        })
    }
}

const IPV4_RULE: &str = "must be an IPv4 address in quotes";
const IPV6_RULE: &str = "must be an IPv6 address in quotes";

/// What both families' prefixes can do; addresses are numbers here.
pub trait Prefixed: Copy + fmt::Display {
    /// Its addresses.
    type Addr: Copy + fmt::Display;
    /// Address width in bits.
    const WIDTH: u8;
    /// The subnet length used where the config names none and the network is wide enough.
    const DEFAULT_LEN: u8;
    /// Makes the prefix of `len` bits that begins at the number `first`; `None` if there is none.
    fn at(first: u128, len: u8) -> Option<Self>;
    /// The network address.
    fn first(self) -> u128;
    /// The prefix length.
    fn prefix_len(self) -> u8;
    /// An address as a number.
    fn number(addr: Self::Addr) -> u128;
    /// Whose addresses these are, if no host can have them.
    fn nobodys(self) -> Option<&'static str>;

    /// The last address.
    fn last(self) -> u128 {
        let host_bits = u32::from(Self::WIDTH.saturating_sub(self.prefix_len()));
        self.first() | u128::MAX.checked_shr(128 - host_bits).unwrap_or(0)
    }
}

/// How many addresses a subnet of `len` bits has; no subnet is shorter than /2, so the number always fits.
pub(crate) fn size<P: Prefixed>(len: u8) -> u128 {
    1_u128
        .checked_shl(u32::from(P::WIDTH.saturating_sub(len)))
        .unwrap_or(1 << 127)
}

impl Prefixed for Ipv4Prefix {
    type Addr = Ipv4Addr;
    const WIDTH: u8 = 32;
    const DEFAULT_LEN: u8 = 24;

    fn at(first: u128, len: u8) -> Option<Self> {
        Self::new(u32::try_from(first).ok()?.into(), len).ok()
    }

    fn first(self) -> u128 {
        u32::from(self.addr()).into()
    }

    fn prefix_len(self) -> u8 {
        self.len()
    }

    fn number(addr: Ipv4Addr) -> u128 {
        u32::from(addr).into()
    }

    fn nobodys(self) -> Option<&'static str> {
        // A wider network has others, too.
        match (self.addr(), self.len()) {
            (addr, 8..) if addr.is_loopback() => Some("the loopback's"),
            (addr, 4..) if addr.is_multicast() => Some("multicast's"),
            _ => None,
        }
    }
}

impl Prefixed for Ipv6Prefix {
    type Addr = Ipv6Addr;
    const WIDTH: u8 = 128;
    const DEFAULT_LEN: u8 = 64;

    fn at(first: u128, len: u8) -> Option<Self> {
        Self::new(first.into(), len).ok()
    }

    fn first(self) -> u128 {
        self.addr().into()
    }

    fn prefix_len(self) -> u8 {
        self.len()
    }

    fn number(addr: Ipv6Addr) -> u128 {
        addr.into()
    }

    fn nobodys(self) -> Option<&'static str> {
        match (self.addr(), self.len()) {
            (addr, 8..) if addr.is_multicast() => Some("multicast's"),
            (addr, 10..) if addr.is_unicast_link_local() => Some("those of a link alone"),
            _ => None,
        }
    }
}

/// One family's fields as they stand in the document.
struct Family<P: Prefixed> {
    network: Option<P>,
    subnet_len: Option<u32>,
    min: Option<P::Addr>,
    max: Option<P::Addr>,
}

struct FieldNames {
    network: &'static str,
    subnet_len: &'static str,
    min: &'static str,
    max: &'static str,
}

const V4_FIELDS: FieldNames = FieldNames {
    network: "Network",
    subnet_len: "SubnetLen",
    min: "SubnetMin",
    max: "SubnetMax",
};
const V6_FIELDS: FieldNames = FieldNames {
    network: "IPv6Network",
    subnet_len: "IPv6SubnetLen",
    min: "IPv6SubnetMin",
    max: "IPv6SubnetMax",
};

impl<P: Prefixed> Family<P> {
    fn check(self, names: &FieldNames) -> Result<SubnetRange<P>, ConfigError> {
        let Some(network) = self.network else {
            return Err(ConfigError::rule(
                names.network,
                "missing",
                "the network must be given",
            ));
        };
        if let Some(whose) = network.nobodys() {
            let rule = format!("must be of addresses that a host can have, and these are {whose}");
            return Err(ConfigError::rule(names.network, network, rule));
        }
        let net_len = network.prefix_len();
        let longest = P::WIDTH - 2;
        let len = match self.subnet_len {
            // To Go's zero value, 0 and absent are the same.
            None | Some(0) if net_len > P::WIDTH - 4 => {
                let rule = format!("must be /{} or shorter to be cut into subnets", P::WIDTH - 4);
                return Err(ConfigError::rule(names.network, network, rule));
            }
            None | Some(0) if net_len > P::DEFAULT_LEN - 2 => net_len + 2,
            None | Some(0) => P::DEFAULT_LEN,
            Some(len) if len > u32::from(longest) => {
                let rule = format!("must be {longest} at most");
                return Err(ConfigError::rule(names.subnet_len, len, rule));
            }
            Some(len) if len < u32::from(net_len) + 2 => {
                let rule = format!(
                    "must be at least {} for four subnets to fit into {network}",
                    net_len + 2
                );
                return Err(ConfigError::rule(names.subnet_len, len, rule));
            }
            Some(len) => u8::try_from(len).unwrap_or(longest),
        };
        let step = size::<P>(len);
        let last_subnet = network.last() - (step - 1);
        let min = self.end(names.min, self.min, network.first() + step, network, len)?;
        let max = self.end(names.max, self.max, last_subnet, network, len)?;
        if min.first() > max.first() {
            let rule = format!("must not be above {} ({})", names.max, max);
            return Err(ConfigError::rule(names.min, min, rule));
        }
        Ok(SubnetRange { network, min, max })
    }

    fn end(
        &self,
        name: &'static str,
        given: Option<P::Addr>,
        default: u128,
        network: P,
        len: u8,
    ) -> Result<P, ConfigError> {
        let first = given.map_or(default, P::number);
        let shown = || given.map_or_else(String::new, |addr| addr.to_string());
        if !(network.first()..=network.last()).contains(&first) {
            return Err(ConfigError::rule(
                name,
                shown(),
                format!("must lie in the network {network}"),
            ));
        }
        P::at(first, len)
            .filter(|subnet| subnet.first() == first)
            .ok_or_else(|| {
                ConfigError::rule(
                    name,
                    shown(),
                    format!("must be the base address of a /{len} subnet"),
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn defaults_are_flannels() {
        let config = parse(r#"{"Network":"10.5.1.7/16"}"#);
        let v4 = config.v4.unwrap();
        assert_eq!(v4.network.to_string(), "10.5.0.0/16");
        assert_eq!(v4.min.to_string(), "10.5.1.0/24");
        assert_eq!(v4.max.to_string(), "10.5.255.0/24");
        assert_eq!(config.v6, None);
        assert_eq!(config.backend.kind, None);
        assert!(!config.enable_nftables);
        for (network, len) in [("10.0.0.0/22", 24), ("10.0.0.0/23", 25), ("10.0.0.0/28", 30)] {
            let config = parse(&format!("{{\"Network\":\"{network}\"}}"));
            assert_eq!(config.v4.unwrap().subnet_len(), len, "{network}");
        }
    }

    #[test]
    fn a_published_example_is_read() {
        let config = parse(
            r#"{"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0",
                "Backend": {"Type": "VXLAN", "VNI": 100, "Port": 8472}}"#,
        );
        let v4 = config.v4.unwrap();
        assert_eq!(
            (v4.min.to_string(), v4.max.to_string()),
            ("10.10.0.0/20".into(), "10.99.0.0/20".into())
        );
        assert_eq!(config.backend.kind.as_deref(), Some("vxlan"));
        assert_eq!(config.backend.json, r#"{"Type":"VXLAN","VNI":100,"Port":8472}"#);
    }

    #[test]
    fn dual_stack_and_ipv6_only_are_read() {
        let config = parse(r#"{"network":"10.0.0.0/16","enableIPv6":true,"IPv6Network":"fd00:10:244::/48"}"#);
        let v6 = config.v6.unwrap();
        assert_eq!(
            (v6.min.to_string(), v6.max.to_string()),
            (
                "fd00:10:244:1::/64".to_string(),
                "fd00:10:244:ffff::/64".to_string()
            )
        );
        let config = parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::/0"}"#);
        assert!(config.v4.is_none() && config.v6.is_some());
    }

    #[test]
    fn odd_but_valid_configs_are_taken() {
        for text in [
            r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.0.0"}"#,
            r#"{"Network":"10.0.0.0/16","SubnetLen":null,"EnableIPv4":null}"#,
            r#"{"Network":"10.0.0.0/16","SubnetLen":0,"SubnetMin":"0.0.0.0"}"#,
            r#"{"Network":"10.0.0.0/16","IPv6SubnetMin":null,"Unknown":[1,2,{}]}"#,
            r#"{"Network":"1.2.3.4/8","Network":"10.0.0.0/16"}"#,
            r#"{"Network":"0.0.0.0/0"}"#,
            r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.7.0","SubnetMax":"10.0.7.0"}"#,
            r#"{"Network":"10.0.0.0/16","IPv6Network":"fd00::/48","SubnetLen":30}"#,
            " {\"Network\":\"10.0.0.0/16\"}\r\n",
        ] {
            parse(text);
        }
    }

    #[test]
    fn every_bad_config_is_refused_with_field_and_rule() {
        let net = |rest: &str| format!("{{\"Network\":\"10.0.0.0/16\",{rest}}}");
        let net6 = |rest: &str| {
            format!("{{\"EnableIPv4\":false,\"EnableIPv6\":true,\"IPv6Network\":\"fd00::/48\",{rest}}}")
        };
        let doc = |text: &str| text.to_owned();
        let cases: Vec<(String, &str)> = vec![
            // What is no document
            (doc(""), "JSON"),
            (doc("null"), "JSON"),
            (doc("[]"), "JSON"),
            (doc("7"), "JSON"),
            (doc("\"x\""), "JSON"),
            (doc("{"), "JSON"),
            (doc("{\"Network\":\"10.0.0.0/16\"} x"), "JSON"),
            (doc("{\"Network\":\"10.0.0.0/16\"}{}"), "JSON"),
            (doc("{\"Network\":\"10.0.0.0/16\",}"), "JSON"),
            (doc("{'Network':'10.0.0.0/16'}"), "JSON"),
            (doc("\u{feff}{\"Network\":\"10.0.0.0/16\"}"), "JSON"),
            (doc("// x\n{\"Network\":\"10.0.0.0/16\"}"), "JSON"),
            (
                net(&format!("\"x\":{}{}", "[".repeat(10_000), "]".repeat(10_000))),
                "deep",
            ),
            (net(&format!("\"x\":\"{}\"", "a".repeat(10 << 20))), "bytes"),
            // Network
            (doc("{}"), "Network"),
            (doc("{\"Network\":null}"), "Network"),
            (doc("{\"Network\":\"\"}"), "Network"),
            (doc("{\"Network\":7}"), "Network"),
            (doc("{\"Network\":\"10.0.0.0\"}"), "Network"),
            (doc("{\"Network\":\"10.0.0.0/33\"}"), "Network"),
            (doc("{\"Network\":\"10.0.0.0/-1\"}"), "Network"),
            (doc("{\"Network\":\"10.0.0/16\"}"), "Network"),
            (doc("{\"Network\":\"010.0.0.0/16\"}"), "Network"),
            (doc("{\"Network\":\"fd00::/48\"}"), "Network"),
            (doc("{\"Network\":\"１0.0.0.0/16\"}"), "Network"),
            (doc("{\"Network\":\"10.0.0.0/29\"}"), "Network"),
            (doc("{\"Network\":\"127.0.0.0/8\"}"), "Network"),
            (doc("{\"Network\":\"224.0.0.0/8\"}"), "Network"),
            (doc("{\"Network\":\"10.0.0.0/32\"}"), "Network"),
            (doc("{\"Network\":\"x\",\"Network\":\"10.0.0.0/16\"}"), "Network"),
            // SubnetLen
            (net("\"SubnetLen\":\"24\""), "SubnetLen"),
            (net("\"SubnetLen\":24.0"), "SubnetLen"),
            (net("\"SubnetLen\":2e1"), "SubnetLen"),
            (net("\"SubnetLen\":-1"), "SubnetLen"),
            (net("\"SubnetLen\":31"), "SubnetLen"),
            (net("\"SubnetLen\":32"), "SubnetLen"),
            (net("\"SubnetLen\":99999999999999999999"), "SubnetLen"),
            (net("\"SubnetLen\":280"), "SubnetLen"),
            (net("\"SubnetLen\":17"), "SubnetLen"),
            (net("\"SubnetLen\":16"), "SubnetLen"),
            (net("\"SubnetLen\":8"), "SubnetLen"),
            (net("\"SubnetLen\":true"), "SubnetLen"),
            (net("\"SubnetLen\":[]"), "SubnetLen"),
            // SubnetMin and SubnetMax
            (net("\"SubnetMin\":null"), "SubnetMin"),
            (net("\"SubnetMin\":\"\""), "SubnetMin"),
            (net("\"SubnetMin\":\"10.0.1.0/24\""), "SubnetMin"),
            (net("\"SubnetMin\":\"10.1.0.0\""), "SubnetMin"),
            (net("\"SubnetMin\":\"9.255.255.0\""), "SubnetMin"),
            (net("\"SubnetMin\":\"10.0.1.1\""), "SubnetMin"),
            (net("\"SubnetMax\":\"10.1.0.0\""), "SubnetMax"),
            (net("\"SubnetMax\":\"10.0.9.128\""), "SubnetMax"),
            (net("\"SubnetMax\":7"), "SubnetMax"),
            (net("\"SubnetMax\":\"fd00::\""), "SubnetMax"),
            (
                net("\"SubnetMin\":\"10.0.9.0\",\"SubnetMax\":\"10.0.8.0\""),
                "SubnetMin",
            ),
            (net("\"SubnetMax\":\"10.0.0.0\""), "SubnetMin"),
            // Switches
            (net("\"EnableIPv4\":\"true\""), "EnableIPv4"),
            (net("\"EnableIPv4\":1"), "EnableIPv4"),
            (net("\"EnableIPv4\":false"), "EnableIPv4"),
            (net("\"EnableIPv6\":true"), "IPv6Network"),
            (net("\"EnableIPv6\":\"no\""), "EnableIPv6"),
            (net("\"EnableNFTables\":0"), "EnableNFTables"),
            // IPv6
            (net("\"IPv6Network\":null"), "IPv6Network"),
            (net("\"IPv6Network\":\"10.0.0.0/8\""), "IPv6Network"),
            (net6("\"IPv6SubnetLen\":127"), "IPv6SubnetLen"),
            (net6("\"IPv6SubnetLen\":49"), "IPv6SubnetLen"),
            (net6("\"IPv6Network\":\"fd00::/125\""), "IPv6Network"),
            (net6("\"IPv6Network\":\"ff05::/48\""), "IPv6Network"),
            (net6("\"IPv6Network\":\"fe80::/48\""), "IPv6Network"),
            (net6("\"IPv6SubnetMin\":\"fd01::\""), "IPv6SubnetMin"),
            (net6("\"IPv6SubnetMin\":\"fd00:0:0:1::1\""), "IPv6SubnetMin"),
            (net6("\"IPv6SubnetMax\":\"10.0.0.0\""), "IPv6SubnetMax"),
            (
                net6("\"IPv6SubnetMin\":\"fd00:0:0:9::\",\"IPv6SubnetMax\":\"fd00:0:0:8::\""),
                "IPv6SubnetMin",
            ),
            // Backend
            (net("\"Backend\":null"), "Backend"),
            (net("\"Backend\":\"udp\""), "Backend"),
            (net("\"Backend\":[]"), "Backend"),
            (net("\"Backend\":{}"), "Backend.Type"),
            (net("\"Backend\":{\"Type\":\"\"}"), "Backend.Type"),
            (net("\"Backend\":{\"Type\":null}"), "Backend.Type"),
            (net("\"Backend\":{\"Type\":7}"), "Type"),
        ];
        assert!(cases.len() >= 60);
        for (text, named) in cases {
            let shown: String = text.chars().take(100).collect();
            let error = NetworkConfig::parse(&text).expect_err(&shown).to_string();
            assert!(error.contains(named), "{shown}: {error}");
            assert!(error.len() < 400 && !error.contains('\n'), "{shown}: {error}");
        }
    }
}
