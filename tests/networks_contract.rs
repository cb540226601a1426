//! What every store with several networks must do, run over each of them.

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

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt};
use kersey::addr::NetworkName;
use kersey::control::store::{
    Cursor, EmbeddedNetworks, EtcdNetworks, EtcdOptions, NetworkEvent, NetworkItem, NetworkUpdate, Networks,
    Store, StoreError,
};
use kersey::lease::{LeaseAttrs, LeaseUpdate, Subnet};
use tokio::time::timeout;

macro_rules! contract {
    ($($store:ident: $open:ident,)*) => {
        $(mod $store {
            use super::*;
            contract!(@rules $open:
                a_network_exists_if_its_config_does,
                a_watch_of_networks_begins_with_all_and_tells_what_changes,
                a_cursor_resumes_the_watch_of_networks,
                networks_share_nothing,
                the_network_without_a_name_stays_as_it_was,
            );
        })*
    };
    (@rules $open:ident: $($rule:ident,)*) => {
        $(#[tokio::test]
        async fn $rule() {
            run(Box::pin($open()), super::$rule).await;
        })*
    };
}

contract! {
    etcd: open_etcd,
    embedded: open_embedded,
}

const HOUR: Duration = Duration::from_secs(3600);
const CONFIG: &str = r#"{"Network":"10.0.0.0/16"}"#;

/// Networks, none at first, the way an operator makes and removes them, and what keeps them alive.
struct Fixture {
    networks: Arc<dyn Networks>,
    operator: Box<dyn Operator>,
    _guard: Box<dyn Any>,
}

trait Operator {
    /// Sets the config of a network, that without a name for `None`.
    fn put<'a>(&'a self, name: Option<&'a str>, config: &'a str) -> BoxFuture<'a, ()>;
    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()>;
}

async fn open_etcd() -> Option<Fixture> {
    let etcd = Arc::new(etcd_server::start().await?);
    let options = EtcdOptions {
        ttl: HOUR,
        ..etcd.options()
    };
    Some(Fixture {
        networks: Arc::new(EtcdNetworks::connect(options).unwrap()),
        operator: Box::new(etcd.clone()),
        _guard: Box::new(etcd),
    })
}

impl Operator for Arc<etcd_server::Etcd> {
    fn put<'a>(&'a self, name: Option<&'a str>, config: &'a str) -> BoxFuture<'a, ()> {
        let key = name.map_or("config".to_owned(), |name| format!("{name}/config"));
        Box::pin(async move { etcd_server::Etcd::put(self, &key, config).await })
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        let key = format!("{name}/config");
        Box::pin(async move { self.delete(&key).await })
    }
}

async fn open_embedded() -> Option<Fixture> {
    let dir = tempfile::tempdir().unwrap();
    let networks = EmbeddedNetworks::open(&dir.path().join("leases.redb"), HOUR).unwrap();
    Some(Fixture {
        networks: Arc::new(networks.clone()),
        operator: Box::new(networks),
        _guard: Box::new(dir),
    })
}

impl Operator for EmbeddedNetworks {
    fn put<'a>(&'a self, name: Option<&'a str>, config: &'a str) -> BoxFuture<'a, ()> {
        let name = name.map(network);
        Box::pin(async move { self.store(name.as_ref()).set_config(config).await.unwrap() })
    }

    fn remove<'a>(&'a self, name: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async move { EmbeddedNetworks::remove(self, &network(name)).await.unwrap() })
    }
}

async fn a_network_exists_if_its_config_does(fixture: Fixture) {
    let Fixture {
        networks, operator, ..
    } = &fixture;
    assert_eq!(all(networks).await, names([]));
    let store = networks.open(Some(&network("blue"))).unwrap();
    assert!(matches!(store.config().await, Err(StoreError::Refused { .. })));
    let acquired = store.acquire(&node(1), None).await;
    assert!(
        matches!(acquired, Err(StoreError::Refused { .. })),
        "{acquired:?}"
    );
    operator.put(None, CONFIG).await;
    assert_eq!(
        all(networks).await,
        names([]),
        "that without a name is not listed"
    );
    operator.put(Some("blue"), CONFIG).await;
    operator.put(Some("green.2"), CONFIG).await;
    assert_eq!(all(networks).await, names(["blue", "green.2"]));
    assert_eq!(store.config().await.unwrap(), CONFIG);
    store.acquire(&node(1), None).await.unwrap();
    operator.remove("blue").await;
    // Its lease is still there, and makes no network.
    assert_eq!(all(networks).await, names(["green.2"]));
    assert!(matches!(store.config().await, Err(StoreError::Refused { .. })));
}

async fn a_watch_of_networks_begins_with_all_and_tells_what_changes(fixture: Fixture) {
    let Fixture {
        networks, operator, ..
    } = &fixture;
    operator.put(Some("blue"), CONFIG).await;
    let mut watch = networks.watch(None);
    assert_eq!(
        next(&mut watch).await.update,
        NetworkUpdate::Snapshot(names(["blue"]))
    );
    operator.put(None, CONFIG).await;
    // Leases, of whatever network, are none of its business.
    let store = networks.open(Some(&network("blue"))).unwrap();
    store.acquire(&node(1), None).await.unwrap();
    operator.put(Some("green"), CONFIG).await;
    operator.put(Some("green"), r#"{"Network":"10.1.0.0/16"}"#).await;
    operator.remove("blue").await;
    assert_eq!(
        events(&mut watch, 4).await.0,
        ["+green", "+green", "-blue"].map(str::to_owned)
    );
}

async fn a_cursor_resumes_the_watch_of_networks(fixture: Fixture) {
    let Fixture {
        networks, operator, ..
    } = &fixture;
    let first = next(&mut networks.watch(None)).await;
    operator.put(Some("a"), CONFIG).await;
    operator.put(Some("b"), CONFIG).await;
    let mut resumed = networks.watch(Some(first.cursor.clone()));
    let (told, last) = events(&mut resumed, 2).await;
    assert_eq!(told, ["+a", "+b"].map(str::to_owned));
    let mut resumed = networks.watch(Some(last));
    operator.remove("a").await;
    assert_eq!(events(&mut resumed, 1).await.0, ["-a".to_owned()]);
    let (stem, number) = match first.cursor.0.rsplit_once('.') {
        Some((stem, number)) => (format!("{stem}."), number.to_owned()),
        None => (String::new(), first.cursor.0.clone()),
    };
    let future = Cursor(format!("{stem}{}", number.parse::<u64>().unwrap() + 1000));
    let item = next(&mut networks.watch(Some(future))).await;
    assert_eq!(item.update, NetworkUpdate::Snapshot(names(["b"])));
    let refused = networks.watch(Some(Cursor("junk".to_owned()))).next().await;
    assert!(
        matches!(refused, Some(Err(StoreError::Refused { .. }))),
        "{refused:?}"
    );
}

async fn networks_share_nothing(fixture: Fixture) {
    let Fixture {
        networks, operator, ..
    } = &fixture;
    for name in ["blue", "green"] {
        operator.put(Some(name), CONFIG).await;
    }
    let blue = networks.open(Some(&network("blue"))).unwrap();
    let green = networks.open(Some(&network("green"))).unwrap();
    let wanted = subnet("10.0.77.0-24");
    // The same subnet to another node, without either minding.
    assert_eq!(blue.acquire(&node(1), Some(wanted)).await.unwrap().subnet, wanted);
    assert_eq!(
        green.acquire(&node(2), Some(wanted)).await.unwrap().subnet,
        wanted
    );
    let mut watch = blue.watch(None);
    let item = watch.next().await.unwrap().unwrap();
    let LeaseUpdate::Snapshot(first) = item.update else {
        panic!("a watch begins with a snapshot, not {item:?}")
    };
    assert_eq!(first[0].attrs, node(1));
    assert_eq!(leases(&green).await[0].attrs, node(2));
    green.revoke(wanted).await.unwrap();
    assert_eq!(leases(&blue).await[0].attrs, node(1));
    assert_eq!(leases(&green).await, []);
    let quiet = timeout(Duration::from_millis(300), watch.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

async fn the_network_without_a_name_stays_as_it_was(fixture: Fixture) {
    let Fixture {
        networks, operator, ..
    } = &fixture;
    operator.put(None, CONFIG).await;
    operator.put(Some("blue"), r#"{"Network":"10.9.0.0/16"}"#).await;
    let unnamed = networks.open(None).unwrap();
    assert_eq!(unnamed.config().await.unwrap(), CONFIG);
    unnamed.acquire(&node(1), None).await.unwrap();
    assert_eq!(leases(&unnamed).await.len(), 1);
    let blue = networks.open(Some(&network("blue"))).unwrap();
    assert_eq!(leases(&blue).await, []);
}

/// Flannel v0.5 to v0.7: `PREFIX/NAME/config`, `PREFIX/NAME/subnets/A.B.C.D-LEN`.
#[tokio::test]
async fn the_keys_in_etcd_are_old_flannels_byte_for_byte() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("blue/config", CONFIG).await;
    let networks = EtcdNetworks::connect(EtcdOptions {
        // As path.Join cleans it.
        prefix: "/coreos.com//network/".to_owned(),
        ..etcd.options()
    })
    .unwrap();
    let store = networks.open(Some(&network("blue"))).unwrap();
    store
        .acquire(&node(1), Some(subnet("10.0.7.0-24")))
        .await
        .unwrap();
    let keys: Vec<(String, String)> = etcd
        .dump()
        .await
        .into_iter()
        .map(|(key, value, _)| (key, value))
        .collect();
    assert_eq!(
        keys,
        [
            ("/coreos.com/network/blue/config".to_owned(), CONFIG.to_owned()),
            (
                "/coreos.com/network/blue/subnets/10.0.7.0-24".to_owned(),
                r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#.to_owned()
            ),
        ]
    );
}

#[tokio::test]
async fn in_etcd_only_allowed_names_with_a_config_are_networks() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    for key in [
        "config",
        "subnets/10.0.0.0-24",
        // No name: both are keys of the network without one.
        "subnets/config",
        "config/config",
        // Not allowed.
        "../config",
        ".x/config",
        "a b/config",
        "a/b/config",
        "_/config",
        // No config.
        "leases-only/subnets/10.0.0.0-24",
        "aaa/aaa",
        "configs/x",
        "good/aaa",
        "good/config",
        "good/subnets/10.0.0.0-24",
        "z/config",
        "z/config/x",
    ] {
        etcd.put(key, CONFIG).await;
    }
    let networks: Arc<dyn Networks> = Arc::new(EtcdNetworks::connect(etcd.options()).unwrap());
    assert_eq!(all(&networks).await, names(["good", "z"]));
    let mut watch = networks.watch(None);
    next(&mut watch).await;
    for key in ["../config", "q/subnets/config", "late/config"] {
        etcd.put(key, CONFIG).await;
    }
    assert_eq!(events(&mut watch, 1).await.0, ["+late".to_owned()]);
}

#[tokio::test]
async fn a_compacted_history_gives_a_snapshot_of_networks() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    let networks: Arc<dyn Networks> = Arc::new(EtcdNetworks::connect(etcd.options()).unwrap());
    let old = next(&mut networks.watch(None)).await.cursor;
    etcd.put("a/config", CONFIG).await;
    etcd.put("b/config", CONFIG).await;
    let mut client = etcd.client().await;
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    let item = next(&mut networks.watch(Some(old))).await;
    assert_eq!(item.update, NetworkUpdate::Snapshot(names(["a", "b"])));
}

/// F7, for a store of several networks.
#[tokio::test]
async fn a_wiped_etcd_is_noticed_by_the_list_of_networks() {
    let Some(mut etcd) = etcd_server::start().await else {
        return;
    };
    for i in 0..20 {
        etcd.put("a/config", CONFIG).await;
        etcd.put("unrelated", format!("{i}")).await;
    }
    let networks: Arc<dyn Networks> = Arc::new(EtcdNetworks::connect(etcd.options()).unwrap());
    assert_eq!(all(&networks).await, names(["a"]));
    assert_eq!(networks.resets(), 0);
    etcd.crash();
    etcd.wipe();
    etcd.restart().await;
    let listed = async {
        loop {
            match networks.watch(None).next().await {
                Some(Ok(item)) => return item.update,
                Some(Err(_)) | None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    assert_eq!(listed.await, NetworkUpdate::Snapshot(names([])));
    assert!(networks.resets() >= 1, "nobody noticed");
}

#[tokio::test]
async fn an_embedded_file_keeps_all_its_networks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    write_file_of_before(&path);
    let blue = network("blue");
    {
        let networks = EmbeddedNetworks::open(&path, HOUR).unwrap();
        let store = networks.store(Some(&blue));
        store.set_config(r#"{"Network":"10.9.0.0/16"}"#).await.unwrap();
        networks
            .store(Some(&network("gone")))
            .set_config(CONFIG)
            .await
            .unwrap();
        networks.remove(&network("gone")).await.unwrap();
        store
            .acquire(&node(2), Some(subnet("10.9.3.0-24")))
            .await
            .unwrap();
    }
    let opened = EmbeddedNetworks::open(&path, HOUR).unwrap();
    let networks: Arc<dyn Networks> = Arc::new(opened);
    assert_eq!(all(&networks).await, names(["blue"]));
    let unnamed = networks.open(None).unwrap();
    assert_eq!(unnamed.config().await.unwrap(), CONFIG);
    assert_eq!(leases(&unnamed).await[0].subnet, subnet("10.0.5.0-24"));
    let store = networks.open(Some(&blue)).unwrap();
    assert_eq!(leases(&store).await[0].subnet, subnet("10.9.3.0-24"));
    assert_eq!(leases(&store).await[0].attrs, node(2));
}

/// A file as Kersey left it before there were networks with a name: three tables.
fn write_file_of_before(path: &std::path::Path) {
    use redb::TableDefinition;
    let database = redb::Database::create(path).unwrap();
    let write = database.begin_write().unwrap();
    {
        let definition: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
        let mut numbers = write.open_table(definition).unwrap();
        for (name, number) in [("format", 1), ("file", 7), ("revision", 2)] {
            numbers.insert(name, number).unwrap();
        }
        let definition: TableDefinition<'_, &str, &str> = TableDefinition::new("texts");
        let mut texts = write.open_table(definition).unwrap();
        texts.insert("config", CONFIG).unwrap();
        let definition: TableDefinition<'_, &str, (&str, u64, u64)> = TableDefinition::new("leases");
        let mut leases = write.open_table(definition).unwrap();
        leases
            .insert(
                "10.0.5.0-24",
                (r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#, 2, 0),
            )
            .unwrap();
    }
    write.commit().unwrap();
}

async fn all(networks: &Arc<dyn Networks>) -> BTreeSet<NetworkName> {
    match next(&mut networks.watch(None)).await.update {
        NetworkUpdate::Snapshot(names) => names,
        NetworkUpdate::Events(events) => panic!("no snapshot but {events:?}"),
    }
}

async fn leases(store: &Arc<dyn Store>) -> Vec<kersey::lease::Lease> {
    let item = timeout(Duration::from_secs(10), store.watch(None).next()).await;
    match item.expect("the watch is silent").unwrap().unwrap().update {
        LeaseUpdate::Snapshot(leases) => leases,
        LeaseUpdate::Events(events) => panic!("no snapshot but {events:?}"),
    }
}

async fn next(watch: &mut BoxStream<'_, Result<NetworkItem, StoreError>>) -> NetworkItem {
    timeout(Duration::from_secs(10), watch.next())
        .await
        .expect("the watch is silent")
        .unwrap()
        .unwrap()
}

/// Events as text until there are `count` or a second is quiet, and the cursor behind them.
async fn events(
    watch: &mut BoxStream<'_, Result<NetworkItem, StoreError>>,
    count: usize,
) -> (Vec<String>, Cursor) {
    let item = next(watch).await;
    let (mut told, mut cursor) = (Vec::new(), item.cursor.clone());
    let mut item = Some(item);
    while let Some(NetworkItem { update, cursor: at }) = item.take() {
        let NetworkUpdate::Events(events) = update else {
            panic!("a snapshot in mid-watch")
        };
        assert!(!events.is_empty(), "an item that tells nothing");
        told.extend(events.iter().map(|event| match event {
            NetworkEvent::Added(name) => format!("+{name}"),
            NetworkEvent::Removed(name) => format!("-{name}"),
        }));
        cursor = at;
        if told.len() < count {
            let more = timeout(Duration::from_secs(1), watch.next()).await;
            item = more.ok().map(|item| item.unwrap().unwrap());
        }
    }
    (told, cursor)
}

fn network(name: &str) -> NetworkName {
    name.parse().unwrap()
}

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<NetworkName> {
    names.into_iter().map(network).collect()
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
