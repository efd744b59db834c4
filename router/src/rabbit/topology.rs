//! What must exist on the broker before anything is published.
//!
//! A list that only grows. Every lane of a publisher declares it on each new connection, and what was added since
//! before it publishes on: a broker that lost everything gets it back, and nothing has to be declared ahead of time.

use std::sync::Arc;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};
use parking_lot::Mutex;

use super::link::{Link, answered};
use crate::StoreError;

/// One exchange, queue or binding; all of them durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Declaration {
    /// A durable exchange.
    Exchange {
        /// Its name.
        name: ShortString,
        /// Topic, direct, fanout.
        kind: ExchangeKind,
    },
    /// A durable queue.
    Queue {
        /// Its name.
        name: ShortString,
        /// `x-…`
        arguments: FieldTable,
    },
    /// A binding of a queue.
    Binding {
        /// The queue.
        queue: ShortString,
        /// The exchange.
        exchange: ShortString,
        /// The routing key.
        routing_key: ShortString,
    },
}

/// The list.
#[derive(Default)]
pub struct Topology {
    declarations: Mutex<Vec<Declaration>>,
}

impl Topology {
    /// An empty list.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds what is not yet in the list.
    pub fn add(&self, declarations: impl IntoIterator<Item = Declaration>) {
        let mut known = self.declarations.lock();
        for declaration in declarations {
            if !known.contains(&declaration) {
                known.push(declaration);
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        self.declarations.lock().len()
    }

    fn since(&self, declared: usize) -> Vec<Declaration> {
        let known = self.declarations.lock();
        known.get(declared..).unwrap_or_default().to_vec()
    }

    /// Declares what comes after the first `declared`; says how many there are then.
    ///
    /// # Errors
    /// When the broker is out of reach or refuses one.
    pub async fn declare(&self, link: &Link, declared: usize) -> Result<usize, StoreError> {
        let new = self.since(declared);
        if new.is_empty() {
            return Ok(declared);
        }
        Self::ensure(link, &new).await?;
        Ok(declared + new.len())
    }
}

impl Topology {
    /// Declares these, whether they are in a list or not.
    ///
    /// # Errors
    /// When the broker is out of reach or refuses one.
    pub async fn ensure(link: &Link, declarations: &[Declaration]) -> Result<(), StoreError> {
        // A refusal closes the channel, so that it is one of its own.
        let mut channel = link.channel().await?;
        for declaration in declarations {
            if let Err(error) = declare(&channel, declaration).await {
                channel = link.channel().await?;
                accept_existing(&channel, declaration, error).await?;
            }
        }
        // It closes by itself; nobody needs to wait for that.
        drop(channel);
        Ok(())
    }
}

async fn declare(channel: &Channel, declaration: &Declaration) -> Result<(), StoreError> {
    match declaration.clone() {
        Declaration::Exchange { name, kind } => {
            let options = ExchangeDeclareOptions {
                durable: true,
                ..ExchangeDeclareOptions::default()
            };
            answered(channel.exchange_declare(name, kind, options, FieldTable::default())).await
        }
        Declaration::Queue { name, arguments } => {
            let options = QueueDeclareOptions {
                durable: true,
                ..QueueDeclareOptions::default()
            };
            answered(channel.queue_declare(name, options, arguments)).await?;
            Ok(())
        }
        Declaration::Binding {
            queue,
            exchange,
            routing_key,
        } => {
            let options = QueueBindOptions::default();
            let bound =
                channel.queue_bind(queue, exchange, routing_key, options, FieldTable::default());
            answered(bound).await
        }
    }
}

/// A queue that exists with other arguments (limits that were configured since) is used as it is.
async fn accept_existing(
    channel: &Channel,
    declaration: &Declaration,
    error: StoreError,
) -> Result<(), StoreError> {
    let Declaration::Queue { name, .. } = declaration else {
        return Err(error);
    };
    let options = QueueDeclareOptions {
        passive: true,
        ..QueueDeclareOptions::default()
    };
    let existing = channel.queue_declare(name.clone(), options, FieldTable::default());
    if answered(existing).await.is_err() {
        return Err(error);
    }
    tracing::warn!(queue = %name, %error, "a queue keeps the settings that it was made with");
    Ok(())
}

/// `x-…` arguments of a queue.
#[derive(Debug, Clone, Default)]
pub struct Arguments(FieldTable);

impl Arguments {
    /// Those of a quorum queue that refuses what is beyond its limits and loses nothing by itself.
    pub fn quorum(messages_max: u32, bytes_max: u64) -> Self {
        let bytes_max = i64::try_from(bytes_max).unwrap_or(i64::MAX);
        Self::default()
            .with("x-queue-type", "quorum")
            .with("x-overflow", "reject-publish")
            .with("x-max-length", i64::from(messages_max))
            .with("x-max-length-bytes", bytes_max)
            // Newer brokers give up a message after 20 deliveries; whoever consumes here decides that itself.
            .with("x-delivery-limit", 1_000_000_000_i64)
    }

    /// Adds one.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<ArgumentValue>) -> Self {
        self.0.insert(name.into(), value.into().0);
        self
    }

    /// The queue with these arguments.
    pub fn of_queue(self, name: ShortString) -> Declaration {
        Declaration::Queue {
            name,
            arguments: self.0,
        }
    }
}

/// The value of an argument: text, a number or a flag.
pub struct ArgumentValue(AMQPValue);

impl From<&str> for ArgumentValue {
    fn from(text: &str) -> Self {
        Self(AMQPValue::LongString(text.into()))
    }
}

impl From<i64> for ArgumentValue {
    fn from(number: i64) -> Self {
        Self(AMQPValue::LongLongInt(number))
    }
}

impl From<bool> for ArgumentValue {
    fn from(flag: bool) -> Self {
        Self(AMQPValue::Boolean(flag))
    }
}
