//! Flannel without the kernel's tunnel drivers: a node daemon that leases a subnet, owns a TUN device, and does its own
//! encapsulation.
//!
//! ```text
//! main, cli → daemon → { host · backend · control } → dataplane → wire → addr        (lease imports addr only)
//!                server, lab beside and above daemon                      options and status are plain data
//! ```
//!
//! A packet from a pod on this node: TUN → [`host::tun`] → [`dataplane::worker::Outbound`] (parse, look up the peer, split if it is a
//! super-packet, write headers) → [`host::socket`] → underlay. A packet from a peer takes [`dataplane::worker::Inbound`] (pull the header, check
//! who may say what, coalesce) to the TUN. Neither waits for anything but the kernel.
//!
//! A lease travels from a [`control::store`] through [`control::peers`] to a [`dataplane::route::RouteTable`], which is published
//! whole and loaded by the workers once a batch.
//!
//! `docs/architecture.md` says why it is cut this way.

pub mod addr;
pub mod backend;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod dataplane;
pub mod host;
pub mod lab;
pub mod lease;
pub mod options;
pub mod server;
pub mod status;
pub mod trust;
pub mod wire;
