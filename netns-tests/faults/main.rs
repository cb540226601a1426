//! Faults, with traffic running: each row of the list of faults is caused for real, and then an oracle is asked.
//!
//! ```text
//!   probe: 1,000 datagrams a second, both ways, numbered, timed and summed
//!     |                                                    |
//!   node 1 flannel0 ── eth0 ── br0 in the hub, etcd ── eth0 ── flannel0 node 2 …
//!                                └─ p2 ══ impair ══ y2 ── x2 ─┘  where the wire itself is bad
//! ```
//!
//! Ids (F1, B5, …) are those of docs/reliability.md, which has a row for each. Every test makes a network of its own; the figures it
//! finds are printed (`--no-capture`). The ignored ones are the long forms: `make soak`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and what it measured by printing"
)]

mod chaos;
mod clock;
mod device;
mod disk;
mod errors;
mod hostile_leases;
mod hostile_tun;
#[path = "../support/impair.rs"]
mod impair;
mod load;
mod loops;
mod many;
mod network;
#[path = "../support/oracle.rs"]
mod oracle;
mod outage;
#[allow(dead_code, reason = "made for the tests of daemons, which need more of it")]
#[path = "../daemon/overlay.rs"]
mod overlay;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "shared with the tests of etcd, which need more of it"
)]
#[path = "../../tests/etcd_server/pki.rs"]
mod pki;
mod restart;
mod returns;
mod soak;
mod starvation;
#[path = "../support/mod.rs"]
mod support;

use std::net::UdpSocket;
use std::time::Duration;

use kersey::lab::traffic::probe::{Probe, ProbeReport};
use kersey::lab::traffic::udp::Flood;

use crate::overlay::{Overlay, READY, wait_for};

/// As [`support::require_root`]; from here on daemons get no huge pages, so that what they take is what they use.
fn require_root(test: &str) -> bool {
    nix::sys::prctl::set_thp_disable(true).unwrap();
    support::require_root(test)
}

/// As [`support::require_etcd`], and the same.
fn require_etcd(test: &str) -> bool {
    require_root(test) && support::require_etcd(test)
}

/// Has two nodes use everything they allocate once: buffers for many packets and for large ones, a socket for answers.
fn warm(overlay: &Overlay, one: usize, two: usize) {
    let flood = Flood {
        payload_bytes: 64,
        rate: None,
        duration: Duration::from_millis(300),
    };
    for (from, to) in [(one, two), (two, one)] {
        flood.run(overlay.pod(from), overlay.pod(to)).unwrap();
        // To nobody: the socket for answers is opened when the first is due.
        let from = overlay.pod(from);
        let socket = from.namespace.run(|| Ok(UdpSocket::bind((from.addr, 0))?));
        socket.unwrap().send_to(b"anybody", "10.244.255.254:9").unwrap();
    }
    overlay.transfer(one, two, 4 << 20);
}

/// Starts the probe between the pods of two nodes, and waits until it runs.
fn probe(overlay: &Overlay, one: usize, two: usize) -> Probe {
    let probe = Probe::start(overlay.pod(one), overlay.pod(two)).unwrap();
    wait_for("the probe runs", READY, || {
        let (there, back) = probe.received();
        there > 100 && back > 100
    });
    probe
}

/// Waits until packets have come through both ways for a tenth of a second.
fn flows(probe: &Probe) {
    let before = probe.received();
    wait_for("traffic flows", READY, || {
        let (there, back) = probe.received();
        there > before.0 + 100 && back > before.1 + 100
    });
}

/// Nothing was lost, doubled or changed.
fn assert_untouched(report: &ProbeReport) {
    let ProbeReport { there, back, .. } = report;
    assert_eq!(
        (report.lost(), report.duplicates(), report.corrupted()),
        (0, 0, 0),
        "there {there:?}, back {back:?}"
    );
}

/// Nothing was doubled or changed, and nothing arrived for no longer than `gap`.
fn assert_gap(report: &ProbeReport, gap: Duration) {
    let ProbeReport { there, back, .. } = report;
    assert!(report.longest_gap() <= gap, "there {there:?}, back {back:?}");
    assert_eq!(
        (report.duplicates(), report.corrupted()),
        (0, 0),
        "there {there:?}, back {back:?}"
    );
}

/// What CI has the time for, and what somebody who waits for it has.
fn in_ci<T>(in_ci: T, elsewhere: T) -> T {
    if std::env::var("CI").as_deref() == Ok("true") {
        in_ci
    } else {
        elsewhere
    }
}

/// A number from the environment, for the long forms.
fn variable(name: &str, default: u64) -> u64 {
    let text = std::env::var(format!("KERSEY_SOAK_{name}"));
    text.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("KERSEY_SOAK_{name}={text}: not a number"))
    })
}
