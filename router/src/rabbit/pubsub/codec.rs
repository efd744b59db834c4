//! A publication as an AMQP message: its payload is the body, the rest is in properties and headers that AMQP tools show.

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, ByteArray, FieldTable, LongString, ShortString};
use moorline_mqtt::{Publish, PublishProperties, QoS, TopicName};

use crate::pubsub::Publication;
use crate::{ClientId, MessageId};

/// The topic; the routing key is made from it and may be shorter.
const TOPIC: &str = "topic";
/// The process that published it.
const ORIGIN: &str = "origin";
/// The client that published it; not there for a push.
const CLIENT: &str = "client";
const QOS: &str = "qos";
const RETAIN: &str = "retain";
/// Unix milliseconds.
const PUBLISHED_AT: &str = "published-at-ms";
/// Unix milliseconds; for people, the interval itself is among the properties.
const EXPIRES_AT: &str = "expires-at-ms";
/// MQTT 5.0 properties as they stand on the wire.
const PROPERTIES: &str = "mqtt-properties";

/// Everything but the body, the id and the routing key.
pub(super) fn properties_of(publication: &Publication, origin: &str) -> BasicProperties {
    let publish = &publication.publish;
    let mut headers = FieldTable::default();
    let mut put = |name: &'static str, value| {
        headers.insert(name.into(), value);
    };
    put(TOPIC, text(publish.topic.as_str()));
    put(ORIGIN, text(origin));
    if let Some(client) = &publication.from {
        put(CLIENT, text(client.as_str()));
    }
    put(QOS, AMQPValue::LongInt(publish.qos as i32));
    put(RETAIN, AMQPValue::Boolean(publish.retain));
    put(PUBLISHED_AT, milliseconds(publication.published_at_ms));
    let mut properties = BasicProperties::default();
    if let Some(mqtt) = &publish.properties {
        if let Some(seconds) = mqtt.message_expiry_interval_s {
            let at_ms = publication.published_at_ms + u64::from(seconds) * 1000;
            put(EXPIRES_AT, milliseconds(at_ms));
        }
        let content_type = mqtt.content_type.as_ref();
        if let Some(Ok(held)) = content_type.map(|held| ShortString::try_new(held.to_string())) {
            properties = properties.with_content_type(held);
        }
        // A topic alias belongs to a connection.
        let mut mqtt = mqtt.clone();
        mqtt.topic_alias = None;
        let bytes = mqtt.to_bytes();
        if !bytes.is_empty() {
            put(
                PROPERTIES,
                AMQPValue::ByteArray(ByteArray::from(&bytes[..])),
            );
        }
    }
    properties.with_headers(headers)
}

/// How often a durable queue has delivered it in vain.
pub(super) fn given_back(delivery: &Delivery) -> u64 {
    let count = header(delivery, "x-delivery-count").and_then(as_number);
    count.map_or(0, |count| u64::try_from(count).unwrap_or(0))
}

/// Whether this process has published it.
pub(super) fn is_from(delivery: &Delivery, origin: &str) -> bool {
    header(delivery, ORIGIN)
        .and_then(as_text)
        .is_some_and(|text| text == origin)
}

/// `None` for what nobody here has published.
pub(super) fn decode(delivery: &mut Delivery) -> Option<Publication> {
    let id = delivery.properties.message_id().as_ref()?;
    let id = MessageId::parse(id.as_str()).ok()?;
    let from = match header(delivery, CLIENT) {
        Some(client) => Some(ClientId::parse(as_text(client)?).ok()?),
        None => None,
    };
    let topic = as_text(header(delivery, TOPIC)?)?;
    let topic = TopicName::parse(topic.into()).ok()?;
    let qos = match as_number(header(delivery, QOS)?)? {
        0 => QoS::AtMostOnce,
        1 => QoS::AtLeastOnce,
        2 => QoS::ExactlyOnce,
        _ => return None,
    };
    let retain = matches!(header(delivery, RETAIN), Some(AMQPValue::Boolean(true)));
    let published_at_ms = as_number(header(delivery, PUBLISHED_AT)?)?;
    let properties = match header(delivery, PROPERTIES) {
        Some(AMQPValue::ByteArray(bytes)) => {
            let bytes = Bytes::copy_from_slice(bytes.as_slice());
            Some(Box::new(PublishProperties::from_bytes(bytes).ok()?))
        }
        Some(_) => return None,
        None => None,
    };
    Some(Publication {
        id,
        from,
        publish: Publish {
            dup: false,
            qos,
            retain,
            topic,
            packet_id: None,
            properties,
            payload: std::mem::take(&mut delivery.data).into(),
        },
        published_at_ms: u64::try_from(published_at_ms).ok()?,
    })
}

fn header<'d>(delivery: &'d Delivery, name: &str) -> Option<&'d AMQPValue> {
    delivery.properties.headers().as_ref()?.inner().get(name)
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text))
}

fn milliseconds(at_ms: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(at_ms).unwrap_or(i64::MAX))
}

fn as_text(value: &AMQPValue) -> Option<&str> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok(),
        _ => None,
    }
}

fn as_number(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::LongInt(number) => Some(i64::from(*number)),
        AMQPValue::LongLongInt(number) => Some(*number),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_publication_arrives_as_it_left() {
        let publication = Publication {
            id: MessageId::generate(),
            from: Some(ClientId::parse("car/7 é").unwrap()),
            publish: Publish {
                dup: false,
                qos: QoS::ExactlyOnce,
                retain: true,
                topic: TopicName::from_static("a/b.c"),
                packet_id: None,
                properties: Some(Box::new(PublishProperties {
                    message_expiry_interval_s: Some(60),
                    content_type: Some("text/plain".into()),
                    user_properties: vec![("k".into(), "v".into())],
                    ..PublishProperties::default()
                })),
                payload: Bytes::from_static(b"\0\xff"),
            },
            published_at_ms: 1_700_000_000_000,
        };
        let sent = |publication: &Publication| {
            let mut delivery = Delivery::mock(1, "".into(), "".into(), false, Vec::new());
            delivery.properties = properties_of(publication, "node-1")
                .with_message_id(publication.id.as_str().into());
            delivery.data = publication.publish.payload.to_vec();
            delivery
        };
        let mut delivery = sent(&publication);
        assert_eq!(
            delivery
                .properties
                .content_type()
                .as_ref()
                .map(ShortString::as_str),
            Some("text/plain")
        );
        assert!(is_from(&delivery, "node-1") && !is_from(&delivery, "node-2"));
        assert_eq!(decode(&mut delivery).as_ref(), Some(&publication));

        let plain = Publication {
            from: None,
            publish: Publish {
                properties: None,
                qos: QoS::AtMostOnce,
                retain: false,
                ..publication.publish
            },
            ..publication
        };
        assert_eq!(decode(&mut sent(&plain)).as_ref(), Some(&plain));
        let mut other = Delivery::mock(1, "".into(), "".into(), false, b"x".to_vec());
        assert_eq!(decode(&mut other), None);
    }
}
