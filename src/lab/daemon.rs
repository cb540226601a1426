//! Processes of a lab: `kersey run` on each node, and a store if it is a separate program.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::interrupt;
use crate::lab::netns::Namespace;
use crate::status::Status;

/// How long a process has between SIGTERM and SIGKILL. Giving a lease back takes one round trip to the store.
const GRACE: Duration = Duration::from_secs(3);
/// How much of a log is worth showing when something failed.
const LOG_LINES: usize = 15;

/// A process inside a namespace, ended on drop.
#[derive(Debug)]
pub struct Child {
    name: String,
    log: PathBuf,
    process: std::process::Child,
    owned: bool,
}

impl Child {
    /// Starts `command` in `namespace` with its output going to `log`.
    ///
    /// It gets a process group of its own: a Ctrl-C at the terminal is for the lab, which then ends its children.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(name: &str, namespace: &Namespace, mut command: Command, log: &Path) -> Result<Self> {
        let output = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share a log file")?)
            .stderr(output)
            .process_group(0);
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            process: namespace.spawn(&mut command)?,
            owned: true,
        })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Lets the process outlive this value.
    pub fn keep(&mut self) {
        self.owned = false;
    }

    /// Whether it ends with this value.
    pub fn is_owned(&self) -> bool {
        self.owned
    }

    /// Waits until `ready` gives a value, asking every 20 ms.
    ///
    /// # Errors
    /// The process ended, `limit` passed, or a signal came; the error holds the end of the log.
    pub fn wait<T>(&mut self, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            interrupt::check()?;
            if let Some(value) = ready() {
                return Ok(value);
            }
            if let Some(status) = self.process.try_wait().context("cannot ask after a child")? {
                bail!("{} ended early ({status})\n{}", self.name, self.log_end());
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} was not ready after {} s\n{}",
                    self.name,
                    limit.as_secs_f32(),
                    self.log_end()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Waits for the process to end by itself or of a signal sent before, and gives its exit status.
    ///
    /// # Errors
    /// It still runs after `limit`, or a signal came.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            interrupt::check()?;
            if let Some(status) = self.process.try_wait().context("cannot ask after a child")? {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "{} still runs after {} s\n{}",
                    self.name,
                    limit.as_secs_f32(),
                    self.log_end()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.pid()).context("a process number is positive")?);
        kill(pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Ends the process: SIGTERM, and SIGKILL if that takes too long.
    ///
    /// # Errors
    /// It had to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.owned = false;
        if !self.is_running() {
            return Ok(());
        }
        self.signal(Signal::SIGTERM)?;
        let deadline = Instant::now() + GRACE;
        while self.is_running() {
            if Instant::now() >= deadline {
                self.process
                    .kill()
                    .and_then(|()| self.process.wait())
                    .context("cannot kill a child")?;
                bail!(
                    "{} did not end within {} s of SIGTERM",
                    self.name,
                    GRACE.as_secs()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The last lines of its output.
    pub fn log_end(&self) -> String {
        let text = fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
        if last.is_empty() {
            return format!("  {} wrote nothing", self.name);
        }
        last.iter()
            .map(|line| format!("  {} | {line}", self.name))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.owned
            && let Err(error) = self.stop()
        {
            tracing::warn!(process = %self.name, error = %format!("{error:#}"), "not ended cleanly");
        }
    }
}

/// Reads the status document of the daemon behind `socket`; `None` while nobody answers there.
///
/// # Errors
/// Somebody answers, but not with a status document.
pub fn status(socket: &Path) -> Result<Option<Status>> {
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(|| format!("cannot connect to {}", socket.display())),
    };
    // A node answers from memory; this long means it hangs.
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .with_context(|| format!("cannot read {}", socket.display()))?;
    serde_json::from_str(&text)
        .map(Some)
        .with_context(|| format!("{} sent no status", socket.display()))
}
