//! A server in this process, and ways to talk to it.

use std::sync::Arc;
use std::time::Duration;

use kersey::control::store::{EmbeddedStore, RemoteStore, Store};
use kersey::host::inherited;
use kersey::lease::LeaseAttrs;
use kersey::options::{KeyPairFiles, RemoteOptions, ServeOptions, ServerAddress, TlsFiles};
use kersey::server::{self, Served};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// The config of the captured exchanges.
pub(crate) const CONFIG: &str = r#"{ "Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0",
    "Backend": {"Type": "vxlan", "VNI": 100, "Port": 8472} }"#;

/// A server over an embedded store.
pub(crate) struct Running {
    /// Where it listens, the first address.
    pub(crate) address: String,
    pub(crate) store: Arc<dyn Store>,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<()>,
    _dir: Option<tempfile::TempDir>,
}

impl Running {
    /// Plain HTTP on a port of its own.
    pub(crate) async fn plain() -> Self {
        Self::with(ServeOptions::plain("127.0.0.1:0".parse().unwrap())).await
    }

    /// A server as `options` say.
    pub(crate) async fn with(options: ServeOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir).await;
        Self {
            _dir: Some(dir),
            ..Self::over(Arc::new(store), options).await
        }
    }

    /// A server of `store`.
    pub(crate) async fn over(store: Arc<dyn Store>, options: ServeOptions) -> Self {
        let served = Served::open(Arc::clone(&store), &options).unwrap();
        let listeners = server::listen(&options.listen, inherited::descriptor)
            .await
            .unwrap();
        let address = listeners[0].address();
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server::serve_all(listeners, served, async move {
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

    pub(crate) async fn stop(&mut self) {
        drop(self.stop.take());
        timeout(Duration::from_secs(5), &mut self.serving)
            .await
            .expect("it stops")
            .unwrap();
    }

    /// A plain request, as `curl` would send it.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        ask(&self.address, method, path, "", body).await
    }
}

/// A request with more header lines, each ending in CRLF.
pub(crate) async fn ask(address: &str, method: &str, path: &str, more: &str, body: &str) -> (u16, String) {
    let length = body.len();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{more}Content-Length: {length}\r\n\r\n{body}"
    );
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    // A reset after the answer is an end, too.
    let _ = timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes))
        .await
        .expect("an answer");
    parse(&bytes)
}

/// Status and body.
pub(crate) fn parse(bytes: &[u8]) -> (u16, String) {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .unwrap_or_default();
    (status, body.to_owned())
}

/// An embedded store with a config.
pub(crate) async fn open(dir: &tempfile::TempDir) -> EmbeddedStore {
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), Duration::from_secs(3600)).unwrap();
    store.set_config(CONFIG).await.unwrap();
    store
}

/// A client of `server`.
pub(crate) fn client(server: &str, tls: Option<TlsFiles>) -> RemoteStore {
    let server: ServerAddress = server.parse().unwrap();
    RemoteStore::open(&RemoteOptions {
        tls,
        ..RemoteOptions::plain(vec![server])
    })
    .unwrap()
}

/// Certificate files of a client.
pub(crate) fn tls(pair: Option<&KeyPairFiles>, ca: &std::path::Path) -> Option<TlsFiles> {
    Some(TlsFiles {
        pair: pair.cloned(),
        ca: Some(ca.to_owned()),
    })
}

/// What a node says of itself.
pub(crate) fn node(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}
