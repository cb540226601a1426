//! Go's `encoding/json`, as far as flannel's documents need it.
//!
//! Flannel reads its config and lease values with Go's decoder, whose rules differ from serde's: keys match
//! whatever their case, the last of two equal keys wins, unknown keys are ignored, `null` leaves a plain field as
//! it was. [`Object`] reads a document by these rules, one field at a time, and names field, value and rule when
//! something does not fit.
//!
//! Limits: a document is at most [`MAX_DEPTH`] deep. A lone surrogate in a string is an error here; Go replaces it.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// How deep a document may nest: serde_json's own recursion limit, so that whoever parses a raw part of the
/// document later is inside that limit too.
pub const MAX_DEPTH: usize = 127;

/// Why a document could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// It is larger than its kind may be.
    #[error("{size} bytes of JSON where at most {limit} are allowed")]
    TooLarge {
        /// Bytes found.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// It nests too deep.
    #[error("JSON nests deeper than {MAX_DEPTH} levels")]
    TooDeep,
    /// It is not JSON, not an object, or goes on after the object.
    #[error("not a JSON object: {0}")]
    Syntax(String),
    /// A field has the wrong type or value.
    #[error("{field} is {value}: {rule}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value, cut short.
        value: String,
        /// What it should be.
        rule: &'static str,
    },
}

impl JsonError {
    /// A complaint about one field.
    pub fn field(field: &'static str, value: &str, rule: &'static str) -> Self {
        Self::Field {
            field,
            value: shorten(value),
            rule,
        }
    }
}

/// The members of a JSON object, in order, duplicates included.
#[derive(Debug)]
pub struct Object<'a>(Vec<(String, &'a RawValue)>);

impl<'a> Object<'a> {
    /// Reads an object of at most `limit` bytes.
    ///
    /// # Errors
    /// Too large, too deep, not JSON, not an object, or followed by anything but white space.
    pub fn parse(text: &'a str, limit: usize) -> Result<Self, JsonError> {
        if text.len() > limit {
            return Err(JsonError::TooLarge {
                size: text.len(),
                limit,
            });
        }
        if depth(text) > MAX_DEPTH {
            return Err(JsonError::TooDeep);
        }
        serde_json::from_str(text).map_err(|error| JsonError::Syntax(error.to_string()))
    }

    /// The raw text of the last member called `name`, `null` included.
    pub fn raw(&self, name: &str) -> Option<&'a str> {
        self.all(name).last()
    }

    /// The names of members that are none of `known`, whatever their case.
    pub fn strangers<'s>(&'s self, known: &'s [&'s str]) -> impl Iterator<Item = &'s str> + 's {
        let names = self.0.iter().map(|(key, _)| key.as_str());
        names.filter(move |key| !known.iter().any(|name| same_key(key, name)))
    }

    /// A string; `None` if absent or `null`.
    ///
    /// # Errors
    /// The member is neither string nor `null`.
    pub fn string(&self, name: &'static str) -> Result<Option<String>, JsonError> {
        self.last_value(name, "a string", |raw| serde_json::from_str(raw).ok())
    }

    /// An unsigned integer; `None` if absent or `null`.
    ///
    /// # Errors
    /// The member is no plain integer (`24.0`, `1e2` and `"24"` are not), negative, or too large.
    pub fn uint(&self, name: &'static str) -> Result<Option<u32>, JsonError> {
        self.last_value(name, "a whole number without sign, quotes or fraction", |raw| {
            raw.bytes()
                .all(|byte| byte.is_ascii_digit())
                .then(|| raw.parse().ok())?
        })
    }

    /// A boolean; `None` if absent or `null`.
    ///
    /// # Errors
    /// The member is neither boolean nor `null`.
    pub fn bool(&self, name: &'static str) -> Result<Option<bool>, JsonError> {
        self.last_value(name, "true or false", |raw| raw.parse().ok())
    }

    /// A string read as a `T`; `None` if absent. `null` is an error, as for Go types that decode themselves.
    ///
    /// # Errors
    /// The member is no string, or `T` refuses it.
    pub fn parsed<T: std::str::FromStr>(
        &self,
        name: &'static str,
        rule: &'static str,
    ) -> Result<Option<T>, JsonError> {
        let mut value = None;
        for raw in self.all(name) {
            let parsed = serde_json::from_str::<String>(raw)
                .ok()
                .and_then(|text| text.parse().ok());
            value = Some(parsed.ok_or_else(|| JsonError::field(name, raw, rule))?);
        }
        Ok(value)
    }

    /// Like [`parsed`](Self::parsed) for a Go pointer: `null` means absent.
    ///
    /// # Errors
    /// The member is no string, or `T` refuses it.
    pub fn parsed_or_null<T: std::str::FromStr>(
        &self,
        name: &'static str,
        rule: &'static str,
    ) -> Result<Option<T>, JsonError> {
        let mut value = None;
        for raw in self.all(name) {
            value = match raw {
                "null" => None,
                raw => Some(
                    serde_json::from_str::<String>(raw)
                        .ok()
                        .and_then(|text| text.parse().ok())
                        .ok_or_else(|| JsonError::field(name, raw, rule))?,
                ),
            };
        }
        Ok(value)
    }

    fn last_value<T>(
        &self,
        name: &'static str,
        rule: &'static str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, JsonError> {
        let mut value = None;
        for raw in self.all(name).filter(|raw| *raw != "null") {
            value = Some(read(raw).ok_or_else(|| JsonError::field(name, raw, rule))?);
        }
        Ok(value)
    }

    fn all<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'a str> + 's {
        let members = self.0.iter().filter(move |(key, _)| same_key(key, name));
        members.map(|(_, raw)| raw.get())
    }
}

impl<'de> Deserialize<'de> for Object<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry::<String, &RawValue>()? {
                    members.push(member);
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// The JSON text without white space between its tokens.
pub fn compact(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_string = false;
    let mut escaped = false;
    for c in text.chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = !escaped && c == '\\';
        } else if matches!(c, ' ' | '\t' | '\r' | '\n') {
            continue;
        } else {
            in_string = c == '"';
        }
        out.push(c);
    }
    out
}

/// The JSON text with the characters Go's encoder escapes for the sake of HTML.
pub fn escape_html(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("\\u003c"),
            '>' => out.push_str("\\u003e"),
            '&' => out.push_str("\\u0026"),
            '\u{2028}' => out.push_str("\\u2028"),
            '\u{2029}' => out.push_str("\\u2029"),
            c => out.push(c),
        }
    }
    out
}

/// Whether Go takes `key` for the field `name`: equal but for case, where the Kelvin sign is a `k` and the long s an
/// `s` (Unicode simple folding).
fn same_key(key: &str, name: &str) -> bool {
    let fold = |c: char| match c {
        '\u{212a}' => 'k',
        '\u{17f}' => 's',
        c => c.to_ascii_lowercase(),
    };
    key.chars().map(fold).eq(name.chars().map(fold))
}

fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn shorten(value: &str) -> String {
    /// Enough to recognise a value by, short enough for one log line.
    const MAX_CHARS: usize = 60;
    let mut short: String = value
        .chars()
        .take(MAX_CHARS)
        .flat_map(char::escape_debug)
        .collect();
    if value.chars().nth(MAX_CHARS).is_some() {
        short.push('…');
    }
    short.replace("\\\"", "\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(text: &str) -> Object<'_> {
        Object::parse(text, 1000).unwrap()
    }

    #[test]
    fn keys_match_in_any_case_and_the_last_wins() {
        let doc = object(r#"{"Port":1,"port":2,"PORT":3,"x":4}"#);
        assert_eq!(doc.uint("Port").unwrap(), Some(3));
        assert_eq!(object("{\"bac\u{212a}end\":7}").uint("Backend").unwrap(), Some(7));
    }

    #[test]
    fn null_leaves_a_plain_field_alone() {
        assert_eq!(object(r#"{"Port":1,"port":null}"#).uint("Port").unwrap(), Some(1));
        assert_eq!(object(r#"{"Port":null}"#).uint("Port").unwrap(), None);
    }

    #[test]
    fn integers_are_plain_integers() {
        for text in ["\"24\"", "24.0", "1e2", "-1", "-0", "99999999999", "true", "[]"] {
            let doc = format!("{{\"SubnetLen\":{text}}}");
            let error = object(&doc).uint("SubnetLen").unwrap_err();
            assert!(error.to_string().contains("SubnetLen"), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for text in [
            "",
            "null",
            "[]",
            "{",
            "{} x",
            "{}{}",
            "{,}",
            "{\"a\":1,}",
            "// {}\n{}",
            "\u{feff}{}",
        ] {
            assert!(Object::parse(text, 1000).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_depth_bomb_is_refused_before_it_is_parsed() {
        let bomb = format!("{{\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(Object::parse(&bomb, 1 << 20).unwrap_err(), JsonError::TooDeep);
        assert!(Object::parse("{\"a\":\"[[[[[[[\"}", 100).is_ok());
    }

    #[test]
    fn compact_leaves_strings_alone() {
        assert_eq!(
            compact("{ \"a b\" : [ 1 , \"x \\\" y\" ] }\n"),
            "{\"a b\":[1,\"x \\\" y\"]}"
        );
        assert_eq!(escape_html("\"<&>\""), "\"\\u003c\\u0026\\u003e\"");
    }
}
