//! Paths to peers that carry less than the link does.
//!
//! The kernel learns them: from its own routes, and from "too big" answers to what we send (net/ipv4/route.c, net/ipv6/route.c: for ten
//! minutes). Asking it costs a socket a peer and no packet. It is asked every ten seconds, and within one second of a send that it
//! found too large; what it says becomes the MTU of the peer's routes, by which inner senders are told.
//!
//! Where outer IPv4 datagrams leave with "don't fragment" clear, as vxlan's do, routers fragment and nobody learns anything; the two sides then pay
//! for fragments, but nothing is lost.
//!
//! "Too big" can be forged by whoever knows the ports, and the kernel believes it down to 552 bytes. Inner senders are told of no path below
//! what every host must take ([`MIN_V4`], [`MIN_V6`]): an inner kernel believes no less either, and would fall silent between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::addr::{Mtu, Prefix};

/// How often the kernel is asked unprompted.
const SURVEY: Duration = Duration::from_secs(10);
/// How often we look whether it found something too large.
const LOOK: Duration = Duration::from_secs(1);
/// What every IPv4 host takes, RFC 1122 §3.3.2: below that, outer datagrams are fragmented.
const MIN_V4: u16 = 576;
/// What every IPv6 link carries, RFC 8200 §5: below that, outer datagrams are fragmented.
const MIN_V6: u16 = 1280;

/// What is known of the paths.
pub(super) struct Paths {
    link_mtu: Mtu,
    /// What each narrow path carries, outer headers included.
    narrow: BTreeMap<IpAddr, Mtu>,
    /// How many sends had been too large at the last look.
    too_big: u64,
    surveyed: Instant,
    looked: Instant,
}

impl Paths {
    /// Knows of none over a link of `link_mtu`.
    pub(super) fn new(link_mtu: Mtu, now: Instant) -> Self {
        Self {
            link_mtu,
            narrow: BTreeMap::new(),
            too_big: 0,
            surveyed: now,
            looked: now,
        }
    }

    /// When to look again.
    pub(super) fn due(&self) -> Instant {
        self.looked + LOOK
    }

    /// Whether it is time to ask the kernel, `too_big` sends having been too large so far.
    pub(super) fn wants_survey(&mut self, too_big: u64, now: Instant) -> bool {
        self.looked = now;
        let prompted = too_big != self.too_big;
        self.too_big = too_big;
        prompted || now >= self.surveyed + SURVEY
    }

    /// Asks `measure` for every endpoint; gives those whose path has changed.
    pub(super) fn survey(
        &mut self,
        endpoints: BTreeSet<IpAddr>,
        mut measure: impl FnMut(IpAddr) -> io::Result<Mtu>,
        now: Instant,
    ) -> BTreeSet<IpAddr> {
        self.surveyed = now;
        let before = std::mem::take(&mut self.narrow);
        for &endpoint in &endpoints {
            // Without a route nothing is known, and nothing arrives anyway.
            let measured = measure(endpoint).ok().or_else(|| before.get(&endpoint).copied());
            self.narrow.extend(
                measured
                    .filter(|&mtu| mtu < self.link_mtu)
                    .map(|mtu| (endpoint, mtu)),
            );
        }
        let changed = |endpoint: &IpAddr| before.get(endpoint) != self.narrow.get(endpoint);
        endpoints.into_iter().filter(changed).collect()
    }

    /// What the path to `endpoint` carries, outer headers included, as far as is known.
    pub(super) fn outer_mtu(&self, endpoint: IpAddr) -> Mtu {
        self.narrow.get(&endpoint).copied().unwrap_or(self.link_mtu)
    }

    /// The largest inner packet to `prefix` behind `endpoint`: `whole` is what the link has room for, and `overhead` what is added.
    pub(super) fn inner_mtu(&self, prefix: Prefix, endpoint: IpAddr, overhead: u16, whole: Mtu) -> Mtu {
        let Some(narrow) = self.narrow.get(&endpoint) else {
            return whole;
        };
        let floor = match prefix {
            Prefix::V4(_) => MIN_V4,
            Prefix::V6(_) => MIN_V6,
        };
        let left = narrow.bytes().saturating_sub(overhead).max(floor);
        Mtu::new(left.into()).map_or(whole, |left| left.min(whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mtu(bytes: u32) -> Mtu {
        Mtu::new(bytes).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_narrow_path_is_learnt_and_forgotten() {
        let now = Instant::now();
        let (near, far): (IpAddr, IpAddr) = ([192, 0, 2, 2].into(), [198, 51, 100, 2].into());
        let both = BTreeSet::from([near, far]);
        let prefix = Prefix::V4("10.244.2.0/24".parse().unwrap());
        let mut paths = Paths::new(mtu(1500), now);
        assert_eq!(paths.inner_mtu(prefix, far, 50, mtu(1450)), mtu(1450));
        let narrow = |addr| Ok(mtu(if addr == far { 1400 } else { 1500 }));
        assert_eq!(paths.survey(both.clone(), narrow, now), BTreeSet::from([far]));
        assert_eq!(paths.inner_mtu(prefix, far, 50, mtu(1450)), mtu(1350));
        assert_eq!(paths.inner_mtu(prefix, near, 50, mtu(1450)), mtu(1450));
        assert!(paths.survey(both.clone(), narrow, now).is_empty());
        let unreachable = |_| Err(io::Error::from_raw_os_error(libc::ENETUNREACH));
        assert!(
            paths.survey(both.clone(), unreachable, now).is_empty(),
            "kept meanwhile"
        );
        assert_eq!(paths.survey(both, |_| Ok(mtu(1500)), now), BTreeSet::from([far]));
        assert_eq!(paths.inner_mtu(prefix, far, 50, mtu(1450)), mtu(1450));
    }

    /// S6: an answer that says less is forged, or about a path nobody can use.
    #[tokio::test(start_paused = true)]
    async fn ipv4_inside_keeps_its_576_bytes() {
        let now = Instant::now();
        let far: IpAddr = [192, 0, 2, 2].into();
        let prefix = Prefix::V4("10.244.2.0/24".parse().unwrap());
        for (said, inside) in [(68, 576), (552, 576), (604, 576), (605, 577), (700, 672)] {
            let mut paths = Paths::new(mtu(1500), now);
            paths.survey(BTreeSet::from([far]), |_| Ok(mtu(said)), now);
            assert_eq!(paths.inner_mtu(prefix, far, 28, mtu(1472)), mtu(inside), "{said}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ipv6_inside_keeps_its_1280_bytes() {
        let now = Instant::now();
        let far: IpAddr = "2001:db8::2".parse().unwrap();
        let mut paths = Paths::new(mtu(1500), now);
        paths.survey(BTreeSet::from([far]), |_| Ok(mtu(1280)), now);
        let inside = |text: &str| {
            paths.inner_mtu(
                text.parse::<ipnet::IpNet>().map(prefix).unwrap(),
                far,
                70,
                mtu(1430),
            )
        };
        assert_eq!(inside("fd00::/64"), mtu(1280));
        assert_eq!(inside("10.244.2.0/24"), mtu(1210));
    }

    fn prefix(net: ipnet::IpNet) -> Prefix {
        match net {
            ipnet::IpNet::V4(net) => Prefix::V4(net.to_string().parse().unwrap()),
            ipnet::IpNet::V6(net) => Prefix::V6(net.to_string().parse().unwrap()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_kernel_is_asked_now_and_then_and_when_something_was_too_large() {
        let now = Instant::now();
        let mut paths = Paths::new(mtu(1500), now);
        assert!(!paths.wants_survey(0, now + LOOK));
        assert!(paths.wants_survey(3, now + 2 * LOOK));
        assert!(!paths.wants_survey(3, now + 3 * LOOK));
        assert!(paths.wants_survey(3, now + SURVEY));
        assert_eq!(paths.due(), now + SURVEY + LOOK);
    }
}
