//! What the kernel's seg6 puts on the wire (`golden/srv6-*.pcap`): we read it, and we would have sent the same bytes.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "golden/packets.rs"]
mod packets;

use std::net::{IpAddr, Ipv6Addr};

use kersey::dataplane::endpoint::{
    Answer, Arrived, Behavior, Domain, Flavors, HmacCheck, HmacPolicy, LocalSid, LocalSids, ProblemCode,
    Refusal, Verdict, advance, build_error, decapsulate,
};
use kersey::dataplane::stats::DropReason;
use kersey::wire::icmp::{self, IcmpError};
use kersey::wire::ip::IpHeader;
use kersey::wire::srv6::{
    CsidFormat, Encapsulation, HOP_LIMIT, HmacAlgorithm, HmacError, HmacKey, Mode, OuterHeader, Srh,
    next_header, walk,
};

use crate::packets::packets;

const ENCAP: &[u8] = include_bytes!("golden/srv6-encap.pcap");
const REDUCED: &[u8] = include_bytes!("golden/srv6-red.pcap");
const TWO_SEGMENTS: &[u8] = include_bytes!("golden/srv6-multi.pcap");
const HMAC: &[u8] = include_bytes!("golden/srv6-hmac.pcap");
const COMPRESSED: &[u8] = include_bytes!("golden/srv6-usid.pcap");
const LAYER2: &[u8] = include_bytes!("golden/srv6-l2.pcap");
const ERRORS: &[u8] = include_bytes!("golden/srv6-errors.pcap");

const SECRET: &[u8] = b"test-secret-0123";
const A: &str = "fd12:3456:789a:c000:201::";
const B: &str = "fd12:3456:789a:c000:202::";

#[test]
fn what_we_send_is_byte_for_byte_what_the_kernel_sent() {
    let keys = keys();
    let mut seen = 0;
    for_each(|what, capture, index, packet| {
        let (header, payload) = OuterHeader::parse(packet).unwrap();
        let upper = walk(header.next_header, payload).unwrap().upper;
        let function = if upper == next_header::IPV6 { "6" } else { "1" };
        // Replies go to a.
        let from_a = header.source == sid(A, "1");
        let (us, them) = if from_a { (A, B) } else { (B, A) };
        let (mode, segments, key) = match (capture, index) {
            ("encap", _) => (Mode::Full, vec![sid(them, function)], None),
            ("red", _) | ("multi", 2 | 4) => (Mode::Reduced, vec![sid(them, function)], None),
            ("multi", 1) => (Mode::Full, vec![sid(B, "e"), sid(B, "1")], None),
            ("multi", _) => (Mode::Reduced, vec![sid(B, "e"), sid(B, "1")], None),
            ("hmac", _) => (Mode::Full, vec![sid(B, "1")], Some(&keys[index - 1])),
            ("l2", _) => (Mode::Full, vec![sid(B, "46")], None),
            // The second is the first, forwarded.
            ("usid", 1) => {
                let csids = CsidFormat::F3216.pack(sid("fcbb:bb00::", ""), &[1, 2, 0xd4]);
                (Mode::Reduced, csids.unwrap().collect(), None)
            }
            _ => return,
        };
        let template = Encapsulation {
            mode,
            source: sid(us, "1"),
            segments: &segments,
            next_header: upper,
            hmac: key,
        }
        .template()
        .unwrap();
        let (came, inner) = packet.split_at(template.len());
        let mut sent = vec![0; template.len()];
        template.push(&mut sent, inner.len(), header.traffic_class, header.flow_label);
        // The kernel copies the hop limit, or takes one from it.
        assert_eq!(sent[7], HOP_LIMIT, "{what}");
        sent[7] = header.hop_limit;
        assert_eq!(sent, came, "{what}");
        assert!(
            upper == next_header::ETHERNET || IpHeader::parse(inner).unwrap().total_len == inner.len(),
            "{what}"
        );
        seen += 1;
    });
    assert_eq!(seen, 16 + 12 + 4 + 2 + 1 + 1);
}

#[test]
fn the_inner_packets_are_found() {
    let policy = HmacPolicy::new(HmacCheck::IfPresent, keys());
    let sids = sids();
    let mut found = 0;
    for_each(|what, capture, index, packet| {
        let (header, payload) = OuterHeader::parse(packet).unwrap();
        let (first, source) = (header.next_header, header.source);
        let taken = decapsulate(first, header.destination, payload, &sids, &policy, source);
        let expected = match (capture, index) {
            ("encap", _) => Ok(24),
            ("red", _) | ("multi", 2 | 4) => Ok(0),
            ("multi", _) => Err(DropReason::SegmentsLeft),
            ("hmac", _) => Ok(64),
            ("usid", 1) => Err(DropReason::SegmentsLeft),
            ("usid", _) => Ok(0),
            _ => Err(DropReason::UnknownSid),
        };
        assert_eq!(taken, expected, "{what}");
        if let Ok(at) = taken {
            let inner = &payload[at..];
            let ip = IpHeader::parse(inner).unwrap();
            assert_eq!(ip.total_len, inner.len(), "{what}");
            assert_eq!(overlay(ip.addrs.src()) + overlay(ip.addrs.dst()), 3, "{what}");
            found += 1;
        }
    });
    assert_eq!(found, 16 + 12 + 2 + 2 + 1);
}

#[test]
fn an_end_on_the_way_hands_the_packet_to_the_last_segment() {
    let (sids, domain) = (sids(), domain());
    let captured = packets(TWO_SEGMENTS);
    for index in [0, 2] {
        let (header, payload) = OuterHeader::parse(captured[index]).unwrap();
        let mut out = Vec::new();
        let verdict = advance(
            &Arrived::new(&header, payload),
            &sids,
            &domain,
            |_| false,
            &mut out,
        );
        assert_eq!(verdict, Ok(Verdict::Send { to: sid(B, "1") }));
        let (sent, rest) = OuterHeader::parse(&out).unwrap();
        let hop_limit = header.hop_limit - 1;
        let destination = sid(B, "1");
        assert_eq!(
            sent,
            OuterHeader {
                hop_limit,
                destination,
                ..header
            }
        );
        let hmac = &domain.hmac;
        let at = decapsulate(sent.next_header, sent.destination, rest, &sids, hmac, sent.source).unwrap();
        assert_eq!(rest[at..], payload[at..], "the inner packet as it came");
    }
}

#[test]
fn the_compressed_sid_is_used_up_as_the_kernel_does() {
    let [before, after] = packets(COMPRESSED)[..] else {
        panic!("two packets");
    };
    let (header, payload) = OuterHeader::parse(before).unwrap();
    let mut out = Vec::new();
    let verdict = advance(
        &Arrived::new(&header, payload),
        &sids(),
        &domain(),
        |_| false,
        &mut out,
    );
    let to = sid("fcbb:bb00:2:d4::", "");
    assert_eq!(verdict, Ok(Verdict::Send { to }));
    assert_eq!(out, after, "hop limit included");
}

#[test]
fn the_kernels_hmacs_are_right_and_no_others() {
    let keys = keys();
    for (packet, key) in packets(HMAC).into_iter().zip(&keys) {
        let (header, payload) = OuterHeader::parse(packet).unwrap();
        let srh = Srh::parse(payload).unwrap();
        let hmac = srh.hmac().unwrap();
        assert_eq!((hmac.key_id, srh.flags()), (key.id(), 0x08));
        let known = |id| keys.iter().find(|key| key.id() == id);
        assert_eq!(srh.verify(header.source, known), Ok(()));
        assert_eq!(srh.verify(header.destination, known), Err(HmacError::Wrong));

        let take = |payload: &[u8], check| {
            let policy = HmacPolicy::new(check, keys.clone());
            decapsulate(
                next_header::ROUTING,
                header.destination,
                payload,
                &sids(),
                &policy,
                header.source,
            )
        };
        assert_eq!(take(payload, HmacCheck::Require), Ok(64));
        for at in [5, 23, 32, 63] {
            let mut forged = payload.to_vec();
            forged[at] ^= 1;
            let taken = take(&forged, HmacCheck::IfPresent);
            // SHA-1 has no more than 20 bytes to be wrong; the others are zeros.
            assert_eq!(taken, Err(DropReason::HmacWrong), "byte {at}");
        }
        let mut other_key = payload.to_vec();
        other_key[31] ^= 0x40;
        assert_eq!(
            take(&other_key, HmacCheck::Require),
            Err(DropReason::HmacUnknownKey)
        );
    }
}

#[test]
fn our_errors_are_the_kernels() {
    let field = |pointer| parameter_problem(ProblemCode::ErroneousField, pointer);
    let answers = [
        parameter_problem(ProblemCode::NextHeader, 6),
        field(43),
        field(42),
        Answer::TimeExceeded,
        Answer::TooBig(1280),
    ];
    let captured = packets(ERRORS);
    for (index, (&error, answer)) in captured.iter().zip(answers).enumerate() {
        let what = format!("srv6-errors.pcap packet {}", index + 1);
        let (outer, message) = OuterHeader::parse(error).unwrap();
        let quoted = &message[8..];
        // One is cut off; what is missing is not quoted by us either.
        let mut whole = quoted.to_vec();
        whole.resize(40 + usize::from(u16::from_be_bytes([quoted[4], quoted[5]])), 0);
        let (header, payload) = OuterHeader::parse(&whole).unwrap();
        let arrived = Arrived::new(&header, payload);
        let mut out = Vec::new();
        build_error(&arrived, answer, outer.source, &mut out);
        // Labels of errors are the kernel's choice.
        out[1..4].copy_from_slice(&error[1..4]);
        assert_eq!(out, error, "{what}");

        // Where the kernel speaks because of the routing header, so do we.
        let reason = match index {
            1 => DropReason::BadSegmentsLeft,
            2 => DropReason::RoutingType,
            _ => continue,
        };
        let prefix = format!("{}/128", header.destination).parse().unwrap();
        let sids = LocalSids::new(vec![prefix], [(prefix, plain(Behavior::End))]).unwrap();
        let known = |source| source == header.source;
        let refused = advance(&arrived, &sids, &domain(), known, &mut out);
        let answer = Some(answer);
        assert_eq!(refused, Err(Refusal { reason, answer }), "{what}");
    }
    let (outer, message) = OuterHeader::parse(captured[5]).unwrap();
    let offender = IpHeader::parse(&message[8..]).unwrap();
    let mut out = [0; icmp::MAX_LEN];
    let source = IpAddr::V6(outer.source);
    let len = icmp::build(IcmpError::NoRoute, source, &offender, &message[8..], &mut out).unwrap();
    out[1..4].copy_from_slice(&captured[5][1..4]);
    assert_eq!(out[..len], *captured[5]);
}

/// Runs a test over every packet of the captures of tunnels.
fn for_each(mut test: impl FnMut(&str, &str, usize, &[u8])) {
    for (name, capture, count) in [
        ("encap", ENCAP, 16),
        ("red", REDUCED, 12),
        ("multi", TWO_SEGMENTS, 4),
        ("hmac", HMAC, 2),
        ("usid", COMPRESSED, 2),
        ("l2", LAYER2, 1),
    ] {
        let captured = packets(capture);
        assert_eq!(captured.len(), count, "{name}");
        for (index, packet) in captured.into_iter().enumerate() {
            let number = index + 1;
            test(&format!("srv6-{name}.pcap packet {number}"), name, number, packet);
        }
    }
}

/// Numbers 17 and 18.
fn keys() -> [HmacKey; 2] {
    [(17, HmacAlgorithm::Sha256), (18, HmacAlgorithm::Sha1)]
        .map(|(id, algorithm)| HmacKey::new(id, algorithm, SECRET).unwrap())
}

/// Those of both nodes, and of the two that compressed ones lead through.
fn sids() -> LocalSids {
    let locators = ["fd12:3456:789a::/48", "fcbb:bb00::/32"].map(|prefix| prefix.parse().unwrap());
    let whole = |node: &str, function: &str| format!("{}/128", sid(node, function)).parse().unwrap();
    let mut sids = vec![
        ("fcbb:bb00:1::/48".parse().unwrap(), plain(Behavior::Un)),
        ("fcbb:bb00:2:d4::/64".parse().unwrap(), plain(Behavior::EndDt4)),
    ];
    for node in [A, B] {
        sids.push((whole(node, "1"), plain(Behavior::EndDx4)));
        sids.push((whole(node, "6"), plain(Behavior::EndDt6)));
        sids.push((whole(node, "e"), plain(Behavior::End)));
    }
    LocalSids::new(locators.to_vec(), sids).unwrap()
}

fn plain(behavior: Behavior) -> LocalSid {
    LocalSid::new(behavior, Flavors::default(), None, CsidFormat::F3216).unwrap()
}

fn domain() -> Domain {
    Domain {
        prefixes: ["fd12:3456:789a::/48", "fcbb:bb00::/32"]
            .map(|prefix| prefix.parse().unwrap())
            .to_vec(),
        hmac: HmacPolicy::default(),
    }
}

fn parameter_problem(code: ProblemCode, pointer: u32) -> Answer {
    Answer::ParameterProblem { code, pointer }
}

/// The number of the node an inner address belongs to.
fn overlay(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(address) => u16::from(address.octets()[2]),
        IpAddr::V6(address) => address.segments()[2],
    }
}

fn sid(node: &str, function: &str) -> Ipv6Addr {
    format!("{node}{function}").parse().unwrap()
}
