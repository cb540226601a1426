//! Segment routing: headers, and what a SID does with a packet.

use std::net::Ipv6Addr;

use kersey::addr::Ipv6Prefix;
use kersey::dataplane::endpoint::{
    Answer, Arrived, Behavior, Domain, Flavors, HmacCheck, HmacPolicy, LocalSid, LocalSids, Verdict, advance,
    build_error, decapsulate,
};
use kersey::dataplane::stats::DropReason;
use kersey::wire::checksum::Sum;
use kersey::wire::icmp;
use kersey::wire::ip::{IpHeader, protocol};
use kersey::wire::srv6::{
    CsidFormat, HmacAlgorithm, HmacKey, OuterHeader, SEGMENTS_LEFT_AT, Srh, next_header, walk,
};

use super::checksums_hold;

/// The headers of an outer packet: `[next header, payload…]`. What is found lies within the payload, and the list within its header.
pub(super) fn srh_walk(data: &[u8]) {
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
pub(super) fn srv6_decap(data: &[u8]) {
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
