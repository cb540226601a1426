//! The threads that turn the data plane's directions.
//!
//! Two layouts. *Joined*: one thread a queue takes both directions in turn and sleeps when both are idle; fewer wake-ups, for machines with
//! few cores. *Split*: a thread a direction, for machines with cores to spare. A sleeping thread wakes at least once a second, so that
//! it lets go of an old route snapshot.

use std::io::{self, PipeReader, PipeWriter};
use std::iter::once;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::dataplane::Encap;
use crate::dataplane::route::SharedRoutes;
use crate::dataplane::stats::{Count, WorkerStats};
use crate::dataplane::worker::{Inbound, InboundOptions, Outbound, Turn};
use crate::host::socket::UdpUnderlay;
use crate::host::sys::{self, Ready};
use crate::host::tun::{Tun, TunQueue};

/// How long an idle thread sleeps at the most.
const IDLE_MS: i32 = 1000;

/// Which threads turn which directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One thread a queue.
    Joined,
    /// One thread a direction.
    Split,
}

impl Layout {
    /// Joined below four cores: there, a second thread a node mostly wakes the first.
    pub fn for_cores(cores: usize) -> Self {
        if cores < 4 { Self::Joined } else { Self::Split }
    }
}

/// The running threads; dropping stops them.
pub struct Queues {
    stop: Option<PipeWriter>,
    threads: Vec<JoinHandle<()>>,
    /// Counters, one set a queue and direction.
    stats: Vec<Arc<WorkerStats>>,
}

impl Queues {
    /// Starts the threads of all queues.
    ///
    /// A thread whose device or socket is beyond use says why on `failed` and ends. The channel holds a message a thread; if it is full, the
    /// reader already knows.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn start<E: Encap + Sync>(
        encap: E,
        tun: Tun,
        underlays: Vec<UdpUnderlay>,
        routes: &SharedRoutes<E::Hop>,
        (layout, options): (Layout, InboundOptions),
        failed: mpsc::Sender<io::Error>,
    ) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let mut queues = Self {
            stop: Some(stop),
            threads: Vec::new(),
            stats: Vec::new(),
        };
        for (index, ((tun_out, tun_in), underlay)) in
            tun.into_queues()?.into_iter().zip(underlays).enumerate()
        {
            let now = now();
            let mut stats = || {
                let stats = Arc::<WorkerStats>::default();
                queues.stats.push(Arc::clone(&stats));
                (index, stats)
            };
            let mut outbound = Outbound::new(
                encap.clone(),
                (tun_out, underlay.try_clone()?),
                routes.reader(),
                stats(),
                now,
            );
            let mut inbound = Inbound::new(
                encap.clone(),
                (tun_in, underlay),
                routes.reader(),
                stats(),
                options,
                now,
            );
            // Without huge pages it is a little slower, nothing else.
            let _ = sys::advise_huge_pages(outbound.memory())
                .and_then(|()| sys::advise_huge_pages(inbound.memory()));
            match layout {
                Layout::Joined => {
                    queues.spawn(
                        format!("queue-{index}"),
                        Joined { outbound, inbound },
                        &stopped,
                        &failed,
                    )?;
                }
                Layout::Split => {
                    queues.spawn(format!("outbound-{index}"), outbound, &stopped, &failed)?;
                    queues.spawn(format!("inbound-{index}"), inbound, &stopped, &failed)?;
                }
            }
        }
        Ok(queues)
    }

    fn spawn(
        &mut self,
        name: String,
        mut work: impl Work + Send + 'static,
        stopped: &PipeReader,
        failed: &mpsc::Sender<io::Error>,
    ) -> io::Result<()> {
        let stopped = stopped.try_clone()?;
        let failed = failed.clone();
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            if let Err(error) = run(&mut work, &stopped) {
                // Full or closed: the daemon is already rebuilding or stopping.
                let _ = failed.try_send(error);
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Counters, one set a queue and direction.
    pub fn stats(&self) -> &[Arc<WorkerStats>] {
        &self.stats
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        // Closing the pipe wakes every sleeper.
        self.stop = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// Something a thread turns until there is nothing to do, and then waits for.
trait Work {
    fn turn(&mut self, now: Instant) -> io::Result<Turn>;
    fn stats(&self) -> &WorkerStats;
    /// Waits until there may be something to do, or `stopped` says that there never will be: then the first is ready.
    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready>;
}

impl<E: Encap> Work for Outbound<E, TunQueue, UdpUnderlay> {
    fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        Outbound::turn(self, now)
    }

    fn stats(&self) -> &WorkerStats {
        Outbound::stats(self)
    }

    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready> {
        sys::wait_readable([stopped, self.device().readable()], IDLE_MS)
    }
}

impl<E: Encap> Work for Inbound<E, TunQueue, UdpUnderlay> {
    fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        Inbound::turn(self, now)
    }

    fn stats(&self) -> &WorkerStats {
        Inbound::stats(self)
    }

    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready> {
        sys::wait_readable(once(stopped).chain(self.underlay().readable()), IDLE_MS)
    }
}

/// Both directions on one thread.
struct Joined<E: Encap> {
    outbound: Outbound<E, TunQueue, UdpUnderlay>,
    inbound: Inbound<E, TunQueue, UdpUnderlay>,
}

impl<E: Encap> Work for Joined<E> {
    fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        let inbound = self.inbound.turn(now)?;
        let outbound = self.outbound.turn(now)?;
        Ok(if (inbound, outbound) == (Turn::Idle, Turn::Idle) {
            Turn::Idle
        } else {
            Turn::Busy
        })
    }

    fn stats(&self) -> &WorkerStats {
        self.outbound.stats()
    }

    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready> {
        let device = self.outbound.device().readable();
        let sockets = self.inbound.underlay().readable();
        sys::wait_readable([stopped, device].into_iter().chain(sockets), IDLE_MS)
    }
}

fn run(work: &mut impl Work, stopped: &PipeReader) -> io::Result<()> {
    // How often a busy loop looks whether it is to stop.
    const CHECK_EVERY: u32 = 256;
    let mut turns = 0u32;
    loop {
        match work.turn(now())? {
            Turn::Busy => {
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(CHECK_EVERY) && sys::wait_readable([stopped.as_fd()], 0)?.any() {
                    return Ok(());
                }
            }
            Turn::Idle => {
                work.stats().count(Count::Sleeps, 1);
                if work.wait(stopped.as_fd())?.first() {
                    return Ok(());
                }
            }
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the shell that reads the clock for the pure core"
)]
fn now() -> Instant {
    Instant::now()
}
