//! One event, one line, whatever is in it.
//!
//! What a store, a peer or a file says ends up in the log as part of a message or of a field. A line break in it would forge a line; an
//! escape sequence would reach into the terminal of whoever reads; a megabyte would fill the disk. So each event is made
//! printable where it leaves: control characters and those that turn the direction of text are written as `\u{1b}`, and
//! a line ends after [`MAX_BYTES`]. The formatter hands an event over in one piece, so that no state is needed.
//!
//! In colour, for a terminal, the formatter's own sequences for colours pass, and with them any other for colours: they can
//! do no more than annoy.
//!
//! To systemd's journal a line begins with its priority, `<6>` say, which the journal takes off and keeps (sd-daemon(3)).
//!
//! A line of JSON stays JSON: the marks are written in its own way, and where it is too long its longest texts are cut, never its end.

use std::io::{self, Write};

use serde_json::{Value, json};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// The longest line, its end included and its priority not. A journal or collector cuts at some KB anyway.
const MAX_BYTES: usize = 2048;
/// What shows that a line was cut.
const CUT: &str = " ...";

/// Makes events printable on their way to standard error.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogLines {
    pub(super) form: Form,
}

/// Writes the lines of one event.
#[derive(Clone, Copy, Debug)]
pub(super) struct EventWriter {
    form: Form,
    level: Level,
}

/// What the formatter makes of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Text.
    Plain,
    /// Text in which sequences for colours may pass.
    Coloured,
    /// Text with a priority before it.
    Journal,
    /// One object.
    Json,
}

impl<'a> MakeWriter<'a> for LogLines {
    type Writer = EventWriter;

    fn make_writer(&'a self) -> EventWriter {
        EventWriter {
            form: self.form,
            level: Level::INFO,
        }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> EventWriter {
        EventWriter {
            form: self.form,
            level: *event.level(),
        }
    }
}

/// A level as syslog(3) counts them.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

impl Write for EventWriter {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let event = String::from_utf8_lossy(event);
        let line = match self.form {
            Form::Plain | Form::Coloured => printable(&event, self.form),
            Form::Journal => {
                // In one piece with its line: other threads write as well.
                let mut line = printable(&event, self.form);
                line.insert_str(0, priority(self.level));
                line
            }
            Form::Json => printable_json(&event),
        };
        io::stderr().write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// An event as one line of at most [`MAX_BYTES`].
fn printable(event: &str, form: Form) -> String {
    let event = event.strip_suffix('\n').unwrap_or(event);
    let room = MAX_BYTES - CUT.len() - 1;
    let mut line = String::with_capacity(event.len().min(MAX_BYTES) + 1);
    // Where the line is cut should the event not fit.
    let mut cut = 0;
    let mut rest = event;
    while let Some(first) = rest.chars().next() {
        let sequence = match form {
            Form::Coloured => colour_sequence(rest),
            Form::Plain | Form::Journal | Form::Json => None,
        };
        let taken = match sequence {
            Some(sequence) => {
                line.push_str(sequence);
                sequence.len()
            }
            None => {
                match first {
                    '\n' => line.push_str("\\n"),
                    '\r' => line.push_str("\\r"),
                    '\t' => line.push_str("\\t"),
                    _ if is_unsafe(first) => line.extend(first.escape_unicode()),
                    _ => line.push(first),
                }
                first.len_utf8()
            }
        };
        rest = &rest[taken..];
        if line.len() <= room {
            cut = line.len();
        }
        if line.len() > MAX_BYTES - 1 {
            line.truncate(cut);
            line.push_str(CUT);
            break;
        }
    }
    line.push('\n');
    line
}

/// An event in JSON as one line of JSON of at most [`MAX_BYTES`].
fn printable_json(event: &str) -> String {
    let event = event.strip_suffix('\n').unwrap_or(event);
    let line = escaped_json(event);
    if line.len() < MAX_BYTES {
        return line + "\n";
    }
    let mut whole = serde_json::from_str(event).unwrap_or_else(|_| json!({ "message": event }));
    // A megabyte need not be gone through again and again.
    shorten(&mut whole, MAX_BYTES);
    let shortened = |most: usize| {
        let mut value = whole.clone();
        shorten(&mut value, most);
        escaped_json(&value.to_string())
    };
    // The most that texts may have so that the line fits; what is shorter stays whole.
    let (mut fits, mut too_much) = (0, MAX_BYTES);
    while too_much - fits > 1 {
        let between = usize::midpoint(fits, too_much);
        if shortened(between).len() < MAX_BYTES {
            fits = between;
        } else {
            too_much = between;
        }
    }
    let line = shortened(fits);
    if line.len() < MAX_BYTES {
        return line + "\n";
    }
    // Of a thousand fields, say.
    let level = whole.get("level").and_then(Value::as_str).unwrap_or("ERROR");
    let note = "a line of too many fields is left out";
    format!("{}\n", json!({ "level": level, "fields": { "message": note } }))
}

/// JSON text without the characters that are not to reach a terminal; outside of strings there are none.
fn escaped_json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if is_unsafe(c) {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                escaped.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Cuts all texts an event carries to `most` bytes of JSON.
fn shorten(value: &mut Value, most: usize) {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
        Value::String(text) => shorten_text(text, most),
        Value::Array(values) => values.iter_mut().for_each(|value| shorten(value, most)),
        Value::Object(fields) => fields
            .iter_mut()
            // What the formatter itself says, and is short.
            .filter(|(name, value)| {
                !(value.is_string() && ["timestamp", "level", "target"].contains(&name.as_str()))
            })
            .for_each(|(_, value)| shorten(value, most)),
    }
}

fn shorten_text(text: &mut String, most: usize) {
    let written = |c: char| match c {
        '"' | '\\' | '\n' | '\r' | '\t' | '\u{8}' | '\u{c}' => 2,
        _ if is_unsafe(c) => 6,
        _ => c.len_utf8(),
    };
    let (mut len, mut cut) = (0, 0);
    for (at, c) in text.char_indices() {
        if len + CUT.len() <= most {
            cut = at;
        }
        len += written(c);
        if len > most {
            text.truncate(cut);
            text.push_str(CUT);
            return;
        }
    }
}

/// A sequence at the start of a text that changes colours and nothing else.
fn colour_sequence(text: &str) -> Option<&str> {
    let parameters = text.strip_prefix("\u{1b}[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    (parameters[end..].starts_with('m') && end < 16).then(|| &text[..end + 3])
}

/// Controls, and marks that turn or hide text.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_forge_a_line_or_reach_a_terminal_is_written_out() {
        for (event, expected) in [
            ("INFO plain text\n", "INFO plain text\n"),
            ("", "\n"),
            ("a\nERROR forged\n", "a\\nERROR forged\n"),
            ("a\r\tb", "a\\r\\tb\n"),
            (
                "\u{1b}[2J\u{1b}]0;owned\u{7}",
                "\\u{1b}[2J\\u{1b}]0;owned\\u{7}\n",
            ),
            ("\u{9b}31m", "\\u{9b}31m\n"),
            ("\0", "\\u{0}\n"),
            ("\u{202e}txt.exe", "\\u{202e}txt.exe\n"),
            ("naïve 日本 😀", "naïve 日本 😀\n"),
            ("\u{1b}[31m", "\\u{1b}[31m\n"),
        ] {
            assert_eq!(printable(event, Form::Plain), expected);
        }
    }

    #[test]
    fn colours_pass_where_there_are_any_and_nothing_else_does() {
        assert_eq!(
            printable("\u{1b}[2m\u{1b}[1;32mINFO\u{1b}[0m", Form::Coloured),
            "\u{1b}[2m\u{1b}[1;32mINFO\u{1b}[0m\n"
        );
        for hostile in [
            "\u{1b}[2J",
            "\u{1b}[1;1H",
            "\u{1b}]0;x\u{7}",
            "\u{1b}c",
            "\u{1b}[",
            "\u{1b}[0000000000000000000m",
        ] {
            assert!(
                !printable(hostile, Form::Coloured).contains('\u{1b}'),
                "{hostile:?}"
            );
        }
    }

    #[test]
    fn a_line_has_an_end() {
        let line = |event: &str| printable(event, Form::Plain);
        let fits = "x".repeat(MAX_BYTES - 1);
        assert_eq!(line(&fits).len(), MAX_BYTES);
        assert!(!line(&fits).contains(CUT));
        for event in [
            "x".repeat(MAX_BYTES),
            "x".repeat(1 << 20),
            "é".repeat(5000),
            "\u{1b}".repeat(5000),
            format!("{}\n", "\n".repeat(3000)),
        ] {
            let line = line(&event);
            assert!(
                line.len() <= MAX_BYTES && line.len() > MAX_BYTES - 20,
                "{}",
                line.len()
            );
            assert!(line.ends_with(" ...\n"), "{line:.50}");
        }
    }

    /// Asserts that a line is one of JSON, printable and short enough, and gives what it says.
    fn read(line: &str) -> Value {
        let body = line.strip_suffix('\n').unwrap();
        assert!(line.len() <= MAX_BYTES && !body.chars().any(is_unsafe), "{line}");
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    #[test]
    fn a_line_of_json_stays_json_however_long_it_is() {
        let event = |message: &str, error: &str| {
            json!({
                "timestamp": "2026-01-02T03:04:05.678901Z",
                "level": "WARN",
                "fields": { "message": message, "error": error, "peers": 7 },
                "target": "kersey::control",
                "spans": [{ "network": "blue", "name": "network" }],
            })
        };
        let short = event("plain", "e");
        assert_eq!(read(&printable_json(&format!("{short}\n"))), short);
        for hostile in [
            "x",
            "\"",
            "\\",
            "\n",
            "\u{1b}",
            "\u{202e}",
            "\u{9b}",
            "é",
            "日",
            "😀",
            "\u{7f}\"é",
        ] {
            for times in [1, 200, 330, 500, 1000, 2000, 5000, 300_000] {
                let long = hostile.repeat(times);
                for whole in [event(&long, "e"), event("m", &long), event(&long, &long)] {
                    let line = printable_json(&format!("{whole}\n"));
                    let said = read(&line);
                    for field in ["timestamp", "level", "target", "spans"] {
                        assert_eq!(said[field], whole[field]);
                    }
                    assert_eq!(said["fields"]["peers"], 7);
                    let mut cut = false;
                    for field in ["message", "error"] {
                        let (said, was) = (said["fields"][field].as_str().unwrap(), &whole["fields"][field]);
                        let was = was.as_str().unwrap();
                        let kept = said.strip_suffix(CUT).filter(|_| said != was);
                        assert!(was.starts_with(kept.unwrap_or(said)), "{said}");
                        assert!(kept.is_some() || said == was, "{said}");
                        cut |= kept.is_some();
                    }
                    // Nothing is cut that would have fitted, and no more than is needed.
                    assert!(!cut || line.len() > MAX_BYTES - 40, "{}: {line}", line.len());
                }
            }
        }
    }

    #[test]
    fn the_marks_that_turn_text_are_written_as_json_writes_them() {
        let line = printable_json("{\"fields\":{\"message\":\"\u{202e}txt.exe\"}}\n");
        assert_eq!(line, "{\"fields\":{\"message\":\"\\u202etxt.exe\"}}\n");
        assert_eq!(read(&line)["fields"]["message"], "\u{202e}txt.exe");
    }

    #[test]
    fn what_is_no_json_or_has_fields_without_end_is_a_line_of_json_all_the_same() {
        let torn = format!("{{\"fields\":{}", "x".repeat(5000));
        assert!(
            read(&printable_json(&torn))["message"]
                .as_str()
                .unwrap()
                .starts_with("{\"fields\":xx")
        );
        let many: serde_json::Map<_, _> = (0..500).map(|n| (format!("field{n}"), json!(n))).collect();
        let many = json!({ "level": "INFO", "fields": many });
        assert_eq!(read(&printable_json(&many.to_string()))["level"], "INFO");
    }

    #[test]
    fn the_formatters_own_lines_are_cut_as_json() {
        #[derive(Clone, Default)]
        struct Lines(std::sync::Arc<std::sync::Mutex<Vec<String>>>);
        impl Write for Lines {
            fn write(&mut self, event: &[u8]) -> io::Result<usize> {
                let line = printable_json(&String::from_utf8_lossy(event));
                self.0.lock().unwrap().push(line);
                Ok(event.len())
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(subscriber.finish(), || {
            let _in = tracing::info_span!("network", name = "blue").entered();
            tracing::warn!(
                error = "e\u{202e}\"".repeat(3000),
                peers = 7,
                "{}",
                "long ".repeat(900)
            );
        });
        let lines = lines.0.lock().unwrap();
        assert_eq!(lines.len(), 1, "an event comes in one piece");
        let said = read(&lines[0]);
        assert_eq!(
            (&said["level"], &said["fields"]["peers"]),
            (&json!("WARN"), &json!(7))
        );
        assert!(
            said["fields"]["message"].as_str().unwrap().ends_with(CUT),
            "{said}"
        );
    }
}
