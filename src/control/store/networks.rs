//! Several networks in one store.
//!
//! Under one prefix there is at most one network without a name, and any number with one:
//!
//! ```text
//! PREFIX/config   PREFIX/subnets/…               the network without a name
//! PREFIX/NAME/config   PREFIX/NAME/subnets/…     the network NAME
//! ```
//!
//! A network exists if and only if its `config` key exists; leases alone make none. Names that are not allowed
//! ([`NetworkName`]) are skipped and told: somebody else's keys.
//!
//! [`Networks`] lists the names, watches them come and go, and opens a [`Store`] for one. A watch works as that of leases
//! does: a snapshot first, then what changed, each with a cursor to come back with; a stream that ends or fails is watched
//! anew by the caller. The network without a name is never listed: whoever wants it opens it.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::stream::BoxStream;

use super::{Cursor, Store, StoreError};
use crate::addr::NetworkName;

/// A network came or went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkEvent {
    /// It is there; told again when its config changed.
    Added(NetworkName),
    /// It is gone: its config was removed.
    Removed(NetworkName),
}

/// What a watch of networks tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkUpdate {
    /// All networks there are.
    Snapshot(BTreeSet<NetworkName>),
    /// What changed, in order; never empty.
    Events(Vec<NetworkEvent>),
}

impl NetworkUpdate {
    /// Makes `names` what they are after the update.
    pub fn apply(self, names: &mut BTreeSet<NetworkName>) {
        match self {
            Self::Snapshot(all) => *names = all,
            Self::Events(events) => {
                for event in events {
                    match event {
                        NetworkEvent::Added(name) => names.insert(name),
                        NetworkEvent::Removed(name) => names.remove(&name),
                    };
                }
            }
        }
    }
}

/// An update and the place in history up to which it is the truth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkItem {
    /// What changed.
    pub update: NetworkUpdate,
    /// Where to resume after it.
    pub cursor: Cursor,
}

/// The networks of a store: which there are, and each one's own [`Store`].
pub trait Networks: Send + Sync {
    /// Where they are, for logs; see [`Store::place`].
    fn place(&self) -> String;

    /// Opens the store of one network, that without a name for `None`. Nothing is asked yet: a network that does not exist shows
    /// by its [`config`](Store::config) being refused.
    ///
    /// # Errors
    /// What access takes cannot be had, a certificate file for instance.
    fn open(&self, name: Option<&NetworkName>) -> Result<Arc<dyn Store>, StoreError>;

    /// How often the store was found wiped, restored from a backup or exchanged for another; see [`Store::resets`].
    fn resets(&self) -> u64 {
        0
    }

    /// Watches which networks there are, from `since` or from a fresh snapshot. The first item of a watch without `since` is a
    /// snapshot. A stream that ends or fails is watched anew by the caller, without `since`. A cursor the store cannot read is
    /// refused; one that is too old, or from the future, gets a snapshot.
    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<NetworkItem, StoreError>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn updates_make_names_what_they_are() {
        let name = |text: &str| text.parse::<NetworkName>().unwrap();
        let mut names = BTreeSet::new();
        NetworkUpdate::Snapshot([name("a"), name("b")].into()).apply(&mut names);
        let events = vec![
            NetworkEvent::Removed(name("a")),
            NetworkEvent::Added(name("c")),
            NetworkEvent::Added(name("b")),
            NetworkEvent::Removed(name("nobody")),
        ];
        NetworkUpdate::Events(events).apply(&mut names);
        assert_eq!(names, [name("b"), name("c")].into());
    }
}
