//! Every combination of header forms, of offloads on the wire, and of Kersey's own: sizes around the MTU, bulk,
//! datagrams, many streams, in both families and both directions.

use std::process::{Command, Stdio};
use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::host::netlink::Seg6Mode;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;
use serde_json::json;

use crate::mixed::{Kernels, LINK_MTU, Mixed, bulk, datagrams, network, reach};
use crate::overlay::{Blueprint, figure};
use crate::support::pod::Pod;
use crate::support::require_etcd;

#[test]
fn reduced_with_all_offloads() {
    if require_etcd("reduced_with_all_offloads") {
        row("s-ra", REDUCED, ALL);
    }
}

#[test]
fn reduced_with_none_of_kerseys() {
    if require_etcd("reduced_with_none_of_kerseys") {
        row("s-rk", REDUCED, NOT_KERSEYS);
    }
}

#[test]
fn reduced_with_none_on_the_wire() {
    if require_etcd("reduced_with_none_on_the_wire") {
        row("s-rw", REDUCED, NOT_THE_WIRES);
    }
}

#[test]
fn reduced_with_none_at_all() {
    if require_etcd("reduced_with_none_at_all") {
        row("s-rn", REDUCED, NONE);
    }
}

#[test]
fn reduced_with_gro_on_a_plain_wire() {
    if require_etcd("reduced_with_gro_on_a_plain_wire") {
        row("s-rg", REDUCED, GRO);
    }
}

#[test]
fn reduced_with_gro_and_none_of_kerseys() {
    if require_etcd("reduced_with_gro_and_none_of_kerseys") {
        row("s-rj", REDUCED, GRO_ALONE);
    }
}

#[test]
fn full_with_all_offloads() {
    if require_etcd("full_with_all_offloads") {
        row("s-fa", FULL, ALL);
    }
}

#[test]
fn full_with_none_of_kerseys() {
    if require_etcd("full_with_none_of_kerseys") {
        row("s-fk", FULL, NOT_KERSEYS);
    }
}

#[test]
fn full_with_none_on_the_wire() {
    if require_etcd("full_with_none_on_the_wire") {
        row("s-fw", FULL, NOT_THE_WIRES);
    }
}

#[test]
fn full_with_none_at_all() {
    if require_etcd("full_with_none_at_all") {
        row("s-fn", FULL, NONE);
    }
}

#[test]
fn full_with_gro_on_a_plain_wire() {
    if require_etcd("full_with_gro_on_a_plain_wire") {
        row("s-fg", FULL, GRO);
    }
}

#[test]
fn full_from_the_kernel_and_reduced_from_kersey() {
    if require_etcd("full_from_the_kernel_and_reduced_from_kersey") {
        row("s-fr", FULL_TO_REDUCED, ALL);
        row("s-fs", FULL_TO_REDUCED, GRO);
    }
}

#[test]
fn reduced_from_the_kernel_and_full_from_kersey() {
    if require_etcd("reduced_from_the_kernel_and_full_from_kersey") {
        row("s-rf", REDUCED_TO_FULL, ALL);
        row("s-rs", REDUCED_TO_FULL, GRO);
    }
}

/// Header forms: the network's, which is Kersey's, and the kernel's.
#[derive(Clone, Copy, Debug)]
struct Headers {
    network: &'static str,
    kernel: Seg6Mode,
}

const REDUCED: Headers = Headers {
    network: "reduced",
    kernel: Seg6Mode::EncapRed,
};
const FULL: Headers = Headers {
    network: "full",
    kernel: Seg6Mode::Encap,
};
const FULL_TO_REDUCED: Headers = Headers {
    network: "reduced",
    kernel: Seg6Mode::Encap,
};
const REDUCED_TO_FULL: Headers = Headers {
    network: "full",
    kernel: Seg6Mode::EncapRed,
};

impl Headers {
    /// The largest packet that Kersey's node and the kernel's may send into the overlay.
    fn inner_mtus(self) -> [usize; 2] {
        let full_or_not = |full| usize::from(LINK_MTU) - if full { 64 } else { 40 };
        let [kersey, kernel] = [self.network == "full", self.kernel == Seg6Mode::Encap].map(full_or_not);
        // The kernel's node keeps to what the network is made for, too.
        [kersey, kernel.min(kersey)]
    }
}

/// What is on.
#[derive(Clone, Copy, Debug)]
struct Offloads {
    wire: Switch,
    gro: Switch,
    own: Switch,
}

const ALL: Offloads = offloads(Switch::On, Switch::Off, Switch::On);
const NOT_KERSEYS: Offloads = offloads(Switch::On, Switch::Off, Switch::Off);
const NOT_THE_WIRES: Offloads = offloads(Switch::Off, Switch::Off, Switch::On);
const NONE: Offloads = offloads(Switch::Off, Switch::Off, Switch::Off);
const GRO: Offloads = offloads(Switch::Off, Switch::On, Switch::On);
const GRO_ALONE: Offloads = offloads(Switch::Off, Switch::On, Switch::Off);

const fn offloads(wire: Switch, gro: Switch, own: Switch) -> Offloads {
    Offloads { wire, gro, own }
}

/// Kersey on node 1 and the kernel on node 2, each with a container.
fn row(tag: &str, headers: Headers, offloads: Offloads) {
    let mut blueprint = Blueprint::new(tag, 2);
    let [own_mtu, kernel_mtu] = headers.inner_mtus();
    blueprint.network = network(json!({ "Mode": headers.network }), true);
    blueprint.lab.offloads = offloads.wire;
    blueprint.lab.gro = offloads.gro;
    if offloads.own == Switch::Off {
        let flags = ["--tun-tso", "--tun-uso", "--udp-gso", "--udp-gro"];
        blueprint.flags = flags.map(|flag| format!("{flag}=off")).into();
    }
    let kernels = Kernels {
        mode: Some(headers.kernel),
        ..Kernels::ONE
    };
    let mixed = Mixed::start(blueprint, kernels);
    assert_eq!(usize::from(mixed.overlay.status(1).node.inner_mtu), own_mtu);
    let both = own_mtu.min(kernel_mtu);

    let links = [LINK_MTU, u16::try_from(kernel_mtu).unwrap()];
    let containers = [1, 2].map(|nth| {
        let name = format!("{tag}-{nth}");
        let namespace = mixed.overlay.namespace(nth);
        Pod::behind(namespace, &mixed.subnets(nth), &name, links[nth - 1])
    });
    let nodes = [mixed.pods(1), mixed.pods(2)];
    let fitting: Vec<_> = (both - 3..=both).collect();
    for (from, to) in [(0, 1), (1, 0)] {
        for family in [0, 1] {
            let far = nodes[to][family];
            reach(nodes[from][family], far, &fitting);
            reach(containers[from].ends()[family], far, &fitting);
        }
    }
    for family in [0, 1] {
        let inner = [containers[0].ends()[family], containers[1].ends()[family]];
        let ends = [nodes[0][family], nodes[1][family]];
        too_large(inner[0], ends[1], own_mtu);
        for (from, to) in [(0, 1), (1, 0)] {
            bulk(ends[from], ends[to], 4 << 20);
            bulk(inner[from], inner[to], 2 << 20);
            for payload_bytes in [32, both - 48] {
                datagrams(ends[from], ends[to], payload_bytes);
            }
        }
        // In fragments, which Kersey's side can make.
        for payload_bytes in [own_mtu - 27, own_mtu, 4000] {
            datagrams(ends[0], ends[1], payload_bytes);
        }
        // One family a direction.
        streams(nodes[family][family], nodes[1 - family][family]);
    }
    let whole = mixed.overlay.status(1).counters["inbound_super_packets"];
    figure("super-packets let in", whole);
    assert_eq!(whole > 0, offloads.own == Switch::On);
    // The kernel fragments behind its routing header, where only a kernel with SRv6 on would put the pieces together.
    mixed.assert_sound_but("outer_fragment");
}

/// Echo requests larger than the MTU from a container behind Kersey that may not be fragmented: the first is lost and
/// its sender told. The kernel at the far end cannot answer them, so what is heard is the error alone.
fn too_large(from: End<'_>, to: End<'_>, mtu: usize) {
    let headers = if to.addr.is_ipv4() { 28 } else { 48 };
    for total in mtu + 1..=mtu + 3 {
        let ping = Ping {
            count: 1,
            data_bytes: total - headers,
            interval: Duration::from_millis(1),
            timeout: Duration::from_millis(100),
        };
        let received = ping.run(from, to.addr).unwrap().received;
        // Once told, the sender fragments; the kernel's answer then comes as fragments of an outer packet, or not at all.
        assert!(total > mtu + 1 || received == 0, "{total} bytes");
    }
    let mut command = Command::new("ip");
    command.args(["route", "get", &to.addr.to_string()]);
    let child = from.namespace.spawn(command.stdout(Stdio::piped())).unwrap();
    let known = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    assert!(known.contains(&format!("mtu {mtu}")), "{mtu}: {known}");
}

/// Fifty transfers at once: all finish.
fn streams(from: End<'_>, to: End<'_>) {
    std::thread::scope(|scope| {
        for seed in 0..50 {
            let transfer = Verified {
                bytes: 100_000 + seed,
                seed,
                patience: Duration::from_secs(10),
            };
            scope.spawn(move || {
                let report = transfer.run(from, to).unwrap();
                assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
            });
        }
    });
}
