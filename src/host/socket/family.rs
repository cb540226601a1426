//! The sockets of one address family: opened, or taken over from an earlier life, and set.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use socket2::{Domain, Protocol, Socket, Type};

use super::{RECV_BUFFER, SEND_BUFFER, SocketOffloads, UnderlayError, UnderlayOptions};
use crate::addr::Vni;
use crate::dataplane::Oversize;
use crate::host::probe::Probed;
use crate::host::shared_port::{Member, SharedPorts};
use crate::host::sys;

/// Sockets of one family.
pub(super) struct Family {
    pub(super) recv: Socket,
    /// Empty for a pool of one: then `recv` sends.
    pool: Vec<Socket>,
    pub(super) offloads: SocketOffloads,
    /// The part in `recv` of one of several networks that receive by it.
    pub(super) member: Option<Member>,
}

/// Which networks receive by one socket, and which of them this is.
pub(super) type Sharing<'p> = Option<(&'p SharedPorts, Vni)>;

impl Family {
    /// Opens the sockets of a queue; the one on the well-known port is `earlier`, if there is one, or that of another network of this process.
    pub(super) fn open(
        ip: IpAddr,
        options: &UnderlayOptions,
        earlier: Option<OwnedFd>,
        (sharing, queue): (Sharing<'_>, usize),
    ) -> Result<Self, UnderlayError> {
        let addr = SocketAddr::new(ip, options.port);
        let open = || match earlier {
            Some(earlier) => adopted(earlier, addr, options),
            None => bound(addr, options),
        };
        let (recv, member) = match sharing {
            None => (open()?, None),
            Some((ports, vni)) => {
                let (recv, member) =
                    ports.join((addr, queue), vni, open, |source| UnderlayError::Socket {
                        doing: "share",
                        addr,
                        source,
                    })?;
                (recv, Some(member))
            }
        };
        let gso = Probed::ask(options.gso, || {
            sys::set_option(recv.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 1200)?;
            sys::set_option(recv.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, 0)
        });
        let gro = Probed::ask(options.gro, || {
            sys::set_option(recv.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1)
        });
        let pool_size = if options.source_ports > 1 {
            options.source_ports
        } else {
            0
        };
        let pool = (0..pool_size)
            .map(|_| bound(SocketAddr::new(ip, 0), options))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            recv,
            pool,
            offloads: SocketOffloads { gso, gro },
            member,
        })
    }

    /// The socket that stands for a place in the pool.
    pub(super) fn sender(&self, port: usize) -> &Socket {
        self.pool.get(port % self.pool.len().max(1)).unwrap_or(&self.recv)
    }

    /// The same sockets, to send by.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let pool = self
            .pool
            .iter()
            .map(Socket::try_clone)
            .collect::<io::Result<_>>()?;
        Ok(Self {
            recv: self.recv.try_clone()?,
            pool,
            offloads: self.offloads,
            member: None,
        })
    }
}

/// `IP_PMTUDISC_*` and `IPV6_PMTUDISC_*` of linux/in.h, in6.h: the numbers are the same.
fn discovery(oversize: Oversize) -> i32 {
    match oversize {
        Oversize::FragmentAnywhere => 0,
        Oversize::FragmentHere => 1,
        Oversize::Refuse => 2,
    }
}

/// Checks that a socket of an earlier life is the one for `addr`, and sets it as this life wants it.
fn adopted(earlier: OwnedFd, addr: SocketAddr, options: &UnderlayOptions) -> Result<Socket, UnderlayError> {
    let failed = |doing| move |source| UnderlayError::Socket { doing, addr, source };
    let socket = Socket::from(earlier);
    let is_udp = socket.r#type().map_err(failed("look at"))? == Type::DGRAM;
    let held = socket.local_addr().map_err(failed("look at"))?.as_socket();
    if !is_udp || held != Some(addr) {
        let other = io::Error::other("it is bound to another address");
        return Err(failed("take over")(other));
    }
    socket.set_nonblocking(true).map_err(failed("take over"))?;
    configure(&socket, addr, options)?;
    Ok(socket)
}

/// Opens and binds one socket.
fn bound(addr: SocketAddr, options: &UnderlayOptions) -> Result<Socket, UnderlayError> {
    let failed = |doing| move |source| UnderlayError::Socket { doing, addr, source };
    let socket = Socket::new(
        Domain::for_address(addr),
        Type::DGRAM.nonblocking().cloexec(),
        Some(Protocol::UDP),
    )
    .map_err(failed("open"))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true).map_err(failed("restrict to IPv6"))?;
    }
    if options.queues > 1 && addr.port() != 0 {
        socket.set_reuse_port(true).map_err(failed("share the port of"))?;
    }
    configure(&socket, addr, options)?;
    match socket.bind(&addr.into()) {
        Ok(()) => Ok(socket),
        Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
            Err(UnderlayError::PortTaken { addr, source })
        }
        Err(source) => Err(failed("bind")(source)),
    }
}

/// Sets what may be set on a socket at any time.
fn configure(socket: &Socket, addr: SocketAddr, options: &UnderlayOptions) -> Result<(), UnderlayError> {
    let failed = |doing| move |source| UnderlayError::Socket { doing, addr, source };
    let fd = socket.as_fd();
    if addr.is_ipv6() {
        let discovery = discovery(options.v6_oversize);
        sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, discovery)
            .map_err(failed("set MTU discovery of"))?;
        // A kernel that does not tell the codepoint leaves us with the one inside; that is no reason not to start.
        let _ = sys::set_option(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1);
    } else {
        let discovery = discovery(options.v4_oversize);
        sys::set_option(fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, discovery)
            .map_err(failed("set MTU discovery of"))?;
        let _ = sys::set_option(fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1);
    }
    // The forced forms pass the sysctl limits and need CAP_NET_ADMIN; the plain ones are capped silently. A socket of the pool
    // is never read: what strangers send there may fill no more than the kernel's least buffer.
    if addr.port() == 0 && options.port != 0 {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 0)
            .map_err(failed("size the receive buffer of"))?;
    } else if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, RECV_BUFFER).is_err() {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, RECV_BUFFER)
            .map_err(failed("size the receive buffer of"))?;
    }
    if sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, SEND_BUFFER).is_err() {
        sys::set_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, SEND_BUFFER)
            .map_err(failed("size the send buffer of"))?;
    }
    // Counting overflows is for show; a kernel without it loses nothing.
    let _ = sys::set_option(fd, libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1);
    Ok(())
}
