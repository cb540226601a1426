//! Flags given by environment variables: `KERSEY_X`, else flannel's `FLANNELD_X`, for each flag not on the command
//! line. Names that look like ours and are not are pointed out: flannel's users often forget the D.

use std::collections::{BTreeMap, BTreeSet};

use super::go_flags::{Grammar, Setting};
use crate::options::nearest;

/// The environment as far as we read it.
pub(super) type Variables = BTreeMap<String, String>;

/// A flag set by a variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FromVariable {
    /// The flag and its value.
    pub(super) setting: Setting,
    /// The variable's name.
    pub(super) variable: String,
}

/// Flags no variable can set.
const COMMAND_LINE_ONLY: [&str; 2] = ["help", "version"];

/// Names with our prefixes that other programs write: the contents of subnet.env, which units often import whole.
const SUBNET_ENV: [&str; 6] = [
    "FLANNEL_NETWORK",
    "FLANNEL_SUBNET",
    "FLANNEL_IPV6_NETWORK",
    "FLANNEL_IPV6_SUBNET",
    "FLANNEL_MTU",
    "FLANNEL_IPMASQ",
];

/// What the prefix was called in CentOS' /etc/sysconfig/flanneld once, which flags for a private key resemble.
const OF_OLD: &str = "ETCD_KEY";

/// Finds the flags that variables set and the command line (`given`) does not. Empty values count as unset.
pub(super) fn settings(grammar: &Grammar, given: &[Setting], variables: &Variables) -> Vec<FromVariable> {
    let given: BTreeSet<&str> = given.iter().map(|setting| setting.name.as_str()).collect();
    grammar
        .names()
        .filter(|name| !given.contains(name) && !COMMAND_LINE_ONLY.contains(name))
        .filter_map(|name| {
            ["KERSEY_", "FLANNELD_"].iter().find_map(|prefix| {
                let variable = format!("{prefix}{}", suffix(name));
                let value = variables.get(&variable).filter(|value| !value.is_empty())?;
                Some(FromVariable {
                    setting: Setting::new(name, value),
                    variable,
                })
            })
        })
        .collect()
}

/// One sentence for each variable that seems meant for us and sets nothing.
pub(super) fn near_misses(grammar: &Grammar, variables: &Variables) -> Vec<String> {
    let known: BTreeSet<String> = grammar
        .names()
        .filter(|name| !COMMAND_LINE_ONLY.contains(name))
        .flat_map(|name| {
            [
                format!("KERSEY_{}", suffix(name)),
                format!("FLANNELD_{}", suffix(name)),
            ]
        })
        .collect();
    variables
        .iter()
        .filter(|(name, value)| {
            !value.is_empty() && !known.contains(*name) && !SUBNET_ENV.contains(&name.as_str())
        })
        .filter_map(|(name, _)| {
            let (prefix, rest) = ours(name)?;
            if is_service_link(rest) {
                return None;
            }
            let flags = grammar.names().filter(|flag| !COMMAND_LINE_ONLY.contains(flag));
            let rest = if rest == OF_OLD { "ETCD_PREFIX" } else { rest };
            Some(match nearest(rest, flags) {
                Some(flag) => format!(
                    "the environment variable {name} has no effect; did you mean {prefix}_{}?",
                    suffix(flag)
                ),
                None => format!("the environment variable {name} has no effect: no flag has that name"),
            })
        })
        .collect()
}

/// The part of a flag's variable after the prefix.
fn suffix(flag: &str) -> String {
    flag.to_ascii_uppercase().replace('-', "_")
}

/// Splits a variable's name if it begins like ours: the prefix it should have had, and the rest.
fn ours(name: &str) -> Option<(&'static str, &str)> {
    [
        ("FLANNELD_", "FLANNELD"),
        ("FLANNEL_", "FLANNELD"),
        ("KERSEYD_", "KERSEY"),
        ("KERSEY_", "KERSEY"),
    ]
    .into_iter()
    .find_map(|(written, meant)| Some((meant, name.strip_prefix(written)?)))
}

/// Whether Kubernetes or Docker put the variable there for a service called flannel or kersey.
fn is_service_link(rest: &str) -> bool {
    rest == "PORT"
        || rest.starts_with("PORT_")
        || rest.contains("SERVICE_HOST")
        || rest.contains("SERVICE_PORT")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_sets_a_flag_that_is_not_on_the_command_line() {
        let found = settings(
            &grammar(),
            &[Setting::new("iface", "eth0")],
            &variables(&[
                ("FLANNELD_ETCD_PREFIX", "/a"),
                ("FLANNELD_IFACE", "eth1"),
                ("FLANNELD_V", ""),
            ]),
        );
        assert_eq!(
            found,
            [FromVariable {
                setting: Setting::new("etcd-prefix", "/a"),
                variable: "FLANNELD_ETCD_PREFIX".into(),
            }]
        );
    }

    #[test]
    fn kerseys_own_prefix_wins_unless_empty() {
        let both = variables(&[("FLANNELD_V", "1"), ("KERSEY_V", "2")]);
        assert_eq!(settings(&grammar(), &[], &both)[0].variable, "KERSEY_V");
        let empty = variables(&[("FLANNELD_V", "1"), ("KERSEY_V", "")]);
        assert_eq!(settings(&grammar(), &[], &empty)[0].variable, "FLANNELD_V");
    }

    #[test]
    fn the_version_flag_has_no_variable() {
        assert_eq!(
            settings(&grammar(), &[], &variables(&[("FLANNELD_VERSION", "true")])),
            []
        );
    }

    #[test]
    fn near_misses_are_pointed_out() {
        for (name, expected) in [
            ("FLANNEL_ETCD_PREFIX", "did you mean FLANNELD_ETCD_PREFIX?"),
            ("FLANNEL_ETCD_KEY", "did you mean FLANNELD_ETCD_PREFIX?"),
            ("FLANNELD_ETCD_PREFX", "did you mean FLANNELD_ETCD_PREFIX?"),
            ("FLANNELD_ETCD_ENDPOINT", "did you mean FLANNELD_ETCD_ENDPOINTS?"),
            ("KERSEY_IFASE", "did you mean KERSEY_IFACE?"),
            ("KERSEY_SOMETHING_ELSE", "no flag has that name"),
            ("FLANNELD_VERSION", "no flag has that name"),
        ] {
            let notices = near_misses(&grammar(), &variables(&[(name, "x")]));
            assert_eq!(notices.len(), 1, "{name}");
            assert!(
                notices[0].contains(name) && notices[0].contains(expected),
                "{name}: {}",
                notices[0]
            );
        }
    }

    #[test]
    fn other_programs_variables_are_left_alone() {
        let quiet = [
            "FLANNELD_ETCD_PREFIX",
            "FLANNEL_SUBNET",
            "FLANNEL_MTU",
            "KERSEY_PORT",
            "KERSEY_PORT_8080_TCP_ADDR",
            "FLANNEL_SERVICE_HOST",
            "PATH",
        ];
        for name in quiet {
            let notices = near_misses(&grammar(), &variables(&[(name, "x")]));
            assert!(notices.is_empty(), "{name}: {notices:?}");
        }
    }

    fn grammar() -> Grammar {
        let flag = |name| clap::Arg::new(name).long(name);
        Grammar::of(
            &clap::Command::new("x")
                .args(["etcd-prefix", "etcd-keyfile", "iface", "v", "version"].map(flag))
                .arg(flag("etcd-endpoints").alias("etcd-endpoint")),
        )
    }

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }
}
