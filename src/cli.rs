//! kersey's subcommands.

pub mod bench;
pub mod lab;
mod progress;
