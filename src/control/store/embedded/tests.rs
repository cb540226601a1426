//! What cannot be seen from outside: a write that failed and was made all the same.

use super::*;
use crate::control::store::{LEASE_TTL, Store};

const CONFIG: &str = r#"{"Network":"10.0.0.0/8"}"#;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The commit's error came after its header was in the page cache, where the next opening finds it.
#[tokio::test(start_paused = true)]
async fn a_failed_write_that_was_made_ends_no_lease_however_long_the_server_runs() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    tokio::time::advance(30 * DAY).await;
    let lease = store.acquire(&node(1), None).await.unwrap();
    let inner = &store.registry().inner;
    let database = inner.writer.lock().unwrap().take().unwrap();
    let made = Record {
        attrs: node(2),
        revision: 0,
        ends: Some(Instant::now() + LEASE_TTL),
    };
    let second = "10.0.9.0-24".parse().unwrap();
    let revision = inner.state().revision;
    persist(
        &database,
        inner.clock,
        None,
        &[Change::Put(second, made)],
        revision,
    )
    .unwrap();
    drop(database);

    store.acquire(&node(3), None).await.unwrap();
    let listed = store.registry().list().await.unwrap();
    assert_eq!(listed.len(), 3, "{listed:?}");
    let found = listed.iter().find(|entry| entry.lease.subnet == lease.subnet);
    let (Expiration::At(was), Expiration::At(is)) = (lease.expiration, found.unwrap().lease.expiration)
    else {
        panic!("no end");
    };
    let apart = is.duration_since(was).unwrap_or_else(|error| error.duration());
    assert!(apart < Duration::from_secs(1), "{apart:?}");
    tokio::time::advance(DAY / 2).await;
    assert_eq!(store.registry().list().await.unwrap().len(), 3);
}

fn node(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}
