//! What `/metrics` says of a node that moves packets.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for};
use crate::support::require_root;

const PORT: u16 = 9190;

/// The series of node `nth`, by name and labels, and the kind of text it says it is.
fn scrape(overlay: &Overlay, nth: usize) -> (BTreeMap<String, f64>, String) {
    let answer = overlay
        .namespace(nth)
        .run(|| {
            let mut stream = TcpStream::connect(("127.0.0.1", PORT))?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let samples = body.lines().filter(|line| !line.starts_with('#'));
    let series = samples.filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        Some((series.to_owned(), value.parse().ok()?))
    });
    (series.collect(), head.to_ascii_lowercase())
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a moment is compared with a timestamp")]
fn batches_system_calls_and_when_a_peer_was_last_seen_are_exposed() {
    if !require_root("batches_system_calls_and_when_a_peer_was_last_seen_are_exposed") {
        return;
    }
    let mut blueprint = Blueprint::embedded("metrics", 2);
    blueprint.flags = vec![format!("--metrics-address=127.0.0.1:{PORT}")];
    let overlay = blueprint.start();
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    overlay.transfer(1, 2, 8 << 20);
    let peer = overlay.subnet(1);
    let seen = format!("kersey_peer_last_seen_timestamp_seconds{{network=\"_\",peer=\"{peer}\"}}");
    wait_for("node 2 says that it has seen node 1", READY, || {
        scrape(&overlay, 2)
            .0
            .get(&seen)
            .is_some_and(|at| *at >= began as f64)
    });
    // The counts of a turn are told with the next; after a second's sleep there has been one.
    std::thread::sleep(Duration::from_millis(1500));
    let (series, head) = scrape(&overlay, 2);
    assert!(
        head.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    let of = |name: &str, labels: &str| {
        let series = series.get(&format!("kersey_{name}{{network=\"_\"{labels}}}"));
        *series.unwrap_or_else(|| panic!("no {name}{labels}"))
    };
    for direction in ["inbound", "outbound"] {
        let labels = format!(",direction=\"{direction}\"");
        let (sum, count) = (
            of("batch_packets_sum", &labels),
            of("batch_packets_count", &labels),
        );
        assert!(sum > 0.0 && count > 0.0, "{direction}: {sum} {count}");
        assert_eq!(sum, of(&format!("{direction}_packets_total"), ""), "{direction}");
        assert_eq!(
            count,
            of(&format!("{direction}_batches_total"), ""),
            "{direction}"
        );
        let last = series.get(&format!(
            "kersey_batch_packets_bucket{{le=\"+Inf\",network=\"_\",direction=\"{direction}\"}}"
        ));
        assert_eq!(last, Some(&count), "{direction}");
        figure(&format!("packets a batch, {direction}"), sum / count);
    }
    let calls = |call: &str| of("syscalls_total", &format!(",call=\"{call}\""));
    // Each batch in took at least one call, each frame and each run exactly one or more.
    assert!(calls("recvmmsg") >= of("inbound_batches_total", ""));
    assert!(calls("writev") >= of("inbound_frames_total", ""));
    assert!(calls("readv") >= of("outbound_super_packets_total", ""));
    assert!(calls("poll") >= of("sleeps_total", ""));
    let sends = calls("sendmmsg");
    assert!(
        sends > 0.0 && sends <= of("outbound_runs_total", "") + of("send_waits_total", ""),
        "{sends}"
    );
    let packets = of("inbound_packets_total", "") + of("outbound_packets_total", "");
    let all: f64 = [
        "readv",
        "writev",
        "recvmmsg",
        "sendmmsg",
        "sendto",
        "poll",
        "sched_yield",
    ]
    .map(calls)
    .iter()
    .sum();
    figure("system calls a packet", all / packets);
    assert_eq!(of("lease_conflicts_total", ""), 0.0);
    assert_eq!(of("routes", ""), 1.0);
    assert!(of("route_updates_total", "") >= 1.0);
    overlay.ping_all();
}
