//! What flannel's own udp proxy put on a wire (`golden/udp-v4.pcap`): we read it, and we would have sent the same bytes.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

#[path = "golden/capture.rs"]
mod capture;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use kersey::addr::{Mtu, Prefix};
use kersey::backend::udp::{DEFAULT_PORT, Udp, UdpHop};
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::{MemoryDevice, MemoryUnderlay, Message};
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::{PeerStats, WorkerStats};
use kersey::dataplane::worker::{Inbound, InboundOptions, Outbound};
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Ecn, IpHeader, verify_v4_header};
use kersey::wire::virtio::VirtioHeader;

use crate::capture::Datagram;

const CAPTURE: &[u8] = include_bytes!("golden/udp-v4.pcap");

#[test]
fn the_capture_is_what_its_description_says() {
    let datagrams = datagrams();
    assert_eq!(datagrams.len(), 15);
    for (index, datagram) in datagrams.iter().enumerate() {
        let inner = IpHeader::parse(&datagram.payload).unwrap();
        assert_eq!(
            inner.total_len,
            datagram.payload.len(),
            "packet {}: bare inner packet",
            index + 1
        );
        assert_eq!(datagram.to.port(), DEFAULT_PORT);
        assert_eq!(datagram.from.port(), DEFAULT_PORT);
        assert_eq!(datagram.checksum_over(&datagram.payload), datagram.checksum);
    }
    assert_eq!(IpHeader::parse(&datagrams[2].payload).unwrap().tos, 0xb9);
}

#[test]
fn what_the_proxy_sent_is_delivered_with_one_ttl_less() {
    for (index, datagram) in datagrams().into_iter().enumerate() {
        let what = format!("packet {}", index + 1);
        let routes = routes(datagram.to.ip(), datagram.from.ip());
        let options = InboundOptions {
            check: IngressCheck::Strict,
            verify_inner: false,
            inner_mtu: Mtu::new(1472).unwrap(),
            clamp_mss: false,
        };
        let (edges, stats) = (edges(), (0, Arc::new(WorkerStats::default())));
        let mut inbound = Inbound::new(Udp, edges, routes.reader(), stats, options, now());
        let segment_size = datagram.payload.len();
        let message = Message {
            addr: datagram.from,
            bytes: datagram.payload.clone(),
            segment_size,
            ecn: Ecn::NotEct,
        };
        inbound.underlay().incoming.push_back(message);
        inbound.turn(now()).unwrap();
        let delivered = std::mem::take(&mut inbound.device().to_host);
        assert_eq!(delivered.len(), 1, "{what}");
        let mut expected = datagram.payload;
        set_ttl(&mut expected, |ttl| ttl - 1);
        assert!(verify_v4_header(&delivered[0].1[..20]), "{what}");
        assert_eq!(delivered[0].1, expected, "{what}");
    }
}

#[test]
fn what_we_send_is_byte_for_byte_what_the_proxy_sent() {
    for (index, datagram) in datagrams().into_iter().enumerate() {
        let what = format!("packet {}", index + 1);
        let routes = routes(datagram.from.ip(), datagram.to.ip());
        let (edges, stats) = (edges(), (0, Arc::new(WorkerStats::default())));
        let mut outbound = Outbound::new(Udp, edges, routes.reader(), stats, now());
        let mut packet = datagram.payload.clone();
        set_ttl(&mut packet, |ttl| ttl + 1);
        outbound
            .device()
            .from_host
            .push_back((VirtioHeader::default(), packet));
        outbound.turn(now()).unwrap();
        let sent = std::mem::take(&mut outbound.underlay().sent);
        let segment_size = datagram.payload.len();
        let expected = Message {
            addr: datagram.to,
            bytes: datagram.payload,
            segment_size,
            ecn: Ecn::NotEct,
        };
        assert_eq!(sent, [expected], "{what}");
    }
}

/// The datagrams of the capture.
fn datagrams() -> Vec<Datagram> {
    capture::datagrams(CAPTURE)
}

/// The routes of the node at `ours`, which knows the one at `theirs`.
fn routes(ours: IpAddr, theirs: IpAddr) -> SharedRoutes<UdpHop> {
    let subnet = |node: IpAddr| {
        if node == IpAddr::from([192, 0, 2, 1]) {
            "10.244.1.0/24"
        } else {
            "10.244.2.0/24"
        }
    };
    let network = Network {
        prefix: "10.244.0.0/16".parse().unwrap(),
        subnet_len: 24,
        own: subnet(ours).parse().unwrap(),
    };
    let mut table = RouteTable::new(Overlay {
        v4: Some(network),
        v6: None,
    });
    let peer = Peer {
        hop: UdpHop(SocketAddr::new(theirs, DEFAULT_PORT)),
        inner_mtu: Mtu::new(1472).unwrap(),
        stats: PeerStats::new(1),
    };
    table.insert(Prefix::V4(subnet(theirs).parse().unwrap()), peer);
    SharedRoutes::new(table)
}

fn edges() -> (MemoryDevice, MemoryUnderlay) {
    (
        MemoryDevice::new(Merge { tcp: true, udp: true }),
        MemoryUnderlay::new(),
    )
}

/// Changes the TTL and computes the header checksum anew, not by the difference.
fn set_ttl(packet: &mut [u8], change: impl FnOnce(u8) -> u8) {
    packet[8] = change(packet[8]);
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..20]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

#[expect(
    clippy::disallowed_methods,
    reason = "nothing here depends on what time it is"
)]
fn now() -> Instant {
    Instant::now()
}
