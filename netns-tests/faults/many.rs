//! F9: a thousand nodes that change, come back all at once, and go by halves, beside traffic.
//!
//! The thousand are keys in etcd. How soon a change is followed is looked at on the wire: a datagram to the subnet that changed goes to
//! the address the change named.

use std::net::{Ipv4Addr, UdpSocket};
use std::ops::Range;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use etcd_client::{Txn, TxnOp};
use kersey::lab::topology::INTERFACE;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, PREFIX, READY, figure, within};
use crate::support::login;
use crate::support::sniffer::{Sniffer, Way};
use crate::{assert_untouched, in_ci, probe, require_etcd, warm};

const NODES: u32 = 1000;
const A_SECOND: u32 = 50;
/// What a daemon may take, at its largest.
const MOST_KIB: u64 = 64 * 1024;
/// What all are written in after the churn.
const STORM: u32 = 100;

#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn f9_a_thousand_nodes_churn_storm_and_vanish_beside_traffic() {
    if !require_etcd("f9_a_thousand_nodes_churn_storm_and_vanish_beside_traffic") {
        return;
    }
    let mut blueprint = Blueprint::new("thousand", 2);
    // What is written below stays clear of what the two nodes lease.
    blueprint.network =
        r#"{"Network":"10.0.0.0/8","SubnetLen":28,"SubnetMin":"10.255.0.0","Backend":{"Type":"udp"}}"#
            .to_owned();
    let mut overlay = blueprint.start();
    warm(&overlay, 1, 2);
    write(&overlay, 0..NODES, 0);
    for nth in [1, 2] {
        overlay.wait(nth, READY, |status| status.peers.len() == NODES as usize + 1);
    }
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);

    let seconds = in_ci(60, 10);
    let mut took = churn(&overlay, seconds * A_SECOND);
    took.sort_unstable();
    let p99 = took[took.len() * 99 / 100];
    figure(
        "changes looked at, p50, p99, longest until a packet takes the new way",
        (took.len(), took[took.len() / 2], p99, took[took.len() - 1]),
    );
    assert!(took.len() > 5 * seconds as usize, "{} were looked at", took.len());
    assert!(p99 <= within(Duration::from_secs(1)), "{p99:?}");

    let storm = Instant::now();
    for first in (0..NODES).step_by(100) {
        write(&overlay, first..first + 100, STORM);
    }
    let written = storm.elapsed();
    assert!(written <= Duration::from_secs(5), "{written:?}");
    let last: Vec<String> = (0..NODES)
        .map(|i| format!("{}:8285", address(i, STORM)))
        .collect();
    let settled = Instant::now();
    for nth in [1, 2] {
        overlay.wait(nth, within(Duration::from_secs(5)), |status| {
            let there: std::collections::BTreeSet<&String> =
                status.peers.iter().flat_map(|peer| &peer.endpoints).collect();
            last.iter().all(|endpoint| there.contains(endpoint))
        });
    }
    figure("a storm: written in, settled after", (written, settled.elapsed()));

    let vanish = Instant::now();
    for first in (0..NODES / 2).step_by(100) {
        let gone: Vec<_> = (first..first + 100)
            .map(|i| TxnOp::delete(key(i), None))
            .collect();
        overlay.etcd(async |mut client| client.txn(Txn::new().and_then(gone)).await.map(drop));
    }
    for nth in [1, 2] {
        overlay.wait(nth, within(Duration::from_secs(5)), |status| {
            status.peers.len() == NODES as usize / 2 + 1
        });
    }
    figure("half of them gone, and known after", vanish.elapsed());
    assert_untouched(&probe.stop().unwrap());
    for nth in [1, 2] {
        let peak = peak_kib(overlay.daemon(nth).pid());
        figure(&format!("node {nth}: KiB at its largest"), peak);
        assert!(peak <= MOST_KIB, "{peak} KiB");
    }
    oracle.check(&mut overlay, 1);
}

/// Writes so many changes, evenly, and gives how long it took until packets followed those that there was time to look at.
fn churn(overlay: &Overlay, changes: u32) -> Vec<Duration> {
    let ear = Sniffer::start(overlay.namespace(1), INTERFACE);
    let from = overlay.pod(1);
    let socket = from
        .namespace
        .run(|| Ok(UdpSocket::bind((from.addr, 0))?))
        .unwrap();
    let (tell, written) = mpsc::channel();
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || change(overlay, changes, &tell));
        let mut took = Vec::new();
        while let Ok(first) = written.recv() {
            // The newest: what was written while we looked is not waited for.
            let (i, round, at) = written.try_iter().last().unwrap_or(first);
            let (subnet, way) = (Ipv4Addr::from(subnet(i).to_bits() + 5), address(i, round));
            loop {
                // An error is about an earlier one.
                let _ = socket.send_to(b"which way", (subnet, 9));
                std::thread::sleep(Duration::from_millis(2));
                let went = ear.packets().iter().any(|(direction, packet)| {
                    *direction == Way::Out && packet.get(16..20) == Some(&way.octets()[..])
                });
                if went {
                    break;
                }
                assert!(at.elapsed() < READY, "nothing goes to {way}");
            }
            took.push(at.elapsed());
        }
        writer.join().unwrap();
        took
    })
}

/// Writes changes, [`A_SECOND`] of them, and tells of each when it is made.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn change(overlay: &Overlay, changes: u32, tell: &mpsc::Sender<(u32, u32, Instant)>) {
    let place = overlay.etcd_place();
    let written = overlay.hub().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let mut client = login::connect(place).await?;
            let mut ticks = tokio::time::interval(Duration::from_secs(1) / A_SECOND);
            for change in 0..changes {
                ticks.tick().await;
                let (i, round) = (change * 37 % NODES, change / NODES + 1);
                let at = Instant::now();
                client.put(key(i), value(i, round), None).await?;
                tell.send((i, round, at))?;
            }
            Ok(())
        })
    });
    written.unwrap();
}

/// Writes leases, a hundred at a time.
fn write(overlay: &Overlay, range: Range<u32>, round: u32) {
    for first in range.clone().step_by(100) {
        let puts: Vec<_> = (first..range.end.min(first + 100))
            .map(|i| TxnOp::put(key(i), value(i, round), None))
            .collect();
        overlay.etcd(async |mut client| client.txn(Txn::new().and_then(puts)).await.map(drop));
    }
}

fn subnet(i: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + i * 16)
}

/// Another one for each node and round.
fn address(i: u32, round: u32) -> Ipv4Addr {
    Ipv4Addr::from(0xc612_0001 + round * NODES + i)
}

fn key(i: u32) -> String {
    format!("{PREFIX}/subnets/{}-28", subnet(i))
}

fn value(i: u32, round: u32) -> String {
    format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, address(i, round))
}

fn peak_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
