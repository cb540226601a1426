//! A real etcd for one test: on free loopback ports, in a directory of its own, gone when dropped.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(unreachable_pub, reason = "shared by test binaries as a module")]

pub mod login;
pub mod nodes;
pub mod pki;
pub mod proxy;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use kersey::control::store::{EtcdOptions, EtcdStore};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub const PREFIX: &str = "/coreos.com/network";

pub struct Etcd {
    dir: TempDir,
    client_port: u16,
    peer_port: u16,
    child: Child,
    tls: Option<Tls>,
    flags: Vec<String>,
    /// Whether it asks everybody who he is.
    asks: bool,
}

/// A server certificate for 127.0.0.1 and the CA that signed it.
#[derive(Clone)]
pub struct Tls {
    pub ca: PathBuf,
    pub server: pki::Identity,
    /// What clients have to show, if anything.
    pub client: Option<pki::Identity>,
}

/// Starts etcd. Without etcd on this machine the test is skipped, but not in CI, where it must be there.
pub async fn start() -> Option<Etcd> {
    start_with(None, &[]).await
}

/// Starts etcd; its authentication is on if `KERSEY_TEST_ETCD_AUTH` is set. For tests that authentication is to change
/// nothing for.
pub async fn start_as_wanted() -> Option<Etcd> {
    if login::wanted() {
        start_asking().await
    } else {
        start().await
    }
}

/// Starts etcd with its authentication on. [`Etcd::options`] are those of a user with the rights of a node,
/// [`Etcd::client`] is root's.
pub async fn start_asking() -> Option<Etcd> {
    let mut etcd = start_with(None, &QUICK_LOGIN).await?;
    let mut stranger = etcd.client().await;
    login::ask_for(stranger.clone()).await.unwrap();
    assert!(stranger.get("ready", None).await.is_err(), "etcd does not ask");
    etcd.asks = true;
    Some(etcd)
}

/// Passwords that are quick to check: every put of a test logs in.
const QUICK_LOGIN: [&str; 2] = ["--bcrypt-cost", "4"];

/// Starts etcd with further flags.
pub async fn start_with_flags(flags: &[&str]) -> Option<Etcd> {
    start_with(None, flags).await
}

/// Starts etcd with a server certificate.
pub async fn start_with_tls(dir: &Path) -> Option<Etcd> {
    let authority = pki::Authority::new(dir, "ca");
    let tls = Tls {
        ca: authority.file.clone(),
        server: authority.server(dir, "server", &["127.0.0.1", "localhost"]),
        client: None,
    };
    start_with(Some(tls), &[]).await
}

/// Starts etcd with the certificates in `tls`; if there is one for clients, they need it.
pub async fn start_with(tls: Option<Tls>, flags: &[&str]) -> Option<Etcd> {
    let found = Command::new("etcd").arg("--version").output().is_ok();
    if !found {
        assert!(std::env::var_os("CI").is_none(), "etcd is not installed");
        eprintln!("skipped: etcd is not installed");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = [free_port(), free_port()].map(|listener| listener.local_addr().unwrap().port());
    let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
    let child = spawn(&dir, ports[0], ports[1], tls.as_ref(), &flags);
    let etcd = Etcd {
        dir,
        client_port: ports[0],
        peer_port: ports[1],
        child,
        tls,
        flags,
        asks: false,
    };
    etcd.wait_ready().await;
    Some(etcd)
}

impl Etcd {
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client_port)
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: vec![self.url()],
            cafile: self.tls.as_ref().map(|tls| tls.ca.clone()),
            certfile: self.client_identity().map(|client| client.certificate.clone()),
            keyfile: self.client_identity().map(|client| client.key.clone()),
            ..options_of_a_node(self.asks)
        }
    }

    pub fn store(&self) -> EtcdStore {
        EtcdStore::connect(self.options()).unwrap()
    }

    /// The port for clients.
    pub fn port(&self) -> u16 {
        self.client_port
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn client_identity(&self) -> Option<&pki::Identity> {
        self.tls.as_ref().and_then(|tls| tls.client.as_ref())
    }

    pub async fn client(&self) -> Client {
        self.connect().await.unwrap()
    }

    async fn connect(&self) -> Result<Client, etcd_client::Error> {
        if self.asks {
            return login::as_root(self.url()).await;
        }
        let options = self.tls.as_ref().map(|tls| {
            let ca = Certificate::from_pem(std::fs::read(&tls.ca).unwrap());
            let mut options = TlsOptions::new().ca_certificate(ca);
            if let Some(client) = &tls.client {
                let read = |path: &PathBuf| std::fs::read(path).unwrap();
                options = options.identity(Identity::from_pem(read(&client.certificate), read(&client.key)));
            }
            ConnectOptions::new().with_tls(options)
        });
        Client::connect([self.url()], options).await
    }

    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) {
        self.client()
            .await
            .put(format!("{PREFIX}/{key}"), value, None)
            .await
            .unwrap();
    }

    pub async fn delete(&self, key: &str) {
        self.client()
            .await
            .delete(format!("{PREFIX}/{key}"), None)
            .await
            .unwrap();
    }

    /// All keys and values, in order.
    pub async fn dump(&self) -> Vec<(String, String, i64)> {
        let all = etcd_client::GetOptions::new().with_prefix();
        let answer = self.client().await.get("/", Some(all)).await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        answer
            .kvs()
            .iter()
            .map(|kv| (text(kv.key()), text(kv.value()), kv.lease()))
            .collect()
    }

    /// Kills etcd as a crash would.
    pub fn crash(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Forgets everything; etcd must be down.
    pub fn wipe(&mut self) {
        self.dir = tempfile::tempdir().unwrap();
    }

    /// Ends etcd in order, so that all it knows is on disk.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGTERM);
        self.child.wait().unwrap();
    }

    /// Copies what it keeps on disk to `to`; etcd must be down.
    pub fn backup(&self, to: &Path) {
        copy(self.dir.path(), to);
    }

    /// Puts back what [`backup`](Self::backup) copied; etcd must be down.
    pub fn restore(&mut self, from: &Path) {
        self.wipe();
        copy(from, self.dir.path());
    }

    /// Gives it further flags from its next start on.
    pub fn add_flags(&mut self, flags: &[&str]) {
        self.flags.extend(flags.iter().map(|&flag| flag.to_owned()));
    }

    /// How many requests of a method, such as `Range`, etcd has taken so far.
    pub fn requests(&self, method: &str) -> u64 {
        let mut stream = TcpStream::connect(("127.0.0.1", self.client_port)).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let wanted = format!("grpc_method=\"{method}\"");
        text.lines()
            .filter(|line| line.starts_with("grpc_server_started_total") && line.contains(&wanted))
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum::<f64>() as u64
    }

    pub async fn restart(&mut self) {
        self.child = spawn(
            &self.dir,
            self.client_port,
            self.peer_port,
            self.tls.as_ref(),
            &self.flags,
        );
        self.wait_ready().await;
        if self.asks {
            // It may have forgotten that, too.
            login::ask_for(self.client().await).await.unwrap();
        }
    }

    /// Stops or continues the process: stopped, it accepts connections and never answers.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
        // The signal is sent before it is obeyed.
        let stat = format!("/proc/{}/stat", self.child.id());
        let stopped = || std::fs::read_to_string(&stat).unwrap().contains(") T ");
        while signal == Signal::SIGSTOP && !stopped() {
            std::thread::yield_now();
        }
    }

    async fn wait_ready(&self) {
        let ready = async {
            loop {
                let asked = async { self.connect().await?.get("ready", None).await };
                if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_millis(500), asked).await {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), ready)
            .await
            .expect("etcd does not start");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Options of a node, which has a user where etcd asks for one.
fn options_of_a_node(asks: bool) -> EtcdOptions {
    let user = if asks { login::USER } else { "" };
    EtcdOptions {
        username: user.to_owned(),
        password: user.to_owned(),
        ..EtcdOptions::default()
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .arg("-a")
        .arg(from.join("data"))
        .arg(to)
        .status()
        .unwrap();
    assert!(copied.success());
}

fn spawn(dir: &TempDir, client_port: u16, peer_port: u16, tls: Option<&Tls>, flags: &[String]) -> Child {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let client = format!("{scheme}://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut command = Command::new("etcd");
    if let Some(tls) = tls {
        command
            .arg("--cert-file")
            .arg(&tls.server.certificate)
            .arg("--key-file")
            .arg(&tls.server.key);
        if tls.client.is_some() {
            command
                .arg("--client-cert-auth")
                .arg("--trusted-ca-file")
                .arg(&tls.ca);
        }
    }
    command
        .args(["--name", "one", "--log-level", "error", "--logger", "zap"])
        .arg("--data-dir")
        .arg(dir.path().join("data"))
        .args([
            "--listen-client-urls",
            &client,
            "--advertise-client-urls",
            &client,
        ])
        .args([
            "--listen-peer-urls",
            &peer,
            "--initial-advertise-peer-urls",
            &peer,
        ])
        .args(["--initial-cluster", &format!("one={peer}")])
        .args(flags)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn free_port() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// Three etcds that are one.
pub struct Cluster {
    members: Vec<Child>,
    _dir: TempDir,
    pub ports: Vec<u16>,
    asks: bool,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

impl Cluster {
    /// Starts them; their authentication is on if `KERSEY_TEST_ETCD_AUTH` is set.
    pub async fn start_as_wanted() -> Option<Self> {
        if login::wanted() {
            Self::start_asking().await
        } else {
            Self::start().await
        }
    }

    /// Starts them with their authentication on.
    pub async fn start_asking() -> Option<Self> {
        let mut cluster = Self::start().await?;
        login::ask_for(cluster.client(0).await.unwrap()).await.unwrap();
        cluster.asks = true;
        // One that has not heard of it yet would let root in as nobody.
        let ready = async {
            for i in 0..3 {
                while cluster.lets_strangers_read(i).await {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), ready)
            .await
            .expect("a member does not ask");
        Some(cluster)
    }

    async fn lets_strangers_read(&self, member: usize) -> bool {
        let mut client = Client::connect([self.url(member)], None).await.unwrap();
        client.get("ready", None).await.is_ok()
    }

    async fn start() -> Option<Self> {
        if Command::new("etcd").arg("--version").output().is_err() {
            assert!(std::env::var_os("CI").is_none(), "etcd is not installed");
            eprintln!("skipped: etcd is not installed");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let listeners: Vec<_> = (0..6).map(|_| free_port()).collect();
        let ports: Vec<u16> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap().port())
            .collect();
        drop(listeners);
        let (ports, peer_ports) = ports.split_at(3);
        let all: Vec<_> = (0..3)
            .map(|i| format!("m{i}=http://127.0.0.1:{}", peer_ports[i]))
            .collect();
        let members = (0..3).map(|i| {
            let client = format!("http://127.0.0.1:{}", ports[i]);
            let peer = format!("http://127.0.0.1:{}", peer_ports[i]);
            Command::new("etcd")
                .args([
                    "--name",
                    &format!("m{i}"),
                    "--log-level",
                    "error",
                    "--logger",
                    "zap",
                ])
                .arg("--data-dir")
                .arg(dir.path().join(format!("m{i}")))
                .args([
                    "--listen-client-urls",
                    &client,
                    "--advertise-client-urls",
                    &client,
                ])
                .args([
                    "--listen-peer-urls",
                    &peer,
                    "--initial-advertise-peer-urls",
                    &peer,
                ])
                .args(["--initial-cluster", &all.join(",")])
                .args(QUICK_LOGIN)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        });
        let cluster = Self {
            members: members.collect(),
            ports: ports.to_vec(),
            _dir: dir,
            asks: false,
        };
        let ready = async {
            for i in 0..3 {
                loop {
                    let asked = async { cluster.client(i).await.ok()?.get("ready", None).await.ok() };
                    if let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(1), asked).await {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(30), ready)
            .await
            .expect("the cluster does not start");
        Some(cluster)
    }

    pub async fn client(&self, member: usize) -> Result<Client, etcd_client::Error> {
        if self.asks {
            return login::as_root(self.url(member)).await;
        }
        Client::connect([self.url(member)], None).await
    }

    fn url(&self, member: usize) -> String {
        format!("http://127.0.0.1:{}", self.ports[member])
    }

    /// Options of a node that knows all members.
    pub fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: (0..3).map(|member| self.url(member)).collect(),
            ..options_of_a_node(self.asks)
        }
    }

    pub fn signal(&self, member: usize, signal: Signal) {
        kill(
            Pid::from_raw(i32::try_from(self.members[member].id()).unwrap()),
            signal,
        )
        .unwrap();
    }
}
