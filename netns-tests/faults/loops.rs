//! F22: things that could go round for ever, and do not.

use std::net::UdpSocket;
use std::time::Duration;

use kersey::addr::{Ipv4Prefix, Prefix};
use kersey::host::netlink::Route;
use kersey::lab::topology::INTERFACE;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, DEVICE, Overlay, figure, wait_for, within};
use crate::support::sniffer::{Sniffer, Way};
use crate::{require_etcd, warm};

/// What each says.
const SAID: &[u8] = b"going round";
/// Datagrams sent into each loop.
const SENT: usize = 50;

#[test]
fn f22_nothing_goes_round_for_ever() {
    if !require_etcd("f22_nothing_goes_round_for_ever") {
        return;
    }
    let mut overlay = Blueprint::new("loops", 3).start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    leases_that_point_at_each_other(&mut overlay);
    an_address_inside_the_overlay(&mut overlay);
    our_own_subnet(&overlay);
    the_underlay_inside_the_tunnel(&overlay);
    oracle.check(&mut overlay, 4);
}

/// Two leases, each at the other's node. What is sent to them goes there once, and no further: a node is no relay.
fn leases_that_point_at_each_other(overlay: &mut Overlay) {
    let lease = |low: u8| format!(r#"{{"PublicIP":"192.0.2.{low}","PublicIPv6":null}}"#);
    overlay.put("subnets/10.244.251.0-24", lease(2));
    overlay.put("subnets/10.244.252.0-24", lease(1));
    overlay.wait(3, within(Duration::from_secs(2)), |status| {
        status.peers.len() == 4
    });
    for nth in [1, 2] {
        overlay.wait(nth, within(Duration::from_secs(2)), |status| {
            status.peers.len() == 3
        });
    }
    for (from, subnet, at) in [(3, 251, 2), (3, 252, 1), (1, 251, 2), (2, 252, 1)] {
        let ears: Vec<Sniffer> = (1..=3)
            .map(|nth| Sniffer::start(overlay.namespace(nth), INTERFACE))
            .collect();
        let before = dropped(overlay, at, "not_for_us");
        say(overlay, from, &format!("10.244.{subnet}.7"));
        wait_for("they are refused", within(Duration::from_secs(2)), || {
            dropped(overlay, at, "not_for_us") >= before + SENT as u64
        });
        let copies: usize = ears
            .iter()
            .map(|ear| {
                let packets = ear.packets();
                let out = packets.iter().filter(|(way, _)| *way == Way::Out);
                out.map(|(_, packet)| ours(packet)).sum::<usize>()
            })
            .sum();
        assert_eq!(copies, SENT, "node {from} to 10.244.{subnet}.7");
    }
    overlay.delete("subnets/10.244.251.0-24");
    overlay.delete("subnets/10.244.252.0-24");
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(5)), |status| {
            status.peers.len() == 2
        });
    }
}

/// A tunnel that would lead into itself is no tunnel.
fn an_address_inside_the_overlay(overlay: &mut Overlay) {
    let inside = overlay.subnet(2).addr();
    overlay.put("subnets/10.244.253.0-24", format!(r#"{{"PublicIP":"{inside}"}}"#));
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(2)), |status| {
            status.rejected_leases.get("public_ip_in_overlay") == Some(&1)
        });
        assert_eq!(overlay.status(nth).peers.len(), 2);
    }
    overlay.delete("subnets/10.244.253.0-24");
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(2)), |status| {
            status.rejected_leases.is_empty()
        });
    }
}

/// Where no bridge has the own subnet, the kernel sends what is for it into the device.
fn our_own_subnet(overlay: &Overlay) {
    let before = dropped(overlay, 1, "loop");
    let absent = std::net::Ipv4Addr::from_bits(overlay.subnet(1).addr().to_bits() + 77);
    let ear = Sniffer::start(overlay.namespace(1), INTERFACE);
    say(overlay, 1, &absent.to_string());
    wait_for("they are counted", within(Duration::from_secs(2)), || {
        dropped(overlay, 1, "loop") >= before + SENT as u64
    });
    assert_eq!(
        ear.packets()
            .iter()
            .map(|(_, packet)| ours(packet))
            .sum::<usize>(),
        0
    );
}

/// Somebody routes a peer's underlay address into the tunnel: the tunnel's own packets come back into it.
fn the_underlay_inside_the_tunnel(overlay: &Overlay) {
    let node = overlay.namespace(1);
    let peer = Ipv4Prefix::new(overlay.lab.nodes[1].v4, 32).unwrap();
    let index = overlay.device(1).unwrap().0.index;
    let wrong = Route::direct(Prefix::V4(peer), index);
    node.netlink(async |netlink| Ok(netlink.replace_route(&wrong).await?))
        .unwrap();
    let before = dropped(overlay, 1, "loop");
    let ear = Sniffer::start(node, DEVICE);
    let to = overlay.pod(2).addr.to_string();
    say(overlay, 1, &to);
    // Several may come in one piece, to be cut.
    wait_for("they are counted", within(Duration::from_secs(2)), || {
        dropped(overlay, 1, "loop") > before
    });
    std::thread::sleep(Duration::from_millis(200));
    let passed = ear
        .packets()
        .iter()
        .filter(|(_, packet)| packet.len() > 20 && packet[9] == 17)
        .count();
    figure("packets in the device for each sent", passed as f64 / SENT as f64);
    // The datagram itself, and the packet it is in, once.
    assert!(passed <= 2 * SENT, "{passed} packets");
    node.netlink(async |netlink| Ok(netlink.delete_route(&wrong).await?))
        .unwrap();
    overlay.ping_all();
}

/// Sends datagrams from a node's pod.
fn say(overlay: &Overlay, nth: usize, to: &str) {
    let from = overlay.pod(nth);
    let socket = from
        .namespace
        .run(|| Ok(UdpSocket::bind((from.addr, 0))?))
        .unwrap();
    for _ in 0..SENT {
        // An error is about an earlier one.
        if socket.send_to(SAID, format!("{to}:9")).is_err() {
            let _ = socket.send_to(SAID, format!("{to}:9"));
        }
    }
}

/// How many of the datagrams a packet carries: the kernel is handed several at once, to be cut.
fn ours(packet: &[u8]) -> usize {
    packet
        .windows(SAID.len())
        .filter(|window| *window == SAID)
        .count()
}

fn dropped(overlay: &Overlay, nth: usize, reason: &str) -> u64 {
    overlay.status(nth).drops.get(reason).copied().unwrap_or(0)
}
