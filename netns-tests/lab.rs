//! The lab itself: namespaces, links and traffic over a plain wire, and that nothing stays behind.
//!
//! ```text
//!   node 1 eth0 192.0.2.1 --- br0 in the hub --- 192.0.2.2 eth0 node 2
//! ```

mod support;

use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kersey::addr::Mtu;
use kersey::host::ethtool::Switch;
use kersey::lab::contestant::{self, Contestant};
use kersey::lab::interrupt::wait_until;
use kersey::lab::netns::Namespace;
use kersey::lab::topology::{HUB_V4, Plan, Wiring};
use kersey::lab::traffic::End;
use kersey::lab::traffic::latency;
use kersey::lab::traffic::ping::Ping;
use kersey::lab::traffic::probe::Probe;
use kersey::lab::traffic::tcp::{Bulk, Verified};
use kersey::lab::traffic::udp::Flood;
use support::require_root;

#[test]
fn nodes_and_hub_reach_one_another_in_both_families() {
    if !require_root("nodes_and_hub_reach_one_another_in_both_families") {
        return;
    }
    let lab = Plan::private("reach", 3).build().unwrap();
    for from in &lab.nodes {
        for to in &lab.nodes {
            for (from_addr, to_addr) in [
                (from.v4.into(), to.v4.into()),
                (from.v6.into(), IpAddr::from(to.v6)),
            ] {
                let report = Ping::default()
                    .run(End::new(&from.namespace, from_addr), to_addr)
                    .unwrap();
                assert!(report.all(), "{from_addr} to {to_addr}: {report:?}");
            }
        }
        let report = Ping::default().run(from.underlay(), HUB_V4.into()).unwrap();
        assert!(report.all(), "hub: {report:?}");
    }
}

#[test]
fn nobody_answers_for_an_address_that_is_not_there() {
    if !require_root("nobody_answers_for_an_address_that_is_not_there") {
        return;
    }
    let lab = Plan::private("nobody", 1).build().unwrap();
    let ping = Ping {
        count: 1,
        ..Ping::default()
    };
    let report = ping
        .run(lab.nodes[0].underlay(), "192.0.2.99".parse().unwrap())
        .unwrap();
    assert_eq!((report.sent, report.received), (1, 0));
}

#[test]
fn a_transfer_arrives_unchanged_with_offloads_on_and_off() {
    if !require_root("a_transfer_arrives_unchanged_with_offloads_on_and_off") {
        return;
    }
    for offloads in [Switch::On, Switch::Off] {
        let mut plan = Plan::private("verified", 2);
        plan.wiring = Wiring::Pair;
        plan.offloads = offloads;
        let lab = plan.build().unwrap();
        let transfer = Verified {
            bytes: (8 << 20) + 5,
            seed: 7,
            patience: Duration::from_secs(5),
        };
        let report = transfer
            .run(lab.nodes[0].underlay(), lab.nodes[1].underlay())
            .unwrap();
        assert!(report.intact, "offloads {offloads:?}: {report:?}");
        assert_eq!(report.bytes, transfer.bytes);
    }
}

#[test]
fn the_kernels_vxlan_carries_what_flannel_would_send_over_it() {
    if !require_root("the_kernels_vxlan_carries_what_flannel_would_send_over_it") {
        return;
    }
    let mut plan = Plan::private("vxlan", 2);
    plan.wiring = Wiring::Pair;
    let lab = plan.build().unwrap();
    contestant::add_kernel_vxlan(&lab).unwrap();
    let running = contestant::start(Contestant::KernelVxlan, &lab, Path::new("/nonexistent"), &[]).unwrap();
    let (one, two) = running.ends(&lab).unwrap();
    let sizes = [56, 1450 - 28, 4000];
    for data_bytes in sizes {
        let ping = Ping {
            data_bytes,
            ..Ping::default()
        };
        let report = ping.run(one, two.addr).unwrap();
        assert!(report.all(), "{data_bytes} bytes: {report:?}");
    }
    let transfer = Verified {
        bytes: 4 << 20,
        seed: 3,
        patience: Duration::from_secs(5),
    };
    assert!(transfer.run(two, one).unwrap().intact);
}

#[test]
fn every_measurement_measures() {
    if !require_root("every_measurement_measures") {
        return;
    }
    let mut plan = Plan::private("measure", 2);
    plan.mtu = Mtu::new(1400).unwrap();
    let lab = plan.build().unwrap();
    let (one, two) = (lab.nodes[0].underlay(), lab.nodes[1].underlay());
    let duration = Duration::from_millis(300);

    let bulk = Bulk {
        streams: 2,
        warmup: Duration::ZERO,
        duration,
        congestion: Some("cubic".into()),
    };
    let report = bulk.run(one, two).unwrap();
    assert!(
        report.bytes > 1 << 20 && report.stream_bytes.len() == 2,
        "{report:?}"
    );

    let flood = Flood {
        payload_bytes: 512,
        rate: Some(2000),
        duration,
    };
    let report = flood.run(one, two).unwrap();
    assert!((550..=650).contains(&report.counts.sent), "{report:?}");
    assert_eq!((report.counts.lost, report.counts.corrupted), (0, 0));

    let report = latency::measure(one, two, duration).unwrap();
    assert!(
        report.answered > 100 && report.p50_us <= report.p99_us,
        "{report:?}"
    );
}

#[test]
fn a_probe_sees_an_outage() {
    if !require_root("a_probe_sees_an_outage") {
        return;
    }
    let lab = Plan::private("probe", 2).build().unwrap();
    let probe = Probe::start(lab.nodes[0].underlay(), lab.nodes[1].underlay()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let hub = lab.hub.as_ref().unwrap();
    hub.netlink(async |netlink| Ok(netlink.set_down(netlink.link("p2").await?.index).await?))
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    hub.netlink(async |netlink| Ok(netlink.set_up(netlink.link("p2").await?.index).await?))
        .unwrap();
    let before = probe.received();
    assert!(wait_until(Duration::from_secs(5), || probe.received().0 >= before.0 + 100));
    let report = probe.stop().unwrap();

    assert!(report.longest_gap() >= Duration::from_millis(290), "{report:?}");
    assert!(report.longest_gap() < Duration::from_millis(2000), "{report:?}");
    assert!(report.lost() > 0 && report.corrupted() == 0, "{report:?}");
}

#[test]
fn a_process_lives_where_it_was_started() {
    if !require_root("a_process_lives_where_it_was_started") {
        return;
    }
    let lab = Plan::private("process", 1).build().unwrap();
    let mut command = Command::new("cat");
    command
        .arg("/proc/self/net/dev")
        .stdout(std::process::Stdio::piped());
    let output = lab.nodes[0]
        .namespace
        .spawn(&mut command)
        .unwrap()
        .wait_with_output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let names: Vec<_> = text
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next())
        .map(str::trim)
        .collect();
    assert_eq!(names, ["lo", "eth0"]);
}

#[test]
fn nothing_is_left_behind_even_if_building_fails() {
    if !require_root("nothing_is_left_behind_even_if_building_fails") {
        return;
    }
    let plan = Plan::private("gone", 2);
    let lab = plan.build().unwrap();
    assert_eq!(Namespace::names(&plan.prefix).unwrap().len(), 3);
    drop(lab);
    assert_eq!(Namespace::names(&plan.prefix).unwrap(), Vec::<String>::new());

    let _taken = Namespace::create(&format!("{}-2", plan.prefix)).unwrap();
    plan.build().unwrap_err();
    assert_eq!(
        Namespace::names(&plan.prefix).unwrap(),
        [format!("{}-2", plan.prefix)]
    );
}
