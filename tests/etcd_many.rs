//! F9: a thousand nodes in one etcd. Nodes see every change in time, whatever storm it comes in.
//!
//! The thousand are simulated with the product's own store; two nodes look on. `KERSEY_SOAK=1` churns for a minute. What
//! memory a daemon takes for them is looked at in namespaces, where one can run.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a test says what went wrong by panicking, and measures"
)]

mod etcd_server;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use etcd_client::{Txn, TxnOp};
use etcd_server::proxy::Proxy;
use etcd_server::{Etcd, PREFIX};
use futures_util::stream::{self, StreamExt};
use kersey::control::store::{EtcdOptions, EtcdStore, Lifetime, Registry, Store};
use kersey::control::{Control, ControlOptions, Published};
use kersey::lease::{Expiration, Lease, LeaseAttrs, Subnet};
use tokio::task::JoinHandle;
use tokio::time::{interval, sleep, timeout};

const CONFIG: &str = r#"{"Network":"10.0.0.0/12","Backend":{"Type":"udp"}}"#;
const NODES: u32 = 1000;

#[tokio::test]
async fn a_thousand_nodes_churn_storm_and_vanish() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let sim = Arc::new(etcd.store());
    let started = Instant::now();
    each(0..NODES, |i| {
        let sim = Arc::clone(&sim);
        async move {
            let created = sim.registry().create(subnet(i), &node(i, 0), Lifetime::Ttl).await;
            assert!(created.unwrap().is_some(), "{i}");
        }
    })
    .await;
    eprintln!("{NODES} nodes registered in {:?}", started.elapsed());
    let watchers = [Watcher::start(&etcd, 1).await, Watcher::start(&etcd, 2).await];
    for watcher in &watchers {
        watcher.wait("all", |table| table.len() == NODES as usize).await;
    }

    // Fifty changes a second.
    let seconds = if soak() { 60 } else { 8 };
    let written: Written = Arc::default();
    let judges: Vec<_> = watchers
        .iter()
        .map(|watcher| watcher.judge(Arc::clone(&written)))
        .collect();
    let mut ticks = interval(Duration::from_millis(20));
    for change in 0..seconds * 50 {
        ticks.tick().await;
        let (i, round) = (change * 37 % NODES, change / NODES + 1);
        let lease = lease(i, round);
        sim.renew(&lease).await.unwrap();
        written.lock().unwrap().insert(i, (round, Instant::now()));
    }
    sleep(Duration::from_secs(2)).await;
    for judge in judges {
        let mut took = judge.stop().await;
        assert!(took.len() >= (seconds * 50) as usize / 2, "{}", took.len());
        took.sort();
        let p99 = took[took.len() * 99 / 100];
        eprintln!(
            "{} changes seen, p99 {p99:?}, longest {:?}",
            took.len(),
            took[took.len() - 1]
        );
        assert!(p99 <= Duration::from_secs(1), "{p99:?}");
    }

    // All register anew at once.
    let storm = Instant::now();
    each(0..NODES, |i| {
        let sim = Arc::clone(&sim);
        async move {
            sim.renew(&lease(i, 1_000)).await.unwrap();
        }
    })
    .await;
    let over = Instant::now();
    for watcher in &watchers {
        watcher
            .wait("the storm's end", |table| {
                table.values().filter(|attrs| round_of(attrs) == 1_000).count() == NODES as usize
            })
            .await;
    }
    eprintln!("a storm of {:?} settled after {:?}", over - storm, over.elapsed());
    assert!(over.elapsed() <= Duration::from_secs(5), "{:?}", over.elapsed());

    // Half of them vanish.
    let mut client = etcd.client().await;
    for batch in 0..10 {
        let gone = (0..50)
            .map(|i| TxnOp::delete(key(batch * 50 + i), None))
            .collect::<Vec<_>>();
        client.txn(Txn::new().and_then(gone)).await.unwrap();
    }
    let vanished = Instant::now();
    for watcher in &watchers {
        watcher
            .wait("half", |table| table.len() == NODES as usize / 2)
            .await;
    }
    assert!(
        vanished.elapsed() <= Duration::from_secs(5),
        "{:?}",
        vanished.elapsed()
    );
}

/// F6: a list of several pages that breaks off, wherever it does, is no list: nobody goes for it.
#[tokio::test]
async fn a_list_that_breaks_off_anywhere_removes_nobody() {
    const LEASES: u32 = 2000;
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let mut client = etcd.client().await;
    for first in (0..LEASES).step_by(100) {
        let puts: Vec<_> = (first..first + 100)
            .map(|i| TxnOp::put(key(i), node(i, 0).to_json(), None))
            .collect();
        client.txn(Txn::new().and_then(puts)).await.unwrap();
    }
    let proxy = Proxy::before(etcd.port()).await;
    let place = EtcdOptions {
        endpoints: vec![format!("http://127.0.0.1:{}", proxy.port)],
        ..etcd.options()
    };
    let watcher = Watcher::over(EtcdStore::connect(place).unwrap(), 1, Duration::from_millis(100)).await;
    let whole = LEASES as usize;
    watcher.wait("all", |table| table.len() == whole).await;
    // Two go meanwhile. While no list is whole, nobody can know.
    let gone = [TxnOp::delete(key(7), None), TxnOp::delete(key(1_900), None)];
    let mut cuts = 0;
    for bytes in (0..24).map(|nth| 200 + nth * nth * 350) {
        proxy.cut_after(bytes);
        let made = proxy.made();
        proxy.cut();
        if cuts == 0 {
            client.txn(Txn::new().and_then(gone.to_vec())).await.unwrap();
        }
        let tried = async {
            while proxy.made() < made + 2 {
                assert_eq!(watcher.table().len(), whole, "a list of {bytes} bytes");
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(30), tried)
            .await
            .expect("it tries again");
        assert_eq!(watcher.table().len(), whole, "a list of {bytes} bytes");
        cuts += 1;
    }
    proxy.cut_after(usize::MAX);
    proxy.cut();
    watcher
        .wait("the two are gone", |table| table.len() == whole - 2)
        .await;
    eprintln!("{cuts} lists broke off; {} connections", proxy.made());
}

/// The round a node was last written in, and when that was done.
type Written = Arc<Mutex<BTreeMap<u32, (u32, Instant)>>>;

/// A node that looks on.
struct Watcher {
    published: Published,
    maintain: JoinHandle<()>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.maintain.abort();
    }
}

type Table = BTreeMap<Subnet, LeaseAttrs>;

impl Watcher {
    async fn start(etcd: &Etcd, number: u32) -> Self {
        Self::over(etcd.store(), number, ControlOptions::default().backoff_cap).await
    }

    async fn over(store: EtcdStore, number: u32, backoff_cap: Duration) -> Self {
        let options = ControlOptions {
            subnet_file: "/nonexistent/subnet.env".into(),
            backoff_cap,
            ..ControlOptions::default()
        };
        let mut control = Control::new(Arc::new(store), options);
        let config = control.network_config().await;
        let attrs =
            LeaseAttrs::from_json(format!("{{\"PublicIP\":\"198.51.100.{number}\"}}").as_bytes()).unwrap();
        let lease = control.acquire(&attrs, &config).await;
        let (publish, published) = control.channels(&config, &lease);
        Self {
            published,
            maintain: tokio::spawn(control.maintain(publish)),
        }
    }

    /// The simulated nodes in its table.
    fn table(&self) -> Table {
        let peers = self.published.peers.borrow().clone();
        let simulated = peers
            .iter()
            .filter(|(_, attrs)| attrs.public_ip.octets()[0] == 172);
        simulated
            .map(|(subnet, attrs)| (subnet, LeaseAttrs::clone(attrs)))
            .collect()
    }

    async fn wait(&self, what: &str, good: impl Fn(&Table) -> bool) {
        let waited = async {
            while !good(&self.table()) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(60), waited)
            .await
            .unwrap_or_else(|_| panic!("{what}: {} in the table", self.table().len()));
    }

    /// Notes how long after a change was written it is in the table.
    fn judge(&self, written: Written) -> Judge {
        let mut peers = self.published.peers.clone();
        let took = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&took);
        let task = tokio::spawn(async move {
            let mut seen: BTreeMap<u32, u32> = BTreeMap::new();
            loop {
                // Also without news: a change may be seen before its writer knows that it is made.
                let _ = timeout(Duration::from_millis(20), peers.changed()).await;
                let (table, now) = (peers.borrow_and_update().clone(), Instant::now());
                for (i, (round, at)) in written.lock().unwrap().iter() {
                    if seen.get(i) == Some(round) {
                        continue;
                    }
                    let there = table.get(subnet(*i));
                    if there.is_some_and(|attrs| round_of(attrs) >= *round) {
                        seen.insert(*i, *round);
                        notes.lock().unwrap().push(now.saturating_duration_since(*at));
                    }
                }
            }
        });
        Judge { task, took }
    }
}

struct Judge {
    task: JoinHandle<()>,
    took: Arc<Mutex<Vec<Duration>>>,
}

impl Judge {
    async fn stop(self) -> Vec<Duration> {
        self.task.abort();
        std::mem::take(&mut *self.took.lock().unwrap())
    }
}

/// Does something for each, fifty at a time.
async fn each<F: Future<Output = ()>>(range: std::ops::Range<u32>, act: impl Fn(u32) -> F) {
    stream::iter(range)
        .map(act)
        .buffer_unordered(50)
        .collect::<Vec<()>>()
        .await;
}

fn subnet(i: u32) -> Subnet {
    format!("10.{}.{}.0-24", 8 + i / 256, i % 256).parse().unwrap()
}

fn key(i: u32) -> String {
    format!("{PREFIX}/subnets/{}", subnet(i))
}

fn lease(i: u32, round: u32) -> Lease {
    Lease {
        subnet: subnet(i),
        attrs: node(i, round),
        expiration: Expiration::Never,
        created: None,
    }
}

fn node(i: u32, round: u32) -> LeaseAttrs {
    let ip = format!("172.16.{}.{}", i / 250, i % 250 + 1);
    let data = format!(r#"{{"PublicIP":"{ip}","BackendType":"host-gw","BackendData":{{"round":{round}}}}}"#);
    LeaseAttrs::from_json(data.as_bytes()).unwrap()
}

fn round_of(attrs: &LeaseAttrs) -> u32 {
    let data = attrs.backend_data.as_deref().unwrap_or_default();
    let number = data.trim_start_matches(r#"{"round":"#).trim_end_matches('}');
    number.parse().unwrap_or(0)
}

fn soak() -> bool {
    std::env::var_os("KERSEY_SOAK").is_some()
}
