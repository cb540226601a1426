//! The tunnel guard: pods cannot speak the tunnel's protocol, whatever source they claim.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::netns::Namespace;

use crate::firewall::{PUT_RIGHT, flags, nft, run};
use crate::overlay::{Blueprint, Overlay, READY, wait_for, within};
use crate::support::pod::Pod;
use crate::support::require_firewall;
use crate::support::sniffer::{Sniffer, Way};

#[test]
fn pods_cannot_speak_the_tunnels_protocol_past_nft() {
    if require_firewall("pods_cannot_speak_the_tunnels_protocol_past_nft") {
        guard("s5n", "nft");
    }
}

#[test]
fn pods_cannot_speak_the_tunnels_protocol_past_iptables() {
    if require_firewall("pods_cannot_speak_the_tunnels_protocol_past_iptables") {
        guard("s5i", "iptables");
    }
}

/// S5: to its own node and to another, with its own address and with a peer's.
fn guard(tag: &str, tool: &str) {
    let mut blueprint = Blueprint::embedded(tag, 2);
    blueprint.flags = flags(&["--ip-masq", "--firewall", tool, "--iptables-resync=1"]);
    blueprint.network = ClusterPlan::network("vxlan", false);
    let mut overlay = blueprint.start();
    let pod = Pod::behind(overlay.namespace(1), &overlay.status(1).node.subnets, tag, 1500);
    let from = pod.ends()[0];
    let listed = |overlay: &Overlay| match tool {
        "nft" => nft(overlay, 1, "list table ip flannel-ipv4"),
        _ => run(overlay, 1, "iptables", "-v -S KERSEY-GUARD"),
    };
    wait_for("the link with the pod is known", within(PUT_RIGHT), || {
        listed(&overlay).contains(if tool == "nft" { "\"pod\"" } else { "-i pod" })
    });
    let sniffer = Sniffer::start(overlay.namespace(2), "eth0");
    let to_others: SocketAddr = "192.0.2.2:8472".parse().unwrap();
    let to_own: SocketAddr = "192.0.2.1:8472".parse().unwrap();
    let third: SocketAddr = "192.0.2.254:8472".parse().unwrap();
    let unknown = |overlay: &Overlay, nth| overlay.status(nth).drops.get("unknown_peer").copied();
    let before = (unknown(&overlay, 1), overlay.status(1).drops);
    const EACH: usize = 50;
    for to in [to_others, to_own, third] {
        shoot(from.namespace, from.addr, to, EACH);
    }
    // A pod that says it is the peer; the node has no business answering for it, but the kernel lets it in.
    let spoofed: Ipv4Addr = [192, 0, 2, 2].into();
    from.namespace
        .netlink(async |netlink| {
            let index = netlink.link("eth0").await?.index;
            Ok(netlink.add_address(index, spoofed.into(), 32).await?)
        })
        .unwrap();
    for key in ["all", "pod"] {
        overlay
            .namespace(1)
            .sysctl(&format!("ipv4/conf/{key}/rp_filter"), "0")
            .unwrap();
    }
    for to in [to_own, third] {
        shoot(from.namespace, spoofed.into(), to, EACH);
    }
    std::thread::sleep(Duration::from_millis(300));
    // Another node's tunnel goes on, so only what the pod sent counts.
    let passed = sniffer
        .packets()
        .into_iter()
        .filter(|(way, packet)| *way == Way::In && packet.ends_with(SHOT));
    assert_eq!(passed.count(), 0, "S5: to another node");
    assert_eq!(
        (unknown(&overlay, 1), overlay.status(1).drops),
        before,
        "S5: nothing has reached the daemon"
    );
    let dropped = counted(&listed(&overlay));
    assert_eq!(dropped, 5 * EACH, "{}", listed(&overlay));

    // Without the guard the same reaches the daemon, whose own checks are the second line.
    overlay.terminate(1);
    let mut without = overlay.command(1);
    without.arg("--tunnel-guard=false");
    overlay.nodes[0].child = overlay.run("node 1", 1, without);
    overlay.wait(1, READY, |status| status.ready && !status.peers.is_empty());
    shoot(from.namespace, from.addr, to_own, EACH);
    overlay.wait(1, READY, |status| {
        status.drops.get("unknown_peer") == Some(&(EACH as u64))
    });
}

#[test]
fn pods_cannot_reach_sids() {
    if !require_firewall("pods_cannot_reach_sids") {
        return;
    }
    // S5, with srv6.
    let mut blueprint = Blueprint::embedded("s5sid", 2);
    blueprint.network = ClusterPlan::network("srv6", true);
    blueprint.flags = flags(&["--iptables-resync=1"]);
    let overlay = blueprint.start();
    let pod = Pod::behind(
        overlay.namespace(1),
        &overlay.status(1).node.subnets,
        "s5sid",
        1500,
    );
    let from = pod.ends()[1];
    let listed = || nft(&overlay, 1, "list table ip6 flannel-ipv6");
    wait_for("the link with the pod is known", within(PUT_RIGHT), || {
        listed().contains("\"pod\"")
    });
    let sniffer = Sniffer::start(overlay.namespace(2), "eth0");
    // The SIDs of node 1 and node 2, by their public IPv4 addresses.
    for sid in ["fd12:3456:789a:c000:201::1", "fd12:3456:789a:c000:202::1"] {
        shoot(
            from.namespace,
            from.addr,
            SocketAddr::new(sid.parse().unwrap(), 9),
            20,
        );
    }
    std::thread::sleep(Duration::from_millis(300));
    let passed = sniffer
        .packets()
        .into_iter()
        .filter(|(_, packet)| packet.ends_with(SHOT));
    assert_eq!(passed.count(), 0);
    assert_eq!(counted(&listed()), 40, "{}", listed());
}

const SHOT: &[u8] = b"kersey-s5-shot";

/// Sends datagrams from a pod.
fn shoot(pod: &Namespace, from: IpAddr, to: SocketAddr, count: usize) {
    pod.run(|| {
        let socket = UdpSocket::bind((from, 0))?;
        for _ in 0..count {
            socket.send_to(SHOT, to)?;
        }
        Ok(())
    })
    .unwrap();
}

/// Packets that the guard's rules have dropped, by what the tool lists.
fn counted(listed: &str) -> usize {
    let after = |line: &str, word: &str| -> Option<usize> {
        let mut words = line.split_whitespace().skip_while(|&held| held != word);
        words.nth(1)?.parse().ok()
    };
    listed
        .lines()
        .filter(|line| line.contains("kersey tunnel guard"))
        .filter_map(|line| after(line, "packets").or_else(|| after(line, "-c")))
        .sum()
}
