//! Encapsulations: one file each, holding header, lease data and next hop.
//!
//! Nothing here knows threads, sockets or stores. A new encapsulation is a file with an [`Encap`] and a [`Backend`], and one arm in [`select`].
//! A backend without packets of its own is a file with a [`NoTunnel`].

pub mod alloc;
pub mod auto;
pub mod host_gw;
pub mod srv6;
pub mod udp;
pub mod vxlan;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use crate::addr::{AddrError, Ipv6Prefix, MacAddr, Mtu, Prefix, Vni};
use crate::dataplane::endpoint::{Domain, LocalSids, SidError};
use crate::dataplane::{Encap, Oversize};
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

/// Which address families the overlay has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Networks {
    /// It has IPv4.
    pub v4: bool,
    /// It has IPv6.
    pub v6: bool,
}

/// What a node's lease says of its backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseData {
    /// `BackendType`; empty where flannel writes none.
    pub kind: &'static str,
    /// `BackendData`, JSON text.
    pub v4: Option<String>,
    /// `BackendV6Data`, JSON text.
    pub v6: Option<String>,
}

/// What becomes of outer datagrams larger than their path, by family of the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OversizePolicy {
    /// Over IPv4.
    pub v4: Oversize,
    /// Over IPv6.
    pub v6: Oversize,
}

/// What carries the packets of a backend over the underlay.
#[derive(Clone, Debug)]
pub enum Carrier {
    /// UDP sockets.
    Udp {
        /// The port it is spoken on.
        port: u16,
        /// How many source ports flows are spread over unless the user says otherwise; 1 is the port it is spoken on.
        source_ports: usize,
        /// What tells it from other networks on that port, if anything does.
        vni: Option<Vni>,
    },
    /// Raw IPv6 sockets.
    Raw {
        /// This node's SIDs, and the locators that are to be its own.
        sids: Arc<LocalSids>,
        /// The source of what this node sends.
        source: Ipv6Addr,
        /// Where packets that pass through may come from and go to.
        domain: Domain,
    },
}

impl Carrier {
    /// What tells it from other networks on its port, if anything does.
    pub fn vni(&self) -> Option<Vni> {
        match self {
            Self::Udp { vni, .. } => *vni,
            Self::Raw { .. } => None,
        }
    }

    /// The UDP port, if there is one.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Udp { port, .. } => Some(*port),
            Self::Raw { .. } => None,
        }
    }
}

/// A node's place in underlay and overlay.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Ethernet address of the underlay interface, if it has one.
    pub mac: Option<MacAddr>,
    /// The address peers are told.
    pub public_v4: Option<Ipv4Addr>,
    /// Which of the network's subnets is its own, counted from the first; none before there is a lease.
    pub subnet: Option<u128>,
}

/// A prefix of a peer's, outside the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locator {
    /// The prefix.
    pub prefix: Ipv6Prefix,
    /// Through which address, if that is on our link.
    pub gateway: Option<Ipv6Addr>,
    /// At which Ethernet address, where there is no neighbour discovery.
    pub station: Option<MacAddr>,
}

/// One encapsulation as the daemon sees it.
pub trait Backend: Clone + Send + 'static {
    /// Its packets.
    type Encap: Encap + Sync;

    /// Its name in configs and logs.
    fn name(&self) -> &'static str;

    /// Its packets.
    fn encap(&self) -> Self::Encap;

    /// What carries its packets.
    fn carrier(&self) -> Carrier;

    /// Whether the underlay must have IPv6, whatever the overlay has.
    fn needs_v6(&self) -> bool {
        false
    }

    /// The same on a node in this place; asked once before there is a lease, and once more with it.
    ///
    /// # Errors
    /// The config leaves no room for this node.
    fn placed(self, _place: &Place) -> Result<Self, BackendError> {
        Ok(self)
    }

    /// The prefixes of the underlay that belong to the backend, where nobody else routes anything.
    fn blocks(&self) -> Vec<Ipv6Prefix> {
        Vec::new()
    }

    /// How a peer on our own link is reached, if its packets do not go to its public address.
    fn locator_of(&self, _attrs: &LeaseAttrs) -> Option<Locator> {
        None
    }

    /// Where packets by this hop go after its endpoint: routers behind that name these when a packet is too big.
    fn stops(&self, _hop: &<Self::Encap as Encap>::Hop) -> Vec<IpAddr> {
        Vec::new()
    }

    /// Bytes added to an inner packet on its way, the outer IP header included.
    fn overhead(&self, hop: &<Self::Encap as Encap>::Hop) -> u16;

    /// Why it was chosen, in words.
    fn reason(&self) -> String {
        CONFIGURED.to_owned()
    }

    /// The port that somebody else has, and without which this backend is only second choice.
    fn wanted_port(&self) -> Option<u16> {
        None
    }

    /// Whether there is a second choice, should somebody else have the port.
    fn has_another(&self) -> bool {
        false
    }

    /// What the underlay is taken to carry, where the link carries `interface`.
    fn link_mtu(&self, interface: Mtu) -> Mtu {
        interface
    }

    /// What becomes of outer datagrams larger than their path.
    fn oversize(&self) -> OversizePolicy;

    /// What is to be said once about settings that do nothing here.
    fn notes(&self) -> Vec<&'static str> {
        Vec::new()
    }

    /// Whether peers on the same link are to be reached by plain routes.
    fn direct_routing(&self) -> bool {
        false
    }

    /// What the lease says of it in an overlay of these families.
    fn lease_data(&self, networks: Networks) -> LeaseData;

    /// The largest inner packet over a link of `link_mtu`.
    ///
    /// # Errors
    /// Too little is left.
    fn inner_mtu(&self, link_mtu: Mtu, underlay: Underlay) -> Result<Mtu, AddrError>;

    /// The next hop for `prefix` of the peer that `attrs` describes.
    ///
    /// # Errors
    /// Why it cannot be reached from `underlay`.
    fn hop(
        &self,
        prefix: Prefix,
        attrs: &LeaseAttrs,
        underlay: Underlay,
    ) -> Result<<Self::Encap as Encap>::Hop, Unreachable>;
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
    ) -> Result<Option<IpAddr>, Unreachable>;
}

/// Why a peer cannot be reached.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// Its addresses are all of a family that this node's underlay lacks.
    #[error("it has no address that this node's underlay can reach")]
    NoAddress,
    /// It speaks another encapsulation.
    #[error("its lease says backend {0:?}")]
    OtherBackend(String),
    /// Its lease lacks what the backend needs.
    #[error("its lease has no BackendData")]
    NoData,
    /// None of its SIDs ends a tunnel of this family.
    #[error("its lease has no SID for this address family")]
    NoSid,
    /// The way there cannot be put into a header.
    #[error("{0}")]
    Path(String),
    /// What its lease says of the backend is wrong.
    #[error("its lease is wrong: {0}")]
    Data(#[from] JsonError),
}

/// Why the network's backend cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// We do not have it.
    #[error(
        "the network config asks for backend {kind:?}, which kersey does not have; it has auto, udp, vxlan, srv6, host-gw and alloc"
    )]
    Unknown {
        /// What was asked for.
        kind: String,
    },
    /// Its settings are wrong.
    #[error("the network config is invalid: Backend: {0}")]
    Settings(JsonError),
    /// The port is out of range.
    #[error("the network config is invalid: Backend.Port is {0}: a UDP port is from 1 to 65535")]
    Port(u32),
    /// The network identifier is out of range.
    #[error("the network config is invalid: Backend.VNI is {0}: a VNI is from 0 to {max}", max = Vni::MAX)]
    Vni(u32),
    /// A SID of this node cannot be.
    #[error("this node's SIDs are invalid: {0}")]
    Sids(SidError),
    /// An address cannot be made.
    #[error(transparent)]
    Addr(AddrError),
    /// Peers route nothing outside the block.
    #[error(
        "--srv6-locator {locator} is not in the network's Backend.Block {block}: peers would not route it"
    )]
    LocatorElsewhere {
        /// The node's locator.
        locator: Ipv6Prefix,
        /// The network's block.
        block: Ipv6Prefix,
    },
    /// There are more nodes than locators.
    #[error(
        "the network config is invalid: Backend.LocatorLen leaves {bits} bits for the node, and this one is number {number}: make it longer"
    )]
    LocatorLen {
        /// Bits between block and locator.
        bits: u8,
        /// The node's number.
        number: u128,
    },
    /// `Port` where it could mean one of two.
    #[error(
        "the network config is invalid: Backend.Port is given with Type auto, which may mean udp or vxlan: name one of them"
    )]
    AutoPort,
    /// The MTU is out of range.
    #[error("the network config is invalid: Backend.MTU is {0}: an MTU is from {min} to 65535", min = Mtu::MIN)]
    Mtu(u32),
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

// Both stand in the error's own text, so they are no source: a chain of causes would say them twice.
impl From<JsonError> for BackendError {
    fn from(error: JsonError) -> Self {
        Self::Settings(error)
    }
}

impl From<SidError> for BackendError {
    fn from(error: SidError) -> Self {
        Self::Sids(error)
    }
}

/// What a backend is to know of the node it runs on.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its Ethernet address inside the overlay; the same for as long as the node lives.
    pub mac: MacAddr,
    /// Its part in segment routing.
    pub srv6: srv6::Srv6Node,
}

/// The backends there are.
#[derive(Clone, Debug)]
pub enum AnyBackend {
    /// flannel's udp.
    Udp(udp::UdpBackend),
    /// flannel's vxlan.
    Vxlan(vxlan::VxlanBackend),
    /// Segment routing over IPv6.
    Srv6(Box<srv6::Srv6Backend>),
    /// Udp or vxlan, as it turns out.
    Auto(auto::AutoBackend),
    /// flannel's host-gw.
    HostGw(host_gw::HostGw),
    /// flannel's alloc.
    Alloc(alloc::Alloc),
}

/// Why a backend was chosen that the config names.
pub const CONFIGURED: &str = "the network config says so";

/// Picks the backend a network config names, or that for one that names none.
///
/// # Errors
/// See [`BackendError`].
pub fn select(kind: Option<&str>, json: &str, identity: Identity) -> Result<AnyBackend, BackendError> {
    let Some(kind) = kind else {
        return Ok(AnyBackend::Auto(auto::AutoBackend::unnamed(identity.mac)?));
    };
    match kind {
        "auto" => Ok(AnyBackend::Auto(auto::AutoBackend::parse(json, identity.mac)?)),
        "udp" => Ok(AnyBackend::Udp(udp::UdpBackend::parse(json)?)),
        "vxlan" => Ok(AnyBackend::Vxlan(vxlan::VxlanBackend::parse(json, identity.mac)?)),
        "srv6" => Ok(AnyBackend::Srv6(Box::new(srv6::Srv6Backend::parse(
            json,
            identity.srv6,
        )?))),
        "host-gw" => Ok(AnyBackend::HostGw(host_gw::HostGw)),
        "alloc" => Ok(AnyBackend::Alloc(alloc::Alloc)),
        _ => Err(BackendError::Unknown {
            kind: kind.to_owned(),
        }),
    }
}

/// The keys that a backend reads of its settings, if it is one of ours; their case does not matter.
pub fn keys(kind: &str) -> Option<&'static [&'static str]> {
    let keys: &[&str] = match kind {
        "udp" => &["Type", "Port"],
        // A port is refused by the latter, which is not to ignore it.
        "vxlan" | "auto" => &["Type", "VNI", "Port", "MTU", "GBP", "Learning", "DirectRouting"],
        "srv6" => &[
            "Type",
            "Block",
            "LocatorLen",
            "Mode",
            "MTU",
            "Domain",
            "Paths",
            "HMAC",
            "HMACKeyID",
        ],
        "host-gw" | "alloc" => &["Type"],
        _ => return None,
    };
    Some(keys)
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

/// Reads a backend's settings.
fn settings(json: &str) -> Result<Object<'_>, BackendError> {
    /// They are part of a config, which has its own limit.
    const LIMIT: usize = 1 << 20;
    Ok(Object::parse(json, LIMIT)?)
}

/// Reads `Port` of a backend's settings.
fn port(settings: &Object<'_>, default: u16) -> Result<u16, BackendError> {
    match settings.uint("Port")? {
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

    fn identity() -> Identity {
        Identity {
            mac: MacAddr::from_octets([2, 0x11, 0x22, 0x33, 0x44, 1]),
            srv6: srv6::Srv6Node::default(),
        }
    }

    fn refused(kind: &str, json: &str) -> String {
        select(Some(kind), json, identity()).err().unwrap().to_string()
    }

    #[test]
    fn backends_without_a_tunnel_are_found_by_name() {
        assert!(matches!(
            select(Some("host-gw"), r#"{"Type":"host-gw"}"#, identity()),
            Ok(AnyBackend::HostGw(_))
        ));
        assert!(matches!(
            select(Some("alloc"), r#"{"Type":"ALLOC"}"#, identity()),
            Ok(AnyBackend::Alloc(_))
        ));
    }

    #[test]
    fn a_backend_we_lack_and_bad_settings_are_named() {
        for (kind, json, named) in [
            ("ipip", r#"{"Type":"ipip"}"#, "\"ipip\""),
            ("udp", r#"{"Type":"udp","Port":70000}"#, "Backend.Port is 70000"),
            ("udp", r#"{"Type":"udp","Port":"8285"}"#, "Port is \"8285\""),
            (
                "vxlan",
                r#"{"Type":"vxlan","VNI":16777216}"#,
                "Backend.VNI is 16777216",
            ),
            ("vxlan", r#"{"Type":"vxlan","VNI":-1}"#, "VNI is -1"),
            (
                "vxlan",
                r#"{"Type":"vxlan","Port":65536}"#,
                "Backend.Port is 65536",
            ),
            ("vxlan", r#"{"Type":"vxlan","MTU":65536}"#, "Backend.MTU is 65536"),
            ("vxlan", r#"{"Type":"vxlan","GBP":"yes"}"#, "GBP is \"yes\""),
        ] {
            let error = refused(kind, json);
            assert!(error.contains(named), "{json}: {error}");
        }
    }

    #[test]
    fn keys_match_whatever_their_case() {
        let AnyBackend::Udp(backend) =
            select(Some("udp"), r#"{"Type":"udp","port":9000}"#, identity()).unwrap()
        else {
            panic!("another backend");
        };
        assert_eq!(backend.port(), 9000);
    }
}
