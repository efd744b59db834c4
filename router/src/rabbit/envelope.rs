//! A message of a device as an AMQP message, so that anybody can consume it: the body is the payload as the device sent
//! it, everything else is in properties and headers (`docs/amqp.md`).

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, ByteArray, FieldArray, FieldTable, LongString, ShortString};
use moorline_mqtt::{ByteString, PublishProperties, QoS, TopicName};

use crate::{ClientId, DeadLetter, MessageId, QueueName, UpstreamMessage, unix_ms};

const CLIENT_ID: &str = "client_id";
const TOPIC: &str = "topic";
const QOS: &str = "qos";
const RECEIVED_AT: &str = "received_at";
const CONTENT_TYPE: &str = "content_type";
const USER_PROPERTIES: &str = "user_properties";
const RESPONSE_TOPIC: &str = "response_topic";
const CORRELATION_DATA: &str = "correlation_data";
const PAYLOAD_IS_UTF8: &str = "payload_is_utf8";
const MESSAGE_EXPIRY: &str = "message_expiry_s";

const DEAD_ID: &str = "dead_letter_id";
const DEAD_QUEUE: &str = "dead_letter_queue";
const DEAD_REASON: &str = "dead_letter_reason";
const DEAD_ATTEMPTS: &str = "dead_letter_attempts";
const DEAD_AT: &str = "dead_letter_at";
/// What a reason may have: it goes into a header.
const REASON_BYTES_MAX: usize = 4_096;

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(value))
}

fn number(value: u64) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(value).unwrap_or(i64::MAX))
}

fn put(headers: &mut FieldTable, name: &'static str, value: AMQPValue) {
    headers.insert(name.into(), value);
}

/// The properties of a message but for its id.
pub(super) fn properties_of(message: &UpstreamMessage) -> BasicProperties {
    let mut headers = FieldTable::default();
    put(&mut headers, CLIENT_ID, text(message.client.as_str()));
    put(&mut headers, TOPIC, text(message.topic.as_str()));
    put(&mut headers, QOS, number(message.qos as u64));
    put(&mut headers, RECEIVED_AT, number(message.received_at_ms));
    let mut properties = BasicProperties::default().with_timestamp(message.received_at_ms / 1_000);
    if let Some(of_device) = message.properties.as_deref() {
        if let Some(content_type) = &of_device.content_type {
            put(&mut headers, CONTENT_TYPE, text(content_type));
            if let Ok(short) = ShortString::try_new(content_type.to_string()) {
                properties = properties.with_content_type(short);
            }
        }
        put_device_properties(&mut headers, of_device);
    }
    properties.with_headers(headers)
}

fn put_device_properties(headers: &mut FieldTable, of_device: &PublishProperties) {
    if !of_device.user_properties.is_empty() {
        let pair = |(name, value): &(ByteString, ByteString)| {
            AMQPValue::FieldArray(FieldArray::from(vec![text(name), text(value)]))
        };
        let pairs: Vec<_> = of_device.user_properties.iter().map(pair).collect();
        put(
            headers,
            USER_PROPERTIES,
            AMQPValue::FieldArray(pairs.into()),
        );
    }
    if let Some(topic) = &of_device.response_topic {
        put(headers, RESPONSE_TOPIC, text(topic.as_str()));
    }
    if let Some(data) = &of_device.correlation_data {
        let bytes = ByteArray::from(data.to_vec());
        put(headers, CORRELATION_DATA, AMQPValue::ByteArray(bytes));
    }
    if let Some(is_utf8) = of_device.payload_is_utf8 {
        put(headers, PAYLOAD_IS_UTF8, AMQPValue::Boolean(is_utf8));
    }
    if let Some(seconds) = of_device.message_expiry_interval_s {
        put(headers, MESSAGE_EXPIRY, number(seconds.into()));
    }
}

/// What is added to the properties of a message that is a dead letter from now on.
pub(super) fn dead_properties(letter: &DeadLetter) -> BasicProperties {
    let properties = properties_of(&letter.message);
    let mut headers = properties.headers().clone().unwrap_or_default();
    let reason = &letter.reason[..letter.reason.floor_char_boundary(REASON_BYTES_MAX)];
    // Orders letters by time, and tells one that is stored twice.
    put(&mut headers, DEAD_ID, text(MessageId::generate().as_str()));
    put(&mut headers, DEAD_QUEUE, text(letter.queue.as_str()));
    put(&mut headers, DEAD_REASON, text(reason));
    put(&mut headers, DEAD_ATTEMPTS, number(letter.attempts.into()));
    put(&mut headers, DEAD_AT, number(letter.at_ms));
    properties.with_headers(headers)
}

/// Headers as they came.
struct Headers<'a>(Option<&'a FieldTable>);

impl Headers<'_> {
    fn get(&self, name: &str) -> Option<&AMQPValue> {
        self.0?.inner().get(name)
    }

    fn text(&self, name: &str) -> Option<String> {
        as_text(self.get(name)?)
    }

    fn number(&self, name: &str) -> Option<u64> {
        let number = match self.get(name)? {
            AMQPValue::LongLongInt(n) => *n,
            AMQPValue::LongInt(n) => i64::from(*n),
            AMQPValue::LongUInt(n) => i64::from(*n),
            AMQPValue::ShortInt(n) => i64::from(*n),
            AMQPValue::ShortShortInt(n) => i64::from(*n),
            AMQPValue::ShortShortUInt(n) => i64::from(*n),
            _ => return None,
        };
        u64::try_from(number).ok()
    }
}

fn as_text(value: &AMQPValue) -> Option<String> {
    let AMQPValue::LongString(text) = value else {
        return None;
    };
    String::from_utf8(text.as_bytes().to_vec()).ok()
}

/// The message of a delivery. Somebody else may have put it there: what is missing or makes no sense is filled in, so that
/// there is no message that blocks a queue.
pub(super) fn message_of(
    queue: &str,
    properties: &BasicProperties,
    payload: Vec<u8>,
) -> UpstreamMessage {
    let headers = Headers(properties.headers().as_ref());
    let id = properties.message_id().as_ref();
    let id = id.and_then(|id| MessageId::parse(id.as_str()).ok());
    let client = headers.text(CLIENT_ID);
    let client = client.and_then(|text| ClientId::parse(&text).ok());
    let topic = headers.text(TOPIC);
    let topic = topic.and_then(|text| TopicName::parse(text.into()).ok());
    let named = |text: &str| TopicName::parse(text.to_owned().into()).ok();
    UpstreamMessage {
        id: id.unwrap_or_else(MessageId::generate),
        client: client.unwrap_or_else(|| ClientId::parse("unknown").expect("a valid constant")),
        topic: topic
            .or_else(|| named(queue))
            .unwrap_or_else(|| named("unknown").expect("a valid constant")),
        qos: match headers.number(QOS) {
            Some(0) => QoS::AtMostOnce,
            Some(2) => QoS::ExactlyOnce,
            _ => QoS::AtLeastOnce,
        },
        properties: device_properties(&headers, properties),
        payload: Bytes::from(payload),
        received_at_ms: headers.number(RECEIVED_AT).unwrap_or_else(unix_ms),
    }
}

fn device_properties(
    headers: &Headers<'_>,
    properties: &BasicProperties,
) -> Option<Box<PublishProperties>> {
    let content_type = headers.text(CONTENT_TYPE).or_else(|| {
        let content_type = properties.content_type().as_ref();
        content_type.map(ShortString::to_string)
    });
    let mut user_properties = Vec::new();
    if let Some(AMQPValue::FieldArray(pairs)) = headers.get(USER_PROPERTIES) {
        for pair in pairs.as_slice() {
            if let AMQPValue::FieldArray(pair) = pair
                && let [name, value] = pair.as_slice()
                && let (Some(name), Some(value)) = (as_text(name), as_text(value))
            {
                user_properties.push((name.into(), value.into()));
            }
        }
    }
    let correlation_data = match headers.get(CORRELATION_DATA) {
        Some(AMQPValue::ByteArray(bytes)) => Some(Bytes::copy_from_slice(bytes.as_slice())),
        Some(AMQPValue::LongString(text)) => Some(Bytes::copy_from_slice(text.as_bytes())),
        _ => None,
    };
    let payload_is_utf8 = match headers.get(PAYLOAD_IS_UTF8) {
        Some(AMQPValue::Boolean(is_utf8)) => Some(*is_utf8),
        _ => None,
    };
    let response_topic = headers.text(RESPONSE_TOPIC);
    let expiry = headers.number(MESSAGE_EXPIRY);
    let found = PublishProperties {
        payload_is_utf8,
        message_expiry_interval_s: expiry.and_then(|seconds| u32::try_from(seconds).ok()),
        response_topic: response_topic.and_then(|text| TopicName::parse(text.into()).ok()),
        correlation_data,
        user_properties,
        content_type: content_type.map(Into::into),
        ..PublishProperties::default()
    };
    (found != PublishProperties::default()).then(|| Box::new(found))
}

/// A dead letter and its id, which orders letters by time. One that the broker made (somebody refused a message without
/// putting it back) has neither reason nor id from us.
pub(super) fn dead_letter_of(
    routing_key: &str,
    properties: &BasicProperties,
    payload: Vec<u8>,
) -> (String, DeadLetter) {
    let headers = Headers(properties.headers().as_ref());
    let at_ms = headers.number(DEAD_AT).unwrap_or_else(unix_ms);
    let attempts = headers.number(DEAD_ATTEMPTS);
    let attempts = attempts.and_then(|attempts| u32::try_from(attempts).ok());
    let reason = headers.text(DEAD_REASON);
    let id = headers
        .text(DEAD_ID)
        .filter(|id| MessageId::parse(id).is_ok());
    let queue = headers.text(DEAD_QUEUE);
    let letter = DeadLetter {
        queue: QueueName::new(queue.as_deref().unwrap_or(routing_key)),
        reason: reason.unwrap_or_else(|| "refused by a consumer of the queue".to_owned()),
        attempts: attempts.unwrap_or(1),
        at_ms,
        message: message_of(routing_key, properties, payload),
    };
    let id = id.unwrap_or_else(|| MessageId::generate().to_string());
    (id, letter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(properties: Option<Box<PublishProperties>>) -> UpstreamMessage {
        UpstreamMessage {
            id: MessageId::generate(),
            client: ClientId::parse("car-7/é").unwrap(),
            topic: TopicName::parse("up/é".into()).unwrap(),
            qos: QoS::ExactlyOnce,
            properties,
            payload: Bytes::from_static(&[0, 159, 146, 150]),
            received_at_ms: 1_700_000_000_123,
        }
    }

    fn round_trip(message: &UpstreamMessage) -> UpstreamMessage {
        let properties = properties_of(message).with_message_id(message.id.as_str().into());
        message_of("q", &properties, message.payload.to_vec())
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let all = PublishProperties {
            payload_is_utf8: Some(false),
            message_expiry_interval_s: Some(0),
            response_topic: Some(TopicName::parse("a/b".into()).unwrap()),
            correlation_data: Some(Bytes::from_static(b"\0\xff")),
            user_properties: vec![
                ("k".into(), "1".into()),
                ("".into(), "é".into()),
                ("k".into(), "2".into()),
            ],
            content_type: Some("x".repeat(300).into()),
            ..PublishProperties::default()
        };
        for properties in [None, Some(Box::new(all))] {
            let message = message(properties);
            assert_eq!(round_trip(&message), message);
        }
    }

    #[test]
    fn what_somebody_else_published_is_a_message_too() {
        let mut headers = FieldTable::default();
        put(&mut headers, CLIENT_ID, number(7));
        put(&mut headers, TOPIC, text("a/#"));
        put(&mut headers, USER_PROPERTIES, text("x"));
        let properties = BasicProperties::default()
            .with_message_id("not an id".into())
            .with_headers(headers);
        let message = message_of("m.up.orders.1", &properties, b"x".to_vec());
        assert_eq!(message.client.as_str(), "unknown");
        assert_eq!(message.topic.as_str(), "m.up.orders.1");
        assert_eq!(message.properties, None);
        let (_, letter) = dead_letter_of("q#", &properties, Vec::new());
        assert_eq!((letter.queue.as_str(), letter.attempts), ("q#", 1));
    }

    #[test]
    fn a_dead_letter_comes_back_as_it_was() {
        let letter = DeadLetter {
            queue: QueueName::new("orders"),
            message: message(None),
            reason: "answered 400".into(),
            attempts: 3,
            at_ms: 17,
        };
        let id = letter.message.id.as_str().into();
        let properties = dead_properties(&letter).with_message_id(id);
        let (_, again) = dead_letter_of("k", &properties, letter.message.payload.to_vec());
        assert_eq!(again, letter);
    }
}
