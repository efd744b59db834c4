//! Topic names and topic filters (MQTT 5.0 section 4.7), checked once where they enter.
//!
//! A topic name is concrete and may be published to; a topic filter may hold wildcards and is
//! subscribed to. Who may use which is not decided here.

use std::borrow::Borrow;
use std::fmt;

use bytes::Bytes;
use bytestring::ByteString;

/// The longest text that fits into a packet (section 1.5.4), in bytes.
pub(crate) const TEXT_BYTES_MAX: usize = u16::MAX as usize;

const SHARE_PREFIX: &str = "$share/";

/// A copy that does not keep the buffer alive that `text` was read from.
pub(crate) fn copy_text(text: &ByteString) -> ByteString {
    ByteString::from(&**text)
}

/// Why text is not a topic name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// [MQTT-4.7.3-1].
    #[error("a topic name must not be empty")]
    Empty,
    /// [MQTT-4.7.3-3].
    #[error("a topic name must not be longer than 65,535 bytes")]
    TooLong,
    /// [MQTT-4.7.3-2].
    #[error("a topic name must not contain U+0000")]
    Nul,
    /// [MQTT-3.3.2-2].
    #[error("a topic name must not contain the wildcards '+' and '#'")]
    Wildcard,
}

/// Why text is not a topic filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// [MQTT-4.7.3-1].
    #[error("a topic filter must not be empty")]
    Empty,
    /// [MQTT-4.7.3-3].
    #[error("a topic filter must not be longer than 65,535 bytes")]
    TooLong,
    /// [MQTT-4.7.3-2].
    #[error("a topic filter must not contain U+0000")]
    Nul,
    /// [MQTT-4.7.1-1].
    #[error("'#' must be the last level of a topic filter and alone in it")]
    MultiLevelWildcard,
    /// [MQTT-4.7.1-2].
    #[error("'+' must be alone in its level of a topic filter")]
    SingleLevelWildcard,
    /// [MQTT-4.8.2-1] and [MQTT-4.8.2-2].
    #[error("the group of a shared subscription must not be empty nor contain '+' or '#'")]
    ShareGroup,
    /// [MQTT-4.8.2-2].
    #[error("a shared subscription needs a topic filter after its group")]
    ShareFilter,
}

/// The name of a topic: 1 to 65,535 bytes of UTF-8 without wildcards and without U+0000.
///
/// The one exception is [`TopicName::empty`], which stands where a PUBLISH has only a topic alias.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicName(ByteString);

impl TopicName {
    /// Checks `text` as a topic name.
    pub fn parse(text: ByteString) -> Result<Self, TopicError> {
        if text.is_empty() {
            return Err(TopicError::Empty);
        }
        Self::parse_or_empty(text)
    }

    /// As [`TopicName::parse`], but lets the empty name of an aliased PUBLISH pass.
    pub(crate) fn parse_or_empty(text: ByteString) -> Result<Self, TopicError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TopicError::TooLong);
        }
        // Without an early exit the loop compiles to vector instructions.
        let suspicious = text
            .as_bytes()
            .iter()
            .fold(false, |found, byte| found | matches!(byte, 0 | b'+' | b'#'));
        match suspicious {
            false => Ok(Self(text)),
            true if text.contains('\0') => Err(TopicError::Nul),
            true => Err(TopicError::Wildcard),
        }
    }

    /// A name known when the program is written.
    ///
    /// # Panics
    /// If `text` is not a topic name.
    pub fn from_static(text: &'static str) -> Self {
        Self::parse(ByteString::from_static(text)).expect("a constant that is a topic name")
    }

    /// The name of a PUBLISH whose topic is given by its alias alone.
    pub const fn empty() -> Self {
        Self(ByteString::new())
    }

    /// Whether only an alias names the topic.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as the shared text it is.
    pub fn as_byte_string(&self) -> &ByteString {
        &self.0
    }

    /// A copy in memory of its own: a name that was read from a packet keeps the packet's buffer
    /// alive for as long as it lives.
    pub fn copied(&self) -> Self {
        Self(copy_text(&self.0))
    }
}

/// A topic filter: what a subscription asks for, `$share/{group}/{filter}` included.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicFilter(ByteString);

impl TopicFilter {
    /// Checks `text` as a topic filter.
    pub fn parse(text: ByteString) -> Result<Self, FilterError> {
        if text.is_empty() {
            return Err(FilterError::Empty);
        }
        if text.len() > TEXT_BYTES_MAX {
            return Err(FilterError::TooLong);
        }
        if text.as_bytes().contains(&0) {
            return Err(FilterError::Nul);
        }
        let plain = match text.strip_prefix(SHARE_PREFIX) {
            Some(shared) => check_share(shared)?,
            None => &text,
        };
        check_levels(plain)?;
        Ok(Self(text))
    }

    /// The filter as text, as the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The filter as the shared text it is.
    pub fn as_byte_string(&self) -> &ByteString {
        &self.0
    }

    /// Group and filter of a shared subscription (section 4.8.2).
    pub fn share(&self) -> Option<(&str, &str)> {
        self.0.strip_prefix(SHARE_PREFIX)?.split_once('/')
    }

    /// Whether the filter can match more than one topic.
    pub fn has_wildcards(&self) -> bool {
        self.0
            .as_bytes()
            .iter()
            .any(|byte| matches!(byte, b'+' | b'#'))
    }

    /// Whether messages published to `topic` are for this filter; for a shared subscription, for
    /// the filter behind its group.
    pub fn matches(&self, topic: impl AsRef<str>) -> bool {
        matches(
            self.share().map_or(self.as_str(), |(_, filter)| filter),
            topic.as_ref(),
        )
    }

    /// A copy in memory of its own, as [`TopicName::copied`].
    pub fn copied(&self) -> Self {
        Self(copy_text(&self.0))
    }
}

/// Checks the group of a shared subscription; what follows it is left to be checked.
fn check_share(shared: &str) -> Result<&str, FilterError> {
    let (group, filter) = shared.split_once('/').unwrap_or((shared, ""));
    if group.is_empty() || group.contains(['+', '#']) {
        return Err(FilterError::ShareGroup);
    }
    if filter.is_empty() {
        return Err(FilterError::ShareFilter);
    }
    Ok(filter)
}

fn check_levels(filter: &str) -> Result<(), FilterError> {
    let mut levels = filter.split('/');
    while let Some(level) = levels.next() {
        if level.contains('#') && (level.len() > 1 || levels.next().is_some()) {
            return Err(FilterError::MultiLevelWildcard);
        }
        if level.contains('+') && level.len() > 1 {
            return Err(FilterError::SingleLevelWildcard);
        }
    }
    Ok(())
}

fn matches(filter: &str, topic: &str) -> bool {
    // [MQTT-4.7.2-1]: a wildcard in front does not reach topics that begin with '$'.
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let mut wanted = filter.split('/');
    let mut found = topic.split('/');
    loop {
        match (wanted.next(), found.next()) {
            // Also where the topic has ended: "sport/#" matches "sport" (section 4.7.1.2).
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(wanted), Some(found)) if wanted == found => {}
            _ => return false,
        }
    }
}

macro_rules! text_like {
    ($name:ident, $error:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self.as_str(), f)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl From<$name> for ByteString {
            fn from(text: $name) -> Self {
                text.0
            }
        }

        impl From<$name> for Bytes {
            fn from(text: $name) -> Self {
                text.0.into_bytes()
            }
        }

        impl std::str::FromStr for $name {
            type Err = $error;

            fn from_str(text: &str) -> Result<Self, $error> {
                Self::parse(text.into())
            }
        }
    };
}

text_like!(TopicName, TopicError);
text_like!(TopicFilter, FilterError);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "/", "a//b", " ", "$SYS/x", "é/日本", "$share/g/a"] {
            assert_eq!(TopicName::parse(good.into()).unwrap().as_str(), good);
        }
        let long = "x".repeat(65_536);
        for (bad, why) in [
            ("", TopicError::Empty),
            ("a\0b", TopicError::Nul),
            ("a/+", TopicError::Wildcard),
            ("#", TopicError::Wildcard),
            ("a+\0", TopicError::Nul),
            (&long, TopicError::TooLong),
        ] {
            assert_eq!(TopicName::parse(bad.into()), Err(why), "{bad:.20}");
        }
        assert!(TopicName::parse(long[1..].into()).is_ok());
        assert!(TopicName::empty().is_empty());
    }

    #[test]
    fn filters_are_checked() {
        for good in [
            "#",
            "+",
            "a/#",
            "+/+",
            "/+",
            "a//b",
            "a/+/b/#",
            "$share",
            "$shared/x",
            "$SYS/#",
        ] {
            assert_eq!(TopicFilter::parse(good.into()).unwrap().as_str(), good);
        }
        let long = "x".repeat(65_536);
        for (bad, why) in [
            ("", FilterError::Empty),
            (long.as_str(), FilterError::TooLong),
            ("a\0", FilterError::Nul),
            ("a/#/b", FilterError::MultiLevelWildcard),
            ("#/", FilterError::MultiLevelWildcard),
            ("a#", FilterError::MultiLevelWildcard),
            ("##", FilterError::MultiLevelWildcard),
            ("+#", FilterError::MultiLevelWildcard),
            ("a+", FilterError::SingleLevelWildcard),
            ("++", FilterError::SingleLevelWildcard),
            ("a/b+/c", FilterError::SingleLevelWildcard),
            ("$share/", FilterError::ShareGroup),
            ("$share//a", FilterError::ShareGroup),
            ("$share/+/a", FilterError::ShareGroup),
            ("$share/g#/a", FilterError::ShareGroup),
            ("$share/g", FilterError::ShareFilter),
            ("$share/g/", FilterError::ShareFilter),
            ("$share/g/a#", FilterError::MultiLevelWildcard),
        ] {
            assert_eq!(TopicFilter::parse(bad.into()), Err(why), "{bad:.20}");
        }
    }

    #[test]
    fn filters_match_as_the_specification_says() {
        for (filter, topic, expected) in [
            ("sport/tennis/player1/#", "sport/tennis/player1", true),
            (
                "sport/tennis/player1/#",
                "sport/tennis/player1/ranking",
                true,
            ),
            (
                "sport/tennis/player1/#",
                "sport/tennis/player1/score/wimbledon",
                true,
            ),
            ("sport/tennis/player1/#", "sport/tennis/player11", false),
            ("sport/#", "sport", true),
            ("sport/#", "sports", false),
            ("#", "a/b/c", true),
            ("#", "/", true),
            ("sport/tennis/+", "sport/tennis/player1", true),
            ("sport/tennis/+", "sport/tennis/player1/ranking", false),
            ("sport/+", "sport", false),
            ("sport/+", "sport/", true),
            ("+/+", "/finance", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("+/#", "a", true),
            ("+/+/#", "a", false),
            ("a/+/c", "a//c", true),
            ("#", "$SYS/monitor", false),
            ("+/monitor/Clients", "$SYS/monitor/Clients", false),
            ("$SYS/#", "$SYS/monitor", true),
            ("$SYS/monitor/+", "$SYS/monitor/Clients", true),
            ("ACCOUNTS", "Accounts", false),
            ("/finance", "finance", false),
            ("a", "a/", false),
            ("a/", "a", false),
            ("$share/g/a/+", "a/b", true),
            ("$share/g/a/+", "$share/g/a/b", false),
            ("$share/g/#", "$SYS/x", false),
        ] {
            let parsed = TopicFilter::parse(filter.into()).unwrap();
            assert_eq!(parsed.matches(topic), expected, "{filter} and {topic}");
        }
    }

    #[test]
    fn a_shared_subscription_is_taken_apart() {
        let filter = TopicFilter::parse("$share/g/a/+".into()).unwrap();
        assert_eq!(filter.share(), Some(("g", "a/+")));
        assert!(filter.has_wildcards());
        assert_eq!(TopicFilter::parse("$share".into()).unwrap().share(), None);
        assert!(!TopicFilter::parse("a/b".into()).unwrap().has_wildcards());
    }

    #[test]
    fn a_copy_lets_go_of_the_buffer() {
        let packet = Bytes::from(b"....a/b....".to_vec());
        let name = ByteString::try_from(packet.slice(4..7)).unwrap();
        let copy = TopicName::parse(name).unwrap().copied();
        assert_eq!(copy.as_str(), "a/b");
        assert!(packet.is_unique(), "the copy must not share the packet");
    }
}
