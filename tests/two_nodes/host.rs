//! The host behind a node's device: a smoltcp stack, and a kernel's habit of handing out super-packets.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Addrs, IpHeader, protocol};
use kersey::wire::transport::{tcp, tcp_header_len};
use kersey::wire::virtio::{Gso, GsoKind, PartialChecksum, VirtioHeader};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp as smol_tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};

/// How a host hands TCP over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sends {
    /// Segment by segment, checksums done.
    Segments,
    /// As super-packets where segments follow each other, checksums half done.
    SuperPackets,
}

/// A host with one address, which sends over one connection and receives over another.
///
/// Two connections because smoltcp, when both ends of one retransmit at once, sends its acknowledgements with a sequence number
/// the other end takes for old and ignores, for ever.
pub(crate) struct Host {
    interface: Interface,
    sockets: SocketSet<'static>,
    client: SocketHandle,
    server: SocketHandle,
    link: Link,
    sends: Sends,
    to_send: VecDeque<u8>,
    accepted: bool,
    /// What its application has received.
    pub(crate) received: Vec<u8>,
}

/// Bytes a socket may have under way, so that bursts become super-packets.
const BUFFER_BYTES: usize = 256 * 1024;
/// Longest super-packet, bytes: the kernel leaves room for the headers of its tunnels.
const LARGEST: usize = 64_360;
/// Where the server listens.
const PORT: u16 = 5201;

impl Host {
    /// A host behind a link of `mtu` bytes, ready to receive.
    pub(crate) fn new(address: IpAddr, mtu: usize, sends: Sends) -> Self {
        let mut link = Link {
            incoming: VecDeque::new(),
            outgoing: Vec::new(),
            mtu,
        };
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut link, Instant::ZERO);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::new(address.into(), 0)).unwrap());
        let buffer = || smol_tcp::SocketBuffer::new(vec![0; BUFFER_BYTES]);
        let mut sockets = SocketSet::new(Vec::new());
        let client = sockets.add(smol_tcp::Socket::new(buffer(), buffer()));
        let mut listening = smol_tcp::Socket::new(buffer(), buffer());
        listening.listen(PORT).unwrap();
        let server = sockets.add(listening);
        Self {
            interface,
            sockets,
            client,
            server,
            link,
            sends,
            to_send: VecDeque::new(),
            accepted: false,
            received: Vec::new(),
        }
    }

    /// Opens a connection, to send `bytes` over it and close it.
    pub(crate) fn send_to(&mut self, to: IpAddr, bytes: &[u8]) {
        self.to_send.extend(bytes);
        let client = self.sockets.get_mut::<smol_tcp::Socket>(self.client);
        client
            .connect(self.interface.context(), (to, PORT), 40_000)
            .unwrap();
    }

    /// Takes a packet from the overlay.
    pub(crate) fn receive(&mut self, packet: Vec<u8>) {
        self.link.incoming.push_back(packet);
    }

    /// Runs the stack and its application; gives what it sends into the overlay.
    pub(crate) fn poll(&mut self, now: Duration) -> Vec<(VirtioHeader, Vec<u8>)> {
        // Once for what came in, once for what the application made of it.
        for _ in 0..2 {
            self.interface.poll(at(now), &mut self.link, &mut self.sockets);
            self.run_application();
        }
        self.interface.poll(at(now), &mut self.link, &mut self.sockets);
        let segments = std::mem::take(&mut self.link.outgoing);
        match self.sends {
            Sends::Segments => segments
                .into_iter()
                .map(|packet| (VirtioHeader::default(), packet))
                .collect(),
            Sends::SuperPackets => super_packets(segments),
        }
    }

    /// When the stack wants to run again without being given a packet.
    pub(crate) fn next_poll(&mut self, now: Duration) -> Option<Duration> {
        self.interface
            .poll_delay(at(now), &self.sockets)
            .map(|delay| now + Duration::from_micros(delay.total_micros()))
    }

    /// Whether the other end has closed and everything was read.
    pub(crate) fn has_all(&self) -> bool {
        let server = self.sockets.get::<smol_tcp::Socket>(self.server);
        self.accepted && !server.may_recv() && server.recv_queue() == 0
    }

    fn run_application(&mut self) {
        let server = self.sockets.get_mut::<smol_tcp::Socket>(self.server);
        self.accepted |= server.may_send();
        while server.can_recv() {
            let received = &mut self.received;
            let read = server.recv(|bytes| {
                received.extend_from_slice(bytes);
                (bytes.len(), ())
            });
            read.unwrap();
        }
        let client = self.sockets.get_mut::<smol_tcp::Socket>(self.client);
        while client.can_send() && !self.to_send.is_empty() {
            let sent = client.send_slice(self.to_send.as_slices().0).unwrap();
            self.to_send.drain(..sent);
        }
        if self.to_send.is_empty() && client.may_send() {
            client.close();
        }
    }
}

fn at(now: Duration) -> Instant {
    Instant::from_micros(now.as_micros() as i64)
}

/// The host's end of the device.
struct Link {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    mtu: usize,
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Vec<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Link {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sending<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Received(packet), Sending(&mut self.outgoing)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

/// Joins TCP segments that follow each other, as the sending kernel would never have cut them, and leaves checksums half done.
pub(crate) fn super_packets(segments: Vec<Vec<u8>>) -> Vec<(VirtioHeader, Vec<u8>)> {
    let mut joined: Vec<Growing> = Vec::new();
    let mut out = Vec::new();
    for segment in segments {
        let Some(next) = Growing::of(segment) else {
            continue;
        };
        match joined.last_mut() {
            Some(last) if last.takes(&next) => last.take(&next),
            Some(_) | None => joined.push(next),
        }
    }
    for growing in joined {
        out.push(growing.finish());
    }
    out
}

/// A super-packet being put together.
struct Growing {
    ip: IpHeader,
    bytes: Vec<u8>,
    header_len: usize,
    /// Payload bytes of the first segment.
    size: usize,
    segments: usize,
    open: bool,
}

impl Growing {
    /// `None` if it is no TCP packet, which a host with a TCP socket only never sends.
    fn of(bytes: Vec<u8>) -> Option<Self> {
        let ip = IpHeader::parse(&bytes)
            .ok()
            .filter(|ip| ip.protocol == protocol::TCP)?;
        let header_len = ip.l4 + tcp_header_len(&bytes[ip.l4..]).ok()?;
        let flags = bytes[ip.l4 + tcp::FLAGS];
        let size = bytes.len() - header_len;
        Some(Self {
            ip,
            header_len,
            size,
            segments: 1,
            open: flags == tcp::ACK_FLAG && size > 0,
            bytes,
        })
    }

    fn seq(&self) -> u32 {
        u32::from_be_bytes(self.bytes[self.ip.l4..][tcp::SEQ].try_into().unwrap())
    }

    fn takes(&self, next: &Self) -> bool {
        let same = |from: usize, to: usize| self.bytes[from..to] == next.bytes[from..to];
        let (l4, end) = (self.ip.l4, self.header_len);
        let payload = self.bytes.len() - end;
        let data = next.bytes[l4 + tcp::FLAGS] & !(tcp::PSH | tcp::FIN) == tcp::ACK_FLAG;
        self.open
            && data
            && self.ip.addrs == next.ip.addrs
            && end == next.header_len
            && next.size > 0
            && next.size <= self.size
            && self.bytes.len() + next.size <= LARGEST
            && same(l4, l4 + 4)
            && same(l4 + 8, l4 + 13)
            && same(l4 + 14, l4 + 16)
            && same(l4 + 20, end)
            && next.seq() == self.seq().wrapping_add(payload as u32)
    }

    fn take(&mut self, next: &Self) {
        self.bytes.extend_from_slice(&next.bytes[next.header_len..]);
        let flags = next.bytes[self.ip.l4 + tcp::FLAGS];
        self.bytes[self.ip.l4 + tcp::FLAGS] |= flags;
        self.segments += 1;
        self.open = next.size == self.size && flags == tcp::ACK_FLAG;
    }

    fn finish(mut self) -> (VirtioHeader, Vec<u8>) {
        let (l4, total) = (self.ip.l4, self.bytes.len());
        let kind = match self.ip.addrs {
            Addrs::V4 { .. } => {
                self.bytes[2..4].copy_from_slice(&(total as u16).to_be_bytes());
                self.bytes[10..12].fill(0);
                let sum = Sum::of(&self.bytes[..l4]).finish();
                self.bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                GsoKind::TcpV4
            }
            Addrs::V6 { .. } => {
                self.bytes[4..6].copy_from_slice(&((total - 40) as u16).to_be_bytes());
                GsoKind::TcpV6
            }
        };
        let pseudo = self.ip.pseudo(total - l4).fold();
        self.bytes[l4..][tcp::CHECKSUM].copy_from_slice(&pseudo.to_be_bytes());
        let checksum = Some(PartialChecksum {
            start: l4 as u16,
            offset: tcp::CHECKSUM.start as u16,
        });
        let gso = (self.segments > 1).then_some(Gso {
            kind,
            size: self.size as u16,
            header_len: self.header_len as u16,
        });
        (VirtioHeader { checksum, gso }, self.bytes)
    }
}
