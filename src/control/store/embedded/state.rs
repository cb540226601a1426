//! What is in the file, as it is in memory.

use std::collections::BTreeMap;
use std::net::IpAddr;

use tokio::time::Instant;

use super::log::Log;
use crate::addr::NetworkName;
use crate::control::identity::Holder;
use crate::control::store::{NetworkEvent, Rival};
use crate::lease::{LeaseAttrs, LeaseEvent, Subnet};

/// How many hosts each network knows at most: as many as a node knows leases.
pub(super) const MAX_HOSTS: usize = 100_000;

#[derive(Debug)]
pub(super) struct State {
    pub(super) file: u64,
    pub(super) revision: u64,
    /// The revision the file had when it was read: what came before is in no log.
    loaded: u64,
    pub(super) networks: BTreeMap<Option<NetworkName>, Network>,
    /// Networks with a name that came and went.
    pub(super) names: Log<NetworkEvent>,
}

impl State {
    pub(super) fn new(file: u64, revision: u64) -> Self {
        Self {
            file,
            revision,
            loaded: revision,
            networks: BTreeMap::new(),
            names: Log::new(revision),
        }
    }

    pub(super) fn network(&self, name: Option<&NetworkName>) -> Option<&Network> {
        self.networks.get(&name.cloned())
    }

    pub(super) fn network_mut(&mut self, name: Option<&NetworkName>) -> &mut Network {
        let loaded = self.loaded;
        self.networks.entry(name.cloned()).or_insert_with(|| Network {
            config: None,
            leases: BTreeMap::new(),
            hosts: BTreeMap::new(),
            log: Log::new(loaded),
        })
    }
}

/// One network.
#[derive(Debug)]
pub(super) struct Network {
    /// Without it there is no such network.
    pub(super) config: Option<String>,
    pub(super) leases: BTreeMap<Subnet, Record>,
    /// Who has which public address.
    pub(super) hosts: BTreeMap<IpAddr, Host>,
    pub(super) log: Log<LeaseEvent>,
}

impl Network {
    /// What makes `address` that of `host`; hosts that are gone go. `None` if another live host has it, or there are too many.
    pub(super) fn claim(&self, address: IpAddr, host: Host, now: Instant) -> Option<Vec<Change>> {
        let taken = |there: &Host| there.lives(now) && there.holder.differs_from(&host.holder);
        if self.hosts.get(&address).is_some_and(taken) {
            return None;
        }
        let goes = |(other, there): &(&IpAddr, &Host)| {
            // This process has one host: if it has another address by now, the old one is free.
            let moved = there.ends.is_none() && host.ends.is_none();
            **other != address && (moved || !there.lives(now))
        };
        let gone: Vec<Change> = self
            .hosts
            .iter()
            .filter(goes)
            .map(|(address, _)| Change::Unclaim(*address))
            .collect();
        if self.hosts.len() - gone.len() >= MAX_HOSTS && !self.hosts.contains_key(&address) {
            return None;
        }
        Some(gone.into_iter().chain([Change::Claim(address, host)]).collect())
    }

    pub(super) fn next_end(&self) -> Option<Instant> {
        self.leases.values().filter_map(|record| record.ends).min()
    }
}

/// Who has a public address.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) holder: Holder,
    /// When it counts as gone; `None` if it is the host of this process.
    pub(super) ends: Option<Instant>,
}

impl Host {
    pub(super) fn lives(&self, now: Instant) -> bool {
        self.ends.is_none_or(|end| end > now)
    }

    pub(super) fn as_rival(&self) -> Rival {
        Rival {
            host: self.holder.host.clone(),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) attrs: LeaseAttrs,
    pub(super) revision: u64,
    pub(super) ends: Option<Instant>,
}

#[derive(Debug)]
pub(super) enum Change {
    Config(Option<String>),
    Put(Subnet, Record),
    Delete(Subnet),
    Claim(IpAddr, Host),
    Unclaim(IpAddr),
}
