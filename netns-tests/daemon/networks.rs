//! Several networks in one daemon: each lives, moves packets and dies by itself.
//!
//! ```text
//!   node 1                                                                  node 2
//!     +- blue   flannel0 10.244.x.0/32 ······ UDP port 8285 ······ flannel0 10.244.y.0/32
//!     +- green  flannel1 10.245.x.0/32 ······ UDP port 8286 ······ flannel1 10.245.y.0/32
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use kersey::addr::{Ipv4Prefix, Prefix};
use kersey::lab::daemon;
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::probe::Probe;
use kersey::status::Status;

use crate::overlay::{Blueprint, Daemon, Overlay, READY, figure, wait_for, within};
use crate::support::{require_etcd, require_root};

const BLUE: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;
const GREEN: &str = r#"{"Network":"10.245.0.0/16","Backend":{"Type":"udp","Port":8286}}"#;
const GREEN_VXLAN: &str = r#"{"Network":"10.245.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#;
const RED: &str = r#"{"Network":"10.246.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// §4 of the control plane, B37: what flannel 0.5 to 0.7 had, and later versions lack.
#[test]
fn two_networks_share_a_host_and_nothing_else() {
    if !require_etcd("two_networks_share_a_host_and_nothing_else") {
        return;
    }
    let mut several = Several::build("nets", 2, &["--watch-networks"]);
    several.overlay.put("blue/config", BLUE);
    several.overlay.put("green/config", GREEN);
    several.start(1);
    several.start(2);
    several.wait_up(&["blue", "green"]);
    assert_files_keys_and_devices(&several);
    let blue = [several.pod(1, "blue"), several.pod(2, "blue")];
    let green = [several.pod(1, "green"), several.pod(2, "green")];
    several.ping(1, blue[0], blue[1]);
    several.ping(1, green[0], green[1]);

    // From an address of one network into the other: no TUN of the other node hands that out.
    let before = several.received(2, &["flannel0", "flannel1"]);
    for (from, to) in [(blue[0], green[1]), (green[0], blue[1])] {
        let report = Ping::default()
            .run(End::new(several.overlay.namespace(1), from), to)
            .unwrap();
        assert_eq!(report.received, 0, "{from} reached {to}");
    }
    assert_eq!(several.received(2, &["flannel0", "flannel1"]), before);
    // The sender refuses it, as the receiver would.
    let dropped: u64 = [1, 2]
        .iter()
        .flat_map(|&nth| ["blue", "green"].map(|name| several.network(nth, name)))
        .flat_map(|status| status.drops.into_values())
        .sum();
    assert!(dropped > 0, "nobody counted what was refused");

    // After a crash every network has its device and subnet again.
    let before: Vec<_> = ["blue", "green"]
        .map(|name| summary(&several.network(2, name)))
        .into();
    several.overlay.kill(2);
    several.restart(2);
    several.wait_up(&["blue", "green"]);
    let after: Vec<_> = ["blue", "green"]
        .map(|name| summary(&several.network(2, name)))
        .into();
    assert_eq!(before, after);
    several.ping(1, blue[0], blue[1]);
    several.ping(1, green[0], green[1]);
    several.overlay.terminate(1);
    assert_eq!(several.links(1, "flannel"), [] as [&str; 0]);
}

fn assert_files_keys_and_devices(several: &Several) {
    for nth in 1..=2 {
        for (name, device, network) in [("blue", "flannel0", "10.244"), ("green", "flannel1", "10.245")] {
            let status = several.network(nth, name);
            assert_eq!(status.device.name, device);
            let subnet: Ipv4Prefix = status.node.subnets[0].parse().unwrap();
            let gateway = Ipv4Addr::from_bits(subnet.addr().to_bits() + 1);
            let text = fs::read_to_string(several.subnet_dir(nth).join(format!("{name}.env"))).unwrap();
            assert_eq!(
                text,
                format!(
                    "FLANNEL_NETWORK={network}.0.0/16\nFLANNEL_SUBNET={gateway}/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
                )
            );
            let key = format!("{name}/subnets/{}-24", subnet.addr());
            let (value, etcd_lease) = several.overlay.get(&key).unwrap();
            assert_eq!(
                value,
                format!(r#"{{"PublicIP":"192.0.2.{nth}","PublicIPv6":null}}"#)
            );
            assert_ne!(etcd_lease, 0);
        }
        assert!(
            !several.overlay.file(&format!("{nth}.env")).exists(),
            "--subnet-file is not used with several networks"
        );
    }
}

/// A peer in both networks sends a packet of one to the port of the other.
#[test]
fn a_packet_of_one_network_never_leaves_the_device_of_another() {
    if !require_etcd("a_packet_of_one_network_never_leaves_the_device_of_another") {
        return;
    }
    let mut several = Several::build("apart", 2, &["--watch-networks"]);
    several.overlay.put("blue/config", BLUE);
    several.overlay.put("green/config", GREEN);
    several.start(1);
    several.start(2);
    several.wait_up(&["blue", "green"]);
    let [blue, green] = ["blue", "green"].map(|name| [several.pod_v4(1, name), several.pod_v4(2, name)]);
    let before = several.received(2, &["flannel0", "flannel1"]);
    let refused = |several: &Several| several.network(2, "green").drops.values().sum::<u64>();
    let counted = refused(&several);
    let packets = [
        // All of blue; a source of blue; a destination of blue.
        datagram(blue[0], blue[1]),
        datagram(blue[0], green[1]),
        datagram(green[0], blue[1]),
    ];
    several
        .overlay
        .namespace(1)
        .run(|| {
            let socket = std::net::UdpSocket::bind("192.0.2.1:0")?;
            for packet in &packets {
                socket.send_to(packet, "192.0.2.2:8286")?;
            }
            Ok(())
        })
        .unwrap();
    wait_for("they are refused and counted", READY, || {
        refused(&several) >= counted + 3
    });
    assert_eq!(several.received(2, &["flannel0", "flannel1"]), before);
}

/// An IPv4 packet with an empty UDP datagram.
fn datagram(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum: u32 = packet
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    // Ten words: one carry is all there can be after the first fold.
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    // Ports, length, no checksum.
    packet.extend([0x12, 0x34, 0x12, 0x35, 0, 8, 0, 0]);
    packet
}

/// A network of each kind comes and goes; the one beside it does not lose a packet.
#[test]
fn networks_come_and_go_beside_one_that_carries_traffic() {
    if !require_etcd("networks_come_and_go_beside_one_that_carries_traffic") {
        return;
    }
    let mut several = Several::build("come", 2, &["--networks=blue,green,red", "--watch-networks"]);
    several.overlay.put("blue/config", BLUE);
    several.overlay.put("other/config", GREEN_VXLAN);
    several.start(1);
    several.start(2);
    several.wait_up(&["blue"]);
    let ends = [several.pod(1, "blue"), several.pod(2, "blue")];
    let probe = Probe::start(
        End::new(several.overlay.namespace(1), ends[0]),
        End::new(several.overlay.namespace(2), ends[1]),
    )
    .unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);

    for (name, config) in [("green", GREEN), ("green", GREEN_VXLAN), ("red", RED)] {
        several.overlay.put(&format!("{name}/config"), config);
        several.wait_up(&["blue", name]);
        let pods = [several.pod(1, name), several.pod(2, name)];
        several.ping(1, pods[0], pods[1]);
        let range: Prefix = several.network(1, name).node.networks[0]
            .parse()
            .map(Prefix::V4)
            .unwrap();
        assert!(!several.routes(1, range).is_empty());
        wait_for("each network has its rules", READY, || {
            several.tables(1) != 1 || !has_nft()
        });
        several.overlay.delete(&format!("{name}/config"));
        for nth in 1..=2 {
            several.wait(nth, |networks| networks.keys().eq(["blue"]));
            let file = several.subnet_dir(nth).join(format!("{name}.env"));
            wait_for("the network's things go", within(Duration::from_secs(2)), || {
                several.links(nth, "flannel") == ["flannel0"]
                    && several.routes(nth, range).is_empty()
                    && several.tables(nth) == 1
                    && !file.exists()
            });
            assert!(several.subnet_dir(nth).join("blue.env").exists());
        }
    }
    // What is not on the list is left alone.
    assert!(!several.status(1).networks.unwrap().contains_key("other"));
    let report = probe.stop().unwrap();
    figure(
        "networks come and go: probe sent, lost",
        (report.there.sent + report.back.sent, report.lost()),
    );
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");

    // One that goes while the daemon is away is cleaned up after when it comes back.
    several.overlay.put("red/config", RED);
    several.wait_up(&["blue", "red"]);
    let range = Prefix::V4("10.246.0.0/16".parse().unwrap());
    several.overlay.kill(2);
    assert!(!several.routes(2, range).is_empty(), "a crash leaves routes");
    several.overlay.delete("red/config");
    several.restart(2);
    several.wait(2, |networks| {
        networks.keys().eq(["blue"]) && networks.values().all(|network| network.ready)
    });
    wait_for("its routes go", within(Duration::from_secs(2)), || {
        several.routes(2, range).is_empty()
    });
}

/// B37; and of old flannel's bugs: a name that is listed and made later comes up by itself.
#[test]
fn a_network_that_cannot_be_joined_touches_no_other() {
    if !require_etcd("a_network_that_cannot_be_joined_touches_no_other") {
        return;
    }
    let mut several = Several::build(
        "broken",
        1,
        &["--networks=blue,broken,garbled,late,overlapping,same-port"],
    );
    for (name, config) in [("blue", BLUE), ("not-listed", RED)] {
        several.overlay.put(&format!("{name}/config"), config);
    }
    several.start(1);
    several.wait_ready(1, &["blue"]);
    let blue = several.network(1, "blue");
    for (name, config) in [
        ("broken", r#"{"Network":"10.9.0.0/16","Backend":{"Type":"ipip"}}"#),
        ("garbled", "{"),
        (
            "overlapping",
            r#"{"Network":"10.244.128.0/17","Backend":{"Type":"udp","Port":8299}}"#,
        ),
        (
            "same-port",
            r#"{"Network":"10.247.0.0/16","Backend":{"Type":"vxlan","VNI":9,"Port":8285}}"#,
        ),
    ] {
        several.overlay.put(&format!("{name}/config"), config);
    }
    let networks = several.wait(1, |networks| {
        let told = |name: &str| {
            networks
                .get(name)
                .is_some_and(|network| network.problem.is_some())
        };
        ["broken", "overlapping", "same-port"].into_iter().all(told) && networks.contains_key("garbled")
    });
    for (name, words) in [
        ("broken", &["\"ipip\""] as &[&str]),
        (
            "overlapping",
            &["\"overlapping\"", "\"blue\"", "10.244.128.0/17", "10.244.0.0/16"],
        ),
        ("same-port", &["\"same-port\"", "\"blue\"", "UDP port 8285"]),
    ] {
        let problem = networks[name].problem.as_deref().unwrap();
        assert!(
            words.iter().all(|word| problem.contains(word)),
            "{name}: {problem}"
        );
        assert!(!networks[name].ready);
    }
    assert!(!several.status(1).ready);
    assert!(!networks.contains_key("not-listed"));

    // Mended configs are taken up at once, and one that comes later as well.
    several.overlay.put(
        "broken/config",
        r#"{"Network":"10.9.0.0/16","Backend":{"Type":"udp","Port":8290}}"#,
    );
    several.overlay.put(
        "garbled/config",
        r#"{"Network":"10.10.0.0/16","Backend":{"Type":"alloc"}}"#,
    );
    several.overlay.put(
        "late/config",
        r#"{"Network":"10.11.0.0/16","Backend":{"Type":"udp","Port":8291}}"#,
    );
    let asked = wait_for("mended networks come up", READY, || {
        let networks = several.status(1).networks.unwrap();
        ["broken", "garbled", "late"]
            .iter()
            .all(|&name| networks.get(name).is_some_and(|network| network.ready))
    });
    figure("mended networks up after", asked);
    assert!(asked <= within(Duration::from_secs(3)), "{asked:?}");
    // The one there from the start has seen nothing of all this.
    let now = several.network(1, "blue");
    assert!(now.ready);
    assert_eq!(summary(&now), summary(&blue));
    // Once the first is gone, its range is free.
    several.overlay.delete("blue/config");
    several.wait_ready(1, &["overlapping", "same-port"]);
}

/// The leases of both networks in one file on node 1, which serves them; node 2 is a client.
#[test]
fn networks_behind_a_server_come_and_go_as_well() {
    if !require_root("networks_behind_a_server_come_and_go_as_well") {
        return;
    }
    let mut blueprint = Blueprint::embedded("served", 2);
    let configs = [format!("blue={BLUE}"), format!("green={GREEN}")];
    let flags = configs.iter().flat_map(|config| ["--network-config", config]);
    blueprint.own_flags.insert(1, flags.map(str::to_owned).collect());
    let mut several = Several {
        overlay: blueprint.build(),
        flags: vec!["--networks=blue,green,absent".to_owned()],
    };
    several.start(1);
    several.start(2);
    several.wait_up(&["blue", "green"]);
    for name in ["blue", "green"] {
        let pods = [several.pod(1, name), several.pod(2, name)];
        several.ping(1, pods[0], pods[1]);
    }
    assert!(!several.status(2).networks.unwrap().contains_key("absent"));
    // The server is away: the client starts with the networks it had.
    let before = ["blue", "green"].map(|name| summary(&several.network(2, name)));
    wait_for("the caches have the peer", READY, || {
        ["blue", "green"].iter().all(|name| {
            let cache = several
                .overlay
                .file(&format!("2.data/networks/{name}/control.json"));
            fs::read_to_string(cache).is_ok_and(|text| text.contains(r#""192.0.2.1""#))
        })
    });
    several.overlay.kill(1);
    several.overlay.kill(2);
    several.restart(2);
    several.wait_ready(2, &["blue", "green"]);
    assert_eq!(
        ["blue", "green"].map(|name| summary(&several.network(2, name))),
        before
    );
    several.restart(1);
    several.wait_up(&["blue", "green"]);
    let pods = [several.pod(1, "green"), several.pod(2, "green")];
    several.ping(2, pods[1], pods[0]);
}

/// Names that are not allowed are misuse, told before anything is touched.
#[test]
fn a_name_that_is_not_allowed_is_misuse() {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kersey"));
    let ended = command
        .args(["run", "--networks=blue,../../etc"])
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(2));
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("\"../../etc\" is no name of a network"), "{said}");
}

/// What must not change while other networks come and go.
fn summary(status: &Status) -> (Vec<String>, String, Option<u16>) {
    (
        status.node.subnets.clone(),
        status.device.name.clone(),
        status.backend.port,
    )
}

fn has_nft() -> bool {
    std::process::Command::new("nft")
        .arg("--version")
        .output()
        .is_ok()
}

/// Daemons with several networks each.
pub(crate) struct Several {
    pub(crate) overlay: Overlay,
    pub(crate) flags: Vec<String>,
}

impl Several {
    pub(crate) fn build(tag: &str, nodes: usize, flags: &[&str]) -> Self {
        let overlay = Blueprint::new(tag, nodes).build();
        // The network without a name is none of these daemons' business.
        overlay.delete("config");
        Self {
            overlay,
            flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
        }
    }

    fn subnet_dir(&self, nth: usize) -> std::path::PathBuf {
        self.overlay.file(&format!("{nth}.nets"))
    }

    pub(crate) fn spawn(&mut self, nth: usize) -> daemon::Child {
        let mut command = self.overlay.command(nth);
        command
            .arg("--subnet-dir")
            .arg(self.subnet_dir(nth))
            .args(&self.flags);
        self.overlay.run(&format!("node {nth}"), nth, command)
    }

    pub(crate) fn start(&mut self, nth: usize) {
        let child = self.spawn(nth);
        self.overlay.nodes.push(Daemon {
            child,
            pods: Vec::new(),
        });
    }

    pub(crate) fn restart(&mut self, nth: usize) {
        self.overlay.nodes[nth - 1].child = self.spawn(nth);
    }

    fn status(&self, nth: usize) -> Status {
        self.overlay.status(nth)
    }

    pub(crate) fn network(&self, nth: usize, name: &str) -> Status {
        self.status(nth).networks.unwrap().remove(name).unwrap()
    }

    /// Waits until a node's networks are as they should be.
    pub(crate) fn wait(
        &mut self,
        nth: usize,
        mut good: impl FnMut(&BTreeMap<String, Status>) -> bool,
    ) -> BTreeMap<String, Status> {
        let status = self.overlay.wait(nth, READY, |status| {
            status.networks.as_ref().is_some_and(&mut good)
        });
        status.networks.unwrap()
    }

    pub(crate) fn wait_ready(&mut self, nth: usize, names: &[&str]) {
        self.wait(nth, |networks| {
            names
                .iter()
                .all(|&name| networks.get(name).is_some_and(|network| network.ready))
        });
    }

    /// Waits until these are up on two nodes that know each other.
    pub(crate) fn wait_up(&mut self, names: &[&str]) {
        for nth in 1..=2 {
            self.wait(nth, |networks| {
                names.iter().all(|&name| {
                    networks
                        .get(name)
                        .is_some_and(|network| network.ready && network.peers.len() == 1)
                })
            });
        }
    }

    fn pod_v4(&self, nth: usize, name: &str) -> Ipv4Addr {
        let subnet: Ipv4Prefix = self.network(nth, name).node.subnets[0].parse().unwrap();
        Ipv4Addr::from_bits(subnet.addr().to_bits() + 2)
    }

    /// A pod address in a network, made if it is not there.
    pub(crate) fn pod(&self, nth: usize, name: &str) -> IpAddr {
        let pod = IpAddr::V4(self.pod_v4(nth, name));
        self.overlay
            .namespace(nth)
            .netlink(async |netlink| {
                let loopback = netlink.link("lo").await?.index;
                netlink.set_up(loopback).await?;
                Ok(netlink.add_address(loopback, pod, 32).await?)
            })
            .unwrap();
        pod
    }

    pub(crate) fn ping(&self, nth: usize, from: IpAddr, to: IpAddr) {
        let report = Ping::default()
            .run(End::new(self.overlay.namespace(nth), from), to)
            .unwrap();
        assert!(report.all(), "{from} to {to}: {report:?}");
    }

    /// The links of a node that are called so.
    fn links(&self, nth: usize, stem: &str) -> Vec<String> {
        let links = self
            .overlay
            .namespace(nth)
            .netlink(async |netlink| Ok(netlink.links().await?));
        let mut names: Vec<String> = links.unwrap().into_iter().map(|link| link.name).collect();
        names.retain(|name| name.starts_with(stem));
        names.sort();
        names
    }

    /// Kersey's routes in a range.
    fn routes(&self, nth: usize, range: Prefix) -> Vec<Prefix> {
        let routes = self
            .overlay
            .namespace(nth)
            .netlink(async |netlink| Ok(netlink.own_routes().await?));
        let destinations = routes.unwrap().into_iter().map(|route| route.destination);
        destinations
            .filter(|&destination| range.covers(destination))
            .collect()
    }

    /// How many networks have nft tables; without nft, 1.
    fn tables(&self, nth: usize) -> usize {
        let listed = self.overlay.namespace(nth).run(|| {
            let listed = std::process::Command::new("nft")
                .args(["list", "tables"])
                .output();
            Ok(listed.ok())
        });
        let Some(listed) = listed.unwrap() else { return 1 };
        let text = String::from_utf8_lossy(&listed.stdout);
        text.lines()
            .filter(|line| line.starts_with("table ip flannel-ipv4"))
            .count()
    }

    /// Packets the kernel of a node has received from devices.
    fn received(&self, nth: usize, devices: &[&str]) -> Vec<u64> {
        let text = self
            .overlay
            .namespace(nth)
            .run(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))
            .unwrap();
        let packets = |device: &&str| {
            let line = text
                .lines()
                .find_map(|line| line.trim().strip_prefix(&format!("{device}:")))
                .unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        devices.iter().map(packets).collect()
    }
}
