//! What this node knew last, on disk, so that it starts without its store.
//!
//! One JSON file in the state directory: the config text, our own lease, the peers' leases, and which store they came
//! from. It is replaced whole, and read without trust: every part passes the same checks as if it came from the store,
//! and a file that is damaged, of another version or of another store counts as none.

use std::borrow::Cow;
use std::io;
use std::path::Path;
use std::sync::Arc;

use serde::ser::SerializeSeq;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::control::state_file;
use crate::lease::{BySubnet, LeaseAttrs, Subnet};

/// The file's name in the state directory.
pub const FILE_NAME: &str = "control.json";

/// Room for 100,000 peers of 300 bytes each.
const MAX_BYTES: u64 = 64 << 20;

const VERSION: u32 = 1;

/// The contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// The network config's text.
    pub config: Option<String>,
    /// Our own lease.
    pub own: Option<(Subnet, LeaseAttrs)>,
    /// The peers.
    pub peers: BySubnet<Arc<LeaseAttrs>>,
}

/// The file as it is written: peer by peer, for their text is several times as large as what is kept of them.
#[derive(Serialize)]
struct Draft<'a> {
    version: u32,
    store: &'a str,
    config: Option<&'a str>,
    own: Option<RowDraft>,
    #[serde(serialize_with = "rows")]
    peers: &'a BySubnet<Arc<LeaseAttrs>>,
}

#[derive(Serialize)]
struct RowDraft {
    subnet: String,
    attrs: Box<RawValue>,
}

impl RowDraft {
    fn new(subnet: Subnet, attrs: &LeaseAttrs) -> Result<Self, serde_json::Error> {
        Ok(Self {
            subnet: subnet.to_string(),
            attrs: RawValue::from_string(attrs.to_json())?,
        })
    }
}

fn rows<S: Serializer>(peers: &&BySubnet<Arc<LeaseAttrs>>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut rows = serializer.serialize_seq(Some(peers.len()))?;
    for (subnet, attrs) in peers.iter() {
        let row = RowDraft::new(subnet, attrs).map_err(serde::ser::Error::custom)?;
        rows.serialize_element(&row)?;
    }
    rows.end()
}

/// The file as it is read: its rows are parts of its text.
#[derive(Deserialize)]
struct Document<'a> {
    version: u32,
    store: String,
    config: Option<String>,
    #[serde(borrow)]
    own: Option<Row<'a>>,
    #[serde(borrow)]
    peers: Vec<Row<'a>>,
}

#[derive(Deserialize)]
struct Row<'a> {
    #[serde(borrow)]
    subnet: Cow<'a, str>,
    #[serde(borrow)]
    attrs: &'a RawValue,
}

impl Row<'_> {
    fn read(&self) -> Option<(Subnet, LeaseAttrs)> {
        Some((
            self.subnet.parse().ok()?,
            LeaseAttrs::from_json(self.attrs.get().as_bytes()).ok()?,
        ))
    }
}

impl Cache {
    /// Reads the cache of the store at `place`; empty if there is no usable one.
    pub fn load(dir: &Path, place: &str) -> Self {
        let path = dir.join(FILE_NAME);
        let text = state_file::read(&path, MAX_BYTES);
        let read = text
            .as_ref()
            .map_err(|error| io::Error::new(error.kind(), error.to_string()))
            .and_then(|text| serde_json::from_str::<Document<'_>>(text).map_err(io::Error::from));
        let document = match read {
            Ok(document) if document.version == VERSION && document.store == place => document,
            Ok(_) => {
                tracing::info!(path = %path.display(), "ignoring the cache of another store or version");
                return Self::default();
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(path = %path.display(), %error, "ignoring a damaged cache");
                }
                return Self::default();
            }
        };
        Self {
            config: document.config,
            own: document.own.as_ref().and_then(Row::read),
            peers: document
                .peers
                .iter()
                .filter_map(Row::read)
                .map(|(subnet, attrs)| (subnet, Arc::new(attrs)))
                .collect(),
        }
    }

    /// Writes the cache of the store at `place`; the directory is made with mode 0700.
    ///
    /// # Errors
    /// The file cannot be written; an old one is left as it was.
    pub fn save(&self, dir: &Path, place: &str) -> io::Result<()> {
        let own = self.own.as_ref();
        let draft = Draft {
            version: VERSION,
            store: place,
            config: self.config.as_deref(),
            own: own
                .map(|(subnet, attrs)| RowDraft::new(*subnet, attrs))
                .transpose()?,
            peers: &self.peers,
        };
        state_file::replace_with(&dir.join(FILE_NAME), 0o600, 0o700, |file| {
            serde_json::to_writer(file, &draft).map_err(io::Error::from)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn sample() -> Cache {
        let lease = |key: &str, value: &str| {
            (
                key.parse::<Subnet>().unwrap(),
                LeaseAttrs::from_json(value.as_bytes()).unwrap(),
            )
        };
        Cache {
            config: Some(r#"{"Network":"10.0.0.0/16"}"#.to_owned()),
            own: Some(lease("10.0.1.0-24", r#"{"PublicIP":"192.0.2.1"}"#)),
            peers: [lease(
                "10.0.2.0-24",
                r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1}}"#,
            )]
            .map(|(subnet, attrs)| (subnet, Arc::new(attrs)))
            .into_iter()
            .collect(),
        }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        sample().save(&state, "etcd a").unwrap();
        assert_eq!(Cache::load(&state, "etcd a"), sample());
        assert_eq!(
            std::fs::metadata(&state).unwrap().permissions().mode() & 0o777,
            0o700
        );
    }

    #[test]
    fn another_stores_cache_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        sample().save(dir.path(), "etcd a").unwrap();
        assert_eq!(Cache::load(dir.path(), "etcd b"), Cache::default());
    }

    #[test]
    fn a_damaged_cache_counts_as_none() {
        let dir = tempfile::tempdir().unwrap();
        sample().save(dir.path(), "x").unwrap();
        let path = dir.path().join(FILE_NAME);
        let text = std::fs::read_to_string(&path).unwrap();
        for end in 0..text.len() {
            std::fs::write(&path, &text[..end]).unwrap();
            assert_eq!(Cache::load(dir.path(), "x"), Cache::default(), "cut at {end}");
        }
        for i in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[i] ^= 0x11;
            std::fs::write(&path, bytes).unwrap();
            Cache::load(dir.path(), "x");
        }
    }

    #[test]
    fn a_rotten_row_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"version":1,"store":"x","config":null,"own":{"subnet":"bad","attrs":{}},
            "peers":[{"subnet":"10.0.2.0-24","attrs":{"PublicIP":"192.0.2.2"}},{"subnet":"10.0.3.0-24","attrs":7}]}"#;
        std::fs::write(dir.path().join(FILE_NAME), text).unwrap();
        let cache = Cache::load(dir.path(), "x");
        assert_eq!((cache.own, cache.peers.len()), (None, 1));
    }
}
