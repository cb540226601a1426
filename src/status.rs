//! What a running node says of itself, as one JSON document.
//!
//! The daemon writes the document to whoever connects to its unix socket, then closes; `kersey status` reads and
//! prints it, `kersey lab` and the tests read it as data. Fields are only ever added.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The whole document; peers are a list to who reads it, and may be made as they are written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status<P = Vec<Peer>> {
    /// Kersey's version.
    pub version: String,
    /// `true` once the lease is held, the device is up if there is one, routes are in and subnet.env is written.
    pub ready: bool,
    /// Seconds since the daemon started.
    pub uptime_s: f64,
    /// This node.
    pub node: Node,
    /// The encapsulation in use, and why.
    pub backend: Backend,
    /// The store.
    pub store: StoreStatus,
    /// The TUN device and the packet path behind it; absent for a backend without a tunnel.
    #[serde(default, skip_serializing_if = "DeviceStatus::is_absent")]
    pub device: DeviceStatus,
    /// The tool firewall rules are made with, `off`, or why there are none: `none: …`, `failing: …`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub firewall: String,
    /// Other nodes, by subnet.
    pub peers: P,
    /// Packet-path counters summed over workers, by name: `outbound_packets`, `outbound_bytes`, `inbound_packets`, …
    pub counters: BTreeMap<String, u64>,
    /// Packets refused, by reason; reasons that never occurred are left out.
    pub drops: BTreeMap<String, u64>,
    /// Leases refused, by reason.
    pub rejected_leases: BTreeMap<String, u64>,
    /// What the process has given up of its privileges: `capabilities`, `seccomp`, `landlock`, `user`, each with what came of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sandbox: BTreeMap<String, String>,
    /// Why it is not ready, if it knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// A document like this for each network by name, where there are several; `version`, `ready`, `uptime_s` and `store.place` are all
    /// that the outer one then says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<BTreeMap<String, Status<P>>>,
}

/// This node's own lease and underlay.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Node {
    /// The overlay network(s).
    pub networks: Vec<String>,
    /// Own subnet(s), CIDR text.
    pub subnets: Vec<String>,
    /// Underlay interface name.
    pub interface: String,
    /// Underlay addresses peers send to.
    pub public_ips: Vec<String>,
    /// MTU of the underlay interface, bytes.
    pub link_mtu: u16,
    /// MTU inside, bytes.
    pub inner_mtu: u16,
    /// End of the lease, seconds since 1970; absent before there is one, and for a reservation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_expires_unix_s: Option<u64>,
}

/// The backend in use.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Backend {
    /// Its name: `udp`, `vxlan`, …
    pub name: String,
    /// Why it was picked.
    pub reason: String,
    /// UDP port, where it has one.
    pub port: Option<u16>,
    /// VXLAN network identifier, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// How inbound packets are checked: `strict`, `loose` or `off`; empty without a tunnel.
    pub ingress_check: String,
}

/// The store, as seen from this node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Which store, and where.
    pub place: String,
    /// Whether it answered last time.
    pub connected: bool,
    /// Seconds since that last changed.
    pub since_s: f64,
    /// The last error, if it is away.
    pub error: Option<String>,
    /// How often it was found wiped, restored from a backup or exchanged for another.
    #[serde(default)]
    pub resets: u64,
}

/// The TUN device and the packet path.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Device name.
    pub name: String,
    /// Queues (pairs of directions).
    pub queues: usize,
    /// Worker threads in all.
    pub threads: usize,
    /// Offloads by name (`tun_tso`, `tun_uso`, `udp_gso`, `udp_gro`) → `on`, `off (forced)`, `off (kernel)`; with `srv6`
    /// also `srv6_io` → `raw`, `tun (forced)`, `tun (raw sockets refused)`.
    pub offloads: BTreeMap<String, String>,
}

impl DeviceStatus {
    /// Whether there is none.
    pub fn is_absent(&self) -> bool {
        self.name.is_empty()
    }
}

/// One peer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Peer {
    /// Its subnet(s), CIDR text.
    pub subnets: Vec<String>,
    /// Underlay endpoints: `addr:port`, without a tunnel `addr`.
    pub endpoints: Vec<String>,
    /// The largest packet that can be sent to it, bytes, if the path carries less than the link.
    #[serde(default)]
    pub narrow_mtu: Option<u16>,
    /// The kernel's own route to it, past any tunnel: `installed`, or why there is none. Absent if none is wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_route: Option<String>,
    /// Packets and bytes sent to it and received from it (inner, super-packets counted as their segments).
    pub outbound_packets: u64,
    /// See `outbound_packets`.
    pub outbound_bytes: u64,
    /// See `outbound_packets`.
    pub inbound_packets: u64,
    /// See `outbound_packets`.
    pub inbound_bytes: u64,
    /// When packets of it were last seen to have come, seconds since 1970, to within five; absent as long as none has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_unix_s: Option<u64>,
    /// Packets refused that concern this peer, by reason.
    pub drops: BTreeMap<String, u64>,
}
