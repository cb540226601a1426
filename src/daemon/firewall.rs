//! One network's firewall rules and blackhole route, looked after on a thread of their own.
//!
//! Rules are made by other programs ([`host::firewall`](crate::host::firewall)), and whoever waits for those must not be the thread that
//! leases and routes are on. So this thread is the only one in the process that starts programs, and all it is told is a [`Wanted`]:
//!
//! ```text
//!   node ── Wanted ──▶ thread "firewall": every --iptables-resync seconds, and at once when told
//!     ▲                  1  links with pods behind them, by netlink
//!     └── "looked" ◀─    2  the rules, by nft or iptables
//!                        3  the blackhole route, by netlink
//! ```
//!
//! The node waits for the first look before it writes `subnet.env`, but no longer than [`PATIENCE`], and whatever came of it: a host whose
//! tools fail still has its overlay. What came of it is in the log once, and in the status. As long as rules that were asked for could not
//! be made even once, the node is up and not *ready*; that `auto` finds no tool is told, and is no fault.
//!
//! When the thread ends, everything stays, as flannel's does: packets flow while the daemon restarts. It may be in the middle of a look when
//! its handle is dropped, and makes rules until that is done; so whoever comes next to the rules of a network, be it to take them away or to
//! look after them anew, waits for its turn ([`turn`]).
//!
//! `subnet.env` says that masquerading is done once it is: not before the first look that went well, and no more when the tool is gone. The
//! node writes the file again whenever that changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::addr::Prefix;
use crate::control::config::NetworkConfig;
use crate::control::subnet_file::IpMasq;
use crate::daemon::network::networks;
use crate::daemon::report::Report;
use crate::host::firewall::helper;
use crate::host::firewall::{
    self, Choice, Firewall, FirewallError, Guard, Look, Masquerade, Names, OverlayPart, RuleSet,
};
use crate::host::netlink::{Link, LinkAddr, Netlink, NetlinkError};
use crate::lease::Subnet;
use crate::options::{self, Enabled, FirewallOptions, FirewallTool};

/// How long the node waits for the first look. Tools take milliseconds, but they wait for one another's lock.
const PATIENCE: Duration = Duration::from_secs(15);
/// How soon what failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How many links with pods behind them are named in rules. A bridge is one; where each pod has a link of its own, there would be a rule
/// for each, and the one for pods' addresses has to do.
const MOST_POD_LINKS: usize = 8;

/// What the thread is to see to.
struct Wanted {
    rules: RuleSet,
    /// This node's subnets, one a family.
    own: Vec<Prefix>,
    /// The overlay's networks.
    networks: Vec<Prefix>,
    /// Links that no pod is behind, though they have addresses of the subnet.
    devices: Vec<String>,
    /// Told after the first look.
    looked: oneshot::Sender<()>,
}

/// Whether there are rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// They are made. That a later look fails takes none away.
    Kept,
    /// They were not made yet, there is nothing to make them with, or nobody wants any.
    None,
}

/// Held by whoever changes the rules of a network.
type Turn = Arc<tokio::sync::Mutex<()>>;

/// The turn of a network, by the name in its rules.
fn turn(network: &str) -> Turn {
    static TURNS: Mutex<BTreeMap<String, Turn>> = Mutex::new(BTreeMap::new());
    let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(turns.entry(network.to_owned()).or_default())
}

/// The thread's handle; it ends when this is dropped.
pub(super) struct Keeper {
    options: FirewallOptions,
    network: String,
    orders: mpsc::Sender<Wanted>,
    state: watch::Receiver<State>,
    report: Arc<Report>,
}

/// Takes the rules of a network away that was removed; its keeper's handle is dropped, and its thread is waited for.
pub(super) async fn withdraw(options: FirewallOptions, network: String) {
    let Some(choice) = choice(options.tool) else {
        return;
    };
    let turn = turn(&network).lock_owned().await;
    let rules = RuleSet::nothing(&network);
    let remove = move || {
        // Over when the tools are done, whether or not anybody waits for that.
        let _turn = turn;
        Firewall::new(choice).keep(&rules)
    };
    let removed = tokio::task::spawn_blocking(remove).await;
    match removed {
        Ok(Ok(_) | Err(FirewallError::NoTool(_))) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, "firewall rules of a removed network stay; `kersey cleanup` removes them");
        }
        Err(error) => tracing::error!(%error, "firewall rules of a removed network stay"),
    }
}

fn choice(tool: FirewallTool) -> Option<Choice> {
    match tool {
        FirewallTool::Auto => Some(Choice::Auto),
        FirewallTool::Nft => Some(Choice::Nft),
        FirewallTool::Iptables => Some(Choice::Iptables),
        FirewallTool::Off => None,
    }
}

impl Keeper {
    /// Starts the thread for the network called `network`; it touches nothing until it is told what is wanted.
    pub(super) fn start(options: FirewallOptions, network: &str, report: Arc<Report>) -> Result<Self> {
        let (orders, received) = mpsc::channel(4);
        let (told, state) = watch::channel(State::None);
        let reported = Arc::clone(&report);
        let turn = turn(network);
        std::thread::Builder::new()
            .name("firewall".to_owned())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                match runtime {
                    Ok(runtime) => runtime.block_on(async {
                        let _turn = turn.lock_owned().await;
                        Thread::new(options, reported, told).run(received).await;
                    }),
                    Err(error) => {
                        reported.set_rules_missing(&error.to_string());
                        tracing::error!(%error, "cannot look after firewall rules");
                    }
                }
            })
            .context("cannot start the thread for firewall rules")?;
        Ok(Self {
            options,
            network: network.to_owned(),
            orders,
            state,
            report,
        })
    }

    /// Has the rules of a subnet made, and waits until that was tried. `guard` is where tunnels end, `devices` are the node's own.
    pub(super) async fn want(
        &self,
        config: &NetworkConfig,
        own: Subnet,
        guard: Option<Guard>,
        devices: Vec<String>,
    ) {
        let (looked, done) = oneshot::channel();
        let wanted = Wanted {
            rules: self.rules(config, own, guard),
            own: own.prefixes().collect(),
            networks: networks(config).collect(),
            devices,
            looked,
        };
        if self.orders.send(wanted).await.is_ok() && timeout(PATIENCE, done).await.is_err() {
            self.report.set_rules_missing("the tools do not answer");
            tracing::warn!("firewall tools do not answer; going on");
        }
    }

    /// Changes from now on, after each of which [`ip_masq`](Self::ip_masq) may say something else.
    pub(super) fn states(&self) -> watch::Receiver<State> {
        let mut states = self.state.clone();
        states.mark_unchanged();
        states
    }

    /// What `subnet.env` says of masquerading: with nothing to do it with, the container runtime had better.
    pub(super) fn ip_masq(&self) -> IpMasq {
        let asked = self.options.masquerade != options::Masquerade::Off;
        match *self.state.borrow() {
            State::Kept if asked => IpMasq::On,
            State::Kept | State::None => IpMasq::Off,
        }
    }

    fn rules(&self, config: &NetworkConfig, own: Subnet, guard: Option<Guard>) -> RuleSet {
        let mut overlays = Vec::new();
        for subnet in own.prefixes() {
            let network = networks(config).find(|network| network.covers(subnet));
            overlays.extend(network.map(|network| OverlayPart { network, subnet }));
        }
        RuleSet {
            names: Names::of(&self.network),
            overlays,
            masquerade: match self.options.masquerade {
                options::Masquerade::Off => Masquerade::Off,
                options::Masquerade::Plain => Masquerade::Plain,
                options::Masquerade::Random => Masquerade::Random,
            },
            forward: self.options.forward_rules == Enabled::Yes,
            guard: guard.filter(|_| self.options.tunnel_guard == Enabled::Yes),
            pod_links: Vec::new(),
        }
    }
}

struct Thread {
    options: FirewallOptions,
    report: Arc<Report>,
    state: watch::Sender<State>,
    firewall: Option<Firewall>,
    /// The rules last made.
    made: Option<RuleSet>,
    /// What has been told, so that it is told once.
    told: BTreeSet<String>,
    blackholes_looked_for: bool,
}

impl Thread {
    fn new(options: FirewallOptions, report: Arc<Report>, state: watch::Sender<State>) -> Self {
        let choice = choice(options.tool);
        Self {
            options,
            report,
            state,
            firewall: choice.map(Firewall::new),
            made: None,
            told: BTreeSet::new(),
            blackholes_looked_for: false,
        }
    }

    async fn run(mut self, mut orders: mpsc::Receiver<Wanted>) {
        let Some(mut wanted) = orders.recv().await else {
            return;
        };
        let netlink = loop {
            match Netlink::open() {
                Ok(netlink) => break netlink,
                Err(error) => {
                    let error = told(&error);
                    self.report.set_rules_missing(&error);
                    self.tell_once(format!("cannot look after firewall rules, trying on: {error}"));
                }
            }
            if orders.is_closed() {
                return;
            }
            sleep(RETRY).await;
        };
        tell_of_bridges();
        loop {
            // What was wanted by who has gone is wanted no more.
            if orders.is_closed() {
                return;
            }
            let pause = self.look(&wanted, &netlink).await;
            let (nobody, _) = oneshot::channel();
            // Nobody may be waiting any more.
            let _ = std::mem::replace(&mut wanted.looked, nobody).send(());
            let due = Instant::now() + pause.unwrap_or_default();
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => wanted = order,
                    None => return,
                },
                () = sleep_until(due), if pause.is_some() => {}
            }
        }
    }

    /// Looks, and puts right what is wrong; gives the time until the next look, if there is anything to look after.
    async fn look(&mut self, wanted: &Wanted, netlink: &Netlink) -> Option<Duration> {
        let blackholes = self.blackholes(wanted, netlink).await;
        let rules = self.rules(wanted, netlink).await;
        match (blackholes, rules) {
            (None, None) => None,
            (one, other) => Some(one.unwrap_or(Duration::MAX).min(other.unwrap_or(Duration::MAX))),
        }
    }

    async fn rules(&mut self, wanted: &Wanted, netlink: &Netlink) -> Option<Duration> {
        let Some(firewall) = &mut self.firewall else {
            self.set(State::None);
            self.report.set_firewall("off");
            self.report.set_rules_made();
            return None;
        };
        let mut rules = wanted.rules.clone();
        if rules.guard.is_some() {
            match pod_links(netlink, wanted).await {
                Ok(links) => rules.pod_links = links,
                // As last time; the next look may know more.
                Err(_) => rules.pod_links = self.made.take().map_or_else(Vec::new, |made| made.pod_links),
            }
        }
        let asked = rules.masquerade != Masquerade::Off;
        match firewall.keep(&rules) {
            Ok(look) => {
                self.set(State::Kept);
                self.report.set_firewall(look.mode.name());
                self.report.set_rules_made();
                self.tell(&look, &rules);
                self.made = Some(rules);
                Some(self.options.resync)
            }
            Err(error @ FirewallError::NoTool(_)) => {
                self.set(State::None);
                self.report.set_firewall(&format!("none: {error}"));
                match self.options.tool {
                    FirewallTool::Auto | FirewallTool::Off => self.report.set_rules_made(),
                    // Somebody has named a tool, and so counts on it.
                    FirewallTool::Nft | FirewallTool::Iptables => {
                        self.report.set_rules_missing(&error.to_string());
                    }
                }
                if asked {
                    self.tell_once(format!("{error}: nothing is masqueraded and no rules are made; install nftables, or leave masquerading to the container runtime (FLANNEL_IPMASQ=false)"));
                } else if self.told.insert(error.to_string()) {
                    tracing::info!("{error}: no firewall rules are made");
                }
                // Somebody may install one.
                Some(self.options.resync.max(Duration::from_secs(60)))
            }
            Err(_) if helper::is_ending() => Some(RETRY),
            Err(error) => {
                self.report.set_firewall(&format!("failing: {error}"));
                self.report.set_rules_missing(&error.to_string());
                self.tell_once(format!("cannot make firewall rules, trying on: {error}"));
                Some(RETRY.max(self.options.resync / 5))
            }
        }
    }

    fn set(&self, new: State) {
        self.state
            .send_if_modified(|state| std::mem::replace(state, new) != new);
    }

    fn tell(&mut self, look: &Look, rules: &RuleSet) {
        if self.made.is_none() {
            tracing::info!(
                tool = look.mode.name(),
                masquerade = rules.masquerade != Masquerade::Off,
                forward = rules.forward,
                tunnel_guard = rules.guard.is_some(),
                "firewall rules are in place"
            );
        } else if self.made.as_ref() == Some(rules) && !look.amiss.is_empty() {
            tracing::warn!(
                what = look.amiss.join(", "),
                "somebody changed firewall rules; put right again"
            );
        }
        self.told.retain(|told| look.notes.contains(told));
        for note in &look.notes {
            if self.told.insert(note.clone()) {
                tracing::warn!("{note}");
            }
        }
    }

    fn tell_once(&mut self, text: String) {
        if !self.told.contains(&text) {
            tracing::warn!("{text}");
            self.told.clear();
            self.told.insert(text);
        }
    }

    /// Has the blackhole routes that are wanted, and no others of ours in the network.
    async fn blackholes(&mut self, wanted: &Wanted, netlink: &Netlink) -> Option<Duration> {
        let on = self.options.blackhole == Enabled::Yes;
        if !on && self.blackholes_looked_for {
            return None;
        }
        let pause = on.then_some(self.options.resync);
        let own: &[Prefix] = if on { &wanted.own } else { &[] };
        match set_blackholes(netlink, own, &wanted.networks).await {
            Ok(()) => {
                self.blackholes_looked_for = true;
                pause
            }
            Err(error) => {
                self.tell_once(format!(
                    "cannot set the blackhole route, trying on: {}",
                    told(&error)
                ));
                Some(RETRY)
            }
        }
    }
}

/// Says, once a process, that packets between ports of one bridge pass no rules. None of ours are for those; the rules of Kubernetes'
/// services are, whatever made them, and whatever makes ours.
fn tell_of_bridges() {
    static TOLD: Once = Once::new();
    if !firewall::sees_bridges() {
        TOLD.call_once(|| {
            tracing::info!(
                "br_netfilter is not there: packets between pods on one bridge pass no firewall rules; only Kubernetes' services need that \
                 (modprobe br_netfilter)"
            );
        });
    }
}

async fn set_blackholes(
    netlink: &Netlink,
    wanted: &[Prefix],
    networks: &[Prefix],
) -> Result<(), NetlinkError> {
    let held = netlink.own_blackholes().await?;
    for &prefix in wanted.iter().filter(|prefix| !held.contains(prefix)) {
        netlink.add_own_blackhole(prefix).await?;
        tracing::info!(%prefix, "blackhole route set");
    }
    let ours = |prefix: &Prefix| networks.iter().any(|network| network.covers(*prefix));
    for prefix in held {
        if ours(&prefix) && !wanted.contains(&prefix) {
            netlink.delete_own_blackhole(prefix).await?;
        }
    }
    Ok(())
}

/// The links with pods behind them: those that have addresses of our subnet and are not our own.
async fn pod_links(netlink: &Netlink, wanted: &Wanted) -> Result<Vec<String>, NetlinkError> {
    let (links, addresses) = (netlink.links().await?, netlink.addresses().await?);
    Ok(links_of_pods(&links, &addresses, wanted))
}

fn links_of_pods(links: &[Link], addresses: &[LinkAddr], wanted: &Wanted) -> Vec<String> {
    let has_pods = |link: &Link| {
        addresses.iter().any(|held| {
            held.index == link.index && wanted.own.iter().any(|own| own.covers(Prefix::host(held.addr)))
        })
    };
    // Names with other letters would have to be quoted, in two languages; the kernel allows nearly all.
    let is_plain = |name: &str| {
        name.bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte))
    };
    let mut names: Vec<String> = links
        .iter()
        .filter(|link| !link.is_loopback() && !wanted.devices.contains(&link.name))
        .filter(|link| has_pods(link) && is_plain(&link.name))
        .map(|link| link.name.clone())
        .collect();
    names.sort();
    if names.len() > MOST_POD_LINKS {
        names.clear();
    }
    names
}

/// An error with its cause.
fn told(error: &NetlinkError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::address::AddressFlags;
    use netlink_packet_route::link::LinkFlags;

    use super::*;

    fn options(tool: FirewallTool) -> FirewallOptions {
        FirewallOptions {
            tool,
            masquerade: options::Masquerade::Random,
            forward_rules: Enabled::Yes,
            resync: Duration::from_secs(60),
            tunnel_guard: Enabled::Yes,
            blackhole: Enabled::No,
        }
    }

    fn config() -> NetworkConfig {
        NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap()
    }

    fn own() -> Subnet {
        "10.244.7.0-24".parse().unwrap()
    }

    fn keeper(options: FirewallOptions, network: &str) -> Keeper {
        Keeper::start(options, network, Arc::new(Report::for_tests())).unwrap()
    }

    const SHORTLY: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn who_changes_rules_waits_until_the_thread_before_has_ended() {
        let held = turn("waits").lock_owned().await;
        let keeper = keeper(options(FirewallTool::Off), "waits");
        let config = config();
        let mut want = Box::pin(keeper.want(&config, own(), None, Vec::new()));
        assert!(timeout(SHORTLY, &mut want).await.is_err(), "a thread waits");
        let withdraw = withdraw(options(FirewallTool::Nft), "waits".to_owned());
        assert!(timeout(SHORTLY, withdraw).await.is_err(), "removal waits");
        drop(held);
        want.as_mut().await;
        drop(want);
        // It has its turn for as long as it lives.
        assert!(turn("waits").try_lock().is_err());
        assert!(turn("another").try_lock().is_ok());
        drop(keeper);
        let ended = timeout(Duration::from_secs(10), async {
            drop(turn("waits").lock().await)
        });
        ended.await.unwrap();
    }

    #[tokio::test]
    async fn masquerading_is_told_of_once_rules_are_made_and_not_before() {
        let keeper = keeper(options(FirewallTool::Off), "told");
        assert_eq!(keeper.ip_masq(), IpMasq::Off, "nothing is made yet");
        let (sender, state) = watch::channel(State::None);
        let keeper = Keeper { state, ..keeper };
        let mut states = keeper.states();
        sender.send_replace(State::Kept);
        timeout(SHORTLY, states.changed()).await.unwrap().unwrap();
        assert_eq!(keeper.ip_masq(), IpMasq::On);
        assert!(timeout(SHORTLY, states.changed()).await.is_err(), "told once");
    }

    #[test]
    fn pods_are_behind_links_with_addresses_of_the_subnet_that_are_not_ours() {
        let link = |index: u32, name: &str, flags: LinkFlags| Link {
            index,
            name: name.to_owned(),
            flags,
            ..Link::default()
        };
        let mut links = vec![
            link(1, "lo", LinkFlags::Loopback),
            link(2, "eth0", LinkFlags::Up),
            link(3, "flannel0", LinkFlags::Up),
            link(4, "cni0", LinkFlags::Up),
            link(5, "evil\"; drop", LinkFlags::Up),
        ];
        let addr = |index: u32, addr: &str| LinkAddr {
            index,
            addr: addr.parse().unwrap(),
            prefix_len: 24,
            flags: AddressFlags::Permanent,
        };
        let mut addresses = vec![
            addr(1, "10.244.7.3"),
            addr(2, "192.0.2.1"),
            addr(3, "10.244.7.0"),
            addr(4, "10.244.7.1"),
            addr(5, "10.244.7.2"),
        ];
        let prefix = |text: &str| Prefix::V4(text.parse().unwrap());
        let wanted = Wanted {
            rules: RuleSet::nothing(""),
            own: vec![prefix("10.244.7.0/24")],
            networks: vec![prefix("10.244.0.0/16")],
            devices: vec!["flannel0".to_owned()],
            looked: oneshot::channel().0,
        };
        assert_eq!(links_of_pods(&links, &addresses, &wanted), ["cni0"]);
        for nth in 10..30 {
            links.push(link(nth, &format!("veth{nth}"), LinkFlags::Up));
            addresses.push(addr(nth, "10.244.7.1"));
        }
        assert!(links_of_pods(&links, &addresses, &wanted).is_empty());
    }
}
