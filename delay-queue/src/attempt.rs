//! One claimed job, from the claim to the settlement.
//!
//! While it is carried out its lease is prolonged. It ends in one place, whatever happens: done, put off, or given up with a reason. A
//! job that cannot be read, or that takes whoever carries it out down with it, is given up, too, so that it never holds up the others.
//!
//! That a job was claimed and not settled says little: the answer to the claim was lost, or the process was killed for another reason,
//! with a thousand jobs in its hands. So one to which that has happened some times is begun as a *trial*: the store is told before.
//! Who is told that trials have ended the process time and again, the last ones without another trial at the same time, knows what it was.

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use moorline_router::{ActionState, Job, JobSettlement, JobState, Settled, StoreError};
use moorline_upstream_worker::backoff::backoff;
use tokio::sync::OwnedSemaphorePermit;

use crate::hands::{Checked, Done};
use crate::notify::{self, Ending};
use crate::runner::Runner;

/// Claims of a job that nobody settled: after so many it is begun as a trial.
const LOST_CLAIMS: u32 = 3;
/// Trials that nobody settled: after so many it is given up.
const TRIALS_MAX: u32 = 5;
/// After so many it is tried while no other job is.
const SHARED_TRIALS: u32 = 2;
/// Trials of one process at the same time.
pub(crate) const TRIALS_AT_ONCE: u32 = 64;
/// Longest wait for another trial to end.
const TRIAL_WAIT: Duration = Duration::from_secs(2);
/// Wait after the store failed.
const STORE_RETRY: Duration = Duration::from_millis(500);
/// Longest wait before somebody is told of an end again.
const TELL_WAIT: Duration = Duration::from_secs(5);

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
    PutOff {
        reason: String,
        wait: Duration,
    },
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
            Done::Busy { reason, wait } => Self::PutOff { reason, wait },
            Done::Never(reason) => Self::Failed(reason),
        }
    }
}

/// How far each action is, and whether this claim has begun anything.
struct Progress {
    states: Mutex<Vec<ActionState>>,
    begun: AtomicBool,
}

impl Progress {
    fn of(job: &Job) -> Self {
        debug_assert_eq!(job.state, JobState::Firing);
        let mut states = job.actions.clone();
        states.resize(job.plan.actions.len(), ActionState::Waiting);
        Self {
            states: Mutex::new(states),
            begun: AtomicBool::new(false),
        }
    }

    fn get(&self) -> Vec<ActionState> {
        self.states
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, at: usize, state: ActionState) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of) = states.get_mut(at) {
            *of = state;
        }
    }

    /// What is not done will not be.
    fn give_up(&self) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let left = states.iter_mut().find(|state| **state != ActionState::Done);
        if let Some(left) = left {
            *left = ActionState::Failed;
        }
    }
}

impl Runner {
    /// Carries `job` out and settles it.
    pub(crate) async fn carry_out(self: Arc<Self>, job: Job) {
        let claimed_ms = self.clock.now_ms();
        if claimed_ms < job.fire_at_ms {
            self.metrics.early.increment(1);
            tracing::error!(job = %job.id, claimed_ms, due_ms = job.fire_at_ms, "a delayed job began before its time");
        }
        let progress = Progress::of(&job);
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
                () = self.grace_over() => break End::PutOff {
                    reason: "the process that carried it out stopped".to_owned(),
                    wait: Duration::ZERO,
                },
            }
        };
        drop(work);
        // Of one that is put off it is known when it begins.
        let begins = progress.begun.load(Ordering::Relaxed) || !matches!(end, End::PutOff { .. });
        if begins && job.attempts == 0 && job.claims <= 1 {
            let late = Duration::from_millis(claimed_ms.saturating_sub(job.fire_at_ms));
            self.metrics.lateness.record(late);
        }
        self.settle(&job, &progress, end).await;
    }

    /// Whether a job may be begun, and, where it is begun as a trial, room for that.
    async fn admit(
        &self,
        job: &Job,
        progress: &Progress,
    ) -> Result<Option<OwnedSemaphorePermit>, End> {
        let lost = job.claims.saturating_sub(job.attempts).saturating_sub(1);
        if lost < LOST_CLAIMS {
            return Ok(None);
        }
        if job.trials >= TRIALS_MAX {
            let reason = format!(
                "it was begun {} times, and each time the process that carried it out ended",
                job.trials
            );
            return Err(End::Failed(reason));
        }
        let put_off = |reason: String| End::PutOff {
            reason,
            wait: TRIAL_WAIT.mul_f64((self.random)()),
        };
        let room = match job.trials < SHARED_TRIALS {
            true => 1,
            false => TRIALS_AT_ONCE,
        };
        let room = Arc::clone(&self.trials).try_acquire_many_owned(room);
        let room = room.map_err(|_| put_off("other jobs are tried at the moment".to_owned()))?;
        let until_ms = self.clock.now_ms() + self.config.lease_ms();
        let noted = self
            .jobs
            .extend(&job.id, job.token, until_ms, progress.get(), true);
        match noted.await {
            Ok(Settled::Done) => {
                progress.begun.store(true, Ordering::Relaxed);
                Ok(Some(room))
            }
            // The settlement finds out about it.
            Ok(Settled::Stale) => Err(put_off("another one has claimed it".to_owned())),
            Err(error) => Err(put_off(error.to_string())),
        }
    }

    async fn work(&self, job: &Job, progress: &Progress) -> End {
        let states = progress.get();
        if states.contains(&ActionState::Failed) {
            // It was given up by an earlier claim, and only the telling was left to do.
            let reason = job.last_error.clone();
            return End::Failed(reason.unwrap_or_else(|| "an action was given up".to_owned()));
        }
        let _room = match self.admit(job, progress).await {
            Ok(room) => room,
            Err(end) => return end,
        };
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
            let done = self.hands.act(job, at, action, &progress.begun).await;
            let state = match &done {
                Done::Yes => ActionState::Done,
                Done::Later { .. } | Done::Busy { .. } => ActionState::Waiting,
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
            .extend(&job.id, job.token, until_ms, progress.get(), false)
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
        let mut settlement = self.settlement(job, progress, end);
        if let Err(error) = self.tell(job, &settlement).await {
            tracing::debug!(job = %job.id, %error, "nobody is told of the end of a delayed job yet");
            settlement = self.tell_later(progress, settlement, &error);
        }
        let deadline = tokio::time::Instant::now() + self.config.lease;
        loop {
            let now_ms = self.clock.now_ms();
            let settled = self
                .jobs
                .settle(&job.id, job.token, settlement.clone(), now_ms);
            match settled.await {
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

    /// Sees to it that whoever wants to know hears of the end.
    async fn tell(&self, job: &Job, settlement: &JobSettlement) -> Result<(), StoreError> {
        let ending = match settlement {
            JobSettlement::Fired => Ending::Fired,
            JobSettlement::Failed { error, .. } => Ending::Failed(error),
            _ => return Ok(()),
        };
        let retry = self.config.retry.policy();
        notify::tell(&*self.jobs, job, ending, self.clock.now_ms(), retry).await
    }

    /// What was done is kept, so that whoever claims the job next has only the telling left to do.
    fn tell_later(
        &self,
        progress: &Progress,
        settlement: JobSettlement,
        why: &StoreError,
    ) -> JobSettlement {
        let reason = match settlement {
            JobSettlement::Failed { error, .. } => error,
            _ => format!("nobody could be told of its end: {why}"),
        };
        JobSettlement::PutOff {
            at_ms: self.after(TELL_WAIT.mul_f64((self.random)())),
            actions: progress.get(),
            begun: true,
            reason,
        }
    }

    /// Unix milliseconds.
    fn after(&self, wait: Duration) -> u64 {
        self.clock.now_ms() + u64::try_from(wait.as_millis()).unwrap_or(u64::MAX / 2)
    }

    fn settlement(&self, job: &Job, progress: &Progress, end: End) -> JobSettlement {
        let attempts = job.attempts.saturating_add(1);
        let retry = job.plan.retry;
        match end {
            End::Fired => JobSettlement::Fired,
            End::Skipped => JobSettlement::Skipped,
            End::PutOff { reason, wait } => JobSettlement::PutOff {
                at_ms: self.after(wait),
                actions: progress.get(),
                begun: progress.begun.load(Ordering::Relaxed),
                reason,
            },
            End::Later {
                reason,
                retry_after,
            } if attempts < retry.attempts_max => {
                let first = Duration::from_millis(retry.first_ms);
                let max = Duration::from_millis(retry.max_ms);
                let wait = backoff(first, max, attempts, retry_after, (self.random)());
                JobSettlement::Retry {
                    at_ms: self.after(wait),
                    actions: progress.get(),
                    error: reason,
                }
            }
            End::Later { reason, .. } | End::Failed(reason) => {
                progress.give_up();
                JobSettlement::Failed {
                    actions: progress.get(),
                    error: reason,
                }
            }
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
            JobSettlement::PutOff { reason, .. } => {
                tracing::debug!(job = %job.id, reason, "a delayed job is put off");
                metrics.put_off.increment(1);
            }
        }
    }
}
