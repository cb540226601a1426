//! The HTTP API from outside: exchanges as flannel's own programs have them, and a server under attack.
//!
//! Raw sockets where bytes matter, [`RemoteStore`] where behaviour does.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use kersey::control::store::{Cursor, EmbeddedStore, RemoteStore, Store, StoreError};
use kersey::lease::{LeaseAttrs, LeaseEvent, LeaseUpdate};
use kersey::server;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

/// The config of the captured exchanges.
const CONFIG: &str = r#"{ "Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0",
    "Backend": {"Type": "vxlan", "VNI": 100, "Port": 8472} }"#;
const ATTRS: &str =
    r#"{"PublicIP":"10.50.0.9","BackendType":"vxlan","BackendData":{"VtepMAC":"82:4b:b6:2f:54:4e"}}"#;
const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn the_config_is_what_flannels_server_sends() {
    let server = Server::start().await;
    let answer = server.get("/v1/_/config").await;
    assert_eq!(
        answer.body,
        concat!(
            r#"{"Network":"10.0.0.0/8","SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","SubnetLen":20,"#,
            r#""Backend":{"Type":"vxlan","VNI":100,"Port":8472}}"#,
            "\n"
        )
    );
    assert_eq!(
        (answer.status, answer.content_type.as_str()),
        (200, "application/json; charset=utf-8")
    );
}

#[tokio::test]
async fn a_flannel_client_lives_its_life() {
    let server = Server::start().await;
    // Acquire.
    let acquired = server.ask("POST", "/v1/_/leases", ATTRS).await;
    assert_eq!(acquired.status, 200);
    let (subnet, expiration) = (acquired.field("Subnet"), acquired.field("Expiration"));
    let lease = format!(r#"{{"Subnet":"{subnet}","Attrs":{ATTRS},"Expiration":"{expiration}"}}"#);
    assert_eq!(acquired.body, format!("{lease}\n"));
    let key = subnet.replace('/', "-");
    // Its own lease, then all leases.
    for path in [format!("/v1/_/leases/{key}"), "/v1/_/leases".to_owned()] {
        let snapshot = server.get(&path).await;
        let cursor = snapshot.field("cursor");
        assert_eq!(
            snapshot.body,
            format!("{{\"events\":null,\"snapshot\":[{lease}],\"cursor\":\"{cursor}\"}}\n")
        );
        assert!(
            cursor
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        );
    }
    // A long poll hears of another node.
    let cursor = server.get("/v1/_/leases").await.field("cursor");
    let poll = server.spawn_get(&format!("/v1/_/leases?next={cursor}"));
    sleep(Duration::from_millis(100)).await;
    assert!(!poll.is_finished(), "a poll waits");
    let other = server
        .ask("POST", "/v1/_/leases", r#"{"PublicIP":"10.50.0.3"}"#)
        .await;
    let told = poll.await.unwrap();
    let cursor = told.field("cursor");
    let event = format!("{{\"type\":\"added\",\"lease\":{}}}", other.body.trim_end());
    assert_eq!(
        told.body,
        format!("{{\"events\":[{event}],\"snapshot\":null,\"cursor\":\"{cursor}\"}}\n")
    );
    // Renew, with the attributes an old server would have spoiled.
    let spoiled = lease.replace(
        r#"{"VtepMAC":"82:4b:b6:2f:54:4e"}"#,
        r#""eyJWdGVwTUFDIjoiODI6NGI6YjY6MmY6NTQ6NGUifQ==""#,
    );
    let renewed = server.ask("PUT", &format!("/v1/_/leases/{key}"), &spoiled).await;
    assert_eq!(renewed.status, 200);
    assert!(renewed.body.contains(ATTRS), "{}", renewed.body);
    assert!(server.get("/v1/_/leases").await.body.contains(ATTRS));
    // The own-lease watch hears of its revocation, once.
    let cursor = server.get(&format!("/v1/_/leases/{key}")).await.field("cursor");
    let poll = server.spawn_get(&format!("/v1/_/leases/{key}?next={cursor}"));
    let revoked = server.ask("DELETE", &format!("/v1/_/leases/{key}"), "").await;
    assert_eq!((revoked.status, revoked.body.as_str()), (200, ""));
    let told = poll.await.unwrap();
    let cursor = told.field("cursor");
    assert_eq!(
        told.body,
        format!(
            "{{\"events\":[{{\"type\":\"removed\",\"lease\":{{\"Subnet\":\"{subnet}\",\"Attrs\":{{\"PublicIP\":\"0.0.0.0\"}},\
             \"Expiration\":\"0001-01-01T00:00:00Z\"}}}}],\"snapshot\":null,\"cursor\":\"{cursor}\"}}\n"
        )
    );
    // And then there is none.
    let gone = server.get(&format!("/v1/_/leases/{key}")).await;
    assert_eq!(
        (gone.status, gone.content_type.as_str()),
        (500, "text/plain; charset=utf-8")
    );
    assert!(gone.body.starts_with("100: Key not found ("), "{}", gone.body);
}

#[tokio::test]
async fn reservations_come_and_go() {
    let server = Server::start().await;
    assert_eq!(server.get("/v1/_/reservations").await.body, "[]\n");
    let reservation = r#"{"Subnet":"10.20.0.0/20","PublicIP":"10.50.0.77"}"#;
    let added = server.ask("POST", "/v1/_/reservations", reservation).await;
    assert_eq!((added.status, added.body.as_str()), (200, ""));
    assert_eq!(
        server.get("/v1/_/reservations").await.body,
        format!("[{reservation}]\n")
    );
    let taken = server
        .ask(
            "POST",
            "/v1/_/reservations",
            r#"{"Subnet":"10.20.0.0/20","PublicIP":"10.50.0.78"}"#,
        )
        .await;
    assert_eq!(taken.status, 500);
    assert_eq!(
        server
            .ask("DELETE", "/v1/_/reservations/10.20.0.0-20", "")
            .await
            .status,
        200
    );
    assert_eq!(server.get("/v1/_/reservations").await.body, "[]\n");
}

#[tokio::test]
async fn errors_have_flannels_status() {
    let server = Server::start().await;
    let big = "x".repeat(2 << 20);
    let cases = [
        ("GET", "/", "", 404),
        ("GET", "/v1", "", 404),
        ("GET", "/v1/_", "", 404),
        ("GET", "/v1/_/config/", "", 404),
        ("GET", "/v1/_/leases/", "", 404),
        ("GET", "/v1/../etc/passwd", "", 404),
        ("POST", "/v1/_/config", "", 404),
        ("PATCH", "/v1/_/leases", "", 404),
        ("HEAD", "/v1/_/config", "", 404),
        ("BREW", "/v1/_/config", "", 404),
        ("GET", "/v1/blue/config", "", 500),
        ("GET", "/v1/blue/leases", "", 500),
        ("POST", "/v1/blue/leases", ATTRS, 500),
        ("POST", "/v1/_/leases", "", 400),
        ("POST", "/v1/_/leases", "{", 400),
        ("POST", "/v1/_/leases", r#"{"PublicIP":7}"#, 400),
        ("POST", "/v1/_/leases", &big, 400),
        ("PUT", "/v1/_/leases/10.10.0.0-20", "{}", 400),
        (
            "PUT",
            "/v1/_/leases/10.10.0.0-20",
            r#"{"Subnet":"10.10.0.0/20","Attrs":null}"#,
            400,
        ),
        ("GET", "/v1/_/leases/junk", "", 400),
        ("GET", "/v1/_/leases/10.10.0.0-20", "", 500),
        ("DELETE", "/v1/_/leases/10.10.0.0-20", "", 500),
    ];
    for (method, path, body, status) in cases {
        let answer = server.ask(method, path, body).await;
        assert_eq!(
            answer.status,
            status,
            "{method} {path} {}: {}",
            body.len(),
            answer.body
        );
        if method != "HEAD" {
            assert_eq!(
                answer.content_type, "text/plain; charset=utf-8",
                "{method} {path}"
            );
        }
    }
}

#[tokio::test]
async fn networks_are_none_and_a_poll_for_them_waits() {
    let server = Server::start().await;
    let answer = server.get("/v1/").await;
    let cursor = answer.field("cursor");
    assert_eq!(
        answer.body,
        format!("{{\"events\":null,\"snapshot\":[],\"cursor\":\"{cursor}\"}}\n")
    );
    let poll = server.spawn_get(&format!("/v1/?next={cursor}"));
    sleep(Duration::from_millis(200)).await;
    assert!(!poll.is_finished());
}

#[tokio::test]
async fn a_web_page_is_refused() {
    let server = Server::start().await;
    let head = "POST /v1/_/leases HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\nContent-Length: 0\r\n\r\n";
    assert_eq!(server.raw(head.as_bytes()).await.status, 403);
}

#[tokio::test]
async fn slow_and_oversized_heads_cost_others_nothing() {
    let server = Server::start().await;
    // A thousand connections that send a byte and no more.
    let mut slow = Vec::new();
    for _ in 0..1000 {
        let mut stream = TcpStream::connect(&server.address).await.unwrap();
        stream.write_all(b"G").await.unwrap();
        slow.push(stream);
    }
    let asked = Instant::now();
    assert_eq!(server.get("/v1/_/config").await.status, 200);
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    // A head of a megabyte is cut off.
    let mut big = b"GET /v1/_/config HTTP/1.1\r\nHost: localhost\r\nX: ".to_vec();
    big.resize(1 << 20, b'a');
    assert_eq!(server.raw(&big).await.status, 431);
    // The slow ones are gone after the head timeout.
    let mut closed = slow.pop().unwrap();
    let end = timeout(Duration::from_secs(8), closed.read_to_end(&mut Vec::new())).await;
    assert!(end.is_ok(), "a slow connection is closed");
}

#[tokio::test]
async fn ten_thousand_pipelined_requests_are_answered_in_turn() {
    let server = Server::start().await;
    let one = b"GET /v1/_/config HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let mut stream = TcpStream::connect(&server.address).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let write = async {
        for _ in 0..10_000 {
            writer.write_all(one).await.unwrap();
        }
    };
    let read = async {
        let (mut seen, mut buffer, mut tail) = (0, vec![0; 65_536], Vec::new());
        while seen < 10_000 {
            let count = reader.read(&mut buffer).await.unwrap();
            assert!(count > 0, "closed after {seen}");
            tail.extend_from_slice(&buffer[..count]);
            seen += tail
                .windows(12)
                .filter(|window| window == b"HTTP/1.1 200")
                .count();
            tail.drain(..tail.len().saturating_sub(11));
        }
    };
    timeout(Duration::from_secs(30), async { tokio::join!(write, read) })
        .await
        .unwrap();
}

#[tokio::test]
async fn three_hundred_polls_hear_one_change() {
    let server = Server::start().await;
    let cursor = server.get("/v1/_/leases").await.field("cursor");
    let polls: Vec<_> = (0..300)
        .map(|_| server.spawn_get(&format!("/v1/_/leases?next={cursor}")))
        .collect();
    sleep(Duration::from_millis(500)).await;
    assert!(polls.iter().all(|poll| !poll.is_finished()));
    let asked = Instant::now();
    server.ask("POST", "/v1/_/leases", ATTRS).await;
    for answer in join_all(polls).await {
        assert!(answer.unwrap().body.contains("10.50.0.9"));
    }
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[tokio::test]
async fn a_stopping_server_lets_polls_go() {
    let mut server = Server::start().await;
    let cursor = server.get("/v1/_/leases").await.field("cursor");
    let store = RemoteStore::new(vec![server.address.parse().unwrap()]);
    let mut watch = store.watch(Some(Cursor(format!("0-{cursor}"))));
    let (item, ()) = tokio::join!(timeout(Duration::from_secs(10), watch.next()), async {
        sleep(Duration::from_millis(100)).await;
        server.stop().await;
    });
    assert!(
        matches!(item, Ok(Some(Err(StoreError::Unavailable { .. })))),
        "{item:?}"
    );
}

#[tokio::test]
async fn another_server_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(open(&dir).await);
    let mut first = Server::over(store.clone()).await;
    let second = Server::over(store).await;
    // The one in front does not even exist.
    let servers = ["127.0.0.1:9", &first.address, &second.address].map(|address| address.parse().unwrap());
    let remote = RemoteStore::new(servers.to_vec());
    let lease = remote.acquire(&node(1), None).await.unwrap();
    let mut watch = remote.watch(None);
    let snapshot = watch.next().await.unwrap().unwrap();
    assert!(matches!(snapshot.update, LeaseUpdate::Snapshot(leases) if leases == [lease.clone()]));
    let killed = Instant::now();
    let (item, ()) = tokio::join!(watch.next(), async {
        sleep(Duration::from_millis(100)).await;
        first.stop().await;
    });
    // The second one knows nothing of the first one's cursor: it starts over.
    let item = item.unwrap().unwrap();
    assert!(matches!(item.update, LeaseUpdate::Snapshot(leases) if leases.len() == 1));
    assert!(
        killed.elapsed() < Duration::from_secs(5),
        "{:?}",
        killed.elapsed()
    );
    remote.renew(&lease).await.unwrap();
    remote.acquire(&node(2), None).await.unwrap();
    let item = watch.next().await.unwrap().unwrap();
    assert!(matches!(item.update, LeaseUpdate::Events(_)), "{item:?}");
}

#[tokio::test]
async fn no_server_at_all_is_unavailable_not_refused() {
    let remote = RemoteStore::new(vec!["127.0.0.1:9".parse().unwrap()]);
    let error = remote.config().await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert!(error.to_string().contains("127.0.0.1:9"), "{error}");
    assert!(matches!(
        remote.watch(None).next().await,
        Some(Err(StoreError::Unavailable { .. }))
    ));
}

#[tokio::test]
async fn what_an_old_flannel_server_says_is_understood() {
    // v0.7.1 on a renewal (its attributes spoiled), a missing lease, an etcd that is away; v0.5.5 on an unknown path.
    let renewed = r#"{"Subnet":"10.1.0.0/24","Attrs":{"PublicIP":"192.0.2.1","BackendData":"e30="},"Expiration":"2036-11-22T06:58:09.773242655Z"}"#;
    let lease = kersey::lease::Lease {
        subnet: "10.1.0.0-24".parse().unwrap(),
        attrs: node(1),
        expiration: kersey::lease::Expiration::Never,
        created: None,
    };
    let remote =
        |status, body| async move { RemoteStore::new(vec![canned(status, body).await.parse().unwrap()]) };
    let answer = remote("200 OK", renewed).await.renew(&lease).await.unwrap();
    assert_eq!(answer.attrs, node(1));
    assert_ne!(answer.expiration, lease.expiration);
    let missing = remote(
        "500 Internal Server Error",
        "100: Key not found (/subnets/10.1.0.0-24) [6]\n",
    )
    .await;
    assert!(matches!(
        missing.renew(&lease).await,
        Err(StoreError::LeaseLost { .. })
    ));
    assert!(matches!(missing.config().await, Err(StoreError::Refused { .. })));
    let away = remote(
        "500 Internal Server Error",
        "client: etcd cluster is unavailable or misconfigured\n",
    )
    .await;
    assert!(matches!(
        away.renew(&lease).await,
        Err(StoreError::Unavailable { .. })
    ));
    let unknown = remote("404 Not Found", "404 page not found\n").await;
    assert!(matches!(
        unknown.revoke(lease.subnet).await,
        Err(StoreError::Refused { .. })
    ));
    let garbled = remote("200 OK", "<html>").await;
    assert!(garbled.renew(&lease).await.unwrap_err().is_unavailable());
    assert!(matches!(
        garbled.watch(None).next().await,
        Some(Err(StoreError::Unavailable { .. }))
    ));
    let numbered = remote("200 OK", r#"{"events":null,"snapshot":[],"cursor":7}"#).await;
    assert!(matches!(numbered.watch(None).next().await, Some(Err(_))));
}

#[tokio::test]
async fn a_server_that_fails_every_poll_is_not_asked_in_a_loop() {
    let answers = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = answers.clone();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let count = stream.read(&mut request).await.unwrap_or_default();
            let poll = String::from_utf8_lossy(&request[..count]).contains("?next=");
            let (status, body) = if poll {
                ("500 Internal Server Error", "stalled")
            } else {
                ("200 OK", r#"{"events":null,"snapshot":[],"cursor":"1"}"#)
            };
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let length = body.len();
            let answer =
                format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    let remote = RemoteStore::new(vec![address.parse().unwrap()]);
    let watching = remote.watch(None).for_each(async |item| drop(item.unwrap()));
    let _ = timeout(Duration::from_millis(2500), watching).await;
    assert!(answers.load(std::sync::atomic::Ordering::Relaxed) <= 6);
}

#[tokio::test]
async fn a_watch_follows_a_long_life() {
    let server = Server::start().await;
    let remote = RemoteStore::new(vec![server.address.parse().unwrap()]);
    let mut watch = remote.watch(None);
    watch.next().await.unwrap().unwrap();
    let mut known = std::collections::BTreeSet::new();
    for i in 1..=50 {
        let lease = server.store.acquire(&node(i), None).await.unwrap();
        known.insert(lease.subnet);
        if i % 3 == 0 {
            server.store.revoke(lease.subnet).await.unwrap();
            known.remove(&lease.subnet);
        }
    }
    let mut heard = std::collections::BTreeSet::new();
    while heard != known {
        let item = timeout(Duration::from_secs(5), watch.next())
            .await
            .expect("all is told")
            .unwrap()
            .unwrap();
        let LeaseUpdate::Events(events) = item.update else {
            panic!("{item:?}");
        };
        for event in events {
            match event {
                LeaseEvent::Added(lease) => heard.insert(lease.subnet),
                LeaseEvent::Removed(subnet) => heard.remove(&subnet),
            };
        }
    }
}

/// A server over an embedded store, on a port of its own.
struct Server {
    address: String,
    store: Arc<dyn Store>,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
    _dir: Option<tempfile::TempDir>,
}

impl Server {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir).await;
        Self {
            _dir: Some(dir),
            ..Self::over(Arc::new(store)).await
        }
    }

    async fn over(store: Arc<dyn Store>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server::serve(listener, store.clone(), async move {
            let _ = stopped.await;
        }));
        Self {
            address,
            store,
            stop: Some(stop),
            serving,
            _dir: None,
        }
    }

    async fn stop(&mut self) {
        drop(self.stop.take());
        timeout(Duration::from_secs(5), &mut self.serving)
            .await
            .expect("it stops")
            .unwrap();
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "").await
    }

    async fn ask(&self, method: &str, path: &str, body: &str) -> Answer {
        ask(&self.address, method, path, body).await
    }

    fn spawn_get(&self, path: &str) -> JoinHandle<Answer> {
        let (address, path) = (self.address.clone(), path.to_owned());
        tokio::spawn(async move { ask(&address, "GET", &path, "").await })
    }

    async fn raw(&self, request: &[u8]) -> Answer {
        raw(&self.address, request).await
    }
}

struct Answer {
    status: u16,
    content_type: String,
    body: String,
}

impl Answer {
    /// The text of a string field, wherever it stands.
    fn field(&self, name: &str) -> String {
        let (_, rest) = self.body.split_once(&format!("\"{name}\":\"")).expect(&self.body);
        rest.split('"').next().unwrap().to_owned()
    }
}

async fn ask(address: &str, method: &str, path: &str, body: &str) -> Answer {
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    raw(address, (head + body).as_bytes()).await
}

async fn raw(address: &str, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    // A server may answer, and close, before it has read all.
    let write = async {
        let _ = writer.write_all(request).await;
        std::future::pending::<()>().await;
    };
    let read = async {
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match reader.read(&mut buffer).await {
                Ok(0) | Err(_) => return bytes,
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            }
            if bytes.starts_with(b"HTTP/1.1 431") || bytes.starts_with(b"HTTP/1.1 403") {
                return bytes;
            }
        }
    };
    let bytes = tokio::select! {
        bytes = read => bytes,
        () = write => unreachable!(),
    };
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_default();
    let content_type = head
        .lines()
        .find_map(|line| line.strip_prefix("content-type: "))
        .unwrap_or_default()
        .to_owned();
    Answer {
        status,
        content_type,
        body: body.to_owned(),
    }
}

/// A server that says one thing, whatever it is asked; gives its address.
async fn canned(status: &'static str, body: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            let length = body.len();
            let answer =
                format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

async fn open(dir: &tempfile::TempDir) -> EmbeddedStore {
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), HOUR).unwrap();
    store.set_config(CONFIG).await.unwrap();
    store
}

fn node(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}
