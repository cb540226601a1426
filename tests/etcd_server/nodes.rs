//! Nodes of an etcd: their names, addresses and life cycles.

use std::sync::Arc;
use std::time::Duration;

use kersey::control::identity::Holder;
use kersey::control::store::remote::NodeHeader;
use kersey::control::store::{EtcdOptions, EtcdStore};
use kersey::control::{Control, ControlOptions, Published};
use kersey::lease::{Lease, LeaseAttrs, Subnet};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A network for 255 nodes.
pub const CONFIG: &str = r#"{"Network":"10.0.0.0/16"}"#;

/// One node's life cycle, running.
pub struct Node {
    pub store: Arc<EtcdStore>,
    pub lease: Lease,
    pub published: Published,
    pub maintain: JoinHandle<()>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.maintain.abort();
    }
}

impl Node {
    /// Starts node `i`.
    pub async fn start(etcd: EtcdOptions, i: u8, options: ControlOptions) -> Self {
        let store = Arc::new(EtcdStore::connect(etcd).unwrap());
        let mut control = Control::new(store.clone(), options);
        let config = control.network_config().await;
        let lease = control.acquire(&node(i), &config).await;
        let (publish, published) = control.channels(&config, &lease);
        Self {
            store,
            lease,
            published,
            maintain: tokio::spawn(control.maintain(publish)),
        }
    }
}

/// Options of a node that had no life before.
pub fn fresh() -> ControlOptions {
    ControlOptions {
        subnet_file: "/nonexistent/subnet.env".into(),
        ..ControlOptions::default()
    }
}

/// Waits until what a node publishes is so.
pub async fn wait<T>(channel: &watch::Receiver<T>, what: &str, condition: impl FnMut(&T) -> bool) {
    let mut channel = channel.clone();
    let waited = timeout(Duration::from_secs(30), channel.wait_for(condition)).await;
    assert!(
        waited.is_ok_and(|waited| waited.is_ok()),
        "waited in vain for {what}"
    );
}

/// A host; its number is made of its name.
pub fn holder(host: &str) -> Holder {
    let digits: String = host.bytes().map(|byte| format!("{byte:02x}")).collect();
    let node: NodeHeader = format!("192.0.2.1 {digits:0<32.32} boot-of-{host} {host}")
        .parse()
        .unwrap();
    node.holder
}

pub fn subnet(key: &str) -> Subnet {
    key.parse().unwrap()
}

/// What node `i` says of itself.
pub fn node(i: u8) -> LeaseAttrs {
    node_at(&format!("192.0.2.{i}"))
}

/// What a node with that address says of itself.
pub fn node_at(ip: &str) -> LeaseAttrs {
    LeaseAttrs::from_json(format!("{{\"PublicIP\":\"{ip}\"}}").as_bytes()).unwrap()
}
