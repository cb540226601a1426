//! F25: faults in any order, several at once. At the end all is well within ten seconds.
//!
//! What happens follows from the seed, which is printed; when exactly it happens does not.

use std::time::Duration;

use kersey::host::ethtool::Switch;
use kersey::lab::interrupt;
use nix::sys::signal::Signal;

use crate::device::{Hand, lay_on};
use crate::impair::{Impair, Manner};
use crate::oracle::Oracle;
use crate::outage::{self, Fault};
use crate::overlay::{Blueprint, Overlay, figure, within};
use crate::{assert_untouched, flows, network, probe, require_etcd, variable, warm};

/// How many nodes there are; what happens to one happens to any.
const NODES: usize = 3;

#[test]
fn f25_faults_in_any_order_and_several_at_once_leave_all_well() {
    if require_etcd("f25_faults_in_any_order_and_several_at_once_leave_all_well") {
        chaos("chaos", 5, variable("SEED", 1));
    }
}

/// What can happen, with what is needed to end it.
#[derive(Clone, Copy, Debug)]
enum Event {
    Outage(Fault),
    Killed(usize),
    Stopped(usize),
    Hand(usize, Hand),
    BadWire,
    LeaseDeleted(usize),
}

/// So many rounds; in each one to three things happen together for a second or two.
pub(crate) fn chaos(tag: &str, rounds: u64, seed: u64) {
    figure("seed", seed);
    let mut blueprint = Blueprint::new(tag, NODES);
    blueprint.lab.offloads = Switch::Off;
    let mut overlay = blueprint.start();
    let wire = network::part(&overlay, 2, seed);
    for other in 2..=NODES {
        warm(&overlay, 1, other);
    }
    let mut oracle = Oracle::start(&mut overlay);
    let mut state = seed;
    let mut below = |bound: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % bound
    };
    let mut faults = 0;
    for round in 0..rounds {
        let mut events: Vec<Event> = Vec::new();
        for _ in 0..=below(3) {
            let event = choose(&mut below);
            // One outage at a time: etcd that was killed cannot be stopped.
            let excluded = |other: &Event| match (event, other) {
                (Event::Outage(_), Event::Outage(_) | Event::LeaseDeleted(_))
                | (Event::LeaseDeleted(_), Event::Outage(_) | Event::LeaseDeleted(_)) => true,
                (Event::Killed(one) | Event::Stopped(one), Event::Killed(two) | Event::Stopped(two)) => {
                    one == *two
                }
                _ => false,
            };
            if !events.iter().any(excluded) {
                events.push(event);
            }
        }
        figure(&format!("round {round}"), &events);
        for &event in &events {
            begin(&mut overlay, &wire, event);
        }
        faults += events.len();
        interrupt::sleep(Duration::from_millis(500 + below(1500) as u64)).unwrap();
        for &event in &events {
            end(&mut overlay, &wire, event);
        }
    }
    for nth in 1..=NODES {
        overlay.wait(nth, within(Duration::from_secs(10)), |status| {
            status.ready && status.store.connected && status.peers.len() == NODES - 1
        });
    }
    oracle.check(&mut overlay, faults);
    for (one, two) in [(1, 2), (1, 3), (2, 3)] {
        let probe = probe(&overlay, one, two);
        flows(&probe);
        assert_untouched(&probe.stop().unwrap());
    }
}

fn choose(below: &mut impl FnMut(usize) -> usize) -> Event {
    let node = 1 + below(NODES);
    match below(12) {
        0 => Event::Outage(Fault::Killed),
        1 => Event::Outage(Fault::Stopped),
        2 => Event::Outage(Fault::BlackHole),
        3 | 4 => Event::Killed(node),
        5 => Event::Stopped(node),
        6 => Event::Hand(node, Hand::Deletes),
        7 => Event::Hand(node, Hand::SetsDown),
        8 => Event::Hand(node, Hand::TakesTheRoute),
        9 => Event::Hand(node, Hand::TakesTheAddress),
        10 => Event::LeaseDeleted(node),
        _ => Event::BadWire,
    }
}

fn begin(overlay: &mut Overlay, wire: &Impair, event: Event) {
    match event {
        Event::Outage(fault) => outage::cause(overlay, fault),
        Event::Killed(nth) => overlay.kill(nth),
        Event::Stopped(nth) => overlay.daemon(nth).signal(Signal::SIGSTOP).unwrap(),
        Event::Hand(nth, hand) => lay_on(overlay, nth, hand),
        Event::BadWire => wire.set(Manner {
            delay: Duration::from_millis(20),
            jitter: Duration::from_millis(10),
            loss: 0.2,
            duplicate: 0.05,
            reorder: 0.05,
            flip: 0.02,
        }),
        Event::LeaseDeleted(nth) => {
            let subnet = std::fs::read_to_string(overlay.file(&format!("{nth}.env"))).unwrap();
            let line = subnet
                .lines()
                .find_map(|line| line.strip_prefix("FLANNEL_SUBNET="))
                .unwrap();
            let net: ipnet::IpNet = line.parse().unwrap();
            let key = format!(
                "{}/subnets/{}",
                crate::overlay::PREFIX,
                net.trunc().to_string().replace('/', "-")
            );
            overlay.etcd(async |mut client| client.delete(key, None).await.map(drop));
        }
    }
}

fn end(overlay: &mut Overlay, wire: &Impair, event: Event) {
    match event {
        Event::Outage(fault) => outage::mend(overlay, fault),
        Event::Killed(nth) => overlay.restart(nth),
        Event::Stopped(nth) => overlay.daemon(nth).signal(Signal::SIGCONT).unwrap(),
        Event::BadWire => wire.set(Manner::default()),
        // These mend themselves.
        Event::Hand(..) | Event::LeaseDeleted(_) => {}
    }
}
