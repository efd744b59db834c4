//! What a device asked to be published later: the `spec` of an action of the kind [`super::ActionKind::Publish`].

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use moorline_mqtt::{Publish, PublishProperties, QoS, TopicName};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::JobId;
use crate::{ClientId, MessageId};

/// A publication that is made later, as if its device made it then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DelayedPublication {
    /// The device.
    pub client: ClientId,
    /// What it publishes, without what belongs to one connection.
    pub publish: Publish,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spec {
    client: String,
    topic: String,
    qos: u8,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    retain: bool,
    payload_base64: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    payload_is_utf8: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    message_expiry_s: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    response_topic: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    correlation_data_base64: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    properties: Vec<(String, String)>,
}

impl DelayedPublication {
    /// As the action keeps it.
    pub fn to_spec(&self) -> Bytes {
        let publish = &self.publish;
        let properties = publish.properties.as_deref();
        let text = |text: &moorline_mqtt::ByteString| text.to_string();
        let spec = Spec {
            client: self.client.to_string(),
            topic: publish.topic.as_str().to_owned(),
            qos: publish.qos as u8,
            retain: publish.retain,
            payload_base64: STANDARD.encode(&publish.payload),
            payload_is_utf8: properties.and_then(|kept| kept.payload_is_utf8),
            message_expiry_s: properties.and_then(|kept| kept.message_expiry_interval_s),
            content_type: properties.and_then(|kept| kept.content_type.as_ref().map(text)),
            response_topic: properties.and_then(|kept| {
                kept.response_topic
                    .as_ref()
                    .map(|topic| topic.as_str().to_owned())
            }),
            correlation_data_base64: properties
                .and_then(|kept| kept.correlation_data.as_ref())
                .map(|data| STANDARD.encode(data)),
            properties: properties.map_or_else(Vec::new, |kept| {
                let pairs = kept.user_properties.iter();
                pairs
                    .map(|(name, value)| (text(name), text(value)))
                    .collect()
            }),
        };
        let json = serde_json::to_vec(&spec);
        json.expect("made of text, numbers and lists").into()
    }

    /// Reads what [`Self::to_spec`] wrote.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn from_spec(spec: &[u8]) -> Result<Self, String> {
        let wrong =
            |error: &dyn std::fmt::Display| format!("the publication cannot be read: {error}");
        let bytes = |text: &str| {
            STANDARD
                .decode(text)
                .map(Bytes::from)
                .map_err(|e| wrong(&e))
        };
        let topic = |text: &str| TopicName::parse(text.to_owned().into()).map_err(|e| wrong(&e));
        let spec: Spec = serde_json::from_slice(spec).map_err(|e| wrong(&e))?;
        let properties = PublishProperties {
            payload_is_utf8: spec.payload_is_utf8,
            message_expiry_interval_s: spec.message_expiry_s,
            content_type: spec.content_type.map(Into::into),
            response_topic: spec.response_topic.as_deref().map(topic).transpose()?,
            correlation_data: spec
                .correlation_data_base64
                .as_deref()
                .map(bytes)
                .transpose()?,
            user_properties: spec
                .properties
                .into_iter()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
            ..PublishProperties::default()
        };
        let qos = match spec.qos {
            0 => QoS::AtMostOnce,
            1 => QoS::AtLeastOnce,
            2 => QoS::ExactlyOnce,
            qos => return Err(wrong(&format!("{qos} is no QoS"))),
        };
        Ok(Self {
            client: ClientId::parse(&spec.client).map_err(|e| wrong(&e))?,
            publish: Publish {
                dup: false,
                qos,
                retain: spec.retain,
                topic: topic(&spec.topic)?,
                packet_id: None,
                properties: (properties != PublishProperties::default())
                    .then(|| Box::new(properties)),
                payload: bytes(&spec.payload_base64)?,
            },
        })
    }
}

/// The job of a message that a device named, or that was named for it: no other device's, and no job that a backend
/// named.
pub fn job_id_of_device(client: &ClientId, id: &MessageId) -> JobId {
    let mut hash = Sha256::new();
    for part in [client.as_str(), id.as_str()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    let digest = hash.finalize();
    let bytes: [u8; 16] = digest[..16].try_into().expect("SHA-256 has 32 bytes");
    let id = uuid::Uuid::new_v8(bytes).hyphenated();
    JobId::parse(&format!("mqtt-{id}")).expect("a word and a UUID")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_is_read_as_it_was_written() {
        let plain = DelayedPublication {
            client: ClientId::parse("gerät \"7\"").unwrap(),
            publish: Publish {
                dup: false,
                qos: QoS::ExactlyOnce,
                retain: true,
                topic: TopicName::parse("up/a \"b\"\\c".into()).unwrap(),
                packet_id: None,
                properties: None,
                payload: Bytes::from_static(b"\x00\xff text"),
            },
        };
        assert_eq!(
            DelayedPublication::from_spec(&plain.to_spec()),
            Ok(plain.clone())
        );
        let mut full = plain;
        full.publish.properties = Some(Box::new(PublishProperties {
            payload_is_utf8: Some(true),
            message_expiry_interval_s: Some(7),
            content_type: Some("text/plain".into()),
            response_topic: Some(TopicName::parse("r/1".into()).unwrap()),
            correlation_data: Some(Bytes::from_static(b"\x01")),
            user_properties: vec![("k".into(), "1".into()), ("k".into(), "2".into())],
            ..PublishProperties::default()
        }));
        assert_eq!(DelayedPublication::from_spec(&full.to_spec()), Ok(full));
        assert!(DelayedPublication::from_spec(b"{}").is_err());
    }
}
