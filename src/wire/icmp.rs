//! ICMP and ICMPv6 errors about inner packets, RFC 792, RFC 4443: when they may be sent, and building them.
//!
//! The errors go to the inner sender. They quote as much of the offender as fits 576 bytes (RFC 1812 §4.3.2.3) or 1280
//! (RFC 4443 §2.4 c): hosts need more than the bare header to act on a *too big*.

use etherparse::icmpv4::DestUnreachableHeader;
use etherparse::icmpv6::{DestUnreachableCode, TimeExceededCode as TimeExceededV6};
use etherparse::{Icmpv4Type, Icmpv6Type, PacketBuilder};

use super::ip::{Addrs, Fragment, IpHeader, Scope, V4_LEN, V6_LEN, protocol, scope};

/// The largest error built, bytes: the minimum IPv6 MTU.
pub const MAX_LEN: usize = 1280;
/// The largest IPv4 error, bytes.
const MAX_LEN_V4: usize = 576;
/// An ICMP header is 8 bytes in both families.
const ICMP_LEN: usize = 8;
/// Hop limit of the errors, as other packets of this host.
const TTL: u8 = 64;

/// What is wrong with the offending packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IcmpError {
    /// No peer has the destination: net unreachable (type 3 code 0) or no route (type 1 code 0).
    NoRoute,
    /// TTL or hop limit ran out here.
    TimeExceeded,
    /// Larger than the path to the peer carries; says how much fits, bytes.
    TooBig(u16),
}

/// Whether RFC 1812 §4.3.2.7 and RFC 4443 §2.4 (e) allow an error about `packet` at all.
pub fn may_answer(header: &IpHeader, packet: &[u8]) -> bool {
    if header.fragment == Fragment::Later {
        return false;
    }
    if scope(header.addrs.src()) != Scope::Routable || scope(header.addrs.dst()) != Scope::Routable {
        return false;
    }
    let icmp_type = packet.get(header.l4).copied();
    match header.protocol {
        // Only queries may be answered: echo, timestamp, information, address mask.
        protocol::ICMP => matches!(icmp_type, Some(0 | 8 | 13..=18)),
        // RFC 4443 §2.1: errors have the high bit clear; 137 is redirect.
        protocol::ICMPV6 => icmp_type.is_some_and(|kind| kind >= 128 && kind != 137),
        _ => true,
    }
}

/// Builds the error about `packet` into `out`, with `source` (ours) as sender; gives its length.
///
/// `None` if the families of `source` and `packet` differ or the error does not fit `out`.
pub fn build(
    error: IcmpError,
    source: std::net::IpAddr,
    header: &IpHeader,
    packet: &[u8],
    out: &mut [u8],
) -> Option<usize> {
    let mut cursor = std::io::Cursor::new(out);
    match (header.addrs, source) {
        (Addrs::V4 { src, .. }, std::net::IpAddr::V4(from)) => {
            let quoted = packet.get(..packet.len().min(MAX_LEN_V4 - V4_LEN - ICMP_LEN))?;
            let kind = match error {
                IcmpError::NoRoute => Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Network),
                IcmpError::TimeExceeded => {
                    Icmpv4Type::TimeExceeded(etherparse::icmpv4::TimeExceededCode::TtlExceededInTransit)
                }
                IcmpError::TooBig(next_hop_mtu) => {
                    Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                        next_hop_mtu,
                    })
                }
            };
            PacketBuilder::ipv4(from.octets(), src.octets(), TTL)
                .icmpv4(kind)
                .write(&mut cursor, quoted)
                .ok()?;
        }
        (Addrs::V6 { src, .. }, std::net::IpAddr::V6(from)) => {
            let quoted = packet.get(..packet.len().min(MAX_LEN - V6_LEN - ICMP_LEN))?;
            let kind = match error {
                IcmpError::NoRoute => Icmpv6Type::DestinationUnreachable(DestUnreachableCode::NoRoute),
                IcmpError::TimeExceeded => Icmpv6Type::TimeExceeded(TimeExceededV6::HopLimitExceeded),
                IcmpError::TooBig(mtu) => Icmpv6Type::PacketTooBig { mtu: u32::from(mtu) },
            };
            PacketBuilder::ipv6(from.octets(), src.octets(), TTL)
                .icmpv6(kind)
                .write(&mut cursor, quoted)
                .ok()?;
        }
        (Addrs::V4 { .. }, std::net::IpAddr::V6(_)) | (Addrs::V6 { .. }, std::net::IpAddr::V4(_)) => {
            return None;
        }
    }
    usize::try_from(cursor.position()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::checksum::Sum;
    use crate::wire::ip::verify_v4_header;

    fn udp_packet(len: usize) -> Vec<u8> {
        let mut packet = Vec::new();
        PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 9, 2], 64)
            .udp(1000, 2000)
            .write(&mut packet, &vec![7; len - 28])
            .unwrap();
        packet
    }

    #[test]
    fn an_unreachable_quotes_the_offender() {
        let offender = udp_packet(1000);
        let header = IpHeader::parse(&offender).unwrap();
        let mut out = [0; MAX_LEN];
        let len = build(
            IcmpError::NoRoute,
            "10.244.1.0".parse().unwrap(),
            &header,
            &offender,
            &mut out,
        )
        .unwrap();
        assert_eq!(len, MAX_LEN_V4);
        let error = &out[..len];
        let outer = IpHeader::parse(error).unwrap();
        assert!(verify_v4_header(&error[..20]));
        assert_eq!(outer.addrs.dst(), header.addrs.src());
        assert_eq!(&error[20..22], &[3, 0], "type 3 code 0");
        assert_eq!(Sum::of(&error[20..]).fold(), 0xffff, "ICMP checksum");
        assert_eq!(&error[28..], &offender[..548]);
    }

    #[test]
    fn too_big_carries_the_mtu_in_both_families() {
        let offender = udp_packet(600);
        let header = IpHeader::parse(&offender).unwrap();
        let mut out = [0; MAX_LEN];
        let len = build(
            IcmpError::TooBig(1400),
            "10.244.1.0".parse().unwrap(),
            &header,
            &offender,
            &mut out,
        )
        .unwrap();
        assert_eq!(&out[20..22], &[3, 4]);
        assert_eq!(&out[26..28], &1400u16.to_be_bytes());
        assert!(len <= MAX_LEN_V4);

        let mut offender = Vec::new();
        PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], 64)
            .udp(1, 2)
            .write(&mut offender, &[0; 1400])
            .unwrap();
        let header = IpHeader::parse(&offender).unwrap();
        let len = build(
            IcmpError::TooBig(1300),
            "fd00::1".parse().unwrap(),
            &header,
            &offender,
            &mut out,
        )
        .unwrap();
        assert_eq!(len, MAX_LEN);
        assert_eq!(&out[40..42], &[2, 0]);
        assert_eq!(&out[44..48], &1300u32.to_be_bytes());
        let answer = IpHeader::parse(&out[..len]).unwrap();
        assert_eq!(
            (answer.pseudo(len - 40) + Sum::of(&out[40..len])).fold(),
            0xffff,
            "ICMPv6 checksum"
        );
    }

    #[test]
    fn errors_fragments_and_odd_addresses_are_never_answered() {
        let mut error = Vec::new();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .icmpv4(Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Host))
            .write(&mut error, &[0; 28])
            .unwrap();
        assert!(
            !may_answer(&IpHeader::parse(&error).unwrap(), &error),
            "an ICMP error"
        );

        let mut ping = Vec::new();
        PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
            .icmpv4_echo_request(1, 1)
            .write(&mut ping, &[])
            .unwrap();
        assert!(
            may_answer(&IpHeader::parse(&ping).unwrap(), &ping),
            "an echo request"
        );

        let mut fragment = udp_packet(100);
        fragment[7] = 5;
        assert!(
            !may_answer(&IpHeader::parse(&fragment).unwrap(), &fragment),
            "a later fragment"
        );

        for (source, what) in [
            ([224, 0, 0, 1], "multicast"),
            ([0, 0, 0, 0], "unspecified"),
            ([127, 0, 0, 1], "loopback"),
        ] {
            let mut packet = udp_packet(100);
            packet[12..16].copy_from_slice(&source);
            assert!(
                !may_answer(&IpHeader::parse(&packet).unwrap(), &packet),
                "from {what}"
            );
        }
    }

    #[test]
    fn families_are_not_mixed() {
        let offender = udp_packet(100);
        let header = IpHeader::parse(&offender).unwrap();
        assert_eq!(
            build(
                IcmpError::NoRoute,
                "fd00::1".parse().unwrap(),
                &header,
                &offender,
                &mut [0; 1280]
            ),
            None
        );
    }
}
