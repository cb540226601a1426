//! What may become a log line: nothing that a terminal obeys, nothing endless, and not the same for ever (S15).
//!
//! Names, values and errors come from stores, peers and files, so whoever writes those writes into our log. Each line that leaves
//!
//! - has its control characters escaped, so that it is one line and moves no cursor;
//! - is at most [`MAX_BYTES`] long; text is cut, and of JSON the longest strings are, so that it stays JSON;
//! - is one of [`BURST`] of its kind, or the first in [`PAUSE`]; what is held back is counted and told with the next one that is not.
//!
//! A kind is a place in the code. Lines below `info` are for someone who looks for something, and are not held back.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Context, Layer};

use crate::options::LogFormat;

/// The longest line, its end included.
pub(super) const MAX_BYTES: usize = 2048;
/// Lines of one kind in a row: as many bad keys as an operator would want to see by name.
const BURST: u32 = 50;
/// How long until there is another one.
const PAUSE: Duration = Duration::from_secs(10);
/// Appended to what was cut.
const CUT: &str = "…";

/// Writes tame lines to standard error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tame {
    pub(super) format: LogFormat,
    /// Whether the lines have colours of ours.
    pub(super) colours: bool,
}

/// One line on its way out.
pub(super) struct Line(Tame);

impl<'a> MakeWriter<'a> for Tame {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(*self)
    }
}

impl Write for Line {
    /// Takes a whole line, which is how the formatter hands them over.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let tamed = match self.0.format {
            LogFormat::Text => tame_text(text.trim_end_matches('\n'), self.0.colours),
            LogFormat::Json => tame_json(text.trim_end_matches('\n')),
        };
        io::stderr().lock().write_all(tamed.as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn tame_text(line: &str, colours: bool) -> String {
    let mut out = String::with_capacity(line.len() + 1);
    for letter in line.chars() {
        if letter.is_control() && !(colours && letter == '\u{1b}') {
            let _ = write!(out, "\\x{:02x}", u32::from(letter));
        } else {
            out.push(letter);
        }
        if out.len() > MAX_BYTES {
            break;
        }
    }
    if out.len() >= MAX_BYTES {
        cut(&mut out, MAX_BYTES - CUT.len() - 1);
        out.push_str(CUT);
    }
    out.push('\n');
    out
}

fn cut(text: &mut String, bytes: usize) {
    text.truncate(text.floor_char_boundary(bytes));
}

/// JSON has its control characters escaped already.
fn tame_json(line: &str) -> String {
    let mut out = line.to_owned();
    let mut longest = MAX_BYTES / 4;
    while out.len() >= MAX_BYTES {
        let Ok(mut value) = serde_json::from_str::<serde_json::Value>(line) else {
            return tame_text(line, false);
        };
        shorten(&mut value, longest);
        out = value.to_string();
        if longest == 0 {
            break;
        }
        longest /= 2;
    }
    out.push('\n');
    out
}

fn shorten(value: &mut serde_json::Value, bytes: usize) {
    use serde_json::Value;
    match value {
        Value::String(text) if text.len() > bytes => {
            cut(text, bytes);
            text.push_str(CUT);
        }
        Value::Array(values) => values.iter_mut().for_each(|value| shorten(value, bytes)),
        Value::Object(fields) => fields.values_mut().for_each(|value| shorten(value, bytes)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Holds back lines that come again and again.
#[derive(Debug, Default)]
pub(super) struct Dam(Mutex<HashMap<Identifier, Kind>>);

/// Lines of one kind.
#[derive(Debug)]
struct Kind {
    left: u32,
    since: Instant,
    held_back: u64,
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes; so many before it did not.
    Goes(u64),
    HeldBack,
}

impl Kind {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            since: now,
            held_back: 0,
        }
    }

    fn next(&mut self, now: Instant) -> Fate {
        let pauses = now.saturating_duration_since(self.since).as_secs() / PAUSE.as_secs();
        if pauses > 0 {
            let earned = u32::try_from(pauses).unwrap_or(BURST);
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = now;
        }
        if self.left == 0 {
            self.held_back += 1;
            return Fate::HeldBack;
        }
        self.left -= 1;
        Fate::Goes(std::mem::take(&mut self.held_back))
    }
}

impl<S: Subscriber> Layer<S> for Dam {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO {
            return true;
        }
        let now = now();
        let fate = {
            let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let kind = kinds.entry(metadata.callsite()).or_insert_with(|| Kind::new(now));
            kind.next(now)
        };
        match fate {
            Fate::Goes(0) => true,
            Fate::Goes(held_back) => {
                tracing::warn!(
                    held_back,
                    of = metadata.target(),
                    "lines like the next one came too often"
                );
                true
            }
            Fate::HeldBack => false,
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a shell: lines come by the clock")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_move_no_cursor_and_end_no_line() {
        let hostile = "peer \u{1b}[2J\u{7}a\nINFO forged\r\u{85}\u{0}\u{7f} ü";
        let line = tame_text(hostile, false);
        assert_eq!(
            line,
            "peer \\x1b[2J\\x07a\\x0aINFO forged\\x0d\\x85\\x00\\x7f ü\n"
        );
        assert_eq!(tame_text("\u{1b}[31mred\u{8}", true), "\u{1b}[31mred\\x08\n");
    }

    #[test]
    fn a_line_of_a_megabyte_is_cut() {
        for filling in ["x", "\u{0}", "ü", "€"] {
            let line = tame_text(&filling.repeat(1 << 20), false);
            assert!(
                line.len() <= MAX_BYTES && line.len() > MAX_BYTES - 16,
                "{}",
                line.len()
            );
            assert!(line.ends_with("…\n"));
        }
        assert_eq!(tame_text(&"x".repeat(2000), false).len(), 2001);
    }

    #[test]
    fn json_stays_json_when_it_is_cut() {
        let line = serde_json::json!({
            "level": "WARN",
            "fields": {"message": "m".repeat(4000), "key": "\u{1b}".repeat(4000), "n": 7},
            "more": vec!["y".repeat(600); 20],
        });
        let tamed = tame_json(&line.to_string());
        assert!(tamed.len() <= MAX_BYTES, "{}", tamed.len());
        let back: serde_json::Value = serde_json::from_str(&tamed).unwrap();
        assert_eq!(
            (back["level"].as_str(), back["fields"]["n"].as_u64()),
            (Some("WARN"), Some(7))
        );
        let short = r#"{"level":"INFO"}"#;
        assert_eq!(tame_json(short), format!("{short}\n"));
    }

    #[test]
    fn a_flood_of_one_kind_becomes_a_line_in_ten_seconds_and_says_how_many() {
        let start = now();
        let mut kind = Kind::new(start);
        let mut gone = 0;
        for n in 0..1_000_000u32 {
            // A million lines in a hundred seconds.
            let at = start + Duration::from_micros(u64::from(n) * 100);
            gone += u32::from(matches!(kind.next(at), Fate::Goes(_)));
        }
        assert!((BURST + 8..=BURST + 10).contains(&gone), "{gone}");
        let Fate::Goes(held_back) = kind.next(start + Duration::from_secs(200)) else {
            panic!("it goes after a pause");
        };
        assert!(held_back > 90_000, "{held_back}");
    }

    #[test]
    fn the_dam_is_in_the_way_of_info_and_not_of_debug() {
        use tracing_subscriber::layer::SubscriberExt;
        #[derive(Clone, Default)]
        struct Count(std::sync::Arc<Mutex<(u32, u32)>>);
        impl<S: Subscriber> Layer<S> for Count {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                let mut count = self.0.lock().unwrap();
                if *event.metadata().level() == Level::DEBUG {
                    count.1 += 1;
                } else {
                    count.0 += 1;
                }
            }
        }
        let count = Count::default();
        let subscriber = tracing_subscriber::registry()
            .with(Dam::default())
            .with(count.clone());
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..1000 {
                tracing::info!("again");
                tracing::debug!("again");
            }
        });
        assert_eq!(*count.0.lock().unwrap(), (BURST, 1000));
    }
}
