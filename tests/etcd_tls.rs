//! S10: TLS with etcd fails closed. Nobody who is not who they should be hears a word of ours.
//!
//! The impostors are made here: each notes every byte it is told, and those that get through a TLS handshake every byte
//! that came inside. The password must not be among them.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test says what went wrong by panicking"
)]

mod etcd_server;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use etcd_server::Tls;
use etcd_server::pki::{Authority, Identity, self_signed};
use kersey::control::store::{EtcdOptions, EtcdStore, Store, StoreError};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

const CONFIG: &str = r#"{"Network":"10.0.0.0/16"}"#;
const PASSWORD: &str = "canary-hunter2";

#[tokio::test]
async fn an_impostor_is_told_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (ours, other) = (Authority::new(dir, "ca"), Authority::new(dir, "other-ca"));
    let here = ["127.0.0.1"];
    for (case, identity, says) in [
        (
            "signed by another authority",
            other.server(dir, "other", &here),
            "UnknownIssuer",
        ),
        ("expired", ours.expired(dir, "expired", &here), "xpired"),
        (
            "for another name",
            ours.server(dir, "name", &["etcd.example.com"]),
            "not valid for name",
        ),
        (
            "for another address",
            ours.server(dir, "address", &["192.0.2.1"]),
            "not valid for name",
        ),
        (
            "vouching for itself",
            self_signed(dir, "self", &here),
            "UnknownIssuer",
        ),
        ("for clients only", ours.client(dir, "client", "etcd"), ""),
    ] {
        let impostor = Impostor::with(&identity).await;
        let cause = ask(&format!("https://{}", impostor.address), Some(&ours.file)).await;
        assert!(cause.contains(says), "{case}: {cause}");
        assert_eq!(impostor.heard_inside(), b"", "{case}");
        assert!(!impostor.heard_the_password(), "{case}");
    }
}

#[tokio::test]
async fn who_speaks_no_tls_or_an_old_one_is_told_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::new(dir.path(), "ca");
    // TLS 1.1 ServerHello, in the version of its record and of its own: RFC 4346 §7.4.1.3.
    let mut hello = vec![0x16, 3, 2, 0, 42, 2, 0, 0, 38, 3, 2];
    hello.extend([7; 32]);
    hello.extend([0, 0xc0, 0x13, 0]);
    for (case, says) in [
        ("plain text", b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        ("plain HTTP/2", b"\0\0\0\x04\0\0\0\0\0".to_vec()),
        ("TLS 1.1", hello),
        ("nothing at all", Vec::new()),
    ] {
        let impostor = Impostor::saying(says).await;
        ask(&format!("https://{}", impostor.address), Some(&ours.file)).await;
        let heard = impostor.heard();
        // A handshake record holding a ClientHello, and after it an alert at most.
        assert_eq!((heard[0], heard[5]), (0x16, 1), "{case}");
        let len = usize::from(u16::from_be_bytes([heard[3], heard[4]]));
        let rest = &heard[5 + len..];
        assert!(rest.is_empty() || rest[0] == 0x15, "{case}: {rest:?}");
        assert!(!impostor.heard_the_password(), "{case}");
    }
}

#[tokio::test]
async fn without_a_root_of_ours_the_systems_decide() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::new(dir.path(), "ca");
    let impostor = Impostor::with(&ours.server(dir.path(), "server", &["127.0.0.1"])).await;
    // Where a system has no roots at all, that is said; else it knows nothing of ours.
    ask(&format!("https://{}", impostor.address), None).await;
    assert_eq!(impostor.heard_inside(), b"");
    assert!(!impostor.heard_the_password());
}

/// B10 of the list of upstream bugs: flannel takes no notice of a CA file without a client certificate.
#[tokio::test]
async fn a_ca_file_alone_verifies_a_real_etcd() {
    let dir = tempfile::tempdir().unwrap();
    let Some(etcd) = etcd_server::start_with_tls(dir.path()).await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    assert_eq!(etcd.store().config().await.unwrap(), CONFIG);
    // The same without a scheme.
    let bare = EtcdOptions {
        endpoints: vec![format!("127.0.0.1:{}", etcd.port())],
        ..etcd.options()
    };
    assert_eq!(EtcdStore::connect(bare).unwrap().config().await.unwrap(), CONFIG);
    // The right server under a name its certificate does not have.
    let renamed = EtcdOptions {
        endpoints: vec![format!("https://127.0.0.2:{}", etcd.port())],
        ..etcd.options()
    };
    let error = EtcdStore::connect(renamed).unwrap().config().await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    // The wrong root.
    let other = Authority::new(dir.path(), "other-ca");
    let wrong = EtcdOptions {
        cafile: Some(other.file),
        ..etcd.options()
    };
    let error = EtcdStore::connect(wrong).unwrap().config().await.unwrap_err();
    assert!(error.to_string().contains("UnknownIssuer"), "{error}");
}

#[tokio::test]
async fn a_client_certificate_is_shown_where_etcd_asks_for_one_and_renewed_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ca");
    let tls = Tls {
        ca: authority.file.clone(),
        server: authority.server(dir.path(), "server", &["127.0.0.1"]),
        client: Some(authority.client(dir.path(), "client", "kersey")),
    };
    let Some(etcd) = etcd_server::start_with(Some(tls), &[]).await else {
        return;
    };
    etcd.put("config", CONFIG).await;
    assert_eq!(etcd.store().config().await.unwrap(), CONFIG);
    let without = EtcdOptions {
        certfile: None,
        keyfile: None,
        ..etcd.options()
    };
    assert!(
        EtcdStore::connect(without)
            .unwrap()
            .config()
            .await
            .unwrap_err()
            .is_unavailable()
    );
    // A certificate that etcd does not take is replaced on disk by one it does.
    let stranger = Authority::new(dir.path(), "other-ca").client(dir.path(), "renewed", "kersey");
    let options = EtcdOptions {
        certfile: Some(stranger.certificate.clone()),
        keyfile: Some(stranger.key.clone()),
        ..etcd.options()
    };
    let store = EtcdStore::connect(options).unwrap();
    assert!(store.config().await.unwrap_err().is_unavailable());
    authority.client(dir.path(), "renewed", "kersey");
    assert_eq!(store.config().await.unwrap(), CONFIG);
}

/// Asks for the config at `url`, which must fail, and gives the words.
async fn ask(url: &str, ca: Option<&Path>) -> String {
    let options = EtcdOptions {
        endpoints: vec![url.to_owned()],
        username: "root".to_owned(),
        password: PASSWORD.to_owned(),
        cafile: ca.map(PathBuf::from),
        ..EtcdOptions::default()
    };
    let error = match EtcdStore::connect(options) {
        Ok(store) => store.config().await.unwrap_err(),
        Err(error) => error,
    };
    assert!(!error.to_string().contains(PASSWORD));
    match &error {
        StoreError::Unavailable { .. } | StoreError::Refused { .. } => error.to_string(),
        StoreError::AddressTaken { .. } | StoreError::LeaseLost { .. } => panic!("{error}"),
    }
}

/// A server that is not etcd, and what it was told.
struct Impostor {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
    inside: Arc<Mutex<Vec<u8>>>,
}

impl Impostor {
    /// One that has a certificate.
    async fn with(identity: &Identity) -> Self {
        let chain = CertificateDer::pem_file_iter(&identity.certificate)
            .unwrap()
            .map(Result::unwrap)
            .collect();
        let key = PrivateKeyDer::from_pem_file(&identity.key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let impostor = Self::at(listener.local_addr().unwrap());
        let inside = Arc::clone(&impostor.inside);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, inside) = (acceptor.clone(), Arc::clone(&inside));
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else {
                        return;
                    };
                    let mut buffer = [0; 4096];
                    while let Ok(len @ 1..) = stream.read(&mut buffer).await {
                        inside.lock().unwrap().extend(&buffer[..len]);
                    }
                });
            }
        });
        impostor
    }

    /// One that says `words` and listens.
    async fn saying(words: Vec<u8>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let impostor = Self::at(listener.local_addr().unwrap());
        let heard = Arc::clone(&impostor.heard);
        tokio::spawn(async move {
            let mut first = true;
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (words, heard) = (words.clone(), Arc::clone(&heard));
                // What one connection is told is enough to look at.
                let noting = std::mem::take(&mut first);
                tokio::spawn(async move {
                    let mut buffer = [0; 4096];
                    while let Ok(len @ 1..) = stream.read(&mut buffer).await {
                        if noting {
                            heard.lock().unwrap().extend(&buffer[..len]);
                        }
                        let _ = stream.write_all(&words).await;
                    }
                });
            }
        });
        impostor
    }

    fn at(address: SocketAddr) -> Self {
        Self {
            address,
            heard: Arc::default(),
            inside: Arc::default(),
        }
    }

    fn heard(&self) -> Vec<u8> {
        self.heard.lock().unwrap().clone()
    }

    fn heard_inside(&self) -> Vec<u8> {
        self.inside.lock().unwrap().clone()
    }

    fn heard_the_password(&self) -> bool {
        let has = |heard: Vec<u8>| {
            heard
                .windows(PASSWORD.len())
                .any(|window| window == PASSWORD.as_bytes())
        };
        has(self.heard()) || has(self.heard_inside())
    }
}
