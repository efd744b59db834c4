//! Random choices that can be made again: the seed is printed and can be given.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A small generator (SplitMix64); good enough to choose moments and bytes.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Takes the seed from `MOORLINE_TEST_SEED` or from the clock, and prints it.
    ///
    /// # Panics
    /// When the variable is not a number.
    pub fn announced(test: &str) -> Self {
        let seed = match std::env::var("MOORLINE_TEST_SEED") {
            Ok(text) => text.parse().expect("MOORLINE_TEST_SEED is a number"),
            Err(_) => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(1, |since| u64::from(since.subsec_nanos()) ^ since.as_secs()),
        };
        eprintln!("{test}: seed {seed} (MOORLINE_TEST_SEED={seed} repeats it)");
        Self(seed)
    }

    /// The choices of this seed.
    pub fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    /// The seed of the choices that follow.
    pub fn seed(&self) -> u64 {
        self.0
    }

    /// True once in `times`, at random.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// The next number.
    #[allow(
        clippy::should_implement_trait,
        reason = "an endless sequence needs no Option"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// A duration between the two, in milliseconds.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

/// How often the tests that kill the gateway do so.
pub fn rounds() -> u64 {
    std::env::var("MOORLINE_TEST_ROUNDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10)
}
