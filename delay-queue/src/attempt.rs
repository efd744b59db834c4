//! One claimed job, from the claim to the settlement.
//!
//! While it is carried out its lease is prolonged. It ends in one place, whatever happens: done, put off, or given up with a reason. A
//! job that cannot be read, or that takes whoever carries it out down with it, is given up, too, so that it never holds up the others.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use moorline_router::{ActionState, Job, JobSettlement, JobState, Settled, StoreError};
use moorline_upstream_worker::backoff::backoff;

use crate::hands::{Checked, Done};
use crate::notify::{self, Ending};
use crate::runner::Runner;

/// Claims of a job beside its attempts that failed: beyond it, it is the job that ends the processes.
const LOST_CLAIMS_MAX: u32 = 5;
/// Wait after the store failed.
const STORE_RETRY: Duration = Duration::from_millis(500);
/// Longest wait of a job that found no room.
const BUSY_WAIT: Duration = Duration::from_secs(10);

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Fired,
    Skipped,
    Later {
        reason: String,
        retry_after: Option<Duration>,
    },
    /// Nothing speaks against another attempt, however many there were.
    PutOff(String),
    Failed(String),
}

impl From<Done> for End {
    fn from(done: Done) -> Self {
        match done {
            Done::Yes => Self::Fired,
            Done::Later {
                reason,
                retry_after,
            } => Self::Later {
                reason,
                retry_after,
            },
            Done::Busy(reason) => Self::PutOff(reason),
            Done::Never(reason) => Self::Failed(reason),
        }
    }
}

/// How far each action is, and whether anything was begun.
struct Progress(Mutex<Vec<ActionState>>);

impl Progress {
    fn get(&self) -> Vec<ActionState> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, at: usize, state: ActionState) {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of) = states.get_mut(at) {
            *of = state;
        }
    }
}

impl Runner {
    /// Carries `job` out and settles it.
    pub(crate) async fn carry_out(self: Arc<Self>, job: Job) {
        self.note_begin(&job);
        let progress = Progress(Mutex::new(states_of(&job)));
        let work = AssertUnwindSafe(self.work(&job, &progress)).catch_unwind();
        let mut work = Box::pin(work);
        let lease = self.config.lease;
        let end = loop {
            tokio::select! {
                biased;
                end = &mut work => break end.unwrap_or_else(|_| {
                    tracing::error!(job = %job.id, "a delayed job cannot be carried out");
                    End::Failed("it cannot be carried out: a defect of the gateway".to_owned())
                }),
                () = tokio::time::sleep(lease / 3) => {
                    if !self.prolong(&job, &progress).await {
                        return self.metrics.stale.increment(1);
                    }
                }
                () = self.grace_over() => break End::PutOff("the process that carried it out stopped".to_owned()),
            }
        };
        drop(work);
        self.settle(&job, &progress, end).await;
    }

    fn note_begin(&self, job: &Job) {
        if job.attempts > 0 || job.claims > 1 {
            return;
        }
        let now_ms = self.clock.now_ms();
        if now_ms < job.fire_at_ms {
            self.metrics.early.increment(1);
            tracing::error!(job = %job.id, now_ms, due_ms = job.fire_at_ms, "a delayed job began before its time");
        }
        let late = Duration::from_millis(now_ms.saturating_sub(job.fire_at_ms));
        self.metrics.lateness.record(late);
    }

    async fn work(&self, job: &Job, progress: &Progress) -> End {
        if job.claims > job.attempts.saturating_add(LOST_CLAIMS_MAX) {
            let reason = format!(
                "it was begun {} times and ended {} times: it may end the processes that carry it out",
                job.claims - 1,
                job.attempts
            );
            return End::Failed(reason);
        }
        let states = progress.get();
        let is_new = states.iter().all(|state| *state == ActionState::Waiting);
        if let (Some(check), true) = (&job.plan.check, is_new) {
            match self.hands.check(job, check).await {
                Checked::Fire => {}
                Checked::Skip => return End::Skipped,
                Checked::Not(done) => return done.into(),
            }
        }
        for (at, action) in job.plan.actions.iter().enumerate() {
            if states.get(at) == Some(&ActionState::Done) {
                continue;
            }
            let done = self.hands.act(job, at, action).await;
            let state = match &done {
                Done::Yes => ActionState::Done,
                Done::Later { .. } | Done::Busy(_) => ActionState::Waiting,
                Done::Never(_) => ActionState::Failed,
            };
            progress.set(at, state);
            if done != Done::Yes {
                return done.into();
            }
        }
        End::Fired
    }

    /// Keeps the job for longer; says whether it is still ours.
    async fn prolong(&self, job: &Job, progress: &Progress) -> bool {
        let until_ms = self.clock.now_ms() + self.config.lease_ms();
        let prolonged = self
            .jobs
            .extend(&job.id, job.token, until_ms, progress.get())
            .await;
        match prolonged {
            Ok(Settled::Done) => true,
            Ok(Settled::Stale) => false,
            Err(error) => {
                tracing::debug!(job = %job.id, %error, "the lease of a delayed job is not prolonged");
                true
            }
        }
    }

    async fn settle(&self, job: &Job, progress: &Progress, end: End) {
        let settlement = self.settlement(job, progress, &end);
        let deadline = tokio::time::Instant::now() + self.config.lease;
        loop {
            let settled = self.end(job, &settlement).await;
            match settled {
                Ok(Settled::Done) => return self.count(job, &settlement),
                Ok(Settled::Stale) => {
                    tracing::debug!(job = %job.id, "a delayed job was claimed by another meanwhile");
                    return self.metrics.stale.increment(1);
                }
                Err(error) if tokio::time::Instant::now() < deadline && !self.is_over() => {
                    tracing::debug!(job = %job.id, %error, "the end of a delayed job is not written, trying again");
                }
                Err(error) => {
                    // It is claimed again when its lease has ended, and then repeats itself under the same ids.
                    tracing::warn!(job = %job.id, %error, "the end of a delayed job is not written");
                    return;
                }
            }
            tokio::time::sleep(STORE_RETRY).await;
        }
    }

    async fn end(&self, job: &Job, settlement: &JobSettlement) -> Result<Settled, StoreError> {
        let now_ms = self.clock.now_ms();
        let ending = match settlement {
            JobSettlement::Fired => Some(Ending::Fired),
            JobSettlement::Failed { error, .. } => Some(Ending::Failed(error)),
            _ => None,
        };
        if let (Some(ending), Some(_)) = (ending, &job.plan.notify) {
            let retry = self.config.retry.policy();
            notify::tell(&*self.jobs, job, ending, now_ms, retry).await?;
        }
        self.jobs
            .settle(&job.id, job.token, settlement.clone(), now_ms)
            .await
    }

    fn settlement(&self, job: &Job, progress: &Progress, end: &End) -> JobSettlement {
        let actions = progress.get();
        let attempts = job.attempts.saturating_add(1);
        let retry = job.plan.retry;
        let fraction = (self.random)();
        let later = |wait: Duration, error: &str| JobSettlement::Retry {
            at_ms: self.clock.now_ms() + u64::try_from(wait.as_millis()).unwrap_or(u64::MAX / 2),
            actions: actions.clone(),
            error: error.to_owned(),
        };
        match end {
            End::Fired => JobSettlement::Fired,
            End::Skipped => JobSettlement::Skipped,
            End::PutOff(reason) => {
                let longest = BUSY_WAIT.min(Duration::from_secs(1) * attempts);
                later(longest.mul_f64(fraction), reason)
            }
            End::Later {
                reason,
                retry_after,
            } if attempts < retry.attempts_max => {
                let first = Duration::from_millis(retry.first_ms);
                let max = Duration::from_millis(retry.max_ms);
                later(
                    backoff(first, max, attempts, *retry_after, fraction),
                    reason,
                )
            }
            End::Later { reason, .. } | End::Failed(reason) => JobSettlement::Failed {
                actions,
                error: reason.clone(),
            },
        }
    }

    fn count(&self, job: &Job, settlement: &JobSettlement) {
        let metrics = &self.metrics;
        match settlement {
            JobSettlement::Fired => metrics.fired.increment(1),
            JobSettlement::Skipped => metrics.skipped.increment(1),
            JobSettlement::Retry { error, .. } => {
                tracing::debug!(job = %job.id, attempts = job.attempts + 1, error, "a delayed job is tried again");
                metrics.retried.increment(1);
            }
            JobSettlement::Failed { error, .. } => {
                tracing::info!(job = %job.id, attempts = job.attempts + 1, error, "a delayed job has failed");
                metrics.failed.increment(1);
            }
            JobSettlement::Release => {}
        }
    }
}

/// What failed before and is tried again waits.
fn states_of(job: &Job) -> Vec<ActionState> {
    debug_assert_eq!(job.state, JobState::Firing);
    let mut states = job.actions.clone();
    states.resize(job.plan.actions.len(), ActionState::Waiting);
    for state in &mut states {
        if *state == ActionState::Failed {
            *state = ActionState::Waiting;
        }
    }
    states
}
