use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::stream;
use tokio::time::Instant;

use super::*;
use crate::control::store::Expected;
use crate::control::{Control, ControlOptions};

const SINGLE: &str = r#"{"Network":"10.0.0.0/16"}"#;
const DUAL: &str = r#"{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;

/// What somebody faster takes, of what we are about to.
type Faster = fn(Subnet) -> Subnet;

/// A key space with somebody else in it, who is faster once, or as often as is said.
struct Keys {
    config: &'static str,
    entries: Mutex<BTreeMap<Subnet, Entry>>,
    revision: Mutex<u64>,
    /// Creates this just before our first create.
    faster: Mutex<Option<Faster>>,
    /// Takes what we are about to create, so many times.
    races: Mutex<usize>,
    /// How often we asked for a subnet.
    creates: Mutex<usize>,
    /// Whether it is told which entry was first.
    tells_age: bool,
}

impl Keys {
    fn new(config: &'static str) -> Self {
        Self {
            config,
            entries: Mutex::default(),
            revision: Mutex::default(),
            faster: Mutex::default(),
            races: Mutex::default(),
            creates: Mutex::default(),
            tells_age: true,
        }
    }

    fn put_now(&self, subnet: Subnet, attrs: &LeaseAttrs, lifetime: Lifetime, readable: bool) -> Entry {
        let mut revision = self.revision.lock().unwrap();
        *revision += 1;
        let mut entries = self.entries.lock().unwrap();
        let before = entries.get(&subnet).and_then(|entry| entry.lease.created);
        let entry = Entry {
            lease: Lease {
                subnet,
                attrs: attrs.clone(),
                expiration: match lifetime {
                    Lifetime::Ttl => crate::control::store::expires_in(std::time::Duration::from_secs(60)),
                    Lifetime::Forever => Expiration::Never,
                },
                created: self.tells_age.then(|| before.unwrap_or(*revision)),
            },
            revision: *revision,
            readable,
        };
        entries.insert(subnet, entry.clone());
        entry
    }

    /// Somebody writes nonsense over a key, or makes one.
    fn spoil(&self, subnet: Subnet) {
        self.put_now(subnet, &LeaseAttrs::of_nobody(), Lifetime::Forever, false);
    }

    fn entry(&self, subnet: Subnet) -> Option<Entry> {
        self.entries.lock().unwrap().get(&subnet).cloned()
    }
}

impl Registry for Keys {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    fn config(&self) -> BoxFuture<'_, Result<String, StoreError>> {
        Box::pin(async { Ok(self.config.to_owned()) })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Entry>, StoreError>> {
        Box::pin(async { Ok(self.entries.lock().unwrap().values().cloned().collect()) })
    }

    fn put<'a>(
        &'a self,
        expected: Expected,
        subnet: Subnet,
        attrs: &'a LeaseAttrs,
        lifetime: Lifetime,
    ) -> BoxFuture<'a, Result<Option<Entry>, StoreError>> {
        Box::pin(async move {
            let faster = match expected {
                Expected::Nothing => self.faster.lock().unwrap().take(),
                Expected::Revision(_) => None,
            };
            if let Some(faster) = faster {
                self.put_now(faster(subnet), &node(99), Lifetime::Ttl, true);
            }
            if expected == Expected::Nothing {
                *self.creates.lock().unwrap() += 1;
                let mut races = self.races.lock().unwrap();
                if *races > 0 {
                    *races -= 1;
                    self.put_now(subnet, &node(99), Lifetime::Ttl, true);
                }
            }
            let as_expected = expected.is(self.entry(subnet).map(|entry| entry.revision));
            Ok(as_expected.then(|| self.put_now(subnet, attrs, lifetime, true)))
        })
    }

    fn delete(&self, subnet: Subnet, revision: u64) -> BoxFuture<'_, Result<bool, StoreError>> {
        Box::pin(async move {
            let unchanged = self.entry(subnet).is_some_and(|entry| entry.revision == revision);
            if unchanged {
                self.entries.lock().unwrap().remove(&subnet);
            }
            Ok(unchanged)
        })
    }

    fn watch(&self, _since: Option<Cursor>) -> BoxStream<'_, Result<WatchItem, StoreError>> {
        Box::pin(stream::pending())
    }
}

/// Junk on the subnet a node had before: it would ask for it for ever.
#[tokio::test]
async fn a_subnet_whose_entry_cannot_be_read_is_taken() {
    let store = LocalStore::new(Keys::new(SINGLE));
    let junk = subnet("10.0.7.0-24");
    store.registry().spoil(junk);
    let lease = store.acquire(&node(1), Some(junk)).await.unwrap();
    assert_ne!(lease.subnet, junk);
    assert!(
        !store.registry().entry(junk).unwrap().readable,
        "it was overwritten"
    );
    // It is nobody's to be turned into a lease, and the operator's to remove.
    let error = store.unreserve(junk).await.unwrap_err().to_string();
    assert!(error.contains("cannot be read"), "{error}");
    store.revoke(junk).await.unwrap();
    assert_eq!(store.registry().entry(junk), None);
}

/// What we made and somebody spoilt is put right; what somebody made while we had nothing there is not ours to touch.
#[tokio::test]
async fn a_lease_of_ours_that_was_spoilt_is_put_right_and_no_other_is() {
    let store = LocalStore::new(Keys::new(SINGLE));
    let lease = store.acquire(&node(1), None).await.unwrap();
    store.registry().spoil(lease.subnet);
    let renewed = store.renew(&lease).await.unwrap();
    assert_eq!((renewed.subnet, &renewed.attrs), (lease.subnet, &node(1)));
    assert!(
        matches!(renewed.expiration, Expiration::At(_)),
        "it became a reservation"
    );
    store.revoke(lease.subnet).await.unwrap();
    store.registry().spoil(lease.subnet);
    let error = store.renew(&lease).await.unwrap_err();
    assert!(matches!(error, StoreError::LeaseLost { .. }), "{error}");
    assert!(error.to_string().contains("cannot be read"), "{error}");
    assert!(!store.registry().entry(lease.subnet).unwrap().readable);
}

/// A subnet that is not to be had although the list shows it free is not asked for ten times.
#[tokio::test]
async fn a_previous_subnet_that_somebody_was_faster_to_take_is_given_up() {
    let store = LocalStore::new(Keys::new(SINGLE));
    let previous = subnet("10.0.7.0-24");
    *store.registry().faster.lock().unwrap() = Some(|wanted| wanted);
    let lease = store.acquire(&node(1), Some(previous)).await.unwrap();
    assert_ne!(lease.subnet, previous);
}

/// B1: flannel exits when it loses one.
#[tokio::test]
async fn nine_races_lost_in_a_row_are_followed_by_a_lease_and_ten_by_a_refusal() {
    let store = LocalStore::new(Keys::new(SINGLE));
    let keys = store.registry();
    *keys.races.lock().unwrap() = 9;
    let lease = store.acquire(&node(1), None).await.unwrap();
    assert_eq!(*keys.creates.lock().unwrap(), 10);
    let entries = keys.list().await.unwrap();
    let ours: Vec<_> = entries
        .iter()
        .filter(|entry| entry.lease.attrs == node(1))
        .map(|entry| entry.lease.subnet)
        .collect();
    assert_eq!((entries.len(), ours), (10, vec![lease.subnet]), "{entries:?}");

    let store = LocalStore::new(Keys::new(SINGLE));
    let keys = store.registry();
    *keys.races.lock().unwrap() = 10;
    let error = store.acquire(&node(1), None).await.unwrap_err();
    assert!(
        error.to_string().contains("others were faster 10 times in a row"),
        "{error}"
    );
    assert!(!error.is_unavailable(), "an answer is no silence: {error}");
    assert_eq!(*keys.creates.lock().unwrap(), 10);
}

/// B1: whoever lost ten in a row tries again after a pause, for as long as it takes; there is no way out of it but a lease.
#[tokio::test(start_paused = true)]
async fn a_node_that_lost_ten_races_in_a_row_tries_again_later() {
    let store = Arc::new(LocalStore::new(Keys::new(SINGLE)));
    *store.registry().races.lock().unwrap() = 25;
    let options = ControlOptions {
        subnet_file: "/nonexistent/subnet.env".into(),
        ..ControlOptions::default()
    };
    let mut control = Control::new(store.clone(), options);
    let config = control.network_config().await;
    let begun = Instant::now();
    let lease = control.acquire(&node(1), &config).await;
    // Ten and ten lost, each followed by a pause; of the next five were lost, and the sixth won.
    assert_eq!(*store.registry().creates.lock().unwrap(), 26);
    let took = begun.elapsed();
    assert!(
        (Duration::from_millis(150)..Duration::from_secs(60)).contains(&took),
        "{took:?}"
    );
    assert_eq!(store.registry().entry(lease.subnet).unwrap().lease.attrs, node(1));
}

/// Two nodes that start at once draw the same IPv4 subnet and different IPv6 ones: two keys, both free.
#[tokio::test]
async fn two_keys_with_one_subnet_in_common_are_not_both_leases() {
    for tells_age in [true, false] {
        let store = LocalStore::new(Keys {
            tells_age,
            ..Keys::new(DUAL)
        });
        *store.registry().faster.lock().unwrap() = Some(|wanted| Subnet {
            v6: Some("fd00:0:0:fff0::/64".parse().unwrap()),
            ..wanted
        });
        let lease = store.acquire(&node(1), None).await.unwrap();
        let entries = store.registry().list().await.unwrap();
        let others: Vec<_> = entries
            .iter()
            .filter(|entry| entry.lease.attrs != node(1))
            .collect();
        assert_eq!((entries.len(), others.len()), (2, 1), "{entries:?}");
        assert!(!others[0].lease.subnet.overlaps(lease.subnet), "{entries:?}");
    }
}

/// One half of a pair is taken between the look and the reservation, under a key of its own: it is not reserved, and both are named.
#[tokio::test]
async fn half_a_pair_that_was_taken_meanwhile_is_not_reserved() {
    const PAIR: &str = "10.0.7.0-24&fd00:0:0:7::-64";
    let takes_v4: Faster = |wanted| Subnet {
        v6: Some("fd00:0:0:fff0::/64".parse().unwrap()),
        ..wanted
    };
    let takes_v6: Faster = |wanted| Subnet {
        v4: "10.0.99.0/24".parse().unwrap(),
        ..wanted
    };
    for tells_age in [true, false] {
        for (asked, faster, taken) in [
            (PAIR, takes_v4, "10.0.7.0-24&fd00:0:0:fff0::-64"),
            (PAIR, takes_v6, "10.0.99.0-24&fd00:0:0:7::-64"),
            ("10.0.7.0-24", takes_v4, "10.0.7.0-24&fd00:0:0:fff0::-64"),
        ] {
            let store = LocalStore::new(Keys {
                tells_age,
                ..Keys::new(DUAL)
            });
            *store.registry().faster.lock().unwrap() = Some(faster);
            let error = store
                .reserve(subnet(asked), &node(1))
                .await
                .unwrap_err()
                .to_string();
            let told = format!(
                "{}: lease already taken: {} is held by 192.0.2.99",
                subnet(asked),
                subnet(taken)
            );
            assert!(error.ends_with(&told), "{error}");
            let entries = store.registry().list().await.unwrap();
            let left: Vec<_> = entries.iter().map(|entry| entry.lease.subnet).collect();
            assert_eq!(left, [subnet(taken)], "{tells_age}");
        }
        // Where IPv6 is ours to choose, another is chosen.
        let store = LocalStore::new(Keys {
            tells_age,
            ..Keys::new(DUAL)
        });
        *store.registry().faster.lock().unwrap() = Some(takes_v6);
        store.reserve(subnet("10.0.7.0-24"), &node(1)).await.unwrap();
        let entries = store.registry().list().await.unwrap();
        assert_eq!(entries.len(), 2, "{entries:?}");
        assert!(
            !entries[0].lease.subnet.overlaps(entries[1].lease.subnet),
            "{entries:?}"
        );
        assert_eq!(entries[0].lease.expiration, Expiration::Never);
    }
}

/// The node itself took a lease with the IPv4 half meanwhile: that one is reserved, and there is no second.
#[tokio::test]
async fn a_lease_that_the_node_took_meanwhile_is_the_one_that_is_reserved() {
    let store = LocalStore::new(Keys::new(DUAL));
    *store.registry().faster.lock().unwrap() = Some(|wanted| Subnet {
        v6: Some("fd00:0:0:fff0::/64".parse().unwrap()),
        ..wanted
    });
    store.reserve(subnet("10.0.7.0-24"), &node(99)).await.unwrap();
    let entries = store.registry().list().await.unwrap();
    let held: Vec<_> = entries
        .iter()
        .map(|entry| (entry.lease.subnet, entry.lease.expiration))
        .collect();
    assert_eq!(
        held,
        [(subnet("10.0.7.0-24&fd00:0:0:fff0::-64"), Expiration::Never)]
    );
}

fn node(i: u8) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"192.0.2.{i}\"}}").as_bytes()).unwrap()
}

fn subnet(key: &str) -> Subnet {
    key.parse().unwrap()
}
