//! TCP and UDP headers, RFC 9293 and RFC 768: named byte ranges and the few fields split and coalesce work on.

use super::Malformed;
use super::checksum::replace_word;

/// Byte ranges of a TCP header.
pub mod tcp {
    use std::ops::Range;

    /// Shortest header, bytes.
    pub const MIN_LEN: usize = 20;
    /// Sequence number.
    pub const SEQ: Range<usize> = 4..8;
    /// Acknowledgement number.
    pub const ACK: Range<usize> = 8..12;
    /// Data offset and the reserved bits.
    pub const DATA_OFFSET: usize = 12;
    /// Flags, CWR to FIN.
    pub const FLAGS: usize = 13;
    /// Window.
    pub const WINDOW: Range<usize> = 14..16;
    /// Checksum.
    pub const CHECKSUM: Range<usize> = 16..18;

    /// FIN
    pub const FIN: u8 = 0x01;
    /// SYN
    pub const SYN: u8 = 0x02;
    /// PSH
    pub const PSH: u8 = 0x08;
    /// ACK
    pub const ACK_FLAG: u8 = 0x10;
    /// ECE
    pub const ECE: u8 = 0x40;
    /// CWR
    pub const CWR: u8 = 0x80;
}

/// Byte ranges of a UDP header.
pub mod udp {
    use std::ops::Range;

    /// Header length, bytes.
    pub const LEN: usize = 8;
    /// Datagram length, header included.
    pub const LENGTH: Range<usize> = 4..6;
    /// Checksum.
    pub const CHECKSUM: Range<usize> = 6..8;
}

/// Length of the TCP header at the front of `l4`, options included.
///
/// # Errors
/// `Truncated` if there are fewer bytes than the header says; `HeaderLength` if it says less than 20.
#[inline]
pub fn tcp_header_len(l4: &[u8]) -> Result<usize, Malformed> {
    let header = l4.first_chunk::<{ tcp::MIN_LEN }>().ok_or(Malformed::Truncated)?;
    let len = usize::from(header[tcp::DATA_OFFSET] >> 4) * 4;
    if len < tcp::MIN_LEN {
        return Err(Malformed::HeaderLength);
    }
    if len > l4.len() {
        return Err(Malformed::Truncated);
    }
    Ok(len)
}

/// Lowers the maximum segment size that a TCP SYN announces (RFC 9293 §3.7.1) to `limit` bytes, so that neither end sends segments too large for a
/// path whose "too big" answers get lost. `finished` says whether the checksum is complete and must follow.
///
/// Gives the old size if it was larger. A segment without SYN or without the option, and options that make no sense, are left alone.
#[inline]
pub fn clamp_mss(l4: &mut [u8], limit: u16, finished: bool) -> Option<u16> {
    const END: u8 = 0;
    const NOP: u8 = 1;
    const MSS: u8 = 2;
    if l4.get(tcp::FLAGS)? & tcp::SYN == 0 {
        return None;
    }
    let end = tcp_header_len(l4).ok()?;
    let mut at = tcp::MIN_LEN;
    while at + 4 <= end {
        match *l4.get(at..at + 4)? {
            [END, ..] => return None,
            [NOP, ..] => at += 1,
            [MSS, 4, high, low] => {
                let old = u16::from_be_bytes([high, low]);
                if old <= limit {
                    return None;
                }
                l4.get_mut(at + 2..at + 4)?.copy_from_slice(&limit.to_be_bytes());
                if finished {
                    // An option may start at an odd place, where its bytes count in the other order.
                    let turn = |value: u16| {
                        if at.is_multiple_of(2) {
                            value
                        } else {
                            value.swap_bytes()
                        }
                    };
                    let field = l4.get_mut(tcp::CHECKSUM)?;
                    let sum = u16::from_be_bytes([field[0], field[1]]);
                    field.copy_from_slice(&replace_word(sum, turn(old), turn(limit)).to_be_bytes());
                }
                return Some(old);
            }
            [_, len, ..] if len >= 2 => at += usize::from(len),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::checksum::Sum;

    #[test]
    fn a_tcp_header_says_its_length() {
        let mut header = [0u8; 32];
        header[tcp::DATA_OFFSET] = 0x80;
        assert_eq!(tcp_header_len(&header), Ok(32));
        assert_eq!(tcp_header_len(&header[..31]), Err(Malformed::Truncated));
        header[tcp::DATA_OFFSET] = 0x40;
        assert_eq!(tcp_header_len(&header), Err(Malformed::HeaderLength));
        assert_eq!(tcp_header_len(&header[..19]), Err(Malformed::Truncated));
    }

    /// A SYN with these options, padded, and its right checksum (no pseudo header: its sum is a constant).
    fn syn(options: &[u8]) -> Vec<u8> {
        let mut l4 = vec![0; tcp::MIN_LEN];
        l4[tcp::FLAGS] = tcp::SYN;
        l4.extend_from_slice(options);
        l4.resize(l4.len().next_multiple_of(4), 0);
        l4[tcp::DATA_OFFSET] = u8::try_from(l4.len() / 4).unwrap() << 4;
        let sum = Sum::of(&l4).finish();
        l4[tcp::CHECKSUM].copy_from_slice(&sum.to_be_bytes());
        l4
    }

    #[test]
    fn a_large_segment_size_is_lowered_and_the_checksum_follows() {
        for options in [
            &[2, 4, 0x05, 0xb4][..],
            &[1, 2, 4, 0x05, 0xb4, 0],
            &[1, 1, 2, 4, 0x23, 0x00],
            &[8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, 0xff, 0xff],
            &[3, 3, 7, 2, 4, 0x05, 0xb4, 0],
        ] {
            let mut l4 = syn(options);
            assert!(clamp_mss(&mut l4, 1410, true).is_some(), "{options:?}");
            assert_eq!(Sum::of(&l4).fold(), 0xffff, "{options:?}");
            assert!(
                l4.windows(4).any(|window| window == [2, 4, 0x05, 0x82]),
                "{options:?}"
            );
            assert_eq!(clamp_mss(&mut l4, 1410, true), None, "once is enough");
        }
    }

    #[test]
    fn what_is_small_absent_or_senseless_is_left_alone() {
        let mut not_syn = syn(&[2, 4, 0x05, 0xb4]);
        not_syn[tcp::FLAGS] = tcp::ACK_FLAG;
        for l4 in [
            not_syn,
            syn(&[2, 4, 0x05, 0x82]),
            syn(&[]),
            syn(&[0, 2, 4, 0x05, 0xb4]),
            syn(&[2, 3, 0x05, 0xb4]),
            syn(&[9, 0, 2, 4]),
            syn(&[9, 40, 2, 4]),
            vec![2; 10],
        ] {
            let mut clamped = l4.clone();
            assert_eq!(clamp_mss(&mut clamped, 1410, true), None, "{l4:?}");
            assert_eq!(clamped, l4);
        }
    }

    #[test]
    fn a_checksum_that_is_not_finished_stays() {
        let mut l4 = syn(&[2, 4, 0x05, 0xb4]);
        let before = l4[tcp::CHECKSUM].to_vec();
        assert_eq!(clamp_mss(&mut l4, 1000, false), Some(1460));
        assert_eq!(l4[tcp::CHECKSUM], before);
    }
}
