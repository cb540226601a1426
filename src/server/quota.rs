//! How many leases of one network one address may take for others.
//!
//! A node takes one lease, for the address it asks from. Whoever asks from another address than the lease names, by a mistake, by malice
//! or from behind a translation of addresses, is counted: of the leases taken from one address (IPv6: one /64) so many may be there at a
//! time. Without that, whoever reaches an open server could take all subnets there are.
//!
//! Who took a lease is not in the store: each server counts for itself, from its start on.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::crowd::place_of;
use crate::lease::Subnet;

/// The bound where the access file says nothing: nodes behind one translated address, and a quarter of the subnets of a /16.
pub(super) const LEASES_PER_ADDRESS: usize = 64;

/// Who took which lease.
#[derive(Debug, Default)]
pub(super) struct Quota {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    taken: BTreeMap<Subnet, IpAddr>,
    /// Leases on their way.
    pending: BTreeMap<IpAddr, usize>,
}

impl Quota {
    /// Room for a lease that `from` takes; `None` if it has `most`, of those that `is_there` still knows.
    pub(super) fn claim(
        self: &Arc<Self>,
        from: IpAddr,
        most: usize,
        is_there: impl Fn(Subnet) -> bool,
    ) -> Option<Pending> {
        let place = place_of(from);
        let mut state = self.state();
        state.taken.retain(|subnet, _| is_there(*subnet));
        let taken = state.taken.values().filter(|by| **by == place).count();
        let pending = state.pending.entry(place).or_default();
        *pending += 1;
        // From here on it is given back when dropped.
        let here = taken + *pending;
        drop(state);
        let claimed = Pending {
            quota: Arc::clone(self),
            place,
        };
        (here <= most).then_some(claimed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for one lease, given back when dropped.
#[derive(Debug)]
pub(super) struct Pending {
    quota: Arc<Quota>,
    place: IpAddr,
}

impl Pending {
    /// It came to a lease, which is there.
    pub(super) fn taken(self, subnet: Subnet) {
        self.quota.state().taken.insert(subnet, self.place);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let mut state = self.quota.state();
        if let Some(count) = state.pending.get_mut(&self.place) {
            *count -= 1;
            if *count == 0 {
                state.pending.remove(&self.place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_its_way_counts_and_what_ran_out_does_not() {
        let quota = Arc::new(Quota::default());
        let (one, two): (IpAddr, IpAddr) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let all = |_| true;
        let first = quota.claim(one, 2, all).unwrap();
        let second = quota.claim(one, 2, all).unwrap();
        assert!(quota.claim(one, 2, all).is_none());
        assert!(quota.claim(two, 2, all).is_some());
        first.taken(subnet(1));
        assert!(quota.claim(one, 2, all).is_none());
        // The store refused it.
        drop(second);
        quota.claim(one, 2, all).unwrap().taken(subnet(2));
        assert!(quota.claim(one, 2, all).is_none());
        assert!(quota.claim(one, 2, |other| other == subnet(2)).is_some());
        assert!(quota.state().pending.is_empty());
    }

    #[test]
    fn all_addresses_of_one_host_count_as_one() {
        let quota = Arc::new(Quota::default());
        let address = |n: u16| IpAddr::V6([0x2001, 0xdb8, 0, 1, 0, 0, 0, n].into());
        quota.claim(address(1), 1, |_| true).unwrap().taken(subnet(1));
        assert!(quota.claim(address(2), 1, |_| true).is_none());
    }

    fn subnet(n: u8) -> Subnet {
        format!("10.0.{n}.0-24").parse().unwrap()
    }
}
