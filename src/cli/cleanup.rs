//! `kersey cleanup`: removes from this host what a flannel or a killed Kersey left behind.
//!
//! What is found belongs to one of them for certain: a device of the kernel's VXLAN driver that is called as flannel calls it by its own
//! VNI, a route or neighbour with our protocol number, a switch of which a file says what it was before and which nobody set since, a table, chain or comment of the names that both use, a status socket on which nobody answers. Default routes are left alone whatever their number:
//! no daemon makes one, only labs do. A device takes its routes and neighbours along, so devices go first.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Shutdown};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::exit;
use super::go_flags::parse_bool;
use super::status::DEFAULT_SOCKET;
use super::store::DEFAULT_DATA_DIR;
use crate::addr::{Ipv6Prefix, Prefix};
use crate::daemon::switches;
use crate::host::firewall;
use crate::host::netlink::{Gateway, Link, Netlink, NetlinkError, Route, VxlanDevice};
use crate::host::sysctl::Change;
use crate::options::{CleanupMode, CleanupOptions};
use crate::server::status::{Locked, SocketLock};

/// Undo what Kersey or flannel did to this machine: vxlan devices, routes, firewall rules, a dead status socket
///
/// Removed are the kernel's vxlan devices named flannel.VNI and flannel-v6.VNI, routes and neighbours of protocol 75
/// (Kersey's, those of SRv6 locators among them), flannel's and Kersey's tables and chains in nft and iptables, and the
/// status socket if nobody answers on it. What srv6 switched for the whole host is put back, unless somebody set it since.
/// Stop flannel first: it would make its device anew. Leases, subnet.env and the rest of the data directory stay.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Options", after_help = AFTER_HELP)]
pub(super) struct CleanupArgs {
    /// Only list what would be removed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value = "false", value_parser = parse_bool)]
    dry_run: bool,
    /// The daemon's socket, its --status-socket; while one answers, nothing is removed
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    status_socket: PathBuf,
    /// The daemon's data directory, its --data-dir: there it says what srv6 switched for the whole host
    #[arg(long, value_name = "DIR", default_value = DEFAULT_DATA_DIR)]
    data_dir: PathBuf,
}

const AFTER_HELP: &str = "\
Exit status: 0 removed, or nothing there; 1 a daemon runs, or something could not be removed; 2 misused; \
3 CAP_NET_ADMIN is missing.";

impl CleanupArgs {
    pub(super) fn into_options(self) -> CleanupOptions {
        CleanupOptions {
            socket: self.status_socket,
            data_dir: self.data_dir,
            mode: if self.dry_run {
                CleanupMode::DryRun
            } else {
                CleanupMode::Remove
            },
        }
    }
}

/// Something left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Leftover {
    Device(VxlanDevice),
    Route {
        route: Route,
        /// The name of its link.
        link: String,
    },
    Locator(Ipv6Prefix),
    Blackhole(Prefix),
    Neighbour {
        addr: IpAddr,
        index: u32,
        /// The name of its link.
        link: String,
    },
    Switch(Change),
    Firewall(firewall::Leftover),
    Socket(PathBuf),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(device) => write!(
                f,
                "vxlan device {} (VNI {}, UDP port {})",
                device.link.name, device.vni, device.port
            ),
            Self::Route { route, link } => {
                write!(f, "route {}", route.destination)?;
                match route.gateway {
                    Gateway::Direct => {}
                    Gateway::Via(addr) | Gateway::OnLink(addr) => write!(f, " via {addr}")?,
                }
                write!(f, " dev {link}")
            }
            Self::Locator(prefix) => write!(f, "local route {prefix} (SRv6 locator)"),
            Self::Blackhole(prefix) => write!(f, "blackhole route {prefix}"),
            Self::Neighbour { addr, link, .. } => write!(f, "neighbour {addr} dev {link}"),
            Self::Switch(change) => write!(
                f,
                "setting {}={} (it was {})",
                change.key, change.set, change.before
            ),
            Self::Firewall(leftover) => write!(f, "{}", leftover.told.join(", ")),
            Self::Socket(path) => write!(f, "status socket {}", path.display()),
        }
    }
}

/// Why nothing, or not all, was removed.
#[derive(Debug, thiserror::Error)]
enum CleanupError {
    #[error("a daemon is running: it has {}; stop it first", .0.display())]
    DaemonRuns(PathBuf),
    #[error("cannot ask whether a daemon runs: {}: {source}", .path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("cannot look for what was left behind: {}", told(.0))]
    Look(NetlinkError),
    #[error("cannot read what the host's switches were: {0}")]
    LookAtSwitches(io::Error),
    #[error("cannot look for firewall rules: {0}")]
    LookAtFirewall(firewall::tool::ToolError),
    #[error("cannot look for firewall rules: this takes CAP_NET_ADMIN; try sudo")]
    LookDenied,
    #[error("cannot remove {what}: {cause}")]
    Remove { what: String, cause: String },
    #[error("cannot remove {0}: this takes CAP_NET_ADMIN; try sudo")]
    Denied(String),
}

/// An error with its cause.
fn told(error: &NetlinkError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Looks for what was left behind and removes it, or lists it.
pub fn run(options: &CleanupOptions) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime
        .map_err(CleanupError::Runtime)
        .and_then(|runtime| runtime.block_on(clean(options)));
    let errors = match done {
        Ok(errors) => errors,
        Err(error) => vec![error],
    };
    let mut status = exit::OK;
    for error in &errors {
        // Nobody is left to tell when the terminal is gone.
        let _ = writeln!(io::stderr(), "error: {error}");
        status = match error {
            CleanupError::Denied(_) | CleanupError::LookDenied => exit::ENVIRONMENT,
            CleanupError::DaemonRuns(_)
            | CleanupError::Socket { .. }
            | CleanupError::Runtime(_)
            | CleanupError::Look(_)
            | CleanupError::LookAtSwitches(_)
            | CleanupError::LookAtFirewall(_)
            | CleanupError::Remove { .. } => exit::FAILED,
        };
    }
    ExitCode::from(status)
}

/// Removes or lists; gives what could not be removed.
async fn clean(options: &CleanupOptions) -> Result<Vec<CleanupError>, CleanupError> {
    // Until all is done: a daemon that starts meanwhile would lose its rules.
    let _lock = SocketLock::take_left(&options.socket)
        .map_err(|Locked| CleanupError::DaemonRuns(options.socket.clone()))?;
    let socket = dead_socket(&options.socket)?;
    let netlink = Netlink::open().map_err(CleanupError::Look)?;
    let mut found = leftovers(&netlink).await.map_err(CleanupError::Look)?;
    let mut errors = Vec::new();
    match firewall::leftovers() {
        Ok(rules) => found.extend(rules.into_iter().map(Leftover::Firewall)),
        // What else there is can be removed all the same.
        Err(error) if error.to_string().contains("Operation not permitted") => {
            errors.push(CleanupError::LookDenied);
        }
        Err(error) => errors.push(CleanupError::LookAtFirewall(error)),
    }
    let remembrances = match switches::remembered(&options.data_dir) {
        Ok(remembrances) => remembrances,
        Err(error) => {
            errors.push(CleanupError::LookAtSwitches(error));
            Vec::new()
        }
    };
    let changes = remembrances.iter().flat_map(|held| &held.changes);
    found.extend(changes.cloned().map(Leftover::Switch));
    found.extend(socket.map(Leftover::Socket));
    for leftover in &found {
        let line = match options.mode {
            CleanupMode::DryRun => format!("would remove {leftover}\n"),
            CleanupMode::Remove => match remove(&netlink, leftover).await {
                Ok(()) => format!("removed {leftover}\n"),
                Err(error) => {
                    errors.push(error);
                    continue;
                }
            },
        };
        // As above: a terminal that is gone keeps nothing from being removed.
        let _ = io::stdout().write_all(line.as_bytes());
    }
    if options.mode == CleanupMode::Remove && errors.is_empty() {
        for held in &remembrances {
            // Empty by now: what it has is put back, or somebody else's.
            let _ = fs::remove_file(&held.file);
        }
    }
    if found.is_empty() && errors.is_empty() {
        let _ = io::stdout().write_all(b"nothing to clean up\n");
    }
    Ok(errors)
}

/// The socket's path, if there is one and nobody answers on it.
fn dead_socket(path: &Path) -> Result<Option<PathBuf>, CleanupError> {
    let failed = |source| CleanupError::Socket {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => {}
        // The daemon refuses to start over something that is no socket, and says so; it is not ours to remove.
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    }
    match UnixStream::connect(path) {
        Ok(stream) => {
            // It has nothing to tell us that we want to know.
            let _ = stream.shutdown(Shutdown::Both);
            Err(CleanupError::DaemonRuns(path.to_owned()))
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(Some(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
}

/// Devices and routes left behind.
async fn leftovers(netlink: &Netlink) -> Result<Vec<Leftover>, NetlinkError> {
    let mut devices = netlink.vxlan_devices().await?;
    devices.retain(VxlanDevice::has_flannels_name);
    let links = netlink.links().await?;
    let mut routes = netlink.own_routes().await?;
    let goes_with_a_device = |route: &Route| devices.iter().any(|device| device.link.index == route.index);
    routes.retain(|route| route.destination.len() > 0 && !goes_with_a_device(route));
    let routes = routes.into_iter().map(|route| Leftover::Route {
        link: name(&links, route.index),
        route,
    });
    let devices: Vec<_> = devices.into_iter().map(Leftover::Device).collect();
    let locators = netlink.own_local_prefixes().await?;
    let locators = locators.into_iter().map(Leftover::Locator);
    let blackholes = netlink.own_blackholes().await?;
    let blackholes = blackholes.into_iter().map(Leftover::Blackhole);
    let neighbours = netlink.own_neighbours().await?;
    let neighbours = neighbours.into_iter().map(|(index, addr)| Leftover::Neighbour {
        addr,
        index,
        link: name(&links, index),
    });
    Ok(devices
        .into_iter()
        .chain(routes)
        .chain(locators)
        .chain(blackholes)
        .chain(neighbours)
        .collect())
}

fn name(links: &[Link], index: u32) -> String {
    let link = links.iter().find(|link| link.index == index);
    link.map_or_else(|| format!("interface {index}"), |link| link.name.clone())
}

async fn remove(netlink: &Netlink, leftover: &Leftover) -> Result<(), CleanupError> {
    let what = leftover.to_string();
    let removed = match leftover {
        Leftover::Device(device) => netlink.delete_link(device.link.index).await,
        Leftover::Route { route, .. } => netlink.delete_route(route).await,
        Leftover::Locator(prefix) => netlink.delete_local_prefix(*prefix).await,
        Leftover::Blackhole(prefix) => netlink.delete_own_blackhole(*prefix).await,
        Leftover::Neighbour { addr, index, .. } => netlink.delete_neighbour(*index, *addr).await,
        Leftover::Switch(change) => {
            return change.undo().map_err(|error| CleanupError::Remove {
                what,
                cause: error.to_string(),
            });
        }
        Leftover::Firewall(leftover) => {
            return leftover.remove().map_err(|error| CleanupError::Remove {
                what,
                cause: error.to_string(),
            });
        }
        Leftover::Socket(path) => {
            let cause = match fs::remove_file(path) {
                Ok(()) => return Ok(()),
                Err(error) => error.to_string(),
            };
            return Err(CleanupError::Remove { what, cause });
        }
    };
    removed.map_err(|error| match error.raw_os_error() {
        Some(libc::EPERM) => CleanupError::Denied(what),
        Some(_) | None => CleanupError::Remove {
            what,
            cause: told(&error),
        },
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn each_leftover_is_one_line_an_operator_knows() {
        let device = VxlanDevice {
            link: Link {
                name: "flannel.1".into(),
                ..Link::default()
            },
            vni: 1,
            port: 8472,
            underlay_index: Some(2),
            local: None,
        };
        let route = Route {
            gateway: Gateway::Via([192, 0, 2, 2].into()),
            ..Route::direct(crate::addr::Prefix::V4("10.244.2.0/24".parse().unwrap()), 2)
        };
        let link = "eth0".to_owned();
        for (leftover, line) in [
            (
                Leftover::Device(device),
                "vxlan device flannel.1 (VNI 1, UDP port 8472)",
            ),
            (
                Leftover::Route { route, link },
                "route 10.244.2.0/24 via 192.0.2.2 dev eth0",
            ),
            (
                Leftover::Locator("fd12:3456:789a:c000:201::/80".parse().unwrap()),
                "local route fd12:3456:789a:c000:201::/80 (SRv6 locator)",
            ),
            (
                Leftover::Socket("/run/k.sock".into()),
                "status socket /run/k.sock",
            ),
        ] {
            assert_eq!(leftover.to_string(), line);
        }
    }

    /// A daemon that has its place and does not answer yet.
    #[test]
    fn nothing_is_cleaned_up_while_a_daemon_starts() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("status.sock");
        let lock = fs::File::create(dir.path().join("status.sock.lock")).unwrap();
        lock.lock().unwrap();
        let options = CleanupOptions {
            socket: socket.clone(),
            data_dir: dir.path().to_owned(),
            mode: CleanupMode::DryRun,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let refused = runtime.unwrap().block_on(clean(&options)).unwrap_err();
        assert!(matches!(refused, CleanupError::DaemonRuns(path) if path == socket));
    }

    #[test]
    fn a_socket_is_dead_only_if_nobody_answers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status.sock");
        assert!(dead_socket(&path).unwrap().is_none(), "there is none");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(dead_socket(&path), Err(CleanupError::DaemonRuns(_))));
        drop(listener);
        assert_eq!(dead_socket(&path).unwrap().as_deref(), Some(path.as_path()));
        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert!(dead_socket(&file).unwrap().is_none(), "a file is no socket");
    }
}
