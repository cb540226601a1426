//! A rule as `iptables -S` prints it.

/// A rule, as far as we look at it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rule {
    /// Its chain.
    pub(super) chain: String,
    /// All of it but `-A CHAIN`, as it was printed; what deletes it.
    pub(super) spec: String,
    /// What it says of the source.
    pub(super) source: Side,
    /// What it says of the destination.
    pub(super) destination: Side,
    /// Its comment.
    pub(super) comment: Option<String>,
    /// Where it goes.
    pub(super) target: Option<String>,
    /// Whether it looks at anything else.
    pub(super) has_more: bool,
}

/// What a rule says of an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Side {
    /// Nothing.
    #[default]
    Any,
    /// It lies in a prefix.
    In(String),
    /// It does not.
    NotIn(String),
}

impl Side {
    /// Whether the rule speaks of this prefix, be it that it denies it.
    pub(super) fn is(&self, prefix: &str) -> bool {
        match self {
            Self::Any => false,
            Self::In(held) | Self::NotIn(held) => held == prefix,
        }
    }

    /// Whether the address must not lie in this prefix.
    pub(super) fn is_not(&self, prefix: &str) -> bool {
        matches!(self, Self::NotIn(held) if held == prefix)
    }
}

impl Rule {
    /// Reads a line; `None` if it is about something else than a rule.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let (chain, spec) = line
            .strip_prefix("-A ")?
            .split_once(' ')
            .unwrap_or((&line[3..], ""));
        let mut rule = Self {
            chain: chain.to_owned(),
            spec: spec.to_owned(),
            ..Self::default()
        };
        let words = words(spec);
        let mut rest = words.iter().map(String::as_str);
        let mut denied = false;
        while let Some(word) = rest.next() {
            let side = |prefix: Option<&str>| {
                let prefix = prefix.unwrap_or_default().to_owned();
                if denied {
                    Side::NotIn(prefix)
                } else {
                    Side::In(prefix)
                }
            };
            match word {
                "!" => {
                    denied = true;
                    continue;
                }
                "-s" => rule.source = side(rest.next()),
                "-d" => rule.destination = side(rest.next()),
                "-j" | "-g" => {
                    rule.target = rest.next().map(str::to_owned);
                    // What follows are the target's own settings.
                    break;
                }
                "-m" => match rest.next() {
                    Some("comment") => {}
                    Some(_) | None => rule.has_more = true,
                },
                "--comment" => rule.comment = rest.next().map(str::to_owned),
                _ => rule.has_more = true,
            }
            denied = false;
        }
        Some(rule)
    }

    /// Whether it goes to a chain or target of this name.
    pub(super) fn jumps_to(&self, target: &str) -> bool {
        self.target.as_deref() == Some(target)
    }

    /// Whether no packet gets past it alive.
    pub(super) fn ends_all(&self) -> bool {
        let all = self.source == Side::Any && self.destination == Side::Any && !self.has_more;
        all && (self.jumps_to("DROP") || self.jumps_to("REJECT"))
    }
}

/// Splits at spaces, but for those in double quotes; a backslash there takes the next letter as it is.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let (mut quoted, mut begun) = (false, false);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '"' => {
                quoted = !quoted;
                begun = true;
            }
            '\\' if quoted => word.extend(letters.next()),
            ' ' if !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            other => {
                word.push(other);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_rule_is_read() {
        let line = "-A POSTROUTING -s 10.0.0.0/8 ! -d 224.0.0.0/4 -m comment --comment \"it says \\\"no\\\" -j\" -j MASQUERADE --random-fully";
        let rule = Rule::parse(line).unwrap();
        assert_eq!(rule.chain, "POSTROUTING");
        assert_eq!(rule.source, Side::In("10.0.0.0/8".to_owned()));
        assert!(rule.destination.is_not("224.0.0.0/4"));
        assert_eq!(rule.comment.as_deref(), Some("it says \"no\" -j"));
        assert!(rule.jumps_to("MASQUERADE") && !rule.has_more);
        assert_eq!(format!("-A POSTROUTING {}", rule.spec), line);
        assert_eq!(Rule::parse("-P FORWARD DROP"), None);
        assert_eq!(Rule::parse("-N DOCKER"), None);
    }

    #[test]
    fn only_a_rule_for_everything_ends_all() {
        for (line, ends) in [
            ("-A FORWARD -j DROP", true),
            (
                "-A FORWARD -m comment --comment x -j REJECT --reject-with icmp-host-prohibited",
                true,
            ),
            ("-A FORWARD -i eth0 -j DROP", false),
            ("-A FORWARD ! -s 10.0.0.0/8 -j DROP", false),
            ("-A FORWARD -m conntrack --ctstate INVALID -j DROP", false),
            ("-A FORWARD -j ACCEPT", false),
            ("-A FORWARD", false),
        ] {
            assert_eq!(Rule::parse(line).unwrap().ends_all(), ends, "{line}");
        }
    }
}
