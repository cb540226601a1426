//! Packets about as large as the path carries: they arrive, or their sender is told.
//!
//! ```text
//!   pod eth0, link MTU ─ veth ─ node 1 ─ flannel0, MTU of the overlay ⋯ node 2 ─ pod address on lo
//! ```

use std::time::Duration;

use kersey::addr::Mtu;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;

use crate::overlay::Blueprint;
use crate::support::pod::Pod;
use crate::support::require_root;

/// IPv4 and ICMP echo headers.
const HEADERS: usize = 28;

#[test]
fn no_size_falls_into_a_hole_at_1300() {
    if require_root("no_size_falls_into_a_hole_at_1300") {
        try_sizes("m1300", 1300);
    }
}

#[test]
fn no_size_falls_into_a_hole_at_1500() {
    if require_root("no_size_falls_into_a_hole_at_1500") {
        try_sizes("m1500", 1500);
    }
}

#[test]
fn no_size_falls_into_a_hole_at_9000() {
    if require_root("no_size_falls_into_a_hole_at_9000") {
        try_sizes("m9000", 9000);
    }
}

fn try_sizes(tag: &str, link_mtu: u16) {
    let mut blueprint = Blueprint::embedded(tag, 2);
    blueprint.lab.mtu = Mtu::new(link_mtu.into()).unwrap();
    let overlay = blueprint.start();
    let inner = usize::from(overlay.status(1).node.inner_mtu);
    assert_eq!(inner, usize::from(link_mtu) - 28);
    let pod = Pod::behind(
        overlay.namespace(1),
        &overlay.status(1).node.subnets,
        tag,
        link_mtu,
    );
    let far = overlay.pod(2);
    for (name, from) in [("node", overlay.pod(1)), ("pod", pod.ends()[0])] {
        for dont_fragment in [true, false] {
            // Path MTU discovery off means DF clear. With it on, a sender knows after one lost packet what fits.
            let off = if dont_fragment { "0" } else { "1" };
            from.namespace.sysctl("ipv4/ip_no_pmtu_disc", off).unwrap();
            for total in inner - 3..=inner + 3 {
                let ping = Ping {
                    count: 2,
                    data_bytes: total - HEADERS,
                    ..Ping::default()
                };
                let report = ping.run(from, far.addr).unwrap();
                let lost = report.sent - report.received;
                let may_learn = name == "pod" && dont_fragment && total > inner;
                assert!(
                    lost <= u16::from(may_learn),
                    "{name}, {total} bytes, DF {dont_fragment}: {report:?}"
                );
            }
        }
        let transfer = Verified {
            bytes: 2 << 20,
            seed: 1,
            patience: Duration::from_secs(5),
        };
        assert!(transfer.run(from, far).unwrap().intact, "{name} to node 2");
        assert!(transfer.run(far, from).unwrap().intact, "node 2 to {name}");
    }
    for nth in [1, 2] {
        overlay.assert_no_drops(nth);
    }
}
