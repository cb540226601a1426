//! The underlays there are, as one type for the threads.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

use crate::dataplane::datagram::DatagramBatch;
use crate::dataplane::packet::{PacketBatch, RunLimits, SendPlan};
use crate::dataplane::stats::WorkerStats;
use crate::dataplane::{SendFailure, Underlay};
use crate::host::handover::Bundle;
use crate::host::outer_tun::OuterTun;
use crate::host::packet::PacketSender;
use crate::host::raw::RawUnderlay;
use crate::host::sandbox::Role;
use crate::host::socket::UdpUnderlay;

/// What one queue sends and receives by.
pub enum AnyUnderlay {
    /// For backends in UDP.
    Udp(UdpUnderlay),
    /// For SRv6.
    Raw(RawUnderlay),
    /// For SRv6 where raw sockets cannot be had.
    Tun(OuterTun),
}

impl AnyUnderlay {
    /// The same for the outbound direction.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Udp(underlay) => underlay.try_clone().map(Self::Udp),
            Self::Raw(underlay) => underlay.try_clone().map(Self::Raw),
            Self::Tun(underlay) => underlay.try_clone().map(Self::Tun),
        }
    }

    /// Has what `sender` takes leave by it from now on, if this is a raw underlay.
    pub fn send_by(&mut self, sender: PacketSender) {
        match self {
            Self::Raw(underlay) => underlay.send_by(sender),
            Self::Udp(_) | Self::Tun(_) => {}
        }
    }

    /// What the thread that receives by it is for.
    pub fn role(&self) -> Role {
        match self {
            Self::Udp(_) | Self::Raw(_) => Role::Queue,
            // Its reader deals with what SIDs say, too.
            Self::Tun(_) => Role::Sids,
        }
    }

    /// Puts second descriptors of what another process may go on with into `bundle`.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hold(&self, queue: usize, bundle: &mut Bundle) -> io::Result<()> {
        match self {
            Self::Udp(underlay) => underlay.hold(queue, bundle),
            Self::Raw(underlay) => underlay.hold(queue, bundle),
            Self::Tun(_) => Ok(()),
        }
    }

    /// What to wait for before receiving.
    pub fn readable(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let (udp, raw, tun) = match self {
            Self::Udp(underlay) => (Some(underlay.readable()), None, None),
            Self::Raw(underlay) => (None, Some(underlay.readable()), None),
            Self::Tun(underlay) => (None, None, Some(underlay.readable())),
        };
        udp.into_iter()
            .flatten()
            .chain(raw.into_iter().flatten())
            .chain(tun)
    }
}

impl Underlay for AnyUnderlay {
    #[inline]
    fn recv(&mut self, batch: &mut DatagramBatch) -> io::Result<()> {
        match self {
            Self::Udp(underlay) => underlay.recv(batch),
            Self::Raw(underlay) => underlay.recv(batch),
            Self::Tun(underlay) => underlay.recv(batch),
        }
    }

    #[inline]
    fn send(
        &mut self,
        plan: &SendPlan,
        batch: &PacketBatch,
        stats: &WorkerStats,
        failures: &mut Vec<SendFailure>,
    ) -> io::Result<()> {
        match self {
            Self::Udp(underlay) => underlay.send(plan, batch, stats, failures),
            Self::Raw(underlay) => underlay.send(plan, batch, stats, failures),
            Self::Tun(underlay) => underlay.send(plan, batch, stats, failures),
        }
    }

    fn limits(&self, to: SocketAddr) -> RunLimits {
        match self {
            Self::Udp(underlay) => underlay.limits(to),
            Self::Raw(underlay) => underlay.limits(to),
            Self::Tun(underlay) => underlay.limits(to),
        }
    }

    fn source_ports(&self) -> usize {
        match self {
            Self::Udp(underlay) => underlay.source_ports(),
            Self::Raw(underlay) => underlay.source_ports(),
            Self::Tun(underlay) => underlay.source_ports(),
        }
    }

    #[inline]
    fn settle(&mut self, stats: &WorkerStats) {
        match self {
            Self::Udp(underlay) => underlay.settle(stats),
            Self::Raw(underlay) => underlay.settle(stats),
            Self::Tun(underlay) => underlay.settle(stats),
        }
    }
}
