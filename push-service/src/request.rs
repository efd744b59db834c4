//! From the JSON of `POST /v1/push` to a [`Push`]: every rule about what a push may say.
//!
//! The body is scanned once: fields stay slices of it until each is read by the function that
//! knows what it must be. A wrong field is reported with its path and what would be right, all
//! wrong fields at once. Nothing is ignored: a field that is not known, or known but not
//! supported yet, is an error.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use moorline_mqtt::{ByteString, QoS, TopicName};
use moorline_router::{ClientId, duration};
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use crate::config::Config;
use crate::problem::{FieldError, Problem, ProblemKind};
use crate::push::{Push, Target};

/// The longest content type, in bytes.
const CONTENT_TYPE_BYTES_MAX: usize = 255;

const LATER: [&str; 2] = ["collapse_key", "priority"];
const LATER_TARGETS: [&str; 4] = ["clients", "user", "group", "all"];

/// One push.
#[derive(Default, ToSchema)]
pub(crate) struct PushRequest<'a> {
    /// To whom.
    #[schema(value_type = TargetRequest)]
    to: Option<&'a RawValue>,
    /// Where the message arrives; `d/{client}/push` where none is named. Only with `to.client`.
    #[schema(value_type = String, required = false, example = "d/car-7/orders")]
    topic: Option<&'a RawValue>,
    /// Text is sent as it is; other JSON is sent as compact JSON with the content type
    /// `application/json`. Either this or `payload_base64`.
    #[schema(value_type = serde_json::Value, required = false, example = json!({"order": 123}))]
    payload: Option<&'a RawValue>,
    /// Any bytes, as standard base64 with padding.
    #[schema(value_type = String, required = false)]
    payload_base64: Option<&'a RawValue>,
    /// 0: sent now or dropped; 1 (default) and 2: kept until the device has it.
    #[schema(value_type = u8, required = false, minimum = 0, maximum = 2, default = 1)]
    qos: Option<&'a RawValue>,
    /// How long the message may wait: `"250ms"`, `"15m"`, `"24h"`, `"7d"` or whole seconds. A push to a client
    /// waits 7 days where none is given (configurable); a push to a topic has no limit then.
    #[schema(value_type = TtlRequest, required = false)]
    ttl: Option<&'a RawValue>,
    /// MQTT 5.0 Content Type.
    #[schema(value_type = String, required = false, example = "application/json")]
    content_type: Option<&'a RawValue>,
    /// MQTT 5.0 user properties. `message-id` and `traceparent` are the gateway's own.
    #[schema(value_type = std::collections::BTreeMap<String, String>, required = false)]
    properties: Option<&'a RawValue>,
    /// Keep as the topic's retained message. Only with `to.topic`.
    #[schema(value_type = bool, required = false, default = false)]
    retain: Option<&'a RawValue>,
    /// Push later: after so long, up to 10 years. Makes a delayed job (`/v1/delays`).
    #[schema(value_type = TtlRequest, required = false)]
    delay: Option<&'a RawValue>,
    /// Push later: at this time, RFC 3339. Makes a delayed job (`/v1/delays`).
    #[schema(value_type = String, required = false, format = DateTime)]
    deliver_at: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// Exactly one of the two.
#[derive(Default, ToSchema)]
pub(crate) struct TargetRequest<'a> {
    /// A client id, connected or not.
    #[schema(value_type = String, required = false, example = "car-7")]
    client: Option<&'a RawValue>,
    /// A topic name: everyone who subscribes to it.
    #[schema(value_type = String, required = false)]
    topic: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

/// A duration with a unit, or whole seconds.
#[derive(serde::Serialize, ToSchema)]
#[allow(dead_code, reason = "describes the field to readers of the document")]
#[serde(untagged)]
pub(crate) enum TtlRequest {
    Text(String),
    Seconds(u64),
}

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// An object whose known fields are kept unread.
trait Fields<'a>: Default {
    const EXPECTED: &'static str;

    /// The slot of `key` with its name.
    fn slot(&mut self, key: &str) -> Option<(&'static str, &mut Option<&'a RawValue>)>;
    fn unknown(&mut self) -> &mut Vec<Cow<'a, str>>;
    fn repeated(&mut self) -> &mut Vec<&'static str>;
}

macro_rules! fields {
    ($type:ident, $expected:literal, $($field:ident),+) => {
        impl<'a> Fields<'a> for $type<'a> {
            const EXPECTED: &'static str = $expected;

            fn slot(&mut self, key: &str) -> Option<(&'static str, &mut Option<&'a RawValue>)> {
                match key {
                    $(stringify!($field) => Some((stringify!($field), &mut self.$field)),)+
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

        impl<'de> Deserialize<'de> for $type<'de> {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_map(FieldsVisitor(std::marker::PhantomData))
            }
        }
    };
}

// After the macro, which they use.
mod action;
mod calls;
mod delay;
mod event;
mod properties;

pub(crate) use action::notify_actions;
pub(crate) use delay::{
    DelayPatch, DelayRequest, NewDelay, PatchRequest, When, kind_name, parse_time,
};
pub(crate) use event::{EventRequest, NewEvent};
use properties::read_properties;

fields!(
    PushRequest,
    "an object like {\"to\": {\"client\": \"car-7\"}, \"payload\": \"hello\"}",
    to,
    topic,
    payload,
    payload_base64,
    qos,
    ttl,
    content_type,
    properties,
    retain,
    delay,
    deliver_at
);
fields!(
    TargetRequest,
    "an object like {\"client\": \"car-7\"}",
    client,
    topic
);

struct FieldsVisitor<T>(std::marker::PhantomData<T>);

impl<'de, T: Fields<'de>> Visitor<'de> for FieldsVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<T, A::Error> {
        let mut fields = T::default();
        while let Some(Key(key)) = map.next_key::<Key<'de>>()? {
            match fields.slot(&key) {
                Some((_, slot @ None)) => *slot = Some(map.next_value()?),
                Some((name, Some(_))) => {
                    map.next_value::<IgnoredAny>()?;
                    fields.repeated().push(name);
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                    fields.unknown().push(key);
                }
            }
        }
        Ok(fields)
    }
}

/// What is wrong so far.
#[derive(Default)]
struct Errors(Vec<FieldError>);

impl Errors {
    fn add(&mut self, field: impl Into<Cow<'static, str>>, detail: impl Into<String>) {
        self.0.push(FieldError {
            field: field.into(),
            detail: detail.into(),
        });
    }

    /// The value, or `None` with the error noted.
    fn keep<T>(&mut self, field: &'static str, result: Result<T, String>) -> Option<T> {
        result.map_err(|detail| self.add(field, detail)).ok()
    }
}

/// A push that is to be made later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PushLater {
    /// When.
    pub(crate) when: When,
    /// The push, as [`Push::from_json`] reads it then.
    pub(crate) spec: Bytes,
}

impl PushRequest<'_> {
    /// When it is to be made, if not now.
    fn when(&self, errors: &mut Errors) -> Option<When> {
        let raw = [("delay", self.delay), ("deliver_at", self.deliver_at)];
        if raw.iter().all(|(_, raw)| raw.is_none()) {
            return None;
        }
        delay::read_when(errors, raw)
    }

    /// The request without its time.
    fn spec(&self) -> Bytes {
        let fields = [
            ("to", self.to),
            ("topic", self.topic),
            ("payload", self.payload),
            ("payload_base64", self.payload_base64),
            ("qos", self.qos),
            ("ttl", self.ttl),
            ("content_type", self.content_type),
            ("properties", self.properties),
            ("retain", self.retain),
        ];
        let mut spec = Vec::new();
        for (name, raw) in fields {
            let Some(raw) = raw else { continue };
            spec.extend_from_slice(if spec.is_empty() { b"{\"" } else { b",\"" });
            spec.extend_from_slice(name.as_bytes());
            spec.extend_from_slice(b"\":");
            spec.extend_from_slice(&compact(raw.get()));
        }
        spec.push(b'}');
        spec.into()
    }
}

impl Push {
    /// Reads the body of a request; the problem names every wrong field.
    pub(crate) fn from_json(
        body: &[u8],
        config: &Config,
        device_topics: &str,
    ) -> Result<Self, Problem> {
        let request: PushRequest<'_> = serde_json::from_slice(body).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        for (name, given) in [("delay", request.delay), ("deliver_at", request.deliver_at)] {
            if given.is_some() {
                errors.add(name, "goes with POST /v1/push only");
            }
        }
        Self::read(&request, errors, config, device_topics)
    }

    /// As [`Self::from_json`], of a request that may ask for a push later.
    pub(crate) fn now_or_later(
        body: &[u8],
        config: &Config,
        device_topics: &str,
    ) -> Result<(Self, Option<PushLater>), Problem> {
        let request: PushRequest<'_> = serde_json::from_slice(body).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        let when = request.when(&mut errors);
        let push = Self::read(&request, errors, config, device_topics)?;
        let later = when.map(|when| PushLater {
            when,
            spec: request.spec(),
        });
        Ok((push, later))
    }

    fn read(
        request: &PushRequest<'_>,
        mut errors: Errors,
        config: &Config,
        device_topics: &str,
    ) -> Result<Self, Problem> {
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &LATER);
        let target = read_target(&mut errors, request.to);
        let topic = read_topic(&mut errors, target.as_ref(), request.topic, device_topics);
        let payload = read_payload(&mut errors, request.payload, request.payload_base64);
        let qos = request
            .qos
            .and_then(|raw| errors.keep("qos", read_qos(raw)));
        let ttl = request
            .ttl
            .and_then(|raw| errors.keep("ttl", read_ttl(raw, config.ttl_max)));
        let content_type = request
            .content_type
            .and_then(|raw| errors.keep("content_type", read_content_type(raw)));
        let properties = read_properties(&mut errors, request.properties);
        let retain = request
            .retain
            .and_then(|raw| errors.keep("retain", read::<bool>(raw, "true or false")));
        if retain.is_some() && matches!(target, Some(Target::Client(_))) {
            errors.add(
                "retain",
                "goes with to.topic only: a push to a client is kept until the device has it",
            );
        }
        let (Some(target), Some(topic), Some((payload, is_json)), true) =
            (target, topic, payload, errors.0.is_empty())
        else {
            return Err(Problem::fields(ProblemKind::InvalidRequest, errors.0));
        };
        if payload.len() > config.payload_bytes_max {
            let field = if request.payload.is_some() {
                "payload"
            } else {
                "payload_base64"
            };
            let detail = format!(
                "is {} bytes long, must be at most {} bytes",
                payload.len(),
                config.payload_bytes_max
            );
            return Err(Problem::field(ProblemKind::PayloadTooLarge, field, detail));
        }
        let json = is_json.then_some(ByteString::from_static("application/json"));
        let target = owner_of(target, &topic, device_topics);
        let ttl = ttl.or_else(|| matches!(target, Target::Client(_)).then_some(config.ttl_default));
        Ok(Self {
            target,
            topic,
            payload,
            qos: qos.unwrap_or(QoS::AtLeastOnce),
            ttl,
            content_type: content_type.or(json),
            properties,
            retain: retain.unwrap_or(false),
        })
    }
}

/// Text that is no JSON, or not an object.
pub(crate) fn malformed(error: &serde_json::Error) -> Problem {
    use serde_json::error::Category;
    let kind = match error.classify() {
        Category::Data => ProblemKind::InvalidRequest,
        Category::Syntax | Category::Eof | Category::Io => ProblemKind::MalformedJson,
    };
    let detail = if error.classify() == Category::Eof && error.column() == 0 {
        "the body is empty, must be a JSON object".to_owned()
    } else {
        format!("the body cannot be read: {error}")
    };
    Problem::new(kind, detail)
}

fn note_strangers(
    errors: &mut Errors,
    prefix: &str,
    unknown: &[Cow<'_, str>],
    repeated: &[&'static str],
    later: &[&str],
) {
    for name in unknown {
        let detail = if later.contains(&name.as_ref()) {
            "is not supported yet"
        } else {
            "is not a known field"
        };
        errors.add(format!("{prefix}{name}"), detail);
    }
    for name in repeated {
        errors.add(format!("{prefix}{name}"), "is given twice");
    }
}

/// What stands at a place, in the words of JSON.
fn kind_of(raw: &RawValue) -> &'static str {
    match raw.get().as_bytes().first() {
        Some(b'"') => "text",
        Some(b'{') => "an object",
        Some(b'[') => "an array",
        Some(b't' | b'f') => "a boolean",
        Some(b'n') => "null",
        _ => "a number",
    }
}

fn read<'a, T: Deserialize<'a>>(raw: &'a RawValue, expected: &str) -> Result<T, String> {
    serde_json::from_str(raw.get()).map_err(|_| format!("must be {expected}, is {}", shown(raw)))
}

/// The value itself where it is short, else its kind.
fn shown(raw: &RawValue) -> &str {
    if raw.get().len() <= 32 {
        raw.get()
    } else {
        kind_of(raw)
    }
}

fn read_text(raw: &RawValue) -> Result<Cow<'_, str>, String> {
    if !raw.get().starts_with('"') {
        return Err(format!("must be text, is {}", kind_of(raw)));
    }
    let Key(text) = serde_json::from_str(raw.get())
        .map_err(|_| "must be text without lone surrogates".to_owned())?;
    Ok(text)
}

fn read_target(errors: &mut Errors, to: Option<&RawValue>) -> Option<Target> {
    let Some(to) = to else {
        errors.add(
            "to",
            "is required: {\"client\": \"…\"} or {\"topic\": \"…\"}",
        );
        return None;
    };
    let request: TargetRequest<'_> = match serde_json::from_str(to.get()) {
        Ok(request) => request,
        Err(_) => {
            let expected = TargetRequest::EXPECTED;
            errors.add("to", format!("must be {expected}, is {}", kind_of(to)));
            return None;
        }
    };
    note_strangers(
        errors,
        "to.",
        &request.unknown,
        &request.repeated,
        &LATER_TARGETS,
    );
    match (request.client, request.topic) {
        (Some(raw), None) => {
            let client = read_text(raw)
                .and_then(|text| ClientId::parse(&text).map_err(|e| after_name(&e.to_string())));
            errors.keep("to.client", client).map(Target::Client)
        }
        (None, Some(raw)) => {
            let topic = errors.keep("to.topic", read_topic_name(raw))?;
            Some(Target::Topic(topic))
        }
        (Some(_), Some(_)) => {
            errors.add("to", "must name either a client or a topic, not both");
            None
        }
        (None, None) => {
            if request.unknown.is_empty() {
                errors.add("to", "must name a client or a topic");
            }
            None
        }
    }
}

/// `client id must not be empty` → `must not be empty`: the field has been named already.
fn after_name(error: &str) -> String {
    error
        .find("must ")
        .map_or(error, |at| &error[at..])
        .to_owned()
}

fn read_topic_name(raw: &RawValue) -> Result<TopicName, String> {
    let text = read_text(raw)?;
    if text.starts_with('$') {
        return Err("must not begin with $: such topics are reserved".into());
    }
    TopicName::parse(text.into_owned().into()).map_err(|error| error.to_string())
}

fn read_topic(
    errors: &mut Errors,
    target: Option<&Target>,
    topic: Option<&RawValue>,
    device_topics: &str,
) -> Option<TopicName> {
    match (target, topic) {
        (Some(Target::Topic(_)), Some(_)) => {
            errors.add(
                "topic",
                "goes with to.client only: to.topic says already where it arrives",
            );
            None
        }
        (Some(Target::Topic(name)), None) => Some(name.clone()),
        (_, Some(raw)) => errors.keep("topic", read_topic_name(raw)),
        (Some(Target::Client(client)), None) => {
            let name = format!("{device_topics}/{client}/push");
            let topic = TopicName::parse(name.into()).map_err(|error| {
                format!("is required here, as the client id cannot stand in a topic name: {error}")
            });
            errors.keep("topic", topic)
        }
        (None, None) => None,
    }
}

/// A topic of one device is a push to that device.
fn owner_of(target: Target, topic: &TopicName, device_topics: &str) -> Target {
    let owner = match &target {
        Target::Client(_) => None,
        Target::Topic(_) => topic
            .as_str()
            .strip_prefix(device_topics)
            .and_then(|rest| rest.strip_prefix('/'))
            .and_then(|rest| rest.split('/').next())
            .and_then(|owner| ClientId::parse(owner).ok()),
    };
    owner.map_or(target, Target::Client)
}

/// The bytes, and whether they are JSON that was given as such.
fn read_payload(
    errors: &mut Errors,
    payload: Option<&RawValue>,
    base64: Option<&RawValue>,
) -> Option<(Bytes, bool)> {
    match (payload, base64) {
        (Some(_), Some(_)) => {
            errors.add("payload_base64", "must not be given together with payload");
            None
        }
        (None, None) => {
            errors.add("payload", "is required (or payload_base64)");
            None
        }
        (Some(raw), None) => {
            let payload = match raw.get().as_bytes().first() {
                Some(b'"') => read_text(raw).map(|text| (Bytes::from(text.into_owned()), false)),
                Some(b'n') => Err("must not be null: write \"\" for an empty message".into()),
                _ => Ok((Bytes::from(compact(raw.get())), true)),
            };
            errors.keep("payload", payload)
        }
        (None, Some(raw)) => {
            let payload = read_text(raw).and_then(|text| {
                STANDARD
                    .decode(text.as_bytes())
                    .map_err(|e| format!("must be standard base64 with padding: {e}"))
            });
            errors
                .keep("payload_base64", payload)
                .map(|bytes| (Bytes::from(bytes), false))
        }
    }
}

/// Valid JSON without the white space between its tokens.
fn compact(json: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let (mut in_text, mut escaped) = (false, false);
    for byte in json.bytes() {
        if in_text {
            in_text = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
        } else if byte.is_ascii_whitespace() {
            continue;
        } else {
            in_text = byte == b'"';
        }
        out.push(byte);
    }
    out
}

fn read_qos(raw: &RawValue) -> Result<QoS, String> {
    match raw.get() {
        "0" => Ok(QoS::AtMostOnce),
        "1" => Ok(QoS::AtLeastOnce),
        "2" => Ok(QoS::ExactlyOnce),
        _ => Err(format!("must be 0, 1 or 2, is {}", shown(raw))),
    }
}

fn read_ttl(raw: &RawValue, ttl_max: Duration) -> Result<Duration, String> {
    let expected = "a duration like \"15m\" or \"24h\", or whole seconds";
    let ttl = match raw.get().as_bytes().first() {
        Some(b'"') => duration::parse(&read_text(raw)?)
            .map_err(|_| format!("must be {expected}, is {}", shown(raw)))?,
        _ if raw.get().starts_with('-') => return Err("must be greater than 0".into()),
        _ => Duration::from_secs(read(raw, expected)?),
    };
    if ttl.is_zero() {
        return Err("must be greater than 0".into());
    }
    if ttl > ttl_max {
        return Err(format!(
            "must be at most {}, is {}",
            duration::format(ttl_max),
            shown(raw)
        ));
    }
    Ok(ttl)
}

fn read_content_type(raw: &RawValue) -> Result<ByteString, String> {
    let text = read_text(raw)?;
    if text.is_empty() || !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Err("must be printable ASCII like \"text/plain; charset=utf-8\"".into());
    }
    if text.len() > CONTENT_TYPE_BYTES_MAX {
        return Err(format!(
            "must be at most {CONTENT_TYPE_BYTES_MAX} characters long"
        ));
    }
    Ok(text.into_owned().into())
}

#[cfg(test)]
mod tests;
