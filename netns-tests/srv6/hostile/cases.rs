//! What is sent to node 2 by hand, and what must come of it.

use std::net::{Ipv4Addr, Ipv6Addr};

use kersey::wire::ip::{V4_LEN, V6_LEN, protocol};
use kersey::wire::srv6::{HmacAlgorithm, HmacKey, Mode, next_header, tlv};

use super::Siege;
use super::hmac::{SECRET, key};
use super::packets::{from_peer, icmp, options, outer, sid, srh, udp_v4, udp_v6};

pub(super) const V4: u8 = next_header::IPV4;
pub(super) const V6: u8 = next_header::IPV6;
pub(super) const ROUTING: u8 = next_header::ROUTING;
const OPTIONS: u8 = next_header::DESTINATION;

/// Which thread is to have a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taker {
    /// A queue's.
    Queue,
    /// The one for all that does not end in the device.
    Endpoint,
}

/// A packet that must be refused.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) taker: Taker,
    pub(super) reason: &'static str,
    pub(super) packet: Vec<u8>,
}

pub(super) fn queue(name: impl Into<String>, reason: &'static str, packet: Vec<u8>) -> Case {
    let (name, taker) = (name.into(), Taker::Queue);
    Case {
        name,
        taker,
        reason,
        packet,
    }
}

pub(super) fn endpoint(name: impl Into<String>, reason: &'static str, packet: Vec<u8>) -> Case {
    let (name, taker) = (name.into(), Taker::Endpoint);
    Case {
        name,
        taker,
        reason,
        packet,
    }
}

impl Siege {
    /// An honest packet of each family, from node 1's pod to node 2's.
    pub(super) fn inner(&self) -> (Vec<u8>, Vec<u8>) {
        let v4 = udp_v4(self.overlay.pod_v4(1), self.overlay.pod_v4(2));
        (v4, udp_v6(self.v6[0], self.v6[1]))
    }

    /// Unusual, and no reason to refuse it; with what must arrive.
    pub(super) fn legal(&self) -> Vec<(String, Vec<u8>, Vec<u8>)> {
        let (v4, v6) = self.inner();
        let ours = sid(2, "1");
        let listed = |left, tlvs: &[u8]| srh(V4, left, &[ours], tlvs);
        let behind = |headers: &[&[u8]]| [&headers.concat()[..], &v4].concat();
        let with = |at: usize, value: u8, mut packet: Vec<u8>| {
            packet[at] = value;
            packet
        };
        let padn = [tlv::PADN, 6, 0, 0, 0, 0, 0, 0];
        let plain = from_peer("1", V4, &v4);
        let routed = from_peer("1", ROUTING, &behind(&[&listed(0, &[])]));
        let v4_cases = [
            ("no routing header", plain.clone()),
            ("hop limit 1", with(7, 1, plain.clone())),
            ("hop limit 0", with(7, 0, plain)),
            ("a routing header", routed.clone()),
            ("all its flags", with(V6_LEN + 5, 0xf7, routed.clone())),
            ("a tag", with(V6_LEN + 6, 0xff, routed)),
            ("Pad1", from_peer("1", ROUTING, &behind(&[&listed(0, &[0; 8])]))),
            ("PadN", from_peer("1", ROUTING, &behind(&[&listed(0, &padn)]))),
            (
                "an unknown TLV",
                from_peer("1", ROUTING, &behind(&[&listed(0, &[0x81, 6, 1, 2, 3, 4, 5, 6])])),
            ),
            (
                "a list without the SID",
                from_peer("1", ROUTING, &behind(&[&srh(V4, 0, &[sid(3, "1")], &[])])),
            ),
            (
                "options before",
                from_peer("1", OPTIONS, &behind(&[&options(V4)])),
            ),
            (
                "options of either kind before",
                from_peer(
                    "1",
                    next_header::HOP_BY_HOP,
                    &behind(&[&options(OPTIONS), &options(V4)]),
                ),
            ),
            (
                "options before a routing header",
                from_peer("1", OPTIONS, &behind(&[&options(ROUTING), &listed(0, &[])])),
            ),
            (
                "options behind one",
                from_peer(
                    "1",
                    ROUTING,
                    &behind(&[&srh(OPTIONS, 0, &[ours], &[]), &options(V4)]),
                ),
            ),
            (
                "a fragment that is whole",
                from_peer("1", next_header::FRAGMENT, &behind(&[&[V4, 0, 0, 0, 0, 0, 0, 9]])),
            ),
            ("End.DX4", from_peer("4", V4, &v4)),
            ("End.DT4", from_peer("d4", ROUTING, &behind(&[&listed(0, &[])]))),
        ];
        let v6_cases = [
            ("IPv6", from_peer("1", V6, &v6)),
            ("End.DT6", from_peer("6", V6, &v6)),
            (
                "IPv6 behind a routing header",
                from_peer("6", ROUTING, &[&srh(V6, 0, &[ours], &[])[..], &v6].concat()),
            ),
        ];
        let all = v4_cases.map(|(name, packet)| (name.to_owned(), packet, v4.clone()));
        let all_v6 = v6_cases.map(|(name, packet)| (name.to_owned(), packet, v6.clone()));
        all.into_iter().chain(all_v6).collect()
    }

    /// All that node 1 may try and must not get through.
    pub(super) fn lies(&self) -> Vec<Case> {
        let mut lies = self.truncations();
        lies.extend(self.list_lies());
        lies.extend(self.chain_lies());
        lies.extend(self.sid_lies());
        lies.extend(self.inner_lies());
        lies.extend(self.waypoint_lies());
        lies
    }

    /// Packets that end too early, at every byte of their headers.
    pub(super) fn truncations(&self) -> Vec<Case> {
        let (v4, v6) = self.inner();
        let whole = srh(V4, 0, &[sid(2, "1")], &[]);
        let mut cases = Vec::new();
        for len in 0..V4_LEN {
            let name = format!("IPv4 of {len} bytes");
            cases.push(endpoint(name, "truncated", from_peer("1", V4, &v4[..len])));
        }
        for len in [20, 27, v4.len() - 1] {
            let name = format!("IPv4 of {len} bytes");
            cases.push(queue(name, "bad_length", from_peer("1", V4, &v4[..len])));
        }
        for len in 0..V6_LEN {
            let name = format!("IPv6 of {len} bytes");
            let taken = if len < V4_LEN { endpoint } else { queue };
            cases.push(taken(name, "truncated", from_peer("1", V6, &v6[..len])));
        }
        for len in [V6_LEN, V6_LEN + 7, v6.len() - 1] {
            let name = format!("IPv6 of {len} bytes");
            cases.push(queue(name, "bad_length", from_peer("1", V6, &v6[..len])));
        }
        for len in 0..whole.len() {
            let name = format!("a routing header of {len} bytes");
            let taken = if len < V4_LEN { endpoint } else { queue };
            let packet = from_peer("1", ROUTING, &whole[..len]);
            cases.push(taken(name, "bad_routing_header", packet));
        }
        for len in 0..V4_LEN {
            let name = format!("a routing header and {len} bytes");
            let packet = from_peer("1", ROUTING, &[&whole[..], &v4[..len]].concat());
            cases.push(queue(name, "truncated", packet));
        }
        cases
    }

    /// Routing headers that are not what they say.
    fn list_lies(&self) -> Vec<Case> {
        let (v4, _) = self.inner();
        let ours = sid(2, "1");
        let listed = srh(V4, 0, &[ours], &[]);
        let changed = |changes: &[(usize, u8)]| {
            let mut header = listed.clone();
            for &(at, value) in changes {
                header[at] = value;
            }
            from_peer("1", ROUTING, &[&header[..], &v4].concat())
        };
        let tlvs = |tlvs: [u8; 8]| from_peer("1", ROUTING, &[&srh(V4, 0, &[ours], &tlvs)[..], &v4].concat());
        let mut cases = Vec::new();
        for kind in [0, 2, 3, 5, 253] {
            for left in [0, 1] {
                let name = format!("routing type {kind}, {left} left");
                let packet = changed(&[(2, kind), (3, left)]);
                cases.push(endpoint(name, "routing_type", packet));
            }
        }
        for left in [2, 3, 128, 255] {
            let packet = changed(&[(3, left)]);
            cases.push(endpoint(
                format!("{left} left of one"),
                "bad_segments_left",
                packet,
            ));
        }
        for function in ["1", "4", "d4", "6"] {
            let list = srh(V4, 1, &[sid(3, "1"), sid(2, function)], &[]);
            let packet = from_peer(function, ROUTING, &[&list[..], &v4].concat());
            let name = format!("one left at the end {function}");
            cases.push(endpoint(name, "segments_left", packet));
        }
        for last in [1, 2, 127, 255] {
            let packet = changed(&[(4, last)]);
            cases.push(queue(
                format!("last entry {last} of none"),
                "bad_last_entry",
                packet,
            ));
        }
        for units in [0, 1] {
            let packet = changed(&[(1, units)]);
            cases.push(queue(
                format!("a header of {units} units"),
                "bad_last_entry",
                packet,
            ));
        }
        for units in [14, 15, 64, 255] {
            let packet = changed(&[(1, units)]);
            let name = format!("a header of {units} units, longer than the packet");
            cases.push(queue(name, "bad_routing_header", packet));
        }
        for (name, lie) in [
            ("reaches beyond the header", [9, 7, 0, 0, 0, 0, 0, 0]),
            ("is as long as can be", [0x85, 255, 0, 0, 0, 0, 0, 0]),
            ("of padding is too long", [tlv::PADN, 200, 0, 0, 0, 0, 0, 0]),
            ("has no length", [0, 0, 0, 0, 0, 0, 0, 9]),
            (
                "is behind a good one and too long",
                [tlv::PADN, 3, 0, 0, 0, 9, 2, 0],
            ),
            ("is an HMAC of 6 bytes", [tlv::HMAC, 6, 0, 0, 0, 0, 0, 7]),
            ("is an HMAC of none", [tlv::HMAC, 0, 0, 0, 0, 0, 0, 0]),
        ] {
            cases.push(queue(format!("a TLV that {name}"), "bad_tlv", tlvs(lie)));
        }
        for (name, reason, key) in [
            ("with another secret", "hmac_wrong", (key().id(), "a guess")),
            ("of an unknown key", "hmac_unknown_key", (8, SECRET)),
        ] {
            let key = HmacKey::new(key.0, HmacAlgorithm::Sha256, key.1.as_bytes()).unwrap();
            let packet = self.signed_by(&key, Mode::Full, &[ours]);
            cases.push(queue(format!("an HMAC {name}"), reason, packet));
        }
        cases
    }

    /// Extension headers where they do not belong.
    fn chain_lies(&self) -> Vec<Case> {
        let (v4, _) = self.inner();
        let ours = [sid(2, "1")];
        let routed = |next: u8, rest: &[&[u8]]| {
            let payload = [&srh(next, 0, &ours, &[])[..], &rest.concat()].concat();
            from_peer("1", ROUTING, &payload)
        };
        let many = |next| [&[options(OPTIONS); 7].concat()[..], &options(next)].concat();
        let wrong = "outer_extension_headers";
        vec![
            endpoint(
                "two routing headers",
                wrong,
                routed(ROUTING, &[&srh(V4, 0, &ours, &[]), &v4]),
            ),
            endpoint(
                "a routing header of type 0 behind it",
                wrong,
                routed(ROUTING, &[&[V4, 0, 0, 0, 0, 0, 0, 0], &v4]),
            ),
            endpoint(
                "hop-by-hop options behind it",
                wrong,
                routed(next_header::HOP_BY_HOP, &[&options(V4), &v4]),
            ),
            queue(
                "options that are cut",
                wrong,
                routed(OPTIONS, &[&[V4, 40, 1, 4, 0, 0, 0, 0], &v4]),
            ),
            queue("options of one byte", wrong, routed(OPTIONS, &[&[V4]])),
            queue("eight options headers", wrong, routed(OPTIONS, &[&many(V4), &v4])),
            endpoint(
                "a first fragment behind it",
                "outer_fragment",
                routed(next_header::FRAGMENT, &[&[V4, 0, 0, 1, 0, 0, 0, 9], &v4]),
            ),
            endpoint(
                "a later fragment behind it",
                "outer_fragment",
                routed(next_header::FRAGMENT, &[&[V4, 0, 0, 8, 0, 0, 0, 9], &v4]),
            ),
            queue(
                "two routing headers with options between",
                wrong,
                routed(OPTIONS, &[&options(ROUTING), &srh(V4, 0, &ours, &[]), &v4]),
            ),
        ]
    }

    /// SIDs that there are not, and what SIDs do not take.
    fn sid_lies(&self) -> Vec<Case> {
        let (v4, v6) = self.inner();
        let wrong = "sid_upper_layer";
        let mut cases = Vec::new();
        for function in ["0", "2", "5", "1:1", "ffff", "ffff:ffff"] {
            for (first, payload) in [
                (V4, v4.clone()),
                (V6, v6.clone()),
                (ROUTING, [&srh(V4, 0, &[sid(2, "1")], &[])[..], &v4].concat()),
                (
                    ROUTING,
                    [&srh(V4, 1, &[sid(3, "1"), sid(2, "1")], &[])[..], &v4].concat(),
                ),
            ] {
                let name = format!("no SID {:?}, {first}", function);
                cases.push(endpoint(
                    name,
                    "unknown_sid",
                    from_peer(function, first, &payload),
                ));
            }
        }
        for (function, first, payload) in [("4", V6, &v6), ("d4", V6, &v6), ("6", V4, &v4)] {
            let name = format!("the other family for {function}");
            cases.push(queue(name, wrong, from_peer(function, first, payload)));
            let routed = [&srh(first, 0, &[sid(2, function)], &[])[..], payload].concat();
            let name = format!("the other family for {function}, routed");
            cases.push(queue(name, wrong, from_peer(function, ROUTING, &routed)));
        }
        let routed = |next: u8, rest: &[u8]| {
            from_peer(
                "1",
                ROUTING,
                &[&srh(next, 0, &[sid(2, "1")], &[])[..], rest].concat(),
            )
        };
        for (name, next) in [
            ("UDP", protocol::UDP),
            ("TCP", protocol::TCP),
            ("nothing", next_header::NONE),
            ("Ethernet", 143),
            ("GRE", 47),
            ("authentication", 51),
            ("encryption", 50),
        ] {
            cases.push(endpoint(
                format!("{name} behind the list"),
                wrong,
                routed(next, &v4),
            ));
        }
        for kind in [1, 3, 129, 137] {
            let name = format!("ICMPv6 {kind} behind the list");
            cases.push(endpoint(name, wrong, routed(protocol::ICMPV6, &icmp("1", kind))));
        }
        let mut echo = icmp("1", 128);
        echo[9] ^= 1;
        cases.push(endpoint(
            "an echo request that is damaged",
            "bad_echo",
            routed(protocol::ICMPV6, &echo),
        ));
        cases.push(endpoint(
            "an echo request that is cut",
            "bad_echo",
            routed(protocol::ICMPV6, &icmp("1", 128)[..7]),
        ));
        let version = |version: u8, packet: &[u8]| {
            let mut packet = packet.to_vec();
            packet[0] = version << 4 | packet[0] & 0xf;
            packet
        };
        for (name, first, inner) in [
            ("IPv6 called IPv4", V4, v6.clone()),
            ("IPv4 called IPv6", V6, v4.clone()),
            ("version 5", V4, version(5, &v4)),
            ("version 0", V6, version(0, &v6)),
        ] {
            cases.push(queue(name, "bad_version", from_peer("1", first, &inner)));
            let name = format!("{name}, routed");
            let payload = [&srh(first, 0, &[sid(2, "1")], &[])[..], &inner].concat();
            cases.push(queue(name, "bad_version", from_peer("1", ROUTING, &payload)));
        }
        cases
    }

    /// Inner packets that must not come from node 1, or not to node 2.
    fn inner_lies(&self) -> Vec<Case> {
        let [one, two, three] = [1, 2, 3].map(|nth| self.overlay.pod_v4(nth));
        let unleased = Ipv4Addr::new(10, 244, 255, 9);
        let mut cases = Vec::new();
        let underlay = self.overlay.lab.nodes[1].v4;
        for (reason, src, dst) in [
            ("martian_source", "127.0.0.1".parse().unwrap(), two),
            ("martian_source", "0.0.0.0".parse().unwrap(), two),
            ("martian_source", "224.0.0.1".parse().unwrap(), two),
            ("martian_source", "255.255.255.255".parse().unwrap(), two),
            ("martian_source", "169.254.0.1".parse().unwrap(), two),
            ("martian_source", two, two),
            ("spoofed_source", three, two),
            ("spoofed_source", unleased, two),
            ("foreign_source", "8.8.8.8".parse().unwrap(), two),
            ("foreign_source", "192.0.2.3".parse().unwrap(), two),
            ("not_for_us", one, three),
            ("not_for_us", one, one),
            ("not_for_us", one, unleased),
            ("not_for_us", one, "8.8.8.8".parse().unwrap()),
            ("not_for_us", one, underlay),
            ("not_unicast", one, "224.0.0.1".parse().unwrap()),
            ("not_unicast", one, "255.255.255.255".parse().unwrap()),
            ("not_unicast", one, "127.0.0.1".parse().unwrap()),
            ("not_unicast", one, "169.254.0.1".parse().unwrap()),
        ] {
            let packet = from_peer("1", V4, &udp_v4(src, dst));
            cases.push(queue(format!("inside {src} to {dst}"), reason, packet));
        }
        let [one, two, three] = self.v6;
        let addr = |text: &str| text.parse::<Ipv6Addr>().unwrap();
        for (reason, src, dst) in [
            ("martian_source", addr("::1"), two),
            ("martian_source", addr("::"), two),
            ("martian_source", addr("fe80::1"), two),
            ("martian_source", addr("ff02::1"), two),
            ("martian_source", addr("::ffff:10.0.0.1"), two),
            ("martian_source", two, two),
            ("spoofed_source", three, two),
            ("foreign_source", addr("2001:db8:ffff::1"), two),
            ("foreign_source", self.overlay.lab.nodes[2].v6, two),
            ("foreign_source", sid(3, "1"), two),
            ("not_for_us", one, three),
            ("not_for_us", one, self.overlay.lab.nodes[1].v6),
            ("not_for_us", one, sid(2, "1")),
            ("not_for_us", one, sid(2, "e")),
            ("not_for_us", one, addr("2001:db8:ffff::1")),
            ("not_unicast", one, addr("ff02::1")),
            ("not_unicast", one, addr("fe80::1")),
            ("not_unicast", one, addr("::1")),
        ] {
            let packet = from_peer("1", V6, &udp_v6(src, dst));
            cases.push(queue(format!("inside {src} to {dst}"), reason, packet));
        }
        let (v4, _) = self.inner();
        let changed = |at: usize, value: u8| {
            let mut inner = v4.clone();
            inner[at] = value;
            from_peer("1", V4, &inner)
        };
        cases.push(queue(
            "an inner checksum",
            "bad_header_checksum",
            changed(10, !v4[10]),
        ));
        cases.push(queue(
            "an inner header of 16 bytes",
            "bad_header_length",
            changed(0, 0x44),
        ));
        // A tunnel in the tunnel, and a list inside that leads elsewhere: the inner destination is what counts.
        let nested = outer(one, sid(2, "1"), V4, &v4);
        cases.push(queue(
            "a tunnel inside",
            "not_for_us",
            from_peer("1", V6, &nested),
        ));
        let list = [&srh(V4, 1, &[sid(3, "1"), sid(2, "e")], &[])[..], &v4].concat();
        let nested = outer(one, sid(2, "e"), ROUTING, &list);
        cases.push(queue("a list inside", "not_for_us", from_peer("1", V6, &nested)));
        let mut marked = from_peer("1", V4, &v4);
        marked[1] |= 3 << 4;
        cases.push(queue("a congestion mark outside", "congestion_mark", marked));
        cases
    }

    /// Packets that a waypoint must not send on.
    fn waypoint_lies(&self) -> Vec<Case> {
        let (v4, v6) = self.inner();
        let onward = |left: u8, next: Ipv6Addr, function: &str| {
            let list = srh(V4, left, &[next, sid(2, function)], &[]);
            from_peer(function, ROUTING, &[&list[..], &v4].concat())
        };
        let mut cases = Vec::new();
        for function in ["e", "ea"] {
            for (name, first, payload) in [("IPv4", V4, &v4), ("IPv6", V6, &v6)] {
                let name = format!("{name} at {function} without a list");
                cases.push(endpoint(
                    name,
                    "sid_upper_layer",
                    from_peer(function, first, payload),
                ));
            }
            let name = format!("none left at {function}");
            cases.push(endpoint(
                name,
                "sid_upper_layer",
                onward(0, sid(3, "1"), function),
            ));
            for left in [3, 4, 255] {
                let name = format!("{left} left of two at {function}");
                cases.push(endpoint(
                    name,
                    "bad_segments_left",
                    onward(left, sid(3, "1"), function),
                ));
            }
            for hop_limit in [1, 0] {
                let mut packet = onward(1, sid(3, "1"), function);
                packet[7] = hop_limit;
                let name = format!("hop limit {hop_limit} at {function}");
                cases.push(endpoint(name, "sid_hop_limit", packet));
            }
            for next in [
                "2001:db8:ffff::1",
                "2001:db8:1::1",
                "2001:db8:1::4",
                "ff02::1",
                "fe80::1",
                "::1",
                "::",
                "::ffff:192.0.2.1",
            ] {
                let name = format!("on from {function} to {next}");
                let packet = onward(1, next.parse().unwrap(), function);
                cases.push(endpoint(name, "segment_outside_domain", packet));
            }
            let mut cut = onward(1, sid(3, "1"), function);
            cut.truncate(V6_LEN + 30);
            cut[5] = 30;
            cases.push(endpoint(
                format!("a list cut at {function}"),
                "bad_routing_header",
                cut,
            ));
        }
        cases
    }
}
