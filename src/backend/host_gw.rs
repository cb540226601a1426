//! flannel's `host-gw` backend: no encapsulation; the kernel routes each peer's subnet through the peer's own address.
//!
//! ```text
//! 10.244.2.0/24 via 192.0.2.2 dev eth0        one route a peer and family
//! ```
//!
//! Both ends have to be on one link, as a gateway must be; the kernel refuses a route through any other. And the address in the lease
//! has to be the interface's own, because it is a gateway, not a destination that someone may translate.

use std::net::IpAddr;

use crate::addr::Prefix;
use crate::backend::{BackendError, NoTunnel, Underlay, Unreachable};
use crate::lease::LeaseAttrs;

/// The backend's name, and what it puts into a lease as its type.
pub const NAME: &str = "host-gw";

/// The backend; it has no settings.
#[derive(Clone, Copy, Debug)]
pub struct HostGw;

impl NoTunnel for HostGw {
    fn name(&self) -> &'static str {
        NAME
    }

    fn lease_type(&self) -> &'static str {
        NAME
    }

    fn check(&self, interface: &str, own: Underlay, public: Underlay) -> Result<(), BackendError> {
        let v4 = own.v4.zip(public.v4).filter(|(own, public)| own != public);
        let v6 = own.v6.zip(public.v6).filter(|(own, public)| own != public);
        let differ = v4
            .map(|(own, public)| (own.into(), public.into()))
            .or(v6.map(|(own, public)| (own.into(), public.into())));
        match differ {
            Some((own, public)) => Err(BackendError::PublicIpElsewhere {
                backend: NAME,
                interface: interface.to_owned(),
                own,
                public,
            }),
            None => Ok(()),
        }
    }

    fn makes_routes(&self) -> bool {
        true
    }

    fn gateway(
        &self,
        prefix: Prefix,
        attrs: &LeaseAttrs,
        underlay: Underlay,
    ) -> Result<Option<IpAddr>, Unreachable> {
        // flannel leaves leases of other backends alone, too: their nodes may not take bare packets.
        if attrs.backend_type != NAME {
            return Err(Unreachable::OtherBackend(attrs.backend_type.clone()));
        }
        let gateway = match prefix {
            Prefix::V4(_) => underlay
                .v4
                .filter(|_| !attrs.public_ip.is_unspecified())
                .map(|_| IpAddr::V4(attrs.public_ip)),
            Prefix::V6(_) => underlay.v6.and(attrs.public_ipv6).map(IpAddr::V6),
        };
        match gateway {
            Some(gateway) => Ok(Some(gateway)),
            None => Err(Unreachable::NoAddress),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: &str = r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"host-gw"}"#;

    #[test]
    fn each_family_goes_through_the_peers_address_of_that_family() {
        let (inside_v4, inside_v6) = (v4_prefix("10.244.2.0/24"), v6_prefix("fd00::/64"));
        let (via_v4, via_v6) = (
            Some("192.0.2.2".parse().unwrap()),
            Some("2001:db8::2".parse().unwrap()),
        );
        assert_eq!(HostGw.gateway(inside_v4, &attrs(BOTH), own()), Ok(via_v4));
        assert_eq!(HostGw.gateway(inside_v6, &attrs(BOTH), own()), Ok(via_v6));
        let only_v4 = attrs(r#"{"PublicIP":"192.0.2.2","PublicIPv6":null,"BackendType":"host-gw"}"#);
        assert_eq!(
            HostGw.gateway(inside_v6, &only_v4, own()),
            Err(Unreachable::NoAddress)
        );
        let no_v4_here = Underlay { v4: None, ..own() };
        assert_eq!(
            HostGw.gateway(inside_v4, &attrs(BOTH), no_v4_here),
            Err(Unreachable::NoAddress)
        );
    }

    #[test]
    fn a_lease_of_another_backend_is_no_gateway() {
        let udp = attrs(r#"{"PublicIP":"192.0.2.2","PublicIPv6":null}"#);
        let refused = HostGw.gateway(v4_prefix("10.244.2.0/24"), &udp, own());
        assert_eq!(refused, Err(Unreachable::OtherBackend(String::new())));
    }

    #[test]
    fn the_public_address_has_to_be_the_interfaces_own() {
        assert!(HostGw.check("eth0", own(), own()).is_ok());
        let translated = Underlay {
            v4: Some([203, 0, 113, 9].into()),
            ..own()
        };
        let error = HostGw.check("eth0", own(), translated).unwrap_err().to_string();
        for part in ["host-gw", "203.0.113.9", "eth0", "192.0.2.1", "--public-ip"] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
        let translated = Underlay {
            v6: Some([9; 8].into()),
            ..own()
        };
        assert!(HostGw.check("eth0", own(), translated).is_err());
    }

    fn own() -> Underlay {
        Underlay {
            v4: Some([192, 0, 2, 1].into()),
            v6: Some("2001:db8::1".parse().unwrap()),
        }
    }

    fn attrs(json: &str) -> LeaseAttrs {
        LeaseAttrs::from_json(json.as_bytes()).unwrap()
    }

    fn v4_prefix(text: &str) -> Prefix {
        Prefix::V4(text.parse().unwrap())
    }

    fn v6_prefix(text: &str) -> Prefix {
        Prefix::V6(text.parse().unwrap())
    }
}
