//! What the program says of itself: help, version, and the whole tree of subcommands.

use clap::Args;

use super::bench::BenchOptions;
use super::cleanup::CleanupArgs;
use super::config::ConfigOptions;
use super::docker_opts::DockerOptsOptions;
use super::flags::{Entry, subcommand};
use super::lab::LabOptions;
use super::pages::{CompletionsOptions, ManOptions};
use super::reserve::ReserveArgs;
use super::run::RunArgs;
use super::server::ServerArgs;
use super::status::StatusArgs;
use super::stop::{Stop, Stream, UsageError};

pub(super) fn version(stream: Stream) -> Stop {
    Stop::Told {
        text: format!("kersey {}\n", env!("CARGO_PKG_VERSION")),
        stream,
    }
}

/// Clap's compact help, one line a flag, under the whole description.
pub(super) fn help(mut command: clap::Command, entry: Entry) -> Stop {
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

/// Help or an error for words that start no subcommand.
pub(super) fn top_level(words: &[String]) -> Stop {
    let mut command = whole();
    command.build();
    match command.try_get_matches_from(std::iter::once(&"kersey".to_owned()).chain(words)) {
        Ok(_) => Stop::Misused(UsageError::new("no subcommand", "see kersey --help")),
        Err(error) => Stop::Clap(error),
    }
}

/// The program with all its subcommands: for the help, manual pages and completions.
pub(super) fn whole() -> clap::Command {
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
