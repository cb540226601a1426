//! Making SRv6 packets that pass through fit the link they leave by.
//!
//! What a raw socket hands over may be more than was on the wire: generic GRO merges the TCP inside to 64 KiB, and a sender on the same
//! machine leaves checksums to a network card that is not there. Forwarding in the kernel would undo both on the way out; here, we do.

use crate::addr::Mtu;
use crate::dataplane::coalesce::Merge;
use crate::dataplane::offload::{SuperPacket, finish_for_kernel};
use crate::wire::ip::{IpHeader, V6_LEN};
use crate::wire::srv6::{OuterHeader, next_header, walk};

/// What there is to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fitted {
    /// The packet, as it now is.
    Whole,
    /// Packets of this length, the last of at most that, in the other buffer.
    Segments(usize),
}

/// A device that takes neither super-packets nor partial checksums.
const PLAIN: Merge = Merge {
    tcp: false,
    udp: false,
};

/// Finishes what is inside `packet`, a whole IPv6 packet, for a link that carries `mtu`, or cuts it into segments in `spread`.
pub fn fit_outer(packet: &mut [u8], mtu: Mtu, spread: &mut Vec<u8>) -> Fitted {
    match inner_start(packet) {
        Some(inner) => fit(packet, inner, mtu, spread),
        None => Fitted::Whole,
    }
}

/// The same for `packet`, whose first `encap_len` bytes are an outer IPv6 header and what belongs to it, or nothing.
pub fn fit(packet: &mut [u8], encap_len: usize, mtu: Mtu, spread: &mut Vec<u8>) -> Fitted {
    let Some((encap, inner)) = packet.split_at_mut_checked(encap_len) else {
        return Fitted::Whole;
    };
    let room = u16::try_from(encap_len).ok().and_then(|len| mtu.minus(len).ok());
    let (Ok(ip), Some(room)) = (IpHeader::parse(inner), room) else {
        return Fitted::Whole;
    };
    let Some(gso) = finish_for_kernel(inner, &ip, room, PLAIN).and_then(|header| header.gso) else {
        return Fitted::Whole;
    };
    let Ok(super_packet) = SuperPacket::new(inner, ip, gso) else {
        return Fitted::Whole;
    };
    super_packet.spread(inner, encap_len, spread);
    super_packet.split(spread, encap_len, |header, len| {
        header.copy_from_slice(encap);
        let payload = (header.len() + len).saturating_sub(V6_LEN);
        if let Some(field) = header.get_mut(4..6) {
            field.copy_from_slice(&u16::try_from(payload).unwrap_or(u16::MAX).to_be_bytes());
        }
    });
    Fitted::Segments(super_packet.shape(encap_len).stride())
}

/// Where the inner packet starts in an outer one.
fn inner_start(packet: &[u8]) -> Option<usize> {
    let (header, payload) = OuterHeader::parse(packet).ok()?;
    let chain = walk(header.next_header, payload).ok()?;
    matches!(chain.upper, next_header::IPV4 | next_header::IPV6).then_some(V6_LEN + chain.upper_at)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::dataplane::offload::tests::{checksums_hold, packet};
    use crate::wire::srv6::{Encapsulation, Mode};
    use crate::wire::virtio::GsoKind;

    fn outer(inner: &[u8]) -> Vec<u8> {
        let segments = [Ipv6Addr::from(1), Ipv6Addr::from(2)];
        let template = Encapsulation {
            mode: Mode::Reduced,
            source: Ipv6Addr::from(3),
            segments: &segments,
            next_header: next_header::IPV4,
            hmac: None,
        };
        let template = template.template().unwrap();
        let mut out = vec![0; template.len()];
        template.push(&mut out, inner.len(), 0, 7);
        out.extend_from_slice(inner);
        out
    }

    #[test]
    fn merged_tcp_leaves_in_segments_that_fit() {
        let payload: Vec<u8> = (0..4000u32).map(|n| n as u8).collect();
        let mut whole = outer(&packet(GsoKind::TcpV4, 0x10, &payload));
        let mtu = Mtu::new(1500).unwrap();
        let mut spread = Vec::new();
        let Fitted::Segments(stride) = fit_outer(&mut whole, mtu, &mut spread) else {
            panic!("not cut");
        };
        assert_eq!(stride, 1500);
        let mut joined = Vec::new();
        for segment in spread.chunks(stride) {
            let (header, rest) = OuterHeader::parse(segment).unwrap();
            assert_eq!((header.flow_label, V6_LEN + rest.len()), (7, segment.len()));
            let inner = &segment[inner_start(segment).unwrap()..];
            assert!(checksums_hold(inner));
            joined.extend_from_slice(&inner[52..]);
        }
        assert_eq!(joined, payload);
    }

    #[test]
    fn a_packet_that_fits_stays_whole_and_its_checksum_is_finished() {
        let mut inner = packet(GsoKind::TcpV4, 0x10, b"hello");
        let right = inner.clone();
        let ip = IpHeader::parse(&inner).unwrap();
        let pseudo = ip.pseudo(ip.l4_len()).fold();
        inner[36..38].copy_from_slice(&pseudo.to_be_bytes());
        let mut whole = outer(&inner);
        let fitted = fit_outer(&mut whole, Mtu::new(1500).unwrap(), &mut Vec::new());
        assert_eq!(fitted, Fitted::Whole);
        assert_eq!(&whole[whole.len() - right.len()..], right);
    }
}
