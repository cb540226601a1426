//! S11: a mistake in a file with a secret is told without it. The daemon's side is in `netns-tests/daemon/secrets.rs`.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// In every file below; never in what is said of it.
const CANARY: &str = "CanaryQxZkWvMmVdYs";

const CONFIG_FILES: [&str; 9] = [
    "etcd-password = 'CANARY\n",
    "etcd-password = \"CANARY\\q\"\n",
    "etcd-password = ['CANARY']\n",
    "etcd-password = CANARY\n",
    "etcd-passwrod = 'CANARY'\n",
    "etcd-password = 'CANARY'\netcd-password = 'CANARY'\n",
    "etcd-password = 'CANARY'\nlog-level = 5\n",
    "etcd-password = 'CANARY' 'x'\n",
    "etcd-password = {a = 'CANARY'}\n",
];

const ACCESS_FILES: [&str; 9] = [
    "[[allow]]\ntoken = \"CANARY\nnetworks = [\"*\"]\nright = \"admin\"\n",
    "[[allow]]\ntoken = CANARY\nnetworks = [\"*\"]\nright = \"admin\"\n",
    "[[allow]]\ntoken = [\"CANARY\"]\nnetworks = [\"*\"]\nright = \"admin\"\n",
    "[[allow]]\ntoken = \"CANARY\"\ncertificate = \"x\"\nnetworks = [\"*\"]\nright = \"admin\"\n",
    "[[allow]]\ntokn = \"CANARY\"\nnetworks = [\"*\"]\nright = \"admin\"\n",
    "[[allow]]\ntoken = \"CANARY\"\nnetworks = [\"*\"]\nright = \"owner\"\n",
    "[[allow]]\ntoken-sha256 = \"CANARY\"\nnetworks = [\"*\"]\nright = \"admin\"\n",
    r#"{"allow":[{"token":"CANARY,"networks":["*"],"right":"admin"}]}"#,
    r#"{"allow":[{"token":{"x":"CANARY"},"networks":["*"],"right":"admin"}]}"#,
];

const TOKEN_FILES: [&str; 4] = [
    "CANARY with spaces\n",
    "CANARY\nCANARY\n",
    "CANARY\u{e9}\n",
    "CANARY\u{0}\n",
];

#[test]
fn what_is_wrong_with_a_config_file_is_told_without_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    for text in CONFIG_FILES {
        let file = keep(dir.path(), text);
        let mut command = kersey();
        command.arg("run").arg(format!("--config={file}"));
        assert_silent(command, text);
    }
}

#[test]
fn what_is_wrong_with_an_access_file_is_told_without_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    for text in ACCESS_FILES {
        let file = keep(dir.path(), text);
        let mut command = kersey();
        command.args([
            "server",
            "--listen=127.0.0.1:0",
            "--log-level=trace",
            r#"--network-config={"Network":"10.1.0.0/16"}"#,
        ]);
        command.arg(format!("--data-dir={}", dir.path().join("data").display()));
        command.arg(format!("--access-file={file}"));
        assert_silent(command, text);
    }
}

#[test]
fn what_is_wrong_with_a_token_file_is_told_without_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    for text in TOKEN_FILES {
        let file = keep(dir.path(), text);
        let mut command = kersey();
        command.args(["reserve", "list", "--remote=https://127.0.0.1:1"]);
        command.arg(format!("--remote-token-file={file}"));
        assert_silent(command, text);
    }
}

/// It fails, names the file, and does not say what is in it.
fn assert_silent(mut command: Command, text: &str) {
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
    assert!(!done.status.success(), "{text}: {said}");
    assert!(said.contains("/secret"), "{text}: {said}");
    assert!(!said.contains(&CANARY[..8]), "{text}: {said}");
}

/// A file with `text`, and the word in it.
fn keep(folder: &Path, text: &str) -> String {
    let file = folder.join("secret");
    fs::write(&file, text.replace("CANARY", CANARY)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file.display().to_string()
}

fn kersey() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command.env_clear();
    command
}
