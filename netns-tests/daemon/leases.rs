//! What others write to the store, and what becomes of it.
//!
//! Peers that are only a key in etcd are played by a socket on node 3, which has no daemon: it sees where packets go.

use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use kersey::lab::topology::INTERFACE;
use kersey::lab::traffic::probe::Probe;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, PREFIX, READY, figure, wait_for, within};
use crate::watch::{require_etcd, warm};

/// As captured from flannel v0.28.9, with an address of ours.
const FLANNEL: &str = r#"{"PublicIP":"192.0.2.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":100,"VtepMAC":"4a:5b:ac:d9:d3:c7"}}"#;
/// How soon an event must have its effect.
const SOON: Duration = Duration::from_secs(2);

#[test]
fn a_peer_written_by_flannel_moves_leaves_and_comes_back() {
    if !require_etcd("a_peer_written_by_flannel_moves_leaves_and_comes_back") {
        return;
    }
    let mut overlay = two_and_a_spare("moves");
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    let first: Ipv4Addr = "192.0.2.3".parse().unwrap();
    let second: Ipv4Addr = "192.0.2.33".parse().unwrap();
    overlay
        .namespace(3)
        .netlink(async |netlink| {
            let index = netlink.link(INTERFACE).await?.index;
            Ok(netlink.add_address(index, second.into(), 24).await?)
        })
        .unwrap();
    let (first, second) = (port_of(&overlay, first), port_of(&overlay, second));

    // Under an etcd lease, as flannel's are.
    let key = format!("{PREFIX}/subnets/10.244.199.0-24");
    let lease = overlay.etcd(async |mut client| {
        let lease = client.lease_grant(86_400, None).await?.id();
        let options = etcd_client::PutOptions::new().with_lease(lease);
        client.put(key, FLANNEL, Some(options)).await?;
        Ok(lease)
    });
    let pod: Ipv4Addr = "10.244.199.7".parse().unwrap();
    assert_goes_to(&overlay, pod, &first);

    // Another address, same subnet.
    overlay.put(
        "subnets/10.244.199.0-24",
        FLANNEL.replace("192.0.2.3\"", "192.0.2.33\""),
    );
    assert_goes_to(&overlay, pod, &second);
    drain(&first);
    for _ in 0..20 {
        say(&overlay, pod);
    }
    assert_eq!(drain(&first), 0, "packets still go to the old address");

    // Gone: the lease ends, with a put in between that took the key out of it.
    overlay.delete("subnets/10.244.199.0-24");
    overlay.etcd(async |mut client| client.lease_revoke(lease).await.map(drop));
    for nth in [1, 2] {
        overlay.wait(nth, within(SOON), |status| status.peers.len() == 1);
    }
    drain(&second);
    for _ in 0..20 {
        say(&overlay, pod);
    }
    assert_eq!(drain(&second), 0, "packets still go to a peer that is gone");
    wait_for("they are counted", within(SOON), || {
        overlay
            .status(1)
            .drops
            .get("no_route")
            .is_some_and(|&dropped| dropped >= 20)
    });

    // Back, with another subnet.
    overlay.put("subnets/10.244.198.0-24", FLANNEL);
    assert_goes_to(&overlay, "10.244.198.7".parse().unwrap(), &first);
    let report = probe.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
}

#[test]
fn a_node_moves_to_another_address() {
    if !require_etcd("a_node_moves_to_another_address") {
        return;
    }
    let mut overlay = Blueprint::new("renumber", 2).start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    overlay.terminate(2);
    let (old, new) = (overlay.lab.nodes[1].v4, Ipv4Addr::new(192, 0, 2, 77));
    overlay
        .namespace(2)
        .netlink(async |netlink| {
            let index = netlink.link(INTERFACE).await?.index;
            // In this order: further addresses of a subnet go with its first.
            netlink.delete_address(index, old.into(), 24).await?;
            Ok(netlink.add_address(index, new.into(), 24).await?)
        })
        .unwrap();
    oracle.rewired(&overlay, 2);
    overlay.restart(2);
    overlay.wait(2, READY, |status| status.ready && !status.peers.is_empty());
    let subnet = overlay.subnet(2).to_string();
    overlay.wait(1, within(SOON), |status| {
        status
            .peers
            .iter()
            .any(|peer| peer.subnets[0] == subnet && peer.endpoints == ["192.0.2.77:8285"])
    });
    let status = overlay.status(2);
    overlay.nodes[1].pods =
        kersey::lab::cluster::give_pod_addresses(overlay.namespace(2), &status.node.subnets).unwrap();
    overlay.ping_all();
    oracle.check(&mut overlay, 1);
}

#[test]
fn rotten_keys_touch_nobody() {
    if !require_etcd("rotten_keys_touch_nobody") {
        return;
    }
    let mut overlay = two_and_a_spare("rot");
    overlay.put("subnets/10.244.199.0-24", FLANNEL);
    for nth in [1, 2] {
        overlay.wait(nth, within(SOON), |status| status.peers.len() == 2);
    }
    let peers = |overlay: &Overlay, nth| -> Vec<_> {
        let peers = overlay.status(nth).peers.into_iter();
        peers.map(|peer| (peer.subnets, peer.endpoints)).collect()
    };
    let before = [1, 2].map(|nth| peers(&overlay, nth));
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    let own = overlay.subnet(1).to_string().replace('/', "-");
    let wide = format!("subnets/{}-16", own.split_once("-").unwrap().0);
    let unreadable: [(&str, &[u8]); 10] = [
        ("subnets/", b"{}"),
        ("subnets/x", FLANNEL.as_bytes()),
        ("subnets/10.244.199.0-24/", FLANNEL.as_bytes()),
        ("subnets/10.244.199.0-33", FLANNEL.as_bytes()),
        ("subnets/10.244.199.0", FLANNEL.as_bytes()),
        ("subnets/10.244.200.0-24", b""),
        ("subnets/10.244.201.0-24", b"null"),
        ("subnets/10.244.202.0-24", b"\xff\xfe{"),
        ("subnets/10.244.203.0-24", br#"{"PublicIP":"nonsense"}"#),
        // A good peer's value goes bad: the peer stays as it was.
        ("subnets/10.244.199.0-24", b"rot"),
    ];
    for (key, value) in unreadable {
        overlay.put(key, value);
    }
    let foreign = [
        ("subnets/10.9.0.0-24", r#"{"PublicIP":"192.0.2.9"}"#),
        ("subnets/10.244.204.0-24", r#"{"PublicIP":"127.0.0.1"}"#),
        ("subnets/10.244.205.0-24", r#"{"PublicIP":"10.244.1.1"}"#),
        ("subnets/10.244.206.0-24", r#"{"PublicIP":"255.255.255.255"}"#),
        (wide.as_str(), r#"{"PublicIP":"192.0.2.9"}"#),
    ];
    for (key, value) in foreign {
        overlay.put(key, value);
    }
    for nth in [1, 2] {
        overlay.wait(nth, within(SOON), |status| {
            let of = |reason| status.rejected_leases.get(reason).copied().unwrap_or(0);
            of("unreadable") >= unreadable.len() as u64
                && status.rejected_leases.values().sum::<u64>() >= (unreadable.len() + foreign.len()) as u64
        });
        assert_eq!(peers(&overlay, nth), before[nth - 1], "node {nth}");
    }
    // As many faults as keys: each is named once. What is in the store is not what holds (I1), and one of the leases is over others (I3).
    let keys: Vec<_> = unreadable
        .map(|(key, _)| key)
        .into_iter()
        .chain(foreign.map(|(key, _)| key))
        .collect();
    oracle.check_but(&mut overlay, keys.len(), &["I1 ", "I3 "]);
    for key in keys {
        overlay.delete(key);
    }
    overlay.put("subnets/10.244.199.0-24", FLANNEL);
    oracle.check(&mut overlay, unreadable.len() + foreign.len());
    let report = probe.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    assert!(overlay.log(1).lines().count() < 60, "{}", overlay.log(1));
}

#[test]
fn a_lease_an_operator_deleted_is_claimed_again() {
    if !require_etcd("a_lease_an_operator_deleted_is_claimed_again") {
        return;
    }
    let mut overlay = Blueprint::new("claim", 3).start();
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    let (pid, subnet) = (overlay.daemon(2).pid(), overlay.subnet(2));
    let key = format!("subnets/{}", subnet.to_string().replace('/', "-"));
    overlay.delete(&key);
    let took = wait_for("the lease is back", within(Duration::from_secs(3)), || {
        overlay.get(&key).is_some()
    });
    figure("own lease claimed again after", took);
    overlay.wait(2, READY, |status| status.ready);
    wait_for("it is told", READY, || {
        overlay.log(2).contains("our lease was gone from the store")
    });
    assert_eq!((overlay.daemon(2).pid(), overlay.subnet(2)), (pid, subnet));
    overlay.wait(1, within(SOON), |status| status.peers.len() == 2);
    let before = probe.received();
    wait_for("traffic flows", READY, || {
        let now = probe.received();
        now.0 > before.0 + 200 && now.1 > before.1 + 200
    });
    let report = probe.stop().unwrap();
    figure("own lease deleted: longest gap", report.longest_gap());
    assert!(
        report.longest_gap() <= within(Duration::from_secs(1)),
        "{report:?}"
    );
    assert_eq!(report.corrupted(), 0);
}

#[test]
fn a_node_takes_what_is_reserved_for_it_at_its_next_start() {
    if !require_etcd("a_node_takes_what_is_reserved_for_it_at_its_next_start") {
        return;
    }
    for backend in ["udp", "vxlan"] {
        let mut blueprint = Blueprint::new("reserved", 2);
        blueprint.network = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
        let mut overlay = blueprint.start();
        let first = overlay.subnet(2);
        let old_key = format!("subnets/{}", first.to_string().replace('/', "-"));
        // As `kersey reserve add` writes it.
        overlay.put("subnets/10.244.199.0-24", r#"{"PublicIP":"192.0.2.2"}"#);
        // It stays where it is while it runs.
        std::thread::sleep(Duration::from_secs(2));
        assert_eq!(overlay.subnet(2), first);
        for nth in [1, 2] {
            let log = overlay.log(nth);
            assert!(!log.contains(" WARN ") && !log.contains(" ERROR "), "{log}");
        }
        overlay.terminate(2);
        overlay.restart(2);
        overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
        assert_eq!(overlay.subnet(2).to_string(), "10.244.199.0/24");
        assert_eq!(overlay.get(&old_key), None);
        overlay.wait(1, READY, |status| {
            status.peers.len() == 1 && status.peers[0].subnets == ["10.244.199.0/24"]
        });
        overlay.move_pod(2);
        overlay.ping_all();
        // It is a reservation still, and so it is after another start.
        let reserved = |overlay: &Overlay| overlay.get("subnets/10.244.199.0-24").map(|(_, lease)| lease);
        assert_eq!(reserved(&overlay), Some(0));
        overlay.terminate(2);
        overlay.restart(2);
        overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
        assert_eq!(overlay.subnet(2).to_string(), "10.244.199.0/24");
        assert_eq!(reserved(&overlay), Some(0));
        // The reservation is ended, and what it becomes ends soon: the node renews it right away.
        let short = overlay.etcd(async |mut client| {
            let value = client
                .get(format!("{PREFIX}/subnets/10.244.199.0-24"), None)
                .await?;
            let lease = client.lease_grant(5, None).await?.id();
            let options = etcd_client::PutOptions::new().with_lease(lease);
            let kv = &value.kvs()[0];
            client.put(kv.key(), kv.value(), Some(options)).await?;
            Ok(lease)
        });
        wait_for("it is renewed", within(SOON), || {
            reserved(&overlay).is_some_and(|lease| lease != 0 && lease != short)
        });
        let log = overlay.log(2);
        assert!(log.contains("our subnet is not reserved any more"), "{log}");
        assert!(!log.contains("somebody else wrote our lease"), "{log}");
    }
}

fn two_and_a_spare(tag: &str) -> Overlay {
    let mut blueprint = Blueprint::new(tag, 3);
    blueprint.daemons = 2;
    blueprint.start()
}

/// The backend's port on an address of node 3.
fn port_of(overlay: &Overlay, addr: Ipv4Addr) -> UdpSocket {
    let socket = overlay
        .namespace(3)
        .run(|| Ok(UdpSocket::bind((addr, 8285))?))
        .unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Sends a datagram from node 1's pod.
fn say(overlay: &Overlay, to: Ipv4Addr) {
    let from = overlay.pod(1);
    let socket = from
        .namespace
        .run(|| Ok(UdpSocket::bind((from.addr, 0))?))
        .unwrap();
    // While there is no route, the kernel says so of an earlier one.
    let _ = socket.send_to(b"who is there", (to, 9));
}

/// Waits until datagrams from node 1's pod to `pod` come out at `place`, bare.
fn assert_goes_to(overlay: &Overlay, pod: Ipv4Addr, place: &UdpSocket) {
    let took = wait_for("packets take the new way", within(SOON), || {
        say(overlay, pod);
        let mut buffer = [0; 2048];
        std::iter::from_fn(|| place.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())).any(|packet| {
            packet.len() == 20 + 8 + 12
                && packet[..2] == [0x45, 0]
                && packet[12..16] == overlay.pod_v4(1).octets()
                && packet[16..20] == pod.octets()
                && packet.ends_with(b"who is there")
        })
    });
    figure("lease event in effect after", took);
}

fn drain(socket: &UdpSocket) -> usize {
    let mut buffer = [0; 2048];
    std::iter::from_fn(|| socket.recv(&mut buffer).ok()).count()
}
