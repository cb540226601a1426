//! Which subnet a node gets: flannel's rules, as pure functions over the leases listed.
//!
//! 1. The node's own lease, known by its public address ([`LeaseAttrs::same_node`]), if the config would still hand
//!    it out ([`own_lease`]); of several one that is reserved.
//! 2. The subnet the node had before, if it fits and touches no lease.
//! 3. One of the first 100 free subnets, at random, so that nodes starting together seldom choose the same. With two families, IPv6 follows
//!    IPv4 (see `beside`).
//!
//! Limits: two nodes with the same public address are one node by rule 1, as in flannel; the value of a lease carries
//! no other identity that outlives a restart.

use rand::{Rng, RngExt};

use crate::addr::{Ipv4Prefix, Ipv6Prefix};
use crate::control::config::{NetworkConfig, Prefixed, SubnetRange, size};
use crate::lease::{LeaseAttrs, Subnet};

/// How many free subnets are drawn from: flannel's number.
const CANDIDATES: usize = 100;

/// Every subnet of the config is taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("out of subnets: every one from {min} to {max} is taken")]
pub struct OutOfSubnets {
    min: String,
    max: String,
}

/// What to do about a lease the node already has.
#[derive(Debug, PartialEq, Eq)]
pub enum OwnLease<'a, L> {
    /// It has none.
    None,
    /// It has one the config would still hand out.
    Fits(&'a L),
    /// It has one the config would not hand out.
    Misfit(&'a L),
}

/// Finds the lease of the node `attrs` describes; one that fits the config is preferred, and of those one that is reserved.
///
/// `parts` gives subnet, attributes, and whether it is a reservation.
pub fn own_lease<'a, L>(
    config: &NetworkConfig,
    leases: &'a [L],
    attrs: &LeaseAttrs,
    parts: impl Fn(&L) -> (Subnet, &LeaseAttrs, bool),
) -> OwnLease<'a, L> {
    let mut found = OwnLease::None;
    for lease in leases {
        let (subnet, theirs, is_reserved) = parts(lease);
        if !attrs.same_node(theirs) {
            continue;
        }
        found = match (config.fits(subnet), is_reserved, found) {
            (true, true, _) => return OwnLease::Fits(lease),
            (true, false, OwnLease::None | OwnLease::Misfit(_)) => OwnLease::Fits(lease),
            (false, _, OwnLease::None) => OwnLease::Misfit(lease),
            (_, _, found) => found,
        };
    }
    found
}

/// Chooses a subnet no lease in `taken` overlaps: `previous` if it fits, else a random one of the first free.
///
/// # Errors
/// All subnets of a family are taken.
pub fn choose(
    config: &NetworkConfig,
    taken: &[Subnet],
    previous: Option<Subnet>,
    rng: &mut impl Rng,
) -> Result<Subnet, OutOfSubnets> {
    let free = |subnet: Subnet| !taken.iter().any(|other| other.overlaps(subnet));
    if let Some(previous) = previous.filter(|&subnet| config.fits(subnet) && free(subnet)) {
        return Ok(previous);
    }
    let v4 = config
        .v4
        .map(|range| draw(&range, taken.iter().filter_map(|subnet| subnet.ipv4()), rng));
    let v4 = v4.transpose()?;
    let v6 = config
        .v6
        .map(|range| beside_or_any(config.v4.zip(v4), &range, taken, rng));
    let v6 = v6.transpose()?;
    Ok(Subnet {
        v4: v4.unwrap_or(Subnet::NO_V4),
        v6,
    })
}

/// A free subnet with the IPv4 half of `subnet`, which has no other, if the network wants another.
///
/// # Errors
/// All IPv6 subnets are taken.
pub fn complete(
    config: &NetworkConfig,
    taken: &[Subnet],
    subnet: Subnet,
    rng: &mut impl Rng,
) -> Result<Subnet, OutOfSubnets> {
    let (Some(range_v4), Some(range), Some(v4), None) = (config.v4, config.v6, subnet.ipv4(), subnet.v6)
    else {
        return Ok(subnet);
    };
    let v6 = beside_or_any(Some((range_v4, v4)), &range, taken, rng)?;
    Ok(Subnet { v4, v6: Some(v6) })
}

fn beside_or_any(
    v4: Option<(SubnetRange<Ipv4Prefix>, Ipv4Prefix)>,
    range: &SubnetRange<Ipv6Prefix>,
    taken: &[Subnet],
    rng: &mut impl Rng,
) -> Result<Ipv6Prefix, OutOfSubnets> {
    let is_free = |v6: &Ipv6Prefix| {
        !taken
            .iter()
            .any(|other| other.v6.is_some_and(|held| held.overlaps(*v6)))
    };
    match v4
        .and_then(|(range_v4, v4)| beside(&range_v4, v4, range))
        .filter(is_free)
    {
        Some(v6) => Ok(v6),
        None => draw(range, taken.iter().filter_map(|subnet| subnet.v6), rng),
    }
}

/// The IPv6 subnet with the number of an IPv4 one, if the range goes as far.
///
/// A registry refuses a second lease under one name, and the name of a dual-stack lease has both subnets in it: of two nodes that start at
/// once, each with another IPv4 subnet, nobody would notice that they drew the same IPv6 subnet. So the one follows the other.
fn beside(
    range_v4: &SubnetRange<Ipv4Prefix>,
    v4: Ipv4Prefix,
    range: &SubnetRange<Ipv6Prefix>,
) -> Option<Ipv6Prefix> {
    let number = v4.first().checked_sub(range_v4.min.first())? / size::<Ipv4Prefix>(range_v4.subnet_len());
    let first = number
        .checked_mul(size::<Ipv6Prefix>(range.subnet_len()))
        .and_then(|offset| range.min.first().checked_add(offset))
        .filter(|&first| first <= range.max.first())?;
    Ipv6Prefix::at(first, range.subnet_len())
}

fn draw<P: Prefixed>(
    range: &SubnetRange<P>,
    taken: impl Iterator<Item = P>,
    rng: &mut impl Rng,
) -> Result<P, OutOfSubnets> {
    let mut taken: Vec<(u128, u128)> = taken.map(|prefix| (prefix.first(), prefix.last())).collect();
    taken.sort_unstable();
    let mut taken = taken.into_iter().peekable();
    let step = size::<P>(range.subnet_len());
    let mut free = Vec::with_capacity(CANDIDATES);
    let mut next = Some(range.min.first());
    while let Some(first) = next.filter(|&first| first <= range.max.first() && free.len() < CANDIDATES) {
        let last = first + (step - 1);
        while taken.next_if(|&(_, end)| end < first).is_some() {}
        match taken.peek() {
            Some(&(start, end)) if start <= last => {
                // Resume behind the lease, on a subnet boundary.
                next = (end.max(last) & !(step - 1)).checked_add(step);
            }
            Some(_) | None => {
                free.push(first);
                next = first.checked_add(step);
            }
        }
    }
    if free.is_empty() {
        return Err(OutOfSubnets {
            min: range.min.to_string(),
            max: range.max.to_string(),
        });
    }
    let first = free[rng.random_range(0..free.len())];
    P::at(first, range.subnet_len()).ok_or_else(|| OutOfSubnets {
        min: range.min.to_string(),
        max: range.max.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    fn attrs(ip: &str) -> LeaseAttrs {
        LeaseAttrs::from_json(format!("{{\"PublicIP\":\"{ip}\"}}").as_bytes()).unwrap()
    }

    fn keys(keys: &[&str]) -> Vec<Subnet> {
        keys.iter().map(|key| key.parse().unwrap()).collect()
    }

    #[test]
    fn ipv6_has_the_number_of_ipv4_where_that_is_free() {
        let config = config(r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48"}"#);
        let mut rng = StdRng::seed_from_u64(7);
        let chosen = choose(&config, &[], None, &mut rng).unwrap();
        let number = chosen.ipv4().unwrap().addr().octets()[2];
        let v6 = |number: u8| {
            format!("fd00:244:0:{number:x}::/64")
                .parse::<Ipv6Prefix>()
                .unwrap()
        };
        assert_eq!(chosen.v6, Some(v6(number)));
        // Somebody has it: another.
        let all_v6 = keys(&[&format!("10.244.254.0-24&fd00:244:0:{number:x}::-64")]);
        let mut rng = StdRng::seed_from_u64(7);
        let other = choose(&config, &all_v6, None, &mut rng).unwrap();
        assert_eq!(other.ipv4(), chosen.ipv4());
        assert!(other.v6.is_some() && other.v6 != chosen.v6);
    }

    #[test]
    fn the_nodes_own_lease_is_found_by_its_address() {
        let config = config(r#"{"Network":"10.0.0.0/16"}"#);
        let lease = |key: &str, ip: &str| (key.parse::<Subnet>().unwrap(), attrs(ip), false);
        let leases = vec![
            lease("10.9.0.0-24", "192.0.2.1"),
            lease("10.0.7.0-24", "192.0.2.2"),
            lease("10.0.8.0-24", "192.0.2.1"),
            lease("10.0.6.0-24", "192.0.2.2"),
            (keys(&["10.0.5.0-24"])[0], attrs("192.0.2.4"), false),
            (keys(&["10.9.5.0-24"])[0], attrs("192.0.2.4"), true),
            (keys(&["10.0.4.0-24"])[0], attrs("192.0.2.4"), true),
        ];
        let find = |ip: &str| {
            own_lease(&config, &leases, &attrs(ip), |(subnet, attrs, is_reserved)| {
                (*subnet, attrs, *is_reserved)
            })
        };
        assert_eq!(find("192.0.2.4"), OwnLease::Fits(&leases[6]));
        assert_eq!(find("192.0.2.1"), OwnLease::Fits(&leases[2]));
        assert_eq!(find("192.0.2.2"), OwnLease::Fits(&leases[1]));
        assert_eq!(find("192.0.2.3"), OwnLease::None);
        let misfit = own_lease(
            &config,
            &leases[..1],
            &attrs("192.0.2.1"),
            |(subnet, attrs, _)| (*subnet, attrs, false),
        );
        assert_eq!(misfit, OwnLease::Misfit(&leases[0]));
    }

    #[test]
    fn the_previous_subnet_is_kept_if_free_and_fitting() {
        let config = config(r#"{"Network":"10.0.0.0/16"}"#);
        let mut rng = StdRng::seed_from_u64(1);
        let previous = keys(&["10.0.77.0-24"])[0];
        assert_eq!(choose(&config, &[], Some(previous), &mut rng), Ok(previous));
        for taken in ["10.0.77.0-24", "10.0.77.128-25", "10.0.64.0-18"] {
            let got = choose(&config, &keys(&[taken]), Some(previous), &mut rng).unwrap();
            assert_ne!(got, previous, "{taken}");
        }
        let misfit = keys(&["10.0.77.0-25"])[0];
        assert_ne!(choose(&config, &[], Some(misfit), &mut rng), Ok(misfit));
    }

    #[test]
    fn a_subnet_is_drawn_from_the_first_hundred_that_are_free() {
        let config = config(r#"{"Network":"10.0.0.0/16"}"#);
        // Without the first, which no node gets, and one that somebody has.
        let taken = keys(&["10.0.50.0-24"]);
        let mut rng = StdRng::seed_from_u64(1);
        let drawn: std::collections::BTreeSet<u8> = (0..5_000)
            .map(|_| choose(&config, &taken, None, &mut rng).unwrap())
            .map(|subnet| subnet.ipv4().unwrap().addr().octets()[2])
            .collect();
        let first_hundred = (1..=101).filter(|&third| third != 50).collect();
        assert_eq!(drawn, first_hundred);
    }

    #[test]
    fn the_last_free_subnet_is_found_and_then_none() {
        let config = config(r#"{"Network":"10.0.0.0/24","SubnetLen":26}"#);
        let mut rng = StdRng::seed_from_u64(1);
        let taken = keys(&["10.0.0.64-26", "10.0.0.192-26"]);
        assert_eq!(
            choose(&config, &taken, None, &mut rng).unwrap().to_string(),
            "10.0.0.128-26"
        );
        let taken = keys(&["10.0.0.64-26", "10.0.0.128-25"]);
        let error = choose(&config, &taken, None, &mut rng).unwrap_err();
        assert!(error.to_string().contains("out of subnets"), "{error}");
    }

    #[test]
    fn the_end_of_the_address_space_is_not_walked_past() {
        let config = config(r#"{"Network":"255.255.255.0/24","SubnetLen":30,"SubnetMin":"255.255.255.252"}"#);
        let mut rng = StdRng::seed_from_u64(1);
        assert!(choose(&config, &[], None, &mut rng).is_ok());
        assert!(choose(&config, &keys(&["255.255.255.252-30"]), None, &mut rng).is_err());
        let config = self::config(
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::/0","IPv6SubnetMin":"ffff:ffff:ffff:ffff::"}"#,
        );
        let got = choose(&config, &[], None, &mut rng).unwrap();
        assert_eq!(got.to_string(), "0.0.0.0-0&ffff:ffff:ffff:ffff::-64");
        assert!(choose(&config, &[got], None, &mut rng).is_err());
    }

    proptest! {
        #[test]
        fn a_choice_fits_and_overlaps_nothing(
            seed in any::<u64>(),
            taken in prop::collection::vec((any::<u16>(), 18_u8..=28), 0..300),
        ) {
            let config = config(
                r#"{"Network":"10.0.0.0/16","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#,
            );
            let taken: Vec<Subnet> = taken
                .into_iter()
                .map(|(bits, len)| Subnet {
                    v4: Ipv4Prefix::new((0x0a00_0000 | u32::from(bits)).into(), len).unwrap(),
                    v6: Some(Ipv6Prefix::new((0xfd00_u128 << 112 | u128::from(bits) << 64).into(), 64).unwrap()),
                })
                .collect();
            match choose(&config, &taken, None, &mut StdRng::seed_from_u64(seed)) {
                Ok(subnet) => {
                    prop_assert!(config.fits(subnet));
                    prop_assert!(!taken.iter().any(|other| other.overlaps(subnet)));
                }
                Err(_) => {
                    let range = config.v4.unwrap();
                    for third in 1..=255 {
                        let subnet = Ipv4Prefix::new(std::net::Ipv4Addr::new(10, 0, third, 0), 24).unwrap();
                        prop_assert!(range.holds(subnet));
                        prop_assert!(taken.iter().any(|other| other.v4.overlaps(subnet)));
                    }
                }
            }
        }
    }
}
