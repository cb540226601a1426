//! `kersey status`: its flags, and the table it prints.

use std::path::PathBuf;

use super::go_flags::parse_bool;
use crate::options::{StatusForm, StatusOptions};

/// Where a daemon listens for `kersey status` if nobody says.
pub const DEFAULT_SOCKET: &str = "/run/kersey/status.sock";

/// Show what the daemon on this machine is doing
#[derive(Debug, clap::Args)]
pub(super) struct StatusArgs {
    /// Print the whole document as JSON
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    json: bool,
    /// The daemon's socket, its --status-socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, alias = "socket")]
    status_socket: PathBuf,
}

impl StatusArgs {
    pub(super) fn into_options(self) -> StatusOptions {
        StatusOptions {
            socket: self.status_socket,
            form: if self.json {
                StatusForm::Json
            } else {
                StatusForm::Table
            },
        }
    }
}
