//! TLS of the HTTP API (S10): it works, it fails closed, and what it says then is of use.

use std::fs;
use std::time::Duration;

use futures_util::StreamExt;
use kersey::control::store::Store;
use kersey::options::{KeyPairFiles, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::authority::Authority;
use crate::support::{Running, ask, client, node, tls};

#[tokio::test]
async fn a_client_with_the_right_authority_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let server = serve(ca.issue("server", &["127.0.0.1", "localhost"]), None).await;
    let by_address = client(&server.address, tls(None, &ca.file));
    let lease = by_address.acquire(&node(1), None).await.unwrap();
    by_address.renew(&lease).await.unwrap();
    let by_name = client(
        &format!("https://localhost:{}", port(&server)),
        tls(None, &ca.file),
    );
    assert!(by_name.config().await.unwrap().contains("10.0.0.0/8"));
    assert!(by_name.watch(None).next().await.unwrap().is_ok());
}

#[tokio::test]
async fn a_server_that_is_not_who_it_should_be_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let other = Authority::new(dir.path(), "other");
    for (case, pair, expected) in [
        (
            "wrong authority",
            other.issue("a", &["127.0.0.1"]),
            "give the right one with --remote-cafile",
        ),
        (
            "expired",
            ca.issue_expired("b", &["127.0.0.1"]),
            "has expired; renew it",
        ),
        (
            "wrong name",
            ca.issue("c", &["store.example"]),
            "is for another name",
        ),
        (
            "wrong address",
            ca.issue("d", &["127.0.0.2"]),
            "as subjectAltName",
        ),
    ] {
        let server = serve(pair, None).await;
        let error = client(&server.address, tls(None, &ca.file))
            .config()
            .await
            .unwrap_err();
        assert!(error.is_unavailable(), "{case}: {error}");
        assert!(error.to_string().contains(expected), "{case}: {error}");
    }
    // The system's authorities have not signed it either.
    let server = serve(ca.issue("e", &["127.0.0.1"]), None).await;
    if let Ok(store) =
        kersey::control::store::RemoteStore::open(&kersey::options::RemoteOptions::plain(vec![
            format!("https://{}", server.address).parse().unwrap(),
        ]))
    {
        let error = store.config().await.unwrap_err().to_string();
        assert!(
            error.contains("give the right one with --remote-cafile"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn a_client_without_the_right_certificate_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let other = Authority::new(dir.path(), "other");
    let server = serve(ca.issue("server", &["127.0.0.1"]), Some(&ca)).await;
    for (case, pair, expected) in [
        (
            "none",
            None,
            "wants a client certificate; give --remote-certfile and --remote-keyfile",
        ),
        (
            "of another authority",
            Some(other.issue("a", &["node"])),
            "does not accept our certificate",
        ),
        (
            "expired",
            Some(ca.issue_expired("b", &["node"])),
            "our certificate has expired",
        ),
    ] {
        let error = client(&server.address, tls(pair.as_ref(), &ca.file))
            .config()
            .await
            .unwrap_err();
        assert!(error.is_unavailable(), "{case}: {error}");
        assert!(error.to_string().contains(expected), "{case}: {error}");
    }
    let good = ca.issue("node", &["node"]);
    let store = client(&server.address, tls(Some(&good), &ca.file));
    let lease = store.acquire(&node(1), None).await.unwrap();
    store.revoke(lease.subnet).await.unwrap();
}

#[tokio::test]
async fn plain_http_and_tls_do_not_mix_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let secure = serve(ca.issue("server", &["127.0.0.1"]), None).await;
    let (status, body) = ask(&secure.address, "GET", "/v1/_/config", "", "").await;
    assert_eq!(status, 400);
    assert!(
        body.contains("this port speaks TLS") && body.contains("--remote-cafile"),
        "{body}"
    );
    let error = client(&secure.address, None)
        .config()
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("this port speaks TLS"), "{error}");
    let plain = Running::plain().await;
    let error = client(&plain.address, tls(None, &ca.file))
        .config()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("does not speak TLS there"), "{error}");
    assert!(error.is_unavailable(), "{error}");
}

#[tokio::test]
async fn a_server_of_go_that_speaks_tls_is_recognised_by_a_plain_client() {
    // What Go 1.6 sends to whoever speaks plain HTTP to its TLS port: an alert.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(&[21, 3, 1, 0, 2, 2, 22]).await;
        }
    });
    let error = client(&address, None).config().await.unwrap_err().to_string();
    assert!(error.contains("if it speaks TLS, write https://"), "{error}");
}

/// S10, "TLS 1.1 refused": the bytes of a hello that offers nothing newer.
#[tokio::test]
async fn tls_below_1_2_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let server = serve(ca.issue("server", &["127.0.0.1"]), None).await;
    let mut stream = TcpStream::connect(&server.address).await.unwrap();
    let mut hello = vec![0x03, 0x02]; // TLS 1.1
    hello.extend([7; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x13, 0xc0, 0x09, 1, 0, 0, 0]);
    let mut record = vec![22, 3, 1, 0, u8::try_from(hello.len() + 4).unwrap(), 1, 0, 0];
    record.push(u8::try_from(hello.len()).unwrap());
    record.extend(hello);
    stream.write_all(&record).await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(Duration::from_secs(5), stream.read_to_end(&mut answer))
        .await
        .unwrap();
    // An alert: fatal, protocol_version (70) or handshake_failure (40).
    assert_eq!(answer.first(), Some(&21), "{answer:?}");
    assert!(matches!(answer.last(), Some(70 | 40)), "{answer:?}");
}

#[tokio::test]
async fn replaced_certificates_are_used_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let pair = ca.issue_expired("server", &["127.0.0.1"]);
    let server = serve(pair.clone(), None).await;
    let store = client(&server.address, tls(None, &ca.file));
    assert!(store.config().await.unwrap_err().to_string().contains("expired"));
    // A key of another pair is there for a moment: the old pair stays.
    fs::copy(ca.issue("other", &["127.0.0.1"]).key, &pair.key).unwrap();
    assert!(store.config().await.unwrap_err().to_string().contains("expired"));
    ca.issue("server", &["127.0.0.1"]);
    assert!(store.config().await.unwrap().contains("10.0.0.0/8"));
    // And the client's side: the authority changes, first there, then here.
    let next = Authority::new(&dir.path().join("."), "next");
    next.issue("server", &["127.0.0.1"]);
    sleep(Duration::from_secs(4)).await; // Kept connections are dropped after 3 s.
    assert!(store.config().await.is_err());
    fs::copy(&next.file, &ca.file).unwrap();
    assert!(store.config().await.unwrap().contains("10.0.0.0/8"));
}

#[tokio::test]
async fn a_poll_made_with_files_of_the_past_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let pair = ca.issue("server", &["127.0.0.1"]);
    let good = ca.issue("node", &["node"]);
    let server = serve(pair.clone(), Some(&ca)).await;
    let node_store = client(&server.address, tls(Some(&good), &ca.file));
    let mut watch = node_store.watch(None);
    watch.next().await.unwrap().unwrap();
    // The authority of clients is another from now on: whoever the old one signed is cut off, polls included.
    let next = Authority::new(dir.path(), "next");
    let change = async {
        sleep(Duration::from_millis(200)).await;
        fs::copy(&next.file, &ca.file).unwrap();
    };
    let cut_off = async { while let Some(Ok(_)) = watch.next().await {} };
    let (cut_off, ()) = tokio::join!(timeout(Duration::from_secs(25), cut_off), change);
    cut_off.expect("the poll is cut off");
}

async fn serve(pair: KeyPairFiles, clients: Option<&Authority>) -> Running {
    Running::with(ServeOptions {
        tls: Some((pair, clients.map(|ca| ca.file.clone()))),
        ..ServeOptions::plain("127.0.0.1:0".parse().unwrap())
    })
    .await
}

fn port(server: &Running) -> &str {
    server.address.rsplit(':').next().unwrap()
}
