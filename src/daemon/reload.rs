//! SIGHUP: what can change while packets flow.
//!
//! ```text
//!  SIGHUP ─▶ RELOADING=1 ─▶ command line, variables and files read again ─▶ level of log lines
//!                       └─▶ every network: its config read again ─▶ the same: nothing │ another: backend chosen again,
//!                                                                    on the same device where that fits
//!                                                                 └▶ wrong: refused, told, all stays
//!         ◀─ READY=1 when every network has answered, or has had its time for it, and is up again
//! ```
//!
//! A network that does not come up again, or was not up, keeps nobody waiting: `systemctl reload` ends in any case. Before the daemon was up for
//! the first time neither is said, for that would be taken for the end of the start.
//!
//! A config that reads well and then cannot be run (a link too small for it, a public address that is not the interface's) is given up for
//! the last one that could. Options that are read at the start only are named in the log.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::Signal;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::addr::Mtu;
use crate::backend::{AnyBackend, Backend, Underlay};
use crate::control::config::NetworkConfig;
use crate::control::store::Store;
use crate::control::{Backoff, RateLimit};
use crate::daemon::health::{Health, Reload};
use crate::daemon::judge::{runnable, tell_unread};
use crate::daemon::report::Report;
use crate::daemon::watchdog;
use crate::options::RunOptions;
use crate::server::monitor::Monitored;
use crate::status::Node;

/// How long a network's store may take to give its config.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is looked whether the networks are up again.
const LOOK: Duration = Duration::from_millis(20);
/// The longest pause between two looks for a config that is overdue.
const OVERDUE_CAP: Duration = Duration::from_secs(10);

/// Reads the options again.
pub(super) type Reread<'a> = &'a dyn Fn() -> Result<RunOptions, String>;

/// One SIGHUP, for every network to answer.
#[derive(Clone, Debug)]
struct Request {
    answers: mpsc::Sender<Reload>,
}

static REQUESTS: OnceLock<watch::Sender<Option<Request>>> = OnceLock::new();

fn requests() -> &'static watch::Sender<Option<Request>> {
    REQUESTS.get_or_init(|| watch::Sender::new(None))
}

/// Hears of reloads from now on.
pub(super) struct Requests(watch::Receiver<Option<Request>>);

impl Requests {
    pub(super) fn new() -> Self {
        let mut receiver = requests().subscribe();
        receiver.mark_unchanged();
        Self(receiver)
    }
}

/// Deals with SIGHUP for as long as the daemon runs.
pub(super) async fn serve(
    mut hangup: Signal,
    options: &RunOptions,
    reread: Reread<'_>,
    health: &Health,
) -> Infallible {
    loop {
        if hangup.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        let told = watchdog::has_told_ready();
        if told {
            let began = NotifyState::monotonic_usec_now().unwrap_or(NotifyState::MonotonicUsec(0));
            let _ = sd_notify::notify(&[NotifyState::Reloading, began]);
        }
        let were_up = health.ready().is_ok();
        let outcome = reload(options, reread, health.count()).await;
        health.count_reload(outcome);
        match outcome {
            Reload::Applied => tracing::info!("reloaded"),
            Reload::Refused => tracing::warn!("the reload was refused; all stays as it was"),
        }
        if told {
            if were_up {
                let _ = timeout(PATIENCE, until_up(health)).await;
            }
            watchdog::tell_ready(health);
        }
    }
}

async fn until_up(health: &Health) {
    while health.ready().is_err() {
        sleep(LOOK).await;
    }
}

async fn reload(options: &RunOptions, reread: Reread<'_>, networks: usize) -> Reload {
    match reread() {
        Ok(new) => {
            let changed = at_start_only(options, &new);
            if !changed.is_empty() {
                tracing::warn!(
                    changed = changed.join(", "),
                    "these options changed and are read at the start only"
                );
            }
        }
        Err(why) => {
            tracing::warn!(why, "the options are wrong now; all stays as it was");
            return Reload::Refused;
        }
    }
    let (answers, answered) = mpsc::channel(networks.max(1));
    requests().send_replace(Some(Request { answers }));
    gather(networks, answered).await
}

/// Takes the networks' answers, until all are there or their time is over.
async fn gather(networks: usize, mut answered: mpsc::Receiver<Reload>) -> Reload {
    let deadline = Instant::now() + PATIENCE * 2;
    let mut outcome = Reload::Applied;
    for _ in 0..networks {
        match timeout_at(deadline, answered.recv()).await {
            Ok(Some(Reload::Applied)) => {}
            Ok(Some(Reload::Refused) | None) | Err(_) => outcome = Reload::Refused,
        }
    }
    outcome
}

/// Waits for a reload while there is no node that could take part in it, and says that this is in order: whoever calls will read all anew.
pub(super) async fn take_note() {
    let mut requests = Requests::new();
    if requests.0.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    if let Some(request) = requests.0.borrow_and_update().as_ref() {
        // As in `new_config`.
        let _ = request.answers.try_send(Reload::Applied);
    }
}

/// The groups of options that differ, but for what changed at once.
fn at_start_only(old: &RunOptions, new: &RunOptions) -> Vec<&'static str> {
    let groups = [
        ("the store", old.store != new.store),
        ("what is served", old.serve != new.serve),
        ("the interface", old.interface != new.interface),
        ("--data-dir", old.data_dir != new.data_dir),
        ("--subnet-file", old.subnet_file != new.subnet_file),
        ("lease times", old.lease != new.lease),
        ("the packet path", old.packet_path != new.packet_path),
        ("segment routing", old.srv6 != new.srv6),
        ("--status-socket", old.status_socket != new.status_socket),
        ("the process", old.process != new.process),
        ("--log-format", old.log.format != new.log.format),
    ];
    let mut changed: Vec<_> = groups
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect();
    let rest = RunOptions {
        log: old.log,
        ..new.clone()
    };
    if changed.is_empty() && rest != *old {
        changed.push("others");
    }
    changed
}

/// A network config a node lives by.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) config: NetworkConfig,
    /// As the store had it.
    pub(super) text: String,
    /// It is of an earlier life: the store has not been heard yet.
    pub(super) cached: bool,
}

/// The config a network lives by.
pub(super) type InUse = watch::Sender<Option<Chosen>>;

pub(super) fn in_use(cell: &InUse) -> Option<Chosen> {
    cell.borrow().clone()
}

/// Waits until the store has another config than the cached one a node had to start with, one that can be run; gives it.
pub(super) async fn overdue_config(store: &Arc<dyn Store>, current: &InUse, report: &Report) -> Chosen {
    let mut changes = current.subscribe();
    let complaints = RateLimit::default();
    let mut backoff = Backoff::new(OVERDUE_CAP);
    loop {
        let is_cached = |chosen: &Option<Chosen>| chosen.as_ref().is_some_and(|chosen| chosen.cached);
        if changes.wait_for(is_cached).await.is_err() {
            std::future::pending::<()>().await;
        }
        match read(store, report).await {
            Ok(read) => {
                let same = in_use(current).is_some_and(|current| current.config == read.config);
                if !same {
                    tracing::info!("the network config has changed since this node last heard of it");
                    return read;
                }
                backoff.reset();
                current.send_replace(Some(read));
            }
            Err(why) => {
                if complaints.allows() {
                    tracing::warn!(
                        why,
                        "cannot tell whether the cached network config still holds; trying on"
                    );
                }
                tokio::time::sleep(backoff.next_pause()).await;
            }
        }
    }
}

/// Reads a config that this node could run.
async fn read(store: &Arc<dyn Store>, report: &Report) -> Result<Chosen, String> {
    match timeout(PATIENCE, store.config()).await {
        Ok(Ok(text)) => {
            let (config, backend) = runnable(&text)?;
            has_room(backend, &config, &report.status().node)?;
            tell_unread(&text, report);
            Ok(Chosen {
                config,
                text,
                cached: false,
            })
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the store does not answer".to_owned()),
    }
}

/// Waits until a reload finds another config in the store, one that can be run; gives it.
pub(super) async fn new_config(
    requests: &mut Requests,
    store: &Arc<dyn Store>,
    current: &InUse,
    report: &Report,
) -> Chosen {
    loop {
        if requests.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        let Some(request) = requests.0.borrow_and_update().clone() else {
            continue;
        };
        match read(store, report).await {
            Ok(read) => {
                // A full channel has an answer of another network too many; nobody waits for this one.
                let _ = request.answers.try_send(Reload::Applied);
                // One that is still waited for is read by whoever waits.
                if in_use(current).is_some_and(|current| current.config != read.config) {
                    tracing::info!("the network config is another now");
                    return read;
                }
            }
            Err(why) => {
                tracing::warn!(why, "cannot take the network config; the one in use stays");
                let _ = request.answers.try_send(Reload::Refused);
            }
        }
    }
}

/// Looks whether enough is left inside, on the link this node has.
fn has_room(backend: AnyBackend, config: &NetworkConfig, node: &Node) -> Result<(), String> {
    let link = match Mtu::new(node.link_mtu.into()) {
        Ok(link) => link,
        // There is none yet, and whoever waits for one will find out.
        Err(_) => return Ok(()),
    };
    let mut underlay = Underlay { v4: None, v6: None };
    for addr in node.public_ips.iter().filter_map(|text| text.parse().ok()) {
        match addr {
            IpAddr::V4(addr) => underlay.v4 = Some(addr),
            IpAddr::V6(addr) => underlay.v6 = Some(addr),
        }
    }
    let inner = match backend {
        AnyBackend::Auto(backend) => backend.settled(false).inner_mtu(link, underlay),
        AnyBackend::Udp(backend) => backend.inner_mtu(link, underlay),
        AnyBackend::Vxlan(backend) => backend.inner_mtu(link, underlay),
        // Whose room depends on paths and locators of the node.
        AnyBackend::Srv6(_) | AnyBackend::HostGw(_) | AnyBackend::Alloc(_) => return Ok(()),
    };
    let inner = inner.map_err(|error| error.to_string())?;
    if config.v6.is_some() && inner.bytes() < 1280 {
        // RFC 8200 §5
        return Err(format!("{inner} bytes are left inside, and IPv6 needs 1280"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn networks_that_do_not_answer_are_waited_for_together() {
        let start = Instant::now();
        let (answers, answered) = mpsc::channel(4);
        answers.try_send(Reload::Applied).unwrap();
        assert_eq!(gather(4, answered).await, Reload::Refused);
        assert_eq!(start.elapsed(), PATIENCE * 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_in_a_pause_answers_as_well() {
        let waiting = [tokio::spawn(take_note()), tokio::spawn(take_note())];
        tokio::task::yield_now().await;
        let start = Instant::now();
        let (answers, answered) = mpsc::channel(2);
        requests().send_replace(Some(Request { answers }));
        assert_eq!(gather(2, answered).await, Reload::Applied);
        assert_eq!(start.elapsed(), Duration::ZERO);
        for task in waiting {
            task.await.unwrap();
        }
    }

    #[test]
    fn a_config_that_leaves_too_little_inside_is_refused() {
        let node = Node {
            link_mtu: 1500,
            public_ips: vec!["192.0.2.1".to_owned()],
            ..Node::default()
        };
        let judged = |backend: &str| {
            let text = format!(
                r#"{{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{backend}}}"#
            );
            let (config, backend) = runnable(&text).unwrap();
            has_room(backend, &config, &node)
        };
        assert_eq!(judged(r#"{"Type":"vxlan"}"#), Ok(()));
        assert!(
            judged(r#"{"Type":"vxlan","MTU":1300}"#)
                .unwrap_err()
                .contains("1280")
        );
    }

    #[test]
    fn a_config_nobody_could_run_is_refused_with_a_reason() {
        assert!(runnable(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).is_ok());
        for (text, said) in [
            ("", "EOF"),
            (r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#, "SubnetLen"),
            (
                r#"{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}"#,
                "carrier-pigeon",
            ),
            (
                r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
                "VNI",
            ),
        ] {
            let why = runnable(text).unwrap_err();
            assert!(why.contains(said), "{text}: {why}");
        }
    }
}
