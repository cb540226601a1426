//! What is exposed, and what the shipped files make of it.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::daemon::report::Batches;
use crate::dataplane::stats::{BATCH_BOUNDS, BatchSizes, Call, DropReason};
use crate::status::Status;

fn sample() -> Sample {
    let mut status = Status {
        ready: true,
        ..Status::default()
    };
    status.backend.name = "vxlan".to_owned();
    status.backend.reason = "say \"why\"\n".to_owned();
    status.node.lease_expires_unix_s = Some(1_900_000_000);
    status.device.offloads = [("tun_tso", "on"), ("udp_gso", "off (kernel)")]
        .map(|(kind, state)| (kind.to_owned(), state.to_owned()))
        .into();
    status.counters = Count::ALL
        .iter()
        .map(|count| (count.name().to_owned(), 3))
        .collect();
    let peers = vec![PeerFigures {
        subnet: "10.244.7.0-24".parse().unwrap(),
        reachable: true,
        outbound_packets: 41,
        outbound_bytes: 0,
        inbound_packets: 0,
        inbound_bytes: 0,
        last_seen_unix_s: Some(1_800_000_000),
        narrow_mtu: Some(1300),
    }];
    status.rejected_leases.insert("overlap".to_owned(), 1);
    let mut sizes = BatchSizes::default();
    (sizes[0], sizes[6], sizes[BATCH_BOUNDS.len()]) = (5, 2, 1);
    Sample {
        status,
        peers,
        batches: ["outbound", "inbound"]
            .map(|direction| Batches {
                direction,
                sizes,
                packets: 5133,
            })
            .to_vec(),
        calls: Call::ALL.iter().map(|call| (*call, 6)).collect(),
        lease_conflicts: 7,
        drops: DropReason::ALL
            .iter()
            .map(|reason| (*reason, "inbound", 5))
            .collect(),
        store_errors: 2,
        route_updates: 9,
    }
}

#[test]
fn every_counter_and_every_drop_reason_is_there() {
    let process = Process {
        reloads: [4, 1],
        sandbox: vec![("seccomp".to_owned(), "on".to_owned())],
        firewall_helper: Some(false),
        ..Process::default()
    };
    let text = render(process, vec![("_".to_owned(), sample())]);
    for line in [
        r#"kersey_ready{network="_"} 1.0"#,
        r#"kersey_backend_info{network="_",backend="vxlan",reason="say \"why\"\n"} 1.0"#,
        r#"kersey_lease_expiry_timestamp_seconds{network="_"} 1900000000.0"#,
        r#"kersey_peer_tx_packets_total{network="_",peer="10.244.7.0/24"} 41"#,
        r#"kersey_peers{network="_",state="reachable"} 1.0"#,
        r#"kersey_tun_offload_enabled{network="_",kind="udp_gso"} 0.0"#,
        r#"kersey_socket_overflow_total{network="_"} 3"#,
        r#"kersey_gso_fallbacks_total{network="_"} 3"#,
        r#"kersey_store_up{network="_"} 0.0"#,
        r#"kersey_store_errors_total{network="_"} 2"#,
        r#"kersey_config_reloads_total{result="refused"} 1"#,
        r#"kersey_sandbox_enabled{part="seccomp"} 1.0"#,
        r#"kersey_firewall_helper_up 0.0"#,
        r#"kersey_lease_conflicts_total{network="_"} 7"#,
        r#"kersey_routes{network="_"} 1.0"#,
        r#"kersey_route_updates_total{network="_"} 9"#,
        r#"kersey_peer_path_mtu_bytes{network="_",peer="10.244.7.0/24"} 1300.0"#,
        r#"kersey_peer_last_seen_timestamp_seconds{network="_",peer="10.244.7.0/24"} 1800000000.0"#,
        r#"kersey_syscalls_total{network="_",call="recvmmsg"} 6"#,
        r#"kersey_batch_packets_bucket{le="1.0",network="_",direction="inbound"} 5"#,
        r#"kersey_batch_packets_bucket{le="32.0",network="_",direction="inbound"} 5"#,
        r#"kersey_batch_packets_bucket{le="4096.0",network="_",direction="outbound"} 7"#,
        r#"kersey_batch_packets_bucket{le="+Inf",network="_",direction="outbound"} 8"#,
        r#"kersey_batch_packets_sum{network="_",direction="outbound"} 5133.0"#,
        r#"kersey_batch_packets_count{network="_",direction="outbound"} 8"#,
    ] {
        assert!(text.lines().any(|have| have == line), "{line}\n{text}");
    }
    for reason in DropReason::ALL {
        let name = reason.name();
        let line = format!(r#"kersey_drops_total{{network="_",reason="{name}",direction="inbound"}} 5"#);
        assert!(text.contains(&line), "{line}");
    }
    assert!(text.ends_with("# EOF\n"));
}

/// Name, labels, value.
type Line<'a> = (&'a str, Vec<(&'a str, String)>, f64);

/// A line of text that is a sample.
fn parse_sample(line: &str) -> Option<Line<'_>> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, quoted) = rest.split_once("=\"")?;
            let mut value = String::new();
            let mut chars = quoted.char_indices();
            let closed = loop {
                match chars.next()? {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next()?.1 {
                        'n' => value.push('\n'),
                        escaped @ ('"' | '\\') => value.push(escaped),
                        _ => return None,
                    },
                    (_, c) => value.push(c),
                }
            };
            labels.push((label, value));
            rest = quoted[closed + 1..].trim_start_matches(',');
        }
        rest = &rest[1..];
    }
    let value = rest.strip_prefix(' ')?;
    Some((name, labels, value.parse().ok()?))
}

/// What of a text is not as OpenMetrics wants it: the rules of its specification that a mistake of ours could break.
fn faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let Some(body) = text.strip_suffix("# EOF\n") else {
        return vec!["no end".to_owned()];
    };
    let well_formed = |name: &str| {
        !name.starts_with(|c: char| c.is_ascii_digit())
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let (mut families, mut described, mut series) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let mut current = ("", "");
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap_or((rest, ""));
            if help.is_empty() || !described.insert(name) {
                faults.push(format!("described twice, or not at all: {line}"));
            }
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            current = rest.split_once(' ').unwrap_or((rest, ""));
            let (name, kind) = current;
            let known = ["counter", "gauge", "histogram"].contains(&kind);
            if !known
                || !described.contains(name)
                || families.insert(name, kind).is_some()
                || !well_formed(name)
            {
                faults.push(format!("no family: {line}"));
            }
            if ["_total", "_count", "_sum", "_bucket"]
                .iter()
                .any(|end| name.ends_with(end))
            {
                faults.push(format!("a suffix of samples: {line}"));
            }
        } else if let Some((name, labels, value)) = parse_sample(line) {
            let suffixes: &[&str] = match current.1 {
                "counter" => &["_total"],
                "histogram" => &["_sum", "_count", "_bucket"],
                _ => &[""],
            };
            if !suffixes
                .iter()
                .any(|end| name.strip_prefix(current.0) == Some(end))
            {
                faults.push(format!("not of {}: {line}", current.0));
            }
            let names: BTreeSet<_> = labels.iter().map(|(label, _)| *label).collect();
            if names.len() != labels.len() || !names.iter().all(|label| well_formed(label)) {
                faults.push(format!("labels: {line}"));
            }
            if !series.insert((name, labels)) {
                faults.push(format!("twice: {line}"));
            }
            if current.1 != "gauge" && (value.is_nan() || value < 0.0) {
                faults.push(format!("less than nothing: {line}"));
            }
        } else {
            faults.push(format!("neither sample nor description: {line}"));
        }
    }
    faults
}

#[test]
fn the_text_is_valid_open_metrics() {
    let other = Sample {
        status: Status::default(),
        peers: Vec::new(),
        ..sample()
    };
    let process = Process {
        sandbox: vec![("seccomp".to_owned(), "on".to_owned())],
        firewall_helper: Some(false),
        kernel: "6.1 \"x\" \\ \n".to_owned(),
        ..Process::default()
    };
    let text = render(
        process,
        vec![("_".to_owned(), sample()), ("blue".to_owned(), other)],
    );
    assert_eq!(faults(&text), Vec::<String>::new(), "{text}");
    // And it is not valid whatever it is.
    for (what, instead) in [
        ("kersey_ready{network=\"blue\"}", "kersey_ready{network=\"_\"}"),
        ("kersey_drops_total{", "kersey_drops{"),
        ("# TYPE kersey_routes gauge\n", ""),
        ("# TYPE kersey_routes gauge", "# TYPE kersey_ready gauge"),
        ("\\\"why\\\"", "\"why\""),
        ("# EOF\n", ""),
    ] {
        assert_ne!(
            faults(&text.replace(what, instead)),
            Vec::<String>::new(),
            "{what}"
        );
    }
}

#[test]
fn names_have_the_prefix() {
    let text = render(Process::default(), vec![("_".to_owned(), sample())]);
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names: Vec<_> = types.filter_map(|line| line.split(' ').next()).collect();
    assert!(names.iter().all(|name| name.starts_with("kersey_")), "{names:?}");
    assert!(names.len() > 40, "{names:?}");
}

/// Names and labels of all series there are.
fn exposed() -> BTreeMap<String, BTreeSet<String>> {
    let process = Process {
        sandbox: vec![("seccomp".to_owned(), "on".to_owned())],
        firewall_helper: Some(false),
        ..Process::default()
    };
    let text = render(process, vec![("_".to_owned(), sample())]);
    let mut exposed = BTreeMap::<String, BTreeSet<String>>::new();
    for (name, labels, _) in text.lines().filter_map(parse_sample) {
        let names = exposed.entry(name.to_owned()).or_default();
        names.extend(labels.iter().map(|(label, _)| (*label).to_owned()));
    }
    exposed
}

/// The metrics an expression names, each with what it says of labels: `name="value"` and the like.
fn used(expression: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut used = Vec::new();
    for (at, _) in expression.match_indices("kersey_") {
        let name: String = expression[at..]
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect();
        let mut matchers = Vec::new();
        let rest = &expression[at + name.len()..];
        if let Some((inside, _)) = rest.strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            for matcher in inside.split(',') {
                let (label, value) = matcher.split_once('=').unwrap();
                matchers.push((label.to_owned(), value.trim_matches(['~', '"']).to_owned()));
            }
        }
        used.push((name, matchers));
    }
    used
}

/// Asserts that a file's expressions name nothing that is not there, and gives the metrics they name.
fn assert_exists<'a>(file: &str, expressions: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let exposed = exposed();
    let mut names = BTreeSet::new();
    for expression in expressions {
        let used = used(expression);
        assert!(!used.is_empty(), "{file}: {expression}");
        for (name, matchers) in used {
            let labels = exposed
                .get(&name)
                .unwrap_or_else(|| panic!("{file}: there is no {name}: {expression}"));
            for (label, value) in matchers {
                // Prometheus adds the first.
                assert!(
                    label == "instance" || labels.contains(&label),
                    "{file}: {name} has no {label}"
                );
                let reasons = value
                    .split('|')
                    .filter(|_| name == "kersey_drops_total" && label == "reason");
                for reason in reasons {
                    let known = DropReason::ALL.iter().any(|known| known.name() == reason);
                    assert!(known, "{file}: nothing is dropped for {reason}");
                }
            }
            names.insert(name);
        }
    }
    names
}

#[test]
fn the_alerts_are_about_metrics_there_are() {
    let file = include_str!("../../../configs/prometheus/alerts.yml");
    let lines = file.lines().map(str::trim_start);
    let expressions: Vec<_> = lines
        .clone()
        .filter_map(|line| line.strip_prefix("expr: "))
        .collect();
    let alerts: BTreeSet<_> = lines.filter_map(|line| line.strip_prefix("- alert: ")).collect();
    assert_eq!(
        (alerts.len(), expressions.len()),
        (12, 12),
        "names of their own, and a line each"
    );
    assert_exists("alerts.yml", expressions.into_iter());
}

#[test]
fn the_dashboard_shows_metrics_there_are() {
    let file = include_str!("../../../configs/grafana/kersey.json");
    let dashboard: serde_json::Value = serde_json::from_str(file).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let targets = panels
        .iter()
        .flat_map(|panel| panel["targets"].as_array().unwrap());
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let queries = variables
        .iter()
        .filter_map(|variable| variable["definition"].as_str());
    let shown = assert_exists(
        "kersey.json",
        targets
            .map(|target| target["expr"].as_str().unwrap())
            .chain(queries),
    );
    for wanted in [
        "kersey_batch_packets_bucket",
        "kersey_syscalls_total",
        "kersey_peer_last_seen_timestamp_seconds",
    ] {
        assert!(shown.contains(wanted), "{wanted}");
    }
}

#[test]
fn a_process_without_a_network_still_has_metrics() {
    let text = render(Process::default(), Vec::new());
    assert!(text.contains("kersey_build_info{version="), "{text}");
}
