//! What this process has taken from one queue and not settled.
//!
//! A position is the generation of the channel and a count on it. Whatever ends the channel puts back everything that is not
//! settled, in order; on the next one it comes again, under new positions.
//!
//! A consumer is never cancelled by itself. On a queue with a single active consumer that would let the next one take what comes later
//! while this one still has what comes before: only the end of the channel passes on both at once.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use ::metrics::Counter;
use futures_util::StreamExt;
use lapin::message::{Delivery, DeliveryResult};
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Acker, Channel, Consumer};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::envelope::message_of;
use super::link::{Link, answered, unavailable};
use super::metrics::{self, HeldPartition};
use crate::{Position, StoreError, UpstreamDelivery, UpstreamMessage, unix_ms};

const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// A page of large messages is cut short, but never empty.
const PAGE_BYTES_MAX: usize = 4 << 20;

/// A consumer that ends without being cancelled: with its channel.
pub(super) struct Uncancelled(pub(super) Consumer);

impl Drop for Uncancelled {
    fn drop(&mut self) {
        // The client library cancels a consumer that nobody reads, but not one that hands out its deliveries itself.
        self.0.set_delegate(|_: DeliveryResult| async {});
    }
}

#[derive(Clone)]
struct Held {
    message: UpstreamMessage,
    acker: Acker,
}

struct Open {
    channel: Channel,
    generation: u64,
    last: u64,
    held: BTreeMap<u64, Held>,
    has_ended: bool,
    pump: Option<JoinHandle<()>>,
    taken: Counter,
    _counted: HeldPartition,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(pump) = &self.pump {
            pump.abort();
        }
    }
}

#[derive(Default)]
struct State {
    open: Option<Open>,
    generation: u64,
}

/// One queue.
#[derive(Default)]
pub(super) struct Partition {
    state: Mutex<State>,
    opening: tokio::sync::Mutex<()>,
    pub(super) changed: Notify,
}

/// What there is.
pub(super) enum Page {
    Deliveries(Vec<UpstreamDelivery>),
    Nothing,
    /// There is no channel.
    Closed,
}

impl Partition {
    /// What is held behind `after`, at most `limit`.
    pub(super) fn page(&self, after: Position, limit: usize) -> Page {
        let mut state = self.state.lock();
        let Some(open) = &state.open else {
            return Page::Closed;
        };
        if open.has_ended {
            state.open = None;
            return Page::Closed;
        }
        let from = if after.generation == open.generation {
            Bound::Excluded(after.sequence)
        } else {
            Bound::Unbounded
        };
        let mut deliveries = Vec::new();
        let mut bytes = 0;
        for (sequence, held) in open.held.range((from, Bound::Unbounded)) {
            if deliveries.len() >= limit.max(1) || bytes > PAGE_BYTES_MAX {
                break;
            }
            bytes += held.message.payload.len();
            deliveries.push(UpstreamDelivery {
                position: Position {
                    generation: open.generation,
                    sequence: *sequence,
                },
                message: held.message.clone(),
            });
        }
        if deliveries.is_empty() {
            Page::Nothing
        } else {
            Page::Deliveries(deliveries)
        }
    }

    /// Consumes the queue, unless it does already.
    pub(super) async fn open(
        self: &Arc<Self>,
        link: &Link,
        queue: &ShortString,
        prefetch: u16,
    ) -> Result<(), StoreError> {
        let _opening = self.opening.lock().await;
        if self.state.lock().open.is_some() {
            return Ok(());
        }
        let channel = link.channel().await?;
        answered(channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let consumer = channel.basic_consume(
            queue.clone(),
            ShortString::default(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let consumer = Uncancelled(answered(consumer).await?);
        let mut state = self.state.lock();
        let now = unix_ms().saturating_mul(1_000);
        state.generation = now.max(state.generation + 1);
        let generation = state.generation;
        state.open = Some(Open {
            channel,
            generation,
            last: 0,
            held: BTreeMap::new(),
            has_ended: false,
            pump: None,
            taken: metrics::taken(),
            _counted: HeldPartition::new(),
        });
        let pump = tokio::spawn(pump(Arc::clone(self), consumer, generation, queue.clone()));
        if let Some(open) = &mut state.open {
            open.pump = Some(pump);
        }
        Ok(())
    }

    fn push(&self, generation: u64, delivery: Delivery) {
        let message = message_of(
            delivery.routing_key.as_str(),
            &delivery.properties,
            delivery.data,
        );
        let mut state = self.state.lock();
        let open = state.open.as_mut();
        if let Some(open) = open.filter(|open| open.generation == generation) {
            open.last += 1;
            open.taken.increment(1);
            let acker = delivery.acker;
            open.held.insert(open.last, Held { message, acker });
        }
        drop(state);
        self.changed.notify_waiters();
    }

    fn end(&self, generation: u64) {
        let mut state = self.state.lock();
        let open = state.open.as_mut();
        if let Some(open) = open.filter(|open| open.generation == generation) {
            open.has_ended = true;
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// What is at a position, if this process still holds it.
    pub(super) fn get(&self, position: Position) -> Option<UpstreamMessage> {
        Some(self.held(position)?.message)
    }

    fn held(&self, position: Position) -> Option<Held> {
        let state = self.state.lock();
        let open = state.open.as_ref()?;
        let is_of_it = open.generation == position.generation && !open.has_ended;
        let held = is_of_it.then(|| open.held.get(&position.sequence))?;
        held.cloned()
    }

    /// Tells the broker that a delivery is done with. What is not held any more comes again.
    pub(super) async fn acknowledge(&self, position: Position) -> Result<(), StoreError> {
        let Some(held) = self.held(position) else {
            return Ok(());
        };
        let acknowledged = held.acker.ack(BasicAckOptions::default()).await;
        if acknowledged.is_err() {
            self.end(position.generation);
        } else if let Some(open) = &mut self.state.lock().open
            && open.generation == position.generation
        {
            open.held.remove(&position.sequence);
        }
        acknowledged.map(drop).map_err(unavailable)
    }

    /// Puts back everything that is not settled, and takes nothing more.
    pub(super) async fn close(&self) {
        let open = self.state.lock().open.take();
        let Some(mut open) = open else {
            return;
        };
        let channel = open.channel.clone();
        let closed = timeout(CLOSE_TIMEOUT, channel.close(200, "OK".into())).await;
        if !matches!(closed, Ok(Ok(()))) {
            tracing::debug!("a channel did not close cleanly, its connection has gone");
        }
        if let Some(pump) = open.pump.take() {
            pump.abort();
        }
    }

    /// Whether anything is held.
    pub(super) fn is_open(&self) -> bool {
        self.state.lock().open.is_some()
    }
}

async fn pump(
    partition: Arc<Partition>,
    mut consumer: Uncancelled,
    generation: u64,
    queue: ShortString,
) {
    while let Some(delivery) = consumer.0.next().await {
        match delivery {
            Ok(delivery) => partition.push(generation, delivery),
            Err(error) => {
                tracing::info!(%queue, %error, "consuming ended, what is not settled comes again");
                break;
            }
        }
    }
    partition.end(generation);
}
