//! Flannel without the kernel's tunnel drivers.

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
pub mod wire;
