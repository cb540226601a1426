//! Buffers of the packet path: what arrives, and how it is arranged to leave.
//!
//! Payload bytes stay where the kernel put them. A [`PacketBatch`] holds packets from the device one behind the other; a
//! [`SendPlan`] is a list of *segments* over it, each a header slot (bytes of ours) and a payload slice (bytes of the batch),
//! grouped into *runs* that leave with one message. Inbound, a [`DatagramBatch`] holds what the underlay received, and
//! frames for the device are again header plus slices of it.
//!
//! All memory is allocated once; clearing keeps it.

use std::net::SocketAddr;

use crate::dataplane::offload::SuperPacket;
use crate::wire::virtio::VirtioHeader;

/// The longest packet of either family we carry, bytes.
pub const MAX_PACKET: usize = 65_535;
/// Room for packets of one batch, bytes: 8 super-packets, half of a 1 MiB L2 cache.
const BATCH_BYTES: usize = 8 * 65_536;
/// Packets a batch holds at most.
pub const BATCH_PACKETS: usize = 64;

/// One packet in a [`PacketBatch`].
#[derive(Clone, Copy, Debug)]
pub struct PacketMeta {
    start: usize,
    len: usize,
    /// What the device says of it.
    pub header: VirtioHeader,
}

/// Packets received from the device in one go.
#[derive(Debug)]
pub struct PacketBatch {
    bytes: Box<[u8]>,
    used: usize,
    metas: Vec<PacketMeta>,
}

impl Default for PacketBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl PacketBatch {
    /// An empty batch with all its memory.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; BATCH_BYTES + MAX_PACKET].into_boxed_slice(),
            used: 0,
            metas: Vec::with_capacity(BATCH_PACKETS),
        }
    }

    /// Forgets the packets, keeps the memory.
    pub fn clear(&mut self) {
        self.used = 0;
        self.metas.clear();
    }

    /// Where the next packet goes: room for the longest one; `None` when the batch is full.
    #[inline]
    pub fn room(&mut self) -> Option<&mut [u8]> {
        if self.metas.len() == BATCH_PACKETS || self.used >= BATCH_BYTES {
            return None;
        }
        self.bytes.get_mut(self.used..self.used + MAX_PACKET)
    }

    /// Takes the first `len` bytes of [`Self::room`] as a packet.
    #[inline]
    pub fn commit(&mut self, header: VirtioHeader, len: usize) {
        let len = len.min(MAX_PACKET);
        self.metas.push(PacketMeta {
            start: self.used,
            len,
            header,
        });
        // Keep packets 64-byte aligned: a header then touches one cache line.
        self.used = (self.used + len).next_multiple_of(64);
    }

    /// Copies a packet in; for tests and the in-memory device. `false` if there is no room.
    pub fn push(&mut self, header: VirtioHeader, packet: &[u8]) -> bool {
        let Some(room) = self.room().and_then(|room| room.get_mut(..packet.len())) else {
            return false;
        };
        room.copy_from_slice(packet);
        self.commit(header, packet.len());
        true
    }

    /// Number of packets.
    pub fn len(&self) -> usize {
        self.metas.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.metas.is_empty()
    }

    /// What is known of packet `index`, which is below [`Self::len`].
    #[inline]
    pub fn meta(&self, index: usize) -> PacketMeta {
        self.metas[index]
    }

    /// The bytes of a packet.
    #[inline]
    pub fn packet(&self, meta: PacketMeta) -> &[u8] {
        &self.bytes[meta.start..meta.start + meta.len]
    }

    /// The bytes of a packet, to patch.
    #[inline]
    pub fn packet_mut(&mut self, meta: PacketMeta) -> &mut [u8] {
        &mut self.bytes[meta.start..meta.start + meta.len]
    }
}

/// A piece of a run: a header of ours, then payload of the batch.
#[derive(Clone, Copy, Debug)]
struct Segment {
    header_at: u32,
    header_len: u16,
    payload_len: u16,
    payload_at: u32,
    /// Next segment of the same run; `u32::MAX` ends it.
    next: u32,
}

const END: u32 = u32::MAX;
/// Newest runs looked at for one that a segment may join.
const OPEN_RUNS: usize = 8;

/// Segments that leave with one message: one destination, one source port, one size (the last may be shorter).
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Where to.
    pub to: SocketAddr,
    /// Which source port of the pool it leaves from.
    pub port: usize,
    /// Bytes of every segment but the last, headers of ours included.
    pub segment_size: usize,
    /// Bytes in all.
    pub bytes: usize,
    /// Number of segments.
    pub segments: usize,
    /// Index of the peer, for counting.
    pub peer: u32,
    /// The packet of the batch that started it, for answers about it.
    pub packet: usize,
    /// Flow of the last segment: only that one may end the run with a shorter one.
    flow: u32,
    first: u32,
    last: u32,
    open: bool,
}

/// How long a run may get; what the underlay says it can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunLimits {
    /// Segments of one message.
    pub segments: usize,
    /// Payload bytes of one message: 65,507 over IPv4, 65,527 over IPv6.
    pub bytes: usize,
}

/// What one batch sends: runs of segments over the batch's bytes.
///
/// A segment may join any open run to its peer that is not older than the newest run its flow is in; so flows share runs, and
/// no packet of a flow overtakes another.
#[derive(Debug)]
pub struct SendPlan {
    headers: Vec<u8>,
    segments: Vec<Segment>,
    runs: Vec<Run>,
    /// The newest run each flow of this batch is in.
    flows: Vec<(u32, usize)>,
}

/// What tells one run from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunKey {
    /// Where to.
    pub to: SocketAddr,
    /// Which source port of the pool.
    pub port: usize,
    /// Hash of the inner flow.
    pub flow: u32,
    /// Index of the peer.
    pub peer: u32,
}

impl Default for SendPlan {
    fn default() -> Self {
        Self::new()
    }
}

impl SendPlan {
    /// An empty plan with memory for a full batch.
    pub fn new() -> Self {
        Self {
            headers: Vec::with_capacity(256 * 1024),
            segments: Vec::with_capacity(4096),
            runs: Vec::with_capacity(BATCH_PACKETS * 2),
            flows: Vec::with_capacity(BATCH_PACKETS),
        }
    }

    /// Forgets the runs, keeps the memory.
    pub fn clear(&mut self) {
        self.headers.clear();
        self.segments.clear();
        self.runs.clear();
        self.flows.clear();
    }

    /// The arena of header slots; a caller appends a header, then names it in [`Self::push`].
    #[inline]
    pub fn headers(&mut self) -> &mut Vec<u8> {
        &mut self.headers
    }

    /// Appends a segment to an open run it fits, else starts a run.
    ///
    /// `header` is a range of [`Self::headers`], `payload` an (offset, length) of the batch as [`PacketMeta::offset`] gives it,
    /// `packet` the index of the packet it comes from.
    #[inline]
    pub fn push(
        &mut self,
        key: RunKey,
        limits: RunLimits,
        header: std::ops::Range<usize>,
        payload: (usize, usize),
        packet: usize,
    ) {
        let size = header.len() + payload.1;
        let index = len32(self.segments.len());
        self.segments.push(Segment {
            header_at: len32(header.start),
            header_len: len16(header.len()),
            payload_at: len32(payload.0),
            payload_len: len16(payload.1),
            next: END,
        });
        let known = self.flows.iter().rposition(|&(flow, _)| flow == key.flow);
        let floor = known.and_then(|at| self.flows.get(at)).map_or(0, |&(_, run)| run);
        let run = self.open_run(key, limits, size, floor).unwrap_or_else(|| {
            self.runs.push(Run {
                to: key.to,
                port: key.port,
                segment_size: size,
                bytes: 0,
                segments: 0,
                peer: key.peer,
                packet,
                flow: key.flow,
                first: index,
                last: index,
                open: true,
            });
            self.runs.len() - 1
        });
        match known.and_then(|at| self.flows.get_mut(at)) {
            Some(entry) => entry.1 = run,
            None => self.flows.push((key.flow, run)),
        }
        let run = &mut self.runs[run];
        if run.segments > 0 {
            self.segments[run.last as usize].next = index;
        }
        run.last = index;
        run.flow = key.flow;
        run.segments += 1;
        run.bytes += size;
        // A shorter segment is the last of its run: the receiver cuts at the size of the first.
        run.open = size == run.segment_size;
    }

    /// Splits a super-packet: `push` appends the encapsulation of each segment, whose inner length it is given.
    #[inline]
    pub fn split(
        &mut self,
        super_packet: SuperPacket,
        packet: &[u8],
        push: impl FnMut(&mut Vec<u8>, usize),
        (key, limits, meta, index): (RunKey, RunLimits, PacketMeta, usize),
    ) {
        let mut headers = std::mem::take(&mut self.headers);
        super_packet.split(packet, &mut headers, push, |_, header, payload| {
            self.push(
                key,
                limits,
                header,
                (meta.offset(payload.start), payload.len()),
                index,
            );
        });
        self.headers = headers;
    }

    /// A run not older than `floor` that a segment of `size` bytes may join.
    #[inline]
    fn open_run(&self, key: RunKey, limits: RunLimits, size: usize, floor: usize) -> Option<usize> {
        let recent = self.runs.iter().enumerate().skip(floor).rev().take(OPEN_RUNS);
        let fitting = recent.into_iter().find(|(_, run)| {
            run.open
                && run.peer == key.peer
                && run.port == key.port
                && run.to == key.to
                && run.segments < limits.segments
                && run.bytes + size <= limits.bytes
                && (size == run.segment_size || (size < run.segment_size && run.flow == key.flow))
        });
        fitting.map(|(index, _)| index)
    }

    /// The runs, in the order they are to leave.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The segments of a run, each as (header, payload).
    #[inline]
    pub fn segments<'a>(
        &'a self,
        run: &Run,
        batch: &'a PacketBatch,
    ) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let mut next = run.first;
        std::iter::from_fn(move || {
            let segment = self.segments.get(next as usize)?;
            next = segment.next;
            let header = segment.header_at as usize;
            let payload = segment.payload_at as usize;
            Some((
                &self.headers[header..header + usize::from(segment.header_len)],
                &batch.bytes[payload..payload + usize::from(segment.payload_len)],
            ))
        })
    }
}

impl PacketMeta {
    /// Where byte `at` of the packet stands in the batch, for [`SendPlan::push`].
    #[inline]
    pub fn offset(self, at: usize) -> usize {
        self.start + at
    }

    /// Length of the packet, bytes.
    #[expect(clippy::len_without_is_empty, reason = "a packet is never empty once parsed")]
    pub fn len(self) -> usize {
        self.len
    }
}

/// Datagram slots: enough that small packets come in batches.
pub const DATAGRAM_SLOTS: usize = 64;
/// Bytes of a slot: any datagram fits, whatever the underlay's MTU. The odd 64 keeps slots from sharing cache sets.
const SLOT_BYTES: usize = 65_536 + 64;

/// One datagram, or one run of datagrams the kernel coalesced.
#[derive(Clone, Copy, Debug)]
pub struct Datagram {
    slot: usize,
    /// Length in all, bytes.
    pub len: usize,
    /// Size of every datagram in it but the last, if the kernel coalesced several.
    pub segment_size: Option<usize>,
    /// Who sent it.
    pub from: SocketAddr,
}

/// What the underlay received in one go.
#[derive(Debug)]
pub struct DatagramBatch {
    bytes: Box<[u8]>,
    datagrams: Vec<Datagram>,
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
            bytes: vec![0; DATAGRAM_SLOTS * SLOT_BYTES].into_boxed_slice(),
            datagrams: Vec::with_capacity(DATAGRAM_SLOTS),
            cut: 0,
            overflows: 0,
        }
    }

    /// Forgets the datagrams, keeps the memory.
    pub fn clear(&mut self) {
        self.datagrams.clear();
        self.cut = 0;
        self.overflows = 0;
    }

    /// The slots still free, to receive into; the first belongs to the next [`Self::commit`].
    #[inline]
    pub fn slots(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.bytes.chunks_exact_mut(SLOT_BYTES).skip(self.datagrams.len())
    }

    /// Takes the next slot as a datagram.
    #[inline]
    pub fn commit(&mut self, from: SocketAddr, len: usize, segment_size: Option<usize>) {
        let slot = self.datagrams.len();
        self.datagrams.push(Datagram {
            slot,
            len: len.min(SLOT_BYTES),
            segment_size: segment_size.filter(|&size| size > 0 && size < len),
            from,
        });
    }

    /// Notes that the next slot holds a datagram that did not fit it; it is not delivered.
    pub fn note_cut(&mut self) {
        self.cut += 1;
        // Keeps slots and datagrams in step: the forwarder finds no packet in an empty datagram.
        let slot = self.datagrams.len();
        let from = SocketAddr::from(([0, 0, 0, 0], 0));
        self.datagrams.push(Datagram {
            slot,
            len: 0,
            segment_size: None,
            from,
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
    pub fn push(&mut self, from: SocketAddr, bytes: &[u8], segment_size: Option<usize>) -> bool {
        let Some(slot) = self.slots().next().and_then(|slot| slot.get_mut(..bytes.len())) else {
            return false;
        };
        slot.copy_from_slice(bytes);
        self.commit(from, bytes.len(), segment_size);
        true
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

/// Offsets into a batch and its headers (below 1 MiB) fit 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
#[inline]
fn len32(value: usize) -> u32 {
    value as u32
}

/// Lengths within one packet fit 16 bits.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
#[inline]
fn len16(value: usize) -> u16 {
    value as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: RunLimits = RunLimits {
        segments: 4,
        bytes: 1000,
    };

    /// Pushes segments of the given (flow, size) and gives back the flows and sizes of each run.
    fn runs(pushes: &[(u32, usize)]) -> Vec<Vec<usize>> {
        let batch = PacketBatch::new();
        let mut plan = SendPlan::new();
        for &(flow, size) in pushes {
            let key = RunKey {
                to: SocketAddr::from(([192, 0, 2, 1], 8285)),
                port: 0,
                flow,
                peer: 0,
            };
            plan.push(key, LIMITS, 0..0, (0, size), 0);
        }
        let sizes = |run| {
            plan.segments(run, &batch)
                .map(|(header, payload)| header.len() + payload.len())
                .collect()
        };
        plan.runs().iter().map(sizes).collect()
    }

    #[test]
    fn equal_segments_make_one_run() {
        assert_eq!(runs(&[(1, 100), (1, 100), (1, 60)]), [vec![100, 100, 60]]);
    }

    #[test]
    fn a_short_segment_ends_its_run() {
        assert_eq!(runs(&[(1, 100), (1, 60), (1, 60)]), [vec![100, 60], vec![60]]);
    }

    #[test]
    fn a_longer_segment_starts_a_run() {
        assert_eq!(runs(&[(1, 60), (1, 100)]), [vec![60], vec![100]]);
    }

    #[test]
    fn flows_of_equal_size_share_a_run() {
        assert_eq!(runs(&[(1, 100), (2, 100), (3, 100)]), [vec![100, 100, 100]]);
    }

    #[test]
    fn a_short_packet_of_another_flow_does_not_end_a_run() {
        assert_eq!(
            runs(&[(1, 100), (2, 50), (1, 100), (1, 60)]),
            [vec![100, 100, 60], vec![50]]
        );
    }

    #[test]
    fn no_packet_of_a_flow_overtakes_another() {
        // The last segment of flow 1 may not go back to the first run: its 50 left after it.
        assert_eq!(
            runs(&[(2, 100), (1, 50), (1, 100)]),
            [vec![100], vec![50], vec![100]]
        );
        assert_eq!(
            runs(&[(1, 100), (1, 50), (1, 100), (1, 50)]),
            [vec![100, 50], vec![100, 50]]
        );
    }

    #[test]
    fn limits_of_count_and_bytes_hold() {
        assert_eq!(runs(&[(1, 100); 6]), [vec![100; 4], vec![100; 2]]);
        assert_eq!(runs(&[(1, 400); 3]), [vec![400; 2], vec![400]]);
    }

    #[test]
    fn a_full_batch_says_so() {
        let mut batch = PacketBatch::new();
        let mut taken = 0;
        while batch.push(VirtioHeader::default(), &[0x45; MAX_PACKET]) {
            taken += 1;
        }
        assert_eq!(taken, 8);
        batch.clear();
        while batch.push(VirtioHeader::default(), &[0x45; 40]) {}
        assert_eq!(batch.len(), BATCH_PACKETS);
    }

    #[test]
    fn a_cut_datagram_keeps_slots_in_step() {
        let from = SocketAddr::from(([192, 0, 2, 1], 8285));
        let mut batch = DatagramBatch::new();
        batch.note_cut();
        assert!(batch.push(from, b"next", None));
        let datagram = batch.datagrams()[1];
        let start = DatagramBatch::start(datagram);
        assert_eq!(&batch.bytes()[start..start + datagram.len], b"next");
        assert_eq!(batch.cut(), 1);
    }
}
