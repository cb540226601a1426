//! One network's node: lease, backend, data plane, routes, `subnet.env`, kept up for ever.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tracing::Instrument;

use crate::addr::{MacAddr, Mtu, NetworkName};
use crate::backend::srv6::Srv6Node;
use crate::backend::{AnyBackend, Backend, Identity, Networks, Place, Underlay, select};
use crate::control::config::NetworkConfig;
use crate::control::store::Store;
use crate::control::{Control, ControlOptions, Published, RateLimit, identity, state_file, subnet_file};
use crate::daemon::claims::{Claims, Wants};
use crate::daemon::direct::DirectRoutes;
use crate::daemon::firewall::Keeper;
use crate::daemon::health::TURN;
use crate::daemon::judge::tell_unread;
use crate::daemon::network::{self, Repair, Setup};
use crate::daemon::reload::{self, Chosen, InUse, Requests};
use crate::daemon::report::Report;
use crate::daemon::startup::{families, tell_of_own_address, underlay_interface, up};
use crate::daemon::supervisor::Task;
use crate::daemon::underlay_watch::{Moved, UnderlayWatch};
use crate::daemon::withdraw::withdraw;
use crate::daemon::{CONFIG, exit_status, plain, succession};
use crate::host::interface::UnderlayInterface;
use crate::host::netlink::{LinkChange, Netlink};
use crate::host::socket;
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::options::{RunOptions, Srv6Options};
use crate::trust::warn_if_exposed;

/// Longest pause before something that failed at start is tried again. The first is a tenth of a second: what is in the way after a restart
/// is often the dying predecessor.
pub(super) const RETRY: Duration = Duration::from_secs(1);
/// How often an automatic second choice looks whether the first can be had.
const RETRY_PORT: Duration = Duration::from_secs(5);
/// How long changes to the device gather before we look at it: one `ip` command makes several, and whoever keeps
/// changing it against us should not keep us busy.
const GATHER: Duration = Duration::from_millis(100);
/// A file of keys has a line a key, of up to some hundred bytes.
const MAX_KEYS_BYTES: u64 = 1 << 20;

/// What tells the rules of the network without a name from those of another daemon's on this host: nothing, unless the device has a name
/// of its own.
pub(super) fn rules_name(options: &RunOptions) -> &str {
    match options.packet_path.device.as_str() {
        "flannel0" => "",
        device => device,
    }
}

/// Joins a network and stays in it; returns only with an error nothing can mend.
///
/// One of several networks comes with its name, and takes what it needs of the host before anything is touched.
pub(super) async fn run(
    options: RunOptions,
    store: Arc<dyn Store>,
    report: Arc<Report>,
    claims: Option<(NetworkName, Arc<Claims>)>,
) -> Result<()> {
    let mut requests = Requests::new();
    let in_use = InUse::new(None);
    // A config to go by rather than the store's; and the last that could be run, once another came after it.
    let (mut given, mut last_good) = (None, None);
    let mut moving = None;
    loop {
        let life = live(
            &options,
            claims.as_ref(),
            Arc::clone(&store),
            Arc::clone(&report),
            (given.take(), &in_use),
            moving.take(),
        );
        let ended = tokio::select! {
            ended = life => ended,
            config = reload::new_config(&mut requests, &store, &in_use, &report) => {
                last_good = reload::in_use(&in_use);
                given = Some(config);
                report.not_ready();
                continue;
            }
            config = reload::overdue_config(&store, &in_use, &report) => {
                last_good = reload::in_use(&in_use);
                given = Some(config);
                report.not_ready();
                continue;
            }
        };
        match ended.map_err(|error| error.downcast::<ChooseAgain>()) {
            Err(Ok(again)) => {
                tracing::info!("joining anew: {again}");
                report.not_ready();
                moving = again.lease();
                if moving.is_some() {
                    store.distrust();
                }
                // Addresses change, ports come and go; the config is what it was.
                given = reload::in_use(&in_use);
            }
            Err(Err(error)) if last_good.is_some() && exit_status(&error) == CONFIG => {
                tracing::warn!("the new network config cannot be run here, so the last one is: {error:#}");
                // The store has been heard; its config is looked at again when somebody asks for it.
                given = last_good.clone().map(|chosen| Chosen {
                    cached: false,
                    ..chosen
                });
            }
            Err(Err(error)) => return Err(error),
            Ok(()) => return Ok(()),
        }
    }
}

/// The link is too small for this backend and network.
#[derive(Debug, thiserror::Error)]
#[error("the MTU of {interface}, {link_mtu}, or Backend.MTU where that is given, is too small: {rule}")]
pub(super) struct UnusableMtu {
    pub(super) interface: String,
    pub(super) link_mtu: u16,
    pub(super) rule: String,
}

/// Another backend can be had now, or the one chosen can not, or the underlay is another: what was chosen is to be chosen again.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChooseAgain {
    /// The better one's port has become free.
    #[error("port {0} is free")]
    PortFree(u16),
    /// What peers are told depends on the subnet, which is another now.
    #[error("the subnet is now {0}")]
    Moved(Subnet),
    /// The port of the one chosen is taken.
    #[error("port {0} is taken")]
    PortTaken(u16),
    /// The underlay is another; the lease comes along.
    #[error("the underlay is another: {what}")]
    Underlay {
        /// What is different.
        what: String,
        /// Our lease, as the store knows it.
        lease: Box<Lease>,
    },
}

impl ChooseAgain {
    /// The lease to take along.
    fn lease(self) -> Option<Lease> {
        match self {
            Self::Underlay { lease, .. } => Some(*lease),
            Self::PortFree(_) | Self::Moved(_) | Self::PortTaken(_) => None,
        }
    }
}

/// Joins the network with the backend its config names, and stays in it.
async fn live(
    options: &RunOptions,
    claims: Option<&(NetworkName, Arc<Claims>)>,
    store: Arc<dyn Store>,
    report: Arc<Report>,
    (given, in_use): (Option<Chosen>, &InUse),
    moving: Option<Lease>,
) -> Result<()> {
    let mut control = Control::new(Arc::clone(&store), control_options(options)).moving(moving);
    report.set_waiting(control.waiting());
    let chosen = match given {
        Some(given) => {
            control.live_by(given.text.clone());
            given
        }
        None => {
            let config = control.network_config().await;
            let (text, cached) = control.config_text();
            Chosen { config, text, cached }
        }
    };
    in_use.send_replace(Some(chosen.clone()));
    let config = chosen.config;
    let identity = Identity {
        mac: identity::mac(&options.data_dir),
        srv6: srv6_node(&options.srv6)?,
    };
    let mut backend = select(config.backend.kind.as_deref(), &config.backend.json, identity)?;
    tell_unread(&chosen.text, &report);
    if let AnyBackend::Auto(auto) = &mut backend {
        let port = auto.port();
        // What an earlier life of ours has is ours.
        let ours = succession::held().has_port(&options.packet_path.device, port);
        *auto = auto.settled(!ours && socket::port_is_taken(port));
    }
    if let Some((name, claims)) = claims {
        let former = claims.take(name, &Wants::of(&backend, &config))?;
        if let Err(error) = withdraw(&former).await {
            tracing::warn!(%error, "kernel routes from before the config changed stay; `kersey cleanup` removes them");
        }
    }
    match backend {
        AnyBackend::Auto(backend) => {
            tracing::info!(
                backend = backend.name(),
                reason = backend.reason(),
                "backend chosen"
            );
            join(options, backend, config, control, store, report).await
        }
        AnyBackend::Udp(backend) => join(options, backend, config, control, store, report).await,
        AnyBackend::Vxlan(backend) => join(options, backend, config, control, store, report).await,
        AnyBackend::Srv6(backend) => join(options, *backend, config, control, store, report).await,
        AnyBackend::HostGw(backend) => plain::join(options, backend, config, control, store, report).await,
        AnyBackend::Alloc(backend) => plain::join(options, backend, config, control, store, report).await,
    }
}

/// A file of keys is not there, or wrong.
#[derive(Debug, thiserror::Error)]
#[error("cannot use --srv6-hmac-keys {}: {cause}", .file.display())]
pub(super) struct UnusableKeys {
    file: PathBuf,
    cause: String,
}

/// What the options and the files they name say of this node's part in segment routing.
fn srv6_node(options: &Srv6Options) -> Result<Srv6Node> {
    let keys = match &options.hmac_keys {
        None => Vec::new(),
        Some(file) => {
            let unusable = |cause: String| UnusableKeys {
                file: file.clone(),
                cause,
            };
            let text = state_file::read(file, MAX_KEYS_BYTES).map_err(|error| unusable(error.to_string()))?;
            warn_if_exposed(file);
            Srv6Node::parse_keys(&text).map_err(|error| unusable(error.to_string()))?
        }
    };
    Ok(Srv6Node {
        locator: options.locator,
        sids: options.sids.clone(),
        keys,
    })
}

fn control_options(options: &RunOptions) -> ControlOptions {
    ControlOptions {
        renew_margin: options.lease.renew_margin,
        state_dir: Some(options.data_dir.clone()),
        subnet_file: options.subnet_file.clone(),
        backoff_cap: options.store.backoff_cap,
        holder: Some(identity::holder(&options.data_dir)),
        ..ControlOptions::default()
    }
}

/// Joins the network with a backend, and stays in it.
async fn join<B: Backend>(
    options: &RunOptions,
    backend: B,
    config: NetworkConfig,
    mut control: Control,
    store: Arc<dyn Store>,
    report: Arc<Report>,
) -> Result<()> {
    let netlink = Netlink::open()?;
    let wanted = families(&config, backend.needs_v6());
    let interface = underlay_interface(options, &wanted, &netlink, &report).await;
    let mut place = Place {
        mac: netlink
            .link(&interface.name)
            .await
            .ok()
            .and_then(|link| link.mac)
            .map(MacAddr::from),
        public_v4: interface.public_v4,
        subnet: None,
    };
    // The subnet will most likely be the one of an earlier life.
    let remembered = control.remembered(&lease_attrs(&backend, &config, &interface), &config);
    place.subnet = remembered.map(|subnet| config.number(subnet));
    let backend = backend.placed(&place)?;
    let underlay = Underlay {
        v4: interface.v4,
        v6: interface.v6,
    };
    let too_small = |rule: String| UnusableMtu {
        interface: interface.name.clone(),
        link_mtu: interface.mtu.bytes(),
        rule,
    };
    let inner_mtu = backend
        .inner_mtu(interface.mtu, underlay)
        .map_err(|error| too_small(error.to_string()))?;
    if config.v6.is_some() && inner_mtu.bytes() < 1280 {
        // RFC 8200 §5
        return Err(too_small(format!("{inner_mtu} bytes are left inside, and IPv6 needs 1280")).into());
    }
    for note in backend.notes() {
        tracing::info!(backend = backend.name(), "{note}");
    }
    tell_of_own_address(&config, underlay, &report);
    let asked = lease_attrs(&backend, &config, &interface);
    let mut lease = control.acquire(&asked, &config).await;
    place.subnet = Some(config.number(lease.subnet));
    let backend = backend.placed(&place)?;
    // What the lease says may depend on which one it is.
    let attrs = lease_attrs(&backend, &config, &interface);
    if attrs != asked {
        lease = control
            .amend(Lease {
                attrs: attrs.clone(),
                ..lease
            })
            .await;
    }
    tracing::info!(
        subnet = %lease.subnet,
        interface = interface.name,
        public_ip = %attrs.public_ip,
        public_ipv6 = attrs.public_ipv6.map(|addr| addr.to_string()),
        link_mtu = interface.mtu.bytes(),
        inner_mtu = inner_mtu.bytes(),
        "lease acquired"
    );
    let setup = Setup {
        options: &options.packet_path,
        backend,
        config: &config,
        interface: &interface,
        inner_mtu,
        netlink,
        firewall: Keeper::start(options.firewall, rules_name(options), Arc::clone(&report))?,
        data_dir: &options.data_dir,
    };
    let (publish, published) = control.channels(&config, &lease);
    let _maintain = Task(tokio::spawn(control.maintain(publish).in_current_span()));
    report.set_node(&setup, &published, store);
    let watch = UnderlayWatch::new(&options.interface, &wanted, &interface);
    stay(options, &setup, lease, published, (&report, watch)).await
}

/// What our lease is to say.
fn lease_attrs(backend: &impl Backend, config: &NetworkConfig, interface: &UnderlayInterface) -> LeaseAttrs {
    let data = backend.lease_data(Networks {
        v4: config.v4.is_some(),
        v6: config.v6.is_some(),
    });
    LeaseAttrs {
        public_ip: interface.public_v4.unwrap_or(std::net::Ipv4Addr::UNSPECIFIED),
        public_ipv6: interface.public_v6,
        backend_type: data.kind.to_owned(),
        backend_data: data.v4,
        backend_v6_data: data.v6,
    }
}

/// Keeps the data plane up and its routes true.
async fn stay<B: Backend>(
    options: &RunOptions,
    setup: &Setup<'_, B>,
    mut lease: Lease,
    mut published: Published,
    (report, mut underlay): (&Report, UnderlayWatch),
) -> Result<()> {
    let mut changes = Netlink::watch()?;
    let repairs = RateLimit::default();
    let mut direct = DirectRoutes::new(setup);
    let by_locators = !setup.backend.blocks().is_empty();
    let mut retry_port = setup.backend.wanted_port().map(|_| Instant::now() + RETRY_PORT);
    loop {
        let (failed, mut failures) = mpsc::channel(16);
        let mut plane = up(setup, &lease, report).await?;
        let mut table = published.peers.borrow_and_update().clone();
        // Packets may be waiting, or still be moved by another: better they wait on than find no peer.
        let patience = if table.is_confirmed() {
            Duration::ZERO
        } else {
            plane.patience(table.is_empty())
        };
        if !patience.is_zero() && timeout(patience, published.peers.changed()).await.is_ok() {
            table = published.peers.borrow_and_update().clone();
        }
        if !by_locators {
            plane.follow(&table, &direct.refused);
        }
        report.set_kernel_routes(direct.follow(setup, lease.subnet, &table).await);
        // A peer is in the table once its locator can be reached, if it has one.
        if by_locators {
            plane.follow(&table, &direct.refused);
        }
        if let Err(error) = plane.launch(failed) {
            tracing::warn!(%error, "cannot start the threads; trying again");
            report.set_problem(format!("threads cannot be started: {error}"));
            sleep(RETRY).await;
            continue;
        }
        report.clear_problem();
        report.set_plane(&plane);
        setup.want_firewall(lease.subnet).await;
        let mut masquerading = setup.firewall.states();
        let (mtu, ip_masq) = (setup.inner_mtu, setup.firewall.ip_masq());
        let mut announce_due = announce(options, setup.config, lease.subnet, mtu, ip_masq, report);
        let mut look_due = None;
        let mut turns = interval(TURN);
        loop {
            report.set_turned();
            tokio::select! {
                _ = turns.tick() => {}
                // The sender lives as long as the daemon: an error here would be the end of the process anyway.
                Ok(()) = published.peers.changed() => {
                    table = published.peers.borrow_and_update().clone();
                    direct.kernel.peers_changed();
                    if !by_locators {
                        plane.follow(&table, &direct.refused);
                        report.set_plane(&plane);
                    }
                }
                () = at(announce_due) => {
                    announce_due = announce(options, setup.config, lease.subnet, mtu, setup.firewall.ip_masq(), report);
                }
                Ok(()) = masquerading.changed() => {
                    announce_due.get_or_insert_with(Instant::now);
                }
                () = at(retry_port) => {
                    if let Some(port) = setup.backend.wanted_port().filter(|&port| !socket::port_is_taken(port)) {
                        return Err(ChooseAgain::PortFree(port).into());
                    }
                    retry_port = Some(Instant::now() + RETRY_PORT);
                }
                () = sleep_until(plane.paths_due()) => {
                    if plane.look_at_paths(Instant::now()) {
                        report.set_plane(&plane);
                    }
                }
                () = at(direct.kernel.due()) => {
                    report.set_kernel_routes(direct.follow(setup, lease.subnet, &table).await);
                    if by_locators {
                        plane.follow(&table, &direct.refused);
                        report.set_plane(&plane);
                    }
                }
                Ok(()) = published.lease.changed() => {
                    let new = published.lease.borrow_and_update().clone();
                    if new.subnet != lease.subnet {
                        tracing::warn!(old = %lease.subnet, new = %new.subnet, "moving to another subnet");
                        if by_locators {
                            return Err(ChooseAgain::Moved(new.subnet).into());
                        }
                        lease = new;
                        break;
                    }
                    lease = new;
                }
                () = at(underlay.due()) => {
                    if let Some(Moved { what }) = underlay.look(&setup.netlink).await {
                        return Err(ChooseAgain::Underlay { what, lease: Box::new(lease) }.into());
                    }
                }
                Some(change) = changes.next() => {
                    underlay.note(&change);
                    direct.kernel.note(&change, &setup.interface.name);
                    if let LinkChange::Link(link) = &change
                        && link.name == setup.interface.name
                        && plane.bound_to.is_some_and(|index| index != link.index)
                    {
                        tracing::warn!(interface = link.name, "the underlay interface is another now; making the sockets anew");
                        break;
                    }
                    if concerns(&change, &plane.devices()) {
                        look_due.get_or_insert_with(|| Instant::now() + GATHER);
                    }
                }
                () = at(look_due) => {
                    look_due = None;
                    match network::repair_device(setup, lease.subnet, plane.outer_index).await {
                        // Routes to peers go without a word when a device is set down and up.
                        Ok(Repair::NotNeeded) => direct.kernel.peers_changed(),
                        Ok(Repair::Done) => {
                            direct.kernel.peers_changed();
                            if repairs.allows() {
                                tracing::warn!(device = options.packet_path.device, "somebody changed the device; put right again");
                            }
                        }
                        Err(error) => {
                            if repairs.allows() {
                                tracing::warn!(error = format!("{error:#}"), "cannot put the device right again; trying on");
                            }
                            look_due = Some(Instant::now() + RETRY);
                        }
                    }
                }
                Some(error) = failures.recv() => {
                    tracing::warn!(%error, device = options.packet_path.device, "the device or socket is gone; making it anew");
                    break;
                }
            }
        }
        report.not_ready();
    }
}

/// Writes the subnet file and reports that; says when to try again if it cannot be written.
pub(super) fn announce(
    options: &RunOptions,
    config: &NetworkConfig,
    own: Subnet,
    inner_mtu: Mtu,
    ip_masq: subnet_file::IpMasq,
    report: &Report,
) -> Option<Instant> {
    let file = &options.subnet_file;
    if let Err(error) = subnet_file::write(file, config, own, inner_mtu, ip_masq) {
        if report.unwritten.allows() {
            tracing::warn!(%error, file = %file.display(), "cannot write the subnet file; trying on");
        }
        if !report.is_up() {
            report.set_problem(format!(
                "the subnet file {} cannot be written: {error}",
                file.display()
            ));
        }
        return Some(Instant::now() + RETRY);
    }
    report.set_up();
    None
}

/// Whether a change may have touched one of our devices.
fn concerns(change: &LinkChange, devices: &[u32]) -> bool {
    match change {
        LinkChange::Link(link) => devices.contains(&link.index),
        LinkChange::Address(held) | LinkChange::AddressGone(held) => devices.contains(&held.index),
        LinkChange::RouteGone(route) => devices.contains(&route.index),
        LinkChange::DefaultRoute(_) | LinkChange::Rule => false,
        // Its threads notice.
        LinkChange::LinkGone(_) => false,
        LinkChange::Overrun => true,
    }
}

/// The time has come; never, if there is none.
pub(super) async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
