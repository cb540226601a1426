//! SRv6 as the kernel does it: routes that put packets under a segment list, and routes that are segments.
//!
//! Only what stands around Kersey needs this: a laboratory's kernel nodes, and tests. Kersey itself asks nothing of
//! the kernel's SRv6.
//!
//! ```text
//!   10.244.2.0/24        encap seg6 mode encap.red segs 1 [ SID ] dev eth0         Seg6Route
//!   fd12:…:201::4        encap seg6local action End.DX4 nh4 0.0.0.0 dev eth0       Sid
//!   outer source address                                                          set_tunnel_source
//! ```
//!
//! The outer source is one a namespace: the route attribute for it (`tunsrc`) is younger than the kernels we meet, so
//! it is set over generic netlink, family `SEG6`, as `ip sr tunsrc set` does.
//!
//! Limits: no inline mode, no Ethernet inside, no HMAC, no counters, and of the flavours only NEXT-CSID.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteLwEnCapType, RouteLwTunnelEncap, RouteMessage, RouteSeg6IpTunnel,
    RouteSeg6LocalTunnel, RouteType, Seg6Header, Seg6LocalAction,
};
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use rtnetlink::sys::{Socket, SocketAddr};

use super::message::{self, Route};
use super::{Netlink, NetlinkError, OrRefused, gone};
use crate::addr::{Ipv6Prefix, Prefix};

/// IPv6 header, and the fixed part of a segment routing header, RFC 8754 §2.
const IPV6_LEN: u32 = 40;
const SRH_LEN: u32 = 8;
/// Bytes of a segment in it.
const SEGMENT_LEN: u32 = 16;

/// How a packet gets its segment list, RFC 8986 §5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seg6Mode {
    /// H.Encaps: the list holds every segment, also where there is only one.
    Encap,
    /// H.Encaps.Red: the first segment is in the destination alone, so one segment needs no list.
    EncapRed,
}

impl Seg6Mode {
    /// Bytes in front of the inner packet on a path of so many segments.
    pub fn overhead_bytes(self, segments: usize) -> u32 {
        let segments = u32::try_from(segments).unwrap_or(u32::MAX / SEGMENT_LEN);
        match self {
            Self::Encap => IPV6_LEN + SRH_LEN + SEGMENT_LEN * segments,
            Self::EncapRed if segments <= 1 => IPV6_LEN,
            Self::EncapRed => IPV6_LEN + SRH_LEN + SEGMENT_LEN * (segments - 1),
        }
    }
}

/// A route in the main table that puts packets under an IPv6 header with a segment list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seg6Route {
    /// Which inner packets.
    pub destination: Prefix,
    /// Number of the underlay link. The outer packet goes where routing takes it; the MTU is judged by this link.
    pub index: u32,
    /// Which form of header.
    pub mode: Seg6Mode,
    /// The segments in the order of travel; the last one decapsulates. At least one.
    pub segments: Vec<Ipv6Addr>,
    /// The largest inner packet that sockets of this node may send, if not what the kernel makes of the link's MTU.
    ///
    /// Packets the node merely forwards are not measured by it, nor by anything else: they are encapsulated first, and
    /// if they then do not fit, the ICMP error goes to the tunnel source and no one hears it.
    pub inner_mtu_bytes: Option<u32>,
}

impl Seg6Route {
    fn message(&self) -> RouteMessage {
        let mut route = Route::direct(self.destination, self.index);
        // From whatever MTU a route has, Linux takes the headers of mode `encap` before a socket sees it, in both modes.
        let taken = Seg6Mode::Encap.overhead_bytes(self.segments.len());
        route.mtu_bytes = self.inner_mtu_bytes.map(|mtu| mtu + taken);
        let mut header = Seg6Header::default();
        header.mode = match self.mode {
            Seg6Mode::Encap => kernel::Mode::Encap,
            Seg6Mode::EncapRed => kernel::ENCAP_RED,
        };
        header.segments.clone_from(&self.segments);
        let mut message = route.message();
        message
            .attributes
            .push(RouteAttribute::EncapType(RouteLwEnCapType::Seg6));
        let tunnel = RouteLwTunnelEncap::Seg6(RouteSeg6IpTunnel::Seg6(header));
        message.attributes.push(RouteAttribute::Encap(vec![tunnel]));
        message
    }

    /// The route `message` is about, if it is of this kind.
    fn read(message: &RouteMessage) -> Option<Self> {
        let route = message::route(message)?;
        let header = message.attributes.iter().find_map(|attribute| {
            let RouteAttribute::Encap(tunnel) = attribute else {
                return None;
            };
            tunnel.iter().find_map(|part| {
                if let RouteLwTunnelEncap::Seg6(RouteSeg6IpTunnel::Seg6(header)) = part {
                    Some(header)
                } else {
                    None
                }
            })
        })?;
        let mode = if header.mode == kernel::Mode::Encap {
            Seg6Mode::Encap
        } else if header.mode == kernel::ENCAP_RED {
            Seg6Mode::EncapRed
        } else {
            return None;
        };
        let taken = Seg6Mode::Encap.overhead_bytes(header.segments.len());
        Some(Self {
            destination: route.destination,
            index: route.index,
            mode,
            segments: header.segments.clone(),
            inner_mtu_bytes: route.mtu_bytes.and_then(|mtu| mtu.checked_sub(taken)),
        })
    }
}

impl fmt::Display for Seg6Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} under {:?}", self.destination, self.segments)
    }
}

/// What a segment does with a packet, RFC 8986 §4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behavior {
    /// Sends it on to the next segment.
    End,
    /// The same through a certain neighbour.
    EndX(Ipv6Addr),
    /// The same, and moves through segments of 16 bits or so packed into one address, RFC 9800 §4.1.1.
    EndNextCsid {
        /// Length of the locator block in bits, a multiple of 8.
        block_bits: u8,
        /// Length of one packed segment in bits, a multiple of 8.
        node_bits: u8,
    },
    /// Takes the outer header off and sends the inner IPv4 packet to a neighbour. Linux takes 0.0.0.0 for the packet's
    /// own destination, which makes it the End.DT4 of a kernel without VRF.
    EndDx4(Ipv4Addr),
    /// The same for IPv6. Linux takes `::` for the packet's own destination, but then does not deliver to the node itself.
    EndDx6(Ipv6Addr),
    /// Takes the outer header off and looks the inner IPv6 packet up in a table.
    EndDt6 {
        /// The table. The main one does not hold the node's own addresses ([`Netlink::replace_local_route`]).
        table: u32,
    },
}

impl Behavior {
    /// The table of [`Behavior::EndDt6`] in which all other routes are.
    pub const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;

    fn attributes(self) -> Vec<RouteSeg6LocalTunnel> {
        use RouteSeg6LocalTunnel::{Action, Nh4, Nh6, Other, Table};
        match self {
            Self::End => vec![Action(Seg6LocalAction::End)],
            Self::EndX(neighbour) => vec![Action(Seg6LocalAction::EndX), Nh6(neighbour)],
            Self::EndNextCsid {
                block_bits,
                node_bits,
            } => vec![
                Action(Seg6LocalAction::End),
                Other(kernel::next_csid(block_bits, node_bits)),
            ],
            Self::EndDx4(neighbour) => vec![Action(Seg6LocalAction::EndDx4), Nh4(neighbour)],
            Self::EndDx6(neighbour) => vec![Action(Seg6LocalAction::EndDx6), Nh6(neighbour)],
            Self::EndDt6 { table } => vec![Action(Seg6LocalAction::EndDt6), Table(table)],
        }
    }
}

/// A segment of this node: a route in the main table whose packets the kernel treats as its behavior says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sid {
    /// The addresses that are this segment: one, unless it has packed segments behind it.
    pub prefix: Ipv6Prefix,
    /// Number of a link, not the loopback's. Which one says little: packets are taken from every link.
    pub index: u32,
    /// What it does.
    pub behavior: Behavior,
}

impl Sid {
    /// A segment of one address.
    pub fn new(addr: Ipv6Addr, index: u32, behavior: Behavior) -> Self {
        let Ok(prefix) = Ipv6Prefix::new(addr, 128) else {
            unreachable!("128 is a length an IPv6 prefix may have")
        };
        Self {
            prefix,
            index,
            behavior,
        }
    }

    fn route(&self) -> Route {
        Route::direct(self.prefix.into(), self.index)
    }

    fn message(&self) -> RouteMessage {
        let mut message = self.route().message();
        message
            .attributes
            .push(RouteAttribute::EncapType(RouteLwEnCapType::Seg6Local));
        let attributes = self.behavior.attributes().into_iter();
        let tunnel = attributes.map(RouteLwTunnelEncap::Seg6Local).collect();
        message.attributes.push(RouteAttribute::Encap(tunnel));
        message
    }
}

impl fmt::Display for Sid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment {} ({:?})", self.prefix, self.behavior)
    }
}

impl Netlink {
    /// Sets a route under a segment list, in place of one to the same destination.
    ///
    /// # Errors
    /// This kernel has no seg6, or it refuses.
    pub async fn replace_seg6_route(&self, route: &Seg6Route) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(route.message()).replace();
        request.execute().await.or_refused("set route", route)
    }

    /// Deletes a route under a segment list; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_seg6_route(&self, route: &Seg6Route) -> Result<(), NetlinkError> {
        self.delete_route(&Route::direct(route.destination, route.index))
            .await
    }

    /// The routes under segment lists of the main table, whoever made them.
    ///
    /// # Errors
    /// The kernel refuses the dump.
    pub async fn seg6_routes(&self) -> Result<Vec<Seg6Route>, NetlinkError> {
        let mut found = Vec::new();
        let dumps = [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ];
        for dump in dumps {
            let request = self.handle.route().get(dump);
            let messages = request.execute().try_collect::<Vec<_>>().await;
            let messages = messages.or_refused("list", "routes")?;
            let main = messages
                .iter()
                .filter(|message| message.header.table == RouteHeader::RT_TABLE_MAIN);
            found.extend(main.filter_map(Seg6Route::read));
        }
        Ok(found)
    }

    /// Makes an address, or a prefix of them, a segment of this node.
    ///
    /// # Errors
    /// This kernel has no such behavior, or it refuses.
    pub async fn replace_sid(&self, sid: &Sid) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(sid.message()).replace();
        request.execute().await.or_refused("set", sid)
    }

    /// Deletes a segment; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_sid(&self, sid: &Sid) -> Result<(), NetlinkError> {
        self.delete_route(&sid.route()).await
    }

    /// Has packets to a prefix dropped without a word, where no longer prefix says otherwise.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn replace_blackhole(&self, prefix: Ipv6Prefix) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(blackhole(prefix)).replace();
        request.execute().await.or_refused("set blackhole", prefix)
    }

    /// Takes such a route away; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_blackhole(&self, prefix: Ipv6Prefix) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(blackhole(prefix)).execute().await;
        gone(result, &[libc::ESRCH, libc::ENODEV]).or_refused("delete blackhole", prefix)
    }

    /// Has an address of this node found in the main table too, where [`Behavior::EndDt6`] looks.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn replace_local_route(&self, index: u32, addr: Ipv6Addr) -> Result<(), NetlinkError> {
        let request = self.handle.route().add(local(index, addr)).replace();
        request.execute().await.or_refused("set local route", addr)
    }

    /// Takes such a route away; one that is not there is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn delete_local_route(&self, index: u32, addr: Ipv6Addr) -> Result<(), NetlinkError> {
        let result = self.handle.route().del(local(index, addr)).execute().await;
        gone(result, &[libc::ESRCH, libc::ENODEV]).or_refused("delete local route", addr)
    }
}

fn blackhole(prefix: Ipv6Prefix) -> RouteMessage {
    let mut message = Route::direct(prefix.into(), 0).message();
    message
        .attributes
        .retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
    message.header.kind = RouteType::BlackHole;
    message
}

fn local(index: u32, addr: Ipv6Addr) -> RouteMessage {
    let mut message = Sid::new(addr, index, Behavior::End).route().message();
    message.header.kind = RouteType::Local;
    // Before the kernel's own route to the address as a prefix of the loopback, which has 256.
    message.attributes.push(RouteAttribute::Priority(1));
    message
}

/// Sets the source address of all packets this namespace puts under segment lists; `::` has the kernel choose one for
/// each.
///
/// The namespace is that of the calling thread. The kernel answers within the call, so this does not wait.
///
/// # Errors
/// No socket, or this kernel has no seg6.
pub fn set_tunnel_source(source: Ipv6Addr) -> Result<(), NetlinkError> {
    let mut socket = Socket::new(kernel::NETLINK_GENERIC).map_err(NetlinkError::Open)?;
    socket.bind_auto().map_err(NetlinkError::Open)?;
    let refused = |operation, object: &str| {
        let object = object.to_owned();
        move |source| NetlinkError::Request {
            operation,
            object,
            source,
        }
    };
    let find = Generic::request(
        kernel::GENL_ID_CTRL,
        kernel::CTRL_CMD_GETFAMILY,
        DefaultNla::new(kernel::CTRL_ATTR_FAMILY_NAME, b"SEG6\0".to_vec()),
    );
    let answer = exchange(&socket, find).map_err(refused("find generic netlink family", "SEG6"))?;
    let family = answer
        .and_then(|answer| answer.attribute(kernel::CTRL_ATTR_FAMILY_ID))
        .and_then(|value| Some(u16::from_ne_bytes(value.try_into().ok()?)))
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        .map_err(refused("find generic netlink family", "SEG6"))?;
    let set = Generic::request(
        family,
        kernel::SEG6_CMD_SET_TUNSRC,
        DefaultNla::new(kernel::SEG6_ATTR_DST, source.octets().to_vec()),
    );
    exchange(&socket, set)
        .map(drop)
        .map_err(refused("set the tunnel source", &source.to_string()))
}

/// Sends a request and takes what is answered before the acknowledgement.
fn exchange(socket: &Socket, request: Generic) -> io::Result<Option<Generic>> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let mut answer = None;
    loop {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<Generic>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            // Messages are padded to 4 bytes.
            let len = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(len..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(inner) => answer = Some(inner),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answer),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::Done(_) | NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => {}
            }
        }
    }
}

/// A generic netlink message: family, command, attributes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Generic {
    family: u16,
    body: Vec<u8>,
}

impl Generic {
    /// Command, version, and two bytes reserved: `struct genlmsghdr`.
    const HEADER_LEN: usize = 4;

    fn request(family: u16, command: u8, attribute: DefaultNla) -> Self {
        let mut body = vec![command, 1, 0, 0];
        let attributes = [attribute];
        let attributes = attributes.as_slice();
        body.resize(Self::HEADER_LEN + attributes.buffer_len(), 0);
        attributes.emit(&mut body[Self::HEADER_LEN..]);
        Self { family, body }
    }

    /// The value of an attribute.
    fn attribute(&self, kind: u16) -> Option<Vec<u8>> {
        let attributes = NlasIterator::new(self.body.get(Self::HEADER_LEN..)?);
        let mut attributes = attributes.filter_map(Result::ok);
        let found = attributes.find(|attribute| attribute.kind() == kind)?;
        Some(found.value().to_vec())
    }
}

impl NetlinkSerializable for Generic {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for Generic {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self {
            family: header.message_type,
            body: payload.to_vec(),
        })
    }
}

/// Numbers of linux/netlink.h, genetlink.h, seg6_genl.h, seg6_iptunnel.h and seg6_local.h that the crates do not name.
mod kernel {
    use super::{DefaultNla, Emitable, NLA_F_NESTED};

    pub(super) use netlink_packet_route::route::Seg6Mode as Mode;

    pub(super) const NETLINK_GENERIC: isize = 16;
    pub(super) const GENL_ID_CTRL: u16 = 16;
    pub(super) const CTRL_CMD_GETFAMILY: u8 = 3;
    pub(super) const CTRL_ATTR_FAMILY_ID: u16 = 1;
    pub(super) const CTRL_ATTR_FAMILY_NAME: u16 = 2;
    pub(super) const SEG6_CMD_SET_TUNSRC: u8 = 3;
    pub(super) const SEG6_ATTR_DST: u16 = 1;
    /// `SEG6_IPTUN_MODE_ENCAP_RED`.
    pub(super) const ENCAP_RED: Mode = Mode::Other(3);

    const SEG6_LOCAL_FLAVORS: u16 = 11;
    const SEG6_LOCAL_FLV_OPERATION: u16 = 1;
    const SEG6_LOCAL_FLV_LCBLOCK_BITS: u16 = 2;
    const SEG6_LOCAL_FLV_LCNODE_FN_BITS: u16 = 3;
    /// Bit `SEG6_LOCAL_FLV_OP_NEXT_CSID`.
    const NEXT_CSID: u32 = 1 << 4;

    /// The NEXT-CSID flavour, as an attribute of a seg6local route.
    pub(super) fn next_csid(block_bits: u8, node_bits: u8) -> DefaultNla {
        let flavour = [
            DefaultNla::new(SEG6_LOCAL_FLV_OPERATION, NEXT_CSID.to_ne_bytes().to_vec()),
            DefaultNla::new(SEG6_LOCAL_FLV_LCBLOCK_BITS, vec![block_bits]),
            DefaultNla::new(SEG6_LOCAL_FLV_LCNODE_FN_BITS, vec![node_bits]),
        ];
        let flavour = flavour.as_slice();
        let mut value = vec![0; flavour.buffer_len()];
        flavour.emit(&mut value);
        DefaultNla::new(SEG6_LOCAL_FLAVORS | NLA_F_NESTED, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_long_as_the_segments_take() {
        for (segments, full, reduced) in [(1, 64, 40), (2, 80, 64), (3, 96, 80)] {
            assert_eq!(Seg6Mode::Encap.overhead_bytes(segments), full);
            assert_eq!(Seg6Mode::EncapRed.overhead_bytes(segments), reduced);
        }
    }

    #[test]
    fn a_route_reads_back_as_it_was_written() {
        let v4 = Prefix::V4("10.244.2.0/24".parse().unwrap());
        let v6 = Prefix::V6("fd00:10:244:2::/64".parse().unwrap());
        let segments: Vec<Ipv6Addr> = vec!["fd12::e".parse().unwrap(), "fd13::4".parse().unwrap()];
        for (destination, mode, inner_mtu_bytes) in [
            (v4, Seg6Mode::Encap, Some(1420)),
            (v4, Seg6Mode::EncapRed, None),
            (v6, Seg6Mode::EncapRed, Some(1436)),
        ] {
            let route = Seg6Route {
                destination,
                index: 3,
                mode,
                segments: segments.clone(),
                inner_mtu_bytes,
            };
            assert_eq!(Seg6Route::read(&route.message()), Some(route));
        }
        let plain = Route::direct(v4, 3);
        assert_eq!(Seg6Route::read(&plain.message()), None);
    }
}
