//! What systemd's journal gets: lines with their priority and without a time of their own, where standard error leads to it, and only there.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

/// Two processes, for a warning and an error as well: what each says of its start on a unix socket, as the journal's, whose name
/// `JOURNAL_STREAM` has after `name`.
fn said(dir: &Path, flags: &[&str], name: impl Fn(u64, u64) -> String) -> Vec<String> {
    let (near, far) = UnixStream::pair().unwrap();
    let far = File::from(OwnedFd::from(far));
    let stat = far.metadata().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command
        .args([
            "server",
            "--listen=127.0.0.1:0",
            r#"--network-config={"Network":"10.1.0.0/16"}"#,
        ])
        .arg(format!("--data-dir={}", dir.join("data").display()))
        .args(flags)
        // Warned of: a name that is near one of ours.
        .env("KERSEY_LISTENN", "x")
        .env("JOURNAL_STREAM", name(stat.dev(), stat.ino()))
        .stdout(Stdio::null())
        .stderr(Stdio::from(far));
    let mut child = command.spawn().unwrap();
    // The command holds the far end as well.
    drop(command);
    let mut lines = Vec::new();
    for line in BufReader::new(near).lines() {
        let line = line.unwrap();
        let is_last = line.contains("serving leases");
        lines.push(line);
        if is_last {
            break;
        }
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(lines.last().unwrap().contains("serving leases"), "{lines:#?}");
    assert!(
        lines.iter().any(|line| line.contains("KERSEY_LISTENN")),
        "{lines:#?}"
    );
    lines
}

/// Whether a line begins with a year, or has one after the mark of a priority.
fn has_time(line: &str) -> bool {
    let text = line.split_once('>').map_or(line, |(_, text)| text);
    [line, text]
        .iter()
        .any(|text| text.starts_with("20") && text.get(4..5) == Some("-"))
}

#[test]
fn the_journal_gets_priorities_and_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let right = |device, inode| format!("{device}:{inode}");
    for line in said(dir.path(), &["--log-level=trace"], right) {
        let (mark, text) = line.split_at(3);
        let level = text.split_whitespace().next().unwrap();
        let expected = match level {
            "ERROR" => "<3>",
            "WARN" => "<4>",
            "INFO" => "<6>",
            "DEBUG" | "TRACE" => "<7>",
            _ => panic!("no level: {line}"),
        };
        assert_eq!(mark, expected, "{line}");
        assert!(!has_time(&line), "{line}");
    }
}

#[test]
fn who_inherits_the_journals_name_and_writes_elsewhere_has_lines_with_their_time() {
    let dir = tempfile::tempdir().unwrap();
    let wrong: [fn(u64, u64) -> String; 5] = [
        |device, inode| format!("{device}:{}", inode + 1),
        |device, inode| format!("{}:{inode}", device + 1),
        |_, _| String::new(),
        |_, inode| inode.to_string(),
        |_, _| "x:y".to_owned(),
    ];
    for name in wrong {
        for line in said(dir.path(), &[], name) {
            assert!(has_time(&line) && !line.starts_with('<'), "{line}");
        }
    }
}

#[test]
fn json_is_the_same_to_the_journal() {
    let dir = tempfile::tempdir().unwrap();
    let right = |device, inode| format!("{device}:{inode}");
    for line in said(dir.path(), &["--log-format=json"], right) {
        let said: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert!(
            said["timestamp"].is_string() && said["level"].is_string(),
            "{line}"
        );
    }
}
