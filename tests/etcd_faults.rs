//! What etcd and the network to it do to a node, in one process: silence, partitions, compaction, backups.
//!
//! A proxy stands before each etcd where connections have to fall silent without being closed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd_server;

use std::collections::BTreeMap;
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, EventType, Txn, TxnOp, WatchOptions};
use etcd_server::nodes::{CONFIG, Node, fresh, node, subnet, wait};
use etcd_server::proxy::Proxy;
use etcd_server::{Cluster, Etcd, PREFIX};
use futures_util::stream::StreamExt;
use kersey::control::ControlOptions;
use kersey::control::store::{EtcdOptions, EtcdStore, Expirations, Store};
use kersey::lease::{LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep, timeout};

/// F4 (a): the connection of the watch falls silent, new ones are well.
#[tokio::test]
async fn a_watch_whose_connection_fell_silent_is_noticed_and_what_was_missed_made_good() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.2.0-24", node(2).to_json()).await;
    let proxy = Proxy::before(etcd.port()).await;
    let node = start_node(etcd.options(), &[url(proxy.port)], 1, Duration::from_secs(3600)).await;
    wait(&node.published.peers, "the peer", |peers| peers.len() == 1).await;
    proxy.silence();
    let silent = Instant::now();
    etcd.put("subnets/10.0.203.0-24", self::node(3).to_json()).await;
    etcd.delete("subnets/10.0.2.0-24").await;
    wait(&node.published.health, "the silence noticed", |health| {
        !health.connected
    })
    .await;
    assert!(
        silent.elapsed() <= Duration::from_secs(15),
        "{:?}",
        silent.elapsed()
    );
    wait(&node.published.peers, "what was missed", |peers| {
        peers.get(subnet("10.0.203.0-24")).is_some() && peers.get(subnet("10.0.2.0-24")).is_none()
    })
    .await;
    eprintln!("noticed and made good after {:?}", silent.elapsed());
    assert!(
        silent.elapsed() <= Duration::from_secs(20),
        "{:?}",
        silent.elapsed()
    );
}

/// F4 (b): of three members, the one that serves the node hangs.
#[tokio::test]
async fn a_member_that_hangs_is_left_for_another() {
    if let Some(cluster) = Cluster::start_as_wanted().await {
        the_serving_member_hangs(cluster).await;
    }
}

/// S12 and F4 (b): a user who is known to one member logs in at another.
#[tokio::test]
async fn a_member_that_hangs_is_left_for_another_that_asks_for_a_password() {
    if let Some(cluster) = Cluster::start_asking().await {
        the_serving_member_hangs(cluster).await;
    }
}

async fn the_serving_member_hangs(cluster: Cluster) {
    let mut proxies = Vec::new();
    for port in &cluster.ports {
        proxies.push(Proxy::before(*port).await);
    }
    cluster
        .client(0)
        .await
        .unwrap()
        .put(format!("{PREFIX}/config"), CONFIG, None)
        .await
        .unwrap();
    let urls: Vec<String> = proxies.iter().map(|proxy| url(proxy.port)).collect();
    let node = start_node(cluster.options(), &urls, 1, Duration::from_secs(3600)).await;
    put_lease(cluster.client(0).await.unwrap(), 2).await;
    wait(&node.published.peers, "the peer", |peers| peers.len() == 1).await;
    // Those asked at the start and not chosen are let go.
    let only_one = async {
        while proxies.iter().filter(|proxy| proxy.open() > 0).count() != 1 {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(20), only_one)
        .await
        .expect("more than one member is spoken to");
    let serving = proxies.iter().position(|proxy| proxy.open() > 0).unwrap();
    cluster.signal(serving, Signal::SIGSTOP);
    let stopped = Instant::now();
    // The others elect a leader first, if it was that.
    let other = (serving + 1) % 3;
    let written = async {
        loop {
            let put = async {
                let mut client = cluster.client(other).await.ok()?;
                client
                    .put(
                        format!("{PREFIX}/subnets/10.0.203.0-24"),
                        self::node(3).to_json(),
                        None,
                    )
                    .await
                    .ok()
            };
            if let Ok(Some(_)) = timeout(Duration::from_secs(2), put).await {
                return;
            }
        }
    };
    written.await;
    wait(&node.published.peers, "the new peer", |peers| peers.len() == 2).await;
    eprintln!("another member serves after {:?}", stopped.elapsed());
    assert!(
        stopped.elapsed() <= Duration::from_secs(20),
        "{:?}",
        stopped.elapsed()
    );
    cluster.signal(serving, Signal::SIGCONT);
}

/// F4 (c): a member that has lost its quorum answers pings and knows nothing.
#[tokio::test]
async fn a_member_without_a_quorum_is_no_company() {
    let Some(cluster) = Cluster::start_as_wanted().await else {
        return;
    };
    cluster
        .client(0)
        .await
        .unwrap()
        .put(format!("{PREFIX}/config"), CONFIG, None)
        .await
        .unwrap();
    // The node knows of one member only; the two others hang.
    let node = start_node(
        cluster.options(),
        &[url(cluster.ports[0])],
        1,
        Duration::from_secs(3600),
    )
    .await;
    wait(&node.published.health, "the store", |health| health.connected).await;
    for other in [1, 2] {
        cluster.signal(other, Signal::SIGSTOP);
    }
    let stopped = Instant::now();
    wait(&node.published.health, "the lost quorum noticed", |health| {
        !health.connected
    })
    .await;
    eprintln!("a lost quorum is noticed after {:?}", stopped.elapsed());
    assert!(
        stopped.elapsed() <= Duration::from_secs(15),
        "{:?}",
        stopped.elapsed()
    );
    for other in [1, 2] {
        cluster.signal(other, Signal::SIGCONT);
    }
    let back = Instant::now();
    wait(&node.published.health, "the quorum back", |health| {
        health.connected
    })
    .await;
    assert!(back.elapsed() <= Duration::from_secs(8), "{:?}", back.elapsed());
}

/// F2: one node is cut off for longer than its lease lives.
#[tokio::test]
async fn a_node_cut_off_for_longer_than_its_lease_gets_its_subnet_back_or_another() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let ttl = Duration::from_secs(3);
    let mut proxies = Vec::new();
    let mut nodes = Vec::new();
    for i in 1..=2 {
        let proxy = Proxy::before(etcd.port()).await;
        nodes.push(start_node(etcd.options(), &[url(proxy.port)], i, ttl).await);
        proxies.push(proxy);
    }
    for node in &nodes {
        wait(&node.published.peers, "each other", |peers| peers.len() == 1).await;
    }
    let (own, lost) = (nodes[0].lease.subnet, nodes[1].lease.subnet);
    for proxy in &proxies {
        proxy.silence_all();
    }
    for subnet in [own, lost] {
        wait_gone(&etcd, subnet).await;
    }
    // A stranger moves into what was the second node's.
    etcd.put(&format!("subnets/{lost}"), node(66).to_json()).await;
    assert_eq!(
        nodes[0].published.peers.borrow().len(),
        1,
        "a node forgot its peer while it was cut off"
    );
    assert!(!nodes[0].maintain.is_finished() && !nodes[1].maintain.is_finished());
    for proxy in &proxies {
        proxy.cut();
        proxy.heal();
    }
    let healed = Instant::now();
    wait_value(&etcd, own, &node(1)).await;
    eprintln!("own subnet claimed again after {:?}", healed.elapsed());
    assert!(
        healed.elapsed() <= Duration::from_secs(3),
        "{:?}",
        healed.elapsed()
    );
    wait(&nodes[1].published.lease, "another subnet", |lease| {
        lease.subnet != lost
    })
    .await;
    wait_value(&etcd, lost, &node(66)).await;
    assert_eq!(nodes[0].published.lease.borrow().subnet, own);
    assert_one_owner_at_every_revision(&etcd).await;
}

/// F3, and B8 and B9 of the list of upstream bugs: everything changes in a gap that is compacted away.
#[tokio::test]
async fn what_changed_in_a_gap_that_was_compacted_is_seen_changes_and_removals_too() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let mut client = etcd.client().await;
    for i in 2..=101 {
        client.put(key(i), node(i).to_json(), None).await.unwrap();
    }
    let proxy = Proxy::before(etcd.port()).await;
    let node = start_node(etcd.options(), &[url(proxy.port)], 1, Duration::from_secs(3600)).await;
    wait(&node.published.peers, "100 peers", |peers| peers.len() == 100).await;
    let mut peers = node.published.peers.clone();
    peers.mark_unchanged();
    proxy.silence();
    for round in 0..10 {
        for i in 2..=101 {
            if i % 10 == round {
                client.delete(key(i), None).await.unwrap();
            }
            // The same subnet behind another address; and new ones.
            client
                .put(key(i), self::node(i + 100).to_json(), None)
                .await
                .unwrap();
        }
    }
    for i in [5, 6, 7] {
        client.delete(key(i), None).await.unwrap();
    }
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    proxy.cut();
    let back = Instant::now();
    wait(&node.published.peers, "the truth", |peers| {
        peers.len() == 97 && (8..=101).all(|i| peers.get(lease_of(i)) == Some(&self::node(i + 100)))
    })
    .await;
    eprintln!("the truth after {:?}", back.elapsed());
    assert!(back.elapsed() <= Duration::from_secs(2), "{:?}", back.elapsed());
    // One list did it, and our own lease was no part of the change.
    let lists = etcd.requests("Range");
    sleep(Duration::from_secs(3)).await;
    assert_eq!(etcd.requests("Range"), lists, "the node lists on and on");
    assert_eq!(node.published.lease.borrow().subnet, node.lease.subnet);
    assert!(node.published.peers.borrow().get(node.lease.subnet).is_none());
}

/// F7: etcd comes back with what it knew some time ago.
#[tokio::test]
async fn after_a_backup_is_restored_all_nodes_register_anew_and_nobody_is_lost() {
    let Some(mut etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let urls = [etcd.url()];
    let first = start_node(etcd.options(), &urls, 1, Duration::from_secs(3600)).await;
    // The backup: one node, and the config.
    let kept = tempfile::tempdir().unwrap();
    etcd.stop();
    etcd.backup(kept.path());
    etcd.restart().await;
    let mut nodes = vec![first];
    for i in 2..=4 {
        nodes.push(start_node(etcd.options(), &urls, i, Duration::from_secs(3600)).await);
    }
    for i in 0..50 {
        etcd.put("unrelated", format!("{i}")).await;
    }
    for node in &nodes {
        wait(&node.published.peers, "3 peers", |peers| peers.len() == 3).await;
    }
    etcd.stop();
    etcd.restore(kept.path());
    etcd.restart().await;
    let back = Instant::now();
    for node in &nodes {
        wait_value(&etcd, node.lease.subnet, &node.lease.attrs).await;
    }
    eprintln!("all registered again after {:?}", back.elapsed());
    assert!(back.elapsed() <= Duration::from_secs(10), "{:?}", back.elapsed());
    for node in &nodes {
        wait(&node.published.peers, "nothing held", |peers| peers.held() == 0).await;
        assert_eq!(node.published.peers.borrow().len(), 3);
        assert_eq!(node.published.lease.borrow().subnet, node.lease.subnet);
        // Whoever is in the backup is registered before it has looked.
        let noticed = async {
            while node.store.resets() == 0 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let noticed = timeout(Duration::from_secs(10), noticed).await;
        assert!(noticed.is_ok(), "nobody noticed");
    }
}

/// F7: another cluster answers at the place.
#[tokio::test]
async fn another_cluster_at_the_same_place_is_noticed() {
    let Some(mut etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let node = start_node(etcd.options(), &[etcd.url()], 1, Duration::from_secs(3600)).await;
    assert_eq!(node.store.resets(), 0);
    etcd.crash();
    etcd.restart().await;
    wait(&node.published.health, "etcd back", |health| health.connected).await;
    assert_eq!(node.store.resets(), 0, "a restart is no reset");
    etcd.crash();
    etcd.wipe();
    etcd.add_flags(&["--initial-cluster-token", "another"]);
    etcd.restart().await;
    // Longer in its history than the first, so that only its name tells.
    for i in 0..50 {
        etcd.put("unrelated", format!("{i}")).await;
    }
    wait_value(&etcd, node.lease.subnet, &node.lease.attrs).await;
    assert!(node.store.resets() >= 1);
}

/// B13: of several events in one answer flannel v0.18 to v0.21.2 take one.
#[tokio::test]
async fn all_events_of_one_answer_count() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let store = etcd.store();
    let mut watch = store.watch(None);
    watch.next().await.unwrap().unwrap();
    let puts: Vec<_> = (2..=101)
        .map(|i| TxnOp::put(key(i), node(i).to_json(), None))
        .collect();
    etcd.client().await.txn(Txn::new().and_then(puts)).await.unwrap();
    let item = timeout(Duration::from_secs(5), watch.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let LeaseUpdate::Events(events) = item.update else {
        panic!("{item:?}")
    };
    assert_eq!(events.len(), 100);
    assert!(events.iter().all(|event| matches!(event, LeaseEvent::Added(_))));
    // And the watch goes on behind them, also when it is resumed there.
    etcd.delete("subnets/10.0.2.0-24").await;
    let gone = LeaseUpdate::Events(vec![LeaseEvent::Removed(subnet("10.0.2.0-24"))]);
    assert_eq!(
        timeout(Duration::from_secs(5), watch.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .update,
        gone
    );
    let mut resumed = store.watch(Some(item.cursor));
    assert_eq!(
        timeout(Duration::from_secs(5), resumed.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .update,
        gone
    );
}

/// B11 and B12: flannel leaves an etcd lease behind at each restart, and asks for the end of each lease it lists.
#[tokio::test]
async fn a_node_leaves_no_etcd_leases_behind_and_asks_for_no_ones_end() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    for i in 2..=101 {
        put_lease(etcd.client().await, i).await;
    }
    let ttl = EtcdOptions {
        ttl: Duration::from_secs(600),
        ..etcd.options()
    };
    let mut lease = None;
    for _ in 0..3 {
        // A restart each.
        let store = EtcdStore::connect(ttl.clone()).unwrap();
        let acquired = store.acquire(&node(1), None).await.unwrap();
        lease = Some(store.renew(&acquired).await.unwrap());
    }
    let mut client = etcd.client().await;
    // One each of the others', and one of ours.
    assert_eq!(client.leases().await.unwrap().leases().len(), 100 + 1);
    let id = etcd
        .dump()
        .await
        .iter()
        .find(|(key, ..)| key.ends_with(&lease.as_ref().unwrap().subnet.to_string()))
        .unwrap()
        .2;
    assert_eq!(
        client.lease_time_to_live(id, None).await.unwrap().granted_ttl(),
        600
    );
    let store = EtcdStore::connect(ttl).unwrap();
    store.config().await.unwrap();
    let asked = || (etcd.requests("Range"), etcd.requests("LeaseTimeToLive"));
    let before = asked();
    let item = store.watch(None).next().await.unwrap().unwrap();
    let LeaseUpdate::Snapshot(listed) = item.update else {
        panic!("{item:?}")
    };
    assert_eq!(listed.len(), 101);
    assert_eq!(
        asked(),
        (before.0 + 1, before.1),
        "a hundred and one leases by one request"
    );
    // A key that shares an etcd lease with others is moved without harm to them.
    let shared = client.lease_grant(600, None).await.unwrap().id();
    let options = Some(etcd_client::PutOptions::new().with_lease(shared));
    client
        .put(key(1), node(201).to_json(), options.clone())
        .await
        .unwrap();
    client.put("/elsewhere", "x", options).await.unwrap();
    store.acquire(&node(201), None).await.unwrap();
    assert_eq!(client.get("/elsewhere", None).await.unwrap().kvs().len(), 1);
}

/// B0: one failed question about a lease's end makes flannel drop all peers.
#[tokio::test]
async fn a_lease_whose_end_cannot_be_asked_is_a_lease() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.2.0-24", node(2).to_json()).await;
    put_lease(etcd.client().await, 3).await;
    let store = EtcdStore::connect(EtcdOptions {
        expirations: Expirations::Ask,
        ..etcd.options()
    })
    .unwrap();
    let mut watch = store.watch(None);
    watch.next().await.unwrap().unwrap();
    // The etcd lease is gone before it can be asked about: put and revoked in one go.
    let mut client = etcd.client().await;
    let id = client.lease_grant(600, None).await.unwrap().id();
    let options = Some(etcd_client::PutOptions::new().with_lease(id));
    client.put(key(4), node(4).to_json(), options).await.unwrap();
    client.lease_revoke(id).await.unwrap();
    let mut told = Vec::new();
    while told.len() < 2 {
        let item = timeout(Duration::from_secs(5), watch.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let LeaseUpdate::Events(events) = item.update else {
            panic!("a snapshot: {item:?}")
        };
        told.extend(events);
    }
    assert!(matches!(&told[0], LeaseEvent::Added(lease) if lease.subnet == lease_of(4)));
    assert_eq!(told[1], LeaseEvent::Removed(lease_of(4)));
}

/// B5: with IPv6 only, flannel's nodes all take the first one's lease, and a lease of everything stops it for ever.
#[tokio::test]
async fn nodes_without_ipv4_have_a_lease_each_even_beside_a_lease_of_everything() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    let config = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;
    etcd.put("config", config).await;
    let six =
        |i: u8| LeaseAttrs::from_json(format!("{{\"PublicIPv6\":\"2001:db8::{i}\"}}").as_bytes()).unwrap();
    let mut subnets = Vec::new();
    for i in 1..=3 {
        subnets.push(etcd.store().acquire(&six(i), None).await.unwrap().subnet);
    }
    subnets.sort();
    subnets.dedup();
    assert_eq!(subnets.len(), 3);
    etcd.put("subnets/0.0.0.0-0", node(9).to_json()).await;
    let (store, attrs) = (etcd.store(), six(4));
    let fourth = timeout(Duration::from_secs(5), store.acquire(&attrs, None)).await;
    assert!(fourth.expect("the allocation does not end").is_ok());
    // The same with IPv4, where it covers everything indeed.
    etcd.put("config", CONFIG).await;
    let attrs = node(1);
    let refused = timeout(Duration::from_secs(5), store.acquire(&attrs, None)).await;
    let error = refused.expect("the allocation does not end").unwrap_err();
    assert!(error.to_string().contains("out of subnets"), "{error}");
}

/// Looks through all of etcd's history for two leases that overlap at one time.
async fn assert_one_owner_at_every_revision(etcd: &Etcd) {
    let mut client = etcd.client().await;
    let last = client.get("x", None).await.unwrap().header().unwrap().revision();
    let options = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut stream = client
        .watch(format!("{PREFIX}/subnets/"), Some(options))
        .await
        .unwrap();
    let mut held: BTreeMap<Subnet, String> = BTreeMap::new();
    let mut reached = 0;
    while reached < last {
        let Ok(answer) = timeout(Duration::from_secs(2), stream.message()).await else {
            break;
        };
        for event in answer.unwrap().unwrap().events() {
            let kv = event.kv().unwrap();
            reached = kv.mod_revision();
            let name = kv.key_str().unwrap().rsplit('/').next().unwrap().to_owned();
            let subnet: Subnet = name.parse().unwrap();
            match event.event_type() {
                EventType::Delete => {
                    held.remove(&subnet);
                }
                EventType::Put => {
                    let owner = kv.value_str().unwrap().to_owned();
                    for (other, other_owner) in &held {
                        assert!(
                            *other == subnet || !other.overlaps(subnet),
                            "{subnet} of {owner} over {other} of {other_owner} at {reached}"
                        );
                    }
                    // Nobody's key passes to somebody else without having been free.
                    let before = held.insert(subnet, owner.clone());
                    assert!(
                        before.is_none_or(|before| before == owner),
                        "{subnet} changed hands at {reached}"
                    );
                }
            }
        }
    }
}

/// Starts node `i`, which reaches etcd at `urls`.
async fn start_node(etcd: EtcdOptions, urls: &[String], i: u8, ttl: Duration) -> Node {
    let etcd = EtcdOptions {
        endpoints: urls.to_vec(),
        ttl,
        ..etcd
    };
    let options = ControlOptions {
        renew_margin: ttl / 3,
        ..fresh()
    };
    Node::start(etcd, i, options).await
}

async fn wait_value(etcd: &Etcd, subnet: Subnet, attrs: &LeaseAttrs) {
    let there = async {
        while value(etcd, subnet).await.as_deref() != Some(&attrs.to_json()) {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(20), there)
        .await
        .unwrap_or_else(|_| panic!("{subnet} is not {attrs:?}"));
}

async fn wait_gone(etcd: &Etcd, subnet: Subnet) {
    let gone = async {
        while value(etcd, subnet).await.is_some() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(20), gone)
        .await
        .unwrap_or_else(|_| panic!("{subnet} does not end"));
}

async fn value(etcd: &Etcd, subnet: Subnet) -> Option<String> {
    let key = format!("{PREFIX}/subnets/{subnet}");
    let answer = etcd.client().await.get(key, None).await.unwrap();
    answer.kvs().first().map(|kv| kv.value_str().unwrap().to_owned())
}

/// Puts the lease of a node as flannel does.
async fn put_lease(mut client: Client, i: u8) {
    let id = client.lease_grant(86_400, None).await.unwrap().id();
    let options = etcd_client::PutOptions::new().with_lease(id);
    let absent = Compare::version(key(i), CompareOp::Equal, 0);
    let put = TxnOp::put(key(i), node(i).to_json(), Some(options));
    client
        .txn(Txn::new().when([absent]).and_then([put]))
        .await
        .unwrap();
}

fn key(i: u8) -> String {
    format!("{PREFIX}/subnets/10.0.{i}.0-24")
}

fn lease_of(i: u8) -> Subnet {
    subnet(&format!("10.0.{i}.0-24"))
}

fn url(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}
