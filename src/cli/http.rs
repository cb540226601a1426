//! Flags of both ends of the HTTP API; `run` and `server` share them.

use std::path::PathBuf;

use super::UsageError;
use super::store::OWN_STORE;
use crate::options::{
    ApiForm, KeyPairFiles, ListenAddress, RemoteOptions, Scheme, ServeOptions, ServerAddress, TlsFiles,
};

/// Certificate files, flannel's flags of v0.5 to v0.7: of the server with `--listen`, of the client with `--remote`.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = OWN_STORE)]
pub(super) struct CertificateArgs {
    /// Private key, PEM: of the server with --listen, of the client with --remote
    #[arg(long, value_name = "FILE")]
    remote_keyfile: Option<PathBuf>,
    /// Certificate of that key, PEM; a server with both speaks TLS
    #[arg(long, value_name = "FILE")]
    remote_certfile: Option<PathBuf>,
    /// Root certificates, PEM: a server asks clients for a certificate signed by them, a client the server
    #[arg(long, value_name = "FILE")]
    remote_cafile: Option<PathBuf>,
}

/// What a server has beside an address.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = OWN_STORE)]
pub(super) struct ServingArgs {
    /// Who may read, take leases and administer which network: TOML or JSON, see docs/server.md
    #[arg(long, value_name = "FILE")]
    access_file: Option<PathBuf>,
    /// Names by which clients call this server, comma-separated, beside its addresses and its host name
    #[arg(long, value_name = "NAME,...")]
    server_name: Option<String>,
    /// Which paths the server has: flannel's, or those of the Kubernetes proposal as well
    #[arg(long, value_name = "FORM", value_enum, default_value = "flannel")]
    api_form: ApiForm,
}

/// What a client has beside servers.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = OWN_STORE)]
pub(super) struct AskingArgs {
    /// File with a token for the servers of --remote
    #[arg(long, value_name = "FILE")]
    remote_token_file: Option<PathBuf>,
}

/// A list of addresses to listen on that is one flag's one value.
#[derive(Clone, Debug)]
pub(super) struct Listen(Vec<ListenAddress>);

impl ServingArgs {
    /// How to serve at `listen`.
    pub(super) fn into_options(
        self,
        listen: Listen,
        certificates: CertificateArgs,
    ) -> Result<ServeOptions, UsageError> {
        let CertificateArgs {
            remote_keyfile,
            remote_certfile,
            remote_cafile,
        } = certificates;
        let ca = present(remote_cafile);
        let tls = match (pair(remote_certfile, remote_keyfile)?, ca) {
            (Some(pair), ca) => Some((pair, ca)),
            (None, None) => None,
            (None, Some(_)) => {
                return Err(UsageError::new(
                    "--remote-cafile alone would leave this server without TLS",
                    "give --remote-certfile and --remote-keyfile as well",
                ));
            }
        };
        let names = self.server_name.as_deref().unwrap_or_default();
        Ok(ServeOptions {
            listen: listen.0,
            tls,
            access_file: present(self.access_file),
            names: names
                .split(',')
                .map(str::trim)
                .filter(|name| !name.is_empty())
                .map(str::to_owned)
                .collect(),
            form: self.api_form,
        })
    }
}

impl AskingArgs {
    /// How to ask `servers`.
    pub(super) fn into_options(
        self,
        servers: Vec<ServerAddress>,
        certificates: CertificateArgs,
    ) -> Result<RemoteOptions, UsageError> {
        let CertificateArgs {
            remote_keyfile,
            remote_certfile,
            remote_cafile,
        } = certificates;
        let (pair, ca) = (pair(remote_certfile, remote_keyfile)?, present(remote_cafile));
        let tls = (pair.is_some() || ca.is_some()).then_some(TlsFiles { pair, ca });
        let token_file = present(self.remote_token_file);
        for server in &servers {
            let ServerAddress::Tcp { scheme, .. } = server else {
                continue;
            };
            let plain = match scheme {
                Scheme::Http if tls.is_some() => {
                    return Err(UsageError::new(
                        format!("--remote=http://{server} is plain HTTP, and certificate files are given"),
                        "write https:// or no scheme, or drop --remote-certfile, --remote-keyfile and --remote-cafile",
                    ));
                }
                Scheme::Http => true,
                Scheme::ByFiles => tls.is_none(),
                Scheme::Https => false,
            };
            if plain && token_file.is_some() && !server.is_local() {
                return Err(UsageError::new(
                    format!("--remote-token-file would send the token to {server} in the clear"),
                    "write --remote=https://..., with --remote-cafile unless the system knows the server's authority",
                ));
            }
        }
        Ok(RemoteOptions {
            servers,
            tls,
            token_file,
        })
    }

    /// Whether any of it was given.
    pub(super) fn are_given(&self) -> bool {
        self.remote_token_file.is_some()
    }
}

impl CertificateArgs {
    /// Whether any file was given.
    pub(super) fn are_given(&self) -> bool {
        let files = [&self.remote_keyfile, &self.remote_certfile, &self.remote_cafile];
        files
            .into_iter()
            .flatten()
            .any(|file| !file.as_os_str().is_empty())
    }
}

/// Parses addresses to listen on, comma-separated.
pub(super) fn listen_list(text: &str) -> Result<Listen, String> {
    let mut addresses: Vec<ListenAddress> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let address = part.parse().map_err(|error| format!("{part:?}: {error}"))?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err("expected HOST:PORT, such as 0.0.0.0:8888, unix:///PATH or fd://".to_owned());
    }
    Ok(Listen(addresses))
}

/// An empty value is none, as in flannel.
fn present(path: Option<PathBuf>) -> Option<PathBuf> {
    path.filter(|path| !path.as_os_str().is_empty())
}

fn pair(cert: Option<PathBuf>, key: Option<PathBuf>) -> Result<Option<KeyPairFiles>, UsageError> {
    match (present(cert), present(key)) {
        (Some(cert), Some(key)) => Ok(Some(KeyPairFiles { cert, key })),
        (None, None) => Ok(None),
        (Some(_), None) | (None, Some(_)) => Err(UsageError::new(
            "--remote-certfile and --remote-keyfile need each other",
            "give both, or neither",
        )),
    }
}
