//! The connection to etcd: which member, how it is secured, how long it is waited for.
//!
//! One member is spoken to at a time, the one that answers first when all are asked at once: an endpoint that is dead or
//! hangs costs nothing beside one that lives (flannel's default names two, of which one is always dead). After a
//! failure the next request asks all again. Certificates are read once.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::timeout;

use crate::control::store::StoreError;
use crate::control::store::etcd::EtcdOptions;

/// Ping interval and ping timeout of a connection, idle or not: a black hole is noticed after both, in 10 s.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// One request; etcd answers in milliseconds, and in a second or two while it elects a leader.
const REQUEST: Duration = Duration::from_secs(5);

/// Where the system keeps its root certificates, by distribution.
const SYSTEM_ROOTS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// A way to etcd.
pub(super) struct Connection {
    /// Endpoints and prefix, for errors.
    place: String,
    endpoints: Vec<String>,
    options: ConnectOptions,
    /// Speaks to one member; `None` before the first request and after a failure.
    client: Mutex<Option<Client>>,
}

impl Connection {
    pub(super) fn new(options: &EtcdOptions, place: String) -> Result<Self, StoreError> {
        let mut connect = ConnectOptions::new()
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE)
            .with_keep_alive_while_idle(true)
            .with_timeout(REQUEST)
            .with_connect_timeout(REQUEST)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if !options.username.is_empty() && !options.password.is_empty() {
            connect = connect.with_user(options.username.as_str(), options.password.as_str());
        }
        if options.endpoints.iter().any(|url| url.starts_with("https://")) {
            connect = connect.with_tls(tls(options)?);
        }
        if options.endpoints.is_empty() {
            return Err(refused("open the store", "no etcd endpoint is given"));
        }
        Ok(Self {
            place,
            endpoints: options.endpoints.clone(),
            options: connect,
            client: Mutex::new(None),
        })
    }

    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// The client in use, or a new one for the member that answers first.
    pub(super) async fn client(&self, doing: &'static str) -> Result<Client, StoreError> {
        if let Some(client) = self.slot().clone() {
            return Ok(client);
        }
        let mut members: FuturesUnordered<_> = self
            .endpoints
            .iter()
            .map(|endpoint| self.connect(doing, endpoint))
            .collect();
        let mut failure = None;
        while let Some(connected) = members.next().await {
            match connected {
                Ok(client) => {
                    *self.slot() = Some(client.clone());
                    return Ok(client);
                }
                // What a member that answers says is worth more than that another one does not.
                Err(error) if error.is_unavailable() && failure.is_some() => {}
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| self.unavailable(doing, "there is no endpoint".to_owned())))
    }

    async fn connect(&self, doing: &'static str, endpoint: &str) -> Result<Client, StoreError> {
        let options = Some(self.options.clone());
        let mut client = self.ask(doing, Client::connect([endpoint], options)).await?;
        // Connecting proves nothing; an answer does, even a refusal.
        match self.ask(doing, client.status()).await {
            Err(error) if error.is_unavailable() => Err(error),
            Ok(_) | Err(_) => Ok(client),
        }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs one request, never longer than [`REQUEST`].
    pub(super) async fn ask<T>(
        &self,
        doing: &'static str,
        request: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, StoreError> {
        match timeout(REQUEST, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.error(doing, &error)),
            Err(_) => Err(self.unavailable(doing, format!("no answer within {} s", REQUEST.as_secs()))),
        }
    }

    pub(super) fn error(&self, doing: &'static str, error: &Error) -> StoreError {
        if let Error::GRpcStatus(status) = error {
            // The words of gRPC's code, since etcd-client does not show the type: an answer, and a no.
            let code = format!("{:?}", status.code());
            let answers = [
                "InvalidArgument",
                "Unauthenticated",
                "PermissionDenied",
                "FailedPrecondition",
            ];
            if answers.contains(&code.as_str()) {
                return refused(doing, &format!("etcd says: {}", status.message()));
            }
            return self.unavailable(doing, format!("{code}: {}", status.message()));
        }
        self.unavailable(doing, error.to_string())
    }

    /// Reports a failure, and has the next request look for a member that answers.
    pub(super) fn unavailable(&self, doing: &'static str, cause: String) -> StoreError {
        *self.slot() = None;
        StoreError::Unavailable {
            doing,
            place: self.place.clone(),
            cause,
        }
    }
}

pub(super) fn refused(doing: &'static str, cause: &str) -> StoreError {
    StoreError::Refused {
        doing,
        cause: cause.to_owned(),
    }
}

fn tls(options: &EtcdOptions) -> Result<TlsOptions, StoreError> {
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|error| {
            refused(
                "open the store",
                &format!("cannot read {}: {error}", path.display()),
            )
        })
    };
    let roots = match &options.cafile {
        Some(path) => read(path)?,
        None => match SYSTEM_ROOTS.map(PathBuf::from).iter().find(|path| path.exists()) {
            Some(path) => read(path)?,
            None => Vec::new(),
        },
    };
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(roots));
    if let (Some(certificate), Some(key)) = (&options.certfile, &options.keyfile) {
        tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(tls)
}
