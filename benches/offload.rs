//! How many bytes a second are split, coalesced and summed?

use std::hint::black_box;
use std::io::IoSlice;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use etherparse::PacketBuilder;
use kersey::dataplane::coalesce::{Coalescer, MAX_SLICES, Merge, Offer, Trust};
use kersey::dataplane::forward::flow_hash;
use kersey::dataplane::offload::SuperPacket;
use kersey::dataplane::packet::PacketBatch;
use kersey::wire::checksum::Sum;
use kersey::wire::ip::IpHeader;
use kersey::wire::virtio::{Gso, GsoKind, VirtioHeader};

/// Payload of a segment at an inner MTU of 1472.
const SEGMENT: usize = 1432;

fn split(criterion: &mut Criterion) {
    let packet = tcp_packet(0, 65_495);
    let ip = IpHeader::parse(&packet).expect("made by hand");
    let gso = Gso {
        kind: GsoKind::TcpV4,
        size: SEGMENT as u16,
        header_len: 40,
    };
    let whole = SuperPacket::new(&packet, ip, gso).expect("made by hand");
    let mut batch = PacketBatch::new();
    batch.push(VirtioHeader::default(), &packet);
    let meta = batch.shape(Some(whole.shape(0))).expect("there is room");
    let mut group = criterion.benchmark_group("split");
    group.throughput(Throughput::Bytes(packet.len() as u64));
    group.bench_function("tcp-64KiB", |bencher| {
        bencher.iter(|| whole.split(black_box(batch.segments_mut(meta, 0)), 0, |_, _| ()));
    });
    group.finish();
}

fn coalesce(criterion: &mut Criterion) {
    let packets: Vec<Vec<u8>> = (0..44).map(|n| tcp_packet(n * SEGMENT as u32, SEGMENT)).collect();
    let buffer = packets.concat();
    let mut coalescer = Coalescer::new(Merge { tcp: true, udp: true });
    let mut group = criterion.benchmark_group("coalesce");
    group.throughput(Throughput::Bytes(buffer.len() as u64));
    for (name, trust) in [
        ("44-verified", Trust::Verified),
        ("44-summed-here", Trust::Unverified),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                coalescer.clear();
                let mut at = 0;
                for packet in &packets {
                    let ip = IpHeader::parse(packet).expect("made by hand");
                    coalescer.offer(
                        &buffer,
                        Offer {
                            at,
                            ip,
                            trust,
                            flow: flow_hash(&ip, packet),
                            unfinished: None,
                        },
                    );
                    at += packet.len();
                }
                coalescer.finish(&buffer);
                let mut slices = [IoSlice::new(&[]); MAX_SLICES];
                black_box(coalescer.slices(0, &buffer, &mut slices))
            });
        });
        assert_eq!(coalescer.len(), 1, "all became one frame");
    }
    group.finish();
}

fn checksum(criterion: &mut Criterion) {
    let bytes = vec![0xa5; 1440];
    let mut group = criterion.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("1440", |bencher| {
        bencher.iter(|| Sum::of(black_box(&bytes)).finish())
    });
    group.finish();
}

/// A TCP segment over IPv4 with right checksums; segment identifications count with the sequence number.
fn tcp_packet(seq: u32, payload: usize) -> Vec<u8> {
    let mut packet = Vec::new();
    let builder = PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 2], 64)
        .tcp(40_000, 5201, seq, 500)
        .ack(1);
    builder
        .write(&mut packet, &vec![0x5a; payload])
        .expect("a vector takes all");
    packet[4..6].copy_from_slice(&((seq as usize / SEGMENT) as u16).to_be_bytes());
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..20]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = split, coalesce, checksum
}
criterion_main!(benches);
