//! `auto`, and a config that names no backend: each node says in its lease how it wants to be reached, and is reached so.
//!
//! What a node receives is one encapsulation, [`Speaks`]; what it sends is that of the peer's lease. So nodes need not agree, and one
//! that cannot have vxlan's port does not cut itself off.
//!
//! | config | receives |
//! |---|---|
//! | `"Type": "auto"` | vxlan; udp while somebody else has vxlan's port |
//! | no `Backend` | udp, which is what such a config means to flannel, whose nodes may share the network |
//!
//! Limits: flannel knows no `auto` and refuses to start with it.

use std::net::SocketAddr;

use crate::addr::{AddrError, MacAddr, Mtu, Prefix};
use crate::backend::udp::{Udp, UdpBackend, UdpHop};
use crate::backend::vxlan::{Vxlan, VxlanBackend, VxlanHop};
use crate::backend::{
    Backend, BackendError, Carrier, LeaseData, Networks, OversizePolicy, Underlay, Unreachable,
};
use crate::dataplane::datagram::Envelope;
use crate::dataplane::route::Hop;
use crate::dataplane::stats::DropReason;
use crate::dataplane::{Encap, Inner, Manners};
use crate::lease::LeaseAttrs;

/// What a node receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// flannel's udp.
    Udp,
    /// flannel's vxlan.
    Vxlan,
}

/// Why it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// The config names no backend.
    Unnamed,
    /// The better one can be had.
    Better,
    /// Somebody has the port of the better one.
    PortTaken,
}

/// Both encapsulations, one of them for what arrives.
#[derive(Clone, Copy, Debug)]
pub struct Either {
    speaks: Speaks,
    vxlan: Vxlan,
}

/// How one prefix of a peer is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EitherHop {
    /// By udp.
    Udp(UdpHop),
    /// By vxlan.
    Vxlan(VxlanHop),
}

impl Hop for EitherHop {
    #[inline]
    fn endpoint(&self) -> SocketAddr {
        match self {
            Self::Udp(hop) => hop.endpoint(),
            Self::Vxlan(hop) => hop.endpoint(),
        }
    }
}

impl Encap for Either {
    type Hop = EitherHop;

    #[inline]
    fn outbound(&self, hop: &EitherHop) -> Manners {
        match hop {
            EitherHop::Udp(hop) => Udp.outbound(hop),
            EitherHop::Vxlan(hop) => self.vxlan.outbound(hop),
        }
    }

    #[inline]
    fn inbound(&self) -> Manners {
        match self.speaks {
            Speaks::Udp => Udp.inbound(),
            Speaks::Vxlan => self.vxlan.inbound(),
        }
    }

    #[inline]
    fn header_len(&self, hop: &EitherHop) -> usize {
        match hop {
            EitherHop::Udp(hop) => Udp.header_len(hop),
            EitherHop::Vxlan(hop) => self.vxlan.header_len(hop),
        }
    }

    #[inline]
    fn push(&self, hop: &EitherHop, inner: Inner, out: &mut [u8]) {
        match hop {
            EitherHop::Udp(hop) => Udp.push(hop, inner, out),
            EitherHop::Vxlan(hop) => self.vxlan.push(hop, inner, out),
        }
    }

    #[inline]
    fn pull(&self, envelope: &Envelope, datagram: &[u8]) -> Result<usize, DropReason> {
        match self.speaks {
            Speaks::Udp => Udp.pull(envelope, datagram),
            Speaks::Vxlan => self.vxlan.pull(envelope, datagram),
        }
    }
}

/// The backend: both, and which of them is received.
#[derive(Clone, Copy, Debug)]
pub struct AutoBackend {
    udp: UdpBackend,
    vxlan: VxlanBackend,
    speaks: Speaks,
    reason: Reason,
}

impl AutoBackend {
    /// Reads the network's `Backend` object; settings of either kind may stand in it, but `Port`, which could mean one of two.
    ///
    /// # Errors
    /// A field has the wrong type, or a value outside its range, or there is a `Port`.
    pub fn parse(json: &str, mac: MacAddr) -> Result<Self, BackendError> {
        if super::settings(json)?.raw("Port").is_some() {
            return Err(BackendError::AutoPort);
        }
        Ok(Self {
            udp: UdpBackend::parse(json)?,
            vxlan: VxlanBackend::parse(json, mac)?,
            speaks: Speaks::Vxlan,
            reason: Reason::Better,
        })
    }

    /// For a config that names no backend.
    ///
    /// # Errors
    /// None that an empty object could cause.
    pub fn unnamed(mac: MacAddr) -> Result<Self, BackendError> {
        Ok(Self {
            speaks: Speaks::Udp,
            reason: Reason::Unnamed,
            ..Self::parse("{}", mac)?
        })
    }

    /// The UDP port that is received on.
    pub fn port(&self) -> u16 {
        match self.speaks {
            Speaks::Udp => self.udp.port(),
            Speaks::Vxlan => self.vxlan.port(),
        }
    }

    /// The same after a look at the port that [`Backend::wanted_port`] or [`Self::port`] named.
    pub fn settled(self, port_taken: bool) -> Self {
        match (self.reason, port_taken) {
            (Reason::Unnamed, _) => self,
            (Reason::Better | Reason::PortTaken, true) => Self {
                speaks: Speaks::Udp,
                reason: Reason::PortTaken,
                ..self
            },
            (Reason::Better | Reason::PortTaken, false) => Self {
                speaks: Speaks::Vxlan,
                reason: Reason::Better,
                ..self
            },
        }
    }
}

impl Backend for AutoBackend {
    type Encap = Either;

    fn name(&self) -> &'static str {
        match self.speaks {
            Speaks::Udp => self.udp.name(),
            Speaks::Vxlan => self.vxlan.name(),
        }
    }

    fn reason(&self) -> String {
        match self.reason {
            Reason::Unnamed => {
                "the network config names no backend, and udp is what that means to flannel".to_owned()
            }
            Reason::Better => "auto: vxlan, which needs nothing of this kernel, can be had".to_owned(),
            Reason::PortTaken => format!(
                "auto: somebody else has vxlan's port {}; back to vxlan when it is free",
                self.vxlan.port()
            ),
        }
    }

    fn wanted_port(&self) -> Option<u16> {
        (self.reason == Reason::PortTaken).then(|| self.vxlan.port())
    }

    fn has_another(&self) -> bool {
        self.reason == Reason::Better
    }

    fn encap(&self) -> Either {
        Either {
            speaks: self.speaks,
            vxlan: self.vxlan.encap(),
        }
    }

    fn carrier(&self) -> Carrier {
        match self.speaks {
            Speaks::Udp => self.udp.carrier(),
            Speaks::Vxlan => self.vxlan.carrier(),
        }
    }

    fn overhead(&self, hop: &EitherHop) -> u16 {
        match hop {
            EitherHop::Udp(hop) => self.udp.overhead(hop),
            EitherHop::Vxlan(hop) => self.vxlan.overhead(hop),
        }
    }

    fn oversize(&self) -> OversizePolicy {
        match self.speaks {
            Speaks::Udp => self.udp.oversize(),
            Speaks::Vxlan => self.vxlan.oversize(),
        }
    }

    fn notes(&self) -> Vec<&'static str> {
        self.vxlan.notes()
    }

    fn direct_routing(&self) -> bool {
        self.vxlan.direct_routing()
    }

    fn lease_data(&self, networks: Networks) -> LeaseData {
        match self.speaks {
            Speaks::Udp => self.udp.lease_data(networks),
            Speaks::Vxlan => self.vxlan.lease_data(networks),
        }
    }

    fn inner_mtu(&self, link_mtu: Mtu, underlay: Underlay) -> Result<Mtu, AddrError> {
        match self.speaks {
            Speaks::Udp => self.udp.inner_mtu(link_mtu, underlay),
            Speaks::Vxlan => self.vxlan.inner_mtu(link_mtu, underlay),
        }
    }

    fn hop(&self, prefix: Prefix, attrs: &LeaseAttrs, underlay: Underlay) -> Result<EitherHop, Unreachable> {
        if attrs.backend_type == self.vxlan.name() {
            self.vxlan.hop(prefix, attrs, underlay).map(EitherHop::Vxlan)
        } else {
            self.udp.hop(prefix, attrs, underlay).map(EitherHop::Udp)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddr = MacAddr::from_octets([2, 0, 0, 0, 0, 1]);
    const UNDERLAY: Underlay = Underlay {
        v4: Some(std::net::Ipv4Addr::new(192, 0, 2, 1)),
        v6: None,
    };

    fn hop(backend: &AutoBackend, lease: &str) -> Result<EitherHop, Unreachable> {
        let prefix = Prefix::V4("10.244.2.0/24".parse().unwrap());
        backend.hop(
            prefix,
            &LeaseAttrs::from_json(lease.as_bytes()).unwrap(),
            UNDERLAY,
        )
    }

    #[test]
    fn each_peer_is_reached_as_its_lease_says() {
        for backend in [
            AutoBackend::parse("{}", MAC).unwrap(),
            AutoBackend::parse("{}", MAC).unwrap().settled(true),
            AutoBackend::unnamed(MAC).unwrap(),
        ] {
            let plain = hop(&backend, r#"{"PublicIP":"192.0.2.2"}"#).unwrap();
            assert_eq!(plain.endpoint().to_string(), "192.0.2.2:8285");
            assert_eq!(
                (backend.overhead(&plain), backend.encap().header_len(&plain)),
                (28, 0)
            );
            let vxlan = hop(
                &backend,
                r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VtepMAC":"02:00:00:00:00:02"}}"#,
            );
            let vxlan = vxlan.unwrap();
            assert_eq!(vxlan.endpoint().to_string(), "192.0.2.2:8472");
            assert_eq!(
                (backend.overhead(&vxlan), backend.encap().header_len(&vxlan)),
                (50, 22)
            );
        }
    }

    #[test]
    fn a_taken_port_means_udp_until_it_is_free() {
        let auto = AutoBackend::parse("{}", MAC).unwrap();
        assert_eq!(
            (auto.name(), auto.port(), auto.wanted_port()),
            ("vxlan", 8472, None)
        );
        let second = auto.settled(true);
        assert_eq!(
            (second.name(), second.port(), second.wanted_port()),
            ("udp", 8285, Some(8472))
        );
        assert!(second.reason().contains("8472"), "{}", second.reason());
        assert_eq!(second.settled(false).name(), "vxlan");
    }

    #[test]
    fn a_config_without_backend_means_udp_whatever_the_ports() {
        let networks = Networks { v4: true, v6: false };
        for taken in [false, true] {
            let backend = AutoBackend::unnamed(MAC).unwrap().settled(taken);
            assert_eq!((backend.name(), backend.wanted_port()), ("udp", None));
            assert_eq!(
                backend.lease_data(networks),
                LeaseData::default(),
                "as flannel writes it"
            );
        }
    }

    #[test]
    fn a_port_that_could_mean_either_is_refused() {
        let error = AutoBackend::parse(r#"{"Type":"auto","Port":8472}"#, MAC)
            .err()
            .unwrap();
        assert!(error.to_string().contains("Backend.Port"), "{error}");
    }
}
