//! Firewall tools that are not there, or fail: what a node says, and that it goes on.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::Duration;

use crate::firewall::PUT_RIGHT;
use crate::overlay::{Blueprint, Overlay, READY, within};
use crate::support::{require_firewall, require_root};

#[test]
fn without_any_tool_a_node_says_so_once_and_goes_on() {
    if !require_root("without_any_tool_a_node_says_so_once_and_goes_on") {
        return;
    }
    // B29, B36.
    let mut overlay = Blueprint::embedded("notool", 1).build();
    let mut kersey = overlay.command(1);
    kersey.args(["--ip-masq", "--iptables-resync=1"]);
    // A mount namespace of its own: nobody else misses the tools.
    let hide = "for dir in /usr/sbin /sbin /usr/local/sbin /proc/sys/net/bridge; do \
                [ ! -d $dir ] || mount -t tmpfs none $dir; done; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", hide, "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    let mut child = overlay.run("node 1", 1, command);
    let socket = overlay.socket(1);
    let ready = || {
        kersey::lab::daemon::status(&socket)
            .ok()?
            .filter(|status| status.ready)
    };
    let status = child.wait(READY, ready).unwrap();
    assert_eq!(
        status.firewall,
        "none: there is neither nft nor iptables on this host"
    );
    let env = fs::read_to_string(overlay.file("1.env")).unwrap();
    assert!(
        env.ends_with("FLANNEL_IPMASQ=false\n"),
        "the runtime has to: {env}"
    );
    std::thread::sleep(Duration::from_millis(2500));
    let log = fs::read_to_string(child.log()).unwrap();
    assert_eq!(log.matches("neither nft nor iptables").count(), 1, "{log}");
    assert_eq!(log.matches("br_netfilter is not there").count(), 1, "{log}");
    child.stop().unwrap();
}

#[test]
fn a_tool_that_fails_is_named_and_tried_again_while_the_node_goes_on() {
    if !require_firewall("a_tool_that_fails_is_named_and_tried_again_while_the_node_goes_on") {
        return;
    }
    // B29: flannel logs it, and looks as well as ever.
    let mut overlay = Blueprint::embedded("failing", 2).start();
    overlay.terminate(1);
    let mut kersey = overlay.command(1);
    kersey.args([
        "--ip-masq",
        "--firewall=nft",
        "--iptables-resync=1",
        "--healthz-port=8081",
    ]);
    let manager = UnixDatagram::bind(overlay.file("notify.sock")).unwrap();
    manager.set_nonblocking(true).unwrap();
    let (broken, mended_by) = (overlay.file("nft"), overlay.file("mended"));
    let script = format!(
        "#!/bin/sh\n[ ! -e {} ] || exec /usr/local/sbin/nft.real \"$@\"\necho 'no such thing as netfilter' >&2\nexit 1\n",
        mended_by.display()
    );
    fs::write(&broken, script).unwrap();
    let hide = format!(
        "mount -t tmpfs none /usr/local/sbin; cp /usr/sbin/nft /usr/local/sbin/nft.real; chmod 755 {0}; \
         mount --bind {0} /usr/sbin/nft; exec \"$@\"",
        broken.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec", &hide, "sh"]);
    command.arg(kersey.get_program()).args(kersey.get_args());
    command.env("NOTIFY_SOCKET", overlay.file("notify.sock"));
    let env = overlay.file("1.env");
    fs::remove_file(&env).unwrap();
    overlay.nodes[0].child = overlay.run("node 1", 1, command);
    let said = "nft refuses: no such thing as netfilter";
    let why = format!("firewall rules that were asked for cannot be made: {said}");
    let status = overlay.wait(1, READY, |status| {
        status.problem.is_some() && status.peers.len() == 1
    });
    assert_eq!(status.problem.as_deref(), Some(why.as_str()));
    assert_eq!(status.firewall, format!("failing: {said}"));
    let ready_after = |overlay: &Overlay| {
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(len) = manager.recv(&mut buffer) {
            heard.extend(String::from_utf8_lossy(&buffer[..len]).lines().map(str::to_owned));
        }
        let told = heard.iter().any(|line| line == "READY=1");
        (overlay.status(1).ready, told, probe(overlay, "/readyz"))
    };
    // Two periods and some: it is tried again, and nothing but readiness waits for it.
    std::thread::sleep(PUT_RIGHT);
    let (ready, told, answer) = ready_after(&overlay);
    assert!(!ready && !told);
    assert!(answer.starts_with("HTTP/1.0 503"), "{answer}");
    assert!(
        answer.ends_with(&format!("flanneld is not ready yet: {why}")),
        "{answer}"
    );
    assert!(probe(&overlay, "/healthz").starts_with("HTTP/1.0 200"));
    assert!(env.exists(), "the overlay is there to be used");
    overlay.ping_all();

    fs::write(&mended_by, "").unwrap();
    overlay.wait(1, within(PUT_RIGHT), |status| {
        status.ready && status.firewall == "nft"
    });
    let (ready, told, answer) = ready_after(&overlay);
    assert!(ready && told && answer.starts_with("HTTP/1.0 200"), "{answer}");
    assert_eq!(overlay.status(1).problem, None);
    // What was made once stays, whatever becomes of the tool.
    fs::remove_file(&mended_by).unwrap();
    overlay.wait(1, within(PUT_RIGHT), |status| {
        status.firewall.starts_with("failing")
    });
    let (ready, _, answer) = ready_after(&overlay);
    assert!(ready && answer.starts_with("HTTP/1.0 200"), "{answer}");
    let log = overlay.log(1);
    assert_eq!(log.matches("no such thing as netfilter").count(), 2, "{log}");
}

#[test]
fn a_named_tool_that_is_not_there_is_a_fault_and_none_for_auto_is_not() {
    if !require_firewall("a_named_tool_that_is_not_there_is_a_fault_and_none_for_auto_is_not") {
        return;
    }
    let mut overlay = Blueprint::embedded("notool", 1).build();
    for (at, (flag, ready)) in [("--firewall=auto", true), ("--firewall=nft", false)]
        .into_iter()
        .enumerate()
    {
        let mut kersey = overlay.command(1);
        kersey.args([flag, "--ip-masq"]);
        // A host without either.
        let hide = "for dir in /usr/sbin /sbin /usr/bin /bin /usr/local/sbin /usr/local/bin; do \
                    for tool in nft iptables ip6tables; do \
                    [ ! -e $dir/$tool ] || mount --bind /dev/null $dir/$tool; done; done; exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", hide, "sh"]);
        command.arg(kersey.get_program()).args(kersey.get_args());
        if at == 0 {
            overlay.adopt(1, command);
        } else {
            overlay.terminate(1);
            overlay.nodes[0].child = overlay.run("node 1", 1, command);
        }
        let status = overlay.wait(1, READY, |status| {
            status.firewall.starts_with("none: ") && (status.ready || status.problem.is_some())
        });
        assert_eq!(status.ready, ready, "{flag}: {status:?}");
    }
}

/// What node 1 answers to a probe.
fn probe(overlay: &Overlay, path: &str) -> String {
    let asked = overlay.namespace(1).run(|| {
        let mut stream = TcpStream::connect("127.0.0.1:8081")?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    asked.unwrap()
}
