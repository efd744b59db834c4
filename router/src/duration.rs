//! Durations as configuration files and requests write them: `"250ms" | "15s" | "15m" | "24h" | "7d"`
//! or whole seconds as a number.
//!
//! Use it with `#[serde(with = "moorline_router::duration")]` on a [`jiff::SignedDuration`] or a
//! [`std::time::Duration`], or call [`parse`] on text. Negative durations do not exist here.

use std::fmt;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::ser::Serializer;

/// Text that is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a duration: write a whole number with a unit, like \"250ms\", \"15m\" or \"24h\", or whole seconds"
)]
pub struct InvalidDuration(String);

const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1_000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// Reads `"250ms"`, `"15m"`, `"90"` (seconds) and the like.
pub fn parse(text: &str) -> Result<Duration, InvalidDuration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit = if unit.is_empty() { "s" } else { unit };
    UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .and_then(|(_, ms)| number.parse::<u64>().ok()?.checked_mul(*ms))
        // jiff counts in signed seconds and nanoseconds; this stays far inside.
        .filter(|ms| i64::try_from(*ms).is_ok())
        .map(Duration::from_millis)
        .ok_or_else(|| InvalidDuration(text.into()))
}

/// The shortest text that [`parse`] reads as `duration`; fractions of a millisecond are dropped.
pub fn format(duration: Duration) -> String {
    let ms = duration.as_millis();
    let (name, unit_ms) = UNITS
        .iter()
        .rev()
        .map(|(name, unit_ms)| (*name, u128::from(*unit_ms)))
        .find(|(_, unit_ms)| ms >= *unit_ms && ms.is_multiple_of(*unit_ms))
        .unwrap_or(("s", 1_000));
    format!("{}{name}", ms / unit_ms)
}

/// What the helper reads and writes; made for the two duration types in use.
pub trait DurationLike: Sized {
    /// From a duration of whole milliseconds.
    fn from_std(duration: Duration) -> Self;
    /// Back; a negative value is zero.
    fn to_std(&self) -> Duration;
}

impl DurationLike for Duration {
    fn from_std(duration: Duration) -> Self {
        duration
    }
    fn to_std(&self) -> Duration {
        *self
    }
}

impl DurationLike for jiff::SignedDuration {
    fn from_std(duration: Duration) -> Self {
        Self::try_from(duration).unwrap_or(Self::MAX)
    }
    fn to_std(&self) -> Duration {
        Duration::try_from(*self).unwrap_or_default()
    }
}

/// For `#[serde(with)]`.
pub fn serialize<S: Serializer, T: DurationLike>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&format(value.to_std()))
}

/// For `#[serde(with)]`.
pub fn deserialize<'de, D: Deserializer<'de>, T: DurationLike>(from: D) -> Result<T, D::Error> {
    struct Text;
    impl Visitor<'_> for Text {
        type Value = Duration;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a duration like \"250ms\", \"15m\" or \"24h\", or whole seconds")
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Duration, E> {
            parse(text).map_err(E::custom)
        }
        fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Duration, E> {
            i64::try_from(seconds)
                .map(|_| Duration::from_secs(seconds))
                .map_err(|_| E::custom("too long a duration"))
        }
        fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Duration, E> {
            u64::try_from(seconds)
                .map(Duration::from_secs)
                .map_err(|_| E::custom("a duration must not be negative"))
        }
    }
    from.deserialize_any(Text).map(T::from_std)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_in_every_unit_and_written_back_shortest() {
        for (text, ms, shortest) in [
            ("250ms", 250, "250ms"),
            ("15", 15_000, "15s"),
            ("15s", 15_000, "15s"),
            ("90m", 5_400_000, "90m"),
            ("24h", 86_400_000, "1d"),
            ("7d", 604_800_000, "7d"),
            ("0", 0, "0s"),
        ] {
            let duration = parse(text).unwrap();
            assert_eq!(duration, Duration::from_millis(ms), "{text}");
            assert_eq!(format(duration), shortest);
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        for text in [
            "",
            "m",
            "-1s",
            "1.5h",
            "10 m",
            "10min",
            "99999999999999999999s",
            "1w",
        ] {
            assert!(
                parse(text)
                    .unwrap_err()
                    .to_string()
                    .contains(&format!("{text:?}")),
                "{text}"
            );
        }
    }

    #[test]
    fn numbers_are_seconds() {
        #[derive(serde::Deserialize)]
        struct Holder {
            #[serde(with = "super")]
            ttl: jiff::SignedDuration,
        }
        let holder: Holder = serde_json::from_str(r#"{"ttl": 90}"#).unwrap();
        assert_eq!(holder.ttl, jiff::SignedDuration::from_secs(90));
        let holder: Holder = serde_json::from_str(r#"{"ttl": "2m"}"#).unwrap();
        assert_eq!(holder.ttl, jiff::SignedDuration::from_secs(120));
        assert!(serde_json::from_str::<Holder>(r#"{"ttl": -1}"#).is_err());
        assert!(serde_json::from_str::<Holder>(r#"{"ttl": 1.5}"#).is_err());
    }
}
