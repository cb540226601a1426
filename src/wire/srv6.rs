//! Segment routing over IPv6: the outer IPv6 header, the segment routing header (RFC 8754 §2), its HMAC, and compressed SIDs (RFC 9800).
//!
//! ```text
//! outer IPv6: version 4 = 6 | traffic class 8 | flow label 20 | payload length 16 | next header 8 | hop limit 8 | source 128 | destination 128
//! SRH:        next header 8 | length 8 | routing type 8 = 4 | segments left 8 | last entry 8 | flags 8 | tag 16
//!             | list[0] 128 | … | list[last entry] 128 | TLVs
//! ```
//!
//! The length counts units of 8 bytes behind the first 8. The list is stored backwards: `list[0]` is the last segment of
//! the path, and the destination is `list[segments left]`. A *reduced* list leaves the first segment out, for it is the
//! destination already; then segments left is one more than last entry.
//!
//! Input goes through [`OuterHeader::parse`], [`Srh::parse`] and [`walk`]; what they return cannot panic. Output is a [`Template`],
//! made once for a path and copied before each packet.

use std::fmt;
use std::net::Ipv6Addr;

use thiserror::Error;

use super::Malformed;
use super::ip::V6_LEN;

use self::hmac::HmacText;

mod csid;
mod hmac;

pub use self::csid::{CsidError, CsidFormat};
pub use self::hmac::{HmacAlgorithm, HmacError, HmacKey, HmacTlv, SecretLength};

/// Next header values (IANA) of an outer packet.
pub mod next_header {
    /// Hop-by-hop options, RFC 8200 §4.3.
    pub const HOP_BY_HOP: u8 = 0;
    /// An IPv4 packet.
    pub const IPV4: u8 = 4;
    /// An IPv6 packet.
    pub const IPV6: u8 = 41;
    /// A routing header, RFC 8200 §4.4.
    pub const ROUTING: u8 = 43;
    /// A fragment header, RFC 8200 §4.5.
    pub const FRAGMENT: u8 = 44;
    /// Nothing follows.
    pub const NONE: u8 = 59;
    /// Destination options, RFC 8200 §4.6.
    pub const DESTINATION: u8 = 60;
    /// An Ethernet frame.
    pub const ETHERNET: u8 = 143;
}

/// Hop limit of the packets we make.
pub const HOP_LIMIT: u8 = 64;
/// The longest outer header we make, bytes: nine segments, or six and an HMAC.
pub const MAX_HEADER: usize = 192;
/// Length of an SRH without segments, bytes.
pub const SRH_LEN: usize = 8;
/// Where the routing type stands in a routing header.
pub const ROUTING_TYPE_AT: usize = 2;
/// Where segments left stands in a routing header.
pub const SEGMENTS_LEFT_AT: usize = 3;
/// Length of a SID, bytes.
const SID_LEN: usize = 16;
/// The routing type of the SRH (IANA).
const ROUTING_TYPE: u8 = 4;
/// Linux sets this flag with an HMAC TLV, and looks for the TLV only if it is set. RFC 8754 knows no such flag.
const FLAG_HMAC: u8 = 0x08;
/// Extension headers walked before we give up, as for inner packets.
const MAX_EXTENSIONS: usize = 8;
/// Twenty bits.
const FLOW_LABEL: u32 = 0x000f_ffff;

/// TLV types, RFC 8754 §2.1.
pub mod tlv {
    /// One byte of padding, without length.
    pub const PAD1: u8 = 0;
    /// Padding.
    pub const PADN: u8 = 4;
    /// [`Hmac`](super::HmacTlv)
    pub const HMAC: u8 = 5;
}

/// The fixed IPv6 header outside, RFC 8200 §3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OuterHeader {
    /// Traffic class, ECN included.
    pub traffic_class: u8,
    /// Flow label; its upper 12 bits are never set.
    pub flow_label: u32,
    /// What follows.
    pub next_header: u8,
    /// Hop limit.
    pub hop_limit: u8,
    /// Source.
    pub source: Ipv6Addr,
    /// Destination: the active SID.
    pub destination: Ipv6Addr,
}

impl OuterHeader {
    /// Reads the header at the front of a whole packet; gives it and its payload, without what trails the packet.
    ///
    /// # Errors
    /// Not IPv6, or the length field says more than there is.
    pub fn parse(packet: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let (header, rest) = packet.split_first_chunk::<V6_LEN>().ok_or(Malformed::Truncated)?;
        Self::parse_apart(header, rest)
    }

    /// The same for a header that lies apart from `rest`, what follows it.
    ///
    /// # Errors
    /// As [`parse`](Self::parse).
    pub fn parse_apart<'a>(header: &[u8; V6_LEN], rest: &'a [u8]) -> Result<(Self, &'a [u8]), Malformed> {
        let &[w0, w1, w2, w3, l0, l1, next_header, hop_limit, ref addresses @ ..] = header;
        let word = u32::from_be_bytes([w0, w1, w2, w3]);
        if word >> 28 != 6 {
            return Err(Malformed::Version);
        }
        let payload = rest
            .get(..usize::from(u16::from_be_bytes([l0, l1])))
            .ok_or(Malformed::TotalLength)?;
        let ([source, destination], _) = addresses.as_chunks::<SID_LEN>() else {
            return Err(Malformed::Truncated);
        };
        let header = Self {
            traffic_class: (word >> 20) as u8,
            flow_label: word & FLOW_LABEL,
            next_header,
            hop_limit,
            source: (*source).into(),
            destination: (*destination).into(),
        };
        Ok((header, payload))
    }

    /// The header in front of `payload_len` bytes, of which a length field holds 16 bits.
    pub fn emit(&self, payload_len: u16) -> [u8; V6_LEN] {
        let mut out = [0; V6_LEN];
        out[..4].copy_from_slice(&first_word(self.traffic_class, self.flow_label));
        out[4..6].copy_from_slice(&payload_len.to_be_bytes());
        out[6] = self.next_header;
        out[7] = self.hop_limit;
        out[8..24].copy_from_slice(&self.source.octets());
        out[24..].copy_from_slice(&self.destination.octets());
        out
    }
}

/// Version, traffic class and flow label.
#[inline]
fn first_word(traffic_class: u8, flow_label: u32) -> [u8; 4] {
    (6 << 28 | u32::from(traffic_class) << 20 | flow_label & FLOW_LABEL).to_be_bytes()
}

/// Why bytes are not a segment routing header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SrhError {
    /// Fewer bytes than the smallest one has.
    Truncated,
    /// A routing header of another type.
    RoutingType,
    /// It says that it is longer than the bytes are.
    Length,
    /// Its list is longer than the header.
    LastEntry,
    /// More segments left than there are.
    SegmentsLeft,
    /// A TLV reaches beyond the header, or an HMAC is not as long as one.
    Tlv,
}

/// A segment routing header, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Srh<'a> {
    head: &'a [u8; SRH_LEN],
    list: &'a [[u8; SID_LEN]],
    tlvs: &'a [u8],
}

impl<'a> Srh<'a> {
    /// Checks and reads the header at the front of `bytes`; more may follow.
    ///
    /// # Errors
    /// See [`SrhError`].
    #[inline]
    pub fn parse(bytes: &'a [u8]) -> Result<Self, SrhError> {
        let (head, rest) = bytes.split_first_chunk::<SRH_LEN>().ok_or(SrhError::Truncated)?;
        let &[_, units, kind, segments_left, last_entry, ..] = head;
        if kind != ROUTING_TYPE {
            return Err(SrhError::RoutingType);
        }
        let body = rest.get(..usize::from(units) * 8).ok_or(SrhError::Length)?;
        let (list, tlvs) = body
            .split_at_checked((usize::from(last_entry) + 1) * SID_LEN)
            .ok_or(SrhError::LastEntry)?;
        // One more than the list has, if it is reduced: RFC 8754 §4.1.1.
        if usize::from(segments_left) > usize::from(last_entry) + 1 {
            return Err(SrhError::SegmentsLeft);
        }
        let srh = Self {
            head,
            list: list.as_chunks().0,
            tlvs,
        };
        if !tlvs.is_empty() {
            for tlv in srh.tlvs() {
                let tlv = tlv?;
                if tlv.kind == tlv::HMAC && tlv.value.len() != HmacTlv::VALUE_LEN {
                    return Err(SrhError::Tlv);
                }
            }
        }
        Ok(srh)
    }

    /// What follows it.
    #[inline]
    pub fn next_header(&self) -> u8 {
        self.head[0]
    }

    /// Its length, bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a header is never empty")]
    pub fn len(&self) -> usize {
        SRH_LEN + usize::from(self.head[1]) * 8
    }

    /// How many segments are to be visited after the active one.
    #[inline]
    pub fn segments_left(&self) -> u8 {
        self.head[SEGMENTS_LEFT_AT]
    }

    /// Index of the last element of the list.
    #[inline]
    pub fn last_entry(&self) -> u8 {
        self.head[4]
    }

    /// Flags, as they came.
    pub fn flags(&self) -> u8 {
        self.head[5]
    }

    /// Tag, as it came.
    pub fn tag(&self) -> u16 {
        u16::from_be_bytes([self.head[6], self.head[7]])
    }

    /// An element of the list, as stored: number 0 is the end of the path.
    pub fn segment(&self, index: u8) -> Option<Ipv6Addr> {
        self.list.get(usize::from(index)).map(|&sid| sid.into())
    }

    /// The TLVs in order; the last item is an error if they do not end with the header. None is, once [`Self::parse`] has accepted it.
    pub fn tlvs(&self) -> Tlvs<'a> {
        Tlvs { rest: self.tlvs }
    }

    /// The first HMAC TLV.
    pub fn hmac(&self) -> Option<HmacTlv<'a>> {
        if self.tlvs.is_empty() {
            return None;
        }
        self.tlvs()
            .flatten()
            .find(|tlv| tlv.kind == tlv::HMAC)
            .and_then(|tlv| HmacTlv::parse(tlv.value))
    }

    /// Verifies the HMAC with the key that `keys` has under its number, RFC 8754 §2.1.2.1. The comparison takes the same time
    /// whatever differs.
    ///
    /// That the destination is the active segment of the list is another matter: see [`HmacTlv::destination_unverified`].
    ///
    /// # Errors
    /// There is none, its key is not known, or it is wrong.
    pub fn verify<'k>(
        &self,
        source: Ipv6Addr,
        keys: impl FnOnce(u32) -> Option<&'k HmacKey>,
    ) -> Result<(), HmacError> {
        let hmac = self.hmac().ok_or(HmacError::Missing)?;
        let key = keys(hmac.key_id).ok_or(HmacError::UnknownKey)?;
        let text = HmacText {
            source,
            last_entry: self.last_entry(),
            flags: self.flags(),
            list: self.list.as_flattened(),
        };
        if key.verifies(&text, hmac.value) {
            Ok(())
        } else {
            Err(HmacError::Wrong)
        }
    }
}

/// A type, length and value behind the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tlv<'a> {
    /// Its type, see [`tlv`].
    pub kind: u8,
    /// Its value; empty for [`tlv::PAD1`].
    pub value: &'a [u8],
}

/// The TLVs of a header.
#[derive(Clone, Debug)]
pub struct Tlvs<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Tlvs<'a> {
    type Item = Result<Tlv<'a>, SrhError>;

    fn next(&mut self) -> Option<Self::Item> {
        let (kind, value, rest) = match *std::mem::take(&mut self.rest) {
            [] => return None,
            [tlv::PAD1, ref rest @ ..] => (tlv::PAD1, &[][..], rest),
            [kind, len, ref rest @ ..] => match rest.split_at_checked(usize::from(len)) {
                Some((value, rest)) => (kind, value, rest),
                None => return Some(Err(SrhError::Tlv)),
            },
            [_] => return Some(Err(SrhError::Tlv)),
        };
        self.rest = rest;
        Some(Ok(Tlv { kind, value }))
    }
}

/// How the list of segments is written, RFC 8986 §5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// H.Encaps: every segment is in the list, even a single one.
    Full,
    /// H.Encaps.Red: the first is the destination only. A single one needs no SRH, unless there is an HMAC to carry.
    #[default]
    Reduced,
}

/// What to put in front of the packets of one path.
#[derive(Clone, Copy, Debug)]
pub struct Encapsulation<'a> {
    /// How the list is written.
    pub mode: Mode,
    /// The outer source.
    pub source: Ipv6Addr,
    /// The segments in the order of travel.
    pub segments: &'a [Ipv6Addr],
    /// What is carried, see [`next_header`].
    pub next_header: u8,
    /// The key that signs the list.
    pub hmac: Option<&'a HmacKey>,
}

/// Why there is no header for a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EncapsulationError {
    /// It has no segment.
    #[error("a path needs at least one segment")]
    NoSegment,
    /// Its header would be longer than [`MAX_HEADER`]; says how long, bytes.
    #[error("the headers of this path take {0} bytes; there is room for {MAX_HEADER}")]
    TooLong(usize),
}

impl Encapsulation<'_> {
    /// The header for this path.
    ///
    /// # Errors
    /// The path has no segment, or too many.
    pub fn template(&self) -> Result<Template, EncapsulationError> {
        let &[first, ref others @ ..] = self.segments else {
            return Err(EncapsulationError::NoSegment);
        };
        let listed = match (self.mode, self.hmac) {
            (Mode::Reduced, _) if !others.is_empty() => others,
            (Mode::Reduced, None) => others,
            // Without SRH there is no place for the HMAC.
            (Mode::Reduced, Some(_)) | (Mode::Full, _) => self.segments,
        };
        let tlvs_len = self.hmac.map_or(0, |_| HmacTlv::LEN);
        let srh_len = match listed.len() {
            0 => 0,
            n => SRH_LEN + n * SID_LEN + tlvs_len,
        };
        let too_long = EncapsulationError::TooLong(V6_LEN + srh_len);
        let mut bytes = [0; MAX_HEADER];
        let (outer, srh) = bytes.split_at_mut(V6_LEN);
        let srh = srh.get_mut(..srh_len).ok_or(too_long)?;
        let header = OuterHeader {
            traffic_class: 0,
            flow_label: 0,
            next_header: if srh_len == 0 {
                self.next_header
            } else {
                next_header::ROUTING
            },
            hop_limit: HOP_LIMIT,
            source: self.source,
            destination: first,
        };
        outer.copy_from_slice(&header.emit(0));
        if let Some((head, rest)) = srh.split_first_chunk_mut::<SRH_LEN>() {
            let (list, tlvs) = rest.split_at_mut(listed.len() * SID_LEN);
            for (entry, segment) in list.as_chunks_mut().0.iter_mut().zip(listed.iter().rev()) {
                *entry = segment.octets();
            }
            // At most nine segments fit, so no cast cuts.
            let last_entry = (listed.len() - 1) as u8;
            let flags = if self.hmac.is_some() { FLAG_HMAC } else { 0 };
            *head = [
                self.next_header,
                ((srh_len - SRH_LEN) / 8) as u8,
                ROUTING_TYPE,
                others.len() as u8,
                last_entry,
                flags,
                0,
                0,
            ];
            if let (Some(key), Some(out)) = (self.hmac, tlvs.first_chunk_mut::<{ HmacTlv::LEN }>()) {
                let text = HmacText {
                    source: self.source,
                    last_entry,
                    flags,
                    list,
                };
                let reduced = listed.len() < self.segments.len();
                out[..3].copy_from_slice(&[tlv::HMAC, HmacTlv::VALUE_LEN as u8, u8::from(reduced) << 7]);
                out[4..8].copy_from_slice(&key.id().to_be_bytes());
                out[8..].copy_from_slice(&key.code(&text));
            }
        }
        Ok(Template {
            bytes,
            len: (V6_LEN + srh_len) as u8,
        })
    }
}

/// The outer header and SRH of a path, but for what differs from packet to packet.
#[derive(Clone, PartialEq, Eq)]
pub struct Template {
    bytes: [u8; MAX_HEADER],
    len: u8,
}

impl Template {
    /// Its length, bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a header is never empty")]
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Its bytes: traffic class, flow label and payload length are 0.
    #[inline]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len()]
    }

    /// Writes the header of one packet into `out`, which is [`Self::len`] bytes long, see [`patch`].
    ///
    /// # Panics
    /// If `out` has another length.
    #[inline]
    pub fn push(&self, out: &mut [u8], inner_len: usize, traffic_class: u8, flow_label: u32) {
        out.copy_from_slice(self.as_bytes());
        patch(out, inner_len, traffic_class, flow_label);
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Template").field(&self.as_bytes()).finish()
    }
}

/// Sets what differs from packet to packet in a copy of a [`Template`]: the length of what follows it, the traffic class, and the
/// lower 20 bits of `flow_label`.
///
/// `header` is the whole copy. A length beyond what the field holds becomes the most it holds.
#[inline]
pub fn patch(header: &mut [u8], inner_len: usize, traffic_class: u8, flow_label: u32) {
    let payload_len = (header.len() + inner_len).saturating_sub(V6_LEN);
    if let Some(front) = header.first_chunk_mut::<6>() {
        let [w0, w1, w2, w3] = first_word(traffic_class, flow_label);
        let [l0, l1] = u16::try_from(payload_len).unwrap_or(u16::MAX).to_be_bytes();
        *front = [w0, w1, w2, w3, l0, l1];
    }
}

/// The extension headers of an outer packet, as far as they concern the node its destination names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain<'a> {
    /// The segment routing header.
    pub srh: Option<SrhAt<'a>>,
    /// The header where the walk ended: the first that is no extension header, or whatever follows an SRH with segments left, for
    /// that is not ours to read.
    pub upper: u8,
    /// Where it starts in the payload; at most at its end.
    pub upper_at: usize,
}

/// A segment routing header and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SrhAt<'a> {
    /// The header.
    pub srh: Srh<'a>,
    /// Where it starts in the payload.
    pub at: usize,
    /// Where in the payload the next-header field stands that names it; `None` if that is the outer header's.
    pub named_at: Option<usize>,
}

/// Where a walk ended and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalkError {
    /// Where in the payload the header starts.
    pub at: usize,
    /// What is wrong with it.
    pub fault: WalkFault,
}

/// Why a walk could not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkFault {
    /// A routing header that is no sound SRH.
    Srh(SrhError),
    /// An options header that is longer than the packet.
    Truncated,
    /// A fragment: whoever hands us packets puts them together first.
    Fragment,
    /// A second routing header, or hop-by-hop options that are not the first header (RFC 8200 §4.1).
    Order,
    /// More headers than we walk.
    TooMany,
}

/// Walks the extension headers of a payload whose first header is `first`.
///
/// # Errors
/// See [`WalkFault`].
#[inline]
pub fn walk(first: u8, payload: &[u8]) -> Result<Chain<'_>, WalkError> {
    let mut next = first;
    let mut at = 0;
    let mut named_at = None;
    let mut srh = None;
    for walked in 0..=MAX_EXTENSIONS {
        let stop = |fault| Err(WalkError { at, fault });
        let len = match next {
            next_header::ROUTING if srh.is_some() => return stop(WalkFault::Order),
            next_header::HOP_BY_HOP if walked > 0 => return stop(WalkFault::Order),
            next_header::FRAGMENT => return stop(WalkFault::Fragment),
            next_header::ROUTING | next_header::HOP_BY_HOP | next_header::DESTINATION
                if walked == MAX_EXTENSIONS =>
            {
                return stop(WalkFault::TooMany);
            }
            next_header::ROUTING => {
                let found = match Srh::parse(payload.get(at..).unwrap_or_default()) {
                    Ok(found) => found,
                    Err(error) => return stop(WalkFault::Srh(error)),
                };
                srh = Some(SrhAt {
                    srh: found,
                    at,
                    named_at,
                });
                if found.segments_left() > 0 {
                    let upper = found.next_header();
                    let upper_at = at + found.len();
                    return Ok(Chain { srh, upper, upper_at });
                }
                found.len()
            }
            next_header::HOP_BY_HOP | next_header::DESTINATION => {
                let len = match payload.get(at..) {
                    Some([_, units, ..]) => 8 + usize::from(*units) * 8,
                    _ => return stop(WalkFault::Truncated),
                };
                if at + len > payload.len() {
                    return stop(WalkFault::Truncated);
                }
                len
            }
            upper => {
                return Ok(Chain {
                    srh,
                    upper,
                    upper_at: at,
                });
            }
        };
        // Every header walked starts with what follows it, and lies within the payload.
        next = payload.get(at).copied().unwrap_or(next_header::NONE);
        named_at = Some(at);
        at += len;
    }
    Err(WalkError {
        at,
        fault: WalkFault::TooMany,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `srv6-multi.pcap` packet 1: two segments, the second still to come.
    const TWO: [u8; 40] = [
        4, 4, 4, 1, 1, 0, 0, 0, 0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xc0, 0, 2, 2, 0, 0, 0, 0, 0, 1, 0xfd,
        0x12, 0x34, 0x56, 0x78, 0x9a, 0xc0, 0, 2, 2, 0, 0, 0, 0, 0, 0xe,
    ];

    #[test]
    fn a_routing_header_is_read() {
        let mut bytes = TWO.to_vec();
        bytes[6..8].copy_from_slice(&[1, 2]);
        bytes.extend([0x45; 20]);
        let srh = Srh::parse(&bytes).unwrap();
        assert_eq!((srh.next_header(), srh.len()), (4, 40));
        assert_eq!((srh.segments_left(), srh.last_entry()), (1, 1));
        assert_eq!((srh.flags(), srh.tag()), (0, 0x0102));
        assert_eq!(srh.segment(0), Some(sid("fd12:3456:789a:c000:202::1")));
        assert_eq!(srh.segment(1), Some(sid("fd12:3456:789a:c000:202::e")));
        assert_eq!(srh.segment(2), None);
        assert_eq!(srh.tlvs().count(), 0);
        assert_eq!(srh.hmac(), None);
    }

    #[test]
    fn every_lie_of_a_routing_header_has_its_error() {
        for len in 0..TWO.len() {
            let expected = if len < 8 {
                SrhError::Truncated
            } else {
                SrhError::Length
            };
            assert_eq!(Srh::parse(&TWO[..len]), Err(expected), "{len} bytes");
        }
        for (at, value, expected) in [
            (1, 5, Err(SrhError::Length)),
            (1, 3, Err(SrhError::LastEntry)),
            (1, 0, Err(SrhError::LastEntry)),
            (2, 0, Err(SrhError::RoutingType)),
            (2, 2, Err(SrhError::RoutingType)),
            (3, 0, Ok(())),
            (3, 2, Ok(())),
            (3, 3, Err(SrhError::SegmentsLeft)),
            (4, 2, Err(SrhError::LastEntry)),
            (4, 255, Err(SrhError::LastEntry)),
            (5, 255, Ok(())),
        ] {
            let mut bytes = TWO;
            bytes[at] = value;
            assert_eq!(Srh::parse(&bytes).map(|_| ()), expected, "byte {at} is {value}");
        }
    }

    #[test]
    fn tlvs_end_with_the_header() {
        let with = |tlvs: &[u8]| {
            let mut bytes = TWO.to_vec();
            bytes[1] += (tlvs.len() / 8) as u8;
            bytes.extend(tlvs);
            Srh::parse(&bytes).map(|srh| {
                srh.tlvs()
                    .map(|tlv| tlv.map(|tlv| (tlv.kind, tlv.value.len())))
                    .collect::<Result<Vec<_>, _>>()
                    .unwrap()
            })
        };
        assert_eq!(with(&[0; 8]).unwrap(), vec![(tlv::PAD1, 0); 8]);
        assert_eq!(with(&[4, 6, 0, 0, 0, 0, 0, 0]).unwrap(), [(tlv::PADN, 6)]);
        assert_eq!(with(&[0, 0x81, 4, 0, 0, 0, 0, 0]).unwrap()[1], (0x81, 4));
        assert_eq!(
            with(&[4, 7, 0, 0, 0, 0, 0, 0]),
            Err(SrhError::Tlv),
            "one too long"
        );
        assert_eq!(with(&[4, 5, 0, 0, 0, 0, 0, 9]), Err(SrhError::Tlv), "no length");
        assert_eq!(
            with(&[5, 6, 0, 0, 0, 0, 0, 0]),
            Err(SrhError::Tlv),
            "a short HMAC"
        );
    }

    #[test]
    fn a_path_is_written_in_the_form_asked_for() {
        let sids: Vec<_> = (1..=10)
            .map(|n| Ipv6Addr::new(0xfd00, 0, 0, n, 0, 0, 0, 1))
            .collect();
        let len = |mode, n: usize, hmac| {
            let encapsulation = Encapsulation {
                mode,
                source: sid("fd00::1"),
                segments: &sids[..n],
                next_header: next_header::IPV4,
                hmac,
            };
            encapsulation.template().map(|template| template.len())
        };
        let key = HmacKey::new(1, HmacAlgorithm::Sha256, b"secret").unwrap();
        let lens = |mode| [1, 2, 3].map(|n| len(mode, n, None).unwrap());
        assert_eq!(lens(Mode::Full), [64, 80, 96]);
        assert_eq!(lens(Mode::Reduced), [40, 64, 80]);
        assert_eq!(len(Mode::Full, 1, Some(&key)), Ok(104));
        assert_eq!(len(Mode::Reduced, 1, Some(&key)), Ok(104), "an HMAC needs an SRH");
        assert_eq!(len(Mode::Reduced, 2, Some(&key)), Ok(104));
        assert_eq!(len(Mode::Full, 9, None), Ok(MAX_HEADER));
        assert_eq!(len(Mode::Full, 10, None), Err(EncapsulationError::TooLong(208)));
        assert_eq!(len(Mode::Reduced, 10, None), Ok(MAX_HEADER));
        assert_eq!(len(Mode::Full, 0, None), Err(EncapsulationError::NoSegment));
    }

    #[test]
    fn a_walk_finds_the_routing_header_among_options() {
        // Hop-by-hop, destination options, SRH, destination options, IPv4.
        let mut payload = vec![60, 0, 1, 4, 0, 0, 0, 0, 43, 1];
        payload.extend([0; 14]);
        let mut srh = TWO;
        srh[0] = 60;
        srh[3] = 0;
        payload.extend(srh);
        payload.extend([4, 0, 1, 4, 0, 0, 0, 0]);
        payload.extend([0x45; 20]);
        let chain = walk(next_header::HOP_BY_HOP, &payload).unwrap();
        let found = chain.srh.unwrap();
        assert_eq!((found.at, found.named_at), (24, Some(8)));
        assert_eq!((chain.upper, chain.upper_at), (next_header::IPV4, 24 + 40 + 8));

        // With segments left, what follows it is somebody else's.
        payload[24 + 3] = 1;
        let chain = walk(next_header::HOP_BY_HOP, &payload).unwrap();
        assert_eq!((chain.upper, chain.upper_at), (next_header::DESTINATION, 64));

        let plain = walk(next_header::IPV6, &[0x60; 40]).unwrap();
        assert_eq!(
            (plain.srh, plain.upper, plain.upper_at),
            (None, next_header::IPV6, 0)
        );
    }

    #[test]
    fn a_walk_stops_where_it_must() {
        let options = |next| [next, 0, 1, 4, 0, 0, 0, 0];
        let mut ended = TWO;
        ended[3] = 0;
        ended[0] = 43;
        let fault = |first, headers: &[&[u8]]| walk(first, &headers.concat()).map(|chain| chain.upper);
        let error = |at, fault| Err(WalkError { at, fault });
        assert_eq!(fault(60, &[&options(0), &options(4)]), error(8, WalkFault::Order));
        assert_eq!(fault(43, &[&ended, &TWO]), error(40, WalkFault::Order));
        assert_eq!(
            fault(60, &[&options(44), &options(4)]),
            error(8, WalkFault::Fragment)
        );
        assert_eq!(
            fault(60, &[&[4, 1, 0, 0, 0, 0, 0, 0]]),
            error(0, WalkFault::Truncated)
        );
        assert_eq!(fault(60, &[]), error(0, WalkFault::Truncated));
        assert_eq!(
            fault(60, &[&options(43), &TWO[..16]]),
            error(8, WalkFault::Srh(SrhError::Length))
        );
        let chain = |n: usize| [vec![options(60); n - 1], vec![options(4)]].concat().concat();
        assert_eq!(fault(60, &[&chain(8)]), Ok(4));
        assert_eq!(fault(60, &[&chain(9)]), error(64, WalkFault::TooMany));
    }

    #[test]
    fn an_outer_header_is_read_and_written() {
        let mut packet = [0; 60];
        packet[..8].copy_from_slice(&[0x6b, 0x98, 0x4b, 0x8d, 0, 16, 43, 63]);
        packet[8..24].copy_from_slice(&sid("fd00::1").octets());
        packet[24..40].copy_from_slice(&sid("fd00::2").octets());
        let (header, payload) = OuterHeader::parse(&packet).unwrap();
        assert_eq!(payload.len(), 16, "four bytes trail");
        assert_eq!((header.traffic_class, header.flow_label), (0xb9, 0x84b8d));
        assert_eq!((header.next_header, header.hop_limit), (43, 63));
        assert_eq!(
            (header.source, header.destination),
            (sid("fd00::1"), sid("fd00::2"))
        );
        assert_eq!(header.emit(16), packet[..40]);
        assert_eq!(OuterHeader::parse(&packet[..39]), Err(Malformed::Truncated));
        assert_eq!(OuterHeader::parse(&packet[..55]), Err(Malformed::TotalLength));
        packet[0] = 0x45;
        assert_eq!(OuterHeader::parse(&packet), Err(Malformed::Version));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            segments in proptest::collection::vec(any::<u128>(), 1..=6),
            (full, signed) in any::<(bool, bool)>(),
            (source, id) in any::<(u128, u32)>(),
            inner in proptest::collection::vec(any::<u8>(), 0..64),
            (traffic_class, flow_label) in any::<(u8, u32)>(),
        ) {
            let segments: Vec<_> = segments.into_iter().map(Ipv6Addr::from_bits).collect();
            let source = Ipv6Addr::from_bits(source);
            let key = HmacKey::new(id, HmacAlgorithm::Sha256, b"secret").unwrap();
            let template = Encapsulation {
                mode: if full { Mode::Full } else { Mode::Reduced },
                source,
                segments: &segments,
                next_header: next_header::IPV6,
                hmac: signed.then_some(&key),
            }
            .template()
            .unwrap();
            let mut packet = vec![0; template.len()];
            template.push(&mut packet, inner.len(), traffic_class, flow_label);
            packet.extend(&inner);

            let (header, payload) = OuterHeader::parse(&packet).unwrap();
            prop_assert_eq!((header.source, header.destination), (source, segments[0]));
            prop_assert_eq!(header.traffic_class, traffic_class);
            prop_assert_eq!(header.flow_label, flow_label & 0xfffff);
            prop_assert_eq!(header.hop_limit, HOP_LIMIT);
            let chain = walk(header.next_header, payload).unwrap();
            prop_assert_eq!(chain.upper, next_header::IPV6);
            prop_assert_eq!(&payload[chain.upper_at..], &inner);
            match chain.srh {
                None => prop_assert!(!full && !signed && segments.len() == 1),
                Some(SrhAt { srh, .. }) => {
                    prop_assert_eq!(usize::from(srh.segments_left()), segments.len() - 1);
                    let listed: Vec<_> = (0..=srh.last_entry()).rev().map(|n| srh.segment(n).unwrap()).collect();
                    prop_assert!(segments.ends_with(&listed));
                    prop_assert_eq!(listed.len() == segments.len(), full || segments.len() == 1);
                    let verified = srh.verify(source, |number| (number == id).then_some(&key));
                    prop_assert_eq!(verified, if signed { Ok(()) } else { Err(HmacError::Missing) });
                }
            }
        }

        #[test]
        fn no_bytes_upset_the_parsers(first: u8, routing: bool, mut bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            // Most random bytes would fail at the type.
            if let (true, [_, units, kind, left, last, ..]) = (routing, &mut bytes[..]) {
                (*units, *kind, *left, *last) = (*units % 16, 4, *left % 4, *last % 4);
            }
            if let Ok(srh) = Srh::parse(&bytes) {
                prop_assert!(srh.len() <= bytes.len());
                prop_assert!(srh.segment(srh.last_entry()).is_some());
                prop_assert!(srh.tlvs().all(|tlv| tlv.is_ok()));
                let _ = srh.verify(Ipv6Addr::LOCALHOST, |_| None);
            }
            if let Ok(chain) = walk(if routing { 43 } else { first }, &bytes) {
                prop_assert!(chain.upper_at <= bytes.len());
            }
            let _ = OuterHeader::parse(&bytes);
        }
    }

    fn sid(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }
}
