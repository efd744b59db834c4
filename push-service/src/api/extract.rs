//! What handlers take from a request. Every rejection is a problem that names what was wrong.

use std::marker::PhantomData;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::BytesMut;
use futures_util::StreamExt as _;
use moorline_router::{ClientId, MessageId, Position, duration};

use super::Api;
use crate::keys::Scope;
use crate::problem::{FieldError, Problem, ProblemKind};

/// A scope as a type, so that a handler's signature says what its caller must be allowed.
pub(super) trait Required: Send + Sync {
    const SCOPE: Scope;
}

macro_rules! scopes {
    ($($name:ident),+) => {
        $(pub(super) enum $name {}
        impl Required for $name {
            const SCOPE: Scope = Scope::$name;
        })+
    };
}
scopes!(Push, Read, Admin, Upstream, Delay);

/// Whoever called, allowed the scope `S`.
pub(super) struct Caller<S> {
    /// The key's name.
    pub(super) name: String,
    scope: PhantomData<S>,
}

impl<S: Required> FromRequestParts<Arc<Api>> for Caller<S> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let key = api.keys.authorize(&parts.headers, S::SCOPE)?;
        Ok(Self {
            name: key.name().to_owned(),
            scope: PhantomData,
        })
    }
}

/// A request body that is JSON, within the limit.
pub(super) struct JsonBody(pub(super) Bytes);

impl FromRequest<Arc<Api>> for JsonBody {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Arc<Api>) -> Result<Self, Problem> {
        check_content_type(request.headers())?;
        let limit = api.config.request_timeout;
        let body = read_body(request.into_body(), api.config.body_bytes_max);
        let body = tokio::time::timeout(limit, body)
            .await
            .unwrap_or_else(|_| {
                let detail = format!("the body did not arrive within {limit:?}");
                Err(Problem::new(ProblemKind::InvalidRequest, detail))
            })?;
        Ok(Self(body))
    }
}

/// Bytes beyond the limit that are read and forgotten, and how long that may take: a caller that is
/// still sending gets to read why it should not have, where closing at once would reset its
/// connection.
const FORGOTTEN_BYTES_MAX: usize = 16 << 20;
const FORGETTING_TIMEOUT: Duration = Duration::from_secs(5);

async fn read_body(body: Body, limit: usize) -> Result<Bytes, Problem> {
    let mut chunks = body.into_data_stream();
    let mut read = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| {
            let detail = format!("the body cannot be read: {error}");
            Problem::new(ProblemKind::InvalidRequest, detail)
        })?;
        if read.len() + chunk.len() > limit {
            drop(read);
            forget(chunks).await;
            let detail = format!("the body must be at most {limit} bytes");
            return Err(Problem::new(ProblemKind::PayloadTooLarge, detail));
        }
        read.extend_from_slice(&chunk);
    }
    Ok(read.freeze())
}

async fn forget(mut chunks: BodyDataStream) {
    let all = async {
        let mut forgotten = 0;
        while let Some(Ok(chunk)) = chunks.next().await {
            forgotten += chunk.len();
            if forgotten > FORGOTTEN_BYTES_MAX {
                return;
            }
        }
    };
    // Past either bound the caller is closed on, whatever it gets to read.
    let _ = tokio::time::timeout(FORGETTING_TIMEOUT, all).await;
}

/// A form type is taken for JSON: it is what `curl -d` sends when nobody says otherwise.
fn check_content_type(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return Ok(());
    };
    let essence = value
        .to_str()
        .unwrap_or("")
        .split(';')
        .next()
        .unwrap_or("")
        .trim();
    let essence = essence.to_ascii_lowercase();
    match essence.as_str() {
        "application/json" | "application/x-ndjson" | "application/x-www-form-urlencoded" => Ok(()),
        other if other.starts_with("application/") && other.ends_with("+json") => Ok(()),
        other => {
            let detail = format!("the Content-Type is {other:?}, must be \"application/json\"");
            Err(Problem::new(ProblemKind::UnsupportedMediaType, detail))
        }
    }
}

/// The one variable segment of a path, percent-decoded: `car%2F7` is the id `car/7`.
pub(super) struct PathId<T>(pub(super) T);

/// What a path may name.
pub(super) trait Named: Sized {
    fn parse_name(text: &str) -> Result<Self, String>;
}

impl Named for ClientId {
    fn parse_name(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
}

impl Named for MessageId {
    fn parse_name(text: &str) -> Result<Self, String> {
        Self::parse(text).map_err(|error| error.to_string())
    }
}

impl Named for String {
    fn parse_name(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
}

impl<T: Named> FromRequestParts<Arc<Api>> for PathId<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let invalid = |detail: String| Problem::field(ProblemKind::InvalidRequest, "id", detail);
        let Path(text) = Path::<String>::from_request_parts(parts, api)
            .await
            .map_err(|_| invalid("must be UTF-8, percent-encoded".into()))?;
        T::parse_name(&text).map(Self).map_err(invalid)
    }
}

/// The parameters after the question mark, taken one by one; what is left over is an error.
pub(super) struct Params {
    pairs: Vec<(String, String)>,
    known: Vec<&'static str>,
    errors: Vec<FieldError>,
}

impl FromRequestParts<Arc<Api>> for Params {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<Api>) -> Result<Self, Problem> {
        let Query(pairs) = Query::try_from_uri(&parts.uri).map_err(|error| {
            Problem::new(
                ProblemKind::InvalidRequest,
                format!("the query cannot be read: {error}"),
            )
        })?;
        Ok(Self {
            pairs,
            known: Vec::new(),
            errors: Vec::new(),
        })
    }
}

impl Params {
    pub(super) fn text(&mut self, name: &'static str) -> Option<String> {
        self.known.push(name);
        let at = self.pairs.iter().position(|(given, _)| given == name)?;
        let (_, value) = self.pairs.swap_remove(at);
        if self.pairs.iter().any(|(given, _)| given == name) {
            self.wrong(name, "is given twice");
        }
        Some(value)
    }

    pub(super) fn wrong(&mut self, name: &'static str, detail: impl Into<String>) {
        self.errors.push(FieldError {
            field: name.into(),
            detail: detail.into(),
        });
    }

    pub(super) fn read<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        let text = self.text(name)?;
        read(&text).map_err(|detail| self.wrong(name, detail)).ok()
    }

    /// Notes that `name` must be there, if nothing else is wrong with it.
    pub(super) fn require(&mut self, name: &'static str, detail: &str) {
        if !self.errors.iter().any(|error| error.field == name) {
            self.wrong(name, detail);
        }
    }

    /// Entries of one page.
    pub(super) fn limit(&mut self, max: usize) -> usize {
        let expected = || format!("must be a whole number from 1 to {max}");
        self.read("limit", |text| match usize::from_str(text) {
            Ok(limit) if (1..=max).contains(&limit) => Ok(limit),
            _ => Err(expected()),
        })
        .unwrap_or_else(|| max.min(100))
    }

    pub(super) fn flag(&mut self, name: &'static str) -> Option<bool> {
        self.read(name, |text| {
            bool::from_str(text).map_err(|_| "must be true or false".to_owned())
        })
    }

    pub(super) fn id<T: Named>(&mut self, name: &'static str) -> Option<T> {
        self.read(name, T::parse_name)
    }

    pub(super) fn cursor(&mut self, name: &'static str) -> Option<Position> {
        self.read(name, |text| {
            parse_cursor(text).ok_or_else(|| CURSOR_EXPECTED.to_owned())
        })
    }

    pub(super) fn wait(&mut self, max: Duration) -> Duration {
        self.read("wait", |text| match duration::parse(text) {
            Ok(wait) if wait <= max => Ok(wait),
            Ok(_) => Err(format!("must be at most {}", duration::format(max))),
            Err(error) => Err(error.to_string()),
        })
        .unwrap_or_default()
    }

    /// To be called when everything known has been taken.
    pub(super) fn finish(mut self) -> Result<(), Problem> {
        let known = self.known.join(", ");
        for (name, _) in std::mem::take(&mut self.pairs) {
            // A known one that is left over was given twice, which has been noted.
            if !self.known.contains(&name.as_str()) {
                let detail = format!("is not a known parameter; there are: {known}");
                self.errors.push(FieldError {
                    field: name.into(),
                    detail,
                });
            }
        }
        if self.errors.is_empty() {
            return Ok(());
        }
        Err(Problem::fields(ProblemKind::InvalidRequest, self.errors))
    }
}

pub(super) const CURSOR_EXPECTED: &str = "must be a cursor as an earlier answer gave it";

/// A position as callers see it; they are not to look into it.
pub(super) fn cursor(position: Position) -> String {
    format!("{}-{}", position.generation, position.sequence)
}

pub(super) fn parse_cursor(text: &str) -> Option<Position> {
    let (generation, sequence) = text.split_once('-')?;
    Some(Position {
        generation: generation.parse().ok()?,
        sequence: sequence.parse().ok()?,
    })
}
