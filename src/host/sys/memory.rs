//! Memory: what the kernel and the allocator are to know of large blocks.

use std::io;

use super::check;

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
