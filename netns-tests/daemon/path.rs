//! A path that narrows in the middle: nothing falls into a hole, and senders learn what fits.
//!
//! ```text
//!   node 1 ─ 1500 ─ node 3 ─ 1400 ─ node 4 ─ 1500 ─ node 2
//! ```
//!
//! Nodes 3 and 4 are routers of the underlay; daemons run on 1 and 2.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use etherparse::PacketBuilder;
use kersey::addr::{Ipv4Prefix, Ipv6Prefix, Prefix};
use kersey::host::netlink::{Gateway, Route};
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;
use socket2::{Domain, Protocol, Socket, Type};

use crate::overlay::{Blueprint, Overlay, READY, Underlay, figure, within};
use crate::support::{require_etcd, require_root};

/// What the link in the middle carries.
const NARROW: u16 = 1400;
/// IPv4 and ICMP echo headers.
const HEADERS: usize = 28;

#[test]
fn udp_learns_the_path() {
    if require_root("udp_learns_the_path") {
        learns(Blueprint::embedded("p-udp", 4), "udp", &[], 28);
    }
}

#[test]
fn vxlan_over_ipv6_learns_the_path() {
    if require_etcd("vxlan_over_ipv6_learns_the_path") {
        let mut blueprint = Blueprint::new("p-v6", 4);
        blueprint.underlay = Underlay::V6Only;
        learns(blueprint, "vxlan", &[], 70);
    }
}

#[test]
fn vxlan_with_df_set_learns_the_path() {
    if require_root("vxlan_with_df_set_learns_the_path") {
        learns(Blueprint::embedded("p-set", 4), "vxlan", &["--outer-df=set"], 50);
    }
}

#[test]
fn vxlan_with_df_clear_is_fragmented_on_its_way() {
    if require_root("vxlan_with_df_clear_is_fragmented_on_its_way") {
        let overlay = narrowed(Blueprint::embedded("p-clear", 4), "vxlan", &[]);
        // Routers fragment, so whatever fits the overlay arrives at once.
        let ping = Ping {
            count: 3,
            data_bytes: 1450 - HEADERS,
            ..Ping::default()
        };
        assert!(ping.run(overlay.pod(1), overlay.pod(2).addr).unwrap().all());
        transfer(&overlay);
        for nth in [1, 2] {
            assert_eq!(overlay.status(nth).peers[0].narrow_mtu, None, "node {nth}");
            overlay.assert_no_drops(nth);
        }
    }
}

#[test]
fn clamped_segments_fit_where_no_answer_arrives() {
    if require_root("clamped_segments_fit_where_no_answer_arrives") {
        let mut overlay = narrowed(
            Blueprint::embedded("p-mss", 4),
            "vxlan",
            &["--outer-df=set", "--clamp-mss"],
        );
        // Once the path is known, new connections announce what fits it, and no segment of theirs is ever too large.
        learnt(&mut overlay, 50);
        let before = [1, 2].map(|nth| overlay.status(nth).counters["path_too_big"]);
        transfer(&overlay);
        for (nth, before) in (1..).zip(before) {
            let status = overlay.status(nth);
            assert_eq!(status.counters["path_too_big"], before, "node {nth}");
        }
    }
}

/// S6: who is not asked says "too big". What is believed has a floor, and packets still pass.
#[test]
fn a_forged_too_big_makes_no_path_narrower_than_the_floor() {
    if !require_root("a_forged_too_big_makes_no_path_narrower_than_the_floor") {
        return;
    }
    // The kernel believes no less than 552 bytes outside (net/ipv4/route.c), and inner senders are told of no less than this.
    const FLOOR: u16 = 576;
    let mut blueprint = Blueprint::embedded("p-forged", 3);
    blueprint.daemons = 2;
    blueprint.network = ClusterPlan::network("udp", true);
    let mut overlay = blueprint.start();
    let (one, two) = (overlay.lab.nodes[0].v4, overlay.lab.nodes[1].v4);
    let stranger = overlay.namespace(3);
    let forge = |ports: [u16; 2]| {
        let socket = stranger
            .run(|| Ok(Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?))
            .unwrap();
        for mtu in [0, 1, 67, 68, 100, 551] {
            let message = too_big(mtu, [one, two], ports);
            socket
                .send_to(&message, &SocketAddr::from((one, 0)).into())
                .unwrap();
        }
    };
    // Of a flow that node 1 does not have: nobody listens, and nothing changes.
    forge([40_000, 40_001]);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(overlay.status(1).peers[0].narrow_mtu, None);
    // Of the tunnel itself: a stranger who knows its port can have that done.
    forge([8285, 8285]);
    let mut narrowest = None;
    for _ in 0..12 {
        std::thread::sleep(Duration::from_secs(1));
        narrowest = overlay.status(1).peers[0].narrow_mtu.or(narrowest);
        if let Some(mtu) = narrowest {
            assert!(mtu >= FLOOR, "{mtu}");
        }
    }
    figure("after forged answers the path carries, inside", narrowest);
    assert!(
        narrowest.is_some(),
        "no forged answer was believed: this tests nothing"
    );
    transfer(&overlay);
    overlay.ping_all();
    overlay.wait(1, READY, |status| status.ready);
}

/// "Fragmentation needed" about a UDP datagram (RFC 792, RFC 1191 §4).
fn too_big(mtu: u16, [from, to]: [Ipv4Addr; 2], ports: [u16; 2]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(from.octets(), to.octets(), 64).udp(ports[0], ports[1]);
    let mut quoted = Vec::new();
    builder.write(&mut quoted, &[0; 1400]).unwrap();
    quoted.truncate(28);
    let mut message = vec![3, 4, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend(quoted);
    let sum = message
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// Both ends find out, tell their senders, and bulk transfers pass meanwhile and afterwards.
fn learns(blueprint: Blueprint, backend: &str, flags: &[&str], overhead: u16) {
    let mut overlay = narrowed(blueprint, backend, flags);
    transfer(&overlay);
    learnt(&mut overlay, overhead);
    let inner = usize::from(NARROW - overhead);
    for (from, to) in [(1, 2), (2, 1)] {
        for total in inner - 2..=inner + 2 {
            let ping = Ping {
                count: 2,
                data_bytes: total - HEADERS,
                ..Ping::default()
            };
            let report = ping.run(overlay.pod(from), overlay.pod(to).addr).unwrap();
            // DF is set: the first that is too large is lost and teaches its sender, who fragments from then on.
            let lost = report.sent - report.received;
            assert!(
                lost <= u16::from(total > inner),
                "{from} to {to}, {total} bytes: {report:?}"
            );
        }
    }
    let before = [1, 2].map(|nth| overlay.status(nth).counters["path_too_big"]);
    transfer(&overlay);
    for (nth, before) in (1..).zip(before) {
        let after = overlay.status(nth).counters["path_too_big"];
        assert_eq!(after, before, "node {nth}: what is known is never tried again");
    }
}

/// Waits until both nodes know the path, sending what is too large for it until then.
fn learnt(overlay: &mut Overlay, overhead: u16) {
    let expected = Some(NARROW - overhead);
    for (from, to) in [(1, 2), (2, 1)] {
        let ping = Ping {
            count: 2,
            data_bytes: usize::from(NARROW),
            ..Ping::default()
        };
        ping.run(overlay.pod(from), overlay.pod(to).addr).unwrap();
        overlay.wait(from, within(Duration::from_secs(12)), |status| {
            status.peers[0].narrow_mtu == expected
        });
    }
}

fn transfer(overlay: &Overlay) {
    let transfer = Verified {
        bytes: 4 << 20,
        seed: 7,
        patience: Duration::from_secs(10),
    };
    for (from, to) in [(1, 2), (2, 1)] {
        let report = transfer.run(overlay.pod(from), overlay.pod(to)).unwrap();
        assert!(report.intact, "{from} to {to}: {report:?}");
    }
}

/// Starts two daemons with the narrow path between them.
fn narrowed(mut blueprint: Blueprint, backend: &str, flags: &[&str]) -> Overlay {
    blueprint.daemons = 2;
    blueprint.network = ClusterPlan::network(backend, false);
    blueprint.flags = flags.iter().map(ToString::to_string).collect();
    let mut overlay = blueprint.build();
    narrow(&overlay);
    overlay.start_daemons();
    overlay
}

fn narrow(overlay: &Overlay) {
    let [left, right] = [3, 4].map(|nth| overlay.namespace(nth));
    left.netlink(async |netlink| {
        Ok(netlink
            .add_veth("mid", "mid", Some(right.open()?.as_fd()))
            .await?)
    })
    .unwrap();
    let middle = |low: u8| {
        let v4: IpAddr = [10, 255, 0, low].into();
        let v6: IpAddr = [0xfd55, 0, 0, 0, 0, 0, 0, u16::from(low)].into();
        [(v4, 30), (v6, 64)]
    };
    for (namespace, low) in [(left, 1), (right, 2)] {
        namespace.sysctl("ipv4/ip_forward", "1").unwrap();
        namespace.sysctl("ipv6/conf/all/forwarding", "1").unwrap();
        namespace
            .netlink(async |netlink| {
                let index = netlink.link("mid").await?.index;
                netlink.set_mtu(index, NARROW.into()).await?;
                netlink.set_up(index).await?;
                for (addr, len) in middle(low) {
                    netlink.add_address(index, addr, len).await?;
                }
                Ok(())
            })
            .unwrap();
    }
    // (on, by, towards, through)
    for (on, link, to, via) in [
        (1, INTERFACE, 2, 3),
        (3, "mid", 2, 0),
        (2, INTERFACE, 1, 4),
        (4, "mid", 1, 0),
    ] {
        let node = |nth: usize| {
            let node = &overlay.lab.nodes[nth - 1];
            [IpAddr::from(node.v4), IpAddr::from(node.v6)]
        };
        let next = match via {
            0 => middle(if on == 3 { 2 } else { 1 }).map(|(addr, _)| addr),
            via => node(via),
        };
        overlay
            .namespace(on)
            .netlink(async |netlink| {
                let index = netlink.link(link).await?.index;
                for (to, next) in node(to).into_iter().zip(next) {
                    let mut route = Route::direct(host(to), index);
                    route.gateway = Gateway::Via(next);
                    // A node of an underlay without IPv4 has no way there.
                    let _ = netlink.replace_route(&route).await;
                }
                Ok(())
            })
            .unwrap();
    }
}

fn host(addr: IpAddr) -> Prefix {
    match addr {
        IpAddr::V4(addr) => Ipv4Prefix::new(addr, 32).unwrap().into(),
        IpAddr::V6(addr) => Ipv6Prefix::new(addr, 128).unwrap().into(),
    }
}
