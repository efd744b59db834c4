//! `/v1/messages/{id}`: what became of a push.

use axum::Json;
use axum::extract::State as AxumState;
use moorline_router::{MessageId, Receipt, ReceiptState, Recipient};
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use super::document::{CallProblems, EndedProblem, ReceiptProblem, StoreProblem};
use super::extract::{Caller, PathId, Push, Read};
use super::payload::time;
use crate::problem::{Problem, ProblemKind};

/// Where a message is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = MessageState)]
pub(super) enum State {
    /// A delayed job makes it later; only in the answer to a push.
    Scheduled,
    /// Durable; it waits for the device.
    Accepted,
    /// Handed to the device's connection, or published to the topic.
    Sent,
    /// The device acknowledged it.
    Delivered,
    /// The device refused it with a reason code.
    Rejected,
    /// Its time to live ended first.
    Expired,
    /// A newer message with its collapse key took its place.
    Replaced,
    /// The overflow policy of the inbox, or QoS 0 and nobody there.
    Dropped,
    /// Larger than the device's Maximum Packet Size.
    TooLarge,
    /// Cancelled by a caller.
    Cancelled,
}

impl From<ReceiptState> for State {
    fn from(state: ReceiptState) -> Self {
        match state {
            ReceiptState::Accepted => Self::Accepted,
            ReceiptState::Sent => Self::Sent,
            ReceiptState::Delivered => Self::Delivered,
            ReceiptState::Rejected => Self::Rejected,
            ReceiptState::Expired => Self::Expired,
            ReceiptState::Replaced => Self::Replaced,
            ReceiptState::Dropped => Self::Dropped,
            ReceiptState::TooLarge => Self::TooLarge,
            ReceiptState::Cancelled => Self::Cancelled,
        }
    }
}

/// To whom a push went: one of the two.
#[derive(Serialize, ToSchema)]
pub(super) struct To {
    /// A client id.
    #[serde(skip_serializing_if = "Option::is_none")]
    client: Option<String>,
    /// A topic name.
    #[serde(skip_serializing_if = "Option::is_none")]
    topic: Option<String>,
}

/// One step of a message's life.
#[derive(Serialize, ToSchema)]
pub(super) struct Step {
    /// What happened.
    state: State,
    /// RFC 3339.
    #[schema(format = DateTime)]
    at: String,
    /// The node it was handed to.
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<String>,
    /// The epoch of the connection it was handed to.
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<u64>,
    /// The MQTT reason code of a rejection.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason_code: Option<u8>,
}

/// What became of a push.
#[derive(Serialize, ToSchema)]
pub(super) struct Message {
    /// Its id.
    id: String,
    /// To whom it went.
    to: To,
    /// The newest state.
    state: State,
    /// Every state it was in, oldest first.
    timeline: Vec<Step>,
}

impl From<Receipt> for Message {
    fn from(receipt: Receipt) -> Self {
        let state = receipt.state().into();
        let to = match receipt.to {
            Recipient::Client(client) => To {
                client: Some(client.to_string()),
                topic: None,
            },
            Recipient::Topic(topic) => To {
                client: None,
                topic: Some(topic),
            },
        };
        let timeline = receipt.timeline.into_iter().map(|step| {
            let (node, epoch) = step
                .node
                .map(|(node, epoch)| (node.to_string(), epoch.0))
                .unzip();
            Step {
                state: step.state.into(),
                at: time(step.at_ms),
                node,
                epoch,
                reason_code: step.reason_code,
            }
        });
        Self {
            id: receipt.id.to_string(),
            to,
            state,
            timeline: timeline.collect(),
        }
    }
}

fn unknown(id: &MessageId) -> Problem {
    let detail = format!(
        "no receipt of message {id}: it never was accepted, or it ended longer ago than receipts are kept"
    );
    Problem::new(ProblemKind::ReceiptExpired, detail)
}

/// What became of a push.
///
/// Receipts are kept for a time after the end of a message (10 minutes by default).
#[utoipa::path(
    get, path = "/v1/messages/{id}", tag = "messages", security(("key" = ["read"])),
    params(("id" = String, Path, description = "Message id")),
    responses((status = 200, description = "Its state and how it came there", body = Message), CallProblems, ReceiptProblem, StoreProblem)
)]
pub(super) async fn get(
    AxumState(api): Shared,
    _: Caller<Read>,
    PathId(id): PathId<MessageId>,
) -> Result<Json<Message>, Problem> {
    let receipt = api.stores.inboxes.receipt(&id).await?;
    receipt
        .map(|receipt| Json(receipt.into()))
        .ok_or_else(|| unknown(&id))
}

/// Cancel a push that has not been delivered.
///
/// A message on its way to the device may still arrive. Cancelling again answers the same.
#[utoipa::path(
    delete, path = "/v1/messages/{id}", tag = "messages", security(("key" = ["push"])),
    params(("id" = String, Path, description = "Message id")),
    responses((status = 200, description = "It is cancelled", body = Message), CallProblems, ReceiptProblem, EndedProblem, StoreProblem)
)]
pub(super) async fn cancel(
    AxumState(api): Shared,
    _: Caller<Push>,
    PathId(id): PathId<MessageId>,
) -> Result<Json<Message>, Problem> {
    let receipt = api
        .stores
        .inboxes
        .cancel(&id)
        .await?
        .ok_or_else(|| unknown(&id))?;
    let message = Message::from(receipt);
    if message.state == State::Cancelled {
        return Ok(Json(message));
    }
    let state = serde_json::to_string(&message.state).unwrap_or_default();
    let detail = format!(
        "message {id} cannot be cancelled, it is {} already",
        state.trim_matches('"')
    );
    Err(Problem::new(ProblemKind::AlreadyEnded, detail))
}
