//! Waiting for descriptors: `poll`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::check;

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
