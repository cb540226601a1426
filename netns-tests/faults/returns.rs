//! F14: a peer comes back as another. Others follow, and send nothing to where it was.
//!
//! The peers that come back here are keys in etcd, as flannel writes them; nodes 3 and 4 have no daemon, only somebody who listens. In
//! `machines.rs` they are machines.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, figure, wait_for, within};
use crate::support::sniffer::{Sniffer, Way};
use crate::{assert_untouched, probe, require_etcd, warm};
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::topology::INTERFACE;

const MAC_ONE: [u8; 6] = [0x4a, 0x5b, 0xac, 0xd9, 0xd3, 1];
const MAC_TWO: [u8; 6] = [0x4a, 0x5b, 0xac, 0xd9, 0xd3, 2];
/// Flannel's default network number.
const PORT: u16 = 8472;

#[test]
fn f14_a_peer_that_returns_in_any_of_four_ways_is_followed() {
    if !require_etcd("f14_a_peer_that_returns_in_any_of_four_ways_is_followed") {
        return;
    }
    let mut blueprint = Blueprint::new("returns", 4);
    blueprint.daemons = 2;
    blueprint.network = ClusterPlan::network("vxlan", false);
    // Every datagram is a frame of its own, and can be counted.
    blueprint.lab.offloads = kersey::host::ethtool::Switch::Off;
    let mut overlay = blueprint.start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let ears = Ears {
        three: Sniffer::start(overlay.namespace(3), INTERFACE),
        four: Sniffer::start(overlay.namespace(4), INTERFACE),
    };
    let probe = probe(&overlay, 1, 2);
    put(&overlay, 199, 3, MAC_ONE);
    follow(&overlay, &ears, "it comes", &[(199, 3, MAC_ONE)], &[]);

    put(&overlay, 199, 3, MAC_TWO);
    follow(
        &overlay,
        &ears,
        "same address, new MAC",
        &[(199, 3, MAC_TWO)],
        &[],
    );

    put(&overlay, 199, 4, MAC_TWO);
    follow(
        &overlay,
        &ears,
        "new address, same subnet",
        &[(199, 4, MAC_TWO)],
        &[],
    );

    overlay.delete(&key(199));
    put(&overlay, 198, 3, MAC_ONE);
    follow(
        &overlay,
        &ears,
        "new address, new subnet",
        &[(198, 3, MAC_ONE)],
        &[199],
    );

    put(&overlay, 197, 4, MAC_TWO);
    follow(
        &overlay,
        &ears,
        "another",
        &[(198, 3, MAC_ONE), (197, 4, MAC_TWO)],
        &[199],
    );
    put(&overlay, 197, 3, MAC_ONE);
    put(&overlay, 198, 4, MAC_TWO);
    follow(
        &overlay,
        &ears,
        "they swap",
        &[(197, 3, MAC_ONE), (198, 4, MAC_TWO)],
        &[199],
    );

    oracle.check(&mut overlay, 1);
    assert_untouched(&probe.stop().unwrap());
}

/// What arrives at the two nodes.
struct Ears {
    three: Sniffer,
    four: Sniffer,
}

/// Where a packet for a subnet came, and to which station.
type Heard = (u8, u8, [u8; 6]);

impl Ears {
    fn heard(&self) -> Vec<Heard> {
        [(3, &self.three), (4, &self.four)]
            .into_iter()
            .flat_map(|(node, ear)| ear.packets().into_iter().map(move |packet| (node, packet)))
            .filter(|(_, (way, _))| *way == Way::In)
            .filter_map(|(node, (_, packet))| {
                let tunnelled = tunnelled(&packet)?;
                Some((tunnelled.subnet, node, tunnelled.station))
            })
            .collect()
    }
}

/// A packet in the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tunnelled {
    /// The third byte of the inner destination.
    pub(crate) subnet: u8,
    /// Where it is sent to.
    pub(crate) to: Ipv4Addr,
    /// The Ethernet address inside.
    pub(crate) station: [u8; 6],
}

/// What a packet of the underlay is, if it is in the tunnel: IP 20, UDP 8, VXLAN 8, Ethernet 14, IP.
pub(crate) fn tunnelled(packet: &[u8]) -> Option<Tunnelled> {
    let is_udp = packet.get(9) == Some(&17);
    let is_ours = packet.get(22..24) == Some(&PORT.to_be_bytes()[..]);
    let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    let station = packet.get(36..42)?.try_into().ok()?;
    (is_udp && is_ours).then_some(())?;
    Some(Tunnelled {
        subnet: *packet.get(50 + 18)?,
        to: to.into(),
        station,
    })
}

/// Waits until packets go where they should, then counts those that do not: there must be none.
fn follow(overlay: &Overlay, ears: &Ears, what: &str, wanted: &[Heard], gone: &[u8]) {
    let subnets: Vec<u8> = wanted
        .iter()
        .map(|wanted| wanted.0)
        .chain(gone.iter().copied())
        .collect();
    let took = wait_for(what, within(Duration::from_secs(2)), || {
        for &subnet in &subnets {
            say(overlay, 1, subnet);
        }
        std::thread::sleep(Duration::from_millis(5));
        let mut heard = ears.heard();
        heard.sort_unstable();
        heard.dedup();
        let mut wanted = wanted.to_vec();
        wanted.sort_unstable();
        heard == wanted
    });
    figure(&format!("{what}: followed after"), took);
    std::thread::sleep(Duration::from_millis(50));
    ears.heard();
    for _ in 0..50 {
        for &subnet in &subnets {
            say(overlay, 1, subnet);
        }
    }
    let mut heard = Vec::new();
    wait_for(what, within(Duration::from_secs(2)), || {
        heard.extend(ears.heard());
        heard.len() >= 50 * wanted.len()
    });
    std::thread::sleep(Duration::from_millis(50));
    heard.extend(ears.heard());
    assert_eq!(heard.len(), 50 * wanted.len(), "{what}: {heard:?}");
    assert!(
        heard.iter().all(|heard| wanted.contains(heard)),
        "{what}: {heard:?}"
    );
}

fn key(subnet: u8) -> String {
    format!("subnets/10.244.{subnet}.0-24")
}

fn put(overlay: &Overlay, subnet: u8, node: u8, mac: [u8; 6]) {
    let mac: Vec<_> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    let mac = mac.join(":");
    let value = format!(
        r#"{{"PublicIP":"192.0.2.{node}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    );
    overlay.put(&key(subnet), value);
}

/// Sends a datagram from a node's pod.
pub(crate) fn say(overlay: &Overlay, from: usize, subnet: u8) {
    let from = overlay.pod(from);
    let socket = from
        .namespace
        .run(|| Ok(UdpSocket::bind((from.addr, 0))?))
        .unwrap();
    // While there is no route, the kernel says so of an earlier one.
    let _ = socket.send_to(b"who is there", (Ipv4Addr::new(10, 244, subnet, 7), 9));
}
