//! Daemons on the nodes of a lab, one by one: started, killed, started again, and looked at from outside.
//!
//! [`kersey::lab::cluster`] starts a cluster as a user would and keeps it; here every node can be given flags of its
//! own and be treated badly.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Result;
use etcd_client::Client;
use kersey::addr::Ipv4Prefix;
use kersey::host::netlink::{LinkAddr, Route};
use kersey::lab::cluster::{ClusterPlan, StoreKind, give_pod_addresses};
use kersey::lab::daemon::{self, Child};
use kersey::lab::netns::Namespace;
use kersey::lab::topology::{HUB_V4, HUB_V6, INTERFACE, Plan, Topology};
use kersey::lab::traffic::End;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::tcp::Verified;
use kersey::status::Status;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::support::login;
use crate::support::nobody::{assert_net_admin_alone, by_nobody, give, unprivileged};

/// How long a daemon has to get ready and know its peers: milliseconds, but the machine may be busy.
pub(crate) const READY: Duration = Duration::from_secs(20);
/// Where flannel keeps its network in etcd.
pub(crate) const PREFIX: &str = "/coreos.com/network";
/// The device's name unless a flag says otherwise.
pub(crate) const DEVICE: &str = "flannel0";

/// What to build and start.
#[derive(Clone, Debug)]
pub(crate) struct Blueprint {
    pub(crate) lab: Plan,
    /// Daemons run on the first so many nodes.
    pub(crate) daemons: usize,
    pub(crate) store: StoreKind,
    /// The network config, as flannel's JSON.
    pub(crate) network: String,
    /// Flags for every daemon.
    pub(crate) flags: Vec<String>,
    /// Further flags for one node, by its number.
    pub(crate) own_flags: BTreeMap<usize, Vec<String>>,
    /// What a node runs, by its number, where it is not the program under test.
    pub(crate) programs: BTreeMap<usize, PathBuf>,
    pub(crate) underlay: Underlay,
}

/// The families nodes have addresses of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Underlay {
    Both,
    #[allow(
        dead_code,
        reason = "the interoperation tests build such labs, and share this file"
    )]
    V4Only,
    V6Only,
}

/// What a machine that is put in the place of another has of its files.
#[allow(dead_code, reason = "the fault tests take machines away, and share this file")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    Kept,
    Lost,
}

impl Blueprint {
    /// An IPv4 network with its leases in etcd and a daemon on every node.
    pub(crate) fn new(tag: &str, nodes: usize) -> Self {
        Self {
            lab: Plan::private(tag, nodes),
            daemons: nodes,
            store: StoreKind::Etcd,
            network: ClusterPlan::network("udp", false),
            flags: Vec::new(),
            own_flags: BTreeMap::new(),
            programs: BTreeMap::new(),
            underlay: Underlay::Both,
        }
    }

    /// The same with the leases on node 1.
    pub(crate) fn embedded(tag: &str, nodes: usize) -> Self {
        Self {
            store: StoreKind::Embedded,
            ..Self::new(tag, nodes)
        }
    }

    /// Builds the lab, starts the store, and nothing else.
    pub(crate) fn build(self) -> Overlay {
        let lab = self.lab.build().unwrap();
        for node in &lab.nodes {
            let missing: Option<(IpAddr, u8)> = match self.underlay {
                Underlay::Both => None,
                Underlay::V4Only => Some((node.v6.into(), 64)),
                Underlay::V6Only => Some((node.v4.into(), 24)),
            };
            if let Some((addr, len)) = missing {
                node.namespace
                    .netlink(async |netlink| {
                        let index = netlink.link(INTERFACE).await?.index;
                        Ok(netlink.delete_address(index, addr, len).await?)
                    })
                    .unwrap();
            }
        }
        let mut overlay = Overlay {
            nodes: Vec::new(),
            store: None,
            lab,
            folder: tempfile::tempdir().unwrap(),
            blueprint: self,
            starts: 0,
            other_etcd: None,
        };
        if unprivileged() {
            give(overlay.folder.path());
        }
        if overlay.blueprint.store == StoreKind::Etcd {
            overlay.start_etcd();
            let network = overlay.blueprint.network.clone();
            overlay.put("config", network);
        }
        overlay
    }

    /// Builds the lab, starts everything, and waits until every node knows every other.
    pub(crate) fn start(self) -> Overlay {
        let mut overlay = self.build();
        overlay.start_daemons();
        overlay
    }
}

/// A daemon and the addresses its node has in the overlay.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) child: Child,
    /// One a family.
    pub(crate) pods: Vec<IpAddr>,
}

/// A running network; everything ends with it.
#[derive(Debug)]
pub(crate) struct Overlay {
    /// Before the store, so that daemons end first.
    pub(crate) nodes: Vec<Daemon>,
    pub(crate) store: Option<Child>,
    pub(crate) lab: Topology,
    folder: TempDir,
    blueprint: Blueprint,
    starts: usize,
    /// Where etcd is asked and written to, if not in the hub.
    pub(crate) other_etcd: Option<String>,
}

impl Overlay {
    /// A path among the test's own files.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the leases are.
    #[allow(dead_code, reason = "the oracle asks, which not every test binary has")]
    pub(crate) fn store_kind(&self) -> StoreKind {
        self.blueprint.store
    }

    pub(crate) fn namespace(&self, nth: usize) -> &Namespace {
        &self.lab.nodes[nth - 1].namespace
    }

    pub(crate) fn hub(&self) -> &Namespace {
        self.lab.hub.as_ref().expect("the lab has a hub")
    }

    pub(crate) fn daemon(&mut self, nth: usize) -> &mut Child {
        &mut self.nodes[nth - 1].child
    }

    /// The node's first pod address as an end of traffic.
    pub(crate) fn pod(&self, nth: usize) -> End<'_> {
        self.pods(nth)[0]
    }

    /// Its pod addresses, one a family.
    pub(crate) fn pods(&self, nth: usize) -> Vec<End<'_>> {
        let ends = self.nodes[nth - 1].pods.iter();
        ends.map(|&addr| End::new(self.namespace(nth), addr)).collect()
    }

    pub(crate) fn pod_v4(&self, nth: usize) -> Ipv4Addr {
        match self.pod(nth).addr {
            IpAddr::V4(addr) => addr,
            IpAddr::V6(_) => unreachable!("IPv4 comes first"),
        }
    }

    /// The node's IPv4 subnet.
    pub(crate) fn subnet(&self, nth: usize) -> Ipv4Prefix {
        self.status(nth).node.subnets[0].parse().unwrap()
    }

    /// Starts the daemons, and waits until every node knows every other.
    pub(crate) fn start_daemons(&mut self) {
        for nth in 1..=self.blueprint.daemons {
            let child = self.spawn(nth);
            self.nodes.push(Daemon {
                child,
                pods: Vec::new(),
            });
        }
        self.wait_all();
    }

    /// The command line of a node's daemon.
    pub(crate) fn command(&self, nth: usize) -> Command {
        let program = self.blueprint.programs.get(&nth);
        let mut command =
            Command::new(program.map_or(Path::new(env!("CARGO_BIN_EXE_kersey")), PathBuf::as_path));
        command.args(["run", "--iface", INTERFACE, "--device", DEVICE]);
        command.arg("--subnet-file").arg(self.file(&format!("{nth}.env")));
        command.arg("--data-dir").arg(self.file(&format!("{nth}.data")));
        command.arg("--status-socket").arg(self.socket(nth));
        match (self.blueprint.store, nth) {
            (StoreKind::Etcd, _) => {
                command.arg("--etcd-endpoints").arg(self.etcd_place());
                if login::wanted() {
                    command.args(login::FLAGS);
                }
            }
            (StoreKind::Embedded, 1) => {
                command.args(["--listen", "192.0.2.1:8888"]);
                command.arg("--network-config").arg(&self.blueprint.network);
            }
            (StoreKind::Embedded, _) => {
                command.args(["--remote", "http://192.0.2.1:8888"]);
            }
        }
        command.args(&self.blueprint.flags);
        command.args(self.blueprint.own_flags.get(&nth).into_iter().flatten());
        if unprivileged() {
            return by_nobody(&command, "+net_admin");
        }
        command
    }

    /// From its next start on, a node runs another program; `None` is the one under test.
    #[allow(dead_code, reason = "not every test binary has two releases")]
    pub(crate) fn set_program(&mut self, nth: usize, program: Option<PathBuf>) {
        match program {
            Some(program) => self.blueprint.programs.insert(nth, program),
            None => self.blueprint.programs.remove(&nth),
        };
    }

    pub(crate) fn socket(&self, nth: usize) -> PathBuf {
        self.file(&format!("{nth}.sock"))
    }

    /// Starts a command on a node, with a log file of its own.
    pub(crate) fn run(&mut self, name: &str, nth: usize, command: Command) -> Child {
        self.starts += 1;
        let log = self.file(&format!("{}.log", self.starts));
        Child::start(name, self.namespace(nth), command, &log).unwrap()
    }

    /// Starts a node's daemon, the next one, by a command of the test's own.
    #[allow(dead_code, reason = "the interoperation tests share this file")]
    pub(crate) fn adopt(&mut self, nth: usize, command: Command) {
        assert_eq!(nth, self.nodes.len() + 1, "nodes are started in order");
        let child = self.run(&format!("node {nth}"), nth, command);
        self.nodes.push(Daemon {
            child,
            pods: Vec::new(),
        });
    }

    fn spawn(&mut self, nth: usize) -> Child {
        let command = self.command(nth);
        self.run(&format!("node {nth}"), nth, command)
    }

    /// Waits until every node knows every other, and gives them pod addresses.
    pub(crate) fn wait_all(&mut self) {
        let peers = self.nodes.len() - 1;
        for nth in 1..=self.nodes.len() {
            let status = self.wait(nth, READY, |status| status.ready && status.peers.len() >= peers);
            if unprivileged() {
                assert_net_admin_alone(self.daemon(nth).pid());
            }
            self.nodes[nth - 1].pods =
                give_pod_addresses(&self.lab.nodes[nth - 1].namespace, &status.node.subnets).unwrap();
        }
    }

    /// Waits until a node's status is as it should be.
    pub(crate) fn wait(
        &mut self,
        nth: usize,
        limit: Duration,
        mut good: impl FnMut(&Status) -> bool,
    ) -> Status {
        let socket = self.socket(nth);
        let mut last = None;
        let waited = self.daemon(nth).wait(limit, || {
            last = daemon::status(&socket).ok().flatten();
            last.clone().filter(|status| good(status))
        });
        waited.unwrap_or_else(|error| panic!("{error:#}\n  last status: {last:#?}"))
    }

    /// The node's status as of now.
    pub(crate) fn status(&self, nth: usize) -> Status {
        daemon::status(&self.socket(nth))
            .unwrap()
            .unwrap_or_else(|| panic!("node {nth} does not answer"))
    }

    /// Starts a node's daemon again.
    pub(crate) fn restart(&mut self, nth: usize) {
        assert!(!self.daemon(nth).is_running(), "node {nth} still runs");
        self.nodes[nth - 1].child = self.spawn(nth);
    }

    /// Ends a node's daemon at once.
    pub(crate) fn kill(&mut self, nth: usize) {
        self.daemon(nth).signal(Signal::SIGKILL).unwrap();
        self.daemon(nth).wait_end(Duration::from_secs(5)).unwrap();
    }

    /// Kills a node's daemon and takes the node away, with its links.
    #[allow(dead_code, reason = "the fault tests take machines away, and share this file")]
    pub(crate) fn take_away(&mut self, nth: usize) {
        assert_eq!(self.blueprint.underlay, Underlay::Both);
        self.kill(nth);
        self.blueprint.lab.take_away(&mut self.lab, nth).unwrap();
    }

    /// Puts another machine in the place of one that was taken away, with addresses that end in `low`. No daemon runs there yet.
    #[allow(dead_code, reason = "the fault tests take machines away, and share this file")]
    pub(crate) fn put_back(&mut self, nth: usize, low: u8, disk: Disk) {
        self.blueprint.lab.put_back(&mut self.lab, nth, low).unwrap();
        fs::remove_file(self.socket(nth)).unwrap();
        if disk == Disk::Lost {
            fs::remove_dir_all(self.file(&format!("{nth}.data"))).unwrap();
            fs::remove_file(self.file(&format!("{nth}.env"))).unwrap();
        }
    }

    /// Gives a node's pod the addresses of the subnets it has by now.
    #[allow(dead_code, reason = "not every test binary has nodes whose subnet changes")]
    pub(crate) fn move_pod(&mut self, nth: usize) {
        let subnets = self.status(nth).node.subnets;
        self.nodes[nth - 1].pods = give_pod_addresses(self.namespace(nth), &subnets).unwrap();
    }

    /// Ends a node's daemon in order, and checks that it does so quickly.
    pub(crate) fn terminate(&mut self, nth: usize) {
        self.daemon(nth).signal(Signal::SIGTERM).unwrap();
        let ended = self.daemon(nth).wait_end(within(Duration::from_secs(2))).unwrap();
        assert_eq!(ended.code(), Some(0), "{}", self.daemon(nth).log_end());
    }

    /// Everything a node's daemon wrote since it was last started.
    pub(crate) fn log(&self, nth: usize) -> String {
        fs::read_to_string(self.nodes[nth - 1].child.log()).unwrap()
    }

    /// The network config, as flannel's JSON.
    #[allow(dead_code, reason = "the interoperation tests share this file")]
    pub(crate) fn network(&self) -> String {
        self.blueprint.network.clone()
    }

    /// Where etcd is.
    pub(crate) fn etcd_place(&self) -> String {
        if let Some(place) = &self.other_etcd {
            return place.clone();
        }
        match self.blueprint.underlay {
            Underlay::Both | Underlay::V4Only => format!("http://{HUB_V4}:2379"),
            Underlay::V6Only => format!("http://[{HUB_V6}]:2379"),
        }
    }

    /// Starts etcd in the hub, on the data of the one before.
    pub(crate) fn start_etcd(&mut self) {
        self.start_etcd_by(Command::new("etcd"));
    }

    /// Ends etcd and starts it again on a disk that takes so long for each write that is to last.
    #[allow(dead_code, reason = "the fault tests slow etcd down, and share this file")]
    pub(crate) fn slow_etcd_down(&mut self, write: Duration) {
        self.etcd_process().signal(Signal::SIGTERM).unwrap();
        self.etcd_process().wait_end(Duration::from_secs(10)).unwrap();
        let mut command = Command::new("strace");
        // The tracer stands beside, so that the process we start and end is etcd.
        command.args(["-D", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null"]);
        command.args(["-e", "trace=fdatasync,fsync", "-e"]);
        command.arg(format!(
            "inject=fdatasync,fsync:delay_enter={}ms",
            write.as_millis()
        ));
        command.arg("etcd");
        self.start_etcd_by(command);
    }

    fn start_etcd_by(&mut self, mut command: Command) {
        command.arg("--data-dir").arg(self.file("etcd"));
        command.args(["--listen-client-urls", "http://[::]:2379"]);
        command.args(["--advertise-client-urls", &self.etcd_place()]);
        command.args([
            "--listen-peer-urls",
            "http://127.0.0.1:2380",
            "--log-level",
            "error",
        ]);
        self.starts += 1;
        let log = self.file(&format!("etcd-{}.log", self.starts));
        let mut child = Child::start("etcd", self.hub(), command, &log).unwrap();
        child
            .wait(READY, || {
                let get = async |mut client: Client| client.get("x", None).await.map(drop);
                self.try_etcd(get).ok()
            })
            .unwrap();
        self.store = Some(child);
        if login::wanted() {
            self.etcd(login::ask_for);
        }
    }

    #[allow(dead_code, reason = "the fault tests stop etcd, and share this file")]
    pub(crate) fn etcd_process(&mut self) -> &mut Child {
        self.store.as_mut().expect("the store is etcd")
    }

    /// Does something in etcd, as an operator or a flannel would.
    pub(crate) fn etcd<T: Send>(
        &self,
        work: impl AsyncFnOnce(Client) -> Result<T, etcd_client::Error> + Send,
    ) -> T {
        self.try_etcd(work).unwrap()
    }

    fn try_etcd<T: Send>(
        &self,
        work: impl AsyncFnOnce(Client) -> Result<T, etcd_client::Error> + Send,
    ) -> Result<T> {
        let place = self.etcd_place();
        self.hub().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let done = async { work(login::connect(place).await?).await };
                Ok(tokio::time::timeout(Duration::from_secs(5), done).await??)
            })
        })
    }

    /// Writes a key below flannel's prefix.
    pub(crate) fn put(&self, key: &str, value: impl Into<Vec<u8>>) {
        let (key, value) = (format!("{PREFIX}/{key}"), value.into());
        self.etcd(async |mut client| client.put(key, value, None).await.map(drop));
    }

    /// Removes a key below flannel's prefix.
    pub(crate) fn delete(&self, key: &str) {
        let key = format!("{PREFIX}/{key}");
        let deleted = self.etcd(async |mut client| client.delete(key, None).await);
        assert_eq!(deleted.deleted(), 1);
    }

    /// The value of a key below flannel's prefix, and the etcd lease it lives by.
    pub(crate) fn get(&self, key: &str) -> Option<(String, i64)> {
        let key = format!("{PREFIX}/{key}");
        let answer = self.etcd(async |mut client| client.get(key, None).await);
        let pair = answer.kvs().first()?;
        Some((pair.value_str().unwrap().to_owned(), pair.lease()))
    }

    /// Pings from every node to every other, in every family.
    pub(crate) fn ping_all(&self) {
        let count = self.nodes.len();
        for (from, to) in (1..=count).flat_map(|from| (1..=count).map(move |to| (from, to))) {
            for (from, to) in self.pods(from).into_iter().zip(self.pods(to)) {
                let report = Ping::default().run(from, to.addr).unwrap();
                assert!(report.all(), "{} to {}: {report:?}", from.addr, to.addr);
            }
        }
    }

    /// Sends `bytes` over TCP both ways between two nodes, in every family, and compares what arrives.
    pub(crate) fn transfer(&self, one: usize, two: usize, bytes: u64) {
        let transfer = Verified {
            bytes,
            seed: bytes,
            patience: Duration::from_secs(10),
        };
        for (one, two) in self.pods(one).into_iter().zip(self.pods(two)) {
            for (from, to) in [(one, two), (two, one)] {
                let report = transfer.run(from, to).unwrap();
                assert!(report.intact, "{} to {}: {report:?}", from.addr, to.addr);
            }
        }
    }

    /// Checks that a node dropped nothing but what the kernel itself sends into every device.
    pub(crate) fn assert_no_drops(&self, nth: usize) {
        let mut status = self.status(nth);
        status.drops.remove("not_unicast");
        assert_eq!(status.drops, BTreeMap::new(), "node {nth}: {status:#?}");
    }

    /// The device, its addresses, and the routes through it that the daemon put in.
    pub(crate) fn device(
        &self,
        nth: usize,
    ) -> Option<(kersey::host::netlink::Link, Vec<LinkAddr>, Vec<Route>)> {
        self.namespace(nth)
            .netlink(async |netlink| {
                let Ok(link) = netlink.link(DEVICE).await else {
                    return Ok(None);
                };
                let mut addresses = netlink.addresses().await?;
                addresses.retain(|held| held.index == link.index);
                let mut routes = netlink.own_routes().await?;
                routes.retain(|route| route.index == link.index);
                Ok(Some((link, addresses, routes)))
            })
            .unwrap()
    }

    /// Packets the node's kernel has received from the device: what the daemon let through.
    pub(crate) fn let_through(&self, nth: usize) -> u64 {
        let text = self
            .namespace(nth)
            .run(|| Ok(fs::read_to_string("/proc/thread-self/net/dev")?))
            .unwrap();
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("flannel0:"))
            .expect("the device is there");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

/// A TCP connection between two nodes that stays open.
#[derive(Debug)]
pub(crate) struct Conversation {
    client: TcpStream,
    server: TcpStream,
}

impl Conversation {
    pub(crate) fn start(from: End<'_>, to: End<'_>) -> Self {
        let listener = to.namespace.run(|| Ok(TcpListener::bind((to.addr, 0))?)).unwrap();
        let place: SocketAddr = listener.local_addr().unwrap();
        let client = from
            .namespace
            .run(|| Ok(TcpStream::connect_timeout(&place, Duration::from_secs(5))?))
            .unwrap();
        let (server, _) = listener.accept().unwrap();
        for stream in [&client, &server] {
            stream.set_nodelay(true).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        Self { client, server }
    }

    /// Says something and hears it come back.
    pub(crate) fn exchange(&mut self) {
        use std::io::{Read, Write};
        let (words, mut heard) = ([7; 4000], [0; 4000]);
        self.client.write_all(&words).unwrap();
        self.server.read_exact(&mut heard).unwrap();
        self.server.write_all(&heard).unwrap();
        heard = [0; 4000];
        self.client.read_exact(&mut heard).unwrap();
        assert_eq!(words, heard);
    }
}

/// A limit in time; CI machines get double.
pub(crate) fn within(limit: Duration) -> Duration {
    let slow = std::env::var("CI").as_deref() == Ok("true");
    if slow { limit * 2 } else { limit }
}

/// Waits until `condition` holds, and says how long that took.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
pub(crate) fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    assert!(
        kersey::lab::interrupt::wait_until(limit, &mut condition),
        "{what}: not within {limit:?}"
    );
    start.elapsed()
}

/// Prints a figure for whoever reads the test's output.
pub(crate) fn figure(what: &str, value: impl Debug) {
    println!("figure: {what}: {value:?}");
}
