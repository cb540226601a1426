//! System calls that no safe wrapper offers: one function a call, safe types in and out.
//!
//! `sendmmsg` and `recvmmsg` with a control message per message of its own, TUN ioctls, and a few socket options.

#![expect(unsafe_code, reason = "the one place for it; every block says why it holds")]

use std::io;
use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::dataplane::datagram::{DATAGRAM_SLOTS, DatagramBatch, Envelope};
use crate::wire::ip::Ecn;

/// Bytes of control data a message: room for UDP_GRO or UDP_SEGMENT, SO_RXQ_OVFL and a traffic class; or what an IPv6
/// header said: destination, traffic class, hop limit and flow label; each with its header.
const CONTROL_BYTES: usize = 144;
/// `IPV6_FLOWINFO` of linux/in6.h: as an option, asks for traffic class and flow label; as control data, has them.
pub const IPV6_FLOWINFO: i32 = 11;

/// Control data, aligned as `cmsghdr` wants.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Control([u8; CONTROL_BYTES]);

/// Turns -1 into the error of the call.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Sets an integer socket option.
///
/// # Errors
/// The kernel's.
pub fn set_option(fd: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the pointer and length describe `value`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            ptr::from_ref(&value).cast(),
            mem::size_of::<i32>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// Reads an integer socket option.
///
/// # Errors
/// The kernel's.
pub fn option(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut len = mem::size_of::<i32>() as libc::socklen_t;
    // SAFETY: the pointers describe `value` and `len`, which live through the call; the kernel writes at most `len` bytes.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            ptr::from_mut(&mut value).cast(),
            &mut len,
        )
    };
    check(result).map(|_| value)
}

/// An instruction of a classic BPF program: linux/filter.h's `sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BpfInstruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if a comparison holds.
    pub when_true: u8,
    /// Instructions to skip if it does not.
    pub when_false: u8,
    /// Operand.
    pub k: u32,
}

/// `SKF_NET_OFF` of linux/filter.h: offsets from here on count from the network header.
pub const BPF_NET_OFFSET: u32 = (-0x10_0000_i32).cast_unsigned();
/// `SKF_AD_OFF + SKF_AD_IFINDEX` of linux/filter.h: a word loaded from here is the number of the interface the packet came by.
pub const BPF_INTERFACE: u32 = (-0x1000_i32 + 8).cast_unsigned();

/// Lets a socket receive only what a program accepts.
///
/// # Errors
/// The kernel's: EINVAL for a program it does not like.
pub fn attach_filter(fd: BorrowedFd<'_>, program: &[BpfInstruction]) -> io::Result<()> {
    let mut code: Vec<libc::sock_filter> = program
        .iter()
        .map(|instruction| libc::sock_filter {
            code: instruction.code,
            jt: instruction.when_true,
            jf: instruction.when_false,
            k: instruction.k,
        })
        .collect();
    let program = libc::sock_fprog {
        len: u16::try_from(code.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: `program` describes `code`, and both outlive the call, which copies them.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            ptr::from_ref(&program).cast(),
            mem::size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    check(result).map(drop)
}

/// A socket address as the kernel wants it.
#[derive(Clone, Copy)]
pub struct RawAddr {
    storage: libc::sockaddr_storage,
    len: libc::socklen_t,
}

impl RawAddr {
    fn zeroed() -> Self {
        // SAFETY: all-zero bytes are a valid `sockaddr_storage` (plain integers, family AF_UNSPEC).
        let storage = unsafe { mem::zeroed() };
        Self {
            storage,
            len: mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t,
        }
    }

    /// The address, if it is an IP one.
    fn parse(&self) -> Option<SocketAddr> {
        match i32::from(self.storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says it is a `sockaddr_in`, which is smaller than the storage and no stricter in alignment.
                let addr = unsafe { &*ptr::from_ref(&self.storage).cast::<libc::sockaddr_in>() };
                let ip = Ipv4Addr::from(u32::from_be(addr.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(addr.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above, for `sockaddr_in6`.
                let addr = unsafe { &*ptr::from_ref(&self.storage).cast::<libc::sockaddr_in6>() };
                let ip = Ipv6Addr::from(addr.sin6_addr.s6_addr);
                Some(SocketAddrV6::new(ip, u16::from_be(addr.sin6_port), 0, addr.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

impl From<SocketAddr> for RawAddr {
    fn from(addr: SocketAddr) -> Self {
        let mut raw = Self::zeroed();
        match addr {
            SocketAddr::V4(addr) => {
                let value = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: addr.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: addr.ip().to_bits().to_be(),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: `sockaddr_storage` is larger than `sockaddr_in` and at least as aligned.
                unsafe {
                    ptr::from_mut(&mut raw.storage)
                        .cast::<libc::sockaddr_in>()
                        .write(value)
                };
                raw.len = mem::size_of::<libc::sockaddr_in>() as libc::socklen_t;
            }
            SocketAddr::V6(addr) => {
                let value = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: addr.port().to_be(),
                    sin6_flowinfo: addr.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: addr.ip().octets(),
                    },
                    sin6_scope_id: addr.scope_id(),
                };
                // SAFETY: as above, for `sockaddr_in6`.
                unsafe {
                    ptr::from_mut(&mut raw.storage)
                        .cast::<libc::sockaddr_in6>()
                        .write(value)
                };
                raw.len = mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            }
        }
        raw
    }
}

/// Scratch memory for [`recv_datagrams`], kept between calls.
pub struct RecvScratch {
    headers: Vec<libc::mmsghdr>,
    iovecs: Vec<libc::iovec>,
    addrs: Vec<RawAddr>,
    controls: Vec<Control>,
    overflows: u32,
}

// SAFETY: the raw pointers inside are written anew by every call before the kernel sees them and never followed otherwise.
unsafe impl Send for RecvScratch {}

impl Default for RecvScratch {
    fn default() -> Self {
        // SAFETY: all-zero bytes are a valid `mmsghdr` (null pointers, zero lengths).
        let header: libc::mmsghdr = unsafe { mem::zeroed() };
        Self {
            headers: vec![header; DATAGRAM_SLOTS],
            iovecs: Vec::with_capacity(DATAGRAM_SLOTS),
            addrs: vec![RawAddr::zeroed(); DATAGRAM_SLOTS],
            controls: vec![Control([0; CONTROL_BYTES]); DATAGRAM_SLOTS],
            overflows: 0,
        }
    }
}

/// What one message's control data says.
#[derive(Default)]
struct RecvControl {
    segment_size: Option<usize>,
    overflows: Option<u32>,
    ecn: Ecn,
    to: Option<Ipv6Addr>,
    hop_limit: u8,
    flow_info: u32,
    interface: u32,
}

impl RecvControl {
    /// Walks the control messages the kernel wrote.
    ///
    /// # Safety
    /// The control pointer and length of `header` describe a live buffer that a recvmmsg has filled.
    unsafe fn parse(header: &libc::msghdr) -> Self {
        let mut found = Self::default();
        // SAFETY: the caller vouches for control pointer and length.
        let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a pointer to a whole header inside that buffer.
        while let Some(control) = unsafe { next.as_ref() } {
            // SAFETY: the data follows the header; how much there is, the length checks below ask.
            let data = unsafe { libc::CMSG_DATA(control) };
            // SAFETY: CMSG_LEN is arithmetic on its argument only.
            let (carries_byte, carries_int, carries_info) = unsafe {
                let info = mem::size_of::<libc::in6_pktinfo>() as libc::c_uint;
                (
                    control.cmsg_len >= libc::CMSG_LEN(1) as _,
                    control.cmsg_len >= libc::CMSG_LEN(4) as _,
                    control.cmsg_len >= libc::CMSG_LEN(info) as _,
                )
            };
            if (control.cmsg_level, control.cmsg_type) == (libc::IPPROTO_IP, libc::IP_TOS) && carries_byte {
                // SAFETY: a byte is there. The kernel gives the type of service as one, unlike all else.
                found.ecn = Ecn::of(unsafe { data.read() });
            } else if (control.cmsg_level, control.cmsg_type) == (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO)
                && carries_info
            {
                // SAFETY: an `in6_pktinfo` is there; it need not be aligned.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                found.to = Some(Ipv6Addr::from(info.ipi6_addr.s6_addr));
                found.interface = info.ipi6_ifindex;
            } else if carries_int {
                // SAFETY: four bytes are there; they need not be aligned.
                let value = unsafe { data.cast::<u32>().read_unaligned() };
                match (control.cmsg_level, control.cmsg_type) {
                    (libc::SOL_UDP, libc::UDP_GRO) => found.segment_size = Some(value as usize),
                    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL) => found.overflows = Some(value),
                    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => found.ecn = Ecn::of((value & 0xff) as u8),
                    (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => found.hop_limit = (value & 0xff) as u8,
                    (libc::IPPROTO_IPV6, IPV6_FLOWINFO) => {
                        found.flow_info = u32::from_be(value) & 0x0fff_ffff
                    }
                    _ => {}
                }
            }
            // SAFETY: `control` is a header inside the buffer described by `header`.
            next = unsafe { libc::CMSG_NXTHDR(header, control) };
        }
        found
    }
}

/// Receives waiting datagrams into free slots of `batch`, at most `limit`; 0 if there are none. Never blocks. The socket is one for `protocol`.
///
/// # Errors
/// The kernel's, but for "nothing there".
pub fn recv_datagrams(
    (fd, protocol): (BorrowedFd<'_>, u8),
    batch: &mut DatagramBatch,
    scratch: &mut RecvScratch,
    limit: usize,
) -> io::Result<usize> {
    scratch.iovecs.clear();
    let mut wanted = 0;
    for (index, slot) in batch.slots().take(limit.min(DATAGRAM_SLOTS)).enumerate() {
        scratch.iovecs.push(libc::iovec {
            iov_base: slot.as_mut_ptr().cast(),
            iov_len: slot.len(),
        });
        let header = &mut scratch.headers[index];
        header.msg_len = 0;
        header.msg_hdr.msg_name = ptr::from_mut(&mut scratch.addrs[index].storage).cast();
        header.msg_hdr.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        header.msg_hdr.msg_iovlen = 1;
        header.msg_hdr.msg_control = scratch.controls[index].0.as_mut_ptr().cast();
        header.msg_hdr.msg_controllen = CONTROL_BYTES as _;
        header.msg_hdr.msg_flags = 0;
        wanted = index + 1;
    }
    if wanted == 0 {
        return Ok(0);
    }
    // Pointers are set once nothing grows any more.
    for (header, iovec) in scratch.headers.iter_mut().zip(&mut scratch.iovecs) {
        header.msg_hdr.msg_iov = iovec;
    }
    let received = loop {
        // SAFETY: the first `wanted` headers point at live buffers: slots of `batch` (borrowed mutably through this call) and
        // elements of `scratch`, none of which moves before the call returns.
        let result = unsafe {
            libc::recvmmsg(
                fd.as_raw_fd(),
                scratch.headers.as_mut_ptr(),
                wanted as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                ptr::null_mut(),
            )
        };
        match check(result) {
            Ok(received) => break received as usize,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error),
        }
    };
    for index in 0..received {
        let header = &scratch.headers[index];
        // SAFETY: recvmmsg has returned having filled this header, and its control buffer is in `scratch`.
        let control = unsafe { RecvControl::parse(&header.msg_hdr) };
        if let Some(overflows) = control.overflows {
            batch.note_overflows(u64::from(overflows.wrapping_sub(scratch.overflows)));
            scratch.overflows = overflows;
        }
        match scratch.addrs[index].parse() {
            Some(from) if header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0 => {
                let envelope = Envelope {
                    from,
                    to: control.to.unwrap_or(Ipv6Addr::UNSPECIFIED),
                    protocol,
                    hop_limit: control.hop_limit,
                    flow_info: control.flow_info,
                    interface: control.interface,
                    ecn: control.ecn,
                };
                batch.commit(envelope, header.msg_len as usize, control.segment_size);
            }
            Some(_) | None => batch.note_cut(),
        }
    }
    Ok(received)
}

/// Scratch memory for [`send_messages`], kept between calls.
#[derive(Default)]
pub struct SendScratch {
    headers: Vec<libc::mmsghdr>,
    iovecs: Vec<libc::iovec>,
    addrs: Vec<RawAddr>,
    controls: Vec<Control>,
}

// SAFETY: as for `RecvScratch`.
unsafe impl Send for SendScratch {}

/// Messages of one `sendmmsg`: UIO_MAXIOV.
const MAX_MESSAGES: usize = 1024;
/// Pieces of one message: UIO_MAXIOV.
const MAX_PIECES: usize = 1024;

/// One message: where to, and how.
#[derive(Clone, Copy, Debug)]
pub struct MessageTo {
    /// Destination.
    pub to: SocketAddr,
    /// UDP_SEGMENT size, if the kernel is to cut it.
    pub segment_size: Option<u16>,
    /// Congestion codepoint of the outer headers.
    pub ecn: Ecn,
}

impl MessageTo {
    /// A message sent as it is.
    pub fn plain(to: SocketAddr) -> Self {
        Self {
            to,
            segment_size: None,
            ecn: Ecn::NotEct,
        }
    }
}

/// Where an IPv6 packet goes on a link of Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkTo {
    /// Number of the link.
    pub index: u32,
    /// Whom it is for there.
    pub mac: [u8; 6],
}

impl From<LinkTo> for RawAddr {
    fn from(to: LinkTo) -> Self {
        let mut raw = Self::zeroed();
        let mut value = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as libc::c_ushort,
            sll_protocol: (libc::ETH_P_IPV6 as u16).to_be(),
            sll_ifindex: to.index as libc::c_int,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        value.sll_addr[..6].copy_from_slice(&to.mac);
        // SAFETY: `sockaddr_storage` is larger than `sockaddr_ll` and at least as aligned.
        unsafe {
            ptr::from_mut(&mut raw.storage)
                .cast::<libc::sockaddr_ll>()
                .write(value)
        };
        raw.len = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        raw
    }
}

/// What a message is sent with besides its bytes.
pub trait Message {
    /// Its destination.
    fn addr(&self) -> RawAddr;
    /// Its control messages, and their length.
    fn control(&self) -> (Control, usize);
}

impl Message for MessageTo {
    #[inline]
    fn addr(&self) -> RawAddr {
        self.to.into()
    }

    #[inline]
    fn control(&self) -> (Control, usize) {
        send_control(self)
    }
}

impl Message for LinkTo {
    #[inline]
    fn addr(&self) -> RawAddr {
        (*self).into()
    }

    #[inline]
    fn control(&self) -> (Control, usize) {
        (Control([0; CONTROL_BYTES]), 0)
    }
}

/// Sends messages, each given as its destination and its pieces; gives how many were sent. Never blocks.
///
/// # Errors
/// The kernel's, about the first message: if it fails, nothing was sent.
pub fn send_messages<'a, I, M, P>(
    fd: BorrowedFd<'_>,
    messages: I,
    scratch: &mut SendScratch,
) -> io::Result<usize>
where
    I: Iterator<Item = (M, P)>,
    M: Message,
    P: Iterator<Item = &'a [u8]>,
{
    scratch.headers.clear();
    scratch.iovecs.clear();
    scratch.addrs.clear();
    scratch.controls.clear();
    for (message, pieces) in messages.take(MAX_MESSAGES) {
        let first = scratch.iovecs.len();
        for piece in pieces.filter(|piece| !piece.is_empty()).take(MAX_PIECES) {
            scratch.iovecs.push(libc::iovec {
                iov_base: piece.as_ptr().cast_mut().cast(),
                iov_len: piece.len(),
            });
        }
        // SAFETY: all-zero bytes are a valid `mmsghdr`.
        let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
        header.msg_hdr.msg_iovlen = (scratch.iovecs.len() - first) as _;
        let (control, control_len) = message.control();
        header.msg_hdr.msg_controllen = control_len as _;
        scratch.headers.push(header);
        scratch.addrs.push(message.addr());
        scratch.controls.push(control);
    }
    // Pointers are set once nothing grows any more.
    let mut piece = 0;
    for (index, header) in scratch.headers.iter_mut().enumerate() {
        let header = &mut header.msg_hdr;
        let addr = &mut scratch.addrs[index];
        header.msg_name = ptr::from_mut(&mut addr.storage).cast();
        header.msg_namelen = addr.len;
        header.msg_iov = scratch.iovecs[piece..].as_mut_ptr();
        let pieces: usize = header.msg_iovlen as _;
        piece += pieces;
        if header.msg_controllen > 0 {
            header.msg_control = scratch.controls[index].0.as_mut_ptr().cast();
        }
    }
    if scratch.headers.is_empty() {
        return Ok(0);
    }
    loop {
        // SAFETY: every header points at elements of `scratch`, which do not move before the call returns, and its iovecs at
        // pieces that live for `'a`, longer than this call; the kernel only reads them.
        let result = unsafe {
            libc::sendmmsg(
                fd.as_raw_fd(),
                scratch.headers.as_mut_ptr(),
                scratch.headers.len() as libc::c_uint,
                (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
            )
        };
        match check(result) {
            Ok(sent) => return Ok(sent as usize),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The control messages of a message to send, and their length: segmentation and congestion codepoint, each if asked for.
fn send_control(message: &MessageTo) -> (Control, usize) {
    let mut control = Control([0; CONTROL_BYTES]);
    let mut len = 0;
    if let Some(size) = message.segment_size {
        len = put_control(
            &mut control,
            len,
            (libc::SOL_UDP, libc::UDP_SEGMENT),
            &size.to_ne_bytes(),
        );
    }
    if message.ecn != Ecn::NotEct {
        let option = match message.to {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_TOS),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        };
        len = put_control(
            &mut control,
            len,
            option,
            &i32::from(message.ecn as u8).to_ne_bytes(),
        );
    }
    (control, len)
}

/// Appends a control message of up to 8 bytes at `at`; gives where the next one starts. There is room for three.
fn put_control(control: &mut Control, at: usize, (level, kind): (i32, i32), data: &[u8]) -> usize {
    let data = data.get(..8).unwrap_or(data);
    let len = data.len() as libc::c_uint;
    // SAFETY: CMSG_SPACE and CMSG_LEN are arithmetic on their argument only.
    let (space, whole) = unsafe { (libc::CMSG_SPACE(len) as usize, libc::CMSG_LEN(len)) };
    let Some(place) = control.0.get_mut(at..at + space) else {
        return at;
    };
    // SAFETY: `place` is as long as header and data together with their padding, and aligned for `cmsghdr`: the buffer is, and `at` is
    // a sum of CMSG_SPACEs. CMSG_DATA of a header at its start lies inside it.
    unsafe {
        let header = place.as_mut_ptr().cast::<libc::cmsghdr>();
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        (*header).cmsg_len = whole as _;
        ptr::copy_nonoverlapping(data.as_ptr(), libc::CMSG_DATA(header), data.len());
    }
    at + space
}

/// Scratch memory for [`read_scattered`], kept between calls.
#[derive(Default)]
pub struct ReadScratch(Vec<libc::iovec>);

// SAFETY: as for `RecvScratch`.
unsafe impl Send for ReadScratch {}

/// Reads one packet: its first bytes into `front`, the rest to `places` of `room`, given as (offset, length) and within it.
///
/// Never blocks if the descriptor does not; 0 at end of file.
///
/// # Errors
/// The kernel's, `WouldBlock` included.
pub fn read_scattered(
    fd: BorrowedFd<'_>,
    front: &mut [u8],
    room: &mut [u8],
    places: impl Iterator<Item = (usize, usize)>,
    scratch: &mut ReadScratch,
) -> io::Result<usize> {
    let iovecs = &mut scratch.0;
    iovecs.clear();
    if !front.is_empty() {
        iovecs.push(libc::iovec {
            iov_base: front.as_mut_ptr().cast(),
            iov_len: front.len(),
        });
    }
    push_places(iovecs, room, places);
    loop {
        // SAFETY: the iovecs describe `front` and parts of `room` (see `push_places`), both borrowed mutably through the call.
        let result = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        match usize::try_from(result) {
            Ok(read) => return Ok(read),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Appends an iovec for each place that lies in `room`; one that does not is cut to what does.
#[inline]
fn push_places(iovecs: &mut Vec<libc::iovec>, room: &mut [u8], places: impl Iterator<Item = (usize, usize)>) {
    for (at, len) in places.take(MAX_PIECES) {
        if let Some(place) = room.get_mut(at..) {
            let len = len.min(place.len());
            iovecs.push(libc::iovec {
                iov_base: place.as_mut_ptr().cast(),
                iov_len: len,
            });
        }
    }
}

/// Writes one packet given in pieces.
///
/// # Errors
/// The kernel's, `WouldBlock` included.
pub fn write_pieces(fd: BorrowedFd<'_>, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
    loop {
        // SAFETY: `IoSlice` has the layout of `iovec` by its documentation; the pieces are borrowed through the call.
        let result = unsafe {
            libc::writev(
                fd.as_raw_fd(),
                pieces.as_ptr().cast::<libc::iovec>(),
                pieces.len() as libc::c_int,
            )
        };
        match usize::try_from(result) {
            Ok(written) => return Ok(written),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// linux/if_tun.h
mod tun_ioctl {
    nix::ioctl_write_int!(set_iff, b'T', 202);
    nix::ioctl_write_int!(set_offload, b'T', 208);
    nix::ioctl_write_ptr!(set_vnet_hdr_size, b'T', 216, i32);
    nix::ioctl_read!(features, b'T', 207, u32);
    nix::ioctl_read!(get_iff, b'T', 210, u32);
}

/// Sets what super-packets and partial checksums the kernel may hand over: TUNSETOFFLOAD.
///
/// # Errors
/// EINVAL for a combination this kernel does not know.
pub fn tun_set_offload(fd: BorrowedFd<'_>, mask: u32) -> io::Result<()> {
    // SAFETY: the argument is an integer; the kernel checks that the descriptor is a TUN queue.
    unsafe { tun_ioctl::set_offload(fd.as_raw_fd(), libc::c_ulong::from(mask)) }
        .map(drop)
        .map_err(io::Error::from)
}

/// Sets the length of the virtio header on the queue: TUNSETVNETHDRSZ.
///
/// # Errors
/// EINVAL below 10 bytes.
pub fn tun_set_header_size(fd: BorrowedFd<'_>, bytes: i32) -> io::Result<()> {
    // SAFETY: the pointer describes `bytes`, which lives through the call.
    unsafe { tun_ioctl::set_vnet_hdr_size(fd.as_raw_fd(), &bytes) }
        .map(drop)
        .map_err(io::Error::from)
}

/// `struct ifreq` as TUNSETIFF reads it: a name and flags.
#[repr(C)]
struct TunRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; TunRequest::REST],
}

impl TunRequest {
    /// What other requests use of the union: its size depends on the machine's pointers.
    const REST: usize = mem::size_of::<libc::ifreq>() - libc::IFNAMSIZ - mem::size_of::<libc::c_short>();
}

const _: () = assert!(mem::size_of::<TunRequest>() == mem::size_of::<libc::ifreq>());

/// Opens a queue of TUN device `name`, making the device if there is none: TUNSETIFF.
///
/// # Errors
/// ENOENT or ENODEV without /dev/net/tun, EPERM without CAP_NET_ADMIN, EBUSY if somebody has the device, EINVAL for a bad name.
pub fn tun_open(name: &str, flags: i32) -> io::Result<OwnedFd> {
    let mut request = TunRequest {
        name: [0; libc::IFNAMSIZ],
        flags: flags as libc::c_short,
        rest: [0; TunRequest::REST],
    };
    if name.is_empty() || name.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the path is a C string literal.
    let fd = check(unsafe {
        libc::open(
            c"/dev/net/tun".as_ptr(),
            libc::O_RDWR | libc::O_CLOEXEC | libc::O_NONBLOCK,
        )
    })?;
    // SAFETY: `fd` was just opened and belongs to nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // TUNSETIFF is declared with an int argument, yet takes a pointer to `ifreq`.
    // SAFETY: the pointer describes `request`, as large as `ifreq`, which lives through the call.
    unsafe { tun_ioctl::set_iff(fd.as_raw_fd(), ptr::from_mut(&mut request) as libc::c_ulong) }
        .map_err(io::Error::from)?;
    Ok(fd)
}

/// Name and flags of the device a queue belongs to: TUNGETIFF.
///
/// # Errors
/// EBADFD if the device is gone, ENOTTY if it is no TUN queue.
pub fn tun_described(fd: BorrowedFd<'_>) -> io::Result<(String, i32)> {
    let mut request = TunRequest {
        name: [0; libc::IFNAMSIZ],
        flags: 0,
        rest: [0; TunRequest::REST],
    };
    // TUNGETIFF is declared with an int argument, yet writes an `ifreq`.
    // SAFETY: the pointer describes `request`, as large as `ifreq`, which lives through the call.
    unsafe { tun_ioctl::get_iff(fd.as_raw_fd(), ptr::from_mut(&mut request).cast()) }
        .map_err(io::Error::from)?;
    let end = request.name.iter().position(|&byte| byte == 0);
    let name = &request.name[..end.unwrap_or(request.name.len())];
    // The flags are sixteen bits, the highest of which is one of them.
    Ok((
        String::from_utf8_lossy(name).into_owned(),
        i32::from(request.flags.cast_unsigned()),
    ))
}

/// Takes a descriptor that was passed to this process at its start, by its number; no program we start gets it.
///
/// # Errors
/// EBADF if it is not open.
pub fn adopt(number: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD on any number is harmless: EBADF if it is not open.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and the protocol of LISTEN_FDS makes it ours; each number is taken once, at the start.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Receives bytes from a socket, with the descriptors that came along; 0 at the end of the stream.
///
/// # Errors
/// The kernel's; EMFILE if there was no room for all descriptors: those that came are closed.
pub fn receive_descriptors(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    /// SCM_MAX_FD (include/net/scm.h).
    const MOST: usize = 253;
    // Of u64, for alignment: CMSG_SPACE of that many descriptors, and a header.
    let mut control = [0u64; (MOST * size_of::<libc::c_int>() + 64) / 8];
    let mut piece = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: all of it is numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut piece;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the pointers in `message` are to live buffers of the lengths given with them, borrowed mutably through the call.
    let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) };
    let len = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has filled `control` and set its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give null or a whole header within `control`, which is aligned for one.
        let (level, kind, whole) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            // SAFETY: as above; CMSG_LEN computes, and CMSG_DATA points to what the kernel wrote after the header.
            let (data, head) = unsafe { (libc::CMSG_DATA(header), libc::CMSG_LEN(0) as usize) };
            for at in 0..whole.saturating_sub(head) / size_of::<libc::c_int>() {
                // SAFETY: so many numbers are there by the header's length; they may lie unaligned.
                let number = unsafe { ptr::read_unaligned(data.cast::<libc::c_int>().add(at)) };
                // SAFETY: the kernel just made this descriptor for us.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: `header` is one of `message`.
        header = unsafe { libc::CMSG_NXTHDR(&message, header) };
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        // The kernel says no more than that; with room for all it may send, what lacks is descriptors.
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    Ok((len, descriptors))
}

/// Takes over a descriptor that a library made.
///
/// # Errors
/// The descriptor is not open.
pub fn duplicate(fd: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC on any number is harmless: EBADF if it is not open.
    let new = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Asks for huge pages behind `memory`: MADV_HUGEPAGE.
///
/// # Errors
/// EINVAL from a kernel without transparent huge pages; the memory serves as it is.
pub fn advise_huge_pages(memory: &mut [u8]) -> io::Result<()> {
    // SAFETY: the advice changes no contents; the range is borrowed mutably and belongs to one allocation. Only whole pages may be named,
    // and the start of an arena is 2 MiB aligned; the kernel refuses others.
    let result = unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
    check(result).map(drop)
}

/// Has the allocator map every block of a megabyte or more by itself, so that it goes back to the kernel when it is freed and is untouched
/// when it comes: otherwise glibc keeps the packet buffers of a device that is gone, and clears them for the next one, which is
/// to write to every page of them.
pub fn map_large_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number within the allocator, which takes any; setting it also keeps it from changing. It takes a lock of its own.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// Which of the descriptors waited for are ready, by their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready(u32);

impl Ready {
    /// Whether any is.
    pub fn any(self) -> bool {
        self.0 != 0
    }

    /// Whether the first one is.
    pub fn first(self) -> bool {
        self.0 & 1 != 0
    }
}

/// Waits until one of `fds` is ready to read, or `timeout_ms` has passed. An interrupted wait finds none ready.
///
/// # Errors
/// The kernel's.
pub fn wait_readable<'fd>(
    fds: impl IntoIterator<Item = BorrowedFd<'fd>>,
    timeout_ms: i32,
) -> io::Result<Ready> {
    wait(fds, libc::POLLIN, timeout_ms)
}

/// Waits until `fd` takes more to send, or `timeout_ms` has passed.
///
/// # Errors
/// The kernel's.
pub fn wait_writable(fd: BorrowedFd<'_>, timeout_ms: i32) -> io::Result<Ready> {
    wait([fd], libc::POLLOUT, timeout_ms)
}

/// Descriptors one wait may watch: a device, two sockets and a stop signal, with room to spare.
const MAX_WAITED: usize = 8;

fn wait<'fd>(
    fds: impl IntoIterator<Item = BorrowedFd<'fd>>,
    events: libc::c_short,
    timeout_ms: i32,
) -> io::Result<Ready> {
    let mut polled = [libc::pollfd {
        fd: -1,
        events,
        revents: 0,
    }; MAX_WAITED];
    let mut count = 0;
    for (slot, fd) in polled.iter_mut().zip(fds) {
        slot.fd = fd.as_raw_fd();
        count += 1;
    }
    // SAFETY: the pointer and count describe `polled`, which lives through the call.
    let result = unsafe { libc::poll(polled.as_mut_ptr(), count, timeout_ms) };
    match check(result) {
        Ok(_) => {
            let ready = polled
                .iter()
                .enumerate()
                .filter(|(_, polled)| polled.revents != 0);
            Ok(Ready(ready.fold(0, |bits, (index, _)| bits | 1 << index)))
        }
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Ready(0)),
        Err(error) => Err(error),
    }
}

/// Whether two descriptors of this process are of one open file, as a service manager asks before it keeps a second: kcmp(2). What cannot be
/// compared is not.
pub fn is_same_open_file(one: &impl AsFd, other: &impl AsFd) -> bool {
    /// linux/kcmp.h
    const KCMP_FILE: libc::c_int = 0;
    let pid = std::process::id();
    let [one, other] = [one.as_fd(), other.as_fd()].map(|fd| libc::c_long::from(fd.as_raw_fd()));
    // SAFETY: it compares numbers that the kernel looks up, and writes nothing.
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) == 0 }
}

/// What a process in a [sandbox](crate::host::sandbox) must not be able to do, and for which there is no safe wrapper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// Being traced by its parent.
    Ptrace,
    /// `bpf`.
    Bpf,
    /// Loading a kernel module.
    Module,
    /// A ring of its own for system calls.
    IoUring,
    /// Memory that can be written and executed.
    ExecutableMemory,
}

/// Tries it, in a way that does nothing if it succeeds; for tests of a sandbox. What succeeds may fail with another error than EPERM.
///
/// # Errors
/// The kernel's.
pub fn attempt(escape: Escape) -> io::Result<()> {
    let number = match escape {
        Escape::Ptrace => libc::SYS_ptrace,
        Escape::Bpf => libc::SYS_bpf,
        Escape::Module => libc::SYS_finit_module,
        Escape::IoUring => libc::SYS_io_uring_setup,
        Escape::ExecutableMemory => {
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            // SAFETY: a new anonymous mapping where the kernel likes touches no memory of ours.
            let mapped = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, flags, -1, 0) };
            if mapped == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: nobody else knows of the mapping, which is that large.
            unsafe { libc::munmap(mapped, 4096) };
            return Ok(());
        }
    };
    // Of the first argument: no such descriptor; 0 is PTRACE_TRACEME, BPF_MAP_CREATE without attributes, and a ring of no entries.
    let first: libc::c_long = if escape == Escape::Module { -1 } else { 0 };
    // SAFETY: with null and zero behind the first argument, none of these calls reads or writes memory.
    let result = unsafe { libc::syscall(number, first, 0, 0, 0, 0, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_addresses_survive_the_kernels_form() {
        for text in ["192.0.2.1:8285", "[2001:db8::1]:8472", "[fe80::1%3]:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(RawAddr::from(addr).parse(), Some(addr), "{text}");
        }
        assert_eq!(RawAddr::zeroed().parse(), None);
    }

    #[test]
    fn a_bad_device_name_is_refused_before_the_kernel_sees_it() {
        for name in ["", "a-name-of-more-than-fifteen-bytes"] {
            assert_eq!(
                tun_open(name, 0).unwrap_err().raw_os_error(),
                Some(libc::EINVAL),
                "{name:?}"
            );
        }
    }

    #[test]
    fn descriptors_that_come_where_there_is_no_room_for_all_are_closed() {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        use std::os::unix::net::UnixStream;

        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let numbers = [theirs.as_raw_fd(); 3];
        let send = || {
            let piece = [io::IoSlice::new(b"x")];
            let control = [ControlMessage::ScmRights(&numbers)];
            sendmsg::<()>(theirs.as_raw_fd(), &piece, &control, MsgFlags::empty(), None).unwrap();
        };
        send();
        let (len, descriptors) = receive_descriptors(ours.as_fd(), &mut [0; 8]).unwrap();
        assert_eq!((len, descriptors.len()), (1, 3));
        drop(descriptors);

        send();
        let before = open();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        // Room for two more, with no gaps below: the lowest free number is that of the next one.
        let next = std::fs::File::open("/dev/null").unwrap();
        let limit = u64::try_from(next.as_raw_fd()).unwrap() + 2;
        drop(next);
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
        let refused = receive_descriptors(ours.as_fd(), &mut [0; 8]).unwrap_err();
        setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::EMFILE));
        assert_eq!(open(), before, "those that came are still open");
    }
}
