//! `subnet.env`: what this node tells the container runtime, in flannel's form.
//!
//! ```text
//! FLANNEL_NETWORK=10.1.0.0/16
//! FLANNEL_SUBNET=10.1.74.1/24
//! FLANNEL_MTU=1472
//! FLANNEL_IPMASQ=true
//! ```
//!
//! The file is replaced whole, written last at start (to CNI it means "ready"), and read at the next start to ask for
//! the same subnet again.

use std::io;
use std::path::Path;

use crate::addr::{Ipv4Prefix, Ipv6Prefix, Mtu};
use crate::control::config::NetworkConfig;
use crate::control::state_file;
use crate::lease::Subnet;

/// Where flannel keeps it.
pub const DEFAULT_PATH: &str = "/run/flannel/subnet.env";

/// Flannel's file has six lines.
const MAX_BYTES: u64 = 64 * 1024;

/// Whether this node masquerades traffic that leaves the overlay (`--ip-masq`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpMasq {
    /// It does; the container runtime need not.
    On,
    /// It does not.
    Off,
}

/// The text of the file.
pub fn render(config: &NetworkConfig, subnet: Subnet, mtu: Mtu, ip_masq: IpMasq) -> String {
    let mut out = String::new();
    if let (Some(range), Some(v4)) = (config.v4, subnet.ipv4()) {
        let gateway = std::net::Ipv4Addr::from(u32::from(v4.addr()).wrapping_add(1));
        out.push_str(&format!(
            "FLANNEL_NETWORK={}\nFLANNEL_SUBNET={gateway}/{}\n",
            range.network,
            v4.len()
        ));
    }
    if let (Some(range), Some(v6)) = (config.v6, subnet.v6) {
        let gateway = std::net::Ipv6Addr::from(u128::from(v6.addr()).wrapping_add(1));
        out.push_str(&format!(
            "FLANNEL_IPV6_NETWORK={}\nFLANNEL_IPV6_SUBNET={gateway}/{}\n",
            range.network,
            v6.len()
        ));
    }
    let ip_masq = match ip_masq {
        IpMasq::On => "true",
        IpMasq::Off => "false",
    };
    out.push_str(&format!("FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={ip_masq}\n"));
    out
}

/// Writes the file: mode 0644, parent directories 0755.
///
/// # Errors
/// The file cannot be written; an old one is left as it was.
pub fn write(
    path: &Path,
    config: &NetworkConfig,
    subnet: Subnet,
    mtu: Mtu,
    ip_masq: IpMasq,
) -> io::Result<()> {
    state_file::replace(path, &render(config, subnet, mtu, ip_masq), 0o644, 0o755)
}

/// The subnet an old file names; `None` if there is no usable file.
pub fn previous(path: &Path) -> Option<Subnet> {
    match state_file::read(path, MAX_BYTES) {
        Ok(text) => parse(&text),
        Err(error) => {
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(path = %path.display(), %error, "ignoring the old subnet file");
            }
            None
        }
    }
}

fn parse(text: &str) -> Option<Subnet> {
    let value = |name: &str| {
        let mut lines = text.lines().rev().filter_map(|line| line.trim().split_once('='));
        let value = lines.find(|(key, _)| key.trim() == name)?.1.trim();
        Some(value.trim_matches(['"', '\'']))
    };
    // A list of more than one counts as none, to flannel too: it parses as no prefix.
    let v4 = value("FLANNEL_SUBNET").and_then(|text| text.parse::<Ipv4Prefix>().ok());
    let v6 = value("FLANNEL_IPV6_SUBNET").and_then(|text| text.parse::<Ipv6Prefix>().ok());
    match (v4, v6) {
        (None, None) => None,
        (v4, v6) => Some(Subnet {
            v4: v4.unwrap_or(Subnet::NO_V4),
            v6,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const DUAL: &str = r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#;

    fn subnet(key: &str) -> Subnet {
        key.parse().unwrap()
    }

    #[test]
    fn the_text_is_flannels() {
        let config = NetworkConfig::parse(DUAL).unwrap();
        let text = render(
            &config,
            subnet("10.1.74.0-24&fd00:0:0:7::-64"),
            Mtu::new(1472).unwrap(),
            IpMasq::Off,
        );
        assert_eq!(
            text,
            "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_IPV6_NETWORK=fd00::/48\n\
             FLANNEL_IPV6_SUBNET=fd00:0:0:7::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
        );
        assert_eq!(parse(&text), Some(subnet("10.1.74.0-24&fd00:0:0:7::-64")));
    }

    #[test]
    fn an_old_file_is_read_with_tolerance() {
        assert_eq!(
            parse("FLANNEL_SUBNET=\"10.1.74.1/24\"\r\n"),
            Some(subnet("10.1.74.0-24"))
        );
        assert_eq!(parse("FLANNEL_SUBNET=10.1.74.1/24,10.1.75.1/24\n"), None);
        assert_eq!(parse("# nothing\n"), None);
    }

    #[test]
    fn the_file_is_replaced_whole_and_readable_by_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/flannel/subnet.env");
        let config = NetworkConfig::parse(DUAL).unwrap();
        let mtu = Mtu::new(1400).unwrap();
        write(&path, &config, subnet("10.1.2.0-24"), mtu, IpMasq::On).unwrap();
        write(&path, &config, subnet("10.1.3.0-24"), mtu, IpMasq::On).unwrap();
        assert_eq!(previous(&path), Some(subnet("10.1.3.0-24")));
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o644
        );
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_hostile_file_is_ignored_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(previous(&path), None);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(previous(&path), None);
        std::fs::remove_file(&path).unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "kept").unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        let config = NetworkConfig::parse(DUAL).unwrap();
        write(
            &path,
            &config,
            subnet("10.1.3.0-24"),
            Mtu::new(1400).unwrap(),
            IpMasq::On,
        )
        .unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "kept");
        assert_eq!(previous(&dir.path().join("none")), None);
        assert_eq!(previous(dir.path()), None);
    }
}
