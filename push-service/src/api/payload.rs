//! Payloads and times as the API writes them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use moorline_mqtt::PublishProperties;
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use utoipa::ToSchema;

/// Text where the payload is UTF-8, else base64.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Payload {
    /// The payload, where it is UTF-8 text.
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<String>,
    /// The payload as standard base64, where it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
}

impl From<&Bytes> for Payload {
    fn from(bytes: &Bytes) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self {
                payload: Some(text.to_owned()),
                payload_base64: None,
            },
            Err(_) => Self {
                payload: None,
                payload_base64: Some(STANDARD.encode(bytes)),
            },
        }
    }
}

/// MQTT 5.0 properties that a reader of a message may want.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct Properties {
    /// MQTT 5.0 Content Type.
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    /// MQTT 5.0 user properties; of a name that was sent more than once, the last.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "as_object")]
    #[schema(value_type = std::collections::BTreeMap<String, String>)]
    properties: Vec<(String, String)>,
}

fn as_object<S: Serializer>(pairs: &[(String, String)], to: S) -> Result<S::Ok, S::Error> {
    let mut map = to.serialize_map(None)?;
    for (at, (name, value)) in pairs.iter().enumerate() {
        if !pairs[at + 1..].iter().any(|(later, _)| later == name) {
            map.serialize_entry(name, value)?;
        }
    }
    map.end()
}

impl From<Option<&PublishProperties>> for Properties {
    fn from(properties: Option<&PublishProperties>) -> Self {
        let Some(from) = properties else {
            return Self::default();
        };
        let text = |(name, value): &(moorline_mqtt::ByteString, moorline_mqtt::ByteString)| {
            (name.to_string(), value.to_string())
        };
        Self {
            content_type: from.content_type.as_ref().map(ToString::to_string),
            properties: from.user_properties.iter().map(text).collect(),
        }
    }
}

/// RFC 3339 with milliseconds, in UTC.
pub(super) fn time(unix_ms: u64) -> String {
    i64::try_from(unix_ms)
        .ok()
        .and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok())
        .map_or_else(
            || "9999-12-31T23:59:59.999Z".to_owned(),
            |time| format!("{time:.3}"),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_milliseconds_and_a_zone() {
        assert_eq!(time(1_700_000_000_000), "2023-11-14T22:13:20.000Z");
        assert_eq!(time(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
        assert_eq!(time(u64::MAX), "9999-12-31T23:59:59.999Z");
    }

    #[test]
    fn a_payload_is_text_only_if_it_is_utf8() {
        let json = |bytes: &'static [u8]| {
            serde_json::to_string(&Payload::from(&Bytes::from_static(bytes))).unwrap()
        };
        assert_eq!(json(b"{\"a\":1}"), r#"{"payload":"{\"a\":1}"}"#);
        assert_eq!(json(b"\xff\x00"), r#"{"payload_base64":"/wA="}"#);
        assert_eq!(json(b""), r#"{"payload":""}"#);
    }

    #[test]
    fn of_a_repeated_property_the_last_is_shown() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let properties = Properties {
            content_type: None,
            properties: vec![pair("a", "1"), pair("b", "2"), pair("a", "3")],
        };
        let json = serde_json::to_string(&properties).unwrap();
        assert_eq!(json, r#"{"properties":{"b":"2","a":"3"}}"#);
    }
}
