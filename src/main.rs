//! Parse, run, give the exit status.

use std::process::ExitCode;

use kersey::cli::{self, Command};

fn main() -> ExitCode {
    let text = |word: std::ffi::OsString| word.to_string_lossy().into_owned();
    let args: Vec<String> = std::env::args_os().map(text).collect();
    if let Some(ended) = kersey::host::firewall::helper::run_if_asked(&args) {
        return ended;
    }
    let parsed = match cli::parse_process() {
        Ok(parsed) => parsed,
        Err(stop) => return stop.report(),
    };
    if let Some(options) = cli::log_options(&parsed.command) {
        cli::start_logging(options);
    }
    for note in &parsed.notes {
        tracing::warn!("{note}");
    }
    match parsed.command {
        Command::Run(options) => kersey::daemon::run(*options, cli::reread_run_options),
        Command::Server(options) => cli::server::run(&options),
        Command::Reserve(options) => cli::reserve::run(&options),
        Command::Status(options) => cli::status::run(&options),
        Command::Cleanup(options) => cli::cleanup::run(&options),
        Command::Lab(options) => cli::lab::run(*options).unwrap_or_else(failed),
        Command::Bench(options) => cli::bench::run(*options).unwrap_or_else(failed),
        Command::Config(options) => {
            let judge = cli::config::Judge {
                unusable: kersey::daemon::unusable,
                unread: kersey::daemon::unread,
            };
            cli::config::run(&options, judge)
        }
        Command::DockerOpts(options) => cli::docker_opts::run(&options),
        Command::Man(options) => cli::pages::man(&options).unwrap_or_else(failed),
        Command::Completions(options) => cli::pages::completions(&options).unwrap_or_else(failed),
    }
}

#[expect(clippy::print_stderr, reason = "errors are for the person who asked")]
fn failed(error: anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}
