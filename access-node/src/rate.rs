//! Rates: how much may happen in a second, and what is done about more.
//!
//! A bucket is one number, the time at which everything taken so far would have been due at an even
//! pace. It is ahead of the clock by what was taken too early, and a burst is how far ahead it may be.
//! No timer fills it, and an idle one needs no attention.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Sleep;

use crate::close_reason::CloseReason;
use crate::config::{Excess, PerDevice};

const SECOND_NS: u64 = 1_000_000_000;

/// So many a second, and how many at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rate {
    interval_ns: u64,
    burst_ns: u64,
}

impl Rate {
    /// `None` where `per_second` is 0, which is no limit. At least one can always be taken at once.
    pub(crate) fn new(per_second: u64, burst: Duration) -> Option<Self> {
        let interval_ns = SECOND_NS.checked_div(per_second)?.max(1);
        let burst_ns = u64::try_from(burst.as_nanos()).unwrap_or(u64::MAX / 4);
        Some(Self {
            interval_ns,
            burst_ns: burst_ns.max(interval_ns),
        })
    }

    /// What `due` becomes if one more may be taken at `now_ns`.
    fn take(self, due: u64, now_ns: u64) -> Option<u64> {
        let due = due.max(now_ns).saturating_add(self.interval_ns);
        (due - now_ns <= self.burst_ns).then_some(due)
    }

    /// Takes one, unless that would be too early.
    pub(crate) fn admits(self, due: &mut u64, now_ns: u64) -> bool {
        let taken = self.take(*due, now_ns);
        *due = taken.unwrap_or(*due);
        taken.is_some()
    }

    /// The same for a bucket that many threads share.
    pub(crate) fn admits_shared(self, due: &AtomicU64, now_ns: u64) -> bool {
        due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |due| {
            self.take(due, now_ns)
        })
        .is_ok()
    }

    /// Takes what has happened already and says for how long nothing more may.
    fn spend(self, due: &mut u64, now_ns: u64, count: u64) -> Duration {
        let cost = self.interval_ns.saturating_mul(count);
        *due = (*due).max(now_ns).saturating_add(cost);
        Duration::from_nanos((*due - now_ns).saturating_sub(self.burst_ns))
    }
}

/// What one device may send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceRates {
    packets: Option<Rate>,
    bytes: Option<Rate>,
    excess: Excess,
}

impl DeviceRates {
    pub(crate) fn new(limits: &PerDevice) -> Self {
        Self {
            packets: Rate::new(u64::from(limits.packets_per_second), limits.burst),
            bytes: Rate::new(limits.bytes_per_second, limits.burst),
            excess: limits.excess,
        }
    }

    /// The meter of a new connection, if anything is to be measured.
    pub(crate) fn meter(&self) -> Option<Box<Meter>> {
        (self.packets.is_some() || self.bytes.is_some()).then(Box::default)
    }
}

/// How much one connection has sent lately.
#[derive(Default)]
pub(crate) struct Meter {
    packets_due: u64,
    bytes_due: u64,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Meter {
    /// Counts what one read brought. Gives how long reading is to rest, or why the connection is to
    /// be closed.
    pub(crate) fn count(
        &mut self,
        rates: &DeviceRates,
        now_ns: u64,
        packets: usize,
        bytes: usize,
    ) -> Result<Duration, CloseReason> {
        let mut rest = Duration::ZERO;
        if let Some(rate) = rates.packets {
            rest = rate.spend(&mut self.packets_due, now_ns, packets as u64);
        }
        if let Some(rate) = rates.bytes {
            rest = rest.max(rate.spend(&mut self.bytes_due, now_ns, bytes as u64));
        }
        if rest.is_zero() {
            return Ok(rest);
        }
        match rates.excess {
            Excess::Pause => {
                self.pause = Some(Box::pin(tokio::time::sleep(rest)));
                Ok(rest)
            }
            Excess::Disconnect => Err(CloseReason::RateExceeded),
        }
    }

    /// Ready when the connection may read.
    pub(crate) fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.pause {
            std::task::ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        Poll::Ready(())
    }
}

/// Log lines that peers can provoke at will: so many in a while, then only their number.
#[derive(Debug, Default)]
pub(crate) struct LogLimit(Mutex<LogWindow>);

#[derive(Debug, Default)]
struct LogWindow {
    began_s: u32,
    lines: u32,
    suppressed: u32,
}

impl LogLimit {
    const WINDOW_S: u32 = 10;
    const LINES_MAX: u32 = 20;

    /// Whether a line may be written now; if so, how many were not since the last one that was.
    pub(crate) fn allows(&self, now_s: u32) -> Option<u32> {
        let mut window = self.0.lock();
        if now_s.saturating_sub(window.began_s) >= Self::WINDOW_S {
            window.began_s = now_s;
            window.lines = 0;
        }
        if window.lines >= Self::LINES_MAX {
            window.suppressed = window.suppressed.saturating_add(1);
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    #[test]
    fn a_burst_is_admitted_and_then_the_even_pace() {
        let rate = Rate::new(10, Duration::from_secs(1)).unwrap();
        let mut due = 0;
        let now = 5_000 * MS;
        let at_once = (0..100).filter(|_| rate.admits(&mut due, now)).count();
        assert_eq!(at_once, 10);
        assert!(!rate.admits(&mut due, now + 99 * MS));
        assert!(rate.admits(&mut due, now + 100 * MS));
        assert!(!rate.admits(&mut due, now + 100 * MS));
        let later = (0..100)
            .filter(|_| rate.admits(&mut due, now + 60_000 * MS))
            .count();
        assert_eq!(later, 10, "a long rest saves up no more than the burst");
    }

    #[test]
    fn a_shared_bucket_admits_as_much_as_one_that_is_not() {
        let rate = Rate::new(10, Duration::from_secs(1)).unwrap();
        let due = AtomicU64::new(0);
        let admitted = |now| (0..100).filter(|_| rate.admits_shared(&due, now)).count();
        assert_eq!(admitted(0), 10);
        assert_eq!(admitted(500 * MS), 5);
    }

    #[test]
    fn a_rate_below_its_burst_still_admits_one() {
        let rate = Rate::new(1, Duration::from_millis(1)).unwrap();
        let mut due = 0;
        assert!(rate.admits(&mut due, 0));
        assert!(!rate.admits(&mut due, 0));
        assert!(Rate::new(0, Duration::from_secs(1)).is_none());
    }

    fn limits(excess: Excess) -> DeviceRates {
        DeviceRates::new(&PerDevice {
            packets_per_second: 100,
            bytes_per_second: 1_000,
            burst: Duration::from_secs(1),
            excess,
        })
    }

    #[tokio::test]
    async fn whoever_sends_too_much_rests_for_as_long_as_it_is_ahead() {
        let rates = limits(Excess::Pause);
        let mut meter = rates.meter().unwrap();
        let rest = |meter: &mut Meter, now, packets, bytes| {
            meter
                .count(&rates, now, packets, bytes)
                .unwrap()
                .as_millis()
        };
        assert_eq!(rest(&mut meter, 0, 100, 0), 0);
        assert_eq!(rest(&mut meter, 0, 50, 0), 500);
        assert_eq!(rest(&mut meter, 2_000 * MS, 0, 3_000), 2_000);
        assert_eq!(rest(&mut meter, 5_000 * MS, 1, 1), 0);
    }

    #[test]
    fn or_it_is_closed() {
        let rates = limits(Excess::Disconnect);
        let mut meter = rates.meter().unwrap();
        assert_eq!(meter.count(&rates, 0, 100, 100), Ok(Duration::ZERO));
        assert_eq!(meter.count(&rates, 0, 1, 1), Err(CloseReason::RateExceeded));
    }

    #[test]
    fn nothing_is_measured_without_a_limit() {
        assert!(DeviceRates::new(&PerDevice::default()).meter().is_none());
    }

    #[test]
    fn a_flood_of_log_lines_becomes_their_number() {
        let limit = LogLimit::default();
        let written = (0..1_000).filter(|_| limit.allows(100).is_some()).count();
        assert_eq!(written, 20);
        assert_eq!(limit.allows(110), Some(980));
        assert_eq!(limit.allows(110), Some(0));
    }
}
