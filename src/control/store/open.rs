//! Opening the store the options name: one arm per store.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::etcd::Expirations;
use super::{
    EmbeddedNetworks, EtcdNetworks, EtcdOptions, Networks, RemoteNetworks, RemoteStore, Store, StoreError,
};
use crate::control::config::{ConfigError, NetworkConfig};
use crate::control::state_file;
use crate::options::{self, EmbeddedOptions, NetworkConfigSource, StoreKind};
use crate::trust::TrustError;

/// The embedded store's file in its directory.
const FILE: &str = "leases.redb";

/// A network config is a few hundred bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The store said so.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The directory of the embedded store cannot be made.
    #[error("cannot create the data directory {}: {cause}", .path.display())]
    DataDir {
        /// The directory.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The file given with `--network-config` cannot be read.
    #[error("cannot read the network config {}: {cause}", .path.display())]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The config given with `--network-config` is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Certificates or a token cannot be had from their files.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// Opens the network without a name in the store `kind` names; see [`open_networks`].
///
/// # Errors
/// Files cannot be read or written, or the config for an embedded store is invalid.
pub async fn open(
    kind: &StoreKind,
    ttl: Duration,
    expirations: Expirations,
) -> Result<Arc<dyn Store>, OpenError> {
    Ok(open_networks(kind, ttl, expirations).await?.open(None)?)
}

/// Opens the store `kind` names, with all its networks. Etcd and servers are not asked anything yet; `expirations` matters to etcd
/// only.
///
/// # Errors
/// Files cannot be read or written, or a config for an embedded store is invalid.
pub async fn open_networks(
    kind: &StoreKind,
    ttl: Duration,
    expirations: Expirations,
) -> Result<Arc<dyn Networks>, OpenError> {
    Ok(match kind {
        StoreKind::Etcd(etcd) => Arc::new(EtcdNetworks::connect(etcd_options(etcd, ttl, expirations))?),
        StoreKind::Embedded(embedded) => Arc::new(open_embedded(embedded, ttl).await?),
        StoreKind::Remote(remote) => Arc::new(RemoteNetworks::new(RemoteStore::open(remote)?)),
    })
}

/// The file of an embedded store.
pub fn embedded_file(data_dir: &Path) -> PathBuf {
    data_dir.join(FILE)
}

fn etcd_options(etcd: &options::EtcdOptions, ttl: Duration, expirations: Expirations) -> EtcdOptions {
    let (username, password) = match &etcd.login {
        Some(login) => (login.user.clone(), login.password.clone()),
        None => (String::new(), String::new()),
    };
    let (certfile, keyfile) = match &etcd.client_cert {
        Some(cert) => (Some(cert.cert_file.clone()), Some(cert.key_file.clone())),
        None => (None, None),
    };
    EtcdOptions {
        endpoints: etcd.endpoints.clone(),
        prefix: etcd.prefix.clone(),
        username,
        password,
        cafile: etcd.ca_file.clone(),
        certfile,
        keyfile,
        ttl,
        expirations,
    }
}

/// Opens the file, and gives it the configs it has none of. A config that is there stays: nodes run by it.
async fn open_embedded(embedded: &EmbeddedOptions, ttl: Duration) -> Result<EmbeddedNetworks, OpenError> {
    let mut given = Vec::new();
    for (name, source) in &embedded.network_configs {
        let text = match source {
            NetworkConfigSource::Inline(text) => text.clone(),
            NetworkConfigSource::File(path) => {
                state_file::read(path, MAX_CONFIG_BYTES).map_err(|cause| OpenError::ReadConfig {
                    path: path.clone(),
                    cause,
                })?
            }
        };
        let parsed = NetworkConfig::parse(&text)?;
        given.push((name.as_ref(), text, parsed));
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&embedded.data_dir)
        .map_err(|cause| OpenError::DataDir {
            path: embedded.data_dir.clone(),
            cause,
        })?;
    let networks = EmbeddedNetworks::open(&embedded_file(&embedded.data_dir), ttl)?;
    for (name, text, given) in &given {
        let store = networks.store(*name);
        match store.config().await {
            Ok(held) if NetworkConfig::parse(&held).ok().as_ref() != Some(given) => {
                tracing::warn!(
                    store = store.place(),
                    "the store has another network config than --network-config says; the store's is used"
                );
            }
            Ok(_) => {}
            Err(_) => store.set_config(text.trim()).await?,
        }
    }
    if given.is_empty() && networks.store(None).config().await.is_err() && !networks.has_names() {
        tracing::warn!(
            store = networks.place(),
            "the store has no network config; give --network-config once"
        );
    }
    Ok(networks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_embedded_store_keeps_its_first_config() {
        let dir = tempfile::tempdir().unwrap();
        for given in [r#"{"Network":"10.1.0.0/16"}"#, r#"{"Network":"10.2.0.0/16"}"#] {
            let store = open(
                &embedded(&dir, given),
                Duration::from_secs(60),
                Expirations::Assume,
            )
            .await
            .unwrap();
            assert_eq!(store.config().await.unwrap(), r#"{"Network":"10.1.0.0/16"}"#);
        }
    }

    #[tokio::test]
    async fn an_invalid_config_is_refused_before_anything_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let error = open(
            &embedded(&dir, "{}"),
            Duration::from_secs(60),
            Expirations::Assume,
        )
        .await
        .err()
        .unwrap();
        assert!(matches!(error, OpenError::Config(_)), "{error}");
        assert!(!dir.path().join("data").exists());
    }

    fn embedded(dir: &tempfile::TempDir, config: &str) -> StoreKind {
        StoreKind::Embedded(EmbeddedOptions {
            data_dir: dir.path().join("data"),
            network_configs: vec![(None, NetworkConfigSource::Inline(config.to_owned()))],
        })
    }
}
