//! One UDP port for several vxlan networks of this process, told apart by VNI.
//!
//! # Theory of operation
//!
//! The kernel hands a datagram to one socket; which network it is for stands in its payload. So the networks have second descriptors of one
//! socket, and whoever receives hands around what is another's:
//!
//! ```text
//!   network 7's thread ──┐                      ┌─ VNI 7: stays in the batch
//!                        ├─ reading ─▶ recvmmsg ┤
//!   network 8's thread ──┘  (one at a time)     └─ VNI 8: copied into the mailbox of network 8, which is woken
//! ```
//!
//! Nobody owns the socket: networks come and go, and it lives as long as one of them. A network that is alone receives as if this were not
//! here, but for one look at a counter a batch.
//!
//! Packets of a network stay in order. Whoever reads holds `reading` until all is handed around; whoever holds it empties its mailbox before it
//! receives, and whoever does not get it only empties its mailbox. Nobody waits for it.
//!
//! A run that the kernel coalesced (UDP_GRO looks at addresses and ports) may be of several networks: it is taken apart.
//!
//! # Limits
//!
//! A mailbox holds `MAILBOX_BYTES`; what comes beyond that is dropped and counted as the kernel's own overflows are. A datagram for nobody
//! stays with whoever received it, and is refused there. What is handed around is copied once more: a network that wants all its speed
//! wants a port of its own. Offloads and socket options are the first one's; they come from flags of the process.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSliceMut, PipeReader, PipeWriter, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use socket2::Socket;

use crate::addr::Vni;
use crate::dataplane::datagram::{DatagramBatch, Envelope};
use crate::wire::vxlan::VxlanHeader;

/// What waits for a network at most, bytes: what a worker that is descheduled for some milliseconds misses.
const MAILBOX_BYTES: usize = 4 << 20;
/// Buffers kept for the next datagrams: a batch.
const SPARE: usize = 64;

/// The sockets that networks of this process share, by address and queue.
#[derive(Debug, Default)]
pub struct SharedPorts(Mutex<BTreeMap<(SocketAddr, usize), Weak<SharedSocket>>>);

impl SharedPorts {
    /// Makes `vni` one of those that receive by the socket of a queue on `addr`, which `open` makes if none of them has it yet. Gives a
    /// descriptor of it to send by.
    pub(super) fn join<E>(
        &self,
        (addr, queue): (SocketAddr, usize),
        vni: Vni,
        open: impl FnOnce() -> Result<Socket, E>,
        failed: impl Fn(io::Error) -> E,
    ) -> Result<(Socket, Member), E> {
        let mut sockets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.retain(|_, socket| socket.strong_count() > 0);
        let (shared, socket) = match sockets.get(&(addr, queue)).and_then(Weak::upgrade) {
            Some(shared) => {
                let socket = shared.socket.try_clone().map_err(&failed)?;
                (shared, socket)
            }
            None => {
                let socket = open()?;
                let shared = Arc::new(SharedSocket {
                    socket: socket.try_clone().map_err(&failed)?,
                    reading: Mutex::default(),
                    members: Mutex::default(),
                    count: AtomicUsize::new(0),
                });
                sockets.insert((addr, queue), Arc::downgrade(&shared));
                (shared, socket)
            }
        };
        Ok((socket, Member::new(shared, vni).map_err(failed)?))
    }
}

#[derive(Debug)]
struct SharedSocket {
    socket: Socket,
    /// Held by whoever receives, until all is handed around.
    reading: Mutex<()>,
    /// Their mailboxes.
    members: Mutex<BTreeMap<Vni, Arc<Mailbox>>>,
    /// How many there are.
    count: AtomicUsize,
}

impl SharedSocket {
    fn members(&self) -> MutexGuard<'_, BTreeMap<Vni, Arc<Mailbox>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<Vni, Arc<Mailbox>>)) {
        let mut members = self.members();
        change(&mut members);
        self.count.store(members.len(), Ordering::Release);
    }
}

/// One network's part in a shared socket; it ends when dropped.
#[derive(Debug)]
pub(super) struct Member {
    shared: Arc<SharedSocket>,
    vni: Vni,
    mailbox: Arc<Mailbox>,
    woken: PipeReader,
}

/// What others have received for a network.
#[derive(Debug)]
struct Mailbox {
    /// Whether there is something in it.
    is_filled: AtomicBool,
    state: Mutex<Mail>,
}

#[derive(Debug)]
struct Mail {
    parcels: VecDeque<Parcel>,
    /// Of all parcels.
    bytes: usize,
    /// What found no room since the mailbox was looked into.
    lost: u64,
    spare: Vec<Vec<u8>>,
    /// Holds a byte while `is_filled`.
    wake: PipeWriter,
}

/// A datagram, or a run of them.
#[derive(Debug)]
struct Parcel {
    envelope: Envelope,
    segment_size: Option<usize>,
    bytes: Vec<u8>,
}

impl Member {
    fn new(shared: Arc<SharedSocket>, vni: Vni) -> io::Result<Self> {
        let (woken, wake) = io::pipe()?;
        let mailbox = Arc::new(Mailbox {
            is_filled: AtomicBool::new(false),
            state: Mutex::new(Mail {
                parcels: VecDeque::new(),
                bytes: 0,
                lost: 0,
                spare: Vec::new(),
                wake,
            }),
        });
        // An earlier life of this network may still be there for a moment.
        shared.change(|members| drop(members.insert(vni, Arc::clone(&mailbox))));
        Ok(Self {
            shared,
            vni,
            mailbox,
            woken,
        })
    }

    /// What to wait for besides the socket.
    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.woken.as_fd()
    }

    /// Receives what is this network's: what others have received first, then what `recv` appends to the batch.
    pub(super) fn recv(
        &self,
        batch: &mut DatagramBatch,
        slots: usize,
        recv: impl FnOnce(&mut DatagramBatch) -> io::Result<usize>,
    ) -> io::Result<()> {
        let is_alone = self.shared.count.load(Ordering::Acquire) < 2;
        if is_alone && !self.mailbox.is_filled.load(Ordering::Acquire) {
            return recv(batch).map(drop);
        }
        let reading = match self.shared.reading.try_lock() {
            Ok(reading) => Some(reading),
            Err(TryLockError::Poisoned(reading)) => Some(reading.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        self.empty(batch, slots)?;
        if reading.is_some() && !self.mailbox.is_filled.load(Ordering::Acquire) {
            let first = batch.datagrams().len();
            let received = recv(batch);
            // Of what came before an error, too.
            self.hand_around(batch, first);
            received?;
        }
        Ok(())
    }

    /// Moves what is in the mailbox to the batch, as far as there are slots.
    fn empty(&self, batch: &mut DatagramBatch, slots: usize) -> io::Result<()> {
        if !self.mailbox.is_filled.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut mail = self.mailbox.state.lock().unwrap_or_else(PoisonError::into_inner);
        batch.note_overflows(std::mem::take(&mut mail.lost));
        for _ in 0..slots {
            let Some(parcel) = mail.parcels.pop_front() else {
                break;
            };
            if !batch.push(parcel.envelope, &parcel.bytes, parcel.segment_size) {
                mail.parcels.push_front(parcel);
                break;
            }
            mail.bytes -= parcel.bytes.len();
            if mail.spare.len() < SPARE {
                mail.spare.push(parcel.bytes);
            }
        }
        if mail.parcels.is_empty() {
            // The byte is there: it is written under this lock. Threads that move packets may not call read(2), but readv(2).
            if (&self.woken).read_vectored(&mut [IoSliceMut::new(&mut [0])])? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.mailbox.is_filled.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Gives the others what is theirs of the datagrams from `first` on.
    fn hand_around(&self, batch: &mut DatagramBatch, first: usize) {
        let members = self.shared.members();
        batch.winnow(first, |datagram, bytes| {
            let step = datagram.segment_size.unwrap_or(bytes.len()).max(1);
            let of = |segment: &[u8]| {
                let vni = VxlanHeader::parse(segment).ok()?.vni?;
                (vni != self.vni).then(|| members.get(&vni)).flatten()
            };
            let same = |one: Option<&Arc<Mailbox>>, two: Option<&Arc<Mailbox>>| match (one, two) {
                (Some(one), Some(two)) => Arc::ptr_eq(one, two),
                (None, None) => true,
                (Some(_), None) | (None, Some(_)) => false,
            };
            let owner = bytes.chunks(step).next().and_then(of);
            if bytes.chunks(step).all(|segment| same(of(segment), owner)) {
                let Some(owner) = owner else { return bytes.len() };
                owner.put(datagram.envelope, datagram.segment_size, bytes);
                return 0;
            }
            // Of several networks: ours move to the front, the others' go one by one.
            let mut kept = 0;
            for start in (0..bytes.len()).step_by(step) {
                let end = bytes.len().min(start + step);
                match bytes.get(start..end).map(|segment| (segment, of(segment))) {
                    Some((segment, Some(owner))) => owner.put(datagram.envelope, None, segment),
                    Some((_, None)) => {
                        bytes.copy_within(start..end, kept);
                        kept += end - start;
                    }
                    None => {}
                }
            }
            kept
        });
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.shared.change(|members| {
            if members
                .get(&self.vni)
                .is_some_and(|mailbox| Arc::ptr_eq(mailbox, &self.mailbox))
            {
                members.remove(&self.vni);
            }
        });
    }
}

impl Mailbox {
    fn put(&self, envelope: Envelope, segment_size: Option<usize>, bytes: &[u8]) {
        let mut mail = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if mail.bytes + bytes.len() > MAILBOX_BYTES {
            mail.lost += bytes.len().div_ceil(segment_size.unwrap_or(bytes.len()).max(1)) as u64;
            return;
        }
        let mut parcel = mail.spare.pop().unwrap_or_default();
        parcel.clear();
        parcel.extend_from_slice(bytes);
        mail.bytes += bytes.len();
        mail.parcels.push_back(Parcel {
            envelope,
            segment_size,
            bytes: parcel,
        });
        // A reader that is gone wants nothing.
        if !self.is_filled.swap(true, Ordering::AcqRel) {
            let _ = mail.wake.write(&[0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::time::Duration;

    use super::*;
    use crate::dataplane::Oversize;
    use crate::dataplane::Underlay;
    use crate::host::probe::Switch;
    use crate::host::socket::{UdpUnderlay, UnderlayOptions};
    use crate::host::sys;

    #[test]
    fn each_network_gets_its_own_in_order_whoever_receives() {
        let ports = SharedPorts::default();
        let options = options();
        let mut seven = open(&ports, 7, &options);
        let mut eight = open(&ports, 8, &options);
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        for round in 0..20u8 {
            for i in 0..10 {
                for vni in [7, 8, 9] {
                    sender.send_to(&datagram(vni, round * 10 + i), to).unwrap();
                }
            }
            // By turns, so that each finds what the other left.
            let both = [&mut seven, &mut eight];
            let mut got = [Vec::new(), Vec::new()];
            for turn in 0..40 {
                let which = (turn + usize::from(round)) % 2;
                let (underlay, vni) = (&mut *both[which], [7, 8][which]);
                got[which].extend(received(underlay).into_iter().filter(|(of, _)| *of == vni));
            }
            for (got, vni) in got.iter().zip([7, 8]) {
                let wanted: Vec<_> = (0..10).map(|i| (vni, round * 10 + i)).collect();
                assert_eq!(*got, wanted, "round {round}");
            }
        }
    }

    #[test]
    fn a_run_of_several_networks_is_taken_apart() {
        let ports = SharedPorts::default();
        let options = options();
        let mut seven = open(&ports, 7, &options);
        let mut eight = open(&ports, 8, &options);
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let size = i32::try_from(datagram(7, 0).len()).unwrap();
        sys::set_option(sender.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, size).unwrap();
        let mixed: Vec<u8> = [(7, 0), (8, 1), (8, 2), (7, 3), (9, 4), (7, 5)]
            .into_iter()
            .flat_map(|(vni, number)| datagram(vni, number))
            .collect();
        sender.send_to(&mixed, to).unwrap();
        assert_eq!(received(&mut seven), [(7, 0), (7, 3), (9, 4), (7, 5)]);
        assert_eq!(received(&mut eight), [(8, 1), (8, 2)]);
        let whole: Vec<u8> = (0..30).flat_map(|number| datagram(8, number)).collect();
        sender.send_to(&whole, to).unwrap();
        assert_eq!(received(&mut seven), []);
        assert_eq!(received(&mut eight).len(), 30);
    }

    #[test]
    fn networks_come_and_go_and_the_socket_stays_as_long_as_one_is_there() {
        let ports = SharedPorts::default();
        let options = options();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut seven = open(&ports, 7, &options);
        let mut eight = open(&ports, 8, &options);
        sender.send_to(&datagram(8, 1), to).unwrap();
        assert_eq!(received(&mut seven), []);
        // The first is gone, what it received is not.
        drop(seven);
        sender.send_to(&datagram(8, 2), to).unwrap();
        assert_eq!(received(&mut eight), [(8, 1), (8, 2)]);
        // It is back, and so is an earlier life that ends late.
        let before = open(&ports, 7, &options);
        let mut seven = open(&ports, 7, &options);
        drop(before);
        sender.send_to(&datagram(7, 3), to).unwrap();
        assert_eq!(received(&mut eight), []);
        assert!(
            sys::wait_readable(seven.readable(), 0).unwrap().any(),
            "it is woken"
        );
        assert_eq!(received(&mut seven), [(7, 3)]);
        drop((seven, eight));
        assert!(UdpSocket::bind(to).is_ok(), "the port is free");
    }

    #[test]
    fn a_network_that_does_not_look_costs_the_others_nothing_but_a_mailbox() {
        let ports = SharedPorts::default();
        let options = options();
        let mut seven = open(&ports, 7, &options);
        let mut eight = open(&ports, 8, &options);
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut big = datagram(8, 0);
        big.resize(32_000, 0);
        for _ in 0..200 {
            sender.send_to(&big, to).unwrap();
            assert_eq!(received(&mut seven), []);
        }
        let mut batch = DatagramBatch::new();
        let (mut kept, mut lost) = (0, 0);
        for _ in 0..100 {
            batch.clear();
            eight.recv(&mut batch).unwrap();
            kept += batch.datagrams().len();
            lost += batch.overflows();
        }
        assert_eq!(
            (kept, lost),
            (MAILBOX_BYTES / 32_000, 200 - MAILBOX_BYTES as u64 / 32_000)
        );
    }

    #[test]
    fn two_threads_that_receive_at_a_time_keep_the_order() {
        const EACH: u32 = 20_000;
        let ports = SharedPorts::default();
        let options = options();
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
        let (seven, eight) = (open(&ports, 7, &options), open(&ports, 8, &options));
        let done = AtomicBool::new(false);
        let counts = std::thread::scope(|scope| {
            let threads = [(7, seven), (8, eight)].map(|(vni, mut underlay)| {
                let done = &done;
                scope.spawn(move || {
                    let mut batch = DatagramBatch::new();
                    let (mut last, mut count) = (0, 0);
                    loop {
                        let over = done.load(Ordering::Acquire);
                        batch.clear();
                        underlay.recv(&mut batch).unwrap();
                        if batch.is_empty() {
                            if over {
                                return count;
                            }
                            sys::wait_readable(underlay.readable(), 10).unwrap();
                        }
                        for &datagram in batch.datagrams() {
                            let start = DatagramBatch::start(datagram);
                            let bytes = &batch.bytes()[start..start + datagram.len];
                            for segment in bytes.chunks(datagram.segment_size.unwrap_or(datagram.len)) {
                                assert_eq!(VxlanHeader::parse(segment).unwrap().vni.unwrap().get(), vni);
                                let number = u32::from_be_bytes(*segment[22..].first_chunk().unwrap());
                                assert!(number > last, "{number} after {last}");
                                (last, count) = (number, count + 1);
                            }
                        }
                    }
                })
            });
            let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
            for number in 1..=EACH {
                for vni in [7, 8] {
                    let mut bytes = datagram(vni, 0);
                    bytes[22..26].copy_from_slice(&number.to_be_bytes());
                    sender.send_to(&bytes, to).unwrap();
                }
            }
            std::thread::sleep(Duration::from_millis(200));
            done.store(true, Ordering::Release);
            threads.map(|thread| thread.join().unwrap())
        });
        // The kernel's buffer may overflow on a busy machine.
        assert!(counts.iter().all(|&count| count > EACH / 2), "{counts:?}");
    }

    fn options() -> UnderlayOptions {
        let free = UdpSocket::bind("127.0.0.1:0").unwrap();
        UnderlayOptions {
            v4: Some(Ipv4Addr::LOCALHOST),
            v6: None,
            port: free.local_addr().unwrap().port(),
            source_ports: 1,
            queues: 1,
            gso: Switch::Auto,
            gro: Switch::Auto,
            v4_oversize: Oversize::FragmentHere,
            v6_oversize: Oversize::FragmentHere,
        }
    }

    fn open(ports: &SharedPorts, vni: u32, options: &UnderlayOptions) -> UdpUnderlay {
        UdpUnderlay::share((ports, Vni::new(vni).unwrap()), 0, options, [None, None]).unwrap()
    }

    /// VNI and number of what an underlay receives.
    fn received(underlay: &mut UdpUnderlay) -> Vec<(u32, u8)> {
        std::thread::sleep(Duration::from_millis(2));
        let mut batch = DatagramBatch::new();
        underlay.recv(&mut batch).unwrap();
        let mut got = Vec::new();
        for &datagram in batch.datagrams() {
            let start = DatagramBatch::start(datagram);
            let bytes = &batch.bytes()[start..start + datagram.len];
            for segment in bytes.chunks(datagram.segment_size.unwrap_or(datagram.len)) {
                let vni = VxlanHeader::parse(segment).unwrap().vni.unwrap();
                got.push((vni.get(), segment[22]));
            }
        }
        got
    }

    fn datagram(vni: u32, number: u8) -> Vec<u8> {
        let [_, high, middle, low] = vni.to_be_bytes();
        let mut bytes = vec![0x08, 0, 0, 0, high, middle, low, 0];
        bytes.resize(22, 0);
        bytes.resize(122, number);
        bytes
    }
}
