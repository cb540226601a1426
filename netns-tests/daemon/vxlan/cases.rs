//! What is sent to node 2 by hand, and what must come of it.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::PacketBuilder;
use kersey::addr::MacAddr;
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{V4_LEN, V6_LEN};
use kersey::wire::vxlan::HEADERS_LEN;

use super::{BY_HAND, PORT, Siege};

/// Datagrams that must all be refused for one reason.
pub(super) struct Lie {
    pub(super) name: &'static str,
    pub(super) reason: &'static str,
    /// Type of service outside.
    pub(super) tos: u32,
    pub(super) datagrams: Vec<Vec<u8>>,
}

/// A datagram that must be let in, and the packet that must come of it.
pub(super) struct Legal {
    pub(super) name: &'static str,
    pub(super) datagram: Vec<u8>,
    pub(super) arrives: Vec<u8>,
}

/// VXLAN and Ethernet headers with all their fields, and what follows them.
#[derive(Clone)]
pub(super) struct Frame {
    pub(super) flags: u8,
    pub(super) reserved: [u8; 3],
    pub(super) vni: u32,
    pub(super) last: u8,
    pub(super) dst: [u8; 6],
    pub(super) src: [u8; 6],
    pub(super) ethertype: u16,
    pub(super) inner: Vec<u8>,
}

impl Frame {
    pub(super) fn emit(&self) -> Vec<u8> {
        let mut bytes = vec![self.flags];
        bytes.extend(self.reserved);
        bytes.extend(&self.vni.to_be_bytes()[1..]);
        bytes.push(self.last);
        bytes.extend(self.dst);
        bytes.extend(self.src);
        bytes.extend(self.ethertype.to_be_bytes());
        bytes.extend(&self.inner);
        bytes
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut frame = self.clone();
        change(&mut frame);
        frame.emit()
    }

    /// Overwrites bytes of the inner packet; the header checksum of IPv4 is made right again.
    fn patched(&self, at: usize, bytes: &[u8]) -> Self {
        let mut frame = self.clone();
        frame.inner[at..at + bytes.len()].copy_from_slice(bytes);
        sum_v4(&mut frame.inner);
        frame
    }

    fn carrying(&self, inner: Vec<u8>) -> Self {
        Self {
            inner,
            ..self.clone()
        }
    }
}

impl Siege {
    /// An honest frame from node 1 to node 2 around `inner`.
    fn around(&self, inner: Vec<u8>) -> Frame {
        let v4 = inner[0] >> 4 == 4;
        Frame {
            flags: 0x08,
            reserved: [0; 3],
            vni: 1,
            last: 0,
            dst: self.macs[1],
            src: self.macs[0],
            ethertype: if v4 { 0x0800 } else { 0x86dd },
            inner,
        }
    }

    pub(super) fn v4(&self) -> Frame {
        self.v4_between(self.overlay.pod_v4(1), self.overlay.pod_v4(2))
    }

    fn v4_between(&self, src: Ipv4Addr, dst: Ipv4Addr) -> Frame {
        self.around(udp_v4(src, dst, &[0x5a; 64]))
    }

    pub(super) fn v6(&self) -> Frame {
        self.v6_between(self.v6[0], self.v6[1])
    }

    fn v6_between(&self, src: Ipv6Addr, dst: Ipv6Addr) -> Frame {
        self.around(udp_v6(src, dst, &[0x5a; 64]))
    }

    /// A packet with these bytes between the IPv6 header and its UDP.
    fn v6_extended(&self, next: u8, extensions: &[u8]) -> Frame {
        let mut inner = self.v6().inner;
        let payload = (inner.len() - V6_LEN + extensions.len()) as u16;
        inner[4..6].copy_from_slice(&payload.to_be_bytes());
        inner[6] = next;
        inner.splice(V6_LEN..V6_LEN, extensions.iter().copied());
        self.around(inner)
    }

    /// All that node 1 may try and must not get through.
    pub(super) fn lies(&self) -> Vec<Lie> {
        let mut lies = self.framing_lies();
        lies.extend(self.header_lies());
        lies.extend(self.address_lies());
        lies
    }

    fn framing_lies(&self) -> Vec<Lie> {
        let (v4, v6) = (self.v4(), self.v6());
        let cut = |frame: &Frame, lens: std::ops::Range<usize>| {
            let bytes = frame.emit();
            lens.map(|len| bytes[..HEADERS_LEN + len].to_vec())
                .collect::<Vec<_>>()
        };
        let own = self.macs[1];
        let [peer, ours] = self.macs.map(MacAddr::from);
        let near = own.map(|byte| byte ^ 1);
        let arp = |operation: u8| {
            let mut bytes = vec![0, 1, 8, 0, 6, 4, 0, operation];
            bytes.extend(peer.octets());
            bytes.extend(self.overlay.pod_v4(1).octets());
            bytes.extend(ours.octets());
            bytes.extend(self.overlay.pod_v4(2).octets());
            bytes
        };
        let tagged = |id: u16, inner: &Frame| {
            let mut bytes = id.to_be_bytes().to_vec();
            bytes.extend(inner.ethertype.to_be_bytes());
            bytes.extend(&inner.inner);
            bytes
        };
        let tunnel = v4.emit();
        vec![
            lie(
                "cut within VXLAN and Ethernet headers",
                "truncated",
                (0..=HEADERS_LEN)
                    .map(|len| tunnel[..len].to_vec())
                    .collect::<Vec<_>>(),
            ),
            lie("cut within the IPv4 header", "truncated", cut(&v4, 1..V4_LEN)),
            lie("cut within the IPv6 header", "truncated", cut(&v6, 1..V6_LEN)),
            lie(
                "cut within UDP and payload, IPv4",
                "bad_length",
                cut(&v4, V4_LEN..V4_LEN + 12),
            ),
            lie(
                "cut within UDP and payload, IPv6",
                "bad_length",
                cut(&v6, V6_LEN..V6_LEN + 12),
            ),
            lie(
                "flags without the VNI's",
                "bad_encapsulation",
                [0x00, 0xf7, 0x80, 0x04].map(|flags| v4.with(|frame| frame.flags = flags)),
            ),
            lie(
                "other networks",
                "other_vni",
                [0, 2, 0x0100, 0x01_0000, 0xff_ffff].map(|vni| v4.with(|frame| frame.vni = vni)),
            ),
            lie(
                "other stations",
                "other_station",
                [
                    [0xff; 6],
                    [0; 6],
                    [0x01, 0, 0x5e, 0, 0, 1],
                    [0x33, 0x33, 0, 0, 0, 1],
                    self.macs[0],
                    near,
                ]
                .into_iter()
                .flat_map(|dst| [&v4, &v6].map(|frame| frame.with(|frame| frame.dst = dst)))
                .collect::<Vec<_>>(),
            ),
            lie(
                "reflected",
                "own_station",
                [&v4, &v6].map(|frame| frame.with(|frame| frame.src = own)),
            ),
            lie(
                "not IP",
                "not_ip",
                [
                    v4.carrying(arp(1)).with(|frame| frame.ethertype = 0x0806),
                    v4.carrying(arp(2)).with(|frame| frame.ethertype = 0x0806),
                    v4.carrying(tagged(5, &v4)).with(|frame| frame.ethertype = 0x8100),
                    v6.carrying(tagged(5, &v6)).with(|frame| frame.ethertype = 0x8100),
                    v4.carrying(tagged(0, &v4)).with(|frame| frame.ethertype = 0x8100),
                    v4.carrying(tagged(5, &v4)).with(|frame| frame.ethertype = 0x88a8),
                ]
                .into_iter()
                // A length as IEEE 802.3 has it, MPLS, PPPoE, LLDP, bridged Ethernet, IPv4 the other way round.
                .chain(
                    [0, 0x5c, 0x8847, 0x8864, 0x88cc, 0x6558, 0x0008, 0xffff]
                        .map(|ethertype| v4.with(|frame| frame.ethertype = ethertype)),
                )
                .collect::<Vec<_>>(),
            ),
            lie(
                "EtherType and version disagree",
                "ethertype_mismatch",
                [
                    v4.with(|frame| frame.ethertype = 0x86dd),
                    v6.with(|frame| frame.ethertype = 0x0800),
                    v4.patched(0, &[0x05]).emit(),
                    v4.patched(0, &[0x55]).emit(),
                    v4.patched(0, &[0xf5]).emit(),
                    v6.patched(0, &[0x00]).emit(),
                    v6.patched(0, &[0x70]).emit(),
                    v4.carrying(vec![0; 64]).emit(),
                    // A tunnel in the tunnel, without an Ethernet header to itself.
                    v4.carrying(tunnel).emit(),
                ],
            ),
            Lie {
                tos: 3,
                ..lie(
                    "congestion marked to those who would not know",
                    "congestion_mark",
                    [v4.emit(), v6.emit()],
                )
            },
        ]
    }

    fn header_lies(&self) -> Vec<Lie> {
        let (v4, v6) = (self.v4(), self.v6());
        let (len_v4, len_v6) = (v4.inner.len() as u16, (v6.inner.len() - V6_LEN) as u16);
        let unsummed = |at: usize, value: u8| v4.with(|frame| frame.inner[at] ^= value);
        // Destination options of 8 bytes, padding only, 9 in a row.
        let chain: Vec<u8> = (0..9)
            .flat_map(|nth| [if nth == 8 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0])
            .collect();
        let mut jumbogram = self
            .v6_extended(0, &[17, 0, 0xc2, 4, 0, 1, 0, 0])
            .patched(4, &[0, 0]);
        let mut short_jumbogram = jumbogram.clone();
        short_jumbogram.inner.truncate(V6_LEN + 8);
        jumbogram.inner.resize(V6_LEN + 8 + 2000, 0);
        vec![
            lie(
                "header lengths below 20",
                "bad_header_length",
                (0x40..0x45).map(|first| v4.patched(0, &[first]).emit()),
            ),
            lie(
                "lengths that lie, IPv4",
                "bad_length",
                [0, 1, 19, len_v4 + 1, len_v4 + 1000, 0xffff]
                    .map(|len| v4.patched(2, &len.to_be_bytes()).emit())
                    .into_iter()
                    // A header of 60 bytes in a packet of 28.
                    .chain([v4.patched(0, &[0x4f, 0, 0, 28]).emit()]),
            ),
            lie(
                "lengths that lie, IPv6",
                "bad_length",
                [len_v6 + 1, len_v6 + 1000, 0xffff].map(|len| v6.patched(4, &len.to_be_bytes()).emit()),
            ),
            lie(
                "header checksums",
                "bad_header_checksum",
                [(10, 0xff), (11, 0x01), (1, 0x04), (8, 0x80), (9, 0x01), (4, 0xff)]
                    .map(|(at, value)| unsummed(at, value))
                    .into_iter()
                    .chain([v4.with(|frame| frame.inner[10..12].fill(0))]),
            ),
            lie(
                "extension headers without end",
                "bad_extension_headers",
                [self.v6_extended(60, &chain).emit()],
            ),
            lie(
                "extension headers beyond the end",
                "truncated",
                [0, 43, 60]
                    .map(|next| self.v6_extended(next, &[17, 0xff, 1, 4, 0, 0, 0, 0]).emit())
                    .into_iter()
                    // The fragment header is cut.
                    .chain([v6.patched(4, &[0, 4]).patched(6, &[44]).emit()]),
            ),
            lie(
                "jumbograms",
                "truncated",
                [jumbogram.emit(), short_jumbogram.emit()],
            ),
        ]
    }

    fn address_lies(&self) -> Vec<Lie> {
        let [one, two, three] = [1, 2, 3].map(|nth| self.overlay.pod_v4(nth));
        let [one_v6, two_v6, three_v6] = self.v6;
        let low = |addr: Ipv4Addr, low: u32| Ipv4Addr::from_bits(addr.to_bits() & !0xff | low);
        let from_v4 = |addrs: &[Ipv4Addr]| {
            let frames = addrs.iter().map(|&src| self.v4_between(src, two).emit());
            frames.collect::<Vec<_>>()
        };
        let to_v4 = |addrs: &[Ipv4Addr]| {
            let frames = addrs.iter().map(|&dst| self.v4_between(one, dst).emit());
            frames.collect::<Vec<_>>()
        };
        let from_v6 = |addrs: &[&str]| {
            let frames = addrs
                .iter()
                .map(|src| self.v6_between(src.parse().unwrap(), two_v6).emit());
            frames.collect::<Vec<_>>()
        };
        let to_v6 = |addrs: &[&str]| {
            let frames = addrs
                .iter()
                .map(|dst| self.v6_between(one_v6, dst.parse().unwrap()).emit());
            frames.collect::<Vec<_>>()
        };
        let parse = |addrs: &[&str]| addrs.iter().map(|addr| addr.parse().unwrap()).collect::<Vec<_>>();
        let nobody = "10.244.254.9".parse().unwrap();
        let [wire_one, wire_two, wire_three] = [1, 2, 3].map(|nth| self.overlay.lab.nodes[nth - 1].v4);
        let nested = self.v4().emit();
        vec![
            lie(
                "our own as sources",
                "martian_source",
                from_v4(&[two, low(two, 0), low(two, 1), low(two, 9), low(two, 255)]),
            ),
            lie(
                "places no packet comes from",
                "martian_source",
                from_v4(&parse(&[
                    "127.0.0.1",
                    "127.255.255.254",
                    "0.0.0.0",
                    "0.1.2.3",
                    "224.0.0.1",
                    "239.255.255.255",
                    "240.0.0.1",
                    "255.255.255.255",
                    "169.254.1.1",
                ])),
            ),
            lie(
                "places no packet comes from, IPv6",
                "martian_source",
                from_v6(&[
                    "::",
                    "::1",
                    "ff02::1",
                    "fe80::1",
                    "::ffff:10.244.1.2",
                    &two_v6.to_string(),
                ]),
            ),
            lie(
                "other peers' pods",
                "spoofed_source",
                from_v4(&[three, low(three, 0), nobody, [10, 244, 255, 255].into()]),
            ),
            lie(
                "other peers' pods, IPv6",
                "spoofed_source",
                from_v6(&[&three_v6.to_string(), "fd00:10:244:fe::9"]),
            ),
            lie(
                "the internet, the underlay, ourselves",
                "foreign_source",
                from_v4(&[
                    [8, 8, 8, 8].into(),
                    wire_two,
                    wire_three,
                    [192, 0, 2, 254].into(),
                    [10, 0, 0, 1].into(),
                ]),
            ),
            lie(
                "the internet, the underlay, ourselves, IPv6",
                "foreign_source",
                from_v6(&[
                    "2001:4860:4860::8888",
                    "2001:db8:1::2",
                    "2001:db8:1::3",
                    "2001:db8:1::fe",
                ]),
            ),
            lie(
                "for others",
                "not_for_us",
                to_v4(&[
                    [8, 8, 8, 8].into(),
                    wire_one,
                    wire_two,
                    wire_three,
                    one,
                    three,
                    nobody,
                ]),
            ),
            lie(
                "for others, IPv6",
                "not_for_us",
                to_v6(&[
                    "2001:4860:4860::8888",
                    "2001:db8:1::1",
                    "2001:db8:1::2",
                    &one_v6.to_string(),
                    &three_v6.to_string(),
                ]),
            ),
            lie(
                "for many, or for the host itself",
                "not_unicast",
                to_v4(&parse(&[
                    "224.0.0.1",
                    "239.255.255.255",
                    "255.255.255.255",
                    "240.0.0.1",
                    "127.0.0.1",
                    "0.0.0.0",
                    "169.254.1.1",
                ])),
            ),
            lie(
                "for many, or for the host itself, IPv6",
                "not_unicast",
                to_v6(&["ff02::1", "ff0e::1", "fe80::1", "::1", "::", "::ffff:10.244.1.2"]),
            ),
            lie(
                "a tunnel in the tunnel",
                "not_for_us",
                [
                    // Back into our own port, from the peer and from its pod.
                    self.around(tunnelled(wire_one, wire_two, &nested)).emit(),
                    self.around(tunnelled(one, wire_two, &nested)).emit(),
                    // On to another peer's.
                    self.around(tunnelled(wire_one, wire_three, &nested)).emit(),
                ],
            ),
        ]
    }

    /// What a kernel's device, or the RFC, lets in.
    pub(super) fn legal(&self) -> Vec<Legal> {
        let (v4, v6) = (self.v4(), self.v6());
        let [one, two] = [1, 2].map(|nth| self.overlay.pod_v4(nth));
        let plain = |name, frame: Frame| Legal {
            name,
            datagram: frame.emit(),
            arrives: frame.inner,
        };
        let headers = |name, change: &dyn Fn(&mut Frame)| Legal {
            name,
            datagram: v4.with(change),
            arrives: v4.inner.clone(),
        };
        let padded = |name, frame: &Frame, bytes: usize| {
            let mut datagram = frame.emit();
            datagram.extend(vec![0xa5; bytes]);
            Legal {
                name,
                datagram,
                arrives: frame.inner.clone(),
            }
        };
        let protocol = |number: u8| v4.patched(9, &[number]);
        let mut long_tcp = v4.carrying(udp_v4(one, two, &[0x5a; 4000])).patched(9, &[6]);
        long_tcp.inner[V4_LEN + 12] = 0x50;
        let mut headless_tcp = long_tcp.clone();
        headless_tcp.inner[V4_LEN + 12] = 0;
        vec![
            plain("IPv4", v4.clone()),
            plain("IPv6", v6.clone()),
            headers("every reserved bit, RFC 7348 §5", &|frame| {
                frame.flags = 0xff;
                frame.reserved = [0xff; 3];
                frame.last = 0xff;
            }),
            headers("a group policy", &|frame| {
                frame.flags = 0x88;
                frame.reserved = [0x48, 0x12, 0x34];
            }),
            headers("a source station of zeros", &|frame| frame.src = [0; 6]),
            headers("a group as source station", &|frame| {
                frame.src = [0x01, 0, 0x5e, 0, 0, 1];
            }),
            padded("padding", &v4, 18),
            padded("padding, IPv6", &v6, 18),
            padded("more padding than packet", &v4, 60_000),
            plain("options that do nothing", with_options(&v4, &[1, 1, 1, 0])),
            plain("record route", with_options(&v4, &[7, 7, 4, 0, 0, 0, 0, 0])),
            plain("40 bytes of options", with_options(&v4, &[1; 40])),
            plain("router alert", with_options(&v4, &[148, 4, 0, 0])),
            plain("a first fragment", v4.patched(6, &[0x20, 0])),
            plain("a middle fragment", v4.patched(6, &[0x20, 9])),
            plain("a last fragment", v4.patched(6, &[0, 18])),
            plain("a fragment beyond 64 KB", v4.patched(6, &[0x1f, 0xff])),
            plain("the reserved fragment flag", v4.patched(6, &[0x80, 0])),
            plain(
                "a first fragment, IPv6",
                self.v6_extended(44, &[17, 0, 0, 1, 0, 0, 0, 7]),
            ),
            plain(
                "a last fragment, IPv6",
                self.v6_extended(44, &[17, 0, 0x05, 0xa8, 0, 0, 0, 7]),
            ),
            plain(
                "an atomic fragment, RFC 6946",
                self.v6_extended(44, &[17, 0, 0, 0, 0, 0, 0, 7]),
            ),
            plain(
                "hop-by-hop and destination options",
                self.v6_extended(0, &[60, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0]),
            ),
            plain("TTL 0", v4.patched(8, &[0])),
            plain("TTL 1", v4.patched(8, &[1])),
            plain("hop limit 0", v6.patched(7, &[0])),
            plain("a DSCP", v4.patched(1, &[0xb8])),
            plain("IP in IP", protocol(4)),
            plain("GRE", protocol(47)),
            plain("SCTP", protocol(132)),
            plain("an unassigned protocol", protocol(253)),
            plain("UDP whose length lies", v4.patched(V4_LEN + 4, &[0xff, 0xff])),
            plain(
                "UDP without a header",
                v4.carrying(v4.inner[..V4_LEN].to_vec()).patched(2, &[0, 20]),
            ),
            plain(
                "from the peer itself",
                self.v4_between(self.overlay.lab.nodes[0].v4, two),
            ),
            plain(
                "from the peer itself, IPv6",
                self.v6_between(self.overlay.lab.nodes[0].v6, self.v6[1]),
            ),
            plain(
                "to our device's own address",
                self.v4_between(one, Ipv4Addr::from_bits(two.to_bits() & !0xff)),
            ),
            plain(
                "a tunnel for a pod of ours",
                self.around(tunnelled(one, two, &v4.emit())),
            ),
            plain("TCP longer than the overlay, checksum wrong", long_tcp),
            plain("TCP longer than the overlay, no header length", headless_tcp),
            plain(
                "longer than the underlay carries",
                v4.carrying(udp_v4(one, two, &[0x5a; 8000])),
            ),
        ]
    }
}

fn udp_v4(src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(src.octets(), dst.octets(), 64).udp(BY_HAND, 9);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).unwrap();
    packet
}

fn udp_v6(src: Ipv6Addr, dst: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv6(src.octets(), dst.octets(), 64).udp(BY_HAND, 9);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// A datagram of the tunnel as an inner packet.
fn tunnelled(src: Ipv4Addr, dst: Ipv4Addr, datagram: &[u8]) -> Vec<u8> {
    let mut packet = udp_v4(src, dst, datagram);
    packet[V4_LEN + 2..V4_LEN + 4].copy_from_slice(&PORT.to_be_bytes());
    packet[V4_LEN + 6..V4_LEN + 8].fill(0);
    packet
}

/// An IPv4 packet with options, a multiple of 4 bytes.
fn with_options(frame: &Frame, options: &[u8]) -> Frame {
    let mut inner = frame.inner.clone();
    inner.splice(V4_LEN..V4_LEN, options.iter().copied());
    inner[0] = 0x45 + (options.len() / 4) as u8;
    let len = inner.len() as u16;
    inner[2..4].copy_from_slice(&len.to_be_bytes());
    sum_v4(&mut inner);
    frame.carrying(inner)
}

/// Makes an IPv4 header checksum right, over as much of the header as is there.
fn sum_v4(packet: &mut [u8]) {
    if packet[0] >> 4 != 4 {
        return;
    }
    let header_len = (usize::from(packet[0] & 0xf) * 4).max(V4_LEN).min(packet.len());
    packet[10..12].fill(0);
    let sum = Sum::of(&packet[..header_len]).finish();
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn lie(name: &'static str, reason: &'static str, datagrams: impl IntoIterator<Item = Vec<u8>>) -> Lie {
    Lie {
        name,
        reason,
        tos: 0,
        datagrams: datagrams.into_iter().collect(),
    }
}
