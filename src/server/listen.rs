//! Where a server listens: TCP, a unix socket, or a socket that the process was started with.
//!
//! It takes two steps: [`bind`] needs names, files and perhaps CAP_NET_BIND_SERVICE (a port below 1024), and no runtime; [`Bound::listen`] needs
//! nothing but a runtime. In between a process can give up what it needs no more. A TCP port that is bound takes no connections yet.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::socket_file::{PlacedSocket, SocketFile, SocketFileError};
use super::{HEAD_TIMEOUT, USER_TIMEOUT};
use crate::options::ListenAddress;

/// Gives a descriptor this process was started with, by its number.
pub type Inherit = fn(u32) -> io::Result<OwnedFd>;

/// Descriptors from the service manager begin here: 0 to 2 are the standard streams.
const FIRST_INHERITED: u32 = 3;

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The name has no address.
    #[error("cannot listen on {address}: {cause}")]
    Resolve {
        /// What was asked for.
        address: String,
        /// The cause.
        cause: io::Error,
    },
    /// No address of it can be bound.
    #[error("cannot listen on {address}: {cause}")]
    Bind {
        /// What was asked for.
        address: String,
        /// The cause, for the last address tried.
        cause: io::Error,
    },
    /// A socket file cannot be made.
    #[error("cannot listen on unix://{}: {problem}", .path.display())]
    Unix {
        /// Its path.
        path: PathBuf,
        /// The cause in words.
        problem: String,
    },
    /// A descriptor is not what it should be.
    #[error(
        "cannot listen on {address}: {problem}; have systemd pass a listening stream socket (kersey-server.socket)"
    )]
    Inherited {
        /// What was asked for.
        address: String,
        /// The cause in words.
        problem: String,
    },
}

/// A socket that takes connections.
#[derive(Debug)]
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A socket file of ours.
    Unix(SocketFile),
    /// A unix socket that somebody else made and will remove.
    InheritedUnix(UnixListener),
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Self {
        Self::Tcp(listener)
    }
}

/// A connection, and where it comes from: `None` is a process on this machine.
pub(super) enum Accepted {
    Tcp(TcpStream, IpAddr),
    Unix(UnixStream),
}

impl Listener {
    /// Where it listens, for logs.
    pub fn address(&self) -> String {
        match self {
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => address.to_string(),
                Err(_) => "tcp".to_owned(),
            },
            Self::Unix(file) => format!("unix://{}", file.path().display()),
            Self::InheritedUnix(listener) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname());
                path.map_or_else(|| "unix".to_owned(), |path| format!("unix://{}", path.display()))
            }
        }
    }

    /// Whether others than this machine can connect.
    pub fn is_remote(&self) -> bool {
        match self {
            Self::Tcp(listener) => listener
                .local_addr()
                .is_ok_and(|address| !address.ip().to_canonical().is_loopback()),
            Self::Unix(_) | Self::InheritedUnix(_) => false,
        }
    }

    pub(super) async fn accept(&self) -> io::Result<Accepted> {
        let unix = match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                bound(&stream)?;
                return Ok(Accepted::Tcp(stream, from.ip().to_canonical()));
            }
            Self::Unix(file) => file.listener(),
            Self::InheritedUnix(listener) => listener,
        };
        Ok(Accepted::Unix(unix.accept().await?.0))
    }
}

/// How many connections wait to be taken.
const BACKLOG: i32 = 1024;

/// A socket that is about to take connections.
#[derive(Debug)]
pub struct Bound {
    address: String,
    socket: BoundSocket,
}

#[derive(Debug)]
enum BoundSocket {
    Tcp(Socket),
    Unix(PlacedSocket),
    Inherited(Socket),
}

impl Bound {
    /// Takes connections from now on; this thread's runtime looks after it.
    ///
    /// # Errors
    /// Somebody else does, at that address.
    pub fn listen(self) -> Result<Listener, ListenError> {
        let bind_error = |cause| ListenError::Bind {
            address: self.address.clone(),
            cause,
        };
        match self.socket {
            BoundSocket::Tcp(socket) => {
                socket.listen(BACKLOG).map_err(bind_error)?;
                let listener = TcpListener::from_std(socket.into());
                listener.map(Listener::Tcp).map_err(bind_error)
            }
            BoundSocket::Unix(placed) => placed.attend().map(Listener::Unix).map_err(bind_error),
            BoundSocket::Inherited(socket) => attend_inherited(socket).map_err(bind_error),
        }
    }
}

fn attend_inherited(socket: Socket) -> io::Result<Listener> {
    if socket.domain()? == Domain::UNIX {
        let listener = UnixListener::from_std(OwnedFd::from(socket).into())?;
        return Ok(Listener::InheritedUnix(listener));
    }
    TcpListener::from_std(socket.into()).map(Listener::Tcp)
}

/// Listens on each of `addresses`. `inherit` gives descriptors for `fd://`.
///
/// # Errors
/// One of them cannot be listened on.
pub async fn listen(addresses: &[ListenAddress], inherit: Inherit) -> Result<Vec<Listener>, ListenError> {
    let owned = addresses.to_vec();
    // A name server may take its time.
    let bound = tokio::task::spawn_blocking(move || bind(&owned, inherit)).await;
    let bound = bound.map_err(|error| ListenError::Bind {
        address: addresses
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(","),
        cause: io::Error::other(error),
    })?;
    bound?.into_iter().map(Bound::listen).collect()
}

/// Takes each of `addresses`. `inherit` gives descriptors for `fd://`.
///
/// # Errors
/// One of them cannot be had.
pub fn bind(addresses: &[ListenAddress], inherit: Inherit) -> Result<Vec<Bound>, ListenError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let bound = |socket| Bound {
            address: address.to_string(),
            socket,
        };
        match address {
            ListenAddress::Tcp { host, port } => {
                listeners.push(bound(BoundSocket::Tcp(bind_tcp(host, *port, address)?)));
            }
            ListenAddress::Unix(path) => {
                let unix_error = |problem| ListenError::Unix {
                    path: path.clone(),
                    problem,
                };
                let file = PlacedSocket::bind(path).map_err(|error| {
                    unix_error(match error {
                        SocketFileError::AlreadyServed => "another process answers there".to_owned(),
                        SocketFileError::InTheWay => "what is there is not a socket".to_owned(),
                        SocketFileError::Create(source) => source.to_string(),
                    })
                })?;
                listeners.push(bound(BoundSocket::Unix(file)));
            }
            ListenAddress::Inherited(number) => {
                let inherited_error = |problem| ListenError::Inherited {
                    address: address.to_string(),
                    problem,
                };
                let numbers = match number {
                    Some(number) => vec![*number],
                    None => passed().map_err(|error| inherited_error(error.to_string()))?,
                };
                let before = listeners.len();
                for fd in numbers {
                    match take_over(fd, inherit) {
                        Ok(socket) => listeners.push(bound(BoundSocket::Inherited(socket))),
                        // Of all that was passed, what does not listen is for somebody else.
                        Err(problem) if number.is_none() => {
                            tracing::debug!(fd, problem, "not a socket to listen on");
                        }
                        Err(problem) => return Err(inherited_error(problem)),
                    }
                }
                if listeners.len() == before {
                    return Err(inherited_error("no socket was passed to this process".to_owned()));
                }
            }
        }
    }
    Ok(listeners)
}

/// The descriptors systemd passed; without a word from it the first, as flannel has it.
fn passed() -> io::Result<Vec<u32>> {
    let numbers: Vec<u32> = sd_notify::listen_fds()?.map(|fd| fd.unsigned_abs()).collect();
    Ok(if numbers.is_empty() {
        vec![FIRST_INHERITED]
    } else {
        numbers
    })
}

fn take_over(fd: u32, inherit: Inherit) -> Result<Socket, String> {
    let fd = inherit(fd).map_err(|error| format!("descriptor {fd}: {error}"))?;
    let socket = Socket::from(fd);
    let text = |error: io::Error| error.to_string();
    if !socket.is_listener().map_err(text)? || socket.r#type().map_err(text)? != Type::STREAM {
        return Err("it is not a listening stream socket".to_owned());
    }
    socket.set_nonblocking(true).map_err(text)?;
    Ok(socket)
}

/// Takes a TCP port. An empty host is every address of this machine, of both families where there is IPv6.
fn bind_tcp(host: &str, port: u16, address: &ListenAddress) -> Result<Socket, ListenError> {
    let bind_error = |cause| ListenError::Bind {
        address: address.to_string(),
        cause,
    };
    if host.is_empty() {
        return match tcp_socket((Ipv6Addr::UNSPECIFIED, port).into()) {
            Ok(socket) => Ok(socket),
            // Without IPv6 there is IPv4.
            Err(_) => tcp_socket((Ipv4Addr::UNSPECIFIED, port).into()).map_err(bind_error),
        };
    }
    let addresses = (host, port)
        .to_socket_addrs()
        .map_err(|cause| ListenError::Resolve {
            address: address.to_string(),
            cause,
        })?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in addresses {
        match tcp_socket(candidate) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(bind_error(last))
}

fn tcp_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Lets the kernel notice peers that vanished or stopped reading.
fn bound(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(HEAD_TIMEOUT * 3)
        .with_interval(HEAD_TIMEOUT)
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_nodelay(true)
}
