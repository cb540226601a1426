//! Three nodes, of which one is the kernel's: everybody reaches everybody, and changes are followed.

use std::time::Duration;

use kersey::addr::MacAddr;
use kersey::lab::kernel_node::Carrier;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;

use crate::mixed::Mixed;
use crate::overlay::{Blueprint, Conversation, READY, Underlay, figure, wait_for, within};
use crate::support::require_etcd;

/// How long a change of a peer may take to be followed.
const FOLLOWED: Duration = Duration::from_secs(2);

#[test]
fn two_daemons_and_a_kernel_reach_one_another_in_both_families() {
    if !require_etcd("two_daemons_and_a_kernel_reach_one_another_in_both_families") {
        return;
    }
    for (tag, underlay) in [
        ("three", Underlay::Both),
        ("three4", Underlay::V4Only),
        ("three6", Underlay::V6Only),
    ] {
        let mixed = Mixed::start(Blueprint::new(tag, 3), underlay);
        reach_all(&mixed);
        for (from, to) in pairs(&mixed) {
            for (from, to) in mixed.pods(from).into_iter().zip(mixed.pods(to)) {
                let transfer = Verified {
                    bytes: (1 << 20) + 1,
                    seed: 7,
                    patience: Duration::from_secs(5),
                };
                let report = transfer.run(from, to).unwrap();
                assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
            }
        }
        for nth in [1, 2] {
            mixed.overlay.assert_no_drops(nth);
        }
    }
}

#[test]
fn a_daemon_that_starts_again_is_the_same_to_a_kernel() {
    if !require_etcd("a_daemon_that_starts_again_is_the_same_to_a_kernel") {
        return;
    }
    let mut mixed = Mixed::start(Blueprint::new("again", 2), Underlay::Both);
    let subnets = mixed.subnets(1);
    let key = format!("subnets/{}", subnets.join("&").replace('/', "-"));
    let (lease, _) = mixed.overlay.get(&key).unwrap();
    assert!(lease.contains("VtepMAC"), "{lease}");
    let mut talks: Vec<_> = mixed
        .pods(2)
        .into_iter()
        .zip(mixed.pods(1))
        .map(|(from, to)| Conversation::start(from, to))
        .collect();
    talks.iter_mut().for_each(Conversation::exchange);
    for how in [crate::overlay::Overlay::terminate, crate::overlay::Overlay::kill] {
        how(&mut mixed.overlay, 1);
        mixed.overlay.restart(1);
        mixed
            .overlay
            .wait(1, READY, |status| status.ready && status.peers.len() == 1);
        assert_eq!(mixed.subnets(1), subnets);
        // The kernel is told nothing: what it has installed still holds.
        talks.iter_mut().for_each(Conversation::exchange);
        assert_eq!(mixed.overlay.get(&key).unwrap().0, lease);
    }
    reach_all(&mixed);
}

#[test]
fn a_kernel_that_changes_moves_and_leaves_is_followed() {
    if !require_etcd("a_kernel_that_changes_moves_and_leaves_is_followed") {
        return;
    }
    let mut mixed = Mixed::start(Blueprint::new("follow", 3), Underlay::Both);
    reach_all(&mixed);
    for (carrier, mac) in [
        (Carrier::V4, MacAddr::from([0x02, 0xaa, 0, 0, 0, 4])),
        (Carrier::V6, MacAddr::from([0x02, 0xaa, 0, 0, 0, 6])),
    ] {
        mixed.kernel.set_mac(carrier, mac).unwrap();
        mixed.kernel.update().unwrap();
        let took = wait_for("the new station is reached", within(FOLLOWED), || {
            reaches(&mixed, 1) && reaches(&mixed, 2)
        });
        figure("another Ethernet address: followed after", took);
        reach_all(&mixed);
    }

    let subnets = mixed.subnets(3);
    for (addr, old) in [
        ("192.0.2.77", "192.0.2.3:8472"),
        ("2001:db8:1::77", "[2001:db8:1::3]:8472"),
    ] {
        mixed.kernel.move_to(addr.parse().unwrap()).unwrap();
        mixed.kernel.update().unwrap();
        let took = wait_for("the new address is reached", within(FOLLOWED), || {
            [1, 2].iter().all(|&nth| {
                let status = mixed.overlay.status(nth);
                let kernels: Vec<_> = status
                    .peers
                    .iter()
                    .filter(|peer| peer.subnets.iter().any(|subnet| subnets.contains(subnet)))
                    .collect();
                let endpoints: Vec<_> = kernels.iter().flat_map(|peer| &peer.endpoints).collect();
                status.peers.len() == 2
                    && endpoints.iter().any(|endpoint| endpoint.contains(addr))
                    && endpoints.iter().all(|endpoint| *endpoint != old)
            })
        });
        figure("another underlay address: followed after", took);
        reach_all(&mixed);
    }

    let Mixed { kernel, mut overlay } = mixed;
    let gone = kernel.pods().to_vec();
    kernel.leave().unwrap();
    for nth in [1, 2] {
        let status = overlay.wait(nth, within(FOLLOWED), |status| status.peers.len() == 1);
        assert!(
            status
                .peers
                .iter()
                .all(|peer| peer.subnets.iter().all(|subnet| !subnets.contains(subnet))),
            "{status:#?}"
        );
        for (from, &to) in overlay.pods(nth).into_iter().zip(&gone) {
            let before = overlay.status(nth).drops.get("no_route").copied().unwrap_or(0);
            let ping = Ping {
                count: 1,
                timeout: Duration::from_millis(100),
                ..Ping::default()
            };
            assert_eq!(ping.run(from, to).unwrap().received, 0);
            assert!(overlay.status(nth).drops["no_route"] > before);
        }
    }
    overlay.ping_all();
}

fn pairs(mixed: &Mixed) -> Vec<(usize, usize)> {
    let nodes = 1..=mixed.last();
    nodes
        .clone()
        .flat_map(|from| nodes.clone().map(move |to| (from, to)))
        .filter(|(from, to)| from != to)
        .collect()
}

fn reach_all(mixed: &Mixed) {
    for (from, to) in pairs(mixed) {
        for (from, to) in mixed.pods(from).into_iter().zip(mixed.pods(to)) {
            let report = Ping::default().run(from, to.addr).unwrap();
            assert!(report.all(), "{} to {}: {report:?}", from.addr, to.addr);
        }
    }
}

/// Whether a daemon's node reaches the kernel's in both families.
fn reaches(mixed: &Mixed, nth: usize) -> bool {
    let ping = Ping {
        count: 1,
        timeout: Duration::from_millis(100),
        ..Ping::default()
    };
    let ends = mixed.pods(nth).into_iter().zip(mixed.pods(mixed.last()));
    ends.into_iter()
        .all(|(from, to)| ping.run(from, to.addr).unwrap().all())
}
