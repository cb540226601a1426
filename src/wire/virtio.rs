//! The virtio-net header in front of every packet of a TUN queue with `IFF_VNET_HDR`.
//!
//! Layout of `struct virtio_net_hdr` (linux/virtio_net.h), host byte order:
//!
//! ```text
//! | 0 flags | 1 gso_type | 2-3 hdr_len | 4-5 gso_size | 6-7 csum_start | 8-9 csum_offset |
//! ```
//!
//! `csum_start` counts from the first byte of the IP header. `hdr_len` from the kernel is a hint that can be the whole
//! first packet when the traffic was forwarded; nothing here trusts it.

use super::Malformed;

/// Set in `flags`: the checksum field holds the pseudo-header sum; finish it from `csum_start` to the end.
const NEEDS_CSUM: u8 = 1;
/// Set in `gso_type`: the first segment carries CWR.
const GSO_ECN: u8 = 0x80;

/// What one virtio header says of the packet behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioHeader {
    /// Where the checksum is still to be done.
    pub checksum: Option<PartialChecksum>,
    /// How the packet is to be cut, if it is a super-packet.
    pub gso: Option<Gso>,
}

/// A checksum that only holds its pseudo-header sum so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// First byte summed: where the L4 header starts.
    pub start: u16,
    /// Place of the checksum field, counted from `start`: 16 for TCP, 6 for UDP.
    pub offset: u16,
}

/// How a super-packet is cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// What it carries.
    pub kind: GsoKind,
    /// L4 payload bytes a segment; never 0.
    pub size: u16,
    /// Length of all headers, written for the kernel's linear area; ignored when read.
    pub header_len: u16,
}

/// The kinds of super-packet we take and make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GsoKind {
    /// TCP over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    TcpV4,
    /// TCP over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    TcpV6,
    /// UDP datagrams of one size (`VIRTIO_NET_HDR_GSO_UDP_L4`, Linux 6.2).
    Udp,
}

impl VirtioHeader {
    /// Bytes on the queue.
    pub const LEN: usize = 10;

    /// Splits the header off what a queue handed over.
    ///
    /// # Errors
    /// `Truncated` below 10 bytes; `TotalLength` for a segment size of 0; `Version` for a kind of super-packet we never asked for.
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), Malformed> {
        let (header, rest) = bytes
            .split_first_chunk::<{ Self::LEN }>()
            .ok_or(Malformed::Truncated)?;
        let [flags, kind, h0, h1, s0, s1, c0, c1, o0, o1] = *header;
        let checksum = (flags & NEEDS_CSUM != 0).then(|| PartialChecksum {
            start: u16::from_ne_bytes([c0, c1]),
            offset: u16::from_ne_bytes([o0, o1]),
        });
        let kind = match kind & !GSO_ECN {
            0 => None,
            1 => Some(GsoKind::TcpV4),
            4 => Some(GsoKind::TcpV6),
            5 => Some(GsoKind::Udp),
            _ => return Err(Malformed::Version),
        };
        let gso = match kind {
            None => None,
            Some(kind) => {
                let size = u16::from_ne_bytes([s0, s1]);
                if size == 0 {
                    return Err(Malformed::TotalLength);
                }
                let header_len = u16::from_ne_bytes([h0, h1]);
                Some(Gso {
                    kind,
                    size,
                    header_len,
                })
            }
        };
        Ok((Self { checksum, gso }, rest))
    }

    /// The ten bytes to write in front of a packet.
    #[inline]
    pub fn emit(self) -> [u8; Self::LEN] {
        let mut out = [0; Self::LEN];
        if let Some(PartialChecksum { start, offset }) = self.checksum {
            out[0] = NEEDS_CSUM;
            out[6..8].copy_from_slice(&start.to_ne_bytes());
            out[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
        if let Some(Gso {
            kind,
            size,
            header_len,
        }) = self.gso
        {
            out[1] = match kind {
                GsoKind::TcpV4 => 1,
                GsoKind::TcpV6 => 4,
                GsoKind::Udp => 5,
            };
            out[2..4].copy_from_slice(&header_len.to_ne_bytes());
            out[4..6].copy_from_slice(&size.to_ne_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_emit_and_parse() {
        let header = VirtioHeader {
            checksum: Some(PartialChecksum {
                start: 20,
                offset: 16,
            }),
            gso: Some(Gso {
                kind: GsoKind::TcpV4,
                size: 1420,
                header_len: 52,
            }),
        };
        let bytes = header.emit();
        assert_eq!(VirtioHeader::parse(&bytes), Ok((header, &[][..])));
    }

    #[test]
    fn the_ecn_bit_is_masked_off() {
        let mut bytes = [0u8; 10];
        bytes[1] = 0x81;
        bytes[4..6].copy_from_slice(&1000u16.to_ne_bytes());
        let (header, _) = VirtioHeader::parse(&bytes).unwrap();
        assert_eq!(header.gso.unwrap().kind, GsoKind::TcpV4);
    }

    #[test]
    fn a_segment_size_of_zero_is_refused() {
        let mut bytes = [0u8; 10];
        bytes[1] = 1;
        assert_eq!(VirtioHeader::parse(&bytes), Err(Malformed::TotalLength));
        bytes[1] = 3;
        assert_eq!(VirtioHeader::parse(&bytes), Err(Malformed::Version));
        assert_eq!(VirtioHeader::parse(&bytes[..9]), Err(Malformed::Truncated));
    }
}
