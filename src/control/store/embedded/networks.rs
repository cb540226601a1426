//! The networks in one file.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream};

use super::state::{Change, Network};
use super::{EmbeddedRegistry, EmbeddedStore, cursor, parse_cursor, refused};
use crate::addr::NetworkName;
use crate::control::store::{
    Cursor, LocalStore, NetworkItem, NetworkUpdate, Networks, Registry, Store, StoreError,
};

/// The networks in a file.
#[derive(Debug, Clone)]
pub struct EmbeddedNetworks {
    unnamed: EmbeddedRegistry,
}

impl EmbeddedNetworks {
    /// Opens the file at `path`, or makes it.
    ///
    /// # Errors
    /// The file is in use, damaged, no store, or cannot be written.
    pub fn open(path: &Path, ttl: Duration) -> Result<Self, StoreError> {
        EmbeddedRegistry::open(path, ttl).map(|unnamed| Self { unnamed })
    }

    /// The store of one network, that without a name for `None`.
    pub fn store(&self, name: Option<&NetworkName>) -> EmbeddedStore {
        LocalStore::new(self.registry(name))
    }

    /// Removes the config of a network, which thereby exists no more. Its leases run out.
    ///
    /// # Errors
    /// The file cannot be written.
    pub async fn remove(&self, name: &NetworkName) -> Result<(), StoreError> {
        let decide = |network: &Network| match network.config {
            Some(_) => vec![Change::Config(None)],
            None => vec![],
        };
        self.registry(Some(name))
            .write("remove a network", decide)
            .await
            .map(|_| ())
    }

    /// Whether there is a network with a name.
    pub fn has_names(&self) -> bool {
        let state = self.unnamed.inner.state();
        state
            .networks
            .iter()
            .any(|(name, network)| name.is_some() && network.config.is_some())
    }

    fn registry(&self, name: Option<&NetworkName>) -> EmbeddedRegistry {
        EmbeddedRegistry {
            inner: Arc::clone(&self.unnamed.inner),
            network: name.cloned(),
        }
    }

    /// What a watcher at `revision` has not heard yet, if anything.
    fn news(&self, file: u64, revision: u64) -> Option<NetworkItem> {
        let state = self.unnamed.inner.state();
        if file != state.file || revision < state.names.from || revision > state.revision {
            let names = state.networks.iter().filter_map(|(name, network)| {
                network.config.as_ref()?;
                name.clone()
            });
            return Some(NetworkItem {
                update: NetworkUpdate::Snapshot(names.collect()),
                cursor: cursor(state.file, state.revision),
            });
        }
        let (events, last) = state.names.after(revision)?;
        Some(NetworkItem {
            update: NetworkUpdate::Events(events),
            cursor: cursor(state.file, last),
        })
    }
}

impl Networks for EmbeddedNetworks {
    fn place(&self) -> String {
        self.unnamed.place()
    }

    fn open(&self, name: Option<&NetworkName>) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(self.store(name)))
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<NetworkItem, StoreError>> {
        // No file has the number 0, so whoever comes without a cursor is told everything.
        let start = match since.as_ref().map(parse_cursor) {
            None => (0, 0),
            Some(Some(start)) => start,
            Some(None) => {
                let error = refused(
                    "watch the networks",
                    "the cursor is none of this kind of store".to_owned(),
                );
                return Box::pin(stream::once(async { Err(error) }));
            }
        };
        let reached = self.unnamed.inner.reached.subscribe();
        Box::pin(stream::unfold(
            (start, reached),
            move |((file, revision), mut reached)| async move {
                loop {
                    reached.mark_unchanged();
                    if let Some(item) = self.news(file, revision) {
                        let next = parse_cursor(&item.cursor)?;
                        return Some((Ok(item), (next, reached)));
                    }
                    reached.changed().await.ok()?;
                }
            },
        ))
    }
}
