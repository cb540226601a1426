//! The HMAC of a segment routing header, RFC 8754 §2.1.2: who wrote the list knows a secret that we know too.

use std::fmt;
use std::net::Ipv6Addr;

use ::hmac::{Hmac, Mac};
use sha1::Sha1;
use sha2::Sha256;
use thiserror::Error;

/// The HMAC TLV, RFC 8754 §2.1.2: `| type 8 = 5 | length 8 = 38 | D 1 | reserved 15 | key id 32 | value 256 |`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HmacTlv<'a> {
    /// The D bit: the list is reduced, so the destination is not to be compared with it.
    pub destination_unverified: bool,
    /// Which key.
    pub key_id: u32,
    /// The message authentication code; shorter ones are filled up with zeros.
    pub value: &'a [u8; HmacTlv::CODE_LEN],
}

impl<'a> HmacTlv<'a> {
    /// Length of the whole TLV, bytes.
    pub const LEN: usize = 2 + Self::VALUE_LEN;
    /// Length of the code, bytes.
    pub const CODE_LEN: usize = 32;
    /// What the length field says.
    pub(super) const VALUE_LEN: usize = 2 + 4 + Self::CODE_LEN;

    pub(super) fn parse(value: &'a [u8]) -> Option<Self> {
        let (&[d, _, k0, k1, k2, k3], code) = value.split_first_chunk::<6>()?;
        Some(Self {
            destination_unverified: d & 0x80 != 0,
            key_id: u32::from_be_bytes([k0, k1, k2, k3]),
            value: code.first_chunk()?,
        })
    }
}

/// Why a header is not authentic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HmacError {
    /// It has no HMAC.
    Missing,
    /// There is no key of that number.
    UnknownKey,
    /// The code is another.
    Wrong,
}

/// What an HMAC is computed over.
pub(super) struct HmacText<'a> {
    pub(super) source: Ipv6Addr,
    pub(super) last_entry: u8,
    pub(super) flags: u8,
    pub(super) list: &'a [u8],
}

impl HmacText<'_> {
    fn into<M: Mac>(&self, mut mac: M, key_id: u32) -> M {
        mac.update(&self.source.octets());
        mac.update(&[self.last_entry, self.flags]);
        mac.update(&key_id.to_be_bytes());
        mac.update(self.list);
        mac
    }
}

/// How a code is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HmacAlgorithm {
    /// HMAC-SHA-256, the one RFC 8754 names.
    Sha256,
    /// HMAC-SHA-1, which Linux has besides; 20 bytes and 12 zeros.
    Sha1,
}

/// A secret shared with other nodes, and its number. The secret cannot be got out again.
#[derive(Clone)]
pub struct HmacKey {
    id: u32,
    keyed: Keyed,
}

#[derive(Clone)]
enum Keyed {
    Sha256(Hmac<Sha256>),
    Sha1(Hmac<Sha1>),
}

/// The secret is empty or longer than 64 bytes, which is all that Linux takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("an HMAC secret has 1 to {max} bytes, not {0}", max = HmacKey::MAX_SECRET)]
pub struct SecretLength(usize);

impl HmacKey {
    /// The longest secret, bytes.
    pub const MAX_SECRET: usize = 64;

    /// A key.
    ///
    /// # Errors
    /// The secret is empty or too long.
    pub fn new(id: u32, algorithm: HmacAlgorithm, secret: &[u8]) -> Result<Self, SecretLength> {
        let wrong = SecretLength(secret.len());
        if secret.is_empty() || secret.len() > Self::MAX_SECRET {
            return Err(wrong);
        }
        let keyed = match algorithm {
            HmacAlgorithm::Sha256 => Keyed::Sha256(Hmac::new_from_slice(secret).map_err(|_| wrong)?),
            HmacAlgorithm::Sha1 => Keyed::Sha1(Hmac::new_from_slice(secret).map_err(|_| wrong)?),
        };
        Ok(Self { id, keyed })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn code(&self, text: &HmacText<'_>) -> [u8; HmacTlv::CODE_LEN] {
        match &self.keyed {
            Keyed::Sha256(mac) => text.into(mac.clone(), self.id).finalize().into_bytes().into(),
            Keyed::Sha1(mac) => {
                let mut code = [0; HmacTlv::CODE_LEN];
                let short = text.into(mac.clone(), self.id).finalize().into_bytes();
                code[..short.len()].copy_from_slice(&short);
                code
            }
        }
    }

    pub(super) fn verifies(&self, text: &HmacText<'_>, code: &[u8; HmacTlv::CODE_LEN]) -> bool {
        match &self.keyed {
            Keyed::Sha256(mac) => text.into(mac.clone(), self.id).verify_slice(code).is_ok(),
            Keyed::Sha1(mac) => {
                let (short, zeros) = code.split_at(20);
                let right = text.into(mac.clone(), self.id).verify_slice(short).is_ok();
                right & zeros.iter().all(|&byte| byte == 0)
            }
        }
    }
}

impl fmt::Debug for HmacKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HmacKey")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ip::V6_LEN;
    use crate::wire::srv6::{Encapsulation, Mode, Srh, next_header};

    #[test]
    fn a_code_depends_on_everything_it_is_over() {
        let key = HmacKey::new(17, HmacAlgorithm::Sha256, b"test-secret-0123").unwrap();
        let other = HmacKey::new(17, HmacAlgorithm::Sha256, b"test-secret-0124").unwrap();
        let source = sid("fd00::1");
        for mode in [Mode::Full, Mode::Reduced] {
            let template = Encapsulation {
                mode,
                source,
                segments: &[sid("fd00:2::1"), sid("fd00:3::1")],
                next_header: next_header::IPV6,
                hmac: Some(&key),
            }
            .template()
            .unwrap();
            let bytes = &template.as_bytes()[V6_LEN..];
            let srh = Srh::parse(bytes).unwrap();
            let hmac = srh.hmac().unwrap();
            assert_eq!(hmac.destination_unverified, mode == Mode::Reduced);
            assert_eq!(srh.verify(source, |id| (id == 17).then_some(&key)), Ok(()));
            assert_eq!(srh.verify(source, |_| None), Err(HmacError::UnknownKey));
            assert_eq!(srh.verify(source, |_| Some(&other)), Err(HmacError::Wrong));
            assert_eq!(srh.verify(sid("fd00::2"), |_| Some(&key)), Err(HmacError::Wrong));
            // Next header, segments left and tag may change on the way; type and length are what makes it an SRH.
            let code = bytes.len() - HmacTlv::CODE_LEN;
            for at in [5].into_iter().chain(8..code - 8).chain(code..bytes.len()) {
                let mut forged = bytes.to_vec();
                forged[at] ^= 1;
                let srh = Srh::parse(&forged).unwrap();
                let verified = srh.verify(source, |_| Some(&key));
                assert_eq!(verified, Err(HmacError::Wrong), "byte {at}");
            }
        }
    }

    #[test]
    fn a_short_code_is_filled_up_with_zeros() {
        let key = HmacKey::new(18, HmacAlgorithm::Sha1, b"test-secret-0123").unwrap();
        let source = sid("fd00::1");
        let template = Encapsulation {
            mode: Mode::Full,
            source,
            segments: &[sid("fd00:2::1")],
            next_header: next_header::IPV4,
            hmac: Some(&key),
        }
        .template()
        .unwrap();
        let mut bytes = template.as_bytes()[V6_LEN..].to_vec();
        assert!(bytes.ends_with(&[0; 12]) && !bytes.ends_with(&[0; 13]));
        let keys = |_| Some(&key);
        assert_eq!(Srh::parse(&bytes).unwrap().verify(source, keys), Ok(()));
        *bytes.last_mut().unwrap() = 1;
        assert_eq!(
            Srh::parse(&bytes).unwrap().verify(source, keys),
            Err(HmacError::Wrong)
        );
    }

    #[test]
    fn a_secret_stays_secret_and_has_a_length() {
        let key = HmacKey::new(7, HmacAlgorithm::Sha256, b"AAAAAAAA").unwrap();
        assert_eq!(format!("{key:?}"), "HmacKey { id: 7, .. }");
        assert_eq!(key.id(), 7);
        for len in [0, 65] {
            assert!(
                HmacKey::new(7, HmacAlgorithm::Sha1, &vec![1; len]).is_err(),
                "{len} bytes"
            );
        }
    }

    fn sid(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }
}
