//! S12: etcd with authentication on. The least rights suffice, what is missing is named, and logins are renewed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd_server;

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use etcd_server::nodes::{CONFIG, Node, fresh, holder, node, subnet, wait};
use etcd_server::pki::Authority;
use etcd_server::{Etcd, PREFIX, Tls};
use futures_util::stream::StreamExt;
use kersey::control::store::{EtcdOptions, EtcdStore, Store, StoreError};
use kersey::control::{Control, ControlOptions};
use kersey::lease::Expiration;
use tokio::time::{Instant, timeout};

#[tokio::test]
async fn the_rights_that_the_documentation_names_suffice() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let rights = [
        read(format!("{PREFIX}/")).with_prefix(),
        write(format!("{PREFIX}/subnets/")).with_prefix(),
        write(format!("{PREFIX}/kersey/nodes/")).with_prefix(),
    ];
    let _root = secure(&etcd, &rights).await;
    let store = Arc::new(login(&etcd, "right"));
    let options = ControlOptions {
        subnet_file: "/nonexistent/subnet.env".into(),
        holder: Some(holder("one")),
        ..ControlOptions::default()
    };
    let mut control = Control::new(store.clone(), options);
    let config = control.network_config().await;
    let own = control.acquire(&node(1), &config).await;
    let (publish, published) = control.channels(&config, &own);
    let maintain = tokio::spawn(control.maintain(publish));
    // What others do is seen, renewals and reservations work, and a deleted lease is claimed again.
    let other = login(&etcd, "right");
    let theirs = other.acquire_as(&holder("two"), &node(2), None).await.unwrap();
    let mut peers = published.peers.clone();
    timeout(
        Duration::from_secs(10),
        peers.wait_for(|peers| peers.get(theirs.subnet).is_some()),
    )
    .await
    .unwrap()
    .unwrap();
    assert_eq!(
        other.renew_as(&holder("two"), &theirs).await.unwrap().subnet,
        theirs.subnet
    );
    other.reserve(subnet("10.0.199.0-24"), &node(9)).await.unwrap();
    other.unreserve(subnet("10.0.199.0-24")).await.unwrap();
    other.revoke(own.subnet).await.unwrap();
    let back = async {
        loop {
            let leases = kersey::control::store::leases(&other).await.unwrap();
            if leases.iter().any(|lease| lease.subnet == own.subnet) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(10), back).await.unwrap();
    maintain.abort();
    // The rights to the nodes' keys make duplicates seen.
    let error = other
        .acquire_as(&holder("three"), &node(2), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("two nodes"), "{error}");
}

#[tokio::test]
async fn a_node_may_be_confined_to_the_key_of_its_reservation() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.40.0-24", r#"{"PublicIP":"192.0.2.1"}"#)
        .await;
    let own = format!("{PREFIX}/subnets/10.0.40.0-24");
    let rights = [read(format!("{PREFIX}/")).with_prefix(), write(own)];
    let _root = secure(&etcd, &rights).await;
    let store = login(&etcd, "right");
    // The node cannot say who it is, and goes on without.
    let lease = store.acquire_as(&holder("one"), &node(1), None).await.unwrap();
    assert_eq!(
        (lease.subnet, lease.expiration),
        (subnet("10.0.40.0-24"), Expiration::Never)
    );
    assert!(store.renew_as(&holder("one"), &lease).await.is_ok());
    assert!(store.watch(None).next().await.unwrap().is_ok());
    // Another node's lease, and a free subnet, are out of its reach; what it lacks is named.
    let error = store
        .acquire(&node(2), Some(subnet("10.0.50.0-24")))
        .await
        .unwrap_err();
    for named in [
        "permission denied",
        "\"kersey\"",
        "readwrite",
        "/coreos.com/network/subnets/10.0.50.0-24",
    ] {
        assert!(error.to_string().contains(named), "{error}");
    }
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
}

#[tokio::test]
async fn a_right_that_is_missing_is_named() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let _root = secure(&etcd, &[read(format!("{PREFIX}/subnets/")).with_prefix()]).await;
    let store = login(&etcd, "right");
    let error = store.config().await.unwrap_err().to_string();
    assert!(
        error.contains("\"kersey\"") && error.contains("read /coreos.com/network/config"),
        "{error}"
    );

    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let _root = secure(&etcd, &[read(format!("{PREFIX}/config"))]).await;
    let store = login(&etcd, "right");
    assert_eq!(store.config().await.unwrap(), CONFIG);
    let error = store.watch(None).next().await.unwrap().unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("--prefix ROLE read /coreos.com/network/subnets/"),
        "{error}"
    );
}

#[tokio::test]
async fn who_is_not_let_in_is_named_and_never_the_password() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let mut root = secure(&etcd, &[read(format!("{PREFIX}/")).with_prefix()]).await;
    let error = login(&etcd, "canary-wrong").config().await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    let error = error.to_string();
    assert!(
        error.contains("\"kersey\"") && !error.contains("canary"),
        "{error}"
    );
    let error = etcd.store().config().await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("--etcd-username"), "{error}");
    // A password that is changed locks out a connection that is there, and changed back lets it in again.
    let store = login(&etcd, "right");
    assert_eq!(store.config().await.unwrap(), CONFIG);
    root.user_change_password("kersey", "other").await.unwrap();
    let error = store.config().await.unwrap_err();
    assert!(error.to_string().contains("\"kersey\""), "{error}");
    root.user_change_password("kersey", "right").await.unwrap();
    assert_eq!(store.config().await.unwrap(), CONFIG);
}

#[tokio::test]
async fn a_login_that_ran_out_is_renewed() {
    let Some(etcd) = etcd_server::start_with_flags(&["--auth-token-ttl", "1"]).await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let rights = [
        read(format!("{PREFIX}/")).with_prefix(),
        write(format!("{PREFIX}/subnets/")).with_prefix(),
    ];
    let _root = secure(&etcd, &rights).await;
    let store = login(&etcd, "right");
    let lease = store.acquire(&node(1), None).await.unwrap();
    let mut watch = store.watch(None);
    watch.next().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(store.config().await.unwrap(), CONFIG);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(store.renew(&lease).await.unwrap().subnet, lease.subnet);
    tokio::time::sleep(Duration::from_secs(3)).await;
    // A new watch; and the old one has seen the renewal.
    assert!(store.watch(None).next().await.unwrap().is_ok());
    assert!(
        timeout(Duration::from_secs(5), watch.next())
            .await
            .unwrap()
            .unwrap()
            .is_ok()
    );
}

/// F1: logins die with the process that gave them.
#[tokio::test]
async fn an_etcd_that_lost_its_logins_in_a_crash_is_back_within_five_seconds() {
    let Some(mut etcd) = etcd_server::start_asking().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    etcd.put("subnets/10.0.2.0-24", node(2).to_json()).await;
    let options = ControlOptions {
        holder: Some(holder("one")),
        ..fresh()
    };
    let running = Node::start(etcd.options(), 1, options).await;
    wait(&running.published.peers, "the peer", |peers| peers.len() == 1).await;
    etcd.crash();
    wait(&running.published.health, "the outage seen", |health| {
        !health.connected
    })
    .await;
    assert_eq!(running.published.peers.borrow().len(), 1);
    etcd.restart().await;
    etcd.put("subnets/10.0.203.0-24", node(3).to_json()).await;
    let back = Instant::now();
    wait(&running.published.peers, "the new peer", |peers| peers.len() == 2).await;
    eprintln!("logged in again after {:?}", back.elapsed());
    assert!(back.elapsed() <= Duration::from_secs(5), "{:?}", back.elapsed());
    // Once in, it stays: nothing logs in again and again.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let logins = etcd.requests("Authenticate");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(etcd.requests("Authenticate"), logins);
}

/// Flannel's etcd client takes no notice of a user where authentication is off.
#[tokio::test]
async fn a_user_is_no_mistake_where_authentication_is_off_and_counts_once_it_is_on() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let store = login(&etcd, "right");
    assert_eq!(store.config().await.unwrap(), CONFIG);
    let _root = secure(&etcd, &[read(format!("{PREFIX}/")).with_prefix()]).await;
    // The first request may find out.
    let _ = store.config().await;
    assert_eq!(store.config().await.unwrap(), CONFIG);
}

#[tokio::test]
async fn a_client_certificate_is_a_login() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca");
    let tls = Tls {
        ca: authority.file.clone(),
        server: authority.server(dir.path(), "server", &["127.0.0.1"]),
        client: Some(authority.client(dir.path(), "client", "kersey")),
    };
    let Some(etcd) = etcd_server::start_with(Some(tls), &[]).await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    // Etcd's own client is kersey by its certificate, too, so all is set up before.
    let mut client = etcd.client().await;
    client.role_add("node").await.unwrap();
    for right in [read(format!("{PREFIX}/config"))] {
        client.role_grant_permission("node", right).await.unwrap();
    }
    client.user_add("root", "root", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("kersey", "unused", None).await.unwrap();
    client.user_grant_role("kersey", "node").await.unwrap();
    client.auth_enable().await.unwrap();
    assert_eq!(etcd.store().config().await.unwrap(), CONFIG);
    let error = etcd.store().watch(None).next().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("of the client certificate"), "{error}");
}

/// Makes the users root and kersey, gives kersey `rights`, and turns authentication on.
async fn secure(etcd: &Etcd, rights: &[Permission]) -> Client {
    let mut client = etcd.client().await;
    client.role_add("node").await.unwrap();
    for right in rights {
        client.role_grant_permission("node", right.clone()).await.unwrap();
    }
    client.user_add("root", "root", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("kersey", "right", None).await.unwrap();
    client.user_grant_role("kersey", "node").await.unwrap();
    client.auth_enable().await.unwrap();
    let options = ConnectOptions::new()
        .with_user("root", "root")
        .with_auto_token_refresh(true);
    Client::connect([etcd.url()], Some(options)).await.unwrap()
}

fn read(key: String) -> Permission {
    Permission::new(PermissionType::Read, key)
}

fn write(key: String) -> Permission {
    Permission::new(PermissionType::Readwrite, key)
}

fn login(etcd: &Etcd, password: &str) -> EtcdStore {
    EtcdStore::connect(EtcdOptions {
        username: "kersey".to_owned(),
        password: password.to_owned(),
        ..etcd.options()
    })
    .unwrap()
}
