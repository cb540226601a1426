//! Doing what SIDs say with packets that do not end in our device: waypoints, next hops, pings and everything wrong.
//!
//! What to do is [`dataplane::endpoint`](crate::dataplane::endpoint)'s to say; here are sockets, buffers and the clock. [`SidWorker`] does it,
//! whoever receives the packets. With raw sockets that is [`Endpoint`], a thread of its own, so that a node that is nobody's waypoint pays
//! nothing for it, and a flood of wrong packets takes no turn from a queue. An [`OuterTun`](crate::host::outer_tun::OuterTun) has one descriptor
//! for all, and its reader hands on what is not the queue's.

use std::io::{self, IoSlice, PipeReader, PipeWriter};
use std::iter::once;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use socket2::{Domain as SocketDomain, Protocol, Socket, Type};

use crate::addr::Mtu;
use crate::dataplane::SendError;
use crate::dataplane::datagram::{DATAGRAM_SLOTS, Datagram, DatagramBatch};
use crate::dataplane::endpoint::{
    Answer, Arrived, Domain, LocalSids, Refusal, Verdict, advance, build_error,
};
use crate::dataplane::limiter::ErrorLimiter;
use crate::dataplane::route::{Hop, SharedRoutes};
use crate::dataplane::stats::{Call, Count, DropReason, WorkerStats};
use crate::dataplane::transit::{Fitted, fit, fit_outer};
use crate::host::handover::Bundle;
use crate::host::pulse::Pulse;
use crate::host::raw::{
    Audience, LOOPBACK, PROTOCOLS, RawError, RawOptions, SID_KINDS, clear_errors, receiver, sender,
};
use crate::host::sandbox::{self, Role};
use crate::host::socket::{WAIT_MS, WAIT_TRIES, classify, path_mtu};
use crate::host::sys::{self, MessageTo, RecvScratch, SendScratch};
use crate::wire::ip::{IpHeader, Scope, V4_LEN, decrement_ttl, scope};

/// The thread sleeps until something comes: it holds no route snapshot.
const FOREVER_MS: i32 = -1;
/// Packets taken from one socket at a time: one that is flooded leaves room for the others.
const SLOTS: usize = DATAGRAM_SLOTS / PROTOCOLS.len();
/// Batches between two looks at whether to stop.
const TURNS: usize = 64;

/// What a node's SIDs are.
#[derive(Clone, Debug)]
pub struct SidOptions {
    /// The SIDs.
    pub sids: Arc<LocalSids>,
    /// Where packets may come from and go to.
    pub domain: Domain,
    /// MTU of the underlay interface.
    pub link_mtu: Mtu,
}

/// The running thread; dropping stops it.
pub struct Endpoint {
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
    stats: Arc<WorkerStats>,
    pulse: Arc<Pulse>,
}

impl Endpoint {
    /// Opens the sockets that are not given and starts the thread. Second descriptors of all go into `held`.
    ///
    /// # Errors
    /// The sockets cannot be had, or there are no threads left.
    pub fn start<H: Hop>(
        raw: &RawOptions,
        options: SidOptions,
        routes: &SharedRoutes<H>,
        given: [Option<OwnedFd>; PROTOCOLS.len()],
        held: &mut Bundle,
    ) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let stats = Arc::<WorkerStats>::default();
        let out = Outlet::raw(raw.source, Arc::clone(&stats)).map_err(io::Error::other)?;
        let sids = SidWorker::new(options, routes, out);
        let mut worker = Receiver::open(raw, sids, given).map_err(io::Error::other)?;
        for ((socket, ..), kind) in worker.recv.iter().zip(SID_KINDS) {
            held.insert(kind, 0, socket.as_fd().try_clone_to_owned()?);
        }
        let pulse = Pulse::new("endpoint", Vec::new());
        let living = pulse.living();
        let thread = std::thread::Builder::new()
            .name("endpoint".to_owned())
            .spawn(move || {
                let _living = living;
                match sandbox::enter_thread(Role::Sids) {
                    Ok(()) => worker.run(&stopped),
                    Err(error) => {
                        tracing::error!(%error, "the endpoint thread ends: it cannot enter the sandbox")
                    }
                }
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
            stats,
            pulse,
        })
    }

    /// Its counters.
    pub fn stats(&self) -> &Arc<WorkerStats> {
        &self.stats
    }

    /// Its sign of life.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Closing the pipe wakes it.
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// Receives for the thread.
struct Receiver {
    /// Number of the underlay's interface.
    interface: u32,
    recv: Vec<(Socket, u8, RecvScratch)>,
    batch: DatagramBatch,
    sids: SidWorker,
}

impl Receiver {
    fn open(
        options: &RawOptions,
        sids: SidWorker,
        given: [Option<OwnedFd>; PROTOCOLS.len()],
    ) -> Result<Self, RawError> {
        let recv = PROTOCOLS
            .into_iter()
            .zip(given)
            .map(|(protocol, given)| {
                let socket = receiver(options, protocol, Audience::Endpoint, given)?;
                Ok((socket, protocol, RecvScratch::default()))
            })
            .collect::<Result<_, RawError>>()?;
        Ok(Self {
            // The sockets would not have been opened without it.
            interface: options.interface().unwrap_or_default(),
            recv,
            batch: DatagramBatch::new(),
            sids,
        })
    }

    fn run(&mut self, stopped: &PipeReader) {
        loop {
            let sockets = self.recv.iter().map(|(socket, ..)| socket.as_fd());
            self.sids.stats().called(Call::Poll);
            match sys::wait_readable(once(stopped.as_fd()).chain(sockets), FOREVER_MS) {
                Ok(ready) if ready.first() => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(%error, "the endpoint thread ends: its sockets are beyond use");
                    return;
                }
            }
            // A flood must not keep it from being told to stop.
            for _ in 0..TURNS {
                if !self.turn() {
                    break;
                }
            }
        }
    }

    /// Deals with a batch; whether there was one.
    fn turn(&mut self) -> bool {
        self.batch.clear();
        for (socket, protocol, scratch) in &mut self.recv {
            self.sids.stats().called(Call::Recvmmsg);
            let received = sys::recv_datagrams((socket.as_fd(), *protocol), &mut self.batch, scratch, SLOTS);
            match received {
                // A packet too big, about any stop of a path: the next send to the first may well succeed.
                Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                    self.sids.stats().count(Count::PathTooBig, 1);
                }
                // The interface may be gone for the moment; it comes back, or the daemon makes all this anew.
                Ok(_) | Err(_) => {}
            }
            clear_errors(socket);
        }
        let stats = self.sids.stats();
        stats.count(Count::ReceiveOverflows, self.batch.overflows());
        stats.discard(DropReason::DatagramCut, self.batch.cut());
        for index in 0..self.batch.datagrams().len() {
            let datagram = self.batch.datagrams()[index];
            if !datagram.is_cut {
                self.take(datagram);
            }
        }
        !self.batch.is_empty()
    }

    fn take(&mut self, datagram: Datagram) {
        let SocketAddr::V6(from) = datagram.envelope.from else {
            return;
        };
        let start = DatagramBatch::start(datagram);
        let envelope = datagram.envelope;
        if ![self.interface, LOOPBACK].contains(&envelope.interface) {
            // Not from the underlay, whatever its source says: a container's, say.
            self.sids.stats().discard(DropReason::OutsideDomain, 1);
            return;
        }
        self.sids.take(&Arrived {
            source: *from.ip(),
            destination: envelope.to,
            hop_limit: envelope.hop_limit,
            traffic_class: (envelope.flow_info >> 20) as u8,
            flow_label: envelope.flow_info & 0xf_ffff,
            next_header: envelope.protocol,
            payload: self
                .batch
                .bytes()
                .get(start..start + datagram.len)
                .unwrap_or_default(),
        });
    }
}

/// Does what SIDs say, for whoever receives the packets.
pub struct SidWorker {
    options: SidOptions,
    is_peer: Box<dyn Fn(Ipv6Addr) -> bool + Send>,
    out: Outlet,
    limiter: ErrorLimiter,
    packet: Vec<u8>,
    answer: Vec<u8>,
}

impl SidWorker {
    /// One that knows the peers by `routes` and sends through `out`.
    pub fn new<H: Hop>(options: SidOptions, routes: &SharedRoutes<H>, out: Outlet) -> Self {
        let routes = routes.clone();
        Self {
            options,
            // Without a reader no old snapshot is held while nothing comes.
            is_peer: Box::new(move |addr| routes.current().source(addr.into()).is_some()),
            out,
            limiter: ErrorLimiter::new(now(), rand::random()),
            packet: Vec::new(),
            answer: Vec::new(),
        }
    }

    /// Its counters.
    pub fn stats(&self) -> &Arc<WorkerStats> {
        &self.out.stats
    }

    /// Whether an address is in the domain or a peer's.
    pub fn knows(&self, addr: Ipv6Addr) -> bool {
        self.options.domain.contains(addr) || (self.is_peer)(addr)
    }

    /// Deals with a packet to one of our locators.
    pub fn take(&mut self, arrived: &Arrived<'_>) {
        let SidOptions {
            sids,
            domain,
            link_mtu,
        } = &self.options;
        let link_mtu = *link_mtu;
        let stats = Arc::clone(&self.out.stats);
        let sent = match advance(arrived, sids, domain, &self.is_peer, &mut self.packet) {
            Ok(Verdict::Send { to }) => {
                let is_reply = to == arrived.source;
                let sent = self.out.outer(&mut self.packet, to, link_mtu);
                let count = if is_reply {
                    Count::SegmentEchoes
                } else {
                    Count::SegmentsForwarded
                };
                stats.count(count, u64::from(sent.is_ok()));
                sent
            }
            Ok(Verdict::NextHop { inner, next_hop }) => {
                self.packet.clear();
                self.packet
                    .extend_from_slice(arrived.payload.get(inner..).unwrap_or_default());
                let sent = self.out.inner(&mut self.packet, next_hop, link_mtu);
                stats.count(Count::SegmentsForwarded, u64::from(sent.is_ok()));
                sent
            }
            // The queues' filters let all of these through but for what is too short to be one, and what has arguments to its SID.
            Ok(Verdict::Inner { inner }) if arrived.payload.len() - inner < V4_LEN => {
                Err(DropReason::Truncated.into())
            }
            Ok(Verdict::Inner { .. }) => Err(DropReason::SidUpperLayer.into()),
            Err(refusal) => Err(refusal),
        };
        let Err(refusal) = sent else { return };
        stats.discard(refusal.reason, 1);
        let Some(answer) = refusal.answer else { return };
        if !self.limiter.allows(arrived.source.into(), now()) {
            stats.count(Count::IcmpLimited, 1);
            return;
        }
        build_error(arrived, answer, arrived.destination, &mut self.answer);
        if self.out.send_v6(&[&self.answer], arrived.source).is_ok() {
            stats.count(Count::IcmpSent, 1);
        }
    }
}

/// Where packets leave.
pub struct Outlet {
    v6: Exit,
    /// For inner packets of End.DX4; none on a host without IPv4.
    v4: Option<Socket>,
    scratch: SendScratch,
    spread: Vec<u8>,
    stats: Arc<WorkerStats>,
}

/// How IPv6 packets leave.
enum Exit {
    /// By a raw socket.
    Raw(Socket),
    /// By a TUN device, out of which the kernel forwards them by their destinations; to anybody else by a raw socket, if that can be had.
    Tun(OwnedFd, Option<Socket>, Arc<LocalSids>),
}

impl Outlet {
    /// One of raw sockets.
    ///
    /// # Errors
    /// There are none.
    pub fn raw(source: Ipv6Addr, stats: Arc<WorkerStats>) -> Result<Self, RawError> {
        Ok(Self::of(Exit::Raw(sender(source)?), stats))
    }

    /// One of a TUN device.
    pub fn tun(device: OwnedFd, sids: Arc<LocalSids>, source: Ipv6Addr, stats: Arc<WorkerStats>) -> Self {
        Self::of(Exit::Tun(device, sender(source).ok(), sids), stats)
    }

    /// Whether packets can be sent to others than those they are destined to.
    pub fn reaches_next_hops(&self) -> bool {
        match &self.v6 {
            Exit::Raw(_) => true,
            Exit::Tun(_, socket, _) => socket.is_some(),
        }
    }

    fn of(v6: Exit, stats: Arc<WorkerStats>) -> Self {
        let raw = Protocol::from(libc::IPPROTO_RAW);
        Self {
            v6,
            v4: Socket::new(SocketDomain::IPV4, Type::RAW.nonblocking().cloexec(), Some(raw)).ok(),
            scratch: SendScratch::default(),
            spread: Vec::new(),
            stats,
        }
    }

    /// Sends an outer packet to a segment or an adjacent node.
    fn outer(&mut self, packet: &mut [u8], to: Ipv6Addr, mtu: Mtu) -> Result<(), Refusal> {
        let mut spread = std::mem::take(&mut self.spread);
        let sent = match fit_outer(packet, mtu, &mut spread) {
            Fitted::Whole => self.send_v6(&[packet], to),
            Fitted::Segments(len) => self.send_v6(&spread.chunks(len).collect::<Vec<_>>(), to),
        };
        self.spread = spread;
        sent.map_err(|error| refusal(error, to.into(), mtu))
    }

    /// Sends an inner packet to a next hop; a router does that, so it takes one from the TTL.
    fn inner(&mut self, packet: &mut [u8], next_hop: IpAddr, mtu: Mtu) -> Result<(), Refusal> {
        let ip = IpHeader::parse(packet).map_err(DropReason::from)?;
        if (scope(ip.addrs.src()), scope(ip.addrs.dst())) != (Scope::Routable, Scope::Routable) {
            return Err(DropReason::MartianSource.into());
        }
        if decrement_ttl(packet).is_none() {
            return Err(DropReason::TtlExpired.into());
        }
        let packet = packet.get_mut(..ip.total_len).ok_or(DropReason::BadLength)?;
        let mut spread = std::mem::take(&mut self.spread);
        let fitted = fit(packet, 0, mtu, &mut spread);
        let whole: [&[u8]; 1] = [packet];
        let segments: Vec<&[u8]>;
        let packets: &[&[u8]] = match fitted {
            Fitted::Whole => &whole,
            Fitted::Segments(len) => {
                segments = spread.chunks(len).collect();
                &segments
            }
        };
        let sent = match next_hop {
            IpAddr::V4(next_hop) => self.send_v4(packets, next_hop),
            IpAddr::V6(next_hop) => self.send_v6(packets, next_hop),
        };
        self.spread = spread;
        sent.map_err(|error| DropReason::from(error).into())
    }

    fn send_v6(&mut self, packets: &[&[u8]], to: Ipv6Addr) -> Result<(), SendError> {
        let socket = match &self.v6 {
            Exit::Raw(socket) => socket,
            Exit::Tun(device, _, sids) if packets.iter().all(|packet| is_destined(packet, to)) => {
                // To another SID of ours it comes straight back, and the reader adds the hop.
                let more = u8::from(sids.locator(to).is_none());
                return write(device, packets, more, &self.stats);
            }
            Exit::Tun(_, socket, _) => socket.as_ref().ok_or(SendError::Denied)?,
        };
        send(socket, packets, (to, 0).into(), &mut self.scratch, &self.stats)
    }

    fn send_v4(&mut self, packets: &[&[u8]], to: Ipv4Addr) -> Result<(), SendError> {
        let socket = self.v4.as_ref().ok_or(SendError::Denied)?;
        send(socket, packets, (to, 0).into(), &mut self.scratch, &self.stats)
    }
}

/// Whether an IPv6 packet goes to whom its header says.
fn is_destined(packet: &[u8], to: Ipv6Addr) -> bool {
    packet.get(24..40) == Some(to.octets().as_slice())
}

/// Writes IPv6 packets into a TUN device. The kernel forwards them, so each has one hop `more` to go than it is to have on the wire.
fn write(device: &OwnedFd, packets: &[&[u8]], more: u8, stats: &WorkerStats) -> Result<(), SendError> {
    /// Hop limit in the IPv6 header, RFC 8200 §3.
    const HOP_LIMIT_AT: usize = 7;
    for packet in packets {
        let Some((before, &[hop_limit, ref after @ ..])) = packet.split_at_checked(HOP_LIMIT_AT) else {
            return Err(SendError::Refused);
        };
        let hop_limit = [hop_limit.saturating_add(more)];
        let pieces = [before, &hop_limit, after].map(IoSlice::new);
        stats.called(Call::Writev);
        sys::write_pieces(device.as_fd(), &pieces).map_err(|error| classify(&error))?;
    }
    Ok(())
}

/// Sends packets in order, with a bounded wait for a full socket; gives up at the first that cannot be sent.
fn send(
    socket: &Socket,
    packets: &[&[u8]],
    to: SocketAddr,
    scratch: &mut SendScratch,
    stats: &WorkerStats,
) -> Result<(), SendError> {
    let (mut rest, mut waits) = (packets, 0);
    while !rest.is_empty() {
        let messages = rest.iter().map(|packet| (MessageTo::plain(to), once(*packet)));
        stats.called(Call::Sendmmsg);
        match sys::send_messages(socket.as_fd(), messages, scratch) {
            Ok(sent) => rest = rest.get(sent.max(1)..).unwrap_or_default(),
            Err(error) => match classify(&error) {
                SendError::Busy if waits < WAIT_TRIES => {
                    waits += 1;
                    stats.count(Count::SendWaits, 1);
                    stats.called(Call::Poll);
                    // If waiting fails, so does the next attempt.
                    let _ = sys::wait_writable(socket.as_fd(), WAIT_MS);
                }
                error @ (SendError::Busy
                | SendError::Unreachable
                | SendError::Denied
                | SendError::TooBig
                | SendError::Refused) => return Err(error),
            },
        }
    }
    Ok(())
}

/// What is to be said about a packet that could not be sent on.
fn refusal(error: SendError, to: IpAddr, link_mtu: Mtu) -> Refusal {
    let answer = (error == SendError::TooBig).then(|| {
        let mtu = path_mtu(to).map_or(link_mtu, |mtu| mtu.min(link_mtu));
        Answer::TooBig(mtu.bytes().into())
    });
    Refusal {
        reason: error.into(),
        answer,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a shell: the rate of errors goes by the clock"
)]
fn now() -> Instant {
    Instant::now()
}
