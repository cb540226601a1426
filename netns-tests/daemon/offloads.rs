//! Every offload on and off, on both sides and on one: the same bytes arrive.

use std::io::IoSlice;
use std::net::UdpSocket;
use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::lab::traffic::End;
use kersey::lab::traffic::tally::{self, Tally};
use kersey::lab::traffic::udp::Flood;
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};

use crate::overlay::{Blueprint, wait_for};
use crate::support::require_root;

const FLAGS: [&str; 4] = ["--tun-tso", "--tun-uso", "--udp-gso", "--udp-gro"];

#[test]
fn each_offload_off_on_both_sides() {
    if require_root("each_offload_off_on_both_sides") {
        for flag in FLAGS {
            run(
                flag,
                Blueprint::embedded("off", 2),
                &[flag, "off"],
                &[flag, "off"],
            );
        }
    }
}

#[test]
fn each_offload_off_on_one_side() {
    if require_root("each_offload_off_on_one_side") {
        for flag in FLAGS {
            run(flag, Blueprint::embedded("one", 2), &[flag, "off"], &[]);
        }
    }
}

#[test]
fn all_offloads_off_on_both_sides_and_on_one() {
    if require_root("all_offloads_off_on_both_sides_and_on_one") {
        let all = FLAGS.map(|flag| [flag, "off"]).concat();
        run("both", Blueprint::embedded("none", 2), &all, &all);
        run("one", Blueprint::embedded("none", 2), &[], &all);
    }
}

#[test]
fn every_layout_of_threads_queues_and_ports() {
    if require_root("every_layout_of_threads_queues_and_ports") {
        for flags in [
            ["--threads", "joined"],
            ["--threads", "split"],
            ["--queues", "2"],
            ["--source-ports", "4"],
        ] {
            run(&flags.join(" "), Blueprint::embedded("layout", 2), &flags, &flags);
        }
        let all = ["--threads", "split", "--queues", "2", "--source-ports", "4"];
        run("all", Blueprint::embedded("layout", 2), &all, &[]);
    }
}

#[test]
fn an_underlay_without_offloads() {
    if require_root("an_underlay_without_offloads") {
        for flags in [&[][..], &["--udp-gso", "off"]] {
            let mut blueprint = Blueprint::embedded("wire", 2);
            blueprint.lab.offloads = Switch::Off;
            run(&format!("{flags:?}"), blueprint, flags, &[]);
        }
    }
}

/// Runs two nodes with flags of their own and sends TCP, small and large UDP, and UDP super-packets both ways.
fn run(name: &str, mut blueprint: Blueprint, one: &[&str], two: &[&str]) {
    for (nth, flags) in [(1, one), (2, two)] {
        let flags = flags.iter().map(ToString::to_string).collect();
        blueprint.own_flags.insert(nth, flags);
    }
    let overlay = blueprint.start();
    for (nth, flags) in [(1, one), (2, two)] {
        let status = overlay.status(nth);
        for flag in FLAGS {
            let said = &status.device.offloads[&flag.trim_start_matches('-').replace('-', "_")];
            // Without the header that TSO comes with, there is no USO either.
            let off = flags.contains(&flag) || flag == "--tun-uso" && flags.contains(&"--tun-tso");
            assert_eq!(
                said == "off (forced)",
                off,
                "{name}, node {nth}: {flag} is {said}"
            );
        }
    }
    overlay.transfer(1, 2, (3 << 20) + 1);
    for payload_bytes in [64, 1400] {
        // Fewer than the device's queue of 500 holds: whatever else the machine does, none is lost.
        let flood = Flood {
            payload_bytes,
            rate: Some(1500),
            duration: Duration::from_millis(150),
        };
        for (from, to) in [(1, 2), (2, 1)] {
            let report = flood.run(overlay.pod(from), overlay.pod(to)).unwrap();
            assert_eq!(
                (report.counts.corrupted, report.counts.lost),
                (0, 0),
                "{name}, {payload_bytes} bytes: {report:?}"
            );
        }
    }
    send_super_packets(name, overlay.pod(1), overlay.pod(2));
    send_super_packets(name, overlay.pod(2), overlay.pod(1));
    for nth in [1, 2] {
        overlay.assert_no_drops(nth);
    }
}

/// Sends UDP as QUIC stacks do, many datagrams in one call, and checks every one.
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn send_super_packets(name: &str, from: End<'_>, to: End<'_>) {
    const SEGMENT: usize = 1200;
    const SEGMENTS: u64 = 30;
    const CALLS: u64 = 20;
    let open = |end: End<'_>| end.namespace.run(|| Ok(UdpSocket::bind((end.addr, 0))?)).unwrap();
    let (sender, receiver) = (open(from), open(to));
    setsockopt(&receiver, sockopt::RcvBufForce, &(4 << 20)).unwrap();
    setsockopt(&sender, sockopt::UdpGsoSegment, &(SEGMENT as i32)).unwrap();
    sender.connect(receiver.local_addr().unwrap()).unwrap();
    receiver.set_nonblocking(true).unwrap();
    let mut tally = Tally::default();
    let mut buffer = [0; 2000];
    for call in 0..CALLS {
        let mut bytes = vec![0; SEGMENT * SEGMENTS as usize];
        for (nth, datagram) in (0..).zip(bytes.chunks_mut(SEGMENT)) {
            tally::fill(datagram, call * SEGMENTS + nth);
        }
        use std::os::fd::AsRawFd;
        let slices = [IoSlice::new(&bytes)];
        nix::sys::socket::sendmsg::<()>(sender.as_raw_fd(), &slices, &[], MsgFlags::empty(), None).unwrap();
        wait_for("super-packets arrive", Duration::from_secs(2), || {
            while let Ok(len) = receiver.recv(&mut buffer) {
                tally.note(&buffer[..len], std::time::Instant::now());
            }
            tally.received() == (call + 1) * SEGMENTS
        });
    }
    let counts = tally.close(CALLS * SEGMENTS, std::time::Instant::now());
    assert_eq!(
        (counts.lost, counts.corrupted, counts.duplicates),
        (0, 0, 0),
        "{name}: {counts:?}"
    );
}
