//! `kersey lab` and `kersey bench` over SRv6.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::require_root;

#[test]
fn a_lab_of_kerseys_alone() {
    if !require_root("a_lab_of_kerseys_alone") {
        return;
    }
    for (flags, inner_mtu, pings) in [
        (&["--nodes", "2"][..], 1460, 2),
        (&["--nodes", "3", "--dual-stack"], 1460, 12),
        (&["--nodes", "2", "--mtu", "9000"], 8960, 2),
    ] {
        let report = lab(flags);
        assert_eq!(report["passed"], true, "{flags:?}: {report:#}");
        assert_eq!(report["inner_mtu"], inner_mtu, "{flags:?}");
        assert_eq!(report["pings"].as_array().unwrap().len(), pings, "{flags:?}");
        for status in report["status"].as_array().unwrap() {
            assert_eq!(status["backend"]["name"], "srv6", "{flags:?}");
        }
    }
}

#[test]
fn a_lab_takes_the_kernels_srv6_as_its_last_node() {
    if !require_root("a_lab_takes_the_kernels_srv6_as_its_last_node") {
        return;
    }
    for flags in [&["--nodes", "2"][..], &["--nodes", "3", "--dual-stack"]] {
        let flags = [flags, &["--peer", "kernel-seg6"]].concat();
        let report = lab(&flags);
        assert_eq!(report["passed"], true, "{flags:?}: {report:#}");
        assert_eq!(report["peer"], "kernel-seg6");
        assert_eq!(report["far"], report["nodes"]);
        let back = report["tcp_back"]["bytes"].as_u64().unwrap();
        assert!(back > 1 << 20, "{flags:?}: {back}");
    }
}

#[test]
fn a_lab_has_a_waypoint_of_either_kind() {
    if !require_root("a_lab_has_a_waypoint_of_either_kind") {
        return;
    }
    for peer in ["kersey", "kernel-seg6"] {
        // That the waypoint was passed is one of the checks.
        let report = lab(&["--nodes", "3", "--waypoint", "--dual-stack", "--peer", peer]);
        assert_eq!(report["passed"], true, "{peer}: {report:#}");
        assert_eq!(
            (&report["waypoint"], &report["far"]),
            (&true.into(), &2.into()),
            "{peer}"
        );
    }
}

#[test]
fn a_bench_measures_all_four_pairs() {
    if !require_root("a_bench_measures_all_four_pairs") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for mtu in ["1500", "9000"] {
        let report = bench(&folder.path().join(mtu), mtu);
        assert_eq!(report["baseline"], "kernel-seg6");
        let scenarios = report["scenarios"].as_array().unwrap();
        let gro: Vec<_> = scenarios.iter().map(|found| &found["underlay_gro"]).collect();
        assert_eq!(gro, ["on", "off"], "MTU {mtu}");
        for scenario in scenarios {
            let metrics = scenario["metrics"].as_array().unwrap();
            let tcp = metrics
                .iter()
                .find(|metric| metric["name"] == "TCP 1 stream, cubic" && metric["unit"] == "Gbit/s")
                .unwrap();
            for contestant in ["kernel-seg6", "kersey", "kersey-to-kernel", "kernel-to-kersey"] {
                let mut samples = tcp["samples"].as_array().unwrap().iter();
                let samples = samples.find(|pair| pair[0] == contestant).unwrap();
                let rate = samples[1][0].as_f64().unwrap();
                assert!(rate > 0.01, "MTU {mtu}, {contestant}: {rate}");
            }
        }
    }
}

/// The JSON report of a short lab.
fn lab(flags: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(["lab", "--backend", "srv6", "--duration", "0.3", "--json"])
        .args(flags)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{flags:?}: {error}\n{log}"))
}

/// The JSON report of a short bench.
fn bench(json: &Path, mtu: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(["bench", "vs-kernel", "--quick", "--backend", "srv6", "--mtu", mtu])
        .args([
            "--pairs",
            "1",
            "--seconds",
            "0.2",
            "--warmup",
            "0",
            "--streams",
            "1",
        ])
        .args(["--underlay-offloads", "off", "--underlay-gro", "on,off"])
        .arg("--json")
        .arg(json)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}
