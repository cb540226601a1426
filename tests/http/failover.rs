//! Several servers: which one is asked, and what belongs to which.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use kersey::control::store::{RemoteStore, Store};
use kersey::lease::LeaseUpdate;
use kersey::options::{ServeOptions, ServerAddress};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{Instant, timeout};

use crate::support::{Running, node, open};

const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn nodes_return_to_the_server_they_prefer() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(open(&dir).await);
    let options = |address: &str| ServeOptions::plain(address.parse().unwrap());
    let mut first = Running::over(Arc::clone(&store), options("127.0.0.1:0")).await;
    let second = Running::over(Arc::clone(&store), options("127.0.0.1:0")).await;
    let address = first.address.clone();
    let remote =
        RemoteStore::new(addresses(&[&address, &second.address])).returning_after(Duration::from_millis(500));
    let mut watch = remote.watch(None);
    watch.next().await.unwrap().unwrap();
    first.stop().await;
    remote.config().await.unwrap();
    let item = timeout(SOON, watch.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(item.update, LeaseUpdate::Snapshot(_)), "{item:?}");
    assert!(item.cursor.0.starts_with("1-"), "the second server's: {item:?}");
    // The first is back: the watch goes home by itself, and starts over there.
    let _first = Running::over(Arc::clone(&store), options(&address)).await;
    let item = timeout(SOON, watch.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(item.update, LeaseUpdate::Snapshot(_)), "{item:?}");
    assert!(item.cursor.0.starts_with("0-"), "the first server's: {item:?}");
    // And then goes on with events.
    store.acquire(&node(1), None).await.unwrap();
    let item = timeout(SOON, watch.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(item.update, LeaseUpdate::Events(_)), "{item:?}");
}

#[tokio::test]
async fn a_server_whose_own_store_is_away_is_passed_over() {
    let away = Scripted::start(|_| {
        (
            "500 Internal Server Error",
            "client: etcd cluster is unavailable or misconfigured",
        )
    })
    .await;
    let good = Running::plain().await;
    let remote = RemoteStore::new(addresses(&[&away.address, &good.address]));
    let lease = remote.acquire(&node(1), None).await.unwrap();
    remote.renew(&lease).await.unwrap();
    // A no is an answer, and is not taken to the next server.
    let no = Scripted::start(|_| {
        (
            "500 Internal Server Error",
            "100: Key not found (/coreos.com/network/config) [6]",
        )
    })
    .await;
    let remote = RemoteStore::new(addresses(&[&no.address, &good.address]));
    let error = remote.config().await.unwrap_err();
    assert!(!error.is_unavailable(), "{error}");
}

#[tokio::test]
async fn a_cursor_goes_to_no_other_server() {
    // Two servers of flannel, of different stores: a cursor of one would be read, and misunderstood, by the other.
    let answers = |cursor: &'static str| {
        move |request: &str| {
            if request.contains("?next=") {
                ("500 Internal Server Error", "gone")
            } else if request.contains("/leases") {
                ("200 OK", cursor)
            } else {
                ("200 OK", r#"{"Network":"10.0.0.0/8"}"#)
            }
        }
    };
    let first = Scripted::start(answers(r#"{"events":null,"snapshot":[],"cursor":"1111"}"#)).await;
    let second = Scripted::start(answers(r#"{"events":null,"snapshot":[],"cursor":"2222"}"#)).await;
    let remote = RemoteStore::new(addresses(&[&first.address, &second.address]));
    let mut watch = remote.watch(None);
    watch.next().await.unwrap().unwrap();
    first.stop();
    watch.next().await.unwrap().unwrap();
    let _ = timeout(Duration::from_secs(3), watch.next()).await;
    let asked = second.requests();
    assert!(asked.iter().any(|line| line.contains("next=2222")), "{asked:?}");
    assert!(!asked.iter().any(|line| line.contains("1111")), "{asked:?}");
}

#[tokio::test]
async fn a_server_behind_a_black_hole_costs_seconds_once() {
    let good = Running::plain().await;
    // An address of a documentation network: nothing answers, or the kernel says at once that there is no way.
    let remote = RemoteStore::new(addresses(&["192.0.2.1:9", &good.address]));
    let asked = Instant::now();
    remote.config().await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    let asked = Instant::now();
    remote.config().await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
}

/// The server of the Kubernetes proposal answers a renewal with nothing.
#[tokio::test]
async fn a_renewal_that_is_answered_with_nothing_is_a_renewal() {
    let server = Scripted::start(|_| ("200 OK", "")).await;
    let remote = RemoteStore::new(addresses(&[&server.address]));
    let lease = kersey::lease::Lease {
        subnet: "10.1.0.0-24".parse().unwrap(),
        attrs: node(1),
        expiration: kersey::lease::Expiration::Never,
        created: None,
    };
    let renewed = remote.renew(&lease).await.unwrap();
    assert_eq!((renewed.subnet, renewed.attrs), (lease.subnet, lease.attrs));
    assert_ne!(renewed.expiration, lease.expiration);
}

/// A server that answers as a function says, and remembers what it was asked.
struct Scripted {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
    serving: tokio::task::JoinHandle<()>,
}

impl Scripted {
    async fn start(answer: impl Fn(&str) -> (&'static str, &'static str) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let serving = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let count = stream.read(&mut request).await.unwrap_or_default();
                let text = String::from_utf8_lossy(&request[..count]).into_owned();
                let (status, body) = answer(&text);
                seen.lock()
                    .unwrap()
                    .push(text.lines().next().unwrap_or_default().to_owned());
                let length = body.len();
                let head =
                    format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
                let _ = stream.write_all((head + body).as_bytes()).await;
            }
        });
        Self {
            address,
            requests,
            serving,
        }
    }

    fn stop(&self) {
        self.serving.abort();
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn addresses(texts: &[&str]) -> Vec<ServerAddress> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}
