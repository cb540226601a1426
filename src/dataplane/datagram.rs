//! Buffers of the inbound path: what the underlay received, as it came.
//!
//! Frames for the device are a header of ours and payload slices of these slots. (Scattering coalesced runs on receipt, so that payloads
//! land one behind the other, was measured: what the write gains the receive loses.)
//!
//! All memory is allocated once; clearing keeps it.

use std::net::{Ipv6Addr, SocketAddr};

use crate::dataplane::packet::Arena;
use crate::wire::ip::{Ecn, protocol};

/// Datagram slots: enough that small packets come in batches.
pub const DATAGRAM_SLOTS: usize = 64;
/// Bytes of a slot: any datagram fits, whatever the underlay's MTU. The odd 64 keeps slots from sharing cache sets.
const SLOT_BYTES: usize = 65_536 + 64;

/// What the outer headers of a datagram said, which the kernel took off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Who sent it.
    pub from: SocketAddr,
    /// Whom it was sent to, where one socket stands for many addresses; unspecified where the socket has one.
    pub to: Ipv6Addr,
    /// The protocol number that stood before it.
    pub protocol: u8,
    /// Hop limit, where the socket was asked to tell it.
    pub hop_limit: u8,
    /// Traffic class and flow label, the lower 28 bits of the first word of an IPv6 header, where the socket was asked to tell it.
    pub flow_info: u32,
    /// Number of the interface it came by, where the socket was asked to tell it.
    pub interface: u32,
    /// Congestion codepoint.
    pub ecn: Ecn,
}

impl Envelope {
    /// That of a datagram to a UDP socket of ours.
    pub fn udp(from: SocketAddr, ecn: Ecn) -> Self {
        Self {
            from,
            to: Ipv6Addr::UNSPECIFIED,
            protocol: protocol::UDP,
            hop_limit: 0,
            flow_info: 0,
            interface: 0,
            ecn,
        }
    }
}

/// One datagram, or one run of datagrams the kernel coalesced.
#[derive(Clone, Copy, Debug)]
pub struct Datagram {
    slot: usize,
    /// Length in all, bytes.
    pub len: usize,
    /// Size of every datagram in it but the last, if the kernel coalesced several.
    pub segment_size: Option<usize>,
    /// What stood before it.
    pub envelope: Envelope,
    /// It did not fit its slot: there is nothing in it, and it is counted already.
    pub is_cut: bool,
}

/// What the underlay received in one go.
#[derive(Debug)]
pub struct DatagramBatch {
    bytes: Arena,
    datagrams: Vec<Datagram>,
    /// Slots in use: of these, and of what was taken out.
    used: usize,
    cut: u64,
    overflows: u64,
}

impl Default for DatagramBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl DatagramBatch {
    /// An empty batch with all its memory; pages are touched only as they are used.
    pub fn new() -> Self {
        Self {
            bytes: Arena::new(DATAGRAM_SLOTS * SLOT_BYTES),
            datagrams: Vec::with_capacity(DATAGRAM_SLOTS),
            used: 0,
            cut: 0,
            overflows: 0,
        }
    }

    /// The memory, for the shell to tell the kernel what it is for.
    pub fn memory(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Forgets the datagrams, keeps the memory.
    pub fn clear(&mut self) {
        self.datagrams.clear();
        self.used = 0;
        self.cut = 0;
        self.overflows = 0;
    }

    /// The slots still free, to receive into; the first belongs to the next [`Self::commit`].
    #[inline]
    pub fn slots(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes
            .chunks_exact_mut(SLOT_BYTES)
            .take(DATAGRAM_SLOTS)
            .skip(self.used)
    }

    /// Takes the next slot as a datagram.
    #[inline]
    pub fn commit(&mut self, envelope: Envelope, len: usize, segment_size: Option<usize>) {
        let slot = self.used;
        self.used += 1;
        self.datagrams.push(Datagram {
            slot,
            len: len.min(SLOT_BYTES),
            segment_size: segment_size.filter(|&size| size > 0 && size < len),
            envelope,
            is_cut: false,
        });
    }

    /// Notes that the next slot holds a datagram that did not fit it; it is not delivered.
    pub fn note_cut(&mut self) {
        self.cut += 1;
        // Keeps slots and datagrams in step: the forwarder finds no packet in an empty datagram.
        let slot = self.used;
        self.used += 1;
        let from = SocketAddr::from(([0, 0, 0, 0], 0));
        self.datagrams.push(Datagram {
            slot,
            len: 0,
            segment_size: None,
            envelope: Envelope::udp(from, Ecn::NotEct),
            is_cut: true,
        });
    }

    /// Notes datagrams the kernel dropped before we could receive them.
    pub fn note_overflows(&mut self, n: u64) {
        self.overflows += n;
    }

    /// Datagrams that did not fit a slot.
    pub fn cut(&self) -> u64 {
        self.cut
    }

    /// Datagrams dropped by the kernel for want of buffer.
    pub fn overflows(&self) -> u64 {
        self.overflows
    }

    /// Copies a datagram in; for tests and the in-memory underlay. `false` if there is no room.
    pub fn push(&mut self, envelope: Envelope, bytes: &[u8], segment_size: Option<usize>) -> bool {
        let Some(slot) = self.slots().next().and_then(|slot| slot.get_mut(..bytes.len())) else {
            return false;
        };
        slot.copy_from_slice(bytes);
        self.commit(envelope, bytes.len(), segment_size);
        true
    }

    /// Has `keep` say of each datagram from `first` on how many of its bytes, from the front, stay: with none it is taken out. What did not
    /// fit its slot stays as it is.
    pub fn winnow(&mut self, first: usize, mut keep: impl FnMut(Datagram, &mut [u8]) -> usize) {
        let Self { bytes, datagrams, .. } = self;
        let mut index = 0;
        datagrams.retain_mut(|datagram| {
            index += 1;
            if index <= first || datagram.is_cut {
                return true;
            }
            let start = Self::start(*datagram);
            let Some(content) = bytes.get_mut(start..start + datagram.len) else {
                return true;
            };
            datagram.len = keep(*datagram, content).min(datagram.len);
            datagram.segment_size = datagram.segment_size.filter(|&size| size < datagram.len);
            datagram.len > 0
        });
    }

    /// The datagrams, in order of arrival.
    pub fn datagrams(&self) -> &[Datagram] {
        &self.datagrams
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// All bytes: [`Self::start`] says where a datagram begins.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes, to patch headers in place.
    #[inline]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Where datagram `datagram` begins in [`Self::bytes`].
    #[inline]
    pub fn start(datagram: Datagram) -> usize {
        datagram.slot * SLOT_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_out_leaves_the_rest_where_it_is() {
        let from = SocketAddr::from(([192, 0, 2, 1], 8285));
        let envelope = Envelope::udp(from, Ecn::NotEct);
        let mut batch = DatagramBatch::new();
        for text in [&b"first"[..], b"mine", b"theirs", b"aabbcc"] {
            assert!(batch.push(envelope, text, (text.len() == 6).then_some(2)));
        }
        batch.note_cut();
        batch.winnow(1, |_, bytes| match &*bytes {
            b"theirs" => 0,
            b"aabbcc" => {
                bytes.copy_within(4.., 0);
                2
            }
            other => other.len(),
        });
        assert!(batch.push(envelope, b"next", None));
        let content = |batch: &DatagramBatch| -> Vec<(Vec<u8>, Option<usize>)> {
            let datagrams = batch.datagrams().iter().map(|&datagram| {
                let start = DatagramBatch::start(datagram);
                let bytes = batch.bytes()[start..start + datagram.len].to_vec();
                (bytes, datagram.segment_size)
            });
            datagrams.collect()
        };
        let texts = ["first", "mine", "cc", "", "next"].map(|text| (text.into(), None));
        assert_eq!(content(&batch), texts);
    }

    #[test]
    fn a_cut_datagram_keeps_slots_in_step() {
        let from = SocketAddr::from(([192, 0, 2, 1], 8285));
        let mut batch = DatagramBatch::new();
        batch.note_cut();
        assert!(batch.push(Envelope::udp(from, Ecn::Ce), b"next", None));
        let datagram = batch.datagrams()[1];
        let start = DatagramBatch::start(datagram);
        assert_eq!(&batch.bytes()[start..start + datagram.len], b"next");
        assert_eq!((batch.cut(), datagram.envelope.ecn), (1, Ecn::Ce));
    }
}
