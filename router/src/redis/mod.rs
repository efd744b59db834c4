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

mod bans;
mod config;
mod dead_letters;
mod finder;
mod flight;
mod health;
mod import;
mod inbox_answer;
mod inbox_calls;
mod inbox_hand_over;
#[cfg(test)]
mod inbox_lua_tests;
mod inbox_metrics;
mod inbox_waiting;
mod inboxes;
mod index;
mod job_answer;
mod job_calls;
mod job_creation;
mod job_events;
mod job_import;
mod job_list;
#[cfg(test)]
mod job_lua_tests;
mod job_notice;
mod job_orphans;
mod jobs;
mod keys;
mod lanes;
mod link;
mod link_metrics;
#[cfg(test)]
mod link_tests;
#[cfg(test)]
mod lua_tests;
mod port;
mod queues;
mod receipts;
mod registry;
mod reply;
mod retained;
mod routes;
mod script;
mod sessions;
mod shards;
#[cfg(test)]
mod testing;
mod topology;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use config::{Config, Limits, Mode};
pub use health::Health;
pub(crate) use import::Migration;
pub use jobs::RedisJobs;

use inbox_calls::InboxCalls;
use inboxes::InboxParts;
use job_calls::JobCalls;
use keys::Keys;
use link::Link;
use registry::Registry;
use script::Script;

use crate::Epoch;

/// Every script, as each server is given them when it is connected to.
fn scripts() -> impl Iterator<Item = &'static Script> {
    let all: Vec<&'static [&'static Script]> = vec![
        &dead_letters::SCRIPTS,
        &inbox_calls::SCRIPTS,
        index::SCRIPTS,
        &job_calls::SCRIPTS,
        &queues::SCRIPTS,
        registry::SCRIPTS,
        retained::SCRIPTS,
        routes::SCRIPTS,
        sessions::SCRIPTS,
        shards::SCRIPTS,
    ];
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
    inboxes: Arc<InboxParts>,
    jobs: Arc<RedisJobs>,
    registry: Arc<Registry>,
    /// The newest epoch that this process has seen: a server whose clock is behind that of the one before it hands out
    /// nothing older.
    newest_epoch: AtomicU64,
    retained_clock: Arc<retained::StoreClock>,
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
        let job_calls = JobCalls::new(keys.clone(), limits.jobs.clone());
        let calls = InboxCalls::new(keys.clone(), limits);
        let registry = Arc::new(Registry::new(link.clone(), keys.clone()));
        Ok(Arc::new(Self {
            inboxes: Arc::new(InboxParts::new(link.clone(), calls)),
            jobs: Arc::new(RedisJobs::new(link.clone(), job_calls)),
            link,
            keys,
            registry,
            newest_epoch: AtomicU64::new(0),
            retained_clock: Arc::default(),
        }))
    }

    /// The seam of delayed jobs.
    pub fn jobs(&self) -> Arc<RedisJobs> {
        Arc::clone(&self.jobs)
    }

    /// Waits until what was submitted has been answered, also what nobody waits for; for a clean end of the process.
    /// Redis may be out of reach: wait no longer than is bearable.
    pub async fn flush(&self) {
        self.link.flush().await;
    }

    fn newest_epoch(&self) -> u64 {
        self.newest_epoch.load(Ordering::Relaxed)
    }

    fn saw_epoch(&self, epoch: Epoch) {
        self.newest_epoch.fetch_max(epoch.0, Ordering::Relaxed);
    }
}
