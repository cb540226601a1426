//! What does a packet cost in each direction, without the kernel, and how much of it is the ingress check?
//!
//! The edges are in memory, so a turn includes a copy into the batch and out of it; compare cases, not absolute numbers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use kersey::addr::{Mtu, Prefix};
use kersey::backend::udp::{Udp, UdpHop};
use kersey::dataplane::coalesce::Merge;
use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::{MemoryDevice, MemoryUnderlay, Message};
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::{PeerStats, WorkerStats};
use kersey::dataplane::worker::{Inbound, InboundOptions, Outbound};
use kersey::wire::ip::Ecn;
use kersey::wire::virtio::VirtioHeader;

/// Packets of a turn: one batch.
const PACKETS: usize = 64;

fn outbound(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("outbound");
    group.throughput(Throughput::Elements(PACKETS as u64));
    for (name, payload) in [("64-byte", 36), ("1472-byte", 1444)] {
        let stats = (0, Arc::new(WorkerStats::default()));
        let mut worker = Outbound::new(Udp, edges(Merge::NONE), routes().reader(), stats, now());
        let packets: Vec<_> = (0..PACKETS)
            .map(|n| (VirtioHeader::default(), packet(2, 1, n, payload)))
            .collect();
        let now = now();
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || packets.clone(),
                |packets| {
                    worker.underlay().sent.clear();
                    worker.device().from_host = packets.into();
                    worker.turn(now).expect("memory never fails")
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

fn inbound(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("inbound");
    group.throughput(Throughput::Elements(PACKETS as u64));
    for check in [IngressCheck::Strict, IngressCheck::Loose, IngressCheck::Off] {
        for (name, payload) in [("64-byte", 36), ("1472-byte", 1444)] {
            let stats = (0, Arc::new(WorkerStats::default()));
            let options = InboundOptions {
                check,
                verify_inner: false,
                inner_mtu: Mtu::new(1472).expect("an MTU"),
                clamp_mss: false,
            };
            let mut worker = Inbound::new(Udp, edges(Merge::NONE), routes().reader(), stats, options, now());
            let messages: Vec<_> = (0..PACKETS)
                .map(|n| {
                    let bytes = packet(1, 2, n, payload);
                    Message {
                        addr: ([192, 0, 2, 1], 8285).into(),
                        segment_size: bytes.len(),
                        ecn: Ecn::NotEct,
                        bytes,
                    }
                })
                .collect();
            let now = now();
            group.bench_function(format!("{}/{name}", check.name()), |bencher| {
                bencher.iter_batched(
                    || messages.clone(),
                    |messages| {
                        worker.device().to_host.clear();
                        worker.underlay().incoming = messages.into();
                        worker.turn(now).expect("memory never fails")
                    },
                    BatchSize::SmallInput,
                );
            });
        }
    }
    group.finish();
}

fn edges(merge: Merge) -> (MemoryDevice, MemoryUnderlay) {
    (MemoryDevice::new(merge), MemoryUnderlay::new())
}

/// Node 2 of a thousand.
fn routes() -> SharedRoutes<UdpHop> {
    let network = Network {
        prefix: "10.244.0.0/14".parse().expect("a prefix"),
        subnet_len: 24,
        own: "10.244.2.0/24".parse().expect("a prefix"),
    };
    let mut table = RouteTable::new(Overlay {
        v4: Some(network),
        v6: None,
    });
    for n in (0..1000u32).filter(|&n| n != 2) {
        let prefix = format!("10.{}.{}.0/24", 244 + n / 256, n % 256)
            .parse()
            .expect("a prefix");
        let peer = Peer {
            hop: UdpHop((std::net::Ipv4Addr::from(0xc000_0200 + n), 8285).into()),
            inner_mtu: Mtu::new(1472).expect("an MTU"),
            stats: PeerStats::new(1),
        };
        table.insert(Prefix::V4(prefix), peer);
    }
    SharedRoutes::new(table)
}

/// UDP from one node's pods to another's; every packet a flow of its own, so that each is checked.
fn packet(from: u8, to: u8, n: usize, payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4([10, 244, from, n as u8], [10, 244, to, n as u8], 64).udp(1000, 2000);
    builder
        .write(&mut packet, &vec![0; payload])
        .expect("a vector takes all");
    packet
}

#[expect(clippy::disallowed_methods, reason = "a bench is all about time")]
fn now() -> Instant {
    Instant::now()
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = outbound, inbound
}
criterion_main!(benches);
