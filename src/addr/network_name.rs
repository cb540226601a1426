//! The name of a network.

use std::fmt;
use std::str::FromStr;

/// The name of one network among several under one prefix.
///
/// It is part of keys, of URLs and of file names, so it is none of the things that mean something there: 1 to 64 letters,
/// digits, `.`, `_` and `-`, beginning with a letter or digit. `config`, `subnets` and
/// `kersey` are keys of the network without a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(String);

/// Why a text is no name of a network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is no name of a network: {rule}")]
pub struct NetworkNameError {
    name: String,
    rule: &'static str,
}

impl NetworkName {
    /// The longest name, bytes.
    pub const MAX_LEN: usize = 64;
    /// Keys beside the networks' own, which cannot be names.
    pub const RESERVED: [&str; 3] = ["config", "subnets", "kersey"];

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkName {
    type Err = NetworkNameError;

    fn from_str(text: &str) -> Result<Self, NetworkNameError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let rule = if text.is_empty() || text.len() > Self::MAX_LEN {
            "it must have 1 to 64 characters"
        } else if !text.bytes().all(plain) {
            "only letters, digits, '.', '_' and '-' are allowed"
        } else if !text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric) {
            "it must begin with a letter or digit"
        } else if Self::RESERVED.contains(&text) {
            "this is a key of the network without a name"
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(NetworkNameError {
            // Whoever writes to the store chooses its length.
            name: text.chars().take(80).collect(),
            rule,
        })
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_safe_in_keys_urls_and_file_names() {
        let longest = "n".repeat(NetworkName::MAX_LEN);
        for good in ["blue", "a", "7", "Blue-2.example_x", longest.as_str()] {
            assert_eq!(good.parse::<NetworkName>().unwrap().to_string(), good);
        }
        let too_long = "n".repeat(NetworkName::MAX_LEN + 1);
        for bad in [
            "",
            "_",
            ".",
            "..",
            "../x",
            "a/b",
            "/a",
            ".hidden",
            "-x",
            "a b",
            "a\n",
            "a\0",
            "grün",
            "a%2fb",
            "config",
            "subnets",
            "kersey",
            too_long.as_str(),
        ] {
            assert!(bad.parse::<NetworkName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_error_names_value_and_rule() {
        let error = "a/b".parse::<NetworkName>().unwrap_err().to_string();
        assert_eq!(
            error,
            "\"a/b\" is no name of a network: only letters, digits, '.', '_' and '-' are allowed"
        );
        let error = "config".parse::<NetworkName>().unwrap_err().to_string();
        assert!(error.contains("a key of the network without a name"), "{error}");
    }
}
