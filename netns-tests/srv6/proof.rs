//! Nodes of flannel-srv6 beside Kersey: one link, IPv4 inside, a routing header in every packet of theirs.

use std::fs;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use kersey::host::ethtool::Switch;
use kersey::lab::seg6_node::Form;
use kersey::lab::topology::INTERFACE;
use serde_json::{Value, json};

use crate::mixed::{Kernels, Mixed, bulk, datagrams, network};
use crate::overlay::{Blueprint, READY};
use crate::support::require_etcd;

/// What such a node's packets leave of 1500 bytes. It does not say so itself; Kersey knows.
const MTU: u16 = 1436;

#[test]
fn a_proof_of_concept_and_kersey_reach_one_another() {
    if !require_etcd("a_proof_of_concept_and_kersey_reach_one_another") {
        return;
    }
    for (tag, wire, gro) in [
        ("s-poc", Switch::On, Switch::Off),
        ("s-pow", Switch::Off, Switch::Off),
        ("s-pog", Switch::Off, Switch::On),
    ] {
        let mut blueprint = blueprint(tag, 2);
        blueprint.lab.offloads = wire;
        blueprint.lab.gro = gro;
        let mixed = Mixed::start(blueprint, OLD);
        assert_eq!(mixed.overlay.status(1).node.inner_mtu, 1460);
        mixed.reach_all(1, MTU.into());
        let ends = [mixed.pods(1)[0], mixed.pods(2)[0]];
        for (from, to) in [(0, 1), (1, 0)] {
            bulk(ends[from], ends[to], 4 << 20);
            for payload_bytes in [32, usize::from(MTU) - 28] {
                datagrams(ends[from], ends[to], payload_bytes);
            }
        }
        mixed.assert_sound();
    }
}

#[test]
fn two_of_each_reach_one_another() {
    if !require_etcd("two_of_each_reach_one_another") {
        return;
    }
    let mixed = Mixed::start(blueprint("s-poc4", 4), Kernels { nodes: 2, ..OLD });
    mixed.reach_all(1, MTU.into());
    mixed.assert_sound();
}

#[test]
fn a_pinned_neighbour_goes_with_cleanup() {
    if !require_etcd("a_pinned_neighbour_goes_with_cleanup") {
        return;
    }
    let mut mixed = Mixed::start(blueprint("s-pin", 2), OLD);
    mixed.reach_all(1, MTU.into());
    let overlay = &mut mixed.overlay;
    overlay.kill(1);
    let mut run = |program: &str, words: &str| {
        let mut command = Command::new(program);
        command.args(words.split(' '));
        let mut child = overlay.run(program, 1, command);
        assert!(child.wait_end(READY).unwrap().success(), "{}", child.log_end());
        fs::read_to_string(child.log()).unwrap()
    };
    let neighbours = "-6 neigh show nud permanent dev eth0";
    run(
        "ip",
        "-6 neigh add 2001:db8:1::77 lladdr 02:00:00:00:00:77 nud permanent dev eth0",
    );
    let held = run("ip", neighbours);
    assert!(held.contains("proto 75") && held.lines().count() == 2, "{held}");
    let told = run(
        env!("CARGO_BIN_EXE_kersey"),
        "cleanup --status-socket=/nowhere --data-dir=/nowhere",
    );
    assert!(told.contains("removed neighbour "), "{told}");
    let held = run("ip", neighbours);
    assert!(
        held.contains("2001:db8:1::77") && held.lines().count() == 1,
        "{held}"
    );
}

#[test]
fn kerseys_lease_is_one_a_proof_of_concept_can_read() {
    if !require_etcd("kerseys_lease_is_one_a_proof_of_concept_can_read") {
        return;
    }
    let mixed = Mixed::start(blueprint("s-lease", 2), OLD);
    let subnet = mixed.subnets(1)[0].replace('/', "-");
    let (text, _) = mixed.overlay.get(&format!("subnets/{subnet}")).unwrap();
    let lease: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(lease["PublicIP"], "192.0.2.1", "{text}");
    assert_eq!(lease["PublicIPv6"], "2001:db8:1::1", "{text}");
    assert_eq!(lease["BackendType"], "srv6", "{text}");
    let namespace = mixed.overlay.namespace(1);
    let link = namespace.netlink(async |netlink| Ok(netlink.link(INTERFACE).await?));
    let mac = link.unwrap().mac.unwrap();
    let data = &lease["BackendData"];
    assert_eq!(data["MACAddr"], BASE64.encode(mac), "{text}");
    assert_eq!(
        (&data["Version"], &data["ECN"]),
        (&json!(1), &json!(true)),
        "{text}"
    );
    assert_eq!(data["Locator"], "fd12:3456:789a:c000:201::/80", "{text}");
    assert_eq!(data["Source"], "fd12:3456:789a:c000:201::1", "{text}");
    let sids = data["SIDs"].as_array().unwrap();
    for sid in [
        json!({ "SID": "fd12:3456:789a:c000:201::1", "Behavior": "End.DT46" }),
        json!({ "SID": "fd12:3456:789a:c000:201::e", "Behavior": "End" }),
    ] {
        assert!(sids.contains(&sid), "{sid} is not in {text}");
    }
}

const OLD: Kernels = Kernels {
    form: Form::ProofOfConcept,
    ..Kernels::ONE
};

fn blueprint(tag: &str, nodes: usize) -> Blueprint {
    let mut blueprint = Blueprint::new(tag, nodes);
    blueprint.network = network(json!({}), false);
    blueprint
}
