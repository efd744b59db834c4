//! How fast jobs are begun: a flood that is due at one instant is spread.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What may be begun at once, as the time in which it would be begun one by one.
const BURST: Duration = Duration::from_millis(20);

/// A rate that all shards of a process share.
pub(crate) struct Rate {
    each: Duration,
    /// When everything that was begun would have been begun one by one.
    spent_until: Mutex<Instant>,
}

impl Rate {
    /// So many in a second.
    pub(crate) fn per_second(rate: u32) -> Self {
        Self {
            each: Duration::from_secs(1) / rate,
            spent_until: Mutex::new(Instant::now()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Instant> {
        self.spent_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// How many may be begun together without much unevenness.
    pub(crate) fn batch(&self) -> usize {
        let batch = BURST.as_nanos() / self.each.as_nanos().max(1);
        usize::try_from(batch).unwrap_or(usize::MAX).max(1)
    }

    /// Waits until some may be begun.
    pub(crate) async fn ready(&self) {
        loop {
            let ahead = self.lock().saturating_duration_since(Instant::now());
            if ahead <= BURST {
                return;
            }
            tokio::time::sleep(ahead - BURST).await;
        }
    }

    /// So many are begun.
    pub(crate) fn spend(&self, count: usize) {
        let cost = self
            .each
            .saturating_mul(u32::try_from(count).unwrap_or(u32::MAX));
        let mut spent_until = self.lock();
        *spent_until = (*spent_until).max(Instant::now()) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_flood_is_spread_at_the_rate() {
        let rate = Rate::per_second(1_000);
        assert_eq!(rate.batch(), 20);
        let began = Instant::now();
        for _ in 0..10 {
            rate.ready().await;
            rate.spend(20);
        }
        rate.ready().await;
        // 200 at 1,000 a second, but for the first burst.
        let took = began.elapsed();
        assert!(took >= Duration::from_millis(179), "{took:?}");
    }

    #[tokio::test]
    async fn what_was_not_spent_is_not_saved_up() {
        let rate = Rate::per_second(1_000);
        tokio::time::sleep(Duration::from_millis(100)).await;
        rate.spend(50);
        let began = Instant::now();
        rate.ready().await;
        assert!(began.elapsed() >= Duration::from_millis(25));
    }
}
