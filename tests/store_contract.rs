//! What every store must do, run over each of them.
//!
//! A new store is one more line at the `contract!` below, and a function that opens it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd_server;

use std::any::Any;
use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt};
use kersey::control::config::NetworkConfig;
use kersey::control::identity::Holder;
use kersey::control::store::{
    Cursor, EmbeddedStore, EtcdOptions, EtcdStore, RemoteStore, Store, StoreError, WatchItem,
};
use kersey::lease::{Expiration, Lease, LeaseAttrs, LeaseEvent, LeaseUpdate, Subnet};
use kersey::server;
use tokio::net::TcpListener;
use tokio::time::timeout;

/// Makes a test of every rule for every store.
macro_rules! contract {
    ($($store:ident: $open:ident,)*) => {
        $(mod $store {
            use super::*;
            contract!(@rules $open:
                a_missing_config_is_a_refusal("", HOUR),
                the_config_is_given_unchanged(CONFIG, HOUR),
                a_node_gets_its_subnet_again(CONFIG, HOUR),
                a_previous_subnet_is_given_if_free(CONFIG, HOUR),
                thirty_two_claim_thirty_two_subnets(SMALL, HOUR),
                a_look_confirms_what_is_ours_and_nothing_else(CONFIG, HOUR),
                a_renewal_keeps_what_is_ours_only(CONFIG, HOUR),
                a_node_that_moved_keeps_its_subnet_and_nobody_elses(CONFIG, HOUR),
                a_watch_tells_everything_in_order(CONFIG, HOUR),
                a_cursor_from_the_future_gets_a_snapshot(CONFIG, HOUR),
                a_reservation_has_no_end(CONFIG, HOUR),
                a_lease_ends_and_everybody_hears(CONFIG, Duration::from_secs(2)),
            );
        })*
    };
    (@rules $open:ident: $($rule:ident($config:expr, $ttl:expr),)*) => {
        $(#[tokio::test]
        async fn $rule() {
            run(Box::pin($open($config, $ttl)), super::$rule).await;
        })*
    };
}

contract! {
    etcd: open_etcd,
    embedded: open_embedded,
    remote: open_remote,
}

const HOUR: Duration = Duration::from_secs(3600);
const CONFIG: &str = r#"{"Network":"10.0.0.0/16"}"#;
/// Exactly 32 subnets.
const SMALL: &str = r#"{"Network":"10.0.0.0/24","SubnetLen":29,"SubnetMin":"10.0.0.0"}"#;

/// A store, empty but for its config, and what keeps it alive.
struct Fixture {
    store: Arc<dyn Store>,
    _guard: Box<dyn Any>,
}

async fn open_etcd(config: &str, ttl: Duration) -> Option<Fixture> {
    let etcd = etcd_server::start().await?;
    if !config.is_empty() {
        etcd.put("config", config).await;
    }
    let options = EtcdOptions {
        ttl,
        ..etcd.options()
    };
    Some(Fixture {
        store: Arc::new(EtcdStore::connect(options).unwrap()),
        _guard: Box::new(etcd),
    })
}

async fn open_embedded(config: &str, ttl: Duration) -> Option<Fixture> {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), ttl).unwrap();
    if !config.is_empty() {
        store.set_config(config).await.unwrap();
    }
    Some(Fixture {
        store: Arc::new(store),
        _guard: Box::new(dir),
    })
}

async fn open_remote(config: &str, ttl: Duration) -> Option<Fixture> {
    let Fixture { store, _guard } = open_embedded(config, ttl).await?;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = tokio::spawn(server::serve(listener, store, std::future::pending()));
    Some(Fixture {
        store: Arc::new(RemoteStore::new(vec![address.parse().unwrap()])),
        _guard: Box::new((_guard, serving)),
    })
}

async fn a_missing_config_is_a_refusal(fixture: Fixture) {
    assert!(matches!(
        fixture.store.config().await,
        Err(StoreError::Refused { .. })
    ));
    let acquired = fixture.store.acquire(&node(1), None).await;
    assert!(
        matches!(acquired, Err(StoreError::Refused { .. })),
        "{acquired:?}"
    );
}

async fn the_config_is_given_unchanged(fixture: Fixture) {
    // A server fills in what is left out; the meaning stays.
    let read = |text: &str| NetworkConfig::parse(text).unwrap();
    assert_eq!(read(&fixture.store.config().await.unwrap()), read(CONFIG));
}

async fn a_node_gets_its_subnet_again(fixture: Fixture) {
    let store = &fixture.store;
    let lease = store.acquire(&node(1), None).await.unwrap();
    assert_eq!(lease.attrs, node(1));
    assert!(matches!(lease.expiration, Expiration::At(_)));
    let mut changed = node(1);
    changed.backend_type = "vxlan".to_owned();
    let again = store
        .acquire(&changed, Some(subnet("10.0.200.0-24")))
        .await
        .unwrap();
    assert_eq!(again.subnet, lease.subnet);
    assert_eq!(leases(store).await, [(lease.subnet, changed)]);
}

async fn a_previous_subnet_is_given_if_free(fixture: Fixture) {
    let store = &fixture.store;
    let wanted = subnet("10.0.77.0-24");
    assert_eq!(
        store.acquire(&node(1), Some(wanted)).await.unwrap().subnet,
        wanted
    );
    assert_ne!(
        store.acquire(&node(2), Some(wanted)).await.unwrap().subnet,
        wanted
    );
}

async fn thirty_two_claim_thirty_two_subnets(fixture: Fixture) {
    let claims = (1..=32).map(|i| {
        let store = fixture.store.clone();
        tokio::spawn(async move { claim(&*store, i).await })
    });
    let mut subnets = BTreeSet::new();
    for claim in futures_util::future::join_all(claims).await {
        assert!(subnets.insert(claim.unwrap().subnet), "a subnet was given twice");
    }
    let error = fixture.store.acquire(&node(33), None).await.unwrap_err();
    assert!(error.to_string().contains("out of subnets"), "{error}");
    fixture.store.revoke(*subnets.first().unwrap()).await.unwrap();
    assert_eq!(claim(&*fixture.store, 33).await.subnet, *subnets.first().unwrap());
}

/// A look confirms a lease only if all is as the node left it, and leaves all as it is. A store that cannot tell confirms nothing.
async fn a_look_confirms_what_is_ours_and_nothing_else(fixture: Fixture) {
    let store = &fixture.store;
    let who = |i: u32| Holder {
        id: format!("{i:032x}"),
        host: format!("host-{i}"),
        boot: format!("boot-{i}"),
    };
    let one = who(1);
    let free = subnet("10.0.199.0-24");
    assert_eq!(store.confirm(Some(&one), free, &node(1)).await.unwrap(), None);
    let lease = store.acquire_as(&one, &node(1), None).await.unwrap();
    let other = store.acquire_as(&who(2), &node(2), None).await.unwrap();
    let before = leases(store).await;
    let seen = store.confirm(Some(&one), lease.subnet, &node(1)).await.unwrap();
    if let Some(seen) = &seen {
        assert_eq!((seen.subnet, &seen.attrs), (lease.subnet, &lease.attrs));
        assert!(matches!(seen.expiration, Expiration::At(_)));
    }
    let mut changed = node(1);
    changed.backend_type = "vxlan".to_owned();
    let another = who(3);
    for (case, holder, subnet, attrs) in [
        ("another node's", &one, other.subnet, node(1)),
        ("free", &one, free, node(1)),
        ("says something else", &one, lease.subnet, changed),
        ("under another address", &one, lease.subnet, node(3)),
        ("another host with the address", &another, lease.subnet, node(1)),
    ] {
        let seen = store.confirm(Some(holder), subnet, &attrs).await.unwrap();
        assert_eq!(seen, None, "{case}");
    }
    assert_eq!(leases(store).await, before);
    store.revoke(lease.subnet).await.unwrap();
    assert_eq!(
        store.confirm(Some(&one), lease.subnet, &node(1)).await.unwrap(),
        None
    );
}

async fn a_renewal_keeps_what_is_ours_only(fixture: Fixture) {
    let store = &fixture.store;
    let lease = store.acquire(&node(1), None).await.unwrap();
    assert_eq!(store.renew(&lease).await.unwrap().subnet, lease.subnet);
    // Gone meanwhile: it is claimed again.
    store.revoke(lease.subnet).await.unwrap();
    assert_eq!(store.renew(&lease).await.unwrap().subnet, lease.subnet);
    // Somebody else's meanwhile: it is not touched.
    store.revoke(lease.subnet).await.unwrap();
    store.acquire(&node(2), Some(lease.subnet)).await.unwrap();
    let renewed = store.renew(&lease).await;
    assert!(
        matches!(renewed, Err(StoreError::LeaseLost { .. })),
        "{renewed:?}"
    );
    assert_eq!(leases(store).await, [(lease.subnet, node(2))]);
}

async fn a_node_that_moved_keeps_its_subnet_and_nobody_elses(fixture: Fixture) {
    let store = &fixture.store;
    let lease = store.acquire(&node(1), None).await.unwrap();
    let moved = Lease {
        attrs: node(3),
        ..lease.clone()
    };
    // An ordinary renewal is not believed.
    let renewed = store.renew(&moved).await;
    assert!(
        matches!(renewed, Err(StoreError::LeaseLost { .. })),
        "{renewed:?}"
    );
    for attempt in ["the first time", "again, as after an answer that got lost"] {
        let given = store.readdress(None, &moved, &node(1)).await.unwrap();
        assert_eq!(given.subnet, lease.subnet, "{attempt}");
        assert_eq!(leases(store).await, [(lease.subnet, node(3))], "{attempt}");
    }
    // Who says it was somebody it was not gets nothing.
    let stolen = Lease {
        attrs: node(4),
        ..lease.clone()
    };
    let given = store.readdress(None, &stolen, &node(1)).await;
    assert!(matches!(given, Err(StoreError::LeaseLost { .. })), "{given:?}");
    assert_eq!(leases(store).await, [(lease.subnet, node(3))]);
}

async fn a_watch_tells_everything_in_order(fixture: Fixture) {
    let store = &fixture.store;
    let first = store.acquire(&node(1), None).await.unwrap();
    let mut watch = store.watch(None);
    let item = next(&mut watch).await;
    let LeaseUpdate::Snapshot(snapshot) = item.update else {
        panic!("a watch begins with a snapshot, not {item:?}")
    };
    assert_eq!(parts(&snapshot), [(first.subnet, node(1))]);
    let second = store.acquire(&node(2), None).await.unwrap();
    let mut changed = node(1);
    changed.backend_data = Some("{\"x\":1}".to_owned());
    store.acquire(&changed, None).await.unwrap();
    store.revoke(second.subnet).await.unwrap();
    let told = [
        format!("+{} {}", second.subnet, node(2).to_json()),
        format!("+{} {}", first.subnet, changed.to_json()),
        format!("-{}", second.subnet),
    ];
    assert_eq!(events(&mut watch, 3).await.0, told);
    // Whoever comes back with a cursor hears what came after it.
    let mut resumed = store.watch(Some(item.cursor));
    let (again, last) = events(&mut resumed, 3).await;
    assert_eq!(again, told);
    let mut resumed = store.watch(Some(last));
    store
        .acquire(&node(3), Some(subnet("10.0.233.0-24")))
        .await
        .unwrap();
    let told = format!("+10.0.233.0-24 {}", node(3).to_json());
    assert_eq!(events(&mut resumed, 1).await.0, [told]);
}

async fn a_cursor_from_the_future_gets_a_snapshot(fixture: Fixture) {
    let Cursor(cursor) = next(&mut fixture.store.watch(None)).await.cursor;
    let (stem, number) = match cursor.rsplit_once('.') {
        Some((stem, number)) => (format!("{stem}."), number),
        None => (String::new(), cursor.as_str()),
    };
    let future = Cursor(format!("{stem}{}", number.parse::<u64>().unwrap() + 1000));
    let item = next(&mut fixture.store.watch(Some(future))).await;
    assert!(matches!(item.update, LeaseUpdate::Snapshot(_)), "{item:?}");
}

async fn a_reservation_has_no_end(fixture: Fixture) {
    let store = &fixture.store;
    let reserved = subnet("10.0.50.0-24");
    store.reserve(reserved, &node(1)).await.unwrap();
    assert!(store.reserve(reserved, &node(2)).await.is_err());
    assert!(store.reserve(subnet("10.0.50.0-25"), &node(2)).await.is_err());
    for _ in 0..2 {
        let lease = store.acquire(&node(1), None).await.unwrap();
        assert_eq!((lease.subnet, lease.expiration), (reserved, Expiration::Never));
        let lease = store.renew(&lease).await.unwrap();
        assert_eq!((lease.subnet, lease.expiration), (reserved, Expiration::Never));
    }
    store.unreserve(reserved).await.unwrap();
    let lease = store.acquire(&node(1), None).await.unwrap();
    assert_eq!(lease.subnet, reserved);
    assert!(matches!(lease.expiration, Expiration::At(_)));
}

async fn a_lease_ends_and_everybody_hears(fixture: Fixture) {
    let store = &fixture.store;
    let lease = store.acquire(&node(1), None).await.unwrap();
    let mut watch = store.watch(None);
    next(&mut watch).await;
    assert_eq!(events(&mut watch, 1).await.0, [format!("-{}", lease.subnet)]);
    assert_eq!(leases(store).await, []);
    assert_eq!(store.renew(&lease).await.unwrap().subnet, lease.subnet);
}

/// Keeps asking while others are faster.
async fn claim(store: &dyn Store, i: u8) -> Lease {
    loop {
        match store.acquire(&node(i), None).await {
            Ok(lease) => return lease,
            Err(error) => assert!(error.to_string().contains("faster"), "{error}"),
        }
    }
}

async fn leases(store: &Arc<dyn Store>) -> Vec<(Subnet, LeaseAttrs)> {
    match next(&mut store.watch(None)).await.update {
        LeaseUpdate::Snapshot(leases) => parts(&leases),
        LeaseUpdate::Events(events) => panic!("no snapshot but {events:?}"),
    }
}

fn parts(leases: &[Lease]) -> Vec<(Subnet, LeaseAttrs)> {
    leases
        .iter()
        .map(|lease| (lease.subnet, lease.attrs.clone()))
        .collect()
}

async fn next(watch: &mut BoxStream<'_, Result<WatchItem, StoreError>>) -> WatchItem {
    timeout(Duration::from_secs(10), watch.next())
        .await
        .expect("the watch is silent")
        .unwrap()
        .unwrap()
}

/// The next `count` events as text, and the cursor behind them.
async fn events(
    watch: &mut BoxStream<'_, Result<WatchItem, StoreError>>,
    count: usize,
) -> (Vec<String>, Cursor) {
    let mut told = Vec::new();
    loop {
        let item = next(watch).await;
        let LeaseUpdate::Events(events) = item.update else {
            panic!("a snapshot in mid-watch")
        };
        assert!(!events.is_empty(), "an item that tells nothing");
        told.extend(events.iter().map(|event| match event {
            LeaseEvent::Added(lease) => format!("+{} {}", lease.subnet, lease.attrs.to_json()),
            LeaseEvent::Removed(subnet) => format!("-{subnet}"),
        }));
        if told.len() >= count {
            return (told, item.cursor);
        }
    }
}

fn subnet(key: &str) -> Subnet {
    key.parse().unwrap()
}

fn node(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}

type Opening = Pin<Box<dyn Future<Output = Option<Fixture>>>>;

async fn run<F: Future<Output = ()>>(opening: Opening, rule: impl FnOnce(Fixture) -> F) {
    if let Some(fixture) = opening.await {
        rule(fixture).await;
    }
}
