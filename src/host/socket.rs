//! The UDP underlay: receive sockets on the well-known port, send sockets, segmentation and coalescing by the kernel.
//!
//! # Theory of operation
//!
//! For each family in use there is one receive socket, and a pool of send sockets; a pool of one is the receive socket
//! itself, so that datagrams leave from the well-known port.
//!
//! Sending: a run of two or more equal segments is one message with a UDP_SEGMENT control message; a run the kernel refuses to cut
//! (EIO, EINVAL, EMSGSIZE) is sent again datagram by datagram, and its destination goes without for a minute. One bad destination holds
//! up nothing else: its messages fail by themselves. A full socket is waited for, 2 ms a batch at the most, so that order is kept.
//!
//! Receiving: `recvmmsg` into 64 KiB slots with UDP_GRO. While messages are large, eight slots are used, so that a batch stays in the L2
//! cache; while they are small, all 64.
//!
//! Fallbacks, each with a switch: without UDP_SEGMENT, one message a datagram; without UDP_GRO, one datagram a slot.

mod family;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use self::family::Family;
use crate::addr::{Mtu, Vni};
use crate::dataplane::datagram::{DATAGRAM_SLOTS, DatagramBatch};
use crate::dataplane::packet::{PacketBatch, Run, RunLimits, SendPlan};
use crate::dataplane::stats::{Call, Calls, Count, WorkerStats};
use crate::dataplane::{Oversize, SendError, SendFailure, Underlay};
use crate::host::handover::{Bundle, Kind};
use crate::host::probe::{Probed, Switch};
use crate::host::shared_port::{Member, SharedPorts};
use crate::host::sys::{self, MessageTo, RecvScratch, SendScratch};
use crate::wire::ip::protocol;

/// Receive buffer asked for, bytes: 16 MiB holds 13 ms at 10 Gbit/s, longer than a worker is ever descheduled.
pub(super) const RECV_BUFFER: i32 = 16 << 20;
/// Send buffer asked for, bytes: 30 runs of 64 KiB in flight.
pub(super) const SEND_BUFFER: i32 = 2 << 20;
/// Slots used while messages are large.
const LARGE_SLOTS: usize = 8;
/// A message is large from here on, bytes.
const LARGE_BYTES: usize = 4096;
/// Segments of one message: the kernel's limit before 6.9.
const MAX_SEGMENTS: usize = 64;
/// How long a destination goes without segmentation offload after the kernel refused a run.
const GSO_HOLIDAY: Duration = Duration::from_secs(60);
/// The same after the path turned out too small for the segments: by then their senders know.
const PATH_HOLIDAY: Duration = Duration::from_secs(3);
/// How long full sockets are waited for in one batch, in tries of a millisecond.
///
/// A fast link makes room within that; on a slow one the buffer is the queue, and what does not fit it is dropped, as a full device
/// queue would. A longer wait would hold up the other direction, which may share the thread.
pub(super) const WAIT_TRIES: u32 = 2;
pub(super) const WAIT_MS: i32 = 1;

/// What is wanted of the underlay.
#[derive(Clone, Copy, Debug)]
pub struct UnderlayOptions {
    /// IPv4 address to bind, if the underlay has IPv4.
    pub v4: Option<Ipv4Addr>,
    /// IPv6 address to bind, if the underlay has IPv6.
    pub v6: Option<Ipv6Addr>,
    /// The well-known port.
    pub port: u16,
    /// Size of the pool of source ports; 1 is the well-known port itself.
    pub source_ports: usize,
    /// Number of queues: more than one share the port with SO_REUSEPORT.
    pub queues: usize,
    /// UDP_SEGMENT.
    pub gso: Switch,
    /// UDP_GRO.
    pub gro: Switch,
    /// What becomes of datagrams larger than an IPv4 path.
    pub v4_oversize: Oversize,
    /// What becomes of datagrams larger than an IPv6 path.
    pub v6_oversize: Oversize,
}

/// Which offloads the sockets have.
#[derive(Clone, Copy, Debug)]
pub struct SocketOffloads {
    /// UDP_SEGMENT
    pub gso: Probed,
    /// UDP_GRO
    pub gro: Probed,
}

/// Why the underlay cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum UnderlayError {
    /// Somebody has the port.
    #[error("cannot bind UDP {addr}: the port is taken")]
    PortTaken {
        /// Address and port.
        addr: SocketAddr,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {doing} the UDP socket for {addr}")]
    Socket {
        /// What we were doing.
        doing: &'static str,
        /// Address and port.
        addr: SocketAddr,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

/// One queue's sockets.
pub struct UdpUnderlay {
    v4: Option<Family>,
    v6: Option<Family>,
    source_ports: usize,
    recv_scratch: [RecvScratch; 2],
    send_scratch: SendScratch,
    /// Messages of the last batch were large.
    large: bool,
    /// Which family is received from first this time.
    v6_first: bool,
    /// Destinations that go without segmentation offload, and until when.
    holidays: Vec<(SocketAddr, Instant)>,
    calls: Calls,
}

impl UdpUnderlay {
    /// Opens and binds the sockets of one queue.
    ///
    /// # Errors
    /// See [`UnderlayError`].
    pub fn open(options: &UnderlayOptions) -> Result<Self, UnderlayError> {
        let v4 = options
            .v4
            .map(|ip| Family::open(ip.into(), options, None, (None, 0)))
            .transpose()?;
        let v6 = options
            .v6
            .map(|ip| Family::open(ip.into(), options, None, (None, 0)))
            .transpose()?;
        Ok(Self::of(v4, v6, options.source_ports.max(1)))
    }

    /// Opens the sockets of a queue for one of several networks of this process that have one port. Those on it are, of IPv4 and IPv6, the
    /// others' if they have them, else `earlier` of an earlier life, else new.
    ///
    /// # Errors
    /// See [`UnderlayError`].
    pub fn share(
        (ports, vni): (&SharedPorts, Vni),
        queue: usize,
        options: &UnderlayOptions,
        [v4, v6]: [Option<OwnedFd>; 2],
    ) -> Result<Self, UnderlayError> {
        let sharing = (Some((ports, vni)), queue);
        let v4 = options.v4.map(|ip| Family::open(ip.into(), options, v4, sharing));
        let v6 = options.v6.map(|ip| Family::open(ip.into(), options, v6, sharing));
        Ok(Self::of(
            v4.transpose()?,
            v6.transpose()?,
            options.source_ports.max(1),
        ))
    }

    /// Takes over the sockets of one queue, on the well-known port, of an earlier life.
    ///
    /// # Errors
    /// They are not the ones that `options` want; see [`UnderlayError`].
    pub fn adopt(
        options: &UnderlayOptions,
        v4: Option<OwnedFd>,
        v6: Option<OwnedFd>,
    ) -> Result<Self, UnderlayError> {
        let v4 = options
            .v4
            .map(|ip| Family::open(ip.into(), options, v4, (None, 0)));
        let v6 = options
            .v6
            .map(|ip| Family::open(ip.into(), options, v6, (None, 0)));
        Ok(Self::of(
            v4.transpose()?,
            v6.transpose()?,
            options.source_ports.max(1),
        ))
    }

    /// Puts second descriptors of the sockets on the well-known port into `bundle`.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hold(&self, queue: usize, bundle: &mut Bundle) -> io::Result<()> {
        for (kind, family) in [(Kind::Udp4, &self.v4), (Kind::Udp6, &self.v6)] {
            if let Some(family) = family {
                bundle.insert(kind, queue, family.recv.as_fd().try_clone_to_owned()?);
            }
        }
        Ok(())
    }

    fn of(v4: Option<Family>, v6: Option<Family>, source_ports: usize) -> Self {
        Self {
            v4,
            v6,
            source_ports,
            recv_scratch: Default::default(),
            send_scratch: SendScratch::default(),
            large: true,
            v6_first: false,
            holidays: Vec::new(),
            calls: Calls::default(),
        }
    }

    /// The same sockets for the other direction.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let clone = |family: &Option<Family>| family.as_ref().map(Family::try_clone).transpose();
        Ok(Self::of(clone(&self.v4)?, clone(&self.v6)?, self.source_ports))
    }

    /// Which offloads are in use; of the first family there is.
    pub fn offloads(&self) -> SocketOffloads {
        let missing = SocketOffloads {
            gso: Probed::Missing,
            gro: Probed::Missing,
        };
        self.v4
            .as_ref()
            .or(self.v6.as_ref())
            .map_or(missing, |family| family.offloads)
    }

    /// What to wait for before receiving.
    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.v4.iter().chain(&self.v6).flat_map(|family| {
            let woken = family.member.as_ref().map(Member::readable);
            [Some(family.recv.as_fd()), woken].into_iter().flatten()
        })
    }

    fn family(&self, to: SocketAddr) -> Option<&Family> {
        if to.is_ipv4() {
            self.v4.as_ref()
        } else {
            self.v6.as_ref()
        }
    }

    /// Ends holidays that are over.
    fn end_holidays(&mut self) {
        if !self.holidays.is_empty() {
            let now = now();
            self.holidays.retain(|&(_, until)| until > now);
        }
    }

    /// Sends messages from `at` on that leave from one socket; gives how many were sent.
    fn send_from(&mut self, at: Place, plan: &SendPlan, batch: &PacketBatch) -> io::Result<usize> {
        let Self {
            v4,
            v6,
            holidays,
            send_scratch,
            ..
        } = self;
        let family_of = |run: &Run| {
            if run.to.is_ipv4() {
                v4.as_ref()
            } else {
                v6.as_ref()
            }
        };
        let Some(run) = plan.runs().get(at.run) else {
            return Ok(0);
        };
        let Some(family) = family_of(run) else {
            return Err(io::Error::from_raw_os_error(libc::ENETUNREACH));
        };
        let socket = family.sender(run.port);
        let mut next = at;
        let messages = std::iter::from_fn(|| {
            let run = plan.runs().get(next.run)?;
            if !family_of(run).is_some_and(|family| std::ptr::eq(family.sender(run.port), socket)) {
                return None;
            }
            let whole = goes_whole(run, family.offloads, holidays);
            let taken = if whole { run.segments } else { 1 };
            let pieces = plan.slices(run, batch, next.segment, taken);
            let size =
                (whole && run.segments > 1).then_some(u16::try_from(run.segment_size).unwrap_or(u16::MAX));
            next = next.after(run, taken);
            Some((
                MessageTo {
                    to: run.to,
                    segment_size: size,
                    ecn: run.ecn,
                },
                pieces,
            ))
        });
        sys::send_messages(socket.as_fd(), messages, send_scratch)
    }
}

/// A message of the plan: a run, and the segment it starts with.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) run: usize,
    pub(super) segment: usize,
}

impl Place {
    pub(super) fn after(self, run: &Run, segments: usize) -> Self {
        match self.segment + segments {
            next if next >= run.segments => Self {
                run: self.run + 1,
                segment: 0,
            },
            next => Self {
                run: self.run,
                segment: next,
            },
        }
    }
}

/// Whether a run goes as one message that the kernel cuts.
fn goes_whole(run: &Run, offloads: SocketOffloads, holidays: &[(SocketAddr, Instant)]) -> bool {
    run.segments == 1 || (offloads.gso.is_on() && !holidays.iter().any(|&(to, _)| to == run.to))
}

impl Underlay for UdpUnderlay {
    fn recv(&mut self, batch: &mut DatagramBatch) -> io::Result<()> {
        let slots = if self.large { LARGE_SLOTS } else { DATAGRAM_SLOTS };
        let [scratch_v4, scratch_v6] = &mut self.recv_scratch;
        let mut families = [(&self.v4, scratch_v4), (&self.v6, scratch_v6)];
        // The first may fill the batch: a flood over one family must not starve the other.
        self.v6_first = !self.v6_first;
        if self.v6_first {
            families.reverse();
        }
        for (family, scratch) in families {
            let Some(family) = family else { continue };
            self.calls.note(Call::Recvmmsg);
            let mut recv = |batch: &mut DatagramBatch| {
                sys::recv_datagrams((family.recv.as_fd(), protocol::UDP), batch, scratch, slots)
            };
            let received = match &family.member {
                None => recv(batch).map(drop),
                Some(member) => member.recv(batch, slots, recv),
            };
            match received {
                Ok(()) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) => {
                    return Err(error);
                }
                // What the network says of earlier datagrams (ENETDOWN, ECONNREFUSED, …) is reported once and passes.
                Err(_) => {}
            }
        }
        if !batch.is_empty() {
            let bytes: usize = batch.datagrams().iter().map(|datagram| datagram.len).sum();
            self.large = bytes >= LARGE_BYTES * batch.datagrams().len();
        }
        Ok(())
    }

    fn send(
        &mut self,
        plan: &SendPlan,
        batch: &PacketBatch,
        stats: &WorkerStats,
        failures: &mut Vec<SendFailure>,
    ) -> io::Result<()> {
        self.end_holidays();
        let mut at = Place { run: 0, segment: 0 };
        let mut waits = 0;
        while let Some(run) = plan.runs().get(at.run) {
            let whole = self
                .family(run.to)
                .is_some_and(|family| goes_whole(run, family.offloads, &self.holidays));
            let segments = if whole { run.segments } else { 1 };
            if self.family(run.to).is_some() {
                stats.called(Call::Sendmmsg);
            }
            let error = match self.send_from(at, plan, batch) {
                Ok(sent) => {
                    for _ in 0..sent.max(1) {
                        let Some(run) = plan.runs().get(at.run) else { break };
                        let whole = self
                            .family(run.to)
                            .is_some_and(|family| goes_whole(run, family.offloads, &self.holidays));
                        at = at.after(run, if whole { run.segments } else { 1 });
                    }
                    continue;
                }
                Err(error) => error,
            };
            if error.raw_os_error() == Some(libc::EBADF) {
                return Err(error);
            }
            let too_big = error.raw_os_error() == Some(libc::EMSGSIZE);
            stats.count(Count::PathTooBig, u64::from(too_big));
            match classify(&error) {
                SendError::Busy if waits < WAIT_TRIES => {
                    waits += 1;
                    stats.count(Count::SendWaits, 1);
                    stats.called(Call::Poll);
                    if let Some(family) = self.family(run.to) {
                        sys::wait_writable(family.sender(run.port).as_fd(), WAIT_MS)?;
                    }
                    continue;
                }
                _ if segments > 1 && refuses_segmentation(&error) => {
                    stats.count(Count::GsoFallbacks, 1);
                    let holiday = if too_big { PATH_HOLIDAY } else { GSO_HOLIDAY };
                    self.holidays.push((run.to, now() + holiday));
                    continue;
                }
                error @ (SendError::Busy
                | SendError::Unreachable
                | SendError::Denied
                | SendError::TooBig
                | SendError::Refused) => failures.push(SendFailure {
                    run: at.run,
                    segments,
                    error,
                }),
            }
            at = at.after(run, segments);
        }
        Ok(())
    }

    fn limits(&self, to: SocketAddr) -> RunLimits {
        // IPv4: 65,535 less IP and UDP headers. IPv6: the payload length covers the UDP header only.
        let bytes = if to.is_ipv4() { 65_507 } else { 65_527 };
        RunLimits {
            segments: MAX_SEGMENTS,
            bytes,
        }
    }

    fn source_ports(&self) -> usize {
        self.source_ports
    }

    fn settle(&mut self, stats: &WorkerStats) {
        self.calls.settle(stats);
    }
}

/// Whether the kernel's refusal of a run may concern segmentation and not the datagrams.
///
/// EIO: the device has no checksum offload (net/ipv4/udp.c, before 6.11). EINVAL: too many segments, or checksums off. EMSGSIZE: a segment
/// above the route's MTU, which single datagrams survive by fragmentation.
fn refuses_segmentation(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE)
    )
}

/// Whether somebody has UDP port `port`, on whatever address of this machine.
pub fn port_is_taken(port: u16) -> bool {
    let taken = |domain: Domain, addr: IpAddr| {
        Socket::new(domain, Type::DGRAM.cloexec(), Some(Protocol::UDP))
            .and_then(|socket| {
                if addr.is_ipv6() {
                    socket.set_only_v6(true)?;
                }
                socket.bind(&SocketAddr::new(addr, port).into())
            })
            .is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse)
    };
    taken(Domain::IPV4, Ipv4Addr::UNSPECIFIED.into()) || taken(Domain::IPV6, Ipv6Addr::UNSPECIFIED.into())
}

/// The largest datagram, IP header included, that the kernel would send to `to` unfragmented: the MTU of the route, or of the path as far as
/// "too big" answers have told it.
///
/// # Errors
/// There is no route, or no socket to be had.
pub fn path_mtu(to: IpAddr) -> io::Result<Mtu> {
    let to = SocketAddr::new(to, 9);
    let socket = Socket::new(
        Domain::for_address(to),
        Type::DGRAM.cloexec(),
        Some(Protocol::UDP),
    )?;
    // Connecting a UDP socket sends nothing; it looks the route up.
    socket.connect(&to.into())?;
    let (level, name) = match to {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let bytes = sys::option(socket.as_fd(), level, name)?;
    // Loopback has 65,536.
    let bytes = u32::try_from(bytes).unwrap_or(0).min(u32::from(u16::MAX));
    Mtu::new(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

/// What a failed send means for the packets in it.
pub(super) fn classify(error: &io::Error) -> SendError {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => SendError::Busy,
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENETDOWN | libc::EADDRNOTAVAIL) => {
            SendError::Unreachable
        }
        Some(libc::EPERM | libc::EACCES) => SendError::Denied,
        Some(libc::EMSGSIZE) => SendError::TooBig,
        _ => SendError::Refused,
    }
}

#[expect(clippy::disallowed_methods, reason = "a shell: holidays end by the clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::packet::{RunKey, Segments};
    use crate::wire::ip::Ecn;
    use crate::wire::virtio::VirtioHeader;

    const OPTIONS: UnderlayOptions = UnderlayOptions {
        v4: Some(Ipv4Addr::LOCALHOST),
        v6: None,
        port: 0,
        source_ports: 1,
        queues: 1,
        gso: Switch::Auto,
        gro: Switch::Auto,
        v4_oversize: Oversize::FragmentHere,
        v6_oversize: Oversize::FragmentHere,
    };

    fn addr(underlay: &UdpUnderlay) -> SocketAddr {
        let family = underlay.v4.as_ref().or(underlay.v6.as_ref()).unwrap();
        family.recv.local_addr().unwrap().as_socket().unwrap()
    }

    /// Length and segment size of a message.
    type Message = (usize, Option<usize>);

    /// Sends segments of the given sizes as one flow and gives what arrives: (length, segment size) of each message, and all bytes.
    fn exchange(options: &UnderlayOptions, sizes: &[usize]) -> (Vec<Message>, Vec<u8>, Vec<u8>) {
        let mut sender = UdpUnderlay::open(options).unwrap();
        let mut receiver = UdpUnderlay::open(options).unwrap();
        let to = addr(&receiver);
        let mut batch = PacketBatch::new();
        let mut plan = SendPlan::new();
        let mut sent = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let payload: Vec<u8> = (0..size).map(|at| (at + index) as u8).collect();
            assert!(batch.push(VirtioHeader::default(), &payload));
            let key = RunKey {
                to,
                port: 0,
                ecn: Ecn::NotEct,
                flow: 1,
                peer: 0,
            };
            plan.push(
                key,
                sender.limits(to),
                Segments {
                    at: batch.meta(index).start(),
                    bytes: size,
                    size,
                },
                index,
            );
            sent.extend(payload);
        }
        let stats = WorkerStats::default();
        let mut failures = Vec::new();
        sender.send(&plan, &batch, &stats, &mut failures).unwrap();
        assert_eq!(failures, []);
        let mut received = Vec::new();
        let mut messages = Vec::new();
        while received.len() < sent.len() {
            let mut incoming = DatagramBatch::new();
            assert!(
                sys::wait_readable(receiver.readable(), 2000).unwrap().any(),
                "only {} of {} bytes",
                received.len(),
                sent.len()
            );
            receiver.recv(&mut incoming).unwrap();
            for datagram in incoming.datagrams() {
                let start = DatagramBatch::start(*datagram);
                received.extend_from_slice(&incoming.bytes()[start..start + datagram.len]);
                messages.push((datagram.len, datagram.segment_size));
            }
        }
        (messages, sent, received)
    }

    #[test]
    fn a_run_arrives_whole_with_its_segment_size() {
        let (messages, sent, received) = exchange(&OPTIONS, &[1000, 1000, 1000, 400]);
        assert_eq!(received, sent);
        assert_eq!(messages, [(3400, Some(1000))]);
    }

    #[test]
    fn without_gro_datagrams_arrive_one_by_one() {
        let options = UnderlayOptions {
            gro: Switch::Off,
            ..OPTIONS
        };
        let (messages, sent, received) = exchange(&options, &[1000, 1000, 400]);
        assert_eq!(received, sent);
        assert_eq!(messages, [(1000, None), (1000, None), (400, None)]);
    }

    #[test]
    fn without_gso_every_segment_is_a_message() {
        let options = UnderlayOptions {
            gso: Switch::Off,
            gro: Switch::Off,
            ..OPTIONS
        };
        let (messages, sent, received) = exchange(&options, &[1000, 1000, 1000, 400]);
        assert_eq!(received, sent);
        assert_eq!(messages.len(), 4);
    }

    #[test]
    fn ipv6_and_a_pool_of_ports_work_alike() {
        let options = UnderlayOptions {
            v4: None,
            v6: Some(Ipv6Addr::LOCALHOST),
            source_ports: 4,
            ..OPTIONS
        };
        let (messages, sent, received) = exchange(&options, &[1200, 1200, 7]);
        assert_eq!(received, sent);
        assert_eq!(messages, [(2407, Some(1200))]);
    }

    #[test]
    fn a_destination_on_holiday_gets_its_run_datagram_by_datagram() {
        // netns-tests/socket.rs makes the kernel refuse a run; here only what follows is seen.
        let mut sender = UdpUnderlay::open(&OPTIONS).unwrap();
        let mut receiver = UdpUnderlay::open(&UnderlayOptions {
            gro: Switch::Off,
            ..OPTIONS
        })
        .unwrap();
        let to = addr(&receiver);
        sender.holidays.push((to, now() + GSO_HOLIDAY));
        let mut batch = PacketBatch::new();
        let mut plan = SendPlan::new();
        for index in 0..5 {
            assert!(batch.push(VirtioHeader::default(), &[index as u8; 900]));
            let key = RunKey {
                to,
                port: 0,
                ecn: Ecn::NotEct,
                flow: 1,
                peer: 0,
            };
            plan.push(
                key,
                sender.limits(to),
                Segments {
                    at: batch.meta(index).start(),
                    bytes: 900,
                    size: 900,
                },
                index,
            );
        }
        assert_eq!(plan.runs().len(), 1);
        sender
            .send(&plan, &batch, &WorkerStats::default(), &mut Vec::new())
            .unwrap();
        let mut got = Vec::new();
        while got.len() < 5 {
            assert!(sys::wait_readable(receiver.readable(), 2000).unwrap().any());
            let mut incoming = DatagramBatch::new();
            receiver.recv(&mut incoming).unwrap();
            got.extend(
                incoming
                    .datagrams()
                    .iter()
                    .map(|datagram| incoming.bytes()[DatagramBatch::start(*datagram)]),
            );
        }
        assert_eq!(got, [0, 1, 2, 3, 4], "in order");
    }

    #[test]
    fn one_bad_destination_holds_up_nothing_else() {
        let mut sender = UdpUnderlay::open(&OPTIONS).unwrap();
        let mut receiver = UdpUnderlay::open(&OPTIONS).unwrap();
        let good = addr(&receiver);
        // Bound to loopback, nothing else can be reached.
        let bad = SocketAddr::from(([203, 0, 113, 1], 9));
        let v6 = SocketAddr::from(([0xfd00, 0, 0, 0, 0, 0, 0, 1], 9));
        let mut batch = PacketBatch::new();
        let mut plan = SendPlan::new();
        for (index, to) in [bad, good, v6, good].into_iter().enumerate() {
            assert!(batch.push(VirtioHeader::default(), &[index as u8; 100]));
            let key = RunKey {
                to,
                port: 0,
                ecn: Ecn::NotEct,
                flow: index as u32,
                peer: index as u32,
            };
            plan.push(
                key,
                sender.limits(to),
                Segments {
                    at: batch.meta(index).start(),
                    bytes: 100,
                    size: 100,
                },
                index,
            );
        }
        let mut failures = Vec::new();
        sender
            .send(&plan, &batch, &WorkerStats::default(), &mut failures)
            .unwrap();
        assert_eq!(
            failures.iter().map(|failure| failure.run).collect::<Vec<_>>(),
            [0, 2]
        );
        assert_eq!(failures[1].error, SendError::Unreachable);
        let mut got = Vec::new();
        while got.len() < 2 {
            assert!(sys::wait_readable(receiver.readable(), 2000).unwrap().any());
            let mut incoming = DatagramBatch::new();
            receiver.recv(&mut incoming).unwrap();
            got.extend(
                incoming
                    .datagrams()
                    .iter()
                    .map(|datagram| incoming.bytes()[DatagramBatch::start(*datagram)]),
            );
        }
        assert_eq!(got, [1, 3]);
    }

    #[test]
    fn a_taken_port_is_named() {
        let first = UdpUnderlay::open(&OPTIONS).unwrap();
        let error = UdpUnderlay::open(&UnderlayOptions {
            port: addr(&first).port(),
            ..OPTIONS
        })
        .err()
        .unwrap();
        assert!(error.to_string().contains("the port is taken"), "{error}");
    }
}
