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
//! **Which tool.** nft if it is there and the kernel takes the rules from it, else the program called `iptables`, else, where that is the
//! one over nf_tables and the kernel has not what it needs, `iptables-legacy`. A note says why. What is chosen stays chosen.
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
    /// nft, else iptables, else the old one.
    Auto,
    /// nft.
    Nft,
    /// iptables, else the old one.
    Iptables,
}

/// A tool rules are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// nft.
    Nft,
    /// The programs called iptables and ip6tables.
    Iptables,
    /// iptables-legacy and ip6tables-legacy, where the others are over nf_tables and the kernel lacks that.
    Legacy,
}

impl Mode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
            Self::Legacy => "iptables-legacy",
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
    #[error("{}", join(.0))]
    All(Vec<ToolError>),
}

fn join(errors: &[ToolError]) -> String {
    let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
    all.join("; ")
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
        let mut failed = Vec::new();
        for mode in self.candidates()? {
            // Another name of one that was tried.
            if mode == Mode::Legacy && flavour_of_default(Family::V4).is_ok_and(|it| it == Flavour::Legacy) {
                continue;
            }
            match self.keep_with(mode, rules) {
                Ok(mut look) => {
                    if !failed.is_empty() {
                        let (tool, why) = (mode.name(), join(&failed));
                        look.notes
                            .insert(format!("firewall rules are made with {tool}: {why}"));
                    }
                    self.mode = Some(mode);
                    return Ok(look);
                }
                Err(error) => failed.push(error),
            }
        }
        Err(FirewallError::All(failed))
    }

    /// The tools that are there and may be used, best first.
    fn candidates(&self) -> Result<Vec<Mode>, FirewallError> {
        let nft = Tool::Nft.path().is_some();
        let iptables = Tool::Iptables(Family::V4, Flavour::Default).path().is_some();
        let legacy = Tool::Iptables(Family::V4, Flavour::Legacy).path().is_some();
        let (with_nft, with_iptables, missing) = match self.choice {
            Choice::Auto => (nft, iptables, "there is neither nft nor iptables"),
            Choice::Nft => (nft, false, "there is no nft"),
            Choice::Iptables => (false, iptables, "there is no iptables"),
        };
        let all = [
            (Mode::Nft, with_nft),
            (Mode::Iptables, with_iptables),
            (Mode::Legacy, with_iptables && legacy),
        ];
        let found: Vec<Mode> = all
            .into_iter()
            .filter_map(|(mode, may)| may.then_some(mode))
            .collect();
        if found.is_empty() {
            return Err(FirewallError::NoTool(missing));
        }
        Ok(found)
    }

    fn keep_with(&mut self, mode: Mode, rules: &RuleSet) -> Result<Look, ToolError> {
        match mode {
            Mode::Nft => self.keep_nft(rules),
            Mode::Iptables => self.keep_iptables(rules, mode, Flavour::Default),
            Mode::Legacy => self.keep_iptables(rules, mode, Flavour::Legacy),
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
        let tables = NfTables::look()?;
        if self.written_for.as_ref() != Some(rules) {
            // Other rules than last time: what is there will be different, and that is nobody's doing.
            for written in self.written.values_mut().flatten() {
                written.values_mut().for_each(Vec::clear);
            }
            self.written_for = Some(rules.clone());
        }
        for family in [Family::V4, Family::V6] {
            for flavour in [Flavour::Nft, Flavour::Legacy] {
                match self.beside_nft(rules, family, flavour, (&chains, &tables), &mut look) {
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
        (chains, tables): (&[nft::ForwardChain], &NfTables),
        look: &mut Look,
    ) -> Result<(), ToolError> {
        let present = present_tables(family, flavour, tables)?;
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

    fn keep_iptables(&mut self, rules: &RuleSet, mode: Mode, program: Flavour) -> Result<Look, ToolError> {
        let mut look = Look::new(mode);
        let tables = NfTables::look()?;
        if self.written_for.as_ref() != Some(rules) {
            for written in self.written.values_mut().flatten() {
                written.values_mut().for_each(Vec::clear);
            }
            self.written_for = Some(rules.clone());
        }
        for family in [Family::V4, Family::V6] {
            let needed = rules.overlay(family).is_some() && !rules.is_empty();
            let guards = xtables::has_guard(rules, family);
            if Tool::Iptables(family, program).path().is_none() {
                if needed || guards {
                    let name = Tool::Iptables(family, program).name();
                    look.notes
                        .insert(format!("{name} is not installed: no rules of that family"));
                }
                continue;
            }
            let flavour = match program {
                Flavour::Default => flavour_of_default(family)?,
                Flavour::Nft | Flavour::Legacy => program,
            };
            let present = present_tables(family, flavour, &tables)?;
            let written = self.written.entry((family, program)).or_default();
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
            let amiss = match xtables::sync(&wanted, family, program, written) {
                Err(ToolError::Refused { .. }) if wanted.masquerade == Masquerade::Random => {
                    wanted.masquerade = Masquerade::Plain;
                    let amiss = xtables::sync(&wanted, family, program, written)?;
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
                clear_others(rules, family, flavour, &tables, &mut look)?;
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
    tables: &NfTables,
    look: &mut Look,
) -> Result<(), ToolError> {
    let table = rules.names.table(family);
    if tables.own().contains(&(family, table.clone())) {
        nft::remove(&table, family)?;
        look.amiss.push(format!("nft table {table}, of another time"));
    }
    let other = match used {
        Flavour::Legacy => Flavour::Nft,
        Flavour::Default | Flavour::Nft => Flavour::Legacy,
    };
    let present = match present_tables(family, other, tables) {
        Ok(present) => present,
        Err(error) => {
            look.notes.insert(format!(
                "what {} holds is not seen: {error}",
                Tool::Iptables(family, other).name()
            ));
            return Ok(());
        }
    };
    let Some(program) = program(family, other).filter(|_| !present.is_empty()) else {
        return Ok(());
    };
    let wanted = Wanted {
        rules,
        masquerade: Masquerade::Off,
        forward: false,
        guard: false,
        present: &present,
    };
    match xtables::sync(&wanted, family, program, &mut None) {
        Ok(amiss) => look.amiss.extend(amiss),
        // Where it does not work, nobody has made anything with it.
        Err(error) if error.is_unsupported() => {}
        Err(error) => return Err(error),
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

/// What there is of nf_tables in this namespace.
enum NfTables {
    /// There is no nft to ask.
    Unknown,
    /// The kernel has no nf_tables.
    Unsupported,
    /// All tables, as nft lists them.
    Listed(String),
}

impl NfTables {
    fn look() -> Result<Self, ToolError> {
        if Tool::Nft.path().is_none() {
            return Ok(Self::Unknown);
        }
        match nft::list() {
            Ok(list) => Ok(Self::Listed(list)),
            Err(error) if error.is_unsupported() => Ok(Self::Unsupported),
            Err(error) => Err(error),
        }
    }

    /// Those of flannel's and ours, of all networks.
    fn own(&self) -> Vec<(Family, String)> {
        match self {
            Self::Unknown | Self::Unsupported => Vec::new(),
            Self::Listed(list) => nft::own_tables(list),
        }
    }
}

/// Which tables of iptables the kernel has in this namespace; none are made by asking.
fn present_tables(
    family: Family,
    flavour: Flavour,
    tables: &NfTables,
) -> Result<BTreeSet<&'static str>, ToolError> {
    const TABLES: [&str; 2] = ["filter", "nat"];
    match flavour {
        Flavour::Nft | Flavour::Default => Ok(match tables {
            NfTables::Unknown => TABLES.into(),
            NfTables::Unsupported => BTreeSet::new(),
            NfTables::Listed(list) => {
                let has = |table: &&str| nft::has_iptables_table(list, family, table);
                TABLES.into_iter().filter(has).collect()
            }
        }),
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
fn flavour_of_default(family: Family) -> Result<Flavour, ToolError> {
    let version = Invocation::new(Tool::Iptables(family, Flavour::Default), &["--version"]).demand()?;
    Ok(if version.contains("nf_tables") {
        Flavour::Nft
    } else {
        Flavour::Legacy
    })
}

/// The program for a flavour, if there is one: its own, or the one called `iptables` if it is that.
fn program(family: Family, flavour: Flavour) -> Option<Flavour> {
    if Tool::Iptables(family, flavour).path().is_some() {
        return Some(flavour);
    }
    let is_it = Tool::Iptables(family, Flavour::Default).path().is_some()
        && flavour_of_default(family).is_ok_and(|default| default == flavour);
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
    let tables = NfTables::look()?;
    let of_nft = |(family, table): (Family, String)| Leftover {
        told: vec![format!("nft table {} {table}", nft::keyword(family))],
        removal: Removal::Table(family, table),
    };
    let mut found: Vec<Leftover> = tables.own().into_iter().map(of_nft).collect();
    for family in [Family::V4, Family::V6] {
        for flavour in [Flavour::Nft, Flavour::Legacy] {
            let Some(program) = program(family, flavour) else {
                continue;
            };
            for table in present_tables(family, flavour, &tables)? {
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
