//! Rules that others make beside ours, and where ours have to be for that.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;

use crate::firewall::{PUT_RIGHT, assert_masqueraded, flags, run};
use crate::overlay::{Blueprint, Daemon, Overlay, READY, wait_for, within};
use crate::support::nobody::{by_nobody, give};
use crate::support::require_firewall;

/// Has node 1 run after `hide` was done in a mount namespace of its own.
fn adopt_hiding(overlay: &mut Overlay, hide: &str) {
    let kersey = overlay.command(1);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &format!("{hide}\nexec \"$@\""), "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    overlay.adopt(1, command);
}

/// B36: flannel ends without br_netfilter.
#[test]
fn that_br_netfilter_is_not_there_is_told_once_whatever_makes_the_rules() {
    if !require_firewall("that_br_netfilter_is_not_there_is_told_once_whatever_makes_the_rules") {
        return;
    }
    let bridges = Path::new("/proc/sys/net/bridge");
    for (tag, tool, hide) in [
        ("nobrn", "nft", true),
        ("nobri", "iptables", true),
        ("nobro", "off", true),
        ("bridges", "nft", false),
    ] {
        if !hide && !bridges.join("bridge-nf-call-iptables").exists() {
            // A host without br_netfilter shows the rest.
            continue;
        }
        let mut blueprint = Blueprint::embedded(tag, 1);
        blueprint.flags = flags(&["--ip-masq", "--firewall", tool, "--iptables-resync=1"]);
        let mut overlay = blueprint.build();
        let script = match hide && bridges.exists() {
            true => format!("mount -t tmpfs none {}", bridges.display()),
            false => String::new(),
        };
        adopt_hiding(&mut overlay, &script);
        let status = overlay.wait(1, READY, |status| status.ready);
        assert_eq!(status.firewall, tool);
        // Some periods later nothing has been said again.
        std::thread::sleep(Duration::from_millis(2500));
        let log = overlay.log(1);
        let told = log.matches("br_netfilter is not there").count();
        assert_eq!(told, usize::from(hide), "{tool}: {log}");
    }
}

/// B28: flannel's nftables need iptables to be there as well.
#[test]
fn nft_needs_no_iptables_and_iptables_no_nft() {
    if !require_firewall("nft_needs_no_iptables_and_iptables_no_nft") {
        return;
    }
    for (tag, hidden, gone, tool) in [
        ("nftonly", "ip*tables* xtables-*", "iptables", "nft"),
        ("iptonly", "nft", "nft", "iptables"),
    ] {
        let mut blueprint = Blueprint::embedded(tag, 2);
        blueprint.network = ClusterPlan::network("vxlan", true);
        blueprint.flags = flags(&["--ip-masq"]);
        let mut overlay = blueprint.build();
        let hide = format!(
            "for dir in /usr/sbin /sbin /usr/bin /bin /usr/local/sbin /usr/local/bin; do cd $dir; for tool in {hidden}; do \
             [ ! -f $tool ] || mount --bind /dev/null $tool; done; done; cd /
             if command -v {gone}; then exit 9; fi"
        );
        adopt_hiding(&mut overlay, &hide);
        let other = overlay.command(2);
        overlay.adopt(2, other);
        overlay.wait_all();
        assert_eq!(overlay.status(1).firewall, tool);
        assert_masqueraded(&overlay, tag);
        // As they look to somebody who has both.
        let has_nft = run(&overlay, 1, "nft", "list tables").contains("flannel-ipv4");
        let has_iptables = run(&overlay, 1, "iptables", "-t nat -S").contains("FLANNEL-POSTRTG");
        assert_eq!((has_nft, has_iptables), (tool == "nft", tool == "iptables"));
    }
}

/// S5: Docker puts an ACCEPT before everything when it starts.
#[test]
fn the_guard_is_first_again_after_somebody_accepts_before_it() {
    if !require_firewall("the_guard_is_first_again_after_somebody_accepts_before_it") {
        return;
    }
    let mut blueprint = Blueprint::embedded("guardfirst", 1);
    blueprint.flags = flags(&["--firewall=iptables", "--iptables-resync=1"]);
    let overlay = blueprint.start();
    let first = |overlay: &Overlay, chain: &str| {
        let rules = run(overlay, 1, "iptables", &format!("-S {chain}"));
        let mut rules = rules.lines().filter(|line| line.starts_with("-A"));
        rules.next().unwrap_or_default().to_owned()
    };
    for chain in ["FORWARD", "INPUT"] {
        assert!(
            first(&overlay, chain).contains("KERSEY-GUARD"),
            "{}",
            first(&overlay, chain)
        );
        run(&overlay, 1, "iptables", &format!("-I {chain} -i eth0 -j ACCEPT"));
        wait_for("the guard is first", within(PUT_RIGHT), || {
            first(&overlay, chain).contains("KERSEY-GUARD")
        });
        // Somebody's rule stays; what drops may come first.
        let rules = run(&overlay, 1, "iptables", &format!("-S {chain}"));
        assert!(rules.contains("-i eth0 -j ACCEPT"), "{rules}");
        assert_eq!(rules.matches("KERSEY-GUARD").count(), 1, "{rules}");
    }
    let told = |overlay: &Overlay| overlay.log(1).matches("somebody changed firewall rules").count();
    // The line comes after the rule.
    wait_for("both are told", READY, || told(&overlay) == 2);
    run(&overlay, 1, "iptables", "-I FORWARD -i eth1 -j DROP");
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert!(first(&overlay, "FORWARD").contains("DROP"));
    assert_eq!(told(&overlay), 2);
}

/// As under the unit in configs/systemd: which tables the old iptables has is for root to read.
#[test]
fn an_old_iptables_that_drops_is_seen_or_told_of_without_root() {
    if !require_firewall("an_old_iptables_that_drops_is_seen_or_told_of_without_root") {
        return;
    }
    let mut overlay = Blueprint::embedded("unseen", 1).build();
    run(&overlay, 1, "iptables-legacy", "-P FORWARD DROP");
    give(&overlay.file("."));
    let mut kersey = overlay.command(1);
    kersey.args(["--firewall=nft", "--iptables-resync=1"]);
    let command = by_nobody(&kersey, "+net_admin,+net_raw");
    let child = overlay.run("node 1", 1, command);
    overlay.nodes.push(Daemon {
        child,
        pods: Vec::new(),
    });
    overlay.wait(1, READY, |status| status.firewall == "nft");
    // Whether the account may take the lock of iptables is the host's affair.
    wait_for("accepts are made, or their lack is told", READY, || {
        let log = overlay.log(1);
        let told = log.contains("iptables-legacy are not looked after")
            && log.contains("no rule elsewhere can overrule it");
        told || run(&overlay, 1, "iptables-legacy", "-S FORWARD").contains("FLANNEL-FWD")
    });
}
