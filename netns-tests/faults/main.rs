//! Faults, with traffic running: each row of the list of faults is caused for real, and then an oracle is asked.
//!
//! ```text
//!   probe: 1,000 datagrams a second, both ways, numbered, timed and summed
//!     |                                                    |
//!   node 1 flannel0 ── eth0 ── br0 in the hub, etcd ── eth0 ── flannel0 node 2 …
//!                                └─ p2 ══ impair ══ y2 ── x2 ─┘  where the wire itself is bad
//! ```
//!
//! Ids (F1, B5, …) are those of docs/reliability.md, which has a row for each. Every test makes a network of its own; the figures it
//! finds are printed (`--no-capture`). The ignored ones are the long forms: `make soak`.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test says what went wrong by panicking, and what it measured by printing"
)]

mod chaos;
mod clock;
mod device;
mod disk;
mod errors;
mod hostile_leases;
mod hostile_tun;
#[path = "../support/impair.rs"]
mod impair;
mod load;
mod loops;
mod machines;
mod many;
mod network;
#[path = "../support/oracle.rs"]
mod oracle;
mod outage;
#[allow(dead_code, reason = "made for the tests of daemons, which need more of it")]
#[path = "../daemon/overlay.rs"]
mod overlay;
#[allow(
    dead_code,
    unreachable_pub,
    reason = "shared with the tests of etcd, which need more of it"
)]
#[path = "../../tests/etcd_server/pki.rs"]
mod pki;
mod restart;
mod returns;
mod soak;
mod starvation;
mod strangers;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/watch.rs"]
mod watch;

use crate::watch::{assert_gap, assert_untouched, flows, probe, require_etcd, require_root, warm};

/// What CI has the time for, and what somebody who waits for it has.
fn in_ci<T>(in_ci: T, elsewhere: T) -> T {
    if std::env::var("CI").as_deref() == Ok("true") {
        in_ci
    } else {
        elsewhere
    }
}

/// A number from the environment, for the long forms.
fn variable(name: &str, default: u64) -> u64 {
    let text = std::env::var(format!("KERSEY_SOAK_{name}"));
    text.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("KERSEY_SOAK_{name}={text}: not a number"))
    })
}
