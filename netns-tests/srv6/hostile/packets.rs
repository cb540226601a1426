//! Packets made by hand.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use kersey::wire::checksum::{Sum, pseudo_v6};
use kersey::wire::ip::protocol;
use kersey::wire::srv6::OuterHeader;

/// Source port of what is made by hand: the probe has others.
pub(super) const BY_HAND: u16 = 4000;

/// An address in a node's locator; `0` is the locator itself.
pub(crate) fn sid(node: u8, function: &str) -> Ipv6Addr {
    format!("fd12:3456:789a:c000:20{node}::{function}")
        .parse()
        .unwrap()
}

/// A whole packet.
pub(crate) fn outer(source: Ipv6Addr, destination: Ipv6Addr, first: u8, payload: &[u8]) -> Vec<u8> {
    let header = OuterHeader {
        traffic_class: 0,
        flow_label: 1,
        next_header: first,
        hop_limit: 64,
        source,
        destination,
    };
    let payload_len = u16::try_from(payload.len()).unwrap();
    [&header.emit(payload_len)[..], payload].concat()
}

/// A routing header with its list as it is stored; TLVs are a multiple of 8 bytes.
pub(crate) fn srh(next: u8, left: u8, list: &[Ipv6Addr], tlvs: &[u8]) -> Vec<u8> {
    let units = 2 * list.len() + tlvs.len() / 8;
    let mut header = vec![next, units as u8, 4, left, (list.len() - 1) as u8, 0, 0, 0];
    header.extend(list.iter().flat_map(Ipv6Addr::octets));
    header.extend(tlvs);
    header
}

pub(crate) fn udp_v4(src: Ipv4Addr, dst: Ipv4Addr) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(src.octets(), dst.octets(), 64).udp(BY_HAND, 9);
    let mut packet = Vec::new();
    builder.write(&mut packet, &[0x5a; 64]).unwrap();
    packet
}

pub(crate) fn udp_v6(src: Ipv6Addr, dst: Ipv6Addr) -> Vec<u8> {
    let builder = PacketBuilder::ipv6(src.octets(), dst.octets(), 64).udp(BY_HAND, 9);
    let mut packet = Vec::new();
    builder.write(&mut packet, &[0x5a; 64]).unwrap();
    packet
}

/// From node 1.
pub(super) fn from_peer(function: &str, first: u8, payload: &[u8]) -> Vec<u8> {
    outer(sid(1, "1"), sid(2, function), first, payload)
}

/// An options header with nothing but padding.
pub(super) fn options(next: u8) -> [u8; 8] {
    [next, 0, 1, 4, 0, 0, 0, 0]
}

/// An ICMPv6 message of a type to node 2's SID, its checksum right.
pub(super) fn icmp(function: &str, kind: u8) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1, 1, 2, 3, 4];
    let pseudo = pseudo_v6(sid(1, "1"), sid(2, function), protocol::ICMPV6, message.len());
    let sum = (pseudo + Sum::of(&message)).finish();
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}
