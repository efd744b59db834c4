//! A delayed job as the API shows it.

use moorline_router::{ActionState, Job, JobState};
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::payload::time;
use crate::config::Config;
use crate::delayed;

/// Where a job stands.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = DelayState)]
pub(super) enum JobStateName {
    /// It waits.
    Pending,
    /// It has begun.
    Firing,
    /// It has begun, and waits for another attempt.
    Retrying,
    /// Everything was done.
    Fired,
    /// Its check said that there was nothing to do.
    Skipped,
    /// It ended before it began.
    Cancelled,
    /// It was given up: a dead letter.
    Failed,
}

impl From<JobState> for JobStateName {
    fn from(state: JobState) -> Self {
        match state {
            JobState::Pending => Self::Pending,
            JobState::Firing => Self::Firing,
            JobState::Retrying => Self::Retrying,
            JobState::Fired => Self::Fired,
            JobState::Skipped => Self::Skipped,
            JobState::Cancelled => Self::Cancelled,
            JobState::Failed => Self::Failed,
        }
    }
}

/// One action of a job.
#[derive(Serialize, ToSchema)]
#[schema(as = DelayAction)]
pub(super) struct ActionBody {
    /// `push`, `webhook`, `amqp`, or `publish` for what a device published to `$delay/…`.
    kind: &'static str,
    /// What was asked for.
    #[schema(value_type = serde_json::Value)]
    request: Value,
    /// `waiting`, `done` or `failed`.
    state: &'static str,
    /// Of the message that the push makes; the `webhook-id` of the call; the AMQP `message-id`. The same at every attempt.
    id: String,
}

/// A delayed job.
#[derive(Serialize, ToSchema)]
#[schema(as = Delay)]
pub(super) struct JobBody {
    /// Its name.
    #[schema(example = "order-123")]
    id: String,
    /// Where it stands.
    state: JobStateName,
    /// RFC 3339.
    #[schema(format = DateTime)]
    created_at: String,
    /// When it is, or was, due. RFC 3339.
    #[schema(format = DateTime)]
    fire_at: String,
    /// What it does, in this order.
    actions: Vec<ActionBody>,
    /// Who is asked before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = serde_json::Value)]
    check: Option<Value>,
    /// The events that cancel it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cancel_on: Vec<String>,
    /// The events that make it due.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    trigger_on: Vec<String>,
    /// When an attempt fails.
    retry: RetryBody,
    /// Who is told when everything is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = serde_json::Value)]
    on_fired: Option<Value>,
    /// Who is told when it is given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = serde_json::Value)]
    on_failed: Option<Value>,
    /// Attempts that failed.
    attempts: u32,
    /// Why the last one failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
    /// When the next attempt is made, while it is `retrying`. RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    next_attempt_at: Option<String>,
    /// The event that cancelled or triggered it.
    #[serde(skip_serializing_if = "Option::is_none")]
    by_event: Option<String>,
    /// When it ended. RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    ended_at: Option<String>,
}

/// How often and when a failed attempt is repeated.
#[derive(Serialize, ToSchema)]
#[schema(as = DelayRetry)]
pub(super) struct RetryBody {
    /// In all.
    attempts: u32,
    /// Longest wait after the first.
    #[schema(example = "1s")]
    initial: String,
    /// Longest wait ever.
    #[schema(example = "10m")]
    max: String,
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or(Value::Null)
}

fn duration(ms: u64) -> String {
    moorline_router::duration::format(std::time::Duration::from_millis(ms))
}

impl JobBody {
    pub(super) fn new(job: &Job, config: &Config, device_topics: &str) -> Self {
        let states = job.actions.iter();
        let actions = job.plan.actions.iter().zip(states).enumerate();
        let actions = actions.map(|(at, (action, state))| {
            let target = delayed::target_of(action, config, device_topics).unwrap_or_default();
            ActionBody {
                kind: delayed::kind_name(action.kind),
                request: json(&action.spec),
                state: match state {
                    ActionState::Waiting => "waiting",
                    ActionState::Done => "done",
                    ActionState::Failed => "failed",
                },
                id: delayed::action_id(job, at, &target).to_string(),
            }
        });
        let names =
            |names: &[moorline_router::EventName]| names.iter().map(ToString::to_string).collect();
        let mut notify = job.plan.notify.as_deref().map(json);
        let mut told = |field: &str| notify.as_mut()?.get_mut(field).map(Value::take);
        Self {
            id: job.id.to_string(),
            state: job.state.into(),
            created_at: time(job.created_ms),
            fire_at: time(job.fire_at_ms),
            actions: actions.collect(),
            check: job.plan.check.as_deref().map(json),
            cancel_on: names(&job.cancel_on),
            trigger_on: names(&job.trigger_on),
            retry: RetryBody {
                attempts: job.plan.retry.attempts_max,
                initial: duration(job.plan.retry.first_ms),
                max: duration(job.plan.retry.max_ms),
            },
            on_fired: told("on_fired"),
            on_failed: told("on_failed"),
            attempts: job.attempts,
            last_error: job.last_error.clone(),
            next_attempt_at: (job.state == JobState::Retrying).then(|| time(job.due_ms)),
            by_event: job.by_event.as_ref().map(ToString::to_string),
            ended_at: job.ended_ms.map(time),
        }
    }
}

#[cfg(test)]
mod tests {
    use moorline_router::ActionKind;

    use super::*;
    use crate::delayed::Notify;

    #[test]
    fn who_is_told_is_kept_as_it_was_asked_for() {
        let kept = br#"{"on_fired":{"webhook":{"url":"http://h/"}},"on_failed":{"amqp":{"exchange":"e","routing_key":"k"}}}"#;
        let notify = Notify::from_spec(kept).unwrap();
        assert_eq!(notify.fired.unwrap().kind, ActionKind::Webhook);
        let failed = notify.failed.unwrap();
        assert_eq!(
            (failed.kind, json(&failed.spec)["exchange"].as_str()),
            (ActionKind::Amqp, Some("e"))
        );
    }
}
