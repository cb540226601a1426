//! What whoever may take leases cannot do with those of others, and with those there never were.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use kersey::control::store::{EmbeddedStore, Store, leases};
use kersey::lease::{Expiration, Lease, LeaseAttrs, Subnet};
use kersey::options::ServeOptions;

use crate::support::{Running, ask, client, node};

const V4: &str = r#"{"Network":"10.244.0.0/17"}"#;
const V6: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48"}"#;
const BOTH: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48"}"#;
/// Everybody may take leases, and nobody may do more.
const LEASE: &str = "[[allow]]\nanonymous = true\nnetworks = ['_']\nright = 'lease'\n";

#[tokio::test]
async fn a_lease_without_ipv4_is_ended_by_its_own_name_alone() {
    let server = Server::start(V6, None).await;
    let (one, two) = (server.six(1).await, server.six(2).await);
    for (key, status) in [
        ("0.0.0.0-0".to_owned(), 400),
        ("0.0.0.0-0&fd00:1:0:fffe::-64".to_owned(), 500),
    ] {
        let (got, text) = server.ask("DELETE", &format!("/v1/_/leases/{key}"), "", "").await;
        assert_eq!(got, status, "{key}: {text}");
    }
    assert_eq!(server.leases().await.len(), 2);
    // Kersey's own client says which it means.
    let store = client(&server.running.address, None);
    store.revoke(two.subnet).await.unwrap();
    let left = server.leases().await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].subnet, one.subnet);
    let path = format!("/v1/_/leases/{}", one.subnet);
    let (status, text) = server.ask("GET", &path, "", "").await;
    let v6 = one.subnet.v6.unwrap().to_string();
    assert!(status == 200 && text.contains(&v6), "{text}");
}

#[tokio::test]
async fn what_somebody_has_is_not_reserved_for_another() {
    let server = Server::start(BOTH, None).await;
    let store = client(&server.running.address, None);
    let held = store.acquire(&node(1), None).await.unwrap();
    let v4 = held.subnet.v4;
    let other_v6 = Subnet {
        v4,
        v6: Some("fd00:1:0:fffe::/64".parse().unwrap()),
    };
    let other_v4 = Subnet {
        v4: "10.244.255.0/24".parse().unwrap(),
        ..held.subnet
    };
    for wanted in [Subnet { v4, v6: None }, held.subnet, other_v6, other_v4] {
        let error = store.reserve(wanted, &node(2)).await.unwrap_err().to_string();
        assert!(error.contains("192.0.2.1"), "{wanted}: {error}");
        let error = server
            .store
            .reserve(wanted, &node(2))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("192.0.2.1"), "{wanted}: {error}");
    }
    assert_eq!(server.leases().await.len(), 1);
    // What is free is reserved whole, named by its IPv4 half alone, and its node gets that.
    let free: Subnet = "10.244.254.0-24".parse().unwrap();
    store.reserve(free, &node(2)).await.unwrap();
    let lease = store.acquire(&node(2), None).await.unwrap();
    assert_eq!((lease.subnet.v4, lease.expiration), (free.v4, Expiration::Never));
    assert!(lease.subnet.v6.is_some());
    // With both halves named, both are taken as they are.
    let named: Subnet = "10.244.253.0-24&fd00:1:0:77::-64".parse().unwrap();
    store.reserve(named, &node(3)).await.unwrap();
    assert_eq!(store.acquire(&node(3), None).await.unwrap().subnet, named);
    // One's own lease becomes a reservation by either name.
    store.reserve(Subnet { v4, v6: None }, &node(1)).await.unwrap();
    let listed = server.ask("GET", "/v1/_/reservations", "", "").await.1;
    assert_eq!(listed.matches("IPv6Subnet").count(), 3, "{listed}");
    assert_eq!(server.leases().await.len(), 3);
}

#[tokio::test]
async fn a_reservation_stays_with_the_address_it_was_made_for() {
    let server = Server::start(V4, Some(LEASE)).await;
    let reserved: Subnet = "10.244.9.0-24".parse().unwrap();
    server.store.reserve(reserved, &node(1)).await.unwrap();
    let ours = LeaseAttrs {
        public_ip: "192.0.2.66".parse().unwrap(),
        ..node(1)
    };
    let (status, text) = server.renew(reserved, &ours, Some("192.0.2.1")).await;
    assert_eq!(status, 500, "{text}");
    assert!(text.contains("192.0.2.1"), "{text}");
    // Nor is the address that a client asks from good enough.
    let mut lease = server.leases().await.remove(0);
    lease.attrs = ours.clone();
    let error = server.store.readdress_client(&lease, &node(1)).await.unwrap_err();
    assert!(error.is_conflict(), "{error}");
    // An administrator's word is good.
    let admin = Server::over(Arc::clone(&server.store), None).await;
    let (status, text) = admin.renew(reserved, &ours, Some("192.0.2.1")).await;
    assert_eq!(status, 200, "{text}");
    assert_eq!(server.leases().await[0].expiration, Expiration::Never);
}

/// A client's address is 127.0.0.1 here, which no node has: the address it asks from is that of none of the two.
#[tokio::test]
async fn a_lease_moves_only_for_whoever_has_one_of_the_two_addresses() {
    let server = Server::start(V4, Some(LEASE)).await;
    let held = server.store.acquire(&node(1), None).await.unwrap();
    let (status, text) = server.renew(held.subnet, &node(2), Some("192.0.2.1")).await;
    assert_eq!(status, 500, "{text}");
    assert_eq!(server.leases().await[0].attrs, node(1));
    let Some(own) = crate::access::another_address() else {
        return;
    };
    let moving = Server::at(Arc::clone(&server.store), Some(LEASE), &own.to_string()).await;
    let std::net::IpAddr::V4(own) = own else {
        return;
    };
    let ours = LeaseAttrs {
        public_ip: own,
        ..node(1)
    };
    let (status, text) = moving.renew(held.subnet, &ours, Some("192.0.2.1")).await;
    assert_eq!(status, 200, "{text}");
    assert_eq!(server.leases().await[0].attrs, ours);
}

#[tokio::test]
async fn what_never_was_a_lease_is_not_renewed() {
    let server = Server::start(V4, Some(LEASE)).await;
    for key in [
        "192.168.0.0-16",
        "10.244.128.0-17",
        "10.244.3.0-25",
        "10.244.200.0-24",
        "0.0.0.0-0",
    ] {
        let subnet = key.parse().unwrap();
        let (status, text) = server.renew(subnet, &node(1), None).await;
        assert_eq!(status, 500, "{key}: {text}");
    }
    assert_eq!(server.leases().await, []);
    // One that could have been is taken again, by whoever has no other.
    let first = "10.244.3.0-24".parse().unwrap();
    assert_eq!(server.renew(first, &node(1), None).await.0, 200);
    let second = "10.244.4.0-24".parse().unwrap();
    assert_eq!(server.renew(second, &node(1), None).await.0, 500);
    assert_eq!(server.leases().await.len(), 1);
}

#[tokio::test]
async fn no_lease_is_taken_for_an_address_that_no_node_can_have() {
    let server = Server::start(V4, None).await;
    for body in [
        "{}",
        r#"{"PublicIP":"0.0.0.0"}"#,
        r#"{"PublicIP":"0.1.2.3"}"#,
        r#"{"PublicIP":"127.0.0.1"}"#,
        r#"{"PublicIP":"224.0.0.1"}"#,
        r#"{"PublicIP":"255.255.255.255"}"#,
        r#"{"PublicIPv6":"::1"}"#,
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"ff02::1"}"#,
        r#"{"PublicIP":"192.0.2.1","PublicIPv6":"::ffff:192.0.2.1"}"#,
    ] {
        let (status, text) = server.ask("POST", "/v1/_/leases", "", body).await;
        assert_eq!(status, 400, "{body}: {text}");
        assert!(text.contains("PublicIP"), "{body}: {text}");
    }
    let long = format!(
        r#"{{"PublicIP":"192.0.2.1","BackendData":"{}"}}"#,
        "x".repeat(9_000)
    );
    let (status, text) = server.ask("POST", "/v1/_/leases", "", &long).await;
    assert!(status == 400 && text.contains("8192"), "{status} {text}");
    assert_eq!(server.leases().await, []);
}

#[tokio::test]
async fn one_address_does_not_take_all_subnets() {
    let file = format!("leases-per-address = 5\n{LEASE}");
    let server = Server::start(V4, Some(&file)).await;
    let take = async |i: u8| {
        let body = format!(r#"{{"PublicIP":"192.0.2.{i}"}}"#);
        server.ask("POST", "/v1/_/leases", "", &body).await
    };
    let answers = join_all((1..=20).map(take)).await;
    let taken = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!(taken, 5);
    let (status, text) = take(99).await;
    assert!(
        status == 403 && text.contains("leases-per-address"),
        "{status} {text}"
    );
    // Nor is one made by renewing it, and who has one is given it again.
    let free = server.free().await;
    assert_eq!(server.renew(free, &node(99), None).await.0, 403);
    let held = server.leases().await[0].clone();
    assert_eq!(take(held.attrs.public_ip.octets()[3]).await.0, 200);
    assert_eq!(server.renew(held.subnet, &held.attrs, None).await.0, 200);
    // What is given up makes room.
    server.store.revoke(held.subnet).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(take(99).await.0, 200);
}

/// A lease that changed hands after somebody looked is not ended.
#[tokio::test]
async fn what_may_go_is_decided_by_the_lease_as_it_is() {
    let server = Server::start(V4, None).await;
    let held = server.store.acquire(&node(1), None).await.unwrap();
    let is_ones = |lease: &Lease| lease.attrs == node(1);
    let is_twos = |lease: &Lease| lease.attrs == node(2);
    assert!(!server.store.revoke_if(held.subnet, &is_twos).await.unwrap());
    assert_eq!(server.leases().await.len(), 1);
    assert!(server.store.revoke_if(held.subnet, &is_ones).await.unwrap());
    assert!(!server.store.revoke_if(held.subnet, &is_ones).await.unwrap());
    assert_eq!(server.leases().await, []);
}

/// A server over a store of its own, or of another.
struct Server {
    running: Running,
    store: Arc<dyn Store>,
    _dir: tempfile::TempDir,
}

impl Server {
    async fn start(config: &str, access: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = EmbeddedStore::open(&dir.path().join("leases.redb"), Duration::from_secs(3600)).unwrap();
        store.set_config(config).await.unwrap();
        let served = Self::over(Arc::new(store), access).await;
        // The file of the store must outlive it, and nothing else is in the other directory any more.
        Self { _dir: dir, ..served }
    }

    async fn over(store: Arc<dyn Store>, access: Option<&str>) -> Self {
        Self::at(store, access, "127.0.0.1").await
    }

    async fn at(store: Arc<dyn Store>, access: Option<&str>, address: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let access_file = access.map(|text| {
            let file = dir.path().join("access.toml");
            std::fs::write(&file, text).unwrap();
            file
        });
        let options = ServeOptions {
            access_file,
            ..ServeOptions::plain(format!("{address}:0").parse().unwrap())
        };
        Self {
            running: Running::over(Arc::clone(&store), options).await,
            store,
            _dir: dir,
        }
    }

    async fn ask(&self, method: &str, path: &str, more: &str, body: &str) -> (u16, String) {
        ask(&self.running.address, method, path, more, body).await
    }

    async fn renew(&self, subnet: Subnet, attrs: &LeaseAttrs, formerly: Option<&str>) -> (u16, String) {
        let path = format!("/v1/_/leases/{}-{}", subnet.v4.addr(), subnet.v4.len());
        let more = formerly.map_or_else(String::new, |address| format!("x-kersey-formerly: {address}\r\n"));
        let body = format!(
            r#"{{"Subnet":"{}","Attrs":{{"PublicIP":"{}"}}}}"#,
            subnet.v4, attrs.public_ip
        );
        self.ask("PUT", &path, &more, &body).await
    }

    /// A lease of a node that has IPv6 only.
    async fn six(&self, i: u8) -> Lease {
        let attrs = LeaseAttrs {
            public_ip: std::net::Ipv4Addr::UNSPECIFIED,
            public_ipv6: Some(format!("2001:db8::{i}").parse().unwrap()),
            ..node(i)
        };
        client(&self.running.address, None)
            .acquire(&attrs, None)
            .await
            .unwrap()
    }

    /// A subnet that nobody has.
    async fn free(&self) -> Subnet {
        let taken = self.leases().await;
        (1..120)
            .map(|third| format!("10.244.{third}.0-24").parse().unwrap())
            .find(|subnet| taken.iter().all(|lease| lease.subnet != *subnet))
            .unwrap()
    }

    async fn leases(&self) -> Vec<Lease> {
        leases(&*self.store).await.unwrap()
    }
}
