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
mod flags;
mod go_flags;
mod help;
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
mod stop;
mod store;
mod tell;

use std::ffi::OsString;
use std::path::Path;

use clap::{Args, FromArgMatches};

pub use self::logging::{set_log_level, start_logging};
pub use self::stop::{Stop, Stream, UsageError};

use self::bench::BenchOptions;
use self::cleanup::CleanupArgs;
use self::config::ConfigOptions;
use self::docker_opts::DockerOptsOptions;
use self::environment::Variables;
use self::flags::{Entry, flags_of};
use self::help::{top_level, version};
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
            let read = flags_of::<ReserveArgs>("reserve", flags, variables, Entry::Kersey);
            let (args, variables) = match read {
                Err(Stop::Misused(error)) => {
                    return Err(reserve::late_word(words, flags).unwrap_or(error).into());
                }
                read => read?,
            };
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

#[cfg(test)]
mod tests;
