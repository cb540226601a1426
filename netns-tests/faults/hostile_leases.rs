//! B3: whoever may write to the store writes what does most harm.

use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;
use kersey::lab::daemon;
use kersey::status::Status;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, Overlay, PREFIX, READY, figure, wait_for, within};
use crate::{assert_untouched, flows, probe, require_etcd, warm};

/// What a daemon may take for the most leases there can be, KiB.
const MOST_KIB: u64 = 128 * 1024;

#[test]
fn b3_hostile_leases_touch_nobody() {
    if !require_etcd("b3_hostile_leases_touch_nobody") {
        return;
    }
    let mut blueprint = Blueprint::new("hostile", 2);
    blueprint.network = ClusterPlan::network("vxlan", false);
    let mut overlay = blueprint.start();
    warm(&overlay, 1, 2);
    let mut oracle = Oracle::start(&mut overlay);
    let probe = probe(&overlay, 1, 2);
    let rows = rows(&overlay);
    figure("hostile leases", rows.len());
    for (key, value) in &rows {
        let key = [format!("{PREFIX}/").as_bytes(), key.as_slice()].concat();
        let value = value.clone();
        overlay.etcd(async |mut client| client.put(key, value, None).await.map(drop));
    }
    // A good one comes last: once it is known, all before it were looked at.
    overlay.put(
        "subnets/10.244.200.0-24",
        vxlan("192.0.2.200", r#"{"VNI":1,"VtepMAC":"4a:5b:ac:d9:d3:09"}"#),
    );
    for nth in [1, 2] {
        let status = overlay.wait(nth, within(Duration::from_secs(2)), |status| {
            status
                .peers
                .iter()
                .any(|peer| peer.subnets == ["10.244.200.0/24"])
        });
        figure("refused", &status.rejected_leases);
        // Those that say something of a subnet of their own that cannot be used are listed without a way to them.
        for peer in &status.peers {
            let harmless = peer.subnets[0].starts_with("10.244.") && peer.subnets[0].ends_with("/24");
            assert!(harmless, "{peer:?}");
            let is_known = peer
                .endpoints
                .iter()
                .all(|endpoint| endpoint.starts_with("192.0.2."));
            assert!(is_known, "{peer:?}");
        }
        let (_, _, routes) = overlay.device(nth).unwrap();
        assert_eq!(routes.len(), 1, "{routes:?}");
    }
    flows(&probe);
    assert_untouched(&probe.stop().unwrap());
    // A thousand lines of log are an attack, too.
    assert!(overlay.log(1).lines().count() < 60, "{}", overlay.log(1));
    overlay.etcd(async |mut client| {
        let all = etcd_client::DeleteOptions::new().with_prefix();
        client
            .delete(format!("{PREFIX}/subnets-old/"), Some(all))
            .await
            .map(drop)
    });
    for (key, _) in &rows {
        let key = [format!("{PREFIX}/").as_bytes(), key.as_slice()].concat();
        overlay.etcd(async |mut client| client.delete(key, None).await.map(drop));
    }
    overlay.delete("subnets/10.244.200.0-24");
    oracle.check(&mut overlay, 2);
}

/// A lease of the vxlan backend.
fn vxlan(ip: &str, data: &str) -> String {
    format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{data}}}"#)
}

fn rows(overlay: &Overlay) -> Vec<(Vec<u8>, Vec<u8>)> {
    let good = r#"{"VNI":1,"VtepMAC":"4a:5b:ac:d9:d3:01"}"#;
    let at = |ip: &str| vxlan(ip, good).into_bytes();
    let mut rows: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    // Subnets: everything, half of it, wider than the network, the underlay, the default gateway, our own, within our own.
    let own = overlay.subnet(1);
    let parts = [
        "0.0.0.0-0".to_owned(),
        "128.0.0.0-1".to_owned(),
        "10.0.0.0-8".to_owned(),
        "10.244.0.0-15".to_owned(),
        "10.244.0.0-16".to_owned(),
        "192.0.2.0-24".to_owned(),
        "192.0.2.254-32".to_owned(),
        format!("{}-25", own.addr()),
        format!("{}-32", own.addr()),
        "127.0.0.0-8".to_owned(),
        "224.0.0.0-4".to_owned(),
        "10.244.77.1-24".to_owned(),
        "10.244.77.0-33".to_owned(),
        "10.244.77.0--1".to_owned(),
        "10.244.077.0-24".to_owned(),
        "10.244.77.0-24-24".to_owned(),
        "10.244.77.0-24&fd00::-64&x".to_owned(),
        "../config".to_owned(),
        "/../10.244.77.0-24".to_owned(),
        "10.244.77.0-24/../../config".to_owned(),
        "10.244.77.0-24\n10.244.78.0-24".to_owned(),
        "10.244.77.0-24\0".to_owned(),
        "$(reboot)-24".to_owned(),
        "`reboot`".to_owned(),
        "10.244.77.0-24;reboot".to_owned(),
        String::new(),
    ];
    rows.extend(parts.map(|part| (format!("subnets/{part}").into_bytes(), at("192.0.2.9"))));
    // What flannel's unanchored pattern takes.
    for key in [
        "subnets-old/10.244.79.0-24",
        "subnets2/10.244.79.0-24",
        "x/subnets/10.244.79.0-24",
    ] {
        rows.push((key.into(), at("192.0.2.9")));
    }
    rows.push((b"subnets/10.244.77.\xff-24".to_vec(), at("192.0.2.9")));
    // Public addresses.
    let addrs = [
        "0.0.0.0",
        "127.0.0.1",
        "224.0.0.5",
        "255.255.255.255",
        "192.0.2.1",
        "10.244.1.1",
        "::1",
        "",
        "nonsense",
        "192.0.2.9; reboot",
        "999.1.1.1",
    ];
    for (low, addr) in (201..).zip(addrs) {
        rows.push((format!("subnets/10.244.{low}.0-24").into_bytes(), at(addr)));
    }
    // Backend data.
    let huge = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, "a".repeat(1 << 20));
    let data = [
        r#"{"VNI":1,"VtepMAC":"00:00:00:00:00:00"}"#,
        r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#,
        r#"{"VNI":1,"VtepMAC":"01:00:5e:00:00:01"}"#,
        r#"{"VNI":77,"VtepMAC":"4a:5b:ac:d9:d3:01"}"#,
        r#"{"VNI":-1,"VtepMAC":"4a:5b:ac:d9:d3:01"}"#,
        r#"{"VNI":1e99,"VtepMAC":"$(reboot)"}"#,
        r#"[]"#,
        r#"null"#,
        r#""x""#,
        &huge,
    ];
    for (low, data) in (120..).zip(data) {
        rows.push((
            format!("subnets/10.244.{low}.0-24").into_bytes(),
            vxlan("192.0.2.9", data).into_bytes(),
        ));
    }
    // Values.
    let deep = "[".repeat(10_000);
    let values: [&[u8]; 7] = [
        b"",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"{\"PublicIP\":\"192.0.2.9\",\"PublicIP\":\"192.0.2.8\"}",
        b"{\"PublicIP\":12}",
        deep.as_bytes(),
    ];
    for (low, value) in (140..).zip(values) {
        rows.push((format!("subnets/10.244.{low}.0-24").into_bytes(), value.to_vec()));
    }
    rows
}

#[test]
#[ignore = "writes more leases than a node takes"]
fn soak_b3_a_hundred_thousand_leases_fit_and_no_more_are_taken() {
    if !require_etcd("soak_b3_a_hundred_thousand_leases_fit_and_no_more_are_taken") {
        return;
    }
    for status in crowd("crowd", 100_500, |_| MOST_KIB) {
        assert!(
            status.rejected_leases["table_full"] >= 500,
            "{:?}",
            status.rejected_leases
        );
    }
}

#[test]
fn b3_a_lease_takes_less_than_a_kilobyte() {
    if !require_etcd("b3_a_lease_takes_less_than_a_kilobyte") {
        return;
    }
    let leases = 20_000;
    crowd("share", leases, |before| before + u64::from(leases));
}

/// Has two nodes follow so many leases: one sees them come, the other comes to them anew. Neither may take more than `most_kib` makes of
/// what it took before, not even when it has told of them all.
fn crowd(name: &str, leases: u32, most_kib: impl Fn(u64) -> u64) -> [Status; 2] {
    // Enough subnets: a /8 cut into pieces of 32 addresses.
    let mut blueprint = Blueprint::new(name, 2);
    blueprint.network = r#"{"Network":"10.0.0.0/8","SubnetLen":27,"Backend":{"Type":"udp"}}"#.to_owned();
    let mut overlay = blueprint.start();
    let probe = probe(&overlay, 1, 2);
    let before = memory_kib(overlay.daemon(1).pid());
    overlay.terminate(2);
    let put = |nth: u32| {
        let subnet = std::net::Ipv4Addr::from_bits(0x0a80_0000 + nth * 32);
        let node = std::net::Ipv4Addr::from_bits(0xc633_0000 + nth % 60_000);
        let key = format!("{PREFIX}/subnets/{subnet}-27");
        etcd_client::TxnOp::put(key, format!(r#"{{"PublicIP":"{node}","PublicIPv6":null}}"#), None)
    };
    let all: Vec<u32> = (0..leases).collect();
    for some in all.chunks(1000) {
        overlay.etcd(async |mut client| {
            for few in some.chunks(100) {
                let puts: Vec<_> = few.iter().map(|&nth| put(nth)).collect();
                client.txn(etcd_client::Txn::new().and_then(puts)).await?;
            }
            Ok(())
        });
    }
    // Some are the nodes' own, or more than are taken.
    let most = leases as usize / 100 * 99;
    overlay.restart(2);
    let statuses = [2, 1].map(|nth| {
        // Now and then, for the whole status is long; the log tells of the first changes of many alone.
        wait_for("the leases are peers", READY * 3, || {
            std::thread::sleep(Duration::from_secs(1));
            let status = daemon::status(&overlay.socket(nth)).ok().flatten();
            status.is_some_and(|status| status.peers.len() >= most)
        });
        let pid = overlay.daemon(nth).pid();
        let followed = memory_kib(pid);
        let status = overlay.status(nth);
        // The file with what is known is written 2 s after the last change.
        std::thread::sleep(Duration::from_secs(3));
        let told = memory_kib(pid);
        figure(
            &format!("node {nth}: peers, refused, memory KiB, when all was told and written, before"),
            (
                status.peers.len(),
                &status.rejected_leases,
                followed,
                told,
                before,
            ),
        );
        assert!(status.ready && status.peers.len() >= most);
        assert!(
            followed.max(told) <= most_kib(before),
            "{followed} KiB, then {told}"
        );
        status
    });
    flows(&probe);
    let report = probe.stop().unwrap();
    assert_eq!((report.duplicates(), report.corrupted()), (0, 0));
    statuses
}

fn memory_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
