//! Real daemons in real namespaces: what a user of flannel would see, and what an operator, a stranger or a bad day
//! can do to it.
//!
//! ```text
//!   node 1 eth0 192.0.2.1 --- br0 192.0.2.254 in the hub, with etcd --- 192.0.2.2 eth0 node 2 …
//!     |                                                                              |
//!   kersey run ─ flannel0 10.244.x.0/32 ······ UDP port 8285 ······ flannel0 10.244.y.0/32 ─ kersey run
//!     |                                                                              |
//!   pod address 10.244.x.2 on lo                                       pod address 10.244.y.2 on lo
//! ```
//!
//! Each test makes a network of its own and needs nothing of the others; the figures it finds are printed (`--no-capture`).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and what it measured by printing"
)]

mod alloc;
mod auto;
mod cleanup;
mod config;
mod direct_routing;
mod expiry;
mod faults;
mod firewall;
mod firewall_fallback;
mod firewall_guard;
mod firewall_helper;
mod firewall_others;
mod firewall_tools;
mod handover;
mod hostile_data;
mod icmp;
mod ingress;
mod kept;
mod lease_server;
mod leases;
mod metrics;
mod mtu;
mod networks;
mod networks_wiped;
mod nodes;
mod offloads;
#[path = "../support/oracle.rs"]
mod oracle;
#[allow(dead_code, reason = "shared with tests that need more of it")]
mod overlay;
mod path;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "shared with the tests of etcd, which need more of it"
)]
#[path = "../../tests/etcd_server/pki.rs"]
mod pki;
mod privileges;
mod readiness;
mod releases;
mod routed;
mod secrets;
mod shared_port;
#[path = "../support/mod.rs"]
mod support;
mod traces;
mod underlay;
mod vxlan;
#[allow(dead_code, reason = "made for the tests of faults, which need more of it")]
#[path = "../support/watch.rs"]
mod watch;
