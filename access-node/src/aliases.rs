//! Topic aliases of one connection (MQTT 5.0 section 3.3.2.3.4): what the device's stand for, and
//! those that it is sent. Both end with the connection.
//!
//! A device that uses none costs nothing: the tables are made with the first.

use std::num::NonZeroU16;

use moorline_mqtt::{ReasonCode, TopicName};

/// Topics that a device has given an alias.
#[derive(Debug, Default)]
pub(crate) struct ReceivedAliases {
    /// By alias, from 1.
    topics: Vec<Option<TopicName>>,
}

impl ReceivedAliases {
    /// The topic of a PUBLISH that carries `alias`: its own, which the alias stands for from now on, or
    /// where that is empty the one that the alias stands for.
    ///
    /// # Errors
    /// The code of the DISCONNECT for an alias above `alias_max` ([MQTT-3.3.2-9]) or one that stands
    /// for nothing yet (section 3.3.4).
    pub(crate) fn resolve(
        &mut self,
        alias: NonZeroU16,
        topic: &TopicName,
        alias_max: u16,
    ) -> Result<TopicName, ReasonCode> {
        if alias.get() > alias_max {
            return Err(ReasonCode::TopicAliasInvalid);
        }
        let at = usize::from(alias.get()) - 1;
        if topic.is_empty() {
            let known = self.topics.get(at).and_then(Option::as_ref);
            return known.cloned().ok_or(ReasonCode::ProtocolError);
        }
        if self.topics.len() <= at {
            self.topics.resize(at + 1, None);
        }
        // It stays: it must not hold on to the buffer that it was read from.
        self.topics[at] = Some(topic.copied());
        Ok(topic.clone())
    }
}

/// Topics that have an alias towards the device: the first ones it is sent, up to its maximum.
#[derive(Debug)]
pub(crate) struct SentAliases {
    alias_max: u16,
    /// The alias is the place, from 1. Few enough to look through.
    topics: Vec<Box<[u8]>>,
}

/// How a topic is said.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct SentAlias {
    pub(crate) alias: NonZeroU16,
    /// The device does not know it yet: the topic is sent along.
    pub(crate) is_new: bool,
}

impl SentAliases {
    /// `None` where the device takes none, or none is to be sent.
    pub(crate) fn new(device_max: u16, own_max: u16) -> Option<Box<Self>> {
        let alias_max = device_max.min(own_max);
        (alias_max > 0).then(|| {
            Box::new(Self {
                alias_max,
                topics: Vec::new(),
            })
        })
    }

    /// The alias of `topic`; `None` once all are given away, or where it would save nothing.
    pub(crate) fn of(&self, topic: &[u8]) -> Option<SentAlias> {
        let known = self.topics.iter().position(|held| **held == *topic);
        let number = match known {
            Some(at) => at + 1,
            // The property takes three bytes of each packet.
            None if topic.len() <= 3 || self.topics.len() >= usize::from(self.alias_max) => {
                return None;
            }
            None => self.topics.len() + 1,
        };
        let alias = NonZeroU16::new(u16::try_from(number).ok()?)?;
        let is_new = known.is_none();
        Some(SentAlias { alias, is_new })
    }

    /// The device has been sent `topic` with the alias that [`SentAliases::of`] gave for it.
    pub(crate) fn introduced(&mut self, topic: &[u8]) {
        self.topics.push(topic.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(number: u16) -> NonZeroU16 {
        NonZeroU16::new(number).unwrap()
    }

    fn topic(text: &'static str) -> TopicName {
        TopicName::from_static(text)
    }

    #[test]
    fn a_received_alias_stands_for_the_last_topic_it_came_with() {
        let mut aliases = ReceivedAliases::default();
        let empty = TopicName::empty();
        let mut resolve = |number, topic: &TopicName| aliases.resolve(alias(number), topic, 2);
        assert_eq!(resolve(2, &empty), Err(ReasonCode::ProtocolError));
        assert_eq!(resolve(2, &topic("a")), Ok(topic("a")));
        assert_eq!(resolve(2, &empty), Ok(topic("a")));
        assert_eq!(resolve(1, &empty), Err(ReasonCode::ProtocolError));
        assert_eq!(resolve(2, &topic("b")), Ok(topic("b")));
        assert_eq!(resolve(2, &empty), Ok(topic("b")));
        assert_eq!(resolve(3, &topic("c")), Err(ReasonCode::TopicAliasInvalid));
    }

    #[test]
    fn aliases_are_given_to_the_first_topics_and_kept() {
        assert!(SentAliases::new(0, 16).is_none());
        assert!(SentAliases::new(16, 0).is_none());
        let mut aliases = SentAliases::new(2, 16).unwrap();
        assert_eq!(aliases.of(b"abc"), None);
        let mut say = |topic: &'static [u8]| {
            let said = aliases.of(topic);
            if said.as_ref().is_some_and(|said| said.is_new) {
                aliases.introduced(topic);
            }
            said.map(|said| (said.alias.get(), said.is_new))
        };
        assert_eq!(say(b"first/topic"), Some((1, true)));
        assert_eq!(say(b"second/topic"), Some((2, true)));
        assert_eq!(say(b"first/topic"), Some((1, false)));
        assert_eq!(say(b"third/topic"), None);
    }
}
