//! Wiring: the order in which a node starts and stops.

use std::process::ExitCode;

use crate::options::RunOptions;

/// Runs a node until it is asked to stop.
pub fn run(options: RunOptions) -> ExitCode {
    tracing::error!(device = options.packet_path.device, "this build has no daemon");
    ExitCode::FAILURE
}
