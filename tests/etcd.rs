//! Kersey against a real etcd: flannel's bytes, races, rot, compaction, crashes and black holes.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd_server;

use std::collections::BTreeSet;
use std::time::Duration;

use etcd_client::PutOptions;
use etcd_server::nodes::{CONFIG, Node, fresh, node, subnet, wait};
use etcd_server::proxy::Proxy;
use etcd_server::{Etcd, PREFIX};
use futures_util::stream::StreamExt;
use kersey::control::ControlOptions;
use kersey::control::store::{EtcdOptions, EtcdStore, Expirations, Store, StoreError};
use kersey::lease::{Expiration, LeaseAttrs, LeaseUpdate, Subnet};
use nix::sys::signal::Signal;
use tokio::time::{Instant, timeout};

/// Exactly 32 subnets.
const SMALL: &str = r#"{"Network":"10.0.0.0/24","SubnetLen":29,"SubnetMin":"10.0.0.0"}"#;

/// As captured from flannel v0.28.9.
const FLANNEL: &str = r#"{"PublicIP":"10.50.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":100,"VtepMAC":"4a:5b:ac:d9:d3:c7"}}"#;

#[tokio::test]
async fn what_is_written_is_flannels_to_the_byte() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let attrs = LeaseAttrs::from_json(FLANNEL.as_bytes()).unwrap();
    etcd.store()
        .acquire(&attrs, Some(subnet("10.0.61.0-24")))
        .await
        .unwrap();
    let dual = r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}"#;
    etcd.put("config", dual).await;
    let previous = subnet("10.0.62.0-24&fd00:10:244:44::-64");
    etcd.store().acquire(&node(7), Some(previous)).await.unwrap();
    let dump = etcd.dump().await;
    let keys: Vec<_> = dump
        .iter()
        .map(|(key, value, _)| (key.as_str(), value.as_str()))
        .collect();
    let seven = r#"{"PublicIP":"192.0.2.7","PublicIPv6":null}"#;
    assert_eq!(
        keys,
        [
            ("/coreos.com/network/config", dual),
            ("/coreos.com/network/subnets/10.0.61.0-24", FLANNEL),
            (
                "/coreos.com/network/subnets/10.0.62.0-24&fd00:10:244:44::-64",
                seven
            ),
        ]
    );
    let lease = dump[1].2;
    assert_ne!(lease, 0);
    let mut client = etcd.client().await;
    assert_eq!(
        client
            .lease_time_to_live(lease, None)
            .await
            .unwrap()
            .granted_ttl(),
        86_400
    );
}

#[tokio::test]
async fn a_lease_flannel_wrote_is_used() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let mut client = etcd.client().await;
    let grant = client.lease_grant(86_400, None).await.unwrap();
    let options = PutOptions::new().with_lease(grant.id());
    let key = format!("{PREFIX}/subnets/10.0.9.0-24");
    client.put(key, FLANNEL, Some(options)).await.unwrap();
    let attrs = LeaseAttrs::from_json(br#"{"PublicIP":"10.50.0.2"}"#).unwrap();
    let lease = etcd.store().acquire(&attrs, None).await.unwrap();
    assert_eq!(lease.subnet, subnet("10.0.9.0-24"));
    assert_eq!(etcd.dump().await.len(), 2);
}

#[tokio::test]
async fn an_old_lease_that_no_longer_fits_is_given_up() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", r#"{"Network":"10.9.0.0/16"}"#).await;
    let store = etcd.store();
    store.acquire(&node(1), None).await.unwrap();
    etcd.put("config", CONFIG).await;
    let lease = store.acquire(&node(1), None).await.unwrap();
    assert!(lease.subnet.to_string().starts_with("10.0."), "{lease:?}");
    assert_eq!(etcd.dump().await.len(), 2);
}

#[tokio::test]
async fn thirty_two_daemons_claim_thirty_two_subnets() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", SMALL).await;
    let claims = (1..=32).map(|i| {
        let store = etcd.store();
        tokio::spawn(async move {
            loop {
                match store.acquire(&node(i), None).await {
                    Ok(lease) => return lease.subnet,
                    Err(error) => assert!(error.to_string().contains("faster"), "{error}"),
                }
            }
        })
    });
    let claimed = futures_util::future::join_all(claims).await;
    let subnets: BTreeSet<_> = claimed.into_iter().map(Result::unwrap).collect();
    assert_eq!(subnets.len(), 32);
    let error = etcd.store().acquire(&node(33), None).await.unwrap_err();
    assert!(error.to_string().contains("out of subnets"), "{error}");
}

/// F8, and B1 of the list of upstream bugs: flannel exits when it loses a race.
#[tokio::test]
async fn races_for_subnets_have_one_winner_each_and_are_over_soon() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    // A hundred rounds of each; who waits for the test gets fewer.
    let ci = std::env::var("CI").as_deref() == Ok("true");
    let all = ci || std::env::var_os("KERSEY_SOAK").is_some();
    let mut took = Vec::new();
    for (claimers, rounds) in [(2, if all { 100 } else { 20 }), (32, if all { 100 } else { 3 })] {
        // As many subnets as there are claimers.
        let config = match claimers {
            2 => r#"{"Network":"10.0.0.0/24","SubnetLen":26,"SubnetMin":"10.0.0.0","SubnetMax":"10.0.0.64"}"#,
            _ => SMALL,
        };
        etcd.put("config", config).await;
        for round in 0..rounds {
            let claims = (1..=claimers).map(|i| {
                let store = etcd.store();
                tokio::spawn(async move {
                    // The connection is there: what is measured is the claim.
                    store.config().await.unwrap();
                    let start = Instant::now();
                    loop {
                        match store.acquire(&node(i), None).await {
                            Ok(lease) => return (lease.subnet, start.elapsed()),
                            Err(error) => assert!(error.to_string().contains("faster"), "{error}"),
                        }
                    }
                })
            });
            let claimed = futures_util::future::join_all(claims).await;
            let mut subnets = BTreeSet::new();
            for (subnet, duration) in claimed.into_iter().map(Result::unwrap) {
                assert!(subnets.insert(subnet), "{subnet} has two owners in round {round}");
                took.push(duration);
            }
            for subnet in subnets {
                etcd.delete(&format!("subnets/{subnet}")).await;
            }
        }
    }
    took.sort();
    let p99 = took[took.len() * 99 / 100];
    eprintln!(
        "{} claims, p99 {p99:?}, longest {:?}",
        took.len(),
        took[took.len() - 1]
    );
    assert!(p99 <= Duration::from_secs(1), "{p99:?}");
}

#[tokio::test]
async fn a_reservation_survives_restarts() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.40.0-24", r#"{"PublicIP":"192.0.2.1"}"#)
        .await;
    for _ in 0..2 {
        let lease = etcd.store().acquire(&node(1), None).await.unwrap();
        assert_eq!(
            (lease.subnet, lease.expiration),
            (subnet("10.0.40.0-24"), Expiration::Never)
        );
        assert_eq!(etcd.dump().await[1].2, 0, "the reservation has got an end");
    }
}

/// F5, and B0 of the list of upstream bugs: one such key makes flannel drop all its peers.
#[tokio::test]
async fn rotten_keys_touch_no_peer() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    for i in 2..=30 {
        etcd.put(&format!("subnets/10.0.{i}.0-24"), node(i).to_json())
            .await;
    }
    let node = start_node(&etcd, 1, None).await;
    wait(&node.published.peers, "29 peers", |peers| peers.len() == 29).await;
    let mut peers = node.published.peers.clone();
    let good = r#"{"PublicIP":"192.0.2.200"}"#;
    let rotten: Vec<(&str, Vec<u8>)> = vec![
        ("subnets/", good.into()),
        ("subnets/x", good.into()),
        ("subnets/10.0.2.0", good.into()),
        ("subnets/10.0.2.0-32", good.into()),
        ("subnets/10.0.2.0-24/", good.into()),
        ("subnets/10.0.2.0-24/../10.0.3.0-24", good.into()),
        ("subnets/10.0.2.0-24\n", good.into()),
        ("subnets/10.0.2.0-24\0", good.into()),
        ("subnets/10.0.2.0-24;reboot", good.into()),
        ("subnets/$(reboot)", good.into()),
        ("subnets/fd00::-64", good.into()),
        ("subnets/10.0.2.0-24&FD00::-64", good.into()),
        ("subnets/10.0.2.7-24", good.into()),
        ("subnets/010.0.2.0-24", good.into()),
        ("subnets/10.0.200.0-24", vec![]),
        ("subnets/10.0.201.0-24", b"null".to_vec()),
        ("subnets/10.0.202.0-24", b"{".to_vec()),
        ("subnets/10.0.203.0-24", b"\xff\xfe".to_vec()),
        ("subnets/10.0.204.0-24", br#"{"PublicIP":null}"#.to_vec()),
        ("subnets/10.0.205.0-24", br#"{"PublicIP":"x"}"#.to_vec()),
        ("subnets/10.0.206.0-24", br#"{"PublicIP":"192.0.2.9"} x"#.to_vec()),
        ("subnets/10.0.207.0-24", vec![b'{'; 1 << 20]),
        ("subnets/10.0.208.0-24", "[".repeat(50_000).into_bytes()),
        ("subnets/10.0.2.0-24 ", good.into()),
        ("subnets/ 10.0.2.0-24", good.into()),
        ("subnets/10.0.2.0-24\t", good.into()),
        ("subnets/10.0.2.0_24", good.into()),
        ("subnets/10.0.2.0-24%00", good.into()),
        ("subnets/10.0.2.0-", good.into()),
        ("subnets/-24", good.into()),
        ("subnets/10.0.2.0-24-24", good.into()),
        ("subnets/10.0.2-24", good.into()),
        ("subnets/256.0.2.0-24", good.into()),
        ("subnets/10.0.2.0-+24", good.into()),
        ("subnets/10.0.2.0-024", good.into()),
        ("subnets/10.0.2.0-24&", good.into()),
        ("subnets/10.0.2.0-24&fd00::", good.into()),
        ("subnets/10.0.2.0-24&fd00::-128", good.into()),
        ("subnets/10.0.2.0-24&fd00:0:0::-64", good.into()),
        ("subnets/10.0.2.0-24/config", good.into()),
        ("subnets/\u{202e}10.0.2.0-24", good.into()),
        ("subnets/１０.0.2.0-24", good.into()),
        ("subnets/10.0.209.0-24", b"[]".to_vec()),
        ("subnets/10.0.210.0-24", b"7".to_vec()),
        ("subnets/10.0.211.0-24", br#"{"PublicIP":7}"#.to_vec()),
        (
            "subnets/10.0.212.0-24",
            br#"{"PublicIP":"192.0.2.9","PublicIPv6":""}"#.to_vec(),
        ),
        (
            "subnets/10.0.213.0-24",
            br#"{"PublicIP":"192.0.2.9","BackendType":[]}"#.to_vec(),
        ),
        ("subnets/10.0.214.0-24", br#"{"PublicIP":"192.0.2.256"}"#.to_vec()),
        ("subnets/10.0.215.0-24", br#"{"PublicIP":"fd00::1"}"#.to_vec()),
        // A good peer's value goes bad: the peer stays as it was.
        ("subnets/10.0.5.0-24", b"rot".to_vec()),
    ];
    assert!(rotten.len() >= 50, "{}", rotten.len());
    let count = rotten.len() as u64;
    for (key, value) in rotten {
        etcd.put(key, value).await;
    }
    // These do not even look like ours.
    etcd.put("subnets-old/10.0.2.0-24", "x").await;
    etcd.put("subnetsX", "x").await;
    let counted = async {
        while node.store.skipped() < count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), counted)
        .await
        .expect("a rotten key was not counted");
    assert_eq!(node.store.skipped(), count);
    etcd.put("subnets/10.0.231.0-24", self::node(31).to_json()).await;
    wait(&node.published.peers, "the 30th peer", |peers| peers.len() == 30).await;
    assert!(peers.borrow_and_update().get(subnet("10.0.5.0-24")).is_some());
    // The peer whose value went bad is still one after the next list; for who never knew it, its subnet is taken.
    let listed = node.store.watch(None).next().await.unwrap().unwrap();
    assert!(
        listed.unreadable.contains(&subnet("10.0.5.0-24")),
        "{:?}",
        listed.unreadable
    );
    let lease = etcd
        .store()
        .acquire(&self::node(91), Some(subnet("10.0.5.0-24")))
        .await
        .unwrap();
    assert_ne!(lease.subnet, subnet("10.0.5.0-24"));
    etcd.delete(&format!("subnets/{}", lease.subnet)).await;
    wait(&node.published.peers, "the 30 peers again", |peers| {
        peers.len() == 30
    })
    .await;
    // A second node lists what the first one watched.
    let second = start_node(&etcd, 90, None).await;
    wait(&second.published.peers, "all readable peers", |peers| {
        peers.len() == 30
    })
    .await;
    assert_eq!(peers.borrow_and_update().len(), 31);
}

#[tokio::test]
async fn a_compaction_in_a_gap_is_bridged_by_a_snapshot() {
    let Some(mut etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    for i in 2..=9 {
        etcd.put(&format!("subnets/10.0.{i}.0-24"), node(i).to_json())
            .await;
    }
    let store = etcd.store();
    let cursor = store.watch(None).next().await.unwrap().unwrap().cursor;
    let running = start_node(&etcd, 1, None).await;
    wait(&running.published.peers, "8 peers", |peers| peers.len() == 8).await;
    etcd.put("subnets/10.0.2.0-24", node(102).to_json()).await;
    etcd.delete("subnets/10.0.3.0-24").await;
    etcd.put("subnets/10.0.210.0-24", node(10).to_json()).await;
    let mut client = etcd.client().await;
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    // A cursor from before is answered by a snapshot, which holds changes and deletions.
    let item = store.watch(Some(cursor)).next().await.unwrap().unwrap();
    let LeaseUpdate::Snapshot(leases) = item.update else {
        panic!("{item:?}")
    };
    let told = |key: &str| {
        leases
            .iter()
            .find(|lease| lease.subnet == subnet(key))
            .map(|lease| &lease.attrs)
    };
    assert_eq!(told("10.0.2.0-24"), Some(&node(102)));
    assert_eq!(told("10.0.3.0-24"), None);
    assert_eq!(told("10.0.210.0-24"), Some(&node(10)));
    // A running node comes to the same end over a restart of etcd.
    etcd.crash();
    etcd.restart().await;
    wait(&running.published.peers, "the same state", |peers| {
        peers.len() == 8
            && peers.get(subnet("10.0.2.0-24")) == Some(&node(102))
            && peers.get(subnet("10.0.3.0-24")).is_none()
    })
    .await;
}

#[tokio::test]
async fn a_crash_of_etcd_costs_no_peer_and_is_over_within_five_seconds() {
    let Some(mut etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.2.0-24", node(2).to_json()).await;
    etcd.put("subnets/10.0.3.0-24", node(3).to_json()).await;
    let running = start_node(&etcd, 1, None).await;
    wait(&running.published.peers, "2 peers", |peers| peers.len() == 2).await;
    let mut peers = running.published.peers.clone();
    peers.mark_unchanged();
    etcd.crash();
    wait(&running.published.health, "the outage seen", |health| {
        !health.connected
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(
        !peers.has_changed().unwrap(),
        "the table changed while the store was away"
    );
    etcd.restart().await;
    etcd.put("subnets/10.0.4.0-24", node(4).to_json()).await;
    let back = Instant::now();
    wait(&running.published.peers, "the new peer", |peers| peers.len() == 3).await;
    assert!(back.elapsed() < Duration::from_secs(5), "{:?}", back.elapsed());
    wait(&running.published.health, "health", |health| {
        health.connected && health.last_error.is_none()
    })
    .await;
}

#[tokio::test]
async fn a_black_hole_is_noticed() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.2.0-24", node(2).to_json()).await;
    let running = start_node(&etcd, 1, None).await;
    wait(&running.published.peers, "the peer", |peers| peers.len() == 1).await;
    let store = etcd.store();
    store.config().await.unwrap();
    etcd.signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let error = store.config().await.unwrap_err();
    assert!(
        error.is_unavailable() && stopped.elapsed() < Duration::from_secs(7),
        "{error}"
    );
    wait(&running.published.health, "the black hole seen", |health| {
        !health.connected
    })
    .await;
    assert!(
        stopped.elapsed() < Duration::from_secs(15),
        "{:?}",
        stopped.elapsed()
    );
    etcd.signal(Signal::SIGCONT);
    let back = Instant::now();
    etcd.put("subnets/10.0.3.0-24", node(3).to_json()).await;
    wait(&running.published.peers, "the new peer", |peers| peers.len() == 2).await;
    assert!(back.elapsed() < Duration::from_secs(8), "{:?}", back.elapsed());
}

#[tokio::test]
async fn a_lease_that_ran_out_is_claimed_again_or_left_to_its_new_owner() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let mut running = start_node(&etcd, 1, None).await;
    let own = running.lease.subnet;
    // Gone: it is claimed again.
    let gone = Instant::now();
    etcd.delete(&format!("subnets/{own}")).await;
    wait_key(&etcd, own, &node(1)).await;
    assert!(gone.elapsed() < Duration::from_secs(3), "{:?}", gone.elapsed());
    assert_eq!(running.published.lease.borrow_and_update().subnet, own);
    // A stranger's: it is not overwritten, another is taken.
    etcd.put(&format!("subnets/{own}"), node(66).to_json()).await;
    wait(&running.published.lease, "another subnet", |lease| {
        lease.subnet != own
    })
    .await;
    let new = running.published.lease.borrow().subnet;
    wait_key(&etcd, new, &node(1)).await;
    wait_key(&etcd, own, &node(66)).await;
    wait(&running.published.peers, "the stranger as a peer", |peers| {
        peers.get(own) == Some(&node(66)) && peers.get(new).is_none()
    })
    .await;
}

#[tokio::test]
async fn an_outage_longer_than_the_lease_keeps_the_subnet() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let proxy = Proxy::before(etcd.port()).await;
    let options = EtcdOptions {
        endpoints: vec![format!("http://127.0.0.1:{}", proxy.port)],
        ttl: Duration::from_secs(2),
        ..etcd.options()
    };
    let running = Node::start(options, 1, fresh()).await;
    let own = running.lease.subnet;
    let first = made_at(&etcd, own).await;
    assert!(first.is_some());
    // Longer than several lease times: renewals keep it, and it never went.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(made_at(&etcd, own).await, first);
    // Then none gets through for as long as it takes the lease to end.
    proxy.silence_all();
    let gone = async {
        while made_at(&etcd, own).await.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(20), gone)
        .await
        .expect("the lease ends");
    proxy.heal();
    wait_key(&etcd, own, &node(1)).await;
    assert!(made_at(&etcd, own).await > first, "the key is another");
    assert_eq!(running.published.lease.borrow().subnet, own);
    assert!(!running.maintain.is_finished());
}

/// The revision that made the key of a lease, if there is one.
async fn made_at(etcd: &Etcd, subnet: Subnet) -> Option<i64> {
    let key = format!("{PREFIX}/subnets/{subnet}");
    let answer = etcd.client().await.get(key, None).await.unwrap();
    answer.kvs().first().map(etcd_client::KeyValue::create_revision)
}

#[tokio::test]
async fn a_wiped_etcd_is_filled_again_and_peers_linger() {
    let Some(mut etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let mut nodes = Vec::new();
    for i in 1..=4 {
        nodes.push(start_node(&etcd, i, None).await);
    }
    for node in &nodes {
        wait(&node.published.peers, "3 peers", |peers| peers.len() == 3).await;
    }
    let before: BTreeSet<_> = nodes.iter().map(|node| node.lease.subnet).collect();
    let mut tables: Vec<_> = nodes.iter().map(|node| node.published.peers.clone()).collect();
    etcd.crash();
    etcd.wipe();
    etcd.restart().await;
    let back = Instant::now();
    for node in &nodes {
        wait_key(&etcd, node.lease.subnet, &node.lease.attrs).await;
    }
    assert!(back.elapsed() < Duration::from_secs(10), "{:?}", back.elapsed());
    for (node, table) in nodes.iter().zip(&mut tables) {
        wait(&node.published.peers, "nothing held", |peers| peers.held() == 0).await;
        assert_eq!(table.borrow_and_update().len(), 3);
    }
    assert_eq!(
        before,
        nodes
            .iter()
            .map(|node| node.published.lease.borrow().subnet)
            .collect()
    );
}

#[tokio::test]
async fn a_node_starts_without_etcd_from_its_cache() {
    let Some(mut etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.2.0-24", node(2).to_json()).await;
    let state = tempfile::tempdir().unwrap();
    let options = ControlOptions {
        state_dir: Some(state.path().to_owned()),
        subnet_file: state.path().join("subnet.env"),
        ..ControlOptions::default()
    };
    let running = Node::start(etcd.options(), 1, options.clone()).await;
    wait(&running.published.peers, "the peer", |peers| peers.len() == 1).await;
    let cached = async {
        while !std::fs::read_to_string(state.path().join("control.json"))
            .is_ok_and(|text| text.contains("10.0.2.0-24"))
        {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(10), cached).await.unwrap();
    let own = running.lease.subnet;
    drop(running);
    etcd.crash();
    let started = Instant::now();
    let running = Node::start(etcd.options(), 1, options).await;
    assert!(
        started.elapsed() < Duration::from_secs(6),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(running.lease.subnet, own);
    assert_eq!(running.published.peers.borrow().len(), 1);
    assert!(!running.published.health.borrow().connected);
    etcd.restart().await;
    wait(&running.published.health, "the store back", |health| {
        health.connected
    })
    .await;
    wait_key(&etcd, own, &node(1)).await;
}

#[tokio::test]
async fn a_wrong_password_is_a_refusal() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    let mut client = etcd.client().await;
    client.user_add("root", "right", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    etcd.put("config", CONFIG).await;
    client.auth_enable().await.unwrap();
    let with = |password: &str| EtcdOptions {
        username: "root".to_owned(),
        password: password.to_owned(),
        ..etcd.options()
    };
    let store = EtcdStore::connect(with("right")).unwrap();
    assert_eq!(store.config().await.unwrap(), CONFIG);
    for options in [with("wrong"), etcd.options()] {
        let error = EtcdStore::connect(options).unwrap().config().await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_dead_endpoint_beside_a_live_one_does_no_harm() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let store = EtcdStore::connect(EtcdOptions {
        endpoints: vec![
            "http://127.0.0.1:9".to_owned(),
            etcd.url(),
            "http://192.0.2.1:2379".to_owned(),
        ],
        ..etcd.options()
    })
    .unwrap();
    assert_eq!(store.config().await.unwrap(), CONFIG);
    assert!(store.acquire(&node(1), None).await.is_ok());
}

#[tokio::test]
async fn a_server_learns_when_leases_end() {
    let Some(etcd) = etcd_server::start_as_wanted().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let writer = EtcdOptions {
        ttl: Duration::from_secs(100),
        ..etcd.options()
    };
    let lease = EtcdStore::connect(writer)
        .unwrap()
        .acquire(&node(1), None)
        .await
        .unwrap();
    let reader = EtcdOptions {
        expirations: Expirations::Ask,
        ..etcd.options()
    };
    let reader = EtcdStore::connect(reader).unwrap();
    let item = reader.watch(None).next().await.unwrap().unwrap();
    let LeaseUpdate::Snapshot(listed) = item.update else {
        panic!("{item:?}")
    };
    let (Expiration::At(granted), Expiration::At(told)) = (lease.expiration, listed[0].expiration) else {
        panic!("{lease:?} {listed:?}")
    };
    let apart = granted
        .duration_since(told)
        .or_else(|error| Ok::<_, ()>(error.duration()))
        .unwrap();
    assert!(apart < Duration::from_secs(5), "{apart:?}");
}

async fn start_node(etcd: &Etcd, i: u8, ttl: Option<Duration>) -> Node {
    let mut options = etcd.options();
    options.ttl = ttl.unwrap_or(options.ttl);
    Node::start(options, i, fresh()).await
}

async fn wait_key(etcd: &Etcd, subnet: Subnet, attrs: &LeaseAttrs) {
    let key = format!("{PREFIX}/subnets/{subnet}");
    let there = async {
        loop {
            let dump = etcd.dump().await;
            if dump
                .iter()
                .any(|(found, value, _)| *found == key && *value == attrs.to_json())
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(20), there)
        .await
        .unwrap_or_else(|_| panic!("{key} is not {attrs:?}"));
}
