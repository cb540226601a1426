//! What a fault is watched with beside the oracle: daemons whose memory can be compared, a probe, and what it must have seen.

use std::net::UdpSocket;
use std::time::Duration;

use kersey::lab::traffic::probe::{Probe, ProbeReport};
use kersey::lab::traffic::udp::Flood;

use crate::overlay::{Overlay, READY, wait_for};
use crate::support;

/// As [`support::require_root`]; from here on daemons get no huge pages, so that what they take is what they use.
pub(crate) fn require_root(test: &str) -> bool {
    nix::sys::prctl::set_thp_disable(true).unwrap();
    support::require_root(test)
}

/// As [`support::require_etcd`], and the same.
pub(crate) fn require_etcd(test: &str) -> bool {
    require_root(test) && support::require_etcd(test)
}

/// Has two nodes use everything they allocate once: buffers for many packets and for large ones, a socket for answers.
pub(crate) fn warm(overlay: &Overlay, one: usize, two: usize) {
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
pub(crate) fn probe(overlay: &Overlay, one: usize, two: usize) -> Probe {
    let probe = Probe::start(overlay.pod(one), overlay.pod(two)).unwrap();
    wait_for("the probe runs", READY, || {
        let (there, back) = probe.received();
        there > 100 && back > 100
    });
    probe
}

/// Waits until packets have come through both ways for a tenth of a second.
pub(crate) fn flows(probe: &Probe) {
    let before = probe.received();
    wait_for("traffic flows", READY, || {
        let (there, back) = probe.received();
        there > before.0 + 100 && back > before.1 + 100
    });
}

/// Nothing was lost, doubled or changed.
pub(crate) fn assert_untouched(report: &ProbeReport) {
    let ProbeReport { there, back, .. } = report;
    assert_eq!(
        (report.lost(), report.duplicates(), report.corrupted()),
        (0, 0, 0),
        "there {there:?}, back {back:?}"
    );
}

/// Nothing was doubled or changed, and nothing arrived for no longer than `gap`.
pub(crate) fn assert_gap(report: &ProbeReport, gap: Duration) {
    let ProbeReport { there, back, .. } = report;
    assert!(report.longest_gap() <= gap, "there {there:?}, back {back:?}");
    assert_eq!(
        (report.duplicates(), report.corrupted()),
        (0, 0),
        "there {there:?}, back {back:?}"
    );
}
