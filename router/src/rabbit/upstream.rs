//! The upstream bus: one quorum queue for each partition of a rule, one for what no rule takes.
//!
//! | queue | holds |
//! |---|---|
//! | `{prefix}.up.{rule}.{partition}` | what a rule takes of the devices that fall into the partition |
//! | `{prefix}.upstream` | what no rule takes, for whoever consumes it |
//! | `{prefix}.dead-letters` | dead letters, until a worker has brought them to Redis |
//!
//! Each refuses what is beyond its limits. A call that goes to several queues is not one write: when one of them is full, the
//! others may have taken it, and get it again under the same id when it is repeated.
//!
//! An acknowledgement is not confirmed by the broker: one that is lost makes the delivery come again.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use dashmap::{DashMap, DashSet};
use futures_util::StreamExt;
use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use lapin::ExchangeKind;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::envelope::{dead_letter_of, dead_properties, properties_of};
use super::link::{answered, unavailable};
use super::partition::{Page, Partition, Uncancelled};
use super::publisher::sender_hash;
use super::spread::Spread;
use super::topology::Arguments;
use super::{Config, Declaration, Link, Publisher, Publishing, Topology};
use crate::redis::RedisStore;
use crate::{
    ClientId, DeadLetter, Fence, MessageId, Position, QueueName, Settlement, StoreError,
    UpstreamBus, UpstreamDelivery, UpstreamMessage, unix_ms,
};

/// Publishing connections. A device has one of them.
const LANES: usize = 2;
const DEAD_LETTERS: &str = "dead-letters";
const DEAD_LETTERS_PREFETCH: u16 = 64;
/// After a failure of the broker or of Redis.
const AGAIN: Duration = Duration::from_secs(1);

/// The upstream bus over RabbitMQ. Dead letters and the spreading of partitions are in Redis.
pub struct RabbitUpstream {
    config: Config,
    worker: String,
    publisher: Arc<Publisher>,
    consume_link: Arc<Link>,
    topology: Arc<Topology>,
    store: Arc<RedisStore>,
    declared: DashSet<QueueName>,
    partitions: DashMap<(QueueName, u16), Arc<Partition>>,
    /// From the first fetch on: who only publishes takes no partitions.
    work: OnceLock<Work>,
}

struct Work {
    spread: Spread,
    dead_letters: JoinHandle<()>,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.dead_letters.abort();
    }
}

impl RabbitUpstream {
    /// `process` names this run of the process. Waits for nobody: while the broker is out of reach, publishes wait. Works on
    /// the runtime that this is called in.
    pub fn open(config: &Config, process: &str, store: Arc<RedisStore>) -> Arc<Self> {
        let topology = Topology::new();
        let dead = config.name(DEAD_LETTERS);
        topology.add(dead_letter_declarations(config));
        tracing::debug!(exchange = %dead, "dead letters");
        Arc::new(Self {
            worker: process.to_owned(),
            publisher: Publisher::new(config, "moorline upstream", LANES, &topology),
            consume_link: Link::new(config, "moorline upstream worker"),
            topology,
            store,
            declared: DashSet::new(),
            partitions: DashMap::new(),
            work: OnceLock::new(),
            config: config.clone(),
        })
    }

    /// Gives up all partitions and what is held of them, for a clean end of the process.
    pub async fn close(&self) {
        let open: Vec<_> = self.partitions.iter().map(|entry| entry.clone()).collect();
        for partition in open {
            partition.close().await;
        }
        if let Some(work) = self.work.get() {
            work.dead_letters.abort();
            work.spread.leave().await;
        }
    }

    /// Whether the broker is within reach, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.publisher.is_connected()
    }

    fn work(&self) -> &Work {
        self.work.get_or_init(|| Work {
            spread: Spread::start(self.worker.clone(), Arc::clone(&self.store)),
            dead_letters: tokio::spawn(keep_dead_letters(
                self.config.clone(),
                Arc::clone(&self.consume_link),
                Arc::clone(&self.store),
            )),
        })
    }

    fn queue_name(&self, queue: &QueueName, partition: u16) -> ShortString {
        if queue.as_str() == QueueName::DEFAULT {
            return self.config.name("upstream");
        }
        self.config.name(&format!("up.{queue}.{partition}"))
    }

    fn declaration(&self, queue: &QueueName, partition: u16) -> Declaration {
        let config = &self.config;
        let dead = config.name(DEAD_LETTERS);
        let arguments = Arguments::quorum(config.queue_messages_max, config.queue_bytes_max)
            .with("x-dead-letter-exchange", dead.as_str())
            .with("x-dead-letter-strategy", "at-least-once");
        // The default queue is for consumers of others, as many as they like.
        let arguments = if queue.as_str() == QueueName::DEFAULT {
            arguments
        } else {
            arguments.with("x-single-active-consumer", true)
        };
        arguments.of_queue(self.queue_name(queue, partition))
    }

    fn declare(&self, queue: &QueueName) {
        if !self.declared.contains(queue) {
            let all = 0..self.partitions(queue);
            self.topology
                .add(all.map(|partition| self.declaration(queue, partition)));
            self.declared.insert(queue.clone());
        }
    }

    fn partition_of(&self, client: &ClientId, queue: &QueueName) -> u16 {
        client.part_of(self.partitions(queue))
    }

    fn publish_one(
        &self,
        message: &UpstreamMessage,
        queue: &QueueName,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        self.declare(queue);
        let partition = self.partition_of(&message.client, queue);
        let publishing = Publishing {
            exchange: ShortString::default(),
            routing_key: self.queue_name(queue, partition),
            id: message.id.clone(),
            properties: properties_of(message),
            persistent: true,
            mandatory: true,
            body: message.payload.clone(),
        };
        let sender = sender_hash(message.client.as_str());
        self.publisher.publish(sender, publishing, fence)
    }

    /// Publishes a dead letter to where a worker will find it.
    async fn bury(&self, letter: &DeadLetter) -> Result<(), StoreError> {
        let publishing = Publishing {
            exchange: self.config.name(DEAD_LETTERS),
            routing_key: self.config.name(DEAD_LETTERS),
            id: letter.message.id.clone(),
            properties: dead_properties(letter),
            persistent: true,
            mandatory: true,
            body: letter.message.payload.clone(),
        };
        let sender = sender_hash(letter.message.client.as_str());
        self.publisher.publish(sender, publishing, None).await
    }

    fn partition(&self, queue: &QueueName, partition: u16) -> Arc<Partition> {
        let entry = self.partitions.entry((queue.clone(), partition));
        entry.or_default().clone()
    }

    async fn open_partition(
        &self,
        queue: &QueueName,
        partition: u16,
        consumed: &Arc<Partition>,
    ) -> Result<(), StoreError> {
        let declaration = self.declaration(queue, partition);
        Topology::ensure(&self.consume_link, &[declaration]).await?;
        let name = self.queue_name(queue, partition);
        consumed
            .open(&self.consume_link, &name, self.config.prefetch)
            .await
    }
}

#[async_trait]
impl UpstreamBus for RabbitUpstream {
    fn publish_behind(
        &self,
        messages: Vec<(UpstreamMessage, Vec<QueueName>)>,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let mut calls = Vec::with_capacity(1);
        for (message, queues) in &messages {
            for queue in queues {
                calls.push(self.publish_one(message, queue, fence));
            }
        }
        if calls.len() == 1 {
            return calls.remove(0);
        }
        try_join_all(calls).map(|all| all.map(drop)).boxed()
    }

    fn partitions(&self, queue: &QueueName) -> u16 {
        if queue.as_str() == QueueName::DEFAULT {
            1
        } else {
            self.config.partitions
        }
    }

    async fn fetch(
        &self,
        queue: &QueueName,
        partition: u16,
        after: Position,
        limit: usize,
    ) -> Result<Vec<UpstreamDelivery>, StoreError> {
        let spread = &self.work().spread;
        let consumed = self.partition(queue, partition);
        loop {
            if !spread.is_mine(partition) {
                consumed.close().await;
                spread.mine(partition).await;
            }
            let mut changed = std::pin::pin!(consumed.changed.notified());
            // Listening begins before the look, so that nothing that comes in between is missed.
            changed.as_mut().enable();
            match consumed.page(after, limit) {
                Page::Deliveries(page) => return Ok(page),
                Page::Closed => self.open_partition(queue, partition, &consumed).await?,
                Page::Nothing => tokio::select! {
                    () = changed => {}
                    () = spread.lost(partition) => {}
                },
            }
        }
    }

    async fn settle(
        &self,
        queue: &QueueName,
        partition: u16,
        position: Position,
        settlement: Settlement,
    ) -> Result<(), StoreError> {
        let consumed = self.partition(queue, partition);
        if let Settlement::DeadLetter { reason, attempts } = settlement {
            let Some(message) = consumed.get(position) else {
                return Ok(());
            };
            let letter = DeadLetter {
                queue: queue.clone(),
                message,
                reason,
                attempts,
                at_ms: unix_ms(),
            };
            self.bury(&letter).await?;
        }
        consumed.acknowledge(position).await
    }

    async fn park(&self, queue: &QueueName, partition: u16) {
        self.partition(queue, partition).close().await;
    }

    fn is_wanted_elsewhere(&self, queue: &QueueName, partition: u16) -> bool {
        let is_open = self.partition(queue, partition).is_open();
        is_open && !self.work().spread.is_mine(partition)
    }

    async fn dead_letters(
        &self,
        after: Option<&MessageId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        self.store.dead_letters_page(after, limit).await
    }

    async fn retry_dead_letter(&self, id: &MessageId) -> Result<bool, StoreError> {
        let letters = self.store.dead_letters_of(id).await?;
        for (_, letter) in &letters {
            self.publish_one(&letter.message, &letter.queue, None)
                .await?;
        }
        let ids: Vec<_> = letters.into_iter().map(|(id, _)| id).collect();
        if !ids.is_empty() {
            self.store.remove_dead_letters(id, &ids).await?;
        }
        Ok(!ids.is_empty())
    }
}

fn dead_letter_declarations(config: &Config) -> [Declaration; 3] {
    let name = config.name(DEAD_LETTERS);
    [
        Declaration::Exchange {
            name: name.clone(),
            kind: ExchangeKind::Fanout,
        },
        Arguments::quorum(config.queue_messages_max, config.queue_bytes_max)
            .with("x-single-active-consumer", true)
            .of_queue(name.clone()),
        Declaration::Binding {
            queue: name.clone(),
            exchange: name,
            routing_key: ShortString::default(),
        },
    ]
}

/// Brings dead letters to Redis, durable there before they are acknowledged here.
async fn keep_dead_letters(config: Config, link: Arc<Link>, store: Arc<RedisStore>) {
    loop {
        if let Err(error) = drain_dead_letters(&config, &link, &store).await {
            tracing::debug!(%error, "dead letters wait in their queue");
        }
        sleep(AGAIN).await;
    }
}

async fn drain_dead_letters(
    config: &Config,
    link: &Link,
    store: &RedisStore,
) -> Result<(), StoreError> {
    Topology::ensure(link, &dead_letter_declarations(config)).await?;
    let channel = link.channel().await?;
    let prefetch = channel.basic_qos(DEAD_LETTERS_PREFETCH, BasicQosOptions::default());
    answered(prefetch).await?;
    let consumer = channel.basic_consume(
        config.name(DEAD_LETTERS),
        ShortString::default(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    let mut consumer = Uncancelled(answered(consumer).await?);
    while let Some(delivery) = consumer.0.next().await {
        let delivery = delivery.map_err(unavailable)?;
        let key = delivery.routing_key.as_str();
        let (id, mut letter) = dead_letter_of(key, &delivery.properties, delivery.data);
        if let Some(queue) = rule_of(config, letter.queue.as_str()) {
            letter.queue = queue;
        }
        let mut warned = false;
        while let Err(error) = store.add_dead_letter(&id, &letter).await {
            if !warned {
                tracing::warn!(%error, "dead letters wait in their queue");
                warned = true;
            }
            sleep(AGAIN).await;
        }
        let acknowledged = delivery.acker.ack(BasicAckOptions::default()).await;
        acknowledged.map_err(unavailable)?;
    }
    Ok(())
}

/// The rule of a queue of the broker, where the broker itself made the dead letter.
fn rule_of(config: &Config, queue: &str) -> Option<QueueName> {
    let rest = queue.strip_prefix(&config.prefix)?.strip_prefix('.')?;
    if rest == "upstream" {
        return Some(QueueName::new(QueueName::DEFAULT));
    }
    let (rule, partition) = rest.strip_prefix("up.")?.rsplit_once('.')?;
    partition.parse::<u16>().ok()?;
    Some(QueueName::new(rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_of_a_queue_is_found() {
        let config = Config::default();
        let rule = |queue: &str| rule_of(&config, queue).map(|queue| queue.to_string());
        assert_eq!(rule("moorline.up.a.b.17").as_deref(), Some("a.b"));
        assert_eq!(rule("moorline.upstream").as_deref(), Some("default"));
        assert_eq!(rule("moorline.up.a.b"), None);
        assert_eq!(rule("orders"), None);
    }
}
