//! A node whose backend has no tunnel: a lease, `subnet.env`, and kernel routes if the backend makes any.
//!
//! The underlay interface is looked up by its name each time routes are made, so that it may go and come back with another number. Its
//! addresses are those it had at start; one that is gone makes the kernel refuse routes until it is back.

use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::Result;
use futures_util::StreamExt;
use tokio::time::{Instant, interval};
use tracing::Instrument;

use crate::addr::Prefix;
use crate::backend::{NoTunnel, Underlay};
use crate::control::config::NetworkConfig;
use crate::control::peers::Peers;
use crate::control::store::Store;
use crate::control::{Control, Published};
use crate::daemon::firewall::Keeper;
use crate::daemon::health::TURN;
use crate::daemon::kernel_routes::{KernelRoutes, Leftovers, Upkeep, Wanted};
use crate::daemon::network::networks;
use crate::daemon::node::{ChooseAgain, UnusableMtu, announce, at, rules_name};
use crate::daemon::report::Report;
use crate::daemon::startup::{families, underlay_interface};
use crate::daemon::succession;
use crate::daemon::supervisor::Task;
use crate::daemon::underlay_watch::{Moved, UnderlayWatch};
use crate::host::interface::{Families, UnderlayInterface};
use crate::host::netlink::{Gateway, Netlink, NetlinkError, Route};
use crate::lease::{Lease, LeaseAttrs, Subnet};
use crate::options::RunOptions;

/// Joins the network with a backend that has no tunnel, and stays in it.
pub(super) async fn join<B: NoTunnel>(
    options: &RunOptions,
    backend: B,
    config: NetworkConfig,
    mut control: Control,
    store: Arc<dyn Store>,
    report: Arc<Report>,
) -> Result<()> {
    // A tunnel's device of an earlier life has no place here.
    succession::held().release(&options.packet_path.device);
    let netlink = Netlink::open()?;
    let wanted = families(&config, false);
    // Packets leave bare, so there is no carrying one family over the other.
    let wanted: &[Families] = if backend.makes_routes() {
        &wanted[..1]
    } else {
        &wanted
    };
    let interface = underlay_interface(options, wanted, &netlink, &report).await;
    let own = Underlay {
        v4: interface.v4,
        v6: interface.v6,
    };
    let public = Underlay {
        v4: interface.public_v4,
        v6: interface.public_v6,
    };
    backend.check(&interface.name, own, public)?;
    if config.v6.is_some() && interface.mtu.bytes() < 1280 {
        // RFC 8200 §5
        return Err(UnusableMtu {
            interface: interface.name.clone(),
            link_mtu: interface.mtu.bytes(),
            rule: "IPv6 needs 1280".to_owned(),
        }
        .into());
    }
    let attrs = LeaseAttrs {
        public_ip: interface.public_v4.unwrap_or(Ipv4Addr::UNSPECIFIED),
        public_ipv6: interface.public_v6,
        backend_type: backend.lease_type().to_owned(),
        backend_data: None,
        backend_v6_data: None,
    };
    let lease = control.acquire(&attrs, &config).await;
    tracing::info!(
        subnet = %lease.subnet,
        interface = interface.name,
        public_ip = %attrs.public_ip,
        public_ipv6 = attrs.public_ipv6.map(|addr| addr.to_string()),
        mtu = interface.mtu.bytes(),
        backend = backend.name(),
        "lease acquired"
    );
    let watch = UnderlayWatch::new(&options.interface, wanted, &interface);
    let (publish, published) = control.channels(&config, &lease);
    let _maintain = Task(tokio::spawn(control.maintain(publish).in_current_span()));
    report.set_plain_node(&backend, &config, &interface, &published, store);
    let upkeep = if backend.makes_routes() {
        Upkeep::Always
    } else {
        Upkeep::UntilClean
    };
    let node = Node {
        options,
        backend,
        config: &config,
        interface: &interface,
        underlay: own,
        routes: KernelRoutes::new(netlink.clone(), networks(&config), upkeep),
        netlink,
        gone_told: false,
        firewall: Keeper::start(options.firewall, rules_name(options), Arc::clone(&report))?,
    };
    node.stay(lease, published, watch, &report).await
}

struct Node<'a, B> {
    options: &'a RunOptions,
    backend: B,
    config: &'a NetworkConfig,
    interface: &'a UnderlayInterface,
    underlay: Underlay,
    routes: KernelRoutes,
    netlink: Netlink,
    /// Whether the interface was missing when last looked for.
    gone_told: bool,
    firewall: Keeper,
}

impl<B: NoTunnel> Node<'_, B> {
    /// Keeps routes and subnet file true.
    async fn stay(
        mut self,
        mut lease: Lease,
        mut published: Published,
        mut underlay: UnderlayWatch,
        report: &Report,
    ) -> Result<()> {
        let mut own = lease.subnet;
        let mut changes = Netlink::watch()?;
        let mut announced = None;
        let mut masquerading = self.firewall.states();
        let mut announce_due = None;
        loop {
            let table = published.peers.borrow_and_update().clone();
            self.follow(&table, own, report).await?;
            if announced != Some(own) {
                let devices = vec![self.interface.name.clone()];
                self.firewall.want(self.config, own, None, devices).await;
                masquerading = self.firewall.states();
                announce_due = self.announce(own, report);
                announced = Some(own);
            }
            let mut turns = interval(TURN);
            loop {
                report.set_turned();
                tokio::select! {
                    _ = turns.tick() => {}
                    // The sender lives as long as the daemon: an error here would be the end of the process anyway.
                    Ok(()) = published.peers.changed() => {
                        self.routes.peers_changed();
                        if self.routes.due().is_none() {
                            self.tell_peers(&published.peers.borrow_and_update(), report);
                        }
                    }
                    Ok(()) = published.lease.changed() => {
                        lease = published.lease.borrow_and_update().clone();
                        let new = lease.subnet;
                        if new != own {
                            tracing::warn!(old = %own, %new, "moving to another subnet");
                            report.not_ready();
                            own = new;
                            break;
                        }
                    }
                    () = at(underlay.due()) => {
                        if let Some(Moved { what }) = underlay.look(&self.netlink).await {
                            return Err(ChooseAgain::Underlay { what, lease: Box::new(lease) }.into());
                        }
                    }
                    Some(change) = changes.next() => {
                        underlay.note(&change);
                        self.routes.note(&change, &self.interface.name);
                    }
                    Ok(()) = masquerading.changed() => {
                        announce_due.get_or_insert_with(Instant::now);
                    }
                    () = at(announce_due) => {
                        announce_due = self.announce(own, report);
                    }
                    () = at(self.routes.due()) => break,
                }
            }
        }
    }

    fn announce(&self, own: Subnet, report: &Report) -> Option<Instant> {
        let (mtu, ip_masq) = (self.interface.mtu, self.firewall.ip_masq());
        announce(self.options, self.config, own, mtu, ip_masq, report)
    }

    async fn follow(&mut self, table: &Peers, own: Subnet, report: &Report) -> Result<()> {
        let index = match self.netlink.link(&self.interface.name).await {
            Ok(link) => Some(link.index),
            Err(NetlinkError::NoLink(_)) => None,
            Err(error) => {
                self.routes.cannot_look(error);
                return Ok(());
            }
        };
        if self.gone_told != index.is_none() {
            self.gone_told = index.is_none();
            if self.gone_told {
                tracing::warn!(
                    interface = self.interface.name,
                    "the underlay interface is gone; waiting for it"
                );
            } else {
                tracing::info!(interface = self.interface.name, "the underlay interface is back");
            }
        }
        let wanted = self.wanted(table, index);
        let own: Vec<Prefix> = own.prefixes().collect();
        let index = index.unwrap_or(self.interface.index);
        self.routes
            .sync(wanted, &own, index, Leftovers::of(table))
            .await?;
        self.tell_peers(table, report);
        Ok(())
    }

    /// The routes to the peers, through the interface that has number `index` if it is there.
    fn wanted(&self, table: &Peers, index: Option<u32>) -> Wanted {
        let mut wanted = Wanted::default();
        for (subnet, attrs) in table.iter() {
            for prefix in subnet.prefixes() {
                match (self.backend.gateway(prefix, attrs, self.underlay), index) {
                    (Ok(Some(gateway)), Some(index)) => wanted.route(Route {
                        gateway: Gateway::Via(gateway),
                        ..Route::direct(prefix, index)
                    }),
                    (Ok(Some(_)), None) => wanted.trouble(prefix, "the underlay interface is gone"),
                    (Ok(None), _) => {}
                    (Err(why), _) => wanted.trouble(prefix, why),
                }
            }
        }
        wanted
    }

    fn tell_peers(&self, table: &Peers, report: &Report) {
        let routes = table.iter().filter_map(|(subnet, _)| {
            let route = self.routes.describe(subnet.prefixes())?;
            Some((subnet, route))
        });
        report.set_plain_peers(table.list().clone(), routes.collect());
    }
}
