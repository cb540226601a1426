//! Honest packets, what mutation makes of them, and what Kersey must refuse of that.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use kersey::addr::{Ipv4Prefix, Ipv6Prefix};
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{V4_LEN, V6_LEN};
use kersey::wire::vxlan::HEADERS_LEN;

use super::{Difference, FAR, MARK};

/// Kinds of packets that mutation begins with.
pub(super) const HONEST: usize = 12;
/// Sizes of their payload, bytes.
pub(super) const PAYLOADS: [usize; 4] = [8, 64, 900, 1300];
/// Offsets in the datagram.
const DST: usize = 8;
const SRC: usize = 14;
const TYPE: usize = 20;

/// What is sent to both.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) sender: Sender,
    /// Congestion codepoint outside.
    pub(super) ecn: u32,
    pub(super) datagram: Vec<u8>,
}

/// Whose address it is sent from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sender {
    Peer,
    Stranger,
}

/// Addresses, the same in both networks.
pub(super) struct Place {
    /// Of node 1's and node 2's devices.
    pub(super) macs: [[u8; 6]; 2],
    /// Node 1's subnets.
    pub(super) peer: (Ipv4Prefix, Ipv6Prefix),
    /// Node 2's.
    pub(super) own: (Ipv4Prefix, Ipv6Prefix),
    /// Node 1 on the underlay.
    pub(super) from: IpAddr,
    /// Node 2 on the underlay.
    pub(super) nodes: (Ipv4Addr, Ipv6Addr),
}

impl Place {
    pub(super) fn frame(&self, inner: Vec<u8>) -> Vec<u8> {
        let mut bytes = vec![0x08, 0, 0, 0, 0, 0, 1, 0];
        bytes.extend(self.macs[1]);
        bytes.extend(self.macs[0]);
        bytes.extend(if inner[0] >> 4 == 4 {
            [0x08, 0x00]
        } else {
            [0x86, 0xdd]
        });
        bytes.extend(inner);
        bytes
    }

    /// An honest IPv4 packet of any protocol.
    pub(super) fn v4(&self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let (src, dst) = (host_v4(self.peer.0, 2), host_v4(self.own.0, FAR));
        let len = (V4_LEN + payload.len()) as u16;
        let mut packet = vec![0x45, 0];
        packet.extend(len.to_be_bytes());
        packet.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
        packet.extend(src.octets());
        packet.extend(dst.octets());
        packet.extend(payload);
        sum_v4(&mut packet);
        packet
    }

    /// An honest IPv6 packet.
    fn v6(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        let (src, dst) = (host_v6(self.peer.1, 2), host_v6(self.own.1, FAR));
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend((payload.len() as u16).to_be_bytes());
        packet.extend([next, 64]);
        packet.extend(src.octets());
        packet.extend(dst.octets());
        packet.extend(payload);
        packet
    }

    /// One of [`HONEST`] kinds of packets nothing is wrong with.
    pub(super) fn honest(&self, kind: usize, bytes: &[u8]) -> Vec<u8> {
        let (src, dst) = (host_v4(self.peer.0, 2), host_v4(self.own.0, FAR));
        let v4 = PacketBuilder::ipv4(src.octets(), dst.octets(), 64);
        let (src, dst) = (host_v6(self.peer.1, 2), host_v6(self.own.1, FAR));
        let v6 = PacketBuilder::ipv6(src.octets(), dst.octets(), 64);
        let mut packet = Vec::new();
        let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
        match kind {
            0 => v4.udp(4000, 9).write(&mut packet, bytes).unwrap(),
            1 => v4.tcp(4000, 9, 7, 1000).write(&mut packet, bytes).unwrap(),
            2 => v4.icmpv4_echo_request(1, 2).write(&mut packet, bytes).unwrap(),
            3 => v6.udp(4000, 9).write(&mut packet, bytes).unwrap(),
            4 => v6.tcp(4000, 9, 7, 1000).write(&mut packet, bytes).unwrap(),
            5 => v6.icmpv6_echo_request(1, 2).write(&mut packet, bytes).unwrap(),
            // IPv4 options that do nothing, and a fragment.
            6 => {
                packet = self.v4(17, &[&[1, 1, 1, 0], bytes].concat());
                packet[0] = 0x46;
                sum_v4(&mut packet);
            }
            7 => {
                packet = self.v4(17, bytes);
                packet[6..8].copy_from_slice(&[0x20, 9]);
                sum_v4(&mut packet);
            }
            8 => packet = self.v4(4, &self.v4(17, bytes)),
            // Hop-by-hop and destination options, a fragment, nothing.
            9 => packet = self.v6(0, &[&[60], options, &[17], options, bytes].concat()),
            10 => packet = self.v6(44, &[&[17, 0, 0, 1, 0, 0, 0, 7], bytes].concat()),
            _ => packet = self.v6(59, &[]),
        }
        packet
    }

    /// Some honest packet with up to three things wrong.
    pub(super) fn case(&self, random: &mut Random) -> Case {
        let payload = random.bytes(PAYLOADS);
        let mut inner = self.honest(random.below(HONEST), &payload);
        if random.below(4) == 0 {
            let codepoint = random.below(4) as u8;
            if inner[0] >> 4 == 4 {
                inner[1] = inner[1] & !3 | codepoint;
                sum_v4(&mut inner);
            } else {
                inner[1] = inner[1] & !0x30 | codepoint << 4;
            }
        }
        let mut datagram = self.frame(inner);
        for _ in 0..random.below(4) {
            self.mutate(&mut datagram, random);
        }
        // Most header checksums are right, so that what is behind them is reached.
        let at = if is_tagged(&datagram) {
            HEADERS_LEN + 4
        } else {
            HEADERS_LEN
        };
        if random.below(4) != 0
            && let Some(inner) = datagram.get_mut(at..)
        {
            sum_v4(inner);
        }
        Case {
            sender: match random.below(25) {
                0 => Sender::Stranger,
                _ => Sender::Peer,
            },
            ecn: match random.below(4) {
                0 => random.below(4) as u32,
                _ => 0,
            },
            datagram,
        }
    }

    fn mutate(&self, datagram: &mut Vec<u8>, random: &mut Random) {
        const INNER: usize = HEADERS_LEN;
        let v4 = datagram.get(INNER).is_some_and(|first| first >> 4 == 4);
        let front = datagram.len().min(INNER + V6_LEN + 24);
        let any = random.next() as u8;
        let value = random.pick([0, 1, 4, 6, 0x08, 0x45, 0x46, 0x60, 0x7f, 0x80, 0xff, any]);
        let stations = [
            [0xff; 6],
            [0; 6],
            [0x01, 0, 0x5e, 0, 0, 1],
            [0x33, 0x33, 0, 0, 0, 1],
            self.macs[0],
            self.macs[1],
        ];
        match random.below(16) {
            0 | 1 if front > 0 => datagram[random.below(front)] ^= 1 << random.below(8),
            2 if front > 0 => datagram[random.below(front)] = value,
            3 => datagram.truncate(random.below(front + 1)),
            4 => datagram.truncate(random.below(datagram.len() + 1)),
            5 => {
                let more = 1 + random.below(64);
                datagram.extend((0..more).map(|_| random.next() as u8));
            }
            // The length inside.
            6 => {
                let len = datagram.len().saturating_sub(INNER) as u16;
                let near = len.wrapping_add(random.below(9) as u16).wrapping_sub(4);
                let len = random.pick([0, 1, 20, 40, near, len.wrapping_sub(40), len + 1000, 0xffff]);
                put(datagram, INNER + if v4 { 2 } else { 4 }, &len.to_be_bytes());
            }
            7 => {
                let (at, mask) = random.pick([
                    (0, 0x08),
                    (0, 0x80),
                    (0, 0xf7),
                    (1, 0x40),
                    (2, 1),
                    (7, 1),
                    (7, 0x80),
                ]);
                if let Some(byte) = datagram.get_mut(at) {
                    *byte ^= mask;
                }
            }
            8 => put(
                datagram,
                4,
                &random.pick([[0, 0, 0], [0, 0, 2], [0, 1, 0], [1, 0, 0]]),
            ),
            9 => {
                let (at, station) = (random.pick([DST, SRC]), random.pick(stations));
                put(datagram, at, &station);
            }
            10 => {
                let kind: u16 = random.pick([0x0800, 0x86dd, 0x0806, 0x8847, 0x88cc, 0x0040, 0x6558]);
                put(datagram, TYPE, &kind.to_be_bytes());
            }
            11 if datagram.len() >= HEADERS_LEN => {
                let id = random.pick([0x00u8, 0x00, 0x05]);
                let tag = random.pick([
                    [0x81, 0x00, 0x00, id],
                    [0x81, 0x00, 0xe0, id],
                    [0x88, 0xa8, 0x00, id],
                ]);
                datagram.splice(TYPE..TYPE, tag);
            }
            12 => {
                let source = random.below(2) == 0;
                self.readdress(datagram, source, random);
            }
            // Protocol or next header: extension headers where none are.
            13 => {
                let next = random.pick([0, 4, 6, 17, 41, 43, 44, 50, 51, 58, 59, 60, 135, MARK]);
                put(datagram, INNER + if v4 { 9 } else { 6 }, &[next]);
            }
            14 => put(
                datagram,
                INNER + if v4 { 8 } else { 7 },
                &random.pick([[0], [1], [2], [255]]),
            ),
            15 => put(datagram, INNER + if v4 { 6 } else { 1 }, &[random.next() as u8]),
            _ => {}
        }
    }

    /// Puts another address in the inner header: a place packets neither come from nor go to, or a neighbour.
    fn readdress(&self, datagram: &mut [u8], source: bool, random: &mut Random) {
        let v4 = datagram.get(HEADERS_LEN).is_some_and(|first| first >> 4 == 4);
        let low = random.below(256) as u32;
        if v4 {
            let addr = random.pick([
                host_v4(self.peer.0, low),
                host_v4(self.own.0, low),
                [10, 244, 254, 9].into(),
                [192, 0, 2, 1].into(),
                [192, 0, 2, 2].into(),
                [8, 8, 8, 8].into(),
                [127, 0, 0, 1].into(),
                [0, 0, 0, 0].into(),
                [169, 254, 1, 1].into(),
                [224, 0, 0, 1].into(),
                [240, 0, 0, 1].into(),
                [255, 255, 255, 255].into(),
            ]);
            put(
                datagram,
                HEADERS_LEN + if source { 12 } else { 16 },
                &addr.octets(),
            );
        } else {
            let addr = match random.below(3) {
                0 => host_v6(self.peer.1, low),
                1 => host_v6(self.own.1, low),
                _ => random
                    .pick([
                        "fd00:10:244:fe::9",
                        "2001:db8:1::1",
                        "2001:db8:1::2",
                        "2001:4860:4860::8888",
                        "::",
                        "::1",
                        "::ffff:10.244.1.2",
                        "fe80::1",
                        "ff02::1",
                    ])
                    .parse()
                    .unwrap(),
            };
            put(
                datagram,
                HEADERS_LEN + if source { 8 } else { 24 },
                &addr.octets(),
            );
        }
    }

    /// Why Kersey must refuse what a kernel may take, by nothing but its documented rules.
    pub(super) fn refusals(&self, case: &Case) -> Vec<Difference> {
        let mut refusals = Vec::new();
        if case.sender == Sender::Stranger {
            refusals.push(Difference::OuterSource);
        }
        let mut inner = case.datagram.get(HEADERS_LEN..).unwrap_or(&[]);
        if is_tagged(&case.datagram) {
            if inner
                .get(..2)
                .is_some_and(|tag| tag[0] & 0x0f == 0 && tag[1] == 0)
            {
                refusals.push(Difference::PriorityTag);
            }
            inner = inner.get(4..).unwrap_or(&[]);
        }
        let (from_peer, for_us) = match inner.first().map(|first| first >> 4) {
            Some(4) if inner.len() >= V4_LEN => {
                let addr = |at: usize| Ipv4Addr::new(inner[at], inner[at + 1], inner[at + 2], inner[at + 3]);
                let (src, dst) = (addr(12), addr(16));
                (
                    self.peer.0.contains(src) || self.from == src,
                    self.own.0.contains(dst),
                )
            }
            Some(6) if inner.len() >= V6_LEN => {
                let addr = |at: usize| Ipv6Addr::from(*inner[at..].first_chunk::<16>().unwrap());
                let (src, dst) = (addr(8), addr(24));
                if !extensions_end(inner) {
                    refusals.push(Difference::ExtensionHeaders);
                }
                (
                    self.peer.1.contains(src) || self.from == src,
                    self.own.1.contains(dst),
                )
            }
            _ => (true, true),
        };
        if !from_peer {
            refusals.push(Difference::InnerSource);
        }
        if !for_us {
            refusals.push(Difference::InnerDestination);
        }
        refusals
    }

    /// Whether node 2 sent a packet by itself: to groups on every link, and ICMP errors to sources that are beyond.
    pub(super) fn is_nodes_own(&self, packet: &[u8]) -> bool {
        let own_v4 = [0, 1, 2].map(|low| host_v4(self.own.0, low));
        let own_v6 = [0, 1, 2].map(|low| host_v6(self.own.1, low));
        match packet.first().map(|first| first >> 4) {
            Some(4) if packet.len() >= V4_LEN => {
                let src = Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]);
                let error = packet[9] == 1 && matches!(packet.get(V4_LEN), Some(3 | 5 | 11 | 12));
                packet[16] >> 4 == 0xe || error && (own_v4.contains(&src) || src == self.nodes.0)
            }
            Some(6) if packet.len() >= V6_LEN => {
                let src = Ipv6Addr::from(*packet[8..].first_chunk::<16>().unwrap());
                let error = packet[6] == 58 && matches!(packet.get(V6_LEN), Some(0..128));
                packet[24] == 0xff || error && (own_v6.contains(&src) || src == self.nodes.1)
            }
            // ARP
            _ => true,
        }
    }
}

/// Whether the EtherType is a VLAN tag's.
fn is_tagged(datagram: &[u8]) -> bool {
    matches!(datagram.get(TYPE..HEADERS_LEN), Some([0x81, 0x00] | [0x88, 0xa8]))
}

/// Whether the extension headers of an IPv6 packet end within its length, the 9th at the latest being none (RFC 8200 §4).
fn extensions_end(packet: &[u8]) -> bool {
    let len = V6_LEN + usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    let packet = &packet[..len.min(packet.len())];
    let (mut next, mut at) = (packet[6], V6_LEN);
    for _ in 0..8 {
        match next {
            0 | 43 | 60 => {
                let Some(&[following, units]) = packet.get(at..).and_then(|rest| rest.first_chunk::<2>())
                else {
                    return false;
                };
                next = following;
                at += 8 + usize::from(units) * 8;
            }
            44 => {
                let Some(header) = packet.get(at..).and_then(|rest| rest.first_chunk::<8>()) else {
                    return false;
                };
                // What follows a later fragment's header is the middle of something.
                if u16::from_be_bytes([header[2], header[3]]) >> 3 != 0 {
                    return true;
                }
                next = header[0];
                at += 8;
            }
            _ => return at <= packet.len(),
        }
    }
    false
}

/// Overwrites bytes that are there.
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(field) = bytes.get_mut(at..at + value.len()) {
        field.copy_from_slice(value);
    }
}

/// Makes an IPv4 header checksum right, over as much of the header as is there.
fn sum_v4(packet: &mut [u8]) {
    if packet.len() < V4_LEN || packet[0] >> 4 != 4 {
        return;
    }
    let header_len = (usize::from(packet[0] & 0xf) * 4).max(V4_LEN).min(packet.len());
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..header_len]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

pub(super) fn host_v4(subnet: Ipv4Prefix, low: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(subnet.addr().to_bits() + low)
}

pub(super) fn host_v6(subnet: Ipv6Prefix, low: u32) -> Ipv6Addr {
    Ipv6Addr::from_bits(subnet.addr().to_bits() + u128::from(low))
}

/// SplitMix64: small, and the same everywhere for a seed.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn pick<T: Clone, const N: usize>(&mut self, from: [T; N]) -> T {
        from[self.below(N)].clone()
    }

    fn bytes<const N: usize>(&mut self, lens: [usize; N]) -> Vec<u8> {
        let len = self.pick(lens);
        (0..len).map(|_| self.next() as u8).collect()
    }
}
