//! Firewall rules of the host: masquerading, what is accepted where the host forwards, and pods kept from the tunnel.
//!
//! A [`RuleSet`] is what one network wants; a [`Firewall`] makes it so with the host's own tools and, each time it is asked to
//! ([`Firewall::keep`]), puts right what somebody changed. It blocks for as long as the tools take.
//!
//! ```text
//!             RuleSet ──▶ keep ──▶ with nft       table flannel-ipv4, flannel-ipv6: forward, input, postrtg
//!                          │        and, if iptables' FORWARD may drop: FLANNEL-FWD there, too
//!                          └─────▶ with iptables  FLANNEL-POSTRTG, FLANNEL-FWD, KERSEY-GUARD
//! ```
//!
//! **Which tool.** nft if it is there and the kernel takes the rules from it, else iptables. What is chosen stays chosen.
//!
//! **Where accepts have to be.** Each base chain at the forward hook is asked, and each can drop: an accept in a table of ours cannot
//! overrule a drop in Docker's `FORWARD`. So with nft the forward rules are made in iptables *as well* where its `FORWARD` has a policy of
//! DROP or any rule. A chain of nft's own that drops is somebody's firewall, which is not ours to open: a note says what to add.
//!
//! **What is known again.** Names and comments are flannel's, so that either daemon takes over from the other without leaving anything.
//! The first time, what an earlier life or a flannel made with the other tool is removed, and so are rules of flannels that had no chains
//! of their own. [`leftovers`] lists all of it, of all networks, for `kersey cleanup`.
//!
//! **Rules of the old iptables.** Which tables it has is in a file that only root reads. Others ask the program itself, which wants its lock,
//! root's as well; where neither does, a note says that those rules are not seen.
//!
//! Limits: firewalld drops by rules, not by a policy, which is not noticed. Two daemons must not look after one network.

pub mod helper;
mod nft;
mod rules;
pub mod tool;
mod xtables;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

pub use self::rules::{Guard, Masquerade, Names, OverlayPart, RuleSet};
use self::tool::{Family, Flavour, Invocation, Tool, ToolError};
use self::xtables::{Wanted, Written};

/// Which tool to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// nft, else iptables.
    Auto,
    /// This one.
    Only(Mode),
}

/// A tool rules are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// nft.
    Nft,
    /// iptables and ip6tables.
    Iptables,
}

impl Mode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
        }
    }
}

/// What a look at the rules came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// The tool in use.
    pub mode: Mode,
    /// What was missing or different, and is right again; everything, the first time.
    pub amiss: Vec<String>,
    /// What the operator should know; the same each time, as long as it holds.
    pub notes: BTreeSet<String>,
}

/// Rules could not be made.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// There is nothing to make them with.
    #[error("{0} on this host")]
    NoTool(&'static str),
    /// The tool failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// Every tool there is failed.
    #[error("{0}; {1}")]
    Both(ToolError, ToolError),
}

/// The keeper of one network's rules.
#[derive(Debug)]
pub struct Firewall {
    choice: Choice,
    /// The tool, once rules could be made with it.
    mode: Option<Mode>,
    /// How the kernel can masquerade, if not as asked.
    plain_only: bool,
    /// What nft showed after the tables were written, and what for.
    shown: Option<(RuleSet, String)>,
    /// What chains of iptables looked like after they were written.
    written: BTreeMap<(Family, Flavour), Option<Written>>,
    /// What they were written for.
    written_for: Option<RuleSet>,
    /// Whether what others left has been looked for.
    cleared: bool,
}

impl Firewall {
    /// Prepares to make rules; touches nothing.
    pub fn new(choice: Choice) -> Self {
        Self {
            choice,
            mode: None,
            plain_only: false,
            shown: None,
            written: BTreeMap::new(),
            written_for: None,
            cleared: false,
        }
    }

    /// Makes the rules those wanted.
    ///
    /// # Errors
    /// There is no tool, or none can make them. What could be made stays.
    pub fn keep(&mut self, rules: &RuleSet) -> Result<Look, FirewallError> {
        if let Some(mode) = self.mode {
            return Ok(self.keep_with(mode, rules)?);
        }
        let nft = Tool::Nft.path().is_some();
        let iptables = Tool::Iptables(Family::V4, Flavour::Default).path().is_some();
        let (first, second) = match (self.choice, nft, iptables) {
            (Choice::Auto, true, true) => (Mode::Nft, Some(Mode::Iptables)),
            (Choice::Auto | Choice::Only(Mode::Nft), true, _) => (Mode::Nft, None),
            (Choice::Auto | Choice::Only(Mode::Iptables), _, true) => (Mode::Iptables, None),
            (Choice::Auto, false, false) => {
                return Err(FirewallError::NoTool("there is neither nft nor iptables"));
            }
            (Choice::Only(Mode::Nft), false, _) => return Err(FirewallError::NoTool("there is no nft")),
            (Choice::Only(Mode::Iptables), _, false) => {
                return Err(FirewallError::NoTool("there is no iptables"));
            }
        };
        let mode = match (self.keep_with(first, rules), second) {
            (Ok(look), _) => {
                self.mode = Some(first);
                return Ok(look);
            }
            (Err(error), None) => return Err(error.into()),
            (Err(error), Some(second)) => match self.keep_with(second, rules) {
                Ok(mut look) => {
                    look.notes
                        .insert(format!("{} is not used: {error}", first.name()));
                    self.mode = Some(second);
                    return Ok(look);
                }
                Err(other) => FirewallError::Both(error, other),
            },
        };
        Err(mode)
    }

    fn keep_with(&mut self, mode: Mode, rules: &RuleSet) -> Result<Look, ToolError> {
        match mode {
            Mode::Nft => self.keep_nft(rules),
            Mode::Iptables => self.keep_iptables(rules),
        }
    }

    fn keep_nft(&mut self, rules: &RuleSet) -> Result<Look, ToolError> {
        let mut look = Look::new(Mode::Nft);
        let shown = nft::show(rules)?;
        let known = self.shown.as_ref();
        let is_right = known.is_some_and(|(wrote, then)| wrote == rules && *then == shown);
        if !is_right {
            if known.is_none_or(|(wrote, _)| wrote == rules) {
                look.amiss.push("the nft tables".to_owned());
            }
            self.write_nft(rules)?;
            self.shown = Some((rules.clone(), nft::show(rules)?));
        }
        if self.plain_only && rules.masquerade == Masquerade::Random {
            look.notes.insert(PLAIN_ONLY.to_owned());
        }
        let chains = nft::forward_chains()?;
        if self.written_for.as_ref() != Some(rules) {
            // Other rules than last time: what is there will be different, and that is nobody's doing.
            for written in self.written.values_mut().flatten() {
                written.values_mut().for_each(Vec::clear);
            }
            self.written_for = Some(rules.clone());
        }
        for family in [Family::V4, Family::V6] {
            for flavour in [Flavour::Nft, Flavour::Legacy] {
                match self.beside_nft(rules, family, flavour, &chains, &mut look) {
                    Ok(()) => {}
                    Err(error) if flavour == Flavour::Legacy => {
                        let list = Tool::LegacyTables(family).name();
                        // Without anything to be forwarded, what it may drop is no matter.
                        if rules.forward && rules.overlay(family).is_some() {
                            look.notes.insert(format!(
                                "the chains of iptables-legacy are not looked after: {error} (only root reads {list}, which says \
                                 whether there are any); where its FORWARD drops, packets of pods are dropped, and no rule \
                                 elsewhere can overrule it"
                            ));
                        }
                    }
                    Err(error) => {
                        look.notes
                            .insert(format!("iptables' own chains are not looked after: {error}"));
                    }
                }
            }
            if let (true, Some(part)) = (rules.forward, rules.overlay(family)) {
                let own = rules.names.table(family);
                let others = chains.iter().filter(|chain| {
                    chain.drops && chain.sees(family) && !chain.is_iptables(family) && chain.table != own
                });
                for chain in others {
                    let (of, table, name) = (&chain.family, &chain.table, &chain.chain);
                    let (ip, network) = (nft::keyword(family), part.network);
                    look.notes.insert(format!(
                        "chain {name} of nft table {of} {table} drops what it does not accept, and no rule elsewhere can overrule it; add: \
                         nft insert rule {of} {table} {name} {ip} saddr {network} accept; \
                         nft insert rule {of} {table} {name} {ip} daddr {network} accept"
                    ));
                }
            }
        }
        self.cleared = true;
        Ok(look)
    }

    fn write_nft(&mut self, rules: &RuleSet) -> Result<(), ToolError> {
        if rules.masquerade == Masquerade::Random && !self.plain_only {
            match nft::write(rules, Masquerade::Random) {
                Err(ToolError::Refused { .. }) => {}
                other => return other,
            }
            nft::write(rules, Masquerade::Plain)?;
            self.plain_only = true;
            return Ok(());
        }
        let masquerade = match rules.masquerade {
            Masquerade::Off => Masquerade::Off,
            Masquerade::Plain | Masquerade::Random => Masquerade::Plain,
        };
        nft::write(rules, masquerade)
    }

    /// With nft: the forward rules in iptables' chain where that may drop, and nothing else of ours there.
    fn beside_nft(
        &mut self,
        rules: &RuleSet,
        family: Family,
        flavour: Flavour,
        chains: &[nft::ForwardChain],
        look: &mut Look,
    ) -> Result<(), ToolError> {
        let present = present_tables(family, flavour, Tool::Nft.path().is_some())?;
        if present.is_empty() {
            return Ok(());
        }
        let Some(program) = program(family, flavour) else {
            let drops = chains
                .iter()
                .any(|chain| chain.is_iptables(family) && chain.drops);
            if let (Flavour::Nft, true, true, Some(part)) =
                (flavour, drops, rules.forward, rules.overlay(family))
            {
                let (ip, network) = (nft::keyword(family), part.network);
                look.notes.insert(format!(
                    "iptables' chain FORWARD drops what it does not accept, no rule elsewhere can overrule it, and there is no iptables to \
                     change it with; add: nft insert rule {ip} filter FORWARD {ip} saddr {network} accept; \
                     nft insert rule {ip} filter FORWARD {ip} daddr {network} accept"
                ));
            }
            return Ok(());
        };
        let forward = rules.forward
            && rules.overlay(family).is_some()
            && present.contains("filter")
            && xtables::forward_may_drop(rules, family, program)?;
        let wanted = Wanted {
            rules,
            masquerade: Masquerade::Off,
            forward,
            guard: false,
            present: &present,
        };
        let written = self.written.entry((family, program)).or_default();
        let amiss = xtables::sync(&wanted, family, program, written)?;
        look.amiss.extend(amiss);
        Ok(())
    }

    fn keep_iptables(&mut self, rules: &RuleSet) -> Result<Look, ToolError> {
        let mut look = Look::new(Mode::Iptables);
        let has_nft = Tool::Nft.path().is_some();
        if self.written_for.as_ref() != Some(rules) {
            for written in self.written.values_mut().flatten() {
                written.values_mut().for_each(Vec::clear);
            }
            self.written_for = Some(rules.clone());
        }
        for family in [Family::V4, Family::V6] {
            let needed = rules.overlay(family).is_some() && !rules.is_empty();
            let guards = xtables::has_guard(rules, family);
            if Tool::Iptables(family, Flavour::Default).path().is_none() {
                if needed || guards {
                    let name = Tool::Iptables(family, Flavour::Default).name();
                    look.notes
                        .insert(format!("{name} is not installed: no rules of that family"));
                }
                continue;
            }
            let flavour = flavour_of_default(family);
            let present = present_tables(family, flavour, has_nft)?;
            let written = self.written.entry((family, Flavour::Default)).or_default();
            let mut wanted = Wanted {
                rules,
                masquerade: rules.masquerade,
                forward: rules.forward,
                guard: true,
                present: &present,
            };
            if self.plain_only && wanted.masquerade == Masquerade::Random {
                wanted.masquerade = Masquerade::Plain;
            }
            let amiss = match xtables::sync(&wanted, family, Flavour::Default, written) {
                Err(ToolError::Refused { .. }) if wanted.masquerade == Masquerade::Random => {
                    wanted.masquerade = Masquerade::Plain;
                    let amiss = xtables::sync(&wanted, family, Flavour::Default, written)?;
                    self.plain_only = true;
                    amiss
                }
                other => other?,
            };
            look.amiss.extend(amiss);
            if self.plain_only && rules.masquerade == Masquerade::Random {
                look.notes.insert(PLAIN_ONLY.to_owned());
            }
            if !self.cleared {
                clear_others(rules, family, flavour, has_nft, &mut look)?;
            }
        }
        self.cleared = true;
        Ok(look)
    }
}

/// With iptables: takes away what was made with nft, or with the other iptables.
fn clear_others(
    rules: &RuleSet,
    family: Family,
    used: Flavour,
    has_nft: bool,
    look: &mut Look,
) -> Result<(), ToolError> {
    if has_nft {
        let table = rules.names.table(family);
        if nft::tables()?.contains(&(family, table.clone())) {
            nft::remove(&table, family)?;
            look.amiss.push(format!("nft table {table}, of another time"));
        }
    }
    let other = match used {
        Flavour::Legacy => Flavour::Nft,
        Flavour::Default | Flavour::Nft => Flavour::Legacy,
    };
    let present = match present_tables(family, other, has_nft) {
        Ok(present) => present,
        Err(error) => {
            look.notes.insert(format!(
                "what {} holds is not seen: {error}",
                Tool::Iptables(family, other).name()
            ));
            return Ok(());
        }
    };
    if let (Some(program), false) = (program(family, other), present.is_empty())
        && program != Flavour::Default
    {
        let wanted = Wanted {
            rules,
            masquerade: Masquerade::Off,
            forward: false,
            guard: false,
            present: &present,
        };
        look.amiss
            .extend(xtables::sync(&wanted, family, program, &mut None)?);
    }
    Ok(())
}

impl Look {
    fn new(mode: Mode) -> Self {
        Self {
            mode,
            amiss: Vec::new(),
            notes: BTreeSet::new(),
        }
    }
}

const PLAIN_ONLY: &str = "random source ports are refused (masquerade fully-random); masquerading without";

/// Which tables of iptables the kernel has in this namespace; none are made by asking.
fn present_tables(
    family: Family,
    flavour: Flavour,
    has_nft: bool,
) -> Result<BTreeSet<&'static str>, ToolError> {
    const TABLES: [&str; 2] = ["filter", "nat"];
    match flavour {
        Flavour::Nft | Flavour::Default if !has_nft => Ok(TABLES.into()),
        Flavour::Nft | Flavour::Default => {
            let mut present = BTreeSet::new();
            for table in TABLES {
                if nft::has_iptables_table(family, table)? {
                    present.insert(table);
                }
            }
            Ok(present)
        }
        Flavour::Legacy => {
            // Not there: nobody has used that iptables since the kernel started.
            let listed = Invocation::new(Tool::LegacyTables(family), &[]).execute()?;
            if !listed.success {
                return legacy_tables_asked_for(family, &TABLES);
            }
            let has = |table: &&str| listed.text.lines().any(|line| line == *table);
            Ok(TABLES.into_iter().filter(has).collect())
        }
    }
}

/// The same for who may not read the list, and asks the program: a table that holds nothing is as good as none. There are old tables in
/// the kernel, or there would be no list; so asking loads nothing, but may make an empty table in this namespace.
fn legacy_tables_asked_for(
    family: Family,
    tables: &[&'static str],
) -> Result<BTreeSet<&'static str>, ToolError> {
    let program = program(family, Flavour::Legacy)
        .ok_or_else(|| ToolError::Missing(Tool::Iptables(family, Flavour::Legacy).name()))?;
    let mut present = BTreeSet::new();
    for &table in tables {
        if xtables::holds_anything(family, program, table)? {
            present.insert(table);
        }
    }
    Ok(present)
}

/// Which of the two the program called `iptables` is.
fn flavour_of_default(family: Family) -> Flavour {
    let version = Invocation::new(Tool::Iptables(family, Flavour::Default), &["--version"]).demand();
    if version.is_ok_and(|text| text.contains("nf_tables")) {
        Flavour::Nft
    } else {
        Flavour::Legacy
    }
}

/// The program for a flavour, if there is one: its own, or the one called `iptables` if it is that.
fn program(family: Family, flavour: Flavour) -> Option<Flavour> {
    if Tool::Iptables(family, flavour).path().is_some() {
        return Some(flavour);
    }
    let is_it =
        Tool::Iptables(family, Flavour::Default).path().is_some() && flavour_of_default(family) == flavour;
    is_it.then_some(Flavour::Default)
}

/// Rules and tables that a daemon left, of any network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// What there is, a line each.
    pub told: Vec<String>,
    removal: Removal,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Removal {
    Table(Family, String),
    Script(Family, Flavour, String),
}

/// Lists what a Kersey or flannel left in the host's firewall.
///
/// # Errors
/// A tool that is there fails.
pub fn leftovers() -> Result<Vec<Leftover>, ToolError> {
    let mut found = Vec::new();
    let has_nft = Tool::Nft.path().is_some();
    if has_nft {
        found.extend(nft::tables()?.into_iter().map(|(family, table)| Leftover {
            told: vec![format!("nft table {} {table}", nft::keyword(family))],
            removal: Removal::Table(family, table),
        }));
    }
    for family in [Family::V4, Family::V6] {
        for flavour in [Flavour::Nft, Flavour::Legacy] {
            let Some(program) = program(family, flavour) else {
                continue;
            };
            for table in present_tables(family, flavour, has_nft)? {
                if let Some((told, script)) = xtables::leftovers(family, program, table)? {
                    found.push(Leftover {
                        told,
                        removal: Removal::Script(family, program, script),
                    });
                }
            }
        }
    }
    Ok(found)
}

impl Leftover {
    /// Takes it away.
    ///
    /// # Errors
    /// The tool fails.
    pub fn remove(&self) -> Result<(), ToolError> {
        match &self.removal {
            Removal::Table(family, table) => nft::remove(table, *family),
            Removal::Script(family, flavour, script) => xtables::remove(*family, *flavour, script),
        }
    }
}

/// Whether the kernel shows packets between ports of one bridge to the firewall (`br_netfilter`).
pub fn sees_bridges() -> bool {
    fs::exists("/proc/sys/net/bridge/bridge-nf-call-iptables").unwrap_or(false)
}
