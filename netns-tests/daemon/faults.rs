//! A device that is taken away, a machine that lacks something, a config that is wrong.

use std::fs;
use std::process::Command;
use std::time::Duration;

use kersey::lab::daemon::Child;
use kersey::lab::traffic::probe::{Probe, ProbeReport};
use nix::sys::signal::Signal;

use crate::overlay::{Blueprint, DEVICE, Overlay, READY, figure, wait_for, within};
use crate::support::{require_etcd, require_root};

#[test]
fn a_deleted_device_comes_back() {
    if !require_root("a_deleted_device_comes_back") {
        return;
    }
    let mut overlay = Blueprint::embedded("deleted", 2).start();
    for _ in 0..3 {
        let old = overlay.device(2).unwrap().0.index;
        let report = under_traffic(&mut overlay, |overlay| {
            overlay
                .namespace(2)
                .netlink(async |netlink| Ok(netlink.delete_link(netlink.link(DEVICE).await?.index).await?))
                .unwrap();
        });
        assert_ne!(overlay.device(2).unwrap().0.index, old);
        figure(
            "device deleted: lost, longest gap",
            (report.lost(), report.longest_gap()),
        );
        assert!(
            report.longest_gap() <= within(Duration::from_secs(2)),
            "{report:?}"
        );
    }
    assert_restored(&overlay, 2);
}

#[test]
fn a_device_set_down_comes_up_with_its_routes() {
    if !require_root("a_device_set_down_comes_up_with_its_routes") {
        return;
    }
    let mut overlay = Blueprint::embedded("down", 2).start();
    let report = under_traffic(&mut overlay, |overlay| {
        overlay
            .namespace(2)
            .netlink(async |netlink| Ok(netlink.set_down(netlink.link(DEVICE).await?.index).await?))
            .unwrap();
    });
    figure("device set down: longest gap", report.longest_gap());
    assert!(
        report.longest_gap() <= within(Duration::from_secs(2)),
        "{report:?}"
    );
    assert_restored(&overlay, 2);

    let report = under_traffic(&mut overlay, |overlay| {
        overlay
            .namespace(2)
            .netlink(async |netlink| {
                let index = netlink.link(DEVICE).await?.index;
                netlink.set_down(index).await?;
                Ok(netlink.set_up(index).await?)
            })
            .unwrap();
    });
    figure("device set down and up: longest gap", report.longest_gap());
    assert!(
        report.longest_gap() <= within(Duration::from_secs(2)),
        "{report:?}"
    );
    assert_restored(&overlay, 2);
}

#[test]
fn a_route_deleted_by_hand_comes_back() {
    if !require_root("a_route_deleted_by_hand_comes_back") {
        return;
    }
    let mut overlay = Blueprint::embedded("route", 2).start();
    let report = under_traffic(&mut overlay, |overlay| {
        overlay
            .namespace(2)
            .netlink(async |netlink| {
                let routes = netlink.own_routes().await?;
                Ok(netlink
                    .delete_route(routes.first().expect("the overlay's route"))
                    .await?)
            })
            .unwrap();
    });
    figure("route deleted: longest gap", report.longest_gap());
    assert!(
        report.longest_gap() <= within(Duration::from_secs(1)),
        "{report:?}"
    );
    assert_restored(&overlay, 2);
}

#[test]
fn address_and_mtu_changed_by_hand_are_put_right() {
    if !require_root("address_and_mtu_changed_by_hand_are_put_right") {
        return;
    }
    let overlay = Blueprint::embedded("byhand", 2).start();
    let own = overlay.device(2).unwrap().1[0];
    overlay
        .namespace(2)
        .netlink(async |netlink| {
            netlink.set_mtu(own.index, 1400).await?;
            Ok(netlink
                .delete_address(own.index, own.addr, own.prefix_len)
                .await?)
        })
        .unwrap();
    assert_restored(&overlay, 2);
    overlay.ping_all();
}

#[test]
fn a_second_daemon_refuses_and_leaves_the_first_alone() {
    if !require_root("a_second_daemon_refuses_and_leaves_the_first_alone") {
        return;
    }
    let mut overlay = Blueprint::embedded("second", 2).start();
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();

    let same = overlay.command(2);
    let mut same = overlay.run("same socket", 2, same);
    let ended = same.wait_end(Duration::from_secs(5)).unwrap();
    assert_eq!(ended.code(), Some(7), "{}", same.log_end());
    assert!(
        same.log_end().contains("another daemon is running") && same.log_end().contains("2.sock"),
        "{}",
        same.log_end()
    );

    // Another socket, but the device is taken: it waits for it, and says so once.
    let mut other = overlay.command(2);
    for (flag, name) in [
        ("--status-socket", "x.sock"),
        ("--subnet-file", "x.env"),
        ("--data-dir", "x.data"),
    ] {
        other.arg(flag).arg(overlay.file(name));
    }
    let mut other = overlay.run("same device", 2, other);
    wait_for_line(&mut other, "data plane");
    kersey::lab::interrupt::sleep(Duration::from_millis(2500)).unwrap();
    let complaints: Vec<_> = log(&other)
        .lines()
        .filter(|line| line.contains("cannot bring the data plane up"))
        .map(str::to_owned)
        .collect();
    assert_eq!(complaints.len(), 1, "{}", other.log_end());
    assert!(complaints[0].contains(DEVICE), "{complaints:?}");
    assert!(!overlay.file("x.env").exists());
    let status = kersey::lab::daemon::status(&overlay.file("x.sock"))
        .unwrap()
        .unwrap();
    let problem = status.problem.unwrap_or_default();
    assert!(
        problem.starts_with("the data plane cannot be brought up: ") && problem.contains(DEVICE),
        "{problem}"
    );
    other.stop().unwrap();

    assert_restored(&overlay, 2);
    let report = probe.stop().unwrap();
    assert_eq!((report.lost(), report.corrupted()), (0, 0), "{report:?}");
}

#[test]
fn without_the_tun_device_it_ends_with_a_hint() {
    if require_root("without_the_tun_device_it_ends_with_a_hint") {
        end_without_tun("missing", "mount -t tmpfs none /dev/net");
    }
}

#[test]
fn without_the_tun_driver_it_ends_with_a_hint() {
    if require_root("without_the_tun_driver_it_ends_with_a_hint") {
        end_without_tun("in_name_only", "mount --bind /dev/null /dev/net/tun");
    }
}

fn end_without_tun(name: &str, prepare: &str) {
    let mut overlay = Blueprint::embedded(name, 1).build();
    let kersey = overlay.command(1);
    // A mount namespace of its own: nobody else misses the device.
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{prepare}; exec \"$@\""), "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let mut child = overlay.run(name, 1, command);
    let ended = child.wait_end(Duration::from_secs(3)).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", child.log_end());
    assert!(
        child.log_end().contains("kersey needs /dev/net/tun"),
        "{}",
        child.log_end()
    );
}

#[test]
fn without_the_capability_it_ends_with_a_hint() {
    if !require_root("without_the_capability_it_ends_with_a_hint") {
        return;
    }
    let mut overlay = Blueprint::embedded("capability", 1).build();
    let kersey = overlay.command(1);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let mut child = overlay.run("capability", 1, command);
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", child.log_end());
    assert!(child.log_end().contains("CAP_NET_ADMIN"), "{}", child.log_end());
}

#[test]
fn a_wrong_config_is_waited_out_with_one_line_that_names_the_field() {
    if !require_etcd("a_wrong_config_is_waited_out_with_one_line_that_names_the_field") {
        return;
    }
    let mut blueprint = Blueprint::new("config", 1);
    blueprint.network = r#"{"Network":"10.244.0.0/16","SubnetLen":31}"#.to_owned();
    let mut overlay = blueprint.build();
    let command = overlay.command(1);
    let mut child = overlay.run("node 1", 1, command);
    wait_for_line(&mut child, "SubnetLen");
    kersey::lab::interrupt::sleep(Duration::from_millis(2500)).unwrap();
    let lines = log(&child);
    let lines: Vec<_> = lines.lines().filter(|line| line.contains("SubnetLen")).collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(child.is_running());
    let problem = overlay.status(1).problem.unwrap_or_default();
    assert!(
        problem.starts_with("waiting for a usable network config: "),
        "{problem}"
    );
    assert!(problem.contains("SubnetLen"), "{problem}");

    overlay.put("config", r#"{"Network":"10.244.0.0/16"}"#);
    wait_for_line(&mut child, "data plane up");
    wait_for("it is ready", READY, || overlay.status(1).ready);
    assert_eq!(overlay.status(1).problem, None);
    child.signal(Signal::SIGTERM).unwrap();
    assert_eq!(child.wait_end(Duration::from_secs(3)).unwrap().code(), Some(0));
}

#[test]
fn a_backend_nobody_knows_ends_the_daemon() {
    if !require_etcd("a_backend_nobody_knows_ends_the_daemon") {
        return;
    }
    let mut blueprint = Blueprint::new("backend", 1);
    blueprint.network = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"carrier-pigeon"}}"#.to_owned();
    let mut overlay = blueprint.build();
    let command = overlay.command(1);
    let mut child = overlay.run("node 1", 1, command);
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    assert_eq!(ended.code(), Some(4), "{}", child.log_end());
    assert!(child.log_end().contains("carrier-pigeon"), "{}", child.log_end());
}

/// Causes a fault while the probe runs, and waits until packets flow both ways again.
fn under_traffic(overlay: &mut Overlay, fault: impl FnOnce(&Overlay)) -> ProbeReport {
    let pid = overlay.daemon(2).pid();
    let probe = Probe::start(overlay.pod(1), overlay.pod(2)).unwrap();
    wait_for("the probe runs", READY, || probe.received().0 > 100);
    fault(overlay);
    let before = probe.received();
    wait_for("traffic flows again", READY, || {
        let (there, back) = probe.received();
        there > before.0 + 500 && back > before.1 + 500
    });
    let report = probe.stop().unwrap();
    assert_eq!(report.corrupted(), 0, "{report:?}");
    assert_eq!(overlay.daemon(2).pid(), pid);
    assert!(overlay.daemon(2).is_running());
    report
}

/// Waits until the device is up, with its address, MTU and route.
fn assert_restored(overlay: &Overlay, nth: usize) {
    let (subnet, mtu) = (overlay.subnet(nth), overlay.status(nth).node.inner_mtu);
    wait_for("the device is as it was", within(Duration::from_secs(2)), || {
        overlay.device(nth).is_some_and(|(link, addresses, routes)| {
            let held = addresses.iter().map(|held| (held.addr, held.prefix_len));
            link.mtu_bytes == u32::from(mtu)
                && held.eq([(subnet.addr().into(), 32)])
                && routes.len() == 1
                && routes[0].index == link.index
        })
    });
}

/// Waits until the process has written `text`.
fn wait_for_line(child: &mut Child, text: &str) {
    let path = child.log().to_owned();
    let written = || fs::read_to_string(&path).ok()?.contains(text).then_some(());
    child
        .wait(READY, written)
        .unwrap_or_else(|error| panic!("no line with {text:?}: {error:#}"));
}

fn log(child: &Child) -> String {
    fs::read_to_string(child.log()).unwrap()
}

/// Hosts have IPv6 off for devices to come (`net.ipv6.conf.default.disable_ipv6` = 1), and may not let it be turned on.
#[test]
fn where_ipv6_is_off_by_default_it_is_turned_on_or_done_without() {
    if !require_root("where_ipv6_is_off_by_default_it_is_turned_on_or_done_without") {
        return;
    }
    let mut blueprint = Blueprint::embedded("sixoff", 2);
    blueprint.network = kersey::lab::cluster::ClusterPlan::network("udp", true);
    let mut overlay = blueprint.build();
    for nth in 1..=2 {
        overlay
            .namespace(nth)
            .sysctl("ipv6/conf/default/disable_ipv6", "1")
            .unwrap();
    }
    overlay.start_daemons();
    overlay.ping_all();
    assert_eq!(overlay.pods(2).len(), 2, "both families");
    assert_eq!(overlay.device(2).unwrap().1.len(), 2, "an address of each");

    // As in a container: nobody may write there.
    overlay.terminate(2);
    let inner = overlay.command(2);
    let mut command = Command::new("unshare");
    let prepare = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys";
    command.args(["--mount", "sh", "-ec", &format!("{prepare}; exec \"$@\""), "sh"]);
    command.arg(inner.get_program()).args(inner.get_args());
    overlay.nodes[1].child = overlay.run("node 2", 2, command);
    overlay.wait(2, READY, |status| status.ready && status.peers.len() == 1);
    let told = "it carries IPv4 alone";
    assert_eq!(overlay.log(2).matches(told).count(), 1, "{}", overlay.log(2));
    assert_eq!(overlay.device(2).unwrap().1.len(), 1);
    let (one, two) = (overlay.pod(1), overlay.pod(2));
    let report = kersey::lab::traffic::ping::Ping::default()
        .run(one, two.addr)
        .unwrap();
    assert!(report.received > 0, "{report:?}");
    // It is put right again as ever, and that comes to an end.
    crate::routed::ip(&overlay, 2, &format!("address flush dev {}", DEVICE));
    wait_for("the address is back", READY, || {
        overlay.device(2).is_some_and(|device| device.1.len() == 1)
    });
    std::thread::sleep(Duration::from_secs(1));
    assert!(overlay.log(2).matches(told).count() <= 3, "{}", overlay.log(2));
}
