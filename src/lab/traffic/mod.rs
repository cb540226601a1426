//! Traffic and what becomes of it: plain sockets, blocking threads, one file a kind of measurement.
//!
//! Every measurement counts at the receiving end, stops early on a signal ([`crate::lab::interrupt`]), and gives back
//! a plain struct.

pub mod cpu;
pub mod latency;
pub mod loss_free;
pub mod pace;
pub mod ping;
pub mod probe;
pub mod tally;
pub mod tcp;
pub mod udp;

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

use crate::lab::netns::Namespace;

/// How long a blocking call may go on before it looks whether it should stop.
const POLL: Duration = Duration::from_millis(50);
/// Socket buffer for datagrams, bytes. At 10 Gbit/s it holds 3 ms, which is what a busy machine keeps a thread
/// waiting; the default of 212,992 would measure the scheduler.
const UDP_BUFFER: usize = 4 << 20;

/// Where traffic begins or ends: an address in a namespace.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    /// The namespace.
    pub namespace: &'a Namespace,
    /// An address that lives in it.
    pub addr: IpAddr,
}

impl<'a> End<'a> {
    /// Pairs a namespace with one of its addresses.
    pub fn new(namespace: &'a Namespace, addr: IpAddr) -> Self {
        Self { namespace, addr }
    }

    fn udp(self) -> Result<(UdpSocket, SocketAddr)> {
        self.namespace.run(|| {
            let socket = Socket::new(Domain::for_address((self.addr, 0).into()), Type::DGRAM, None)?;
            // The forced option passes rmem_max, and needs the privileges a lab has.
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &UDP_BUFFER)?;
            nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::SndBufForce, &UDP_BUFFER)?;
            let place = SocketAddr::new(self.addr, 0);
            socket
                .bind(&place.into())
                .with_context(|| format!("cannot use address {}", self.addr))?;
            socket.set_read_timeout(Some(POLL))?;
            let socket = UdpSocket::from(socket);
            let addr = socket.local_addr()?;
            Ok((socket, addr))
        })
    }

    fn listen(self) -> Result<(TcpListener, SocketAddr)> {
        self.namespace.run(|| {
            let listener = TcpListener::bind((self.addr, 0))
                .with_context(|| format!("cannot listen on address {}", self.addr))?;
            let addr = listener.local_addr()?;
            Ok((listener, addr))
        })
    }

    /// A TCP socket bound to the address, not yet connected.
    fn tcp(self, congestion: Option<&str>) -> Result<Socket> {
        self.namespace.run(|| {
            let place = SocketAddr::new(self.addr, 0);
            let socket = Socket::new(Domain::for_address(place), Type::STREAM, None)?;
            socket
                .bind(&place.into())
                .with_context(|| format!("cannot use address {}", self.addr))?;
            if let Some(name) = congestion {
                socket
                    .set_tcp_congestion(name.as_bytes())
                    .with_context(|| format!("this kernel has no congestion control {name:?}"))?;
            }
            Ok(socket)
        })
    }
}

/// Whether a blocking call merely reached the end of its [`POLL`].
fn timed_out(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
    )
}

/// Bits per second, in thousands of millions.
fn gbit_per_s(bytes: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() {
        return 0.0;
    }
    bytes as f64 * 8.0 / elapsed.as_secs_f64() / 1e9
}
