//! The circuit breaker of one rule: while its backend fails, it is asked by one call now and then instead of by all.
//!
//! Closed: calls are made. After [`FAILURES`] failures in a row it opens: no calls. After a pause, which gets longer, one partition may
//! make one call; if that succeeds the breaker is closed, and else the pause begins again.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// In a row, of whatever message, until no more calls are made. Only failures that may pass count.
const FAILURES: u32 = 10;
/// A probe that has not ended by then, the call's own timeout not counted, never will.
const PROBE_GRACE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
enum State {
    Closed { failures: u32 },
    Open { until: Instant, pause: Duration },
    Probing { until: Instant, pause: Duration },
}

/// Shared by the partitions of a rule.
pub(crate) struct Breaker {
    state: Mutex<State>,
    changed: Notify,
    pause_min: Duration,
    pause_max: Duration,
    probe_max: Duration,
}

impl Breaker {
    /// Pauses are between `min` and `max`; a call may take `timeout`.
    pub(crate) fn new(min: Duration, max: Duration, timeout: Duration) -> Self {
        Self {
            state: Mutex::new(State::Closed { failures: 0 }),
            changed: Notify::new(),
            pause_min: min,
            pause_max: max,
            probe_max: timeout + PROBE_GRACE,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether calls are made without further ado.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(*self.lock(), State::Closed { .. })
    }

    /// A call was answered, with whatever that says of its message.
    pub(crate) fn succeeded(&self) {
        let mut state = self.lock();
        let was_closed = matches!(*state, State::Closed { .. });
        *state = State::Closed { failures: 0 };
        drop(state);
        if !was_closed {
            self.changed.notify_waiters();
        }
    }

    /// A call failed; says whether the breaker has just opened.
    pub(crate) fn failed(&self) -> bool {
        let mut state = self.lock();
        let (next, opened) = match *state {
            State::Closed { failures } if failures + 1 < FAILURES => {
                let failures = failures + 1;
                (State::Closed { failures }, false)
            }
            State::Closed { .. } => (open(self.pause_min), true),
            State::Probing { pause, .. } => {
                (open(pause.saturating_mul(2).min(self.pause_max)), false)
            }
            // A call that was under way when it opened.
            open @ State::Open { .. } => (open, false),
        };
        *state = next;
        drop(state);
        self.changed.notify_waiters();
        opened
    }

    /// Resolves when the caller may make a call again: with true where it is the one that probes.
    pub(crate) async fn ready(&self) -> bool {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let until = {
                let mut state = self.lock();
                match *state {
                    State::Closed { .. } => return false,
                    State::Open { until, pause } | State::Probing { until, pause } => {
                        let now = Instant::now();
                        if now >= until {
                            let until = now + self.probe_max;
                            *state = State::Probing { until, pause };
                            return true;
                        }
                        until
                    }
                }
            };
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(until.into()) => {}
            }
        }
    }
}

fn open(pause: Duration) -> State {
    let until = Instant::now() + pause;
    State::Open { until, pause }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a future is ready with at once.
    async fn now<T>(future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            value = future => Some(value),
            () = std::future::ready(()) => None,
        }
    }

    fn breaker() -> Breaker {
        let ms = Duration::from_millis;
        Breaker::new(ms(200), ms(500), ms(10))
    }

    fn broken() -> Breaker {
        let breaker = breaker();
        let opened: Vec<_> = (0..FAILURES).map(|_| breaker.failed()).collect();
        assert_eq!(opened.iter().filter(|opened| **opened).count(), 1);
        breaker
    }

    #[tokio::test]
    async fn it_opens_after_failures_in_a_row() {
        let breaker = breaker();
        for _ in 0..5 {
            (1..FAILURES).for_each(|_| assert!(!breaker.failed()));
            assert!(breaker.is_closed());
            breaker.succeeded();
        }
        assert_eq!(now(breaker.ready()).await, Some(false));
        assert!(!broken().is_closed());
    }

    #[tokio::test]
    async fn one_probes_and_its_success_lets_all_go_on() {
        let breaker = broken();
        assert_eq!(now(breaker.ready()).await, None);
        assert!(breaker.ready().await, "after the pause one may");
        assert_eq!(now(breaker.ready()).await, None, "and one only");
        breaker.succeeded();
        assert_eq!(now(breaker.ready()).await, Some(false));
    }

    #[tokio::test]
    async fn a_probe_that_fails_makes_the_pause_longer() {
        let breaker = broken();
        assert!(breaker.ready().await);
        for pause in [400, 500, 500] {
            let started = Instant::now();
            breaker.failed();
            assert!(breaker.ready().await);
            assert!(started.elapsed() >= Duration::from_millis(pause));
        }
    }
}
