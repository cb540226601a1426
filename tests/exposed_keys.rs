//! S10, S11: a key or token that every user of the machine may read is pointed out, by the server and by a node, when the file is read.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A certificate for this machine, its key and a token, in a folder of their own.
fn files(dir: &Path) -> [PathBuf; 3] {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let [cert, key, token] = ["the-cert", "the-key", "the-token"].map(|name| dir.join(name));
    fs::write(&cert, made.cert.pem()).unwrap();
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    fs::write(&token, "0123456789abcdef0123456789abcdef\n").unwrap();
    [cert, key, token]
}

/// What a process says before `until`, a line that comes after it has read its files; it is killed then.
fn said(args: &[String], until: &str) -> Vec<String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(args)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = Vec::new();
    let reached = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .any(|line| {
            let reached = line.contains(until);
            lines.push(line);
            reached
        });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(reached, "{lines:#?}");
    lines
}

/// Asserts that of all modes a file may have exactly those that everybody may read are warned about, in one line with its name and
/// what to do.
fn assert_warned(who: &str, file: &Path, args: &[String], until: &str) {
    for (mode, exposed) in [(0o600, false), (0o640, false), (0o644, true), (0o604, true)] {
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        let lines = said(args, until);
        let warnings = lines.iter().filter(|line| {
            line.contains(name) && line.contains("WARN") && line.contains("every user of this")
        });
        let warnings: Vec<_> = warnings.collect();
        assert_eq!(
            warnings.len(),
            usize::from(exposed),
            "{who}, {mode:o}: {lines:#?}"
        );
        assert!(
            warnings.iter().all(|line| line.contains("chmod ")),
            "{warnings:?}"
        );
    }
    fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
}

/// A node that gets no further than its store.
fn node(dir: &Path) -> Vec<String> {
    let mut args = vec![
        "run".to_owned(),
        "--sandbox=off".to_owned(),
        "--firewall=off".to_owned(),
    ];
    for (flag, file) in [
        ("data-dir", "data"),
        ("status-socket", "status.sock"),
        ("subnet-file", "subnet.env"),
    ] {
        args.push(format!("--{flag}={}", dir.join(file).display()));
    }
    args
}

#[test]
fn the_server_warns_of_a_key_that_everybody_may_read() {
    let dir = tempfile::tempdir().unwrap();
    let [cert, key, _] = files(dir.path());
    let args = [
        "server".to_owned(),
        "--listen=127.0.0.1:0".to_owned(),
        r#"--network-config={"Network":"10.1.0.0/16"}"#.to_owned(),
        format!("--data-dir={}", dir.path().join("data").display()),
        format!("--remote-certfile={}", cert.display()),
        format!("--remote-keyfile={}", key.display()),
    ];
    assert_warned("server", &key, &args, "serving leases");
}

#[test]
fn a_node_of_a_server_warns_of_a_key_and_a_token_that_everybody_may_read() {
    let dir = tempfile::tempdir().unwrap();
    let [cert, key, token] = files(dir.path());
    let mut args = node(dir.path());
    args.extend([
        "--remote=https://127.0.0.1:1".to_owned(),
        format!("--remote-cafile={}", cert.display()),
        format!("--remote-certfile={}", cert.display()),
        format!("--remote-keyfile={}", key.display()),
        format!("--remote-token-file={}", token.display()),
    ]);
    for file in [&key, &token] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o600)).unwrap();
    }
    assert_warned("key", &key, &args, "store opened");
    assert_warned("token", &token, &args, "store opened");
}

#[test]
fn a_node_of_etcd_warns_of_a_key_that_everybody_may_read() {
    let dir = tempfile::tempdir().unwrap();
    let [cert, key, _] = files(dir.path());
    let mut args = node(dir.path());
    args.extend([
        "--etcd-endpoints=https://127.0.0.1:1".to_owned(),
        format!("--etcd-cafile={}", cert.display()),
        format!("--etcd-certfile={}", cert.display()),
        format!("--etcd-keyfile={}", key.display()),
    ]);
    assert_warned("etcd", &key, &args, "store opened");
}

#[test]
fn a_node_warns_of_keys_for_hmacs_that_everybody_may_read() {
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("the-hmac-keys");
    fs::write(&keys, "7 sha256 not-for-everybody\n").unwrap();
    let mut args = node(dir.path());
    args.extend([
        "--listen=127.0.0.1:0".to_owned(),
        // What becomes of the keys is told by each backend; the line of this one comes right after they were read.
        r#"--network-config={"Network":"10.1.0.0/16","Backend":{"Type":"auto"}}"#.to_owned(),
        format!("--srv6-hmac-keys={}", keys.display()),
    ]);
    assert_warned("hmac", &keys, &args, "backend chosen");
}
