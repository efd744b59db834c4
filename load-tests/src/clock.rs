//! Time of one run: the clock that stamps messages, and the open-loop schedule.
//!
//! A schedule fixes when each message is due before the run starts. Latency counts from there, so
//! that a server which stalls can't hide the messages that were not sent meanwhile.

use std::time::{Duration, Instant};

/// Nanoseconds since the run began, the same for every bot of this process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that reads zero now.
    pub(crate) fn start() -> Self {
        Self {
            origin: Instant::now(),
        }
    }

    /// What it reads now.
    pub(crate) fn now_ns(self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// The moment at which it reads `ns`.
    pub(crate) fn at(self, ns: u64) -> tokio::time::Instant {
        (self.origin + Duration::from_nanos(ns)).into()
    }
}

/// Which share of a total rate one sender has to keep.
///
/// Message `k` of lane `i` out of `n` is message `k·n + i` of all, so that the lanes together send
/// evenly spaced messages at the total rate.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schedule {
    /// When the first message of lane 0 is due.
    pub(crate) start_ns: u64,
    /// How long messages become due.
    pub(crate) duration: Duration,
    /// Messages per second over all lanes.
    pub(crate) rate: u32,
    /// How many lanes share the rate.
    pub(crate) lanes: usize,
}

impl Schedule {
    /// When message `k` of `lane` is due; `None` after the end.
    pub(crate) fn due_ns(&self, lane: usize, k: u64) -> Option<u64> {
        let number = u128::from(k) * self.lanes as u128 + lane as u128;
        let offset = number * 1_000_000_000 / u128::from(self.rate);
        if offset >= self.duration.as_nanos() {
            return None;
        }
        u64::try_from(offset).ok()?.checked_add(self.start_ns)
    }

    /// How many messages all lanes send.
    pub(crate) fn total(&self) -> u64 {
        // Number m is due at floor(m·1e9/rate), which is before the end exactly where m·1e9 < end·rate.
        let budget = self.duration.as_nanos() * u128::from(self.rate);
        u64::try_from(budget.div_ceil(1_000_000_000)).unwrap_or(u64::MAX)
    }

    /// When the last message has become due.
    pub(crate) fn end_ns(&self) -> u64 {
        self.start_ns + u64::try_from(self.duration.as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A name for one run: client ids and payloads carry it, so that what an earlier run left on the
/// server is not counted.
pub(crate) fn run_tag() -> String {
    let micros = jiff::Timestamp::now().as_microsecond();
    let mixed =
        (micros as u64 ^ (u64::from(std::process::id()) << 40)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    format!("{:08x}", mixed >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(rate: u32, lanes: usize, ms: u64) -> Schedule {
        Schedule {
            start_ns: 1_000,
            duration: Duration::from_millis(ms),
            rate,
            lanes,
        }
    }

    #[test]
    fn lanes_interleave_into_an_even_stream() {
        let s = schedule(1_000, 3, 10);
        let mut due: Vec<u64> = (0..3)
            .flat_map(|lane| (0..).map_while(move |k| s.due_ns(lane, k)))
            .collect();
        due.sort_unstable();
        let expected: Vec<u64> = (0..10).map(|m| 1_000 + m * 1_000_000).collect();
        assert_eq!(due, expected);
    }

    #[test]
    fn total_counts_what_the_lanes_send() {
        for (rate, lanes, ms) in [
            (1_000, 3, 10),
            (7, 2, 1_000),
            (999, 64, 1_234),
            (3, 10, 500),
        ] {
            let s = schedule(rate, lanes, ms);
            let sent = (0..lanes).map(|lane| (0..).map_while(|k| s.due_ns(lane, k)).count() as u64);
            assert_eq!(
                sent.sum::<u64>(),
                s.total(),
                "rate {rate}, {lanes} lanes, {ms} ms"
            );
        }
    }
}
