//! A real etcd for one test: on free loopback ports, in a directory of its own, gone when dropped.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(unreachable_pub, reason = "shared by test binaries as a module")]

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, TlsOptions};
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
}

/// A server certificate for 127.0.0.1 and the CA that signed it; clients need none.
#[derive(Clone)]
pub struct Tls {
    pub ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

/// Starts etcd. Without etcd on this machine the test is skipped, but not in CI, where it must be there.
pub async fn start() -> Option<Etcd> {
    start_with(None).await
}

/// Starts etcd with a server certificate.
pub async fn start_with_tls(dir: &Path) -> Option<Etcd> {
    start_with(Some(make_certificates(dir))).await
}

async fn start_with(tls: Option<Tls>) -> Option<Etcd> {
    let found = Command::new("etcd").arg("--version").output().is_ok();
    if !found {
        assert!(std::env::var_os("CI").is_none(), "etcd is not installed");
        eprintln!("skipped: etcd is not installed");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let ports = [free_port(), free_port()].map(|listener| listener.local_addr().unwrap().port());
    let child = spawn(&dir, ports[0], ports[1], tls.as_ref());
    let etcd = Etcd {
        dir,
        client_port: ports[0],
        peer_port: ports[1],
        child,
        tls,
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
            ..EtcdOptions::default()
        }
    }

    pub fn store(&self) -> EtcdStore {
        EtcdStore::connect(self.options()).unwrap()
    }

    pub async fn client(&self) -> Client {
        let options = self.tls.as_ref().map(|tls| {
            let ca = Certificate::from_pem(std::fs::read(&tls.ca).unwrap());
            ConnectOptions::new().with_tls(TlsOptions::new().ca_certificate(ca))
        });
        Client::connect([self.url()], options).await.unwrap()
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
        self.child = spawn(&self.dir, self.client_port, self.peer_port, self.tls.as_ref());
        self.wait_ready().await;
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

fn make_certificates(dir: &Path) -> Tls {
    let script = "
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=ca \
            -keyout ca.key -out ca.pem
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=etcd \
            -keyout key.pem -out request.pem
        printf 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n' > extensions
        openssl x509 -req -in request.pem -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
            -extfile extensions -out certificate.pem";
    let made = Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Tls {
        ca: dir.join("ca.pem"),
        certificate: dir.join("certificate.pem"),
        key: dir.join("key.pem"),
    }
}

fn spawn(dir: &TempDir, client_port: u16, peer_port: u16, tls: Option<&Tls>) -> Child {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let client = format!("{scheme}://127.0.0.1:{client_port}");
    let peer = format!("http://127.0.0.1:{peer_port}");
    let mut command = Command::new("etcd");
    if let Some(tls) = tls {
        command
            .arg("--cert-file")
            .arg(&tls.certificate)
            .arg("--key-file")
            .arg(&tls.key);
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
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn free_port() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}
