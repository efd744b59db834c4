//! The seam of the upstream bus: what devices sent, until a backend has it.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use moorline_mqtt::{PublishProperties, QoS, TopicName};

use crate::{ClientId, MessageId, Position, StoreError};

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
    /// of the call was stored.
    fn publish(
        &self,
        messages: Vec<(UpstreamMessage, Vec<QueueName>)>,
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

    /// Settles one delivery; durable on return.
    async fn settle(
        &self,
        queue: &QueueName,
        partition: u16,
        position: Position,
        settlement: Settlement,
    ) -> Result<(), StoreError>;

    /// Dead letters, oldest first, from after the message id `after`.
    async fn dead_letters(
        &self,
        after: Option<&MessageId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError>;

    /// Puts a dead letter at the end of its queue again; says whether there was one.
    async fn retry_dead_letter(&self, id: &MessageId) -> Result<bool, StoreError>;
}
