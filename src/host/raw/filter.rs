//! Which packets a raw socket gets: the picture in [`raw`](super), as a program for the kernel.

use super::program::{Label, Program, op};
use super::{Audience, LOOPBACK, RawOptions};
use crate::host::sys::{self, BpfInstruction};
use crate::wire::srv6::next_header;

/// Where a header field lies for a filter: counted from the outer IPv6 header, wherever the packet itself is taken to begin.
const OUTER: u32 = sys::BPF_NET_OFFSET;
/// Next header and destination address in the IPv6 header, RFC 8200 §3.
const NEXT_HEADER: u32 = OUTER + 6;
const DESTINATION: u32 = OUTER + 24;
/// Extension headers looked through for a routing header; packets with more are the endpoint's.
const MAX_EXTENSIONS: usize = 4;
/// Routing header: next header, length, type, segments left (RFC 8754 §2).
const SRH_NEXT_HEADER: u32 = 0;
const SRH_LENGTH: u32 = 1;
const SRH_TYPE: u32 = 2;
const SRH_SEGMENTS_LEFT: u32 = 3;
/// What stands behind the outer header is no shorter than an IPv4 header.
const SHORTEST: u32 = 20;
/// Length of an IPv6 header.
const V6_LEN: u32 = 40;

/// Builds the filter of a socket; see the picture of the module above.
pub(super) fn filter(
    options: &RawOptions,
    interface: u32,
    protocol: u8,
    audience: Audience,
) -> Vec<BpfInstruction> {
    let mut program = Program::default();
    let ends = program.label();
    let endpoint = program.label();
    let nobody = program.label();
    let (ours, elsewhere) = (program.label(), program.label());
    program.push(op::LOAD_WORD, sys::BPF_INTERFACE);
    program.jump_if(interface, ours);
    program.jump_unless(LOOPBACK, elsewhere);
    program.place(ours);
    for &sid in &options.ends {
        program.jump_if_prefix(DESTINATION, sid, 128, ends);
    }
    program.place(elsewhere);
    for &locator in &options.locators {
        program.jump_if_prefix(DESTINATION, locator.addr(), locator.len(), endpoint);
    }
    program.jump(nobody);

    program.place(ends);
    // A load past the end rejects; the endpoint counts what is that short.
    let whole = program.label();
    program.push(op::LOAD_LENGTH, 0);
    program.jump_if_at_least(SHORTEST, whole);
    program.jump(endpoint);
    program.place(whole);
    if protocol == next_header::ROUTING {
        let good = program.label();
        program.load_byte(SRH_TYPE);
        program.jump_unless(4, endpoint);
        program.load_byte(SRH_SEGMENTS_LEFT);
        program.jump_unless(0, endpoint);
        program.load_byte(SRH_NEXT_HEADER);
        // An echo request to the SID is the endpoint's; options may come before the inner packet.
        for next in [next_header::IPV4, next_header::IPV6, next_header::DESTINATION] {
            program.jump_if(u32::from(next), good);
        }
        program.jump(endpoint);
        program.place(good);
    } else {
        program.jump_if_routed(protocol, nobody, endpoint);
    }
    match audience {
        Audience::Endpoint => program.reject(),
        Audience::Queue(_) if options.queues <= 1 => program.accept(),
        Audience::Queue(queue) => {
            program.hash_inner(protocol);
            program.modulo(u32::try_from(options.queues).unwrap_or(1));
            let mine = program.label();
            program.jump_if(u32::try_from(queue).unwrap_or(0), mine);
            program.reject();
            program.place(mine);
            program.accept();
        }
    }

    program.place(endpoint);
    match audience {
        Audience::Endpoint => program.accept(),
        Audience::Queue(_) => program.reject(),
    }
    program.place(nobody);
    program.reject();
    program.assemble()
}

impl Program {
    /// Jumps to `routed` if a routing header stands before `protocol`, to `unknown` if that cannot be told.
    ///
    /// The kernel skips routing headers of types it does not know and that have no segments left (RFC 8200 §4.4), and goes on to what
    /// is behind them.
    fn jump_if_routed(&mut self, protocol: u8, routed: Label, unknown: Label) {
        const NEXT: u32 = 0;
        let direct = self.label();
        self.load_byte(NEXT_HEADER);
        self.jump_if(u32::from(protocol), direct);
        self.push(op::LOAD_X, V6_LEN);
        for _ in 0..MAX_EXTENSIONS {
            let walk = self.label();
            self.jump_if(u32::from(next_header::ROUTING), routed);
            // A fragment header that is still there is that of a whole packet; its second byte is reserved and 0.
            for next in [
                next_header::HOP_BY_HOP,
                next_header::DESTINATION,
                next_header::FRAGMENT,
            ] {
                self.jump_if(u32::from(next), walk);
            }
            self.jump(unknown);
            self.place(walk);
            self.push(op::LOAD_BYTE_AT_X, OUTER);
            self.push(op::STORE, NEXT);
            self.push(op::LOAD_BYTE_AT_X, OUTER + 1);
            self.push(op::ADD, 1);
            self.push(op::MULTIPLY, 8);
            self.push(op::ADD_X, 0);
            self.push(op::A_TO_X, 0);
            self.push(op::LOAD_MEMORY, NEXT);
            self.jump_if(u32::from(protocol), direct);
        }
        self.jump(unknown);
        self.place(direct);
    }

    /// Leaves a hash of the inner addresses in the accumulator; inner packets of one flow have one. That of a packet too short to have
    /// addresses is 0: somebody must count it.
    fn hash_inner(&mut self, protocol: u8) {
        const START: u32 = 0;
        const SUM: u32 = 1;
        if protocol == next_header::ROUTING {
            // The inner packet starts behind the routing header: (length + 1) * 8.
            self.load_byte(SRH_LENGTH);
            self.push(op::ADD, 1);
            self.push(op::MULTIPLY, 8);
            self.push(op::A_TO_X, 0);
        } else {
            self.push(op::LOAD_X, 0);
        }
        self.push(op::STORE_X, START);
        let (v4, done, short) = (self.label(), self.label(), self.label());
        self.jump_unless_left(SHORTEST, short);
        self.push(op::LOAD_BYTE_AT_X, 0);
        self.push(op::AND, 0xf0);
        self.jump_if(0x40, v4);
        self.jump_unless_left(V6_LEN, short);
        self.xor_words(&[12, 16, 20, 28, 32, 36], START, SUM);
        self.jump(done);
        self.place(v4);
        self.xor_words(&[12, 16], START, SUM);
        self.jump(done);
        self.place(short);
        self.push(op::LOAD, 0);
        self.place(done);
        // The last bits of addresses differ most; spread them.
        self.push(op::MULTIPLY, 0x9e37_79b1);
        self.push(op::SHIFT_RIGHT, 16);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;
    use crate::wire::srv6::{Encapsulation, Mode};

    /// Runs a program as the kernel would: `None` for one that ends badly, which rejects.
    fn accepts(program: &[BpfInstruction], outer: &[u8], payload: &[u8]) -> bool {
        let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0);
        loop {
            let BpfInstruction {
                code,
                when_true,
                when_false,
                k,
            } = program[at];
            at += 1;
            let load = |offset: u32, len: usize| {
                if offset == sys::BPF_INTERFACE {
                    return Some(INTERFACE);
                }
                let (bytes, offset) = match offset.checked_sub(OUTER) {
                    Some(offset) => (outer, offset),
                    None => (payload, offset),
                };
                let field = bytes.get(offset as usize..offset as usize + len)?;
                Some(field.iter().fold(0, |sum, &byte| sum << 8 | u32::from(byte)))
            };
            let loaded = match code {
                op::LOAD_WORD => load(k, 4),
                op::LOAD_BYTE => load(k, 1),
                op::LOAD_WORD_AT_X => load(x + k, 4),
                op::LOAD_BYTE_AT_X => load(x + k, 1),
                op::LOAD_LENGTH => Some(payload.len() as u32),
                op::LOAD => Some(k),
                op::LOAD_MEMORY => Some(memory[k as usize]),
                _ => Some(a),
            };
            let Some(loaded) = loaded else { return false };
            a = loaded;
            match code {
                op::LOAD_X => x = k,
                op::LOAD_X_MEMORY => x = memory[k as usize],
                op::STORE => memory[k as usize] = a,
                op::STORE_X => memory[k as usize] = x,
                op::A_TO_X => x = a,
                op::XOR_X => a ^= x,
                op::ADD => a = a.wrapping_add(k),
                op::ADD_X => a = a.wrapping_add(x),
                op::SUBTRACT_X => a = a.wrapping_sub(x),
                op::MULTIPLY => a = a.wrapping_mul(k),
                op::AND => a &= k,
                op::SHIFT_RIGHT => a >>= k,
                op::MODULO => a %= k,
                op::JUMP => at += k as usize,
                op::JUMP_EQUAL => at += usize::from(if a == k { when_true } else { when_false }),
                op::JUMP_AT_LEAST => at += usize::from(if a >= k { when_true } else { when_false }),
                op::JUMP_AT_LEAST_X => at += usize::from(if a >= x { when_true } else { when_false }),
                op::RETURN => return k != 0,
                _ => {}
            }
        }
    }

    /// The underlay's, and the one all packets here come by.
    const INTERFACE: u32 = 7;

    fn options(queues: usize) -> RawOptions {
        RawOptions {
            interface: "eth0".into(),
            locators: vec!["fd00:0:1::/48".parse().unwrap()],
            ends: vec!["fd00:0:1::1".parse().unwrap()],
            source: Ipv6Addr::UNSPECIFIED,
            queues,
        }
    }

    /// Who gets a packet: the queues by number, and the endpoint.
    fn audience(queues: usize, protocol: u8, to: &str, payload: &[u8]) -> (Vec<usize>, bool) {
        let mut outer = [0; 40];
        outer[6] = protocol;
        outer[24..].copy_from_slice(&to.parse::<Ipv6Addr>().unwrap().octets());
        let options = options(queues);
        let gets = |audience| accepts(&filter(&options, INTERFACE, protocol, audience), &outer, payload);
        let queues = (0..queues).filter(|&queue| gets(Audience::Queue(queue)));
        (queues.collect(), gets(Audience::Endpoint))
    }

    fn inner(last: u8) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[10, 244, 1, last, 10, 244, 2, last.wrapping_mul(7)]);
        packet
    }

    /// A routing header of two segments, `left` of them to go, before an inner packet.
    fn routed(left: u8, next: u8, inner: &[u8]) -> Vec<u8> {
        let segments = [Ipv6Addr::from(1), Ipv6Addr::from(2)];
        let full = Encapsulation {
            mode: Mode::Full,
            source: Ipv6Addr::from(3),
            segments: &segments,
            next_header: next,
            hmac: None,
        };
        let mut srh = full.template().unwrap().as_bytes()[40..].to_vec();
        srh[usize::try_from(SRH_SEGMENTS_LEFT).unwrap()] = left;
        [&srh, inner].concat()
    }

    #[test]
    fn each_packet_is_for_one_audience() {
        const V4: u8 = next_header::IPV4;
        const SRH: u8 = next_header::ROUTING;
        let mut other_type = routed(0, V4, &inner(1));
        other_type[2] = 2;
        let (queue, endpoint, nobody) = ((vec![0], false), (vec![], true), (vec![], false));
        for (what, protocol, to, payload, expected) in [
            ("ends here", V4, "fd00:0:1::1", inner(1), &queue),
            (
                "ends here behind an SRH",
                SRH,
                "fd00:0:1::1",
                routed(0, V4, &inner(1)),
                &queue,
            ),
            (
                "options behind it",
                SRH,
                "fd00:0:1::1",
                routed(0, 60, &inner(1)),
                &queue,
            ),
            ("goes on", SRH, "fd00:0:1::1", routed(1, V4, &inner(1)), &endpoint),
            (
                "an echo request",
                SRH,
                "fd00:0:1::1",
                routed(0, 58, &inner(1)),
                &endpoint,
            ),
            ("another routing type", SRH, "fd00:0:1::1", other_type, &endpoint),
            ("too short", V4, "fd00:0:1::1", vec![0x45; 19], &endpoint),
            ("a short SRH", SRH, "fd00:0:1::1", vec![4, 0], &endpoint),
            ("another SID", V4, "fd00:0:1::e", inner(1), &endpoint),
            ("no SID of ours", V4, "fd00:0:2::1", inner(1), &nobody),
        ] {
            assert_eq!(&audience(1, protocol, to, &payload), expected, "{what}");
        }
    }

    #[test]
    fn queues_share_flows_and_each_flow_has_one() {
        for wrap in [
            |packet: Vec<u8>| (next_header::IPV4, packet),
            |packet: Vec<u8>| (next_header::ROUTING, routed(0, next_header::IPV4, &packet)),
        ] {
            let mut shares = [0; 3];
            for last in 0..200 {
                let (protocol, payload) = wrap(inner(last));
                let (queues, endpoint) = audience(3, protocol, "fd00:0:1::1", &payload);
                assert_eq!((queues.len(), endpoint), (1, false), "{last}");
                shares[queues[0]] += 1;
            }
            assert!(shares.iter().all(|&share| share > 30), "{shares:?}");
        }
    }
}
