//! The upstream bus as its callers see it: publish, fetch and settle, and the named consumers of
//! the default queue behind `GET /v1/upstream`.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use dashmap::DashMap;
use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use super::engine::View;
use super::queue::Kind;
use super::upstream_log::upstream_cost;
use super::{EmbeddedStore, keys};
use crate::record::format;
use crate::{
    DeadLetter, Fence, MessageId, Position, QueueName, Settlement, StoreError, UpstreamBus,
    UpstreamDelivery, UpstreamMessage,
};

/// What readers of the bus share with the writer.
#[derive(Default)]
pub(super) struct UpstreamShared {
    pub(super) partitions: DashMap<QueueName, u16>,
    slots: DashMap<(QueueName, u16), Arc<Slot>>,
    consumers: Mutex<BTreeMap<String, Position>>,
}

/// One partition as its readers share it.
struct Slot {
    written: Notify,
    /// Nothing lives at or below: spares a scan from walking over what was removed.
    gone_to: Mutex<Position>,
}

impl UpstreamShared {
    pub(super) fn set_partitions(&self, queue: &QueueName, partitions: u16) {
        self.partitions.insert(queue.clone(), partitions);
    }

    pub(super) fn notify(&self, queue: &QueueName, partition: u16) {
        self.slot(queue, partition).written.notify_waiters();
    }

    pub(super) fn notify_all(&self) {
        for slot in &self.slots {
            slot.written.notify_waiters();
        }
    }

    /// Forgets what was found gone: after an outage it may be there again.
    pub(super) fn forget_gone(&self) {
        for slot in &self.slots {
            *slot.gone_to.lock() = Position::START;
        }
    }

    /// The cursors as far as they are durable.
    pub(super) fn replace_consumers(&self, consumers: &BTreeMap<String, Position>) {
        let mut known = self.consumers.lock();
        if *known != *consumers {
            known.clone_from(consumers);
        }
    }

    fn slot(&self, queue: &QueueName, partition: u16) -> Arc<Slot> {
        let slot = self
            .slots
            .entry((queue.clone(), partition))
            .or_insert_with(|| {
                Arc::new(Slot {
                    written: Notify::new(),
                    gone_to: Mutex::new(Position::START),
                })
            });
        slot.clone()
    }
}

fn read_partition(
    view: &View,
    queue: &QueueName,
    partition: u16,
    after: Position,
    limit: usize,
) -> Result<Vec<UpstreamDelivery>, StoreError> {
    let from = Bound::Excluded(keys::upstream(queue, partition, after));
    let to = keys::after_prefix(&keys::partition(queue, partition));
    let mut deliveries = Vec::new();
    let mut bytes = 0;
    for pair in view.range(from, to) {
        // A page of large messages is cut short, but never empty.
        if deliveries.len() >= limit.max(1) || bytes > PAGE_BYTES_MAX {
            break;
        }
        let (key, value) = pair?;
        bytes += value.len();
        let position = keys::upstream_position(&key)
            .ok_or_else(|| StoreError::Damaged("an impossible upstream key".into()))?;
        let message = format::parse_upstream(&key, &value)?;
        deliveries.push(UpstreamDelivery { position, message });
    }
    Ok(deliveries)
}

/// Where the newest dead letter of a message is: it has one in each queue that gave up on it.
fn last_letter_of(view: &View, id: &MessageId) -> Result<Option<Vec<u8>>, StoreError> {
    let group = keys::group(keys::DEAD_LETTER_OF, id.as_str());
    let end = keys::group_end(keys::DEAD_LETTER_OF, id.as_str());
    let mut last: Option<Vec<u8>> = None;
    for pair in view.range(Bound::Included(group), end) {
        last = last.max(Some(pair?.1.to_vec()));
    }
    Ok(last)
}

const PAGE_BYTES_MAX: usize = 4 << 20;
/// No long poll is longer.
const WAIT_MAX: Duration = Duration::from_secs(3_600);

/// Whether `name` can name a consumer: 1 to 64 visible ASCII characters.
pub fn is_consumer_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
}

fn check_consumer(name: &str) -> Result<(), StoreError> {
    if is_consumer_name(name) {
        return Ok(());
    }
    Err(StoreError::Full(
        "a consumer is named by 1 to 64 visible ASCII characters".into(),
    ))
}

impl EmbeddedStore {
    /// One page of a partition, or nothing if there is nothing now.
    async fn page(
        &self,
        queue: &QueueName,
        partition: u16,
        after: Position,
        limit: usize,
    ) -> Result<Vec<UpstreamDelivery>, StoreError> {
        let slot = self.shared.upstream.slot(queue, partition);
        let queue = queue.clone();
        self.read(move |view| {
            let gone_to = *slot.gone_to.lock();
            let page = read_partition(view, &queue, partition, after.max(gone_to), limit)?;
            if after <= gone_to
                && let Some(first) = page.first()
                && first.position.sequence > 0
            {
                // Nothing is ever put before the first that is there.
                let sequence = first.position.sequence - 1;
                let before = Position {
                    sequence,
                    ..first.position
                };
                let mut gone_to = slot.gone_to.lock();
                *gone_to = (*gone_to).max(before);
            }
            Ok(page)
        })
        .await
    }

    /// Waits until there is a page, or until `deadline`.
    async fn await_page(
        &self,
        queue: &QueueName,
        partition: u16,
        after: Position,
        limit: usize,
        deadline: Option<Instant>,
    ) -> Result<Vec<UpstreamDelivery>, StoreError> {
        let slot = self.shared.upstream.slot(queue, partition);
        loop {
            let mut written = std::pin::pin!(slot.written.notified());
            // Listening begins before the look, so that nothing written in between is missed.
            written.as_mut().enable();
            let page = self.page(queue, partition, after, limit).await?;
            if !page.is_empty() {
                return Ok(page);
            }
            if self.shared.is_closed() {
                return Err(StoreError::Unavailable("the store is closed".into()));
            }
            match deadline {
                None => written.await,
                Some(deadline) => {
                    if timeout_at(deadline, written).await.is_err() {
                        return Ok(page);
                    }
                }
            }
        }
    }

    /// Messages of the default queue for a named consumer, at most `limit`; waits up to `wait` for
    /// the first. Without `after` it goes on behind what the consumer acknowledged. The first read
    /// makes a consumer known: from then on messages stay until it acknowledges them, too.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] for a name that [`is_consumer_name`] refuses, or one consumer too many.
    pub async fn read_default(
        &self,
        consumer: &str,
        after: Option<Position>,
        limit: usize,
        wait: Duration,
    ) -> Result<Vec<UpstreamDelivery>, StoreError> {
        check_consumer(consumer)?;
        let deadline = Instant::now() + wait.min(WAIT_MAX);
        let known = self.shared.upstream.consumers.lock().get(consumer).copied();
        let cursor = match known {
            Some(cursor) => cursor,
            None => {
                let name = consumer.to_owned();
                self.submit(Kind::Change, name.len(), move |tx| tx.add_consumer(&name))
                    .await?
            }
        };
        let queue = QueueName::new(QueueName::DEFAULT);
        self.await_page(&queue, 0, after.unwrap_or(cursor), limit, Some(deadline))
            .await
    }

    /// Notes that `consumer` has everything up to and with `position`; durable on return. A cursor
    /// does not go back.
    pub async fn ack_default(&self, consumer: &str, position: Position) -> Result<(), StoreError> {
        check_consumer(consumer)?;
        let name = consumer.to_owned();
        self.submit(Kind::Change, name.len(), move |tx| {
            tx.ack_default(&name, position)
        })
        .await
    }

    /// The known consumers of the default queue and what each has acknowledged.
    pub fn consumers(&self) -> Vec<(String, Position)> {
        let consumers = self.shared.upstream.consumers.lock();
        consumers
            .iter()
            .map(|(name, cursor)| (name.clone(), *cursor))
            .collect()
    }

    /// Forgets a consumer, so that it holds no messages back; says whether there was one.
    pub async fn delete_consumer(&self, consumer: &str) -> Result<bool, StoreError> {
        let name = consumer.to_owned();
        self.submit(Kind::Change, name.len(), move |tx| {
            Ok(tx.delete_consumer(&name))
        })
        .await
    }
}

#[async_trait]
impl UpstreamBus for EmbeddedStore {
    fn publish_behind(
        &self,
        messages: Vec<(UpstreamMessage, Vec<QueueName>)>,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let mut cost = 0;
        for (message, queues) in &messages {
            cost += upstream_cost(message) * queues.len().max(1);
            let checked = keys::check_name(message.client.as_str())
                .and_then(|()| format::check_properties(message.properties.as_deref()));
            if let Err(error) = checked {
                let refused = Err(error);
                super::tell(fence, &refused);
                return async { refused }.boxed();
            }
        }
        self.submit_behind(fence, Kind::Add, cost, move |tx| tx.publish(&messages))
            .boxed()
    }

    fn partitions(&self, queue: &QueueName) -> u16 {
        let known = self
            .shared
            .upstream
            .partitions
            .get(queue)
            .map(|partitions| *partitions);
        known.unwrap_or_else(|| self.shared.configured_partitions(queue))
    }

    async fn fetch(
        &self,
        queue: &QueueName,
        partition: u16,
        after: Position,
        limit: usize,
    ) -> Result<Vec<UpstreamDelivery>, StoreError> {
        self.await_page(queue, partition, after, limit, None).await
    }

    async fn settle(
        &self,
        queue: &QueueName,
        partition: u16,
        position: Position,
        settlement: Settlement,
    ) -> Result<(), StoreError> {
        let queue = queue.clone();
        // Settling is what frees space, so it goes on while space is short.
        self.submit(Kind::Change, 128, move |tx| {
            tx.settle(&queue, partition, position, settlement)
        })
        .await
    }

    async fn dead_letters(
        &self,
        after: Option<&MessageId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let after = after.cloned();
        self.read(move |view| {
            let after = after
                .map(|id| last_letter_of(view, &id))
                .transpose()?
                .flatten();
            let from = after.map_or(Bound::Included(vec![keys::DEAD_LETTER]), Bound::Excluded);
            let mut letters = Vec::new();
            for pair in view.range(from, keys::after_prefix(&[keys::DEAD_LETTER])) {
                let (key, value) = pair?;
                let letter = format::parse_dead_letter(&key, &value)?;
                let last = last_letter_of(view, &letter.message.id)?;
                letters.push(letter);
                // The next page begins after the last letter of this id: nothing may lie between.
                if letters.len() >= limit && last.is_none_or(|last| last[..] == key[..]) {
                    break;
                }
            }
            Ok(letters)
        })
        .await
    }

    async fn retry_dead_letter(&self, id: &MessageId) -> Result<bool, StoreError> {
        let id = id.clone();
        self.submit(Kind::Change, 128, move |tx| tx.retry_dead_letter(&id))
            .await
    }
}
