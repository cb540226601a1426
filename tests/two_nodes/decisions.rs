//! One packet, one decision: each lands in exactly its own counter, and nothing else happens.
//!
//! The node under test is number 2; it knows 1 and 3. What it decides is in [`inbound`](crate::inbound), [`outbound`](crate::outbound) and
//! [`edges`](crate::edges).

use std::net::IpAddr;

use kersey::dataplane::forward::IngressCheck;
use kersey::dataplane::memory::Message;
use kersey::dataplane::stats::{Count, DropReason};
use kersey::wire::ip::IpHeader;

use crate::node::{Kind, Node, NodeOf, Tunnel, start};
use crate::packets::checksums_hold;

/// The node under test.
pub(crate) fn node(check: IngressCheck) -> Node {
    Node::new(
        2,
        Kind {
            check,
            ..Kind::default()
        },
        &[1, 3],
    )
}

/// Whose counter a refusal goes to, besides the worker's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blamed {
    Nobody,
    Peer1,
}

/// Receives a message of one packet and checks that it is counted under `reason` once, and that nothing else happens.
pub(crate) fn refused<E: Tunnel>(
    node: &mut NodeOf<E>,
    what: &str,
    message: Message,
    reason: DropReason,
    blamed: Blamed,
) {
    let delivered = node.receive([message], start());
    assert!(delivered.is_empty(), "{what}: delivered");
    assert_eq!(node.drops(), [(reason, 1)], "{what}");
    let by_peer = if blamed == Blamed::Peer1 {
        vec![(reason, 1)]
    } else {
        vec![]
    };
    assert_eq!(node.drops_of_peer(1), by_peer, "{what}: peer 1");
    assert!(node.drops_of_peer(3).is_empty(), "{what}: peer 3");
    assert_eq!(node.counted(Count::InboundPackets), 0, "{what}");
    assert!(node.inbound.device().answers.is_empty(), "{what}: answered");
}

/// Receives a message of one packet and checks that it is delivered, and that nothing is counted against it.
pub(crate) fn accepted(node: &mut Node, what: &str, message: Message) {
    let packet = message.bytes.clone();
    let delivered = node.receive([message], start());
    let [(_, delivered)] = &delivered[..] else {
        panic!("{what}: not delivered")
    };
    assert_eq!(delivered.len(), packet.len(), "{what}");
    assert!(checksums_hold(delivered), "{what}");
    assert!(node.drops().is_empty(), "{what}");
}

/// Checks an ICMP error: sender, receiver, type and code, checksum, and that it quotes `offender`.
pub(crate) fn is_error(error: &[u8], from: IpAddr, to: IpAddr, kind: [u8; 2], offender: &[u8]) {
    let ip = IpHeader::parse(error).unwrap();
    assert_eq!((ip.addrs.src(), ip.addrs.dst()), (from, to));
    assert_eq!(error[ip.l4..ip.l4 + 2], kind, "type and code");
    let most = if from.is_ipv4() { 576 } else { 1280 };
    assert!(error.len() <= most);
    let quoted = &error[ip.l4 + 8..];
    assert_eq!(quoted, &offender[..quoted.len()], "the quotation");
    match from {
        // ICMP sums itself alone, ICMPv6 with a pseudo header.
        IpAddr::V4(_) => assert_eq!(kersey::wire::checksum::Sum::of(&error[ip.l4..]).fold(), 0xffff),
        IpAddr::V6(_) => assert!(checksums_hold(error)),
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
