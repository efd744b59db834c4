//! How jobs are created: under their names first.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use futures_util::future::{BoxFuture, join_all};
use redis::Value;

use super::job_answer::{Became, Named, waiting, write_body};
use super::job_calls::{Early, Written};
use super::jobs::RedisJobs;
use super::keys::SHARDS;
use super::reply::parse;
use crate::{ClientId, EventName, JobCreated, JobId, NewJob, StoreError};

/// How often the names of a job are registered again, because writing it came too late.
const TRIES: usize = 3;

/// A job whose names are registered.
struct Registered {
    job: NewJob,
    token: String,
    early: Early,
}

/// What became of writing a job.
enum Write {
    /// It is decided.
    Answered(Result<JobCreated, StoreError>),
    /// It came too late: its names have to be registered again.
    Late(NewJob),
}

impl RedisJobs {
    /// Creates jobs, all at once where there is room for all of them.
    pub(super) async fn create_all(
        &self,
        jobs: Vec<NewJob>,
    ) -> Vec<Result<JobCreated, StoreError>> {
        let room = match self.room_for_jobs().await {
            Ok(room) => room,
            Err(error) => return jobs.iter().map(|_| Err(error.clone())).collect(),
        };
        let is_of_device = |job: &NewJob| job.device.is_some();
        if usize::try_from(room).is_ok_and(|room| room < jobs.len())
            || jobs.iter().any(is_of_device)
        {
            let mut answers = Vec::with_capacity(jobs.len());
            for job in jobs {
                answers.push(match self.why_full(&job).await {
                    Ok(why) => {
                        let answer = self.create_batch(vec![job], why.as_ref()).await.pop();
                        answer.unwrap_or_else(|| Err(no_answer()))
                    }
                    Err(error) => Err(error),
                });
            }
            return answers;
        }
        self.create_batch(jobs, None).await
    }

    /// Why there is no room for a job, if there is none.
    async fn why_full(&self, job: &NewJob) -> Result<Option<StoreError>, StoreError> {
        let limits = self.calls.limits();
        if self.room_for_jobs().await? == 0 {
            let limit = limits.jobs_max;
            let why = format!("there are {limit} delayed jobs, which is the limit");
            return Ok(Some(StoreError::Full(why)));
        }
        let Some(device) = &job.device else {
            return Ok(None);
        };
        let count = (0..SHARDS).map(|shard| self.calls.count_of_device(shard, device));
        let mut total = 0;
        for answer in self.link.read_all(count.collect()).await {
            total += parse::<Option<u64>>(answer?)?.unwrap_or(0);
        }
        let limit = limits.device_jobs_max;
        let why = || format!("{device} has {limit} delayed jobs, which is the limit");
        Ok((total >= limit).then(|| StoreError::Quota(why())))
    }

    /// Creates a job, whether there is room or not.
    pub(super) async fn create_beyond_the_limit(
        &self,
        job: NewJob,
    ) -> Result<JobCreated, StoreError> {
        let answer = self.create_batch(vec![job], None).await.pop();
        answer.unwrap_or_else(|| Err(no_answer()))
    }

    async fn create_batch(
        &self,
        jobs: Vec<NewJob>,
        full: Option<&StoreError>,
    ) -> Vec<Result<JobCreated, StoreError>> {
        let mut answers: Vec<Result<JobCreated, StoreError>> =
            jobs.iter().map(|_| Err(no_answer())).collect();
        let mut todo: Vec<(usize, NewJob)> = jobs.into_iter().enumerate().collect();
        for _ in 0..TRIES {
            let registered = todo.drain(..).map(|(at, job)| self.register(at, job));
            let mut writes = Vec::new();
            for (at, registered) in join_all(registered).await {
                match registered {
                    Ok(registered) => writes.push(self.write_job(at, registered, full)),
                    Err(error) => answers[at] = Err(error),
                }
            }
            for (at, outcome) in join_all(writes).await {
                match outcome {
                    Write::Answered(answer) => answers[at] = answer,
                    Write::Late(job) => todo.push((at, job)),
                }
            }
            if todo.is_empty() {
                break;
            }
        }
        answers
    }

    /// Registers a job under its names, and learns of the newest events that it names.
    async fn register(&self, at: usize, job: NewJob) -> (usize, Result<Registered, StoreError>) {
        let token = new_token();
        let named = Named::all_of(&job, &token);
        let calls = named
            .iter()
            .map(|(name, named)| self.write(&job.id, self.calls.name(name, named)));
        let mut early = Early::default();
        for ((name, named), answer) in named.iter().zip(join_all(calls).await) {
            if let Err(error) =
                answer.and_then(|answer| self.note(&mut early, &job, name, named, answer))
            {
                return (at, Err(error));
            }
        }
        (at, Ok(Registered { job, token, early }))
    }

    /// Notes what the registration under one name has answered.
    fn note(
        &self,
        early: &mut Early,
        job: &NewJob,
        name: &EventName,
        named: &Named,
        answer: Value,
    ) -> Result<(), StoreError> {
        let (now_ms, newest): (u64, Option<String>) = parse(answer)?;
        if early.registered_ms == 0 || now_ms < early.registered_ms {
            early.registered_ms = now_ms;
        }
        let at_ms = newest
            .as_deref()
            .and_then(|newest| newest.split(' ').next());
        let Some(at_ms) = at_ms.and_then(|at_ms| at_ms.parse::<u64>().ok()) else {
            return Ok(());
        };
        let window_ms = self.calls.limits().event_window_ms();
        let counts = window_ms > 0 && at_ms.saturating_add(window_ms) >= job.created_ms;
        // Those that cancel stand first.
        if counts && early.event.is_none() {
            early.event = Some((named.does, name.clone()));
        }
        Ok(())
    }

    /// Writes a job, unless there is no room: `full` says why. It takes its place now, behind those before it. Given back is one that came
    /// too late.
    fn write_job<'a>(
        &'a self,
        at: usize,
        registered: Registered,
        full: Option<&'a StoreError>,
    ) -> BoxFuture<'a, (usize, Write)> {
        let Registered { job, token, early } = registered;
        let body = write_body(&job);
        let written = Written {
            id: &job.id,
            body: &body,
            fire_at_ms: job.fire_at_ms,
            actions: &waiting(&job.plan),
            token: &token,
            now_ms: job.created_ms,
            device: job.device.as_ref().map_or("", ClientId::as_str),
        };
        let call = self.calls.create(&written, full.is_some(), &early);
        let answered = self.link.submit(job.id.as_str(), call);
        Box::pin(async move {
            let answer = match answered.await.and_then(Became::parse) {
                Ok(Became::Done(told)) => {
                    let created = told.with_body(body).read().map(JobCreated::Created);
                    return (at, Write::Answered(created));
                }
                // It may be written.
                Err(error) => return (at, Write::Answered(Err(error))),
                Ok(answer) => answer,
            };
            for (name, named) in Named::all_of(&job, &token) {
                self.link
                    .note(job.id.as_str(), self.calls.unname(&name, &named));
            }
            let outcome = match answer {
                Became::Again => Write::Late(job),
                Became::Refused(told) | Became::Done(told) => {
                    Write::Answered(told.read().map(|known| {
                        match known.fingerprint == job.fingerprint {
                            true => JobCreated::Same(known),
                            false => JobCreated::Conflict(known),
                        }
                    }))
                }
                Became::Nothing => Write::Answered(Err(full.cloned().unwrap_or_else(no_answer))),
            };
            (at, outcome)
        })
    }

    /// Takes a job's names away.
    pub(super) fn unname(
        &self,
        id: &JobId,
        cancel_on: &[EventName],
        trigger_on: &[EventName],
        token: &str,
    ) -> Vec<BoxFuture<'static, Result<Value, StoreError>>> {
        let named = Named::of(id, cancel_on, trigger_on, token);
        let unname = |(name, named): (EventName, Named)| {
            self.link
                .submit(id.as_str(), self.calls.unname(&name, &named))
        };
        named.into_iter().map(unname).collect()
    }
}

fn no_answer() -> StoreError {
    StoreError::Unavailable("the job could not be written in time".into())
}

/// Tells one registration from every other: the time in ms, and a number.
pub(super) fn new_token() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    let salt = ahash::RandomState::new().hash_one(COUNT.fetch_add(1, Ordering::Relaxed));
    format!("{now_ms:011x}{:08x}", salt & 0xFFFF_FFFF)
}

/// When a registration was made, by the clock of who made it, Unix milliseconds.
pub(super) fn token_made_ms(token: &str) -> Option<u64> {
    u64::from_str_radix(token.get(..11)?, 16).ok()
}
