//! Which jobs are carried out here, when, and how many at once.
//!
//! Each shard that this process holds has a task: it sleeps until the next job is due or an earlier one is announced, claims what
//! is due in the order of its time, and starts each. It claims no more than there is room for, so that what waits
//! waits in the store, in its order. Another task renews the share of shards, and a third one clears away what is over.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use moorline_router::{Clock, Job, JobEvent, Jobs, NodeId, StoreError};
use moorline_upstream_worker::backoff::random_fraction;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::attempt::TRIALS_AT_ONCE;
use crate::bindings;
use crate::hands::Hands;
use crate::metrics::Metrics;
use crate::rate::Rate;
use crate::{Config, DelayQueue};

/// For how long a process has its shards without renewing.
const SHARE_LEASE: Duration = Duration::from_secs(10);
/// A notice may be lost: a shard is looked at this often, whatever is known of it.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How often what is over is cleared away, and unfinished events are looked for.
const CHORES_EVERY: Duration = Duration::from_secs(10);
/// Between two steps of clearing away, where there is more.
const CHORES_PAUSE: Duration = Duration::from_millis(50);
/// Jobs and events cleared away in one step.
const SWEEP: usize = 500;
/// Steps of clearing away in a row.
const SWEEPS_MAX: usize = 100;
/// Events looked for at once. They had time enough to be told by whoever took them.
const EVENTS: usize = 64;
const EVENT_GRACE_MS: u64 = 10_000;
/// Jobs of one claim.
const CLAIM: usize = 256;
/// Wait after the store failed.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// A claim that got nothing although something is due is not repeated at once.
const NOTHING_PAUSE: Duration = Duration::from_millis(20);
/// How long a job may go on once the process is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(5);

pub(crate) struct Runner {
    pub(crate) config: Config,
    pub(crate) jobs: Arc<dyn Jobs>,
    pub(crate) clock: Clock,
    pub(crate) hands: Hands,
    pub(crate) metrics: Metrics,
    /// From 0 to 1; what waits are drawn by.
    pub(crate) random: fn() -> f64,
    holder: NodeId,
    slots: Arc<Semaphore>,
    /// Room for jobs that may be what ends the processes, see [`crate::attempt`].
    pub(crate) trials: Arc<Semaphore>,
    rate: Rate,
    stop: watch::Receiver<bool>,
    /// What runs has had its time.
    over: watch::Receiver<bool>,
}

/// Work is to end.
struct Over;

/// Works until `shutdown` resolves.
pub(crate) async fn run(
    queue: DelayQueue,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), String> {
    let (stop_sender, stop) = watch::channel(false);
    let (over_sender, over) = watch::channel(false);
    let config = queue.config;
    let bindings = match &queue.rabbit {
        Some(rabbit) => bindings::all(&config, rabbit, &queue.jobs, &queue.clock)?,
        None => Vec::new(),
    };
    let slots = usize::try_from(config.concurrency).unwrap_or(Semaphore::MAX_PERMITS);
    let runner = Arc::new(Runner {
        hands: Hands::new(
            &config,
            queue.outlets,
            Arc::clone(&queue.jobs),
            queue.clock.clone(),
        )?,
        metrics: Metrics::new(),
        random: random_fraction,
        holder: queue.holder,
        slots: Arc::new(Semaphore::new(slots)),
        trials: Arc::new(Semaphore::new(TRIALS_AT_ONCE as usize)),
        rate: Rate::per_second(config.rate),
        jobs: queue.jobs,
        clock: queue.clock,
        config,
        stop,
        over,
    });
    let (held_sender, held) = watch::channel(Vec::new());
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&runner).share(held_sender));
    tasks.spawn(Arc::clone(&runner).clear_away(held));
    let mut sources = JoinSet::new();
    for binding in bindings {
        sources.spawn(binding.run());
    }
    shutdown.await;
    sources.shutdown().await;
    stop_sender.send_replace(true);
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!(%error, "a part of the delay queue ended badly");
        }
    }
    let all = u32::try_from(slots).unwrap_or(u32::MAX);
    let idle = runner.slots.acquire_many(all);
    if tokio::time::timeout(STOP_GRACE, idle).await.is_err() {
        // They are given back, to be begun again.
        over_sender.send_replace(true);
        let given_back = runner.slots.acquire_many(all);
        if tokio::time::timeout(STOP_GRACE / 2, given_back)
            .await
            .is_err()
        {
            tracing::warn!(
                "delayed jobs are still under way; they are begun again when their leases have ended"
            );
        }
    }
    if let Err(error) = runner.jobs.let_go(&runner.holder).await {
        tracing::debug!(%error, "the shards of delayed jobs are not given back, their lease ends by itself");
    }
    Ok(())
}

impl Runner {
    /// Holds this process's share of the shards, and works on each.
    async fn share(self: Arc<Self>, held: watch::Sender<Vec<u16>>) {
        let lease_ms = u64::try_from(SHARE_LEASE.as_millis()).unwrap_or(u64::MAX);
        let mut working: HashMap<u16, watch::Sender<()>> = HashMap::new();
        let mut tasks = JoinSet::new();
        let mut failed = false;
        loop {
            match self.jobs.hold(&self.holder, lease_ms).await {
                Ok(shards) => {
                    failed = false;
                    working.retain(|shard, _| shards.contains(shard));
                    for shard in &shards {
                        working.entry(*shard).or_insert_with(|| {
                            let (let_go, told) = watch::channel(());
                            tasks.spawn(Arc::clone(&self).work_on(*shard, told));
                            let_go
                        });
                    }
                    held.send_if_modified(|held| {
                        let changed = *held != shards;
                        *held = shards;
                        changed
                    });
                }
                // What is held is worked on: claims are fenced one by one.
                Err(error) if !failed => {
                    failed = true;
                    tracing::warn!(%error, "the shards of delayed jobs cannot be held, trying again");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = self.stopped() => break,
                () = tokio::time::sleep(SHARE_LEASE / 3) => {}
            }
            while let Some(ended) = tasks.try_join_next() {
                if let Err(error) = ended {
                    // Its shard is worked on again after the next renewal.
                    tracing::error!(%error, "the work on a shard of delayed jobs ended badly");
                    working.clear();
                }
            }
        }
        drop(working);
        while tasks.join_next().await.is_some() {}
    }

    /// Until the shard is another's.
    async fn work_on(self: Arc<Self>, shard: u16, let_go: watch::Receiver<()>) {
        let mut earlier = self.jobs.earlier(shard);
        loop {
            earlier.mark_unchanged();
            let Ok(next_due_ms) = self.take_due(shard, &let_go).await else {
                return;
            };
            let due = async {
                match next_due_ms {
                    Some(at_ms) => self.clock.wait_until(at_ms).await,
                    None => std::future::pending().await,
                }
            };
            let announced = async {
                if earlier.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = due => {}
                () = announced => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                Over = self.over_for(&let_go) => return,
            }
        }
    }

    /// The process is told to stop, or the shard is to be another's.
    async fn over_for(&self, let_go: &watch::Receiver<()>) -> Over {
        let mut let_go = let_go.clone();
        tokio::select! {
            // An error says that the sender is gone, which is the signal.
            _ = let_go.changed() => Over,
            () = self.stopped() => Over,
        }
    }

    /// Starts everything that is due; says when the next job is. Never breaks off in the middle of a claim: what it got would wait for
    /// the end of its lease.
    async fn take_due(
        self: &Arc<Self>,
        shard: u16,
        let_go: &watch::Receiver<()>,
    ) -> Result<Option<u64>, Over> {
        let mut failed = false;
        loop {
            let room = async {
                self.rate.ready().await;
                self.some_slots().await
            };
            let mut slots = tokio::select! {
                biased;
                over = self.over_for(let_go) => return Err(over),
                slots = room => slots,
            };
            let now_ms = self.clock.now_ms();
            let claimed = self.jobs.claim(
                shard,
                &self.holder,
                now_ms,
                slots.num_permits(),
                self.config.lease_ms(),
            );
            let claimed = match claimed.await {
                Ok(claimed) => claimed,
                Err(error) => {
                    drop(slots);
                    if !failed {
                        failed = true;
                        tracing::warn!(shard, %error, "delayed jobs cannot be claimed, trying again");
                    }
                    tokio::time::sleep(STORE_RETRY).await;
                    continue;
                }
            };
            failed = false;
            self.rate.spend(claimed.jobs.len());
            let got_none = claimed.jobs.is_empty();
            for job in claimed.jobs {
                self.start(job, slots.split(1));
            }
            drop(slots);
            match claimed.next_due_ms {
                Some(at_ms) if at_ms <= self.clock.now_ms() => {
                    if got_none {
                        tokio::time::sleep(NOTHING_PAUSE).await;
                    }
                }
                next_due_ms => return Ok(next_due_ms),
            }
        }
    }

    /// Room for one job at least.
    async fn some_slots(&self) -> OwnedSemaphorePermit {
        let one = Arc::clone(&self.slots).acquire_owned().await;
        let mut slots = one.expect("never closed");
        let more = self.rate.batch().min(CLAIM) - 1;
        let more = more.min(self.slots.available_permits());
        let more = u32::try_from(more).unwrap_or(0);
        if let Ok(more) = Arc::clone(&self.slots).try_acquire_many_owned(more) {
            slots.merge(more);
        }
        slots
    }

    fn start(self: &Arc<Self>, job: Job, slot: Option<OwnedSemaphorePermit>) {
        let runner = Arc::clone(self);
        tokio::spawn(async move {
            runner.metrics.in_flight.increment(1);
            Arc::clone(&runner).carry_out(job).await;
            runner.metrics.in_flight.decrement(1);
            drop(slot);
        });
    }

    /// Sees to what nobody waits for.
    async fn clear_away(self: Arc<Self>, held: watch::Receiver<Vec<u16>>) {
        loop {
            let shards = held.borrow().clone();
            for shard in shards {
                let cleared = tokio::select! {
                    cleared = self.clear_shard(shard) => cleared,
                    () = self.stopped() => return,
                };
                if let Err(error) = cleared {
                    tracing::debug!(shard, %error, "a shard of delayed jobs is not cleared");
                }
            }
            if let Ok(counts) = self.jobs.counts().await {
                self.metrics.counted(counts);
            }
            tokio::select! {
                () = tokio::time::sleep(CHORES_EVERY) => {}
                () = self.stopped() => return,
            }
        }
    }

    async fn clear_shard(&self, shard: u16) -> Result<(), StoreError> {
        let before_ms = self.clock.now_ms().saturating_sub(EVENT_GRACE_MS);
        let unfinished = self
            .jobs
            .unfinished_events(shard, before_ms, EVENTS)
            .await?;
        for event in unfinished {
            let JobEvent { name, at_ms, .. } = &event;
            tracing::info!(%name, at_ms, "an event that was not told to every job is told again");
            self.jobs.event(&event).await?;
        }
        for _ in 0..SWEEPS_MAX {
            let swept = self.jobs.sweep(shard, self.clock.now_ms(), SWEEP).await?;
            if !swept.more {
                break;
            }
            tokio::time::sleep(CHORES_PAUSE).await;
        }
        Ok(())
    }

    async fn stopped(&self) {
        // An error says that the sender is gone, which is the signal too.
        let _ = self.stop.clone().wait_for(|stop| *stop).await;
    }

    /// Resolves when a job under way is to be given back.
    pub(crate) async fn grace_over(&self) {
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    pub(crate) fn is_over(&self) -> bool {
        *self.over.borrow()
    }
}
