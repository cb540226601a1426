//! Seccomp: which system calls can be made.
//!
//! Two lists, each of what is allowed; everything else gets EPERM, which a library can live with and a test can see. The list for threads that
//! move packets comes on top of the process's. `clone3` hides its flags from filters, so it is said to be missing (ENOSYS) and the C library
//! uses `clone`, which is allowed for threads only.
//!
//! For x86_64, aarch64 and riscv64, which seccompiler makes filters for; elsewhere `no_syscalls.rs` stands in for this file.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use super::{Role, SandboxError, Sockets};
use crate::host::probe::Probed;

/// What the process may do: files, sockets, memory, threads, time.
const PROCESS: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_brk,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_ioctl,
    libc::SYS_linkat,
    libc::SYS_listen,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mkdirat,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_prlimit64,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_renameat2,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_sendfile,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_socketpair,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_sync_file_range,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_umask,
    libc::SYS_uname,
    libc::SYS_unlinkat,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Calls of older ports, which newer ones do by others.
#[cfg(target_arch = "x86_64")]
const PROCESS_OLDER: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_chmod,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_link,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_rmdir,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
    libc::SYS_unlink,
];
/// The first call of its name on the newer ports: C library and rustix rename a file by it.
#[cfg(target_arch = "aarch64")]
const PROCESS_OLDER: &[c_long] = &[libc::SYS_renameat];
#[cfg(target_arch = "riscv64")]
const PROCESS_OLDER: &[c_long] = &[];

/// What a thread may do that moves packets: the two halves of a batch, waiting, memory, a log line, its end.
const QUEUE: &[c_long] = &[
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_munmap,
    POLL,
    libc::SYS_readv,
    libc::SYS_recvmmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmmsg,
    libc::SYS_sendto,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

#[cfg(target_arch = "x86_64")]
const POLL: c_long = libc::SYS_poll;
#[cfg(not(target_arch = "x86_64"))]
const POLL: c_long = libc::SYS_ppoll;

/// What SIDs take besides: a look at a route's MTU, and clearing a socket's errors away.
const SIDS: &[c_long] = &[
    libc::SYS_connect,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
];

/// Families the process opens sockets of.
const FAMILIES: [i32; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Filters this thread, and those it spawns.
pub(super) fn filter_process(sockets: Sockets) -> Result<Probed, SandboxError> {
    let Some(arch) = arch() else {
        return Ok(Probed::Missing);
    };
    let hidden = [(libc::SYS_clone3, Vec::new())].into();
    let hidden = compile(
        hidden,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        arch,
    )?;
    let mut rules = always(&[PROCESS, PROCESS_OLDER]);
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(
        libc::SYS_clone,
        vec![when(0, SeccompCmpOp::MaskedEq(thread), thread)?],
    );
    let families = FAMILIES.map(|family| when(0, SeccompCmpOp::Eq, family as u64));
    let mut families = families.into_iter().collect::<Result<Vec<_>, _>>()?;
    if sockets == Sockets::Packet {
        families.push(when_all(&[
            (0, SeccompCmpOp::Eq, libc::AF_PACKET as u64),
            (2, SeccompCmpOp::Eq, 0),
        ])?);
    }
    rules.insert(libc::SYS_socket, families);
    rules.extend(memory()?);
    let allowed = allow(rules, arch)?;
    // The kernel may have none of this: then the first of them is refused, and nothing has happened.
    if let Err(error) = apply_filter(&hidden) {
        tracing::debug!(%error, "no seccomp filter");
        return Ok(Probed::Missing);
    }
    apply(&allowed)?;
    Ok(Probed::On)
}

/// Filters this thread further.
pub(super) fn filter_thread(role: Role) -> Result<(), SandboxError> {
    let Some(arch) = arch() else { return Ok(()) };
    let mut rules = match role {
        Role::Queue => always(&[QUEUE]),
        Role::Sids => always(&[QUEUE, SIDS]),
    };
    if role == Role::Sids {
        let families = [libc::AF_INET, libc::AF_INET6].map(|family| when(0, SeccompCmpOp::Eq, family as u64));
        rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
    }
    rules.extend(no_code()?);
    apply(&allow(rules, arch)?)
}

/// Memory that is written is not executed: not both at once, and not one after the other.
fn memory() -> Result<Rules, SandboxError> {
    let (write, execute) = (libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
    Ok([
        (
            libc::SYS_mmap,
            vec![
                when(2, SeccompCmpOp::MaskedEq(write), 0)?,
                when(2, SeccompCmpOp::MaskedEq(execute), 0)?,
            ],
        ),
        (
            libc::SYS_mprotect,
            vec![when(2, SeccompCmpOp::MaskedEq(execute), 0)?],
        ),
    ]
    .into())
}

/// No memory is executed that is not executed already.
fn no_code() -> Result<Rules, SandboxError> {
    let rule = || when(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
    Ok([
        (libc::SYS_mmap, vec![rule()?]),
        (libc::SYS_mprotect, vec![rule()?]),
    ]
    .into())
}

fn always(lists: &[&[c_long]]) -> Rules {
    let calls = lists.iter().flat_map(|list| list.iter());
    calls.map(|&call| (call, Vec::new())).collect()
}

/// A call is allowed when its argument is so.
fn when(argument: u8, operation: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    when_all(&[(argument, operation, value)])
}

/// A call is allowed when its arguments are all so.
fn when_all(arguments: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, SandboxError> {
    let conditions = arguments.iter().map(|(argument, operation, value)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operation.clone(), *value)
    });
    conditions
        .collect::<Result<_, _>>()
        .and_then(SeccompRule::new)
        .map_err(unusable)
}

fn allow(rules: Rules, arch: TargetArch) -> Result<BpfProgram, SandboxError> {
    compile(
        rules,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
        arch,
    )
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
    arch: TargetArch,
) -> Result<BpfProgram, SandboxError> {
    SeccompFilter::new(rules, otherwise, listed, arch)
        .and_then(BpfProgram::try_from)
        .map_err(unusable)
}

fn apply(program: &BpfProgram) -> Result<(), SandboxError> {
    apply_filter(program).map_err(|error| SandboxError::new("filter system calls", io::Error::other(error)))
}

fn unusable(error: seccompiler::BackendError) -> SandboxError {
    SandboxError::new("make a filter of system calls", io::Error::other(error))
}

/// The machine, if filters for it can be made.
fn arch() -> Option<TargetArch> {
    TargetArch::try_from(std::env::consts::ARCH).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_moves_packets_has_twenty_calls_all_of_them_the_processs() {
        // mmap and mprotect, with conditions, make two more.
        assert!(QUEUE.len() + 2 <= 20, "{}", QUEUE.len());
        for call in QUEUE.iter().chain(SIDS) {
            assert!(PROCESS.contains(call) || PROCESS_OLDER.contains(call), "{call}");
        }
    }

    #[test]
    fn what_breaks_out_is_on_no_list() {
        let forbidden = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_bpf,
            libc::SYS_mount,
            libc::SYS_init_module,
            libc::SYS_finit_module,
            libc::SYS_kexec_load,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_process_vm_writev,
            libc::SYS_keyctl,
            libc::SYS_io_uring_setup,
            libc::SYS_perf_event_open,
            libc::SYS_userfaultfd,
            libc::SYS_setuid,
            libc::SYS_kill,
        ];
        for call in forbidden {
            assert!(
                !PROCESS.contains(&call) && !PROCESS_OLDER.contains(&call),
                "{call}"
            );
        }
    }

    #[test]
    fn the_filters_can_be_made_for_this_machine() {
        let arch = arch().expect("a machine that tests run on");
        let mut rules = always(&[PROCESS, PROCESS_OLDER]);
        rules.extend(memory().unwrap());
        assert!(allow(rules, arch).unwrap().len() < 4096);
        let mut rules = always(&[QUEUE, SIDS]);
        rules.extend(no_code().unwrap());
        allow(rules, arch).unwrap();
    }
}
