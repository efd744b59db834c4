//! `/v1/upstream`: what devices sent and no rule takes, for a backend that would rather ask than be called.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, Stream};
use moorline_router::embedded::{EmbeddedStore, is_consumer_name};
use moorline_router::{Position, UpstreamDelivery};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use super::document::{BodyProblems, CallProblems, FullProblem, NotFoundProblem, StoreProblem};
use super::extract::{
    CURSOR_EXPECTED, Caller, JsonBody, Params, PathId, Upstream, cursor, parse_cursor,
};
use super::payload::{Payload, Properties, time};
use super::{Api, Shared, stopped};
use crate::UpstreamReading;
use crate::problem::{FieldError, Problem, ProblemKind};
use crate::request::malformed;

/// Messages of one page.
const MESSAGES_MAX: usize = 1_000;
/// The consumer of a caller that names none.
const CONSUMER: &str = "default";
/// A comment is sent this often to keep an idle event stream open.
const SSE_KEEP_ALIVE: Duration = Duration::from_secs(15);
/// One wait of an event stream for messages; only its length in time, the stream goes on.
const SSE_WAIT: Duration = Duration::from_secs(30);
/// How long a browser waits before it opens a broken event stream again.
const SSE_RETRY: Duration = Duration::from_secs(1);
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What a device sent.
#[derive(Serialize, ToSchema)]
#[schema(as = UpstreamMessage)]
pub(super) struct Message {
    /// Message id: the same if it is read twice.
    id: String,
    /// Who sent it.
    client: String,
    /// Where to.
    topic: String,
    #[serde(flatten)]
    payload: Payload,
    /// As it was published.
    qos: u8,
    /// When it was received, RFC 3339.
    #[schema(format = DateTime)]
    at: String,
    #[serde(flatten)]
    properties: Properties,
}

impl From<&UpstreamDelivery> for Message {
    fn from(delivery: &UpstreamDelivery) -> Self {
        let message = &delivery.message;
        Self {
            id: message.id.to_string(),
            client: message.client.to_string(),
            topic: message.topic.as_str().to_owned(),
            payload: Payload::from(&message.payload),
            qos: message.qos as u8,
            at: time(message.received_at_ms),
            properties: Properties::from(message.properties.as_deref()),
        }
    }
}

/// One page of what devices sent.
#[derive(Serialize, ToSchema)]
pub(super) struct Messages {
    /// In the order in which they were received; one device's messages in the order it sent them.
    messages: Vec<Message>,
    /// Acknowledge it and read on after it. Null where there is no message and no `after` was given.
    next: Option<String>,
}

/// An acknowledgement.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Acknowledgement {
    /// The `next` of a page or the id of an event: everything up to it has been dealt with.
    cursor: String,
    /// The consumer that read it.
    #[serde(default = "default_consumer")]
    #[schema(default = "default")]
    consumer: String,
}

fn default_consumer() -> String {
    CONSUMER.to_owned()
}

/// A consumer: a name with a cursor.
#[derive(Serialize, ToSchema)]
pub(super) struct Consumer {
    /// Its name.
    name: String,
    /// What it has acknowledged.
    cursor: String,
}

/// Every consumer.
#[derive(Serialize, ToSchema)]
pub(super) struct Consumers {
    /// In the order of their names. Messages are kept until all of them have acknowledged them.
    consumers: Vec<Consumer>,
}

fn log(api: &Api) -> Result<&Arc<EmbeddedStore>, Problem> {
    match &api.upstream {
        UpstreamReading::Here(log) => Ok(log),
        UpstreamReading::Queue(queue) => Err(Problem::new(
            ProblemKind::NotFound,
            format!(
                "in this deployment what devices send waits in RabbitMQ: consume from the queue {queue:?}"
            ),
        )),
    }
}

fn check_consumer(name: &str) -> Result<(), &'static str> {
    match is_consumer_name(name) {
        true => Ok(()),
        false => Err("must be 1 to 64 visible ASCII characters"),
    }
}

/// Read what devices sent.
///
/// A consumer is known from its first read on; messages are kept until every known consumer has acknowledged them.
/// Without `after` a page begins at the first message that the consumer has not acknowledged. Only what no upstream
/// rule takes comes here. With `Accept: text/event-stream` the answer is a stream of events `message`, each with the
/// cursor as its id.
#[utoipa::path(
    get, path = "/v1/upstream", tag = "upstream", security(("key" = ["upstream"])),
    params(
        ("consumer" = Option<String>, Query, description = "1 to 64 visible ASCII characters, default `default`"),
        ("after" = Option<String>, Query, description = "The `next` of an earlier page"),
        ("limit" = Option<usize>, Query, description = "1 to 1000, default 100"),
        ("wait" = Option<String>, Query, description = "How long to wait for a message, like `20s`; not at all by default"),
        ("Last-Event-ID" = Option<String>, Header, description = "As `after`, for event streams that go on"),
    ),
    responses(
        (status = 200, description = "One page, or a stream of events", content((Messages = "application/json"), (String = "text/event-stream"))),
        CallProblems, NotFoundProblem, FullProblem, StoreProblem,
    )
)]
pub(super) async fn read(
    State(api): Shared,
    _: Caller<Upstream>,
    headers: HeaderMap,
    mut params: Params,
) -> Result<Response, Problem> {
    let log = log(&api)?;
    let consumer = params.text("consumer").unwrap_or_else(default_consumer);
    if let Err(detail) = check_consumer(&consumer) {
        params.wrong("consumer", detail);
    }
    let mut after = params.cursor("after");
    let limit = params.limit(MESSAGES_MAX);
    let wait = params.wait(api.config.wait_max);
    if let Some(value) = headers.get(LAST_EVENT_ID) {
        let last = value.to_str().ok().and_then(parse_cursor);
        if last.is_none() {
            params.wrong("Last-Event-ID", CURSOR_EXPECTED);
        }
        after = last.or(after);
    }
    params.finish()?;
    let wants_events = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|accept| accept.contains("text/event-stream"));
    if wants_events {
        // The first read tells a problem from a stream.
        let first = log
            .read_default(&consumer, after, limit, Duration::ZERO)
            .await?;
        let events = Events {
            log: Arc::clone(log),
            consumer,
            after,
            limit,
            stop: api.stop.clone(),
        };
        let keep_alive = KeepAlive::new().interval(SSE_KEEP_ALIVE);
        return Ok(Sse::new(events.stream(first))
            .keep_alive(keep_alive)
            .into_response());
    }
    let deliveries = tokio::select! {
        deliveries = log.read_default(&consumer, after, limit, wait) => deliveries?,
        () = stopped(api.stop.clone()) => Vec::new(),
    };
    let last = deliveries.last().map(|delivery| delivery.position);
    Ok(Json(Messages {
        messages: deliveries.iter().map(Message::from).collect(),
        next: last.or(after).map(cursor),
    })
    .into_response())
}

/// An event stream that is being read.
struct Events {
    log: Arc<EmbeddedStore>,
    consumer: String,
    after: Option<Position>,
    limit: usize,
    stop: watch::Receiver<bool>,
}

impl Events {
    /// Ends when the server stops or the store fails: the reader comes back with `Last-Event-ID`.
    fn stream(
        self,
        first: Vec<UpstreamDelivery>,
    ) -> impl Stream<Item = Result<Event, Infallible>> + use<> {
        let pages = stream::unfold((self, Some(first)), |(mut events, first)| async move {
            let page = match first {
                Some(page) => page,
                None => events.next_page().await?,
            };
            if let Some(last) = page.last() {
                events.after = Some(last.position);
            }
            let page: Vec<_> = page.iter().filter_map(event).map(Ok).collect();
            Some((stream::iter(page), (events, None)))
        });
        stream::StreamExt::flatten(pages)
    }

    async fn next_page(&self) -> Option<Vec<UpstreamDelivery>> {
        let read = self
            .log
            .read_default(&self.consumer, self.after, self.limit, SSE_WAIT);
        tokio::select! {
            page = read => page
                .inspect_err(|error| tracing::debug!(%error, "an event stream ends"))
                .ok(),
            () = stopped(self.stop.clone()) => None,
        }
    }
}

fn event(delivery: &UpstreamDelivery) -> Option<Event> {
    let event = Event::default()
        .event("message")
        .id(cursor(delivery.position))
        .retry(SSE_RETRY);
    event.json_data(Message::from(delivery)).ok()
}

/// Acknowledge what was read.
///
/// The consumer's cursor moves forward, never back.
#[utoipa::path(
    post, path = "/v1/upstream/ack", tag = "upstream", security(("key" = ["upstream"])),
    request_body(content = Acknowledgement, content_type = "application/json"),
    responses((status = 204, description = "Durable"), CallProblems, BodyProblems, NotFoundProblem, FullProblem, StoreProblem)
)]
pub(super) async fn acknowledge(
    State(api): Shared,
    _: Caller<Upstream>,
    JsonBody(body): JsonBody,
) -> Result<StatusCode, Problem> {
    let log = log(&api)?;
    let Acknowledgement { cursor, consumer } =
        serde_json::from_slice(&body).map_err(|error| malformed(&error))?;
    let position = parse_cursor(&cursor);
    let mut errors = Vec::new();
    if position.is_none() {
        errors.push(FieldError {
            field: "cursor".into(),
            detail: CURSOR_EXPECTED.into(),
        });
    }
    if let Err(detail) = check_consumer(&consumer) {
        errors.push(FieldError {
            field: "consumer".into(),
            detail: detail.into(),
        });
    }
    match position {
        Some(position) if errors.is_empty() => log.ack_default(&consumer, position).await?,
        _ => return Err(Problem::fields(ProblemKind::InvalidRequest, errors)),
    }
    Ok(StatusCode::NO_CONTENT)
}

/// List the consumers.
#[utoipa::path(
    get, path = "/v1/upstream/consumers", tag = "upstream", security(("key" = ["upstream"])),
    responses((status = 200, description = "Every known consumer", body = Consumers), CallProblems, NotFoundProblem)
)]
pub(super) async fn consumers(
    State(api): Shared,
    _: Caller<Upstream>,
) -> Result<Json<Consumers>, Problem> {
    let known = log(&api)?.consumers().into_iter();
    let consumers = known.map(|(name, position)| Consumer {
        name,
        cursor: cursor(position),
    });
    Ok(Json(Consumers {
        consumers: consumers.collect(),
    }))
}

/// Forget a consumer, so that it holds no messages back.
#[utoipa::path(
    delete, path = "/v1/upstream/consumers/{id}", tag = "upstream", security(("key" = ["admin"])),
    params(("id" = String, Path, description = "The consumer's name, percent-encoded")),
    responses((status = 204, description = "Forgotten"), CallProblems, NotFoundProblem, StoreProblem)
)]
pub(super) async fn delete_consumer(
    State(api): Shared,
    _: Caller<super::extract::Admin>,
    PathId(name): PathId<String>,
) -> Result<StatusCode, Problem> {
    if log(&api)?.delete_consumer(&name).await? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(Problem::new(
        ProblemKind::NotFound,
        format!("there is no consumer {name:?}"),
    ))
}
