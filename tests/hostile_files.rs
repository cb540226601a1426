//! B6: whatever a file is that should be ours - a directory, a FIFO, a link, open to everybody, a sparse gigabyte, replaced
//! while it is read - it is refused or ignored with one line, nothing waits for it, and nothing is written through a link.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test measures, and its helpers fail by panicking, too"
)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kersey::addr::Mtu;
use kersey::control::cache::{self, Cache};
use kersey::control::config::NetworkConfig;
use kersey::control::store::etcd::Expirations;
use kersey::control::{identity, store, subnet_file};
use kersey::options::{ClientCert, EmbeddedOptions, EtcdOptions, NetworkConfigSource, StoreKind};

/// Longest a look at a file may take, on a busy machine too.
const LIMIT: Duration = Duration::from_secs(10);

/// What may stand where a file of ours should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trap {
    Directory,
    Fifo,
    /// A link to a file of somebody else's.
    Link,
    /// A link to nowhere.
    DeadLink,
    WorldWritable,
    Sparse,
    NotText,
}

const TRAPS: [Trap; 7] = [
    Trap::Directory,
    Trap::Fifo,
    Trap::Link,
    Trap::DeadLink,
    Trap::WorldWritable,
    Trap::Sparse,
    Trap::NotText,
];

impl Trap {
    /// Sets the trap; `contents` is what a good file would have.
    fn set(self, path: &Path, contents: &str) {
        let victim = victim(path);
        match self {
            Self::Directory => fs::create_dir(path).unwrap(),
            Self::Fifo => nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap(),
            Self::Link => {
                fs::write(&victim, "kept").unwrap();
                symlink(&victim, path).unwrap();
            }
            Self::DeadLink => symlink(&victim, path).unwrap(),
            Self::WorldWritable => {
                fs::write(path, contents).unwrap();
                fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
            }
            Self::Sparse => fs::File::create(path).unwrap().set_len(1 << 30).unwrap(),
            Self::NotText => fs::write(path, b"\xff\xfe\0\x80").unwrap(),
        }
    }

    /// Checks that nothing went through a link.
    fn assert_victim_kept(self, path: &Path) {
        let victim = victim(path);
        match self {
            Self::Link => assert_eq!(fs::read_to_string(victim).unwrap(), "kept", "{}", path.display()),
            Self::DeadLink => assert!(!victim.exists(), "{}", path.display()),
            _ => {}
        }
    }
}

fn victim(path: &Path) -> PathBuf {
    path.with_file_name("victim")
}

/// Runs something that must not wait.
fn promptly<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result
        .recv_timeout(LIMIT)
        .unwrap_or_else(|_| panic!("{what} waits"))
}

const SUBNET_ENV: &str = "FLANNEL_SUBNET=10.1.74.1/24\n";
const CACHE: &str =
    r#"{"version":1,"store":"x","config":"{\"Network\":\"10.1.0.0/16\"}","own":null,"peers":[]}"#;
const MAC: &str = "02:00:00:00:00:09\n";
const NET_CONF: &str = r#"{"Network":"10.1.0.0/16"}"#;

#[test]
fn subnet_env_is_ignored_and_replaced() {
    for trap in TRAPS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        trap.set(&path, SUBNET_ENV);
        let read = path.clone();
        let previous = promptly(&format!("{trap:?}"), move || subnet_file::previous(&read));
        assert_eq!(previous, None, "{trap:?}");
        let config = NetworkConfig::parse(NET_CONF).unwrap();
        let subnet = "10.1.3.0-24".parse().unwrap();
        let (write, mtu) = (path.clone(), Mtu::new(1400).unwrap());
        let written = promptly(&format!("{trap:?}"), move || {
            subnet_file::write(&write, &config, subnet, mtu, subnet_file::IpMasq::Off)
        });
        // A directory stays what it is; all else is replaced by a file of ours.
        assert_eq!(written.is_err(), trap == Trap::Directory, "{trap:?}: {written:?}");
        if written.is_ok() {
            let metadata = path.symlink_metadata().unwrap();
            assert!(metadata.is_file(), "{trap:?}");
            assert_eq!(metadata.permissions().mode() & 0o777, 0o644, "{trap:?}");
            assert_eq!(subnet_file::previous(&path), Some(subnet), "{trap:?}");
        }
        trap.assert_victim_kept(&path);
    }
}

#[test]
fn the_cache_is_ignored_and_replaced() {
    for trap in TRAPS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(cache::FILE_NAME);
        trap.set(&path, CACHE);
        let folder = dir.path().to_owned();
        let loaded = promptly(&format!("{trap:?}"), move || Cache::load(&folder, "x"));
        assert_eq!(loaded, Cache::default(), "{trap:?}");
        let saved = Cache::default().save(dir.path(), "x");
        assert_eq!(saved.is_err(), trap == Trap::Directory, "{trap:?}: {saved:?}");
        trap.assert_victim_kept(&path);
    }
}

#[test]
fn the_nodes_address_is_made_anew() {
    for trap in TRAPS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vtep-mac");
        trap.set(&path, MAC);
        let folder = dir.path().to_owned();
        let mac = promptly(&format!("{trap:?}"), move || identity::mac(&folder));
        assert_ne!(mac.to_string(), MAC.trim(), "{trap:?}");
        trap.assert_victim_kept(&path);
    }
}

#[test]
fn the_embedded_store_refuses_in_one_line() {
    for trap in TRAPS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("leases.redb");
        trap.set(&path, "");
        let error = promptly(&format!("{trap:?}"), open_embedded(dir.path(), None)).unwrap_err();
        assert!(
            error.contains("leases.redb") && !error.contains('\n'),
            "{trap:?}: {error}"
        );
        trap.assert_victim_kept(&path);
    }
}

#[test]
fn a_network_config_refuses_in_one_line() {
    for trap in TRAPS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net-conf.json");
        trap.set(&path, NET_CONF);
        let data = dir.path().join("data");
        let error = promptly(&format!("{trap:?}"), open_embedded(&data, Some(path.clone()))).unwrap_err();
        assert!(!error.contains('\n'), "{trap:?}: {error}");
        assert!(!data.exists(), "{trap:?}");
        trap.assert_victim_kept(&path);
    }
}

#[test]
fn certificates_and_keys_refuse_in_one_line() {
    for trap in TRAPS {
        for which in ["ca", "certificate", "key"] {
            let dir = tempfile::tempdir().unwrap();
            for name in ["ca", "certificate", "key"] {
                let path = dir.path().join(name);
                if name == which {
                    trap.set(&path, "-----BEGIN CERTIFICATE-----\n");
                } else {
                    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
                    let pem = if name == "key" {
                        made.signing_key.serialize_pem()
                    } else {
                        made.cert.pem()
                    };
                    fs::write(&path, pem).unwrap();
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
                }
            }
            let options = EtcdOptions {
                endpoints: vec!["https://127.0.0.1:1".to_owned()],
                prefix: "/coreos.com/network".to_owned(),
                ca_file: Some(dir.path().join("ca")),
                client_cert: Some(ClientCert {
                    cert_file: dir.path().join("certificate"),
                    key_file: dir.path().join("key"),
                }),
                login: None,
            };
            let kind = StoreKind::Etcd(options);
            let refused = promptly(&format!("{trap:?} {which}"), move || use_store(&kind));
            assert!(
                !refused.contains('\n') && refused.len() < 1000,
                "{trap:?} {which}: {refused}"
            );
            trap.assert_victim_kept(&dir.path().join(which));
        }
    }
}

#[test]
fn a_config_file_refuses_in_one_line() {
    for trap in TRAPS {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kersey.toml");
        trap.set(&path, "iface = 'eth1'\n");
        let start = Instant::now();
        let done = Command::new(env!("CARGO_BIN_EXE_kersey"))
            .args(["config", "check"])
            .arg(&path)
            .env_clear()
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{trap:?}: {said}");
        assert!(start.elapsed() < LIMIT, "{trap:?}");
        let first = said.lines().next().unwrap_or_default();
        assert!(first.contains("kersey.toml"), "{trap:?}: {said}");
        trap.assert_victim_kept(&path);
    }
}

#[test]
fn a_file_replaced_meanwhile_is_read_old_or_new() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("subnet.env");
    let config = NetworkConfig::parse(NET_CONF).unwrap();
    let mtu = Mtu::new(1400).unwrap();
    let subnets = ["10.1.3.0-24", "10.1.200.0-24"].map(|key| key.parse().unwrap());
    subnet_file::write(&path, &config, subnets[0], mtu, subnet_file::IpMasq::Off).unwrap();
    let stop = AtomicBool::new(false);
    let writes = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let which = (writes.load(Ordering::Relaxed) + 1) % 2;
                subnet_file::write(&path, &config, subnets[which], mtu, subnet_file::IpMasq::Off).unwrap();
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        let start = Instant::now();
        while writes.load(Ordering::Relaxed) < 20 && start.elapsed() < LIMIT {
            let read = subnet_file::previous(&path);
            if !subnets.iter().any(|&subnet| Some(subnet) == read) {
                stop.store(true, Ordering::Relaxed);
                panic!("torn: {read:?}");
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(writes.load(Ordering::Relaxed) > 0);
}

fn open_embedded(
    data_dir: &Path,
    network_config: Option<PathBuf>,
) -> impl FnOnce() -> Result<(), String> + use<> {
    let kind = StoreKind::Embedded(EmbeddedOptions {
        data_dir: data_dir.to_owned(),
        network_configs: network_config
            .map(|path| (None, NetworkConfigSource::File(path)))
            .into_iter()
            .collect(),
    });
    move || {
        runtime().block_on(async {
            let opened = store::open(&kind, Duration::from_secs(60), Expirations::Assume).await;
            opened.map(drop).map_err(|error| error.to_string())
        })
    }
}

/// Opens a store and asks it for its config: what it says of that.
fn use_store(kind: &StoreKind) -> String {
    runtime().block_on(async {
        match store::open(kind, Duration::from_secs(60), Expirations::Assume).await {
            Err(error) => error.to_string(),
            Ok(opened) => opened.config().await.unwrap_err().to_string(),
        }
    })
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}
