//! The start of an access node, which needs the store: where that is out of reach, the process waits until it is not.
//!
//! Machines of a cluster start in any order. A process that ended here would be started again and again by whatever watches it, and
//! say less than one that answers `/healthz`, names in `/readyz` what it waits for, and takes devices as soon as it can. Push services and
//! workers need no such wait: they start without the store, and are not ready until it answers.

use std::net::{SocketAddr, TcpListener as StdListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use moorline_access_node::{Access, AccessNode, Cluster, DelayRules, StartError};
use moorline_push_service::{Dependency, Findings, MetricsHandle, NodeApi, Readiness, ServeError};
use moorline_router::{Clock, NodeId, StoreError};
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::Role;
use super::backends::Backends;
use super::process::{Part, Stop, StopSignals};
use crate::Failure;
use crate::config::Config;

/// Between two attempts.
const AGAIN: Duration = Duration::from_secs(1);

/// What the parts of a process are started with.
pub(super) struct Start<'a> {
    pub(super) role: Role,
    /// Of this run.
    pub(super) id: NodeId,
    pub(super) config: &'a Config,
    pub(super) backends: &'a Backends,
    /// By which delayed jobs become due.
    pub(super) clock: Clock,
    /// Where the other services reach the node, if there are others.
    pub(super) internal: Option<SocketAddr>,
}

impl Start<'_> {
    /// Starts the node as soon as the store answers; `None` when the process was told to stop before. Meanwhile `http` answers whether
    /// the process is alive and what it waits for.
    pub(super) async fn node(
        &self,
        http: &StdListener,
        metrics: &MetricsHandle,
        signals: &mut StopSignals,
    ) -> Result<Option<AccessNode>, Failure> {
        let mut waiting: Option<Waiting> = None;
        let started = loop {
            let attempt = tokio::select! {
                attempt = Box::pin(self.attempt()) => attempt,
                () = signals.told() => break None,
            };
            let error = match attempt {
                Ok(node) => break Some(node),
                Err(StartError::Store(error @ StoreError::Unavailable(_)))
                    if self.backends.shared().is_some() =>
                {
                    error
                }
                Err(error) => return Err(error.into()),
            };
            match &waiting {
                Some(waiting) => drop(waiting.why.send_replace(error.to_string())),
                None => {
                    tracing::warn!(%error, "the store is out of reach, no devices are taken until it answers");
                    waiting = Some(self.wait_in_the_open(http, metrics, &error)?);
                }
            }
            tokio::select! {
                () = tokio::time::sleep(AGAIN) => {}
                () = signals.told() => break None,
            }
        };
        if let Some(waiting) = waiting {
            if started.is_some() {
                tracing::info!("the store answers");
            }
            let ended = waiting.http.end("HTTP requests still open").await;
            if let Some(ended) = ended.context("HTTP service")? {
                ended.context("HTTP service")?;
            }
            if let (Some(_), Some(shared)) = (&started, self.backends.shared()) {
                shared.warn().await;
            }
        }
        Ok(started)
    }

    async fn attempt(&self) -> Result<AccessNode, StartError> {
        let config = self.config;
        let access = Access {
            auth: config.auth.clone(),
            acl: config.acl.clone(),
            data_dir: config.data_dir.clone(),
        };
        let cluster = self.backends.shared().zip(self.internal);
        let cluster = cluster.map(|(shared, internal)| Cluster {
            shards: Arc::clone(shared.store()) as _,
            peers: Arc::clone(&shared.peers) as _,
            pubsub: Arc::clone(&shared.pubsub) as _,
            events: Arc::clone(&shared.events),
            address: match config.cluster.advertise.as_str() {
                "" => internal.to_string(),
                advertised => advertised.to_owned(),
            },
            region: config.cluster.region.clone(),
            server_reference: config.cluster.server_reference.clone(),
        });
        let (id, mqtt) = (self.id.clone(), config.mqtt.clone());
        let routes = config.upstream.routes();
        let delays = DelayRules {
            clock: self.clock.clone(),
            retry: config.delays.retry.policy(),
            delay_max: config.delays.device_delay_max,
            events: config.delays.topic_events(),
        };
        let stores = self.backends.stores();
        AccessNode::start(id, mqtt, access, stores, routes, delays, cluster).await
    }

    fn wait_in_the_open(
        &self,
        http: &StdListener,
        metrics: &MetricsHandle,
        error: &StoreError,
    ) -> anyhow::Result<Waiting> {
        let (why, said) = watch::channel(error.to_string());
        let node = Dependency::new("access node", move || {
            let reason = format!("not started, it waits for the store: {}", &*said.borrow());
            Box::pin(std::future::ready(Findings {
                reasons: vec![reason],
                warnings: Vec::new(),
            }))
        });
        let mut dependencies = self.backends.dependencies(self.role);
        dependencies.push(node);
        let api = NodeApi {
            config: self.config.http.clone(),
            keys: Vec::new(),
            metrics: metrics.clone(),
            readiness: Readiness {
                dependencies,
                ..Readiness::default()
            },
            drain: None,
        };
        let socket = http.try_clone().and_then(TcpListener::from_std);
        let socket = socket.context("http listener")?;
        let stop = Stop::new();
        let serving = moorline_push_service::serve_node_api(socket, api, stop.told());
        let http = Part {
            task: tokio::spawn(serving),
            stop,
        };
        Ok(Waiting { http, why })
    }
}

/// What `/readyz` says of a node that does not listen yet.
pub(super) fn taking_devices(taking: Arc<AtomicBool>) -> Dependency {
    Dependency::new("access node", move || {
        let mut found = Findings::default();
        if !taking.load(Ordering::Acquire) {
            let why = "started, and takes no devices yet: it waits for its shards";
            found.reasons.push(why.to_owned());
        }
        Box::pin(std::future::ready(found))
    })
}

/// The process has no node yet.
struct Waiting {
    http: Part<Result<(), ServeError>>,
    /// What the last attempt met with.
    why: watch::Sender<String>,
}
