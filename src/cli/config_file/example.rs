//! `configs/kersey.toml` is what users copy: it must be readable, and complete.

use std::collections::BTreeSet;

use super::super::flags::{Entry as EntryName, file_grammar, subcommand};
use super::super::{RunArgs, ServerArgs};
use super::*;

const EXAMPLE: &str = include_str!("../../../configs/kersey.toml");

/// The keys of the example with their lines as a user would have them after taking off the `#`.
fn keys() -> Vec<(&'static str, &'static str)> {
    EXAMPLE
        .lines()
        .filter_map(|line| {
            let live = line.strip_prefix('#').unwrap_or(line);
            let (key, _) = live.split_once(" = ")?;
            let is_key = key
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c));
            is_key.then_some((key, live))
        })
        .collect()
}

#[test]
fn the_example_as_it_is_sets_nothing() {
    let file = super::tests::file("kersey.toml", EXAMPLE);
    assert_eq!(file.settings(&file_grammar()).unwrap(), []);
}

#[test]
fn the_example_has_every_key() {
    let written: BTreeSet<&str> = keys().into_iter().map(|(key, _)| key).collect();
    let mut missing = BTreeSet::new();
    for command in [
        subcommand::<RunArgs>("run", EntryName::Kersey),
        subcommand::<ServerArgs>("server", EntryName::Kersey),
    ] {
        let visible = command.get_arguments().filter(|arg| !arg.is_hide_set());
        let names = visible.filter_map(|arg| arg.get_long().map(str::to_owned));
        missing.extend(
            names.filter(|name| !written.contains(name.as_str()) && !NOT_IN_A_FILE.contains(&name.as_str())),
        );
    }
    assert!(
        missing.is_empty(),
        "configs/kersey.toml does not show {missing:?}"
    );
}

#[test]
fn every_line_of_the_example_would_do() {
    let dir = tempfile::tempdir().unwrap();
    for (key, line) in keys() {
        // Some need another one beside them.
        let partner = keys()
            .into_iter()
            .filter(|(other, _)| needs(key).contains(other))
            .map(|(_, line)| line);
        let text: String = partner.chain([line]).map(|line| format!("{line}\n")).collect();
        let path = dir.path().join("kersey.toml");
        std::fs::write(&path, &text).unwrap();
        let words = ["kersey", "run", "--config", path.to_str().unwrap()].map(str::to_owned);
        let parsed = super::super::parse(&words, &super::super::Variables::new());
        assert!(parsed.is_ok(), "{text}: {parsed:?}");
    }
}

fn needs(key: &str) -> &'static [&'static str] {
    match key {
        "etcd-certfile" => &["etcd-keyfile"],
        "etcd-keyfile" => &["etcd-certfile"],
        "etcd-username" => &["etcd-password"],
        "etcd-password" => &["etcd-username"],
        "network-config" | "access-file" | "server-name" | "api-form" => &["listen"],
        "remote-cafile" => &["remote"],
        "remote-certfile" => &["remote-keyfile", "remote"],
        "remote-keyfile" => &["remote-certfile", "remote"],
        "remote-token-file" => &["remote-cafile", "remote"],
        _ => &[],
    }
}
