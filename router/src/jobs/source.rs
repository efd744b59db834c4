//! Which event comes of a message: what an operator writes, and what becomes of it.

use moorline_mqtt::TopicFilter;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{EventKind, EventName, JobEvent};
use crate::MessageId;

/// Where the type or the key of an event stands in a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventPart {
    /// It is always this.
    Text(String),
    /// In the level (of a topic) or word (of a routing key) of this number, from 1 on.
    Level(usize),
    /// In the payload, which is JSON: text or a number at this pointer (RFC 6901).
    Pointer(String),
}

impl EventPart {
    /// Reads `order.paid` (always this), `{2}` (the second level) or `/order/id` (a JSON pointer).
    ///
    /// # Errors
    /// Says what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expected = "must be text like \"order.paid\", a level like \"{2}\", or a JSON pointer like \"/order/id\"";
        if text.starts_with('/') {
            return Ok(Self::Pointer(text.to_owned()));
        }
        if let Some(level) = text
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
        {
            return match level.parse() {
                Ok(level @ 1..) => Ok(Self::Level(level)),
                _ => Err(format!("{text:?} {expected}; levels are counted from 1")),
            };
        }
        match text.is_empty() || text.contains(['{', '}']) {
            true => Err(format!("{text:?} {expected}")),
            false => Ok(Self::Text(text.to_owned())),
        }
    }

    fn of(&self, levels: &[&str], payload: &mut Payload<'_>) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Level(level) => levels.get(level - 1).map(|level| (*level).to_owned()),
            Self::Pointer(pointer) => match payload.json()?.pointer(pointer)? {
                Value::String(text) => Some(text.clone()),
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            },
        }
    }
}

/// A payload that is read once, if at all.
struct Payload<'a> {
    bytes: &'a [u8],
    json: Option<Option<Value>>,
}

impl Payload<'_> {
    fn json(&mut self) -> Option<&Value> {
        let bytes = self.bytes;
        let read = || serde_json::from_slice(bytes).ok();
        self.json.get_or_insert_with(read).as_ref()
    }
}

/// Which event comes of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventSource {
    kind: EventPart,
    key: EventPart,
}

impl EventSource {
    /// Reads the type and the key as an operator writes them, see [`EventPart::parse`].
    ///
    /// # Errors
    /// Says which is wrong and what would be right.
    pub fn parse(kind: &str, key: &str) -> Result<Self, String> {
        let kind_part = EventPart::parse(kind).map_err(|error| format!("type {error}"))?;
        if matches!(&kind_part, EventPart::Text(text) if text.contains(':')) {
            return Err("type must not contain a colon".to_owned());
        }
        Ok(Self {
            kind: kind_part,
            key: EventPart::parse(key).map_err(|error| format!("key {error}"))?,
        })
    }

    /// The event of a message with these levels (of its topic, or words of its routing key); `None` where it has no such type or key.
    pub fn name(&self, levels: &[&str], payload: &[u8]) -> Option<EventName> {
        let mut payload = Payload {
            bytes: payload,
            json: None,
        };
        let kind = self.kind.of(levels, &mut payload)?;
        let key = self.key.of(levels, &mut payload)?;
        EventName::new(&kind, &key).ok()
    }
}

/// An event that comes of the message `id`: however often that comes, it is one event.
pub fn event_of_message(name: EventName, id: &MessageId, at_ms: u64) -> JobEvent {
    let mut hash = Sha256::new();
    for part in [name.as_str(), id.as_str()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    let bytes: [u8; 16] = digest[..16].try_into().expect("SHA-256 has 32 bytes");
    let id = uuid::Uuid::new_v8(bytes).hyphenated().to_string();
    JobEvent {
        id: MessageId::parse(&id).expect("a UUID is 36 visible ASCII characters"),
        name,
        kind: EventKind::Happened,
        at_ms,
    }
}

/// The events of what devices publish: the first rule that matches a topic decides.
#[derive(Debug, Clone, Default)]
pub struct TopicEvents(Vec<(TopicFilter, EventSource)>);

impl TopicEvents {
    /// Rules in their order.
    pub fn new(rules: Vec<(TopicFilter, EventSource)>) -> Self {
        Self(rules)
    }

    /// The events of a message, one a rule that matches; a rule whose type or key the message lacks is left out.
    pub fn names(&self, topic: &str, payload: &[u8]) -> Vec<EventName> {
        let matching = self.0.iter().filter(|(filter, _)| filter.matches(topic));
        matching
            .filter_map(|(_, source)| {
                let levels: Vec<_> = topic.split('/').collect();
                source.name(&levels, payload)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(kind: &str, key: &str, topic: &str, payload: &str) -> Option<String> {
        let filter = TopicFilter::parse("up/#".into()).unwrap();
        let source = EventSource::parse(kind, key).unwrap();
        let rules = TopicEvents::new(vec![(filter, source)]);
        let mut names = rules.names(topic, payload.as_bytes());
        names.pop().map(|name| name.as_str().to_owned())
    }

    #[test]
    fn a_message_has_the_event_that_its_rule_says() {
        let found = |kind, key| {
            name(
                kind,
                key,
                "up/orders/123/paid",
                r#"{"order": {"id": 7, "kind": "x"}}"#,
            )
        };
        assert_eq!(
            found("order.paid", "{3}").as_deref(),
            Some("order.paid:123")
        );
        assert_eq!(found("{4}", "/order/id").as_deref(), Some("paid:7"));
        assert_eq!(found("/order/kind", "{3}").as_deref(), Some("x:123"));
        assert_eq!(found("a", "{9}"), None);
        assert_eq!(found("a", "/order"), None);
        assert_eq!(found("a", "/nothing"), None);
        assert_eq!(name("a", "/id", "up/x", "no json"), None);
        assert_eq!(name("a", "{1}", "down/x", ""), None);
    }

    #[test]
    fn what_an_operator_writes_wrongly_is_refused() {
        for (kind, key) in [
            ("", "k"),
            ("a:b", "k"),
            ("{0}", "k"),
            ("a", "{x}"),
            ("a", "{1}-{2}"),
            ("a", ""),
        ] {
            let error = EventSource::parse(kind, key).unwrap_err();
            assert!(
                error.starts_with("type ") || error.starts_with("key "),
                "{error}"
            );
        }
    }

    #[test]
    fn the_event_of_a_message_is_the_same_however_often_it_comes() {
        let name = EventName::parse("a:1").unwrap();
        let of = |id: &str| event_of_message(name.clone(), &MessageId::parse(id).unwrap(), 5).id;
        assert_eq!(of("m-1"), of("m-1"));
        assert_ne!(of("m-1"), of("m-2"));
    }
}
