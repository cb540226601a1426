//! Packets made by hand.

use std::net::IpAddr;

use etherparse::{IpHeaders, PacketBuilder, PacketBuilderStep};
use kersey::dataplane::memory::Message;
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Addrs, Ecn, IpHeader, verify_v4_header};

use crate::node::underlay;

/// What a packet is to be like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packet {
    /// Inner source.
    pub(crate) src: IpAddr,
    /// Inner destination.
    pub(crate) dst: IpAddr,
    /// TTL or hop limit.
    pub(crate) ttl: u8,
    /// Payload bytes.
    pub(crate) payload: usize,
    /// Source port.
    pub(crate) port: u16,
}

impl Packet {
    /// A short packet between addresses of one family.
    pub(crate) fn new(src: IpAddr, dst: IpAddr) -> Self {
        Self {
            src,
            dst,
            ttl: 64,
            payload: 32,
            port: 1000,
        }
    }

    /// As UDP, without DF.
    pub(crate) fn udp(self) -> Vec<u8> {
        let mut out = Vec::new();
        let builder = self.ip().udp(self.port, 2000);
        builder.write(&mut out, &self.bytes()).unwrap();
        if out[0] >> 4 == 4 {
            // etherparse sets DF; pods' datagrams mostly lack it.
            out[6] &= !0x40;
            refresh_v4(&mut out);
        }
        out
    }

    /// As TCP data, with DF.
    pub(crate) fn tcp(self) -> Vec<u8> {
        let mut out = Vec::new();
        let builder = self.ip().tcp(self.port, 2000, 12_345, 500).ack(77);
        builder.write(&mut out, &self.bytes()).unwrap();
        out
    }

    fn ip(self) -> PacketBuilderStep<IpHeaders> {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => PacketBuilder::ipv4(src.octets(), dst.octets(), self.ttl),
            (IpAddr::V6(src), IpAddr::V6(dst)) => PacketBuilder::ipv6(src.octets(), dst.octets(), self.ttl),
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => panic!("families mixed"),
        }
    }

    fn bytes(self) -> Vec<u8> {
        (0..self.payload).map(|n| n as u8).collect()
    }
}

/// Sets DF on an IPv4 packet.
pub(crate) fn dont_fragment(mut packet: Vec<u8>) -> Vec<u8> {
    packet[6] |= 0x40;
    refresh_v4(&mut packet);
    packet
}

/// Computes the IPv4 header checksum anew.
pub(crate) fn refresh_v4(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 0xf) * 4;
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..header]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// A datagram as it comes from the node of number `from`.
pub(crate) fn from_peer(from: u8, packet: &[u8]) -> Message {
    Message {
        addr: underlay(from),
        bytes: packet.to_vec(),
        segment_size: packet.len(),
        ecn: Ecn::NotEct,
    }
}

/// Whether header and L4 checksums of a TCP, UDP or ICMPv6 packet are right.
pub(crate) fn checksums_hold(packet: &[u8]) -> bool {
    let ip = IpHeader::parse(packet).unwrap();
    let header = match ip.addrs {
        Addrs::V4 { .. } => verify_v4_header(&packet[..ip.l4]),
        Addrs::V6 { .. } => true,
    };
    header && (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..ip.total_len])).fold() == 0xffff
}
