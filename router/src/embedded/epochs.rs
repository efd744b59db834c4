//! Numbers that never go back: epochs of connections and generations of inboxes.
//!
//! Each is `max(the one before + 1, the clock in µs)`. What keeps them from going back across a
//! restart is a high-water mark on disk: none at or above it is handed out before a higher mark is durable.

use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

/// How far a new mark is ahead, in µs: one write a minute while devices connect, none while they do not.
const BLOCK_US: u64 = 60_000_000;

/// Hands the numbers out.
pub(super) struct Epochs(Mutex<State>);

struct State {
    last: u64,
    high_water: u64,
}

fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}

impl Epochs {
    /// Continues above the mark of an earlier run. Zero is never handed out: it is before everything.
    pub(super) fn above(high_water: u64) -> Self {
        let high_water = high_water.max(1);
        Self(Mutex::new(State {
            last: high_water,
            high_water,
        }))
    }

    /// The newest number handed out.
    pub(super) fn last(&self) -> u64 {
        self.0.lock().last
    }

    /// The next number; `None` where a higher mark has to be durable first.
    pub(super) fn next(&self) -> Option<u64> {
        self.next_at(now_us())
    }

    fn next_at(&self, now_us: u64) -> Option<u64> {
        let mut state = self.0.lock();
        let next = now_us.max(state.last + 1);
        if next >= state.high_water {
            return None;
        }
        state.last = next;
        Some(next)
    }

    /// The next number for a record of the batch that is being made; `Some` mark where it has to go
    /// into the same batch.
    pub(super) fn next_in_batch(&self) -> (u64, Option<u64>) {
        let mut state = self.0.lock();
        let next = now_us().max(state.last + 1);
        state.last = next;
        (next, (next >= state.high_water).then_some(next + BLOCK_US))
    }

    /// A mark to make durable before calling [`Self::raise`].
    pub(super) fn next_mark(&self) -> u64 {
        now_us().max(self.last() + 1) + BLOCK_US
    }

    /// The mark `high_water` is durable.
    pub(super) fn raise(&self, high_water: u64) {
        let mut state = self.0.lock();
        state.high_water = state.high_water.max(high_water);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_rise_even_if_the_clock_steps_back() {
        let epochs = Epochs::above(1_000);
        epochs.raise(10_000);
        assert_eq!(epochs.next_at(5_000), Some(5_000));
        assert_eq!(epochs.next_at(3_000), Some(5_001));
        assert_eq!(epochs.next_at(5_001), Some(5_002));
    }

    #[test]
    fn nothing_at_or_above_the_mark_is_handed_out() {
        let epochs = Epochs::above(1_000);
        assert_eq!(epochs.next_at(0), None);
        epochs.raise(1_002);
        assert_eq!(epochs.next_at(0), Some(1_001));
        assert_eq!(epochs.next_at(0), None);
        assert_eq!(epochs.next_at(2_000), None);
    }

    #[test]
    fn a_number_made_in_a_batch_carries_its_mark_when_it_needs_one() {
        let epochs = Epochs::above(0);
        let (first, mark) = epochs.next_in_batch();
        let mark = mark.unwrap();
        assert!(mark > first);
        epochs.raise(mark);
        assert!(epochs.next_in_batch().1.is_none());
    }
}
