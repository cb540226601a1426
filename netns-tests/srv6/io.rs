//! SRv6 without raw sockets: locators routed to a TUN device, with the kernel forwarding.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use kersey::host::netlink::Seg6Mode;
use kersey::host::sysctl;
use kersey::lab::netns::Namespace;
use kersey::lab::seg6_node::default_end_sid;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::ping::Ping;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::mixed::{Kernels, Mixed, bulk, datagrams, network, reach};
use crate::overlay::{Blueprint, DEVICE, Daemon, Overlay, READY};
use crate::support::sniffer::{Sniffer, Way};
use crate::support::{require_etcd, require_root};

/// Bytes of a transfer.
const TRANSFER: u64 = 4 << 20;
/// The flag that does without raw sockets.
const TUN: &str = "--srv6-io=tun";
/// Where nodes have their addresses.
const UNDERLAY: &str = "2001:db8:1::/64";
/// The outer device.
const OUTER: &str = "flannel0-srv6";

#[test]
fn two_tun_nodes() {
    if !require_etcd("two_tun_nodes") {
        return;
    }
    for (mode, mtu) in [("reduced", 1460), ("full", 1436)] {
        let blueprint = blueprint(&format!("s-t2{}", &mode[..1]), 2, json!({ "Mode": mode }));
        let mixed = Mixed::start(
            blueprint,
            Kernels {
                nodes: 0,
                ..Kernels::ONE
            },
        );
        for nth in [1, 2] {
            assert_tun(&mixed.overlay, nth, "tun (forced)");
        }
        exchange(&mixed, 1, 2, mtu);
        mixed.assert_sound();
    }
}

#[test]
fn a_tun_node_and_a_node_with_raw_sockets() {
    if !require_etcd("a_tun_node_and_a_node_with_raw_sockets") {
        return;
    }
    let mut blueprint = blueprint("s-tr", 2, json!({}));
    blueprint.flags = vec!["--threads=split".to_owned()];
    let flags = [TUN, "--queues=4"].map(str::to_owned);
    blueprint.own_flags.insert(1, flags.into());
    let mut overlay = blueprint.build();
    // A router already: nothing is left to switch on.
    let router = overlay.namespace(1);
    router.run(|| Ok(sysctl::make_router(&mut |_| {})?)).unwrap();
    overlay.start_daemons();
    assert_tun(&overlay, 1, "tun (forced)");
    let kernels = Vec::new();
    let mixed = Mixed { kernels, overlay };
    let (tun, raw) = (mixed.overlay.status(1), mixed.overlay.status(2));
    assert_eq!(
        (tun.device.queues, raw.device.offloads["srv6_io"].as_str()),
        (1, "raw")
    );
    exchange(&mixed, 1, 2, 1460);
    mixed.assert_sound();
}

#[test]
fn a_tun_node_and_the_kernel() {
    if !require_etcd("a_tun_node_and_the_kernel") {
        return;
    }
    for (tag, mode, kernel, mtu) in [
        ("s-tkr", "reduced", Seg6Mode::EncapRed, 1460),
        ("s-tkf", "full", Seg6Mode::Encap, 1436),
    ] {
        let blueprint = blueprint(tag, 2, json!({ "Mode": mode }));
        let kernels = Kernels {
            mode: Some(kernel),
            ..Kernels::ONE
        };
        let mixed = Mixed::start(blueprint, kernels);
        exchange(&mixed, 1, 2, mtu);
        // Larger than the MTU, in inner fragments, each in an outer packet of its own.
        for family in [0, 1] {
            datagrams(mixed.pods(1)[family], mixed.pods(2)[family], 4000);
        }
        mixed.assert_sound();
    }
}

#[test]
fn a_tun_node_as_waypoint() {
    if !require_etcd("a_tun_node_as_waypoint") {
        return;
    }
    // Of kernels, of Kerseys.
    for (tag, kernels, pair, waypoint) in [("s-tw2", 2, [2, 3], 1), ("s-tw0", 0, [1, 2], 3)] {
        let underlay = |nth: usize| [192, 0, 2, u8::try_from(nth).unwrap()].into();
        let via = default_end_sid(underlay(waypoint)).unwrap();
        let paths = pair.map(|nth| json!({ "To": underlay(nth), "Via": [via] }));
        let blueprint = blueprint(tag, 3, json!({ "Paths": paths, "Domain": [UNDERLAY] }));
        let mixed = Mixed::start(
            blueprint,
            Kernels {
                nodes: kernels,
                ..Kernels::ONE
            },
        );
        let before = mixed.overlay.status(waypoint).counters["segments_forwarded"];
        exchange(&mixed, pair[0], pair[1], 1436);
        let passed = mixed.overlay.status(waypoint).counters["segments_forwarded"] - before;
        // Four transfers in segments of 1,384 bytes at the most, there and their acknowledgements back.
        assert!(passed > 4 * TRANSFER / 1384, "{passed} packets");
        costs_one_hop(&mixed, pair, waypoint);
        // SIDs answer echo requests.
        for sid in [via, own_sid(waypoint)] {
            let namespace = mixed.overlay.namespace(pair[0]);
            let said = output(namespace, "ping", &["-c1", "-W2", "-n", &sid.to_string()]);
            assert!(said.contains(" 0% packet loss"), "{said}");
        }
        mixed.assert_sound();
    }
}

#[test]
fn a_daemon_without_the_capability_chooses_the_tun() {
    if !require_etcd("a_daemon_without_the_capability_chooses_the_tun") {
        return;
    }
    let mut blueprint = blueprint("s-tcap", 2, json!({}));
    blueprint.flags.clear();
    let overlay = start_without_raw(blueprint, &[1, 2]);
    for nth in [1, 2] {
        assert_tun(&overlay, nth, "tun (raw sockets refused)");
        let log = overlay.log(nth);
        let said = log
            .lines()
            .filter(|line| line.contains("raw sockets are refused"));
        assert_eq!(said.count(), 1, "{log}");
    }
    let kernels = Vec::new();
    let mixed = Mixed { kernels, overlay };
    exchange(&mixed, 1, 2, 1460);
    mixed.assert_sound();
}

#[test]
fn a_next_hop_of_its_own_takes_raw_sockets() {
    if !require_etcd("a_next_hop_of_its_own_takes_raw_sockets") {
        return;
    }
    let adjacency = "fd12:3456:789a:c000:201::a";
    let path = json!([{ "To": "192.0.2.3", "Via": [adjacency] }]);
    let mut blueprint = blueprint("s-tx", 3, json!({ "Paths": path }));
    let sid = format!("--srv6-sid={adjacency}=End.X,2001:db8:1::3");
    blueprint.own_flags.insert(1, vec![sid]);
    let probe = Ping {
        count: 1,
        ..Ping::default()
    };

    let overlay = blueprint.clone().start();
    assert!(probe.run(overlay.pod(2), overlay.pod(3).addr).unwrap().all());
    assert!(overlay.status(1).counters["segments_forwarded"] > 0);
    drop(overlay);

    blueprint.lab.prefix.push('n');
    let mut overlay = start_without_raw(blueprint, &[1]);
    let log = overlay.log(1);
    assert!(
        log.contains("a SID of this node sends to a next hop of its own"),
        "{log}"
    );
    assert_eq!(
        probe.run(overlay.pod(2), overlay.pod(3).addr).unwrap().received,
        0
    );
    overlay.wait(1, READY, |status| status.drops.contains_key("underlay_denied"));
    assert_eq!(overlay.status(1).counters["segments_forwarded"], 0);
    // Everybody else is reached as ever.
    assert!(probe.run(overlay.pod(2), overlay.pod(1).addr).unwrap().all());
}

#[test]
fn a_node_changes_between_raw_sockets_and_tun() {
    if !require_etcd("a_node_changes_between_raw_sockets_and_tun") {
        return;
    }
    let mut blueprint = blueprint("s-tch", 2, json!({}));
    blueprint.flags.clear();
    let mut mixed = Mixed::start(
        blueprint,
        Kernels {
            nodes: 0,
            ..Kernels::ONE
        },
    );
    let locator = "fd12:3456:789a:c000:201::/80";
    let local = |mixed: &Mixed| routes(mixed.overlay.namespace(1), &["table", "local", "proto", "75"]);
    let main = |mixed: &Mixed| routes(mixed.overlay.namespace(1), &["proto", "75", "exact", locator]);
    let blackhole = |route: &str| route.starts_with(&format!("blackhole {locator} "));
    assert_eq!((local(&mixed).len(), main(&mixed).len()), (1, 0));

    for round in 0..2 {
        mixed.overlay.terminate(1);
        // As in the blueprint, for this node alone.
        let mut command = mixed.overlay.command(1);
        if round == 0 {
            command.arg(TUN);
        }
        let child = mixed.overlay.run("node 1", 1, command);
        mixed.overlay.nodes[0].child = child;
        mixed
            .overlay
            .wait(1, READY, |status| status.ready && status.peers.len() == 1);
        let (locals, mains) = (local(&mixed), main(&mixed));
        if round == 0 {
            assert_tun(&mixed.overlay, 1, "tun (forced)");
            assert!(
                mains.len() == 2 && mains.iter().any(|route| blackhole(route)),
                "{mains:?}"
            );
        } else {
            assert_eq!((locals.len(), mains.len()), (1, 0), "{locals:?} {mains:?}");
        }
        exchange(&mixed, 1, 2, 1460);

        if round == 0 {
            // Whoever takes the device's routes away or sets it down is put right.
            for spoil in [
                ["link", "set", OUTER, "down"].as_slice(),
                ["-6", "route", "del", locator, "dev", OUTER].as_slice(),
                ["link", "set", OUTER, "mtu", "1400"].as_slice(),
                ["link", "del", OUTER].as_slice(),
            ] {
                output(mixed.overlay.namespace(1), "ip", spoil);
                let mended = || {
                    let outer = output(mixed.overlay.namespace(1), "ip", &["link", "show"]);
                    let outer = outer
                        .lines()
                        .find(|line| line.contains(OUTER))
                        .unwrap_or_default();
                    outer.contains(",UP") && outer.contains("mtu 65535") && main(&mixed).len() == 2
                };
                let pause = Duration::from_millis(20);
                let looks = READY.as_millis() / pause.as_millis();
                let in_time = (0..looks).any(|_| {
                    thread::sleep(pause);
                    mended()
                });
                assert!(in_time, "{spoil:?}");
                reach(mixed.pods(1)[0], mixed.pods(2)[0], &[1460]);
            }
            // What it leaves drops packets to the locator, until it comes back or somebody cleans up.
            mixed.overlay.terminate(1);
            let left = main(&mixed);
            assert!(left.len() == 1 && blackhole(&left[0]), "{left:?}");
            let socket = mixed.overlay.socket(1);
            let said = output(
                mixed.overlay.namespace(1),
                env!("CARGO_BIN_EXE_kersey"),
                &["cleanup", "--status-socket", socket.to_str().unwrap()],
            );
            assert!(
                said.contains(&format!("removed route {locator} dev lo")),
                "{said}"
            );
            assert_eq!(main(&mixed), Vec::<String>::new());
            mixed.overlay.restart(1);
            mixed.overlay.wait(1, READY, |status| status.ready);
        }
    }
    mixed.assert_sound();
}

#[test]
fn a_router_tells_a_sid_what_the_path_carries() {
    if !require_etcd("a_router_tells_a_sid_what_the_path_carries") {
        return;
    }
    let blueprint = blueprint("s-tptb", 2, json!({}));
    let mut mixed = Mixed::start(
        blueprint,
        Kernels {
            nodes: 0,
            ..Kernels::ONE
        },
    );
    // RFC 4443 §3.2, with the front of an outer packet of node 1's.
    let too_big = |source: Ipv6Addr| {
        let mut message = vec![2, 0, 0, 0, 0, 0, 0x05, 0x78];
        message.extend([0x60, 0, 0, 1, 0x05, 0xa0, 4, 63]);
        message.extend(source.octets());
        message.extend(own_sid(2).octets());
        message.extend([0x45; 20]);
        message
    };
    let tell = |mixed: &Mixed, message: &[u8]| {
        let to = SocketAddr::from((own_sid(1), 0));
        let sent = mixed.overlay.namespace(2).run(|| {
            let icmp = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
            Ok(icmp.send_to(message, &to.into())?)
        });
        assert_eq!(sent.unwrap(), message.len());
    };
    // About a packet that somebody else has sent.
    tell(&mixed, &too_big(own_sid(2)));
    mixed
        .overlay
        .wait(1, READY, |status| status.drops.get("outside_domain") == Some(&1));
    assert_eq!(mixed.overlay.status(1).peers[0].narrow_mtu, None);
    tell(&mixed, &too_big(own_sid(1)));
    mixed
        .overlay
        .wait(1, READY, |status| status.peers[0].narrow_mtu == Some(1400 - 40));
    exchange(&mixed, 2, 1, 1360);
    // Those of node 1's own kernel that had to be told.
    let drops = mixed.overlay.status(1).drops;
    let expected = ["outside_domain", "too_big", "not_unicast"];
    assert!(
        drops.keys().all(|reason| expected.contains(&reason.as_str())),
        "{drops:?}"
    );
}

#[test]
fn outer_fragments_are_counted() {
    if !require_etcd("outer_fragments_are_counted") {
        return;
    }
    let blueprint = blueprint("s-tfr", 2, json!({ "Domain": [UNDERLAY] }));
    let mut mixed = Mixed::start(
        blueprint,
        Kernels {
            nodes: 0,
            ..Kernels::ONE
        },
    );
    let to = SocketAddr::from((own_sid(1), 0));
    let sent = mixed.overlay.namespace(2).run(|| {
        // The kernel fragments what it has made the header of.
        let v4_in_v6 = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::from(4)))?;
        Ok(v4_in_v6.send_to(&[0x45; 4000], &to.into())?)
    });
    assert_eq!(sent.unwrap(), 4000);
    mixed
        .overlay
        .wait(1, READY, |status| status.drops.get("outer_fragment") == Some(&3));
    mixed.assert_sound_but("outer_fragment");
}

#[test]
fn a_host_made_a_router_keeps_its_advertisements() {
    let namespace = Namespace::create(&format!("s-tra-{}", std::process::id())).unwrap();
    let [global, ra] = namespace
        .run(|| {
            fs::write("/proc/sys/net/ipv6/conf/lo/accept_ra", "1")?;
            sysctl::make_router(&mut |_| {})?;
            Ok([read("all/forwarding")?, read("lo/accept_ra")?])
        })
        .unwrap();
    assert_eq!((global.as_str(), ra.as_str()), ("1", "2"));
}

#[test]
fn a_host_made_a_router_can_be_made_what_it_was() {
    if !require_root("a_host_made_a_router_can_be_made_what_it_was") {
        return;
    }
    let namespace = Namespace::create(&format!("s-trb-{}", std::process::id())).unwrap();
    namespace
        .run(|| {
            // Somebody forwards what comes in by this link, for when the host does; another has no use for advertisements.
            for (key, value) in [
                ("lo/forwarding", "1"),
                ("lo/accept_ra", "0"),
                ("default/accept_ra", "1"),
            ] {
                fs::write(format!("/proc/sys/net/ipv6/conf/{key}"), value)?;
            }
            let keys = ["all", "default", "lo"]
                .into_iter()
                .flat_map(|link| ["forwarding", "accept_ra"].map(|switch| format!("{link}/{switch}")));
            let state = || {
                keys.clone()
                    .map(|key| read(&key))
                    .collect::<anyhow::Result<Vec<_>>>()
            };
            let before = state()?;
            let mut changes = Vec::new();
            sysctl::make_router(&mut |made| changes.extend_from_slice(made))?;
            assert_ne!(state()?, before);
            for change in changes.iter().rev() {
                assert!(change.stands(), "{change:?}");
                change.undo()?;
            }
            assert_eq!(state()?, before);
            Ok(())
        })
        .unwrap();
}

fn read(key: &str) -> anyhow::Result<String> {
    let text = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{key}"))?;
    Ok(text.trim().to_owned())
}

/// A dual-stack network of nodes that do without raw sockets.
fn blueprint(tag: &str, nodes: usize, settings: serde_json::Value) -> Blueprint {
    let mut blueprint = Blueprint::new(tag, nodes);
    blueprint.network = network(settings, true);
    blueprint.flags = vec![TUN.to_owned()];
    blueprint
}

/// Starts the blueprint's network with some of its daemons kept from raw sockets.
pub(crate) fn start_without_raw(blueprint: Blueprint, without: &[usize]) -> Overlay {
    let daemons = blueprint.daemons;
    let mut overlay = blueprint.build();
    for nth in 1..=daemons {
        let mut command = overlay.command(nth);
        if without.contains(&nth) {
            let mut less = Command::new("setpriv");
            less.args(["--bounding-set", "-net_raw", "--inh-caps", "-net_raw", "--"]);
            less.arg(command.get_program()).args(command.get_args());
            command = less;
        }
        let child = overlay.run(&format!("node {nth}"), nth, command);
        let pods = Vec::new();
        overlay.nodes.push(Daemon { child, pods });
    }
    overlay.wait_all();
    overlay
}

/// Everything between two nodes, in both families and both directions.
fn exchange(mixed: &Mixed, one: usize, other: usize, mtu: usize) {
    let ends = [mixed.pods(one), mixed.pods(other)];
    for family in [0, 1] {
        for (from, to) in [(0, 1), (1, 0)] {
            let (near, far) = (ends[from][family], ends[to][family]);
            reach(near, far, &[84, mtu - 1, mtu]);
            bulk(near, far, TRANSFER);
            for payload_bytes in [32, mtu - 48] {
                datagrams(near, far, payload_bytes);
            }
        }
    }
}

/// What two nodes send one another through a waypoint leaves it with one hop less than it came with.
fn costs_one_hop(mixed: &Mixed, pair: [usize; 2], waypoint: usize) {
    let sniffer = Sniffer::start(mixed.overlay.namespace(waypoint), INTERFACE);
    let [one, other] = pair.map(|nth| mixed.pods(nth)[0]);
    reach(one, other, &[84]);
    let sources = pair.map(|nth| own_sid(nth).octets());
    let hops = |way: Way, packets: &[(Way, Vec<u8>)]| {
        let passed = packets.iter().filter(|(its, packet)| {
            *its == way && packet[0] >> 4 == 6 && sources.iter().any(|source| packet[8..24] == *source)
        });
        passed.map(|(_, packet)| packet[7]).collect::<Vec<_>>()
    };
    let packets = sniffer.packets();
    let (came, left) = (hops(Way::In, &packets), hops(Way::Out, &packets));
    // Two echoes, each with its answer.
    assert_eq!(came.len(), 4, "{came:?}");
    assert_eq!(left, came.iter().map(|hops| hops - 1).collect::<Vec<_>>());
}

/// The node's locator leads to its outer device, nothing of it is local, and forwarding is on for just the links it takes.
fn assert_tun(overlay: &Overlay, nth: usize, io: &str) {
    assert_eq!(overlay.status(nth).device.offloads["srv6_io"], io);
    let namespace = overlay.namespace(nth);
    assert_eq!(
        routes(namespace, &["table", "local", "proto", "75"]),
        Vec::<String>::new()
    );
    let locator = format!("fd12:3456:789a:c000:20{nth}::/80 dev {OUTER} ");
    let main = routes(namespace, &["proto", "75"]);
    assert!(main.iter().any(|route| route.starts_with(&locator)), "{main:?}");
    let forwards = |link: &str, key: &str| {
        let path = format!("/proc/sys/net/ipv6/conf/{link}/{key}");
        let value = namespace
            .run(|| Ok(fs::read_to_string(&path).unwrap_or_default()))
            .unwrap();
        value.trim() == "1"
    };
    let per_link = [INTERFACE, OUTER].map(|link| forwards(link, "force_forwarding"));
    // Before Linux 6.17 the host must be a router.
    assert_ne!(
        per_link == [true, true],
        forwards("all", "forwarding"),
        "{per_link:?}"
    );
    assert!(!forwards(DEVICE, "force_forwarding"));
}

/// The SID that ends at a node, and its source.
fn own_sid(nth: usize) -> Ipv6Addr {
    format!("fd12:3456:789a:c000:20{nth}::1").parse().unwrap()
}

/// IPv6 routes, a line each.
fn routes(namespace: &Namespace, which: &[&str]) -> Vec<String> {
    let shown = output(namespace, "ip", &[&["-6", "route", "show"], which].concat());
    shown.lines().map(str::to_owned).collect()
}

/// What a program says that has nothing to complain about.
fn output(namespace: &Namespace, program: &str, args: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(args).stdout(Stdio::piped());
    let done = namespace.spawn(&mut command).unwrap().wait_with_output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(done.status.success(), "{program} {args:?}: {said}");
    said
}
