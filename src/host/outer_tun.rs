//! The SRv6 underlay where raw sockets cannot be had: a TUN device the node's locators are routed to.
//!
//! # Theory of operation
//!
//! To the kernel our locators are somewhere behind the device, so it forwards packets to our SIDs into it as they are, routing header and
//! all, and looks at nothing behind the outer header. Outer packets we write to the device it forwards to the underlay.
//!
//! ```text
//! underlay ─▶ kernel forwards ─▶ device ─┬─ to a SID that ends in our inner device, none left ─▶ this queue
//!                                        └─ to another of our SIDs, or wrong ─▶ SidWorker ─┐
//! underlay ◀─ kernel forwards ◀─ device ◀─ this queue                                      │
//!                                   ▲──────────────────────────────────────────────────────┘
//! ```
//!
//! It takes CAP_NET_ADMIN and `/dev/net/tun`, which the inner device takes anyway, and costs:
//!
//! - a system call a packet, each way, and what the link has merged is cut again before it comes here;
//! - a hop each way, as at every router. [`SidWorker`] makes up for both, so a waypoint costs the one it costs anyway;
//! - reassembly: fragments of outer packets are dropped and counted;
//! - forwarding of IPv6, which [`sysctl::forward_ipv6`](crate::host::sysctl::forward_ipv6) switches on;
//! - the choice of next hop: SIDs with one of their own (End.X, End.DX4, End.DX6) need raw sockets unless it is where the packet goes.
//!
//! The kernel's tunnels and its own segment routing are never asked, as the packets are not to this host.
//!
//! What the kernel says of a path's MTU comes here too, since our source address is a SID: [`PathMtus`] remembers it.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::iter::once;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::addr::Mtu;
use crate::dataplane::datagram::{DATAGRAM_SLOTS, DatagramBatch, Envelope};
use crate::dataplane::endpoint::{Arrived, LocalSids};
use crate::dataplane::packet::{PacketBatch, RunLimits, SendPlan};
use crate::dataplane::stats::{Call, Calls, Count, DropReason, WorkerStats};
use crate::dataplane::{SendFailure, Underlay};
use crate::host::endpoint::SidWorker;
use crate::host::socket::classify;
use crate::host::sys;
use crate::wire::ip::{Ecn, Scope, V6_LEN, protocol, scope_v6};
use crate::wire::srv6::{OuterHeader, next_header, walk};

/// Appended to the inner device's name.
const SUFFIX: &str = "-srv6";
/// Longest name of an interface, bytes: IFNAMSIZ less the final NUL.
const MAX_NAME: usize = 15;
/// MTU of the device, the largest there is: no packet the underlay carries is too big for it.
pub const MTU_BYTES: u32 = 65_535;
/// Packets the device holds for us: of 1,500 bytes, 10 ms at 10 Gbit/s, about what a socket's receive buffer holds.
pub const QUEUE_LEN: u32 = 8192;
/// Longest run of a plan: there is nothing to gain from runs but fewer of them.
const MAX_SEGMENTS: usize = 64;
/// What stands behind the outer headers is no shorter than an IPv4 header.
const SHORTEST: usize = 20;

/// The name of the device beside inner device `device`: `<device>-srv6`, with as much of it as fits.
pub fn name(device: &str) -> String {
    let room = MAX_NAME - SUFFIX.len();
    let end = device.char_indices().map(|(at, c)| at + c.len_utf8());
    let end = end.take_while(|&end| end <= room).last().unwrap_or(0);
    format!("{}{SUFFIX}", device.get(..end).unwrap_or_default())
}

/// The device's descriptor, and on the receiving side what deals with packets that are not the queue's.
pub struct OuterTun {
    device: OwnedFd,
    receiver: Option<Receiver>,
    /// A packet that lies in pieces.
    whole: Vec<u8>,
}

struct Receiver {
    sids: Arc<LocalSids>,
    /// Those that end in the inner device.
    ends: Vec<Ipv6Addr>,
    others: SidWorker,
    paths: PathMtus,
    scratch: sys::ReadScratch,
    calls: Calls,
}

/// Whose a packet is.
#[derive(Debug, PartialEq, Eq)]
enum Owner {
    /// The queue's.
    Queue,
    /// Something else to our locators.
    Others,
    /// What a router says of a path's MTU.
    TooBig(Ipv6Addr, Mtu),
    /// Nobody's: of the kernel's own making.
    Nobody(DropReason),
}

impl OuterTun {
    /// Makes the device; address, MTU and routes are others' work. It goes with the last descriptor.
    ///
    /// # Errors
    /// The kernel's; EBUSY if another process has it.
    pub fn create(name: &str) -> io::Result<OwnedFd> {
        sys::tun_open(name, libc::IFF_TUN | libc::IFF_NO_PI)
    }

    /// The receiving side; packets that are not the queue's go to `others`.
    pub fn new(device: OwnedFd, sids: Arc<LocalSids>, others: SidWorker, paths: PathMtus) -> Self {
        let ends = sids.ends().collect();
        Self {
            device,
            receiver: Some(Receiver {
                sids,
                ends,
                others,
                paths,
                scratch: sys::ReadScratch::default(),
                calls: Calls::default(),
            }),
            whole: Vec::new(),
        }
    }

    /// One that only sends.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            device: self.device.try_clone()?,
            receiver: None,
            whole: Vec::new(),
        })
    }

    /// What to wait for before receiving.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl Receiver {
    fn owner(&self, header: &OuterHeader, payload: &[u8]) -> Owner {
        if scope_v6(header.destination) != Scope::Routable {
            // Multicast reports and the like.
            return Owner::Nobody(DropReason::NotUnicast);
        }
        if self.sids.locator(header.destination).is_none() {
            return Owner::Nobody(DropReason::UnknownSid);
        }
        if !self.ends.contains(&header.destination) {
            return Owner::Others;
        }
        if let Some((to, mtu)) = too_big(header, payload) {
            return Owner::TooBig(to, mtu);
        }
        let ends_here = walk(header.next_header, payload).is_ok_and(|chain| {
            matches!(chain.upper, next_header::IPV4 | next_header::IPV6)
                && chain.srh.is_none_or(|found| found.srh.segments_left() == 0)
                && payload.len().saturating_sub(chain.upper_at) >= SHORTEST
        });
        if ends_here { Owner::Queue } else { Owner::Others }
    }
}

impl Underlay for OuterTun {
    fn recv(&mut self, batch: &mut DatagramBatch) -> io::Result<()> {
        let Some(receiver) = &mut self.receiver else {
            return Ok(());
        };
        // Bounded, so that a flood for the others does not starve the queue's other direction.
        for _ in 0..DATAGRAM_SLOTS {
            let Some(slot) = batch.slots().next() else { break };
            let mut front = [0; V6_LEN];
            let room = once((0, slot.len()));
            let device = self.device.as_fd();
            receiver.calls.note(Call::Readv);
            let read = match sys::read_scattered(device, &mut front, slot, room, &mut receiver.scratch) {
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The device is down (EIO): nothing comes until it is up again.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) => return Err(error),
            };
            let rest = slot.get(..read.saturating_sub(V6_LEN)).unwrap_or_default();
            let Ok((header, payload)) = OuterHeader::parse_apart(&front, rest) else {
                // The kernel checks before it forwards; what it makes itself is sound.
                receiver.others.stats().discard(DropReason::BadVersion, 1);
                continue;
            };
            match receiver.owner(&header, payload) {
                Owner::Queue => {
                    let len = payload.len();
                    batch.commit(envelope(&header), len, None);
                }
                Owner::Others => receiver.others.take(&Arrived {
                    // As it was on the wire.
                    hop_limit: header.hop_limit.saturating_add(1),
                    ..Arrived::new(&header, payload)
                }),
                Owner::TooBig(to, mtu) => {
                    if receiver.others.knows(to) {
                        receiver.paths.learn(to, mtu, now());
                        receiver.others.stats().count(Count::PathTooBig, 1);
                    } else {
                        receiver.others.stats().discard(DropReason::OutsideDomain, 1);
                    }
                }
                Owner::Nobody(reason) => receiver.others.stats().discard(reason, 1),
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        plan: &SendPlan,
        batch: &PacketBatch,
        stats: &WorkerStats,
        failures: &mut Vec<SendFailure>,
    ) -> io::Result<()> {
        for (index, run) in plan.runs().iter().enumerate() {
            for segment in 0..run.segments {
                let mut slices = plan.slices(run, batch, segment, 1);
                let packet = match (slices.next(), slices.next()) {
                    (Some(only), None) => only,
                    (first, second) => {
                        self.whole.clear();
                        for piece in first.into_iter().chain(second).chain(slices) {
                            self.whole.extend_from_slice(piece);
                        }
                        &self.whole
                    }
                };
                stats.called(Call::Writev);
                let Err(error) = sys::write_pieces(self.device.as_fd(), &[IoSlice::new(packet)]) else {
                    continue;
                };
                // The device is gone and must be made anew.
                if matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF)) {
                    return Err(error);
                }
                failures.push(SendFailure {
                    run: index,
                    segments: 1,
                    error: classify(&error),
                });
            }
        }
        Ok(())
    }

    fn limits(&self, _to: SocketAddr) -> RunLimits {
        RunLimits {
            segments: MAX_SEGMENTS,
            bytes: usize::MAX / 2,
        }
    }

    fn source_ports(&self) -> usize {
        1
    }

    fn settle(&mut self, stats: &WorkerStats) {
        if let Some(receiver) = &mut self.receiver {
            receiver.calls.settle(stats);
        }
    }
}

fn envelope(header: &OuterHeader) -> Envelope {
    Envelope {
        // The kernel does not say.
        interface: 0,
        from: SocketAddr::from((header.source, 0)),
        to: header.destination,
        protocol: header.next_header,
        hop_limit: header.hop_limit,
        flow_info: u32::from(header.traffic_class) << 20 | header.flow_label,
        ecn: Ecn::of(header.traffic_class),
    }
}

/// The peer and the MTU in a "packet too big" about a packet that the addressed node itself has sent, RFC 4443 §3.2.
fn too_big(header: &OuterHeader, payload: &[u8]) -> Option<(Ipv6Addr, Mtu)> {
    const TOO_BIG: u8 = 2;
    if header.next_header != protocol::ICMPV6 {
        return None;
    }
    let &[TOO_BIG, 0, _, _, m0, m1, m2, m3, ref quoted @ ..] = payload else {
        return None;
    };
    // Cut short, as quoted packets are.
    let (quoted, _) = quoted.split_first_chunk::<V6_LEN>()?;
    let addr = |from: usize| {
        <[u8; 16]>::try_from(quoted.get(from..from + 16)?)
            .ok()
            .map(Ipv6Addr::from)
    };
    let (source, destination) = (addr(8)?, addr(24)?);
    let mtu = u32::from_be_bytes([m0, m1, m2, m3]).clamp(V6_LEAST_MTU, u32::from(u16::MAX));
    let mtu = Mtu::new(mtu).ok()?;
    (source == header.destination && quoted.first()? >> 4 == 6).then_some((destination, mtu))
}

/// RFC 8200 §5: no link carries less, whatever somebody says.
const V6_LEAST_MTU: u32 = 1280;

/// What routers have said of the MTU of paths, which the kernel never hears: it is said to SIDs.
///
/// As in the kernel it is forgotten after ten minutes (RFC 8201 §5.2), so that paths may widen again, and hearing more than is known says
/// nothing. It is learnt of 8192 paths at most: quoted addresses may be made up.
#[derive(Clone, Debug, Default)]
pub struct PathMtus(Arc<Mutex<BTreeMap<Ipv6Addr, (Mtu, Instant)>>>);

/// As many as a large network has nodes, a few hundred KiB.
const MAX_PATHS: usize = 8192;
/// How long a path's MTU is remembered.
const REMEMBERED: Duration = Duration::from_secs(600);

impl PathMtus {
    fn learn(&self, to: Ipv6Addr, mtu: Mtu, now: Instant) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_PATHS && !known.contains_key(&to) {
            known.retain(|_, (_, learnt)| now < *learnt + REMEMBERED);
            if known.len() >= MAX_PATHS {
                return;
            }
        }
        let held = known.entry(to).or_insert((mtu, now));
        if mtu <= held.0 || now >= held.1 + REMEMBERED {
            *held = (mtu, now);
        }
    }

    /// What is known of the path to `to`.
    pub fn get(&self, to: IpAddr, now: Instant) -> Option<Mtu> {
        let IpAddr::V6(to) = to else { return None };
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let &(mtu, learnt) = known.get(&to)?;
        (now < learnt + REMEMBERED).then_some(mtu)
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a shell: what is known of paths goes by the clock"
)]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_fits_whatever_the_inner_devices_is() {
        for (device, expected) in [
            ("flannel0", "flannel0-srv6"),
            ("flannel.12", "flannel.12-srv6"),
            ("flannel.123", "flannel.12-srv6"),
            ("a-very-long-one", "a-very-lon-srv6"),
            ("tünnelgerät12", "tünnelger-srv6"),
        ] {
            assert_eq!(name(device), expected);
            assert!(expected.len() <= MAX_NAME);
        }
    }

    const SELF: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 0xc000, 0x201, 0, 0, 1);
    const PEER: Ipv6Addr = Ipv6Addr::new(0xfd12, 0x3456, 0x789a, 0xc000, 0x202, 0, 0, 1);

    fn too_big_about(source: Ipv6Addr, mtu: u32) -> (OuterHeader, Vec<u8>) {
        let quoted = OuterHeader {
            traffic_class: 0,
            flow_label: 1,
            next_header: next_header::IPV4,
            hop_limit: 60,
            source,
            destination: PEER,
        };
        let mut payload = vec![2, 0, 0xab, 0xcd];
        payload.extend(mtu.to_be_bytes());
        payload.extend(quoted.emit(1400));
        payload.extend([0x45; 20]);
        let header = OuterHeader {
            next_header: protocol::ICMPV6,
            source: "2001:db8::1".parse().unwrap(),
            destination: SELF,
            ..quoted
        };
        (header, payload)
    }

    #[test]
    fn too_big_is_believed_about_our_own_packets_and_down_to_1280() {
        let mtu = |bytes| Mtu::new(bytes).unwrap();
        for (source, said, learnt) in [
            (SELF, 1400, Some((PEER, mtu(1400)))),
            (SELF, 500, Some((PEER, mtu(1280)))),
            (SELF, u32::MAX, Some((PEER, mtu(65_535)))),
            (PEER, 1400, None),
        ] {
            let (header, payload) = too_big_about(source, said);
            assert_eq!(too_big(&header, &payload), learnt, "{source}, {said}");
        }
        let (header, mut payload) = too_big_about(SELF, 1400);
        for len in 0..8 + V6_LEN {
            assert_eq!(too_big(&header, &payload[..len]), None, "{len} bytes");
        }
        payload[0] = 1;
        assert_eq!(too_big(&header, &payload), None, "unreachable");
    }

    #[test]
    fn a_paths_mtu_only_falls_until_it_is_forgotten() {
        let (paths, start) = (PathMtus::default(), now());
        let mtu = |bytes| Mtu::new(bytes).unwrap();
        let known = |now| paths.get(PEER.into(), now);
        assert_eq!(known(start), None);
        paths.learn(PEER, mtu(1400), start);
        paths.learn(PEER, mtu(1450), start);
        assert_eq!(known(start), Some(mtu(1400)));
        let later = start + REMEMBERED;
        assert_eq!(known(later), None);
        paths.learn(PEER, mtu(1450), later);
        assert_eq!(known(later), Some(mtu(1450)));
        for n in 0..2 * MAX_PATHS as u128 {
            paths.learn(n.into(), mtu(1300), later);
        }
        assert_eq!(paths.0.lock().unwrap().len(), MAX_PATHS);
        assert_eq!(
            known(later),
            Some(mtu(1450)),
            "the made-up do not drive out the true"
        );
    }
}
