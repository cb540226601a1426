//! Encapsulations: one file each.
pub mod udp;
