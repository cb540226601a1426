//! Who may do what: an access file.
//!
//! ```toml
//! [[allow]]
//! certificate = "*.nodes.example"      # a name in the client's certificate: common name, DNS or URI name; * is one label
//! networks = ["_", "blue"]             # "_" is the network without a name, "*" all of them
//! right = "lease"
//!
//! [[allow]]
//! token = "…"                          # or token-sha256 = "hex", so that the file holds no secret
//! networks = ["*"]
//! right = "admin"
//!
//! [[allow]]
//! anonymous = true                     # whoever can connect
//! networks = ["_"]
//! right = "read"
//! ```
//!
//! or the same as JSON. `leases-per-address = 500`, before the entries, is the bound of `quota`. `read` is config, leases and their watches; `lease` also takes and renews leases; `admin` also ends
//! leases, and makes and ends reservations. What a client may do is the most that any entry that fits it says. With a file,
//! what no entry allows is refused. The file is read again when it changes; a file that is no good changes nothing.
//!
//! Without a file flannel's nodes can do what they always could: `read` and `lease` for whoever can connect. `admin`, which no
//! flannel daemon uses, is then for clients with a verified certificate and for this machine.
//!
//! Tokens are compared as keyed hashes of their hashes, all of them each time: how long it takes tells nothing about them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hmac::{Hmac, Mac};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::quota::LEASES_PER_ADDRESS;
use crate::trust::names::Name;
use crate::trust::reload::Reload;
use crate::trust::{TrustError, read_text, warn_if_exposed};

/// The name of the network without a name.
pub(super) const UNNAMED: &str = "_";
/// Stands for all networks.
const ALL: &str = "*";
/// The shortest token: 16 of the characters that `openssl rand -hex` makes are 64 bits.
const SHORTEST_TOKEN: usize = 16;

/// What a client may do; each includes those before it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub(super) enum Right {
    /// Config, leases, watches.
    Read,
    /// Take and renew leases.
    Lease,
    /// End leases, make and end reservations.
    Admin,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Peer {
    /// Its address; none for a process on this machine that came by a unix socket.
    pub(super) address: Option<IpAddr>,
    /// The names in its certificate, which was verified; `None` without one.
    pub(super) certificate: Option<Vec<Name>>,
    /// Whether the connection is encrypted, or needs not be.
    pub(super) is_private: bool,
}

impl Peer {
    fn is_local(&self) -> bool {
        self.address.is_none_or(|address| address.is_loopback())
    }
}

/// Why something is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denial {
    /// It is not known who asks.
    Unknown,
    /// It is known, and may not.
    NotAllowed,
    /// There is no file, and this takes more than to be there.
    NoFile,
}

/// The rules in force.
#[derive(Debug)]
pub(super) enum Access {
    /// Those without a file.
    ByPlace,
    /// A file's.
    ByFile(Reload<Rules>),
}

impl Access {
    /// Reads the file, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is no good.
    pub(super) fn open(file: Option<&Path>) -> Result<Self, TrustError> {
        let Some(file) = file else {
            return Ok(Self::ByPlace);
        };
        let path = file.to_owned();
        let load = move || {
            let text = read_text(&path)?;
            let rules = Rules::parse(&text).map_err(|problem| TrustError::Content {
                path: path.clone(),
                problem,
            })?;
            if rules.has_open_tokens {
                warn_if_exposed(&path);
            }
            Ok(rules)
        };
        Ok(Self::ByFile(Reload::open(
            "access file",
            vec![PathBuf::from(file)],
            load,
        )?))
    }

    /// What `peer`, who sent `token`, may do. Who it is, is found out here, once a request.
    pub(super) fn grants(&self, peer: &Peer, token: Option<&str>) -> Grants {
        match self {
            Self::ByPlace => Grants::ByPlace {
                admin: peer.certificate.is_some() || peer.is_local(),
            },
            Self::ByFile(rules) => Grants::ByFile(Rules::grants(&rules.current(), peer, token)),
        }
    }

    /// How many leases one address may take for others in one network.
    pub(super) fn leases_per_address(&self) -> usize {
        match self {
            Self::ByPlace => LEASES_PER_ADDRESS,
            Self::ByFile(rules) => rules.current().leases_per_address,
        }
    }

    /// Whether tokens are among the rules.
    pub(super) fn knows_tokens(&self) -> bool {
        match self {
            Self::ByPlace => false,
            Self::ByFile(rules) => rules
                .current()
                .allow
                .iter()
                .any(|rule| matches!(rule.who, Who::Token(_))),
        }
    }
}

/// What one client may do.
#[derive(Debug)]
pub(super) enum Grants {
    /// There is no file.
    ByPlace {
        /// Whether it may do everything.
        admin: bool,
    },
    /// A file says so.
    ByFile(Granted),
}

impl Grants {
    /// Whether that includes `right` in `network`.
    pub(super) fn check(&self, network: &str, right: Right) -> Result<(), Denial> {
        match self {
            Self::ByPlace { admin } if *admin || right < Right::Admin => Ok(()),
            Self::ByPlace { .. } => Err(Denial::NoFile),
            Self::ByFile(granted) => granted.check(network, right),
        }
    }

    /// Whether that includes to read any network at all.
    pub(super) fn check_any(&self) -> Result<(), Denial> {
        match self {
            Self::ByPlace { .. } => Ok(()),
            // Every entry names a network, and no right is less than to read.
            Self::ByFile(granted) if !granted.fitting.is_empty() => Ok(()),
            Self::ByFile(granted) => Err(granted.denial()),
        }
    }
}

/// The entries of an access file that fit one client.
#[derive(Debug)]
pub(super) struct Granted {
    rules: Arc<Rules>,
    /// Their indices.
    fitting: Vec<usize>,
    /// Whether one of them is by its name or token.
    known: bool,
}

impl Granted {
    fn check(&self, network: &str, right: Right) -> Result<(), Denial> {
        let mut fitting = self
            .fitting
            .iter()
            .filter_map(|&index| self.rules.allow.get(index));
        let allows = |rule: &Rule| {
            rule.right >= right && (rule.networks.contains(ALL) || rule.networks.contains(network))
        };
        if fitting.any(allows) {
            return Ok(());
        }
        Err(self.denial())
    }

    fn denial(&self) -> Denial {
        if self.known {
            Denial::NotAllowed
        } else {
            Denial::Unknown
        }
    }
}

/// A hash that only this process can make; comparing two takes constant time.
type Seal = hmac::digest::CtOutput<Hmac<Sha256>>;

/// An access file, as read.
pub(super) struct Rules {
    allow: Vec<Rule>,
    /// What tokens' hashes are hashed with; drawn when the file is read.
    key: [u8; 64],
    has_open_tokens: bool,
    leases_per_address: usize,
}

impl std::fmt::Debug for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rules")
            .field("entries", &self.allow.len())
            .finish_non_exhaustive()
    }
}

struct Rule {
    who: Who,
    networks: BTreeSet<String>,
    right: Right,
}

enum Who {
    Certificate(String),
    Token(Seal),
    Anonymous,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// See [`quota`](super::quota).
    #[serde(rename = "leases-per-address")]
    leases_per_address: Option<usize>,
    allow: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    certificate: Option<String>,
    token: Option<String>,
    token_sha256: Option<String>,
    #[serde(default)]
    anonymous: bool,
    networks: BTreeSet<String>,
    right: Right,
}

impl Rules {
    fn parse(text: &str) -> Result<Self, String> {
        // No error may quote a line: it could hold a token.
        let file: File = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| {
                format!(
                    "line {}, column {}: {}",
                    error.line(),
                    error.column(),
                    what(&error)
                )
            })?
        } else {
            toml::from_str(text).map_err(|error| match error.span() {
                Some(span) => {
                    let line = text
                        .get(..span.start)
                        .map_or(0, |before| before.matches('\n').count());
                    format!("line {}: {}", line + 1, error.message())
                }
                None => error.message().to_owned(),
            })?
        };
        let key = rand::random();
        let mut has_open_tokens = false;
        let mut allow = Vec::new();
        for (index, entry) in file.allow.into_iter().enumerate() {
            has_open_tokens |= entry.token.is_some();
            allow.push(
                entry
                    .into_rule(&key)
                    .map_err(|problem| format!("entry {} of allow: {problem}", index + 1))?,
            );
        }
        if allow.is_empty() {
            return Err("allow has no entry, so nobody could do anything".to_owned());
        }
        Ok(Self {
            allow,
            key,
            has_open_tokens,
            leases_per_address: file.leases_per_address.unwrap_or(LEASES_PER_ADDRESS),
        })
    }

    fn grants(self: &Arc<Self>, peer: &Peer, token: Option<&str>) -> Granted {
        let presented = token.map(|token| seal(&self.key, &Sha256::digest(token.as_bytes()).into()));
        let (mut fitting, mut known) = (Vec::new(), false);
        for (index, rule) in self.allow.iter().enumerate() {
            let fits = match &rule.who {
                Who::Anonymous => true,
                Who::Certificate(pattern) => {
                    let mut names = peer.certificate.iter().flatten();
                    let fits = names.any(|name| matches(pattern, name));
                    known |= fits;
                    fits
                }
                Who::Token(digest) => {
                    // No shortcut: each is compared, by a comparison that takes the same time whatever it finds.
                    let fits = presented.as_ref().is_some_and(|presented| presented == digest);
                    known |= fits;
                    fits
                }
            };
            if fits {
                fitting.push(index);
            }
        }
        Granted {
            rules: Arc::clone(self),
            fitting,
            known,
        }
    }
}

fn seal(key: &[u8; 64], digest: &[u8; 32]) -> Seal {
    let mut mac = Hmac::<Sha256>::new(key.into());
    mac.update(digest);
    mac.finalize()
}

impl Entry {
    fn into_rule(self, key: &[u8; 64]) -> Result<Rule, String> {
        let who = match (self.certificate, self.token, self.token_sha256, self.anonymous) {
            (Some(name), None, None, false) => {
                let stars = name.matches('*').count();
                if name.is_empty() || stars > 1 || (stars == 1 && !name.starts_with("*.")) {
                    return Err(format!(
                        "certificate is {name:?}: must be a name, or *. and the rest of one"
                    ));
                }
                Who::Certificate(name)
            }
            (None, Some(token), None, false) => {
                if token.len() < SHORTEST_TOKEN {
                    return Err(format!("token must have at least {SHORTEST_TOKEN} characters"));
                }
                Who::Token(seal(key, &Sha256::digest(token.as_bytes()).into()))
            }
            (None, None, Some(digest), false) => {
                let digest = from_hex(&digest).ok_or("token-sha256 must be 64 hexadecimal digits")?;
                Who::Token(seal(key, &digest))
            }
            (None, None, None, true) => Who::Anonymous,
            (_, _, _, _) => {
                return Err(
                    "needs exactly one of certificate, token, token-sha256 and anonymous = true".to_owned(),
                );
            }
        };
        if self.networks.is_empty() {
            return Err("networks is empty; \"_\" is the network without a name, \"*\" all".to_owned());
        }
        Ok(Rule {
            who,
            networks: self.networks,
            right: self.right,
        })
    }
}

/// What is wrong, without the text that serde_json quotes.
fn what(error: &serde_json::Error) -> &'static str {
    match error.classify() {
        serde_json::error::Category::Data => {
            "a field is unknown, missing or of the wrong kind; see docs/server.md"
        }
        serde_json::error::Category::Io
        | serde_json::error::Category::Syntax
        | serde_json::error::Category::Eof => "not valid JSON",
    }
}

/// Whether a pattern stands for a name. Without a star it is the name itself, of any kind; of a DNS name, and of a common name, in any
/// case. `*.` stands for the first label of such a name, if that is one: letters, digits and `-`. So no path or other text that ends
/// like one of our names passes for it.
fn matches(pattern: &str, name: &Name) -> bool {
    let name = match name {
        Name::Uri(uri) => return pattern == uri,
        Name::Common(name) | Name::Dns(name) => name,
    };
    let Some(wanted) = pattern.strip_prefix("*.") else {
        return pattern.eq_ignore_ascii_case(name);
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.split_once('.')
        .is_some_and(|(label, rest)| is_label(label) && wanted.eq_ignore_ascii_case(rest))
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(index * 2..index * 2 + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
        [[allow]]
        certificate = "*.nodes.example"
        networks = ["_"]
        right = "lease"

        [[allow]]
        token = "0123456789abcdef"
        networks = ["*"]
        right = "admin"

        [[allow]]
        anonymous = true
        networks = ["open"]
        right = "read"
    "#;

    #[test]
    fn each_gets_what_its_entries_say_and_no_more() {
        let rules = Arc::new(Rules::parse(FILE).unwrap());
        let node = peer(Some("a.nodes.example"));
        let stranger = peer(Some("a.elsewhere.example"));
        let nobody = peer(None);
        let token = Some("0123456789abcdef");
        for (who, peer, token, network, right, expected) in [
            ("a node", &node, None, "_", Right::Lease, Ok(())),
            ("a node", &node, None, "_", Right::Admin, Err(Denial::NotAllowed)),
            (
                "a node",
                &node,
                None,
                "blue",
                Right::Read,
                Err(Denial::NotAllowed),
            ),
            ("a node with a token", &node, token, "blue", Right::Admin, Ok(())),
            (
                "a stranger",
                &stranger,
                None,
                "_",
                Right::Read,
                Err(Denial::Unknown),
            ),
            ("a stranger", &stranger, None, "open", Right::Read, Ok(())),
            ("nobody", &nobody, None, "open", Right::Read, Ok(())),
            (
                "nobody",
                &nobody,
                None,
                "open",
                Right::Lease,
                Err(Denial::Unknown),
            ),
            (
                "a wrong token",
                &nobody,
                Some("0123456789abcdeF"),
                "_",
                Right::Read,
                Err(Denial::Unknown),
            ),
            (
                "a long token",
                &nobody,
                Some("0123456789abcdef0"),
                "_",
                Right::Read,
                Err(Denial::Unknown),
            ),
            ("the token", &nobody, token, "_", Right::Admin, Ok(())),
        ] {
            assert_eq!(
                Rules::grants(&rules, peer, token).check(network, right),
                expected,
                "{who}: {network} {right:?}"
            );
        }
    }

    #[test]
    fn a_token_can_be_given_by_its_hash_and_a_file_as_json() {
        // printf 0123456789abcdef | sha256sum
        let digest = "9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f";
        let text = format!(r#"{{"allow":[{{"token-sha256":"{digest}","networks":["_"],"right":"read"}}]}}"#);
        let rules = Arc::new(Rules::parse(&text).unwrap());
        assert!(!rules.has_open_tokens);
        assert_eq!(
            Rules::grants(&rules, &peer(None), Some("0123456789abcdef")).check("_", Right::Read),
            Ok(())
        );
        assert_eq!(
            Rules::grants(&rules, &peer(None), Some(digest)).check("_", Right::Read),
            Err(Denial::Unknown)
        );
    }

    #[test]
    fn files_that_say_something_else_are_refused_and_no_secret_is_quoted() {
        for (case, text, expected) in [
            ("nothing", "", "allow"),
            ("no entry", "allow = []", "no entry"),
            (
                "two of a kind",
                "[[allow]]\ncertificate='a'\nanonymous=true\nnetworks=['_']\nright='read'",
                "exactly one",
            ),
            ("nobody", "[[allow]]\nnetworks=['_']\nright='read'", "exactly one"),
            (
                "a short token",
                "[[allow]]\ntoken='s3cret'\nnetworks=['_']\nright='read'",
                "at least 16",
            ),
            (
                "no hash",
                "[[allow]]\ntoken-sha256='s3cret'\nnetworks=['_']\nright='read'",
                "64 hexadecimal",
            ),
            (
                "a star inside",
                "[[allow]]\ncertificate='a*'\nnetworks=['_']\nright='read'",
                "must be a name",
            ),
            (
                "no networks",
                "[[allow]]\nanonymous=true\nnetworks=[]\nright='read'",
                "networks is empty",
            ),
            (
                "an unknown right",
                "[[allow]]\nanonymous=true\nnetworks=['_']\nright='write'",
                "write",
            ),
            (
                "an unknown field",
                "[[allow]]\nanonymus=true\nnetworks=['_']\nright='read'",
                "anonymus",
            ),
            ("broken TOML", "[[allow]]\ntoken = 's3cret", "line 2"),
            ("broken JSON", r#"{"allow":[{"token":"s3cret""#, "not valid JSON"),
            (
                "JSON of another kind",
                r#"{"allow":[{"token":["s3cret"],"networks":["_"],"right":"read"}]}"#,
                "see docs",
            ),
        ] {
            let error = Rules::parse(text).err().unwrap_or_else(|| panic!("{case}"));
            assert!(error.contains(expected), "{case}: {error}");
            assert!(!error.contains("s3cret"), "{case}: {error}");
        }
    }

    #[test]
    fn without_a_file_nodes_do_what_they_always_could() {
        let access = Access::open(None).unwrap();
        let far = peer(None);
        assert_eq!(access.grants(&far, None).check("_", Right::Lease), Ok(()));
        assert_eq!(
            access.grants(&far, None).check("_", Right::Admin),
            Err(Denial::NoFile)
        );
        assert_eq!(
            access.grants(&peer(Some("a")), None).check("_", Right::Admin),
            Ok(())
        );
        for address in [
            None,
            Some("127.0.0.2".parse().unwrap()),
            Some("::1".parse().unwrap()),
        ] {
            let near = Peer {
                address,
                ..far.clone()
            };
            assert_eq!(
                access.grants(&near, None).check("_", Right::Admin),
                Ok(()),
                "{address:?}"
            );
        }
    }

    #[test]
    fn a_star_stands_for_one_label_of_a_name_and_for_nothing_else() {
        let (common, dns, uri) = (
            |name: &str| Name::Common(name.to_owned()),
            |name: &str| Name::Dns(name.to_owned()),
            |name: &str| Name::Uri(name.to_owned()),
        );
        for (pattern, name, fits) in [
            ("a.example", dns("A.Example"), true),
            ("*.example", dns("a.example"), true),
            ("*.example", common("node-7.Example"), true),
            ("*.example", dns("a.b.example"), false),
            ("*.example", dns(".example"), false),
            ("*.example", dns("example"), false),
            ("*.example", dns("*.example"), false),
            ("spiffe://x/y", uri("spiffe://x/y"), true),
            ("spiffe://x/y", uri("spiffe://x/Y"), false),
            ("*.nodes.example", uri("spiffe://x.nodes.example"), false),
            ("*.nodes.example", common("any/thing.nodes.example"), false),
            ("*.nodes.example", common("any thing.nodes.example"), false),
            ("*.nodes.example", common("any_thing.nodes.example"), false),
            ("Any thing, Inc.", common("Any thing, Inc."), true),
        ] {
            assert_eq!(matches(pattern, &name), fits, "{pattern} {name:?}");
        }
    }

    /// Two thousand entries for fifty networks each: were a token hashed for each, this would take minutes.
    #[test]
    fn a_request_costs_one_hash_however_long_the_file_is() {
        let key = [7; 64];
        let allow = (0..2_000).map(|number: u32| Rule {
            who: Who::Token(seal(&key, &Sha256::digest(number.to_be_bytes()).into())),
            networks: (0..50).map(|network| format!("{number}-{network}")).collect(),
            right: Right::Read,
        });
        let rules = Arc::new(Rules {
            allow: allow.collect(),
            key,
            has_open_tokens: false,
            leases_per_address: LEASES_PER_ADDRESS,
        });
        let access = |token| Grants::ByFile(Rules::grants(&rules, &peer(None), Some(token)));
        for _ in 0..20 {
            assert_eq!(access("wrong").check_any(), Err(Denial::Unknown));
            assert_eq!(access("wrong").check("1-1", Right::Read), Err(Denial::Unknown));
        }
        let right = access("\0\0\0\u{1}");
        assert_eq!(right.check_any(), Ok(()));
        assert_eq!(right.check("1-1", Right::Read), Ok(()));
        assert_eq!(right.check("2-1", Right::Read), Err(Denial::NotAllowed));
    }

    fn peer(name: Option<&str>) -> Peer {
        Peer {
            address: Some("192.0.2.1".parse().unwrap()),
            certificate: name.map(|name| vec![Name::Dns(name.to_owned())]),
            is_private: true,
        }
    }
}
