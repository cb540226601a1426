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
use crate::host::sys::{self, BpfInstruction, MessageTo, RecvScratch, SendScratch};
use crate::wire::srv6::next_header;

/// What may stand behind the outer header of a packet to a SID.
pub const PROTOCOLS: [u8; 3] = [next_header::IPV4, next_header::IPV6, next_header::ROUTING];
/// What the sockets of a queue are called when they are handed over, in the order of [`PROTOCOLS`].
pub const QUEUE_KINDS: [Kind; PROTOCOLS.len()] = [Kind::RawV4, Kind::RawV6, Kind::RawRouting];
/// The same of the endpoint's.
pub const SID_KINDS: [Kind; PROTOCOLS.len()] = [Kind::SidV4, Kind::SidV6, Kind::SidRouting];
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

/// Where a header field lies for a filter: counted from the outer IPv6 header, wherever the packet itself is taken to begin.
const OUTER: u32 = sys::BPF_NET_OFFSET;
/// Next header and destination address in the IPv6 header, RFC 8200 §3.
const NEXT_HEADER: u32 = OUTER + 6;
const DESTINATION: u32 = OUTER + 24;
/// The loopback's number in every namespace (`LOOPBACK_IFINDEX` of linux/netdevice.h).
pub const LOOPBACK: u32 = 1;
/// Extension headers looked through for a routing header; packets with more are the endpoint's.
const MAX_EXTENSIONS: usize = 4;
/// Routing header: next header, length, type, segments left (RFC 8754 §2).
const SRH_NEXT_HEADER: u32 = 0;
const SRH_LENGTH: u32 = 1;
const SRH_TYPE: u32 = 2;
const SRH_SEGMENTS_LEFT: u32 = 3;
/// What stands behind the outer header is no shorter than an IPv4 header.
const SHORTEST: u32 = 20;
/// Length of an IPv6 header.
const V6_LEN: u32 = 40;

/// Builds the filter of a socket; see the picture above.
fn filter(options: &RawOptions, interface: u32, protocol: u8, audience: Audience) -> Vec<BpfInstruction> {
    let mut program = Program::default();
    let ends = program.label();
    let endpoint = program.label();
    let nobody = program.label();
    let (ours, elsewhere) = (program.label(), program.label());
    program.push(op::LOAD_WORD, sys::BPF_INTERFACE);
    program.jump_if(interface, ours);
    program.jump_unless(LOOPBACK, elsewhere);
    program.place(ours);
    for &sid in &options.ends {
        program.jump_if_prefix(DESTINATION, sid, 128, ends);
    }
    program.place(elsewhere);
    for &locator in &options.locators {
        program.jump_if_prefix(DESTINATION, locator.addr(), locator.len(), endpoint);
    }
    program.jump(nobody);

    program.place(ends);
    // A load past the end rejects; the endpoint counts what is that short.
    let whole = program.label();
    program.push(op::LOAD_LENGTH, 0);
    program.jump_if_at_least(SHORTEST, whole);
    program.jump(endpoint);
    program.place(whole);
    if protocol == next_header::ROUTING {
        let good = program.label();
        program.load_byte(SRH_TYPE);
        program.jump_unless(4, endpoint);
        program.load_byte(SRH_SEGMENTS_LEFT);
        program.jump_unless(0, endpoint);
        program.load_byte(SRH_NEXT_HEADER);
        // An echo request to the SID is the endpoint's; options may come before the inner packet.
        for next in [next_header::IPV4, next_header::IPV6, next_header::DESTINATION] {
            program.jump_if(u32::from(next), good);
        }
        program.jump(endpoint);
        program.place(good);
    } else {
        program.jump_if_routed(protocol, nobody, endpoint);
    }
    match audience {
        Audience::Endpoint => program.reject(),
        Audience::Queue(_) if options.queues <= 1 => program.accept(),
        Audience::Queue(queue) => {
            program.hash_inner(protocol);
            program.modulo(u32::try_from(options.queues).unwrap_or(1));
            let mine = program.label();
            program.jump_if(u32::try_from(queue).unwrap_or(0), mine);
            program.reject();
            program.place(mine);
            program.accept();
        }
    }

    program.place(endpoint);
    match audience {
        Audience::Endpoint => program.accept(),
        Audience::Queue(_) => program.reject(),
    }
    program.place(nobody);
    program.reject();
    program.assemble()
}

/// A place in a [`Program`] to jump to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Label(usize);

/// A classic BPF program under construction (Documentation/networking/filter.rst); all jumps lead forward.
#[derive(Default)]
struct Program {
    code: Vec<Step>,
    places: Vec<usize>,
}

enum Step {
    Plain(BpfInstruction),
    Jump(Label),
}

mod op {
    //! Operations of linux/filter.h and linux/bpf_common.h, each with its operands' kinds.
    pub(super) const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    pub(super) const LOAD_LENGTH: u16 = 0x80; // BPF_LD | BPF_W | BPF_LEN
    pub(super) const LOAD_BYTE: u16 = 0x30; // BPF_LD | BPF_B | BPF_ABS
    pub(super) const LOAD_WORD_AT_X: u16 = 0x40; // BPF_LD | BPF_W | BPF_IND
    pub(super) const LOAD_BYTE_AT_X: u16 = 0x50; // BPF_LD | BPF_B | BPF_IND
    pub(super) const LOAD: u16 = 0x00; // BPF_LD | BPF_IMM
    pub(super) const LOAD_MEMORY: u16 = 0x60; // BPF_LD | BPF_MEM
    pub(super) const LOAD_X: u16 = 0x01; // BPF_LDX | BPF_IMM
    pub(super) const LOAD_X_MEMORY: u16 = 0x61; // BPF_LDX | BPF_MEM
    pub(super) const STORE: u16 = 0x02; // BPF_ST
    pub(super) const STORE_X: u16 = 0x03; // BPF_STX
    pub(super) const A_TO_X: u16 = 0x07; // BPF_MISC | BPF_TAX
    pub(super) const XOR_X: u16 = 0xac; // BPF_ALU | BPF_XOR | BPF_X
    pub(super) const ADD: u16 = 0x04; // BPF_ALU | BPF_ADD
    pub(super) const ADD_X: u16 = 0x0c; // BPF_ALU | BPF_ADD | BPF_X
    pub(super) const SUBTRACT_X: u16 = 0x1c; // BPF_ALU | BPF_SUB | BPF_X
    pub(super) const MULTIPLY: u16 = 0x24; // BPF_ALU | BPF_MUL
    pub(super) const AND: u16 = 0x54; // BPF_ALU | BPF_AND
    pub(super) const SHIFT_RIGHT: u16 = 0x74; // BPF_ALU | BPF_RSH
    pub(super) const MODULO: u16 = 0x94; // BPF_ALU | BPF_MOD
    pub(super) const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
    pub(super) const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ
    pub(super) const JUMP_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE
    pub(super) const JUMP_AT_LEAST_X: u16 = 0x3d; // BPF_JMP | BPF_JGE | BPF_X
    pub(super) const RETURN: u16 = 0x06; // BPF_RET
}

impl Program {
    fn label(&mut self) -> Label {
        self.places.push(0);
        Label(self.places.len() - 1)
    }

    fn place(&mut self, label: Label) {
        let here = self.code.len();
        if let Some(place) = self.places.get_mut(label.0) {
            *place = here;
        }
    }

    fn push(&mut self, code: u16, k: u32) {
        self.push_jump(code, 0, 0, k);
    }

    fn push_jump(&mut self, code: u16, when_true: u8, when_false: u8, k: u32) {
        self.code.push(Step::Plain(BpfInstruction {
            code,
            when_true,
            when_false,
            k,
        }));
    }

    fn load_byte(&mut self, at: u32) {
        self.push(op::LOAD_BYTE, at);
    }

    fn jump(&mut self, to: Label) {
        self.code.push(Step::Jump(to));
    }

    fn jump_if(&mut self, value: u32, to: Label) {
        self.push_jump(op::JUMP_EQUAL, 0, 1, value);
        self.jump(to);
    }

    fn jump_if_at_least(&mut self, value: u32, to: Label) {
        self.push_jump(op::JUMP_AT_LEAST, 0, 1, value);
        self.jump(to);
    }

    fn jump_unless(&mut self, value: u32, to: Label) {
        self.push_jump(op::JUMP_EQUAL, 1, 0, value);
        self.jump(to);
    }

    /// Jumps if the address at `at` lies in a prefix.
    fn jump_if_prefix(&mut self, at: u32, addr: Ipv6Addr, len: u8, to: Label) {
        let other = self.label();
        let bits = addr.to_bits();
        for (word, offset) in (0u8..4).zip((at..).step_by(4)) {
            let covered = len.saturating_sub(word * 32).min(32);
            if covered == 0 {
                break;
            }
            let mask = u32::MAX << (32 - u32::from(covered));
            let wanted = (bits >> (96 - 32 * u32::from(word))) as u32 & mask;
            self.push(op::LOAD_WORD, offset);
            if mask != u32::MAX {
                self.push(op::AND, mask);
            }
            self.jump_unless(wanted, other);
        }
        self.jump(to);
        self.place(other);
    }

    /// Jumps to `routed` if a routing header stands before `protocol`, to `unknown` if that cannot be told.
    ///
    /// The kernel skips routing headers of types it does not know and that have no segments left (RFC 8200 §4.4), and goes on to what
    /// is behind them.
    fn jump_if_routed(&mut self, protocol: u8, routed: Label, unknown: Label) {
        const NEXT: u32 = 0;
        let direct = self.label();
        self.load_byte(NEXT_HEADER);
        self.jump_if(u32::from(protocol), direct);
        self.push(op::LOAD_X, V6_LEN);
        for _ in 0..MAX_EXTENSIONS {
            let walk = self.label();
            self.jump_if(u32::from(next_header::ROUTING), routed);
            // A fragment header that is still there is that of a whole packet; its second byte is reserved and 0.
            for next in [
                next_header::HOP_BY_HOP,
                next_header::DESTINATION,
                next_header::FRAGMENT,
            ] {
                self.jump_if(u32::from(next), walk);
            }
            self.jump(unknown);
            self.place(walk);
            self.push(op::LOAD_BYTE_AT_X, OUTER);
            self.push(op::STORE, NEXT);
            self.push(op::LOAD_BYTE_AT_X, OUTER + 1);
            self.push(op::ADD, 1);
            self.push(op::MULTIPLY, 8);
            self.push(op::ADD_X, 0);
            self.push(op::A_TO_X, 0);
            self.push(op::LOAD_MEMORY, NEXT);
            self.jump_if(u32::from(protocol), direct);
        }
        self.jump(unknown);
        self.place(direct);
    }

    /// Jumps unless `bytes` follow the place in X.
    fn jump_unless_left(&mut self, bytes: u32, to: Label) {
        let (inside, enough) = (self.label(), self.label());
        self.push(op::LOAD_LENGTH, 0);
        self.push_jump(op::JUMP_AT_LEAST_X, 0, 1, 0);
        self.jump(inside);
        self.jump(to);
        self.place(inside);
        self.push(op::SUBTRACT_X, 0);
        self.jump_if_at_least(bytes, enough);
        self.jump(to);
        self.place(enough);
    }

    /// Leaves a hash of the inner addresses in the accumulator; inner packets of one flow have one. That of a packet too short to have
    /// addresses is 0: somebody must count it.
    fn hash_inner(&mut self, protocol: u8) {
        const START: u32 = 0;
        const SUM: u32 = 1;
        if protocol == next_header::ROUTING {
            // The inner packet starts behind the routing header: (length + 1) * 8.
            self.load_byte(SRH_LENGTH);
            self.push(op::ADD, 1);
            self.push(op::MULTIPLY, 8);
            self.push(op::A_TO_X, 0);
        } else {
            self.push(op::LOAD_X, 0);
        }
        self.push(op::STORE_X, START);
        let (v4, done, short) = (self.label(), self.label(), self.label());
        self.jump_unless_left(SHORTEST, short);
        self.push(op::LOAD_BYTE_AT_X, 0);
        self.push(op::AND, 0xf0);
        self.jump_if(0x40, v4);
        self.jump_unless_left(V6_LEN, short);
        self.xor_words(&[12, 16, 20, 28, 32, 36], START, SUM);
        self.jump(done);
        self.place(v4);
        self.xor_words(&[12, 16], START, SUM);
        self.jump(done);
        self.place(short);
        self.push(op::LOAD, 0);
        self.place(done);
        // The last bits of addresses differ most; spread them.
        self.push(op::MULTIPLY, 0x9e37_79b1);
        self.push(op::SHIFT_RIGHT, 16);
    }

    /// Leaves the exclusive or of words of the inner header in the accumulator.
    fn xor_words(&mut self, offsets: &[u32], start: u32, sum: u32) {
        for (nth, &offset) in offsets.iter().enumerate() {
            self.push(op::LOAD_X_MEMORY, start);
            self.push(op::LOAD_WORD_AT_X, offset);
            if nth > 0 {
                self.push(op::LOAD_X_MEMORY, sum);
                self.push(op::XOR_X, 0);
            }
            self.push(op::STORE, sum);
        }
    }

    fn modulo(&mut self, n: u32) {
        self.push(op::MODULO, n.max(1));
    }

    fn accept(&mut self) {
        self.push(op::RETURN, u32::MAX);
    }

    fn reject(&mut self) {
        self.push(op::RETURN, 0);
    }

    fn assemble(self) -> Vec<BpfInstruction> {
        let places = self.places;
        let distance = |from: usize, to: Label| {
            let place = places.get(to.0).copied().unwrap_or(0);
            u32::try_from(place.saturating_sub(from + 1)).unwrap_or(0)
        };
        let steps = self.code.into_iter().enumerate();
        steps
            .map(|(at, step)| match step {
                Step::Plain(instruction) => instruction,
                Step::Jump(to) => BpfInstruction {
                    code: op::JUMP,
                    when_true: 0,
                    when_false: 0,
                    k: distance(at, to),
                },
            })
            .collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::srv6::{Encapsulation, Mode};

    /// Runs a program as the kernel would: `None` for one that ends badly, which rejects.
    fn accepts(program: &[BpfInstruction], outer: &[u8], payload: &[u8]) -> bool {
        let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0);
        loop {
            let BpfInstruction {
                code,
                when_true,
                when_false,
                k,
            } = program[at];
            at += 1;
            let load = |offset: u32, len: usize| {
                if offset == sys::BPF_INTERFACE {
                    return Some(INTERFACE);
                }
                let (bytes, offset) = match offset.checked_sub(OUTER) {
                    Some(offset) => (outer, offset),
                    None => (payload, offset),
                };
                let field = bytes.get(offset as usize..offset as usize + len)?;
                Some(field.iter().fold(0, |sum, &byte| sum << 8 | u32::from(byte)))
            };
            let loaded = match code {
                op::LOAD_WORD => load(k, 4),
                op::LOAD_BYTE => load(k, 1),
                op::LOAD_WORD_AT_X => load(x + k, 4),
                op::LOAD_BYTE_AT_X => load(x + k, 1),
                op::LOAD_LENGTH => Some(payload.len() as u32),
                op::LOAD => Some(k),
                op::LOAD_MEMORY => Some(memory[k as usize]),
                _ => Some(a),
            };
            let Some(loaded) = loaded else { return false };
            a = loaded;
            match code {
                op::LOAD_X => x = k,
                op::LOAD_X_MEMORY => x = memory[k as usize],
                op::STORE => memory[k as usize] = a,
                op::STORE_X => memory[k as usize] = x,
                op::A_TO_X => x = a,
                op::XOR_X => a ^= x,
                op::ADD => a = a.wrapping_add(k),
                op::ADD_X => a = a.wrapping_add(x),
                op::SUBTRACT_X => a = a.wrapping_sub(x),
                op::MULTIPLY => a = a.wrapping_mul(k),
                op::AND => a &= k,
                op::SHIFT_RIGHT => a >>= k,
                op::MODULO => a %= k,
                op::JUMP => at += k as usize,
                op::JUMP_EQUAL => at += usize::from(if a == k { when_true } else { when_false }),
                op::JUMP_AT_LEAST => at += usize::from(if a >= k { when_true } else { when_false }),
                op::JUMP_AT_LEAST_X => at += usize::from(if a >= x { when_true } else { when_false }),
                op::RETURN => return k != 0,
                _ => {}
            }
        }
    }

    /// The underlay's, and the one all packets here come by.
    const INTERFACE: u32 = 7;

    fn options(queues: usize) -> RawOptions {
        RawOptions {
            interface: "eth0".into(),
            locators: vec!["fd00:0:1::/48".parse().unwrap()],
            ends: vec!["fd00:0:1::1".parse().unwrap()],
            source: Ipv6Addr::UNSPECIFIED,
            queues,
        }
    }

    /// Who gets a packet: the queues by number, and the endpoint.
    fn audience(queues: usize, protocol: u8, to: &str, payload: &[u8]) -> (Vec<usize>, bool) {
        let mut outer = [0; 40];
        outer[6] = protocol;
        outer[24..].copy_from_slice(&to.parse::<Ipv6Addr>().unwrap().octets());
        let options = options(queues);
        let gets = |audience| accepts(&filter(&options, INTERFACE, protocol, audience), &outer, payload);
        let queues = (0..queues).filter(|&queue| gets(Audience::Queue(queue)));
        (queues.collect(), gets(Audience::Endpoint))
    }

    fn inner(last: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[10, 244, 1, last, 10, 244, 2, last.wrapping_mul(7)]);
        packet
    }

    /// A routing header of two segments, `left` of them to go, before an inner packet.
    fn routed(left: u8, next: u8, inner: &[u8]) -> Vec<u8> {
        let segments = [Ipv6Addr::from(1), Ipv6Addr::from(2)];
        let full = Encapsulation {
            mode: Mode::Full,
            source: Ipv6Addr::from(3),
            segments: &segments,
            next_header: next,
            hmac: None,
        };
        let mut srh = full.template().unwrap().as_bytes()[40..].to_vec();
        srh[usize::try_from(SRH_SEGMENTS_LEFT).unwrap()] = left;
        [&srh, inner].concat()
    }

    #[test]
    fn each_packet_is_for_one_audience() {
        const V4: u8 = next_header::IPV4;
        const SRH: u8 = next_header::ROUTING;
        let mut other_type = routed(0, V4, &inner(1));
        other_type[2] = 2;
        let (queue, endpoint, nobody) = ((vec![0], false), (vec![], true), (vec![], false));
        for (what, protocol, to, payload, expected) in [
            ("ends here", V4, "fd00:0:1::1", inner(1), &queue),
            (
                "ends here behind an SRH",
                SRH,
                "fd00:0:1::1",
                routed(0, V4, &inner(1)),
                &queue,
            ),
            (
                "options behind it",
                SRH,
                "fd00:0:1::1",
                routed(0, 60, &inner(1)),
                &queue,
            ),
            ("goes on", SRH, "fd00:0:1::1", routed(1, V4, &inner(1)), &endpoint),
            (
                "an echo request",
                SRH,
                "fd00:0:1::1",
                routed(0, 58, &inner(1)),
                &endpoint,
            ),
            ("another routing type", SRH, "fd00:0:1::1", other_type, &endpoint),
            ("too short", V4, "fd00:0:1::1", vec![0x45; 19], &endpoint),
            ("a short SRH", SRH, "fd00:0:1::1", vec![4, 0], &endpoint),
            ("another SID", V4, "fd00:0:1::e", inner(1), &endpoint),
            ("no SID of ours", V4, "fd00:0:2::1", inner(1), &nobody),
        ] {
            assert_eq!(&audience(1, protocol, to, &payload), expected, "{what}");
        }
    }

    #[test]
    fn queues_share_flows_and_each_flow_has_one() {
        for wrap in [
            |packet: Vec<u8>| (next_header::IPV4, packet),
            |packet: Vec<u8>| (next_header::ROUTING, routed(0, next_header::IPV4, &packet)),
        ] {
            let mut shares = [0; 3];
            for last in 0..200 {
                let (protocol, payload) = wrap(inner(last));
                let (queues, endpoint) = audience(3, protocol, "fd00:0:1::1", &payload);
                assert_eq!((queues.len(), endpoint), (1, false), "{last}");
                shares[queues[0]] += 1;
            }
            assert!(shares.iter().all(|&share| share > 30), "{shares:?}");
        }
    }
}
