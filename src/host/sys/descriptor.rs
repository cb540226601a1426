//! File descriptors: taken over, received from another process, duplicated and compared.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use super::check;

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

#[cfg(test)]
mod tests {
    use super::*;

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
