//! The data plane of one lease: device, sockets, threads, kernel routes, and the route table that follows the peers.

mod device;
mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::iter::once;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::addr::{Mtu, Prefix};
use crate::backend::{Backend, Carrier, Underlay};
use crate::control::config::NetworkConfig;
use crate::control::peers::PeerTable;
use crate::daemon::firewall::Keeper;
use crate::daemon::paths::Paths;
use crate::daemon::{succession, ways};
use crate::dataplane::Encap;
use crate::dataplane::forward::{IngressCheck, Sources};
use crate::dataplane::route::{Hop, Network, Overlay, Peer, RouteTable, SharedRoutes};
use crate::dataplane::stats::{Count, PeerStats, WorkerStats};
use crate::dataplane::worker::InboundOptions;
use crate::host::endpoint::Endpoint;
use crate::host::firewall::Guard;
use crate::host::handover::Bundle;
use crate::host::interface::UnderlayInterface;
use crate::host::netlink::Netlink;
use crate::host::outer_tun::{self, PathMtus};
use crate::host::pulse::Pulse;
use crate::host::queues::{Layout, Queues};
use crate::host::socket::{self, SocketOffloads};
use crate::host::tun::{Tun, TunOffloads, TunOptions};
use crate::host::underlay::AnyUnderlay;
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::options::{self, InnerChecksums, PacketPathOptions, ThreadLayout};

pub(super) use self::device::{Repair, own_locators, repair_device};
use self::device::{claim_locators, configure_device, route_locators, tidy_device};
use self::sockets::{
    Opened, choose_io, choose_send, make_tun, open_outer, open_underlays, start_endpoint, switch,
};

/// What stays the same for as long as the daemon runs.
pub(super) struct Setup<'a, B> {
    pub(super) options: &'a PacketPathOptions,
    pub(super) backend: B,
    pub(super) config: &'a NetworkConfig,
    pub(super) interface: &'a UnderlayInterface,
    pub(super) inner_mtu: Mtu,
    pub(super) netlink: Netlink,
    pub(super) firewall: Keeper,
    /// Where is remembered what the host's switches were.
    pub(super) data_dir: &'a Path,
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
    /// How they leave, if they come by raw sockets.
    pub(super) srv6_send: Option<SegmentSend>,
    /// Keeps true where those leave that packet sockets send.
    ways: Option<ways::Keeper>,
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

/// How SRv6 packets leave that come by raw sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SegmentSend {
    /// By raw sockets.
    Raw,
    /// By packet sockets, and by raw sockets what those do not take.
    Packet,
    /// By raw sockets, for packet sockets are refused.
    RawInstead,
}

impl SegmentSend {
    /// As `kersey status` has it.
    pub(super) fn describe(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Packet => "packet",
            Self::RawInstead => "raw (packet sockets refused)",
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
            mut underlays,
            socket_offloads,
            mut others,
        } = match srv6_io {
            Some(io) if io.is_tun() => open_outer(setup, &routes, heard.clone())?,
            Some(_) | None => open_underlays(setup, queue_count, &mut bundle)?,
        };
        let (srv6_send, ways) = choose_send(setup, srv6_io, &mut underlays);
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
        let endpoint = match srv6_io {
            Some(SegmentIo::Raw) => start_endpoint(setup, &routes, &mut bundle, &mut held)?,
            Some(_) | None => None,
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
            srv6_send,
            ways,
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
            srv6_send = srv6_send.map(SegmentSend::describe),
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
            self.want_ways();
        }
    }

    /// Has ways kept to the peers there are, if any are.
    fn want_ways(&self) {
        let Some(ways) = &self.ways else { return };
        let endpoints = self.peers.values().flat_map(|peer| &peer.endpoints);
        let destinations = endpoints.filter_map(|endpoint| match endpoint.ip() {
            IpAddr::V6(to) => Some((to, self.paths.outer_mtu(to.into()))),
            IpAddr::V4(_) => None,
        });
        ways.want(destinations.collect());
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
        self.want_ways();
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
        // The outer device is not handed on.
        if !self.srv6_io.is_some_and(SegmentIo::is_tun) {
            let threads = (self.queues.take(), self.endpoint.take());
            succession::held().retire(&self.device, threads);
        }
    }
}

/// Half the cores from four on, at most eight; more queues on few cores cost throughput.
fn default_queues(cores: usize) -> usize {
    if cores < 4 { 1 } else { (cores / 2).min(8) }
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

/// The overlay's networks, one a family.
pub(super) fn networks(config: &NetworkConfig) -> impl Iterator<Item = Prefix> + Clone {
    let v4 = config.v4.map(|range| Prefix::V4(range.network));
    let v6 = config.v6.map(|range| Prefix::V6(range.network));
    v4.into_iter().chain(v6)
}
