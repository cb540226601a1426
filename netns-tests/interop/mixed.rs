//! A network of daemons whose last node has the kernel's VXLAN.

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::kernel_node::{self, KernelNode, KernelPlan};
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::options::{EtcdOptions, StoreKind};

use crate::overlay::{Blueprint, Overlay, PREFIX, READY, Underlay};

/// All nodes know one another.
#[derive(Debug)]
pub(crate) struct Mixed {
    /// Before the namespaces it lives in.
    pub(crate) kernel: KernelNode,
    pub(crate) overlay: Overlay,
}

impl Mixed {
    /// Starts both families inside over `underlay`, the last node being the kernel's.
    pub(crate) fn start(mut blueprint: Blueprint, underlay: Underlay) -> Self {
        blueprint.network = ClusterPlan::network("vxlan", true);
        blueprint.underlay = underlay;
        blueprint.daemons = blueprint.lab.nodes - 1;
        let mut overlay = blueprint.start();
        let peers = overlay.nodes.len();
        let node = &overlay.lab.nodes[peers];
        let plan = KernelPlan {
            store: StoreKind::Etcd(EtcdOptions {
                endpoints: vec![overlay.etcd_place()],
                prefix: PREFIX.to_owned(),
                ca_file: None,
                client_cert: None,
                login: None,
            }),
            interface: INTERFACE.to_owned(),
            underlay: kernel_node::Underlay {
                v4: (underlay != Underlay::V6Only).then_some(node.v4),
                v6: (underlay != Underlay::V4Only).then_some(node.v6),
            },
            subnet: None,
        };
        let mut kernel = KernelNode::join(&node.namespace, plan).unwrap();
        kernel.follow(READY, |known| known.len() == peers).unwrap();
        for nth in 1..=peers {
            overlay.wait(nth, READY, |status| status.peers.len() == peers);
        }
        Self { kernel, overlay }
    }

    /// The kernel's node, counted from 1.
    pub(crate) fn last(&self) -> usize {
        self.overlay.lab.nodes.len()
    }

    /// A node's pod addresses, one a family.
    pub(crate) fn pods(&self, nth: usize) -> Vec<End<'_>> {
        if nth < self.last() {
            return self.overlay.pods(nth);
        }
        let namespace = self.overlay.namespace(nth);
        let addrs = self.kernel.pods().iter();
        addrs.map(|&addr| End::new(namespace, addr)).collect()
    }

    /// A node's subnets, one a family.
    pub(crate) fn subnets(&self, nth: usize) -> Vec<String> {
        if nth < self.last() {
            return self.overlay.status(nth).node.subnets;
        }
        self.kernel.subnets()
    }
}
