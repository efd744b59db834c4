//! One PUBLISH for many receivers: encoded once for each kind of receiver, then copied and patched.
//!
//! What differs from one receiver to the next is the packet identifier, DUP and the seconds that a
//! message still has to live; their places are known, so a delivery is one copy and a few bytes.

use std::num::NonZeroU16;

use bytes::{Bytes, BytesMut};

use crate::encode::{
    Counter, EncodeError, PropertySet, PublishPropertySet, Sink, first_byte_of_publish, start,
};
use crate::{PacketId, Publish, QoS, Version};

pub(crate) const DUP: u8 = 1 << 3;

/// Stands where each receiver's packet identifier will.
const PLACEHOLDER: PacketId = PacketId(NonZeroU16::MAX);

/// An encoded PUBLISH without a receiver. A clone shares the bytes.
#[derive(Debug, Clone)]
pub struct EncodedPublish {
    /// Empty where no packet can hold the message.
    packet: Bytes,
    /// Where the packet identifier stands; 0 where there is none.
    packet_id_at: u32,
    /// Where the seconds of the message expiry interval stand; 0 where there are none.
    expiry_at: u32,
    qos: QoS,
}

impl EncodedPublish {
    /// Encodes `publish` as it goes to receivers of `version` with an effective `qos` and `retain`,
    /// whatever QoS, RETAIN, DUP, packet identifier and topic alias it came with.
    ///
    /// A message that no packet can hold (a property of more than 65,535 bytes) has the length
    /// `usize::MAX`, which is too large for every receiver, and is written as nothing.
    pub fn new(version: Version, publish: &Publish, qos: QoS, retain: bool) -> Self {
        let ids = publish
            .properties
            .as_ref()
            .map_or(&[][..], |p| &p.subscription_ids);
        Self::with_subscription_ids(version, publish, qos, retain, ids)
    }

    /// As [`EncodedPublish::new`], with the subscription identifiers of one receiver.
    pub fn with_subscription_ids(
        version: Version,
        publish: &Publish,
        qos: QoS,
        retain: bool,
        subscription_ids: &[u32],
    ) -> Self {
        let properties = PublishPropertySet {
            properties: publish.properties.as_deref(),
            subscription_ids,
            topic_alias: None,
        };
        encode(version, publish, qos, retain, &properties).unwrap_or(Self {
            packet: Bytes::new(),
            packet_id_at: 0,
            expiry_at: 0,
            qos,
        })
    }

    /// Appends the packet for one receiver. `packet_id` is `Some` exactly where the QoS is above 0.
    pub fn write(&self, packet_id: Option<PacketId>, dup: bool, out: &mut BytesMut) {
        debug_assert_eq!(
            packet_id.is_some(),
            self.qos > QoS::AtMostOnce,
            "QoS and packet id"
        );
        let start = out.len();
        out.extend_from_slice(&self.packet);
        let packet = &mut out[start..];
        if let Some(id) = packet_id
            && self.packet_id_at > 0
        {
            patch(packet, self.packet_id_at, &id.0.get().to_be_bytes());
        }
        if dup && let Some(first_byte) = packet.first_mut() {
            *first_byte |= DUP;
        }
    }

    /// As [`EncodedPublish::write`], with the seconds that the message has left ([MQTT-3.3.2-6]). A
    /// message that was published without an expiry interval, or a 3.1.1 one, stays without.
    pub fn write_with_expiry(
        &self,
        packet_id: Option<PacketId>,
        dup: bool,
        remaining_s: u32,
        out: &mut BytesMut,
    ) {
        let start = out.len();
        self.write(packet_id, dup, out);
        if self.expiry_at > 0 {
            patch(
                &mut out[start..],
                self.expiry_at,
                &remaining_s.to_be_bytes(),
            );
        }
    }

    /// Bytes of the packet; `usize::MAX` where no packet can hold the message.
    #[expect(clippy::len_without_is_empty, reason = "no packet is empty")]
    pub fn len(&self) -> usize {
        if self.packet.is_empty() {
            usize::MAX
        } else {
            self.packet.len()
        }
    }

    /// The effective QoS.
    pub fn qos(&self) -> QoS {
        self.qos
    }

    /// The bytes of the topic; empty where no packet can hold the message.
    pub fn topic(&self) -> &[u8] {
        let header = fixed_header_bytes(&self.packet);
        self.packet
            .get(header..)
            .and_then(|body| body.split_first_chunk())
            .and_then(|(length, rest)| rest.get(..usize::from(u16::from_be_bytes(*length))))
            .unwrap_or_default()
    }

    /// A packet of MQTT 5.0 taken apart; `None` where no packet can hold the message.
    pub(crate) fn parts(&self) -> Option<Parts<'_>> {
        let has_packet_id = self.packet_id_at > 0;
        let topic = self.topic();
        let after_topic = fixed_header_bytes(&self.packet) + 2 + topic.len();
        let block = self
            .packet
            .get(after_topic + if has_packet_id { 2 } else { 0 }..)?;
        let length_bytes = varint_bytes(block)?;
        let length = block[..length_bytes]
            .iter()
            .rev()
            .fold(0, |length, byte| length << 7 | usize::from(byte & 0x7F));
        let (properties, payload) = block[length_bytes..].split_at_checked(length)?;
        Some(Parts {
            first_byte: self.packet[0],
            topic,
            has_packet_id,
            properties,
            expires: self.expiry_at > 0,
            payload,
        })
    }
}

/// The pieces of an encoded PUBLISH of MQTT 5.0.
pub(crate) struct Parts<'a> {
    pub(crate) first_byte: u8,
    pub(crate) topic: &'a [u8],
    pub(crate) has_packet_id: bool,
    /// Without the length in front.
    pub(crate) properties: &'a [u8],
    pub(crate) expires: bool,
    pub(crate) payload: &'a [u8],
}

/// Bytes of the Variable Byte Integer that `bytes` begin with.
fn varint_bytes(bytes: &[u8]) -> Option<usize> {
    Some(1 + bytes.iter().position(|byte| byte & 0x80 == 0)?)
}

fn fixed_header_bytes(packet: &[u8]) -> usize {
    packet
        .get(1..)
        .and_then(varint_bytes)
        .map_or(0, |length| 1 + length)
}

fn patch(packet: &mut [u8], at: u32, bytes: &[u8]) {
    let at = at as usize;
    packet[at..at + bytes.len()].copy_from_slice(bytes);
}

fn encode(
    version: Version,
    publish: &Publish,
    qos: QoS,
    retain: bool,
    properties: &PublishPropertySet<'_>,
) -> Result<EncodedPublish, EncodeError> {
    let packet_id = (qos > QoS::AtMostOnce).then_some(PLACEHOLDER);
    let mut body = Counter::default();
    publish.write_body(version, packet_id, properties, &mut body)?;
    let mut packet = BytesMut::with_capacity(body.bytes() + 5);
    start(
        first_byte_of_publish(qos as u8, retain),
        body.bytes(),
        &mut packet,
    )?;
    let after_topic = packet.len() + 2 + publish.topic.as_str().len();
    publish.write_body(version, packet_id, properties, &mut packet)?;

    let after_id = after_topic + if packet_id.is_some() { 2 } else { 0 };
    let expires = properties
        .properties
        .is_some_and(|p| p.message_expiry_interval_s.is_some());
    let expiry_at = match version {
        // The interval is the first property, and one byte says that it is one.
        Version::V5 if expires => after_id + property_length_bytes(properties)? + 1,
        _ => 0,
    };
    Ok(EncodedPublish {
        packet: packet.freeze(),
        packet_id_at: packet_id.map_or(0, |_| after_topic as u32),
        expiry_at: expiry_at as u32,
        qos,
    })
}

/// How many bytes the length in front of `properties` takes.
fn property_length_bytes(properties: &PublishPropertySet<'_>) -> Result<usize, EncodeError> {
    let mut block = Counter::default();
    properties.write(&mut block)?;
    let mut length = Counter::default();
    length.varint(block.bytes())?;
    Ok(length.bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PublishProperties, TopicName};

    fn id(id: u16) -> PacketId {
        PacketId(NonZeroU16::new(id).unwrap())
    }

    fn message(properties: Option<PublishProperties>) -> Publish {
        Publish {
            dup: true,
            qos: QoS::ExactlyOnce,
            retain: true,
            topic: TopicName::from_static("a/b"),
            packet_id: Some(id(99)),
            properties: properties.map(Box::new),
            payload: Bytes::from_static(b"payload"),
        }
    }

    /// The patched bytes are those that a packet built for the receiver would have.
    #[test]
    fn a_patched_packet_is_the_packet_of_its_receiver() {
        let expiring = || PublishProperties {
            message_expiry_interval_s: Some(60),
            ..PublishProperties::default()
        };
        let long = PublishProperties {
            // Long enough for a property length of two bytes.
            content_type: Some("x".repeat(200).into()),
            subscription_ids: vec![3],
            topic_alias: NonZeroU16::new(7),
            ..expiring()
        };
        let none = PublishProperties {
            payload_is_utf8: Some(true),
            ..Default::default()
        };
        for properties in [None, Some(none), Some(expiring()), Some(long)] {
            for version in [Version::V3_1_1, Version::V5] {
                for qos in [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce] {
                    check_patched(&message(properties.clone()), version, qos);
                }
            }
        }
    }

    fn check_patched(publish: &Publish, version: Version, qos: QoS) {
        let packet_id = (qos > QoS::AtMostOnce).then(|| id(0x1234));
        let dup = packet_id.is_some();
        let encoded = EncodedPublish::new(version, publish, qos, false);
        let mut expected = Publish {
            dup,
            qos,
            retain: false,
            packet_id,
            ..publish.clone()
        };
        if let Some(properties) = &mut expected.properties {
            properties.topic_alias = None;
            properties.message_expiry_interval_s = properties.message_expiry_interval_s.map(|_| 41);
        }
        let (mut patched, mut built) = (BytesMut::from("x"), BytesMut::from("x"));
        encoded.write_with_expiry(packet_id, dup, 41, &mut patched);
        expected.encode(version, &mut built).unwrap();
        assert_eq!(patched, built);
        assert_eq!(encoded.len(), built.len() - 1);
        assert_eq!(encoded.qos(), qos);
    }

    #[test]
    fn each_receiver_gets_its_own_subscription_identifiers() {
        let publish = message(None);
        let to = |ids| {
            let qos = QoS::AtMostOnce;
            EncodedPublish::with_subscription_ids(Version::V5, &publish, qos, false, ids)
        };
        let mut out = BytesMut::new();
        to(&[1, 300]).write(None, false, &mut out);
        assert_eq!(
            &out[..],
            b"\x30\x12\x00\x03a/b\x05\x0B\x01\x0B\xAC\x02payload"
        );
    }

    #[test]
    fn what_no_packet_can_hold_is_too_large_for_everyone() {
        let content_type = Some("x".repeat(65_536).into());
        let publish = message(Some(PublishProperties {
            content_type,
            ..Default::default()
        }));
        let encoded = EncodedPublish::new(Version::V5, &publish, QoS::AtLeastOnce, false);
        assert_eq!(encoded.len(), usize::MAX);
        let mut out = BytesMut::new();
        encoded.write_with_expiry(Some(id(1)), true, 5, &mut out);
        assert!(out.is_empty());
    }

    /// Thousands may wait in a slow receiver's queue.
    #[test]
    fn a_queued_message_is_small() {
        assert!(
            size_of::<EncodedPublish>() <= 48,
            "{}",
            size_of::<EncodedPublish>()
        );
    }
}
