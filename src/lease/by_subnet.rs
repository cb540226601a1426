//! A list in order of subnets that whoever has it shares.

use std::fmt;
use std::sync::Arc;

use crate::lease::Subnet;

/// Something for each of many subnets: it is not changed but replaced, and a clone is the same list.
///
/// A tree that grows in order is half empty, and a copy of one for everybody who looks at it is as large as it; of a hundred thousand peers
/// either is noticed.
pub struct BySubnet<T>(Arc<[(Subnet, T)]>);

impl<T> BySubnet<T> {
    /// The list of `rows`, in whatever order they are; of two of one subnet the later one counts.
    pub fn new(mut rows: Vec<(Subnet, T)>) -> Self {
        let in_order = |pair: &[(Subnet, T)]| pair[0].0 < pair[1].0;
        if !rows.windows(2).all(in_order) {
            // Stable, so that the later one of two comes later.
            rows.sort_by_key(|(subnet, _)| *subnet);
            rows.reverse();
            rows.dedup_by_key(|(subnet, _)| *subnet);
            rows.reverse();
        }
        Self(rows.into())
    }

    /// What there is for a subnet.
    pub fn get(&self, subnet: Subnet) -> Option<&T> {
        let at = self.0.binary_search_by_key(&subnet, |(subnet, _)| *subnet).ok()?;
        self.0.get(at).map(|(_, value)| value)
    }

    /// All there is, in order of subnets.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Subnet, &T)> + Clone {
        self.0.iter().map(|(subnet, value)| (*subnet, value))
    }

    /// How many subnets there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<T> Default for BySubnet<T> {
    fn default() -> Self {
        Self(Arc::new([]))
    }
}

impl<T> Clone for BySubnet<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: PartialEq> PartialEq for BySubnet<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T: Eq> Eq for BySubnet<T> {}

impl<T: fmt::Debug> fmt::Debug for BySubnet<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<T> FromIterator<(Subnet, T)> for BySubnet<T> {
    fn from_iter<I: IntoIterator<Item = (Subnet, T)>>(rows: I) -> Self {
        Self::new(rows.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::Ipv4Prefix;

    fn subnet(number: u8) -> Subnet {
        Subnet {
            v4: Ipv4Prefix::new([10, 0, number, 0].into(), 24).unwrap(),
            v6: None,
        }
    }

    proptest! {
        #[test]
        fn it_is_what_a_map_of_the_same_rows_is(rows in prop::collection::vec((0_u8..40, any::<u8>()), 0..80)) {
            let rows = rows.into_iter().map(|(number, value)| (subnet(number), value));
            let map: std::collections::BTreeMap<_, _> = rows.clone().collect();
            let list: BySubnet<u8> = rows.collect();
            prop_assert!(list.iter().eq(map.iter().map(|(subnet, value)| (*subnet, value))));
            prop_assert_eq!((list.len(), list.is_empty()), (map.len(), map.is_empty()));
            for number in 0..40 {
                prop_assert_eq!(list.get(subnet(number)), map.get(&subnet(number)));
            }
        }
    }
}
