//! The command line and the environment, turned into the options of one subcommand.
//!
//! Parsing has four steps, so that flannel's users keep their habits and clap still writes the help:
//!
//! 1. `go_flags` reads the arguments as Go's `flag` package would: `(name, value)` pairs;
//! 2. `environment` adds what `KERSEY_X` and `FLANNELD_X` set and the command line does not;
//! 3. `config_file` adds what `--config` or `/etc/kersey/kersey.toml` sets and neither of those does;
//! 4. clap reads the result, in the one form `--name=value`, checks each value and fills the subcommand's struct,
//!    which becomes plain data in [`options`](crate::options).
//!
//! Started as `flanneld` (a link to this binary will do) there are no subcommands: all arguments are flags of `run`,
//! and `-listen` alone makes a server of it, as flannel 0.5 to 0.7 did. Started as `mk-docker-opts.sh`, it is that script.
//!
//! All of it is pure, but for reading the file: arguments and variables in, a [`Parsed`] or a [`Stop`] out. A subcommand is
//! one file in this folder with its flags, one variant of [`Command`], one arm in `parse` and one line in `whole`.

pub mod bench;
pub mod cleanup;
pub mod config;
mod config_file;
pub mod docker_opts;
mod environment;
mod firewall;
mod go_flags;
mod http;
pub mod lab;
mod log_dam;
mod log_lines;
mod logging;
pub mod pages;
mod process;
mod progress;
pub mod reserve;
mod run;
pub mod server;
pub mod status;
mod store;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, FromArgMatches};

pub use self::logging::{set_log_level, start_logging};

use self::bench::BenchOptions;
use self::cleanup::CleanupArgs;
use self::config::ConfigOptions;
use self::config_file::{ConfigFile, FromFile};
use self::docker_opts::DockerOptsOptions;
use self::environment::{FromVariable, Variables};
use self::go_flags::{Grammar, Setting};
use self::lab::LabOptions;
use self::pages::{CompletionsOptions, ManOptions};
use self::reserve::ReserveArgs;
use self::run::RunArgs;
use self::server::ServerArgs;
use self::status::StatusArgs;
use crate::options::{CleanupOptions, LogOptions, ReserveOptions, RunOptions, ServerOptions, StatusOptions};

/// What the process tells its parent; supervisors should restart on [`FAILED`](exit::FAILED) only. 5 and 6 are never given: a store that is
/// away is waited for, and a lease that is lost is taken anew.
pub mod exit {
    /// All went well, or the daemon was asked to stop.
    pub const OK: u8 = 0;
    /// Something failed at run time.
    pub const FAILED: u8 = 1;
    /// The command line, a variable or the config file is wrong.
    pub const USAGE: u8 = 2;
    /// This machine lacks something: a capability, a device, a kernel feature.
    pub const ENVIRONMENT: u8 = 3;
    /// The network config is invalid.
    pub const CONFIG: u8 = 4;
    /// Another daemon runs: it has the status socket, or holds the data directory.
    pub const INSTANCE: u8 = 7;
}

/// A subcommand and its options.
#[derive(Debug)]
pub enum Command {
    /// `kersey run`, or `flanneld`.
    Run(Box<RunOptions>),
    /// `kersey server`, or `flanneld -listen`.
    Server(Box<ServerOptions>),
    /// `kersey reserve`.
    Reserve(Box<ReserveOptions>),
    /// `kersey status`.
    Status(StatusOptions),
    /// `kersey cleanup`.
    Cleanup(CleanupOptions),
    /// `kersey lab`.
    Lab(Box<LabOptions>),
    /// `kersey bench`.
    Bench(Box<BenchOptions>),
    /// `kersey config`.
    Config(ConfigOptions),
    /// `kersey docker-opts`, or `mk-docker-opts.sh`.
    DockerOpts(DockerOptsOptions),
    /// `kersey man`.
    Man(ManOptions),
    /// `kersey completions`.
    Completions(CompletionsOptions),
}

/// What to do, and what to tell the user about how it was asked.
#[derive(Debug)]
pub struct Parsed {
    /// What to do.
    pub command: Command,
    /// Sentences to log once logging has started: flags without effect, variables with a typo.
    pub notes: Vec<String>,
}

/// Why there is nothing to do.
#[derive(Debug)]
pub enum Stop {
    /// Help or a version was asked for.
    Told {
        /// What to print.
        text: String,
        /// Where to.
        stream: Stream,
    },
    /// As `Told`, but it is a failure.
    Refused {
        /// What to print.
        text: String,
        /// Where to.
        stream: Stream,
        /// The exit status.
        status: u8,
    },
    /// The command line is wrong.
    Misused(UsageError),
    /// Clap's own message, for the words before the flags.
    Clap(clap::Error),
}

/// Where a text goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error, where flanneld prints help and version.
    Err,
}

/// A mistake on the command line, in the environment or in the config file, and the way out, if the mistake does not say it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}{}{hint}", if hint.is_empty() { "" } else { "\n  hint: " })]
pub struct UsageError {
    message: String,
    hint: String,
}

impl UsageError {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            hint: hint.into(),
        }
    }
}

impl From<UsageError> for Stop {
    fn from(error: UsageError) -> Self {
        Self::Misused(error)
    }
}

impl Stop {
    /// Prints what there is to say and gives the exit status.
    pub fn report(self) -> ExitCode {
        let (text, stream, status) = match self {
            Self::Told { text, stream } => (text, stream, exit::OK),
            Self::Refused { text, stream, status } => (text, stream, status),
            Self::Misused(error) => (format!("error: {error}\n"), Stream::Err, exit::USAGE),
            Self::Clap(error) => {
                let status = u8::try_from(error.exit_code()).unwrap_or(exit::USAGE);
                // Nobody is left to tell when the terminal is gone.
                let _ = error.print();
                return ExitCode::from(status);
            }
        };
        let _ = match stream {
            Stream::Out => std::io::stdout().write_all(text.as_bytes()),
            Stream::Err => std::io::stderr().write_all(text.as_bytes()),
        };
        ExitCode::from(status)
    }
}

/// Reads this process's arguments and environment.
///
/// # Errors
/// Help or version was asked for, or something is wrong.
pub fn parse_process() -> Result<Parsed, Stop> {
    let text = |word: OsString| word.to_string_lossy().into_owned();
    let args: Vec<String> = std::env::args_os().map(text).collect();
    let mut variables: Variables = std::env::vars_os()
        .map(|(name, value)| (text(name), text(value)))
        .collect();
    // The file that is there by itself is as good as named.
    let is_named = ["KERSEY_CONFIG", "FLANNELD_CONFIG"]
        .iter()
        .any(|name| variables.get(*name).is_some_and(|value| !value.is_empty()));
    if !is_named && Path::new(config_file::DEFAULT_PATH).exists() {
        variables.insert("KERSEY_CONFIG".to_owned(), config_file::DEFAULT_PATH.to_owned());
    }
    parse(&args, &variables)
}

/// Reads them once more, for a daemon that runs: files they name may have changed. The level of log lines changes at once.
///
/// # Errors
/// They would not make a daemon any more; says why.
pub fn reread_run_options() -> Result<RunOptions, String> {
    match parse_process() {
        Ok(Parsed {
            command: Command::Run(options),
            ..
        }) => {
            set_log_level(options.log.level);
            Ok(*options)
        }
        Ok(_) => Err("they ask for another subcommand".to_owned()),
        Err(Stop::Misused(error)) => Err(error.to_string().replace('\n', ";")),
        Err(Stop::Told { .. } | Stop::Clap(_) | Stop::Refused { .. }) => {
            Err("they cannot be read".to_owned())
        }
    }
}

/// Turns arguments (the first is the program's name) and environment variables into a subcommand and its options.
///
/// # Errors
/// Help or version was asked for, or something is wrong.
pub fn parse(args: &[String], variables: &Variables) -> Result<Parsed, Stop> {
    let (program, rest) = match args.split_first() {
        Some((program, rest)) => (program.rsplit('/').next().unwrap_or_default(), rest),
        None => ("kersey", args),
    };
    if program == "flanneld" {
        return run(rest, variables, Entry::Flanneld);
    }
    if ["mk-docker-opts.sh", "mk-docker-opts"].contains(&program) {
        return docker_opts::as_script(program, rest);
    }
    match rest.split_first() {
        Some((word, flags)) if word == "run" => run(flags, variables, Entry::Kersey),
        Some((word, flags)) if word == "server" => {
            let (args, variables) = flags_of::<ServerArgs>("server", flags, variables, Entry::Kersey)?;
            let options = args.into_options()?;
            Ok(Parsed {
                command: Command::Server(Box::new(options)),
                notes: variables.notes,
            })
        }
        Some((word, rest)) if word == "reserve" => {
            // The words come first, as in `kersey reserve add SUBNET ADDRESS --remote ...`.
            let words = rest.iter().take_while(|word| !word.starts_with('-')).count();
            let (words, flags) = rest.split_at(words);
            let (args, variables) = flags_of::<ReserveArgs>("reserve", flags, variables, Entry::Kersey)?;
            Ok(Parsed {
                command: Command::Reserve(Box::new(args.into_options(words)?)),
                notes: variables.notes,
            })
        }
        Some((word, flags)) if word == "status" => {
            let (args, _) = flags_of::<StatusArgs>("status", flags, variables, Entry::Kersey)?;
            Ok(Parsed {
                command: Command::Status(args.into_options()),
                notes: Vec::new(),
            })
        }
        Some((word, flags)) if word == "cleanup" => {
            let (args, _) = flags_of::<CleanupArgs>("cleanup", flags, variables, Entry::Kersey)?;
            Ok(Parsed {
                command: Command::Cleanup(args.into_options()),
                notes: Vec::new(),
            })
        }
        // These two have no flannel ancestor: clap reads them as they are.
        Some((word, flags)) if word == "lab" => {
            let options = plain::<LabOptions>("lab", flags)?;
            options.review()?;
            Ok(Parsed {
                command: Command::Lab(Box::new(options)),
                notes: Vec::new(),
            })
        }
        Some((word, flags)) if word == "bench" => Ok(Parsed {
            command: Command::Bench(Box::new(plain::<BenchOptions>("bench", flags)?)),
            notes: Vec::new(),
        }),
        Some((word, flags)) if word == "config" => Ok(Parsed {
            command: Command::Config(plain::<ConfigOptions>("config", flags)?),
            notes: Vec::new(),
        }),
        Some((word, flags)) if word == "docker-opts" => Ok(Parsed {
            command: Command::DockerOpts(plain::<DockerOptsOptions>("docker-opts", flags)?),
            notes: Vec::new(),
        }),
        Some((word, flags)) if word == "man" => Ok(Parsed {
            command: Command::Man(plain::<ManOptions>("man", flags)?),
            notes: Vec::new(),
        }),
        Some((word, flags)) if word == "completions" => Ok(Parsed {
            command: Command::Completions(plain::<CompletionsOptions>("completions", flags)?),
            notes: Vec::new(),
        }),
        Some((word, [name, ..])) if word == "help" && SUBCOMMANDS.contains(&name.as_str()) => parse(
            &["kersey".to_owned(), name.clone(), "--help".to_owned()],
            variables,
        ),
        Some((word, [])) if ["-version", "--version", "-V", "version"].contains(&word.as_str()) => {
            Err(version(Stream::Out))
        }
        Some((word, _)) if word == "-help" => Err(top_level(&["--help".to_owned()])),
        Some((word, _)) if word.starts_with('-') && !["-h", "--help"].contains(&word.as_str()) => {
            Err(Stop::Misused(UsageError::new(
                format!("{word} needs a subcommand before it"),
                format!("kersey run {word} ..., or start the program under the name flanneld"),
            )))
        }
        Some(_) | None => Err(top_level(rest)),
    }
}

fn version(stream: Stream) -> Stop {
    Stop::Told {
        text: format!("kersey {}\n", env!("CARGO_PKG_VERSION")),
        stream,
    }
}

/// Names of the subcommands whose flags are in Go's syntax.
const SUBCOMMANDS: [&str; 5] = ["run", "server", "reserve", "status", "cleanup"];

/// The options for logging that a command carries.
pub fn log_options(command: &Command) -> Option<LogOptions> {
    match command {
        Command::Run(options) => Some(options.log),
        Command::Server(options) => Some(options.log),
        Command::Reserve(_)
        | Command::Status(_)
        | Command::Cleanup(_)
        | Command::Lab(_)
        | Command::Bench(_)
        | Command::Config(_)
        | Command::DockerOpts(_)
        | Command::Man(_)
        | Command::Completions(_) => None,
    }
}

/// Reads a subcommand's words in clap's own syntax.
fn plain<A: Args + FromArgMatches>(name: &'static str, words: &[String]) -> Result<A, Stop> {
    let command = A::augment_args(clap::Command::new(name))
        .bin_name(format!("kersey {name}"))
        .max_term_width(100);
    let words = std::iter::once(name.to_owned()).chain(words.iter().cloned());
    let matches = command.try_get_matches_from(words).map_err(Stop::Clap)?;
    A::from_arg_matches(&matches).map_err(Stop::Clap)
}

/// Under which name the program was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Kersey,
    Flanneld,
}

fn run(flags: &[String], variables: &Variables, entry: Entry) -> Result<Parsed, Stop> {
    let (args, from_variables) = flags_of::<RunArgs>("run", flags, variables, entry)?;
    if args.wants_version() {
        return Err(version(Stream::Err));
    }
    let mut notes = from_variables.notes;
    notes.extend(args.review(&from_variables.origin)?);
    for name in run::OTHER_VARIABLES {
        if variables.get(name).is_some_and(|value| !value.is_empty()) {
            notes.push(format!(
                "the environment variable {name} has no effect: it matters only with --kube-subnet-mgr"
            ));
        }
    }
    let command = if entry == Entry::Flanneld && args.wants_server() {
        Command::Server(Box::new(args.into_flannel_server()?))
    } else {
        let mut options = args.into_options()?;
        options.process.config_file = config_file::path(flags, variables);
        Command::Run(Box::new(options))
    };
    Ok(Parsed { command, notes })
}

/// What the environment and the config file had to say.
struct FromVariables {
    /// Flag → what set it, as a user would point at it: a variable, or a file's line and key.
    origin: BTreeMap<String, String>,
    /// Sentences for the log.
    notes: Vec<String>,
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
fn flags_of<A: Args + FromArgMatches>(
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
fn file_grammar() -> Grammar {
    Grammar::of(&subcommand::<RunArgs>("run", Entry::Kersey))
        .and(Grammar::of(&subcommand::<ServerArgs>("server", Entry::Kersey)))
}

/// The clap command for the flags of one subcommand, without a program name in front of them.
fn subcommand<A: Args>(name: &'static str, entry: Entry) -> clap::Command {
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

/// Clap's compact help, one line a flag, under the whole description.
fn help(mut command: clap::Command, entry: Entry) -> Stop {
    if let Some(about) = command.get_long_about().cloned() {
        command = command.about(about);
    }
    Stop::Told {
        text: command.render_help().to_string(),
        stream: match entry {
            Entry::Kersey => Stream::Out,
            Entry::Flanneld => Stream::Err,
        },
    }
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

fn bad_value(origin: &str, value: &str, error: &clap::Error) -> UsageError {
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

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

/// Help or an error for words that start no subcommand.
fn top_level(words: &[String]) -> Stop {
    let mut command = whole();
    command.build();
    match command.try_get_matches_from(std::iter::once(&"kersey".to_owned()).chain(words)) {
        Ok(_) => Stop::Misused(UsageError::new("no subcommand", "see kersey --help")),
        Err(error) => Stop::Clap(error),
    }
}

/// The program with all its subcommands: for the help, manual pages and completions.
fn whole() -> clap::Command {
    clap::Command::new("kersey")
        .version(env!("CARGO_PKG_VERSION"))
        .about(
            "Flannel without the kernel's tunnel drivers: a drop-in flanneld that encapsulates in userspace",
        )
        .subcommand_required(true)
        .arg_required_else_help(true)
        .max_term_width(100)
        .subcommand(documented::<RunArgs>("run"))
        .subcommand(documented::<ServerArgs>("server"))
        .subcommand(documented::<ReserveArgs>("reserve"))
        .subcommand(documented::<StatusArgs>("status"))
        .subcommand(documented::<CleanupArgs>("cleanup"))
        .subcommand(with_help::<ConfigOptions>("config"))
        .subcommand(with_help::<DockerOptsOptions>("docker-opts"))
        .subcommand(with_help::<LabOptions>("lab"))
        .subcommand(with_help::<BenchOptions>("bench"))
        .subcommand(with_help::<ManOptions>("man"))
        .subcommand(with_help::<CompletionsOptions>("completions"))
        .after_help(
            "Started under the name flanneld, the program takes the flags of `kersey run` directly; as mk-docker-opts.sh, \
             those of `kersey docker-opts`.\n\n\
             Exit status: 0 done, or stopped on request; 1 failed; 2 the command line, a variable or the config file is \
             wrong; 3 this machine lacks something; 4 the network config cannot be run; 7 another daemon runs.",
        )
}

/// A subcommand in clap's own syntax.
fn with_help<A: Args>(name: &'static str) -> clap::Command {
    A::augment_args(clap::Command::new(name))
}

/// A subcommand in Go's syntax.
fn documented<A: Args>(name: &'static str) -> clap::Command {
    subcommand::<A>(name, Entry::Kersey).no_binary_name(false)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::addr::NetworkName;
    use crate::options::{
        CleanupMode, Enabled, FirewallTool, IngressCheck, LogLevel, Masquerade, StatusForm, StoreKind,
    };

    #[test]
    fn flanneld_without_flags_is_flannels_defaults() {
        let options = run_options(&["flanneld"], &[]);
        let StoreKind::Etcd(etcd) = &options.store.kind else {
            panic!("{:?}", options.store);
        };
        assert_eq!(etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!(etcd.prefix, "/coreos.com/network");
        assert_eq!(options.subnet_file, Path::new("/run/flannel/subnet.env"));
        assert_eq!(options.lease.ttl, Duration::from_secs(86_400));
        assert_eq!(options.lease.renew_margin, Duration::from_secs(3600));
        assert_eq!(options.packet_path.device, "flannel0");
        assert_eq!(options.packet_path.ingress_check, IngressCheck::Strict);
        assert_eq!(options.status_socket, Path::new("/run/kersey/status.sock"));
        assert_eq!(options.log.level, LogLevel::Info);
    }

    #[test]
    fn single_flags_take_the_last_value_and_iface_accumulates() {
        let options = run_options(
            &[
                "/opt/bin/flanneld",
                "-iface",
                "eth0",
                "--iface=eth1",
                "-etcd-prefix=/a",
                "-etcd-prefix",
                "/b",
                "-v=0x2",
            ],
            &[],
        );
        assert_eq!(options.interface.iface, ["eth0", "eth1"]);
        let StoreKind::Etcd(etcd) = options.store.kind else {
            panic!("etcd expected");
        };
        assert_eq!(etcd.prefix, "/b");
        assert_eq!(options.log.level, LogLevel::Debug);
    }

    #[test]
    fn an_empty_value_unsets_where_flannels_default_is_empty() {
        let options = run_options(
            &["kersey", "run", "-public-ip=10.0.0.1", "-public-ip="],
            &[("FLANNELD_PUBLIC_IP", "1.1.1.1")],
        );
        assert_eq!(options.interface.public_ip, None);
    }

    #[test]
    fn the_command_line_wins_over_the_environment() {
        let variables = [
            ("FLANNELD_PUBLIC_IP", "10.0.0.1"),
            ("KERSEY_QUEUES", "3"),
            ("FLANNELD_QUEUES", "5"),
        ];
        let options = run_options(&["kersey", "run", "--public-ip", "10.0.0.2"], &variables);
        assert_eq!(options.interface.public_ip, Some("10.0.0.2".parse().unwrap()));
        assert_eq!(
            options.packet_path.queues.map(std::num::NonZeroUsize::get),
            Some(3)
        );
    }

    #[test]
    fn firewall_flags_are_flannels_with_flannels_defaults() {
        let firewall = |flags: &[&str], variables: &[(&str, &str)]| {
            run_options(&[&["kersey", "run"], flags].concat(), variables).firewall
        };
        let default = firewall(&[], &[]);
        assert_eq!(default.masquerade, Masquerade::Off);
        assert_eq!(default.resync, Duration::from_secs(5));
        assert_eq!(
            (default.forward_rules, default.blackhole, default.tunnel_guard),
            (Enabled::Yes, Enabled::No, Enabled::Yes)
        );
        assert_eq!(default.tool, FirewallTool::Auto);
        let flags = [
            "-ip-masq",
            "-ip-masq-fully-random-disable",
            "-iptables-forward-rules=0",
            "-iptables-resync=1",
            "-ip-blackhole-route",
        ];
        let set = firewall(&flags, &[]);
        assert_eq!(set.masquerade, Masquerade::Plain);
        assert_eq!((set.forward_rules, set.blackhole), (Enabled::No, Enabled::Yes));
        assert_eq!(set.resync, Duration::from_secs(1));
        let set = firewall(&["--firewall", "iptables"], &[("FLANNELD_IP_MASQ", "true")]);
        assert_eq!(
            (set.masquerade, set.tool),
            (Masquerade::Random, FirewallTool::Iptables)
        );
    }

    #[test]
    fn the_store_follows_from_the_flags() {
        for (flags, expected) in [
            (
                &["--remote=a:1,http://b:2"] as &[&str],
                "servers: [a:1, b:2], tls: None",
            ),
            (&["--listen=:8888"], "Embedded"),
            (&["--listen=:8888", "--etcd-endpoints=http://e:2379"], "Etcd"),
            (&[], "Etcd"),
        ] {
            let args = [&["kersey", "run"], flags].concat();
            let kind = format!("{:?}", run_options(&args, &[]).store.kind);
            assert!(kind.contains(expected), "{flags:?}: {kind}");
        }
    }

    #[test]
    fn flanneld_with_listen_is_a_server_over_etcd() {
        let parsed = parse(
            &words(&[
                "flanneld",
                "-listen",
                "0.0.0.0:10253",
                "-etcd-prefix=/kubernetes.io/network",
            ]),
            &variables(&[]),
        )
        .unwrap();
        let Command::Server(options) = parsed.command else {
            panic!("{:?}", parsed.command);
        };
        assert_eq!(options.serve.listen[0].to_string(), "0.0.0.0:10253");
        assert!(matches!(options.store.kind, StoreKind::Etcd(_)));
    }

    #[test]
    fn mistakes_are_refused_with_the_way_out() {
        type Words = &'static [&'static str];
        type Pairs = &'static [(&'static str, &'static str)];
        let cases: &[(Words, Pairs, Words)] = &[
            (
                &["--etcd-endpiont=x"],
                &[],
                &["unknown flag --etcd-endpiont", "--etcd-endpoints"],
            ),
            (
                &["--firewall=pf"],
                &[],
                &["--firewall", "auto, nft, iptables, off"],
            ),
            (
                &["--iptables-resync=0"],
                &[],
                &["--iptables-resync", "1 to 86400"],
            ),
            (
                &[],
                &[("FLANNELD_IP_MASQ", "perhaps")],
                &["FLANNELD_IP_MASQ", "\"perhaps\""],
            ),
            (&["--kube-subnet-mgr"], &[], &["not supported", "--remote"]),
            (&["--healthz-port=70000"], &[], &["--healthz-port", "0 to 65535"]),
            (
                &["--remote=a:1", "--remote-certfile=x"],
                &[],
                &["need each other"],
            ),
            (
                &["--listen=:1", "--remote-cafile=x"],
                &[],
                &["without TLS", "--remote-certfile"],
            ),
            (
                &["--remote=http://a:1", "--remote-cafile=x"],
                &[],
                &["plain HTTP", "https://"],
            ),
            (
                &["--remote=a:1", "--remote-token-file=x"],
                &[],
                &["in the clear", "https://"],
            ),
            (
                &["--networks=a,../b"],
                &[],
                &["\"../b\" is no name of a network", "letters, digits"],
            ),
            (
                &[],
                &[("FLANNELD_NETWORKS", "config")],
                &["\"config\" is no name of a network"],
            ),
            (&["--use-multi-cluster-cidr"], &[], &["not supported"]),
            (&["--queues=0"], &[], &["\"0\" for --queues", "1 to 256"]),
            (
                &[],
                &[("KERSEY_QUEUES", "many")],
                &["\"many\" for KERSEY_QUEUES", "1 to 256"],
            ),
            (
                &[],
                &[("FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1440")],
                &["FLANNELD_SUBNET_LEASE_RENEW_MARGIN", "1439"],
            ),
            (
                &["--ingress-check=maybe"],
                &[],
                &["--ingress-check", "strict, loose, off"],
            ),
            (&["--device=much/too/long"], &[], &["--device", "interface name"]),
            (
                &["--iface-regex=("],
                &[],
                &["--iface-regex", "regular expression"],
            ),
            (&["--public-ip=fd00::1"], &[], &["--public-ip", "IPv4"]),
            (&["--listen=:1", "--remote=a:1"], &[], &["exclude each other"]),
            (
                &["--remote=a:1", "--etcd-endpoints=x"],
                &[],
                &["exclude each other"],
            ),
            (
                &["--remote=ftp://a:1"],
                &[],
                &["--remote", "ftp:// is not supported"],
            ),
            (
                &["--listen=fd://x"],
                &[],
                &["--listen", "fd://x is no inherited socket"],
            ),
            (&["--listen=unix://x"], &[], &["--listen", "absolute path"]),
            (
                &["--network-config=x"],
                &[],
                &["--network-config is for the embedded store"],
            ),
            (&["--etcd-keyfile=x"], &[], &["need each other"]),
            (&["--etcd-username=x"], &[], &["need each other"]),
            (&["--etcd-prefix="], &[], &["--etcd-prefix"]),
            (&["--lease-ttl=60"], &[], &["never due", "--lease-renew-margin"]),
            (
                &["--verify-inner", "true"],
                &[],
                &["unexpected word", "--verify-inner=true"],
            ),
        ];
        for (flags, environment, expected) in cases {
            let args = [&["kersey", "run"], *flags].concat();
            let error = match parse(&words(&args), &variables(environment)) {
                Err(Stop::Misused(error)) => error.to_string(),
                other => panic!("{flags:?} {environment:?}: {other:?}"),
            };
            for part in *expected {
                assert!(error.contains(part), "{flags:?} {environment:?}: {error}");
            }
        }
    }

    #[test]
    fn what_has_no_effect_is_noted() {
        for (flags, environment, expected) in [
            (
                &["--log_dir=/x"] as &[&str],
                &[] as &[(&str, &str)],
                Some("standard error only"),
            ),
            (&["--kubeconfig-file=/x"], &[], Some("--kube-subnet-mgr")),
            (
                &[],
                &[("EVENT_QUEUE_DEPTH", "9")],
                Some("EVENT_QUEUE_DEPTH has no effect"),
            ),
            (
                &[],
                &[("FLANNEL_ETCD_KEYFILE", "/x")],
                Some("did you mean FLANNELD_ETCD_KEYFILE?"),
            ),
            (
                &[
                    "--logtostderr",
                    "--ip-masq=false",
                    "--healthz-port=0",
                    "--kube-subnet-mgr=F",
                    "--networks=",
                ],
                &[],
                None,
            ),
        ] {
            let args = [&["kersey", "run"], flags].concat();
            let notes = parse(&words(&args), &variables(environment)).unwrap().notes;
            match expected {
                Some(part) => assert!(
                    notes.len() == 1 && notes[0].contains(part),
                    "{flags:?}: {notes:?}"
                ),
                None => assert!(notes.is_empty(), "{flags:?}: {notes:?}"),
            }
        }
    }

    #[test]
    fn a_password_in_the_environment_is_not_shown() {
        let error = bad_value(
            "FLANNELD_ETCD_PASSWORD",
            "hunter2",
            &clap::Error::new(clap::error::ErrorKind::ValueValidation),
        );
        assert!(!error.to_string().contains("hunter2"));
    }

    #[test]
    fn help_and_version_go_where_each_name_sends_them() {
        for (args, expected, part) in [
            (&["flanneld", "-h"] as &[&str], Stream::Err, "Usage: flanneld"),
            (&["flanneld", "--version"], Stream::Err, "kersey 0"),
            (&["kersey", "run", "--help"], Stream::Out, "Packet path:"),
            (&["kersey", "help", "run"], Stream::Out, "Usage: kersey run"),
            (&["kersey", "server", "-help"], Stream::Out, "--listen"),
        ] {
            match parse(&words(args), &variables(&[])) {
                Err(Stop::Told { text, stream }) => {
                    assert_eq!(stream, expected, "{args:?}");
                    assert!(text.contains(part), "{args:?}: {text}");
                }
                other => panic!("{args:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn several_networks_are_chosen_as_by_flannel() {
        assert_eq!(run_options(&["kersey", "run"], &[]).networks, None);
        assert_eq!(
            run_options(&["kersey", "run", "--networks=", "--watch-networks=false"], &[]).networks,
            None
        );
        let names = |options: &RunOptions| {
            let choice = options.networks.as_ref().unwrap();
            let allowed = choice.allowed.as_ref()?;
            Some(allowed.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        let options = run_options(&["flanneld", "-networks=blue, green", "-watch-networks"], &[]);
        assert_eq!(names(&options).unwrap(), ["blue", "green"]);
        let choice = options.networks.clone().unwrap();
        let blue: NetworkName = "blue".parse().unwrap();
        assert!(choice.allows(&blue) && !choice.allows(&"red".parse().unwrap()));
        let own = options.of_network(&blue, &choice, "flannel3".to_owned());
        assert_eq!(own.subnet_file, Path::new("/run/flannel/networks/blue.env"));
        assert_eq!(own.data_dir, options.data_dir.join("networks/blue"));
        assert_eq!(own.packet_path.device, "flannel3");
        let options = run_options(
            &["flanneld", "-watch-networks"],
            &[("FLANNELD_SUBNET_DIR", "/run/nets")],
        );
        assert_eq!(names(&options), None);
        let choice = options.networks.unwrap();
        assert!(choice.allows(&blue));
        assert_eq!(choice.subnet_file(&blue), Path::new("/run/nets/blue.env"));
    }

    #[test]
    fn status_finds_the_socket_the_daemon_was_told() {
        let parsed = parse(
            &words(&["kersey", "status", "--json"]),
            &variables(&[("KERSEY_STATUS_SOCKET", "/s")]),
        )
        .unwrap();
        let Command::Status(options) = parsed.command else {
            panic!("{:?}", parsed.command);
        };
        assert_eq!(
            (options.socket.as_path(), options.form),
            (Path::new("/s"), StatusForm::Json)
        );
    }

    #[test]
    fn cleanup_asks_the_socket_the_daemon_was_told_and_removes_unless_told_not_to() {
        for (flags, mode) in [
            (&[] as &[&str], CleanupMode::Remove),
            (&["-dry-run"], CleanupMode::DryRun),
            (&["--dry-run=false"], CleanupMode::Remove),
        ] {
            let args = [&["kersey", "cleanup"], flags].concat();
            let parsed = parse(&words(&args), &variables(&[("KERSEY_STATUS_SOCKET", "/s")])).unwrap();
            let Command::Cleanup(options) = parsed.command else {
                panic!("{:?}", parsed.command);
            };
            assert_eq!((options.socket.as_path(), options.mode), (Path::new("/s"), mode));
            assert_eq!(options.data_dir, Path::new("/var/lib/kersey"));
        }
    }

    fn run_options(args: &[&str], environment: &[(&str, &str)]) -> RunOptions {
        match parse(&words(args), &variables(environment)) {
            Ok(Parsed {
                command: Command::Run(options),
                ..
            }) => *options,
            other => panic!("{args:?}: {other:?}"),
        }
    }

    fn words(args: &[&str]) -> Vec<String> {
        args.iter().map(|&word| word.to_owned()).collect()
    }

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }
}
