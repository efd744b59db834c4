//! The upstream bus on the writer thread: queues, partitions, consumers of the default queue, dead letters.
//!
//! A partition is a run of keys in the order of publication. Nothing is kept in memory for one
//! message: only where each partition ends and how many bytes a queue holds.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;

use super::engine::{Engine, Lookup};
use super::transaction::Transaction;
use super::{Shared, keys};
use crate::record::format::{self, QueueRecord};
use crate::{
    DeadLetter, MessageId, Position, QueueName, Settlement, StoreError, UpstreamMessage, unix_ms,
};

/// At most this many messages of the default queue are removed in one batch.
const TRIM_MAX: usize = 1_000;
/// Each named consumer holds messages back, so their number is bounded.
pub(super) const CONSUMERS_MAX: usize = 64;

pub(super) type Tails = HashMap<(QueueName, u16), Position>;

#[derive(Default)]
pub(super) struct UpstreamLog {
    queues: HashMap<QueueName, QueueRecord>,
    tails: Tails,
    /// Positions given out before an outage: none is given out twice while readers have cursors.
    floors: Tails,
    /// Cursors of named consumers, staged changes included.
    consumers: BTreeMap<String, Position>,
    default_trimmed_to: Position,
    /// Partitions written to in this batch.
    written: HashSet<(QueueName, u16)>,
}

fn damaged_key(key: &[u8]) -> StoreError {
    StoreError::Damaged(format!("an impossible key {}", key.escape_ascii()))
}

impl UpstreamLog {
    pub(super) fn load(engine: &Engine, shared: &Shared) -> Result<Self, StoreError> {
        let mut log = Self::default();
        let view = engine.view();
        for pair in view.range(
            Bound::Included(vec![keys::QUEUE]),
            keys::after_prefix(&[keys::QUEUE]),
        ) {
            let (key, value) = pair?;
            let record = format::parse_queue(&key, &value)?;
            let name = std::str::from_utf8(&key[1..]).map_err(|_| damaged_key(&key))?;
            log.queues.insert(QueueName::new(name), record);
        }
        let consumers = vec![keys::CONSUMER];
        let end = keys::after_prefix(&consumers);
        for pair in view.range(Bound::Included(consumers), end) {
            let (key, value) = pair?;
            let name = std::str::from_utf8(&key[1..]).map_err(|_| damaged_key(&key))?;
            log.consumers
                .insert(name.into(), format::parse_position(&key, &value)?);
        }
        log.adopt_partitions(engine, shared)?;
        shared.upstream.replace_consumers(&log.consumers);
        Ok(log)
    }

    /// A queue that holds nothing takes the configured number of partitions; another keeps its own.
    fn adopt_partitions(&mut self, engine: &Engine, shared: &Shared) -> Result<(), StoreError> {
        let view = engine.view();
        for (queue, record) in &mut self.queues {
            let messages = keys::group(keys::UPSTREAM, queue.as_str());
            let end = keys::group_end(keys::UPSTREAM, queue.as_str());
            let configured = shared.configured_partitions(queue);
            // After an outage the workers of this process still have the number they began with.
            let in_use = shared.upstream.partitions.get(queue).map(|in_use| *in_use);
            if let Some(in_use) = in_use {
                record.partitions = in_use;
            } else if view.last(messages, end)?.is_none() {
                record.partitions = configured;
            } else if record.partitions != configured {
                tracing::warn!(
                    queue = %queue, partitions = record.partitions, configured,
                    "a queue keeps its number of partitions until it is empty at a start"
                );
            }
            shared.upstream.set_partitions(queue, record.partitions);
        }
        Ok(())
    }

    fn queue(&mut self, queue: &QueueName, shared: &Shared) -> QueueRecord {
        *self.queues.entry(queue.clone()).or_insert_with(|| {
            let partitions = shared.configured_partitions(queue);
            shared.upstream.set_partitions(queue, partitions);
            QueueRecord {
                bytes: 0,
                partitions,
            }
        })
    }

    /// Where partitions ended, for [`Self::continue_above`] after an outage.
    pub(super) fn into_tails(self) -> Tails {
        let mut tails = self.floors;
        tails.extend(self.tails);
        tails
    }

    pub(super) fn continue_above(&mut self, tails: Tails) {
        self.floors = tails;
    }

    /// Wakes whoever waits for what has become durable.
    pub(super) fn committed(&mut self, shared: &Shared) {
        for (queue, partition) in self.written.drain() {
            shared.upstream.notify(&queue, partition);
        }
        shared.upstream.replace_consumers(&self.consumers);
    }
}

impl Transaction {
    fn upstream_tail(&mut self, queue: &QueueName, partition: u16) -> Result<Position, StoreError> {
        let name = (queue.clone(), partition);
        if let Some(tail) = self.upstream.tails.get(&name) {
            return Ok(*tail);
        }
        let prefix = keys::partition(queue, partition);
        let end = keys::after_prefix(&prefix);
        let last = self.engine.view().last(prefix, end)?;
        let tail = match last {
            Some((key, _)) => keys::upstream_position(&key).ok_or_else(|| damaged_key(&key))?,
            None => Position {
                generation: self.next_number(),
                sequence: 0,
            },
        };
        let floor = self.upstream.floors.get(&name);
        let tail = floor.map_or(tail, |floor| tail.max(*floor));
        self.upstream.tails.insert(name, tail);
        Ok(tail)
    }

    fn set_queue_bytes(&mut self, queue: &QueueName, bytes: u64) {
        let shared = self.shared.clone();
        let record = QueueRecord {
            bytes,
            ..self.upstream.queue(queue, &shared)
        };
        self.upstream.queues.insert(queue.clone(), record);
        let key = keys::named(keys::QUEUE, queue.as_str());
        let value = format::queue(&key, record);
        self.staged.put(key, value);
    }

    fn enqueue(&mut self, queue: &QueueName, message: &UpstreamMessage) -> Result<u64, StoreError> {
        let shared = self.shared.clone();
        let record = self.upstream.queue(queue, &shared);
        let partition = message.client.part_of(record.partitions);
        let tail = self.upstream_tail(queue, partition)?;
        let position = Position {
            sequence: tail.sequence + 1,
            ..tail
        };
        let key = keys::upstream(queue, partition, position);
        let value = format::upstream(&key, message);
        let size = value.len() as u64;
        self.staged.put(key, value);
        self.upstream
            .tails
            .insert((queue.clone(), partition), position);
        self.upstream.written.insert((queue.clone(), partition));
        Ok(size)
    }

    /// Stages messages, all or none.
    pub(super) fn publish(
        &mut self,
        messages: &[(UpstreamMessage, Vec<QueueName>)],
    ) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        let mut wanted: BTreeMap<&QueueName, u64> = BTreeMap::new();
        for (message, queues) in messages {
            for queue in queues {
                *wanted.entry(queue).or_default() += upstream_cost(message) as u64;
            }
        }
        let bytes_max = shared.config.upstream_queue_bytes_max;
        for (queue, bytes) in wanted {
            if self.upstream.queue(queue, &shared).bytes + bytes > bytes_max {
                return Err(StoreError::Full(format!(
                    "upstream queue {queue} is at its limit of {bytes_max} bytes"
                )));
            }
        }
        for (message, queues) in messages {
            for queue in queues {
                let size = self.enqueue(queue, message)?;
                let bytes = self.upstream.queue(queue, &shared).bytes;
                self.set_queue_bytes(queue, bytes + size);
            }
        }
        Ok(())
    }

    /// Takes a message out of its partition, for good or to the dead letters.
    pub(super) fn settle(
        &mut self,
        queue: &QueueName,
        partition: u16,
        position: Position,
        settlement: Settlement,
    ) -> Result<(), StoreError> {
        let key = keys::upstream(queue, partition, position);
        let Some(value) = self.get(&key)? else {
            return Ok(());
        };
        let shared = self.shared.clone();
        let bytes = self.upstream.queue(queue, &shared).bytes;
        match settlement {
            Settlement::Done => {
                self.set_queue_bytes(queue, bytes.saturating_sub(value.len() as u64));
            }
            // A dead letter goes on counting against its queue.
            Settlement::DeadLetter { reason, attempts } => {
                let message = format::parse_upstream(&key, &value)?;
                let letter = DeadLetter {
                    queue: queue.clone(),
                    reason,
                    attempts,
                    at_ms: unix_ms(),
                    message,
                };
                let at = keys::at(keys::DEAD_LETTER, self.next_number());
                let mut index = keys::dead_letter_of(&letter.message.id, queue);
                // A device may use an id twice: each letter has an entry of its own.
                index.extend_from_slice(&at[1..]);
                self.staged.put(index, at.clone());
                let record = format::dead_letter(&at, &letter);
                let grown = (record.len() as u64).saturating_sub(value.len() as u64);
                self.set_queue_bytes(queue, bytes + grown);
                self.staged.put(at, record);
            }
        }
        self.staged.delete(key);
        Ok(())
    }

    /// Puts the dead letters of a message at the end of their queues again.
    pub(super) fn retry_dead_letter(&mut self, id: &MessageId) -> Result<bool, StoreError> {
        let from = keys::group(keys::DEAD_LETTER_OF, id.as_str());
        let to = keys::group_end(keys::DEAD_LETTER_OF, id.as_str());
        let indexes = self.staged.keys(&self.engine, from, to)?;
        let mut any = false;
        for index in indexes {
            let Some(at) = self.get(&index)? else {
                continue;
            };
            if let Some(value) = self.get(&at)? {
                let letter = format::parse_dead_letter(&at, &value)?;
                let shared = self.shared.clone();
                let size = self.enqueue(&letter.queue, &letter.message)?;
                let bytes = self.upstream.queue(&letter.queue, &shared).bytes + size;
                self.set_queue_bytes(&letter.queue, bytes.saturating_sub(value.len() as u64));
                any = true;
            }
            self.staged.delete(at.to_vec());
            self.staged.delete(index);
        }
        Ok(any)
    }

    /// Makes a consumer known, from the oldest message that is still there.
    pub(super) fn add_consumer(&mut self, consumer: &str) -> Result<Position, StoreError> {
        if let Some(cursor) = self.upstream.consumers.get(consumer) {
            return Ok(*cursor);
        }
        if self.upstream.consumers.len() >= CONSUMERS_MAX {
            return Err(StoreError::Full(format!(
                "there are {CONSUMERS_MAX} consumers already; delete one that is not used"
            )));
        }
        self.set_cursor(consumer, Position::START);
        Ok(Position::START)
    }

    fn set_cursor(&mut self, consumer: &str, cursor: Position) {
        self.upstream.consumers.insert(consumer.into(), cursor);
        let key = keys::named(keys::CONSUMER, consumer);
        let value = format::position(&key, cursor);
        self.staged.put(key, value);
    }

    /// Moves a consumer's cursor forward, never back and never past the end.
    pub(super) fn ack_default(
        &mut self,
        consumer: &str,
        position: Position,
    ) -> Result<(), StoreError> {
        let before = self.add_consumer(consumer)?;
        let tail = self.upstream_tail(&QueueName::new(QueueName::DEFAULT), 0)?;
        let cursor = position.min(tail);
        if cursor > before {
            self.set_cursor(consumer, cursor);
        }
        Ok(())
    }

    /// Forgets a consumer; says whether there was one.
    pub(super) fn delete_consumer(&mut self, consumer: &str) -> bool {
        let known = self.upstream.consumers.remove(consumer).is_some();
        if known {
            self.staged.delete(keys::named(keys::CONSUMER, consumer));
        }
        known
    }

    /// Removes what every known consumer has acknowledged.
    pub(super) fn trim_default_queue(&mut self) -> Result<(), StoreError> {
        let Some(acknowledged) = self.upstream.consumers.values().min().copied() else {
            return Ok(());
        };
        if acknowledged <= self.upstream.default_trimmed_to {
            return Ok(());
        }
        let queue = QueueName::new(QueueName::DEFAULT);
        let from = Bound::Excluded(keys::upstream(&queue, 0, self.upstream.default_trimmed_to));
        let mut to = keys::upstream(&queue, 0, acknowledged);
        to.push(0);
        let mut freed = 0;
        let mut trimmed_to = acknowledged;
        let mut last = self.upstream.default_trimmed_to;
        let mut removed = 0;
        for pair in self.engine.view().range(from, to) {
            let (key, value) = pair?;
            if removed >= TRIM_MAX {
                trimmed_to = last;
                self.more_to_do = true;
                break;
            }
            last = keys::upstream_position(&key).ok_or_else(|| damaged_key(&key))?;
            freed += value.len() as u64;
            removed += 1;
            self.staged.delete(key.to_vec());
        }
        self.upstream.default_trimmed_to = trimmed_to;
        if removed > 0 {
            let shared = self.shared.clone();
            let bytes = self.upstream.queue(&queue, &shared).bytes;
            self.set_queue_bytes(&queue, bytes.saturating_sub(freed));
        }
        Ok(())
    }
}

/// About what a message takes on disk and in the queue to the writer.
pub(super) fn upstream_cost(message: &UpstreamMessage) -> usize {
    let properties = message.properties.as_ref().map_or(0, |properties| {
        let user = properties
            .user_properties
            .iter()
            .map(|(k, v)| k.len() + v.len() + 5);
        user.sum::<usize>()
            + properties
                .correlation_data
                .as_ref()
                .map_or(0, |data| data.len() + 3)
            + properties
                .content_type
                .as_ref()
                .map_or(0, |text| text.len() + 3)
            + properties
                .response_topic
                .as_ref()
                .map_or(0, |topic| topic.as_str().len() + 3)
            + 32
    });
    message.payload.len()
        + message.topic.as_str().len()
        + message.client.as_str().len()
        + message.id.as_str().len()
        + properties
        + 48
}
