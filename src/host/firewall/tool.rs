//! The programs firewall rules are made with: the only place in the daemon that starts programs, beside the start of the
//! `helper` that does it once the daemon has given that up.
//!
//! An [`Invocation`] is a tool, arguments that are fixed texts but for names of tables and chains (see [`Invocation::with`]), and a text
//! for its standard input. [`Invocation::execute`] finds the program in [`FOLDERS`] and nowhere else, starts it without a shell and with an
//! environment of two variables, and waits. It blocks, so it runs on a thread that does nothing else; it needs no runtime.
//!
//! The tools need `CAP_NET_ADMIN`, and the old iptables `CAP_NET_RAW` and the lock file `/run/xtables.lock`; whoever is not root hands
//! capabilities on as *ambient* ones. An [`Invocation`] and its [`Output`] hold nothing but text, so that they can travel.
//!
//! Bounds: [`TIMEOUT`] a call, after which the program is killed; [`MAX_OUTPUT`] bytes of each output.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::helper;

/// Where programs are looked for, in this order.
pub const FOLDERS: [&str; 6] = [
    "/usr/sbin",
    "/sbin",
    "/usr/bin",
    "/bin",
    "/usr/local/sbin",
    "/usr/local/bin",
];
/// How long a program may take, by the clock. Waiting for the lock of iptables is part of it; that wait is told to be shorter ([`WAIT`]).
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// How long iptables waits for its lock, in seconds.
pub const WAIT: &str = "5";
/// The same, as one argument of iptables-restore.
pub const RESTORE_WAIT: &str = "--wait=5";
/// How much output is taken. What we ask for is a chain or a table of our own at a time; a chain of somebody else's may have thousands of
/// rules of a hundred bytes.
pub const MAX_OUTPUT: u64 = 4 * 1024 * 1024;
/// How often a running program is looked after. They take 2 to 20 ms.
const LOOK: Duration = Duration::from_millis(1);

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tool {
    /// `nft`.
    Nft,
    /// `iptables` or `ip6tables`, of a flavour.
    Iptables(Family, Flavour),
    /// `iptables-restore` or `ip6tables-restore`, of a flavour.
    Restore(Family, Flavour),
    /// No program, but a file that only root reads: which tables the old iptables has in this namespace, a line each. It is not there until
    /// the kernel has such tables at all.
    LegacyTables(Family),
}

/// An address family, as firewall tools tell them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which iptables: hosts may have two, with separate rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Flavour {
    /// The one called `iptables`, whichever it is.
    Default,
    /// The one over nf_tables.
    Nft,
    /// The old one.
    Legacy,
}

impl Tool {
    /// The program's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nft => "nft",
            Self::Iptables(Family::V4, Flavour::Default) => "iptables",
            Self::Iptables(Family::V4, Flavour::Nft) => "iptables-nft",
            Self::Iptables(Family::V4, Flavour::Legacy) => "iptables-legacy",
            Self::Iptables(Family::V6, Flavour::Default) => "ip6tables",
            Self::Iptables(Family::V6, Flavour::Nft) => "ip6tables-nft",
            Self::Iptables(Family::V6, Flavour::Legacy) => "ip6tables-legacy",
            Self::Restore(Family::V4, Flavour::Default) => "iptables-restore",
            Self::Restore(Family::V4, Flavour::Nft) => "iptables-nft-restore",
            Self::Restore(Family::V4, Flavour::Legacy) => "iptables-legacy-restore",
            Self::Restore(Family::V6, Flavour::Default) => "ip6tables-restore",
            Self::Restore(Family::V6, Flavour::Nft) => "ip6tables-nft-restore",
            Self::Restore(Family::V6, Flavour::Legacy) => "ip6tables-legacy-restore",
            Self::LegacyTables(Family::V4) => "/proc/net/ip_tables_names",
            Self::LegacyTables(Family::V6) => "/proc/net/ip6_tables_names",
        }
    }

    /// Where the program is, if it is there.
    pub fn path(self) -> Option<PathBuf> {
        FOLDERS
            .iter()
            .map(|folder| PathBuf::from(folder).join(self.name()))
            .find(|path| {
                path.metadata()
                    .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
            })
    }
}

/// One call of a tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invocation {
    tool: Tool,
    args: Vec<String>,
    input: String,
}

/// What a tool said, and whether it succeeded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Whether its exit status was 0.
    pub success: bool,
    /// Standard output.
    pub text: String,
    /// Standard error.
    pub error: String,
}

/// A tool could not be called, or did not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not there.
    #[error("{0} is not installed")]
    Missing(&'static str),
    /// It could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// The program.
        program: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// It took too long, and was killed.
    #[error("{0} did not end within {t} s", t = TIMEOUT.as_secs())]
    Silent(&'static str),
    /// It said too much, and was killed.
    #[error("{0} wrote more than {MAX_OUTPUT} bytes")]
    Verbose(&'static str),
    /// It refused.
    #[error("{program} refuses: {said}")]
    Refused {
        /// The program.
        program: &'static str,
        /// Its own words.
        said: String,
    },
}

impl ToolError {
    /// Whether the kernel has not what the tool is made for: of nf_tables built without a family, an error of its own; of a kernel without
    /// nf_tables, the one for a subsystem that is not there.
    pub(super) fn is_unsupported(&self) -> bool {
        let Self::Refused { said, .. } = self else {
            return false;
        };
        ["not supported", "Invalid argument"]
            .iter()
            .any(|words| said.contains(words))
    }
}

impl Invocation {
    /// A call with fixed arguments.
    pub fn new(tool: Tool, args: &[&'static str]) -> Self {
        Self {
            tool,
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            input: String::new(),
        }
    }

    /// Adds the name of a table or chain as the last argument.
    pub fn with(mut self, name: &str) -> Self {
        self.args.push(name.to_owned());
        self
    }

    /// Sets what it reads.
    pub fn reading(mut self, text: String) -> Self {
        self.input = text;
        self
    }

    pub(super) fn tool(&self) -> Tool {
        self.tool
    }

    pub(super) fn args(&self) -> &[String] {
        &self.args
    }

    pub(super) fn input(&self) -> &str {
        &self.input
    }

    /// Has the tool run, by the helper if there is one, and waits for its end.
    ///
    /// # Errors
    /// It could not be run to its end; that it refused is told by [`Output::success`].
    pub fn execute(&self) -> Result<Output, ToolError> {
        helper::ask(self).unwrap_or_else(|| self.execute_here())
    }

    /// Runs the tool from this process.
    #[expect(
        clippy::disallowed_methods,
        reason = "a shell: a program's time is up by the clock, also if this process was stopped meanwhile"
    )]
    pub(super) fn execute_here(&self) -> Result<Output, ToolError> {
        let program = self.tool.name();
        if let Tool::LegacyTables(_) = self.tool {
            return Ok(match std::fs::read_to_string(program) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Output {
                    success: false,
                    text: String::new(),
                    error: error.to_string(),
                },
                read => Output {
                    success: true,
                    text: read.unwrap_or_default(),
                    error: String::new(),
                },
            });
        }
        let path = self.tool.path().ok_or(ToolError::Missing(program))?;
        let failed = |source| ToolError::Start { program, source };
        // Files and not pipes: a program that neither reads nor is read cannot block, nor block us.
        let mut input = memory(c"firewall-in").map_err(failed)?;
        let mut output = memory(c"firewall-out").map_err(failed)?;
        let mut error = memory(c"firewall-err").map_err(failed)?;
        input
            .write_all(self.input.as_bytes())
            .and_then(|()| input.seek(SeekFrom::Start(0)).map(drop))
            .map_err(failed)?;
        let mut child = Command::new(path)
            .args(&self.args)
            .env_clear()
            // iptables looks for modprobe.
            .env("PATH", FOLDERS.join(":"))
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output.try_clone().map_err(failed)?))
            .stderr(Stdio::from(error.try_clone().map_err(failed)?))
            .spawn()
            .map_err(failed)?;
        let deadline = Instant::now() + TIMEOUT;
        let ended: Result<ExitStatus, ToolError> = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) => {}
                Err(source) => break Err(failed(source)),
            }
            if Instant::now() >= deadline {
                break Err(ToolError::Silent(program));
            }
            if size(&output) > MAX_OUTPUT || size(&error) > MAX_OUTPUT {
                break Err(ToolError::Verbose(program));
            }
            thread::sleep(LOOK);
        };
        if ended.is_err() {
            // It may have ended by itself meanwhile.
            let _ = child.kill();
            let _ = child.wait();
        }
        let ended = ended?;
        Ok(Output {
            success: ended.success(),
            text: read(&mut output).map_err(failed)?,
            error: read(&mut error).map_err(failed)?,
        })
    }

    /// Runs the tool; a refusal is an error.
    ///
    /// # Errors
    /// It could not be run, or refused.
    pub fn demand(&self) -> Result<String, ToolError> {
        let output = self.execute()?;
        if output.success {
            Ok(output.text)
        } else {
            Err(self.refused(&output))
        }
    }

    /// The refusal that an output is.
    pub fn refused(&self, output: &Output) -> ToolError {
        let said: Vec<&str> = output
            .error
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('^'))
            .take(3)
            .collect();
        let mut said = said.join("; ");
        if said.is_empty() {
            "without a word".clone_into(&mut said);
        }
        ToolError::Refused {
            program: self.tool.name(),
            said,
        }
    }
}

fn memory(name: &std::ffi::CStr) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

fn size(file: &File) -> u64 {
    file.metadata().map_or(0, |meta| meta.len())
}

fn read(file: &mut File) -> io::Result<String> {
    // The child's copy has the same place in the file.
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(MAX_OUTPUT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
