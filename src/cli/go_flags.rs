//! Go's flag syntax, as flanneld's users write it, turned into the one form clap reads: `--name=value`.
//!
//! The rules, from Go's `flag` package: one dash or two; `-x=v` and `-x v` alike, except that a boolean takes a value
//! only after `=`; a value may itself start with a dash; `--` ends the flags, and so does the first word that is not a
//! flag. Flannel ignores whatever follows there, which hides mistakes such as `--ip-masq true`; here it is an error.

use std::collections::{BTreeMap, BTreeSet};

use super::UsageError;
use crate::options::nearest;

/// Which flags there are, and which of them are booleans.
#[derive(Debug)]
pub(super) struct Grammar {
    /// Name or old name → name and kind.
    flags: BTreeMap<String, (String, FlagKind)>,
    /// Flags of which every value counts, not the last alone.
    repeatable: BTreeSet<String>,
}

/// Whether a flag needs a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlagKind {
    /// `-x` alone means true.
    Boolean,
    /// `-x v` or `-x=v`.
    Value,
}

impl Grammar {
    /// Reads the grammar off a clap command.
    pub(super) fn of(command: &clap::Command) -> Self {
        let mut flags = BTreeMap::new();
        let mut repeatable = BTreeSet::new();
        for arg in command.get_arguments() {
            let takes_value = arg.get_action().takes_values();
            let optional = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
            let kind = if takes_value && !optional {
                FlagKind::Value
            } else {
                FlagKind::Boolean
            };
            let Some(long) = arg.get_long() else {
                continue;
            };
            if matches!(arg.get_action(), clap::ArgAction::Append) {
                repeatable.insert(long.to_owned());
            }
            for name in std::iter::once(long).chain(arg.get_all_aliases().unwrap_or_default()) {
                flags.insert(name.to_owned(), (long.to_owned(), kind));
            }
        }
        Self { flags, repeatable }
    }

    /// The flags of both.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.flags.extend(other.flags);
        self.repeatable.extend(other.repeatable);
        self
    }

    /// The flag of a name, perhaps an old one: its name and kind.
    pub(super) fn flag(&self, name: &str) -> Option<(&str, FlagKind)> {
        self.flags.get(name).map(|(name, kind)| (name.as_str(), *kind))
    }

    /// Whether every value of a flag counts, not the last alone.
    pub(super) fn is_repeatable(&self, name: &str) -> bool {
        self.repeatable.contains(name)
    }

    /// All names, old ones left out.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.flags
            .iter()
            .filter(|(key, (name, _))| *key == name)
            .map(|(_, (name, _))| name.as_str())
    }

    /// Turns Go-style arguments into `(name, value)` pairs in the order given.
    ///
    /// # Errors
    /// An unknown flag, a missing value, a malformed flag, or a word that is no flag.
    pub(super) fn parse(&self, args: &[String]) -> Result<Vec<Setting>, UsageError> {
        let mut settings = Vec::new();
        let mut words = args.iter();
        while let Some(word) = words.next() {
            if word == "--" {
                match words.next() {
                    Some(extra) => return Err(stray_word(extra, settings.last())),
                    None => break,
                }
            }
            let Some(flag) = word.strip_prefix('-').filter(|rest| !rest.is_empty()) else {
                return Err(stray_word(word, settings.last()));
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            if flag.starts_with(['-', '=']) {
                return Err(UsageError::new(
                    format!("bad flag syntax: {word}"),
                    "write --name=value",
                ));
            }
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (flag, None),
            };
            if (name == "h" || name == "help") && inline.is_none() {
                settings.push(Setting::new("help", "true"));
                continue;
            }
            let Some((name, kind)) = self.flags.get(name) else {
                return Err(self.unknown(name));
            };
            let value = match (inline, *kind) {
                (Some(value), _) => value,
                (None, FlagKind::Boolean) => "true",
                (None, FlagKind::Value) => words.next().ok_or_else(|| {
                    UsageError::new(
                        format!("flag --{name} needs a value"),
                        format!("write --{name}=VALUE"),
                    )
                })?,
            };
            settings.push(Setting::new(name, value));
        }
        Ok(settings)
    }

    fn unknown(&self, name: &str) -> UsageError {
        let hint = match nearest(name, self.names()) {
            Some(near) => format!("did you mean --{near}?"),
            None => "see --help for the flags there are".to_owned(),
        };
        UsageError::new(format!("unknown flag --{name}"), hint)
    }
}

/// One flag with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Name without dashes.
    pub(super) name: String,
    /// Value as text.
    pub(super) value: String,
}

impl Setting {
    pub(super) fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            value: value.into(),
        }
    }

    /// The form clap reads.
    pub(super) fn to_word(&self) -> String {
        format!("--{}={}", self.name, self.value)
    }
}

fn stray_word(word: &str, before: Option<&Setting>) -> UsageError {
    let hint = match before {
        Some(setting) if setting.value == "true" && parse_bool(word).is_ok() => {
            format!(
                "a boolean flag takes its value after an equals sign: --{}={word}",
                setting.name
            )
        }
        Some(_) | None => "every option is a flag: --name=value".to_owned(),
    };
    UsageError::new(format!("unexpected word {word:?}"), hint)
}

/// Parses a boolean as Go's `strconv.ParseBool` does.
pub(super) fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("expected true or false".to_owned()),
    }
}

/// Parses an integer as Go's `strconv.ParseInt` with base 0 does: `0x`, `0o`, `0b` and a leading `0` choose the base,
/// and single underscores may stand between digits (and after a base prefix).
pub(super) fn parse_int(text: &str) -> Result<i64, String> {
    let wrong = || "expected a whole number".to_owned();
    let (negative, digits) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        Some(_) => (false, text),
        None => return Err(wrong()),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, rest, prefixed) = if let Some(rest) = lower.strip_prefix("0x") {
        (16, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0b") {
        (2, rest, true)
    } else if let Some(rest) = lower.strip_prefix("0o") {
        (8, rest, true)
    } else if lower.len() > 1 && lower.starts_with('0') {
        (8, &lower[1..], true)
    } else {
        (10, lower.as_str(), false)
    };
    let misplaced = rest.ends_with('_') || rest.contains("__") || (!prefixed && rest.starts_with('_'));
    let plain: String = rest.chars().filter(|&c| c != '_').collect();
    if misplaced || !plain.chars().all(|c| c.is_digit(radix)) {
        return Err(wrong());
    }
    let value = i64::from_str_radix(&plain, radix).map_err(|_| wrong())?;
    Ok(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gos_flag_forms_are_all_read() {
        type Pairs = &'static [(&'static str, &'static str)];
        let cases: &[(&[&str], Pairs)] = &[
            (&[], &[]),
            (&["-prefix", "/a"], &[("prefix", "/a")]),
            (&["--prefix=/a"], &[("prefix", "/a")]),
            (&["-prefix="], &[("prefix", "")]),
            (&["-prefix=a=b"], &[("prefix", "a=b")]),
            (&["-prefix", "-dash"], &[("prefix", "-dash")]),
            (&["-prefix", "--"], &[("prefix", "--")]),
            (&["-masq"], &[("masq", "true")]),
            (&["--masq=F", "-v=3"], &[("masq", "F"), ("v", "3")]),
            (&["-v", "1", "-v", "2"], &[("v", "1"), ("v", "2")]),
            (&["-masq", "--"], &[("masq", "true")]),
            (&["-h"], &[("help", "true")]),
            (&["--help"], &[("help", "true")]),
            (&["-old", "x"], &[("prefix", "x")]),
        ];
        for (args, expected) in cases {
            let expected: Vec<Setting> = expected.iter().map(|(n, v)| Setting::new(*n, *v)).collect();
            assert_eq!(grammar().parse(&words(args)), Ok(expected), "{args:?}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let cases: &[(&[&str], &str, &str)] = &[
            (&["-prefix"], "flag --prefix needs a value", "--prefix=VALUE"),
            (
                &["-preffix=1"],
                "unknown flag --preffix",
                "did you mean --prefix?",
            ),
            (&["-zzz"], "unknown flag --zzz", "--help"),
            (&["word"], "unexpected word \"word\"", "--name=value"),
            (&["-"], "unexpected word \"-\"", "--name=value"),
            (&["-masq", "true"], "unexpected word \"true\"", "--masq=true"),
            (&["-masq", "--", "x"], "unexpected word \"x\"", "--name=value"),
            (&["---masq"], "bad flag syntax: ---masq", "--name=value"),
            (&["-=1"], "bad flag syntax: -=1", "--name=value"),
            (&["--=1"], "bad flag syntax: --=1", "--name=value"),
        ];
        for (args, message, hint) in cases {
            let error = grammar().parse(&words(args)).unwrap_err();
            assert_eq!(error.message, *message, "{args:?}");
            assert!(error.hint.contains(hint), "{args:?}: {}", error.hint);
        }
    }

    #[test]
    fn integers_choose_their_base_as_in_go() {
        for (text, value) in [
            ("0", 0),
            ("60", 60),
            ("-5", -5),
            ("+5", 5),
            ("0x10", 16),
            ("0X_1f", 31),
            ("010", 8),
            ("0o17", 15),
            ("0b101", 5),
            ("1_000", 1000),
            ("0_7", 7),
        ] {
            assert_eq!(parse_int(text), Ok(value), "{text}");
        }
        for text in [
            "",
            "-",
            "1.5",
            "1e3",
            "08",
            "0x",
            "_1",
            "1_",
            "1__0",
            " 1",
            "9223372036854775808",
            "--1",
            "0x-1",
        ] {
            assert!(parse_int(text).is_err(), "{text}");
        }
    }

    #[test]
    fn booleans_are_gos() {
        for text in ["1", "t", "T", "true", "TRUE", "True"] {
            assert_eq!(parse_bool(text), Ok(true), "{text}");
        }
        for text in ["0", "f", "F", "false", "FALSE", "False"] {
            assert_eq!(parse_bool(text), Ok(false), "{text}");
        }
        for text in ["", "yes", "on", "tRUE", "2"] {
            assert!(parse_bool(text).is_err(), "{text}");
        }
    }

    fn grammar() -> Grammar {
        let boolean = || {
            clap::Arg::new("masq")
                .long("masq")
                .num_args(0..=1)
                .require_equals(true)
        };
        Grammar::of(
            &clap::Command::new("x")
                .arg(clap::Arg::new("prefix").long("prefix").alias("old"))
                .arg(clap::Arg::new("v").long("v"))
                .arg(boolean()),
        )
    }

    fn words(args: &[&str]) -> Vec<String> {
        args.iter().map(|&word| word.to_owned()).collect()
    }
}
