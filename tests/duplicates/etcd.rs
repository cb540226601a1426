//! Over a real etcd.

use std::time::Duration;

use etcd_client::{LeaseTimeToLiveOptions, PutOptions};
use kersey::control::ControlOptions;
use kersey::control::identity::Holder;
use kersey::control::store::{Store, StoreError};
use tokio::time::{sleep, timeout};

use crate::VAGRANT;
use crate::etcd_server::nodes::{CONFIG, Node, fresh, holder, node, node_at};
use crate::etcd_server::{self, Etcd, PREFIX};

#[tokio::test]
async fn the_second_host_with_an_address_gets_no_lease_and_an_error_that_names_both() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let (one, two) = (etcd.store(), etcd.store());
    let lease = one
        .acquire_as(&holder("alpha"), &node_at(VAGRANT), None)
        .await
        .unwrap();
    let before = etcd.dump().await;
    let error = two
        .acquire_as(&holder("beta"), &node_at(VAGRANT), None)
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::AddressTaken { .. }), "{error}");
    for named in ["\"alpha\"", "\"beta\"", VAGRANT, "--public-ip"] {
        assert!(error.to_string().contains(named), "{error}");
    }
    assert_eq!(etcd.dump().await, before, "the second host wrote something");
    // The first one goes on, and may restart as it likes.
    assert_eq!(
        one.renew_as(&holder("alpha"), &lease).await.unwrap().subnet,
        lease.subnet
    );
    drop(one);
    let again = etcd
        .store()
        .acquire_as(&holder("alpha"), &node_at(VAGRANT), None)
        .await
        .unwrap();
    assert_eq!(again.subnet, lease.subnet);
    // With an address of its own the second is welcome.
    let other = two.acquire_as(&holder("beta"), &node(2), None).await.unwrap();
    assert_ne!(other.subnet, lease.subnet);
}

#[tokio::test]
async fn of_hosts_that_start_together_one_gets_the_address() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    for round in 0..10 {
        let address = format!("192.0.2.{}", round + 1);
        let claims = (0..4).map(|i| {
            let (store, attrs) = (etcd.store(), node_at(&address));
            tokio::spawn(async move {
                let who = holder(&format!("host-{i}-of-round-{round}"));
                let got = store.acquire_as(&who, &attrs, None).await;
                (got, store)
            })
        });
        let claimed: Vec<_> = futures_util::future::join_all(claims)
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(
            claimed.iter().filter(|(got, _)| got.is_ok()).count(),
            1,
            "{round}"
        );
    }
    let leases = etcd
        .dump()
        .await
        .into_iter()
        .filter(|(key, ..)| key.contains("/subnets/"))
        .count();
    assert_eq!(leases, 10);
}

/// B4: flannel, back from a long pause, overwrites the key that is somebody else's by then.
#[tokio::test]
async fn a_host_back_from_a_long_pause_does_not_take_its_lease_from_the_new_owner() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let (old, new) = (etcd.store(), etcd.store());
    let lease = old.acquire_as(&holder("old"), &node(1), None).await.unwrap();
    // Its sign of life runs out, and the machine that replaces it takes over.
    etcd.delete("kersey/nodes/192.0.2.1").await;
    let mut attrs = node(1);
    attrs.backend_data = Some(r#"{"VtepMAC":"02:00:00:00:00:02"}"#.to_owned());
    let taken = new.acquire_as(&holder("new"), &attrs, None).await.unwrap();
    assert_eq!(taken.subnet, lease.subnet);
    let error = old.renew_as(&holder("old"), &lease).await.unwrap_err();
    assert!(error.to_string().contains("\"new\""), "{error}");
    assert!(old.acquire_as(&holder("old"), &node(1), None).await.is_err());
    assert_eq!(value(&etcd, &lease.subnet.to_string()).await, attrs.to_json());
}

/// B0: flanneld drops all its peers when it sees a key under `subnets` that it cannot read.
#[tokio::test]
async fn nothing_new_is_written_where_flanneld_reads() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let store = etcd.store();
    let lease = store.acquire_as(&holder("alpha"), &node(1), None).await.unwrap();
    let dump = etcd.dump().await;
    let keys: Vec<_> = dump
        .iter()
        .map(|(key, ..)| key.strip_prefix(PREFIX).unwrap())
        .collect();
    assert_eq!(
        keys,
        [
            "/config",
            "/kersey/nodes/192.0.2.1",
            &format!("/subnets/{}", lease.subnet)
        ]
    );
    assert_eq!(dump[2].1, node(1).to_json());
}

#[tokio::test]
async fn the_sign_of_life_is_kept_up_and_made_anew_after_etcd_forgot_it() {
    let Some(mut etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let store = etcd.store();
    store.acquire_as(&holder("alpha"), &node(1), None).await.unwrap();
    sleep(Duration::from_secs(13)).await;
    let id = etcd
        .dump()
        .await
        .iter()
        .find(|(key, ..)| key.contains("/nodes/"))
        .unwrap()
        .2;
    let left = etcd
        .client()
        .await
        .lease_time_to_live(id, Some(LeaseTimeToLiveOptions::new()))
        .await
        .unwrap();
    assert_eq!(left.granted_ttl(), 30);
    assert!(left.ttl() > 24, "{left:?}");
    etcd.crash();
    etcd.wipe();
    etcd.restart().await;
    let back = async {
        while !etcd.dump().await.iter().any(|(key, ..)| key.contains("/nodes/")) {
            sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(Duration::from_secs(25), back)
        .await
        .expect("the sign of life stays away");
}

/// A flanneld with our address overwrites our lease. We put it right a few times and say so, then leave it: two that
/// correct each other for ever help nobody.
#[tokio::test]
async fn a_lease_that_somebody_changes_is_put_right_but_not_for_ever() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let options = ControlOptions {
        holder: Some(holder("alpha")),
        ..fresh()
    };
    let running = Node::start(etcd.options(), 1, options).await;
    let lease = running.lease.clone();
    let (key, ours) = (lease.subnet.to_string(), node(1).to_json());
    let mut health = running.published.health.clone();
    health.wait_for(|health| health.connected).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    let theirs = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
    for round in 0..3 {
        flannel_puts(&etcd, &key, theirs).await;
        let right = async {
            while value(&etcd, &key).await != ours {
                sleep(Duration::from_millis(50)).await;
            }
        };
        timeout(Duration::from_secs(5), right)
            .await
            .unwrap_or_else(|_| panic!("round {round}"));
    }
    flannel_puts(&etcd, &key, theirs).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(value(&etcd, &key).await, theirs);
    assert_eq!(
        running.published.lease.borrow().subnet,
        lease.subnet,
        "the node moved"
    );
}

/// F10 and F15: after a restart a look is enough, if nothing is left to doubt. It writes nothing, so it waits for no disk.
#[tokio::test]
async fn a_look_confirms_a_lease_without_a_write_while_its_host_is_known_and_it_lasts() {
    let Some(etcd) = etcd_server::start().await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    let (alpha, attrs) = (holder("alpha"), node_at(VAGRANT));
    let first = etcd.store();
    let lease = first.acquire_as(&alpha, &attrs, None).await.unwrap();
    drop(first);
    let mut client = etcd.client().await;
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    let dump = etcd.dump().await;

    let restarted = etcd.store();
    let look = |who: Holder| {
        let (store, subnet, attrs) = (&restarted, lease.subnet, &attrs);
        async move { store.confirm(Some(&who), subnet, attrs).await.unwrap() }
    };
    // Half of the time the host counts as alive is over, and begins anew with the look.
    let presence = |dump: &[(String, String, i64)]| {
        let key = dump.iter().find(|(key, ..)| key.contains("/kersey/nodes/"));
        key.map(|(.., lease)| *lease).unwrap()
    };
    let left = async || {
        let mut client = etcd.client().await;
        client
            .lease_time_to_live(presence(&dump), None)
            .await
            .unwrap()
            .ttl()
    };
    while left().await > 25 {
        sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(
        look(alpha.clone()).await.map(|seen| seen.subnet),
        Some(lease.subnet)
    );
    assert!(left().await > 27, "{}", left().await);
    let mut copy = alpha.clone();
    (copy.host, copy.boot) = ("beta".to_owned(), "another".to_owned());
    for (case, who) in [
        ("another host", holder("beta")),
        ("a copy of the data directory", copy),
    ] {
        assert_eq!(look(who).await, None, "{case}");
    }
    assert_eq!(
        client.get("x", None).await.unwrap().header().unwrap().revision(),
        revision
    );
    assert_eq!(etcd.dump().await, dump);

    // Whose address it is, nobody knows: that is to be settled first.
    client.lease_revoke(presence(&dump)).await.unwrap();
    assert_eq!(look(alpha.clone()).await, None);
    assert!(restarted.acquire_as(&alpha, &attrs, None).await.is_ok());
    assert!(look(alpha.clone()).await.is_some());
    // A flanneld has written it meanwhile, to the same effect but for a key that ends too soon to be relied on.
    let soon = client.lease_grant(20, None).await.unwrap().id();
    let options = PutOptions::new().with_lease(soon);
    let key = format!("{PREFIX}/subnets/{}", lease.subnet);
    client
        .put(key.as_str(), attrs.to_json(), Some(options))
        .await
        .unwrap();
    assert_eq!(look(alpha.clone()).await, None);
    client.delete(key.as_str(), None).await.unwrap();
    assert_eq!(look(alpha).await, None);
}

/// Puts a lease as flanneld does: under an etcd lease of its own, whatever is there.
async fn flannel_puts(etcd: &Etcd, subnet: &str, value: &str) {
    let mut client = etcd.client().await;
    let lease = client.lease_grant(86_400, None).await.unwrap().id();
    let options = PutOptions::new().with_lease(lease);
    client
        .put(format!("{PREFIX}/subnets/{subnet}"), value, Some(options))
        .await
        .unwrap();
}

async fn value(etcd: &Etcd, subnet: &str) -> String {
    let key = format!("{PREFIX}/subnets/{subnet}");
    let found = etcd.dump().await.into_iter().find(|(found, ..)| *found == key);
    found.map(|(_, value, _)| value).unwrap_or_default()
}
