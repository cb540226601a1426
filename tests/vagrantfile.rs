//! The Vagrantfile's shell pieces, run in a folder in place of `/`, with stand-ins for what a machine of its own would have.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

const FILE: &str = include_str!("../Vagrantfile");
const PAGE: &str = include_str!("../docs/classic-lab.md");
/// What the pieces name, and finds itself below the folder.
const FOLDERS: [&str; 4] = ["/etc/", "/usr/lib/", "/usr/local/bin/", "/vagrant/"];

/// A service manager that ends with status 217, as systemd does, if the unit's user is not there when it starts.
const SYSTEMCTL: &str = r#"#!/bin/sh
echo "systemctl $*" >>"$ROOT/log"
case "$*" in
"enable --now "*)
    unit=$ROOT/etc/systemd/system/$3.service
    grep -q "^systemctl daemon-reload$" "$ROOT/log" || exit 5
    grep -qx "$(sed -n 's/^User=//p' "$unit")" "$ROOT/users" || exit 217
    [ -x "$ROOT$(sed -n 's/^ExecStart=\([^ ]*\).*/\1/p' "$unit")" ] || exit 203
    for name in $(sed -n 's/^ExecStartPre=.*systemd-tmpfiles --create //p' "$unit"); do
        [ -e "$ROOT/usr/lib/tmpfiles.d/$name" ] || exit 1
    done ;;
esac
"#;
const SYSUSERS: &str = r#"#!/bin/sh
echo "systemd-sysusers $*" >>"$ROOT/log"
sed -n 's/^u \([^ ]*\) .*/\1/p' "$ROOT"/usr/lib/sysusers.d/*.conf >>"$ROOT/users"
"#;
const TMPFILES: &str = r#"#!/bin/sh
echo "systemd-tmpfiles $*" >>"$ROOT/log"
[ "$1" = --create ] && [ -e "$ROOT/usr/lib/tmpfiles.d/$2" ] && [ -s "$ROOT/users" ]
"#;
const NOTED: &str = "#!/bin/sh\necho \"${0##*/} $*\" >>\"$ROOT/log\"\n";

/// The piece that begins with this line, as Ruby's `<<~` gives it.
fn piece(opening: &str) -> String {
    let (_, after) = FILE.split_once(&format!("{opening}\n")).unwrap();
    let lines: Vec<&str> = after.lines().take_while(|line| line.trim() != "SHELL").collect();
    let indent = |line: &&&str| line.len() - line.trim_start().len();
    let least = lines
        .iter()
        .filter(|line| !line.is_empty())
        .map(|line| indent(&line))
        .min();
    let lines = lines.iter().map(|line| line.get(least.unwrap()..).unwrap_or(""));
    lines.map(|line| format!("{line}\n")).collect()
}

/// A folder in place of `/`.
struct Root(TempDir);

impl Root {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for folder in ["bin", "etc", "usr/local/bin", "vagrant/target/release"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        symlink(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("configs"),
            at("vagrant/configs"),
        )
        .unwrap();
        symlink(env!("CARGO_BIN_EXE_kersey"), at("vagrant/target/release/kersey")).unwrap();
        for (name, text) in [
            ("systemctl", SYSTEMCTL),
            ("systemd-sysusers", SYSUSERS),
            ("systemd-tmpfiles", TMPFILES),
            ("kersey", NOTED),
        ] {
            let path = at("bin").join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self(root)
    }

    fn run(&self, script: &str) {
        let root = self.0.path().display();
        let moved = FOLDERS.iter().fold(script.to_owned(), |text, folder| {
            text.replace(folder, &format!("{root}{folder}"))
        });
        let output = Command::new("sh")
            .args(["-c", &moved])
            .env("ROOT", self.0.path())
            .env("PATH", format!("{root}/bin:{}", std::env::var("PATH").unwrap()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}\n{script}");
    }

    fn text(&self, path: &str) -> String {
        fs::read_to_string(self.0.path().join(path)).unwrap()
    }
}

/// The unit's user and folders were not installed once: every `vagrant up` ended in status 217.
#[test]
fn a_machine_has_what_the_unit_needs_before_it_starts() {
    for (settings, expected) in [
        (
            "KERSEY_IFACE=eth1\nKERSEY_REMOTE=192.168.56.11:8888\n",
            "KERSEY_REMOTE",
        ),
        (
            "KERSEY_IFACE=eth1\nKERSEY_NETWORK_CONFIG=/x\n",
            "KERSEY_NETWORK_CONFIG",
        ),
    ] {
        let root = Root::new();
        root.run(&piece("BINARY = <<~'SHELL'"));
        for name in ["kersey", "flanneld", "mk-docker-opts.sh"] {
            let installed = root.0.path().join("usr/local/bin").join(name);
            assert!(fs::metadata(&installed).unwrap().len() > 1_000_000, "{name}");
        }
        let service = piece("node.vm.provision \"service\", type: \"shell\", inline: <<~SHELL");
        let (before, after) = service.split_once("#{settings(name)}").unwrap();
        root.run(&format!("{before}{settings}{after}"));
        let log = root.text("log");
        let order = [
            "systemd-sysusers",
            "systemd-tmpfiles",
            "systemctl daemon-reload",
            "systemctl enable",
            "kersey status",
        ];
        let places: Vec<_> = order.iter().map(|call| log.find(call)).collect();
        assert!(places.is_sorted() && places[0].is_some(), "{log}");
        assert!(root.text("etc/kersey/kersey.env").contains(expected));
        for (installed, shipped) in [
            (
                "etc/systemd/system/kersey.service",
                "configs/systemd/kersey.service",
            ),
            ("usr/lib/sysusers.d/kersey.conf", "configs/sysusers.d/kersey.conf"),
            ("usr/lib/tmpfiles.d/kersey.conf", "configs/tmpfiles.d/kersey.conf"),
            ("etc/kersey/net-conf.json", "configs/net-conf/udp.json"),
        ] {
            assert_eq!(
                root.text(installed),
                fs::read_to_string(shipped).unwrap(),
                "{installed}"
            );
        }
    }
}

/// Every file the pieces take from the checkout is in it, but for what `make` builds.
#[test]
fn what_the_pieces_take_from_the_checkout_is_there() {
    let words = FILE.split(|c: char| c.is_whitespace() || "\"',;".contains(c));
    let taken: Vec<&str> = words
        .filter_map(|word| word.strip_prefix("/vagrant/"))
        .filter(|path| !path.starts_with("target/"))
        .collect();
    assert!(taken.len() >= 5, "{taken:?}");
    for path in taken {
        assert!(Path::new(path).is_file(), "{path}");
    }
}

/// `netns-tests/classic_lab.rs` runs the page's.
#[test]
fn dockers_drop_in_is_the_pages() {
    let (_, after) = PAGE.split_once("\n```sh docker\n").unwrap();
    let block = after.split_once("```").unwrap().0;
    let own = piece("DOCKER_UNIT = <<~'SHELL'");
    assert!(own.ends_with(block), "{own}\nis not\n{block}");
}
