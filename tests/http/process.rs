//! `kersey server` as a process of its own: what it uses, killed and started again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::CONFIG;

const KERSEY: &str = env!("CARGO_BIN_EXE_kersey");

/// A server process; killed when dropped.
pub(crate) struct Process {
    child: Child,
    /// Where it listens.
    pub(crate) address: String,
}

impl Process {
    /// Starts one over the embedded store in `dir`.
    pub(crate) fn start(dir: &Path, listen: &str, more: &[&str]) -> Self {
        Self::run(Command::new(KERSEY), dir, listen, more)
    }

    /// The same with a socket passed as systemd does it; READY is told to `notify`.
    pub(crate) fn start_by_socket(dir: &Path, socket: OwnedFd, notify: &Path) -> Self {
        // The shell's process number stays when it becomes the server.
        let script = "exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec \"$0\" \"$@\"";
        let mut command = Command::new("sh");
        command
            .args(["-c", script, KERSEY])
            .stdin(Stdio::from(socket))
            .env("NOTIFY_SOCKET", notify);
        Self::run(command, dir, "fd://", &[])
    }

    fn run(mut command: Command, dir: &Path, listen: &str, more: &[&str]) -> Self {
        let mut child = command
            .args(["server", "--log-format=json", "--network-config", CONFIG])
            .arg(format!("--listen={listen}"))
            .arg(format!("--data-dir={}", dir.display()))
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = loop {
            let line = lines.next().expect("the server runs").unwrap();
            let said: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            let fields = &said["fields"];
            if fields["message"] == "serving leases" {
                break fields["address"].as_str().unwrap().to_owned();
            }
            assert_ne!(said["level"], "ERROR", "{line}");
        };
        // A pipe that nobody reads would stop it one day.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
    }

    /// What the kernel says of each of its threads.
    pub(crate) fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        tasks
            .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
            .collect()
    }

    /// Resident memory, bytes.
    pub(crate) fn memory(&self) -> usize {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let kilobytes: usize = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kilobytes * 1024
    }

    /// Open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .unwrap()
            .count()
    }

    /// Kills it, as a crash would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to stop, and waits for its end.
    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        for _ in 0..100 {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("it does not stop");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
