//! `/v1/dead-letters`: what could not be handed to its backend.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use moorline_router::{DeadLetter, MessageId};
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::document::{CallProblems, FullProblem, NotFoundProblem, StoreProblem};
use super::extract::{Admin, Caller, Params, PathId, Read};
use super::payload::{Payload, Properties, time};
use crate::problem::{Problem, ProblemKind};

/// Dead letters of one page.
const LETTERS_MAX: usize = 1_000;

/// A message that will not be tried again by itself.
#[derive(Serialize, ToSchema)]
pub(super) struct Letter {
    /// Message id.
    id: String,
    /// The upstream rule whose backend did not take it.
    queue: String,
    /// Who sent it.
    client: String,
    /// Where to.
    topic: String,
    #[serde(flatten)]
    payload: Payload,
    #[serde(flatten)]
    properties: Properties,
    /// As it was published.
    qos: u8,
    /// When it was received, RFC 3339.
    #[schema(format = DateTime)]
    received_at: String,
    /// Why it was given up.
    reason: String,
    /// How often it was tried.
    attempts: u32,
    /// When it was given up, RFC 3339.
    #[schema(format = DateTime)]
    at: String,
}

impl From<DeadLetter> for Letter {
    fn from(letter: DeadLetter) -> Self {
        let message = &letter.message;
        Self {
            id: message.id.to_string(),
            queue: letter.queue.to_string(),
            client: message.client.to_string(),
            topic: message.topic.as_str().to_owned(),
            payload: Payload::from(&message.payload),
            properties: Properties::from(message.properties.as_deref()),
            qos: message.qos as u8,
            received_at: time(message.received_at_ms),
            reason: letter.reason,
            attempts: letter.attempts,
            at: time(letter.at_ms),
        }
    }
}

/// One page of dead letters.
#[derive(Serialize, ToSchema)]
pub(super) struct Letters {
    /// Oldest first.
    dead_letters: Vec<Letter>,
    /// The `after` of the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// A dead letter that is tried again.
#[derive(Serialize, ToSchema)]
pub(super) struct Retried {
    /// Message id.
    id: String,
    /// Always `queued`.
    state: &'static str,
}

/// List dead letters.
#[utoipa::path(
    get, path = "/v1/dead-letters", tag = "dead letters", security(("key" = ["read"])),
    params(
        ("after" = Option<String>, Query, description = "The `next` of the page before"),
        ("limit" = Option<usize>, Query, description = "1 to 1000, default 100"),
    ),
    responses((status = 200, description = "One page", body = Letters), CallProblems, StoreProblem)
)]
pub(super) async fn list(
    State(api): Shared,
    _: Caller<Read>,
    mut params: Params,
) -> Result<Json<Letters>, Problem> {
    let after = params.id::<MessageId>("after");
    let limit = params.limit(LETTERS_MAX);
    params.finish()?;
    let letters = api
        .stores
        .upstream
        .dead_letters(after.as_ref(), limit)
        .await?;
    let next = letters
        .last()
        .filter(|_| letters.len() == limit)
        .map(|l| l.message.id.to_string());
    Ok(Json(Letters {
        dead_letters: letters.into_iter().map(Letter::from).collect(),
        next,
    }))
}

/// Try a dead letter again.
///
/// It goes to the end of its queue, with all of its attempts before it.
#[utoipa::path(
    post, path = "/v1/dead-letters/{id}/retry", tag = "dead letters", security(("key" = ["admin"])),
    params(("id" = String, Path, description = "Message id")),
    responses((status = 202, description = "It is in its queue again", body = Retried), CallProblems, NotFoundProblem, FullProblem, StoreProblem)
)]
pub(super) async fn retry(
    State(api): Shared,
    _: Caller<Admin>,
    PathId(id): PathId<MessageId>,
) -> Result<(StatusCode, Json<Retried>), Problem> {
    if api.stores.upstream.retry_dead_letter(&id).await? {
        let retried = Retried {
            id: id.to_string(),
            state: "queued",
        };
        return Ok((StatusCode::ACCEPTED, Json(retried)));
    }
    Err(Problem::new(
        ProblemKind::NotFound,
        format!("there is no dead letter {id}"),
    ))
}
