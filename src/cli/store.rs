//! Flags that say which store to use; `run` and `server` share them.

use std::path::PathBuf;
use std::time::Duration;

use super::UsageError;
use super::go_flags::parse_int;
use crate::addr::NetworkName;
use crate::control::store::etcd::check_endpoints;
use crate::options::{
    ClientCert, EmbeddedOptions, EtcdOptions, Login, NetworkConfigSource, RemoteOptions, ServerAddress,
    StoreKind, StoreOptions,
};

/// Where flannel looks for etcd if nobody says.
const DEFAULT_ENDPOINTS: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";

/// Heading of the flags flannel does not have.
pub(super) const OWN_STORE: &str = "Store: Kersey's own flags";

/// Flannel's flags for etcd.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Store: etcd, the default (flannel's flags)")]
pub(super) struct EtcdArgs {
    /// Comma-separated etcd endpoints [default: http://127.0.0.1:4001,http://127.0.0.1:2379]
    #[arg(long, value_name = "URLS", alias = "etcd-endpoint")]
    etcd_endpoints: Option<String>,
    /// Key prefix of config and leases
    #[arg(long, value_name = "PREFIX", default_value = "/coreos.com/network", value_parser = non_empty)]
    etcd_prefix: String,
    /// Client key, PEM
    #[arg(long, value_name = "FILE")]
    etcd_keyfile: Option<PathBuf>,
    /// Client certificate, PEM
    #[arg(long, value_name = "FILE")]
    etcd_certfile: Option<PathBuf>,
    /// Root certificates to trust, PEM; needs no client certificate
    #[arg(long, value_name = "FILE")]
    etcd_cafile: Option<PathBuf>,
    /// User name
    #[arg(long, value_name = "NAME")]
    etcd_username: Option<String>,
    /// Password; better given in KERSEY_ETCD_PASSWORD, which other users cannot see
    #[arg(long, value_name = "PASSWORD")]
    etcd_password: Option<String>,
}

/// Where a node keeps its state.
pub(super) const DEFAULT_DATA_DIR: &str = "/var/lib/kersey";

/// Kersey's flags for its own store and for all stores.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = OWN_STORE)]
pub(super) struct OwnStoreArgs {
    /// Directory for state: the embedded store, and the cache from which a node starts while its store is away
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA_DIR)]
    pub(super) data_dir: PathBuf,
    /// Network config for an embedded store that has none: a file, or JSON text; NAME= before it is for the network of that
    /// name, and the flag may be repeated
    #[arg(long, value_name = "[NAME=]FILE|JSON", value_parser = network_config)]
    network_config: Vec<NetworkConfigArg>,
    /// How long a lease lives without renewal
    #[arg(long, value_name = "SECONDS", default_value = "86400", value_parser = lease_seconds)]
    pub(super) lease_ttl: Duration,
    /// Longest pause between attempts to reach the store
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = backoff_seconds)]
    store_backoff_cap: Duration,
}

/// Whether a subcommand serves its store to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Serving {
    /// `--listen` was given.
    Yes,
    /// It was not.
    No,
}

/// Picks the store: `remote` if given; the embedded one if it is to be served and no etcd endpoint is named; else etcd.
pub(super) fn store_options(
    etcd: EtcdArgs,
    own: &OwnStoreArgs,
    remote: Option<RemoteOptions>,
    serving: Serving,
) -> Result<StoreOptions, UsageError> {
    let kind = match (remote, serving) {
        (Some(_), _) if etcd.etcd_endpoints.is_some() => {
            return Err(UsageError::new(
                "--remote and --etcd-endpoints exclude each other",
                "drop one of them: a node uses one store",
            ));
        }
        (Some(remote), _) => StoreKind::Remote(remote),
        (None, Serving::Yes) if etcd.etcd_endpoints.is_none() => StoreKind::Embedded(EmbeddedOptions {
            data_dir: own.data_dir.clone(),
            network_configs: network_configs(&own.network_config)?,
        }),
        (None, Serving::Yes | Serving::No) => StoreKind::Etcd(etcd.into_options()?),
    };
    if !own.network_config.is_empty() && !matches!(kind, StoreKind::Embedded(_)) {
        return Err(UsageError::new(
            "--network-config is for the embedded store, and this is not one",
            "add --listen HOST:PORT without --etcd-endpoints, or write the config to PREFIX/config in etcd",
        ));
    }
    Ok(StoreOptions {
        kind,
        backoff_cap: own.store_backoff_cap,
    })
}

impl EtcdArgs {
    /// What flannel 0.5 to 0.7 meant by `--listen`: a server over etcd, wherever that is.
    pub(super) fn with_default_endpoints(mut self) -> Self {
        self.etcd_endpoints
            .get_or_insert_with(|| DEFAULT_ENDPOINTS.to_owned());
        self
    }

    fn into_options(self) -> Result<EtcdOptions, UsageError> {
        let endpoints: Vec<String> = self
            .etcd_endpoints
            .as_deref()
            .unwrap_or(DEFAULT_ENDPOINTS)
            .split(',')
            .map(str::trim)
            .filter(|endpoint| !endpoint.is_empty())
            .map(str::to_owned)
            .collect();
        if endpoints.is_empty() {
            return Err(UsageError::new(
                "--etcd-endpoints names no endpoint",
                "give at least one URL, such as http://127.0.0.1:2379",
            ));
        }
        let present = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
        let client_cert = match (present(self.etcd_certfile), present(self.etcd_keyfile)) {
            (Some(cert_file), Some(key_file)) => Some(ClientCert { cert_file, key_file }),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(UsageError::new(
                    "--etcd-certfile and --etcd-keyfile need each other",
                    "give both, or neither",
                ));
            }
        };
        let ca_file = present(self.etcd_cafile);
        check_endpoints(&endpoints, ca_file.is_some() || client_cert.is_some()).map_err(|cause| {
            UsageError::new(
                format!("--etcd-endpoints: {cause}"),
                "give URLs such as http://127.0.0.1:2379, separated by commas",
            )
        })?;
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        let login = match (some(self.etcd_username), some(self.etcd_password)) {
            (Some(user), Some(password)) => Some(Login { user, password }),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(UsageError::new(
                    "--etcd-username and --etcd-password need each other",
                    "give both, or neither",
                ));
            }
        };
        Ok(EtcdOptions {
            endpoints,
            prefix: self.etcd_prefix,
            ca_file,
            client_cert,
            login,
        })
    }
}

/// Parses `HOST:PORT[,HOST:PORT]`.
pub(super) fn servers(text: &str) -> Result<Vec<ServerAddress>, String> {
    let mut servers = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let server: ServerAddress = part.parse().map_err(|error| format!("{part:?}: {error}"))?;
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    if servers.is_empty() {
        return Err("expected HOST:PORT, such as 10.0.0.1:8888".to_owned());
    }
    Ok(servers)
}

/// Parses a whole number of seconds within a range.
pub(super) fn seconds(text: &str, range: std::ops::RangeInclusive<i64>) -> Result<Duration, String> {
    let value = int_within(text, range)?;
    Ok(Duration::from_secs(value.unsigned_abs()))
}

/// Parses a whole number within a range.
pub(super) fn int_within(text: &str, range: std::ops::RangeInclusive<i64>) -> Result<i64, String> {
    let rule = || {
        format!(
            "expected a whole number from {} to {}",
            range.start(),
            range.end()
        )
    };
    parse_int(text)
        .ok()
        .filter(|value| range.contains(value))
        .ok_or_else(rule)
}

fn lease_seconds(text: &str) -> Result<Duration, String> {
    // One second is the least that still leaves room to renew; a year is longer than any sensible outage.
    seconds(text, 2..=365 * 86_400)
}

fn backoff_seconds(text: &str) -> Result<Duration, String> {
    seconds(text, 1..=3600)
}

/// A config, and the network it is for.
type NetworkConfigArg = (Option<NetworkName>, NetworkConfigSource);

fn network_configs(given: &[NetworkConfigArg]) -> Result<Vec<NetworkConfigArg>, UsageError> {
    for (i, (name, _)) in given.iter().enumerate() {
        if given.iter().take(i).any(|(other, _)| other == name) {
            let which = name
                .as_ref()
                .map_or("the network without a name".to_owned(), NetworkName::to_string);
            return Err(UsageError::new(
                format!("--network-config is given twice for {which}"),
                "give it once for each network, as NAME=FILE",
            ));
        }
    }
    Ok(given.to_vec())
}

fn network_config(text: &str) -> Result<NetworkConfigArg, String> {
    // A file called `a=b` is `./a=b`: with a slash before the sign it is no name.
    let named = text
        .split_once('=')
        .and_then(|(name, rest)| Some((name.parse().ok()?, rest)));
    match named {
        Some((name, source)) => Ok((Some(name), config_source(source)?)),
        None => Ok((None, config_source(text)?)),
    }
}

/// Tells JSON text from a file's name.
pub(super) fn config_source(text: &str) -> Result<NetworkConfigSource, String> {
    if text.trim_start().starts_with('{') {
        return Ok(NetworkConfigSource::Inline(text.to_owned()));
    }
    if text.is_empty() {
        return Err("expected a file name or JSON text".to_owned());
    }
    Ok(NetworkConfigSource::File(PathBuf::from(text)))
}

fn non_empty(text: &str) -> Result<String, String> {
    if text.is_empty() {
        return Err("expected some text".to_owned());
    }
    Ok(text.to_owned())
}
