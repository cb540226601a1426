//! The TUN device: queues, virtio headers, offloads.
//!
//! One queue is made by the `tun` crate; it cannot do several queues, `IFF_TUN_EXCL` or offloads, so those are ioctls of ours
//! ([`sys::tun_open`], [`sys::tun_set_offload`]). Reading and writing is ours too: one packet a system call, gathered from pieces.
//!
//! What the kernel may hand us is asked for from the largest set down, and the ioctl's answer is the truth; offload flags outlive an earlier owner
//! of a persistent device, so they are set on every start, also to nothing. Without virtio headers (`--tun-tso=off`) every packet is plain.
//!
//! A single-queue device answers a second opener with EBUSY. A device with several queues would let one join silently, so it is made with
//! `IFF_TUN_EXCL`, and a device of the name that exists already is refused.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use socket2::{Domain, Protocol, Socket, Type};

use crate::dataplane::coalesce::Merge;
use crate::dataplane::packet::{PacketBatch, shape_places};
use crate::dataplane::stats::{Call, Calls, WorkerStats};
use crate::dataplane::{Device, DeviceError};
use crate::host::handover::{Bundle, Kind};
use crate::host::probe::{Probed, Switch};
use crate::host::sys;
use crate::wire::virtio::VirtioHeader;

/// TUN_F_CSUM (linux/if_tun.h).
pub const CSUM: u32 = 0x01;
/// TUN_F_TSO4.
pub const TSO4: u32 = 0x02;
/// TUN_F_TSO6.
pub const TSO6: u32 = 0x04;
/// TUN_F_USO4, TUN_F_USO6.
const USO4: u32 = 0x20;
const USO6: u32 = 0x40;
/// linux/if_tun.h; libc lacks it on some targets.
const IFF_TUN_EXCL: i32 = 0x8000;

/// What is wanted of the device.
#[derive(Clone, Debug)]
pub struct TunOptions {
    /// Device name.
    pub name: String,
    /// Number of queues.
    pub queues: usize,
    /// TCP super-packets, and with them virtio headers.
    pub tso: Switch,
    /// UDP super-packets.
    pub uso: Switch,
}

/// Which offloads the device has.
#[derive(Clone, Copy, Debug)]
pub struct TunOffloads {
    /// TCP super-packets
    pub tso: Probed,
    /// UDP super-packets
    pub uso: Probed,
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum TunError {
    /// No `/dev/net/tun`.
    #[error("cannot create TUN device {name:?}: /dev/net/tun is missing")]
    Missing {
        /// Device name.
        name: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Not allowed.
    #[error("cannot create TUN device {name:?}: not permitted")]
    Denied {
        /// Device name.
        name: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Somebody has it.
    #[error("cannot create TUN device {name:?}: it is in use by another process")]
    Busy {
        /// Device name.
        name: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {doing} TUN device {name:?}")]
    Other {
        /// What we were doing.
        doing: &'static str,
        /// Device name.
        name: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
}

/// The device, while its queues are handed out.
pub struct Tun {
    queues: Vec<OwnedFd>,
    offloads: TunOffloads,
}

impl Tun {
    /// Makes the device and asks for its offloads. Address, MTU and routes are others' work.
    ///
    /// # Errors
    /// See [`TunError`].
    pub fn create(options: &TunOptions) -> Result<Self, TunError> {
        let named = |source: io::Error, doing| {
            let name = options.name.clone();
            match source.raw_os_error() {
                // ENOTTY: something else stands at /dev/net/tun.
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::ENOTTY) => {
                    TunError::Missing { name, source }
                }
                Some(libc::EPERM | libc::EACCES) => TunError::Denied { name, source },
                Some(libc::EBUSY) => TunError::Busy { name, source },
                _ => TunError::Other { doing, name, source },
            }
        };
        let header = options.tso != Switch::Off;
        let queues = match options.queues {
            0 | 1 => vec![single_queue(&options.name, header).map_err(|source| named(source, "create"))?],
            several => {
                multi_queue(&options.name, header, several).map_err(|source| named(source, "create"))?
            }
        };
        let offloads = probe(&queues, options).map_err(|source| named(source, "set the offloads of"))?;
        Ok(Self { queues, offloads })
    }

    /// Takes over the queues of a device that is there already.
    ///
    /// # Errors
    /// It is gone, or is not what is wanted: another name, other headers, another kind of queues.
    pub fn adopt(queues: Vec<OwnedFd>, options: &TunOptions) -> io::Result<Self> {
        let several = if options.queues > 1 {
            libc::IFF_MULTI_QUEUE
        } else {
            0
        };
        let header = if options.tso == Switch::Off {
            0
        } else {
            libc::IFF_VNET_HDR
        };
        let wanted = libc::IFF_TUN | libc::IFF_NO_PI | several | header;
        let compared = wanted | libc::IFF_TAP | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR;
        for fd in &queues {
            let (name, flags) = sys::tun_described(fd.as_fd())?;
            if name != options.name {
                return Err(io::Error::other(format!("it is called {name:?}")));
            }
            if flags & compared != wanted {
                return Err(io::Error::other("its packets or queues have another form"));
            }
            let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let offloads = probe(&queues, options)?;
        Ok(Self { queues, offloads })
    }

    /// Puts a second descriptor of each queue into `bundle`.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hold(&self, bundle: &mut Bundle) -> io::Result<()> {
        for (queue, fd) in self.queues.iter().enumerate() {
            bundle.insert(Kind::Tun, queue, fd.try_clone()?);
        }
        Ok(())
    }

    /// Which offloads are in use.
    pub fn offloads(&self) -> TunOffloads {
        self.offloads
    }

    /// One value a queue for outbound and one for inbound; the device goes when all of them are dropped.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn into_queues(self) -> io::Result<Vec<(TunQueue, TunQueue)>> {
        let offloads = self.offloads;
        self.queues
            .into_iter()
            .map(|fd| {
                Ok((
                    TunQueue::new(fd.try_clone()?, offloads),
                    TunQueue::new(fd, offloads),
                ))
            })
            .collect()
    }
}

/// One queue, made by the `tun` crate.
fn single_queue(name: &str, header: bool) -> io::Result<OwnedFd> {
    let mut config = tun::Configuration::default();
    config.tun_name(name).platform_config(|platform| {
        platform.ensure_root_privileges(false).vnet_hdr(header);
    });
    let device = tun::create(&config).map_err(|error| match error {
        tun::Error::Io(error) => error,
        other @ (tun::Error::InvalidConfig
        | tun::Error::NotImplemented
        | tun::Error::NameTooLong
        | tun::Error::InvalidName
        | tun::Error::InvalidAddress
        | tun::Error::InvalidDescriptor
        | tun::Error::UnsupportedLayer
        | tun::Error::InvalidQueuesNumber
        | tun::Error::TryFromIntError
        | tun::Error::Nul(_)
        | tun::Error::ParseNum(_)
        | tun::Error::String(_)) => io::Error::other(other),
    })?;
    // The crate's descriptor closes with `device`; the queue lives on in ours.
    let fd = sys::duplicate(device.as_raw_fd())?;
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(fd)
}

/// Several queues: the first one makes the device and must be its only maker.
fn multi_queue(name: &str, header: bool, count: usize) -> io::Result<Vec<OwnedFd>> {
    let header = if header { libc::IFF_VNET_HDR } else { 0 };
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | header;
    (0..count)
        .map(|index| sys::tun_open(name, if index == 0 { flags | IFF_TUN_EXCL } else { flags }))
        .collect()
}

/// Asks for the largest set of offloads the kernel grants.
fn probe(queues: &[OwnedFd], options: &TunOptions) -> io::Result<TunOffloads> {
    if options.tso == Switch::Off {
        return Ok(TunOffloads {
            tso: Probed::Forced,
            uso: Probed::Forced,
        });
    }
    let all = |mask: u32| {
        queues
            .iter()
            .try_for_each(|fd| sys::tun_set_offload(fd.as_fd(), mask))
    };
    for fd in queues {
        sys::tun_set_header_size(fd.as_fd(), VirtioHeader::LEN as i32)?;
    }
    // USO4 and USO6 are granted together or not at all, and only on top of the others.
    let uso = Probed::ask(options.uso, || all(CSUM | TSO4 | TSO6 | USO4 | USO6));
    if uso.is_on() {
        return Ok(TunOffloads { tso: Probed::On, uso });
    }
    if all(CSUM | TSO4 | TSO6).is_ok() {
        return Ok(TunOffloads { tso: Probed::On, uso });
    }
    all(0)?;
    Ok(TunOffloads {
        tso: Probed::Missing,
        uso,
    })
}

/// One queue, for one direction.
pub struct TunQueue {
    fd: OwnedFd,
    header: bool,
    merge: Merge,
    raw: RawSockets,
    scratch: sys::ReadScratch,
    calls: Calls,
}

impl TunQueue {
    fn new(fd: OwnedFd, offloads: TunOffloads) -> Self {
        Self {
            fd,
            header: offloads.tso != Probed::Forced,
            merge: Merge {
                tcp: offloads.tso.is_on(),
                udp: offloads.uso.is_on(),
            },
            raw: RawSockets::open(),
            scratch: sys::ReadScratch::default(),
            calls: Calls::default(),
        }
    }

    /// What to wait for before receiving.
    pub fn readable(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Device for TunQueue {
    fn recv(&mut self, batch: &mut PacketBatch) -> io::Result<bool> {
        let Some((room, shape)) = batch.room() else {
            return Ok(false);
        };
        let mut header = [0u8; VirtioHeader::LEN];
        let front: &mut [u8] = if self.header { &mut header } else { &mut [] };
        self.calls.note(Call::Readv);
        let read = match sys::read_scattered(
            self.fd.as_fd(),
            front,
            room,
            shape_places(shape),
            &mut self.scratch,
        ) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            // The device is down (EIO): nothing comes until it is up again.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(false),
            Err(error) => return Err(error),
        };
        if read == 0 {
            return Ok(false);
        }
        let len = if self.header {
            read.saturating_sub(VirtioHeader::LEN)
        } else {
            read
        };
        // A kind of super-packet we did not ask for cannot come; should it, it is refused as an impossible packet.
        match VirtioHeader::parse(&header) {
            Ok((header, _)) => batch.commit(header, len),
            Err(_) => batch.commit(VirtioHeader::default(), 0),
        }
        Ok(true)
    }

    fn send(&mut self, frame: &[IoSlice<'_>]) -> Result<(), DeviceError> {
        // Without virtio headers nothing is merged, and the first piece is the empty header of a plain packet.
        let frame = if self.header {
            frame
        } else {
            frame.get(1..).unwrap_or(&[])
        };
        self.calls.note(Call::Writev);
        match sys::write_pieces(self.fd.as_fd(), frame) {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => DeviceError::Busy,
                Some(libc::EIO | libc::ENETDOWN) => DeviceError::Down,
                Some(libc::EBADFD | libc::EBADF) => DeviceError::Gone,
                _ => DeviceError::Refused,
            }),
        }
    }

    fn answer(&mut self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        self.calls.note(Call::Sendto);
        self.raw.send(packet, to)
    }

    fn merge(&self) -> Merge {
        self.merge
    }

    fn settle(&mut self, stats: &WorkerStats) {
        self.calls.settle(stats);
    }
}

/// Raw sockets for ICMP errors of our own; none where they are not granted. They are opened with the queue: the thread that uses it
/// may open nothing.
///
/// Errors go through a socket, not into the TUN: there, a packet with a local source address is a martian (net/ipv4/fib_frontend.c).
struct RawSockets {
    v4: io::Result<Socket>,
    v6: io::Result<Socket>,
}

impl RawSockets {
    fn open() -> Self {
        // IPPROTO_RAW: the packet carries its own IP header, and nothing is received.
        let open = |domain| {
            Socket::new(
                domain,
                Type::RAW.nonblocking().cloexec(),
                Some(Protocol::from(libc::IPPROTO_RAW)),
            )
        };
        Self {
            v4: open(Domain::IPV4),
            v6: open(Domain::IPV6),
        }
    }

    fn send(&self, packet: &[u8], to: IpAddr) -> io::Result<()> {
        let socket = match to {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        };
        match socket {
            Ok(socket) => socket.send_to(packet, &SocketAddr::new(to, 0).into()).map(drop),
            Err(error) => Err(error.kind().into()),
        }
    }
}
