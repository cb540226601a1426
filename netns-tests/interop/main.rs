//! Kersey in one network with nodes whose kernel does the VXLAN, as flannel sets it up.
//!
//! ```text
//!   node 1 eth0 --- br0 in the hub, with etcd --- eth0 node 2 (or 3)
//!     |                                              |
//!   kersey run ─ flannel0 ······ UDP 8472 ······ flannel.1, flannel-v6.1: the kernel's own devices
//!     |                                              |
//!   pod address on lo, a container                pod address on lo, a container
//! ```
//!
//! Each test makes a network of its own and needs nothing of the others; the figures it finds are printed (`--no-capture`).

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and what it measured by printing"
)]

mod checksums;
mod differential;
mod matrix;
mod mixed;
mod mixes;
#[allow(dead_code, reason = "made for the tests of daemons, which need more of it")]
#[path = "../daemon/overlay.rs"]
mod overlay;
#[path = "../support/mod.rs"]
mod support;
