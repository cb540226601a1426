//! What a kernel node has the kernel hold: routes, neighbours, segments and switches.

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::addr::{Ipv6Prefix, MacAddr};
use crate::host::netlink::{Netlink, Route, Seg6Route, Sid};
use crate::host::sysctl;

/// One thing the kernel is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Route(Route),
    Neighbour(u32, Ipv6Addr, MacAddr),
    Encap(Seg6Route),
    Sid(Sid),
    Blackhole(Ipv6Prefix),
    Local(u32, Ipv6Addr),
}

impl Item {
    async fn set(&self, netlink: &Netlink) -> Result<()> {
        match self {
            Self::Route(route) => netlink.replace_route(route).await?,
            Self::Neighbour(index, addr, mac) => {
                netlink
                    .set_neighbour(*index, (*addr).into(), mac.octets())
                    .await?;
            }
            Self::Encap(route) => netlink.replace_seg6_route(route).await?,
            Self::Sid(sid) => netlink.replace_sid(sid).await?,
            Self::Blackhole(prefix) => netlink.replace_blackhole(*prefix).await?,
            Self::Local(index, addr) => netlink.replace_local_route(*index, *addr).await?,
        }
        Ok(())
    }

    pub(super) async fn delete(&self, netlink: &Netlink) -> Result<()> {
        match self {
            Self::Route(route) => netlink.delete_route(route).await?,
            Self::Neighbour(index, addr, _) => netlink.delete_neighbour(*index, (*addr).into()).await?,
            Self::Encap(route) => netlink.delete_seg6_route(route).await?,
            Self::Sid(sid) => netlink.delete_sid(sid).await?,
            Self::Blackhole(prefix) => netlink.delete_blackhole(*prefix).await?,
            Self::Local(index, addr) => netlink.delete_local_route(*index, *addr).await?,
        }
        Ok(())
    }
}

/// Makes the kernel have `wanted`; `installed` is what it has, and stays true if this fails half-way.
pub(super) async fn install(netlink: &Netlink, installed: &mut Vec<Item>, wanted: &[Item]) -> Result<()> {
    let (kept, gone): (Vec<_>, Vec<_>) = installed.drain(..).partition(|item| wanted.contains(item));
    *installed = kept;
    // What goes first may make way for what comes: two routes to one destination are one to the kernel.
    let mut gone = gone.into_iter().rev();
    while let Some(item) = gone.next() {
        if let Err(error) = item.delete(netlink).await {
            installed.push(item);
            installed.extend(gone);
            return Err(error);
        }
    }
    for item in wanted {
        if !installed.contains(item) {
            item.set(netlink).await?;
            installed.push(item.clone());
        }
    }
    Ok(())
}

/// Kernel switches as they were before this node's.
#[derive(Debug, Default)]
pub(super) struct Switches(Vec<(String, String)>);

impl Switches {
    /// Turns on what SRv6 needs, in the caller's namespace: the underlay link takes routing headers, and the node
    /// forwards what comes out of them.
    pub(super) fn turn_on(&mut self, interface: &str) -> Result<()> {
        self.set("ipv4/ip_forward".to_owned(), "1")?;
        self.set("ipv6/conf/all/forwarding".to_owned(), "1")?;
        for scope in ["all", interface] {
            self.set(format!("ipv6/conf/{scope}/seg6_enabled"), "1")?;
            self.set(format!("ipv6/conf/{scope}/seg6_require_hmac"), "0")?;
        }
        Ok(())
    }

    fn set(&mut self, key: String, value: &str) -> Result<()> {
        let old = fs::read_to_string(Path::new("/proc/sys/net").join(&key))
            .with_context(|| format!("this kernel has no switch {key}"))?;
        sysctl::set(&key, value)?;
        self.0.push((key, old.trim().to_owned()));
        Ok(())
    }

    pub(super) fn turn_back(self) -> Result<()> {
        for (key, value) in self.0.iter().rev() {
            sysctl::set(key, value)?;
        }
        Ok(())
    }
}
