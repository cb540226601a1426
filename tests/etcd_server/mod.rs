//! A real etcd for one test: on free loopback ports, in a directory of its own, gone when dropped.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(unreachable_pub, reason = "shared by test binaries as a module")]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use etcd_client::Client;
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
}

/// Starts etcd. Without etcd on this machine the test is skipped, but not in CI, where it must be there.
pub async fn start() -> Option<Etcd> {
    let found = Command::new("etcd").arg("--version").output().is_ok();
    if !found {
        assert!(std::env::var_os("CI").is_none(), "etcd is not installed");
        eprintln!("skipped: etcd is not installed");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = [free_port(), free_port()].map(|listener| listener.local_addr().unwrap().port());
    let child = spawn(&dir, ports[0], ports[1]);
    let etcd = Etcd {
        dir,
        client_port: ports[0],
        peer_port: ports[1],
        child,
    };
    etcd.wait_ready().await;
    Some(etcd)
}

impl Etcd {
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client_port)
    }

    pub fn options(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: vec![self.url()],
            ..EtcdOptions::default()
        }
    }

    pub fn store(&self) -> EtcdStore {
        EtcdStore::connect(self.options()).unwrap()
    }

    pub async fn client(&self) -> Client {
        Client::connect([self.url()], None).await.unwrap()
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

    pub async fn restart(&mut self) {
        self.child = spawn(&self.dir, self.client_port, self.peer_port);
        self.wait_ready().await;
    }

    /// Stops or continues the process: stopped, it accepts connections and never answers.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    async fn wait_ready(&self) {
        let ready = async {
            loop {
                let asked = async { self.client().await.get("ready", None).await };
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

fn spawn(dir: &TempDir, client_port: u16, peer_port: u16) -> Child {
    let client = format!("http://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    Command::new("etcd")
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
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn free_port() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}
