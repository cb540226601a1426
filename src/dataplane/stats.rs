//! Counters of the packet path: one writer each, readable by all.
//!
//! A counter belongs to one worker thread; it is bumped with a plain load and store, so no bus lock and no shared cache
//! line. Readers (status, metrics) sum over workers and may see a value a moment old.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the owning worker may call this; a second writer would lose counts, nothing worse.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// The value some moment ago.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name in status, metrics and logs.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }
    };
}

named! {
    /// Why a packet went no further. Indexes a counter per worker and per peer.
    DropReason {
        /// The inner packet is shorter than its headers.
        Truncated = "truncated",
        /// The inner packet is neither IPv4 nor IPv6.
        BadVersion = "bad_version",
        /// An inner header length is impossible.
        BadHeaderLength = "bad_header_length",
        /// The inner length field does not fit the bytes.
        BadLength = "bad_length",
        /// The inner IPv4 header checksum is wrong.
        BadHeaderChecksum = "bad_header_checksum",
        /// The chain of IPv6 extension headers is too long.
        BadExtensionHeaders = "bad_extension_headers",
        /// The device handed over a super-packet whose headers do not fit its description.
        BadSuperPacket = "bad_super_packet",
        /// No peer has the inner destination; answered with net unreachable.
        NoRoute = "no_route",
        /// The inner TTL or hop limit ran out; answered with time exceeded.
        TtlExpired = "ttl_expired",
        /// Larger than the path to the peer carries; answered with too big.
        TooBig = "too_big",
        /// The packet would come back to us: it is for our own subnet, or it is the tunnel's own. The first is answered with net
        /// unreachable.
        Loop = "loop",
        /// It waited for seconds while this process was stopped.
        Stale = "stale",
        /// Multicast, broadcast or link-local: never crosses a tunnel.
        NotUnicast = "not_unicast",
        /// The outer source is no peer's address.
        UnknownPeer = "unknown_peer",
        /// The inner source lies in the overlay, but not in that peer's lease; outbound, not in ours.
        SpoofedSource = "spoofed_source",
        /// The inner source lies outside the overlay and is not the peer's own address; outbound, not ours.
        ForeignSource = "foreign_source",
        /// The inner source is loopback, unspecified, reserved, or ours.
        MartianSource = "martian_source",
        /// The inner destination is not in our lease: we are no relay.
        NotForUs = "not_for_us",
        /// The encapsulation header is not what the backend expects: VXLAN without its flag.
        BadEncapsulation = "bad_encapsulation",
        /// The VXLAN network identifier is another network's.
        OtherVni = "other_vni",
        /// The Ethernet destination inside is not ours: another station's, a group's, or everybody's.
        OtherStation = "other_station",
        /// The Ethernet source inside is our own address: the frame went in a circle, or lies.
        OwnStation = "own_station",
        /// The Ethernet frame inside carries neither IPv4 nor IPv6: ARP, a VLAN tag, anything else.
        NotIp = "not_ip",
        /// EtherType and IP version disagree.
        EthertypeMismatch = "ethertype_mismatch",
        /// The outer destination is none of our SIDs.
        UnknownSid = "unknown_sid",
        /// The outer source of an SRv6 packet is neither a peer nor in the segment routing domain (RFC 8754 §5.1).
        OutsideDomain = "outside_domain",
        /// The next segment of an SRv6 packet is not in the segment routing domain.
        SegmentOutsideDomain = "segment_outside_domain",
        /// A routing header of a type other than segment routing.
        RoutingType = "routing_type",
        /// A segment routing header that is shorter than it says.
        BadRoutingHeader = "bad_routing_header",
        /// A segment routing header whose list is longer than the header.
        BadLastEntry = "bad_last_entry",
        /// A segment routing header with more segments left than there are.
        BadSegmentsLeft = "bad_segments_left",
        /// A TLV that reaches beyond its segment routing header.
        BadTlv = "bad_tlv",
        /// Segments left at a SID where every path ends.
        SegmentsLeft = "segments_left",
        /// What the SID does not take: IPv6 where IPv4 belongs, a transport header, a path that does not go on.
        SidUpperLayer = "sid_upper_layer",
        /// The hop limit of an SRv6 packet ran out here; answered with time exceeded.
        SidHopLimit = "sid_hop_limit",
        /// An HMAC is required, and the packet has none.
        HmacMissing = "hmac_missing",
        /// The HMAC is made with a key that we do not have.
        HmacUnknownKey = "hmac_unknown_key",
        /// The HMAC is wrong, or the destination is not what it stands for.
        HmacWrong = "hmac_wrong",
        /// The outer extension headers are cut off, too many, or out of order.
        OuterExtensionHeaders = "outer_extension_headers",
        /// A fragment of an outer packet.
        OuterFragment = "outer_fragment",
        /// An ICMPv6 message to a SID with a wrong checksum.
        BadEcho = "bad_echo",
        /// A congestion mark outside, and an inner packet whose sender would not understand it (RFC 6040).
        CongestionMark = "congestion_mark",
        /// The datagram was longer than the receive buffer.
        DatagramCut = "datagram_cut",
        /// The TUN device refused the packet (EINVAL).
        DeviceRefused = "device_refused",
        /// The TUN device is down (EIO).
        DeviceDown = "device_down",
        /// The TUN device had no room.
        DeviceBusy = "device_busy",
        /// The underlay socket had no room, after a bounded wait.
        UnderlayBusy = "underlay_busy",
        /// No route to the peer in the underlay (ENETUNREACH, EHOSTUNREACH, ENETDOWN).
        UnderlayUnreachable = "underlay_unreachable",
        /// A local firewall refused the datagram (EPERM, EACCES).
        UnderlayDenied = "underlay_denied",
        /// The underlay refused the datagram for another reason.
        UnderlayRefused = "underlay_refused",
    }
}

named! {
    /// What a worker counts besides drops.
    Count {
        /// Inner packets sent to peers; a super-packet counts as its segments.
        OutboundPackets = "outbound_packets",
        /// Their bytes, inner headers included.
        OutboundBytes = "outbound_bytes",
        /// Super-packets received from the device.
        OutboundSuperPackets = "outbound_super_packets",
        /// Runs handed to the underlay: messages with one destination and one segment size.
        OutboundRuns = "outbound_runs",
        /// Super-packets that did not look like the one before, so that their bytes had to be moved.
        OutboundMoved = "outbound_moved",
        /// Turns that had something to send.
        OutboundBatches = "outbound_batches",
        /// Inner packets received from peers and accepted.
        InboundPackets = "inbound_packets",
        /// Their bytes, inner headers included.
        InboundBytes = "inbound_bytes",
        /// Frames written to the device.
        InboundFrames = "inbound_frames",
        /// Frames among them coalesced from two or more packets.
        InboundSuperPackets = "inbound_super_packets",
        /// Turns that had received something.
        InboundBatches = "inbound_batches",
        /// Datagrams or runs received.
        InboundDatagrams = "inbound_datagrams",
        /// ICMP errors sent to inner senders.
        IcmpSent = "icmp_sent",
        /// ICMP errors held back by the rate limit.
        IcmpLimited = "icmp_limited",
        /// Super-packets the device refused (EINVAL) and that were then written segment by segment.
        DeviceFallbacks = "device_fallbacks",
        /// Runs the kernel refused to segment (EIO, EINVAL, EMSGSIZE) and that were resent one by one.
        GsoFallbacks = "gso_fallbacks",
        /// Runs and datagrams larger than the underlay's path carries, as far as it is known (EMSGSIZE).
        PathTooBig = "path_too_big",
        /// Datagrams the kernel dropped because our receive buffer was full (SO_RXQ_OVFL).
        ReceiveOverflows = "receive_overflows",
        /// SRv6 packets sent past the kernel's routing, by a packet socket.
        PacketSends = "packet_sends",
        /// SRv6 packets sent by a raw socket.
        RawSends = "raw_sends",
        /// Runs a packet socket refused and that went by the raw socket.
        PacketFallbacks = "packet_fallbacks",
        /// Sends that had to wait for room.
        SendWaits = "send_waits",
        /// SRv6 packets sent on towards their next segment or next hop.
        SegmentsForwarded = "segments_forwarded",
        /// SRv6 echo requests answered.
        SegmentEchoes = "segment_echoes",
        /// Times a thread went to sleep.
        Sleeps = "sleeps",
    }
}

named! {
    /// System calls of the packet path, by the name they have in `strace`.
    Call {
        /// A packet from a TUN device.
        Readv = "readv",
        /// A frame to a TUN device.
        Writev = "writev",
        /// Datagrams from a socket.
        Recvmmsg = "recvmmsg",
        /// Datagrams to a socket.
        Sendmmsg = "sendmmsg",
        /// An ICMP error of our own.
        Sendto = "sendto",
        /// A wait, or a look whether there is anything to wait for.
        Poll = "poll",
        /// The processor left to whoever wants it, between two looks.
        SchedYield = "sched_yield",
    }
}

/// System calls one edge has made since it was last asked, on memory of its own: what makes them need not know whose counters they go to.
#[derive(Clone, Debug, Default)]
pub struct Calls([u32; Call::COUNT]);

impl Calls {
    /// Notes a call.
    #[inline]
    pub fn note(&mut self, call: Call) {
        let noted = &mut self.0[call as usize];
        *noted = noted.wrapping_add(1);
    }

    /// Moves what was noted into a worker's counters.
    #[inline]
    pub fn settle(&mut self, stats: &WorkerStats) {
        for (counter, noted) in stats.calls.iter().zip(&mut self.0) {
            if *noted != 0 {
                counter.add(u64::from(std::mem::take(noted)));
            }
        }
    }
}

/// Sizes of batches are told apart by powers of two up to the last of these, packets; anything larger is one kind more.
pub const BATCH_BOUNDS: [u32; 13] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];

/// How many batches were of which size: one number for each bound, of those up to it and above the one before, and one for the rest.
pub type BatchSizes = [u64; BATCH_BOUNDS.len() + 1];

/// The counters of one worker.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerStats {
    counts: [Counter; Count::COUNT],
    drops: [Counter; DropReason::COUNT],
    calls: [Counter; Call::COUNT],
    batches: [Counter; BATCH_BOUNDS.len() + 1],
}

impl Default for WorkerStats {
    fn default() -> Self {
        Self {
            counts: std::array::from_fn(|_| Counter::default()),
            drops: std::array::from_fn(|_| Counter::default()),
            calls: std::array::from_fn(|_| Counter::default()),
            batches: std::array::from_fn(|_| Counter::default()),
        }
    }
}

impl WorkerStats {
    /// Adds to a count.
    #[inline]
    pub fn count(&self, what: Count, n: u64) {
        self.counts[what as usize].add(n);
    }

    /// Counts `n` packets dropped.
    #[inline]
    pub fn discard(&self, reason: DropReason, n: u64) {
        self.drops[reason as usize].add(n);
    }

    /// Counts a system call.
    #[inline]
    pub fn called(&self, call: Call) {
        self.calls[call as usize].add(1);
    }

    /// Counts a batch of so many packets.
    #[inline]
    pub fn batch(&self, packets: u64) {
        let power = u64::BITS - packets.saturating_sub(1).leading_zeros();
        self.batches[(power as usize).min(BATCH_BOUNDS.len())].add(1);
    }

    /// Reads the count of a system call.
    pub fn calls(&self, call: Call) -> u64 {
        self.calls[call as usize].get()
    }

    /// Reads how large batches were.
    pub fn batches(&self) -> BatchSizes {
        std::array::from_fn(|index| self.batches[index].get())
    }

    /// Reads a count.
    pub fn counted(&self, what: Count) -> u64 {
        self.counts[what as usize].get()
    }

    /// Reads a drop counter.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].get()
    }
}

/// Traffic with one peer as one worker direction sees it.
///
/// Counters of drops are made with the first: a hundred thousand peers, hardly one of whom is ever refused anything, would take a quarter
/// of a gigabyte for them.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PeerCell {
    /// Inner packets.
    pub packets: Counter,
    /// Their bytes.
    pub bytes: Counter,
    drops: OnceLock<Box<[Counter; DropReason::COUNT]>>,
}

impl PeerCell {
    /// Counts `n` packets dropped.
    #[inline]
    pub fn discard(&self, reason: DropReason, n: u64) {
        let drops = self
            .drops
            .get_or_init(|| Box::new(std::array::from_fn(|_| Counter::default())));
        drops[reason as usize].add(n);
    }

    /// Reads a drop counter.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops.get().map_or(0, |drops| drops[reason as usize].get())
    }
}

/// Traffic with one peer, for who counts it: a cell for each queue and direction, so that every cell has one writer.
///
/// The cells of a direction are made with its first packet: of many peers, few ever have any. From then on they are one step away, as if
/// they had always been there.
#[derive(Clone, Debug)]
pub struct PeerStats {
    outbound: OnceLock<Cells>,
    inbound: OnceLock<Cells>,
    counts: PeerCounts,
}

type Cells = Arc<[PeerCell]>;

impl PeerStats {
    /// Counters of their own for a data plane of `queues` queues.
    pub fn new(queues: usize) -> Self {
        PeerCounts::new(queues).stats()
    }

    /// The outbound cell of `queue`.
    #[inline]
    pub fn outbound(&self, queue: usize) -> Option<&PeerCell> {
        let made = self.outbound.get();
        let cells = made.unwrap_or_else(|| self.counts.take(|made| &made.outbound, &self.outbound));
        cells.get(queue)
    }

    /// The inbound cell of `queue`.
    #[inline]
    pub fn inbound(&self, queue: usize) -> Option<&PeerCell> {
        let made = self.inbound.get();
        let cells = made.unwrap_or_else(|| self.counts.take(|made| &made.inbound, &self.inbound));
        cells.get(queue)
    }

    /// See [`PeerCounts::totals`].
    pub fn totals(&self) -> (u64, u64, u64, u64) {
        self.counts.totals()
    }

    /// See [`PeerCounts::dropped`].
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.counts.dropped(reason)
    }
}

/// The same, for who reads it: what all [`PeerStats`] of one peer count.
#[derive(Clone, Debug)]
pub struct PeerCounts(Arc<Directions>);

#[derive(Debug)]
struct Directions {
    queues: usize,
    outbound: OnceLock<Cells>,
    inbound: OnceLock<Cells>,
}

impl PeerCounts {
    /// Counters for a data plane of `queues` queues.
    pub fn new(queues: usize) -> Self {
        Self(Arc::new(Directions {
            queues: queues.max(1),
            outbound: OnceLock::new(),
            inbound: OnceLock::new(),
        }))
    }

    /// For somebody who counts.
    pub fn stats(&self) -> PeerStats {
        PeerStats {
            outbound: self.0.outbound.clone(),
            inbound: self.0.inbound.clone(),
            counts: self.clone(),
        }
    }

    /// Sums over queues: (outbound packets, outbound bytes, inbound packets, inbound bytes).
    pub fn totals(&self) -> (u64, u64, u64, u64) {
        let sum = |cells: &OnceLock<Cells>| {
            let cells = cells.get().map_or(&[][..], |cells| cells);
            cells.iter().fold((0, 0), |(packets, bytes), cell| {
                (packets + cell.packets.get(), bytes + cell.bytes.get())
            })
        };
        let ((out_packets, out_bytes), (in_packets, in_bytes)) =
            (sum(&self.0.outbound), sum(&self.0.inbound));
        (out_packets, out_bytes, in_packets, in_bytes)
    }

    /// Packets dropped for `reason`, over queues and directions.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        [&self.0.outbound, &self.0.inbound]
            .into_iter()
            .filter_map(OnceLock::get)
            .flat_map(|cells| cells.iter())
            .map(|cell| cell.dropped(reason))
            .sum()
    }

    /// The cells of a direction for somebody who has none yet; made, if nobody has.
    #[cold]
    fn take<'a>(
        &self,
        direction: impl Fn(&Directions) -> &OnceLock<Cells>,
        into: &'a OnceLock<Cells>,
    ) -> &'a Cells {
        let shared = direction(&self.0);
        if shared.get().is_none() {
            // Not inside `get_or_init`, where another thread would wait for this one. Whoever comes second takes what the first made.
            let _ = shared.set((0..self.0.queues).map(|_| PeerCell::default()).collect());
        }
        into.get_or_init(|| shared.get().map_or_else(|| Cells::from([]), Arc::clone))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_name_of_its_own() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
        assert_eq!(DropReason::ALL[DropReason::NoRoute as usize], DropReason::NoRoute);
    }

    #[test]
    fn a_batch_is_counted_under_the_first_bound_that_holds_it() {
        let stats = WorkerStats::default();
        let bound_of = |packets: u64| BATCH_BOUNDS.iter().position(|&bound| packets <= u64::from(bound));
        for packets in (0..=9000).chain([u64::MAX]) {
            let before = stats.batches();
            stats.batch(packets);
            let grown = stats
                .batches()
                .iter()
                .zip(before)
                .position(|(now, before)| *now != before);
            assert_eq!(grown, bound_of(packets).or(Some(BATCH_BOUNDS.len())), "{packets}");
        }
    }

    #[test]
    fn calls_are_settled_once() {
        let (stats, mut calls) = (WorkerStats::default(), Calls::default());
        calls.note(Call::Readv);
        calls.note(Call::Readv);
        calls.settle(&stats);
        calls.settle(&stats);
        stats.called(Call::Poll);
        assert_eq!(
            (
                stats.calls(Call::Readv),
                stats.calls(Call::Poll),
                stats.calls(Call::Writev)
            ),
            (2, 1, 0)
        );
    }

    #[test]
    fn a_peer_without_packets_is_small_and_one_that_is_refused_nothing_nearly_so() {
        assert_eq!((size_of::<Directions>(), size_of::<PeerCell>()), (56, 128));
        let stats = PeerStats::new(1);
        assert_eq!(
            (stats.totals(), stats.dropped(DropReason::NotForUs)),
            ((0, 0, 0, 0), 0)
        );
        assert!(stats.counts.0.inbound.get().is_none() && stats.counts.0.outbound.get().is_none());
        let cell = stats.inbound(0).unwrap();
        assert_eq!(stats.dropped(DropReason::NotForUs), 0);
        cell.discard(DropReason::NotForUs, 2);
        cell.discard(DropReason::NotForUs, 1);
        assert_eq!(
            (
                stats.dropped(DropReason::NotForUs),
                stats.dropped(DropReason::NoRoute)
            ),
            (3, 0)
        );
    }

    #[test]
    fn whoever_counts_of_a_peer_counts_in_the_same_cells() {
        let counts = PeerCounts::new(1);
        let (early, other) = (counts.stats(), counts.stats());
        early.outbound(0).unwrap().packets.add(1);
        let late = counts.stats();
        for stats in [&other, &late, &other.clone()] {
            stats.outbound(0).unwrap().packets.add(1);
            stats.inbound(0).unwrap().bytes.add(2);
        }
        assert_eq!(counts.totals(), (4, 0, 0, 6));
    }

    #[test]
    fn queues_that_see_the_first_packet_together_share_their_cells() {
        for _ in 0..200 {
            let counts = PeerCounts::new(4);
            let start = std::sync::Barrier::new(4);
            std::thread::scope(|scope| {
                for queue in 0..4 {
                    let (stats, start) = (counts.stats(), &start);
                    scope.spawn(move || {
                        start.wait();
                        stats.outbound(queue).unwrap().packets.add(1);
                    });
                }
            });
            assert_eq!(counts.totals(), (4, 0, 0, 0));
        }
    }

    #[test]
    fn totals_sum_over_queues() {
        let stats = PeerStats::new(2);
        stats.outbound(0).unwrap().packets.add(1);
        stats.outbound(1).unwrap().packets.add(2);
        stats.inbound(1).unwrap().bytes.add(7);
        assert_eq!(stats.totals(), (3, 0, 0, 7));
        assert!(stats.inbound(2).is_none());
    }
}
