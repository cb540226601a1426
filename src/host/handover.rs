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
//! it goes away instead, the first starts again on what it still holds.
//!
//! # The message
//!
//! Lines of JSON on a stream socket, descriptors attached to what follows:
//!
//! ```text
//!  successor                            daemon that runs
//!  {"take":[1]}            ─────────▶                          the versions it understands
//!                          ◀─────────   {"give":1,"names":[…]} and a byte for each 64 descriptors
//!                   or     ◀─────────   {"refuse":[1]}         the versions it could speak; it goes on as before
//!  {"done":true}           ─────────▶                          it ends with status 0
//!                   or     {"stop":true}                       as after SIGTERM: the successor makes all anew
//! ```
//!
//! `take`, `refuse`, `done` and `stop` are the same in every version; what `give` holds is that version's.
//!
//! # Limits
//!
//! Sockets that only send are made anew: flows may leave by other source ports. So are raw sockets (`srv6`). Anything that does not fit what
//! the successor wants (name, queues, headers, address, port) is closed, and made anew.

mod fd_store;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};
use socket2::SockRef;

use self::fd_store::FdStore;
pub use self::fd_store::{Kept, from_service_manager};
use crate::host::sys;

/// The forms of `give` understood here, best first.
pub const VERSIONS: [u32; 1] = [1];
/// Descriptors sent at a time; the kernel takes 253.
const AT_A_TIME: usize = 64;
/// Longest line: a thousand names of a hundred bytes.
const MAX_LINE: usize = 128 * 1024;
/// How long the other side may take for a line, once it has begun to talk. The daemon that runs closes its store first.
const PATIENCE: Duration = Duration::from_secs(10);
/// What every name begins with, so that others' descriptors are left alone.
const PREFIX: &str = "kersey-";

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A queue of the TUN device.
    Tun,
    /// The UDP socket on the well-known port, IPv4.
    Udp4,
    /// The same, IPv6.
    Udp6,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Tun, Self::Udp4, Self::Udp6];

    fn name(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::Udp4 => "udp4",
            Self::Udp6 => "udp6",
        }
    }
}

/// A descriptor's name: `kersey-KIND.NETWORK.QUEUE`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    /// What it is.
    pub kind: Kind,
    /// Whose; `_` is the network without a name.
    pub network: String,
    /// Of which queue.
    pub queue: usize,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, network, queue } = self;
        write!(f, "{PREFIX}{}.{network}.{queue}", kind.name())
    }
}

/// A name is not one of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a descriptor of ours")]
pub struct Foreign;

impl FromStr for Label {
    type Err = Foreign;

    fn from_str(text: &str) -> Result<Self, Foreign> {
        let rest = text.strip_prefix(PREFIX).ok_or(Foreign)?;
        let (kind, rest) = rest.split_once('.').ok_or(Foreign)?;
        let (network, queue) = rest.rsplit_once('.').ok_or(Foreign)?;
        let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
        Ok(Self {
            kind: kind.ok_or(Foreign)?,
            network: network.to_owned(),
            queue: queue.parse().map_err(|_| Foreign)?,
        })
    }
}

/// The descriptors of one network.
#[derive(Debug, Default)]
pub struct Bundle(BTreeMap<(Kind, usize), OwnedFd>);

impl Bundle {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a descriptor in, unless its place is taken: what comes first is the newest.
    pub fn insert(&mut self, kind: Kind, queue: usize, fd: OwnedFd) {
        self.0.entry((kind, queue)).or_insert(fd);
    }

    /// Whether there is a socket.
    pub fn has_sockets(&self) -> bool {
        self.0.keys().any(|(kind, _)| *kind != Kind::Tun)
    }

    fn try_clone(&self) -> io::Result<Self> {
        let clones = self.0.iter().map(|(place, fd)| Ok((*place, fd.try_clone()?)));
        clones.collect::<io::Result<_>>().map(Self)
    }

    fn labelled<'a>(&'a self, network: &'a str) -> impl Iterator<Item = (Label, &'a OwnedFd)> {
        self.0.iter().map(move |((kind, queue), fd)| {
            let label = Label {
                kind: *kind,
                network: network.to_owned(),
                queue: *queue,
            };
            (label, fd)
        })
    }

    /// Takes all of a kind, by queue; none unless there is one for each of `queues` and no other.
    pub fn take(&mut self, kind: Kind, queues: usize) -> Option<Vec<OwnedFd>> {
        let whole =
            self.count(kind) == queues && (0..queues).all(|queue| self.0.contains_key(&(kind, queue)));
        if !whole || queues == 0 {
            return None;
        }
        (0..queues).map(|queue| self.0.remove(&(kind, queue))).collect()
    }

    fn count(&self, kind: Kind) -> usize {
        self.0.keys().filter(|(of, _)| *of == kind).count()
    }

    /// Whether one of the sockets has this port.
    fn has_port(&self, port: u16) -> bool {
        let sockets = self.0.iter().filter(|((kind, _), _)| *kind != Kind::Tun);
        sockets
            .filter_map(|(_, fd)| SockRef::from(fd).local_addr().ok()?.as_socket())
            .any(|addr: SocketAddr| addr.port() == port)
    }
}

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
            bundle.0.retain(|(kind, _), _| *kind == Kind::Tun);
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
        successor.set_write_timeout(Some(PATIENCE))?;
        let held = lock(&self.held);
        let mut names = Vec::new();
        let mut descriptors = Vec::new();
        for (network, bundle) in &*held {
            for (label, fd) in bundle.labelled(network) {
                names.push(label.to_string());
                descriptors.push(fd.as_raw_fd());
            }
        }
        send_line(
            successor,
            &Answer {
                give: Some(version),
                names,
                refuse: None,
            },
        )?;
        for chunk in descriptors.chunks(AT_A_TIME) {
            send_descriptors(successor.as_fd(), chunk)?;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Request {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    take: Option<Vec<u32>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    done: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    stop: bool,
}

impl Request {
    fn done() -> Self {
        Self {
            done: true,
            ..Self::default()
        }
    }

    fn stop() -> Self {
        Self {
            stop: true,
            ..Self::default()
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    give: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refuse: Option<Vec<u32>>,
}

/// What a successor wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Everything, in this version of the message.
    Take(u32),
    /// That we end; it has all it needs, or wants nothing of us.
    End,
    /// It speaks no version of ours. It has been told so.
    Refused,
    /// It went away.
    Gone,
}

/// Hears what a successor wants, and answers if there is nothing to give.
///
/// # Errors
/// It says nothing in time, or nothing of sense.
pub fn hear(successor: &mut UnixStream) -> io::Result<Wish> {
    successor.set_read_timeout(Some(PATIENCE))?;
    successor.set_write_timeout(Some(PATIENCE))?;
    let Some(line) = read_line(successor)? else {
        return Ok(Wish::Gone);
    };
    let request: Request = serde_json::from_slice(&line)?;
    if request.done || request.stop {
        return Ok(Wish::End);
    }
    let theirs = request.take.unwrap_or_default();
    match VERSIONS.into_iter().find(|version| theirs.contains(version)) {
        Some(version) => Ok(Wish::Take(version)),
        None => {
            let refuse = Answer {
                refuse: Some(VERSIONS.to_vec()),
                ..Answer::default()
            };
            send_line(successor, &refuse)?;
            Ok(Wish::Refused)
        }
    }
}

/// Waits until a successor says how things went, for as long as it lives.
///
/// # Errors
/// It says nothing of sense.
pub fn await_end(successor: &mut UnixStream) -> io::Result<Wish> {
    let Some(line) = read_line(successor)? else {
        return Ok(Wish::Gone);
    };
    let request: Request = serde_json::from_slice(&line)?;
    Ok(if request.done || request.stop {
        Wish::End
    } else {
        Wish::Gone
    })
}

/// What a daemon that runs gave.
#[derive(Debug)]
pub enum Given {
    /// Nobody runs there.
    Nobody,
    /// What it has; it waits to be told how things went.
    Everything(BTreeMap<String, Bundle>, UnixStream),
    /// Nothing of use, and it has been told to end; it may take a moment.
    Nothing(&'static str),
}

/// Asks the daemon that listens at `path` for all it has.
///
/// # Errors
/// It is there and does not answer.
pub fn ask(path: &Path) -> io::Result<Given> {
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(Given::Nobody);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    send_line(
        &mut stream,
        &Request {
            take: Some(VERSIONS.to_vec()),
            ..Request::default()
        },
    )?;
    let (line, mut descriptors) = read_line_with_descriptors(&stream)?;
    let answer: Answer = serde_json::from_slice(&line)?;
    let give_up = |mut stream: UnixStream, why| {
        send_line(&mut stream, &Request::stop())?;
        // It has gone when it closes.
        let _ = stream.read(&mut [0]);
        Ok(Given::Nothing(why))
    };
    match answer.give {
        Some(version) if VERSIONS.contains(&version) => {}
        Some(_) => return give_up(stream, "it speaks another version"),
        None if answer.refuse.is_some() => return give_up(stream, "it understands no version of ours"),
        None => return give_up(stream, "it gives nothing"),
    }
    while descriptors.len() < answer.names.len() {
        let (len, more) = sys::receive_descriptors(stream.as_fd(), &mut [0; 16])?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        descriptors.extend(more);
    }
    let mut given = BTreeMap::<String, Bundle>::new();
    for (name, fd) in answer.names.iter().zip(descriptors) {
        // A kind we do not know is closed.
        if let Ok(label) = name.parse::<Label>() {
            given
                .entry(label.network)
                .or_default()
                .insert(label.kind, label.queue, fd);
        }
    }
    Ok(Given::Everything(given, stream))
}

fn send_line(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads a line without its end; `None` at the end of the stream.
fn read_line(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Ok(None);
        }
        if byte == [b'\n'] {
            return Ok(Some(line));
        }
        line.push(byte[0]);
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// Reads a line and what descriptors come along with it or right after.
fn read_line_with_descriptors(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let (len, more) = sys::receive_descriptors(stream.as_fd(), &mut buffer)?;
        descriptors.extend(more);
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&buffer[..len]);
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            return Ok((line, descriptors));
        }
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

fn send_descriptors(stream: BorrowedFd<'_>, descriptors: &[RawFd]) -> io::Result<()> {
    let control = [ControlMessage::ScmRights(descriptors)];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn descriptor() -> OwnedFd {
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into()
    }

    fn bundle(queues: usize) -> Bundle {
        let mut bundle = Bundle::default();
        for queue in 0..queues {
            bundle.insert(Kind::Tun, queue, descriptor());
            bundle.insert(Kind::Udp4, queue, descriptor());
        }
        bundle
    }

    #[test]
    fn names_survive_the_trip_through_a_service_manager() {
        for network in ["_", "blue", "a.b-c_d", ""] {
            let label = Label {
                kind: Kind::Udp6,
                network: network.to_owned(),
                queue: 7,
            };
            assert_eq!(label.to_string().parse(), Ok(label), "{network}");
        }
        for foreign in [
            "",
            "connection",
            "kersey-tap._.0",
            "kersey-tun._",
            "kersey-tun._.x",
            "tun._.0",
        ] {
            assert_eq!(foreign.parse::<Label>(), Err(Foreign), "{foreign}");
        }
    }

    #[test]
    fn a_bundle_gives_whole_sets_only() {
        assert_eq!(bundle(2).take(Kind::Tun, 2).unwrap().len(), 2);
        assert!(bundle(2).take(Kind::Tun, 1).is_none());
        assert!(bundle(2).take(Kind::Tun, 3).is_none());
        assert!(bundle(2).take(Kind::Udp6, 2).is_none());
        assert!(bundle(0).take(Kind::Tun, 0).is_none());
    }

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
    fn another_version_is_refused_and_a_successor_that_goes_is_noticed() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(b"{\"take\":[98,99],\"and\":\"more\"}\n")
            .unwrap();
        assert_eq!(hear(&mut ours).unwrap(), Wish::Refused);
        let mut line = [0; 64];
        let len = theirs.read(&mut line).unwrap();
        assert_eq!(&line[..len], b"{\"refuse\":[1]}\n");
        theirs.write_all(b"{\"stop\":true}\n").unwrap();
        assert_eq!(hear(&mut ours).unwrap(), Wish::End);
        theirs.write_all(b"nonsense\n").unwrap();
        assert!(hear(&mut ours).is_err());
        drop(theirs);
        assert_eq!(hear(&mut ours).unwrap(), Wish::Gone);
    }

    #[test]
    fn a_predecessor_of_another_version_is_told_to_stop() {
        for answer in [
            "{\"give\":2,\"things\":[]}\n",
            "{\"refuse\":[7]}\n",
            "{\"sing\":true}\n",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("takeover");
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let asking = thread::spawn(move || ask(&path).unwrap());
            let mut successor = listener.accept().unwrap().0;
            hear(&mut successor).unwrap();
            successor.write_all(answer.as_bytes()).unwrap();
            assert_eq!(hear(&mut successor).unwrap(), Wish::End, "{answer}");
            drop(successor);
            assert!(matches!(asking.join().unwrap(), Given::Nothing(_)), "{answer}");
        }
        assert!(matches!(ask(Path::new("/nowhere")).unwrap(), Given::Nobody));
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

    #[test]
    fn of_two_with_one_name_the_first_counts() {
        let mut bundle = Bundle::default();
        let (newest, older) = (descriptor(), descriptor());
        let port = |fd: &OwnedFd| SockRef::from(fd).local_addr().unwrap().as_socket().unwrap();
        let expected = port(&newest);
        bundle.insert(Kind::Udp4, 0, newest);
        bundle.insert(Kind::Udp4, 0, older);
        assert_eq!(port(&bundle.take(Kind::Udp4, 1).unwrap()[0]), expected);
    }
}
