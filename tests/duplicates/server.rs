//! Behind Kersey servers, over either kind of store: without etcd between the nodes.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use kersey::control::identity::Holder;
use kersey::control::store::remote::{ERROR_HEADER, NODE_HEADER};
use kersey::control::store::{EmbeddedStore, LEASE_TTL, RemoteStore, Store, StoreError, leases};
use kersey::control::{Control, ControlOptions};
use kersey::lease::Lease;
use kersey::server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::VAGRANT;
use crate::etcd_server::nodes::{CONFIG, holder, node_at};
use crate::etcd_server::{self, Etcd};

#[tokio::test]
async fn the_second_client_of_a_server_with_an_address_gets_no_lease_and_an_error_that_names_both() {
    for Fixture { kind, store, _guard } in fixtures().await {
        let server = Server::start(store).await;
        let (one, two) = (server.client(), server.client());
        let lease = one
            .acquire_as(&holder("alpha"), &node_at(VAGRANT), None)
            .await
            .unwrap();
        let before = list(&*server.store).await;
        let error = two
            .acquire_as(&holder("beta"), &node_at(VAGRANT), None)
            .await
            .unwrap_err();
        assert!(
            matches!(error, StoreError::AddressTaken { .. }),
            "{kind}: {error}"
        );
        for named in ["\"alpha\"", "\"beta\"", VAGRANT, "--public-ip", "409 Conflict"] {
            assert!(error.to_string().contains(named), "{kind}: {error}");
        }
        assert_eq!(
            list(&*server.store).await,
            before,
            "{kind}: something was written"
        );
        // A renewal under its name is refused as well.
        let error = two.renew_as(&holder("beta"), &lease).await.unwrap_err();
        assert!(
            matches!(error, StoreError::AddressTaken { .. }),
            "{kind}: {error}"
        );
        // The first one goes on, and may restart, reboot and lose its data directory as it likes.
        one.renew_as(&holder("alpha"), &lease).await.unwrap();
        let rebooted = Holder {
            boot: "boot-2".to_owned(),
            ..holder("alpha")
        };
        let made_anew = Holder {
            id: holder("gamma").id,
            ..rebooted.clone()
        };
        for who in [holder("alpha"), rebooted, made_anew] {
            let again = server.client().acquire_as(&who, &node_at(VAGRANT), None).await;
            assert_eq!(again.unwrap().subnet, lease.subnet, "{kind}: {who:?}");
        }
        // With an address of its own the second is welcome.
        let other = two
            .acquire_as(&holder("beta"), &node_at("192.0.2.2"), None)
            .await
            .unwrap();
        assert_ne!(other.subnet, lease.subnet);
        // It cannot move to the address either.
        let moved = Lease {
            attrs: node_at(VAGRANT),
            ..other.clone()
        };
        let error = two
            .readdress(Some(&holder("beta")), &moved, &other.attrs)
            .await
            .unwrap_err();
        assert!(
            matches!(error, StoreError::AddressTaken { .. }),
            "{kind}: {error}"
        );
    }
}

#[tokio::test]
async fn of_clients_that_start_together_one_gets_the_address() {
    for Fixture { kind, store, _guard } in fixtures().await {
        let server = Server::start(store).await;
        for round in 1..=10 {
            let address = format!("192.0.2.{round}");
            let claims = (0..4).map(|i| {
                let (client, attrs) = (server.client(), node_at(&address));
                tokio::spawn(async move {
                    let who = holder(&format!("host-{i}-of-round-{round}"));
                    client.acquire_as(&who, &attrs, None).await.is_ok()
                })
            });
            let won = futures_util::future::join_all(claims).await;
            assert_eq!(
                won.into_iter().filter(|won| *won.as_ref().unwrap()).count(),
                1,
                "{kind}"
            );
        }
        assert_eq!(list(&*server.store).await.len(), 10, "{kind}");
    }
}

/// A node whose address is taken waits, as on etcd, and has its lease soon after the other is gone.
#[tokio::test]
async fn a_client_counts_as_alive_while_it_polls_and_half_a_minute_after() {
    let tests = fixtures().await.into_iter().map(async |fixture| {
        let Fixture { kind, store, _guard } = fixture;
        let server = Server::start(store).await;
        let (alpha, beta) = (start("alpha", &server), start("beta", &server));
        let (_, mut control) = alpha;
        let config = control.network_config().await;
        let lease = control.acquire(&node_at(VAGRANT), &config).await;
        let (publish, published) = control.channels(&config, &lease);
        let maintain = tokio::spawn(control.maintain(publish));
        let mut health = published.health.clone();
        health.wait_for(|health| health.connected).await.unwrap();
        let (client, mut waiting) = beta;
        let config = waiting.network_config().await;
        let waiting = tokio::spawn(async move { waiting.acquire(&node_at(VAGRANT), &config).await });
        sleep(Duration::from_secs(5)).await;
        assert!(!waiting.is_finished(), "{kind}");
        let error = client.acquire_as(&holder("beta"), &node_at(VAGRANT), None).await;
        assert!(
            matches!(error, Err(StoreError::AddressTaken { .. })),
            "{kind}: {error:?}"
        );
        // Killed: its polls end.
        maintain.abort();
        let _ = maintain.await;
        let killed = Instant::now();
        let taken = timeout(Duration::from_secs(75), waiting)
            .await
            .expect(kind)
            .unwrap();
        let after = killed.elapsed();
        assert_eq!(taken.subnet, lease.subnet, "{kind}: the address has its subnet");
        assert!(after > Duration::from_secs(25), "{kind}: after {after:?}");
        eprintln!("{kind}: the address was free {after:?} after its node was killed");
    });
    futures_util::future::join_all(tests).await;
}

#[tokio::test]
async fn servers_over_one_etcd_agree_on_who_has_an_address_while_its_node_changes_servers() {
    let Some(Fixture { store, _guard, .. }) = over_etcd().await else {
        return;
    };
    let etcd = _guard.downcast::<Etcd>().unwrap();
    let first = Server::start(store).await;
    let second = Server::start(Arc::new(etcd.store())).await;
    let both = vec![first.address.parse().unwrap(), second.address.parse().unwrap()];
    let alpha = RemoteStore::new(both);
    alpha
        .acquire_as(&holder("alpha"), &node_at(VAGRANT), None)
        .await
        .unwrap();
    let refused = async |by: &Server| {
        let error = by
            .client()
            .acquire_as(&holder("beta"), &node_at(VAGRANT), None)
            .await;
        assert!(matches!(error, Err(StoreError::AddressTaken { .. })), "{error:?}");
    };
    refused(&first).await;
    refused(&second).await;
    // And on what nodes of etcd itself say.
    let error = etcd
        .store()
        .acquire_as(&holder("beta"), &node_at(VAGRANT), None)
        .await;
    assert!(matches!(error, Err(StoreError::AddressTaken { .. })), "{error:?}");
    // The first server dies. The node only goes on watching, by the second, which keeps its address from then on.
    let watching = tokio::spawn(async move {
        loop {
            let mut watch = alpha.watch(None);
            while let Some(Ok(_)) = watch.next().await {}
            sleep(Duration::from_millis(200)).await;
        }
    });
    sleep(Duration::from_secs(1)).await;
    drop(first);
    // Longer than an address is kept that nobody looks after.
    for _ in 0..8 {
        sleep(Duration::from_secs(5)).await;
        refused(&second).await;
    }
    watching.abort();
}

/// What a client says of itself takes no address from a live node, and ends no lease.
#[tokio::test]
async fn a_forged_claim_takes_nothing_from_anybody() {
    for Fixture { kind, store, _guard } in fixtures().await {
        let server = Server::start(store).await;
        let alpha = server.client();
        let lease = alpha
            .acquire_as(&holder("alpha"), &node_at(VAGRANT), None)
            .await
            .unwrap();
        let before = list(&*server.store).await;
        let key = lease.subnet.to_string();
        let (acquire, renew) = (format!(r#"{{"PublicIP":"{VAGRANT}"}}"#), lease_text(&lease));
        let Holder { id, boot, .. } = holder("mallory");
        let alphas = holder("alpha");
        for (case, header, status) in [
            ("another host", format!("{VAGRANT} {id} {boot} mallory"), 409),
            ("its name alone", format!("{VAGRANT} {id} {boot} alpha"), 409),
            (
                "its name, and a boot left out",
                format!("{VAGRANT} {id} - alpha"),
                409,
            ),
            (
                "a boot guessed, and no name",
                format!("{VAGRANT} {id} {} -", alphas.boot),
                409,
            ),
            (
                "another address than the lease's",
                format!("192.0.2.66 {id} {boot} mallory"),
                400,
            ),
            ("no number", format!("{VAGRANT} - {boot} mallory"), 400),
            ("nothing", String::new(), 400),
            ("too much", format!("{VAGRANT} {id} {boot} a b"), 400),
            ("much too much", "x".repeat(4000), 400),
        ] {
            for (method, path, body) in [
                ("POST", "/v1/_/leases".to_owned(), &acquire),
                ("PUT", format!("/v1/_/leases/{key}"), &renew),
            ] {
                let answer = server.ask(method, &path, &header, body).await;
                assert!(
                    answer.starts_with(&format!("HTTP/1.1 {status} ")),
                    "{kind}, {case}: {answer}"
                );
                let kind_of_error = if status == 409 { "address-taken" } else { "refused" };
                assert!(
                    answer.contains(&format!("{ERROR_HEADER}: {kind_of_error}\r\n")),
                    "{kind}, {case}: {answer}"
                );
                assert!(
                    !answer.contains(&alphas.id),
                    "{kind}, {case}: its number is told: {answer}"
                );
            }
        }
        // Nor does a poll take it, and it hears what it may read.
        let header = format!("{VAGRANT} {id} {boot} mallory");
        let answer = server.ask("GET", "/v1/_/leases", &header, "").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{kind}: {answer}");
        assert_eq!(list(&*server.store).await, before, "{kind}");
        alpha.renew_as(&alphas, &lease).await.unwrap();
        // Who says nothing, as a flannel, is served as ever, but does not get what a live node has.
        for error in [
            server
                .client()
                .acquire(&node_at(VAGRANT), None)
                .await
                .unwrap_err(),
            server.client().renew(&lease).await.unwrap_err(),
        ] {
            assert!(
                matches!(error, StoreError::AddressTaken { .. }) && error.to_string().contains("\"alpha\""),
                "{kind}: {error}"
            );
        }
        let flannels = server
            .client()
            .acquire(&node_at("192.0.2.7"), None)
            .await
            .unwrap();
        server.client().renew(&flannels).await.unwrap();
    }
}

/// A server, in this process.
struct Server {
    address: String,
    store: Arc<dyn Store>,
    serving: JoinHandle<()>,
}

impl Server {
    async fn start(store: Arc<dyn Store>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self {
            address: listener.local_addr().unwrap().to_string(),
            store: Arc::clone(&store),
            serving: tokio::spawn(server::serve(listener, store, std::future::pending())),
        }
    }

    /// A client of its own, as if of another machine.
    fn client(&self) -> RemoteStore {
        RemoteStore::new(vec![self.address.parse().unwrap()])
    }

    /// Asks in a client's place; the whole answer.
    async fn ask(&self, method: &str, path: &str, node: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).await.unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{NODE_HEADER}: {node}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A node's control plane that is a client of `server`, and another client for the same node.
fn start(host: &str, server: &Server) -> (RemoteStore, Control) {
    let options = ControlOptions {
        subnet_file: "/nonexistent/subnet.env".into(),
        holder: Some(holder(host)),
        ..ControlOptions::default()
    };
    (server.client(), Control::new(Arc::new(server.client()), options))
}

/// A store, and what keeps it alive.
struct Fixture {
    kind: &'static str,
    store: Arc<dyn Store>,
    _guard: Box<dyn Any>,
}

async fn fixtures() -> Vec<Fixture> {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let embedded = Fixture {
        kind: "embedded",
        store: Arc::new(store),
        _guard: Box::new(dir),
    };
    [Some(embedded), over_etcd().await]
        .into_iter()
        .flatten()
        .collect()
}

async fn over_etcd() -> Option<Fixture> {
    let etcd = etcd_server::start().await?;
    etcd.put("config", CONFIG).await;
    Some(Fixture {
        kind: "etcd",
        store: Arc::new(etcd.store()),
        _guard: Box::new(etcd),
    })
}

async fn list(store: &dyn Store) -> Vec<(String, String)> {
    let found = leases(store).await.unwrap();
    let text = |lease: Lease| (lease.subnet.to_string(), lease.attrs.to_json());
    found.into_iter().map(text).collect()
}

fn lease_text(lease: &Lease) -> String {
    format!(
        r#"{{"Subnet":"{}","Attrs":{},"Expiration":"2030-01-01T00:00:00Z"}}"#,
        lease.subnet.v4,
        lease.attrs.to_json()
    )
}
