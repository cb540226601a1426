//! What a network wants of the host's firewall, and the names its rules go by.

use crate::addr::{Ipv6Prefix, Prefix};
use crate::host::firewall::tool::Family;

/// Comment of masquerade rules; flannel's.
pub(super) const MASQ_COMMENT: &str = "flanneld masq";
/// Comment of forward rules; flannel's.
pub(super) const FORWARD_COMMENT: &str = "flanneld forward";
/// Comment of rules that keep pods from the tunnel.
pub(super) const GUARD_COMMENT: &str = "kersey tunnel guard";
/// The mark of packets that kube-proxy will masquerade.
pub(super) const KUBE_MARK: &str = "0x4000/0x4000";

/// What a network wants of the host's firewall.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleSet {
    /// Which network.
    pub names: Names,
    /// Its IPv4 and IPv6 halves; at most one of each.
    pub overlays: Vec<OverlayPart>,
    /// Whether what leaves the overlay is masqueraded.
    pub masquerade: Masquerade,
    /// Whether its packets are accepted where the host forwards.
    pub forward: bool,
    /// What pods may not speak to.
    pub guard: Option<Guard>,
    /// Links of this host with pods behind them, sorted.
    pub pod_links: Vec<String>,
}

/// One family's half of a network on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayPart {
    /// The whole network.
    pub network: Prefix,
    /// This node's subnet of it.
    pub subnet: Prefix,
}

/// Whether and how to masquerade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Masquerade {
    /// Not at all.
    Off,
    /// As the kernel likes.
    Plain,
    /// With random source ports, where the kernel can.
    Random,
}

/// What pods may not speak to: where other nodes' packets come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// A UDP port.
    Port(u16),
    /// Blocks of SIDs.
    Blocks(Vec<Ipv6Prefix>),
}

/// What tables and chains of one network are called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// What tells this network's from others'; empty for the network without a name.
    suffix: String,
}

impl Names {
    /// The names of a network's; those of the network without a name are flannel's own.
    ///
    /// The longest name a chain of iptables can have is 28 bytes, so that a network's name that is long or odd is replaced by a number
    /// made from it.
    pub fn of(network: &str) -> Self {
        const LONGEST: usize = 12;
        let plain = |name: &str| {
            name.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
        };
        let suffix = match network {
            "" => String::new(),
            name if name.len() <= LONGEST && plain(name) => format!("-{name}"),
            name => format!("-{:08x}", fnv(name)),
        };
        Self { suffix }
    }

    /// The nft table of a family.
    pub fn table(&self, family: Family) -> String {
        match family {
            Family::V4 => format!("flannel-ipv4{}", self.suffix),
            Family::V6 => format!("flannel-ipv6{}", self.suffix),
        }
    }

    /// The chain of masquerade rules.
    pub fn postrouting(&self) -> String {
        format!("FLANNEL-POSTRTG{}", self.suffix)
    }

    /// The chain of forward rules.
    pub fn forward(&self) -> String {
        format!("FLANNEL-FWD{}", self.suffix)
    }

    /// The chain that keeps pods from the tunnel.
    pub fn guard(&self) -> String {
        format!("KERSEY-GUARD{}", self.suffix)
    }
}

/// FNV-1a, 32 bits: the same in every version, which the standard library's hash does not promise.
fn fnv(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

impl RuleSet {
    /// A set that wants nothing, for the network called `network`.
    pub fn nothing(network: &str) -> Self {
        Self {
            names: Names::of(network),
            overlays: Vec::new(),
            masquerade: Masquerade::Off,
            forward: false,
            guard: None,
            pod_links: Vec::new(),
        }
    }

    /// The half of a family.
    pub fn overlay(&self, family: Family) -> Option<OverlayPart> {
        self.overlays
            .iter()
            .find(|part| family_of(part.network) == family)
            .copied()
    }

    /// Whether any rule is wanted.
    pub fn is_empty(&self) -> bool {
        self.masquerade == Masquerade::Off && !self.forward && self.guard.is_none()
    }
}

/// A prefix's family.
pub(super) fn family_of(prefix: Prefix) -> Family {
    match prefix {
        Prefix::V4(_) => Family::V4,
        Prefix::V6(_) => Family::V6,
    }
}

/// The multicast addresses of a family.
pub(super) fn multicast(family: Family) -> &'static str {
    match family {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_without_a_name_has_flannels_names() {
        let names = Names::of("");
        assert_eq!(names.table(Family::V4), "flannel-ipv4");
        assert_eq!(names.table(Family::V6), "flannel-ipv6");
        assert_eq!(
            (names.postrouting().as_str(), names.forward().as_str()),
            ("FLANNEL-POSTRTG", "FLANNEL-FWD")
        );
    }

    #[test]
    fn every_network_has_names_of_its_own_that_fit() {
        let networks = [
            "blue",
            "green",
            "a/b",
            "blau\n-j",
            "a-name-that-is-long",
            "a-name-that-is-longer",
        ];
        let mut seen = std::collections::BTreeSet::new();
        for network in networks {
            let names = Names::of(network);
            for name in [names.postrouting(), names.forward(), names.guard()] {
                assert!(name.len() <= 28, "{name}");
                assert!(
                    name.bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)),
                    "{name}"
                );
                assert!(seen.insert(name));
            }
        }
        assert_eq!(Names::of("blue").table(Family::V4), "flannel-ipv4-blue");
    }
}
