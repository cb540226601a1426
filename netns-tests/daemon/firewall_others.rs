//! Rules that others make beside ours, and where ours have to be for that.

use std::process::Command;

use crate::firewall::{PUT_RIGHT, flags, run};
use crate::overlay::{Blueprint, Daemon, Overlay, READY, wait_for, within};
use crate::privileges::with_open_tun;
use crate::support::require_firewall;

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
    let told = overlay.log(1).matches("somebody changed firewall rules").count();
    run(&overlay, 1, "iptables", "-I FORWARD -i eth1 -j DROP");
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert!(first(&overlay, "FORWARD").contains("DROP"));
    assert_eq!(
        overlay.log(1).matches("somebody changed firewall rules").count(),
        told
    );
}

/// As under the unit in configs/systemd: which tables the old iptables has is for root to read.
#[test]
fn an_old_iptables_that_drops_is_seen_or_told_of_without_root() {
    if !require_firewall("an_old_iptables_that_drops_is_seen_or_told_of_without_root") {
        return;
    }
    let mut overlay = Blueprint::embedded("unseen", 1).build();
    run(&overlay, 1, "iptables-legacy", "-P FORWARD DROP");
    nix::unistd::chown(&overlay.file("."), Some(65534.into()), Some(65534.into())).unwrap();
    let mut kersey = overlay.command(1);
    kersey.args(["--firewall=nft", "--iptables-resync=1"]);
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args([
        "--inh-caps=-all,+net_admin,+net_raw",
        "--ambient-caps=-all,+net_admin,+net_raw",
        "--bounding-set=-all,+net_admin,+net_raw",
    ]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let command = with_open_tun(&command);
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
