//! What the process gives up once it needs it no more.
//!
//! # Theory of operation
//!
//! All of it happens on the first thread before there is a second, so that every later thread is born inside; a thread that moves packets
//! then gives up what is left but for a score of system calls.
//!
//! ```text
//!  start ─▶ 1 user, capabilities   a node: CAP_NET_ADMIN, CAP_NET_RAW stay, and CAP_NET_BIND_SERVICE if a flag names a port that takes it;
//!                                  a server: none; bounding set the same; no_new_privs, dumpable 0, umask 077
//!           2 Landlock             reads and writes below the named paths only
//!           3 seccomp              no execve, no fork, no ptrace, bpf, mount, module …: EPERM
//!                  │
//!                  ├─▶ main, and what it spawns: as above
//!                  └─▶ a thread that moves packets: no capability at all, and a filter of its own on top
//! ```
//!
//! Each part is asked for by doing it. What the kernel does not have is left out and told ([`report`]); each can be switched off. What is still
//! possible inside is what the daemon does for as long as it lives: make its device, open its sockets, change links, addresses and routes,
//! write its own files.
//!
//! # Limits
//!
//! CAP_NET_ADMIN alone is mighty over the network namespace. A file that is replaced in a folder that is not named is out of reach from then
//! on; [`Plan::read_file`] says what it does about that.

mod capabilities;
mod filesystem;
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64", target_arch = "riscv64")),
    path = "sandbox/no_syscalls.rs"
)]
mod syscalls;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid};

use crate::host::probe::Probed;
pub use crate::host::sys::{Escape, attempt};
pub use capabilities::may_change_network;

/// Whoever started us does not let us: what a part says in place of what it did.
const REFUSED: &str = "off (refused)";

/// A part of the sandbox that can be switched off by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Capabilities, and with them `no_new_privs`, `dumpable` and the umask.
    Capabilities,
    /// Where files may be read and written.
    Landlock,
    /// Which system calls may be made.
    Seccomp,
}

impl Part {
    /// All of them, in the order in which they come.
    pub const ALL: [Self; 3] = [Self::Capabilities, Self::Landlock, Self::Seccomp];

    /// Its name in status and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "capabilities",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        }
    }
}

/// Somebody else to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Account {
    /// User.
    pub uid: Uid,
    /// Its group, and the only one.
    pub gid: Gid,
}

/// Which capabilities stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kept {
    /// What a node uses for as long as it lives.
    #[default]
    Node,
    /// The same, and that for ports below 1024.
    NodeOnLowPorts,
    /// None.
    None,
}

/// What is to be given up, and what stays.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    parts: BTreeSet<Part>,
    account: Option<Account>,
    kept: Kept,
    reads: BTreeSet<PathBuf>,
    writes: BTreeSet<PathBuf>,
    devices: BTreeSet<PathBuf>,
    sockets: Sockets,
}

/// Which sockets may be opened besides those of every node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sockets {
    /// None.
    #[default]
    Plain,
    /// Packet sockets that send.
    Packet,
}

/// Folders that hold more than one program's files: a file in one of them does not open it.
const SHARED: [&str; 12] = [
    "/", "/etc", "/home", "/mnt", "/opt", "/root", "/run", "/srv", "/tmp", "/usr", "/var", "/var/lib",
];

impl Plan {
    /// A plan of these parts, which leaves nothing to be read or written; and whom to become.
    pub fn new(parts: BTreeSet<Part>, account: Option<Account>) -> Self {
        Self {
            parts,
            account,
            ..Self::default()
        }
    }

    /// Keeps what ports below 1024 take.
    pub fn low_ports(&mut self) {
        self.kept = Kept::NodeOnLowPorts;
    }

    /// Keeps no capability at all.
    pub fn without_capabilities(mut self) -> Self {
        self.kept = Kept::None;
        self
    }

    /// Lets files below `path` be read.
    pub fn read(&mut self, path: impl Into<PathBuf>) {
        self.reads.insert(path.into());
    }

    /// Lets a file be read; also one that later takes its place, unless it lies in a folder of everybody's such as `/etc`.
    pub fn read_file(&mut self, path: &Path) {
        self.read(path);
        if let Ok(whole) = path.canonicalize()
            && let Some(folder) = whole.parent().filter(|folder| !is_shared(folder))
        {
            self.read(folder);
        }
        if let Some(folder) = path.parent().filter(|folder| !is_shared(folder)) {
            self.read(folder);
        }
    }

    /// Lets files below folder `path` be read, written, made and removed.
    pub fn write(&mut self, path: impl Into<PathBuf>) {
        self.writes.insert(path.into());
    }

    /// Lets packet sockets be opened, of no protocol: they send.
    pub fn packet_sockets(&mut self) {
        self.sockets = Sockets::Packet;
    }

    /// Lets a device be used.
    pub fn device(&mut self, path: impl Into<PathBuf>) {
        self.devices.insert(path.into());
    }
}

fn is_shared(folder: &Path) -> bool {
    folder.as_os_str().is_empty() || SHARED.iter().any(|shared| Path::new(shared) == folder)
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It moves packets between a device and sockets that are open already.
    Queue,
    /// The same, and asks the kernel for routes: what SIDs say.
    Sids,
}

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct SandboxError {
    doing: String,
    #[source]
    source: io::Error,
}

impl SandboxError {
    fn new(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self {
            doing: doing.into(),
            source: source.into(),
        }
    }
}

/// What came of a part, in words.
#[derive(Clone, Debug, Default)]
struct State {
    told: BTreeMap<String, String>,
    capabilities: bool,
    seccomp: bool,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// Enters the sandbox for good: this thread, and all it spawns.
///
/// # Errors
/// The user cannot be changed, or a part that the kernel has fails; a part it does not have is left out and told.
pub fn enter(plan: &Plan) -> Result<(), SandboxError> {
    let mut state = State::default();
    let wanted = |part| plan.parts.contains(&part);
    if wanted(Part::Capabilities) {
        umask(Mode::from_bits_truncate(0o077));
    }
    let kept = capabilities::reduce(plan.account, wanted(Part::Capabilities), plan.kept)?;
    state.capabilities = kept.as_deref().is_some_and(|kept| kept != REFUSED);
    state.tell(
        Part::Capabilities,
        kept.unwrap_or_else(|| Probed::Forced.describe().to_owned()),
    );
    if let Some(account) = plan.account {
        state.told.insert("user".to_owned(), account.uid.to_string());
    }
    if !plan.parts.is_empty() {
        prctl::set_no_new_privs().map_err(|error| SandboxError::new("set no_new_privs", error))?;
        prctl::set_dumpable(false).map_err(|error| SandboxError::new("forbid core dumps", error))?;
    }
    let landlock = if wanted(Part::Landlock) {
        filesystem::restrict(&plan.reads, &plan.writes, &plan.devices)?
    } else {
        Probed::Forced.describe().to_owned()
    };
    state.tell(Part::Landlock, landlock);
    let seccomp = if wanted(Part::Seccomp) {
        syscalls::filter_process(plan.sockets)?
    } else {
        Probed::Forced
    };
    state.seccomp = seccomp.is_on();
    state.tell(Part::Seccomp, seccomp.describe().to_owned());
    *lock() = Some(state);
    Ok(())
}

/// What the tools of a firewall and their libraries lie below.
const PROGRAMS: [&str; 7] = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/libexec"];
/// What they read besides: the loader's and the C library's, names of protocols, of marks and tables; which old tables there are, and what
/// would load a module.
const TOOLS_READ: [&str; 14] = [
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/protocols",
    "/etc/services",
    "/etc/ethertypes",
    "/etc/iproute2",
    "/etc/xtables",
    "/etc/xtables.conf",
    "/proc/self/net",
    "/proc/sys/kernel/modprobe",
];
/// The lock that all who use the old iptables share.
const TOOLS_LOCK: &str = "/run/xtables.lock";
/// What they write.
const TOOLS_WRITE: [&str; 2] = [TOOLS_LOCK, "/dev/null"];

/// Gives up what firewall tools do not need, for a process that does nothing but run them; of `parts`, system calls are not filtered.
///
/// # Errors
/// A part that the kernel has fails.
pub fn enter_for_tools(parts: &[Part]) -> Result<(), SandboxError> {
    if parts.is_empty() {
        return Ok(());
    }
    if parts.contains(&Part::Capabilities) {
        umask(Mode::from_bits_truncate(0o077));
        capabilities::hand_on()?;
    }
    prctl::set_no_new_privs().map_err(|error| SandboxError::new("set no_new_privs", error))?;
    prctl::set_dumpable(false).map_err(|error| SandboxError::new("forbid core dumps", error))?;
    if parts.contains(&Part::Landlock) {
        // Afterwards nobody here can. Who is not root finds one of root's, or none: then the old iptables will say so.
        let _ = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(TOOLS_LOCK);
        filesystem::restrict_to_programs(&PROGRAMS, &TOOLS_READ, &TOOLS_WRITE)?;
    }
    Ok(())
}

impl State {
    fn tell(&mut self, part: Part, what: String) {
        self.told.insert(part.name().to_owned(), what);
    }
}

/// Gives up what a thread of this role does not need; for the thread itself to call first. Does nothing if the process is in no sandbox.
///
/// # Errors
/// The kernel refuses what it granted the process.
pub fn enter_thread(role: Role) -> Result<(), SandboxError> {
    let state = lock().clone();
    let Some(state) = state else { return Ok(()) };
    if state.capabilities {
        capabilities::give_up_all()?;
    }
    if state.seccomp {
        syscalls::filter_thread(role)?;
    }
    Ok(())
}

/// What has been given up, by part; empty if the process is in no sandbox.
pub fn report() -> BTreeMap<String, String> {
    lock()
        .as_ref()
        .map(|state| state.told.clone())
        .unwrap_or_default()
}

fn lock() -> std::sync::MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_opens_its_folder_unless_the_folder_is_everybodys() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ca.pem");
        std::fs::write(&file, "x").unwrap();
        let mut plan = Plan::default();
        plan.read_file(&file);
        assert!(
            plan.reads.contains(&file) && plan.reads.contains(dir.path()),
            "{plan:?}"
        );
        let mut plan = Plan::default();
        plan.read_file(Path::new("/etc/hostname"));
        assert!(!plan.reads.contains(Path::new("/etc")), "{plan:?}");
        plan.read_file(Path::new("name-without-a-folder"));
        assert!(!plan.reads.contains(Path::new("")), "{plan:?}");
    }

    #[test]
    fn a_process_in_no_sandbox_has_nothing_to_tell_and_its_threads_are_free() {
        assert!(report().is_empty());
        assert!(enter_thread(Role::Queue).is_ok());
    }
}
