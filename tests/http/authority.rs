//! A certificate authority for a test, and what it issues, as files.

use std::fs;
use std::path::{Path, PathBuf};

use kersey::options::KeyPairFiles;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, date_time_ymd,
};

/// An authority, and the folder its files are in.
pub(crate) struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    /// Its own certificate.
    pub(crate) file: PathBuf,
}

impl Authority {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let file = dir.join(format!("{name}.pem"));
        fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Self {
            dir: dir.to_owned(),
            issuer: Issuer::new(params, key),
            file,
        }
    }

    /// Issues a certificate for `names` (DNS names and addresses); the first is the common name as well.
    pub(crate) fn issue(&self, file: &str, names: &[&str]) -> KeyPairFiles {
        self.issue_with(file, names, |_| {})
    }

    /// The same, of a past that is over.
    pub(crate) fn issue_expired(&self, file: &str, names: &[&str]) -> KeyPairFiles {
        self.issue_with(file, names, |params| {
            params.not_before = date_time_ymd(2020, 1, 1);
            params.not_after = date_time_ymd(2021, 1, 1);
        })
    }

    fn issue_with(
        &self,
        file: &str,
        names: &[&str],
        change: impl Fn(&mut CertificateParams),
    ) -> KeyPairFiles {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params
            .distinguished_name
            .push(DnType::CommonName, names[0].clone());
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        let files = KeyPairFiles {
            cert: self.dir.join(format!("{file}.pem")),
            key: self.dir.join(format!("{file}.key")),
        };
        // Renamed into place, as those do who replace certificates in service.
        let put = |path: &Path, text: String| {
            let new = path.with_extension("new");
            fs::write(&new, text).unwrap();
            fs::rename(new, path).unwrap();
        };
        put(&files.cert, params.signed_by(&key, &self.issuer).unwrap().pem());
        put(&files.key, key.serialize_pem());
        files
    }
}
