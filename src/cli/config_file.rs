//! Flags given in a file: TOML, or JSON if its name ends in `.json`. Every flag's name is a key.
//!
//! ```text
//! bytes ── toml.rs / json.rs ──▶ keys and values with their lines ── read_keys ──▶ settings: flag, value, line
//! ```
//!
//! The file is the weakest voice but for the defaults: a flag on the command line or in a variable silences its key. Own
//! files are not read as flannel's documents are: an unknown key, a key given twice and a value of the wrong kind are
//! errors, and each error names file, line, key, value and rule.
//!
//! A file is read as state files are: no FIFO is waited for, nothing larger than [`MAX_BYTES`] is taken, and one that
//! everybody may write is refused, since whoever writes it commands the daemon.

mod json;
mod toml;

use std::fmt;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::UsageError;
use super::environment::Variables;
use super::go_flags::{FlagKind, Grammar, Setting};
use crate::control::state_file;
use crate::options::nearest;

/// Where a file is looked for if none is named.
pub(super) const DEFAULT_PATH: &str = "/etc/kersey/kersey.toml";

/// The file that flags or variables name, to be read again by a daemon that runs.
pub(super) fn path(flags: &[String], variables: &Variables) -> Option<PathBuf> {
    let mut words = flags.iter();
    let mut named = None;
    while let Some(word) = words.next() {
        match word.trim_start_matches('-').split_once('=') {
            Some(("config", path)) => named = Some(path.to_owned()),
            None if word.starts_with('-') && word.trim_start_matches('-') == "config" => {
                named = words.next().cloned();
            }
            Some(_) | None => {}
        }
    }
    let variable = ["KERSEY_CONFIG", "FLANNELD_CONFIG"]
        .iter()
        .find_map(|name| variables.get(*name).cloned());
    named
        .or(variable)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
}

/// An example with every key and a paragraph about each has some 20 KB.
const MAX_BYTES: u64 = 1 << 20;

/// Flags whose one value is a list with commas; a file may give an array instead.
const COMMA_LISTS: [&str; 5] = ["etcd-endpoints", "remote", "networks", "listen", "server-name"];

/// Flags that make no sense in a file.
pub(super) const NOT_IN_A_FILE: [&str; 4] = ["help", "version", "config", "dry-run"];

/// Keys of flannel's network config, which is another file.
const NETWORK_CONFIG: [&str; 4] = ["Network", "IPv6Network", "SubnetLen", "Backend"];

/// Open to others than the owner and a group, such as that of the service.
const NOT_PRIVATE: u32 = 0o007;

/// A file's text, and where it came from.
#[derive(Debug)]
pub(super) struct ConfigFile {
    path: PathBuf,
    text: String,
    /// Permission bits.
    mode: u32,
}

/// A flag set by a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FromFile {
    /// The flag and its value.
    pub(super) setting: Setting,
    /// Which file says so, and where.
    pub(super) place: FilePlace,
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FilePlace {
    path: PathBuf,
    line: usize,
}

impl fmt::Display for FilePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}", self.path.display(), self.line)
    }
}

/// One `key = value` of a document, both forms alike.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    key: String,
    line: usize,
    value: Value,
}

/// A value as far as flags have such.
#[derive(Debug, PartialEq, Eq)]
enum Value {
    /// Text, or a number as it stands.
    Text(String),
    Boolean(bool),
    List(Vec<(usize, String)>),
    /// Something no flag takes, and what it is.
    Other(&'static str),
}

/// Why a document could not be read; `line` counts from 1.
#[derive(Debug, PartialEq, Eq)]
struct Malformed {
    line: usize,
    cause: String,
}

impl ConfigFile {
    /// Reads a file.
    pub(super) fn read(path: &Path) -> io::Result<Self> {
        let (text, metadata) = state_file::read_with_metadata(path, MAX_BYTES)?;
        Ok(Self {
            path: path.to_owned(),
            text,
            mode: metadata.permissions().mode(),
        })
    }

    /// The settings of all keys, in the order of the file. `grammar` has every flag a file may set.
    pub(super) fn settings(&self, grammar: &Grammar) -> Result<Vec<FromFile>, UsageError> {
        let is_json = self
            .path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        let text = self.text.trim_start_matches('\u{feff}');
        let read = if is_json {
            json::entries(text)
        } else {
            toml::entries(text)
        };
        let mut entries = read.map_err(|malformed| {
            let form = if is_json { "JSON" } else { "TOML" };
            UsageError::new(
                format!("{} is malformed: {}", self.place(malformed.line), malformed.cause),
                format!("a config file is {form}: flags' names as keys (see `kersey run --help`), no other"),
            )
        })?;
        entries.sort_by_key(|entry| entry.line);
        let mut settings: Vec<FromFile> = Vec::new();
        for entry in &entries {
            let place = self.place(entry.line);
            let (name, kind) = grammar
                .flag(&entry.key)
                .filter(|(name, _)| !NOT_IN_A_FILE.contains(name))
                .ok_or_else(|| unknown_key(&place, &entry.key, grammar))?;
            // An old name beside the new one.
            if settings.iter().any(|earlier| earlier.setting.name == name) {
                return Err(UsageError::new(
                    format!("{place}: key {:?} sets {name} a second time", entry.key),
                    "give every key once; one that takes several values takes a list",
                ));
            }
            for (line, value) in texts(name, kind, grammar.is_repeatable(name), &entry.value)
                .map_err(|rule| wrong_kind(&place, entry, rule))?
            {
                settings.push(FromFile {
                    setting: Setting::new(name, value),
                    place: self.place(line.unwrap_or(entry.line)),
                });
            }
        }
        Ok(settings)
    }

    /// What the user should know about the file: others can read the secrets in it.
    pub(super) fn notes(&self, settings: &[FromFile]) -> Vec<String> {
        if self.mode & NOT_PRIVATE == 0 {
            return Vec::new();
        }
        let secret = settings
            .iter()
            .find(|found| is_secret(&found.setting.name) && !found.setting.value.is_empty());
        secret
            .map(|found| {
                format!(
                    "{} has a secret, {}, and mode {:04o}: everybody on this machine gets at it; chmod o= {}",
                    self.path.display(),
                    found.setting.name,
                    self.mode & 0o7777,
                    self.path.display()
                )
            })
            .into_iter()
            .collect()
    }

    fn place(&self, line: usize) -> FilePlace {
        FilePlace {
            path: self.path.clone(),
            line,
        }
    }
}

/// Whether a flag's value must not be shown.
pub(super) fn is_secret(flag: &str) -> bool {
    let flag = flag.to_ascii_lowercase();
    ["password", "token", "secret"]
        .iter()
        .any(|word| flag.contains(word))
        && !flag.ends_with("file")
}

/// The values of a flag as texts, with lines of their own in a list; or the rule that was broken.
fn texts(
    name: &str,
    kind: FlagKind,
    repeatable: bool,
    value: &Value,
) -> Result<Vec<(Option<usize>, String)>, &'static str> {
    match (value, kind) {
        (Value::Other(_), FlagKind::Boolean) => Err("expected true or false"),
        (Value::Other(_), FlagKind::Value) => Err("expected text or a whole number"),
        (Value::Text(text), _) => Ok(vec![(None, text.clone())]),
        (Value::Boolean(value), FlagKind::Boolean) => Ok(vec![(None, value.to_string())]),
        (Value::Boolean(_), FlagKind::Value) => Err("expected text or a whole number, not a boolean"),
        (Value::List(items), _) if repeatable => Ok(items
            .iter()
            .map(|(line, text)| (Some(*line), text.clone()))
            .collect()),
        (Value::List(items), _) if COMMA_LISTS.contains(&name) => {
            let items: Vec<&str> = items.iter().map(|(_, text)| text.as_str()).collect();
            Ok(vec![(None, items.join(","))])
        }
        (Value::List(_), _) => Err("expected one value, not a list"),
    }
}

fn unknown_key(place: &FilePlace, key: &str, grammar: &Grammar) -> UsageError {
    let names = grammar.names().filter(|name| !NOT_IN_A_FILE.contains(name));
    let hint = if NOT_IN_A_FILE.contains(&key) {
        "give it on the command line".to_owned()
    } else {
        match nearest(key, names) {
            _ if NETWORK_CONFIG.contains(&key) => {
                "that is a network config; `kersey config check --network-config FILE` looks at one"
                    .to_owned()
            }
            Some(near) => format!("did you mean {near:?}?"),
            None => "keys are the names of flags; `kersey run --help` lists them".to_owned(),
        }
    };
    UsageError::new(format!("{place}: unknown key {key:?}"), hint)
}

fn wrong_kind(place: &FilePlace, entry: &Entry, rule: &str) -> UsageError {
    let shown = match &entry.value {
        Value::Other(kind) => format!("is {kind}"),
        Value::Boolean(value) => format!("is {value}"),
        Value::List(_) => "is a list".to_owned(),
        Value::Text(_) => "is text".to_owned(),
    };
    UsageError::new(format!("{place}: {} {shown}", entry.key), rule)
}

/// The line, from 1, of a byte in a text.
fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|&&byte| byte == b'\n').count()
}

#[cfg(test)]
mod example;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn both_forms_say_the_same() {
        let toml = "\u{feff}# a node\netcd-prefix = \"/a\"\niface = [\"eth0\",\n  \"eth1\"]\nmasq = true\nv = 0x10\n\
                    etcd-endpoints = ['http://a:1', 'http://b:1']\n";
        let json = "{\"etcd-prefix\": \"/a\",\n \"iface\": [\"eth0\",\n \"eth1\"],\n \"masq\": true,\n \"v\": 16,\n\
                    \"etcd-endpoints\": [\"http://a:1\", \"http://b:1\"]}";
        let pairs = |path: &str, text: &str| -> Vec<(String, String)> {
            let found = file(path, text).settings(&grammar()).unwrap();
            found
                .into_iter()
                .map(|found| (found.setting.name, found.setting.value))
                .collect()
        };
        let expected = [
            ("etcd-prefix", "/a"),
            ("iface", "eth0"),
            ("iface", "eth1"),
            ("masq", "true"),
            ("v", "16"),
            ("etcd-endpoints", "http://a:1,http://b:1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(pairs("a.toml", toml), expected);
        assert_eq!(pairs("a.JSON", json), expected);
        assert_eq!(pairs("a.toml", ""), []);
        assert_eq!(pairs("a.json", "{}"), []);
    }

    #[test]
    fn every_value_knows_its_line() {
        let found = file("/f.toml", "\n\niface = [\n 'a',\n 'b' ]\nv = 1\n")
            .settings(&grammar())
            .unwrap();
        let places: Vec<String> = found.iter().map(|found| found.place.to_string()).collect();
        assert_eq!(places, ["/f.toml line 4", "/f.toml line 5", "/f.toml line 6"]);
    }

    #[test]
    fn mistakes_name_file_line_key_value_and_rule() {
        for (path, text, message, hint) in [
            (
                "f.toml",
                "v = 1\netcd-prefx = 'x'\n",
                "f.toml line 2: unknown key \"etcd-prefx\"",
                "did you mean \"etcd-prefix\"?",
            ),
            ("f.toml", "zzz = 1", "unknown key \"zzz\"", "names of flags"),
            (
                "f.json",
                r#"{"Network":"10.244.0.0/16"}"#,
                "unknown key \"Network\"",
                "--network-config",
            ),
            (
                "f.toml",
                "[run]\nv = 1\n",
                "line 1: unknown key \"run\"",
                "names of flags",
            ),
            (
                "f.toml",
                "version = true",
                "unknown key \"version\"",
                "command line",
            ),
            ("f.toml", "config = 'x'", "unknown key \"config\"", "command line"),
            ("f.toml", "v = true", "f.toml line 1: v is true", "not a boolean"),
            (
                "f.toml",
                "v = 1.5",
                "v is a number with a fraction",
                "whole number",
            ),
            ("f.toml", "v = 2020-01-01", "v is a date", "whole number"),
            ("f.toml", "v = [1]", "v is a list", "one value"),
            ("f.toml", "masq = {}", "masq is a table", "true or false"),
            ("f.toml", "iface = [['a']]", "iface is a list in a list", "text"),
            ("f.toml", "v = 1\nv = 2", "f.toml line 2 is malformed", "TOML"),
            ("f.toml", "v = 1\n\nv : 2", "f.toml line 3 is malformed", "TOML"),
            (
                "f.toml",
                "v = 1\nold = 'x'\netcd-prefix = 'y'",
                "line 3: key \"etcd-prefix\" sets etcd-prefix a second time",
                "once",
            ),
            (
                "f.json",
                "{\"v\": 1,\n\"v\": 2}",
                "f.json line 2 is malformed: key \"v\" is there twice",
                "JSON",
            ),
            ("f.json", "{\"v\": 1,\n\n}", "f.json line 3 is malformed", "JSON"),
            ("f.json", "[1]", "f.json line 1 is malformed", "JSON"),
            ("f.json", "{\"v\":1} x", "f.json line 1 is malformed", "JSON"),
            (
                "f.json",
                "{\"v\":\nnull}",
                "f.json line 1: v is null",
                "whole number",
            ),
            (
                "f.json",
                "{\"v\": 1e3}",
                "v is a number with a fraction",
                "whole number",
            ),
            ("f.json", "{\"v\": {}}", "v is a table", "whole number"),
            ("f.json", "{\"nope\": [", "f.json line 1 is malformed", "JSON"),
        ] {
            let error = file(path, text).settings(&grammar()).unwrap_err();
            assert!(error.message.contains(message), "{text:?}: {error}");
            assert!(error.hint.contains(hint), "{text:?}: {error}");
            assert!(!error.message.contains('\n'), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_hostile_document_is_refused_and_costs_little() {
        let deep = |open: &str, close: &str| format!("{}{}", open.repeat(10_000), close.repeat(10_000));
        for (path, text) in [
            ("f.json", deep("[", "]")),
            ("f.json", format!("{{\"v\":{}}}", deep("[", "]"))),
            ("f.toml", format!("v = {}", deep("[", "]"))),
            ("f.toml", format!("{}x=1", "a.".repeat(10_000))),
            ("f.toml", "\0".to_owned()),
            ("f.json", "\0".to_owned()),
        ] {
            assert!(
                file(path, &text).settings(&grammar()).is_err(),
                "{path} {:.20}",
                text
            );
        }
    }

    #[test]
    fn a_secret_in_an_open_file_is_noted() {
        let open = file("f.toml", "etcd-password = 'x'");
        let found = open.settings(&grammar()).unwrap();
        let notes = open.notes(&found);
        assert_eq!(notes.len(), 1);
        assert!(
            notes[0].contains("chmod o= f.toml") && notes[0].contains("0644"),
            "{notes:?}"
        );
        for mode in [0o100_600, 0o100_640] {
            let closed = ConfigFile {
                mode,
                ..file("f.toml", "etcd-password = 'x'")
            };
            assert_eq!(closed.notes(&found), [] as [String; 0], "{mode:o}");
        }
        let harmless = file("f.toml", "v = 1\netcd-password = ''");
        assert_eq!(
            harmless.notes(&harmless.settings(&grammar()).unwrap()),
            [] as [String; 0]
        );
    }

    #[test]
    fn a_file_that_is_none_is_refused_at_once() {
        // B6: a directory, a FIFO, one that everybody may write, a sparse gigabyte, no text.
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str, part: &str| {
            let error = ConfigFile::read(&dir.path().join(name)).unwrap_err();
            assert!(error.to_string().contains(part), "{name}: {error}");
        };
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        refused("dir", "not a regular file");
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        refused("fifo", "not a regular file");
        std::fs::write(dir.path().join("open"), "v = 1").unwrap();
        std::fs::set_permissions(dir.path().join("open"), std::fs::Permissions::from_mode(0o666)).unwrap();
        refused("open", "everybody may write it");
        let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        refused("sparse", "larger than");
        std::fs::write(dir.path().join("bytes"), b"\xff\xfe").unwrap();
        refused("bytes", "UTF-8");
        refused("none", "No such file");
        // A link is read: that is how Kubernetes mounts a file.
        std::fs::write(dir.path().join("target"), "v = 1").unwrap();
        symlink(dir.path().join("target"), dir.path().join("link.toml")).unwrap();
        assert!(ConfigFile::read(&dir.path().join("link.toml")).is_ok());
    }

    pub(super) fn file(path: &str, text: &str) -> ConfigFile {
        ConfigFile {
            path: path.into(),
            text: text.to_owned(),
            mode: 0o100_644,
        }
    }

    fn grammar() -> Grammar {
        let flag = |name| clap::Arg::new(name).long(name);
        Grammar::of(
            &clap::Command::new("x")
                .args(["v", "version", "config", "etcd-endpoints", "etcd-password"].map(flag))
                .arg(flag("etcd-prefix").alias("old"))
                .arg(flag("iface").action(clap::ArgAction::Append))
                .arg(flag("masq").num_args(0..=1).require_equals(true)),
        )
    }
}
