//! Links, addresses, routes and neighbours, over rtnetlink.
//!
//! A [`Netlink`] is a connection to one network namespace: that of the thread which opened it, for as long as the
//! connection lives. Requests are idempotent where the kernel lets them be: setting what is set already succeeds, and
//! deleting what is not there succeeds. Routes made here carry [`KERSEY_PROTOCOL`], by which they are found again
//! after a crash and told from everyone else's.

mod links;
mod message;
mod neighbours;
mod routes;
mod seg6;
mod ways;

use std::fmt;
use std::io;

use futures_util::{Stream, StreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::{Handle, MulticastGroup};

pub use self::links::Vxlan;
use self::message::change;
pub use self::message::{
    Gateway, HeldRoute, KERSEY_PROTOCOL, Link, LinkAddr, LinkChange, Route, RouteLookup, RouteOwner,
    VxlanDevice,
};
pub use self::neighbours::{NeighbourKey, NeighbourNews};
pub use self::seg6::{Behavior, Seg6Mode, Seg6Route, Sid, set_tunnel_source};
pub use self::ways::{Neighbour, NextHop, WayChange};

/// A request to the kernel failed.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// There is no netlink socket to be had.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("cannot {operation} {object}")]
    Request {
        /// What we were doing.
        operation: &'static str,
        /// To what.
        object: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// No link has the name.
    #[error("there is no network interface {0:?}")]
    NoLink(String),
}

impl NetlinkError {
    /// The kernel's error number, where it gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Open(source) | Self::Request { source, .. } => source.raw_os_error(),
            Self::NoLink(_) => Some(libc::ENODEV),
        }
    }
}

/// A connection to the kernel's network configuration. Clones share it; it closes with the last one.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
}

impl Netlink {
    /// Opens a connection to the calling thread's namespace; the current tokio runtime serves it.
    ///
    /// # Errors
    /// No socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// Reports changes of links and addresses from here on, until dropped.
    ///
    /// What is not consumed waits in memory without limit, so keep reading.
    ///
    /// # Errors
    /// No socket.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn watch() -> Result<impl Stream<Item = LinkChange> + Send + Unpin + 'static, NetlinkError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        Self::watch_groups(&groups, change)
    }

    /// Reports what `change` makes of the messages of these groups; see [`watch`](Self::watch).
    fn watch_groups<T: Send + 'static>(
        groups: &[MulticastGroup],
        change: fn(NetlinkPayload<RouteNetlinkMessage>) -> Option<T>,
    ) -> Result<impl Stream<Item = T> + Send + Unpin + 'static + use<T>, NetlinkError> {
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(groups).map_err(NetlinkError::Open)?;
        tokio::spawn(connection);
        // The connection ends when nobody holds its handle, so the stream does.
        Ok(messages.filter_map(move |(message, _)| {
            let _keep = &handle;
            std::future::ready(change(message.payload))
        }))
    }
}

trait OrRefused<T> {
    fn or_refused(self, operation: &'static str, object: impl fmt::Display) -> Result<T, NetlinkError>;
}

impl<T> OrRefused<T> for Result<T, rtnetlink::Error> {
    fn or_refused(self, operation: &'static str, object: impl fmt::Display) -> Result<T, NetlinkError> {
        self.map_err(|error| NetlinkError::Request {
            operation,
            object: object.to_string(),
            source: match errno(&error) {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::other(error),
            },
        })
    }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    if let rtnetlink::Error::NetlinkError(message) = error {
        message.to_io().raw_os_error()
    } else {
        None
    }
}

/// Counts the answers that mean "there is no such thing" as a deletion done.
fn gone(result: Result<(), rtnetlink::Error>, absent: &[i32]) -> Result<(), rtnetlink::Error> {
    result.or_else(|error| match errno(&error) {
        Some(code) if absent.contains(&code) => Ok(()),
        Some(_) | None => Err(error),
    })
}
