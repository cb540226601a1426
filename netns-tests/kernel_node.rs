//! Nodes with the kernel's VXLAN, among themselves: what they set up is right before anybody else is judged by it.
//!
//! ```text
//!   node 1 eth0 192.0.2.1 --- br0 in the hub --- 192.0.2.2 eth0 node 2
//!          flannel.1           kersey server            flannel.1
//! ```

#![expect(
    clippy::unwrap_used,
    reason = "in the helpers of tests it says where a test failed"
)]

mod support;

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use kersey::addr::MacAddr;
use kersey::host::netlink::Gateway;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon::Child;
use kersey::lab::kernel_node::{Carrier, KernelNode, KernelPlan, Underlay, peers_installed};
use kersey::lab::topology::{HUB_V4, INTERFACE, Plan, Topology};
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::options::{RemoteOptions, StoreKind};
use support::require_root;
use tempfile::TempDir;

#[test]
fn both_families_travel_over_either() {
    if !require_root("both_families_travel_over_either") {
        return;
    }
    let network = Network::start("families", &ClusterPlan::network("vxlan", true));
    // Underlay families, and the MTU that inner IPv4 and IPv6 then have.
    for (what, v4, v6, mtus) in [
        ("both over IPv4", true, false, [1450, 1450]),
        ("both over IPv6", false, true, [1430, 1430]),
        ("each over its own", true, true, [1450, 1430]),
    ] {
        let mut one = network.join(1, v4, v6);
        let mut two = network.join(2, v4, v6);
        one.update().unwrap();
        two.update().unwrap();
        assert_eq!((one.peers().len(), two.peers().len()), (1, 1), "{what}");
        assert_eq!(one.device(Carrier::V4).is_some(), v4, "{what}");
        assert_eq!(one.device(Carrier::V6).is_some(), v6, "{what}");
        for (family, mtu) in mtus.into_iter().enumerate() {
            let from = network.pod(1, &one, family);
            let to = two.pods()[family];
            let headers = if to.is_ipv4() { 28 } else { 48 };
            // One byte more than the device takes goes in fragments, and arrives all the same.
            for data_bytes in [56, mtu - headers, mtu - headers + 1] {
                let ping = Ping {
                    data_bytes,
                    ..Ping::default()
                };
                let report = ping.run(from, to).unwrap();
                assert!(report.all(), "{what}, {to}, {data_bytes} bytes: {report:?}");
            }
        }
        for node in [&one, &two] {
            for (carrier, mtu) in [(Carrier::V4, 1450), (Carrier::V6, 1430)] {
                let Some((name, _)) = node.device(carrier) else {
                    continue;
                };
                let nth = if std::ptr::eq(node, &one) { 1 } else { 2 };
                assert_eq!(network.mtu(nth, name), mtu, "{what}, {name}");
            }
        }
        two.leave().unwrap();
        one.leave().unwrap();
    }
}

#[test]
fn changes_of_a_peer_are_followed_and_its_end_leaves_nothing() {
    if !require_root("changes_of_a_peer_are_followed_and_its_end_leaves_nothing") {
        return;
    }
    let network = Network::start("follow", &ClusterPlan::vxlan_network(42, 4790, true));
    let mut one = network.join(1, true, false);
    let mut two = network.join(2, true, false);
    assert_eq!(one.device_names(), ["flannel.42"]);
    let reach = |one: &KernelNode, two: &KernelNode, what: &str| {
        for family in [0, 1] {
            let report = Ping::default()
                .run(network.pod(1, one, family), two.pods()[family])
                .unwrap();
            assert!(report.all(), "{what}: {report:?}");
        }
    };
    let update = |one: &mut KernelNode, two: &mut KernelNode| {
        one.update().unwrap();
        two.update().unwrap();
    };
    update(&mut one, &mut two);
    reach(&one, &two, "at first");

    let mac = MacAddr::from([0x02, 0xaa, 0, 0, 0, 7]);
    two.set_mac(Carrier::V4, mac).unwrap();
    let published = two.lease().attrs.backend_data.clone().unwrap();
    assert_eq!(published, r#"{"VNI":42,"VtepMAC":"02:aa:00:00:00:07"}"#);
    update(&mut one, &mut two);
    reach(&one, &two, "with another Ethernet address");

    let subnet = two.lease().subnet;
    two.move_to(Ipv4Addr::new(192, 0, 2, 77).into()).unwrap();
    assert_eq!(two.lease().subnet, subnet);
    update(&mut one, &mut two);
    reach(&one, &two, "at another underlay address");

    two.leave().unwrap();
    one.follow(Duration::from_secs(5), |peers| peers.is_empty())
        .unwrap();
    let namespace = &network.lab.nodes[0].namespace;
    assert_eq!(peers_installed(namespace, &one.device_names()).unwrap(), 0);
    let left = network.neighbours(1);
    assert!(
        !left.contains("02:aa:00:00:00:07") && !left.contains("PERMANENT"),
        "{left}"
    );
    let links = network.lab.nodes[1]
        .namespace
        .netlink(async |netlink| Ok(netlink.links().await?))
        .unwrap();
    assert!(!links.iter().any(|link| link.name.starts_with("flannel")));
}

#[test]
fn what_is_installed_is_what_flannel_installs() {
    if !require_root("what_is_installed_is_what_flannel_installs") {
        return;
    }
    let network = Network::start("installs", &ClusterPlan::network("vxlan", false));
    let mut one = network.join(1, true, false);
    let two = network.join(2, true, false);
    one.update().unwrap();
    let (_, mac) = two.device(Carrier::V4).unwrap();
    let base = two.lease().subnet.v4.addr();

    let routes = network.lab.nodes[0]
        .namespace
        .netlink(async |netlink| Ok(netlink.own_routes().await?))
        .unwrap();
    let onlink: Vec<_> = routes
        .iter()
        .filter(|route| route.gateway == Gateway::OnLink(base.into()))
        .map(|route| route.destination)
        .collect();
    assert_eq!(onlink, [two.lease().subnet.v4.into()]);
    let installed = network.neighbours(1);
    for line in [
        format!("{base} dev flannel.1 lladdr {mac} PERMANENT proto 75"),
        format!("{mac} dev flannel.1 dst 192.0.2.2 self permanent"),
    ] {
        assert!(
            installed.lines().any(|found| found.trim() == line),
            "{line:?} is not in\n{installed}"
        );
    }
    let attrs = &two.lease().attrs;
    assert_eq!(
        (attrs.backend_type.as_str(), attrs.public_ip, attrs.public_ipv6),
        ("vxlan", Ipv4Addr::new(192, 0, 2, 2), None)
    );
    assert_eq!(attrs.backend_v6_data, None);
}

#[test]
fn a_network_of_another_backend_is_refused() {
    if !require_root("a_network_of_another_backend_is_refused") {
        return;
    }
    let network = Network::start("refuses", &ClusterPlan::network("udp", false));
    let error = KernelNode::join(&network.lab.nodes[0].namespace, network.plan(1, true, false)).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("backend is udp"), "{text}");
}

/// Two nodes and a server with the leases in the hub.
struct Network {
    /// Before the lab, so that it ends first.
    _server: Child,
    lab: Topology,
    _folder: TempDir,
}

impl Network {
    fn start(tag: &str, config: &str) -> Self {
        let lab = Plan::private(tag, 2).build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
        command.args(["server", "--listen", &format!("{HUB_V4}:8888")]);
        command.args(["--network-config", config]);
        command.arg("--data-dir").arg(folder.path().join("data"));
        // Nodes here also give up leases that name another address than the one they ask from.
        let access = folder.path().join("access.toml");
        std::fs::write(
            &access,
            "[[allow]]\nanonymous = true\nnetworks = [\"*\"]\nright = \"admin\"\n",
        )
        .unwrap();
        command.arg("--access-file").arg(access);
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

    fn plan(&self, nth: usize, v4: bool, v6: bool) -> KernelPlan {
        let node = &self.lab.nodes[nth - 1];
        KernelPlan {
            store: StoreKind::Remote(RemoteOptions::plain(vec![
                format!("{HUB_V4}:8888").parse().unwrap(),
            ])),
            interface: INTERFACE.to_owned(),
            underlay: Underlay {
                v4: v4.then_some(node.v4),
                v6: v6.then_some(node.v6),
            },
            subnet: None,
        }
    }

    fn join(&self, nth: usize, v4: bool, v6: bool) -> KernelNode {
        KernelNode::join(&self.lab.nodes[nth - 1].namespace, self.plan(nth, v4, v6)).unwrap()
    }

    fn pod(&self, nth: usize, node: &KernelNode, family: usize) -> End<'_> {
        End::new(&self.lab.nodes[nth - 1].namespace, node.pods()[family])
    }

    fn mtu(&self, nth: usize, device: &str) -> u32 {
        self.lab.nodes[nth - 1]
            .namespace
            .netlink(async |netlink| Ok(netlink.link(device).await?.mtu_bytes))
            .unwrap()
    }

    /// Neighbours and forwarding entries, as iproute2 shows them.
    fn neighbours(&self, nth: usize) -> String {
        let namespace = &self.lab.nodes[nth - 1].namespace;
        let show = |program: &str, args: &[&str]| {
            let mut command = Command::new(program);
            command.args(args).stdout(std::process::Stdio::piped());
            let output = namespace.spawn(&mut command).unwrap().wait_with_output().unwrap();
            assert!(output.status.success(), "{program} {args:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let links = show("ip", &["-o", "link", "show", "type", "vxlan"]);
        let device = links
            .split(": ")
            .nth(1)
            .unwrap_or("flannel.1")
            .split('@')
            .next()
            .unwrap();
        show("ip", &["neigh", "show", "dev", device])
            .lines()
            .map(|line| line.replacen(" lladdr", &format!(" dev {device} lladdr"), 1) + "\n")
            .chain(
                show("bridge", &["fdb", "show", "dev", device])
                    .lines()
                    .map(|line| line.replacen(" dst", &format!(" dev {device} dst"), 1) + "\n"),
            )
            .collect()
    }
}
