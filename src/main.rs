//! kersey's command line.

use std::process::ExitCode;

use clap::Parser;
use kersey::cli::bench::{self, BenchOptions};
use kersey::cli::lab::{self, LabOptions};

#[derive(Debug, Parser)]
#[command(name = "kersey", version, about)]
enum Command {
    Lab(LabOptions),
    Bench(BenchOptions),
}

#[expect(clippy::print_stderr, reason = "errors are for the person who asked")]
fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Lab(options) => lab::run(options),
        Command::Bench(options) => bench::run(options),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
