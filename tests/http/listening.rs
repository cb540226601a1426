//! Where a server listens: unix sockets and sockets passed by systemd, both ends.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use futures_util::StreamExt;
use kersey::control::store::Store;
use kersey::host::inherited;
use kersey::options::{ListenAddress, ServeOptions};
use kersey::server;

use crate::process::Process;
use crate::support::{Running, client, node};

#[tokio::test]
async fn a_unix_socket_serves_all_that_tcp_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/api.sock");
    let address = format!("unix://{}", path.display());
    let mut options = ServeOptions::plain(address.parse().unwrap());
    options.listen.push("127.0.0.1:0".parse().unwrap());
    let mut server = Running::with(options).await;
    assert_eq!(server.address, address);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    let store = client(&address, None);
    assert_eq!(store.place(), format!("server {address}"));
    let lease = store.acquire(&node(1), None).await.unwrap();
    let mut watch = store.watch(None);
    watch.next().await.unwrap().unwrap();
    server.store.acquire(&node(2), None).await.unwrap();
    watch.next().await.unwrap().unwrap();
    drop(watch);
    store.revoke(lease.subnet).await.unwrap();
    server.stop().await;
    assert!(!path.exists(), "the file goes with the server");
    assert!(store.config().await.unwrap_err().is_unavailable());
}

#[tokio::test]
async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let address: ListenAddress = format!("unix://{}", path.display()).parse().unwrap();
    let _first = Running::with(ServeOptions::plain(address.clone())).await;
    let error = server::listen(&[address], inherited::descriptor)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("another process answers there"),
        "{error}"
    );
    let file = dir.path().join("file");
    fs::write(&file, "precious").unwrap();
    let address = format!("unix://{}", file.display()).parse().unwrap();
    let error = server::listen(&[address], inherited::descriptor)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("not a socket"), "{error}");
}

#[tokio::test]
async fn an_inherited_socket_is_taken_by_its_number() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = u32::try_from(listener.as_raw_fd()).unwrap();
    let server = Running::with(ServeOptions::plain(ListenAddress::Inherited(Some(number)))).await;
    assert_eq!(server.address, listener.local_addr().unwrap().to_string());
    client(&server.address, None).config().await.unwrap();
}

#[tokio::test]
async fn a_socket_passed_by_systemd_is_served_and_ready_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let notify = dir.path().join("notify");
    let told = std::os::unix::net::UnixDatagram::bind(&notify).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    // Whoever connects before the server is there waits in the socket.
    let early = client(&address, None);
    let asked = tokio::spawn(async move { early.config().await });
    let mut server = Process::start_by_socket(&dir.path().join("data"), listener.into(), &notify);
    assert_eq!(server.address, address);
    asked.await.unwrap().unwrap();
    let mut message = [0; 64];
    let count = told.recv(&mut message).unwrap();
    assert_eq!(String::from_utf8_lossy(&message[..count]).trim(), "READY=1");
    assert!(server.terminate().success());
}

#[tokio::test]
async fn a_descriptor_that_does_not_listen_is_refused() {
    let file = fs::File::open("/dev/null").unwrap();
    let number = u32::try_from(file.as_raw_fd()).unwrap();
    for number in [number, 999_999] {
        let address = ListenAddress::Inherited(Some(number));
        let error = server::listen(&[address], inherited::descriptor)
            .await
            .unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains(&format!("fd://{number}")) && error.contains("kersey-server.socket"),
            "{error}"
        );
    }
}
