//! Several networks in one process: which of them run, each on its own.
//!
//! ```text
//! store's networks ─watch─▶ names ∩ allow-list ─▶ one task a network: open store ─▶ node ─▶ it ended? pause, again
//!                             │ one gone                 ▲ device, files, claims of its own
//!                             └▶ its task stopped, kernel routes and file removed
//! ```
//!
//! A network has a task with everything that a node alone has: store, lease, backend, device, sockets, threads. What befalls one stays in it:
//! an error that ends it, even one that would end a process with one network, has it started anew after a pause.
//! What the host has but once is dealt out by [`claims`](super::claims).
//!
//! A watch that breaks is begun anew, as it is every five minutes in any case, and its snapshot says who may have gone meanwhile: a network
//! that runs and is not in it stays for a minute, since a store that was wiped lists none. A store that is away removes nobody. One that is away at
//! start leaves the networks of the last life, which start from their caches. A store that refuses to list its networks (a flannel server
//! before v0.5.6, an etcd role for some networks only) leaves the allow-list: all of it is taken to exist, and each waits for its config.
//!
//! `READY=1` is sent when the networks that exist at start are up. One that cannot come up must not have systemd stop the others, so after
//! [`SETTLE`] those that are up suffice.
//!
//! Limits: a fault that makes the process panic ends all of them; a config is read when its network starts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{join_all, select_all};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::Instrument;

use crate::addr::NetworkName;
use crate::control::follow::{self, Pace, RELIST};
use crate::control::store::{NetworkEvent, NetworkUpdate, Networks, StoreError};
use crate::control::{Backoff, PATIENCE, RateLimit, cache};
use crate::daemon::claims::Claims;
use crate::daemon::firewall;
use crate::daemon::node;
use crate::daemon::node::rules_name;
use crate::daemon::ports;
use crate::daemon::reload;
use crate::daemon::report::{Report, Reports};
use crate::daemon::succession;
use crate::daemon::watchdog;
use crate::daemon::withdraw::withdraw;
use crate::host::netlink::Netlink;
use crate::options::{NetworkChoice, RunOptions};

/// Longest pause before a network that ended with an error is started anew.
const RETRY: Duration = Duration::from_secs(5);
/// How long networks that do not come up keep those that did from being told.
const SETTLE: Duration = Duration::from_secs(20);

/// Runs the networks of `choice`, for ever.
pub(super) async fn run(
    options: &RunOptions,
    choice: &NetworkChoice,
    networks: Arc<dyn Networks>,
    reports: Arc<Reports>,
) {
    let mut supervisor = Supervisor {
        options,
        choice,
        claims: Arc::new(Claims::load(&options.data_dir)),
        networks: Arc::clone(&networks),
        reports,
        running: BTreeMap::new(),
    };
    ports::share();
    supervisor.begin().await;
    tokio::spawn(tell_when_up(Arc::clone(&supervisor.reports)));
    let complaints = RateLimit::default();
    let pace = Pace {
        backoff_cap: options.store.backoff_cap,
        relist: RELIST,
    };
    let running = supervisor.running.keys().cloned().collect();
    let mut updates = follow::networks(&*networks, running, pace);
    while let Some(told) = updates.next().await {
        match told {
            Ok(update) => supervisor.follow(update).await,
            Err(error) => {
                if complaints.allows() {
                    tracing::warn!(%error, "cannot watch the networks; trying on");
                }
            }
        }
    }
}

struct Supervisor<'a> {
    options: &'a RunOptions,
    choice: &'a NetworkChoice,
    networks: Arc<dyn Networks>,
    claims: Arc<Claims>,
    reports: Arc<Reports>,
    running: BTreeMap<NetworkName, Running>,
}

/// A network that runs; dropping it ends it.
struct Running {
    task: JoinHandle<()>,
    /// Its config changed: what failed may go.
    changed: Arc<Notify>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Supervisor<'_> {
    /// Starts the networks there are; without an answer, those there were, and without a listing, those asked for.
    async fn begin(&mut self) {
        let networks = Arc::clone(&self.networks);
        let allowed = self.choice.allowed.clone();
        let complaints = RateLimit::default();
        let mut backoff = Backoff::new(Duration::from_secs(1));
        let listing = async {
            loop {
                let error = match networks.watch(None).next().await {
                    Some(Ok(item)) => return item.update,
                    Some(Err(error)) => error,
                    // It never ends without a word.
                    None => continue,
                };
                if let Some(presumed) = presumed(&error, allowed.as_ref()) {
                    tracing::warn!(%error, "the store does not list its networks; those asked for are taken to exist");
                    return presumed;
                }
                if complaints.allows() {
                    tracing::warn!(%error, "waiting for the list of networks");
                }
                sleep(backoff.next_pause()).await;
            }
        };
        let known: Vec<NetworkName> = self.claims.names();
        let known: BTreeSet<NetworkName> = known
            .into_iter()
            .filter(|name| self.choice.allows(name))
            .collect();
        let listed = if known.is_empty() {
            listing.await
        } else if let Ok(listed) = timeout(PATIENCE, listing).await {
            listed
        } else {
            tracing::warn!(
                store = self.networks.place(),
                networks = join(&known),
                "the store is away: starting the networks there were"
            );
            self.start_all(&known).await;
            return;
        };
        self.follow(listed).await;
    }

    /// Makes the networks that run those that are there.
    async fn follow(&mut self, update: NetworkUpdate) {
        match update {
            NetworkUpdate::Snapshot(all) => {
                let running = self.running.keys().cloned();
                // Some may have gone before this life began.
                let known: BTreeSet<NetworkName> = running.chain(self.claims.names()).collect();
                for gone in known
                    .iter()
                    .filter(|name| !(all.contains(name) && self.choice.allows(name)))
                {
                    self.stop(gone).await;
                }
                self.start_all(&all).await;
            }
            NetworkUpdate::Events(events) => {
                for event in events {
                    match event {
                        NetworkEvent::Added(name) => {
                            if let Some(running) = self.running.get(&name) {
                                running.changed.notify_one();
                            }
                            self.start_all(&[name].into()).await;
                        }
                        NetworkEvent::Removed(name) => self.stop(&name).await,
                    }
                }
            }
        }
    }

    /// Starts those that are allowed and do not run yet.
    async fn start_all(&mut self, names: &BTreeSet<NetworkName>) {
        // Whoever has a device from before comes first, so that nobody new takes it.
        for name in names.iter().filter(|name| self.choice.allows(name)) {
            if let Some(running) = self.running.get(name)
                && !running.task.is_finished()
            {
                continue;
            }
            let device = self.device(name).await;
            tracing::info!(network = %name, device, "network started");
            let options = self.options.of_network(name, self.choice, device);
            let report = Arc::new(Report::new(&options));
            self.reports.add(name, Arc::clone(&report));
            let changed = Arc::new(Notify::new());
            let node = keep(
                name.clone(),
                options,
                Arc::clone(&self.networks),
                Arc::clone(&self.claims),
                report,
                Arc::clone(&changed),
            );
            // Shown at every level, or a line would not say which network it is about.
            let span = tracing::error_span!("network", %name);
            let task = tokio::spawn(node.instrument(span));
            self.running.insert(name.clone(), Running { task, changed });
        }
    }

    async fn device(&self, name: &NetworkName) -> String {
        let links = match Netlink::open() {
            Ok(netlink) => netlink.links().await,
            Err(error) => Err(error),
        };
        let links = links.unwrap_or_default();
        let exists = |device: &str| links.iter().any(|link| link.name == device);
        self.claims.device(name, &self.options.packet_path.device, exists)
    }

    /// Ends a network that was removed, and takes away what it leaves; its lease runs out.
    async fn stop(&mut self, name: &NetworkName) {
        match self.running.remove(name) {
            Some(mut running) => {
                running.task.abort();
                // Its device goes while it ends.
                let _ = (&mut running.task).await;
            }
            None if self.claims.names().contains(name) => {}
            // Somebody else's.
            None => return,
        }
        self.reports.remove(name);
        let device = self
            .claims
            .device(name, &self.options.packet_path.device, |_| false);
        // Also when it was removed before this life began: the service manager, or the daemon whose place this one takes, had it.
        succession::held().release(&device);
        let options = self.options.of_network(name, self.choice, device);
        firewall::withdraw(options.firewall, rules_name(&options).to_owned()).await;
        let ranges = self.claims.release(name);
        if let Err(error) = withdraw(&ranges).await {
            tracing::warn!(network = %name, %error, "kernel routes of a removed network stay; `kersey cleanup` removes them");
        }
        let data_dir = NetworkChoice::data_dir(&self.options.data_dir, name);
        // What the node is known by stays: should the network come back, so does the node.
        for file in [self.choice.subnet_file(name), data_dir.join(cache::FILE_NAME)] {
            if let Err(error) = std::fs::remove_file(&file)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(network = %name, file = %file.display(), %error, "a file of a removed network stays");
            }
        }
        tracing::info!(network = %name, "network stopped: it is gone from the store, or not asked for any more");
    }
}

/// The networks there are taken to be if the store, which answers, does not say; `None` if that cannot be known.
fn presumed(error: &StoreError, allowed: Option<&BTreeSet<NetworkName>>) -> Option<NetworkUpdate> {
    if error.is_unavailable() {
        return None;
    }
    allowed.map(|allowed| NetworkUpdate::Snapshot(allowed.clone()))
}

/// Keeps one network up: whatever ends its node, it is started again.
async fn keep(
    name: NetworkName,
    options: RunOptions,
    networks: Arc<dyn Networks>,
    claims: Arc<Claims>,
    report: Arc<Report>,
    changed: Arc<Notify>,
) {
    let mut backoff = Backoff::new(RETRY);
    let mut told = String::new();
    loop {
        let ended = match networks.open(Some(&name)) {
            Ok(store) => {
                report.set_store(store.place());
                let node = node::run(
                    options.clone(),
                    store,
                    Arc::clone(&report),
                    Some((name.clone(), Arc::clone(&claims))),
                );
                node.await
            }
            Err(error) => Err(error.into()),
        };
        let why = match ended {
            Ok(()) => "it ended".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        if why != told {
            tracing::warn!(error = why, "the network is not up; trying on");
            told.clone_from(&why);
            backoff.reset();
        }
        report.not_ready();
        report.set_problem(why);
        tokio::select! {
            () = sleep(backoff.next_pause()) => {}
            () = changed.notified() => {}
            // It reads its config in a moment, as if it were new.
            () = reload::take_note() => {}
        }
    }
}

/// A task that ends when this is dropped.
pub(super) struct Task<T>(pub(super) JoinHandle<T>);

impl<T> Drop for Task<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Tells systemd once the networks of the start are up.
async fn tell_when_up(reports: Arc<Reports>) {
    let late = until_up(&reports.all()).await;
    if !late.is_empty() {
        tracing::warn!(networks = join(&late), "not waited for any longer");
    }
    watchdog::tell_ready(reports.health());
}

/// Waits until all of `networks` are up, or after [`SETTLE`] one of them; gives those that are not.
async fn until_up(networks: &[(NetworkName, Arc<Report>)]) -> BTreeSet<NetworkName> {
    let ready = || networks.iter().map(|(_, report)| Box::pin(report.until_ready()));
    if timeout(SETTLE, join_all(ready())).await.is_ok() {
        return BTreeSet::new();
    }
    // There is one, or all would have been ready at once.
    select_all(ready()).await;
    let late = networks.iter().filter(|(_, report)| !report.is_ready());
    late.map(|(name, _)| name.clone()).collect()
}

fn join(names: &BTreeSet<NetworkName>) -> String {
    let names: Vec<&str> = names.iter().map(NetworkName::as_str).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::daemon::health::Health;

    fn networks<const N: usize>(names: [&str; N]) -> Vec<(NetworkName, Arc<Report>)> {
        let report = || Arc::new(Report::for_tests());
        names.map(|name| (name.parse().unwrap(), report())).into()
    }

    fn set_ready_after(seconds: u64, report: &Arc<Report>) {
        let report = Arc::clone(report);
        tokio::spawn(async move {
            sleep(Duration::from_secs(seconds)).await;
            report.set_up();
        });
    }

    /// Flannel's bug: `--networks` never gets anywhere with a server that does not know `GET /v1/`, as those before v0.5.6.
    #[test]
    fn a_store_that_does_not_list_its_networks_leaves_those_asked_for() {
        let refused = StoreError::Refused {
            doing: "watch the networks",
            cause: "404 Not Found: 404 page not found".to_owned(),
        };
        let away = StoreError::Unavailable {
            doing: "watch the networks",
            place: "server".to_owned(),
            cause: "connection refused".to_owned(),
        };
        let allowed: BTreeSet<NetworkName> = ["a".parse().unwrap(), "b".parse().unwrap()].into();
        let presumed = |error, allowed| super::presumed(error, allowed);
        assert_eq!(
            presumed(&refused, Some(&allowed)),
            Some(NetworkUpdate::Snapshot(allowed.clone()))
        );
        assert_eq!(presumed(&refused, None), None);
        assert_eq!(presumed(&away, Some(&allowed)), None);
    }

    #[tokio::test(start_paused = true)]
    async fn systemd_is_told_when_all_networks_of_the_start_are_up() {
        let start = Instant::now();
        assert_eq!(until_up(&[]).await, BTreeSet::new());
        assert_eq!(start.elapsed(), Duration::ZERO);
        let all = networks(["a", "b"]);
        set_ready_after(3, &all[0].1);
        set_ready_after(7, &all[1].1);
        assert_eq!(until_up(&all).await, BTreeSet::new());
        assert_eq!(start.elapsed().as_secs(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_that_does_not_come_up_does_not_keep_the_others_from_being_told() {
        let start = Instant::now();
        let all = networks(["broken", "fine"]);
        set_ready_after(1, &all[1].1);
        assert_eq!(until_up(&all).await, ["broken".parse().unwrap()].into());
        assert_eq!(start.elapsed(), SETTLE);
        // With none up, there is nothing to be told of.
        let start = Instant::now();
        let all = networks(["a", "b"]);
        set_ready_after(100, &all[0].1);
        assert_eq!(until_up(&all).await, ["b".parse().unwrap()].into());
        assert_eq!(start.elapsed().as_secs(), 100);
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_that_is_removed_meanwhile_is_not_waited_for() {
        let reports = Reports::new(Arc::new(Health::new(String::new())));
        for (name, report) in networks(["a", "gone"]) {
            reports.add(&name, report);
        }
        let all = reports.all();
        set_ready_after(2, &all[0].1);
        let start = Instant::now();
        let (late, ()) = tokio::join!(until_up(&all), async {
            sleep(Duration::from_secs(1)).await;
            reports.remove(&"gone".parse().unwrap());
        });
        assert_eq!((late, start.elapsed().as_secs()), (BTreeSet::new(), 2));
    }
}
