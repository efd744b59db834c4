//! Problem details (RFC 9457): the one shape of every answer that is not what was asked for.
//!
//! [`ProblemKind`] is the closed list; it drives the status, the title and the `type`. The `detail` is
//! for the person who wrote the request: it names what was wrong and what would be right.

use std::borrow::Cow;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use moorline_router::StoreError;
use serde::Serialize;
use utoipa::ToSchema;

/// Every way in which a request ends without what it asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProblemKind {
    /// A field or parameter is wrong; `errors` names each.
    InvalidRequest,
    /// The body is not JSON.
    MalformedJson,
    /// No key, or one that is not known.
    Unauthorized,
    /// The key lacks the scope.
    Forbidden,
    /// No such path, message, client connection, consumer or dead letter.
    NotFound,
    /// The message is unknown: it never was, or its receipt was kept for its time and is gone.
    ReceiptExpired,
    /// The path exists, the method does not.
    MethodNotAllowed,
    /// The Idempotency-Key was used before with another request.
    IdempotencyConflict,
    /// The first request with this Idempotency-Key is still running.
    IdempotencyInProgress,
    /// What is to be cancelled has ended already.
    AlreadyEnded,
    /// The id of a delayed job belongs to another one.
    JobConflict,
    /// A delayed job has begun, or ended.
    JobBegun,
    /// The body or the payload exceeds its limit.
    PayloadTooLarge,
    /// The body is not declared as JSON.
    UnsupportedMediaType,
    /// An inbox or a queue is full and its policy is to reject, or there are too many of something.
    LimitReached,
    /// A store is out of reach or cannot make things durable.
    StoreUnavailable,
    /// A defect of the server or damaged data.
    Internal,
}

impl ProblemKind {
    const fn row(self) -> (&'static str, StatusCode, &'static str) {
        use StatusCode as S;
        match self {
            Self::InvalidRequest => (
                "urn:moorline:problem:invalid-request",
                S::BAD_REQUEST,
                "The request is not valid",
            ),
            Self::MalformedJson => (
                "urn:moorline:problem:malformed-json",
                S::BAD_REQUEST,
                "The body is not JSON",
            ),
            Self::Unauthorized => (
                "urn:moorline:problem:unauthorized",
                S::UNAUTHORIZED,
                "An API key is needed",
            ),
            Self::Forbidden => (
                "urn:moorline:problem:forbidden",
                S::FORBIDDEN,
                "The API key does not allow this",
            ),
            Self::NotFound => ("urn:moorline:problem:not-found", S::NOT_FOUND, "Not found"),
            Self::ReceiptExpired => (
                "urn:moorline:problem:receipt-expired",
                S::NOT_FOUND,
                "No receipt of this message",
            ),
            Self::MethodNotAllowed => (
                "urn:moorline:problem:method-not-allowed",
                S::METHOD_NOT_ALLOWED,
                "The path has no such method",
            ),
            Self::IdempotencyConflict => (
                "urn:moorline:problem:idempotency-conflict",
                S::CONFLICT,
                "The Idempotency-Key belongs to another request",
            ),
            Self::IdempotencyInProgress => (
                "urn:moorline:problem:idempotency-in-progress",
                S::CONFLICT,
                "The first request with this Idempotency-Key is still running",
            ),
            Self::AlreadyEnded => (
                "urn:moorline:problem:already-ended",
                S::CONFLICT,
                "The message has ended already",
            ),
            Self::JobConflict => (
                "urn:moorline:problem:job-conflict",
                S::CONFLICT,
                "The id belongs to another job",
            ),
            Self::JobBegun => (
                "urn:moorline:problem:job-begun",
                S::CONFLICT,
                "The job has begun or ended",
            ),
            Self::PayloadTooLarge => (
                "urn:moorline:problem:payload-too-large",
                S::PAYLOAD_TOO_LARGE,
                "Too large",
            ),
            Self::UnsupportedMediaType => (
                "urn:moorline:problem:unsupported-media-type",
                S::UNSUPPORTED_MEDIA_TYPE,
                "The body must be JSON",
            ),
            Self::LimitReached => (
                "urn:moorline:problem:limit-reached",
                S::TOO_MANY_REQUESTS,
                "A limit is reached",
            ),
            Self::StoreUnavailable => (
                "urn:moorline:problem:store-unavailable",
                S::SERVICE_UNAVAILABLE,
                "The store is unavailable",
            ),
            Self::Internal => (
                "urn:moorline:problem:internal",
                S::INTERNAL_SERVER_ERROR,
                "The server failed",
            ),
        }
    }

    /// The `type` member.
    pub const fn urn(self) -> &'static str {
        self.row().0
    }

    /// The HTTP status.
    pub const fn status(self) -> StatusCode {
        self.row().1
    }

    /// Seconds until the same request may succeed, where waiting is all that is needed.
    const fn retry_after_s(self) -> Option<u32> {
        match self {
            Self::IdempotencyInProgress | Self::StoreUnavailable => Some(1),
            Self::LimitReached => Some(10),
            _ => None,
        }
    }
}

/// One field that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct FieldError {
    /// Path of the field in the JSON body (`to.client`), or the name of a parameter or header.
    #[schema(example = "to.client")]
    pub field: Cow<'static, str>,
    /// What is wrong with it and what would be right.
    #[schema(example = "must not be empty")]
    pub detail: String,
}

/// A problem document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    kind: ProblemKind,
    detail: String,
    errors: Vec<FieldError>,
    state: Option<&'static str>,
}

/// `application/problem+json` (RFC 9457).
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct Document<'a> {
    /// Identifies the kind of problem; compare it as a whole.
    #[serde(rename = "type")]
    #[schema(example = "urn:moorline:problem:invalid-request")]
    kind: &'static str,
    /// The kind in words.
    #[schema(example = "The request is not valid")]
    title: &'static str,
    /// The HTTP status.
    #[schema(example = 400)]
    status: u16,
    /// What happened this time, for a person.
    #[schema(example = "to.client must not be empty")]
    detail: &'a str,
    /// Each wrong field.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
    /// Where the delayed job stands that the request is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
}

impl Problem {
    /// A problem of `kind`.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            detail: detail.into(),
            errors: Vec::new(),
            state: None,
        }
    }

    /// The same, of a job in this state.
    pub(crate) fn with_state(self, state: &'static str) -> Self {
        Self {
            state: Some(state),
            ..self
        }
    }

    /// A problem of `kind` with one field.
    pub fn field(
        kind: ProblemKind,
        field: impl Into<Cow<'static, str>>,
        detail: impl Into<String>,
    ) -> Self {
        Self::fields(
            kind,
            vec![FieldError {
                field: field.into(),
                detail: detail.into(),
            }],
        )
    }

    /// A problem of `kind` with several fields; the detail repeats the first.
    pub fn fields(kind: ProblemKind, errors: Vec<FieldError>) -> Self {
        let detail = match errors.as_slice() {
            [] => String::new(),
            [one] => format!("{} {}", one.field, one.detail),
            [first, rest @ ..] => {
                format!("{} {} (and {} more)", first.field, first.detail, rest.len())
            }
        };
        Self {
            kind,
            detail,
            errors,
            state: None,
        }
    }

    fn document(&self) -> Document<'_> {
        let (kind, status, title) = self.kind.row();
        Document {
            kind,
            title,
            status: status.as_u16(),
            detail: &self.detail,
            errors: &self.errors,
            state: self.state,
        }
    }

    /// The document as a part of another answer.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self.document()).unwrap_or_default()
    }

    /// Which problem.
    pub fn kind(&self) -> ProblemKind {
        self.kind
    }

    /// What happened, for a person.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The wrong fields.
    pub fn errors(&self) -> &[FieldError] {
        &self.errors
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::new(
                ProblemKind::StoreUnavailable,
                format!("{error}; nothing was stored"),
            ),
            StoreError::Full(detail) | StoreError::Quota(detail) => {
                Self::new(ProblemKind::LimitReached, detail)
            }
            StoreError::Stale { .. } | StoreError::Damaged(_) => {
                tracing::error!(%error, "a request failed");
                Self::new(ProblemKind::Internal, error.to_string())
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = self.kind.status();
        let body =
            serde_json::to_vec(&self.document()).expect("a problem has only text and numbers");
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(seconds) = self.kind.retry_after_s() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.kind == ProblemKind::Unauthorized {
            headers.insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Bearer realm=\"moorline\""),
            );
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detail_names_the_first_field_and_counts_the_rest() {
        let error = |field: &'static str| FieldError {
            field: field.into(),
            detail: "is bad".into(),
        };
        let one = Problem::fields(ProblemKind::InvalidRequest, vec![error("qos")]);
        assert_eq!(one.detail, "qos is bad");
        let two = Problem::fields(
            ProblemKind::InvalidRequest,
            vec![error("qos"), error("ttl")],
        );
        assert_eq!(two.detail, "qos is bad (and 1 more)");
    }

    #[test]
    fn waiting_is_advised_where_waiting_helps_and_only_there() {
        let advised = |kind| {
            Problem::new(kind, "")
                .into_response()
                .headers()
                .contains_key(header::RETRY_AFTER)
        };
        assert!(advised(ProblemKind::StoreUnavailable));
        assert!(advised(ProblemKind::LimitReached));
        assert!(!advised(ProblemKind::InvalidRequest));
        assert!(!advised(ProblemKind::IdempotencyConflict));
    }
}
