//! flannel's `alloc` backend: a lease and its `subnet.env`, and nothing else. Somebody else routes.

use std::net::IpAddr;

use crate::addr::Prefix;
use crate::backend::{BackendError, NoTunnel, Underlay, Unreachable};
use crate::lease::LeaseAttrs;

/// The backend; it has no settings.
#[derive(Clone, Copy, Debug)]
pub struct Alloc;

impl NoTunnel for Alloc {
    fn name(&self) -> &'static str {
        "alloc"
    }

    fn lease_type(&self) -> &'static str {
        ""
    }

    fn check(&self, _interface: &str, _own: Underlay, _public: Underlay) -> Result<(), BackendError> {
        Ok(())
    }

    fn makes_routes(&self) -> bool {
        false
    }

    fn gateway(
        &self,
        _prefix: Prefix,
        _attrs: &LeaseAttrs,
        _underlay: Underlay,
    ) -> Result<Option<IpAddr>, Unreachable> {
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lease_says_where_the_node_is_and_no_more() {
        let attrs = LeaseAttrs {
            public_ip: [10, 50, 0, 1].into(),
            public_ipv6: None,
            backend_type: Alloc.lease_type().to_owned(),
            backend_data: None,
            backend_v6_data: None,
        };
        assert_eq!(attrs.to_json(), r#"{"PublicIP":"10.50.0.1","PublicIPv6":null}"#);
    }
}
