//! The process around the node: who watches it, what it gives up, and what it hands to its successor.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessOptions {
    /// Where probes and metrics are answered.
    pub monitor: MonitorOptions,
    /// What the process gives up.
    pub sandbox: SandboxChoice,
    /// The user to become: a name or a number.
    pub user: Option<String>,
    /// Whether device and sockets outlive the process.
    pub handover: Handover,
    /// What to do about a daemon that runs already.
    pub predecessor: Predecessor,
    /// The file that flags come from, to be read again.
    pub config_file: Option<PathBuf>,
}

/// Where probes and metrics are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonitorOptions {
    /// Address of the port for probes.
    pub healthz_ip: IpAddr,
    /// Port for probes, if there is to be one.
    pub healthz_port: Option<NonZeroU16>,
    /// Where metrics are told to whoever asks.
    pub metrics_address: Option<SocketAddr>,
}

impl Default for MonitorOptions {
    fn default() -> Self {
        Self {
            healthz_ip: Ipv4Addr::UNSPECIFIED.into(),
            healthz_port: None,
            metrics_address: None,
        }
    }
}

/// A part of the sandbox, by its name on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SandboxPart {
    /// `capabilities`
    Capabilities,
    /// `landlock`
    Landlock,
    /// `seccomp`
    Seccomp,
}

impl SandboxPart {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Capabilities, Self::Landlock, Self::Seccomp];

    fn name(self) -> &'static str {
        match self {
            Self::Capabilities => "capabilities",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        }
    }
}

/// Which parts of the sandbox are used where the kernel has them: `auto` is all, `off` is none, else a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxChoice(pub BTreeSet<SandboxPart>);

impl Default for SandboxChoice {
    fn default() -> Self {
        Self(SandboxPart::ALL.into())
    }
}

/// A text names no part of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected auto, off, or a list of capabilities, landlock, seccomp; not {0:?}")]
pub struct UnknownPart(String);

impl FromStr for SandboxChoice {
    type Err = UnknownPart;

    fn from_str(text: &str) -> Result<Self, UnknownPart> {
        match text {
            "auto" => return Ok(Self::default()),
            "off" => return Ok(Self(BTreeSet::new())),
            _ => {}
        }
        let parts = text.split(',').map(|name| {
            let name = name.trim();
            let part = SandboxPart::ALL.into_iter().find(|part| part.name() == name);
            part.ok_or_else(|| UnknownPart(name.to_owned()))
        });
        parts.collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for SandboxChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("off");
        }
        if self.0.len() == SandboxPart::ALL.len() {
            return f.write_str("auto");
        }
        let names: Vec<_> = self.0.iter().map(|part| part.name()).collect();
        f.write_str(&names.join(","))
    }
}

/// Whether device and sockets may go to the next process, or come from the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Handover {
    /// They may: through systemd's file descriptor store, or when a successor asks.
    #[default]
    Auto,
    /// Every start is a cold one.
    Off,
}

/// What to do about a daemon that runs already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predecessor {
    /// Leave it alone and end.
    #[default]
    Respect,
    /// Take its place; packets go on.
    Replace,
}

/// Reads the address metrics are told at: `ADDRESS:PORT`, or a port alone for loopback.
///
/// # Errors
/// It is neither.
pub fn metrics_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix(':').unwrap_or(text);
    if let Ok(port) = port.parse::<NonZeroU16>() {
        return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port.get()));
    }
    text.parse::<SocketAddr>()
        .ok()
        .filter(|address| address.port() != 0)
        .ok_or_else(|| "expected ADDRESS:PORT, such as 127.0.0.1:9100, or a port for loopback".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_is_all_none_or_a_list() {
        for (text, parts) in [
            ("auto", SandboxPart::ALL.to_vec()),
            ("off", Vec::new()),
            ("seccomp", vec![SandboxPart::Seccomp]),
            (
                "landlock,capabilities",
                vec![SandboxPart::Capabilities, SandboxPart::Landlock],
            ),
        ] {
            let choice: SandboxChoice = text.parse().unwrap();
            assert_eq!(choice.0.iter().copied().collect::<Vec<_>>(), parts, "{text}");
            assert_eq!(choice.to_string().parse(), Ok(choice), "{text}");
        }
        for text in ["", "on", "seccomp,", "Seccomp", "auto,off"] {
            assert!(text.parse::<SandboxChoice>().is_err(), "{text}");
        }
    }

    #[test]
    fn metrics_are_for_loopback_unless_an_address_is_given() {
        for (text, address) in [
            ("9100", "127.0.0.1:9100"),
            (":9100", "127.0.0.1:9100"),
            ("0.0.0.0:9100", "0.0.0.0:9100"),
            ("[::1]:1", "[::1]:1"),
        ] {
            assert_eq!(metrics_address(text), Ok(address.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            "0",
            "localhost:9100",
            "127.0.0.1",
            "127.0.0.1:0",
            "1.2.3.4:70000",
        ] {
            assert!(metrics_address(text).is_err(), "{text}");
        }
    }
}
