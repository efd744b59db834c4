//! The backend's end of a feed: one queue, its bindings, one consumer. Made again whenever the connection was lost.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Consumer};

use super::codec;
use crate::StoreError;
use crate::pubsub::bindings::Changes;
use crate::pubsub::feed::{Ack, Acks, FeedDelivery, FeedSource};
use crate::pubsub::registry::QueueRegistry;
use crate::rabbit::link::{answered, unavailable};
use crate::rabbit::{Link, Topology};

/// Between two attempts, beside what the link waits by itself.
const RETRY: Duration = Duration::from_millis(200);

/// Where a feed comes from.
pub(super) struct Source {
    pub(super) link: Arc<Link>,
    pub(super) exchange: ShortString,
    /// The exchanges and, but for a node's, the queue.
    pub(super) topology: Arc<Topology>,
    pub(super) queue: QueueKind,
    /// What stands before each pattern: the class of publications that come.
    pub(super) class: &'static str,
    pub(super) prefetch: u16,
    /// The own process, whose publications do not come. `None` where they do.
    pub(super) without: Option<Arc<str>>,
}

pub(super) enum QueueKind {
    /// Goes with the connection. Each attempt makes another, for the broker may not have noticed yet that the last one
    /// has gone.
    Exclusive {
        prefix: String,
        arguments: FieldTable,
        made: u64,
    },
    /// Durable, and bound to whatever is noted. Only one reader at a time.
    Noted {
        name: ShortString,
        registry: Arc<dyn QueueRegistry>,
    },
    /// Durable, and bound for good. Its readers go when they have acknowledged.
    Bound { name: ShortString },
}

/// Why a connection is no longer used.
enum Ended {
    /// The reader has gone.
    Closed,
    Broken(Fault),
}

/// What went wrong.
enum Fault {
    /// With the connection, which is given up.
    Connection(StoreError),
    /// With the queue or the notes; the connection, which others use as well, is good.
    Other(StoreError),
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Connection(error)
    }
}

/// Feeds until the reader goes.
pub(super) async fn run(mut source: Source, feed: FeedSource) {
    let mut failing = false;
    // A member of a group may have messages that it has not answered: its feed ends by itself, see [`Reading::finish`].
    let ends_by_itself = matches!(source.queue, QueueKind::Bound { .. });
    while !feed.deliveries.is_closed() {
        let ended = tokio::select! {
            ended = serve(&mut source, &feed, &mut failing) => ended,
            // With the channel: the broker gives what was not acknowledged to the next reader, in order.
            () = feed.deliveries.closed(), if !ends_by_itself => Ended::Closed,
        };
        match ended {
            Ended::Closed => return,
            Ended::Broken(_) if feed.deliveries.is_closed() => return,
            Ended::Broken(fault) => {
                let (Fault::Connection(error) | Fault::Other(error)) = &fault;
                if !failing {
                    tracing::warn!(%error, "publications of other nodes are interrupted, trying again");
                    failing = true;
                }
                if let Fault::Connection(_) = fault {
                    // Nothing of the old channel may go out on a new one of the same number.
                    source.link.reset().await;
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

async fn serve(source: &mut Source, feed: &FeedSource, failing: &mut bool) -> Ended {
    match open(source, feed).await {
        Ok((channel, queue, consumer)) => {
            if std::mem::take(failing) {
                tracing::info!(queue = %queue, "publications of other nodes come again");
            }
            let mut reading = Reading {
                source,
                feed,
                channel,
                queue,
                acks: Arc::default(),
                unacknowledged: BTreeSet::new(),
            };
            let ended = reading.run(consumer).await;
            let closed = answered(reading.channel.close(200, "done".into())).await;
            match (ended, closed) {
                // A queue that somebody deleted.
                (Ended::Broken(Fault::Connection(error)), Ok(())) => {
                    Ended::Broken(Fault::Other(error))
                }
                (ended, _) => ended,
            }
        }
        Err(fault) => Ended::Broken(fault),
    }
}

/// Declares, binds, and begins to consume.
async fn open(
    source: &mut Source,
    feed: &FeedSource,
) -> Result<(Channel, ShortString, Consumer), Fault> {
    source.topology.declare(&source.link, 0).await?;
    let channel = source.link.channel().await?;
    let queue = match &mut source.queue {
        QueueKind::Noted { name, .. } | QueueKind::Bound { name } => name.clone(),
        QueueKind::Exclusive {
            prefix,
            arguments,
            made,
        } => {
            *made += 1;
            let name = ShortString::try_new(format!("{prefix}.{made}")).unwrap_or_default();
            let options = QueueDeclareOptions {
                exclusive: true,
                auto_delete: true,
                ..QueueDeclareOptions::default()
            };
            let declared = channel.queue_declare(name, options, arguments.clone());
            answered(declared).await?.name().clone()
        }
    };
    let (patterns, number) = feed.filters.all();
    let mut changes = Changes {
        bind: patterns,
        unbind: Vec::new(),
    };
    if let QueueKind::Noted { registry, .. } = &source.queue {
        let noted = registry.bound(queue.as_str()).await;
        let mut noted = noted.map_err(Fault::Other)?;
        noted.retain(|pattern| !changes.bind.contains(pattern));
        changes.unbind = noted;
    }
    apply(source, &channel, &queue, changes).await?;
    feed.filters.in_force(number);
    let options = BasicQosOptions::default();
    answered(channel.basic_qos(source.prefetch, options)).await?;
    let consumer = channel.basic_consume(
        queue.clone(),
        ShortString::default(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    let consumer = answered(consumer).await?;
    Ok((channel, queue, consumer))
}

/// First what is bound, so that nothing falls between.
async fn apply(
    source: &Source,
    channel: &Channel,
    queue: &ShortString,
    changes: Changes,
) -> Result<(), Fault> {
    let registry = match &source.queue {
        QueueKind::Noted { registry, .. } => Some(registry),
        QueueKind::Exclusive { .. } | QueueKind::Bound { .. } => None,
    };
    let key = |pattern: &str| {
        let key = format!("{}{pattern}", source.class);
        ShortString::try_new(key).unwrap_or_default()
    };
    if let (Some(registry), false) = (registry, changes.bind.is_empty()) {
        let noted = registry.note_bound(queue.as_str(), &changes.bind).await;
        noted.map_err(Fault::Other)?;
    }
    for pattern in &changes.bind {
        let (queue, exchange) = (queue.clone(), source.exchange.clone());
        let options = QueueBindOptions::default();
        let bound = channel.queue_bind(
            queue,
            exchange,
            key(pattern),
            options,
            FieldTable::default(),
        );
        answered(bound).await?;
    }
    for pattern in &changes.unbind {
        let (queue, exchange) = (queue.clone(), source.exchange.clone());
        let unbound = channel.queue_unbind(queue, exchange, key(pattern), FieldTable::default());
        answered(unbound).await?;
    }
    if let (Some(registry), false) = (registry, changes.unbind.is_empty()) {
        let forgotten = registry.forget_bound(queue.as_str(), &changes.unbind).await;
        forgotten.map_err(Fault::Other)?;
    }
    let operations = changes.bind.len() + changes.unbind.len();
    metrics::counter!("moorline_pubsub_binding_changes_total").increment(operations as u64);
    Ok(())
}

/// One consumer and what it has delivered.
struct Reading<'a> {
    source: &'a Source,
    feed: &'a FeedSource,
    channel: Channel,
    queue: ShortString,
    acks: Arc<Acks>,
    unacknowledged: BTreeSet<u64>,
}

impl Reading<'_> {
    async fn run(&mut self, mut consumer: Consumer) -> Ended {
        loop {
            let done = tokio::select! {
                biased;
                () = self.acks.changed() => self.acknowledge().await,
                () = self.feed.filters.changed() => self.bind().await,
                () = self.feed.deliveries.closed() => return self.finish(consumer).await,
                delivery = consumer.next() => match delivery {
                    Some(Ok(delivery)) => self.deliver(delivery).await,
                    Some(Err(error)) => Err(unavailable(error).into()),
                    None => Err(StoreError::Unavailable("RabbitMQ ended the consumer".into()).into()),
                },
            };
            if let Err(fault) = done {
                return Ended::Broken(fault);
            }
        }
    }

    async fn bind(&mut self) -> Result<(), Fault> {
        let (changes, number) = self.feed.filters.take();
        apply(self.source, &self.channel, &self.queue, changes).await?;
        self.feed.filters.in_force(number);
        Ok(())
    }

    async fn deliver(&mut self, mut delivery: Delivery) -> Result<(), Fault> {
        let tag = delivery.delivery_tag;
        let without = self.source.without.as_deref();
        if without.is_some_and(|origin| codec::is_from(&delivery, origin)) {
            self.unacknowledged.insert(tag);
            Ack::new(tag, &self.acks).done();
            return Ok(());
        }
        let Some(publication) = codec::decode(&mut delivery) else {
            metrics::counter!("moorline_pubsub_unreadable_total").increment(1);
            tracing::warn!(queue = %self.queue, "a message that no gateway published is put aside");
            let options = BasicNackOptions::default();
            return Ok(answered(self.channel.basic_nack(tag, options)).await?);
        };
        self.unacknowledged.insert(tag);
        let delivery = FeedDelivery {
            publication,
            ack: Ack::new(tag, &self.acks),
            given_back: codec::given_back(&delivery),
        };
        // There is room for as many as may be unacknowledged. After a reconnect the reader may still have those of before,
        // and then this waits for it. If it has gone, what was not sent goes to another.
        let _ = self.feed.deliveries.send(delivery).await;
        Ok(())
    }

    /// Tells the broker. What is done up to some delivery without a gap is told at once.
    async fn acknowledge(&mut self) -> Result<(), Fault> {
        let mut done = Vec::new();
        for (tag, is_done) in self.acks.take() {
            if !self.unacknowledged.remove(&tag) {
                continue;
            }
            if is_done {
                done.push(tag);
                continue;
            }
            if !matches!(self.source.queue, QueueKind::Bound { .. }) {
                // One by one they would come again in another order. The end of the channel gives all of them back.
                return Err(Fault::Other(StoreError::Unavailable(
                    "the reader let go of a publication".into(),
                )));
            }
            let options = BasicNackOptions {
                requeue: true,
                ..BasicNackOptions::default()
            };
            answered(self.channel.basic_nack(tag, options)).await?;
        }
        let first_open = self.unacknowledged.first().copied().unwrap_or(u64::MAX);
        let together = done.iter().copied().filter(|tag| *tag < first_open).max();
        if let Some(last) = together {
            let options = BasicAckOptions { multiple: true };
            answered(self.channel.basic_ack(last, options)).await?;
        }
        for tag in done.into_iter().filter(|tag| *tag > first_open) {
            let options = BasicAckOptions::default();
            answered(self.channel.basic_ack(tag, options)).await?;
        }
        Ok(())
    }

    /// The reader takes no more, but may still acknowledge: a member of a group has messages that it has not answered.
    async fn finish(&mut self, mut consumer: Consumer) -> Ended {
        let cancelled = self
            .channel
            .basic_cancel(consumer.tag(), BasicCancelOptions::default());
        if answered(cancelled).await.is_err() {
            return Ended::Closed;
        }
        while let Some(Ok(delivery)) = consumer.next().await {
            let options = BasicNackOptions {
                requeue: true,
                ..BasicNackOptions::default()
            };
            let returned = self.channel.basic_nack(delivery.delivery_tag, options);
            if answered(returned).await.is_err() {
                return Ended::Closed;
            }
        }
        while !self.unacknowledged.is_empty() {
            self.acks.changed().await;
            if self.acknowledge().await.is_err() {
                break;
            }
        }
        Ended::Closed
    }
}
