//! Where a server listens: TCP, a unix socket, or a socket that the process was started with.

use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::socket_file::{SocketFile, SocketFileError};
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

/// Listens on each of `addresses`. `inherit` gives descriptors for `fd://`.
///
/// # Errors
/// One of them cannot be listened on.
pub async fn listen(addresses: &[ListenAddress], inherit: Inherit) -> Result<Vec<Listener>, ListenError> {
    let mut listeners = Vec::new();
    for address in addresses {
        match address {
            ListenAddress::Tcp { host, port } => {
                listeners.push(Listener::Tcp(listen_tcp(host, *port, address).await?));
            }
            ListenAddress::Unix(path) => {
                let unix_error = |problem| ListenError::Unix {
                    path: path.clone(),
                    problem,
                };
                let file = SocketFile::bind(path).map_err(|error| {
                    unix_error(match error {
                        SocketFileError::AlreadyServed => "another process answers there".to_owned(),
                        SocketFileError::InTheWay => "what is there is not a socket".to_owned(),
                        SocketFileError::Create(source) => source.to_string(),
                    })
                })?;
                listeners.push(Listener::Unix(file));
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
                        Ok(listener) => listeners.push(listener),
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

fn take_over(fd: u32, inherit: Inherit) -> Result<Listener, String> {
    let fd = inherit(fd).map_err(|error| format!("descriptor {fd}: {error}"))?;
    let socket = Socket::from(fd);
    let text = |error: io::Error| error.to_string();
    if !socket.is_listener().map_err(text)? || socket.r#type().map_err(text)? != Type::STREAM {
        return Err("it is not a listening stream socket".to_owned());
    }
    socket.set_nonblocking(true).map_err(text)?;
    if socket.domain().map_err(text)? == Domain::UNIX {
        let listener = UnixListener::from_std(OwnedFd::from(socket).into()).map_err(text)?;
        return Ok(Listener::InheritedUnix(listener));
    }
    let listener = TcpListener::from_std(socket.into()).map_err(text)?;
    Ok(Listener::Tcp(listener))
}

/// Listens on TCP. An empty host is every address of this machine, of both families where there is IPv6.
async fn listen_tcp(host: &str, port: u16, address: &ListenAddress) -> Result<TcpListener, ListenError> {
    let bind_error = |cause| ListenError::Bind {
        address: address.to_string(),
        cause,
    };
    if host.is_empty() {
        return match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Ok(listener) => Ok(listener),
            // Without IPv6 there is IPv4.
            Err(_) => TcpListener::bind(("0.0.0.0", port)).await.map_err(bind_error),
        };
    }
    let addresses = tokio::net::lookup_host((host, port))
        .await
        .map_err(|cause| ListenError::Resolve {
            address: address.to_string(),
            cause,
        })?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in addresses {
        match TcpListener::bind(candidate).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(bind_error(last))
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
