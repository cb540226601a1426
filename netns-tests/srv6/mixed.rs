//! A network of daemons whose last nodes have the kernel's SRv6.

use std::fs;
use std::time::Duration;

use kersey::host::netlink::Seg6Mode;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::netns::Namespace;
use kersey::lab::seg6_node::{Form, Seg6Node, Seg6Plan};
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;
use kersey::lab::traffic::udp::Flood;
use kersey::options::{EtcdOptions, StoreKind};
use serde_json::Value;

use crate::overlay::{Blueprint, Overlay, PREFIX, READY};

/// MTU of the underlay.
pub(crate) const LINK_MTU: u16 = 1500;

/// What the kernel's nodes are like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernels {
    /// The last so many nodes are the kernel's.
    pub(crate) nodes: usize,
    pub(crate) form: Form,
    /// As the network says, if `None`.
    pub(crate) mode: Option<Seg6Mode>,
}

impl Kernels {
    /// One by the rules of the network.
    pub(crate) const ONE: Self = Self {
        nodes: 1,
        form: Form::Seg6,
        mode: None,
    };
}

/// All nodes know one another.
#[derive(Debug)]
pub(crate) struct Mixed {
    /// Before the namespaces they live in.
    pub(crate) kernels: Vec<Seg6Node>,
    pub(crate) overlay: Overlay,
}

impl Mixed {
    /// Starts the blueprint's network. Kersey's nodes come first.
    pub(crate) fn start(mut blueprint: Blueprint, kernels: Kernels) -> Self {
        blueprint.daemons = blueprint.lab.nodes - kernels.nodes;
        let mut overlay = blueprint.start();
        let peers = overlay.lab.nodes.len() - 1;
        let place = overlay.etcd_place();
        let join = |nth: usize| {
            let node = &overlay.lab.nodes[nth];
            let plan = Seg6Plan {
                store: StoreKind::Etcd(EtcdOptions {
                    endpoints: vec![place.clone()],
                    prefix: PREFIX.to_owned(),
                    ca_file: None,
                    client_cert: None,
                    login: None,
                }),
                interface: INTERFACE.to_owned(),
                v4: node.v4,
                v6: node.v6,
                form: kernels.form,
                mode: kernels.mode,
                subnet: None,
            };
            Seg6Node::join(&node.namespace, plan).unwrap()
        };
        let mut kernels: Vec<_> = (overlay.nodes.len()..=peers).map(join).collect();
        for kernel in &mut kernels {
            kernel.follow(READY, |known| known.len() == peers).unwrap();
        }
        for nth in 1..=overlay.nodes.len() {
            overlay.wait(nth, READY, |status| status.peers.len() == peers);
        }
        let mixed = Self { kernels, overlay };
        mixed.assert_seg6_off();
        mixed
    }

    /// How many nodes there are of both kinds.
    pub(crate) fn count(&self) -> usize {
        self.overlay.lab.nodes.len()
    }

    /// Whether a node is Kersey's.
    pub(crate) fn is_kersey(&self, nth: usize) -> bool {
        nth <= self.overlay.nodes.len()
    }

    /// A node's pod addresses, one a family.
    pub(crate) fn pods(&self, nth: usize) -> Vec<End<'_>> {
        if self.is_kersey(nth) {
            return self.overlay.pods(nth);
        }
        let namespace = self.overlay.namespace(nth);
        let addrs = self.kernel(nth).pods().iter();
        addrs.map(|&addr| End::new(namespace, addr)).collect()
    }

    /// A node's subnets, one a family.
    pub(crate) fn subnets(&self, nth: usize) -> Vec<String> {
        if self.is_kersey(nth) {
            return self.overlay.status(nth).node.subnets;
        }
        self.kernel(nth).subnets()
    }

    fn kernel(&self, nth: usize) -> &Seg6Node {
        &self.kernels[nth - 1 - self.overlay.nodes.len()]
    }

    /// Pings from every node to every other in every family that both have, small packets and the largest that fit.
    pub(crate) fn reach_all(&self, families: usize, mtu: usize) {
        let pairs = (1..=self.count()).flat_map(|from| (1..=self.count()).map(move |to| (from, to)));
        for (from, to) in pairs.filter(|(from, to)| from != to) {
            let ends = self.pods(from).into_iter().zip(self.pods(to));
            for (from, to) in ends.take(families) {
                reach(from, to, &[84, mtu]);
            }
        }
    }

    /// Checks that the kernels of Kersey's nodes do no SRv6 on any interface, and that nothing was dropped there.
    pub(crate) fn assert_sound(&self) {
        self.assert_seg6_off();
        for nth in 1..=self.overlay.nodes.len() {
            self.overlay.assert_no_drops(nth);
        }
    }

    /// The same where drops for one reason are to be expected.
    pub(crate) fn assert_sound_but(&self, reason: &str) {
        self.assert_seg6_off();
        for nth in 1..=self.overlay.nodes.len() {
            let mut status = self.overlay.status(nth);
            status
                .drops
                .retain(|known, _| known != reason && known != "not_unicast");
            assert!(status.drops.is_empty(), "node {nth}: {:?}", status.drops);
        }
    }

    fn assert_seg6_off(&self) {
        for nth in 1..=self.overlay.nodes.len() {
            let switches = seg6_switches(self.overlay.namespace(nth));
            assert!(switches.len() >= 4, "all, default, lo, {INTERFACE}: {switches:?}");
            assert!(
                switches.iter().all(|(_, value)| value == "0"),
                "node {nth}: {switches:?}"
            );
        }
    }
}

/// A dual-stack network, or one of IPv4 alone, with further settings of its backend.
pub(crate) fn network(settings: Value, dual_stack: bool) -> String {
    let mut config: Value = serde_json::from_str(&ClusterPlan::network("srv6", dual_stack)).unwrap();
    let Value::Object(settings) = settings else {
        panic!("settings are an object: {settings}");
    };
    config["Backend"].as_object_mut().unwrap().extend(settings);
    config.to_string()
}

/// Echo requests of so many bytes in all; each is answered.
pub(crate) fn reach(from: End<'_>, to: End<'_>, totals: &[usize]) {
    let headers = if to.addr.is_ipv4() { 28 } else { 48 };
    for total in totals {
        let ping = Ping {
            count: 2,
            data_bytes: total - headers,
            interval: Duration::from_millis(1),
            timeout: Duration::from_millis(500),
        };
        let report = ping.run(from, to.addr).unwrap();
        assert!(
            report.all(),
            "{} to {}, {total} bytes: {report:?}",
            from.addr,
            to.addr
        );
    }
}

/// A transfer over TCP whose bytes are compared.
pub(crate) fn bulk(from: End<'_>, to: End<'_>, bytes: u64) {
    let transfer = Verified {
        bytes: bytes + 3,
        seed: bytes,
        patience: Duration::from_secs(5),
    };
    let report = transfer.run(from, to).unwrap();
    assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
}

/// Datagrams at a rate no queue minds; each arrives as it was sent.
pub(crate) fn datagrams(from: End<'_>, to: End<'_>, payload_bytes: usize) {
    let flood = Flood {
        payload_bytes,
        rate: Some(1000),
        duration: Duration::from_millis(100),
    };
    let report = flood.run(from, to).unwrap();
    let counts = &report.counts;
    assert_eq!(
        (counts.lost, counts.corrupted, counts.duplicates),
        (0, 0, 0),
        "{} to {}, {payload_bytes} bytes: {report:?}",
        from.addr,
        to.addr
    );
}

/// `seg6_enabled` of every interface, `all` and `default`.
fn seg6_switches(namespace: &Namespace) -> Vec<(String, String)> {
    namespace
        .run(|| {
            let mut switches = Vec::new();
            for entry in fs::read_dir("/proc/sys/net/ipv6/conf")? {
                let entry = entry?;
                let value = fs::read_to_string(entry.path().join("seg6_enabled"))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                switches.push((name, value.trim().to_owned()));
            }
            Ok(switches)
        })
        .unwrap()
}
