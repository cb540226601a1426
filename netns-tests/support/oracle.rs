//! The judge that is asked after every fault: is everything as if nothing had happened?
//!
//! [`Oracle::start`] looks at a running overlay and remembers; [`Oracle::check`] looks again and complains of what differs. Looking
//! ([`Evidence`]) and judging ([`judge`]) are apart, so that the judge can be shown bad states no daemon gets into: the tests at the
//! bottom show every rule failing once.
//!
//! | rule | what holds |
//! | --- | --- |
//! | I1 | every node's peers are the store's leases but its own, at the same addresses |
//! | I2 | the routes with Kersey's protocol number are those expected, and no other route was touched |
//! | I3 | no subnet has two owners |
//! | I4 | no panic, no error in a log, and no cause told more than once in ten seconds |
//! | I5 | descriptors and threads as before, memory but the arenas of packets within 2 MiB |
//! | I6 | `subnet.env` is whole |
//! | I7 | the kernel has complained of nothing |

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use ipnet::IpNet;
use kersey::lab::cluster::StoreKind;
use nix::libc;

use crate::overlay::{DEVICE, Overlay, PREFIX};

/// How long a network may take to get quiet after a fault, before the oracle calls it disturbed.
const SETTLE: Duration = Duration::from_secs(5);
/// How much more anonymous memory a daemon may have than before, see [`Memory`].
const MEMORY_KIB: u64 = 2 * 1024;
/// Lines with one of these are no complaint, whatever their level.
const ALLOWED: [&str; 0] = [];
/// The least time between two lines of one cause.
const QUIET_S: f64 = 10.0;

/// Everything that was looked at.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Evidence {
    /// The leases of the store: subnet, public address.
    pub(crate) leases: BTreeMap<String, String>,
    pub(crate) nodes: Vec<NodeEvidence>,
    /// What the kernel has complained of since the oracle began.
    pub(crate) kernel: Vec<String>,
}

/// What was seen of one node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct NodeEvidence {
    pub(crate) subnet: String,
    pub(crate) public_ip: String,
    /// The overlay's networks.
    pub(crate) networks: Vec<String>,
    /// Subnet, address of its endpoint.
    pub(crate) peers: BTreeMap<String, String>,
    /// Routes with Kersey's protocol number: where to, through which link.
    pub(crate) own_routes: BTreeSet<(String, String)>,
    /// All others that do not lead into the device, as the kernel lists them.
    pub(crate) foreign_routes: BTreeSet<String>,
    /// Addresses were changed by hand: the routes that the kernel makes for them come and go, and are not compared.
    pub(crate) rewired: bool,
    /// The device of the network that is looked at.
    pub(crate) device: String,
    /// What the daemon wrote since it was last started.
    pub(crate) log: String,
    /// For how long it could write.
    pub(crate) uptime_s: f64,
    /// What each open descriptor is, without its number.
    pub(crate) descriptors: Vec<String>,
    pub(crate) threads: usize,
    pub(crate) memory_kib: u64,
    pub(crate) arenas_kib: u64,
    pub(crate) subnet_env: String,
    pub(crate) inner_mtu: u16,
}

/// Looks, remembers, and compares.
#[derive(Debug)]
pub(crate) struct Oracle {
    before: Evidence,
    /// Of several networks, the one looked at.
    network: Option<&'static str>,
    kernel_log: Option<fs::File>,
}

impl Oracle {
    /// Remembers a network that is well.
    pub(crate) fn start(overlay: &mut Overlay) -> Self {
        Self::of(overlay, None)
    }

    /// The same for one of the networks of daemons with several, whose files are in folders `N.nets`.
    #[allow(dead_code, reason = "not every test binary has several networks")]
    pub(crate) fn start_in(overlay: &mut Overlay, network: &'static str) -> Self {
        Self::of(overlay, Some(network))
    }

    fn of(overlay: &mut Overlay, network: Option<&'static str>) -> Self {
        let mut kernel_log = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .ok();
        if let Some(log) = &mut kernel_log {
            log.seek(SeekFrom::End(0)).unwrap();
        }
        let mut oracle = Self {
            before: Evidence::default(),
            network,
            kernel_log,
        };
        oracle.before = oracle.look(overlay);
        oracle
    }

    /// The test itself has changed a node's addresses or routes: what it left there is what has to stay.
    #[allow(dead_code, reason = "not every test binary changes the underlay")]
    pub(crate) fn rewired(&mut self, overlay: &Overlay, nth: usize) {
        let before = &mut self.before.nodes[nth - 1];
        let (own, foreign) = routes(overlay, nth, &before.device);
        // The lab's default routes have Kersey's number, too.
        let is_default = |route: &(String, String)| route.0.ends_with("/0");
        before.own_routes.retain(|route| !is_default(route));
        before.own_routes.extend(own.into_iter().filter(is_default));
        before.foreign_routes = foreign;
        before.rewired = true;
    }

    /// Judges the network after `faults` faults, as soon as it is quiet or [`SETTLE`] has passed.
    pub(crate) fn check(&mut self, overlay: &mut Overlay, faults: usize) {
        self.check_but(overlay, faults, &[]);
    }

    /// The same without the complaints that say one of these: a rule or a line of a log, of what cannot be otherwise after this fault.
    pub(crate) fn check_but(&mut self, overlay: &mut Overlay, faults: usize, but: &[&str]) {
        let mut complaints = Vec::new();
        kersey::lab::interrupt::wait_until(SETTLE, || {
            let kernel = std::mem::take(&mut complaints);
            let mut after = self.look(overlay);
            // Read once, told for good.
            after.kernel.extend(
                kernel
                    .iter()
                    .filter_map(|text: &String| text.strip_prefix("I7 ").map(str::to_owned)),
            );
            complaints = judge(&self.before, &after, faults, &ALLOWED);
            complaints.retain(|line| !but.iter().any(|text| line.contains(text)));
            complaints.is_empty()
        });
        assert!(
            complaints.is_empty(),
            "the oracle says:\n  {}",
            complaints.join("\n  ")
        );
    }

    fn look(&mut self, overlay: &mut Overlay) -> Evidence {
        let nodes = (1..=overlay.nodes.len())
            .map(|nth| look_at(overlay, nth, self.network))
            .collect();
        Evidence {
            leases: leases(overlay, self.network),
            nodes,
            kernel: self.kernel_log.as_mut().map(complaints_of).unwrap_or_default(),
        }
    }
}

/// What is wrong, in words that begin with the rule.
pub(crate) fn judge(before: &Evidence, after: &Evidence, faults: usize, allowed: &[&str]) -> Vec<String> {
    let mut wrong = Vec::new();
    owners(after, &mut wrong);
    for (nth, (was, is)) in (1..).zip(before.nodes.iter().zip(&after.nodes)) {
        let mut say = |rule: &str, what: String| wrong.push(format!("{rule} node {nth}: {what}"));
        let mut expected = after.leases.clone();
        if expected.remove(&is.subnet).as_ref() != Some(&is.public_ip) {
            say(
                "I1",
                format!("its lease {} is not in the store as its own", is.subnet),
            );
        }
        if is.peers != expected {
            say(
                "I1",
                format!("knows {:?}, and the store has {expected:?}", is.peers),
            );
        }
        for network in &is.networks {
            if !is.own_routes.contains(&(network.clone(), is.device.clone())) {
                say("I2", format!("no route to {network} through {}", is.device));
            }
        }
        if was.subnet == is.subnet && is.own_routes != was.own_routes {
            say(
                "I2",
                format!("its routes were {:?} and are {:?}", was.own_routes, is.own_routes),
            );
        }
        let compared = |route: &&String| !(was.rewired && format!("{route} ").contains(KERNEL_PROTOCOL));
        for gone in was.foreign_routes.difference(&is.foreign_routes).filter(compared) {
            say("I2", format!("a route of others is gone: {gone}"));
        }
        for new in is.foreign_routes.difference(&was.foreign_routes).filter(compared) {
            say("I2", format!("a route of nobody's has come: {new}"));
        }
        for line in judge_log(&is.log, is.uptime_s, faults, allowed) {
            say("I4", line);
        }
        if is.descriptors.len() > was.descriptors.len() {
            say(
                "I5",
                format!("has open {:?}, before {:?}", is.descriptors, was.descriptors),
            );
        }
        if is.threads > was.threads {
            say("I5", format!("{} threads, {} before", is.threads, was.threads));
        }
        if is.memory_kib > was.memory_kib + MEMORY_KIB {
            say(
                "I5",
                format!("{} KiB of memory, {} before", is.memory_kib, was.memory_kib),
            );
        }
        // Twice: the allocator may put new ones beside where old ones were.
        if is.arenas_kib > 2 * was.arenas_kib {
            say(
                "I5",
                format!("{} KiB of arenas, {} before", is.arenas_kib, was.arenas_kib),
            );
        }
        if let Some(fault) = judge_file(is) {
            say("I6", format!("{fault}: {:?}", is.subnet_env));
        }
    }
    if before.nodes.len() != after.nodes.len() {
        wrong.push(format!(
            "I1 there were {} nodes and are {}",
            before.nodes.len(),
            after.nodes.len()
        ));
    }
    wrong.extend(after.kernel.iter().map(|line| format!("I7 {line}")));
    wrong
}

fn owners(after: &Evidence, wrong: &mut Vec<String>) {
    let nets: Vec<(IpNet, &String)> = after
        .leases
        .keys()
        .filter_map(|key| Some((key.split('&').next()?.parse().ok()?, key)))
        .collect();
    for (at, (one, key)) in nets.iter().enumerate() {
        for (two, other) in &nets[at + 1..] {
            if one.contains(two) || two.contains(one) {
                wrong.push(format!("I3 {key} and {other} overlap"));
            }
        }
    }
    let mut holders: BTreeMap<&str, usize> = BTreeMap::new();
    for (nth, node) in (1..).zip(&after.nodes) {
        if let Some(other) = holders.insert(&node.subnet, nth) {
            wrong.push(format!("I3 nodes {other} and {nth} both hold {}", node.subnet));
        }
    }
}

fn judge_log(log: &str, uptime_s: f64, faults: usize, allowed: &[&str]) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut causes: BTreeMap<String, usize> = BTreeMap::new();
    for line in log
        .lines()
        .filter(|line| !allowed.iter().any(|text| line.contains(text)))
    {
        if line.contains("panicked at") {
            wrong.push(format!("panic: {line}"));
        } else if level_of(line) == Some("ERROR") {
            wrong.push(format!("error: {line}"));
        }
        if matches!(level_of(line), Some("WARN" | "ERROR")) {
            *causes.entry(cause_of(line)).or_default() += 1;
        }
    }
    let most = faults.max(1) + (uptime_s / QUIET_S) as usize;
    for (cause, lines) in causes {
        if lines > most {
            wrong.push(format!(
                "{lines} lines in {uptime_s:.0} s and {faults} faults: {cause}"
            ));
        }
    }
    wrong
}

/// The level of a line, the first word that is one.
fn level_of(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().take(3);
    words.find(|word| matches!(*word, "TRACE" | "DEBUG" | "INFO" | "WARN" | "ERROR"))
}

/// A line without what differs from one time to the next: its time, its digits.
fn cause_of(line: &str) -> String {
    let rest = line.split_once(' ').map_or(line, |(_, rest)| rest);
    rest.chars().filter(|letter| !letter.is_ascii_digit()).collect()
}

fn judge_file(node: &NodeEvidence) -> Option<String> {
    let text = &node.subnet_env;
    if !text.ends_with('\n') {
        return Some("subnet.env does not end in a line".to_owned());
    }
    let value = |name: &str| -> Vec<&str> {
        let lines = text.lines();
        lines
            .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='))
            .collect()
    };
    let mtu = node.inner_mtu.to_string();
    if value("FLANNEL_MTU") != [mtu.as_str()] {
        return Some(format!("FLANNEL_MTU is not {mtu}"));
    }
    let subnet: Option<IpNet> = node.subnet.split('&').next().and_then(|text| text.parse().ok());
    let ours = match value("FLANNEL_SUBNET")[..] {
        [one] => one.parse::<IpNet>().ok().map(|net| net.trunc()) == subnet,
        _ => false,
    };
    if !ours {
        return Some(format!("FLANNEL_SUBNET is not in {}", node.subnet));
    }
    for name in ["FLANNEL_NETWORK", "FLANNEL_IPMASQ"] {
        if value(name).len() != 1 {
            return Some(format!("{name} is not there once"));
        }
    }
    None
}

fn look_at(overlay: &mut Overlay, nth: usize, network: Option<&str>) -> NodeEvidence {
    let whole = overlay.status(nth);
    let uptime_s = whole.uptime_s;
    let (status, file) = match network {
        None => (whole, format!("{nth}.env")),
        Some(name) => {
            let network = whole.networks.and_then(|mut networks| networks.remove(name));
            let network = network.unwrap_or_else(|| panic!("node {nth} is not in {name}"));
            (network, format!("{nth}.nets/{name}.env"))
        }
    };
    let pid = overlay.daemon(nth).pid();
    let memory = Memory::of(pid);
    let addr = |endpoint: &String| match endpoint.parse::<std::net::SocketAddr>() {
        Ok(place) => place.ip().to_string(),
        Err(_) => endpoint.clone(),
    };
    let peers = status.peers.iter().map(|peer| {
        let endpoint = peer.endpoints.first().map(addr).unwrap_or_default();
        (peer.subnets.join("&"), endpoint)
    });
    let device = status.device.name;
    let (own_routes, foreign_routes) = routes(overlay, nth, &device);
    NodeEvidence {
        subnet: status.node.subnets.join("&"),
        public_ip: status.node.public_ips.first().cloned().unwrap_or_default(),
        networks: status.node.networks,
        peers: peers.collect(),
        own_routes,
        foreign_routes,
        rewired: false,
        device,
        log: overlay.log(nth),
        uptime_s,
        descriptors: descriptors(pid),
        threads: threads(pid),
        memory_kib: memory.anonymous_kib,
        arenas_kib: memory.arenas_kib,
        subnet_env: fs::read_to_string(overlay.file(&file)).unwrap_or_default(),
        inner_mtu: status.node.inner_mtu,
    }
}

/// What its descriptors lead to.
fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|to| {
            to.to_string_lossy()
                .split(":[")
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    names.sort_unstable();
    names
}

/// What a process has in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    /// Anonymous memory but the arenas of packets and datagrams: how much of those was touched, in pages of 2 MiB, is a matter of which
    /// bursts came.
    anonymous_kib: u64,
    /// The arenas' size, touched or not: they alone are advised to be huge (`hg`, proc(5)).
    arenas_kib: u64,
}

impl Memory {
    fn of(pid: u32) -> Self {
        let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
        Self::read(&maps)
    }

    /// From the text of `smaps`: for each mapping its sizes, and its flags at the end.
    fn read(maps: &str) -> Self {
        let number = |text: &str| -> u64 {
            let kib = text.trim().strip_suffix(" kB");
            kib.and_then(|kib| kib.parse().ok()).unwrap_or(0)
        };
        let mut memory = Self {
            anonymous_kib: 0,
            arenas_kib: 0,
        };
        let (mut size, mut anonymous) = (0, 0);
        for line in maps.lines() {
            if let Some(rest) = line.strip_prefix("Size:") {
                size = number(rest);
            } else if let Some(rest) = line.strip_prefix("Anonymous:") {
                anonymous = number(rest);
            } else if let Some(flags) = line.strip_prefix("VmFlags:") {
                if flags.split_whitespace().any(|flag| flag == "hg") {
                    memory.arenas_kib += size;
                } else {
                    memory.anonymous_kib += anonymous;
                }
            }
        }
        memory
    }
}

/// Its threads, but those the runtime lends to file operations for some seconds.
fn threads(pid: u32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let names = tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok());
    names.filter(|name| !name.starts_with("tokio-r")).count()
}

/// Routes with Kersey's protocol number, and those of others that do not lead into the device.
fn routes(overlay: &Overlay, nth: usize, device: &str) -> (BTreeSet<(String, String)>, BTreeSet<String>) {
    let (links, own) = overlay
        .namespace(nth)
        .netlink(async |netlink| Ok((netlink.links().await?, netlink.own_routes().await?)))
        .unwrap();
    let name = |index: u32| {
        let link = links.iter().find(|link| link.index == index);
        link.map_or_else(|| format!("link {index}"), |link| link.name.clone())
    };
    let own: BTreeSet<_> = own
        .iter()
        .map(|route| (route.destination.to_string(), name(route.index)))
        .collect();
    let mut foreign = BTreeSet::new();
    for family in ["-4", "-6"] {
        let mut command = std::process::Command::new("ip");
        command.args(["-N", family, "route", "show", "table", "all"]);
        command.stdout(std::process::Stdio::piped());
        let output = overlay
            .namespace(nth)
            .spawn(&mut command)
            .unwrap()
            .wait_with_output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // Kersey's own have a number of their own in place of the kernel's or an administrator's.
        let theirs = text.lines().filter(|line| {
            let through = format!("dev {device} ");
            !format!("{line} ").contains(&through) && !line.contains(OWN_PROTOCOL)
        });
        foreign.extend(theirs.map(|line| line.trim().to_owned()));
    }
    (own, foreign)
}

/// Kersey's protocol number, as `ip -N` shows it.
const OWN_PROTOCOL: &str = "proto 75";
/// That of the routes which the kernel makes for addresses.
const KERNEL_PROTOCOL: &str = "proto 2 ";

/// The leases of the store, asked without any code of the product.
fn leases(overlay: &Overlay, network: Option<&str>) -> BTreeMap<String, String> {
    let public_ip = |value: &serde_json::Value| {
        let text = |name: &str| {
            value[name]
                .as_str()
                .filter(|text| *text != "0.0.0.0")
                .map(str::to_owned)
        };
        text("PublicIP")
            .or_else(|| text("PublicIPv6"))
            .unwrap_or_default()
    };
    match overlay.store_kind() {
        StoreKind::Etcd => {
            let begin = match network {
                None => format!("{PREFIX}/subnets/"),
                Some(name) => format!("{PREFIX}/{name}/subnets/"),
            };
            let key = begin.clone();
            let answer = overlay.etcd(async |mut client| {
                let all = etcd_client::GetOptions::new().with_prefix();
                client.get(key, Some(all)).await
            });
            let pairs = answer.kvs().iter().filter_map(|pair| {
                let subnet = pair.key_str().ok()?.strip_prefix(&begin)?.replace('-', "/");
                let value = serde_json::from_slice(pair.value()).ok()?;
                Some((subnet, public_ip(&value)))
            });
            pairs.collect()
        }
        StoreKind::Embedded => {
            let text = overlay.hub().run(|| {
                let mut stream = TcpStream::connect("192.0.2.1:8888")?;
                stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                stream.write_all(
                    b"GET /v1/_/leases HTTP/1.1\r\nHost: 192.0.2.1:8888\r\nConnection: close\r\n\r\n",
                )?;
                let mut text = String::new();
                stream.read_to_string(&mut text)?;
                Ok(text)
            });
            let text = text.unwrap();
            let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
            let from = body.find('{').unwrap_or(0);
            let to = body.rfind('}').map_or(0, |at| at + 1);
            let list: serde_json::Value = serde_json::from_str(&body[from..to]).unwrap();
            let rows = list["snapshot"].as_array().cloned().unwrap_or_default();
            rows.iter()
                .map(|row| {
                    let subnet = row["Subnet"].as_str().unwrap_or_default().to_owned();
                    (subnet, public_ip(&row["Attrs"]))
                })
                .collect()
        }
    }
}

/// What the kernel has newly written that begins a report of something broken.
fn complaints_of(log: &mut fs::File) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut record = [0; 8192];
    loop {
        match log.read(&mut record) {
            Ok(len) => {
                let text = String::from_utf8_lossy(&record[..len]).into_owned();
                complaints.extend(complaint(&text));
            }
            // Overwritten before it was read.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            Err(_) => return complaints,
        }
    }
}

/// The message of a kernel record, if it is a complaint: whoever else uses the machine writes there, too.
fn complaint(record: &str) -> Option<String> {
    const SIGNS: [&str; 9] = [
        "BUG:",
        "WARNING:",
        "Oops",
        "general protection",
        "kersey[",
        "refcount_t",
        "unregister_netdevice: waiting",
        "hung_task",
        "blocked for more than",
    ];
    let message = record.split_once(';')?.1.lines().next()?;
    SIGNS
        .iter()
        .any(|sign| message.contains(sign))
        .then(|| message.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Evidence {
        let leases = BTreeMap::from([
            ("10.244.1.0/24".to_owned(), "192.0.2.1".to_owned()),
            ("10.244.2.0/24".to_owned(), "192.0.2.2".to_owned()),
        ]);
        let node = |own: &str, ip: &str, other: &str, peer: &str| NodeEvidence {
            subnet: own.to_owned(),
            public_ip: ip.to_owned(),
            networks: vec!["10.244.0.0/16".to_owned()],
            peers: BTreeMap::from([(other.to_owned(), peer.to_owned())]),
            own_routes: BTreeSet::from([("10.244.0.0/16".to_owned(), DEVICE.to_owned())]),
            foreign_routes: BTreeSet::from(["192.0.2.0/24 dev eth0 proto 2".to_owned()]),
            log: "2026-01-01T00:00:00Z  INFO kersey: data plane up\n".to_owned(),
            rewired: false,
            device: DEVICE.to_owned(),
            uptime_s: 20.0,
            descriptors: vec!["socket".to_owned(); 20],
            threads: 3,
            memory_kib: 9000,
            arenas_kib: 12_288,
            subnet_env: format!(
                "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={}1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n",
                own.strip_suffix("0/24").unwrap()
            ),
            inner_mtu: 1472,
        };
        Evidence {
            leases,
            nodes: vec![
                node("10.244.1.0/24", "192.0.2.1", "10.244.2.0/24", "192.0.2.2"),
                node("10.244.2.0/24", "192.0.2.2", "10.244.1.0/24", "192.0.2.1"),
            ],
            kernel: Vec::new(),
        }
    }

    #[test]
    fn a_network_that_is_well_is_left_in_peace() {
        assert_eq!(judge(&good(), &good(), 0, &[]), [] as [&str; 0]);
        let mut shrunk = good();
        shrunk.nodes[0].descriptors.pop();
        shrunk.nodes[0].memory_kib += MEMORY_KIB;
        assert_eq!(judge(&good(), &shrunk, 0, &[]), [] as [&str; 0]);
    }

    #[test]
    fn every_rule_finds_its_fault() {
        type Spoil = fn(&mut Evidence);
        let cases: [(&str, &str, Spoil); 24] = [
            ("I1", "a peer is missing", |bad| bad.nodes[0].peers.clear()),
            ("I1", "a peer too many", |bad| {
                bad.nodes[0]
                    .peers
                    .insert("10.244.9.0/24".into(), "192.0.2.9".into());
            }),
            ("I1", "a peer elsewhere", |bad| {
                bad.nodes[0]
                    .peers
                    .insert("10.244.2.0/24".into(), "192.0.2.7".into());
            }),
            ("I1", "a lease that is gone", |bad| {
                bad.leases.remove("10.244.1.0/24");
            }),
            ("I1", "a lease in other hands", |bad| {
                bad.leases.insert("10.244.1.0/24".into(), "192.0.2.7".into());
            }),
            ("I1", "a node is missing", |bad| _ = bad.nodes.pop()),
            ("I2", "no route", |bad| bad.nodes[1].own_routes.clear()),
            ("I2", "a route left over", |bad| {
                bad.nodes[1]
                    .own_routes
                    .insert(("10.244.7.0/24".into(), "eth0".into()));
            }),
            ("I2", "another's route gone", |bad| {
                bad.nodes[1].foreign_routes.clear()
            }),
            ("I2", "a route of nobody's", |bad| {
                bad.nodes[1].foreign_routes.insert("10.0.0.0/8 dev eth0".into());
            }),
            ("I3", "a wide lease over others", |bad| {
                bad.leases.insert("10.244.0.0/16".into(), "192.0.2.9".into());
            }),
            ("I3", "two holders", |bad| {
                bad.nodes[1].subnet = "10.244.1.0/24".into()
            }),
            ("I4", "a panic", |bad| {
                bad.nodes[0].log += "thread 'x' panicked at src/x.rs:1:2\n"
            }),
            ("I4", "an error", |bad| {
                bad.nodes[0].log += "2026-01-01T00:00:00Z ERROR kersey: no\n"
            }),
            ("I4", "a flood", |bad| {
                for nth in 0..4 {
                    bad.nodes[0].log +=
                        &format!("2026-01-01T00:00:0{nth}Z  WARN kersey: again tries={nth}\n");
                }
            }),
            ("I5", "descriptors", |bad| {
                bad.nodes[0].descriptors.push("pipe".into())
            }),
            ("I5", "threads", |bad| bad.nodes[0].threads += 1),
            ("I5", "memory", |bad| bad.nodes[0].memory_kib += MEMORY_KIB + 1),
            ("I5", "arenas", |bad| bad.nodes[0].arenas_kib *= 3),
            ("I6", "cut", |bad| bad.nodes[0].subnet_env.truncate(70)),
            ("I6", "empty", |bad| bad.nodes[0].subnet_env.clear()),
            ("I6", "another subnet", |bad| {
                bad.nodes[0].subnet_env = bad.nodes[1].subnet_env.clone();
            }),
            ("I6", "another MTU", |bad| bad.nodes[0].inner_mtu = 1430),
            ("I7", "the kernel", |bad| {
                bad.kernel.push("BUG: unable to handle".into())
            }),
        ];
        for (rule, name, spoil) in cases {
            let mut bad = good();
            spoil(&mut bad);
            let wrong = judge(&good(), &bad, 0, &[]);
            assert!(
                wrong.iter().any(|line| line.starts_with(rule)),
                "{name}: {wrong:?}"
            );
        }
    }

    #[test]
    fn arenas_count_by_their_size_and_all_else_by_what_was_touched() {
        let maps = "55d0-55d1 r-xp 00000000 fe:00 1 /usr/bin/kersey\n\
                    Size:               4096 kB\nAnonymous:             0 kB\nVmFlags: rd ex mr mw me\n\
                    7f00-7f10 rw-p 00000000 00:00 0\n\
                    Size:                128 kB\nAnonymous:           100 kB\nVmFlags: rd wr mr mw me ac\n\
                    7f20-7f60 rw-p 00000000 00:00 0\n\
                    Size:               4096 kB\nAnonymous:          2048 kB\nVmFlags: rd wr mr mw me ac hg\n";
        let expected = Memory {
            anonymous_kib: 100,
            arenas_kib: 4096,
        };
        assert_eq!(Memory::read(maps), expected);
        let own = Memory::of(std::process::id());
        assert!(own.anonymous_kib > 0, "{own:?}");
    }

    #[test]
    fn where_addresses_were_changed_only_the_kernels_routes_may_differ() {
        let (mut before, mut after) = (good(), good());
        after.nodes[1].foreign_routes = BTreeSet::from(["203.0.113.0/24 dev eth0 proto 2".to_owned()]);
        assert_eq!(judge(&before, &after, 0, &[]).len(), 2);
        before.nodes[1].rewired = true;
        assert_eq!(judge(&before, &after, 0, &[]), [] as [&str; 0]);
        let default = "default via 192.0.2.254 dev eth0 proto 3".to_owned();
        after.nodes[1].foreign_routes.insert(default);
        assert_eq!(judge(&before, &after, 0, &[]).len(), 1);
    }

    #[test]
    fn one_line_a_fault_is_no_flood_and_what_is_allowed_is_no_error() {
        let mut many = good();
        for nth in 0..8 {
            many.nodes[0].log +=
                &format!("2026-01-01T00:00:0{nth}Z  WARN kersey: the device is gone n={nth}\n");
        }
        many.nodes[0].log += "2026-01-01T00:00:00Z ERROR kersey: expected\n";
        assert_eq!(judge(&good(), &many, 6, &["expected"]), [] as [&str; 0]);
        assert_eq!(judge(&good(), &many, 5, &["expected"]).len(), 1);
    }

    #[test]
    fn only_complaints_of_the_kernel_count() {
        assert_eq!(
            complaint("6,339,514,-;br0: port 1(p1) entered blocking state\n"),
            None
        );
        let bug = complaint("1,340,515,-;BUG: kernel NULL pointer dereference\n SUBSYSTEM=x\n");
        assert_eq!(bug.as_deref(), Some("BUG: kernel NULL pointer dereference"));
        let fault = complaint("6,341,516,-;kersey[77]: segfault at 0\n");
        assert!(fault.is_some());
    }
}
