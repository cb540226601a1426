//! Networks in namespaces on one machine, and traffic over them.
//!
//! Everything made here is owned by a guard that unmakes it on drop: [`netns::Namespace`], [`topology::Topology`],
//! [`daemon::Child`], [`cluster::Cluster`]. Nothing is changed outside the namespaces, so a lab can run beside whatever the
//! machine does, needing only root.
//!
//! Sockets and netlink connections belong to the namespace they were opened in, whichever thread uses them later; so
//! [`traffic`] opens its sockets inside and runs its threads outside.

#![expect(clippy::disallowed_methods, reason = "a shell: it measures")]

pub mod cluster;
pub mod contestant;
mod copies;
pub mod daemon;
pub mod interrupt;
pub mod kernel_node;
mod leases;
pub mod netns;
mod pages;
pub mod seg6_node;
pub mod topology;
pub mod traffic;
