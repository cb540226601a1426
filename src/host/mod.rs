//! What we ask of the kernel: links, routes, addresses, and the facts about them.

pub mod ethtool;
pub mod interface;
pub mod netlink;
pub mod sysctl;
