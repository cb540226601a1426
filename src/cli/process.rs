//! The flags about the process around the node: probes and metrics, privileges, the change from one process to the next.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use super::go_flags::parse_bool;
use super::store::int_within;
use crate::options::{Handover, MonitorOptions, Predecessor, ProcessOptions, SandboxChoice, metrics_address};

/// What a process gives up, be it a node or a server.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Process")]
pub(super) struct SandboxArgs {
    /// What the process gives up after its start: auto, off, or a list of capabilities, landlock, seccomp
    #[arg(long, value_name = "PARTS", default_value = "auto")]
    pub(super) sandbox: SandboxChoice,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Process")]
pub(super) struct ProcessArgs {
    /// Address that health probes are answered at (flannel's flag)
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = healthz_ip)]
    healthz_ip: IpAddr,
    /// Port for /healthz and /readyz, and for this machine /metrics; 0 is none (flannel's flag)
    #[arg(long, value_name = "PORT", default_value = "0", value_parser = healthz_port)]
    healthz_port: HealthzPort,
    /// Where Prometheus finds /metrics: ADDRESS:PORT, or a port for loopback [default: nowhere]
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = metrics_address)]
    metrics_address: Option<SocketAddr>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    /// User to become, by name or number; the capabilities that are needed stay
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Hand device and sockets to the next process, so that packets flow through a restart
    #[arg(
        long,
        value_name = "AUTO|OFF",
        value_enum,
        default_value = "auto",
        hide_possible_values = true
    )]
    handover: Handover,
    /// Take the place of the daemon that runs, without a gap
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    takeover: bool,
}

/// A port, or none.
#[derive(Clone, Copy, Debug)]
struct HealthzPort(Option<NonZeroU16>);

impl ProcessArgs {
    pub(super) fn into_options(self) -> ProcessOptions {
        ProcessOptions {
            monitor: MonitorOptions {
                healthz_ip: self.healthz_ip,
                healthz_port: self.healthz_port.0,
                metrics_address: self.metrics_address,
            },
            sandbox: self.sandbox.sandbox,
            user: self.user.filter(|user| !user.is_empty()),
            handover: self.handover,
            predecessor: if self.takeover {
                Predecessor::Replace
            } else {
                Predecessor::Respect
            },
            // Which it is, is known where the file was read.
            config_file: None,
        }
    }
}

fn healthz_ip(text: &str) -> Result<IpAddr, String> {
    // Go's net.Listen takes an empty host for all addresses, as flanneld hands it on.
    match text {
        "" => Ok(std::net::Ipv4Addr::UNSPECIFIED.into()),
        _ => text.parse().map_err(|_| "expected an IP address".to_owned()),
    }
}

fn healthz_port(text: &str) -> Result<HealthzPort, String> {
    let port =
        int_within(text, 0..=65_535).map_err(|_| "a port is a whole number from 0 to 65535".to_owned())?;
    Ok(HealthzPort(u16::try_from(port).ok().and_then(NonZeroU16::new)))
}
