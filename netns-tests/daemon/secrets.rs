//! Secrets are shown nowhere (S11): not in logs at the most detailed level, not in `ps`, not in what daemons and servers tell of
//! themselves, not in errors. Mistakes in files that hold some: `tests/secrets.rs`.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use etcd_client::PermissionType;

use crate::overlay::{Blueprint, Overlay, READY, wait_for};
use crate::pki::Authority;
use crate::support::{require_etcd, require_root};

/// Words that must not be seen; letters only, so that no escape hides them.
const PASSWORD: &str = "CanaryPasswordQxZkWv";
const WRONG_PASSWORD: &str = "CanaryWrongPasswordJtBn";
const HMAC_KEY: &str = "CanaryHmacKeyRrLpTu";
const TOKEN: &str = "CanaryTokenMmVdYsGhKcNb";
const WRONG_TOKEN: &str = "CanaryWrongTokenBfTjWqPzRx";
const ADMIN_TOKEN: &str = "CanaryAdminTokenXkLwVbNjHd";

#[test]
fn secrets_are_shown_nowhere() {
    if !require_etcd("secrets_are_shown_nowhere") {
        return;
    }
    let mut overlay = Blueprint::new("secrets", 1).build();
    overlay.etcd(async |mut client| {
        client.user_add("root", "root", None).await?;
        client.user_grant_role("root", "root").await?;
        client.role_add("node").await?;
        let all = etcd_client::Permission::new(PermissionType::Readwrite, "/").with_prefix();
        client.role_grant_permission("node", all).await?;
        client.user_add("node", PASSWORD, None).await?;
        client.user_grant_role("node", "node").await?;
        client.auth_enable().await.map(drop)
    });
    let keys = overlay.file("hmac-keys");
    fs::write(&keys, format!("7 sha256 {HMAC_KEY}\n")).unwrap();
    let mut shown = String::new();

    // The password in the environment, then in a file; and a wrong one, which etcd refuses.
    let file = overlay.file("kersey.toml");
    let write = |password: &str| {
        let text = format!(
            "etcd-username = 'node'\netcd-password = '{password}'\nsrv6-hmac-keys = '{}'\nlog-level = 'trace'\n",
            keys.display()
        );
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    };
    write(PASSWORD);
    let mut by_variable = overlay.command(1);
    by_variable
        .args(["--log-level=trace", "--etcd-username=node", "--log-format=json"])
        .env("KERSEY_ETCD_PASSWORD", PASSWORD);
    let mut by_file = overlay.command(1);
    by_file.arg(format!("--config={}", file.display()));
    for command in [by_variable, by_file] {
        overlay.nodes.clear();
        overlay.adopt(1, command);
        overlay.wait(1, READY, |status| status.ready);
        shown += &everything_shown(&mut overlay, 1);
        overlay.terminate(1);
        shown += &overlay.log(1);
    }
    write(WRONG_PASSWORD);
    let mut refused = overlay.command(1);
    refused.arg(format!("--config={}", file.display()));
    overlay.nodes.clear();
    let _ = fs::remove_dir_all(overlay.file("1.data"));
    overlay.adopt(1, refused);
    let log = overlay.nodes[0].child.log().to_owned();
    let is_told = || {
        fs::read_to_string(&log)
            .unwrap()
            .contains("authentication failed")
    };
    wait_for("etcd's refusal in the log", READY, is_told);
    shown += &everything_shown(&mut overlay, 1);
    overlay.terminate(1);
    shown += &overlay.log(1);

    // Once more, with a key for TLS. That nobody is there makes errors.
    let authority = Authority::new(&overlay.file("."), "ca");
    let client = authority.client(&overlay.file("."), "client", "node");
    let mut by_tls = overlay.command(1);
    let mut args: Vec<OsString> = by_tls.get_args().map(std::borrow::ToOwned::to_owned).collect();
    let at = args.iter().position(|arg| arg == "--etcd-endpoints").unwrap();
    args[at + 1] = "https://192.0.2.254:1".into();
    by_tls = Command::new(by_tls.get_program());
    by_tls.args(args).arg("--log-level=trace");
    by_tls.arg("--etcd-certfile").arg(&client.certificate);
    by_tls.arg("--etcd-keyfile").arg(&client.key);
    by_tls.arg("--etcd-cafile").arg(&authority.file);
    overlay.nodes.clear();
    overlay.adopt(1, by_tls);
    wait_for("etcd is away", READY, || overlay.log(1).contains("unavailable"));
    shown += &everything_shown(&mut overlay, 1);
    overlay.terminate(1);
    shown += &overlay.log(1);

    assert_eq!(shown.matches("kersey starts").count(), 4, "{shown}");
    assert_hidden(&shown, &[PASSWORD, WRONG_PASSWORD, HMAC_KEY]);
    assert_key_hidden(&shown, &client.key);
    // Etcd's token for the session, which is as good as the password.
    for line in shown.lines() {
        let lower = line.to_ascii_lowercase();
        assert!(
            !lower.contains("authorization") && !lower.contains("token:"),
            "{line}"
        );
    }
    // And the open file was warned of.
    assert!(
        shown.contains("has a secret, etcd-password, and mode 0644"),
        "{:.2000}",
        shown
    );
}

/// The server's side: tokens, and the key of its certificate.
#[test]
fn the_secrets_of_a_server_and_its_nodes_are_shown_nowhere() {
    if !require_root("the_secrets_of_a_server_and_its_nodes_are_shown_nowhere") {
        return;
    }
    let mut overlay = Blueprint::embedded("tokens", 2).build();
    let folder = overlay.file(".");
    let authority = Authority::new(&folder, "ca");
    let server = authority.server(&folder, "server", &["192.0.2.1"]);
    let keep = |name: &str, text: &str| {
        let file = folder.join(name);
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        file
    };
    let entry = |token: &str, right: &str| {
        format!("[[allow]]\ntoken = \"{token}\"\nnetworks = [\"*\"]\nright = \"{right}\"\n")
    };
    let rules = entry(TOKEN, "lease") + &entry(ADMIN_TOKEN, "admin");
    let access = keep("access", &rules);
    let token = keep("token", TOKEN);
    let wrong = keep("wrong", WRONG_TOKEN);

    let mut one = overlay.command(1);
    one.args(["--log-level=trace", "--metrics-address=192.0.2.1:9100"]);
    one.arg("--access-file").arg(&access);
    one.arg("--remote-certfile").arg(&server.certificate);
    one.arg("--remote-keyfile").arg(&server.key);
    overlay.adopt(1, one);
    overlay.wait(1, READY, |status| status.ready);
    let node = |overlay: &Overlay, file: &Path| {
        let plain = overlay.command(2);
        let mut command = Command::new(plain.get_program());
        command.args(plain.get_args().map(|word| match word.to_str() {
            Some("http://192.0.2.1:8888") => OsString::from("https://192.0.2.1:8888"),
            _ => word.to_owned(),
        }));
        command.args([
            "--log-level=trace",
            "--metrics-address=192.0.2.2:9100",
            "--log-format=json",
        ]);
        command.arg("--remote-cafile").arg(&authority.file);
        command.arg("--remote-token-file").arg(file);
        command
    };
    let right = node(&overlay, &token);
    overlay.adopt(2, right);
    overlay.wait_all();
    let mut shown = String::new();
    // What the server answers: to the right token, to a wrong one, to none, and about a file that is no good.
    let hub = overlay.hub();
    let ask = |file: Option<&PathBuf>| {
        let mut ask = Command::new(env!("CARGO_BIN_EXE_kersey"));
        ask.args(["reserve", "list", "--remote", "https://192.0.2.1:8888"]);
        ask.arg("--remote-cafile").arg(&authority.file);
        if let Some(file) = file {
            ask.arg("--remote-token-file").arg(file);
        }
        ask.stdout(Stdio::piped()).stderr(Stdio::piped());
        let done = hub.run(|| Ok(ask.output()?)).unwrap();
        let said =
            String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        (done.status.code(), said)
    };
    for (file, code) in [(Some(&token), 0), (Some(&wrong), 1), (None, 1)] {
        let (ended, said) = ask(file);
        shown += &said;
        assert_eq!(ended, Some(code), "{said}");
    }
    let before = overlay.log(1).lines().count();
    fs::write(&access, rules.replace("[[allow]]", "[[allow")).unwrap();
    // It is looked at when somebody asks.
    wait_for("the bad file is told of", READY, || {
        shown += &ask(Some(&token)).1;
        overlay
            .log(1)
            .lines()
            .skip(before)
            .any(|line| line.contains("WARN"))
    });
    for nth in [1, 2] {
        shown += &metrics(&overlay, nth);
        shown += &everything_shown(&mut overlay, nth);
    }
    overlay.terminate(2);
    shown += &overlay.log(2);
    let refused = node(&overlay, &wrong);
    fs::write(&access, &rules).unwrap();
    let _ = fs::remove_dir_all(overlay.file("2.data"));
    overlay.nodes.truncate(1);
    overlay.adopt(2, refused);
    wait_for("the server's refusal", READY, || {
        let log = overlay.log(2);
        log.contains("401") || log.contains("not known") || log.contains("token")
    });
    shown += &everything_shown(&mut overlay, 2);
    for nth in [2, 1] {
        overlay.terminate(nth);
        shown += &overlay.log(nth);
    }
    assert_eq!(shown.matches("kersey starts").count(), 3, "{shown}");
    assert!(shown.contains("# EOF"), "no metrics were seen");
    assert_hidden(&shown, &[TOKEN, WRONG_TOKEN, ADMIN_TOKEN]);
    assert_key_hidden(&shown, &server.key);
    for line in shown.lines() {
        let lower = line.to_ascii_lowercase();
        assert!(
            !lower.contains("bearer c") && !lower.contains("authorization:"),
            "{line}"
        );
    }
}

/// None of the words is there, in any of the forms that a careless line would show it in.
fn assert_hidden(shown: &str, secrets: &[&str]) {
    for secret in secrets {
        let as_numbers = secret
            .bytes()
            .map(|byte| byte.to_string())
            .collect::<Vec<_>>()
            .join(", ");
        let as_hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
        for form in [(*secret).to_owned(), as_numbers, as_hex, secret[..12].to_owned()] {
            let at = shown.find(&form);
            let around = shown
                .get(at.unwrap_or(0).saturating_sub(200)..)
                .unwrap_or_default();
            assert_eq!(at, None, "{secret}: {around:.400}");
        }
    }
}

/// No line of a key file is there.
fn assert_key_hidden(shown: &str, file: &Path) {
    let text = fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("-----")).collect();
    assert!(lines.len() > 1, "{}", file.display());
    for line in lines {
        assert!(
            !shown.contains(&line[..line.len().min(20)]),
            "a line of {}",
            file.display()
        );
    }
}

/// What a node tells Prometheus.
fn metrics(overlay: &Overlay, nth: usize) -> String {
    let asked = overlay.hub().run(|| {
        let mut stream = TcpStream::connect(format!("192.0.2.{nth}:9100"))?;
        write!(
            stream,
            "GET /metrics HTTP/1.1\r\nHost: 192.0.2.{nth}\r\nConnection: close\r\n\r\n"
        )?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    asked.unwrap()
}

/// What a daemon shows to whoever asks: status, files in its directory, its command line, metrics if there are any.
fn everything_shown(overlay: &mut Overlay, nth: usize) -> String {
    let mut shown = String::new();
    if let Ok(Some(status)) = kersey::lab::daemon::status(&overlay.socket(nth)) {
        shown += &format!("{status:#?}\n");
    }
    for form in [&[] as &[&str], &["--json"]] {
        let done = Command::new(env!("CARGO_BIN_EXE_kersey"))
            .args(["status", "--status-socket"])
            .arg(overlay.socket(nth))
            .args(form)
            .output()
            .unwrap();
        shown += &String::from_utf8_lossy(&done.stdout);
        shown += &String::from_utf8_lossy(&done.stderr);
    }
    for name in ["env", "data/control.json"] {
        shown += &fs::read_to_string(overlay.file(&format!("{nth}.{name}"))).unwrap_or_default();
    }
    let pid = overlay.daemon(nth).pid();
    shown += &fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    shown.push('\n');
    shown
}
