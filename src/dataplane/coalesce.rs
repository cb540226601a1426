//! Merging received segments back into super-packets, by the kernel's own GRO rules.
//!
//! # Theory of operation
//!
//! A [`Coalescer`] lives for one inbound batch. Every accepted packet is offered to it; [`Coalescer::slices`] then gives
//! what to write to the device, in order of each frame's first packet. Nothing is held for the next batch, so there are no timers.
//!
//! A packet joins the *newest* frame of its flow or starts a new one; so packets of a flow never change order, whatever is
//! between them. It may join only if the kernel could have made the same super-packet (net/ipv4/tcp_offload.c,
//! `tcp_gro_receive`; net/ipv4/udp_offload.c): same headers but for lengths, identification, sequence number and PSH; contiguous; of the
//! first one's size, or shorter and then the last; and with a checksum known to be right, since the merged packet hides a wrong one.
//!
//! Most packets of a coalesced run only continue what the one before began. [`Coalescer::extend`] sees that from the headers alone, byte
//! against byte, so that parsing, checking addresses and looking for the flow are done once a run.
//!
//! Payload stays in the receive buffer; a frame is a header of ours (virtio header, patched IP and L4 header) and slices of it.
//! A frame of one packet is that packet, untouched, behind an empty virtio header.
//!
//! Limits: 65,535 bytes and 64 segments a frame; no IPv4 options, extension headers or fragments in a merged frame.

use std::io::IoSlice;

use crate::dataplane::packet::MAX_PACKET;
use crate::wire::checksum::Sum;
use crate::wire::ip::{Addrs, Fragment, IpHeader, V4_LEN, V6_LEN, protocol, verify_v4_header};
use crate::wire::transport::{tcp, tcp_header_len, udp};
use crate::wire::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};

/// Segments merged into one frame at the most: the kernel's own limit for UDP before 6.9.
pub const MAX_SEGMENTS: usize = 64;
/// Slices of the longest frame: one header, then the segments.
pub const MAX_SLICES: usize = MAX_SEGMENTS + 1;
/// Older frames searched for one of the same flow.
const SEARCH: usize = 64;

/// What may be merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Merge {
    /// TCP over either family: the device takes virtio headers.
    pub tcp: bool,
    /// UDP: the device takes USO writes (Linux 6.2).
    pub udp: bool,
}

impl Merge {
    /// Nothing: every packet is written by itself.
    pub const NONE: Self = Self {
        tcp: false,
        udp: false,
    };
}

/// Whether somebody has verified a packet's L4 checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// The kernel verified a non-zero outer checksum over the whole datagram.
    Verified,
    /// Nobody: it is summed before it is merged.
    Unverified,
}

/// A packet in the receive buffer.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Where it starts in the buffer.
    pub at: usize,
    /// Its header, checked.
    pub ip: IpHeader,
    /// Whether its checksum is known to be right.
    pub trust: Trust,
    /// Hash of its flow.
    pub flow: u32,
    /// What the device is to do to it yet: it is written alone, behind this header.
    pub unfinished: Option<VirtioHeader>,
}

/// What kind of packet a frame can merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp {
        next_seq: u32,
    },
    Udp,
    /// Not to be merged: it stands alone.
    Alone,
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    flow: u32,
    kind: Kind,
    open: bool,
    /// First packet: place in the buffer and length.
    at: usize,
    len: usize,
    l4: usize,
    header_len: usize,
    /// Payload bytes of the first packet: the segment size.
    size: usize,
    payload: usize,
    segments: usize,
    next_id: u16,
    /// TCP flags of the last packet merged, for PSH.
    push: u8,
    verified: bool,
    first: u32,
    last: u32,
    /// What the device is to do to a packet that stands alone.
    unfinished: Option<VirtioHeader>,
    /// Where the header of a merged or unfinished frame starts in the arena, once it is made.
    header_at: usize,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    at: u32,
    len: u32,
    next: u32,
}

const END: u32 = u32::MAX;

/// Merges the packets of one batch.
#[derive(Debug)]
pub struct Coalescer {
    merge: Merge,
    frames: Vec<Frame>,
    pieces: Vec<Piece>,
    headers: Vec<u8>,
    /// The frame the last packet went into, if another may follow it there.
    current: Option<usize>,
}

/// The virtio header of a packet that stands alone.
const PLAIN: [u8; VirtioHeader::LEN] = [0; VirtioHeader::LEN];

impl Coalescer {
    /// With memory for a full batch.
    pub fn new(merge: Merge) -> Self {
        Self {
            merge,
            frames: Vec::with_capacity(8192),
            pieces: Vec::with_capacity(8192),
            headers: Vec::with_capacity(64 * 1024),
            current: None,
        }
    }

    /// What it merges.
    pub fn merge(&self) -> Merge {
        self.merge
    }

    /// Changes what it merges, from the next batch on.
    pub fn set_merge(&mut self, merge: Merge) {
        self.merge = merge;
    }

    /// Forgets the frames, keeps the memory.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.pieces.clear();
        self.headers.clear();
        self.current = None;
    }

    /// Takes a packet of `buffer` into the newest frame of its flow, or as a new frame; gives how many packets it is: a super-packet counts
    /// as its segments.
    #[inline]
    pub fn offer(&mut self, buffer: &[u8], offer: Offer) -> usize {
        let Some(packet) = buffer.get(offer.at..offer.at + offer.ip.total_len) else {
            return 0;
        };
        let candidate = match offer.unfinished {
            None => Candidate::of(packet, &offer.ip, self.merge),
            Some(_) => None,
        };
        if let Some(candidate) = candidate
            && let Some(index) = self.newest(offer.flow)
            && self.join(index, buffer, packet, offer, candidate)
        {
            self.current = Some(index);
            return 1;
        }
        self.current = candidate.map(|_| self.frames.len());
        let (kind, header_len, flags) = match candidate {
            Some(Candidate::Tcp {
                header_len,
                seq,
                flags,
            }) => {
                let payload = packet.len() - header_len;
                (
                    Kind::Tcp {
                        next_seq: seq.wrapping_add(len32(payload)),
                    },
                    header_len,
                    flags,
                )
            }
            Some(Candidate::Udp) => (Kind::Udp, offer.ip.l4 + udp::LEN, 0),
            None => (Kind::Alone, offer.ip.l4, 0),
        };
        let size = packet.len().saturating_sub(header_len);
        let piece = self.piece(offer.at + header_len, size);
        self.frames.push(Frame {
            flow: offer.flow,
            kind,
            open: kind != Kind::Alone && flags & tcp::PSH == 0,
            at: offer.at,
            len: packet.len(),
            l4: offer.ip.l4,
            header_len,
            size,
            payload: size,
            segments: 1,
            next_id: be16(packet, 4).wrapping_add(1),
            push: flags & tcp::PSH,
            verified: offer.trust == Trust::Verified,
            first: piece,
            last: piece,
            unfinished: offer.unfinished,
            header_at: 0,
        });
        self.segments(self.frames.len() - 1)
    }

    /// Writes the headers of merged frames; after this [`Self::slices`] may be called.
    pub fn finish(&mut self, buffer: &[u8]) {
        for frame in &mut self.frames {
            if frame.segments == 1 {
                if let Some(header) = frame.unfinished {
                    frame.header_at = self.headers.len();
                    self.headers.extend_from_slice(&header.emit());
                }
                continue;
            }
            let Some(template) = buffer.get(frame.at..frame.at + frame.header_len) else {
                continue;
            };
            frame.header_at = self.headers.len();
            self.headers.extend_from_slice(&PLAIN);
            self.headers.extend_from_slice(template);
            if let Some((virtio, header)) = self
                .headers
                .get_mut(frame.header_at..)
                .and_then(|all| all.split_at_mut_checked(10))
            {
                let described = frame.patch(header);
                virtio.copy_from_slice(&described.emit());
            }
        }
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many packets frame `index` holds; a super-packet that came as one counts as its segments.
    pub fn segments(&self, index: usize) -> usize {
        self.frames
            .get(index)
            .map_or(0, |frame| match frame.unfinished.and_then(|header| header.gso) {
                None => frame.segments,
                Some(gso) => (frame.len - usize::from(gso.header_len)).div_ceil(usize::from(gso.size)),
            })
    }

    /// Whether frame `index` is a packet that came with work left for the device.
    pub fn is_unfinished(&self, index: usize) -> bool {
        self.frames
            .get(index)
            .is_some_and(|frame| frame.unfinished.is_some())
    }

    /// The pieces of frame `index`, virtio header first, into `out`; gives how many there are.
    #[inline]
    pub fn slices<'a>(
        &'a self,
        index: usize,
        buffer: &'a [u8],
        out: &mut [IoSlice<'a>; MAX_SLICES],
    ) -> usize {
        let Some(frame) = self.frames.get(index) else {
            return 0;
        };
        if frame.segments == 1 {
            out[0] = match frame.unfinished {
                None => IoSlice::new(&PLAIN),
                Some(_) => IoSlice::new(&self.headers[frame.header_at..frame.header_at + VirtioHeader::LEN]),
            };
            out[1] = IoSlice::new(&buffer[frame.at..frame.at + frame.len]);
            return 2;
        }
        let header = frame.header_at..frame.header_at + VirtioHeader::LEN + frame.header_len;
        out[0] = IoSlice::new(&self.headers[header]);
        let mut filled = 1;
        let mut next = frame.first;
        while let (Some(piece), Some(slot)) = (self.pieces.get(next as usize), out.get_mut(filled)) {
            *slot = IoSlice::new(&buffer[piece.at as usize..(piece.at + piece.len) as usize]);
            filled += 1;
            next = piece.next;
        }
        filled
    }

    #[inline]
    fn newest(&self, flow: u32) -> Option<usize> {
        let searched = self.frames.iter().enumerate().rev().take(SEARCH);
        searched
            .into_iter()
            .find(|(_, frame)| frame.flow == flow)
            .map(|(index, _)| index)
    }

    fn piece(&mut self, at: usize, len: usize) -> u32 {
        self.pieces.push(Piece {
            at: len32(at),
            len: len32(len),
            next: END,
        });
        len32(self.pieces.len() - 1)
    }

    /// Whether the packet could join frame `index`, and did.
    #[inline]
    fn join(
        &mut self,
        index: usize,
        buffer: &[u8],
        packet: &[u8],
        offer: Offer,
        candidate: Candidate,
    ) -> bool {
        let frame = &self.frames[index];
        let header_len = candidate.header_len(&offer.ip);
        let payload = packet.len() - header_len;
        let fits = frame.open
            && frame.segments < MAX_SEGMENTS
            && frame.l4 == offer.ip.l4
            && frame.header_len == header_len
            && payload <= frame.size
            && frame.header_len + frame.payload + payload <= MAX_PACKET;
        if !fits {
            return false;
        }
        let Some(first) = buffer.get(frame.at..frame.at + frame.len) else {
            return false;
        };
        if !same_ip(first, packet, frame.next_id) || ttl_of(first) != ttl_of(packet) {
            return false;
        }
        let kind = match (frame.kind, candidate) {
            (Kind::Tcp { next_seq }, Candidate::Tcp { seq, .. })
                if seq == next_seq && same_tcp(first, packet, offer.ip.l4, header_len) =>
            {
                Kind::Tcp {
                    next_seq: seq.wrapping_add(len32(payload)),
                }
            }
            (Kind::Udp, Candidate::Udp)
                if first.get(frame.l4..frame.l4 + 4) == packet.get(frame.l4..frame.l4 + 4) =>
            {
                Kind::Udp
            }
            (Kind::Tcp { .. } | Kind::Udp | Kind::Alone, Candidate::Tcp { .. } | Candidate::Udp) => {
                return false;
            }
        };
        let verified = frame.verified || checksum_holds(first, &offer.ip);
        let joins = verified && (offer.trust == Trust::Verified || checksum_holds(packet, &offer.ip));
        self.frames[index].verified = verified;
        if !joins {
            return false;
        }
        let flags = match candidate {
            Candidate::Tcp { flags, .. } => flags,
            Candidate::Udp => 0,
        };
        self.append(
            index,
            offer.at + header_len,
            payload,
            Last {
                kind,
                id: be16(packet, 4),
                flags,
            },
        );
        true
    }

    /// Takes a packet at `at..end` of `buffer` into the frame of the packet before it, if it only continues that one: same headers but for
    /// lengths, identification, sequence number and PSH, and a TTL of `ttl`. Its checksum must be known to be right.
    ///
    /// What it takes needs no further check: addresses, ports and options are those of a packet that was offered. `false` leaves it to
    /// the long way.
    #[inline]
    pub fn extend(&mut self, buffer: &[u8], at: usize, end: usize, ttl: u8) -> bool {
        let Some((index, frame)) = self
            .current
            .and_then(|index| Some((index, self.frames.get(index)?)))
        else {
            return false;
        };
        let header_len = frame.header_len;
        let l4 = frame.l4;
        let payload = (end - at).saturating_sub(header_len);
        let fits = frame.open
            && frame.verified
            && frame.segments < MAX_SEGMENTS
            && payload > 0
            && payload <= frame.size
            && header_len + frame.payload + payload <= MAX_PACKET;
        if !fits {
            return false;
        }
        let first = buffer.get(frame.at..frame.at + header_len);
        let (Some(first), Some(header)) = (first, buffer.get(at..at + header_len)) else {
            return false;
        };
        let whole = match header.first().map(|first| first >> 4) {
            Some(4) => {
                usize::from(be16(header, 2)) == end - at && header.get(..V4_LEN).is_some_and(verify_v4_header)
            }
            Some(6) => usize::from(be16(header, 4)) + V6_LEN == end - at,
            Some(_) | None => false,
        };
        if !whole || ttl_of(header) != Some(ttl) || !same_ip(first, header, frame.next_id) {
            return false;
        }
        let (kind, flags) = match frame.kind {
            Kind::Tcp { next_seq } => {
                if be32(header, l4 + tcp::SEQ.start) != next_seq || !same_tcp(first, header, l4, header_len) {
                    return false;
                }
                let flags = header.get(l4 + tcp::FLAGS).copied().unwrap_or(0);
                (
                    Kind::Tcp {
                        next_seq: next_seq.wrapping_add(len32(payload)),
                    },
                    flags,
                )
            }
            Kind::Udp => {
                let same = first.get(l4..l4 + 4) == header.get(l4..l4 + 4)
                    && usize::from(be16(header, l4 + udp::LENGTH.start)) == udp::LEN + payload
                    && be16(header, l4 + udp::CHECKSUM.start) != 0;
                if !same {
                    return false;
                }
                (Kind::Udp, 0)
            }
            Kind::Alone => return false,
        };
        self.append(
            index,
            at + header_len,
            payload,
            Last {
                kind,
                id: be16(header, 4),
                flags,
            },
        );
        true
    }

    /// Appends a payload to frame `index`.
    #[inline]
    fn append(&mut self, index: usize, at: usize, payload: usize, last: Last) {
        let piece = self.piece(at, payload);
        let frame = &mut self.frames[index];
        self.pieces[frame.last as usize].next = piece;
        frame.last = piece;
        frame.kind = last.kind;
        frame.segments += 1;
        frame.payload += payload;
        frame.next_id = last.id.wrapping_add(1);
        frame.push |= last.flags & tcp::PSH;
        frame.open = payload == frame.size && frame.push == 0;
    }
}

/// What a frame is to remember of the packet merged last.
struct Last {
    kind: Kind,
    id: u16,
    flags: u8,
}

impl Frame {
    /// Turns a copy of the first packet's header into that of the merged packet; gives its description.
    fn patch(&self, header: &mut [u8]) -> VirtioHeader {
        let l4_len = self.header_len - self.l4 + self.payload;
        let total = self.l4 + l4_len;
        let v4 = header.first().is_some_and(|first| first >> 4 == 4);
        if v4 {
            put16(header, 2, total);
            put16(header, 10, 0);
            let sum = header.get(..V4_LEN).map_or(0, |ip| Sum::of(ip).finish());
            put16(header, 10, usize::from(sum));
        } else {
            put16(header, 4, total - V6_LEN);
        }
        // The kernel finishes the checksum if it must; it wants the pseudo-header sum in the field.
        let pseudo = |addresses: std::ops::Range<usize>, protocol: u8, header: &[u8]| {
            let addresses = header.get(addresses).map_or(Sum::ZERO, Sum::of);
            (addresses + Sum::word(u16::from(protocol)) + Sum::long(len32(l4_len))).fold()
        };
        let addresses = if v4 { 12..20 } else { 8..40 };
        let (kind, offset) = match self.kind {
            Kind::Tcp { .. } | Kind::Alone => {
                let sum = pseudo(addresses, protocol::TCP, header);
                put16(header, self.l4 + tcp::CHECKSUM.start, usize::from(sum));
                if let Some(flags) = header.get_mut(self.l4 + tcp::FLAGS) {
                    *flags |= self.push;
                }
                (
                    if v4 { GsoKind::TcpV4 } else { GsoKind::TcpV6 },
                    tcp::CHECKSUM.start,
                )
            }
            Kind::Udp => {
                put16(header, self.l4 + udp::LENGTH.start, l4_len);
                let sum = pseudo(addresses, protocol::UDP, header);
                put16(header, self.l4 + udp::CHECKSUM.start, usize::from(sum));
                (GsoKind::Udp, udp::CHECKSUM.start)
            }
        };
        VirtioHeader {
            checksum: Some(PartialChecksum {
                start: len16(self.l4),
                offset: len16(offset),
            }),
            gso: Some(Gso {
                kind,
                size: len16(self.size),
                header_len: len16(self.header_len),
            }),
        }
    }
}

/// A packet that might be merged, by itself.
#[derive(Clone, Copy, Debug)]
enum Candidate {
    Tcp { header_len: usize, seq: u32, flags: u8 },
    Udp,
}

impl Candidate {
    #[inline]
    fn of(packet: &[u8], ip: &IpHeader, merge: Merge) -> Option<Self> {
        // No options and no extension headers: the L4 header follows the fixed one.
        let plain = match ip.addrs {
            Addrs::V4 { .. } => ip.l4 == V4_LEN,
            Addrs::V6 { .. } => ip.l4 == V6_LEN,
        };
        if !plain || ip.fragment != Fragment::Whole {
            return None;
        }
        let l4 = packet.get(ip.l4..)?;
        match ip.protocol {
            protocol::TCP if merge.tcp => {
                let header_len = ip.l4 + tcp_header_len(l4).ok()?;
                let flags = *l4.get(tcp::FLAGS)?;
                let data_only = flags & !(tcp::PSH | tcp::ECE) == tcp::ACK_FLAG;
                (data_only && packet.len() > header_len).then_some(Self::Tcp {
                    header_len,
                    seq: u32::from_be_bytes([l4[4], l4[5], l4[6], l4[7]]),
                    flags,
                })
            }
            protocol::UDP if merge.udp => {
                let whole = l4.len() > udp::LEN && usize::from(be16(l4, udp::LENGTH.start)) == l4.len();
                (whole && be16(l4, udp::CHECKSUM.start) != 0).then_some(Self::Udp)
            }
            _ => None,
        }
    }

    #[inline]
    fn header_len(self, ip: &IpHeader) -> usize {
        match self {
            Self::Tcp { header_len, .. } => header_len,
            Self::Udp => ip.l4 + udp::LEN,
        }
    }
}

/// Same IP header but for length, identification, TTL and checksum; identification next in line, or both fixed under DF.
#[inline]
fn same_ip(first: &[u8], packet: &[u8], next_id: u16) -> bool {
    match (first.first_chunk::<V4_LEN>(), packet.first_chunk::<V4_LEN>()) {
        (Some(a), Some(b)) if a[0] == 0x45 => {
            let id = u16::from_be_bytes([b[4], b[5]]);
            let dont_fragment = b[6] & 0x40 != 0;
            let id_fits = id == next_id || (dont_fragment && a[4..6] == b[4..6]);
            id_fits && a[0..2] == b[0..2] && a[6..8] == b[6..8] && a[9] == b[9] && a[12..20] == b[12..20]
        }
        (Some(_), Some(_)) => match (first.first_chunk::<V6_LEN>(), packet.first_chunk::<V6_LEN>()) {
            (Some(a), Some(b)) => a[0..4] == b[0..4] && a[6] == b[6] && a[8..40] == b[8..40],
            _ => false,
        },
        _ => false,
    }
}

/// TTL or hop limit.
#[inline]
fn ttl_of(packet: &[u8]) -> Option<u8> {
    packet.get(if packet.first()? >> 4 == 4 { 8 } else { 7 }).copied()
}

/// Same TCP header but for sequence number, PSH and checksum.
#[inline]
fn same_tcp(first: &[u8], packet: &[u8], l4: usize, header_len: usize) -> bool {
    let same = |range: std::ops::Range<usize>| first.get(range.clone()) == packet.get(range);
    let flags = |bytes: &[u8]| bytes.get(l4 + tcp::FLAGS).map(|flags| flags & !tcp::PSH);
    same(l4..l4 + 4)
        && same(l4 + tcp::ACK.start..l4 + tcp::FLAGS)
        && flags(first) == flags(packet)
        && same(l4 + tcp::WINDOW.start..l4 + tcp::WINDOW.end)
        && same(l4 + tcp::MIN_LEN - 2..header_len)
}

/// Whether the L4 checksum is right; addresses are those of `ip`, lengths the packet's own.
#[inline]
fn checksum_holds(packet: &[u8], ip: &IpHeader) -> bool {
    packet
        .get(ip.l4..)
        .is_some_and(|l4| (ip.pseudo(l4.len()) + Sum::of(l4)).fold() == 0xffff)
}

#[inline]
fn be16(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

#[inline]
fn be32(bytes: &[u8], at: usize) -> u32 {
    match bytes.get(at..at + 4) {
        Some(&[a, b, c, d]) => u32::from_be_bytes([a, b, c, d]),
        _ => 0,
    }
}

#[inline]
fn put16(bytes: &mut [u8], at: usize, value: usize) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&len16(value).to_be_bytes());
    }
}

/// Offsets into the receive buffer (4 MiB) and lengths of packets fit 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
#[inline]
fn len32(value: usize) -> u32 {
    value as u32
}

/// Lengths within one packet fit 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
#[inline]
fn len16(value: usize) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dataplane::offload::finish_checksum;
    use crate::dataplane::offload::tests::{checksums_hold, packet, segments};
    use crate::wire::ip::verify_v4_header;

    const ALL: Merge = Merge { tcp: true, udp: true };

    /// Offers packets, gives the frames: how many packets each has, and its bytes behind the virtio header.
    fn coalesce(packets: &[Vec<u8>], merge: Merge, trust: Trust) -> Vec<(usize, VirtioHeader, Vec<u8>)> {
        let buffer: Vec<u8> = packets.concat();
        let mut coalescer = Coalescer::new(merge);
        let mut at = 0;
        for packet in packets {
            let ip = IpHeader::parse(packet).unwrap();
            let ports = &packet[ip.l4..ip.l4 + 4];
            let flow = ports
                .iter()
                .fold(u32::from(ip.protocol), |hash, &byte| hash * 31 + u32::from(byte));
            coalescer.offer(
                &buffer,
                Offer {
                    at,
                    ip,
                    trust,
                    flow,
                    unfinished: None,
                },
            );
            at += packet.len();
        }
        coalescer.finish(&buffer);
        (0..coalescer.len())
            .map(|index| {
                let mut slices = [IoSlice::new(&[]); MAX_SLICES];
                let filled = coalescer.slices(index, &buffer, &mut slices);
                let bytes: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
                let (header, rest) = VirtioHeader::parse(&bytes).unwrap();
                (coalescer.segments(index), header, rest.to_vec())
            })
            .collect()
    }

    fn counts(packets: &[Vec<u8>]) -> Vec<usize> {
        coalesce(packets, ALL, Trust::Unverified)
            .iter()
            .map(|frame| frame.0)
            .collect()
    }

    /// Changes a byte and mends the checksums.
    fn edit(mut packet: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
        packet[at] = value;
        packet[10..12].fill(0);
        let sum = Sum::of(&packet[..20]).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        let ip = IpHeader::parse(&packet).unwrap();
        let field = ip.l4 + if ip.protocol == protocol::TCP { 16 } else { 6 };
        packet[field..field + 2].fill(0);
        let sum = (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..])).finish();
        packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn stream(segments_of: usize) -> Vec<Vec<u8>> {
        segments(
            &packet(GsoKind::TcpV4, tcp::ACK_FLAG, &vec![3; segments_of * 100]),
            GsoKind::TcpV4,
            100,
        )
    }

    #[test]
    fn a_stream_becomes_one_frame() {
        let frames = coalesce(&stream(5), ALL, Trust::Verified);
        assert_eq!(frames.len(), 1);
        let (count, header, bytes) = &frames[0];
        assert_eq!(*count, 5);
        assert_eq!(
            header.gso,
            Some(Gso {
                kind: GsoKind::TcpV4,
                size: 100,
                header_len: 52
            })
        );
        assert!(verify_v4_header(&bytes[..20]));
        let mut whole = bytes.clone();
        finish_checksum(&mut whole, header.checksum.unwrap()).unwrap();
        assert!(checksums_hold(&whole));
    }

    #[test]
    fn a_packet_alone_is_untouched() {
        let packets = stream(1);
        let frames = coalesce(&packets, ALL, Trust::Verified);
        assert_eq!(frames[0].1, VirtioHeader::default());
        assert_eq!(frames[0].2, packets[0]);
    }

    #[test]
    fn push_ends_a_frame_and_shows_in_it() {
        let whole = packet(GsoKind::TcpV4, tcp::ACK_FLAG | tcp::PSH, &[3; 300]);
        let mut packets = segments(&whole, GsoKind::TcpV4, 100);
        packets.push(edit(edit(packets[2].clone(), 26, 0xf1), 27, 0x2c));
        let frames = coalesce(&packets, ALL, Trust::Verified);
        assert_eq!(frames.iter().map(|frame| frame.0).collect::<Vec<_>>(), [3, 1]);
        assert_ne!(frames[0].2[20 + tcp::FLAGS] & tcp::PSH, 0);
    }

    #[test]
    fn what_the_kernel_would_not_merge_is_not_merged() {
        let base = stream(2);
        for (what, at, value) in [
            ("ToS", 1, 1),
            ("identification", 5, 9),
            ("TTL", 8, 63),
            ("fragment bits", 6, 0x20),
            ("acknowledgement", 20 + 11, 9),
            ("SYN", 20 + tcp::FLAGS, tcp::ACK_FLAG | 2),
            ("FIN", 20 + tcp::FLAGS, tcp::ACK_FLAG | tcp::FIN),
            ("ECE", 20 + tcp::FLAGS, tcp::ACK_FLAG | tcp::ECE),
            ("CWR", 20 + tcp::FLAGS, tcp::ACK_FLAG | tcp::CWR),
            ("window", 20 + 15, 9),
            ("options", 20 + 30, 9),
            ("sequence", 20 + 7, 9),
            ("source port", 20, 9),
        ] {
            let packets = vec![base[0].clone(), edit(base[1].clone(), at, value)];
            assert_eq!(counts(&packets), [1, 1], "{what}");
        }
        assert_eq!(counts(&base), [2], "and unchanged they are");
    }

    #[test]
    fn without_df_identifications_must_count_up_and_with_df_they_may_stand() {
        let base = stream(2);
        let same_id = edit(base[1].clone(), 5, base[0][5]);
        assert_eq!(base[0][6] & 0x40, 0x40, "the builder sets DF");
        assert_eq!(counts(&[base[0].clone(), same_id.clone()]), [2]);
        assert_eq!(
            counts(&[edit(base[0].clone(), 6, 0), edit(same_id, 6, 0)]),
            [1, 1]
        );
        assert_eq!(
            counts(&[edit(base[0].clone(), 6, 0), edit(base[1].clone(), 6, 0)]),
            [2]
        );
    }

    #[test]
    fn a_wrong_checksum_is_never_hidden() {
        let mut packets = stream(3);
        packets[1][60] ^= 1;
        assert_eq!(counts(&packets), [1, 1, 1]);
        let frames = coalesce(&packets, ALL, Trust::Unverified);
        assert_eq!(frames[1].2, packets[1], "it goes on as it came");
        let mut packets = stream(2);
        packets[0][60] ^= 1;
        assert_eq!(counts(&packets), [1, 1], "nor in the first");
    }

    #[test]
    fn a_shorter_segment_is_the_last() {
        let whole = packet(GsoKind::TcpV4, tcp::ACK_FLAG, &[3; 250]);
        let mut packets = segments(&whole, GsoKind::TcpV4, 100);
        assert_eq!(counts(&packets), [3]);
        // A longer one cannot follow either.
        packets.remove(0);
        packets.reverse();
        assert_eq!(counts(&packets), [1, 1]);
    }

    #[test]
    fn order_within_a_flow_survives_whatever_lies_between() {
        let data = stream(4);
        let ack = edit(packet(GsoKind::TcpV4, tcp::ACK_FLAG, b""), 5, 40);
        let packets = vec![
            data[0].clone(),
            data[1].clone(),
            ack.clone(),
            data[2].clone(),
            data[3].clone(),
        ];
        let frames = coalesce(&packets, ALL, Trust::Verified);
        assert_eq!(frames.iter().map(|frame| frame.0).collect::<Vec<_>>(), [2, 1, 2]);
        assert_eq!(frames[1].2, ack);
    }

    #[test]
    fn flows_that_alternate_are_merged_apart() {
        let one = stream(3);
        let two: Vec<_> = one.iter().map(|packet| edit(packet.clone(), 21, 7)).collect();
        let packets: Vec<_> = one
            .iter()
            .zip(&two)
            .flat_map(|(a, b)| [a.clone(), b.clone()])
            .collect();
        assert_eq!(counts(&packets), [3, 3]);
    }

    #[test]
    fn datagrams_merge_only_when_allowed() {
        let parts = segments(&packet(GsoKind::Udp, 0, &[9; 350]), GsoKind::Udp, 100);
        let frames = coalesce(&parts, ALL, Trust::Unverified);
        assert_eq!(frames.len(), 1);
        assert_eq!(frames[0].1.gso.unwrap().kind, GsoKind::Udp);
        let off = Merge {
            tcp: true,
            udp: false,
        };
        assert_eq!(coalesce(&parts, off, Trust::Verified).len(), 4);
        let mut no_checksum = parts.clone();
        no_checksum[1][26..28].fill(0);
        assert_eq!(
            counts(&no_checksum)[0],
            1,
            "a datagram without checksum stands alone"
        );
    }

    #[test]
    fn a_frame_ends_at_64_kib_and_64_segments() {
        let long = packet(GsoKind::TcpV4, tcp::ACK_FLAG, &vec![1; 60_000]);
        let mut packets = segments(&long, GsoKind::TcpV4, 1400);
        packets.pop();
        let more: Vec<_> = packets
            .iter()
            .enumerate()
            .map(|(index, packet)| {
                let seq = 0xffff_f000u32
                    .wrapping_add((packets.len() + index) as u32 * 1400)
                    .to_be_bytes();
                let id = ((packets.len() + index) as u16).to_be_bytes();
                let mut packet = packet.clone();
                packet[24..28].copy_from_slice(&seq);
                packet[4] = id[0];
                edit(packet, 5, id[1])
            })
            .collect();
        packets.extend(more);
        let frames = coalesce(&packets, ALL, Trust::Unverified);
        assert_eq!(frames[0].0, (65_535 - 52) / 1400);
        assert!(frames.iter().all(|frame| frame.2.len() <= 65_535));

        let small = segments(
            &packet(GsoKind::TcpV4, tcp::ACK_FLAG, &[1; 1000]),
            GsoKind::TcpV4,
            10,
        );
        assert_eq!(counts(&small), [64, 36]);
    }

    proptest! {
        #[test]
        fn splitting_what_was_coalesced_gives_the_segments_back(
            payload in proptest::collection::vec(any::<u8>(), 1..20_000),
            size in 400u16..1500,
            flags in prop_oneof![Just(tcp::ACK_FLAG), Just(tcp::ACK_FLAG | tcp::PSH), Just(tcp::ACK_FLAG | tcp::ECE)],
            kind in prop_oneof![Just(GsoKind::TcpV4), Just(GsoKind::TcpV6), Just(GsoKind::Udp)],
        ) {
            let whole = packet(kind, flags, &payload);
            let parts = segments(&whole, kind, size);
            let frames = coalesce(&parts, ALL, Trust::Unverified);
            prop_assert_eq!(frames.len(), 1);
            let again = match frames[0].1.gso {
                Some(gso) => segments(&frames[0].2, gso.kind, gso.size),
                None => vec![frames[0].2.clone()],
            };
            prop_assert_eq!(again, parts);
        }

        #[test]
        fn nothing_is_lost_and_nothing_invented(
            picks in proptest::collection::vec((0usize..3, 1usize..40), 1..60),
        ) {
            // Three flows, each a stream of segments of random size, interleaved at random.
            let mut seqs = [0u32; 3];
            let mut packets = Vec::new();
            for (flow, size) in picks {
                let kind = [GsoKind::TcpV4, GsoKind::TcpV6, GsoKind::Udp][flow];
                let mut packet = packet(kind, tcp::ACK_FLAG, &vec![flow as u8; size]);
                let ip = IpHeader::parse(&packet).unwrap();
                if kind != GsoKind::Udp {
                    packet[ip.l4 + 4..ip.l4 + 8].copy_from_slice(&seqs[flow].to_be_bytes());
                    packet[ip.l4 + 16..ip.l4 + 18].fill(0);
                    let sum = (ip.pseudo(ip.l4_len()) + Sum::of(&packet[ip.l4..])).finish();
                    packet[ip.l4 + 16..ip.l4 + 18].copy_from_slice(&sum.to_be_bytes());
                }
                seqs[flow] = seqs[flow].wrapping_add(size as u32);
                packets.push(packet);
            }
            let frames = coalesce(&packets, ALL, Trust::Unverified);
            // Per flow, in order: the segments of all frames are the packets that went in, identification apart.
            for flow in 0..3 {
                let of_flow = |packet: &Vec<u8>| {
                    let ip = IpHeader::parse(packet).unwrap();
                    [GsoKind::TcpV4, GsoKind::TcpV6, GsoKind::Udp][flow]
                        == match (ip.protocol, ip.addrs) {
                            (protocol::UDP, _) => GsoKind::Udp,
                            (_, Addrs::V4 { .. }) => GsoKind::TcpV4,
                            (_, Addrs::V6 { .. }) => GsoKind::TcpV6,
                        }
                };
                let went_in: Vec<_> = packets.iter().filter(|packet| of_flow(packet)).map(|packet| packet[24..].to_vec()).collect();
                let came_out: Vec<_> = frames
                    .iter()
                    .filter(|frame| of_flow(&frame.2))
                    .flat_map(|frame| match frame.1.gso {
                        Some(gso) => segments(&frame.2, gso.kind, gso.size),
                        None => vec![frame.2.clone()],
                    })
                    .map(|packet| packet[24..].to_vec())
                    .collect();
                prop_assert_eq!(&went_in, &came_out);
            }
        }
    }
}
