//! A node that is out of touch for long, and one that is not who it says: what becomes of their leases and of traffic.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use etcd_client::{PutOptions, Txn, TxnOp};
use kersey::lab::interrupt;
use kersey::lab::topology::HUB_V4;
use kersey::lab::traffic::probe::Probe;
use nix::sys::signal::Signal;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, PREFIX, READY, figure, wait_for, within};
use crate::watch::{assert_untouched, probe, require_etcd, warm};

/// F2: longer without etcd than the lease lives, by itself; then once more, and somebody has moved in.
#[test]
fn a_node_cut_off_for_longer_than_its_lease_is_back_in_seconds() {
    if !require_etcd("a_node_cut_off_for_longer_than_its_lease_is_back_in_seconds") {
        return;
    }
    let mut blueprint = Blueprint::new("expiry", 3);
    blueprint.flags = ["--lease-ttl", "4", "--lease-renew-margin", "2"]
        .map(str::to_owned)
        .to_vec();
    let mut overlay = blueprint.start();
    let pids: Vec<_> = (1..=3).map(|nth| overlay.daemon(nth).pid()).collect();
    let own = overlay.subnet(2);
    let key = format!("subnets/{}", own.to_string().replace('/', "-"));
    warm(&overlay, 1, 3);
    warm(&overlay, 2, 3);
    let mut oracle = Oracle::start(&mut overlay);
    let bystanders = Probe::start(overlay.pod(1), overlay.pod(3)).unwrap();
    wait_for("the probe runs", READY, || bystanders.received().0 > 100);

    cut(&overlay, "add");
    wait_for("the lease ends", READY, || overlay.get(&key).is_none());
    interrupt::sleep(Duration::from_secs(4)).unwrap();
    let status = overlay.status(2);
    assert!(
        status.ready && !status.store.connected && status.peers.len() == 2,
        "{status:#?}"
    );
    cut(&overlay, "del");
    let took = wait_for("the lease is back", within(Duration::from_secs(3)), || {
        overlay.get(&key).is_some()
    });
    figure("lease that ran out claimed again after", took);
    for nth in 1..=3 {
        overlay.wait(nth, within(Duration::from_secs(3)), |status| {
            status.ready && status.peers.len() == 2
        });
    }
    assert_eq!(overlay.subnet(2), own);
    overlay.ping_all();
    // The watch, whose old connection outlives the cut, goes where requests go by now: one connection is left.
    oracle.check(&mut overlay, 1);

    cut(&overlay, "add");
    wait_for("the lease ends", READY, || overlay.get(&key).is_none());
    let stranger = r#"{"PublicIP":"192.0.2.66","PublicIPv6":null}"#;
    overlay.put(&key, stranger);
    cut(&overlay, "del");
    let env = overlay.file("2.env");
    let status = overlay.wait(2, READY, |status| {
        status.ready && status.node.subnets[0] != own.to_string()
    });
    let new = status.node.subnets[0].clone();
    figure("moved to", &new);
    let text = std::fs::read_to_string(&env).unwrap();
    let first = new.replace(".0/", ".1/");
    assert!(text.contains(&format!("FLANNEL_SUBNET={first}\n")), "{text}");
    assert_eq!(
        overlay.get(&key).unwrap().0,
        stranger,
        "the stranger was overwritten"
    );
    for nth in [1, 3] {
        overlay.wait(nth, within(Duration::from_secs(3)), |status| {
            status.peers.iter().any(|peer| peer.subnets[0] == new)
        });
    }
    // Before the node's pods get other addresses, for which the kernel makes routes.
    oracle.check(&mut overlay, 2);
    overlay.nodes[1].pods =
        kersey::lab::cluster::give_pod_addresses(overlay.namespace(2), std::slice::from_ref(&new)).unwrap();
    overlay.ping_all();
    let report = bystanders.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    assert_eq!(
        (1..=3).map(|nth| overlay.daemon(nth).pid()).collect::<Vec<_>>(),
        pids,
        "a daemon ended"
    );
}

/// B3 of the list of upstream bugs, as one meets it: every machine has 10.0.2.15.
#[test]
fn the_second_host_with_an_address_is_told_and_the_first_is_untouched() {
    if !require_etcd("the_second_host_with_an_address_is_told_and_the_first_is_untouched") {
        return;
    }
    let mut blueprint = Blueprint::new("twins", 3);
    blueprint.daemons = 2;
    let mut overlay = blueprint.start();
    let before = overlay.etcd(async |mut client| {
        let all = etcd_client::GetOptions::new().with_prefix();
        Ok(client
            .get(format!("{PREFIX}/subnets/"), Some(all))
            .await?
            .kvs()
            .len())
    });
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    // On one kernel only its name makes it another host.
    let kersey = overlay.command(3);
    let mut command = std::process::Command::new("unshare");
    command.args([
        "--uts",
        "sh",
        "-c",
        "echo twin >/proc/sys/kernel/hostname; exec \"$0\" \"$@\"",
    ]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    command.args(["--public-ip", "192.0.2.1"]);
    let mut twin = overlay.run("the twin", 3, command);
    let log = twin.log().to_owned();
    twin.wait(READY, || {
        let text = std::fs::read_to_string(&log).ok()?;
        text.contains("two nodes have the public address 192.0.2.1")
            .then_some(())
    })
    .unwrap();
    interrupt::sleep(Duration::from_secs(2)).unwrap();
    assert!(twin.is_running(), "it ended instead of waiting");
    let after = overlay.etcd(async |mut client| {
        let all = etcd_client::GetOptions::new().with_prefix();
        Ok(client
            .get(format!("{PREFIX}/subnets/"), Some(all))
            .await?
            .kvs()
            .len())
    });
    assert_eq!(before, after);
    oracle.check(&mut overlay, 1);
    let report = probe.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
    let lines = std::fs::read_to_string(&log).unwrap();
    assert!(
        lines.lines().filter(|line| line.contains("two nodes")).count() <= 2,
        "{lines}"
    );
}

/// F3: a daemon that is stopped while a thousand changes are made and compacted away.
#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn a_daemon_that_slept_through_a_thousand_changes_knows_them_all_two_seconds_later() {
    if !require_etcd("a_daemon_that_slept_through_a_thousand_changes_knows_them_all_two_seconds_later") {
        return;
    }
    let mut blueprint = Blueprint::new("slept", 2);
    blueprint.network =
        r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.200.0","Backend":{"Type":"udp"}}"#.to_owned();
    let mut overlay = blueprint.start();
    for batch in 0..2 {
        write(&overlay, batch * 50..batch * 50 + 50, 10, false);
    }
    overlay.wait(2, READY, |status| status.peers.len() == 101);
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    overlay.daemon(2).signal(Signal::SIGSTOP).unwrap();
    for round in 0..10 {
        for batch in 0..2 {
            // Changed in each round; every tenth goes and comes.
            write(&overlay, batch * 50..batch * 50 + 50, 100 + round, round % 2 == 1);
        }
    }
    delete(&overlay, 0..10);
    write(&overlay, 100..110, 7, false);
    overlay.etcd(async |mut client| {
        let revision = client.get("x", None).await?.header().unwrap().revision();
        client.compact(revision, None).await.map(drop)
    });
    let before = requests(&overlay);
    overlay.daemon(2).signal(Signal::SIGCONT).unwrap();
    let awake = Instant::now();
    let expected: BTreeMap<String, String> = (10..110)
        .map(|i| {
            let ip = if i < 100 { address(109, i) } else { address(7, i) };
            (format!("10.244.{i}.0/24"), format!("{ip}:8285"))
        })
        .collect();
    overlay.wait(2, within(Duration::from_secs(2)), |status| {
        let there: BTreeMap<_, _> = status
            .peers
            .iter()
            .filter(|peer| !peer.endpoints[0].starts_with("192.0.2.1:"))
            .map(|peer| (peer.subnets[0].clone(), peer.endpoints[0].clone()))
            .collect();
        there == expected
    });
    figure("a thousand changes made good after", awake.elapsed());
    interrupt::sleep(Duration::from_secs(5)).unwrap();
    let asked = requests(&overlay) - before;
    figure("requests for it, of both nodes", asked);
    assert!(asked <= 5, "{asked} lists and watches");
    oracle.check(&mut overlay, 1);
    drop(probe);
}

/// Node 2 hears nothing from the hub.
fn cut(overlay: &Overlay, verb: &str) {
    let mut command = std::process::Command::new("ip");
    command.args(["route", verb, "blackhole", "192.0.2.2"]);
    let ended = overlay.hub().spawn(&mut command).unwrap().wait().unwrap();
    assert!(ended.success());
}

fn address(high: usize, i: usize) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, u8::try_from(high).unwrap(), u8::try_from(i).unwrap())
}

fn key(i: usize) -> String {
    format!("{PREFIX}/subnets/10.244.{i}.0-24")
}

/// Writes leases as flannel does; first deletes every tenth if asked to.
fn write(overlay: &Overlay, range: std::ops::Range<usize>, high: usize, anew: bool) {
    if anew {
        let some = range
            .clone()
            .filter(|i| i % 10 == 3)
            .map(|i| TxnOp::delete(key(i), None));
        let some: Vec<_> = some.collect();
        overlay.etcd(async |mut client| client.txn(Txn::new().and_then(some)).await.map(drop));
    }
    overlay.etcd(async |mut client| {
        let lease = client.lease_grant(86_400, None).await?.id();
        let puts: Vec<_> = range
            .map(|i| {
                let value = format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, address(high, i));
                TxnOp::put(key(i), value, Some(PutOptions::new().with_lease(lease)))
            })
            .collect();
        client.txn(Txn::new().and_then(puts)).await.map(drop)
    });
}

fn delete(overlay: &Overlay, range: std::ops::Range<usize>) {
    let gone: Vec<_> = range.map(|i| TxnOp::delete(key(i), None)).collect();
    overlay.etcd(async |mut client| client.txn(Txn::new().and_then(gone)).await.map(drop));
}

/// How many lists and watches etcd was asked for so far.
fn requests(overlay: &Overlay) -> u64 {
    let text = overlay
        .hub()
        .run(|| {
            let mut stream = TcpStream::connect((HUB_V4, 2379))?;
            stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
        .unwrap();
    let counted = text.lines().filter(|line| {
        line.starts_with("grpc_server_started_total")
            && (line.contains("grpc_method=\"Range\"") || line.contains("grpc_method=\"Watch\""))
    });
    counted
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum::<f64>() as u64
}

/// F4: the member that serves node 1 is cut off from the other two. It answers pings, and knows nothing any more.
#[test]
#[expect(clippy::disallowed_methods, reason = "a test measures")]
fn a_member_cut_off_from_the_others_is_left_for_one_that_is_not() {
    if !require_etcd("a_member_cut_off_from_the_others_is_left_for_one_that_is_not") {
        return;
    }
    // Daemons on nodes 1 and 2, members on 3 to 5.
    let url = |nth: usize, port: u16| format!("http://192.0.2.{nth}:{port}");
    let endpoints: Vec<_> = (3..=5).map(|nth| url(nth, 2379)).collect();
    let mut blueprint = Blueprint::new("quorum", 5);
    blueprint.daemons = 2;
    blueprint.flags = vec!["--etcd-endpoints".to_owned(), endpoints.join(",")];
    let mut overlay = blueprint.build();
    let all: Vec<_> = (3..=5).map(|nth| format!("m{nth}={}", url(nth, 2380))).collect();
    let mut members = Vec::new();
    for nth in 3..=5 {
        let mut command = std::process::Command::new("etcd");
        command.args(["--name", &format!("m{nth}"), "--log-level", "error"]);
        command
            .arg("--data-dir")
            .arg(overlay.file(&format!("member-{nth}")));
        command.args([
            "--listen-client-urls",
            &url(nth, 2379),
            "--advertise-client-urls",
            &url(nth, 2379),
        ]);
        command.args([
            "--listen-peer-urls",
            &url(nth, 2380),
            "--initial-advertise-peer-urls",
            &url(nth, 2380),
        ]);
        command.args(["--initial-cluster", &all.join(",")]);
        members.push(overlay.run(&format!("etcd {nth}"), nth, command));
    }
    let put = |overlay: &Overlay, nth: usize, key: &str, value: String| {
        let (place, key) = (url(nth, 2379), format!("{PREFIX}/{key}"));
        let put = overlay.hub().run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                let put = async {
                    let mut client = crate::support::login::connect(place).await?;
                    client.put(key, value, None).await
                };
                Ok(tokio::time::timeout(Duration::from_secs(2), put).await??)
            })
        });
        put.is_ok()
    };
    let config = overlay.network();
    wait_for("the cluster", READY, || {
        put(&overlay, 3, "config", config.clone())
    });
    overlay.start_daemons();
    put(
        &overlay,
        3,
        "subnets/10.244.250.0-24",
        r#"{"PublicIP":"192.0.2.250"}"#.to_owned(),
    );
    for nth in 1..=2 {
        overlay.wait(nth, READY, |status| status.peers.len() == 2);
    }
    warm(&overlay, 1, 2);
    let serving = |overlay: &Overlay| -> Vec<usize> {
        let text = overlay
            .namespace(1)
            .run(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp")?))
            .unwrap();
        // The remote address as the kernel prints it: 192.0.2.N, port 2379, established.
        (3..=5)
            .filter(|nth| text.contains(&format!(" {nth:02X}0200C0:094B 01 ")))
            .collect()
    };
    wait_for("one member is left", READY, || serving(&overlay).len() == 1);
    let lonely = serving(&overlay)[0];
    let other = if lonely == 5 { 3 } else { lonely + 1 };
    overlay.other_etcd = Some(url(other, 2379));
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    // Both ways: what the others still told it would be news, too.
    for other in (3..=5).filter(|nth| *nth != lonely) {
        for (here, there) in [(lonely, other), (other, lonely)] {
            let mut command = std::process::Command::new("ip");
            command.args(["route", "add", "blackhole", &format!("192.0.2.{there}")]);
            let ended = overlay
                .namespace(here)
                .spawn(&mut command)
                .unwrap()
                .wait()
                .unwrap();
            assert!(ended.success());
        }
    }
    let cut = Instant::now();
    wait_for("the others go on", READY, || {
        put(
            &overlay,
            other,
            "subnets/10.244.251.0-24",
            r#"{"PublicIP":"192.0.2.251"}"#.to_owned(),
        )
    });
    for nth in 1..=2 {
        overlay.wait(nth, within(Duration::from_secs(20)), |status| {
            status.peers.len() == 3
        });
    }
    figure("a member without a quorum left after", cut.elapsed());
    assert!(
        cut.elapsed() <= within(Duration::from_secs(20)),
        "{:?}",
        cut.elapsed()
    );
    assert!(!serving(&overlay).contains(&lonely));
    oracle.check(&mut overlay, 1);
    assert_untouched(&probe.stop().unwrap());
}
