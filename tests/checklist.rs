//! `docs/flannel-compat.md` promises a test for each row of its two checklists. Here: the tests named are in the tree, every
//! row that claims something names one, and no row is missing.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../docs/flannel-compat.md");

#[test]
fn every_test_named_in_the_checklists_exists() {
    let known = tests();
    assert!(known.len() > 300, "{} tests found", known.len());
    for section in ["Checklist", "Flannel's known faults"] {
        for row in rows(section) {
            let shown = row.last().unwrap();
            for name in shown.split('`').skip(1).step_by(2) {
                assert!(
                    known.contains(name),
                    "{section}: {}: there is no test {name}",
                    row[0]
                );
            }
        }
    }
}

#[test]
fn every_test_named_among_the_faults_exists() {
    let known = tests();
    let page = include_str!("../docs/reliability.md");
    let mut named = 0;
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        let last = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for name in last.split('`').skip(1).step_by(2) {
            let is_name = name
                .chars()
                .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_');
            if is_name {
                assert!(known.contains(name), "there is no test {name}: {row}");
                named += 1;
            }
        }
    }
    assert!(named > 80, "{named} tests are named");
}

#[test]
fn a_row_without_a_test_says_that_it_is_not_there_yet() {
    for (section, state) in [("Checklist", 1), ("Flannel's known faults", 2)] {
        for row in rows(section) {
            let has_test = row.last().unwrap().contains('`');
            let is_open = row[state].contains("none yet") || row[state].contains("not yet");
            assert!(
                has_test || is_open,
                "{section}: {} has neither a test nor \"not yet\"",
                row[0]
            );
        }
    }
}

#[test]
fn no_row_is_missing() {
    assert!(rows("Checklist").len() >= 41, "{}", rows("Checklist").len());
    let faults: BTreeSet<String> = rows("Flannel's known faults")
        .into_iter()
        .map(|row| row[0].clone())
        .collect();
    for number in 0..=37 {
        assert!(faults.contains(&format!("B{number}")), "B{number} is missing");
    }
}

/// The rows of a section's table, cell by cell, without its head.
fn rows(section: &str) -> Vec<Vec<String>> {
    let (_, rest) = PAGE
        .split_once(&format!("\n## {section}\n"))
        .expect("the section is there");
    let text = rest.split("\n## ").next().unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| {
            let inner = line.trim_matches('|');
            inner.split(" | ").map(|cell| cell.trim().to_owned()).collect()
        })
        .collect()
}

/// The names of all tests there are.
fn tests() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for folder in ["src", "tests", "netns-tests"] {
        collect(Path::new(folder), &mut found);
    }
    found
}

fn collect(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let (mut is_test, mut is_rule) = (false, false);
            for line in text.lines().map(str::trim) {
                // The rules of tests/store_contract.rs are tests of every store.
                if line.starts_with("contract!(@rules ") {
                    is_rule = true;
                } else if is_rule && line == ");" {
                    is_rule = false;
                } else if is_rule {
                    found.extend(line.split('(').next().map(str::to_owned));
                } else if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                    is_test = true;
                } else if line.contains("fn ") && is_test {
                    let name = line.split("fn ").nth(1).and_then(|rest| rest.split('(').next());
                    found.extend(name.map(str::to_owned));
                    is_test = false;
                }
            }
        }
    }
}
