//! How long to wait before the next attempt.

use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

/// Full jitter: a random part of the exponential wait, so that calls that failed together are not repeated together. At
/// least what the backend asks for, at most `max`. `attempts` were made; `fraction` is from 0 to 1.
pub fn backoff(
    initial: Duration,
    max: Duration,
    attempts: u32,
    retry_after: Option<Duration>,
    fraction: f64,
) -> Duration {
    let doubled = 1_u32
        .checked_shl(attempts.saturating_sub(1))
        .unwrap_or(u32::MAX);
    let longest = initial.saturating_mul(doubled).min(max);
    longest
        .mul_f64(fraction)
        .max(retry_after.unwrap_or_default())
        .min(max)
}

/// From 0 to 1. Not for secrets.
pub fn random_fraction() -> f64 {
    let bits = RandomState::new().hash_one(());
    f64::from(u32::try_from(bits >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INITIAL: Duration = Duration::from_millis(500);
    const MAX: Duration = Duration::from_secs(30);

    #[test]
    fn the_wait_doubles_up_to_its_limit_and_is_random_below_it() {
        let ms = |attempts, fraction| backoff(INITIAL, MAX, attempts, None, fraction).as_millis();
        assert_eq!([ms(1, 1.0), ms(2, 1.0), ms(3, 1.0)], [500, 1_000, 2_000]);
        assert_eq!(
            [ms(7, 1.0), ms(8, 1.0), ms(100, 1.0)],
            [30_000, 30_000, 30_000]
        );
        assert_eq!([ms(2, 0.0), ms(2, 0.5)], [0, 500]);
    }

    #[test]
    fn what_the_backend_asks_for_is_kept_up_to_the_limit() {
        let wait = |seconds| backoff(INITIAL, MAX, 1, Some(Duration::from_secs(seconds)), 0.5);
        assert_eq!(wait(7), Duration::from_secs(7));
        assert_eq!(wait(7_000), MAX);
        assert_eq!(wait(0), Duration::from_millis(250));
    }

    #[test]
    fn random_fractions_differ() {
        let fractions: Vec<f64> = (0..20).map(|_| random_fraction()).collect();
        assert!(fractions.iter().all(|f| (0.0..=1.0).contains(f)));
        assert!(fractions.iter().any(|f| *f != fractions[0]));
    }
}
