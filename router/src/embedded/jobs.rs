//! Delayed jobs as their callers see them. What a write does stands in `job_writes` and `job_events`.

use std::iter::Peekable;
use std::ops::Bound;

use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::sync::watch;

use super::engine::{Lookup, Pairs, View};
use super::job_writes::job_cost;
use super::keys::{after_prefix, group, group_end};
use super::queue::Kind;
use super::{EmbeddedStore, job_events, job_keys};
use crate::record::job as record;
use crate::{
    ActionState, ClaimToken, Claimed, EventName, EventOutcome, Job, JobChange, JobCounts,
    JobCreated, JobCursor, JobEvent, JobFilter, JobId, JobPage, JobPatch, JobSettlement, JobState,
    Jobs, NewJob, NodeId, Settled, StoreError, Swept, unix_ms,
};

/// Jobs that one batch of a creation takes.
const CREATED_AT_ONCE: usize = 256;
/// Jobs that one step of a sweep removes.
const SWEPT_AT_ONCE: usize = 500;
/// Jobs that are looked at for one page, however few of them belong to it.
const LOOKED_AT_MAX: usize = 2_000;
/// Jobs on one page.
const PAGE_MAX: usize = 1_000;

fn load(view: &View, id: &JobId) -> Result<Option<Job>, StoreError> {
    let key = job_keys::job(id);
    let value = view.get(&key)?;
    value
        .map(|value| record::parse_job(&key, &value))
        .transpose()
}

/// The jobs of a list, before the filter, in its order.
enum Listed {
    /// The jobs themselves.
    Jobs(Pairs),
    /// The index of an event's name.
    Named(EventName, Pairs),
    /// The indexes of the states, by time.
    States(Vec<Peekable<Pairs>>),
}

impl Listed {
    fn open(view: &View, filter: &JobFilter, after: Option<&JobCursor>) -> Self {
        if let Some(name) = &filter.event {
            let from = match after {
                Some(after) => Bound::Excluded(job_keys::named_by(name, &after.id)),
                None => Bound::Included(group(job_keys::NAMED, name.as_str())),
            };
            let to = group_end(job_keys::NAMED, name.as_str());
            return Self::Named(name.clone(), view.range(from, to));
        }
        if let Some(prefix) = &filter.prefix {
            let mut all = vec![job_keys::JOB];
            all.extend_from_slice(prefix.as_bytes());
            let to = after_prefix(&all);
            let from = match after.map(|after| job_keys::job(&after.id)) {
                Some(after) if after >= all => Bound::Excluded(after),
                _ => Bound::Included(all),
            };
            return Self::Jobs(view.range(from, to));
        }
        let states = JobState::ALL.into_iter();
        let states = states.filter(|state| filter.state.is_none_or(|only| only == *state));
        let range = |state| {
            let first = job_keys::from(state, filter.from_ms.unwrap_or(0));
            let from = match after.map(|after| job_keys::due(state, after.at_ms, &after.id)) {
                Some(after) if after >= first => Bound::Excluded(after),
                _ => Bound::Included(first),
            };
            let to = match filter.to_ms {
                Some(to_ms) => job_keys::from(state, to_ms),
                None => after_prefix(&job_keys::state(state)),
            };
            view.range(from, to).peekable()
        };
        Self::States(states.map(range).collect())
    }

    fn next(&mut self, view: &View) -> Option<Result<Option<Job>, StoreError>> {
        match self {
            Self::Jobs(pairs) => {
                let pair = pairs.next()?;
                Some(pair.and_then(|(key, value)| record::parse_job(&key, &value).map(Some)))
            }
            Self::Named(name, pairs) => {
                let id = pairs
                    .next()?
                    .and_then(|(key, _)| job_keys::named_by_of(name, &key));
                Some(id.and_then(|id| load(view, &id)))
            }
            Self::States(states) => {
                let mut first: Option<(usize, Vec<u8>)> = None;
                for (index, state) in states.iter_mut().enumerate() {
                    match state.peek() {
                        Some(Ok((key, _))) => {
                            let place = key.get(2..).unwrap_or_default();
                            if first.as_ref().is_none_or(|(_, first)| *place < **first) {
                                first = Some((index, place.to_vec()));
                            }
                        }
                        Some(Err(_)) => {
                            first = Some((index, Vec::new()));
                            break;
                        }
                        None => {}
                    }
                }
                let (index, _) = first?;
                let pair = states.get_mut(index)?.next()?;
                let id = pair.and_then(|(key, _)| job_keys::due_of(&key));
                Some(id.and_then(|(_, id)| load(view, &id)))
            }
        }
    }
}

fn page(
    view: &View,
    filter: &JobFilter,
    after: Option<&JobCursor>,
    limit: usize,
) -> Result<JobPage, StoreError> {
    let limit = limit.clamp(1, PAGE_MAX);
    let mut listed = Listed::open(view, filter, after);
    let mut page = JobPage::default();
    let mut looked_at = 0;
    while let Some(job) = listed.next(view) {
        let Some(job) = job? else {
            continue;
        };
        looked_at += 1;
        let cursor = JobCursor {
            at_ms: job.at_ms(),
            id: job.id.clone(),
        };
        if filter.matches(&job) {
            page.jobs.push(job);
        }
        if page.jobs.len() >= limit || looked_at >= LOOKED_AT_MAX {
            page.next = Some(cursor);
            break;
        }
    }
    Ok(page)
}

impl EmbeddedStore {
    async fn change_job(
        &self,
        change: impl FnOnce(&mut super::Transaction) -> Result<JobChange, StoreError> + Send + 'static,
    ) -> Result<JobChange, StoreError> {
        self.submit(Kind::Change, 256, change).await
    }
}

#[async_trait]
impl Jobs for EmbeddedStore {
    async fn create_many(&self, jobs: Vec<NewJob>) -> Vec<Result<JobCreated, StoreError>> {
        let mut jobs = jobs.into_iter().peekable();
        let mut batches = Vec::new();
        while jobs.peek().is_some() {
            let batch: Vec<_> = jobs.by_ref().take(CREATED_AT_ONCE).collect();
            let cost = batch.iter().map(job_cost).sum();
            let count = batch.len();
            let created = self.submit(Kind::Add, cost, move |tx| {
                let answers = batch.into_iter().map(|job| tx.create_job(job, false));
                Ok(answers.collect::<Vec<_>>())
            });
            batches.push(async move {
                match created.await {
                    Ok(answers) => answers,
                    Err(error) => vec![Err(error); count],
                }
            });
        }
        join_all(batches).await.into_iter().flatten().collect()
    }

    async fn create_notice(&self, job: NewJob) -> Result<JobCreated, StoreError> {
        self.submit(Kind::Change, job_cost(&job), move |tx| {
            tx.create_job(job, true)
        })
        .await
    }

    async fn get(&self, id: &JobId) -> Result<Option<Job>, StoreError> {
        let id = id.clone();
        self.read(move |view| load(view, &id)).await
    }

    async fn patch(&self, id: &JobId, patch: JobPatch) -> Result<JobChange, StoreError> {
        let id = id.clone();
        let cost = patch.plan.as_ref().map_or(0, crate::JobPlan::bytes) + 256;
        self.submit(Kind::Add, cost, move |tx| tx.patch_job(&id, patch))
            .await
    }

    async fn cancel(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        let id = id.clone();
        self.change_job(move |tx| tx.cancel_job(&id, now_ms)).await
    }

    async fn trigger(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        let id = id.clone();
        self.change_job(move |tx| tx.trigger_job(&id, now_ms)).await
    }

    async fn retry_failed(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        let id = id.clone();
        self.change_job(move |tx| tx.retry_failed_job(&id, now_ms))
            .await
    }

    async fn list(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<JobPage, StoreError> {
        let (filter, after) = (filter.clone(), after.cloned());
        self.read(move |view| page(view, &filter, after.as_ref(), limit))
            .await
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        self.shared.engine()?;
        Ok(self.shared.jobs.counts())
    }

    async fn event(&self, event: &JobEvent) -> Result<EventOutcome, StoreError> {
        let taken = event.clone();
        let cost = 2 * event.name.as_str().len() + 512;
        let mut outcome = self
            .submit(Kind::Add, cost, move |tx| tx.take_event(&taken))
            .await?;
        loop {
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
            let (name, id) = (event.name.clone(), event.id.clone());
            outcome = self
                .submit(Kind::Change, 256, move |tx| tx.drive_event(&name, &id))
                .await?;
        }
    }

    async fn unfinished_events(
        &self,
        _shard: u16,
        before_ms: u64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError> {
        self.read(move |view| job_events::unfinished(view, before_ms, limit))
            .await
    }

    async fn claim(
        &self,
        _shard: u16,
        holder: &NodeId,
        now_ms: u64,
        limit: usize,
        lease_ms: u64,
    ) -> Result<Claimed, StoreError> {
        let holder = holder.clone();
        self.submit(Kind::Change, 256, move |tx| {
            tx.claim_jobs(&holder, now_ms, limit, lease_ms)
        })
        .await
    }

    async fn settle(
        &self,
        id: &JobId,
        token: ClaimToken,
        settlement: JobSettlement,
        now_ms: u64,
    ) -> Result<Settled, StoreError> {
        let id = id.clone();
        self.submit(Kind::Change, 256, move |tx| {
            tx.settle_job(&id, token, settlement, now_ms)
        })
        .await
    }

    async fn extend(
        &self,
        id: &JobId,
        token: ClaimToken,
        until_ms: u64,
        actions: Vec<ActionState>,
        is_trial: bool,
    ) -> Result<Settled, StoreError> {
        let id = id.clone();
        self.submit(Kind::Change, 256, move |tx| {
            tx.extend_job(&id, token, until_ms, actions, is_trial)
        })
        .await
    }

    async fn sweep(&self, _shard: u16, now_ms: u64, limit: usize) -> Result<Swept, StoreError> {
        let limit = limit.max(1);
        let mut swept = Swept::default();
        let mut left = limit;
        while left > 0 {
            let step = left.min(SWEPT_AT_ONCE);
            let sweep = move |tx: &mut super::Transaction| {
                let jobs = tx.sweep_jobs(now_ms, step)?;
                Ok((jobs, tx.sweep_events(now_ms, step - jobs)?))
            };
            let (jobs, events) = self.submit(Kind::Change, 256, sweep).await?;
            swept.jobs += jobs as u64;
            swept.events += events as u64;
            if jobs + events < step {
                return Ok(swept);
            }
            left -= step;
        }
        swept.more = true;
        Ok(swept)
    }

    fn earlier(&self, _shard: u16) -> watch::Receiver<u64> {
        self.shared.jobs.earlier()
    }

    fn shards(&self) -> u16 {
        1
    }

    fn shard_of(&self, _id: &JobId) -> u16 {
        0
    }

    /// There is one, and nobody else.
    async fn hold(&self, _holder: &NodeId, _lease_ms: u64) -> Result<Vec<u16>, StoreError> {
        Ok(vec![0])
    }

    async fn let_go(&self, _holder: &NodeId) -> Result<(), StoreError> {
        Ok(())
    }

    async fn time(&self) -> Result<u64, StoreError> {
        Ok(unix_ms())
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::contract::job_events::event;
    use crate::contract::jobs::{LEASE, NOW, claim, created, holder, id, ids, job, name};
    use crate::embedded::Config;

    fn open(dir: &TempDir) -> std::sync::Arc<EmbeddedStore> {
        EmbeddedStore::open(Config {
            data_dir: dir.path().join("data"),
            ..Config::default()
        })
        .unwrap()
    }

    #[tokio::test]
    async fn a_job_that_cannot_be_read_never_stops_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir);
        for text in ["a", "b", "c"] {
            let new = NewJob {
                cancel_on: vec![name("t:1")],
                ..job(text, NOW)
            };
            created(&*store, new).await;
        }
        let damage = |tx: &mut crate::embedded::Transaction| {
            tx.staged
                .put(job_keys::job(&id("b")), b"not a job".to_vec());
            Ok(())
        };
        store.submit(Kind::Change, 64, damage).await.unwrap();
        let claimed = claim(&*store, NOW).await;
        assert_eq!(ids(&claimed), ["a", "c"]);
        assert_eq!(store.counts().await.unwrap().total(), 2);
        created(&*store, job("d", NOW)).await;
        let outcome = store.event(&event("t:1", NOW)).await.unwrap();
        assert_eq!(outcome, EventOutcome::default());
        assert!(matches!(
            store.get(&id("b")).await,
            Err(StoreError::Damaged(_))
        ));
        assert_eq!(ids(&claim(&*store, NOW).await), ["d"]);
    }

    #[tokio::test]
    async fn what_cannot_be_read_among_many_does_not_hide_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir);
        for n in 0..12 {
            created(&*store, job(&format!("job-{n:02}"), NOW)).await;
        }
        let damage = |tx: &mut crate::embedded::Transaction| {
            for text in ["job-00", "job-01", "job-07"] {
                tx.staged
                    .put(job_keys::job(&id(text)), b"not a job".to_vec());
            }
            // Nothing that could have been written: no text.
            let mut key = job_keys::from(JobState::Pending, NOW);
            key.extend_from_slice(b"job-05\xff");
            tx.staged.put(key, Vec::new());
            Ok(())
        };
        store.submit(Kind::Change, 64, damage).await.unwrap();
        let mut claimed = 0;
        loop {
            let got = store.claim(0, &holder(), NOW, 4, LEASE).await.unwrap();
            claimed += got.jobs.len();
            if got.next_due_ms.is_none_or(|next| next > NOW) {
                break;
            }
        }
        assert_eq!(claimed, 9);
    }

    #[tokio::test]
    async fn claims_of_an_earlier_run_are_given_out_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir);
        for n in 0..700 {
            created(&*store, job(&format!("job-{n:03}"), NOW)).await;
        }
        let before = claim(&*store, NOW).await;
        assert_eq!(before.len(), 700);
        store.close().unwrap();
        drop(store);
        let store = open(&dir);
        let after = claim(&*store, NOW + 1).await;
        assert_eq!(after.len(), 700);
        let newest = before.iter().map(|job| job.token).max();
        assert!(after.iter().all(|job| Some(job.token) > newest));
        // Those of this run have their leases.
        assert!(claim(&*store, NOW + LEASE).await.is_empty());
    }

    #[tokio::test]
    async fn what_is_due_later_wakes_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir);
        created(&*store, job("a", NOW + 1_000)).await;
        let mut earlier = store.earlier(0);
        let claimed = store.claim(0, &holder(), NOW, 10, LEASE).await.unwrap();
        assert_eq!(claimed.next_due_ms, Some(NOW + 1_000));
        earlier.mark_unchanged();
        created(&*store, job("b", NOW + 1_000)).await;
        created(&*store, job("c", NOW + 5_000)).await;
        store.cancel(&id("c"), NOW).await.unwrap();
        store.event(&event("t:1", NOW)).await.unwrap();
        assert!(!earlier.has_changed().unwrap());
        created(&*store, job("d", NOW + 999)).await;
        assert!(earlier.has_changed().unwrap());
    }

    #[tokio::test]
    async fn a_run_that_was_emptied_is_found_again_when_something_comes_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(&dir);
        created(&*store, job("late", NOW + 100)).await;
        assert_eq!(ids(&claim(&*store, NOW + 100).await), ["late"]);
        assert!(claim(&*store, NOW + 100).await.is_empty());
        for (text, at_ms) in [("b", 50), ("a", 20), ("c", 80)] {
            created(&*store, job(text, NOW + at_ms)).await;
        }
        assert_eq!(ids(&claim(&*store, NOW + 100).await), ["a", "b", "c"]);
        created(&*store, job("first", 1)).await;
        assert_eq!(ids(&claim(&*store, NOW + 100).await), ["first"]);
    }
}
