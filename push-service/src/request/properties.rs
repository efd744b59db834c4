//! Objects of texts: user properties of a push, headers of a call.

use std::borrow::Cow;
use std::fmt;

use moorline_mqtt::{ByteString, UserProperties};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{Errors, Key, kind_of, read_text};

/// User properties of one push.
const PROPERTIES_MAX: usize = 64;
/// Names and values of all of them, in bytes.
const PROPERTIES_BYTES_MAX: usize = 16 * 1024;

pub(super) fn read_properties(errors: &mut Errors, raw: Option<&RawValue>) -> UserProperties {
    let Some(raw) = raw else {
        return UserProperties::new();
    };
    let Ok(Pairs(pairs)) = serde_json::from_str::<Pairs<'_>>(raw.get()) else {
        errors.add(
            "properties",
            format!("must be an object of texts, is {}", kind_of(raw)),
        );
        return UserProperties::new();
    };
    if pairs.len() > PROPERTIES_MAX {
        errors.add(
            "properties",
            format!("must be at most {PROPERTIES_MAX}, are {}", pairs.len()),
        );
        return UserProperties::new();
    }
    let mut properties = UserProperties::with_capacity(pairs.len());
    let mut bytes = 0;
    for (name, value) in pairs {
        match read_property(&name, value) {
            Ok(value) => {
                bytes += name.len() + value.len();
                properties.push((name.into_owned().into(), value));
            }
            Err(detail) => errors.add(format!("properties.{name}"), detail),
        }
    }
    if bytes > PROPERTIES_BYTES_MAX {
        let detail =
            format!("must be at most {PROPERTIES_BYTES_MAX} bytes long together, are {bytes}");
        errors.add("properties", detail);
    }
    properties
}

fn read_property(name: &str, value: &RawValue) -> Result<ByteString, String> {
    if matches!(name, "message-id" | "traceparent") {
        return Err("is set by the gateway".into());
    }
    let value = read_text(value)?;
    if name.contains('\0') || value.contains('\0') {
        return Err("must not contain U+0000".into());
    }
    Ok(value.into_owned().into())
}

/// An object in the order in which it was written, names used twice included (MQTT allows that).
pub(super) struct Pairs<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Pairs<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Pairs<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(Key(key)) = map.next_key::<Key<'de>>()? {
                    pairs.push((key, map.next_value()?));
                }
                Ok(Pairs(pairs))
            }
        }
        from.deserialize_map(InOrder)
    }
}
