//! `kersey reserve` over each kind of store, as one types it. B2 of the list of upstream bugs: a reservation stays one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd_server;

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use kersey::control::store::{EmbeddedStore, Store, leases};
use kersey::lease::{Expiration, LeaseAttrs};
use kersey::server;
use tokio::net::TcpListener;
use tokio::process::Command;

const CONFIG: &str = r#"{"Network":"10.0.0.0/16"}"#;

#[tokio::test]
async fn on_etcd() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let place = ["--etcd-endpoints", &etcd.url()];
    works_on(&place, &etcd.store()).await;
    // What flannel's documentation says an operator writes is the same thing, both ways.
    etcd.put("subnets/10.0.77.0-24", r#"{"PublicIP":"192.0.2.77"}"#)
        .await;
    assert!(
        kersey(&["list"], &place)
            .await
            .contains("10.0.77.0/24  192.0.2.77")
    );
    kersey(&["add", "10.0.78.0/24", "192.0.2.78"], &place).await;
    let dump = etcd.dump().await;
    let (_, value, lease) = dump
        .iter()
        .find(|(key, ..)| key.ends_with("10.0.78.0-24"))
        .unwrap();
    assert_eq!(
        (value.as_str(), *lease),
        (r#"{"PublicIP":"192.0.2.78","PublicIPv6":null}"#, 0)
    );
    // A lease that its node holds becomes one in place, and keeps what the node said.
    let mut attrs = node("192.0.2.5");
    attrs.backend_type = "host-gw".to_owned();
    let held = etcd.store().acquire(&attrs, None).await.unwrap();
    let subnet = held.subnet.to_string();
    kersey(&["add", &subnet, "192.0.2.5"], &place).await;
    assert!(kersey(&[], &place).await.contains("host-gw"));
    // Through restarts, too.
    for _ in 0..2 {
        let again = etcd.store().acquire(&attrs, None).await.unwrap();
        assert_eq!((again.subnet, again.expiration), (held.subnet, Expiration::Never));
    }
}

#[tokio::test]
async fn in_one_of_several_networks() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("blue/config", CONFIG).await;
    let url = etcd.url();
    let place = ["--etcd-endpoints", &url, "--network", "blue"];
    kersey(&["add", "10.0.50.0/24", "192.0.2.1"], &place).await;
    assert!(kersey(&[], &place).await.contains("10.0.50.0/24"));
    assert!(
        etcd.dump()
            .await
            .iter()
            .any(|(key, ..)| key == "/coreos.com/network/blue/subnets/10.0.50.0-24")
    );
    // Where there is no network, nothing is reserved, and nobody is told that nothing is.
    for words in [&["add", "10.0.50.0/24", "192.0.2.1"][..], &["list"]] {
        let refused = run(words, &["--etcd-endpoints", &url]).await;
        assert_eq!(refused.status.code(), Some(1));
        assert!(
            text(&refused.stderr).contains("/coreos.com/network/config"),
            "{}",
            text(&refused.stderr)
        );
    }
}

#[tokio::test]
async fn on_a_dual_stack_lease_by_its_ipv4_half() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    let config = r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/48"}"#;
    etcd.put("config", config).await;
    let place = ["--etcd-endpoints", &etcd.url()];
    let held = etcd.store().acquire(&node("192.0.2.5"), None).await.unwrap();
    let v4 = held.subnet.ipv4().unwrap().to_string();
    kersey(&["add", &v4, "192.0.2.5"], &place).await;
    let leases = etcd
        .dump()
        .await
        .iter()
        .filter(|(key, ..)| key.contains("/subnets/"))
        .count();
    assert_eq!(leases, 1);
    let again = etcd.store().acquire(&node("192.0.2.5"), None).await.unwrap();
    assert_eq!((again.subnet, again.expiration), (held.subnet, Expiration::Never));
}

#[tokio::test]
async fn on_a_server_and_not_past_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let data_dir = dir.path().to_str().unwrap();
    // The file belongs to whoever has it open.
    let refused = run(&["list"], &["--embedded", "--data-dir", data_dir]).await;
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        text(&refused.stderr).contains("--remote"),
        "{}",
        text(&refused.stderr)
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let store = std::sync::Arc::new(store);
    let serving = tokio::spawn(server::serve(listener, store.clone(), std::future::pending()));
    works_on(&["--remote", &address], &*store).await;
    serving.abort();
}

#[tokio::test]
async fn on_an_embedded_store_while_nobody_has_it_open() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()).await);
    let place = ["--embedded", "--data-dir", dir.path().to_str().unwrap()];
    kersey(&["add", "10.0.50.0/24", "192.0.2.1"], &place).await;
    assert!(kersey(&["list"], &place).await.contains("10.0.50.0/24"));
    let store = open(dir.path()).await;
    let lease = store.acquire(&node("192.0.2.1"), None).await.unwrap();
    assert_eq!(
        (lease.subnet.to_string().as_str(), lease.expiration),
        ("10.0.50.0-24", Expiration::Never)
    );
    // A mistyped place is no empty store.
    let nowhere = dir.path().join("typo");
    let refused = run(
        &["list"],
        &["--embedded", "--data-dir", nowhere.to_str().unwrap()],
    )
    .await;
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    assert!(said.contains("typo/leases.redb does not exist"), "{said}");
    assert!(!nowhere.exists());
    // Before its server first starts there is none either, and whoever says what network it is to have means a new one.
    let config = dir.path().join("net.json");
    std::fs::write(&config, CONFIG).unwrap();
    let new = dir.path().join("new");
    let place = [
        "--embedded",
        "--data-dir",
        new.to_str().unwrap(),
        "--network-config",
        config.to_str().unwrap(),
    ];
    kersey(&["add", "10.0.60.0/24", "192.0.2.1"], &place).await;
    assert!(kersey(&["list"], &place[..3]).await.contains("10.0.60.0/24"));
}

#[tokio::test]
async fn a_store_that_is_away_is_one_sentence_and_status_1() {
    let failed = run(&["list"], &["--etcd-endpoints", "http://127.0.0.1:9"]).await;
    assert_eq!(failed.status.code(), Some(1));
    let error = text(&failed.stderr);
    assert!(
        error.contains("http://127.0.0.1:9") && error.contains("--etcd-endpoints"),
        "{error}"
    );
    let misused = run(&["add", "10.0.0.0/24"], &[]).await;
    assert_eq!(misused.status.code(), Some(2));
    assert!(
        text(&misused.stderr).contains("SUBNET PUBLIC-IP"),
        "{}",
        text(&misused.stderr)
    );
    let both = run(&["list"], &["--embedded", "--remote", "a:1"]).await;
    assert_eq!(both.status.code(), Some(2));
}

/// Reserves, lists and releases by the command at `place`, and looks at the same store from behind.
async fn works_on(place: &[&str], store: &dyn Store) {
    assert_eq!(kersey(&["list"], place).await, "no subnet is reserved\n");
    let told = kersey(&["add", "10.0.50.0/24", "192.0.2.1"], place).await;
    assert_eq!(told, "reserved 10.0.50.0/24 for 192.0.2.1\n");
    let listed = kersey(&[], place).await;
    assert!(
        listed.contains("SUBNET") && listed.contains("10.0.50.0/24  192.0.2.1"),
        "{listed}"
    );
    let json: serde_json::Value =
        serde_json::from_str(&kersey(&["list"], &[place, &["--json"]].concat()).await).unwrap();
    assert_eq!(json[0]["subnet"], "10.0.50.0/24");
    assert_eq!(json[0]["public_ip"], "192.0.2.1");
    // The node gets it and no other; nobody else does.
    let lease = store.acquire(&node("192.0.2.1"), None).await.unwrap();
    assert_eq!(
        (lease.subnet.to_string().as_str(), lease.expiration),
        ("10.0.50.0-24", Expiration::Never)
    );
    let lease = store.renew(&lease).await.unwrap();
    assert_eq!(lease.expiration, Expiration::Never);
    for (words, says) in [
        (&["add", "10.0.50.0/24", "192.0.2.2"][..], "192.0.2.1"),
        (&["add", "10.0.50.0/25", "192.0.2.2"], "10.0.50.0-25"),
        (&["add", "10.9.0.0/24", "192.0.2.2"], "10.9.0.0-24"),
        (&["remove", "10.0.51.0/24"], "10.0.51.0-24"),
    ] {
        let refused = run(words, place).await;
        assert_eq!(refused.status.code(), Some(1), "{words:?}");
        assert!(
            text(&refused.stderr).contains(says),
            "{words:?}: {}",
            text(&refused.stderr)
        );
    }
    let told = kersey(&["remove", "10.0.50.0/24"], place).await;
    assert!(told.starts_with("released 10.0.50.0/24"), "{told}");
    assert_eq!(kersey(&["list"], place).await, "no subnet is reserved\n");
    let lease = store.acquire(&node("192.0.2.1"), None).await.unwrap();
    assert_eq!(lease.subnet.to_string(), "10.0.50.0-24");
    assert!(matches!(lease.expiration, Expiration::At(_)));
    // It is an ordinary lease now, and nobody writes what is one already.
    let refused = run(&["remove", "10.0.50.0/24"], place).await;
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    assert!(said.contains("10.0.50.0/24 is not reserved"), "{said}");

    // A node that has a lease takes what is reserved for it when it joins anew, and gives the other up.
    let told = kersey(&["add", "10.0.60.0/24", "192.0.2.1"], place).await;
    let expected = "reserved 10.0.60.0/24 for 192.0.2.1, which has 10.0.50.0/24 until its kersey next joins the network\n";
    assert_eq!(told, expected);
    let refused = run(&["add", "10.0.70.0/24", "192.0.2.1"], place).await;
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    assert!(
        said.contains("192.0.2.1 has 10.0.60.0/24 reserved already"),
        "{said}"
    );
    let lease = store.renew(&lease).await.unwrap();
    assert_eq!(lease.subnet.to_string(), "10.0.50.0-24");
    let looked = store.confirm(None, lease.subnet, &lease.attrs).await.unwrap();
    assert_eq!(looked, None);
    let previous = Some(lease.subnet);
    let lease = store.acquire(&node("192.0.2.1"), previous).await.unwrap();
    assert_eq!(
        (lease.subnet.to_string().as_str(), lease.expiration),
        ("10.0.60.0-24", Expiration::Never)
    );
    let left = leases(store).await.unwrap();
    assert_eq!(left, [lease]);
}

async fn open(dir: &Path) -> EmbeddedStore {
    let store = EmbeddedStore::open(&dir.join("leases.redb"), Duration::from_secs(3600)).unwrap();
    store.set_config(CONFIG).await.unwrap();
    store
}

/// Runs the command, which must succeed, and gives what it printed.
async fn kersey(words: &[&str], place: &[&str]) -> String {
    let done = run(words, place).await;
    assert!(done.status.success(), "{words:?}: {}", text(&done.stderr));
    text(&done.stdout)
}

async fn run(words: &[&str], place: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kersey"))
        .arg("reserve")
        .args(words)
        .args(place)
        .output()
        .await
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn node(ip: &str) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"{ip}\"}}").as_bytes()).unwrap()
}
