//! The lease life cycle: acquire, renew, watch, publish.

pub mod store;
