//! The HTTP API: pushes, receipts, clients, what devices sent, dead letters.
//!
//! Stateless: what it promises is kept in the router's stores, and the way to a device is the router's
//! [`Nodes`]. It never opens a socket to a device and knows nothing of MQTT but topic names and properties.
//!
//! Read in this order: [`push`] (the one door through which every push goes), `request` (what the JSON of a push, a
//! delayed job and an event may say), [`delayed`] (what a delayed job does), `api` (one file a resource), [`problem`] (every other answer), [`keys`] (who may), `connections` (whose sockets),
//! `readiness` (whether new work is taken), `node_api` (what processes have instead that are no push service).

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod api;
pub mod config;
mod connections;
pub mod delayed;
pub mod keys;
mod metrics;
mod node_api;
pub mod problem;
pub mod push;
mod readiness;
mod request;

use std::sync::Arc;
use std::time::Duration;

use moorline_router::embedded::EmbeddedStore;
use moorline_router::{Clock, Nodes, RetryPolicy, Stores};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use config::Config;
pub use keys::{ApiKeyRecord, Scope};
pub use metrics::{MetricsHandle, install_metrics};
pub use node_api::{NodeApi, serve_node_api};
pub use push::Submitter;
pub use readiness::{Dependency, Findings, Readiness};

/// How often what was recorded is folded into the histograms' buckets.
const FOLD_INTERVAL: Duration = Duration::from_secs(5);

/// What the HTTP API is given.
pub struct PushService {
    /// The `[http]` section; must be valid.
    pub config: Config,
    /// The router's stores.
    pub stores: Stores,
    /// The way to the access nodes.
    pub nodes: Arc<dyn Nodes>,
    /// Where callers read what no upstream rule takes.
    pub upstream: UpstreamReading,
    /// Keys beside those of the configuration.
    pub keys: Vec<ApiKeyRecord>,
    /// What `/metrics` renders.
    pub metrics: MetricsHandle,
    /// What `/readyz` says.
    pub readiness: Readiness,
    /// The first level of the topics that belong to one device: `d` in `d/{client}/push`.
    pub device_topics: String,
    /// The one door for pushes.
    pub submitter: Arc<Submitter>,
    /// What is said of delayed jobs.
    pub delays: Delays,
}

/// What the HTTP API knows of delayed jobs.
#[derive(Debug, Clone)]
pub struct Delays {
    /// The clock by which they become due.
    pub clock: Clock,
    /// For jobs that say nothing of it.
    pub retry: RetryPolicy,
    /// Whether they may publish to RabbitMQ.
    pub amqp: bool,
}

/// Where what devices sent and no upstream rule takes is read.
pub enum UpstreamReading {
    /// From `/v1/upstream`, which reads the bus of a single machine.
    Here(Arc<EmbeddedStore>),
    /// From this queue of RabbitMQ.
    Queue(String),
}

/// Why the HTTP API ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The listener failed.
    #[error("the http listener failed: {0}")]
    Listener(#[from] std::io::Error),
}

/// Serves until `shutdown` resolves, then finishes the requests in flight for at most
/// `http.shutdown_timeout`; long polls and event streams end at once.
pub async fn serve(
    listener: TcpListener,
    service: PushService,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), ServeError> {
    let shutdown_timeout = service.config.shutdown_timeout;
    let limits = service.config.limits();
    let metrics = service.metrics.clone();
    let (stop_sender, stop) = watch::channel(false);
    let app = api::app(service, stop.clone()).map_err(ServeError::Config)?;
    let server = connections::run(listener, app, limits, stop);
    until_stopped(server, stop_sender, shutdown, shutdown_timeout, metrics).await
}

/// Runs `server` until `shutdown`, then for at most `shutdown_timeout` until it has answered what it has.
async fn until_stopped(
    server: impl Future<Output = std::io::Result<()>>,
    stop_sender: watch::Sender<bool>,
    shutdown: impl Future<Output = ()>,
    shutdown_timeout: Duration,
    metrics: MetricsHandle,
) -> Result<(), ServeError> {
    let stopping = async move {
        shutdown.await;
        stop_sender.send_replace(true);
        tokio::time::sleep(shutdown_timeout).await;
    };
    let folding = async move {
        loop {
            tokio::time::sleep(FOLD_INTERVAL).await;
            metrics.fold();
        }
    };
    tokio::select! {
        result = server => result?,
        () = stopping => tracing::warn!("requests in flight were cut off at the end of http.shutdown_timeout"),
        () = folding => {}
    }
    Ok(())
}
