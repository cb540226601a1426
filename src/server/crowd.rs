//! How many connections there may be, in all and from one place.
//!
//! Three bounds. One address (IPv6: one /64, which is what one host has) may have [`MAX_FROM_ONE`] connections; further ones from it are
//! closed at once. All together are at most [`MAX_CONNECTIONS`]; when one more comes, the eldest from the address that has most is
//! closed, unless the newcomer's has as many: so whoever has few connections gets in, however many others have. And connections that
//! have not yet sent a request that they may make are *strangers*: of those there are at most [`MAX_STRANGERS`], and when one more
//! comes, the eldest is closed. A node's first request is there in milliseconds; whoever opens connections and says nothing, or nothing
//! that is allowed, pushes out its own.
//!
//! A unix socket has no address. What comes by one is bounded by who may open it, and is never closed for others.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// Connections at a time: a long poll each for two thousand nodes, and as many again for requests.
pub const MAX_CONNECTIONS: usize = 4096;
/// Connections from one address: five hundred nodes behind one translated address, twice.
pub const MAX_FROM_ONE: usize = MAX_CONNECTIONS / 4;
/// Connections without a request so far. Each costs some ten kilobytes, with TLS several times that.
pub const MAX_STRANGERS: usize = 512;

/// The connections there are.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    state: Mutex<State>,
}

/// Connections by age; the bell closes one.
type ByAge = BTreeMap<u64, Arc<Notify>>;

#[derive(Debug, Default)]
struct State {
    by_place: BTreeMap<Option<IpAddr>, ByAge>,
    /// How many each address has; the last has most.
    by_size: BTreeSet<(usize, IpAddr)>,
    strangers: ByAge,
    inside: usize,
    arrivals: u64,
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Crowded {
    /// Its address has too many.
    Place,
    /// There are too many, and no address has more than its own.
    Everywhere,
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
    /// Lets a connection in.
    pub(super) fn enter(self: &Arc<Self>, from: Option<IpAddr>) -> Result<Guest, Crowded> {
        let place = from.map(place_of);
        let mut state = self.state();
        let neighbours = state.by_place.get(&place).map_or(0, BTreeMap::len);
        if place.is_some() && neighbours >= MAX_FROM_ONE {
            return Err(Crowded::Place);
        }
        if state.inside >= MAX_CONNECTIONS {
            state.make_room(neighbours)?;
        }
        let number = state.arrivals;
        state.arrivals += 1;
        let leave = Arc::new(Notify::new());
        state.insert(place, number, Arc::clone(&leave));
        state.strangers.insert(number, Arc::clone(&leave));
        if state.strangers.len() > MAX_STRANGERS
            && let Some((_, eldest)) = state.strangers.pop_first()
        {
            eldest.notify_one();
        }
        drop(state);
        Ok(Guest {
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

impl State {
    /// Closes the eldest connection of the address that has most, for one whose address has `neighbours`.
    fn make_room(&mut self, neighbours: usize) -> Result<(), Crowded> {
        let Some(&(most, place)) = self.by_size.last().filter(|(most, _)| *most > neighbours + 1) else {
            return Err(Crowded::Everywhere);
        };
        debug_assert!(most > 0, "an address without connections is not kept");
        let eldest = self
            .by_place
            .get(&Some(place))
            .and_then(|guests| guests.first_key_value())
            .map(|(&number, bell)| (number, Arc::clone(bell)));
        if let Some((number, bell)) = eldest {
            self.remove(Some(place), number);
            bell.notify_one();
        }
        Ok(())
    }

    fn insert(&mut self, place: Option<IpAddr>, number: u64, bell: Arc<Notify>) {
        let guests = self.by_place.entry(place).or_default();
        let before = guests.len();
        guests.insert(number, bell);
        let now = guests.len();
        self.resize(place, before, now);
        self.inside += 1;
    }

    /// Forgets a connection, which may have been forgotten before.
    fn remove(&mut self, place: Option<IpAddr>, number: u64) {
        self.strangers.remove(&number);
        let Some(guests) = self.by_place.get_mut(&place) else {
            return;
        };
        let before = guests.len();
        if guests.remove(&number).is_none() {
            return;
        }
        let now = guests.len();
        if now == 0 {
            self.by_place.remove(&place);
        }
        self.resize(place, before, now);
        self.inside -= 1;
    }

    fn resize(&mut self, place: Option<IpAddr>, before: usize, now: usize) {
        if let Some(place) = place {
            self.by_size.remove(&(before, place));
            if now > 0 {
                self.by_size.insert((now, place));
            }
        }
    }
}

impl Guest {
    /// What tells the crowd that this is no stranger any more.
    pub(super) fn introduction(&self) -> Introduction {
        Introduction {
            crowd: Arc::clone(&self.crowd),
            number: self.number,
        }
    }
}

/// Who to tell that a connection made a request that it may make.
#[derive(Clone, Debug)]
pub(super) struct Introduction {
    crowd: Arc<Crowd>,
    number: u64,
}

impl Introduction {
    /// It is no stranger any more.
    pub(super) fn is_known(&self) {
        self.crowd.state().strangers.remove(&self.number);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.crowd.state().remove(self.place, self.number);
    }
}

/// The address, or for IPv6 its /64.
pub(super) fn place_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn one_address_does_not_take_all_places() {
        let crowd = Arc::new(Crowd::default());
        let mut inside = enter(&crowd, one(1), MAX_FROM_ONE);
        assert_eq!(crowd.enter(one(1)).unwrap_err(), Crowded::Place);
        assert!(crowd.enter(one(2)).is_ok());
        assert!(crowd.enter(None).is_ok(), "a unix socket has no address");
        inside.pop();
        assert!(crowd.enter(one(1)).is_ok());
        drop(inside);
        let state = crowd.state();
        assert!(state.by_place.is_empty() && state.by_size.is_empty() && state.strangers.is_empty());
        assert_eq!(state.inside, 0);
    }

    #[test]
    fn all_addresses_of_one_host_count_as_one() {
        let crowd = Arc::new(Crowd::default());
        let address = |n: u16| Some(IpAddr::V6([0x2001, 0xdb8, 0, 1, 0, 0, 0, n].into()));
        let _inside: Vec<Guest> = (0..MAX_FROM_ONE)
            .map(|n| crowd.enter(address(u16::try_from(n).unwrap())).unwrap())
            .collect();
        assert!(crowd.enter(address(9999)).is_err());
    }

    #[test]
    fn the_eldest_stranger_makes_room() {
        let crowd = Arc::new(Crowd::default());
        let known = crowd.enter(None).unwrap();
        known.introduction().is_known();
        let eldest = crowd.enter(None).unwrap();
        let _others = enter(&crowd, None, MAX_STRANGERS - 1);
        assert!(!is_closed(&eldest));
        let _one_more = crowd.enter(None).unwrap();
        assert!(is_closed(&eldest));
        assert!(!is_closed(&known));
    }

    #[test]
    fn when_all_places_are_taken_the_eldest_of_the_most_crowded_address_makes_room() {
        let crowd = Arc::new(Crowd::default());
        let known = |from, count| -> Vec<Guest> {
            let guest = |_| {
                let guest = crowd.enter(from).unwrap();
                guest.introduction().is_known();
                guest
            };
            (0..count).map(guest).collect()
        };
        let mut crowds: Vec<Vec<Guest>> = (1..=3).map(|n| known(one(n), MAX_FROM_ONE)).collect();
        crowds.push(known(one(4), MAX_CONNECTIONS - 3 * MAX_FROM_ONE - 10));
        let node = known(one(5), 10);
        // All known, and nobody over the bound of one address: a newcomer gets in all the same.
        let newcomer = crowd.enter(one(6)).unwrap();
        assert_eq!(crowd.state().inside, MAX_CONNECTIONS);
        let mut closed = Vec::new();
        for (place, guests) in crowds.iter().chain([&node]).enumerate() {
            for (index, guest) in guests.iter().enumerate() {
                if is_closed(guest) {
                    closed.push((place, index));
                }
            }
        }
        assert_eq!(closed, [(2, 0)], "the eldest of one of those that have most");
        assert!(!is_closed(&newcomer));
        // Who has most gets no more.
        assert_eq!(crowd.enter(one(3)).unwrap_err(), Crowded::Everywhere);
        drop(crowds);
        assert_eq!(crowd.state().inside, node.len() + 1);
    }

    fn enter(crowd: &Arc<Crowd>, from: Option<IpAddr>, count: usize) -> Vec<Guest> {
        (0..count).map(|_| crowd.enter(from).unwrap()).collect()
    }

    fn one(n: u8) -> Option<IpAddr> {
        Some([192, 0, 2, n].into())
    }

    fn is_closed(guest: &Guest) -> bool {
        // A bell that rang before is heard at once.
        guest.leave.notified().now_or_never().is_some()
    }
}
