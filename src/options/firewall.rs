//! Firewall rules and what else of the host's packet filtering is Kersey's to do.

use std::time::Duration;

/// What a node does to the host's firewall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirewallOptions {
    /// With which tool rules are made.
    pub tool: FirewallTool,
    /// Masquerading of what leaves the overlay.
    pub masquerade: Masquerade,
    /// Whether the overlay's packets are accepted where the host forwards.
    pub forward_rules: Enabled,
    /// Whether pods are kept from speaking the tunnel's protocol.
    pub tunnel_guard: Enabled,
    /// How often rules are looked after.
    pub resync: Duration,
    /// Whether packets to free addresses of the own subnet go nowhere rather than out by the default route.
    pub blackhole: Enabled,
}

/// With which tool firewall rules are made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum FirewallTool {
    /// nft, or where it is not there or refused iptables, or none.
    #[default]
    Auto,
    /// nft.
    Nft,
    /// iptables and ip6tables.
    Iptables,
    /// None: no rules.
    Off,
}

/// Masquerading of packets that leave the overlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Masquerade {
    /// None.
    #[default]
    Off,
    /// With source ports chosen as the kernel likes.
    Plain,
    /// With source ports chosen at random, where the kernel can; it spares short connections a race for the same port.
    Random,
}

/// Whether something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enabled {
    /// It is.
    Yes,
    /// It is not.
    No,
}

impl From<bool> for Enabled {
    fn from(yes: bool) -> Self {
        if yes { Self::Yes } else { Self::No }
    }
}
