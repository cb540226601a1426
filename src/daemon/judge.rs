//! What there is to say of a network config before a node lives by it: that none could, or that nobody reads some of its keys.
//!
//! Flannel ignores what it does not know, and so do we: a config may be newer than the node. But most such keys are misspelt, or another
//! backend's, and then the node does not do what it was asked for; so they are told.

use crate::addr::MacAddr;
use crate::backend::srv6::Srv6Node;
use crate::backend::{self, AnyBackend, Identity, select};
use crate::control::config::NetworkConfig;
use crate::daemon::report::Report;
use crate::lease::json::Object;
use crate::options::nearest;

/// How many are named; a config may be a megabyte of them.
const NAMED: usize = 8;
/// The longest network config there is; a longer one is refused elsewhere.
const MAX_BYTES: usize = 1 << 20;

/// Reads a config, and looks whether some node could run it.
pub(super) fn runnable(text: &str) -> Result<(NetworkConfig, AnyBackend), String> {
    let config = NetworkConfig::parse(text).map_err(|error| error.to_string())?;
    let anybody = Identity {
        mac: MacAddr::local([0; 6]),
        srv6: Srv6Node::default(),
    };
    let backend = select(config.backend.kind.as_deref(), &config.backend.json, anybody)
        .map_err(|error| error.to_string())?;
    Ok((config, backend))
}

/// Why no node could run by a network config, in one line, if that is so; what depends on the node itself is not looked at.
pub fn unusable(network_config: &str) -> Option<String> {
    runnable(network_config).err()
}

/// A sentence for each key of a network config that nobody reads, up to some. None if it is no config at all: that is told elsewhere.
pub fn unread(network_config: &str) -> Vec<String> {
    let Ok(config) = NetworkConfig::parse(network_config) else {
        return Vec::new();
    };
    let mut told = strangers(network_config, "", "a network config", NetworkConfig::KEYS);
    if let Some(kind) = &config.backend.kind
        && let Some(keys) = backend::keys(kind)
    {
        told.extend(strangers(&config.backend.json, "Backend.", kind, keys));
    }
    told.truncate(NAMED);
    told
}

/// Logs what nobody reads of a network config, once.
pub(super) fn tell_unread(network_config: &str, report: &Report) {
    if report.is_news("unread", network_config) {
        for note in unread(network_config) {
            tracing::warn!("network config: {note}");
        }
    }
}

fn strangers(json: &str, within: &str, reader: &str, known: &[&str]) -> Vec<String> {
    let Ok(object) = Object::parse(json, MAX_BYTES) else {
        return Vec::new();
    };
    let told = object.strangers(known).map(|key| {
        let hint = match nearest(key, known.iter().copied()) {
            Some(near) => format!("; did you mean {within}{near}?"),
            None => String::new(),
        };
        let key: String = key.chars().take(64).flat_map(char::escape_debug).collect();
        format!("{within}{key} is ignored: {reader} has no such key{hint}")
    });
    told.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_nobody_reads_are_told_with_what_may_have_been_meant() {
        for (config, told) in [
            (
                r#"{"network":"10.1.0.0/16","ENABLEIPV4":true,"Backend":{"type":"vxlan","vni":7}}"#,
                vec![],
            ),
            (
                r#"{"Network":"10.1.0.0/16","SubnetLength":24,"Backend":{"Type":"VXLAN","DirectRoutng":true,"Port":1}}"#,
                vec![
                    "SubnetLength is ignored: a network config has no such key; did you mean SubnetLen?",
                    "Backend.DirectRoutng is ignored: vxlan has no such key; did you mean Backend.DirectRouting?",
                ],
            ),
            (
                r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp","VNI":1}}"#,
                vec!["Backend.VNI is ignored: udp has no such key"],
            ),
            (
                r#"{"Network":"10.1.0.0/16","Comment\n":"ours"}"#,
                vec!["Comment\\n is ignored: a network config has no such key"],
            ),
            // Whatever it may have is not ours to know.
            (
                r#"{"Network":"10.1.0.0/16","Backend":{"Type":"ipip","DirectRouting":true}}"#,
                vec![],
            ),
            ("junk", vec![]),
        ] {
            assert_eq!(unread(config), told, "{config}");
        }
    }

    #[test]
    fn no_more_than_a_few_are_named() {
        let many: Vec<String> = (0..100).map(|n| format!(r#""x{n}":0"#)).collect();
        let config = format!(r#"{{"Network":"10.1.0.0/16",{}}}"#, many.join(","));
        assert_eq!(unread(&config).len(), NAMED);
    }

    #[test]
    fn whatever_a_backend_reads_is_known() {
        // Each with a value of a kind that nothing takes: who reads it, refuses it.
        for kind in ["udp", "vxlan", "srv6", "host-gw", "alloc", "auto"] {
            for key in [
                "VNI",
                "Port",
                "MTU",
                "GBP",
                "Learning",
                "DirectRouting",
                "Block",
                "LocatorLen",
                "Mode",
                "Domain",
                "Paths",
                "HMAC",
                "HMACKeyID",
            ] {
                let config =
                    format!(r#"{{"Network":"10.1.0.0/16","Backend":{{"Type":"{kind}","{key}":{{}}}}}}"#);
                let is_read = unusable(&config).is_some();
                assert_eq!(
                    backend::keys(kind).unwrap().contains(&key),
                    is_read,
                    "{kind} {key}"
                );
            }
        }
    }

    #[test]
    fn whatever_a_network_config_reads_is_known() {
        for key in NetworkConfig::KEYS {
            let config = format!(
                r#"{{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/56","{key}":[]}}"#
            );
            assert!(unusable(&config).is_some(), "{key} is not read");
        }
    }

    #[test]
    fn the_same_config_is_told_of_once() {
        let report = Report::for_tests();
        assert!(report.is_news("unread", "one") && !report.is_news("unread", "one"));
        assert!(report.is_news("held", "one") && report.is_news("unread", "two"));
        assert!(report.is_news("unread", "one"));
    }
}
