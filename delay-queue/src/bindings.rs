//! Events that come from RabbitMQ: a queue for each binding, bound to an exchange of the operator's.
//!
//! A message is acknowledged when its event is durable and told to every job that it names; what this process did not get to
//! comes again. Processes share the queue. A message without the type or the key that the binding asks for is refused, and counted.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions, BasicRejectOptions,
};
use lapin::types::{FieldTable, ShortString};
use metrics::{Counter, counter, describe_counter};
use moorline_router::jobs::{EventSource, event_of_message};
use moorline_router::rabbit::topology::Arguments;
use moorline_router::rabbit::{self, Declaration, Link, Topology};
use moorline_router::{Clock, Jobs, MessageId, StoreError};

use crate::config::{self, Config};

/// Messages that one process has taken and not acknowledged.
const PREFETCH: u16 = 64;
/// Wait after the broker or the store failed.
const RETRY: Duration = Duration::from_secs(1);

/// One binding, ready for work.
pub(crate) struct Binding {
    name: String,
    source: EventSource,
    queue: ShortString,
    declarations: Vec<Declaration>,
    link: Arc<Link>,
    jobs: Arc<dyn Jobs>,
    clock: Clock,
    told: Counter,
    refused: Counter,
}

/// Every binding of a valid configuration.
pub(crate) fn all(
    config: &Config,
    rabbit: &rabbit::Config,
    jobs: &Arc<dyn Jobs>,
    clock: &Clock,
) -> Result<Vec<Binding>, String> {
    describe_counter!(
        "moorline_delay_events_total",
        "Messages of RabbitMQ by binding and by what became of them"
    );
    let bindings = config.bindings.iter();
    bindings
        .map(|binding| Binding::new(binding, rabbit, jobs, clock))
        .collect()
}

impl Binding {
    fn new(
        binding: &config::Binding,
        rabbit: &rabbit::Config,
        jobs: &Arc<dyn Jobs>,
        clock: &Clock,
    ) -> Result<Self, String> {
        let queue = rabbit.name(&format!("delay-events.{}", binding.name));
        let arguments = Arguments::quorum(rabbit.queue_messages_max, rabbit.queue_bytes_max);
        let mut declarations = vec![arguments.of_queue(queue.clone())];
        declarations.extend(binding.routing_keys.iter().map(|key| Declaration::Binding {
            queue: queue.clone(),
            exchange: binding.exchange.as_str().into(),
            routing_key: key.as_str().into(),
        }));
        let count = |result: &'static str| counter!("moorline_delay_events_total", "binding" => binding.name.clone(), "result" => result);
        Ok(Self {
            name: binding.name.clone(),
            source: binding.parse()?,
            queue,
            declarations,
            link: Link::new(rabbit, "moorline delay events"),
            jobs: Arc::clone(jobs),
            clock: clock.clone(),
            told: count("told"),
            refused: count("refused"),
        })
    }

    /// Until it is dropped.
    pub(crate) async fn run(self) {
        let mut failed = false;
        loop {
            if let Err(error) = self.consume(&mut failed).await
                && !failed
            {
                failed = true;
                tracing::warn!(binding = self.name, %error, "no events come from RabbitMQ, trying again");
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Until the channel ends.
    async fn consume(&self, failed: &mut bool) -> Result<(), StoreError> {
        let lost = |error: lapin::Error| StoreError::Unavailable(format!("RabbitMQ: {error}"));
        Topology::ensure(&self.link, &self.declarations).await?;
        let channel = self.link.channel().await?;
        let prefetch = channel.basic_qos(PREFETCH, BasicQosOptions::default());
        prefetch.await.map_err(lost)?;
        let consumer = channel.basic_consume(
            self.queue.clone(),
            ShortString::default(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let consumer = consumer.await.map_err(lost)?;
        *failed = false;
        let ended = consumer.for_each_concurrent(usize::from(PREFETCH), async |delivery| {
            if let Ok(delivery) = delivery {
                self.take(delivery).await;
            }
        });
        ended.await;
        // A queue that was deleted ends a consumer, too, and leaves the connection as it is.
        drop(channel);
        Ok(())
    }

    async fn take(&self, delivery: Delivery) {
        let key = delivery.routing_key.as_str().to_owned();
        let words: Vec<_> = key.split('.').collect();
        let Some(name) = self.source.name(&words, &delivery.data) else {
            self.refused.increment(1);
            tracing::debug!(
                binding = self.name,
                routing_key = key,
                "a message has no event"
            );
            let _ = delivery.acker.reject(BasicRejectOptions::default()).await;
            return;
        };
        let given = delivery.properties.message_id().as_ref();
        let id = given
            .and_then(|id| MessageId::parse(id.as_str()).ok())
            .unwrap_or_else(MessageId::generate);
        let event = event_of_message(name, &id, self.clock.now_ms());
        // An acknowledgement that is lost with the connection brings the message again, which changes nothing twice.
        let settled = match self.jobs.event(&event).await {
            Ok(_) => {
                self.told.increment(1);
                delivery.acker.ack(BasicAckOptions::default()).await
            }
            Err(error) => {
                tracing::debug!(binding = self.name, %error, "an event is not told yet");
                tokio::time::sleep(RETRY).await;
                let requeue = BasicNackOptions {
                    requeue: true,
                    ..BasicNackOptions::default()
                };
                delivery.acker.nack(requeue).await
            }
        };
        if let Err(error) = settled {
            tracing::debug!(binding = self.name, %error, "a message is not settled, it comes again");
        }
    }
}
