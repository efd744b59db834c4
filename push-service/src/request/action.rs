//! What a delayed job may do, and whom it may ask or tell.
//!
//! An action is kept as the JSON that asked for it, and read by the same functions again when it is due: what was accepted
//! means the same then. See `calls` for what is in one, and [`crate::delayed`] for what comes of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use moorline_router::{ActionKind, JobAction};
use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{
    Cow, Deserializer, Errors, Fields, FieldsVisitor, Problem, ProblemKind, Push, compact, kind_of,
    note_strangers,
};
use crate::delayed::{AmqpPublish, Check, DelayRules, Webhook};

/// Actions of one job.
const ACTIONS_MAX: usize = 16;

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
    pub(super) url: Option<&'a RawValue>,
    /// `POST` (default), `PUT`, `PATCH` or `DELETE`.
    #[schema(value_type = String, required = false)]
    pub(super) method: Option<&'a RawValue>,
    /// Further headers.
    #[schema(value_type = BTreeMap<String, String>, required = false)]
    pub(super) headers: Option<&'a RawValue>,
    /// Text is sent as it is; other JSON is sent as compact JSON. Where there is none, the id and the time of the job.
    #[schema(value_type = serde_json::Value, required = false)]
    pub(super) body: Option<&'a RawValue>,
    /// Any bytes, as standard base64 with padding.
    #[schema(value_type = String, required = false)]
    pub(super) body_base64: Option<&'a RawValue>,
    /// Of the body.
    #[schema(value_type = String, required = false)]
    pub(super) content_type: Option<&'a RawValue>,
    /// The type of the CloudEvent; `moorline.delay.due` where none is given.
    #[schema(value_type = String, required = false)]
    pub(super) r#type: Option<&'a RawValue>,
    #[schema(ignore)]
    pub(super) unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    pub(super) repeated: Vec<&'static str>,
}

/// A message to an exchange of RabbitMQ. It fails where no queue takes it.
#[derive(Default, ToSchema)]
pub(crate) struct AmqpRequest<'a> {
    /// Empty for the default exchange, where the routing key names a queue.
    #[schema(value_type = String)]
    pub(super) exchange: Option<&'a RawValue>,
    /// At most 255 bytes.
    #[schema(value_type = String)]
    pub(super) routing_key: Option<&'a RawValue>,
    /// Text is sent as it is; other JSON is sent as compact JSON. Where there is none, the id and the time of the job.
    #[schema(value_type = serde_json::Value, required = false)]
    pub(super) body: Option<&'a RawValue>,
    /// Any bytes, as standard base64 with padding.
    #[schema(value_type = String, required = false)]
    pub(super) body_base64: Option<&'a RawValue>,
    /// Of the body.
    #[schema(value_type = String, required = false)]
    pub(super) content_type: Option<&'a RawValue>,
    /// Headers of the message, as text.
    #[schema(value_type = BTreeMap<String, String>, required = false)]
    pub(super) headers: Option<&'a RawValue>,
    #[schema(ignore)]
    pub(super) unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    pub(super) repeated: Vec<&'static str>,
}

/// A GET that says whether there is anything to do: 2xx with the body `{"fire": false}` ends the job as `skipped`, any other 2xx
/// lets it fire, everything else is tried again like an action.
#[derive(Default, ToSchema)]
pub(crate) struct CheckRequest<'a> {
    /// `http://…` or `https://…`
    #[schema(value_type = String)]
    pub(super) url: Option<&'a RawValue>,
    /// Further headers.
    #[schema(value_type = BTreeMap<String, String>, required = false)]
    pub(super) headers: Option<&'a RawValue>,
    #[schema(ignore)]
    pub(super) unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    pub(super) repeated: Vec<&'static str>,
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

impl Errors {
    /// The wrong fields of something that stands at `field`.
    pub(super) fn add_of(&mut self, field: &str, problem: &Problem) {
        if problem.errors().is_empty() {
            self.add(field.to_owned(), problem.detail());
        }
        for error in problem.errors() {
            self.add(format!("{field}.{}", error.field), error.detail.clone());
        }
    }

    /// The value where nothing was wrong.
    pub(super) fn finish<T>(self, value: T) -> Result<T, Problem> {
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
