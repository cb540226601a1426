//! Replays the corpora of the fuzz targets, and some bytes made from them, without a fuzzer.

#![expect(clippy::unwrap_used, reason = "a test says what went wrong by panicking")]

use std::path::{Path, PathBuf};

#[path = "../fuzz/targets.rs"]
mod targets;

#[test]
fn every_file_of_every_corpus_passes() {
    for (name, _) in targets::TARGETS {
        let seeds = corpus(name);
        assert!(!seeds.is_empty(), "no corpus for {name}");
        for (path, bytes) in seeds {
            println!("{}", path.display());
            targets::run(name, &bytes);
        }
    }
}

#[test]
fn seeds_with_some_bytes_changed_pass() {
    for (name, _) in targets::TARGETS {
        let seeds = corpus(name);
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut below = |bound: usize| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % bound.max(1)
        };
        for _ in 0..1000 {
            let (path, mut bytes) = seeds[below(seeds.len())].clone();
            for _ in 0..1 + below(4) {
                let (at, value) = (below(bytes.len()), below(256) as u8);
                match below(8) {
                    0 => bytes.truncate(at),
                    1 => bytes.push(value),
                    2 => bytes.extend_from_within(at..),
                    _ if bytes.is_empty() => {}
                    _ => bytes[at] = value,
                }
            }
            bytes.truncate(4096);
            println!("{} changed to {bytes:02x?}", path.display());
            targets::run(name, &bytes);
        }
    }
}

/// The files of a target's corpus.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}
