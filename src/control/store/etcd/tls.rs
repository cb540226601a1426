//! Certificates and keys for etcd, from files.
//!
//! They are checked when the store is opened, so that a file that is missing, empty or of the wrong kind is named in
//! one sentence instead of in failed handshakes; and read again for each new connection, so that renewed certificates
//! are used without a restart. Files that cannot be read then (deleted, half-written, out of reach after privileges
//! were dropped) leave those of the last time in use.
//!
//! A server is always verified: against the given roots, else the system's; TLS 1.2 at least; the name or address in
//! the URL. There is no switch to turn that off.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use etcd_client::{Certificate, Identity, TlsOptions};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::EtcdOptions;
use crate::control::store::StoreError;
use crate::control::{RateLimit, state_file};

/// Where the system keeps its root certificates, by distribution.
const SYSTEM_ROOTS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// The largest file read; the roots of a whole system have some 200 KB.
const MAX_BYTES: u64 = 4 << 20;

/// What TLS with etcd takes.
pub(super) struct TlsFiles {
    roots: PathBuf,
    /// Certificate and key.
    client: Option<(PathBuf, PathBuf)>,
    last_good: Mutex<TlsOptions>,
    complaints: RateLimit,
}

impl TlsFiles {
    /// Reads and checks the files that `options` name.
    ///
    /// # Errors
    /// A file cannot be read, or does not hold what it should; there are no roots.
    pub(super) fn open(options: &EtcdOptions) -> Result<Self, StoreError> {
        let roots = match &options.cafile {
            Some(path) => path.clone(),
            None => SYSTEM_ROOTS
                .map(PathBuf::from)
                .into_iter()
                .find(|path| path.exists())
                .ok_or_else(|| {
                    refused("this system has no root certificates to verify etcd by; name some with --etcd-cafile")
                })?,
        };
        let client = match (&options.certfile, &options.keyfile) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                return Err(refused("a client certificate and its key need each other"));
            }
        };
        let read = read(&roots, client.as_ref()).map_err(|error| refused(&error))?;
        if let Some((_, key)) = &client {
            warn_if_public(key);
        }
        Ok(Self {
            roots,
            client,
            last_good: Mutex::new(read),
            complaints: RateLimit::default(),
        })
    }

    /// The files as they are, else as they were when they could be read last.
    pub(super) fn current(&self) -> TlsOptions {
        let mut last_good = self.last_good.lock().unwrap_or_else(PoisonError::into_inner);
        match read(&self.roots, self.client.as_ref()) {
            Ok(read) => *last_good = read,
            Err(error) if self.complaints.allows() => {
                tracing::warn!(error, "the certificates read before stay in use");
            }
            Err(_) => {}
        }
        last_good.clone()
    }
}

fn read(roots: &Path, client: Option<&(PathBuf, PathBuf)>) -> Result<TlsOptions, String> {
    let roots_pem = read_file(roots)?;
    let found = certificates(roots, &roots_pem)?;
    let mut store = rustls::RootCertStore::empty();
    let (usable, _) = store.add_parsable_certificates(found);
    if usable == 0 {
        return Err(format!(
            "{}: no certificate in it can be used as a root",
            roots.display()
        ));
    }
    let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(roots_pem));
    if let Some((certificate, key)) = client {
        let (certificate_pem, key_pem) = (read_file(certificate)?, read_file(key)?);
        let chain = certificates(certificate, &certificate_pem)?;
        let private = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|error| format!("{}: no private key in PEM form: {error}", key.display()))?;
        // Whether the two belong together.
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| {
                builder
                    .with_root_certificates(store)
                    .with_client_auth_cert(chain, private)
            })
            .map_err(|error| {
                format!(
                    "the certificate {} and the key {} cannot be used together: {error}",
                    certificate.display(),
                    key.display()
                )
            })?;
        tls = tls.identity(Identity::from_pem(certificate_pem, key_pem));
    }
    Ok(tls)
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    state_file::read_bytes(path, MAX_BYTES)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| format!("{}: not in PEM form: {error}", path.display()))?;
    if found.is_empty() {
        return Err(format!(
            "{}: there is no certificate in PEM form in it",
            path.display()
        ));
    }
    Ok(found)
}

/// What was warned about: file and mode. Each network, and their list, opens the same files.
static WARNED: Mutex<BTreeSet<(PathBuf, u32)>> = Mutex::new(BTreeSet::new());

/// A key that every user of this host can read is no secret.
fn warn_if_public(key: &Path) {
    let Ok(mode) = fs::metadata(key).map(|found| found.permissions().mode() & 0o7777) else {
        return;
    };
    let mut warned = WARNED.lock().unwrap_or_else(PoisonError::into_inner);
    if mode & 0o007 != 0 && warned.insert((key.to_owned(), mode)) {
        tracing::warn!(
            file = %key.display(),
            mode = format!("{mode:04o}"),
            "every user of this host can get at the key; chmod 600 it"
        );
    }
}

fn refused(cause: &str) -> StoreError {
    super::connection::refused("open the store", cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_does_not_hold_what_it_should_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let signed = |name: &str| {
            let made = rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap();
            (made.cert.pem(), made.signing_key.serialize_pem())
        };
        let (certificate, key) = signed("one");
        let (_, other_key) = signed("two");
        for (name, text) in [
            ("ca", certificate.as_str()),
            ("cert", &certificate),
            ("key", &key),
            ("other-key", &other_key),
            ("empty", ""),
            (
                "garbled",
                "-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n",
            ),
        ] {
            fs::write(path(name), text).unwrap();
        }
        let open = |ca: &str, client: Option<(&str, &str)>| {
            let options = EtcdOptions {
                cafile: Some(path(ca)),
                certfile: client.map(|(certificate, _)| path(certificate)),
                keyfile: client.map(|(_, key)| path(key)),
                ..EtcdOptions::default()
            };
            TlsFiles::open(&options)
                .map(drop)
                .map_err(|error| error.to_string())
        };
        assert_eq!(open("ca", None), Ok(()));
        assert_eq!(open("ca", Some(("cert", "key"))), Ok(()));
        for (ca, client, named) in [
            ("missing", None, "missing"),
            ("empty", None, "empty"),
            ("garbled", None, "garbled"),
            ("key", None, "key"),
            ("ca", Some(("missing", "key")), "missing"),
            ("ca", Some(("cert", "missing")), "missing"),
            ("ca", Some(("cert", "cert")), "cert"),
            ("ca", Some(("empty", "key")), "empty"),
            ("ca", Some(("cert", "other-key")), "other-key"),
        ] {
            let error = open(ca, client).unwrap_err();
            assert!(
                error.contains(&path(named).display().to_string()),
                "{ca} {client:?}: {error}"
            );
        }
    }

    #[test]
    fn a_key_that_everybody_can_read_is_warned_about() {
        let dir = tempfile::tempdir().unwrap();
        let made = rcgen::generate_simple_self_signed(vec!["one".to_owned()]).unwrap();
        let (certificate, key) = (dir.path().join("cert"), dir.path().join("the-key"));
        fs::write(&certificate, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let options = EtcdOptions {
            cafile: Some(certificate.clone()),
            certfile: Some(certificate),
            keyfile: Some(key.clone()),
            ..EtcdOptions::default()
        };
        for (mode, warned) in [(0o600, false), (0o640, false), (0o644, true), (0o604, true)] {
            fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
            let log = Log::default();
            let subscriber = tracing_subscriber::fmt().with_writer(log.clone()).finish();
            tracing::subscriber::with_default(subscriber, || TlsFiles::open(&options).map(drop)).unwrap();
            let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
            assert_eq!(
                text.contains("the-key") && text.contains("chmod 600"),
                warned,
                "{mode:o}: {text}"
            );
        }
    }

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'a> tracing_subscriber::fmt::MakeWriter<'a> for Log {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn what_cannot_be_read_later_does_not_take_away_what_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let made = rcgen::generate_simple_self_signed(vec!["one".to_owned()]).unwrap();
        fs::write(&ca, made.cert.pem()).unwrap();
        let options = EtcdOptions {
            cafile: Some(ca.clone()),
            ..EtcdOptions::default()
        };
        let files = TlsFiles::open(&options).unwrap();
        let before = format!("{:?}", files.current());
        fs::remove_file(&ca).unwrap();
        assert_eq!(format!("{:?}", files.current()), before);
    }
}
