//! Splitting super-packets into segments and finishing checksums, by the kernel's own rules.
//!
//! A super-packet is one IP packet of up to 64 KiB whose payload is to leave in pieces of `gso.size` bytes, each behind its
//! own copy of the headers (Documentation/networking/segmentation-offloads, net/ipv4/tcp_offload.c). The payload already lies in such
//! pieces with room between them ([`Shape`]); [`SuperPacket::split`] writes the headers into that room. It reads the payload once, for the
//! checksum, and moves none of it.
//!
//! Per segment *k* of payload offset *o*:
//!
//! | field | rule |
//! |---|---|
//! | IPv4 total length, IPv6 payload length | headers + this payload |
//! | IPv4 identification | first + k |
//! | TCP sequence number | first + o |
//! | TCP FIN, PSH | last segment only |
//! | TCP CWR | first segment only |
//! | UDP length | 8 + this payload |
//! | checksums | anew |

use std::ops::Range;

use crate::addr::Mtu;
use crate::dataplane::coalesce::Merge;
use crate::dataplane::packet::{MAX_HEADERS, Shape};
use crate::dataplane::stats::DropReason;
use crate::wire::checksum::Sum;
use crate::wire::ip::{Addrs, Fragment, IpHeader, V6_LEN, protocol};
use crate::wire::transport::{tcp, tcp_header_len, udp};
use crate::wire::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};

/// What a super-packet looks like, checked against its bytes.
#[derive(Clone, Copy, Debug)]
pub struct SuperPacket {
    ip: IpHeader,
    kind: GsoKind,
    /// All headers, bytes: what every segment carries a copy of.
    header_len: usize,
    /// Payload bytes a segment.
    size: usize,
}

impl SuperPacket {
    /// Checks that a packet, whose IP header is `ip` and which begins with `front`, is what `gso` says it is.
    ///
    /// # Errors
    /// [`DropReason::BadSuperPacket`] for a family, protocol, fragment or header length that does not fit.
    pub fn new(front: &[u8], ip: IpHeader, gso: Gso) -> Result<Self, DropReason> {
        let fits = match (gso.kind, ip.addrs, ip.protocol) {
            (GsoKind::TcpV4, Addrs::V4 { .. }, protocol::TCP) => true,
            (GsoKind::TcpV6, Addrs::V6 { .. }, protocol::TCP) => true,
            (GsoKind::Udp, Addrs::V4 { .. } | Addrs::V6 { .. }, protocol::UDP) => true,
            (GsoKind::TcpV4 | GsoKind::TcpV6 | GsoKind::Udp, Addrs::V4 { .. } | Addrs::V6 { .. }, _) => false,
        };
        if !fits || ip.fragment != Fragment::Whole || gso.size == 0 {
            return Err(DropReason::BadSuperPacket);
        }
        let l4 = front.get(ip.l4..).ok_or(DropReason::BadSuperPacket)?;
        let l4_header = match gso.kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => tcp_header_len(l4).map_err(|_| DropReason::BadSuperPacket)?,
            GsoKind::Udp if l4.len() >= udp::LEN => udp::LEN,
            GsoKind::Udp => return Err(DropReason::BadSuperPacket),
        };
        let header_len = ip.l4 + l4_header;
        if header_len > MAX_HEADERS || header_len >= ip.total_len {
            return Err(DropReason::BadSuperPacket);
        }
        Ok(Self {
            ip,
            kind: gso.kind,
            header_len,
            size: usize::from(gso.size),
        })
    }

    /// Length of the longest segment: all headers and one `gso.size` of payload, bytes.
    pub fn segment_len(&self) -> usize {
        self.header_len + self.size.min(self.ip.total_len - self.header_len)
    }

    /// Number of segments it makes.
    pub fn segments(&self) -> usize {
        (self.ip.total_len - self.header_len).div_ceil(self.size).max(1)
    }

    /// The shape its segments are sent from, with `encap_len` bytes of encapsulation before each.
    pub fn shape(&self, encap_len: usize) -> Shape {
        Shape {
            headers: self.header_len,
            size: self.size,
            gap: encap_len + self.header_len,
        }
    }

    /// Writes the headers of every segment into the gaps of `segments`: the packet in [its shape](Self::shape), from the first
    /// segment's encapsulation header on. `push` writes the encapsulation header of a segment, given its inner length.
    #[inline]
    pub fn split(&self, segments: &mut [u8], encap_len: usize, mut push: impl FnMut(&mut [u8], usize)) {
        let mut template = [0; MAX_HEADERS];
        let first = segments.get(encap_len..encap_len + self.header_len);
        let (Some(first), Some(template)) = (first, template.get_mut(..self.header_len)) else {
            return;
        };
        template.copy_from_slice(first);
        let sums = TemplateSums::new(self, template);
        let count = self.segments();
        for (index, segment) in segments.chunks_mut(self.shape(encap_len).stride()).enumerate() {
            let Some((encap, inner)) = segment.split_at_mut_checked(encap_len) else {
                return;
            };
            push(encap, inner.len());
            let Some((header, payload)) = inner.split_at_mut_checked(self.header_len) else {
                return;
            };
            header.copy_from_slice(template);
            let place = Place {
                index,
                offset: index * self.size,
                last: index + 1 == count,
            };
            self.patch(header, payload, place, &sums);
        }
    }

    /// Copies the packet into `out` in [its shape](Self::shape), with `encap_len` bytes of room before each segment.
    #[cold]
    pub fn spread(&self, packet: &[u8], encap_len: usize, out: &mut Vec<u8>) {
        out.clear();
        let (headers, payload) = packet.split_at(self.header_len.min(packet.len()));
        for piece in payload.chunks(self.size) {
            out.resize(out.len() + encap_len, 0);
            out.extend_from_slice(headers);
            out.extend_from_slice(piece);
        }
    }

    /// Turns a copy of the template into the header of one segment.
    #[inline]
    fn patch(&self, header: &mut [u8], payload: &[u8], place: Place, sums: &TemplateSums) {
        let Some((ip, l4)) = header.split_at_mut_checked(self.ip.l4) else {
            return;
        };
        let l4_len = l4.len() + payload.len();
        match self.ip.addrs {
            Addrs::V4 { .. } => {
                let total = to_u16(ip.len() + l4_len);
                let id = sums.first_id.wrapping_add(to_u16(place.index));
                put16(ip, 2, total);
                put16(ip, 4, id);
                put16(ip, 10, (sums.ip + Sum::word(total) + Sum::word(id)).finish());
            }
            Addrs::V6 { .. } => put16(ip, 4, to_u16(ip.len() - V6_LEN + l4_len)),
        }
        let sum = sums.l4 + Sum::long(u32::try_from(l4_len).unwrap_or(0)) + Sum::of(payload);
        match self.kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => {
                let seq = sums
                    .first_seq
                    .wrapping_add(u32::try_from(place.offset).unwrap_or(0));
                let mut flags = sums.flags;
                if !place.last {
                    flags &= !(tcp::FIN | tcp::PSH);
                }
                if place.index > 0 {
                    flags &= !tcp::CWR;
                }
                let sum = sum + Sum::long(seq) + Sum::word(u16::from_be_bytes([sums.data_offset, flags]));
                if let Some(field) = l4.get_mut(tcp::SEQ) {
                    field.copy_from_slice(&seq.to_be_bytes());
                }
                if let Some(field) = l4.get_mut(tcp::FLAGS) {
                    *field = flags;
                }
                put16(l4, tcp::CHECKSUM.start, sum.finish());
            }
            GsoKind::Udp => {
                put16(l4, udp::LENGTH.start, to_u16(l4_len));
                put16(
                    l4,
                    udp::CHECKSUM.start,
                    (sum + Sum::word(to_u16(l4_len))).finish_udp(),
                );
            }
        }
    }
}

/// Where a segment stands in its super-packet.
#[derive(Clone, Copy)]
struct Place {
    index: usize,
    offset: usize,
    last: bool,
}

/// Sums over the parts of the headers that all segments share.
struct TemplateSums {
    /// IPv4 header without total length, identification and checksum.
    ip: Sum,
    /// Pseudo header without the length, L4 header without the fields that change.
    l4: Sum,
    first_id: u16,
    first_seq: u32,
    data_offset: u8,
    flags: u8,
}

impl TemplateSums {
    fn new(packet: &SuperPacket, template: &[u8]) -> Self {
        let (ip, l4) = template.split_at_checked(packet.ip.l4).unwrap_or((template, &[]));
        let (ip_sum, first_id) = match packet.ip.addrs {
            Addrs::V4 { .. } => (
                part(ip, 0..2) + part(ip, 6..10) + part(ip, 12..ip.len()),
                u16::from_be_bytes(bytes(ip, 4)),
            ),
            Addrs::V6 { .. } => (Sum::ZERO, 0),
        };
        let l4_sum = match packet.kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => {
                part(l4, 0..4) + part(l4, 8..12) + part(l4, 14..16) + part(l4, 18..l4.len())
            }
            GsoKind::Udp => part(l4, 0..4),
        };
        Self {
            ip: ip_sum,
            l4: l4_sum + packet.ip.pseudo(0),
            first_id,
            first_seq: u32::from_be_bytes(bytes(l4, tcp::SEQ.start)),
            data_offset: l4.get(tcp::DATA_OFFSET).copied().unwrap_or(0),
            flags: l4.get(tcp::FLAGS).copied().unwrap_or(0),
        }
    }
}

/// Finishes the checksum of a plain packet that the device left half done.
///
/// The field holds the pseudo-header sum, so summing from `start` to the end and complementing is all there is to do.
///
/// # Errors
/// [`DropReason::BadSuperPacket`] if the field lies outside the packet.
pub fn finish_checksum(packet: &mut [u8], partial: PartialChecksum) -> Result<(), DropReason> {
    let l4 = packet
        .get_mut(usize::from(partial.start)..)
        .ok_or(DropReason::BadSuperPacket)?;
    let sum = Sum::of(l4);
    let at = usize::from(partial.offset);
    let field = l4.get_mut(at..at + 2).ok_or(DropReason::BadSuperPacket)?;
    // Zero means "no checksum" in UDP only (RFC 768); ffff is the same number, so it serves TCP as well.
    let value = if at == udp::CHECKSUM.start {
        sum.finish_udp()
    } else {
        sum.finish()
    };
    field.copy_from_slice(&value.to_be_bytes());
    Ok(())
}

/// Finds out what the sending kernel left to a network card that was not there, and what the device is to be told of it.
///
/// Where both ends share a machine (veth, virtio) a kernel's packets arrive with only the pseudo-header sum in the checksum field, TCP also
/// as super-packets of up to 64 KiB: one datagram, whose segment size nobody tells. A field that holds that sum by chance
/// is finished to itself. A TCP packet longer than the overlay's MTU is cut to the MTU whatever its checksum, if that is right.
///
/// Gives the header for the device; `None` for a packet that is complete, or has just been completed since the device takes no headers.
#[inline]
pub fn finish_for_kernel(
    packet: &mut [u8],
    ip: &IpHeader,
    inner_mtu: Mtu,
    merge: Merge,
) -> Option<VirtioHeader> {
    let at = match (ip.protocol, ip.fragment) {
        (protocol::TCP, Fragment::Whole) => tcp::CHECKSUM.start,
        (protocol::UDP, Fragment::Whole) => udp::CHECKSUM.start,
        _ => return None,
    };
    let pseudo = ip.pseudo(ip.l4_len());
    let l4 = packet.get_mut(ip.l4..)?;
    let field = u16::from_be_bytes(l4.get(at..at + 2)?.try_into().ok()?);
    // A kernel's own datagram fills its packet; what one of another length leaves out is in no checksum.
    let fills = ip.protocol == protocol::TCP
        || l4
            .get(udp::LENGTH)
            .is_some_and(|len| len == to_u16(l4.len()).to_be_bytes());
    let unfinished = fills && field == pseudo.fold();
    let is_super = ip.protocol == protocol::TCP && ip.total_len > usize::from(inner_mtu.bytes());
    let is_right = || (pseudo + Sum::of(l4)).fold() == 0xffff;
    if !(unfinished || is_super && is_right()) {
        return None;
    }
    let checksum = PartialChecksum {
        start: to_u16(ip.l4),
        offset: to_u16(at),
    };
    let gso = if is_super {
        let header_len = ip.l4 + tcp_header_len(l4).ok()?;
        put16(l4, at, pseudo.fold());
        Some(Gso {
            kind: match ip.addrs {
                Addrs::V4 { .. } => GsoKind::TcpV4,
                Addrs::V6 { .. } => GsoKind::TcpV6,
            },
            size: inner_mtu
                .bytes()
                .checked_sub(to_u16(header_len))
                .filter(|&size| size > 0)?,
            header_len: to_u16(header_len),
        })
    } else {
        None
    };
    // A device without headers gets super-packets segment by segment, and those are summed anew; all else is finished here.
    if gso.is_none() && !merge.tcp {
        finish_checksum(packet, checksum).ok()?;
        return None;
    }
    Some(VirtioHeader {
        checksum: Some(checksum),
        gso,
    })
}

#[inline]
fn part(bytes: &[u8], range: Range<usize>) -> Sum {
    bytes.get(range).map_or(Sum::ZERO, Sum::of)
}

/// `N` bytes at `at`, or zeros past the end.
#[inline]
fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    from.get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .unwrap_or([0; N])
}

#[inline]
fn put16(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&value.to_be_bytes());
    }
}

/// Lengths of parts of one IP packet fit 16 bits; the index of a segment wraps as the identification does.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
#[inline]
fn to_u16(value: usize) -> u16 {
    value as u16
}

#[cfg(test)]
pub(crate) mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::ip::verify_v4_header;

    /// Whether both checksums of a packet are right, each summed anew.
    pub(crate) fn checksums_hold(packet: &[u8]) -> bool {
        let ip = IpHeader::parse(packet).unwrap();
        let header = match ip.addrs {
            Addrs::V4 { .. } => verify_v4_header(&packet[..ip.l4]),
            Addrs::V6 { .. } => true,
        };
        header && (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..ip.total_len])).fold() == 0xffff
    }

    /// A packet of the wanted form with right checksums.
    pub(crate) fn packet(kind: GsoKind, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        match kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => {
                let builder = match kind {
                    GsoKind::TcpV4 => PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 2], 64),
                    GsoKind::TcpV6 | GsoKind::Udp => PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], 64),
                };
                builder
                    .tcp(40000, 5201, 0xffff_f000, 500)
                    .ack(77)
                    .options_raw(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8])
                    .unwrap()
                    .write(&mut out, payload)
                    .unwrap();
                let l4 = IpHeader::parse(&out).unwrap().l4;
                out[l4 + tcp::FLAGS] = flags;
                refresh(&mut out);
            }
            GsoKind::Udp => {
                PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 2], 64)
                    .udp(9, 10)
                    .write(&mut out, payload)
                    .unwrap();
            }
        }
        out
    }

    /// Computes the L4 checksum of a TCP packet anew.
    fn refresh(packet: &mut [u8]) {
        let ip = IpHeader::parse(packet).unwrap();
        packet[ip.l4 + 16..ip.l4 + 18].fill(0);
        let sum = (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..])).finish();
        packet[ip.l4 + 16..ip.l4 + 18].copy_from_slice(&sum.to_be_bytes());
    }

    /// Splits and joins each segment's header and payload.
    pub(crate) fn segments(packet: &[u8], kind: GsoKind, size: u16) -> Vec<Vec<u8>> {
        let ip = IpHeader::parse(packet).unwrap();
        let gso = Gso {
            kind,
            size,
            header_len: 0,
        };
        let super_packet = SuperPacket::new(packet, ip, gso).unwrap();
        let mut spread = Vec::new();
        super_packet.spread(packet, 0, &mut spread);
        super_packet.split(&mut spread, 0, |_, _| ());
        spread
            .chunks(super_packet.shape(0).stride())
            .map(<[u8]>::to_vec)
            .collect()
    }

    #[test]
    fn a_tcp_super_packet_becomes_right_segments() {
        let payload: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        for kind in [GsoKind::TcpV4, GsoKind::TcpV6] {
            let whole = packet(kind, tcp::ACK_FLAG | tcp::PSH | tcp::FIN | tcp::CWR, &payload);
            let parts = segments(&whole, kind, 1400);
            assert_eq!(parts.len(), 3, "{kind:?}");
            let l4 = IpHeader::parse(&whole).unwrap().l4;
            let mut joined = Vec::new();
            for (index, part) in parts.iter().enumerate() {
                assert!(checksums_hold(part), "{kind:?} segment {index}");
                let seq = u32::from_be_bytes(bytes(&part[l4..], 4));
                assert_eq!(
                    seq,
                    0xffff_f000u32.wrapping_add(index as u32 * 1400),
                    "sequence wraps"
                );
                let flags = part[l4 + tcp::FLAGS];
                assert_eq!(flags & tcp::CWR != 0, index == 0, "CWR");
                assert_eq!(flags & (tcp::FIN | tcp::PSH) != 0, index == 2, "FIN, PSH");
                if kind == GsoKind::TcpV4 {
                    assert_eq!(
                        u16::from_be_bytes([part[4], part[5]]),
                        index as u16,
                        "identification"
                    );
                }
                joined.extend_from_slice(&part[l4 + 32..]);
            }
            assert_eq!(joined, payload);
        }
    }

    #[test]
    fn a_udp_super_packet_becomes_datagrams() {
        let whole = packet(GsoKind::Udp, 0, &[5; 2500]);
        let parts = segments(&whole, GsoKind::Udp, 1000);
        assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [1028, 1028, 528]);
        assert!(parts.iter().all(|part| checksums_hold(part)));
        assert_eq!(&parts[2][24..26], &508u16.to_be_bytes());
    }

    #[test]
    fn what_does_not_fit_its_description_is_refused() {
        let tcp4 = packet(GsoKind::TcpV4, tcp::ACK_FLAG, &[1; 100]);
        let ip = IpHeader::parse(&tcp4).unwrap();
        let gso = |kind| Gso {
            kind,
            size: 10,
            header_len: 0,
        };
        assert!(SuperPacket::new(&tcp4, ip, gso(GsoKind::TcpV4)).is_ok());
        assert!(
            SuperPacket::new(&tcp4, ip, gso(GsoKind::TcpV6)).is_err(),
            "family"
        );
        assert!(
            SuperPacket::new(&tcp4, ip, gso(GsoKind::Udp)).is_err(),
            "protocol"
        );
        let fragment = IpHeader {
            fragment: Fragment::First,
            ..ip
        };
        assert!(
            SuperPacket::new(&tcp4, fragment, gso(GsoKind::TcpV4)).is_err(),
            "fragment"
        );
        let mut short = tcp4.clone();
        short[20 + tcp::DATA_OFFSET] = 0x40;
        assert!(
            SuperPacket::new(&short, ip, gso(GsoKind::TcpV4)).is_err(),
            "data offset"
        );
    }

    #[test]
    fn a_half_done_checksum_is_finished() {
        let whole = packet(GsoKind::TcpV4, tcp::ACK_FLAG, b"payload");
        let mut half = whole.clone();
        let ip = IpHeader::parse(&half).unwrap();
        let pseudo = ip.pseudo(ip.l4_len()).fold();
        half[36..38].copy_from_slice(&pseudo.to_be_bytes());
        finish_checksum(
            &mut half,
            PartialChecksum {
                start: 20,
                offset: 16,
            },
        )
        .unwrap();
        assert_eq!(half, whole);
        assert!(
            finish_checksum(
                &mut half,
                PartialChecksum {
                    start: 20,
                    offset: 60
                }
            )
            .is_err()
        );
        assert!(
            finish_checksum(
                &mut half,
                PartialChecksum {
                    start: 200,
                    offset: 0
                }
            )
            .is_err()
        );
    }

    #[test]
    fn a_datagram_shorter_than_its_packet_is_not_taken_for_half_done() {
        let mut whole = packet(GsoKind::Udp, 0, b"payload");
        let ip = IpHeader::parse(&whole).unwrap();
        let pseudo = ip.pseudo(ip.l4_len()).fold();
        put16(&mut whole, 26, pseudo);
        let finish = |packet: &mut [u8]| {
            let inner_mtu = Mtu::new(1450).unwrap();
            finish_for_kernel(packet, &ip, inner_mtu, Merge { tcp: true, udp: true })
        };
        assert!(finish(&mut whole).is_some());
        put16(&mut whole, 24, to_u16(ip.l4_len() - 2));
        let before = whole.clone();
        assert_eq!(finish(&mut whole), None);
        assert_eq!(whole, before);
    }

    proptest! {
        #[test]
        fn segments_carry_all_payload_with_right_checksums(
            payload in proptest::collection::vec(any::<u8>(), 1..6000),
            size in 1u16..3000,
            kind in prop_oneof![Just(GsoKind::TcpV4), Just(GsoKind::TcpV6), Just(GsoKind::Udp)],
        ) {
            let size = size.max(payload.len().div_ceil(200) as u16);
            let whole = packet(kind, tcp::ACK_FLAG, &payload);
            let ip = IpHeader::parse(&whole).unwrap();
            let header_len = whole.len() - payload.len();
            let parts = segments(&whole, kind, size);
            let joined: Vec<u8> = parts.iter().flat_map(|part| part[header_len..].to_vec()).collect();
            prop_assert_eq!(joined, payload);
            for part in &parts {
                prop_assert!(checksums_hold(part));
                prop_assert_eq!(IpHeader::parse(part).unwrap().total_len, part.len());
            }
            let gso = Gso { kind, size, header_len: 0 };
            prop_assert_eq!(SuperPacket::new(&whole, ip, gso).unwrap().segments(), parts.len());
        }

        #[test]
        fn hostile_descriptions_do_not_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
            version in prop_oneof![Just(0x45u8), Just(0x60), Just(0x4f)],
            size in 1u16..100,
            kind in prop_oneof![Just(GsoKind::TcpV4), Just(GsoKind::TcpV6), Just(GsoKind::Udp)],
        ) {
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            if let Ok(ip) = IpHeader::parse(&bytes)
                && let Ok(packet) = SuperPacket::new(&bytes, ip, Gso { kind, size, header_len: 0 })
            {
                let mut spread = Vec::new();
                packet.spread(&bytes, 0, &mut spread);
                let mut total = 0;
                packet.split(&mut spread, 0, |_, inner_len| total += inner_len);
                prop_assert_eq!(total, spread.len());
            }
        }
    }
}
