//! What others left on a host, and who takes it away.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kersey::host::netlink::Vxlan;
use kersey::lab::topology::INTERFACE;

use crate::overlay::{Blueprint, Overlay, READY, wait_for};
use crate::routed::ip;
use crate::support::nobody::by_nobody;
use crate::support::require_root;

#[test]
fn what_was_left_behind_is_listed_and_removed() {
    if !require_root("what_was_left_behind_is_listed_and_removed") {
        return;
    }
    let mut overlay = Blueprint::embedded("left", 1).build();
    add_vxlan(&overlay, 1, "flannel.1", 1, 8472);
    add_vxlan(&overlay, 1, "flannel-v6.77", 77, 8473);
    // Not by its VNI, so not flannel's; and somebody else's.
    add_vxlan(&overlay, 1, "flannel.9", 8, 8474);
    add_vxlan(&overlay, 1, "tenant", 5, 4789);
    ip(&overlay, 1, "route add 10.244.2.0/24 via 192.0.2.2 proto 75");
    ip(&overlay, 1, "route add 10.244.3.0/24 via 192.0.2.3");
    let socket = overlay.socket(1);
    drop(UnixListener::bind(&socket).unwrap());
    let lines = [
        "vxlan device flannel.1 (VNI 1, UDP port 8472)".to_owned(),
        "vxlan device flannel-v6.77 (VNI 77, UDP port 8473)".to_owned(),
        "route 10.244.2.0/24 via 192.0.2.2 dev eth0".to_owned(),
        format!("status socket {}", socket.display()),
    ];
    let listed = |verb: &str| -> String { lines.iter().map(|line| format!("{verb} {line}\n")).collect() };

    assert_eq!(
        cleanup(&mut overlay, &socket, &["--dry-run"]),
        (Some(0), listed("would remove"))
    );
    assert_eq!(
        links(&overlay),
        ["flannel-v6.77", "flannel.1", "flannel.9", "tenant"]
    );
    assert!(socket.exists());

    assert_eq!(cleanup(&mut overlay, &socket, &[]), (Some(0), listed("removed")));
    assert_eq!(links(&overlay), ["flannel.9", "tenant"]);
    assert!(!socket.exists());
    let left = overlay
        .namespace(1)
        .netlink(async |netlink| Ok(netlink.routes().await?))
        .unwrap();
    let to = |text: &str| {
        let destinations = left.iter().map(|held| held.route.destination.to_string());
        destinations.filter(|destination| destination == text).count()
    };
    assert_eq!((to("10.244.2.0/24"), to("10.244.3.0/24")), (0, 1));
    assert!(to("0.0.0.0/0") == 1, "a default route is nobody's leftover");

    assert_eq!(
        cleanup(&mut overlay, &socket, &[]),
        (Some(0), "nothing to clean up\n".to_owned())
    );
}

/// Who may not even look is not told that there is nothing.
#[test]
fn without_rights_it_does_not_say_that_nothing_is_left() {
    if !require_root("without_rights_it_does_not_say_that_nothing_is_left") {
        return;
    }
    let mut overlay = Blueprint::embedded("nolook", 1).build();
    let mut kersey = Command::new(env!("CARGO_BIN_EXE_kersey"));
    kersey.args([
        "cleanup",
        "--dry-run",
        "--data-dir=/nowhere",
        "--status-socket=/nowhere/status.sock",
    ]);
    let mut child = overlay.run("cleanup", 1, by_nobody(&kersey, "-all"));
    let ended = child.wait_end(READY).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", child.log_end());
    let said = child.log_end();
    assert!(
        said.contains("cannot look for firewall rules: this takes CAP_NET_ADMIN"),
        "{said}"
    );
    assert!(!said.contains("nothing"), "{said}");
}

#[test]
fn nothing_is_removed_while_a_daemon_runs() {
    if !require_root("nothing_is_removed_while_a_daemon_runs") {
        return;
    }
    let mut overlay = Blueprint::embedded("runs", 1).start();
    add_vxlan(&overlay, 1, "flannel.1", 1, 8472);
    let before = overlay.device(1).unwrap();
    let socket = overlay.socket(1);
    for flags in [&["--dry-run"][..], &[]] {
        let (code, said) = cleanup(&mut overlay, &socket, flags);
        assert_eq!(code, Some(1), "{said}");
        assert!(
            said.contains("a daemon is running") && said.contains("1.sock"),
            "{said}"
        );
    }
    assert_eq!(links(&overlay), ["flannel.1"]);
    assert_eq!(overlay.device(1).unwrap().2, before.2);
    overlay.wait(1, READY, |status| status.ready);
}

#[test]
fn cleaning_up_takes_the_capability() {
    if !require_root("cleaning_up_takes_the_capability") {
        return;
    }
    let mut overlay = Blueprint::embedded("nocap", 1).build();
    add_vxlan(&overlay, 1, "flannel.1", 1, 8472);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]);
    command.arg(env!("CARGO_BIN_EXE_kersey")).arg("cleanup");
    command.arg("--status-socket").arg(overlay.socket(1));
    let mut child = overlay.run("cleanup", 1, command);
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    assert_eq!(ended.code(), Some(3), "{}", child.log_end());
    assert!(
        child.log_end().contains("flannel.1") && child.log_end().contains("CAP_NET_ADMIN"),
        "{}",
        child.log_end()
    );
    assert_eq!(links(&overlay), ["flannel.1"]);
}

#[test]
fn a_device_that_has_the_port_is_named_and_waited_for() {
    if !require_root("a_device_that_has_the_port_is_named_and_waited_for") {
        return;
    }
    let mut blueprint = Blueprint::embedded("port", 1);
    blueprint.network = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":8472}}"#.to_owned();
    let mut overlay = blueprint.build();
    // One on another port, and one that is down and so has none.
    add_vxlan(&overlay, 1, "flannel.3", 3, 8473);
    add_vxlan(&overlay, 1, "flannel.2", 2, 8472);
    ip(&overlay, 1, "link set flannel.3 up");
    add_vxlan(&overlay, 1, "flannel.1", 1, 8472);
    ip(&overlay, 1, "link set flannel.1 up");
    let command = overlay.command(1);
    let mut child = overlay.run("node 1", 1, command);
    let log = child.log().to_owned();
    let logged = |text: &str| std::fs::read_to_string(&log).unwrap_or_default().contains(text);
    wait_for("it says who has the port", READY, || logged("flannel.1"));
    assert!(
        logged("VNI 1") && logged("`kersey cleanup`") && logged("192.0.2.1:8472"),
        "{}",
        child.log_end()
    );
    assert!(
        !logged("flannel.2") && !logged("flannel.3"),
        "{}",
        child.log_end()
    );
    assert!(child.is_running());
    ip(&overlay, 1, "link del flannel.1");
    wait_for("it comes up", READY, || logged("data plane up"));
    child.stop().unwrap();
}

fn add_vxlan(overlay: &Overlay, nth: usize, name: &str, vni: u32, port: u16) {
    let local = overlay.lab.nodes[nth - 1].v4.into();
    overlay
        .namespace(nth)
        .netlink(async |netlink| {
            let underlay_index = netlink.link(INTERFACE).await?.index;
            let vxlan = Vxlan {
                name,
                vni,
                underlay_index,
                local,
                port,
                mtu_bytes: 1450,
            };
            netlink.add_vxlan(&vxlan).await?;
            let devices = netlink.vxlan_devices().await?;
            let device = devices
                .iter()
                .find(|device| device.link.name == name)
                .expect("the device");
            assert_eq!((device.vni, device.port), (vni, port));
            assert_eq!(
                (device.underlay_index, device.local),
                (Some(underlay_index), Some(local))
            );
            Ok(())
        })
        .unwrap();
}

/// The names of node 1's vxlan devices, in order.
fn links(overlay: &Overlay) -> Vec<String> {
    let devices = overlay
        .namespace(1)
        .netlink(async |netlink| Ok(netlink.vxlan_devices().await?))
        .unwrap();
    let mut names: Vec<_> = devices.into_iter().map(|device| device.link.name).collect();
    names.sort();
    names
}

/// Runs `kersey cleanup` on node 1: its exit status, and what it says.
fn cleanup(overlay: &mut Overlay, socket: &Path, flags: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command.arg("cleanup").args(flags);
    command.arg("--status-socket").arg(socket);
    let mut child = overlay.run("cleanup", 1, command);
    let ended = child.wait_end(Duration::from_secs(10)).unwrap();
    (ended.code(), std::fs::read_to_string(child.log()).unwrap())
}
