//! The bodies of the fuzz targets: what must hold for any bytes at all.
//!
//! The fuzzer's binaries and the replay of the corpora (`tests/fuzz_corpus.rs`) both include this file.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use etherparse::PacketBuilder;
use kersey::addr::{Ipv4Prefix, Ipv6Prefix, MacAddr, Mtu, Prefix, Vni};
use kersey::backend::udp::{Udp, UdpHop};
use kersey::backend::vxlan::{Vxlan, VxlanHop};
use kersey::control::config::NetworkConfig;
use kersey::control::subnet_file::{self, IpMasq};
use kersey::dataplane::Encap;
use kersey::dataplane::coalesce::{Coalescer, MAX_SLICES, Merge, Offer, Trust};
use kersey::dataplane::endpoint::{
    Answer, Arrived, Behavior, Domain, Flavors, HmacCheck, HmacPolicy, LocalSid, LocalSids, Verdict, advance,
    build_error, decapsulate,
};
use kersey::dataplane::forward::{IngressCheck, flow_hash};
use kersey::dataplane::memory::{MemoryDevice, MemoryUnderlay, Message};
use kersey::dataplane::offload::SuperPacket;
use kersey::dataplane::packet::PacketBatch;
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::{Count, DropReason, PeerStats, WorkerStats};
use kersey::dataplane::worker::{Inbound, InboundOptions, Outbound, Turn};
use kersey::lease::{LeaseAttrs, Subnet};
use kersey::wire::checksum::{Sum, replace_word};
use kersey::wire::icmp::{self, IcmpError};
use kersey::wire::ip::{
    Addrs, Ecn, Fragment, IpHeader, Scope, decrement_ttl, protocol, scope, set_ecn, verify_v4_header,
};
use kersey::wire::srv6::{
    CsidFormat, HmacAlgorithm, HmacKey, OuterHeader, SEGMENTS_LEFT_AT, Srh, next_header, walk,
};
use kersey::wire::transport::{tcp, tcp_header_len, udp};
use kersey::wire::virtio::{GsoKind, VirtioHeader};
use kersey::wire::vxlan::HEADERS_LEN;

/// A target.
pub(crate) type Target = fn(&[u8]);

/// All targets by name.
pub(crate) const TARGETS: &[(&str, Target)] = &[
    ("udp_decap", udp_decap),
    ("vxlan_decap", vxlan_decap),
    ("srh_walk", srh_walk),
    ("srv6_decap", srv6_decap),
    ("inner_validate", inner_validate),
    ("vnet_split", vnet_split),
    ("gro_coalesce", gro_coalesce),
    ("checksum", checksum),
    ("icmp_reply", icmp_reply),
    ("route_table", route_table),
    ("lease_key", lease_key),
    ("lease_value", lease_value),
    ("net_config", net_config),
    ("subnet_env", subnet_env),
];

/// Runs a target by name; an unknown name is a mistake in the caller.
pub(crate) fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    target.expect("a target of this name").1(data);
}

/// The whole inbound path: `[mode, segment size (2), datagram…]`, as if from peer 1.
///
/// Every packet is delivered or counted; what is delivered came in, less one TTL, between the right addresses.
fn udp_decap(data: &[u8]) {
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
fn vxlan_decap(data: &[u8]) {
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

/// The headers of an outer packet: `[next header, payload…]`. What is found lies within the payload, and the list within its header.
fn srh_walk(data: &[u8]) {
    if let Ok((header, payload)) = OuterHeader::parse(data) {
        let len = u16::try_from(payload.len()).expect("a length field has 16 bits");
        assert_eq!(header.emit(len), data[..40]);
    }
    let Some((&first, payload)) = data.split_first() else {
        return;
    };
    if let Ok(srh) = Srh::parse(payload) {
        check_srh(&srh, payload);
    }
    match walk(first, payload) {
        Ok(chain) => {
            assert!(chain.upper_at <= payload.len());
            let Some(found) = chain.srh else {
                assert!(chain.upper != next_header::ROUTING);
                return;
            };
            let bytes = &payload[found.at..];
            assert_eq!(Srh::parse(bytes), Ok(found.srh));
            check_srh(&found.srh, bytes);
            let named = found.named_at.map_or(first, |at| payload[at]);
            assert_eq!(named, next_header::ROUTING);
            assert!(found.at + found.srh.len() <= chain.upper_at);
            if found.srh.segments_left() > 0 {
                assert_eq!(found.at + found.srh.len(), chain.upper_at);
            }
        }
        Err(error) => assert!(error.at <= payload.len()),
    }
}

/// What any accepted routing header keeps to.
fn check_srh(srh: &Srh<'_>, bytes: &[u8]) {
    assert!(srh.len() <= bytes.len());
    assert!(srh.segments_left() <= srh.last_entry().saturating_add(1));
    let list = 16 * (usize::from(srh.last_entry()) + 1);
    for index in 0..=srh.last_entry() {
        let at = 8 + 16 * usize::from(index);
        let sid: [u8; 16] = bytes[at..at + 16].try_into().expect("16 bytes");
        assert_eq!(srh.segment(index), Some(sid.into()));
    }
    assert_eq!(
        srh.segment(srh.last_entry().saturating_add(1)).is_some(),
        srh.last_entry() == 255
    );
    let tlvs: usize = srh
        .tlvs()
        .map(|tlv| tlv.expect("checked when parsed"))
        .map(|tlv| if tlv.kind == 0 { 1 } else { 2 + tlv.value.len() })
        .sum();
    assert_eq!(8 + list + tlvs, srh.len(), "list and TLVs are all there is");
}

/// A packet at our SIDs: `[mode, SID, hop limit, next header, payload…]`; SID 255 stands for 16 bytes of destination before the payload.
///
/// What is taken was for a SID of ours, authentic where that is asked for, and its inner packet lies within the bytes. What goes on stays
/// in the domain with a smaller hop limit. Strangers are told nothing.
fn srv6_decap(data: &[u8]) {
    let Some((&[mode, sid, hop_limit, first], rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let (destination, payload) = match (SIDS.get(usize::from(sid)), rest.split_first_chunk::<16>()) {
        (Some((address, ..)), _) => (address.parse().expect("an address"), rest),
        (None, Some((address, rest))) => (Ipv6Addr::from(*address), rest),
        (None, None) => return,
    };
    if payload.len() > 65_535 {
        return;
    }
    let source: Ipv6Addr = match mode >> 2 & 3 {
        0 | 1 => "fd12:3456:789a:c000:201::1".parse().expect("an address"),
        2 => Ipv6Addr::UNSPECIFIED,
        _ => "2001:db8::1".parse().expect("an address"),
    };
    let check = [HmacCheck::Ignore, HmacCheck::IfPresent, HmacCheck::Require][usize::from(mode & 3).min(2)];
    let domain = Domain {
        prefixes: vec![locator("fd12:3456:789a::/48"), locator("fcbb:bb00::/32")],
        hmac: HmacPolicy::new(check, hmac_keys()),
    };
    LOCAL_SIDS.with(|sids| {
        let taken = decapsulate(first, destination, payload, sids, &domain.hmac, source);
        if let Ok(at) = taken {
            assert!(sids.lookup(destination).is_some() && sids.locator(destination).is_some());
            assert!(at < payload.len() && matches!(payload[at] >> 4, 4 | 6));
            let chain = walk(first, payload).expect("it was walked");
            assert_eq!(
                (chain.upper_at, chain.upper == next_header::IPV4),
                (at, payload[at] >> 4 == 4)
            );
            let listed = chain.srh.map(|found| found.srh);
            assert_eq!(listed.map_or(0, |srh| srh.segments_left()), 0);
            if check == HmacCheck::Require {
                let keys = hmac_keys();
                let known = |id| keys.iter().find(|key| key.id() == id);
                let verified = listed.expect("an HMAC is in one").verify(source, known);
                assert_eq!(verified, Ok(()));
            }
        }
        let arrived = Arrived {
            source,
            destination,
            hop_limit,
            traffic_class: 0,
            flow_label: 1,
            next_header: first,
            payload,
        };
        let mut out = vec![0xff; 9];
        let verdict = advance(&arrived, sids, &domain, |_| false, &mut out);
        if !domain.contains(source) {
            let refused = verdict.expect_err("from outside");
            assert!(matches!(
                refused.reason,
                DropReason::UnknownSid | DropReason::OutsideDomain
            ));
            assert!(refused.answer.is_none() && out.is_empty());
            return;
        }
        assert_eq!(taken.is_ok(), matches!(verdict, Ok(Verdict::Inner { .. })));
        match verdict {
            Ok(Verdict::Inner { inner }) => assert_eq!(taken, Ok(inner)),
            Ok(Verdict::NextHop { inner, .. }) => assert!(matches!(payload[inner] >> 4, 4 | 6)),
            Ok(Verdict::Send { .. }) => check_sent(&out, &arrived, &domain),
            Err(refused) => {
                let Some(answer) = refused.answer else { return };
                if let Answer::ParameterProblem { pointer, .. } = answer {
                    assert!(pointer as usize <= 40 + payload.len());
                }
                build_error(&arrived, answer, destination, &mut out);
                assert!(out.len() <= icmp::MAX_LEN);
                let ip = IpHeader::parse(&out).expect("an error is a packet");
                assert_eq!((ip.addrs.dst(), ip.total_len), (source.into(), out.len()));
                assert!(checksums_hold(&out) && !icmp::may_answer(&ip, &out));
            }
        }
    });
}

/// A packet that goes on, or an echo reply.
fn check_sent(sent: &[u8], arrived: &Arrived<'_>, domain: &Domain) {
    let (header, rest) = OuterHeader::parse(sent).expect("a packet");
    assert_eq!(40 + rest.len(), sent.len());
    assert!(domain.contains(header.destination));
    if header.source != arrived.source {
        assert_eq!(
            (header.source, header.destination),
            (arrived.destination, arrived.source)
        );
        assert_eq!((header.next_header, rest[0]), (protocol::ICMPV6, 129));
        assert!(
            (IpHeader::parse(sent).expect("a packet").pseudo(rest.len()) + Sum::of(rest)).fold() == 0xffff
        );
        return;
    }
    assert_eq!(header.hop_limit, arrived.hop_limit - 1);
    assert!(header.hop_limit > 0);
    let mut before = arrived.payload.to_vec();
    if header.next_header == arrived.next_header && before == rest {
        return; // A compressed SID was used up.
    }
    let chain = walk(arrived.next_header, &before).expect("it was walked");
    let found = chain.srh.expect("a list was followed");
    let (at, len) = (found.at, found.srh.len());
    let (left, following) = (found.srh.segments_left(), found.srh.next_header());
    assert_eq!(found.srh.segment(left - 1), Some(header.destination));
    if before.len() == rest.len() {
        before[at + SEGMENTS_LEFT_AT] = left - 1;
        assert_eq!(header.next_header, arrived.next_header);
    } else {
        assert_eq!(left, 1, "only the last but one removes it");
        match found.named_at {
            Some(named_at) => before[named_at] = following,
            None => assert_eq!(header.next_header, following),
        }
        before.drain(at..at + len);
    }
    assert_eq!(before, rest);
}

/// One inner packet: what the header parser accepts is consistent, and what the strict check lets in belongs here.
fn inner_validate(data: &[u8]) {
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
fn vnet_split(data: &[u8]) {
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

/// A batch of TCP and UDP packets made from a script of 4 bytes a packet: splitting what was coalesced gives every flow back.
fn gro_coalesce(data: &[u8]) {
    let mut flows = [Flow::default(); 4];
    let mut buffer = Vec::new();
    let mut offers = Vec::new();
    let mut expected: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for op in data.as_chunks::<4>().0.iter().take(200) {
        let packet = scripted(*op, &mut flows);
        let ip = IpHeader::parse(&packet).expect("made by hand");
        let trust = if op[0] & 0x80 != 0 && checksums_hold(&packet) {
            Trust::Verified
        } else {
            Trust::Unverified
        };
        offers.push(Offer {
            at: buffer.len(),
            ip,
            trust,
            flow: flow_hash(&ip, &packet),
            unfinished: None,
        });
        buffer.extend_from_slice(&packet);
        expected
            .entry(flow_key(&packet))
            .or_default()
            .push(comparable(&packet));
    }
    let mut coalescer = Coalescer::new(Merge { tcp: true, udp: true });
    for offer in offers {
        coalescer.offer(&buffer, offer);
    }
    coalescer.finish(&buffer);
    let mut found: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for index in 0..coalescer.len() {
        let mut slices = [std::io::IoSlice::new(&[]); MAX_SLICES];
        let filled = coalescer.slices(index, &buffer, &mut slices);
        let frame: Vec<u8> = slices[..filled]
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect();
        let (header, packet) = VirtioHeader::parse(&frame).expect("a frame has a header");
        let parts = match header.gso {
            None => vec![packet.to_vec()],
            Some(gso) => {
                let ip = IpHeader::parse(packet).expect("a merged frame is a packet");
                assert_eq!(ip.total_len, packet.len());
                split(
                    &SuperPacket::new(packet, ip, gso).expect("and a super-packet"),
                    packet,
                )
                .expect("segments of a merged frame fit")
            }
        };
        assert_eq!(parts.len(), coalescer.segments(index));
        for part in parts {
            found.entry(flow_key(&part)).or_default().push(comparable(&part));
        }
    }
    assert!(found == expected, "every flow as it was");
}

/// The fast sum is the slow sum, at any alignment and length and in any two parts; replacing a word is summing anew.
fn checksum(data: &[u8]) {
    let naive = |bytes: &[u8]| {
        let words = bytes
            .chunks(2)
            .map(|pair| u64::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
        let mut sum: u64 = words.sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    };
    // 0 and ffff are one number in one's complement.
    let same = |a: u16, b: u16| a % 0xffff == b % 0xffff;
    for skip in 0..data.len().min(9) {
        let bytes = &data[skip..];
        assert!(same(Sum::of(bytes).fold(), naive(bytes)));
        let (head, tail) = bytes.split_at((skip * 2).min(bytes.len() & !1));
        assert!(same((Sum::of(head) + Sum::of(tail)).fold(), naive(bytes)));
    }
    if let Some(&[a, b, c, d]) = data.first_chunk::<4>() {
        let (old, new) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        let mut changed = data.to_vec();
        changed[..2].copy_from_slice(&new.to_be_bytes());
        let replaced = replace_word(Sum::of(data).finish(), old, new);
        assert!(same(!replaced, naive(&changed)));
    }
}

/// Errors about any packet: `[kind, packet…]`. Never about errors, later fragments or odd addresses; never too long.
fn icmp_reply(data: &[u8]) {
    let Some((&kind, packet)) = data.split_first() else {
        return;
    };
    let Ok(ip) = IpHeader::parse(packet) else { return };
    if !icmp::may_answer(&ip, packet) {
        return;
    }
    assert!(ip.fragment != Fragment::Later);
    assert!(scope(ip.addrs.src()) == Scope::Routable && scope(ip.addrs.dst()) == Scope::Routable);
    let v4 = ip.addrs.src().is_ipv4();
    if ip.protocol == protocol::ICMP {
        assert!(
            !matches!(packet[ip.l4], 3 | 4 | 5 | 11 | 12),
            "about an ICMP error"
        );
    }
    if ip.protocol == protocol::ICMPV6 {
        assert!(packet[ip.l4] >= 128, "about an ICMPv6 error");
    }
    let error = match kind % 3 {
        0 => IcmpError::NoRoute,
        1 => IcmpError::TimeExceeded,
        _ => IcmpError::TooBig(1400),
    };
    let own: IpAddr = if v4 {
        Ipv4Addr::new(10, 244, 2, 0).into()
    } else {
        own_v6().into()
    };
    let mut out = [0; icmp::MAX_LEN];
    let len = icmp::build(error, own, &ip, packet, &mut out).expect("it fits");
    assert!(len <= if v4 { 576 } else { 1280 });
    let reply = IpHeader::parse(&out[..len]).expect("an error is a packet");
    assert_eq!(
        (reply.addrs.src(), reply.addrs.dst(), reply.total_len),
        (own, ip.addrs.src(), len)
    );
    assert!(
        packet.starts_with(&out[reply.l4 + 8..len]),
        "it quotes the offender"
    );
    let pseudo = if v4 {
        Sum::ZERO
    } else {
        reply.pseudo(reply.l4_len())
    };
    assert_eq!((pseudo + Sum::of(&out[reply.l4..len])).fold(), 0xffff);
    // What we answer with is itself never answered.
    assert!(!icmp::may_answer(&reply, &out[..len]));
}

/// Insertions, removals and look-ups, 6 bytes each, against a map that is searched from end to end.
fn route_table(data: &[u8]) {
    let mut table = RouteTable::new(overlay());
    let mut model: BTreeMap<(u128, u8, bool), u8> = BTreeMap::new();
    for &[op, family, a, b, c, len] in data.as_chunks::<6>().0.iter().take(400) {
        let v6 = family & 1 != 0;
        let (addr, bits, len): (IpAddr, u128, u8) = if v6 {
            let addr = Ipv6Addr::new(
                0xfd00,
                0x244,
                u16::from(a & 1),
                u16::from(b),
                u16::from(c),
                0,
                0,
                1,
            );
            (addr.into(), addr.to_bits(), len % 129)
        } else {
            let addr = Ipv4Addr::new(10, 243 + (a & 1), b, c);
            (addr.into(), u128::from(addr.to_bits()) << 96, len % 33)
        };
        let mask = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
        let prefix = match addr {
            IpAddr::V4(addr) => Prefix::V4(Ipv4Prefix::new(addr, len).expect("at most 32")),
            IpAddr::V6(addr) => Prefix::V6(Ipv6Prefix::new(addr, len).expect("at most 128")),
        };
        match op % 4 {
            0 | 1 => {
                table.insert(prefix, peer(op));
                model.insert((bits & mask, len, v6), op);
            }
            2 => assert_eq!(
                table.remove(prefix),
                model.remove(&(bits & mask, len, v6)).is_some()
            ),
            _ => {}
        }
        assert_eq!(table.len(), model.len());
        let matching = model.iter().filter(|((net, len, family), _)| {
            *family == v6 && bits & u128::MAX.checked_shl(128 - u32::from(*len)).unwrap_or(0) == *net
        });
        let longest = matching
            .max_by_key(|((_, len, _), _)| *len)
            .map(|(_, &number)| peer_address(number));
        let hop = |index: u32| table.peer(index).map(|peer| peer.hop.0);
        assert_eq!(
            table.lookup(addr).and_then(hop),
            longest,
            "the longest prefix wins"
        );
        let known = model.values().any(|&number| number == op);
        let source = table.source(peer_address(op).ip()).and_then(hop);
        assert_eq!(
            source,
            known.then(|| peer_address(op)),
            "sources are those of live routes"
        );
    }
}

/// A key that is accepted is written the same way again.
fn lease_key(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(subnet) = text.parse::<Subnet>() {
        assert_eq!(subnet.to_string(), text);
    }
}

/// A value that is accepted means the same after it was written and read again.
fn lease_value(data: &[u8]) {
    let Ok(attrs) = LeaseAttrs::from_json(data) else {
        return;
    };
    let written = attrs.to_json();
    if written.len() > LeaseAttrs::MAX_BYTES {
        return;
    }
    let again = LeaseAttrs::from_json(written.as_bytes()).expect("we read what we write");
    assert_eq!(again.to_json(), written);
    assert!(again.public_ip == attrs.public_ip && again.public_ipv6 == attrs.public_ipv6);
    assert_eq!(again.backend_type, attrs.backend_type);
}

/// A config that is accepted hands out subnets of its own network only, and describes itself to the container runtime.
fn net_config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(config) = NetworkConfig::parse(text) else {
        return;
    };
    assert!(config.v4.is_some() || config.v6.is_some());
    if let Some(range) = config.v4 {
        assert!(range.network.covers(range.min) && range.network.covers(range.max));
        assert!(range.min.addr() <= range.max.addr() && range.min.len() == range.max.len());
    }
    if let Some(range) = config.v6 {
        assert!(range.network.covers(range.min) && range.network.covers(range.max));
        assert!(range.min.addr() <= range.max.addr() && range.min.len() == range.max.len());
    }
    let subnet = Subnet {
        v4: config.v4.map_or(Subnet::NO_V4, |range| range.min),
        v6: config.v6.map(|range| range.min),
    };
    assert!(config.fits(subnet));
    let text = subnet_file::render(&config, subnet, mtu(), IpMasq::On);
    assert!(
        text.lines()
            .all(|line| line.starts_with("FLANNEL_") && line.contains('='))
    );
}

/// Any file where the old `subnet.env` should be: read or ignored, and what is read is a subnet.
fn subnet_env(data: &[u8]) {
    thread_local! {
        static PLACE: tempfile::TempDir = tempfile::tempdir().expect("a place for temporary files");
    }
    PLACE.with(|place| {
        let path = place.path().join("subnet.env");
        std::fs::write(&path, data).expect("room for temporary files");
        if let Some(subnet) = subnet_file::previous(&path) {
            assert!(subnet.ipv4().is_some() || subnet.v6.is_some());
        }
    });
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

fn overlay() -> Overlay {
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

fn peer(number: u8) -> Peer<UdpHop> {
    Peer {
        hop: UdpHop(peer_address(number)),
        inner_mtu: mtu(),
        stats: PeerStats::new(1),
    }
}

fn peer_address(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 8285))
}

fn own_v6() -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, 0, 2, 0, 0, 0, 0)
}

fn mtu() -> Mtu {
    Mtu::new(1472).expect("an MTU")
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
fn split(whole: &SuperPacket, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
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

/// SIDs of the node under test: address, prefix length, behaviour, flavours, next hop.
const SIDS: &[(&str, u8, &str, &str, Option<&str>)] = &[
    ("fd12:3456:789a:c000:202::1", 128, "End.DX4", "", None),
    ("fd12:3456:789a:c000:202::6", 128, "End.DT6", "", None),
    ("fd12:3456:789a:c000:202::46", 128, "End.DT46", "", None),
    ("fd12:3456:789a:c000:202::e", 128, "End", "", None),
    ("fd12:3456:789a:c000:202::ee", 128, "End", "psp,usp,usd", None),
    (
        "fd12:3456:789a:c000:202::ea",
        128,
        "End.X",
        "psp,usd",
        Some("fe80::2"),
    ),
    (
        "fd12:3456:789a:c000:202::d4",
        128,
        "End.DX4",
        "",
        Some("192.0.2.9"),
    ),
    ("fd12:3456:789a:c000:202::d6", 128, "End.DX6", "", Some("fe80::2")),
    ("fcbb:bb00:1::", 48, "uN", "psp", None),
    ("fcbb:bb00:1:d4::", 64, "End.DT4", "", None),
    ("fcbb:bb00:e001::", 48, "uA", "usd", Some("fe80::2")),
];

thread_local! {
    static LOCAL_SIDS: LocalSids = {
        let sids = SIDS.iter().map(|(address, len, behavior, flavors, next_hop)| {
            let next_hop = next_hop.map(|address| address.parse().expect("an address"));
            let behavior: Behavior = behavior.parse().expect("a behaviour");
            let flavors: Flavors = flavors.parse().expect("flavours");
            let sid = LocalSid::new(behavior, flavors, next_hop, CsidFormat::F3216).expect("a SID");
            (locator(&format!("{address}/{len}")), sid)
        });
        let locators = ["fd12:3456:789a:c000:202::/80", "fcbb:bb00:1::/48", "fcbb:bb00:e001::/48"];
        LocalSids::new(locators.map(locator).to_vec(), sids).expect("all in their locators")
    };
}

fn locator(prefix: &str) -> Ipv6Prefix {
    prefix.parse().expect("a prefix")
}

/// Those of the captures.
fn hmac_keys() -> [HmacKey; 2] {
    [(17, HmacAlgorithm::Sha256), (18, HmacAlgorithm::Sha1)]
        .map(|(id, algorithm)| HmacKey::new(id, algorithm, b"test-secret-0123").expect("a key"))
}

/// Whether header and L4 checksums are right, each summed anew.
fn checksums_hold(packet: &[u8]) -> bool {
    let ip = IpHeader::parse(packet).expect("a packet");
    let header = ip.addrs.src().is_ipv6() || verify_v4_header(&packet[..ip.l4]);
    header && (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..ip.total_len])).fold() == 0xffff
}

/// Where a scripted flow stands.
#[derive(Clone, Copy, Default)]
struct Flow {
    seq: u32,
    id: u16,
}

/// Makes the next packet of a script: `[flow and oddities, size, more oddities, value]`.
fn scripted([which, size, odd, value]: [u8; 4], flows: &mut [Flow; 4]) -> Vec<u8> {
    let number = usize::from(which & 3);
    let flow = &mut flows[number];
    let payload = vec![value; usize::from(size)];
    if odd & 1 != 0 {
        flow.seq = flow.seq.wrapping_add(u32::from(value));
    }
    let (v4, udp) = (number & 1 == 0, number & 2 != 0);
    let ttl = if odd & 2 != 0 { 63 } else { 64 };
    let builder = match v4 {
        true => PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 2], ttl),
        false => PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], ttl),
    };
    let mut packet = Vec::new();
    let written = if udp {
        builder.udp(1000, 2000).write(&mut packet, &payload)
    } else {
        let ack = if odd & 4 != 0 { 78 } else { 77 };
        let stamp = if odd & 8 != 0 { value } else { 1 };
        let builder = builder.tcp(40_000, 5201, flow.seq, 500).ack(ack);
        let builder = builder
            .options_raw(&[1, 1, 8, 10, stamp, 2, 3, 4, 5, 6, 7, 8])
            .expect("12 bytes of options");
        builder.write(&mut packet, &payload)
    };
    written.expect("a vector takes all");
    flow.seq = flow.seq.wrapping_add(u32::from(size));
    let l4 = if v4 { 20 } else { 40 };
    if v4 {
        if odd & 16 != 0 {
            flow.id = flow.id.wrapping_add(u16::from(value));
        }
        packet[4..6].copy_from_slice(&flow.id.to_be_bytes());
        packet[6] = if odd & 32 != 0 { 0x40 } else { 0 };
        packet[10..12].fill(0);
        let sum = Sum::of(&packet[..20]).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        // Some senders count, some stay at one value.
        flow.id = flow.id.wrapping_add(u16::from(which & 0x40 == 0));
    }
    if !udp {
        let flags = match which >> 2 & 7 {
            0..=3 => tcp::ACK_FLAG,
            4 => tcp::ACK_FLAG | tcp::PSH,
            5 => tcp::ACK_FLAG | tcp::FIN,
            6 => tcp::ACK_FLAG | tcp::ECE,
            _ => tcp::ACK_FLAG | tcp::CWR,
        };
        packet[l4 + tcp::FLAGS] = flags;
        packet[l4..][tcp::CHECKSUM].fill(0);
        let ip = IpHeader::parse(&packet).expect("made by hand");
        let sum = (ip.pseudo(ip.l4_len()) + Sum::of(&packet[l4..])).finish();
        packet[l4..][tcp::CHECKSUM].copy_from_slice(&sum.to_be_bytes());
    }
    if odd & 64 != 0 {
        // A bit lost on the way: the checksum no longer holds.
        let last = packet.len() - 1;
        packet[last] ^= 1;
    }
    packet
}

/// Addresses, protocol and ports.
fn flow_key(packet: &[u8]) -> Vec<u8> {
    let (addresses, next, l4) = if packet[0] >> 4 == 4 {
        (12..20, 9, 20)
    } else {
        (8..40, 6, 40)
    };
    [&packet[addresses], &packet[next..=next], &packet[l4..l4 + 4]].concat()
}

/// A packet without what merging may change: the identification under DF, and the header checksum over it.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}

/// No target depends on the time; it only has to be one.
#[expect(clippy::disallowed_methods, reason = "an Instant cannot be made otherwise")]
fn start() -> Instant {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    *START
}
