//! Sending at a rate: small bursts on a grid of deadlines.
//!
//! A pause for each datagram ends at some thousands a second, and one long pause makes a burst that overruns queues
//! which the rate itself would not. So time is cut into ticks of 100 µs, each with its share of datagrams. Deadlines are
//! counted from the start, so lateness does not add up; what is behind is made up for a little at a time, so that a
//! sender that was kept waiting does not answer with a burst.

use std::time::Duration;

/// Time between two bursts: 10 datagrams at 100,000 a second, and still longer than a sleeping thread takes to wake.
const TICK: Duration = Duration::from_micros(100);

/// The schedule of one flow. It owns no clock: the time since the start goes in, what to do comes out.
#[derive(Clone, Debug)]
pub struct Pacer {
    rate: u32,
    /// Datagrams handed out so far.
    handed_out: u64,
    /// When the next burst may go.
    next: Duration,
}

/// What the schedule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Send so many.
    Send(u64),
    /// Ask again after this long.
    Wait(Duration),
}

impl Pacer {
    /// A schedule of `rate` datagrams a second, the first at once.
    pub fn new(rate: u32) -> Self {
        Self {
            rate: rate.max(1),
            handed_out: 0,
            next: Duration::ZERO,
        }
    }

    /// What to do when `elapsed` has passed since the start.
    pub fn turn(&mut self, elapsed: Duration) -> Turn {
        if elapsed < self.next {
            return Turn::Wait(self.next - elapsed);
        }
        let rate = f64::from(self.rate);
        let due = (elapsed.as_secs_f64() * rate) as u64 + 1;
        let behind = due.saturating_sub(self.handed_out);
        if behind == 0 {
            let when = Duration::from_secs_f64(self.handed_out as f64 / rate);
            // Rounding must not make this a wait for nothing.
            return Turn::Wait(when.saturating_sub(elapsed).max(Duration::from_micros(1)));
        }
        let share = (TICK.as_secs_f64() * rate).ceil() as u64;
        let burst = behind.min(share + share.div_ceil(4));
        self.handed_out += burst;
        self.next = TICK * u32::try_from(elapsed.as_nanos() / TICK.as_nanos() + 1).unwrap_or(u32::MAX);
        Turn::Send(burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_punctual_sender_keeps_every_rate() {
        for rate in [1, 999, 1000, 12_345, 100_000, 1_234_567] {
            let (sent, _) = run(rate, Duration::from_secs(2), |_| Duration::from_micros(3));
            let wanted = u64::from(rate) * 2;
            let off = sent.abs_diff(wanted);
            assert!(off <= 1 + wanted / 1000, "{sent} sent at {rate} a second");
        }
    }

    #[test]
    fn lateness_is_made_up_for_without_a_burst() {
        // Every wake-up 60 µs late, and 3 ms asleep once in a while.
        let late = |nth: u64| match nth {
            nth if nth.is_multiple_of(500) => Duration::from_millis(3),
            _ => Duration::from_micros(60),
        };
        let (sent, largest) = run(200_000, Duration::from_secs(2), late);
        assert!(sent.abs_diff(400_000) < 2000, "{sent} sent");
        assert!(largest <= 25, "a burst of {largest}");
    }

    #[test]
    fn slow_rates_are_single_datagrams() {
        let (sent, largest) = run(100, Duration::from_secs(1), |_| Duration::from_micros(5));
        assert_eq!((sent, largest), (100, 1));
    }

    /// Sent in all, and in the largest burst, if the sender is late as `late` says.
    fn run(rate: u32, duration: Duration, late: impl Fn(u64) -> Duration) -> (u64, u64) {
        let (mut pacer, mut now, mut turns) = (Pacer::new(rate), Duration::ZERO, 0);
        let (mut sent, mut largest) = (0, 0);
        while now < duration {
            turns += 1;
            match pacer.turn(now) {
                Turn::Send(burst) => {
                    sent += burst;
                    largest = largest.max(burst);
                }
                Turn::Wait(wait) => now += wait + late(turns),
            }
        }
        (sent, largest)
    }
}
