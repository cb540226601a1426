//! Whether the daemon lives and is ready, and what it counts: what [`monitor`](crate::server::monitor) and the watchdog ask.
//!
//! It lives while every thread that moves packets does ([`pulse`](crate::host::pulse)), the loop that looks after each network turns, and the
//! process that runs firewall tools is there: inside its sandbox the daemon cannot start another.
//! A store that is away, a lease still waited for or a device in use elsewhere are no illness: nothing would be better after a restart.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::daemon::metrics::{self, Process};
use crate::daemon::report::Report;
use crate::host::firewall::helper;
use crate::options::MonitorOptions;
use crate::server::monitor::{self, Audience, Monitored};

/// How often the loop of a network turns when nothing happens.
pub(super) const TURN: Duration = Duration::from_secs(1);
/// A loop that has not turned for so long is stuck: its longest work, a dump of all routes, takes milliseconds.
const LOOP_STUCK: Duration = Duration::from_secs(20);
/// A thread without a pulse for so long is stuck: it sleeps a second at the most.
const THREAD_STUCK: Duration = Duration::from_secs(10);

/// What is wrong when nobody runs firewall tools any more.
const HELPER_ENDED: &str =
    "the process that runs firewall tools has ended: rules stay as they are until kersey is restarted";

/// How a reload went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reload {
    /// What could change has changed.
    Applied,
    /// All stayed as it was.
    Refused,
}

/// The networks of the process, and what is known of their health.
pub(super) struct Health {
    started: SystemTime,
    kernel: String,
    networks: Mutex<BTreeMap<String, Arc<Report>>>,
    /// Network and thread → its last known pulse, and since when.
    seen: Mutex<BTreeMap<(String, String), (u64, Instant)>>,
    applied: AtomicU64,
    refused: AtomicU64,
}

impl Health {
    #[expect(
        clippy::disallowed_methods,
        reason = "a shell: when the process started is told in metrics"
    )]
    pub(super) fn new(kernel: String) -> Self {
        Self {
            started: SystemTime::now(),
            kernel,
            networks: Mutex::default(),
            seen: Mutex::default(),
            applied: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// Watches over a network from now on; `_` is the one without a name.
    pub(super) fn add(&self, network: &str, report: Arc<Report>) {
        lock(&self.networks).insert(network.to_owned(), report);
    }

    /// Watches over it no more.
    pub(super) fn remove(&self, network: &str) {
        lock(&self.networks).remove(network);
        lock(&self.seen).retain(|(of, _), _| of != network);
    }

    /// How many networks there are.
    pub(super) fn count(&self) -> usize {
        lock(&self.networks).len()
    }

    pub(super) fn count_reload(&self, reload: Reload) {
        let counter = match reload {
            Reload::Applied => &self.applied,
            Reload::Refused => &self.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether all that should run does, as of `now`.
    fn judge(&self, now: Instant) -> Result<(), String> {
        for (network, report) in &*lock(&self.networks) {
            let vitals = report.vitals();
            let still = vitals.turned.map(|turned| now.saturating_duration_since(turned));
            if let Some(still) = still.filter(|still| *still > LOOP_STUCK) {
                let seconds = still.as_secs();
                return Err(format!(
                    "the loop of network {network} has not turned for {seconds} s"
                ));
            }
            let mut seen = lock(&self.seen);
            for pulse in &vitals.pulses {
                let name = pulse.name();
                if pulse.has_ended() {
                    return Err(format!("thread {name} of network {network} has ended"));
                }
                let Some(beats) = pulse.beats() else { continue };
                let last = seen
                    .entry((network.clone(), name.to_owned()))
                    .or_insert((beats, now));
                if last.0 != beats {
                    *last = (beats, now);
                }
                let still = now.saturating_duration_since(last.1);
                if still > THREAD_STUCK {
                    let seconds = still.as_secs();
                    return Err(format!(
                        "thread {name} of network {network} has not moved for {seconds} s"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether all networks move packets, even if something else keeps them from being ready.
    pub(super) fn is_up(&self) -> bool {
        let networks = lock(&self.networks);
        !networks.is_empty() && networks.values().all(|report| report.is_up())
    }

    /// What there is to say in one line, for whoever reads `systemctl status`.
    pub(super) fn summary(&self) -> String {
        let networks = lock(&self.networks);
        let lines = networks.iter().map(|(network, report)| {
            let name = if network == "_" {
                String::new()
            } else {
                format!("{network}: ")
            };
            format!("{name}{}", report.line())
        });
        lines.collect::<Vec<_>>().join("; ")
    }
}

/// Whether somebody runs firewall tools, if somebody did.
fn judge_helper(state: helper::State) -> Result<(), String> {
    match state {
        helper::State::None | helper::State::Alive => Ok(()),
        helper::State::Ended => Err(HELPER_ENDED.to_owned()),
    }
}

impl Monitored for Health {
    fn alive(&self) -> Result<(), String> {
        judge_helper(helper::state())?;
        self.judge(Instant::now())
    }

    fn ready(&self) -> Result<(), Option<String>> {
        let networks = lock(&self.networks);
        if !networks.is_empty() && networks.values().all(|report| report.is_ready()) {
            return Ok(());
        }
        let obstacles = networks.iter().filter_map(|(network, report)| {
            let why = report.obstacle()?;
            Some(if network == "_" {
                why
            } else {
                format!("network {network}: {why}")
            })
        });
        Err(obstacles.reduce(|all, next| all + "; " + &next))
    }

    fn metrics(&self) -> String {
        let networks = lock(&self.networks);
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let process = Process {
            started_unix_s: started.as_secs_f64(),
            kernel: self.kernel.clone(),
            reloads: [&self.applied, &self.refused].map(|counter| counter.load(Ordering::Relaxed)),
            sandbox: crate::host::sandbox::report().into_iter().collect(),
            firewall_helper: match helper::state() {
                helper::State::None => None,
                helper::State::Alive => Some(true),
                helper::State::Ended => Some(false),
            },
        };
        let samples = networks
            .iter()
            .map(|(network, report)| (network.clone(), report.sample()));
        metrics::render(process, samples.collect())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers probes and Prometheus at the addresses that were asked for, for as long as the runtime lives.
pub(super) fn serve(options: &MonitorOptions, health: &Arc<Health>) {
    for (address, audience) in listeners(options) {
        tokio::spawn(monitor::serve(address, audience, Arc::clone(health)));
    }
}

/// Where to listen, and for whom.
fn listeners(options: &MonitorOptions) -> Vec<(SocketAddr, Audience)> {
    let probes = options
        .healthz_port
        .map(|port| SocketAddr::new(options.healthz_ip, port.get()));
    let probes = probes.map(|address| (address, Audience::ThisMachine));
    let metrics = options
        .metrics_address
        .map(|address| (address, Audience::Everybody));
    match (probes, metrics) {
        (Some((probes, _)), Some((metrics, everybody))) => {
            // One listener has a port for every address; a second for one of them could not be had.
            if covers(metrics, probes) {
                vec![(metrics, everybody)]
            } else if covers(probes, metrics) {
                vec![(probes, Audience::At(metrics.ip()))]
            } else {
                vec![(probes, Audience::ThisMachine), (metrics, everybody)]
            }
        }
        (probes, metrics) => probes.into_iter().chain(metrics).collect(),
    }
}

/// Whether a listener at `wide` hears what comes to `narrow`. One at `::` hears IPv4 as well (`net.ipv6.bindv6only` = 0), the other way
/// round not.
fn covers(wide: SocketAddr, narrow: SocketAddr) -> bool {
    wide == narrow
        || (wide.port() == narrow.port()
            && wide.ip().is_unspecified()
            && (wide.is_ipv6() || narrow.is_ipv4()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::pulse::Pulse;

    #[test]
    fn a_thread_that_ended_or_stands_still_is_an_illness() {
        let health = Health::new("6.1".to_owned());
        let report = Arc::new(Report::for_tests());
        health.add("_", Arc::clone(&report));
        let start = Instant::now();
        assert_eq!(health.judge(start), Ok(()), "nothing runs yet");

        let stats = Arc::<crate::dataplane::stats::WorkerStats>::default();
        let pulse = Pulse::new("queue-0", vec![Arc::clone(&stats)]);
        let living = pulse.living();
        report.set_pulses(vec![pulse, Pulse::new("endpoint", Vec::new())]);
        assert_eq!(health.judge(start), Ok(()));
        assert_eq!(health.judge(start + THREAD_STUCK), Ok(()));
        let stuck = health
            .judge(start + THREAD_STUCK + Duration::from_secs(1))
            .unwrap_err();
        assert_eq!(stuck, "thread queue-0 of network _ has not moved for 11 s");
        stats.count(crate::dataplane::stats::Count::Sleeps, 1);
        assert_eq!(health.judge(start + THREAD_STUCK * 2), Ok(()));
        drop(living);
        assert!(health.judge(start).unwrap_err().contains("has ended"));
        health.remove("_");
        assert_eq!(health.judge(start), Ok(()));
    }

    #[test]
    fn a_loop_that_does_not_turn_is_an_illness() {
        let health = Health::new("6.1".to_owned());
        let report = Arc::new(Report::for_tests());
        health.add("blue", Arc::clone(&report));
        let now = Instant::now();
        report.set_turned();
        assert_eq!(health.judge(now + LOOP_STUCK), Ok(()));
        let stuck = health
            .judge(now + LOOP_STUCK + Duration::from_secs(2))
            .unwrap_err();
        assert!(
            stuck.starts_with("the loop of network blue has not turned"),
            "{stuck}"
        );
        report.not_ready();
        assert_eq!(health.judge(now + LOOP_STUCK * 9), Ok(()), "it starts again");
    }

    #[test]
    fn a_helper_that_has_ended_is_an_illness() {
        assert_eq!(judge_helper(helper::State::None), Ok(()));
        assert_eq!(judge_helper(helper::State::Alive), Ok(()));
        let ill = judge_helper(helper::State::Ended).unwrap_err();
        assert!(ill.contains("firewall tools has ended"), "{ill}");
    }

    #[test]
    fn it_is_ready_when_all_networks_are() {
        let health = Health::new("6.1".to_owned());
        assert_eq!(health.ready(), Err(None), "there is none");
        let reports = [Arc::new(Report::for_tests()), Arc::new(Report::for_tests())];
        health.add("a", Arc::clone(&reports[0]));
        health.add("b", Arc::clone(&reports[1]));
        reports[0].set_up();
        assert_eq!(health.ready(), Err(None));
        reports[1].set_up();
        assert_eq!(health.ready(), Ok(()));
    }

    #[test]
    fn rules_that_never_were_keep_it_from_being_ready_and_from_nothing_else() {
        let health = Health::new("6.1".to_owned());
        let report = Arc::new(Report::for_tests());
        health.add("a", Arc::clone(&report));
        report.set_rules_missing("nft refuses");
        assert_eq!(health.ready(), Err(None), "that is not all there is to wait for");
        report.set_up();
        let why = "firewall rules that were asked for cannot be made: nft refuses";
        assert_eq!(health.ready(), Err(Some(format!("network a: {why}"))));
        assert!(health.is_up());
        let status = report.status();
        assert_eq!((status.ready, status.problem.as_deref()), (false, Some(why)));

        report.set_rules_made();
        assert_eq!(health.ready(), Ok(()));
        assert_eq!(report.status().problem, None);
        // Once made they are likely still there, whatever becomes of the tool; also through a new start of the node.
        report.set_rules_missing("nft refuses");
        assert_eq!(health.ready(), Ok(()));
        report.not_ready();
        report.set_rules_missing("nft refuses");
        report.set_up();
        assert_eq!(health.ready(), Ok(()));
    }

    #[test]
    fn one_port_for_probes_and_metrics_is_one_listener() {
        let options = |ip: &str, port: u16, metrics: Option<&str>| MonitorOptions {
            healthz_ip: ip.parse().unwrap(),
            healthz_port: std::num::NonZeroU16::new(port),
            metrics_address: metrics.map(|text| text.parse().unwrap()),
        };
        let listen = |text: &str, audience| (text.parse::<SocketAddr>().unwrap(), audience);
        use Audience::{Everybody, ThisMachine};
        assert_eq!(listeners(&options("0.0.0.0", 0, None)), []);
        assert_eq!(
            listeners(&options("0.0.0.0", 0, Some("127.0.0.1:9100"))),
            [listen("127.0.0.1:9100", Everybody)]
        );
        assert_eq!(
            listeners(&options("0.0.0.0", 8081, Some("127.0.0.1:9100"))),
            [
                listen("0.0.0.0:8081", ThisMachine),
                listen("127.0.0.1:9100", Everybody)
            ]
        );
        let at = |text: &str| Audience::At(text.parse().unwrap());
        for (ip, metrics, expected) in [
            (
                "0.0.0.0",
                "127.0.0.1:8081",
                listen("0.0.0.0:8081", at("127.0.0.1")),
            ),
            ("0.0.0.0", "0.0.0.0:8081", listen("0.0.0.0:8081", Everybody)),
            ("10.0.0.1", "10.0.0.1:8081", listen("10.0.0.1:8081", Everybody)),
            // Not on every address for having been asked for on one.
            ("0.0.0.0", "10.0.0.1:8081", listen("0.0.0.0:8081", at("10.0.0.1"))),
            ("::", "10.0.0.1:8081", listen("[::]:8081", at("10.0.0.1"))),
            ("10.0.0.1", "0.0.0.0:8081", listen("0.0.0.0:8081", Everybody)),
            ("0.0.0.0", "[::]:8081", listen("[::]:8081", Everybody)),
        ] {
            assert_eq!(
                listeners(&options(ip, 8081, Some(metrics))),
                [expected],
                "{ip} {metrics}"
            );
        }
        // The IPv4 wildcard hears no IPv6.
        assert_eq!(
            listeners(&options("0.0.0.0", 8081, Some("[::1]:8081"))),
            [
                listen("0.0.0.0:8081", ThisMachine),
                listen("[::1]:8081", Everybody)
            ]
        );
    }
}
