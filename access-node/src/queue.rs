//! Messages that wait in memory for a slow device whose session ends with its connection.

use std::collections::VecDeque;
use std::sync::Arc;

use moorline_mqtt::EncodedPublish;

use crate::config::{Config, QueueOverflow};
use crate::redispatch::SharedMessage;

/// A message that waits.
#[derive(Debug)]
pub(crate) struct Queued {
    pub(crate) publish: EncodedPublish,
    /// Unix milliseconds.
    pub(crate) expires_at_ms: Option<u64>,
    /// As another member of the shared subscription would get it.
    pub(crate) shared: Option<Arc<SharedMessage>>,
}

/// In the order in which they are sent.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    messages: VecDeque<Queued>,
    bytes: usize,
    /// Something was dropped since the queue was last empty.
    overflowing: bool,
}

/// What a full queue dropped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Dropped {
    pub(crate) messages: u64,
    /// The message that was to be added is among them.
    pub(crate) new_one: bool,
    /// Nothing was dropped since the queue was last empty: worth telling someone.
    pub(crate) is_first: bool,
}

impl Queue {
    pub(crate) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(crate) fn holds_shared(&self) -> bool {
        self.messages.iter().any(|queued| queued.shared.is_some())
    }

    /// Whether the next message may push one out.
    pub(crate) fn is_full(&self, limits: &Config) -> bool {
        self.messages.len() >= limits.queued_messages_max || self.bytes >= limits.queued_bytes_max
    }

    /// Adds `message` within the limits; says what the declared policy dropped for it.
    pub(crate) fn push(&mut self, message: Queued, limits: &Config) -> Dropped {
        let mut dropped = Dropped::default();
        let length = message.publish.len();
        let never_fits = length > limits.queued_bytes_max || limits.queued_messages_max == 0;
        let keeps_old = limits.queued_overflow == QueueOverflow::DropNew;
        while never_fits
            || self.messages.len() >= limits.queued_messages_max
            || self.bytes + length > limits.queued_bytes_max
        {
            dropped.messages += 1;
            if never_fits || keeps_old || self.pop().is_none() {
                dropped.new_one = true;
                break;
            }
        }
        if !dropped.new_one {
            self.bytes += length;
            self.messages.push_back(message);
        }
        if dropped.messages > 0 {
            dropped.is_first = !std::mem::replace(&mut self.overflowing, true);
        }
        dropped
    }

    pub(crate) fn pop(&mut self) -> Option<Queued> {
        let next = self.messages.pop_front()?;
        self.bytes -= next.publish.len();
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use moorline_mqtt::{Publish, QoS, TopicName, Version};

    fn message(payload: &'static str) -> Queued {
        let publish = Publish {
            dup: false,
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: TopicName::from_static("t"),
            packet_id: None,
            properties: None,
            payload: Bytes::from_static(payload.as_bytes()),
        };
        Queued {
            publish: EncodedPublish::new(Version::V3_1_1, &publish, QoS::AtLeastOnce, false),
            expires_at_ms: None,
            shared: None,
        }
    }

    fn limits(queued_messages_max: usize, queued_overflow: QueueOverflow) -> Config {
        Config {
            queued_messages_max,
            // A message takes seven bytes beside its payload.
            queued_bytes_max: 100,
            queued_overflow,
            ..Config::default()
        }
    }

    fn lengths(queue: &mut Queue) -> Vec<usize> {
        std::iter::from_fn(|| queue.pop())
            .map(|queued| queued.publish.len() - 7)
            .collect()
    }

    #[test]
    fn a_full_queue_drops_what_its_policy_says() {
        for (policy, kept) in [
            (QueueOverflow::DropOldest, vec![2, 3]),
            (QueueOverflow::DropNew, vec![1, 2]),
        ] {
            let limits = limits(2, policy);
            let mut queue = Queue::default();
            assert_eq!(queue.push(message("1"), &limits), Dropped::default());
            assert_eq!(queue.push(message("22"), &limits), Dropped::default());
            let dropped = queue.push(message("333"), &limits);
            let new_one = policy == QueueOverflow::DropNew;
            let expected = Dropped {
                messages: 1,
                new_one,
                is_first: true,
            };
            assert_eq!(dropped, expected);
            assert_eq!(lengths(&mut queue), kept, "{policy:?}");
        }
    }

    #[test]
    fn bytes_are_limited_too_and_what_never_fits_drops_nothing_else() {
        let limits = limits(100, QueueOverflow::DropOldest);
        let mut queue = Queue::default();
        let (forty, ninety_five) = (
            "0123456789012345678901234567890123456789",
            "01234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234",
        );
        for _ in 0..2 {
            assert_eq!(queue.push(message(forty), &limits), Dropped::default());
        }
        let too_large = queue.push(message(ninety_five), &limits);
        assert!(too_large.new_one && too_large.messages == 1 && too_large.is_first);
        let dropped = queue.push(message(forty), &limits);
        assert!(!dropped.new_one && dropped.messages == 1 && !dropped.is_first);
        assert_eq!(lengths(&mut queue), [40, 40]);
    }
}
