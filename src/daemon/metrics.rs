//! The counters as OpenMetrics text, for Prometheus.
//!
//! Nothing is kept for it: each scrape takes the figures of every peer once, beside what the status document is made from, and a series is
//! made when it is written. Names have the prefix `kersey_`, base units, and `_total` on what only grows. Every series of a node carries `network`; `_` is the network that has no name. A peer is named by its
//! subnet, so a thousand peers make about five thousand series. After a device was made anew its counters begin at 0, as Prometheus expects.
//!
//! There is nothing of a peer's round trips and losses: flannel's formats have no field to measure them by, and nothing is sent that a
//! peer did not ask for.

mod families;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use self::families::{Families, Labels, Sizes};
use crate::daemon::report::Sample;
use crate::daemon::report::peers::PeerFigures;
use crate::dataplane::stats::Count;

/// What is told of the process as a whole.
#[derive(Clone, Debug, Default)]
pub(super) struct Process {
    /// Seconds since 1970 at which it started.
    pub(super) started_unix_s: f64,
    /// The kernel's release.
    pub(super) kernel: String,
    /// Reloads that went well, and that did not.
    pub(super) reloads: [u64; 2],
    /// What it has given up of its privileges: part, and what came of it.
    pub(super) sandbox: Vec<(String, String)>,
    /// Whether the process that runs firewall tools is there, if there was one.
    pub(super) firewall_helper: Option<bool>,
}

/// One scrape.
#[derive(Debug)]
struct Scrape {
    process: Process,
    networks: Vec<(String, Sample)>,
}

/// Renders one scrape.
pub(super) fn render(process: Process, networks: Vec<(String, Sample)>) -> String {
    let mut registry = Registry::with_prefix("kersey");
    registry.register_collector(Box::new(Scrape { process, networks }));
    let mut text = String::new();
    // Writing to a string cannot fail; what a collector refuses would be a mistake in the names below, which the test finds.
    match encode(&mut text, &registry) {
        Ok(()) => text,
        Err(fmt::Error) => "# EOF\n".to_owned(),
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Families(&mut encoder);
        self.process(&mut out)?;
        self.node(&mut out)?;
        self.peers(&mut out)?;
        self.packets(&mut out)?;
        self.store(&mut out)
    }
}

impl Scrape {
    fn process(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        let build = vec![
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("arch", std::env::consts::ARCH.to_owned()),
            ("kernel", self.process.kernel.clone()),
        ];
        out.gauges("build_info", "Which build runs, on what", [(build, 1.0)])?;
        out.gauges(
            "process_start_time_seconds",
            "When the process started, since 1970",
            [(Vec::new(), self.process.started_unix_s)],
        )?;
        let [applied, refused] = self.process.reloads;
        let reloads = [("applied", applied), ("refused", refused)];
        out.counters(
            "config_reloads",
            "Reloads by SIGHUP",
            reloads.map(|(result, n)| (vec![("result", result.to_owned())], n)),
        )?;
        let parts = self.process.sandbox.iter();
        out.gauges(
            "sandbox_enabled",
            "Whether a part of the sandbox holds",
            parts.map(|(part, state)| (vec![("part", part.clone())], holds(state))),
        )?;
        let helper = self.process.firewall_helper.into_iter();
        out.gauges(
            "firewall_helper_up",
            "Whether the process that runs firewall tools is there",
            helper.map(|up| (Vec::new(), truth(up))),
        )
    }

    fn node(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        out.gauges(
            "ready",
            "Whether the subnet file is written and packets flow",
            self.each(|_, sample| Some((Vec::new(), truth(sample.status.ready)))),
        )?;
        out.gauges(
            "backend_info",
            "The backend in use, and why",
            self.each(|_, sample| {
                let backend = &sample.status.backend;
                let labels = vec![
                    ("backend", backend.name.clone()),
                    ("reason", backend.reason.clone()),
                ];
                (!backend.name.is_empty()).then_some((labels, 1.0))
            }),
        )?;
        out.gauges(
            "lease_expiry_timestamp_seconds",
            "When our lease ends unless it is renewed, since 1970; absent for a reservation",
            self.each(|_, sample| {
                let end = sample.status.node.lease_expires_unix_s?;
                Some((Vec::new(), end as f64))
            }),
        )?;
        out.gauges(
            "inner_mtu_bytes",
            "MTU inside",
            self.each(|_, sample| Some((Vec::new(), f64::from(sample.status.node.inner_mtu)))),
        )?;
        out.gauges(
            "tun_offload_enabled",
            "Whether an offload is in use",
            self.rows(|sample| {
                let offloads = sample.status.device.offloads.iter();
                offloads
                    .map(|(kind, state)| (vec![("kind", kind.clone())], holds(state)))
                    .collect()
            }),
        )?;
        out.gauges(
            "worker_threads",
            "Threads that move packets",
            self.each(|_, sample| Some((Vec::new(), sample.status.device.threads as f64))),
        )
    }

    fn peers(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        out.gauges(
            "peers",
            "Other nodes, by whether packets can be sent to them",
            self.rows(|sample| {
                let reachable = sample.peers.iter().filter(|peer| peer.reachable).count();
                let unreachable = sample.peers.len() - reachable;
                let counted = [("reachable", reachable), ("unreachable", unreachable)];
                counted
                    .map(|(state, n)| (vec![("state", state.to_owned())], n as f64))
                    .to_vec()
            }),
        )?;
        out.gauges(
            "routes",
            "Prefixes that lead to peers",
            self.rows(|sample| {
                let of = |peer: &PeerFigures| peer.subnet.prefixes().count();
                let prefixes: usize = sample.peers.iter().map(of).sum();
                vec![(Vec::new(), prefixes as f64)]
            }),
        )?;
        out.counters(
            "route_updates",
            "Route tables handed to the threads",
            self.each(|_, sample| Some((Vec::new(), sample.route_updates))),
        )?;
        type Figure = fn(&PeerFigures) -> u64;
        let figures: [(&str, &str, Figure); 4] = [
            ("peer_tx_packets", "Inner packets sent to a peer", |peer| {
                peer.outbound_packets
            }),
            ("peer_tx_bytes", "Their bytes", |peer| peer.outbound_bytes),
            ("peer_rx_packets", "Inner packets received from a peer", |peer| {
                peer.inbound_packets
            }),
            ("peer_rx_bytes", "Their bytes", |peer| peer.inbound_bytes),
        ];
        for (name, help, figure) in figures {
            out.counters(name, help, self.each_peer(|peer| Some(figure(peer))))?;
        }
        out.gauges(
            "peer_last_seen_timestamp_seconds",
            "When packets of a peer last came, to within 5 s, since 1970; absent before the first, and a peer may well have nothing to say",
            self.each_peer(|peer| peer.last_seen_unix_s.map(|at| at as f64)),
        )?;
        out.gauges(
            "peer_path_mtu_bytes",
            "The largest packet a peer can be sent, where the path carries less than the link",
            self.each_peer(|peer| peer.narrow_mtu.map(f64::from)),
        )
    }

    fn packets(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        let drops = self.networks.iter().flat_map(|(network, sample)| {
            sample.drops.iter().map(move |(reason, direction, n)| {
                let labels = vec![
                    ("network", network.clone()),
                    ("reason", reason.name().to_owned()),
                    ("direction", (*direction).to_owned()),
                ];
                (labels, *n)
            })
        });
        out.counters("drops", "Packets dropped", drops)?;
        let batches = self.networks.iter().flat_map(|(network, sample)| {
            sample.batches.iter().map(move |batches| {
                let labels = vec![
                    ("network", network.clone()),
                    ("direction", batches.direction.to_owned()),
                ];
                (labels, Sizes::of(batches))
            })
        });
        out.histograms("batch_packets", "Inner packets a batch", batches)?;
        let calls = self.networks.iter().flat_map(|(network, sample)| {
            sample.calls.iter().map(move |(call, n)| {
                let labels = vec![("network", network.clone()), ("call", call.name().to_owned())];
                (labels, *n)
            })
        });
        out.counters("syscalls", "System calls of the packet path", calls)?;
        for count in Count::ALL {
            let name = if *count == Count::ReceiveOverflows {
                "socket_overflow"
            } else {
                count.name()
            };
            out.counters(
                name,
                help(*count),
                self.each(|_, sample| {
                    let n = sample.status.counters.get(count.name())?;
                    Some((Vec::new(), *n))
                }),
            )?;
        }
        Ok(())
    }

    fn store(&self, out: &mut Families<'_, '_>) -> fmt::Result {
        out.gauges(
            "store_up",
            "Whether the store answered last time",
            self.each(|_, sample| Some((Vec::new(), truth(sample.status.store.connected)))),
        )?;
        out.counters(
            "store_errors",
            "Errors of the store",
            self.each(|_, sample| Some((Vec::new(), sample.store_errors))),
        )?;
        out.counters(
            "lease_conflicts",
            "How often somebody else had, took or changed our lease",
            self.each(|_, sample| Some((Vec::new(), sample.lease_conflicts))),
        )?;
        out.counters(
            "store_resets",
            "How often the store was found wiped, restored from a backup or exchanged",
            self.each(|_, sample| Some((Vec::new(), sample.status.store.resets))),
        )?;
        out.gauges(
            "rejected_leases",
            "Leases of others that are not believed",
            self.rows(|sample| {
                let rejected = sample.status.rejected_leases.iter();
                rejected
                    .map(|(reason, n)| (vec![("reason", reason.clone())], *n as f64))
                    .collect()
            }),
        )
    }

    /// One series a network, if it has one.
    fn each<V>(&self, of: impl Fn(&str, &Sample) -> Option<(Labels, V)>) -> Vec<(Labels, V)> {
        let series = self.networks.iter().filter_map(|(network, sample)| {
            let (mut labels, value) = of(network, sample)?;
            labels.insert(0, ("network", network.clone()));
            Some((labels, value))
        });
        series.collect()
    }

    /// Several series a network.
    fn rows<V>(&self, of: impl Fn(&Sample) -> Vec<(Labels, V)>) -> Vec<(Labels, V)> {
        let mut all = Vec::new();
        for (network, sample) in &self.networks {
            for (mut labels, value) in of(sample) {
                labels.insert(0, ("network", network.clone()));
                all.push((labels, value));
            }
        }
        all
    }

    /// One series a peer, if it has one; made one by one, for there may be many.
    fn each_peer<V>(
        &self,
        of: impl Fn(&PeerFigures) -> Option<V> + Copy,
    ) -> impl Iterator<Item = (Labels, V)> {
        self.networks.iter().flat_map(move |(network, sample)| {
            sample.peers.iter().filter_map(move |peer| {
                let value = of(peer)?;
                let subnets: Vec<_> = peer.subnet.prefixes().map(|prefix| prefix.to_string()).collect();
                let labels = vec![("network", network.clone()), ("peer", subnets.join(","))];
                Some((labels, value))
            })
        })
    }
}

fn truth(value: bool) -> f64 {
    if value { 1.0 } else { 0.0 }
}

/// Whether a state in words says that the thing is in use.
fn holds(state: &str) -> f64 {
    truth(!state.starts_with("off"))
}

fn help(count: Count) -> &'static str {
    match count {
        Count::OutboundPackets => "Inner packets sent to peers",
        Count::OutboundBytes => "Their bytes",
        Count::OutboundSuperPackets => "Super-packets received from the device",
        Count::OutboundRuns => "Messages handed to the underlay",
        Count::OutboundMoved => "Super-packets whose bytes had to be moved",
        Count::OutboundBatches => "Batches sent",
        Count::InboundPackets => "Inner packets received from peers and accepted",
        Count::InboundBytes => "Their bytes",
        Count::InboundFrames => "Frames written to the device",
        Count::InboundSuperPackets => "Frames made of two or more packets",
        Count::InboundBatches => "Batches received",
        Count::InboundDatagrams => "Messages received",
        Count::IcmpSent => "ICMP errors sent to inner senders",
        Count::IcmpLimited => "ICMP errors held back by the rate limit",
        Count::DeviceFallbacks => "Frames the device refused and that were written segment by segment",
        Count::GsoFallbacks => "Messages the kernel would not segment and that were sent one by one",
        Count::PathTooBig => "Datagrams larger than their path carries",
        Count::ReceiveOverflows => "Datagrams the kernel dropped for want of room in our socket",
        Count::PacketSends => "SRv6 packets sent by a packet socket, past the kernel's routing",
        Count::RawSends => "SRv6 packets sent by a raw socket",
        Count::PacketFallbacks => "Messages a packet socket refused and that went by the raw socket",
        Count::SendWaits => "Waits for room in a full send socket",
        Count::SegmentsForwarded => "SRv6 packets sent on towards their next segment",
        Count::SegmentEchoes => "SRv6 pings answered",
        Count::Sleeps => "Times a thread went to sleep",
    }
}

#[cfg(test)]
mod tests;
