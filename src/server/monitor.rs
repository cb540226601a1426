//! `/healthz`, `/readyz` and `/metrics` over HTTP.
//!
//! The first two answer as flanneld's do, byte for byte and to any method; `/healthz` says 503 and why when a part of the daemon has
//! stopped, where flanneld's would still say that all is well. `/metrics` is in OpenMetrics text.
//!
//! Metrics name peers and count their traffic, so a listener says to whom it tells them ([`Audience`]). A listener on loopback tells them only
//! if the request's `Host` is this machine: a page in a browser here must not read them under a name of its own.
//!
//! # Limits
//!
//! [`MAX_CONNECTIONS`] at a time; when there is one more, the oldest is closed, so that whoever holds connections open does not keep a
//! probe out. A request's head must be there within [`HEAD_TIMEOUT`] and be no longer than [`MAX_HEAD_BYTES`]; bodies are not read.
//! A port that is taken, or an address that is not there yet, is tried again for ever.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::sleep;

/// Connections at a time.
pub const MAX_CONNECTIONS: usize = 256;
/// How long the head of a request may take, and how long a connection may idle.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest head of a request; hyper wants at least 8 KiB.
pub const MAX_HEAD_BYTES: usize = 8 * 1024;
/// Longest pause between two attempts to listen.
const RETRY: Duration = Duration::from_secs(10);
/// OpenMetrics text.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// What Go's server says plain text is.
const TEXT_TYPE: &str = "text/plain; charset=utf-8";

/// What is watched: something that lives, becomes ready, and counts.
pub trait Monitored: Send + Sync + 'static {
    /// Whether all parts that should run do; if not, what does not.
    ///
    /// # Errors
    /// What has stopped, in words.
    fn alive(&self) -> Result<(), String>;
    /// Whether the subnet file is written and packets flow.
    fn ready(&self) -> bool;
    /// The counters, as OpenMetrics text.
    fn metrics(&self) -> String;
}

/// Who gets `/metrics` from a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Whoever asks: the address was given for them.
    Everybody,
    /// Whoever asks this address, and this machine: others of the listener's addresses were given for probes.
    At(IpAddr),
    /// This machine only: the address was given for probes.
    ThisMachine,
}

/// Listens on `address` and answers for ever; tries for as long as it takes to get the address.
pub async fn serve(address: SocketAddr, audience: Audience, monitored: Arc<impl Monitored>) -> Infallible {
    let mut pause = Duration::from_millis(100);
    let mut told = String::new();
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                let text = error.to_string();
                if text != told {
                    tracing::warn!(%address, %error, "cannot listen for health probes and metrics; trying on");
                    told = text;
                }
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY);
    };
    tracing::info!(%address, "answering health probes and metrics");
    accept(listener, audience, monitored).await
}

/// Answers on `listener` for ever.
pub async fn accept(listener: TcpListener, audience: Audience, monitored: Arc<impl Monitored>) -> Infallible {
    let mut connections = Connections::default();
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let monitored = Arc::clone(&monitored);
                connections.add(tokio::spawn(converse(stream, from, audience, monitored)).abort_handle());
            }
            Err(error) => {
                // Out of descriptors, or the peer was faster: a pause keeps this from spinning.
                tracing::debug!(%error, "cannot accept a connection");
                sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// The connections there are, oldest first.
#[derive(Default)]
struct Connections(VecDeque<AbortHandle>);

impl Connections {
    fn add(&mut self, connection: AbortHandle) {
        self.0.retain(|held| !held.is_finished());
        if self.0.len() >= MAX_CONNECTIONS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.abort();
        }
        self.0.push_back(connection);
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        for connection in &self.0 {
            connection.abort();
        }
    }
}

async fn converse(stream: TcpStream, from: SocketAddr, audience: Audience, monitored: Arc<impl Monitored>) {
    let here = stream.local_addr().map(|addr| addr.ip()).ok();
    let service = service_fn(move |request: Request<Incoming>| {
        let monitored = Arc::clone(&monitored);
        async move {
            let client = Client {
                from: from.ip().to_canonical(),
                to: here.map(|addr| addr.to_canonical()),
                host: request.headers().get(HOST),
            };
            let told = may_have_metrics(audience, &client);
            Ok::<_, Infallible>(answer(request.method(), request.uri().path(), told, &*monitored))
        }
    });
    let ended = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = ended {
        tracing::debug!(%error, "a probe's connection ended");
    }
}

/// Who asks, by which address of ours and by which name.
struct Client<'a> {
    from: IpAddr,
    to: Option<IpAddr>,
    host: Option<&'a HeaderValue>,
}

/// Whether the client may see `/metrics`.
fn may_have_metrics(audience: Audience, client: &Client<'_>) -> bool {
    let local = client.from.is_loopback() || Some(client.from) == client.to;
    let meant = match audience {
        Audience::ThisMachine => local,
        Audience::At(address) => local || client.to == Some(address.to_canonical()),
        Audience::Everybody => true,
    };
    // DNS rebinding: a page's own name leads here, and the browser would let the page read the answer.
    meant && (!client.to.is_some_and(|to| to.is_loopback()) || names_this_machine(client.host))
}

/// Whether the `Host` of a request over loopback is loopback's, or absent as in HTTP/1.0.
fn names_this_machine(host: Option<&HeaderValue>) -> bool {
    let Some(host) = host else { return true };
    let Ok(host) = host.to_str() else { return false };
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) | None => host,
    };
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    bare.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|addr| addr.to_canonical().is_loopback())
}

/// The answer to a request; `told` is whether the client may see metrics.
fn answer(method: &Method, path: &str, told: bool, monitored: &impl Monitored) -> Response<Full<Bytes>> {
    match path {
        "/healthz" => match monitored.alive() {
            Ok(()) => text(StatusCode::OK, "flanneld is running"),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        "/readyz" if monitored.ready() => text(StatusCode::OK, "flanneld is ready"),
        "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "flanneld is not ready yet"),
        "/metrics" if !told => text(
            StatusCode::FORBIDDEN,
            "metrics are for this machine; --metrics-address gives them to others\n",
        ),
        "/metrics" if method == Method::GET || method == Method::HEAD => {
            let mut response = text(StatusCode::OK, monitored.metrics());
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(METRICS_TYPE));
            response
        }
        "/metrics" => {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(TEXT_TYPE));
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    #[derive(Default)]
    struct Daemon {
        stopped: AtomicBool,
        ready: AtomicBool,
    }

    impl Monitored for Daemon {
        fn alive(&self) -> Result<(), String> {
            if self.stopped.load(Ordering::Relaxed) {
                return Err("thread queue-0 has ended".to_owned());
            }
            Ok(())
        }

        fn ready(&self) -> bool {
            self.ready.load(Ordering::Relaxed)
        }

        fn metrics(&self) -> String {
            "# EOF\n".to_owned()
        }
    }

    async fn started() -> (SocketAddr, Arc<Daemon>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let daemon = Arc::<Daemon>::default();
        tokio::spawn(accept(listener, Audience::ThisMachine, Arc::clone(&daemon)));
        (address, daemon)
    }

    async fn ask(address: SocketAddr, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(5), stream.read_to_string(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        let body = answer
            .split_once("\r\n\r\n")
            .map(|(_, body)| body.to_owned())
            .unwrap();
        (status, body)
    }

    fn request(method: &str, path: &str, host: &str) -> String {
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    }

    #[tokio::test]
    async fn probes_hear_what_flanneld_says() {
        let (address, daemon) = started().await;
        for method in ["GET", "POST", "DELETE", "BREW"] {
            let healthy = ask(address, &request(method, "/healthz", "x")).await;
            assert_eq!(healthy, (200, "flanneld is running".to_owned()), "{method}");
            let early = ask(address, &request(method, "/readyz", "x")).await;
            assert_eq!(early, (503, "flanneld is not ready yet".to_owned()), "{method}");
        }
        daemon.ready.store(true, Ordering::Relaxed);
        let ready = ask(address, &request("GET", "/readyz", "x")).await;
        assert_eq!(ready, (200, "flanneld is ready".to_owned()));
        let other = ask(address, &request("GET", "/", "x")).await;
        assert_eq!(other, (404, "404 page not found\n".to_owned()));
    }

    #[tokio::test]
    async fn a_part_that_stopped_is_no_health() {
        let (address, daemon) = started().await;
        daemon.stopped.store(true, Ordering::Relaxed);
        let sick = ask(address, &request("GET", "/healthz", "x")).await;
        assert_eq!(sick, (503, "thread queue-0 has ended".to_owned()));
    }

    #[tokio::test]
    async fn metrics_are_read_not_written_and_not_under_a_foreign_name() {
        let (address, _) = started().await;
        for host in [
            "localhost",
            "127.0.0.1:9100",
            "[::1]:9100",
            "LocalHost:1",
            "[::ffff:127.0.0.1]:9100",
        ] {
            let told = ask(address, &request("GET", "/metrics", host)).await;
            assert_eq!(told, (200, "# EOF\n".to_owned()), "{host}");
        }
        assert_eq!(ask(address, "GET /metrics HTTP/1.0\r\n\r\n").await.0, 200);
        assert_eq!(
            ask(address, &request("POST", "/metrics", "localhost")).await.0,
            405
        );
        for host in [
            "rebound.example",
            "192.0.2.1:80",
            "localhost.example",
            "[::ffff:192.0.2.1]:80",
            "",
        ] {
            let refused = ask(address, &request("GET", "/metrics", host)).await;
            assert_eq!(refused.0, 403, "{host}");
        }
    }

    #[test]
    fn a_port_for_probes_tells_metrics_to_this_machine_only() {
        let client = |from: &str, to: &str| Client {
            from: from.parse().unwrap(),
            to: to.parse().ok(),
            host: None,
        };
        let other = client("192.0.2.9", "192.0.2.1");
        assert!(!may_have_metrics(Audience::ThisMachine, &other));
        assert!(may_have_metrics(Audience::Everybody, &other));
        let at = |text: &str| Audience::At(text.parse().unwrap());
        assert!(may_have_metrics(at("192.0.2.1"), &other));
        assert!(!may_have_metrics(at("192.0.2.7"), &other));
        assert!(may_have_metrics(
            at("192.0.2.7"),
            &client("192.0.2.1", "192.0.2.1")
        ));
        assert!(may_have_metrics(
            Audience::ThisMachine,
            &client("192.0.2.1", "192.0.2.1")
        ));
        assert!(may_have_metrics(
            Audience::ThisMachine,
            &client("127.0.0.1", "127.0.0.1")
        ));
    }

    /// B4 for this port: whoever holds a thousand connections open keeps no probe out.
    #[tokio::test]
    async fn a_thousand_idle_connections_keep_no_probe_out() {
        let (address, _) = started().await;
        let mut idle = Vec::new();
        for _ in 0..1000 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            // Those at the front are closed already.
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHos").await;
            idle.push(stream);
        }
        for _ in 0..20 {
            let probe = request("GET", "/healthz", "x");
            let asked = timeout(Duration::from_secs(2), ask(address, &probe)).await;
            assert_eq!(asked.unwrap().0, 200);
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_tried_again() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let serving = tokio::spawn(serve(address, Audience::ThisMachine, Arc::<Daemon>::default()));
        sleep(Duration::from_millis(50)).await;
        assert!(!serving.is_finished());
        drop(taken);
        let mut patience = 100;
        while TcpStream::connect(address).await.is_err() {
            patience -= 1;
            assert!(patience > 0);
            sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(ask(address, &request("GET", "/healthz", "x")).await.0, 200);
        serving.abort();
    }
}
