//! The device and the sockets of a data plane: opened, or taken over from an earlier life.

use std::net::Ipv6Addr;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::{SegmentIo, SegmentSend, Setup};
use crate::addr::Vni;
use crate::backend::{Backend, Carrier};
use crate::daemon::{ports, succession, ways};
use crate::dataplane::endpoint::LocalSids;
use crate::dataplane::route::SharedRoutes;
use crate::dataplane::stats::WorkerStats;
use crate::dataplane::{Encap, Oversize};
use crate::host::endpoint::{Endpoint, Outlet, SidOptions, SidWorker};
use crate::host::handover::{Bundle, Kind};
use crate::host::outer_tun::{self, OuterTun, PathMtus};
use crate::host::packet::{PacketSender, SharedWays};
use crate::host::probe::Switch;
use crate::host::raw::{self, RawError, RawOptions, RawUnderlay};
use crate::host::shared_port::SharedPorts;
use crate::host::socket::{SocketOffloads, UdpUnderlay, UnderlayOptions};
use crate::host::tun::{Tun, TunError, TunOptions};
use crate::host::underlay::AnyUnderlay;
use crate::options::{Offload, OuterDf, Srv6Io, Srv6Send};

/// Takes over the queues of an earlier life, or makes the device; and which of the two it was.
pub(super) fn make_tun(options: &TunOptions, bundle: &mut Bundle) -> Result<(Tun, bool), TunError> {
    if bundle.is_empty() {
        return Ok((Tun::create(options)?, false));
    }
    let adopted = match bundle.take(Kind::Tun, options.queues) {
        Some(queues) => Tun::adopt(queues, options),
        None => Err(std::io::Error::other("another number of queues")),
    };
    match adopted {
        Ok(tun) => {
            tracing::info!(
                device = options.name,
                "went on with the device of an earlier life"
            );
            Ok((tun, true))
        }
        Err(error) => {
            // That it is gone is why there is a new life.
            if error.raw_os_error() != Some(libc::EBADFD) {
                tracing::warn!(device = options.name, %error, "the device of an earlier life is of no use; making it anew");
            }
            // Its sockets go with it, and so does who still has the device.
            *bundle = Bundle::default();
            succession::held().release(&options.name);
            succession::held().tell_stop();
            Ok((Tun::create(options)?, false))
        }
    }
}

/// Decides how SRv6 packets come and go, and gives what the kernel said if that is not how it should be; `None` for a backend without them.
pub(super) fn choose_io<B: Backend>(setup: &Setup<'_, B>) -> Result<(Option<SegmentIo>, Option<RawError>)> {
    let Carrier::Raw { sids, source, .. } = setup.backend.carrier() else {
        return Ok((None, None));
    };
    match setup.options.srv6_io {
        Srv6Io::Raw => Ok((Some(SegmentIo::Raw), None)),
        Srv6Io::Tun => Ok((Some(SegmentIo::TunForced), None)),
        Srv6Io::Auto => match RawUnderlay::open(&raw_options(setup, &sids, source, 1), 0) {
            Ok(_) => Ok((Some(SegmentIo::Raw), None)),
            Err(error) if error.is_refused() => Ok((Some(SegmentIo::TunInstead), Some(error))),
            Err(error) => Err(error.into()),
        },
    }
}

/// What carries the packets of all queues.
pub(super) struct Opened {
    pub(super) underlays: Vec<AnyUnderlay>,
    /// Those of UDP sockets, if there are any.
    pub(super) socket_offloads: Option<SocketOffloads>,
    /// Counters of what deals with packets that are not the queues', if that is done already.
    pub(super) others: Option<Arc<WorkerStats>>,
}

/// Makes the outer TUN device, with what deals with packets that are not the queue's.
pub(super) fn open_outer<B: Backend>(
    setup: &Setup<'_, B>,
    routes: &SharedRoutes<<B::Encap as Encap>::Hop>,
    heard: PathMtus,
) -> Result<Opened> {
    let Carrier::Raw { sids, domain, source } = setup.backend.carrier() else {
        anyhow::bail!("there are no SIDs to route");
    };
    let name = outer_tun::name(&setup.options.device);
    let device = OuterTun::create(&name).with_context(|| format!("cannot create TUN device {name:?}"))?;
    let stats = Arc::<WorkerStats>::default();
    let out = Outlet::tun(device.try_clone()?, Arc::clone(&sids), source, Arc::clone(&stats));
    let has_next_hops = sids.iter().any(|(_, sid)| sid.has_next_hop());
    if has_next_hops && !out.reaches_next_hops() {
        tracing::warn!(
            "a SID of this node sends to a next hop of its own, which takes raw sockets (CAP_NET_RAW); its packets are dropped and counted as underlay_denied"
        );
    }
    let options = SidOptions {
        sids: Arc::clone(&sids),
        domain,
        link_mtu: setup.interface.mtu,
    };
    let worker = SidWorker::new(options, routes, out);
    Ok(Opened {
        underlays: vec![AnyUnderlay::Tun(OuterTun::new(device, sids, worker, heard))],
        socket_offloads: None,
        others: Some(stats),
    })
}

/// Opens the sockets of all queues.
pub(super) fn open_underlays<B: Backend>(
    setup: &Setup<'_, B>,
    queues: usize,
    bundle: &mut Bundle,
) -> Result<Opened> {
    let options = setup.options;
    match setup.backend.carrier() {
        Carrier::Udp {
            port,
            source_ports,
            vni,
        } => {
            let wanted = UnderlayOptions {
                v4: setup.interface.v4,
                v6: setup.interface.v6,
                port,
                source_ports: options
                    .source_ports
                    .map_or(source_ports, |ports| usize::from(ports.get())),
                queues,
                gso: switch(options.udp_gso),
                gro: switch(options.udp_gro),
                v4_oversize: match options.outer_df {
                    OuterDf::Auto => setup.backend.oversize().v4,
                    OuterDf::Set => Oversize::Refuse,
                    OuterDf::Clear => Oversize::FragmentAnywhere,
                },
                v6_oversize: setup.backend.oversize().v6,
            };
            let bundle = std::mem::take(bundle);
            let underlays = match vni.zip(ports::shared()) {
                Some((vni, ports)) => share_underlays((ports, vni), &wanted, bundle, &options.device)?,
                None => open_or_adopt(&wanted, bundle, &options.device)?,
            };
            let offloads = underlays.first().context("no queue")?.offloads();
            Ok(Opened {
                underlays: underlays.into_iter().map(AnyUnderlay::Udp).collect(),
                socket_offloads: Some(offloads),
                others: None,
            })
        }
        Carrier::Raw { sids, source, .. } => {
            let wanted = raw_options(setup, &sids, source, queues);
            let has_sockets = bundle.has_sockets();
            let underlays = match adopt_raw(&wanted, bundle) {
                Some(underlays) => underlays,
                None => {
                    // Two owners of such sockets would both get every packet.
                    *bundle = Bundle::default();
                    if has_sockets {
                        give_up_sockets(&options.device);
                    }
                    (0..queues)
                        .map(|queue| RawUnderlay::open(&wanted, queue))
                        .collect::<Result<Vec<_>, _>>()?
                }
            };
            Ok(Opened {
                underlays: underlays.into_iter().map(AnyUnderlay::Raw).collect(),
                socket_offloads: None,
                others: None,
            })
        }
    }
}

/// Has packets of raw underlays leave by packet sockets if that is asked for; says how they leave, and what tells the packet sockets where to.
pub(super) fn choose_send<B: Backend>(
    setup: &Setup<'_, B>,
    io: Option<SegmentIo>,
    underlays: &mut [AnyUnderlay],
) -> (Option<SegmentSend>, Option<ways::Keeper>) {
    let (Carrier::Raw { source, .. }, Some(io)) = (setup.backend.carrier(), io) else {
        return (None, None);
    };
    match (io, setup.options.srv6_send) {
        (SegmentIo::Raw, Srv6Send::Auto | Srv6Send::Raw) => return (Some(SegmentSend::Raw), None),
        (SegmentIo::Raw, Srv6Send::Packet) => {}
        (SegmentIo::TunForced | SegmentIo::TunInstead, Srv6Send::Packet) => {
            tracing::warn!(
                "--srv6-send=packet goes with raw sockets; packets leave by the TUN device as well"
            );
            return (None, None);
        }
        (SegmentIo::TunForced | SegmentIo::TunInstead, Srv6Send::Auto | Srv6Send::Raw) => {
            return (None, None);
        }
    }
    let ways = SharedWays::default();
    let senders: std::io::Result<Vec<_>> = underlays.iter().map(|_| PacketSender::open(&ways)).collect();
    match senders {
        Ok(senders) => {
            for (underlay, sender) in underlays.iter_mut().zip(senders) {
                underlay.send_by(sender);
            }
            let keeper = ways::Keeper::start(setup.netlink.clone(), source, ways);
            (Some(SegmentSend::Packet), Some(keeper))
        }
        Err(error) => {
            tracing::warn!(%error, "packet sockets are refused, so SRv6 packets leave by raw sockets");
            (Some(SegmentSend::RawInstead), None)
        }
    }
}

/// Takes over the sockets of an earlier life, or opens new ones.
fn open_or_adopt(wanted: &UnderlayOptions, mut bundle: Bundle, device: &str) -> Result<Vec<UdpUnderlay>> {
    let has_sockets = bundle.has_sockets();
    if let Some(underlays) = adopt_underlays(wanted, &mut bundle) {
        return Ok(underlays);
    }
    drop(bundle);
    if has_sockets {
        give_up_sockets(device);
    }
    let opened = (0..wanted.queues).map(|_| UdpUnderlay::open(wanted));
    Ok(opened.collect::<Result<_, _>>()?)
}

/// Whoever still has a socket of an earlier life has its port.
fn give_up_sockets(device: &str) {
    succession::held().release_sockets(device);
    succession::held().tell_stop();
}

/// The same for one of several networks that may have one port: sockets that another of them has go before those of an earlier life, which are
/// the same.
fn share_underlays(
    sharing: (&SharedPorts, Vni),
    wanted: &UnderlayOptions,
    mut bundle: Bundle,
    device: &str,
) -> Result<Vec<UdpUnderlay>> {
    let has_sockets = bundle.has_sockets();
    let mut earlier = |kind, asked: bool| {
        let held = asked.then(|| bundle.take(kind, wanted.queues)).flatten();
        held.unwrap_or_default().into_iter()
    };
    let mut v4 = earlier(Kind::Udp4, wanted.v4.is_some());
    let mut v6 = earlier(Kind::Udp6, wanted.v6.is_some());
    let held: Vec<_> = (0..wanted.queues).map(|_| [v4.next(), v6.next()]).collect();
    let shared = held
        .into_iter()
        .enumerate()
        .map(|(queue, held)| UdpUnderlay::share(sharing, queue, wanted, held));
    match shared.collect::<Result<Vec<_>, _>>() {
        Ok(underlays) => return Ok(underlays),
        Err(error) if has_sockets => {
            tracing::info!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "the sockets of an earlier life are of no use; opening new ones"
            );
        }
        Err(error) => return Err(error.into()),
    }
    drop(bundle);
    give_up_sockets(device);
    let new = (0..wanted.queues).map(|queue| UdpUnderlay::share(sharing, queue, wanted, [None, None]));
    Ok(new.collect::<Result<_, _>>()?)
}

/// Takes over the sockets of an earlier life, if they are all there and fit.
fn adopt_underlays(wanted: &UnderlayOptions, bundle: &mut Bundle) -> Option<Vec<UdpUnderlay>> {
    if bundle.is_empty() {
        return None;
    }
    let mut of = |kind, asked: bool| match asked {
        true => bundle.take(kind, wanted.queues),
        false => Some(Vec::new()),
    };
    let (v4, v6) = (
        of(Kind::Udp4, wanted.v4.is_some())?,
        of(Kind::Udp6, wanted.v6.is_some())?,
    );
    let (mut v4, mut v6) = (v4.into_iter(), v6.into_iter());
    let adopted = (0..wanted.queues).map(|_| UdpUnderlay::adopt(wanted, v4.next(), v6.next()));
    match adopted.collect::<Result<Vec<_>, _>>() {
        Ok(underlays) => Some(underlays),
        Err(error) => {
            tracing::info!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "the sockets of an earlier life are of no use; opening new ones"
            );
            None
        }
    }
}

/// Takes over the raw sockets of an earlier life, if they are all there and fit.
fn adopt_raw(wanted: &RawOptions, bundle: &mut Bundle) -> Option<Vec<RawUnderlay>> {
    if bundle.is_empty() {
        return None;
    }
    let [v4, v6, routing] = raw::QUEUE_KINDS;
    let v4 = bundle.take(v4, wanted.queues)?;
    let v6 = bundle.take(v6, wanted.queues)?;
    let routing = bundle.take(routing, wanted.queues)?;
    let queues = v4.into_iter().zip(v6).zip(routing).enumerate();
    let adopted = queues.map(|(queue, ((v4, v6), routing))| {
        RawUnderlay::adopt(wanted, queue, [Some(v4), Some(v6), Some(routing)])
    });
    match adopted.collect::<Result<Vec<_>, _>>() {
        Ok(underlays) => Some(underlays),
        Err(error) => {
            tracing::warn!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "the raw sockets of an earlier life are of no use; opening new ones"
            );
            None
        }
    }
}

fn raw_options<B>(setup: &Setup<'_, B>, sids: &LocalSids, source: Ipv6Addr, queues: usize) -> RawOptions {
    RawOptions {
        interface: setup.interface.name.clone(),
        locators: sids.locators().to_vec(),
        ends: sids.ends().collect(),
        source,
        queues,
    }
}

/// Starts what deals with packets to SIDs that do not end in the device, for a backend that has SIDs.
pub(super) fn start_endpoint<B: Backend>(
    setup: &Setup<'_, B>,
    routes: &SharedRoutes<<B::Encap as Encap>::Hop>,
    bundle: &mut Bundle,
    held: &mut Bundle,
) -> Result<Option<Endpoint>> {
    let Carrier::Raw { sids, domain, source } = setup.backend.carrier() else {
        return Ok(None);
    };
    let raw = raw_options(setup, &sids, source, 1);
    let options = SidOptions {
        sids,
        domain,
        link_mtu: setup.interface.mtu,
    };
    let given = raw::SID_KINDS.map(|kind| bundle.take(kind, 1).and_then(|mut found| found.pop()));
    Ok(Some(Endpoint::start(&raw, options, routes, given, held)?))
}

pub(super) fn switch(offload: Offload) -> Switch {
    match offload {
        Offload::Auto => Switch::Auto,
        Offload::Off => Switch::Off,
    }
}
