//! The retained messages as the node keeps them for new subscriptions. The store has them durably.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use moorline_mqtt::{TopicFilter, TopicName};
use moorline_router::{Message, RetainedChanges, unix_ms};
use parking_lot::RwLock;

/// Topics that are looked at for one page: a filter may match few of very many, and whoever
/// publishes a retained message waits meanwhile.
const LOOKED_AT_MAX: usize = 1024;

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

/// What there may be of them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RetainedLimits {
    pub(crate) messages_max: usize,
    pub(crate) bytes_max: usize,
}

/// A part of what a new subscription gets.
#[derive(Debug)]
pub(crate) struct RetainedPage {
    /// In the order of topics; nothing that expired.
    pub(crate) messages: Vec<Arc<Message>>,
    /// The last topic that was looked at, if there may be more behind it.
    pub(crate) reached: Option<Arc<str>>,
}

impl RetainedMessages {
    /// Replaces the message of its topic, within the limits. `store` is called before anyone else can
    /// replace it, so that memory and store see the same order.
    pub(crate) fn put<T>(
        &self,
        message: Arc<Message>,
        limits: RetainedLimits,
        store: impl FnOnce() -> T,
    ) -> Result<T, RetainedFull> {
        let mut kept = self.by_topic.write();
        let topic = message.topic.as_str();
        let bytes = kept.with_room(topic, bytes_of(&message), limits)?;
        kept.bytes = bytes;
        kept.by_topic.insert(topic.into(), message);
        Ok(store())
    }

    /// Whether a message of about `payload_bytes` would find room now.
    pub(crate) fn has_room(
        &self,
        topic: &TopicName,
        payload_bytes: usize,
        limits: RetainedLimits,
    ) -> bool {
        let topic = topic.as_str();
        let kept = self.by_topic.read();
        kept.with_room(topic, topic.len() + payload_bytes, limits)
            .is_ok()
    }

    /// Forgets the message of `topic`; `store` is called as by [`RetainedMessages::put`].
    pub(crate) fn remove<T>(&self, topic: &TopicName, store: impl FnOnce() -> T) -> T {
        let mut kept = self.by_topic.write();
        kept.remove(topic.as_str());
        store()
    }

    /// Forgets what has expired; `store` is called for each topic.
    pub(crate) fn remove_expired(&self, mut store: impl FnMut(&TopicName)) {
        let is_over = |message: &Message| !is_alive(message);
        let any = self.by_topic.read().by_topic.values().any(|m| is_over(m));
        if !any {
            return;
        }
        let mut kept = self.by_topic.write();
        let over: Vec<Arc<Message>> = kept
            .by_topic
            .values()
            .filter(|message| is_over(message))
            .cloned()
            .collect();
        for message in over {
            kept.remove(message.topic.as_str());
            store(&message.topic);
        }
    }

    /// Takes over what other nodes have changed, whatever the limits: it was accepted within theirs. `is_newer` says of a
    /// topic that the node's own message is newer; says whether there were such.
    pub(crate) fn take_over(
        &self,
        changes: RetainedChanges,
        is_newer: impl Fn(&str) -> bool,
    ) -> bool {
        let mut kept = self.by_topic.write();
        let mut skipped = false;
        if changes.complete {
            let named: HashSet<&str> = changes.topics.iter().map(|(t, _)| t.as_str()).collect();
            let gone = kept
                .by_topic
                .keys()
                .filter(|topic| !named.contains(&***topic));
            let gone: Vec<Box<str>> = gone.cloned().collect();
            for topic in gone {
                if is_newer(&topic) {
                    skipped = true;
                } else {
                    kept.remove(&topic);
                }
            }
        }
        for (topic, message) in changes.topics {
            if is_newer(topic.as_str()) {
                skipped = true;
                continue;
            }
            kept.remove(topic.as_str());
            if let Some(message) = message.filter(is_alive) {
                kept.bytes += bytes_of(&message);
                kept.by_topic
                    .insert(topic.as_str().into(), Arc::new(message));
            }
        }
        skipped
    }

    /// What a new subscription to `filter` gets, from behind the topic `after`, at most `limit`.
    pub(crate) fn page(
        &self,
        filter: &TopicFilter,
        after: Option<&str>,
        limit: usize,
    ) -> RetainedPage {
        let kept = self.by_topic.read();
        let text = filter.as_str();
        // Only topics that begin like the filter up to its first wildcard can match.
        let wild_at = text.find(['+', '#']);
        let prefix = &text[..wild_at.unwrap_or(text.len())];
        // `a/#` matches `a` as well.
        let start = match wild_at {
            Some(_) => prefix.strip_suffix('/').unwrap_or(prefix),
            None => prefix,
        };
        let from = after.map_or(Bound::Included(start), Bound::Excluded);
        let candidates = kept
            .by_topic
            .range::<str, _>((from, Bound::Unbounded))
            .take_while(|(topic, _)| match wild_at {
                Some(_) => topic.starts_with(start),
                None => topic.as_ref() == text,
            });
        let mut messages = Vec::new();
        let mut last = None;
        for (looked_at, (topic, message)) in candidates.enumerate() {
            if messages.len() == limit || looked_at == LOOKED_AT_MAX {
                let reached = last.map(|topic: &str| topic.into());
                return RetainedPage { messages, reached };
            }
            if filter.matches(topic) && is_alive(message) {
                messages.push(Arc::clone(message));
            }
            last = Some(topic);
        }
        let reached = None;
        RetainedPage { messages, reached }
    }
}

impl Kept {
    /// The bytes there would be with a message of `bytes` at `topic`.
    fn with_room(
        &self,
        topic: &str,
        bytes: usize,
        limits: RetainedLimits,
    ) -> Result<usize, RetainedFull> {
        let before = self.by_topic.get(topic);
        let total = self.bytes - before.map_or(0, |old| bytes_of(old)) + bytes;
        let count = self.by_topic.len() + usize::from(before.is_none());
        if total > limits.bytes_max || count > limits.messages_max {
            return Err(RetainedFull);
        }
        Ok(total)
    }

    fn remove(&mut self, topic: &str) {
        if let Some(removed) = self.by_topic.remove(topic) {
            self.bytes -= bytes_of(&removed);
        }
    }
}

/// Topic, payload and properties.
fn bytes_of(message: &Message) -> usize {
    let properties = message.properties.as_ref().map_or(0, |held| {
        let users = held.user_properties.iter();
        let users: usize = users.map(|(name, value)| name.len() + value.len()).sum();
        users
            + held.content_type.as_ref().map_or(0, |text| text.len())
            + held.correlation_data.as_ref().map_or(0, |data| data.len())
            + held
                .response_topic
                .as_ref()
                .map_or(0, |topic| topic.as_str().len())
    });
    message.topic.as_str().len() + message.payload.len() + properties
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

    fn limits(messages_max: usize, bytes_max: usize) -> RetainedLimits {
        RetainedLimits {
            messages_max,
            bytes_max,
        }
    }

    fn put(
        into: &RetainedMessages,
        message: Arc<Message>,
        limits: RetainedLimits,
    ) -> Result<(), RetainedFull> {
        into.put(message, limits, || ())
    }

    fn topics(of: &RetainedMessages, filter: &str, limit: usize) -> Vec<String> {
        let filter = TopicFilter::parse(filter.into()).unwrap();
        let mut found: Vec<String> = Vec::new();
        let mut after: Option<Arc<str>> = None;
        loop {
            let page = of.page(&filter, after.as_deref(), limit);
            found.extend(page.messages.iter().map(|m| m.topic.as_str().to_owned()));
            match page.reached {
                Some(reached) => after = Some(reached),
                None => return found,
            }
        }
    }

    #[test]
    fn filters_find_their_topics_page_by_page() {
        let retained = RetainedMessages::default();
        for topic in ["a", "a/b", "a/b/c", "ab", "b", "$x/a"] {
            put(&retained, message(topic, None), limits(10, 100)).unwrap();
        }
        for limit in [1, 2, 3, 100] {
            let topics = |filter| topics(&retained, filter, limit);
            assert_eq!(topics("a/#"), ["a", "a/b", "a/b/c"]);
            assert_eq!(topics("a/+"), ["a/b"]);
            assert_eq!(topics("+/b/#"), ["a/b", "a/b/c"]);
            assert_eq!(topics("#"), ["a", "a/b", "a/b/c", "ab", "b"]);
            assert_eq!(topics("$x/+"), ["$x/a"]);
            assert_eq!(topics("ab"), ["ab"]);
        }
    }

    #[test]
    fn a_page_looks_at_so_many_topics_whatever_matches() {
        let retained = RetainedMessages::default();
        for n in 0..2 * LOOKED_AT_MAX {
            let topic = format!("many/{n:05}/state");
            put(&retained, message(&topic, None), limits(10_000, 1 << 20)).unwrap();
        }
        put(&retained, message("z/rare", None), limits(10_000, 1 << 20)).unwrap();
        let filter = TopicFilter::parse("+/rare".into()).unwrap();
        let first = retained.page(&filter, None, 10);
        assert!(first.messages.is_empty());
        assert_eq!(first.reached.as_deref(), Some("many/01023/state"));
        assert_eq!(topics(&retained, "+/rare", 10), ["z/rare"]);
        let all = topics(&retained, "#", 5_000);
        assert_eq!(all.len(), 2 * LOOKED_AT_MAX + 1);
    }

    #[test]
    fn limits_and_expiry_hold() {
        let retained = RetainedMessages::default();
        let name = |text: &'static str| TopicName::from_static(text);
        // Four bytes of payload each, and the topic.
        put(&retained, message("gone", Some(1)), limits(2, 100)).unwrap();
        assert_eq!(topics(&retained, "gone", 9), [""; 0]);
        put(&retained, message("a", None), limits(2, 100)).unwrap();
        let put = |topic, messages_max, bytes_max| {
            let limits = limits(messages_max, bytes_max);
            let has_room = retained.has_room(&name(topic), 4, limits);
            let kept = put(&retained, message(topic, None), limits);
            assert_eq!(has_room, kept.is_ok());
            kept
        };
        assert_eq!(put("b", 2, 100), Err(RetainedFull));
        assert_eq!(put("a", 2, 12), Err(RetainedFull));
        assert_eq!(put("a", 2, 13), Ok(()));
        let mut swept = Vec::new();
        retained.remove_expired(|topic| swept.push(topic.as_str().to_owned()));
        assert_eq!(swept, ["gone"]);
        assert_eq!(put("b", 2, 10), Ok(()));
        retained.remove(&name("b"), || ());
        assert_eq!(put("c", 2, 10), Ok(()));
    }

    #[test]
    fn what_others_changed_is_taken_over_but_not_over_what_is_newer_here() {
        let retained = RetainedMessages::default();
        for topic in ["a", "b", "own"] {
            put(&retained, message(topic, None), limits(10, 1000)).unwrap();
        }
        let changes = |complete, topics: &[(&'static str, bool)]| RetainedChanges {
            version: moorline_router::RetainedVersion::default(),
            complete,
            topics: topics
                .iter()
                .map(|(topic, there)| {
                    let kept = there.then(|| Message::clone(&message(topic, None)));
                    (TopicName::from_static(topic), kept)
                })
                .collect(),
        };
        let is_own = |topic: &str| topic == "own";
        assert!(!retained.take_over(changes(false, &[("b", false), ("c", true)]), is_own));
        assert_eq!(topics(&retained, "#", 9), ["a", "c", "own"]);
        assert!(retained.take_over(changes(false, &[("own", false)]), is_own));
        assert!(retained.take_over(changes(true, &[("d", true)]), is_own));
        assert_eq!(topics(&retained, "#", 9), ["d", "own"]);
        assert!(!retained.take_over(changes(true, &[]), |_| false));
        assert_eq!(topics(&retained, "#", 9), [""; 0]);
        // Every byte was given back.
        put(&retained, message("a", None), limits(1, 5)).unwrap();
    }
}
