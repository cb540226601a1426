//! flannel's `udp` backend: the inner packet is the whole payload of a UDP datagram, port 8285.
//!
//! ```text
//! | outer IPv4 20 or IPv6 40 | UDP 8 | inner IPv4 or IPv6 |
//! ```
//!
//! Wire-compatible with flannel's proxy for IPv4 (pkg/backend/udp/proxy_amd64.c): bare packet, TTL less one at each end. IPv6, inside and
//! outside, is spoken between Kersey nodes only; flannel's proxy cannot carry it.

use std::net::SocketAddr;

use crate::addr::{AddrError, Mtu, Prefix};
use crate::backend::{
    Backend, BackendError, Carrier, LeaseData, Networks, OversizePolicy, Underlay, Unreachable, peer_address,
    port, settings,
};
use crate::dataplane::datagram::Envelope;
use crate::dataplane::route::Hop;
use crate::dataplane::stats::DropReason;
use crate::dataplane::{EcnPolicy, Encap, Inner, Manners, Oversize, PeerOffloads, TtlPolicy};
use crate::lease::LeaseAttrs;

/// flannel's default port.
pub const DEFAULT_PORT: u16 = 8285;
/// Bytes added over IPv4: IP and UDP headers.
pub const OVERHEAD_V4: u16 = 28;
/// Bytes added over IPv6.
pub const OVERHEAD_V6: u16 = 48;

/// A hop, like flannel's proxy; which, like the proxy, loses congestion marks.
const MANNERS: Manners = Manners {
    ttl: TtlPolicy::Decrement,
    ecn: EcnPolicy::Ignore,
    offloads: PeerOffloads::None,
    mute: false,
};

/// The encapsulation, which is none.
#[derive(Clone, Copy, Debug)]
pub struct Udp;

/// A peer's socket address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpHop(pub SocketAddr);

impl Hop for UdpHop {
    #[inline]
    fn endpoint(&self) -> SocketAddr {
        self.0
    }
}

impl Encap for Udp {
    type Hop = UdpHop;

    #[inline]
    fn outbound(&self, _hop: &UdpHop) -> Manners {
        MANNERS
    }

    #[inline]
    fn inbound(&self) -> Manners {
        MANNERS
    }

    #[inline]
    fn header_len(&self, _hop: &UdpHop) -> usize {
        0
    }

    #[inline]
    fn push(&self, _hop: &UdpHop, _inner: Inner, _out: &mut [u8]) {}

    #[inline]
    fn pull(&self, _envelope: &Envelope, datagram: &[u8]) -> Result<usize, DropReason> {
        // The proxy ignores anything shorter than an IPv4 header.
        if datagram.len() < 20 {
            Err(DropReason::Truncated)
        } else {
            Ok(0)
        }
    }
}

/// The backend: a port all nodes agree on; the lease says nothing of it.
#[derive(Clone, Copy, Debug)]
pub struct UdpBackend {
    port: u16,
}

impl UdpBackend {
    /// Reads the network's `Backend` object.
    ///
    /// # Errors
    /// `Port` is no port.
    pub fn parse(json: &str) -> Result<Self, BackendError> {
        Ok(Self {
            port: port(&settings(json)?, DEFAULT_PORT)?,
        })
    }

    /// The UDP port it is spoken on.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Backend for UdpBackend {
    type Encap = Udp;

    fn name(&self) -> &'static str {
        "udp"
    }

    fn encap(&self) -> Udp {
        Udp
    }

    fn carrier(&self) -> Carrier {
        Carrier::Udp {
            port: self.port,
            source_ports: 1,
            vni: None,
        }
    }

    fn overhead(&self, hop: &UdpHop) -> u16 {
        if hop.endpoint().is_ipv6() {
            OVERHEAD_V6
        } else {
            OVERHEAD_V4
        }
    }

    fn oversize(&self) -> OversizePolicy {
        // As flannel's proxy.
        OversizePolicy {
            v4: Oversize::FragmentHere,
            v6: Oversize::FragmentHere,
        }
    }

    fn lease_data(&self, _networks: Networks) -> LeaseData {
        LeaseData::default()
    }

    fn inner_mtu(&self, link_mtu: Mtu, underlay: Underlay) -> Result<Mtu, AddrError> {
        link_mtu.minus(if underlay.v6.is_some() {
            OVERHEAD_V6
        } else {
            OVERHEAD_V4
        })
    }

    fn hop(&self, prefix: Prefix, attrs: &LeaseAttrs, underlay: Underlay) -> Result<UdpHop, Unreachable> {
        // flannel's udp takes leases of any backend type: the lease says only where the node is.
        let addr = peer_address(prefix, attrs, underlay).ok_or(Unreachable::NoAddress)?;
        Ok(UdpHop(SocketAddr::new(addr, self.port)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mtu_leaves_room_for_the_outer_headers() {
        let backend = UdpBackend { port: DEFAULT_PORT };
        let link = Mtu::new(1500).unwrap();
        let v4 = Underlay {
            v4: Some([192, 0, 2, 1].into()),
            v6: None,
        };
        let v6 = Underlay {
            v4: None,
            v6: Some([1; 8].into()),
        };
        assert_eq!(backend.inner_mtu(link, v4).unwrap().bytes(), 1472);
        assert_eq!(backend.inner_mtu(link, v6).unwrap().bytes(), 1452);
    }
}
