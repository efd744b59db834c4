//! The clock by which jobs become due.
//!
//! What rules is elapsed time: the clock begins at the wall clock and goes on with the monotonic one. It follows
//! the wall clock (on one machine) or the store's clock (where many machines share jobs) only by going a little slower
//! or faster. A step of the wall clock by some seconds, forth or back, therefore neither makes a job early nor stops anything: a delay of
//! 15 minutes takes 15 minutes.
//!
//! * Behind its reference it goes faster by [`FASTER_BY`] at most, which is the rate that the operating system may
//!   use to turn its own clock: a delay is never cut by more than that.
//! * Ahead of its reference it goes slower by [`SLOWER_BY`] at most: what is due is late by that part
//!   of what is left to wait, never early.
//! * An error of more than [`STEP_MAX`] is no jitter but a correction (a machine that began without a clock, or was
//!   suspended): it is taken over at once, in both directions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::watch;

/// One part in so many: 500 ppm.
const FASTER_BY: u64 = 2_000;
/// One part in so many: 5 %.
const SLOWER_BY: u64 = 20;
/// Errors above this are taken over at once.
const STEP_MAX: Duration = Duration::from_secs(10);
/// However far away the time is that is waited for, the clock is looked at this often: it may be corrected.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The clock by which jobs become due. Clones are the same clock.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    /// Follows the machine's wall clock.
    Machine(Arc<Mutex<Running>>),
    /// Follows what it is told of another clock.
    Told(Arc<Mutex<Running>>),
    /// Stands until it is moved.
    ByHand(Arc<watch::Sender<u64>>),
}

#[derive(Debug)]
struct Running {
    began: Instant,
    reckoning: Reckoning,
}

impl Running {
    fn from(reference: Duration) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            began: Instant::now(),
            reckoning: Reckoning::new(reference),
        }))
    }
}

impl Clock {
    /// Follows the machine's wall clock: for one machine.
    pub fn of_machine() -> Self {
        Self(Source::Machine(Running::from(wall())))
    }

    /// Follows a clock that says `reference_ms` now, and whatever [`Self::observe`] hears of it later: for machines
    /// that share a store.
    pub fn following(reference_ms: u64) -> Self {
        let reference = Duration::from_millis(reference_ms);
        Self(Source::Told(Running::from(reference)))
    }

    /// Stands at `now_ms` until it is set: for tests.
    pub fn by_hand(now_ms: u64) -> Self {
        Self(Source::ByHand(Arc::new(watch::Sender::new(now_ms))))
    }

    /// Now, Unix milliseconds. Never less than before, but for a correction of more than ten seconds.
    pub fn now_ms(&self) -> u64 {
        let now = match &self.0 {
            Source::Machine(running) => {
                let mut running = running.lock();
                let elapsed = running.began.elapsed();
                running.reckoning.observe(elapsed, wall());
                running.reckoning.now(elapsed)
            }
            Source::Told(running) => {
                let mut running = running.lock();
                let elapsed = running.began.elapsed();
                running.reckoning.now(elapsed)
            }
            Source::ByHand(now) => return *now.borrow(),
        };
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    }

    /// The clock that this one follows says `reference_ms` now. Of no effect on one that follows the machine's.
    pub fn observe(&self, reference_ms: u64) {
        if let Source::Told(running) = &self.0 {
            let mut running = running.lock();
            let elapsed = running.began.elapsed();
            let reference = Duration::from_millis(reference_ms);
            running.reckoning.observe(elapsed, reference);
        }
    }

    /// Moves a clock that is set by hand; of no effect on another one.
    pub fn set(&self, now_ms: u64) {
        if let Source::ByHand(now) = &self.0 {
            now.send_replace(now_ms);
        }
    }

    /// Waits until [`Self::now_ms`] is at least `at_ms`.
    pub async fn wait_until(&self, at_ms: u64) {
        if let Source::ByHand(now) = &self.0 {
            // The sender lives as long as this clock.
            let _ = now.subscribe().wait_for(|now| *now >= at_ms).await;
            return;
        }
        loop {
            let now_ms = self.now_ms();
            if now_ms >= at_ms {
                return;
            }
            let rest = Duration::from_millis(at_ms - now_ms);
            tokio::time::sleep(rest.min(LOOK_EVERY)).await;
        }
    }
}

/// Since 1970.
fn wall() -> Duration {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default()
}

/// What the clock says for what it is told; knows no clock itself. `elapsed` counts from a moment of its own and
/// never goes back.
#[derive(Debug)]
struct Reckoning {
    /// When `now` was reckoned.
    at: Duration,
    now: Duration,
    /// What the other clock said, and when.
    observed_at: Duration,
    observed: Duration,
}

impl Reckoning {
    fn new(reference: Duration) -> Self {
        Self {
            at: Duration::ZERO,
            now: reference,
            observed_at: Duration::ZERO,
            observed: reference,
        }
    }

    fn observe(&mut self, elapsed: Duration, reference: Duration) {
        // Up to here it went by what was known before.
        self.now(elapsed);
        self.observed_at = elapsed;
        self.observed = reference;
    }

    fn now(&mut self, elapsed: Duration) -> Duration {
        let passed = elapsed.saturating_sub(self.at);
        self.at = self.at.max(elapsed);
        let reference = self.observed + self.at.saturating_sub(self.observed_at);
        let now = self.now + passed;
        self.now = if now.abs_diff(reference) > STEP_MAX {
            reference
        } else if now < reference {
            now + (reference - now).min(fraction(passed, FASTER_BY))
        } else {
            now - (now - reference).min(fraction(passed, SLOWER_BY))
        };
        self.now
    }
}

/// One part in `parts`.
fn fraction(passed: Duration, parts: u64) -> Duration {
    Duration::from_nanos(u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX) / parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Duration = Duration::from_secs(1_700_000_000);
    const TICK: Duration = Duration::from_millis(1);

    fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Runs a clock for a while over a wall clock that is off by `step(elapsed)` milliseconds; calls `check` at each tick.
    fn run(
        length: Duration,
        step: impl Fn(Duration) -> i64,
        mut check: impl FnMut(Duration, Duration),
    ) {
        let mut clock = Reckoning::new(START);
        let mut elapsed = Duration::ZERO;
        while elapsed < length {
            elapsed += TICK;
            let off = step(elapsed);
            let wall = START + elapsed;
            let by = Duration::from_millis(off.unsigned_abs());
            let wall = if off < 0 { wall - by } else { wall + by };
            clock.observe(elapsed, wall);
            check(elapsed, clock.now(elapsed));
        }
    }

    /// Over steps of ±5 s: never early by more than the rate allows, never standing, never going back.
    fn is_steady(step: impl Fn(Duration) -> i64) {
        let mut before = START;
        run(secs(120), step, |elapsed, now| {
            let passed = now - START;
            assert!(
                passed <= elapsed + elapsed / 2_000 + TICK,
                "early: {passed:?} after {elapsed:?}"
            );
            assert!(
                passed + elapsed / 20 + TICK >= elapsed,
                "late: {passed:?} after {elapsed:?}"
            );
            let went = now - before;
            assert!(went >= TICK * 9 / 10, "stands: {went:?} at {elapsed:?}");
            assert!(went <= TICK * 11 / 10, "leaps: {went:?} at {elapsed:?}");
            before = now;
        });
    }

    #[test]
    fn without_steps_it_is_the_wall_clock() {
        run(
            secs(60),
            |_| 0,
            |elapsed, now| assert_eq!(now, START + elapsed),
        );
    }

    #[test]
    fn a_step_forth_makes_nothing_early() {
        is_steady(|elapsed| if elapsed > secs(10) { 5_000 } else { 0 });
    }

    #[test]
    fn a_step_back_stops_nothing() {
        is_steady(|elapsed| if elapsed > secs(10) { -5_000 } else { 0 });
    }

    #[test]
    fn steps_back_and_forth_neither_hurry_nor_stop_it() {
        is_steady(|elapsed| match elapsed.as_secs() % 20 {
            0..7 => 5_000,
            7..13 => -4_000,
            _ => 0,
        });
    }

    #[test]
    fn a_step_is_worked_off_in_time() {
        let mut last = (secs(0), START);
        let ahead = |elapsed| if elapsed > secs(1) { -5_000 } else { 0 };
        run(secs(110), ahead, |elapsed, now| last = (elapsed, now));
        // 5 s at 5 %.
        assert_eq!(last.1 + secs(5), START + last.0);

        let behind = |elapsed| if elapsed > secs(1) { 20 } else { 0 };
        run(secs(60), behind, |elapsed, now| last = (elapsed, now));
        // 20 ms at 500 ppm.
        assert_eq!(last.1, START + last.0 + Duration::from_millis(20));
    }

    #[test]
    fn a_large_error_is_a_correction_and_taken_over_at_once() {
        for by in [-3_600_000, 3_600_000, 11_000, -11_000] {
            let step = |elapsed| if elapsed > secs(5) { by } else { 0 };
            run(secs(10), step, |elapsed, now| {
                let off = if elapsed > secs(5) { by } else { 0 };
                let wall = (START + elapsed).as_millis() as i64 + off;
                assert_eq!(now.as_millis() as i64, wall);
            });
        }
    }

    #[test]
    fn a_clock_that_is_told_seldom_goes_on_meanwhile() {
        let mut clock = Reckoning::new(START);
        assert_eq!(clock.now(secs(30)), START + secs(30));
        clock.observe(secs(30), START + secs(28));
        assert_eq!(clock.now(secs(31)), START + secs(31) - secs(1) / 20);
        // Long after, it has come to the other clock and stays with it.
        assert_eq!(clock.now(secs(1_000)), START + secs(998));
    }

    #[tokio::test]
    async fn whoever_waits_is_never_woken_before_the_time() {
        let clock = Clock::of_machine();
        for wait in [0, 1, 7, 40] {
            let at_ms = clock.now_ms() + wait;
            clock.wait_until(at_ms).await;
            assert!(clock.now_ms() >= at_ms);
        }
        let clock = Clock::by_hand(1_000);
        let waiting = tokio::spawn({
            let clock = clock.clone();
            async move { clock.wait_until(2_000).await }
        });
        clock.set(1_999);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        clock.set(2_000);
        waiting.await.unwrap();
    }

    #[test]
    fn a_clock_that_is_told_follows_what_it_is_told() {
        let clock = Clock::following(5_000_000);
        assert!((5_000_000..5_000_900).contains(&clock.now_ms()));
        clock.observe(9_000_000);
        assert!((9_000_000..9_000_900).contains(&clock.now_ms()));
    }
}
