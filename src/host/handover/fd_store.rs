//! The service manager's store of descriptors: what it keeps for the next process.
//!
//! It keeps what it was sent until it is told otherwise, whatever this process closes: a device of which it has a queue stays and is busy, a
//! socket of which it has a descriptor keeps its port. `FDPOLL=0` makes that so for dead ones too. It keeps several of one name, and hands out
//! the newest first; a file that it has already it does not take again, whatever the name. So a name is removed before it is used again,
//! and whatever is of no use is removed by name, also what only an earlier life had sent.
//!
//! Messages are dealt with in their order. Where something is to be free before this process goes on, it waits for the service manager to
//! have come that far (`BARRIER=1`, or an older one that closes descriptors it does not know what to do with).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as StdAddr, UnixDatagram, UnixStream};
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::{Bundle, Label, lock};
use crate::host::sys;

/// How long the service manager may take to let go. It takes less than a millisecond; without it, whatever is still busy is tried again.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the service manager may have of ours.
#[derive(Debug, Default)]
pub(super) struct FdStore {
    /// `NOTIFY_SOCKET`; without it there is nobody.
    place: Option<OsString>,
    names: Mutex<BTreeSet<Label>>,
}

impl FdStore {
    /// Has the service manager keep what is in `bundle` of a network, and nothing else of it.
    pub(super) fn replace(&self, network: &str, bundle: &Bundle) {
        if self.place.is_none() {
            return;
        }
        let mut names = lock(&self.names);
        for label in names.extract_if(.., |label| label.network == network) {
            self.send_removal(&label);
        }
        for (label, fd) in bundle.labelled(network) {
            // Also one that we know nothing of: an earlier life may have ended between two messages.
            self.send_removal(&label);
            // A socket with an error pending, as after an ICMP message, must not fall out of the store.
            let message = format!("FDSTORE=1\nFDNAME={label}\nFDPOLL=0\n");
            if let Err(error) = self.send(&message, Some(fd.as_fd())) {
                tracing::debug!(%error, %label, "the service manager does not keep a descriptor");
            }
            names.insert(label);
        }
    }

    /// Has the service manager let go of what `which` is true of, and waits until it has.
    pub(super) fn remove(&self, which: impl Fn(&Label) -> bool) {
        let mut removed = 0;
        for label in lock(&self.names).extract_if(.., |label| which(label)) {
            self.send_removal(&label);
            removed += 1;
        }
        if removed > 0
            && let Err(error) = self.wait()
        {
            tracing::debug!(%error, "the service manager does not say that it let go");
        }
    }

    fn send_removal(&self, label: &Label) {
        if let Err(error) = self.send(&format!("FDSTOREREMOVE=1\nFDNAME={label}\n"), None) {
            tracing::debug!(%error, %label, "the service manager does not let go of a descriptor");
        }
    }

    /// Waits until the service manager has dealt with all it was sent: it closes what comes with this message.
    fn wait(&self) -> io::Result<()> {
        let (mut ours, theirs) = UnixStream::pair()?;
        self.send("BARRIER=1", Some(theirs.as_fd()))?;
        drop(theirs);
        ours.set_read_timeout(Some(PATIENCE))?;
        ours.read(&mut [0]).map(drop)
    }

    fn send(&self, message: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let socket = UnixDatagram::unbound()?;
        match place.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&StdAddr::from_abstract_name(name)?)?,
            None => socket.connect(place)?,
        }
        let numbers = fd.map(|fd| [fd.as_raw_fd()]);
        let control = numbers
            .as_ref()
            .map(|numbers| [ControlMessage::ScmRights(numbers)]);
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(message.as_bytes())],
            control.as_ref().map_or(&[][..], |control| control),
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }
}

/// What a service manager kept for this process.
#[derive(Debug, Default)]
pub struct Kept {
    /// The descriptors, by network.
    pub bundles: BTreeMap<String, Bundle>,
    pub(super) store: FdStore,
}

/// Takes what a service manager kept for us (`LISTEN_FDS`); descriptors of other names are left where they are.
pub fn from_service_manager() -> Kept {
    let mut kept = Kept {
        store: FdStore {
            place: std::env::var_os("NOTIFY_SOCKET").filter(|place| !place.is_empty()),
            names: Mutex::default(),
        },
        bundles: BTreeMap::new(),
    };
    let Ok(passed) = sd_notify::listen_fds_with_names() else {
        return kept;
    };
    let mut names = lock(&kept.store.names);
    for (number, name) in passed {
        let Ok(label) = name.parse::<Label>() else {
            continue;
        };
        match sys::adopt(number) {
            Ok(fd) => {
                let bundle = kept.bundles.entry(label.network.clone()).or_default();
                bundle.insert(label.kind, label.queue, fd);
            }
            Err(error) => tracing::warn!(%error, name, "a descriptor was named and not passed"),
        }
        names.insert(label);
    }
    drop(names);
    kept
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;
    use crate::host::handover::Kind;

    /// A service manager's end, and a store of ours that begins with `names`.
    fn store(names: &[&str]) -> (tempfile::TempDir, UnixDatagram, FdStore) {
        let dir = tempfile::tempdir().unwrap();
        let place: PathBuf = dir.path().join("notify");
        let manager = UnixDatagram::bind(&place).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let store = FdStore {
            place: Some(place.into()),
            names: Mutex::new(names.iter().map(|name| name.parse().unwrap()).collect()),
        };
        (dir, manager, store)
    }

    fn next(manager: &UnixDatagram) -> (String, usize) {
        let mut buffer = [0; 512];
        let (len, descriptors) = sys::receive_descriptors(manager.as_fd(), &mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..len]).replace('\n', " ");
        (text.trim().to_owned(), descriptors.len())
    }

    #[test]
    fn every_name_of_a_network_is_removed_before_its_successor_is_stored() {
        let (_dir, manager, store) = store(&["kersey-tun.a.0", "kersey-tun.a.1", "kersey-udp4.b.0"]);
        let mut bundle = Bundle::default();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        bundle.insert(Kind::Udp4, 0, socket.into());
        for before in [&["kersey-tun.a.0", "kersey-tun.a.1"][..], &["kersey-udp4.a.0"]] {
            store.replace("a", &bundle);
            for name in before.iter().chain(&["kersey-udp4.a.0"]) {
                let removal = format!("FDSTOREREMOVE=1 FDNAME={name}");
                assert_eq!(next(&manager), (removal, 0));
            }
            let kept = "FDSTORE=1 FDNAME=kersey-udp4.a.0 FDPOLL=0".to_owned();
            assert_eq!(next(&manager), (kept, 1));
        }
    }

    #[test]
    fn what_is_removed_is_gone_when_that_is_done() {
        let (_dir, manager, store) = store(&["kersey-tun.a.0", "kersey-udp4.a.0", "kersey-udp4.b.0"]);
        let came_far = Arc::new(AtomicBool::new(false));
        let hears = thread::spawn({
            let came_far = Arc::clone(&came_far);
            move || {
                let removals = [next(&manager), next(&manager)];
                thread::sleep(Duration::from_millis(50));
                came_far.store(true, Ordering::Relaxed);
                (removals, next(&manager))
            }
        });
        store.remove(|label| label.network == "a");
        assert!(came_far.load(Ordering::Relaxed), "it was not waited for");
        let (heard, barrier) = hears.join().unwrap();
        assert_eq!(heard[0].0, "FDSTOREREMOVE=1 FDNAME=kersey-tun.a.0");
        assert_eq!(heard[1].0, "FDSTOREREMOVE=1 FDNAME=kersey-udp4.a.0");
        assert_eq!(barrier, ("BARRIER=1".to_owned(), 1));
        // Nothing is left to be told, and there is nobody to wait for.
        store.remove(|label| label.network == "a");
        let left: Vec<String> = lock(&store.names).iter().map(Label::to_string).collect();
        assert_eq!(left, ["kersey-udp4.b.0"]);
    }

    #[test]
    fn without_a_service_manager_nothing_is_waited_for() {
        let store = FdStore::default();
        store.replace("a", &Bundle::default());
        store.remove(|_| true);
        assert!(lock(&store.names).is_empty());
    }
}
