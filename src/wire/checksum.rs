//! The internet checksum, RFC 1071, and its incremental update, RFC 1624.
//!
//! Sums are kept as native-order 32-bit words added into a 64-bit accumulator and folded at the end; RFC 1071 §2(B)
//! lets the byte order wait until the result is stored, so [`Sum`] is in *memory order*: [`Sum::fold`] gives the two bytes
//! as they stand in the packet. Summing in several parts is allowed at even offsets only.

use std::net::{Ipv4Addr, Ipv6Addr};

/// An unfolded one's-complement sum in memory order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Self = Self(0);

    /// Sums `bytes`; an odd last byte counts as if followed by zero, RFC 1071 §4.1.
    #[inline]
    pub fn of(bytes: &[u8]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if bytes.len() >= WIDE && std::arch::is_x86_feature_detected!("avx2") {
            #[expect(
                unsafe_code,
                reason = "calls safe code compiled for a CPU feature that was just found present"
            )]
            // SAFETY: the only demand of `of_avx2` is that the CPU has AVX2.
            return unsafe { of_avx2(bytes) };
        }
        Self::of_lanes(bytes)
    }

    /// The sum in vector lanes, as wide as the CPU features this is compiled for allow.
    #[inline(always)]
    fn of_lanes(bytes: &[u8]) -> Self {
        // Sixteen accumulators let the compiler use vector lanes; 32-bit words cannot overflow a 64-bit lane in 2^32 steps.
        let (chunks, rest) = bytes.as_chunks::<64>();
        let mut lanes = [0u64; 16];
        for chunk in chunks {
            let (words, _) = chunk.as_chunks::<4>();
            for (lane, word) in lanes.iter_mut().zip(words) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let (words, rest) = rest.as_chunks::<4>();
        let mut tail: u64 = words
            .iter()
            .map(|word| u64::from(u32::from_ne_bytes(*word)))
            .sum();
        if !rest.is_empty() {
            let mut last = [0u8; 4];
            for (to, from) in last.iter_mut().zip(rest) {
                *to = *from;
            }
            tail += u64::from(u32::from_ne_bytes(last));
        }
        let total: u64 = lanes.iter().sum::<u64>() + tail;
        // One partial fold keeps room for adding many sums.
        Self((total & 0xffff_ffff) + (total >> 32))
    }

    /// The sum of one 16-bit field of value `value`.
    #[inline]
    pub fn word(value: u16) -> Self {
        Self(u64::from(value.to_be()))
    }

    /// The sum of one 32-bit field of value `value`.
    #[inline]
    pub fn long(value: u32) -> Self {
        Self(u64::from(value.to_be()))
    }

    /// Folds to the 16-bit one's-complement sum, as the two bytes stand in the packet, read big-endian.
    #[inline]
    pub fn fold(self) -> u16 {
        let mut sum = self.0;
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        u16::from_be(low_16(sum))
    }

    /// The checksum: the complement of the folded sum.
    #[inline]
    pub fn finish(self) -> u16 {
        !self.fold()
    }

    /// The checksum of a UDP datagram: a computed 0 is sent as ffff, RFC 768.
    #[inline]
    pub fn finish_udp(self) -> u16 {
        match self.finish() {
            0 => 0xffff,
            sum => sum,
        }
    }
}

/// From here on wider lanes pay for asking for them, bytes.
#[cfg(target_arch = "x86_64")]
const WIDE: usize = 256;

/// [`Sum::of_lanes`], compiled for AVX2: the same safe code in lanes twice as wide.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn of_avx2(bytes: &[u8]) -> Sum {
    Sum::of_lanes(bytes)
}

#[expect(clippy::cast_possible_truncation, reason = "folded to 16 bits by the caller")]
#[inline]
fn low_16(sum: u64) -> u16 {
    sum as u16
}

impl std::ops::Add for Sum {
    type Output = Self;

    #[inline]
    fn add(self, other: Self) -> Self {
        // Partial sums are below 2^34, so tens of millions may be added before a carry could be lost.
        Self(self.0 + other.0)
    }
}

/// The pseudo-header sum over IPv4, RFC 9293 §3.1: addresses, protocol, L4 length.
#[inline]
pub fn pseudo_v4(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, l4_len: usize) -> Sum {
    Sum::long(src.to_bits()) + Sum::long(dst.to_bits()) + Sum::word(u16::from(protocol)) + length(l4_len)
}

/// The pseudo-header sum over IPv6, RFC 8200 §8.1.
#[inline]
pub fn pseudo_v6(src: Ipv6Addr, dst: Ipv6Addr, protocol: u8, l4_len: usize) -> Sum {
    Sum::of(&src.octets()) + Sum::of(&dst.octets()) + Sum::word(u16::from(protocol)) + length(l4_len)
}

/// A length as it enters a pseudo header; packets are below 64 KiB but for jumbograms, which we do not carry.
#[inline]
fn length(bytes: usize) -> Sum {
    Sum::long(u32::try_from(bytes).unwrap_or(u32::MAX))
}

/// Replaces a 16-bit word under a checksum: RFC 1624 equation 3, `HC' = ~(~HC + ~m + m')`.
#[inline]
pub fn replace_word(checksum: u16, old: u16, new: u16) -> u16 {
    let sum = u32::from(!checksum) + u32::from(!old) + u32::from(new);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 §4.1, word by word.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn the_rfc_1071_example_sums_to_ddf2() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::of(&bytes).fold(), 0xddf2);
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_as_ffff() {
        assert_eq!(Sum::word(0xffff).finish(), 0);
        assert_eq!(Sum::word(0xffff).finish_udp(), 0xffff);
    }

    proptest! {
        #[test]
        fn the_fast_sum_is_the_naive_sum(bytes in proptest::collection::vec(any::<u8>(), 0..3000), skip in 0usize..8) {
            let bytes = bytes.get(skip..).unwrap_or(&[]);
            let fast = Sum::of(bytes).fold();
            let slow = naive(bytes);
            // 0 and ffff are the same number in one's complement.
            prop_assert!(fast == slow || (fast.is_multiple_of(0xffff) && slow.is_multiple_of(0xffff)), "{fast:04x} {slow:04x}");
        }

        #[test]
        fn parts_add_up_to_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..2000), cut in 0usize..1000) {
            let cut = (cut * 2).min(bytes.len() & !1);
            let (head, tail) = bytes.split_at(cut);
            prop_assert_eq!((Sum::of(head) + Sum::of(tail)).fold(), Sum::of(&bytes).fold());
        }

        #[test]
        fn replacing_a_word_is_summing_anew(mut bytes in proptest::collection::vec(any::<u8>(), 20..60), new in any::<u16>()) {
            bytes[0] |= 1; // an all-zero packet has two representations of its checksum
            let before = Sum::of(&bytes).finish();
            let old = u16::from_be_bytes([bytes[4], bytes[5]]);
            bytes[4..6].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(replace_word(before, old, new), Sum::of(&bytes).finish());
        }
    }
}
