//! S13 and rights by network: who may do what over HTTP.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use kersey::control::store::{RemoteStore, Store};
use kersey::options::{RemoteOptions, ServeOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::authority::Authority;
use crate::support::{Running, ask, client, node, tls};

const NODE: &str = "f00df00df00df00df00d";
const ADMIN: &str = "c0dec0dec0dec0dec0de";
const FILE: &str = r#"
    [[allow]]
    token = "f00df00df00df00df00d"
    networks = ["_"]
    right = "lease"

    [[allow]]
    token = "c0dec0dec0dec0dec0de"
    networks = ["*"]
    right = "admin"

    [[allow]]
    certificate = "*.nodes.example"
    networks = ["_"]
    right = "lease"
"#;
/// Each endpoint, and the least right for it.
const ENDPOINTS: [(&str, &str, &str, Level); 9] = [
    ("GET", "/v1/", "", Level::Read),
    ("GET", "/v1/_/config", "", Level::Read),
    ("GET", "/v1/_/leases", "", Level::Read),
    ("GET", "/v1/_/leases/10.10.0.0-20", "", Level::Read),
    ("GET", "/v1/_/reservations", "", Level::Read),
    (
        "POST",
        "/v1/_/leases",
        r#"{"PublicIP":"192.0.2.1"}"#,
        Level::Lease,
    ),
    ("PUT", "/v1/_/leases/10.10.0.0-20", "{}", Level::Lease),
    ("DELETE", "/v1/_/leases/10.10.0.0-20", "", Level::Admin),
    (
        "POST",
        "/v1/_/reservations",
        r#"{"Subnet":"10.20.0.0/20","PublicIP":"192.0.2.7"}"#,
        Level::Admin,
    ),
];

#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Level {
    Read,
    Lease,
    Admin,
}

#[tokio::test]
async fn a_token_opens_what_its_entry_says() {
    let (server, _dir) = guarded(FILE).await;
    for (token, level) in [
        (None, None),
        (Some("0000000000000000"), None),
        (Some(NODE), Some(Level::Lease)),
        (Some(ADMIN), Some(Level::Admin)),
    ] {
        let header = token.map_or_else(String::new, |token| format!("Authorization: Bearer {token}\r\n"));
        for (method, path, body, needs) in ENDPOINTS {
            let (status, text) = ask(&server.address, method, path, &header, body).await;
            let case = format!("{token:?} {method} {path}: {status} {text}");
            match level {
                None => assert_eq!(status, 401, "{case}"),
                Some(level) if level < needs => assert_eq!(status, 403, "{case}"),
                Some(_) => assert!(!matches!(status, 401 | 403), "{case}"),
            }
            assert!(!text.contains("f00d") && !text.contains("c0de"), "{case}");
        }
    }
}

#[tokio::test]
async fn a_network_of_others_is_not_even_named() {
    let (server, _dir) = guarded(FILE).await;
    let node = format!("Authorization: Bearer {NODE}\r\n");
    let admin = format!("Authorization: Bearer {ADMIN}\r\n");
    assert_eq!(
        ask(&server.address, "GET", "/v1/blue/config", &node, "").await.0,
        403
    );
    assert_eq!(
        ask(&server.address, "GET", "/v1/blue/config", &admin, "").await.0,
        500
    );
}

#[tokio::test]
async fn a_node_sends_the_token_in_its_file_and_a_new_one_when_that_changes() {
    let (server, dir) = guarded(FILE).await;
    let file = dir.path().join("token");
    write_secret(&file, "wrong-but-long-enough\n");
    let store = RemoteStore::open(&RemoteOptions {
        token_file: Some(file.clone()),
        ..RemoteOptions::plain(vec![server.address.parse().unwrap()])
    })
    .unwrap();
    let error = store.config().await.unwrap_err();
    assert!(!error.is_unavailable(), "{error}");
    assert!(error.to_string().contains("--remote-token-file"), "{error}");
    write_secret(&file, &format!("{NODE}\n"));
    let lease = store.acquire(&node(1), None).await.unwrap();
    let error = store.revoke(lease.subnet).await.unwrap_err().to_string();
    assert!(error.contains("does not give this client the right"), "{error}");
    write_secret(&file, ADMIN);
    store.revoke(lease.subnet).await.unwrap();
    assert!(!format!("{store:?}").contains(ADMIN), "a token is printed");
}

#[tokio::test]
async fn rights_change_with_the_file() {
    let (server, dir) = guarded(FILE).await;
    let header = format!("Authorization: Bearer {NODE}\r\n");
    let config = || ask(&server.address, "GET", "/v1/_/config", &header, "");
    assert_eq!(config().await.0, 200);
    let file = dir.path().join("access.toml");
    write_secret(&file, "not toml at all [");
    assert_eq!(config().await.0, 200, "what is no good changes nothing");
    write_secret(&file, &FILE.replace(NODE, "another-token-of-a-node"));
    assert_eq!(config().await.0, 401);
}

#[tokio::test]
async fn a_certificate_is_as_good_as_a_token() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Authority::new(dir.path(), "ca");
    let access = dir.path().join("access.toml");
    write_secret(&access, FILE);
    let server = Running::with(ServeOptions {
        tls: Some((ca.issue("server", &["127.0.0.1"]), Some(ca.file.clone()))),
        access_file: Some(access),
        ..ServeOptions::plain("127.0.0.1:0".parse().unwrap())
    })
    .await;
    let a_node = client(
        &server.address,
        tls(Some(&ca.issue("a", &["a.nodes.example"])), &ca.file),
    );
    let lease = a_node.acquire(&node(1), None).await.unwrap();
    a_node.renew(&lease).await.unwrap();
    assert!(!a_node.revoke(lease.subnet).await.unwrap_err().is_unavailable());
    let stranger = client(
        &server.address,
        tls(Some(&ca.issue("b", &["b.example"])), &ca.file),
    );
    let error = stranger.config().await.unwrap_err().to_string();
    assert!(error.contains("401"), "{error}");
}

/// S13: without a file, what no flannel daemon does is done from this machine or with a certificate.
#[tokio::test]
async fn without_a_file_strangers_may_do_what_flannels_nodes_do_and_no_more() {
    // An address of this machine that is none of its own to itself, to stand for another's.
    let Some(own) = another_address() else {
        println!("skipped: this machine has no address but loopback");
        return;
    };
    let server = Running::with(ServeOptions::plain(format!("{own}:0").parse().unwrap())).await;
    for (method, path, body, needs) in ENDPOINTS {
        let (status, text) = ask(&server.address, method, path, "", body).await;
        if needs == Level::Admin {
            assert_eq!(status, 403, "{method} {path}");
            assert!(text.contains("--access-file"), "{text}");
        } else {
            assert!(!matches!(status, 401 | 403), "{method} {path}: {status} {text}");
        }
    }
}

#[tokio::test]
async fn a_node_ends_its_own_lease_and_no_other() {
    let Some(own) = another_address() else {
        println!("skipped: this machine has no address but loopback");
        return;
    };
    let server = Running::with(ServeOptions::plain(format!("{own}:0").parse().unwrap())).await;
    let take = async |public_ip: &str| -> String {
        let body = format!(r#"{{"PublicIP":"{public_ip}"}}"#);
        let (status, text) = ask(&server.address, "POST", "/v1/_/leases", "", &body).await;
        assert_eq!(status, 200, "{text}");
        let lease: serde_json::Value = serde_json::from_str(&text).unwrap();
        lease["Subnet"].as_str().unwrap().replace('/', "-")
    };
    let end = async |key: &str| {
        ask(&server.address, "DELETE", &format!("/v1/_/leases/{key}"), "", "")
            .await
            .0
    };
    let (ours, theirs) = (take(&own.to_string()).await, take("192.0.2.77").await);
    assert_eq!(end(&theirs).await, 403);
    assert_eq!(end(&ours).await, 200);
    assert_eq!(end(&ours).await, 403, "it is nobody's any more");
}

#[tokio::test]
async fn who_may_only_read_holds_no_address() {
    let (server, _dir) = guarded(
        "[[allow]]\ntoken = 'aaaaaaaaaaaaaaaa'\nnetworks = ['_']\nright = 'read'\n\
         [[allow]]\ntoken = 'bbbbbbbbbbbbbbbb'\nnetworks = ['_']\nright = 'lease'\n",
    )
    .await;
    let header = |who: char, token: char| {
        let (id, token) = (who.to_string().repeat(32), token.to_string().repeat(16));
        format!("Authorization: Bearer {token}\r\nX-Kersey-Node: 192.0.2.1 {id} boot-{who} host-{who}\r\n")
    };
    let address = &server.address;
    let body = r#"{"PublicIP":"192.0.2.1"}"#;
    // Who reads only says it has the address; the node that has it is not kept from it.
    let (status, text) = ask(address, "GET", "/v1/_/leases", &header('a', 'a'), "").await;
    assert_eq!(status, 200, "{text}");
    let (status, _) = ask(address, "POST", "/v1/_/leases", &header('a', 'a'), body).await;
    assert_eq!(status, 403);
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let (status, text) = ask(address, "POST", "/v1/_/leases", &header('b', 'b'), body).await;
    assert_eq!(status, 200, "{text}");
    let (status, text) = ask(address, "POST", "/v1/_/leases", &header('c', 'b'), body).await;
    assert_eq!(status, 409, "{text}");
}

#[tokio::test]
async fn an_access_file_that_is_no_good_at_start_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("access.toml");
    write_secret(
        &file,
        "[[allow]]\ntoken = 'short'\nnetworks = ['_']\nright = 'read'\n",
    );
    let store = std::sync::Arc::new(crate::support::open(&dir).await);
    let options = ServeOptions {
        access_file: Some(file.clone()),
        ..ServeOptions::plain("127.0.0.1:0".parse().unwrap())
    };
    let error = kersey::server::Served::open(store, &options)
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains(&*file.to_string_lossy())
            && error.contains("entry 1")
            && error.contains("at least 16"),
        "{error}"
    );
    assert!(!error.contains("short"), "{error}");
}

/// Connections that were only ever refused are closed for newer ones; one that was answered is not.
#[tokio::test]
async fn whoever_is_refused_stays_a_stranger() {
    crate::abuse::raise_open_files();
    let (server, _dir) = guarded(FILE).await;
    let request = |token: &str| {
        format!("GET /v1/_/config HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n")
    };
    let connect = async |token: &str| {
        let mut stream = TcpStream::connect(&server.address).await.unwrap();
        stream.write_all(request(token).as_bytes()).await.unwrap();
        let mut bytes = [0; 2048];
        let count = stream.read(&mut bytes).await.unwrap();
        (crate::support::parse(&bytes[..count]).0, stream)
    };
    let (status, mut known) = connect(NODE).await;
    assert_eq!(status, 200);
    let (status, mut first) = connect("wrong-but-long-enough").await;
    assert_eq!(status, 401);
    let mut others = Vec::new();
    for _ in 0..kersey::server::MAX_STRANGERS {
        others.push(TcpStream::connect(&server.address).await.unwrap());
    }
    // An end or a reset.
    let ended = timeout(Duration::from_secs(3), first.read(&mut [0])).await;
    assert!(matches!(ended, Ok(Ok(0) | Err(_))), "{ended:?}");
    known.write_all(request(NODE).as_bytes()).await.unwrap();
    let mut bytes = [0; 2048];
    let count = timeout(Duration::from_secs(3), known.read(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(crate::support::parse(&bytes[..count]).0, 200);
}

async fn guarded(file: &str) -> (Running, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let access = dir.path().join("access.toml");
    write_secret(&access, file);
    let server = Running::with(ServeOptions {
        access_file: Some(access),
        ..ServeOptions::plain("127.0.0.1:0".parse().unwrap())
    })
    .await;
    (server, dir)
}

fn write_secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

pub(crate) fn another_address() -> Option<std::net::IpAddr> {
    // Nothing is sent: the kernel only says which address it would use.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}
