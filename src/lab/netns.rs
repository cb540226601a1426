//! Network namespaces with names, as `ip netns` knows them.
//!
//! A namespace lives as long as something refers to it: here a bind mount on `/run/netns/<name>`, made by a thread that
//! has stepped into a fresh one. Entering is `setns` on a thread of its own, which ends afterwards; no other thread of
//! this process ever changes its namespace, and no code runs between fork and exec of a child.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::{io, thread};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;

use crate::host::netlink::Netlink;

const FOLDER: &str = "/run/netns";

/// A named network namespace, removed on drop if this process made it and did not say [`Namespace::keep`].
#[derive(Debug)]
pub struct Namespace {
    name: String,
    owned: bool,
}

impl Namespace {
    /// Makes a namespace with loopback up and IPv6 addresses usable without waiting.
    ///
    /// # Errors
    /// The name is taken, or we are not root.
    pub fn create(name: &str) -> Result<Self> {
        let path = path(name);
        prepare_folder().with_context(|| format!("cannot prepare {FOLDER}"))?;
        File::create_new(&path).with_context(|| format!("cannot create namespace {name:?}"))?;
        // From here on the guard removes what has been made so far.
        let namespace = Self {
            name: name.to_owned(),
            owned: true,
        };
        on_thread(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).context("unshare")?;
            nix::mount::mount(
                Some("/proc/thread-self/ns/net"),
                &path,
                None::<&str>,
                MsFlags::MS_BIND,
                None::<&str>,
            )
            .context("bind mount")
        })
        .with_context(|| format!("cannot make namespace {name:?}"))?;
        namespace.netlink(async |netlink| Ok(netlink.set_up(netlink.link("lo").await?.index).await?))?;
        for scope in ["all", "default"] {
            // Links on a lab's wire have no duplicates, and detecting that takes more than a second.
            let _ = namespace.sysctl(&format!("ipv6/conf/{scope}/accept_dad"), "0");
        }
        Ok(namespace)
    }

    /// Refers to a namespace someone else made, which stays.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn existing(name: &str) -> Result<Self> {
        if !path(name).exists() {
            bail!("there is no namespace {name:?}");
        }
        Ok(Self {
            name: name.to_owned(),
            owned: false,
        })
    }

    /// Leaves the namespace in place when this value goes.
    pub fn keep(&mut self) {
        self.owned = false;
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Opens it, to hand to the kernel.
    ///
    /// # Errors
    /// It is gone.
    pub fn open(&self) -> Result<File> {
        File::open(path(&self.name)).with_context(|| format!("cannot open namespace {:?}", self.name))
    }

    /// Runs `work` on a thread inside and waits for it.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `work` says.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = self.open()?;
        on_thread(move || {
            nix::sched::setns(namespace, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("cannot enter namespace {:?}", self.name))?;
            work()
        })
    }

    /// Starts a command inside.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the program not started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.run(|| {
            let program = command.get_program().to_owned();
            command
                .spawn()
                .with_context(|| format!("cannot start {}", program.display()))
        })
    }

    /// Runs `work` with a netlink connection to the inside.
    ///
    /// # Errors
    /// What `work` says.
    pub fn netlink<T: Send>(&self, work: impl AsyncFnOnce(Netlink) -> Result<T> + Send) -> Result<T> {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async { work(Netlink::open()?).await })
        })
        .with_context(|| format!("in namespace {:?}", self.name))
    }

    /// Sets a kernel switch inside, by its path under `/proc/sys/net`.
    ///
    /// # Errors
    /// There is no such switch, or it is not per namespace.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        self.run(|| Ok(crate::host::sysctl::set(key, value)?))
    }

    /// The names of all namespaces on this machine that begin with `prefix`.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn names(prefix: &str) -> Result<Vec<String>> {
        let entries = match fs::read_dir(FOLDER) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {FOLDER}")),
        };
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect();
        names.sort();
        Ok(names)
    }

    /// The processes inside a namespace, by name; none if it is gone.
    ///
    /// # Errors
    /// The processes cannot be listed.
    pub fn processes(name: &str) -> Result<Vec<u32>> {
        let Ok(namespace) = fs::metadata(path(name)) else {
            return Ok(Vec::new());
        };
        let is_inside = |process: &Path| {
            let theirs = fs::metadata(process.join("ns/net"));
            theirs.is_ok_and(|theirs| (theirs.dev(), theirs.ino()) == (namespace.dev(), namespace.ino()))
        };
        let entries = fs::read_dir("/proc").context("cannot list the processes")?;
        let processes = entries.flatten().filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            is_inside(&entry.path()).then_some(pid)
        });
        Ok(processes.collect())
    }

    /// Removes a namespace by name; one that is gone already is no error. Processes inside keep running.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(name: &str) -> Result<()> {
        let path = path(name);
        match nix::mount::umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: the file is there, but nothing is mounted on it.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(error) => return Err(error).with_context(|| format!("cannot unmount {}", path.display())),
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Err(error) = Self::remove(&self.name) {
            tracing::warn!(namespace = %self.name, error = %format!("{error:#}"), "namespace stays behind");
        }
    }
}

/// Makes the folder a mount point of its own, as `ip netns add` does, and under the same lock.
///
/// Without that, the first `ip netns add` on this machine would mount the folder over itself, namespaces included;
/// each then has a second mount below, out of reach, and cannot be removed any more. The mount stays, as iproute2's
/// does.
fn prepare_folder() -> Result<()> {
    fs::create_dir_all(FOLDER)?;
    let lock = File::open(FOLDER)?;
    lock.lock()?;
    let mount = |source, flags| nix::mount::mount(source, FOLDER, None::<&str>, flags, None::<&str>);
    let share = MsFlags::MS_SHARED | MsFlags::MS_REC;
    match mount(Some("none"), share) {
        // EINVAL: the folder is no mount point yet.
        Err(nix::errno::Errno::EINVAL) => {
            mount(Some(FOLDER), MsFlags::MS_BIND | MsFlags::MS_REC)?;
            mount(Some("none"), share)?;
        }
        other => other?,
    }
    Ok(())
}

fn path(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// Runs `work` on a thread that ends afterwards, and with it whatever namespace the thread stepped into.
fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
