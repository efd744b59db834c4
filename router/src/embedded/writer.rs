//! The writer thread: takes what waits, commits it once, answers everybody, and gets over outages.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::config::Config;
use super::directory::{Directory, OpenError};
use super::engine::{Engine, Lookup, Staged};
use super::epochs::Epochs;
use super::inbox_table::InboxTable;
use super::job_table::JobsShared;
use super::metrics::Metrics;
use super::queue::{Kind, Queue, Taken};
use super::routes::RouteTable;
use super::space::SpaceWatch;
use super::transaction::Transaction;
use super::upstream::UpstreamShared;
use super::upstream_log::Tails;
use super::{Shared, State, keys};
use crate::StoreError;
use crate::record::format;

/// How often chores are done while nothing else happens.
const CHORES_EVERY: Duration = Duration::from_secs(1);
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Inboxes known in memory before those that can be read back are dropped.
const INBOXES_MAX: usize = 200_000;

/// Opens everything and starts the thread.
pub(super) fn start(config: Config) -> Result<(Arc<Shared>, JoinHandle<()>), OpenError> {
    let directory = Directory::lock(&config.data_dir)?;
    let engine = Arc::new(directory.open_engine(config.cache_bytes)?);
    let path = config.data_dir.clone();
    let failed = move |error: StoreError| OpenError::Store {
        path,
        cause: error.to_string(),
    };
    let high_water = match read_high_water(&engine) {
        Ok(high_water) => high_water,
        Err(error) => return Err(failed(error)),
    };
    let shared = Arc::new(Shared {
        queue: Queue::new(config.queue_bytes_max),
        directory,
        inboxes: InboxTable::new(),
        epochs: Epochs::above(high_water),
        jobs: JobsShared::new(high_water),
        routes: RouteTable::new(),
        upstream: UpstreamShared::default(),
        metrics: Metrics::new(),
        state: RwLock::new(State::Open(engine.clone())),
        config,
    });
    let transaction = Transaction::load(engine, shared.clone()).map_err(failed)?;
    let writer = Writer {
        shared: shared.clone(),
        space: SpaceWatch::default(),
    };
    let data_dir = shared.config.data_dir.clone();
    let thread = thread::Builder::new()
        .name("store-writer".into())
        .spawn(move || writer.run(transaction))
        .map_err(|source| OpenError::Io {
            doing: "start the writer of",
            path: data_dir,
            source,
        })?;
    Ok((shared, thread))
}

fn read_high_water(engine: &Engine) -> Result<u64, StoreError> {
    let value = engine.get(keys::HIGH_WATER)?;
    value.map_or(Ok(0), |value| {
        format::parse_number(keys::HIGH_WATER, &value)
    })
}

/// Sees to it that nobody waits for a writer that panicked.
struct LastWords(Arc<Shared>);

impl Drop for LastWords {
    fn drop(&mut self) {
        if thread::panicking() {
            tracing::error!("the writer thread panicked, the store takes nothing more");
            self.0.metrics.set_unavailable(true);
            *self.0.state.write() = State::Outage("the writer thread panicked".into());
            self.0.queue.close();
            // Whoever waits for one of these is told that the store ended.
            drop(self.0.queue.drain(Duration::ZERO));
            self.0.upstream.notify_all();
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    space: SpaceWatch,
}

impl Writer {
    fn run(mut self, transaction: Transaction) {
        let _last_words = LastWords(self.shared.clone());
        let mut transaction = Some(transaction);
        while let Some(open) = transaction.take() {
            let Err((cause, tails)) = self.serve(open) else {
                return;
            };
            self.shared.metrics.commit_failed();
            transaction = self.outage(cause);
            if let Some(reopened) = &mut transaction {
                reopened.upstream.continue_above(tails);
            }
        }
    }

    /// Commits batches until the queue is closed or one fails; then says why, and where the
    /// partitions of the upstream queues ended.
    fn serve(&mut self, mut transaction: Transaction) -> Result<(), (StoreError, Tails)> {
        let mut chores_due = Instant::now();
        loop {
            let idle = match transaction.more_to_do {
                true => Duration::ZERO,
                false => chores_due.saturating_duration_since(Instant::now()),
            };
            let (jobs, closing) = match self.shared.queue.take(idle) {
                Taken::Jobs(jobs) => (jobs, false),
                Taken::Closed => (Vec::new(), true),
            };
            let now = Instant::now();
            let mut chores = false;
            if closing || transaction.more_to_do || now >= chores_due {
                chores_due = now + CHORES_EVERY;
                if let Err(error) = transaction.maintain() {
                    tracing::error!(%error, "the store's chores failed");
                    transaction.more_to_do = false;
                }
                chores = true;
            }
            let mut done = self.batch(&mut transaction, jobs);
            if closing && done.is_ok() {
                done = self.store_last_epoch(&transaction);
            }
            match done {
                Err(error) => return Err((error, transaction.upstream.into_tails())),
                Ok(()) if closing => return Ok(()),
                Ok(()) if chores => self.evict(),
                Ok(()) => {}
            }
        }
    }

    /// Runs the jobs of one batch, commits, and answers.
    fn batch(
        &mut self,
        transaction: &mut Transaction,
        jobs: Vec<super::queue::Job>,
    ) -> Result<(), StoreError> {
        let config = &self.shared.config;
        let mut finishes = Vec::with_capacity(jobs.len());
        let mut awaited = false;
        let mut bytes = 0;
        for job in jobs {
            bytes += job.cost;
            awaited |= job.kind != Kind::Note;
            let shortage = match job.kind {
                Kind::Add => self
                    .space
                    .shortage(self.shared.directory.path(), config.min_free_bytes),
                Kind::Change | Kind::Note => None,
            };
            let run = match shortage {
                Some(shortage) => Err(StoreError::Unavailable(shortage.to_owned())),
                None => Ok(&mut *transaction),
            };
            finishes.extend((job.run)(run));
        }
        let staged = transaction.take_staged();
        let committed = self.commit(&transaction.engine, staged, awaited);
        if committed.is_ok() {
            transaction.committed();
        } else if let Err(error) = &committed {
            // Before anyone is answered, so that whoever is told of the failure and tries again
            // meets the outage and not a store that is about to close.
            self.begin_outage(error);
        }
        for finish in finishes {
            finish(committed.clone());
        }
        self.shared.queue.done(bytes);
        committed
    }

    fn commit(&self, engine: &Engine, staged: Staged, sync: bool) -> Result<(), StoreError> {
        if staged.is_empty() {
            return Ok(());
        }
        let records = staged.len();
        let began = Instant::now();
        engine.commit(staged, sync)?;
        self.shared.metrics.commit(began.elapsed(), records);
        Ok(())
    }

    /// At a clean end the mark comes down to what was really handed out.
    fn store_last_epoch(&self, transaction: &Transaction) -> Result<(), StoreError> {
        let mut staged = Staged::default();
        let last = self.shared.epochs.last();
        staged.put(
            keys::HIGH_WATER.to_vec(),
            format::number(keys::HIGH_WATER, last),
        );
        self.commit(&transaction.engine, staged, true)
    }

    fn evict(&self) {
        if self.shared.inboxes.len() > INBOXES_MAX {
            // No connection has a cursor into the inbox of a client that is not connected.
            self.shared
                .inboxes
                .evict(|client| self.shared.routes.is_routed(client));
        }
    }

    fn begin_outage(&self, error: &StoreError) {
        tracing::error!(%error, "the store cannot be written, every call is refused until it can");
        self.shared.metrics.set_unavailable(true);
        let cause = match error {
            StoreError::Unavailable(cause) => cause.clone(),
            other => other.to_string(),
        };
        *self.shared.state.write() = State::Outage(cause);
        self.shared.inboxes.forget_entries();
        self.shared.upstream.forget_gone();
        self.shared.upstream.notify_all();
    }

    /// Closes what failed and tries to open it again until it can be written; `None` when the store
    /// is to end before that.
    fn outage(&mut self, cause: StoreError) -> Option<Transaction> {
        let began = Instant::now();
        let mut retry_at = began + RETRY_EVERY;
        loop {
            let wait = retry_at.saturating_duration_since(Instant::now());
            let (jobs, closed) = self.shared.queue.drain(wait);
            for job in jobs {
                (job.run)(Err(cause.clone()));
            }
            if closed {
                return None;
            }
            if Instant::now() < retry_at {
                continue;
            }
            retry_at = Instant::now() + RETRY_EVERY;
            match self.reopen() {
                Ok(transaction) => {
                    *self.shared.state.write() = State::Open(transaction.engine.clone());
                    self.shared.metrics.set_unavailable(false);
                    self.shared.upstream.notify_all();
                    tracing::info!(
                        after_ms = began.elapsed().as_millis(),
                        "the store works again"
                    );
                    return Some(transaction);
                }
                Err(error) => {
                    tracing::debug!(%error, "the store still cannot be written");
                    *self.shared.state.write() = State::Outage(error);
                }
            }
        }
    }

    fn reopen(&self) -> Result<Transaction, String> {
        let config = &self.shared.config;
        let engine = self.shared.directory.open_engine(config.cache_bytes);
        let engine = Arc::new(engine.map_err(|error| error.to_string())?);
        let probe = || {
            let mut staged = Staged::default();
            staged.put(
                keys::PROBE.to_vec(),
                format::number(keys::PROBE, crate::unix_ms()),
            );
            self.commit(&engine, staged, true)?;
            Transaction::load(engine.clone(), self.shared.clone())
        };
        probe().map_err(|error| error.to_string())
    }
}
