//! Socket options: integers, and filters of what a socket receives.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::check;

/// `IPV6_FLOWINFO` of linux/in6.h: as an option, asks for traffic class and flow label; as control data, has them.
pub const IPV6_FLOWINFO: i32 = 11;

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
