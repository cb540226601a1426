//! The decisions about each packet: where it goes, whether it may, and what is said if it may not.
//!
//! Pure: packets, a route snapshot and the time come in; a send plan, frames and refusals come out.
//!
//! Inbound checks run from cheapest to dearest, and the addresses of the last accepted packet are remembered within a datagram, so
//! that a run of one flow is checked once:
//!
//! 1. outer source is a peer's (`unknown_peer`),
//! 2. encapsulation and inner header are sound,
//! 3. inner source is routable, not ours, and in the lease of that very peer (`martian_source`, `spoofed_source`, `foreign_source`),
//! 4. inner destination is ours (`not_for_us`, `not_unicast`): we are no relay.
//!
//! Outbound, the source is held to the same rule from the other side ([`Sources`]): what a peer would refuse as spoofed or foreign does
//! not leave. What is for our own subnet, or is the tunnel's own packet come back, is a `loop`.
//!
//! Limits: an attacker who can send with a peer's address on the underlay is that peer to us; only a filtered or encrypted underlay prevents it.

use std::net::IpAddr;

use crate::addr::Mtu;
use crate::dataplane::coalesce::{Coalescer, Offer, Trust};
use crate::dataplane::datagram::{Datagram, DatagramBatch, Envelope};
use crate::dataplane::offload::{SuperPacket, finish_checksum, finish_for_kernel};
use crate::dataplane::packet::{PacketBatch, RunKey, RunLimits, Segments, SendPlan};
use crate::dataplane::route::{Hop, Overlay, RouteTable};
use crate::dataplane::stats::{Count, DropReason, WorkerStats};
use crate::dataplane::{EcnPolicy, Encap, Inner, Manners, PeerOffloads, TtlPolicy};
use crate::wire::Malformed;
use crate::wire::icmp::IcmpError;
use crate::wire::ip::{
    Addrs, Ecn, Fragment, IpHeader, Scope, V4_LEN, V6_LEN, decrement_ttl, protocol, scope, set_ecn,
    verify_v4_header,
};
use crate::wire::transport::{clamp_mss, tcp};

/// How strictly inbound packets are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IngressCheck {
    /// Outer source is a known peer, inner source lies in that peer's lease, inner destination is ours.
    Strict,
    /// Inner source lies in some peer's lease, inner destination is ours: for peers behind NAT or with several addresses.
    Loose,
    /// Only what the format demands; what the kernel's own drivers do.
    Off,
}

impl IngressCheck {
    /// Its name in flags and status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Loose => "loose",
            Self::Off => "off",
        }
    }
}

/// Why a packet goes no further, and what its sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Counted under this.
    pub reason: DropReason,
    /// The peer it was meant for, by route index.
    pub peer: Option<u32>,
    /// The answer, and the header of the packet it is about.
    pub answer: Option<(IcmpError, IpHeader)>,
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self {
            reason,
            peer: None,
            answer: None,
        }
    }
}

impl From<Malformed> for DropReason {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Truncated => Self::Truncated,
            Malformed::Version => Self::BadVersion,
            Malformed::HeaderLength => Self::BadHeaderLength,
            Malformed::TotalLength => Self::BadLength,
            Malformed::HeaderChecksum => Self::BadHeaderChecksum,
            Malformed::ExtensionChain => Self::BadExtensionHeaders,
        }
    }
}

/// Which packets of the device are this node's to send.
#[derive(Clone, Copy, Debug)]
pub struct Sources {
    /// How strict to be.
    pub check: IngressCheck,
    /// The node's own addresses outside the overlay.
    pub node: [Option<IpAddr>; 4],
}

impl Sources {
    /// Everything is, whatever its source.
    pub const ANY: Self = Self {
        check: IngressCheck::Off,
        node: [None; 4],
    };

    fn is_node(&self, addr: IpAddr) -> bool {
        self.node.contains(&Some(addr))
    }

    /// Whether a packet may leave with this source: what a strict peer would refuse is not sent.
    #[inline]
    fn admit(&self, src: IpAddr, overlay: &Overlay) -> Result<(), DropReason> {
        if self.check == IngressCheck::Off || overlay.is_own(src) || self.is_node(src) {
            return Ok(());
        }
        match (self.check, overlay.contains(src)) {
            (IngressCheck::Off, _) | (IngressCheck::Loose, true) => Ok(()),
            (IngressCheck::Strict, true) => Err(DropReason::SpoofedSource),
            (IngressCheck::Strict | IngressCheck::Loose, false) => Err(DropReason::ForeignSource),
        }
    }
}

/// What the underlay allows, as outbound needs it.
#[derive(Clone, Copy, Debug)]
pub struct Sending {
    /// Longest run over IPv4.
    pub v4: RunLimits,
    /// Longest run over IPv6.
    pub v6: RunLimits,
    /// Size of the pool of source ports, at least 1.
    pub ports: usize,
    /// Whether SYNs are made to announce segments that fit the path.
    pub clamp_mss: bool,
    /// Which sources packets may have.
    pub sources: Sources,
}

/// Decides about packet `index` of the batch and puts its segments into the plan.
///
/// # Errors
/// The packet goes no further; see [`Refusal`].
#[inline]
pub fn outbound<E: Encap>(
    encap: &E,
    sending: Sending,
    routes: &RouteTable<E::Hop>,
    index: usize,
    batch: &mut PacketBatch,
    plan: &mut SendPlan,
    (queue, stats): (usize, &WorkerStats),
) -> Result<(), Refusal> {
    let meta = batch.meta(index);
    let ip = IpHeader::parse_front(batch.front(meta), meta.len()).map_err(DropReason::from)?;
    match (scope(ip.addrs.src()), scope(ip.addrs.dst())) {
        (Scope::Routable, Scope::Routable) => {}
        (_, Scope::Multicast | Scope::LinkLocal | Scope::Martian)
        | (Scope::LinkLocal | Scope::Multicast, Scope::Routable) => {
            return Err(DropReason::NotUnicast.into());
        }
        (Scope::Martian, Scope::Routable) => return Err(DropReason::MartianSource.into()),
    }
    let overlay = routes.overlay();
    sending.sources.admit(ip.addrs.src(), overlay)?;
    let found = routes.lookup(ip.addrs.dst());
    let Some((peer_index, peer)) = found.and_then(|index| Some((index, routes.peer(index)?))) else {
        // The tunnel's own packets, if somebody routes the underlay into the tunnel: nobody is to be told.
        if sending.sources.is_node(ip.addrs.src()) && !overlay.contains(ip.addrs.dst()) {
            return Err(DropReason::Loop.into());
        }
        return Err(Refusal {
            reason: if overlay.is_own(ip.addrs.dst()) {
                DropReason::Loop
            } else {
                DropReason::NoRoute
            },
            peer: None,
            answer: Some((IcmpError::NoRoute, ip)),
        });
    };
    let refuse = |reason, answer: Option<IcmpError>| Refusal {
        reason,
        peer: Some(peer_index),
        answer: answer.map(|error| (error, ip)),
    };
    let super_packet = match meta.header.gso {
        None => None,
        Some(_) if ip.total_len != meta.len() => return Err(refuse(DropReason::BadSuperPacket, None)),
        Some(gso) => {
            let checked = SuperPacket::new(batch.front(meta), ip, gso);
            Some(checked.map_err(|reason| refuse(reason, None))?)
        }
    };
    let longest = super_packet.map_or(ip.total_len, |super_packet| super_packet.segment_len());
    if longest > usize::from(peer.inner_mtu.bytes()) && (ip.dont_fragment || super_packet.is_some()) {
        return Err(refuse(
            DropReason::TooBig,
            Some(IcmpError::TooBig(peer.inner_mtu.bytes())),
        ));
    }
    let manners = encap.outbound(&peer.hop);
    match manners.ttl {
        TtlPolicy::Keep => {}
        TtlPolicy::Decrement => {
            if decrement_ttl(batch.front_mut(meta)).is_none() {
                return Err(refuse(DropReason::TtlExpired, Some(IcmpError::TimeExceeded)));
            }
        }
    }
    if sending.clamp_mss || manners.mute {
        let finished = meta.header.checksum.is_none();
        clamp_segments(batch.front_mut(meta), &ip, peer.inner_mtu, finished);
    }
    let to = peer.hop.endpoint();
    let limits = if to.is_ipv4() { sending.v4 } else { sending.v6 };
    let flow = flow_hash(&ip, batch.front(meta));
    let ecn = match manners.ecn {
        EcnPolicy::Ignore => Ecn::NotEct,
        EcnPolicy::Carry => Ecn::of(ip.tos),
    };
    let key = RunKey {
        to,
        port: flow as usize % sending.ports,
        ecn,
        flow,
        peer: peer_index,
    };
    let encap_len = encap.header_len(&peer.hop);
    let wanted = super_packet.map(|super_packet| super_packet.shape(encap_len));
    let Some(meta) = batch.shape(wanted) else {
        return Err(refuse(DropReason::BadSuperPacket, None));
    };
    let at = meta.start() - encap_len;
    let bytes = batch.segments_mut(meta, encap_len);
    let (segments, count) = match super_packet {
        None => {
            let (header, packet) = bytes.split_at_mut(encap_len);
            let inner = Inner {
                len: ip.total_len,
                flow,
                ecn,
            };
            encap.push(&peer.hop, inner, header);
            if let Some(partial) = meta.header.checksum {
                let packet = packet.get_mut(..ip.total_len).ok_or(DropReason::BadLength)?;
                finish_checksum(packet, partial).map_err(|reason| refuse(reason, None))?;
            }
            let len = encap_len + ip.total_len;
            (
                Segments {
                    at,
                    bytes: len,
                    size: len,
                },
                1,
            )
        }
        Some(super_packet) => {
            super_packet.split(bytes, encap_len, |header, len| {
                encap.push(&peer.hop, Inner { len, flow, ecn }, header)
            });
            stats.count(Count::OutboundSuperPackets, 1);
            let size = super_packet.shape(encap_len).stride();
            (
                Segments {
                    at,
                    bytes: bytes.len(),
                    size,
                },
                super_packet.segments(),
            )
        }
    };
    plan.push(key, limits, segments, index);
    let inner_bytes = (segments.bytes - count * encap_len) as u64;
    stats.count(Count::OutboundPackets, count as u64);
    stats.count(Count::OutboundBytes, inner_bytes);
    if let Some(cell) = peer.stats.outbound(queue) {
        cell.packets.add(count as u64);
        cell.bytes.add(inner_bytes);
    }
    Ok(())
}

/// What is known of the packets of a datagram from outside.
#[derive(Clone, Copy)]
struct Outer {
    source: IpAddr,
    envelope: Envelope,
    ecn: Ecn,
    manners: Manners,
}

/// What inbound keeps at hand for a batch.
pub struct Ingress<'a, E: Encap> {
    /// The encapsulation.
    pub encap: &'a E,
    /// How strict to be.
    pub check: IngressCheck,
    /// Sum inner checksums even where the outer one vouches for them.
    pub verify_inner: bool,
    /// The largest packet of the overlay: a longer TCP packet is a super-packet.
    pub inner_mtu: Mtu,
    /// Whether SYNs are made to announce segments that fit the overlay.
    pub clamp_mss: bool,
    /// The snapshot for this batch.
    pub routes: &'a RouteTable<E::Hop>,
    /// Which queue this is, for peers' counters.
    pub queue: usize,
    /// Where to count.
    pub stats: &'a WorkerStats,
}

impl<E: Encap> Ingress<'_, E> {
    /// Decides about every packet of a datagram (or coalesced run) and offers the accepted ones to `coalescer`.
    ///
    /// `answer` is called for packets whose sender is to be told.
    #[inline]
    pub fn inbound(
        &self,
        datagram: Datagram,
        batch: &mut DatagramBatch,
        coalescer: &mut Coalescer,
        mut answer: impl FnMut(IcmpError, &IpHeader, &[u8]),
    ) {
        let start = DatagramBatch::start(datagram);
        let end = start + datagram.len;
        let step = datagram.segment_size.unwrap_or(datagram.len).max(1);
        let source = datagram.envelope.from.ip().to_canonical();
        let peer = self.routes.source(source);
        // It is counted already, and has no sender.
        if datagram.is_cut {
            return;
        }
        if peer.is_none() && self.check == IngressCheck::Strict {
            let packets = datagram.len.div_ceil(step).max(1);
            self.stats.discard(DropReason::UnknownPeer, packets as u64);
            return;
        }
        let cell = peer
            .and_then(|index| self.routes.peer(index))
            .and_then(|peer| peer.stats.inbound(self.queue));
        if datagram.len == 0 {
            self.stats.discard(DropReason::Truncated, 1);
            if let Some(cell) = cell {
                cell.discard(DropReason::Truncated, 1);
            }
            return;
        }
        // The kernel checks the outer checksum, and it coalesces only datagrams that have one (net/ipv4/udp_offload.c).
        let trust = match datagram.segment_size {
            Some(_) if !self.verify_inner => Trust::Verified,
            Some(_) | None => Trust::Unverified,
        };
        let manners = self.encap.inbound();
        let outer = Outer {
            source,
            envelope: datagram.envelope,
            ecn: match manners.ecn {
                EcnPolicy::Ignore => Ecn::NotEct,
                EcnPolicy::Carry => datagram.envelope.ecn,
            },
            manners,
        };
        let mut accepted = None;
        // The TTL with which the packet before this one came, if this one may simply continue it.
        let mut continued = None;
        let (mut packets, mut bytes) = (0u64, 0u64);
        for at in (start..end).step_by(step) {
            let segment_end = (at + step).min(end);
            if let Some(ttl) = continued
                && let Ok(skip) = self
                    .encap
                    .pull(&outer.envelope, batch.bytes().get(at..segment_end).unwrap_or(&[]))
                && coalescer.extend(batch.bytes(), at + skip, segment_end, ttl)
            {
                packets += 1;
                bytes += (segment_end - at - skip) as u64;
                continue;
            }
            match self.accept(batch.bytes_mut(), at, segment_end, outer, &mut accepted) {
                Ok((at, ip)) => {
                    let unfinished = match (manners.offloads, trust) {
                        (PeerOffloads::None, _) | (PeerOffloads::Kernel, Trust::Verified) => None,
                        (PeerOffloads::Kernel, Trust::Unverified) => batch
                            .bytes_mut()
                            .get_mut(at..at + ip.total_len)
                            .and_then(|packet| {
                                finish_for_kernel(packet, &ip, self.inner_mtu, coalescer.merge())
                            }),
                    };
                    if self.clamp_mss
                        && let Some(packet) = batch.bytes_mut().get_mut(at..at + ip.total_len)
                    {
                        clamp_segments(packet, &ip, self.inner_mtu, unfinished.is_none());
                    }
                    let buffer = batch.bytes();
                    let flow = flow_hash(&ip, buffer.get(at..at + ip.total_len).unwrap_or(&[]));
                    let offer = Offer {
                        at,
                        ip,
                        trust,
                        flow,
                        unfinished,
                    };
                    packets += coalescer.offer(buffer, offer) as u64;
                    continued = (trust == Trust::Verified).then_some(ip.ttl);
                    bytes += ip.total_len as u64;
                }
                Err((refusal, at)) => {
                    continued = None;
                    self.stats.discard(refusal.reason, 1);
                    if let Some(cell) = cell {
                        cell.discard(refusal.reason, 1);
                    }
                    if let Some((error, ip)) = refusal.answer {
                        answer(
                            error,
                            &ip,
                            batch.bytes().get(at..at + ip.total_len).unwrap_or(&[]),
                        );
                    }
                }
            }
        }
        self.stats.count(Count::InboundPackets, packets);
        self.stats.count(Count::InboundBytes, bytes);
        if let Some(cell) = cell {
            cell.packets.add(packets);
            cell.bytes.add(bytes);
        }
    }

    /// Checks one encapsulated packet; gives where the inner packet starts, and its header.
    #[inline]
    fn accept(
        &self,
        buffer: &mut [u8],
        at: usize,
        end: usize,
        outer: Outer,
        accepted: &mut Option<Addrs>,
    ) -> Result<(usize, IpHeader), (Refusal, usize)> {
        let plain = |reason: DropReason| (Refusal::from(reason), at);
        let datagram = buffer.get(at..end).ok_or_else(|| plain(DropReason::Truncated))?;
        let inner_at = at + self.encap.pull(&outer.envelope, datagram).map_err(plain)?;
        let packet = buffer
            .get_mut(inner_at..end)
            .ok_or_else(|| plain(DropReason::Truncated))?;
        let ip = IpHeader::parse(packet).map_err(|malformed| plain(malformed.into()))?;
        match ip.addrs {
            Addrs::V4 { .. } if !packet.get(..ip.l4).is_some_and(verify_v4_header) => {
                return Err(plain(DropReason::BadHeaderChecksum));
            }
            Addrs::V4 { .. } | Addrs::V6 { .. } => {}
        }
        if *accepted != Some(ip.addrs) {
            self.check_addresses(&ip, outer.source).map_err(plain)?;
            *accepted = Some(ip.addrs);
        }
        let inner_ecn = Ecn::of(ip.tos);
        match inner_ecn.after(outer.ecn) {
            None => return Err(plain(DropReason::CongestionMark)),
            Some(ecn) if ecn == inner_ecn => {}
            Some(ecn) => set_ecn(packet, ecn),
        }
        match outer.manners.ttl {
            TtlPolicy::Keep => {}
            TtlPolicy::Decrement => {
                if decrement_ttl(packet).is_none() {
                    let answer = (ip.ttl > 0).then_some((IcmpError::TimeExceeded, ip));
                    return Err((
                        Refusal {
                            reason: DropReason::TtlExpired,
                            peer: None,
                            answer,
                        },
                        inner_at,
                    ));
                }
            }
        }
        Ok((inner_at, ip))
    }

    /// Whether `addr` belongs to the node whose datagrams come from `outer`.
    fn is_node(&self, outer: IpAddr, addr: IpAddr) -> bool {
        let peer = self
            .routes
            .source(outer)
            .and_then(|index| self.routes.peer(index));
        peer.map_or(addr == outer, |peer| peer.hop.is_node(addr))
    }

    fn check_addresses(&self, ip: &IpHeader, outer: IpAddr) -> Result<(), DropReason> {
        if self.check == IngressCheck::Off {
            return Ok(());
        }
        let (src, dst) = (ip.addrs.src(), ip.addrs.dst());
        let overlay = self.routes.overlay();
        if scope(src) != Scope::Routable || overlay.is_own(src) {
            return Err(DropReason::MartianSource);
        }
        let owner = self.routes.lookup(src).and_then(|index| self.routes.peer(index));
        match (self.check, owner) {
            (IngressCheck::Loose, Some(_)) | (IngressCheck::Off, _) => {}
            (IngressCheck::Strict, Some(peer)) if peer.hop.source() == outer => {}
            (IngressCheck::Strict, Some(_)) => return Err(DropReason::SpoofedSource),
            // The peer's own node may speak to our pods with its underlay address, be that in the overlay's network or not.
            (IngressCheck::Strict | IngressCheck::Loose, None) if self.is_node(outer, src) => {}
            (IngressCheck::Strict | IngressCheck::Loose, None) if overlay.contains(src) => {
                return Err(DropReason::SpoofedSource);
            }
            (IngressCheck::Strict | IngressCheck::Loose, None) => return Err(DropReason::ForeignSource),
        }
        match scope(dst) {
            Scope::Routable if overlay.is_own(dst) => Ok(()),
            Scope::Routable => Err(DropReason::NotForUs),
            Scope::Multicast | Scope::LinkLocal | Scope::Martian => Err(DropReason::NotUnicast),
        }
    }
}

/// Makes a SYN announce segments that fit a path of `mtu`.
#[inline]
fn clamp_segments(packet: &mut [u8], ip: &IpHeader, mtu: Mtu, finished: bool) {
    let has_header = ip.fragment != Fragment::Later;
    if let (protocol::TCP, true, Some(l4)) = (ip.protocol, has_header, packet.get_mut(ip.l4..)) {
        let ip_len = match ip.addrs {
            Addrs::V4 { .. } => V4_LEN,
            Addrs::V6 { .. } => V6_LEN,
        };
        // Options do not count: the size announced is for segments without (RFC 6691 §2).
        let limit = usize::from(mtu.bytes()).saturating_sub(ip_len + tcp::MIN_LEN);
        clamp_mss(l4, u16::try_from(limit).unwrap_or(u16::MAX), finished);
    }
}

/// Hash of a packet's flow: addresses, protocol, and ports where every packet of the flow has them.
#[inline]
pub fn flow_hash(ip: &IpHeader, packet: &[u8]) -> u32 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15; // 2^64 / golden ratio
    let addrs = match ip.addrs {
        Addrs::V4 { src, dst } => (u64::from(src.to_bits()) << 32) | u64::from(dst.to_bits()),
        Addrs::V6 { src, dst } => {
            let (src, dst) = (src.to_bits(), dst.to_bits());
            let fold = |bits: u128| ((bits >> 64) as u64).wrapping_mul(K) ^ bits as u64;
            fold(src).wrapping_mul(K).rotate_left(32) ^ fold(dst)
        }
    };
    let ports = match (ip.protocol, ip.fragment) {
        (protocol::TCP | protocol::UDP, Fragment::Whole) => match packet.get(ip.l4..ip.l4 + 4) {
            Some(&[a, b, c, d]) => u64::from(u32::from_be_bytes([a, b, c, d])),
            _ => 0,
        },
        _ => 0,
    };
    let mixed = (addrs.wrapping_mul(K) ^ (ports << 8) ^ u64::from(ip.protocol)).wrapping_mul(K);
    (mixed >> 32) as u32
}
