//! F23: the server is killed, started again, replaced by one with an older state; clients are slow, many, or half gone.
//!
//! What a node knows is looked at where it is published: the packets' routes are made from that table and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kersey::control::identity::Holder;
use kersey::control::store::{RemoteStore, Store, StoreError};
use kersey::control::{Control, ControlOptions, Published};
use kersey::lease::{LeaseAttrs, Subnet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::process::Process;
use crate::support::{ask, node};

/// How soon a node must know what is true after its server is back.
const RESYNC: Duration = Duration::from_secs(5);
/// What a server may use with a thousand polls.
const SERVER_ROOM: usize = 64 << 20;

#[tokio::test]
async fn nodes_keep_what_they_know_while_the_server_is_dead_and_are_right_soon_after() {
    let dir = tempfile::tempdir().unwrap();
    let (data, old) = (dir.path().join("data"), dir.path().join("old"));
    let mut server = Process::start(&data, "127.0.0.1:0", &[]);
    let address = server.address.clone();
    let one = Node::start(&address, 1).await;
    let two = Node::start(&address, 2).await;
    one.knows(&[two.subnet]).await;
    two.knows(&[one.subnet]).await;

    // Killed, and away for a while: nobody forgets anybody.
    server.kill();
    sleep(Duration::from_secs(3)).await;
    assert_eq!((one.peers(), two.peers()), (vec![two.subnet], vec![one.subnet]));
    assert!(!one.published.health.borrow().connected);
    copy(&data, &old);
    server = Process::start(&data, &address, &[]);
    let back = Instant::now();
    let three = RemoteStore::new(vec![address.parse().unwrap()])
        .acquire(&node(3), None)
        .await
        .unwrap();
    one.knows(&[two.subnet, three.subnet]).await;
    two.knows(&[one.subnet, three.subnet]).await;
    assert!(back.elapsed() <= RESYNC, "{:?}", back.elapsed());
    println!("killed and started again: all known after {:?}", back.elapsed());

    // Replaced by an older state, in which node 3 has never been, and 4 is new.
    server.kill();
    fs::remove_dir_all(&data).unwrap();
    copy(&old, &data);
    let server = Process::start(&data, &address, &[]);
    let back = Instant::now();
    let four = RemoteStore::new(vec![address.parse().unwrap()])
        .acquire(&node(4), None)
        .await
        .unwrap();
    one.knows_at_least(&[two.subnet, four.subnet]).await;
    two.knows_at_least(&[one.subnet, four.subnet]).await;
    assert!(back.elapsed() <= RESYNC, "{:?}", back.elapsed());
    // Own leases are what they were, and a node with a lease the older state does not have has it again with its next renewal.
    assert_eq!(*one.published.lease.borrow(), one.lease());
    let store = RemoteStore::new(vec![address.parse().unwrap()]);
    let again = store.renew(&three).await;
    assert!(again.is_ok() || four.subnet == three.subnet, "{again:?}");
    drop(server);
}

#[tokio::test]
async fn a_killed_server_knows_afterwards_who_has_which_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), "127.0.0.1:0", &[]);
    let address = server.address.clone();
    let client = || RemoteStore::new(vec![address.parse().unwrap()]);
    let lease = client().acquire_as(&holder(1), &node(1), None).await.unwrap();
    server.kill();
    let _server = Process::start(dir.path(), &address, &[]);
    let error = client().acquire_as(&holder(2), &node(1), None).await.unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error}");
    assert!(
        error.to_string().contains("\"host-1\"") && error.to_string().contains("\"host-2\""),
        "{error}"
    );
    client().renew_as(&holder(1), &lease).await.unwrap();
}

#[tokio::test]
async fn an_empty_successor_takes_nobody_away_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(&dir.path().join("a"), "127.0.0.1:0", &[]);
    let address = server.address.clone();
    let one = Node::start(&address, 1).await;
    let two = Node::start(&address, 2).await;
    one.knows(&[two.subnet]).await;
    server.kill();
    // Another data directory: the store begins anew, and the nodes take their leases again.
    let _server = Process::start(&dir.path().join("b"), &address, &[]);
    let back = Instant::now();
    let store = RemoteStore::new(vec![address.parse().unwrap()]);
    loop {
        let (_, body) = ask(&address, "GET", "/v1/_/leases", "", "").await;
        let there = [one.subnet, two.subnet]
            .iter()
            .all(|subnet| body.contains(&subnet.v4.to_string()));
        if there {
            break;
        }
        assert_eq!(one.peers(), [two.subnet], "nobody is forgotten meanwhile");
        assert!(back.elapsed() < RESYNC * 2, "{body}");
        sleep(Duration::from_millis(50)).await;
    }
    println!(
        "an empty successor has all leases again after {:?}",
        back.elapsed()
    );
    assert!(store.config().await.is_ok());
    one.knows(&[two.subnet]).await;
}

#[tokio::test]
async fn a_thousand_polls_stuck_clients_and_half_open_ones_cost_little() {
    raise_open_files();
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), "127.0.0.1:0", &[]);
    // Some hundred leases, so that a snapshot is of some size.
    let store = RemoteStore::new(vec![server.address.parse().unwrap()]);
    for i in 0..100 {
        let attrs = format!(
            "{{\"PublicIP\":\"198.51.100.{i}\",\"BackendType\":\"vxlan\",\"BackendData\":{{\"VtepMAC\":\"82:4b:b6:2f:54:4e\"}}}}"
        );
        store
            .acquire(&LeaseAttrs::from_json(attrs.as_bytes()).unwrap(), None)
            .await
            .unwrap();
    }
    let (_, body) = ask(&server.address, "GET", "/v1/_/leases", "", "").await;
    let cursor = body.rsplit('"').nth(1).unwrap().to_owned();
    let poll = format!("GET /v1/_/leases?next={cursor} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    let mut polls = Vec::new();
    for _ in 0..1000 {
        let mut stream = TcpStream::connect(&server.address).await.unwrap();
        stream.write_all(poll.as_bytes()).await.unwrap();
        polls.push(stream);
    }
    // Stuck clients: they ask for snapshots without end, and read none.
    let mut stuck = Vec::new();
    for _ in 0..50 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(server.address.parse().unwrap()).await.unwrap();
        let snapshots = "GET /v1/_/leases HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".repeat(500);
        let _ = timeout(Duration::from_millis(50), stream.write_all(snapshots.as_bytes())).await;
        stuck.push(stream);
    }
    // Half-open ones: they have said that they send no more.
    let mut half_open = Vec::new();
    for _ in 0..100 {
        let mut stream = TcpStream::connect(&server.address).await.unwrap();
        stream.write_all(poll.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        half_open.push(stream);
    }
    sleep(Duration::from_millis(500)).await;
    assert!(server.memory() <= SERVER_ROOM, "{}", server.memory());
    // One change: all thousand hear of it, while others are served.
    let changed = Instant::now();
    store.acquire(&node(7), None).await.unwrap();
    assert!(changed.elapsed() < RESYNC, "{:?}", changed.elapsed());
    for stream in &mut polls {
        let mut bytes = [0; 1024];
        let count = timeout(RESYNC, stream.read(&mut bytes))
            .await
            .expect("news")
            .unwrap();
        assert!(String::from_utf8_lossy(&bytes[..count]).contains("192.0.2.7"));
    }
    println!(
        "a thousand polls told after {:?}; the server uses {} KB",
        changed.elapsed(),
        server.memory() / 1024
    );
    assert!(changed.elapsed() < RESYNC, "{:?}", changed.elapsed());
    assert!(server.memory() <= SERVER_ROOM, "{}", server.memory());
    drop((polls, stuck, half_open));
    for _ in 0..100 {
        if server.descriptors() < 40 {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("{} descriptors are still open", server.descriptors());
}

#[tokio::test]
async fn a_server_asked_to_stop_ends_well_and_its_socket_is_free() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), "127.0.0.1:0", &[]);
    let address = server.address.clone();
    let _one = Node::start(&address, 1).await;
    assert!(server.terminate().success());
    let again = Process::start(dir.path(), &address, &[]);
    assert_eq!(again.address, address);
}

/// A node's control plane.
struct Node {
    subnet: Subnet,
    published: Published,
    maintain: JoinHandle<()>,
}

impl Node {
    async fn start(server: &str, i: u8) -> Self {
        let store = RemoteStore::new(vec![server.parse().unwrap()]);
        let options = ControlOptions {
            subnet_file: "/nonexistent/subnet.env".into(),
            ..ControlOptions::default()
        };
        let mut control = Control::new(Arc::new(store), options);
        let config = control.network_config().await;
        let lease = control.acquire(&node(i), &config).await;
        let (publish, published) = control.channels(&config, &lease);
        Self {
            subnet: lease.subnet,
            published,
            maintain: tokio::spawn(control.maintain(publish)),
        }
    }

    fn peers(&self) -> Vec<Subnet> {
        self.published
            .peers
            .borrow()
            .iter()
            .map(|(subnet, _)| subnet)
            .collect()
    }

    fn lease(&self) -> kersey::lease::Lease {
        self.published.lease.borrow().clone()
    }

    async fn knows(&self, subnets: &[Subnet]) {
        let mut wanted = subnets.to_vec();
        wanted.sort_unstable();
        self.wait(|known| *known == wanted).await;
    }

    async fn knows_at_least(&self, subnets: &[Subnet]) {
        self.wait(|known| subnets.iter().all(|subnet| known.contains(subnet)))
            .await;
    }

    async fn wait(&self, is_right: impl Fn(&Vec<Subnet>) -> bool) {
        let known = async {
            while !is_right(&self.peers()) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(Duration::from_secs(10), known)
            .await
            .unwrap_or_else(|_| panic!("it knows {:?}", self.peers()));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.maintain.abort();
    }
}

fn holder(i: u8) -> Holder {
    Holder {
        id: format!("{i:032x}"),
        host: format!("host-{i}"),
        boot: format!("boot-{i}"),
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let file = PathBuf::from("leases.redb");
    fs::copy(from.join(&file), to.join(&file)).unwrap();
}

fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}
