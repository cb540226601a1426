//! A config file in TOML: one flat table.

use ::toml::de::{DeTable, DeValue};

use super::{Entry, Malformed, Value, line_of};

/// The keys of a document.
pub(super) fn entries(text: &str) -> Result<Vec<Entry>, Malformed> {
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
