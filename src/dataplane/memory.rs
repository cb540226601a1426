//! In-memory twins of the two edges: tests and simulations use them instead of the kernel.
//!
//! [`MemoryDevice`] plays the kernel's part on a TUN queue: it hands over what a host sends, and finishes the checksums of what it is given, as the
//! receiving stack would. [`MemoryUnderlay`] is one end of a wire that the test carries datagrams over by hand: it may lose, delay and reorder them.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};

use crate::dataplane::coalesce::Merge;
use crate::dataplane::datagram::{DatagramBatch, Envelope};
use crate::dataplane::offload::finish_checksum;
use crate::dataplane::packet::{PacketBatch, RunLimits, SendPlan};
use crate::dataplane::stats::WorkerStats;
use crate::dataplane::{Device, DeviceError, SendError, SendFailure, Underlay};
use crate::wire::ip::Ecn;
use crate::wire::virtio::{GsoKind, VirtioHeader};

/// A TUN queue in memory.
#[derive(Debug)]
pub struct MemoryDevice {
    /// What the host sends into the overlay.
    pub from_host: VecDeque<(VirtioHeader, Vec<u8>)>,
    /// What the overlay delivered to the host, checksums finished; super-packets stay whole.
    pub to_host: VecDeque<(VirtioHeader, Vec<u8>)>,
    /// ICMP errors of our own.
    pub answers: Vec<Vec<u8>>,
    /// What it takes beyond plain packets.
    pub merge: Merge,
    /// Kinds of super-packet it refuses with EINVAL, as some kernels do in spite of their promise.
    pub refuses: Vec<GsoKind>,
    /// The error every frame meets, if any.
    pub broken: Option<DeviceError>,
}

impl MemoryDevice {
    /// An empty queue that takes frames as `merge` says.
    pub fn new(merge: Merge) -> Self {
        Self {
            from_host: VecDeque::new(),
            to_host: VecDeque::new(),
            answers: Vec::new(),
            merge,
            refuses: Vec::new(),
            broken: None,
        }
    }
}

impl Device for MemoryDevice {
    fn recv(&mut self, batch: &mut PacketBatch) -> io::Result<bool> {
        if self.broken == Some(DeviceError::Gone) {
            return Err(io::Error::from_raw_os_error(libc::EBADFD));
        }
        let taken = self
            .from_host
            .front()
            .is_some_and(|(header, packet)| batch.push(*header, packet));
        if taken {
            self.from_host.pop_front();
        }
        Ok(taken)
    }

    fn send(&mut self, frame: &[IoSlice<'_>]) -> Result<(), DeviceError> {
        if let Some(error) = self.broken {
            return Err(error);
        }
        let bytes: Vec<u8> = frame.iter().flat_map(|slice| slice.iter().copied()).collect();
        let (header, packet) = VirtioHeader::parse(&bytes).map_err(|_| DeviceError::Refused)?;
        if header.gso.is_some_and(|gso| self.refuses.contains(&gso.kind)) {
            return Err(DeviceError::Refused);
        }
        let mut packet = packet.to_vec();
        if let Some(partial) = header.checksum {
            finish_checksum(&mut packet, partial).map_err(|_| DeviceError::Refused)?;
        }
        self.to_host.push_back((header, packet));
        Ok(())
    }

    fn answer(&mut self, packet: &[u8], _to: IpAddr) -> io::Result<()> {
        self.answers.push(packet.to_vec());
        Ok(())
    }

    fn merge(&self) -> Merge {
        self.merge
    }
}

/// A message on the wire: a run of datagrams, as UDP_SEGMENT sends and UDP_GRO receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Destination when sent, source when received.
    pub addr: SocketAddr,
    /// All datagrams, one behind the other.
    pub bytes: Vec<u8>,
    /// Size of every datagram but the last.
    pub segment_size: usize,
    /// Congestion codepoint of the outer headers.
    pub ecn: Ecn,
}

/// One end of a wire in memory.
#[derive(Debug)]
pub struct MemoryUnderlay {
    /// What was sent, in order.
    pub sent: VecDeque<Message>,
    /// What is to be received.
    pub incoming: VecDeque<Message>,
    /// Longest run.
    pub limits: RunLimits,
    /// Size of the pool of source ports.
    pub ports: usize,
    /// Destinations that cannot be sent to, and why.
    pub failing: Vec<(SocketAddr, SendError)>,
}

impl MemoryUnderlay {
    /// An end with the limits of UDP over IPv4 with segmentation offload.
    pub fn new() -> Self {
        Self {
            sent: VecDeque::new(),
            incoming: VecDeque::new(),
            limits: RunLimits {
                segments: 64,
                bytes: 65_507,
            },
            ports: 1,
            failing: Vec::new(),
        }
    }
}

impl Default for MemoryUnderlay {
    fn default() -> Self {
        Self::new()
    }
}

impl Underlay for MemoryUnderlay {
    fn recv(&mut self, batch: &mut DatagramBatch) -> io::Result<()> {
        while let Some(message) = self.incoming.front() {
            let coalesced = (message.segment_size < message.bytes.len()).then_some(message.segment_size);
            if !batch.push(
                Envelope::udp(message.addr, message.ecn),
                &message.bytes,
                coalesced,
            ) {
                break;
            }
            self.incoming.pop_front();
        }
        Ok(())
    }

    fn send(
        &mut self,
        plan: &SendPlan,
        batch: &PacketBatch,
        _stats: &WorkerStats,
        failures: &mut Vec<SendFailure>,
    ) -> io::Result<()> {
        for (index, run) in plan.runs().iter().enumerate() {
            if let Some(&(_, error)) = self.failing.iter().find(|(to, _)| *to == run.to) {
                failures.push(SendFailure {
                    run: index,
                    segments: run.segments,
                    error,
                });
                continue;
            }
            let bytes = plan
                .slices(run, batch, 0, run.segments)
                .flatten()
                .copied()
                .collect();
            self.sent.push_back(Message {
                addr: run.to,
                bytes,
                segment_size: run.segment_size,
                ecn: run.ecn,
            });
        }
        Ok(())
    }

    fn limits(&self, _to: SocketAddr) -> RunLimits {
        self.limits
    }

    fn source_ports(&self) -> usize {
        self.ports
    }
}
