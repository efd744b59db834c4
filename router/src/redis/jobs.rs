//! Delayed jobs in Redis: the seam [`Jobs`].
//!
//! A job is in the shard of its id: what was asked for, what became of it, and every index that leads to it, changed together
//! by one function. An event name is in a shard of its own: the jobs that name it, and what happened under it. What
//! spans the two goes in this order, so that whoever dies in between leaves a harmless orphan, and no event is missed:
//!
//! ```text
//! create: register under each name (answers the newest event) ──▶ write the job (sees what was driven meanwhile)
//! event:  write it down ──▶ drive it to every job registered ──▶ note what it came to, answer
//! sweep:  take the names away ──▶ forget the job
//! ```
//!
//! A registration carries a token of its own, which is in the job as well: what an earlier job of the same id left behind,
//! or one that was never written, leads nowhere.
//!
//! Read on in `job_answer` (what is stored), `job_calls`, `job_creation`, `job_events`, `job_list`, `job_notice`, `job_orphans`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::join_all;
use parking_lot::Mutex;
use redis::Value;
use tokio::sync::watch;

use super::job_answer::{Became, Told, waiting, write_actions, write_plan};
use super::job_calls::{Ends, JobCalls, shard_of};
use super::job_notice::Notices;
use super::keys::SHARDS;
use super::link::Link;
use super::reply::parse;
use super::script::Call;
use crate::{
    ActionState, ClaimToken, Claimed, EventOutcome, Job, JobChange, JobCounts, JobCreated,
    JobCursor, JobEvent, JobFilter, JobId, JobPage, JobPatch, JobSettlement, JobState, Jobs,
    NewJob, NodeId, Settled, StoreError, Swept,
};

/// How long a count is good for while there is much room.
const COUNT_FRESH: Duration = Duration::from_secs(1);
/// Much room.
const COUNT_MARGIN: u64 = 100_000;

/// Delayed jobs in Redis.
pub struct RedisJobs {
    pub(super) link: Arc<Link>,
    pub(super) calls: JobCalls,
    notices: Notices,
    jobs_counted: Counted,
    events_counted: Counted,
    /// Of each shard, the last registration under an event name that a sweep has looked at.
    pub(super) tidied: Vec<Mutex<String>>,
}

/// How many there were, and when that was asked.
type Counted = Mutex<Option<(Instant, u64)>>;

impl RedisJobs {
    pub(super) fn new(link: Arc<Link>, calls: JobCalls) -> Self {
        Self {
            notices: Notices::new(&link, &calls),
            link,
            calls,
            jobs_counted: Mutex::default(),
            events_counted: Mutex::default(),
            tidied: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }

    /// A write about one job, in order with others of that job.
    pub(super) async fn write(&self, id: &JobId, call: Call) -> Result<Value, StoreError> {
        self.link.submit(id.as_str(), call).await
    }

    /// A write about a shard.
    async fn write_shard(&self, shard: u16, call: Call) -> Result<Value, StoreError> {
        self.link.submit(&format!("\0jobs:{shard}"), call).await
    }

    async fn change(&self, id: &JobId, call: Call) -> Result<JobChange, StoreError> {
        Ok(match Became::parse(self.write(id, call).await?)? {
            Became::Done(job) => JobChange::Changed(job.read()?),
            Became::Refused(job) => JobChange::Refused(job.read()?),
            Became::Again => JobChange::Outdated,
            Became::Nothing => JobChange::NotFound,
        })
    }

    /// How many more there may be. Asked anew where that could matter: many processes create at once.
    async fn room(
        &self,
        counted: &Counted,
        max: u64,
        count: impl Iterator<Item = Call>,
    ) -> Result<u64, StoreError> {
        if let Some((at, count)) = *counted.lock()
            && at.elapsed() < COUNT_FRESH
            && count.saturating_add(COUNT_MARGIN) < max
        {
            return Ok(max - count);
        }
        let mut total = 0;
        for answer in self.link.read_all(count.collect()).await {
            total += parse::<u64>(answer?)?;
        }
        *counted.lock() = Some((Instant::now(), total));
        Ok(max.saturating_sub(total))
    }

    pub(super) async fn room_for_jobs(&self) -> Result<u64, StoreError> {
        let count = (0..SHARDS).map(|shard| self.calls.count_jobs(shard));
        let max = self.calls.limits().jobs_max;
        self.room(&self.jobs_counted, max, count).await
    }

    pub(super) async fn room_for_events(&self) -> Result<u64, StoreError> {
        let each = [true, false].map(|open| (0..SHARDS).map(move |shard| (shard, open)));
        let count = each.into_iter().flatten();
        let count = count.map(|(shard, open)| self.calls.count_events(shard, open));
        let max = self.calls.limits().events_max;
        self.room(&self.events_counted, max, count).await
    }

    /// A job that nobody can read would be claimed for ever: it is given up.
    async fn give_up(&self, id: &JobId, token: ClaimToken, error: &StoreError, now_ms: u64) {
        tracing::error!(job = %id, %error, "a delayed job cannot be read, it is given up");
        let ends = Ends {
            error: bounded(error.to_string()),
            ..Ends::of(JobState::Failed)
        };
        let call = self.calls.settle(id, token, &ends, now_ms);
        if let Err(error) = self.write(id, call).await {
            tracing::debug!(%error, "a damaged job is not given up yet");
        }
    }

    async fn forget(&self, told: Vec<Told>) -> Result<u64, StoreError> {
        let mut jobs = Vec::with_capacity(told.len());
        let mut unnamed = Vec::new();
        for job in told {
            jobs.push((job.id.clone(), job.token.clone()));
            let token = job.token.clone();
            // One that cannot be read leaves its names behind, which lead nowhere.
            if let Ok(job) = job.read() {
                unnamed.extend(self.unname(&job.id, &job.cancel_on, &job.trigger_on, &token));
            }
        }
        for unnamed in join_all(unnamed).await {
            unnamed?;
        }
        let forgotten = jobs
            .iter()
            .map(|(id, token)| self.write(id, self.calls.forget(id, token)));
        let mut count = 0;
        for forgotten in join_all(forgotten).await {
            count += parse::<u64>(forgotten?)?;
        }
        Ok(count)
    }
}

#[async_trait]
impl Jobs for RedisJobs {
    async fn create_many(&self, jobs: Vec<NewJob>) -> Vec<Result<JobCreated, StoreError>> {
        Box::pin(self.create_all(jobs)).await
    }

    async fn create_notice(&self, job: NewJob) -> Result<JobCreated, StoreError> {
        Box::pin(self.create_beyond_the_limit(job)).await
    }

    async fn get(&self, id: &JobId) -> Result<Option<Job>, StoreError> {
        let get = self.calls.get(shard_of(id.as_str()), &[id.as_str()]);
        let found = Told::parse_all(self.link.read(get).await?)?;
        found.into_iter().next().map(Told::read).transpose()
    }

    async fn patch(&self, id: &JobId, patch: JobPatch) -> Result<JobChange, StoreError> {
        let plan = patch
            .plan
            .map(|plan| (write_plan(id, &plan), waiting(&plan)));
        let plan = plan
            .as_ref()
            .map(|(plan, actions)| (plan.as_slice(), actions.as_str()));
        let before = patch.instead_of.map(|before| write_plan(id, &before));
        let before = before.unwrap_or_default();
        let call = self.calls.patch(id, patch.fire_at_ms, plan, &before);
        self.change(id, call).await
    }

    async fn cancel(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.change(id, self.calls.cancel(id, now_ms)).await
    }

    async fn trigger(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.change(id, self.calls.trigger(id, now_ms)).await
    }

    async fn retry_failed(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError> {
        self.change(id, self.calls.revive(id, now_ms)).await
    }

    async fn list(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<JobPage, StoreError> {
        Box::pin(self.page(filter, after, limit)).await
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        let each = (0..SHARDS).flat_map(|shard| JobState::ALL.map(|state| (shard, state)));
        let asked = each
            .clone()
            .map(|(shard, state)| self.calls.count(shard, state));
        let answers = self.link.read_all(asked.collect()).await;
        let mut counts = JobCounts::default();
        for ((_, state), answer) in each.zip(answers) {
            *counts.of(state) += parse::<u64>(answer?)?;
        }
        Ok(counts)
    }

    async fn event(&self, event: &JobEvent) -> Result<EventOutcome, StoreError> {
        Box::pin(self.drive(event)).await
    }

    async fn unfinished_events(
        &self,
        shard: u16,
        before_ms: u64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError> {
        self.open_events(shard, before_ms, limit).await
    }

    async fn claim(
        &self,
        shard: u16,
        holder: &NodeId,
        now_ms: u64,
        limit: usize,
        lease_ms: u64,
    ) -> Result<Claimed, StoreError> {
        let until_ms = now_ms.saturating_add(lease_ms);
        let call = self
            .calls
            .claim(shard, holder, now_ms, limit.max(1), until_ms);
        let mut answer = parse::<Vec<Value>>(self.write_shard(shard, call).await?)?.into_iter();
        let next_due_ms: Option<u64> = parse(answer.next().unwrap_or_default())?;
        let mut claimed = Claimed {
            jobs: Vec::new(),
            next_due_ms,
        };
        for told in Told::parse_all(answer.next().unwrap_or_default())? {
            let (id, token) = (told.id.clone(), told.fence);
            match told.read() {
                Ok(job) => claimed.jobs.push(job),
                Err(error) => self.give_up(&id, token, &error, now_ms).await,
            }
        }
        Ok(claimed)
    }

    async fn settle(
        &self,
        id: &JobId,
        token: ClaimToken,
        settlement: JobSettlement,
        now_ms: u64,
    ) -> Result<Settled, StoreError> {
        let ends = match settlement {
            JobSettlement::Fired => Ends::of(JobState::Fired),
            JobSettlement::Skipped => Ends::of(JobState::Skipped),
            JobSettlement::Retry {
                at_ms,
                actions,
                error,
            } => Ends {
                due_ms: at_ms,
                actions: write_actions(&actions),
                error: bounded(error),
                ..Ends::of(JobState::Retrying)
            },
            JobSettlement::Failed { actions, error } => Ends {
                actions: write_actions(&actions),
                error: bounded(error),
                ..Ends::of(JobState::Failed)
            },
            JobSettlement::PutOff {
                at_ms,
                actions,
                begun,
                reason,
            } => Ends {
                due_ms: at_ms,
                actions: write_actions(&actions),
                error: bounded(reason),
                ..Ends::put_off(begun)
            },
        };
        let call = self.calls.settle(id, token, &ends, now_ms);
        settled(self.write(id, call).await?)
    }

    async fn extend(
        &self,
        id: &JobId,
        token: ClaimToken,
        until_ms: u64,
        actions: Vec<ActionState>,
        is_trial: bool,
    ) -> Result<Settled, StoreError> {
        let actions = write_actions(&actions);
        let call = self.calls.extend(id, token, until_ms, &actions, is_trial);
        settled(self.write(id, call).await?)
    }

    async fn sweep(&self, shard: u16, now_ms: u64, limit: usize) -> Result<Swept, StoreError> {
        let limit = limit.max(1);
        let mut swept = Swept::default();
        let mut left = limit;
        for state in JobState::ALL.into_iter().filter(|state| state.is_final()) {
            let over = self.calls.over(shard, state, now_ms, left);
            let over = Told::parse_all(self.write_shard(shard, over).await?)?;
            left -= over.len().min(left);
            swept.jobs += Box::pin(self.forget(over)).await?;
            if left == 0 {
                return Ok(Swept {
                    more: true,
                    ..swept
                });
            }
        }
        Box::pin(self.tidy_names(shard)).await?;
        let events = self.calls.event_sweep(shard, now_ms, left);
        swept.events = parse(self.write_shard(shard, events).await?)?;
        swept.more = usize::try_from(swept.events).is_ok_and(|count| count >= left);
        Ok(swept)
    }

    fn earlier(&self, shard: u16) -> watch::Receiver<u64> {
        self.notices.of(shard)
    }

    fn shards(&self) -> u16 {
        SHARDS
    }

    fn shard_of(&self, id: &JobId) -> u16 {
        shard_of(id.as_str())
    }

    async fn hold(&self, holder: &NodeId, lease_ms: u64) -> Result<Vec<u16>, StoreError> {
        let hold = self.calls.hold(holder, lease_ms.max(1));
        parse(self.link.submit(LEASES, hold).await?)
    }

    async fn let_go(&self, holder: &NodeId) -> Result<(), StoreError> {
        let leave = self.calls.hold(holder, 0);
        self.link.submit(LEASES, leave).await.map(drop)
    }

    async fn time(&self) -> Result<u64, StoreError> {
        let (seconds, micros): (u64, u64) = parse(self.link.read(self.calls.time()).await?)?;
        Ok(seconds * 1_000 + micros / 1_000)
    }
}

/// Leases keep their order among each other: a renewal that was called earlier does not undo a leave.
const LEASES: &str = "\0job leases";

/// What is kept of the text of an error, in bytes.
const ERROR_BYTES_MAX: usize = 1_000;

fn bounded(mut error: String) -> String {
    if error.len() > ERROR_BYTES_MAX {
        error.truncate(error.floor_char_boundary(ERROR_BYTES_MAX));
    }
    error
}

fn settled(answer: Value) -> Result<Settled, StoreError> {
    Ok(match parse::<u8>(answer)? {
        1 => Settled::Done,
        _ => Settled::Stale,
    })
}
