//! Device and sockets that outlive a process, so that packets flow through a restart.
//!
//! # Theory of operation
//!
//! A queue of the device and a socket on the well-known port live as long as some descriptor of them is open, and queue what comes while
//! nobody reads. So what a data plane has is held here a second time, by name ([`Label`]), and a new data plane takes it from here rather
//! than make it anew:
//!
//! ```text
//!  a data plane up ──hold──▶ held ──lend──▶ the next data plane: of this process, or of the next
//!                             │  ▲
//!            systemd's store ◀┘  └── LISTEN_FDS at start; or the daemon that runs, asked over a unix socket
//! ```
//!
//! With systemd, descriptors lie in its store (`FDSTORE=1`) from the moment the data plane is up, and come back at the next start, after a crash
//! too. Packets wait in the kernel meanwhile: up to 500 in the device, 16 MiB in a socket.
//!
//! Without it the successor asks ([`ask`]). The daemon that runs then ends all that talks to a store or listens, but parks the threads that move
//! packets ([`Handover::park`]), gives the descriptors, and waits. Both move packets until the successor says that it is ready; if
//! it goes away instead, the first starts again on what it still holds. What they say to one another: `message`.
//!
//! # Limits
//!
//! Sockets that only send are made anew: flows may leave by other source ports. So is the outer device of `--srv6-io=tun`. Raw sockets are
//! never had twice, for each would get every packet: if those given are of no use, the predecessor ends first. Anything that does not fit what
//! the successor wants (name, queues, headers, address, port) is closed, and made anew.

mod bundle;
mod fd_store;
mod message;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::bundle::{Bundle, Foreign, Kind, Label};
use self::fd_store::FdStore;
pub use self::fd_store::{Kept, from_service_manager};
pub use self::message::{Given, VERSIONS, Wish, ask, await_end, hear};
use self::message::{Request, send_line};

/// Threads that go on while nobody looks after them; they end when this is dropped.
type Threads = Box<dyn Send>;

/// What is held for the next data plane, the next process, or both.
#[derive(Default)]
pub struct Handover {
    switched_off: bool,
    held: Mutex<BTreeMap<String, Bundle>>,
    store: FdStore,
    /// Some while threads are parked rather than ended.
    parked: Mutex<Option<Vec<(String, Threads)>>>,
    /// The daemon whose place this process takes, until it was told how that went.
    predecessor: Mutex<Option<UnixStream>>,
}

impl Handover {
    /// Holds what a service manager kept and, in its place where there are both, what a predecessor gave.
    pub fn new(kept: Kept, given: BTreeMap<String, Bundle>, predecessor: Option<UnixStream>) -> Self {
        let mut held = kept.bundles;
        held.extend(given);
        Self {
            held: Mutex::new(held),
            store: kept.store,
            predecessor: Mutex::new(predecessor),
            ..Self::default()
        }
    }

    /// One that never holds anything, nor leaves anything with the service manager.
    pub fn off(kept: Kept) -> Self {
        drop(kept.bundles);
        kept.store.remove(|_| true);
        Self {
            switched_off: true,
            ..Self::default()
        }
    }

    /// Second descriptors of what is held for a network. It stays held until something else is, or it is released: who gets this far may
    /// still fail, and try again.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn lend(&self, network: &str) -> io::Result<Bundle> {
        match lock(&self.held).get(network) {
            Some(bundle) => bundle.try_clone(),
            None => Ok(Bundle::default()),
        }
    }

    /// Whether a socket with this port is held for a network: then it is not somebody else's.
    pub fn has_port(&self, network: &str, port: u16) -> bool {
        lock(&self.held)
            .get(network)
            .is_some_and(|bundle| bundle.has_port(port))
    }

    /// Holds what a network's data plane has now, in place of what it had.
    pub fn hold(&self, network: &str, bundle: Bundle) {
        if self.switched_off {
            return;
        }
        self.store.replace(network, &bundle);
        lock(&self.held).insert(network.to_owned(), bundle);
    }

    /// Lets go of what a network had: it has no data plane any more, or that has no use for it.
    pub fn release(&self, network: &str) {
        let old = lock(&self.held).remove(network);
        drop(old);
        self.store.remove(|label| label.network == network);
    }

    /// Lets go of a network's sockets, of which its data plane has no use.
    pub fn release_sockets(&self, network: &str) {
        if let Some(bundle) = lock(&self.held).get_mut(network) {
            bundle.retain_device();
        }
        self.store
            .remove(|label| label.network == network && label.kind != Kind::Tun);
    }

    /// Lets go of what networks had that are not `wanted`; gives their names.
    pub fn retain(&self, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let mut held = lock(&self.held);
        let unwanted = held.extract_if(.., |network, _| !wanted(network));
        let unwanted: Vec<String> = unwanted.map(|(network, _)| network).collect();
        drop(held);
        self.store.remove(|label| !wanted(&label.network));
        unwanted
    }

    /// From here on threads are parked when their data plane goes.
    pub fn park(&self) {
        lock(&self.parked).get_or_insert_default();
    }

    /// Ends a data plane's threads, or parks them if that is how it is.
    pub fn retire(&self, network: &str, threads: impl Send + 'static) {
        if let Some(parked) = &mut *lock(&self.parked) {
            parked.push((network.to_owned(), Box::new(threads)));
        }
    }

    /// The network's threads are back on duty: those parked may end.
    pub fn relieve(&self, network: &str) {
        let mut done = Vec::new();
        let mut parked = lock(&self.parked);
        if let Some(threads) = &mut *parked {
            done.extend(threads.extract_if(.., |(of, _)| of == network));
            if threads.is_empty() && !done.is_empty() {
                // All are back: from here on threads end with their data plane again.
                *parked = None;
            }
        }
        drop(parked);
        // They are waited for, outside the lock.
        drop(done);
    }

    /// Threads are ended again, not parked; those still parked end.
    pub fn unpark(&self) {
        let parked = lock(&self.parked).take();
        drop(parked);
    }

    /// Tells the predecessor, if there is one, that its place is taken.
    pub fn tell_done(&self) {
        self.tell(&Request::done());
    }

    /// Tells the predecessor, if there is one, to go at once, for what it gave does not fit; and waits until it is gone.
    pub fn tell_stop(&self) {
        if let Some(mut predecessor) = self.tell(&Request::stop()) {
            // It has gone when it closes, or will not go at all.
            let _ = predecessor.read(&mut [0]);
        }
    }

    fn tell(&self, request: &Request) -> Option<UnixStream> {
        let mut predecessor = lock(&self.predecessor).take()?;
        // If it is gone, it need not be told.
        let _ = send_line(&mut predecessor, request);
        Some(predecessor)
    }

    /// Whether a predecessor waits to be told.
    pub fn has_predecessor(&self) -> bool {
        lock(&self.predecessor).is_some()
    }

    /// Gives all that is held to a successor, of which this side keeps a second descriptor.
    ///
    /// # Errors
    /// It is gone, or takes too long.
    pub fn give(&self, successor: &mut UnixStream, version: u32) -> io::Result<()> {
        let held = lock(&self.held);
        let mut names = Vec::new();
        let mut descriptors = Vec::new();
        for (network, bundle) in &*held {
            for (label, fd) in bundle.labelled(network) {
                names.push(label.to_string());
                descriptors.push(fd.as_raw_fd());
            }
        }
        message::give(successor, version, names, &descriptors)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::thread;

    use socket2::SockRef;

    use super::bundle::tests::bundle;
    use super::*;

    #[test]
    fn a_successor_gets_what_is_held_and_the_predecessor_keeps_it() {
        let handover = Handover::default();
        // More than goes at a time.
        handover.hold("_", bundle(40));
        handover.hold("blue", bundle(1));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("takeover");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let asking = thread::spawn(move || ask(&path).unwrap());
        let mut successor = listener.accept().unwrap().0;
        assert_eq!(hear(&mut successor).unwrap(), Wish::Take(1));
        handover.give(&mut successor, 1).unwrap();
        let Given::Everything(mut given, predecessor) = asking.join().unwrap() else {
            panic!("nothing was given");
        };
        let mut blue = given.remove("blue").unwrap();
        let mine = handover.lend("blue").unwrap().take(Kind::Udp4, 1).unwrap();
        let theirs = blue.take(Kind::Udp4, 1).unwrap();
        let port = |fd: &OwnedFd| SockRef::from(fd).local_addr().unwrap().as_socket().unwrap();
        assert_eq!(port(&mine[0]), port(&theirs[0]));
        assert_eq!(given["_"].count(Kind::Tun), 40);
        let next = Handover::new(Kept::default(), given, Some(predecessor));
        next.tell_done();
        assert_eq!(hear(&mut successor).unwrap(), Wish::End);
        assert!(!next.has_predecessor());
    }

    #[test]
    fn threads_are_parked_only_when_asked_for_and_until_they_are_relieved() {
        struct Thread(std::sync::mpsc::Sender<&'static str>, &'static str);
        impl Drop for Thread {
            fn drop(&mut self) {
                let _ = self.0.send(self.1);
            }
        }
        let (sender, ended) = std::sync::mpsc::channel();
        let handover = Handover::default();
        handover.retire("a", Thread(sender.clone(), "first"));
        assert_eq!(ended.try_recv(), Ok("first"));
        handover.park();
        handover.retire("a", Thread(sender.clone(), "of a"));
        handover.retire("b", Thread(sender.clone(), "of b"));
        assert!(ended.try_recv().is_err());
        handover.relieve("b");
        assert_eq!(ended.try_recv(), Ok("of b"));
        handover.unpark();
        assert_eq!(ended.try_recv(), Ok("of a"));
        handover.retire("a", Thread(sender, "last"));
        assert_eq!(ended.try_recv(), Ok("last"));
    }

    #[test]
    fn one_that_is_switched_off_holds_nothing() {
        let handover = Handover::off(Kept::default());
        handover.hold("_", bundle(1));
        assert!(handover.lend("_").unwrap().is_empty());
    }

    #[test]
    fn what_is_lent_stays_held_until_it_is_released_or_replaced() {
        let handover = Handover::default();
        handover.hold("_", bundle(2));
        // A data plane that fails after it has taken everything.
        for _ in 0..2 {
            let mut lent = handover.lend("_").unwrap();
            assert_eq!(lent.take(Kind::Tun, 2).unwrap().len(), 2);
            assert_eq!(lent.take(Kind::Udp4, 2).unwrap().len(), 2);
        }
        handover.release_sockets("_");
        let mut lent = handover.lend("_").unwrap();
        assert!(!lent.has_sockets());
        assert_eq!(lent.take(Kind::Tun, 2).unwrap().len(), 2);
        handover.hold("_", bundle(1));
        handover.hold("gone", bundle(1));
        assert_eq!(handover.retain(|network| network == "_"), ["gone"]);
        assert!(handover.lend("gone").unwrap().is_empty());
        assert!(handover.lend("_").unwrap().has_sockets());
        handover.release("_");
        assert!(handover.lend("_").unwrap().is_empty());
    }
}
