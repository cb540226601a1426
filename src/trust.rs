//! Certificates and secrets in files, for both ends of the HTTP API.
//!
//! [`ServerTls`] and [`ClientTls`] are TLS configurations made from PEM files. The files are looked at each time a
//! connection is made ([`reload`]): a certificate that was replaced is used from the next connection on, and while the new
//! files are no good the old ones stay in use. At start there is nothing to fall back on, and bad files are an error.
//!
//! Whoever asks for TLS gets it or nothing: versions below 1.2 are refused, the server's certificate is always verified
//! against the address it was called by, and a server with a CA takes no client without a certificate signed by it. No
//! protocol is offered in the handshake (ALPN), because flannel 0.7's server knows only `h2` there and then speaks
//! HTTP/1.1.
//!
//! [`advice`] says what to do about a connection that TLS refused, [`names`] whose certificate a client has.

pub mod names;
pub mod reload;

use std::error::Error;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hyper_rustls::ConfigBuilderExt;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};

use self::reload::Reload;
use crate::options::{KeyPairFiles, TlsFiles};

/// The longest file read: a bundle of all public roots is a quarter of it.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Why files give no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file cannot be read.
    #[error("cannot read {}: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} {problem}", .path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Certificate and key do not go together, or cannot be used.
    #[error("cannot use the certificate {} with the key {}: {cause}", .cert.display(), .key.display())]
    Pair {
        /// The certificate.
        cert: PathBuf,
        /// The key.
        key: PathBuf,
        /// The cause.
        cause: String,
    },
    /// The system has no usable root certificates.
    #[error("cannot use the system's root certificates: {0}; name a file with --remote-cafile")]
    SystemRoots(String),
    /// TLS itself cannot be set up.
    #[error("cannot set up TLS: {0}")]
    Setup(String),
}

/// TLS for a server, re-made when its files change.
#[derive(Debug)]
pub struct ServerTls {
    config: Reload<ServerConfig>,
    asks_clients: bool,
}

impl ServerTls {
    /// Reads the files. With a CA, clients must have a certificate signed by it.
    ///
    /// # Errors
    /// A file cannot be read, or is no good.
    pub fn open(pair: &KeyPairFiles, ca: Option<&Path>) -> Result<Self, TrustError> {
        let mut files = vec![pair.cert.clone(), pair.key.clone()];
        files.extend(ca.map(Path::to_owned));
        let asks_clients = ca.is_some();
        let (pair, ca) = (pair.clone(), ca.map(Path::to_owned));
        let load = move || server_config(&pair, ca.as_deref());
        Ok(Self {
            config: Reload::open("certificate of the server", files, load)?,
            asks_clients,
        })
    }

    /// The configuration for the next connection.
    pub fn current(&self) -> Arc<ServerConfig> {
        self.config.current()
    }

    /// Whether clients must have a certificate.
    pub fn asks_clients(&self) -> bool {
        self.asks_clients
    }
}

/// TLS for a client, re-made when its files change.
#[derive(Debug)]
pub struct ClientTls {
    config: Reload<ClientConfig>,
}

impl ClientTls {
    /// Reads the files; without a CA file the system's roots are used.
    ///
    /// # Errors
    /// A file cannot be read, or is no good.
    pub fn open(files: &TlsFiles) -> Result<Self, TrustError> {
        let mut watched: Vec<PathBuf> = files.ca.iter().cloned().collect();
        if let Some(pair) = &files.pair {
            watched.extend([pair.cert.clone(), pair.key.clone()]);
        }
        let files = files.clone();
        let load = move || client_config(&files);
        Ok(Self {
            config: Reload::open("certificate of the client", watched, load)?,
        })
    }

    /// The configuration for the next connection.
    pub fn current(&self) -> Arc<ClientConfig> {
        self.config.current()
    }
}

/// A secret in a file, re-read when it changes. Nothing prints it.
pub struct Secret(Reload<String>);

impl Secret {
    /// Reads the file: one line.
    ///
    /// # Errors
    /// It cannot be read, or does not hold one word.
    pub fn open(path: &Path) -> Result<Self, TrustError> {
        let file = path.to_owned();
        let load = move || {
            let text = read_text(&file)?;
            warn_if_exposed(&file);
            let token = text.trim();
            // RFC 6750 §2.1: what a header can carry as it is.
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
            if token.is_empty() || !token.bytes().all(plain) {
                return Err(TrustError::Content {
                    path: file.clone(),
                    problem: "must hold one token: letters, digits and any of - . _ ~ + / =".to_owned(),
                });
            }
            Ok(token.to_owned())
        };
        Ok(Self(Reload::open("token", vec![path.to_owned()], load)?))
    }

    /// The secret as it stands.
    pub fn current(&self) -> Arc<String> {
        self.0.current()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

/// Reads a small text file.
///
/// # Errors
/// It cannot be read, is too long, or is no UTF-8.
pub fn read_text(path: &Path) -> Result<String, TrustError> {
    String::from_utf8(read(path)?).map_err(|_| TrustError::Content {
        path: path.to_owned(),
        problem: "is not UTF-8 text".to_owned(),
    })
}

/// Points out a file with secrets that everybody may read.
pub fn warn_if_exposed(path: &Path) {
    if fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o004 != 0) {
        tracing::warn!(
            file = %path.display(),
            "every user of this machine may read this file, and it holds a secret; chmod o= it"
        );
    }
}

/// What to do about a connection that TLS refused; `error` is what the attempt ended with.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "rustls adds errors as it likes; there is advice for those an operator can mend"
)]
pub fn advice(error: &(dyn Error + 'static)) -> Option<&'static str> {
    use rustls::Error as Tls;

    Some(match tls_error(error)? {
        Tls::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer => {
                "no certificate authority we trust has signed the server's certificate; give the right one with --remote-cafile"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the server's certificate has expired; renew it, or set this machine's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the server's certificate is not valid yet; set this machine's clock"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "the server's certificate is for another name; use a name in --remote that is in it, or issue it with that \
                 name or address as subjectAltName"
            }
            _ => {
                "the server's certificate is not usable; issue an X.509 v3 one for servers, with a subjectAltName"
            }
        },
        Tls::AlertReceived(AlertDescription::CertificateRequired) => {
            "the server wants a client certificate; give --remote-certfile and --remote-keyfile"
        }
        // TLS 1.2 has no alert of its own for "no certificate".
        Tls::AlertReceived(AlertDescription::HandshakeFailure) => {
            "the server refused the handshake; it may want a client certificate: --remote-certfile and --remote-keyfile"
        }
        Tls::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::DecryptError
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown,
        ) => {
            "the server does not accept our certificate; have it signed by the server's --remote-cafile, for clients"
        }
        Tls::AlertReceived(AlertDescription::CertificateExpired) => {
            "the server says that our certificate has expired; renew --remote-certfile"
        }
        Tls::AlertReceived(AlertDescription::ProtocolVersion) | Tls::PeerIncompatible(_) => {
            "the other end does not speak TLS 1.2 or 1.3 as we do; update it"
        }
        Tls::InvalidMessage(_) => {
            "the server does not speak TLS there; give it --remote-certfile and --remote-keyfile, or drop our certificate files"
        }
        _ => return None,
    })
}

/// The TLS error somewhere inside `error`.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // An io::Error names its inner error's source as its own, and leaves the inner one out.
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref)
            .and_then(|inner| tls_error(inner));
        if inner.is_some() {
            return inner;
        }
        cause = error.source();
    }
    None
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn setup(error: impl ToString) -> TrustError {
    TrustError::Setup(error.to_string())
}

fn server_config(pair: &KeyPairFiles, ca: Option<&Path>) -> Result<ServerConfig, TrustError> {
    let (certs, key) = read_pair(pair)?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(setup)?;
    let builder = match ca {
        None => builder.with_no_client_auth(),
        Some(ca) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(read_roots(ca)?), provider())
                .build()
                .map_err(setup)?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder
        .with_single_cert(certs, key)
        .map_err(|error| pair_error(pair, &error))?;
    // Resumption would let a client in whose certificate the CA of today refuses.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(files: &TlsFiles) -> Result<ClientConfig, TrustError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(setup)?;
    let builder = match &files.ca {
        Some(ca) => builder.with_root_certificates(read_roots(ca)?),
        None => builder
            .with_native_roots()
            .map_err(|error| TrustError::SystemRoots(error.to_string()))?,
    };
    match &files.pair {
        None => Ok(builder.with_no_client_auth()),
        Some(pair) => {
            let (certs, key) = read_pair(pair)?;
            builder
                .with_client_auth_cert(certs, key)
                .map_err(|error| pair_error(pair, &error))
        }
    }
}

fn pair_error(pair: &KeyPairFiles, error: &rustls::Error) -> TrustError {
    let cause = if let rustls::Error::InconsistentKeys(_) = error {
        "they do not belong together".to_owned()
    } else {
        error.to_string()
    };
    TrustError::Pair {
        cert: pair.cert.clone(),
        key: pair.key.clone(),
        cause,
    }
}

fn read_pair(
    pair: &KeyPairFiles,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TrustError> {
    let certs = read_certificates(&pair.cert)?;
    let text = read(&pair.key)?;
    let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| TrustError::Content {
        path: pair.key.clone(),
        problem: format!("holds no private key in PEM form ({error})"),
    })?;
    warn_if_exposed(&pair.key);
    Ok((certs, key))
}

fn read_roots(path: &Path) -> Result<RootCertStore, TrustError> {
    let mut roots = RootCertStore::empty();
    for certificate in read_certificates(path)? {
        roots.add(certificate).map_err(|error| TrustError::Content {
            path: path.to_owned(),
            problem: format!("holds a certificate that cannot be a root: {error}"),
        })?;
    }
    Ok(roots)
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let text = read(path)?;
    let content = |problem: String| TrustError::Content {
        path: path.to_owned(),
        problem,
    };
    let certificates = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| content(format!("is not in PEM form: {error}")))?;
    if certificates.is_empty() {
        return Err(content("holds no certificate in PEM form".to_owned()));
    }
    Ok(certificates)
}

fn read(path: &Path) -> Result<Vec<u8>, TrustError> {
    let read_error = |cause| TrustError::Read {
        path: path.to_owned(),
        cause,
    };
    let bytes = fs::metadata(path).map_err(read_error)?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(TrustError::Content {
            path: path.to_owned(),
            problem: format!("has {bytes} bytes; the most read is {MAX_FILE_BYTES}"),
        });
    }
    fs::read(path).map_err(read_error)
}
