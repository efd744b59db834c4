//! Pub/sub between nodes over a topic exchange.
//!
//! | queue | of | bound to | holds |
//! |---|---|---|---|
//! | `{prefix}.node.{node}.{n}` | one node, gone with its connection | what its devices want | QoS 0, 1, 2; the oldest go at the limit |
//! | `{prefix}.sessions.{shard}` | the persistent sessions of a shard | what they want with QoS 1 and 2 | QoS 1 and 2; refuses at the limit |
//! | `{prefix}.share.{hash}.{life}` | a group of a shared subscription | its filter | QoS 0, 1, 2; refuses at the limit |
//!
//! Read in this order: here, `codec`, `worker`.

mod codec;
mod worker;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lapin::ExchangeKind;
use lapin::options::QueueDeleteOptions;
use lapin::types::{FieldTable, ShortString};
use moorline_mqtt::QoS;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::link::answered;
use super::publisher::sender_hash;
use super::topology::Arguments;
use super::{Config, Declaration, Link, Publisher, Publishing, Topology};
use crate::pubsub::feed::FeedSource;
use crate::pubsub::routing_key::{LONG, Words, pattern, routing_key};
use crate::pubsub::{Feed, Filters, Group, GroupMember, PubSub, Publication, QueueRegistry};
use crate::{Fence, NodeId, StoreError};
use worker::{QueueKind, Source};

/// Patterns that a queue is bound to at most.
const PATTERNS_MAX: usize = 128;
/// Publications that a feed hands out before it is told what became of them.
const PREFETCH: u16 = 512;
/// A group's feed takes as much as its members may have unacknowledged, but what one node has taken no other can give.
const GROUP_PREFETCH: u16 = 256;
/// How long whoever begins a group has to make its queue, before another one does.
const DECLARED_TIMEOUT: Duration = Duration::from_secs(5);
const DECLARED_EVERY: Duration = Duration::from_millis(50);
/// Publishing connections. A sender has one of them.
const LANES: usize = 2;
/// Publications that wait for a node; beyond, the oldest go.
const NODE_QUEUE_MAX: i64 = 200_000;
const NODE_QUEUE_BYTES_MAX: i64 = 256 << 20;
/// What nobody could read.
const DEAD_MAX: i64 = 10_000;

/// Pub/sub over RabbitMQ.
pub struct RabbitPubSub {
    config: Config,
    /// Names this process in what it publishes.
    origin: Arc<str>,
    publisher: Arc<Publisher>,
    /// The node's own, on which its queue depends.
    node_link: Arc<Link>,
    consume_link: Arc<Link>,
    registry: Arc<dyn QueueRegistry>,
    exchange: ShortString,
    base: Vec<Declaration>,
    /// Groups whose queues this process has seen to.
    declared: Mutex<HashMap<Box<str>, u64>>,
}

impl RabbitPubSub {
    /// `origin` is the id of this process. Waits for nobody: while the broker is out of reach, publications wait.
    /// Works on the runtime that this is called in.
    pub fn open(config: &Config, origin: &NodeId, registry: Arc<dyn QueueRegistry>) -> Arc<Self> {
        let exchange = config.name("pubsub");
        let dead = config.name("pubsub.dead");
        let base = vec![
            Declaration::Exchange {
                name: exchange.clone(),
                kind: ExchangeKind::Topic,
            },
            Declaration::Exchange {
                name: dead.clone(),
                kind: ExchangeKind::Fanout,
            },
            Arguments::default()
                .with("x-max-length", DEAD_MAX)
                .of_queue(dead.clone()),
            Declaration::Binding {
                queue: dead.clone(),
                exchange: dead,
                routing_key: ShortString::default(),
            },
        ];
        let topology = Topology::new();
        topology.add(base.iter().take(1).cloned());
        let name = |what: &str| format!("{origin} {what}");
        Arc::new(Self {
            publisher: Publisher::new(config, &name("pub/sub out"), LANES, &topology),
            node_link: Link::new(config, &name("pub/sub in")),
            consume_link: Link::new(config, &name("pub/sub queues")),
            config: config.clone(),
            origin: origin.as_str().into(),
            registry,
            exchange,
            base,
            declared: Mutex::default(),
        })
    }

    /// Whether what is published goes out at once, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.publisher.is_connected()
    }

    /// A durable queue that refuses at its limits.
    fn queue(&self, name: &ShortString) -> Arguments {
        let dead = self.config.name("pubsub.dead");
        let limits = &self.config;
        debug_assert!(!name.as_str().is_empty());
        Arguments::quorum(limits.queue_messages_max, limits.queue_bytes_max)
            .with("x-dead-letter-exchange", dead.as_str())
    }

    fn topology(&self, more: impl IntoIterator<Item = Declaration>) -> Arc<Topology> {
        let topology = Topology::new();
        topology.add(self.base.iter().cloned());
        topology.add(more);
        topology
    }

    fn feed(&self, source: Source, filters: &[String]) -> Feed {
        let held = Filters::new(PATTERNS_MAX);
        for filter in filters {
            held.add(filter);
        }
        let capacity = usize::from(source.prefetch);
        let (feed, end): (Feed, FeedSource) = Feed::new(held, capacity);
        tokio::spawn(worker::run(source, end));
        feed
    }

    fn shard_queue(&self, shard: u16) -> ShortString {
        self.config.name(&format!("sessions.{shard}"))
    }

    fn group_queue(&self, group: &Group) -> ShortString {
        let hash = sender_hash(&group.filter);
        self.config
            .name(&format!("share.{hash:016x}.{}", group.generation))
    }

    /// The queue of a group, bound to its filter.
    fn group_topology(&self, group: &Group) -> Arc<Topology> {
        let queue = self.group_queue(group);
        let words = Words::of(plain_filter(&group.filter));
        let mut patterns = vec![pattern(&words.words, words.open)];
        patterns.extend(words.long.then(|| LONG.to_owned()));
        let bindings = patterns.into_iter().map(|pattern| Declaration::Binding {
            queue: queue.clone(),
            exchange: self.exchange.clone(),
            routing_key: ShortString::try_new(format!("*.{pattern}")).unwrap_or_default(),
        });
        let declared = self.queue(&queue).of_queue(queue.clone());
        self.topology(std::iter::once(declared).chain(bindings))
    }

    /// Whoever consumes from a quorum queue that another process is just making loses the connection over it.
    async fn await_declared(&self, group: &Group) -> Result<(), StoreError> {
        let given_up = Instant::now() + DECLARED_TIMEOUT;
        while !self.registry.is_declared(group).await? && Instant::now() < given_up {
            tokio::time::sleep(DECLARED_EVERY).await;
        }
        Ok(())
    }

    fn publishing(&self, publication: Publication) -> Publishing {
        let publish = &publication.publish;
        let key = routing_key(publish.topic.as_str(), publish.qos);
        Publishing {
            exchange: self.exchange.clone(),
            routing_key: ShortString::try_new(key).unwrap_or_default(),
            properties: codec::properties_of(&publication, &self.origin),
            persistent: publish.qos > QoS::AtMostOnce,
            mandatory: false,
            body: publish.payload.clone(),
            id: publication.id,
        }
    }
}

/// The filter behind the group.
fn plain_filter(text: &str) -> &str {
    let behind = text
        .strip_prefix("$share/")
        .and_then(|rest| rest.split_once('/'));
    behind.map_or(text, |(_, filter)| filter)
}

#[async_trait]
impl PubSub for RabbitPubSub {
    fn publish(
        &self,
        publication: Publication,
        fence: Option<&Fence>,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let sender = publication.from.as_ref().map_or("", |from| from.as_str());
        let sender = sender_hash(sender);
        self.publisher
            .publish(sender, self.publishing(publication), fence)
    }

    fn open_node_feed(&self) -> Feed {
        let mut arguments = FieldTable::default();
        let mut put = |name: &'static str, value| {
            let value = lapin::types::AMQPValue::LongLongInt(value);
            arguments.insert(name.into(), value);
        };
        put("x-max-length", NODE_QUEUE_MAX);
        put("x-max-length-bytes", NODE_QUEUE_BYTES_MAX);
        let source = Source {
            link: Arc::clone(&self.node_link),
            exchange: self.exchange.clone(),
            topology: self.topology([]),
            queue: QueueKind::Exclusive {
                prefix: format!("{}.node.{}", self.config.prefix, self.origin),
                arguments,
                made: 0,
            },
            class: "*.",
            prefetch: PREFETCH,
            without: Some(Arc::clone(&self.origin)),
        };
        self.feed(source, &[])
    }

    fn open_shard_feed(&self, shard: u16, filters: &[String]) -> Feed {
        let name = self.shard_queue(shard);
        // A holder that is frozen and does not know that it is none any more shares with nobody.
        let declared = self
            .queue(&name)
            .with("x-single-active-consumer", true)
            .of_queue(name.clone());
        let source = Source {
            link: Arc::clone(&self.consume_link),
            exchange: self.exchange.clone(),
            topology: self.topology([declared]),
            queue: QueueKind::Noted {
                name,
                registry: Arc::clone(&self.registry),
            },
            class: "1.",
            prefetch: PREFETCH,
            without: None,
        };
        self.feed(source, filters)
    }

    async fn join_group(&self, group: &str, member: &GroupMember) -> Result<Group, StoreError> {
        let known = self.declared.lock().get(group).copied();
        let name = member.to_string();
        let (joined, is_new) = self.registry.join(group, &name, known).await?;
        if let Some(generation) = known.filter(|known| *known != joined.generation) {
            // The notes were lost, and somebody who did not know of this life was first to begin another.
            let filter = group.into();
            self.registry.end(&Group { filter, generation }).await?;
        }
        if is_new || known != Some(joined.generation) {
            if !is_new {
                self.await_declared(&joined).await?;
            }
            let topology = self.group_topology(&joined);
            topology.declare(&self.consume_link, 0).await?;
            self.registry.note_declared(&joined).await?;
            let mut declared = self.declared.lock();
            declared.insert(group.into(), joined.generation);
        }
        Ok(joined)
    }

    async fn leave_group(&self, group: &str, member: &GroupMember) -> Result<(), StoreError> {
        self.declared.lock().remove(group);
        self.registry.leave(group, &member.to_string()).await
    }

    async fn groups_of(&self, member: &GroupMember) -> Result<Vec<String>, StoreError> {
        let member = member.to_string();
        let groups = self.registry.groups().await?;
        let of_it = groups
            .into_iter()
            .filter(|(_, members)| members.contains(&member));
        Ok(of_it.map(|(group, _)| group.filter.into()).collect())
    }

    fn open_group_feed(&self, group: &Group) -> Feed {
        let source = Source {
            link: Arc::clone(&self.consume_link),
            exchange: self.exchange.clone(),
            topology: self.group_topology(group),
            queue: QueueKind::Bound {
                name: self.group_queue(group),
            },
            class: "*.",
            prefetch: GROUP_PREFETCH,
            without: None,
        };
        self.feed(source, &[])
    }

    fn give_back(
        &self,
        group: &str,
        publication: Publication,
    ) -> BoxFuture<'static, Result<bool, StoreError>> {
        let registry = Arc::clone(&self.registry);
        let publisher = Arc::clone(&self.publisher);
        let publishing = self.publishing(publication);
        let (filter, prefix) = (group.to_owned(), self.config.clone());
        async move {
            let Some(group) = registry.group(&filter).await? else {
                return Ok(false);
            };
            let hash = sender_hash(&group.filter);
            let queue = prefix.name(&format!("share.{hash:016x}.{}", group.generation));
            let publishing = Publishing {
                exchange: ShortString::default(),
                routing_key: queue,
                mandatory: true,
                ..publishing
            };
            publisher.publish(hash, publishing, None).await?;
            Ok(true)
        }
        .boxed()
    }

    async fn sweep_groups(&self, alive: &[NodeId]) -> Result<(), StoreError> {
        for (group, members) in self.registry.groups().await? {
            for member in members {
                let is_gone = match GroupMember::from_text(&member) {
                    Some(GroupMember::Node(node)) => !alive.contains(&node),
                    Some(GroupMember::Shard(_)) => false,
                    None => true,
                };
                if is_gone {
                    self.registry.leave(&group.filter, &member).await?;
                }
            }
        }
        for group in self.registry.ended().await? {
            let channel = self.consume_link.channel().await?;
            let queue = self.group_queue(&group);
            let deleted = channel.queue_delete(queue, QueueDeleteOptions::default());
            let waiting = answered(deleted).await?;
            if waiting > 0 {
                let dropped = u64::from(waiting);
                metrics::counter!("moorline_pubsub_dropped_no_member_total").increment(dropped);
            }
            self.registry.forget(&group).await?;
        }
        Ok(())
    }
}
