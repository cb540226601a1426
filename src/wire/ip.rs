//! IPv4 and IPv6 headers, RFC 791 and RFC 8200: what forwarding needs of them, and editing in place.
//!
//! [`IpHeader::parse`] is the gate: after it, the packet has a complete header and at least as many bytes as its length
//! field says; trailing bytes are allowed (kernels accept them) and are not part of the packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Malformed;
use super::checksum::{Sum, pseudo_v4, pseudo_v6, replace_word};

/// Protocol numbers (IANA) we look at.
pub mod protocol {
    /// ICMP
    pub const ICMP: u8 = 1;
    /// TCP
    pub const TCP: u8 = 6;
    /// UDP
    pub const UDP: u8 = 17;
    /// ICMPv6
    pub const ICMPV6: u8 = 58;
}

/// Length of an IPv4 header without options, bytes.
pub const V4_LEN: usize = 20;
/// Length of the fixed IPv6 header, bytes.
pub const V6_LEN: usize = 40;
/// Extension headers walked before we give up: RFC 8200 §4.1 knows six, each once (destination options twice).
const MAX_EXTENSIONS: usize = 8;

/// Source and destination, both of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Addrs {
    /// IPv4
    V4 {
        /// Source
        src: Ipv4Addr,
        /// Destination
        dst: Ipv4Addr,
    },
    /// IPv6
    V6 {
        /// Source
        src: Ipv6Addr,
        /// Destination
        dst: Ipv6Addr,
    },
}

impl Addrs {
    /// The source.
    pub fn src(self) -> IpAddr {
        match self {
            Self::V4 { src, .. } => src.into(),
            Self::V6 { src, .. } => src.into(),
        }
    }

    /// The destination.
    pub fn dst(self) -> IpAddr {
        match self {
            Self::V4 { dst, .. } => dst.into(),
            Self::V6 { dst, .. } => dst.into(),
        }
    }
}

/// Whether a packet is a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not a fragment.
    Whole,
    /// The first of several: it carries the L4 header.
    First,
    /// A later one: what follows the header is the middle of a payload.
    Later,
}

/// What forwarding needs of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpHeader {
    /// Source and destination.
    pub addrs: Addrs,
    /// Where the L4 header starts: behind options and extension headers, bytes.
    pub l4: usize,
    /// Length of the packet by its own length field, bytes.
    pub total_len: usize,
    /// L4 protocol.
    pub protocol: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// Type of service or traffic class, ECN included.
    pub tos: u8,
    /// Whether it is a fragment.
    pub fragment: Fragment,
    /// Don't fragment (IPv4); always set for IPv6.
    pub dont_fragment: bool,
}

impl IpHeader {
    /// Checks and reads the header at the front of `packet`.
    ///
    /// The IPv4 header checksum is not verified here: packets from a local kernel carry a right one, and those from the
    /// underlay are verified by [`verify_v4_header`].
    ///
    /// # Errors
    /// See [`Malformed`].
    #[inline]
    pub fn parse(packet: &[u8]) -> Result<Self, Malformed> {
        Self::parse_front(packet, packet.len())
    }

    /// Like [`Self::parse`] for a packet of `len` bytes of which `front` is the front: the headers must be in it, the payload need not.
    ///
    /// # Errors
    /// See [`Malformed`].
    #[inline]
    pub fn parse_front(front: &[u8], len: usize) -> Result<Self, Malformed> {
        match front.first().ok_or(Malformed::Truncated)? >> 4 {
            4 => Self::parse_v4(front, len),
            6 => Self::parse_v6(front, len),
            _ => Err(Malformed::Version),
        }
    }

    #[inline]
    fn parse_v4(packet: &[u8], len: usize) -> Result<Self, Malformed> {
        let header = packet.first_chunk::<V4_LEN>().ok_or(Malformed::Truncated)?;
        let l4 = usize::from(header[0] & 0xf) * 4;
        if l4 < V4_LEN {
            return Err(Malformed::HeaderLength);
        }
        let total_len = usize::from(be16(header, 2));
        if total_len < l4 || total_len > len {
            return Err(Malformed::TotalLength);
        }
        if l4 > packet.len() {
            return Err(Malformed::Truncated);
        }
        let flags = be16(header, 6);
        let more = flags & 0x2000 != 0;
        let fragment = match flags & 0x1fff {
            0 if more => Fragment::First,
            0 => Fragment::Whole,
            _ => Fragment::Later,
        };
        Ok(Self {
            addrs: Addrs::V4 {
                src: Ipv4Addr::new(header[12], header[13], header[14], header[15]),
                dst: Ipv4Addr::new(header[16], header[17], header[18], header[19]),
            },
            l4,
            total_len,
            protocol: header[9],
            ttl: header[8],
            tos: header[1],
            fragment,
            dont_fragment: flags & 0x4000 != 0,
        })
    }

    #[inline]
    fn parse_v6(packet: &[u8], len: usize) -> Result<Self, Malformed> {
        let header = packet.first_chunk::<V6_LEN>().ok_or(Malformed::Truncated)?;
        let total_len = V6_LEN + usize::from(be16(header, 4));
        // A payload length of 0 with a jumbo option (RFC 2675) says 40 here: its payload is cut off, never believed.
        if total_len > len {
            return Err(Malformed::TotalLength);
        }
        let (protocol, l4, fragment) = match header[6] {
            // The two that matter need no walk.
            next @ (protocol::TCP | protocol::UDP | protocol::ICMPV6) => (next, V6_LEN, Fragment::Whole),
            next => walk_extensions(packet.get(..total_len.min(packet.len())).unwrap_or(packet), next)?,
        };
        let mut src = [0; 16];
        let mut dst = [0; 16];
        src.copy_from_slice(&header[8..24]);
        dst.copy_from_slice(&header[24..40]);
        Ok(Self {
            addrs: Addrs::V6 {
                src: src.into(),
                dst: dst.into(),
            },
            l4,
            total_len,
            protocol,
            ttl: header[7],
            tos: (be16(header, 0) >> 4) as u8,
            fragment,
            dont_fragment: true,
        })
    }

    /// The pseudo-header sum of an L4 packet of `l4_len` bytes between these addresses.
    #[inline]
    pub fn pseudo(&self, l4_len: usize) -> Sum {
        match self.addrs {
            Addrs::V4 { src, dst } => pseudo_v4(src, dst, self.protocol, l4_len),
            Addrs::V6 { src, dst } => pseudo_v6(src, dst, self.protocol, l4_len),
        }
    }

    /// Bytes from the L4 header to the end of the packet.
    #[inline]
    pub fn l4_len(&self) -> usize {
        self.total_len - self.l4
    }
}

/// Walks extension headers (RFC 8200 §4) to the L4 header; gives its protocol, place and the fragment state.
fn walk_extensions(packet: &[u8], first: u8) -> Result<(u8, usize, Fragment), Malformed> {
    let mut next = first;
    let mut at = V6_LEN;
    let mut fragment = Fragment::Whole;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            // Hop-by-hop, routing, destination options: length in 8-byte units, not counting the first.
            0 | 43 | 60 => {
                let header = packet
                    .get(at..)
                    .and_then(|rest| rest.first_chunk::<2>())
                    .ok_or(Malformed::Truncated)?;
                next = header[0];
                at += 8 + usize::from(header[1]) * 8;
            }
            // Fragment header, RFC 8200 §4.5.
            44 => {
                let header = packet
                    .get(at..)
                    .and_then(|rest| rest.first_chunk::<8>())
                    .ok_or(Malformed::Truncated)?;
                next = header[0];
                at += 8;
                let offset_and_more = u16::from_be_bytes([header[2], header[3]]);
                if offset_and_more >> 3 != 0 {
                    return Ok((next, at, Fragment::Later));
                }
                // An "atomic" fragment (RFC 6946) is a whole packet that carries the header all the same.
                fragment = Fragment::First;
            }
            _ if at > packet.len() => return Err(Malformed::Truncated),
            _ => return Ok((next, at, fragment)),
        }
    }
    Err(Malformed::ExtensionChain)
}

/// Whether the IPv4 header checksum is right. `header` is the header with its options.
#[inline]
pub fn verify_v4_header(header: &[u8]) -> bool {
    Sum::of(header).fold() == 0xffff
}

/// Takes one from the TTL or hop limit, patching the IPv4 header checksum.
///
/// Gives what is left; `None` if nothing would be, in which case the packet is untouched and must not be sent on.
#[inline]
pub fn decrement_ttl(packet: &mut [u8]) -> Option<u8> {
    match packet {
        [first, _, _, _, _, _, _, _, ttl, protocol, c0, c1, ..] if *first >> 4 == 4 => {
            let left = ttl.checked_sub(1).filter(|&left| left > 0)?;
            let old = u16::from_be_bytes([*ttl, *protocol]);
            let new = u16::from_be_bytes([left, *protocol]);
            [*c0, *c1] = replace_word(u16::from_be_bytes([*c0, *c1]), old, new).to_be_bytes();
            *ttl = left;
            Some(left)
        }
        [first, _, _, _, _, _, _, hop_limit, ..] if *first >> 4 == 6 => {
            let left = hop_limit.checked_sub(1).filter(|&left| left > 0)?;
            *hop_limit = left;
            Some(left)
        }
        _ => None,
    }
}

/// Explicit Congestion Notification, RFC 3168 §5: the last two bits of type of service or traffic class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ecn {
    /// The sender does not understand congestion marks.
    #[default]
    NotEct = 0,
    /// It does; codepoint 01.
    Ect1 = 1,
    /// It does; codepoint 10.
    Ect0 = 2,
    /// A router on the way is congested.
    Ce = 3,
}

impl Ecn {
    /// The codepoint in a type of service or traffic class.
    #[inline]
    pub fn of(tos: u8) -> Self {
        match tos & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }

    /// What the inner packet carries on after decapsulation (RFC 6040 §4.2), `self` being what it carried inside;
    /// `None` if it must be dropped: a congestion mark for somebody who would not understand it.
    #[inline]
    pub fn after(self, outer: Self) -> Option<Self> {
        match (outer, self) {
            (Self::Ce, Self::NotEct) => None,
            (Self::Ce, Self::Ect0 | Self::Ect1 | Self::Ce) => Some(Self::Ce),
            (Self::Ect1, Self::Ect0) => Some(Self::Ect1),
            (Self::NotEct | Self::Ect0 | Self::Ect1, inner) => Some(inner),
        }
    }
}

/// Sets the ECN codepoint of a packet, patching the IPv4 header checksum.
#[inline]
pub fn set_ecn(packet: &mut [u8], ecn: Ecn) {
    match packet {
        [first, tos, _, _, _, _, _, _, _, _, c0, c1, ..] if *first >> 4 == 4 => {
            let old = u16::from_be_bytes([*first, *tos]);
            *tos = *tos & !3 | ecn as u8;
            let new = u16::from_be_bytes([*first, *tos]);
            [*c0, *c1] = replace_word(u16::from_be_bytes([*c0, *c1]), old, new).to_be_bytes();
        }
        // The traffic class stands across two bytes; its low half is the high half of the second.
        [first, second, ..] if *first >> 4 == 6 => *second = *second & !0x30 | (ecn as u8) << 4,
        _ => {}
    }
}

/// Why an address can be neither source nor destination of a packet that crosses a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// A unicast address that routers forward.
    Routable,
    /// 0/8, 127/8, ::, ::1, 255.255.255.255 and reserved 240/4.
    Martian,
    /// 169.254/16, fe80::/10
    LinkLocal,
    /// 224/4, ff00::/8
    Multicast,
}

/// The scope of an address, for the rules about what may cross.
#[inline]
pub fn scope(addr: IpAddr) -> Scope {
    match addr {
        IpAddr::V4(addr) => scope_v4(addr),
        IpAddr::V6(addr) => scope_v6(addr),
    }
}

/// See [`scope`].
#[inline]
pub fn scope_v4(addr: Ipv4Addr) -> Scope {
    match addr.octets() {
        [0 | 127 | 240..=255, ..] => Scope::Martian,
        [169, 254, ..] => Scope::LinkLocal,
        [224..=239, ..] => Scope::Multicast,
        _ => Scope::Routable,
    }
}

/// See [`scope`].
#[inline]
pub fn scope_v6(addr: Ipv6Addr) -> Scope {
    match addr.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => Scope::Martian,
        // ::ffff:0:0/96, RFC 4291 §2.5.5.2: never on the wire.
        [0, 0, 0, 0, 0, 0xffff, _, _] => Scope::Martian,
        [first, ..] if first & 0xffc0 == 0xfe80 => Scope::LinkLocal,
        [first, ..] if first & 0xff00 == 0xff00 => Scope::Multicast,
        _ => Scope::Routable,
    }
}

/// Reads a big-endian 16-bit field of a header of fixed length.
#[inline]
fn be16<const N: usize>(header: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([header[at], header[at + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `udp-v4.pcap` packet 1, inner: an ICMP echo request with TTL 62.
    const ECHO: [u8; 36] = [
        0x45, 0x00, 0x00, 0x24, 0x06, 0x6d, 0x40, 0x00, 0x3e, 0x01, 0x1d, 0x81, 0x0a, 0xf4, 0x01, 0x02, 0x0a,
        0xf4, 0x02, 0x02, 0x08, 0x00, 0x76, 0x7c, 0x75, 0x72, 0x00, 0x01, 0x00, 0x01, 0x02, 0x03, 0x04, 0x05,
        0x06, 0x07,
    ];

    #[test]
    fn an_ipv4_header_is_read() {
        let header = IpHeader::parse(&ECHO).unwrap();
        assert_eq!(header.addrs.src(), "10.244.1.2".parse::<IpAddr>().unwrap());
        assert_eq!(header.addrs.dst(), "10.244.2.2".parse::<IpAddr>().unwrap());
        assert_eq!(
            (header.l4, header.total_len, header.protocol, header.ttl),
            (20, 36, 1, 62)
        );
        assert!(header.dont_fragment);
        assert!(verify_v4_header(&ECHO[..20]));
    }

    #[test]
    fn every_truncation_is_refused() {
        for len in 0..ECHO.len() {
            assert!(IpHeader::parse(&ECHO[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn trailing_bytes_are_not_part_of_the_packet() {
        let mut long = ECHO.to_vec();
        long.extend([0; 9]);
        assert_eq!(IpHeader::parse(&long).unwrap().total_len, 36);
    }

    #[test]
    fn lying_lengths_are_refused() {
        let mut packet = ECHO;
        packet[0] = 0x44;
        assert_eq!(IpHeader::parse(&packet), Err(Malformed::HeaderLength));
        packet[0] = 0x4a;
        assert_eq!(
            IpHeader::parse(&packet),
            Err(Malformed::TotalLength),
            "options longer than the packet"
        );
        packet[0] = 0x55;
        assert_eq!(IpHeader::parse(&packet), Err(Malformed::Version));
    }

    #[test]
    fn decrementing_keeps_the_checksum_right() {
        let mut packet = ECHO;
        for left in (1..62).rev() {
            assert_eq!(decrement_ttl(&mut packet), Some(left));
            assert!(verify_v4_header(&packet[..20]), "ttl {left}");
        }
        assert_eq!(decrement_ttl(&mut packet), None);
        assert_eq!(packet[8], 1, "a packet that may not go on is left alone");
    }

    #[test]
    fn extension_headers_are_walked_to_the_transport() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 24, 60, 64];
        packet.extend([0; 32]);
        packet.extend([44, 0, 1, 4, 0, 0, 0, 0]); // destination options, then a fragment header
        packet.extend([17, 0, 0, 1, 0, 0, 0, 9]); // offset 0, more fragments
        packet.extend([0; 8]);
        let header = IpHeader::parse(&packet).unwrap();
        assert_eq!(
            (header.protocol, header.l4, header.fragment),
            (17, 56, Fragment::First)
        );
    }

    #[test]
    fn an_endless_extension_chain_is_refused() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 80, 60, 64];
        packet.extend([0; 32]);
        for _ in 0..10 {
            packet.extend([60, 0, 1, 4, 0, 0, 0, 0]);
        }
        assert_eq!(IpHeader::parse(&packet), Err(Malformed::ExtensionChain));
    }

    #[test]
    fn an_extension_header_past_the_end_is_refused() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 8, 60, 64];
        packet.extend([0; 32]);
        packet.extend([6, 200, 1, 4, 0, 0, 0, 0]);
        assert_eq!(IpHeader::parse(&packet), Err(Malformed::Truncated));
    }

    #[test]
    fn scopes_follow_the_registries() {
        for (text, expected) in [
            ("10.1.2.3", Scope::Routable),
            ("0.1.2.3", Scope::Martian),
            ("127.0.0.1", Scope::Martian),
            ("255.255.255.255", Scope::Martian),
            ("169.254.1.1", Scope::LinkLocal),
            ("224.0.0.1", Scope::Multicast),
            ("fd00::1", Scope::Routable),
            ("::1", Scope::Martian),
            ("::ffff:10.0.0.1", Scope::Martian),
            ("fe80::1", Scope::LinkLocal),
            ("ff02::2", Scope::Multicast),
        ] {
            assert_eq!(scope(text.parse().unwrap()), expected, "{text}");
        }
    }

    /// RFC 6040 figure 4, row by row: outer Not-ECT, ECT(0), ECT(1), CE over inner Not-ECT, ECT(0), ECT(1), CE.
    #[test]
    fn congestion_marks_are_combined_as_the_rfc_says() {
        use Ecn::{Ce, Ect0, Ect1, NotEct};
        let table = [
            (NotEct, [Some(NotEct), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect0, [Some(NotEct), Some(Ect0), Some(Ect1), Some(Ce)]),
            (Ect1, [Some(NotEct), Some(Ect1), Some(Ect1), Some(Ce)]),
            (Ce, [None, Some(Ce), Some(Ce), Some(Ce)]),
        ];
        for (outer, results) in table {
            for (inner, result) in [NotEct, Ect0, Ect1, Ce].into_iter().zip(results) {
                assert_eq!(inner.after(outer), result, "{inner:?} inside {outer:?}");
            }
        }
    }

    #[test]
    fn setting_a_congestion_mark_keeps_the_header_sound_and_the_rest_as_it_was() {
        let mut v4 = ECHO;
        for ecn in [Ecn::Ce, Ecn::Ect1, Ecn::Ect0, Ecn::NotEct] {
            set_ecn(&mut v4, ecn);
            assert!(verify_v4_header(&v4[..V4_LEN]));
            assert_eq!(Ecn::of(IpHeader::parse(&v4).unwrap().tos), ecn);
        }
        assert_eq!(v4, ECHO);
        let mut v6 = [0; V6_LEN];
        v6[..4].copy_from_slice(&[0x6b, 0x95, 0x02, 0xf9]);
        v6[6] = protocol::UDP;
        for ecn in [Ecn::Ce, Ecn::NotEct, Ecn::Ect0] {
            set_ecn(&mut v6, ecn);
            let tos = IpHeader::parse(&v6).unwrap().tos;
            assert_eq!((tos >> 2, Ecn::of(tos)), (0xb9 >> 2, ecn));
        }
        assert_eq!(
            v6[..4],
            [0x6b, 0xa5, 0x02, 0xf9],
            "version, class and flow label else untouched"
        );
    }
}
