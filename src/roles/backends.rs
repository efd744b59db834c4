//! The stores of a process: embedded ones on a single machine, else those that it shares with the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use moorline_push_service::{Dependency, Findings, UpstreamReading};
use moorline_router::embedded::EmbeddedStore;
use moorline_router::pubsub::TopicPushes;
use moorline_router::rabbit::{Publisher, RabbitEvents, RabbitPubSub, RabbitUpstream, Topology};
use moorline_router::redis::{Health, RedisStore};
use moorline_router::remote::{RemoteNodes, Security};
use moorline_router::{Clock, Events, NodeId, Stores, unix_ms};

use super::Role;
use crate::Failure;
use crate::config::Config;

/// How long a process that stops waits for Redis to answer what it was sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a process that starts waits for Redis to say how it is configured.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// How often the clock of delayed jobs is compared with that of their store.
const CLOCK_INTERVAL: Duration = Duration::from_secs(2);
/// Longest time that the store may take to answer, for its answer to be of use.
const CLOCK_DELAY_MAX: Duration = Duration::from_millis(100);

/// Where everything is kept that is to outlive the process.
pub(super) enum Backends {
    /// On this machine, for this process alone.
    Embedded(Arc<EmbeddedStore>),
    /// On Redis and RabbitMQ, shared with other processes.
    Shared(Box<SharedBackends>),
}

/// What the processes of a deployment share.
pub(super) struct SharedBackends {
    store: Arc<RedisStore>,
    upstream: Arc<RabbitUpstream>,
    stores: Stores,
    pub(super) pubsub: Arc<RabbitPubSub>,
    pub(super) events: Arc<dyn Events>,
    /// The access nodes of other processes.
    pub(super) peers: Arc<RemoteNodes>,
    pub(super) security: Security,
}

impl Backends {
    /// Opens what the configuration names. `id` is that of this run.
    pub(super) async fn open(config: &Config, id: &NodeId) -> Result<Self, Failure> {
        if !config.is_cluster() {
            if config.rabbitmq.is_on() {
                tracing::info!(
                    "RabbitMQ is for delayed jobs only, as redis.url is not set: everything is kept in the data directory"
                );
            }
            let mut store = config.store.clone();
            store.data_dir.clone_from(&config.data_dir);
            store.jobs = config.delays.kept.clone();
            let store = EmbeddedStore::open(store);
            let store = store.map_err(|error| Failure::Usage(error.to_string()))?;
            return Ok(Self::Embedded(store));
        }
        let shared = SharedBackends::open(config, id)?;
        shared.warn().await;
        Ok(Self::Shared(Box::new(shared)))
    }

    pub(super) fn stores(&self) -> Stores {
        match self {
            Self::Embedded(store) => store.stores(),
            Self::Shared(shared) => shared.stores.clone(),
        }
    }

    /// Where callers of the API read what no upstream rule takes.
    pub(super) fn upstream_reading(&self, config: &Config) -> UpstreamReading {
        match self {
            Self::Embedded(store) => UpstreamReading::Here(Arc::clone(store)),
            Self::Shared(_) => {
                let queue = config.rabbitmq.name("upstream");
                UpstreamReading::Queue(queue.to_string())
            }
        }
    }

    pub(super) fn shared(&self) -> Option<&SharedBackends> {
        match self {
            Self::Embedded(_) => None,
            Self::Shared(shared) => Some(shared),
        }
    }

    /// The clock by which delayed jobs become due. Where jobs are shared, it follows that of their store.
    pub(super) async fn clock(&self) -> Clock {
        let Self::Shared(shared) = self else {
            return Clock::of_machine();
        };
        let jobs = Arc::clone(&shared.stores.jobs);
        let first = tokio::time::timeout(HEALTH_TIMEOUT, jobs.time()).await;
        let first_ms = match first {
            Ok(Ok(first_ms)) => first_ms,
            // It is corrected as soon as the store answers; until then nothing can be claimed.
            _ => unix_ms(),
        };
        let clock = Clock::following(first_ms);
        let follower = clock.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(CLOCK_INTERVAL).await;
                let asked = Instant::now();
                // An answer that took long says what the time was.
                if let Ok(now_ms) = jobs.time().await
                    && asked.elapsed() <= CLOCK_DELAY_MAX
                {
                    follower.observe(now_ms);
                }
            }
        });
        clock
    }

    /// The way of delayed jobs to RabbitMQ, where there is one.
    pub(super) fn job_publisher(&self, config: &Config) -> Option<Arc<Publisher>> {
        config
            .rabbitmq
            .is_on()
            .then(|| Publisher::new(&config.rabbitmq, "moorline delays", 1, &Topology::new()))
    }

    /// What `/readyz` looks at.
    pub(super) fn dependencies(&self, role: Role) -> Vec<Dependency> {
        match self {
            Self::Embedded(store) => vec![Dependency::embedded(Arc::clone(store))],
            Self::Shared(shared) => shared.dependencies(role),
        }
    }

    /// Ends after everything that was written is safe.
    pub(super) async fn close(self) -> anyhow::Result<()> {
        match self {
            Self::Embedded(store) => tokio::task::spawn_blocking(move || store.close())
                .await?
                .context("cannot close the store"),
            Self::Shared(shared) => {
                shared.upstream.close().await;
                let flushed = tokio::time::timeout(FLUSH_TIMEOUT, shared.store.flush()).await;
                if flushed.is_err() {
                    tracing::warn!("Redis did not answer everything that it was sent");
                }
                Ok(())
            }
        }
    }
}

impl SharedBackends {
    fn open(config: &Config, id: &NodeId) -> Result<Self, Failure> {
        let usage = |error: String| Failure::Usage(error);
        let security = config.cluster.security().map_err(usage)?;
        let store = RedisStore::open(&config.redis, config.shared_limits());
        let store = store.map_err(|error| Failure::Usage(format!("redis: {error}")))?;
        let pubsub = RabbitPubSub::open(&config.rabbitmq, id, Arc::clone(&store) as _);
        let events = RabbitEvents::open(&config.rabbitmq);
        let upstream = RabbitUpstream::open(&config.rabbitmq, id.as_str(), Arc::clone(&store));
        let stores = Stores {
            routes: Arc::clone(&store) as _,
            inboxes: Arc::clone(&store) as _,
            sessions: Arc::clone(&store) as _,
            retained: Arc::clone(&store) as _,
            bans: Arc::clone(&store) as _,
            upstream: Arc::clone(&upstream) as _,
            jobs: store.jobs(),
        };
        let pushes = TopicPushes {
            pubsub: Arc::clone(&pubsub) as _,
            retained: Arc::clone(&stores.retained),
            inboxes: Arc::clone(&stores.inboxes),
            routes: Arc::clone(&stores.routes),
            device_topics: config.mqtt.device_topics.clone(),
        };
        let peers = RemoteNodes::new(Arc::clone(&stores.routes), security.clone());
        Ok(Self {
            store,
            upstream,
            stores,
            pubsub,
            events,
            peers: Arc::new(peers.publishing_over(pushes)),
            security,
        })
    }

    fn dependencies(&self, role: Role) -> Vec<Dependency> {
        let store = Arc::clone(&self.store);
        let redis = Dependency::new("redis", move || {
            let store = Arc::clone(&store);
            Box::pin(async move {
                let Health { reasons, warnings } = store.health().await;
                Findings { reasons, warnings }
            })
        });
        let (pubsub, upstream) = (Arc::clone(&self.pubsub), Arc::clone(&self.upstream));
        let rabbitmq = Dependency::new("rabbitmq", move || {
            let mut found = Findings::default();
            if !pubsub.is_connected() || !upstream.is_connected() {
                // Devices may come and be pushed to without it.
                let (to, what) = match role {
                    Role::UpstreamWorker => (&mut found.reasons, "there is nothing to do"),
                    Role::DelayQueue => (&mut found.warnings, "jobs that publish to it wait"),
                    _ => (&mut found.warnings, "what devices publish waits"),
                };
                to.push(format!("it is out of reach: {what}"));
            }
            Box::pin(std::future::ready(found))
        });
        vec![redis, rabbitmq]
    }

    /// Says once what weakens the promises.
    pub(super) async fn warn(&self) {
        let health = tokio::time::timeout(HEALTH_TIMEOUT, self.store.health()).await;
        for warning in health.map(|health| health.warnings).unwrap_or_default() {
            tracing::warn!("redis: {warning}");
        }
    }

    pub(super) fn store(&self) -> &Arc<RedisStore> {
        &self.store
    }
}
