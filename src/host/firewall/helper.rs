//! A process that runs the firewall tools for a daemon that has given up starting programs.
//!
//! ```text
//!   kersey run ──┬── starts ──▶ kersey firewall-helper ── starts ──▶ nft, iptables …
//!                └── sandbox: no execve from here on
//!   thread "firewall" ── Invocation ──▶ socket ──▶ checked, run ── Output ──▶ back
//! ```
//!
//! The helper is this very program, started before the sandbox is entered; the socket is its standard input, and it ends when that ends. What
//! it is asked it checks against the few calls there are (`is_known`): a daemon that was taken over can make firewall rules by it, which it
//! could anyway, and nothing else. It gives up what the tools do not need, as the daemon does: all capabilities but `CAP_NET_ADMIN` and
//! `CAP_NET_RAW`, and all files but programs, libraries and the lock of iptables ([`sandbox::enter_for_tools`]).
//!
//! Limits: a helper that was killed is not started again; the daemon says so, and rules stay as they are until it is restarted.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::host::firewall::tool::{Invocation, MAX_OUTPUT, Output, TIMEOUT, Tool, ToolError};
use crate::host::sandbox::{self, Part};

/// What the helper is called on its command line.
const NAME: &str = "firewall-helper";
/// How long an answer may take: the tool's time, and some for a busy machine.
const PATIENCE: Duration = Duration::from_secs(TIMEOUT.as_secs() + 5);
/// The largest message: two outputs, escaped as JSON.
const MAX_MESSAGE: u64 = 4 * MAX_OUTPUT + 1024;

static HELPER: OnceLock<Mutex<UnixStream>> = OnceLock::new();

/// What the helper answers.
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
    ours.set_read_timeout(Some(PATIENCE))?;
    let parts: Vec<&str> = parts.iter().map(|part| part.name()).collect();
    Command::new("/proc/self/exe")
        .arg0("kersey")
        .arg(NAME)
        .arg(parts.join(","))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(its)))
        .stdout(Stdio::null())
        .spawn()?;
    // A second start in one process would be a mistake of ours; the first helper does it all.
    let _ = HELPER.set(Mutex::new(ours));
    Ok(())
}

/// Asks the helper, if there is one.
pub(super) fn ask(invocation: &Invocation) -> Option<Result<Output, ToolError>> {
    let helper = HELPER.get()?;
    let program = invocation.tool().name();
    let mut stream = helper.lock().unwrap_or_else(PoisonError::into_inner);
    let answer: io::Result<Answer> = send(&mut stream, invocation).and_then(|()| receive(&mut stream));
    Some(match answer {
        Ok(Answer::Done(output)) => Ok(output),
        Ok(Answer::Missing) => Err(ToolError::Missing(program)),
        Ok(Answer::Silent) => Err(ToolError::Silent(program)),
        Ok(Answer::Verbose) => Err(ToolError::Verbose(program)),
        Ok(Answer::Failed(cause)) => Err(ToolError::Start {
            program,
            source: io::Error::other(cause),
        }),
        Err(error) => Err(ToolError::Start {
            program,
            source: io::Error::other(format!("the firewall helper is gone ({error}); restart kersey")),
        }),
    })
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
    let mut stream = UnixStream::from(input);
    stream
        .peer_addr()
        .map_err(|_| io::Error::other("this is started by kersey run, not by hand"))?;
    sandbox::enter_for_tools(parts).map_err(io::Error::other)?;
    loop {
        let invocation: Invocation = match receive(&mut stream) {
            Ok(invocation) => invocation,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        let answer = if is_known(&invocation) {
            match invocation.execute_here() {
                Ok(output) => Answer::Done(output),
                Err(ToolError::Missing(_)) => Answer::Missing,
                Err(ToolError::Silent(_)) => Answer::Silent,
                Err(ToolError::Verbose(_)) => Answer::Verbose,
                Err(ToolError::Start { source, .. }) => Answer::Failed(source.to_string()),
                Err(error @ ToolError::Refused { .. }) => Answer::Failed(error.to_string()),
            }
        } else {
            Answer::Failed("it is not what the firewall helper runs".to_owned())
        };
        send(&mut stream, &answer)?;
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
        (Tool::Iptables(..), ["-w", "-t", table, "-S"]) => is_table(table),
        (Tool::Iptables(..), ["-w", "-t", table, "-S", name]) => is_table(table) && is_name(name),
        (Tool::Restore(..), ["--noflush"] | ["--noflush", "--wait"]) => true,
        (Tool::LegacyTables(_), []) => true,
        (Tool::Nft | Tool::Iptables(..) | Tool::Restore(..) | Tool::LegacyTables(_), _) => false,
    };
    // nft reads other files where a script says so, and tells of what it cannot read in them.
    by_args && !invocation.input().contains("include")
}

fn send(stream: &mut UnixStream, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let len = u32::try_from(text.len()).map_err(io::Error::other)?;
    stream.write_all(&len.to_le_bytes())?;
    stream.write_all(&text)
}

fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<T> {
    let mut len = [0; 4];
    stream.read_exact(&mut len)?;
    let len = u64::from(u32::from_le_bytes(len));
    if len > MAX_MESSAGE {
        return Err(io::Error::other("a message is too long"));
    }
    let mut text = Vec::new();
    stream.take(len).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
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
            (iptables, &["-w", "-t", "nat", "-S", "POSTROUTING"], true),
            (iptables, &["-w", "-t", "raw", "-S"], false),
            (iptables, &["-w", "-t", "nat", "-S", "--modprobe=/tmp/x"], false),
            (restore, &["--noflush", "--wait"], true),
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
        let (mut one, mut two) = UnixStream::pair().unwrap();
        let sent = Invocation::new(Tool::Nft, &["-f", "-"]).reading("a \"quoted\"\ttext\n".to_owned());
        send(&mut one, &sent).unwrap();
        assert_eq!(receive::<Invocation>(&mut two).unwrap(), sent);
        one.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(receive::<Invocation>(&mut two).is_err());
    }
}
