//! Folders that root makes for the account it is about to become, and what root left in them.
//!
//! # Theory of operation
//!
//! Whoever may write to a folder decides what its names lead to, and the account this is about is one that may have been taken over. So root
//! goes from name to name with descriptors, and changes nothing but what it holds one of:
//!
//! - A link on the way counts only if root made it. One of somebody else's is refused, wherever it leads.
//! - A new folder is made in a folder that is open, opened without following links, and must be root's to be given away.
//! - Of what lies in a folder, files and folders that are *root's* are given, as an earlier life as root left them. Links are not followed. A
//!   file with a second name may be one of elsewhere, and stays; so does what belongs to a third.
//!
//! # Limits
//!
//! Where `fs.protected_hardlinks` is off, the account can keep the last name of a file of root's that root removes, and be given it.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{Uid, fchownat};

use crate::host::sandbox::Account;

/// How many links there may be on the way to a folder: the kernel's limit.
const MOST_LINKS: usize = 40;

/// A folder cannot be made, or cannot be the account's.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The account could not write where it must.
    #[error("user {user} may not write to {}, which belongs to user {owner}; chown it", .folder.display())]
    Foreign {
        /// Whom we should become.
        user: Uid,
        /// The folder.
        folder: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Somebody but root decides where the path leads.
    #[error(
        "{} is a link that belongs to user {owner}; as root, only links of root's are followed to a folder for user {user}",
        .path.display()
    )]
    Link {
        /// The link.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whom we should become.
        user: Uid,
    },
    /// A folder cannot be given to the account.
    #[error("cannot give {} to user {user}", .path.display())]
    Give {
        /// What.
        path: PathBuf,
        /// To whom.
        user: Uid,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A folder that is open, and where it was found.
struct Folder {
    descriptor: OwnedFd,
    path: PathBuf,
}

/// Makes a folder for the account, with those above it; one that is there must be one the account may write to. What the system refuses is
/// told by whoever uses the folder, who also knows what for.
///
/// # Errors
/// It is somebody else's, or behind somebody else's link, or cannot be given.
pub fn prepare(folder: &Path, mode: u32, account: Account) -> Result<(), FolderError> {
    let walk = Walk::new(account, Some(mode));
    let Some((folder, made)) = walk.to(folder)? else {
        return Ok(());
    };
    let Ok(stat) = fstat(&folder.descriptor) else {
        return Ok(());
    };
    if made || is_writable(&stat, account) {
        return Ok(());
    }
    Err(FolderError::Foreign {
        user: account.uid,
        folder: folder.path,
        owner: stat.st_uid,
    })
}

/// Gives the account what an earlier life as root left: the files in `folder`, and in the folders in its folder `below`. The folder
/// itself must be the account's already.
///
/// # Errors
/// Something cannot be given.
pub fn give_contents(folder: &Path, below: &str, account: Account) -> Result<(), FolderError> {
    let Some((folder, _)) = Walk::new(account, None).to(folder)? else {
        return Ok(());
    };
    // In a folder of somebody else's, what is root's may be there for a reason.
    if fstat(&folder.descriptor).is_ok_and(|stat| stat.st_uid != account.uid.as_raw()) {
        return Ok(());
    }
    give_files(&folder, account)?;
    let Some(below) = give_folder(&folder, OsStr::new(below), account)? else {
        return Ok(());
    };
    for name in names(&below) {
        if let Some(inner) = give_folder(&below, &name, account)? {
            give_files(&inner, account)?;
        }
    }
    Ok(())
}

fn is_writable(stat: &FileStat, account: Account) -> bool {
    stat.st_uid == account.uid.as_raw()
        || (stat.st_gid == account.gid.as_raw() && stat.st_mode & 0o020 != 0)
        || stat.st_mode & 0o002 != 0
}

/// A way to a folder, name by name.
struct Walk {
    account: Account,
    /// The mode of folders to be made; none are, without.
    mode: Option<u32>,
}

impl Walk {
    fn new(account: Account, mode: Option<u32>) -> Self {
        Self { account, mode }
    }

    /// Opens a folder; tells whether it was made. `None`: it is not there, or cannot be made.
    fn to(&self, path: &Path) -> Result<Option<(Folder, bool)>, FolderError> {
        let mut names: VecDeque<OsString> = components(path);
        let Some(mut at) = begin(path) else {
            return Ok(None);
        };
        let (mut made, mut links) = (false, 0);
        while let Some(name) = names.pop_front() {
            let here = at.path.join(&name);
            let next = match open(&at, &name) {
                Ok(next) => next,
                Err(Errno::ENOENT) => match self.make(&at, &name, names.is_empty())? {
                    Some(next) => {
                        made = true;
                        at = next;
                        continue;
                    }
                    None => return Ok(None),
                },
                Err(error) => {
                    tracing::debug!(%error, path = %here.display(), "cannot open a folder");
                    return Ok(None);
                }
            };
            made = false;
            let Ok(stat) = fstat(&next) else { return Ok(None) };
            match kind(&stat) {
                SFlag::S_IFDIR => {
                    at = Folder {
                        descriptor: next,
                        path: here,
                    };
                }
                SFlag::S_IFLNK if stat.st_uid != 0 => {
                    return Err(FolderError::Link {
                        path: here,
                        owner: stat.st_uid,
                        user: self.account.uid,
                    });
                }
                SFlag::S_IFLNK if links < MOST_LINKS => {
                    links += 1;
                    let Ok(target) = readlinkat(&next, "") else {
                        return Ok(None);
                    };
                    let target = Path::new(&target);
                    if target.is_absolute() {
                        let Some(root) = begin(target) else {
                            return Ok(None);
                        };
                        at = root;
                    }
                    for name in components(target).into_iter().rev() {
                        names.push_front(name);
                    }
                }
                _ => return Ok(None),
            }
        }
        Ok(Some((at, made)))
    }

    /// Makes a folder on the way, and gives the last one to the account.
    fn make(&self, above: &Folder, name: &OsStr, is_last: bool) -> Result<Option<Folder>, FolderError> {
        let Some(mode) = self.mode else { return Ok(None) };
        let path = above.path.join(name);
        // Those above are for passing through.
        let mode = Mode::from_bits_truncate(if is_last { mode } else { 0o755 });
        let made = mkdirat(&above.descriptor, name, mode).and_then(|()| {
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(&above.descriptor, name, flags, Mode::empty())
        });
        let descriptor = match made {
            Ok(descriptor) => descriptor,
            Err(error) => {
                tracing::debug!(%error, folder = %path.display(), "cannot make a folder");
                return Ok(None);
            }
        };
        // Whoever may write to the folder above may have put another one there.
        if !fstat(&descriptor).is_ok_and(|stat| stat.st_uid == nix::unistd::geteuid().as_raw()) {
            return Ok(None);
        }
        // The mask took some of the mode away.
        if let Err(error) = fchmod(&descriptor, mode) {
            tracing::debug!(%error, folder = %path.display(), "cannot set the mode of a folder");
            return Ok(None);
        }
        if is_last {
            give(descriptor.as_fd(), &path, self.account)?;
        }
        Ok(Some(Folder { descriptor, path }))
    }
}

fn begin(path: &Path) -> Option<Folder> {
    let path = PathBuf::from(if path.is_absolute() { "/" } else { "." });
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let descriptor = openat(AT_FDCWD, &path, flags, Mode::empty()).ok()?;
    Some(Folder { descriptor, path })
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().to_owned())
        .collect()
}

/// What a name leads to, links not followed; nothing can be done with it but to look, and to give it.
fn open(folder: &Folder, name: &OsStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(&folder.descriptor, name, flags, Mode::empty())
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// The names in a folder.
fn names(folder: &Folder) -> Vec<OsString> {
    // By the descriptor: its path may lead elsewhere by now.
    let listed = fs::read_dir(format!("/proc/self/fd/{}", folder.descriptor.as_raw_fd()));
    let entries = listed.into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).collect()
}

fn give_files(folder: &Folder, account: Account) -> Result<(), FolderError> {
    for name in names(folder) {
        let path = folder.path.join(&name);
        let Ok(file) = open(folder, &name) else { continue };
        let Ok(stat) = fstat(&file) else { continue };
        if kind(&stat) != SFlag::S_IFREG || stat.st_uid == account.uid.as_raw() {
            continue;
        }
        if stat.st_uid != 0 || stat.st_nlink != 1 {
            tracing::warn!(
                file = %path.display(),
                owner = stat.st_uid,
                names = stat.st_nlink,
                "not given to the user of --user: only a file of root's, with one name, is"
            );
            continue;
        }
        give(file.as_fd(), &path, account)?;
    }
    Ok(())
}

/// Opens a folder in a folder, and gives it if it is root's; `None` if it is not there, or neither root's nor the account's.
fn give_folder(above: &Folder, name: &OsStr, account: Account) -> Result<Option<Folder>, FolderError> {
    let path = above.path.join(name);
    let Ok(descriptor) = open(above, name) else {
        return Ok(None);
    };
    let Ok(stat) = fstat(&descriptor) else {
        return Ok(None);
    };
    if kind(&stat) != SFlag::S_IFDIR {
        return Ok(None);
    }
    if stat.st_uid == 0 {
        give(descriptor.as_fd(), &path, account)?;
    } else if stat.st_uid != account.uid.as_raw() {
        return Ok(None);
    }
    Ok(Some(Folder { descriptor, path }))
}

fn give(descriptor: BorrowedFd<'_>, path: &Path, account: Account) -> Result<(), FolderError> {
    let given = fchownat(
        descriptor,
        "",
        Some(account.uid),
        Some(account.gid),
        AtFlags::AT_EMPTY_PATH,
    );
    given.map_err(|error| FolderError::Give {
        path: path.to_owned(),
        user: account.uid,
        source: error.into(),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, lchown, symlink};

    use nix::unistd::Gid;

    use super::*;

    const NOBODY: u32 = 65534;

    fn account() -> Account {
        Account {
            uid: Uid::from_raw(NOBODY),
            gid: Gid::from_raw(NOBODY),
        }
    }

    fn owner(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().uid()
    }

    /// A folder of the account's, and one of root's with a file in it; `None` without root, who alone gives things away.
    fn folders(test: &str) -> Option<(tempfile::TempDir, PathBuf, PathBuf)> {
        if !nix::unistd::geteuid().is_root() {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "{test} needs root, and CI must run it"
            );
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let (data, victim) = (dir.path().join("data"), dir.path().join("victim"));
        for folder in [&data, &victim] {
            fs::DirBuilder::new().mode(0o700).create(folder).unwrap();
        }
        fs::write(victim.join("secret"), "x").unwrap();
        chown(&data, Some(NOBODY), Some(NOBODY)).unwrap();
        Some((dir, data, victim))
    }

    #[test]
    fn what_root_left_is_given_to_the_account() {
        let Some((_dir, data, _)) = folders("what_root_left_is_given_to_the_account") else {
            return;
        };
        let network = data.join("networks/blue");
        fs::create_dir_all(&network).unwrap();
        let files = [data.join("lock"), network.join("control.json")];
        for file in &files {
            fs::write(file, "x").unwrap();
        }
        give_contents(&data, "networks", account()).unwrap();
        for path in files.iter().chain([&network, &data.join("networks")]) {
            assert_eq!(owner(path), NOBODY, "{}", path.display());
        }
    }

    #[test]
    fn a_link_of_the_accounts_gives_it_nothing_of_roots() {
        let Some((_dir, data, victim)) = folders("a_link_of_the_accounts_gives_it_nothing_of_roots") else {
            return;
        };
        let leads_to_victim = |link: &Path| {
            symlink(&victim, link).unwrap();
            lchown(link, Some(NOBODY), Some(NOBODY)).unwrap();
        };
        // In place of the folder of networks, of one network, and of a file.
        leads_to_victim(&data.join("networks"));
        symlink(victim.join("secret"), data.join("lock")).unwrap();
        give_contents(&data, "networks", account()).unwrap();
        fs::remove_file(data.join("networks")).unwrap();
        fs::create_dir(data.join("networks")).unwrap();
        leads_to_victim(&data.join("networks/blue"));
        give_contents(&data, "networks", account()).unwrap();
        for path in [&victim, &victim.join("secret")] {
            assert_eq!(owner(path), 0, "{}", path.display());
        }
        // And as a folder to be made ready, or above one.
        leads_to_victim(&data.join("state"));
        for folder in ["state", "state/new"] {
            let refused = prepare(&data.join(folder), 0o755, account());
            assert!(
                matches!(refused, Err(FolderError::Link { owner: NOBODY, .. })),
                "{folder}: {refused:?}"
            );
        }
        assert!(!victim.join("new").exists());
    }

    #[test]
    fn a_file_with_a_second_name_or_of_a_third_user_is_not_given() {
        let Some((_dir, data, victim)) = folders("a_file_with_a_second_name_or_of_a_third_user_is_not_given")
        else {
            return;
        };
        fs::hard_link(victim.join("secret"), data.join("lock")).unwrap();
        fs::write(data.join("other"), "x").unwrap();
        chown(data.join("other"), Some(4242), Some(4242)).unwrap();
        give_contents(&data, "networks", account()).unwrap();
        assert_eq!(owner(&victim.join("secret")), 0);
        assert_eq!(owner(&data.join("other")), 4242);
    }

    #[test]
    fn in_a_folder_of_roots_nothing_is_given() {
        let Some((_dir, _, victim)) = folders("in_a_folder_of_roots_nothing_is_given") else {
            return;
        };
        give_contents(&victim, "networks", account()).unwrap();
        assert_eq!(owner(&victim.join("secret")), 0);
        assert!(matches!(
            prepare(&victim, 0o755, account()),
            Err(FolderError::Foreign { owner: 0, .. })
        ));
    }

    #[test]
    fn a_new_folder_is_the_accounts_and_those_above_it_are_roots() {
        let Some((dir, ..)) = folders("a_new_folder_is_the_accounts_and_those_above_it_are_roots") else {
            return;
        };
        // A link of root's is followed, as /var/run is.
        symlink("real/here", dir.path().join("link")).unwrap();
        fs::create_dir_all(dir.path().join("real/here")).unwrap();
        let folder = dir.path().join("link/../above/state");
        prepare(&folder, 0o700, account()).unwrap();
        let real = dir.path().join("real/above/state");
        assert_eq!(owner(&real), NOBODY);
        assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o7777, 0o700);
        let above = fs::metadata(dir.path().join("real/above")).unwrap();
        assert_eq!((above.uid(), above.permissions().mode() & 0o7777), (0, 0o755));
        // Again, with nothing to be made.
        prepare(&folder, 0o700, account()).unwrap();
    }
}
