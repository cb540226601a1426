//! Descriptors by name: what each is, whose, and of which queue.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use socket2::SockRef;

/// What every name begins with, so that others' descriptors are left alone.
const PREFIX: &str = "kersey-";

/// What a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A queue of the TUN device.
    Tun,
    /// The UDP socket on the well-known port, IPv4.
    Udp4,
    /// The same, IPv6.
    Udp6,
    /// SRv6 that ends in the device: the raw socket for IPv4 behind the outer header.
    RawV4,
    /// The same, IPv6.
    RawV6,
    /// The same, a routing header.
    RawRouting,
    /// All other SRv6: the raw socket for IPv4 behind the outer header.
    SidV4,
    /// The same, IPv6.
    SidV6,
    /// The same, a routing header.
    SidRouting,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Tun,
        Self::Udp4,
        Self::Udp6,
        Self::RawV4,
        Self::RawV6,
        Self::RawRouting,
        Self::SidV4,
        Self::SidV6,
        Self::SidRouting,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tun => "tun",
            Self::Udp4 => "udp4",
            Self::Udp6 => "udp6",
            Self::RawV4 => "raw4",
            Self::RawV6 => "raw41",
            Self::RawRouting => "raw43",
            Self::SidV4 => "sid4",
            Self::SidV6 => "sid41",
            Self::SidRouting => "sid43",
        }
    }
}

/// A descriptor's name: `kersey-KIND.NETWORK.QUEUE`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    /// What it is.
    pub kind: Kind,
    /// Whose; `_` is the network without a name.
    pub network: String,
    /// Of which queue.
    pub queue: usize,
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, network, queue } = self;
        write!(f, "{PREFIX}{}.{network}.{queue}", kind.name())
    }
}

/// A name is not one of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a descriptor of ours")]
pub struct Foreign;

impl FromStr for Label {
    type Err = Foreign;

    fn from_str(text: &str) -> Result<Self, Foreign> {
        let rest = text.strip_prefix(PREFIX).ok_or(Foreign)?;
        let (kind, rest) = rest.split_once('.').ok_or(Foreign)?;
        let (network, queue) = rest.rsplit_once('.').ok_or(Foreign)?;
        let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
        Ok(Self {
            kind: kind.ok_or(Foreign)?,
            network: network.to_owned(),
            queue: queue.parse().map_err(|_| Foreign)?,
        })
    }
}

/// The descriptors of one network.
#[derive(Debug, Default)]
pub struct Bundle(BTreeMap<(Kind, usize), OwnedFd>);

impl Bundle {
    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a descriptor in, unless its place is taken: what comes first is the newest.
    pub fn insert(&mut self, kind: Kind, queue: usize, fd: OwnedFd) {
        self.0.entry((kind, queue)).or_insert(fd);
    }

    /// Leaves out the sockets.
    pub(super) fn retain_device(&mut self) {
        self.0.retain(|(kind, _), _| *kind == Kind::Tun);
    }

    /// Whether there is a socket.
    pub fn has_sockets(&self) -> bool {
        self.0.keys().any(|(kind, _)| *kind != Kind::Tun)
    }

    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let clones = self.0.iter().map(|(place, fd)| Ok((*place, fd.try_clone()?)));
        clones.collect::<io::Result<_>>().map(Self)
    }

    pub(super) fn labelled<'a>(&'a self, network: &'a str) -> impl Iterator<Item = (Label, &'a OwnedFd)> {
        self.0.iter().map(move |((kind, queue), fd)| {
            let label = Label {
                kind: *kind,
                network: network.to_owned(),
                queue: *queue,
            };
            (label, fd)
        })
    }

    /// Takes all of a kind, by queue; none unless there is one for each of `queues` and no other.
    pub fn take(&mut self, kind: Kind, queues: usize) -> Option<Vec<OwnedFd>> {
        let whole =
            self.count(kind) == queues && (0..queues).all(|queue| self.0.contains_key(&(kind, queue)));
        if !whole || queues == 0 {
            return None;
        }
        (0..queues).map(|queue| self.0.remove(&(kind, queue))).collect()
    }

    pub(super) fn count(&self, kind: Kind) -> usize {
        self.0.keys().filter(|(of, _)| *of == kind).count()
    }

    /// Whether one of the sockets has this port.
    pub(super) fn has_port(&self, port: u16) -> bool {
        let is_udp = |kind| matches!(kind, Kind::Udp4 | Kind::Udp6);
        let sockets = self.0.iter().filter(|((kind, _), _)| is_udp(*kind));
        sockets
            .filter_map(|(_, fd)| SockRef::from(fd).local_addr().ok()?.as_socket())
            .any(|addr: SocketAddr| addr.port() == port)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn descriptor() -> OwnedFd {
        std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into()
    }

    /// One with a device and a socket for each queue.
    pub(in crate::host::handover) fn bundle(queues: usize) -> Bundle {
        let mut bundle = Bundle::default();
        for queue in 0..queues {
            bundle.insert(Kind::Tun, queue, descriptor());
            bundle.insert(Kind::Udp4, queue, descriptor());
        }
        bundle
    }

    #[test]
    fn names_survive_the_trip_through_a_service_manager() {
        for network in ["_", "blue", "a.b-c_d", ""] {
            let label = Label {
                kind: Kind::Udp6,
                network: network.to_owned(),
                queue: 7,
            };
            assert_eq!(label.to_string().parse(), Ok(label), "{network}");
        }
        for foreign in [
            "",
            "connection",
            "kersey-tap._.0",
            "kersey-tun._",
            "kersey-tun._.x",
            "tun._.0",
        ] {
            assert_eq!(foreign.parse::<Label>(), Err(Foreign), "{foreign}");
        }
    }

    #[test]
    fn a_bundle_gives_whole_sets_only() {
        assert_eq!(bundle(2).take(Kind::Tun, 2).unwrap().len(), 2);
        assert!(bundle(2).take(Kind::Tun, 1).is_none());
        assert!(bundle(2).take(Kind::Tun, 3).is_none());
        assert!(bundle(2).take(Kind::Udp6, 2).is_none());
        assert!(bundle(0).take(Kind::Tun, 0).is_none());
    }

    #[test]
    fn of_two_with_one_name_the_first_counts() {
        let mut bundle = Bundle::default();
        let (newest, older) = (descriptor(), descriptor());
        let port = |fd: &OwnedFd| SockRef::from(fd).local_addr().unwrap().as_socket().unwrap();
        let expected = port(&newest);
        bundle.insert(Kind::Udp4, 0, newest);
        bundle.insert(Kind::Udp4, 0, older);
        assert_eq!(port(&bundle.take(Kind::Udp4, 1).unwrap()[0]), expected);
    }
}
