//! What a node waits for as it starts: an underlay interface, and a data plane that comes up.
//!
//! None of it is fatal that may come right: it is told once, shown in the status, and tried again.

use std::io;

use anyhow::Result;
use tokio::time::sleep;

use crate::backend::{Backend, Underlay};
use crate::control::Backoff;
use crate::control::config::NetworkConfig;
use crate::daemon::network::{DataPlane, Setup};
use crate::daemon::node::{ChooseAgain, RETRY};
use crate::daemon::report::Report;
use crate::daemon::underlay_watch::request;
use crate::daemon::{ENVIRONMENT, exit_status};
use crate::host::interface::{Families, UnderlayInterface};
use crate::host::netlink::Netlink;
use crate::host::socket::UnderlayError;
use crate::lease::Lease;
use crate::options::RunOptions;

/// Tells of a network that the underlay's own address lies in; warns where that address is not kept from being leased.
pub(super) fn tell_of_own_address(config: &NetworkConfig, underlay: Underlay, report: &Report) {
    let v4 = config
        .v4
        .zip(underlay.v4)
        .filter(|(range, addr)| range.network.contains(*addr));
    let v6 = config
        .v6
        .zip(underlay.v6)
        .filter(|(range, addr)| range.network.contains(*addr));
    let spared = v4.is_none_or(|(range, addr)| range.spares(addr))
        && v6.is_none_or(|(range, addr)| range.spares(addr));
    let is_shared = v4.is_some() || v6.is_some();
    if !report.is_news("shared", &format!("{is_shared} {spared}")) || !is_shared {
        return;
    }
    if spared {
        tracing::info!(
            "the underlay's own address lies in the overlay's network, so no more of it than peers' subnets is routed to the device"
        );
    } else {
        tracing::warn!(
            "the underlay's own address lies in what the overlay leases, so peers with such addresses are refused; set SubnetMin and SubnetMax of \
             the network config so that nodes' addresses are outside"
        );
    }
}

/// Brings the data plane up, trying again while it may still come right.
pub(super) async fn up<B: Backend>(
    setup: &Setup<'_, B>,
    lease: &Lease,
    report: &Report,
) -> Result<DataPlane<B>> {
    let mut told = String::new();
    let mut backoff = Backoff::new(RETRY);
    loop {
        let error = match DataPlane::start(setup, lease).await {
            Ok(plane) => return Ok(plane),
            Err(error) => error,
        };
        if exit_status(&error) == ENVIRONMENT {
            return Err(error);
        }
        if let Some(UnderlayError::PortTaken { addr, .. }) = error.downcast_ref::<UnderlayError>()
            && setup.backend.has_another()
        {
            return Err(ChooseAgain::PortTaken(addr.port()).into());
        }
        let mut text = format!("{error:#}");
        if let Some(holder) = port_holder(&error, &setup.netlink).await {
            text = format!("{text}: {holder}");
        }
        if is_a_low_port(&error) {
            text.push_str(
                ": ports below 1024 take CAP_NET_BIND_SERVICE, which the sandbox gives up; choose a higher one, lower \
                 net.ipv4.ip_unprivileged_port_start, or run with --sandbox=landlock,seccomp",
            );
        }
        if text != told {
            tracing::warn!(error = text, "cannot bring the data plane up; trying again");
            report.set_problem(format!("the data plane cannot be brought up: {text}"));
            told = text;
        }
        sleep(backoff.next_pause()).await;
    }
}

/// Whether a port was refused because it is low.
fn is_a_low_port(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<UnderlayError>(),
        Some(UnderlayError::Socket { doing: "bind", addr, source })
            if addr.port() < 1024 && source.kind() == io::ErrorKind::PermissionDenied
    )
}

/// Which of the kernel's own tunnels has the port we were refused, and what to do about it.
async fn port_holder(error: &anyhow::Error, netlink: &Netlink) -> Option<String> {
    let Some(UnderlayError::PortTaken { addr, .. }) = error.downcast_ref::<UnderlayError>() else {
        return None;
    };
    let devices = netlink.vxlan_devices().await.ok()?;
    let holder = devices.iter().find(|device| device.holds(*addr))?;
    let remedy = if holder.has_flannels_name() {
        format!(
            "if flannel does not run here any more, `ip link del {}`, or stop kersey and run `kersey cleanup`",
            holder.link.name
        )
    } else {
        "take it down, or give the network another port".to_owned()
    };
    Some(format!(
        "the kernel's vxlan device {:?} (VNI {}) has it; {remedy}",
        holder.link.name, holder.vni
    ))
}

/// The families an underlay should have, best first: those of the network, or of one family or the other where there is nothing else.
pub(super) fn families(config: &NetworkConfig, needs_v6: bool) -> [Families; 3] {
    if needs_v6 {
        return [Families::Dual, Families::V6, Families::V6];
    }
    match (config.v4.is_some(), config.v6.is_some()) {
        (true, true) => [Families::Dual, Families::V4, Families::V6],
        (false, true) => [Families::V6, Families::V4, Families::V4],
        (true | false, false) => [Families::V4, Families::V6, Families::V6],
    }
}

/// Chooses the underlay interface, waiting for one to come.
pub(super) async fn underlay_interface(
    options: &RunOptions,
    wanted: &[Families],
    netlink: &Netlink,
    report: &Report,
) -> UnderlayInterface {
    let mut told = String::new();
    let mut backoff = Backoff::new(RETRY);
    loop {
        let mut first_error = None;
        for &families in wanted {
            match request(&options.interface, families).choose(netlink).await {
                Ok(interface) => {
                    report.clear_problem();
                    return interface;
                }
                Err(error) => first_error.get_or_insert(error),
            };
        }
        if let Some(error) = first_error.map(|error| format!("{:#}", anyhow::Error::from(error)))
            && error != told
        {
            tracing::warn!(error, "waiting for an underlay interface");
            report.set_problem(format!("waiting for an underlay interface: {error}"));
            told = error;
        }
        sleep(backoff.next_pause()).await;
    }
}
