//! Packets where all have to be signed: rightly, and not.

use std::net::Ipv6Addr;

use kersey::wire::ip::V6_LEN;
use kersey::wire::srv6::{Encapsulation, HmacAlgorithm, HmacKey, Mode};

use super::Siege;
use super::cases::{Case, ROUTING, V4, V6, endpoint, queue};
use super::packets::{from_peer, sid, srh};

/// What all nodes have as key 7.
pub(super) const SECRET: &str = "what all nodes know";

/// The key of the network.
pub(super) fn key() -> HmacKey {
    HmacKey::new(7, HmacAlgorithm::Sha256, SECRET.as_bytes()).unwrap()
}

impl Siege {
    /// As all packets are where HMACs are required, and what is inside.
    pub(super) fn signed(&self) -> (Vec<u8>, Vec<u8>) {
        let (v4, _) = self.inner();
        (self.signed_by(&key(), Mode::Full, &[sid(2, "1")]), v4)
    }

    pub(super) fn signed_by(&self, key: &HmacKey, mode: Mode, segments: &[Ipv6Addr]) -> Vec<u8> {
        let (v4, _) = self.inner();
        let template = Encapsulation {
            mode,
            source: sid(1, "1"),
            segments,
            next_header: V4,
            hmac: Some(key),
        };
        let template = template.template().unwrap();
        let mut packet = vec![0; template.len()];
        template.push(&mut packet, v4.len(), 0, 1);
        packet.extend(&v4);
        packet
    }

    /// What must not pass where HMACs are required.
    pub(super) fn hmac_lies(&self) -> Vec<Case> {
        let (v4, v6) = self.inner();
        let ours = sid(2, "1");
        let (right, _) = self.signed();
        let changed = |at: usize, value: u8| {
            let mut packet = right.clone();
            packet[at] = value;
            packet
        };
        let listed = [&srh(V4, 0, &[ours], &[])[..], &v4].concat();
        let redirected = {
            let mut packet = right.clone();
            packet[24..V6_LEN].copy_from_slice(&sid(2, "d4").octets());
            packet
        };
        let replayed = {
            let mut packet = right.clone();
            packet[8..24].copy_from_slice(&sid(3, "1").octets());
            packet
        };
        let by = |id, algorithm, secret: &str| {
            let key = HmacKey::new(id, algorithm, secret.as_bytes()).unwrap();
            self.signed_by(&key, Mode::Full, &[ours])
        };
        let waypoint = [sid(2, "e"), sid(3, "1")];
        let forged = HmacKey::new(7, HmacAlgorithm::Sha256, b"a guess").unwrap();
        let onward = [&srh(V4, 1, &[sid(3, "1"), sid(2, "e")], &[])[..], &v4].concat();
        vec![
            queue("no list", "hmac_missing", from_peer("1", V4, &v4)),
            queue("no list, IPv6", "hmac_missing", from_peer("1", V6, &v6)),
            queue("no HMAC", "hmac_missing", from_peer("1", ROUTING, &listed)),
            queue(
                "another secret",
                "hmac_wrong",
                by(7, HmacAlgorithm::Sha256, "a guess"),
            ),
            queue(
                "another algorithm",
                "hmac_wrong",
                by(7, HmacAlgorithm::Sha1, SECRET),
            ),
            queue(
                "an unknown key",
                "hmac_unknown_key",
                by(8, HmacAlgorithm::Sha256, SECRET),
            ),
            queue(
                "a changed code",
                "hmac_wrong",
                changed(V6_LEN + 40, !right[V6_LEN + 40]),
            ),
            queue("a changed list", "hmac_wrong", changed(V6_LEN + 23, 2)),
            queue("a changed flag", "hmac_wrong", changed(V6_LEN + 5, 0)),
            queue("to another SID", "hmac_wrong", redirected),
            queue("from another node", "hmac_wrong", replayed),
            endpoint(
                "no HMAC at a waypoint",
                "hmac_missing",
                from_peer("e", ROUTING, &onward),
            ),
            endpoint(
                "a forged one at a waypoint",
                "hmac_wrong",
                self.signed_by(&forged, Mode::Full, &waypoint),
            ),
            endpoint(
                "a forged reduced one at a waypoint",
                "hmac_wrong",
                self.signed_by(&forged, Mode::Reduced, &waypoint),
            ),
        ]
    }
}
