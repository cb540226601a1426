//! flannel's `udp` backend: the inner packet is the whole payload of a UDP datagram, port 8285.
//!
//! ```text
//! | outer IPv4 20 or IPv6 40 | UDP 8 | inner IPv4 or IPv6 |
//! ```
//!
//! Wire-compatible with flannel's proxy for IPv4 (pkg/backend/udp/proxy_amd64.c): bare packet, TTL less one at each end. IPv6, inside and
//! outside, is spoken between Kersey nodes only; flannel's proxy cannot carry it.

use std::net::SocketAddr;

use crate::dataplane::route::Hop;
use crate::dataplane::stats::DropReason;
use crate::dataplane::{Encap, TtlPolicy};

/// flannel's default port.
pub const DEFAULT_PORT: u16 = 8285;
/// Bytes added over IPv4: IP and UDP headers.
pub const OVERHEAD_V4: u16 = 28;
/// Bytes added over IPv6.
pub const OVERHEAD_V6: u16 = 48;

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
    const TTL: TtlPolicy = TtlPolicy::Decrement;

    #[inline]
    fn push(&self, _hop: &UdpHop, _inner_len: usize, _headers: &mut Vec<u8>) {}

    #[inline]
    fn pull(&self, datagram: &[u8]) -> Result<usize, DropReason> {
        // The proxy ignores anything shorter than an IPv4 header.
        if datagram.len() < 20 { Err(DropReason::Truncated) } else { Ok(0) }
    }
}
