//! Datagrams that carry a number, and the account of which arrived.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Bytes of sequence number and checksum at the front of every datagram.
pub const HEADER: usize = 16;

/// Writes datagram `sequence` over the whole buffer: number, checksum, and contents that follow from the number.
///
/// # Panics
/// If the buffer is shorter than [`HEADER`].
pub fn fill(datagram: &mut [u8], sequence: u64) {
    let mut word = sequence;
    for chunk in datagram[HEADER..].chunks_mut(8) {
        word = mix(word);
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    stamp(datagram, sequence);
}

/// Writes number and checksum around contents that are there already.
///
/// # Panics
/// If the buffer is shorter than [`HEADER`].
pub fn stamp(datagram: &mut [u8], sequence: u64) {
    datagram[..8].copy_from_slice(&sequence.to_be_bytes());
    let sum = checksum(sequence, &datagram[HEADER..]);
    datagram[8..HEADER].copy_from_slice(&sum.to_be_bytes());
}

/// The number a datagram carries, if its contents are what was sent.
pub fn read(datagram: &[u8]) -> Option<u64> {
    let (sequence, rest) = datagram.split_first_chunk::<8>()?;
    let (sum, contents) = rest.split_first_chunk::<8>()?;
    let sequence = u64::from_be_bytes(*sequence);
    (checksum(sequence, contents) == u64::from_be_bytes(*sum)).then_some(sequence)
}

/// Catches any changed bit and any cut: every step is invertible, so different contents of one length give the same
/// sum only by colliding in 64 bits.
fn checksum(sequence: u64, contents: &[u8]) -> u64 {
    let mut sum = mix(sequence ^ contents.len() as u64);
    let (words, rest) = contents.as_chunks::<8>();
    for word in words {
        sum = (sum ^ u64::from_le_bytes(*word))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
    for byte in rest {
        sum = (sum ^ u64::from(*byte))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29);
    }
    mix(sum)
}

/// The finishing step of SplitMix64.
pub(super) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// What arrived of numbered datagrams.
#[derive(Debug, Default)]
pub struct Tally {
    /// One bit a number.
    seen: Vec<u64>,
    next: u64,
    last_arrival: Option<Instant>,
    /// The account so far; `sent` and `lost` are filled in by [`Tally::close`].
    counts: Counts,
}

/// The account of numbered datagrams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// How many were sent.
    pub sent: u64,
    /// How many arrived whole, each counted once.
    pub received: u64,
    /// How many never arrived whole.
    pub lost: u64,
    /// How many arrived again.
    pub duplicates: u64,
    /// How many arrived after a later one.
    pub reordered: u64,
    /// How many arrived changed.
    pub corrupted: u64,
    /// The longest time in which nothing arrived, milliseconds.
    pub longest_gap_ms: u64,
}

impl Tally {
    /// Starts the clock of the longest gap.
    pub fn open(&mut self, now: Instant) {
        self.last_arrival = Some(now);
    }

    /// Takes note of a datagram.
    pub fn note(&mut self, datagram: &[u8], now: Instant) {
        // A number this far beyond what is expected is no number of ours; it would also be much to remember.
        const FARTHEST: u64 = 1 << 28;
        let Some(sequence) = read(datagram).filter(|&sequence| sequence < self.next + FARTHEST) else {
            self.counts.corrupted += 1;
            return;
        };
        self.gap(now);
        let (word, bit) = ((sequence / 64) as usize, 1 << (sequence % 64));
        if self.seen.len() <= word {
            self.seen.resize((word + 1).next_power_of_two(), 0);
        }
        if self.seen[word] & bit != 0 {
            self.counts.duplicates += 1;
            return;
        }
        self.seen[word] |= bit;
        self.counts.received += 1;
        if sequence < self.next {
            self.counts.reordered += 1;
        } else {
            self.next = sequence + 1;
        }
    }

    /// How many arrived so far.
    pub fn received(&self) -> u64 {
        self.counts.received
    }

    /// Closes the account: `sent` went out, the last of them before `now`.
    pub fn close(mut self, sent: u64, now: Instant) -> Counts {
        self.gap(now);
        self.counts.sent = sent;
        self.counts.lost = sent.saturating_sub(self.counts.received);
        self.counts
    }

    fn gap(&mut self, now: Instant) {
        if let Some(last) = self.last_arrival {
            let gap: Duration = now.saturating_duration_since(last);
            let gap_ms = u64::try_from(gap.as_millis()).unwrap_or(u64::MAX);
            self.counts.longest_gap_ms = self.counts.longest_gap_ms.max(gap_ms);
        }
        self.last_arrival = self.last_arrival.max(Some(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mishap_is_counted_once() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let mut tally = Tally::default();
        tally.open(start);
        for (sequence, ms) in [(0, 1), (2, 2), (1, 3), (2, 4), (5, 30)] {
            tally.note(&datagram(sequence), after(ms));
        }
        let mut changed = datagram(6);
        changed[40] ^= 4;
        tally.note(&changed, after(31));
        tally.note(&datagram(7)[..63], after(32));

        let counts = tally.close(8, after(33));

        let expected = Counts {
            sent: 8,
            received: 4,
            lost: 4,
            duplicates: 1,
            reordered: 1,
            corrupted: 2,
            longest_gap_ms: 26,
        };
        assert_eq!(counts, expected);
    }

    #[test]
    fn every_single_bit_matters() {
        let whole = datagram(77);
        for bit in 0..whole.len() * 8 {
            let mut changed = whole;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(read(&changed), None, "bit {bit}");
        }
    }

    fn datagram(sequence: u64) -> [u8; 64] {
        let mut datagram = [0; 64];
        fill(&mut datagram, sequence);
        datagram
    }
}
