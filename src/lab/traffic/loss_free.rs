//! The highest rate at which nothing is lost, and the highest at which hardly anything is.
//!
//! After RFC 2544 §26.1: trials at a constant rate, a higher one after each that passed and a lower one after each that
//! did not, until the two are close. The no-drop rate (NDR) allows no loss at all, the partial-drop rate (PDR) one in
//! 200.
//!
//! ```text
//!        start ×2 ×2 …    until one fails           then halve the distance
//!   rate ──────────────────────────────────────────────────────────────────▶ resolution reached
//!        start ÷2 ÷2 …    if the first fails
//! ```
//!
//! What counts are sequence numbers: a datagram that was sent (or that the sender's own kernel refused) and has not
//! arrived whole is lost. A trial says something only if the sender kept the rate within 2 %; a rate it cannot
//! keep is the end of what can be tried, and the result says so ([`Limit::Sender`]). On a shared machine any trial can
//! lose a datagram to somebody else's work, and keep a sender from sending: so a rate has failed when two trials have,
//! and cannot be kept when it was not in any of three.
//!
//! The search is pure: trials come from a closure. [`LossFree::run`] makes them with a [`Flood`].

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::lab::traffic::End;
use crate::lab::traffic::udp::{Flood, FloodReport};

/// Largest deviation from the rate asked for at which a trial counts.
const KEPT: f64 = 0.02;
/// Share of datagrams the partial-drop rate may lose.
const PARTIAL_DROP: f64 = 0.005;
/// Trials that fail before their rate has.
const FAILURES: usize = 2;
/// Trials of a rate, those included that say nothing.
const TRIES: usize = 3;
/// Slowest rate tried, datagrams a second: a link that loses at this one does not work.
const SLOWEST: u32 = 100;
/// Fastest rate tried: beyond 10 Gbit/s of smallest Ethernet frames there is no use in one flow of sockets.
const FASTEST: u32 = 15_000_000;

/// A search to be run.
#[derive(Clone, Debug)]
pub struct LossFree {
    /// UDP payload of each datagram, bytes.
    pub payload_bytes: usize,
    /// Length of a trial.
    pub trial: Duration,
    /// Rate of the first trial, datagrams a second.
    pub start: u32,
    /// The search ends when a rate that passed and one that failed are this close, relative to the latter.
    pub resolution: f64,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct LossFreeReport {
    /// Without any loss.
    pub ndr: Found,
    /// With at most 0.5 % lost.
    pub pdr: Found,
    /// Every trial, in order.
    pub trials: Vec<Trial>,
}

/// The highest rate that passed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Found {
    /// Datagrams received a second in the trial that passed; `None` if none did.
    pub received_per_s: Option<f64>,
    /// Why no higher rate passed.
    pub limit: Limit,
}

/// Why a search went no higher.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Too much was lost at the next rate.
    Loss,
    /// The sender could not keep the next rate.
    Sender,
    /// There is no higher rate to try.
    Search,
}

/// One trial.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trial {
    /// Datagrams a second asked for.
    pub rate: u32,
    /// Datagrams a second sent.
    pub sent_per_s: f64,
    /// Datagrams a second received.
    pub received_per_s: f64,
    /// How many were sent.
    pub sent: u64,
    /// How many of them did not arrive whole.
    pub lost: u64,
    /// Of those lost, how many the sender's kernel did not take.
    pub refused: u64,
    /// Of those lost, how many the kernel dropped at the receiving socket.
    pub overflowed: u64,
}

/// What trials say of a rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    /// The sender did not keep the rate.
    NotOffered,
    /// Not tried, or not often enough.
    Open,
}

impl LossFree {
    /// Runs the search between two ends.
    ///
    /// # Errors
    /// Sockets fail in other ways than by losing datagrams, or a signal came.
    pub fn run(&self, from: End<'_>, to: End<'_>) -> Result<LossFreeReport> {
        self.search(|rate| {
            let flood = Flood {
                payload_bytes: self.payload_bytes,
                rate: Some(rate),
                duration: self.trial,
            };
            Ok(Trial::of(rate, &flood.run(from, to)?))
        })
    }

    fn search(&self, mut trial: impl FnMut(u32) -> Result<Trial>) -> Result<LossFreeReport> {
        let mut trials = Vec::new();
        let ndr = self.highest(0.0, &mut trials, &mut trial)?;
        // Whatever passed without loss passes here too, so this goes on where that ended.
        let pdr = self.highest(PARTIAL_DROP, &mut trials, &mut trial)?;
        Ok(LossFreeReport { ndr, pdr, trials })
    }

    /// The highest rate at which no more than `tolerance` is lost; adds to the trials what it still needs to know.
    fn highest(
        &self,
        tolerance: f64,
        trials: &mut Vec<Trial>,
        trial: &mut impl FnMut(u32) -> Result<Trial>,
    ) -> Result<Found> {
        loop {
            let (low, high) = bounds(trials, tolerance);
            let Some(rate) = self.next(low, high) else {
                let best = trials
                    .iter()
                    .filter(|trial| trial.rate == low && trial.verdict(tolerance) == Verdict::Passed)
                    .map(|trial| trial.received_per_s)
                    .max_by(f64::total_cmp);
                let limit = match high.map(|high| verdict(trials, high, tolerance)) {
                    Some(Verdict::NotOffered) => Limit::Sender,
                    Some(Verdict::Failed) => Limit::Loss,
                    Some(Verdict::Passed | Verdict::Open) | None => Limit::Search,
                };
                return Ok(Found {
                    received_per_s: best,
                    limit,
                });
            };
            while verdict(trials, rate, tolerance) == Verdict::Open {
                trials.push(trial(rate)?);
            }
        }
    }

    /// The rate to try next; `None` once there is nothing left to find out.
    fn next(&self, low: u32, high: Option<u32>) -> Option<u32> {
        let next = match (low, high) {
            (0, None) => self.start.clamp(SLOWEST, FASTEST),
            (FASTEST, None) => return None,
            (low, None) => low.saturating_mul(2).min(FASTEST),
            (_, Some(SLOWEST)) => return None,
            (0, Some(high)) => (high / 2).max(SLOWEST),
            (low, Some(high)) if f64::from(high - low) <= self.resolution * f64::from(high) => return None,
            (low, Some(high)) => low.midpoint(high),
        };
        (next != low).then_some(next)
    }
}

impl Trial {
    fn of(rate: u32, report: &FloodReport) -> Self {
        Self {
            rate,
            sent_per_s: report.sent_per_s,
            received_per_s: report.received_per_s,
            sent: report.counts.sent,
            lost: report.counts.lost,
            refused: report.refused,
            overflowed: report.overflowed,
        }
    }

    fn verdict(&self, tolerance: f64) -> Verdict {
        let rate = f64::from(self.rate);
        if (self.sent_per_s - rate).abs() > KEPT * rate {
            Verdict::NotOffered
        } else if self.lost as f64 <= tolerance * self.sent as f64 {
            Verdict::Passed
        } else {
            Verdict::Failed
        }
    }
}

/// What the trials of one rate say together: one that passed is enough, as are [`FAILURES`] that failed, or [`TRIES`] of
/// any outcome.
fn verdict(trials: &[Trial], rate: u32, tolerance: f64) -> Verdict {
    let verdicts: Vec<_> = trials
        .iter()
        .filter(|trial| trial.rate == rate)
        .map(|trial| trial.verdict(tolerance))
        .collect();
    let failures = verdicts
        .iter()
        .filter(|verdict| **verdict == Verdict::Failed)
        .count();
    if verdicts.contains(&Verdict::Passed) {
        Verdict::Passed
    } else if failures < FAILURES && verdicts.len() < TRIES {
        Verdict::Open
    } else if failures > 0 {
        Verdict::Failed
    } else {
        Verdict::NotOffered
    }
}

/// The highest rate that passed (0 if none did), and the lowest above it that did not.
fn bounds(trials: &[Trial], tolerance: f64) -> (u32, Option<u32>) {
    let rates = || trials.iter().map(|trial| trial.rate);
    let low = rates()
        .filter(|&rate| verdict(trials, rate, tolerance) == Verdict::Passed)
        .max();
    let low = low.unwrap_or(0);
    let failed = |rate| match verdict(trials, rate, tolerance) {
        Verdict::Failed | Verdict::NotOffered => true,
        Verdict::Passed | Verdict::Open => false,
    };
    (low, rates().filter(|&rate| rate > low && failed(rate)).min())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A link that loses what exceeds its capacity, and a sender with a highest rate.
    #[derive(Clone, Copy)]
    struct Link {
        capacity: f64,
        sender: f64,
        /// From this rate on, a share of 0.3 % is lost.
        leaky_from: f64,
    }

    const SOUND: Link = Link {
        capacity: 123_456.0,
        sender: f64::INFINITY,
        leaky_from: f64::INFINITY,
    };

    impl Link {
        /// Two seconds at `rate`.
        fn trial(self, rate: u32) -> Trial {
            let sent_per_s = f64::from(rate).min(self.sender);
            let leak = if sent_per_s >= self.leaky_from { 0.003 } else { 0.0 };
            let received_per_s = (sent_per_s * (1.0 - leak)).min(self.capacity);
            Trial {
                rate,
                sent_per_s,
                received_per_s,
                sent: (sent_per_s * 2.0) as u64,
                lost: ((sent_per_s - received_per_s) * 2.0).ceil() as u64,
                refused: 0,
                overflowed: 0,
            }
        }
    }

    #[test]
    fn the_capacity_is_found_from_below_and_from_above() {
        for start in [1, 5_000, 100_000, 400_000, u32::MAX] {
            let report = plan(start).search(|rate| Ok(SOUND.trial(rate))).unwrap();
            assert_close(report.ndr, SOUND.capacity, &report);
            assert_eq!(report.ndr.limit, Limit::Loss, "{report:#?}");
            assert!(report.trials.len() < 40, "{} trials", report.trials.len());
        }
    }

    #[test]
    fn a_slow_sender_is_named_as_the_limit() {
        let link = Link {
            sender: 70_000.0,
            ..SOUND
        };
        let report = plan(20_000).search(|rate| Ok(link.trial(rate))).unwrap();
        // A rate up to 2 % above what it sends still counts as kept.
        assert_close(report.ndr, link.sender, &report);
        assert_eq!(report.ndr.limit, Limit::Sender);
        assert_eq!(report.pdr, report.ndr);
    }

    #[test]
    fn half_a_percent_reaches_further_than_none() {
        let link = Link {
            leaky_from: 80_000.0,
            ..SOUND
        };
        let report = plan(20_000).search(|rate| Ok(link.trial(rate))).unwrap();
        assert_close(report.ndr, link.leaky_from, &report);
        assert_close(report.pdr, link.capacity, &report);
        let before = plan(20_000)
            .highest(0.0, &mut Vec::new(), &mut |rate| Ok(link.trial(rate)))
            .unwrap();
        assert_eq!(before, report.ndr, "the second search does not disturb the first");
    }

    #[test]
    fn one_mishap_a_rate_does_not_decide() {
        let mut tried = std::collections::BTreeSet::new();
        let report = plan(20_000)
            .search(|rate| {
                let mut trial = SOUND.trial(rate);
                trial.lost += u64::from(tried.insert(rate));
                Ok(trial)
            })
            .unwrap();
        assert_close(report.ndr, SOUND.capacity, &report);
    }

    #[test]
    fn a_dead_link_has_no_rate_and_the_search_ends() {
        let dead = Link {
            capacity: 0.0,
            ..SOUND
        };
        let report = plan(300_000).search(|rate| Ok(dead.trial(rate))).unwrap();
        assert_eq!(
            report.ndr,
            Found {
                received_per_s: None,
                limit: Limit::Loss
            }
        );
        assert!(report.trials.len() < 40, "{} trials", report.trials.len());
    }

    #[test]
    fn a_link_without_limit_ends_the_search_too() {
        let endless = Link {
            capacity: f64::INFINITY,
            ..SOUND
        };
        let report = plan(20_000).search(|rate| Ok(endless.trial(rate))).unwrap();
        assert_eq!(report.ndr.limit, Limit::Search);
        assert_eq!(report.ndr.received_per_s, Some(f64::from(FASTEST)));
    }

    #[test]
    fn a_rate_that_was_not_offered_proves_nothing() {
        let mut trial = SOUND.trial(100_000);
        assert_eq!(trial.verdict(0.0), Verdict::Passed);
        trial.sent_per_s = 97_900.0;
        assert_eq!(trial.verdict(0.0), Verdict::NotOffered);
        trial.sent_per_s = 98_100.0;
        trial.lost = 1;
        assert_eq!(trial.verdict(0.0), Verdict::Failed);
        assert_eq!(trial.verdict(0.005), Verdict::Passed);
    }

    #[test]
    fn trials_of_one_rate_decide_together() {
        let trial = |sent_per_s, lost| Trial {
            sent_per_s,
            lost,
            ..SOUND.trial(100_000)
        };
        let (passed, failed, slow) = (trial(1e5, 0), trial(1e5, 1), trial(5e4, 0));
        for (trials, expected) in [
            (vec![], Verdict::Open),
            (vec![&passed], Verdict::Passed),
            (vec![&failed], Verdict::Open),
            (vec![&failed, &passed], Verdict::Passed),
            (vec![&failed, &failed], Verdict::Failed),
            (vec![&slow, &slow], Verdict::Open),
            (vec![&slow, &slow, &slow], Verdict::NotOffered),
            (vec![&slow, &failed], Verdict::Open),
            (vec![&slow, &slow, &failed], Verdict::Failed),
            (vec![&slow, &slow, &passed], Verdict::Passed),
        ] {
            let trials: Vec<_> = trials.into_iter().cloned().collect();
            assert_eq!(verdict(&trials, 100_000, 0.0), expected, "{trials:#?}");
        }
    }

    proptest! {
        #[test]
        fn every_capacity_is_found_soon(
            capacity in 200.0..10_000_000.0,
            start in any::<u32>(),
            resolution in 0.01..0.2,
        ) {
            let link = Link { capacity, ..SOUND };
            let search = LossFree { start, resolution, ..plan(0) };
            let report = search.search(|rate| Ok(link.trial(rate))).unwrap();
            let found = report.ndr.received_per_s.unwrap();
            prop_assert!(found <= capacity && found >= capacity * (1.0 - resolution) - 1.0);
            prop_assert!(report.trials.len() < 70);
        }
    }

    fn plan(start: u32) -> LossFree {
        LossFree {
            payload_bytes: 64,
            trial: Duration::from_secs(2),
            start,
            resolution: 0.02,
        }
    }

    #[track_caller]
    fn assert_close(found: Found, wanted: f64, report: &LossFreeReport) {
        let rate = found.received_per_s.unwrap_or_default();
        assert!(
            rate <= wanted * 1.006 && rate >= wanted * 0.97,
            "found {rate}, not {wanted}: {report:#?}"
        );
    }
}
