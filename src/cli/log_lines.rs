//! One event, one line, whatever is in it.
//!
//! What a store, a peer or a file says ends up in the log as part of a message or of a field. A line break in it would forge a line; an
//! escape sequence would reach into the terminal of whoever reads; a megabyte would fill the disk. So each event is made
//! printable where it leaves: control characters and those that turn the direction of text are written as `\u{1b}`, and
//! a line ends after [`MAX_BYTES`]. The formatter hands an event over in one piece, so that no state is needed.
//!
//! In colour, for a terminal, the formatter's own sequences for colours pass, and with them any other for colours: they can
//! do no more than annoy.

use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

/// The longest line, its end included. A journal or collector cuts at some KB anyway.
const MAX_BYTES: usize = 2048;
/// What shows that a line was cut.
const CUT: &str = " ...";

/// Makes events printable on their way to standard error.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogLines {
    pub(super) colour: Colour,
}

/// Whether sequences for colours may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colour {
    On,
    Off,
}

impl<'a> MakeWriter<'a> for LogLines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl Write for LogLines {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = printable(&String::from_utf8_lossy(event), self.colour);
        io::stderr().write_all(line.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// An event as one line of at most [`MAX_BYTES`].
fn printable(event: &str, colour: Colour) -> String {
    let event = event.strip_suffix('\n').unwrap_or(event);
    let room = MAX_BYTES - CUT.len() - 1;
    let mut line = String::with_capacity(event.len().min(MAX_BYTES) + 1);
    // Where the line is cut should the event not fit.
    let mut cut = 0;
    let mut rest = event;
    while let Some(first) = rest.chars().next() {
        let sequence = match colour {
            Colour::On => colour_sequence(rest),
            Colour::Off => None,
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
            assert_eq!(printable(event, Colour::Off), expected);
        }
    }

    #[test]
    fn colours_pass_where_there_are_any_and_nothing_else_does() {
        assert_eq!(
            printable("\u{1b}[2m\u{1b}[1;32mINFO\u{1b}[0m", Colour::On),
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
            assert!(!printable(hostile, Colour::On).contains('\u{1b}'), "{hostile:?}");
        }
    }

    #[test]
    fn a_line_has_an_end() {
        let line = |event: &str| printable(event, Colour::Off);
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
}
