//! Latencies: one HDR histogram over the whole run, and a small one per second of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::Serialize;

/// The longest latency that is told apart: two minutes.
const HIGHEST_US: u64 = 120_000_000;
/// Seconds of a run that get a histogram of their own.
const SECONDS_MAX: usize = 3_600;

/// Collects one kind of latency from any task.
#[derive(Debug)]
pub(crate) struct Latency {
    name: String,
    from_ns: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    all: Histogram<u64>,
    seconds: Vec<Histogram<u64>>,
}

fn histogram(digits: u8) -> Histogram<u64> {
    Histogram::new_with_bounds(1, HIGHEST_US, digits)
        .expect("constant bounds that the crate accepts")
}

impl Latency {
    /// Counts nothing until [`Latency::count_from`] says from when on.
    pub(crate) fn new(name: impl Into<String>) -> Self {
        let inner = Mutex::new(Inner {
            all: histogram(3),
            seconds: Vec::new(),
        });
        Self {
            name: name.into(),
            from_ns: AtomicU64::new(u64::MAX),
            inner,
        }
    }

    /// Counts what begins at or after `from_ns` on the run's clock; what began earlier was warm-up.
    pub(crate) fn count_from(&self, from_ns: u64) {
        self.from_ns.store(from_ns, Ordering::Relaxed);
    }

    /// Records something that began at `begun_ns` and ended at `ended_ns`; false if it was warm-up.
    pub(crate) fn record(&self, begun_ns: u64, ended_ns: u64) -> bool {
        let Some(since_ns) = begun_ns.checked_sub(self.from_ns.load(Ordering::Relaxed)) else {
            return false;
        };
        // Upwards, so that what took less than a microsecond is not a zero, which no histogram holds.
        let us = ended_ns.saturating_sub(begun_ns).div_ceil(1_000).max(1);
        let second = usize::try_from(since_ns / 1_000_000_000).unwrap_or(usize::MAX);
        let mut inner = self.inner.lock();
        inner.all.saturating_record(us);
        if second < SECONDS_MAX {
            while inner.seconds.len() <= second {
                inner.seconds.push(histogram(2));
            }
            inner.seconds[second].saturating_record(us);
        }
        true
    }

    /// The figures so far.
    pub(crate) fn summary(&self) -> Summary {
        let inner = self.inner.lock();
        let all = &inner.all;
        let at = |quantile| all.value_at_quantile(quantile);
        Summary {
            name: self.name.clone(),
            count: all.len(),
            min_us: if all.is_empty() { 0 } else { all.min() },
            mean_us: all.mean(),
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: all.max(),
            curve: curve(all),
            seconds: inner
                .seconds
                .iter()
                .enumerate()
                .map(|(second, h)| Second {
                    second,
                    count: h.len(),
                    p50_us: h.value_at_quantile(0.5),
                    p99_us: h.value_at_quantile(0.99),
                    max_us: h.max(),
                })
                .collect(),
        }
    }
}

/// The figures of one kind of latency, in microseconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) name: String,
    pub(crate) count: u64,
    pub(crate) min_us: u64,
    pub(crate) mean_us: f64,
    pub(crate) p50_us: u64,
    pub(crate) p90_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) p999_us: u64,
    pub(crate) max_us: u64,
    /// Pairs of (nines, microseconds): 1 is the 90th percentile, 2 the 99th, and so on.
    pub(crate) curve: Vec<(f64, f64)>,
    /// The same by second of the run.
    pub(crate) seconds: Vec<Second>,
}

/// One second of a run; a message belongs to the second in which it was due.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Second {
    pub(crate) second: usize,
    pub(crate) count: u64,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) max_us: u64,
}

/// The percentile curve on an axis of nines, up to what the number of samples can support.
fn curve(all: &Histogram<u64>) -> Vec<(f64, f64)> {
    if all.is_empty() {
        return Vec::new();
    }
    let nines_max = (all.len() as f64).log10();
    let steps = (nines_max / 0.05).ceil() as usize;
    (0..=steps)
        .map(|step| {
            let nines = (step as f64 * 0.05).min(nines_max);
            (
                nines,
                all.value_at_quantile(1.0 - 10f64.powf(-nines)) as f64,
            )
        })
        .collect()
}

/// Microseconds as a person reads them.
pub(crate) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// A count with thousands set apart.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Events per second; 0 for no time at all.
pub(crate) fn per_second(count: u64, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        count as f64 / time.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counting_from(from_ns: u64) -> Latency {
        let latency = Latency::new("test");
        latency.count_from(from_ns);
        latency
    }

    #[test]
    fn percentiles_are_those_of_what_was_recorded() {
        let latency = counting_from(0);
        for ms in 1..=1_000u64 {
            latency.record(0, ms * 1_000_000);
        }
        let s = latency.summary();
        assert_eq!(s.count, 1_000);
        assert_eq!(s.min_us, 1_000);
        for (found, expected) in [
            (s.p50_us, 500_000),
            (s.p90_us, 900_000),
            (s.p99_us, 990_000),
            (s.p999_us, 999_000),
            (s.max_us, 1_000_000),
        ] {
            assert!(
                found.abs_diff(expected) <= expected / 500,
                "{found} is not {expected}"
            );
        }
        assert!((s.curve.last().expect("there are samples").0 - 3.0).abs() < 1e-9);
        assert!(s.curve.is_sorted_by(|a, b| a.0 <= b.0 && a.1 <= b.1));
    }

    #[test]
    fn warm_up_is_left_out_and_seconds_are_those_of_the_due_time() {
        let latency = counting_from(5_000_000_000);
        latency.record(4_999_999_999, 6_000_000_000);
        latency.record(5_000_000_000, 5_000_001_000);
        latency.record(7_500_000_000, 9_500_000_000);
        let s = latency.summary();
        assert_eq!(s.count, 2);
        assert_eq!(
            s.seconds.iter().map(|s| s.count).collect::<Vec<_>>(),
            [1, 0, 1]
        );
    }

    #[test]
    fn extremes_are_kept_within_the_bounds() {
        let latency = counting_from(0);
        latency.record(10, 10);
        latency.record(10, 5);
        latency.record(0, u64::MAX);
        let s = latency.summary();
        assert_eq!((s.count, s.min_us), (3, 1));
        assert!(s.max_us >= HIGHEST_US);
    }

    #[test]
    fn an_empty_histogram_has_no_curve() {
        let s = counting_from(0).summary();
        assert_eq!((s.count, s.min_us, s.max_us), (0, 0, 0));
        assert!(s.curve.is_empty());
    }

    #[test]
    fn figures_are_written_for_people() {
        assert_eq!(micros(999), "999 µs");
        assert_eq!(micros(1_500), "1.50 ms");
        assert_eq!(micros(2_000_000), "2.00 s");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }
}
