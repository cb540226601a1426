//! What passes an interface, by a packet socket.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};

use kersey::lab::netns::Namespace;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};

/// Room for what passes while nobody looks.
const BUFFER: usize = 256 << 20;
/// `PACKET_OUTGOING` of linux/if_packet.h.
const OUTGOING: u8 = 4;

/// Which way a packet went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Way {
    /// Into the namespace.
    In,
    /// Out of it.
    Out,
}

/// Packets of one interface, from their IP header on.
#[derive(Debug)]
pub(crate) struct Sniffer {
    socket: OwnedFd,
    index: usize,
}

impl Sniffer {
    /// Listens at an interface from now on.
    pub(crate) fn start(namespace: &Namespace, interface: &str) -> Self {
        let index = namespace
            .netlink(async |netlink| Ok(netlink.link(interface).await?.index))
            .unwrap();
        let socket = namespace
            .run(|| {
                Ok(socket(
                    AddressFamily::Packet,
                    SockType::Datagram,
                    SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
                    SockProtocol::EthAll,
                )?)
            })
            .unwrap();
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).unwrap();
        Self {
            socket,
            index: index as usize,
        }
    }

    /// What has passed since this was last asked.
    pub(crate) fn packets(&self) -> Vec<(Way, Vec<u8>)> {
        let mut buffer = vec![0; 1 << 16];
        let mut packets = Vec::new();
        loop {
            let (len, from) = match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((len, Some(from))) => (len, from),
                Ok((_, None)) | Err(Errno::ENETDOWN) => continue,
                Err(error) => {
                    assert_eq!(std::io::Error::from(error).kind(), ErrorKind::WouldBlock);
                    return packets;
                }
            };
            if from.ifindex() == self.index {
                let way = if from.pkttype() == OUTGOING {
                    Way::Out
                } else {
                    Way::In
                };
                packets.push((way, buffer[..len].to_vec()));
            }
        }
    }
}
