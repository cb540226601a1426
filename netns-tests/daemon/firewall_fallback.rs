//! Firewall tools on kernels that lack what they need: which tool is taken instead, and why. The kernel is the real one; what it lacks, a
//! tool in front of the real tool says in the kernel's place.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use kersey::lab::cluster::ClusterPlan;

use crate::firewall::{PUT_RIGHT, assert_masqueraded, flags, run};
use crate::overlay::{Blueprint, Overlay, wait_for, within};
use crate::support::require_firewall;
use crate::traces::cleanup;

/// A kernel without nf_tables refuses everything; a real nft says so in these words.
const NO_NFT: &str = "#!/bin/sh
echo 'Error: cache initialization failed: Invalid argument' >&2
exit 1
";
/// And so does iptables over nf_tables, but for its version.
const NO_IPTABLES_NFT: &str = "#!/bin/sh
[ \"$1\" != --version ] || { echo 'iptables v1.8.9 (nf_tables)'; exit 0; }
echo 'iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Invalid argument' >&2
exit 4
";

/// An nft for a kernel that refuses a text in which `word` is, with `error`.
fn nft_without(word: &str, error: &str) -> String {
    format!(
        "#!/bin/sh
refuse() {{ case \"$1\" in *{word}*) echo 'Error: Could not process rule: {error}' >&2; exit 1;; esac; }}
refuse \"$*\"
[ \"$1\" = -f ] || exec /usr/local/sbin/nft.real \"$@\"
text=$(cat)
refuse \"$text\"
printf '%s\\n' \"$text\" | /usr/local/sbin/nft.real -f -
"
    )
}

/// Builds an overlay of two nodes whose first has these scripts in the places of tools, in a mount namespace of its own.
fn with_tools(mut blueprint: Blueprint, tools: &[(&str, &str)]) -> Overlay {
    blueprint.flags.push("--iptables-resync=1".to_owned());
    let mut overlay = blueprint.build();
    let mut hide =
        "mount -t tmpfs none /usr/local/sbin; cp /usr/sbin/nft /usr/local/sbin/nft.real; ".to_owned();
    for (nth, (tool, script)) in tools.iter().enumerate() {
        let file = overlay.file(&format!("tool{nth}"));
        fs::write(&file, script).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        hide += &format!("mount --bind {} $(readlink -f {tool}); ", file.display());
    }
    hide += "exec \"$@\"";
    let kersey = overlay.command(1);
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &hide, "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    overlay.adopt(1, command);
    let other = overlay.command(2);
    overlay.adopt(2, other);
    overlay.wait_all();
    overlay
}

/// The lines that tell of another tool.
fn told(overlay: &Overlay) -> Vec<String> {
    let log = overlay.log(1);
    let lines = log
        .lines()
        .filter(|line| line.contains("firewall rules are made with"));
    lines.map(str::to_owned).collect()
}

#[test]
fn a_kernel_without_nf_tables_gets_its_rules_from_the_old_iptables() {
    if !require_firewall("a_kernel_without_nf_tables_gets_its_rules_from_the_old_iptables") {
        return;
    }
    for (tag, flag, why) in [
        (
            "nonft",
            "--firewall=auto",
            "nft refuses: Error: cache initialization failed: Invalid argument; iptables refuses: iptables v1.8.9 (nf_tables): \
             Could not fetch rule set generation id: Invalid argument",
        ),
        (
            "noiptn",
            "--firewall=iptables",
            "iptables refuses: iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Invalid argument",
        ),
    ] {
        let mut blueprint = Blueprint::embedded(tag, 2);
        blueprint.network = ClusterPlan::network("vxlan", true);
        blueprint.own_flags.insert(1, flags(&["--ip-masq", flag]));
        let tools = [
            ("/usr/sbin/nft", NO_NFT),
            ("/usr/sbin/iptables-nft", NO_IPTABLES_NFT),
        ];
        let mut overlay = with_tools(blueprint, &tools);
        let status = overlay.status(1);
        assert_eq!(
            (status.firewall.as_str(), status.ready),
            ("iptables-legacy", true)
        );
        assert_masqueraded(&overlay, tag);
        // As they look to somebody whose tools work.
        for tool in ["iptables-legacy", "ip6tables-legacy"] {
            let nat = run(&overlay, 1, tool, "-t nat -S");
            assert!(nat.contains("-j FLANNEL-POSTRTG"), "{nat}");
        }
        assert!(!run(&overlay, 1, "nft", "list ruleset").contains("FLANNEL"));
        run(&overlay, 1, "iptables-legacy", "-t nat -F FLANNEL-POSTRTG");
        wait_for("the rules are back", within(PUT_RIGHT), || {
            run(&overlay, 1, "iptables-legacy", "-t nat -S FLANNEL-POSTRTG").contains("MASQUERADE")
        });
        let told = told(&overlay);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            told[0].ends_with(&format!("firewall rules are made with iptables-legacy: {why}")),
            "{told:?}"
        );
        overlay.terminate(1);
        let said = cleanup(&mut overlay);
        assert!(said.contains("FLANNEL-POSTRTG"), "{said}");
        assert!(!run(&overlay, 1, "iptables-legacy", "-t nat -S").contains("FLANNEL"));
    }
}

#[test]
fn nf_tables_that_lack_what_a_network_needs_are_left_for_iptables_and_others_are_not() {
    if !require_firewall("nf_tables_that_lack_what_a_network_needs_are_left_for_iptables_and_others_are_not")
    {
        return;
    }
    let no_ip6 = nft_without("ip6", "Operation not supported");
    let no_nat = nft_without("postrouting", "No such file or directory");
    for (nth, (nft, dual_stack, masquerade, expected)) in [
        (&no_ip6, true, true, "iptables"),
        (&no_ip6, false, true, "nft"),
        (&no_nat, false, true, "iptables"),
        (&no_nat, false, false, "nft"),
    ]
    .into_iter()
    .enumerate()
    {
        let tag = format!("nolack{nth}");
        let mut blueprint = Blueprint::embedded(&tag, 2);
        blueprint.network = ClusterPlan::network("vxlan", dual_stack);
        if masquerade {
            blueprint.own_flags.insert(1, flags(&["--ip-masq"]));
        }
        let overlay = with_tools(blueprint, &[("/usr/sbin/nft", nft)]);
        assert_eq!(overlay.status(1).firewall, expected, "{nth}");
        if dual_stack {
            assert_masqueraded(&overlay, &tag);
        }
        // Some periods later nothing has been said again, and nothing has been put right.
        std::thread::sleep(Duration::from_millis(2500));
        let told = told(&overlay);
        assert_eq!(told.len(), usize::from(expected == "iptables"), "{nth}: {told:?}");
        let why = "firewall rules are made with iptables: nft refuses: Error: Could not process rule: ";
        assert!(told.iter().all(|line| line.contains(why)), "{told:?}");
        let log = overlay.log(1);
        assert!(!log.contains("somebody changed"), "{log}");
        let tables = run(&overlay, 1, "nft", "list tables");
        assert_eq!(
            tables.contains("flannel-ipv4"),
            expected == "nft",
            "{nth}: {tables}"
        );
        assert!(!tables.contains("flannel-ipv6"), "{nth}: {tables}");
    }
}
