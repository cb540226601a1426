//! From the overlay to the underlay and back.
//!
//! # Theory of operation
//!
//! Each *queue* of the device has two directions, and each direction is a value that owns all it needs: descriptors,
//! buffers, counters. A thread calls its `turn` again and again; a turn waits for nothing but a full socket, 2 ms at the most.
//!
//! ```text
//! Outbound::turn                                      Inbound::turn
//!   RouteReader::load one snapshot for the batch        Underlay::recv     datagrams, coalesced runs
//!   Device::recv      a packet or super-packet          RouteReader::load  one snapshot for the batch
//!   forward::outbound parse, look up, TTL, MTU          forward::inbound   Encap::pull, checks, TTL
//!     SuperPacket::split + Encap::push → SendPlan         Coalescer::offer → frames
//!   Underlay::send    a message a run                   Device::send       a write a frame
//! ```
//!
//! Nothing here knows a lease, a store, a socket or a file descriptor; [`memory`] has in-memory twins of both edges. Nothing
//! locks, awaits, or allocates once the buffers have grown to their working size.
//!
//! A refused packet is a [`stats::DropReason`], counted per worker and, where a peer is concerned, per peer. It never stops the rest of its batch.

use std::io::{self, IoSlice};
use std::net::SocketAddr;

use crate::dataplane::coalesce::Merge;
use crate::dataplane::datagram::{DatagramBatch, Envelope};
use crate::dataplane::packet::{PacketBatch, RunLimits, SendPlan};
use crate::dataplane::route::Hop;
use crate::dataplane::stats::{DropReason, WorkerStats};
use crate::wire::ip::Ecn;

pub mod coalesce;
pub mod datagram;
pub mod endpoint;
pub mod forward;
pub mod memory;
pub mod offload;
pub mod packet;
pub mod route;
pub mod stats;
pub mod transit;
pub mod worker;

/// The edge to the overlay: a TUN queue, or its twin in memory.
pub trait Device {
    /// Appends the next packet to `batch`, scattered as the batch wants it; `false` if none is waiting or the batch is full. Never blocks.
    ///
    /// # Errors
    /// Only when the device is gone for good and must be made anew.
    fn recv(&mut self, batch: &mut PacketBatch) -> io::Result<bool>;

    /// Sends one frame: a virtio header, then an IP packet, in pieces.
    ///
    /// # Errors
    /// Says why the frame was not taken; nothing of it was.
    fn send(&mut self, frame: &[IoSlice<'_>]) -> Result<(), DeviceError>;

    /// Sends a whole IP packet of our own (an ICMP error) to where its destination lives.
    ///
    /// # Errors
    /// The packet was not sent; the caller counts it and goes on.
    fn answer(&mut self, packet: &[u8], to: std::net::IpAddr) -> io::Result<()>;

    /// What frames it takes beyond plain packets.
    fn merge(&self) -> Merge;

    /// Puts the system calls made since this was last called into `stats`; nothing to do for an edge that makes none.
    fn settle(&mut self, _stats: &WorkerStats) {}
}

/// Why a device did not take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// It does not like the frame (EINVAL).
    Refused,
    /// It has no room at the moment (EAGAIN, ENOBUFS).
    Busy,
    /// It is down (EIO).
    Down,
    /// It no longer exists (EBADFD).
    Gone,
}

/// The edge to the underlay: UDP or raw sockets, or their twin in memory.
pub trait Underlay {
    /// Receives the datagrams waiting into `batch` until there are none or it is full; never blocks.
    ///
    /// # Errors
    /// Only when the socket is beyond use.
    fn recv(&mut self, batch: &mut DatagramBatch) -> io::Result<()>;

    /// Sends all runs of `plan`, in order. Runs that could not be sent, or not wholly, are reported in `failures`; the others are not held up.
    ///
    /// # Errors
    /// Only when the socket is beyond use.
    fn send(
        &mut self,
        plan: &SendPlan,
        batch: &PacketBatch,
        stats: &WorkerStats,
        failures: &mut Vec<SendFailure>,
    ) -> io::Result<()>;

    /// How long a run to `to` may get.
    fn limits(&self, to: SocketAddr) -> RunLimits;

    /// Size of the pool of source ports, at least 1.
    fn source_ports(&self) -> usize;

    /// As [`Device::settle`], of the calls that receive; those that send are counted as they are made.
    fn settle(&mut self, _stats: &WorkerStats) {}
}

/// A run, or the rest of one, that was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendFailure {
    /// Which run of the plan.
    pub run: usize,
    /// How many segments of it were not sent.
    pub segments: usize,
    /// Why.
    pub error: SendError,
}

/// Why the underlay did not take a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// No room, even after a wait.
    Busy,
    /// No route to the peer.
    Unreachable,
    /// A local firewall says no.
    Denied,
    /// Larger than the path carries.
    TooBig,
    /// Anything else.
    Refused,
}

impl From<SendError> for DropReason {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Busy => Self::UnderlayBusy,
            SendError::Unreachable => Self::UnderlayUnreachable,
            SendError::Denied => Self::UnderlayDenied,
            SendError::TooBig => Self::TooBig,
            SendError::Refused => Self::UnderlayRefused,
        }
    }
}

/// What a tunnel does to the TTL of what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TtlPolicy {
    /// Takes one at either end: a tunnel that is a hop, like flannel's udp proxy.
    Decrement,
    /// Leaves it to the hosts' forwarding: a tunnel that is a link, like vxlan.
    Keep,
}

/// What a tunnel does with congestion marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EcnPolicy {
    /// The outer header says "not capable", and what it says on arrival is ignored: the other end would lose marks (RFC 6040 §4.1,
    /// compatibility mode).
    Ignore,
    /// Copied outwards, combined on arrival (RFC 6040, normal mode).
    Carry,
}

/// Who may have left work for a network card that was not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerOffloads {
    /// Nobody: every datagram is as it would be on a wire.
    None,
    /// The peer's kernel. Where the two ends share a machine, its super-packets arrive whole and with unfinished checksums.
    Kernel,
}

/// What becomes of an outer datagram larger than its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oversize {
    /// It may be fragmented by any router: "don't fragment" is clear (IPv4 only; over IPv6 by the sender).
    FragmentAnywhere,
    /// "Don't fragment" is set while it fits the path as far as that is known; above that, the sender fragments.
    FragmentHere,
    /// It is not sent (EMSGSIZE), and "don't fragment" is always set.
    Refuse,
}

/// How a tunnel treats what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manners {
    /// What it does to the TTL.
    pub ttl: TtlPolicy,
    /// What it does with congestion marks.
    pub ecn: EcnPolicy,
    /// What arrives through it.
    pub offloads: PeerOffloads,
    /// Whether the other end drops what is too big for it without a word: then SYNs are made to announce what fits, asked for or not.
    pub mute: bool,
}

/// What an encapsulation may want to know of the packet it goes before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Its length, bytes.
    pub len: usize,
    /// Hash of its flow.
    pub flow: u32,
    /// The congestion codepoint the outer header is to carry.
    pub ecn: Ecn,
}

/// One encapsulation: what goes between what the socket makes (a UDP header, or nothing) and the inner packet.
pub trait Encap: Clone + Send + 'static {
    /// What it needs to know of a peer.
    type Hop: Hop;

    /// How packets to a peer are treated.
    fn outbound(&self, hop: &Self::Hop) -> Manners;

    /// How packets that arrive are treated.
    fn inbound(&self) -> Manners;

    /// Length of its header towards a peer, bytes; at most [`packet::HEADROOM`].
    fn header_len(&self, hop: &Self::Hop) -> usize;

    /// Writes the header for an inner packet; `out` is as long as [`Self::header_len`] says.
    fn push(&self, hop: &Self::Hop, inner: Inner, out: &mut [u8]);

    /// Where the inner packet starts in a datagram.
    ///
    /// # Errors
    /// The datagram is not of this encapsulation.
    fn pull(&self, envelope: &Envelope, datagram: &[u8]) -> Result<usize, DropReason>;
}
