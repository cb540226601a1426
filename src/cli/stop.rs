//! Why there is nothing to do, and how the user is told.

use std::io::Write;
use std::process::ExitCode;

use super::exit;

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
    pub(super) message: String,
    pub(super) hint: String,
}

impl UsageError {
    pub(super) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
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
