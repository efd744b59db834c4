//! The backend of many machines: the seams over Redis, single, behind sentinels, or as a cluster.
//!
//! ```text
//! writes ──▶ link ──▶ lanes (order, pipelines) ──┐
//!                                                ├──▶ flight (slots, refusals, replicas) ──▶ port (one connection)
//! reads ───▶ link ───────────────────────────────┘
//! ```
//!
//! State that belongs together is in one slot and changes in one Lua function (`lua/`, each with a test of its own). What
//! spans slots is written in an order that leaves at most a harmless orphan when the writer dies in between. Nothing
//! here is kept between calls but the leases of nodes, for less than a second.
//!
//! Read in this order: `config`, `keys`, `script`, `link`, `lanes`, `flight`, `port`, then the files of the seams.

mod config;
mod finder;
mod flight;
mod inbox_answer;
mod inbox_calls;
mod inbox_hand_over;
mod inbox_metrics;
mod inbox_waiting;
mod inboxes;
mod keys;
mod lanes;
mod link;
#[cfg(test)]
mod link_tests;
mod port;
mod queues;
mod receipts;
mod reply;
mod script;
#[cfg(test)]
mod testing;
mod topology;

use std::sync::Arc;

pub use config::{Config, Limits, Mode};

use inbox_calls::InboxCalls;
use inboxes::InboxParts;
use keys::Keys;
use link::Link;
use script::Script;

/// Every script, as each server is given them when it is connected to.
fn scripts() -> impl Iterator<Item = &'static Script> {
    let all: [&'static [&'static Script]; 2] = [&inbox_calls::SCRIPTS, &queues::SCRIPTS];
    all.into_iter().flatten().copied()
}

/// Redis could not be used as configured.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(String);

/// The store on Redis.
pub struct RedisStore {
    link: Arc<Link>,
    keys: Keys,
    limits: Limits,
    inboxes: Arc<InboxParts>,
}

impl RedisStore {
    /// Opens the store. Does not wait for Redis: while that is out of reach, every call says so. To be called
    /// within a runtime of tokio, which then runs the link.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub fn open(config: &Config, limits: Limits) -> Result<Arc<Self>, OpenError> {
        let link = Arc::new(Link::start(config).map_err(OpenError)?);
        let keys = Keys::new(&config.key_prefix);
        let calls = InboxCalls::new(keys.clone(), limits.clone());
        Ok(Arc::new(Self {
            inboxes: Arc::new(InboxParts::new(link.clone(), calls)),
            link,
            keys,
            limits,
        }))
    }

    /// Waits until what was submitted has been answered, also what nobody waits for; for a clean end of the process.
    /// Redis may be out of reach: wait no longer than is bearable.
    pub async fn flush(&self) {
        self.link.flush().await;
    }
}
