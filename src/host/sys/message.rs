//! Many datagrams a call: `sendmmsg` and `recvmmsg`, with control messages of its own for each.

use std::io;
use std::mem;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::address::RawAddr;
use super::option::IPV6_FLOWINFO;
use super::{MAX_PIECES, check};
use crate::dataplane::datagram::{DATAGRAM_SLOTS, DatagramBatch, Envelope};
use crate::wire::ip::Ecn;

/// Bytes of control data a message: room for UDP_GRO or UDP_SEGMENT, SO_RXQ_OVFL and a traffic class; or what an IPv6
/// header said: destination, traffic class, hop limit and flow label; each with its header.
const CONTROL_BYTES: usize = 144;

/// Control data, aligned as `cmsghdr` wants.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

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

/// What the kernel is told of a message besides its bytes.
pub struct Outgoing {
    addr: RawAddr,
    control: Control,
    control_len: usize,
}

impl From<MessageTo> for Outgoing {
    #[inline]
    fn from(message: MessageTo) -> Self {
        let (control, control_len) = send_control(&message);
        Self {
            addr: message.to.into(),
            control,
            control_len,
        }
    }
}

impl From<LinkTo> for Outgoing {
    #[inline]
    fn from(to: LinkTo) -> Self {
        Self {
            addr: RawAddr::on_link(to.index, to.mac),
            control: Control([0; CONTROL_BYTES]),
            control_len: 0,
        }
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
    M: Into<Outgoing>,
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
        let message: Outgoing = message.into();
        header.msg_hdr.msg_controllen = message.control_len as _;
        scratch.headers.push(header);
        scratch.addrs.push(message.addr);
        scratch.controls.push(message.control);
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
