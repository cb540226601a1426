//! TUN devices: opening a queue, and the ioctls that shape it.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use super::check;

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
