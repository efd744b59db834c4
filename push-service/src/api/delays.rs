//! `/v1/delays`: what is to be done later, unless something happens before.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moorline_router::{
    EventKind, EventName, Job, JobChange, JobCounts, JobCreated, JobCursor, JobEvent, JobFilter,
    JobId, JobPatch, JobState, MessageId, NewJob,
};
use serde::Serialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::delay_body::{JobBody, JobStateName};
use super::document::{
    BodyProblems, CallProblems, DelayProblem, FullProblem, NotFoundProblem, StoreProblem,
};
use super::extract::{Admin, Caller, Delay, JsonBody, Named, Params, PathId, Read};
use super::push::{IDEMPOTENT_REPLAYED, once};
use super::{Api, Shared};
use crate::delayed::DelayRules;
use crate::keys::Scope;
use crate::problem::{Problem, ProblemKind};
use crate::request::{DelayPatch, DelayRequest, NewDelay, PatchRequest, malformed, parse_time};

/// Jobs of one page, and of one batch.
const JOBS_MAX: usize = 1_000;
/// A page of a list that is empty and has a next is looked beyond so often before it is given to the caller.
const LOOKS_MAX: usize = 16;

impl Named for JobId {
    fn parse_name(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
}

impl Named for EventName {
    fn parse_name(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
}

/// One page of jobs.
#[derive(Serialize, ToSchema)]
#[schema(as = Delays)]
pub(super) struct JobsBody {
    /// In the order of their ids where `prefix` or `on` is given, else of their times.
    delays: Vec<JobBody>,
    /// The `after` of the next page; absent on the last. A page may be short or even empty and have a next.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// How many jobs are kept in each state.
#[derive(Serialize, ToSchema)]
#[schema(as = DelayCounts)]
#[allow(missing_docs, reason = "one field a state")]
pub(super) struct CountsBody {
    pending: u64,
    firing: u64,
    retrying: u64,
    fired: u64,
    skipped: u64,
    cancelled: u64,
    failed: u64,
}

impl From<JobCounts> for CountsBody {
    fn from(counts: JobCounts) -> Self {
        Self {
            pending: counts.pending,
            firing: counts.firing,
            retrying: counts.retrying,
            fired: counts.fired,
            skipped: counts.skipped,
            cancelled: counts.cancelled,
            failed: counts.failed,
        }
    }
}

/// Jobs that a call cancelled.
#[derive(Serialize, ToSchema)]
pub(super) struct Cancelled {
    /// How many.
    cancelled: u64,
}

/// What became of a batch.
#[derive(Serialize, ToSchema)]
pub(super) struct BatchBody {
    /// One for each job, in their order.
    results: Vec<BatchResult>,
}

/// What became of one job of a batch.
#[derive(Serialize, ToSchema)]
pub(super) struct BatchResult {
    /// As `POST /v1/delays` would have answered it.
    #[schema(example = 201)]
    status: u16,
    /// Where it was created, or had been.
    #[serde(skip_serializing_if = "Option::is_none")]
    delay: Option<JobBody>,
    /// Where it was not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = crate::problem::Document<'static>)]
    problem: Option<serde_json::Value>,
}

impl Api {
    pub(super) fn delay_rules(&self) -> DelayRules<'_> {
        DelayRules {
            config: &self.config,
            device_topics: &self.device_topics,
            retry: self.delays.retry,
            amqp: self.delays.amqp,
        }
    }

    /// The job as it is stored; `once` names it where the caller did not.
    pub(super) fn new_job(&self, delay: NewDelay, once: Option<MessageId>) -> NewJob {
        let now_ms = self.delays.clock.now_ms();
        let fingerprint = delay.fingerprint();
        let named = |id: MessageId| JobId::parse(id.as_str()).expect("a UUID can name a job");
        let id = delay.id.or_else(|| once.map(named));
        NewJob {
            id: id.unwrap_or_else(JobId::generate),
            created_ms: now_ms,
            fire_at_ms: delay.when.at_ms(now_ms),
            plan: delay.plan,
            cancel_on: delay.cancel_on,
            trigger_on: delay.trigger_on,
            fingerprint,
            device: None,
        }
    }

    pub(super) fn job_body(&self, job: &Job) -> JobBody {
        JobBody::new(job, &self.config, &self.device_topics)
    }

    /// A job that pushes needs what a push needs.
    fn may_push(&self, headers: &HeaderMap, pushes: bool) -> Result<(), Problem> {
        if pushes {
            self.keys.authorize(headers, Scope::Push)?;
        }
        Ok(())
    }

    fn changed(&self, id: &JobId, change: JobChange) -> Result<Json<JobBody>, Problem> {
        match change {
            JobChange::Changed(job) => Ok(Json(self.job_body(&job))),
            JobChange::Refused(job) => {
                let detail = format!("job {id} is {}", job.state);
                Err(Problem::new(ProblemKind::JobBegun, detail).with_state(job.state.as_str()))
            }
            JobChange::Outdated | JobChange::NotFound => Err(unknown(id)),
        }
    }
}

fn unknown(id: &JobId) -> Problem {
    let detail =
        format!("there is no job {id}: it never was, or it ended longer ago than jobs are kept");
    Problem::new(ProblemKind::NotFound, detail)
}

fn conflict(job: &Job) -> Problem {
    let detail = format!("there is another job {}, and it is {}", job.id, job.state);
    Problem::new(ProblemKind::JobConflict, detail).with_state(job.state.as_str())
}

/// Create a delayed job.
///
/// Durable when it is answered. The same id with the same body is the same job, also after it ended, as long as it is kept (1 hour by
/// default): it is answered as it is now, with 200. With another body it is refused. A job that names an event
/// in `cancel_on` that was told in the last minutes (10 by default) is created as cancelled; one that names it in `trigger_on` is due at once.
/// A job with a push needs the scope `push`, too.
#[utoipa::path(
    post, path = "/v1/delays", tag = "delays", security(("key" = ["delay"])),
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters: names a job that has no id in its body")),
    request_body(content = DelayRequest<'static>, content_type = "application/json"),
    responses(
        (status = 201, description = "It is created", body = JobBody, headers(("Location" = String, description = "Its path"))),
        (status = 200, description = "It had been created before", body = JobBody,
            headers(("Idempotent-Replayed" = String, description = "`true`"))),
        CallProblems, BodyProblems, DelayProblem, FullProblem, StoreProblem,
    )
)]
pub(super) async fn create(
    State(api): Shared,
    caller: Caller<Delay>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let delay = NewDelay::from_json(&body, &api.delay_rules())?;
    api.may_push(&headers, delay.pushes())?;
    let once = once(&caller.name, &headers)?;
    let job = api.new_job(delay, once);
    match api.stores.jobs.create(job).await? {
        JobCreated::Created(job) => {
            let location = format!("/v1/delays/{}", encoded(job.id.as_str()));
            let mut response = (StatusCode::CREATED, Json(api.job_body(&job))).into_response();
            if let Ok(location) = HeaderValue::try_from(location) {
                response.headers_mut().insert(header::LOCATION, location);
            }
            Ok(response)
        }
        JobCreated::Same(job) => {
            let replayed = [(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"))];
            Ok((replayed, Json(api.job_body(&job))).into_response())
        }
        JobCreated::Conflict(job) => Err(conflict(&job)),
    }
}

/// What can stand in a path as it is; the rest is percent-encoded.
fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        match plain(byte) {
            true => path.push(char::from(byte)),
            false => path.push_str(&format!("%{byte:02X}")),
        }
    }
    path
}

/// Create many delayed jobs.
///
/// A JSON array or one object a line (NDJSON) of up to 1000 jobs, each as `POST /v1/delays` takes it. Each has a result of its own, and those that
/// were created are durable.
#[utoipa::path(
    post, path = "/v1/delays/batch", tag = "delays", security(("key" = ["delay"])),
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters: names, with their places, the jobs that have no id in their body")),
    request_body(content = Vec<DelayRequest<'static>>, content_type = "application/json"),
    responses((status = 200, description = "One result for each job", body = BatchBody), CallProblems, BodyProblems, FullProblem, StoreProblem)
)]
pub(super) async fn create_batch(
    State(api): Shared,
    caller: Caller<Delay>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Json<BatchBody>, Problem> {
    let requests = entries(&body)?;
    let key = once(&caller.name, &headers)?;
    let mut results: Vec<Option<BatchResult>> = Vec::with_capacity(requests.len());
    let (mut jobs, mut places) = (Vec::new(), Vec::new());
    for (at, request) in requests.into_iter().enumerate() {
        let read = NewDelay::from_json(request.get().as_bytes(), &api.delay_rules())
            .and_then(|delay| api.may_push(&headers, delay.pushes()).map(|()| delay));
        match read {
            Ok(delay) => {
                let once = key
                    .as_ref()
                    .map(|key| crate::push::derived_id(key.as_str(), &at.to_string()));
                jobs.push(api.new_job(delay, once));
                places.push(at);
                results.push(None);
            }
            Err(problem) => results.push(Some(BatchResult::refused(&problem))),
        }
    }
    let created = match jobs.is_empty() {
        true => Vec::new(),
        false => api.stores.jobs.create_many(jobs).await,
    };
    for (at, created) in places.into_iter().zip(created) {
        let made = |status: StatusCode, job: &Job| BatchResult {
            status: status.as_u16(),
            delay: Some(api.job_body(job)),
            problem: None,
        };
        results[at] = Some(match created {
            Ok(JobCreated::Created(job)) => made(StatusCode::CREATED, &job),
            Ok(JobCreated::Same(job)) => made(StatusCode::OK, &job),
            Ok(JobCreated::Conflict(job)) => BatchResult::refused(&conflict(&job)),
            Err(error) => BatchResult::refused(&error.into()),
        });
    }
    let silent = || {
        Problem::new(
            ProblemKind::StoreUnavailable,
            "the store did not answer for the job",
        )
    };
    let results = results
        .into_iter()
        .map(|result| result.unwrap_or_else(|| BatchResult::refused(&silent())));
    Ok(Json(BatchBody {
        results: results.collect(),
    }))
}

impl BatchResult {
    fn refused(problem: &Problem) -> Self {
        Self {
            status: problem.kind().status().as_u16(),
            delay: None,
            problem: Some(problem.to_json()),
        }
    }
}

/// The objects of an array, or of lines.
fn entries(body: &[u8]) -> Result<Vec<&RawValue>, Problem> {
    let is_array = body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'[');
    let entries: Vec<&RawValue> = match is_array {
        true => serde_json::from_slice(body).map_err(|error| malformed(&error))?,
        false => serde_json::Deserializer::from_slice(body)
            .into_iter::<&RawValue>()
            .collect::<Result<_, _>>()
            .map_err(|error| malformed(&error))?,
    };
    if !(1..=JOBS_MAX).contains(&entries.len()) {
        let detail = format!(
            "the batch has {} jobs, must have 1 to {JOBS_MAX}",
            entries.len()
        );
        return Err(Problem::new(ProblemKind::InvalidRequest, detail));
    }
    Ok(entries)
}

/// A delayed job.
///
/// Jobs that ended are kept for a time (1 hour by default, those that failed 7 days).
#[utoipa::path(
    get, path = "/v1/delays/{id}", tag = "delays", security(("key" = ["read"])),
    params(("id" = String, Path, description = "Job id, percent-encoded")),
    responses((status = 200, description = "The job as it is now", body = JobBody), CallProblems, NotFoundProblem, StoreProblem)
)]
pub(super) async fn get(
    State(api): Shared,
    _: Caller<Read>,
    PathId(id): PathId<JobId>,
) -> Result<Json<JobBody>, Problem> {
    let job = api.stores.jobs.get(&id).await?;
    job.map(|job| Json(api.job_body(&job)))
        .ok_or_else(|| unknown(&id))
}

/// Change a job that waits.
///
/// Its time, what it does, or both. After a 2xx it never fires as it was before. A job that has begun or ended is refused, with its state.
#[utoipa::path(
    patch, path = "/v1/delays/{id}", tag = "delays", security(("key" = ["delay"])),
    params(("id" = String, Path, description = "Job id, percent-encoded")),
    request_body(content = PatchRequest<'static>, content_type = "application/json"),
    responses((status = 200, description = "The job as it is now", body = JobBody), CallProblems, BodyProblems, NotFoundProblem, DelayProblem, StoreProblem)
)]
pub(super) async fn patch(
    State(api): Shared,
    _: Caller<Delay>,
    PathId(id): PathId<JobId>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Json<JobBody>, Problem> {
    // Whoever is too late was overtaken by another patch, so that all together get on.
    loop {
        let current = api
            .stores
            .jobs
            .get(&id)
            .await?
            .ok_or_else(|| unknown(&id))?;
        let patch = DelayPatch::from_json(&body, &api.delay_rules(), &current.plan)?;
        api.may_push(&headers, patch.pushes())?;
        let now_ms = api.delays.clock.now_ms();
        let fire_at_ms = patch.when.map(|when| when.at_ms(now_ms));
        let plan = patch.plan(&current.plan);
        let patch = JobPatch {
            fire_at_ms,
            instead_of: plan.as_ref().map(|_| current.plan),
            plan,
        };
        match api.stores.jobs.patch(&id, patch).await? {
            JobChange::Outdated => {}
            change => return api.changed(&id, change),
        }
    }
}

/// Cancel a job that waits.
///
/// After a 2xx it never fires. A job that has begun or ended is refused, with its state; one that is cancelled already is answered the same.
#[utoipa::path(
    delete, path = "/v1/delays/{id}", tag = "delays", security(("key" = ["delay"])),
    params(("id" = String, Path, description = "Job id, percent-encoded")),
    responses((status = 200, description = "It is cancelled", body = JobBody), CallProblems, NotFoundProblem, DelayProblem, StoreProblem)
)]
pub(super) async fn cancel(
    State(api): Shared,
    _: Caller<Delay>,
    PathId(id): PathId<JobId>,
) -> Result<Json<JobBody>, Problem> {
    let now_ms = api.delays.clock.now_ms();
    let change = api.stores.jobs.cancel(&id, now_ms).await?;
    api.changed(&id, change)
}

/// Cancel the jobs that wait and name an event in `cancel_on`.
///
/// As the event would, but nothing is triggered, and jobs that are created later do not hear of it.
#[utoipa::path(
    delete, path = "/v1/delays", tag = "delays", security(("key" = ["delay"])),
    params(("cancel_on" = String, Query, description = "`type:key`, like `order.paid:123`")),
    responses((status = 200, description = "How many were cancelled", body = Cancelled), CallProblems, FullProblem, StoreProblem)
)]
pub(super) async fn cancel_by_event(
    State(api): Shared,
    _: Caller<Delay>,
    mut params: Params,
) -> Result<Json<Cancelled>, Problem> {
    let name = params.id::<EventName>("cancel_on");
    if name.is_none() {
        params.require(
            "cancel_on",
            "is required: the event whose jobs are to be cancelled",
        );
    }
    params.finish()?;
    let event = name.map(|name| JobEvent {
        id: MessageId::generate(),
        name,
        kind: EventKind::Withdrawal,
        at_ms: api.delays.clock.now_ms(),
    });
    let cancelled = match event {
        Some(event) => api.stores.jobs.event(&event).await?.cancelled,
        None => 0,
    };
    Ok(Json(Cancelled { cancelled }))
}

/// Make a job that waits due now.
///
/// A job that has begun or ended is refused, with its state.
#[utoipa::path(
    post, path = "/v1/delays/{id}/trigger", tag = "delays", security(("key" = ["delay"])),
    params(("id" = String, Path, description = "Job id, percent-encoded")),
    responses((status = 200, description = "It is due", body = JobBody), CallProblems, NotFoundProblem, DelayProblem, StoreProblem)
)]
pub(super) async fn trigger(
    State(api): Shared,
    _: Caller<Delay>,
    PathId(id): PathId<JobId>,
) -> Result<Json<JobBody>, Problem> {
    let now_ms = api.delays.clock.now_ms();
    let change = api.stores.jobs.trigger(&id, now_ms).await?;
    api.changed(&id, change)
}

/// Try a job that failed again.
///
/// Jobs that failed are the dead letters of the delay queue: `GET /v1/delays?state=failed`. What of it was done is not done again.
#[utoipa::path(
    post, path = "/v1/delays/{id}/retry", tag = "delays", security(("key" = ["admin"])),
    params(("id" = String, Path, description = "Job id, percent-encoded")),
    responses((status = 200, description = "It is due", body = JobBody), CallProblems, NotFoundProblem, DelayProblem, StoreProblem)
)]
pub(super) async fn retry(
    State(api): Shared,
    _: Caller<Admin>,
    PathId(id): PathId<JobId>,
) -> Result<Json<JobBody>, Problem> {
    let now_ms = api.delays.clock.now_ms();
    let change = api.stores.jobs.retry_failed(&id, now_ms).await?;
    api.changed(&id, change)
}

/// List delayed jobs.
#[utoipa::path(
    get, path = "/v1/delays", tag = "delays", security(("key" = ["read"])),
    params(
        ("prefix" = Option<String>, Query, description = "Their ids begin with this"),
        ("on" = Option<String>, Query, description = "They name this event, `type:key`, in `cancel_on` or `trigger_on`"),
        ("state" = Option<JobStateName>, Query, description = "Their state"),
        ("from" = Option<String>, Query, description = "Due at this time or later, RFC 3339"),
        ("to" = Option<String>, Query, description = "Due before this time, RFC 3339"),
        ("after" = Option<String>, Query, description = "The `next` of the page before"),
        ("limit" = Option<usize>, Query, description = "1 to 1000, default 100"),
    ),
    responses((status = 200, description = "One page", body = JobsBody), CallProblems, StoreProblem)
)]
pub(super) async fn list(
    State(api): Shared,
    _: Caller<Read>,
    mut params: Params,
) -> Result<Json<JobsBody>, Problem> {
    let time = |text: &str| {
        parse_time(text)
            .ok_or_else(|| "must be a time like 2027-01-31T08:00:00Z (RFC 3339)".to_owned())
    };
    let state = |text: &str| {
        JobState::parse(text).ok_or_else(|| {
            let states: Vec<_> = JobState::ALL.iter().map(|state| state.as_str()).collect();
            format!("must be one of {}", states.join(", "))
        })
    };
    let filter = JobFilter {
        prefix: params.text("prefix"),
        event: params.id::<EventName>("on"),
        state: params.read("state", state),
        from_ms: params.read("from", time),
        to_ms: params.read("to", time),
    };
    let mut after = params.read("after", |text| {
        parse_cursor(text).ok_or_else(|| super::extract::CURSOR_EXPECTED.to_owned())
    });
    let limit = params.limit(JOBS_MAX);
    params.finish()?;
    for look in 1.. {
        let page = api.stores.jobs.list(&filter, after.as_ref(), limit).await?;
        if page.jobs.is_empty() && page.next.is_some() && look < LOOKS_MAX {
            after = page.next;
            continue;
        }
        return Ok(Json(JobsBody {
            delays: page.jobs.iter().map(|job| api.job_body(job)).collect(),
            next: page.next.as_ref().map(cursor),
        }));
    }
    unreachable!("the last look returns")
}

fn cursor(cursor: &JobCursor) -> String {
    format!("{}-{}", cursor.at_ms, cursor.id)
}

fn parse_cursor(text: &str) -> Option<JobCursor> {
    let (at_ms, id) = text.split_once('-')?;
    Some(JobCursor {
        at_ms: at_ms.parse().ok()?,
        id: JobId::parse(id).ok()?,
    })
}

/// How many jobs there are.
///
/// Counted as they change, not by looking at each.
#[utoipa::path(
    get, path = "/v1/delays/count", tag = "delays", security(("key" = ["read"])),
    responses((status = 200, description = "Jobs in each state", body = CountsBody), CallProblems, StoreProblem)
)]
pub(super) async fn count(
    State(api): Shared,
    _: Caller<Read>,
) -> Result<Json<CountsBody>, Problem> {
    Ok(Json(api.stores.jobs.counts().await?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_given() {
        let given = JobCursor {
            at_ms: 1_700_000_000_000,
            id: JobId::parse("order-123 / é").unwrap(),
        };
        assert_eq!(parse_cursor(&cursor(&given)), Some(given));
        for wrong in ["", "7", "x-1", "7-"] {
            assert_eq!(parse_cursor(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_batch_is_an_array_or_lines() {
        let count = |body: &str| entries(body.as_bytes()).map(|entries| entries.len());
        assert_eq!(count(r#" [{"a": 1}, {}]"#), Ok(2));
        assert_eq!(count("{\"a\": 1}\n{}\n\n{}"), Ok(3));
        assert!(count("[]").is_err() && count("").is_err());
        assert!(count("{} nonsense").is_err());
        let many = format!("[{}]", vec!["{}"; JOBS_MAX + 1].join(","));
        assert!(count(&many).unwrap_err().detail().contains("1001"));
    }

    #[test]
    fn an_id_can_stand_in_a_path() {
        assert_eq!(encoded("order-123"), "order-123");
        assert_eq!(encoded("a/b é"), "a%2Fb%20%C3%A9");
    }
}
