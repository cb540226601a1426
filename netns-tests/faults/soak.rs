//! The long forms: `make soak`, or one by its name. Each says with which numbers it ran; KERSEY_SOAK_… changes them.

use std::time::Duration;

use crate::oracle::Oracle;
use crate::overlay::{Blueprint, figure};
use crate::{
    chaos, device, hostile_tun, load, network, outage, require_etcd, require_root, restart, starvation,
    variable, warm,
};

#[test]
#[ignore = "takes as many seconds as KERSEY_SOAK_OUTAGE_SECONDS says, three times"]
fn soak_f1_long_outages() {
    if require_etcd("soak_f1_long_outages") {
        let seconds = variable("OUTAGE_SECONDS", 60);
        figure("seconds of each outage", seconds);
        outage::outages("soak-outage", Duration::from_secs(seconds));
    }
}

#[test]
#[ignore = "ends a daemon KERSEY_SOAK_KILLS times"]
fn soak_f10_many_lives() {
    if require_etcd("soak_f10_many_lives") {
        let kills = variable("KILLS", 100);
        figure("kills", kills);
        restart::lives("soak-kill", kills);
    }
}

#[test]
#[ignore = "lays hands on a device KERSEY_SOAK_HANDS times in each of six ways"]
fn soak_f12_many_hands() {
    if require_root("soak_f12_many_hands") {
        let rounds = variable("HANDS", 50);
        figure("rounds", rounds);
        device::hands("soak-hands", usize::try_from(rounds).unwrap());
    }
}

#[test]
#[ignore = "stops a daemon for KERSEY_SOAK_PAUSE_SECONDS"]
fn soak_f20_a_long_pause() {
    if require_root("soak_f20_a_long_pause") {
        starvation::stopped("soak-pause", Duration::from_secs(variable("PAUSE_SECONDS", 30)));
    }
}

#[test]
#[ignore = "moves 10 MB five times over each of five bad wires, from KERSEY_SOAK_SEED on"]
fn soak_f21_bad_wires() {
    if require_root("soak_f21_bad_wires") {
        let seed = variable("SEED", 1);
        figure("seed", seed);
        for backend in ["udp", "vxlan"] {
            network::bad_wires(backend, seed, 5, variable("WIRE_BYTES", 10_000_000));
        }
    }
}

#[test]
#[ignore = "sends KERSEY_SOAK_PACKETS random packets into a device, from KERSEY_SOAK_SEED"]
fn soak_b5_anything_into_the_device() {
    if require_root("soak_b5_anything_into_the_device") {
        let (packets, seed) = (variable("PACKETS", 1_000_000), variable("SEED", 1));
        figure("packets, seed", (packets, seed));
        hostile_tun::anything("soak-tunside", usize::try_from(packets).unwrap(), seed);
    }
}

#[test]
#[ignore = "moves KERSEY_SOAK_STREAMS streams at once, and floods a node for KERSEY_SOAK_FLOOD_SECONDS"]
fn soak_l1_l5_much() {
    if require_root("soak_l1_l5_much") {
        let mut overlay = Blueprint::embedded("soak-load", 2).start();
        warm(&overlay, 1, 2);
        let streams = usize::try_from(variable("STREAMS", 50)).unwrap();
        // Buffers grow to what is needed, and stay so; from then on nothing may.
        load::many_streams(&overlay, streams);
        load::overload(&overlay, Duration::from_secs(5));
        let mut oracle = Oracle::start(&mut overlay);
        load::many_streams(&overlay, streams);
        load::overload(&overlay, Duration::from_secs(variable("FLOOD_SECONDS", 60)));
        oracle.check(&mut overlay, 1);
    }
}

#[test]
#[ignore = "makes KERSEY_SOAK_ROUNDS rounds of faults, from KERSEY_SOAK_SEED on"]
fn soak_f25_chaos() {
    if require_etcd("soak_f25_chaos") {
        chaos::chaos("soak-chaos", variable("ROUNDS", 120), variable("SEED", 1));
    }
}

#[test]
#[ignore = "makes KERSEY_SOAK_EVENTS lease events"]
fn soak_l4_many_events() {
    if require_etcd("soak_l4_many_events") {
        let events = variable("EVENTS", 100_000);
        figure("events", events);
        load::events("soak-events", events);
    }
}
