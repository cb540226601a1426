//! SIDs an operator gives to a node, each with traffic through it, among Kerseys and with the kernel's.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use kersey::host::netlink::{Behavior, Sid};
use kersey::lab::netns::Namespace;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::wire::checksum::{Sum, pseudo_v6};
use kersey::wire::ip::{V6_LEN, protocol};
use kersey::wire::srv6::next_header;
use serde_json::json;
use tempfile::NamedTempFile;

use crate::hostile::packets::{outer, sid, srh, udp_v4, udp_v6};
use crate::hostile::raw_socket;
use crate::mixed::{Kernels, Mixed, bulk, datagrams, network};
use crate::overlay::{Blueprint, Overlay, figure, wait_for, within};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

/// Bytes of a transfer.
const TRANSFER: u64 = 2 << 20;

#[test]
fn a_sid_answers_pings_with_a_list_and_without() {
    if !require_etcd("a_sid_answers_pings_with_a_list_and_without") {
        return;
    }
    let mut blueprint = Blueprint::new("s6ping", 3);
    blueprint.network = network(json!({}), true);
    let overlay = blueprint.start();
    let from = End::new(overlay.namespace(1), overlay.lab.nodes[0].v6.into());
    for function in ["1", "e"] {
        let report = Ping::default().run(from, sid(2, function).into()).unwrap();
        assert!(report.all(), "{function}: {report:?}");
    }

    // Through node 3, and to the SID itself.
    let sniffer = Sniffer::start(overlay.namespace(1), INTERFACE);
    let raw = raw_socket(overlay.namespace(1));
    let echo = |number: u8| {
        let mut message = vec![128, 0, 0, 0, 0x77, 0x77, 0, number, 1, 2, 3];
        let pseudo = pseudo_v6(sid(1, "1"), sid(2, "1"), protocol::ICMPV6, message.len());
        let sum = (pseudo + Sum::of(&message)).finish();
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        message
    };
    let to_ends = [
        (1, 0, vec![sid(2, "1")], sid(2, "1")),
        (2, 1, vec![sid(2, "1")], sid(3, "e")),
        (3, 1, vec![sid(2, "1"), sid(3, "e")], sid(3, "e")),
    ];
    for (number, left, list, first) in to_ends {
        let payload = [&srh(protocol::ICMPV6, left, &list, &[])[..], &echo(number)].concat();
        let packet = outer(sid(1, "1"), first, next_header::ROUTING, &payload);
        raw.send_to(&packet, &SocketAddr::from((first, 0)).into())
            .unwrap();
        let answered = |packet: &[u8]| {
            packet[8..24] == sid(2, "1").octets()
                && packet[24..V6_LEN] == sid(1, "1").octets()
                && packet[V6_LEN] == 129
                && packet[V6_LEN + 4..] == echo(number)[4..]
        };
        wait_for("the reply", within(Duration::from_secs(3)), || {
            let passed = sniffer.packets();
            passed
                .iter()
                .any(|(way, packet)| *way == Way::In && packet.len() > V6_LEN && answered(packet))
        });
    }
    assert_eq!(overlay.status(2).counters["segment_echoes"], 3);
    assert_eq!(overlay.status(3).counters["segments_forwarded"], 2);
}

/// The waypoint is the destination itself: its second SID is reached over its loopback.
#[test]
fn a_path_may_name_two_sids_of_one_node() {
    if !require_etcd("a_path_may_name_two_sids_of_one_node") {
        return;
    }
    for mode in ["reduced", "full"] {
        let mut blueprint = Blueprint::new(&format!("s6row{}", &mode[..1]), 2);
        let paths = json!([
            { "To": "10.244.0.0/16", "Via": [sid(2, "e")] },
            { "To": "fd00:10:244::/48", "Via": [sid(2, "e"), sid(2, "e")] },
        ]);
        blueprint.network = network(json!({ "Mode": mode, "Paths": paths }), true);
        let overlay = blueprint.start();
        for family in [0, 1] {
            let (one, two) = (overlay.pods(1)[family], overlay.pods(2)[family]);
            bulk(one, two, TRANSFER);
            bulk(two, one, TRANSFER);
            datagrams(one, two, 100);
        }
        let forwarded = overlay.status(2).counters["segments_forwarded"];
        assert!(forwarded > 300, "{mode}: {forwarded}");
        overlay.assert_no_drops(1);
        overlay.assert_no_drops(2);
    }
}

/// End and End.X with their flavours at node 3, between nodes 1 and 2; the adjacent node of End.X is node 4, which has nothing to do
/// with the path otherwise and passes on what it is given.
#[test]
fn waypoints_of_every_kind_carry_traffic() {
    if !require_etcd("waypoints_of_every_kind_carry_traffic") {
        return;
    }
    for (nth, behavior) in [
        "End",
        "End,psp",
        "End,psp,usp,usd",
        "End.X,2001:db8:1::4",
        "End.X,2001:db8:1::4,psp",
        "End.X,2001:db8:1::4,psp,usd",
    ]
    .into_iter()
    .enumerate()
    {
        let mut blueprint = Blueprint::new(&format!("s6way{nth}"), 4);
        let paths = json!([{ "To": "192.0.2.2", "Via": [sid(3, "a")] }]);
        blueprint.network = network(json!({ "Mode": "full", "Paths": paths }), true);
        let flag = format!("--srv6-sid={}={behavior}", sid(3, "a"));
        blueprint.own_flags.insert(3, vec![flag]);
        let overlay = blueprint.start();
        overlay
            .namespace(4)
            .sysctl("ipv6/conf/all/forwarding", "1")
            .unwrap();
        let left = Sniffer::start(overlay.namespace(3), INTERFACE);
        let adjacent = Sniffer::start(overlay.namespace(4), INTERFACE);
        for (one, two) in overlay.pods(1).into_iter().zip(overlay.pods(2)) {
            bulk(one, two, TRANSFER);
            datagrams(one, two, 100);
        }
        let onward = |packets: Vec<(Way, Vec<u8>)>, way| {
            let path = (sid(1, "1").octets(), sid(2, "1").octets());
            let ours = packets.into_iter().filter(|(seen, packet)| {
                *seen == way
                    && packet[0] >> 4 == 6
                    && (&packet[8..24], &packet[24..V6_LEN]) == (&path.0[..], &path.1[..])
            });
            ours.map(|(_, packet)| packet[6]).collect::<Vec<_>>()
        };
        let sent = onward(left.packets(), Way::Out);
        figure(&format!("{behavior}: sent on"), sent.len());
        assert!(sent.len() > 200, "{behavior}: {}", sent.len());
        let kinds: BTreeSet<u8> = sent.into_iter().collect();
        let expected: &[u8] = if behavior.contains("psp") {
            &[next_header::IPV4, next_header::IPV6]
        } else {
            &[next_header::ROUTING]
        };
        assert_eq!(kinds, expected.iter().copied().collect(), "{behavior}");
        let passed = onward(adjacent.packets(), Way::In).len();
        assert_eq!(
            passed > 200,
            behavior.contains("End.X"),
            "{behavior}: {passed} by the neighbour"
        );
        for nth in 1..=3 {
            overlay.assert_no_drops(nth);
        }
    }
}

/// USD at a waypoint ends paths there: in the node's own device for End, at the neighbour for End.X, which takes IPv6 alone.
#[test]
fn a_waypoint_with_usd_decapsulates_too() {
    if !require_etcd("a_waypoint_with_usd_decapsulates_too") {
        return;
    }
    let mut blueprint = Blueprint::new("s6usd", 3);
    blueprint.network = network(json!({}), true);
    let flags = ["a=End,usd", "b=End.X,2001:db8:1::3,usd", "c=End"].map(|own| {
        let (function, behavior) = own.split_once('=').unwrap();
        format!("--srv6-sid={}={behavior}", sid(2, function))
    });
    blueprint.own_flags.insert(2, flags.into());
    let overlay = blueprint.start();
    let device = Sniffer::start(overlay.namespace(2), crate::overlay::DEVICE);
    let neighbour = Sniffer::start(overlay.namespace(3), INTERFACE);
    let raw = raw_socket(overlay.namespace(1));
    let inner = udp_v4(overlay.pod_v4(1), overlay.pod_v4(2));
    let addrs = [1, 2].map(|nth| overlay.pods(nth)[1].addr);
    let [std::net::IpAddr::V6(one), std::net::IpAddr::V6(two)] = addrs else {
        panic!("IPv6 comes second: {addrs:?}");
    };
    let inner_v6 = udp_v6(one, two);
    for (kind, inner) in [(next_header::IPV4, &inner), (next_header::IPV6, &inner_v6)] {
        for (function, sniffer) in [("a", &device), ("b", &neighbour)] {
            let list = [&srh(kind, 0, &[sid(2, function)], &[])[..], inner].concat();
            for (first, payload) in [(kind, inner), (next_header::ROUTING, &list)] {
                let packet = outer(sid(1, "1"), sid(2, function), first, payload);
                let to = SocketAddr::from((sid(2, function), 0));
                raw.send_to(&packet, &to.into()).unwrap();
                let mut arrives = inner.clone();
                match (function, kind) {
                    ("a", _) => {}
                    (_, next_header::IPV6) => one_hop_less(&mut arrives),
                    _ => continue,
                }
                let what = format!("{kind} in {first} at {function}");
                wait_for(&what, within(Duration::from_secs(3)), || {
                    sniffer.packets().contains(&(Way::In, arrives.clone()))
                });
            }
        }
    }
    let mut drops = overlay.status(2).drops;
    drops.remove("not_unicast");
    assert_eq!(drops, BTreeMap::from([("sid_upper_layer".to_owned(), 2)]));
}

/// End.DX4 and End.DX6 with a next hop: a router behind node 2 that is in no network of Kersey's; the sender is Kersey's node, and a
/// kernel that has nothing but a route under a segment list.
#[test]
fn inner_packets_go_to_a_next_hop() {
    if !require_etcd("inner_packets_go_to_a_next_hop") {
        return;
    }
    let mut blueprint = Blueprint::new("s6dx", 3);
    blueprint.daemons = 2;
    blueprint.network = network(json!({ "Domain": ["2001:db8:1::/64"] }), true);
    let flags = ["d4=End.DX4,198.51.100.2", "d6=End.DX6,2001:db8:dc::2"].map(|own| {
        let (function, behavior) = own.split_once('=').unwrap();
        format!("--srv6-sid={}={behavior}", sid(2, function))
    });
    blueprint.own_flags.insert(2, flags.into());
    let overlay = blueprint.start();
    let router = Namespace::create(&format!("kersey-{}-s6dx-ce", std::process::id())).unwrap();
    let node = overlay.namespace(2);
    ip(
        node,
        &format!(
            "link add ce type veth peer name {INTERFACE} netns {}",
            router.name()
        ),
    );
    for (namespace, link, low) in [(node, "ce", 1), (&router, INTERFACE, 2)] {
        ip(namespace, &format!("link set {link} up"));
        ip(namespace, &format!("addr add 198.51.100.{low}/24 dev {link}"));
        ip(
            namespace,
            &format!("addr add 2001:db8:dc::{low}/64 dev {link} nodad"),
        );
    }
    let sniffer = Sniffer::start(&router, INTERFACE);
    let far = ("203.0.113.9".parse().unwrap(), "2001:db8:99::9".parse().unwrap());
    let by_hand = [
        (
            "d4",
            next_header::IPV4,
            udp_v4(Ipv4Addr::new(203, 0, 113, 1), far.0),
        ),
        (
            "d6",
            next_header::IPV6,
            udp_v6("2001:db8:99::1".parse().unwrap(), far.1),
        ),
    ];
    let raw = raw_socket(overlay.namespace(1));
    for (function, first, inner) in by_hand {
        let list = [&srh(first, 0, &[sid(2, function)], &[])[..], &inner].concat();
        for (first, payload) in [(first, &inner), (next_header::ROUTING, &list)] {
            let packet = outer(sid(1, "1"), sid(2, function), first, payload);
            raw.send_to(&packet, &SocketAddr::from((sid(2, function), 0)).into())
                .unwrap();
            let mut arrives = inner.clone();
            one_hop_less(&mut arrives);
            wait_for(function, within(Duration::from_secs(3)), || {
                sniffer.packets().contains(&(Way::In, arrives.clone()))
            });
        }
    }

    // The kernel's sender.
    let kernel = overlay.namespace(3);
    ip(
        kernel,
        "-6 route add fd12:3456:789a:c000:202::/80 via 2001:db8:1::2",
    );
    let routes = [("203.0.113.0/24", "d4"), ("2001:db8:99::/64", "d6")];
    for (prefix, function) in routes {
        let family = if prefix.contains(':') { "-6" } else { "-4" };
        let segments = sid(2, function);
        ip(
            kernel,
            &format!("{family} route add {prefix} encap seg6 mode encap segs {segments} dev {INTERFACE}"),
        );
    }
    for (from, to) in [
        (
            SocketAddr::from((overlay.lab.nodes[2].v4, 0)),
            SocketAddr::from((far.0, 9)),
        ),
        (
            SocketAddr::from((overlay.lab.nodes[2].v6, 0)),
            SocketAddr::from((far.1, 9)),
        ),
    ] {
        let socket = kernel.run(|| Ok(UdpSocket::bind(from)?)).unwrap();
        wait_for("from the kernel", within(Duration::from_secs(3)), || {
            socket.send_to(b"from the kernel", to).unwrap();
            std::thread::sleep(Duration::from_millis(10));
            let passed = sniffer.packets();
            passed
                .iter()
                .any(|(way, packet)| *way == Way::In && packet.ends_with(b"from the kernel"))
        });
    }
    overlay.assert_no_drops(2);
}

/// Compressed SIDs: containers that lead through Kersey's uN and uA and the kernel's uN, in either order, and end in a list.
#[test]
fn containers_lead_through_kersey_and_the_kernel() {
    if !require_etcd("containers_lead_through_kersey_and_the_kernel") {
        return;
    }
    for (nth, container) in [
        "fcbb:bb00:3::",
        "fcbb:bb00:3:4::",
        "fcbb:bb00:4:3::",
        "fcbb:bb00:3:4:3:4::",
        "fcbb:bb00:a3:4::",
    ]
    .into_iter()
    .enumerate()
    {
        let mut blueprint = Blueprint::new(&format!("s6csid{nth}"), 4);
        let paths = json!([{ "To": "192.0.2.2", "Via": [container] }]);
        let settings = json!({ "Paths": paths, "Domain": ["fcbb:bb00::/32"] });
        blueprint.network = network(settings, true);
        let flags = ["fcbb:bb00:3::/48=uN", "fcbb:bb00:a3::/48=uA,2001:db8:1::4"];
        let flags = flags.map(|own| format!("--srv6-sid={own}"));
        blueprint.own_flags.insert(3, flags.into());
        let mixed = Mixed::start(blueprint, Kernels::ONE);
        let overlay = &mixed.overlay;
        for namespace in [1, 2, 3, 4].map(|nth| overlay.namespace(nth)) {
            for (prefix, gateway) in [("3", 3), ("a3", 3), ("4", 4)] {
                if !namespace.name().ends_with(&format!("-{gateway}")) {
                    let route = format!("-6 route add fcbb:bb00:{prefix}::/48 via 2001:db8:1::{gateway}");
                    ip(namespace, &route);
                }
            }
        }
        overlay
            .namespace(4)
            .netlink(async |netlink| {
                let index = netlink.link(INTERFACE).await?.index;
                let behavior = Behavior::EndNextCsid {
                    block_bits: 32,
                    node_bits: 16,
                };
                let prefix = "fcbb:bb00:4::/48".parse()?;
                Ok(netlink
                    .replace_sid(&Sid {
                        prefix,
                        index,
                        behavior,
                    })
                    .await?)
            })
            .unwrap();
        for (one, two) in mixed.pods(1).into_iter().zip(mixed.pods(2)) {
            bulk(one, two, TRANSFER);
            datagrams(one, two, 100);
        }
        let forwarded = overlay.status(3).counters["segments_forwarded"];
        figure(&format!("{container}: sent on by Kersey"), forwarded);
        assert!(forwarded > 200, "{container}: {forwarded}");
        let bytes = overlay.lab.nodes[3].received_bytes().unwrap();
        assert_eq!(bytes > TRANSFER, container.contains(":4"), "{container}: {bytes}");
        mixed.assert_sound();
    }
}

/// HMACs made by Kersey and judged by Kersey, and made by the kernel.
#[test]
fn hmacs_are_made_and_judged() {
    if !require_etcd("hmacs_are_made_and_judged") {
        return;
    }
    let mut keys = NamedTempFile::new().unwrap();
    writeln!(keys, "# of this network\n\n7 sha256 between us\n8 sha1 once").unwrap();
    let file = format!("--srv6-hmac-keys={}", keys.path().display());
    for id in [7, 8] {
        let mut blueprint = Blueprint::new(&format!("s6mac{id}"), 3);
        blueprint.daemons = 2;
        let settings = json!({ "HMAC": "require", "HMACKeyID": id, "Domain": ["2001:db8:1::/64"] });
        blueprint.network = network(settings, true);
        blueprint.flags = vec![file.clone()];
        let sid_flag = format!("--srv6-sid={}=End.DX4,192.0.2.1", sid(2, "d4"));
        blueprint.own_flags.insert(2, vec![sid_flag]);
        let overlay = blueprint.start();
        assert_eq!(overlay.status(1).node.inner_mtu, 1500 - 104);
        for (one, two) in overlay.pods(1).into_iter().zip(overlay.pods(2)) {
            bulk(one, two, TRANSFER);
            bulk(two, one, TRANSFER);
            datagrams(one, two, 1300);
        }
        overlay.assert_no_drops(1);
        overlay.assert_no_drops(2);
        from_the_kernel(&overlay, id);
    }
}

/// Has the kernel of node 3 sign what it sends to a SID of node 2, first with the right key and then with another secret.
fn from_the_kernel(overlay: &Overlay, id: u32) {
    let kernel = overlay.namespace(3);
    ip(
        kernel,
        "-6 route add fd12:3456:789a:c000:202::/80 via 2001:db8:1::2",
    );
    let (algorithm, secret) = if id == 7 {
        ("sha256", "between us")
    } else {
        ("sha1", "once")
    };
    let segments = sid(2, "d4");
    let sniffer = Sniffer::start(overlay.namespace(1), INTERFACE);
    for (secret, passes) in [(secret, true), ("a guess", false)] {
        if !set_key(kernel, id, algorithm, secret) {
            figure("HMAC by the kernel", "this kernel makes none");
            return;
        }
        let route = format!("203.0.113.0/24 encap seg6 mode encap segs {segments} hmac {id} dev {INTERFACE}");
        ip(kernel, &format!("route replace {route}"));
        let from = overlay.lab.nodes[2].v4;
        let socket = kernel.run(|| Ok(UdpSocket::bind((from, 0))?)).unwrap();
        let before = overlay.status(2).drops.get("hmac_wrong").copied().unwrap_or(0);
        let text = format!("signed, {passes}").into_bytes();
        let mut sent = 0;
        wait_for("the kernel's HMAC", within(Duration::from_secs(3)), || {
            socket.send_to(&text, ("203.0.113.9", 9)).unwrap();
            sent += 1;
            std::thread::sleep(Duration::from_millis(10));
            let passed = sniffer.packets();
            let arrived = passed
                .iter()
                .any(|(way, packet)| *way == Way::In && packet.ends_with(&text) && packet[0] >> 4 == 4);
            assert!(passes || !arrived);
            let wrong = overlay.status(2).drops.get("hmac_wrong").copied().unwrap_or(0);
            if passes { arrived } else { wrong - before == sent }
        });
    }
}

/// Gives the kernel a key for HMACs; whether it takes one. iproute2 reads the secret from the terminal, if there is one.
fn set_key(namespace: &Namespace, id: u32, algorithm: &str, secret: &str) -> bool {
    let mut command = Command::new("setsid");
    command.args(["ip", "sr", "hmac", "set", &id.to_string(), algorithm]);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = namespace.spawn(&mut command).unwrap();
    let mut input = child.stdin.take().unwrap();
    // An iproute2 that does not ask has closed it.
    let _ = writeln!(input, "{secret}");
    drop(input);
    child.wait().unwrap().success()
}

/// What a router makes of a packet.
fn one_hop_less(packet: &mut [u8]) {
    if packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return;
    }
    packet[8] -= 1;
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..20]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Has iproute2 do something in a namespace.
pub(crate) fn ip(namespace: &Namespace, words: &str) {
    let mut command = Command::new("ip");
    command.args(words.split(' '));
    let status = namespace.spawn(&mut command).unwrap().wait().unwrap();
    assert!(status.success(), "ip {words} in {}", namespace.name());
}
