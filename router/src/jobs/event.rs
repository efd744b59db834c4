//! Events: what makes jobs moot, or due.

use std::fmt;
use std::sync::Arc;

use crate::MessageId;
use crate::ids::InvalidId;

/// What happened to what: `order.paid:123`. The type is everything before the first colon; both parts are not empty and
/// without control characters; 300 bytes in all.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventName(Arc<str>);

impl EventName {
    /// The longest name, in bytes.
    pub const BYTES_MAX: usize = 300;

    /// The name made of a type and a key.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn new(kind: &str, key: &str) -> Result<Self, InvalidId> {
        if kind.contains(':') {
            return Err(InvalidId::of("event type", "must not contain a colon"));
        }
        Self::parse(&format!("{kind}:{key}"))
    }

    /// Checks `text` as `type:key`.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let problem = match text.split_once(':') {
            None => "must be a type and a key with a colon between them, like order.paid:123",
            Some(("", _)) => "must have a type before the colon",
            Some((_, "")) => "must have a key after the colon",
            _ if text.len() > Self::BYTES_MAX => "must not be longer than 300 bytes",
            _ if text.chars().any(char::is_control) => "must not contain control characters",
            _ => return Ok(Self(text.into())),
        };
        Err(InvalidId::of("event name", problem))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for EventName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is meant by an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// It happened: it cancels, triggers, and counts for jobs created within the window after it.
    Happened,
    /// Somebody withdraws the jobs that it would cancel: it triggers nothing and means nothing to later jobs.
    Withdrawal,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobEvent {
    /// Tells a repetition from another event of the same name.
    pub id: MessageId,
    /// What happened.
    pub name: EventName,
    /// What is meant.
    pub kind: EventKind,
    /// When it was taken, Unix milliseconds.
    pub at_ms: u64,
}

/// What an event has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EventOutcome {
    /// Jobs that it cancelled.
    pub cancelled: u64,
    /// Jobs that it made due.
    pub triggered: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_name_is_a_type_and_a_key() {
        for good in ["order.paid:123", "a:b:c", "bezahlt:№ 7"] {
            assert_eq!(EventName::parse(good).unwrap().as_str(), good);
        }
        assert_eq!(EventName::new("a", "b:c").unwrap().as_str(), "a:b:c");
        for bad in [
            "",
            "order",
            ":1",
            "a:",
            "a:\0",
            &format!("a:{}", "x".repeat(299)),
        ] {
            assert!(EventName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(EventName::new("a:b", "c").is_err());
    }
}
