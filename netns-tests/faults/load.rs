//! L1, L4, L5: many streams, many events, more than fits.

use std::time::{Duration, Instant};

use kersey::lab::daemon;
use kersey::lab::traffic::tcp::Bulk;
use kersey::lab::traffic::udp::Flood;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, PREFIX, READY, figure, within};
use crate::{assert_untouched, flows, probe, require_etcd, require_root, warm};

#[test]
fn l1_l5_many_streams_and_a_flood_leave_nothing_behind() {
    if !require_root("l1_l5_many_streams_and_a_flood_leave_nothing_behind") {
        return;
    }
    let mut overlay = Blueprint::embedded("load", 2).start();
    warm(&overlay, 1, 2);
    // Buffers grow to what is needed, and stay so: they are bounded. From then on nothing may grow.
    many_streams(&overlay, 10);
    overload(&overlay, Duration::from_secs(1));
    let mut oracle = Oracle::start(&mut overlay);
    many_streams(&overlay, 10);
    overload(&overlay, Duration::from_secs(3));
    oracle.check(&mut overlay, 1);
}

/// Streams, and a probe beside them.
pub(crate) fn many_streams(overlay: &Overlay, streams: usize) {
    let probe = probe(overlay, 1, 2);
    let bulk = Bulk {
        streams,
        warmup: Duration::ZERO,
        duration: Duration::from_secs(1),
        congestion: None,
    };
    let report = bulk.run(overlay.pod(1), overlay.pod(2)).unwrap();
    flows(&probe);
    let beside = probe.stop().unwrap();
    let sent = beside.there.sent + beside.back.sent;
    figure(
        "streams, MB; probe sent, lost",
        (streams, report.bytes / 1_000_000, sent, beside.lost()),
    );
    assert!(report.stream_bytes.iter().all(|&bytes| bytes > 0), "{report:?}");
    assert_eq!((beside.corrupted(), beside.duplicates()), (0, 0), "{beside:?}");
}

/// As many packets as go in, while somebody asks for the status.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
pub(crate) fn overload(overlay: &Overlay, duration: Duration) {
    let flood = Flood {
        payload_bytes: 64,
        rate: None,
        duration,
    };
    let socket = overlay.socket(2);
    let (report, mut answers) = std::thread::scope(|scope| {
        let flooding = scope.spawn(|| flood.run(overlay.pod(1), overlay.pod(2)).unwrap());
        let mut answers = Vec::new();
        while !flooding.is_finished() {
            let start = Instant::now();
            daemon::status(&socket).unwrap().expect("it answers");
            answers.push(start.elapsed());
            std::thread::sleep(Duration::from_millis(10));
        }
        (flooding.join().unwrap(), answers)
    });
    answers.sort_unstable();
    let p99 = answers[answers.len() * 99 / 100 - 1];
    figure(
        "flood: sent, received, status p50, p99",
        (
            report.counts.sent,
            report.counts.received,
            answers[answers.len() / 2],
            p99,
        ),
    );
    assert_eq!(report.counts.corrupted, 0);
    assert!(p99 <= within(Duration::from_millis(100)), "{p99:?}");
    std::thread::sleep(Duration::from_secs(1));
    let probe = probe(overlay, 1, 2);
    flows(&probe);
    assert_untouched(&probe.stop().unwrap());
}

#[test]
fn l4_events_leave_no_memory_behind() {
    if require_etcd("l4_events_leave_no_memory_behind") {
        events("events", 10_000);
    }
}

/// So many leases that come, change and go.
pub(crate) fn events(tag: &str, count: u64) {
    let mut blueprint = Blueprint::new(tag, 2);
    // The two nodes' subnets are out of the way of those that come and go.
    blueprint.network =
        r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.200.0","Backend":{"Type":"udp"}}"#.to_owned();
    let mut overlay = blueprint.start();
    warm(&overlay, 1, 2);
    settle(&mut overlay);
    // What a table of this size takes is taken once.
    churn(&mut overlay, 3000);
    let mut oracle = Oracle::start(&mut overlay);
    let before = memory_kib(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    churn(&mut overlay, count);
    for _ in 0..500 {
        overlay.status(2);
    }
    flows(&probe);
    assert_untouched(&probe.stop().unwrap());
    let after = memory_kib(&mut overlay);
    figure("events, memory before and after, KiB", (count, before, after));
    oracle.check(&mut overlay, 1);
}

/// A hundred leases that stay: what goes at once is then less than half of all, and does not linger.
fn settle(overlay: &mut Overlay) {
    overlay.etcd(async |mut client| {
        let puts: Vec<_> = (1..=100).map(|nth| put(nth, 0)).collect();
        client.txn(etcd_client::Txn::new().and_then(puts)).await
    });
    for nth in [1, 2] {
        overlay.wait(nth, READY, |status| status.peers.len() == 101);
    }
}

/// Rounds of fifty leases that come, change and go.
fn churn(overlay: &mut Overlay, events: u64) {
    let moving = 101..=150;
    for round in 0..events.div_ceil(150) {
        let moving = moving.clone();
        overlay.etcd(async |mut client| {
            for low in [0, 1 + round % 9] {
                let puts: Vec<_> = moving.clone().map(|nth| put(nth, low)).collect();
                client.txn(etcd_client::Txn::new().and_then(puts)).await?;
            }
            let gone: Vec<_> = moving
                .map(|nth| etcd_client::TxnOp::delete(key(nth), None))
                .collect();
            client.txn(etcd_client::Txn::new().and_then(gone)).await
        });
    }
    // The one that comes last is the sign that all were seen.
    overlay.etcd(async |mut client| client.txn(etcd_client::Txn::new().and_then([put(151, 0)])).await);
    let last = "10.244.151.0/24";
    for nth in [1, 2] {
        overlay.wait(nth, READY, |status| {
            status.peers.iter().any(|peer| peer.subnets == [last])
        });
    }
    overlay.delete("subnets/10.244.151.0-24");
    for nth in [1, 2] {
        overlay.wait(nth, READY, |status| status.peers.len() == 101);
    }
}

fn key(nth: u64) -> String {
    format!("{PREFIX}/subnets/10.244.{nth}.0-24")
}

fn put(nth: u64, low: u64) -> etcd_client::TxnOp {
    let value = format!(r#"{{"PublicIP":"198.51.{}.{nth}","PublicIPv6":null}}"#, 100 + low);
    etcd_client::TxnOp::put(key(nth), value, None)
}

fn memory_kib(overlay: &mut Overlay) -> u64 {
    let pid = overlay.daemon(2).pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
