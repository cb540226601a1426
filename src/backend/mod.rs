//! Encapsulations: one file each, holding header, lease data and next hop.
//!
//! Nothing here knows threads, sockets or stores. A new encapsulation is a file with an [`Encap`] and a [`Backend`], and one arm in [`select`].
//! A backend without packets of its own is a file with a [`NoTunnel`].

pub mod alloc;
pub mod host_gw;
pub mod udp;

use std::net::IpAddr;

use crate::addr::{AddrError, Mtu, Prefix};
use crate::dataplane::Encap;
use crate::lease::LeaseAttrs;
use crate::lease::json::{JsonError, Object};

/// Which address families this node's underlay has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Our IPv4 address there.
    pub v4: Option<std::net::Ipv4Addr>,
    /// Our IPv6 address there.
    pub v6: Option<std::net::Ipv6Addr>,
}

/// One encapsulation as the daemon sees it.
pub trait Backend: Clone + Send + 'static {
    /// Its packets.
    type Encap: Encap + Sync;

    /// Its name in configs and logs.
    fn name(&self) -> &'static str;

    /// Its packets.
    fn encap(&self) -> Self::Encap;

    /// The UDP port it is spoken on.
    fn port(&self) -> u16;

    /// What the lease says of it: `BackendType`, `BackendData`, `BackendV6Data`.
    fn lease_data(&self) -> (String, Option<String>, Option<String>);

    /// The largest inner packet over a link of `link_mtu`.
    ///
    /// # Errors
    /// Too little is left.
    fn inner_mtu(&self, link_mtu: Mtu, underlay: Underlay) -> Result<Mtu, AddrError>;

    /// The next hop for `prefix` of the peer that `attrs` describes; `None` if it cannot be reached from `underlay`.
    fn hop(
        &self,
        prefix: Prefix,
        attrs: &LeaseAttrs,
        underlay: Underlay,
    ) -> Option<<Self::Encap as Encap>::Hop>;

    /// Whether a peer on our own link gets a kernel route through its public address, past the tunnel. It stays a peer of the tunnel
    /// all the same: what it still sends through there is taken.
    fn direct_routing(&self) -> bool {
        false
    }
}

/// A backend without packets of its own: the kernel carries them bare, or nobody does.
pub trait NoTunnel: Copy + Send + 'static {
    /// Its name in configs and logs.
    fn name(&self) -> &'static str;

    /// What the lease says: `BackendType`, empty for none. There is no `BackendData`.
    fn lease_type(&self) -> &'static str;

    /// Whether the backend works with these addresses of `interface` and those peers are told.
    ///
    /// # Errors
    /// It does not, whatever happens next.
    fn check(&self, interface: &str, own: Underlay, public: Underlay) -> Result<(), BackendError>;

    /// Whether it makes kernel routes to peers.
    fn makes_routes(&self) -> bool;

    /// The gateway to `prefix` of the peer that `attrs` describes; none if the backend makes no routes.
    ///
    /// # Errors
    /// This peer can have no route.
    fn gateway(
        &self,
        prefix: Prefix,
        attrs: &LeaseAttrs,
        underlay: Underlay,
    ) -> Result<Option<IpAddr>, NoRoute>;
}

/// Why a peer gets no kernel route.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// Its lease is of another backend.
    #[error("its lease is of another backend{}", named(.0))]
    OtherBackend(String),
    /// One of us lacks an address of the family.
    #[error("there is no address of that family on both sides")]
    NoAddress,
}

/// A backend's name in brackets; some put none into a lease.
fn named(kind: &str) -> String {
    if kind.is_empty() {
        return String::new();
    }
    format!(" ({kind:?})")
}

/// Why the network's backend cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// We do not have it.
    #[error(
        "the network config asks for backend {kind:?}, which kersey does not have; it has udp, host-gw and alloc"
    )]
    Unknown {
        /// What was asked for.
        kind: String,
    },
    /// Its settings are wrong.
    #[error("the network config is invalid: Backend: {0}")]
    Settings(#[from] JsonError),
    /// The port is out of range.
    #[error("the network config is invalid: Backend.Port is {0}: a UDP port is from 1 to 65535")]
    Port(u32),
    /// Peers are told an address that does not lead straight here.
    #[error(
        "backend {backend} makes the public address a gateway, and {public} is not {interface}'s address, which is {own}: \
         drop --public-ip and --public-ipv6, or choose the interface with that address by --iface"
    )]
    PublicIpElsewhere {
        /// The backend.
        backend: &'static str,
        /// The underlay interface.
        interface: String,
        /// Its address.
        own: IpAddr,
        /// The address peers would be told.
        public: IpAddr,
    },
}

/// The backends there are.
#[derive(Clone, Debug)]
pub enum AnyBackend {
    /// flannel's udp.
    Udp(udp::UdpBackend),
    /// flannel's host-gw.
    HostGw(host_gw::HostGw),
    /// flannel's alloc.
    Alloc(alloc::Alloc),
}

/// Picks the backend a network config names.
///
/// # Errors
/// See [`BackendError`].
pub fn select(kind: &str, json: &str) -> Result<AnyBackend, BackendError> {
    match kind {
        "udp" => Ok(AnyBackend::Udp(udp::UdpBackend::parse(json)?)),
        "host-gw" => Ok(AnyBackend::HostGw(host_gw::HostGw)),
        "alloc" => Ok(AnyBackend::Alloc(alloc::Alloc)),
        _ => Err(BackendError::Unknown {
            kind: kind.to_owned(),
        }),
    }
}

/// The address at which a peer is reached for `prefix`: of the prefix's own family if both sides have it, else of the other.
///
/// Both sides choose alike, so that a peer's datagrams come from where ours to it go, which the ingress check relies on.
pub fn peer_address(prefix: Prefix, attrs: &LeaseAttrs, underlay: Underlay) -> Option<IpAddr> {
    let v4 =
        (!attrs.public_ip.is_unspecified() && underlay.v4.is_some()).then_some(IpAddr::V4(attrs.public_ip));
    let v6 = attrs
        .public_ipv6
        .filter(|_| underlay.v6.is_some())
        .map(IpAddr::V6);
    match prefix {
        Prefix::V4(_) => v4.or(v6),
        Prefix::V6(_) => v6.or(v4),
    }
}

/// Reads `Port` of a backend's settings.
fn port(json: &str, default: u16) -> Result<u16, BackendError> {
    /// A backend's settings are part of a config, which has its own limit.
    const LIMIT: usize = 1 << 20;
    match Object::parse(json, LIMIT)?.uint("Port")? {
        None | Some(0) => Ok(default),
        Some(port) => u16::try_from(port).map_err(|_| BackendError::Port(port)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attrs(json: &str) -> LeaseAttrs {
        LeaseAttrs::from_json(json.as_bytes()).unwrap()
    }

    #[test]
    fn a_peer_is_reached_over_the_family_both_have() {
        let dual = attrs(r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2"}"#);
        let only_v4 = attrs(r#"{"PublicIP":"192.0.2.2"}"#);
        let only_v6 = attrs(r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::2"}"#);
        let inside_v4 = Prefix::V4("10.244.2.0/24".parse().unwrap());
        let inside_v6 = Prefix::V6("fd00::/64".parse().unwrap());
        let both = Underlay {
            v4: Some([192, 0, 2, 1].into()),
            v6: Some("2001:db8::1".parse().unwrap()),
        };
        let v4 = Underlay { v6: None, ..both };
        let v6 = Underlay { v4: None, ..both };
        let to_v4: Option<IpAddr> = Some([192, 0, 2, 2].into());
        let to_v6: Option<IpAddr> = Some("2001:db8::2".parse().unwrap());
        for (what, prefix, attrs, underlay, expected) in [
            ("both, IPv4 inside", inside_v4, &dual, both, to_v4),
            ("both, IPv6 inside", inside_v6, &dual, both, to_v6),
            ("peer has IPv4 only", inside_v6, &only_v4, both, to_v4),
            ("peer has IPv6 only", inside_v4, &only_v6, both, to_v6),
            ("we have IPv4 only", inside_v6, &dual, v4, to_v4),
            ("we have IPv6 only", inside_v4, &dual, v6, to_v6),
            ("nothing in common", inside_v4, &only_v6, v4, None),
        ] {
            assert_eq!(peer_address(prefix, attrs, underlay), expected, "{what}");
        }
    }

    #[test]
    fn backends_without_a_tunnel_are_found_by_name() {
        assert!(matches!(
            select("host-gw", r#"{"Type":"host-gw"}"#),
            Ok(AnyBackend::HostGw(_))
        ));
        assert!(matches!(
            select("alloc", r#"{"Type":"ALLOC"}"#),
            Ok(AnyBackend::Alloc(_))
        ));
    }

    #[test]
    fn a_backend_we_lack_and_a_bad_port_are_named() {
        let error = select("vxlan", r#"{"Type":"vxlan"}"#).err().unwrap();
        assert!(error.to_string().contains("\"vxlan\""), "{error}");
        let error = select("udp", r#"{"Type":"udp","Port":70000}"#).err().unwrap();
        assert!(error.to_string().contains("Backend.Port is 70000"), "{error}");
        assert!(select("udp", r#"{"Type":"udp","Port":"8285"}"#).is_err());
        let Ok(AnyBackend::Udp(backend)) = select("udp", r#"{"Type":"udp","port":9000}"#) else {
            panic!("udp is udp");
        };
        assert_eq!(backend.port(), 9000, "keys match whatever their case");
    }
}
