//! A store whose claims are counted, and that can be made to take no notices.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use moorline_router::{
    ActionState, ClaimToken, Claimed, EventOutcome, Job, JobChange, JobCounts, JobCreated,
    JobCursor, JobEvent, JobFilter, JobId, JobPage, JobPatch, JobSettlement, Jobs, NewJob, NodeId,
    Settled, StoreError, Swept,
};
use tokio::sync::watch;

use super::DEADLINE;

/// Counts claims, and refuses notices as long as it is told to; everything else is the store's.
pub(crate) struct Watched {
    store: Arc<dyn Jobs>,
    claims: AtomicUsize,
    refuses: AtomicBool,
    refused: Mutex<Vec<JobId>>,
}

impl Watched {
    pub(crate) fn of(store: &Arc<dyn Jobs>) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            claims: AtomicUsize::new(0),
            refuses: AtomicBool::new(false),
            refused: Mutex::default(),
        })
    }

    /// How many jobs were claimed so far, each as often as it was.
    pub(crate) fn claims(&self) -> usize {
        self.claims.load(Ordering::SeqCst)
    }

    pub(crate) fn refuse(&self, refuses: bool) {
        self.refuses.store(refuses, Ordering::SeqCst);
    }

    /// Until `jobs` notices were refused, each `times` times.
    pub(crate) async fn await_refusals(&self, jobs: usize, times: usize) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let mut refused = self.refused.lock().unwrap().clone();
            refused.sort();
            let each: Vec<_> = refused.chunk_by(|a, b| a == b).collect();
            assert!(each.len() <= jobs, "under other ids: {each:?}");
            if each.len() == jobs && each.iter().all(|all| all.len() >= times) {
                return;
            }
            assert!(Instant::now() < deadline, "{each:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[async_trait]
impl Jobs for Watched {
    async fn create_many(&self, jobs: Vec<NewJob>) -> Vec<Result<JobCreated, StoreError>> {
        self.store.create_many(jobs).await
    }
    async fn create_notice(&self, job: NewJob) -> Result<JobCreated, StoreError> {
        if self.refuses.load(Ordering::SeqCst) {
            self.refused.lock().unwrap().push(job.id);
            return Err(StoreError::Unavailable("no notices".into()));
        }
        self.store.create_notice(job).await
    }
    async fn get(&self, id: &JobId) -> Result<Option<Job>, StoreError> {
        self.store.get(id).await
    }
    async fn patch(&self, id: &JobId, patch: JobPatch) -> Result<JobChange, StoreError> {
        self.store.patch(id, patch).await
    }
    async fn cancel(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.store.cancel(id, now_ms).await
    }
    async fn trigger(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.store.trigger(id, now_ms).await
    }
    async fn retry_failed(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.store.retry_failed(id, now_ms).await
    }
    async fn list(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<JobPage, StoreError> {
        self.store.list(filter, after, limit).await
    }
    async fn counts(&self) -> Result<JobCounts, StoreError> {
        self.store.counts().await
    }
    async fn event(&self, event: &JobEvent) -> Result<EventOutcome, StoreError> {
        self.store.event(event).await
    }
    async fn unfinished_events(
        &self,
        shard: u16,
        before_ms: u64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError> {
        self.store.unfinished_events(shard, before_ms, limit).await
    }
    async fn claim(
        &self,
        shard: u16,
        holder: &NodeId,
        now_ms: u64,
        limit: usize,
        lease_ms: u64,
    ) -> Result<Claimed, StoreError> {
        let claimed = self.store.claim(shard, holder, now_ms, limit, lease_ms);
        let claimed = claimed.await?;
        self.claims.fetch_add(claimed.jobs.len(), Ordering::SeqCst);
        Ok(claimed)
    }
    async fn settle(
        &self,
        id: &JobId,
        token: ClaimToken,
        settlement: JobSettlement,
        now_ms: u64,
    ) -> Result<Settled, StoreError> {
        self.store.settle(id, token, settlement, now_ms).await
    }
    async fn extend(
        &self,
        id: &JobId,
        token: ClaimToken,
        until_ms: u64,
        actions: Vec<ActionState>,
        is_trial: bool,
    ) -> Result<Settled, StoreError> {
        let extended = self.store.extend(id, token, until_ms, actions, is_trial);
        extended.await
    }
    async fn sweep(&self, shard: u16, now_ms: u64, limit: usize) -> Result<Swept, StoreError> {
        self.store.sweep(shard, now_ms, limit).await
    }
    fn earlier(&self, shard: u16) -> watch::Receiver<u64> {
        self.store.earlier(shard)
    }
    fn shards(&self) -> u16 {
        self.store.shards()
    }
    fn shard_of(&self, id: &JobId) -> u16 {
        self.store.shard_of(id)
    }
    async fn hold(&self, holder: &NodeId, lease_ms: u64) -> Result<Vec<u16>, StoreError> {
        self.store.hold(holder, lease_ms).await
    }
    async fn let_go(&self, holder: &NodeId) -> Result<(), StoreError> {
        self.store.let_go(holder).await
    }
    async fn time(&self) -> Result<u64, StoreError> {
        self.store.time().await
    }
}
