//! A node of the kernel's with a router behind it, to which it hands all that leaves the tunnel: End.DX4 and End.DX6 with a
//! next hop, and `encap seg6` for what the router sends.
//!
//! ```text
//!   node 1, Kersey                     node 2, the kernel's              router
//!   pod addresses ─ flannel0 ····· eth0 ::4, ::d6    ce ───────── eth0    .9 of node 2's subnets, on lo
//!                                  198.51.100.1, 2001:db8:dc::1   198.51.100.2, 2001:db8:dc::2
//! ```
//!
//! By node 2's routes its own subnets are behind its default gateway, so what gets to the router went by the segment's next hop.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kersey::host::netlink::Seg6Mode;
use kersey::lab::netns::Namespace;
use kersey::lab::seg6_node::Form;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::wire::ip::V6_LEN;
use kersey::wire::srv6::next_header;
use serde_json::json;

use crate::behaviors::ip;
use crate::hostile::packets::sid;
use crate::mixed::{Kernels, Mixed, bulk, datagrams, network, reach};
use crate::overlay::{Blueprint, figure};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

/// Bytes of a transfer.
const TRANSFER: u64 = 4 << 20;

/// Where the router is for node 2.
const NEXT_HOP: Form = Form::CrossConnect {
    v4: Ipv4Addr::new(198, 51, 100, 2),
    v6: Ipv6Addr::new(0x2001, 0xdb8, 0xdc, 0, 0, 0, 0, 2),
};

#[test]
fn a_kernel_hands_what_kersey_sends_to_a_next_hop() {
    if !require_etcd("a_kernel_hands_what_kersey_sends_to_a_next_hop") {
        return;
    }
    for (name, mode, mtu) in [
        ("reduced", Seg6Mode::EncapRed, 1460),
        ("full", Seg6Mode::Encap, 1436),
    ] {
        let tag = format!("s-kd{}", &name[..1]);
        let mut blueprint = Blueprint::new(&tag, 2);
        blueprint.network = network(json!({ "Mode": name }), true);
        let kernels = Kernels {
            form: NEXT_HOP,
            mode: Some(mode),
            ..Kernels::ONE
        };
        let mixed = Mixed::start(blueprint, kernels);
        let behind = mixed
            .pods(2)
            .iter()
            .map(|pod| seventh_after(pod.addr))
            .collect::<Vec<_>>();
        let router = router(&mixed, &tag, &behind, mtu);
        for &addr in &behind {
            let node = mixed.overlay.namespace(2);
            let routed = node.netlink(async |netlink| {
                let underlay = netlink.link(INTERFACE).await?.index;
                Ok(netlink.route_to(addr).await?.index == underlay)
            });
            assert!(
                routed.unwrap(),
                "without the segment, {addr} is not behind the node"
            );
        }

        for (family, segment, inner) in [(0, "4", next_header::IPV4), (1, "d6", next_header::IPV6)] {
            let (near, far) = (mixed.pods(1)[family], End::new(&router, behind[family]));
            let header = if name == "full" {
                next_header::ROUTING
            } else {
                inner
            };
            for (from, to, path, ways) in [
                (near, far, [sid(1, "1"), sid(2, segment)], [Way::Out, Way::In]),
                (far, near, [sid(2, "1"), sid(1, "1")], [Way::In, Way::Out]),
            ] {
                let what = format!("{name}, {path:?}");
                reach(from, to, &[84, mtu - 1, mtu]);
                let outside = Sniffer::start(mixed.overlay.namespace(1), INTERFACE);
                let behind = Sniffer::start(&router, INTERFACE);
                bulk(from, to, TRANSFER);
                let path = path.map(|addr| addr.octets()).concat();
                let outer = outside.packets().into_iter().filter(|(way, packet)| {
                    *way == ways[0] && packet[0] >> 4 == 6 && packet[8..V6_LEN] == path
                });
                let outer: Vec<_> = outer.map(|(_, packet)| packet).collect();
                let headers: BTreeSet<_> = outer.iter().map(|packet| packet[6]).collect();
                assert_eq!(headers, BTreeSet::from([header]), "{what}");
                let inner = behind.packets().into_iter().filter(|(way, _)| *way == ways[1]);
                let inner: Vec<_> = inner.map(|(_, packet)| packet).collect();
                for (place, packets) in [("outside", outer), ("at the router", inner)] {
                    let bytes: usize = packets.iter().map(Vec::len).sum();
                    figure(&format!("{what}: bytes {place}"), bytes);
                    assert!(bytes as u64 > TRANSFER, "{what}: {bytes} bytes {place}");
                }
                for payload_bytes in [32, mtu - 48] {
                    datagrams(from, to, payload_bytes);
                }
            }
        }
        mixed.assert_sound();
    }
}

/// A namespace behind node 2 with these addresses. Nobody there is told of an MTU, so the link has the inner one.
fn router(mixed: &Mixed, tag: &str, addrs: &[IpAddr], mtu: usize) -> Namespace {
    let router = Namespace::create(&format!("kersey-{}-{tag}-ce", std::process::id())).unwrap();
    let node = mixed.overlay.namespace(2);
    ip(
        node,
        &format!(
            "link add ce type veth peer name {INTERFACE} netns {}",
            router.name()
        ),
    );
    for (namespace, link, low) in [(node, "ce", 1), (&router, INTERFACE, 2)] {
        ip(namespace, &format!("link set {link} mtu {mtu} up"));
        ip(namespace, &format!("addr add 198.51.100.{low}/24 dev {link}"));
        ip(
            namespace,
            &format!("addr add 2001:db8:dc::{low}/64 dev {link} nodad"),
        );
    }
    ip(&router, "link set lo up");
    for addr in addrs {
        ip(&router, &format!("addr add {addr} dev lo"));
    }
    ip(&router, "route add default via 198.51.100.1");
    ip(&router, "-6 route add default via 2001:db8:dc::1");
    router
}

fn seventh_after(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(addr) => Ipv4Addr::from_bits(addr.to_bits() + 7).into(),
        IpAddr::V6(addr) => Ipv6Addr::from_bits(addr.to_bits() + 7).into(),
    }
}
