//! The flags of one subcommand, from the command line, the environment and the config file.

use std::collections::BTreeMap;
use std::path::Path;

use clap::{Args, FromArgMatches};

use super::config_file::{self, ConfigFile, FromFile};
use super::environment::{self, FromVariable, Variables};
use super::go_flags::{Grammar, Setting};
use super::help::help;
use super::run::RunArgs;
use super::server::ServerArgs;
use super::stop::{Stop, UsageError};

/// Under which name the program was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Kersey,
    Flanneld,
}

/// What the environment and the config file had to say.
pub(super) struct FromVariables {
    /// Flag → what set it, as a user would point at it: a variable, or a file's line and key.
    pub(super) origin: BTreeMap<String, String>,
    /// Sentences for the log.
    pub(super) notes: Vec<String>,
}

/// Flags whose empty value means "not given", as in flannel, where that is their default.
const EMPTY_IS_UNSET: [&str; 10] = [
    "config",
    "public-ip",
    "public-ipv6",
    "iface-can-reach",
    "remote",
    "listen",
    "iface",
    "iface-regex",
    "etcd-endpoints",
    "network-config",
];

/// Reads the flags of one subcommand: Go's syntax, then the environment, then the config file, then clap's checks.
pub(super) fn flags_of<A: Args + FromArgMatches>(
    name: &'static str,
    words: &[String],
    variables: &Variables,
    entry: Entry,
) -> Result<(A, FromVariables), Stop> {
    let command = subcommand::<A>(name, entry);
    let grammar = Grammar::of(&command);
    let given = grammar.parse(words)?;
    if given.iter().any(|setting| setting.name == "help") {
        return Err(help(command, entry));
    }
    let from_variables = environment::settings(&grammar, &given, variables);
    // Each variable's value is checked by itself first, so that an error can name the variable.
    for found in &from_variables {
        let checked = command.clone().try_get_matches_from([found.setting.to_word()]);
        if let Err(error) = checked {
            return Err(bad_value(&found.variable, &found.setting.value, &error).into());
        }
    }
    let (from_file, mut notes) = file_settings(&command, &grammar, &given, &from_variables)?;
    for found in &from_file {
        let checked = command.clone().try_get_matches_from([found.setting.to_word()]);
        if let Err(error) = checked {
            let origin = format!("{} in {}", found.setting.name, found.place);
            return Err(bad_value(&origin, &found.setting.value, &error).into());
        }
    }
    let weaker = from_file.iter().map(|found| &found.setting);
    let mut settings: Vec<Setting> = weaker
        .chain(from_variables.iter().map(|found| &found.setting))
        .cloned()
        .collect();
    for setting in given {
        if setting.value.is_empty() && EMPTY_IS_UNSET.contains(&setting.name.as_str()) {
            settings.retain(|earlier| earlier.name != setting.name);
        } else {
            settings.push(setting);
        }
    }
    let matches = command
        .clone()
        .try_get_matches_from(settings.iter().map(Setting::to_word))
        .map_err(|error| misused(&settings, &error))?;
    let args = A::from_arg_matches(&matches).map_err(Stop::Clap)?;
    notes.extend(environment::near_misses(&grammar, variables));
    let from_file = from_file.into_iter().map(|found| {
        let origin = format!("{}: {}", found.place, found.setting.name);
        (found.setting.name, origin)
    });
    let from_variables = from_variables
        .into_iter()
        .map(|found| (found.setting.name, found.variable));
    Ok((
        args,
        FromVariables {
            notes,
            origin: from_file.chain(from_variables).collect(),
        },
    ))
}

/// What the config file sets and neither the command line nor a variable does, and what the user should know about it.
fn file_settings(
    command: &clap::Command,
    grammar: &Grammar,
    given: &[Setting],
    from_variables: &[FromVariable],
) -> Result<(Vec<FromFile>, Vec<String>), Stop> {
    let variables = from_variables.iter().map(|found| &found.setting);
    let mut named = given.iter().rev().chain(variables.clone());
    let Some(path) = named
        .find(|setting| setting.name == "config")
        .map(|setting| setting.value.as_str())
        .filter(|path| !path.is_empty())
    else {
        return Ok((Vec::new(), Vec::new()));
    };
    let file = match ConfigFile::read(Path::new(path)) {
        Ok(file) => file,
        // Whoever asks for the status need not be able to read secrets.
        Err(error)
            if error.kind() == std::io::ErrorKind::PermissionDenied
                && !CONFIGURED.contains(&command.get_name()) =>
        {
            return Ok((Vec::new(), Vec::new()));
        }
        Err(error) => {
            return Err(Stop::Misused(UsageError::new(
                format!("cannot use the config file {path}: {error}"),
                "name another with --config=FILE, or do without by --config=",
            )));
        }
    };
    let settings = file.settings(&file_grammar())?;
    let notes = if CONFIGURED.contains(&command.get_name()) {
        file.notes(&settings)
    } else {
        Vec::new()
    };
    let silenced = |name: &str| {
        let mut louder = given.iter().chain(variables.clone());
        louder.any(|setting| setting.name == name)
    };
    let heard = settings
        .into_iter()
        .filter(|found| {
            let name = found.setting.name.as_str();
            let asks = !found.setting.value.is_empty() || !EMPTY_IS_UNSET.contains(&name);
            // What a daemon does with it, no other subcommand does.
            let is_daemons = name == "network-config" && !CONFIGURED.contains(&command.get_name());
            asks && !is_daemons && grammar.flag(name).is_some() && !silenced(name)
        })
        .collect();
    Ok((heard, notes))
}

/// The subcommands whose flags a config file gives; the others take from it what they know.
const CONFIGURED: [&str; 2] = ["run", "server"];

/// Every flag a config file may set.
pub(super) fn file_grammar() -> Grammar {
    Grammar::of(&subcommand::<RunArgs>("run", Entry::Kersey))
        .and(Grammar::of(&subcommand::<ServerArgs>("server", Entry::Kersey)))
}

/// The clap command for the flags of one subcommand, without a program name in front of them.
pub(super) fn subcommand<A: Args>(name: &'static str, entry: Entry) -> clap::Command {
    let shown = match entry {
        Entry::Kersey => format!("kersey {name}"),
        Entry::Flanneld => "flanneld".to_owned(),
    };
    A::augment_args(clap::Command::new(name).bin_name(&shown).display_name(shown))
        .no_binary_name(true)
        .args_override_self(true)
        .disable_help_flag(true)
        .arg(
            clap::Arg::new("config")
                .long("config")
                .value_name("FILE")
                .help("TOML or JSON file with flags; an empty name: none [default: /etc/kersey/kersey.toml, if there]")
                .help_heading("Other"),
        )
        .arg(
            clap::Arg::new("help")
                .short('h')
                .long("help")
                .help("Print help")
                .help_heading("Other")
                .action(clap::ArgAction::SetTrue),
        )
        .max_term_width(100)
}

/// Finds the value clap refused and says why.
fn misused(settings: &[Setting], error: &clap::Error) -> Stop {
    let context = |kind| match error.get(kind) {
        Some(clap::error::ContextValue::String(text)) => Some(text.clone()),
        Some(_) | None => None,
    };
    let refused = context(clap::error::ContextKind::InvalidArg).and_then(|arg| {
        let name = arg
            .trim_start_matches('-')
            .split([' ', '=', '['])
            .next()?
            .to_owned();
        settings.iter().rev().find(|setting| setting.name == name)
    });
    match refused {
        Some(setting) => {
            let flag = format!("--{}", setting.name);
            bad_value(&flag, &setting.value, error).into()
        }
        None => Stop::Misused(UsageError::new(first_line(error), "see --help")),
    }
}

pub(super) fn bad_value(origin: &str, value: &str, error: &clap::Error) -> UsageError {
    let shown = if config_file::is_secret(origin) {
        "***"
    } else {
        value
    };
    let possible = match error.get(clap::error::ContextKind::ValidValue) {
        Some(clap::error::ContextValue::Strings(values)) => {
            Some(format!("expected one of {}", values.join(", ")))
        }
        Some(_) | None => None,
    };
    let rule = std::error::Error::source(error)
        .map(ToString::to_string)
        .or(possible)
        .unwrap_or_else(|| first_line(error));
    // One line has all of it: field, value and rule.
    UsageError::new(format!("invalid value {shown:?} for {origin}: {rule}"), "")
}

pub(super) fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}
