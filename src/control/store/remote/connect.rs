//! Connections to servers: TCP, TLS over TCP, unix sockets.
//!
//! A [`Connector`] is what hyper's pool calls for a new connection. The URI says which kind: `http` and `https` mean what
//! they say, `unix://N` is the Nth socket of the list the connector was made with. A TLS connection is made with the
//! certificate files as they are at that moment.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;
use tower_service::Service;

use crate::trust::{self, ClientTls};

/// How long a server has to take a connection, and once more to agree on TLS.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

type ConnectError = Box<dyn Error + Send + Sync>;

/// Makes connections.
#[derive(Clone, Debug)]
pub(super) struct Connector {
    tcp: HttpConnector,
    tls: Option<Arc<ClientTls>>,
    sockets: Arc<[PathBuf]>,
}

impl Connector {
    /// Makes a connector; `tls` is for `https`, `sockets` for `unix`.
    pub(super) fn new(tls: Option<Arc<ClientTls>>, sockets: Vec<PathBuf>) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_nodelay(true);
        // A machine that vanished is noticed after 5 + 3 × 3 s, with data in flight after 10 s.
        tcp.set_keepalive(Some(Duration::from_secs(5)));
        tcp.set_keepalive_interval(Some(Duration::from_secs(3)));
        tcp.set_keepalive_retries(Some(3));
        tcp.set_tcp_user_timeout(Some(Duration::from_secs(10)));
        Self {
            tcp,
            tls,
            sockets: sockets.into(),
        }
    }

    async fn connect(mut self, uri: Uri) -> Result<Wire, ConnectError> {
        match uri.scheme_str() {
            Some("unix") => {
                let number: Option<usize> = uri.host().and_then(|host| host.parse().ok());
                let path = number.and_then(|number| self.sockets.get(number));
                let path = path.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(path))
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                Ok(Wire::new(stream))
            }
            Some("https") => {
                let tls = self.tls.clone().ok_or("there is no TLS configuration")?;
                let host = uri.host().unwrap_or_default();
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let name = ServerName::try_from(host.to_owned())?;
                let stream = self.tcp.call(uri).await?.into_inner();
                let handshake = TlsConnector::from(tls.current()).connect(name, stream);
                let stream = tokio::time::timeout(CONNECT_TIMEOUT, handshake)
                    .await
                    .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
                Ok(Wire::new(stream))
            }
            _ => Ok(Wire::new(self.tcp.call(uri).await?.into_inner())),
        }
    }
}

impl Service<Uri> for Connector {
    type Response = Wire;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<Wire, ConnectError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

/// What a failed exchange ended with, and what to do about it where that is known.
pub(super) fn explain(error: &(dyn Error + 'static)) -> String {
    let cause = root_cause(error);
    if let Some(advice) = trust::advice(error) {
        return format!("{cause}: {advice}");
    }
    let mut inner = Some(error);
    while let Some(error) = inner {
        if error
            .downcast_ref::<hyper::Error>()
            .is_some_and(hyper::Error::is_parse)
        {
            return format!(
                "{cause}: the server does not speak plain HTTP there; if it speaks TLS, write https:// or give --remote-cafile"
            );
        }
        inner = error.source();
    }
    cause
}

/// The innermost cause, which says what happened; hyper's outer words say only that something did.
fn root_cause(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A byte stream of any kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection, as hyper wants it.
pub(super) struct Wire(TokioIo<Box<dyn Stream>>);

impl Wire {
    fn new(stream: impl Stream + 'static) -> Self {
        Self(TokioIo::new(Box::new(stream)))
    }
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

impl Write for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}
