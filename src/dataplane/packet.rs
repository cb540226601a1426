//! Buffers of the outbound path: what the device hands over, and how it is arranged to leave.
//!
//! Payload bytes stay where the kernel put them, and it puts them where they are wanted. A super-packet read from the device is
//! *scattered*: its payload lands in pieces of one segment each, with gaps between them for the headers each segment needs.
//!
//! ```text
//! read:   | headroom | headers | payload 0 |   gap   | payload 1 |   gap   | payload 2 |
//! sent:       | encap| headers | payload 0 |enc| hdrs| payload 1 |enc| hdrs| payload 2 |     one run, one slice
//! ```
//!
//! Where the pieces are to go must be known before the read, so the batch expects the next super-packet to look like the last one
//! ([`Shape`]); when it does not, its bytes are moved once ([`PacketBatch::shape`]) and the expectation changes. A run is then one contiguous
//! slice a super-packet, which the kernel copies twice as fast as a header and a payload slice a segment.
//!
//! All memory is allocated once; clearing keeps it.

use std::net::SocketAddr;

use crate::wire::ip::Ecn;
use crate::wire::virtio::VirtioHeader;

/// The longest packet of either family we carry, bytes.
pub const MAX_PACKET: usize = 65_535;
/// Super-packets of one batch: enough to fill runs across them, few enough to stay in a 1 MiB L2 cache with their copies.
const BATCH_SUPER_PACKETS: usize = 4;
/// A batch is full from here on, bytes.
const BATCH_BYTES: usize = BATCH_SUPER_PACKETS * 65_536;
/// Packets a batch holds at most.
pub const BATCH_PACKETS: usize = 64;
/// Room before every packet for an encapsulation header: an IPv6 header and a routing header of five segments, with room to spare.
pub const HEADROOM: usize = 192;
/// Most bytes a super-packet takes when its segments are apart: 64 KiB of TCP segments of the kernel's least size, 48 bytes, each with
/// the longest headers it can have and an encapsulation header.
const MAX_SHAPED: usize = 512 * 1024;
/// Pieces a read is scattered to at the most; with smaller segments reading in one piece and moving costs less.
pub const MAX_PIECES: usize = 56;
/// Longest inner headers of a super-packet, bytes: 60 of IPv4 and 60 of TCP, or as much of IPv6 with extension headers.
pub const MAX_HEADERS: usize = 128;

/// Buffer memory that a huge page can back: 2 MiB aligned, a multiple of that long.
///
/// With small pages a 64 KiB packet costs 17 address translations each time it is touched, and twice that in a virtual machine.
#[derive(Debug)]
pub struct Arena {
    memory: Box<[u8]>,
    start: usize,
    len: usize,
}

/// Size of a huge page, bytes.
const HUGE_PAGE: usize = 2 << 20;

impl Arena {
    /// At least `bytes`, zeroed.
    pub(super) fn new(bytes: usize) -> Self {
        let len = bytes.next_multiple_of(HUGE_PAGE);
        let memory = vec![0; len + HUGE_PAGE].into_boxed_slice();
        // Alignment is for speed only: should it not be had, any start will do.
        let start = Some(memory.as_ptr().align_offset(HUGE_PAGE))
            .filter(|&start| start <= HUGE_PAGE)
            .unwrap_or(0);
        Self { memory, start, len }
    }
}

impl std::ops::Deref for Arena {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for Arena {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// How the segments of a super-packet lie in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Inner headers at the front of the packet, bytes.
    pub headers: usize,
    /// Payload of each segment but the last, bytes.
    pub size: usize,
    /// Room between two payloads, bytes: encapsulation and inner headers of the second.
    pub gap: usize,
}

impl Shape {
    /// From the start of one segment to the start of the next, bytes.
    pub fn stride(self) -> usize {
        self.gap + self.size
    }

    /// Where payload byte `at` of the super-packet stands, counted from the start of the packet.
    fn place(self, at: usize) -> usize {
        self.headers + at + at / self.size * self.gap
    }
}

/// One packet in a [`PacketBatch`].
#[derive(Clone, Copy, Debug)]
pub struct PacketMeta {
    start: usize,
    len: usize,
    shape: Option<Shape>,
    /// What the device says of it.
    pub header: VirtioHeader,
}

impl PacketMeta {
    /// Length of the packet, bytes.
    #[expect(clippy::len_without_is_empty, reason = "a packet is never empty once parsed")]
    pub fn len(self) -> usize {
        self.len
    }

    /// Where the packet starts in the batch.
    pub fn start(self) -> usize {
        self.start
    }
}

/// Packets received from the device in one go.
#[derive(Debug)]
pub struct PacketBatch {
    bytes: Arena,
    used: usize,
    metas: Vec<PacketMeta>,
    /// What the next super-packet is expected to look like.
    expected: Option<Shape>,
    /// Packets since the last super-packet.
    since: u32,
    /// Super-packets whose bytes had to be moved.
    moved: u64,
}

/// Packets that may come between two super-packets before reads are no longer scattered: scattering costs each read a little.
const PATIENCE: u32 = 16;

impl Default for PacketBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl PacketBatch {
    /// An empty batch with all its memory; pages are touched only as they are used.
    pub fn new() -> Self {
        Self {
            bytes: Arena::new(BATCH_BYTES + HEADROOM + 64 + MAX_SHAPED),
            used: 0,
            metas: Vec::with_capacity(BATCH_PACKETS),
            expected: None,
            since: 0,
            moved: 0,
        }
    }

    /// The memory, for the shell to tell the kernel what it is for.
    pub fn memory(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Forgets the packets, keeps the memory.
    pub fn clear(&mut self) {
        self.used = 0;
        self.metas.clear();
    }

    /// Where the next packet goes, and the shape it is to be scattered to; `None` when the batch is full.
    #[inline]
    pub fn room(&mut self) -> Option<(&mut [u8], Option<Shape>)> {
        if self.metas.len() == BATCH_PACKETS || self.used >= BATCH_BYTES {
            return None;
        }
        let start = self.next_start();
        let shape = self.expected;
        let len = shape.map_or(MAX_PACKET, |shape| shape.place(MAX_PACKET));
        self.bytes.get_mut(start..start + len).map(|room| (room, shape))
    }

    /// Takes what was read into [`Self::room`] as a packet of `len` bytes.
    #[inline]
    pub fn commit(&mut self, header: VirtioHeader, len: usize) {
        let start = self.next_start();
        let len = len.min(MAX_PACKET);
        // The first segment and its headers are in one piece whatever the shape.
        let shape = self.expected.filter(|shape| len > shape.headers + shape.size);
        self.since = if header.gso.is_some() {
            0
        } else {
            self.since.saturating_add(1)
        };
        if self.since > PATIENCE {
            self.expected = None;
        }
        self.metas.push(PacketMeta {
            start,
            len,
            shape,
            header,
        });
        self.used = start + shape.map_or(len, |shape| shape.place(len - shape.headers));
    }

    /// The payload of the next super-packet is to start on a cache line.
    fn next_start(&self) -> usize {
        let headers = self.expected.map_or(0, |shape| shape.headers);
        (self.used + HEADROOM + headers).next_multiple_of(64) - headers
    }

    /// Copies a packet in, as a device would read it; for tests and the in-memory device. `false` if there is no room.
    pub fn push(&mut self, header: VirtioHeader, packet: &[u8]) -> bool {
        if packet.len() > MAX_PACKET {
            return false;
        }
        let Some((room, shape)) = self.room() else {
            return false;
        };
        let mut rest = packet;
        for (at, len) in shape_places(shape) {
            let (piece, later) = rest.split_at(len.min(rest.len()));
            room[at..at + piece.len()].copy_from_slice(piece);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
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

    /// Super-packets since the last call whose bytes had to be moved.
    pub fn take_moved(&mut self) -> u64 {
        std::mem::take(&mut self.moved)
    }

    /// The front of a packet: all of it, or all up to the end of its first segment.
    #[inline]
    pub fn front(&self, meta: PacketMeta) -> &[u8] {
        let len = meta.shape.map_or(meta.len, |shape| shape.headers + shape.size);
        &self.bytes[meta.start..meta.start + len]
    }

    /// The front of a packet, to patch.
    #[inline]
    pub fn front_mut(&mut self, meta: PacketMeta) -> &mut [u8] {
        let len = meta.shape.map_or(meta.len, |shape| shape.headers + shape.size);
        &mut self.bytes[meta.start..meta.start + len]
    }

    /// Brings the newest packet into the shape wanted, if it is not in it already, and expects that shape from now on.
    ///
    /// `None` wants it in one piece. Gives the packet as it then is; `None` if the shape takes more room than there is.
    #[inline]
    pub fn shape(&mut self, wanted: Option<Shape>) -> Option<PacketMeta> {
        let meta = *self.metas.last()?;
        let fits_front = wanted.is_some_and(|shape| meta.len <= shape.headers + shape.size);
        if let Some(shape) = wanted {
            let pieces = MAX_PACKET / shape.size;
            self.expected =
                (pieces < MAX_PIECES && shape.headers + shape.size >= 2 * MAX_HEADERS).then_some(shape);
        }
        if meta.shape == wanted || (meta.shape.is_none() && fits_front) {
            return Some(meta);
        }
        self.reshape(meta, if fits_front { None } else { wanted })
    }

    #[cold]
    fn reshape(&mut self, mut meta: PacketMeta, wanted: Option<Shape>) -> Option<PacketMeta> {
        let payload = |shape: Shape| meta.len - shape.headers;
        let end = |shape: Shape| shape.place(payload(shape) - 1) + 1;
        let packet = self.bytes.get_mut(meta.start..)?;
        if wanted.is_some_and(|shape| shape.headers >= meta.len || end(shape) > packet.len()) {
            return None;
        }
        self.moved += 1;
        if let Some(shape) = meta.shape {
            for at in (shape.size..payload(shape)).step_by(shape.size) {
                let from = shape.place(at);
                let len = shape.size.min(payload(shape) - at);
                packet.copy_within(from..from + len, shape.headers + at);
            }
        }
        if let Some(shape) = wanted {
            for at in (shape.size..payload(shape)).step_by(shape.size).rev() {
                let from = shape.headers + at;
                let len = shape.size.min(payload(shape) - at);
                packet.copy_within(from..from + len, shape.place(at));
            }
        }
        self.used = meta.start + wanted.map_or(meta.len, end);
        meta.shape = wanted;
        *self.metas.last_mut()? = meta;
        Some(meta)
    }

    /// The bytes of a packet's segments from the first one's encapsulation header on, `encap_len` bytes before the packet.
    #[inline]
    pub fn segments_mut(&mut self, meta: PacketMeta, encap_len: usize) -> &mut [u8] {
        let end = meta
            .shape
            .map_or(meta.len, |shape| shape.place(meta.len - shape.headers - 1) + 1);
        &mut self.bytes[meta.start - encap_len.min(HEADROOM)..meta.start + end]
    }
}

/// Where the pieces of a packet go in its room, as (offset, length).
#[inline]
pub fn shape_places(shape: Option<Shape>) -> impl Iterator<Item = (usize, usize)> {
    let first = shape.map_or((0, MAX_PACKET), |shape| (0, shape.headers + shape.size));
    let later = shape.into_iter().flat_map(|shape| {
        let places = (shape.size..MAX_PACKET - shape.headers).step_by(shape.size);
        places.map(move |at| (shape.place(at), shape.size))
    });
    std::iter::once(first).chain(later)
}

/// Bytes of one run that lie together: whole segments.
#[derive(Clone, Copy, Debug)]
struct Piece {
    at: u32,
    len: u32,
    /// Next piece of the same run; `u32::MAX` ends it.
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
    /// Congestion codepoint of the outer headers.
    pub ecn: Ecn,
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
/// A segment may join any open run to its peer that is not older than the newest run its flow is in; so flows share runs,
/// and no packet of a flow overtakes another.
#[derive(Debug)]
pub struct SendPlan {
    pieces: Vec<Piece>,
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
    /// Congestion codepoint of the outer headers.
    pub ecn: Ecn,
    /// Hash of the inner flow.
    pub flow: u32,
    /// Index of the peer.
    pub peer: u32,
}

/// Segments that lie one behind the other in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Where the first starts in the batch.
    pub at: usize,
    /// Bytes in all.
    pub bytes: usize,
    /// Bytes of every segment but the last.
    pub size: usize,
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
            pieces: Vec::with_capacity(BATCH_PACKETS * 4),
            runs: Vec::with_capacity(BATCH_PACKETS * 2),
            flows: Vec::with_capacity(BATCH_PACKETS),
        }
    }

    /// Forgets the runs, keeps the memory.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.runs.clear();
        self.flows.clear();
    }

    /// Appends the segments of packet `packet` to open runs they fit, starting runs as needed.
    #[inline]
    pub fn push(&mut self, key: RunKey, limits: RunLimits, segments: Segments, packet: usize) {
        let known = self.flows.iter().rposition(|&(flow, _)| flow == key.flow);
        let mut floor = known.and_then(|at| self.flows.get(at)).map_or(0, |&(_, run)| run);
        let mut rest = segments;
        while rest.bytes > 0 {
            let size = rest.size.min(rest.bytes);
            let run = self.open_run(key, limits, size, floor).unwrap_or_else(|| {
                self.runs.push(Run {
                    to: key.to,
                    port: key.port,
                    ecn: key.ecn,
                    segment_size: size,
                    bytes: 0,
                    segments: 0,
                    peer: key.peer,
                    packet,
                    flow: key.flow,
                    first: END,
                    last: END,
                    open: true,
                });
                self.runs.len() - 1
            });
            let taken = self.append(run, key, limits, rest);
            rest.at += taken;
            rest.bytes -= taken;
            floor = run;
        }
        match known.and_then(|at| self.flows.get_mut(at)) {
            Some(entry) => entry.1 = floor,
            None => self.flows.push((key.flow, floor)),
        }
    }

    /// Appends as many of the segments to run `index` as it takes, at least one; gives their bytes.
    #[inline]
    fn append(&mut self, index: usize, key: RunKey, limits: RunLimits, segments: Segments) -> usize {
        let piece = len32(self.pieces.len());
        let run = &mut self.runs[index];
        let room = (limits.segments - run.segments)
            .min((limits.bytes - run.bytes) / run.segment_size)
            .max(1);
        // Segments as long as the run's, and a shorter one where they end.
        let bytes = if segments.size == run.segment_size {
            segments.bytes.min(room * run.segment_size)
        } else {
            segments.bytes.min(segments.size)
        };
        let count = bytes.div_ceil(run.segment_size);
        if run.first == END {
            run.first = piece;
        } else {
            self.pieces[run.last as usize].next = piece;
        }
        self.pieces.push(Piece {
            at: len32(segments.at),
            len: len32(bytes),
            next: END,
        });
        run.last = piece;
        run.flow = key.flow;
        run.segments += count;
        run.bytes += bytes;
        // A shorter segment is the last of its run: the receiver cuts at the size of the first.
        run.open = bytes == count * run.segment_size;
        bytes
    }

    /// A run not older than `floor` that a segment of `size` bytes may join.
    #[inline]
    fn open_run(&self, key: RunKey, limits: RunLimits, size: usize, floor: usize) -> Option<usize> {
        let recent = self.runs.iter().enumerate().skip(floor).rev().take(OPEN_RUNS);
        let fitting = recent.into_iter().find(|(_, run)| {
            run.open
                && run.peer == key.peer
                && run.port == key.port
                && run.ecn == key.ecn
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

    /// The bytes of a run from segment `from` on, `count` segments at the most, in contiguous slices.
    #[inline]
    pub fn slices<'a>(
        &'a self,
        run: &Run,
        batch: &'a PacketBatch,
        from: usize,
        count: usize,
    ) -> impl Iterator<Item = &'a [u8]> {
        let mut next = run.first;
        let mut skip = from * run.segment_size;
        let mut left = count.saturating_mul(run.segment_size);
        std::iter::from_fn(move || {
            loop {
                let piece = self.pieces.get(next as usize)?;
                if left == 0 {
                    return None;
                }
                next = piece.next;
                let len = piece.len as usize;
                if skip >= len {
                    skip -= len;
                    continue;
                }
                let at = piece.at as usize + skip;
                let len = (len - skip).min(left);
                skip = 0;
                left -= len;
                return Some(&batch.bytes[at..at + len]);
            }
        })
    }
}

/// Offsets into a batch and its headers (below 1 MiB) fit 32 bits.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
#[inline]
fn len32(value: usize) -> u32 {
    value as u32
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
                ecn: Ecn::NotEct,
                flow,
                peer: 0,
            };
            let segments = Segments {
                at: 0,
                bytes: size,
                size,
            };
            plan.push(key, LIMITS, segments, 0);
        }
        let sizes = |run: &Run| {
            (0..run.segments)
                .map(|nth| plan.slices(run, &batch, nth, 1).map(<[u8]>::len).sum())
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
    fn a_super_packet_fills_runs_across_its_neighbours() {
        let batch = PacketBatch::new();
        let mut plan = SendPlan::new();
        let to = SocketAddr::from(([192, 0, 2, 1], 8285));
        let key = RunKey {
            to,
            port: 0,
            ecn: Ecn::NotEct,
            flow: 1,
            peer: 0,
        };
        plan.push(
            key,
            LIMITS,
            Segments {
                at: 0,
                bytes: 600,
                size: 100,
            },
            0,
        );
        plan.push(
            key,
            LIMITS,
            Segments {
                at: 700,
                bytes: 350,
                size: 100,
            },
            1,
        );
        let runs: Vec<_> = plan.runs().iter().map(|run| (run.segments, run.bytes)).collect();
        assert_eq!(runs, [(4, 400), (4, 400), (2, 150)]);
        let slices: Vec<_> = plan
            .slices(&plan.runs()[1], &batch, 0, 4)
            .map(<[u8]>::len)
            .collect();
        assert_eq!(slices, [200, 200], "two packets, two slices");
        let slices: Vec<_> = plan
            .slices(&plan.runs()[1], &batch, 1, 2)
            .map(<[u8]>::len)
            .collect();
        assert_eq!(slices, [100, 100], "from the middle, across the seam");
    }

    #[test]
    fn any_shape_can_be_brought_into_any_other() {
        let packet: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        let shape = |headers, size, gap| Some(Shape { headers, size, gap });
        let gso = VirtioHeader {
            gso: Some(crate::wire::virtio::Gso {
                kind: crate::wire::virtio::GsoKind::TcpV4,
                size: 1,
                header_len: 0,
            }),
            ..VirtioHeader::default()
        };
        let shapes = [
            None,
            shape(52, 1420, 52),
            shape(72, 1400, 94),
            shape(52, 999, 60),
            shape(40, 9960, 40),
            shape(20, 3, 20),
        ];
        let mut batch = PacketBatch::new();
        for from in shapes {
            for wanted in shapes {
                batch.clear();
                batch.expected = from;
                assert!(batch.push(gso, &packet));
                let meta = batch.shape(wanted).unwrap();
                let bytes = batch.segments_mut(meta, 0).to_vec();
                let back: Vec<u8> = match meta.shape {
                    None => bytes,
                    Some(shape) => {
                        let payload = (0..packet.len() - shape.headers).map(|at| bytes[shape.place(at)]);
                        bytes[..shape.headers].iter().copied().chain(payload).collect()
                    }
                };
                assert!(back == packet, "{from:?} to {wanted:?}");
                assert!(
                    batch.push(gso, &packet[..100]),
                    "what follows has a place of its own"
                );
            }
        }
    }

    #[test]
    fn a_shape_that_takes_too_much_room_is_refused() {
        let mut batch = PacketBatch::new();
        assert!(batch.push(VirtioHeader::default(), &[0; MAX_PACKET]));
        assert!(
            batch
                .shape(Some(Shape {
                    headers: 40,
                    size: 1,
                    gap: 60
                }))
                .is_none()
        );
    }

    #[test]
    fn a_full_batch_says_so() {
        let mut batch = PacketBatch::new();
        let mut taken = 0;
        while batch.push(VirtioHeader::default(), &[0x45; MAX_PACKET]) {
            taken += 1;
        }
        assert_eq!(taken, BATCH_SUPER_PACKETS);
        batch.clear();
        while batch.push(VirtioHeader::default(), &[0x45; 40]) {}
        assert_eq!(batch.len(), BATCH_PACKETS);
    }
}
