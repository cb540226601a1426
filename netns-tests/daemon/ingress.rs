//! Packets sent into the port by hand: by a stranger, and by a peer that lies.
//!
//! ```text
//!   node 1 ⋯ overlay ⋯ node 2        node 3 on the same wire, without a daemon and without a lease
//! ```

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use etherparse::PacketBuilder;
use kersey::lab::traffic::probe::Probe;
use nix::sys::socket::{setsockopt, sockopt};

use crate::overlay::{Blueprint, Overlay, READY, figure, wait_for, within};
use crate::support::require_etcd;

const PORT: u16 = 8285;

#[test]
fn a_stranger_gets_nothing_in() {
    if !require_etcd("a_stranger_gets_nothing_in") {
        return;
    }
    const PACKETS: u64 = 1_000_000;
    let mut blueprint = Blueprint::new("stranger", 3);
    blueprint.daemons = 2;
    let overlay = blueprint.start();
    let receiver = receiver(&overlay, 2);
    let place = receiver.local_addr().unwrap();
    let valid = inner(overlay.pod_v4(1), overlay.pod_v4(2), place.port());
    // The same packet from the peer itself arrives: it is the sender that is refused, not the packet.
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    let before = overlay.log(2);
    send(&overlay, 3, PACKETS, &[valid]);
    let count = || {
        let status = overlay.status(2);
        let unknown = status.drops.get("unknown_peer").copied().unwrap_or(0);
        (unknown, status.counters["receive_overflows"])
    };
    wait_for("all are counted", within(Duration::from_secs(10)), || {
        let (unknown, overflows) = count();
        unknown + overflows >= PACKETS
    });
    let report = probe.stop().unwrap();
    let (unknown, overflows) = count();
    figure("stranger: refused, overflows", (unknown, overflows));
    figure(
        "stranger: probe sent, lost",
        (report.there.sent + report.back.sent, report.lost()),
    );
    assert!(unknown <= PACKETS, "{unknown}");
    if overflows == 0 {
        assert_eq!(unknown, PACKETS);
    }
    assert_eq!(received(&receiver), 0);
    let lost = report.lost() as f64 / (report.there.sent + report.back.sent) as f64;
    assert!(lost <= 0.01, "{report:?}");
    assert_eq!(report.corrupted(), 0);
    overlay.assert_no_drops(1);
    // S15: they are counted, and not told of.
    assert_eq!(overlay.log(2), before);
}

#[test]
fn a_peer_that_lies_gets_nothing_in_and_each_lie_is_counted() {
    if !require_etcd("a_peer_that_lies_gets_nothing_in_and_each_lie_is_counted") {
        return;
    }
    const EACH: u64 = 1000;
    let mut overlay = Blueprint::new("liar", 3).start();
    let receiver = receiver(&overlay, 2);
    let port = receiver.local_addr().unwrap().port();
    let [one, two, three] = [1, 2, 3].map(|nth| overlay.pod_v4(nth));
    overlay.terminate(1);
    let honest = inner(one, two, port);
    send(&overlay, 1, EACH, std::slice::from_ref(&honest));
    let mut arrived = 0;
    wait_for("honest packets arrive", READY, || {
        arrived += received(&receiver);
        arrived == EACH
    });

    let other = Ipv4Addr::from_bits(two.to_bits() + 5);
    let edit = |at: usize, value: u8| {
        let mut packet = honest.clone();
        packet[at] = value;
        packet
    };
    let nobody: Ipv4Addr = "10.244.254.9".parse().unwrap();
    let cases: Vec<Case<'_>> = vec![
        (
            "another peer's pod",
            vec![inner(three, two, port)],
            &["spoofed_source"],
        ),
        (
            "nobody's pod",
            vec![inner(nobody, two, port)],
            &["spoofed_source"],
        ),
        (
            "our own pods",
            vec![inner(two, two, port), inner(other, two, port)],
            &["martian_source"],
        ),
        (
            "places no packet comes from",
            [
                "127.0.0.1",
                "0.0.0.0",
                "224.0.0.1",
                "255.255.255.255",
                "169.254.1.1",
            ]
            .map(|src| inner(src.parse().unwrap(), two, port))
            .to_vec(),
            &["martian_source"],
        ),
        (
            "the internet, other nodes",
            ["8.8.8.8", "192.0.2.3", "192.0.2.254"]
                .map(|src| inner(src.parse().unwrap(), two, port))
                .to_vec(),
            &["foreign_source"],
        ),
        (
            "for others",
            ["8.8.8.8", "192.0.2.2", "192.0.2.1"]
                .map(|dst| inner(one, dst.parse().unwrap(), port))
                .into_iter()
                .chain([
                    inner(one, three, port),
                    inner(one, one, port),
                    inner(one, nobody, port),
                ])
                .collect(),
            &["not_for_us"],
        ),
        (
            "for many, or for the host itself",
            ["224.0.0.1", "255.255.255.255", "127.0.0.1", "169.254.1.1"]
                .map(|dst| inner(one, dst.parse().unwrap(), port))
                .to_vec(),
            &["not_unicast"],
        ),
        ("version 5", vec![edit(0, 0x55)], &["bad_version"]),
        ("header of 16 bytes", vec![edit(0, 0x44)], &["bad_header_length"]),
        (
            "length beyond the end",
            vec![edit(2, 0x40)],
            &["bad_length", "truncated"],
        ),
        ("checksum", vec![edit(10, !honest[10])], &["bad_header_checksum"]),
        (
            "cut at every byte of the headers",
            (1..28).map(|len| honest[..len].to_vec()).collect(),
            &["truncated", "bad_length"],
        ),
        ("TTL 0", vec![with_ttl(one, two, port, 0)], &["ttl_expired"]),
    ];
    let written = overlay.let_through(2);
    let before = overlay.status(2);
    let told = overlay.log(2);
    for (name, packets, reasons) in cases {
        let refused = |overlay: &Overlay| {
            let status = overlay.status(2);
            let of = |reason: &&str| status.drops.get(*reason).copied().unwrap_or(0);
            let expected: u64 = reasons.iter().map(of).sum();
            (expected, status.drops.values().sum::<u64>())
        };
        let (expected, all) = refused(&overlay);
        send(&overlay, 1, EACH, &packets);
        wait_for(name, within(Duration::from_secs(5)), || {
            refused(&overlay).1 >= all + EACH
        });
        assert_eq!(
            refused(&overlay),
            (expected + EACH, all + EACH),
            "{name}: {:?}",
            overlay.status(2).drops
        );
    }
    let after = overlay.status(2);
    assert_eq!(received(&receiver), 0);
    assert_eq!(overlay.let_through(2), written, "something was let through");
    assert_eq!(
        after.counters["inbound_packets"],
        before.counters["inbound_packets"]
    );
    // No reflection: nothing was sent to anybody.
    assert_eq!(
        after.counters["outbound_packets"],
        before.counters["outbound_packets"]
    );
    assert_eq!(after.counters["receive_overflows"], 0);
    let lies: u64 = after.drops.values().sum();
    figure("liar: refused", lies);
    // S15: they are counted, and not told of.
    assert_eq!(overlay.log(2), told);
}

/// What is tried, the packets, and the reasons they may be counted under.
type Case<'a> = (&'a str, Vec<Vec<u8>>, &'a [&'a str]);

/// A UDP packet between two addresses, as the device would hand it over.
fn inner(src: Ipv4Addr, dst: Ipv4Addr, port: u16) -> Vec<u8> {
    with_ttl(src, dst, port, 64)
}

fn with_ttl(src: Ipv4Addr, dst: Ipv4Addr, port: u16, ttl: u8) -> Vec<u8> {
    let payload = [0x5a; 64];
    let builder = PacketBuilder::ipv4(src.octets(), dst.octets(), ttl).udp(4000, port);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, &payload).unwrap();
    packet
}

/// Sends `count` of the packets in turn to node 2's port from the node's underlay address, no faster than a busy
/// machine takes them.
fn send(overlay: &Overlay, nth: usize, count: u64, packets: &[Vec<u8>]) {
    const BURST: usize = 100;
    let from = overlay.lab.nodes[nth - 1].underlay();
    let socket = from
        .namespace
        .run(|| Ok(UdpSocket::bind((from.addr, 0))?))
        .unwrap();
    socket.connect((overlay.lab.nodes[1].v4, PORT)).unwrap();
    for (nth, packet) in packets.iter().cycle().take(count as usize).enumerate() {
        socket.send(packet).unwrap();
        if nth % BURST == BURST - 1 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A socket on the node's pod address that must hear nothing.
fn receiver(overlay: &Overlay, nth: usize) -> UdpSocket {
    let end = overlay.pod(nth);
    let socket = end.namespace.run(|| Ok(UdpSocket::bind((end.addr, 0))?)).unwrap();
    // Room for all that may come before anybody looks.
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

fn received(socket: &UdpSocket) -> u64 {
    let mut buffer = [0; 2048];
    std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count() as u64
}
