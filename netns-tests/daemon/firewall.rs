//! Firewall rules, made with real tools in real kernels: what they let pass, what not, and who puts them right.
//!
//! ```text
//!   pod eth0 10.244.x.9 ─ veth ─ 10.244.x.1 pod, node 1, 192.0.2.1 eth0 ─── 192.0.2.254 hub: knows no pods
//!                                                                       └── 192.0.2.2 eth0 node 2, pod address on lo
//! ```

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon::Child;
use kersey::lab::topology::{HUB_V4, HUB_V6};
use kersey::lab::traffic::End;

use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::routed::ip;
use crate::support::pod::Pod;
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

pub(crate) fn nft(overlay: &Overlay, nth: usize, words: &str) -> String {
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
