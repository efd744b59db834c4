//! What may be said of an event that cancels or triggers delayed jobs.

use moorline_router::{EventName, MessageId};
use serde::Deserialize;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::{
    Cow, Deserializer, Errors, Fields, FieldsVisitor, Problem, ProblemKind, after_name, malformed,
    note_strangers, read_text,
};

/// Something happened.
#[derive(Default, ToSchema)]
pub(crate) struct EventRequest<'a> {
    /// What: text without a colon.
    #[schema(value_type = String, example = "order.paid")]
    r#type: Option<&'a RawValue>,
    /// To what.
    #[schema(value_type = String, example = "123")]
    key: Option<&'a RawValue>,
    /// Names this event, so that it counts once however often it is sent: 1 to 64 visible ASCII characters.
    #[schema(value_type = String, required = false)]
    id: Option<&'a RawValue>,
    #[schema(ignore)]
    unknown: Vec<Cow<'a, str>>,
    #[schema(ignore)]
    repeated: Vec<&'static str>,
}

// By hand: one of the fields is a word of the language.
impl<'a> Fields<'a> for EventRequest<'a> {
    const EXPECTED: &'static str = "an object like {\"type\": \"order.paid\", \"key\": \"123\"}";

    fn slot(&mut self, key: &str) -> Option<(&'static str, &mut Option<&'a RawValue>)> {
        match key {
            "type" => Some(("type", &mut self.r#type)),
            "key" => Some(("key", &mut self.key)),
            "id" => Some(("id", &mut self.id)),
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

impl<'de> Deserialize<'de> for EventRequest<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_map(FieldsVisitor(std::marker::PhantomData))
    }
}

fn read_part(raw: Option<&RawValue>) -> Result<Cow<'_, str>, String> {
    match read_text(raw.ok_or("is required")?)? {
        text if text.is_empty() => Err("must not be empty".to_owned()),
        text => Ok(text),
    }
}

/// An event that may be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NewEvent {
    /// What happened to what.
    pub(crate) name: EventName,
    /// The caller's name for it.
    pub(crate) id: Option<MessageId>,
}

impl NewEvent {
    /// Reads the body of a request; the problem names every wrong field.
    pub(crate) fn from_json(body: &[u8]) -> Result<Self, Problem> {
        let request: EventRequest<'_> = serde_json::from_slice(body).map_err(|e| malformed(&e))?;
        let mut errors = Errors::default();
        note_strangers(&mut errors, "", &request.unknown, &request.repeated, &[]);
        let kind = read_part(request.r#type).and_then(|text| match text.contains(':') {
            true => Err("must not contain a colon".to_owned()),
            false => Ok(text),
        });
        let kind = errors.keep("type", kind);
        let key = errors.keep("key", read_part(request.key));
        let name = kind.zip(key).and_then(|(kind, key)| {
            let name = EventName::new(&kind, &key);
            errors.keep("key", name.map_err(|error| after_name(&error.to_string())))
        });
        let id = request.id.and_then(|raw| {
            let id = read_text(raw).and_then(|text| {
                MessageId::parse(&text).map_err(|error| after_name(&error.to_string()))
            });
            errors.keep("id", id)
        });
        match (name, errors.0.is_empty()) {
            (Some(name), true) => Ok(Self { name, id }),
            _ => Err(Problem::fields(ProblemKind::InvalidRequest, errors.0)),
        }
    }
}
