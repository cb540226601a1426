//! What is looked at before a request is: does a web page send it, and to whom.
//!
//! A browser on the management network must not become a way in. Two things a page can do:
//!
//! - *send requests to this address* from its own origin. Then `Origin` or `Sec-Fetch-Site` tell.
//! - *become this address*: the page's own name is made to lead here (DNS rebinding), and to the browser everything is of one
//!   origin. Over plain HTTP neither header need be there. But browsers send `Accept-Language` with each request, a page can
//!   change it and not take it away, and no flannel, Kersey or command-line client sends it. And `Host` is the page's name.
//!
//! So requests with a browser's headers are refused, and so is a foreign `Host`: one that is neither an address, nor this
//! machine's name, nor one given with `--server-name`. Flannel's own clients call a server by whatever name resolves to it,
//! and there is nothing to set on their side; who says that it is one of them, or a Kersey, is let in under any name, since a
//! browser that says so is still found by its other headers. Over TLS the certificate vouches for the name, and over a unix
//! socket there is none.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;

use axum::http::{HeaderMap, header};

use super::access::Peer;
use crate::options::ListenAddress;

/// Headers that browsers send and nobody else does.
const OF_BROWSERS: [&str; 5] = ["origin", "sec-fetch-site", "accept-language", "cookie", "referer"];
/// How the programs begin their User-Agent that call this server by any name: Go's library since 1.6, before, and Kersey.
const CLIENTS: [&str; 3] = ["Go-http-client/", "Go 1.", "kersey/"];

/// Why a request is refused at the front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Turned {
    /// A browser sent it.
    WebPage,
    /// It is for another host.
    ForeignHost(String),
    /// It names two hosts.
    TwoHosts,
}

/// The names this server answers to.
#[derive(Debug)]
pub(super) struct Front {
    names: BTreeSet<String>,
}

impl Front {
    /// This machine's name, the hosts listened on, and `names`.
    pub(super) fn new(listen: &[ListenAddress], names: &[String]) -> Self {
        let hosts = listen.iter().filter_map(|address| match address {
            ListenAddress::Tcp { host, .. } => Some(host.clone()),
            ListenAddress::Unix(_) | ListenAddress::Inherited(_) => None,
        });
        // Where there is no /proc there is no name to know.
        let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let names = hosts
            .chain(names.iter().cloned())
            .chain([own.trim().to_owned(), "localhost".to_owned()])
            .filter(|name| !name.is_empty())
            .map(|name| name.to_ascii_lowercase())
            .collect();
        Self { names }
    }

    /// Refuses what no node sends.
    pub(super) fn admit(&self, headers: &HeaderMap, peer: &Peer) -> Result<(), Turned> {
        if OF_BROWSERS.iter().any(|name| headers.contains_key(*name)) {
            return Err(Turned::WebPage);
        }
        let mut hosts = headers.get_all(header::HOST).iter();
        let (host, second) = (hosts.next(), hosts.next());
        if second.is_some() {
            return Err(Turned::TwoHosts);
        }
        let Some(host) = host.filter(|_| !peer.is_private) else {
            return Ok(());
        };
        let host = String::from_utf8_lossy(host.as_bytes());
        let name = name_of(&host);
        let agent = headers.get(header::USER_AGENT).map(|agent| agent.as_bytes());
        let is_client = CLIENTS
            .iter()
            .any(|client| agent.is_some_and(|agent| agent.starts_with(client.as_bytes())));
        if is_client || name.parse::<IpAddr>().is_ok() || self.names.contains(&name) {
            return Ok(());
        }
        Err(Turned::ForeignHost(name.chars().take(80).collect()))
    }
}

/// The name in a Host header: without port, brackets and final dot.
fn name_of(host: &str) -> String {
    let host = host.trim();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.trim_end_matches('.').to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_tools_are_let_in() {
        let front = front();
        for headers in [
            &[][..],
            &[("host", "10.0.0.1:8888")],
            &[("host", "[fd00::1]:8888")],
            &[("host", "localhost:8888")],
            &[("host", "Store.Example.:8888"), ("user-agent", "curl/8")],
            &[
                ("host", "other.example:8888"),
                ("user-agent", "Go-http-client/1.1"),
            ],
            &[
                ("host", "other.example:8888"),
                ("user-agent", "Go 1.1 package http"),
            ],
            &[("host", "other.example:8888"), ("user-agent", "kersey/0.1.0")],
        ] {
            assert_eq!(front.admit(&map(headers), &plain()), Ok(()), "{headers:?}");
        }
    }

    #[test]
    fn web_pages_are_not() {
        let front = front();
        for header in ["origin", "sec-fetch-site", "accept-language", "cookie", "referer"] {
            // A page that was given our address for its name, in a browser that lets it choose a User-Agent.
            let headers = [
                ("host", "10.0.0.1"),
                ("user-agent", "kersey/0.1.0"),
                (header, "x"),
            ];
            assert_eq!(
                front.admit(&map(&headers), &plain()),
                Err(Turned::WebPage),
                "{header}"
            );
        }
    }

    #[test]
    fn other_hosts_are_not() {
        let front = front();
        for host in [
            "evil.example",
            "evil.example:8888",
            "10.0.0.1.evil.example",
            "localhost.evil.example",
            "",
        ] {
            let headers = map(&[("host", host), ("user-agent", "curl/8")]);
            assert!(
                matches!(front.admit(&headers, &plain()), Err(Turned::ForeignHost(_))),
                "{host}"
            );
            let private = Peer {
                is_private: true,
                ..plain()
            };
            assert_eq!(
                front.admit(&headers, &private),
                Ok(()),
                "a certificate vouches for {host}"
            );
        }
        let twice = map(&[("host", "10.0.0.1"), ("host", "evil.example")]);
        assert_eq!(front.admit(&twice, &plain()), Err(Turned::TwoHosts));
    }

    fn front() -> Front {
        Front::new(&["10.0.0.1:8888".parse().unwrap()], &["store.example".to_owned()])
    }

    fn plain() -> Peer {
        Peer {
            address: Some("192.0.2.1".parse().unwrap()),
            certificate: None,
            is_private: false,
        }
    }

    fn map(headers: &[(&str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                header::HeaderName::try_from(*name).unwrap(),
                header::HeaderValue::from_str(value).unwrap(),
            );
        }
        map
    }
}
