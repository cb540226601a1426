//! Networks with a name, from the store through a server to a node's client (flannel v0.5.6 to v0.7.1).

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use kersey::addr::NetworkName;
use kersey::control::store::{
    EmbeddedNetworks, NetworkEvent, NetworkUpdate, Networks, RemoteNetworks, RemoteStore, StoreError,
};
use kersey::host::inherited;
use kersey::options::ServeOptions;
use kersey::server::{self, Served};
use tokio::time::timeout;

use crate::support::{ask, node};

const SOON: Duration = Duration::from_secs(5);
const BLUE: &str = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp"}}"#;
const GREEN: &str = r#"{"Network":"10.2.0.0/16","Backend":{"Type":"vxlan","VNI":2}}"#;

#[tokio::test]
async fn each_network_has_its_own_config_leases_and_reservations() {
    let fixture = Fixture::start(None).await;
    fixture.put("blue", BLUE).await;
    fixture.put("green", GREEN).await;
    fixture.wait_for_names(2).await;
    let remote = RemoteNetworks::new(RemoteStore::new(vec![fixture.address.parse().unwrap()]));
    let (blue, green) = (
        remote.open(Some(&name("blue"))).unwrap(),
        remote.open(Some(&name("green"))).unwrap(),
    );
    assert!(blue.config().await.unwrap().contains("10.1.0.0/16"));
    assert!(green.config().await.unwrap().contains("\"VNI\":2"));
    // One node in both: two leases that know nothing of each other.
    let in_blue = blue.acquire(&node(1), None).await.unwrap();
    let in_green = green.acquire(&node(1), None).await.unwrap();
    assert!(
        in_blue.subnet.to_string().starts_with("10.1."),
        "{}",
        in_blue.subnet
    );
    assert!(
        in_green.subnet.to_string().starts_with("10.2."),
        "{}",
        in_green.subnet
    );
    let mut watch = blue.watch(None);
    watch.next().await.unwrap().unwrap();
    green.acquire(&node(2), None).await.unwrap();
    blue.renew(&in_blue).await.unwrap();
    blue.revoke(in_blue.subnet).await.unwrap();
    let told = timeout(SOON, async {
        let mut told = String::new();
        while !told.contains("Removed") {
            told += &format!("{:?}", watch.next().await.unwrap().unwrap().update);
        }
        told
    });
    let told = told.await.unwrap();
    assert!(!told.contains("10.2."), "news of another network: {told}");
    let (status, body) = ask(&fixture.address, "GET", "/v1/green/leases", "", "").await;
    assert_eq!((status, body.matches("PublicIP").count()), (200, 2), "{body}");
    let subnet = r#"{"Subnet":"10.2.200.0/24","PublicIP":"192.0.2.7"}"#;
    assert_eq!(
        ask(&fixture.address, "POST", "/v1/green/reservations", "", subnet)
            .await
            .0,
        200
    );
    assert_eq!(
        ask(&fixture.address, "GET", "/v1/blue/reservations", "", "")
            .await
            .1,
        "[]\n"
    );
}

#[tokio::test]
async fn networks_come_and_go_and_are_told() {
    let fixture = Fixture::start(None).await;
    let remote = RemoteNetworks::new(RemoteStore::new(vec![fixture.address.parse().unwrap()]));
    let mut watch = remote.watch(None);
    let first = watch.next().await.unwrap().unwrap().update;
    assert_eq!(first, NetworkUpdate::Snapshot([].into()));
    fixture.put("blue", BLUE).await;
    let told = timeout(SOON, watch.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .update;
    assert_eq!(
        told,
        NetworkUpdate::Events(vec![NetworkEvent::Added(name("blue"))])
    );
    // A poll for leases of a network that is removed ends, and says why.
    let blue = remote.open(Some(&name("blue"))).unwrap();
    blue.acquire(&node(1), None).await.unwrap();
    let (_, body) = ask(&fixture.address, "GET", "/v1/blue/leases", "", "").await;
    let cursor = body.rsplit('"').nth(1).unwrap().to_owned();
    let address = fixture.address.clone();
    let poll =
        tokio::spawn(
            async move { ask(&address, "GET", &format!("/v1/blue/leases?next={cursor}"), "", "").await },
        );
    tokio::time::sleep(Duration::from_millis(100)).await;
    fixture.networks.remove(&name("blue")).await.unwrap();
    let told = timeout(SOON, watch.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap()
        .update;
    assert_eq!(
        told,
        NetworkUpdate::Events(vec![NetworkEvent::Removed(name("blue"))])
    );
    let (status, body) = timeout(SOON, poll).await.unwrap().unwrap();
    assert_eq!(
        (status, body.as_str()),
        (500, "100: Key not found (/blue/config) [0]")
    );
    assert!(matches!(blue.config().await, Err(StoreError::Refused { .. })));
    // And comes back.
    fixture.put("blue", GREEN).await;
    fixture.wait_for_names(1).await;
    assert!(blue.config().await.unwrap().contains("10.2.0.0/16"));
}

/// Upstream bug: with `--networks` a client of v0.7.1 never hears of names created later. A snapshot and polls are all it takes.
#[tokio::test]
async fn the_list_of_networks_is_flannels_to_the_byte() {
    let fixture = Fixture::start(None).await;
    fixture.put("blue", BLUE).await;
    fixture.wait_for_names(1).await;
    let (_, body) = ask(&fixture.address, "GET", "/v1/", "", "").await;
    let cursor = body.rsplit('"').nth(1).unwrap().to_owned();
    assert_eq!(
        body,
        format!("{{\"events\":null,\"snapshot\":[\"blue\"],\"cursor\":\"{cursor}\"}}\n")
    );
    let address = fixture.address.clone();
    let poll =
        tokio::spawn(async move { ask(&address, "GET", &format!("/v1/?next={cursor}"), "", "").await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!poll.is_finished(), "a poll waits");
    fixture.put("green", GREEN).await;
    let (status, body) = timeout(SOON, poll).await.unwrap().unwrap();
    let cursor = body.rsplit('"').nth(1).unwrap();
    let expected = format!(
        "{{\"events\":[{{\"type\":\"added\",\"lease\":{{\"Subnet\":\"0.0.0.0/0\",\"Attrs\":{{\"PublicIP\":\"0.0.0.0\"}},\
         \"Expiration\":\"0001-01-01T00:00:00Z\"}},\"network\":\"green\"}}],\"snapshot\":null,\"cursor\":\"{cursor}\"}}\n"
    );
    assert_eq!((status, body.as_str()), (200, expected.as_str()));
}

#[tokio::test]
async fn each_client_hears_of_the_networks_it_may_read() {
    let rules = "[[allow]]\nanonymous = true\nnetworks = ['blue']\nright = 'lease'\n";
    let fixture = Fixture::start(Some(rules)).await;
    fixture.put("blue", BLUE).await;
    fixture.put("green", GREEN).await;
    timeout(SOON, async {
        while !ask(&fixture.address, "GET", "/v1/", "", "")
            .await
            .1
            .contains("blue")
        {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    let (_, body) = ask(&fixture.address, "GET", "/v1/", "", "").await;
    assert!(!body.contains("green"), "{body}");
    for (path, status) in [
        ("/v1/blue/config", 200),
        ("/v1/green/config", 401),
        ("/v1/_/config", 401),
        ("/v1/nobody/config", 401),
        ("/v1/blue/leases", 200),
    ] {
        assert_eq!(
            ask(&fixture.address, "GET", path, "", "").await.0,
            status,
            "{path}"
        );
    }
    let attrs = r#"{"PublicIP":"192.0.2.1"}"#;
    assert_eq!(
        ask(&fixture.address, "POST", "/v1/blue/leases", "", attrs)
            .await
            .0,
        200
    );
    assert_eq!(
        ask(&fixture.address, "POST", "/v1/green/leases", "", attrs)
            .await
            .0,
        401
    );
}

/// A server over an embedded store with several networks.
struct Fixture {
    address: String,
    networks: EmbeddedNetworks,
    serving: tokio::task::JoinHandle<()>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    async fn start(rules: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let networks =
            EmbeddedNetworks::open(&dir.path().join("leases.redb"), Duration::from_secs(3600)).unwrap();
        let mut options = ServeOptions::plain("127.0.0.1:0".parse().unwrap());
        if let Some(rules) = rules {
            let file = dir.path().join("access.toml");
            std::fs::write(&file, rules).unwrap();
            options.access_file = Some(file);
        }
        let served = Served::open(networks.open(None).unwrap(), &options)
            .unwrap()
            .with_networks(Arc::new(networks.clone()));
        let listeners = server::listen(&options.listen, inherited::descriptor)
            .await
            .unwrap();
        let address = listeners[0].address();
        Self {
            address,
            networks,
            serving: tokio::spawn(server::serve_all(listeners, served, std::future::pending())),
            _dir: dir,
        }
    }

    async fn put(&self, network: &str, config: &str) {
        self.networks
            .store(Some(&name(network)))
            .set_config(config)
            .await
            .unwrap();
    }

    async fn wait_for_names(&self, count: usize) {
        let known = async {
            loop {
                let (_, body) = ask(&self.address, "GET", "/v1/", "", "").await;
                let (_, names) = body.split_once("snapshot\":[").unwrap();
                let names = names.split(']').next().unwrap();
                if names.split(',').filter(|name| !name.is_empty()).count() == count {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(SOON, known).await.expect("the names are known");
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn name(text: &str) -> NetworkName {
    text.parse().unwrap()
}
