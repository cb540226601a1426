//! Which files this process needs, and everything else given up: what [`sandbox`](crate::host::sandbox) is told to leave.

use std::fs::{self, DirBuilder, Permissions};
use std::num::NonZeroU16;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, User};

use crate::control::identity;
use crate::host::firewall;
use crate::host::folders::{self, FolderError};
use crate::host::sandbox::{self, Account, Part, Plan, SandboxError};
use crate::options::{
    FirewallTool, ListenAddress, NetworkChoice, RunOptions, SandboxChoice, SandboxPart, ServeOptions,
    ServerAddress, ServerOptions, Srv6Send, StoreKind,
};

/// Where the C library finds out what a name's address is; read only if names are to be resolved. `/etc` as a whole, for `resolv.conf` is
/// replaced as networks come and go; and where that leads, see [`resolver_folder`].
const RESOLV_CONF: &str = "/etc/resolv.conf";
const RESOLVER: [&str; 8] = [
    "/etc",
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
];
/// Where the system keeps whom it trusts.
const TRUST: [&str; 6] = [
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/usr/lib/ssl",
];
/// What the kernel tells: to the standard library, how many processors there are.
const KERNEL: [&str; 7] = [
    "/proc/self/cgroup",
    "/proc/self/mountinfo",
    "/sys/fs/cgroup",
    "/sys/devices/system/cpu",
    // The node's name, and which firewall tables there are.
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/domainname",
    "/proc/self/net",
];
/// Switches of devices and interfaces.
const SWITCHES: &str = "/proc/sys/net";
const TUN: &str = "/dev/net/tun";

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfineError {
    /// There is no such user.
    #[error("there is no user {0:?} (--user)")]
    NoUser(String),
    /// A folder is not the user's, or cannot be.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The kernel refuses.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// Makes the folders that are written to, becomes the user asked for, and enters the sandbox. To be called before there are threads.
pub(super) fn confine(options: &RunOptions) -> Result<(), ConfineError> {
    let account = options.process.user.as_deref().map(account).transpose()?;
    let folders = folders(options);
    for (folder, mode) in &folders {
        match account {
            Some(account) => folders::prepare(folder, *mode, account)?,
            None => prepare(folder, *mode),
        }
    }
    if let Some(account) = account {
        folders::give_contents(&options.data_dir, NetworkChoice::STATE, account)?;
    }
    let parts = parts_of(&options.process.sandbox);
    if options.firewall.tool != FirewallTool::Off
        && let Err(error) = firewall::helper::start(&parts)
    {
        // Without a sandbox the daemon runs the tools itself; inside, it will say that it cannot.
        tracing::warn!(%error, "cannot start the process that runs firewall tools");
    }
    let mut plan = Plan::new(parts.into_iter().collect(), account);
    for (folder, _) in folders {
        plan.write(folder);
    }
    plan.write(SWITCHES);
    plan.device(TUN);
    if options.packet_path.srv6_send == Srv6Send::Packet {
        plan.packet_sockets();
    }
    if listens_below_1024(options) {
        plan.low_ports();
    }
    for file in options.srv6.hmac_keys.iter().chain(&options.process.config_file) {
        plan.read_file(file);
    }
    let store = &options.store.kind;
    let named = resolves_names(store, options.serve.as_ref());
    allow_reading(&mut plan, store, options.serve.as_ref(), named);
    sandbox::enter(&plan)?;
    Ok(())
}

/// The same for a server that is no node, once its ports are bound: it keeps no capability. To be called before there are threads.
pub(crate) fn confine_server(options: &ServerOptions) -> Result<(), ConfineError> {
    let parts = parts_of(&options.sandbox);
    let mut plan = Plan::new(parts.into_iter().collect(), None).without_capabilities();
    if let StoreKind::Embedded(embedded) = &options.store.kind {
        prepare(&embedded.data_dir, 0o700);
        plan.write(&embedded.data_dir);
    }
    for folder in socket_folders(&options.serve) {
        plan.write(folder);
    }
    let store = &options.store.kind;
    // What it listens on has been looked up.
    allow_reading(
        &mut plan,
        store,
        Some(&options.serve),
        resolves_names(store, None),
    );
    sandbox::enter(&plan)?;
    Ok(())
}

fn parts_of(choice: &SandboxChoice) -> Vec<Part> {
    choice.0.iter().map(|part| part_of(*part)).collect()
}

/// Lets be read what a store and a server need, and the standard library.
fn allow_reading(plan: &mut Plan, store: &StoreKind, serve: Option<&ServeOptions>, named: bool) {
    for path in KERNEL {
        plan.read(path);
    }
    plan.read(identity::BOOT_ID);
    for file in store.files(serve) {
        plan.read_file(&file);
    }
    if named {
        for path in RESOLVER {
            plan.read(path);
        }
        if let Some(folder) = resolver_folder(Path::new(RESOLV_CONF)) {
            plan.read(folder);
        }
    }
    if speaks_tls(store) {
        for path in TRUST {
            plan.read(path);
        }
        for variable in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
            if let Some(path) = std::env::var_os(variable) {
                plan.read_file(Path::new(&path));
            }
        }
    }
}

fn part_of(part: SandboxPart) -> Part {
    match part {
        SandboxPart::Capabilities => Part::Capabilities,
        SandboxPart::Landlock => Part::Landlock,
        SandboxPart::Seccomp => Part::Seccomp,
    }
}

/// The folders written to, and the mode each is made with.
fn folders(options: &RunOptions) -> Vec<(PathBuf, u32)> {
    let mut folders = vec![(options.data_dir.clone(), 0o700)];
    folders.extend(
        options
            .networks
            .iter()
            .map(|choice| (choice.subnet_dir.clone(), 0o755)),
    );
    let files = [&options.subnet_file, &options.status_socket];
    folders.extend(files.into_iter().map(|file| (folder_of(file), 0o755)));
    let sockets = options.serve.iter().flat_map(socket_folders);
    folders.extend(sockets.map(|folder| (folder, 0o755)));
    folders
}

/// Whether a flag names a port to listen on that takes a capability.
fn listens_below_1024(options: &RunOptions) -> bool {
    let monitor = &options.process.monitor;
    let probes = monitor.healthz_port.map(NonZeroU16::get);
    let metrics = monitor.metrics_address.map(|addr| addr.port());
    let listen = options.serve.iter().flat_map(|serve| &serve.listen);
    let api = listen.filter_map(|address| match address {
        ListenAddress::Tcp { port, .. } => Some(*port),
        ListenAddress::Unix(_) | ListenAddress::Inherited(_) => None,
    });
    // The kernel chooses for 0, and nothing low.
    api.chain(probes)
        .chain(metrics)
        .any(|port| (1..1024).contains(&port))
}

/// The folders of the unix sockets that a server listens on.
fn socket_folders(serve: &ServeOptions) -> impl Iterator<Item = PathBuf> {
    serve.listen.iter().filter_map(|address| match address {
        ListenAddress::Unix(file) => Some(folder_of(file)),
        ListenAddress::Tcp { .. } | ListenAddress::Inherited(_) => None,
    })
}

fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        Some(_) | None => PathBuf::from("."),
    }
}

/// Whether the store or the address to listen on is given by name.
fn resolves_names(store: &StoreKind, serve: Option<&ServeOptions>) -> bool {
    let named = |host: &str| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        !bare.is_empty() && bare.parse::<std::net::IpAddr>().is_err()
    };
    let store = match store {
        StoreKind::Etcd(etcd) => etcd.endpoints.iter().any(|endpoint| named(host_of(endpoint))),
        StoreKind::Embedded(_) => false,
        StoreKind::Remote(remote) => remote.servers.iter().any(|server| match server {
            ServerAddress::Tcp { host, .. } => named(host),
            ServerAddress::Unix(_) => false,
        }),
    };
    let mut listen = serve.into_iter().flat_map(|serve| &serve.listen);
    store
        || listen.any(|address| match address {
            ListenAddress::Tcp { host, .. } => named(host),
            ListenAddress::Unix(_) | ListenAddress::Inherited(_) => false,
        })
}

/// The folder of the file that `link` leads to, which whoever looks after it replaces, or makes after we have started; then as much
/// of the way to it as there is. `None` where that is nothing but the root.
fn resolver_folder(link: &Path) -> Option<PathBuf> {
    /// As many links as the kernel follows.
    const MOST: usize = 40;
    let mut file = link.to_owned();
    for _ in 0..MOST {
        let Ok(next) = fs::read_link(&file) else { break };
        file = folder_of(&file).join(next);
    }
    let wanted = folder_of(&file);
    let there = wanted.ancestors().find_map(|folder| folder.canonicalize().ok());
    let there = there.filter(|folder| folder.parent().is_some());
    if !wanted.exists() {
        match &there {
            Some(folder) => tracing::info!(
                file = %file.display(),
                reads = %folder.display(),
                "what {} leads to is not there yet; all of this may be read, to find it later",
                link.display()
            ),
            None => tracing::warn!(
                file = %file.display(),
                "what {} leads to is not there yet, and will not be found: names are not resolved until the next start",
                link.display()
            ),
        }
    }
    there
}

/// The host of a URL, or of `host:port`.
fn host_of(endpoint: &str) -> &str {
    let rest = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    let rest = rest.split('/').next().unwrap_or(rest);
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    match rest.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or(v6),
        None => rest.split(':').next().unwrap_or(rest),
    }
}

fn speaks_tls(store: &StoreKind) -> bool {
    match store {
        StoreKind::Etcd(etcd) => etcd
            .endpoints
            .iter()
            .any(|endpoint| endpoint.starts_with("https:")),
        StoreKind::Embedded(_) => false,
        StoreKind::Remote(_) => true,
    }
}

fn account(name: &str) -> Result<Account, ConfineError> {
    let found = match name.parse::<u32>() {
        Ok(uid) => match User::from_uid(Uid::from_raw(uid)) {
            Ok(Some(user)) => Some((user.uid, user.gid)),
            // A number needs no entry in any database.
            Ok(None) | Err(_) => Some((Uid::from_raw(uid), Gid::from_raw(uid))),
        },
        Err(_) => User::from_name(name)
            .ok()
            .flatten()
            .map(|user| (user.uid, user.gid)),
    };
    let (uid, gid) = found.ok_or_else(|| ConfineError::NoUser(name.to_owned()))?;
    Ok(Account { uid, gid })
}

/// Makes a folder. One that cannot be made is told by whoever uses it, who also knows what for.
fn prepare(folder: &Path, mode: u32) {
    if folder.exists() {
        return;
    }
    let made = DirBuilder::new().recursive(true).mode(mode).create(folder);
    if let Err(error) = made.and_then(|()| fs::set_permissions(folder, Permissions::from_mode(mode))) {
        tracing::debug!(%error, folder = %folder.display(), "cannot make a folder");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of the services that write it has started by now is chance.
    #[test]
    fn names_are_resolved_by_what_resolv_conf_leads_to_even_if_it_comes_later() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let conf = root.join("resolv.conf");
        let folder = |path: &str| Some(root.join(path));
        fs::write(&conf, "").unwrap();
        assert_eq!(resolver_folder(&conf), folder(""));
        for name in ["run/connman", "run/other", "etc"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::remove_file(&conf).unwrap();
        // By a link that leads to a link; the file is not there, then it is.
        symlink("etc/resolv.conf", &conf).unwrap();
        symlink("../run/connman/resolv.conf", root.join("etc/resolv.conf")).unwrap();
        assert_eq!(resolver_folder(&conf), folder("run/connman"));
        fs::write(root.join("run/connman/resolv.conf"), "").unwrap();
        assert_eq!(resolver_folder(&conf), folder("run/connman"));
        // Not even the folder is there.
        fs::remove_dir_all(root.join("run/connman")).unwrap();
        assert_eq!(resolver_folder(&conf), folder("run"));
        // A link that leads nowhere.
        fs::remove_file(&conf).unwrap();
        symlink("/nowhere/resolv.conf", &conf).unwrap();
        assert_eq!(resolver_folder(&conf), None);
        fs::remove_file(&conf).unwrap();
        symlink(&conf, &conf).unwrap();
        assert_eq!(resolver_folder(&conf), folder(""));
    }

    #[test]
    fn a_host_is_found_in_every_form_of_endpoint() {
        for (endpoint, host) in [
            ("http://127.0.0.1:2379", "127.0.0.1"),
            ("https://etcd.example:2379/x", "etcd.example"),
            ("http://[::1]:2379", "::1"),
            ("etcd:2379", "etcd"),
            ("https://user@host", "host"),
        ] {
            assert_eq!(host_of(endpoint), host, "{endpoint}");
        }
    }

    #[test]
    fn a_user_is_a_name_or_a_number() {
        assert_eq!(account("0").unwrap().uid, Uid::from_raw(0));
        assert_eq!(account("root").unwrap().gid, Gid::from_raw(0));
        assert_eq!(account("4242424").unwrap().gid, Gid::from_raw(4_242_424));
        assert!(matches!(account("no such user"), Err(ConfineError::NoUser(_))));
    }
}
