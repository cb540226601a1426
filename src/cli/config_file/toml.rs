//! A config file in TOML: one flat table.

use ::toml::de::{DeTable, DeValue};

use super::{Entry, Malformed, Value, line_of};

/// How deep brackets, and names with dots, may go; a config file needs one bracket and no dot. The parser takes stack for each.
const MAX_DEPTH: usize = 32;

/// The keys of a document.
pub(super) fn entries(text: &str) -> Result<Vec<Entry>, Malformed> {
    refuse_depth(text)?;
    let table = DeTable::parse(text).map_err(|error| Malformed {
        line: line_of(text, error.span().map_or(0, |span| span.start)),
        cause: error.message().lines().collect::<Vec<_>>().join(", "),
    })?;
    Ok(table
        .get_ref()
        .iter()
        .map(|(key, value)| Entry {
            key: key.get_ref().to_string(),
            line: line_of(text, key.span().start),
            value: read(text, value.get_ref()),
        })
        .collect())
}

/// Refuses what nests deeper than anything a config file has, before it is parsed. Brackets in strings count as well, which
/// does no harm as long as most are closed.
fn refuse_depth(text: &str) -> Result<(), Malformed> {
    let mut depth: usize = 0;
    for (nth, line) in text.lines().enumerate() {
        let key = line.split('=').next().unwrap_or_default();
        let dots = key.bytes().filter(|&byte| byte == b'.').count();
        for byte in line.bytes() {
            match byte {
                b'[' | b'{' => depth += 1,
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth.max(dots) > MAX_DEPTH {
                return Err(Malformed {
                    line: nth + 1,
                    cause: format!("it nests deeper than {MAX_DEPTH} levels"),
                });
            }
        }
    }
    Ok(())
}

fn read(text: &str, value: &DeValue<'_>) -> Value {
    match value {
        DeValue::Array(items) => {
            let mut list = Vec::new();
            for item in items {
                match read(text, item.get_ref()) {
                    Value::Text(value) => list.push((line_of(text, item.span().start), value)),
                    Value::Boolean(_) => return Value::Other("a list with a boolean"),
                    Value::List(_) => return Value::Other("a list in a list"),
                    Value::Other(_) => return Value::Other("a list of something else than text"),
                }
            }
            Value::List(list)
        }
        DeValue::String(value) => Value::Text(value.to_string()),
        // In base ten, whatever base it was written in.
        DeValue::Integer(number) => match i128::from_str_radix(number.as_str(), number.radix()) {
            Ok(number) => Value::Text(number.to_string()),
            Err(_) => Value::Other("a number too large"),
        },
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Float(_) => Value::Other("a number with a fraction"),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Table(_) => Value::Other("a table"),
    }
}
