//! A process that runs the firewall tools for a daemon that has given up starting programs.
//!
//! ```text
//!   kersey run ──┬── starts ──▶ kersey firewall-helper ── starts ──▶ nft, iptables …
//!                └── sandbox: no execve from here on
//!   thread "firewall" ── Invocation ──▶ socket ──▶ checked, run ── Output ──▶ back
//! ```
//!
//! The helper is this very program, started before the sandbox is entered; the socket is its standard input, and it ends when that ends, which the daemon waits for ([`end`]). What
//! it is asked it checks against the few calls there are (`is_known`): a daemon that was taken over can make firewall rules by it, which it
//! could anyway, and nothing else. It gives up what the tools do not need, as the daemon does: all capabilities but `CAP_NET_ADMIN` and
//! `CAP_NET_RAW`, and all files but programs, libraries and the lock of iptables ([`sandbox::enter_for_tools`]).
//!
//! # In step
//!
//! A helper that is stopped, or starved, answers late. Requests are numbered and an answer carries its request's number; while one is
//! unanswered no other is sent, and an answer to one that nobody waits for any more is dropped. What arrived of a message, or could be sent of
//! one, when the time was up is kept, so that the next call goes on where this one ended (`Channel`).
//!
//! # When it dies
//!
//! A daemon in its sandbox cannot start another. [`state`] tells, and the daemon is then ill: the watchdog goes hungry, and whoever
//! supervises it starts it again. Rules stay as they are meanwhile.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::host::firewall::tool::{
    Invocation, MAX_OUTPUT, Output, RESTORE_WAIT, TIMEOUT, Tool, ToolError, WAIT,
};
use crate::host::sandbox::{self, Part};

/// What the helper is called on its command line.
const NAME: &str = "firewall-helper";
/// What the kernel calls it: 15 bytes are all it keeps.
const PROCESS_NAME: &CStr = c"kersey-firewall";
/// How long the end of the daemon waits for the helper's: a call that is under way is not to be cut off.
const LAST_CALL: Duration = Duration::from_secs(2);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(2);
/// How long an answer may take: the tool's time, and some for a busy machine.
const PATIENCE: Duration = Duration::from_secs(TIMEOUT.as_secs() + 5);
/// The largest message: two outputs, escaped as JSON.
const MAX_MESSAGE: usize = 4 * MAX_OUTPUT as usize + 1024;

static HELPER: OnceLock<Helper> = OnceLock::new();
static ENDING: AtomicBool = AtomicBool::new(false);

/// The daemon's side.
struct Helper {
    child: Mutex<Child>,
    channel: Mutex<Channel>,
    /// The channel's socket, for whoever ends it while it is in use.
    socket: UnixStream,
}

/// How the helper is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There is none, and none was wanted.
    None,
    /// It runs.
    Alive,
    /// It ran, and has ended.
    Ended,
}

/// What the helper is asked.
#[derive(Debug, Serialize, Deserialize)]
struct Asked {
    number: u64,
    invocation: Invocation,
}

/// What the helper says.
#[derive(Debug, Serialize, Deserialize)]
struct Answered {
    number: u64,
    answer: Answer,
}

/// What came of a call.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// The tool ran to its end.
    Done(Output),
    /// It is not there.
    Missing,
    /// It took too long.
    Silent,
    /// It said too much.
    Verbose,
    /// It could not be started.
    Failed(String),
}

/// Starts the helper, which gives up the given parts; from then on tools are run by it.
///
/// # Errors
/// It cannot be started.
pub fn start(parts: &[Part]) -> io::Result<()> {
    let (ours, its) = UnixStream::pair()?;
    let socket = ours.try_clone()?;
    let parts: Vec<&str> = parts.iter().map(|part| part.name()).collect();
    let child = Command::new("/proc/self/exe")
        .arg0("kersey")
        .arg(NAME)
        .arg(parts.join(","))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::null())
        .spawn()?;
    // A second start in one process would be a mistake of ours; the first helper does it all.
    let _ = HELPER.set(Helper {
        child: Mutex::new(child),
        channel: Mutex::new(Channel::new(ours)),
        socket,
    });
    Ok(())
}

/// How the helper is as of now. One that has ended is reaped.
pub fn state() -> State {
    let Some(helper) = HELPER.get() else {
        return State::None;
    };
    let mut child = helper.child.lock().unwrap_or_else(PoisonError::into_inner);
    match child.try_wait() {
        Ok(None) => State::Alive,
        Ok(Some(_)) | Err(_) => State::Ended,
    }
}

/// Whether the daemon is ending it: a call that fails then is no trouble.
pub fn is_ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// Ends the helper, if there is one, and waits until it has ended; not for long.
#[expect(
    clippy::disallowed_methods,
    reason = "a shell: the process ends after this, and time is up by the clock"
)]
pub fn end() {
    let Some(helper) = HELPER.get() else {
        return;
    };
    ENDING.store(true, Ordering::Relaxed);
    // Nothing can be done about an error: then it has ended.
    let _ = helper.socket.shutdown(Shutdown::Both);
    let deadline = Instant::now() + LAST_CALL;
    while state() == State::Alive && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
}

/// Asks the helper, if there is one.
pub(super) fn ask(invocation: &Invocation) -> Option<Result<Output, ToolError>> {
    let helper = HELPER.get()?;
    let mut channel = helper.channel.lock().unwrap_or_else(PoisonError::into_inner);
    Some(call(&mut channel, invocation, PATIENCE))
}

/// Asks by `channel`, and waits for the answer to this and to nothing else.
#[expect(
    clippy::disallowed_methods,
    reason = "a shell: time is up by the clock, also if this process was stopped meanwhile"
)]
fn call(channel: &mut Channel, invocation: &Invocation, patience: Duration) -> Result<Output, ToolError> {
    let program = invocation.tool().name();
    let deadline = Instant::now() + patience;
    let failed = |error: io::Error| {
        if error.kind() == io::ErrorKind::TimedOut {
            return ToolError::Silent(program);
        }
        let source = io::Error::other(format!("the firewall helper is gone ({error}); restart kersey"));
        ToolError::Start { program, source }
    };
    // What nobody waits for any more comes first.
    while channel.unanswered.is_some() {
        let late: Answered = channel.receive(deadline).map_err(failed)?;
        if channel.unanswered == Some(late.number) {
            channel.unanswered = None;
        }
    }
    channel.number += 1;
    let number = channel.number;
    channel.unanswered = Some(number);
    let asked = Asked {
        number,
        invocation: invocation.clone(),
    };
    channel.send(&asked, deadline).map_err(failed)?;
    let answer = loop {
        let answered: Answered = channel.receive(deadline).map_err(failed)?;
        if answered.number == number {
            break answered.answer;
        }
    };
    channel.unanswered = None;
    match answer {
        Answer::Done(output) => Ok(output),
        Answer::Missing => Err(ToolError::Missing(program)),
        Answer::Silent => Err(ToolError::Silent(program)),
        Answer::Verbose => Err(ToolError::Verbose(program)),
        Answer::Failed(cause) => Err(ToolError::Start {
            program,
            source: io::Error::other(cause),
        }),
    }
}

/// Is the helper, if the command line says so: until the daemon ends.
pub fn run_if_asked(args: &[String]) -> Option<ExitCode> {
    let [_, name, parts] = args else {
        return None;
    };
    if name != NAME {
        return None;
    }
    let parts: Vec<Part> = Part::ALL
        .into_iter()
        .filter(|part| parts.split(',').any(|name| name == part.name()))
        .collect();
    Some(match serve(&parts) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever types this at a terminal; the daemon hears of it by the socket that closes.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    })
}

fn serve(parts: &[Part]) -> io::Result<()> {
    let input = io::stdin().as_fd().try_clone_to_owned()?;
    let stream = UnixStream::from(input);
    stream
        .peer_addr()
        .map_err(|_| io::Error::other("this is started by kersey run, not by hand"))?;
    // What a terminal, a service manager or `pkill kersey` tells all processes of a daemon is for the daemon; this one ends with it. Tools
    // inherit that; one that takes too long is killed.
    let daemons: SigSet = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM]
        .into_iter()
        .collect();
    daemons.thread_block()?;
    // By which it is known in process lists and to the service manager; it was started as /proc/self/exe.
    let _ = prctl::set_name(PROCESS_NAME);
    sandbox::enter_for_tools(parts).map_err(io::Error::other)?;
    let mut channel = Channel::new(stream);
    loop {
        let asked: Asked = match channel.receive(None) {
            Ok(asked) => asked,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let answered = Answered {
            number: asked.number,
            answer: answer(&asked.invocation),
        };
        match channel.send(&answered, None) {
            // The daemon ended and did not wait.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            sent => sent?,
        }
    }
}

fn answer(invocation: &Invocation) -> Answer {
    if !is_known(invocation) {
        return Answer::Failed("it is not what the firewall helper runs".to_owned());
    }
    match invocation.execute_here() {
        Ok(output) => Answer::Done(output),
        Err(ToolError::Missing(_)) => Answer::Missing,
        Err(ToolError::Silent(_)) => Answer::Silent,
        Err(ToolError::Verbose(_)) => Answer::Verbose,
        Err(ToolError::Start { source, .. }) => Answer::Failed(source.to_string()),
        Err(error @ ToolError::Refused { .. }) => Answer::Failed(error.to_string()),
    }
}

/// Whether a call is one that Kersey makes.
fn is_known(invocation: &Invocation) -> bool {
    let args: Vec<&str> = invocation.args().iter().map(String::as_str).collect();
    let is_name = |name: &str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !name.starts_with('-') && (1..=64).contains(&name.len()) && name.bytes().all(plain)
    };
    let is_table = |table: &str| table == "nat" || table == "filter";
    let by_args = match (invocation.tool(), args.as_slice()) {
        (Tool::Nft, ["-f", "-"] | ["list", "tables" | "chains"]) => true,
        (Tool::Nft, ["-s", "list", "table", "ip" | "ip6", name]) => is_name(name),
        (Tool::Iptables(..), ["--version"]) => true,
        (Tool::Iptables(..), ["-w", WAIT, "-t", table, "-S"] | ["-w", "-t", table, "-S"]) => is_table(table),
        (Tool::Iptables(..), ["-w", WAIT, "-t", table, "-S", name] | ["-w", "-t", table, "-S", name]) => {
            is_table(table) && is_name(name)
        }
        (Tool::Restore(..), ["--noflush"] | ["--noflush", RESTORE_WAIT]) => true,
        (Tool::LegacyTables(_), []) => true,
        (Tool::Nft | Tool::Iptables(..) | Tool::Restore(..) | Tool::LegacyTables(_), _) => false,
    };
    // nft reads other files where a script says so, and tells of what it cannot read in them.
    by_args && !invocation.input().contains("include")
}

/// Messages over a socket, each a length and JSON; one that did not come or go whole in time is gone on with by the next call.
struct Channel {
    stream: UnixStream,
    /// What has arrived and was not taken yet.
    arrived: Vec<u8>,
    /// What is still to be sent.
    unsent: VecDeque<u8>,
    /// The number of the last request.
    number: u64,
    /// The request that no answer has come to.
    unanswered: Option<u64>,
}

impl Channel {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            arrived: Vec::new(),
            unsent: VecDeque::new(),
            number: 0,
            unanswered: None,
        }
    }

    fn send(&mut self, message: &impl Serialize, deadline: impl Into<Option<Instant>>) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let len = u32::try_from(text.len()).map_err(io::Error::other)?;
        self.unsent.extend(len.to_le_bytes());
        self.unsent.extend(text);
        self.flush(deadline.into())
    }

    /// Sends what is still to be sent.
    fn flush(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        while !self.unsent.is_empty() {
            self.stream.set_write_timeout(left(deadline)?)?;
            let (first, _) = self.unsent.as_slices();
            match self.stream.write(first) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) => not_yet(error)?,
            }
        }
        Ok(())
    }

    fn receive<T: DeserializeOwned>(&mut self, deadline: impl Into<Option<Instant>>) -> io::Result<T> {
        let deadline = deadline.into();
        // A request that went in part only is answered by nobody.
        self.flush(deadline)?;
        loop {
            if let Some((len, rest)) = self.arrived.split_first_chunk::<4>() {
                let len = u32::from_le_bytes(*len) as usize;
                if len > MAX_MESSAGE {
                    return Err(io::Error::other("a message is too long"));
                }
                if let Some(text) = rest.get(..len) {
                    let message = serde_json::from_slice(text);
                    self.arrived.drain(..4 + len);
                    return Ok(message?);
                }
            }
            self.stream.set_read_timeout(left(deadline)?)?;
            let mut chunk = [0; 65536];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => self.arrived.extend(&chunk[..got]),
                Err(error) => not_yet(error)?,
            }
        }
    }
}

/// The time that is left.
#[expect(
    clippy::disallowed_methods,
    reason = "a shell: time is up by the clock, also if this process was stopped meanwhile"
)]
fn left(deadline: Option<Instant>) -> io::Result<Option<Duration>> {
    let Some(deadline) = deadline else {
        return Ok(None);
    };
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(Some(left))
}

/// An error that only says that nothing has come or gone yet is none.
fn not_yet(error: io::Error) -> io::Result<()> {
    let passes = [
        io::ErrorKind::WouldBlock,
        io::ErrorKind::TimedOut,
        io::ErrorKind::Interrupted,
    ];
    if passes.contains(&error.kind()) {
        Ok(())
    } else {
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::firewall::tool::{Family, Flavour};

    #[test]
    fn only_the_calls_that_kersey_makes_are_run() {
        let iptables = Tool::Iptables(Family::V4, Flavour::Default);
        let restore = Tool::Restore(Family::V6, Flavour::Legacy);
        for (tool, args, known) in [
            (Tool::Nft, &["-f", "-"][..], true),
            (Tool::Nft, &["-s", "list", "table", "ip", "flannel-ipv4"], true),
            (Tool::Nft, &["-f", "/etc/shadow"], false),
            (Tool::Nft, &["-s", "list", "table", "ip", "-f"], false),
            (Tool::Nft, &["flush", "ruleset"], false),
            (iptables, &["-w", "5", "-t", "nat", "-S", "POSTROUTING"], true),
            (iptables, &["-w", "-t", "nat", "-S", "POSTROUTING"], true),
            (
                iptables,
                &["-w", "99999", "-t", "nat", "-S", "POSTROUTING"],
                false,
            ),
            (iptables, &["-w", "-t", "raw", "-S"], false),
            (iptables, &["-w", "-t", "nat", "-S", "--modprobe=/tmp/x"], false),
            (restore, &["--noflush", "--wait=5"], true),
            (restore, &["--noflush", "--wait"], false),
            (restore, &[], false),
            (restore, &["--modprobe=/tmp/x"], false),
        ] {
            assert_eq!(is_known(&Invocation::new(tool, args)), known, "{tool:?} {args:?}");
        }
        let script = Invocation::new(Tool::Nft, &["-f", "-"]);
        let reading = |text: &str| script.clone().reading(text.to_owned());
        assert!(is_known(&reading("add table ip flannel-ipv4\n")));
        assert!(!is_known(&reading("add table ip x; include \"/etc/shadow\"\n")));
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let (one, two) = UnixStream::pair().unwrap();
        let (mut one, mut two) = (Channel::new(one), Channel::new(two));
        let sent = Invocation::new(Tool::Nft, &["-f", "-"]).reading("a \"quoted\"\ttext\n".to_owned());
        one.send(&sent, None).unwrap();
        assert_eq!(two.receive::<Invocation>(None).unwrap(), sent);
        one.stream.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(two.receive::<Invocation>(None).is_err());
    }

    fn done(text: &str) -> Answer {
        Answer::Done(Output {
            success: true,
            text: text.to_owned(),
            error: String::new(),
        })
    }

    #[test]
    fn an_answer_that_comes_too_late_is_not_taken_for_the_next_ones() {
        let (ours, its) = UnixStream::pair().unwrap();
        let (mut ours, mut its) = (Channel::new(ours), Channel::new(its));
        let soon = Duration::from_millis(50);
        let list = |chain: &str| Invocation::new(Tool::Nft, &["list"]).with(chain);
        let silent = |asked| matches!(asked, Err(ToolError::Silent("nft")));
        assert!(silent(call(&mut ours, &list("first"), soon)));
        // While that is unanswered nothing else is asked: what is done late must not be done after what comes later.
        assert!(silent(call(&mut ours, &list("second"), soon)));
        let first: Asked = its.receive(None).unwrap();
        assert_eq!(first.invocation, list("first"));
        its.stream.set_nonblocking(true).unwrap();
        assert_eq!(
            its.stream.read(&mut [0; 1]).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        its.stream.set_nonblocking(false).unwrap();
        let helper = std::thread::spawn(move || {
            let answered = Answered {
                number: first.number,
                answer: done("first"),
            };
            its.send(&answered, None).unwrap();
            let third: Asked = its.receive(None).unwrap();
            let answered = Answered {
                number: third.number,
                answer: done(third.invocation.args().last().unwrap()),
            };
            its.send(&answered, None).unwrap();
        });
        let output = call(&mut ours, &list("third"), PATIENCE).unwrap();
        assert_eq!(output.text, "third");
        helper.join().unwrap();
    }

    #[test]
    fn messages_cut_short_by_the_clock_are_gone_on_with() {
        let (ours, its) = UnixStream::pair().unwrap();
        let mut ours = Channel::new(ours);
        let soon = Duration::from_millis(50);
        // More than a socket holds: nobody reads yet.
        let long = Invocation::new(Tool::Nft, &["-f", "-"]).reading("x".repeat(3_000_000));
        assert!(matches!(call(&mut ours, &long, soon), Err(ToolError::Silent(_))));
        let wanted = long.clone();
        let helper = std::thread::spawn(move || {
            let mut its = Channel::new(its);
            let first: Asked = its.receive(None).unwrap();
            assert_eq!(first.invocation, wanted);
            // Half an answer, and the rest when the other has given up again.
            let mut whole = serde_json::to_vec(&Answered {
                number: first.number,
                answer: done("first"),
            })
            .unwrap();
            let mut message = u32::try_from(whole.len()).unwrap().to_le_bytes().to_vec();
            message.append(&mut whole);
            let (half, rest) = message.split_at(message.len() / 2);
            its.stream.write_all(half).unwrap();
            std::thread::sleep(soon * 4);
            its.stream.write_all(rest).unwrap();
            let next: Asked = its.receive(None).unwrap();
            let answered = Answered {
                number: next.number,
                answer: done("next"),
            };
            its.send(&answered, None).unwrap();
        });
        let list = Invocation::new(Tool::Nft, &["list", "tables"]);
        assert!(matches!(
            call(&mut ours, &list, soon * 2),
            Err(ToolError::Silent(_))
        ));
        assert_eq!(call(&mut ours, &list, PATIENCE).unwrap().text, "next");
        helper.join().unwrap();
    }
}
