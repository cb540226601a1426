//! The conversation of a successor with the daemon that runs, over a unix socket.
//!
//! Lines of JSON on a stream socket, descriptors attached to what follows:
//!
//! ```text
//!  successor                            daemon that runs
//!  {"take":[1]}            ─────────▶                          the versions it understands
//!                          ◀─────────   {"give":1,"names":[…]} and a byte for each 64 descriptors
//!                   or     ◀─────────   {"refuse":[1]}         the versions it could speak; it goes on as before
//!  {"done":true}           ─────────▶                          it ends with status 0
//!                   or     {"stop":true}                       as after SIGTERM: the successor makes all anew
//! ```
//!
//! `take`, `refuse`, `done` and `stop` are the same in every version; what `give` holds is that version's.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::{Deserialize, Serialize};

use super::bundle::{Bundle, Label};
use crate::host::sys;

/// The forms of `give` understood here, best first.
pub const VERSIONS: [u32; 1] = [1];
/// Descriptors sent at a time; the kernel takes 253.
const AT_A_TIME: usize = 64;
/// Longest line: a thousand names of a hundred bytes.
const MAX_LINE: usize = 128 * 1024;
/// How long the other side may take for a line, once it has begun to talk. The daemon that runs closes its store first.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Request {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    take: Option<Vec<u32>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    done: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    stop: bool,
}

impl Request {
    pub(super) fn done() -> Self {
        Self {
            done: true,
            ..Self::default()
        }
    }

    pub(super) fn stop() -> Self {
        Self {
            stop: true,
            ..Self::default()
        }
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Answer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    give: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refuse: Option<Vec<u32>>,
}

/// What a successor wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Everything, in this version of the message.
    Take(u32),
    /// That we end; it has all it needs, or wants nothing of us.
    End,
    /// It speaks no version of ours. It has been told so.
    Refused,
    /// It went away.
    Gone,
}

/// Hears what a successor wants, and answers if there is nothing to give.
///
/// # Errors
/// It says nothing in time, or nothing of sense.
pub fn hear(successor: &mut UnixStream) -> io::Result<Wish> {
    successor.set_read_timeout(Some(PATIENCE))?;
    successor.set_write_timeout(Some(PATIENCE))?;
    let Some(line) = read_line(successor)? else {
        return Ok(Wish::Gone);
    };
    let request: Request = serde_json::from_slice(&line)?;
    if request.done || request.stop {
        return Ok(Wish::End);
    }
    let theirs = request.take.unwrap_or_default();
    match VERSIONS.into_iter().find(|version| theirs.contains(version)) {
        Some(version) => Ok(Wish::Take(version)),
        None => {
            let refuse = Answer {
                refuse: Some(VERSIONS.to_vec()),
                ..Answer::default()
            };
            send_line(successor, &refuse)?;
            Ok(Wish::Refused)
        }
    }
}

/// Waits until a successor says how things went, for as long as it lives.
///
/// # Errors
/// It says nothing of sense.
pub fn await_end(successor: &mut UnixStream) -> io::Result<Wish> {
    let Some(line) = read_line(successor)? else {
        return Ok(Wish::Gone);
    };
    let request: Request = serde_json::from_slice(&line)?;
    Ok(if request.done || request.stop {
        Wish::End
    } else {
        Wish::Gone
    })
}

/// What a daemon that runs gave.
#[derive(Debug)]
pub enum Given {
    /// Nobody runs there.
    Nobody,
    /// What it has; it waits to be told how things went.
    Everything(BTreeMap<String, Bundle>, UnixStream),
    /// Nothing of use, and it has been told to end; it may take a moment.
    Nothing(&'static str),
}

/// Asks the daemon that listens at `path` for all it has.
///
/// # Errors
/// It is there and does not answer.
pub fn ask(path: &Path) -> io::Result<Given> {
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(Given::Nobody);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    send_line(
        &mut stream,
        &Request {
            take: Some(VERSIONS.to_vec()),
            ..Request::default()
        },
    )?;
    let (line, mut descriptors) = read_line_with_descriptors(&stream)?;
    let answer: Answer = serde_json::from_slice(&line)?;
    let give_up = |mut stream: UnixStream, why| {
        send_line(&mut stream, &Request::stop())?;
        // It has gone when it closes.
        let _ = stream.read(&mut [0]);
        Ok(Given::Nothing(why))
    };
    match answer.give {
        Some(version) if VERSIONS.contains(&version) => {}
        Some(_) => return give_up(stream, "it speaks another version"),
        None if answer.refuse.is_some() => return give_up(stream, "it understands no version of ours"),
        None => return give_up(stream, "it gives nothing"),
    }
    while descriptors.len() < answer.names.len() {
        let (len, more) = sys::receive_descriptors(stream.as_fd(), &mut [0; 16])?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        descriptors.extend(more);
    }
    let mut given = BTreeMap::<String, Bundle>::new();
    for (name, fd) in answer.names.iter().zip(descriptors) {
        // A kind we do not know is closed.
        if let Ok(label) = name.parse::<Label>() {
            given
                .entry(label.network)
                .or_default()
                .insert(label.kind, label.queue, fd);
        }
    }
    Ok(Given::Everything(given, stream))
}

/// Gives descriptors under their names.
///
/// # Errors
/// The successor is gone, or takes too long.
pub(super) fn give(
    successor: &mut UnixStream,
    version: u32,
    names: Vec<String>,
    descriptors: &[RawFd],
) -> io::Result<()> {
    successor.set_write_timeout(Some(PATIENCE))?;
    send_line(
        successor,
        &Answer {
            give: Some(version),
            names,
            refuse: None,
        },
    )?;
    for chunk in descriptors.chunks(AT_A_TIME) {
        send_descriptors(successor.as_fd(), chunk)?;
    }
    Ok(())
}

pub(super) fn send_line(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Reads a line without its end; `None` at the end of the stream.
fn read_line(stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Ok(None);
        }
        if byte == [b'\n'] {
            return Ok(Some(line));
        }
        line.push(byte[0]);
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

/// Reads a line and what descriptors come along with it or right after.
fn read_line_with_descriptors(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut line = Vec::new();
    let mut descriptors = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let (len, more) = sys::receive_descriptors(stream.as_fd(), &mut buffer)?;
        descriptors.extend(more);
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&buffer[..len]);
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end);
            return Ok((line, descriptors));
        }
        if line.len() > MAX_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

fn send_descriptors(stream: BorrowedFd<'_>, descriptors: &[RawFd]) -> io::Result<()> {
    let control = [ControlMessage::ScmRights(descriptors)];
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&[0])],
        &control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn another_version_is_refused_and_a_successor_that_goes_is_noticed() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs
            .write_all(b"{\"take\":[98,99],\"and\":\"more\"}\n")
            .unwrap();
        assert_eq!(hear(&mut ours).unwrap(), Wish::Refused);
        let mut line = [0; 64];
        let len = theirs.read(&mut line).unwrap();
        assert_eq!(&line[..len], b"{\"refuse\":[1]}\n");
        theirs.write_all(b"{\"stop\":true}\n").unwrap();
        assert_eq!(hear(&mut ours).unwrap(), Wish::End);
        theirs.write_all(b"nonsense\n").unwrap();
        assert!(hear(&mut ours).is_err());
        drop(theirs);
        assert_eq!(hear(&mut ours).unwrap(), Wish::Gone);
    }

    #[test]
    fn a_predecessor_of_another_version_is_told_to_stop() {
        for answer in [
            "{\"give\":2,\"things\":[]}\n",
            "{\"refuse\":[7]}\n",
            "{\"sing\":true}\n",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("takeover");
            let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let asking = thread::spawn(move || ask(&path).unwrap());
            let mut successor = listener.accept().unwrap().0;
            hear(&mut successor).unwrap();
            successor.write_all(answer.as_bytes()).unwrap();
            assert_eq!(hear(&mut successor).unwrap(), Wish::End, "{answer}");
            drop(successor);
            assert!(matches!(asking.join().unwrap(), Given::Nothing(_)), "{answer}");
        }
        assert!(matches!(ask(Path::new("/nowhere")).unwrap(), Given::Nobody));
    }
}
