//! Has the kernel ask again for gateways of our IPv6 routes that it has given up on.
//!
//! The problem: on a host that does not forward IPv6 (`net.ipv6.conf.all.forwarding` is 0), the kernel passes over an IPv6 route whose
//! gateway did not answer, as that of a peer which was away for some seconds does not, and takes a wider one: the default route. With no
//! packet to it the gateway is not asked for as its neighbour would be, but once a minute (`ip6_pol_route`, `rt6_check_neigh` and
//! `rt6_probe` in net/ipv6/route.c, `router_probe_interval`). So a peer that is back would be out of reach for up to a minute.
//!
//! ```text
//!   gateways of routes: changed ──┐
//!   kernel: a neighbour failed ───┼──▶ a second later a turn: which have failed? ──▶ asked for (NTF_USE)
//!   a turn with failed ones ──────┘
//! ```
//!
//! The kernel then asks three times, a second apart; so a peer that is not there is asked for as often as an IPv4 neighbour that packets go
//! to, and while it is, packets wait for it rather than leave by the other route. [`AT_ONCE`] bounds what many of them make; then each waits
//! for its turn.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::Instrument;

use crate::daemon::node::at;
use crate::daemon::supervisor::Task;
use crate::host::netlink::{NeighbourKey, NeighbourNews, Netlink, NetlinkError};

/// How long after something changed a turn comes, and the time between two.
const PAUSE: Duration = Duration::from_secs(1);
/// How many gateways are asked for in one turn.
const AT_ONCE: usize = 16;

type Gateways = BTreeSet<NeighbourKey>;

/// The running task; it ends when this is dropped.
pub(super) struct Inquiry {
    wanted: watch::Sender<Gateways>,
    _task: Task<()>,
}

impl Inquiry {
    /// Starts it, without gateways; while it has none it does nothing.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn start(netlink: Netlink) -> Self {
        let (wanted, receiver) = watch::channel(Gateways::new());
        Self {
            wanted,
            _task: Task(tokio::spawn(keep(netlink, receiver).in_current_span())),
        }
    }

    /// Asks for these gateways when they fail, and for no others.
    pub(super) fn want(&self, gateways: Gateways) {
        self.wanted.send_if_modified(|known| {
            let is_new = *known != gateways;
            *known = gateways;
            is_new
        });
    }
}

async fn keep(netlink: Netlink, mut wanted: watch::Receiver<Gateways>) {
    let mut told = false;
    while wanted.wait_for(|gateways| !gateways.is_empty()).await.is_ok() {
        let result = match Netlink::watch_neighbours() {
            Ok(news) => follow(&netlink, &mut wanted, news).await,
            Err(error) => Err(error),
        };
        match result {
            Err(error) if !told => {
                tracing::warn!(%error, "cannot look after gateways; a peer that was away may be out of reach for a minute");
                told = true;
            }
            Ok(()) | Err(_) => {}
        }
        sleep(PAUSE).await;
    }
}

/// Follows neighbours while there are gateways, until nobody wants it any more or there is no more to hear.
async fn follow(
    netlink: &Netlink,
    wanted: &mut watch::Receiver<Gateways>,
    mut news: impl Stream<Item = NeighbourNews> + Unpin,
) -> Result<(), NetlinkError> {
    // What failed before is not told.
    let mut due = Some(Instant::now() + PAUSE);
    let mut last = None;
    loop {
        let is_due = tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() || wanted.borrow_and_update().is_empty() {
                    return Ok(());
                }
                false
            }
            heard = news.next() => match heard {
                Some(NeighbourNews::Failed(gateway)) if !wanted.borrow().contains(&gateway) => continue,
                Some(NeighbourNews::Failed(_) | NeighbourNews::Overrun) => false,
                None => return Ok(()),
            },
            () = at(due) => true,
        };
        let again = Instant::now() + PAUSE;
        if !is_due {
            due = due.or(Some(again));
            continue;
        }
        let failed: Gateways = netlink.failed_neighbours().await?.into_iter().collect();
        let failed = &failed & &*wanted.borrow();
        // As long as there are any: an answer to a question that failed may be lost as well.
        due = (!failed.is_empty()).then_some(again);
        for gateway in turn(&failed, last) {
            let asked = netlink.solicit(gateway).await;
            tracing::debug!(gateway = %gateway.1, ?asked, "asked for a gateway that did not answer");
            last = Some(gateway);
        }
    }
}

/// Whom to ask for now: those after the last one, and then from the beginning.
fn turn(failed: &Gateways, last: Option<NeighbourKey>) -> Vec<NeighbourKey> {
    let Some(last) = last else {
        return failed.iter().take(AT_ONCE).copied().collect();
    };
    let after = failed.range((Bound::Excluded(last), Bound::Unbounded));
    let before = failed.range(..=last);
    after.chain(before).take(AT_ONCE).copied().collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    #[test]
    fn everybody_has_a_turn_a_few_at_once() {
        let failed: Gateways = (0..40).map(gateway).collect();
        let mut last = None;
        let mut asked = Vec::new();
        for expected in [16, 16, 16] {
            let now = turn(&failed, last);
            assert_eq!(now.len(), expected);
            last = now.last().copied();
            asked.extend(now);
        }
        assert_eq!(asked[..40], (0..40).map(gateway).collect::<Vec<_>>());
        assert_eq!(asked[40..], (0..8).map(gateway).collect::<Vec<_>>());
    }

    #[test]
    fn nobody_is_asked_for_twice_in_a_turn() {
        let failed: Gateways = (0..3).map(gateway).collect();
        assert_eq!(turn(&failed, Some(gateway(1))), [2, 0, 1].map(gateway));
        assert_eq!(turn(&failed, Some(gateway(9))), [0, 1, 2].map(gateway));
        assert_eq!(turn(&Gateways::new(), Some(gateway(1))), []);
    }

    fn gateway(number: u16) -> NeighbourKey {
        (2, Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, number))
    }
}
