//! Whose certificate it is: the names in it.
//!
//! A certificate's names are the common name of its subject and its alternative names of kind DNS and URI. Only ask of a
//! certificate that was verified: names in others mean nothing.

use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;

/// The object identifier of a common name, 2.5.4.3, in DER.
const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];
/// DER tags.
const SET: u8 = 0x31;
const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const IA5_STRING: u8 = 0x16;

/// A name in a certificate, with its kind: an authority that lets clients choose one kind freely need not let them choose another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// A common name of the subject: any text.
    Common(String),
    /// A DNS name.
    Dns(String),
    /// A URI, such as a SPIFFE identity.
    Uri(String),
}

/// The names in `certificate`: common names first, then alternative names. Empty if it cannot be read.
pub fn names(certificate: &CertificateDer<'_>) -> Vec<Name> {
    let Ok(parsed) = EndEntityCert::try_from(certificate) else {
        return Vec::new();
    };
    let common = common_names(parsed.subject()).into_iter().map(Name::Common);
    let dns = parsed.valid_dns_names().map(|name| Name::Dns(name.to_owned()));
    let uris = parsed.valid_uri_names().map(|name| Name::Uri(name.to_owned()));
    common.chain(dns).chain(uris).collect()
}

/// The common names of a distinguished name, given as the contents of its outer sequence: sets of pairs of identifier and
/// text (RFC 5280 §4.1.2.4).
fn common_names(mut subject: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    while let Some((SET, mut pairs, rest)) = element(subject) {
        subject = rest;
        while let Some((SEQUENCE, pair, rest)) = element(pairs) {
            pairs = rest;
            let Some((OBJECT_IDENTIFIER, kind, value)) = element(pair) else {
                continue;
            };
            if kind != COMMON_NAME {
                continue;
            }
            if let Some((UTF8_STRING | PRINTABLE_STRING | IA5_STRING, text, _)) = element(value)
                && let Ok(text) = std::str::from_utf8(text)
            {
                names.push(text.to_owned());
            }
        }
    }
    names
}

/// Reads one DER element: tag, contents, what follows.
fn element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (len, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        // The long form: as many bytes of length as the low bits say; a subject needs no more than two.
        let count = usize::from(first & 0x7f);
        if count == 0 || count > 2 {
            return None;
        }
        let (digits, rest) = rest.split_at_checked(count)?;
        let len = digits.iter().fold(0, |len, &digit| len << 8 | usize::from(digit));
        (len, rest)
    };
    let (contents, rest) = rest.split_at_checked(len)?;
    Some((tag, contents, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    use super::*;

    #[test]
    fn common_and_alternative_names_are_found() {
        let mut params = CertificateParams::new(vec!["node-1.example".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationName, "nodes");
        params
            .distinguished_name
            .push(DnType::CommonName, "Node, first of its name");
        let uri = SanType::URI("spiffe://example/node/1".try_into().unwrap());
        params.subject_alt_names.push(uri);
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(
            names(certificate.der()),
            [
                Name::Common("Node, first of its name".to_owned()),
                Name::Dns("node-1.example".to_owned()),
                Name::Uri("spiffe://example/node/1".to_owned()),
            ]
        );
    }

    #[test]
    fn long_names_are_read() {
        let long = "x".repeat(300);
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, long.clone());
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        assert_eq!(names(certificate.der())[0], Name::Common(long));
    }

    #[test]
    fn what_is_no_certificate_has_no_names() {
        assert!(names(&CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])).is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = common_names(&bytes);
        }
    }
}
