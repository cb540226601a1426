//! The networks a server has: `GET /v1/[?next=C]`, from flannel v0.5.6 on.
//!
//! ```text
//! {"events":null,"snapshot":["blue"],"cursor":"7"}
//! {"events":[{"type":"added","lease":…,"network":"green"}],"snapshot":null,"cursor":"13"}
//! ```
//!
//! The `lease` in an event is empty and means nothing. A name that is not allowed is skipped.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use serde::Deserialize;

use super::poll::{Watched, poll};
use super::{RemoteStore, garbled, is_plain_cursor};
use crate::addr::NetworkName;
use crate::control::store::{Cursor, NetworkEvent, NetworkItem, NetworkUpdate, Networks, Store, StoreError};

const DOING: &str = "watch the networks";

/// The networks of servers.
#[derive(Debug)]
pub struct RemoteNetworks {
    /// The network without a name; the watch of names asks its servers.
    unnamed: RemoteStore,
}

impl RemoteNetworks {
    /// The networks of the servers that `store` asks.
    pub fn new(store: RemoteStore) -> Self {
        Self {
            unnamed: store.of_network(None),
        }
    }

    /// One step of a watch: polls until there is something to tell.
    async fn poll(&self, since: Option<Cursor>) -> Result<NetworkItem, StoreError> {
        let watched = Watched {
            doing: DOING,
            path: "/v1/",
            sign_of_life: "/v1/",
            read,
            nothing: || NetworkUpdate::Snapshot(BTreeSet::new()),
            node: None,
        };
        let (update, cursor) = poll(&self.unnamed.servers, &watched, since).await?;
        Ok(NetworkItem { update, cursor })
    }
}

impl Networks for RemoteNetworks {
    fn place(&self) -> String {
        self.unnamed.place()
    }

    fn open(&self, name: Option<&NetworkName>) -> Result<Arc<dyn Store>, StoreError> {
        Ok(Arc::new(self.unnamed.of_network(name)))
    }

    fn watch(&self, since: Option<Cursor>) -> BoxStream<'_, Result<NetworkItem, StoreError>> {
        stream::try_unfold(since, move |since| async move {
            let item = self.poll(since).await?;
            let cursor = item.cursor.clone();
            Ok(Some((item, Some(cursor))))
        })
        .boxed()
    }
}

/// Writes the answer to a watch of networks: a snapshot.
pub fn networks_json<'a>(names: impl Iterator<Item = &'a NetworkName>, cursor: &str) -> String {
    let names: Vec<String> = names.map(|name| format!("\"{name}\"")).collect();
    format!(
        "{{\"events\":null,\"snapshot\":[{}],\"cursor\":\"{cursor}\"}}\n",
        names.join(",")
    )
}

/// Writes the answer to a watch of networks: events. Flannel's clients look at every one.
pub fn network_events_json<'a>(events: impl Iterator<Item = &'a NetworkEvent>, cursor: &str) -> String {
    let events: Vec<String> = events
        .map(|event| {
            let (kind, name) = match event {
                NetworkEvent::Added(name) => ("added", name),
                NetworkEvent::Removed(name) => ("removed", name),
            };
            format!(
                "{{\"type\":\"{kind}\",\"lease\":{{\"Subnet\":\"0.0.0.0/0\",\"Attrs\":{{\"PublicIP\":\"0.0.0.0\"}},\
                 \"Expiration\":\"0001-01-01T00:00:00Z\"}},\"network\":\"{name}\"}}"
            )
        })
        .collect();
    format!(
        "{{\"events\":[{}],\"snapshot\":null,\"cursor\":\"{cursor}\"}}\n",
        events.join(",")
    )
}

/// Reads the answer to a watch of networks, by flannel's rule: events if there are any, else the snapshot.
fn read(body: &str) -> Result<(Option<NetworkUpdate>, Cursor), StoreError> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        events: Option<Vec<Event>>,
        #[serde(default)]
        snapshot: Option<Vec<String>>,
        cursor: String,
    }
    #[derive(Deserialize)]
    struct Event {
        #[serde(rename = "type")]
        kind: String,
        #[serde(default)]
        network: String,
    }
    let answer: Answer = serde_json::from_str(body).map_err(|error| garbled(DOING, error.to_string()))?;
    if !is_plain_cursor(&answer.cursor) {
        return Err(garbled(
            DOING,
            format!("the cursor {:?} is malformed", answer.cursor),
        ));
    }
    let allowed = |name: &str| match name.parse::<NetworkName>() {
        Ok(name) => Some(name),
        Err(error) => {
            tracing::debug!(%error, "skipping a network");
            None
        }
    };
    let events = answer.events.unwrap_or_default();
    let update = if events.is_empty() {
        let names = answer.snapshot;
        names.map(|names| NetworkUpdate::Snapshot(names.iter().filter_map(|name| allowed(name)).collect()))
    } else {
        let events: Vec<NetworkEvent> = events
            .iter()
            .filter_map(|event| match event.kind.as_str() {
                "added" => allowed(&event.network).map(NetworkEvent::Added),
                "removed" => allowed(&event.network).map(NetworkEvent::Removed),
                _ => None,
            })
            .collect();
        (!events.is_empty()).then_some(NetworkUpdate::Events(events))
    };
    Ok((update, Cursor(answer.cursor)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers captured from flannel v0.7.1.
    const SNAPSHOT: &str = "{\"events\":null,\"snapshot\":[\"blue\"],\"cursor\":\"7\"}\n";
    const ADDED: &str = "{\"events\":[{\"type\":\"added\",\"lease\":{\"Subnet\":\"0.0.0.0/0\",\"Attrs\":{\"PublicIP\":\"0.0.0.0\"},\"Expiration\":\"0001-01-01T00:00:00Z\"},\"network\":\"green\"}],\"snapshot\":null,\"cursor\":\"13\"}\n";

    #[test]
    fn answers_about_networks_are_flannels_to_the_byte() {
        let (update, cursor) = read(SNAPSHOT).unwrap();
        let Some(NetworkUpdate::Snapshot(names)) = update else {
            panic!("{update:?}")
        };
        assert_eq!(networks_json(names.iter(), &cursor.0), SNAPSHOT);
        let (update, cursor) = read(ADDED).unwrap();
        let Some(NetworkUpdate::Events(events)) = update else {
            panic!("{update:?}")
        };
        assert_eq!(network_events_json(events.iter(), &cursor.0), ADDED);
    }

    #[test]
    fn names_that_are_not_allowed_are_skipped() {
        let (update, _) = read(r#"{"snapshot":["a","../b","config"],"cursor":"1"}"#).unwrap();
        assert_eq!(
            update,
            Some(NetworkUpdate::Snapshot(["a".parse().unwrap()].into()))
        );
        let (update, _) = read(r#"{"events":[{"type":"added","network":"a/b"}],"cursor":"2"}"#).unwrap();
        assert_eq!(update, None);
        assert!(read(r#"{"snapshot":[],"cursor":"a b"}"#).is_err());
        assert!(read(r#"{"snapshot":[],"cursor":7}"#).is_err());
    }
}
