//! What the status document says of peers, made row by row as it is written: of many peers, their text is far larger than what is kept.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Serialize, Serializer};

use super::{Seen, nonzero};
use crate::daemon::network::InstalledPeer;
use crate::lease::{BySubnet, LeaseAttrs, Subnet};
use crate::status::Peer;

/// The figures of a peer, of which metrics make series.
#[derive(Clone, Copy, Debug)]
pub(in crate::daemon) struct PeerFigures {
    pub(in crate::daemon) subnet: Subnet,
    /// Whether there is somewhere to send its packets.
    pub(in crate::daemon) reachable: bool,
    pub(in crate::daemon) outbound_packets: u64,
    pub(in crate::daemon) outbound_bytes: u64,
    pub(in crate::daemon) inbound_packets: u64,
    pub(in crate::daemon) inbound_bytes: u64,
    pub(in crate::daemon) last_seen_unix_s: Option<u64>,
    pub(in crate::daemon) narrow_mtu: Option<u16>,
}

/// The peers as they were at one moment; their counters go on.
#[derive(Clone, Debug, Default)]
pub(in crate::daemon) struct PeerRows {
    /// Those of a tunnel.
    pub(super) tunnelled: BySubnet<Arc<InstalledPeer>>,
    /// Those of a backend without one.
    pub(super) plain: BySubnet<Arc<LeaseAttrs>>,
    /// How the kernel itself routes some of them.
    pub(super) kernel_routes: Arc<BTreeMap<Subnet, String>>,
    pub(super) seen: Seen,
}

impl PeerRows {
    pub(in crate::daemon) fn len(&self) -> usize {
        self.tunnelled.len() + self.plain.len()
    }

    /// What metrics tell of them, as of now.
    pub(super) fn figures(&self) -> impl Iterator<Item = PeerFigures> {
        let plain = self.plain.iter().map(|(subnet, attrs)| PeerFigures {
            subnet,
            reachable: public_addresses(attrs).next().is_some(),
            outbound_packets: 0,
            outbound_bytes: 0,
            inbound_packets: 0,
            inbound_bytes: 0,
            last_seen_unix_s: None,
            narrow_mtu: None,
        });
        let tunnelled = self.tunnelled.iter().map(|(subnet, peer)| {
            let (outbound_packets, outbound_bytes, inbound_packets, inbound_bytes) = peer.counts.totals();
            PeerFigures {
                subnet,
                reachable: !peer.endpoints.is_empty(),
                outbound_packets,
                outbound_bytes,
                inbound_packets,
                inbound_bytes,
                last_seen_unix_s: self.seen.at(subnet),
                narrow_mtu: peer.narrow_mtu(),
            }
        });
        plain.chain(tunnelled)
    }

    fn iter(&self) -> impl Iterator<Item = Peer> {
        let kernel_route = |subnet| self.kernel_routes.get(&subnet).cloned();
        let plain = self.plain.iter().map(move |(subnet, attrs)| Peer {
            kernel_route: kernel_route(subnet),
            endpoints: public_addresses(attrs).map(|addr| addr.to_string()).collect(),
            ..of(subnet)
        });
        let tunnelled = self.tunnelled.iter().map(move |(subnet, peer)| {
            let (outbound_packets, outbound_bytes, inbound_packets, inbound_bytes) = peer.counts.totals();
            Peer {
                endpoints: peer.endpoints.iter().map(endpoint).collect(),
                narrow_mtu: peer.narrow_mtu(),
                kernel_route: kernel_route(subnet),
                last_seen_unix_s: self.seen.at(subnet),
                outbound_packets,
                outbound_bytes,
                inbound_packets,
                inbound_bytes,
                drops: nonzero(|reason| peer.counts.dropped(reason)),
                ..of(subnet)
            }
        });
        plain.chain(tunnelled)
    }
}

impl Serialize for PeerRows {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

fn of(subnet: Subnet) -> Peer {
    Peer {
        subnets: subnet.prefixes().map(|prefix| prefix.to_string()).collect(),
        ..Peer::default()
    }
}

/// The addresses a lease names.
fn public_addresses(attrs: &LeaseAttrs) -> impl Iterator<Item = IpAddr> + use<> {
    let v4 = (!attrs.public_ip.is_unspecified()).then_some(IpAddr::V4(attrs.public_ip));
    v4.into_iter().chain(attrs.public_ipv6.map(IpAddr::V6))
}

/// Where a peer is: a SID has no port.
fn endpoint(addr: &SocketAddr) -> String {
    match addr.port() {
        0 => addr.ip().to_string(),
        _ => addr.to_string(),
    }
}
