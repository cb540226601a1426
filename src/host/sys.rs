//! System calls that no safe wrapper offers: one function a call, safe types in and out.
//!
//! A file a subject: datagrams and their control messages ([`send_messages`], [`recv_datagrams`]), packets in pieces, TUN devices, socket
//! options and filters, descriptors, waiting, memory. All of it is used as `sys::name`.

#![expect(
    unsafe_code,
    reason = "the one place for it, with its folder; every block says why it holds"
)]

use std::io;

mod address;
mod descriptor;
mod escape;
mod memory;
mod message;
mod option;
mod pieces;
mod tun;
mod wait;

pub use descriptor::{adopt, duplicate, is_same_open_file, receive_descriptors};
pub use escape::{Escape, attempt};
pub use memory::{advise_huge_pages, map_large_blocks};
pub use message::{LinkTo, MessageTo, Outgoing, RecvScratch, SendScratch, recv_datagrams, send_messages};
pub use option::{
    BPF_INTERFACE, BPF_NET_OFFSET, BpfInstruction, IPV6_FLOWINFO, attach_filter, option, set_option,
};
pub use pieces::{ReadScratch, read_scattered, write_pieces};
pub use tun::{tun_described, tun_open, tun_set_header_size, tun_set_offload};
pub use wait::{Ready, wait_readable, wait_writable};

/// Pieces of one message: UIO_MAXIOV.
const MAX_PIECES: usize = 1024;

/// Turns -1 into the error of the call.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
