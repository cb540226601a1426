//! The threads that turn the data plane's directions.
//!
//! Two layouts. *Joined*: one thread a queue takes both directions in turn and sleeps when both are idle; fewer wake-ups, for machines with
//! few cores. *Split*: a thread a direction, for machines with cores to spare. A sleeping thread wakes at least once a second, so that
//! it lets go of an old route snapshot.
//!
//! After requests and responses, a thread looks a little longer before it sleeps (`Watch`): being woken costs more than all that is done to a
//! small packet. Bulk transfers never get there.

use std::io::{self, PipeReader, PipeWriter};
use std::iter::once;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::dataplane::Encap;
use crate::dataplane::forward::Sources;
use crate::dataplane::limiter::ErrorLimiter;
use crate::dataplane::route::SharedRoutes;
use crate::dataplane::stats::{Call, Count, WorkerStats};
use crate::dataplane::worker::{Inbound, InboundOptions, Outbound, Turn};
use crate::host::pulse::Pulse;
use crate::host::sandbox::{self, Role};
use crate::host::sys::{self, Ready};
use crate::host::tun::{Tun, TunQueue};
use crate::host::underlay::AnyUnderlay;

/// How long an idle thread sleeps at the most.
const IDLE_MS: i32 = 1000;

/// A thread that has not looked for so long was stopped (SIGSTOP, a frozen machine, no processor at all). What has waited since is of no
/// use to anybody, and delivered in one burst it would push out what is.
const STOPPED: Duration = Duration::from_secs(2);

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
    /// Counters, one set a queue and direction: outbound and inbound by turns.
    stats: Vec<Arc<WorkerStats>>,
    /// One a thread.
    pulses: Vec<Arc<Pulse>>,
}

impl Queues {
    /// Starts the threads of all queues.
    ///
    /// `busy_poll` is how long a thread looks for more after a request or response before it sleeps; zero is not at all.
    ///
    /// A thread whose device or socket is beyond use says why on `failed` and ends. The channel holds a message a thread; if it is full, the
    /// reader already knows.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn start<E: Encap + Sync>(
        encap: E,
        tun: Tun,
        underlays: Vec<AnyUnderlay>,
        routes: &SharedRoutes<E::Hop>,
        (layout, busy_poll, options, sources): (Layout, Duration, InboundOptions, Sources),
        failed: mpsc::Sender<io::Error>,
    ) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let mut queues = Self {
            stop: Some(stop),
            threads: Vec::new(),
            stats: Vec::new(),
            pulses: Vec::new(),
        };
        let errors = Arc::new(ErrorLimiter::new(now(), rand::random()));
        for (index, ((tun_out, tun_in), underlay)) in
            tun.into_queues()?.into_iter().zip(underlays).enumerate()
        {
            let now = now();
            let counters = [Arc::<WorkerStats>::default(), Arc::default()];
            queues.stats.extend(counters.iter().map(Arc::clone));
            let [counting_out, counting_in] = &counters;
            let mut outbound = Outbound::new(
                encap.clone(),
                (tun_out, underlay.try_clone()?),
                routes.reader(),
                (index, Arc::clone(counting_out)),
                now,
            );
            outbound.share_limiter(&errors);
            outbound.set_clamp_mss(options.clamp_mss);
            outbound.set_sources(sources);
            let mut inbound = Inbound::new(
                encap.clone(),
                (tun_in, underlay),
                routes.reader(),
                (index, Arc::clone(counting_in)),
                options,
                now,
            );
            inbound.share_limiter(&errors);
            // Without huge pages it is a little slower, nothing else.
            let _ = sys::advise_huge_pages(outbound.memory())
                .and_then(|()| sys::advise_huge_pages(inbound.memory()));
            match layout {
                Layout::Joined => {
                    queues.spawn(
                        Pulse::new(format!("queue-{index}"), counters.to_vec()),
                        Joined { outbound, inbound },
                        busy_poll,
                        (&stopped, &failed),
                    )?;
                }
                Layout::Split => {
                    queues.spawn(
                        Pulse::new(format!("outbound-{index}"), vec![Arc::clone(counting_out)]),
                        outbound,
                        busy_poll,
                        (&stopped, &failed),
                    )?;
                    queues.spawn(
                        Pulse::new(format!("inbound-{index}"), vec![Arc::clone(counting_in)]),
                        inbound,
                        busy_poll,
                        (&stopped, &failed),
                    )?;
                }
            }
        }
        Ok(queues)
    }

    fn spawn(
        &mut self,
        pulse: Arc<Pulse>,
        mut work: impl Work + Send + 'static,
        busy_poll: Duration,
        (stopped, failed): (&PipeReader, &mpsc::Sender<io::Error>),
    ) -> io::Result<()> {
        let stopped = stopped.try_clone()?;
        let failed = failed.clone();
        let living = pulse.living();
        let role = work.role();
        let name = pulse.name().to_owned();
        self.pulses.push(pulse);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let _living = living;
            let confined = sandbox::enter_thread(role).map_err(io::Error::other);
            if let Err(error) = confined.and_then(|()| run(&mut work, Watch::new(busy_poll), &stopped)) {
                // Full or closed: the daemon is already rebuilding or stopping.
                let _ = failed.try_send(error);
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Counters, one set a queue and direction: outbound and inbound by turns.
    pub fn stats(&self) -> &[Arc<WorkerStats>] {
        &self.stats
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Signs of life, one a thread.
    pub fn pulses(&self) -> &[Arc<Pulse>] {
        &self.pulses
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
    /// Drops what waits.
    fn discard_waiting(&mut self) -> io::Result<()>;
    fn stats(&self) -> &WorkerStats;
    /// Bytes moved so far.
    fn moved(&self) -> u64;
    /// What the thread is for.
    fn role(&self) -> Role;
    /// Waits until there may be something to do, or `stopped` says that there never will be: then the first is ready.
    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready>;
}

impl<E: Encap> Work for Outbound<E, TunQueue, AnyUnderlay> {
    fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        Outbound::turn(self, now)
    }

    fn discard_waiting(&mut self) -> io::Result<()> {
        Outbound::discard_waiting(self)
    }

    fn stats(&self) -> &WorkerStats {
        Outbound::stats(self)
    }

    fn moved(&self) -> u64 {
        Outbound::stats(self).counted(Count::OutboundBytes)
    }

    fn role(&self) -> Role {
        Role::Queue
    }

    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready> {
        sys::wait_readable([stopped, self.device().readable()], IDLE_MS)
    }
}

impl<E: Encap> Work for Inbound<E, TunQueue, AnyUnderlay> {
    fn turn(&mut self, now: Instant) -> io::Result<Turn> {
        Inbound::turn(self, now)
    }

    fn discard_waiting(&mut self) -> io::Result<()> {
        Inbound::discard_waiting(self)
    }

    fn stats(&self) -> &WorkerStats {
        Inbound::stats(self)
    }

    fn moved(&self) -> u64 {
        Inbound::stats(self).counted(Count::InboundBytes)
    }

    fn role(&self) -> Role {
        Inbound::underlay_ref(self).role()
    }

    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready> {
        sys::wait_readable(once(stopped).chain(self.underlay().readable()), IDLE_MS)
    }
}

/// Both directions on one thread.
struct Joined<E: Encap> {
    outbound: Outbound<E, TunQueue, AnyUnderlay>,
    inbound: Inbound<E, TunQueue, AnyUnderlay>,
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

    fn discard_waiting(&mut self) -> io::Result<()> {
        self.inbound.discard_waiting()?;
        self.outbound.discard_waiting()
    }

    fn stats(&self) -> &WorkerStats {
        self.outbound.stats()
    }

    fn moved(&self) -> u64 {
        self.outbound.moved().wrapping_add(self.inbound.moved())
    }

    fn role(&self) -> Role {
        self.inbound.role()
    }

    fn wait(&mut self, stopped: BorrowedFd<'_>) -> io::Result<Ready> {
        let device = self.outbound.device().readable();
        let sockets = self.inbound.underlay().readable();
        sys::wait_readable([stopped, device].into_iter().chain(sockets), IDLE_MS)
    }
}

/// Decides how long an idle thread looks for more before it sleeps.
///
/// It lingers only when turns have moved next to nothing for a while, as requests and responses do, and only while that pays: what comes
/// too late costs credit, what comes in time earns it. In a bulk transfer it would take the processor from those who have work.
struct Watch {
    busy_poll: Duration,
    light_turns: u32,
    /// Until when the last heavy turn is remembered.
    heavy_until: Option<Instant>,
    credit: i32,
    until: Option<Instant>,
    /// Whether something was moved since it last lingered.
    fresh: bool,
}

/// A turn that moved no more than this was light, bytes.
const LIGHT_BYTES: u64 = 4096;
/// Light turns in a row that look like requests and responses.
const LIGHT_TURNS: u32 = 4;
/// How long after a heavy turn there is no lingering: acknowledgements of a bulk transfer are light.
const HEAVY: Duration = Duration::from_millis(10);
/// Most credit, and most debt.
const CREDIT: i32 = 16;
/// In debt, one idle moment in so many is lingered in, to see whether it would pay again.
const TRY_EVERY: u32 = 64;

impl Watch {
    fn new(busy_poll: Duration) -> Self {
        Self {
            busy_poll,
            light_turns: 0,
            heavy_until: None,
            credit: 0,
            until: None,
            fresh: false,
        }
    }

    /// A turn moved so many bytes; zero if all that came was refused, which neither begins lingering nor earns credit.
    fn moved(&mut self, bytes: u64, now: Instant) {
        if bytes == 0 {
            return;
        }
        self.fresh = true;
        if self.until.take().is_some() {
            self.credit = (self.credit + 1).min(CREDIT);
        }
        if bytes > LIGHT_BYTES {
            self.light_turns = 0;
            self.heavy_until = Some(now + HEAVY);
        } else {
            self.light_turns = self.light_turns.saturating_add(1);
        }
    }

    /// A turn found nothing; whether to look again rather than to sleep.
    fn lingers(&mut self, now: Instant) -> bool {
        match self.until {
            Some(until) if now < until => true,
            Some(_) => {
                self.until = None;
                self.fresh = false;
                self.credit = (self.credit - 1).max(-CREDIT);
                false
            }
            None => {
                let pays = self.credit >= 0 || self.light_turns.is_multiple_of(TRY_EVERY);
                let begins = self.fresh
                    && !self.busy_poll.is_zero()
                    && self.light_turns >= LIGHT_TURNS
                    && self.heavy_until.is_none_or(|until| now > until)
                    && pays;
                if begins {
                    self.until = Some(now + self.busy_poll);
                }
                begins
            }
        }
    }
}

fn run(work: &mut impl Work, mut watch: Watch, stopped: &PipeReader) -> io::Result<()> {
    // How often a busy loop looks whether it is to stop.
    const CHECK_EVERY: u32 = 256;
    let mut turns = 0u32;
    let mut before = work.moved();
    let mut looked = now();
    loop {
        let now = now();
        let away = now.duration_since(looked);
        looked = now;
        if away > STOPPED {
            tracing::warn!(
                away_ms = away.as_millis(),
                "this process was stopped for a while; packets that waited are dropped"
            );
            work.discard_waiting()?;
        }
        match work.turn(now)? {
            Turn::Busy => {
                let moved = work.moved();
                watch.moved(moved.wrapping_sub(before), now);
                before = moved;
                turns = turns.wrapping_add(1);
                if turns.is_multiple_of(CHECK_EVERY) {
                    work.stats().called(Call::Poll);
                    if sys::wait_readable([stopped.as_fd()], 0)?.any() {
                        return Ok(());
                    }
                }
            }
            // Whoever waits for this processor may have it: often it is the one who would answer.
            Turn::Idle if watch.lingers(now) => {
                work.stats().called(Call::SchedYield);
                std::thread::yield_now();
            }
            Turn::Idle => {
                work.stats().count(Count::Sleeps, 1);
                work.stats().called(Call::Poll);
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

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_micros(50);

    /// Turns with requests, `every` apart, each followed by idle turns 1 us apart until the next; gives how many of those were lingered in
    /// rather than slept in.
    fn requests(watch: &mut Watch, count: u32, every: Duration, mut now: Instant) -> u32 {
        let mut lingered = 0;
        for _ in 0..count {
            watch.moved(100, now);
            let next = now + every;
            while now < next {
                if !watch.lingers(now) {
                    break;
                }
                lingered += 1;
                now += Duration::from_micros(1);
            }
            now = next;
        }
        lingered
    }

    #[test]
    fn fast_requests_are_waited_for_awake() {
        let mut watch = Watch::new(LINGER);
        requests(&mut watch, 20, Duration::from_micros(20), now());
        assert_eq!(requests(&mut watch, 100, Duration::from_micros(20), now()), 2000);
    }

    #[test]
    fn slow_requests_are_soon_waited_for_asleep() {
        let mut watch = Watch::new(LINGER);
        requests(&mut watch, 100, Duration::from_micros(500), now());
        let lingered = requests(&mut watch, 6400, Duration::from_micros(500), now());
        assert_eq!(lingered, 100 * 50, "one in {TRY_EVERY} is tried");
    }

    #[test]
    fn what_is_refused_is_not_waited_for_awake() {
        let mut watch = Watch::new(LINGER);
        let mut now = now();
        requests(&mut watch, 20, Duration::from_micros(20), now);
        now += Duration::from_millis(1);
        // The last of them is waited after for once, and then no more, however often something comes that is refused.
        while watch.lingers(now) {
            now += LINGER;
        }
        for _ in 0..1000 {
            watch.moved(0, now);
            assert!(!watch.lingers(now));
            now += Duration::from_micros(20);
        }
        watch.moved(100, now);
        assert!(watch.lingers(now));
    }

    #[test]
    fn bulk_never_lingers_and_neither_does_a_watch_of_no_length() {
        let mut watch = Watch::new(LINGER);
        let mut now = now();
        for turn in 0..100 {
            watch.moved(if turn % 20 == 0 { 65_000 } else { 60 }, now);
            assert!(!watch.lingers(now));
            now += HEAVY / 25;
        }
        let mut watch = Watch::new(Duration::ZERO);
        assert_eq!(requests(&mut watch, 100, Duration::from_micros(20), now), 0);
    }
}
