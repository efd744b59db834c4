//! The one way out: ordered, confirmed, bounded.
//!
//! A publish takes its place when it is called and resolves when the broker has confirmed it. Publishes of one sender go
//! through one *lane* (a connection with one channel) in the order of the calls, many of them unconfirmed at a time. When
//! the connection is lost everything unconfirmed goes out again, in order, before anything new: the broker may have a message
//! twice, under the same message id, but never in another order of first occurrence.
//!
//! While the broker is away or blocks publishers (memory or disk alarm), calls wait; nothing is dropped. What waits is bounded
//! in bytes and in number.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::oneshot;

use super::lane::Lane;
use super::metrics::LaneMetrics;
use super::window::Item;
use super::{Config, Link, Topology};
use crate::{Fence, MessageId, StoreError};

/// All properties of a message go in one frame, of at most 128 KiB.
const HEADER_BYTES_MAX: usize = 96 << 10;

/// What is published.
#[derive(Debug, Clone)]
pub struct Publishing {
    /// Where to; empty for the default exchange, where the routing key names a queue.
    pub exchange: ShortString,
    /// At most 255 bytes.
    pub routing_key: ShortString,
    /// Travels as the `message-id`.
    pub id: MessageId,
    /// Further properties; `message-id` and delivery mode are set from the other fields.
    pub properties: BasicProperties,
    /// Survives a restart of the broker, in a durable queue.
    pub persistent: bool,
    /// Fails with [`StoreError::Unavailable`] where no queue takes it. Otherwise that is no error.
    pub mandatory: bool,
    /// The payload.
    pub body: Bytes,
}

impl Publishing {
    /// About the memory it takes, and the bytes that are sent.
    fn cost(&self, headers: usize) -> usize {
        self.body.len() + headers + 512
    }

    fn header_bytes(&self) -> usize {
        let headers = self.properties.headers().as_ref();
        headers.map_or(0, table_bytes)
    }
}

fn table_bytes(table: &FieldTable) -> usize {
    let entries = table.inner().iter();
    entries
        .map(|(name, value)| name.as_str().len() + 1 + value_bytes(value))
        .sum()
}

fn value_bytes(value: &AMQPValue) -> usize {
    5 + match value {
        AMQPValue::LongString(text) => text.len(),
        AMQPValue::ByteArray(bytes) => bytes.len(),
        AMQPValue::FieldArray(values) => values.as_slice().iter().map(value_bytes).sum(),
        AMQPValue::FieldTable(table) => table_bytes(table),
        _ => 8,
    }
}

/// The bounds of what waits, shared by all lanes.
pub(super) struct Budget {
    bytes: AtomicUsize,
    messages: AtomicUsize,
    bytes_max: usize,
    messages_max: usize,
}

/// Room that is taken until it is dropped.
pub(super) struct Room {
    budget: Arc<Budget>,
    cost: usize,
}

impl Budget {
    fn new(bytes_max: usize, messages_max: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: AtomicUsize::new(0),
            messages: AtomicUsize::new(0),
            bytes_max,
            messages_max,
        })
    }

    /// A message that is larger than everything may come when there is nothing else.
    fn take(self: &Arc<Self>, cost: usize) -> Result<Room, StoreError> {
        let before = self.bytes.fetch_add(cost, Ordering::Relaxed);
        let messages = self.messages.fetch_add(1, Ordering::Relaxed);
        let room = Room {
            budget: Arc::clone(self),
            cost,
        };
        if messages >= self.messages_max || (before > 0 && before + cost > self.bytes_max) {
            return Err(StoreError::Unavailable(
                "overloaded: too much waits to be published".into(),
            ));
        }
        Ok(room)
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.budget.bytes.fetch_sub(self.cost, Ordering::Relaxed);
        self.budget.messages.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Publishes to RabbitMQ. Ends when it is dropped, after what waits then has been confirmed.
pub struct Publisher {
    lanes: Vec<Arc<Lane>>,
    budget: Arc<Budget>,
}

impl Publisher {
    /// A publisher of `lanes` lanes that makes sure of `topology` first. `name` is what an operator of the broker sees. It works on
    /// the runtime that this is called in.
    pub fn new(config: &Config, name: &str, lanes: usize, topology: &Arc<Topology>) -> Arc<Self> {
        let started = (0..lanes.max(1)).map(|number| {
            Lane::start(
                Link::new(config, name),
                Arc::clone(topology),
                config.publish_window,
                LaneMetrics::new(name, number),
            )
        });
        Arc::new(Self {
            lanes: started.collect(),
            budget: Budget::new(config.publish_bytes_max, config.publish_messages_max),
        })
    }

    /// Publishes behind everything that the same `sender` (see [`sender_hash`]) published before, and resolves when the broker has
    /// it durably. Takes its place at once; the message goes out whether the future is awaited or not.
    ///
    /// Behind a `fence` nothing goes out after a refusal. Where the sender is not told of a refusal by itself
    /// ([`Fence::new`] with `false`) its messages go out one by one, because what went out behind a message that is then refused
    /// could not be taken back.
    ///
    /// [`StoreError::Full`]: a queue is at its limit, or the properties are too large for it. [`StoreError::Unavailable`]: too much waits, no queue takes a mandatory
    /// message, or the broker refuses the message itself.
    pub fn publish(
        &self,
        sender: u64,
        publishing: Publishing,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let passed = fence.map_or(Ok(()), Fence::check);
        let headers = publishing.header_bytes();
        let fits = || {
            if headers > HEADER_BYTES_MAX {
                return Err(StoreError::Full(format!(
                    "properties of {headers} bytes are more than RabbitMQ takes"
                )));
            }
            self.budget.take(publishing.cost(headers))
        };
        let room = match passed.and_then(|()| fits()) {
            Ok(room) => room,
            Err(error) => {
                if let Some(fence) = fence {
                    fence.refused(&error);
                }
                return async { Err(error) }.boxed();
            }
        };
        let (answer, answered) = oneshot::channel();
        let count = self.lanes.len() as u64;
        let lane = usize::try_from(sender % count).expect("below the number of lanes");
        self.lanes[lane].push(Item {
            sender,
            publishing,
            fence: fence.cloned(),
            answer,
            _room: room,
        });
        async move {
            answered.await.unwrap_or_else(|_| {
                Err(StoreError::Unavailable(
                    "the publisher ended before it could answer".into(),
                ))
            })
        }
        .boxed()
    }

    /// Bytes and messages that wait to be published or confirmed.
    pub fn waiting(&self) -> (usize, usize) {
        let bytes = self.budget.bytes.load(Ordering::Relaxed);
        (bytes, self.budget.messages.load(Ordering::Relaxed))
    }

    /// Whether every lane has a connection, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.lanes.iter().all(|lane| lane.is_connected())
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.close();
        }
    }
}

/// The `sender` of a client, the same in every process.
pub fn sender_hash(client: &str) -> u64 {
    // FNV-1a: short, stable, and spread well enough for a few lanes.
    client.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_bounded_in_bytes_and_in_number() {
        let budget = Budget::new(1_000, 3);
        let large = budget.take(5_000).unwrap();
        assert!(budget.take(1).is_err(), "beyond the bytes");
        drop(large);
        let rooms: Vec<_> = (0..3).map(|_| budget.take(10).unwrap()).collect();
        assert!(budget.take(10).is_err(), "beyond the number");
        drop(rooms);
        assert_eq!(budget.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(budget.messages.load(Ordering::Relaxed), 0);
    }
}
