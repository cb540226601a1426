//! Both ends of the HTTP API together: TLS, who may do what, several servers, where a server listens, and abuse.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, too, and what was measured is told"
)]

mod abuse;
mod access;
mod authority;
mod crash;
mod failover;
mod golden;
mod listening;
mod networks;
mod ownership;
mod process;
mod support;
mod tls;
