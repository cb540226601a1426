//! The data plane of one lease: device, sockets, threads, kernel routes, and the route table that follows the peers.

mod device;
mod sockets;

use std::collections::BTreeSet;
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
use crate::control::peers::Peers;
use crate::daemon::firewall::Keeper;
use crate::daemon::paths::Paths;
use crate::daemon::{succession, ways};
use crate::dataplane::Encap;
use crate::dataplane::forward::{IngressCheck, Sources};
use crate::dataplane::route::{Hop, Network, Overlay, Peer, RouteTable, SharedRoutes};
use crate::dataplane::stats::{Count, PeerCounts, WorkerStats};
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
use crate::lease::{BySubnet, Lease, LeaseAttrs, Subnet};
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

impl<B> Setup<'_, B> {
    /// Whether the underlay's own address lies in a network of the overlay.
    ///
    /// Then a part of it is the underlay's, and only what peers have leased is routed to the device: routers, stores and machines in the rest
    /// are reached as before.
    pub(super) fn is_shared(&self, network: Prefix) -> bool {
        let UnderlayInterface {
            v4,
            v6,
            public_v4,
            public_v6,
            ..
        } = self.interface;
        let v4 = [*v4, *public_v4].into_iter().flatten().map(IpAddr::V4);
        let v6 = [*v6, *public_v6].into_iter().flatten().map(IpAddr::V6);
        v4.chain(v6).any(|addr| network.contains(addr))
    }

    /// The networks that are not the overlay's alone.
    pub(super) fn shared_networks(&self) -> impl Iterator<Item = Prefix> + Clone {
        networks(self.config).filter(|&network| self.is_shared(network))
    }

    /// The networks that are the overlay's alone: the device has a route to each, whoever leases what of it.
    pub(super) fn whole_networks(&self) -> impl Iterator<Item = Prefix> + Clone {
        networks(self.config).filter(|&network| !self.is_shared(network))
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
    pub(super) peers: BySubnet<Arc<InstalledPeer>>,
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
#[derive(Debug)]
pub(super) struct InstalledPeer {
    attrs: Arc<LeaseAttrs>,
    pub(super) endpoints: Box<[SocketAddr]>,
    /// Where packets go after the endpoints.
    stops: Box<[IpAddr]>,
    /// The largest packet it can be sent, the smallest of its prefixes'.
    inner_mtu: Mtu,
    pub(super) counts: PeerCounts,
    /// What it could be sent over the link alone.
    whole_mtu: Mtu,
}

impl InstalledPeer {
    /// The largest packet it can be sent, bytes, if the path carries less than the link.
    pub(super) fn narrow_mtu(&self) -> Option<u16> {
        (self.inner_mtu < self.whole_mtu).then_some(self.inner_mtu.bytes())
    }

    /// The endpoints' addresses, and where packets go after them: the narrowest way counts.
    fn stops(&self) -> impl Iterator<Item = IpAddr> {
        let endpoints = self.endpoints.iter().map(SocketAddr::ip);
        endpoints.chain(self.stops.iter().copied())
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
            peers: BySubnet::default(),
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
    pub(super) fn follow(&mut self, table: &Peers, refused: &BTreeSet<Subnet>) {
        let mut routes = (*self.routes.current()).clone();
        let mut removed = 0;
        // Before any is put in: a subnet that goes may have a prefix of one that comes.
        for (subnet, _) in self.peers.iter() {
            if table.get(subnet).is_none() || refused.contains(&subnet) {
                removed += 1;
                for prefix in subnet.prefixes() {
                    routes.remove(prefix);
                }
            }
        }
        let mut changed = 0;
        let mut peers = Vec::with_capacity(table.len());
        for (subnet, attrs) in table.iter().filter(|(subnet, _)| !refused.contains(subnet)) {
            let peer = match self.peers.get(subnet) {
                Some(known) if known.attrs == *attrs => Arc::clone(known),
                known => {
                    changed += 1;
                    let counts =
                        known.map_or_else(|| PeerCounts::new(self.queue_count), |known| known.counts.clone());
                    self.install(&mut routes, subnet, Arc::clone(attrs), counts)
                }
            };
            peers.push((subnet, peer));
        }
        if changed > 0 || removed > 0 {
            self.peers = BySubnet::new(peers);
            tracing::info!(peers = self.peers.len(), changed, removed, "routes published");
            self.routes.publish(routes);
            self.want_ways();
        }
    }

    /// Has ways kept to the peers there are, if any are.
    fn want_ways(&self) {
        let Some(ways) = &self.ways else { return };
        let endpoints = self.peers.iter().flat_map(|(_, peer)| peer.endpoints.iter());
        let destinations = endpoints.filter_map(|endpoint| match endpoint.ip() {
            IpAddr::V6(to) => Some((to, self.paths.outer_mtu(to.into()))),
            IpAddr::V4(_) => None,
        });
        ways.want(destinations.collect());
    }

    /// Puts the routes of a peer in, in place of those it had.
    fn install(
        &self,
        routes: &mut RouteTable<<B::Encap as Encap>::Hop>,
        subnet: Subnet,
        attrs: Arc<LeaseAttrs>,
        counts: PeerCounts,
    ) -> Arc<InstalledPeer> {
        let (mut endpoints, mut stops) = (Vec::with_capacity(1), Vec::new());
        let (mut narrowest, mut whole_mtu) = (self.inner_mtu, self.inner_mtu);
        for prefix in subnet.prefixes() {
            let hop = match self.backend.hop(prefix, &attrs, self.underlay) {
                Ok(hop) => hop,
                Err(reason) => {
                    routes.remove(prefix);
                    let public_ip = attrs.public_ip;
                    if attrs.backend_type.is_empty() {
                        tracing::info!(
                            %subnet, %prefix, %public_ip, %reason,
                            "the lease names no backend: it is reserved for a node that has not taken it, or an old program wrote it"
                        );
                    } else {
                        tracing::warn!(%subnet, %prefix, %public_ip, %reason, "the peer cannot be reached");
                    }
                    continue;
                }
            };
            let endpoint = hop.endpoint();
            if !endpoints.contains(&endpoint) {
                endpoints.push(endpoint);
            }
            // Peers may be reached by another encapsulation than the one we receive.
            let overhead = self.backend.overhead(&hop);
            let whole = self
                .link_mtu
                .minus(overhead)
                .map_or(self.inner_mtu, |left| left.min(self.inner_mtu));
            whole_mtu = whole_mtu.min(whole);
            let mut inner_mtu = whole;
            let beyond = self.backend.stops(&hop);
            for stop in once(endpoint.ip()).chain(beyond.iter().copied()) {
                inner_mtu = inner_mtu.min(self.paths.inner_mtu(prefix, stop, overhead, whole));
            }
            stops.extend(beyond);
            narrowest = narrowest.min(inner_mtu);
            let stats = counts.stats();
            routes.insert(
                prefix,
                Peer {
                    hop,
                    inner_mtu,
                    stats,
                },
            );
        }
        Arc::new(InstalledPeer {
            attrs,
            endpoints: endpoints.into(),
            stops: stops.into(),
            inner_mtu: narrowest,
            whole_mtu,
            counts,
        })
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
        let stops = self.peers.iter().flat_map(|(_, peer)| peer.stops()).collect();
        let measure = |to| {
            let heard = self.heard.get(to, now.into_std());
            socket::path_mtu(to).map(|mtu| heard.map_or(mtu, |heard| heard.min(mtu)))
        };
        let changed = self.paths.survey(stops, measure, now);
        if changed.is_empty() {
            return false;
        }
        self.want_ways();
        let mut routes = (*self.routes.current()).clone();
        let peers = self.peers.iter().map(|(subnet, peer)| {
            if !peer.stops().any(|stop| changed.contains(&stop)) {
                return (subnet, Arc::clone(peer));
            }
            let (attrs, counts) = (Arc::clone(&peer.attrs), peer.counts.clone());
            let peer = self.install(&mut routes, subnet, attrs, counts);
            let inner_mtu = peer.inner_mtu.bytes();
            tracing::info!(%subnet, inner_mtu, "the path to a peer carries another size");
            (subnet, peer)
        });
        self.peers = peers.collect();
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

/// The overlay's networks, one a family.
pub(super) fn networks(config: &NetworkConfig) -> impl Iterator<Item = Prefix> + Clone {
    let v4 = config.v4.map(|range| Prefix::V4(range.network));
    let v6 = config.v6.map(|range| Prefix::V6(range.network));
    v4.into_iter().chain(v6)
}
