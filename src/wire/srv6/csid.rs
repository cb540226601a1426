//! Compressed SIDs with the NEXT flavour, RFC 9800: several in one address.

use std::net::Ipv6Addr;

use thiserror::Error;

/// How compressed SIDs lie in an address (RFC 9800 §3): `| block | C-SID | argument … 0 |`, where the argument begins with the next C-SID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CsidFormat {
    block_len: u8,
    node_len: u8,
}

/// What is wrong with compressed SIDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum CsidError {
    /// The lengths are not those of whole bytes, or do not fit an address.
    #[error("{0} bits of block and {1} of C-SID: whole bytes are needed, at least one of each, 16 in all")]
    Format(u8, u8),
    /// Zero ends a container, and wider numbers do not fit.
    #[error("{0:#x} is no C-SID of {1} bits")]
    Csid(u128, u8),
}

impl CsidFormat {
    /// The format of RFC 9800's examples and the kernel's default: blocks of 32 bits, C-SIDs of 16.
    pub const F3216: Self = Self {
        block_len: 32,
        node_len: 16,
    };

    /// A format; lengths in bits.
    ///
    /// # Errors
    /// The lengths are not multiples of 8 from 8 to 120, or are more than 128 together.
    pub fn new(block_len: u8, node_len: u8) -> Result<Self, CsidError> {
        let whole = |len: u8| len.is_multiple_of(8) && (8..=120).contains(&len);
        if whole(block_len) && whole(node_len) && block_len + node_len <= 128 {
            Ok(Self { block_len, node_len })
        } else {
            Err(CsidError::Format(block_len, node_len))
        }
    }

    /// Length of the block, bits.
    pub fn block_len(self) -> u8 {
        self.block_len
    }

    /// Length of a C-SID, bits.
    pub fn node_len(self) -> u8 {
        self.node_len
    }

    /// The container after its active C-SID was used up: the argument moves to its place. `None` if there is no argument, RFC 9800
    /// §4.1.1.
    #[inline]
    pub fn next(self, container: Ipv6Addr) -> Option<Ipv6Addr> {
        let bits = container.to_bits();
        let argument = bits & low_bits(128 - self.block_len - self.node_len);
        let block = bits & !low_bits(128 - self.block_len);
        (argument != 0).then(|| Ipv6Addr::from_bits(block | argument << self.node_len))
    }

    /// Puts C-SIDs, in the order of travel, behind a block, whose lower bits are ignored: as many containers as it takes, each full
    /// but for the last.
    ///
    /// # Errors
    /// A C-SID is 0 or too wide.
    pub fn pack(
        self,
        block: Ipv6Addr,
        csids: &[u128],
    ) -> Result<impl Iterator<Item = Ipv6Addr> + use<'_>, CsidError> {
        let widest = low_bits(self.node_len);
        if let Some(&wrong) = csids.iter().find(|&&csid| csid == 0 || csid > widest) {
            return Err(CsidError::Csid(wrong, self.node_len));
        }
        let Self { block_len, node_len } = self;
        let block = block.to_bits() & !low_bits(128 - block_len);
        let capacity = usize::from((128 - block_len) / node_len);
        Ok(csids.chunks(capacity).map(move |chunk| {
            let mut free = 128 - block_len;
            let bits = chunk.iter().fold(block, |bits, csid| {
                free -= node_len;
                bits | csid << free
            });
            Ipv6Addr::from_bits(bits)
        }))
    }
}

/// The lowest `n` bits, less than 128 of them.
#[inline]
fn low_bits(n: u8) -> u128 {
    (1 << n) - 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_container_is_used_up_from_the_front() {
        let format = CsidFormat::F3216;
        let steps = ["fcbb:bb00:1:2:d4::", "fcbb:bb00:2:d4::", "fcbb:bb00:d4::"].map(sid);
        assert_eq!(format.next(steps[0]), Some(steps[1]), "as in srv6-usid.pcap");
        assert_eq!(format.next(steps[1]), Some(steps[2]));
        assert_eq!(format.next(steps[2]), None);
        let whole = CsidFormat::new(64, 64).unwrap();
        assert_eq!(
            whole.next(sid("fcbb:bb00:1:2:3:4:5:6")),
            None,
            "no room for an argument"
        );
        let bytes = CsidFormat::new(8, 8).unwrap();
        assert_eq!(bytes.next(sid("fc01:203::5")), Some(sid("fc02:300::500")));
    }

    #[test]
    fn csids_fill_containers() {
        let format = CsidFormat::F3216;
        let block = sid("fcbb:bb00:ffff::");
        let pack = |csids: &[u128]| {
            format
                .pack(block, csids)
                .map(|containers| containers.collect::<Vec<_>>())
        };
        assert_eq!(pack(&[1, 2, 0xd4]), Ok(vec![sid("fcbb:bb00:1:2:d4::")]));
        assert_eq!(
            pack(&[1, 2, 3, 4, 5, 6, 7]),
            Ok(vec![sid("fcbb:bb00:1:2:3:4:5:6"), sid("fcbb:bb00:7::")])
        );
        assert_eq!(pack(&[]), Ok(vec![]));
        assert_eq!(pack(&[1, 0, 2]), Err(CsidError::Csid(0, 16)));
        assert_eq!(pack(&[0x1_0000]), Err(CsidError::Csid(0x1_0000, 16)));
        for (block_len, node_len) in [(0, 16), (32, 0), (33, 16), (32, 12), (120, 16), (128, 8)] {
            assert_eq!(
                CsidFormat::new(block_len, node_len),
                Err(CsidError::Format(block_len, node_len))
            );
        }
        assert_eq!(CsidFormat::new(32, 16), Ok(format));
    }

    proptest! {
        #[test]
        fn packed_csids_come_out_in_order(csids in proptest::collection::vec(1..=0xffffu128, 1..20)) {
            let format = CsidFormat::F3216;
            let mut seen = Vec::new();
            for container in format.pack(sid("fcbb:bb00::"), &csids).unwrap() {
                let mut active = Some(container);
                while let Some(address) = active {
                    seen.push(address.to_bits() >> 80 & 0xffff);
                    active = format.next(address);
                }
            }
            prop_assert_eq!(seen, csids);
        }
    }

    fn sid(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }
}
