//! Carries out delayed jobs when they are due.
//!
//! ```text
//! store ─▶ runner (shards: sleep, claim) ─▶ attempt (lease, retries) ─▶ hands (check, push, webhook, AMQP, publish)
//!   ▲                                             │
//!   └── settle: fired, skipped, retrying, put off, failed ◀┘
//! ```
//!
//! It keeps nothing: a job is the store's until it is settled, and what is claimed and not settled is claimed again when
//! its lease has ended. A job is then carried out twice, under the same ids. Nothing is ever early: a job
//! is handed out by the store when its time has come by the one clock of the deployment, and not before.
//!
//! Read in this order: [`config`], `runner` (which jobs, and how many at once), `rate` (how fast), `attempt` (what becomes of one),
//! `hands` (what it does), `hosts` (how many calls of one backend), `notify` (who is told), `bindings` (events from RabbitMQ).

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

mod attempt;
mod bindings;
pub mod config;
mod hands;
mod hosts;
mod metrics;
mod notify;
mod rate;
mod runner;

use std::sync::Arc;

use moorline_push_service::Submitter;
use moorline_router::rabbit::{self, Publisher};
use moorline_router::upstream::UpstreamRoutes;
use moorline_router::{Clock, Jobs, NodeId, Nodes, UpstreamBus};

pub use config::{Config, Retry};

/// What the delay queue is given.
pub struct DelayQueue {
    /// The `[delays]` section; must be valid.
    pub config: Config,
    /// This run of the process.
    pub holder: NodeId,
    /// The jobs.
    pub jobs: Arc<dyn Jobs>,
    /// The clock by which they become due.
    pub clock: Clock,
    /// The ways out.
    pub outlets: Outlets,
    /// Where events come from beside the API and the devices, if there is one.
    pub rabbit: Option<rabbit::Config>,
}

/// The ways by which a job does something.
pub struct Outlets {
    /// The one door for pushes.
    pub submitter: Arc<Submitter>,
    /// The `[http]` section: what a push may be.
    pub http: moorline_push_service::Config,
    /// The first level of the topics that belong to one device.
    pub device_topics: String,
    /// Where devices' delayed publications go.
    pub nodes: Arc<dyn Nodes>,
    /// And where, if they go upstream.
    pub upstream: Arc<dyn UpstreamBus>,
    /// Which of them go upstream.
    pub routes: UpstreamRoutes,
    /// To RabbitMQ, where there is one.
    pub publisher: Option<Arc<Publisher>>,
}

/// Works until `shutdown` resolves. What is claimed then has 5 seconds to end, and is given back if it does not.
///
/// # Errors
/// When the configuration cannot be worked with.
pub async fn run(
    queue: DelayQueue,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), String> {
    runner::run(queue, shutdown).await
}
