//! A lab that stays: `kersey lab up`, `exec`, `status`, `down`.
//!
//! `/run/kersey-lab` holds everything about it: `state.json` with what was made, and the daemons' files. A process is
//! ended only if its command line names that folder.
//!
//! A lab that does not stay keeps its daemons' files in a folder that, like its namespaces, has the number of its process in its name. If
//! that is killed, `kersey lab down` finds by this number what it left behind: of the processes in those namespaces, it ends those whose
//! command lines name that folder.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Shape;
use crate::cli::progress::{Progress, table};
use crate::cli::tell::say;
use crate::lab::cluster::{Kernel, Peer, end_processes, folder_prefix};
use crate::lab::daemon;
use crate::lab::kernel_node;
use crate::lab::netns::Namespace;
use crate::lab::seg6_node;

const FOLDER: &str = "/run/kersey-lab";
const PREFIX: &str = "kersey";
/// What the name of a folder goes on with after [`folder_prefix`] that is to be kept.
pub(super) const KEPT: &str = "kept-";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    namespaces: Vec<String>,
    nodes: Vec<NodeState>,
    /// All processes, daemons first.
    pids: Vec<u32>,
}

#[derive(Debug, Serialize, Deserialize)]
struct NodeState {
    namespace: String,
    pods: Vec<std::net::IpAddr>,
    what: What,
}

/// What takes part in the network from a node.
#[derive(Debug, Serialize, Deserialize)]
enum What {
    /// A daemon.
    Kersey { socket: PathBuf, log: PathBuf },
    /// The kernel, with what was set up when the lab came up; nothing follows the leases.
    KernelVxlan {
        devices: Vec<String>,
        subnets: Vec<String>,
        underlay: Vec<String>,
    },
    /// The same with the kernel's SRv6.
    KernelSeg6 {
        subnets: Vec<String>,
        underlay: Vec<String>,
    },
}

pub(super) fn up(shape: &Shape) -> Result<ExitCode> {
    ensure!(
        load()?.is_none(),
        "a lab is up already\n  hint: kersey lab status, or kersey lab down"
    );
    let progress = Progress::new();
    let plan = shape.topology(PREFIX.to_owned())?;
    let mut topology = progress.step("namespaces and links", || {
        let topology = plan
            .build()
            .context("hint: kersey lab down removes what an earlier lab left")?;
        let names = topology.names().join(" ");
        Ok((topology, names))
    })?;
    fs::create_dir_all(FOLDER).with_context(|| format!("cannot create {FOLDER}"))?;
    let started = progress.step("store, daemons, leases, routes", || {
        let cluster = shape.cluster(FOLDER.into(), &topology)?.start(&topology)?;
        let subnets = cluster.subnets().join("  ");
        Ok((cluster, subnets))
    });
    let mut cluster = match started {
        Ok(cluster) => cluster,
        Err(error) => {
            remove_folder()?;
            return Err(error);
        }
    };
    let kersey = cluster.daemons.iter().map(|daemon| {
        let what = What::Kersey {
            socket: daemon.socket.clone(),
            log: daemon.child.log().to_owned(),
        };
        (daemon.pods.clone(), what)
    });
    let kernel = cluster.kernel.iter().map(|kernel| {
        let attrs = &kernel.lease().attrs;
        let v4 = Some(attrs.public_ip).filter(|addr| !addr.is_unspecified());
        let v4 = v4.iter().map(ToString::to_string);
        let underlay = v4
            .chain(attrs.public_ipv6.iter().map(ToString::to_string))
            .collect();
        let subnets = kernel.subnets();
        let what = match kernel {
            Kernel::Vxlan(node) => What::KernelVxlan {
                devices: node.device_names(),
                subnets,
                underlay,
            },
            Kernel::Seg6(_) => What::KernelSeg6 { subnets, underlay },
        };
        (kernel.pods().to_vec(), what)
    });
    let nodes = topology
        .nodes
        .iter()
        .zip(kersey.chain(kernel))
        .map(|(node, (pods, what))| NodeState {
            namespace: node.namespace.name().to_owned(),
            pods,
            what,
        });
    let children = cluster
        .daemons
        .iter()
        .map(|daemon| &daemon.child)
        .chain(&cluster.store);
    let state = State {
        namespaces: topology.names(),
        nodes: nodes.collect(),
        pids: children.map(daemon::Child::pid).collect(),
    };
    fs::write(state_file(), serde_json::to_vec_pretty(&state)?).context("cannot write the lab's state")?;
    cluster.keep();
    topology.keep();
    let to = state
        .nodes
        .last()
        .and_then(|node| node.pods.first())
        .map(ToString::to_string)
        .unwrap_or_default();
    say!("\nThe lab is up. Try:\n");
    say!("  kersey lab status");
    say!("  kersey lab exec 1 ping -c 3 {to}");
    say!("  kersey lab exec 1 ip route");
    say!("  kersey lab down");
    Ok(ExitCode::SUCCESS)
}

pub(super) fn exec(node: &str, command: &[String]) -> Result<ExitCode> {
    let name = if node.starts_with(PREFIX) {
        node.to_owned()
    } else {
        format!("{PREFIX}-{node}")
    };
    let namespace = Namespace::existing(&name).map_err(|error| {
        let up = load().ok().flatten().map(|state| state.namespaces.join(" "));
        match up {
            Some(names) => hint(&error, &format!("the lab that is up has {names}")),
            None => hint(&error, "kersey lab up starts a lab"),
        }
    })?;
    let (program, arguments) = command.split_first().context("no command given")?;
    let mut command = Command::new(program);
    command.args(arguments);
    // So that `kersey status` there is this program, and speaks of that node.
    if let Some(folder) = std::env::current_exe()?.parent() {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders = std::iter::once(folder.to_path_buf()).chain(std::env::split_paths(&path));
        command.env("PATH", std::env::join_paths(folders)?);
    }
    let node = load()?.and_then(|state| state.nodes.into_iter().find(|node| node.namespace == name));
    if let Some(What::Kersey { socket, .. }) = node.map(|node| node.what) {
        command.env("KERSEY_STATUS_SOCKET", socket);
    }
    namespace.run(|| {
        // The thread that steps inside becomes the new program.
        let error = command.exec();
        Err(error).with_context(|| format!("cannot run {program:?}"))
    })
}

pub(super) fn status() -> Result<ExitCode> {
    let Some(state) = load()? else {
        say!("no lab is up");
        return Ok(ExitCode::FAILURE);
    };
    let rows: Vec<_> = state.nodes.iter().map(NodeState::row).collect();
    let all_ready = rows.iter().all(|row| row[2] == READY);
    let table = table(["node", "is", "state", "subnet", "underlay", "peers"], &rows);
    say!("{}", table.trim_end());
    Ok(if all_ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

const READY: &str = "ready";

impl NodeState {
    /// How the node is doing: name, kind, state, subnets, underlay addresses, number of peers.
    fn row(&self) -> [String; 6] {
        let name = self.namespace.clone();
        match &self.what {
            What::Kersey { socket, log } => {
                let kind = Peer::Kersey.name().to_owned();
                let Some(status) = daemon::status(socket).ok().flatten() else {
                    let log = log.display().to_string();
                    return [name, kind, "down".into(), String::new(), String::new(), log];
                };
                let state = if status.ready { READY } else { "starting" };
                [
                    name,
                    kind,
                    state.into(),
                    status.node.subnets.join(" "),
                    status.node.public_ips.join(" "),
                    status.peers.len().to_string(),
                ]
            }
            What::KernelVxlan {
                devices,
                subnets,
                underlay,
            } => {
                let peers = Namespace::existing(&name)
                    .and_then(|namespace| kernel_node::peers_installed(&namespace, devices));
                kernel_row(name, Peer::KernelVxlan, subnets, underlay, peers)
            }
            What::KernelSeg6 { subnets, underlay } => {
                let peers =
                    Namespace::existing(&name).and_then(|namespace| seg6_node::peers_installed(&namespace));
                kernel_row(name, Peer::KernelSeg6, subnets, underlay, peers)
            }
        }
    }
}

fn kernel_row(
    name: String,
    kind: Peer,
    subnets: &[String],
    underlay: &[String],
    peers: Result<usize>,
) -> [String; 6] {
    let state = if peers.is_ok() { READY } else { "down" };
    [
        name,
        kind.name().to_owned(),
        state.into(),
        subnets.join(" "),
        underlay.join(" "),
        peers.map_or_else(|_| "–".to_owned(), |peers| peers.to_string()),
    ]
}

pub(super) fn down() -> Result<ExitCode> {
    let state = load()?;
    let mut namespaces = leftovers()?;
    let mut ended = 0;
    if let Some(state) = state {
        ended = end_processes(&state.pids, FOLDER)?;
        namespaces.extend(state.namespaces);
    }
    let mut killed = BTreeSet::new();
    for name in &namespaces {
        if let Some(lab) = lab_of(name) {
            ended += end_processes(&Namespace::processes(name)?, &folder_prefix(lab))?;
            killed.insert(lab);
        }
    }
    namespaces.sort();
    namespaces.dedup();
    for name in &namespaces {
        Namespace::remove(name)?;
    }
    remove_folder()?;
    for lab in killed {
        remove_folders(&folder_prefix(lab))?;
    }
    if namespaces.is_empty() && ended == 0 {
        say!("no lab is up");
    } else {
        let processes = if ended == 1 { "process" } else { "processes" };
        say!("ended {ended} {processes}, removed {}", namespaces.join(" "));
    }
    Ok(ExitCode::SUCCESS)
}

/// The process whose lab a namespace belongs to; none of the lab that stays.
fn lab_of(namespace: &str) -> Option<u32> {
    let (lab, _) = namespace
        .strip_prefix(PREFIX)?
        .strip_prefix('-')?
        .split_once('-')?;
    lab.parse().ok()
}

/// Removes the folders of a killed lab that nobody wanted to keep.
fn remove_folders(prefix: &str) -> Result<()> {
    let all = std::env::temp_dir();
    let entries = fs::read_dir(&all).with_context(|| format!("cannot read {}", all.display()))?;
    let kept = format!("{prefix}{KEPT}");
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        // In a folder of everybody's, anybody may have made one of that name.
        let is_ours = entry
            .metadata()
            .is_ok_and(|meta| meta.is_dir() && meta.uid() == nix::unistd::geteuid().as_raw());
        if name.starts_with(prefix) && !name.starts_with(&kept) && is_ours {
            let path = entry.path();
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Namespaces of labs whose process is gone, and of a standing lab without state.
fn leftovers() -> Result<Vec<String>> {
    let mut names = Namespace::names(&format!("{PREFIX}-"))?;
    names.retain(|name| match name.split('-').collect::<Vec<_>>()[..] {
        [_, "hub"] => true,
        [_, number] => number.parse::<u32>().is_ok(),
        [_, pid, ..] => pid
            .parse::<u32>()
            .is_ok_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()),
        _ => false,
    });
    Ok(names)
}

fn hint(error: &anyhow::Error, advice: &str) -> anyhow::Error {
    anyhow::anyhow!("{error:#}\n  hint: {advice}")
}

fn load() -> Result<Option<State>> {
    match fs::read(state_file()) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .context("the lab's state is damaged"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("cannot read the lab's state"),
    }
}

fn remove_folder() -> Result<()> {
    match fs::remove_dir_all(FOLDER) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {FOLDER}"))
        }
        _ => Ok(()),
    }
}

fn state_file() -> PathBuf {
    Path::new(FOLDER).join("state.json")
}
