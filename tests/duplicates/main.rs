//! Two hosts with one public address: B3 and B4 of the list of upstream bugs.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd;
#[path = "../etcd_server/mod.rs"]
mod etcd_server;
mod server;

/// What Vagrant gives every machine.
const VAGRANT: &str = "10.0.2.15";
