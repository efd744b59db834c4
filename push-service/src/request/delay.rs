//! What may be said of a delayed job: when, what, and unless what.

use std::time::Duration;

use bytes::Bytes;
use moorline_router::{ActionKind, EventName, JobId, JobPlan, RetryPolicy, duration};
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use super::action::{self, ActionRequest, Actions, CheckRequest, NotifyRequest};
use super::{
    Cow, Deserializer, Errors, Fields, FieldsVisitor, Problem, ProblemKind, TtlRequest, kind_of,
    malformed, note_strangers, read, read_text, shown,
};
use crate::delayed::DelayRules;

/// The longest delay.
pub(super) const DELAY_MAX: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
/// Events that a job may name in each of its lists.
const EVENTS_MAX: usize = 16;
/// Attempts that a job may ask for.
const ATTEMPTS_MAX: u32 = 100;
/// Ids that mean something else in a path.
const RESERVED_IDS: [&str; 2] = ["count", "batch"];
/// What a patch leaves as it is.
const FIXED: [&str; 5] = ["id", "cancel_on", "trigger_on", "on_fired", "on_failed"];
const TIME_EXPECTED: &str = "a time like \"2027-01-31T08:00:00Z\" (RFC 3339)";

/// When something is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// So many milliseconds from now.
    In(u64),
    /// Unix milliseconds.
    At(u64),
}

impl When {
    /// Unix milliseconds.
    pub(crate) fn at_ms(self, now_ms: u64) -> u64 {
        match self {
            Self::In(ms) => now_ms.saturating_add(ms),
            Self::At(ms) => ms,
        }
    }
}

/// A delayed job.
#[derive(Default, ToSchema)]
pub(crate) struct DelayRequest<'a> {
    /// Names the job: 1 to 200 bytes of text. Made by the gateway where none is given.
    #[schema(value_type = String, required = false, example = "order-123")]
    id: Option<&'a RawValue>,
    /// After so long, from 0 to 10 years: `"250ms"`, `"15m"`, `"24h"`, `"7d"` or whole seconds. Either this or `fire_at`.
    #[schema(value_type = TtlRequest, required = false)]
    delay: Option<&'a RawValue>,
    /// At this time, RFC 3339. In the past: at once.
    #[schema(value_type = String, required = false, format = DateTime)]
    fire_at: Option<&'a RawValue>,
    /// What is done: one action, or a list of up to 16. Each is begun when the one before it is done.
    #[schema(value_type = ActionsRequest)]
    action: Option<&'a RawValue>,
    /// Asked before.
    #[schema(value_type = CheckRequest, required = false)]
    check: Option<&'a RawValue>,
    /// Events that cancel the job: `type:key`.
    #[schema(value_type = Vec<String>, required = false, example = json!(["order.paid:123"]))]
    cancel_on: Option<&'a RawValue>,
    /// Events that make the job due at once: `type:key`.
    #[schema(value_type = Vec<String>, required = false)]
    trigger_on: Option<&'a RawValue>,
    /// When an attempt fails.
    #[schema(value_type = RetryRequest, required = false)]
    retry: Option<&'a RawValue>,
    /// Told when everything is done.
    #[schema(value_type = NotifyRequest, required = false)]
    on_fired: Option<&'a RawValue>,
    /// Told when the job is given up.
    #[schema(value_type = NotifyRequest, required = false)]
    on_failed: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// One action or several.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code, reason = "describes the field to readers of the document")]
#[serde(untagged)]
pub(crate) enum ActionsRequest {
    One(ActionRequest<'static>),
    Several(Vec<ActionRequest<'static>>),
}

/// What is to be different about a job that waits. What is left out stays.
#[derive(Default, ToSchema)]
pub(crate) struct PatchRequest<'a> {
    /// From now. Either this or `fire_at`.
    #[schema(value_type = TtlRequest, required = false)]
    delay: Option<&'a RawValue>,
    /// RFC 3339.
    #[schema(value_type = String, required = false, format = DateTime)]
    fire_at: Option<&'a RawValue>,
    /// One action or a list, in the place of all that there were.
    #[schema(value_type = ActionsRequest, required = false)]
    action: Option<&'a RawValue>,
    /// Null for none.
    #[schema(value_type = CheckRequest, required = false)]
    check: Option<&'a RawValue>,
    /// When an attempt fails.
    #[schema(value_type = RetryRequest, required = false)]
    retry: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// How often and when a failed attempt is repeated.
#[derive(Default, ToSchema)]
pub(crate) struct RetryRequest<'a> {
    /// Attempts in all, 1 to 100.
    #[schema(value_type = u32, required = false)]
    attempts: Option<&'a RawValue>,
    /// Longest wait after the first; twice as long after each further one.
    #[schema(value_type = TtlRequest, required = false)]
    initial: Option<&'a RawValue>,
    /// Longest wait ever.
    #[schema(value_type = TtlRequest, required = false)]
    max: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

fields!(
    DelayRequest,
    "an object like {\"delay\": \"15m\", \"action\": {\"webhook\": {\"url\": \"https://…\"}}}",
    id,
    delay,
    fire_at,
    action,
    check,
    cancel_on,
    trigger_on,
    retry,
    on_fired,
    on_failed
);
fields!(
    PatchRequest,
    "an object like {\"delay\": \"15m\"}",
    delay,
    fire_at,
    action,
    check,
    retry
);
fields!(
    RetryRequest,
    "an object like {\"attempts\": 5, \"initial\": \"1s\", \"max\": \"1m\"}",
    attempts,
    initial,
    max
);

/// A job that may be created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewDelay {
    /// Its name, where the caller gave one.
    pub(crate) id: Option<JobId>,
    /// When it is due.
    pub(crate) when: When,
    /// What it does.
    pub(crate) plan: JobPlan,
    /// The events that cancel it.
    pub(crate) cancel_on: Vec<EventName>,
    /// The events that make it due.
    pub(crate) trigger_on: Vec<EventName>,
}

impl NewDelay {
    /// Reads the body of a request; the problem names every wrong field.
    pub(crate) fn from_json(body: &[u8], rules: &DelayRules<'_>) -> Result<Self, Problem> {
        let request: DelayRequest<'_> = serde_json::from_slice(body).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let id = request
            .id
            .and_then(|raw| errors.keep("id", read_job_id(raw)));
        let when = [("delay", request.delay), ("fire_at", request.fire_at)];
        let when = read_when(&mut errors, when);
        let Actions { actions, too_large } =
            action::read_actions(&mut errors, request.action, rules);
        let check = request
            .check
            .and_then(|raw| action::read_check(&mut errors, raw));
        let notify = action::read_notify(&mut errors, request.on_fired, request.on_failed, rules);
        let cancel_on = read_events(&mut errors, "cancel_on", request.cancel_on);
        let trigger_on = read_events(&mut errors, "trigger_on", request.trigger_on);
        let retry = read_retry(&mut errors, request.retry, rules.retry);
        let (Some(when), true) = (when, errors.0.is_empty()) else {
            let kind = match too_large && errors.0.len() == 1 {
                true => ProblemKind::PayloadTooLarge,
                false => ProblemKind::InvalidRequest,
            };
            return Err(Problem::fields(kind, errors.0));
        };
        Ok(Self {
            id,
            when,
            plan: JobPlan {
                actions,
                check,
                notify,
                retry,
            },
            cancel_on,
            trigger_on,
        })
    }

    /// Tells a repeated request from another one with the same id. The same in every version of the program: it is kept.
    pub(crate) fn fingerprint(&self) -> u64 {
        let mut hash = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        match self.when {
            When::In(ms) => field(format!("in {ms}").as_bytes()),
            When::At(ms) => field(format!("at {ms}").as_bytes()),
        }
        for action in &self.plan.actions {
            field(kind_name(action.kind).as_bytes());
            field(&canonical(&action.spec));
        }
        for part in [&self.plan.check, &self.plan.notify] {
            field(
                &part
                    .as_ref()
                    .map(|part| canonical(part))
                    .unwrap_or_default(),
            );
        }
        let RetryPolicy {
            attempts_max,
            first_ms,
            max_ms,
        } = self.plan.retry;
        field(format!("{attempts_max} {first_ms} {max_ms}").as_bytes());
        for (what, names) in [("cancel", &self.cancel_on), ("trigger", &self.trigger_on)] {
            field(what.as_bytes());
            names
                .iter()
                .for_each(|name| field(name.as_str().as_bytes()));
        }
        let digest = hash.finalize();
        u64::from_be_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
    }

    /// Whether something of it is a push.
    pub(crate) fn pushes(&self) -> bool {
        pushes(&self.plan)
    }
}

fn pushes(plan: &JobPlan) -> bool {
    plan.actions
        .iter()
        .any(|action| action.kind == ActionKind::Push)
}

/// The word of an action in requests.
pub(crate) fn kind_name(kind: ActionKind) -> &'static str {
    match kind {
        ActionKind::Push => "push",
        ActionKind::Webhook => "webhook",
        ActionKind::Amqp => "amqp",
        ActionKind::Publish => "publish",
    }
}

/// JSON with the fields of its objects in one order, whatever order they were written in.
fn canonical(json: &[u8]) -> Vec<u8> {
    serde_json::from_slice::<serde_json::Value>(json)
        .and_then(|value| serde_json::to_vec(&value))
        .unwrap_or_else(|_| json.to_vec())
}

/// What a patch asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DelayPatch {
    /// When it is due.
    pub(crate) when: Option<When>,
    actions: Option<Vec<moorline_router::JobAction>>,
    /// `Some(None)`: none any more.
    check: Option<Option<Bytes>>,
    retry: Option<RetryPolicy>,
}

impl DelayPatch {
    /// Reads the body of a request; the problem names every wrong field. `current` is the plan as it is.
    pub(crate) fn from_json(
        body: &[u8],
        rules: &DelayRules<'_>,
        current: &JobPlan,
    ) -> Result<Self, Problem> {
        let request: PatchRequest<'_> = serde_json::from_slice(body).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        let (fixed, unknown): (Vec<_>, Vec<_>) = request
            .unknown
            .iter()
            .cloned()
            .partition(|name| FIXED.contains(&name.as_ref()));
        for name in fixed {
            let detail = "cannot be changed: cancel the job and create another";
            errors.add(name.into_owned(), detail);
        }
        note_strangers(&mut errors, "", &unknown, &request.repeated, &[]);
        let when = [("delay", request.delay), ("fire_at", request.fire_at)];
        let when = when
            .iter()
            .any(|(_, raw)| raw.is_some())
            .then(|| read_when(&mut errors, when))
            .flatten();
        let actions = request.action.map(|_| {
            let Actions { actions, .. } = action::read_actions(&mut errors, request.action, rules);
            actions
        });
        let check = request.check.map(|raw| match raw.get() {
            "null" => None,
            _ => action::read_check(&mut errors, raw),
        });
        let retry = request
            .retry
            .map(|raw| read_retry(&mut errors, Some(raw), current.retry));
        if !errors.0.is_empty() {
            return Err(Problem::fields(ProblemKind::InvalidRequest, errors.0));
        }
        if when.is_none() && actions.is_none() && check.is_none() && retry.is_none() {
            return Err(Problem::new(
                ProblemKind::InvalidRequest,
                "the body changes nothing: give delay, fire_at, action, check or retry",
            ));
        }
        Ok(Self {
            when,
            actions,
            check,
            retry,
        })
    }

    /// The plan as it is to be; `None` where it stays.
    pub(crate) fn plan(self, current: &JobPlan) -> Option<JobPlan> {
        if self.actions.is_none() && self.check.is_none() && self.retry.is_none() {
            return None;
        }
        Some(JobPlan {
            actions: self.actions.unwrap_or_else(|| current.actions.clone()),
            check: self.check.unwrap_or_else(|| current.check.clone()),
            notify: current.notify.clone(),
            retry: self.retry.unwrap_or(current.retry),
        })
    }

    /// Whether it brings a push.
    pub(crate) fn pushes(&self) -> bool {
        let mut actions = self.actions.iter().flatten();
        actions.any(|action| action.kind == ActionKind::Push)
    }
}

fn read_job_id(raw: &RawValue) -> Result<JobId, String> {
    let text = read_text(raw)?;
    if RESERVED_IDS.contains(&text.as_ref()) {
        return Err(format!(
            "must not be {text:?}, which means something else in a path"
        ));
    }
    JobId::parse(&text).map_err(|error| super::after_name(&error.to_string()))
}

/// Of a delay and a time exactly one; each with the name of its field.
pub(super) fn read_when(
    errors: &mut Errors,
    [(delay_name, delay), (time_name, time)]: [(&'static str, Option<&RawValue>); 2],
) -> Option<When> {
    match (delay, time) {
        (Some(_), Some(_)) => {
            let detail = format!("must not be given together with {delay_name}");
            errors.add(time_name, detail);
            None
        }
        (None, None) => {
            errors.add(delay_name, format!("is required (or {time_name})"));
            None
        }
        (Some(raw), None) => errors.keep(delay_name, read_delay(raw)).map(When::In),
        (None, Some(raw)) => errors.keep(time_name, read_time(raw)).map(When::At),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds.
fn read_delay(raw: &RawValue) -> Result<u64, String> {
    let delay = read_duration(raw)?;
    if delay > DELAY_MAX {
        return Err(format!(
            "must be at most 10 years (3660d), is {}",
            shown(raw)
        ));
    }
    Ok(millis(delay))
}

fn read_duration(raw: &RawValue) -> Result<Duration, String> {
    let expected = "a duration like \"250ms\", \"15m\" or \"24h\", or whole seconds";
    match raw.get().as_bytes().first() {
        Some(b'"') => duration::parse(&read_text(raw)?)
            .map_err(|_| format!("must be {expected}, is {}", shown(raw))),
        _ if raw.get().starts_with('-') => Err("must not be negative".into()),
        _ => read(raw, expected).map(Duration::from_secs),
    }
}

/// Unix milliseconds.
fn read_time(raw: &RawValue) -> Result<u64, String> {
    let wrong = || format!("must be {TIME_EXPECTED}, is {}", shown(raw));
    let text = read_text(raw)?;
    parse_time(&text).ok_or_else(wrong).and_then(|at_ms| {
        let latest = moorline_router::unix_ms().saturating_add(millis(DELAY_MAX));
        match at_ms > latest {
            true => Err(format!("must be within 10 years, is {}", shown(raw))),
            false => Ok(at_ms),
        }
    })
}

/// RFC 3339 to Unix milliseconds, rounded up: never early. Times before 1970 are 1970.
pub(crate) fn parse_time(text: &str) -> Option<u64> {
    let time: jiff::Timestamp = text.parse().ok()?;
    let ns = u128::try_from(time.as_nanosecond()).unwrap_or(0);
    u64::try_from(ns.div_ceil(1_000_000)).ok()
}

fn read_events(errors: &mut Errors, field: &'static str, raw: Option<&RawValue>) -> Vec<EventName> {
    let Some(raw) = raw else { return Vec::new() };
    let Ok(given) = serde_json::from_str::<Vec<&RawValue>>(raw.get()) else {
        let detail = format!(
            "must be a list like [\"order.paid:123\"], is {}",
            kind_of(raw)
        );
        errors.add(field, detail);
        return Vec::new();
    };
    if given.len() > EVENTS_MAX {
        errors.add(field, format!("must name at most {EVENTS_MAX} events"));
        return Vec::new();
    }
    let mut names = Vec::with_capacity(given.len());
    for (at, raw) in given.into_iter().enumerate() {
        let name = read_text(raw).and_then(|text| {
            EventName::parse(&text).map_err(|error| super::after_name(&error.to_string()))
        });
        match name {
            Ok(name) if names.contains(&name) => {}
            Ok(name) => names.push(name),
            Err(detail) => errors.add(format!("{field}[{at}]"), detail),
        }
    }
    names
}

fn read_retry(errors: &mut Errors, raw: Option<&RawValue>, otherwise: RetryPolicy) -> RetryPolicy {
    let Some(raw) = raw else { return otherwise };
    let request: RetryRequest<'_> = match serde_json::from_str(raw.get()) {
        Ok(request) => request,
        Err(_) => {
            let expected = RetryRequest::EXPECTED;
            errors.add("retry", format!("must be {expected}, is {}", kind_of(raw)));
            return otherwise;
        }
    };
    note_strangers(errors, "retry.", &request.unknown, &request.repeated, &[]);
    let attempts = request.attempts.and_then(|raw| {
        let attempts = match read::<u32>(raw, "a whole number from 1 to 100") {
            Ok(attempts) if (1..=ATTEMPTS_MAX).contains(&attempts) => Ok(attempts),
            _ => Err(format!(
                "must be a whole number from 1 to {ATTEMPTS_MAX}, is {}",
                shown(raw)
            )),
        };
        errors.keep("retry.attempts", attempts)
    });
    let mut wait = |field, raw: Option<&RawValue>| {
        let read = raw.map(|raw| match read_duration(raw)? {
            Duration::ZERO => Err("must be greater than 0".to_owned()),
            wait if wait > DELAY_MAX => Err("must be at most 10 years".to_owned()),
            wait => Ok(millis(wait)),
        });
        read.and_then(|read| errors.keep(field, read))
    };
    let first_ms = wait("retry.initial", request.initial);
    let max_ms = wait("retry.max", request.max);
    let first_ms = first_ms.unwrap_or_else(|| {
        // A shorter maximum than the default beginning means the beginning, too.
        otherwise.first_ms.min(max_ms.unwrap_or(u64::MAX))
    });
    let max_ms = max_ms.unwrap_or(otherwise.max_ms.max(first_ms));
    if max_ms < first_ms {
        errors.add("retry.max", "must be at least retry.initial");
    }
    RetryPolicy {
        attempts_max: attempts.unwrap_or(otherwise.attempts_max),
        first_ms,
        max_ms,
    }
}
