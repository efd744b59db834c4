//! The retained messages as the node keeps them for new subscriptions. The store has them durably.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use moorline_mqtt::{TopicFilter, TopicName};
use moorline_router::{Message, unix_ms};
use parking_lot::RwLock;

/// Retained messages by topic.
#[derive(Debug, Default)]
pub(crate) struct RetainedMessages {
    by_topic: RwLock<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    by_topic: BTreeMap<Box<str>, Arc<Message>>,
    bytes: usize,
}

/// A declared limit of retained messages is reached.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RetainedFull;

impl RetainedMessages {
    /// Replaces the message of its topic, within the limits.
    pub(crate) fn put(
        &self,
        message: Arc<Message>,
        messages_max: usize,
        bytes_max: usize,
    ) -> Result<(), RetainedFull> {
        let mut kept = self.by_topic.write();
        let topic = message.topic.as_str();
        let before = kept.by_topic.get(topic).map_or(0, |old| old.payload.len());
        let is_new = !kept.by_topic.contains_key(topic);
        let bytes = kept.bytes - before + message.payload.len();
        if bytes > bytes_max || (is_new && kept.by_topic.len() >= messages_max) {
            return Err(RetainedFull);
        }
        kept.bytes = bytes;
        kept.by_topic.insert(topic.into(), message);
        Ok(())
    }

    /// Forgets the message of `topic`; says whether there was one.
    pub(crate) fn remove(&self, topic: &TopicName) -> bool {
        let mut kept = self.by_topic.write();
        let removed = kept.by_topic.remove(topic.as_str());
        kept.bytes -= removed.as_ref().map_or(0, |message| message.payload.len());
        removed.is_some()
    }

    /// What a new subscription to `filter` gets, in the order of topics; nothing that expired.
    pub(crate) fn matching(&self, filter: &TopicFilter) -> Vec<Arc<Message>> {
        let kept = self.by_topic.read();
        if !filter.has_wildcards() {
            let found = kept.by_topic.get(filter.as_str());
            return found
                .into_iter()
                .filter(|message| is_alive(message))
                .cloned()
                .collect();
        }
        // Only topics that begin like the filter up to its first wildcard can match.
        let text = filter.as_str();
        let prefix = &text[..text.find(['+', '#']).unwrap_or(text.len())];
        // `a/#` matches `a` as well.
        let start = prefix.strip_suffix('/').unwrap_or(prefix);
        kept.by_topic
            .range::<str, _>((Bound::Included(start), Bound::Unbounded))
            .take_while(|(topic, _)| topic.starts_with(start))
            .filter(|(topic, message)| filter.matches(topic) && is_alive(message))
            .map(|(_, message)| Arc::clone(message))
            .collect()
    }
}

fn is_alive(message: &Message) -> bool {
    message.expires_at_ms.is_none_or(|at| at > unix_ms())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use moorline_mqtt::QoS;
    use moorline_router::{MessageId, Origin};

    fn message(topic: &str, expires_at_ms: Option<u64>) -> Arc<Message> {
        Arc::new(Message {
            id: MessageId::generate(),
            origin: Origin::Session,
            topic: TopicName::parse(topic.into()).unwrap(),
            qos: QoS::AtLeastOnce,
            retain: true,
            properties: None,
            payload: Bytes::from_static(b"1234"),
            accepted_at_ms: 0,
            expires_at_ms,
            collapse_key: None,
            share: None,
        })
    }

    fn topics(of: &RetainedMessages, filter: &str) -> Vec<String> {
        let filter = TopicFilter::parse(filter.into()).unwrap();
        of.matching(&filter)
            .iter()
            .map(|message| message.topic.as_str().to_owned())
            .collect()
    }

    #[test]
    fn filters_find_their_topics() {
        let retained = RetainedMessages::default();
        for topic in ["a", "a/b", "a/b/c", "ab", "b", "$x/a"] {
            retained.put(message(topic, None), 10, 100).unwrap();
        }
        assert_eq!(topics(&retained, "a/#"), ["a", "a/b", "a/b/c"]);
        assert_eq!(topics(&retained, "a/+"), ["a/b"]);
        assert_eq!(topics(&retained, "+/b/#"), ["a/b", "a/b/c"]);
        assert_eq!(topics(&retained, "#"), ["a", "a/b", "a/b/c", "ab", "b"]);
        assert_eq!(topics(&retained, "$x/+"), ["$x/a"]);
        assert_eq!(topics(&retained, "ab"), ["ab"]);
    }

    #[test]
    fn limits_and_expiry_hold() {
        let retained = RetainedMessages::default();
        retained.put(message("gone", Some(1)), 2, 100).unwrap();
        assert_eq!(topics(&retained, "gone"), [""; 0]);
        retained.put(message("a", None), 2, 100).unwrap();
        assert_eq!(retained.put(message("b", None), 2, 100), Err(RetainedFull));
        assert_eq!(retained.put(message("a", None), 2, 7), Err(RetainedFull));
        assert_eq!(retained.put(message("a", None), 2, 8), Ok(()));
        assert!(retained.remove(&TopicName::parse("gone".into()).unwrap()));
        assert_eq!(retained.put(message("b", None), 2, 8), Ok(()));
    }
}
