//! The data plane of one lease: device, sockets, threads, kernel routes, and the route table that follows the peers.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::once;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use netlink_packet_route::link::LinkFlags;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::addr::{Ipv6Prefix, Mtu, Prefix};
use crate::backend::{Backend, Carrier, Underlay};
use crate::control::config::NetworkConfig;
use crate::control::peers::PeerTable;
use crate::daemon::firewall::Keeper;
use crate::daemon::paths::Paths;
use crate::daemon::succession;
use crate::dataplane::endpoint::LocalSids;
use crate::dataplane::forward::{IngressCheck, Sources};
use crate::dataplane::route::{Hop, Network, Overlay, Peer, RouteTable, SharedRoutes};
use crate::dataplane::stats::{Count, PeerStats, WorkerStats};
use crate::dataplane::worker::InboundOptions;
use crate::dataplane::{Encap, Oversize};
use crate::host::endpoint::{Endpoint, Outlet, SidOptions, SidWorker};
use crate::host::firewall::Guard;
use crate::host::handover::{Bundle, Kind};
use crate::host::interface::UnderlayInterface;
use crate::host::netlink::{Netlink, NetlinkError, Route};
use crate::host::outer_tun::{self, OuterTun, PathMtus};
use crate::host::pulse::Pulse;
use crate::host::queues::{Layout, Queues};
use crate::host::raw::{RawError, RawOptions, RawUnderlay};
use crate::host::socket::{self, SocketOffloads, Switch, UdpUnderlay, UnderlayOptions};
use crate::host::sysctl::{self, Forwarding, SysctlError};
use crate::host::tun::{Tun, TunError, TunOffloads, TunOptions};
use crate::host::underlay::AnyUnderlay;
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::options::{self, InnerChecksums, Offload, OuterDf, PacketPathOptions, Srv6Io, ThreadLayout};

/// What stays the same for as long as the daemon runs.
pub(super) struct Setup<'a, B> {
    pub(super) options: &'a PacketPathOptions,
    pub(super) backend: B,
    pub(super) config: &'a NetworkConfig,
    pub(super) interface: &'a UnderlayInterface,
    pub(super) inner_mtu: Mtu,
    pub(super) netlink: Netlink,
    pub(super) firewall: Keeper,
}

impl<B> Setup<'_, B> {
    pub(super) fn underlay(&self) -> Underlay {
        Underlay {
            v4: self.interface.v4,
            v6: self.interface.v6,
        }
    }
}

impl<B: Backend> Setup<'_, B> {
    /// Has the firewall rules for a subnet made.
    pub(super) async fn want_firewall(&self, own: Subnet) {
        let guard = match self.backend.carrier() {
            Carrier::Udp { port, .. } => Guard::Port(port),
            Carrier::Raw { .. } => Guard::Blocks(self.backend.blocks()),
        };
        let device = &self.options.device;
        let devices = vec![
            device.clone(),
            outer_tun::name(device),
            self.interface.name.clone(),
        ];
        self.firewall.want(self.config, own, Some(guard), devices).await;
    }
}

/// A running data plane; dropping it takes device, routes and sockets away.
pub(super) struct DataPlane<B: Backend> {
    backend: B,
    underlay: Underlay,
    inner_mtu: Mtu,
    link_mtu: Mtu,
    paths: Paths,
    routes: SharedRoutes<<B::Encap as Encap>::Hop>,
    pub(super) peers: BTreeMap<Subnet, InstalledPeer>,
    /// The threads, once they run.
    queues: Option<Queues>,
    /// What they will be made of, until then.
    waiting: Option<Waiting>,
    /// The device's name.
    device: String,
    /// Whether the device is that of an earlier life.
    is_adopted: bool,
    endpoint: Option<Endpoint>,
    /// What deals with packets that are not the queues' counts here, if there is any.
    others: Option<Arc<WorkerStats>>,
    /// What SIDs have heard of paths.
    heard: PathMtus,
    pub(super) queue_count: usize,
    pub(super) tun_offloads: TunOffloads,
    /// Those of UDP sockets, if there are any.
    pub(super) socket_offloads: Option<SocketOffloads>,
    /// How SRv6 packets come and go, if they do.
    pub(super) srv6_io: Option<SegmentIo>,
    /// The device's number.
    pub(super) index: u32,
    /// The number of the underlay interface, if what the kernel was told names it by that.
    pub(super) bound_to: Option<u32>,
    /// The outer device's number, if there is one.
    pub(super) outer_index: Option<u32>,
}

/// What the threads are made of.
struct Waiting {
    tun: Tun,
    underlays: Vec<AnyUnderlay>,
    layout: Layout,
    inbound: InboundOptions,
    sources: Sources,
    busy_poll: Duration,
    /// Second descriptors of the device and of the sockets on the well-known port.
    held: Bundle,
}

/// How SRv6 packets come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentIo {
    /// By raw sockets.
    Raw,
    /// By a TUN device, for somebody wants it so.
    TunForced,
    /// By a TUN device, for raw sockets are refused.
    TunInstead,
}

impl SegmentIo {
    /// As `kersey status` has it.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::TunForced => "tun (forced)",
            Self::TunInstead => "tun (raw sockets refused)",
        }
    }

    fn is_tun(self) -> bool {
        match self {
            Self::Raw => false,
            Self::TunForced | Self::TunInstead => true,
        }
    }
}

/// A peer whose routes are in the table.
#[derive(Clone)]
pub(super) struct InstalledPeer {
    attrs: LeaseAttrs,
    pub(super) endpoints: Vec<SocketAddr>,
    /// The endpoints' addresses, and where packets go after them: the narrowest way counts.
    stops: BTreeSet<IpAddr>,
    /// The largest packet it can be sent, the smallest of its prefixes'.
    inner_mtu: Mtu,
    pub(super) stats: PeerStats,
    /// What it could be sent over the link alone.
    whole_mtu: Mtu,
}

impl InstalledPeer {
    /// The largest packet it can be sent, bytes, if the path carries less than the link.
    pub(super) fn narrow_mtu(&self) -> Option<u16> {
        (self.inner_mtu < self.whole_mtu).then_some(self.inner_mtu.bytes())
    }
}

impl<B: Backend> DataPlane<B> {
    /// Makes the device and opens the sockets, or takes those of an earlier life; puts address and routes in. No packet moves yet.
    pub(super) async fn start(setup: &Setup<'_, B>, lease: &Lease) -> Result<Self> {
        let options = setup.options;
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let (srv6_io, raw_refused) = choose_io(setup)?;
        let mut queue_count = options
            .queues
            .map_or_else(|| default_queues(cores), NonZeroUsize::get);
        if srv6_io.is_some_and(SegmentIo::is_tun) && queue_count > 1 {
            tracing::info!(
                asked = queue_count,
                "one queue serves: the outer device has no more"
            );
            queue_count = 1;
        }
        let layout = match options.threads {
            ThreadLayout::Auto => Layout::for_cores(cores),
            ThreadLayout::Joined => Layout::Joined,
            ThreadLayout::Split => Layout::Split,
        };
        // Until this plane is launched it stays held: what fails from here on is tried again with the same.
        let mut bundle = succession::held()
            .lend(&options.device)
            .context("cannot take the device and sockets of an earlier life")?;
        let (tun, is_adopted) = make_tun(
            &TunOptions {
                name: options.device.clone(),
                queues: queue_count,
                tso: switch(options.tun_tso),
                uso: switch(options.tun_uso),
            },
            &mut bundle,
        )?;
        let tun_offloads = tun.offloads();
        let routes = SharedRoutes::new(RouteTable::new(overlay(setup.config, lease.subnet)));
        let heard = PathMtus::default();
        let Opened {
            underlays,
            socket_offloads,
            mut others,
        } = match srv6_io {
            Some(io) if io.is_tun() => open_outer(setup, &routes, heard.clone())?,
            Some(_) | None => open_underlays(setup, queue_count, bundle)?,
        };
        let mut held = Bundle::default();
        tun.hold(&mut held)?;
        for (queue, underlay) in underlays.iter().enumerate() {
            underlay.hold(queue, &mut held)?;
        }
        let outer_index = match srv6_io {
            Some(io) if io.is_tun() => Some(route_locators(setup).await?),
            Some(_) | None => {
                claim_locators(setup).await?;
                None
            }
        };
        let inbound = InboundOptions {
            check: match options.ingress_check {
                options::IngressCheck::Strict => IngressCheck::Strict,
                options::IngressCheck::Loose => IngressCheck::Loose,
                options::IngressCheck::Off => IngressCheck::Off,
            },
            verify_inner: options.inner_checksums == InnerChecksums::Verify,
            inner_mtu: setup.inner_mtu,
            clamp_mss: options.clamp_mss,
        };
        let interface = setup.interface;
        let sources = Sources {
            check: inbound.check,
            node: [
                interface.v4.map(IpAddr::V4),
                interface.v6.map(IpAddr::V6),
                interface.public_v4.map(IpAddr::V4),
                interface.public_v6.map(IpAddr::V6),
            ],
        };
        let waiting = Waiting {
            tun,
            underlays,
            layout,
            inbound,
            sources,
            busy_poll: options.busy_poll,
            held,
        };
        let endpoint = match srv6_io {
            Some(SegmentIo::Raw) => start_endpoint(setup, &routes)?,
            Some(_) | None => None,
        };
        others = others.or_else(|| endpoint.as_ref().map(Endpoint::stats).map(Arc::clone));
        let mut plane = Self {
            backend: setup.backend.clone(),
            underlay: setup.underlay(),
            inner_mtu: setup.inner_mtu,
            link_mtu: setup.backend.link_mtu(setup.interface.mtu),
            paths: Paths::new(setup.interface.mtu, Instant::now()),
            routes,
            peers: BTreeMap::new(),
            queues: None,
            waiting: Some(waiting),
            device: options.device.clone(),
            is_adopted,
            endpoint,
            others,
            heard,
            queue_count,
            tun_offloads,
            socket_offloads,
            srv6_io,
            index: 0,
            bound_to: None,
            outer_index,
        };
        if matches!(setup.backend.carrier(), Carrier::Raw { .. }) {
            plane.bound_to = Some(setup.netlink.link(&setup.interface.name).await?.index);
        }
        plane.index = configure_device(setup, lease.subnet).await?;
        tidy_device(setup, plane.index, lease.subnet).await?;
        if let Some(error) = raw_refused {
            tracing::warn!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "raw sockets are refused, so locators are routed to a TUN device and the kernel forwards; raw sockets, which take CAP_NET_RAW, get merged packets whole"
            );
        }
        tracing::info!(
            device = options.device,
            queues = queue_count,
            tun_tso = tun_offloads.tso.describe(),
            tun_uso = tun_offloads.uso.describe(),
            udp_gso = socket_offloads.map(|offloads| offloads.gso.describe()),
            udp_gro = socket_offloads.map(|offloads| offloads.gro.describe()),
            srv6_io = srv6_io.map(SegmentIo::describe),
            ingress_check = inbound.check.name(),
            backend = setup.backend.name(),
            port = setup.backend.carrier().port(),
            "data plane up"
        );
        Ok(plane)
    }

    /// How long to wait for the first complete list of peers before packets move, if it is not there yet.
    pub(super) fn patience(&self, knows_none: bool) -> Duration {
        if !self.is_adopted {
            Duration::ZERO
        } else if succession::held().has_predecessor() {
            // It moves them meanwhile.
            Duration::from_secs(3)
        } else if knows_none {
            // The device's queue holds half a second's packets of a thousand a second.
            Duration::from_millis(500)
        } else {
            Duration::ZERO
        }
    }

    /// Starts the threads: packets move from here on. To be called when the routes are in, for there may be packets waiting.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub(super) fn launch(&mut self, failed: mpsc::Sender<std::io::Error>) -> std::io::Result<()> {
        let Some(waiting) = self.waiting.take() else {
            return Ok(());
        };
        let queues = Queues::start(
            self.backend.encap(),
            waiting.tun,
            waiting.underlays,
            &self.routes,
            (
                waiting.layout,
                waiting.busy_poll,
                waiting.inbound,
                waiting.sources,
            ),
            failed,
        )?;
        self.queues = Some(queues);
        succession::held().hold(&self.device, waiting.held);
        succession::held().relieve(&self.device);
        Ok(())
    }

    /// Makes the route table that of `table`; what did not change keeps its counters.
    ///
    /// Peers in `refused` are as if they were not there.
    pub(super) fn follow(&mut self, table: &PeerTable, refused: &BTreeSet<Subnet>) {
        let mut routes = (*self.routes.current()).clone();
        let gone: Vec<Subnet> = self
            .peers
            .keys()
            .filter(|subnet| table.get(**subnet).is_none() || refused.contains(*subnet))
            .copied()
            .collect();
        for subnet in &gone {
            for prefix in prefixes(*subnet) {
                routes.remove(prefix);
            }
            self.peers.remove(subnet);
        }
        let mut changed = 0;
        for (subnet, attrs) in table.iter().filter(|(subnet, _)| !refused.contains(subnet)) {
            let known = self.peers.get(&subnet);
            if known.is_some_and(|known| known.attrs == *attrs) {
                continue;
            }
            changed += 1;
            let stats = known.map_or_else(|| PeerStats::new(self.queue_count), |known| known.stats.clone());
            self.install(&mut routes, subnet, attrs.clone(), stats);
        }
        if changed > 0 || !gone.is_empty() {
            tracing::info!(
                peers = self.peers.len(),
                changed,
                removed = gone.len(),
                "routes published"
            );
            self.routes.publish(routes);
        }
    }

    /// Puts the routes of a peer in, in place of those it had.
    fn install(
        &mut self,
        routes: &mut RouteTable<<B::Encap as Encap>::Hop>,
        subnet: Subnet,
        attrs: LeaseAttrs,
        stats: PeerStats,
    ) {
        let mut peer = InstalledPeer {
            attrs,
            endpoints: Vec::new(),
            stops: BTreeSet::new(),
            inner_mtu: self.inner_mtu,
            whole_mtu: self.inner_mtu,
            stats,
        };
        for prefix in prefixes(subnet) {
            let hop = match self.backend.hop(prefix, &peer.attrs, self.underlay) {
                Ok(hop) => hop,
                Err(reason) => {
                    routes.remove(prefix);
                    let public_ip = peer.attrs.public_ip;
                    tracing::warn!(%subnet, %prefix, %public_ip, %reason, "the peer cannot be reached");
                    continue;
                }
            };
            let endpoint = hop.endpoint();
            if !peer.endpoints.contains(&endpoint) {
                peer.endpoints.push(endpoint);
            }
            // Peers may be reached by another encapsulation than the one we receive.
            let overhead = self.backend.overhead(&hop);
            let whole = self
                .link_mtu
                .minus(overhead)
                .map_or(self.inner_mtu, |left| left.min(self.inner_mtu));
            peer.whole_mtu = peer.whole_mtu.min(whole);
            let mut inner_mtu = whole;
            for stop in once(endpoint.ip()).chain(self.backend.stops(&hop)) {
                inner_mtu = inner_mtu.min(self.paths.inner_mtu(prefix, stop, overhead, whole));
                peer.stops.insert(stop);
            }
            peer.inner_mtu = peer.inner_mtu.min(inner_mtu);
            let stats = peer.stats.clone();
            routes.insert(
                prefix,
                Peer {
                    hop,
                    inner_mtu,
                    stats,
                },
            );
        }
        self.peers.insert(subnet, peer);
    }

    /// The counters of all threads.
    pub(super) fn stats(&self) -> Vec<Arc<WorkerStats>> {
        self.queue_stats()
            .iter()
            .chain(&self.others)
            .map(Arc::clone)
            .collect()
    }

    fn queue_stats(&self) -> &[Arc<WorkerStats>] {
        self.queues.as_ref().map_or(&[], Queues::stats)
    }

    /// The same, each with the direction its packets take.
    pub(super) fn directed_stats(&self) -> Vec<(&'static str, Arc<WorkerStats>)> {
        let queues = ["outbound", "inbound"]
            .into_iter()
            .cycle()
            .zip(self.queue_stats());
        let others = self.others.iter().map(|others| ("inbound", others));
        queues
            .chain(others)
            .map(|(direction, stats)| (direction, Arc::clone(stats)))
            .collect()
    }

    /// Signs of life of all threads.
    pub(super) fn pulses(&self) -> Vec<Arc<Pulse>> {
        let endpoint = self.endpoint.as_ref().map(Endpoint::pulse);
        let queues = self.queues.as_ref().map_or(&[][..], Queues::pulses);
        queues.iter().chain(endpoint).map(Arc::clone).collect()
    }

    /// The numbers of its devices.
    pub(super) fn devices(&self) -> Vec<u32> {
        once(self.index).chain(self.outer_index).collect()
    }

    /// Number of threads.
    pub(super) fn threads(&self) -> usize {
        self.queues.as_ref().map_or(0, Queues::threads) + usize::from(self.endpoint.is_some())
    }

    /// When to look at the paths again.
    pub(super) fn paths_due(&self) -> Instant {
        self.paths.due()
    }

    /// Looks whether paths carry less than they did, or more; whether any does.
    pub(super) fn look_at_paths(&mut self, now: Instant) -> bool {
        let too_big = self
            .stats()
            .iter()
            .map(|stats| stats.counted(Count::PathTooBig))
            .sum();
        if !self.paths.wants_survey(too_big, now) {
            return false;
        }
        let stops = self
            .peers
            .values()
            .flat_map(|peer| &peer.stops)
            .copied()
            .collect();
        let measure = |to| {
            let heard = self.heard.get(to, now.into_std());
            socket::path_mtu(to).map(|mtu| heard.map_or(mtu, |heard| heard.min(mtu)))
        };
        let changed = self.paths.survey(stops, measure, now);
        if changed.is_empty() {
            return false;
        }
        let concerned: Vec<Subnet> = self
            .peers
            .iter()
            .filter(|(_, peer)| !peer.stops.is_disjoint(&changed))
            .map(|(subnet, _)| *subnet)
            .collect();
        let mut routes = (*self.routes.current()).clone();
        for subnet in concerned {
            let Some(InstalledPeer { attrs, stats, .. }) = self.peers.get(&subnet).cloned() else {
                continue;
            };
            self.install(&mut routes, subnet, attrs, stats);
            let inner_mtu = self.peers.get(&subnet).map_or(0, |peer| peer.inner_mtu.bytes());
            tracing::info!(%subnet, inner_mtu, "the path to a peer carries another size");
        }
        self.routes.publish(routes);
        true
    }
}

impl<B: Backend> Drop for DataPlane<B> {
    fn drop(&mut self) {
        // Raw sockets are not handed on: each of two owners would get every packet.
        if matches!(self.backend.carrier(), Carrier::Udp { .. }) {
            succession::held().retire(&self.device, self.queues.take());
        }
    }
}

/// Takes over the queues of an earlier life, or makes the device; and which of the two it was.
fn make_tun(options: &TunOptions, bundle: &mut Bundle) -> Result<(Tun, bool), TunError> {
    if bundle.is_empty() {
        return Ok((Tun::create(options)?, false));
    }
    let adopted = match bundle.take(Kind::Tun, options.queues) {
        Some(queues) => Tun::adopt(queues, options),
        None => Err(std::io::Error::other("another number of queues")),
    };
    match adopted {
        Ok(tun) => {
            tracing::info!(
                device = options.name,
                "went on with the device of an earlier life"
            );
            Ok((tun, true))
        }
        Err(error) => {
            // That it is gone is why there is a new life.
            if error.raw_os_error() != Some(libc::EBADFD) {
                tracing::warn!(device = options.name, %error, "the device of an earlier life is of no use; making it anew");
            }
            // Its sockets go with it, and so does who still has the device.
            *bundle = Bundle::default();
            succession::held().release(&options.name);
            succession::held().tell_stop();
            Ok((Tun::create(options)?, false))
        }
    }
}

/// Decides how SRv6 packets come and go, and gives what the kernel said if that is not how it should be; `None` for a backend without them.
fn choose_io<B: Backend>(setup: &Setup<'_, B>) -> Result<(Option<SegmentIo>, Option<RawError>)> {
    let Carrier::Raw { sids, source, .. } = setup.backend.carrier() else {
        return Ok((None, None));
    };
    match setup.options.srv6_io {
        Srv6Io::Raw => Ok((Some(SegmentIo::Raw), None)),
        Srv6Io::Tun => Ok((Some(SegmentIo::TunForced), None)),
        Srv6Io::Auto => match RawUnderlay::open(&raw_options(setup, &sids, source, 1), 0) {
            Ok(_) => Ok((Some(SegmentIo::Raw), None)),
            Err(error) if error.is_refused() => Ok((Some(SegmentIo::TunInstead), Some(error))),
            Err(error) => Err(error.into()),
        },
    }
}

/// What carries the packets of all queues.
struct Opened {
    underlays: Vec<AnyUnderlay>,
    /// Those of UDP sockets, if there are any.
    socket_offloads: Option<SocketOffloads>,
    /// Counters of what deals with packets that are not the queues', if that is done already.
    others: Option<Arc<WorkerStats>>,
}

/// Makes the outer TUN device, with what deals with packets that are not the queue's.
fn open_outer<B: Backend>(
    setup: &Setup<'_, B>,
    routes: &SharedRoutes<<B::Encap as Encap>::Hop>,
    heard: PathMtus,
) -> Result<Opened> {
    let Carrier::Raw { sids, domain, source } = setup.backend.carrier() else {
        anyhow::bail!("there are no SIDs to route");
    };
    let name = outer_tun::name(&setup.options.device);
    let device = OuterTun::create(&name).with_context(|| format!("cannot create TUN device {name:?}"))?;
    let stats = Arc::<WorkerStats>::default();
    let out = Outlet::tun(device.try_clone()?, Arc::clone(&sids), source, Arc::clone(&stats));
    let has_next_hops = sids.iter().any(|(_, sid)| sid.has_next_hop());
    if has_next_hops && !out.reaches_next_hops() {
        tracing::warn!(
            "a SID of this node sends to a next hop of its own, which takes raw sockets (CAP_NET_RAW); its packets are dropped and counted as underlay_denied"
        );
    }
    let options = SidOptions {
        sids: Arc::clone(&sids),
        domain,
        link_mtu: setup.interface.mtu,
    };
    let worker = SidWorker::new(options, routes, out);
    Ok(Opened {
        underlays: vec![AnyUnderlay::Tun(OuterTun::new(device, sids, worker, heard))],
        socket_offloads: None,
        others: Some(stats),
    })
}

/// Opens the sockets of all queues.
fn open_underlays<B: Backend>(setup: &Setup<'_, B>, queues: usize, mut bundle: Bundle) -> Result<Opened> {
    let options = setup.options;
    match setup.backend.carrier() {
        Carrier::Udp { port, source_ports } => {
            let wanted = UnderlayOptions {
                v4: setup.interface.v4,
                v6: setup.interface.v6,
                port,
                source_ports: options
                    .source_ports
                    .map_or(source_ports, |ports| usize::from(ports.get())),
                queues,
                gso: switch(options.udp_gso),
                gro: switch(options.udp_gro),
                v4_oversize: match options.outer_df {
                    OuterDf::Auto => setup.backend.oversize().v4,
                    OuterDf::Set => Oversize::Refuse,
                    OuterDf::Clear => Oversize::FragmentAnywhere,
                },
                v6_oversize: setup.backend.oversize().v6,
            };
            let has_sockets = bundle.has_sockets();
            let adopted = adopt_underlays(&wanted, &mut bundle);
            drop(bundle);
            let underlays = match adopted {
                Some(underlays) => underlays,
                None => {
                    // Whoever still has one of them has its port.
                    if has_sockets {
                        succession::held().release_sockets(&options.device);
                        succession::held().tell_stop();
                    }
                    (0..queues)
                        .map(|_| UdpUnderlay::open(&wanted))
                        .collect::<Result<Vec<_>, _>>()?
                }
            };
            let offloads = underlays.first().context("no queue")?.offloads();
            Ok(Opened {
                underlays: underlays.into_iter().map(AnyUnderlay::Udp).collect(),
                socket_offloads: Some(offloads),
                others: None,
            })
        }
        Carrier::Raw { sids, source, .. } => {
            let wanted = raw_options(setup, &sids, source, queues);
            let underlays = (0..queues)
                .map(|queue| RawUnderlay::open(&wanted, queue).map(AnyUnderlay::Raw))
                .collect::<Result<_, _>>()?;
            Ok(Opened {
                underlays,
                socket_offloads: None,
                others: None,
            })
        }
    }
}

/// Takes over the sockets of an earlier life, if they are all there and fit.
fn adopt_underlays(wanted: &UnderlayOptions, bundle: &mut Bundle) -> Option<Vec<UdpUnderlay>> {
    if bundle.is_empty() {
        return None;
    }
    let mut of = |kind, asked: bool| match asked {
        true => bundle.take(kind, wanted.queues),
        false => Some(Vec::new()),
    };
    let (v4, v6) = (
        of(Kind::Udp4, wanted.v4.is_some())?,
        of(Kind::Udp6, wanted.v6.is_some())?,
    );
    let (mut v4, mut v6) = (v4.into_iter(), v6.into_iter());
    let adopted = (0..wanted.queues).map(|_| UdpUnderlay::adopt(wanted, v4.next(), v6.next()));
    match adopted.collect::<Result<Vec<_>, _>>() {
        Ok(underlays) => Some(underlays),
        Err(error) => {
            tracing::warn!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "the sockets of an earlier life are of no use; opening new ones"
            );
            None
        }
    }
}

fn raw_options<B>(setup: &Setup<'_, B>, sids: &LocalSids, source: Ipv6Addr, queues: usize) -> RawOptions {
    RawOptions {
        interface: setup.interface.name.clone(),
        locators: sids.locators().to_vec(),
        ends: sids.ends().collect(),
        source,
        queues,
    }
}

/// Starts what deals with packets to SIDs that do not end in the device, for a backend that has SIDs.
fn start_endpoint<B: Backend>(
    setup: &Setup<'_, B>,
    routes: &SharedRoutes<<B::Encap as Encap>::Hop>,
) -> Result<Option<Endpoint>> {
    let Carrier::Raw { sids, domain, source } = setup.backend.carrier() else {
        return Ok(None);
    };
    let raw = raw_options(setup, &sids, source, 1);
    let options = SidOptions {
        sids,
        domain,
        link_mtu: setup.interface.mtu,
    };
    Ok(Some(Endpoint::start(&raw, options, routes)?))
}

/// The prefixes of the underlay that are this node's own.
pub(super) fn own_locators(carrier: &Carrier) -> impl Iterator<Item = Ipv6Prefix> {
    let locators: &[Ipv6Prefix] = match carrier {
        Carrier::Udp { .. } => &[],
        Carrier::Raw { sids, .. } => sids.locators(),
    };
    locators.iter().copied()
}

/// Makes the node's locators its own, and gives back what an earlier life had. They stay when the daemon ends: without them the kernel
/// would pass peers' packets on, back to where they came from.
async fn claim_locators<B: Backend>(setup: &Setup<'_, B>) -> Result<()> {
    let wanted: Vec<Ipv6Prefix> = own_locators(&setup.backend.carrier()).collect();
    let blocks = setup.backend.blocks();
    if blocks.is_empty() {
        return Ok(());
    }
    // Another Kersey on this host may have its own, in another block.
    let in_blocks = |held: Ipv6Prefix| blocks.iter().any(|block| block.covers(held));
    for held in setup.netlink.own_local_prefixes().await? {
        if in_blocks(held) && !wanted.contains(&held) {
            setup.netlink.delete_local_prefix(held).await?;
        }
    }
    for &locator in &wanted {
        setup.netlink.add_local_prefix(locator).await?;
    }
    for held in setup.netlink.own_backstops().await? {
        if in_blocks(held) {
            setup.netlink.delete_backstop(held).await?;
        }
    }
    if !wanted.is_empty()
        && let Ok(tunnels) = setup.netlink.v6_tunnels().await
        && !tunnels.is_empty()
    {
        tracing::warn!(
            devices = tunnels.join(" "),
            "the kernel has tunnels of its own that look at packets to our SIDs, and may answer peers that their port is unreachable; if it does, take them down or use --srv6-io tun"
        );
    }
    if !wanted.is_empty() && sysctl::disable_seg6(&setup.interface.name)? {
        tracing::warn!(
            interface = setup.interface.name,
            "the kernel's own segment routing was on here and would have taken packets to our SIDs; switched off (seg6_enabled=0)"
        );
    }
    Ok(())
}

/// Routes the node's locators to the outer device, whose number it gives, and has the kernel forward. When the daemon ends, a blackhole stays
/// in the place of those routes, for the same reason.
async fn route_locators<B: Backend>(setup: &Setup<'_, B>) -> Result<u32> {
    let netlink = &setup.netlink;
    let wanted: Vec<Ipv6Prefix> = own_locators(&setup.backend.carrier()).collect();
    // As above: others' stay.
    let blocks = setup.backend.blocks();
    let in_blocks = |held: Ipv6Prefix| blocks.iter().any(|block| block.covers(held));
    for held in netlink.own_backstops().await? {
        if in_blocks(held) && !wanted.contains(&held) {
            netlink.delete_backstop(held).await?;
        }
    }
    for &locator in &wanted {
        netlink.add_backstop(locator).await?;
    }
    // Local routes come first, and the device would get nothing.
    for held in netlink.own_local_prefixes().await? {
        if in_blocks(held) {
            netlink.delete_local_prefix(held).await?;
        }
    }
    let index = configure_outer(setup).await?;
    let name = outer_tun::name(&setup.options.device);
    let underlay = setup.interface.name.as_str();
    let forwarding = sysctl::forward_ipv6([underlay, &name])
        .context("cannot have the kernel forward IPv6, which is needed without raw sockets; where /proc/sys is read-only, set net.ipv6.conf.all.forwarding=1 outside")?;
    match forwarding {
        Forwarding::Global => {}
        Forwarding::PerLink => tracing::info!(
            links = format!("{underlay} {name}"),
            "IPv6 packets that come in by these are forwarded (force_forwarding=1)"
        ),
        Forwarding::MadeGlobal => tracing::warn!(
            "this host now forwards IPv6 between all its interfaces (net.ipv6.conf.all.forwarding=1); those that took router advertisements still do (accept_ra=2)"
        ),
    }
    Ok(index)
}

/// Sets the outer device up, and the locators' routes to it.
async fn configure_outer<B: Backend>(setup: &Setup<'_, B>) -> Result<u32> {
    let name = outer_tun::name(&setup.options.device);
    let netlink = &setup.netlink;
    let index = netlink.link(&name).await?.index;
    sysctl::enable_ipv6(&name)?;
    if let Err(error) = sysctl::no_link_local_address(&name) {
        tracing::warn!(%error, "the kernel may send link-local packets into the outer device; they are dropped and counted");
    }
    if let Err(error) = sysctl::believe_nobody(&name) {
        tracing::warn!(%error, "the kernel may believe router advertisements that come in by the outer device");
    }
    netlink.set_mtu(index, outer_tun::MTU_BYTES).await?;
    netlink.set_tx_queue_len(index, outer_tun::QUEUE_LEN).await?;
    netlink.set_up(index).await?;
    for locator in own_locators(&setup.backend.carrier()) {
        netlink
            .replace_route(&Route::direct(locator.into(), index))
            .await?;
    }
    Ok(index)
}

/// Half the cores from four on, at most eight; more queues on few cores cost throughput.
fn default_queues(cores: usize) -> usize {
    if cores < 4 { 1 } else { (cores / 2).min(8) }
}

fn switch(offload: Offload) -> Switch {
    match offload {
        Offload::Auto => Switch::Auto,
        Offload::Off => Switch::Off,
    }
}

fn overlay(config: &NetworkConfig, own: Subnet) -> Overlay {
    let v4 = config.v4.zip(own.ipv4());
    let v6 = config.v6.zip(own.v6);
    Overlay {
        v4: v4.map(|(range, own)| Network {
            prefix: range.network,
            subnet_len: range.subnet_len(),
            own,
        }),
        v6: v6.map(|(range, own)| Network {
            prefix: range.network,
            subnet_len: range.subnet_len(),
            own,
        }),
    }
}

/// The prefixes of a subnet, one a family.
pub(super) fn prefixes(subnet: Subnet) -> impl Iterator<Item = Prefix> + Clone {
    subnet
        .ipv4()
        .map(Prefix::V4)
        .into_iter()
        .chain(subnet.v6.map(Prefix::V6))
}

/// Turns IPv6 on on the device if the network has it, for a host may have it off by default; whether the device has it.
///
/// # Errors
/// The network has it, and the device cannot.
fn device_v6<B: Backend>(setup: &Setup<'_, B>) -> Result<bool, SysctlError> {
    if setup.config.v6.is_none() {
        return Ok(false);
    }
    sysctl::enable_ipv6(&setup.options.device).map(|()| true)
}

/// Which of these the device can have, where not both families.
fn carried(prefixes: impl Iterator<Item = Prefix> + Clone, v6: bool) -> impl Iterator<Item = Prefix> + Clone {
    prefixes.filter(move |prefix| v6 || matches!(prefix, Prefix::V4(_)))
}

/// Gives the device its address, MTU and routes, as flannel does: the subnet's first address alone, and the whole network behind it. Where
/// it can have no IPv6, IPv4 must do.
async fn configure_device<B: Backend>(setup: &Setup<'_, B>, own: Subnet) -> Result<u32> {
    let name = &setup.options.device;
    let netlink = &setup.netlink;
    // Packets of the kernel's own making (router solicitations, multicast reports) have no place in a tunnel.
    let quiet = if setup.config.v6.is_some() {
        sysctl::no_link_local_address(name)
    } else {
        sysctl::disable_ipv6(name)
    };
    if let Err(error) = quiet {
        tracing::warn!(%error, "the kernel may send link-local packets into the device; they are dropped and counted");
    }
    if let Err(error) = sysctl::believe_nobody(name) {
        tracing::warn!(%error, "the kernel may believe router advertisements that come in by the device; peers could send some");
    }
    let v6 = match device_v6(setup) {
        Ok(v6) => v6,
        Err(error) if own.ipv4().is_some() => {
            tracing::warn!(
                device = name,
                error = format!("{:#}", anyhow::Error::from(error)),
                "IPv6 is off on the device and cannot be turned on, so it carries IPv4 alone; where /proc/sys is read-only, set net.ipv6.conf.default.disable_ipv6=0 outside, before the start"
            );
            false
        }
        Err(error) => {
            return Err(anyhow::Error::from(error).context(
                "IPv6 is off on the device and the network has nothing else; where /proc/sys is read-only, set net.ipv6.conf.default.disable_ipv6=0 outside, before the start",
            ));
        }
    };
    let index = netlink.link(name).await?.index;
    netlink.set_mtu(index, u32::from(setup.inner_mtu.bytes())).await?;
    netlink.set_up(index).await?;
    for prefix in carried(prefixes(own), v6) {
        let host_len = match prefix {
            Prefix::V4(_) => 32,
            Prefix::V6(_) => 128,
        };
        let addr: IpAddr = prefix.addr();
        netlink.add_address(index, addr, host_len).await?;
    }
    for network in carried(networks(setup.config), v6) {
        netlink.replace_route(&Route::direct(network, index)).await?;
    }
    Ok(index)
}

/// Takes away what an earlier life of the device had and this one has not: its addresses and routes are those of another lease.
async fn tidy_device<B: Backend>(setup: &Setup<'_, B>, index: u32, own: Subnet) -> Result<()> {
    let netlink = &setup.netlink;
    let addresses = netlink.addresses().await?;
    for held in addresses.iter().filter(|held| held.index == index) {
        let link_local = matches!(held.addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
        if !link_local && !prefixes(own).any(|prefix| prefix.addr() == held.addr) {
            netlink.delete_address(index, held.addr, held.prefix_len).await?;
        }
    }
    let routes = netlink.own_routes().await?;
    for route in routes.iter().filter(|route| route.index == index) {
        if !networks(setup.config).any(|network| Route::direct(network, index) == *route) {
            netlink.delete_route(route).await?;
        }
    }
    Ok(())
}

/// What a look at the device came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repair {
    /// It was as it should be, or gone; that the threads notice.
    NotNeeded,
    /// It was not, and is now.
    Done,
}

/// Puts the device right again if somebody set it down, or changed its address or MTU; the kernel takes its routes away
/// when it goes down.
pub(super) async fn repair_device<B: Backend>(
    setup: &Setup<'_, B>,
    own: Subnet,
    outer_index: Option<u32>,
) -> Result<Repair> {
    let netlink = &setup.netlink;
    if let Some(index) = outer_index
        && repair_outer(setup, index).await? == Repair::Done
    {
        return Ok(Repair::Done);
    }
    let link = match netlink.link(&setup.options.device).await {
        Ok(link) => link,
        Err(NetlinkError::NoLink(_)) => return Ok(Repair::NotNeeded),
        Err(error) => return Err(error.into()),
    };
    let held = netlink.addresses().await?;
    let routes = netlink.own_routes().await?;
    // Without it on the device there is nothing to put right.
    let v6 = device_v6(setup).unwrap_or(false);
    let has_addresses = carried(prefixes(own), v6).all(|prefix| {
        held.iter()
            .any(|held| held.index == link.index && held.addr == prefix.addr())
    });
    let has_routes = carried(networks(setup.config), v6)
        .all(|network| routes.contains(&Route::direct(network, link.index)));
    let as_it_should_be = link.flags.contains(LinkFlags::Up)
        && link.mtu_bytes == u32::from(setup.inner_mtu.bytes())
        && has_addresses
        && has_routes;
    if as_it_should_be {
        return Ok(Repair::NotNeeded);
    }
    configure_device(setup, own).await?;
    Ok(Repair::Done)
}

/// The same for the outer device.
async fn repair_outer<B: Backend>(setup: &Setup<'_, B>, index: u32) -> Result<Repair> {
    let netlink = &setup.netlink;
    let link = match netlink.link(&outer_tun::name(&setup.options.device)).await {
        Ok(link) if link.index == index => link,
        // Gone; the thread that reads it notices.
        Ok(_) | Err(NetlinkError::NoLink(_)) => return Ok(Repair::NotNeeded),
        Err(error) => return Err(error.into()),
    };
    let routes = netlink.own_routes().await?;
    let has_routes = own_locators(&setup.backend.carrier())
        .all(|locator| routes.contains(&Route::direct(locator.into(), index)));
    let as_it_should_be =
        link.flags.contains(LinkFlags::Up) && link.mtu_bytes == outer_tun::MTU_BYTES && has_routes;
    if as_it_should_be {
        return Ok(Repair::NotNeeded);
    }
    configure_outer(setup).await?;
    Ok(Repair::Done)
}

/// The overlay's networks, one a family.
pub(super) fn networks(config: &NetworkConfig) -> impl Iterator<Item = Prefix> + Clone {
    let v4 = config.v4.map(|range| Prefix::V4(range.network));
    let v6 = config.v6.map(|range| Prefix::V6(range.network));
    v4.into_iter().chain(v6)
}
