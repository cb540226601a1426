//! What the daemon tells of itself: gathers the status document from the running parts.

pub(super) mod peers;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::addr::{Mtu, NetworkName, Vni};
use crate::backend::{Backend, CONFIGURED, NoTunnel};
use crate::control::config::NetworkConfig;
use crate::control::store::Store;
use crate::control::{Published, RateLimit, StoreHealth, Waiting};
use crate::daemon::health::Health;
use crate::daemon::network::{DataPlane, Setup};
use crate::daemon::report::peers::{PeerFigures, PeerRows};
use crate::dataplane::stats::{BatchSizes, Call, Count, DropReason, WorkerStats};
use crate::host::interface::UnderlayInterface;
use crate::host::pulse::Pulse;
use crate::lease::{BySubnet, Expiration, LeaseAttrs, Subnet};
use crate::options::RunOptions;
use crate::status::{self, Status};

/// How often it is looked which peers' packets came.
const LOOK: Duration = Duration::from_secs(5);

/// What the status document is made from; shared between the daemon, which sets it, and the socket, which reads it.
pub(super) struct Report {
    started: Instant,
    /// How often to complain that the subnet file cannot be written.
    pub(super) unwritten: RateLimit,
    parts: Mutex<Parts>,
    ready: watch::Sender<bool>,
}

#[derive(Default)]
struct Parts {
    fixed: Status<PeerRows>,
    store: Option<Arc<dyn Store>>,
    published: Option<Published>,
    /// What it waits for before there is anything published.
    waiting: Option<watch::Receiver<Option<Waiting>>>,
    /// What was last said of each kind, so that it is said once.
    said: BTreeMap<&'static str, String>,
    /// When it was last looked which peers' packets came.
    looked: Option<Instant>,
    workers: Vec<Arc<WorkerStats>>,
    directed: Vec<(&'static str, Arc<WorkerStats>)>,
    pulses: Vec<Arc<Pulse>>,
    /// When the loop that keeps the node up last turned; `None` while it starts or rebuilds.
    turned: Option<Instant>,
    route_updates: u64,
    /// Whether the subnet file is written and packets move.
    is_up: bool,
    /// Firewall rules that were asked for.
    rules: Rules,
}

impl Parts {
    fn waiting(&self) -> Option<Waiting> {
        let waiting = self.waiting.as_ref().filter(|_| !self.is_up);
        waiting.and_then(|waiting| waiting.borrow().clone())
    }

    /// What keeps the node from being ready, if it knows.
    fn problem(&self) -> Option<String> {
        match self.waiting() {
            Some(Waiting { what, why }) => Some(format!("{what}: {why}")),
            None => self.fixed.problem.clone(),
        }
    }

    /// Forgets the peers of a former backend, and the threads that moved their packets.
    fn forget_peers(&mut self) {
        self.fixed.peers = PeerRows::default();
        self.workers.clear();
        self.directed.clear();
        self.pulses.clear();
    }
}

/// Firewall rules that were asked for: a node is not ready as long as there never were any.
#[derive(Clone, Debug, Default)]
enum Rules {
    /// Nobody knows of anything wrong with them.
    #[default]
    Unknown,
    /// They were made, once at least.
    Made,
    /// They could not be made yet, and why.
    Missing(String),
}

/// When packets of peers last came, of those whose packets came. The packet path knows no clock for it: now and then it is looked which
/// counts have grown.
#[derive(Clone, Debug, Default)]
struct Seen(BySubnet<Sight>);

/// What the last look at a peer gave.
#[derive(Clone, Copy, Debug)]
struct Sight {
    packets: u64,
    /// Seconds since 1970.
    at: Option<u64>,
}

impl Seen {
    fn look(&mut self, counts: impl Iterator<Item = (Subnet, u64)>, unix_s: u64) {
        let looked = counts.filter_map(|(subnet, packets)| {
            let last = self.0.get(subnet).copied();
            if packets == 0 && last.is_none() {
                return None;
            }
            // With a device made anew, counts begin at 0.
            let came = packets != last.map_or(0, |last| last.packets) && packets > 0;
            let at = if came {
                Some(unix_s)
            } else {
                last.and_then(|last| last.at)
            };
            Some((subnet, Sight { packets, at }))
        });
        self.0 = looked.collect();
    }

    fn at(&self, subnet: Subnet) -> Option<u64> {
        self.0.get(subnet)?.at
    }
}

/// How large the batches of a direction were.
#[derive(Clone, Debug)]
pub(super) struct Batches {
    pub(super) direction: &'static str,
    pub(super) sizes: BatchSizes,
    /// Packets in all of them.
    pub(super) packets: u64,
}

/// What metrics are made from.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) status: Status<PeerRows>,
    pub(super) peers: Vec<PeerFigures>,
    /// Packets dropped, by reason and direction.
    pub(super) drops: Vec<(DropReason, &'static str, u64)>,
    /// Of both directions, if there is a packet path.
    pub(super) batches: Vec<Batches>,
    /// System calls of the packet path, if there is one.
    pub(super) calls: Vec<(Call, u64)>,
    pub(super) store_errors: u64,
    /// How often somebody else had, took or changed our lease.
    pub(super) lease_conflicts: u64,
    pub(super) route_updates: u64,
}

/// The parts that should run, and when the loop that looks after them last turned.
pub(super) struct Vitals {
    pub(super) pulses: Vec<Arc<Pulse>>,
    pub(super) turned: Option<Instant>,
}

impl Report {
    pub(super) fn new(options: &RunOptions) -> Self {
        Self::of_device(&options.packet_path.device)
    }

    /// Of a node whose device is to be called so.
    pub(super) fn of_device(device: &str) -> Self {
        let fixed = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sandbox: crate::host::sandbox::report(),
            device: status::DeviceStatus {
                name: device.to_owned(),
                ..Default::default()
            },
            ..Default::default()
        };
        Self {
            started: Instant::now(),
            unwritten: RateLimit::default(),
            parts: Mutex::new(Parts {
                fixed,
                ..Parts::default()
            }),
            ready: watch::Sender::new(false),
        }
    }

    fn edit(&self, edit: impl FnOnce(&mut Parts)) {
        edit(&mut self.parts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn set_store(&self, place: String) {
        self.edit(|parts| parts.fixed.store.place = place);
    }

    pub(super) fn set_node<B: Backend>(
        &self,
        setup: &Setup<'_, B>,
        published: &Published,
        store: Arc<dyn Store>,
    ) {
        let interface = setup.interface;
        let check = match setup.options.ingress_check {
            crate::options::IngressCheck::Strict => "strict",
            crate::options::IngressCheck::Loose => "loose",
            crate::options::IngressCheck::Off => "off",
        };
        let carrier = setup.backend.carrier();
        self.edit(|parts| {
            parts.forget_peers();
            parts.fixed.node = node(setup.config, interface, setup.inner_mtu);
            parts.fixed.backend = status::Backend {
                name: setup.backend.name().to_owned(),
                reason: setup.backend.reason(),
                port: carrier.port(),
                vni: carrier.vni().map(Vni::get),
                ingress_check: check.to_owned(),
            };
            parts.store = Some(store);
            parts.published = Some(published.clone());
        });
    }

    /// As [`set_node`](Self::set_node), for a backend without a tunnel.
    pub(super) fn set_plain_node(
        &self,
        backend: &impl NoTunnel,
        config: &NetworkConfig,
        interface: &UnderlayInterface,
        published: &Published,
        store: Arc<dyn Store>,
    ) {
        self.edit(|parts| {
            parts.forget_peers();
            parts.fixed.node = node(config, interface, interface.mtu);
            parts.fixed.backend = status::Backend {
                name: backend.name().to_owned(),
                reason: CONFIGURED.to_owned(),
                ..Default::default()
            };
            parts.fixed.device = status::DeviceStatus::default();
            parts.store = Some(store);
            parts.published = Some(published.clone());
        });
    }

    /// Lists the peers of a backend without a tunnel, and says how the kernel routes them.
    pub(super) fn set_plain_peers(&self, peers: BySubnet<Arc<LeaseAttrs>>, routes: BTreeMap<Subnet, String>) {
        self.edit(|parts| {
            parts.fixed.peers.plain = peers;
            parts.fixed.peers.kernel_routes = Arc::new(routes);
        });
    }

    /// Says of peers of a tunnel how the kernel routes them past it.
    pub(super) fn set_kernel_routes(&self, routes: BTreeMap<Subnet, String>) {
        self.edit(|parts| parts.fixed.peers.kernel_routes = Arc::new(routes));
    }

    pub(super) fn set_plane<B: Backend>(&self, plane: &DataPlane<B>) {
        let mut offloads = vec![
            ("tun_tso", plane.tun_offloads.tso),
            ("tun_uso", plane.tun_offloads.uso),
        ];
        if let Some(sockets) = plane.socket_offloads {
            offloads.extend([("udp_gso", sockets.gso), ("udp_gro", sockets.gro)]);
        }
        let offloads = offloads.iter().map(|&(name, probed)| (name, probed.describe()));
        let srv6_io = plane.srv6_io.map(|io| ("srv6_io", io.describe()));
        let srv6_send = plane.srv6_send.map(|send| ("srv6_send", send.describe()));
        self.edit(|parts| {
            parts.fixed.device.queues = plane.queue_count;
            parts.fixed.device.threads = plane.threads();
            parts.fixed.device.offloads = offloads
                .chain(srv6_io)
                .chain(srv6_send)
                .map(|(name, state)| (name.to_owned(), state.to_owned()))
                .collect();
            parts.fixed.peers.tunnelled = plane.peers.clone();
            parts.workers = plane.stats();
            parts.directed = plane.directed_stats();
            parts.pulses = plane.pulses();
            parts.route_updates += 1;
        });
    }

    /// Says what firewall rules are made with, or why there are none.
    pub(super) fn set_firewall(&self, state: &str) {
        self.edit(|parts| state.clone_into(&mut parts.fixed.firewall));
    }

    /// The loop that keeps the node up has turned.
    pub(super) fn set_turned(&self) {
        let now = Instant::now();
        self.edit(|parts| {
            parts.turned = Some(now);
            if parts.looked.is_none_or(|looked| now - looked >= LOOK) {
                parts.looked = Some(now);
                let PeerRows { tunnelled, seen, .. } = &mut parts.fixed.peers;
                let counts = tunnelled.iter();
                let counts = counts.map(|(subnet, peer)| (subnet, peer.counts.totals().2));
                seen.look(counts, unix_s());
            }
        });
    }

    /// The subnet file is written and packets move: it is ready, unless firewall rules are missing.
    pub(super) fn set_up(&self) {
        self.edit(|parts| {
            parts.is_up = true;
            self.settle(parts);
        });
    }

    pub(super) fn not_ready(&self) {
        self.edit(|parts| {
            parts.is_up = false;
            parts.turned = None;
            parts.pulses.clear();
            self.settle(parts);
        });
    }

    /// The firewall rules that were asked for are there, or none were, or there is nothing to make them with, which is no fault.
    pub(super) fn set_rules_made(&self) {
        self.edit(|parts| {
            parts.rules = Rules::Made;
            self.settle(parts);
        });
    }

    /// They cannot be made. If they were before, they are likely still there, and the node stays as ready as it was.
    pub(super) fn set_rules_missing(&self, why: &str) {
        self.edit(|parts| {
            if !matches!(parts.rules, Rules::Made) {
                parts.rules = Rules::Missing(format!(
                    "firewall rules that were asked for cannot be made: {why}"
                ));
                self.settle(parts);
            }
        });
    }

    /// Says what follows from what is known. To be called with `parts` locked, so that who says it last knows most.
    fn settle(&self, parts: &mut Parts) {
        let missing = match &parts.rules {
            Rules::Missing(why) => Some(why),
            Rules::Unknown | Rules::Made => None,
        };
        parts.fixed.ready = parts.is_up && missing.is_none();
        if parts.is_up {
            parts.fixed.problem = missing.cloned();
        }
        self.ready.send_replace(parts.fixed.ready);
    }

    /// Says why it is not ready; what was said before is over.
    pub(super) fn set_problem(&self, why: String) {
        self.edit(|parts| parts.fixed.problem = Some(why));
    }

    /// What stood in the way is over, if anything did.
    pub(super) fn clear_problem(&self) {
        self.edit(|parts| parts.fixed.problem = None);
    }

    /// Whether `text` differs from what was last said of its kind; it is what was last said from now on.
    pub(super) fn is_news(&self, kind: &'static str, text: &str) -> bool {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.said.get(kind).is_some_and(|said| said == text) {
            return false;
        }
        parts.said.insert(kind, text.to_owned());
        true
    }

    /// Where to hear what a life waits for as it begins.
    pub(super) fn set_waiting(&self, waiting: watch::Receiver<Option<Waiting>>) {
        self.edit(|parts| parts.waiting = Some(waiting));
    }

    pub(super) fn is_ready(&self) -> bool {
        *self.ready.borrow()
    }

    /// Whether the subnet file is written and packets move.
    pub(super) fn is_up(&self) -> bool {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner).is_up
    }

    /// What keeps a node that is up from being ready. What one waits for that is not up names stores, and is not for everybody.
    pub(super) fn obstacle(&self) -> Option<String> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.fixed.problem.clone().filter(|_| parts.is_up)
    }

    /// How the node is, in a few words. Asked for every other second: unlike the document, it does not go through the peers.
    pub(super) fn line(&self) -> String {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if !parts.fixed.ready {
            // Everybody may read the line, and why the store does not give something names stores.
            let waiting = parts.waiting().map(|waiting| waiting.what.to_owned());
            return match waiting.or_else(|| parts.fixed.problem.clone()) {
                Some(problem) => format!("not ready: {problem}"),
                None => "not ready".to_owned(),
            };
        }
        let (mut subnets, mut store) = (parts.fixed.node.subnets.join(" "), "");
        if let Some(published) = &parts.published {
            let subnet = published.lease.borrow().subnet;
            let all: Vec<String> = subnet.prefixes().map(|prefix| prefix.to_string()).collect();
            subnets = all.join(" ");
            if !published.health.borrow().connected {
                store = ", store away";
            }
        }
        let peers = match parts.fixed.peers.len() {
            1 => "1 peer".to_owned(),
            many => format!("{many} peers"),
        };
        format!("{subnets} by {}, {peers}{store}", parts.fixed.backend.name)
    }

    /// Waits until the node is ready.
    pub(super) async fn until_ready(&self) {
        self.until(true).await;
    }

    /// Waits until the node is ready, or is not.
    pub(super) async fn until(&self, wanted: bool) {
        // The sender is ours, so it cannot be gone.
        let _ = self.ready.subscribe().wait_for(|ready| *ready == wanted).await;
    }

    #[cfg(test)]
    pub(super) fn for_tests() -> Self {
        Self::of_device("flannel0")
    }

    #[cfg(test)]
    pub(super) fn set_pulses(&self, pulses: Vec<Arc<Pulse>>) {
        self.edit(|parts| parts.pulses = pulses);
    }

    /// What should run as of now.
    pub(super) fn vitals(&self) -> Vitals {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        Vitals {
            pulses: parts.pulses.clone(),
            turned: parts.turned,
        }
    }

    /// What metrics are made from, as of now.
    pub(super) fn sample(&self) -> Sample {
        let status = self.status();
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let directions = parts.directed.iter().map(|(direction, _)| *direction);
        let directions: BTreeSet<_> = directions.collect();
        let drops = directions.into_iter().flat_map(|direction| {
            let workers = parts.directed.iter().filter(move |(way, _)| *way == direction);
            DropReason::ALL.iter().map(move |&reason| {
                let dropped = workers.clone().map(|(_, stats)| stats.dropped(reason)).sum();
                (reason, direction, dropped)
            })
        });
        let batches = ["outbound", "inbound"].map(|direction| batches(direction, &parts.directed));
        // Without a tunnel there is nothing that counts.
        let calls = if parts.workers.is_empty() { &[] } else { Call::ALL };
        let calls = calls.iter().map(|&call| {
            let made = parts.workers.iter().map(|worker| worker.calls(call)).sum();
            (call, made)
        });
        let of_store = |of: fn(&StoreHealth) -> u64| {
            let published = parts.published.as_ref();
            published.map_or(0, |published| of(&published.health.borrow()))
        };
        Sample {
            drops: drops.collect(),
            batches: batches.into_iter().flatten().collect(),
            calls: calls.collect(),
            store_errors: of_store(|health| health.errors),
            lease_conflicts: of_store(|health| health.conflicts),
            route_updates: parts.route_updates,
            peers: status.peers.figures().collect(),
            status,
        }
    }

    /// The document as of now.
    pub(super) fn status(&self) -> Status<PeerRows> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut status = parts.fixed.clone();
        status.problem = parts.problem();
        status.uptime_s = self.started.elapsed().as_secs_f64();
        // Without a tunnel there is nothing that counts.
        let counts = if parts.workers.is_empty() { &[] } else { Count::ALL };
        for count in counts {
            let total = parts.workers.iter().map(|worker| worker.counted(*count)).sum();
            status.counters.insert(count.name().to_owned(), total);
        }
        status.drops = nonzero(|reason| parts.workers.iter().map(|worker| worker.dropped(reason)).sum());
        if let Some(published) = &parts.published {
            let lease = published.lease.borrow();
            status.node.subnets = lease.subnet.prefixes().map(|prefix| prefix.to_string()).collect();
            status.node.lease_expires_unix_s = match lease.expiration {
                Expiration::Never => None,
                Expiration::At(end) => end.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
            };
            let health = published.health.borrow();
            status.store.connected = health.connected;
            status.store.since_s = health.since.elapsed().as_secs_f64();
            status.store.error.clone_from(&health.last_error);
            let peers = published.peers.borrow();
            let rejected = peers.rejected().iter();
            status.rejected_leases = rejected.map(|(reason, n)| ((*reason).to_owned(), *n)).collect();
        }
        status.store.resets = parts.store.as_ref().map_or(0, |store| store.resets());
        if let Some(skipped) = parts
            .store
            .as_ref()
            .map(|store| store.skipped())
            .filter(|&skipped| skipped > 0)
        {
            status.rejected_leases.insert("unreadable".to_owned(), skipped);
        }
        status
    }
}

/// What several networks tell, and what the process tells of them.
pub(super) struct Reports {
    started: Instant,
    health: Arc<Health>,
    place: OnceLock<String>,
    networks: Mutex<BTreeMap<NetworkName, Arc<Report>>>,
}

impl Reports {
    /// Of no networks yet; `health` watches over those there will be.
    pub(super) fn new(health: Arc<Health>) -> Self {
        Self {
            started: Instant::now(),
            health,
            place: OnceLock::new(),
            networks: Mutex::default(),
        }
    }

    /// What watches over them.
    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    /// Says where the store is; what was said first counts.
    pub(super) fn set_place(&self, place: String) {
        let _ = self.place.set(place);
    }

    pub(super) fn add(&self, name: &NetworkName, report: Arc<Report>) {
        self.health.add(name.as_str(), Arc::clone(&report));
        self.networks().insert(name.clone(), report);
    }

    pub(super) fn remove(&self, name: &NetworkName) {
        self.health.remove(name.as_str());
        if let Some(report) = self.networks().remove(name) {
            // Nobody is to wait for it.
            report.ready.send_replace(true);
        }
    }

    pub(super) fn all(&self) -> Vec<(NetworkName, Arc<Report>)> {
        let networks = self.networks();
        let pairs = networks
            .iter()
            .map(|(name, report)| (name.clone(), Arc::clone(report)));
        pairs.collect()
    }

    fn networks(&self) -> MutexGuard<'_, BTreeMap<NetworkName, Arc<Report>>> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The document as of now: ready when all networks are.
    pub(super) fn status(&self) -> Status<PeerRows> {
        let networks: BTreeMap<String, Status<PeerRows>> = self
            .all()
            .into_iter()
            .map(|(name, report)| (name.to_string(), report.status()))
            .collect();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sandbox: crate::host::sandbox::report(),
            ready: networks.values().all(|network| network.ready),
            uptime_s: self.started.elapsed().as_secs_f64(),
            store: status::StoreStatus {
                place: self.place.get().cloned().unwrap_or_default(),
                connected: networks.values().all(|network| network.store.connected),
                ..Default::default()
            },
            networks: Some(networks),
            ..Default::default()
        }
    }
}

/// How large the batches of a direction were; `None` if there is no such direction.
fn batches(direction: &'static str, workers: &[(&'static str, Arc<WorkerStats>)]) -> Option<Batches> {
    let count = match direction {
        "outbound" => Count::OutboundPackets,
        _ => Count::InboundPackets,
    };
    let mut of = workers.iter().filter(|(way, _)| *way == direction).peekable();
    of.peek()?;
    let none = (BatchSizes::default(), 0);
    let (sizes, packets) = of.fold(none, |(mut sizes, packets), (_, stats)| {
        for (size, more) in sizes.iter_mut().zip(stats.batches()) {
            *size += more;
        }
        (sizes, packets + stats.counted(count))
    });
    Some(Batches {
        direction,
        sizes,
        packets,
    })
}

/// Seconds since 1970.
#[expect(
    clippy::disallowed_methods,
    reason = "a moment to be told, not to be reckoned with"
)]
fn unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn node(config: &NetworkConfig, interface: &UnderlayInterface, inner_mtu: Mtu) -> status::Node {
    let v4 = config.v4.map(|range| range.network.to_string());
    let v6 = config.v6.map(|range| range.network.to_string());
    let public_v4 = interface.public_v4.map(|addr| addr.to_string());
    let public_v6 = interface.public_v6.map(|addr| addr.to_string());
    status::Node {
        networks: v4.into_iter().chain(v6).collect(),
        subnets: Vec::new(),
        interface: interface.name.clone(),
        public_ips: public_v4.into_iter().chain(public_v6).collect(),
        link_mtu: interface.mtu.bytes(),
        inner_mtu: inner_mtu.bytes(),
        lease_expires_unix_s: None,
    }
}

/// The reasons that occurred, by name.
fn nonzero(dropped: impl Fn(DropReason) -> u64) -> BTreeMap<String, u64> {
    // Names last: there are many reasons, a hundred thousand peers at the most, and hardly any drops.
    let counted = DropReason::ALL.iter().map(|&reason| (reason, dropped(reason)));
    counted
        .filter(|(_, n)| *n > 0)
        .map(|(reason, n)| (reason.name().to_owned(), n))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_seen_when_its_count_has_changed_and_stays_so_when_it_has_not() {
        let subnets: Vec<Subnet> = ["10.244.7.0-24", "10.244.8.0-24"]
            .map(|key| key.parse().unwrap())
            .to_vec();
        let mut seen = Seen::default();
        let looks: [(u64, [u64; 2], [Option<u64>; 2]); 5] = [
            (100, [0, 3], [None, Some(100)]),
            (105, [0, 3], [None, Some(100)]),
            (110, [1, 9], [Some(110), Some(110)]),
            // The device was made anew.
            (115, [0, 0], [Some(110), Some(110)]),
            (120, [0, 2], [Some(110), Some(120)]),
        ];
        for (now, packets, expected) in looks {
            seen.look(subnets.iter().copied().zip(packets), now);
            let at: Vec<_> = subnets.iter().map(|subnet| seen.at(*subnet)).collect();
            assert_eq!(at, expected, "at {now}");
        }
        seen.look(subnets.iter().copied().zip([0]), 125);
        assert_eq!(seen.at(subnets[1]), None, "one that left is forgotten");
    }

    #[test]
    fn batches_are_summed_over_the_workers_of_a_direction() {
        let workers = [("outbound", 3), ("inbound", 40), ("outbound", 1)].map(|(direction, packets)| {
            let stats = Arc::<WorkerStats>::default();
            stats.batch(packets);
            let count = if direction == "outbound" {
                Count::OutboundPackets
            } else {
                Count::InboundPackets
            };
            stats.count(count, packets);
            (direction, stats)
        });
        let out = batches("outbound", &workers).unwrap();
        assert_eq!((out.packets, &out.sizes[..4]), (4, &[1, 0, 1, 0][..]));
        assert_eq!(batches("inbound", &workers).unwrap().sizes[6], 1);
        assert!(batches("outbound", &[]).is_none());
    }
}
