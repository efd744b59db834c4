//! The names of things, parsed once at the border.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Text that cannot be the id it was offered as.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
#[error("{what} {problem}")]
pub struct InvalidId {
    what: &'static str,
    problem: &'static str,
}

impl InvalidId {
    /// `what` has this `problem`.
    pub(crate) fn of(what: &'static str, problem: &'static str) -> Self {
        Self { what, problem }
    }
}

/// An MQTT client identifier: 1 to 65,535 bytes of UTF-8 without U+0000.
///
/// Shared, so that the registry, the route and the session of one device hold one copy.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(Arc<str>);

impl ClientId {
    /// Checks `text` as a client identifier.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let problem = match text {
            "" => "must not be empty",
            _ if text.len() > 65_535 => "must not be longer than 65,535 bytes",
            _ if text.contains('\0') => "must not contain U+0000",
            _ => return Ok(Self(text.into())),
        };
        Err(InvalidId {
            what: "client id",
            problem,
        })
    }

    /// The identifier as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Into which of `count` equal parts the client falls: CRC-32 over the identifier, the same in every run and on every
    /// machine. What is stored by it stays where it is: it never changes.
    pub(crate) fn part_of(&self, count: u16) -> u16 {
        let hash = crate::record::crc32(&[self.0.as_bytes()]);
        u16::try_from(hash % u32::from(count.max(1))).expect("below a u16")
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::borrow::Borrow<str> for ClientId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// One run of an access node: its name plus the moment it started, never an address alone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(Arc<str>);

impl NodeId {
    /// A node id for a process that starts now.
    pub fn for_this_run(name: &str) -> Self {
        Self(format!("{name}-{}", uuid::Uuid::now_v7().simple()).into())
    }

    /// The id as it was printed by another process.
    pub fn from_text(text: &str) -> Self {
        Self(text.into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A fencing token: each connect of a client takes a higher one, and whatever carries an older one
/// is refused. `max(previous + 1, the store's clock in µs)`, so that it never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Identifies one message from end to end: made here (UUIDv7), derived from an `Idempotency-Key`,
/// or supplied by a device. 1 to 64 visible ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(Arc<str>);

impl MessageId {
    /// A new id, unique and ordered by time.
    pub fn generate() -> Self {
        Self(uuid::Uuid::now_v7().hyphenated().to_string().into())
    }

    /// Checks `text` as a message id.
    pub fn parse(text: &str) -> Result<Self, InvalidId> {
        let problem = match text {
            "" => "must not be empty",
            _ if text.len() > 64 => "must not be longer than 64 characters",
            _ if !text.bytes().all(|b| b.is_ascii_graphic()) => {
                "must consist of visible ASCII characters"
            }
            _ => return Ok(Self(text.into())),
        };
        Err(InvalidId {
            what: "message id",
            problem,
        })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A place in one client's inbox.
///
/// `sequence` is dense within a generation. A new generation (always a higher number) begins with
/// sequence 1 where nothing of the previous one is left. Where something may be left, but the store may
/// have forgotten the last positions that it gave out (a failover), it goes on with a higher sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Position {
    /// Which life of the inbox.
    pub generation: u64,
    /// From 1 on, without holes in one generation.
    pub sequence: u64,
}

impl Position {
    /// Before everything.
    pub const START: Self = Self {
        generation: 0,
        sequence: 0,
    };

    /// Whether nothing can lie between `self` and `next`.
    pub fn is_followed_by(self, next: Self) -> bool {
        if self.generation == next.generation {
            next.sequence == self.sequence + 1
        } else {
            // A generation begins only when nothing of the one before is left.
            self != Self::START && next.generation > self.generation && next.sequence == 1
        }
    }
}

/// Milliseconds since 1970, by the machine's clock.
pub fn unix_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}
