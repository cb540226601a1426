//! Both ends of the HTTP API: how a store is served, and how a node asks for one.

use std::path::PathBuf;

use super::{ListenAddress, ServerAddress};

/// How a store is served to other nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeOptions {
    /// Where to listen; never empty.
    pub listen: Vec<ListenAddress>,
    /// TLS on everything but unix sockets; none if absent. With a CA, clients must have a certificate.
    pub tls: Option<(KeyPairFiles, Option<PathBuf>)>,
    /// Who may do what; if absent, flannel's clients everything they do, and this machine the rest.
    pub access_file: Option<PathBuf>,
    /// Names by which clients may call this server, beside those it has anyway.
    pub names: Vec<String>,
    /// Which paths there are.
    pub form: ApiForm,
}

impl ServeOptions {
    /// Plain HTTP at one address, and nothing special.
    pub fn plain(listen: ListenAddress) -> Self {
        Self {
            listen: vec![listen],
            tls: None,
            access_file: None,
            names: Vec::new(),
            form: ApiForm::default(),
        }
    }
}

/// A certificate and its key on disk, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPairFiles {
    /// The certificate, with intermediate ones behind it.
    pub cert: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// What a client needs for TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The client's own certificate.
    pub pair: Option<KeyPairFiles>,
    /// Root certificates; the system's if absent.
    pub ca: Option<PathBuf>,
}

/// Servers a node asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteOptions {
    /// The servers, in order of preference; never empty.
    pub servers: Vec<ServerAddress>,
    /// Certificate files; if there are any, every server over TCP speaks TLS.
    pub tls: Option<TlsFiles>,
    /// File with the token that goes along with each request.
    pub token_file: Option<PathBuf>,
}

impl RemoteOptions {
    /// Plain HTTP to `servers`, without a token.
    pub fn plain(servers: Vec<ServerAddress>) -> Self {
        Self {
            servers,
            tls: None,
            token_file: None,
        }
    }
}

/// Which paths a server has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ApiForm {
    /// Flannel's: `/v1/{network}/...`.
    #[default]
    Flannel,
    /// Those, and the ones of the Kubernetes proposal: `/network/...` and `/{network}/...` without `/v1`.
    Kubernetes,
}
