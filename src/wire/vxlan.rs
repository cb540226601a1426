//! VXLAN and the Ethernet header inside it, RFC 7348 §5.
//!
//! ```text
//! | flags 0x08 | reserved 24 = 0 | VNI 24 | reserved 8 = 0 | destination MAC 48 | source MAC 48 | EtherType 16 | IP packet
//! ```
//!
//! Reserved bits are ignored when read, as the RFC asks (the kernel refuses them), and sent as zero. The group policy extension
//! uses some of them: it can be read over, and is never sent.

use super::Malformed;
use crate::addr::{MacAddr, Vni};

/// Length of the VXLAN header, bytes.
pub const LEN: usize = 8;
/// Length of VXLAN and Ethernet header, bytes.
pub const HEADERS_LEN: usize = LEN + 14;
/// The flag that says that the VNI is there.
const VNI_FLAG: u8 = 0x08;

/// EtherTypes (IANA) that may stand inside.
pub mod ethertype {
    /// IPv4
    pub const IPV4: u16 = 0x0800;
    /// IPv6
    pub const IPV6: u16 = 0x86dd;
}

/// VXLAN and Ethernet header, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanHeader {
    /// The network; `None` if the flag says that there is none.
    pub vni: Option<Vni>,
    /// Ethernet destination.
    pub dst: MacAddr,
    /// Ethernet source.
    pub src: MacAddr,
    /// EtherType of what follows.
    pub ethertype: u16,
}

impl VxlanHeader {
    /// Reads the headers at the front of a datagram.
    ///
    /// # Errors
    /// `Truncated` if the datagram is shorter than they are.
    #[inline]
    pub fn parse(datagram: &[u8]) -> Result<Self, Malformed> {
        let header = datagram
            .first_chunk::<HEADERS_LEN>()
            .ok_or(Malformed::Truncated)?;
        let &[
            flags,
            _,
            _,
            _,
            v0,
            v1,
            v2,
            _,
            d0,
            d1,
            d2,
            d3,
            d4,
            d5,
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            t0,
            t1,
        ] = header;
        let vni = Vni::new(u32::from_be_bytes([0, v0, v1, v2])).ok();
        Ok(Self {
            vni: vni.filter(|_| flags & VNI_FLAG != 0),
            dst: [d0, d1, d2, d3, d4, d5].into(),
            src: [s0, s1, s2, s3, s4, s5].into(),
            ethertype: u16::from_be_bytes([t0, t1]),
        })
    }

    /// Writes the headers; without a VNI the flag is clear and the field zero.
    pub fn emit(&self) -> [u8; HEADERS_LEN] {
        let [_, v0, v1, v2] = self.vni.map_or(0, Vni::get).to_be_bytes();
        let flags = if self.vni.is_some() { VNI_FLAG } else { 0 };
        let [d0, d1, d2, d3, d4, d5] = self.dst.octets();
        let [s0, s1, s2, s3, s4, s5] = self.src.octets();
        let [t0, t1] = self.ethertype.to_be_bytes();
        [
            flags, 0, 0, 0, v0, v1, v2, 0, d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5, t0, t1,
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(
            vni in proptest::option::of(0..=Vni::MAX),
            dst: [u8; 6],
            src: [u8; 6],
            ethertype: u16,
            rest in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let header = VxlanHeader {
                vni: vni.and_then(|vni| Vni::new(vni).ok()),
                dst: dst.into(),
                src: src.into(),
                ethertype,
            };
            let mut datagram = header.emit().to_vec();
            datagram.extend(rest);
            prop_assert_eq!(VxlanHeader::parse(&datagram), Ok(header));
        }

        #[test]
        fn reserved_bits_change_nothing(noise: [u8; 22]) {
            let header = VxlanHeader {
                vni: Vni::new(0x01_02_03).ok(),
                dst: [2, 0, 0, 0, 0, 1].into(),
                src: [2, 0, 0, 0, 0, 2].into(),
                ethertype: ethertype::IPV6,
            };
            let mut bytes = header.emit();
            bytes[0] |= noise[0];
            bytes[1..4].copy_from_slice(&noise[1..4]);
            bytes[7] = noise[7];
            prop_assert_eq!(VxlanHeader::parse(&bytes), Ok(header));
        }

        #[test]
        fn fewer_bytes_than_the_headers_are_truncated(bytes in proptest::collection::vec(any::<u8>(), 0..HEADERS_LEN)) {
            prop_assert_eq!(VxlanHeader::parse(&bytes), Err(Malformed::Truncated));
        }
    }
}
