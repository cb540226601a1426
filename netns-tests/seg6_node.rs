//! Nodes with the kernel's SRv6, among themselves: what they set up is right before anybody else is judged by it.
//!
//! ```text
//!   node 1 eth0 2001:db8:1::1 --- br0 in the hub --- 2001:db8:1::2 eth0 node 2
//!          fd12:3456:789a:c000:201::/80  |  kersey server       fd12:3456:789a:c000:202::/80
//!                                        |
//!                                   eth0 node 3, a waypoint
//! ```

#![expect(
    clippy::unwrap_used,
    reason = "in the helpers of tests it says where a test failed"
)]

mod support;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::host::netlink::{Behavior, Gateway, Seg6Mode, Sid};
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::contestant::{self, Contestant};
use kersey::lab::daemon::Child;
use kersey::lab::netns::Namespace;
use kersey::lab::seg6_node::{Form, Seg6Node, Seg6Plan, default_end_sid, peers_installed};
use kersey::lab::topology::{HUB_V4, INTERFACE, Plan, Topology, Wiring};
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;
use kersey::options::{RemoteOptions, StoreKind};
use support::require_root;
use support::sniffer::{Sniffer, Way};
use tempfile::TempDir;

/// Next header values: an IPv4 packet, a routing header, an IPv6 packet.
const IPV4: u8 = 4;
const ROUTING: u8 = 43;
const IPV6: u8 = 41;

#[test]
fn both_families_travel_in_both_modes() {
    if !require_root("both_families_travel_in_both_modes") {
        return;
    }
    let network = Network::start("seg6-modes", 2, &ClusterPlan::network("srv6", true));
    for (mode, mtu, outer) in [
        (Seg6Mode::EncapRed, 1460, [IPV4, IPV6]),
        (Seg6Mode::Encap, 1436, [ROUTING, ROUTING]),
    ] {
        let mut nodes = [1, 2].map(|nth| network.join_as(nth, Form::Seg6, Some(mode)));
        network.update(&mut nodes);
        let pods = [network.pods(1, &nodes[0]), network.pods(2, &nodes[1])];
        let sniffer = Sniffer::start(&network.lab.nodes[0].namespace, INTERFACE);
        for family in [0, 1] {
            reach(pods[0][family], pods[1][family], mtu);
            transfer(pods[0][family], pods[1][family]);
        }
        let seen = next_headers(&sniffer.packets());
        assert_eq!(seen.len(), 4, "{mode:?}: both ways, both families: {seen:?}");
        for (way, inner, next) in seen {
            let family = usize::from(inner == IPV6);
            assert_eq!(next, outer[family], "{mode:?}, {way:?}");
        }
        for node in nodes {
            node.leave().unwrap();
        }
    }
}

#[test]
fn a_path_leads_through_a_third_node() {
    if !require_root("a_path_leads_through_a_third_node") {
        return;
    }
    let third = default_end_sid([192, 0, 2, 3].into()).unwrap();
    let config = ClusterPlan::steered_network(&[[192, 0, 2, 1].into(), [192, 0, 2, 2].into()], third, true);
    let network = Network::start("seg6-path", 3, &config);
    for (mode, mtu) in [(Seg6Mode::EncapRed, 1436), (Seg6Mode::Encap, 1420)] {
        let mut nodes = [1, 2, 3].map(|nth| network.join_as(nth, Form::Seg6, Some(mode)));
        network.update(&mut nodes);
        assert_eq!(nodes[2].end_sid(), third);
        let pods = [1, 2, 3].map(|nth| network.pods(nth, &nodes[nth - 1]));
        let waypoint = &network.lab.nodes[2];
        for family in [0, 1] {
            reach(pods[0][family], pods[1][family], mtu);
            let before = waypoint.received_bytes().unwrap();
            transfer(pods[0][family], pods[1][family]);
            let passed = waypoint.received_bytes().unwrap() - before;
            assert!(passed > 2 * TRANSFER, "{mode:?}, family {family}: {passed}");
            // To the waypoint itself there is no way round.
            reach(pods[0][family], pods[2][family], mtu);
        }
        for node in nodes {
            node.leave().unwrap();
        }
    }
}

#[test]
fn proofs_of_concept_get_on_with_one_another_and_with_us() {
    if !require_root("proofs_of_concept_get_on_with_one_another_and_with_us") {
        return;
    }
    let network = Network::start("seg6-old", 3, &ClusterPlan::network("srv6", false));
    let forms = [Form::ProofOfConcept, Form::ProofOfConcept, Form::Seg6];
    let mut nodes = [1, 2, 3].map(|nth| network.join_as(nth, forms[nth - 1], None));
    network.update(&mut nodes);
    let attrs = &nodes[0].lease().attrs;
    let mac = network.mac(1);
    let text = attrs.backend_data.clone().unwrap();
    assert!(text.starts_with(r#"{"MACAddr":""#) && text.len() == 22, "{text}");
    assert_eq!((attrs.public_ipv6, &attrs.backend_v6_data), (None, &None));

    let sniffer = Sniffer::start(&network.lab.nodes[1].namespace, INTERFACE);
    let pods = [1, 2, 3].map(|nth| network.pods(nth, &nodes[nth - 1])[0]);
    for (from, to) in [(0, 1), (2, 1), (0, 2)] {
        reach(pods[from], pods[to], 1436);
        transfer(pods[from], pods[to]);
    }
    let seen = next_headers(&sniffer.packets());
    assert!(seen.contains(&(Way::Out, IPV4, ROUTING)), "{seen:?}");
    assert!(!seen.contains(&(Way::Out, IPV4, IPV4)), "{seen:?}");
    assert!(seen.contains(&(Way::In, IPV4, IPV4)), "node 3's: {seen:?}");

    let shown = network.ip(2, &["-6", "neigh", "show", "nud", "permanent"]);
    for sid in ["fd12:3456:789a:c000:201::1", "fd12:3456:789a:c000:202::1"] {
        assert!(shown.contains(sid), "{sid} is not in\n{shown}");
    }
    assert!(shown.contains(&mac), "{mac} is not in\n{shown}");
    let shown = network.ip(2, &["-6", "route", "show"]);
    for line in [
        "fd12:3456:789a::/48 dev eth0",
        "fd12:3456:789a:c000:202::1  encap seg6local action End.DX4 nh4 0.0.0.0 dev eth0",
    ] {
        assert!(shown.contains(line), "{line:?} is not in\n{shown}");
    }
    let shown = network.ip(2, &["route", "show", &nodes[0].subnets()[0]]);
    assert!(
        shown.contains("encap seg6 mode encap segs 1 [ fd12:3456:789a:c000:201::1 ] dev eth0")
            && !shown.contains("mtu"),
        "{shown}"
    );
}

#[test]
fn what_is_installed_is_what_leases_ask_for_and_goes_with_them() {
    if !require_root("what_is_installed_is_what_leases_ask_for_and_goes_with_them") {
        return;
    }
    let network = Network::start("seg6-leases", 2, &ClusterPlan::network("srv6", true));
    let namespace = &network.lab.nodes[0].namespace;
    assert_eq!(network.seg6_switches(1), ["0", "0"]);
    let fresh = network.ip(1, &["-6", "route", "show"]);
    let mut one = network.join(1);
    let two = network.join(2);
    assert_eq!(network.seg6_switches(1), ["1", "1"]);
    assert_eq!(
        network.ip(1, &["sr", "tunsrc", "show"]).trim(),
        "tunsrc addr fd12:3456:789a:c000:201::1"
    );
    one.update().unwrap();
    assert_eq!((one.peers().len(), peers_installed(namespace).unwrap()), (1, 1));

    let mut routes = namespace
        .netlink(async |netlink| Ok(netlink.seg6_routes().await?))
        .unwrap();
    routes.sort_by_key(|route| route.destination);
    let sids = ["fd12:3456:789a:c000:202::4", "fd12:3456:789a:c000:202::6"];
    let wanted = sids.map(|sid| vec![sid.parse::<Ipv6Addr>().unwrap()]);
    let found: Vec<_> = routes.iter().map(|route| route.segments.clone()).collect();
    assert_eq!(found, wanted);
    assert!(routes.iter().all(|route| route.inner_mtu_bytes == Some(1460)));
    let own = namespace
        .netlink(async |netlink| Ok(netlink.own_routes().await?))
        .unwrap();
    let locator = own
        .iter()
        .find(|route| route.destination.to_string() == "fd12:3456:789a:c000:202::/80");
    let via: IpAddr = "2001:db8:1::2".parse().unwrap();
    assert_eq!(locator.map(|route| route.gateway), Some(Gateway::Via(via)));
    // What is no segment of the node goes nowhere, not back and forth.
    let shown = network.ip(1, &["-6", "route", "show"]);
    assert!(
        shown.contains("blackhole fd12:3456:789a:c000:201::/80"),
        "{shown}"
    );

    two.leave().unwrap();
    one.follow(Duration::from_secs(5), |peers| peers.is_empty())
        .unwrap();
    assert_eq!(peers_installed(namespace).unwrap(), 0);
    one.leave().unwrap();
    assert_eq!(network.seg6_switches(1), ["0", "0"]);
    assert_eq!(network.ip(1, &["sr", "tunsrc", "show"]).trim(), "tunsrc addr ::");
    assert_eq!(network.ip(1, &["-6", "route", "show"]), fresh);
}

#[test]
fn a_network_of_another_backend_is_refused() {
    if !require_root("a_network_of_another_backend_is_refused") {
        return;
    }
    let network = Network::start("seg6-refuse", 1, &ClusterPlan::network("vxlan", false));
    let plan = network.plan(1, Form::Seg6, None);
    let error = Seg6Node::join(&network.lab.nodes[0].namespace, plan).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("backend is vxlan"), "{text}");
    assert_eq!(network.seg6_switches(1), ["0", "0"]);
}

#[test]
fn the_kernel_takes_every_behavior_as_it_is_meant() {
    if !require_root("the_kernel_takes_every_behavior_as_it_is_meant") {
        return;
    }
    let lab = Plan::private("seg6-behave", 1).build().unwrap();
    let namespace = &lab.nodes[0].namespace;
    let neighbour: Ipv6Addr = "2001:db8:1::fe".parse().unwrap();
    let packed = Behavior::EndNextCsid {
        block_bits: 32,
        node_bits: 16,
    };
    for (behavior, shown) in [
        (Behavior::End, "End"),
        (Behavior::EndX(neighbour), "End.X nh6 2001:db8:1::fe"),
        (packed, "End flavors next-csid lblen 32 nflen 16"),
        (Behavior::EndDx4([192, 0, 2, 9].into()), "End.DX4 nh4 192.0.2.9"),
        (Behavior::EndDx6(neighbour), "End.DX6 nh6 2001:db8:1::fe"),
        (Behavior::EndDt6 { table: 254 }, "End.DT6 table main"),
    ] {
        let list = namespace
            .netlink(async |netlink| {
                let index = netlink.link(INTERFACE).await?.index;
                let mut sid = Sid::new("fcbb:bb00:1::".parse()?, index, behavior);
                if behavior == packed {
                    sid.prefix = "fcbb:bb00:1::/48".parse()?;
                }
                netlink.replace_sid(&sid).await?;
                netlink.replace_sid(&sid).await?;
                let list = ip(namespace, &["-6", "route", "show"]);
                netlink.delete_sid(&sid).await?;
                netlink.delete_sid(&sid).await?;
                Ok(list)
            })
            .unwrap();
        let line = list.lines().find(|line| line.starts_with("fcbb:bb00:1::"));
        let line = line.unwrap_or_default();
        assert!(line.contains(&format!("action {shown}")), "{shown}: {list}");
        assert!(!ip(namespace, &["-6", "route", "show"]).contains("fcbb"));
    }
}

#[test]
fn a_contestant_of_benches_needs_no_seg6_switched_on() {
    if !require_root("a_contestant_of_benches_needs_no_seg6_switched_on") {
        return;
    }
    // Segments that are joined behind the link, as network cards have it, and segments that are not.
    for gro in [Switch::Off, Switch::On] {
        let mut plan = Plan::private("seg6-bench", 2);
        plan.wiring = Wiring::Pair;
        plan.offloads = Switch::Off;
        plan.gro = gro;
        let lab = plan.build().unwrap();
        contestant::prepare(Contestant::KernelSeg6, &lab).unwrap();
        let kersey = contestant::Kersey {
            backend: "srv6".to_owned(),
            folder: "/nonexistent".into(),
            arguments: Vec::new(),
        };
        let running = contestant::start(Contestant::KernelSeg6, &lab, &kersey).unwrap();
        let (one, two) = running.ends(&lab).unwrap();
        let sniffer = Sniffer::start(&lab.nodes[1].namespace, INTERFACE);
        reach(one, two, 1460);
        transfer(one, two);
        let mut sizes = BTreeMap::from([(Way::In, 0), (Way::Out, 0)]);
        for (way, packet) in sniffer.packets() {
            let largest = sizes.entry(way).or_default();
            *largest = packet.len().max(*largest);
        }
        assert_eq!(sizes[&Way::Out], 1500);
        assert_eq!(sizes[&Way::In] > 1500, gro == Switch::On, "{gro:?}: {sizes:?}");
        for node in &lab.nodes {
            assert_eq!(seg6_switches(&node.namespace), ["0", "0"]);
        }
    }
}

/// Bytes of a transfer.
const TRANSFER: u64 = (4 << 20) + 1;

fn transfer(one: End<'_>, two: End<'_>) {
    for (from, to) in [(one, two), (two, one)] {
        let transfer = Verified {
            bytes: TRANSFER,
            seed: 6,
            patience: Duration::from_secs(5),
        };
        let report = transfer.run(from, to).unwrap();
        assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
    }
}

/// Small packets arrive, and those of all sizes up to the MTU. The kernel makes no fragments of what is larger: it puts
/// such a packet whole under the outer header, where it fits no link.
fn reach(one: End<'_>, two: End<'_>, mtu: usize) {
    for (from, to) in [(one, two), (two, one)] {
        let headers = if to.addr.is_ipv4() { 28 } else { 48 };
        for total in [84, mtu - 2, mtu - 1, mtu] {
            let ping = Ping {
                count: 2,
                data_bytes: total - headers,
                interval: Duration::from_millis(1),
                ..Ping::default()
            };
            let report = ping.run(from, to.addr).unwrap();
            assert!(
                report.all(),
                "{} to {}, {total} bytes: {report:?}",
                from.addr,
                to.addr
            );
        }
    }
}

/// Of the tunnelled packets among `packets`: ways, inner protocols, and what follows the IPv6 header; each once.
fn next_headers(packets: &[(Way, Vec<u8>)]) -> Vec<(Way, u8, u8)> {
    let mut seen = Vec::new();
    for (way, packet) in packets {
        if packet[0] >> 4 != 6 || packet[8..10] != [0xfd, 0x12] {
            continue;
        }
        let next = packet[6];
        let inner = if next == ROUTING { packet[40] } else { next };
        let kind = (*way, inner, next);
        if [IPV4, IPV6].contains(&inner) && !seen.contains(&kind) {
            seen.push(kind);
        }
    }
    seen
}

/// What iproute2 says in a namespace.
fn ip(namespace: &Namespace, args: &[&str]) -> String {
    let mut command = Command::new("ip");
    command.args(args).stdout(std::process::Stdio::piped());
    let output = namespace.spawn(&mut command).unwrap().wait_with_output().unwrap();
    assert!(output.status.success(), "ip {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// `seg6_enabled` of all interfaces and of the underlay's.
fn seg6_switches(namespace: &Namespace) -> [String; 2] {
    ["all", INTERFACE].map(|scope| {
        let file = format!("/proc/sys/net/ipv6/conf/{scope}/seg6_enabled");
        let text = namespace.run(|| Ok(std::fs::read_to_string(&file)?));
        text.unwrap().trim().to_owned()
    })
}

/// Nodes, and a server with the leases in the hub.
struct Network {
    /// Before the lab, so that it ends first.
    _server: Child,
    lab: Topology,
    _folder: TempDir,
}

impl Network {
    fn start(tag: &str, nodes: usize, config: &str) -> Self {
        let lab = Plan::private(tag, nodes).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
        command.args(["server", "--listen", &format!("{HUB_V4}:8888")]);
        command.args(["--network-config", config]);
        command.arg("--data-dir").arg(folder.path().join("data"));
        let hub = lab.hub.as_ref().unwrap();
        let mut server = Child::start("server", hub, command, &folder.path().join("server.log")).unwrap();
        server
            .wait(Duration::from_secs(10), || {
                hub.run(|| Ok(std::net::TcpStream::connect((HUB_V4, 8888))?)).ok()
            })
            .unwrap();
        Self {
            _server: server,
            lab,
            _folder: folder,
        }
    }

    fn plan(&self, nth: usize, form: Form, mode: Option<Seg6Mode>) -> Seg6Plan {
        let node = &self.lab.nodes[nth - 1];
        Seg6Plan {
            store: StoreKind::Remote(RemoteOptions::plain(vec![
                format!("{HUB_V4}:8888").parse().unwrap(),
            ])),
            interface: INTERFACE.to_owned(),
            v4: node.v4,
            v6: node.v6,
            form,
            mode,
            subnet: None,
        }
    }

    fn join_as(&self, nth: usize, form: Form, mode: Option<Seg6Mode>) -> Seg6Node {
        let namespace = &self.lab.nodes[nth - 1].namespace;
        Seg6Node::join(namespace, self.plan(nth, form, mode)).unwrap()
    }

    fn join(&self, nth: usize) -> Seg6Node {
        self.join_as(nth, Form::Seg6, None)
    }

    fn update(&self, nodes: &mut [Seg6Node]) {
        let peers = nodes.len() - 1;
        for node in nodes {
            node.update().unwrap();
            assert_eq!(node.peers().len(), peers);
        }
    }

    fn pods(&self, nth: usize, node: &Seg6Node) -> Vec<End<'_>> {
        let namespace = &self.lab.nodes[nth - 1].namespace;
        let addrs = node.pods().iter();
        addrs.map(|&addr| End::new(namespace, addr)).collect()
    }

    fn ip(&self, nth: usize, args: &[&str]) -> String {
        ip(&self.lab.nodes[nth - 1].namespace, args)
    }

    fn mac(&self, nth: usize) -> String {
        let namespace = &self.lab.nodes[nth - 1].namespace;
        let link = namespace.netlink(async |netlink| Ok(netlink.link(INTERFACE).await?));
        let mac = link.unwrap().mac.unwrap();
        mac.map(|byte| format!("{byte:02x}")).join(":")
    }

    fn seg6_switches(&self, nth: usize) -> [String; 2] {
        seg6_switches(&self.lab.nodes[nth - 1].namespace)
    }
}
