//! The two directions of one queue, generic over their edges.
//!
//! A direction owns its descriptors, buffers and counters and is driven by calling `turn`: at most one batch, without waiting for
//! more to come. What waits for readiness, and on which threads the directions run, is the shell's business.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::addr::Mtu;
use crate::dataplane::coalesce::{Coalescer, MAX_SLICES, Merge};
use crate::dataplane::datagram::DatagramBatch;
use crate::dataplane::forward::{self, ErrorLimiter, Ingress, IngressCheck, Sending, Sources};
use crate::dataplane::offload::SuperPacket;
use crate::dataplane::packet::{MAX_PACKET, PacketBatch, SendPlan};
use crate::dataplane::route::{RouteReader, RouteTable};
use crate::dataplane::stats::{Count, DropReason, WorkerStats};
use crate::dataplane::{Device, DeviceError, Encap, SendError, SendFailure, Underlay};
use crate::wire::icmp::{self, IcmpError};
use crate::wire::ip::IpHeader;
use crate::wire::virtio::{GsoKind, VirtioHeader};

/// Batches dropped at once at the most: more than any socket buffer holds, so that a flood cannot keep us at it.
const MOST_DISCARDED: u32 = 4096;

/// Whether a turn found something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It did; there may be more.
    Busy,
    /// Nothing was waiting.
    Idle,
}

/// From the device to the underlay.
pub struct Outbound<E: Encap, D, U> {
    encap: E,
    device: D,
    underlay: U,
    routes: RouteReader<E::Hop>,
    queue: usize,
    stats: Arc<WorkerStats>,
    errors: Errors,
    sending: Sending,
    batch: PacketBatch,
    plan: SendPlan,
    failures: Vec<SendFailure>,
}

impl<E: Encap, D: Device, U: Underlay> Outbound<E, D, U> {
    /// Puts a direction together.
    pub fn new(
        encap: E,
        (device, underlay): (D, U),
        routes: RouteReader<E::Hop>,
        (queue, stats): (usize, Arc<WorkerStats>),
        now: Instant,
    ) -> Self {
        let any_v4 = ([0, 0, 0, 0], 0).into();
        let any_v6 = ([0u16; 8], 0).into();
        let sending = Sending {
            v4: underlay.limits(any_v4),
            v6: underlay.limits(any_v6),
            ports: underlay.source_ports().max(1),
            clamp_mss: false,
            sources: Sources::ANY,
        };
        Self {
            encap,
            device,
            underlay,
            routes,
            queue,
            stats,
            errors: Errors::new(now),
            sending,
            batch: PacketBatch::new(),
            plan: SendPlan::new(),
            failures: Vec::with_capacity(64),
        }
    }

    /// Makes TCP connections announce segments that fit the path from now on, or no longer.
    pub fn set_clamp_mss(&mut self, clamp: bool) {
        self.sending.clamp_mss = clamp;
    }

    /// Refuses packets of the device whose source is not this node's from now on.
    pub fn set_sources(&mut self, sources: Sources) {
        self.sending.sources = sources;
    }

    /// Drops all that waits in the device: nobody wants it any more.
    ///
    /// # Errors
    /// The device is beyond use and must be made anew.
    pub fn discard_waiting(&mut self) -> io::Result<()> {
        for _ in 0..MOST_DISCARDED {
            self.batch.clear();
            while self.device.recv(&mut self.batch)? {}
            if self.batch.is_empty() {
                break;
            }
            self.stats.discard(DropReason::Stale, self.batch.len() as u64);
        }
        Ok(())
    }

    /// Moves one batch.
    ///
    /// # Errors
    /// An edge is beyond use and must be made anew.
    pub fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        self.batch.clear();
        self.plan.clear();
        // Those of the turn before: after one that found something there is always another.
        self.device.settle(&self.stats);
        let before = self.stats.counted(Count::OutboundPackets);
        let routes = self.routes.load();
        // Each packet is dealt with while it is still in the cache, and the newest may take more room than it was read into.
        while self.device.recv(&mut self.batch)? {
            let index = self.batch.len() - 1;
            let counting = (self.queue, &*self.stats);
            let Err(refusal) = forward::outbound(
                &self.encap,
                self.sending,
                routes,
                index,
                &mut self.batch,
                &mut self.plan,
                counting,
            ) else {
                continue;
            };
            self.stats.discard(refusal.reason, 1);
            let peer = refusal.peer.and_then(|index| routes.peer(index));
            if let Some(cell) = peer.and_then(|peer| peer.stats.outbound(self.queue)) {
                cell.discard(refusal.reason, 1);
            }
            if let Some((error, ip)) = refusal.answer {
                let packet = self.batch.front(self.batch.meta(index));
                self.errors
                    .answer(&mut self.device, routes, &self.stats, (error, &ip, packet), now);
            }
        }
        if self.batch.is_empty() {
            return Ok(Turn::Idle);
        }
        self.stats.count(Count::OutboundBatches, 1);
        self.stats.count(Count::OutboundMoved, self.batch.take_moved());
        self.stats
            .batch(self.stats.counted(Count::OutboundPackets).wrapping_sub(before));
        if self.plan.is_empty() {
            return Ok(Turn::Busy);
        }
        self.stats
            .count(Count::OutboundRuns, self.plan.runs().len() as u64);
        self.failures.clear();
        self.underlay
            .send(&self.plan, &self.batch, &self.stats, &mut self.failures)?;
        for failure in &self.failures {
            let Some(run) = self.plan.runs().get(failure.run) else {
                continue;
            };
            let reason = DropReason::from(failure.error);
            self.stats.discard(reason, failure.segments as u64);
            let peer = routes.peer(run.peer);
            if let Some(cell) = peer.and_then(|peer| peer.stats.outbound(self.queue)) {
                cell.discard(reason, failure.segments as u64);
            }
            let packet = self.batch.front(self.batch.meta(run.packet));
            let answer = match failure.error {
                SendError::TooBig => peer.map(|peer| IcmpError::TooBig(peer.inner_mtu.bytes())),
                SendError::Busy | SendError::Unreachable | SendError::Denied | SendError::Refused => None,
            };
            if let (Some(error), Ok(ip)) = (answer, IpHeader::parse_front(packet, MAX_PACKET)) {
                self.errors
                    .answer(&mut self.device, routes, &self.stats, (error, &ip, packet), now);
            }
        }
        Ok(Turn::Busy)
    }

    /// The packet buffers, for the shell to tell the kernel what they are for.
    pub fn memory(&mut self) -> &mut [u8] {
        self.batch.memory()
    }

    /// The device edge.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// The underlay edge.
    pub fn underlay(&mut self) -> &mut U {
        &mut self.underlay
    }

    /// The counters.
    pub fn stats(&self) -> &WorkerStats {
        &self.stats
    }
}

/// From the underlay to the device.
pub struct Inbound<E: Encap, D, U> {
    encap: E,
    device: D,
    underlay: U,
    routes: RouteReader<E::Hop>,
    queue: usize,
    stats: Arc<WorkerStats>,
    errors: Errors,
    options: InboundOptions,
    batch: DatagramBatch,
    coalescer: Coalescer,
    /// Where a refused frame is put together to be split again.
    whole: Vec<u8>,
    spread: Vec<u8>,
}

/// How inbound packets are treated.
#[derive(Clone, Copy, Debug)]
pub struct InboundOptions {
    /// How strictly they are checked.
    pub check: IngressCheck,
    /// Sum inner checksums even where the outer one vouches for them.
    pub verify_inner: bool,
    /// The largest packet of the overlay.
    pub inner_mtu: Mtu,
    /// Whether TCP connections are made to announce segments that fit it.
    pub clamp_mss: bool,
}

impl<E: Encap, D: Device, U: Underlay> Inbound<E, D, U> {
    /// Puts a direction together.
    pub fn new(
        encap: E,
        (device, underlay): (D, U),
        routes: RouteReader<E::Hop>,
        (queue, stats): (usize, Arc<WorkerStats>),
        options: InboundOptions,
        now: Instant,
    ) -> Self {
        let merge = device.merge();
        Self {
            encap,
            device,
            underlay,
            routes,
            queue,
            stats,
            errors: Errors::new(now),
            options,
            batch: DatagramBatch::new(),
            coalescer: Coalescer::new(merge),
            whole: Vec::with_capacity(MAX_PACKET),
            spread: Vec::new(),
        }
    }

    /// Drops all that waits in the underlay: nobody wants it any more.
    ///
    /// # Errors
    /// The underlay is beyond use and must be made anew.
    pub fn discard_waiting(&mut self) -> io::Result<()> {
        for _ in 0..MOST_DISCARDED {
            self.batch.clear();
            self.underlay.recv(&mut self.batch)?;
            self.stats.count(Count::ReceiveOverflows, self.batch.overflows());
            if self.batch.is_empty() {
                break;
            }
            let packets = self.batch.datagrams().iter().map(|datagram| {
                let step = datagram.segment_size.unwrap_or(datagram.len).max(1);
                datagram.len.div_ceil(step) as u64
            });
            self.stats.discard(DropReason::Stale, packets.sum());
        }
        Ok(())
    }

    /// Moves one batch.
    ///
    /// # Errors
    /// An edge is beyond use and must be made anew.
    pub fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        self.batch.clear();
        self.device.settle(&self.stats);
        self.underlay.settle(&self.stats);
        let before = self.stats.counted(Count::InboundPackets);
        self.underlay.recv(&mut self.batch)?;
        let routes = self.routes.load();
        self.stats.discard(DropReason::DatagramCut, self.batch.cut());
        self.stats.count(Count::ReceiveOverflows, self.batch.overflows());
        if self.batch.is_empty() {
            return Ok(Turn::Idle);
        }
        self.coalescer.clear();
        self.stats.count(Count::InboundBatches, 1);
        self.stats
            .count(Count::InboundDatagrams, self.batch.datagrams().len() as u64);
        let ingress = Ingress {
            encap: &self.encap,
            check: self.options.check,
            verify_inner: self.options.verify_inner,
            inner_mtu: self.options.inner_mtu,
            clamp_mss: self.options.clamp_mss,
            routes,
            queue: self.queue,
            stats: &self.stats,
        };
        for index in 0..self.batch.datagrams().len() {
            let datagram = self.batch.datagrams()[index];
            let (errors, device, stats) = (&mut self.errors, &mut self.device, &*self.stats);
            ingress.inbound(
                datagram,
                &mut self.batch,
                &mut self.coalescer,
                |error, ip, packet| {
                    errors.answer(device, routes, stats, (error, ip, packet), now);
                },
            );
        }
        self.stats
            .batch(self.stats.counted(Count::InboundPackets).wrapping_sub(before));
        self.coalescer.finish(self.batch.bytes());
        for index in 0..self.coalescer.len() {
            self.write(index)?;
        }
        Ok(Turn::Busy)
    }

    /// Writes one frame; a super-packet the device refuses goes out segment by segment, and its kind is not merged again.
    fn write(&mut self, index: usize) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let filled = self.coalescer.slices(index, self.batch.bytes(), &mut slices);
        let frame = slices.get(..filled).unwrap_or(&[]);
        let segments = self.coalescer.segments(index) as u64;
        if segments > 1 && !self.coalescer.merge().tcp && self.coalescer.is_unfinished(index) {
            // A super-packet that came as one, and a device that takes none.
            copy_frame(frame, &mut self.whole);
            return self.write_singly(segments);
        }
        match self.device.send(frame) {
            Ok(()) => {
                self.stats.count(Count::InboundFrames, 1);
                self.stats
                    .count(Count::InboundSuperPackets, u64::from(segments > 1));
            }
            Err(DeviceError::Refused) if segments > 1 => {
                copy_frame(frame, &mut self.whole);
                self.stats.count(Count::DeviceFallbacks, 1);
                return self.write_singly(segments);
            }
            Err(error) => self.refused(error, segments)?,
        }
        Ok(())
    }

    /// Splits the frame in `whole` again and writes its segments.
    fn write_singly(&mut self, segments: u64) -> io::Result<()> {
        let parsed = VirtioHeader::parse(&self.whole)
            .ok()
            .and_then(|(header, packet)| {
                let gso = header.gso?;
                let ip = IpHeader::parse(packet).ok()?;
                Some((gso, packet, SuperPacket::new(packet, ip, gso).ok()?))
            });
        let Some((gso, packet, super_packet)) = parsed else {
            self.stats.discard(DropReason::DeviceRefused, segments);
            return Ok(());
        };
        let merge = self.coalescer.merge();
        self.coalescer.set_merge(match gso.kind {
            GsoKind::TcpV4 | GsoKind::TcpV6 => Merge { tcp: false, ..merge },
            GsoKind::Udp => Merge { udp: false, ..merge },
        });
        super_packet.spread(packet, 0, &mut self.spread);
        super_packet.split(&mut self.spread, 0, |_, _| ());
        let plain = VirtioHeader::default().emit();
        for segment in self.spread.chunks(super_packet.shape(0).stride()) {
            match self.device.send(&[IoSlice::new(&plain), IoSlice::new(segment)]) {
                Ok(()) => self.stats.count(Count::InboundFrames, 1),
                Err(error) => self.refused(error, 1)?,
            }
        }
        Ok(())
    }

    fn refused(&self, error: DeviceError, packets: u64) -> io::Result<()> {
        let reason = match error {
            DeviceError::Refused => DropReason::DeviceRefused,
            DeviceError::Busy => DropReason::DeviceBusy,
            DeviceError::Down => DropReason::DeviceDown,
            DeviceError::Gone => return Err(io::Error::from_raw_os_error(libc::EBADFD)),
        };
        self.stats.discard(reason, packets);
        Ok(())
    }

    /// The packet buffers, for the shell to tell the kernel what they are for.
    pub fn memory(&mut self) -> &mut [u8] {
        self.batch.memory()
    }

    /// The device edge.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// The underlay edge, to look at.
    pub fn underlay_ref(&self) -> &U {
        &self.underlay
    }

    /// The underlay edge.
    pub fn underlay(&mut self) -> &mut U {
        &mut self.underlay
    }

    /// The counters.
    pub fn stats(&self) -> &WorkerStats {
        &self.stats
    }
}

/// Puts the pieces of a frame one behind the other.
fn copy_frame(frame: &[IoSlice<'_>], whole: &mut Vec<u8>) {
    whole.clear();
    for slice in frame {
        whole.extend_from_slice(slice);
    }
}

/// Builds and sends ICMP errors, at a limited rate.
struct Errors {
    limiter: ErrorLimiter,
    buffer: Box<[u8; icmp::MAX_LEN]>,
}

impl Errors {
    fn new(now: Instant) -> Self {
        Self {
            limiter: ErrorLimiter::new(now),
            buffer: Box::new([0; icmp::MAX_LEN]),
        }
    }

    fn answer<H: crate::dataplane::route::Hop>(
        &mut self,
        device: &mut impl Device,
        routes: &RouteTable<H>,
        stats: &WorkerStats,
        (error, ip, packet): (IcmpError, &IpHeader, &[u8]),
        now: Instant,
    ) {
        let to: IpAddr = ip.addrs.src();
        let Some(own) = routes.overlay().own_address(to) else {
            return;
        };
        if !icmp::may_answer(ip, packet) {
            return;
        }
        if !self.limiter.allows(to, now) {
            stats.count(Count::IcmpLimited, 1);
            return;
        }
        let Some(len) = icmp::build(error, own, ip, packet, &mut self.buffer[..]) else {
            return;
        };
        if device.answer(&self.buffer[..len], to).is_ok() {
            stats.count(Count::IcmpSent, 1);
        }
    }
}
