//! Rules as nft tables: one a network and family, of flannel's names.
//!
//! A table is written whole, in one transaction that takes the old one away: there is no moment without rules, and nothing an earlier life
//! or a flannel left in it stays. What the kernel shows of a table right after it was written is kept, and a table that shows anything else
//! later was changed by somebody.
//!
//! Differences from flannel's own tables, each a mistake there: rule 4 of `postrtg` says "*to our subnet*", as flannel's iptables rules do,
//! where its nft rules say "not from our subnet, to the network", so that rule 6 never applied; the mark of kube-proxy is one bit, not the
//! whole mark; there is a table only of a family that the network has.

use crate::host::firewall::rules::{
    FORWARD_COMMENT, GUARD_COMMENT, Guard, MASQ_COMMENT, Masquerade, RuleSet, family_of, multicast,
};
use crate::host::firewall::tool::{Family, Invocation, Tool, ToolError};

/// A base chain at the forward hook, as nft lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ForwardChain {
    /// Family of its table: `ip`, `ip6`, `inet`.
    pub(super) family: String,
    /// Its table.
    pub(super) table: String,
    /// Its name.
    pub(super) chain: String,
    /// Whether what no rule of it accepts is dropped.
    pub(super) drops: bool,
}

impl ForwardChain {
    /// Whether it is the `FORWARD` chain of iptables for `family`.
    pub(super) fn is_iptables(&self, family: Family) -> bool {
        self.family == keyword(family) && self.table == "filter" && self.chain == "FORWARD"
    }

    /// Whether packets of `family` pass it.
    pub(super) fn sees(&self, family: Family) -> bool {
        self.family == "inet" || self.family == keyword(family)
    }
}

/// nft's word for a family, of tables and of addresses.
pub(super) fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// Writes the tables of a network, and removes those that it has no use for.
pub(super) fn write(rules: &RuleSet, masquerade: Masquerade) -> Result<(), ToolError> {
    let text = script(rules, masquerade, &tables()?);
    if text.is_empty() {
        return Ok(());
    }
    Invocation::new(Tool::Nft, &["-f", "-"])
        .reading(text)
        .demand()
        .map(drop)
}

/// The text for both families. A family without a table, of ours or at all, is not mentioned: a kernel may have nf_tables for one only, and
/// would refuse all of it.
fn script(rules: &RuleSet, masquerade: Masquerade, present: &[(Family, String)]) -> String {
    let of = |family| {
        table(rules, family, masquerade).or_else(|| {
            let name = rules.names.table(family);
            let is_there = present.iter().any(|(of, table)| *of == family && *table == name);
            is_there.then(|| removal(&name, family))
        })
    };
    [Family::V4, Family::V6].into_iter().filter_map(of).collect()
}

/// What the kernel shows of the network's tables; nothing of one that is not there.
pub(super) fn show(rules: &RuleSet) -> Result<String, ToolError> {
    let mut shown = String::new();
    for family in [Family::V4, Family::V6] {
        let list = match family {
            Family::V4 => ["-s", "list", "table", "ip"],
            Family::V6 => ["-s", "list", "table", "ip6"],
        };
        let list = Invocation::new(Tool::Nft, &list).with(&rules.names.table(family));
        let output = list.execute()?;
        if output.success {
            shown += &output.text;
        } else if !output.error.contains("No such file or directory") {
            let error = list.refused(&output);
            // A kernel may have nf_tables for one family only; what it lacks matters where something is to be in it.
            if !(error.is_unsupported() && table(rules, family, rules.masquerade).is_none()) {
                return Err(error);
            }
        }
    }
    Ok(shown)
}

/// Removes a table; one that is not there is no error.
pub(super) fn remove(table: &str, family: Family) -> Result<(), ToolError> {
    Invocation::new(Tool::Nft, &["-f", "-"])
        .reading(removal(table, family))
        .demand()
        .map(drop)
}

/// The tables of all networks: family and name.
fn tables() -> Result<Vec<(Family, String)>, ToolError> {
    list().map(|text| own_tables(&text))
}

/// The list of all tables there are, anybody's.
pub(super) fn list() -> Result<String, ToolError> {
    Invocation::new(Tool::Nft, &["list", "tables"]).demand()
}

/// Those of all networks on a list: family and name.
pub(super) fn own_tables(list: &str) -> Vec<(Family, String)> {
    list.lines().filter_map(own_table).collect()
}

fn own_table(line: &str) -> Option<(Family, String)> {
    let (family, name) = line.trim().strip_prefix("table ")?.split_once(' ')?;
    let is = |stem: &str| name == stem || name.strip_prefix(stem).is_some_and(|rest| rest.starts_with('-'));
    match family {
        "ip" if is("flannel-ipv4") => Some((Family::V4, name.to_owned())),
        "ip6" if is("flannel-ipv6") => Some((Family::V6, name.to_owned())),
        _ => None,
    }
}

/// All base chains at the forward hook.
pub(super) fn forward_chains() -> Result<Vec<ForwardChain>, ToolError> {
    Invocation::new(Tool::Nft, &["list", "chains"])
        .demand()
        .map(|text| parse_chains(&text))
}

/// Whether iptables over nf_tables has a table of this name, by what nft lists.
pub(super) fn has_iptables_table(list: &str, family: Family, table: &str) -> bool {
    let wanted = format!("table {} {table}", keyword(family));
    list.lines().any(|line| line.trim() == wanted)
}

fn parse_chains(text: &str) -> Vec<ForwardChain> {
    let mut found = Vec::new();
    let (mut family, mut table, mut chain) = ("", "", "");
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["table", of, name, "{"] => (family, table) = (of, name),
            ["chain", name, "{"] => chain = name,
            ["type", "filter", "hook", "forward", rest @ ..] => {
                let drops = rest.windows(2).any(|pair| matches!(pair, ["policy", "drop;"]));
                found.push(ForwardChain {
                    family: family.to_owned(),
                    table: table.to_owned(),
                    chain: chain.to_owned(),
                    drops,
                });
            }
            _ => {}
        }
    }
    found
}

fn removal(table: &str, family: Family) -> String {
    let family = keyword(family);
    // Adding what may be there already makes deleting it succeed.
    format!("add table {family} {table}\ndelete table {family} {table}\n")
}

/// The text that replaces the table of a family; `None` if there is nothing to be in it.
fn table(rules: &RuleSet, family: Family, masquerade: Masquerade) -> Option<String> {
    let guards = guards(rules, family);
    let overlay = rules.overlay(family);
    let ip = keyword(family);
    let mut forward: Vec<String> = guards.clone();
    let mut postrouting = Vec::new();
    if let Some(part) = overlay {
        let (network, subnet) = (part.network, part.subnet);
        if rules.forward {
            let accept = format!("accept comment \"{FORWARD_COMMENT}\"");
            forward.push(format!("{ip} saddr {network} {accept}"));
            forward.push(format!("{ip} daddr {network} {accept}"));
        }
        let target = match masquerade {
            Masquerade::Off => None,
            Masquerade::Plain => Some("masquerade"),
            Masquerade::Random => Some("masquerade fully-random"),
        };
        if let Some(target) = target {
            let multicast = multicast(family);
            let comment = format!("comment \"{MASQ_COMMENT}\"");
            postrouting = vec![
                format!("meta mark & 0x00004000 == 0x00004000 return {comment}"),
                format!("{ip} saddr {subnet} {ip} daddr {network} return {comment}"),
                format!("{ip} saddr {network} {ip} daddr {subnet} return {comment}"),
                format!("{ip} saddr != {network} {ip} daddr {subnet} return {comment}"),
                format!("{ip} saddr {network} {ip} daddr != {multicast} {target} {comment}"),
                format!("{ip} saddr != {network} {ip} daddr {network} {target} {comment}"),
            ];
        }
    }
    if forward.is_empty() && postrouting.is_empty() {
        return None;
    }
    let name = rules.names.table(family);
    let mut text = removal(&name, family);
    text += &format!("table {ip} {name} {{\n");
    // Numbers, for nft before 0.9 has no names for them: filter is 0, srcnat 100.
    let mut chain = |name: &str, hook: &str, rules: &[String]| {
        if rules.is_empty() {
            return;
        }
        text += &format!("\tchain {name} {{\n\t\ttype {hook}; policy accept;\n");
        for rule in rules {
            text += &format!("\t\t{rule}\n");
        }
        text += "\t}\n";
    };
    chain("forward", "filter hook forward priority 0", &forward);
    chain("input", "filter hook input priority 0", &guards);
    chain("postrtg", "nat hook postrouting priority 100", &postrouting);
    text += "}\n";
    Some(text)
}

/// The rules that keep pods from the tunnel: what comes from an address of the overlay, or by a link with pods behind it, and goes to the
/// tunnel's port at an address outside the overlay, where tunnels end. Overlays of pods among themselves are none of our business.
fn guards(rules: &RuleSet, family: Family) -> Vec<String> {
    let ip = keyword(family);
    let end = format!("counter drop comment \"{GUARD_COMMENT}\"");
    let network = rules.overlay(family).map(|part| part.network);
    let mut from = Vec::new();
    from.extend(network.map(|network| format!("{ip} saddr {network}")));
    if !rules.pod_links.is_empty() {
        let links: Vec<String> = rules.pod_links.iter().map(|link| format!("\"{link}\"")).collect();
        from.push(format!("iifname {{ {} }}", links.join(", ")));
    }
    let to: Vec<String> = match &rules.guard {
        None => Vec::new(),
        Some(Guard::Port(port)) => network
            .map(|network| format!("{ip} daddr != {network} udp dport {port}"))
            .into_iter()
            .collect(),
        Some(Guard::Blocks(blocks)) => blocks
            .iter()
            .filter(|&&block| family_of(block.into()) == family)
            .map(|block| format!("{ip} daddr {block}"))
            .collect(),
    };
    from.iter()
        .flat_map(|from| to.iter().map(move |to| (from, to)))
        .map(|(from, to)| format!("{from} {to} {end}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::firewall::rules::{Names, OverlayPart};

    #[test]
    fn the_table_of_a_network_has_flannels_rules_with_its_mistakes_mended() {
        // B27 of the list of upstream bugs: rule 4, and the mark.
        let text = table(&rules(), Family::V4, Masquerade::Random).unwrap();
        let expected = "add table ip flannel-ipv4
delete table ip flannel-ipv4
table ip flannel-ipv4 {
\tchain forward {
\t\ttype filter hook forward priority 0; policy accept;
\t\tip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 udp dport 8472 counter drop comment \"kersey tunnel guard\"
\t\tiifname { \"cni0\", \"docker0\" } ip daddr != 10.244.0.0/16 udp dport 8472 counter drop comment \"kersey tunnel guard\"
\t\tip saddr 10.244.0.0/16 accept comment \"flanneld forward\"
\t\tip daddr 10.244.0.0/16 accept comment \"flanneld forward\"
\t}
\tchain input {
\t\ttype filter hook input priority 0; policy accept;
\t\tip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 udp dport 8472 counter drop comment \"kersey tunnel guard\"
\t\tiifname { \"cni0\", \"docker0\" } ip daddr != 10.244.0.0/16 udp dport 8472 counter drop comment \"kersey tunnel guard\"
\t}
\tchain postrtg {
\t\ttype nat hook postrouting priority 100; policy accept;
\t\tmeta mark & 0x00004000 == 0x00004000 return comment \"flanneld masq\"
\t\tip saddr 10.244.7.0/24 ip daddr 10.244.0.0/16 return comment \"flanneld masq\"
\t\tip saddr 10.244.0.0/16 ip daddr 10.244.7.0/24 return comment \"flanneld masq\"
\t\tip saddr != 10.244.0.0/16 ip daddr 10.244.7.0/24 return comment \"flanneld masq\"
\t\tip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment \"flanneld masq\"
\t\tip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random comment \"flanneld masq\"
\t}
}
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_family_the_network_lacks_has_no_table() {
        // B27: flannel wants both, and fails on a host without IPv6.
        assert_eq!(table(&rules(), Family::V6, Masquerade::Plain), None);
        let nothing = RuleSet::nothing("");
        assert_eq!(table(&nothing, Family::V4, Masquerade::Plain), None);
    }

    /// A kernel without nf_tables for IPv6 refuses a text that as much as mentions such a table, and with it the rules of IPv4.
    #[test]
    fn a_family_without_a_table_is_not_mentioned() {
        let text = script(&rules(), Masquerade::Plain, &[]);
        assert!(text.contains("table ip flannel-ipv4 {"), "{text}");
        assert!(!text.contains("ip6"), "{text}");
        let left = [
            (Family::V6, "flannel-ipv6".to_owned()),
            (Family::V6, "flannel-ipv6-blue".to_owned()),
        ];
        let text = script(&rules(), Masquerade::Plain, &left);
        assert!(text.contains("delete table ip6 flannel-ipv6\n"), "{text}");
        assert!(!text.contains("blue"), "another network's: {text}");
        assert_eq!(script(&RuleSet::nothing(""), Masquerade::Off, &[]), "");
    }

    #[test]
    fn sids_are_kept_from_pods_even_where_the_overlay_has_no_ipv6() {
        let mut rules = rules();
        rules.guard = Some(Guard::Blocks(vec!["fd12:3456:789a::/48".parse().unwrap()]));
        let text = table(&rules, Family::V6, Masquerade::Off).unwrap();
        assert!(
            text.contains("iifname { \"cni0\", \"docker0\" } ip6 daddr fd12:3456:789a::/48 counter drop"),
            "{text}"
        );
        assert!(!text.contains("postrtg"), "{text}");
    }

    #[test]
    fn forward_chains_are_read_as_nft_lists_them() {
        let text = "# Warning: table ip filter is managed by iptables-nft, do not touch!
table ip filter {
\tchain FORWARD {
\t\ttype filter hook forward priority filter; policy drop;
\t}
\tchain DOCKER {
\t}
}
table inet firewalld {
\tchain filter_FORWARD {
\t\ttype filter hook forward priority filter + 10; policy accept;
\t}
\tchain nat_POSTROUTING {
\t\ttype nat hook postrouting priority srcnat + 10; policy accept;
\t}
}
";
        let found = parse_chains(text);
        assert_eq!(found.len(), 2);
        assert!(found[0].is_iptables(Family::V4) && found[0].drops);
        assert!(!found[0].sees(Family::V6) && found[1].sees(Family::V6) && !found[1].drops);
    }

    #[test]
    fn tables_are_known_by_their_names() {
        for (line, expected) in [
            ("table ip flannel-ipv4", Some((Family::V4, "flannel-ipv4"))),
            (
                "table ip6 flannel-ipv6-blue",
                Some((Family::V6, "flannel-ipv6-blue")),
            ),
            ("table ip flannel-ipv4x", None),
            ("table inet flannel-ipv4", None),
            ("table ip filter", None),
        ] {
            let found = own_table(line);
            let found = found.as_ref().map(|(family, name)| (*family, name.as_str()));
            assert_eq!(found, expected, "{line}");
        }
    }

    fn rules() -> RuleSet {
        let prefix = |text: &str| Prefix::V4(text.parse().unwrap());
        use crate::addr::Prefix;
        RuleSet {
            names: Names::of(""),
            overlays: vec![OverlayPart {
                network: prefix("10.244.0.0/16"),
                subnet: prefix("10.244.7.0/24"),
            }],
            masquerade: Masquerade::Random,
            forward: true,
            guard: Some(Guard::Port(8472)),
            pod_links: vec!["cni0".to_owned(), "docker0".to_owned()],
        }
    }
}
