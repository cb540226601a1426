//! One packet in pieces: `readv` and `writev`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::MAX_PIECES;

/// Scratch memory for [`read_scattered`], kept between calls.
#[derive(Default)]
pub struct ReadScratch(Vec<libc::iovec>);

// SAFETY: the raw pointers inside are written anew by every call before the kernel sees them and never followed otherwise.
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
