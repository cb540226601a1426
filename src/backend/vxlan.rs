//! flannel's `vxlan` backend in userspace: an Ethernet frame in VXLAN (RFC 7348), port 8472.
//!
//! ```text
//! | outer IPv4 20 or IPv6 40 | UDP 8 | VXLAN 8 | Ethernet 14 | inner IPv4 or IPv6 |
//! ```
//!
//! In one network with nodes whose kernel does the same (flannel's own vxlan). The Ethernet header inside is constant for each peer and
//! family: the destination is the address in the peer's lease, so neither ARP nor neighbour discovery ever takes place, and frames of that
//! kind from a peer's kernel are counted and dropped. The source is the address in our own lease; one serves both families.
//!
//! Of the settings, `GBP` and `Learning` concern the kernel's device and have no meaning here: the group policy bits are read over and never
//! sent, and addresses come from leases alone.

use std::net::{IpAddr, SocketAddr};

use crate::addr::{AddrError, MacAddr, Mtu, Prefix, Vni};
use crate::backend::{
    Backend, BackendError, Carrier, LeaseData, Networks, OversizePolicy, Underlay, Unreachable, peer_address,
    port, settings,
};
use crate::dataplane::datagram::Envelope;
use crate::dataplane::route::Hop;
use crate::dataplane::stats::DropReason;
use crate::dataplane::{EcnPolicy, Encap, Inner, Manners, Oversize, PeerOffloads, TtlPolicy};
use crate::lease::LeaseAttrs;
use crate::lease::json::{JsonError, Object};
use crate::wire::vxlan::{HEADERS_LEN, VxlanHeader, ethertype};

/// Linux's port, which flannel keeps; IANA's is 4789.
pub const DEFAULT_PORT: u16 = 8472;
/// flannel's network identifier.
const DEFAULT_VNI: u32 = 1;
/// Bytes added over IPv4: IP, UDP, VXLAN and Ethernet headers.
pub const OVERHEAD_V4: u16 = 50;
/// Bytes added over IPv6.
pub const OVERHEAD_V6: u16 = 70;
/// Source ports that flows are spread over: enough for a receiver's queues, and a socket each.
const SOURCE_PORTS: usize = 16;
/// The type in leases and configs.
const KIND: &str = "vxlan";

/// A link, like the kernel's device: what the hosts do to TTL and congestion marks is all that happens to them.
const MANNERS: Manners = Manners {
    ttl: TtlPolicy::Keep,
    ecn: EcnPolicy::Carry,
    offloads: PeerOffloads::Kernel,
    mute: false,
};

/// The encapsulation of one node.
#[derive(Clone, Copy, Debug)]
pub struct Vxlan {
    /// The network.
    pub vni: Vni,
    /// Our Ethernet address, as in our lease.
    pub mac: MacAddr,
}

/// How one prefix of a peer is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanHop {
    endpoint: SocketAddr,
    /// What stands before every packet to it.
    headers: [u8; HEADERS_LEN],
}

impl VxlanHop {
    /// A prefix of the family of `prefix` at a peer whose Ethernet address is `peer`, behind `endpoint`.
    pub fn new(own: Vxlan, prefix: Prefix, peer: MacAddr, endpoint: SocketAddr) -> Self {
        let header = VxlanHeader {
            vni: Some(own.vni),
            dst: peer,
            src: own.mac,
            ethertype: match prefix {
                Prefix::V4(_) => ethertype::IPV4,
                Prefix::V6(_) => ethertype::IPV6,
            },
        };
        Self {
            endpoint,
            headers: header.emit(),
        }
    }
}

impl Hop for VxlanHop {
    #[inline]
    fn endpoint(&self) -> SocketAddr {
        self.endpoint
    }
}

impl Encap for Vxlan {
    type Hop = VxlanHop;

    #[inline]
    fn outbound(&self, _hop: &VxlanHop) -> Manners {
        MANNERS
    }

    #[inline]
    fn inbound(&self) -> Manners {
        MANNERS
    }

    #[inline]
    fn header_len(&self, _hop: &VxlanHop) -> usize {
        HEADERS_LEN
    }

    #[inline]
    fn push(&self, hop: &VxlanHop, _inner: Inner, out: &mut [u8]) {
        if let Some(out) = out.first_chunk_mut::<HEADERS_LEN>() {
            *out = hop.headers;
        }
    }

    #[inline]
    fn pull(&self, _envelope: &Envelope, datagram: &[u8]) -> Result<usize, DropReason> {
        let header = VxlanHeader::parse(datagram)?;
        match header.vni {
            Some(vni) if vni == self.vni => {}
            Some(_) => return Err(DropReason::OtherVni),
            None => return Err(DropReason::BadEncapsulation),
        }
        if header.dst != self.mac {
            return Err(DropReason::OtherStation);
        }
        if header.src == self.mac {
            return Err(DropReason::OwnStation);
        }
        let version = datagram.get(HEADERS_LEN).map(|first| first >> 4);
        match (header.ethertype, version) {
            (ethertype::IPV4, Some(4)) | (ethertype::IPV6, Some(6)) => Ok(HEADERS_LEN),
            (ethertype::IPV4 | ethertype::IPV6, Some(_)) => Err(DropReason::EthertypeMismatch),
            (ethertype::IPV4 | ethertype::IPV6, None) => Err(DropReason::Truncated),
            _ => Err(DropReason::NotIp),
        }
    }
}

/// The backend: what the network config says, and this node's Ethernet address.
#[derive(Clone, Copy, Debug)]
pub struct VxlanBackend {
    vni: Vni,
    port: u16,
    /// What `MTU` says the link carries, whatever it does.
    link_mtu: Option<Mtu>,
    mac: MacAddr,
    direct_routing: bool,
    learning: bool,
    gbp: bool,
}

impl VxlanBackend {
    /// Reads the network's `Backend` object, for a node with Ethernet address `mac`.
    ///
    /// # Errors
    /// A field has the wrong type, or a value outside its range.
    pub fn parse(json: &str, mac: MacAddr) -> Result<Self, BackendError> {
        let object = settings(json)?;
        let vni = object.uint("VNI")?.unwrap_or(DEFAULT_VNI);
        let link_mtu = match object.uint("MTU")? {
            None | Some(0) => None,
            Some(bytes) => Some(Mtu::new(bytes).map_err(|_| BackendError::Mtu(bytes))?),
        };
        Ok(Self {
            vni: Vni::new(vni).map_err(|_| BackendError::Vni(vni))?,
            port: port(&object, DEFAULT_PORT)?,
            link_mtu,
            mac,
            direct_routing: object.bool("DirectRouting")?.unwrap_or(false),
            learning: object.bool("Learning")?.unwrap_or(false),
            gbp: object.bool("GBP")?.unwrap_or(false),
        })
    }

    /// The UDP port it is spoken on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// This node's part of a lease: flannel's `vxlanLeaseAttrs`, field order included.
    fn data(&self) -> String {
        format!(r#"{{"VNI":{},"VtepMAC":"{}"}}"#, self.vni, self.mac)
    }

    /// The Ethernet address of the peer's device behind `endpoint`: a kernel has one for each family of the underlay, whatever is inside.
    /// Where a peer has one family's data only, its one device serves both.
    fn peer_mac(&self, endpoint: IpAddr, attrs: &LeaseAttrs) -> Result<MacAddr, Unreachable> {
        let (own, other) = match endpoint {
            IpAddr::V4(_) => (&attrs.backend_data, &attrs.backend_v6_data),
            IpAddr::V6(_) => (&attrs.backend_v6_data, &attrs.backend_data),
        };
        let data = own.as_ref().or(other.as_ref()).ok_or(Unreachable::NoData)?;
        let object = Object::parse(data, LeaseAttrs::MAX_BYTES)?;
        let mac: MacAddr = object
            .parsed("VtepMAC", "must be an Ethernet address in quotes")?
            .ok_or_else(|| JsonError::field("VtepMAC", "missing", "must be given"))?;
        if !mac.is_unicast() {
            return Err(
                JsonError::field("VtepMAC", &mac.to_string(), "must be the address of one station").into(),
            );
        }
        if mac == self.mac {
            return Err(JsonError::field("VtepMAC", &mac.to_string(), "is this node's own").into());
        }
        Ok(mac)
    }
}

impl Backend for VxlanBackend {
    type Encap = Vxlan;

    fn name(&self) -> &'static str {
        KIND
    }

    fn encap(&self) -> Vxlan {
        Vxlan {
            vni: self.vni,
            mac: self.mac,
        }
    }

    fn carrier(&self) -> Carrier {
        Carrier::Udp {
            port: self.port,
            source_ports: SOURCE_PORTS,
            vni: Some(self.vni),
        }
    }

    fn overhead(&self, hop: &VxlanHop) -> u16 {
        if hop.endpoint().is_ipv6() {
            OVERHEAD_V6
        } else {
            OVERHEAD_V4
        }
    }

    fn oversize(&self) -> OversizePolicy {
        // As the kernel's device: routers may fragment over IPv4. Over IPv6 only a sender can, and must: a path of 1280 bytes has no room for
        // an inner packet of 1280, which IPv6 inside is promised (RFC 2473 §7.1).
        OversizePolicy {
            v4: Oversize::FragmentAnywhere,
            v6: Oversize::FragmentHere,
        }
    }

    fn notes(&self) -> Vec<&'static str> {
        let mut notes = Vec::new();
        if self.learning {
            notes.push("Learning has no meaning here: Ethernet addresses come from leases alone");
        }
        if self.gbp {
            notes.push("GBP has no meaning here: group policies of peers are ignored, and none is sent");
        }
        notes
    }

    fn direct_routing(&self) -> bool {
        self.direct_routing
    }

    fn lease_data(&self, networks: Networks) -> LeaseData {
        LeaseData {
            kind: KIND,
            v4: networks.v4.then(|| self.data()),
            v6: networks.v6.then(|| self.data()),
        }
    }

    fn inner_mtu(&self, link_mtu: Mtu, underlay: Underlay) -> Result<Mtu, AddrError> {
        self.link_mtu.unwrap_or(link_mtu).minus(if underlay.v6.is_some() {
            OVERHEAD_V6
        } else {
            OVERHEAD_V4
        })
    }

    fn hop(&self, prefix: Prefix, attrs: &LeaseAttrs, underlay: Underlay) -> Result<VxlanHop, Unreachable> {
        if attrs.backend_type != KIND {
            return Err(Unreachable::OtherBackend(attrs.backend_type.clone()));
        }
        let addr = peer_address(prefix, attrs, underlay).ok_or(Unreachable::NoAddress)?;
        let mac = self.peer_mac(addr, attrs)?;
        let endpoint = SocketAddr::new(addr, self.port);
        Ok(VxlanHop::new(self.encap(), prefix, mac, endpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_station_is_that_of_the_device_behind_the_address() {
        let own = MacAddr::from([2, 0, 0, 0, 0, 1]);
        let (four, six) = (
            MacAddr::from([2, 0, 0, 0, 0, 4]),
            MacAddr::from([2, 0, 0, 0, 0, 6]),
        );
        let backend = VxlanBackend::parse("{}", own).unwrap();
        let data = |mac: Option<MacAddr>| mac.map(|mac| format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#));
        let inside = [
            Prefix::V4("10.244.2.0/24".parse().unwrap()),
            Prefix::V6("fd00:244:2::/64".parse().unwrap()),
        ];
        let (v4, v6) = (Some([192, 0, 2, 1].into()), "2001:db8::1".parse().ok());
        let (addr_v4, addr_v6): (IpAddr, IpAddr) = ([192, 0, 2, 2].into(), "2001:db8::2".parse().unwrap());
        for (what, underlay, published, expected) in [
            (
                "each family by itself",
                Underlay { v4, v6 },
                [Some(four), Some(six)],
                [(addr_v4, four), (addr_v6, six)],
            ),
            (
                "our underlay is IPv4",
                Underlay { v4, v6: None },
                [Some(four), Some(six)],
                [(addr_v4, four); 2],
            ),
            (
                "our underlay is IPv6",
                Underlay { v4: None, v6 },
                [Some(four), Some(six)],
                [(addr_v6, six); 2],
            ),
            (
                "one device, named under IPv4",
                Underlay { v4, v6 },
                [Some(four), None],
                [(addr_v4, four), (addr_v6, four)],
            ),
            (
                "one device, named under IPv6",
                Underlay { v4, v6: None },
                [None, Some(six)],
                [(addr_v4, six); 2],
            ),
        ] {
            let attrs = LeaseAttrs {
                public_ip: [192, 0, 2, 2].into(),
                public_ipv6: "2001:db8::2".parse().ok(),
                backend_type: KIND.to_owned(),
                backend_data: data(published[0]),
                backend_v6_data: data(published[1]),
            };
            for (prefix, (addr, mac)) in inside.into_iter().zip(expected) {
                let endpoint = SocketAddr::new(addr, DEFAULT_PORT);
                let hop = VxlanHop::new(backend.encap(), prefix, mac, endpoint);
                assert_eq!(backend.hop(prefix, &attrs, underlay), Ok(hop), "{what}, {prefix}");
            }
        }
    }
}
