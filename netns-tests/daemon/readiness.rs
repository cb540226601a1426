//! What is there when the service manager hears `READY=1`.

use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixDatagram;

use kersey::addr::Prefix;
use nix::sys::signal::Signal;

use crate::overlay::{Blueprint, READY, within};
use crate::support::require_root;

/// What is ordered behind the unit reads subnet.env and sends packets at once. The daemon is stopped as soon as the message arrives, so that
/// nothing it does after it is seen.
#[test]
fn readiness_is_told_when_subnet_env_address_and_routes_are_there() {
    if !require_root("readiness_is_told_when_subnet_env_address_and_routes_are_there") {
        return;
    }
    let mut overlay = Blueprint::embedded("readiness", 1).build();
    let env = overlay.file("1.env");
    let manager = UnixDatagram::bind(overlay.file("notify.sock")).unwrap();
    manager.set_read_timeout(Some(within(READY))).unwrap();
    let mut command = overlay.command(1);
    command.env("NOTIFY_SOCKET", overlay.file("notify.sock"));
    assert!(!env.exists() && overlay.device(1).is_none());
    overlay.adopt(1, command);
    let mut buffer = [0; 4096];
    let lines: Vec<String> = loop {
        let len = manager.recv(&mut buffer).unwrap();
        let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
        if text.lines().any(|line| line == "READY=1") {
            break text.lines().map(str::to_owned).collect();
        }
    };
    overlay.daemon(1).signal(Signal::SIGSTOP).unwrap();
    let written = fs::read_to_string(&env).unwrap();
    let device = overlay.device(1);
    overlay.daemon(1).signal(Signal::SIGCONT).unwrap();

    // How it is comes with it: "not ready" must not be what `systemctl status` shows of a unit that is active.
    let subnet = overlay.subnet(1);
    let status = format!("STATUS={subnet} by udp, 0 peers");
    assert_eq!(lines, ["READY=1".to_owned(), status]);
    assert!(written.contains("FLANNEL_NETWORK=10.244.0.0/16\n"), "{written}");
    let first = u32::from(subnet.addr()) + 1;
    let own = format!("FLANNEL_SUBNET={}/24\n", std::net::Ipv4Addr::from(first));
    assert!(written.contains(&own), "{written}");
    let (_, addresses, routes) = device.unwrap();
    let found: Vec<_> = addresses
        .iter()
        .map(|held| (held.addr, held.prefix_len))
        .collect();
    assert_eq!(found, [(IpAddr::V4(subnet.addr()), 32)]);
    let network: Prefix = Prefix::V4("10.244.0.0/16".parse().unwrap());
    assert!(
        routes.iter().any(|route| route.destination == network),
        "{routes:?}"
    );
}
