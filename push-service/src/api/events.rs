//! `POST /v1/events`: something happened that may make delayed jobs moot, or due.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use moorline_router::MessageId;
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::document::{BodyProblems, CallProblems, FullProblem, StoreProblem};
use super::extract::{Caller, Delay, JsonBody};
use super::push::once;
use crate::delayed;
use crate::problem::Problem;
use crate::request::{EventRequest, NewEvent};

/// What an event has changed.
#[derive(Serialize, ToSchema)]
#[schema(as = EventOutcome)]
pub(super) struct OutcomeBody {
    /// Names the event.
    id: String,
    /// Jobs that it cancelled.
    cancelled: u64,
    /// Jobs that it made due.
    triggered: u64,
}

/// Tell of an event.
///
/// Every job that waits and names it in `cancel_on` is cancelled, every one that names it in `trigger_on` is due now: when this is answered, that
/// has been done to each of them. An event that comes before its job counts for a time (10 minutes by default).
#[utoipa::path(
    post, path = "/v1/events", tag = "delays", security(("key" = ["delay"])),
    params(("Idempotency-Key" = Option<String>, Header, description = "1 to 255 visible ASCII characters: names an event that has no id in its body. The same event counts once, and is answered the same.")),
    request_body(content = EventRequest<'static>, content_type = "application/json"),
    responses((status = 202, description = "It is durable, and told to every job", body = OutcomeBody), CallProblems, BodyProblems, FullProblem, StoreProblem)
)]
pub(super) async fn tell(
    State(api): Shared,
    caller: Caller<Delay>,
    headers: HeaderMap,
    JsonBody(body): JsonBody,
) -> Result<(StatusCode, Json<OutcomeBody>), Problem> {
    let event = NewEvent::from_json(&body)?;
    let once = once(&caller.name, &headers)?;
    let id = event.id.or(once).unwrap_or_else(MessageId::generate);
    // In a task of its own: a caller that hangs up must not leave it half told.
    let (told, told_id) = (api.clone(), id.clone());
    let telling = tokio::spawn(async move {
        let jobs = &*told.stores.jobs;
        delayed::tell(jobs, &told.delays.clock, event.name, told_id).await
    });
    let outcome = telling.await.map_err(|error| {
        tracing::error!(%error, "an event ended without an outcome");
        Problem::new(
            crate::problem::ProblemKind::Internal,
            "the event ended without an outcome",
        )
    })??;
    let body = OutcomeBody {
        id: id.to_string(),
        cancelled: outcome.cancelled,
        triggered: outcome.triggered,
    };
    Ok((StatusCode::ACCEPTED, Json(body)))
}
