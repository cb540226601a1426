//! What a person sees while and after a lab works: steps with a tick each, and tables.

use std::fmt::Write;
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::tell::say_aside;

/// Width of a step's name; what came of it starts in the next column.
const NAME: usize = 34;

/// Reports steps on standard error: with a spinner on a terminal, as plain lines otherwise.
pub(crate) struct Progress {
    terminal: bool,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            terminal: stderr().is_terminal(),
        }
    }

    /// Does `work`, which says what came of it; a step without anything to say is fine too.
    pub(crate) fn step<T>(&self, name: &str, work: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        let spinner = self.spinner(name);
        let start = start();
        let result = work();
        if let Some(spinner) = spinner {
            spinner.finish_and_clear();
        }
        match result {
            Ok((value, outcome)) => {
                self.line("✓", "32", name, &outcome, Some(start.elapsed()));
                Ok(value)
            }
            Err(error) => {
                self.line("✗", "31", name, "failed", Some(start.elapsed()));
                Err(error)
            }
        }
    }

    /// Does `work`, whose outcome may be a disappointment without ending everything.
    pub(crate) fn check<T>(
        &self,
        name: &str,
        work: impl FnOnce() -> Result<(T, Result<String, String>)>,
    ) -> Result<T> {
        let spinner = self.spinner(name);
        let start = start();
        let result = work();
        if let Some(spinner) = spinner {
            spinner.finish_and_clear();
        }
        match result {
            Ok((value, Ok(outcome))) => {
                self.line("✓", "32", name, &outcome, Some(start.elapsed()));
                Ok(value)
            }
            Ok((value, Err(complaint))) => {
                self.line("✗", "31", name, &complaint, Some(start.elapsed()));
                Ok(value)
            }
            Err(error) => {
                self.line("✗", "31", name, "failed", Some(start.elapsed()));
                Err(error)
            }
        }
    }

    fn spinner(&self, name: &str) -> Option<ProgressBar> {
        if !self.terminal {
            return None;
        }
        let style = ProgressStyle::with_template("  {spinner:.cyan} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner())
            .tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ ");
        let spinner = ProgressBar::new_spinner()
            .with_style(style)
            .with_message(name.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(80));
        Some(spinner)
    }

    fn line(&self, mark: &str, colour: &str, name: &str, outcome: &str, took: Option<Duration>) {
        let took = took.map_or_else(String::new, |took| format!("{:.1} s", took.as_secs_f64()));
        let mark = if self.terminal && std::env::var_os("NO_COLOR").is_none() {
            format!("\x1b[{colour}m{mark}\x1b[0m")
        } else {
            mark.to_owned()
        };
        say_aside!("  {mark} {name:NAME$} {took:>7}   {outcome}");
    }
}

#[expect(clippy::disallowed_methods, reason = "a shell: it tells how long a step took")]
fn start() -> Instant {
    Instant::now()
}

/// Lays out rows under a head: the first column to the left, the others to the right.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    let mut line = |cells: [&str; N]| {
        let mut out = String::from(" ");
        for (nth, (cell, &width)) in cells.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            let (before, after) = if nth == 0 {
                ("", pad.as_str())
            } else {
                (pad.as_str(), "")
            };
            let _ = write!(out, " {before}{cell}{after}  ");
        }
        let _ = writeln!(text, "{}", out.trim_end());
    };
    line(head);
    let rules = widths.map(|width| "─".repeat(width));
    line(rules.each_ref().map(String::as_str));
    for row in rows {
        line(row.each_ref().map(String::as_str));
    }
    text
}

/// A whole number with thin gaps between thousands.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (nth, digit) in digits.chars().enumerate() {
        if nth > 0 && (digits.len() - nth).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            ["TCP".to_owned(), "12.5".to_owned()],
            ["round trip".to_owned(), "7 µs".to_owned()],
        ];
        let text = table(["test", "result"], &rows);
        let expected =
            "  test         result\n  ──────────   ──────\n  TCP            12.5\n  round trip     7 µs\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(
            [grouped(7), grouped(1234), grouped(1_234_567)],
            ["7", "1 234", "1 234 567"]
        );
    }
}
