//! Every checksum on the wire, summed anew.

use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::tcp::Verified;
use kersey::lab::traffic::udp::Flood;
use kersey::wire::checksum::Sum;
use kersey::wire::ip::{Addrs, Fragment, IpHeader, protocol, verify_v4_header};
use kersey::wire::transport::udp;
use kersey::wire::vxlan::HEADERS_LEN;

use crate::mixed::Mixed;
use crate::overlay::{Blueprint, Underlay, figure};
use crate::support::require_etcd;
use crate::support::sniffer::{Sniffer, Way};

#[test]
fn every_checksum_on_a_plain_wire_is_right() {
    if !require_etcd("every_checksum_on_a_plain_wire_is_right") {
        return;
    }
    for flags in [&[][..], &["--udp-gso=off", "--tun-tso=off"]] {
        let mut blueprint = Blueprint::new("sums", 2);
        blueprint.lab.offloads = Switch::Off;
        blueprint.flags = flags.iter().map(ToString::to_string).collect();
        let mixed = Mixed::start(blueprint, Underlay::Both);
        let sniffer = Sniffer::start(mixed.overlay.namespace(1), INTERFACE);
        for (from, to) in [(1, 2), (2, 1)] {
            for (from, to) in mixed.pods(from).into_iter().zip(mixed.pods(to)) {
                let transfer = Verified {
                    bytes: 2 << 20,
                    seed: 3,
                    patience: Duration::from_secs(5),
                };
                assert!(transfer.run(from, to).unwrap().intact);
                for payload_bytes in [33, 1200, 3000] {
                    let flood = Flood {
                        payload_bytes,
                        rate: Some(1000),
                        duration: Duration::from_millis(100),
                    };
                    assert_eq!(flood.run(from, to).unwrap().counts.corrupted, 0);
                }
            }
        }
        let mut tunnelled = [0u64; 2];
        for (way, packet) in sniffer.packets() {
            if let Some(inner) = datagram(&packet) {
                assert!(is_right(inner), "{way:?}: inner packet {inner:02x?}");
                tunnelled[usize::from(way == Way::Out)] += 1;
            }
        }
        figure("checksums verified: packets in, out", tunnelled);
        assert!(tunnelled.iter().all(|&packets| packets > 3000), "{tunnelled:?}");
    }
}

/// The inner packet of a VXLAN datagram whose outer checksums are right; `None` if this is another kind of packet.
fn datagram(packet: &[u8]) -> Option<&[u8]> {
    let ip = IpHeader::parse(packet).ok()?;
    if ip.protocol != protocol::UDP {
        return None;
    }
    let l4 = &packet[ip.l4..ip.total_len];
    if l4[2..4] != 8472u16.to_be_bytes() {
        return None;
    }
    assert_ne!(l4[udp::CHECKSUM], [0, 0], "an outer checksum");
    assert!(is_right(packet), "outer packet {packet:02x?}");
    Some(&l4[udp::LEN + HEADERS_LEN..])
}

/// Whether header and L4 checksums are right, as far as there are any: a fragment's cannot be summed.
fn is_right(packet: &[u8]) -> bool {
    let ip = IpHeader::parse(packet).unwrap();
    let v4 = matches!(ip.addrs, Addrs::V4 { .. });
    if v4 && !verify_v4_header(&packet[..ip.l4]) {
        return false;
    }
    let l4 = &packet[ip.l4..ip.total_len];
    let pseudo = match ip.protocol {
        _ if ip.fragment != Fragment::Whole => return true,
        protocol::ICMP => Sum::ZERO,
        protocol::TCP | protocol::UDP | protocol::ICMPV6 => ip.pseudo(l4.len()),
        _ => return true,
    };
    (pseudo + Sum::of(l4)).fold() == 0xffff
}
