//! Signs of life of the threads that move packets.
//!
//! A thread counts each batch it moves and each time it goes to sleep, and it sleeps a second at the most; so the sum of those counters is a
//! pulse that costs nothing to keep. A thread that waits for packets without end has none, and is alive until it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::dataplane::stats::{Count, WorkerStats};

/// What a thread shows of itself.
#[derive(Debug)]
pub struct Pulse {
    name: String,
    beating: Vec<Arc<WorkerStats>>,
    ended: AtomicBool,
}

/// Held by the thread; says that it ended when it is dropped.
#[derive(Debug)]
pub struct Living(Arc<Pulse>);

impl Pulse {
    /// The pulse of a thread that counts in `beating`; with none, of one that may wait for ever.
    pub fn new(name: impl Into<String>, beating: Vec<Arc<WorkerStats>>) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            beating,
            ended: AtomicBool::new(false),
        })
    }

    /// For the thread to hold.
    pub fn living(self: &Arc<Self>) -> Living {
        Living(Arc::clone(self))
    }

    /// The thread's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Beats so far; `None` for a thread that may wait for ever.
    pub fn beats(&self) -> Option<u64> {
        let of = |stats: &WorkerStats| {
            [Count::Sleeps, Count::OutboundBatches, Count::InboundBatches]
                .map(|count| stats.counted(count))
                .into_iter()
                .fold(0, u64::wrapping_add)
        };
        let beats = self.beating.iter().map(|stats| of(stats));
        (!self.beating.is_empty()).then(|| beats.fold(0, u64::wrapping_add))
    }
}

impl Drop for Living {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_beats_with_sleeps_and_batches_and_ends_with_its_thread() {
        let stats = [Arc::<WorkerStats>::default(), Arc::default()];
        let pulse = Pulse::new("queue-0", stats.to_vec());
        let living = pulse.living();
        assert_eq!((pulse.beats(), pulse.has_ended()), (Some(0), false));
        stats[0].count(Count::Sleeps, 1);
        stats[1].count(Count::InboundBatches, 2);
        stats[1].count(Count::InboundPackets, 40);
        assert_eq!(pulse.beats(), Some(3));
        drop(living);
        assert!(pulse.has_ended());
        assert_eq!(Pulse::new("endpoint", Vec::new()).beats(), None);
    }
}
