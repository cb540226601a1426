//! Whole nodes over memory: what comes in and goes out, with and without tunnels.

use std::cell::RefCell;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use kersey::addr::{MacAddr, Mtu, Prefix, Vni};
use kersey::backend::udp::{Udp, UdpHop};
use kersey::backend::vxlan::{Vxlan, VxlanHop};
use kersey::dataplane::Encap;
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::{IngressCheck, flow_hash};
use kersey::dataplane::memory::{MemoryDevice, MemoryUnderlay, Message};
use kersey::dataplane::offload::SuperPacket;
use kersey::dataplane::packet::PacketBatch;
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::{Count, DropReason, PeerStats, WorkerStats};
use kersey::dataplane::worker::{Inbound, InboundOptions, Outbound, Turn};
use kersey::wire::ip::{Addrs, Ecn, Fragment, IpHeader, decrement_ttl, protocol, set_ecn, verify_v4_header};
use kersey::wire::transport::{tcp, tcp_header_len, udp};
use kersey::wire::virtio::{GsoKind, VirtioHeader};
use kersey::wire::vxlan::HEADERS_LEN;

use super::{checksums_hold, mtu};

/// The whole inbound path: `[mode, segment size (2), datagram…]`, as if from peer 1.
///
/// Every packet is delivered or counted; what is delivered came in, less one TTL, between the right addresses.
pub(super) fn udp_decap(data: &[u8]) {
    let Some((&[mode, high, low], datagram)) = data.split_first_chunk::<3>() else {
        return;
    };
    let size = usize::from(u16::from_be_bytes([high, low]));
    let size = if size == 0 { datagram.len() } else { size };
    if datagram.is_empty() || datagram.len() > 65_507 {
        return;
    }
    with_modes(&UDP, mode, |inbound, check, merge| {
        let (delivered, accepted, dropped) = receive(inbound, datagram, size, Ecn::NotEct);
        assert_eq!(
            accepted + dropped,
            datagram.len().div_ceil(size) as u64,
            "every packet is counted once"
        );
        for (_, packet) in &delivered {
            check_delivered(packet, check);
            assert!(IpHeader::parse(packet).expect("a packet").ttl > 0);
        }
        if merge == Merge::NONE {
            assert_eq!(delivered.len() as u64, accepted);
            let mut chunks = datagram.chunks(size);
            for (_, packet) in &delivered {
                assert!(
                    chunks.any(|chunk| is_successor(chunk, packet)),
                    "delivered what did not come in"
                );
            }
        }
    });
}

/// The same for VXLAN: `[mode, outer congestion codepoint, segment size (2), datagram…]`, as if from peer 1.
///
/// What is delivered came in, but for its congestion codepoint and a checksum that was half done; or it is a segment of what came in.
pub(super) fn vxlan_decap(data: &[u8]) {
    let Some((&[mode, ecn, high, low], datagram)) = data.split_first_chunk::<4>() else {
        return;
    };
    let size = usize::from(u16::from_be_bytes([high, low]));
    let size = if size == 0 { datagram.len() } else { size };
    if datagram.is_empty() || datagram.len() > 65_507 {
        return;
    }
    let outer = Ecn::of(ecn);
    with_modes(&VXLAN, mode, |inbound, check, merge| {
        let (delivered, accepted, dropped) = receive(inbound, datagram, size, outer);
        let came = datagram.len().div_ceil(size) as u64;
        if size.min(datagram.len()) <= HEADERS_LEN + usize::from(mtu().bytes()) {
            assert_eq!(accepted + dropped, came, "every packet is counted once");
        } else {
            // A super-packet counts as its segments.
            assert!(accepted + dropped >= came);
        }
        for (header, packet) in &delivered {
            check_delivered(packet, check);
            if let Some(gso) = header.gso {
                let ip = IpHeader::parse(packet).expect("a packet");
                SuperPacket::new(packet, ip, gso).expect("the device is told the truth");
            }
        }
        if merge == Merge::NONE {
            assert_eq!(delivered.len() as u64, accepted);
            let mut chunks = datagram.chunks(size).peekable();
            for (header, packet) in &delivered {
                assert_eq!(*header, VirtioHeader::default());
                let found = loop {
                    match chunks.peek() {
                        Some(chunk) if is_carried(chunk, outer, packet) => break true,
                        Some(_) => drop(chunks.next()),
                        None => break false,
                    }
                };
                assert!(found, "delivered what did not come in");
            }
        }
    });
}

/// One inner packet: what the header parser accepts is consistent, and what the strict check lets in belongs here.
pub(super) fn inner_validate(data: &[u8]) {
    if let Ok(ip) = IpHeader::parse(data) {
        assert!(ip.l4 <= ip.total_len && ip.total_len <= data.len());
        let packet = &data[..ip.total_len];
        match ip.addrs {
            Addrs::V4 { .. } => {
                assert_eq!(ip.l4, usize::from(data[0] & 0xf) * 4);
                assert_eq!(ip.total_len, usize::from(u16::from_be_bytes([data[2], data[3]])));
            }
            Addrs::V6 { .. } => assert!(ip.l4 >= 40 && ip.dont_fragment),
        }
        flow_hash(&ip, packet);
        let mut copy = packet.to_vec();
        let held = ip.l4 < 20 || verify_v4_header(&packet[..ip.l4]);
        match decrement_ttl(&mut copy) {
            Some(left) => {
                assert_eq!(left, ip.ttl - 1);
                let v4 = matches!(ip.addrs, Addrs::V4 { .. });
                assert!(
                    !v4 || verify_v4_header(&copy[..ip.l4]) == held,
                    "a right checksum stays right"
                );
            }
            None => assert!(ip.ttl <= 1 && copy == packet),
        }
    }
    let mut datagram = vec![0, 0, 0];
    datagram.extend_from_slice(data);
    udp_decap(&datagram);
}

/// Any virtio header and packet from the kernel: `[header (10), packet…]`.
///
/// Segments hold all the payload in order, with right lengths and checksums.
pub(super) fn vnet_split(data: &[u8]) {
    let Ok((header, packet)) = VirtioHeader::parse(data) else {
        return;
    };
    if packet.len() > 65_535 {
        return;
    }
    OUTBOUND.with_borrow_mut(|outbound| {
        let (packets, drops) = (
            outbound.stats().counted(Count::OutboundPackets),
            totals(outbound.stats()).1,
        );
        outbound.device().from_host.push_back((header, packet.to_vec()));
        while outbound.turn(start()).expect("memory never fails") == Turn::Busy {}
        outbound.underlay().sent.clear();
        outbound.device().answers.clear();
        let sent = outbound.stats().counted(Count::OutboundPackets) - packets;
        let dropped = totals(outbound.stats()).1 - drops;
        assert!(sent > 0 || dropped == 1, "sent or counted");
    });
    let (Some(gso), Ok(ip)) = (header.gso, IpHeader::parse(packet)) else {
        return;
    };
    let Ok(whole) = SuperPacket::new(packet, ip, gso) else {
        return;
    };
    let header_len = match gso.kind {
        GsoKind::TcpV4 | GsoKind::TcpV6 => {
            ip.l4 + tcp_header_len(&packet[ip.l4..]).expect("checked by SuperPacket")
        }
        GsoKind::Udp => ip.l4 + 8,
    };
    // A megabyte of headers around single bytes is refused, and counted above.
    let Some(segments) = split(&whole, &packet[..ip.total_len]) else {
        return;
    };
    assert_eq!(segments.len(), whole.segments());
    let payload: Vec<u8> = segments
        .iter()
        .flat_map(|segment| segment[header_len..].iter().copied())
        .collect();
    assert!(
        payload == packet[header_len..ip.total_len],
        "all the payload, in order"
    );
    for segment in &segments {
        let parsed = IpHeader::parse(segment).expect("a segment is a packet");
        assert_eq!(parsed.total_len, segment.len());
        assert!(segment.len() <= whole.segment_len());
        assert!(checksums_hold(segment), "checksums of a segment");
    }
}

type MemoryInbound<E> = Inbound<E, MemoryDevice, MemoryUnderlay>;

type MemoryOutbound = Outbound<Udp, MemoryDevice, MemoryUnderlay>;

const MODES: [(IngressCheck, Merge); 4] = [
    (IngressCheck::Strict, Merge { tcp: true, udp: true }),
    (IngressCheck::Strict, Merge::NONE),
    (IngressCheck::Loose, Merge::NONE),
    (IngressCheck::Off, Merge { tcp: true, udp: true }),
];

/// A node in each mode.
type Nodes<E> = std::thread::LocalKey<RefCell<Vec<MemoryInbound<E>>>>;

thread_local! {
    // Made once: their buffers are megabytes.
    static UDP: RefCell<Vec<MemoryInbound<Udp>>> =
        RefCell::new(MODES.map(|mode| inbound(Udp, |_, number| peer(number).hop, mode)).into());
    static VXLAN: RefCell<Vec<MemoryInbound<Vxlan>>> = RefCell::new(MODES.map(|mode| inbound(vxlan(2), vxlan_hop, mode)).into());
    static OUTBOUND: RefCell<MemoryOutbound> = RefCell::new(outbound());
    static BATCH: RefCell<PacketBatch> = RefCell::new(PacketBatch::new());
}

fn with_modes<E: Encap>(
    nodes: &'static Nodes<E>,
    mode: u8,
    then: impl FnOnce(&mut MemoryInbound<E>, IngressCheck, Merge),
) {
    let mode = usize::from(mode % 4);
    nodes.with_borrow_mut(|all| then(&mut all[mode], MODES[mode].0, MODES[mode].1));
}

/// Gives a node a datagram of peer 1, or a run of them: what it delivers, how many packets it accepts, how many it drops.
fn receive<E: Encap>(
    inbound: &mut MemoryInbound<E>,
    datagram: &[u8],
    size: usize,
    ecn: Ecn,
) -> (Vec<(VirtioHeader, Vec<u8>)>, u64, u64) {
    let (packets, drops) = totals(inbound.stats());
    inbound.underlay().incoming.push_back(Message {
        addr: peer_address(1),
        bytes: datagram.to_vec(),
        segment_size: size,
        ecn,
    });
    while inbound.turn(start()).expect("memory never fails") == Turn::Busy {}
    let (packets_after, drops_after) = totals(inbound.stats());
    inbound.device().answers.clear();
    let delivered = std::mem::take(&mut inbound.device().to_host);
    (delivered.into(), packets_after - packets, drops_after - drops)
}

fn inbound<E: Encap>(
    encap: E,
    hop: impl Fn(Prefix, u8) -> E::Hop,
    (check, merge): (IngressCheck, Merge),
) -> MemoryInbound<E> {
    let mut table = RouteTable::new(overlay());
    for number in [1, 3] {
        for prefix in [
            Prefix::V4(format!("10.244.{number}.0/24").parse().expect("a prefix")),
            Prefix::V6(format!("fd00:244:0:{number}::/64").parse().expect("a prefix")),
        ] {
            let peer = Peer {
                hop: hop(prefix, number),
                inner_mtu: mtu(),
                stats: PeerStats::new(1),
            };
            table.insert(prefix, peer);
        }
    }
    let options = InboundOptions {
        check,
        verify_inner: false,
        inner_mtu: mtu(),
        clamp_mss: false,
    };
    let edges = (MemoryDevice::new(merge), MemoryUnderlay::new());
    Inbound::new(
        encap,
        edges,
        SharedRoutes::new(table).reader(),
        (0, Arc::new(WorkerStats::default())),
        options,
        start(),
    )
}

/// The station of node `number`.
fn vxlan(number: u8) -> Vxlan {
    Vxlan {
        vni: Vni::new(1).expect("a VNI"),
        mac: MacAddr::from([0x02, 0x11, 0x22, 0x33, 0x44, number]),
    }
}

fn vxlan_hop(prefix: Prefix, number: u8) -> VxlanHop {
    VxlanHop::new(vxlan(2), prefix, vxlan(number).mac, peer_address(number))
}

/// A node with a route to everywhere and the largest MTU.
fn outbound() -> MemoryOutbound {
    let mut table = RouteTable::new(overlay());
    let wide = |number| Peer {
        inner_mtu: Mtu::new(65_535).expect("an MTU"),
        ..peer(number)
    };
    table.insert(Prefix::V4("0.0.0.0/0".parse().expect("a prefix")), wide(1));
    table.insert(Prefix::V6("::/0".parse().expect("a prefix")), wide(1));
    let edges = (MemoryDevice::new(Merge::NONE), MemoryUnderlay::new());
    Outbound::new(
        Udp,
        edges,
        SharedRoutes::new(table).reader(),
        (0, Arc::new(WorkerStats::default())),
        start(),
    )
}

pub(super) fn overlay() -> Overlay {
    Overlay {
        v4: Some(Network {
            prefix: "10.244.0.0/16".parse().expect("a prefix"),
            subnet_len: 24,
            own: "10.244.2.0/24".parse().expect("a prefix"),
        }),
        v6: Some(Network {
            prefix: "fd00:244::/48".parse().expect("a prefix"),
            subnet_len: 64,
            own: "fd00:244:0:2::/64".parse().expect("a prefix"),
        }),
    }
}

pub(super) fn peer(number: u8) -> Peer<UdpHop> {
    Peer {
        hop: UdpHop(peer_address(number)),
        inner_mtu: mtu(),
        stats: PeerStats::new(1),
    }
}

pub(super) fn peer_address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 8285))
}

/// Accepted packets and drops of all reasons.
fn totals(stats: &WorkerStats) -> (u64, u64) {
    let drops = DropReason::ALL.iter().map(|&reason| stats.dropped(reason)).sum();
    (stats.counted(Count::InboundPackets), drops)
}

/// Checks what the host was given.
fn check_delivered(packet: &[u8], check: IngressCheck) {
    let ip = IpHeader::parse(packet).expect("only packets are delivered");
    assert_eq!(ip.total_len, packet.len());
    assert!(ip.ttl > 0);
    assert!(ip.addrs.src().is_ipv6() || verify_v4_header(&packet[..ip.l4]));
    let (own, leased) = match ip.addrs {
        Addrs::V4 { src, dst } => (
            dst.octets()[..3] == [10, 244, 2],
            matches!(src.octets(), [10, 244, 1 | 3, _]),
        ),
        Addrs::V6 { src, dst } => {
            let subnet = |addr: Ipv6Addr| addr.segments()[..3] == [0xfd00, 0x244, 0];
            let number = |addr: Ipv6Addr| addr.segments()[3];
            (
                subnet(dst) && number(dst) == 2,
                subnet(src) && matches!(number(src), 1 | 3),
            )
        }
    };
    let third = match ip.addrs {
        Addrs::V4 { src, .. } => src.octets()[2] == 3,
        Addrs::V6 { src, .. } => src.segments()[3] == 3,
    };
    let of_node = ip.addrs.src() == peer_address(1).ip();
    match check {
        IngressCheck::Strict => assert!(own && (of_node || (leased && !third))),
        IngressCheck::Loose => assert!(own && (of_node || leased)),
        IngressCheck::Off => {}
    }
}

/// Whether `packet` is what comes of the datagram `chunk`: the same but for one TTL, the header checksum and trailing bytes.
fn is_successor(chunk: &[u8], packet: &[u8]) -> bool {
    let Some(chunk) = chunk.get(..packet.len()) else {
        return false;
    };
    let (ttl, sum) = if packet[0] >> 4 == 4 {
        (8, 10..12)
    } else {
        (7, 0..0)
    };
    let mut before = chunk.to_vec();
    let mut after = packet.to_vec();
    after[ttl] = after[ttl].wrapping_add(1);
    before[sum.clone()].fill(0);
    after[sum].fill(0);
    before == after
}

/// Whether `packet` is what comes of the VXLAN datagram `chunk`: the inner packet with the congestion codepoint that RFC 6040 wants, its
/// checksum finished if it was half done; or a segment of it, if it is TCP and longer than the MTU.
fn is_carried(chunk: &[u8], outer: Ecn, packet: &[u8]) -> bool {
    let Some(Ok(ip)) = chunk.get(HEADERS_LEN..).map(IpHeader::parse) else {
        return false;
    };
    let mut before = chunk[HEADERS_LEN..][..ip.total_len].to_vec();
    let Some(ecn) = Ecn::of(ip.tos).after(outer) else {
        return false;
    };
    set_ecn(&mut before, ecn);
    if before == packet {
        return true;
    }
    let at = match (ip.protocol, ip.fragment) {
        (protocol::TCP, Fragment::Whole) => ip.l4 + tcp::CHECKSUM.start,
        (protocol::UDP, Fragment::Whole) => ip.l4 + udp::CHECKSUM.start,
        _ => return false,
    };
    if !checksums_hold(packet) {
        return false;
    }
    if before.len() == packet.len() {
        let half = before[at..at + 2] == ip.pseudo(ip.l4_len()).fold().to_be_bytes();
        before[at..at + 2].copy_from_slice(&packet[at..at + 2]);
        return half && before == packet;
    }
    let long = ip.protocol == protocol::TCP && ip.total_len > usize::from(mtu().bytes());
    let Some(Ok(header_len)) = long.then(|| tcp_header_len(&before[ip.l4..]).map(|len| ip.l4 + len)) else {
        return false;
    };
    let seq = |packet: &[u8]| {
        let field = packet[ip.l4..][tcp::SEQ].try_into().expect("4 bytes");
        u32::from_be_bytes(field)
    };
    let offset = seq(packet).wrapping_sub(seq(&before)) as usize;
    let payload = &packet[header_len..];
    before[header_len..].get(offset..offset + payload.len()) == Some(payload)
}

/// Splits a super-packet: read in one piece, brought into shape, and cut where its segments end.
pub(super) fn split(whole: &SuperPacket, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    BATCH.with_borrow_mut(|batch| {
        batch.clear();
        assert!(batch.push(VirtioHeader::default(), packet), "one packet fits");
        let shape = whole.shape(0);
        let meta = batch.shape(Some(shape))?;
        let bytes = batch.segments_mut(meta, 0);
        whole.split(bytes, 0, |_, _| ());
        Some(bytes.chunks(shape.stride()).map(<[u8]>::to_vec).collect())
    })
}

/// No target depends on the time; it only has to be one.
#[expect(clippy::disallowed_methods, reason = "an Instant cannot be made otherwise")]
fn start() -> Instant {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *START
}
