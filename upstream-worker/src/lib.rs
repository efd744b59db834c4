//! Hands what devices sent to HTTP backends.
//!
//! One task a rule and partition: fetch a page, call the backend for each message in order, settle it. It keeps
//! nothing: what is not settled is read again after a restart, so a backend may see a message twice, under
//! the same `webhook-id`.
//!
//! ```text
//! bus ─▶ worker (partition) ─▶ rule ─▶ call ─▶ backend
//!                └────────── settle: done, or dead letter
//! ```
//!
//! Read in this order: [`config`], `rule` (what a message becomes as a request), [`webhook`] (how it says who it is), [`call`] (one attempt and what its
//! end means), [`mod@backoff`] (when to try again), `breaker` (when no attempts are made), `worker` (order, retries, settling).
//! Delayed jobs are calls to backends, too, and use [`call`], [`webhook`] and [`mod@backoff`].

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "tests"))]

pub mod backoff;
mod breaker;
pub mod call;
pub mod config;
mod rule;
pub mod webhook;
mod worker;

use std::sync::Arc;

use moorline_router::UpstreamBus;
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use config::{Config, Retry, Rule};

/// Works until `shutdown` resolves; calls that run then have 5 seconds to end. `config` must be valid.
pub async fn run(
    bus: Arc<dyn UpstreamBus>,
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) {
    let (stop_sender, stop) = watch::channel(false);
    let mut tasks = JoinSet::new();
    match worker::partitions(&bus, &config, &stop) {
        Ok(workers) => {
            for worker in workers {
                tasks.spawn(worker.run());
            }
        }
        Err(error) => tracing::error!(%error, "upstream rules cannot be worked on"),
    }
    shutdown.await;
    stop_sender.send_replace(true);
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "an upstream partition ended badly");
        }
    }
}
