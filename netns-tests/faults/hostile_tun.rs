//! B5: a process on the node that may send anything sends anything into the device.

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use etherparse::PacketBuilder;
use kersey::lab::topology::INTERFACE;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvfrom, send, setsockopt,
    socket, sockopt,
};

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, figure, wait_for, within};
use crate::support::sniffer::{Sniffer, Way};
use crate::{assert_untouched, flows, probe, require_root, warm};

/// Backend's port, and the bytes of IPv4 and UDP in front of the inner packet.
const PORT: u16 = 8285;
const OUTER: usize = 28;

#[test]
fn b5_nothing_leaves_with_a_source_that_is_not_this_nodes() {
    if require_root("b5_nothing_leaves_with_a_source_that_is_not_this_nodes") {
        anything("tunside", 20_000, 1);
    }
}

/// Cases by hand, then so many at random.
pub(crate) fn anything(tag: &str, random: usize, seed: u64) {
    let mut overlay = Blueprint::embedded(tag, 2).start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let device = into_device(&overlay);
    let ear = Sniffer::start(overlay.namespace(1), INTERFACE);
    let (mut sent_packets, mut sent_bytes, mut left) = (0, 0, Left::default());
    for (name, reason, packets) in cases(&overlay) {
        let before = overlay.status(1);
        for packet in &packets {
            // What the kernel itself refuses never gets here.
            if send(device.as_raw_fd(), packet, MsgFlags::empty()).is_ok() {
                sent_packets += 1;
                sent_bytes += packet.len();
            }
        }
        let Some(reason) = reason else { continue };
        let of = |overlay: &Overlay| overlay.status(1).drops.get(reason).copied().unwrap_or(0);
        let was = before.drops.get(reason).copied().unwrap_or(0);
        wait_for(name, within(Duration::from_secs(2)), || {
            of(&overlay) >= was + packets.len() as u64
        });
    }
    let mut random_packets = Random::new(&overlay, seed);
    for nth in 0..random {
        let packet = random_packets.next();
        if send(device.as_raw_fd(), &packet, MsgFlags::empty()).is_ok() {
            sent_packets += 1;
            sent_bytes += packet.len();
        }
        if nth % 100 == 99 {
            // The device's queue holds 500.
            std::thread::sleep(Duration::from_millis(3));
            left.note(&overlay, &ear);
        }
    }
    let probe = probe(&overlay, 1, 2);
    flows(&probe);
    assert_untouched(&probe.stop().unwrap());
    left.note(&overlay, &ear);
    figure("TUN side: packets and bytes in", (sent_packets, sent_bytes));
    figure("TUN side: packets and bytes out", (left.packets, left.bytes));
    figure("TUN side: refused", overlay.status(1).drops);
    assert!(
        sent_packets > random / 2,
        "the kernel took {sent_packets} packets"
    );
    // The random ones hold good ones too: the check is not that nothing leaves.
    assert!(left.packets > 100, "{left:?}");
    let inner = left.bytes - left.packets * OUTER;
    // The transfer's and the probe's share is not in what was sent by hand: they are no attack.
    assert!(inner <= sent_bytes + left.own_bytes, "{left:?}, {sent_bytes} in");
    oracle.check(&mut overlay, 1);
}

/// What went out through the tunnel.
#[derive(Debug, Default)]
struct Left {
    packets: usize,
    bytes: usize,
    /// Of the probe.
    own_bytes: usize,
}

impl Left {
    fn note(&mut self, overlay: &Overlay, ear: &Sniffer) {
        let subnet = overlay.subnet(1);
        let node = overlay.lab.nodes[0].v4;
        for (way, packet) in ear.packets() {
            let is_tunnel = packet.len() >= OUTER && packet[9] == 17 && packet[20..22] == PORT.to_be_bytes();
            if way != Way::Out || !is_tunnel {
                continue;
            }
            let inner = &packet[OUTER..];
            self.packets += 1;
            self.bytes += packet.len();
            assert!(
                inner.len() >= 20 && inner[0] >> 4 == 4,
                "no IPv4 packet left: {inner:02x?}"
            );
            let source = std::net::Ipv4Addr::new(inner[12], inner[13], inner[14], inner[15]);
            assert!(
                subnet.contains(source) || source == node,
                "{source} is not of {subnet}"
            );
            // The probe's datagrams carry 128 bytes.
            if inner.len() == 20 + 8 + 128 {
                self.own_bytes += inner.len();
            }
        }
    }
}

/// A name, the reason all of them are dropped for if there is one for all, and packets.
type Case = (&'static str, Option<&'static str>, Vec<Vec<u8>>);

fn cases(overlay: &Overlay) -> Vec<Case> {
    let [one, two] = [1, 2].map(|nth| overlay.pod_v4(nth));
    let of = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap();
    let udp = |src: std::net::Ipv4Addr, dst: std::net::Ipv4Addr, len: usize| {
        let builder = PacketBuilder::ipv4(src.octets(), dst.octets(), 64).udp(4000, 9);
        let mut packet = Vec::new();
        builder.write(&mut packet, &vec![0x5a; len]).unwrap();
        packet
    };
    let edit = |at: usize, value: u8| {
        let mut packet = udp(one, two, 64);
        packet[at] = value;
        packet
    };
    let six = |next: u8, len: u16| {
        let mut packet = vec![0x60, 0, 0, 0];
        packet.extend(len.to_be_bytes());
        packet.extend([next, 64]);
        packet.extend([0xfd; 32]);
        packet.extend(vec![0; len.into()]);
        packet
    };
    vec![
        (
            "another node's pod",
            Some("spoofed_source"),
            vec![udp(two, two, 64)],
        ),
        (
            "nobody's pod",
            Some("spoofed_source"),
            vec![udp(of("10.244.254.9"), two, 64)],
        ),
        (
            "the internet, another node",
            Some("foreign_source"),
            vec![udp(of("8.8.8.8"), two, 64), udp(overlay.lab.nodes[1].v4, two, 64)],
        ),
        (
            "places no packet comes from",
            Some("martian_source"),
            vec![udp(of("127.0.0.1"), two, 64), udp(of("0.0.0.0"), two, 64)],
        ),
        (
            "for many",
            Some("not_unicast"),
            vec![udp(one, of("224.0.0.1"), 64), udp(one, of("255.255.255.255"), 64)],
        ),
        ("version 5", Some("bad_version"), vec![edit(0, 0x55)]),
        (
            "header of 16 bytes",
            Some("bad_header_length"),
            vec![edit(0, 0x44)],
        ),
        ("beyond the end", Some("bad_length"), vec![edit(2, 0x40)]),
        (
            "cut",
            None,
            (1..28).map(|len| udp(one, two, 64)[..len].to_vec()).collect(),
        ),
        ("nothing", None, vec![Vec::new()]),
        ("TTL 0 and 1", Some("ttl_expired"), vec![edit(8, 0), edit(8, 1)]),
        (
            "unknown protocols",
            None,
            (0..=255).map(|protocol| edit(9, protocol)).collect(),
        ),
        ("all options", None, vec![edit(0, 0x4f)]),
        ("64 KiB in one", None, vec![udp(one, two, 65_000)]),
        (
            "extension headers",
            None,
            [0, 43, 44, 60, 51, 135, 59].map(|next| six(next, 512)).to_vec(),
        ),
        (
            "IPv6 where there is none",
            Some("foreign_source"),
            vec![six(17, 8)],
        ),
    ]
}

/// Packets that were good before something was done to them.
struct Random {
    state: u64,
    good: Vec<Vec<u8>>,
}

impl Random {
    fn new(overlay: &Overlay, seed: u64) -> Self {
        let good = cases(overlay).into_iter().flat_map(|(_, _, packets)| packets);
        Self {
            state: seed,
            good: good.filter(|packet| packet.len() < 2000).collect(),
        }
    }

    fn next(&mut self) -> Vec<u8> {
        let at = self.below(self.good.len());
        let mut packet = self.good[at].clone();
        for _ in 0..self.below(4) {
            if packet.is_empty() {
                break;
            }
            // Mostly in the headers.
            let place = self.below(packet.len().min(48));
            packet[place] = self.below(256) as u8;
        }
        if self.below(8) == 0 {
            packet.truncate(self.below(64));
        }
        packet
    }

    fn below(&mut self, bound: usize) -> usize {
        // Knuth's MMIX numbers.
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) as usize % bound
    }
}

/// A socket whose packets come out of the device as they are.
fn into_device(overlay: &Overlay) -> OwnedFd {
    let index = overlay.device(1).unwrap().0.index as usize;
    let socket = overlay
        .namespace(1)
        .run(|| {
            let socket = socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::EthAll,
            )?;
            setsockopt(&socket, sockopt::SndBuf, &(4 << 20))?;
            Ok(socket)
        })
        .unwrap();
    // A device without an Ethernet address is in no list of addresses; what passes it tells where it is.
    overlay.ping_all();
    let mut buffer = [0; 2048];
    let place = std::iter::from_fn(|| recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer).ok())
        .filter_map(|(_, from)| from)
        .find(|from| from.ifindex() == index)
        .expect("a ping passes the device");
    bind(socket.as_raw_fd(), &place).unwrap();
    socket
}
