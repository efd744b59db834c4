//! What a delayed job may do, and whom it may ask or tell.
//!
//! An action is kept as the JSON that asked for it, and read by the same functions again when it is due: what was accepted
//! means the same then. See [`crate::delayed`] for what comes of it.

use std::collections::BTreeMap;

use axum::http::{HeaderName, HeaderValue, Uri};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use moorline_router::{ActionKind, JobAction};
use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{
    Cow, Deserializer, Errors, Fields, FieldsVisitor, Pairs, Problem, ProblemKind, Push, compact,
    kind_of, malformed, note_strangers, read_content_type, read_text, shown,
};
use crate::delayed::{AmqpPublish, Check, DelayRules, Webhook};

/// Actions of one job.
const ACTIONS_MAX: usize = 16;
/// Bytes of a URL.
const URL_BYTES_MAX: usize = 2_048;
/// Headers of one call, and bytes of one value.
const HEADERS_MAX: usize = 32;
const HEADER_BYTES_MAX: usize = 4_096;
/// What AMQP can carry as a short string.
const SHORT_BYTES_MAX: usize = 255;
/// Headers that every call has of its own.
const OWN_HEADERS: [&str; 6] = [
    "content-length",
    "content-type",
    "host",
    "transfer-encoding",
    "connection",
    "traceparent",
];
const OWN_PREFIXES: [&str; 2] = ["webhook-", "ce-"];

/// Exactly one of these.
#[derive(Default, serde::Serialize, ToSchema)]
pub(crate) struct ActionRequest<'a> {
    /// A push, as `POST /v1/push` takes it.
    #[schema(value_type = super::PushRequest<'static>, required = false)]
    push: Option<&'a RawValue>,
    /// A call to a backend.
    #[schema(value_type = WebhookRequest<'static>, required = false)]
    webhook: Option<&'a RawValue>,
    /// A message to an exchange of RabbitMQ.
    #[schema(value_type = AmqpRequest<'static>, required = false)]
    amqp: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// A call to a backend: a CloudEvent in binary mode, signed as Standard Webhooks says where `delays.webhook_secret` is configured.
#[derive(Default, ToSchema)]
pub(crate) struct WebhookRequest<'a> {
    /// `http://…` or `https://…`
    #[schema(value_type = String, example = "https://shop.example/orders/123/cancel")]
    url: Option<&'a RawValue>,
    /// `POST` (default), `PUT`, `PATCH` or `DELETE`.
    #[schema(value_type = String, required = false)]
    method: Option<&'a RawValue>,
    /// Further headers.
    #[schema(value_type = BTreeMap<String, String>, required = false)]
    headers: Option<&'a RawValue>,
    /// Text is sent as it is; other JSON is sent as compact JSON. Where there is none, the id and the time of the job.
    #[schema(value_type = serde_json::Value, required = false)]
    body: Option<&'a RawValue>,
    /// Any bytes, as standard base64 with padding.
    #[schema(value_type = String, required = false)]
    body_base64: Option<&'a RawValue>,
    /// Of the body.
    #[schema(value_type = String, required = false)]
    content_type: Option<&'a RawValue>,
    /// The type of the CloudEvent; `moorline.delay.due` where none is given.
    #[schema(value_type = String, required = false)]
    r#type: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// A message to an exchange of RabbitMQ. It fails where no queue takes it.
#[derive(Default, ToSchema)]
pub(crate) struct AmqpRequest<'a> {
    /// Empty for the default exchange, where the routing key names a queue.
    #[schema(value_type = String)]
    exchange: Option<&'a RawValue>,
    /// At most 255 bytes.
    #[schema(value_type = String)]
    routing_key: Option<&'a RawValue>,
    /// Text is sent as it is; other JSON is sent as compact JSON. Where there is none, the id and the time of the job.
    #[schema(value_type = serde_json::Value, required = false)]
    body: Option<&'a RawValue>,
    /// Any bytes, as standard base64 with padding.
    #[schema(value_type = String, required = false)]
    body_base64: Option<&'a RawValue>,
    /// Of the body.
    #[schema(value_type = String, required = false)]
    content_type: Option<&'a RawValue>,
    /// Headers of the message, as text.
    #[schema(value_type = BTreeMap<String, String>, required = false)]
    headers: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// A GET that says whether there is anything to do: 2xx with the body `{"fire": false}` ends the job as `skipped`, any other 2xx
/// lets it fire, everything else is tried again like an action.
#[derive(Default, ToSchema)]
pub(crate) struct CheckRequest<'a> {
    /// `http://…` or `https://…`
    #[schema(value_type = String)]
    url: Option<&'a RawValue>,
    /// Further headers.
    #[schema(value_type = BTreeMap<String, String>, required = false)]
    headers: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// Who is told of the end of a job: exactly one of these. The body says which job and how it ended, unless another is given.
#[derive(Default, ToSchema)]
pub(crate) struct NotifyRequest<'a> {
    /// A call to a backend.
    #[schema(value_type = WebhookRequest<'static>, required = false)]
    webhook: Option<&'a RawValue>,
    /// A message to an exchange of RabbitMQ.
    #[schema(value_type = AmqpRequest<'static>, required = false)]
    amqp: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

fields!(
    ActionRequest,
    "an object like {\"webhook\": {\"url\": \"https://…\"}}, with push, webhook or amqp",
    push,
    webhook,
    amqp
);
fields!(
    AmqpRequest,
    "an object like {\"exchange\": \"orders\", \"routing_key\": \"order.due\"}",
    exchange,
    routing_key,
    body,
    body_base64,
    content_type,
    headers
);
fields!(
    CheckRequest,
    "an object like {\"url\": \"https://…\"}",
    url,
    headers
);
fields!(
    NotifyRequest,
    "an object like {\"webhook\": {\"url\": \"https://…\"}}, with webhook or amqp",
    webhook,
    amqp
);

// By hand: one of the fields is a word of the language.
impl<'a> Fields<'a> for WebhookRequest<'a> {
    const EXPECTED: &'static str = "an object like {\"url\": \"https://…\"}";

    fn slot(&mut self, key: &str) -> Option<(&'static str, &mut Option<&'a RawValue>)> {
        match key {
            "url" => Some(("url", &mut self.url)),
            "method" => Some(("method", &mut self.method)),
            "headers" => Some(("headers", &mut self.headers)),
            "body" => Some(("body", &mut self.body)),
            "body_base64" => Some(("body_base64", &mut self.body_base64)),
            "content_type" => Some(("content_type", &mut self.content_type)),
            "type" => Some(("type", &mut self.r#type)),
            _ => None,
        }
    }
    fn unknown(&mut self) -> &mut Vec<Cow<'a, str>> {
        &mut self.unknown
    }
    fn repeated(&mut self) -> &mut Vec<&'static str> {
        &mut self.repeated
    }
}

impl<'de> Deserialize<'de> for WebhookRequest<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(FieldsVisitor(std::marker::PhantomData))
    }
}

/// The actions of a job, as far as they can be read.
#[derive(Default)]
pub(super) struct Actions {
    pub(super) actions: Vec<JobAction>,
    /// Something is larger than it may be.
    pub(super) too_large: bool,
}

/// One or a list.
pub(super) fn read_actions(
    errors: &mut Errors,
    raw: Option<&RawValue>,
    rules: &DelayRules<'_>,
) -> Actions {
    let mut read = Actions::default();
    let Some(raw) = raw else {
        let expected = ActionRequest::EXPECTED;
        errors.add(
            "action",
            format!("is required: {expected}, or a list of such"),
        );
        return read;
    };
    let Ok(list) = serde_json::from_str::<Vec<&RawValue>>(raw.get()) else {
        read_action(errors, "action", raw, rules, &mut read);
        return read;
    };
    if !(1..=ACTIONS_MAX).contains(&list.len()) {
        let detail = format!("must be 1 to {ACTIONS_MAX} actions, are {}", list.len());
        errors.add("action", detail);
        return read;
    }
    for (at, raw) in list.into_iter().enumerate() {
        read_action(errors, &format!("action[{at}]"), raw, rules, &mut read);
    }
    read
}

fn read_action(
    errors: &mut Errors,
    field: &str,
    raw: &RawValue,
    rules: &DelayRules<'_>,
    to: &mut Actions,
) {
    let request: ActionRequest<'_> = match serde_json::from_str(raw.get()) {
        Ok(request) => request,
        Err(_) => {
            let expected = ActionRequest::EXPECTED;
            let detail = format!("must be {expected}, is {}", kind_of(raw));
            return errors.add(field.to_owned(), detail);
        }
    };
    let prefix = format!("{field}.");
    note_strangers(errors, &prefix, &request.unknown, &request.repeated, &[]);
    let given = [
        (ActionKind::Push, "push", request.push),
        (ActionKind::Webhook, "webhook", request.webhook),
        (ActionKind::Amqp, "amqp", request.amqp),
    ];
    let mut given = given
        .into_iter()
        .filter_map(|(kind, name, raw)| Some((kind, name, raw?)));
    let (Some((kind, name, raw)), None) = (given.next(), given.next()) else {
        return errors.add(field.to_owned(), "must name one of push, webhook and amqp");
    };
    let spec = compact(raw.get());
    let checked = match kind {
        ActionKind::Push => Push::from_json(&spec, rules.config, rules.device_topics).map(drop),
        ActionKind::Webhook => Webhook::from_json(&spec, rules.config.payload_bytes_max).map(drop),
        _ if !rules.amqp => {
            let detail = "is not possible here: set rabbitmq.url";
            return errors.add(format!("{field}.{name}"), detail);
        }
        _ => AmqpPublish::from_json(&spec, rules.config.payload_bytes_max).map(drop),
    };
    match checked {
        Ok(()) => to.actions.push(JobAction {
            kind,
            spec: spec.into(),
        }),
        Err(problem) => {
            to.too_large |= problem.kind() == ProblemKind::PayloadTooLarge;
            errors.add_of(&format!("{field}.{name}"), &problem);
        }
    }
}

/// The check as it is kept.
pub(super) fn read_check(errors: &mut Errors, raw: &RawValue) -> Option<Bytes> {
    let spec = compact(raw.get());
    match Check::from_json(&spec) {
        Ok(_) => Some(spec.into()),
        Err(problem) => {
            errors.add_of("check", &problem);
            None
        }
    }
}

/// Who is told of the end, as it is kept.
pub(crate) fn read_notify(
    errors: &mut Errors,
    fired: Option<&RawValue>,
    failed: Option<&RawValue>,
    rules: &DelayRules<'_>,
) -> Option<Bytes> {
    let mut kept = Vec::new();
    for (field, raw) in [("on_fired", fired), ("on_failed", failed)] {
        let Some(raw) = raw else { continue };
        if check_notify(errors, field, raw, rules).is_some() {
            kept.extend_from_slice(if kept.is_empty() { b"{\"" } else { b",\"" });
            kept.extend_from_slice(field.as_bytes());
            kept.extend_from_slice(b"\":");
            kept.extend_from_slice(&compact(raw.get()));
        }
    }
    if kept.is_empty() {
        return None;
    }
    kept.push(b'}');
    Some(kept.into())
}

fn check_notify(
    errors: &mut Errors,
    field: &'static str,
    raw: &RawValue,
    rules: &DelayRules<'_>,
) -> Option<()> {
    let Ok(request) = serde_json::from_str::<NotifyRequest<'_>>(raw.get()) else {
        let expected = NotifyRequest::EXPECTED;
        errors.add(field, format!("must be {expected}, is {}", kind_of(raw)));
        return None;
    };
    let prefix = format!("{field}.");
    note_strangers(errors, &prefix, &request.unknown, &request.repeated, &[]);
    let max = rules.config.payload_bytes_max;
    let (name, checked) = match (request.webhook, request.amqp) {
        (Some(raw), None) => (
            "webhook",
            Webhook::from_json(raw.get().as_bytes(), max).map(drop),
        ),
        (None, Some(_)) if !rules.amqp => {
            errors.add(
                format!("{field}.amqp"),
                "is not possible here: set rabbitmq.url",
            );
            return None;
        }
        (None, Some(raw)) => (
            "amqp",
            AmqpPublish::from_json(raw.get().as_bytes(), max).map(drop),
        ),
        _ => {
            errors.add(field, "must name one of webhook and amqp");
            return None;
        }
    };
    checked
        .map_err(|problem| errors.add_of(&format!("{field}.{name}"), &problem))
        .ok()
}

/// Who is told of the end: the JSON that [`read_notify`] keeps, as actions.
pub(crate) fn notify_actions(
    kept: &[u8],
) -> Result<(Option<JobAction>, Option<JobAction>), String> {
    let damaged =
        |error: serde_json::Error| format!("on_fired and on_failed cannot be read: {error}");
    let fields: BTreeMap<String, &RawValue> = serde_json::from_slice(kept).map_err(damaged)?;
    let action = |field: &str| -> Result<Option<JobAction>, String> {
        let Some(raw) = fields.get(field) else {
            return Ok(None);
        };
        let request: NotifyRequest<'_> = serde_json::from_str(raw.get()).map_err(damaged)?;
        let given = [
            (ActionKind::Webhook, request.webhook),
            (ActionKind::Amqp, request.amqp),
        ];
        Ok(given.into_iter().find_map(|(kind, raw)| {
            let spec = Bytes::copy_from_slice(raw?.get().as_bytes());
            Some(JobAction { kind, spec })
        }))
    };
    Ok((action("on_fired")?, action("on_failed")?))
}

impl Webhook {
    /// Reads the JSON of a webhook action; the problem names every wrong field.
    pub(crate) fn from_json(json: &[u8], bytes_max: usize) -> Result<Self, Problem> {
        let request: WebhookRequest<'_> =
            serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let url = errors.keep("url", read_url(request.url));
        let method = request.method.and_then(|raw| {
            let method = match read_text(raw).as_deref() {
                Ok("POST") => Ok("POST"),
                Ok("PUT") => Ok("PUT"),
                Ok("PATCH") => Ok("PATCH"),
                Ok("DELETE") => Ok("DELETE"),
                _ => Err(format!(
                    "must be \"POST\", \"PUT\", \"PATCH\" or \"DELETE\", is {}",
                    shown(raw)
                )),
            };
            errors.keep("method", method)
        });
        let headers = read_headers(&mut errors, request.headers);
        let body = read_body(&mut errors, request.body, request.body_base64, bytes_max);
        let content_type = request
            .content_type
            .and_then(|raw| errors.keep("content_type", read_content_type(raw)));
        let kind = request.r#type.and_then(|raw| {
            let kind = read_text(raw).and_then(|text| match text.len() {
                1..=SHORT_BYTES_MAX if !text.chars().any(char::is_control) => Ok(text.into_owned()),
                _ => Err(format!("must be text of 1 to {SHORT_BYTES_MAX} bytes")),
            });
            errors.keep("type", kind)
        });
        let Some(url) = errors.finish(url)? else {
            unreachable!("without a URL there is an error");
        };
        Ok(Self {
            url,
            method: method.unwrap_or("POST"),
            headers,
            content_type: content_type
                .map(|text| text.to_string())
                .or_else(|| body.as_ref().and_then(Body::content_type)),
            body: body.map(|body| body.bytes),
            kind,
        })
    }
}

impl AmqpPublish {
    /// Reads the JSON of an AMQP action; the problem names every wrong field.
    pub(crate) fn from_json(json: &[u8], bytes_max: usize) -> Result<Self, Problem> {
        let request: AmqpRequest<'_> = serde_json::from_slice(json).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let mut name = |field: &'static str, raw: Option<&RawValue>| {
            let text = raw.ok_or_else(|| "is required".to_owned());
            let text = text.and_then(|raw| match read_text(raw)? {
                text if text.len() > SHORT_BYTES_MAX => {
                    Err(format!("must be at most {SHORT_BYTES_MAX} bytes long"))
                }
                text => Ok(text.into_owned()),
            });
            errors.keep(field, text).unwrap_or_default()
        };
        let exchange = name("exchange", request.exchange);
        let routing_key = name("routing_key", request.routing_key);
        let headers = read_headers(&mut errors, request.headers);
        let body = read_body(&mut errors, request.body, request.body_base64, bytes_max);
        let content_type = request
            .content_type
            .and_then(|raw| errors.keep("content_type", read_content_type(raw)));
        errors.finish(Some(()))?;
        Ok(Self {
            exchange,
            routing_key,
            headers,
            content_type: content_type
                .map(|text| text.to_string())
                .or_else(|| body.as_ref().and_then(Body::content_type)),
            body: body.map(|body| body.bytes),
        })
    }
}

impl Check {
    /// Reads the JSON of a check; the problem names every wrong field.
    pub(crate) fn from_json(json: &[u8]) -> Result<Self, Problem> {
        let request: CheckRequest<'_> = serde_json::from_slice(json).map_err(|_| {
            let detail = format!("must be {}", CheckRequest::EXPECTED);
            Problem::new(ProblemKind::InvalidRequest, detail)
        })?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let url = errors.keep("url", read_url(request.url));
        let headers = read_headers(&mut errors, request.headers);
        match errors.finish(url)? {
            Some(url) => Ok(Self { url, headers }),
            None => unreachable!("without a URL there is an error"),
        }
    }
}

impl Errors {
    /// The wrong fields of something that stands at `field`.
    fn add_of(&mut self, field: &str, problem: &Problem) {
        if problem.errors().is_empty() {
            self.add(field.to_owned(), problem.detail());
        }
        for error in problem.errors() {
            self.add(format!("{field}.{}", error.field), error.detail.clone());
        }
    }

    /// The value where nothing was wrong.
    fn finish<T>(self, value: T) -> Result<T, Problem> {
        match self.0.is_empty() {
            true => Ok(value),
            false => {
                let only_large = self
                    .0
                    .iter()
                    .all(|error| error.detail.starts_with("is too large"));
                let kind = match only_large {
                    true => ProblemKind::PayloadTooLarge,
                    false => ProblemKind::InvalidRequest,
                };
                Err(Problem::fields(kind, self.0))
            }
        }
    }
}

fn read_url(raw: Option<&RawValue>) -> Result<String, String> {
    let text = read_text(raw.ok_or("is required: http://… or https://…")?)?;
    if text.len() > URL_BYTES_MAX {
        return Err(format!("must be at most {URL_BYTES_MAX} bytes long"));
    }
    let url: Uri = text
        .parse()
        .map_err(|_| format!("must be like \"https://shop.example/orders\", is {text:?}"))?;
    let has_scheme = matches!(url.scheme_str(), Some("http" | "https"));
    let authority = url.authority().map(|authority| authority.as_str());
    match authority {
        Some(authority) if authority.contains('@') => {
            Err("must not hold a user name or password; use headers".into())
        }
        Some(_) if has_scheme && url.host().is_some_and(|host| !host.is_empty()) => {
            Ok(text.into_owned())
        }
        _ => Err(format!(
            "must begin with http:// or https:// and name a host, is {text:?}"
        )),
    }
}

fn read_headers(errors: &mut Errors, raw: Option<&RawValue>) -> Vec<(String, String)> {
    let Some(raw) = raw else { return Vec::new() };
    let Ok(Pairs(pairs)) = serde_json::from_str::<Pairs<'_>>(raw.get()) else {
        errors.add(
            "headers",
            format!("must be an object of texts, is {}", kind_of(raw)),
        );
        return Vec::new();
    };
    if pairs.len() > HEADERS_MAX {
        errors.add(
            "headers",
            format!("must be at most {HEADERS_MAX}, are {}", pairs.len()),
        );
        return Vec::new();
    }
    let mut headers = Vec::with_capacity(pairs.len());
    for (name, value) in pairs {
        match read_header(&name, value) {
            Ok(value) => headers.push((name.to_ascii_lowercase(), value)),
            Err(detail) => errors.add(format!("headers.{name}"), detail),
        }
    }
    headers
}

fn read_header(name: &str, value: &RawValue) -> Result<String, String> {
    let header = HeaderName::try_from(name).map_err(|_| "is not a header name".to_owned())?;
    let own = OWN_HEADERS.contains(&header.as_str())
        || OWN_PREFIXES
            .iter()
            .any(|prefix| header.as_str().starts_with(prefix));
    if own {
        return Err("is set by the gateway".into());
    }
    let value = read_text(value)?;
    if value.len() > HEADER_BYTES_MAX || HeaderValue::try_from(value.as_ref()).is_err() {
        return Err(format!(
            "must be text that a header can hold, of at most {HEADER_BYTES_MAX} bytes"
        ));
    }
    Ok(value.into_owned())
}

struct Body {
    bytes: Bytes,
    is_json: bool,
}

impl Body {
    fn content_type(&self) -> Option<String> {
        self.is_json.then(|| "application/json".to_owned())
    }
}

fn read_body(
    errors: &mut Errors,
    body: Option<&RawValue>,
    base64: Option<&RawValue>,
    bytes_max: usize,
) -> Option<Body> {
    let (field, read) = match (body, base64) {
        (None, None) => return None,
        (Some(_), Some(_)) => {
            errors.add("body_base64", "must not be given together with body");
            return None;
        }
        (Some(raw), None) => {
            let is_json = !raw.get().starts_with('"');
            let bytes = match is_json {
                true => Ok(Bytes::from(compact(raw.get()))),
                false => read_text(raw).map(|text| Bytes::from(text.into_owned())),
            };
            ("body", bytes.map(|bytes| Body { bytes, is_json }))
        }
        (None, Some(raw)) => {
            let bytes = read_text(raw).and_then(|text| {
                STANDARD
                    .decode(text.as_bytes())
                    .map_err(|e| format!("must be standard base64 with padding: {e}"))
            });
            let is_json = false;
            let body = bytes.map(|bytes| Body {
                bytes: bytes.into(),
                is_json,
            });
            ("body_base64", body)
        }
    };
    let read = read.and_then(|body| match body.bytes.len() {
        length if length > bytes_max => Err(format!(
            "is too large: {length} bytes, must be at most {bytes_max}"
        )),
        _ => Ok(body),
    });
    errors.keep(field, read)
}
