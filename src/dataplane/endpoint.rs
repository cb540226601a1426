//! What happens to an SRv6 packet that has come to one of our SIDs, RFC 8986 §4, RFC 9800 §4.1.
//!
//! # Theory of operation
//!
//! [`LocalSids`] says which addresses are SIDs and what each does. A raw socket takes the outer IPv6 header off and hands over what
//! follows, first of all an inner packet or a segment routing header.
//!
//! ```text
//! LocalSids::lookup   which SID; unknown ones are dropped
//! walk                extension headers to the SRH and behind it; the SRH is checked
//! HmacPolicy          the list is authentic, if that is asked for
//! behaviour           the path goes on: hop limit − 1, next segment     -> outer packet to the next segment or adjacency
//!                     it ends here:     decapsulate                     -> inner packet, for our device or a next hop
//!                                       an echo request                 -> its reply
//! ```
//!
//! [`decapsulate`] is the short way, for packets whose inner packet goes to our device; it refuses all others. [`advance`] is the long way
//! and knows them all. It also says which ICMPv6 error the RFCs want, so a packet that `decapsulate` refused is worth handing to it.
//!
//! Segment lists are source routing, so `advance` takes packets only from the segment routing domain and sends them on only inside it
//! (RFC 8754 §5.1, RFC 8402 §8.1). Every packet sent on has a smaller hop limit, so nothing circles for ever. Nothing is learnt from
//! packets and no state is kept. Rate limits of errors are the caller's, as is splitting super-packets before they go on.
//!
//! Not implemented: End.T, End.DX2 and the other layer-2 behaviours, End.B6 and End.BM, the REPLACE flavour of compressed SIDs.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use super::packet::HEADROOM;
use super::stats::DropReason;
use crate::addr::Ipv6Prefix;
use crate::wire::checksum::{Sum, pseudo_v6};
use crate::wire::icmp;
use crate::wire::ip::{Scope, V6_LEN, protocol, scope_v6};
use crate::wire::srv6::{
    Chain, HOP_LIMIT, HmacError, HmacKey, MAX_HEADER, OuterHeader, ROUTING_TYPE_AT, SEGMENTS_LEFT_AT, Srh,
    SrhAt, SrhError, WalkError, WalkFault, next_header, walk,
};

pub use self::node_sid::{NodeSid, NodeSidError};
use self::sid::Exit;
pub use self::sid::{Action, Behavior, Flavors, LocalSid, LocalSids, SidError};

mod node_sid;
mod sid;

const _: () = assert!(MAX_HEADER <= HEADROOM, "every header fits in front of a segment");

/// Extension headers looked through for an ICMPv6 error that must not be answered.
const MAX_EXTENSIONS: usize = 8;
/// ICMPv6 types, RFC 4443.
mod icmpv6 {
    pub(super) const PACKET_TOO_BIG: u8 = 2;
    pub(super) const TIME_EXCEEDED: u8 = 3;
    pub(super) const PARAMETER_PROBLEM: u8 = 4;
    pub(super) const ECHO_REQUEST: u8 = 128;
    pub(super) const ECHO_REPLY: u8 = 129;
    /// A redirect is no error by number, but may not be answered either.
    pub(super) const REDIRECT: u8 = 137;
    /// Length of the header of all of these.
    pub(super) const LEN: usize = 8;
}

/// Which packets need an HMAC: what Linux calls `seg6_require_hmac`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HmacCheck {
    /// None, and none is looked at; −1.
    Ignore,
    /// None, but one that is there must be right; 0.
    #[default]
    IfPresent,
    /// All: without SRH there is none. 1.
    Require,
}

/// What is asked of HMACs, and the keys.
#[derive(Clone, Debug, Default)]
pub struct HmacPolicy {
    check: HmacCheck,
    keys: BTreeMap<u32, HmacKey>,
}

impl HmacPolicy {
    /// A policy; of keys with one number the last is taken.
    pub fn new(check: HmacCheck, keys: impl IntoIterator<Item = HmacKey>) -> Self {
        Self {
            check,
            keys: keys.into_iter().map(|key| (key.id(), key)).collect(),
        }
    }

    #[inline]
    fn accept(
        &self,
        srh: Option<&Srh<'_>>,
        arrived: &Arrived<'_>,
        sids: &LocalSids,
    ) -> Result<(), DropReason> {
        match (self.check, srh) {
            (HmacCheck::Ignore, _) | (HmacCheck::IfPresent, None) => Ok(()),
            (HmacCheck::Require, None) => Err(DropReason::HmacMissing),
            (HmacCheck::IfPresent | HmacCheck::Require, Some(srh)) => {
                match srh.verify(arrived.source, |id| self.keys.get(&id)) {
                    Ok(()) => {}
                    Err(HmacError::Missing) if self.check == HmacCheck::IfPresent => return Ok(()),
                    Err(HmacError::Missing) => return Err(DropReason::HmacMissing),
                    Err(HmacError::UnknownKey) => return Err(DropReason::HmacUnknownKey),
                    Err(HmacError::Wrong) => return Err(DropReason::HmacWrong),
                }
                // RFC 8754 §2.1.2.1: the destination is the active segment. The first of a reduced list is not in it; Linux
                // sends such lists without the D bit. The bit itself is not signed, so it excuses nothing else.
                let listed = srh.segment(srh.segments_left());
                let changes = || !sids.is_whole(arrived.destination);
                if listed.is_none_or(|sid| sid == arrived.destination) || changes() {
                    Ok(())
                } else {
                    Err(DropReason::HmacWrong)
                }
            }
        }
    }
}

/// The segment routing domain: where packets may come from and go on to, beyond known peers.
#[derive(Clone, Debug, Default)]
pub struct Domain {
    /// The block of locators, and whatever else belongs to it.
    pub prefixes: Vec<Ipv6Prefix>,
    /// What is asked of HMACs in it.
    pub hmac: HmacPolicy,
}

impl Domain {
    /// Whether an address is inside.
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        scope_v6(address) == Scope::Routable && self.prefixes.iter().any(|prefix| prefix.contains(address))
    }
}

/// What to do with a packet, before it is done.
enum Step<'a> {
    /// The inner packet starts at that place and leaves there.
    Inner(usize, Exit),
    /// The next compressed SID of the same container.
    Shift(Ipv6Addr),
    /// The next segment of the list.
    Segment(SrhAt<'a>),
    /// ICMPv6 for the SID itself, at that place.
    Icmp(usize),
}

/// Where the inner packet starts in what followed the outer IPv6 header, if it goes to our device.
///
/// `protocol` is the first next header: 4, 41 or 43. That `source` belongs to the domain is for the caller to know; inner headers
/// are only as sound as their version.
///
/// # Errors
/// The packet is not for our device, or not at all; [`advance`] knows which.
#[inline]
pub fn decapsulate(
    protocol: u8,
    destination: Ipv6Addr,
    payload: &[u8],
    sids: &LocalSids,
    hmac: &HmacPolicy,
    source: Ipv6Addr,
) -> Result<usize, DropReason> {
    let sid = sids.lookup(destination).ok_or(DropReason::UnknownSid)?;
    let arrived = Arrived {
        source,
        destination,
        next_header: protocol,
        payload,
        // Nothing depends on these here.
        hop_limit: HOP_LIMIT,
        traffic_class: 0,
        flow_label: 0,
    };
    match step(sid, &arrived, sids, hmac).map_err(|refusal| refusal.reason)? {
        Step::Inner(at, Exit::Device) => Ok(at),
        Step::Inner(_, Exit::NextHop(_)) | Step::Icmp(_) => Err(DropReason::SidUpperLayer),
        Step::Shift(_) | Step::Segment(_) => Err(DropReason::SegmentsLeft),
    }
}

/// Decides about a packet, in the order of RFC 8986: routing header first, then what is behind it.
#[inline]
fn step<'a>(
    sid: &LocalSid,
    arrived: &Arrived<'a>,
    sids: &LocalSids,
    hmac: &HmacPolicy,
) -> Result<Step<'a>, Refusal> {
    let payload = arrived.payload;
    let chain = walk(arrived.next_header, payload).map_err(|error| refuse_chain(error, payload))?;
    hmac.accept(chain.srh.as_ref().map(|found| &found.srh), arrived, sids)?;
    // RFC 9800 §4.1.1: as long as there is an argument, the SRH is not touched.
    if let Some(next) = sid
        .csid_format()
        .and_then(|format| format.next(arrived.destination))
    {
        return Ok(Step::Shift(next));
    }
    if let Some(found) = chain.srh.filter(|found| found.srh.segments_left() > 0) {
        return if sid.is_transit() {
            Ok(Step::Segment(found))
        } else {
            // RFC 8986 §4.6 and the like, S03.
            let answer = erroneous_field(found.at + SEGMENTS_LEFT_AT);
            Err(Refusal::answered(DropReason::SegmentsLeft, answer))
        };
    }
    let Chain { upper, upper_at, .. } = chain;
    if let Some(exit) = sid.exit(upper) {
        return match (payload.get(upper_at).map(|first| first >> 4), upper) {
            (Some(4), next_header::IPV4) | (Some(6), next_header::IPV6) => Ok(Step::Inner(upper_at, exit)),
            (Some(_), _) => Err(DropReason::BadVersion.into()),
            (None, _) => Err(DropReason::Truncated.into()),
        };
    }
    let icmp_type = payload.get(upper_at).copied();
    if upper == protocol::ICMPV6 && icmp_type == Some(icmpv6::ECHO_REQUEST) {
        return Ok(Step::Icmp(upper_at));
    }
    // RFC 8986 §4.1.1.
    let answer = Answer::ParameterProblem {
        code: ProblemCode::UpperLayerHeader,
        pointer: pointer(upper_at),
    };
    Err(Refusal::answered(DropReason::SidUpperLayer, answer))
}

/// What the RFCs want said about a chain of headers that cannot be walked.
#[cold]
fn refuse_chain(error: WalkError, payload: &[u8]) -> Refusal {
    let at = error.at;
    // With no segment left, a routing header is to be skipped by those who do not know it: no error.
    let answered = |reason, field| match payload.get(at + SEGMENTS_LEFT_AT) {
        None | Some(0) => Refusal::from(reason),
        Some(_) => Refusal::answered(reason, erroneous_field(at + field)),
    };
    match error.fault {
        // RFC 8200 §4.4.
        WalkFault::Srh(SrhError::RoutingType) => answered(DropReason::RoutingType, ROUTING_TYPE_AT),
        // RFC 8754 §4.3.1.1, S09 and S10.
        WalkFault::Srh(SrhError::LastEntry) => answered(DropReason::BadLastEntry, SEGMENTS_LEFT_AT),
        WalkFault::Srh(SrhError::SegmentsLeft) => answered(DropReason::BadSegmentsLeft, SEGMENTS_LEFT_AT),
        WalkFault::Srh(SrhError::Truncated | SrhError::Length) => DropReason::BadRoutingHeader.into(),
        WalkFault::Srh(SrhError::Tlv) => DropReason::BadTlv.into(),
        WalkFault::Truncated | WalkFault::Order | WalkFault::TooMany => {
            DropReason::OuterExtensionHeaders.into()
        }
        WalkFault::Fragment => DropReason::OuterFragment.into(),
    }
}

/// A packet as it came to one of our SIDs.
#[derive(Clone, Copy, Debug)]
pub struct Arrived<'a> {
    /// Outer source.
    pub source: Ipv6Addr,
    /// Outer destination.
    pub destination: Ipv6Addr,
    /// Hop limit on the wire. Whoever has the packet from a kernel that forwarded it adds one.
    pub hop_limit: u8,
    /// Traffic class.
    pub traffic_class: u8,
    /// Flow label.
    pub flow_label: u32,
    /// What the payload starts with.
    pub next_header: u8,
    /// All that followed the outer header.
    pub payload: &'a [u8],
}

impl<'a> Arrived<'a> {
    /// A packet that came with its outer header.
    pub fn new(header: &OuterHeader, payload: &'a [u8]) -> Self {
        Self {
            source: header.source,
            destination: header.destination,
            hop_limit: header.hop_limit,
            traffic_class: header.traffic_class,
            flow_label: header.flow_label,
            next_header: header.next_header,
            payload,
        }
    }

    /// The outer header it came with, as far as forwarding has not changed it.
    fn header(&self) -> OuterHeader {
        OuterHeader {
            traffic_class: self.traffic_class,
            flow_label: self.flow_label,
            next_header: self.next_header,
            hop_limit: self.hop_limit,
            source: self.source,
            destination: self.destination,
        }
    }

    /// Whether RFC 4443 §2.4 (e) allows an error about it.
    fn may_answer(&self) -> bool {
        let routable = |address| scope_v6(address) == Scope::Routable;
        routable(self.source) && routable(self.destination) && !self.carries_icmp_error()
    }

    /// Whether it is an ICMPv6 error itself, behind whatever extension headers, sound or not.
    fn carries_icmp_error(&self) -> bool {
        let (mut next, mut rest) = (self.next_header, self.payload);
        for _ in 0..MAX_EXTENSIONS {
            match (next, rest) {
                (
                    next_header::HOP_BY_HOP | next_header::ROUTING | next_header::DESTINATION,
                    &[following, units, ..],
                ) => {
                    next = following;
                    rest = rest.get(8 + usize::from(units) * 8..).unwrap_or_default();
                }
                (protocol::ICMPV6, &[kind, ..]) => return kind < 128 || kind == icmpv6::REDIRECT,
                _ => return false,
            }
        }
        // Nobody can tell.
        true
    }
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The inner packet starts at `inner` in the payload and goes to our device, as [`decapsulate`] says.
    Inner {
        /// Where it starts.
        inner: usize,
    },
    /// The inner packet goes to a next hop, which is of its family, or an adjacent node's IPv6 address. Its TTL is as it came.
    NextHop {
        /// Where it starts.
        inner: usize,
        /// To whom.
        next_hop: IpAddr,
    },
    /// What was written, a whole IPv6 packet, is to be sent to this address, which need not be its destination.
    Send {
        /// To whom: a segment, an adjacent node, or who sent an echo request.
        to: Ipv6Addr,
    },
}

/// Why a packet goes no further, and what its sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Counted under this.
    pub reason: DropReason,
    /// The error for [`build_error`]; `None` if there is to be none.
    pub answer: Option<Answer>,
}

impl Refusal {
    fn answered(reason: DropReason, answer: Answer) -> Self {
        Self {
            reason,
            answer: Some(answer),
        }
    }
}

impl From<DropReason> for Refusal {
    fn from(reason: DropReason) -> Self {
        Self { reason, answer: None }
    }
}

/// An ICMPv6 error about an outer packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// RFC 4443 §3.4.
    ParameterProblem {
        /// What kind.
        code: ProblemCode,
        /// Where in the packet, from the front of the outer header.
        pointer: u32,
    },
    /// RFC 4443 §3.3: the hop limit ran out.
    TimeExceeded,
    /// RFC 4443 §3.2: larger than the path carries, which is that many bytes.
    TooBig(u32),
}

/// Codes of a parameter problem (IANA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemCode {
    /// A field is wrong.
    ErroneousField = 0,
    /// Nobody here takes this next header.
    NextHeader = 1,
    /// The SID does not take this upper-layer header, RFC 8754 §10.
    UpperLayerHeader = 4,
}

/// Does what the SID says with a packet of the domain; an outer packet to be sent replaces what is in `out`.
///
/// The outer source must be in the domain or known to `is_peer`; the next segment must be in the domain.
///
/// # Errors
/// The packet is to be dropped, and its sender perhaps told.
pub fn advance(
    arrived: &Arrived<'_>,
    sids: &LocalSids,
    domain: &Domain,
    is_peer: impl Fn(Ipv6Addr) -> bool,
    out: &mut Vec<u8>,
) -> Result<Verdict, Refusal> {
    out.clear();
    // Strangers are told nothing.
    let sid = sids.lookup(arrived.destination).ok_or(DropReason::UnknownSid)?;
    if !domain.contains(arrived.source) && !is_peer(arrived.source) {
        return Err(DropReason::OutsideDomain.into());
    }
    act(sid, arrived, sids, domain, out).map_err(|refusal| Refusal {
        reason: refusal.reason,
        answer: refusal.answer.filter(|_| arrived.may_answer()),
    })
}

fn act(
    sid: &LocalSid,
    arrived: &Arrived<'_>,
    sids: &LocalSids,
    domain: &Domain,
    out: &mut Vec<u8>,
) -> Result<Verdict, Refusal> {
    let onward = match step(sid, arrived, sids, &domain.hmac)? {
        Step::Inner(inner, Exit::Device) => return Ok(Verdict::Inner { inner }),
        Step::Inner(inner, Exit::NextHop(next_hop)) => return Ok(Verdict::NextHop { inner, next_hop }),
        Step::Icmp(at) => return reply(arrived, at, out),
        Step::Shift(next) => Onward { next, srh: None },
        Step::Segment(found) => {
            let left = found.srh.segments_left().saturating_sub(1);
            // At most the last entry: parsing saw to that.
            let next = found.srh.segment(left).ok_or(DropReason::BadSegmentsLeft)?;
            Onward {
                next,
                srh: Some((found, left)),
            }
        }
    };
    let hop_limit = match arrived.hop_limit.checked_sub(1) {
        Some(left @ 1..) => left,
        _ => {
            return Err(Refusal::answered(DropReason::SidHopLimit, Answer::TimeExceeded));
        }
    };
    if !domain.contains(onward.next) {
        return Err(DropReason::SegmentOutsideDomain.into());
    }
    let header = OuterHeader {
        hop_limit,
        destination: onward.next,
        ..arrived.header()
    };
    onward.write(header, arrived.payload, sid.flavors().psp, out)?;
    let to = sid.adjacency().unwrap_or(onward.next);
    Ok(Verdict::Send { to })
}

/// The next part of a path: its segment, and with it the SRH and what is left of it, if that changes.
struct Onward<'a> {
    next: Ipv6Addr,
    srh: Option<(SrhAt<'a>, u8)>,
}

impl Onward<'_> {
    fn write(
        &self,
        mut header: OuterHeader,
        payload: &[u8],
        psp: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), DropReason> {
        let len = |payload: usize| u16::try_from(payload).map_err(|_| DropReason::BadLength);
        let set = |out: &mut Vec<u8>, at: usize, value| {
            if let Some(byte) = out.get_mut(V6_LEN + at) {
                *byte = value;
            }
        };
        match self.srh {
            // RFC 8986 §4.16.1: the last but one takes the SRH off.
            Some((found, 0)) if psp => {
                let (before, srh) = payload
                    .split_at_checked(found.at)
                    .ok_or(DropReason::BadRoutingHeader)?;
                let after = srh.get(found.srh.len()..).ok_or(DropReason::BadRoutingHeader)?;
                if found.named_at.is_none() {
                    header.next_header = found.srh.next_header();
                }
                out.extend_from_slice(&header.emit(len(before.len() + after.len())?));
                out.extend_from_slice(before);
                out.extend_from_slice(after);
                if let Some(at) = found.named_at {
                    set(out, at, found.srh.next_header());
                }
            }
            Some((found, left)) => {
                out.extend_from_slice(&header.emit(len(payload.len())?));
                out.extend_from_slice(payload);
                set(out, found.at + SEGMENTS_LEFT_AT, left);
            }
            None => {
                out.extend_from_slice(&header.emit(len(payload.len())?));
                out.extend_from_slice(payload);
            }
        }
        Ok(())
    }
}

/// Answers an echo request to a SID, RFC 9259 §3.1.
fn reply(arrived: &Arrived<'_>, at: usize, out: &mut Vec<u8>) -> Result<Verdict, Refusal> {
    let request = arrived.payload.get(at..).unwrap_or_default();
    let sum = pseudo_v6(
        arrived.source,
        arrived.destination,
        protocol::ICMPV6,
        request.len(),
    ) + Sum::of(request);
    let (Some((_, rest)), 0xffff) = (request.split_first_chunk::<4>(), sum.fold()) else {
        return Err(DropReason::BadEcho.into());
    };
    let len = u16::try_from(request.len()).map_err(|_| DropReason::BadLength)?;
    let header = OuterHeader {
        traffic_class: 0,
        flow_label: 0,
        next_header: protocol::ICMPV6,
        hop_limit: HOP_LIMIT,
        source: arrived.destination,
        destination: arrived.source,
    };
    out.extend_from_slice(&header.emit(len));
    out.extend_from_slice(&[icmpv6::ECHO_REPLY, 0, 0, 0]);
    out.extend_from_slice(rest);
    finish_icmp(&header, out);
    Ok(Verdict::Send { to: arrived.source })
}

/// Writes the error about a packet into `out`, from `source`, an address of ours; it replaces what is there.
///
/// It quotes the packet as it came, without the headers that the kernel has taken off, as far as 1280 bytes hold it (RFC 4443 §2.4 c).
pub fn build_error(arrived: &Arrived<'_>, answer: Answer, source: Ipv6Addr, out: &mut Vec<u8>) {
    out.clear();
    let (kind, code, argument) = match answer {
        Answer::ParameterProblem { code, pointer } => (icmpv6::PARAMETER_PROBLEM, code as u8, pointer),
        Answer::TimeExceeded => (icmpv6::TIME_EXCEEDED, 0, 0),
        Answer::TooBig(mtu) => (icmpv6::PACKET_TOO_BIG, 0, mtu),
    };
    let room = icmp::MAX_LEN - V6_LEN - icmpv6::LEN - V6_LEN;
    let quoted = &arrived.payload[..arrived.payload.len().min(room)];
    let header = OuterHeader {
        traffic_class: 0,
        flow_label: 0,
        next_header: protocol::ICMPV6,
        hop_limit: HOP_LIMIT,
        source,
        destination: arrived.source,
    };
    // At most 1240.
    let len = icmpv6::LEN + V6_LEN + quoted.len();
    out.extend_from_slice(&header.emit(len as u16));
    out.extend_from_slice(&[kind, code, 0, 0]);
    out.extend_from_slice(&argument.to_be_bytes());
    let quoted_len = u16::try_from(arrived.payload.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&arrived.header().emit(quoted_len));
    out.extend_from_slice(quoted);
    finish_icmp(&header, out);
}

/// Fills in the checksum of the ICMPv6 message behind the header; its field is 0.
fn finish_icmp(header: &OuterHeader, packet: &mut [u8]) {
    let Some((_, message)) = packet.split_at_mut_checked(V6_LEN) else {
        return;
    };
    let pseudo = pseudo_v6(header.source, header.destination, protocol::ICMPV6, message.len());
    let checksum = (pseudo + Sum::of(message)).finish();
    if let [_, _, c0, c1, ..] = message {
        [*c0, *c1] = checksum.to_be_bytes();
    }
}

/// A field of the payload is wrong.
fn erroneous_field(at: usize) -> Answer {
    Answer::ParameterProblem {
        code: ProblemCode::ErroneousField,
        pointer: pointer(at),
    }
}

/// A place in the payload, from the front of the outer header; the payload has at most 64 KB.
fn pointer(at: usize) -> u32 {
    u32::try_from(V6_LEN + at).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
