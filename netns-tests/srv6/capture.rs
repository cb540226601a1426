//! What Kersey sends, as another program reads it: `tshark`, with every checksum it can check.
//!
//! The nodes' links are without offloads here, as on a wire; with them, checksums are the receiver's to finish.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::net::{Ipv6Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use etherparse::PacketBuilder;
use kersey::host::ethtool::Switch;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::ping::Ping;
use kersey::wire::checksum::{Sum, pseudo_v6};
use kersey::wire::ip::protocol;
use kersey::wire::srv6::{Mode, next_header};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use crate::hostile::packets::{outer, sid, srh, udp_v4, udp_v6};
use crate::hostile::raw_socket;
use crate::mixed::{bulk, datagrams, network};
use crate::overlay::{Blueprint, figure, wait_for, within};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

#[test]
fn tshark_reads_every_form_of_a_path() {
    if !require_etcd("tshark_reads_every_form_of_a_path") || !require_tshark() {
        return;
    }
    for (mode, word) in [(Mode::Reduced, "reduced"), (Mode::Full, "full")] {
        for waypoints in 0..3 {
            for hmac in [false, true] {
                form(mode, word, waypoints, hmac);
            }
        }
    }
}

#[test]
fn tshark_reads_what_a_sid_answers() {
    if !require_etcd("tshark_reads_what_a_sid_answers") || !require_tshark() {
        return;
    }
    let overlay = plain("s6answers", 3, json!({})).start();
    let sniffer = Sniffer::start(overlay.namespace(2), INTERFACE);
    // Segments that are larger than the way onward carries are told of. The route of the whole locator is the daemon's, which sets it right.
    let mut route = Command::new("ip");
    route.args(["-6", "route", "add", "fd12:3456:789a:c000:203::1"]);
    route.args(["via", "2001:db8:1::3", "dev", INTERFACE, "mtu", "1300"]);
    assert!(
        overlay
            .namespace(2)
            .spawn(&mut route)
            .unwrap()
            .wait()
            .unwrap()
            .success()
    );

    let [one, three] = [1, 3].map(|nth| sid(nth, "1"));
    let inner = udp_v4(overlay.pod_v4(1), overlay.pod_v4(2));
    let inner_v6 = udp_v6("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
    let large = {
        let ends = [1, 2].map(|nth| overlay.pod_v4(nth).octets());
        let builder = PacketBuilder::ipv4(ends[0], ends[1], 64).udp(4000, 9);
        let mut packet = Vec::new();
        builder.write(&mut packet, &[0; 1372]).unwrap();
        packet
    };
    let echo = |function: &str| {
        let mut message = vec![128, 0, 0, 0, 0x12, 0x34, 0, 1];
        message.extend(0..100);
        let pseudo = pseudo_v6(one, sid(2, function), protocol::ICMPV6, message.len());
        let sum = (pseudo + Sum::of(&message)).finish();
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        message
    };
    let onward = |left, rest: &[u8]| {
        let list = srh(next_header::IPV4, left, &[three, sid(2, "e")], &[]);
        outer(
            one,
            sid(2, "e"),
            next_header::ROUTING,
            &[&list[..], rest].concat(),
        )
    };
    let listed = |function: &str, next, rest: &[u8]| {
        let list = srh(next, 0, &[sid(2, function)], &[]);
        outer(
            one,
            sid(2, function),
            next_header::ROUTING,
            &[&list[..], rest].concat(),
        )
    };
    let mut dying = onward(1, &inner);
    dying[7] = 1;
    let packets = [
        ("129/0", listed("1", protocol::ICMPV6, &echo("1"))),
        ("129/0", listed("e", protocol::ICMPV6, &echo("e"))),
        ("129/0", outer(one, sid(2, "e"), protocol::ICMPV6, &echo("e"))),
        ("3/0", dying),
        ("2/0", onward(1, &large)),
        ("4/0", onward(9, &inner)),
        ("4/4", listed("e", next_header::IPV4, &inner)),
        ("4/4", outer(one, sid(2, "e"), next_header::IPV6, &inner_v6)),
        ("4/4", listed("1", next_header::NONE, &[])),
    ];
    let raw = raw_socket(overlay.namespace(1));
    let target = SocketAddr::from((overlay.lab.nodes[1].v6, 0));
    for (what, packet) in &packets {
        raw.send_to(packet, &target.into())
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        // Errors to one source are few at once, and then one in 300 ms at the slowest.
        std::thread::sleep(Duration::from_millis(310));
    }
    let mut answers = Vec::new();
    wait_for("all are answered", within(Duration::from_secs(5)), || {
        let passed = sniffer.packets().into_iter();
        let out = passed.filter(|(way, packet)| {
            *way == Way::Out && packet[0] >> 4 == 6 && packet[24..40] == one.octets()
        });
        answers.extend(out.map(|(_, packet)| packet));
        answers.len() > packets.len()
    });
    let read = tshark(&overlay.file("answers.pcap"), &answers);
    // About a packet that is too large the kernel has a word of its own: it quotes what was to leave, Kersey what came.
    let waypoint = sid(2, "e").to_string();
    let kernels = |frame: &&Frame| {
        frame.first("icmpv6.type") == "2" && frame.all("ipv6.dst").get(1) != Some(&waypoint.as_str())
    };
    let mut found: Vec<_> = read
        .iter()
        .filter(|frame| !kernels(frame))
        .map(|frame| format!("{}/{}", frame.first("icmpv6.type"), frame.first("icmpv6.code")))
        .collect();
    let mut expected: Vec<_> = packets.iter().map(|(what, _)| (*what).to_owned()).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    for frame in &read {
        assert!(
            frame
                .all("icmpv6.checksum.status")
                .iter()
                .all(|status| *status == "1"),
            "{frame:?}"
        );
    }
}

/// Traffic of all kinds from node 1 to node 2 by a path through so many waypoints.
fn form(mode: Mode, word: &str, waypoints: u8, hmac: bool) {
    let what = format!("{word}, {waypoints} waypoints, HMAC {hmac}");
    let via: Vec<_> = (0..waypoints).map(|nth| sid(3 + nth, "e")).collect();
    let mut settings = json!({ "Mode": word });
    if waypoints > 0 {
        settings["Paths"] = json!([{ "To": "192.0.2.2", "Via": via }]);
    }
    let mut keys = NamedTempFile::new().unwrap();
    writeln!(keys, "9 sha256 a secret").unwrap();
    if hmac {
        settings["HMAC"] = "require".into();
        settings["HMACKeyID"] = 9.into();
    }
    let tag = format!("s6{}{waypoints}{}", &word[..1], u8::from(hmac));
    let mut blueprint = plain(&tag, 2 + usize::from(waypoints), settings);
    blueprint.flags = vec![format!("--srv6-hmac-keys={}", keys.path().display())];
    let overlay = blueprint.start();
    let sniffers: Vec<_> = [1].into_iter().chain(3..3 + usize::from(waypoints)).collect();
    let sniffers: Vec<_> = sniffers
        .into_iter()
        .map(|nth| Sniffer::start(overlay.namespace(nth), INTERFACE))
        .collect();
    let mtu = usize::from(overlay.status(1).node.inner_mtu);
    for family in [0, 1] {
        let (from, to) = (overlay.pods(1)[family], overlay.pods(2)[family]);
        let headers = if family == 0 { 28 } else { 48 };
        for data_bytes in [0, 56, mtu - headers] {
            let ping = Ping {
                count: 2,
                data_bytes,
                ..Ping::default()
            };
            assert!(
                ping.run(from, to.addr).unwrap().all(),
                "{what}, {data_bytes} bytes"
            );
        }
        datagrams(from, to, 100);
        bulk(from, to, 300_000);
    }
    // What each node has on the wire towards node 2, and what is left of the list there.
    let mut path = via.clone();
    path.push(sid(2, "1"));
    let steps = 0..path.len();
    let mut frames = 0;
    for (step, sniffer) in steps.zip(&sniffers) {
        let passed = sniffer.packets().into_iter();
        let out = passed.filter(|(way, packet)| {
            *way == Way::Out && packet[0] >> 4 == 6 && packet[8..24] == sid(1, "1").octets()
        });
        let sent: Vec<_> = out.map(|(_, packet)| packet).collect();
        assert!(sent.len() > 100, "{what}: {}", sent.len());
        let read = tshark(&overlay.file(&format!("{step}.pcap")), &sent);
        assert_eq!(read.len(), sent.len());
        let listed = match mode {
            Mode::Full => path.len(),
            Mode::Reduced if path.len() == 1 => usize::from(hmac),
            Mode::Reduced => path.len() - 1,
        };
        let mut seen = BTreeSet::new();
        for frame in &read {
            let destination: Ipv6Addr = frame.first("ipv6.dst").parse().unwrap();
            assert_eq!(destination, path[step], "{what}: {frame:?}");
            let list = frame.all("ipv6.routing.srh.addr");
            let list: Vec<Ipv6Addr> = list.iter().map(|addr| addr.parse().unwrap()).collect();
            let expected: Vec<_> = path.iter().rev().take(listed).copied().collect();
            assert_eq!(list, expected, "{what}: {frame:?}");
            if listed > 0 {
                assert_eq!(frame.first("ipv6.routing.type"), "4", "{what}: {frame:?}");
                let left = (path.len() - 1 - step).to_string();
                assert_eq!(frame.first("ipv6.routing.segleft"), left, "{what}: {frame:?}");
                let last = (listed - 1).to_string();
                assert_eq!(
                    frame.first("ipv6.routing.srh.last_entry"),
                    last,
                    "{what}: {frame:?}"
                );
            } else {
                assert_eq!(frame.first("ipv6.routing.type"), "", "{what}: {frame:?}");
            }
            seen.insert(frame.first("frame.protocols").to_owned());
        }
        let has = |end: &str| seen.iter().any(|protocols| protocols.contains(end));
        for kind in [
            ":ip:icmp",
            ":ipv6:icmpv6",
            ":ip:udp",
            ":ipv6:udp",
            ":ip:tcp",
            ":ipv6:tcp",
        ] {
            assert!(has(kind), "{what}: no {kind} in {seen:?}");
        }
        frames += sent.len();
    }
    figure(&format!("{what}: frames read"), frames);
}

/// Nodes on a wire without offloads.
fn plain(tag: &str, nodes: usize, settings: Value) -> Blueprint {
    let mut blueprint = Blueprint::new(tag, nodes);
    blueprint.network = network(settings, true);
    blueprint.lab.offloads = Switch::Off;
    blueprint
}

/// One packet as tshark reads it: the values of each of [`FIELDS`], from the outermost header on.
#[derive(Debug)]
struct Frame(Vec<Vec<String>>);

impl Frame {
    fn all(&self, field: &str) -> Vec<&str> {
        let at = FIELDS.iter().position(|known| *known == field).unwrap();
        self.0[at].iter().map(String::as_str).collect()
    }

    fn first(&self, field: &str) -> &str {
        self.all(field).first().copied().unwrap_or_default()
    }
}

const FIELDS: [&str; 12] = [
    "_ws.malformed",
    "_ws.expert.severity",
    "_ws.expert.message",
    "frame.protocols",
    "ipv6.dst",
    "ipv6.routing.type",
    "ipv6.routing.segleft",
    "ipv6.routing.srh.last_entry",
    "ipv6.routing.srh.addr",
    "icmpv6.type",
    "icmpv6.code",
    "icmpv6.checksum.status",
];

/// Has tshark read packets; none may be malformed, or be worth a word of error.
fn tshark(file: &Path, packets: &[Vec<u8>]) -> Vec<Frame> {
    write_pcap(file, packets);
    let mut command = Command::new("tshark");
    command.arg("-n").arg("-r").arg(file);
    for check in ["ip.check_checksum", "udp.check_checksum", "tcp.check_checksum"] {
        command.args(["-o", &format!("{check}:TRUE")]);
    }
    command.args(["-T", "fields", "-E", "separator=/t", "-E", "aggregator=|"]);
    for field in FIELDS {
        command.args(["-e", field]);
    }
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    let values = |cell: &str| {
        cell.split('|')
            .filter(|value| !value.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let frames: Vec<_> = text
        .lines()
        .map(|line| Frame(line.split('\t').map(values).collect()))
        .collect();
    for frame in &frames {
        assert_eq!(frame.all("_ws.malformed"), [""; 0], "{frame:?}");
        // PI_ERROR of epan/proto.h; below it are warnings, such as of TCP that was sent again.
        const ERROR: u32 = 0x0080_0000;
        let severities = frame.all("_ws.expert.severity");
        let worst = severities
            .iter()
            .map(|severity| severity.parse::<u32>().unwrap())
            .max();
        assert!(worst.unwrap_or(0) < ERROR, "{frame:?}");
    }
    frames
}

/// Writes packets that begin with their IP header, one a microsecond: pcap of version 2.4, LINKTYPE_RAW.
fn write_pcap(file: &Path, packets: &[Vec<u8>]) {
    let mut out = BufWriter::new(File::create(file).unwrap());
    for value in [0xa1b2_c3d4, 2 | 4 << 16, 0, 0, 1 << 18, 101] {
        out.write_all(&u32::to_le_bytes(value)).unwrap();
    }
    for (nth, packet) in (0..).zip(packets) {
        let len = u32::try_from(packet.len()).unwrap();
        for value in [nth / 1_000_000, nth % 1_000_000, len, len] {
            out.write_all(&u32::to_le_bytes(value)).unwrap();
        }
        out.write_all(packet).unwrap();
    }
    out.flush().unwrap();
}

/// Whether there is a tshark; under `CI=true` there must be.
#[expect(clippy::print_stderr, reason = "a test that is skipped has to say so")]
fn require_tshark() -> bool {
    if Command::new("tshark").arg("--version").output().is_ok() {
        return true;
    }
    let ci = std::env::var("CI").as_deref() == Ok("true");
    assert!(!ci, "captures are read with tshark, and CI must read them");
    eprintln!("skipped: captures are read with tshark (apt-get install tshark)");
    false
}
