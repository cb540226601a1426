//! Both ends of the HTTP API together: TLS, who may do what, several servers, where a server listens, and abuse.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking, too")]

mod abuse;
mod access;
mod authority;
mod crash;
mod failover;
mod golden;
mod listening;
mod networks;
mod process;
mod support;
mod tls;
