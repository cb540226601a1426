//! Firewall rules, made with real tools in real kernels: what they let pass, what not, and who puts them right.
//!
//! ```text
//!   pod eth0 10.244.x.9 ─ veth ─ 10.244.x.1 pod, node 1, 192.0.2.1 eth0 ─── 192.0.2.254 hub: knows no pods
//!                                                                       └── 192.0.2.2 eth0 node 2, pod address on lo
//! ```

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon::Child;
use kersey::lab::netns::Namespace;
use kersey::lab::topology::{HUB_V4, HUB_V6};
use kersey::lab::traffic::End;

use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::routed::ip;
use crate::support::pod::Pod;
use crate::support::sniffer::{Sniffer, Way};
use crate::support::{require_firewall, require_root};
use crate::traces::cleanup;

/// How soon somebody's change must be undone: the period, a second here, and some time for the tools.
pub(crate) const PUT_RIGHT: Duration = Duration::from_secs(4);
/// How long a connection that comes about takes at most.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a connection that does not is waited for.
const NO_CONNECTION: Duration = Duration::from_millis(1200);

#[test]
fn nft_masquerades_pods_towards_the_world_and_nowhere_else() {
    if require_firewall("nft_masquerades_pods_towards_the_world_and_nowhere_else") {
        masquerade("masqn", "nft");
    }
}

#[test]
fn iptables_masquerade_pods_towards_the_world_and_nowhere_else() {
    if require_firewall("iptables_masquerade_pods_towards_the_world_and_nowhere_else") {
        masquerade("masqi", "iptables");
    }
}

/// In both families: §8.1 to §8.3.
fn masquerade(tag: &str, tool: &str) {
    let mut blueprint = Blueprint::embedded(tag, 2);
    blueprint.network = ClusterPlan::network("vxlan", true);
    blueprint.flags = flags(&["--ip-masq", "--firewall", tool]);
    let overlay = blueprint.start();
    assert_eq!(overlay.status(1).firewall, tool);
    assert_masqueraded(&overlay, tag);
}

/// Asserts that what leaves node 1's subnet for the world is masqueraded, in both families, and what stays inside is not.
pub(crate) fn assert_masqueraded(overlay: &Overlay, tag: &str) {
    let env = fs::read_to_string(overlay.file("1.env")).unwrap();
    assert!(env.ends_with("FLANNEL_IPMASQ=true\n"), "{env}");
    let pod = Pod::behind(overlay.namespace(1), &overlay.status(1).node.subnets, tag, 1500);
    let node = &overlay.lab.nodes[0];
    let worlds: [(IpAddr, IpAddr); 2] = [(HUB_V4.into(), node.v4.into()), (HUB_V6.into(), node.v6.into())];
    for ((from, (world, as_whom)), far) in pod.ends().into_iter().zip(worlds).zip(overlay.pods(2)) {
        // The hub knows no route to pods, so it can only have answered the node.
        let seen = connect(from, End::new(overlay.hub(), world), CONNECT).expect("the world answers");
        assert_eq!(seen, as_whom);
        let seen = connect(from, far, CONNECT).expect("a pod answers");
        assert_eq!(seen, from.addr, "between pods nothing is masqueraded");
    }
    // Rule 6: what comes with the node's own address and goes to pods elsewhere is made an address of the overlay (B27).
    let own = End::new(overlay.namespace(1), node.v4.into());
    let seen = connect(own, overlay.pod(2), CONNECT).expect("a pod answers its neighbour's node");
    let IpAddr::V4(seen) = seen else { panic!("{seen}") };
    assert!(overlay.subnet(1).contains(seen), "{seen}");
}

#[test]
fn without_ip_masq_nothing_is_masqueraded() {
    if !require_firewall("without_ip_masq_nothing_is_masqueraded") {
        return;
    }
    let overlay = Blueprint::embedded("nomasq", 1).start();
    let env = fs::read_to_string(overlay.file("1.env")).unwrap();
    assert!(env.ends_with("FLANNEL_IPMASQ=false\n"), "{env}");
    let pod = Pod::behind(
        overlay.namespace(1),
        &overlay.status(1).node.subnets,
        "nomasq",
        1500,
    );
    let world = End::new(overlay.hub(), HUB_V4.into());
    assert_eq!(connect(pod.ends()[0], world, NO_CONNECTION), None);
    assert!(!nft(&overlay, 1, "list table ip flannel-ipv4").contains("postrtg"));
}

#[test]
fn accepts_go_where_dockers_forward_chain_drops() {
    if require_firewall("accepts_go_where_dockers_forward_chain_drops") {
        // B27: an accept in another nft table changes nothing there.
        dockers_policy("docker", "iptables-nft", "auto");
    }
}

#[test]
fn accepts_go_where_an_old_iptables_drops() {
    if require_firewall("accepts_go_where_an_old_iptables_drops") {
        dockers_policy("legacy", "iptables-legacy", "auto");
    }
}

#[test]
fn accepts_made_with_iptables_overrule_its_policy() {
    if require_firewall("accepts_made_with_iptables_overrule_its_policy") {
        dockers_policy("ipt", "iptables", "iptables");
    }
}

fn dockers_policy(tag: &str, tool: &str, firewall: &str) {
    let mut blueprint = Blueprint::embedded(tag, 2);
    blueprint.flags = flags(&["--firewall", firewall, "--iptables-resync=1"]);
    let mut overlay = blueprint.build();
    for words in ["-P FORWARD DROP", "-N DOCKER-USER", "-A FORWARD -j DOCKER-USER"] {
        run(&overlay, 1, tool, words);
    }
    overlay.start_daemons();
    let pod = Pod::behind(overlay.namespace(1), &overlay.status(1).node.subnets, tag, 1500);
    let (from, to) = (pod.ends()[0], overlay.pod(2));
    assert_eq!(connect(from, to, CONNECT), Some(from.addr));
    assert_eq!(connect(to, from, CONNECT), Some(to.addr));
    // B30: a rule that lets nothing past is put before it; the jump moves on.
    let rules = run(&overlay, 1, tool, "-S FORWARD");
    let at = rules
        .lines()
        .position(|line| line.contains("FLANNEL-FWD"))
        .unwrap();
    run(&overlay, 1, tool, &format!("-I FORWARD {at} -j REJECT"));
    let order = |overlay: &Overlay| run(overlay, 1, tool, "-S FORWARD");
    let took = wait_for("the jump is before the REJECT", within(PUT_RIGHT), || {
        let order = order(&overlay);
        order.find("FLANNEL-FWD") < order.find("REJECT")
    });
    figure("jump put right after", took);
    assert!(
        order(&overlay).find("DOCKER-USER") < order(&overlay).find("FLANNEL-FWD"),
        "{}",
        order(&overlay)
    );
    assert_eq!(connect(from, to, CONNECT), Some(from.addr));

    overlay.terminate(1);
    let mut without = overlay.command(1);
    without.arg("--iptables-forward-rules=false");
    overlay.nodes[0].child = overlay.run("node 1", 1, without);
    overlay.wait(1, READY, |status| status.ready && !status.peers.is_empty());
    assert!(!order(&overlay).contains("FLANNEL-FWD"), "{}", order(&overlay));
    let to = overlay.pod(2);
    assert_eq!(connect(from, to, NO_CONNECTION), None, "the policy rules again");
}

#[test]
fn nfts_own_firewalls_are_not_opened_but_named() {
    if !require_firewall("nfts_own_firewalls_are_not_opened_but_named") {
        return;
    }
    let mut overlay = Blueprint::embedded("nftdrop", 1).build();
    nft(&overlay, 1, "add table inet admin");
    nft(
        &overlay,
        1,
        "add chain inet admin gate { type filter hook forward priority 0 ; policy drop ; }",
    );
    overlay.start_daemons();
    let log = overlay.log(1);
    assert!(
        log.contains("nft insert rule inet admin gate ip saddr 10.244.0.0/16 accept"),
        "{log}"
    );
    assert_eq!(
        log.matches("no rule elsewhere can overrule it").count(),
        1,
        "{log}"
    );
}

#[test]
fn tables_somebody_flushed_are_back_within_the_period() {
    if !require_firewall("tables_somebody_flushed_are_back_within_the_period") {
        return;
    }
    // B27: flannel never looks after its tables.
    let mut blueprint = Blueprint::embedded("flush", 1);
    blueprint.flags = flags(&["--ip-masq", "--iptables-resync=1"]);
    let overlay = blueprint.start();
    let list = || nft(&overlay, 1, "-s list ruleset");
    let right = list();
    assert!(
        right.contains("masquerade") && right.contains("tunnel guard"),
        "{right}"
    );
    for (told, (what, words)) in (1..).zip([
        ("all flushed", "flush ruleset"),
        ("a table deleted", "delete table ip flannel-ipv4"),
        ("a chain flushed", "flush chain ip flannel-ipv4 postrtg"),
        (
            "a rule in front",
            "insert rule ip flannel-ipv4 postrtg ip saddr 10.244.0.0/16 return",
        ),
        (
            "a rule behind",
            "add rule ip flannel-ipv4 forward ip saddr 192.0.2.9 drop",
        ),
    ]) {
        nft(&overlay, 1, words);
        // Each is told once, so this cannot be how it was before.
        let took = wait_for(what, within(PUT_RIGHT), || {
            overlay.log(1).matches("somebody changed firewall rules").count() == told && list() == right
        });
        figure(what, took);
    }
}

#[test]
fn chains_somebody_changed_are_right_again_within_the_period() {
    if !require_firewall("chains_somebody_changed_are_right_again_within_the_period") {
        return;
    }
    // B30: flannel looks whether rules are there, not in which order.
    let mut blueprint = Blueprint::embedded("chains", 1);
    blueprint.flags = flags(&["--ip-masq", "--firewall=iptables", "--iptables-resync=1"]);
    let overlay = blueprint.start();
    let list = || {
        let nat = run(&overlay, 1, "iptables", "-t nat -S");
        nat + &run(&overlay, 1, "iptables", "-S")
    };
    let right = list();
    assert!(right.contains("-A FLANNEL-FWD -s 10.244.0.0/16"), "{right}");
    for (told, (what, words)) in (1..).zip([
        ("a chain flushed", "-F FLANNEL-FWD"),
        (
            "a jump deleted",
            "-D FORWARD -m comment --comment X -j FLANNEL-FWD",
        ),
        (
            "a jump doubled",
            "-A FORWARD -m comment --comment X -j FLANNEL-FWD",
        ),
        ("a rule deleted", "-t nat -D FLANNEL-POSTRTG 4"),
        (
            "a rule in the wrong place",
            "-t nat -I FLANNEL-POSTRTG -s 10.244.0.0/16 -j RETURN",
        ),
        ("all of nat flushed", "-t nat -F"),
        (
            "the guard unhooked",
            "-D INPUT -m comment --comment Y -j KERSEY-GUARD",
        ),
    ]) {
        let words: Vec<&str> = words
            .split(' ')
            .map(|word| match word {
                "X" => "flanneld forward",
                "Y" => "kersey tunnel guard",
                other => other,
            })
            .collect();
        run_words(&overlay, 1, "iptables", &words);
        // Each is told once, so this cannot be how it was before.
        let took = wait_for(what, within(PUT_RIGHT), || {
            overlay.log(1).matches("somebody changed firewall rules").count() == told && list() == right
        });
        figure(what, took);
    }
}

#[test]
fn what_flannel_and_the_other_tool_left_goes_at_the_start() {
    if !require_firewall("what_flannel_and_the_other_tool_left_goes_at_the_start") {
        return;
    }
    // B28, and §8.4: as a flannel of v0.7 left it.
    let mut overlay = Blueprint::embedded("old", 1).build();
    for words in [
        "-t nat -A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN",
        "-t nat -A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
        "-t nat -A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE",
        "-t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    ] {
        run(&overlay, 1, "iptables", words);
    }
    let nat = |overlay: &Overlay| run(overlay, 1, "iptables", "-t nat -S");
    let life = |overlay: &mut Overlay, firewall: &str| {
        let mut command = overlay.command(1);
        command.args(["--ip-masq", "--firewall", firewall]);
        let mut child = overlay.run("node 1", 1, command);
        let socket = overlay.socket(1);
        let ready = || {
            kersey::lab::daemon::status(&socket)
                .ok()?
                .filter(|status| status.ready)
        };
        child.wait(READY, ready).unwrap();
        child.stop().unwrap();
    };
    life(&mut overlay, "nft");
    assert_eq!(
        nat(&overlay).matches("10.244.0.0/16").count(),
        0,
        "{}",
        nat(&overlay)
    );
    assert!(nat(&overlay).contains("docker0"), "{}", nat(&overlay));
    // They stay when the daemon ends, until another comes.
    assert!(nft(&overlay, 1, "list tables").contains("flannel-ipv4"));
    life(&mut overlay, "iptables");
    assert!(!nft(&overlay, 1, "list tables").contains("flannel-ipv4"));
    assert!(
        nat(&overlay).contains("-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG")
    );
    life(&mut overlay, "nft");
    assert!(!nat(&overlay).contains("FLANNEL"), "{}", nat(&overlay));
    assert!(!run(&overlay, 1, "iptables", "-S").contains("FLANNEL"));
    let masq = nft(&overlay, 1, "list table ip flannel-ipv4");
    assert!(masq.contains("masquerade"), "{masq}");
    assert!(
        !nft(&overlay, 1, "list tables").contains("flannel-ipv6"),
        "the network has no IPv6 (B27)"
    );
}

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

#[test]
fn the_blackhole_is_behind_every_other_route_and_kept() {
    if !require_root("the_blackhole_is_behind_every_other_route_and_kept") {
        return;
    }
    let mut blueprint = Blueprint::embedded("hole", 1);
    blueprint.flags = flags(&["--ip-blackhole-route", "--iptables-resync=1", "--firewall=off"]);
    let mut overlay = blueprint.start();
    assert_eq!(overlay.status(1).firewall, "off");
    let subnet = overlay.subnet(1);
    let holes = |overlay: &Overlay| run(overlay, 1, "ip", "route show type blackhole proto 75");
    let hole = holes(&overlay);
    assert!(hole.contains(&subnet.to_string()), "{hole}");
    ip(&overlay, 1, &format!("route del blackhole {subnet}"));
    let took = wait_for("the route is back", within(PUT_RIGHT), || holes(&overlay) == hole);
    figure("blackhole back after", took);
    // A pod bridge that comes later must win.
    let pod = Pod::behind(
        overlay.namespace(1),
        &overlay.status(1).node.subnets,
        "hole",
        1500,
    );
    let IpAddr::V4(addr) = pod.ends()[0].addr else {
        panic!("IPv4 comes first")
    };
    let chosen = run(&overlay, 1, "ip", &format!("route get {addr}"));
    assert!(chosen.contains("dev pod"), "{chosen}");
    overlay.terminate(1);
    assert_eq!(holes(&overlay), hole, "it stays, as flannel's does");
    let mut without = overlay.command(1);
    without.arg("--ip-blackhole-route=false");
    overlay.nodes[0].child = overlay.run("node 1", 1, without);
    overlay.wait(1, READY, |status| status.ready);
    assert_eq!(holes(&overlay), "");
}

#[test]
fn without_any_tool_a_node_says_so_once_and_goes_on() {
    if !require_root("without_any_tool_a_node_says_so_once_and_goes_on") {
        return;
    }
    // B29, B36.
    let mut overlay = Blueprint::embedded("notool", 1).build();
    let mut kersey = overlay.command(1);
    kersey.args(["--ip-masq", "--iptables-resync=1"]);
    // A mount namespace of its own: nobody else misses the tools.
    let hide = "for dir in /usr/sbin /sbin /usr/local/sbin /proc/sys/net/bridge; do \
                [ ! -d $dir ] || mount -t tmpfs none $dir; done; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", hide, "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let mut child = overlay.run("node 1", 1, command);
    let socket = overlay.socket(1);
    let ready = || {
        kersey::lab::daemon::status(&socket)
            .ok()?
            .filter(|status| status.ready)
    };
    let status = child.wait(READY, ready).unwrap();
    assert_eq!(
        status.firewall,
        "none: there is neither nft nor iptables on this host"
    );
    let env = fs::read_to_string(overlay.file("1.env")).unwrap();
    assert!(
        env.ends_with("FLANNEL_IPMASQ=false\n"),
        "the runtime has to: {env}"
    );
    std::thread::sleep(Duration::from_millis(2500));
    let log = fs::read_to_string(child.log()).unwrap();
    assert_eq!(log.matches("neither nft nor iptables").count(), 1, "{log}");
    child.stop().unwrap();
}

#[test]
fn a_tool_that_fails_is_named_and_tried_again_while_the_node_goes_on() {
    if !require_firewall("a_tool_that_fails_is_named_and_tried_again_while_the_node_goes_on") {
        return;
    }
    // B29: flannel logs it, and looks as well as ever.
    let mut overlay = Blueprint::embedded("failing", 2).start();
    overlay.terminate(1);
    let mut kersey = overlay.command(1);
    kersey.args([
        "--ip-masq",
        "--firewall=nft",
        "--iptables-resync=1",
        "--healthz-port=8081",
    ]);
    let manager = UnixDatagram::bind(overlay.file("notify.sock")).unwrap();
    manager.set_nonblocking(true).unwrap();
    let (broken, mended_by) = (overlay.file("nft"), overlay.file("mended"));
    let script = format!(
        "#!/bin/sh\n[ ! -e {} ] || exec /usr/local/sbin/nft.real \"$@\"\necho 'no such thing as netfilter' >&2\nexit 1\n",
        mended_by.display()
    );
    fs::write(&broken, script).unwrap();
    let hide = format!(
        "mount -t tmpfs none /usr/local/sbin; cp /usr/sbin/nft /usr/local/sbin/nft.real; chmod 755 {0}; \
         mount --bind {0} /usr/sbin/nft; exec \"$@\"",
        broken.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &hide, "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    command.env("NOTIFY_SOCKET", overlay.file("notify.sock"));
    let env = overlay.file("1.env");
    fs::remove_file(&env).unwrap();
    overlay.nodes[0].child = overlay.run("node 1", 1, command);
    let said = "nft refuses: no such thing as netfilter";
    let why = format!("firewall rules that were asked for cannot be made: {said}");
    let status = overlay.wait(1, READY, |status| {
        status.problem.is_some() && status.peers.len() == 1
    });
    assert_eq!(status.problem.as_deref(), Some(why.as_str()));
    assert_eq!(status.firewall, format!("failing: {said}"));
    let ready_after = |overlay: &Overlay| {
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(len) = manager.recv(&mut buffer) {
            heard.extend(String::from_utf8_lossy(&buffer[..len]).lines().map(str::to_owned));
        }
        let told = heard.iter().any(|line| line == "READY=1");
        (overlay.status(1).ready, told, probe(overlay, "/readyz"))
    };
    // Two periods and some: it is tried again, and nothing but readiness waits for it.
    std::thread::sleep(PUT_RIGHT);
    let (ready, told, answer) = ready_after(&overlay);
    assert!(!ready && !told);
    assert!(answer.starts_with("HTTP/1.0 503"), "{answer}");
    assert!(
        answer.ends_with(&format!("flanneld is not ready yet: {why}")),
        "{answer}"
    );
    assert!(probe(&overlay, "/healthz").starts_with("HTTP/1.0 200"));
    assert!(env.exists(), "the overlay is there to be used");
    overlay.ping_all();

    fs::write(&mended_by, "").unwrap();
    overlay.wait(1, within(PUT_RIGHT), |status| {
        status.ready && status.firewall == "nft"
    });
    let (ready, told, answer) = ready_after(&overlay);
    assert!(ready && told && answer.starts_with("HTTP/1.0 200"), "{answer}");
    assert_eq!(overlay.status(1).problem, None);
    // What was made once stays, whatever becomes of the tool.
    fs::remove_file(&mended_by).unwrap();
    overlay.wait(1, within(PUT_RIGHT), |status| {
        status.firewall.starts_with("failing")
    });
    let (ready, _, answer) = ready_after(&overlay);
    assert!(ready && answer.starts_with("HTTP/1.0 200"), "{answer}");
    let log = overlay.log(1);
    assert_eq!(log.matches("no such thing as netfilter").count(), 2, "{log}");
}

/// What node 1 answers to a probe.
fn probe(overlay: &Overlay, path: &str) -> String {
    let asked = overlay.namespace(1).run(|| {
        let mut stream = TcpStream::connect("127.0.0.1:8081")?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    asked.unwrap()
}

#[test]
fn a_named_tool_that_is_not_there_is_a_fault_and_none_for_auto_is_not() {
    if !require_firewall("a_named_tool_that_is_not_there_is_a_fault_and_none_for_auto_is_not") {
        return;
    }
    let mut overlay = Blueprint::embedded("notool", 1).build();
    for (at, (flag, ready)) in [("--firewall=auto", true), ("--firewall=nft", false)]
        .into_iter()
        .enumerate()
    {
        let mut kersey = overlay.command(1);
        kersey.args([flag, "--ip-masq"]);
        // A host without either.
        let hide = "for dir in /usr/sbin /sbin /usr/bin /bin /usr/local/sbin /usr/local/bin; do \
                    for tool in nft iptables ip6tables; do \
                    [ ! -e $dir/$tool ] || mount --bind /dev/null $dir/$tool; done; done; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", hide, "sh"]);
        command.arg(kersey.get_program()).args(kersey.get_args());
        if at == 0 {
            overlay.adopt(1, command);
        } else {
            overlay.terminate(1);
            overlay.nodes[0].child = overlay.run("node 1", 1, command);
        }
        let status = overlay.wait(1, READY, |status| {
            status.firewall.starts_with("none: ") && (status.ready || status.problem.is_some())
        });
        assert_eq!(status.ready, ready, "{flag}: {status:?}");
    }
}

#[test]
fn cleanup_takes_iptables_chains_and_commented_rules_away_and_leaves_others() {
    if !require_firewall("cleanup_takes_iptables_chains_and_commented_rules_away_and_leaves_others") {
        return;
    }
    // B29: flannel leaves them for ever.
    let mut overlay = Blueprint::embedded("cleanipt", 1).build();
    let old = [
        "-A",
        "FORWARD",
        "-s",
        "10.9.0.0/16",
        "-m",
        "comment",
        "--comment",
        "flanneld forward",
        "-j",
        "ACCEPT",
    ];
    for tool in ["iptables-nft", "iptables-legacy"] {
        run(&overlay, 1, tool, "-A FORWARD -s 172.17.0.0/16 -j ACCEPT");
        run_words(&overlay, 1, tool, &old);
    }
    let list = |overlay: &Overlay| {
        ["iptables-nft", "iptables-legacy"]
            .map(|tool| ["-S", "-t nat -S"].map(|words| run(overlay, 1, tool, words)))
    };
    let mut kersey = overlay.command(1);
    kersey.args(["--ip-masq", "--firewall=iptables"]);
    let mut child = overlay.run("node 1", 1, kersey);
    let socket = overlay.socket(1);
    let ready = || {
        kersey::lab::daemon::status(&socket)
            .ok()?
            .filter(|status| status.ready)
    };
    child.wait(READY, ready).unwrap();
    child.stop().unwrap();
    let said = cleanup(&mut overlay);
    for part in ["FLANNEL-POSTRTG", "FLANNEL-FWD", "KERSEY-GUARD", "10.9.0.0/16"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    for table in list(&overlay).iter().flatten() {
        assert!(
            !table.contains("FLANNEL") && !table.contains("KERSEY") && !table.contains("10.9."),
            "{table}"
        );
    }
    assert!(
        list(&overlay)
            .iter()
            .all(|[filter, _]| filter.contains("172.17.0.0/16"))
    );
    assert!(cleanup(&mut overlay).contains("nothing to clean up"));
}

pub(crate) fn flags(flags: &[&str]) -> Vec<String> {
    flags.iter().map(|&flag| flag.to_owned()).collect()
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

/// Connects over TCP; the client's address as the server saw it.
fn connect(from: End<'_>, to: End<'_>, limit: Duration) -> Option<IpAddr> {
    let listener = to.namespace.run(|| Ok(TcpListener::bind((to.addr, 0))?)).unwrap();
    let place = listener.local_addr().unwrap();
    let client = from.namespace.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::for_address(place), socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(from.addr, 0).into())?;
        socket.connect_timeout(&place.into(), limit)?;
        Ok(TcpStream::from(socket))
    });
    client.ok()?;
    let (_, seen) = listener.accept().unwrap();
    Some(seen.ip())
}

fn nft(overlay: &Overlay, nth: usize, words: &str) -> String {
    run(overlay, nth, "nft", words)
}

pub(crate) fn run(overlay: &Overlay, nth: usize, program: &str, words: &str) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    run_words(overlay, nth, program, &words)
}

/// Runs a tool on a node: what it says.
fn run_words(overlay: &Overlay, nth: usize, program: &str, words: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(words);
    let log = overlay.file("tool.log");
    let mut child = Child::start(program, overlay.namespace(nth), command, &log).unwrap();
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    assert!(ended.success(), "{program} {words:?}: {}", child.log_end());
    fs::read_to_string(&log).unwrap()
}
