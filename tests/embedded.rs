//! The embedded store against crashes, damage, full disks and second openers.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking"
)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use futures_util::stream::StreamExt;
use kersey::control::identity::Holder;
use kersey::control::store::{EmbeddedStore, LEASE_TTL, Store, StoreError};
use kersey::lease::{Expiration, Lease, LeaseAttrs, LeaseUpdate};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

const CONFIG: &str = r#"{"Network":"10.0.0.0/8"}"#;

/// What the copy of this test binary that is to be killed, or starved of disk space, finds its file by.
const FILE_VARIABLE: &str = "KERSEY_TEST_STORE";

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sub/leases.redb");
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let lease = store.acquire(&node(1), None).await.unwrap();
    let reserved = "10.9.9.0-24".parse().unwrap();
    store.reserve(reserved, &node(2)).await.unwrap();
    let cursor = store.watch(None).next().await.unwrap().unwrap().cursor;
    drop(store);
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    assert_eq!(store.config().await.unwrap(), CONFIG);
    let leases = leases(&store).await;
    assert_eq!(leases.len(), 2);
    assert!(
        leases
            .iter()
            .any(|found| found.subnet == lease.subnet && found.attrs == lease.attrs)
    );
    assert!(
        leases
            .iter()
            .any(|found| found.subnet == reserved && found.expiration == Expiration::Never)
    );
    // Who missed nothing goes on where it was.
    let mut watch = store.watch(Some(cursor));
    store.acquire(&node(3), None).await.unwrap();
    let item = watch.next().await.unwrap().unwrap();
    assert!(matches!(item.update, LeaseUpdate::Events(events) if events.len() == 1));
}

/// F10: the node of this process need not write before packets move.
#[tokio::test]
async fn a_look_confirms_our_lease_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let lease = store.acquire_as(&holder(1), &node(1), None).await.unwrap();
    drop(store);
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    let before = std::fs::read(&path).unwrap();
    let look = async |who: u32| {
        store
            .confirm(Some(&holder(who)), lease.subnet, &node(1))
            .await
            .unwrap()
    };
    assert_eq!(look(2).await, None, "another host's");
    assert_eq!(
        look(1).await.map(|seen| (seen.subnet, seen.attrs)),
        Some((lease.subnet, node(1)))
    );
    assert!(std::fs::read(&path).unwrap() == before, "something was written");
}

#[tokio::test(start_paused = true)]
async fn who_has_an_address_is_known_after_a_restart_until_it_stays_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let open = || EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    let claim = async |store: &EmbeddedStore, host: u32, address: &str, seconds: u64| {
        let life = Duration::from_secs(seconds);
        store
            .vouch("test", Some(&holder(host)), address.parse().unwrap(), life)
            .await
    };
    let store = open();
    claim(&store, 1, "192.0.2.1", 30).await.unwrap();
    claim(&store, 2, "2001:db8::2", 30).await.unwrap();
    assert!(claim(&store, 3, "192.0.2.1", 30).await.is_err());
    // Longer, by a sign of life.
    tokio::time::sleep(Duration::from_secs(29)).await;
    claim(&store, 1, "192.0.2.1", 30).await.unwrap();
    tokio::time::sleep(Duration::from_secs(29)).await;
    let error = claim(&store, 3, "192.0.2.1", 30).await.unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error}");
    claim(&store, 3, "2001:db8::2", 30).await.unwrap();
    drop(store);
    // After a restart nobody has said anything yet.
    let store = open();
    assert!(claim(&store, 4, "192.0.2.1", 30).await.is_err());
    assert!(claim(&store, 2, "2001:db8::2", 30).await.is_err());
    claim(&store, 1, "192.0.2.1", 30).await.unwrap();
    tokio::time::sleep(Duration::from_secs(89)).await;
    assert!(claim(&store, 2, "2001:db8::2", 30).await.is_err());
    tokio::time::sleep(Duration::from_secs(2)).await;
    claim(&store, 2, "2001:db8::2", 30).await.unwrap();
    claim(&store, 4, "192.0.2.1", 30).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_host_of_the_process_has_one_address_and_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let lease = store.acquire_as(&holder(1), &node(1), None).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    let error = store.acquire_as(&holder(2), &node(1), None).await.unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error}");
    // What a client says cannot shorten it.
    let address = node(1).address().unwrap();
    let second = Duration::from_secs(1);
    store
        .vouch("test", Some(&holder(1)), address, second)
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(
        store
            .vouch("test", Some(&holder(2)), address, second)
            .await
            .is_err()
    );
    // It has another: the first is free.
    let moved = Lease {
        attrs: node(7),
        ..lease.clone()
    };
    store
        .readdress(Some(&holder(1)), &moved, &lease.attrs)
        .await
        .unwrap();
    store
        .vouch("test", Some(&holder(2)), address, second)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_file_from_before_hosts_were_kept_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let lease = store.acquire(&node(1), None).await.unwrap();
    drop(store);
    let hosts: redb::TableDefinition<'_, (&str, &str), (&str, &str, &str)> =
        redb::TableDefinition::new("hosts");
    let database = redb::Database::open(&path).unwrap();
    let write = database.begin_write().unwrap();
    assert!(write.delete_table(hosts).unwrap(), "there was one");
    write.commit().unwrap();
    drop(database);
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    assert_eq!(store.config().await.unwrap(), CONFIG);
    let again = store.acquire_as(&holder(1), &node(1), None).await.unwrap();
    assert_eq!(again.subnet, lease.subnet);
    drop(store);
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    let error = store.acquire_as(&holder(2), &node(1), None).await.unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error}");
}

#[tokio::test]
async fn a_bad_config_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(&dir.path().join("leases.redb"), LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let error = store
        .set_config(r#"{"Network":"10.0.0.0/33"}"#)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("Network"), "{error}");
    assert_eq!(store.config().await.unwrap(), CONFIG);
}

#[tokio::test]
async fn a_second_server_is_turned_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let _store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    let error = EmbeddedStore::open(&path, LEASE_TTL).unwrap_err();
    assert!(error.to_string().contains("in use"), "{error}");
}

#[tokio::test]
async fn what_is_no_file_of_ours_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let refused = || {
        let error = EmbeddedStore::open(&path, LEASE_TTL).unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("leases.redb"), "{error}");
    };
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    refused();
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    refused();
    std::fs::remove_dir(&path).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
    refused();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "this is no database at all").unwrap();
    refused();
    assert_eq!(std::fs::read(&path).unwrap(), b"this is no database at all");
}

#[test]
fn a_damaged_file_is_refused_or_read_but_nothing_panics() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
    runtime.block_on(async {
        store.set_config(CONFIG).await.unwrap();
        for i in 0..100 {
            store.acquire(&node(i), None).await.unwrap();
        }
    });
    drop(store);
    let bytes = std::fs::read(&path).unwrap();
    let damaged = dir.path().join("damaged.redb");
    let mut refused = 0;
    let mut open = |bytes: &[u8]| {
        std::fs::write(&damaged, bytes).unwrap();
        match EmbeddedStore::open(&damaged, LEASE_TTL) {
            Ok(_) => {}
            Err(StoreError::Refused { cause, .. }) => {
                assert!(cause.contains("damaged.redb"), "{cause}");
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    };
    let step = bytes.len() / 25;
    for end in (1..bytes.len()).step_by(step) {
        open(&bytes[..end]);
    }
    // The header's every byte, then some of each page.
    for at in (0..320)
        .step_by(5)
        .chain((320..bytes.len()).step_by(bytes.len() / 60 + 1))
    {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        open(&flipped);
    }
    assert!(refused > 25, "only {refused} of the damaged files were refused");
}

/// Not a test but the process the next one kills: it says what has been acknowledged, line by line.
#[tokio::test]
#[ignore = "runs as a child of the crash test"]
async fn child_that_writes_until_killed() {
    let Some(path) = std::env::var_os(FILE_VARIABLE) else {
        return;
    };
    let store = EmbeddedStore::open(Path::new(&path), LEASE_TTL).unwrap();
    for i in 0.. {
        let lease = store.acquire(&node(i), None).await.unwrap();
        println!("\nacknowledged {} {}", lease.subnet, lease.attrs.public_ip);
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_nine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.redb");
    // F18 asks for 200 bursts of writes; KERSEY_SOAK makes as many.
    let rounds = if std::env::var_os("KERSEY_SOAK").is_some() {
        200
    } else {
        8
    };
    for round in 0..rounds {
        let fresh = dir.path().join(format!("{round}.redb"));
        let store = EmbeddedStore::open(&fresh, LEASE_TTL).unwrap();
        store.set_config(CONFIG).await.unwrap();
        drop(store);
        std::fs::rename(&fresh, &path).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "child_that_writes_until_killed",
                "--ignored",
                "--nocapture",
            ])
            .env(FILE_VARIABLE, &path)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut acknowledged = Vec::new();
        for line in lines.map_while(Result::ok) {
            if let Some((subnet, ip)) = line
                .strip_prefix("acknowledged ")
                .and_then(|rest| rest.split_once(' '))
            {
                acknowledged.push((subnet.to_owned(), ip.to_owned()));
            }
            if acknowledged.len() as u64 == 5 + round % 8 * 3 {
                // Somewhere within the next write.
                tokio::time::sleep(Duration::from_micros(300 * (round % 8) + round)).await;
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        let store = EmbeddedStore::open(&path, LEASE_TTL).unwrap();
        let leases = leases(&store).await;
        assert!(acknowledged.len() >= 5, "the child did not write");
        assert!(
            leases.len() <= acknowledged.len() + 1,
            "more leases than were asked for"
        );
        for (subnet, ip) in &acknowledged {
            let kept = leases
                .iter()
                .any(|lease| lease.subnet.to_string() == *subnet && lease.attrs.public_ip.to_string() == *ip);
            assert!(kept, "{subnet} of {ip} was acknowledged and is gone");
        }
    }
}

/// Not a test but the process the next one starves.
#[tokio::test]
#[ignore = "runs as a child of the full-disk test"]
async fn child_whose_disk_is_full() {
    let Some(path) = std::env::var_os(FILE_VARIABLE) else {
        return;
    };
    let store = EmbeddedStore::open(Path::new(&path), LEASE_TTL).unwrap();
    store.set_config(CONFIG).await.unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    // No byte may be written behind this; a file that needs more gets EFBIG.
    let size = std::fs::metadata(&path).unwrap().len();
    setrlimit(Resource::RLIMIT_FSIZE, size, hard).unwrap();
    let mut acknowledged = Vec::new();
    let error = loop {
        let mut attrs = node(u32::try_from(acknowledged.len()).unwrap());
        attrs.backend_data = Some(format!("\"{}\"", "x".repeat(50_000)));
        match store.acquire(&attrs, None).await {
            Ok(lease) => acknowledged.push(lease.subnet),
            Err(error) => break error,
        }
        assert!(acknowledged.len() < 10_000, "the disk is never full");
    };
    assert!(error.is_unavailable(), "{error}");
    // Reads go on, and more writes fail as the first did.
    assert_eq!(store.config().await.unwrap(), CONFIG);
    assert_eq!(leases(&store).await.len(), acknowledged.len());
    setrlimit(Resource::RLIMIT_FSIZE, 0, hard).unwrap();
    assert!(store.acquire(&node(90_000), None).await.is_err());
    assert_eq!(leases(&store).await.len(), acknowledged.len());
    // Space is back: so is the store, and nothing acknowledged is lost.
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    let lease = store.acquire(&node(90_001), None).await.unwrap();
    acknowledged.push(lease.subnet);
    drop(store);
    let store = EmbeddedStore::open(Path::new(&path), LEASE_TTL).unwrap();
    let kept: Vec<_> = leases(&store).await.iter().map(|lease| lease.subnet).collect();
    assert!(acknowledged.iter().all(|subnet| kept.contains(subnet)));
}

#[test]
fn a_full_disk_costs_nothing_but_the_writes() {
    let dir = tempfile::tempdir().unwrap();
    // The shell makes the child ignore the signal that comes with EFBIG.
    let child = Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; exec \"$0\" --exact child_whose_disk_is_full --ignored --nocapture",
        ])
        .arg(std::env::current_exe().unwrap())
        .env(FILE_VARIABLE, dir.path().join("leases.redb"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(
        child.status.success(),
        "{}\n{said}",
        String::from_utf8_lossy(&child.stdout)
    );
}

async fn leases(store: &EmbeddedStore) -> Vec<Lease> {
    match store.watch(None).next().await.unwrap().unwrap().update {
        LeaseUpdate::Snapshot(leases) => leases,
        LeaseUpdate::Events(events) => panic!("no snapshot but {events:?}"),
    }
}

fn holder(i: u32) -> Holder {
    Holder {
        id: format!("{i:032x}"),
        host: format!("host-{i}"),
        boot: format!("boot-{i}"),
    }
}

fn node(i: u32) -> LeaseAttrs {
    let ip = std::net::Ipv4Addr::from(0xc612_0000 + i);
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"{ip}\"}}").as_bytes()).unwrap()
}
