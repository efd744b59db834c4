//! An encoded PUBLISH as it goes to a receiver that takes topic aliases (MQTT 5.0 section
//! 3.3.2.3.4): with the topic and the alias that will stand for it, or with the alias alone.
//!
//! It is written piece by piece from the bytes that all receivers share; which alias stands for
//! which topic is the connection's business.

use std::num::NonZeroU16;

use bytes::{BufMut, BytesMut};

use crate::PacketId;
use crate::encode::{Counter, REMAINING_LENGTH_MAX, Sink};
use crate::fan_out::{DUP, EncodedPublish};

/// The identifier and the two bytes of a Topic Alias property.
const ALIAS_BYTES: usize = 3;
const ALIAS_PROPERTY: u8 = 0x23;
/// The message expiry interval is the first property, behind its identifier.
const EXPIRY_AT: usize = 1;

/// A PUBLISH of MQTT 5.0 with an alias; borrows the shared packet.
#[derive(Debug)]
pub struct AliasedPublish<'a> {
    first_byte: u8,
    topic: &'a [u8],
    has_packet_id: bool,
    properties: &'a [u8],
    expires: bool,
    alias: NonZeroU16,
    payload: &'a [u8],
    remaining_length: usize,
    length: usize,
}

impl<'a> AliasedPublish<'a> {
    /// `shared` with `alias`, and with its topic as well where `introduces` it. `None` where no
    /// packet can hold that. `shared` must have been encoded for MQTT 5.0.
    pub fn new(shared: &'a EncodedPublish, alias: NonZeroU16, introduces: bool) -> Option<Self> {
        let parts = shared.parts()?;
        let topic = if introduces { parts.topic } else { &[] };
        let with_alias = parts.properties.len() + ALIAS_BYTES;
        let remaining_length = 2
            + topic.len()
            + if parts.has_packet_id { 2 } else { 0 }
            + varint_bytes(with_alias)
            + with_alias
            + parts.payload.len();
        if remaining_length > REMAINING_LENGTH_MAX {
            return None;
        }
        Some(Self {
            first_byte: parts.first_byte,
            topic,
            has_packet_id: parts.has_packet_id,
            properties: parts.properties,
            expires: parts.expires,
            alias,
            payload: parts.payload,
            remaining_length,
            length: 1 + varint_bytes(remaining_length) + remaining_length,
        })
    }

    /// Bytes of the packet.
    #[expect(clippy::len_without_is_empty, reason = "no packet is empty")]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Appends the packet for one receiver, as [`EncodedPublish::write_with_expiry`] does.
    pub fn write(
        &self,
        packet_id: Option<PacketId>,
        dup: bool,
        remaining_s: Option<u32>,
        out: &mut BytesMut,
    ) {
        debug_assert_eq!(packet_id.is_some(), self.has_packet_id, "QoS and packet id");
        out.reserve(self.length);
        out.put_u8(self.first_byte | if dup { DUP } else { 0 });
        put_varint(self.remaining_length, out);
        out.put_u16(self.topic.len() as u16);
        out.put_slice(self.topic);
        if let Some(id) = packet_id {
            out.put_u16(id.0.get());
        }
        put_varint(self.properties.len() + ALIAS_BYTES, out);
        let properties_at = out.len();
        out.put_slice(self.properties);
        if let (true, Some(seconds)) = (self.expires, remaining_s) {
            let at = properties_at + EXPIRY_AT;
            out[at..at + 4].copy_from_slice(&seconds.to_be_bytes());
        }
        out.put_u8(ALIAS_PROPERTY);
        out.put_u16(self.alias.get());
        out.put_slice(self.payload);
    }
}

fn varint_bytes(value: usize) -> usize {
    let mut counter = Counter::default();
    // Lengths within a packet that was encoded: never too large.
    let _ = counter.varint(value);
    counter.bytes()
}

fn put_varint(value: usize, out: &mut BytesMut) {
    let _ = out.varint(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Publish, PublishProperties, QoS, TopicName, Version};
    use bytes::Bytes;

    fn check(properties: Option<PublishProperties>, qos: QoS, introduces: bool) {
        let publish = Publish {
            dup: false,
            qos,
            retain: true,
            topic: TopicName::from_static("a/long/topic"),
            packet_id: None,
            properties: properties.map(Box::new),
            payload: Bytes::from_static(b"payload"),
        };
        let shared = EncodedPublish::new(Version::V5, &publish, qos, true);
        let alias = NonZeroU16::new(0x0102).unwrap();
        let aliased = AliasedPublish::new(&shared, alias, introduces).unwrap();
        let packet_id = (qos > QoS::AtMostOnce).then(|| PacketId(NonZeroU16::new(0x1234).unwrap()));
        let mut written = BytesMut::new();
        aliased.write(packet_id, qos > QoS::AtMostOnce, Some(41), &mut written);
        assert_eq!(written.len(), aliased.len());

        let mut decoder = crate::Decoder::client(Version::V5, 1 << 20);
        let mut data = written.freeze();
        let Some(crate::Packet::Publish(read)) = decoder.decode(&mut data).unwrap() else {
            panic!("not a PUBLISH");
        };
        let mut expected = publish;
        expected.dup = qos > QoS::AtMostOnce;
        expected.packet_id = packet_id;
        if !introduces {
            expected.topic = TopicName::empty();
        }
        let properties = expected.properties.get_or_insert_default();
        properties.topic_alias = Some(alias);
        properties.message_expiry_interval_s = properties.message_expiry_interval_s.map(|_| 41);
        assert_eq!(read, expected);
    }

    #[test]
    fn an_aliased_packet_says_what_the_shared_one_does() {
        let expiring = PublishProperties {
            message_expiry_interval_s: Some(60),
            content_type: Some("x".repeat(122).into()),
            ..Default::default()
        };
        for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce] {
            for introduces in [true, false] {
                check(None, qos, introduces);
                check(Some(expiring.clone()), qos, introduces);
            }
        }
    }
}
