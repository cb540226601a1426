//! What the kernel's vxlan device put on a wire (`golden/vxlan-*.pcap`): we read it, and we would have sent the same bytes.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "golden/capture.rs"]
mod capture;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use kersey::addr::{MacAddr, Mtu, Prefix, Vni};
use kersey::backend::vxlan::{DEFAULT_PORT, OVERHEAD_V4, OVERHEAD_V6, Vxlan, VxlanHop};
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::{MemoryDevice, MemoryUnderlay, Message};
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::{Count, DropReason, PeerStats, WorkerStats};
use kersey::dataplane::worker::{Inbound, InboundOptions, Outbound};
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Addrs, Ecn, IpHeader, verify_v4_header};
use kersey::wire::transport::tcp;
use kersey::wire::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};
use kersey::wire::vxlan::{HEADERS_LEN, VxlanHeader};

use crate::capture::Datagram;

const OVER_V4: &[u8] = include_bytes!("golden/vxlan-v4.pcap");
const OVER_V6: &[u8] = include_bytes!("golden/vxlan-v6.pcap");
const SUPER_PACKET: &[u8] = include_bytes!("golden/vxlan-v4-gso.pcap");
const ARP: &[u8] = include_bytes!("golden/vxlan-v4-arp.pcap");

const MERGE: Merge = Merge { tcp: true, udp: true };
/// IPv4 header, TCP header with time stamps.
const TCP_HEADERS: usize = 20 + 32;

#[test]
fn the_captures_are_what_their_description_says() {
    for capture in [OVER_V4, OVER_V6] {
        let datagrams = capture::datagrams(capture);
        assert_eq!(datagrams.len(), 14);
        for datagram in &datagrams {
            assert_eq!(datagram.to.port(), DEFAULT_PORT);
            let header = VxlanHeader::parse(&datagram.payload).unwrap();
            assert_eq!(header.vni, Some(Vni::new(1).unwrap()));
            assert_eq!((header.src, header.dst), (mac(datagram.from), mac(datagram.to)));
            let inner = inner(datagram);
            assert_eq!(inner.total_len, datagram.payload.len() - HEADERS_LEN);
        }
        for echo in &datagrams[4..6] {
            assert_eq!((inner(echo).tos, echo.tos), (0xb9, 0x01));
        }
        assert!(matches!(inner(&datagrams[2]).addrs, Addrs::V6 { .. }));
        assert!(datagrams[9].payload.ends_with(b"hello"));
    }
}

#[test]
fn what_the_kernel_sent_is_delivered_untouched() {
    each_packet(|what, datagram| {
        let mut node = inbound(&datagram, MERGE);
        let delivered = receive(&mut node, &datagram);
        assert_eq!(delivered.len(), 1, "{what}");
        let (header, packet) = &delivered[0];
        assert_eq!(*header, VirtioHeader::default(), "{what}");
        // TTL, type of service and checksums included.
        assert_eq!(packet, &datagram.payload[HEADERS_LEN..], "{what}");
        assert_eq!(drops(node.stats()), [], "{what}");
    });
}

#[test]
fn what_we_send_is_byte_for_byte_what_the_kernel_sent() {
    each_packet(|what, datagram| {
        let routes = routes(datagram.from, datagram.to);
        let stats = (0, Arc::new(WorkerStats::default()));
        let mut outbound = Outbound::new(own(datagram.from), edges(MERGE), routes.reader(), stats, now());
        let packet = datagram.payload[HEADERS_LEN..].to_vec();
        let host = &mut outbound.device().from_host;
        host.push_back((VirtioHeader::default(), packet));
        outbound.turn(now()).unwrap();
        let sent = std::mem::take(&mut outbound.underlay().sent);
        assert_eq!(sent, [message(&datagram, datagram.to)], "{what}");
        assert_eq!(
            datagram.checksum_over(&sent[0].bytes),
            datagram.checksum,
            "{what}: the outer checksum"
        );
        assert_eq!(
            sent[0].ecn as u8, datagram.tos,
            "{what}: the outer type of service"
        );
    });
}

#[test]
fn a_super_packet_is_delivered_whole_with_its_checksum_left_to_the_device() {
    let datagram = super_packet();
    let mut node = inbound(&datagram, MERGE);
    let delivered = receive(&mut node, &datagram);
    assert_eq!(delivered.len(), 1);
    let (header, packet) = &delivered[0];
    let expected = VirtioHeader {
        checksum: Some(PartialChecksum {
            start: 20,
            offset: 16,
        }),
        gso: Some(Gso {
            kind: GsoKind::TcpV4,
            size: 1450 - TCP_HEADERS as u16,
            header_len: TCP_HEADERS as u16,
        }),
    };
    assert_eq!(*header, expected);
    // The device in memory has finished the checksum; all else is as it came.
    let checksum = 20 + tcp::CHECKSUM.start..20 + tcp::CHECKSUM.end;
    let mut came = datagram.payload[HEADERS_LEN..].to_vec();
    came[checksum.clone()].copy_from_slice(&packet[checksum]);
    assert_eq!(packet, &came);
    assert!(checksums_hold(packet));
    assert_eq!(node.stats().counted(Count::InboundPackets), 3);
    assert_eq!(node.stats().counted(Count::InboundSuperPackets), 1);
}

#[test]
fn a_super_packet_for_a_device_that_takes_none_comes_out_as_segments() {
    let datagram = super_packet();
    let payload = &datagram.payload[HEADERS_LEN + TCP_HEADERS..];
    for (what, merge, refuses) in [
        ("no headers", Merge::NONE, vec![]),
        ("refused", MERGE, vec![GsoKind::TcpV4]),
    ] {
        let mut node = inbound(&datagram, merge);
        node.device().refuses = refuses;
        let delivered = receive(&mut node, &datagram);
        let lengths: Vec<_> = delivered.iter().map(|(_, packet)| packet.len()).collect();
        assert_eq!(lengths, [1450, 1450, 4096 - 2 * 1398 + TCP_HEADERS], "{what}");
        let mut seq = 1_167_583_650;
        let mut carried = Vec::new();
        for (header, packet) in &delivered {
            assert_eq!(*header, VirtioHeader::default(), "{what}");
            assert!(checksums_hold(packet), "{what}");
            assert_eq!(packet[20..][tcp::SEQ], u32::to_be_bytes(seq), "{what}");
            let part = &packet[TCP_HEADERS..];
            seq += part.len() as u32;
            carried.extend_from_slice(part);
        }
        assert_eq!(carried, payload, "{what}");
        assert_eq!(drops(node.stats()), [], "{what}");
    }
}

#[test]
fn arp_is_dropped_under_its_own_reason_and_never_answered() {
    let datagrams = capture::datagrams(ARP);
    // A request is for everybody, and does not get as far as its type.
    let reasons = [DropReason::OtherStation, DropReason::NotIp];
    assert_eq!(datagrams.len(), reasons.len());
    for (datagram, reason) in datagrams.into_iter().zip(reasons) {
        assert_eq!(VxlanHeader::parse(&datagram.payload).unwrap().ethertype, 0x0806);
        let mut node = inbound(&datagram, MERGE);
        assert_eq!(receive(&mut node, &datagram), []);
        assert_eq!(drops(node.stats()), [(reason, 1)]);
        assert_eq!(node.device().answers, Vec::<Vec<u8>>::new());
    }
}

/// Runs a test over every packet of the plain captures.
fn each_packet(mut test: impl FnMut(&str, Datagram)) {
    for (name, capture) in [("v4", OVER_V4), ("v6", OVER_V6)] {
        for (index, datagram) in capture::datagrams(capture).into_iter().enumerate() {
            test(&format!("vxlan-{name}.pcap packet {}", index + 1), datagram);
        }
    }
}

fn super_packet() -> Datagram {
    let mut datagrams = capture::datagrams(SUPER_PACKET);
    let datagram = datagrams.pop().unwrap();
    assert!(datagrams.is_empty());
    assert_eq!(
        datagram.checksum, datagram.pseudo,
        "the outer checksum is unfinished too"
    );
    datagram
}

type MemoryInbound = Inbound<Vxlan, MemoryDevice, MemoryUnderlay>;

/// The node a datagram was sent to.
fn inbound(datagram: &Datagram, merge: Merge) -> MemoryInbound {
    let options = InboundOptions {
        check: IngressCheck::Strict,
        clamp_mss: false,
        verify_inner: false,
        inner_mtu: mtu(datagram.to),
    };
    let routes = routes(datagram.to, datagram.from);
    let stats = (0, Arc::new(WorkerStats::default()));
    Inbound::new(
        own(datagram.to),
        edges(merge),
        routes.reader(),
        stats,
        options,
        now(),
    )
}

fn receive(node: &mut MemoryInbound, datagram: &Datagram) -> Vec<(VirtioHeader, Vec<u8>)> {
    let message = message(datagram, datagram.from);
    node.underlay().incoming.push_back(message);
    node.turn(now()).unwrap();
    node.device().to_host.drain(..).collect()
}

fn message(datagram: &Datagram, addr: SocketAddr) -> Message {
    Message {
        addr,
        bytes: datagram.payload.clone(),
        segment_size: datagram.payload.len(),
        ecn: Ecn::of(datagram.tos),
    }
}

/// The inner header of a datagram.
fn inner(datagram: &Datagram) -> IpHeader {
    IpHeader::parse(&datagram.payload[HEADERS_LEN..]).unwrap()
}

/// The number of a node, by its underlay address.
fn number(node: SocketAddr) -> u8 {
    match node.ip() {
        IpAddr::V4(addr) => addr.octets()[3],
        IpAddr::V6(addr) => addr.octets()[15],
    }
}

fn mac(node: SocketAddr) -> MacAddr {
    [0x02, 0x11, 0x22, 0x33, 0x44, number(node)].into()
}

fn own(node: SocketAddr) -> Vxlan {
    Vxlan {
        vni: Vni::new(1).unwrap(),
        mac: mac(node),
    }
}

fn mtu(node: SocketAddr) -> Mtu {
    let overhead = if node.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 };
    Mtu::new(u32::from(1500 - overhead)).unwrap()
}

/// The routes of the node `ours`, which knows `theirs`.
fn routes(ours: SocketAddr, theirs: SocketAddr) -> SharedRoutes<VxlanHop> {
    let v4 = |node| format!("10.244.{}.0/24", number(node)).parse().unwrap();
    let v6 = |node| format!("fd00:244:{}::/64", number(node)).parse().unwrap();
    let mut table = RouteTable::new(Overlay {
        v4: Some(Network {
            prefix: "10.244.0.0/16".parse().unwrap(),
            subnet_len: 24,
            own: v4(ours),
        }),
        v6: Some(Network {
            prefix: "fd00:244::/32".parse().unwrap(),
            subnet_len: 64,
            own: v6(ours),
        }),
    });
    let endpoint = SocketAddr::new(theirs.ip(), DEFAULT_PORT);
    for prefix in [Prefix::V4(v4(theirs)), Prefix::V6(v6(theirs))] {
        let peer = Peer {
            hop: VxlanHop::new(own(ours), prefix, mac(theirs), endpoint),
            inner_mtu: mtu(ours),
            stats: PeerStats::new(1),
        };
        table.insert(prefix, peer);
    }
    SharedRoutes::new(table)
}

fn edges(merge: Merge) -> (MemoryDevice, MemoryUnderlay) {
    (MemoryDevice::new(merge), MemoryUnderlay::new())
}

fn drops(stats: &WorkerStats) -> Vec<(DropReason, u64)> {
    let all = DropReason::ALL.iter();
    all.map(|&reason| (reason, stats.dropped(reason)))
        .filter(|&(_, n)| n > 0)
        .collect()
}

/// Whether header and TCP checksums are right, each summed anew.
fn checksums_hold(packet: &[u8]) -> bool {
    let ip = IpHeader::parse(packet).unwrap();
    let l4 = &packet[ip.l4..ip.total_len];
    verify_v4_header(&packet[..ip.l4]) && (ip.pseudo(l4.len()) + Sum::of(l4)).fold() == 0xffff
}

#[expect(
    clippy::disallowed_methods,
    reason = "nothing here depends on what time it is"
)]
fn now() -> Instant {
    Instant::now()
}
