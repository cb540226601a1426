//! `kersey config check`: whether a config file or a network config would do, without starting anything.
//!
//! The file goes the same way as at the start of a daemon, but alone: neither flags nor variables add to it. The network config in it is
//! read; of other files (certificates, keys) it is told where there are none, for they may be made later.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use nix::unistd::User;

use super::store::config_source;
use super::{Parsed, Stop, UsageError, Variables, config_file, exit, parse};
use crate::cli::tell::{say, say_aside};
use crate::control::state_file;
use crate::options::{NetworkConfigSource, StoreKind};

/// A network config is a few hundred bytes.
const MAX_NETWORK_CONFIG: u64 = 1 << 20;

/// Look at configuration before a daemon does
#[derive(Debug, Args)]
pub struct ConfigOptions {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Check a config file, or a network config
    ///
    /// Exit status: 0 it would do; 2 the config file would not; 4 the network config would not.
    Check(CheckOptions),
}

#[derive(Debug, Args)]
struct CheckOptions {
    /// TOML or JSON file with flags [default: /etc/kersey/kersey.toml, unless --network-config is given]
    file: Option<PathBuf>,
    /// The daemon that is to read the file
    #[arg(long = "for", value_name = "DAEMON", default_value = "run", value_parser = ["run", "server", "flanneld"])]
    daemon: String,
    /// A network config as well: a file, flannel's net-conf.json, or JSON text
    #[arg(long, value_name = "FILE|JSON", value_parser = config_source)]
    network_config: Option<NetworkConfigSource>,
}

/// What a daemon would say of network configs.
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    /// Why no node could run by one, if that is so.
    pub unusable: fn(&str) -> Option<String>,
    /// Which of its keys nobody reads, a sentence each.
    pub unread: fn(&str) -> Vec<String>,
}

/// Checks, and says what is wrong or that nothing is.
pub fn run(options: &ConfigOptions, judge: Judge) -> ExitCode {
    let Action::Check(check) = &options.action;
    let mut complaints = Vec::new();
    let file = match (&check.file, &check.network_config) {
        (Some(file), _) => Some(file.clone()),
        (None, Some(_)) => None,
        (None, None) => Some(PathBuf::from(config_file::DEFAULT_PATH)),
    };
    if let Some(file) = file {
        match check_file(&file, &check.daemon, judge) {
            Ok(notes) => {
                for note in notes {
                    say_aside!("warning: {note}");
                }
                say!("{}: the config file would do", file.display());
            }
            Err(complaint) => complaints.push(complaint),
        }
    }
    if let Some(given) = &check.network_config {
        match check_network(given, judge) {
            Ok(notes) => {
                for note in notes {
                    say_aside!("warning: {note}");
                }
                say!("the network config would do");
            }
            Err(complaint) => complaints.push(complaint),
        }
    }
    for complaint in &complaints {
        say_aside!("error: {}", complaint.text);
    }
    complaints.first().map_or(ExitCode::from(exit::OK), |complaint| {
        ExitCode::from(complaint.status)
    })
}

/// What is wrong, and the exit status that says so.
#[derive(Debug)]
struct Complaint {
    text: String,
    status: u8,
}

impl Complaint {
    fn usage(text: impl ToString) -> Self {
        Self {
            text: text.to_string(),
            status: exit::USAGE,
        }
    }
}

/// Reads a file as the daemon would; the sentences are what the daemon would log.
fn check_file(file: &Path, daemon: &str, judge: Judge) -> Result<Vec<String>, Complaint> {
    let path = file
        .to_str()
        .ok_or_else(|| Complaint::usage("the file's name is no UTF-8"))?;
    std::fs::metadata(file).map_err(|error| {
        let hint = match path {
            config_file::DEFAULT_PATH => "name another: kersey config check FILE",
            _ => "",
        };
        let text = format!("cannot read the config file {path}: {error}");
        Complaint::usage(UsageError::new(text, hint))
    })?;
    let flag = format!("--config={path}");
    let words: &[&str] = match daemon {
        "flanneld" => &["flanneld", &flag],
        daemon => &["kersey", daemon, &flag],
    };
    let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    let Parsed { command, mut notes } = match parse(&words, &Variables::new()) {
        Ok(parsed) => parsed,
        Err(Stop::Misused(error)) => return Err(Complaint::usage(error)),
        Err(Stop::Clap(error)) => return Err(Complaint::usage(error)),
        Err(Stop::Told { text, .. } | Stop::Refused { text, .. }) => return Err(Complaint::usage(text)),
    };
    let (store, files, user) = match &command {
        super::Command::Run(options) => {
            let store = &options.store.kind;
            let mut files = store.files(options.serve.as_ref());
            files.extend(options.srv6.hmac_keys.clone());
            (store, files, options.process.user.as_deref())
        }
        super::Command::Server(options) => {
            let store = &options.store.kind;
            (store, store.files(Some(&options.serve)), None)
        }
        super::Command::Status(_)
        | super::Command::Reserve(_)
        | super::Command::Cleanup(_)
        | super::Command::Lab(_)
        | super::Command::Bench(_)
        | super::Command::Config(_)
        | super::Command::DockerOpts(_)
        | super::Command::Man(_)
        | super::Command::Completions(_) => return Ok(notes),
    };
    for file in files {
        if let Err(error) = std::fs::metadata(&file) {
            notes.push(format!("{}: {error}", file.display()));
        }
    }
    let is_nobody =
        |user: &&str| user.parse::<u32>().is_err() && !matches!(User::from_name(user), Ok(Some(_)));
    if let Some(user) = user.filter(is_nobody) {
        notes.push(format!("there is no user {user}"));
    }
    if let StoreKind::Embedded(embedded) = store {
        for (_, given) in &embedded.network_configs {
            notes.extend(check_network(given, judge)?);
        }
    }
    Ok(notes)
}

/// Gives what a daemon would warn of.
fn check_network(source: &NetworkConfigSource, judge: Judge) -> Result<Vec<String>, Complaint> {
    let text = match source {
        NetworkConfigSource::Inline(text) => text.clone(),
        NetworkConfigSource::File(path) => state_file::read(path, MAX_NETWORK_CONFIG).map_err(|error| {
            Complaint::usage(UsageError::new(
                format!("cannot read the network config {}: {error}", path.display()),
                "",
            ))
        })?,
    };
    match (judge.unusable)(&text) {
        None => Ok((judge.unread)(&text)),
        Some(text) => Err(Complaint {
            text,
            status: exit::CONFIG,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::config::NetworkConfig;

    fn source(text: &str) -> NetworkConfigSource {
        config_source(text).unwrap()
    }

    const JUDGE: Judge = Judge {
        unusable: |text| NetworkConfig::parse(text).err().map(|error| error.to_string()),
        unread: |text| vec![format!("{} bytes", text.len())],
    };

    #[test]
    fn a_file_is_checked_as_the_daemon_would_read_it() {
        for (text, daemon, expected) in [
            ("iface = 'eth1'", "run", Ok(())),
            (
                "listen = ':8888'\nnetwork-config = '{\"Network\":\"10.0.0.0/16\"}'",
                "run",
                Ok(()),
            ),
            ("listen = ':8888'", "server", Ok(())),
            ("listen = ':8888'", "flanneld", Ok(())),
            (
                "queues = 0",
                "run",
                Err((exit::USAGE, "line 1: expected a whole number")),
            ),
            (
                "remote = 'a:1'\nlisten = ':1'",
                "run",
                Err((exit::USAGE, "exclude each other")),
            ),
            (
                "listen = ':8888'\nnetwork-config = '{\"Network\":\"10.0.0.0/31\"}'",
                "run",
                Err((exit::CONFIG, "Network is 10.0.0.0/31")),
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("kersey.toml");
            std::fs::write(&path, text).unwrap();
            let checked = check_file(&path, daemon, JUDGE).map(|_| ());
            match (checked, expected) {
                (Ok(()), Ok(())) => {}
                (Err(complaint), Err((status, part))) => {
                    assert_eq!(complaint.status, status, "{text}");
                    assert!(complaint.text.contains(part), "{text}: {}", complaint.text);
                }
                (checked, _) => panic!("{text}: {checked:?}"),
            }
        }
    }

    #[test]
    fn what_a_file_names_and_is_not_there_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kersey.toml");
        let text = "etcd-endpoints = 'https://etcd:2379'\netcd-cafile = '/nowhere/ca.pem'\n\
                    srv6-hmac-keys = '/nowhere/keys'\nuser = 'nobody-of-that-name'\n";
        std::fs::write(&path, text).unwrap();
        let notes = check_file(&path, "run", JUDGE).unwrap();
        let told = notes.join("\n");
        for part in [
            "/nowhere/ca.pem: No such file",
            "/nowhere/keys: No such file",
            "no user nobody-of-that-name",
        ] {
            assert!(told.contains(part), "{told}");
        }
        assert_eq!(notes.len(), 3, "{told}");
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = check_file(Path::new("/nowhere/kersey.toml"), "run", JUDGE).unwrap_err();
        assert_eq!(error.status, exit::USAGE);
        assert_eq!(
            error.text,
            "cannot read the config file /nowhere/kersey.toml: No such file or directory (os error 2)"
        );
    }

    #[test]
    fn a_network_config_is_checked_from_text_and_from_a_file() {
        let notes = check_network(&source(r#"{"Network":"10.0.0.0/16"}"#), JUDGE).unwrap();
        assert_eq!(notes, ["25 bytes"]);
        let error = check_network(&source("{}"), JUDGE).unwrap_err();
        assert_eq!(error.status, exit::CONFIG);
        let error = check_network(&source("/nowhere/net-conf.json"), JUDGE).unwrap_err();
        assert_eq!(error.status, exit::USAGE);
    }
}
