//! A config file in JSON: one flat object.

use std::fmt;

use serde::Deserializer as _;
use serde::de::{Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Entry, Malformed, Value, line_of};

/// The keys of a document.
pub(super) fn entries(text: &str) -> Result<Vec<Entry>, Malformed> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let read = reader
        .deserialize_map(Members { text })
        .and_then(|entries| reader.end().map(|()| entries));
    read.map_err(|error| Malformed {
        line: error.line().max(1),
        cause: cause(&error),
    })
}

/// The message without the position that serde_json appends.
fn cause(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&position).unwrap_or(&text).to_owned()
}

struct Members<'a> {
    text: &'a str,
}

impl<'de> Visitor<'de> for Members<'de> {
    type Value = Vec<Entry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with flags' names as keys")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<Entry>, A::Error> {
        let mut entries: Vec<Entry> = Vec::new();
        while let Some((key, raw)) = map.next_entry::<String, &'de RawValue>()? {
            if entries.iter().any(|entry| entry.key == key) {
                return Err(A::Error::custom(format!("key {key:?} is there twice")));
            }
            let offset = offset_in(self.text, raw.get());
            // The key stands before the value, mostly on its line.
            let line = line_of(
                self.text,
                self.text
                    .get(..offset)
                    .map_or(0, |before| before.rfind('"').unwrap_or(0)),
            );
            entries.push(Entry {
                key,
                line,
                value: read(self.text, raw),
            });
        }
        Ok(entries)
    }
}

fn read(text: &str, raw: &RawValue) -> Value {
    let literal = raw.get();
    match literal.as_bytes().first() {
        Some(b'[') => {
            let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(literal) else {
                return Value::Other("a malformed list");
            };
            let mut list = Vec::new();
            for item in items {
                // Looked into no further: whoever nests ten thousand lists would have us do so as often.
                if item.get().starts_with('[') {
                    return Value::Other("a list in a list");
                }
                match read(text, item) {
                    Value::Text(value) => list.push((line_of(text, offset_in(text, item.get())), value)),
                    Value::Boolean(_) => return Value::Other("a list with a boolean"),
                    Value::List(_) => return Value::Other("a list in a list"),
                    Value::Other(_) => return Value::Other("a list of something else than text"),
                }
            }
            Value::List(list)
        }
        Some(b'{') => Value::Other("a table"),
        Some(b'"') => serde_json::from_str(literal).map_or(Value::Other("malformed text"), Value::Text),
        Some(b't') => Value::Boolean(true),
        Some(b'f') => Value::Boolean(false),
        Some(b'n') | None => Value::Other("null"),
        Some(_) if literal.contains(['.', 'e', 'E']) => Value::Other("a number with a fraction"),
        Some(_) => Value::Text(literal.to_owned()),
    }
}

/// Where a part that was borrowed from a text stands in it.
fn offset_in(text: &str, part: &str) -> usize {
    (part.as_ptr() as usize).saturating_sub(text.as_ptr() as usize)
}
