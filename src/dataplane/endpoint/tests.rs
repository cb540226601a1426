//! What a SID does with every kind of packet, well made and not.

use proptest::prelude::*;

use super::*;
use crate::wire::srv6::{CsidFormat, Encapsulation, HmacAlgorithm, Mode, tlv};

const PEER: &str = "fd00:0:1::1";
const UDP: u8 = protocol::UDP;
const V4: u8 = next_header::IPV4;
const V6: u8 = next_header::IPV6;
const ROUTING: u8 = next_header::ROUTING;
const OPTIONS: u8 = next_header::DESTINATION;
const SL0: [u8; 24] = srh(V4, 0, 0);

#[test]
fn a_sid_that_decapsulates_takes_and_refuses_what_it_should() {
    use DropReason as Drop;
    let with_tlvs = |tlvs: [u8; 8]| {
        let mut header = SL0;
        header[1] = 3;
        [&header[..], &tlvs, &INNER4].concat()
    };
    let changed = |at: usize, value: u8| {
        let mut header = SL0;
        header[at] = value;
        [&header[..], &INNER4].concat()
    };
    let behind = |first: &[u8]| [first, &INNER4].concat();
    let options = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let hop_by_hop = next_header::HOP_BY_HOP;
    for (what, sid, first, payload, expected) in [
        ("no SRH", "d4", V4, INNER4.to_vec(), Ok(0)),
        ("SRH", "d4", ROUTING, behind(&SL0), Ok(24)),
        ("destination options", "d4", OPTIONS, behind(&options(V4)), Ok(8)),
        (
            "hop-by-hop options",
            "d4",
            hop_by_hop,
            behind(&options(V4)),
            Ok(8),
        ),
        (
            "destination options and SRH",
            "d4",
            OPTIONS,
            behind(&[&options(ROUTING)[..], &SL0].concat()),
            Ok(32),
        ),
        (
            "SRH and destination options",
            "d4",
            ROUTING,
            behind(&[&srh(OPTIONS, 0, 0)[..], &options(V4)].concat()),
            Ok(32),
        ),
        ("Pad1", "d4", ROUTING, with_tlvs([0; 8]), Ok(32)),
        (
            "PadN",
            "d4",
            ROUTING,
            with_tlvs([tlv::PADN, 6, 0, 0, 0, 0, 0, 0]),
            Ok(32),
        ),
        (
            "an unknown TLV",
            "d4",
            ROUTING,
            with_tlvs([0x81, 6, 1, 2, 3, 4, 5, 6]),
            Ok(32),
        ),
        ("a list without the SID", "d4", ROUTING, changed(23, 0x77), Ok(24)),
        ("all flags", "d4", ROUTING, changed(5, 0xff), Ok(24)),
        (
            "a TLV beyond the header",
            "d4",
            ROUTING,
            with_tlvs([9, 7, 0, 0, 0, 0, 0, 0]),
            Err(Drop::BadTlv),
        ),
        (
            "last entry beyond the header",
            "d4",
            ROUTING,
            changed(4, 1),
            Err(Drop::BadLastEntry),
        ),
        (
            "longer than the packet",
            "d4",
            ROUTING,
            changed(1, 200),
            Err(Drop::BadRoutingHeader),
        ),
        (
            "cut in the SRH",
            "d4",
            ROUTING,
            SL0[..7].to_vec(),
            Err(Drop::BadRoutingHeader),
        ),
        (
            "routing type 0",
            "d4",
            ROUTING,
            changed(2, 0),
            Err(Drop::RoutingType),
        ),
        (
            "routing type 2",
            "d4",
            ROUTING,
            changed(2, 2),
            Err(Drop::RoutingType),
        ),
        (
            "one segment left",
            "d4",
            ROUTING,
            behind(&srh(V4, 1, 0)),
            Err(Drop::SegmentsLeft),
        ),
        (
            "two segments left",
            "d4",
            ROUTING,
            behind(&srh(V4, 2, 0)),
            Err(Drop::BadSegmentsLeft),
        ),
        (
            "IPv6 where IPv4 belongs",
            "d4",
            V6,
            INNER6.to_vec(),
            Err(Drop::SidUpperLayer),
        ),
        (
            "IPv6 called IPv4",
            "d4",
            V4,
            INNER6.to_vec(),
            Err(Drop::BadVersion),
        ),
        (
            "nothing inside",
            "d4",
            ROUTING,
            SL0.to_vec(),
            Err(Drop::Truncated),
        ),
        ("UDP", "d4", UDP, INNER4.to_vec(), Err(Drop::SidUpperLayer)),
        (
            "no next header",
            "d4",
            next_header::NONE,
            vec![],
            Err(Drop::SidUpperLayer),
        ),
        (
            "Ethernet",
            "d4",
            next_header::ETHERNET,
            INNER4.to_vec(),
            Err(Drop::SidUpperLayer),
        ),
        (
            "a fragment",
            "d4",
            next_header::FRAGMENT,
            behind(&options(V4)),
            Err(Drop::OuterFragment),
        ),
        (
            "two routing headers",
            "d4",
            ROUTING,
            behind(&[srh(ROUTING, 0, 0), SL0].concat()),
            Err(Drop::OuterExtensionHeaders),
        ),
        ("IPv6 at DT6", "d6", V6, INNER6.to_vec(), Ok(0)),
        ("IPv4 at DT6", "d6", V4, INNER4.to_vec(), Err(Drop::SidUpperLayer)),
        ("IPv6 at DT46", "d46", V6, INNER6.to_vec(), Ok(0)),
        ("IPv4 at DT46", "d46", V4, INNER4.to_vec(), Ok(0)),
        (
            "UDP at DT46",
            "d46",
            UDP,
            INNER4.to_vec(),
            Err(Drop::SidUpperLayer),
        ),
        (
            "End without SRH",
            "e",
            V4,
            INNER4.to_vec(),
            Err(Drop::SidUpperLayer),
        ),
        (
            "End without segments left",
            "e",
            ROUTING,
            behind(&SL0),
            Err(Drop::SidUpperLayer),
        ),
        (
            "End with too many left",
            "e",
            ROUTING,
            behind(&srh(V4, 2, 0)),
            Err(Drop::BadSegmentsLeft),
        ),
        ("End with USD, no SRH", "e:1", V4, INNER4.to_vec(), Ok(0)),
        (
            "End with USD",
            "e:1",
            ROUTING,
            behind(&srh(V6, 0, 0)),
            Err(Drop::BadVersion),
        ),
        (
            "a SID not assigned",
            "77",
            V4,
            INNER4.to_vec(),
            Err(Drop::UnknownSid),
        ),
    ] {
        let destination = ours(sid);
        let policy = HmacPolicy::default();
        let found = decapsulate(first, destination, &payload, &sids(), &policy, addr(PEER));
        assert_eq!(found, expected, "{what}");
        // The long way says the same, whatever the hop limit.
        for hop_limit in [0, 1, 64] {
            let arrived = Arrived {
                hop_limit,
                ..arrived(destination, first, &payload)
            };
            let verdict = go(&arrived).map(|(verdict, _)| verdict);
            let expected = expected.map(|inner| Verdict::Inner { inner });
            assert_eq!(verdict.map_err(|refusal| refusal.reason), expected, "{what}");
        }
    }
}

#[test]
fn end_sends_to_the_next_segment() {
    for (what, header) in [("full", srh2(1, 1).to_vec()), ("reduced", srh(V4, 1, 0).to_vec())] {
        let payload = [&header[..], &INNER4].concat();
        let came = arrived(ours("e"), ROUTING, &payload);
        let (verdict, sent) = go(&came).unwrap();
        assert_eq!(verdict, Verdict::Send { to: addr(PEER) }, "{what}");
        let (outer, rest) = OuterHeader::parse(&sent).unwrap();
        let expected = OuterHeader {
            hop_limit: 63,
            destination: addr(PEER),
            ..came.header()
        };
        assert_eq!(outer, expected, "{what}");
        assert_eq!(rest[3], 0, "{what}");
        assert_eq!((&rest[..3], &rest[4..]), (&payload[..3], &payload[4..]), "{what}");
        assert_eq!(V6_LEN + rest.len(), sent.len(), "{what}");
    }
}

#[test]
fn the_last_but_one_removes_the_header_if_it_has_that_flavour() {
    let payload = [&srh(V4, 1, 0)[..], &INNER4].concat();
    let (verdict, sent) = go(&arrived(ours("e:1"), ROUTING, &payload)).unwrap();
    assert_eq!(verdict, Verdict::Send { to: addr(PEER) });
    let (outer, rest) = OuterHeader::parse(&sent).unwrap();
    assert_eq!((outer.next_header, rest), (V4, &INNER4[..]));

    // Behind options, it is their next header that changes.
    let payload = [&[ROUTING, 0, 1, 4, 0, 0, 0, 0][..], &payload].concat();
    let (_, sent) = go(&arrived(ours("e:1"), OPTIONS, &payload)).unwrap();
    let (outer, rest) = OuterHeader::parse(&sent).unwrap();
    assert_eq!(outer.next_header, OPTIONS);
    assert_eq!(rest, [&[V4, 0, 1, 4, 0, 0, 0, 0][..], &INNER4].concat());

    // With more than one left, it stays.
    let payload = [&srh2(2, 1)[..], &INNER4].concat();
    let (_, sent) = go(&arrived(ours("e:1"), ROUTING, &payload)).unwrap();
    assert_eq!(sent.len(), V6_LEN + payload.len());
}

#[test]
fn an_adjacency_takes_what_its_sid_sends_on() {
    let payload = [&srh(V4, 1, 0)[..], &INNER4].concat();
    let (verdict, sent) = go(&arrived(ours("ea"), ROUTING, &payload)).unwrap();
    assert_eq!(verdict, Verdict::Send { to: addr("fe80::2") });
    assert_eq!(OuterHeader::parse(&sent).unwrap().0.destination, addr(PEER));

    let payload = [&srh(V6, 0, 0)[..], &INNER6].concat();
    let (verdict, _) = go(&arrived(ours("ea"), ROUTING, &payload)).unwrap();
    let next_hop = "fe80::2".parse().unwrap();
    assert_eq!(verdict, Verdict::NextHop { inner: 24, next_hop }, "USD");
    let payload = [&srh(V4, 0, 0)[..], &INNER4].concat();
    let refused = go(&arrived(ours("ea"), ROUTING, &payload)).unwrap_err();
    assert_eq!(
        refused.reason,
        DropReason::SidUpperLayer,
        "IPv4 to an IPv6 neighbour"
    );

    let (verdict, _) = go(&arrived(addr("fcbb:bb00:1:a1:d4::"), V4, &INNER4)).unwrap();
    assert_eq!(verdict, Verdict::Send { to: addr("fe80::2") }, "uA");
}

#[test]
fn a_next_hop_takes_the_inner_packet() {
    for (sid, first, inner, next_hop) in [
        ("4", V4, &INNER4[..], "192.0.2.9"),
        ("6", V6, &INNER6[..], "fd00::9"),
    ] {
        let next_hop = next_hop.parse().unwrap();
        let destination = ours(sid);
        let verdict = go(&arrived(destination, first, inner)).unwrap().0;
        assert_eq!(verdict, Verdict::NextHop { inner: 0, next_hop });
        let short = decapsulate(
            first,
            destination,
            inner,
            &sids(),
            &HmacPolicy::default(),
            addr(PEER),
        );
        assert_eq!(short, Err(DropReason::SidUpperLayer), "not for the device");
    }
}

#[test]
fn compressed_sids_are_used_up_before_the_list() {
    let came = arrived(addr("fcbb:bb00:1:2:d4::"), V4, &INNER4);
    let (verdict, sent) = go(&came).unwrap();
    let next = addr("fcbb:bb00:2:d4::");
    assert_eq!(verdict, Verdict::Send { to: next });
    let (outer, rest) = OuterHeader::parse(&sent).unwrap();
    assert_eq!(
        (outer.destination, outer.hop_limit, rest),
        (next, 63, &INNER4[..])
    );

    let payload = [&srh(V4, 1, 0)[..], &INNER4].concat();
    let (_, sent) = go(&Arrived {
        next_header: ROUTING,
        payload: &payload,
        ..came
    })
    .unwrap();
    assert_eq!(
        sent[V6_LEN..],
        payload,
        "an argument is left, so the list is not touched"
    );

    let alone = arrived(addr("fcbb:bb00:1::"), ROUTING, &payload);
    let (verdict, sent) = go(&alone).unwrap();
    assert_eq!(
        verdict,
        Verdict::Send { to: addr(PEER) },
        "without argument, as End"
    );
    assert_eq!(sent[V6_LEN + SEGMENTS_LEFT_AT], 0);

    let function = arrived(addr("fcbb:bb00:1:d4::"), V4, &INNER4);
    assert_eq!(
        go(&function).unwrap().0,
        Verdict::Inner { inner: 0 },
        "a longer prefix"
    );
}

#[test]
fn refusals_say_what_the_rfcs_want_said() {
    let field = |pointer| {
        Some(Answer::ParameterProblem {
            code: ProblemCode::ErroneousField,
            pointer,
        })
    };
    let upper = |pointer| {
        Some(Answer::ParameterProblem {
            code: ProblemCode::UpperLayerHeader,
            pointer,
        })
    };
    let typed = |kind, left| {
        let mut header = srh(V4, left, 0);
        header[2] = kind;
        header
    };
    let mut longer = srh(V4, 1, 1);
    longer[4] = 9;
    let ping = [protocol::ICMPV6, 0, 1, 4, 0, 0, 0, 0];
    for (what, sid, hop_limit, first, headers, reason, answer) in [
        (
            "too many left",
            "d4",
            64,
            ROUTING,
            srh(V4, 5, 0),
            DropReason::BadSegmentsLeft,
            field(43),
        ),
        (
            "too many left at End",
            "e",
            64,
            ROUTING,
            srh(V4, 5, 0),
            DropReason::BadSegmentsLeft,
            field(43),
        ),
        (
            "last entry",
            "e",
            64,
            ROUTING,
            longer,
            DropReason::BadLastEntry,
            field(43),
        ),
        (
            "unknown type",
            "d4",
            64,
            ROUTING,
            typed(253, 1),
            DropReason::RoutingType,
            field(42),
        ),
        (
            "unknown type, none left",
            "d4",
            64,
            ROUTING,
            typed(253, 0),
            DropReason::RoutingType,
            None,
        ),
        (
            "left at an end",
            "d4",
            64,
            ROUTING,
            srh(V4, 1, 0),
            DropReason::SegmentsLeft,
            field(43),
        ),
        (
            "upper layer behind an SRH",
            "d4",
            64,
            ROUTING,
            srh(UDP, 0, 0),
            DropReason::SidUpperLayer,
            upper(64),
        ),
        (
            "hop limit",
            "e",
            1,
            ROUTING,
            srh(V4, 1, 0),
            DropReason::SidHopLimit,
            Some(Answer::TimeExceeded),
        ),
        (
            "hop limit 0",
            "e",
            0,
            ROUTING,
            srh(V4, 1, 0),
            DropReason::SidHopLimit,
            Some(Answer::TimeExceeded),
        ),
        (
            "unknown SID",
            "77",
            64,
            ROUTING,
            srh(V4, 1, 0),
            DropReason::UnknownSid,
            None,
        ),
    ] {
        let payload = [&headers[..], &INNER4].concat();
        let came = Arrived {
            hop_limit,
            ..arrived(ours(sid), first, &payload)
        };
        assert_eq!(go(&came).unwrap_err(), Refusal { reason, answer }, "{what}");
        for source in ["ff02::1", "::", "fe80::1"] {
            let came = Arrived {
                source: addr(source),
                ..came
            };
            let refused = advance(&came, &sids(), &domain(), |_| true, &mut Vec::new()).unwrap_err();
            assert_eq!(refused, reason.into(), "{what}, from {source}");
        }
    }
    let plain = arrived(ours("e"), V4, &INNER4);
    assert_eq!(go(&plain).unwrap_err().answer, upper(40));
    // Never about an error, however deep it lies.
    for kind in [1, 4, 127, icmpv6::REDIRECT] {
        let error = [&ping[..], &[kind, 0, 0, 0]].concat();
        let refused = go(&arrived(ours("d4"), OPTIONS, &error)).unwrap_err();
        assert_eq!(refused, DropReason::SidUpperLayer.into(), "type {kind}");
    }
    let reply = [&ping[..], &[icmpv6::ECHO_REPLY, 0, 0, 0]].concat();
    assert_eq!(
        go(&arrived(ours("d4"), OPTIONS, &reply)).unwrap_err().answer,
        upper(48)
    );
}

#[test]
fn an_error_quotes_the_packet() {
    let payload = [&srh(V4, 5, 0)[..], &[0x45; 3000]].concat();
    let came = arrived(ours("d4"), ROUTING, &payload);
    let answer = go(&came).unwrap_err().answer.unwrap();
    let mut out = vec![9; 7];
    build_error(&came, answer, came.destination, &mut out);
    assert_eq!(out.len(), icmp::MAX_LEN);
    let (outer, message) = OuterHeader::parse(&out).unwrap();
    assert_eq!((outer.source, outer.destination), (came.destination, came.source));
    assert_eq!(message[..2], [4, 0]);
    assert_eq!(message[4..8], [0, 0, 0, 43]);
    assert!(icmp_holds(&out));
    let mut whole = came.header().emit(payload.len() as u16).to_vec();
    whole.extend(&payload);
    assert_eq!(message[8..], whole[..icmp::MAX_LEN - 48]);
    build_error(&came, Answer::TooBig(1400), came.destination, &mut out);
    assert_eq!(
        (&out[40..42], &out[44..48]),
        (&[2, 0][..], &1400u32.to_be_bytes()[..])
    );
}

#[test]
fn a_ping_to_a_sid_is_answered() {
    for sid in ["d4", "e", "d46"] {
        let mut echo = vec![icmpv6::ECHO_REQUEST, 0, 0, 0, 0x12, 0x34, 0, 1, 0xaa, 0xbb, 0xcc];
        let destination = ours(sid);
        let sum = pseudo_v6(addr(PEER), destination, protocol::ICMPV6, echo.len()) + Sum::of(&echo);
        echo[2..4].copy_from_slice(&sum.finish().to_be_bytes());
        let mut payload = [&srh(protocol::ICMPV6, 0, 0)[..], &echo].concat();
        let (verdict, sent) = go(&arrived(destination, ROUTING, &payload)).unwrap();
        assert_eq!(verdict, Verdict::Send { to: addr(PEER) });
        let (outer, reply) = OuterHeader::parse(&sent).unwrap();
        assert_eq!((outer.source, outer.destination), (destination, addr(PEER)));
        assert_eq!((outer.next_header, outer.hop_limit), (protocol::ICMPV6, 64));
        assert_eq!((reply[0], &reply[4..]), (icmpv6::ECHO_REPLY, &echo[4..]));
        assert!(icmp_holds(&sent));

        *payload.last_mut().unwrap() ^= 1;
        let refused = go(&arrived(destination, ROUTING, &payload)).unwrap_err();
        assert_eq!(refused, DropReason::BadEcho.into());
    }
}

#[test]
fn the_domain_has_an_edge() {
    let payload = [&srh(V4, 1, 0)[..], &INNER4].concat();
    let mut out = Vec::new();
    let came = arrived(ours("e"), ROUTING, &payload);
    let stranger = Arrived {
        source: addr("2001:db8::1"),
        ..came
    };
    let refused = advance(&stranger, &sids(), &domain(), |_| false, &mut out).unwrap_err();
    assert_eq!(refused, DropReason::OutsideDomain.into(), "and is told nothing");
    let known = |peer| peer == stranger.source;
    assert!(advance(&stranger, &sids(), &domain(), known, &mut out).is_ok());
    assert!(!out.is_empty());

    for next in ["2001:db8::1", "ff02::1", "::1", "fe80::1", "::"] {
        let mut payload = payload.clone();
        payload[8..24].copy_from_slice(&addr(next).octets());
        let everything = Domain {
            prefixes: vec!["::/0".parse().unwrap()],
            ..domain()
        };
        let domain = if next == "2001:db8::1" {
            domain()
        } else {
            everything
        };
        let came = arrived(ours("e"), ROUTING, &payload);
        let refused = advance(&came, &sids(), &domain, |_| true, &mut out).unwrap_err();
        assert_eq!(refused, DropReason::SegmentOutsideDomain.into(), "{next}");
        assert!(out.is_empty());
    }
    let away = arrived(addr("fcbb:bb00:1:2::"), V4, &INNER4);
    let domain = Domain {
        prefixes: vec!["fd00::/16".parse().unwrap()],
        ..domain()
    };
    let refused = advance(&away, &sids(), &domain, |_| true, &mut out).unwrap_err();
    assert_eq!(
        refused,
        DropReason::SegmentOutsideDomain.into(),
        "a compressed one"
    );
}

#[test]
fn a_packet_between_two_ends_dies_of_its_hop_limit() {
    // A list that names two nodes again and again, as many entries as fit.
    let mut payload = vec![V4, 20, 4, 9, 9, 0, 0, 0];
    for n in 0..10 {
        payload.extend(ours(if n % 2 == 0 { "e" } else { "ea" }).octets());
    }
    payload.extend(INNER4);
    let mut hops = 0;
    let mut packet = arrived(ours("ea"), ROUTING, &payload).header();
    packet.hop_limit = 5;
    let mut bytes = [&packet.emit(payload.len() as u16)[..], &payload].concat();
    let refused = loop {
        let (header, payload) = OuterHeader::parse(&bytes).unwrap();
        match go(&Arrived::new(&header, payload)) {
            Ok((_, sent)) => bytes = sent,
            Err(refused) => break refused.reason,
        }
        hops += 1;
    };
    assert_eq!((hops, refused), (4, DropReason::SidHopLimit));
}

#[test]
fn hmacs_are_asked_for_as_the_policy_says() {
    use HmacCheck::{IfPresent, Ignore, Require};
    let key = |id, secret: &[u8]| HmacKey::new(id, HmacAlgorithm::Sha256, secret).unwrap();
    let (ours_, other, unknown) = (key(1, b"a"), key(1, b"b"), key(2, b"a"));
    let listed = |destination, hmac| {
        let template = Encapsulation {
            mode: Mode::Full,
            source: addr(PEER),
            segments: &[destination],
            next_header: V4,
            hmac,
        };
        let template = template.template().unwrap();
        [&template.as_bytes()[V6_LEN..], &INNER4].concat()
    };
    let d4 = ours("d4");
    for (what, payload, check, expected) in [
        ("none", listed(d4, None), Ignore, None),
        ("none", listed(d4, None), IfPresent, None),
        ("none", listed(d4, None), Require, Some(DropReason::HmacMissing)),
        ("right", listed(d4, Some(&ours_)), Ignore, None),
        ("right", listed(d4, Some(&ours_)), IfPresent, None),
        ("right", listed(d4, Some(&ours_)), Require, None),
        ("wrong", listed(d4, Some(&other)), Ignore, None),
        (
            "wrong",
            listed(d4, Some(&other)),
            IfPresent,
            Some(DropReason::HmacWrong),
        ),
        (
            "wrong",
            listed(d4, Some(&other)),
            Require,
            Some(DropReason::HmacWrong),
        ),
        ("unknown", listed(d4, Some(&unknown)), Ignore, None),
        (
            "unknown",
            listed(d4, Some(&unknown)),
            Require,
            Some(DropReason::HmacUnknownKey),
        ),
        ("of another SID", listed(ours("d46"), Some(&ours_)), Ignore, None),
        (
            "of another SID",
            listed(ours("d46"), Some(&ours_)),
            Require,
            Some(DropReason::HmacWrong),
        ),
    ] {
        let policy = HmacPolicy::new(check, [ours_.clone()]);
        let found = decapsulate(ROUTING, d4, &payload, &sids(), &policy, addr(PEER));
        assert_eq!(found.err(), expected, "{what}, {check:?}");
    }
    let policy = HmacPolicy::new(Require, [ours_.clone()]);
    let bare = decapsulate(V4, d4, &INNER4, &sids(), &policy, addr(PEER));
    assert_eq!(bare, Err(DropReason::HmacMissing), "no SRH, no HMAC");

    let reduced = Encapsulation {
        mode: Mode::Reduced,
        source: addr(PEER),
        segments: &[ours("e"), d4],
        next_header: V4,
        hmac: Some(&ours_),
    };
    let payload = [&reduced.template().unwrap().as_bytes()[V6_LEN..], &INNER4].concat();
    let domain = Domain {
        hmac: policy,
        ..domain()
    };
    let came = arrived(ours("e"), ROUTING, &payload);
    let mut out = Vec::new();
    let verdict = advance(&came, &sids(), &domain, |_| false, &mut out);
    assert_eq!(
        verdict,
        Ok(Verdict::Send { to: d4 }),
        "its first segment is not in the list"
    );
    let taken = decapsulate(ROUTING, d4, &out[V6_LEN..], &sids(), &domain.hmac, addr(PEER));
    assert_eq!(taken, Ok(64), "and the code still holds at the end");
}

proptest! {
    #[test]
    fn whatever_comes_is_within_bounds(
        sid in prop::sample::select(vec!["d4", "d6", "d46", "e", "e:1", "ea", "77"]),
        first in prop::sample::select(vec![ROUTING, V4, V6, OPTIONS, 0, 44, protocol::ICMPV6, UDP]),
        hop_limit: u8,
        fields: [u8; 3],
        mut payload in proptest::collection::vec(any::<u8>(), 0..160),
    ) {
        if let (ROUTING, [_, units, kind, left, last, ..]) = (first, &mut payload[..]) {
            *kind = 4;
            (*units, *left, *last) = (fields[0] % 9, fields[1] % 4, fields[2] % 4);
        }
        let came = Arrived { hop_limit, ..arrived(ours(sid), first, &payload) };
        let taken = decapsulate(first, came.destination, &payload, &sids(), &domain().hmac, came.source);
        if let Ok(at) = taken {
            prop_assert!(at < payload.len() && matches!(payload[at] >> 4, 4 | 6));
            prop_assert!(sids().lookup(came.destination).is_some());
        }
        match go(&came) {
            Ok((Verdict::Inner { inner }, _)) => prop_assert_eq!(taken, Ok(inner)),
            Ok((Verdict::NextHop { inner, .. }, _)) => prop_assert!(inner < payload.len() && taken.is_err()),
            Ok((Verdict::Send { .. }, sent)) => {
                let (header, rest) = OuterHeader::parse(&sent).unwrap();
                prop_assert_eq!(V6_LEN + rest.len(), sent.len());
                let reply = header.next_header == protocol::ICMPV6 && header.destination == came.source;
                prop_assert!(reply || header.hop_limit < hop_limit);
            }
            Err(refused) => {
                prop_assert!(taken.is_err());
                if let Some(answer) = refused.answer {
                    let mut error = Vec::new();
                    build_error(&came, answer, came.destination, &mut error);
                    prop_assert!(error.len() <= icmp::MAX_LEN && icmp_holds(&error));
                }
            }
        }
    }
}

/// An IPv4 packet as far as its version goes.
const INNER4: [u8; 20] = [0x45; 20];
/// An IPv6 packet as far as its version goes.
const INNER6: [u8; 40] = [0x60; 40];

/// A header with one entry, the peer.
const fn srh(next: u8, left: u8, last: u8) -> [u8; 24] {
    [
        next, 2, 4, left, last, 0, 0, 0, 0xfd, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
    ]
}

/// A header with two entries: the peer, and one of our SIDs before it.
fn srh2(left: u8, last: u8) -> [u8; 40] {
    let mut header = [0; 40];
    header[..24].copy_from_slice(&srh(V4, left, last));
    header[1] = 4;
    header[24..].copy_from_slice(&ours("e").octets());
    header
}

fn go(arrived: &Arrived<'_>) -> Result<(Verdict, Vec<u8>), Refusal> {
    let mut out = vec![1, 2, 3];
    let verdict = advance(arrived, &sids(), &domain(), |_| false, &mut out)?;
    Ok((verdict, out))
}

fn arrived(destination: Ipv6Addr, next_header: u8, payload: &[u8]) -> Arrived<'_> {
    Arrived {
        source: addr(PEER),
        destination,
        hop_limit: 64,
        traffic_class: 0xb9,
        flow_label: 0x84b8d,
        next_header,
        payload,
    }
}

fn domain() -> Domain {
    Domain {
        prefixes: vec!["fd00::/16".parse().unwrap(), "fcbb:bb00::/32".parse().unwrap()],
        hmac: HmacPolicy::default(),
    }
}

fn sids() -> LocalSids {
    let sid = |behavior: &str, flavors: &str, next_hop: Option<&str>| {
        LocalSid::new(
            behavior.parse().unwrap(),
            flavors.parse().unwrap(),
            next_hop.map(|addr| addr.parse().unwrap()),
            CsidFormat::F3216,
        )
        .unwrap()
    };
    let locators = ["fd00:0:2::/48", "fcbb:bb00:1::/48"].map(|prefix| prefix.parse().unwrap());
    let at = |prefix: &str, sid| (prefix.parse().unwrap(), sid);
    let sids = [
        at("fd00:0:2::d4/128", sid("End.DX4", "", Some("0.0.0.0"))),
        at("fd00:0:2::d6/128", sid("End.DT6", "", None)),
        at("fd00:0:2::d46/128", sid("End.DT46", "", None)),
        at("fd00:0:2::4/128", sid("End.DX4", "", Some("192.0.2.9"))),
        at("fd00:0:2::6/128", sid("End.DX6", "", Some("fd00::9"))),
        at("fd00:0:2::e/128", sid("End", "", None)),
        at("fd00:0:2::e:1/128", sid("End", "psp,usd", None)),
        at("fd00:0:2::ea/128", sid("End.X", "usd", Some("fe80::2"))),
        at("fcbb:bb00:1::/48", sid("uN", "", None)),
        at("fcbb:bb00:1:d4::/64", sid("End.DT4", "", None)),
        (
            "fcbb:bb00:1:a1::/64".parse().unwrap(),
            LocalSid::new(
                Behavior::Ua,
                Flavors::default(),
                Some("fe80::2".parse().unwrap()),
                CsidFormat::new(32, 32).unwrap(),
            )
            .unwrap(),
        ),
    ];
    LocalSids::new(locators.to_vec(), sids).unwrap()
}

/// An address in our locator.
fn ours(function: &str) -> Ipv6Addr {
    addr(&format!("fd00:0:2::{function}"))
}

fn icmp_holds(packet: &[u8]) -> bool {
    let (header, message) = OuterHeader::parse(packet).unwrap();
    let pseudo = pseudo_v6(
        header.source,
        header.destination,
        header.next_header,
        message.len(),
    );
    (pseudo + Sum::of(message)).fold() == 0xffff
}

fn addr(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}
