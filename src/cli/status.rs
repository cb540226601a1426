//! `kersey status`: its flags, and the table it prints.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use super::exit;
use super::go_flags::parse_bool;
use crate::options::{StatusForm, StatusOptions};
use crate::status::{Peer, Status};

/// Where a daemon listens for `kersey status` if nobody says.
pub const DEFAULT_SOCKET: &str = "/run/kersey/status.sock";

/// How long the daemon has to hand over its document.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Show what the daemon on this machine is doing
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Options")]
pub(super) struct StatusArgs {
    /// Print the whole document as JSON
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    json: bool,
    /// The daemon's socket, its --status-socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, alias = "socket")]
    status_socket: PathBuf,
}

impl StatusArgs {
    pub(super) fn into_options(self) -> StatusOptions {
        StatusOptions {
            socket: self.status_socket,
            form: if self.json {
                StatusForm::Json
            } else {
                StatusForm::Table
            },
        }
    }
}

/// Asks the daemon and prints what it says.
pub fn run(options: &StatusOptions) -> ExitCode {
    let (text, status) = match fetch(&options.socket) {
        Ok(answer) => answer,
        Err(error) => {
            let hint = error.hint();
            // Nobody is left to tell when the terminal is gone; the same goes for the table below.
            let _ = writeln!(io::stderr(), "error: {error}\n  hint: {hint}");
            return ExitCode::from(exit::FAILED);
        }
    };
    let shown = match options.form {
        StatusForm::Json => text,
        StatusForm::Table => {
            let on_terminal = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            table(
                &harmless(&status),
                if on_terminal { Colour::On } else { Colour::Off },
            )
        }
    };
    let _ = io::stdout().write_all(shown.as_bytes());
    ExitCode::from(exit::OK)
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// Nobody answers.
    #[error("no daemon answers on {}: {cause}", .path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// Not for this user.
    #[error("cannot open {}: {cause}", .path.display())]
    Forbidden {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The daemon hung, or said something else.
    #[error("the daemon on {} gave no status: {cause}", .path.display())]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// The cause.
        cause: String,
    },
}

impl StatusError {
    fn hint(&self) -> &'static str {
        match self {
            Self::NoDaemon { .. } => "start one with `kersey run`, or name its --status-socket",
            Self::Forbidden { .. } => "only root and the socket's group may ask; try sudo",
            Self::Garbled { .. } => "look at the daemon's log; is it of the same version?",
        }
    }
}

/// Reads the document at `socket`, as text and as data.
///
/// # Errors
/// Nobody answers, or not with a status document.
pub fn fetch(socket: &Path) -> Result<(String, Status), StatusError> {
    let path = socket.to_owned();
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(cause) if cause.kind() == io::ErrorKind::PermissionDenied => {
            return Err(StatusError::Forbidden { path, cause });
        }
        Err(cause) => return Err(StatusError::NoDaemon { path, cause }),
    };
    let mut text = String::new();
    let read = stream
        .set_read_timeout(Some(TIMEOUT))
        .and_then(|()| stream.read_to_string(&mut text));
    if let Err(error) = read {
        let cause = error.to_string();
        return Err(StatusError::Garbled { path, cause });
    }
    match serde_json::from_str(&text) {
        Ok(status) => Ok((text, status)),
        Err(error) => {
            let cause = error.to_string();
            Err(StatusError::Garbled { path, cause })
        }
    }
}

/// Whether escape sequences may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Colour {
    On,
    Off,
}

impl Colour {
    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::On => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Off => text.to_owned(),
        }
    }
}

/// What a daemon says of a peer's kernel route that is in place.
const INSTALLED: &str = "installed";

const BOLD: &str = "1";
const GREEN: &str = "32";
const RED: &str = "31";

/// The status as a text of at most a hundred columns, if names are not very long.
fn table(status: &Status, colour: Colour) -> String {
    let mut out = String::new();
    push(
        &mut out,
        &format!(
            "kersey {}, {}, up {}",
            status.version,
            readiness(status, colour),
            duration(status.uptime_s)
        ),
    );
    out.push('\n');
    let Some(networks) = &status.networks else {
        if let Some(problem) = &status.problem {
            push(&mut out, problem);
        }
        network(&mut out, colour, status);
        return out;
    };
    row(&mut out, colour, "store", &status.store.place);
    let count = match networks.len() {
        0 => "none".to_owned(),
        count => count.to_string(),
    };
    row(&mut out, colour, "networks", &count);
    for (name, status) in networks {
        let name = colour.paint(BOLD, &format!("network {name}"));
        push(&mut out, &format!("\n{name}, {}", readiness(status, colour)));
        if let Some(problem) = &status.problem {
            push(&mut out, problem);
        }
        // One that never came up has nothing else to tell.
        if !status.node.interface.is_empty() {
            network(&mut out, colour, status);
        }
    }
    out
}

fn readiness(status: &Status, colour: Colour) -> String {
    if status.ready {
        colour.paint(GREEN, "ready")
    } else {
        colour.paint(RED, "not ready")
    }
}

/// What there is to say of one network.
fn network(out: &mut String, colour: Colour, status: &Status) {
    // Before there is a lease there is a store, and nothing is known of it but what `problem` says.
    if status.backend.name.is_empty() {
        row(out, colour, "store", &status.store.place);
        return;
    }
    let node = &status.node;
    let mut line = format!("{} in {}", or_none(&node.subnets), or_none(&node.networks));
    let _ = write!(line, " · {} {}", node.interface, node.public_ips.join(" "));
    let _ = write!(line, " · MTU {}", node.inner_mtu);
    if node.inner_mtu != node.link_mtu {
        let _ = write!(line, " (link {})", node.link_mtu);
    }
    row(out, colour, "node", &line);

    let backend = &status.backend;
    let mut line = backend.name.clone();
    for (what, number) in [("VNI", backend.vni), ("port", backend.port.map(u32::from))] {
        if let Some(number) = number {
            let _ = write!(line, " {what} {number}");
        }
    }
    let _ = write!(line, ": {}", backend.reason);
    if !backend.ingress_check.is_empty() {
        let _ = write!(line, " · ingress check {}", backend.ingress_check);
    }
    row(out, colour, "backend", &line);

    let store = &status.store;
    let state = if store.connected {
        colour.paint(GREEN, "connected")
    } else {
        colour.paint(RED, "away")
    };
    row(
        out,
        colour,
        "store",
        &format!("{} · {state} for {}", store.place, duration(store.since_s)),
    );
    if let Some(error) = &store.error {
        row(out, colour, "", error);
    }
    if store.resets > 0 {
        let times = store.resets;
        row(
            out,
            colour,
            "",
            &format!("was wiped, restored or exchanged: {times} times"),
        );
    }
    if !status.firewall.is_empty() {
        row(out, colour, "firewall", &status.firewall);
    }

    let device = &status.device;
    if device.is_absent() {
        plain_peers(out, colour, &status.peers);
    } else {
        tunnel(out, colour, status);
    }
    counts(out, colour, "drops", status.drops.iter());
    counts(out, colour, "leases refused", status.rejected_leases.iter());
}

/// The device, and the peers behind it with their traffic.
fn tunnel(out: &mut String, colour: Colour, status: &Status) {
    let device = &status.device;
    let line = format!(
        "{} · {} · {}",
        device.name,
        counted(device.queues, "queue"),
        counted(device.threads, "thread")
    );
    row(out, colour, "device", &line);
    let offloads: Vec<String> = device
        .offloads
        .iter()
        .map(|(name, state)| format!("{name} {state}"))
        .collect();
    if !offloads.is_empty() {
        row(out, colour, "offloads", &offloads.join(" · "));
    }
    if !heading(out, colour, &status.peers) {
        return;
    }
    let header = [
        "subnet",
        "endpoint",
        "packets out",
        "bytes",
        "packets in",
        "bytes",
        "drops",
    ]
    .map(str::to_owned);
    let mut rows = vec![header];
    for peer in &status.peers {
        let mut endpoints = or_none(&peer.endpoints);
        if let Some(route) = &peer.kernel_route {
            let _ = match route.as_str() {
                INSTALLED => write!(endpoints, ", direct"),
                _ => write!(endpoints, ", not direct"),
            };
        }
        if let Some(mtu) = peer.narrow_mtu {
            let _ = write!(endpoints, ", MTU {mtu}");
        }
        rows.push([
            or_none(&peer.subnets),
            endpoints,
            count(peer.outbound_packets),
            bytes(peer.outbound_bytes),
            count(peer.inbound_packets),
            bytes(peer.inbound_bytes),
            count(peer.drops.values().sum()),
        ]);
    }
    columns(out, &rows, 2);
}

/// The peers of a backend without a tunnel, with the kernel's routes if it makes any.
fn plain_peers(out: &mut String, colour: Colour, peers: &[Peer]) {
    if !heading(out, colour, peers) {
        return;
    }
    if peers.iter().all(|peer| peer.kernel_route.is_none()) {
        let mut rows = vec![["subnet", "node"].map(str::to_owned)];
        rows.extend(
            peers
                .iter()
                .map(|peer| [or_none(&peer.subnets), or_none(&peer.endpoints)]),
        );
        columns(out, &rows, 2);
        return;
    }
    let mut rows = vec![["subnet", "gateway", "kernel route"].map(str::to_owned)];
    for peer in peers {
        let route = peer.kernel_route.clone().unwrap_or_default();
        rows.push([or_none(&peer.subnets), or_none(&peer.endpoints), route]);
    }
    columns(out, &rows, 3);
}

/// How many peers there are; whether there are any.
fn heading(out: &mut String, colour: Colour, peers: &[Peer]) -> bool {
    let count = match peers.len() {
        0 => "none".to_owned(),
        count => count.to_string(),
    };
    out.push('\n');
    push(out, &format!("{}  {count}", colour.paint(BOLD, "peers")));
    !peers.is_empty()
}

/// Rows of cells under one another, the first `texts` columns to the left, numbers to the right.
fn columns<const N: usize>(out: &mut String, rows: &[[String; N]], texts: usize) {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for row in rows {
        let mut line = String::from("  ");
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = if column < texts {
                write!(line, "{cell:<width$}  ")
            } else {
                write!(line, "{cell:>width$}  ")
            };
        }
        push(out, line.trim_end());
    }
}

/// A list of counts, the largest first.
fn counts<'a>(
    out: &mut String,
    colour: Colour,
    title: &str,
    entries: impl Iterator<Item = (&'a String, &'a u64)>,
) {
    let mut entries: Vec<(&String, &u64)> = entries.filter(|(_, count)| **count > 0).collect();
    if entries.is_empty() {
        return;
    }
    entries.sort_by(|a, b| b.1.cmp(a.1).then(a.0.cmp(b.0)));
    out.push('\n');
    push(out, &colour.paint(BOLD, title));
    for (name, number) in entries {
        push(out, &format!("  {number:>12}  {name}"));
    }
}

fn row(out: &mut String, colour: Colour, name: &str, text: &str) {
    push(
        out,
        &format!("{}{}", colour.paint(BOLD, &format!("{name:<10}")), text),
    );
}

fn push(out: &mut String, line: &str) {
    out.push_str(line);
    out.push('\n');
}

/// The document without control characters, which a peer could have put into its lease to reach this terminal.
fn harmless(status: &Status) -> Status {
    fn clean(value: &mut Value) {
        match value {
            Value::String(text) => *text = text.replace(char::is_control, "?"),
            Value::Array(items) => items.iter_mut().for_each(clean),
            Value::Object(members) => {
                for (name, mut member) in std::mem::take(members) {
                    clean(&mut member);
                    members.insert(name.replace(char::is_control, "?"), member);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    let mut value = serde_json::to_value(status).unwrap_or_default();
    clean(&mut value);
    serde_json::from_value(value).unwrap_or_default()
}

fn or_none(names: &[String]) -> String {
    if names.is_empty() {
        return "none".to_owned();
    }
    names.join(" ")
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// A span of time in its two largest units.
fn duration(seconds: f64) -> String {
    let total = seconds.max(0.0) as u64;
    let (days, hours, minutes) = (total / 86_400, total / 3600 % 24, total / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{total} s"),
        (0, 0, _) => format!("{minutes} min {} s", total % 60),
        (0, _, _) => format!("{hours} h {minutes} min"),
        (_, _, _) => format!("{days} d {hours} h"),
    }
}

/// A count that stays short: exact below a hundred thousand.
fn count(number: u64) -> String {
    if number < 100_000 {
        return number.to_string();
    }
    scaled(number, 1000.0, &["k", "M", "G", "T", "P", "E"])
}

fn bytes(number: u64) -> String {
    if number < 1024 {
        return format!("{number} B");
    }
    scaled(number, 1024.0, &[" KiB", " MiB", " GiB", " TiB", " PiB", " EiB"])
}

fn scaled(number: u64, step: f64, units: &[&str]) -> String {
    let mut value = number as f64;
    let mut unit = "";
    for next in units {
        if value < step {
            break;
        }
        value /= step;
        unit = next;
    }
    format!("{value:.1}{unit}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::status::DeviceStatus;

    #[test]
    fn a_busy_node_reads_well_in_a_hundred_columns() {
        let text = table(&busy(), Colour::Off);
        assert!(!text.contains('\x1b'));
        assert_eq!(text, BUSY);
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(100), "{widest:?}");
    }

    #[test]
    fn a_node_that_waits_shows_what_for_and_no_blanks() {
        let status = Status {
            version: "0.1.0".into(),
            problem: Some("waiting for a lease: connection refused".into()),
            store: crate::status::StoreStatus {
                place: "etcd http://10.0.0.1:2379".into(),
                ..Default::default()
            },
            ..Status::default()
        };
        let expected = "\
kersey 0.1.0, not ready, up 0 s

waiting for a lease: connection refused
store     etcd http://10.0.0.1:2379
";
        assert_eq!(table(&status, Colour::Off), expected);
    }

    #[test]
    fn several_networks_are_shown_one_after_the_other() {
        let broken = Status {
            problem: Some("the network config is invalid".into()),
            ..Status::default()
        };
        let status = Status {
            version: "0.1.0".into(),
            uptime_s: 5.0,
            store: crate::status::StoreStatus {
                place: "etcd http://10.0.0.1:2379 /coreos.com/network".into(),
                ..Default::default()
            },
            networks: Some([("blue".to_owned(), busy()), ("green".to_owned(), broken)].into()),
            ..Status::default()
        };
        let text = table(&status, Colour::Off);
        let (_, body) = BUSY.split_once("\n\n").unwrap();
        let expected = format!(
            "kersey 0.1.0, not ready, up 5 s\n\n\
             store     etcd http://10.0.0.1:2379 /coreos.com/network\n\
             networks  2\n\n\
             network blue, ready\n{body}\n\
             network green, not ready\n\
             the network config is invalid\n"
        );
        assert_eq!(text, expected);
        let none = Status {
            networks: Some(BTreeMap::new()),
            ..status
        };
        assert!(table(&none, Colour::Off).ends_with("networks  none\n"));
    }

    #[test]
    fn a_peer_cannot_reach_the_terminal() {
        let mut status = busy();
        status.peers[0].endpoints = vec!["\x1b]0;owned\x07".into()];
        status.drops.insert("\u{9b}2J".into(), 7);
        let text = table(&harmless(&status), Colour::Off);
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
        assert!(text.contains("?]0;owned?"), "{text}");
    }

    #[test]
    fn an_empty_document_is_no_trouble() {
        let text = table(&Status::default(), Colour::On);
        assert!(
            text.contains("store") && text.contains("\x1b[31mnot ready"),
            "{text}"
        );
    }

    #[test]
    fn a_node_without_a_tunnel_shows_its_routes_and_nothing_it_has_not() {
        let mut status = routed();
        assert_eq!(table(&status, Colour::Off), ROUTED);
        // alloc makes none.
        for peer in &mut status.peers {
            peer.kernel_route = None;
        }
        let text = table(&status, Colour::Off);
        assert!(text.contains("  subnet                         node\n"), "{text}");
        let json = serde_json::to_value(&status).unwrap();
        assert!(json.get("device").is_none(), "{json}");
        assert!(serde_json::from_value::<Status>(json).unwrap().device.is_absent());
    }

    #[test]
    fn a_peer_past_the_tunnel_is_marked() {
        let mut status = busy();
        status.peers[0].kernel_route = Some("installed".into());
        let text = table(&status, Colour::Off);
        assert!(text.contains("10.0.0.1:8472, direct "), "{text}");
    }

    #[test]
    fn numbers_stay_short() {
        assert_eq!(count(99_999), "99999");
        assert_eq!(count(100_000), "100.0k");
        assert_eq!(count(u64::MAX), "18.4E");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(duration(59.9), "59 s");
        assert_eq!(duration(3601.0), "1 h 0 min");
        assert_eq!(duration(f64::NAN), "0 s");
    }

    #[test]
    fn no_daemon_is_said_plainly() {
        let dir = tempfile::tempdir().unwrap();
        let error = fetch(&dir.path().join("none.sock")).unwrap_err();
        assert!(error.to_string().contains("no daemon answers on"), "{error}");
        assert!(error.hint().contains("kersey run"));
    }

    const BUSY: &str = "\
kersey 0.1.0, ready, up 3 h 12 min

node      10.244.3.0/24 in 10.244.0.0/16 · eth0 10.0.0.3 · MTU 1450 (link 1500)
backend   vxlan VNI 1 port 8472: the network config asks for it · ingress check strict
store     etcd http://10.0.0.1:2379 · away for 1 min 5 s
          connection refused
device    flannel0 · 2 queues · 1 thread
offloads  tun_tso on · udp_gso off (kernel)

peers  2
  subnet          endpoint        packets out    bytes  packets in     bytes  drops
  10.244.1.0/24   10.0.0.1:8472         12345  1.5 MiB         678  66.2 KiB      3
  10.244.20.0/24  10.0.0.20:8472       123.5M  1.0 GiB           0       0 B      0

drops
            90  ingress_source
             3  malformed
";

    const ROUTED: &str = "\
kersey 0.1.0, ready, up 1 min 5 s

node      10.244.3.0/24 in 10.244.0.0/16 · eth0 10.0.0.3 · MTU 1500
backend   host-gw: the network config asks for it
store     etcd http://10.0.0.1:2379 · connected for 1 min 5 s

peers  2
  subnet                         gateway               kernel route
  10.244.1.0/24 fd00:0:0:1::/64  10.0.0.1 2001:db8::1  installed
  10.244.20.0/24                 10.0.9.20             Network is unreachable
";

    fn routed() -> Status {
        let mut status = Status {
            device: DeviceStatus::default(),
            drops: BTreeMap::new(),
            uptime_s: 65.0,
            ..busy()
        };
        status.node.inner_mtu = 1500;
        status.backend.name = "host-gw".into();
        (status.backend.vni, status.backend.port) = (None, None);
        status.backend.ingress_check.clear();
        status.store.connected = true;
        status.store.error = None;
        let peer = |subnets: &[&str], endpoints: &[&str], route: &str| Peer {
            subnets: subnets.iter().map(|&text| text.to_owned()).collect(),
            endpoints: endpoints.iter().map(|&text| text.to_owned()).collect(),
            kernel_route: Some(route.to_owned()),
            ..Peer::default()
        };
        status.peers = vec![
            peer(
                &["10.244.1.0/24", "fd00:0:0:1::/64"],
                &["10.0.0.1", "2001:db8::1"],
                "installed",
            ),
            peer(&["10.244.20.0/24"], &["10.0.9.20"], "Network is unreachable"),
        ];
        status
    }

    fn busy() -> Status {
        let mut status = Status {
            version: "0.1.0".into(),
            ready: true,
            uptime_s: 3.0 * 3600.0 + 12.5 * 60.0,
            ..Status::default()
        };
        status.node.networks = vec!["10.244.0.0/16".into()];
        status.node.subnets = vec!["10.244.3.0/24".into()];
        status.node.interface = "eth0".into();
        status.node.public_ips = vec!["10.0.0.3".into()];
        (status.node.link_mtu, status.node.inner_mtu) = (1500, 1450);
        status.backend.name = "vxlan".into();
        status.backend.reason = "the network config asks for it".into();
        (status.backend.vni, status.backend.port) = (Some(1), Some(8472));
        status.backend.ingress_check = "strict".into();
        status.store.place = "etcd http://10.0.0.1:2379".into();
        status.store.since_s = 65.0;
        status.store.error = Some("connection refused".into());
        status.device.name = "flannel0".into();
        (status.device.queues, status.device.threads) = (2, 1);
        status.device.offloads = BTreeMap::from([
            ("tun_tso".into(), "on".into()),
            ("udp_gso".into(), "off (kernel)".into()),
        ]);
        status.peers = vec![
            Peer {
                subnets: vec!["10.244.1.0/24".into()],
                endpoints: vec!["10.0.0.1:8472".into()],
                narrow_mtu: None,
                outbound_packets: 12_345,
                outbound_bytes: 3 << 19,
                inbound_packets: 678,
                inbound_bytes: 67_800,
                last_seen_unix_s: None,
                drops: BTreeMap::from([("malformed".into(), 3)]),
                kernel_route: None,
            },
            Peer {
                subnets: vec!["10.244.20.0/24".into()],
                endpoints: vec!["10.0.0.20:8472".into()],
                outbound_packets: 123_456_789,
                outbound_bytes: 1 << 30,
                ..Peer::default()
            },
        ];
        status.drops = BTreeMap::from([
            ("malformed".into(), 3),
            ("ingress_source".into(), 90),
            ("none".into(), 0),
        ]);
        status
    }
}
