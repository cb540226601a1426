//! TCP and UDP headers, RFC 9293 and RFC 768: named byte ranges and the few fields split and coalesce work on.

use super::Malformed;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
