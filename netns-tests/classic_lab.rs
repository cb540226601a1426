//! `docs/classic-lab.md`, followed to the letter: its blocks are run on two machines as VirtualBox makes them.
//!
//! ```text
//!   node-1 eth0 10.0.2.15 ── a NAT of its own        node-2 eth0 10.0.2.15 ── a NAT of its own
//!          eth1 192.168.56.11 ───────── one wire ─────────── 192.168.56.12 eth1
//! ```
//!
//! A machine is a namespace for the network, one for processes and one for mounts, with a shell in it that reads the page's
//! blocks as somebody would type them. Only `kersey` and its two other names are put into its path beforehand.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test measures, and unwrap in its helpers says where it failed"
)]

mod support;

use std::fs::{self, File};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kersey::addr::{Ipv4Prefix, Prefix};
use kersey::host::netlink::{Gateway, Route};
use kersey::lab::netns::Namespace;
use support::require_etcd;

/// Each step takes seconds; the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);
const PAGE: &str = include_str!("../docs/classic-lab.md");

#[test]
fn the_page_works_as_it_stands() {
    if !ready("the_page_works_as_it_stands") {
        return;
    }
    let mut lab = Lab::new("page");
    for block in blocks(PAGE) {
        lab.follow(&block);
    }
    let told = lab.nodes[0].said();
    assert_eq!(
        told.matches("3 packets transmitted, 3 received, 0% packet loss")
            .count(),
        2,
        "{told}"
    );
    // The leases name the wire, not the NAT.
    lab.nodes[0].run("etcdctl get --prefix /coreos.com/network/subnets/");
    let leases = lab.nodes[0].said();
    for public in ["192.168.56.11", "192.168.56.12"] {
        assert!(leases.contains(&format!("\"PublicIP\":\"{public}\"")), "{leases}");
    }
    for node in &mut lab.nodes {
        node.run(
            "grep -q '^DOCKER_OPTS=\" --bip=10\\.244\\.[0-9]*\\.1/24 --ip-masq=true --mtu=1450\"$' /run/docker_opts.env",
        );
    }
}

/// What tutorials of the time of flannel 0.6 have: a network of /8 around everything, its first subnets left out, and the
/// node's address for `-iface`.
#[test]
fn an_old_pages_config_and_flags_work() {
    if !ready("an_old_pages_config_and_flags_work") {
        return;
    }
    let old = r#"{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","Backend":{"Type":"vxlan","VNI":100,"Port":8472}}"#;
    let mut lab = Lab::new("old");
    for mut block in blocks(PAGE).into_iter().filter(|block| block.section <= 4) {
        if block.section == 4 && block.text.contains("ip link add") {
            continue;
        }
        if let Some(begin) = block.text.find("'{") {
            let end = begin + block.text[begin..].find("}'").unwrap() + 2;
            block.text.replace_range(begin..end, &format!("'{old}'"));
        }
        for (nth, address) in ["192.168.56.11", "192.168.56.12"].iter().enumerate() {
            if block.who.includes(nth) {
                let own = block.text.replace("-iface=eth1", &format!("-iface={address}"));
                lab.nodes[nth].run(&own);
            }
        }
    }
    for node in &mut lab.nodes {
        node.run(
            ". /run/docker_opts.env; case $DOCKER_OPT_BIP in --bip=10.[1-9][0-9].*.1/20) ;; *) exit 1;; esac",
        );
    }
    lab.nodes[0].run(
        ". /run/flannel/subnet.env
        other=$(etcdctl get --prefix --keys-only /coreos.com/network/subnets/ | grep -v -e \"/${FLANNEL_SUBNET%.1/20}\\.\" -e '^$')
        other=${other##*/}
        until ping -c 3 -W 2 ${other%-20}; do sleep 1; done",
    );
    let told = lab.nodes[0].said();
    assert!(told.contains("3 received, 0% packet loss"), "{told}");
}

/// The drop-in of step 4, with the unit of Debian's docker.io and that of docker-ce, and Docker started thrice as systemd would
/// start it: what `EnvironmentFile=` names is in the environment of `ExecStartPre=`, too.
#[test]
fn dockers_options_are_the_same_after_a_restart() {
    if !ready("dockers_options_are_the_same_after_a_restart") {
        return;
    }
    let block = fenced(PAGE, "```sh docker");
    let mut lab = Lab::new("docker");
    let node = &mut lab.nodes[0];
    let folder = node.folder.clone();
    node.run(
        "mkdir -p /run/flannel
        printf 'FLANNEL_SUBNET=10.244.75.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n' >/run/flannel/subnet.env",
    );
    let common = "-H fd:// --containerd=/run/containerd/containerd.sock";
    for (start, expected) in [
        (
            format!("/usr/sbin/dockerd {common} $DOCKER_OPTS"),
            format!("/usr/sbin/dockerd {common} $DOCKER_OPTS"),
        ),
        (
            format!("/usr/bin/dockerd {common}"),
            format!("/usr/bin/dockerd {common} $DOCKER_OPTS"),
        ),
    ] {
        let unit = folder.join("docker.service");
        fs::write(
            &unit,
            format!("[Service]\nExecStartPre=/bin/true\nExecStart={start}\n"),
        )
        .unwrap();
        node.run(&format!(
            "rm -f /run/docker_opts.env
            systemctl() {{ if [ \"$1\" = show ]; then echo '{}'; fi; }}",
            unit.display()
        ));
        node.run(
            &block
                .replace("/etc/systemd/system", &folder.display().to_string())
                .replace("/usr/local/bin", &folder.display().to_string()),
        );
        let drop_in = fs::read_to_string(folder.join("docker.service.d/overlay.conf")).unwrap();
        let values = |key: &str| -> Vec<String> {
            let lines = drop_in.lines().filter_map(|line| line.strip_prefix(key));
            lines.map(ToOwned::to_owned).collect()
        };
        assert_eq!(values("ExecStart="), ["", &expected], "{drop_in}");
        let [before] = &values("ExecStartPre=")[..] else {
            panic!("{drop_in}")
        };
        let [environment] = &values("EnvironmentFile=-")[..] else {
            panic!("{drop_in}")
        };
        for _ in 0..3 {
            node.run(&format!(
                "(set -a; if [ -e {environment} ]; then . {environment}; fi; {before})
                grep -qx 'DOCKER_OPTS=\" --bip=10.244.75.1/24 --ip-masq=true --mtu=1450\"' {environment}"
            ));
        }
    }
}

#[test]
fn the_page_has_a_block_for_every_step() {
    let found = blocks(PAGE);
    let sections: Vec<u8> = found.iter().map(|block| block.section).collect();
    assert_eq!(sections, [2, 2, 3, 4, 4, 5, 5]);
    assert!(found.iter().all(|block| !block.text.trim().is_empty()));
}

/// Whether this machine has all the page needs.
fn ready(test: &str) -> bool {
    if !require_etcd(test) {
        return false;
    }
    for tool in ["etcdctl", "ping", "ip", "unshare"] {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output()
            .unwrap();
        if !found.status.success() {
            assert!(
                std::env::var("CI").as_deref() != Ok("true"),
                "{test} needs {tool}, and CI must run it"
            );
            return false;
        }
    }
    true
}

/// Which machines a block is for.
#[derive(Clone, Copy, Debug)]
enum Who {
    One(usize),
    Both,
}

impl Who {
    fn includes(self, nth: usize) -> bool {
        match self {
            Self::One(only) => only == nth,
            Self::Both => true,
        }
    }
}

/// A block of the page, to be run.
#[derive(Debug)]
struct Block {
    section: u8,
    who: Who,
    text: String,
}

/// The fenced blocks whose language is followed by a machine's name.
fn blocks(page: &str) -> Vec<Block> {
    let mut found = Vec::new();
    let mut section = 0;
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(number) = line
            .strip_prefix("## ")
            .and_then(|rest| rest.split('.').next()?.parse().ok())
        {
            section = number;
        }
        let who = match line {
            "```sh node-1" => Who::One(0),
            "```sh node-2" => Who::One(1),
            "```sh both" => Who::Both,
            _ => continue,
        };
        let text: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        found.push(Block {
            section,
            who,
            text: text.join("\n"),
        });
    }
    found
}

/// The text of the one block that begins so.
fn fenced(page: &str, opening: &str) -> String {
    let opening = format!("\n{opening}\n");
    let mut parts = page.split(&opening);
    let (_, after) = (parts.next(), parts.next().unwrap());
    assert_eq!(parts.next(), None, "two blocks begin {opening}");
    after.split("\n```").next().unwrap().to_owned() + "\n"
}

/// Two machines.
struct Lab {
    nodes: [Machine; 2],
    _nat: Namespace,
}

impl Lab {
    fn new(tag: &str) -> Self {
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("classic-{tag}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        // The program itself, not a link to it: a machine sees nothing of this one's /tmp but this folder.
        let program = folder.join("kersey");
        fs::hard_link(env!("CARGO_BIN_EXE_kersey"), &program)
            .or_else(|_| fs::copy(env!("CARGO_BIN_EXE_kersey"), &program).map(drop))
            .unwrap();
        for name in ["flanneld", "mk-docker-opts.sh"] {
            symlink("kersey", folder.join(name)).unwrap();
        }
        let name = |which: &str| format!("kersey-{}-{tag}-{which}", std::process::id());
        let nat = Namespace::create(&name("nat")).unwrap();
        let namespaces = [1, 2].map(|nth| Namespace::create(&name(&nth.to_string())).unwrap());
        let far = namespaces[1].open().unwrap();
        namespaces[0]
            .netlink(async |netlink| Ok(netlink.add_veth("eth1", "eth1", Some(far.as_fd())).await?))
            .unwrap();
        let nodes = [(1, 11), (2, 12)]
            .into_iter()
            .zip(namespaces)
            .map(|((nth, host), namespace)| {
                let outside = nat.open().unwrap();
                namespace
                    .netlink(async |netlink| {
                        netlink
                            .add_veth("eth0", &format!("nat{nth}"), Some(outside.as_fd()))
                            .await?;
                        for (device, addr) in [
                            ("eth0", Ipv4Addr::new(10, 0, 2, 15)),
                            ("eth1", Ipv4Addr::new(192, 168, 56, host)),
                        ] {
                            let index = netlink.link(device).await?.index;
                            netlink.set_up(index).await?;
                            netlink.add_address(index, IpAddr::V4(addr), 24).await?;
                        }
                        let everywhere = Prefix::V4(Ipv4Prefix::new(Ipv4Addr::UNSPECIFIED, 0).unwrap());
                        let mut default = Route::direct(everywhere, netlink.link("eth0").await?.index);
                        default.gateway = Gateway::Via(IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2)));
                        Ok(netlink.replace_route(&default).await?)
                    })
                    .unwrap();
                nat.netlink(async |netlink| {
                    let index = netlink.link(&format!("nat{nth}")).await?.index;
                    Ok(netlink.set_up(index).await?)
                })
                .unwrap();
                Machine::start(namespace, &folder, nth)
            });
        let nodes: Vec<Machine> = nodes.collect();
        Self {
            nodes: nodes.try_into().unwrap_or_else(|_| unreachable!("two were made")),
            _nat: nat,
        }
    }

    fn follow(&mut self, block: &Block) {
        for (nth, node) in self.nodes.iter_mut().enumerate() {
            if block.who.includes(nth) {
                node.run(&block.text);
            }
        }
    }
}

/// A machine and the shell somebody has there.
struct Machine {
    shell: Child,
    folder: PathBuf,
    nth: u8,
    steps: usize,
    /// After the shell: what runs in it ends first.
    _namespace: Namespace,
}

impl Machine {
    fn start(namespace: Namespace, folder: &Path, nth: u8) -> Self {
        let output = File::create(folder.join(format!("{nth}.log"))).unwrap();
        let path = format!(
            "{}:{}",
            folder.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let mut command = Command::new("unshare");
        // All its processes end with the shell.
        command
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-e",
            ])
            .env_clear()
            .env("PATH", path)
            .stdin(Stdio::piped())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        let mut machine = Self {
            shell: namespace.spawn(&mut command).unwrap(),
            folder: folder.to_owned(),
            nth,
            steps: 0,
            _namespace: namespace,
        };
        // Without br_netfilter, on machines that have it too: flannel would not start. The folder is put back where it was:
        // whoever clones below /tmp has it under one of the three.
        machine.run(&format!(
            "exec 7<'{folder}'
            for own in /run /var/lib /tmp; do mount -t tmpfs own $own; done
            mkdir -p '{folder}'
            mount --bind /proc/self/fd/7 '{folder}'
            exec 7<&-
            bridge=/proc/sys/net/bridge
            if [ -d $bridge ]; then mount -t tmpfs own $bridge; fi
            [ ! -e $bridge/bridge-nf-call-iptables ]",
            folder = folder.display()
        ));
        machine
    }

    /// Has the shell run a block, and waits until it has.
    fn run(&mut self, block: &str) {
        self.steps += 1;
        let script = self.folder.join(format!("{}-{}.sh", self.nth, self.steps));
        let done = self.folder.join(format!("{}-{}.done", self.nth, self.steps));
        fs::write(&script, block).unwrap();
        let typed = format!(
            "set -x; . {} </dev/null; {{ set +x; }} 2>/dev/null; : >{}\n",
            script.display(),
            done.display()
        );
        self.shell
            .stdin
            .as_mut()
            .unwrap()
            .write_all(typed.as_bytes())
            .unwrap();
        let start = Instant::now();
        while !done.exists() {
            let ended = self.shell.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < LIMIT,
                "node-{} stopped at\n{block}\n{}",
                self.nth,
                self.said()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What came to the terminal.
    fn said(&self) -> String {
        fs::read_to_string(self.folder.join(format!("{}.log", self.nth))).unwrap()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
