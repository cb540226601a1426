//! What a node tells a Kersey server of itself, in a header that flannel's servers let pass unread.
//!
//! `ADDRESS ID BOOT HOST`: the public address, then the parts of a [`Holder`]. A part that is not known is a dash. The name is for
//! people; what of it does not fit a header is a question mark there.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::control::identity::Holder;

/// Digits of the number of a data directory.
const ID_DIGITS: usize = 32;
/// The longest part of the others: what the kernel allows for a host's name.
const MAX_PART: usize = 64;

/// A node, as the header [`NODE_HEADER`](super::NODE_HEADER) names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeHeader {
    /// Its public address.
    pub address: IpAddr,
    /// Who it is.
    pub holder: Holder,
}

/// What is wrong with the header.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{header} must be ADDRESS ID BOOT HOST, and {part} is not: {rule}", header = super::NODE_HEADER)]
pub struct NodeHeaderError {
    part: &'static str,
    rule: &'static str,
}

impl fmt::Display for NodeHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Holder { id, host, boot } = &self.holder;
        write!(f, "{} {} {} {}", self.address, id, part(boot), part(host))
    }
}

impl FromStr for NodeHeader {
    type Err = NodeHeaderError;

    fn from_str(text: &str) -> Result<Self, NodeHeaderError> {
        let wrong = |part, rule| NodeHeaderError { part, rule };
        let mut parts = text.split(' ');
        let mut next = || parts.next().unwrap_or_default();
        let (address, id, boot, host) = (next(), next(), next(), next());
        let is_part = |part: &str| {
            (1..=MAX_PART).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let known = |part: &str| {
            if part == "-" {
                String::new()
            } else {
                part.to_owned()
            }
        };
        if id.len() != ID_DIGITS || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong("ID", "32 hexadecimal digits"));
        }
        if !is_part(boot) {
            return Err(wrong("BOOT", "1 to 64 visible ASCII characters"));
        }
        if !is_part(host) || parts.next().is_some() {
            return Err(wrong(
                "HOST",
                "1 to 64 visible ASCII characters, and nothing after",
            ));
        }
        Ok(Self {
            address: address.parse().map_err(|_| wrong("ADDRESS", "an IP address"))?,
            holder: Holder {
                id: id.to_owned(),
                host: known(host),
                boot: known(boot),
            },
        })
    }
}

fn part(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let visible = |c: char| if c.is_ascii_graphic() { c } else { '?' };
    text.chars().take(MAX_PART).map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff";

    #[test]
    fn what_is_written_is_read() {
        for (host, boot) in [("alpha", "0b3e-1"), ("", "0b3e-1"), ("alpha", ""), ("", "")] {
            for address in ["192.0.2.1", "2001:db8::1"] {
                let node = node(address, host, boot);
                assert_eq!(node.to_string().parse(), Ok(node));
            }
        }
        assert_eq!(
            node("192.0.2.1", "alpha", "x").to_string(),
            format!("192.0.2.1 {ID} x alpha")
        );
    }

    #[test]
    fn a_name_no_header_can_carry_is_still_a_header() {
        let odd = node("192.0.2.1", "a b\r\nX: ü", "x").to_string();
        assert_eq!(odd, format!("192.0.2.1 {ID} x a?b??X:??"));
        assert_eq!(odd.parse::<NodeHeader>().unwrap().holder.host, "a?b??X:??");
        let long = node("192.0.2.1", &"h".repeat(200), "x").to_string();
        assert_eq!(long.parse::<NodeHeader>().unwrap().holder.host.len(), MAX_PART);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            (String::new(), "ID"),
            (format!("192.0.2.256 {ID} x alpha"), "ADDRESS"),
            ("192.0.2.1 0011 x alpha".to_owned(), "ID"),
            (format!("192.0.2.1 {}zz x alpha", &ID[2..]), "ID"),
            (format!("192.0.2.1 {ID}  alpha"), "BOOT"),
            (format!("192.0.2.1 {ID} {} alpha", "b".repeat(65)), "BOOT"),
            (format!("192.0.2.1 {ID} x"), "HOST"),
            (format!("192.0.2.1 {ID} x a\u{7f}"), "HOST"),
            (format!("192.0.2.1 {ID} x alpha beta"), "HOST"),
        ] {
            let error = text.parse::<NodeHeader>().unwrap_err();
            assert_eq!(error.part, part, "{text:?}");
            assert!(error.to_string().starts_with("x-kersey-node must be "), "{error}");
        }
    }

    fn node(address: &str, host: &str, boot: &str) -> NodeHeader {
        NodeHeader {
            address: address.parse().unwrap(),
            holder: Holder {
                id: ID.to_owned(),
                host: host.to_owned(),
                boot: boot.to_owned(),
            },
        }
    }
}
