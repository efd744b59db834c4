//! The seam of delayed jobs: what is to be done later, unless something happens before.
//!
//! A job waits (`pending`) until it is due, is claimed by whoever carries jobs out (`firing`), and ends. Everything that a
//! caller may do to a job that waits (patch, cancel, trigger, an event) is atomic against the claim: exactly one of them
//! comes first. Once a job was claimed it has *begun*, and only a settlement under the newest claim's token changes it.
//!
//! ```text
//! create ──▶ pending ──claim──▶ firing ──settle──▶ fired | skipped | failed
//!              │  ▲               │ ▲                                 │
//!   cancel,    │  └─ patch,       ▼ │ claim, when due or              └─ retry_failed ─▶ retrying
//!   an event   ▼     trigger    retrying  when the lease has ended
//!          cancelled
//! ```
//!
//! Nothing here asks for the time: every call is given `now_ms`, by one [`Clock`] of the process, so that what is early or
//! late is decided in one place. What a job does is not known here either: see [`JobAction`].

mod clock;
mod event;
mod job;
mod life;
mod publication;
mod source;

use async_trait::async_trait;
use jiff::SignedDuration;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use clock::Clock;
pub use event::{EventKind, EventName, EventOutcome, JobEvent};
pub use job::{
    ActionKind, ActionState, ClaimToken, Job, JobAction, JobId, JobPlan, JobState, NewJob,
    RetryPolicy,
};
pub use publication::{DelayedPublication, job_id_of_device};
pub use source::{EventPart, EventSource, TopicEvents, event_of_message};

use crate::{NodeId, StoreError};

/// What became of a job that was to be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobCreated {
    /// It is new. An event that came before it may have cancelled it already, or made it due.
    Created(Job),
    /// There is a job of this id and fingerprint: this is it, as it is now.
    Same(Job),
    /// There is a job of this id and another fingerprint.
    Conflict(Job),
}

/// What is to be different about a job that waits. What is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobPatch {
    /// When it is due, Unix milliseconds.
    pub fire_at_ms: Option<u64>,
    /// What it does.
    pub plan: Option<JobPlan>,
    /// What it does until now: where it does something else meanwhile, and not what `plan` says either, nothing is changed, and the answer
    /// is [`JobChange::Outdated`]. So nobody who makes a new plan out of the old one takes back what somebody else was answered.
    pub instead_of: Option<JobPlan>,
}

/// What a call to change a job that waits has done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobChange {
    /// What was asked; the job as it is now. A job that waited no longer never fires as it was before.
    Changed(Job),
    /// Nothing: the job has begun or ended, as its state says.
    Refused(Job),
    /// Nothing: the job waits, and does not do what [`JobPatch::instead_of`] says any more.
    Outdated,
    /// There is no such job, or it ended and its time is over.
    NotFound,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobSettlement {
    /// Every action is done.
    Fired,
    /// The check said that there is nothing to do.
    Skipped,
    /// The job is claimed again, not before `at_ms`. Counts an attempt.
    Retry {
        /// Unix milliseconds.
        at_ms: u64,
        /// The state of each action, in their order.
        actions: Vec<ActionState>,
        /// Why, for a person.
        error: String,
    },
    /// It will not be tried again by itself: a dead letter. Counts an attempt.
    Failed {
        /// The state of each action, in their order.
        actions: Vec<ActionState>,
        /// Why, for a person.
        error: String,
    },
    /// It makes room: as if it had not been claimed, so that no attempt is counted. A job of which nothing was begun, by this claim or
    /// an earlier one, waits again, and can be cancelled; any other one is `retrying`.
    PutOff {
        /// Claimed again not before this, Unix milliseconds.
        at_ms: u64,
        /// The state of each action, in their order.
        actions: Vec<ActionState>,
        /// Whether this claim has begun anything. The process that did has survived it: [`Job::trials`] begins anew.
        begun: bool,
        /// Why, for a person.
        reason: String,
    },
}

/// Whether a settlement counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// The job is as the settlement says. Also the answer where it had been settled under the same token before.
    Done,
    /// The job was claimed again since, or is gone: whatever the holder of the token does counts for nothing.
    Stale,
}

/// What a claim got.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claimed {
    /// In the order of ([`Job::due_ms`], id), each with its new token, state [`JobState::Firing`].
    pub jobs: Vec<Job>,
    /// When the next claim gets something, Unix milliseconds: the earliest due job or end of a lease that is left.
    /// In the past where the limit ended this claim. `None` where there is none.
    pub next_due_ms: Option<u64>,
}

/// Which jobs to list. What is `None` does not matter.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobFilter {
    /// The id begins with this.
    pub prefix: Option<String>,
    /// Among `cancel_on` or `trigger_on`.
    pub event: Option<EventName>,
    /// The state.
    pub state: Option<JobState>,
    /// [`Job::at_ms`] is this or later, Unix milliseconds.
    pub from_ms: Option<u64>,
    /// [`Job::at_ms`] is before this, Unix milliseconds.
    pub to_ms: Option<u64>,
}

impl JobFilter {
    /// Whether the list is in the order of ids rather than of ([`Job::at_ms`], id).
    pub fn is_by_id(&self) -> bool {
        self.prefix.is_some() || self.event.is_some()
    }

    /// Whether `job` belongs to the list.
    pub fn matches(&self, job: &Job) -> bool {
        let prefix = self.prefix.as_deref();
        prefix.is_none_or(|prefix| job.id.as_str().starts_with(prefix))
            && self.event.as_ref().is_none_or(|event| job.names(event))
            && self.state.is_none_or(|state| job.state == state)
            && self.from_ms.is_none_or(|from| job.at_ms() >= from)
            && self.to_ms.is_none_or(|to| job.at_ms() < to)
    }
}

/// Where a page of a list ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobCursor {
    /// [`Job::at_ms`] of the last job that was looked at.
    pub at_ms: u64,
    /// Of the last job that was looked at.
    pub id: JobId,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobPage {
    /// In the order of the list. A page may have fewer jobs than asked for, or none, and not be the last.
    pub jobs: Vec<Job>,
    /// Where to go on; `None` at the end.
    pub next: Option<JobCursor>,
}

/// How many jobs are kept in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "one field a state")]
pub struct JobCounts {
    pub pending: u64,
    pub firing: u64,
    pub retrying: u64,
    pub fired: u64,
    pub skipped: u64,
    pub cancelled: u64,
    pub failed: u64,
}

impl JobCounts {
    /// Of all states together.
    pub fn total(mut self) -> u64 {
        let states = JobState::ALL.into_iter();
        states.map(|state| *self.of(state)).sum()
    }

    /// Those of one state.
    pub fn of(&mut self, state: JobState) -> &mut u64 {
        match state {
            JobState::Pending => &mut self.pending,
            JobState::Firing => &mut self.firing,
            JobState::Retrying => &mut self.retrying,
            JobState::Fired => &mut self.fired,
            JobState::Skipped => &mut self.skipped,
            JobState::Cancelled => &mut self.cancelled,
            JobState::Failed => &mut self.failed,
        }
    }
}

/// What a step of sweeping removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    /// Jobs that had ended.
    pub jobs: u64,
    /// Events whose window is over.
    pub events: u64,
    /// Whether the limit ended the step, so that the next one should follow soon.
    pub more: bool,
}

/// What is kept of delayed jobs, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobLimits {
    /// How long a job that fired, was skipped or was cancelled is kept, so that it can be asked for and its
    /// creation repeated.
    #[serde(with = "crate::duration")]
    pub retention: SignedDuration,
    /// How long a job that failed is kept, unless it is tried again.
    #[serde(with = "crate::duration")]
    pub failed_retention: SignedDuration,
    /// How long an event is remembered: it counts for jobs that are created within this time after it.
    #[serde(with = "crate::duration")]
    pub event_window: SignedDuration,
    /// Jobs of all states together; beyond it none is created.
    pub jobs_max: u64,
    /// Events remembered; beyond it none is taken.
    pub events_max: u64,
    /// Jobs of one device that have not ended; beyond it none of its is created. A device that asks for many at the same moment may get
    /// some more where jobs are shared.
    pub device_jobs_max: u64,
}

impl Default for JobLimits {
    fn default() -> Self {
        Self {
            retention: SignedDuration::from_hours(1),
            failed_retention: SignedDuration::from_hours(7 * 24),
            event_window: SignedDuration::from_mins(10),
            jobs_max: 100_000_000,
            events_max: 1_000_000,
            device_jobs_max: 1_000,
        }
    }
}

/// A duration of the limits in milliseconds.
pub(crate) fn limit_ms(duration: SignedDuration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(0)
}

impl JobLimits {
    /// How long a job is kept after it ended in `state`, milliseconds.
    pub fn retention_ms(&self, state: JobState) -> u64 {
        limit_ms(match state {
            JobState::Failed => self.failed_retention,
            _ => self.retention,
        })
    }

    /// How long an event is remembered, milliseconds.
    pub fn event_window_ms(&self) -> u64 {
        limit_ms(self.event_window)
    }
}

/// Delayed jobs.
///
/// What a call has answered is durable. A call that failed with [`StoreError::Unavailable`] may or may not have happened;
/// each can be repeated as it is.
#[async_trait]
pub trait Jobs: Send + Sync {
    /// Creates jobs; answers each in its place. The same id twice is the same job if the fingerprint is the same, also
    /// after it began, was patched or ended, as long as it is kept. An event that came within the declared window before
    /// counts: a job that names it in `cancel_on` is created as cancelled, one that names it in `trigger_on` is due at its
    /// `created_ms`. [`StoreError::Full`] at [`JobLimits::jobs_max`], [`StoreError::Quota`] at
    /// [`JobLimits::device_jobs_max`].
    async fn create_many(&self, jobs: Vec<NewJob>) -> Vec<Result<JobCreated, StoreError>>;

    /// Creates one job; see [`Jobs::create_many`].
    async fn create(&self, job: NewJob) -> Result<JobCreated, StoreError> {
        let mut answers = self.create_many(vec![job]).await;
        answers.pop().unwrap_or_else(|| {
            Err(StoreError::Unavailable(
                "the store did not answer for the job".into(),
            ))
        })
    }

    /// Creates one job also at [`JobLimits::jobs_max`]: what tells of the end of another one, of which there is one at most, is not lost for
    /// want of room.
    async fn create_notice(&self, job: NewJob) -> Result<JobCreated, StoreError>;

    /// The job, as long as it is kept.
    async fn get(&self, id: &JobId) -> Result<Option<Job>, StoreError>;

    /// Changes a job that waits.
    async fn patch(&self, id: &JobId, patch: JobPatch) -> Result<JobChange, StoreError>;

    /// Ends a job that waits as cancelled. One that is cancelled already is answered as changed.
    async fn cancel(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError>;

    /// Makes a job that waits due now, if it is not already.
    async fn trigger(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError>;

    /// Tries a job that failed again, now: it is `retrying`, has no attempts behind it, and what of it is done
    /// stays done. Any other state is refused.
    async fn retry_failed(&self, id: &JobId, now_ms: u64) -> Result<JobChange, StoreError>;

    /// Jobs by `filter`, from after `after`, at most `limit`: in the order of the bytes of their ids where a prefix or an
    /// event is given ([`JobFilter::is_by_id`]), else of ([`Job::at_ms`], id). The page is no snapshot: a job that changes
    /// meanwhile may be missing or come twice.
    async fn list(
        &self,
        filter: &JobFilter,
        after: Option<&JobCursor>,
        limit: usize,
    ) -> Result<JobPage, StoreError>;

    /// How many jobs are kept, without counting them one by one.
    async fn counts(&self) -> Result<JobCounts, StoreError>;

    /// Something happened: of the jobs that wait, those that name it in `cancel_on` are cancelled, those that name it only
    /// in `trigger_on` are due now. The event is durable first and remembered for the declared window; then it is
    /// driven to every job, and the answer counts those that it changed. The same id of the same name again is the same event: it is
    /// driven to its end if it was not, changes nothing twice, and is answered with the same counts. Jobs
    /// created after it see it and are not counted. [`StoreError::Full`] at [`JobLimits::events_max`].
    async fn event(&self, event: &JobEvent) -> Result<EventOutcome, StoreError>;

    /// Events of a shard that came before `before_ms` and were not driven to every job, because the process or the store
    /// went away meanwhile; at most `limit`. Whoever holds the shard gives them to [`Jobs::event`] again.
    async fn unfinished_events(
        &self,
        shard: u16,
        before_ms: u64,
        limit: usize,
    ) -> Result<Vec<JobEvent>, StoreError>;

    /// Takes up to `limit` jobs of a shard that are due at `now_ms`, in the order of (due, id), for `holder`, and bounded
    /// to about [`CLAIM_BYTES_MAX`]: none that is not due, none that another claim has whose lease has not ended. Where a lease has
    /// ended, the job is taken from its holder: its token counts for nothing from here on.
    async fn claim(
        &self,
        shard: u16,
        holder: &NodeId,
        now_ms: u64,
        limit: usize,
        lease_ms: u64,
    ) -> Result<Claimed, StoreError>;

    /// Ends the claim of `token`.
    async fn settle(
        &self,
        id: &JobId,
        token: ClaimToken,
        settlement: JobSettlement,
        now_ms: u64,
    ) -> Result<Settled, StoreError>;

    /// Lets the claim of `token` go on until `until_ms`, and keeps the state of each action so far, so that whoever has to go on
    /// with the job does not begin again. With `is_trial` the claim counts among [`Job::trials`]. [`Settled::Stale`] also where the claim
    /// was settled.
    async fn extend(
        &self,
        id: &JobId,
        token: ClaimToken,
        until_ms: u64,
        actions: Vec<ActionState>,
        is_trial: bool,
    ) -> Result<Settled, StoreError>;

    /// Removes up to `limit` jobs and events of a shard whose declared time is over at `now_ms`. Nothing else does:
    /// whoever holds the shard calls it every so often.
    async fn sweep(&self, shard: u16, now_ms: u64, limit: usize) -> Result<Swept, StoreError>;

    /// Changes whenever a job of the shard may have become due earlier than [`Claimed::next_due_ms`] said. Whoever
    /// marks it as seen, claims, and then waits for it or the next due time, misses nothing. A notice may be lost with
    /// a connection to a store: nobody waits for it alone, without a bound.
    fn earlier(&self, shard: u16) -> watch::Receiver<u64>;

    /// How many shards there are; the same in the whole deployment, and one on a single machine.
    fn shards(&self) -> u16;

    /// The shard of a job.
    fn shard_of(&self, id: &JobId) -> u16;

    /// Takes part in carrying out jobs for `lease_ms` milliseconds more; answers the shards that are `holder`'s meanwhile. All who
    /// take part get about the same number; a shard changes hands only when its holder has seen that it
    /// is to be another's, or its lease has ended. Two who hold one at once do no harm: claims are fenced one by one.
    async fn hold(&self, holder: &NodeId, lease_ms: u64) -> Result<Vec<u16>, StoreError>;

    /// Takes part no longer.
    async fn let_go(&self, holder: &NodeId) -> Result<(), StoreError>;

    /// The clock that all who share the store go by, Unix milliseconds. See [`Clock`].
    async fn time(&self) -> Result<u64, StoreError>;
}

/// About how many bytes of plans one claim takes at most; at least one job if there is one.
pub const CLAIM_BYTES_MAX: usize = 4 << 20;
