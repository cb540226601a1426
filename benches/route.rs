//! What does a look-up cost, and what a change, with a thousand, a hundred thousand and a million prefixes?
//!
//! *direct*: all prefixes have the network's subnet length; *trie*: lengths are mixed, so that the trie is searched as well.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use kersey::addr::{Ipv4Prefix, Ipv6Prefix, Mtu, Prefix};
use kersey::backend::udp::UdpHop;
use kersey::dataplane::route::{Network, Overlay, Peer, RouteTable, SharedRoutes};
use kersey::dataplane::stats::PeerStats;

const SIZES: [u32; 3] = [1_000, 100_000, 1_000_000];

/// Which structure holds the prefixes, and of which family they are.
#[derive(Clone, Copy, Debug)]
enum Case {
    DirectV4,
    TrieV4,
    DirectV6,
    TrieV6,
}

impl Case {
    const ALL: [Self; 4] = [Self::DirectV4, Self::TrieV4, Self::DirectV6, Self::TrieV6];

    fn name(self) -> &'static str {
        match self {
            Self::DirectV4 => "direct-v4",
            Self::TrieV4 => "trie-v4",
            Self::DirectV6 => "direct-v6",
            Self::TrieV6 => "trie-v6",
        }
    }

    /// Prefix `n`, and an address in it. Networks hold 2^20 subnets; lengths of the trie cases go from 28 to 32 (60 to 64).
    fn prefix(self, n: u32) -> (Prefix, IpAddr) {
        let v4 = Ipv4Addr::from(0x0a00_0000 | (n << 4));
        let v6 = Ipv6Addr::from((0xfd00_u128 << 112) | (u128::from(n) << 68));
        match self {
            Self::DirectV4 => (
                Prefix::V4(Ipv4Prefix::new(v4, 28).expect("at most 32")),
                v4.into(),
            ),
            Self::TrieV4 => (
                Prefix::V4(Ipv4Prefix::new(v4, 28 + (n % 5) as u8).expect("at most 32")),
                v4.into(),
            ),
            Self::DirectV6 => (
                Prefix::V6(Ipv6Prefix::new(v6, 60).expect("at most 128")),
                v6.into(),
            ),
            Self::TrieV6 => (
                Prefix::V6(Ipv6Prefix::new(v6, 60 + (n % 5) as u8).expect("at most 128")),
                v6.into(),
            ),
        }
    }
}

fn lookup(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup");
    for case in Case::ALL {
        for size in SIZES {
            let table = table(case, size);
            // More addresses than caches hold, each hitting, in no order.
            let addresses: Vec<IpAddr> = (0..65_536u32).map(|n| case.prefix(scatter(n) % size).1).collect();
            let mut next = 0;
            group.bench_function(BenchmarkId::new(case.name(), size), |bencher| {
                bencher.iter(|| {
                    next = (next + 1) & 0xffff;
                    let index = table
                        .lookup(black_box(addresses[next]))
                        .expect("every address hits");
                    black_box(table.peer(index).map(|peer| peer.hop))
                });
            });
        }
    }
    group.finish();
}

fn update(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("update");
    for case in Case::ALL {
        for size in SIZES {
            let shared = SharedRoutes::new(table(case, size));
            let mut n = 0;
            group.bench_function(BenchmarkId::new(case.name(), size), |bencher| {
                bencher.iter(|| {
                    n += 1;
                    let (prefix, _) = case.prefix(scatter(n) % size);
                    let mut table = (*shared.current()).clone();
                    table.remove(prefix);
                    table.insert(prefix, peer(n));
                    shared.publish(table);
                });
            });
        }
    }
    group.finish();
}

fn table(case: Case, size: u32) -> RouteTable<UdpHop> {
    let overlay = Overlay {
        v4: Some(Network {
            prefix: "10.0.0.0/8".parse().expect("a prefix"),
            subnet_len: 28,
            own: "10.255.255.240/28".parse().expect("a prefix"),
        }),
        v6: Some(Network {
            prefix: "fd00::/40".parse().expect("a prefix"),
            subnet_len: 60,
            own: "fd00:0:ff:fff0::/60".parse().expect("a prefix"),
        }),
    };
    let mut table = RouteTable::new(overlay);
    for n in 0..size {
        table.insert(case.prefix(n).0, peer(n));
    }
    table
}

fn peer(n: u32) -> Peer<UdpHop> {
    // Counters are shared here to keep a million peers small; every peer has an endpoint of its own.
    static STATS: std::sync::LazyLock<PeerStats> = std::sync::LazyLock::new(|| PeerStats::new(1));
    let address = Ipv4Addr::from(0xac10_0000u32.wrapping_add(n));
    Peer {
        hop: UdpHop(SocketAddr::from((address, 8285))),
        inner_mtu: Mtu::new(1472).expect("an MTU"),
        stats: STATS.clone(),
    }
}

/// Takes numbers far apart.
fn scatter(n: u32) -> u32 {
    n.wrapping_mul(0x9e37_79b1).rotate_left(13)
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700));
    targets = lookup, update
}
criterion_main!(benches);
