//! Reading the captures: classic pcap, little endian, Ethernet, UDP over either family.

use std::net::SocketAddr;

use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Addrs, IpHeader, protocol, verify_v4_header};
use kersey::wire::transport::udp;

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
    const FILE_HEADER: usize = 24;
    const RECORD_HEADER: usize = 16;
    const ETHERNET: usize = 14;
    assert_eq!(
        capture[..4],
        0xa1b2_c3d4u32.to_le_bytes(),
        "a classic pcap file, little endian"
    );
    let mut rest = &capture[FILE_HEADER..];
    let mut out = Vec::new();
    while let Some((header, after)) = rest.split_first_chunk::<RECORD_HEADER>() {
        let captured = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        let (frame, after) = after.split_at(captured);
        rest = after;
        let packet = &frame[ETHERNET..];
        let ip = IpHeader::parse(packet).unwrap();
        assert!(matches!(ip.addrs, Addrs::V6 { .. }) || verify_v4_header(&packet[..ip.l4]));
        assert_eq!(ip.protocol, protocol::UDP);
        let (header, payload) = packet[ip.l4..ip.total_len].split_at(udp::LEN);
        let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let pseudo = ip.pseudo(header.len() + payload.len());
        out.push(Datagram {
            from: SocketAddr::new(ip.addrs.src(), word(0)),
            to: SocketAddr::new(ip.addrs.dst(), word(2)),
            tos: ip.tos,
            payload: payload.to_vec(),
            headers: pseudo + Sum::of(&header[..udp::CHECKSUM.start]),
            pseudo: pseudo.fold(),
            checksum: word(udp::CHECKSUM.start),
        });
    }
    out
}
