//! The UDP underlay against a kernel that refuses: on a loopback too narrow for the segments of a run.
//!
//! ```text
//!   sender ── UDP_SEGMENT, segments of 3,000 bytes ──▶ lo, MTU 1500 ──▶ receiver
//! ```

mod support;

use std::net::Ipv4Addr;

use kersey::dataplane::datagram::DatagramBatch;
use kersey::dataplane::packet::{PacketBatch, RunKey, Segments, SendPlan};
use kersey::dataplane::stats::{Count, WorkerStats};
use kersey::dataplane::{Oversize, Underlay};
use kersey::host::probe::Switch;
use kersey::host::socket::{UdpUnderlay, UnderlayOptions};
use kersey::host::sys;
use kersey::lab::topology::Plan;
use kersey::wire::ip::Ecn;
use kersey::wire::virtio::VirtioHeader;

use support::require_root;

const PORT: u16 = 8285;
const SIZE: usize = 3000;

#[test]
fn a_run_the_kernel_refuses_to_cut_arrives_all_the_same() {
    if !require_root("a_run_the_kernel_refuses_to_cut_arrives_all_the_same") {
        return;
    }
    let lab = Plan::private("narrow", 1).build().unwrap();
    let node = &lab.nodes[0].namespace;
    node.netlink(async |netlink| Ok(netlink.set_mtu(netlink.link("lo").await?.index, 1500).await?))
        .unwrap();
    node.run(|| {
        let options = |addr, port| UnderlayOptions {
            v4: Some(addr),
            v6: None,
            port,
            source_ports: 1,
            queues: 1,
            gso: Switch::Auto,
            gro: Switch::Off,
            v4_oversize: Oversize::FragmentHere,
            v6_oversize: Oversize::FragmentHere,
        };
        let mut receiver = UdpUnderlay::open(&options(Ipv4Addr::LOCALHOST, PORT))?;
        let mut sender = UdpUnderlay::open(&options(Ipv4Addr::new(127, 0, 0, 2), PORT))?;
        let to = (Ipv4Addr::LOCALHOST, PORT).into();
        let mut batch = PacketBatch::new();
        let mut plan = SendPlan::new();
        for index in 0..4 {
            assert!(batch.push(VirtioHeader::default(), &[index as u8; SIZE]));
            let key = RunKey {
                to,
                port: 0,
                ecn: Ecn::NotEct,
                flow: 1,
                peer: 0,
            };
            let segments = Segments {
                at: batch.meta(index).start(),
                bytes: SIZE,
                size: SIZE,
            };
            plan.push(key, sender.limits(to), segments, index);
        }
        assert_eq!(plan.runs().len(), 1, "one message for the kernel to cut");
        let stats = WorkerStats::default();
        let mut failures = Vec::new();
        sender.send(&plan, &batch, &stats, &mut failures)?;
        assert_eq!(failures, []);
        assert_eq!(
            stats.counted(Count::GsoFallbacks),
            1,
            "the kernel refused the run"
        );
        let mut got = Vec::new();
        while got.len() < 4 {
            assert!(
                sys::wait_readable(receiver.readable(), 2000)?.any(),
                "only {got:?}"
            );
            let mut incoming = DatagramBatch::new();
            receiver.recv(&mut incoming)?;
            for datagram in incoming.datagrams() {
                assert_eq!(datagram.len, SIZE);
                got.push(incoming.bytes()[DatagramBatch::start(*datagram)]);
            }
        }
        assert_eq!(got, [0, 1, 2, 3], "whole, and in order");
        // Once refused, the destination goes without for a while, and nothing is refused again.
        sender.send(&plan, &batch, &stats, &mut failures)?;
        assert_eq!(stats.counted(Count::GsoFallbacks), 1);
        Ok(())
    })
    .unwrap();
}
