//! The backend of a single machine: every seam over one embedded key-value store.
//!
//! ```text
//! callers ──▶ queue ──▶ writer thread ──▶ one batch, one fdatasync ──▶ every caller of the batch
//!                         │ inbox_writes, receipts, upstream_log, session_store: what a change does
//! callers ◀── consistent views of the engine, and the tables kept in memory
//! ```
//!
//! Whoever writes submits a piece of work that runs on the writer thread in the order of submission;
//! the future it got resolves when the batch with its changes is durable. A failed commit fails
//! everybody in the batch; the store is then closed and opened again until it works, and meanwhile
//! every call says why it cannot be served.
//!
//! Read in this order: `config`, `keys` and `crate::record` (what is on disk), `engine`, `directory`,
//! `queue`, `writer`, `transaction` (how it gets there), then one pair of files a seam.

mod bans;
mod config;
mod directory;
mod engine;
mod epochs;
mod export;
mod inbox_table;
mod inbox_writes;
mod inboxes;
mod job_events;
mod job_keys;
mod job_table;
mod job_writes;
mod jobs;
mod keys;
mod metrics;
mod migrate;
mod queue;
mod receipts;
mod routes;
mod sessions;
mod space;
mod transaction;
mod upstream;
mod upstream_log;
mod writer;

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;

pub use config::{Config, InboxLimits, OverflowPolicy};
pub use directory::{FORMAT_VERSION, OpenError};
pub use upstream::is_consumer_name;

use directory::Directory;
use engine::{Engine, View};
use epochs::Epochs;
use inbox_table::InboxTable;
use queue::{Finish, Job, Kind, Queue};
use transaction::Transaction;

use crate::{Fence, QueueName, StoreError, Stores};

/// Whether the store can make things durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It can.
    Ready,
    /// It cannot, for this reason, and tries to get over it.
    Unavailable(String),
}

/// What the callers and the writer thread share.
struct Shared {
    config: Config,
    directory: Directory,
    queue: Queue,
    inboxes: InboxTable,
    epochs: Epochs,
    routes: routes::RouteTable,
    upstream: upstream::UpstreamShared,
    jobs: job_table::JobsShared,
    metrics: metrics::Metrics,
    state: RwLock<State>,
}

/// Whether there is an engine to read from.
enum State {
    Open(Arc<Engine>),
    Outage(String),
    Closed,
}

impl Shared {
    fn is_closed(&self) -> bool {
        matches!(*self.state.read(), State::Closed)
    }

    fn engine(&self) -> Result<Arc<Engine>, StoreError> {
        match &*self.state.read() {
            State::Open(engine) => Ok(engine.clone()),
            State::Outage(cause) => Err(StoreError::Unavailable(cause.clone())),
            State::Closed => Err(StoreError::Unavailable("the store is closed".into())),
        }
    }

    /// Partitions of a queue that holds nothing yet. The default queue is read by one cursor.
    fn configured_partitions(&self, queue: &QueueName) -> u16 {
        match queue.as_str() {
            QueueName::DEFAULT => 1,
            _ => self.config.upstream_partitions.max(1),
        }
    }
}

/// The embedded store. Implements every seam of this crate.
pub struct EmbeddedStore {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// Breaks the fence where a write behind it was refused.
fn tell<T>(fence: Option<&Fence>, outcome: &Result<T, StoreError>) {
    if let (Some(fence), Err(error)) = (fence, outcome) {
        fence.refused(error);
    }
}

impl EmbeddedStore {
    /// Opens the store, making or migrating its directory as needed. Blocks while it reads what was
    /// not flushed before the last end.
    pub fn open(config: Config) -> Result<Arc<Self>, OpenError> {
        writer::start(config).map(|(shared, writer)| {
            Arc::new(Self {
                shared,
                writer: Mutex::new(Some(writer)),
            })
        })
    }

    /// This store as every seam.
    pub fn stores(self: &Arc<Self>) -> Stores {
        Stores {
            routes: self.clone(),
            inboxes: self.clone(),
            sessions: self.clone(),
            retained: self.clone(),
            bans: self.clone(),
            upstream: self.clone(),
            jobs: self.clone(),
        }
    }

    /// Makes everything durable that was submitted, and ends the writer thread. Later calls are
    /// answered `Unavailable`. Blocks until it is done.
    ///
    /// # Errors
    ///
    /// What was submitted without waiting may not be durable.
    pub fn close(&self) -> Result<(), StoreError> {
        let Some(writer) = self.writer.lock().take() else {
            return Ok(());
        };
        self.shared.queue.close();
        let ended = writer.join();
        let state = std::mem::replace(&mut *self.shared.state.write(), State::Closed);
        self.shared.upstream.notify_all();
        self.shared.jobs.wake();
        let closed = match (ended, state) {
            (Ok(()), State::Open(engine)) => engine.sync(),
            (Ok(()), State::Outage(cause)) => Err(StoreError::Unavailable(cause)),
            (Ok(()), State::Closed) => Ok(()),
            (Err(_), _) => Err(StoreError::Unavailable("the writer thread panicked".into())),
        };
        self.shared.directory.release();
        closed
    }

    /// Whether a write would be accepted now.
    pub fn health(&self) -> Health {
        if let Err(error) = self.shared.engine() {
            return Health::Unavailable(error.to_string());
        }
        match space::shortage(
            self.shared.directory.path(),
            self.shared.config.min_free_bytes,
        ) {
            Some(shortage) => Health::Unavailable(shortage),
            None => Health::Ready,
        }
    }

    /// Whether [`Self::health`] is [`Health::Ready`].
    pub fn is_writable(&self) -> bool {
        self.health() == Health::Ready
    }

    /// Runs `work` on the writer thread. Its place in the order is taken by this call; the future
    /// resolves when what it staged is durable.
    fn submit<T: Send + 'static>(
        &self,
        kind: Kind,
        cost: usize,
        work: impl FnOnce(&mut Transaction) -> Result<T, StoreError> + Send + 'static,
    ) -> impl Future<Output = Result<T, StoreError>> + Send + 'static {
        self.submit_behind(None, kind, cost, work)
    }

    /// As `submit`. The fence is looked at and broken on the writer thread, so that nothing behind
    /// it slips through between a refusal and the caller's hearing of it.
    fn submit_behind<T: Send + 'static>(
        &self,
        fence: Option<&Fence>,
        kind: Kind,
        cost: usize,
        work: impl FnOnce(&mut Transaction) -> Result<T, StoreError> + Send + 'static,
    ) -> impl Future<Output = Result<T, StoreError>> + Send + 'static {
        let (answer, answered) = oneshot::channel();
        let (before, after) = (fence.cloned(), fence.cloned());
        let work = move |transaction: &mut Transaction| {
            before.as_ref().map_or(Ok(()), Fence::check)?;
            work(transaction)
        };
        let run: queue::Run = Box::new(move |transaction| match transaction.and_then(work) {
            Ok(value) => {
                let finish: Finish = Box::new(move |committed| {
                    tell(after.as_ref(), &committed);
                    // The caller may have gone: the change stands anyway.
                    let _ = answer.send(committed.map(|()| value));
                });
                Some(finish)
            }
            Err(error) => {
                let refused = Err(error);
                tell(after.as_ref(), &refused);
                let _ = answer.send(refused);
                None
            }
        });
        let pushed = self.push(Job { kind, cost, run });
        tell(fence, &pushed);
        async move {
            pushed?;
            answered.await.unwrap_or_else(|_| {
                Err(StoreError::Unavailable(
                    "the store ended before it could answer".into(),
                ))
            })
        }
    }

    /// Runs `work` on the writer thread without anybody waiting for it.
    fn note(&self, work: impl FnOnce(&mut Transaction) -> Result<(), StoreError> + Send + 'static) {
        let run: queue::Run = Box::new(move |transaction| {
            if let Ok(transaction) = transaction
                && let Err(error) = work(transaction)
            {
                tracing::error!(%error, "a note to the store could not be kept");
            }
            None
        });
        if self
            .push(Job {
                kind: Kind::Note,
                cost: 64,
                run,
            })
            .is_err()
        {
            self.shared.metrics.note_lost();
        }
    }

    fn push(&self, job: Job) -> Result<(), StoreError> {
        self.shared.engine()?;
        self.shared.queue.push(job)
    }

    /// Runs `look` with a consistent view, away from the runtime's own threads.
    async fn read<T: Send + 'static>(
        &self,
        look: impl FnOnce(&View) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let engine = self.shared.engine()?;
        let task = tokio::task::spawn_blocking(move || look(&engine.view()));
        task.await
            .unwrap_or_else(|error| Err(engine::unavailable(error)))
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!(%error, "the store was not closed cleanly");
        }
    }
}
