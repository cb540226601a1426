//! How many connections there may be, in all and from one place.
//!
//! Three bounds. All connections together are bounded by [`MAX_CONNECTIONS`]; further ones wait in the kernel's queue. One
//! address (IPv6: one /64, which is what one host has) may have half of that; further ones from it are closed at once. And
//! connections that have not yet sent one whole request are *strangers*: of those there are at most [`MAX_STRANGERS`], and when
//! one more comes, the eldest is closed. A node's first request is there in milliseconds; whoever opens connections and says
//! nothing pushes out its own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Connections at a time: a long poll each for two thousand nodes, and as many again for requests.
pub const MAX_CONNECTIONS: usize = 4096;
/// Connections from one address: a thousand nodes behind one translated address, twice.
pub const MAX_FROM_ONE: usize = MAX_CONNECTIONS / 2;
/// Connections without a request so far. Each costs some ten kilobytes, with TLS several times that.
pub const MAX_STRANGERS: usize = 512;

/// The connections there are.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    by_place: BTreeMap<IpAddr, usize>,
    /// By age; the bell closes the connection.
    strangers: BTreeMap<u64, Arc<Notify>>,
    arrivals: u64,
}

/// One connection's place among them, given back when dropped.
#[derive(Debug)]
pub(super) struct Guest {
    crowd: Arc<Crowd>,
    place: Option<IpAddr>,
    number: u64,
    /// Rings when the connection is to be closed.
    pub(super) leave: Arc<Notify>,
}

impl Crowd {
    /// Lets a connection in; `None` if its address has too many.
    pub(super) fn enter(self: &Arc<Self>, from: Option<IpAddr>) -> Option<Guest> {
        let place = from.map(place_of);
        let mut state = self.state();
        if let Some(place) = place {
            let count = state.by_place.entry(place).or_default();
            if *count >= MAX_FROM_ONE {
                return None;
            }
            *count += 1;
        }
        let number = state.arrivals;
        state.arrivals += 1;
        let leave = Arc::new(Notify::new());
        state.strangers.insert(number, Arc::clone(&leave));
        if state.strangers.len() > MAX_STRANGERS
            && let Some((_, eldest)) = state.strangers.pop_first()
        {
            eldest.notify_one();
        }
        drop(state);
        Some(Guest {
            crowd: Arc::clone(self),
            place,
            number,
            leave,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest {
    /// It has sent a request: it is no stranger any more.
    pub(super) fn is_known(&self) {
        self.crowd.state().strangers.remove(&self.number);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut state = self.crowd.state();
        state.strangers.remove(&self.number);
        if let Some(place) = self.place
            && let Some(count) = state.by_place.get_mut(&place)
        {
            *count -= 1;
            if *count == 0 {
                state.by_place.remove(&place);
            }
        }
    }
}

/// The address, or for IPv6 its /64.
fn place_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_take_all_places() {
        let crowd = Arc::new(Crowd::default());
        let mut inside: Vec<Guest> = (0..MAX_FROM_ONE)
            .map(|_| crowd.enter(Some([192, 0, 2, 1].into())).unwrap())
            .collect();
        assert!(crowd.enter(Some([192, 0, 2, 1].into())).is_none());
        assert!(crowd.enter(Some([192, 0, 2, 2].into())).is_some());
        assert!(crowd.enter(None).is_some(), "a unix socket has no address");
        inside.pop();
        assert!(crowd.enter(Some([192, 0, 2, 1].into())).is_some());
        drop(inside);
        assert!(crowd.state().by_place.is_empty());
        assert!(crowd.state().strangers.is_empty());
    }

    #[test]
    fn all_addresses_of_one_host_count_as_one() {
        let crowd = Arc::new(Crowd::default());
        let address = |n: u16| Some(IpAddr::V6([0x2001, 0xdb8, 0, 1, 0, 0, 0, n].into()));
        let _inside: Vec<Guest> = (0..MAX_FROM_ONE)
            .map(|n| crowd.enter(address(u16::try_from(n).unwrap())).unwrap())
            .collect();
        assert!(crowd.enter(address(9999)).is_none());
    }

    #[tokio::test]
    async fn the_eldest_stranger_makes_room() {
        let crowd = Arc::new(Crowd::default());
        let known = crowd.enter(None).unwrap();
        known.is_known();
        let eldest = crowd.enter(None).unwrap();
        let _others: Vec<Guest> = (1..MAX_STRANGERS).map(|_| crowd.enter(None).unwrap()).collect();
        let soon = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(soon, eldest.leave.notified()).await.is_err());
        let _one_more = crowd.enter(None).unwrap();
        eldest.leave.notified().await;
        assert!(tokio::time::timeout(soon, known.leave.notified()).await.is_err());
    }
}
