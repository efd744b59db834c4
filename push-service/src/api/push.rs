//! `POST /v1/push`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use moorline_mqtt::ByteString;
use moorline_router::{ActionKind, JobAction, JobCreated, JobPlan, MessageId};
use serde::Serialize;
use utoipa::ToSchema;

use super::document::{BodyProblems, CallProblems, ConflictProblem, FullProblem, StoreProblem};
use super::extract::{self, Caller, JsonBody};
use super::messages::State as MessageState;
use super::{Api, Shared};
use crate::delayed::{action_id, push_target};
use crate::problem::{Problem, ProblemKind};
use crate::push::{Context, Push, SubmitError, derived_id};
use crate::request::{NewDelay, PushLater, PushRequest};

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
pub(super) const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// Characters of an Idempotency-Key.
const IDEMPOTENCY_KEY_MAX: usize = 255;

/// A push that was accepted.
#[derive(Serialize, ToSchema)]
pub(crate) struct Accepted {
    /// The message id: for `GET /v1/messages/{id}`, and what the device sees as the user property `message-id`.
    #[schema(example = "0197f2b6-93ae-7c11-9d0c-0f6d1f6e8f7a")]
    id: String,
    /// `sent`: handed to the device's connection, or published to the topic. `accepted`: it waits for the device.
    /// `dropped`: QoS 0 and the device is not connected. `scheduled`: it is made later. A repeated push may have gone on to any other state.
    state: MessageState,
    /// The delayed job that makes the push; with `delay` or `deliver_at` only. The message id is that of the message to come.
    #[serde(skip_serializing_if = "Option::is_none")]
    delay: Option<String>,
    /// Sessions whose subscriptions match, for a push to a topic.
    #[serde(skip_serializing_if = "Option::is_none")]
    matched: Option<u64>,
}

impl From<SubmitError> for Problem {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Conflict(id) => Self::field(
                ProblemKind::IdempotencyConflict,
                "Idempotency-Key",
                format!("was used before for message {id}, with another request; use a new key"),
            ),
            SubmitError::InProgress(id) => Self::field(
                ProblemKind::IdempotencyInProgress,
                "Idempotency-Key",
                format!("is that of message {id}, which is being accepted at this moment"),
            ),
            SubmitError::InboxFull => Self::field(
                ProblemKind::LimitReached,
                "to.client",
                "has an inbox that is full; nothing was stored",
            ),
            SubmitError::Store(error) => error.into(),
        }
    }
}

/// Push a message to a client or a topic.
///
/// With QoS 1 or 2 (the default is 1) the answer 202 means that the message is durable: it waits for the device,
/// through restarts of device and gateway, until it was delivered or its `ttl` ended. A push to
/// a topic is safe for every persistent session that matches; having no subscriber is not an error.
/// A topic below `d/{client}/` belongs to that device: such a push is one to the client.
#[utoipa::path(
    post, path = "/v1/push", tag = "push", security(("key" = ["push"])),
    params(
        ("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters. The same key with the same body is accepted once and answered again with the header `Idempotent-Replayed: true`; with another body it is refused."),
        ("traceparent" = Option<String>, Header, description = "W3C trace context, handed to the device as a user property."),
    ),
    request_body(content = inline(PushRequest), content_type = "application/json"),
    responses(
        (status = 202, description = "Accepted", body = Accepted,
            headers(("Idempotent-Replayed" = String, description = "`true` where an earlier push is answered again"))),
        CallProblems, BodyProblems, ConflictProblem, FullProblem, StoreProblem,
    )
)]
pub(super) async fn push(
    State(api): Shared,
    caller: Caller<extract::Push>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let read = || {
        let (push, later) = Push::now_or_later(&body, &api.config, &api.device_topics)?;
        Ok::<_, Problem>((push, later, context(&caller.name, &headers)?))
    };
    let (push, later, context) = read().inspect_err(|_| api.submitter.metrics().push_invalid())?;
    if let Some(later) = later {
        return schedule(&api, later, &push, context).await;
    }
    // In a task of its own: a caller that hangs up now must not take the delivery with it, when the
    // message is stored and waits for nothing but its hint.
    let submitting = Arc::clone(&api);
    let submitted = tokio::spawn(async move { submitting.submitter.submit(push, context).await });
    let outcome = submitted.await.map_err(|error| {
        tracing::error!(%error, "a push ended without an outcome");
        Problem::new(ProblemKind::Internal, "the push ended without an outcome")
    })??;
    let accepted = Accepted {
        id: outcome.id.as_str().to_owned(),
        state: outcome.state.into(),
        delay: None,
        matched: outcome.matched,
    };
    let mut response = (StatusCode::ACCEPTED, Json(accepted)).into_response();
    if outcome.replayed {
        response
            .headers_mut()
            .insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// A push that is made later is a job.
async fn schedule(
    api: &Api,
    later: PushLater,
    push: &Push,
    context: Context,
) -> Result<Response, Problem> {
    let action = JobAction {
        kind: ActionKind::Push,
        spec: later.spec,
    };
    let delay = NewDelay {
        id: None,
        when: later.when,
        plan: JobPlan {
            actions: vec![action],
            check: None,
            notify: None,
            retry: api.delays.retry,
        },
        cancel_on: Vec::new(),
        trigger_on: Vec::new(),
    };
    let job = api.new_job(delay, context.once);
    let (job, replayed) = match api.stores.jobs.create(job).await? {
        JobCreated::Created(job) => (job, false),
        JobCreated::Same(job) => (job, true),
        JobCreated::Conflict(job) => {
            let detail = format!(
                "was used before for the delayed job {}, with another request; use a new key",
                job.id
            );
            let kind = ProblemKind::IdempotencyConflict;
            return Err(Problem::field(kind, "Idempotency-Key", detail));
        }
    };
    let accepted = Accepted {
        id: action_id(&job, 0, &push_target(push)).to_string(),
        state: MessageState::Scheduled,
        delay: Some(job.id.to_string()),
        matched: None,
    };
    let mut response = (StatusCode::ACCEPTED, Json(accepted)).into_response();
    if replayed {
        response
            .headers_mut()
            .insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

fn context(caller: &str, headers: &HeaderMap) -> Result<Context, Problem> {
    Ok(Context {
        once: once(caller, headers)?,
        traceparent: headers.get(TRACEPARENT).and_then(traceparent),
    })
}

/// The id of what the caller's Idempotency-Key names.
pub(super) fn once(caller: &str, headers: &HeaderMap) -> Result<Option<MessageId>, Problem> {
    Ok(match headers.get(IDEMPOTENCY_KEY) {
        None => None,
        Some(value) => {
            let key = value.to_str().unwrap_or("").trim();
            if key.is_empty() || key.len() > IDEMPOTENCY_KEY_MAX || key.contains('\t') {
                return Err(Problem::field(
                    ProblemKind::InvalidRequest,
                    "Idempotency-Key",
                    format!("must be 1 to {IDEMPOTENCY_KEY_MAX} visible ASCII characters"),
                ));
            }
            Some(derived_id(caller, key))
        }
    })
}

/// `00-{32 hex}-{16 hex}-{2 hex}`; anything else is left out, as W3C Trace Context asks.
fn traceparent(value: &HeaderValue) -> Option<ByteString> {
    let text = value.to_str().ok()?;
    let mut parts = text.split('-');
    let well_formed = [2, 32, 16, 2].iter().all(|length| {
        parts.next().is_some_and(|part| {
            part.len() == *length
                && part
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        })
    });
    (well_formed && parts.next().is_none() && text.len() == 55).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_context_is_handed_on_only_if_it_is_one() {
        let of = |text: &'static str| traceparent(&HeaderValue::from_static(text));
        let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(of(valid).as_deref(), Some(valid));
        assert_eq!(
            of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"),
            None
        );
        assert_eq!(
            of("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x"),
            None
        );
        assert_eq!(
            of("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"),
            None
        );
        assert_eq!(of("nonsense"), None);
    }

    #[test]
    fn an_idempotency_key_belongs_to_its_caller() {
        let mut headers = HeaderMap::new();
        headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_static("order-1"));
        let of = |caller, headers| context(caller, headers).unwrap().once;
        assert_eq!(of("a", &headers), of("a", &headers));
        assert_ne!(of("a", &headers), of("b", &headers));
        let id = of("a", &headers).unwrap();
        assert_eq!(
            uuid::Uuid::parse_str(id.as_str())
                .unwrap()
                .get_version_num(),
            8
        );
        headers.insert(IDEMPOTENCY_KEY, HeaderValue::from_static(" "));
        assert_eq!(
            context("a", &headers).unwrap_err().errors()[0].field,
            "Idempotency-Key"
        );
    }
}
