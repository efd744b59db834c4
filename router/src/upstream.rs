//! The seam of the upstream bus: what devices sent, until a backend has it.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use moorline_mqtt::{ByteString, PublishProperties, QoS, TopicFilter, TopicName};

use crate::{ClientId, Fence, MessageId, Position, StoreError};

/// A queue of the bus: one a rule, and [`QueueName::DEFAULT`] where no rule is configured.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueName(Arc<str>);

impl QueueName {
    /// The name of the queue that is read by `GET /v1/upstream`.
    pub const DEFAULT: &'static str = "default";

    /// The queue called `name`.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for QueueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a device sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamMessage {
    /// Travels end to end.
    pub id: MessageId,
    /// Who sent it.
    pub client: ClientId,
    /// The topic it was published to.
    pub topic: TopicName,
    /// The QoS it was published with.
    pub qos: QoS,
    /// MQTT 5.0 properties.
    pub properties: Option<Box<PublishProperties>>,
    /// The payload.
    pub payload: Bytes,
    /// When it was received, Unix milliseconds.
    pub received_at_ms: u64,
}

/// A message on its way to a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamDelivery {
    /// Its place in the partition (or, for a named consumer, in the default queue).
    pub position: Position,
    /// The message.
    pub message: UpstreamMessage,
}

/// What a worker made of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// The backend has it.
    Done,
    /// It will not be tried again by itself.
    DeadLetter {
        /// Why, for a person.
        reason: String,
        /// How often it was tried.
        attempts: u32,
    },
}

/// A message that could not be handed to its backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where it failed.
    pub queue: QueueName,
    /// The message.
    pub message: UpstreamMessage,
    /// Why.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u32,
    /// Unix milliseconds.
    pub at_ms: u64,
}

/// The bus.
///
/// One queue has a fixed number of partitions; a device's messages go to one of them, by a hash of
/// its client id, in the order in which they were published.
#[async_trait]
pub trait UpstreamBus: Send + Sync {
    /// Hands each message to each of its queues; resolves when all of them are durable. Takes its
    /// place in the order at once. [`StoreError::Full`] when a queue is at its limit: then nothing
    /// of the call was stored, or, where each queue is a store of its own, not in that queue.
    fn publish(
        &self,
        messages: Vec<(UpstreamMessage, Vec<QueueName>)>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        self.publish_behind(messages, None)
    }

    /// As [`UpstreamBus::publish`], refused once another write behind the same fence was.
    fn publish_behind(
        &self,
        messages: Vec<(UpstreamMessage, Vec<QueueName>)>,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// How many partitions `queue` has.
    fn partitions(&self, queue: &QueueName) -> u16;

    /// Deliveries of a partition after `after`, at most `limit`; waits until there is one. Those that are
    /// not settled are read again by whoever starts from the beginning.
    async fn fetch(
        &self,
        queue: &QueueName,
        partition: u16,
        after: Position,
        limit: usize,
    ) -> Result<Vec<UpstreamDelivery>, StoreError>;

    /// Settles one delivery; durable on return, but for a bus that may deliver it once more after it lost its connection.
    /// A position that is not held any more is no error. A dead letter is listed soon after.
    async fn settle(
        &self,
        queue: &QueueName,
        partition: u16,
        position: Position,
        settlement: Settlement,
    ) -> Result<(), StoreError>;

    /// Gives back what was fetched of a partition and is not settled, so that nothing is held for long while its backend
    /// fails. The next fetch begins from the beginning.
    async fn park(&self, _queue: &QueueName, _partition: u16) {}

    /// Whether the partition should go to another worker: then this one settles what it is at and fetches again.
    fn is_wanted_elsewhere(&self, _queue: &QueueName, _partition: u16) -> bool {
        false
    }

    /// Dead letters, oldest first, from after the newest one of the message `after`. About `limit`: a
    /// page goes on to the newest letter of the message that it ends with.
    async fn dead_letters(
        &self,
        after: Option<&MessageId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError>;

    /// Puts a dead letter at the end of its queue again; says whether there was one.
    async fn retry_dead_letter(&self, id: &MessageId) -> Result<bool, StoreError>;
}

/// Which queues take what is published to a topic: the upstream rules without what their workers do.
#[derive(Debug, Clone)]
pub struct UpstreamRoutes {
    upstream: TopicFilter,
    rules: Vec<(TopicFilter, QueueName)>,
}

impl UpstreamRoutes {
    /// What goes upstream where no rule says otherwise.
    pub const DEFAULT_FILTER: &'static str = "up/#";

    /// Each rule takes what its filter matches; what only `upstream` matches goes to
    /// [`QueueName::DEFAULT`], so that nothing is lost for want of a rule.
    pub fn new(upstream: TopicFilter, rules: Vec<(TopicFilter, QueueName)>) -> Self {
        Self { upstream, rules }
    }

    /// The queues of a message to `topic`, in the order of the rules; none where it is not upstream.
    pub fn queues_for(&self, topic: &TopicName) -> Vec<QueueName> {
        let topic = topic.as_str();
        let matching = self
            .rules
            .iter()
            .filter(|(filter, _)| filter.matches(topic));
        let mut queues: Vec<_> = matching.map(|(_, queue)| queue.clone()).collect();
        if queues.is_empty() && self.upstream.matches(topic) {
            queues.push(QueueName::new(QueueName::DEFAULT));
        }
        queues
    }
}

impl Default for UpstreamRoutes {
    fn default() -> Self {
        let filter = TopicFilter::parse(ByteString::from_static(Self::DEFAULT_FILTER));
        Self::new(filter.expect("the filter is a valid constant"), Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queues(routes: &UpstreamRoutes, topic: &'static str) -> Vec<String> {
        let topic = TopicName::parse(topic.into()).unwrap();
        routes
            .queues_for(&topic)
            .iter()
            .map(QueueName::to_string)
            .collect()
    }

    #[test]
    fn without_rules_everything_upstream_waits_in_the_default_queue() {
        let routes = UpstreamRoutes::default();
        assert_eq!(queues(&routes, "up/a/b"), ["default"]);
        assert_eq!(queues(&routes, "up"), ["default"]);
        assert!(queues(&routes, "upper").is_empty());
        assert!(queues(&routes, "a/up/b").is_empty());
    }

    #[test]
    fn a_message_goes_to_every_rule_that_matches_and_else_to_the_default_queue() {
        let rule = |filter: &'static str, name| {
            (
                TopicFilter::parse(filter.into()).unwrap(),
                QueueName::new(name),
            )
        };
        let upstream = TopicFilter::parse("up/#".into()).unwrap();
        let rules = vec![
            rule("up/orders/#", "orders"),
            rule("up/+/new", "new"),
            rule("t/#", "t"),
        ];
        let routes = UpstreamRoutes::new(upstream, rules);
        assert_eq!(queues(&routes, "up/orders/new"), ["orders", "new"]);
        assert_eq!(queues(&routes, "up/orders/7"), ["orders"]);
        assert_eq!(queues(&routes, "up/else"), ["default"]);
        assert_eq!(queues(&routes, "t/1"), ["t"]);
        assert!(queues(&routes, "other").is_empty());
    }
}
