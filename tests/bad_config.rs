//! B1: network configs that cannot be. Each is refused in one line that names field, value and rule, by the same way a
//! daemon's start takes; none costs more than a moment.

#![expect(clippy::disallowed_methods, reason = "a test measures")]

use std::process::Command;
use std::time::{Duration, Instant};

use kersey::daemon::unusable;

/// Config, then what the one line must say: field, value, rule.
type Row = (&'static str, [&'static str; 3]);

const WITH_BACKEND: &str = r#"{"Network":"10.1.0.0/16","Backend":"#;

const ROWS: &[Row] = &[
    // Missing.
    (r#"{}"#, ["Network", "missing", "must be given"]),
    (r#"{"SubnetLen":24}"#, ["Network", "missing", "must be given"]),
    (
        r#"{"Network":"10.1.0.0/16","EnableIPv6":true}"#,
        ["IPv6Network", "missing", "must be given"],
    ),
    (
        r#"{"EnableIPv4":false,"EnableIPv6":true}"#,
        ["IPv6Network", "missing", "must be given"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{}}"#,
        ["Backend.Type", "missing", "must name a backend"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":null}}"#,
        ["Backend.Type", "missing", "must name a backend"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":""}}"#,
        ["Backend.Type", "missing", "must name a backend"],
    ),
    // Wrong type.
    (r#"{"Network":10}"#, ["Network", "10", "in quotes"]),
    (r#"{"Network":null}"#, ["Network", "null", "IPv4 network"]),
    (r#"{"Network":["10.1.0.0/16"]}"#, ["Network", "[", "in quotes"]),
    (r#"{"Network":{"a":1}}"#, ["Network", "{", "in quotes"]),
    (r#"{"Network":true}"#, ["Network", "true", "in quotes"]),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":"24"}"#,
        ["SubnetLen", "24", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":24.0}"#,
        ["SubnetLen", "24.0", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":2e1}"#,
        ["SubnetLen", "2e1", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":true}"#,
        ["SubnetLen", "true", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMin":10}"#,
        ["SubnetMin", "10", "IPv4 address"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMax":null}"#,
        ["SubnetMax", "null", "IPv4 address"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","EnableIPv4":"yes"}"#,
        ["EnableIPv4", "yes", "true or false"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","EnableIPv6":1}"#,
        ["EnableIPv6", "1", "true or false"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","EnableNFTables":"on"}"#,
        ["EnableNFTables", "on", "true or false"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":"udp"}"#,
        ["Backend", "udp", "object"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":null}"#,
        ["Backend", "null", "object"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":1}}"#,
        ["Type", "1", "string"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":"1"}}"#,
        ["VNI", "1", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","DirectRouting":1}}"#,
        ["DirectRouting", "1", "true or false"],
    ),
    // Not what it should be.
    (r#"{"Network":""}"#, ["Network", "\"\"", "IPv4 network"]),
    (
        r#"{"Network":"10.1.0.0"}"#,
        ["Network", "10.1.0.0", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.1.0.0/33"}"#,
        ["Network", "10.1.0.0/33", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.1.0.0/-1"}"#,
        ["Network", "10.1.0.0/-1", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.1.0/16"}"#,
        ["Network", "10.1.0/16", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.1.0.256/16"}"#,
        ["Network", "10.1.0.256/16", "IPv4 network"],
    ),
    (
        r#"{"Network":"010.1.0.0/16"}"#,
        ["Network", "010.1.0.0/16", "IPv4 network"],
    ),
    (
        r#"{"Network":"fd00::/48"}"#,
        ["Network", "fd00::/48", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.１.0.0/16"}"#,
        ["Network", "10.１.0.0/16", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.1.0.0/16 ; rm -rf /"}"#,
        ["Network", "rm -rf", "IPv4 network"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"10.2.0.0/16"}"#,
        ["IPv6Network", "10.2.0.0/16", "IPv6 network"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMin":"fd00::"}"#,
        ["SubnetMin", "fd00::", "IPv4 address"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","EnableIPv4":false}"#,
        ["EnableIPv4", "false", "at least one"],
    ),
    // Out of range.
    (
        r#"{"Network":"10.1.0.0/31"}"#,
        ["Network", "10.1.0.0/31", "/28 or shorter"],
    ),
    (
        r#"{"Network":"10.1.0.0/29"}"#,
        ["Network", "10.1.0.0/29", "/28 or shorter"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":31}"#,
        ["SubnetLen", "31", "30 at most"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":4294967295}"#,
        ["SubnetLen", "4294967295", "30 at most"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":4294967296}"#,
        ["SubnetLen", "4294967296", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":-1}"#,
        ["SubnetLen", "-1", "without sign"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":99999999999999999999999999}"#,
        ["SubnetLen", "99999", "whole number"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":16}"#,
        ["SubnetLen", "16", "at least 18"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetLen":8}"#,
        ["SubnetLen", "8", "at least 18"],
    ),
    (
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":127}"#,
        ["IPv6SubnetLen", "127", "126 at most"],
    ),
    (
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/125"}"#,
        ["IPv6Network", "fd00::/125", "/124 or shorter"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMin":"10.2.0.0"}"#,
        ["SubnetMin", "10.2.0.0", "must lie in the network"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMax":"10.2.0.0"}"#,
        ["SubnetMax", "10.2.0.0", "must lie in the network"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.5.1"}"#,
        ["SubnetMin", "10.1.5.1", "base address"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMax":"10.1.5.128"}"#,
        ["SubnetMax", "10.1.5.128", "base address"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.9.0","SubnetMax":"10.1.8.0"}"#,
        ["SubnetMin", "10.1.9.0", "must not be above"],
    ),
    (
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00::1"}"#,
        ["IPv6SubnetMin", "fd00::1", "base address"],
    ),
    // Backends.
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"wireguard"}}"#,
        ["backend", "wireguard", "it has auto, udp"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}"#,
        ["Backend.VNI", "16777216", "from 0 to 16777215"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":-1}}"#,
        ["VNI", "-1", "without sign"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","Port":65536}}"#,
        ["Backend.Port", "65536", "from 1 to 65535"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp","Port":65536}}"#,
        ["Backend.Port", "65536", "from 1 to 65535"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp","Port":-1}}"#,
        ["Port", "-1", "without sign"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","MTU":10}}"#,
        ["Backend.MTU", "10", "an MTU is from"],
    ),
    (
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","MTU":70000}}"#,
        ["Backend.MTU", "70000", "to 65535"],
    ),
    // The last of two counts, to flannel too.
    (
        r#"{"Network":"10.1.0.0/16","network":"x"}"#,
        ["Network", "x", "IPv4 network"],
    ),
    // Documents that are none.
    ("", ["network config", "JSON", "line 1"]),
    ("null", ["network config", "JSON", "line 1"]),
    ("[]", ["network config", "JSON", "line 1"]),
    ("\"10.1.0.0/16\"", ["network config", "JSON", "line 1"]),
    (
        r#"{"Network":"10.1.0.0/16"} x"#,
        ["network config", "JSON", "trailing"],
    ),
    (r#"{"Network":"10.1.0.0/16""#, ["network config", "JSON", "EOF"]),
    (
        r#"{"Network":"10.1.0.0/16",}"#,
        ["network config", "JSON", "line 1"],
    ),
    (
        r#"{"Network":"10.1.0.0/16" /* no */}"#,
        ["network config", "JSON", "line 1"],
    ),
    (
        "\u{feff}{\"Network\":\"10.1.0.0/16\"}",
        ["network config", "JSON", "line 1"],
    ),
    (
        "{\"Network\":\"10.1.0.0/16\u{0}\"}",
        ["network config", "JSON", "control character"],
    ),
];

#[test]
fn every_bad_config_gets_one_line_with_field_value_and_rule() {
    assert!(ROWS.len() >= 60);
    for (text, parts) in ROWS {
        let line = unusable(text).unwrap_or_else(|| panic!("{text} is taken"));
        for part in parts {
            assert!(line.contains(part), "{text}: {line} lacks {part:?}");
        }
        assert!(
            !line.contains(|c: char| c.is_control()) && line.len() < 400,
            "{text}: {line:?}"
        );
    }
}

#[test]
fn huge_and_deep_configs_are_refused_in_a_moment() {
    let padding = " ".repeat(10 << 20);
    let deep = |open: &str, close: &str| format!("{}{}", open.repeat(10_000), close.repeat(10_000));
    for (text, part) in [
        (
            format!("{{\"Network\":\"10.1.0.0/16\"{padding}}}"),
            "bytes of JSON where at most 1048576",
        ),
        (format!("{{\"x\":{}}}", deep("[", "]")), "deeper than"),
        (format!("{{\"Network\":{}}}", deep("{\"a\":", "}")), "deeper than"),
        (format!("{WITH_BACKEND}{}}}", deep("[", "]")), "deeper than"),
        (format!("{{\"Network\":\"{}\"}}", "1".repeat(100_000)), "Network"),
        (
            format!("{{\"Network\":\"{}\"}}", "\\n\\u001b[31m".repeat(50)),
            "Network",
        ),
    ] {
        let start = Instant::now();
        let line = unusable(&text).unwrap_or_else(|| panic!("{text:.60} is taken"));
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{text:.60}: {:?}",
            start.elapsed()
        );
        assert!(line.contains(part), "{text:.60}: {line:.300}");
        assert!(
            line.len() < 400 && !line.contains(|c: char| c.is_control()),
            "{line:.500?}"
        );
    }
}

#[test]
fn what_flannel_takes_is_taken() {
    for text in [
        r#"{"Network":"10.1.0.0/16"}"#,
        r#"{"network":"10.1.5.7/16","Comment":"unknown keys are ignored"}"#,
        r#"{"Network":"10.9.0.0/16","network":"10.1.0.0/16"}"#,
        r#"{"Network":"10.1.0.0/16","SubnetLen":0}"#,
        r#"{"Network":"10.1.0.0/16","SubnetLen":null,"SubnetMin":"10.1.0.0","SubnetMax":"10.1.0.0"}"#,
        r#"{"Network":"10.1.0.0/16","Backend":{"Type":"VXLAN","vni":0,"port":0,"directrouting":true}}"#,
        r#"{"Network":"10.0.0.0/8","SubnetLen":20,"SubnetMin":"10.10.0.0","SubnetMax":"10.99.0.0","Backend":{"Type":"udp","Port":7890}}"#,
        " \n{\"Network\":\"10.1.0.0/16\"}\n",
    ] {
        assert_eq!(unusable(text), None, "{text}");
    }
}

/// What nobody reads is ignored, as flannel does, and told.
#[test]
fn a_misspelt_key_of_a_network_config_is_told_and_no_error() {
    let text = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","Prot":4789}}"#;
    let check = kersey()
        .args(["config", "check", "--network-config", text])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert_eq!(check.status.code(), Some(0), "{said}");
    assert_eq!(
        said,
        "warning: Backend.Prot is ignored: vxlan has no such key; did you mean Backend.Port?\n"
    );
}

/// The same on the command line: `kersey config check`, and a daemon that would keep the leases, with its exit status.
#[test]
fn a_bad_config_is_status_4_before_anything_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    for (text, part) in [
        ("{}", "Network is missing"),
        (r#"{"Network":"10.1.0.0/16","SubnetLen":31}"#, "SubnetLen is 31"),
        (r#"{"Network":"10.1.0.0/16","Backend":{"Type":"ipsec"}}"#, "ipsec"),
    ] {
        let check = kersey()
            .args(["config", "check", "--network-config", text])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&check.stderr).into_owned();
        assert_eq!(check.status.code(), Some(4), "{text}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(part), "{said}");
    }
    let serve = kersey()
        .args([
            "server",
            "--listen=127.0.0.1:0",
            "--network-config={\"Network\":\"10.1.0.0/31\"}",
        ])
        .arg(format!("--data-dir={}", data.display()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&serve.stderr).into_owned();
    assert_eq!(serve.status.code(), Some(4), "{said}");
    assert!(
        said.contains("Network is 10.1.0.0/31: must be /28 or shorter"),
        "{said}"
    );
    // The directory is made for the sandbox, which comes first.
    assert_eq!(std::fs::read_dir(&data).map_or(0, Iterator::count), 0);
}

fn kersey() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command.env_clear();
    command
}
