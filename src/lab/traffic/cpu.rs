//! Processor time: of the whole machine, and of one process.
//!
//! Work done for packets in interrupts is charged to whoever happens to run, so only the machine's total says what
//! a way of moving packets costs.

use std::fs;
use std::ops::Sub;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;

/// Processor time, since boot or between two readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct MachineCpu {
    /// Seconds spent working: user, nice, system, and both kinds of interrupts.
    pub busy_s: f64,
    /// Seconds the host machine took away from this guest.
    pub steal_s: f64,
    /// Seconds in all, idle included.
    pub total_s: f64,
}

impl MachineCpu {
    /// Reads `/proc/stat`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn now() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        Self::parse(&text, ticks_per_s()?).context("/proc/stat looks strange")
    }

    fn parse(text: &str, ticks_per_s: f64) -> Option<Self> {
        let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<f64> = line
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        // The fields of proc_stat(5); guest time, after these, is part of user time already.
        let [user, nice, system, idle, iowait, irq, softirq, steal, ..] = ticks[..] else {
            return None;
        };
        let busy = user + nice + system + irq + softirq;
        Some(Self {
            busy_s: busy / ticks_per_s,
            steal_s: steal / ticks_per_s,
            total_s: (busy + idle + iowait + steal) / ticks_per_s,
        })
    }

    /// The share of time stolen, in percent.
    pub fn steal_percent(&self) -> f64 {
        if self.total_s == 0.0 {
            return 0.0;
        }
        self.steal_s / self.total_s * 100.0
    }

    /// The share of time spent working, in percent.
    pub fn busy_percent(&self) -> f64 {
        if self.total_s == 0.0 {
            return 0.0;
        }
        self.busy_s / self.total_s * 100.0
    }

    /// Seconds of work for 10⁹ bytes.
    pub fn per_gb(&self, bytes: u64) -> Option<f64> {
        (bytes > 0).then(|| self.busy_s / (bytes as f64 / 1e9))
    }
}

impl Sub for MachineCpu {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            busy_s: self.busy_s - earlier.busy_s,
            steal_s: self.steal_s - earlier.steal_s,
            total_s: self.total_s - earlier.total_s,
        }
    }
}

/// The user and system time a process has used, all threads together.
///
/// # Errors
/// There is no such process.
pub fn process(pid: u32) -> Result<Duration> {
    let text =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("no process {pid}"))?;
    // The second field, the name in brackets, may hold anything; the third follows its last bracket.
    let fields = text
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split_whitespace())
        .context("strange stat")?;
    let ticks: f64 = fields
        .skip(11)
        .take(2)
        .map_while(|word| word.parse::<f64>().ok())
        .sum();
    Ok(Duration::from_secs_f64(ticks / ticks_per_s()?))
}

fn ticks_per_s() -> Result<f64> {
    let ticks = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.context("no clock tick")?;
    Ok(ticks as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_everything_but_idle_and_stolen() {
        let text = "cpu  100 10 200 1000 50 5 25 60 7 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
        let cpu = MachineCpu::parse(text, 100.0).unwrap();
        assert_eq!((cpu.busy_s, cpu.steal_s, cpu.total_s), (3.4, 0.6, 14.5));
    }
}
