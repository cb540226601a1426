//! Reading the captures of UDP tunnels, over either family.

use std::net::SocketAddr;

use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Addrs, IpHeader, protocol, verify_v4_header};
use kersey::wire::transport::udp;

use self::packets::packets;

#[path = "packets.rs"]
mod packets;

/// A UDP datagram of a capture.
pub(crate) struct Datagram {
    /// Who sent it.
    pub(crate) from: SocketAddr,
    /// To whom.
    pub(crate) to: SocketAddr,
    /// Type of service or traffic class of the outer header.
    #[allow(dead_code, reason = "flannel's proxy carries none")]
    pub(crate) tos: u8,
    /// What it carries.
    pub(crate) payload: Vec<u8>,
    /// Sum of the outer pseudo header and the UDP header without its checksum.
    headers: Sum,
    /// Sum of the outer pseudo header alone.
    #[allow(dead_code, reason = "only offloads leave it in place of a checksum")]
    pub(crate) pseudo: u16,
    /// The outer checksum field.
    pub(crate) checksum: u16,
}

impl Datagram {
    /// What the outer checksum would be over another payload of the same length.
    pub(crate) fn checksum_over(&self, payload: &[u8]) -> u16 {
        assert_eq!(payload.len(), self.payload.len());
        (self.headers + Sum::of(payload)).finish_udp()
    }
}

/// The datagrams of a capture, their outer IP headers checked.
pub(crate) fn datagrams(capture: &[u8]) -> Vec<Datagram> {
    packets(capture).into_iter().map(datagram).collect()
}

fn datagram(packet: &[u8]) -> Datagram {
    let ip = IpHeader::parse(packet).unwrap();
    assert!(matches!(ip.addrs, Addrs::V6 { .. }) || verify_v4_header(&packet[..ip.l4]));
    assert_eq!(ip.protocol, protocol::UDP);
    let (header, payload) = packet[ip.l4..ip.total_len].split_at(udp::LEN);
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let pseudo = ip.pseudo(header.len() + payload.len());
    Datagram {
        from: SocketAddr::new(ip.addrs.src(), word(0)),
        to: SocketAddr::new(ip.addrs.dst(), word(2)),
        tos: ip.tos,
        payload: payload.to_vec(),
        headers: pseudo + Sum::of(&header[..udp::CHECKSUM.start]),
        pseudo: pseudo.fold(),
        checksum: word(udp::CHECKSUM.start),
    }
}
