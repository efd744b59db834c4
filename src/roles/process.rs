//! One process from the start of its parts to their end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use moorline_access_node::{AccessNode, Drain};
use moorline_delay_queue::{DelayQueue, Outlets};
use moorline_push_service::{
    ApiKeyRecord, Delays, MetricsHandle, NodeApi, PushService, Readiness, ServeError, Submitter,
};
use moorline_router::{NodeId, remote};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::backends::{Backends, SharedBackends};
use super::setup::{Listeners, taken};
use super::starting::{Start, taking_devices};
use super::{Role, say};
use crate::Failure;
use crate::config::Config;
use crate::welcome::{self, Addresses, ApiKey};

/// How long a part has to finish what it is doing.
const PART_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts the parts of `role`, and ends them when the process is told to.
pub(super) async fn run(
    role: Role,
    config: Config,
    listeners: Listeners,
    metrics: MetricsHandle,
) -> Result<(), Failure> {
    let mut signals = Signals::new().context("cannot wait for signals")?;
    let id = NodeId::for_this_run(&config.cluster.name);
    let backends = Backends::open(&config, &id).await?;
    let key = api_key(role, &config)?;
    let internal = listeners.internal.as_ref().map(taken).transpose()?;
    let start = Start {
        role,
        id,
        config: &config,
        backends: &backends,
        clock: backends.clock().await,
        internal,
    };
    let mut node = None;
    if role.has_devices() {
        let started = start.node(&listeners.http, &metrics, &mut signals.stop);
        node = Box::pin(started).await?;
        if node.is_none() {
            return end(backends).await;
        }
    }
    let process = Process::start(start, node, listeners, metrics, &key);
    let process = Box::pin(process).await?;
    say(&match (&key, config.is_cluster()) {
        (Some(key), false) => welcome::text(&process.addresses, &config.data_dir, key),
        _ => welcome::lines(&process.addresses),
    });
    process.wait(&mut signals).await;
    process.stop(&mut signals).await?;
    end(backends).await
}

async fn end(backends: Backends) -> Result<(), Failure> {
    backends.close().await?;
    tracing::info!("stopped");
    Ok(())
}

/// The key beside those of the configuration. Several services know the same one, so that none is made here for them.
fn api_key(role: Role, config: &Config) -> Result<Option<ApiKey>, Failure> {
    let wrong = |error: anyhow::Error| Failure::Usage(format!("{error:#}"));
    if !config.is_cluster() {
        return welcome::api_key(&config.data_dir).map(Some).map_err(wrong);
    }
    let known = welcome::known_api_key(&config.data_dir).map_err(wrong)?;
    if known.is_none() && role.has_api() && config.http.keys.is_empty() {
        return Err(Failure::Usage(format!(
            "moorline {} has no API key, and one that it makes up is known to no other push service: set {} to the same key \
             everywhere, or list keys in [[http.keys]]",
            role.name(),
            welcome::KEY_VARIABLE
        )));
    }
    Ok(known)
}

/// Told by the system.
struct Signals {
    stop: StopSignals,
    /// Files are to be read again.
    hangup: Signal,
}

/// The process is to stop.
pub(super) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            stop: StopSignals {
                terminate: signal(SignalKind::terminate())?,
                interrupt: signal(SignalKind::interrupt())?,
            },
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

impl StopSignals {
    pub(super) async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!("SIGTERM, stopping"),
            _ = self.interrupt.recv() => tracing::info!("interrupted, stopping"),
        }
    }
}

/// Tells a part to stop.
pub(super) struct Stop(watch::Sender<()>);

impl Stop {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(()))
    }

    /// Resolves when this is dropped.
    pub(super) fn told(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut told = self.0.subscribe();
        async move {
            // An error says that the sender is gone, which is the signal.
            let _ = told.changed().await;
        }
    }
}

/// A part that runs by itself until it is told to stop.
pub(super) struct Part<T> {
    pub(super) stop: Stop,
    pub(super) task: JoinHandle<T>,
}

impl<T> Part<T> {
    /// Tells it to stop, and waits for as long as a part may take.
    pub(super) async fn end(self, unfinished: &str) -> anyhow::Result<Option<T>> {
        drop(self.stop);
        match tokio::time::timeout(PART_TIMEOUT, self.task).await {
            Ok(ended) => Ok(Some(ended?)),
            Err(_) => {
                tracing::warn!("{unfinished} after {PART_TIMEOUT:?}");
                Ok(None)
            }
        }
    }
}

/// The parts that run.
struct Process {
    addresses: Addresses,
    node: Option<AccessNode>,
    internal: Option<Part<Result<(), remote::ServeError>>>,
    http: Part<Result<(), ServeError>>,
    worker: Option<Part<()>>,
    delays: Option<Part<Result<(), String>>>,
    draining: Arc<AtomicBool>,
    drain_asked: Arc<Notify>,
    /// Where there are other nodes that devices can go to.
    drain: Option<Drain>,
}

impl Process {
    async fn start(
        start: Start<'_>,
        mut node: Option<AccessNode>,
        listeners: Listeners,
        metrics: MetricsHandle,
        key: &Option<ApiKey>,
    ) -> Result<Self, Failure> {
        let Start {
            role,
            id,
            config,
            backends,
            clock,
            ..
        } = start;
        let Listeners {
            devices,
            internal,
            http,
        } = listeners;
        let addresses = Addresses {
            devices: devices.iter().map(|device| device.taken).collect(),
            internal: internal.as_ref().map(taken).transpose()?,
            http: taken(&http)?,
        };
        let mut internal_part = None;
        if let (Some(node), Some(socket), Some(shared)) = (&node, internal, backends.shared()) {
            shared.peers.attach(id.clone(), node.local_nodes());
            let socket = TcpListener::from_std(socket).context("internal listener")?;
            internal_part = Some(serve_internal(socket, node, shared));
        }
        let draining = Arc::new(AtomicBool::new(false));
        let drain_asked = Arc::new(Notify::new());
        let http = TcpListener::from_std(http).context("http listener")?;
        let mut dependencies = backends.dependencies(role);
        let taking = Arc::new(AtomicBool::new(false));
        if node.is_some() {
            dependencies.push(taking_devices(Arc::clone(&taking)));
        }
        let readiness = Readiness {
            draining: Arc::clone(&draining),
            dependencies,
        };
        let key = key.as_ref();
        let keys =
            key.map(|key| ApiKeyRecord::with_every_scope(ApiKeyRecord::DEFAULT_NAME, &key.key));
        let keys: Vec<_> = keys.into_iter().collect();
        let stop = Stop::new();
        let nodes = match (&node, backends.shared()) {
            (Some(node), _) => node.nodes(),
            (None, Some(shared)) => Arc::clone(&shared.peers) as _,
            (None, None) => unreachable!("a part alone has shared stores"),
        };
        let submitter = Arc::new(Submitter::new(backends.stores(), Arc::clone(&nodes)));
        let http = if role.has_api() {
            let service = PushService {
                config: config.http.clone(),
                stores: backends.stores(),
                nodes: Arc::clone(&nodes),
                upstream: backends.upstream_reading(config),
                keys,
                metrics,
                readiness,
                device_topics: config.mqtt.device_topics.clone(),
                submitter: Arc::clone(&submitter),
                delays: Delays {
                    clock: clock.clone(),
                    retry: config.delays.retry.policy(),
                    amqp: config.rabbitmq.is_on(),
                },
            };
            tokio::spawn(moorline_push_service::serve(http, service, stop.told()))
        } else {
            let api = NodeApi {
                config: config.http.clone(),
                keys,
                metrics,
                readiness,
                drain: node.is_some().then(|| Arc::clone(&drain_asked)),
            };
            tokio::spawn(moorline_push_service::serve_node_api(
                http,
                api,
                stop.told(),
            ))
        };
        let http = Part { stop, task: http };
        let worker = role.works().then(|| {
            let stop = Stop::new();
            let bus = backends.stores().upstream;
            let run = moorline_upstream_worker::run(bus, config.upstream.clone(), stop.told());
            Part {
                task: tokio::spawn(run),
                stop,
            }
        });
        let delays = role.fires().then(|| {
            let stop = Stop::new();
            let queue = DelayQueue {
                config: config.delays.clone(),
                holder: id.clone(),
                jobs: backends.stores().jobs,
                clock,
                outlets: Outlets {
                    submitter,
                    http: config.http.clone(),
                    device_topics: config.mqtt.device_topics.clone(),
                    nodes,
                    upstream: backends.stores().upstream,
                    routes: config.upstream.routes(),
                    publisher: backends.job_publisher(config),
                },
                rabbit: config.rabbitmq.is_on().then(|| config.rabbitmq.clone()),
            };
            Part {
                task: tokio::spawn(moorline_delay_queue::run(queue, stop.told())),
                stop,
            }
        });
        if let Some(node) = &mut node {
            node.settle_in().await;
            for device in devices {
                let listening = node.listen(&device.socket, device.settings);
                listening.context("cannot take devices")?;
            }
            taking.store(true, Ordering::Release);
        }
        let drain = &config.cluster.drain;
        Ok(Self {
            addresses,
            node,
            internal: internal_part,
            http,
            worker,
            delays,
            draining,
            drain_asked,
            drain: config.is_cluster().then_some(Drain {
                rate: drain.rate,
                timeout: drain.timeout,
            }),
        })
    }

    /// Until the process is told to stop.
    async fn wait(&self, signals: &mut Signals) {
        loop {
            tokio::select! {
                () = signals.stop.told() => return,
                _ = signals.hangup.recv() => {
                    if let Some(node) = &self.node {
                        node.reload_certificates();
                    }
                }
                () = self.drain_asked.notified() => {
                    tracing::info!("asked to drain");
                    tokio::select! {
                        () = self.drain() => tracing::info!("drained, waiting to be stopped"),
                        () = signals.stop.told() => return,
                    }
                }
            }
        }
    }

    /// Takes nothing new, and parts with the devices where they have somewhere to go.
    async fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        if let (Some(node), Some(drain)) = (&self.node, self.drain) {
            node.drain(drain).await;
        }
    }

    async fn stop(self, signals: &mut Signals) -> anyhow::Result<()> {
        tokio::select! {
            () = self.drain() => {}
            () = signals.stop.told() => tracing::warn!("told again: the devices that are still here are disconnected"),
        }
        // What is under way may still need everything else.
        if let Some(delays) = self.delays {
            let ended = delays.end("delayed jobs still under way").await;
            if let Some(Err(error)) = ended.context("delay queue")? {
                tracing::error!(%error, "the delay queue did not work");
            }
        }
        // Pushes first, so that nothing is accepted that nobody could deliver any more.
        let http = self.http.end("HTTP requests still open").await;
        if let Some(ended) = http.context("HTTP service")? {
            ended.context("HTTP service")?;
        }
        if let Some(node) = self.node {
            node.stop().await;
        }
        if let Some(internal) = self.internal
            && let Some(ended) = internal.end("internal calls still open").await?
        {
            ended?;
        }
        if let Some(worker) = self.worker {
            let ended = worker.end("backend calls still open").await;
            ended.context("upstream worker")?;
        }
        Ok(())
    }
}

fn serve_internal(
    socket: TcpListener,
    node: &AccessNode,
    shared: &SharedBackends,
) -> Part<Result<(), remote::ServeError>> {
    let stop = Stop::new();
    let security = shared.security.clone();
    let serving = remote::serve(socket, node.local_nodes(), security, stop.told());
    Part {
        task: tokio::spawn(serving),
        stop,
    }
}
