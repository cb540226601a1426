//! Socket addresses in the kernel's form.

use std::mem;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::ptr;

/// A socket address as the kernel wants it.
#[derive(Clone, Copy)]
pub(super) struct RawAddr {
    pub(super) storage: libc::sockaddr_storage,
    pub(super) len: libc::socklen_t,
}

impl RawAddr {
    pub(super) fn zeroed() -> Self {
        // SAFETY: all-zero bytes are a valid `sockaddr_storage` (plain integers, family AF_UNSPEC).
        let storage = unsafe { mem::zeroed() };
        Self {
            storage,
            len: mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t,
        }
    }

    /// That of a station on a link of Ethernet, for IPv6 packets.
    pub(super) fn on_link(index: u32, mac: [u8; 6]) -> Self {
        let mut raw = Self::zeroed();
        let mut value = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as libc::c_ushort,
            sll_protocol: (libc::ETH_P_IPV6 as u16).to_be(),
            sll_ifindex: index as libc::c_int,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: [0; 8],
        };
        value.sll_addr[..6].copy_from_slice(&mac);
        // SAFETY: `sockaddr_storage` is larger than `sockaddr_ll` and at least as aligned.
        unsafe {
            ptr::from_mut(&mut raw.storage)
                .cast::<libc::sockaddr_ll>()
                .write(value)
        };
        raw.len = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        raw
    }

    /// The address, if it is an IP one.
    pub(super) fn parse(&self) -> Option<SocketAddr> {
        match i32::from(self.storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the family says it is a `sockaddr_in`, which is smaller than the storage and no stricter in alignment.
                let addr = unsafe { &*ptr::from_ref(&self.storage).cast::<libc::sockaddr_in>() };
                let ip = Ipv4Addr::from(u32::from_be(addr.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(addr.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above, for `sockaddr_in6`.
                let addr = unsafe { &*ptr::from_ref(&self.storage).cast::<libc::sockaddr_in6>() };
                let ip = Ipv6Addr::from(addr.sin6_addr.s6_addr);
                Some(SocketAddrV6::new(ip, u16::from_be(addr.sin6_port), 0, addr.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

impl From<SocketAddr> for RawAddr {
    fn from(addr: SocketAddr) -> Self {
        let mut raw = Self::zeroed();
        match addr {
            SocketAddr::V4(addr) => {
                let value = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: addr.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: addr.ip().to_bits().to_be(),
                    },
                    sin_zero: [0; 8],
                };
                // SAFETY: `sockaddr_storage` is larger than `sockaddr_in` and at least as aligned.
                unsafe {
                    ptr::from_mut(&mut raw.storage)
                        .cast::<libc::sockaddr_in>()
                        .write(value)
                };
                raw.len = mem::size_of::<libc::sockaddr_in>() as libc::socklen_t;
            }
            SocketAddr::V6(addr) => {
                let value = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: addr.port().to_be(),
                    sin6_flowinfo: addr.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: addr.ip().octets(),
                    },
                    sin6_scope_id: addr.scope_id(),
                };
                // SAFETY: as above, for `sockaddr_in6`.
                unsafe {
                    ptr::from_mut(&mut raw.storage)
                        .cast::<libc::sockaddr_in6>()
                        .write(value)
                };
                raw.len = mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t;
            }
        }
        raw
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_addresses_survive_the_kernels_form() {
        for text in ["192.0.2.1:8285", "[2001:db8::1]:8472", "[fe80::1%3]:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(RawAddr::from(addr).parse(), Some(addr), "{text}");
        }
        assert_eq!(RawAddr::zeroed().parse(), None);
    }
}
