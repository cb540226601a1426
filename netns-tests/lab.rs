//! The lab itself: namespaces, links and traffic over a plain wire, and that nothing stays behind; then the commands
//! made of it.
//!
//! ```text
//!   node 1 eth0 192.0.2.1 --- br0 in the hub --- 192.0.2.2 eth0 node 2
//! ```

#![expect(
    clippy::unwrap_used,
    reason = "in the helpers of tests it says where a test failed"
)]

mod support;

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kersey::addr::Mtu;
use kersey::host::ethtool::Switch;
use kersey::lab::contestant::{self, Contestant};
use kersey::lab::interrupt::wait_until;
use kersey::lab::netns::Namespace;
use kersey::lab::topology::{HUB_V4, Plan, Wiring};
use kersey::lab::traffic::End;
use kersey::lab::traffic::latency;
use kersey::lab::traffic::loss_free::LossFree;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::probe::Probe;
use kersey::lab::traffic::tcp::{Bulk, Verified};
use kersey::lab::traffic::udp::Flood;
use support::require_root;

#[test]
fn nodes_and_hub_reach_one_another_in_both_families() {
    if !require_root("nodes_and_hub_reach_one_another_in_both_families") {
        return;
    }
    let lab = Plan::private("reach", 3).build().unwrap();
    for from in &lab.nodes {
        for to in &lab.nodes {
            for (from_addr, to_addr) in [
                (from.v4.into(), to.v4.into()),
                (from.v6.into(), IpAddr::from(to.v6)),
            ] {
                let report = Ping::default()
                    .run(End::new(&from.namespace, from_addr), to_addr)
                    .unwrap();
                assert!(report.all(), "{from_addr} to {to_addr}: {report:?}");
            }
        }
        let report = Ping::default().run(from.underlay(), HUB_V4.into()).unwrap();
        assert!(report.all(), "hub: {report:?}");
    }
}

#[test]
fn nobody_answers_for_an_address_that_is_not_there() {
    if !require_root("nobody_answers_for_an_address_that_is_not_there") {
        return;
    }
    let lab = Plan::private("nobody", 1).build().unwrap();
    let ping = Ping {
        count: 1,
        ..Ping::default()
    };
    let report = ping
        .run(lab.nodes[0].underlay(), "192.0.2.99".parse().unwrap())
        .unwrap();
    assert_eq!((report.sent, report.received), (1, 0));
}

#[test]
fn a_transfer_arrives_unchanged_with_offloads_on_and_off() {
    if !require_root("a_transfer_arrives_unchanged_with_offloads_on_and_off") {
        return;
    }
    for offloads in [Switch::On, Switch::Off] {
        let mut plan = Plan::private("verified", 2);
        plan.wiring = Wiring::Pair;
        plan.offloads = offloads;
        let lab = plan.build().unwrap();
        let transfer = Verified {
            bytes: (8 << 20) + 5,
            seed: 7,
            patience: Duration::from_secs(5),
        };
        let report = transfer
            .run(lab.nodes[0].underlay(), lab.nodes[1].underlay())
            .unwrap();
        assert!(report.intact, "offloads {offloads:?}: {report:?}");
        assert_eq!(report.bytes, transfer.bytes);
    }
}

#[test]
fn the_kernels_vxlan_carries_what_flannel_would_send_over_it() {
    if !require_root("the_kernels_vxlan_carries_what_flannel_would_send_over_it") {
        return;
    }
    let mut plan = Plan::private("vxlan", 2);
    plan.wiring = Wiring::Pair;
    let lab = plan.build().unwrap();
    contestant::add_kernel_vxlan(&lab).unwrap();
    let kersey = contestant::Kersey {
        backend: "udp".to_owned(),
        folder: "/nonexistent".into(),
        arguments: Vec::new(),
    };
    let running = contestant::start(Contestant::KernelVxlan, &lab, &kersey).unwrap();
    let (one, two) = running.ends(&lab).unwrap();
    let sizes = [56, 1450 - 28, 4000];
    for data_bytes in sizes {
        let ping = Ping {
            data_bytes,
            ..Ping::default()
        };
        let report = ping.run(one, two.addr).unwrap();
        assert!(report.all(), "{data_bytes} bytes: {report:?}");
    }
    let transfer = Verified {
        bytes: 4 << 20,
        seed: 3,
        patience: Duration::from_secs(5),
    };
    assert!(transfer.run(two, one).unwrap().intact);
}

#[test]
fn a_loop_that_only_copies_carries_packets_and_ends() {
    if !require_root("a_loop_that_only_copies_carries_packets_and_ends") {
        return;
    }
    let mut plan = Plan::private("copies", 2);
    plan.wiring = Wiring::Pair;
    let lab = plan.build().unwrap();
    let kersey = contestant::Kersey {
        backend: "udp".to_owned(),
        folder: "/nonexistent".into(),
        arguments: Vec::new(),
    };
    // Twice: the first has left nothing behind.
    for seed in [5, 6] {
        let running = contestant::start(Contestant::Copies, &lab, &kersey).unwrap();
        let (one, two) = running.ends(&lab).unwrap();
        let ping = Ping {
            data_bytes: 1472 - 28,
            ..Ping::default()
        };
        let report = ping.run(one, two.addr).unwrap();
        assert!(report.all(), "{report:?}");
        let transfer = Verified {
            bytes: 16 << 20,
            seed,
            patience: Duration::from_secs(5),
        };
        assert!(transfer.run(one, two).unwrap().intact);
    }
}

#[test]
fn every_measurement_measures() {
    if !require_root("every_measurement_measures") {
        return;
    }
    let mut plan = Plan::private("measure", 2);
    plan.mtu = Mtu::new(1400).unwrap();
    let lab = plan.build().unwrap();
    let (one, two) = (lab.nodes[0].underlay(), lab.nodes[1].underlay());
    let duration = Duration::from_millis(300);

    let bulk = Bulk {
        streams: 2,
        warmup: Duration::ZERO,
        duration,
        congestion: Some("cubic".into()),
    };
    let report = bulk.run(one, two).unwrap();
    assert!(
        report.bytes > 1 << 20 && report.stream_bytes.len() == 2,
        "{report:?}"
    );

    let flood = Flood {
        payload_bytes: 512,
        rate: Some(2000),
        duration,
    };
    let report = flood.run(one, two).unwrap();
    assert!((550..=650).contains(&report.counts.sent), "{report:?}");
    assert_eq!((report.counts.lost, report.counts.corrupted), (0, 0));

    let report = latency::measure(one, two, duration).unwrap();
    assert!(
        report.answered > 100 && report.p50_us <= report.p99_us,
        "{report:?}"
    );
}

#[test]
fn a_search_ends_below_what_a_wire_loses() {
    if !require_root("a_search_ends_below_what_a_wire_loses") {
        return;
    }
    let lab = Plan::private("search", 2).build().unwrap();
    let search = LossFree {
        payload_bytes: 64,
        trial: Duration::from_millis(100),
        start: 10_000,
        resolution: 0.5,
    };
    let report = search
        .run(lab.nodes[0].underlay(), lab.nodes[1].underlay())
        .unwrap();
    let (ndr, pdr) = (report.ndr.received_per_s, report.pdr.received_per_s);
    assert!(ndr.is_some_and(|rate| rate > 1000.0), "{report:#?}");
    assert!(pdr >= ndr.map(|rate| rate * 0.9), "{report:#?}");
    for trial in &report.trials {
        assert_eq!(
            trial.sent - trial.lost,
            (trial.received_per_s / trial.sent_per_s * trial.sent as f64).round() as u64,
            "{trial:?}"
        );
    }
}

#[test]
fn a_lab_passes_its_checks_with_every_backend() {
    if !require_root("a_lab_passes_its_checks_with_every_backend") {
        return;
    }
    let none = serde_json::Value::Null;
    for (backend, port, inner_mtu) in [
        ("udp", 8285.into(), 1452),
        ("vxlan", 8472.into(), 1430),
        ("host-gw", none.clone(), 1500),
    ] {
        let report = lab(&["--nodes", "3", "--backend", backend, "--dual-stack"]);
        assert_eq!(report["passed"], true, "{backend}: {report:#}");
        // Every ordered pair of three nodes, in two families.
        assert_eq!(report["pings"].as_array().unwrap().len(), 12, "{backend}");
        assert_eq!(report["inner_mtu"], inner_mtu, "{backend}");
        assert_eq!((&report["far"], &report["tcp_back"]), (&2.into(), &none));
        for status in report["status"].as_array().unwrap() {
            assert_eq!(status["backend"]["name"], backend);
            assert_eq!(status["backend"]["port"], port);
        }
    }
}

#[test]
fn a_lab_takes_the_kernel_as_its_last_node() {
    if !require_root("a_lab_takes_the_kernel_as_its_last_node") {
        return;
    }
    for flags in [&["--nodes", "2"][..], &["--nodes", "3", "--dual-stack"]] {
        let flags = [flags, &["--backend", "vxlan", "--peer", "kernel-vxlan"]].concat();
        let report = lab(&flags);
        assert_eq!(report["passed"], true, "{flags:?}: {report:#}");
        assert_eq!(report["peer"], "kernel-vxlan");
        assert_eq!(report["far"], report["nodes"]);
        let daemons = report["status"].as_array().unwrap();
        assert_eq!(
            daemons.len() + 1,
            usize::try_from(report["nodes"].as_u64().unwrap()).unwrap()
        );
        for transfer in report["transfers"].as_array().unwrap() {
            assert_eq!(transfer["intact"], true, "{flags:?}: {transfer}");
        }
        assert!(
            report["tcp_back"]["bytes"].as_u64().unwrap() > 1 << 20,
            "{flags:?}"
        );
    }
}

/// As with `| head`, or a terminal that was closed.
#[test]
fn a_lab_that_nobody_reads_takes_itself_down() {
    if !require_root("a_lab_that_nobody_reads_takes_itself_down") {
        return;
    }
    for flags in [&[][..], &["--json"]] {
        let folder = tempfile::tempdir().unwrap();
        let mut lab = Command::new(env!("CARGO_BIN_EXE_kersey"))
            .args(["lab", "--duration", "1"])
            .args(flags)
            .env("TMPDIR", folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (output, log) = (lab.stdout.take(), lab.stderr.take());
        drop((output, log));
        let prefix = format!("kersey-{}-", lab.id());
        let ended = lab.wait().unwrap();
        assert!(ended.code().is_some(), "{flags:?}: {ended}");
        assert_eq!(Namespace::names(&prefix).unwrap(), [] as [&str; 0], "{flags:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{flags:?}");
    }
}

/// A lab that was killed leaves daemons, namespaces and a folder behind, and `kersey lab down` takes them away.
#[test]
fn what_a_killed_lab_left_is_taken_down() {
    if !require_root("what_a_killed_lab_left_is_taken_down") {
        return;
    }
    if Path::new("/run/kersey-lab").exists() {
        assert!(std::env::var_os("CI").is_none(), "somebody's lab is up");
        eprintln!(
            "what_a_killed_lab_left_is_taken_down: skipped, since it would take down the lab that is up"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut lab = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(["lab", "--duration", "30"])
        .env("TMPDIR", folder.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let (prefix, mark) = (
        format!("kersey-{}-", lab.id()),
        format!("kersey-lab-{}-", lab.id()),
    );
    let daemons = || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        let lines = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
        lines
            .filter(|line| String::from_utf8_lossy(line).contains(&mark))
            .count()
    };
    assert!(
        wait_until(Duration::from_secs(20), || daemons() >= 2),
        "no daemons"
    );
    lab.kill().unwrap();
    lab.wait().unwrap();
    assert_eq!(Namespace::names(&prefix).unwrap().len(), 3);
    // Who but names the folder, as an editor does, is let be.
    let mut bystander = Command::new("sh")
        .args(["-c", "read line", &mark])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let down = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(["lab", "down"])
        .env("TMPDIR", folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&down.stdout).into_owned();
    assert!(down.status.success(), "{down:?}");
    let ended: Option<usize> = said.split(' ').nth(1).and_then(|count| count.parse().ok());
    assert!(ended >= Some(2) && said.contains(&prefix), "{said}");
    assert!(
        bystander.try_wait().unwrap().is_none(),
        "a process elsewhere was ended"
    );
    bystander.kill().unwrap();
    bystander.wait().unwrap();
    assert_eq!(daemons(), 0);
    assert_eq!(Namespace::names(&prefix).unwrap(), [] as [&str; 0]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_bench_over_vxlan_measures_mixed_pairs_too() {
    if !require_root("a_bench_over_vxlan_measures_mixed_pairs_too") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let output = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args([
            "bench",
            "vs-kernel",
            "--quick",
            "--backend",
            "vxlan",
            "--with-copies",
        ])
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
        .args(["--loss-free", "--trial-seconds", "0.1"])
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    for word in [
        "kersey to kernel",
        "kernel to kersey",
        "copies only",
        "UDP 1400 B, no loss",
    ] {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(report["backend"], "vxlan");
    let metrics = report["scenarios"][0]["metrics"].as_array().unwrap();
    let of = |name: &str, contestant: &str| -> Vec<f64> {
        let metric = metrics.iter().find(|metric| metric["name"] == name).unwrap();
        let samples = metric["samples"].as_array().unwrap();
        let samples = samples.iter().find(|pair| pair[0] == contestant).unwrap();
        let samples = samples[1].as_array().unwrap();
        samples.iter().filter_map(serde_json::Value::as_f64).collect()
    };
    for contestant in [
        "kernel-vxlan",
        "kersey",
        "kersey-to-kernel",
        "kernel-to-kersey",
        "copies",
    ] {
        let rates = of("TCP 1 stream, cubic", contestant);
        assert!(rates.len() == 1 && rates[0] > 0.01, "{contestant}: {rates:?}");
    }
    for contestant in ["kernel-vxlan", "kersey"] {
        let rates = of("UDP 64 B, ≤ 0.5 % lost", contestant);
        assert!(rates.len() == 1 && rates[0] > 100.0, "{contestant}: {rates:?}");
    }
    assert_eq!(of("UDP 64 B, no loss", "kersey-to-kernel"), [] as [f64; 0]);
}

#[test]
fn a_bench_over_srv6_is_measured_by_the_kernels_own() {
    if !require_root("a_bench_over_srv6_is_measured_by_the_kernels_own") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("bench.json");
    let output = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(["bench", "vs-kernel", "--quick", "--backend", "srv6"])
        .args(["--contender", "veth", "--mtu", "9000"])
        .args(["--underlay-offloads", "off", "--underlay-gro", "on,off"])
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
        .arg("--json")
        .arg(&json)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    for word in ["kernel seg6", "offloads off, GRO on", "offloads off, GRO off"] {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(report["baseline"], "kernel-seg6");
    for (scenario, gro) in report["scenarios"].as_array().unwrap().iter().zip(["on", "off"]) {
        assert_eq!(
            (&scenario["underlay_gro"], &scenario["underlay_offloads"]),
            (&gro.into(), &"off".into())
        );
        let metric = &scenario["metrics"][0];
        let samples = metric["samples"].as_array().unwrap();
        let names: Vec<_> = samples.iter().map(|pair| &pair[0]).collect();
        assert_eq!(names, ["kernel-seg6", "veth"]);
        for pair in samples {
            assert!(pair[1][0].as_f64().unwrap() > 0.01, "{metric}");
        }
    }
}

#[test]
fn impossible_labs_are_misuse() {
    for (flags, word) in [
        (&["--nodes", "1"][..], "--nodes 1: a lab has 2 to 200 nodes"),
        (&["--nodes", "300"], "--nodes 300"),
        (&["up", "--nodes", "0"], "--nodes 0"),
        (
            &["--peer", "kernel-vxlan"],
            "--peer kernel-vxlan cannot be had with --backend udp",
        ),
        (
            &["--peer", "kernel-seg6", "--backend", "vxlan"],
            "--peer kernel-seg6 cannot be had with --backend vxlan",
        ),
        (
            &["--waypoint", "--backend", "srv6"],
            "--waypoint cannot be had with --backend srv6 and 2 nodes",
        ),
        (
            &["--waypoint", "--nodes", "3"],
            "--waypoint cannot be had with --backend udp and 3 nodes",
        ),
        (
            &["--backend", "srv6", "--mtu", "1279"],
            "--mtu 1279: srv6 needs IPv6 on the underlay",
        ),
        (&["--backend", "carrier-pigeon"], "carrier-pigeon"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_kersey"))
            .arg("lab")
            .args(flags)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {text}");
        assert!(
            text.starts_with("error: ") && text.contains(word),
            "{flags:?}: {text}"
        );
    }
}

/// The JSON report of a short lab.
fn lab(flags: &[&str]) -> serde_json::Value {
    let output = Command::new(env!("CARGO_BIN_EXE_kersey"))
        .args(["lab", "--duration", "0.3", "--json"])
        .args(flags)
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{flags:?}: {error}\n{log}"))
}

#[test]
fn a_probe_sees_an_outage() {
    if !require_root("a_probe_sees_an_outage") {
        return;
    }
    let lab = Plan::private("probe", 2).build().unwrap();
    let probe = Probe::start(lab.nodes[0].underlay(), lab.nodes[1].underlay()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let hub = lab.hub.as_ref().unwrap();
    hub.netlink(async |netlink| Ok(netlink.set_down(netlink.link("p2").await?.index).await?))
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    hub.netlink(async |netlink| Ok(netlink.set_up(netlink.link("p2").await?.index).await?))
        .unwrap();
    let before = probe.received();
    assert!(wait_until(Duration::from_secs(5), || probe.received().0 >= before.0 + 100));
    let report = probe.stop().unwrap();

    assert!(report.longest_gap() >= Duration::from_millis(290), "{report:?}");
    assert!(report.longest_gap() < Duration::from_millis(2000), "{report:?}");
    assert!(report.lost() > 0 && report.corrupted() == 0, "{report:?}");
}

#[test]
fn a_process_lives_where_it_was_started() {
    if !require_root("a_process_lives_where_it_was_started") {
        return;
    }
    let lab = Plan::private("process", 1).build().unwrap();
    let mut command = Command::new("cat");
    command
        .arg("/proc/self/net/dev")
        .stdout(std::process::Stdio::piped());
    let output = lab.nodes[0]
        .namespace
        .spawn(&mut command)
        .unwrap()
        .wait_with_output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let names: Vec<_> = text
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next())
        .map(str::trim)
        .collect();
    assert_eq!(names, ["lo", "eth0"]);
}

#[test]
fn nothing_is_left_behind_even_if_building_fails() {
    if !require_root("nothing_is_left_behind_even_if_building_fails") {
        return;
    }
    let plan = Plan::private("gone", 2);
    let lab = plan.build().unwrap();
    assert_eq!(Namespace::names(&plan.prefix).unwrap().len(), 3);
    drop(lab);
    assert_eq!(Namespace::names(&plan.prefix).unwrap(), Vec::<String>::new());

    let _taken = Namespace::create(&format!("{}-2", plan.prefix)).unwrap();
    plan.build().unwrap_err();
    assert_eq!(
        Namespace::names(&plan.prefix).unwrap(),
        [format!("{}-2", plan.prefix)]
    );
}
