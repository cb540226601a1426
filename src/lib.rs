//! Flannel without the kernel's tunnel drivers.

pub mod addr;
pub mod backend;
pub mod cli;
pub mod control;
pub mod dataplane;
pub mod host;
pub mod lab;
pub mod lease;
pub mod status;
pub mod wire;
