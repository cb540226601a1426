//! What a process in a [sandbox](crate::host::sandbox) must not be able to do.

use std::io;
use std::ptr;

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
