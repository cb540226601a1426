//! Logging: its flags and its start.

use std::io;
use std::sync::OnceLock;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

use super::log_lines::{Dam, Tame};
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
type SetLevel = Box<dyn Fn(LevelFilter) + Send + Sync>;

static SET_LEVEL: OnceLock<SetLevel> = OnceLock::new();

/// Sends log lines to standard error from here on. A second call changes nothing.
pub fn start_logging(options: LogOptions) {
    let (level, handle) = reload::Layer::new(filter(options.level));
    let colours = io::IsTerminal::is_terminal(&io::stderr()) && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(colours)
        .with_writer(Tame {
            format: options.format,
            colours,
        });
    let subscriber = tracing_subscriber::registry().with(level).with(Dam::default());
    // An error says that logging was started before, by a test or an embedding program; that one stays.
    let started = match options.format {
        LogFormat::Text => subscriber.with(lines).try_init(),
        LogFormat::Json => subscriber.with(lines.json()).try_init(),
    };
    if started.is_ok() {
        let set = move |level| {
            // The subscriber lives as long as the process.
            let _ = handle.modify(|now| *now = level);
        };
        let _ = SET_LEVEL.set(Box::new(set));
    }
}

/// Shows lines of another level from here on.
pub fn set_log_level(level: LogLevel) {
    if let Some(set) = SET_LEVEL.get() {
        set(filter(level));
    }
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

fn verbosity(text: &str) -> Result<u8, String> {
    let value = int_within(text, 0..=i64::from(i32::MAX))?;
    Ok(u8::try_from(value).unwrap_or(u8::MAX))
}
