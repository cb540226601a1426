//! What Kersey leaves on a host: all there was before, and nothing besides, once `kersey cleanup` has run.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;

use crate::firewall::run;
use crate::overlay::{Blueprint, Overlay};
use crate::support::require_firewall;

/// S16 with a tunnel that the kernel forwards nothing for.
#[test]
fn after_cleanup_a_host_is_as_it_was() {
    if require_firewall("after_cleanup_a_host_is_as_it_was") {
        let mut blueprint = Blueprint::embedded("s16", 2);
        blueprint.network = ClusterPlan::network("vxlan", true);
        come_and_go(blueprint, &[], &["blackhole route 10.244."]);
    }
}

/// S16 where the kernel's own segment routing is on, and would take packets to our SIDs.
#[test]
fn after_cleanup_a_host_is_as_it_was_before_srv6_by_raw_sockets() {
    if require_firewall("after_cleanup_a_host_is_as_it_was_before_srv6_by_raw_sockets") {
        let said = [
            "local route fd12:3456:789a:",
            "setting ipv6/conf/eth0/seg6_enabled=0 (it was 1)",
        ];
        come_and_go(srv6("s16r", "raw"), &["/eth0/seg6_enabled="], &said);
    }
}

/// S16 where the kernel forwards for us.
#[test]
fn after_cleanup_a_host_is_as_it_was_before_srv6_by_a_tun() {
    if require_firewall("after_cleanup_a_host_is_as_it_was_before_srv6_by_a_tun") {
        let changed = if per_link() {
            &["/eth0/force_forwarding="][..]
        } else {
            // The kernel sets it for every link, and has an address for all routers on each.
            &["/forwarding=", "/accept_ra=", "anycast "]
        };
        let said = [
            "route fd12:3456:789a:",
            if per_link() {
                "eth0/force_forwarding=1 (it was 0)"
            } else {
                "all/forwarding=1 (it was 0)"
            },
        ];
        come_and_go(srv6("s16t", "tun"), changed, &said);
    }
}

/// Whether this kernel forwards for single links (Linux 6.17).
fn per_link() -> bool {
    Path::new("/proc/sys/net/ipv6/conf/lo/force_forwarding").exists()
}

fn srv6(tag: &str, io: &str) -> Blueprint {
    let mut blueprint = Blueprint::embedded(tag, 2);
    blueprint.network = ClusterPlan::network("srv6", true);
    blueprint.flags = vec![format!("--srv6-io={io}")];
    blueprint
}

/// Two lives of a daemon, the second one killed: nothing of the host changes but what is ours and what contains one of `changed`, and after
/// cleanup, which says `said`, nothing is left.
fn come_and_go(mut blueprint: Blueprint, changed: &[&str], said: &[&str]) {
    let flags = ["--ip-masq", "--ip-blackhole-route"];
    blueprint.flags.extend(flags.map(str::to_owned));
    let mut overlay = blueprint.build();
    run(&overlay, 1, "nft", "add table inet somebodys");
    overlay
        .namespace(1)
        .run(|| {
            for link in ["all", "eth0"] {
                fs::write(format!("/proc/sys/net/ipv6/conf/{link}/seg6_enabled"), "1")?;
            }
            Ok(())
        })
        .unwrap();
    let before = host(&overlay, 1);
    overlay.start_daemons();
    let during = host(&overlay, 1);
    let may_change = |line: &str| changed.iter().any(|part| line.contains(part));
    for (what, lines) in &during {
        let known = &before.iter().find(|(name, _)| name == what).unwrap().1;
        let new: Vec<&String> = lines.iter().filter(|line| !known.contains(line)).collect();
        assert!(
            *what == "links" || !new.is_empty(),
            "{what}: nothing changed, so this proves nothing"
        );
        for line in new.into_iter().filter(|line| !may_change(line)) {
            // The pod's address is the test's.
            let is_ours = line.contains("flannel") || line.contains("proto 75") || line.contains("10.244.");
            assert!(
                is_ours || line.contains("fd00:10:244:"),
                "{what}: not ours: {line}"
            );
        }
        for line in known.iter().filter(|line| !may_change(line)) {
            assert!(lines.contains(line), "{what}: changed or gone: {line}");
        }
    }
    let switches = &during.iter().find(|(name, _)| *name == "switches").unwrap().1;
    for part in changed {
        let known = &before.iter().find(|(name, _)| *name == "switches").unwrap().1;
        let differs = |line: &&String| line.contains(part) && !known.contains(line);
        assert!(
            part.starts_with("anycast") || switches.iter().any(|line| differs(&line)),
            "{part} did not change, so this proves nothing"
        );
    }
    for line in switches {
        // Nobody advertises routers or redirects on our devices.
        for switch in ["accept_ra", "accept_redirects", "autoconf"] {
            if line.contains("/ipv6/conf/flannel0") && line.contains(&format!("/{switch}=")) {
                assert!(line.ends_with("=0"), "{line}");
            }
        }
    }
    // What was before the first life counts, not what it left.
    overlay.terminate(1);
    overlay.restart(1);
    overlay.wait(1, crate::overlay::READY, |status| status.ready);
    overlay.terminate(2);
    overlay.kill(1);
    let told = cleanup(&mut overlay);
    let rules = ["nft table ip flannel-ipv4", "nft table ip6 flannel-ipv6"];
    for part in rules.iter().chain(said) {
        assert!(told.contains(part), "{part}: {told}");
    }
    for addr in overlay.nodes[0].pods.clone() {
        let prefix_len = if addr.is_ipv4() { 32 } else { 128 };
        overlay
            .namespace(1)
            .netlink(async |netlink| {
                let index = netlink.link("lo").await?.index;
                Ok(netlink.delete_address(index, addr, prefix_len).await?)
            })
            .unwrap();
    }
    assert_eq!(host(&overlay, 1), before, "after cleanup");
    assert!(cleanup(&mut overlay).contains("nothing to clean up"));
    assert!(!overlay.file("1.data/switches.json").exists());
}

/// What somebody set after Kersey did is somebody's.
#[test]
fn cleanup_leaves_a_switch_alone_that_somebody_set_since() {
    if !require_firewall("cleanup_leaves_a_switch_alone_that_somebody_set_since") {
        return;
    }
    let mut blueprint = srv6("s16s", "raw");
    blueprint.network = ClusterPlan::network("srv6", false);
    let mut overlay = blueprint.build();
    let set = |overlay: &Overlay, link: &str, value: &str| {
        let file = format!("/proc/sys/net/ipv6/conf/{link}/seg6_enabled");
        overlay.namespace(1).run(|| Ok(fs::write(&file, value)?)).unwrap();
    };
    set(&overlay, "all", "1");
    set(&overlay, "eth0", "1");
    overlay.start_daemons();
    overlay.terminate(1);
    assert!(overlay.file("1.data/switches.json").exists());
    set(&overlay, "eth0", "1");
    assert!(!cleanup(&mut overlay).contains("seg6_enabled"));
}

/// The state of a host that Kersey could have touched, line by line.
fn host(overlay: &Overlay, nth: usize) -> Vec<(&'static str, Vec<String>)> {
    let lines = |program: &str, words: &str| -> Vec<String> {
        let text = run(overlay, nth, program, words);
        text.lines().map(|line| line.trim_end().to_owned()).collect()
    };
    let mut switches = Vec::new();
    overlay
        .namespace(nth)
        .run(|| {
            read_switches(Path::new("/proc/sys/net"), &mut switches);
            Ok(())
        })
        .unwrap();
    switches.sort();
    vec![
        ("switches", switches),
        ("rules", tables(&lines("nft", "-s list ruleset"))),
        ("routes", lines("ip", "route show table all")),
        ("IPv6 routes", lines("ip", "-6 route show table all")),
        ("links", lines("ip", "-o -br link")),
        ("addresses", lines("ip", "-o addr")),
    ]
}

/// Each table as one line, so that what is in it goes by its name.
fn tables(listed: &[String]) -> Vec<String> {
    let text = listed.join("\n");
    let tables = text.split("table ").filter(|table| !table.trim().is_empty());
    tables.map(|table| format!("table {}", table.trim())).collect()
}

fn read_switches(folder: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = path.to_string_lossy().into_owned();
        // These change by themselves, or are the whole machine's.
        if [
            "nf_conntrack_count",
            "fib_sync_mem",
            "/neigh/",
            "/netfilter/nf_log",
        ]
        .iter()
        .any(|odd| name.contains(odd))
        {
            continue;
        }
        if path.is_dir() {
            read_switches(&path, found);
        } else if let Ok(value) = fs::read_to_string(&path) {
            found.push(format!("{name}={}", value.trim()));
        }
    }
}

/// Cleans node 1 up: what it says.
pub(crate) fn cleanup(overlay: &mut Overlay) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kersey"));
    command
        .arg("cleanup")
        .arg("--status-socket")
        .arg(overlay.socket(1));
    command.arg("--data-dir").arg(overlay.file("1.data"));
    let mut child = overlay.run("cleanup", 1, command);
    let ended = child.wait_end(Duration::from_secs(20)).unwrap();
    assert_eq!(ended.code(), Some(0), "{}", child.log_end());
    fs::read_to_string(child.log()).unwrap()
}
