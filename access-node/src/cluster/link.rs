//! How the node stands with the store.
//!
//! While the store is out of reach devices stay connected, and nobody is let in: a CONNECT needs a claim. It is told so at
//! once, not after the time-out of each. What others see of the node meanwhile is seen to when the store is back.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use moorline_router::StoreError;
use tokio::sync::Notify;

/// Whether the store answers.
#[derive(Debug)]
pub(crate) struct StoreLink {
    started: Instant,
    away: AtomicBool,
    /// Something has failed since the last pass of comparison.
    troubled: AtomicBool,
    /// Milliseconds after `started` at which the lease could not be renewed last, plus one; 0 is never.
    lost_ms: AtomicU64,
    probe: Notify,
}

impl StoreLink {
    pub(crate) fn new() -> Self {
        Self {
            started: Instant::now(),
            away: AtomicBool::new(false),
            troubled: AtomicBool::new(false),
            lost_ms: AtomicU64::new(0),
            probe: Notify::new(),
        }
    }

    /// A call has failed: the lease is renewed at once, to see whether it is the store.
    pub(crate) fn trouble(&self) {
        if !self.troubled.swap(true, Ordering::AcqRel) {
            self.doubt();
        }
    }

    /// Notes `result`; gives it back.
    pub(crate) fn note<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if matches!(result, Err(StoreError::Unavailable(_))) {
            self.trouble();
        }
        result
    }

    /// The lease could not be renewed.
    pub(crate) fn lost(&self) {
        let now_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        self.lost_ms.store(now_ms + 1, Ordering::Release);
        self.trouble();
        self.away.store(true, Ordering::Release);
    }

    /// The lease was renewed; says whether something had failed before.
    pub(crate) fn renewed(&self) -> bool {
        self.away.store(false, Ordering::Release);
        self.troubled.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn is_away(&self) -> bool {
        self.away.load(Ordering::Acquire)
    }

    /// Whether the store has answered every renewal for `time`.
    pub(crate) fn is_calm_for(&self, time: Duration) -> bool {
        match self.lost_ms.load(Ordering::Acquire) {
            0 => true,
            at_ms => self.started.elapsed() > Duration::from_millis(at_ms) + time,
        }
    }

    /// Lets the lease be renewed at once.
    pub(crate) fn doubt(&self) {
        self.probe.notify_one();
    }

    /// Resolves when the lease is to be renewed before its time.
    pub(crate) async fn doubted(&self) {
        self.probe.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_remembered_until_the_lease_is_renewed() {
        let link = StoreLink::new();
        assert!(!link.renewed());
        assert!(link.is_calm_for(Duration::from_secs(3600)));
        let full = link.note::<()>(Err(StoreError::Full(String::new())));
        assert!(full.is_err() && !link.renewed());
        let failed = link.note::<()>(Err(StoreError::Unavailable(String::new())));
        assert!(failed.is_err() && !link.is_away());
        // One call may fail for many reasons: nobody has lost a lease.
        assert!(link.is_calm_for(Duration::from_secs(1)));
        assert!(link.renewed());
        link.lost();
        assert!(link.is_away());
        assert!(link.renewed() && !link.is_away());
        assert!(!link.renewed());
        assert!(!link.is_calm_for(Duration::from_secs(1)));
    }
}
