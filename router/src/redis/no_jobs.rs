//! Delayed jobs where there are many machines: refused, until Redis keeps them. Nothing is accepted that could be lost.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use super::RedisStore;
use crate::{
    ActionState, ClaimToken, Claimed, EventOutcome, Job, JobChange, JobCounts, JobCreated,
    JobCursor, JobEvent, JobFilter, JobId, JobPage, JobPatch, JobSettlement, Jobs, NewJob, NodeId,
    Settled, StoreError, Swept,
};

struct Refused;

fn refused<T>() -> Result<T, StoreError> {
    Err(StoreError::Unavailable(
        "delayed jobs are kept on a single machine only".into(),
    ))
}

impl RedisStore {
    /// The delayed jobs.
    pub fn jobs(&self) -> Arc<dyn Jobs> {
        Arc::new(Refused)
    }
}

#[async_trait]
impl Jobs for Refused {
    async fn create_many(&self, jobs: Vec<NewJob>) -> Vec<Result<JobCreated, StoreError>> {
        jobs.iter().map(|_| refused()).collect()
    }
    async fn get(&self, _: &JobId) -> Result<Option<Job>, StoreError> {
        refused()
    }
    async fn patch(&self, _: &JobId, _: JobPatch) -> Result<JobChange, StoreError> {
        refused()
    }
    async fn cancel(&self, _: &JobId, _: u64) -> Result<JobChange, StoreError> {
        refused()
    }
    async fn trigger(&self, _: &JobId, _: u64) -> Result<JobChange, StoreError> {
        refused()
    }
    async fn retry_failed(&self, _: &JobId, _: u64) -> Result<JobChange, StoreError> {
        refused()
    }
    async fn list(
        &self,
        _: &JobFilter,
        _: Option<&JobCursor>,
        _: usize,
    ) -> Result<JobPage, StoreError> {
        refused()
    }
    async fn counts(&self) -> Result<JobCounts, StoreError> {
        refused()
    }
    async fn event(&self, _: &JobEvent) -> Result<EventOutcome, StoreError> {
        refused()
    }
    async fn unfinished_events(
        &self,
        _: u16,
        _: u64,
        _: usize,
    ) -> Result<Vec<JobEvent>, StoreError> {
        refused()
    }
    async fn claim(
        &self,
        _: u16,
        _: &NodeId,
        _: u64,
        _: usize,
        _: u64,
    ) -> Result<Claimed, StoreError> {
        refused()
    }
    async fn settle(
        &self,
        _: &JobId,
        _: ClaimToken,
        _: JobSettlement,
        _: u64,
    ) -> Result<Settled, StoreError> {
        refused()
    }
    async fn extend(
        &self,
        _: &JobId,
        _: ClaimToken,
        _: u64,
        _: Vec<ActionState>,
    ) -> Result<Settled, StoreError> {
        refused()
    }
    async fn sweep(&self, _: u16, _: u64, _: usize) -> Result<Swept, StoreError> {
        refused()
    }
    fn earlier(&self, _: u16) -> watch::Receiver<u64> {
        watch::channel(0).1
    }
    fn shards(&self) -> u16 {
        1
    }
    fn shard_of(&self, _: &JobId) -> u16 {
        0
    }
    async fn hold(&self, _: &NodeId, _: u64) -> Result<Vec<u16>, StoreError> {
        refused()
    }
    async fn let_go(&self, _: &NodeId) -> Result<(), StoreError> {
        refused()
    }
    async fn time(&self) -> Result<u64, StoreError> {
        refused()
    }
}
