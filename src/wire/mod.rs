//! Wire formats: bytes into types and back, one file a protocol.
//!
//! Nothing here allocates, logs, reads a clock or knows a socket. Input goes through one checking constructor
//! per format ([`ip::IpHeader::parse`], [`virtio::VirtioHeader::parse`], …); what it returns holds lengths that have
//! been checked against the bytes, so that later accessors cannot reach past the end.

pub mod checksum;
pub mod icmp;
pub mod ip;
pub mod srv6;
pub mod transport;
pub mod virtio;
pub mod vxlan;

/// Why bytes are not a packet of the format they were taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// Fewer bytes than the smallest header, or than a header says it is long.
    Truncated,
    /// The version nibble is neither 4 nor 6.
    Version,
    /// IPv4 header length below 20 bytes, or a TCP data offset below 20 bytes.
    HeaderLength,
    /// The length field says less than the headers, or more than there are bytes.
    TotalLength,
    /// The IPv4 header checksum is wrong.
    HeaderChecksum,
    /// An extension header chain longer than we walk.
    ExtensionChain,
}
