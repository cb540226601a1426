//! S7 for `kersey server`: what it has given up by the time it serves, and that it serves all the same.

use std::fs;
use std::net::TcpListener;

use kersey::control::store::Store;

use crate::authority::Authority;
use crate::process::Process;
use crate::support::{client, node, tls};

/// The value of a field of `/proc/PID/status`.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.rsplit('\t').next().unwrap()
}

fn assert_confined(server: &Process) {
    let threads = server.threads();
    assert!(!threads.is_empty());
    for thread in threads {
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(field(&thread, set), "0000000000000000", "{set}\n{thread}");
        }
        if nix::unistd::Uid::effective().is_root() {
            assert_eq!(field(&thread, "CapBnd:"), "0000000000000000", "{thread}");
        }
        assert_eq!(field(&thread, "NoNewPrivs:"), "1", "{thread}");
        assert_eq!(field(&thread, "Seccomp:"), "2", "{thread}");
    }
}

#[tokio::test]
async fn a_server_keeps_no_capability_and_serves_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let socket = dir.path().join("run/api.sock");
    let place = format!("unix://{}", socket.display());
    // Root may have a port that takes a capability.
    let low = (900..1024)
        .rev()
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok());
    let listen = format!("{place},127.0.0.1:{}", low.unwrap_or(0));
    for life in 1..=2 {
        let mut server = Process::start(&data, &listen, &[]);
        assert_confined(&server);
        let store = client(&place, None);
        let lease = store.acquire(&node(life), None).await.unwrap();
        store.renew(&lease).await.unwrap();
        if let Some(port) = low {
            let by_port = client(&format!("http://127.0.0.1:{port}"), None);
            assert!(by_port.config().await.unwrap().contains("10.0.0.0/8"));
        }
        // The threads that DNS and the database may have started are confined as well.
        assert_confined(&server);
        assert!(server.terminate().success());
        assert!(!socket.exists(), "its file goes with it, inside the sandbox too");
    }
}

#[tokio::test]
async fn certificates_are_replaced_inside_the_sandbox() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let pair = ca.issue_expired("server", &["127.0.0.1"]);
    let flags = [
        format!("--remote-certfile={}", pair.cert.display()),
        format!("--remote-keyfile={}", pair.key.display()),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let server = Process::start(&dir.path().join("data"), "127.0.0.1:0", &flags);
    assert_confined(&server);
    let place = format!("https://{}", server.address);
    let store = client(&place, tls(None, &ca.file));
    assert!(store.config().await.unwrap_err().to_string().contains("expired"));
    // Replaced as programs do it that renew certificates: a new file in the place of the old.
    let renewed = ca.issue("renewed", &["127.0.0.1"]);
    fs::rename(renewed.key, &pair.key).unwrap();
    fs::rename(renewed.cert, &pair.cert).unwrap();
    assert!(store.config().await.unwrap().contains("10.0.0.0/8"));
}

#[test]
fn each_part_of_a_servers_sandbox_can_be_switched_off() {
    let dir = tempfile::tempdir().unwrap();
    let is_root = nix::unistd::Uid::effective().is_root();
    for (choice, capabilities, seccomp) in [
        ("off", is_root, "0"),
        ("seccomp", is_root, "2"),
        ("capabilities,landlock", false, "0"),
    ] {
        let server = Process::start(dir.path(), "127.0.0.1:0", &[&format!("--sandbox={choice}")]);
        for thread in server.threads() {
            let has = field(&thread, "CapEff:") != "0000000000000000";
            assert_eq!(
                (has, field(&thread, "Seccomp:")),
                (capabilities, seccomp),
                "{choice}"
            );
        }
    }
}
