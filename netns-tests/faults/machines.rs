//! F14 with machines: one dies, its namespace goes with all its links, and another is put in its place, as another peer.
//!
//! ```text
//!   node 1 ════ probe ════ node 2     node 3, node 4: killed, taken away, made anew, at the same address
//!     | ear                  | ear      |       |     or another, with the files of before or without
//!     +-------- br0 ---------+----------+-------+
//! ```
//!
//! A packet for a place where nobody is never gets to a wire, for nobody tells its Ethernet address. So the hub takes every address that
//! was given up, and the ears are where packets are sent from: what still went to the old place would be heard.

use std::net::Ipv4Addr;
use std::time::Duration;

use etcd_client::GetOptions;
use kersey::addr::MacAddr;
use kersey::host::ethtool::Switch;
use kersey::lab::cluster::ClusterPlan;
use kersey::lab::topology::INTERFACE;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Disk, Overlay, PREFIX, READY, figure, wait_for, within};
use crate::returns::{Tunnelled, say, tunnelled};
use crate::support::sniffer::{Sniffer, Way};
use crate::{assert_untouched, probe, require_etcd, warm};

/// The nodes that stay.
const STAYING: [usize; 2] = [1, 2];

#[test]
fn f14_a_machine_that_is_gone_and_made_anew_is_followed() {
    if !require_etcd("f14_a_machine_that_is_gone_and_made_anew_is_followed") {
        return;
    }
    let mut blueprint = Blueprint::new("machines", 4);
    blueprint.network = ClusterPlan::network("vxlan", false);
    // Every datagram is a frame of its own, and can be counted.
    blueprint.lab.offloads = Switch::Off;
    let mut overlay = blueprint.start();
    (1..=4).for_each(|nth| listen_to_news(&overlay, nth));
    warm(&overlay, 1, 2);
    warm(&overlay, 3, 4);
    let mut watch = Watch {
        ears: STAYING.map(|nth| Sniffer::start(overlay.namespace(nth), INTERFACE)),
        oracle: Oracle::start(&mut overlay),
        faults: 0,
    };
    let probe = probe(&overlay, 1, 2);
    let [three, four] = [3, 4].map(|nth| place(&overlay, nth).unwrap());

    overlay.take_away(3);
    overlay.put_back(3, 3, Disk::Lost);
    let [anew] = watch.follow(&mut overlay, "same address, new MAC", [3], &[]);
    assert_eq!((anew.subnet, anew.to), (three.subnet, three.to));
    assert_ne!(anew.station, three.station);

    overlay.take_away(3);
    end(&mut overlay, anew);
    overlay.put_back(3, 33, Disk::Kept);
    give_up(&overlay, anew.to);
    let [moved] = watch.follow(&mut overlay, "new address, same subnet", [3], &[]);
    assert_eq!((moved.subnet, moved.station), (anew.subnet, anew.station));
    assert_eq!(moved.to, Ipv4Addr::new(192, 0, 2, 33));

    overlay.take_away(3);
    overlay.put_back(3, 34, Disk::Lost);
    give_up(&overlay, moved.to);
    let [other] = watch.follow(&mut overlay, "new address, new subnet", [3], &[]);
    assert_eq!(other.to, Ipv4Addr::new(192, 0, 2, 34));
    assert_ne!(other.subnet, moved.subnet, "the old lease had not ended");
    end(&mut overlay, moved);
    watch.settled(&mut overlay, "the old subnet", &[moved.subnet]);

    // Their leases have ended: each asks for the subnet it had, from where the other was.
    // One after the other: most peers vanishing at once would be taken for a store that was wiped, and kept for a while.
    for (nth, place) in [(3, other), (4, four)] {
        overlay.take_away(nth);
        end(&mut overlay, place);
    }
    overlay.put_back(3, 4, Disk::Kept);
    overlay.put_back(4, 34, Disk::Kept);
    let gone = [moved.subnet];
    let swapped = watch.follow(&mut overlay, "they swap addresses", [3, 4], &gone);
    let [three, four] = [(other, four.to), (four, other.to)].map(|(was, to)| Tunnelled { to, ..was });
    assert_eq!(swapped, [three, four]);

    // They have not: a node is known by its address, and has the subnet of who was there.
    overlay.take_away(3);
    overlay.take_away(4);
    overlay.put_back(3, 34, Disk::Kept);
    overlay.put_back(4, 4, Disk::Kept);
    let swapped = watch.follow(&mut overlay, "they swap back at once", [3, 4], &gone);
    let [at_four, at_three] =
        [(four, three.station), (three, four.station)].map(|(was, station)| Tunnelled { station, ..was });
    assert_eq!(swapped, [at_four, at_three]);

    assert_untouched(&probe.stop().unwrap());
}

/// What looks on at the nodes that stay.
struct Watch {
    ears: [Sniffer; 2],
    oracle: Oracle,
    faults: usize,
}

impl Watch {
    /// Starts the daemons of machines just made, and waits until the others send to where they are by now.
    fn follow<const COUNT: usize>(
        &mut self,
        overlay: &mut Overlay,
        what: &str,
        machines: [usize; COUNT],
        gone: &[u8],
    ) -> [Tunnelled; COUNT] {
        for nth in machines {
            listen_to_news(overlay, nth);
            self.oracle.rewired(overlay, nth);
            overlay.restart(nth);
        }
        self.faults += COUNT;
        let mut came = machines.map(|_| None);
        wait_for(&format!("{what}: a lease"), READY, || {
            came = machines.map(|nth| place(overlay, nth));
            came.iter().all(Option::is_some)
        });
        let came = came.map(Option::unwrap);
        self.heard();
        let mut heard = [Vec::new(), Vec::new()];
        let took = wait_for(what, within(Duration::from_secs(2)), || {
            for (from, to) in STAYING.into_iter().flat_map(|from| came.map(|to| (from, to))) {
                say(overlay, from, to.subnet);
            }
            std::thread::sleep(Duration::from_millis(5));
            for (heard, new) in heard.iter_mut().zip(self.heard()) {
                heard.extend(new);
            }
            heard.iter().all(|heard| came.iter().all(|to| heard.contains(to)))
        });
        figure(&format!("{what}: followed after"), took);
        for nth in machines {
            overlay.wait(nth, READY, |status| status.ready && status.peers.len() >= 3);
            overlay.move_pod(nth);
        }
        self.settled(overlay, what, gone);
        came
    }

    /// All reach all, everybody sends to where the store says they are and nowhere else, and the oracle is content.
    fn settled(&mut self, overlay: &mut Overlay, what: &str, gone: &[u8]) {
        // Whoever came followed the others; that those followed is the oracle's to say.
        self.oracle.check(overlay, self.faults);
        self.heard();
        overlay.ping_all();
        let places = places(overlay);
        let subnets = places
            .iter()
            .map(|place| place.subnet)
            .chain(gone.iter().copied());
        for (subnet, from) in subnets.flat_map(|subnet| STAYING.map(|from| (subnet, from))) {
            for _ in 0..50 {
                say(overlay, from, subnet);
            }
        }
        let mut all = [Vec::new(), Vec::new()];
        let own = STAYING.map(|from| place(overlay, from).unwrap());
        wait_for(
            &format!("{what}: all is heard"),
            within(Duration::from_secs(2)),
            || {
                for (all, new) in all.iter_mut().zip(self.heard()) {
                    all.extend(new);
                }
                let count = |heard: &Vec<Tunnelled>, to| heard.iter().filter(|&&packet| packet == to).count();
                own.iter().zip(&all).all(|(own, heard)| {
                    let mut others = places.iter().filter(|&to| to != own);
                    others.all(|&to| count(heard, to) >= 50)
                })
            },
        );
        // What went astray would have come by now.
        std::thread::sleep(Duration::from_millis(50));
        for (all, new) in all.iter_mut().zip(self.heard()) {
            all.extend(new);
        }
        for (from, heard) in STAYING.into_iter().zip(all) {
            let astray: Vec<_> = heard.iter().filter(|packet| !places.contains(packet)).collect();
            assert!(astray.is_empty(), "{what}: from {from}: {astray:?}");
            for nth in (1..=4).filter(|&nth| nth != from) {
                let (known, is) = (neighbour(overlay, from, nth), link_mac(overlay, nth));
                assert_eq!(known, Some(is), "{what}: from {from} to {nth}");
            }
        }
    }

    /// What each of the staying nodes has sent into the tunnel since this was last asked.
    fn heard(&self) -> [Vec<Tunnelled>; 2] {
        self.ears.each_ref().map(|ear| {
            let sent = ear.packets().into_iter().filter(|(way, _)| *way == Way::Out);
            sent.filter_map(|(_, packet)| tunnelled(&packet)).collect()
        })
    }
}

/// Every lease, as what a packet that goes by it looks like.
fn places(overlay: &Overlay) -> Vec<Tunnelled> {
    let begin = format!("{PREFIX}/subnets/");
    let key = begin.clone();
    let answer = overlay.etcd(async |mut client| {
        let all = GetOptions::new().with_prefix();
        client.get(key, Some(all)).await
    });
    let pairs = answer.kvs().iter().map(|pair| {
        let subnet = pair.key_str().unwrap().strip_prefix(&begin).unwrap();
        let value: serde_json::Value = serde_json::from_slice(pair.value()).unwrap();
        let station = value["BackendData"]["VtepMAC"].as_str().unwrap();
        Tunnelled {
            subnet: subnet.split('.').nth(2).unwrap().parse().unwrap(),
            to: value["PublicIP"].as_str().unwrap().parse().unwrap(),
            station: station.parse::<MacAddr>().unwrap().octets(),
        }
    });
    pairs.collect()
}

/// A node's own lease: at its address, with the Ethernet address in its files.
fn place(overlay: &Overlay, nth: usize) -> Option<Tunnelled> {
    let station = std::fs::read_to_string(overlay.file(&format!("{nth}.data/vtep-mac"))).ok()?;
    let station: MacAddr = station.trim().parse().ok()?;
    let to = overlay.lab.nodes[nth - 1].v4;
    let mut places = places(overlay).into_iter();
    places.find(|place| place.to == to && place.station == station.octets())
}

/// Ends the lease of a machine that is gone, as its time would, and waits until those that stay have heard of it.
fn end(overlay: &mut Overlay, place: Tunnelled) {
    let key = format!("{PREFIX}/subnets/10.244.{}.0-24", place.subnet);
    overlay.etcd(async |mut client| {
        let held = client.get(key, None).await?;
        client.lease_revoke(held.kvs()[0].lease()).await
    });
    assert!(!places(overlay).contains(&place));
    let subnet = format!("10.244.{}.0/24", place.subnet);
    for nth in STAYING {
        overlay.wait(nth, within(Duration::from_secs(2)), |status| {
            status.peers.iter().all(|peer| peer.subnets[0] != subnet)
        });
    }
}

/// Has a node's kernel believe at once that an address is at another link. By default it does not for a second after it last touched
/// its entry, unless the newcomer announces itself, as a machine's network manager does and nobody does here.
fn listen_to_news(overlay: &Overlay, nth: usize) {
    let key = format!("ipv4/neigh/{INTERFACE}/locktime");
    overlay.namespace(nth).sysctl(&key, "0").unwrap();
}

/// The hub has the address from now on.
fn give_up(overlay: &Overlay, addr: Ipv4Addr) {
    overlay
        .hub()
        .netlink(async |netlink| {
            let bridge = netlink.link("br0").await?.index;
            Ok(netlink.add_address(bridge, addr.into(), 24).await?)
        })
        .unwrap();
}

/// The Ethernet address of a node's own link.
fn link_mac(overlay: &Overlay, nth: usize) -> MacAddr {
    let mac = overlay
        .namespace(nth)
        .netlink(async |netlink| Ok(netlink.link(INTERFACE).await?.mac));
    mac.unwrap().unwrap().into()
}

/// Where a node's kernel sends frames for another.
fn neighbour(overlay: &Overlay, nth: usize, other: usize) -> Option<MacAddr> {
    let mut command = std::process::Command::new("ip");
    let addr = overlay.lab.nodes[other - 1].v4.to_string();
    command.args(["-4", "neigh", "show", "to", &addr, "dev", INTERFACE]);
    command.stdout(std::process::Stdio::piped());
    let child = overlay.namespace(nth).spawn(&mut command).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != "lladdr");
    words.nth(1)?.parse().ok()
}
