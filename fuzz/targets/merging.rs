//! Merging segments back into super-packets.

use std::collections::BTreeMap;

use etherparse::PacketBuilder;
use kersey::dataplane::coalesce::{Coalescer, MAX_SLICES, Merge, Offer, Trust};
use kersey::dataplane::forward::flow_hash;
use kersey::dataplane::offload::SuperPacket;
use kersey::wire::checksum::Sum;
use kersey::wire::ip::IpHeader;
use kersey::wire::transport::tcp;
use kersey::wire::virtio::VirtioHeader;

use super::checksums_hold;
use super::nodes::split;

/// A batch of TCP and UDP packets made from a script of 4 bytes a packet: splitting what was coalesced gives every flow back.
pub(super) fn gro_coalesce(data: &[u8]) {
    let mut flows = [Flow::default(); 4];
    let mut buffer = Vec::new();
    let mut offers = Vec::new();
    let mut expected: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for op in data.as_chunks::<4>().0.iter().take(200) {
        let packet = scripted(*op, &mut flows);
        let ip = IpHeader::parse(&packet).expect("made by hand");
        let trust = if op[0] & 0x80 != 0 && checksums_hold(&packet) {
            Trust::Verified
        } else {
            Trust::Unverified
        };
        offers.push(Offer {
            at: buffer.len(),
            ip,
            trust,
            flow: flow_hash(&ip, &packet),
            unfinished: None,
        });
        buffer.extend_from_slice(&packet);
        expected
            .entry(flow_key(&packet))
            .or_default()
            .push(comparable(&packet));
    }
    let mut coalescer = Coalescer::new(Merge { tcp: true, udp: true });
    for offer in offers {
        coalescer.offer(&buffer, offer);
    }
    coalescer.finish(&buffer);
    let mut found: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for index in 0..coalescer.len() {
        let mut slices = [std::io::IoSlice::new(&[]); MAX_SLICES];
        let filled = coalescer.slices(index, &buffer, &mut slices);
        let frame: Vec<u8> = slices[..filled]
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect();
        let (header, packet) = VirtioHeader::parse(&frame).expect("a frame has a header");
        let parts = match header.gso {
            None => vec![packet.to_vec()],
            Some(gso) => {
                let ip = IpHeader::parse(packet).expect("a merged frame is a packet");
                assert_eq!(ip.total_len, packet.len());
                split(
                    &SuperPacket::new(packet, ip, gso).expect("and a super-packet"),
                    packet,
                )
                .expect("segments of a merged frame fit")
            }
        };
        assert_eq!(parts.len(), coalescer.segments(index));
        for part in parts {
            found.entry(flow_key(&part)).or_default().push(comparable(&part));
        }
    }
    assert!(found == expected, "every flow as it was");
}

/// Where a scripted flow stands.
#[derive(Clone, Copy, Default)]
struct Flow {
    seq: u32,
    id: u16,
}

/// Makes the next packet of a script: `[flow and oddities, size, more oddities, value]`.
fn scripted([which, size, odd, value]: [u8; 4], flows: &mut [Flow; 4]) -> Vec<u8> {
    let number = usize::from(which & 3);
    let flow = &mut flows[number];
    let payload = vec![value; usize::from(size)];
    if odd & 1 != 0 {
        flow.seq = flow.seq.wrapping_add(u32::from(value));
    }
    let (v4, udp) = (number & 1 == 0, number & 2 != 0);
    let ttl = if odd & 2 != 0 { 63 } else { 64 };
    let builder = match v4 {
        true => PacketBuilder::ipv4([10, 244, 1, 2], [10, 244, 2, 2], ttl),
        false => PacketBuilder::ipv6([0xfd; 16], [0xfc; 16], ttl),
    };
    let mut packet = Vec::new();
    let written = if udp {
        builder.udp(1000, 2000).write(&mut packet, &payload)
    } else {
        let ack = if odd & 4 != 0 { 78 } else { 77 };
        let stamp = if odd & 8 != 0 { value } else { 1 };
        let builder = builder.tcp(40_000, 5201, flow.seq, 500).ack(ack);
        let builder = builder
            .options_raw(&[1, 1, 8, 10, stamp, 2, 3, 4, 5, 6, 7, 8])
            .expect("12 bytes of options");
        builder.write(&mut packet, &payload)
    };
    written.expect("a vector takes all");
    flow.seq = flow.seq.wrapping_add(u32::from(size));
    let l4 = if v4 { 20 } else { 40 };
    if v4 {
        if odd & 16 != 0 {
            flow.id = flow.id.wrapping_add(u16::from(value));
        }
        packet[4..6].copy_from_slice(&flow.id.to_be_bytes());
        packet[6] = if odd & 32 != 0 { 0x40 } else { 0 };
        packet[10..12].fill(0);
        let sum = Sum::of(&packet[..20]).finish();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        // Some senders count, some stay at one value.
        flow.id = flow.id.wrapping_add(u16::from(which & 0x40 == 0));
    }
    if !udp {
        let flags = match which >> 2 & 7 {
            0..=3 => tcp::ACK_FLAG,
            4 => tcp::ACK_FLAG | tcp::PSH,
            5 => tcp::ACK_FLAG | tcp::FIN,
            6 => tcp::ACK_FLAG | tcp::ECE,
            _ => tcp::ACK_FLAG | tcp::CWR,
        };
        packet[l4 + tcp::FLAGS] = flags;
        packet[l4..][tcp::CHECKSUM].fill(0);
        let ip = IpHeader::parse(&packet).expect("made by hand");
        let sum = (ip.pseudo(ip.l4_len()) + Sum::of(&packet[l4..])).finish();
        packet[l4..][tcp::CHECKSUM].copy_from_slice(&sum.to_be_bytes());
    }
    if odd & 64 != 0 {
        // A bit lost on the way: the checksum no longer holds.
        let last = packet.len() - 1;
        packet[last] ^= 1;
    }
    packet
}

/// Addresses, protocol and ports.
fn flow_key(packet: &[u8]) -> Vec<u8> {
    let (addresses, next, l4) = if packet[0] >> 4 == 4 {
        (12..20, 9, 20)
    } else {
        (8..40, 6, 40)
    };
    [&packet[addresses], &packet[next..=next], &packet[l4..l4 + 4]].concat()
}

/// A packet without what merging may change: the identification under DF, and the header checksum over it.
fn comparable(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}
