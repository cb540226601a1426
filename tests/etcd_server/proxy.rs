//! A TCP proxy that can fall silent, as a network does: connections stay open and nothing comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What becomes of connections made before now, by their number.
#[derive(Clone, Copy, Debug)]
struct Orders {
    /// Those below are silent.
    silent_below: usize,
    /// Those below are closed.
    closed_below: usize,
    /// So many bytes of answers go through each connection made from now on; then it is closed.
    most: usize,
}

pub struct Proxy {
    pub port: u16,
    made: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    orders: watch::Sender<Orders>,
    accepting: JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.accepting.abort();
    }
}

impl Proxy {
    /// Stands before the server on `port` of this host.
    pub async fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own_port = listener.local_addr().unwrap().port();
        let (orders, orders_rx) = watch::channel(Orders {
            silent_below: 0,
            closed_below: 0,
            most: usize::MAX,
        });
        let (made, open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (made_in_task, open_in_task) = (Arc::clone(&made), Arc::clone(&open));
        let accepting = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let number = made_in_task.fetch_add(1, Ordering::SeqCst);
                let (orders, open) = (orders_rx.clone(), Arc::clone(&open_in_task));
                let most = orders.borrow().most;
                tokio::spawn(async move {
                    open.fetch_add(1, Ordering::SeqCst);
                    if let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await {
                        let (client_read, client_write) = client.into_split();
                        let (server_read, server_write) = server.into_split();
                        tokio::select! {
                            () = carry(client_read, server_write, orders.clone(), number, usize::MAX) => {}
                            () = carry(server_read, client_write, orders.clone(), number, most) => {}
                            () = closed(orders, number) => {}
                        }
                    }
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self {
            port: own_port,
            made,
            open,
            orders,
            accepting,
        }
    }

    /// How many connections are open through it.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }

    /// How many were ever made.
    pub fn made(&self) -> usize {
        self.made.load(Ordering::SeqCst)
    }

    /// Lets nothing through on the connections that are there; new ones are well.
    pub fn silence(&self) {
        let made = self.made();
        self.orders.send_modify(|orders| orders.silent_below = made);
    }

    /// Lets nothing through on any connection, until [`heal`](Self::heal).
    pub fn silence_all(&self) {
        self.orders.send_modify(|orders| orders.silent_below = usize::MAX);
    }

    /// Lets things through again; what was held back comes.
    pub fn heal(&self) {
        self.orders.send_modify(|orders| orders.silent_below = 0);
    }

    /// Closes every connection made from now on after so many bytes of answers.
    pub fn cut_after(&self, bytes: usize) {
        self.orders.send_modify(|orders| orders.most = bytes);
    }

    /// Closes the connections that are there.
    pub fn cut(&self) {
        let made = self.made();
        self.orders.send_modify(|orders| orders.closed_below = made);
    }
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut orders: watch::Receiver<Orders>,
    number: usize,
    mut left: usize,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if orders
            .wait_for(|orders| number >= orders.silent_below)
            .await
            .is_err()
        {
            return;
        }
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            // Look again whether it may.
            Ok(()) = orders.changed() => continue,
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(len) => {
                let len = len.min(left);
                left -= len;
                if to.write_all(&buffer[..len]).await.is_err() || left == 0 {
                    return;
                }
            }
        }
    }
}

async fn closed(mut orders: watch::Receiver<Orders>, number: usize) {
    let _ = orders.wait_for(|orders| number < orders.closed_below).await;
}
