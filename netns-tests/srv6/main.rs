//! Kersey in one network with nodes whose kernel does the SRv6, while the kernels of Kersey's own nodes have it off.
//!
//! ```text
//!   node 1 eth0 2001:db8:1::1 ------- br0 in the hub, with etcd ------- 2001:db8:1::2 eth0 node 2 (or 3)
//!     |                                                                    |
//!   kersey run ─ flannel0 ···· IPv6 [SRH] IPv4 or IPv6, SID to SID ···· encap seg6, encap seg6local: the kernel's
//!     |          fd12:3456:789a:c000:201::/80      fd12:3456:789a:c000:202::/80
//!   pod address on lo, a container                                      pod address on lo, a container
//! ```
//!
//! What the kernel's SRv6 cannot do is left out on its side ([`kersey::lab::seg6_node`]): it makes no fragments, so it
//! answers no echo request larger than the MTU; and nobody tells containers behind it, so theirs have the inner MTU.
//!
//! Each test makes a network of its own and needs nothing of the others; the figures it finds are printed (`--no-capture`).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and what it measured by printing"
)]

mod behaviors;
mod capture;
mod cross_connect;
mod hostile;
mod io;
mod lab;
mod matrix;
mod mixed;
#[allow(dead_code, reason = "made for the tests of daemons, which need more of it")]
#[path = "../daemon/overlay.rs"]
mod overlay;
mod proof;
mod send;
#[path = "../support/mod.rs"]
mod support;
mod underlays;
mod waypoint;
