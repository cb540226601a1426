//! F19: the underlay's socket is refused by everything that can refuse it. None of it is fatal, each is counted, and one bad
//! destination is no other's business.

use std::process::Command;
use std::time::Duration;

use kersey::lab::netns::Namespace;
use kersey::lab::topology::INTERFACE;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::{assert_gap, assert_untouched, flows, probe, require_root, warm};

#[test]
fn f19_whatever_refuses_the_socket_is_counted_and_passes() {
    if !require_root("f19_whatever_refuses_the_socket_is_counted_and_passes") {
        return;
    }
    let mut overlay = Blueprint::embedded("refusals", 3).start();
    warm(&overlay, 1, 2);
    // An interface that was down has lost the IPv6 addresses the lab gave it; nothing here goes over them.
    let mut oracle = Oracle::start(&mut overlay);
    a_rate_limit(&overlay);
    a_firewall(&overlay);
    a_closed_port(&mut overlay);
    a_cut_mtu(&overlay);
    oracle.check(&mut overlay, 5);
    a_link_that_is_down(&overlay);
}

/// A queue that overflows says so only to whoever asks (IP_RECVERR); without, packets are lost in silence.
fn a_rate_limit(overlay: &Overlay) {
    let probe = probe(overlay, 1, 2);
    let node = overlay.namespace(1);
    run(
        node,
        "tc",
        &[
            "qdisc", "add", "dev", INTERFACE, "root", "tbf", "rate", "500kbit", "burst", "3000", "limit",
            "3000",
        ],
    );
    std::thread::sleep(Duration::from_millis(700));
    run(node, "tc", &["qdisc", "del", "dev", INTERFACE, "root"]);
    flows(&probe);
    let report = probe.stop().unwrap();
    figure("rate limit: lost there", report.there.lost);
    assert!(report.there.lost > 100, "the limit limited nothing: {report:?}");
    assert_eq!((report.duplicates(), report.corrupted()), (0, 0));
    well(overlay);
}

/// EPERM: a firewall on this node's way out.
fn a_firewall(overlay: &Overlay) {
    let probe = probe(overlay, 1, 2);
    let before = dropped(overlay, "underlay_denied");
    let node = overlay.namespace(1);
    for rule in [
        "add table inet refuses",
        "add chain inet refuses out {\ntype filter hook output priority 0;\n}",
        "add rule inet refuses out ip daddr 192.0.2.2 udp dport 8285 drop",
    ] {
        run(node, "nft", &[rule]);
    }
    wait_for("it is counted", within(Duration::from_secs(2)), || {
        dropped(overlay, "underlay_denied") > before + 100
    });
    run(node, "nft", &["delete table inet refuses"]);
    flows(&probe);
    let report = probe.stop().unwrap();
    assert!(report.there.lost > 100 && report.back.lost == 0, "{report:?}");
    well(overlay);
}

/// The other end is gone, and its kernel says so. Those who are there notice nothing.
fn a_closed_port(overlay: &mut Overlay) {
    let untouched = probe(overlay, 1, 2);
    let gone = probe(overlay, 1, 3);
    overlay.kill(3);
    std::thread::sleep(Duration::from_millis(500));
    overlay.restart(3);
    overlay.wait(3, READY, |status| status.ready && status.peers.len() == 2);
    flows(&gone);
    assert_gap(&gone.stop().unwrap(), within(Duration::from_secs(2)));
    let report = untouched.stop().unwrap();
    assert_untouched(&report);
}

/// EMSGSIZE: the link carries less than it did. What still fits goes on.
fn a_cut_mtu(overlay: &Overlay) {
    let probe = probe(overlay, 1, 2);
    set_mtu(overlay, 1400);
    overlay.transfer(1, 2, 1 << 20);
    set_mtu(overlay, 1500);
    assert_untouched(&probe.stop().unwrap());
    overlay.transfer(1, 2, 1 << 20);
    well(overlay);
}

/// ENETUNREACH, and back.
fn a_link_that_is_down(overlay: &Overlay) {
    let probe = probe(overlay, 1, 2);
    let before = dropped(overlay, "underlay_unreachable");
    switch(overlay, Link::Down);
    wait_for("it is counted", within(Duration::from_secs(2)), || {
        dropped(overlay, "underlay_unreachable") > before + 100
    });
    switch(overlay, Link::Up);
    flows(&probe);
    let report = probe.stop().unwrap();
    figure("link down: longest gap", report.longest_gap());
    assert_gap(&report, within(Duration::from_secs(3)));
    well(overlay);
}

/// Nothing is left of what was.
fn well(overlay: &Overlay) {
    let probe = probe(overlay, 1, 2);
    flows(&probe);
    assert_untouched(&probe.stop().unwrap());
}

#[derive(Clone, Copy)]
enum Link {
    Down,
    Up,
}

fn switch(overlay: &Overlay, link: Link) {
    overlay
        .namespace(1)
        .netlink(async |netlink| {
            let index = netlink.link(INTERFACE).await?.index;
            match link {
                Link::Down => netlink.set_down(index).await?,
                Link::Up => netlink.set_up(index).await?,
            }
            Ok(())
        })
        .unwrap();
}

fn set_mtu(overlay: &Overlay, mtu: u32) {
    overlay
        .namespace(1)
        .netlink(async |netlink| Ok(netlink.set_mtu(netlink.link(INTERFACE).await?.index, mtu).await?))
        .unwrap();
}

fn dropped(overlay: &Overlay, reason: &str) -> u64 {
    overlay.status(1).drops.get(reason).copied().unwrap_or(0)
}

fn run(namespace: &Namespace, program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    command.args(arguments);
    let ended = namespace.spawn(&mut command).unwrap().wait().unwrap();
    assert!(ended.success(), "{program} {arguments:?}");
}
