//! Where a server listens, and where a node finds one.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Why a text is no address to listen on or to connect to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct AddressError(String);

/// Where a server listens.
#[derive(Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// `HOST:PORT` or `tcp://HOST:PORT`.
    Tcp {
        /// Name or address, without brackets; empty for every address of this machine.
        host: String,
        /// TCP port; 0 lets the kernel choose.
        port: u16,
    },
    /// `unix:///PATH`: a socket file.
    Unix(PathBuf),
    /// `fd://N`: the listening socket that is descriptor N of this process, from systemd; `fd://`: all it passed.
    Inherited(Option<u32>),
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix://") {
            return socket_path(path).map(Self::Unix);
        }
        if let Some(number) = text.strip_prefix("fd://") {
            return match (number, number.parse()) {
                ("", _) => Ok(Self::Inherited(None)),
                // 0 to 2 are the standard streams.
                (_, Ok(number)) if number >= 3 => Ok(Self::Inherited(Some(number))),
                (_, _) => Err(AddressError(format!(
                    "fd://{number} is no inherited socket; expected fd:// or a number from 3, such as fd://3"
                ))),
            };
        }
        let rest = text.strip_prefix("tcp://").unwrap_or(text);
        if let Some((scheme, _)) = rest.split_once("://") {
            let tls = match scheme {
                "https" => "; for TLS give --remote-certfile and --remote-keyfile as well",
                _ => "",
            };
            return Err(AddressError(format!(
                "{scheme}:// is not supported; listen on HOST:PORT, tcp://HOST:PORT, unix:///PATH or fd://N{tls}"
            )));
        }
        let (host, port) = split_host_port(rest)
            .ok_or_else(|| AddressError("expected HOST:PORT, such as 0.0.0.0:8888 or [::1]:8888".into()))?;
        Ok(Self::Tcp { host, port })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } => write_host_port(f, host, *port),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Inherited(Some(number)) => write!(f, "fd://{number}"),
            Self::Inherited(None) => f.write_str("fd://"),
        }
    }
}

impl fmt::Debug for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a server's address says about TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// Nothing: TLS if there are certificate files, as flannel has it.
    ByFiles,
    /// `http://`: none.
    Http,
    /// `https://`: always.
    Https,
}

/// A server to connect to.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServerAddress {
    /// `HOST:PORT`, `http://HOST:PORT` or `https://HOST:PORT`.
    Tcp {
        /// Whether it speaks TLS.
        scheme: Scheme,
        /// Name or address, without brackets; never empty.
        host: String,
        /// TCP port, never 0.
        port: u16,
    },
    /// `unix:///PATH`: a server on this machine.
    Unix(PathBuf),
}

impl ServerAddress {
    /// Whether what is sent there stays on this machine.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => {
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|addr| addr.is_loopback())
            }
        }
    }
}

impl FromStr for ServerAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(path) = text.strip_prefix("unix://") {
            return socket_path(path).map(Self::Unix);
        }
        let (scheme, rest) = match text.split_once("://") {
            None => (Scheme::ByFiles, text),
            Some(("http", rest)) => (Scheme::Http, rest),
            Some(("https", rest)) => (Scheme::Https, rest),
            Some((other, _)) => {
                return Err(AddressError(format!(
                    "{other}:// is not supported; a server is HOST:PORT, http://HOST:PORT, https://HOST:PORT or unix:///PATH"
                )));
            }
        };
        split_host_port(rest.strip_suffix('/').unwrap_or(rest))
            .filter(|(host, port)| !host.is_empty() && *port != 0)
            .map(|(host, port)| Self::Tcp { scheme, host, port })
            .ok_or_else(|| AddressError("expected HOST:PORT, such as 10.0.0.1:8888".into()))
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { scheme, host, port } => {
                f.write_str(match scheme {
                    Scheme::ByFiles | Scheme::Http => "",
                    Scheme::Https => "https://",
                })?;
                write_host_port(f, host, *port)
            }
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl fmt::Debug for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Reads the path of a socket file.
fn socket_path(text: &str) -> Result<PathBuf, AddressError> {
    // sockaddr_un holds 108 bytes with the final NUL, and the file is made under a longer name first.
    const LONGEST: usize = 90;
    if !Path::new(text).is_absolute() || text.ends_with('/') || text.contains('\0') {
        return Err(AddressError(
            "expected unix:// and an absolute path, such as unix:///run/kersey/api.sock".into(),
        ));
    }
    if text.len() > LONGEST {
        return Err(AddressError(format!(
            "the path of a socket may have {LONGEST} bytes, and this one has {}",
            text.len()
        )));
    }
    Ok(PathBuf::from(text))
}

/// Splits `host:port`, with IPv6 addresses in brackets.
fn split_host_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(inner) => {
            let inner = inner.strip_suffix(']')?;
            inner.parse::<Ipv6Addr>().ok()?;
            inner
        }
        None if host.contains([':', '/', '@', ' ']) => return None,
        None => host,
    };
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some((host.to_owned(), port.parse().ok()?))
}

fn write_host_port(f: &mut fmt::Formatter<'_>, host: &str, port: u16) -> fmt::Result {
    if host.contains(':') {
        write!(f, "[{host}]:{port}")
    } else {
        write!(f, "{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_take_flannels_forms() {
        for (text, host, port) in [
            ("0.0.0.0:8888", "0.0.0.0", 8888),
            (":8888", "", 8888),
            ("tcp://10.0.0.1:1", "10.0.0.1", 1),
            ("[::]:8888", "::", 8888),
            ("localhost:0", "localhost", 0),
        ] {
            let address: ListenAddress = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            let host = host.to_owned();
            assert_eq!(address, ListenAddress::Tcp { host, port }, "{text}");
        }
        for (text, number) in [("fd://", None), ("fd://3", Some(3)), ("fd://12", Some(12))] {
            assert_eq!(text.parse(), Ok(ListenAddress::Inherited(number)), "{text}");
        }
        assert_eq!(
            "unix:///run/kersey/api.sock".parse(),
            Ok(ListenAddress::Unix("/run/kersey/api.sock".into()))
        );
        let long = format!("unix:///{}", "x".repeat(120));
        for text in [
            "",
            "8888",
            "host",
            "::1:80",
            "h:",
            "h:+1",
            "h:65536",
            "fd://x",
            "fd://0",
            "fd://-3",
            "unix://relative",
            "unix:///dir/",
            &long,
            "https://h:1",
            "[h]:1",
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn servers_are_addresses_with_a_port_or_a_socket() {
        let tcp = |scheme, host: &str, port| {
            let host = host.to_owned();
            ServerAddress::Tcp { scheme, host, port }
        };
        for (text, expected, shown) in [
            (
                "10.0.0.1:8888",
                tcp(Scheme::ByFiles, "10.0.0.1", 8888),
                "10.0.0.1:8888",
            ),
            (
                "http://a.example:80/",
                tcp(Scheme::Http, "a.example", 80),
                "a.example:80",
            ),
            (
                "https://[fd00::1]:8888",
                tcp(Scheme::Https, "fd00::1", 8888),
                "https://[fd00::1]:8888",
            ),
            (
                "unix:///run/a.sock",
                ServerAddress::Unix("/run/a.sock".into()),
                "unix:///run/a.sock",
            ),
        ] {
            let address: ServerAddress = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(address, expected, "{text}");
            assert_eq!(address.to_string(), shown);
        }
        for text in ["", ":8888", "a:0", "ftp://a:1", "http://a:1/v1", "unix://", "a"] {
            assert!(text.parse::<ServerAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_stays_on_this_machine_is_known() {
        for (text, local) in [
            ("unix:///run/a.sock", true),
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("localhost:1", true),
            ("10.0.0.1:1", false),
            ("localhost.example:1", false),
        ] {
            assert_eq!(text.parse::<ServerAddress>().unwrap().is_local(), local, "{text}");
        }
    }
}
