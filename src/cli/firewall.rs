//! The flags about firewall rules: flannel's, and Kersey's own beside them.

use std::time::Duration;

use super::go_flags::parse_bool;
use super::store::seconds;
use crate::options::{FirewallOptions, FirewallTool, Masquerade};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Firewall")]
pub(super) struct FirewallArgs {
    /// Masquerade what leaves the overlay for other networks
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    ip_masq: bool,
    /// Masquerade without random source ports
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    ip_masq_fully_random_disable: bool,
    /// Accept the overlay's packets where this host forwards
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "true", value_parser = parse_bool)]
    iptables_forward_rules: bool,
    /// How often rules that somebody removed or changed are put right
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = resync)]
    iptables_resync: Duration,
    /// Drop packets to addresses of the own subnet that nobody has, instead of sending them out by the default route
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    ip_blackhole_route: bool,
    /// Drop what pods send to the tunnel's port or, with srv6, to its SIDs
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "true", value_parser = parse_bool)]
    tunnel_guard: bool,
    /// Tool that rules are made with; auto is nft, or iptables where nft is not there
    #[arg(long, value_name = "TOOL", value_enum, default_value = "auto")]
    firewall: FirewallTool,
}

impl FirewallArgs {
    pub(super) fn options(&self) -> FirewallOptions {
        FirewallOptions {
            tool: self.firewall,
            masquerade: match (self.ip_masq, self.ip_masq_fully_random_disable) {
                (false, _) => Masquerade::Off,
                (true, true) => Masquerade::Plain,
                (true, false) => Masquerade::Random,
            },
            forward_rules: self.iptables_forward_rules.into(),
            tunnel_guard: self.tunnel_guard.into(),
            resync: self.iptables_resync,
            blackhole: self.ip_blackhole_route.into(),
        }
    }
}

fn resync(text: &str) -> Result<Duration, String> {
    seconds(text, 1..=86_400)
}
