//! What we ask of the kernel. Leases, stores and backends are unknown here.
//!
//! Every feature is asked for by doing it ([`tun::TunOffloads`], [`socket::SocketOffloads`]); the answers are plain
//! values, printed in one line at start. All `unsafe` code of the project is in [`sys`], but for one call of safe code compiled for
//! AVX2 in [`checksum`](crate::wire::checksum), and the one in
//! [`ethtool`], which only labs make. Links, addresses and routes go through [`netlink`].

pub mod endpoint;
pub mod ethtool;
pub mod firewall;
pub mod folders;
pub mod handover;
pub mod inherited;
pub mod interface;
pub mod limits;
pub mod netlink;
pub mod outer_tun;
pub mod packet;
pub mod probe;
pub mod pulse;
pub mod queues;
pub mod raw;
pub mod sandbox;
pub mod shared_port;
pub mod socket;
pub mod sys;
pub mod sysctl;
pub mod tun;
pub mod underlay;
