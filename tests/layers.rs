//! Which part of the crate may know which: the arrows of `docs/architecture.md`, checked in the source.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A part, and all it may import.
const ARROWS: &[(&str, &[&str])] = &[
    ("addr", &[]),
    ("lease", &["addr"]),
    ("options", &["addr", "dataplane", "lease"]),
    ("status", &[]),
    // Certificates and secrets in files, for both ends of the HTTP API.
    ("trust", &["options"]),
    ("wire", &["addr"]),
    ("dataplane", &["addr", "wire"]),
    ("backend", &["addr", "dataplane", "lease", "wire"]),
    ("host", &["addr", "dataplane", "wire"]),
    // Of the data plane, control knows nothing; stores are opened from options.
    ("control", &["addr", "lease", "options", "trust"]),
    (
        "server",
        &["addr", "control", "lease", "options", "status", "trust"],
    ),
    (
        "daemon",
        &[
            "addr",
            "backend",
            "control",
            "dataplane",
            "host",
            "lease",
            "options",
            "server",
            "status",
            "trust",
        ],
    ),
    // A lab's kernel nodes take leases as any node does.
    ("lab", &["addr", "control", "host", "lease", "options", "status"]),
    // `kersey server` is confined as a node is, and `kersey cleanup` puts back what a node switched.
    (
        "cli",
        &[
            "addr", "control", "daemon", "host", "lab", "lease", "options", "server", "status", "trust",
        ],
    ),
];

#[test]
fn no_part_knows_more_than_it_may() {
    let mut wrong = Vec::new();
    for (part, allowed) in ARROWS {
        for file in files_of(part) {
            for imported in imports(&file) {
                if imported != *part && !allowed.contains(&imported.as_str()) {
                    wrong.push(format!("{} imports {imported}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_part_is_under_the_rule() {
    let lib = fs::read_to_string("src/lib.rs").unwrap();
    let parts: BTreeSet<_> = lib
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    let ruled: BTreeSet<_> = ARROWS.iter().map(|(part, _)| *part).collect();
    assert_eq!(parts, ruled);
}

#[test]
fn unsafe_code_has_its_places() {
    let mut places = BTreeSet::new();
    for (part, _) in ARROWS {
        for file in files_of(part) {
            let text = fs::read_to_string(&file).unwrap();
            if text
                .lines()
                .any(|line| line.contains("unsafe {") || line.contains("unsafe impl"))
            {
                // `sys` is one place, whatever files it has.
                let of_sys = file.starts_with("src/host/sys");
                let place = if of_sys { Path::new("src/host/sys") } else { &file };
                places.insert(place.to_string_lossy().into_owned());
            }
        }
    }
    let expected = ["src/host/ethtool.rs", "src/host/sys", "src/wire/checksum.rs"];
    assert_eq!(places.iter().map(String::as_str).collect::<Vec<_>>(), expected);
}

/// The source files of a part.
fn files_of(part: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from(format!("src/{part}.rs"))];
    let mut folders = vec![PathBuf::from(format!("src/{part}"))];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.retain(|path| path.is_file());
    assert!(!found.is_empty(), "{part} has no source");
    found
}

/// The parts a file names with `crate::`, its tests and comments left out.
fn imports(file: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(file).expect("a readable source");
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| {
            rest.chars()
                .take_while(|letter| letter.is_alphanumeric() || *letter == '_')
                .collect()
        })
        .collect()
}
