//! Logging: its flags and its start.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::log_dam::Dam;
use super::log_lines::{Form, LogLines};
use super::store::int_within;
use crate::options::{LogFormat, LogLevel, LogOptions};

/// Kersey's and flannel's logging flags.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Logging")]
pub(super) struct LogArgs {
    /// Most detailed level shown [default: info]
    #[arg(long, value_name = "LEVEL", value_enum)]
    log_level: Option<LogLevel>,
    /// Line format; lines go to standard error
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "text")]
    log_format: LogFormat,
    /// Flannel's verbosity: 1 to 5 mean debug, above 5 trace; --log-level wins
    #[arg(long, value_name = "N", value_parser = verbosity)]
    v: Option<u8>,
}

impl LogArgs {
    pub(super) fn options(&self) -> LogOptions {
        let by_verbosity = match self.v.unwrap_or(0) {
            0 => LogLevel::Info,
            1..=5 => LogLevel::Debug,
            6.. => LogLevel::Trace,
        };
        LogOptions {
            format: self.log_format,
            level: self.log_level.unwrap_or(by_verbosity),
        }
    }
}

/// Changes the level of the lines shown.
type SetLevel = Box<dyn Fn(LogLevel) + Send + Sync>;

static SET_LEVEL: OnceLock<SetLevel> = OnceLock::new();

/// Sends log lines to standard error from here on. A second call changes nothing.
pub fn start_logging(options: LogOptions) {
    let form = form(options.format);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(LogLines { form })
        .with_ansi(form == Form::Coloured);
    let (filter, handle) = reload::Layer::new(shown(options.level));
    let lines = match form {
        Form::Json => lines.json().with_filter(filter).boxed(),
        // The journal has its own clock.
        Form::Journal => lines.without_time().with_filter(filter).boxed(),
        Form::Plain | Form::Coloured => lines.with_filter(filter).boxed(),
    };
    let subscriber = tracing_subscriber::registry().with(Dam::default());
    // An error says that logging was started before, by a test or an embedding program; that one stays.
    let _already_started = subscriber.with(lines).try_init().map(|()| {
        let set = move |level| {
            // The subscriber lives as long as the process.
            let _ = handle.modify(|now| *now = self::shown(level));
        };
        SET_LEVEL.set(Box::new(set)).ok()
    });
}

fn form(format: LogFormat) -> Form {
    match format {
        LogFormat::Json => Form::Json,
        LogFormat::Text if is_journal() => Form::Journal,
        LogFormat::Text
            if io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none() =>
        {
            Form::Coloured
        }
        LogFormat::Text => Form::Plain,
    }
}

/// Whether standard error leads to systemd's journal: `JOURNAL_STREAM` has the device and inode of the socket (systemd.exec(5)). A shell
/// that was started by a service hands the variable on, and sends standard error elsewhere; so both are compared.
fn is_journal() -> bool {
    let Some(named) = std::env::var("JOURNAL_STREAM").ok() else {
        return false;
    };
    let Some((device, inode)) = named.split_once(':') else {
        return false;
    };
    // A copy to ask by; closing it leaves the original open.
    let Ok(copy) = io::stderr().as_fd().try_clone_to_owned() else {
        return false;
    };
    File::from(copy)
        .metadata()
        .is_ok_and(|held| device.parse() == Ok(held.dev()) && inode.parse() == Ok(held.ino()))
}

/// Shows lines of another level from here on.
pub fn set_log_level(level: LogLevel) {
    if let Some(set) = SET_LEVEL.get() {
        set(level);
    }
}

/// What is shown at a level.
fn shown(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    // Libraries speak of their own insides: HTTP/2 frames, TLS hand-shakes, and headers with what a server lets us in for.
    // Their complaints are shown, the rest is not, at any level.
    Targets::new()
        .with_default(level.min(LevelFilter::WARN))
        .with_target("kersey", level)
}

fn verbosity(text: &str) -> Result<u8, String> {
    let value = int_within(text, 0..=i64::from(i32::MAX))?;
    Ok(u8::try_from(value).unwrap_or(u8::MAX))
}
