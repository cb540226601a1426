//! Leases: a node's claim on a subnet, with flannel's key and JSON forms.
//!
//! Two text forms matter to the rest of the world and are byte-exact here:
//!
//! - the key, `10.1.3.0-24` or `10.1.3.0-24&fd00:10:244::-64` ([`Subnet`]),
//! - the value, `{"PublicIP":"…","PublicIPv6":null,…}` ([`LeaseAttrs`]).
//!
//! Limits: there is no IPv6-only key form; the IPv4 half is mandatory, as in flannel.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::SystemTime;

use crate::addr::{Ipv4Prefix, Ipv6Prefix};

/// The subnet of a lease; its `Display` form is flannel's etcd key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet {
    /// The IPv4 half; every lease has one.
    pub v4: Ipv4Prefix,
    /// The IPv6 half of a dual-stack lease.
    pub v6: Option<Ipv6Prefix>,
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.v4.addr(), self.v4.len())?;
        if let Some(v6) = self.v6 {
            write!(f, "&{}-{}", v6.addr(), v6.len())?;
        }
        Ok(())
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a node says of itself in its lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseAttrs {
    /// Underlay IPv4 address; `0.0.0.0` if the node has none.
    pub public_ip: Ipv4Addr,
    /// Underlay IPv6 address.
    pub public_ipv6: Option<Ipv6Addr>,
    /// Backend name; empty for `udp` and `alloc`.
    pub backend_type: String,
    /// Backend data for IPv4, compact JSON text as it stands in the store.
    pub backend_data: Option<String>,
    /// Backend data for IPv6, compact JSON text as it stands in the store.
    pub backend_v6_data: Option<String>,
}

/// When a lease ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiration {
    /// Never: a reservation.
    Never,
    /// At this wall-clock time, for show; timers run on the monotonic clock.
    At(SystemTime),
}

/// A node's claim on a subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The subnet claimed.
    pub subnet: Subnet,
    /// Who claims it, and how it is reached.
    pub attrs: LeaseAttrs,
    /// When the claim ends.
    pub expiration: Expiration,
}

/// One change among the leases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseEvent {
    /// A lease came or changed.
    Added(Lease),
    /// A lease went.
    Removed(Subnet),
}

/// What a watch tells: the whole truth, or changes to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeaseUpdate {
    /// All leases at one revision; what is not in it is gone.
    Snapshot(Vec<Lease>),
    /// Changes since the last update.
    Events(Vec<LeaseEvent>),
}
