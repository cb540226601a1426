//! The SRv6 underlay: raw IPv6 sockets, one packet a message.
//!
//! # Theory of operation
//!
//! The locator is an AnyIP route (`local <locator> dev lo`), so packets to our SIDs are the kernel's own; what its IPv6 has to do is done
//! before we see them: reassembly, firewall, path MTU. Sockets for protocols 4, 41 and 43 get what stands behind the outer header, and
//! with generic GRO at the link up to 64 KiB of merged TCP at once.
//!
//! A raw socket gets every packet of its protocol, so each has a filter, which runs where the packet still has its outer header:
//!
//! ```text
//! came by the underlay's interface, or from this host itself (a path may name two SIDs of one node in a row):
//!   destination is a SID that ends in our device ── not 43 ──────────────────────────▶ this queue, by a hash of the inner addresses
//!                                                └─ 43: segment routing, none left ──▶ the same
//!   behind a routing header that the kernel has read and passed on (types 0 and 2) ──▶ nobody: socket 43 has had it
//! anything else to our locator ──────────────────────────────────────────────────────▶ the endpoint's thread
//! another destination: another tunnel of this host ──────────────────────────────────▶ nobody
//! ```
//!
//! Filters sort, they do not judge: all checks are made on what arrives. Sending is `IPPROTO_RAW` with our own outer header: flow label,
//! hop limit and routing header are ours, route, neighbour and path MTU the kernel's. A packet larger than its path is refused (EMSGSIZE).
//! With a [`PacketSender`], what it takes leaves by that.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{MsgFlags, recv};
use socket2::{Domain, Protocol, Socket, Type};

use crate::addr::Ipv6Prefix;
use crate::dataplane::datagram::{DATAGRAM_SLOTS, DatagramBatch};
use crate::dataplane::packet::{PacketBatch, RunLimits, SendPlan};
use crate::dataplane::stats::{Call, Calls, Count, WorkerStats};
use crate::dataplane::{SendError, SendFailure, Underlay};
use crate::host::handover::{Bundle, Kind};
use crate::host::packet::{self, PacketSender};
use crate::host::socket::{Place, RECV_BUFFER, SEND_BUFFER, WAIT_MS, WAIT_TRIES, classify};
use crate::host::sys::{self, MessageTo, RecvScratch, SendScratch};
use crate::wire::srv6::next_header;

mod filter;
mod program;

use filter::filter;

/// What may stand behind the outer header of a packet to a SID.
pub const PROTOCOLS: [u8; 3] = [next_header::IPV4, next_header::IPV6, next_header::ROUTING];
/// What the sockets of a queue are called when they are handed over, in the order of [`PROTOCOLS`].
pub const QUEUE_KINDS: [Kind; PROTOCOLS.len()] = [Kind::RawV4, Kind::RawV6, Kind::RawRouting];
/// The same of the endpoint's.
pub const SID_KINDS: [Kind; PROTOCOLS.len()] = [Kind::SidV4, Kind::SidV6, Kind::SidRouting];
/// The loopback's number in every namespace (`LOOPBACK_IFINDEX` of linux/netdevice.h).
pub const LOOPBACK: u32 = 1;
/// Packets taken from one socket at a time while they are large, as merged ones are.
const LARGE_SLOTS: usize = 8;
/// A packet is large from here on, bytes.
const LARGE_BYTES: usize = 16_384;
/// Longest run of a plan: there is nothing to gain from runs but fewer of them.
const MAX_SEGMENTS: usize = 64;

/// What is wanted of the underlay.
#[derive(Clone, Debug)]
pub struct RawOptions {
    /// The interface packets come in by.
    pub interface: String,
    /// All our SIDs are in there.
    pub locators: Vec<Ipv6Prefix>,
    /// Those that end in our device.
    pub ends: Vec<Ipv6Addr>,
    /// The source of what we send.
    pub source: Ipv6Addr,
    /// Number of queues.
    pub queues: usize,
}

impl RawOptions {
    /// Number of the underlay's interface.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn interface(&self) -> io::Result<u32> {
        Ok(nix::net::if_::if_nametoindex(self.interface.as_str())?)
    }
}

/// The raw sockets cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} a raw IPv6 socket for protocol {protocol}")]
pub struct RawError {
    /// What we were doing.
    doing: &'static str,
    /// The protocol.
    protocol: u8,
    /// The kernel's word.
    #[source]
    source: io::Error,
}

impl RawError {
    /// Whether raw sockets are not to be had here at all, now or later.
    pub fn is_refused(&self) -> bool {
        // inet6_create (net/ipv6/af_inet6.c) says EPERM without CAP_NET_RAW and EPROTONOSUPPORT without raw sockets; security modules
        // and seccomp filters prefer EACCES, and a filter of address families EAFNOSUPPORT.
        matches!(
            self.source.raw_os_error(),
            Some(libc::EPERM | libc::EACCES | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT)
        )
    }
}

/// One queue's sockets.
pub struct RawUnderlay {
    recv: Vec<(Socket, u8)>,
    send: Socket,
    /// Takes what it can of what is sent.
    packet: Option<PacketSender>,
    recv_scratch: Vec<RecvScratch>,
    send_scratch: SendScratch,
    /// Packets of the last batch were large.
    large: bool,
    /// Which protocol is received from first this time.
    first: usize,
    calls: Calls,
}

/// Who is to get a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// A queue: what ends in our device.
    Queue(usize),
    /// The endpoint's thread: all else.
    Endpoint,
}

impl RawUnderlay {
    /// Opens the sockets of queue `queue`.
    ///
    /// # Errors
    /// See [`RawError`]; without CAP_NET_RAW the source is EPERM.
    pub fn open(options: &RawOptions, queue: usize) -> Result<Self, RawError> {
        Self::adopt(options, queue, [None, None, None])
    }

    /// Goes on with the sockets of an earlier life, one a protocol, and opens what is not given.
    ///
    /// # Errors
    /// They are not such sockets; see [`RawError`].
    pub fn adopt(
        options: &RawOptions,
        queue: usize,
        given: [Option<OwnedFd>; PROTOCOLS.len()],
    ) -> Result<Self, RawError> {
        let recv = PROTOCOLS
            .into_iter()
            .zip(given)
            .map(|(protocol, given)| {
                let socket = receiver(options, protocol, Audience::Queue(queue), given)?;
                Ok((socket, protocol))
            })
            .collect::<Result<_, RawError>>()?;
        Ok(Self::of(recv, sender(options.source)?))
    }

    /// Puts second descriptors of the sockets that receive into `bundle`.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hold(&self, queue: usize, bundle: &mut Bundle) -> io::Result<()> {
        for ((socket, _), kind) in self.recv.iter().zip(QUEUE_KINDS) {
            bundle.insert(kind, queue, socket.as_fd().try_clone_to_owned()?);
        }
        Ok(())
    }

    fn of(recv: Vec<(Socket, u8)>, send: Socket) -> Self {
        Self {
            recv_scratch: recv.iter().map(|_| RecvScratch::default()).collect(),
            recv,
            send,
            packet: None,
            send_scratch: SendScratch::default(),
            large: true,
            first: 0,
            calls: Calls::default(),
        }
    }

    /// The same sockets for the other direction.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let recv = self
            .recv
            .iter()
            .map(|(socket, protocol)| Ok((socket.try_clone()?, *protocol)))
            .collect::<io::Result<_>>()?;
        let packet = self.packet.as_ref().map(PacketSender::try_clone).transpose()?;
        Ok(Self {
            packet,
            ..Self::of(recv, self.send.try_clone()?)
        })
    }

    /// Has what `sender` takes leave by it from now on.
    pub fn send_by(&mut self, sender: PacketSender) {
        self.packet = Some(sender);
    }

    /// What to wait for before receiving.
    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.recv.iter().map(|(socket, _)| socket.as_fd())
    }
}

/// Opens a socket that gets what `audience` is to get, or has one of an earlier life get it from now on.
///
/// # Errors
/// What is given is no such socket; see [`RawError`].
pub fn receiver(
    options: &RawOptions,
    protocol: u8,
    audience: Audience,
    given: Option<OwnedFd>,
) -> Result<Socket, RawError> {
    let failed = |doing| {
        move |source| RawError {
            doing,
            protocol,
            source,
        }
    };
    let wanted = Some(Protocol::from(i32::from(protocol)));
    let socket = match given.map(Socket::from) {
        Some(socket) => {
            let is_such = (socket.domain(), socket.r#type(), socket.protocol());
            let (Ok(Domain::IPV6), Ok(Type::RAW), Ok(held)) = is_such else {
                return Err(failed("take over")(io::Error::other("it is something else")));
            };
            if held != wanted {
                return Err(failed("take over")(io::Error::other(
                    "it is for another protocol",
                )));
            }
            socket
        }
        None => {
            Socket::new(Domain::IPV6, Type::RAW.nonblocking().cloexec(), wanted).map_err(failed("open"))?
        }
    };
    let fd = socket.as_fd();
    let interface = options.interface().map_err(failed("find the interface of"))?;
    // Before the filter is there, a packet may slip in: it is judged like all others. One that is there is replaced.
    sys::attach_filter(fd, &filter(options, interface, protocol, audience)).map_err(failed("filter"))?;
    for option in [libc::IPV6_RECVPKTINFO, libc::IPV6_RECVTCLASS] {
        sys::set_option(fd, libc::IPPROTO_IPV6, option, 1).map_err(failed("ask for the headers of"))?;
    }
    if audience == Audience::Endpoint {
        // Without a raw socket that asks for errors, the kernel learns nothing from a packet too big about what we sent
        // (rawv6_err of net/ipv6/raw.c). One that asks is enough, and this thread has the time to clear them away.
        let wanted = [libc::IPV6_RECVHOPLIMIT, sys::IPV6_FLOWINFO, libc::IPV6_RECVERR];
        for option in wanted {
            sys::set_option(fd, libc::IPPROTO_IPV6, option, 1).map_err(failed("ask for the headers of"))?;
        }
    }
    if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECV_BUFFER).is_err() {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, RECV_BUFFER)
            .map_err(failed("size the receive buffer of"))?;
    }
    // Counting overflows is for show; a kernel without it loses nothing.
    let _ = sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1);
    Ok(socket)
}

/// Clears away what the network said of packets sent before: the kernel has drawn its conclusions, and what is left unread takes the room
/// of packets.
pub fn clear_errors(socket: &Socket) {
    let mut message = [0];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    // It ends with EAGAIN, or with a socket that is of no use anyway.
    while recv(socket.as_fd().as_raw_fd(), &mut message, flags).is_ok() {}
}

/// Opens a socket that sends whole IPv6 packets, whose source is most often `source`.
///
/// # Errors
/// See [`RawError`].
pub fn sender(source: Ipv6Addr) -> Result<Socket, RawError> {
    const IPPROTO_RAW: u8 = 255;
    let failed = |doing| {
        move |source| RawError {
            doing,
            protocol: IPPROTO_RAW,
            source,
        }
    };
    let socket = Socket::new(
        Domain::IPV6,
        Type::RAW.nonblocking().cloexec(),
        Some(Protocol::from(i32::from(IPPROTO_RAW))),
    )
    .map_err(failed("open"))?;
    let fd = socket.as_fd();
    if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER).is_err() {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, SEND_BUFFER)
            .map_err(failed("size the send buffer of"))?;
    }
    // Otherwise the kernel would choose a source for each packet, at a seventh of its cost, only to send ours.
    sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, 1)
        .and_then(|()| socket.bind(&SocketAddr::from((source, 0)).into()))
        .map_err(failed("bind"))?;
    // A socket of this protocol receives nothing; it must not hold what it will never read all the same.
    sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 0)
        .map_err(failed("size the receive buffer of"))?;
    Ok(socket)
}

impl Underlay for RawUnderlay {
    fn recv(&mut self, batch: &mut DatagramBatch) -> io::Result<()> {
        let slots = if self.large { LARGE_SLOTS } else { DATAGRAM_SLOTS };
        // The first may fill the batch: a flood of one protocol must not starve the others.
        self.first = (self.first + 1) % self.recv.len().max(1);
        let (before, from_first) = self.recv.split_at(self.first);
        let (scratch_before, scratch_from) = self.recv_scratch.split_at_mut(self.first);
        let in_turn = from_first
            .iter()
            .zip(scratch_from)
            .chain(before.iter().zip(scratch_before));
        for ((socket, protocol), scratch) in in_turn {
            self.calls.note(Call::Recvmmsg);
            match sys::recv_datagrams((socket.as_fd(), *protocol), batch, scratch, slots) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) => {
                    return Err(error);
                }
                // The interface is gone for the moment (ENODEV, ENETDOWN), or the network speaks of earlier packets.
                Err(_) => {}
            }
        }
        if !batch.is_empty() {
            let bytes: usize = batch.datagrams().iter().map(|datagram| datagram.len).sum();
            self.large = bytes >= LARGE_BYTES * batch.datagrams().len();
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
        let (mut at, mut waits) = (Place { run: 0, segment: 0 }, 0);
        if let Some(packet) = &mut self.packet {
            packet.begin(packet::now());
        }
        while let Some(mut run) = plan.runs().get(at.run) {
            if let Some(packet) = &mut self.packet {
                at = packet.send(plan, batch, at, stats)?;
                match plan.runs().get(at.run) {
                    Some(left) => run = left,
                    None => break,
                }
            }
            let mut next = at;
            let packet = &mut self.packet;
            let messages = std::iter::from_fn(|| {
                let run = plan.runs().get(next.run)?;
                if packet.as_mut().is_some_and(|packet| packet.takes(next.run, run)) {
                    return None;
                }
                let segment = next.segment;
                next = next.after(run, 1);
                let message = MessageTo::plain(portless(run.to));
                Some((message, plan.slices(run, batch, segment, 1)))
            });
            stats.called(Call::Sendmmsg);
            let error = match sys::send_messages(self.send.as_fd(), messages, &mut self.send_scratch) {
                Ok(sent) => {
                    stats.count(Count::RawSends, sent as u64);
                    for _ in 0..sent.max(1) {
                        let Some(run) = plan.runs().get(at.run) else { break };
                        at = at.after(run, 1);
                    }
                    continue;
                }
                Err(error) => error,
            };
            if error.raw_os_error() == Some(libc::EBADF) {
                return Err(error);
            }
            match classify(&error) {
                SendError::Busy if waits < WAIT_TRIES => {
                    waits += 1;
                    stats.count(Count::SendWaits, 1);
                    stats.called(Call::Poll);
                    sys::wait_writable(self.send.as_fd(), WAIT_MS)?;
                }
                error @ (SendError::Busy
                | SendError::Unreachable
                | SendError::Denied
                | SendError::TooBig
                | SendError::Refused) => {
                    stats.count(Count::PathTooBig, u64::from(error == SendError::TooBig));
                    failures.push(SendFailure {
                        run: at.run,
                        segments: 1,
                        error,
                    });
                    at = at.after(run, 1);
                }
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
        self.calls.settle(stats);
    }
}

/// A raw socket takes a port for a protocol number, and wants none.
fn portless(to: SocketAddr) -> SocketAddr {
    match to {
        SocketAddr::V4(_) => to,
        SocketAddr::V6(to) => SocketAddrV6::new(*to.ip(), 0, 0, to.scope_id()).into(),
    }
}
