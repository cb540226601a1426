//! Rules as iptables has them: flannel's chains, comments and order, and one chain of Kersey's own.
//!
//! One [`sync`] deals with one program, that is with one family of one flavour:
//!
//! 1. The built-in chains we have jumps in, and our own chains, are listed (`-S`), each by a call of its own: a host with kube-proxy has
//!    tens of thousands of rules in other chains.
//! 2. [`plan`] compares: our chains must be as they were after we last wrote them, each jump must be there once, and that of the forward
//!    rules before the first rule that drops or rejects everything.
//! 3. What is wanted is written, all of a table in one transaction (`iptables-restore --noflush`): old jumps and old rules of flannel's
//!    are deleted, chains are emptied, and filled again.
//!
//! The jump to the guard comes first, and anything before it that may let a packet pass, as the ACCEPT that Docker puts there, is amiss.
//!
//! The jump to the forward rules is appended, as flannel's: rules of others decide first, and those may be network policies. But a rule
//! that drops or rejects all that came so far is a policy in another dress, and the jump goes before it; flannel's comes too late there.
//!
//! Limits: a rule that drops everything from inside a chain that is jumped to is not seen.

mod rule;

use std::collections::{BTreeMap, BTreeSet};

use self::rule::Rule;
use crate::host::firewall::rules::{
    FORWARD_COMMENT, GUARD_COMMENT, Guard, KUBE_MARK, MASQ_COMMENT, Masquerade, OverlayPart, RuleSet,
    family_of, multicast,
};
use crate::host::firewall::tool::{Family, Flavour, Invocation, Output, RESTORE_WAIT, Tool, ToolError, WAIT};

/// What is asked of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    /// The network's rules; names and prefixes are taken from here.
    pub(super) rules: &'a RuleSet,
    /// How to masquerade, by this program.
    pub(super) masquerade: Masquerade,
    /// Whether the forward rules are this program's to make.
    pub(super) forward: bool,
    /// Whether the guard is.
    pub(super) guard: bool,
    /// The tables that exist; where there is none, nothing has to be removed.
    pub(super) present: &'a BTreeSet<&'static str>,
}

/// One table's part of what is wanted: a chain of ours, its rules, and the built-in chains that jump to it.
struct Part {
    table: &'static str,
    chain: String,
    /// Rules, without `-A CHAIN`.
    rules: Vec<String>,
    jumps: Vec<Jump>,
    comment: &'static str,
}

struct Jump {
    from: &'static str,
    place: Place,
}

/// Where in a built-in chain a jump goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    First,
    /// After the others' rules, but before one that lets nothing past.
    BeforeTheEnd,
}

/// What the chains looked like right after they were written.
pub(super) type Written = BTreeMap<(&'static str, String), Vec<String>>;

/// The rules of a built-in chain, as read.
struct BuiltIn {
    rules: Vec<Rule>,
    drops: bool,
}

/// Makes the rules of one program those wanted, and tells what was amiss; `written` is what they looked like after the last time, if there
/// was one. An empty chain there stands for one that is to be written anew.
///
/// # Errors
/// The program is not there, or refuses.
pub(super) fn sync(
    wanted: &Wanted<'_>,
    family: Family,
    flavour: Flavour,
    written: &mut Option<Written>,
) -> Result<Vec<String>, ToolError> {
    let program = Program { family, flavour };
    let mut amiss = Vec::new();
    let mut now = Written::new();
    let first = written.is_none();
    for part in parts(wanted, family) {
        let key = (part.table, part.chain.clone());
        if part.rules.is_empty() {
            let was_there = written.as_ref().is_some_and(|written| written.contains_key(&key));
            if wanted.present.contains(part.table) && (first || was_there) {
                amiss.extend(program.clear(&part, wanted, family)?);
            }
            continue;
        }
        let held = program.chain(part.table, &part.chain)?;
        let builtin = program.builtin(&part)?;
        let known = written.as_ref().and_then(|written| written.get(&key));
        let chain_is_right = held.is_some() && held.as_ref() == known;
        let jumps_are_right = part
            .jumps
            .iter()
            .zip(&builtin)
            .all(|(jump, builtin)| jump_is_right(&part.chain, jump, builtin));
        if chain_is_right && jumps_are_right {
            now.extend(held.map(|held| (key, held)));
            continue;
        }
        if !chain_is_right {
            amiss.push(format!("chain {}", part.chain));
        }
        if !jumps_are_right {
            amiss.push(format!("the jump to {}", part.chain));
        }
        let old = |from: &str, rule: &Rule| {
            rule.jumps_to(&part.chain) || first && is_old(part.table, from, rule, wanted, family, &builtin)
        };
        program.restore(&script(&part, &builtin, old))?;
        let held = program.chain(part.table, &part.chain)?;
        now.extend(held.map(|held| (key, held)));
    }
    *written = Some(now);
    Ok(amiss)
}

/// Whether there are rules of the guard in a family.
pub(super) fn has_guard(rules: &RuleSet, family: Family) -> bool {
    !guards(rules, family).is_empty()
}

/// Whether somebody's rules in the chain FORWARD, or its policy, may drop what we forward.
pub(super) fn forward_may_drop(
    wanted: &RuleSet,
    family: Family,
    flavour: Flavour,
) -> Result<bool, ToolError> {
    let program = Program { family, flavour };
    let builtin = program.list("filter", "FORWARD")?.unwrap_or_default();
    let builtin = BuiltIn::read("FORWARD", &builtin);
    let ours = [wanted.names.forward(), wanted.names.guard()];
    let others = builtin
        .rules
        .iter()
        .any(|rule| !ours.iter().any(|chain| rule.jumps_to(chain)));
    Ok(builtin.drops || others)
}

/// Whether a table has rules, chains, or a policy that drops.
pub(super) fn holds_anything(
    family: Family,
    flavour: Flavour,
    table: &'static str,
) -> Result<bool, ToolError> {
    let (list, output) = Program { family, flavour }.rules(table, None)?;
    if !output.success {
        return Err(list.refused(&output));
    }
    Ok(lists_anything(&output.text))
}

fn lists_anything(text: &str) -> bool {
    let is_default = |line: &str| line.starts_with("-P ") && line.ends_with(" ACCEPT");
    text.lines()
        .any(|line| line.starts_with('-') && !is_default(line))
}

/// What of flannel's and ours there is, whatever the network: lines for people, and a script for each table that removes it.
pub(super) fn leftovers(
    family: Family,
    flavour: Flavour,
    table: &'static str,
) -> Result<Option<(Vec<String>, String)>, ToolError> {
    let program = Program { family, flavour };
    let (list, output) = program.rules(table, None)?;
    if !output.success {
        return Err(list.refused(&output));
    }
    let chains: Vec<&str> = output
        .text
        .lines()
        .filter_map(|line| line.strip_prefix("-N "))
        .filter(|chain| is_own_chain(chain))
        .collect();
    let (mut told, mut script) = (Vec::new(), format!("*{table}\n"));
    for chain in &chains {
        script += &format!(":{chain} - [0:0]\n");
        told.push(format!("chain {chain} of table {table} ({})", program.name()));
    }
    for rule in output.text.lines().filter_map(Rule::parse) {
        if is_own_chain(&rule.chain) {
            continue;
        }
        let goes_to_ours = rule
            .target
            .as_deref()
            .is_some_and(|target| chains.contains(&target));
        let is_commented = rule.comment.as_deref().is_some_and(is_own_comment);
        if goes_to_ours || is_commented {
            script += &format!("-D {} {}\n", rule.chain, rule.spec);
        }
        if is_commented && !goes_to_ours {
            told.push(format!(
                "rule `{}` of chain {}, table {table} ({})",
                rule.spec,
                rule.chain,
                program.name()
            ));
        }
    }
    for chain in &chains {
        script += &format!("-X {chain}\n");
    }
    script += "COMMIT\n";
    Ok((!told.is_empty()).then_some((told, script)))
}

/// Runs a script of [`leftovers`].
pub(super) fn remove(family: Family, flavour: Flavour, script: &str) -> Result<(), ToolError> {
    Program { family, flavour }.restore(script)
}

fn is_own_chain(chain: &str) -> bool {
    // FLANNEL alone: v0.5.
    let ours = chain == "FLANNEL" || is_of("FLANNEL-POSTRTG", chain) || is_of("FLANNEL-FWD", chain);
    ours || is_guard(chain)
}

/// Whether a chain is the guard's, of any network.
fn is_guard(chain: &str) -> bool {
    is_of("KERSEY-GUARD", chain)
}

fn is_of(stem: &str, chain: &str) -> bool {
    let rest = chain.strip_prefix(stem);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn is_own_comment(comment: &str) -> bool {
    [MASQ_COMMENT, FORWARD_COMMENT, GUARD_COMMENT].contains(&comment)
}

#[derive(Clone, Copy)]
struct Program {
    family: Family,
    flavour: Flavour,
}

impl Program {
    fn tool(self) -> Tool {
        Tool::Iptables(self.family, self.flavour)
    }

    fn name(self) -> &'static str {
        self.tool().name()
    }

    /// Has the rules of a chain listed, or those of all.
    fn rules(self, table: &'static str, chain: Option<&str>) -> Result<(Invocation, Output), ToolError> {
        let list = |args: &[&'static str]| {
            let list = Invocation::new(self.tool(), args);
            chain.map_or_else(|| list.clone(), |chain| list.clone().with(chain))
        };
        let patient = list(&["-w", WAIT, "-t", table, "-S"]);
        let output = patient.execute()?;
        // Before 1.6 the lock is waited for without end, and this process ends it.
        if !output.success && output.error.contains("Bad argument") {
            let older = list(&["-w", "-t", table, "-S"]);
            let output = older.execute()?;
            return Ok((older, output));
        }
        Ok((patient, output))
    }

    /// The lines of a chain; `None` if there is no such chain.
    fn list(self, table: &'static str, chain: &str) -> Result<Option<Vec<String>>, ToolError> {
        let (list, output) = self.rules(table, Some(chain))?;
        if output.success {
            let lines = output.text.lines().filter(|line| !line.starts_with('#'));
            return Ok(Some(lines.map(str::to_owned).collect()));
        }
        // "No chain/target/match by that name", "Chain 'X' does not exist", "does a matching chain exist in that table?"
        if output.error.to_ascii_lowercase().contains("chain") {
            return Ok(None);
        }
        Err(list.refused(&output))
    }

    fn chain(self, table: &'static str, chain: &str) -> Result<Option<Vec<String>>, ToolError> {
        self.list(table, chain)
    }

    fn builtin(self, part: &Part) -> Result<Vec<BuiltIn>, ToolError> {
        part.jumps
            .iter()
            .map(|jump| {
                let lines = self.list(part.table, jump.from)?.unwrap_or_default();
                Ok(BuiltIn::read(jump.from, &lines))
            })
            .collect()
    }

    /// Takes a part away that is not wanted; tells what was there.
    fn clear(self, part: &Part, wanted: &Wanted<'_>, family: Family) -> Result<Vec<String>, ToolError> {
        let has_chain = self.chain(part.table, &part.chain)?.is_some();
        let builtin = self.builtin(part)?;
        let mut script = format!("*{}\n", part.table);
        if has_chain {
            script += &format!(":{} - [0:0]\n", part.chain);
        }
        let mut deleted = 0;
        for (jump, held) in part.jumps.iter().zip(&builtin) {
            for rule in &held.rules {
                if rule.jumps_to(&part.chain) || is_old(part.table, jump.from, rule, wanted, family, &builtin)
                {
                    script += &format!("-D {} {}\n", jump.from, rule.spec);
                    deleted += 1;
                }
            }
        }
        if !has_chain && deleted == 0 {
            return Ok(Vec::new());
        }
        if has_chain {
            script += &format!("-X {}\n", part.chain);
        }
        script += "COMMIT\n";
        self.restore(&script)?;
        Ok(vec![format!(
            "chain {} or rules in its place, not wanted",
            part.chain
        )])
    }

    fn restore(self, script: &str) -> Result<(), ToolError> {
        let tool = Tool::Restore(self.family, self.flavour);
        let restore = |args: &[&'static str]| Invocation::new(tool, args).reading(script.to_owned());
        let patient = restore(&["--noflush", RESTORE_WAIT]);
        let output = patient.execute()?;
        if output.success {
            return Ok(());
        }
        // Since 1.6.2; who waits for the lock has a word with "wait" in it, too.
        if ["unrecognized option", "unknown option"]
            .iter()
            .any(|said| output.error.contains(said))
        {
            return restore(&["--noflush"]).demand().map(drop);
        }
        Err(patient.refused(&output))
    }
}

impl BuiltIn {
    fn read(chain: &str, lines: &[String]) -> Self {
        Self {
            rules: lines.iter().filter_map(|line| Rule::parse(line)).collect(),
            drops: lines.iter().any(|line| line == &format!("-P {chain} DROP")),
        }
    }
}

/// Whether there is one such jump, in its place.
fn jump_is_right(chain: &str, jump: &Jump, builtin: &BuiltIn) -> bool {
    let mut places = (0..).zip(&builtin.rules).filter(|(_, rule)| rule.jumps_to(chain));
    let Some((at, _)) = places.next() else {
        return false;
    };
    if places.next().is_some() {
        return false;
    }
    match jump.place {
        Place::First => !builtin.rules.iter().take(at).any(may_let_pass),
        Place::BeforeTheEnd => !builtin.rules.iter().take(at).any(Rule::ends_all),
    }
}

/// Whether packets may get past what comes behind a rule: it accepts them, or goes somewhere that may. Guards of other networks' drop or do
/// nothing, and each has to come first.
fn may_let_pass(rule: &Rule) -> bool {
    match rule.target.as_deref() {
        None | Some("DROP" | "REJECT" | "LOG" | "NFLOG" | "TRACE") => false,
        Some(chain) => !is_guard(chain),
    }
}

/// The text that makes a part what is wanted. `old` says which rules of built-in chains go.
fn script(part: &Part, builtin: &[BuiltIn], old: impl Fn(&str, &Rule) -> bool) -> String {
    let mut text = format!("*{}\n:{} - [0:0]\n", part.table, part.chain);
    for (jump, held) in part.jumps.iter().zip(builtin) {
        for rule in held.rules.iter().filter(|rule| old(jump.from, rule)) {
            text += &format!("-D {} {}\n", jump.from, rule.spec);
        }
        let kept = held.rules.iter().filter(|rule| !old(jump.from, rule));
        let end = (1..)
            .zip(kept)
            .find(|(_, rule)| rule.ends_all())
            .map(|(at, _)| at);
        let (from, comment, chain) = (jump.from, part.comment, &part.chain);
        let verb = match (jump.place, end) {
            (Place::First, _) => format!("-I {from} 1"),
            (Place::BeforeTheEnd, Some(at)) => format!("-I {from} {at}"),
            (Place::BeforeTheEnd, None) => format!("-A {from}"),
        };
        text += &format!("{verb} -m comment --comment \"{comment}\" -j {chain}\n");
    }
    for rule in &part.rules {
        text += &format!("-A {} {rule}\n", part.chain);
    }
    text + "COMMIT\n"
}

fn parts(wanted: &Wanted<'_>, family: Family) -> [Part; 3] {
    let names = &wanted.rules.names;
    let overlay = wanted.rules.overlay(family);
    let jump = |from, place| Jump { from, place };
    [
        Part {
            table: "nat",
            chain: names.postrouting(),
            rules: overlay.map_or_else(Vec::new, |part| masquerade(part, family, wanted.masquerade)),
            jumps: vec![jump("POSTROUTING", Place::BeforeTheEnd)],
            comment: MASQ_COMMENT,
        },
        // The guard's jump comes after this one's and so before it.
        Part {
            table: "filter",
            chain: names.forward(),
            rules: overlay.filter(|_| wanted.forward).map_or_else(Vec::new, forward),
            jumps: vec![jump("FORWARD", Place::BeforeTheEnd)],
            comment: FORWARD_COMMENT,
        },
        Part {
            table: "filter",
            chain: names.guard(),
            rules: if wanted.guard {
                guards(wanted.rules, family)
            } else {
                Vec::new()
            },
            jumps: vec![jump("FORWARD", Place::First), jump("INPUT", Place::First)],
            comment: GUARD_COMMENT,
        },
    ]
}

fn masquerade(part: OverlayPart, family: Family, masquerade: Masquerade) -> Vec<String> {
    let OverlayPart { network, subnet } = part;
    let comment = format!("-m comment --comment \"{MASQ_COMMENT}\"");
    let target = match masquerade {
        Masquerade::Off => return Vec::new(),
        Masquerade::Plain => "MASQUERADE",
        Masquerade::Random => "MASQUERADE --random-fully",
    };
    let multicast = multicast(family);
    vec![
        format!("-m mark --mark {KUBE_MARK} {comment} -j RETURN"),
        format!("-s {subnet} -d {network} {comment} -j RETURN"),
        format!("-s {network} -d {subnet} {comment} -j RETURN"),
        format!("! -s {network} -d {subnet} {comment} -j RETURN"),
        format!("-s {network} ! -d {multicast} {comment} -j {target}"),
        format!("! -s {network} -d {network} {comment} -j {target}"),
    ]
}

fn forward(part: OverlayPart) -> Vec<String> {
    let network = part.network;
    let end = format!("-m comment --comment \"{FORWARD_COMMENT}\" -j ACCEPT");
    vec![format!("-s {network} {end}"), format!("-d {network} {end}")]
}

/// As nft's guards.
fn guards(rules: &RuleSet, family: Family) -> Vec<String> {
    let end = format!("-m comment --comment \"{GUARD_COMMENT}\" -j DROP");
    let network = rules.overlay(family).map(|part| part.network);
    let mut from = Vec::new();
    from.extend(network.map(|network| format!("-s {network}")));
    from.extend(rules.pod_links.iter().map(|link| format!("-i {link}")));
    let to: Vec<String> = match &rules.guard {
        None => Vec::new(),
        Some(Guard::Port(port)) => network
            .map(|network| format!("! -d {network} -p udp -m udp --dport {port}"))
            .into_iter()
            .collect(),
        Some(Guard::Blocks(blocks)) => blocks
            .iter()
            .filter(|&&block| family_of(block.into()) == family)
            .map(|block| format!("-d {block}"))
            .collect(),
    };
    from.iter()
        .flat_map(|from| to.iter().map(move |to| (from, to)))
        .map(|(from, to)| format!("{from} {to} {end}"))
        .collect()
}

/// Whether a rule of a built-in chain is one of an older flannel's, of the times before it had chains of its own, or of those of v0.5.
///
/// Those of v0.17 to v0.19 have its comment. Before that they had none, and somebody may have made just such a rule; so they count only
/// beside the one that nobody else would make, which leaves multicast out.
fn is_old(
    table: &str,
    from: &str,
    rule: &Rule,
    wanted: &Wanted<'_>,
    family: Family,
    builtin: &[BuiltIn],
) -> bool {
    let Some(part) = wanted.rules.overlay(family) else {
        return false;
    };
    let (network, subnet) = (part.network.to_string(), part.subnet.to_string());
    let about = |side: &rule::Side| side.is(&network) || side.is(&subnet);
    if !(about(&rule.source) || about(&rule.destination)) || rule.has_more {
        return false;
    }
    let target = rule.target.as_deref().unwrap_or_default();
    let by_kind = match (table, from) {
        ("nat", "POSTROUTING") => ["RETURN", "MASQUERADE", "FLANNEL"].contains(&target),
        ("filter", "FORWARD") => target == "ACCEPT",
        _ => false,
    };
    let is_signature = |rule: &Rule| {
        let to_flannel = rule.jumps_to("FLANNEL");
        let spares_multicast = rule.jumps_to("MASQUERADE") && rule.destination.is_not(multicast(family));
        rule.source.is(&network) && (to_flannel || spares_multicast)
    };
    by_kind
        && match rule.comment.as_deref() {
            Some(comment) => is_own_comment(comment),
            None => table == "nat" && builtin.iter().flat_map(|held| &held.rules).any(is_signature),
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Prefix;
    use crate::host::firewall::rules::Names;

    #[test]
    fn the_rules_are_flannels_in_flannels_order() {
        let rules = rules();
        let text = scripts(&rules, &[], &[], &[]);
        assert_eq!(
            text[0],
            "*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.7.0/24 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.7.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.7.0/24 -m comment --comment \"flanneld masq\" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully
COMMIT
"
        );
        assert_eq!(
            text[1],
            "*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT
COMMIT
"
        );
        assert_eq!(
            text[2],
            "*filter
:KERSEY-GUARD - [0:0]
-I FORWARD 1 -m comment --comment \"kersey tunnel guard\" -j KERSEY-GUARD
-I INPUT 1 -m comment --comment \"kersey tunnel guard\" -j KERSEY-GUARD
-A KERSEY-GUARD -s 10.244.0.0/16 ! -d 10.244.0.0/16 -p udp -m udp --dport 8285 -m comment --comment \"kersey tunnel guard\" -j DROP
-A KERSEY-GUARD -i cni0 ! -d 10.244.0.0/16 -p udp -m udp --dport 8285 -m comment --comment \"kersey tunnel guard\" -j DROP
COMMIT
"
        );
    }

    #[test]
    fn the_jump_comes_before_a_rule_that_lets_nothing_past() {
        // B30 of the list of upstream bugs: a jump behind a REJECT is never reached.
        let forward = [
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -i eth1 -j DROP",
            "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD",
            "-A FORWARD -j REJECT --reject-with icmp-host-prohibited",
        ];
        let rules = rules();
        let text = &scripts(&rules, &[], &forward, &[])[1];
        assert!(
            text.contains(
                "-D FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n-I FORWARD 3 "
            ),
            "{text}"
        );
        let builtin = |lines: &[&str]| {
            let lines: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
            BuiltIn::read("FORWARD", &lines)
        };
        let jump = Jump {
            from: "FORWARD",
            place: Place::BeforeTheEnd,
        };
        let right = |lines: &[&str]| jump_is_right("FLANNEL-FWD", &jump, &builtin(lines));
        assert!(right(&forward));
        let [user, eth1, ours, reject] = forward;
        assert!(!right(&[user, eth1, reject, ours]), "too late");
        assert!(!right(&[user, ours, ours]), "twice");
        assert!(!right(&[user]), "missing");
    }

    #[test]
    fn the_guard_is_wrong_behind_anything_that_may_let_packets_pass() {
        let guard = "-A FORWARD -m comment --comment \"kersey tunnel guard\" -j KERSEY-GUARD";
        let jump = Jump {
            from: "FORWARD",
            place: Place::First,
        };
        for (before, right) in [
            ("-A FORWARD -i eth0 -j DROP", true),
            ("-A FORWARD -j LOG --log-prefix x", true),
            ("-A FORWARD -m comment --comment \"counts only\"", true),
            // Each network has a guard, and all want to be first.
            ("-A FORWARD -j KERSEY-GUARD-blue", true),
            ("-A FORWARD -i docker0 -j ACCEPT", false),
            ("-A FORWARD -j DOCKER-USER", false),
            ("-A FORWARD -g somewhere", false),
            ("-A FORWARD -j KERSEY-GUARDIAN", false),
        ] {
            let lines = [before.to_owned(), guard.to_owned()];
            let builtin = BuiltIn::read("FORWARD", &lines);
            assert_eq!(jump_is_right("KERSEY-GUARD", &jump, &builtin), right, "{before}");
        }
    }

    #[test]
    fn a_table_with_nothing_but_policies_that_accept_holds_nothing() {
        for (text, holds) in [
            ("-P INPUT ACCEPT\n-P FORWARD ACCEPT\n", false),
            ("# Warning: tables of the other kind\n-P INPUT ACCEPT\n", false),
            ("-P INPUT ACCEPT\n-P FORWARD DROP\n", true),
            ("-P INPUT ACCEPT\n-N DOCKER\n", true),
            ("-P INPUT ACCEPT\n-A INPUT -j ACCEPT\n", true),
        ] {
            assert_eq!(lists_anything(text), holds, "{text}");
        }
    }

    #[test]
    fn rules_of_flannels_of_all_times_are_known_again() {
        let rules = rules();
        let v0_7 = [
            "-A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -j RETURN",
            "-A POSTROUTING -s 10.244.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE",
            "-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE",
        ];
        let v0_8 = [
            v0_7[0],
            v0_7[1],
            "-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.7.0/24 -j RETURN",
            "-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE --random-fully",
        ];
        let v0_5 = [
            "-A POSTROUTING -s 10.244.0.0/16 -j FLANNEL",
            "-A POSTROUTING ! -s 10.244.0.0/16 -d 10.244.0.0/16 -j MASQUERADE",
        ];
        let v0_18 = [
            "-A POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN",
        ];
        let dockers = [
            "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
            "-A POSTROUTING -s 10.244.7.0/24 ! -o docker0 -j MASQUERADE",
        ];
        let deleted = |lines: &[&str]| -> usize {
            scripts(&rules, lines, &[], &[])[0]
                .matches("-D POSTROUTING")
                .count()
        };
        for (name, lines, expected) in [
            ("v0.5", &v0_5[..], 2),
            ("v0.7", &v0_7[..], 3),
            ("v0.8", &v0_8[..], 4),
            ("v0.18", &v0_18[..], 1),
            ("Docker's", &dockers[..], 0),
            // Somebody's own, as long as the one that tells flannel is not there.
            ("without the signature", &v0_7[2..], 0),
        ] {
            assert_eq!(deleted(lines), expected, "{name}");
        }
        let forward = [
            "-A FORWARD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
            "-A FORWARD -s 10.244.0.0/16 -j ACCEPT",
        ];
        let text = &scripts(&rules, &[], &forward, &[])[1];
        assert_eq!(text.matches("-D FORWARD").count(), 1, "{text}");
    }

    #[test]
    fn chains_of_ours_are_told_from_others() {
        for (chain, own) in [
            ("FLANNEL-FWD", true),
            ("FLANNEL-FWD-blue", true),
            ("FLANNEL", true),
            ("KERSEY-GUARD", true),
            ("FLANNEL-FWDX", false),
            ("DOCKER", false),
        ] {
            assert_eq!(is_own_chain(chain), own, "{chain}");
        }
    }

    /// The scripts of the three parts over built-in chains as listed.
    fn scripts(rules: &RuleSet, postrouting: &[&str], forward: &[&str], input: &[&str]) -> Vec<String> {
        let wanted = Wanted {
            rules,
            masquerade: rules.masquerade,
            forward: true,
            guard: true,
            present: &BTreeSet::new(),
        };
        let read = |chain: &str, lines: &[&str]| {
            let lines: Vec<String> = lines.iter().map(|&line| line.to_owned()).collect();
            BuiltIn::read(chain, &lines)
        };
        parts(&wanted, Family::V4)
            .iter()
            .map(|part| {
                let builtin: Vec<BuiltIn> = part
                    .jumps
                    .iter()
                    .map(|jump| match jump.from {
                        "POSTROUTING" => read("POSTROUTING", postrouting),
                        "FORWARD" => read("FORWARD", forward),
                        _ => read("INPUT", input),
                    })
                    .collect();
                let old = |from: &str, rule: &Rule| {
                    rule.jumps_to(&part.chain)
                        || is_old(part.table, from, rule, &wanted, Family::V4, &builtin)
                };
                script(part, &builtin, old)
            })
            .collect()
    }

    fn rules() -> RuleSet {
        let prefix = |text: &str| Prefix::V4(text.parse().unwrap());
        RuleSet {
            names: Names::of(""),
            overlays: vec![OverlayPart {
                network: prefix("10.244.0.0/16"),
                subnet: prefix("10.244.7.0/24"),
            }],
            masquerade: Masquerade::Random,
            forward: true,
            guard: Some(Guard::Port(8285)),
            pod_links: vec!["cni0".to_owned()],
        }
    }
}
