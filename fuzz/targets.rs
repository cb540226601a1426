//! The bodies of the fuzz targets: what must hold for any bytes at all.
//!
//! The fuzzer's binaries and the replay of the corpora (`tests/fuzz_corpus.rs`) both include this file.

#[path = "targets/merging.rs"]
mod merging;
#[path = "targets/nodes.rs"]
mod nodes;
#[path = "targets/segments.rs"]
mod segments;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kersey::addr::{Ipv4Prefix, Ipv6Prefix, Mtu, Prefix};
use kersey::control::config::NetworkConfig;
use kersey::control::subnet_file;
use kersey::control::subnet_file::IpMasq;
use kersey::dataplane::route::RouteTable;
use kersey::lease::{LeaseAttrs, Subnet};
use kersey::wire::checksum::{Sum, replace_word};
use kersey::wire::icmp;
use kersey::wire::icmp::IcmpError;
use kersey::wire::ip::{Fragment, IpHeader, Scope, protocol, scope, verify_v4_header};

use self::merging::gro_coalesce;
use self::nodes::{inner_validate, overlay, peer, peer_address, udp_decap, vnet_split, vxlan_decap};
use self::segments::{srh_walk, srv6_decap};

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

fn own_v6() -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, 0, 2, 0, 0, 0, 0)
}

fn mtu() -> Mtu {
    Mtu::new(1472).expect("an MTU")
}

/// Whether header and L4 checksums are right, each summed anew.
fn checksums_hold(packet: &[u8]) -> bool {
    let ip = IpHeader::parse(packet).expect("a packet");
    let header = ip.addrs.src().is_ipv6() || verify_v4_header(&packet[..ip.l4]);
    header && (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..ip.total_len])).fold() == 0xffff
}
