//! Whether the underlay is still the one the node joined by.
//!
//! ```text
//!   netlink events ── note ──▶ due, 100 ms later ── look ──▶ the same: on with it
//!                                                       └──▶ another: the node joins anew, with its lease
//! ```
//!
//! Other addresses, another interface for the default route, another MTU: the backend, the sockets and what the lease says may all depend on
//! it, so the node joins the network as if it were new - but for its lease, which it takes along (`Control::moving`). What was chosen stays
//! as long as it is there ([`InterfaceRequest::choose_again`]); where nothing is usable for the moment, the node stays as it is, and waits.
//!
//! Limits: of routes only default routes, and rules of policy routing, make an event. `--iface-can-reach` is looked at every [`PERIOD`] as well.

use std::time::Duration;

use tokio::time::Instant;

use crate::host::interface::{Families, InterfaceRequest, UnderlayInterface};
use crate::host::netlink::{LinkChange, Netlink};
use crate::options::InterfaceOptions;

/// How long changes gather before we look: one `ip` command makes several.
const GATHER: Duration = Duration::from_millis(100);
/// How long the node stays in any case, so that an underlay that keeps changing its mind costs no more than this.
const LEAST_STAY: Duration = Duration::from_secs(1);
/// How often to look without an event, if there may be none.
const PERIOD: Duration = Duration::from_secs(10);

/// What to look for.
pub(super) fn request(options: &InterfaceOptions, families: Families) -> InterfaceRequest {
    InterfaceRequest {
        ifaces: options.iface.clone(),
        iface_regexes: options.iface_regex.clone(),
        can_reach: options.can_reach,
        public_ip: options.public_ip,
        public_ipv6: options.public_ipv6,
        families,
    }
}

/// The underlay is another.
#[derive(Debug)]
pub(super) struct Moved {
    /// What is different, for the log.
    pub(super) what: String,
}

/// Watches one choice.
pub(super) struct UnderlayWatch {
    options: InterfaceOptions,
    /// The families an underlay should have, best first.
    wanted: Vec<Families>,
    current: UnderlayInterface,
    /// Its number, which changes when it is made anew.
    index: u32,
    /// Whether it was usable when last looked at.
    usable: bool,
    due: Option<Instant>,
    not_before: Instant,
}

impl UnderlayWatch {
    /// Watches `current`, chosen by `options` for the first of `wanted` that could be had.
    pub(super) fn new(options: &InterfaceOptions, wanted: &[Families], current: &UnderlayInterface) -> Self {
        let now = Instant::now();
        Self {
            options: options.clone(),
            wanted: wanted.to_vec(),
            current: current.clone(),
            index: current.index,
            usable: true,
            // What happened between the choice and now made no event here.
            due: Some(now + LEAST_STAY),
            not_before: now + LEAST_STAY,
        }
    }

    /// When to look, if ever.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Looks soon if `change` may concern the underlay.
    pub(super) fn note(&mut self, change: &LinkChange) {
        let concerns = match change {
            LinkChange::Link(link) => {
                if link.name == self.current.name {
                    self.index = link.index;
                }
                link.name == self.current.name || !self.usable
            }
            LinkChange::LinkGone(link) => link.name == self.current.name,
            LinkChange::Address(held) | LinkChange::AddressGone(held) => {
                held.index == self.index || !self.usable
            }
            LinkChange::RouteGone(route) | LinkChange::DefaultRoute(route) => route.destination.len() == 0,
            LinkChange::Rule | LinkChange::Overrun => true,
        };
        if concerns {
            let due = (Instant::now() + GATHER).max(self.not_before);
            self.due = Some(self.due.map_or(due, |before| before.min(due)));
        }
    }

    /// Looks; tells if the node has to join anew.
    pub(super) async fn look(&mut self, netlink: &Netlink) -> Option<Moved> {
        self.due = self.options.can_reach.map(|_| Instant::now() + PERIOD);
        let found = self.find(netlink).await;
        if found.is_none() && self.usable {
            tracing::warn!(
                interface = self.current.name,
                "the underlay is away; staying as it is until there is one"
            );
        } else if found.is_some() && !self.usable {
            tracing::info!(interface = self.current.name, "there is an underlay again");
        }
        self.usable = found.is_some();
        let what = difference(&self.current, &found?)?;
        Some(Moved { what })
    }

    async fn find(&self, netlink: &Netlink) -> Option<UnderlayInterface> {
        let held = match (self.current.v4, self.current.v6) {
            (Some(_), Some(_)) => Families::Dual,
            (None, Some(_)) => Families::V6,
            (_, None) => Families::V4,
        };
        if let Ok(found) = request(&self.options, held)
            .choose_again(netlink, &self.current)
            .await
        {
            return Some(found);
        }
        for &families in &self.wanted {
            if let Ok(found) = request(&self.options, families).choose(netlink).await {
                return Some(found);
            }
        }
        None
    }
}

/// What is different about the underlay, if the node has to care. The number of the interface alone is not: sockets are bound to addresses,
/// and who goes by numbers looks them up.
fn difference(old: &UnderlayInterface, new: &UnderlayInterface) -> Option<String> {
    let addrs = |of: &UnderlayInterface| {
        let v4 = of.v4.map(|addr| addr.to_string());
        let v6 = of.v6.map(|addr| addr.to_string());
        let all: Vec<String> = v4.into_iter().chain(v6).collect();
        all.join(" ")
    };
    if old.name != new.name {
        return Some(format!("{} ({}) instead of {}", new.name, addrs(new), old.name));
    }
    if (old.v4, old.v6, old.public_v4, old.public_v6) != (new.v4, new.v6, new.public_v4, new.public_v6) {
        return Some(format!(
            "{} has {} instead of {}",
            new.name,
            addrs(new),
            addrs(old)
        ));
    }
    (old.mtu != new.mtu).then(|| format!("{} has MTU {} instead of {}", new.name, new.mtu, old.mtu))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Mtu;

    #[test]
    fn a_new_number_alone_moves_nobody() {
        let old = UnderlayInterface {
            name: "eth0".to_owned(),
            index: 2,
            mtu: Mtu::new(1500).unwrap(),
            v4: Some("192.0.2.1".parse().unwrap()),
            v6: None,
            public_v4: Some("192.0.2.1".parse().unwrap()),
            public_v6: None,
        };
        let numbered = UnderlayInterface {
            index: 7,
            ..old.clone()
        };
        assert_eq!(difference(&old, &numbered), None);
        let addressed = UnderlayInterface {
            v4: Some("192.0.2.9".parse().unwrap()),
            ..old.clone()
        };
        let told = difference(&old, &addressed).unwrap();
        assert!(told.contains("192.0.2.9 instead of 192.0.2.1"), "{told}");
        let smaller = UnderlayInterface {
            mtu: Mtu::new(1400).unwrap(),
            ..old.clone()
        };
        assert!(difference(&old, &smaller).unwrap().contains("MTU 1400"));
    }
}
