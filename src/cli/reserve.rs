//! `kersey reserve`: subnets bound to nodes for good, listed, added and removed.
//!
//! A reservation is a lease without an end. In etcd that is flannel's key without an etcd lease, so what is reserved
//! here holds for flanneld as well, as far as flanneld keeps to it.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::go_flags::parse_bool;
use super::http::{AskingArgs, CertificateArgs};
use super::store::{EtcdArgs, OwnStoreArgs, Serving, servers, store_options};
use super::{UsageError, exit};
use crate::addr::{Ipv4Prefix, Ipv6Prefix, NetworkName};
use crate::control::config::NetworkConfig;
use crate::control::store::etcd::Expirations;
use crate::control::store::{self, OpenError, Store, StoreError};
use crate::lease::{Expiration, Lease, LeaseAttrs, Subnet};
use crate::options::{ReserveAction, ReserveOptions, ServerAddress, StatusForm, StoreKind};

/// Bind subnets to nodes for good, whatever their leases do
///
/// kersey reserve [list] prints the reservations. kersey reserve add SUBNET PUBLIC-IP binds a free subnet, or the one
/// that node holds, to the node with that public address; when it next joins the network it gets no other, and nobody
/// else gets this one. kersey reserve remove SUBNET makes an ordinary lease of it, which ends unless its node renews it. A subnet is written
/// 10.1.3.0/24, with two families 10.1.3.0/24,fd00:1:2:3::/64, or as its key in etcd. The words come before the flags.
///
/// The store is etcd, a server's (--remote), or the file of a server that is not running (--embedded).
#[derive(Debug, clap::Args)]
#[command(override_usage = "kersey reserve [list | add SUBNET PUBLIC-IP | remove SUBNET] [OPTIONS]")]
pub(super) struct ReserveArgs {
    /// Print JSON
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool, help_heading = "Options")]
    json: bool,
    /// Ask these servers, comma-separated, the first that answers
    #[arg(long, value_name = "HOST:PORT,...", value_parser = remote_servers, help_heading = "Options")]
    remote: Option<Remote>,
    #[command(flatten)]
    certificates: CertificateArgs,
    #[command(flatten)]
    asking: AskingArgs,
    /// Use the embedded store in --data-dir; its server must not be running
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool, help_heading = "Options")]
    embedded: bool,
    /// The network meant, if the store has several
    #[arg(long, value_name = "NAME", value_parser = network_name, help_heading = "Options")]
    network: Option<NetworkName>,
    #[command(flatten)]
    own: OwnStoreArgs,
    #[command(flatten)]
    etcd: EtcdArgs,
}

/// Servers as one value.
#[derive(Clone, Debug)]
struct Remote(Vec<ServerAddress>);

fn remote_servers(text: &str) -> Result<Remote, String> {
    servers(text).map(Remote)
}

fn network_name(text: &str) -> Result<NetworkName, String> {
    text.parse()
        .map_err(|error: <NetworkName as std::str::FromStr>::Err| error.to_string())
}

impl ReserveArgs {
    pub(super) fn into_options(self, words: &[String]) -> Result<ReserveOptions, UsageError> {
        let serving = if self.embedded { Serving::Yes } else { Serving::No };
        if self.embedded && self.remote.is_some() {
            return Err(UsageError::new(
                "--embedded and --remote exclude each other",
                "while the server of an embedded store runs, ask it: --remote HOST:PORT",
            ));
        }
        let action = action(words)?;
        let remote = match self.remote {
            Some(Remote(servers)) => Some(self.asking.into_options(servers, self.certificates)?),
            None => None,
        };
        Ok(ReserveOptions {
            action,
            store: store_options(self.etcd, &self.own, remote, serving)?,
            lease_ttl: self.own.lease_ttl,
            network: self.network,
            form: if self.json {
                StatusForm::Json
            } else {
                StatusForm::Table
            },
        })
    }
}

/// The error of a command line that names what to do behind its flags, where it is no more than an unexpected word.
pub(super) fn late_word(words: &[String], flags: &[String]) -> Option<UsageError> {
    let is_verb = |word: &&String| ["list", "add", "remove"].contains(&word.as_str());
    let late = flags.iter().find(is_verb).filter(|_| words.is_empty())?;
    Some(UsageError::new(
        format!("{late} stands behind a flag"),
        format!("words come before the flags: kersey reserve {late} ... --name=value"),
    ))
}

fn action(words: &[String]) -> Result<ReserveAction, UsageError> {
    const USAGE: &str = "kersey reserve [list], kersey reserve add SUBNET PUBLIC-IP, or kersey reserve remove SUBNET; \
                         flags come after that";
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] | ["list"] => Ok(ReserveAction::List),
        ["add", subnet, public_ip] => Ok(ReserveAction::Add {
            subnet: parse_subnet(subnet)?,
            public_ip: public_ip.parse().map_err(|_| {
                UsageError::new(
                    format!("invalid value {public_ip:?} for PUBLIC-IP"),
                    "expected an IP address, such as 192.0.2.7",
                )
            })?,
        }),
        ["remove", subnet] => Ok(ReserveAction::Remove {
            subnet: parse_subnet(subnet)?,
        }),
        [other, ..] => Err(UsageError::new(
            match words.len() - 1 {
                0 => format!("cannot make sense of kersey reserve {other} with nothing after it"),
                1 => format!("cannot make sense of kersey reserve {other} with 1 word after it"),
                more => format!("cannot make sense of kersey reserve {other} with {more} words after it"),
            },
            USAGE,
        )),
    }
}

/// Reads `10.1.3.0/24`, `10.1.3.0/24,fd00::/64`, or flannel's key.
fn parse_subnet(text: &str) -> Result<Subnet, UsageError> {
    let read = || -> Option<Subnet> {
        if let Ok(subnet) = text.parse() {
            return Some(subnet);
        }
        let (v4, v6) = match text.split_once(',') {
            Some((v4, v6)) => (v4, Some(v6)),
            None if text.contains(':') => ("", Some(text)),
            None => (text, None),
        };
        let v4: Ipv4Prefix = if v4.is_empty() {
            Subnet::NO_V4
        } else {
            v4.parse().ok()?
        };
        let v6: Option<Ipv6Prefix> = v6.map(str::parse).transpose().ok()?;
        let subnet = Subnet { v4, v6 };
        // Parsing a prefix takes its host bits off, and what was meant is not known then.
        if !text.split(',').all(without_host_bits) {
            return None;
        }
        // What has no key is no subnet of a lease.
        subnet.to_string().parse().ok()
    };
    read().ok_or_else(|| {
        UsageError::new(
            format!("invalid value {text:?} for SUBNET"),
            "expected a subnet without host bits, such as 10.1.3.0/24 or 10.1.3.0/24,fd00:1:2:3::/64",
        )
    })
}

fn without_host_bits(prefix: &str) -> bool {
    let addr = prefix
        .split('/')
        .next()
        .and_then(|addr| addr.parse::<IpAddr>().ok());
    match addr {
        Some(IpAddr::V4(addr)) => prefix
            .parse()
            .is_ok_and(|parsed: Ipv4Prefix| parsed.addr() == addr),
        Some(IpAddr::V6(addr)) => prefix
            .parse()
            .is_ok_and(|parsed: Ipv6Prefix| parsed.addr() == addr),
        None => false,
    }
}

/// Does it, and prints what came of it.
pub fn run(options: &ReserveOptions) -> ExitCode {
    let done = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ReserveError::Runtime)
        .and_then(|runtime| runtime.block_on(carry_out(options)));
    match done {
        Ok(text) => {
            // Nobody is left to tell when the terminal is gone; the same goes for the error below.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::from(exit::OK)
        }
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: {error}");
            if let Some(hint) = error.hint(options) {
                let _ = writeln!(io::stderr(), "  hint: {hint}");
            }
            ExitCode::from(exit::FAILED)
        }
    }
}

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
enum ReserveError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("there is no store: {} does not exist", .0.display())]
    NoFile(PathBuf),
    #[error("{public_ip} has {subnet} reserved already")]
    HasOne { public_ip: IpAddr, subnet: String },
    #[error("{subnet} is not reserved, but an ordinary lease")]
    NotReserved { subnet: String },
}

impl ReserveError {
    fn hint(&self, options: &ReserveOptions) -> Option<&'static str> {
        match (self, &options.store.kind) {
            (Self::Open(OpenError::Store(_)), StoreKind::Embedded(_)) => {
                Some("while its server runs, a store belongs to it: ask it with --remote HOST:PORT")
            }
            (Self::NoFile(_), _) => Some("name the server's directory with --data-dir"),
            (Self::HasOne { .. }, _) => {
                Some("a node has one at a time: kersey reserve remove that one first")
            }
            (Self::Store(StoreError::Unavailable { .. }), StoreKind::Etcd(_)) => {
                Some("name the store with --etcd-endpoints, --remote or --embedded")
            }
            _ => None,
        }
    }
}

async fn carry_out(options: &ReserveOptions) -> Result<String, ReserveError> {
    if let StoreKind::Embedded(embedded) = &options.store.kind {
        let file = store::embedded_file(&embedded.data_dir);
        // What cannot be looked at, opening it says better.
        if embedded.network_configs.is_empty() && matches!(file.try_exists(), Ok(false)) {
            return Err(ReserveError::NoFile(file));
        }
    }
    let networks = store::open_networks(&options.store.kind, options.lease_ttl, Expirations::Assume).await?;
    let store = &*networks.open(options.network.as_ref())?;
    match options.action {
        ReserveAction::List => {
            // Of a network that is not there nothing is reserved, and that is not what was asked.
            store.config().await?;
            let mut leases = store::leases(store).await?;
            leases.retain(|lease| lease.expiration == Expiration::Never);
            leases.sort_by_key(|lease| lease.subnet);
            Ok(match options.form {
                StatusForm::Table => table(&leases),
                StatusForm::Json => as_json(&leases),
            })
        }
        ReserveAction::Add { subnet, public_ip } => {
            let subnet = completed(store, subnet).await?;
            let attrs = node(public_ip);
            let mut others = store::leases(store).await?;
            others.retain(|lease| lease.attrs.same_node(&attrs) && !lease.subnet.overlaps(subnet));
            let reserved = others.iter().find(|lease| lease.expiration == Expiration::Never);
            if let Some(lease) = reserved {
                return Err(ReserveError::HasOne {
                    public_ip,
                    subnet: prefixes(lease.subnet),
                });
            }
            store.reserve(subnet, &attrs).await?;
            let held = others.first().map(|lease| lease.subnet);
            Ok(reserved_as_told(options.form, subnet, public_ip, held))
        }
        ReserveAction::Remove { subnet } => {
            let subnet = completed(store, subnet).await?;
            let leases = store::leases(store).await?;
            let held = leases.iter().find(|lease| lease.subnet == subnet);
            if held.is_some_and(|lease| lease.expiration != Expiration::Never) {
                return Err(ReserveError::NotReserved {
                    subnet: prefixes(subnet),
                });
            }
            store.unreserve(subnet).await?;
            Ok(released(options.form, subnet))
        }
    }
}

/// The subnet under the name its lease has in the store: who names the IPv4 half of a dual-stack lease means that lease.
async fn completed(store: &dyn Store, subnet: Subnet) -> Result<Subnet, ReserveError> {
    if subnet.v6.is_some() {
        return Ok(subnet);
    }
    let two_families = NetworkConfig::parse(&store.config().await?).is_ok_and(|config| config.v6.is_some());
    if !two_families {
        return Ok(subnet);
    }
    let leases = store::leases(store).await?;
    let held = leases.iter().find(|lease| lease.subnet.v4 == subnet.v4);
    Ok(held.map_or(subnet, |lease| lease.subnet))
}

/// All that a reservation says of its node; the rest the node says itself when it takes it.
fn node(public_ip: IpAddr) -> LeaseAttrs {
    let (public_ip, public_ipv6) = match public_ip {
        IpAddr::V4(addr) => (addr, None),
        IpAddr::V6(addr) => (std::net::Ipv4Addr::UNSPECIFIED, Some(addr)),
    };
    LeaseAttrs {
        public_ip,
        public_ipv6,
        backend_type: String::new(),
        backend_data: None,
        backend_v6_data: None,
    }
}

fn prefixes(subnet: Subnet) -> String {
    let v4 = subnet.ipv4().map(|v4| v4.to_string());
    let v6 = subnet.v6.map(|v6| v6.to_string());
    let both: Vec<String> = v4.into_iter().chain(v6).collect();
    both.join(",")
}

fn address_of(attrs: &LeaseAttrs) -> String {
    attrs
        .address()
        .map_or_else(|| "-".to_owned(), |address| address.to_string())
}

fn table(leases: &[Lease]) -> String {
    if leases.is_empty() {
        return "no subnet is reserved\n".to_owned();
    }
    let rows: Vec<[String; 3]> = leases
        .iter()
        .map(|lease| {
            // What only an operator wrote has no backend yet.
            let backend = match (&lease.attrs.backend_type, &lease.attrs.backend_data) {
                (kind, None) if kind.is_empty() => "-".to_owned(),
                (kind, _) => kind.clone(),
            };
            [
                prefixes(lease.subnet),
                address_of(&lease.attrs),
                harmless(&backend),
            ]
        })
        .collect();
    let mut text = String::new();
    let headings = ["SUBNET", "PUBLIC-IP", "BACKEND"];
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].len());
        cells.chain([headings[column].len()]).max().unwrap_or(0)
    };
    let (first, second) = (width(0), width(1));
    for row in std::iter::once(headings.map(str::to_owned)).chain(rows.clone()) {
        let [subnet, address, backend] = row;
        let line = format!("{subnet:first$}  {address:second$}  {backend}");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// What others wrote goes to a terminal without its control characters.
fn harmless(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(40).collect()
}

fn as_json(leases: &[Lease]) -> String {
    let rows: Vec<_> = leases
        .iter()
        .map(|lease| {
            json!({
                "subnet": prefixes(lease.subnet),
                "public_ip": address_of(&lease.attrs),
                "backend": lease.attrs.backend_type,
            })
        })
        .collect();
    format!("{}\n", serde_json::Value::from(rows))
}

/// `held` is the lease that the node has until it takes this one.
fn reserved_as_told(form: StatusForm, subnet: Subnet, public_ip: IpAddr, held: Option<Subnet>) -> String {
    let (subnet, held) = (prefixes(subnet), held.map(prefixes));
    match (form, held) {
        (StatusForm::Json, held) => {
            let told = json!({ "reserved": { "subnet": subnet, "public_ip": public_ip, "held": held } });
            format!("{told}\n")
        }
        (StatusForm::Table, None) => format!("reserved {subnet} for {public_ip}\n"),
        (StatusForm::Table, Some(held)) => {
            format!(
                "reserved {subnet} for {public_ip}, which has {held} until its kersey next joins the network\n"
            )
        }
    }
}

fn released(form: StatusForm, subnet: Subnet) -> String {
    let subnet = prefixes(subnet);
    match form {
        StatusForm::Json => format!("{}\n", json!({ "released": { "subnet": subnet } })),
        StatusForm::Table => {
            format!("released {subnet}: it is a lease again, and ends unless its node renews it\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn subnets_are_read_in_the_forms_people_have_at_hand() {
        for (text, key) in [
            ("10.1.3.0/24", "10.1.3.0-24"),
            ("10.1.3.0-24", "10.1.3.0-24"),
            ("10.1.3.0/24,fd00:1::/64", "10.1.3.0-24&fd00:1::-64"),
            ("10.1.3.0-24&fd00:1::-64", "10.1.3.0-24&fd00:1::-64"),
            ("fd00:1::/64", "0.0.0.0-0&fd00:1::-64"),
        ] {
            let ReserveAction::Remove { subnet } = action(&words(&format!("remove {text}"))).unwrap() else {
                panic!("{text}")
            };
            assert_eq!(subnet.to_string(), key);
        }
    }

    #[test]
    fn what_to_do_is_found_behind_the_flags() {
        let flags = words("--remote 192.0.2.1:8888 add 10.1.3.0/24 192.0.2.7");
        let error = late_word(&[], &flags).unwrap();
        assert!(error.to_string().contains("kersey reserve add"), "{error}");
        assert!(late_word(&words("add"), &flags).is_none());
        assert!(late_word(&[], &words("--network=add 10.1.3.0/24")).is_none());
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (text, named) in [
            ("add 10.1.3.0/24", "reserve add"),
            ("add 10.1.3.0/24 nobody", "PUBLIC-IP"),
            ("add 10.1.3.7/24 192.0.2.1", "SUBNET"),
            ("add 10.1.3.0/33 192.0.2.1", "SUBNET"),
            ("remove", "reserve remove"),
            ("remove everything", "SUBNET"),
            ("lits", "reserve lits"),
            ("list all", "reserve list"),
        ] {
            let error = action(&words(text)).unwrap_err().to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn the_table_lines_up_and_shows_no_control_characters() {
        let lease = |key: &str, ip: &str, kind: &str| Lease {
            subnet: key.parse().unwrap(),
            attrs: LeaseAttrs {
                backend_type: kind.to_owned(),
                ..node(ip.parse().unwrap())
            },
            expiration: Expiration::Never,
            created: None,
        };
        let leases = [
            lease("10.1.3.0-24", "192.0.2.1", "vxlan\u{1b}[31m"),
            lease("10.1.40.0-24&fd00:1::-64", "192.0.2.100", ""),
        ];
        let shown = table(&leases);
        let expected = "\
SUBNET                    PUBLIC-IP    BACKEND
10.1.3.0/24               192.0.2.1    vxlan[31m
10.1.40.0/24,fd00:1::/64  192.0.2.100  -
";
        assert_eq!(shown, expected);
        assert_eq!(table(&[]), "no subnet is reserved\n");
    }
}
