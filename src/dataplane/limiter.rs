//! The rate of ICMP errors: to each source, and in all (RFC 1812 §4.3.2.8, RFC 4443 §2.4 f).
//!
//! Both are token buckets in the form of GCRA (ITU-T I.371): a bucket is the one moment at which it will be full again, and each error
//! moves that on by what a token takes to come back. So a bucket is a word, and all queues of a device share them without a lock.
//!
//! What a token takes is drawn anew each time, from once to one and a half times the least: whoever sends what we answer, and counts the
//! answers others still get, must not be able to tell how many were sent (the way CVE-2020-25705 told open ports). In no second are
//! there more than [`PER_SOURCE_MOST`] errors to a source and [`GLOBAL_MOST`] in all, wherever that second begins.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Errors to a source in any second, at the most.
pub const PER_SOURCE_MOST: usize = 10;
/// Errors in any second in all, at the most.
pub const GLOBAL_MOST: usize = 1000;

/// Four to six at once; from then on five a second at the most, four on the average: together no more than ten in a second.
const PER_SOURCE: Rate = Rate {
    burst: 6,
    least: Duration::from_millis(200),
};
/// Up to two hundred at once; from then on eight hundred a second at the most.
const GLOBAL: Rate = Rate {
    burst: 200,
    least: Duration::from_micros(1250),
};
/// Buckets sources hash to; two sources in one bucket share its allowance.
const BUCKETS: usize = 256;
/// 2^64 / golden ratio.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Tokens of a full bucket, of those that take the least.
    burst: u32,
    /// What a token takes to come back, at the least.
    least: Duration,
}

/// Limits the rate of ICMP errors.
#[derive(Debug)]
pub struct ErrorLimiter {
    start: Instant,
    global: Bucket,
    sources: Box<[Bucket]>,
    random: AtomicU64,
}

/// When it is full again, in nanoseconds from the start.
#[derive(Debug, Default)]
struct Bucket(AtomicU64);

impl Bucket {
    /// Takes a token if one is there.
    fn allows(&self, rate: Rate, now: u64, random: u64) -> bool {
        let least = nanos(rate.least);
        let spare = least * u64::from(rate.burst - 1);
        let pause = least + random % (least / 2);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full| {
                (full <= now + spare).then(|| full.max(now) + pause)
            })
            .is_ok()
    }
}

impl ErrorLimiter {
    /// Full buckets, and where chance begins.
    pub fn new(start: Instant, seed: u64) -> Self {
        Self {
            start,
            global: Bucket::default(),
            sources: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            random: AtomicU64::new(seed),
        }
    }

    /// Whether an error to `source` may be sent now.
    pub fn allows(&self, source: IpAddr, now: Instant) -> bool {
        let hash = match source {
            IpAddr::V4(addr) => u64::from(addr.to_bits()),
            IpAddr::V6(addr) => (addr.to_bits() >> 64) as u64 ^ addr.to_bits() as u64,
        };
        let bucket = (hash.wrapping_mul(MIX) >> 56) as usize;
        let now = nanos(now.saturating_duration_since(self.start));
        let random = self.random();
        self.sources[bucket].allows(PER_SOURCE, now, random >> 32)
            && self.global.allows(GLOBAL, now, random & u64::from(u32::MAX))
    }

    /// SplitMix64: every caller gets another number, and none can be foretold without the seed.
    fn random(&self) -> u64 {
        let mut mixed = self.random.fetch_add(MIX, Ordering::Relaxed);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Nanoseconds, which fill 64 bits after five centuries.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::disallowed_methods, reason = "tests start their clock somewhere")]

    use std::net::Ipv4Addr;

    use super::*;

    /// When errors were sent, if one is due every `pause` for `length`.
    fn sent(limiter: &ErrorLimiter, start: Instant, pause: Duration, length: Duration) -> Vec<Duration> {
        let source = "10.244.1.2".parse().unwrap();
        let due = (0..).map(|nth| pause * nth).take_while(|at| *at < length);
        due.filter(|at| limiter.allows(source, start + *at)).collect()
    }

    /// The most in any second, wherever it begins.
    fn most_in_a_second(sent: &[Duration]) -> usize {
        let within = |from: &Duration| {
            sent.iter()
                .filter(|at| *at >= from && **at - *from < Duration::from_secs(1))
                .count()
        };
        sent.iter().map(within).max().unwrap_or(0)
    }

    #[test]
    fn errors_are_limited_per_source_and_refill() {
        let start = Instant::now();
        for seed in 0..50 {
            let limiter = ErrorLimiter::new(start, seed);
            let flood = sent(&limiter, start, Duration::from_millis(1), Duration::from_secs(20));
            assert!(most_in_a_second(&flood) <= PER_SOURCE_MOST, "{seed}: {flood:?}");
            // It goes on: four a second on the average.
            assert!((70..=100).contains(&flood.len()), "{seed}: {}", flood.len());
            let much_later = start + Duration::from_secs(3600);
            let source = "10.244.1.2".parse().unwrap();
            let again = (0..100).filter(|_| limiter.allows(source, much_later)).count();
            assert!((4..=6).contains(&again), "{seed}: {again}");
            // Another has its own.
            assert!(limiter.allows("10.244.1.3".parse().unwrap(), much_later));
        }
    }

    #[test]
    fn errors_are_limited_in_all() {
        let start = Instant::now();
        for seed in 0..5 {
            let limiter = ErrorLimiter::new(start, seed);
            // One due every 100 µs, each to somebody else.
            let due = (0..30_000u32).map(|nth| (nth, Duration::from_micros(u64::from(nth) * 100)));
            let sent: Vec<Duration> = due
                .filter(|&(nth, at)| {
                    let source = Ipv4Addr::from(0x0a00_0000 + nth);
                    limiter.allows(source.into(), start + at)
                })
                .map(|(_, at)| at)
                .collect();
            assert!(most_in_a_second(&sent) <= GLOBAL_MOST, "{seed}");
            assert!(sent.len() > 1500, "{seed}: {}", sent.len());
        }
    }

    /// How long a token takes to come back is not to be foretold, and another start has another course.
    #[test]
    fn the_refill_is_random() {
        let start = Instant::now();
        let course = |seed| {
            let limiter = ErrorLimiter::new(start, seed);
            sent(&limiter, start, Duration::from_millis(1), Duration::from_secs(10))
        };
        let (one, two) = (course(1), course(2));
        assert_ne!(one, two);
        let pauses: std::collections::BTreeSet<Duration> =
            one[6..].windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.len() > 15, "{pauses:?}");
        assert!(
            pauses
                .iter()
                .all(|pause| (200..=301).contains(&pause.as_millis())),
            "{pauses:?}"
        );
    }

    /// Several queues that answer at once do not get more between them.
    #[test]
    fn threads_share_one_allowance() {
        let start = Instant::now();
        let limiter = ErrorLimiter::new(start, 7);
        let source = "10.244.1.2".parse().unwrap();
        let allowed: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..1000).filter(|_| limiter.allows(source, start)).count()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert!((4..=6).contains(&allowed), "{allowed}");
    }
}
