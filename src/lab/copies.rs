//! Through userspace with nothing done there: the most a tunnel of a TUN device and a UDP socket could carry.
//!
//! What is read from a TUN device, virtio header and all, is sent as it is, in datagrams that UDP_SEGMENT cuts anywhere; what arrives
//! joined is written to the other device. No header is looked at, no sum made, no peer looked up: two system calls and two copies for a
//! super-packet at each end, which nobody in userspace can do without. What Kersey does costs the difference.
//!
//! It is no tunnel: it needs runs that arrive whole, as a veth with offloads hands them over, and one peer.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use socket2::{Domain, Socket, Type};

use crate::addr::Ipv4Prefix;
use crate::host::netlink::Route;
use crate::host::{sys, tun};
use crate::lab::netns::Namespace;
use crate::lab::pages::Pages;
use crate::lab::topology::{INTERFACE, Node};

/// The device on either node.
const DEVICE: &str = "copies0";
/// Where datagrams go to.
const PORT: u16 = 9_999;
/// IPv4 and UDP headers.
const OVERHEAD: u32 = 20 + 8;
/// Room for the largest thing read from either side.
const ROOM: usize = 10 + 65_536;
/// What waits in a socket at most, bytes.
const QUEUE: i32 = 16 << 20;

/// One node's end: two threads, until it is dropped.
#[derive(Debug)]
pub(in crate::lab) struct Copies {
    namespace: Namespace,
    socket: Socket,
    threads: Vec<JoinHandle<()>>,
}

impl Copies {
    /// Makes the device with address `addr` and a route to `peer_subnet`, and carries packets between it and `peer`.
    ///
    /// # Errors
    /// There is no TUN device or no socket to be had.
    pub(in crate::lab) fn start(
        node: &Node,
        addr: Ipv4Addr,
        peer: &Node,
        peer_subnet: Ipv4Prefix,
    ) -> Result<Self> {
        let (device, socket) = node
            .namespace
            .run(|| Ok((open_device()?, open_socket(node.v4, peer.v4)?)))?;
        let link_mtu = node.namespace.netlink(async |netlink| {
            let link_mtu = netlink.link(INTERFACE).await?.mtu_bytes;
            let index = netlink.link(DEVICE).await?.index;
            netlink.add_address(index, IpAddr::V4(addr), 32).await?;
            netlink.set_mtu(index, link_mtu - OVERHEAD).await?;
            netlink.set_up(index).await?;
            netlink
                .replace_route(&Route::direct(peer_subnet.into(), index))
                .await?;
            Ok(link_mtu)
        })?;
        let size = i32::try_from(link_mtu - OVERHEAD)?;
        sys::set_option(socket.as_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, size)?;
        sys::set_option(socket.as_fd(), libc::SOL_UDP, libc::UDP_GRO, 1)?;
        let (from_device, to_device) = (device.try_clone()?, device);
        let (from_socket, to_socket) = (
            UdpSocket::from(socket.try_clone()?),
            UdpSocket::from(socket.try_clone()?),
        );
        Ok(Self {
            namespace: Namespace::existing(node.namespace.name())?,
            socket,
            threads: vec![
                thread::spawn(move || outbound(from_device, &to_socket)),
                thread::spawn(move || inbound(&from_socket, to_device)),
            ],
        })
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // A thread whose device or socket is gone ends.
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self
            .namespace
            .netlink(async |netlink| Ok(netlink.delete_link(netlink.link(DEVICE).await?.index).await?));
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn open_device() -> Result<File> {
    let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let fd = sys::tun_open(DEVICE, flags).with_context(|| format!("cannot make {DEVICE}"))?;
    sys::tun_set_offload(fd.as_fd(), tun::CSUM | tun::TSO4 | tun::TSO6)?;
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(File::from(fd))
}

fn open_socket(own: Ipv4Addr, peer: Ipv4Addr) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        sys::set_option(socket.as_fd(), libc::SOL_SOCKET, option, QUEUE)?;
    }
    socket.bind(&SocketAddr::from((own, PORT)).into())?;
    socket.connect(&SocketAddr::from((peer, PORT)).into())?;
    Ok(socket)
}

fn outbound(mut device: File, socket: &UdpSocket) {
    let mut room = Pages::new(ROOM);
    while let Ok(len) = device.read(&mut room) {
        // What the socket refuses is lost, as in any tunnel.
        let _ = socket.send(&room[..len]);
    }
}

fn inbound(socket: &UdpSocket, mut device: File) {
    let mut room = Pages::new(ROOM);
    loop {
        match socket.recv(&mut room) {
            // Nothing sends an empty datagram: the socket was shut down.
            Ok(0) => break,
            // What the device refuses is lost.
            Ok(len) => _ = device.write(&room[..len]),
            // The peer's socket was not there yet.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(_) => break,
        }
    }
}
